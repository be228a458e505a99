"""Rows of two to four classes that lie end to end have kernels of their own."""

import itertools

import ml_dtypes
import numpy as np
import pytest

import fastloss as fl
from tests.conftest import BACKENDS

LEVELS = [name for name in BACKENDS if name.startswith("cython-")]
TYPES = [np.dtype(t) for t in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]
SOFTMAX = fl.Softmax()
CLASSES = (2, 3, 4)
LOSSES = {
    "softmax": SOFTMAX,
    "hinge": fl.Hinge(margin=0.75),
    "hinge squared": fl.Hinge(power=2),
    "hinge squared mean": fl.Hinge(power=2, over="mean", margin=2.0),
    "hinge mean": fl.Hinge(over="mean"),
}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def wide(a):
    """NaN of types that NumPy does not know is not taken for NaN."""
    return a.astype(np.float64)


def exact(loss, scores, y):
    """Losses and gradients, in long double."""
    i = np.arange(len(y))
    d = scores.astype(np.longdouble) - scores[i, y][:, None]
    d[i, y] = -np.inf
    if loss.kind == "softmax":
        top = np.maximum(d.max(axis=1), 0)
        exps = np.exp(d - top[:, None])
        total = exps.sum(axis=1) + np.exp(-top)
        losses, grad = np.where(top > 0, top + np.log(total), np.log1p(exps.sum(axis=1))), exps / total[:, None]
    else:
        m, share = np.maximum(0, d + loss.margin), np.longdouble(1) / (scores.shape[1] if loss.over == "mean" else 1)
        losses, grad = share * (m**loss.power).sum(axis=1), share * (m > 0 if loss.power == 1 else 2 * m)
    grad[i, y] = -grad.sum(axis=1)
    return losses, grad


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("c", CLASSES)
@losses
def test_errors_in_units_in_the_last_place(level, dtype, c, loss):
    rng = np.random.default_rng(2)
    tiny = np.finfo(dtype).tiny
    for scale, offset in ((1, 0), (5, 0), (30, 0), (1000, 0), (1, 1e4), (1e-3, -300)):
        scores = (rng.standard_normal((20000, c)) * scale + offset).astype(dtype)
        y = rng.integers(0, c, len(scores))
        found, grad = loss.value_and_grad(scores, y, reduction="none", backend=level)
        expected, entries = exact(loss, scores, y)
        assert (np.abs(found - expected) <= 2 * np.spacing(np.maximum(1, expected).astype(dtype))).all()
        if c == 2:
            np.testing.assert_array_equal(grad[:, 0], -grad[:, 1])
        error, size = np.abs(grad - entries), np.abs(entries)
        # Of results that are no normal numbers nothing is left.
        assert (error <= np.where(size > 4 * tiny, 8 * np.spacing(size.astype(dtype)), 4 * tiny)).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("c", CLASSES)
@pytest.mark.parametrize("weight", [1e-36, 1e-30, 1e-8, 1e8, 1e14, 1e30])
def test_weights_of_any_size(level, c, weight):
    """What they make of the smallest probabilities, or leave of others, is not lost; of two classes however small."""
    weight = weight if c == 2 else max(weight, 1e-20)
    d = np.concatenate([np.arange(-105, 100, 0.37), [-22.2, -22.17, 0]]).astype(np.float32)
    masked = [np.full_like(d, -np.inf)] * (c - 2)
    scores, y = np.stack([d, np.zeros_like(d), *masked], axis=1), np.ones(len(d), int)
    weights = np.full(len(d), weight)
    found = SOFTMAX.value_and_grad(scores, y, sample_weight=weights, reduction="sum", backend=level)[1]
    expected = exact(SOFTMAX, scores, y)[1][:, :2] * np.float32(weight)
    normal = np.abs(expected[:, 0]) > 4e-38
    np.testing.assert_allclose(found[normal, :2], expected[normal], rtol=1e-6)
    np.testing.assert_allclose(found[~normal, :2], expected[~normal], atol=4e-38)
    assert (found[:, 2:] == 0).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("c", CLASSES)
