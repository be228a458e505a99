"""Rows of few classes that lie end to end are computed many at a time, across rows: what comes of each is its own."""

import ml_dtypes
import numpy as np
import pytest

import fastloss as fl
from tests.conftest import BACKENDS

LEVELS = [name for name in BACKENDS if name.startswith("cython-")]
TYPES = [np.dtype(t) for t in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]
OPTIONS = (
    {},
    {"temperature": 2.0},
    {"label_smoothing": 0.1, "z_loss": 1e-3},
    {"label_smoothing": 0.4, "temperature": 0.3},
    {"label_smoothing": 0.1, "class_weight": True, "z_loss": 1e-3},
)
CLASSES = (4, 5, 10, 15, 16, 17, 31, 37, 100, 383)


def softmax(c, options, **more):
    """Class weights are different for all classes, if there are some."""
    weights = np.linspace(0.5, 2, c) if "class_weight" in options else None
    return fl.Softmax(**{**options, "class_weight": weights}, **more)


def wide(a):
    """NaN of types that NumPy does not know is not taken for NaN."""
    return a.astype(np.float64)


def odd_rows(n, c, dtype, rng):
    """Scores of which most rows are usual, and each of the others is odd in a way of its own."""
    scores = rng.standard_normal((n, c)) * 3
    scores[1 % n] *= 20
    scores[5 % n] *= 1000
    scores[6 % n] += 1e4
    scores[7 % n, ::2] = -np.inf
    scores[8 % n] = -np.inf
    scores[11 % n, c // 2] = np.inf
    scores[12 % n, c - 1] = np.nan
    scores[13 % n] = 40, *[-40] * (c - 1)  # as far apart as may be
    return scores.astype(dtype)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rows_together_have_the_bits_of_rows_alone(level, dtype, options):
    rng = np.random.default_rng(4)
    for c in CLASSES:
        loss = softmax(c, options, ignore_index=-1)
        for n in (7, 23, 35, 300):
            scores, y = odd_rows(n, c, dtype, rng), rng.integers(0, c, n)
            y[13 % n] = rng.integers(0, 2) * (c - 1)
            y[2 % n] = -1  # ignored
            out = np.empty_like(scores)
            losses, grad = loss.value_and_grad(scores, y, reduction="none", out=out, backend=level)
            for i in range(n) if n < 100 else (*range(16), 100, 255, 256, 299):
                alone, alone_grad = loss.value_and_grad(
                    scores[i : i + 1].copy(), y[i : i + 1], reduction="none", backend=level
                )
                np.testing.assert_array_equal(alone[0], losses[i], err_msg=f"C = {c}, row {i} of {n}")
                np.testing.assert_array_equal(wide(alone_grad[0]), wide(grad[i]), err_msg=f"C = {c}, row {i} of {n}")
            in_place = scores.copy()
            loss.value_and_grad(in_place, y, reduction="none", out=in_place, backend=level)
            np.testing.assert_array_equal(wide(in_place), wide(grad))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_probabilities_of_rows_together_are_those_of_rows_alone(level, dtype):
    rng = np.random.default_rng(6)
    for c in CLASSES:
        for n in (1, 7, 23, 35, 300):
            scores = odd_rows(n, c, dtype, rng)
            found = fl.softmax(scores, backend=level)
            for i in range(n) if n < 100 else (*range(16), 100, 255, 256, 299):
                alone = fl.softmax(scores[i : i + 1].copy(), backend=level)
                np.testing.assert_array_equal(wide(alone[0]), wide(found[i]), err_msg=f"C = {c}, row {i} of {n}")
            expected = fl.softmax(wide(scores), backend="reference")
            rtol = 1e-2 if dtype.itemsize < 4 else max(16 * np.finfo(dtype).eps, 1e-12)
            np.testing.assert_allclose(wide(found), expected, rtol=rtol, atol=1e-6)
            in_place = scores.copy()
            fl.softmax(in_place, out=in_place, backend=level)
            np.testing.assert_array_equal(wide(in_place), wide(found))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_log_sum_exps_of_rows_together_are_those_of_rows_alone(level, dtype):
    rng = np.random.default_rng(7)
    for c in CLASSES:
        for n in (1, 7, 23, 35, 300):
            scores = odd_rows(n, c, dtype, rng)
            scores[14 % n, : c // 2] = np.inf, *[np.nan] * (c // 2 - 1)
            found = fl.logsumexp(scores, backend=level)
            for i in range(n) if n < 100 else (*range(16), 100, 255, 256, 299):
                alone = fl.logsumexp(scores[i : i + 1].copy(), backend=level)
                np.testing.assert_array_equal(wide(alone[0]), wide(found[i]), err_msg=f"C = {c}, row {i} of {n}")
            expected = fl.logsumexp(wide(scores), backend="reference")
            eps = max(ml_dtypes.finfo(found.dtype).eps, 1e-15)
            np.testing.assert_allclose(wide(found), expected, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_that_repeat(level, dtype):
    """All errors of a row may then be in one direction."""
    rng = np.random.default_rng(10)
    for c in (3, 4, 5, 8, 10, 16, 17, 37, 100):
        for scale in (1, 12, 100):
            scores, y = (
                np.round(rng.standard_normal((40000 // c, c)) * scale * 8).astype(dtype) / 8,
                rng.integers(0, c, 40000 // c),
            )
            scores[::2] = scores[::2, rng.integers(0, c, c)] - rng.integers(0, 4)
            e = np.exp(scores.astype(np.longdouble) - scores.max(axis=1, keepdims=True))
            z = scores.max(axis=1) + np.log(e.sum(axis=1))
            losses = z - scores[np.arange(len(y)), y]
            for found, expected in (
                (fl.logsumexp(scores, backend=level), z),
                (fl.Softmax().value(scores, y, reduction="none", backend=level), losses),
            ):
                assert (np.abs(found - expected) <= 2 * np.spacing(np.maximum(1, np.abs(expected)).astype(dtype))).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_losses_where_the_target_is_far_below(level, dtype):
    """So far that its exponential is nothing beside others: what they are relative to is no part of the loss."""
    rng = np.random.default_rng(11)
    far = 87 if dtype == np.float32 else 708
    for c in (3, 4, 5, 10, 37, 100):
        for temperature in (1.0, 0.5):
            y = rng.integers(0, c, 4000)
            scores = rng.standard_normal((4000, c)) + rng.uniform(-2 * far, 2 * far, (4000, 1))
            scores[np.arange(4000), y] -= rng.uniform(0.8 * far, 1.5 * far, 4000) * temperature
            scores = scores.astype(dtype)
            d = (scores.astype(np.longdouble) - scores[np.arange(4000), y][:, None]) / np.longdouble(temperature)
            losses = d.max(axis=1) + np.log(np.exp(d - d.max(axis=1, keepdims=True)).sum(axis=1))
            found = fl.Softmax(temperature=temperature).value(scores, y, reduction="none", backend=level)
            assert (np.abs(found - losses) <= 2 * np.spacing(losses.astype(dtype))).all()


def large(level):
    """Bytes of which half do not go past the caches (`run_scores` in scores.pxi)."""
    return (17 if level == "cython-v4" else 33) << 20


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_large_probabilities_have_the_bits_of_small_ones(level, dtype):
    """They go past the caches."""
    n, rng = large(level) // (10 * dtype.itemsize) + 1, np.random.default_rng(9)
    scores = (rng.standard_normal((n, 10), np.float32) * 3).astype(dtype)
    found = wide(fl.softmax(scores, backend=level))
    for part in (slice(0, n // 2), slice(n // 2, n)):
        np.testing.assert_array_equal(found[part], wide(fl.softmax(scores[part], backend=level)))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("c", "options"), [(5, {}), (10, OPTIONS[2]), (37, {}), (100, OPTIONS[4]), (300, OPTIONS[3])], ids=str
)
def test_large_gradients_have_the_bits_of_small_ones(level, dtype, c, options):
    """They go past the caches."""
    loss = softmax(c, options)
    n, rng = large(level) // (c * dtype.itemsize) + 1, np.random.default_rng(c)
    scores, y = (rng.standard_normal((n, c), np.float32) * 3).astype(dtype), rng.integers(0, c, n)
    losses, grad = loss.value_and_grad(scores, y, reduction="none", backend=level)
    for part in (slice(0, n // 2), slice(n // 2, n)):
        expected, expected_grad = loss.value_and_grad(scores[part], y[part], reduction="none", backend=level)
        np.testing.assert_array_equal(losses[part], expected)
        np.testing.assert_array_equal(wide(grad[part]), wide(expected_grad))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_odd_rows_against_the_reference(level, dtype, options):
    rng = np.random.default_rng(5)
    eps = np.finfo(np.float32 if dtype.itemsize < 4 else dtype).eps
    for c in CLASSES:
        loss = softmax(c, options)
        scores, y = odd_rows(40, c, dtype, rng), rng.integers(0, c, 40)
        losses, grad = loss.value_and_grad(scores, y, reduction="none", backend=level)
        exact = wide(scores)
        expected, expected_grad = loss.value_and_grad(exact, y, reduction="none", backend="reference")
        # The reference, in float64, rounds scores of 10⁴ / T.
        np.testing.assert_allclose(losses, expected, rtol=max(4 * eps, 1e-12), atol=4 * eps)
        rtol = 1e-2 if dtype.itemsize < 4 else 16 * eps
        np.testing.assert_allclose(wide(grad), expected_grad, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("beside", [0, 500])
@pytest.mark.parametrize("weight", [1e-20, 6e-13, 1e-8, 1e8, 1e23])
def test_weights_of_any_size(level, beside, weight):
    """Also where all scores are as low, or as high, as usual ones may be, and a row beside them is not usual."""
    loss = fl.Softmax(temperature=0.5)
    for low in (-19.5, 19.5):
        scores, y = np.full((8, 5), low, np.float32), np.arange(8) % 5
        scores[7, 0] = beside
        weights = np.full(8, weight)
        found = loss.value_and_grad(scores, y, sample_weight=weights, reduction="sum", backend=level)[1]
        expected = loss.value_and_grad(
            scores.astype(np.float64), y, sample_weight=weights, reduction="sum", backend="reference"
        )[1]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("z_loss", [1e-3, 1.0, 100.0])
def test_z_loss_where_the_target_is_far_below(level, z_loss):
    """z is near 0 there, and no difference of large numbers."""
    rng, loss = np.random.default_rng(7), fl.Softmax(z_loss=z_loss)
    for target in (-10, -30, -39, -75, -300):
        scores = rng.standard_normal((40, 10)).astype(np.float32)
        scores -= np.log(np.exp(scores[:, 1:]).sum(1, keepdims=True))
        scores[:, 0] = target
        losses, grad = loss.value_and_grad(scores, np.zeros(40, int), reduction="none", backend=level)
        expected, expected_grad = loss.value_and_grad(
            scores.astype(np.float64), np.zeros(40, int), reduction="none", backend="reference"
        )
        np.testing.assert_allclose(losses, expected, rtol=4e-7)
        largest = np.abs(expected_grad).max(1, keepdims=True)
        np.testing.assert_allclose(grad / largest, expected_grad / largest, atol=1e-6 * max(1, z_loss))


@pytest.mark.parametrize("level", LEVELS)
def test_smoothing_with_classes_masked_by_the_lowest_number(level):
    rng, loss = np.random.default_rng(8), fl.Softmax(temperature=5.0, label_smoothing=0.1)
    scores = rng.standard_normal((20, 10)).astype(np.float32)
    scores[:, 7:] = np.finfo(np.float32).min
    losses, _ = loss.value_and_grad(scores, np.arange(20) % 7, reduction="none", backend=level)
    expected, _ = loss.value_and_grad(
        scores.astype(np.float64), np.arange(20) % 7, reduction="none", backend="reference"
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
