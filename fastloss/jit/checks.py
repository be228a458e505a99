"""Passes over targets: checks, and what each row counts. Vectors look first; only a block with a fault is searched."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, arg-type, untyped-decorator"

from __future__ import annotations

import functools
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


def outside_kernel(dtype: str) -> Any:
    """The position of the first index outside [0, stop) that is not `ignored`; −1: none."""
    kind = getattr(types, dtype)

    size = kind.bitwidth // 8

    @intrinsic
    def count(typing, indices, n, stop, ignored):
        def body(context, builder, signature, given):
            at, n, stop, ignored = given
            e = Emitter(builder, "float64" if size == 8 else "float32")
            truths = ir.VectorType(BIT, e.lanes)
            limit = e.splat(e.lane(e.least(stop, WORD(2 ** (8 * size - 1) - 1))))
            passed = e.splat(e.lane(ignored))  # where the type is too small for it, it is given as 0, which is inside
            place = cgutils.alloca_once(builder, truths)
            builder.store(truths(None), place)

            def look(vectors: list[Any]) -> None:
                for k in vectors:
                    x = e.load(e.plus(at, k, e.lanes * size), e.integers, size)
                    # A negative one is large without its sign.
                    out = builder.icmp_unsigned(">=", x, limit)
                    bad = builder.and_(out, builder.icmp_signed("!=", x, passed))
                    builder.store(builder.or_(builder.load(place), bad), place)

            whole = builder.sdiv(n, WORD(e.lanes))
            e.each(WORD(0), whole, 4, look)
            some = builder.bitcast(builder.load(place), ir.IntType(e.lanes))
            total = cgutils.alloca_once(builder, BIT)
            builder.store(builder.icmp_unsigned("!=", some, some.type(0)), total)
            with e.loop(builder.mul(whole, WORD(e.lanes)), n, 1) as k:
                x = e.load(e.plus(at, k, size), e.integer, size)
                x = e.word(x)
                bad = builder.and_(builder.icmp_unsigned(">=", x, stop), builder.icmp_signed("!=", x, ignored))
                builder.store(builder.or_(builder.load(total), bad), total)
            return builder.load(total)

        return types.boolean(types.intp, types.int64, types.int64, types.int64), body

    @numba.njit(
        types.int64(types.Array(kind, 1, "C", readonly=True), types.int64, types.int64), nogil=True,
        error_model="numpy",
    )  # fmt: skip
    def first_outside(indices, stop, ignored):
        for a in range(0, indices.size, BLOCK):
            if count(indices.ctypes.data + a * size, min(BLOCK, indices.size - a), stop, ignored):
                for i in range(a, min(a + BLOCK, indices.size)):
                    x = np.int64(indices[i])
                    if (x < 0 or x >= stop) and x != ignored:
                        return i
        return -1

    return first_outside


def unfit_kernel(dtype: str) -> Any:
    """The position of the first number that is not in [0, most]; −1: there is none."""
    kind = getattr(types, dtype)

    @cpu.reducer
    def count(numbers, most):
        bad = 0
        for x in numbers:
            bad += not (x >= 0 and x <= most)
        return bad

    @numba.njit(types.int64(types.Array(kind, 1, "C", readonly=True), kind), nogil=True, error_model="numpy")
    def first_unfit(numbers, most):
        for a in range(0, numbers.size, BLOCK):
            if count(numbers[a : a + BLOCK], most):
                for i in range(a, min(a + BLOCK, numbers.size)):
                    if not (numbers[i] >= 0 and numbers[i] <= most):
                        return i
        return -1

    return first_unfit


def weigh_kernel(dtype: str) -> Any:
    """What each row counts: its largest, and the sum of the rounded."""
    real, number = getattr(np, dtype), getattr(types, dtype)
    doubles = types.Array(types.float64, 1, "C", readonly=True)

    @numba.njit(
        types.UniTuple(types.float64, 2)(
            types.Array(types.int64, 1, "C", readonly=True), doubles, types.boolean, types.int64, doubles,
            types.Array(number, 1, "C"),
        ),
        nogil=True, error_model="numpy",
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

    return weigh


NONE = np.empty(0)
#: By what is quick to look up: a type's name takes NumPy longer than the check of a small call.
INDICES = {np.dtype(np.int64): "int64", np.dtype(np.int32): "int32"}
compiled_check = functools.cache(cpu.made)


def first_outside(indices: Array, stop: int, ignored: int | None) -> int | None:
    """`Backend.first_outside`; None for arrays that are not served here."""
    name = INDICES.get(indices.dtype)
    flags = indices.flags
    if name is None or not (flags.c_contiguous and flags.aligned):
        return None
    if stop < 1:
        return None
    bits = 8 * indices.itemsize - 1
    if ignored is None or not -(2**bits) <= ignored < 2**bits:
        ignored = 0  # which is inside
    position: int = compiled_check(outside_kernel, name)(indices, stop, ignored)
    return position


def first_unfit(numbers: Array, most: float) -> int | None:
    """`Backend.first_unfit`; None for arrays that are not served here."""
    if numbers.dtype.name not in ("float64", "float32") or not (numbers.flags.c_contiguous and numbers.flags.aligned):
        return None
    finite = min(most, float(np.finfo(numbers.dtype).max))
    position: int = cpu.made(unfit_kernel, numbers.dtype.name)(numbers.reshape(-1), numbers.dtype.type(finite))
    return position


def weigh(
    targets: Array, class_weight: Array | None, ignored: int | None, sample_weight: Array | None, dtype: np.dtype[Any]
) -> tuple[Array, float, float]:
    """`Backend.weigh`, for class weights or targets that are ignored."""
    multiplier = np.empty(len(targets), dtype)
    limits = np.iinfo(targets.dtype)
    ignores = ignored is not None and limits.min <= ignored <= limits.max
    top, total = cpu.made(weigh_kernel, dtype.name)(
        np.require(targets, np.int64, ["C", "A"]),
        NONE if class_weight is None else np.require(class_weight, np.float64, ["C", "A"]),
        ignores, np.array(ignored, targets.dtype).astype(np.int64)[()] if ignores else 0,
        NONE if sample_weight is None else np.require(sample_weight, np.float64, ["C", "A"]), multiplier,
    )  # fmt: skip
    return multiplier, top, total
