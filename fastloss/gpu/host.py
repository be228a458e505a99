"""Host arrays through the GPU, in chunks of rows: the next chunk is copied there, and the last one back, while one is
computed with. The GPU has two chunks at a time, however many rows there are."""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np

from fastloss._checks import Array
from fastloss.gpu import device, driver, scores
from fastloss.jit import rowmath

#: Bytes of scores of a chunk, about (tests make it small).
CHUNK_BYTES = 32 << 20
_lock = threading.Lock()  # the lanes are shared, and so is the GPU's bus


@functools.cache
def _lanes(gpu: int) -> tuple[device.Lane, device.Lane]:
    return device.Lane(), device.Lane()


def _bits(array: Any) -> Any:
    """NumPy copies bfloat16 as what its bits are."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


class _Job:
    """A call: the inputs and outputs of all rows, of which lanes take chunks."""

    def __init__(self, plan: scores.Plan, inputs: dict[str, Array], outputs: dict[str, Array]) -> None:
        self.plan, self.inputs, self.outputs = plan, inputs, outputs
        self.total = 0.0
        self._rows: dict[int, slice] = {}

    def begin(self, lane: device.Lane, rows: slice) -> None:
        """Send a chunk's inputs."""
        self._rows[id(lane)] = rows
        for name, array in self.inputs.items():
            part = _bits(array)[rows]
            lane.host(name, part.size, part.dtype).reshape(part.shape)[...] = part
            lane.send(name, part.size)
        for name, array in self.outputs.items():
            part = _bits(array)[rows]
            lane.host(name, part.size, part.dtype)
        lane.host("value", 1, np.float64)

    def end(self, lane: device.Lane, has_value: bool) -> None:
        """Ask for a chunk's outputs."""
        rows = self._rows[id(lane)]
        for name, array in self.outputs.items():
            lane.fetch(name, array[rows].size)
        if has_value:
            lane.fetch("value", 1)

    def collect(self, lane: device.Lane, has_value: bool) -> None:
        """Wait for a chunk's outputs, and take them."""
        rows = self._rows.pop(id(lane), None)
        if rows is None:
            return
        lane.wait()
        for name, array in self.outputs.items():
            part = _bits(array)[rows]
            part[...] = lane.host(name, part.size, part.dtype).reshape(part.shape)
        if has_value:
            self.total += float(lane.host("value", 1, np.float64)[0])


def _run(job: _Job, n: int, row_bytes: int, has_value: bool, launch: Any) -> float:
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    with _lock:
        gpu = device.current_gpu()
        lanes = _lanes(gpu)
        for at, start in enumerate(range(0, n, step)):
            lane = lanes[at % 2]
            job.collect(lane, has_value)
            rows = slice(start, min(n, start + step))
            job.begin(lane, rows)
            launch(lane, rows.stop - rows.start, gpu)
            job.end(lane, has_value)
        for lane in lanes if n > step and (-(-n // step)) % 2 == 0 else lanes[::-1]:  # in the order of the rows
            job.collect(lane, has_value)
    return job.total


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
    job = _Job(plan, inputs, outputs)
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

    total = _run(job, n, given.strides[0] and c * given.itemsize, True, launch)
    if held is not None:
        step = max(1, CHUNK_BYTES // (c * given.itemsize))
        for start in range(0, n, step):  # each chunk has its own three vectors
            part = held[start : start + step].reshape(3, -1)
            for k, name in enumerate(found):
                if name in wanted:
                    wanted[name][start : start + step] = part[k]
    if plan.argmax:
        extras["argmax"][...] = index
    return total


def transform(kind: str, given: Array, out: Array) -> None:
    """`Backend.transform`."""
    n, c = given.shape
    if n == 0:
        return
    dtype = given.dtype.name
    # log-sum-exp leaves its results where a gradient would be, in the type of the scores.
    result = np.empty(n, given.dtype) if kind == "logsumexp" else out
    plan = scores.Plan(rowmath.Plan(driver.TRANSFORMS[kind]), dtype)
    job = _Job(plan, {"scores": given}, {"grad": result})

    def launch(lane: device.Lane, count: int, gpu: int) -> None:
        nothing = functools.partial(driver.nothing, gpu)
        name = device.REAL[dtype]
        arguments = scores.Arguments(
            lane.pointer("scores", dtype), lane.pointer("grad", dtype), 0, 0, count, c, nothing("uint8"), 1,
            nothing(name), nothing(name), nothing("float64"), nothing(name), nothing("float64"), 1.0, 1.0,
            nothing("float64"), nothing(name), nothing(name), nothing("int64"), scores.GRADIENT,
        )  # fmt: skip
        scores.launch(plan, arguments, gpu, lane.handle, driver.errors(gpu)[1])

    _run(job, n, c * given.itemsize, False, launch)
    if result is not out:
        out[...] = result
