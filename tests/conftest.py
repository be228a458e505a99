"""What the tests share: the backends under test, an exact oracle, and awkward inputs.

The oracle computes the definitions in the docstrings with so many bits that nothing cancels, without the
rearrangements that a float needs: it is independent of the package's own reference.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import mpmath
import numpy as np
import pytest

import fastloss as fl

BACKENDS = [info.name for info in fl.list_backends() if info.available and info.name != "cython"]
COMPILED = [name for name in BACKENDS if name != "reference"]
#: The best level, and the kernels that are compiled at run time: for tests of what levels do not differ in.
ONE_OF_EACH = [*COMPILED[:1], "numba"]
FLOATS = [np.float32, np.float64]

# Plain losses: those that every backend must serve.
PLAIN = {
    "softmax": fl.Softmax(),
    "hinge": fl.Hinge(),
    "hinge squared": fl.Hinge(power=2, margin=0.5),
    "hinge mean": fl.Hinge(over="mean", margin=2.0),
    "hinge squared mean": fl.Hinge(over="mean", power=2),
    "hinge max": fl.Hinge(over="max"),
    "hinge squared max": fl.Hinge(over="max", power=2, margin=0.25),
    "logistic": fl.Logistic(),
}

# Numba compiles a kernel when a test first asks for it, for seconds: `make test` holds this sample of its cases, most
# of which share their kernels. The others are marked `full`.
NUMBA_SAMPLE = re.compile(
    "|".join(
        [
            r"test_(softmax\[numba-float32-C|hinge\[numba-float32-C-hinge max)\]",  # few and many classes
            r"test_value_and_gradient\[numba-float32-softmax-True\]",
            r"test_scores\[numba-softmax-float32-C-.*\]",
            r"test_products\[numba-f-int32\]",  # sparse features
            r"test_(concurrent_callers|fork).*",
            r"test_(peer_is_here|every_kind_of_case).*",
        ]
    )
)


# Levels below the best are one source with it: `make test` leaves out what takes longest and differs in loading alone,
# all options at all shapes, and what threads, peers and the layers above do with any level.
LOWER = [name for name in COMPILED[1:] if name != "numba"]
LOWER_IN_FULL = re.compile(
    r"(test_(shapes|scores|peer_agrees|dual|steps|every_loss_on|numerical_gradient|row_multipliers|values_of|large_gradients)\w*"
    r"\[(.*-)?({0})(-.*)?\]|test_(hinge|softmax|logistic|transforms)\[(({0})-(float64|float32-F)|({1})-).*\])".format(
        "|".join(LOWER) or "none", "|".join(LOWER[:-1]) or "none"
    )
)
# The truth of float64 takes longest; by columns it is held against what is right by rows in the full grid. To
# scikit-learn's checks of an estimator the mean of margins is no more than another factor. What else takes longest has
# a sibling that stays: margins of pairs in 16 bits, layouts and types beside peers.
MORE_IN_FULL = re.compile(
    "|".join(
        [
            r"test_(hinge|softmax|logistic)\[.*-float64-F.*\]",
            r"test_hinge\[.*-float64-C-hinge (mean|squared mean|squared max)\]",
            r"test_estimator_checks\[.*over='mean'.*\]",
            r"test_shapes\[.*pairs.*-b?float16\]",
            r"test_axes_as_in_optax\[(1|\(2, 1\)|\(-1,\))\]",
            r"test_shapes_and_dtypes_as_in_optax\[bfloat16-.*\]",
            r"test_linear_losses\[torch\.float16-.*\]",
            r"test_dual\[f-reference\]",
        ]
    )
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks Numba's cases that are not in the sample `full`, and some of lower levels. Nearly all of those of errors
    end before anything is compiled."""
    for item in items:
        if LOWER_IN_FULL.fullmatch(item.name) or MORE_IN_FULL.fullmatch(item.name):
            item.add_marker("full")
        of_numba = hasattr(item, "callspec") and re.search(r"\bnumba\b", item.callspec.id)
        compiles = item.path.name != "test_errors.py" or "interleaved" in item.name
        if of_numba and compiles and not NUMBA_SAMPLE.fullmatch(item.name):
            item.add_marker("full")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=COMPILED)
