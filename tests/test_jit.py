"""What Numba's kernels are made of: vectors of any width, threads that are kept, checks of targets."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import fastloss as fl

NARROW = """
import sys
from fastloss.jit import vectors
vectors.VECTOR_BYTES, vectors.WIDE = int(sys.argv[1]), False
import numpy as np
import fastloss as fl
rng = np.random.default_rng(0)
for loss in (fl.Softmax(), fl.Hinge(power=2), fl.Hinge(over="max"), fl.Softmax(label_smoothing=0.1)):
    for c in (5, 35):
        scores, y = rng.normal(0, 3, (70, c)).astype(sys.argv[2]), rng.integers(0, c, 70)
        (value, grad), (expected, expected_grad) = (
            loss.value_and_grad(scores, y, backend=backend) for backend in ("numba", "reference")
        )
        np.testing.assert_allclose(value, expected, 1e-6)
        np.testing.assert_allclose(grad, expected_grad, 1e-5, 1e-7)
"""
CALLS = """
import numpy as np
import fastloss as fl
scores, y = np.random.default_rng(0).normal(size=(9000, 10)).astype("f"), np.arange(9000) % 10
print(fl.Softmax().value(scores, y, backend="numba", n_threads=3))
"""


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [16, 32])
def test_narrower_vectors(size, dtype):
    """Those of processors without AVX-512."""
    subprocess.run([sys.executable, "-c", NARROW, str(size), dtype], check=True)


def test_threads_that_fell_asleep_are_woken_and_are_dismissed_at_the_end():
    found = subprocess.run(
        [sys.executable, "-c", CALLS + "import time; time.sleep(0.3)" + CALLS], check=True, capture_output=True,
        text=True, timeout=60,
    ).stdout.split()  # fmt: skip
    assert len(found) == 2
    assert found[0] == found[1]


def test_threads_are_shared_by_callers_and_kept():
    rng = np.random.default_rng(0)
    from fastloss.jit import cpu

    loss, scores, y = fl.Softmax(), rng.normal(size=(9000, 10)).astype("f"), rng.integers(0, 10, 9000)
    expected = loss.value(scores, y, backend="numba", n_threads=1)
    found = []

    def call():
        for _ in range(20):
            found.append(loss.value(scores, y, backend="numba", n_threads=2))
            time.sleep(0.001)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == [expected] * 60
    assert 1 <= len(cpu._helpers) <= 8
    assert len(set(map(id, cpu._helpers))) == len(cpu._helpers)


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_every_bad_target_is_found(dtype):
    rng = np.random.default_rng(0)
    from fastloss.jit import checks

    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    for n in (0, 1, 7, 8, 65, 4097):
        for stop in (1, 5, 2**31 - 1, 2**40):
            y = rng.integers(0, min(stop, high), n).astype(dtype)
            assert checks.first_outside(y, stop, None) == -1
            for value in (-1, low, high, min(stop, high)):
                for ignored in (None, -1, 2**62):
                    if n:
                        z, k = y.copy(), int(rng.integers(n))
                        z[k] = value
                        bad = (value < 0 or value >= stop) and value != ignored
                        assert checks.first_outside(z, stop, ignored) == (k if bad else -1)
