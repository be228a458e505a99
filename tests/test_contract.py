"""The numerical contract of the design, item by item, on every backend (items 7 and 8: test_threads, test_errors)."""

import math
from functools import cache

import ml_dtypes
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastloss as fl
from fastloss import driver
from tests.conftest import BACKENDS, ONE_OF_EACH, PLAIN, exact, exact_row, grid_scores, layouts, ulps

SOFTMAX = fl.Softmax()
HINGES = [(name, loss) for name, loss in PLAIN.items() if loss.kind == "hinge"]
hinges = pytest.mark.parametrize("hinge", [h for _, h in HINGES], ids=[name for name, _ in HINGES])


def rows_of(loss, scores, targets, backend, **more):
    """Row losses and row gradients, unscaled."""
    return loss.value_and_grad(scores, targets, reduction="none", backend=backend, **more)


# --- 1 and 10: accuracy -----------------------------------------------------------------------------------------
# Bounds in units in the last place, for single rows. Where s − m is exact (scores on a grid), what is left for a loss
# is one exp, a sum of positive terms and a log, which damps the errors of both; for a probability one exp, the sum,
# a division and a product, where nothing damps the sum's error (up to 64 terms one by one). An error of half a unit is
# up to 1 unit of a number just above a power of two. Seen at worst: 3 for losses, 8 for gradients.
# Else the reference rounds s − m by up to half a unit of itself, which exp turns into up to |s − m| units of the
# probability. The kernels do not; their bounds, over far more rows, are those of test_accuracy.py.
LOSS_ULPS = 4
GRADIENT_ULPS = 8


@cache
def accuracy_cases(dtype):
    """Name, scores, targets, and the exact losses and gradient."""
    return [(name, scores, y, *exact(SOFTMAX, scores, y)) for name, scores, y in _accuracy_inputs(dtype)]


def _accuracy_inputs(dtype):
    rng = np.random.default_rng(10)
    for c in (2, 3, 10, 16, 17, 65, 300):
        yield f"grid, C = {c}", grid_scores(rng, 20, c, dtype), rng.integers(0, c, 20)
    yield "one dominates", np.array([[30, 10, 5, 0], [0, 5, 30, 10]] * 9, dtype), np.array([0, 2] * 9)
    for offset in (1e4, 1e7, -1e7):
        yield f"offset {offset:g}", (offset + rng.integers(-30, 1, (20, 12))).astype(dtype), rng.integers(0, 12, 20)
    # e^−k for each k down to the smallest normal number (e^−87.3 and e^−708.4), y at the maximum and not.
    tail = np.zeros((20, 11), dtype)
    tail[:, 1:] = -np.linspace(1, 87 if dtype == np.float32 else 708, 200).round().reshape(20, 10)
    yield "tiny probabilities", tail, np.zeros(20, int)
    yield "tiny target", tail, np.arange(20) % 11


def test_softmax_is_accurate_to_a_few_ulps(backend, dtype):
    for name, scores, y, losses, gradient in accuracy_cases(dtype):
        found, grad = rows_of(SOFTMAX, scores, y, backend)
        assert ulps(found, losses).max() <= LOSS_ULPS, name
        assert ulps(grad, gradient).max() <= GRADIENT_ULPS, name


def test_softmax_of_any_scores_is_accurate_to_the_rounding_of_the_shift(backend, dtype):
    rng = np.random.default_rng(11)
    for c in (2, 10, 17, 100):
        scores, y = (6 * rng.standard_normal((20, c))).astype(dtype), rng.integers(0, c, 20)
        losses, gradient = exact(SOFTMAX, scores, y)
        found, grad = rows_of(SOFTMAX, scores, y, backend)
        depth = scores.max(axis=1, keepdims=True) - scores
        assert (ulps(found, losses) <= LOSS_ULPS + depth.max(axis=1)).all(), c
        # The entry of the target is a sum over the others; it is as deep as the deepest that counts.
        bound = GRADIENT_ULPS + depth
        bound[np.arange(20), y] = GRADIENT_ULPS + depth.max(axis=1)
        assert (ulps(grad, gradient) <= bound).all(), c


