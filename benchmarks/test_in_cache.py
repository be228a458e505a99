"""What bounds the kernels of given scores beside memory: one thread, 64 KB of float32 scores, which stay in the cache.

`pytest benchmarks/test_in_cache.py`: times of loss and gradient, and of what no kernel of this design does without: the
exponentials (and for each row a logarithm), and, for few classes, transposes of scores and gradient; for 16 scores
each.
"""

import numpy as np
import pytest

import fastloss as fl
from fastloss import backends
from fastloss.bench.controls import kernels, ones

CLASSES = [2, 3, 5, 10, 16, 32, 37, 64, 100, 1000]
WORK = {
    "softmax": fl.Softmax(),
    "hinge": fl.Hinge(),
    "exponentials": "exp",
    "logarithms": "log",
    "transposes": "transpose",
}
SIZE = 2**14
REPEATS = 20  # of a control within a call


CASES = [(name, c) for c in CLASSES for name in WORK if name != "transposes" or c <= 32]


@pytest.mark.benchmark(min_rounds=50, max_time=0.2)
@pytest.mark.parametrize(("name", "c"), CASES)
def test_in_cache(benchmark, name, c):
    benchmark.group = f"{c} classes"
    what, n = WORK[name], SIZE // c // 16 * 16
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((n, c), np.float32)
    if isinstance(what, fl.Loss):
        targets, out = rng.integers(0, c, n), np.empty_like(scores)
        rows = backends.get("cython").score_rows  # without the checks of a call
        benchmark(rows, what, scores, targets, None, 1.0, out, None, {}, 1)
        vectors = scores.size / 16
    elif what == "transpose":
        out = np.empty_like(scores)
        done = benchmark(kernels().control, what, scores, out, REPEATS, 1)
        assert (out == scores).all()
        vectors = done / 16
    else:
        source = ones(4 * SIZE)
        done = benchmark(kernels().control, what, source, source, REPEATS, 1)
        vectors = done / 16 * (c if what == "log" else 1)  # one for each row
    benchmark.extra_info["ns for 16 scores"] = round(benchmark.stats["min"] / vectors * 1e9, 2)
