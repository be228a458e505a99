"""Hinge rows of a few vectors: walked over one by one, and settled many at a time."""

import ml_dtypes
import numpy as np
import pytest

import fastloss as fl
from tests.conftest import BACKENDS
from tests.test_short import exact, wide

LEVELS = [name for name in BACKENDS if name.startswith("cython-")]
TYPES = [np.dtype(t) for t in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]
SUMS = {
    "hinge": fl.Hinge(margin=0.75, ignore_index=-1),
    "squared": fl.Hinge(power=2, ignore_index=-1),
    "mean": fl.Hinge(over="mean", ignore_index=-1),
}
LOSSES = {
    **SUMS,
    "max": fl.Hinge(over="max", ignore_index=-1),
    "max squared": fl.Hinge(over="max", power=2, margin=2.0, ignore_index=-1),
}
CLASSES = (8, 12, 15, 16, 17, 24, 31, 32, 37, 48, 50, 64, 65, 100, 129, 383)
levels = pytest.mark.parametrize("level", LEVELS)
dtypes = pytest.mark.parametrize("dtype", TYPES, ids=str)
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def odd_rows(n, c, dtype, rng):
    """Scores of which some rows are odd, each in a way of its own."""
    scores = rng.standard_normal((n, c)) * 3
    scores[1 % n] *= 1000
    scores[5 % n] += 1e4
    scores[6 % n] = np.round(scores[6 % n] / 4)  # ties
    scores[7 % n, ::2] = -np.inf
    scores[8 % n] = -np.inf
    scores[11 % n, c // 2] = np.inf
    scores[12 % n, c - 1] = np.nan
    scores[13 % n, 0] = np.nan
    scores[14 % n] = 0
    return scores.astype(dtype)


@levels
@dtypes
@losses
def test_rows_together_have_the_bits_of_rows_alone(level, dtype, loss):
    rng = np.random.default_rng(5)
    for c in CLASSES:
        for n in (1, 15, 35, 300):
            scores, y, weights = odd_rows(n, c, dtype, rng), rng.integers(0, c, n), rng.random(n)
            y[2 % n], weights[3 % n] = -1, 0
            beside = np.full((n + 2, c), 7, dtype)
            grad = beside[1:-1]
            options = {"reduction": "none", "backend": level}
            value, _ = loss.value_and_grad(scores, y, sample_weight=weights, out=grad, **options)
            assert (wide(beside[[0, -1]]) == 7).all()
            for i in range(n) if n < 100 else (*range(16), 127, 128, 129, 299):
                one = slice(i, i + 1)
                alone, entries = loss.value_and_grad(scores[one].copy(), y[one], sample_weight=weights[one], **options)
                np.testing.assert_array_equal(alone, value[one], err_msg=f"C = {c}, row {i} of {n}")
                np.testing.assert_array_equal(wide(entries), wide(grad[one]), err_msg=f"C = {c}, row {i} of {n}")
            apart = np.full((n, c + 3), 7, dtype)
            apart[:, :c] = scores
            value_apart, _ = loss.value_and_grad(apart[:, :c], y, sample_weight=weights, out=apart[:, :c], **options)
            assert (wide(apart[:, c:]) == 7).all()
            in_place = scores.copy()
            value_in_place, _ = loss.value_and_grad(in_place, y, sample_weight=weights, out=in_place, **options)
            for found in (apart[:, :c], in_place):
                np.testing.assert_array_equal(wide(found), wide(grad))
            for found in (value_apart, value_in_place, loss.value(scores, y, sample_weight=weights, **options)):
                np.testing.assert_array_equal(found, value)


@levels
@dtypes
@losses
def test_awkward_numbers_are_as_in_the_reference(level, dtype, loss):
    rng = np.random.default_rng(6)
    for c in CLASSES:
        scores, y = odd_rows(60, c, dtype, rng), rng.integers(0, c, 60)
        y[7:60:8] = c - 1
        found, grad = loss.value_and_grad(scores, y, reduction="none", backend=level)
        expected, entries = loss.value_and_grad(wide(scores), y, reduction="none", backend="reference")
        with np.errstate(over="ignore"):
            expected, entries = expected.astype(found.dtype), wide(entries.astype(dtype))
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=f"C = {c}")
        rtol = 1e-2 if dtype.itemsize == 2 else 1e-5
        largest = np.nan_to_num(np.abs(entries), posinf=0).max()
        np.testing.assert_allclose(wide(grad), entries, rtol=rtol, atol=rtol * largest, err_msg=f"C = {c}")


