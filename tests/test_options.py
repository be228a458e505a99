"""Every option and extra output, compiled, for scores and in the linear layer, against the reference in float64."""

import itertools
import re

import ml_dtypes
import numpy as np
import pytest

import fastloss as fl
from fastloss import blocks
from tests.conftest import COMPILED, layouts

SHAPES = [(0, 5), (1, 1), (5, 2), (37, 3), (33, 7), (70, 10), (17, 16), (40, 31), (9, 33), (3, 65), (5, 300), (2, 5003)]
STORED = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
stored = pytest.mark.parametrize("stored", STORED, ids=["float32", "float64", "float16", "bfloat16"])

SOFTMAX = {
    "none": {},
    "smoothing": {"label_smoothing": 0.1},
    "all smoothing": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 0.3},
    "softcap": {"softcap": 2.0},
    "temperature": {"temperature": 0.4},
    "smoothing, z-loss": {"label_smoothing": 0.2, "z_loss": 0.1},
    "softcap, temperature": {"softcap": 3.0, "temperature": 2.0},
    "all": {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 3.0, "temperature": 2.0},
}
HINGE = {
    f"{over}, power {power}, {', '.join(which)}": {"over": over, "power": power, "which": which}
    for over, power in itertools.product(("sum", "mean", "max"), (1, 2))
    for which in (("pairs",), ("count_target",), ("pairs", "count_target"))
    if not (over == "max" and "count_target" in which)
}


LOGISTIC = {
    "logistic": {},
    "logistic, smoothing": {"label_smoothing": 0.2},
    "logistic, all": {"label_smoothing": 0.1, "pos_weight": 3.0, "over": "mean"},
}


def make(name, c, weighted, columns=False, **more):
    """A loss with options that fit c classes, and targets that are indices, or (N, C)."""
    rng = np.random.default_rng(c)
    if weighted:
        labels = 2 if name in LOGISTIC and c == 1 and not columns else c
        more["class_weight"] = rng.integers(0, 4, labels) / 2
    if name in SOFTMAX:
        return fl.Softmax(**SOFTMAX[name], **more)
    if name in LOGISTIC:
        options = dict(LOGISTIC[name])
        if "pos_weight" in options and weighted:
            options["pos_weight"] = rng.integers(0, 4, c) / 2
        return fl.Logistic(**options, **more)
    options = dict(HINGE[name])
    which = options.pop("which")
    if "pairs" in which:
        options["pair_margins"] = rng.uniform(-0.5, 2, (c, c))
    return fl.Hinge(margin=0.75, count_target="count_target" in which, **options, **more)


def close(found, expected, scale, eps, note):
    """Within some units in the last place of `scale`."""
    expected = np.asarray(expected, np.float64)
    found = np.asarray(found, np.float64)
    same = (np.isnan(found) & np.isnan(expected)) | (found == expected)
    error = np.abs(np.where(same, 0, found) - np.where(same, 0, expected))
    worst = np.max(error / np.where(same, 1, np.maximum(scale, 1e-30)), initial=0)
    assert worst <= 64 * eps, f"{note}: {worst / eps:.1f} units"


def agree(loss, scores, y, backend, note="", outputs=None, **more):
    """Value, gradient and extra outputs (all, if None) agree with the reference on the same numbers in float64."""
    eps = float(np.finfo(np.float64 if scores.dtype == np.float64 else np.float32).eps)
    grad_eps = {2: 2.0**-9 if scores.dtype != np.float16 else 2.0**-12}.get(scores.itemsize, eps)
    outputs = loss.extra_outputs if outputs is None else outputs
    with np.errstate(invalid="ignore"):  # of signalling NaN
        wide = np.array(scores, np.float64)
    want = loss.value_and_grad(wide, y, outputs=outputs, reduction="none", backend="reference", **more)
    have = loss.value_and_grad(scores, y, outputs=outputs, reduction="none", backend=backend, **more)
    tiny = 2.0**-25 / grad_eps if scores.dtype == np.float16 else 0  # half of its least number
    rows = np.where(np.isfinite(want[1]), np.abs(want[1]), 0).max(axis=1, initial=0, keepdims=True)
    rows = np.maximum(rows, tiny)
    close(have[1], want[1], rows, max(grad_eps, eps), f"gradient, {note}")
    for name in outputs:
        if name == "argmax":
            np.testing.assert_array_equal(have[2][name], want[2][name], err_msg=note)
        else:
            close(have[2][name], want[2][name], np.maximum(1, np.abs(want[2][name])), eps, f"{name}, {note}")
    close(have[0], want[0], np.maximum(1, np.abs(want[0])), eps, f"value, {note}")
    return have


