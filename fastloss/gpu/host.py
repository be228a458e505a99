"""Host arrays through the GPU, in chunks of rows: the next chunk is copied there, and the last one back, while one is
computed with. The GPU has two chunks at a time, however many rows there are."""

from __future__ import annotations

import functools
import math
import threading
from typing import Any

import numpy as np

from fastloss._checks import Array
from fastloss.gpu import arrays, device, driver, features, linear, scores
from fastloss.jit import rowmath

#: Bytes of scores, or of features, of a chunk, about (tests make it small).
CHUNK_BYTES = 32 << 20
_lock = threading.Lock()  # the lanes are shared, and so is the GPU's bus


@functools.cache
def _lanes(gpu: int) -> tuple[device.Lane, device.Lane]:
    return device.Lane(), device.Lane()


def _bits(array: Any) -> Any:
    """NumPy copies bfloat16 as what its bits are."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


class _Job:
    """A call: inputs and outputs of all rows, of which lanes take chunks; what goes along with each chunk; and sums,
    of float64, of what all chunks find, in types of their own. Rows of the inputs are those `picked`, if any are."""

    def __init__(
        self, inputs: dict[str, Array], outputs: dict[str, Array], sums: dict[str, tuple[Array, Any]] | None = None,
        along: dict[str, Array] | None = None, picked: Array | None = None,
    ) -> None:  # fmt: skip
        self.inputs, self.outputs, self.sums, self.along = inputs, outputs, sums or {}, along or {}
        self.picked = picked
        self._rows: dict[int, slice] = {}

    def begin(self, lane: device.Lane, rows: slice) -> None:
        """Send a chunk's inputs."""
        self._rows[id(lane)] = rows
        chosen = rows if self.picked is None else self.picked[rows]
        parts = {name: _bits(array)[chosen] for name, array in self.inputs.items()}
        for name, part in (parts | self.along).items():
            lane.host(name, part.size, part.dtype).reshape(part.shape)[...] = part
            lane.send(name, part.size)
        for name, array in self.outputs.items():
            part = _bits(array)[rows]
            lane.host(name, part.size, part.dtype)
        for name, (total, dtype) in self.sums.items():
            lane.host(name, total.size, dtype)

    def end(self, lane: device.Lane) -> None:
        """Ask for a chunk's outputs."""
        rows = self._rows[id(lane)]
        for name, array in self.outputs.items():
            lane.fetch(name, array[rows].size)
        for name, (total, _) in self.sums.items():
            lane.fetch(name, total.size)

    def collect(self, lane: device.Lane) -> None:
        """Wait for a chunk's outputs, and take them."""
        rows = self._rows.pop(id(lane), None)
        if rows is None:
            return
        lane.wait()
        for name, array in self.outputs.items():
            part = _bits(array)[rows]
            part[...] = lane.host(name, part.size, part.dtype).reshape(part.shape)
        for name, (total, dtype) in self.sums.items():
            total += lane.host(name, total.size, dtype).reshape(total.shape)