def test_many_classes_are_accurate(backend, dtype):
    """A sum of 200000 terms one by one would lose half of float32's digits."""
    c = 200_000
    scores = (np.random.default_rng(12).integers(-32, 33, (1, c)) / 16).astype(dtype)
    values, counts = np.unique(scores, return_counts=True)
    with mpmath.workprec(160):
        total = mpmath.fsum(int(n) * mpmath.exp(float(v)) for v, n in zip(values, counts, strict=True))
        loss = mpmath.log(total) - float(scores[0, 7])
        p = {float(v): mpmath.exp(float(v)) / total for v in values}
        target_entry = p[float(scores[0, 7])] - 1
    found, grad = rows_of(SOFTMAX, scores, [7], backend)
    assert ulps(found, np.array([loss])).max() <= LOSS_ULPS
    some = np.array([0, 1, 6, 8, c // 2, c - 2, c - 1])
    assert ulps(grad[0, some], np.array([p[float(s)] for s in scores[0, some]])).max() <= GRADIENT_ULPS
    assert ulps(grad[0, 7:8], np.array([target_entry])).max() <= GRADIENT_ULPS


@cache
def transform_cases(dtype):
    """Name, scores, and the exact softmax, log-softmax and log-sum-exp."""
    cases = []
    for name, scores, _, _, _ in accuracy_cases(dtype):
        with mpmath.workprec(160 + 3 * int(np.ptp(scores))):
            shifted = [[mpmath.mpf(float(s)) - float(row.max()) for s in row] for row in scores]
            exps = [[mpmath.exp(s) for s in row] for row in shifted]
            totals = [mpmath.fsum(row) for row in exps]
            p = [[e / total for e in row] for row, total in zip(exps, totals, strict=True)]
            logs = [mpmath.log(total) for total in totals]
            log_p = [[s - log for s in row] for row, log in zip(shifted, logs, strict=True)]
            z = [float(row.max()) + log for row, log in zip(scores, logs, strict=True)]
        cases.append((name, scores, np.array(p, object), np.array(log_p, object), np.array(z, object)))
    return cases


def test_transforms_are_accurate(backend, dtype):
    for name, scores, p, log_p, z in transform_cases(dtype):
        assert ulps(fl.softmax(scores, backend=backend), p).max() <= GRADIENT_ULPS, name
        assert ulps(fl.log_softmax(scores, backend=backend), log_p).max() <= LOSS_ULPS, name
        # m and log Σ may cancel: a sum can give no more than a unit of the larger.
        unit = np.finfo(dtype).eps * np.maximum(np.abs(scores).max(axis=1), 1)
        error = np.abs((fl.logsumexp(scores, backend=backend).astype(object) - z).astype(float))
        assert (error <= LOSS_ULPS * unit).all(), name


@hinges
def test_hinge_of_a_grid_is_accurate(backend, dtype, hinge):
    """Margins of grid scores are exact; so are their sums, and squares to an ulp."""
    rng = np.random.default_rng(13)
    for c in (1, 2, 10, 16, 17, 65, 300):
        scores, y = grid_scores(rng, 20, c, dtype), rng.integers(0, c, 20)
        losses, gradient = exact(hinge, scores, y)
        found, grad = rows_of(hinge, scores, y, backend)
        bound = 0 if hinge.power == 1 and hinge.over != "mean" else LOSS_ULPS
        assert ulps(found, losses).max() <= bound, c
        assert ulps(grad, gradient).max() <= bound, c


# --- 2: types ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given_type", "computed", "result"),
    [
        (np.float16, np.float32, np.float16),
        (ml_dtypes.bfloat16, np.float32, ml_dtypes.bfloat16),
        (np.float32, np.float32, np.float32),
        (np.float64, np.float64, np.float64),
        (np.uint8, np.float32, np.float32),
        (np.int8, np.float64, np.float64),
        (np.int64, np.float64, np.float64),
        (np.uint32, np.float64, np.float64),
    ],
)
def test_types(backend, loss, given_type, computed, result):
    scores = np.random.default_rng(0).integers(0, 20, (9, 6)).astype(given_type)
    y = np.arange(9) % 6
    value, grad = loss.value_and_grad(scores, y, backend=backend)
    expected, expected_grad = loss.value_and_grad(scores.astype(computed), y, backend=backend)
    assert type(value) is float
    assert value == expected
    assert grad.dtype == result
    np.testing.assert_array_equal(grad, expected_grad.astype(result))
    row_losses, _ = rows_of(loss, scores, y, backend)
    assert row_losses.dtype == computed
    out = np.empty((9, 6), result)
    assert loss.value_and_grad(scores, y, out=out, backend=backend)[1] is out
    np.testing.assert_array_equal(out, grad)


@pytest.mark.parametrize("kind", [">f4", ">f8"])
def test_foreign_byte_order(backend, kind):
    scores = grid_scores(np.random.default_rng(0), 5, 4, np.float64)
    value, grad = SOFTMAX.value_and_grad(scores.astype(kind), np.arange(4).repeat(2)[:5].astype(">i4"), backend=backend)
    native = np.dtype(kind).newbyteorder("=")
    expected, expected_grad = SOFTMAX.value_and_grad(scores.astype(native), [0, 0, 1, 1, 2], backend=backend)
    assert value == expected
    np.testing.assert_array_equal(grad, expected_grad)


def test_losses_are_summed_in_float64(backend, loss):
    n = 100_003
    scores = np.random.default_rng(1).standard_normal((n, 3)).astype(np.float32)
    y = np.arange(n) % 3
    row_losses, _ = rows_of(loss, scores, y, backend)
    exactly = math.fsum(row_losses.tolist())
    assert loss.value(scores, y, reduction="sum", backend=backend) == pytest.approx(exactly, rel=1e-12)
    assert loss.value(scores, y, backend=backend) == pytest.approx(exactly / n, rel=1e-12)


# --- 3: means ---------------------------------------------------------------------------------------------------
def test_mean_divides_by_the_weights(backend, loss, dtype):
    rng = np.random.default_rng(2)
    scores, y, weight = rng.standard_normal((40, 5)).astype(dtype), rng.integers(0, 5, 40), rng.uniform(0, 2, 40)
    row_losses, row_grads = rows_of(loss, scores, y, backend)
    value, grad = loss.value_and_grad(scores, y, sample_weight=weight, backend=backend)
    eps = float(np.finfo(dtype).eps)
    assert value == pytest.approx(row_losses.astype(float) @ weight / weight.sum(), rel=2 * eps)
    np.testing.assert_allclose(grad, row_grads * (weight / weight.sum())[:, None], rtol=4 * eps)


@pytest.mark.parametrize(
    ("n", "more"),
    [(0, {}), (0, {"sample_weight": []}), (5, {"sample_weight": np.zeros(5)})],
    ids=["no rows", "no rows, weighted", "no weight"],
)
def test_mean_over_no_weight_is_nan(backend, loss, dtype, n, more):
    scores = np.full((n, 4), np.inf, dtype)
    out = np.full((n, 4), 7, dtype)
    value, grad = loss.value_and_grad(scores, np.zeros(n, int), out=out, backend=backend, **more)
    assert math.isnan(value)
    assert grad is out
    assert not grad.any()
    assert loss.value(scores, np.zeros(n, int), reduction="sum", backend=backend, **more) == 0
    row_losses, _ = rows_of(loss, scores, np.zeros(n, int), backend, **more)
    assert row_losses.shape == (n,)
    assert not row_losses.any()


def test_mean_over_ignored_rows_alone_is_nan(backend, dtype):
    loss = fl.Softmax(ignore_index=2)
    value, grad = loss.value_and_grad(np.ones((3, 4), dtype), [2, 2, 2], backend=backend)
    assert math.isnan(value)
    assert not grad.any()


@pytest.mark.parametrize("factor", [1e-50, 1e-30, 1e30, 1e50])
def test_mean_does_not_depend_on_the_unit_of_the_weights(backend, loss, factor):
    """Also where float32 cannot hold them: likelihood ratios come in such sizes."""
    scores, y, weight = np.eye(4, dtype=np.float32), np.array([0, 1, 3, 2]), np.array([1.0, 2, 3, 0])
    expected, expected_grad = loss.value_and_grad(scores, y, sample_weight=weight, backend=backend)
    value, grad = loss.value_and_grad(scores, y, sample_weight=weight * factor, backend=backend)
    assert value == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-6)


