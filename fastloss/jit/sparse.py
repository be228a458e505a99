"""Sparse features: scores of rows of a CSR matrix, and what these rows, or those of its transpose, add to dW.

W, and dW, are (D, C): for each number of a row the weights, or sums, of all classes are side by side. Those of up to
four vectors of classes stay in registers for a row. Threads share scores by rows, and sums by features, so that no two
write the same one and none depends on the number of threads.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, arg-type, untyped-decorator"

from __future__ import annotations

import functools
from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastloss._checks import Array
from fastloss.jit import cpu
from fastloss.jit.vectors import WORD, Emitter, lanes_of

if TYPE_CHECKING:
    from fastloss.sparse import Csr

MOST_VECTORS = 4  # of classes whose sums stay in registers
BLOCK = 512  # numbers of a row whose products are added up on their own: long sums lose less
SEGMENTS, SEGMENT_ROWS = 64, 64  # at most, and at least

#: What a kernel is told of a call: words, at an address.
(
    VALUES, INDICES, STARTS, ENDS, ROWS, FIRST, N, CLASSES, WEIGHTS, BIAS, OUT, BELOW, BOUNDS, SEGMENT, PARTS, TAKEN,
) = range(16)  # fmt: skip
JOB = Struct("=16q")


class Row(NamedTuple):
    """What is done for one row, whole numbers all."""

    values: Any  # where those of the matrix are,
    indices: Any  # and their features
    start: Any  # of the row's,
    stop: Any
    weights: Any  # where W, or dW, has the first class of feature 0
    step: Any  # numbers from a feature to the next
    bias: Any  # where scores start from; for dW, where the row's are
    out: Any  # where scores go
    tail: Any  # classes of the last vector


class _Emitter(Emitter):
    """Vectors of a row's classes, the last of which may have a tail alone."""

    def __init__(self, builder: Any, real: str, index: Any, vectors: int, row: Row) -> None:
        super().__init__(builder, real)
        self.index, self.row, self.tail = index, row, self.first(row.tail)
        self.vectors = range(vectors)

    def at(self, address: Any) -> list[Any]:
        return [self.plus(address, v * self.lanes, self.size) for v in self.vectors]

    def get_all(self, address: Any) -> list[Any]:
        *whole, last = self.at(address)
        return [*map(self.load, whole), self.load_some(last, self.tail, self.vector, self.size)]

    def put_all(self, found: list[Any], address: Any) -> None:
        *whole, last = zip(found, self.at(address), strict=True)
        for value, at in whole:
            self.store(value, at)
        self.store_some(*last, self.tail, self.size)

    def number(self, k: Any) -> tuple[Any, Any]:
        """Number k of the matrix in all lanes, and where W has its feature."""
        size = self.index.width // 8
        feature = self.load(self.plus(self.row.indices, k, size), self.index, size)
        feature = feature if size == 8 else self.b.sext(feature, WORD)
        x = self.splat(self.load(self.plus(self.row.values, k, self.size), self.real))
        return x, self.plus(self.row.weights, self.b.mul(feature, self.row.step), self.size)


def dot(e: _Emitter) -> None:
    """out ← bias + the row times W, in two sums for each class: one would have every product wait for the last."""
    b, row = e.b, e.row
    total, even, odd = (e.sums(len(e.vectors)) for _ in range(3))

    def add(k: Any, sums: list[Any]) -> None:
        x, at = e.number(k)
        for w, place in zip(e.get_all(at), sums, strict=True):
            e.multiply_add(x, w, place)

    for value, place in zip(e.get_all(row.bias), total, strict=True):
        b.store(value, place)
    with e.loop(row.start, row.stop, BLOCK) as k:
        until = e.least(b.add(k, WORD(BLOCK)), row.stop)
        pairs = b.sub(until, b.and_(b.sub(until, k), WORD(1)))
        for place in even + odd:
            b.store(e.vector(None), place)
        with e.loop(k, pairs, 2) as j:
            add(j, even)
            add(b.add(j, WORD(1)), odd)
        with b.if_then(b.icmp_signed("<", pairs, until)):
            add(pairs, even)
        for place, one, other in zip(total, even, odd, strict=True):
            b.store(b.fadd(b.load(place), b.fadd(b.load(one), b.load(other))), place)
    e.put_all([b.load(place) for place in total], row.out)


def outer(e: _Emitter) -> None:
    """dW += what one row adds to it."""
    pulls, sums = e.get_all(e.row.bias), e.sums(len(e.vectors))
    with e.loop(e.row.start, e.row.stop, 1) as k:
        x, at = e.number(k)
        for old, pull, place in zip(e.get_all(at), pulls, sums, strict=True):
            e.b.store(old, place)
            e.multiply_add(x, pull, place)
        e.put_all([e.b.load(place) for place in sums], at)


