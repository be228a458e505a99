"""Item 10 of the contract: errors in units in the last place, against wider arithmetic, itself held against 50 digits.

A row loss is off by at most 2 units of max(1, |loss|), a gradient entry by at most 8 units of its row's largest true
entry; ties of thousands of classes, targets that dominate and targets far below included.
"""

from functools import cache

import ml_dtypes
import mpmath
import numpy as np
import pytest

import fastloss as fl
from fastloss.bench import accuracy
from fastloss.bench.accuracy import Rows, gradient_ulps, loss_ulps, unit
from tests.conftest import PLAIN, exact_row

LOSS_ULPS = 2
GRADIENT_ULPS = 8
SOFTMAX = fl.Softmax()
HINGE = {name: loss for name, loss in PLAIN.items() if loss.kind == "hinge"}
SIZE = 2**14
CASES = list(accuracy.all_rows())


@pytest.fixture(autouse=True)
def digits(request):
    double = "dtype" in request.fixturenames and request.getfixturevalue("dtype") is np.float64
    if double and np.finfo(np.longdouble).nmant < 63:
        pytest.skip("long double is no wider than float64 here: there is no truth to measure it against")
    with mpmath.workdps(50):
        yield


@cache
def softmax_cases(dtype):
    """Rows, scores, targets, and the true losses and gradient."""
    drawn = [(rows, *rows.draw(dtype, SIZE)) for rows in CASES]
    return [(rows, scores, y, *accuracy.exact_softmax(scores, y)) for rows, scores, y in drawn]


def unscaled(loss, scores, targets, backend):
    return loss.value_and_grad(scores, targets, reduction="none", backend=backend)


@pytest.mark.parametrize("form", accuracy.FORMS)
def test_the_truth_has_50_digits_to_spare(dtype, form):
    """What the errors are measured against is off by less than a hundredth of a unit itself."""
    for scale, offset, c in [(1, 0, 2), (30, 0, 10), (1000, 1e4, 37), (1, 1e4, 100)]:
        scores, y = Rows(form, scale, offset, c).draw(dtype)
        losses, gradient = accuracy.exact_softmax(scores[:3], y[:3])
        for k in range(3):
            true, true_gradient = exact_row(SOFTMAX, scores[k], y[k])
            units = unit(np.maximum(1, losses[k : k + 1]), dtype)[0]
            assert abs(as_mpf(losses[k]) - true) <= 0.01 * float(units)
            units = unit(np.abs(gradient[k : k + 1]).max(axis=1), dtype)[0]
            for found, entry in zip(gradient[k], true_gradient, strict=True):
                assert abs(as_mpf(found) - entry) <= as_mpf(units) / 100


def as_mpf(number):
    """All bits of a NumPy number, long double included."""
    high = float(number)
    return mpmath.mpf(high) + mpmath.mpf(float(number - type(number)(high)))


@pytest.mark.parametrize("order", ["C", "F"])
def test_softmax(compiled, dtype, order):
    worst = {}
    for rows, scores, y, losses, gradient in softmax_cases(dtype):
        found, found_gradient = unscaled(SOFTMAX, np.asarray(scores, order=order), y, compiled)
        for kind, errors in ("loss", loss_ulps(found, losses)), ("gradient", gradient_ulps(found_gradient, gradient)):
            at = int(errors.argmax())
            if kind not in worst or errors[at] > worst[kind][0]:
                worst[kind] = errors[at], rows, scores[at], y[at], found[at], found_gradient[at]
    assert worst["loss"][0] <= LOSS_ULPS, worst["loss"][1]
    assert worst["gradient"][0] <= GRADIENT_ULPS, worst["gradient"][1]

    # The worst of both, against 50 digits.
    _, _, row, target, found, _ = worst["loss"]
    true, _ = exact_row(SOFTMAX, row, target)
    assert abs(mpmath.mpf(float(found)) - true) <= LOSS_ULPS * float(unit(np.maximum(1, np.abs(found[None])), dtype)[0])
    _, _, row, target, _, found = worst["gradient"]
    _, true = exact_row(SOFTMAX, row, target)
    units = mpmath.mpf(2) ** (mpmath.floor(mpmath.log(max(map(abs, true)), 2))) * float(np.finfo(dtype).eps)
    assert max(abs(mpmath.mpf(float(f)) - t) for f, t in zip(found, true, strict=True)) <= GRADIENT_ULPS * units


# The other order is gathered and scattered the same way whatever the loss: one of them by columns in `make test`.
@pytest.mark.parametrize(
    ("order", "loss"),
    [
        pytest.param(order, loss, id=f"{order}-{name}", marks=[pytest.mark.full] * (order == "F" and name != "hinge"))
        for order in "CF"
        for name, loss in HINGE.items()
    ],
)
def test_hinge(compiled, dtype, order, loss):
    for rows, scores, y, _, _ in softmax_cases(dtype):
        losses, gradient = accuracy.exact_hinge(loss, scores, y)
        found, found_gradient = unscaled(loss, np.asarray(scores, order=order), y, compiled)
        assert loss_ulps(found, losses).max() <= LOSS_ULPS, rows
        if loss.over != "max":  # there classes whose margins differ by less than a rounding are tied
            assert gradient_ulps(found_gradient, gradient).max() <= GRADIENT_ULPS, rows