# --- 4: kinks and ties ------------------------------------------------------------------------------------------
def test_hinge_has_no_gradient_at_the_kink(backend, dtype):
    for hinge in (fl.Hinge(), fl.Hinge(power=2), fl.Hinge(over="mean"), fl.Hinge(over="max")):
        value, grad = hinge.value_and_grad(np.array([[2, 1, 1, 0]], dtype), [0], backend=backend)
        assert value == 0
        assert not grad.any()


def test_lowest_class_wins_a_tie_of_the_maximum(backend, dtype):
    for c in (3, 15, 16, 17, 40):
        for y in range(c):
            scores = np.full((1, c), 2, dtype)
            scores[0, y] = 1.5
            value, grad = fl.Hinge(over="max").value_and_grad(scores, [y], backend=backend)
            expected = np.zeros(c)
            expected[[0 if y else 1, y]] = [1, -1]
            assert value == 1.5
            np.testing.assert_array_equal(grad[0], expected, err_msg=f"C = {c}, y = {y}")


@hinges
def test_one_class_has_no_loss(backend, dtype, hinge):
    value, grad = hinge.value_and_grad(np.array([[3], [-5]], dtype), [0, 0], backend=backend)
    assert value == 0
    assert not grad.any()
    assert SOFTMAX.value(np.array([[3], [-5]], dtype), [0, 0], backend=backend) == 0


