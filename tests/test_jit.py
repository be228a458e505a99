"""What Numba's kernels are made of: vectors of any width, threads that are kept, checks of targets."""

import copy
import os
import pickle
import subprocess
import sys
import threading
import time

import ml_dtypes
import numpy as np
import pytest

import fastloss as fl
from fastloss import losses
from fastloss.jit import checks, cpu

NARROW = """
import sys
from fastloss.jit import vectors
vectors.VECTOR_BYTES, vectors.WIDE = int(sys.argv[1]), False
import numpy as np
import fastloss as fl
rng = np.random.default_rng(0)
losses = [fl.Softmax(), fl.Hinge(power=2), fl.Hinge(over="max"), fl.Softmax(label_smoothing=0.1)]
losses += [fl.Softmax(softcap=9.0), fl.Softmax(softcap=9.0, label_smoothing=0.1)]
for loss in losses:
    for c in (5, 35, 67):
        scores, y = rng.normal(0, 3, (70, c)).astype(sys.argv[2]), rng.integers(0, c, 70)
        (value, grad, more), (expected, expected_grad, expected_more) = (
            loss.value_and_grad(scores, y, backend=backend, outputs=("argmax",)) for backend in ("numba", "reference")
        )
        np.testing.assert_array_equal(more["argmax"], expected_more["argmax"])
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


@pytest.mark.full
def test_threads_find_the_first_number_that_is_unfit(monkeypatch):
    monkeypatch.setattr(checks, "PARALLEL", 1000)
    numbers = np.random.default_rng(0).random((5003, 1))
    assert checks.first_unfit(numbers, 3, np.inf) == -1
    for places in ([5002], [0, 5000], [4999, 1234, 4000], range(2600, 5003)):
        bad = numbers.copy()
        bad[list(places)] = np.resize([np.nan, -1.0, np.inf], (len(places), 1))
        for n_threads in (1, 2, 3):
            assert checks.first_unfit(bad, n_threads, np.inf) == min(places)


@pytest.mark.parametrize(
    "dtype",
    ["float32", *(pytest.param(name, marks=pytest.mark.full) for name in ("float64", "float16", "bfloat16"))],
)
def test_the_largest_class(dtype):
    """The first that has the maximum, wherever in a vector or a block it is, or the first NaN; 0 in skipped rows."""
    kind, weight = np.dtype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype), np.arange(130) % 5 > 0
    for c in (1, 3, 16, 17, 48, 49, 64, 65, 101, 257):
        rng, places, row = np.random.default_rng(c), np.arange(130) % c, np.arange(130)
        scores = rng.integers(-2, 3, (130, c)).astype(np.float32)
        scores[row[:65], places[:65]] = np.nan
        scores[row[20:90], places[20:90][::-1]] = np.inf
        scores[90:110] = -np.inf
        scores[110:] = -1.0
        scores[row[110:], places[110:]] = 1.0
        expected = scores.argmax(axis=1)
        for given in (scores.astype(kind), np.asfortranarray(scores.astype(kind))):
            for skipped in (None, weight):
                _, _, found = fl.Softmax().value_and_grad(
                    given, places, outputs=("argmax",), sample_weight=skipped, backend="numba", n_threads=1
                )
                of_live = expected if skipped is None else np.where(skipped, expected, 0)
                np.testing.assert_array_equal(found["argmax"], of_live)


@pytest.mark.parametrize("n_threads", [1, 3])
def test_arrays_that_are_put_in_order(n_threads):
    """The kernels read flags, strides and types of arrays themselves."""
    rng = np.random.default_rng(0)
    scores, y = rng.normal(size=(9000, 10)).astype("f"), np.arange(9000) % 10
    expected = fl.Softmax().value_and_grad(scores, y, backend="numba", n_threads=n_threads)
    shifted = np.zeros(scores.nbytes + 1, np.uint8)[1:].view("f").reshape(scores.shape)
    at = np.zeros(y.nbytes + 1, np.uint8)[1:].view(np.int64)
    shifted[...], at[...] = scores, y
    assert not shifted.flags.aligned
    assert not at.flags.aligned
    weights = np.ones(18000)[::2]
    for given, targets in (
        (scores, at), (shifted, y), (scores, np.repeat(y, 2)[::2]), (scores, y.astype(">i8")), (scores, y.astype("u1")),
        (scores, y.astype(np.longlong)), (np.asfortranarray(scores), y), (scores[::-1], y[::-1]),
    ):  # fmt: skip
        found = fl.Softmax().value_and_grad(
            given, targets, sample_weight=weights, backend="numba", n_threads=n_threads
        )  # fmt: skip
        np.testing.assert_allclose(found[0], expected[0], 1e-6)
        np.testing.assert_array_equal(found[1] if given.strides[0] > 0 else found[1][::-1], expected[1])


def test_probabilities_of_another_byte_order():
    expected, given = np.array([[0.25, 0.75]]), np.array([[0.25, 0.75]], ">f8")
    backend = fl.backends.get("numba")
    assert backend.first_unfit(given) == backend.first_unfit(expected) == -1
    assert backend.first_unfit(-given) == 0


def test_threads_that_fell_asleep_are_woken_and_are_dismissed_at_the_end():
    found = subprocess.run(
        [sys.executable, "-c", CALLS + "import time; time.sleep(0.3)" + CALLS], check=True, capture_output=True,
        text=True, timeout=60,
    ).stdout.split()  # fmt: skip
    assert len(found) == 2
    assert found[0] == found[1]


def test_threads_are_shared_by_callers_and_kept():
    rng = np.random.default_rng(0)
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


@pytest.mark.full
@pytest.mark.parametrize(
    "dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, ">i4"], ids=str
)
def test_the_linear_layer_reads_targets_of_any_type(dtype):
    """In their own type, and picked by index with the rows; W, its gradient and the bias in any layout."""
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(150, 37)).astype(np.float32), rng.integers(0, 11, 150)
    weight, rows = rng.uniform(size=150), rng.integers(0, 150, 90)
    weight[::7] = 0
    how = {"sample_weight": weight, "shift": np.full(37, 0.25)}
    ours = fl.LinearObjective(fl.Hinge(), X, y.astype(dtype), backend="numba", n_threads=2, **how)
    its = fl.LinearObjective(fl.Hinge(), X, y, backend="reference", **how)
    W = rng.normal(size=(11, 38)).astype(np.float32)
    wanted = its.value_and_grad(W.astype(np.float64), rows)
    wide = np.zeros((22, 76), np.float32)
    wide[::2, ::2] = W
    for given, out in ((W, np.empty_like(W)), (np.asfortranarray(W), np.empty_like(W, order="F")), (
        wide[::2, ::2], np.empty_like(wide)[::-2, ::-2]
    )):  # fmt: skip
        value, grad = ours.value_and_grad(given, rows, out=out)
        assert grad is out
        np.testing.assert_allclose(value, wanted[0], rtol=1e-5)
        np.testing.assert_allclose(grad, wanted[1], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(ours.value(given, rows), wanted[0], rtol=1e-5)


def test_targets_by_steps_are_read():
    rng = np.random.default_rng(0)
    X, y, W = rng.normal(size=(40, 5)), rng.integers(0, 3, 80), rng.normal(size=(3, 5))
    found = fl.linear_value_and_grad(fl.Softmax(), X, W, y[::2], wrt=("W",), backend="numba")
    wanted = fl.linear_value_and_grad(fl.Softmax(), X, W, y[::2], wrt=("W",), backend="reference")
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-13)
    np.testing.assert_allclose(found[1]["W"], wanted[1]["W"], rtol=1e-11)


if hasattr(os, "sched_setaffinity"):

    def test_a_thread_that_was_woken_may_run_anywhere_again():
        """It is woken on another processor than its waker's; that is over with the call."""
        rng = np.random.default_rng(0)
        X, y = rng.normal(size=(20000, 20)).astype(np.float32), rng.integers(0, 5, 20000)
        objective, W = fl.LinearObjective(fl.Softmax(), X, y, backend="numba", n_threads=2), np.zeros((5, 21), "f4")
        values = []
        for _ in range(4):
            values.append(objective.value(W))
            time.sleep(0.02)  # it falls asleep
        assert len(set(values)) == 1
        assert cpu._helpers
        for helper in cpu._helpers:
            assert os.sched_getaffinity(helper.thread.native_id) == os.sched_getaffinity(0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_penalty_and_its_gradient(dtype, order):
    rng = np.random.default_rng(3)
    W = np.asarray(rng.normal(size=(3, 41)), dtype, order)[:, :-1]
    found, expected = (np.asarray(rng.normal(size=(3, 41)), dtype, order)[:, :-1].copy(order) for _ in range(2))
    expected[...] = found
    value = fl.backends.get("numba").shrink(W, found, 0.3, 2)
    np.testing.assert_allclose(value, fl.backends.get("reference").shrink(W, expected, 0.3, 2), 1e-13)
    np.testing.assert_allclose(found, expected, 1e-6 if dtype == "float32" else 1e-15)


def test_copies_of_a_loss_have_its_options_alone():
    """What calls keep with a loss are addresses, among others."""
    loss, scores, y = fl.Softmax(class_weight=[1.0, 2.0, 3.0]), np.eye(3, dtype="f"), np.arange(3)
    value = loss.value(scores, y, backend="numba")
    for twin in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss), copy.copy(loss)):
        assert twin == loss
        assert vars(twin).keys() == vars(fl.Softmax()).keys()
        assert twin.value(scores, y, backend="numba") == value


def test_a_loss_keeps_few_of_its_calls():
    loss = fl.Softmax()
    for n in range(1, losses.KEPT + 9):
        loss.value(np.zeros((n, 10), "f"), np.zeros(n, int), backend="numba", n_threads=1)
    assert 0 < len(vars(loss)["_kept"]) <= losses.KEPT