@pytest.mark.parametrize("order", ["C", "F"])
def test_logistic(compiled, dtype, order):
    for rows, scores, y, _, _ in softmax_cases(dtype):
        losses, gradient = accuracy.exact_logistic(scores, y)
        found, found_gradient = unscaled(fl.Logistic(), np.asarray(scores, order=order), y, compiled)
        assert loss_ulps(found, losses).max() <= LOSS_ULPS, rows
        # Each entry by itself: that of a score that is right is not lost beside the others.
        lost = (found_gradient == 0) & (np.abs(gradient) < np.finfo(dtype).smallest_normal)
        errors = np.abs(found_gradient - gradient) / unit(np.abs(gradient), dtype)
        assert np.where(lost, 0, errors).max() <= 4, rows


def test_the_truth_of_logistic(dtype):
    for form in accuracy.FORMS:
        scores, y = Rows(form, 30, 1, 37).draw(dtype)
        losses, gradient = accuracy.exact_logistic(scores[:3], y[:3])
        for k in range(3):
            true, true_gradient = exact_row(fl.Logistic(), scores[k], y[k])
            assert abs(as_mpf(losses[k]) - true) <= 0.01 * float(unit(np.maximum(1, losses[k : k + 1]), dtype)[0])
            for entry, true_entry in zip(gradient[k], true_gradient, strict=True):
                assert abs(as_mpf(entry) - true_entry) <= as_mpf(unit(np.abs(entry)[None], dtype)[0]) / 100


@pytest.mark.parametrize("loss", HINGE.values(), ids=HINGE.keys())
def test_the_truth_of_hinge(dtype, loss):
    for form in accuracy.FORMS:
        scores, y = Rows(form, 30, 1e4, 37).draw(dtype)
        losses, gradient = accuracy.exact_hinge(loss, scores[:3], y[:3])
        for k in range(3):
            true, true_gradient = exact_row(loss, scores[k], y[k])
            assert abs(as_mpf(losses[k]) - true) <= 0.01 * float(unit(np.maximum(1, losses[k : k + 1]), dtype)[0])
            units = as_mpf(unit(np.abs(gradient[k : k + 1]).max(axis=1), dtype)[0])
            for entry, true_entry in zip(gradient[k], true_gradient, strict=True):
                assert abs(as_mpf(entry) - true_entry) <= units / 100


@pytest.mark.parametrize("gap", [5.0, 30.0, 80.0])
def test_a_target_that_dominates(compiled, dtype, gap):
    """Its entry is −Σ of the others, where p − 1 would be 0 or noise; one score near 0, its distance inexact."""
    scores = np.array([[gap, 0.1, 0.2], [gap + 1e-3, 1e-3, -3.7], [-0.3, -gap, -gap - 0.7]], dtype)
    y = np.zeros(3, int)
    losses, gradient = accuracy.exact_softmax(scores, y)
    found, found_gradient = unscaled(SOFTMAX, scores, y, compiled)
    assert gradient_ulps(found_gradient, gradient).max() <= GRADIENT_ULPS
    # So small a loss is accurate relative to itself, too.
    assert (np.abs(found - losses) <= 4 * unit(losses, dtype)).all()