# --- 5: NaN and inf ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_specials_at_every_position(backend, dtype, loss, special):
    """Row 2 k has the special value in column k; the other rows are as if it were not there."""
    rng = np.random.default_rng(3)
    for c in range(2, 71):
        scores, y = rng.standard_normal((2 * c, c)).astype(dtype), rng.integers(0, c, 2 * c)
        losses, grad = rows_of(loss, scores, y, backend)
        hit, at = np.arange(0, 2 * c, 2), np.arange(c)
        with_special = scores.copy()
        with_special[hit, at] = special
        found, found_grad = rows_of(loss, with_special, y, backend)

        np.testing.assert_array_equal(found[1::2], losses[1::2])
        np.testing.assert_array_equal(found_grad[1::2], grad[1::2])
        target_hit = y[hit] == at
        if np.isnan(special) or (loss.kind == "softmax" and special > 0):
            assert np.isnan(found[hit]).all(), c
            assert np.isnan(found_grad[hit, at]).all(), c
            if loss.kind == "logistic":  # columns are apart
                assert np.isfinite(found_grad[hit, y[hit]][~target_hit]).all(), c
                continue
            assert np.isnan(found_grad[hit, y[hit]]).all(), c
            if loss.kind == "softmax":
                assert np.isnan(found_grad[hit]).all(), c
        elif loss.kind == "softmax":  # a masked class
            np.testing.assert_array_equal(np.isinf(found[hit]), target_hit)
            np.testing.assert_allclose(found_grad[hit, at], np.where(target_hit, -1, 0), rtol=8 * np.finfo(dtype).eps)
            assert np.isfinite(found[hit][~target_hit]).all()
        else:
            # +inf in a wrong class, or −inf at the target
            infinite = target_hit == (special < 0)
            np.testing.assert_array_equal(np.isposinf(found[hit]), infinite)
            assert np.isfinite(found[hit][~infinite]).all()
        value = loss.value(with_special, y, reduction="sum", backend=backend)
        assert (value == float(np.sum(found, dtype=np.float64))) or np.isnan(value) == np.isnan(found.sum()), c


def test_softmax_masks_classes(backend, dtype):
    """A −inf score is as good as no class at all."""
    rng = np.random.default_rng(4)
    for c in (2, 10, 17, 100):
        scores, y = grid_scores(rng, 30, c, dtype), rng.integers(0, c, 30)
        masked = np.full((30, 2 * c + 1), -np.inf, dtype)
        masked[:, 1::2] = scores
        losses, grad = rows_of(SOFTMAX, scores, y, backend)
        found, found_grad = rows_of(SOFTMAX, masked, 2 * y + 1, backend)
        eps = float(np.finfo(dtype).eps)
        np.testing.assert_allclose(found, losses, rtol=8 * eps)
        np.testing.assert_allclose(found_grad[:, 1::2], grad, rtol=8 * eps)
        assert not found_grad[:, ::2].any()


def test_softmax_target_at_minus_inf(backend, dtype):
    """Loss +inf, gradient p − e_y."""
    scores = np.array([[1, -np.inf, 3], [-np.inf, -np.inf, 0]], dtype)
    value, grad = rows_of(SOFTMAX, scores, [1, 0], backend)
    p = np.exp([-2, 0]) / (1 + np.exp(-2))
    np.testing.assert_array_equal(value, [np.inf, np.inf])
    np.testing.assert_allclose(grad, [[p[0], -1, p[1]], [-1, 0, 1]], rtol=4 * float(np.finfo(dtype).eps))


def test_softmax_of_one_finite_score(backend, dtype):
    scores = np.array([[-np.inf, 5, -np.inf]], dtype)
    value, grad = rows_of(SOFTMAX, scores, [1], backend)
    assert value[0] == 0
    assert not grad.any()


@pytest.mark.parametrize(
    "row", [[np.inf, 0, 0], [np.inf, np.inf, 0], [np.inf, -np.inf, 1], [-np.inf] * 3, [np.nan] * 3]
)
@pytest.mark.parametrize("y", [0, 2])
def test_softmax_without_a_finite_maximum_is_nan(backend, dtype, row, y):
    value, grad = rows_of(SOFTMAX, np.array([row, [1, 2, 3]], dtype), [y, y], backend)
    assert np.isnan(value[0])
    assert np.isnan(grad[0]).all()
    assert np.isfinite(value[1])
    assert np.isfinite(grad[1]).all()