@levels
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("loss", SUMS.values(), ids=SUMS)
def test_errors_in_units_in_the_last_place(level, dtype, loss):
    rng = np.random.default_rng(7)
    for c in (10, 16, 20, 37, 64, 250, 383):
        for scale, offset in ((1, 0), (30, 0), (1000, 0), (1, 1e4), (0.01, -300)):
            scores = (rng.standard_normal((200000 // c, c)) * scale + offset).astype(dtype)
            y = rng.integers(0, c, len(scores))
            found, grad = loss.value_and_grad(scores, y, reduction="none", backend=level)
            expected, entries = exact(loss, scores, y)
            units = np.spacing(np.maximum(1, expected).astype(dtype))
            assert (np.abs(found - expected) <= 2 * units).all(), (c, scale, offset)
            largest = np.spacing(np.abs(entries).max(axis=1, keepdims=True).astype(dtype))
            assert (np.abs(grad - entries) <= 8 * largest).all(), (c, scale, offset)


@levels
@dtypes
@losses
def test_sums_of_losses_are_those_of_their_rows(level, dtype, loss):
    """Where nothing is known of each row; gradients have the same bits."""
    rng = np.random.default_rng(9)
    kind = np.finfo(np.float64 if dtype == np.float64 else np.float32)
    for c in (5, 7, *CLASSES):
        for n, odd in ((1, False), (300, False), (300, True)):
            scores = odd_rows(n, c, dtype, rng) if odd else (rng.standard_normal((n, c)) * 3).astype(dtype)
            y, weights = rng.integers(0, c, n), rng.random(n)
            weights[::7] = 0
            options = {"sample_weight": weights, "backend": level}
            rows, expected = loss.value_and_grad(scores, y, reduction="none", **options)
            total, grad = loss.value_and_grad(scores, y, reduction="sum", **options)
            np.testing.assert_array_equal(wide(grad), wide(expected), err_msg=f"C = {c}")
            if odd:
                assert not np.isfinite(total)
                continue
            size = np.abs(wide(rows)).sum()
            np.testing.assert_allclose(total, rows.sum(dtype=np.float64), rtol=0, atol=4 * kind.eps * max(1, size))
            assert loss.value(scores, y, reduction="sum", **options) == total


@levels
def test_sums_of_losses_that_overflow_in_float32(level):
    """But not in float64, in which they are summed."""
    for c in (8, 16, 37, 100):
        scores, y = np.zeros((64, c), np.float32), np.zeros(64, int)
        scores[:, 1] = 3e38
        assert fl.Hinge().value(scores, y, reduction="sum", backend=level) == pytest.approx(64 * 3e38, rel=1e-6)


@levels
@pytest.mark.parametrize("name", ["hinge", "max"])
def test_large_gradients_have_the_bits_of_small_ones(level, name):
    """They go past the caches, in a way that knows no loss."""
    loss, c, rng = LOSSES[name], 37, np.random.default_rng(8)
    n = (33 << 20) // (4 * c) + 3
    scores, y = rng.standard_normal((n, c), np.float32), rng.integers(0, c, n)
    value, grad = loss.value_and_grad(scores, y, reduction="none", backend=level)
    for part in (slice(0, n // 2), slice(n // 2, n)):
        expected, entries = loss.value_and_grad(scores[part], y[part], reduction="none", backend=level)
        np.testing.assert_array_equal(value[part], expected)
        np.testing.assert_array_equal(grad[part], entries)