#: What has a form of its own where no entropy is asked for.
FORMS = {
    "weights, even": {"label_smoothing": 0.1, "class_weight": lambda c: 1 + np.arange(c) / c},
    "weights, uneven": {"label_smoothing": 0.3, "class_weight": lambda c: np.where(np.arange(c) == c // 2, 2.0 * c, 1)},
    "weights, one alone": {"label_smoothing": 1.0, "class_weight": lambda c: (np.arange(c) == c - 1) * 3.0},
    "weights, all": {
        "label_smoothing": 0.1, "z_loss": 0.1, "temperature": 2.0, "class_weight": lambda c: np.arange(c) % 3 + 0.5
    },
    "softcap": {"softcap": 4.0},
    "softcap, far": {"softcap": 0.7},
    "softcap, all": {"softcap": 5.0, "z_loss": 0.1, "temperature": 0.5},
}  # fmt: skip


@stored
@pytest.mark.parametrize("name", FORMS)
def test_forms(compiled, stored, name):
    rng = np.random.default_rng(14)
    for n, c in SHAPES:
        scores, y = (2 * rng.standard_normal((n, c))).astype(stored), rng.integers(0, c, n)
        options = {k: v(c) if callable(v) else v for k, v in FORMS[name].items()}
        loss = fl.Softmax(**options)
        value = agree(loss, scores, y, compiled, f"{(n, c)}", outputs=())[0]
        alone = loss.value(scores, y, reduction="none", backend=compiled)
        close(alone, value, np.maximum(1, np.abs(value)), float(np.finfo(value.dtype).eps), f"loss alone, {(n, c)}")


@pytest.mark.parametrize("c", [1, 5, 90, 300])
def test_probabilities_alone(compiled, dtype, c):
    """In a form of their own, where they are looked at as they are computed with: above 2 again."""
    rng = np.random.default_rng(15)
    scores, q = (2 * rng.standard_normal((37, c))).astype(dtype), rng.random((37, c)).astype(dtype)
    weight = rng.random(c)
    for times in (1, 5, -0.0):
        for loss in (fl.Softmax(), fl.Softmax(class_weight=weight, temperature=3.0)):
            skipping = {"sample_weight": np.arange(37) % 3}
            agree(loss, scores, q * dtype(times), compiled, str(times), outputs=(), **skipping)


@stored
@pytest.mark.parametrize("name", [*SOFTMAX, *HINGE, *LOGISTIC])
def test_shapes(compiled, stored, name):
    rng = np.random.default_rng(1)
    for n, c in SHAPES:
        scores, y = (3 * rng.standard_normal((n, c))).astype(stored), rng.integers(0, c, n)
        if c == 1 and name in LOGISTIC:
            y = rng.integers(0, 2, n)
        for weighted in (False, True):
            loss = make(name, c, weighted)
            note = f"{(n, c)}, {'weighted' if weighted else 'plain'}"
            value, grad, _ = agree(loss, scores, y, compiled, note)
            in_place = scores.copy()
            more = {"reduction": "none", "outputs": loss.extra_outputs, "backend": compiled}
            loss.value_and_grad(in_place, y, out=in_place, **more)
            np.testing.assert_array_equal(in_place, grad, err_msg=note)
            alone, eps = loss.value(scores, y, **more)[0], float(np.finfo(value.dtype).eps)
            np.testing.assert_allclose(alone, value, rtol=8 * eps, atol=8 * eps, err_msg=note)


@stored
@pytest.mark.parametrize(
    "name", [*(name for name, options in SOFTMAX.items() if "label_smoothing" not in options), *LOGISTIC]
)
def test_probabilities(compiled, stored, name):
    rng = np.random.default_rng(2)
    for n, c in SHAPES:
        scores = (3 * rng.standard_normal((n, c))).astype(stored)
        q = rng.dirichlet(np.full(c, 0.3), n) * (rng.random((n, c)) < 0.8)
        q[: n // 3] = np.eye(c)[rng.integers(0, c, n // 3)]
        for weighted, kind in itertools.product((False, True), (np.float64, np.float32, stored, np.int8)):
            probabilities = q.astype(kind)
            if kind == ml_dtypes.bfloat16:
                probabilities = q.astype(kind).astype(np.float32)
            agree(make(name, c, weighted, True), scores, probabilities, compiled, f"{(n, c)}, {np.dtype(kind)}")


@pytest.mark.parametrize(
    "name", ["all", "softcap", "sum, power 1, pairs, count_target", "max, power 2, pairs", "logistic, all"]
)
def test_layouts_and_weights(compiled, dtype, name):
    """Strided, F-order and reversed scores; rows that are skipped, even with NaN in them; upstream for each row."""
    rng = np.random.default_rng(3)
    for n, c in [(37, 10), (20, 70), (35, 33)]:
        ignoring = make(name, c, True, ignore_index=-(10**9))
        base, y = rng.standard_normal((n, c)).astype(dtype), rng.integers(0, c, n)
        y[::4] = -(10**9)
        base[::4] = np.nan
        weight = rng.integers(0, 3, n) / 2
        for note, scores in layouts(base):
            agree(ignoring, scores, y, compiled, note, sample_weight=weight, upstream=weight[::-1] - 0.5)
    q = rng.dirichlet(np.ones(10), 37)
    for note, some in layouts(q):
        agree(fl.Softmax(z_loss=0.1), rng.standard_normal((37, 10)).astype(dtype), some, compiled, note)


@pytest.mark.parametrize("c", [3, 20, 40, 500])
def test_confident_rows_keep_their_digits(compiled, dtype, c):
    """Where the target has nearly all probability the gradient is tiny, and exact to its own last places."""
    rng = np.random.default_rng(4)
    scores, y = rng.standard_normal((50, c)).astype(dtype), rng.integers(0, c, 50)
    scores[np.arange(50), y] += np.linspace(5, 60, 50, dtype=dtype)
    q = np.eye(c)[y]
    for loss, targets in [
        (fl.Softmax(temperature=2.0), y), (fl.Softmax(), q), (fl.Softmax(softcap=70.0), y),
    ]:  # fmt: skip
        value, grad = loss.value_and_grad(scores, targets, reduction="none", backend=compiled)
        want, expected = loss.value_and_grad(scores.astype(np.float64), targets, reduction="none", backend="reference")
        eps = float(np.finfo(dtype).eps)
        size = np.abs(expected).max(axis=1, keepdims=True)
        # The score differences are rounded: an exponential of −d is off by d units.
        assert (np.abs(grad - expected) <= 200 * eps * size).all()
        np.testing.assert_allclose(value, want, rtol=200 * eps)


def test_confident_rows_with_a_softcap(compiled, dtype):
    """Of dense targets too: the largest class is found again in the second walk."""
    rng = np.random.default_rng(9)
    for c in (1, 6, 40):
        scores, y = 8 * rng.standard_normal((200, c)).astype(dtype), rng.integers(0, c, 200)
        scores[np.arange(200), y] += 35
        loss, q = fl.Softmax(softcap=40.0), np.eye(c)[y]
        _, grad = loss.value_and_grad(scores, q, reduction="none", backend=compiled)
        _, expected = loss.value_and_grad(scores.astype(np.float64), q, reduction="none", backend="reference")
        size = np.abs(expected).max(axis=1, keepdims=True)
        assert (np.abs(grad - expected) <= 400 * float(np.finfo(dtype).eps) * size).all()


def test_special_scores(compiled, dtype):
    """NaN and infinities as the contract has them, in each form."""
    inf, nan = np.inf, np.nan
    rows = [[1, -inf, 0], [-inf, -inf, 2], [inf, 0, 1], [-inf] * 3, [nan, 0, 1], [0, nan, 1], [1000, -1000, 0]]
    for width in (3, 20, 70):
        scores = np.full((len(rows), width), -inf, dtype)
        scores[:, :3] = rows
        for target in range(3):
            y = np.full(len(rows), target)
            for name in SOFTMAX:
                agree(make(name, width, False), scores, y, compiled, f"{name}, {target}")
            for q in (np.eye(width)[y], np.full((len(rows), width), 1 / width), np.eye(width)[y] * 0):
                agree(fl.Softmax(temperature=2.0), scores, q, compiled, "probabilities")
        for name in HINGE:
            for target in range(3):
                agree(make(name, width, False), scores, np.full(len(rows), target), compiled, f"{name}, {target}")


def test_argmax_takes_the_lowest_class_or_the_first_nan(compiled, dtype):
    for c in (2, 9, 33, 200):
        scores = np.zeros((4, c), dtype)
        scores[1, c - 1] = 1
        scores[2, 1] = scores[2, c - 1] = 5
        scores[3, c - 1] = np.nan
        scores[3, 0] = 7
        for loss in (fl.Softmax(), fl.Hinge()):
            _, extras = loss.value(scores, np.zeros(4, int), outputs=("argmax",), reduction="none", backend=compiled)
            np.testing.assert_array_equal(extras["argmax"], scores.argmax(axis=1))


@pytest.mark.parametrize("c", [2, 10, 33, 200])
def test_argmax_is_of_the_scores_that_the_gradient_overwrites(compiled, dtype, c):
    """Rows that are skipped have class 0."""
    rng = np.random.default_rng(10)
    scores, y, weight = rng.standard_normal((37, c)).astype(dtype), rng.integers(0, c, 37), rng.integers(0, 2, 37)
    scores[3, c // 2] = scores[5, 0] = np.nan
    expected = np.where(weight == 0, 0, scores.argmax(axis=1))
    for loss in (fl.Softmax(), fl.Softmax(z_loss=0.1), fl.Hinge(), fl.Hinge(over="max"), fl.Hinge(count_target=True)):
        some = scores.copy()
        *_, extras = loss.value_and_grad(
            some, y, out=some, sample_weight=weight, outputs=("argmax",), reduction="none", backend=compiled
        )
        np.testing.assert_array_equal(extras["argmax"], expected)


@stored
@pytest.mark.parametrize("c", [2, 3, 4, 5, 10, 16, 20, 37, 63, 100, 129, 383, 384])
@pytest.mark.parametrize("level", [name for name in COMPILED if name != "numba"])
def test_argmax_changes_nothing_else(level, c, stored):
    """Whatever layout rows have, it is found beside what is computed anyway, and is that of the reference."""
    rng = np.random.default_rng(c)
    n = 300
    scores = np.round(rng.standard_normal((n, c)) * 8) / 4  # with ties
    scores[7, c - 1] = np.nan
    scores[8] = -np.inf
    scores[9, 0] = np.inf
    scores, y, weight = scores.astype(stored), rng.integers(0, c, n), rng.integers(0, 3, n).astype(float)
    losses = (
        fl.Softmax(), fl.Softmax(label_smoothing=0.1), fl.Hinge(), fl.Hinge(over="mean"), fl.Hinge(power=2),
        fl.Hinge(over="max"),
    )  # fmt: skip
    for loss, w in itertools.product(losses, (None, weight)):
        expected = scores.astype(float).argmax(axis=1) * (True if w is None else w != 0)
        value, grad = loss.value_and_grad(scores, y, sample_weight=w, backend=level)
        same, again, extras = loss.value_and_grad(scores, y, sample_weight=w, outputs=("argmax",), backend=level)
        np.testing.assert_array_equal(same, value)
        assert again.tobytes() == grad.tobytes()
        np.testing.assert_array_equal(extras["argmax"], expected)


@pytest.mark.parametrize("c", [2, 20, 40, 500])
def test_smoothing_where_one_class_has_all_weight(compiled, dtype, c):
    """It has nearly all probability too, and is not the target: the gradient is tiny, and exact to its last places."""
    rng = np.random.default_rng(11)
    scores, y, weight = rng.standard_normal((50, c)).astype(dtype), rng.integers(1, c, 50), np.zeros(c)
    weight[0] = 3
    scores[:, 0] += np.linspace(5, 60, 50, dtype=dtype)
    loss = fl.Softmax(label_smoothing=0.1, class_weight=weight)
    _, grad = loss.value_and_grad(scores, y, reduction="none", backend=compiled)
    _, expected = loss.value_and_grad(scores.astype(np.float64), y, reduction="none", backend="reference")
    size = np.abs(expected).max(axis=1, keepdims=True)
    assert (np.abs(grad - expected) <= 200 * float(np.finfo(dtype).eps) * size).all()


@pytest.mark.parametrize("c", [2, 40, 90])
def test_smoothing_where_one_class_has_half_of_all_weight_or_a_little_more(compiled, dtype, c):
    """On both sides of where the sum of weights takes the place of a sum for each row."""
    rng = np.random.default_rng(12)
    scores, y = rng.standard_normal((50, c)).astype(dtype), rng.integers(0, c, 50)
    scores[:, 0] += np.linspace(5, 60, 50, dtype=dtype)
    for share in (1 - 2**-9, 1, 1 + 2**-9):
        weight = np.ones(c)
        weight[0] = share * (c - 1)
        agree(fl.Softmax(label_smoothing=0.1, class_weight=weight), scores, y, compiled, str(share))
        agree(fl.Softmax(label_smoothing=1.0, class_weight=weight, temperature=0.5), scores, y, compiled, str(share))


@pytest.mark.parametrize("c", [3, 90])
def test_softcaps_at_the_ends_of_what_a_polynomial_bends(compiled, dtype, c):
    """Of its size, of its size beside the temperature, and of the scores beside it."""
    rng = np.random.default_rng(13)
    y = rng.integers(0, c, 33)
    ends = [(2.0**-12, 2.0**-12), (2.0**15, 1.0), (64.0, 64.0), (64.0, 2.0**-10)]
    for (softcap, temperature), near in itertools.product(ends, (1 - 2**-9, 1, 1 + 2**-9)):
        for size in (2.0**-6, 0.45, 0.55, 3.0):
            scores = (size * softcap * rng.uniform(-1, 1, (33, c))).astype(dtype)
            for loss in (
                fl.Softmax(softcap=softcap * near, temperature=temperature),
                fl.Softmax(softcap=softcap, temperature=temperature * near),
            ):
                value, grad = loss.value_and_grad(scores, y, reduction="none", backend=compiled)
                wide = scores.astype(np.float64)
                want, expected = loss.value_and_grad(wide, y, reduction="none", backend="reference")
                # Bent scores over T are rounded before they are subtracted.
                units = 16 * float(np.finfo(dtype).eps) * (1 + softcap / temperature * np.tanh(size))
                largest = np.abs(expected).max(axis=1, keepdims=True)
                assert (np.abs(grad - expected) <= units * largest + np.finfo(dtype).tiny).all(), f"{loss}, {size}"
                assert (np.abs(value - want) <= units * np.maximum(1, want)).all(), f"{loss}, {size}"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_probabilities_that_are_unfit_are_found_wherever_they_stand(compiled, dtype, bad):
    numbers = np.zeros((7, 300), dtype)
    numbers[0, 0] = -0.0
    backend = fl.backends.get(compiled)
    assert backend.first_unfit(numbers) == -1
    for place in (2099, 2098, 1024, 1023, 16, 15, 1, 0):
        numbers.reshape(-1)[place] = bad
        assert backend.first_unfit(numbers, 2) == place


def test_probabilities_that_are_unfit_raise_before_anything_of_the_callers_is_written(compiled, dtype):
    """Where nothing is, they are looked at as they are computed with; the first is named all the same."""
    rng = np.random.default_rng(13)
    for n, c in [(1, 1), (40, 3), (300, 10), (9, 200), (3, 70_000)]:
        scores, q = rng.standard_normal((n, c)).astype(dtype), rng.random((n, c)).astype(dtype)
        loss, how = fl.Softmax(), {"sample_weight": rng.integers(0, 2, n), "backend": compiled}
        pull = {"reduction": "none", "upstream": rng.integers(0, 2, n)}
        for place in {0, n * c // 2, n * c - 1}:
            bad = q.copy()
            bad.reshape(-1)[[place, -1]] = np.nan, -1
            row, column = divmod(place, c)
            out = np.full_like(scores, 7)
            said = re.escape(f"targets[{row}, {column}] is")
            for call, more in itertools.product(
                (loss.value, loss.value_and_grad), ({}, pull, {"out": out}, {"outputs": ("lse", "argmax")})
            ):
                if call == loss.value and ("out" in more or "upstream" in more):
                    continue
                with pytest.raises(ValueError, match=said):
                    call(scores, bad, **how, **more)
            assert (out == 7).all()
            with pytest.raises(ValueError, match=said):
                loss.value_and_grad(scores, bad, out=scores, **how)
            assert np.isfinite(scores).all()
        assert np.isfinite(loss.value(scores, 3 * q, backend=compiled))  # they need not sum to 1


# --- the linear layer ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("x_dtype", [np.float32, np.float64, np.uint8, np.float16])
@pytest.mark.parametrize("name", ["all", "smoothing", "sum, power 2, pairs, count_target", "max, power 1, pairs"])
@pytest.mark.parametrize("c", [2, 10, 33, 80])
def test_linear(compiled, x_dtype, name, c):
    """Fused for few classes, by blocks for many; all rows, and rows that are picked; some skipped."""
    rng = np.random.default_rng(5)
    X = (rng.random((90, 37)) * (200 if x_dtype == np.uint8 else 1)).astype(x_dtype)
    W = rng.standard_normal((c, 38)) / (200 if x_dtype == np.uint8 else 1)
    y, weight = rng.integers(0, c, 90), rng.integers(0, 3, 90)
    loss, rows = make(name, c, True), rng.integers(0, 90, 50)
    for some in (None, rows):
        found, expected = (
            fl.LinearObjective(loss, X, y, sample_weight=weight, backend=b).value_and_grad(W, rows=some)
            for b in (compiled, "reference")
        )
        eps = float(np.finfo(np.float64 if x_dtype == np.float64 else np.float32).eps)
        assert found[0] == pytest.approx(expected[0], rel=64 * eps)
        np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=256 * eps * np.abs(expected[1]).max())


@pytest.mark.parametrize("c", [3, 64, 80])
def test_linear_with_probabilities(compiled, dtype, c):
    rng = np.random.default_rng(6)
    X, W = rng.random((70, 20)).astype(dtype), rng.standard_normal((c, 21)).astype(dtype)
    q, eps = rng.dirichlet(np.ones(c), 70), float(np.finfo(dtype).eps)
    for loss, rows in itertools.product(
        (fl.Softmax(), fl.Softmax(z_loss=0.1, class_weight=rng.random(c))), (None, [5, 0, 5])
    ):
        found, expected = (
            fl.LinearObjective(loss, X, q, backend=b).value_and_grad(W, rows=rows) for b in (compiled, "reference")
        )
        assert found[0] == pytest.approx(expected[0], rel=64 * eps)
        np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=64 * eps * np.abs(expected[1]).max())
    stack = rng.standard_normal((4, c, 21))
    found, expected = (fl.LinearObjective(loss, X, q, backend=b).values(stack) for b in (compiled, "reference"))
    np.testing.assert_allclose(found, expected, rtol=64 * eps)


def test_ignored_rows_are_dropped_before_the_product(compiled, monkeypatch):
    """By blocks too: their features are not touched."""
    rng = np.random.default_rng(7)
    X, y, W = rng.random((300, 30)), rng.integers(0, 80, 300), rng.standard_normal((80, 31))
    y[::3] = -100
    X[::3] = np.nan
    seen = []
    split = blocks.split
    monkeypatch.setattr(blocks, "split", lambda n, parts: seen.append(n) or split(n, parts))
    value, grad = fl.LinearObjective(
        fl.Softmax(ignore_index=-100, label_smoothing=0.1), X, y, backend=compiled
    ).value_and_grad(W)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
    assert 300 not in seen
    assert 200 in seen


def test_same_bits_for_any_number_of_threads(compiled, dtype):
    rng = np.random.default_rng(8)
    for n, c in [(30_000, 10), (2000, 300)]:
        scores, y = rng.standard_normal((n, c)).astype(dtype), rng.integers(0, c, n)
        for loss in (fl.Softmax(label_smoothing=0.1, z_loss=0.1), fl.Hinge(pair_margins=rng.random((c, c)))):
            results = [
                loss.value_and_grad(scores, y, outputs=loss.extra_outputs, backend=compiled, n_threads=k)
                for k in (1, 2, 3)
            ]
            for value, grad, extras in results[1:]:
                assert value == results[0][0]
                np.testing.assert_array_equal(grad, results[0][1])
                for name in extras:
                    np.testing.assert_array_equal(extras[name], results[0][2][name])


def test_options_are_converted_once():
    loss = fl.Hinge(pair_margins=np.ones((3, 3)))
    assert loss.converted("pair_margins", np.dtype(np.float32)) is loss.converted("pair_margins", np.dtype(np.float32))
    assert loss == fl.Hinge(pair_margins=np.ones((3, 3)))
