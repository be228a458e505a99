"""Gradients that go past the caches, being larger than they are: the bits of small ones, row for row."""

import itertools

import ml_dtypes
import numpy as np
import pytest

import fastloss as fl
from tests.conftest import BACKENDS

BYTES = 34 << 20  # more than STREAM_BYTES in scores.pxi
LEVELS = [name for name in BACKENDS if name.startswith("cython-")]
SHAPES = [("float32", c) for c in (100, 401, 512, 1001, 4608, 70001)]
SHAPES += [("float64", 1001), ("float64", 1024), ("bfloat16", 1001), ("bfloat16", 9001)]


def at_offset(shape, dtype, offset):
    """An array that begins `offset` numbers behind a multiple of 64 bytes."""
    memory = np.empty(int(np.prod(shape)) + 128, dtype)
    start = (-memory.ctypes.data % 64) // memory.itemsize + offset
    return memory[start : start + int(np.prod(shape))].reshape(shape)


def losses_of(c):
    """Row losses of c classes whose gradients are sent in different ways."""
    return [
        fl.Hinge(),  # at an offset of 0
        fl.Softmax(),
        fl.Softmax(temperature=2.0),
        fl.Softmax(label_smoothing=0.1, z_loss=1e-3),
        fl.Softmax(softcap=3.0),
        fl.Softmax(softcap=3.0, label_smoothing=0.1),
        # The class that sums leave out is the target, and the largest:
        fl.Softmax(class_weight=np.linspace(0.5, 2, c), label_smoothing=0.1),
        fl.Softmax(class_weight=np.eye(1, c)[0] * c + 0.5, label_smoothing=0.1),
        fl.Hinge(),
        fl.Hinge(power=2),
        fl.Hinge(over="max"),
        fl.Logistic(),
        *([fl.Hinge(pair_margins=np.arange(c * c).reshape(c, c) % 5 / 2)] if c == 512 else []),
    ]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("dtype", "c"), SHAPES)
def test_large_gradients_have_the_bits_of_small_ones(dtype, c, level):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    n = BYTES // (c * dtype.itemsize) + 1
    rng = np.random.default_rng(c)
    scores = at_offset((n, c), dtype, 4)
    scores[:] = rng.standard_normal((n, c), np.float32) * 3
    targets = rng.integers(0, c, n)
    targets[:3] = 0, c - 1, c // 2  # at the ends of a row
    scores[:, c // 3] = -np.inf  # a class that is masked: its entries are 0, with the sign of the factor
    weights = np.where(rng.random(n) < 0.1, 0.0, 1.0).astype(np.float64 if dtype == np.float64 else np.float32)
    parts = [slice(*ends) for ends in itertools.pairwise([0, n // 3, 2 * n // 3, n])]  # too small for that
    probabilities = rng.random((n, c), weights.dtype)
    for k, (loss, y) in enumerate(
        [*((loss, targets) for loss in losses_of(c)), (fl.Softmax(), probabilities), (fl.Logistic(), probabilities)]
    ):
        gradient = at_offset((n, c), dtype, k * 3)
        gradient[:] = 7
        options = {"reduction": "sum", "upstream": -1.0, "backend": level}
        loss.value_and_grad(scores, y, sample_weight=weights, out=gradient, **options)
        for part in parts:
            _, expected = loss.value_and_grad(scores[part], y[part], sample_weight=weights[part], **options)
            assert gradient[part].tobytes() == np.asarray(expected).tobytes()
    for name in ("softmax", "log_softmax", "sigmoid"):
        given = at_offset((n, c), dtype, 5)
        getattr(fl, name)(scores, out=given, backend=level)
        for part in parts:
            assert given[part].tobytes() == getattr(fl, name)(scores[part], backend=level).tobytes()