def test_infinities_under_options():
    """Smoothing over a −inf class gives +inf; probability 0 times −inf is 0. (The reference has all options.)"""
    scores = np.array([[1.0, -np.inf, 3.0]])
    assert fl.Softmax(label_smoothing=0.1).value(scores, [0], backend="reference") == np.inf
    q = np.array([[0.5, 0, 0.5]])
    value, grad = SOFTMAX.value_and_grad(scores, q, backend="reference")
    assert value == pytest.approx(math.log1p(math.exp(-2)) + 1)
    assert grad[0, 1] == 0
    _, extras = SOFTMAX.value(scores, [0], outputs=("entropy", "lse"), backend="reference")
    assert extras["entropy"][0] == pytest.approx(
        SOFTMAX.value([[1.0, 3]], [[1 / (1 + math.e**2), 1 / (1 + math.e**-2)]], backend="reference")
    )
    assert extras["lse"][0] == pytest.approx(3 + math.log1p(math.exp(-2)))


@hinges
def test_hinge_of_infinities(backend, dtype, hinge):
    inf = np.inf
    cases = {
        "wrong class +inf": ([0, inf, 1], inf),
        "target −inf": ([-inf, 0, 1], inf),
        "both +inf": ([inf, inf, 1], np.nan),
        "both −inf": ([-inf, -inf, 1], np.nan),
        "wrong class −inf": ([40, -inf, 1], 0),
        "target +inf": ([inf, 0, 1], 0),
        "NaN beats +inf": ([0, inf, np.nan], np.nan),
        "NaN beats +inf, the other way round": ([0, np.nan, inf], np.nan),
        "NaN target": ([np.nan, 0, 1], np.nan),
        "NaN in a class that is not active": ([1000, np.nan, 0], np.nan),
    }
    scores = np.array([row for row, _ in cases.values()], dtype)
    found, _ = rows_of(hinge, scores, np.zeros(len(scores), int), backend)
    for name, value, (_, expected) in zip(cases, found, cases.values(), strict=True):
        np.testing.assert_equal(float(value), expected, err_msg=name)


@pytest.mark.parametrize("masked", [0, 700])
def test_transforms_of_specials(backend, dtype, masked):
    scores = np.array([[1, -np.inf, 3], [-np.inf] * 3, [np.inf, 0, 1], [np.nan, 0, 1], [np.nan, np.inf, 1]], dtype)
    scores = np.pad(scores, ((0, 0), (masked, masked)), constant_values=-np.inf)
    for kind in ("softmax", "log_softmax", "logsumexp"):
        found = getattr(fl, kind)(scores, backend=backend)
        p = 1 / (1 + math.exp(2))
        expected = {
            "softmax": [[p, 0, 1 - p]] + [[np.nan] * 3] * 4,
            "log_softmax": [[math.log(p), -np.inf, math.log1p(-p)]] + [[np.nan] * 3] * 4,
            "logsumexp": [1 - math.log(p), -np.inf, np.inf, np.nan, np.nan],
        }[kind]
        if kind != "logsumexp":
            assert (np.delete(found[0], range(masked, masked + 3)) == (0 if kind == "softmax" else -np.inf)).all()
            found = found[:, masked : masked + 3]
        np.testing.assert_allclose(found, expected, rtol=8 * float(np.finfo(dtype).eps), err_msg=kind)