def _run(job: _Job, n: int, row_bytes: int, launch: Any) -> None:
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    with _lock:
        gpu = device.current_gpu()
        lanes = _lanes(gpu)
        for at, start in enumerate(range(0, n, step)):
            lane = lanes[at % 2]
            job.collect(lane)
            rows = slice(start, min(n, start + step))
            job.begin(lane, rows)
            launch(lane, rows.stop - rows.start, gpu)
            job.end(lane)
        for lane in lanes if n > step and (-(-n // step)) % 2 == 0 else lanes[::-1]:  # in the order of the rows
            job.collect(lane)


def score_rows(
    loss: Any, given: Array, targets: Array, multiplier: Array | None, scale: float, grad: Array | None,
    row_loss: Array | None, extras: dict[str, Array],
) -> float:  # fmt: skip
    """`Backend.score_rows`."""
    n, c = given.shape
    if n == 0:
        return 0.0
    dtype, probabilities = given.dtype.name, targets.ndim == 2
    real = np.dtype(device.REAL[dtype])
    row = rowmath.plan_of(loss, probabilities, z="lse" in extras, entropy="entropy" in extras)
    plan = scores.Plan(row, dtype, "argmax" in extras)
    inputs = {"scores": given, "targets": targets.astype(real, copy=False) if probabilities else targets}
    outputs: dict[str, Array] = {}
    flags = scores.WRITES_VALUE
    if multiplier is not None:
        inputs["weight"] = multiplier.astype(np.float64)
        flags |= scores.WEIGHTED
    if grad is not None:
        outputs["grad"] = grad
        flags |= scores.GRADIENT
    found = {"row_loss": row_loss, "lse": extras.get("lse"), "entropy": extras.get("entropy")}
    wanted = {name: array for name, array in found.items() if array is not None}
    for k, name in enumerate(found):
        if name in wanted:
            flags |= scores.ROW_LOSS << k
    held = np.empty((n, 3), real) if wanted else None
    if held is not None:
        outputs["extras"] = held
    if plan.argmax:
        outputs["argmax"] = index = np.empty(n, np.int64)
        flags |= scores.ARGMAX
    value = np.zeros(1)
    job = _Job(inputs, outputs, {"value": (value, value.dtype)})
    kind = -targets.itemsize if targets.dtype.kind == "u" else targets.itemsize

    def launch(lane: device.Lane, count: int, gpu: int) -> None:
        nothing = functools.partial(driver.nothing, gpu)
        name = real.name
        arguments = scores.Arguments(
            lane.pointer("scores", dtype), lane.pointer("grad", dtype) if grad is not None else nothing(dtype), 0, 0,
            count, c, nothing("uint8") if probabilities else lane.pointer("targets"), 1 if probabilities else kind,
            lane.pointer("targets") if probabilities else nothing(name), driver.options(loss, row, c, dtype, gpu),
            nothing("float64") if multiplier is None else lane.pointer("weight"), nothing(name), nothing("float64"),
            scale, 1.0, lane.pointer("value"), nothing(name),
            lane.pointer("extras") if wanted else nothing(name),
            lane.pointer("argmax") if plan.argmax else nothing("int64"), flags,
        )  # fmt: skip
        scores.launch(plan, arguments, gpu, lane.handle, driver.errors(gpu)[1])

    _run(job, n, c * given.itemsize, launch)
    if held is not None:
        step = max(1, CHUNK_BYTES // (c * given.itemsize))
        for start in range(0, n, step):  # each chunk has its own three vectors
            part = held[start : start + step].reshape(3, -1)
            for k, name in enumerate(found):
                if name in wanted:
                    wanted[name][start : start + step] = part[k]
    if plan.argmax:
        extras["argmax"][...] = index
    return float(value[0])


def transform(kind: str, given: Array, out: Array) -> None:
    """`Backend.transform`."""
    n, c = given.shape
    if n == 0:
        return
    dtype = given.dtype.name
    # log-sum-exp leaves its results where a gradient would be, in the type of the scores.
    result = np.empty(n, given.dtype) if kind == "logsumexp" else out
    plan = scores.Plan(rowmath.Plan(driver.TRANSFORMS[kind]), dtype)
    job = _Job({"scores": given}, {"grad": result})

    def launch(lane: device.Lane, count: int, gpu: int) -> None:
        nothing = functools.partial(driver.nothing, gpu)
        name = device.REAL[dtype]
        arguments = scores.Arguments(
            lane.pointer("scores", dtype), lane.pointer("grad", dtype), 0, 0, count, c, nothing("uint8"), 1,
            nothing(name), nothing(name), nothing("float64"), nothing(name), nothing("float64"), 1.0, 1.0,
            nothing("float64"), nothing(name), nothing(name), nothing("int64"), scores.GRADIENT,
        )  # fmt: skip
        scores.launch(plan, arguments, gpu, lane.handle, driver.errors(gpu)[1])

    _run(job, n, c * given.itemsize, launch)
    if result is not out:
        out[...] = result


class _OfLane(arrays.Library):
    """The GPU's buffers of a lane, as arrays; they are used on its stream."""

    name = "lane"

    def __init__(self, lane: device.Lane, gpu: int) -> None:
        self.lane, self.gpu = lane, gpu

    def stream(self, like: arrays.View) -> int:
        return self.lane.handle

    def array(self, name: str, shape: tuple[int, ...], dtype: str) -> arrays.View:
        """The buffer of that name, in C order."""
        strides = tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))
        kind = dtype if dtype in device.REAL else None
        return arrays.View(None, self.lane.pointer(name, kind), shape, strides, dtype, self.gpu, self)


def fuses(X: Array, W: Array) -> bool:
    """Whether `linear_rows` serves such features (N, D) and weights (C, D)."""
    kind = X.dtype.name
    if not X.dtype.isnative or kind not in (*device.REAL, "uint8") or linear.features_type(kind) != W.dtype.name:
        return False
    c, d = W.shape
    return features.fits(c, d, W.dtype.name)


def linear_rows(
    loss: Any, X: Array, rows: Array | None, centre: Array | None, W: Array, b: Array | None, targets: Array,
    multiplier: Array | None, scale: float, dW: Array | None, db: Array | None, row_loss: Array | None,
) -> float:  # fmt: skip
    """`Backend.linear_rows` for few classes; a chunk's dW and db come back with it, and are added up here."""
    n, (c, d), real = len(X) if rows is None else len(rows), W.shape, W.dtype.name
    shapes = {"W": (c, d), "b": (c,), "centre": (d,), "dW": (c, d), "db": (c,)}
    probabilities = targets.ndim == 2
    inputs = {"X": X, "targets": targets.astype(real, copy=False) if probabilities else targets}
    if multiplier is not None:
        inputs["weight"] = multiplier.astype(np.float64)
    outputs = {} if row_loss is None else {"row_loss": row_loss}
    given = {"W": W, "b": b, "centre": centre}
    found = {"dW": dW, "db": db}
    value = np.zeros(1)
    sums = {name: (np.zeros(shapes[name]), W.dtype) for name, array in found.items() if array is not None}
    along = {name: np.ascontiguousarray(array) for name, array in given.items() if array is not None}
    job = _Job(inputs, outputs, {"value": (value, value.dtype)} | sums, along, rows)

    def launch(lane: device.Lane, count: int, gpu: int) -> None:
        of = _OfLane(lane, gpu)
        there = {name: of.array(name, shapes[name], real) for name in (*along, *sums)}
        y = of.array("targets", (count, *targets.shape[1:]), real if probabilities else targets.dtype.name)
        weights = driver.nothing(gpu, "float64") if multiplier is None else lane.pointer("weight")
        data = linear.Data(
            of.array("X", (count, d), X.dtype.name), None, there.get("centre"), y, count, weights,
            driver.nothing(gpu, "float64"), multiplier is not None,
        )  # fmt: skip
        values = None if row_loss is None else of.array("row_loss", (count,), real)
        wanted = linear.Wanted(of.array("value", (), "float64"), values, there.get("dW"), there.get("db"), None)
        layer = linear.Layer(
            loss, data, there["W"], there.get("b"), linear.PLAIN, wanted, scale, 1.0, False, None, None
        )
        layer.flags |= scores.ROW_LOSS
        layer.run_fused()

    if n:
        _run(job, n, d * X.itemsize, launch)
    for name, (total, _) in sums.items():
        target = found[name]
        assert target is not None
        target[...] = total
    return float(value[0])
