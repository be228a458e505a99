"""Hinge losses of few classes, of which but the sum is asked for: no row is brought together."""

from fractions import Fraction

import numpy as np
import pytest

import fastloss as fl
from tests.conftest import BACKENDS
from tests.test_narrow import TYPES, odd_rows
from tests.test_short import wide

LEVELS = [name for name in BACKENDS if name.startswith("cython-")]
LOSSES = {
    "sum": fl.Hinge(margin=0.75, ignore_index=-1),
    "mean": fl.Hinge(over="mean", ignore_index=-1),
    "no margin": fl.Hinge(margin=0.0, ignore_index=-1),
}
levels = pytest.mark.parametrize("level", LEVELS)
dtypes = pytest.mark.parametrize("dtype", TYPES, ids=str)


@levels
@dtypes
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients_have_the_bits_of_rows_whose_losses_are_asked_for(level, dtype, loss):
    rng = np.random.default_rng(1)
    for c in (*range(5, 18), 20, 24, 31, 32, 33, 37, 48, 50, 63, 64):
        for n in (1, 15, 16, 17, 300):
            odd = n == 17
            scores = odd_rows(n, c, dtype, rng) if odd else (rng.standard_normal((n, c)) * 3).astype(dtype)
            y, weights = rng.integers(0, c, n), rng.random(n)
            weights[:: 2 + c % 5] = 0
            if n > 2:
                y[2] = -1
            for given in (None, weights):
                options = {"sample_weight": given, "backend": level}
                rows, expected = loss.value_and_grad(scores, y, reduction="none", **options)
                beside = np.full((n + 2, c), 7, dtype)
                total, grad = loss.value_and_grad(scores, y, reduction="sum", out=beside[1:-1], **options)
                np.testing.assert_array_equal(wide(grad), wide(expected), err_msg=f"C = {c}, {n} rows")
                assert (wide(beside[[0, -1]]) == 7).all()
                in_place = scores.copy()
                again, grad = loss.value_and_grad(in_place, y, reduction="sum", out=in_place, **options)
                np.testing.assert_array_equal(wide(grad), wide(expected), err_msg=f"C = {c}, {n} rows")
                np.testing.assert_array_equal([again, loss.value(scores, y, reduction="sum", **options)], total)
                if not odd:
                    eps = float(np.finfo(rows.dtype).eps)
                    assert total == pytest.approx(rows.sum(dtype=np.float64), rel=4 * eps, abs=4 * eps)


@levels
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_classes_at_the_edge_of_the_margin(level, dtype):
    """Scores that are the target's less the margin, rounded or not, or units in the last place beside it."""
    rng = np.random.default_rng(2)
    for margin in (1.0, 0.1, 1.0000001, 3.0, 1e-3, -0.1):
        loss = fl.Hinge(margin=float(dtype(margin)))
        for offset in (0, 1, -1, 2, -4, 1e4, -300, 1e8, -1e8, 1e30):
            c = int(rng.integers(5, 16))
            y = rng.integers(0, c, 64)
            target = np.full((64, 1), offset, dtype) * (1 + rng.random((64, 1)) * (np.abs(offset) > 10)).astype(dtype)
            edge = (target - dtype(margin)).astype(dtype)
            unit = np.maximum(np.spacing(np.abs(edge)), np.finfo(dtype).tiny)  # which is not flushed to 0
            units = rng.integers(-2, 3, (64, c)) * unit
            scores = (edge + units).astype(dtype)
            np.put_along_axis(scores, y[:, None], target, 1)
            margins = [
                [Fraction(s) - Fraction(t) + Fraction(loss.margin) for s in row]
                for row, t in zip(wide(scores), wide(target)[:, 0], strict=True)
            ]
            for i in range(64):
                margins[i][y[i]] = Fraction(0)
            entries = np.array([[m > 0 for m in row] for row in margins], dtype)
            entries[range(64), y] = -entries.sum(axis=1)
            expected = sum(max(m, Fraction(0)) for row in margins for m in row)
            total, grad = loss.value_and_grad(scores, y, reduction="sum", backend=level)
            np.testing.assert_array_equal(grad, entries, err_msg=f"margin {margin}, offset {offset}, C = {c}")
            eps = float(np.finfo(dtype).eps)
            assert total == pytest.approx(float(expected), rel=8 * eps, abs=8 * eps * max(1, abs(margin)))


@levels
def test_sums_that_overflow_in_float32(level):
    """But not in float64; beside rows that do not."""
    scores, y = np.zeros((300, 10), np.float32), np.zeros(300, int)
    scores[130:140, 1] = 3e38
    expected, entries = fl.Hinge().value_and_grad(scores, y, reduction="sum", backend="reference")
    total, grad = fl.Hinge().value_and_grad(scores, y, reduction="sum", backend=level)
    assert total == pytest.approx(expected, rel=1e-6)
    np.testing.assert_array_equal(grad, entries)


@levels
@pytest.mark.parametrize("c", [5, 10, 32])
def test_large_gradients_have_the_bits_of_small_ones(level, c):
    """They go past the caches."""
    rng = np.random.default_rng(3)
    n = (33 << 20) // (4 * c) + 3
    scores, y = rng.standard_normal((n, c), np.float32), rng.integers(0, c, n)
    scores[n // 3] = np.nan
    total, grad = fl.Hinge().value_and_grad(scores, y, reduction="sum", backend=level)
    rows, expected = fl.Hinge().value_and_grad(scores, y, reduction="none", backend=level)
    np.testing.assert_array_equal(grad, expected)
    assert np.isnan(total)
    assert np.isnan(rows[n // 3])