@pytest.mark.parametrize("n_classes", [97, 600, 4500])
def test_largest_margins_that_are_tied(backend, dtype, n_classes):
    """The gradient is the lowest class's whose margin, as rounded, is the largest; of NaN the first's."""
    rng = np.random.default_rng(n_classes)
    scores = rng.integers(-3, 4, (24, n_classes)).astype(dtype)
    scores[:8] += rng.random((8, n_classes)).astype(dtype) * np.finfo(dtype).eps  # where the margin rounds
    y = rng.integers(0, n_classes, 24)
    y[:3] = 0, n_classes - 1, 300 % n_classes
    scores[8, n_classes // 2] = scores[9, -1] = scores[10, 0] = 9
    scores[11], scores[12] = -np.inf, 1
    scores[12, y[12]] = 5  # no margin is left
    scores[13, [n_classes // 3, -1]] = np.nan
    scores[14, y[14]] = np.nan
    loss = fl.Hinge(over="max")
    expected_losses, expected = loss.value_and_grad(scores, y, reduction="none", backend="reference")
    in_place = scores.copy()
    for source, out in ((scores, np.empty_like(scores)), (in_place, in_place)):
        losses, gradient = loss.value_and_grad(source, y, reduction="none", out=out, backend=backend)
        np.testing.assert_allclose(losses, expected_losses, rtol=4 * float(np.finfo(dtype).eps))
        np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_rows_of_weight_0_are_skipped(backend, dtype, loss, junk):
    rng = np.random.default_rng(5)
    for n, c in ((33, 5), (7, 100)):
        scores, y = rng.standard_normal((n, c)).astype(dtype), rng.integers(0, c, n)
        weight = rng.integers(0, 3, n).astype(float)
        weight[:2] = 0, 1
        scores[weight == 0] = junk
        kept = weight > 0
        value, grad = loss.value_and_grad(scores, y, sample_weight=weight, backend=backend)
        expected, expected_grad = loss.value_and_grad(
            scores[kept], y[kept], sample_weight=weight[kept], backend=backend
        )
        eps = float(np.finfo(dtype).eps)
        assert value == pytest.approx(expected, rel=8 * eps)
        np.testing.assert_allclose(grad[kept], expected_grad, rtol=8 * eps)
        assert not grad[~kept].any()


def test_upstream_0_has_no_gradient_but_a_loss(backend, dtype, loss):
    scores = np.array([[1, 2, 3], [np.nan, 1, 2], [0, 0, 1]], dtype)
    plain, plain_grad = rows_of(loss, scores, [0, 1, 2], backend)
    found, grad = rows_of(loss, scores, [0, 1, 2], backend, upstream=[0.5, 0, -2])
    np.testing.assert_array_equal(found, plain)
    np.testing.assert_array_equal(grad[[0, 2]], plain_grad[[0, 2]] * np.array([[0.5], [-2]], dtype))
    assert not grad[1].any()


def test_rows_of_one_upstream_take_one_pass(monkeypatch, loss):
    """And two only where a row has a loss but no gradient."""
    backend, calls = fl.backends.get("reference"), []
    monkeypatch.setattr(fl.backends, "choose", lambda *arguments: backend)
    score_rows, linear_rows = backend.score_rows, backend.linear_rows
    monkeypatch.setattr(backend, "score_rows", lambda *a: [calls.append("scores"), score_rows(*a)][1])
    monkeypatch.setattr(backend, "linear_rows", lambda *a: [calls.append("linear"), linear_rows(*a)][1])
    X, W, weight = np.eye(3), np.ones((4, 3)), np.array([1.0, 0.0, 2.0])
    for upstream, passes in (([0.5, 3, -2], 1), ([0.5, 0, -2], 1), ([0, 3, -2], 2)):
        options = {"sample_weight": weight, "reduction": "none", "upstream": upstream}
        calls.clear()
        values, _ = loss.value_and_grad(X, [0, 1, 2], **options)
        assert calls == ["scores"] * passes
        np.testing.assert_array_equal(values, loss.value(X, [0, 1, 2], sample_weight=weight, reduction="none"))
        calls.clear()
        fl.linear_value_and_grad(loss, X, W, [0, 1, 2], **options)
        assert calls.count("linear") == passes


def test_smoothing_counts_where_the_targets_own_class_weight_is_0():
    """As in PyTorch; only a mean has nothing to divide by."""
    scores, y = np.array([[1.0, 2.0, 4.0], [3.0, 0.0, 1.0]]), np.array([2, 2])
    loss = fl.Softmax(label_smoothing=0.25, class_weight=[1, 2, 0], ignore_index=-1)
    expected, expected_grad = exact(loss, scores, y)
    for reduction, total in (("sum", expected.sum()), ("none", expected)):
        value, grad = loss.value_and_grad(scores, y, reduction=reduction, backend="reference")
        np.testing.assert_allclose(value, np.asarray(total, float), rtol=1e-12)
        np.testing.assert_allclose(grad, expected_grad.astype(float), rtol=1e-12)
    value, grad = loss.value_and_grad(scores, y, backend="reference")
    assert np.isnan(value)
    assert not grad.any()


# --- 6: denormals -----------------------------------------------------------------------------------------------
def test_denormal_arithmetic_of_the_caller_is_left_alone(backend, dtype):
    scores = np.zeros((300, 40), dtype)
    scores[:, 1:] = -90 if dtype == np.float32 else -710
    SOFTMAX.value_and_grad(scores, np.zeros(300, int), backend=backend)
    fl.LinearObjective(SOFTMAX, scores, np.zeros(300, int), backend=backend).value_and_grad(np.zeros((3, 41)))
    tiny = np.finfo(dtype).smallest_normal
    assert tiny / dtype(4) > 0
    assert tiny / dtype(4) * dtype(4) == tiny


# --- 9: inputs --------------------------------------------------------------------------------------------------
def test_inputs_are_never_written(backend, loss, dtype):
    rng = np.random.default_rng(6)
    for name, scores in layouts(rng.standard_normal((20, 7)).astype(dtype)):
        y, weight, upstream = rng.integers(0, 7, 20), rng.uniform(0, 2, 20), rng.standard_normal(20)
        inputs = (scores, y, weight, upstream)
        before = [a.tobytes() for a in inputs]
        loss.value_and_grad(scores, y, sample_weight=weight, upstream=upstream, reduction="none", backend=backend)
        loss.value(scores, y, sample_weight=weight, backend=backend)
        fl.softmax(scores)
        assert [a.tobytes() for a in inputs] == before, name


# --- properties that hold for any finite scores ------------------------------------------------------------------
any_scores = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 20), st.integers(1, 20)), elements=st.integers(-640, 640).map(lambda k: k / 16)
)
properties = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.mark.parametrize("backend", BACKENDS)
@properties
@given(scores=any_scores, seed=st.integers(0, 99), shift=st.integers(-1000, 1000))
def test_properties(backend, scores, seed, shift):
    n, c = scores.shape
    y = np.random.default_rng(seed).integers(0, c, n)
    for loss in PLAIN.values():
        losses, grad = rows_of(loss, scores, y, backend)
        assert (losses >= 0).all()
        if loss.kind == "logistic":  # what is a label of the one side is none of the other
            labels = np.zeros((n, c))
            labels[np.arange(n), y] = c > 1  # of one class, the label is 0
            mirrored, mirrored_grad = rows_of(loss, -scores, 1 - labels, backend)
            np.testing.assert_allclose(mirrored, losses, rtol=4 * np.finfo(float).eps)
            np.testing.assert_allclose(mirrored_grad, -grad, rtol=4 * np.finfo(float).eps)
            continue
        np.testing.assert_allclose(grad.sum(axis=1), 0, atol=1e-14 * max(1, np.abs(grad).max()) * c)
        assert (grad[np.arange(n), y] <= 0).all()
        # A common offset, on this grid exact, changes nothing; but exp of s and of s + offset are rounded differently.
        shifted, shifted_grad = rows_of(loss, scores + shift, y, backend)
        eps = np.finfo(float).eps
        rounding, grad_rounding = (4 * eps, 16 * eps) if loss.kind == "softmax" else (0, 0)
        np.testing.assert_allclose(shifted, losses, rtol=rounding, atol=0)
        np.testing.assert_allclose(shifted_grad, grad, rtol=grad_rounding, atol=0)
    # Softmax is above the margin to the best wrong class and not above it by more than ln C.
    if c > 1:
        gap = fl.Hinge(over="max", margin=0).value(scores, y, reduction="none", backend=backend)
        softmax = SOFTMAX.value(scores, y, reduction="none", backend=backend)
        assert (softmax >= gap - 1e-12).all()
        assert (softmax <= gap + math.log(c) + 1e-12).all()