@losses
def test_rows_together_have_the_bits_of_rows_alone(level, dtype, c, loss):
    rng = np.random.default_rng(3)
    for n in (*range(1, 36), 255, 256, 257, 300):
        scores, y = (rng.standard_normal((n, c)) * 4).astype(dtype), rng.integers(0, c, n)
        scores[3 % n] *= 100
        scores[4 % n, 0] = np.inf
        weights = rng.random(n)
        weights[::5] = 0
        beside = np.full((n + 2, c), 7, dtype)
        grad = beside[1:-1]
        value, _ = loss.value_and_grad(scores, y, sample_weight=weights, reduction="none", out=grad, backend=level)
        assert (wide(beside[[0, -1]]) == 7).all()
        for i in range(n) if n < 50 else (0, 3, 4, 254, n - 1):
            one = slice(i, i + 1)
            alone, alone_grad = loss.value_and_grad(
                scores[one].copy(), y[one], sample_weight=weights[one], reduction="none", backend=level
            )
            np.testing.assert_array_equal(alone, value[one])
            np.testing.assert_array_equal(wide(alone_grad), wide(grad[one]))
        in_place = scores.copy()
        loss.value_and_grad(in_place, y, sample_weight=weights, reduction="none", out=in_place, backend=level)
        np.testing.assert_array_equal(wide(in_place), wide(grad))
        np.testing.assert_array_equal(
            loss.value(scores, y, sample_weight=weights, reduction="none", backend=level), value
        )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("c", CLASSES)
@losses
def test_awkward_numbers_are_as_in_the_reference(level, dtype, c, loss):
    """Infinite ones, NaN, and such as overflow where they are squared."""
    kind = ml_dtypes.finfo(dtype)
    values = np.array([0, 1, -1, 50, -50, np.inf, -np.inf, np.nan, kind.max / 64, kind.min / 64])
    scores = np.array(list(itertools.product(values, repeat=c))).astype(dtype)
    for y in range(c):
        targets = np.full(len(scores), y)
        found, grad = loss.value_and_grad(scores, targets, reduction="none", backend=level)
        expected, expected_grad = loss.value_and_grad(wide(scores), targets, reduction="none", backend="reference")
        with np.errstate(over="ignore"):
            expected, expected_grad = expected.astype(found.dtype), wide(expected_grad.astype(dtype))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-37)
        np.testing.assert_allclose(wide(grad), expected_grad, rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=1e-37)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("c", CLASSES)
@pytest.mark.parametrize("name", ["softmax", "hinge squared"])
def test_large_gradients_have_the_bits_of_small_ones(level, dtype, c, name):
    """They go past the caches, in a way that knows no loss."""
    loss = LOSSES[name]
    n, rng = (33 << 20) // (c * dtype.itemsize) + 3, np.random.default_rng(4)
    scores, y = rng.standard_normal((n, c), np.float32).astype(dtype), rng.integers(0, c, n)
    value, grad = loss.value_and_grad(scores, y, reduction="none", backend=level)
    for part in (slice(0, n // 2), slice(n // 2, n)):
        expected, expected_grad = loss.value_and_grad(scores[part], y[part], reduction="none", backend=level)
        np.testing.assert_array_equal(value[part], expected)
        np.testing.assert_array_equal(wide(grad[part]), wide(expected_grad))


def test_squares_of_margins_that_scores_swallow(backend):
    """Scores so large that s_y − Δ is s_y as rounded."""
    for dtype, large in ((np.float32, 2.0**28), (np.float64, 2.0**60)):
        for c in (2, 3, 20, 100, 600):
            scores = np.full((17, c), large, dtype)
            found, grad = fl.Hinge(power=2).value_and_grad(scores, np.arange(17) % c, reduction="none", backend=backend)
            np.testing.assert_allclose(found, c - 1, rtol=1e-6)
            np.testing.assert_allclose(np.sort(grad)[:, 0], -2 * (c - 1), rtol=1e-6)
            np.testing.assert_array_equal(np.sort(grad)[:, 1:], 2)


def test_squares_that_overflow_are_infinite(backend):
    """Not NaN, and their gradient is what it is; in every layout."""
    rng, loss = np.random.default_rng(5), fl.Hinge(power=2)
    for c in (2, 3, 20, 100, 600):
        scores = rng.standard_normal((33, c)).astype(np.float32)
        scores[np.arange(33), 1 + np.arange(33) % (c - 1)] = rng.uniform(1e20, 1e30, 33)
        targets = np.zeros(33, int)
        found, grad = loss.value_and_grad(scores, targets, reduction="none", backend=backend)
        assert np.isposinf(found).all()
        expected = loss.value_and_grad(scores.astype(np.float64), targets, reduction="none", backend="reference")[1]
        largest = np.abs(expected).max(1, keepdims=True)
        np.testing.assert_allclose(grad / largest, expected / largest, rtol=1e-6, atol=1e-6)
