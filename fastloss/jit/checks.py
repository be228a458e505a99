"""Passes over targets: checks, and what each row counts. Vectors look first; only a block with a fault is searched."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, arg-type, untyped-decorator"

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastloss._checks import Array
from fastloss.jit import cpu
from fastloss.jit.vectors import BIT, WORD, Emitter

BLOCK = 4096
PARALLEL = 1 << 18  # numbers for each thread, at least


def any_of(
    e: Emitter, at: Any, n: Any, size: int, of_vector: Callable[[Any], Any], of_number: Callable[[Any], Any]
) -> Any:
    """Whether any of n numbers from an address on is what one function tells of a vector, the other of one number."""
    builder = e.b
    truths = ir.VectorType(BIT, e.lanes)
    found = cgutils.alloca_once(builder, truths)
    builder.store(truths(None), found)

    def look(vectors: list[Any]) -> None:
        for k in vectors:
            bad = of_vector(e.plus(at, k, e.lanes * size))
            builder.store(builder.or_(builder.load(found), bad), found)

    whole = builder.sdiv(n, WORD(e.lanes))
    e.each(WORD(0), whole, 4, look)
    some = builder.bitcast(builder.load(found), ir.IntType(e.lanes))
    total = cgutils.alloca_once(builder, BIT)
    builder.store(builder.icmp_unsigned("!=", some, some.type(0)), total)
    with e.loop(builder.mul(whole, WORD(e.lanes)), n, 1) as k:
        builder.store(builder.or_(builder.load(total), of_number(e.plus(at, k, size))), total)
    return builder.load(total)


def outside_counter(dtype: str) -> Any:
    """Whether one of n indices from an address on is outside [0, stop) and not `ignored`."""
    size = getattr(types, dtype).bitwidth // 8

    @intrinsic
    def count(typing, indices, n, stop, ignored):
        def body(context, builder, signature, given):
            at, n, stop, ignored = given
            e = Emitter(builder, "float64" if size == 8 else "float32")
            limit = e.splat(e.lane(e.least(stop, WORD(2 ** (8 * size - 1) - 1))))
            passed = e.splat(e.lane(ignored))  # where the type is too small for it, it is given as 0, which is inside

            def look(x: Any, limit: Any, passed: Any) -> Any:
                # A negative one is large without its sign.
                return builder.and_(builder.icmp_unsigned(">=", x, limit), builder.icmp_signed("!=", x, passed))

            return any_of(
                e, at, n, size,
                lambda place: look(e.load(place, e.integers, size), limit, passed),
                lambda place: look(e.word(e.load(place, e.integer, size)), stop, ignored),
            )  # fmt: skip

        return types.boolean(types.intp, types.int64, types.int64, types.int64), body

    return count


def outside_kernel(dtype: str) -> Any:
    """The position of the first index outside [0, stop) that is not `ignored`; −1: none."""
    kind, count = getattr(types, dtype), outside_counter(dtype)
    size = kind.bitwidth // 8

    @numba.njit(
        types.int64(types.Array(kind, 1, "C", readonly=True), types.int64, types.int64), nogil=True,
        error_model="numpy", no_cfunc_wrapper=True,
    )  # fmt: skip
    def first_outside(indices, stop, ignored):
        for a in range(0, indices.size, BLOCK):
            if count(indices.ctypes.data + a * size, min(BLOCK, indices.size - a), stop, ignored):
                for i in range(a, min(a + BLOCK, indices.size)):
                    x = np.int64(indices[i])
                    if (x < 0 or x >= stop) and x != ignored:
                        return i
        return -1

    return cpu.entry(first_outside)


def unfit_search(dtype: str) -> Any:
    """The position of the first of n numbers from an address on that is not in [0, most]; −1: there is none."""
    kind, zero = getattr(types, dtype), getattr(np, dtype)(0)
    size = kind.bitwidth // 8

    @intrinsic
    def are_unfit(typing, numbers, n, most):
        def body(context, builder, signature, given):
            at, n, most = given
            e = Emitter(builder, dtype)
            limit, zero = e.splat(most), e.lift(0, e.vector)

            def look(x: Any, zero: Any, limit: Any) -> Any:
                below = builder.fcmp_unordered("<", x, zero)  # NaN is, too
                return builder.or_(below, builder.fcmp_unordered(">", x, limit))

            return any_of(
                e, at, n, size,
                lambda place: look(e.load(place), zero, limit),
                lambda place: look(e.load(place, e.real), e.lift(0, e.real), most),
            )  # fmt: skip

        return types.boolean(types.intp, types.int64, kind), body

    @cpu.helper
    def search(at, n, most):
        for a in range(0, n, BLOCK):
            if are_unfit(at + a * size, min(BLOCK, n - a), most):
                for i in range(a, min(a + BLOCK, n)):
                    x = cpu.get(at + i * size, zero)
                    if not (x >= 0 and x <= most):
                        return i
        return -1

    return search


def unfit_kernel(dtype: str) -> Any:
    """The same of an array, from Python."""
    kind, search = getattr(types, dtype), cpu.made(unfit_search, dtype)

    @numba.njit(
        types.int64(types.Array(kind, 1, "C", readonly=True), kind), nogil=True, error_model="numpy",
        no_cfunc_wrapper=True,
    )  # fmt: skip
    def first_unfit(numbers, most):
        return search(numbers.ctypes.data, numbers.size, most)

    return cpu.entry(first_unfit)


#: What threads are told that look together: words, `most` the bits of a float64. After them is what each part has.
NUMBERS, COUNT, N_PARTS, TAKEN, MOST, FOUND = range(6)


def unfit_parts_kernel(dtype: str) -> Any:
    """The work of one thread: parts of an array; of each that position in the array, its length if there is none."""
    real, search, word, double = getattr(np, dtype), cpu.made(unfit_search, dtype), np.int64(0), np.float64(0)
    size = np.dtype(real).itemsize

    @numba.cfunc(types.void(types.intp, types.intp), error_model="numpy")
    def look(job, worker):
        numbers, n, parts = cpu.get(job, word), cpu.get(job + 8 * COUNT, word), cpu.get(job + 8 * N_PARTS, word)
        most = real(cpu.get(job + 8 * MOST, double))
        part = cpu.take(job + 8 * TAKEN)
        while part < parts:
            first, stop = part * n // parts, (part + 1) * n // parts
            position = search(numbers + first * size, stop - first, most)
            cpu.put(job + 8 * (FOUND + part), first + position if position >= 0 else n)
            part = cpu.take(job + 8 * TAKEN)

    return cpu.Kernel(look)


def weigh_kernel(dtype: str) -> Any:
    """What each row counts: its largest, and the sum of the rounded."""
    real, number = getattr(np, dtype), getattr(types, dtype)
    doubles = types.Array(types.float64, 1, "C", readonly=True)

    @numba.njit(
        types.UniTuple(types.float64, 2)(
            types.Array(types.int64, 1, "C", readonly=True), doubles, types.boolean, types.int64, doubles,
            types.Array(number, 1, "C"),
        ),
        nogil=True, error_model="numpy", no_cfunc_wrapper=True,
    )  # fmt: skip
    def weigh(targets, class_weight, ignores, ignored, sample_weight, multiplier):
        top, total = 0.0, 0.0
        for i in range(multiplier.size):
            w = sample_weight[i] if sample_weight.size else 1.0
            if ignores and targets[i] == ignored:
                w = 0.0
            if class_weight.size and w != 0.0:
                w *= class_weight[targets[i]]
            multiplier[i] = real(w)
            top = max(top, w)
            total += np.float64(multiplier[i])
        return top, total

    return cpu.entry(weigh)


NONE = np.empty(0)
INT64, FLOAT64 = np.dtype(np.int64), np.dtype(np.float64)
#: By what is quick to look up: a type's name takes NumPy longer than the check of a small call.
INDICES = {INT64: "int64", np.dtype(np.int32): "int32"}
FLOATS = {np.dtype(kind): (kind, float(np.finfo(kind).max)) for kind in ("float64", "float32")}
compiled_check = functools.cache(cpu.made)


def first_outside(indices: Array, stop: int, ignored: int | None) -> int | None:
    """`Backend.first_outside`; None for arrays that are not served here."""
    name = INDICES.get(indices.dtype)
    if name is None or not (flags := indices.flags).c_contiguous or not flags.aligned or stop < 1:
        return None
    if ignored is None or not holds(indices.dtype, ignored):
        ignored = 0  # which is inside
    position: int = compiled_check(outside_kernel, name)(indices, stop, ignored)
    return position


def holds(dtype: np.dtype[Any], number: int) -> bool:
    """Whether a whole number is one of a type."""
    bits = 8 * dtype.itemsize
    return 0 <= number < 1 << bits if dtype.kind == "u" else -(1 << bits - 1) <= number < 1 << bits - 1


def first_unfit(numbers: Array, n_threads: int, most: float) -> int | None:
    """`Backend.first_unfit`; None for arrays that are not served here."""
    name, largest = FLOATS.get(numbers.dtype, ("", 0.0))
    if not name or not (flags := numbers.flags).c_contiguous or not flags.aligned:
        return None
    n, most = numbers.size, min(most, largest)
    threads = min(n_threads, n // PARALLEL)
    if threads <= 1:
        position: int = compiled_check(unfit_kernel, name)(numbers.reshape(-1), most)
        return position
    job = np.zeros(FOUND + cpu.SHARES * threads, np.int64)
    job[:FOUND] = cpu.address(numbers), n, len(job) - FOUND, 0, np.float64(most).view(np.int64)
    cpu.run_kernel(compiled_check(unfit_parts_kernel, name), cpu.address(job), threads)
    first = int(job[FOUND:].min())
    return first if first < n else -1


def weigh(
    targets: Array, class_weight: Array | None, ignored: int | None, sample_weight: Array | None, dtype: np.dtype[Any]
) -> tuple[Array, float, float]:
    """`Backend.weigh`, for class weights or targets that are ignored."""
    multiplier = np.empty(len(targets), dtype)
    if ignored is not None and not holds(targets.dtype, ignored):
        ignored = None
    elif ignored is not None and ignored >= 1 << 63:  # kernels read 64 bits as a number with a sign
        ignored -= 1 << 64
    top, total = compiled_check(weigh_kernel, dtype.name)(
        cpu.in_order(targets, INT64), NONE if class_weight is None else cpu.in_order(class_weight, FLOAT64),
        ignored is not None, ignored or 0, NONE if sample_weight is None else cpu.in_order(sample_weight, FLOAT64),
        multiplier,
    )  # fmt: skip
    return multiplier, top, total


def shrink_kernel(dtype: str) -> Any:
    """grad += q W, both (C, D); the sum of the squares of W."""
    real, number = getattr(np, dtype), getattr(types, dtype)
    size = np.dtype(real).itemsize
    zero = real(0)

    @cpu.helper
    def grown(g, q, w):
        """Rounded once where the processor can, whatever the layout."""
        return g + q * w

    @cpu.reducer
    def along(W, grad, q):
        total = np.float64(0)
        for j in range(W.size):
            total += np.float64(W[j]) * np.float64(W[j])
            grad[j] = grown(grad[j], q, W[j])
        return total

    @numba.njit(
        types.float64(types.Array(number, 2, "A", readonly=True), types.Array(number, 2, "A"), number), nogil=True,
        error_model="numpy",
    )  # fmt: skip
    def shrink(W, grad, q):
        mode = cpu.set_rounding_of_tiny(np.int32(-1))
        total = 0.0
        for c in range(W.shape[0]):
            if W.strides[1] == size and grad.strides[1] == size:
                total += along(
                    cpu.numbers_at(W.ctypes.data + c * W.strides[0], W.shape[1], zero),
                    cpu.numbers_at(grad.ctypes.data + c * grad.strides[0], W.shape[1], zero), q,
                )  # fmt: skip
            else:
                for j in range(W.shape[1]):
                    total += np.float64(W[c, j]) * np.float64(W[c, j])
                    grad[c, j] = grown(grad[c, j], q, W[c, j])
        cpu.set_rounding_of_tiny(mode)
        return total

    return shrink


REALS = {np.dtype(np.float32): "float32", FLOAT64: "float64"}


def shrink(W: Array, grad: Array, q: float) -> float | None:
    """`Backend.shrink`; None for arrays that are not served here."""
    name = REALS.get(W.dtype)
    if name is None or grad.dtype != W.dtype or not (W.flags.aligned and grad.flags.aligned):
        return None
    total: float = compiled_check(shrink_kernel, name)(W, grad, q)
    return total