def rows_kernel(product: Callable[[_Emitter], None], real: str, index: str) -> Any:
    """`dot` for each of some rows, or `outer` for all rows and the features of a part at a time."""
    size, like, lanes = np.dtype(real).itemsize, getattr(np, index)(0), lanes_of(real)
    width, adds, word = like.itemsize, product is outer, np.int64(0)
    whole = MOST_VECTORS * lanes

    def emitted(vectors: int) -> Any:
        @intrinsic
        def one(typing, values, indices, start, stop, weights, step, bias, out, tail):
            def body(context, builder, signature, given):
                product(_Emitter(builder, real, ir.IntType(8 * width), vectors, Row(*given)))
                return context.get_dummy_value()

            return types.void(*[types.intp] * len(Row._fields)), body

        return one

    one, two, three, four = (emitted(k + 1) for k in range(MOST_VECTORS))

    @cpu.helper
    def told(job, which):
        return cpu.get(job + 8 * which, word)

    @cpu.helper
    def first_not_below(indices, at, stop, bound):
        """Of sorted indices, by bisection."""
        while at < stop:
            middle = (at + stop) // 2
            if cpu.get(indices + middle * width, like) < bound:
                at = middle + 1
            else:
                stop = middle
        return at

    @numba.cfunc(types.void(types.intp, types.intp), error_model="numpy")
    def kernel(job, worker):
        values, indices, starts, ends = told(job, VALUES), told(job, INDICES), told(job, STARTS), told(job, ENDS)
        rows, classes, parts, below = told(job, ROWS), told(job, CLASSES), told(job, PARTS), told(job, BELOW)
        mode = cpu.set_rounding_of_tiny(np.int32(-1)) if adds else np.int32(0)
        part = cpu.take(job + 8 * TAKEN)
        while part < parts:
            first, last = 0, told(job, N)
            if not adds:
                first, last = part * told(job, SEGMENT), min(last, (part + 1) * told(job, SEGMENT))
            for i in range(first, last):
                row = cpu.get(rows + 8 * i, word) if rows else told(job, FIRST) + i
                start, stop = np.int64(cpu.get(starts + row * width, like)), np.int64(cpu.get(ends + row * width, like))
                if adds and parts > 1:
                    start = first_not_below(indices, start, stop, cpu.get(told(job, BOUNDS) + 8 * part, word))
                    stop = first_not_below(indices, start, stop, cpu.get(told(job, BOUNDS) + 8 * part + 8, word))
                elif below >= 0:
                    stop = first_not_below(indices, start, stop, below)
                    cpu.put(starts + row * width, type(like)(stop))
                for c in range(0, classes, whole):
                    out = told(job, OUT) + (i * classes + c) * size
                    bias = told(job, BIAS) + c * size if told(job, BIAS) else out
                    weights, left = told(job, WEIGHTS) + c * size, classes - c
                    if left <= lanes:
                        one(values, indices, start, stop, weights, classes, bias, out, left)
                    elif left <= 2 * lanes:
                        two(values, indices, start, stop, weights, classes, bias, out, left - lanes)
                    elif left <= 3 * lanes:
                        three(values, indices, start, stop, weights, classes, bias, out, left - 2 * lanes)
                    else:
                        four(values, indices, start, stop, weights, classes, bias, out, min(lanes, left - 3 * lanes))
            part = cpu.take(job + 8 * TAKEN)
        if adds:
            cpu.set_rounding_of_tiny(mode)

    return cpu.Kernel(kernel)


compiled = functools.cache(cpu.made)


def _run(
    product: Callable[[_Emitter], None], X: Csr, starts: Array, at: Any, n: int, weights: Array, skipped: int,
    bias: Array | None, out: Array, below: int, bounds: Array | None, n_threads: int,
) -> None:  # fmt: skip
    """Of arrays in C order; the first row of `weights` is for feature number `skipped`."""
    rows = None if isinstance(at, slice) else np.ascontiguousarray(at, np.int64)
    segment = max(-(-n // SEGMENTS), SEGMENT_ROWS)
    parts = -(-n // segment) if bounds is None else len(bounds) - 1
    job: Any = np.empty(JOB.size, np.uint8)
    address, classes = cpu.address, weights.shape[1]
    JOB.pack_into(
        job, 0, address(X.values), address(X.indices), address(starts), address(X.starts) + X.starts.itemsize,
        address(rows), at.start if rows is None else 0, n, classes,
        address(weights) - skipped * classes * weights.itemsize, address(bias), address(out), below, address(bounds),
        segment, parts, 0,
    )  # fmt: skip
    kernel = compiled(rows_kernel, product, weights.dtype.name, X.indices.dtype.name)
    cpu.run_kernel(kernel, address(job), max(1, min(n_threads, parts)))


def csr_scores(X: Csr, at: Any, W: Array, b: Array, scores: Array, n_threads: int) -> None:
    """`Backend.csr_scores`."""
    _run(dot, X, X.starts, at, len(scores), W, 0, b, scores, -1, None, n_threads)


def csr_accumulate(X: Csr, at: Any, scores: Array, dW: Array, n_threads: int) -> None:
    """`Backend.csr_accumulate`."""
    _run(outer, X, X.starts, at, len(scores), dW, 0, None, scores, -1, X.shares(n_threads), n_threads)


def csc_accumulate(XT: Csr, at: Array, rows: slice, scores: Array, dW: Array, n_threads: int) -> None:
    """`Backend.csc_accumulate`: each row of the transpose, times the scores of some rows."""
    below = rows.stop if rows.stop < XT.shape[1] else -1
    bias = np.zeros(dW.shape[1], dW.dtype) if rows.start == 0 else None
    _run(dot, XT, at, slice(0, len(dW)), len(dW), scores, rows.start, bias, dW, below, None, n_threads)