def test_oracle_of_this_suite():
    """The oracle itself, on a number of the lecture."""
    value, _ = exact_row(fl.Softmax(), np.array([3.2, 5.1, -1.7]), 0)
    assert float(value) == pytest.approx(-math.log(math.exp(3.2) / (math.exp(3.2) + math.exp(5.1) + math.exp(-1.7))))


@pytest.mark.parametrize("top", [1e300, 1.7e308])
def test_weights_near_the_end_of_float64(backend, top):
    """A mean does not see their size; a sum, or a row, may be infinite, and a row of weight 0 is 0."""
    scores, weight = np.array([[1.0, 2.0], [0.0, 1.0], [3.0, 0.0]], np.float32), np.array([top, 0, top / 2])
    value = SOFTMAX.value(scores, [0, 0, 0], sample_weight=weight, backend=backend)
    assert value == pytest.approx(SOFTMAX.value(scores, [0, 0, 0], sample_weight=[1, 0, 0.5], backend=backend))
    rows = SOFTMAX.value(scores, [0, 0, 0], sample_weight=weight, reduction="none", backend=backend)
    np.testing.assert_array_equal(rows, [np.inf, 0, np.inf])


def test_infinite_losses_of_both_signs_warn_of_nothing(backend):
    scores = np.array([[0, np.inf], [0.0, np.inf]])
    losses, _ = fl.Hinge(power=2).value_and_grad(
        scores, [0, 0], reduction="none", upstream=np.array([1.0, -1]), backend=backend
    )
    np.testing.assert_array_equal(losses, [np.inf, np.inf])