def compiled(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=FLOATS, ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> type:
    return request.param


@pytest.fixture(params=PLAIN.values(), ids=PLAIN.keys())
def loss(request: pytest.FixtureRequest) -> fl.Loss:
    return request.param


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """For what is started within, where the system can. numba-cuda's simulator passes Python's lock from thread to
    thread, which takes twice as long from core to core."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[os.getpid() % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def cpu_levels() -> list[str]:
    """The levels that this CPU has, from what the system says of it."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["base"]
    try:
        flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    except OSError:
        return ["v2"]
    v2 = {"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"}
    v3 = v2 | {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"}
    v4 = v3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
    return [name for name, needed in (("v2", v2), ("v3", v3), ("v4", v4)) if needed <= flags]


# --- the exact oracle -------------------------------------------------------------------------------------------
def exact_row(loss: fl.Loss, row: np.ndarray, target: object) -> tuple[mpmath.mpf, list[mpmath.mpf]]:
    """The loss of one row of finite scores and its gradient, before any row multiplier."""
    # A loss of e^−k beside scores near 1 takes 1.44 k bits to be seen; below e^−800 no float64 sees it.
    spread = min(800, int(row.max() - row.min()))
    with mpmath.workprec(160 + 3 * spread):
        scores = [mpmath.mpf(float(s)) for s in row]
        return EXACT[loss.kind](loss, scores, target)


def _exact_softmax(loss, scores, target):
    c = len(scores)
    slopes = [1 / mpmath.mpf(loss.temperature)] * c
    if loss.softcap is not None:
        cap = mpmath.mpf(loss.softcap)
        slopes = [slope / mpmath.cosh(s / cap) ** 2 for s, slope in zip(scores, slopes, strict=True)]
        scores = [cap * mpmath.tanh(s / cap) for s in scores]
    scores = [s / mpmath.mpf(loss.temperature) for s in scores]
    smoothing = mpmath.mpf(loss.label_smoothing)
    if np.ndim(target):
        u = [mpmath.mpf(float(q)) for q in target]
    else:
        u = [(1 - smoothing) * (j == target) + smoothing / c for j in range(c)]
    if loss.class_weight is not None and (np.ndim(target) or smoothing):
        u = [mpmath.mpf(float(w)) * v for w, v in zip(loss.class_weight, u, strict=True)]
    m = max(scores)
    exps = [mpmath.exp(s - m) for s in scores]
    total = mpmath.fsum(exps)
    z, total_u, z_loss = m + mpmath.log(total), mpmath.fsum(u), mpmath.mpf(loss.z_loss)
    value = total_u * z - mpmath.fsum(v * s for v, s in zip(u, scores, strict=True)) + z_loss * z**2
    gradient = [
        ((total_u + 2 * z_loss * z) * e / total - v) * slope for e, v, slope in zip(exps, u, slopes, strict=True)
    ]
    return value, gradient


def _exact_hinge(loss, scores, target):
    c, y = len(scores), int(target)
    delta = [mpmath.mpf(float(loss.margin if loss.pair_margins is None else loss.pair_margins[y, j])) for j in range(c)]
    terms = {j: max(mpmath.mpf(0), scores[j] - scores[y] + delta[j]) for j in range(c) if j != y or loss.count_target}
    if loss.over == "max" and terms:
        best = max(terms, key=lambda j: (terms[j], -j))
        terms = {best: terms[best]}
    value = mpmath.fsum(t**loss.power for t in terms.values())
    gradient = [mpmath.mpf(0)] * c
    for j, t in terms.items():
        if j != y and t > 0:
            slope = loss.power * t ** (loss.power - 1)
            gradient[j] += slope
            gradient[y] -= slope
    if loss.over == "mean":
        value, gradient = value / c, [g / c for g in gradient]
    return value, gradient


def _exact_logistic(loss, scores, target):
    c = len(scores)
    if np.ndim(target):
        labels = [mpmath.mpf(float(q)) for q in target]
    else:
        labels = [mpmath.mpf(int(j == (target - 1 if c == 1 else target))) for j in range(c)]
    smoothing, value, gradient = mpmath.mpf(loss.label_smoothing), mpmath.mpf(0), []
    columns = np.broadcast_to(1.0 if loss.pos_weight is None else loss.pos_weight, c)
    inside = loss.class_weight if loss.class_weight is not None and np.ndim(target) else np.ones(c)
    for s, label, column, weight in zip(scores, labels, columns, inside, strict=True):
        t, p, w = label * (1 - smoothing) + smoothing / 2, mpmath.mpf(float(column)), mpmath.mpf(float(weight))
        value += w * (p * t * mpmath.log1p(mpmath.exp(-s)) + (1 - t) * mpmath.log1p(mpmath.exp(s)))
        gradient.append(w * ((1 - t) / (1 + mpmath.exp(-s)) - p * t / (1 + mpmath.exp(s))))
    share = c if loss.over == "mean" else 1
    return value / share, [g / share for g in gradient]


EXACT = {"softmax": _exact_softmax, "hinge": _exact_hinge, "logistic": _exact_logistic}


def exact(loss: fl.Loss, scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`exact_row` for each row, as arrays of mpf."""
    pairs = [exact_row(loss, row, target) for row, target in zip(scores, targets, strict=True)]
    return (
        np.array([value for value, _ in pairs], object),
        np.array([gradient for _, gradient in pairs], object).reshape(scores.shape),
    )


def ulps(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """The error of `found` in units in the last place of its dtype.

    A magnitude below the smallest normal number may be 0 (contract item 6).
    """
    info = np.finfo(found.dtype)
    tiny = float(info.smallest_normal)

    def one(f, t):
        magnitude = abs(float(t))
        if magnitude < tiny and f == 0:
            return 0.0
        unit = float(info.eps) * 2.0 ** np.floor(np.log2(max(magnitude, tiny)))
        return abs(float((mpmath.mpf(float(f)) - t) / unit))

    with mpmath.workprec(160):
        return np.array([one(f, t) for f, t in zip(found.ravel(), np.ravel(true), strict=True)]).reshape(found.shape)


# --- inputs -----------------------------------------------------------------------------------------------------
def grid_scores(rng: np.random.Generator, n: int, c: int, dtype: type, span: int = 8) -> np.ndarray:
    """Random multiples of 1/16: differences and hinge sums are exact in either float type, and ties are common."""
    return (rng.integers(-16 * span, 16 * span + 1, (n, c)) / 16).astype(dtype)


def layouts(array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays equal to the 2-D `array`, laid out in every way that NumPy has."""
    n, c = array.shape
    yield "C order", array.copy()
    readonly = array.copy()
    readonly.flags.writeable = False
    yield "read-only", readonly
    yield "F order", np.asfortranarray(array)
    rows = (
        np.full((2 * n, c), np.nan).astype(array.dtype)
        if array.dtype.kind == "f"
        else np.zeros((2 * n, c), array.dtype)
    )
    rows[::2] = array
    yield "every second row", rows[::2]
    padded = np.zeros((n, c + 3), array.dtype)
    padded[:, 1 : c + 1] = array
    yield "padded rows", padded[:, 1 : c + 1]
    columns = np.zeros((n, 3 * c), array.dtype)
    columns[:, ::3] = array
    yield "every third column", columns[:, ::3]
    yield "negative row stride", array[::-1].copy()[::-1]
    yield "negative column stride", array[:, ::-1].copy()[:, ::-1]
    yield "both negative, F order", np.asfortranarray(array[::-1, ::-1])[::-1, ::-1]
    # One byte off its natural alignment, as a field of a packed record is.
    buffer = np.zeros(array.nbytes + 1, np.uint8)
    unaligned = buffer[1:].view(array.dtype).reshape(array.shape)
    unaligned[...] = array
    yield "unaligned", unaligned


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equality that tells NaN payloads and signed zeros apart."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