@pytest.mark.parametrize("n_classes", [385, 1111])
def test_a_maximum_that_comes_late(compiled, dtype, n_classes):
    """Rows of many classes are begun from the maximum of some of them: however far the others are above it."""
    rng = np.random.default_rng(3)
    lifts = np.array([0, 1, 7.3, 15.1, 19.9, 20.1, 23, 24.1, 40, 90, 3e3, -5, -40, -3e3], dtype)
    scores = rng.normal(size=(2 * len(lifts), n_classes)).astype(dtype)
    late = n_classes - 3
    scores[:, late] = np.repeat(lifts, 2) + scores[:, late]
    y = np.where(np.arange(len(scores)) % 2, late, 17)
    losses, gradient = accuracy.exact_softmax(scores, y)
    found, found_gradient = unscaled(SOFTMAX, scores, y, compiled)
    assert loss_ulps(found, losses).max() <= LOSS_ULPS
    assert gradient_ulps(found_gradient, gradient).max() <= GRADIENT_ULPS
    assert (SOFTMAX.value(scores, y, reduction="none", backend=compiled) == found).all()
    p = accuracy.parts(scores, scores.argmax(axis=1))
    probabilities = p.exps / p.total[:, None]
    probabilities[np.arange(len(y)), scores.argmax(axis=1)] = 1 / p.total
    assert gradient_ulps(fl.softmax(scores, backend=compiled), probabilities).max() <= GRADIENT_ULPS
    log_sum = np.log1p(p.others)
    found_log = fl.log_softmax(scores, backend=compiled)
    assert loss_ulps(found_log, p.shifted - log_sum[:, None]).max() <= LOSS_ULPS
    # Of the largest class it may be next to 0, and is accurate relative to itself.
    found_top = np.take_along_axis(found_log, scores.argmax(axis=1)[:, None], axis=1)[:, 0]
    assert (np.abs(found_top + log_sum) <= 4 * unit(log_sum, dtype)).all()
    z = accuracy.widened(scores.max(axis=1)) + log_sum
    assert loss_ulps(fl.logsumexp(scores, backend=compiled), z).max() <= LOSS_ULPS

    # A factor that is small is not lost beside one that is small as well.
    factor = dtype(2.0**-40)
    small = SOFTMAX.value_and_grad(scores, y, reduction="none", upstream=np.full(len(y), factor), backend=compiled)[1]
    kept = np.abs(found_gradient) * factor > 16 * np.finfo(dtype).smallest_normal
    assert (small[kept] == found_gradient[kept] * factor).all()
    factor = dtype(2.0**-75)
    small = SOFTMAX.value_and_grad(scores, y, reduction="none", upstream=np.full(len(y), factor), backend=compiled)[1]
    kept = np.abs(gradient).max(axis=1) * float(factor) > 1e8 * np.finfo(dtype).smallest_normal
    assert gradient_ulps(small[kept] / factor, gradient[kept]).max() <= GRADIENT_ULPS

    in_place = scores.copy()
    again, _ = SOFTMAX.value_and_grad(in_place, y, out=in_place, reduction="none", backend=compiled)
    assert (again == found).all()
    assert in_place.tobytes() == found_gradient.tobytes()


def test_transforms(compiled, dtype):
    for rows, scores, _, _, _ in softmax_cases(dtype):
        top = scores.argmax(axis=1)
        p = accuracy.parts(scores, top)
        log_sum = np.log1p(p.others)[:, None]
        log_p, z = p.shifted - log_sum, accuracy.widened(scores.max(axis=1)) + log_sum[:, 0]
        found = fl.log_softmax(scores, backend=compiled)
        assert loss_ulps(found, log_p).max() <= LOSS_ULPS, rows
        assert loss_ulps(fl.logsumexp(scores, backend=compiled), z).max() <= LOSS_ULPS, rows
        probabilities = p.exps / p.total[:, None]
        probabilities[np.arange(len(top)), top] = 1 / p.total
        assert gradient_ulps(fl.softmax(scores, backend=compiled), probabilities).max() <= GRADIENT_ULPS, rows


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_16_bit_scores(compiled, kind):
    """Computed in float32 from the scores as they are; row losses are float32, the gradient is rounded once."""
    info = ml_dtypes.finfo(kind)
    for rows in CASES:
        if rows.offset or rows.classes > 1000:
            continue
        scores, y = rows.draw(np.float32, SIZE)
        scores = scores.astype(kind)
        losses, gradient = accuracy.exact_softmax(scores.astype(np.float32), y)
        found, found_gradient = unscaled(SOFTMAX, scores, y, compiled)
        assert found.dtype == np.float32
        assert loss_ulps(found, losses).max() <= LOSS_ULPS, rows
        assert found_gradient.dtype == kind
        magnitude = np.abs(gradient)
        half = float(info.eps) * 2.0 ** (np.floor(np.log2(np.maximum(magnitude, float(info.smallest_normal)))) - 1)
        bound = half + GRADIENT_ULPS * unit(magnitude.max(axis=1, keepdims=True), np.float32)
        error = np.abs(found_gradient.astype(np.float64) - gradient)
        flushed = (found_gradient == 0) & (magnitude < float(info.smallest_normal))
        assert (flushed | (error <= bound)).all(), rows


@pytest.mark.full
def test_the_table():
    """Who is measured, at which lines; and that what others lose where the target dominates is seen."""
    result = accuracy.run(["float32"], size=2**10)
    table = result["worst ulps"]["float32"]
    assert {"fastloss", "NumPy", "SciPy"} <= set(result["versions"])
    assert {"scale 30, offset 10000", "C = 32768", "random scores", "target dominates"} <= set(table)
    assert all(cells["fastloss"].loss <= LOSS_ULPS for cells in table.values())
    assert all(cells["fastloss"].gradient <= GRADIENT_ULPS for cells in table.values())
    assert table["target dominates"]["NumPy"].gradient > 1e6
    assert "| target dominates | " in accuracy.markdown(result)


def test_the_command(monkeypatch, capsys, tmp_path):
    cells = {"fastloss": accuracy.Worst(0.5, 2e7)}
    result = {"versions": {"fastloss": "1"}, "worst ulps": {"float32": {"C = 2": cells}}}
    monkeypatch.setattr(accuracy, "run", lambda: result)
    assert accuracy.main(tmp_path / "errors.json") == 0
    assert "| C = 2 | 0.5 / 2e+07 |" in capsys.readouterr().out
    assert '"C = 2"' in (tmp_path / "errors.json").read_text()