# --- plain calls, which a backend may check and compute in one step --------------------------------------------------
def plain_calls(dtype, n, c):
    """Scores, targets and out of calls that are plain, and of some that only look so."""
    rng = np.random.default_rng(n * c)
    scores, y, half = rng.standard_normal((n, c)).astype(dtype), rng.integers(0, c, n), n // 2
    for name, array in layouts(scores):
        yield name, array, y, None
    for kind in (np.int8, np.uint8, np.int16, np.uint32, np.uint64, ">i8", bool, float):
        yield f"targets {kind}", scores, y.astype(kind), None
    yield "targets with strides", scores, y.repeat(2)[::2], None
    yield "targets backwards", scores, y[::-1], None
    yield "targets below 0", scores, -1 - y, None
    yield "a target above", scores, np.where(np.arange(n) == half, c + 1, y), None
    yield "too few targets", scores, y[:-1], None
    yield "no rows", scores[:0], y[:0], None
    yield "one number", scores[0, 0], y, None
    yield "out", scores, y, np.zeros_like(scores)
    yield "out in F order", scores, y, np.zeros_like(scores, order="F")
    yield "out backwards", scores, y, np.zeros_like(scores)[::-1, ::-1]
    yield "out of the other type", scores, y, np.zeros(scores.shape, np.float32 if dtype == np.float64 else np.float64)
    yield "out of integers", scores, y, np.zeros(scores.shape, f"i{scores.itemsize}")
    yield "out of another shape", scores, y, np.zeros((n, c + 1), dtype)
    yield "out is read-only", scores, y, np.broadcast_to(dtype(0), (n, c))
    room = np.zeros(n * c * scores.itemsize + 1, np.uint8)
    yield "out is not aligned", scores, y, room[1:].view(dtype).reshape(n, c)
    yield "in place", scores, y, scores
    yield "in the same memory", (copied := scores.copy()), y, copied[:]
    upper, lower = np.split(np.concatenate([scores, scores]), 2)
    yield "out beside scores", upper, y, lower
    overlapping = np.resize(scores, (n + 1, c))
    yield "out over scores", overlapping[:-1], y, overlapping[1:]
    indices = np.resize(y, n * c)
    yield "out over targets", scores, indices[:n], indices.view(dtype)[: n * c].reshape(n, c)


@pytest.mark.parametrize("backend", ONE_OF_EACH)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "c"), [(2, 1), (33, 10), (12, 130)])
def test_plain_calls_are_as_all_others(backend, loss, dtype, n, c, monkeypatch):
    """The step that checks and computes changes no bit of a result, and no word of an error."""
    check_plain_calls(backend, loss, dtype, n, c, monkeypatch)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_plain_calls_of_16_bits(dtype, monkeypatch):
    check_plain_calls(ONE_OF_EACH[0], fl.Softmax(), dtype, 12, 130, monkeypatch)


def check_plain_calls(backend, loss, dtype, n, c, monkeypatch):
    def outcomes():
        for name, scores, y, out in plain_calls(dtype, n, c):
            for reduction in ("mean", "sum"):
                more = {"reduction": reduction, "backend": backend}
                try:
                    yield name, loss.value(scores, y, **more)
                    value, grad = loss.value_and_grad(scores, y, out=out, **more)
                    yield name, value, grad.tobytes(), out is None or grad is out
                except (TypeError, ValueError) as error:
                    yield name, str(error), None if out is None else out.tobytes()

    found = list(outcomes())
    monkeypatch.setattr(driver, "FEW_SCORES", -1)
    np.testing.assert_equal(list(outcomes()), found)


def test_plain_calls_take_one_step(loss, monkeypatch):
    scores, y = np.zeros((4, 3), np.float32), np.arange(4) % 3
    expected = loss.value_and_grad(scores, y, sample_weight=np.ones(4))
    monkeypatch.delattr(driver, "fold")
    value, grad = loss.value_and_grad(scores, y)
    assert (value, grad.tolist()) == (expected[0], expected[1].tolist())
    assert loss.value(scores, y, reduction="sum") == pytest.approx(4 * value)
