"""Row losses of given scores: groups of rows, each read from memory once.

Rows of many classes are walked along where they are; what the gradient needs is kept in its place. Few classes go
through a transposed tile. `walks` has both, in vectors; here are the kernels around them. A large gradient that is not
in place is held in scratch, a group of rows at a time, and goes to memory past the caches: a store to memory that is
not in cache would read it first. Rows whose classes are not contiguous are copied, a group at a time.

Rows are split into segments by the shape alone, and each has its sum: the same bits for any number of threads. Each
thread has a part of the segments, the same from call to call, so that its rows are still in its core's cache, and
helps the others when it is done. Rows of multiplier 0 are not read, or what comes of them is replaced by 0.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# mypy: disable-error-code="arg-type, untyped-decorator, var-annotated"

from __future__ import annotations

import functools
from collections.abc import Callable
from struct import Struct
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastloss._checks import Array
from fastloss.jit import cpu, rowmath, vectors
from fastloss.jit.checks import outside_counter
from fastloss.jit.rowmath import Plan
from fastloss.jit.vectors import LINE, WORD, Emitter, Stored
from fastloss.jit.walks import AT_ONCE, ENTROPY, FACTOR, LOSS, SLOTS, TABLE, TILE, WEIGHT, WORK, Group, Walk, Z

FEW = 3  # vectors of classes up to which rows are tiled: shorter rows would leave lanes empty (C = 33: half the speed)
GROUP_ROWS = 32  # of a rowed group, at most,
GROUP_BYTES = 24 << 10  # and what they take
SEGMENTS = 64  # at most,
SEGMENT_BYTES = 16 << 10  # of scores each at least
STREAM_BYTES = 1 << 25  # of a gradient: above, it would push all else out of the caches


def options_of(loss: Any, classes: int, plan: Plan, real: Any) -> np.ndarray[Any, Any]:
    """All options of a loss as the kernels take them: numbers, then class weights or margins of class pairs."""
    numbers, real = rowmath.numbers_of(loss, classes, real), np.dtype(real)
    table = rowmath.table_of(loss, classes, plan)
    return numbers if table is None else np.concatenate([numbers, table.astype(real)])


# --- parts of kernels, in vectors -----------------------------------------------------------------------------------
# Their arguments are whole numbers, addresses among them; steps are in bytes.
def rowed_walk(plan: Plan, stored: str, real: str, wants_gradient: bool) -> Any:
    """The walks over a group of rows."""

    @intrinsic
    def rowed(
        typing, n, c, targets, work, table, more, more_step, rows, rows_step, kept, kept_step, grads, grads_step,
        kept_vectors, ahead,
    ):  # fmt: skip
        def body(context, builder, signature, given):
            group = Group(*given, None, None)
            Walk(Emitter(builder, real), plan, stored, wants_gradient, True, group).rowed()
            return context.get_dummy_value()

        return types.void(*[types.intp] * 15), body

    return rowed


def tiled_walk(plan: Plan, real: str, wants_gradient: bool, skips: bool) -> Any:
    """The walks over a tile of rows: gradients take the place of scores."""

    @intrinsic
    def tiled(typing, n, c, targets, work, table, more, more_step, tile, tile_step):
        def body(context, builder, signature, given):
            group = Group(*given[:7], *[None] * 8, *given[7:])
            Walk(Emitter(builder, real), plan, real, wants_gradient, skips, group).tiled()
            return context.get_dummy_value()

        return types.void(*[types.intp] * 9), body

    return tiled


def transposer(stored_name: str, real: str, is_gather: bool) -> Any:
    """Rows of contiguous numbers to a tile, or back; the number of rows is a multiple of a vector's lanes."""

    @intrinsic
    def transposed(typing, rows, step, n, c, tile, tile_step):
        def body(context, builder, signature, given):
            rows, step, n, c, tile, tile_step = given
            e = Emitter(builder, real)
            stored, pieces = Stored(e, stored_name), 16 // e.size

            def part(g: Any, k: Any, columns: int) -> None:
                at = builder.add(rows, builder.add(builder.mul(g, step), builder.mul(k, WORD(stored.size))))
                places = [
                    e.plus(builder.add(tile, builder.mul(builder.add(k, WORD(i)), tile_step)), g, e.size)
                    for i in range(columns)
                ]
                if is_gather:
                    for vector, place in zip(stored.gather(at, step, columns), places, strict=True):
                        e.store(vector, place)
                else:
                    stored.scatter([e.load(place) for place in places], at, step)

            left = builder.srem(c, WORD(pieces))
            whole = builder.sub(c, left)
            with e.loop(WORD(0), n, e.lanes) as g:
                with e.loop(WORD(0), whole, pieces) as k:
                    part(g, k, pieces)
                for columns in range(1, pieces):
                    with builder.if_then(builder.icmp_signed("==", left, WORD(columns))):
                        part(g, whole, columns)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), body

    return transposed


def weigher(real: str) -> Any:
    """What n rows weigh, from their multipliers (address 0: all 1); lanes past them weigh nothing."""

    @intrinsic
    def weigh(typing, n, multiplier, scale, work):
        def body(context, builder, signature, given):
            n, multiplier, scale, work = given
            e = Emitter(builder, real)
            factor = e.splat(builder.fptrunc(scale, e.real) if e.size == 4 else scale)
            with e.loop(WORD(0), n, e.lanes) as g:
                some = e.first(builder.sub(n, g))
                place = cgutils.alloca_once(builder, e.vector)
                builder.store(builder.select(some, e.lift(1, e.vector), e.lift(0, e.vector)), place)
                with builder.if_then(builder.icmp_signed("!=", multiplier, WORD(0))):
                    builder.store(e.load_some(e.plus(multiplier, g, e.size), some, e.vector, e.size), place)
                weight = builder.load(place)
                e.store(weight, e.plus(work, builder.add(g, WORD(WEIGHT)), e.size))
                e.store(builder.fmul(weight, factor), e.plus(work, builder.add(g, WORD(FACTOR)), e.size))
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, types.float64, types.intp), body

    return weigh


def adder(real: str) -> Any:
    """Adds weight · loss of n rows to sums at `totals`, a float64 for each lane."""

    @intrinsic
    def add(typing, n, work, totals):
        def body(context, builder, signature, given):
            n, work, totals = given
            e = Emitter(builder, real)
            doubles = ir.VectorType(ir.DoubleType(), e.lanes)

            def wide(which: int, g: Any) -> Any:
                found = e.load(e.plus(work, builder.add(g, WORD(which)), e.size))
                return builder.fpext(found, doubles) if e.size == 4 else found

            with e.loop(WORD(0), n, e.lanes) as g:
                product = builder.fmul(wide(WEIGHT, g), wide(LOSS, g))
                e.store(builder.fadd(e.load(totals, doubles, 8), product), totals, 8)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 3), body

    return add


def streamer(size: int) -> Any:
    """Copies n numbers of a size past the caches; `to` is a multiple of the size."""

    @intrinsic
    def stream(typing, to, source, n):
        def body(context, builder, signature, given):
            to, source, n = given
            e = Emitter(builder, "float32")
            number, line = ir.IntType(8 * size), ir.VectorType(ir.IntType(64), LINE // 8)
            mark = builder.module.add_metadata([ir.IntType(32)(1)])

            def copy(first: Any, stop: Any) -> None:
                with e.loop(first, stop, 1) as k:
                    e.store(e.load(e.plus(source, k, size), number, size), e.plus(to, k, size), size)

            head = builder.sdiv(builder.and_(builder.neg(to), WORD(LINE - 1)), WORD(size))
            head = e.least(head, n)
            lines = builder.sdiv(builder.sub(n, head), WORD(LINE // size))
            rest = builder.add(head, builder.mul(lines, WORD(LINE // size)))
            copy(WORD(0), head)
            with e.loop(head, rest, LINE // size) as k:
                place = builder.inttoptr(e.plus(to, k, size), line.as_pointer())
                builder.store(e.load(e.plus(source, k, size), line, size), place, align=LINE).set_metadata(
                    "nontemporal", mark
                )
            copy(rest, n)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 3), body

    return stream


@intrinsic
def end_streams(typing):
    """Before another thread may look."""

    def body(context, builder, signature, given):
        if cpu.X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse.sfence"), [])
        return context.get_dummy_value()

    return types.void(), body


# --- the largest class ----------------------------------------------------------------------------------------------
def tiled_largest(e: Emitter, at: Any, step: Any, n: Any, c: Any, work: Any, found: Any) -> None:
    """Of each row of a tile."""
    builder, none = e.b, vectors.Value(e, e.lift(0, e.integers))
    words = ir.VectorType(WORD, e.lanes)
    with e.loop(WORD(0), n, e.lanes) as g:
        top, place = e.sums(1, -np.inf)[0], cgutils.alloca_once(builder, e.integers)
        builder.store(none.v, place)

        def score(k: Any) -> vectors.Value:
            return vectors.Value(e, e.load(e.plus(builder.add(at, builder.mul(k, step)), g, e.size)))

        def look(classes: list[Any]) -> None:
            for k in classes:
                e.set(top, e.larger(e.get(top), score(k)))

        def search(classes: list[Any]) -> None:
            for k in classes:
                k = builder.sub(builder.sub(c, WORD(1)), k)  # from the last on
                x, here = score(k), vectors.Value(e, e.splat(e.lane(k)))
                before = vectors.Value(e, builder.load(place))
                builder.store(e.choose((x == e.get(top)) | (x != x), here, before).v, place)

        e.each(WORD(0), c, 2, look)
        e.each(WORD(0), c, 2, search)
        is_dead = vectors.Value(e, e.load(e.plus(work, builder.add(g, WORD(WEIGHT)), e.size))) == 0
        lanes = e.choose(is_dead, none, vectors.Value(e, builder.load(place))).v
        lanes = lanes if e.size == 8 else builder.sext(lanes, words)
        e.store_some(lanes, e.plus(found, g, 8), e.first(builder.sub(n, g)), 8)


def rowed_largest(e: Emitter, stored: Stored, at: Any, step: Any, n: Any, c: Any, work: Any, found: Any) -> None:
    """Of each row of contiguous numbers."""
    builder = e.b
    whole, left = builder.sdiv(c, WORD(e.lanes)), builder.srem(c, WORD(e.lanes))
    end, has_end = e.first(left), builder.icmp_signed(">", left, WORD(0))
    with e.loop(WORD(0), n, 1) as r:
        source, place = builder.add(at, builder.mul(r, step)), cgutils.alloca_once(builder, WORD)

        def score(k: Any, mask: Any = None, source: Any = source) -> vectors.Value:
            return vectors.Value(e, stored.load(e.plus(source, k, e.lanes * stored.size), mask))

        def look(vectors_: list[Any]) -> None:
            for top, k in zip(tops, vectors_, strict=False):
                e.set(top, e.larger(e.get(top), score(k)))

        tops = e.sums(AT_ONCE, -np.inf)
        e.each(WORD(0), whole, AT_ONCE, look)
        with builder.if_then(has_end):
            x = e.choose(vectors.Value(e, end), score(whole, end), e.value(-np.inf))
            e.set(tops[0], e.larger(e.get(tops[0]), x))
        top = functools.reduce(e.larger, map(e.get, tops))
        lanes = e.lanes
        while lanes > 1:  # each lane with that half as far again
            lanes //= 2
            top = e.larger(top, vectors.Value(e, e.shuffle(top.v, top.v, [k ^ lanes for k in range(e.lanes)])))

        def search(is_here: Callable[[vectors.Value], vectors.Value]) -> None:
            """The first that is here, in blocks: none is looked at after that which has it."""

            def within(some: list[Any], mask: Any = None) -> None:
                with builder.if_then(builder.icmp_signed("<", builder.load(place), WORD(0))):
                    bits = WORD(0)
                    for k, vector in enumerate(some):
                        here = is_here(score(vector, mask))
                        if mask is not None:
                            here = here & vectors.Value(e, mask)
                        part = builder.zext(builder.bitcast(here.v, ir.IntType(e.lanes)), WORD)
                        bits = builder.or_(bits, builder.shl(part, WORD(k * e.lanes)))
                    with builder.if_then(builder.icmp_unsigned("!=", bits, WORD(0))):
                        first = builder.cttz(bits, ir.IntType(1)(1))
                        builder.store(builder.add(builder.mul(some[0], WORD(e.lanes)), first), place)

            e.each(WORD(0), whole, AT_ONCE, within)
            with builder.if_then(has_end):
                within([whole], end)

        builder.store(WORD(0), place)
        weight = e.load(e.plus(work, builder.add(r, WORD(WEIGHT)), e.size), e.real)
        with builder.if_then(builder.fcmp_unordered("!=", weight, e.lift(0, e.real))):
            builder.store(WORD(-1), place)
            one = builder.extract_element(top.v, ir.IntType(32)(0))
            with builder.if_else(builder.fcmp_ordered("==", one, one), likely=True) as (usual, unusual):
                with usual:
                    search(lambda x: x == top)
                with unusual:
                    search(lambda x: x != x)
        e.store(builder.load(place), e.plus(found, r, 8), 8)


def largest_kernel(dtype: str, real: str, tiled: bool) -> Any:
    """The lowest class that has a row's maximum, or the first NaN, for n rows that are given at an address, in either
    layout: whole numbers of 64 bits at another; 0 for rows of weight 0 in `work`."""

    @intrinsic
    def emitted(typing, at, step, n, c, work, found):
        def body(context, builder, signature, given):
            e = Emitter(builder, real)
            if tiled:
                tiled_largest(e, *given)
            else:
                rowed_largest(e, Stored(e, dtype), *given)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), body

    @numba.cfunc(types.void(*[types.intp] * 6), error_model="numpy")
    def find(at, step, n, c, work, found):
        emitted(at, step, n, c, work, found)

    return find


# --- the kernel -----------------------------------------------------------------------------------------------------
#: What a kernel is told of a call: words, at an address. Arrays are `cpu.reference`s.
(
    SCORES, ROW_STEP, COLUMN_STEP, GRADS, GRADS_ROW_STEP, GRADS_COLUMN_STEP, TARGETS, MULTIPLIER, LOSSES, LOSSES_STEP,
    Z_AT, ENTROPY_AT, LARGEST, Q, OPTIONS, STREAMS, SHAPE, SCALE,
) = range(18)  # fmt: skip
#: After them, for each thread, a line with the number of segments of its part that are taken.
PARTS = 3 * LINE
#: Words that follow from the shape, made once, at the address SHAPE. Places are after the job's.
(
    SEGMENT, SEGMENTS_AT, ROWS, CLASSES, GROUP, SUMS_AT, SCRATCH, SCRATCH_STEP, WORKERS, KERNEL, BYTES, ITEMSIZE, REAL,
    PROBABILITIES, IS_LARGE, FINDER,
) = range(16)  # fmt: skip
HEADER = 2 * LINE  # of a thread's scratch: sums of losses, a float64 for each lane


def rows_kernel(plan: Plan, dtype: str, tiled: bool, wants_gradient: bool) -> Any:
    """The work of one thread: segments of rows of scores of a type."""
    stored = cpu.storage(dtype)
    real = stored.real
    name = np.dtype(real).name
    load, save, like = stored.load, stored.save, stored.like(0)
    itemsize, size = np.dtype(stored.like).itemsize, np.dtype(real).itemsize
    number, word, double = real(0), np.int64(0), np.float64(0)
    lanes = vectors.lanes_of(name)
    probabilities, pairs, is_real = plan.probabilities, plan.pairs, dtype == name
    weigh, add = weigher(name), adder(name)
    if tiled:
        walk = tiled_walk(plan, name, wants_gradient, True)
        gather, scatter = transposer(dtype, name, True), transposer(dtype, name, False)
        gather_real = gather if is_real else transposer(name, name, True)
    else:
        walk, stream = rowed_walk(plan, dtype, name, wants_gradient), streamer(itemsize)

    @cpu.helper
    def told(job, which):
        return cpu.get(job + 8 * which, word)

    @cpu.helper
    def array(job, which):
        return cpu.numbers_of(told(job, which))

    @cpu.helper
    def find(job, i, at, step, n, c, work):
        # While they are scores, and in the cache.
        largest = array(job, LARGEST)
        if largest:
            cpu.call_address(told(told(job, SHAPE), FINDER), at, step, n, c, work, largest + 8 * i)

    @cpu.helper
    def tiled_group(job, i, n, c, most, scratch):
        work, tile = scratch, scratch + WORK * size
        more = tile + c * TILE * size
        rows, row_step, column_step = array(job, SCORES), told(job, ROW_STEP), told(job, COLUMN_STEP)
        rows += i * row_step
        targets, options, step = array(job, TARGETS) + 8 * i, array(job, OPTIONS), TILE * size
        whole = n // lanes * lanes
        some = whole if column_step == itemsize else 0
        gather(rows, row_step, some, c, tile, step)
        for k in range(c):
            for r in range(some, n):
                x = load(cpu.get(rows + r * row_step + k * column_step, like))
                cpu.put(tile + k * step + r * size, x)
        if probabilities:
            q = array(job, Q) + i * c * size
            gather_real(q, c * size, whole, c, more, step)
            for k in range(c):
                for r in range(whole, n):
                    cpu.put(more + k * step + r * size, cpu.get(q + (r * c + k) * size, number))
        elif pairs:
            for r in range(n):
                y = cpu.get(targets + 8 * r, word)
                y = y if 0 <= y < c else 0  # an ignored target may be no class
                for k in range(c):
                    margin = cpu.get(options + (TABLE + y * c + k) * size, number)
                    cpu.put(more + k * step + r * size, margin)
        find(job, i, tile, step, n, c, work)
        walk(n, c, targets, work, options, more, step, tile, step)
        if wants_gradient:
            rows, row_step, column_step = array(job, GRADS), told(job, GRADS_ROW_STEP), told(job, GRADS_COLUMN_STEP)
            rows += i * row_step
            some = whole if column_step == itemsize else 0
            scatter(rows, row_step, some, c, tile, step)
            for k in range(c):
                for r in range(some, n):
                    x = cpu.get(tile + k * step + r * size, number)
                    cpu.put(rows + r * row_step + k * column_step, save(x))

    @cpu.helper
    def rowed_group(job, i, n, c, most, scratch):
        work, kept_vectors = scratch, scratch + WORK * size
        held = kept_vectors + SLOTS * TILE * lanes * size  # gradients that are not written where they belong at once
        copied = held + most * c * size  # scores that are not contiguous,
        kept = copied + most * c * size  # and what is kept if gradients are not of the compute type
        rows, row_step, column_step = array(job, SCORES), told(job, ROW_STEP), told(job, COLUMN_STEP)
        targets, options = array(job, TARGETS) + 8 * i, array(job, OPTIONS)
        rows += i * row_step
        ahead = most * row_step
        if column_step != itemsize:
            for k in range(c):
                for r in range(n):
                    cpu.put(copied + (r * c + k) * itemsize, cpu.get(rows + r * row_step + k * column_step, like))
            rows, row_step, ahead = copied, c * itemsize, 0
        grads, grads_step, kept_step = array(job, GRADS), told(job, GRADS_ROW_STEP), c * size
        grads += i * grads_step
        to, to_step, is_held = grads, grads_step, told(job, STREAMS) or told(job, GRADS_COLUMN_STEP) != itemsize
        if is_held:
            to, to_step = held, c * itemsize
        if is_real:
            kept, kept_step = to, to_step
        more = array(job, Q) + i * c * size if probabilities else 0
        find(job, i, rows, row_step, n, c, work)
        walk(
            n, c, targets, work, options, more, c * size, rows, row_step, kept, kept_step, to, to_step, kept_vectors,
            ahead,
        )  # fmt: skip
        if wants_gradient and is_held:
            if told(job, STREAMS):
                stream(grads, held, n * c)
            else:
                column_step = told(job, GRADS_COLUMN_STEP)
                for k in range(c):
                    for r in range(n):
                        x = cpu.get(held + (r * c + k) * itemsize, like)
                        cpu.put(grads + r * grads_step + k * column_step, x)

    group = tiled_group if tiled else rowed_group

    @cpu.helper
    def give(to, step, work, which, n):
        for r in range(n):
            cpu.put(to + r * step, cpu.get(work + (which + r) * size, number))

    @numba.cfunc(types.void(types.intp, types.intp), error_model="numpy")
    def kernel(job, worker):
        mode = cpu.set_rounding_of_tiny(np.int32(-1))
        shape = told(job, SHAPE)
        n_rows, c, segment, most = told(shape, ROWS), told(shape, CLASSES), told(shape, SEGMENT), told(shape, GROUP)
        scratch = job + told(shape, SCRATCH) + worker * told(shape, SCRATCH_STEP)
        totals, work = scratch, scratch + HEADER
        scale, multiplier = cpu.get(job + 8 * SCALE, double), array(job, MULTIPLIER)
        workers, segments, sums = told(shape, WORKERS), told(shape, SEGMENTS_AT), job + told(shape, SUMS_AT)
        losses, z, entropy = array(job, LOSSES), array(job, Z_AT), array(job, ENTROPY_AT)
        for turn in range(workers):
            part = (worker + turn) % workers
            first, end = part * segments // workers, (part + 1) * segments // workers
            s = first + cpu.take(job + PARTS + part * LINE)
            while s < end:
                i, stop = s * segment, min(n_rows, (s + 1) * segment)
                for k in range(lanes):
                    cpu.put(totals + 8 * k, double)
                while i < stop:
                    n = min(most, stop - i)
                    weigh(n, multiplier + i * size if multiplier else 0, scale, work)
                    group(job, i, n, c, most, work)
                    add(n, work, totals)
                    if losses:
                        step = told(job, LOSSES_STEP)
                        give(losses + i * step, step, work, LOSS, n)
                    if z:
                        give(z + i * size, size, work, Z, n)
                    if entropy:
                        give(entropy + i * size, size, work, ENTROPY, n)
                    i += n
                total = double
                for k in range(lanes):
                    total += cpu.get(totals + 8 * k, double)
                cpu.put(sums + 8 * s, total)
                s = first + cpu.take(job + PARTS + part * LINE)
        if told(job, STREAMS):
            end_streams()
        cpu.set_rounding_of_tiny(mode)

    return cpu.Kernel(kernel)


INT64 = np.dtype(np.int64)


def starter() -> Any:
    """What Python calls: writes down what the kernels are told, and if no memory for that is given, where one thread is
    enough, runs them too. Returns Σ multiplier · ℓ; None, and does nothing, if arrays must be put in order before.
    Where labels is not −1, targets must be below it, and nothing has been checked but dimensions: None, too, if the
    call is not in order (`Backend.plain_rows`), or not so simple that this is clear.
    """
    # In LLVM's language: each function of ours would take Numba 25 ms, and the first result waits for all.
    kinds = [types.intp, *[cpu.OBJECT] * 9]

    @intrinsic
    def fit(typing, shape, options, scores, targets, multiplier, grad, losses, z, entropy, largest):
        def body(context, builder, signature, given):
            shape, _, scores, targets, multiplier = given[:5]
            e = Emitter(builder, "float64")
            real, probabilities = (e.load(e.plus(shape, which, 8), WORD, 8) for which in (REAL, PROBABILITIES))
            of_targets = builder.select(builder.icmp_signed("!=", probabilities, WORD(0)), real, WORD(id(INT64)))
            found = [
                cpu.is_fit(builder, array, kind, shape)
                for array, kind in ((scores, None), (targets, of_targets), (multiplier, real))
            ]
            return functools.reduce(builder.and_, found)

        return types.boolean(*kinds), body

    @intrinsic
    def tell(typing, shape, options, scores, targets, multiplier, grad, losses, z, entropy, largest, scale, job):
        def body(context, builder, signature, given):
            shape, options, scores, targets, multiplier, grad, losses, z, entropy, largest, scale, job = given
            e = Emitter(builder, "float64")

            def of_shape(which: int) -> Any:
                return e.load(e.plus(shape, which, 8), WORD, 8)

            def stride(array: Any, axis: int) -> Any:
                return cpu.stride_of(builder, array, axis, shape)

            def numbers(array: Any) -> Any:
                return cpu.of_array(builder, array, cpu.HEAD, shape)

            def is_same(a: Any, b: Any) -> Any:
                return builder.icmp_signed("==", a, b)

            itemsize, row = of_shape(ITEMSIZE), builder.mul(of_shape(CLASSES), of_shape(ITEMSIZE))
            column_step = builder.select(is_same(grad, WORD(0)), itemsize, stride(grad, 1))
            is_dense = builder.and_(is_same(stride(grad, 0), row), is_same(column_step, itemsize))
            streams = builder.and_(is_dense, builder.icmp_signed("!=", numbers(grad), numbers(scores)))
            has_index = is_same(of_shape(PROBABILITIES), WORD(0))
            words = {
                SCORES: scores, ROW_STEP: stride(scores, 0), COLUMN_STEP: stride(scores, 1), GRADS: grad,
                GRADS_ROW_STEP: stride(grad, 0), GRADS_COLUMN_STEP: column_step,
                TARGETS: builder.select(has_index, targets, WORD(0)), MULTIPLIER: multiplier, LOSSES: losses,
                LOSSES_STEP: stride(losses, 0), Z_AT: z, ENTROPY_AT: entropy, LARGEST: largest,
                Q: builder.select(has_index, WORD(0), targets), OPTIONS: options,
                STREAMS: builder.select(streams, of_shape(IS_LARGE), WORD(0)), SHAPE: shape, SCALE: scale,
            }  # fmt: skip
            for which, word in words.items():
                e.store(word, e.plus(job, which, 8), 8)
            with e.loop(WORD(0), of_shape(WORKERS), 1) as k:
                e.store(WORD(0), builder.add(e.plus(job, k, LINE), WORD(PARTS)), 8)
            return context.get_dummy_value()

        return types.void(*kinds, types.float64, types.intp), body

    @intrinsic
    def numbers_of(typing, array):
        def body(context, builder, signature, given):
            return Emitter(builder, "float64").load(builder.add(given[0], WORD(cpu.HEAD)), WORD, 8)

        return types.intp(cpu.OBJECT), body

    @intrinsic
    def is_plain(typing, shape, scores, targets, grad):
        def body(context, builder, signature, given):
            shape, scores, targets, grad = given
            e = Emitter(builder, "float64")
            n, c, itemsize = (e.load(e.plus(shape, which, 8), WORD, 8) for which in (ROWS, CLASSES, ITEMSIZE))
            length = builder.mul(builder.mul(n, c), itemsize)
            kind = cpu.type_of(builder, scores, shape)

            def is_size(array: Any, axis: int, size: Any) -> Any:
                return builder.icmp_signed("==", cpu.size_of(builder, array, axis, shape), size)

            def ends_before(a: Any, length: Any, b: Any) -> Any:
                first, second = (cpu.of_array(builder, array, cpu.HEAD, shape) for array in (a, b))
                return builder.icmp_unsigned("<=", builder.add(first, length), second)

            def are_apart(a: Any, a_length: Any, b: Any, b_length: Any) -> Any:
                return builder.or_(ends_before(a, a_length, b), ends_before(b, b_length, a))

            apart = builder.and_(
                cpu.is_fit(builder, scores, kind, shape), are_apart(grad, length, scores, length)
            )  # fmt: skip
            of_grad = [
                cpu.is_fit(builder, grad, kind, shape, writeable=True), is_size(grad, 0, n), is_size(grad, 1, c),
                are_apart(grad, length, targets, builder.mul(n, WORD(8))),
                builder.or_(builder.icmp_signed("==", grad, scores), apart),
            ]  # fmt: skip
            is_none = builder.icmp_signed("==", grad, WORD(0))
            fits = builder.or_(is_none, functools.reduce(builder.and_, of_grad))
            return builder.and_(fits, is_size(targets, 0, n))

        return types.boolean(types.intp, *[cpu.OBJECT] * 3), body

    word, double, are_outside = np.int64(0), np.float64(0), outside_counter("int64")

    @numba.njit(
        types.Optional(types.float64)(*kinds, types.float64, types.intp, types.boolean, types.intp), nogil=True,
        error_model="numpy", no_cfunc_wrapper=True,
    )  # fmt: skip
    def start(
        shape, options, scores, targets, multiplier, grad, losses, z, entropy, largest, scale, at, in_order, labels
    ):
        if not in_order and not fit(shape, options, scores, targets, multiplier, grad, losses, z, entropy, largest):
            return None
        if labels >= 0 and not is_plain(shape, scores, targets, grad):
            return None
        if labels >= 0 and are_outside(numbers_of(targets), cpu.get(shape + 8 * ROWS, word), labels, 0):
            return None
        memory = 0 if at else cpu.reserve(cpu.get(shape + 8 * BYTES, word))
        if at == memory:
            raise MemoryError
        job = at if at else (memory + LINE - 1) // LINE * LINE
        tell(shape, options, scores, targets, multiplier, grad, losses, z, entropy, largest, scale, job)
        total = 0.0
        if not at:
            cpu.call_address(cpu.get(shape + 8 * KERNEL, word), job, 0)
            sums = job + cpu.get(shape + 8 * SUMS_AT, word)
            for k in range(cpu.get(shape + 8 * SEGMENTS_AT, word)):
                total += cpu.get(sums + 8 * k, double)
            cpu.release(memory)
        return total

    return cpu.entry(start)


# --- from Python ----------------------------------------------------------------------------------------------------
PARALLEL = 1 << 15  # numbers for each thread, at least
NO_TARGETS = np.empty(0, np.int64)


@functools.cache  # a type's name alone takes NumPy as long as a part of a small call
def reads(dtype: np.dtype[Any]) -> bool:
    """Whether there are kernels for scores of a type."""
    return dtype.isnative and dtype.name in ("float32", "float64", "float16", "bfloat16")


class Types(NamedTuple):
    """What follows from the type of scores."""

    name: str
    itemsize: int
    real: Any  # the compute type
    size: int
    lanes: int

    @classmethod
    @functools.cache  # a type's name alone takes NumPy as long as a small call may take
    def of(cls, dtype: np.dtype[Any]) -> Types:
        real = np.dtype(np.float64 if dtype == np.float64 else np.float32)
        return cls(dtype.name, dtype.itemsize, real, real.itemsize, vectors.lanes_of(real.name))


class Call(NamedTuple):
    """What follows from a plan, the type and shape of scores, and the number of threads."""

    start: Any  # `starter`
    kernel: cpu.Kernel
    probabilities: bool
    real: Any  # the compute type
    shape: Array  # words for the kernel,
    shape_at: int
    sums_at: int
    sums: Struct
    bytes: int
    workers: int


@functools.lru_cache(1024)
def call_of(
    plan: Plan, dtype: np.dtype[Any], n: int, c: int, wants_gradient: bool, n_threads: int, finds_largest: bool = False
) -> Call:
    name, itemsize, real, size, lanes = Types.of(dtype)
    tiled = c <= FEW * lanes
    kernel: cpu.Kernel = cpu.made(rows_kernel, plan, name, tiled, wants_gradient)
    finder = cpu.made(largest_kernel, name, real.name, tiled).address if finds_largest else 0
    group = TILE if tiled else max(1, min(GROUP_ROWS, GROUP_BYTES // (c * size)))
    segments = max(1, min(SEGMENTS, -(-n * c * size // SEGMENT_BYTES)))
    segment = max(1, -(-n // segments))
    if tiled:
        segment = -(-segment // TILE) * TILE
    segments = -(-n // segment)
    workers = max(1, min(n_threads, segments, n * c // PARALLEL))
    step = HEADER + WORK * size
    if tiled:
        step += (2 if plan.probabilities or plan.pairs else 1) * c * TILE * size
    else:
        step += SLOTS * TILE * lanes * size + 3 * group * c * size
    step = -(-step // LINE) * LINE
    sums = PARTS + workers * LINE
    scratch = -(-(sums + segments * 8) // LINE) * LINE
    memory, is_large = scratch + workers * step + LINE, not tiled and n * c * itemsize > STREAM_BYTES
    shape = np.array([
        segment, segments, n, c, group, sums, scratch, step, workers, kernel.address, memory, itemsize, id(real),
        plan.probabilities, is_large, finder,
    ])  # fmt: skip
    return Call(
        cpu.made(starter), kernel, plan.probabilities, real, shape, cpu.address(shape), sums, Struct(f"={segments}d"),
        memory, workers,
    )  # fmt: skip


def prepared(
    loss: Any, classes: int, real: Any, probabilities: bool, z: bool = False, entropy: bool = False
) -> tuple[Plan, Array]:
    """The plan of a loss, and its options: made once."""

    def make() -> tuple[Plan, Array]:
        plan = rowmath.plan_of(loss, probabilities, z, entropy, whole=True)
        return plan, options_of(loss, classes, plan, real)

    found: tuple[Plan, Array] = loss.once(("plan", classes, real, probabilities, z, entropy), make)
    return found


def call_for(loss: Any, *key: Any) -> tuple[Call, Array]:
    """The call of a loss, and its options, for scores of a type and shape: what `score_rows` asks for, in order."""
    dtype, (n, c), probabilities, wants_gradient, z, entropy, largest, n_threads = key
    plan, table = prepared(loss, c, Types.of(dtype).real, probabilities, z, entropy)
    found: tuple[Call, Array] = loss.once(
        key, lambda: (call_of(plan, dtype, n, c, wants_gradient, n_threads, largest), table)
    )
    return found


def run(
    of: Call, table: Array, scores: Array, targets: Array, multiplier: Array | None, scale: float,
    grad: Array | None, losses: Array | None, z: Array | None, entropy: Array | None, largest: Array | None = None,
) -> float:  # fmt: skip
    """A plan on all rows; Σ multiplier · ℓ. Targets are probabilities if the plan has them."""
    memory, at, given = None, 0, (multiplier, grad, losses, z, entropy, largest, scale)
    if of.workers > 1:  # they are given the job from here
        memory = np.empty(of.bytes, np.uint8)
        at = -(-cpu.address(memory) // LINE) * LINE
    value: float | None = of.start(of.shape_at, table, scores, targets, *given, at, False, -1)
    if value is None:
        targets = cpu.in_order(targets, of.real if of.probabilities else INT64)
        scores = scores if scores.flags.aligned else scores.copy()
        given = (None if multiplier is None else cpu.in_order(multiplier, of.real), *given[1:])
        value = of.start(of.shape_at, table, scores, targets, *given, at, True, -1)
    if memory is not None:
        cpu.run_kernel(of.kernel, at, of.workers)
        value = sum(of.sums.unpack_from(memory, at - cpu.address(memory) + of.sums_at), 0.0)
    return value


def raw(array: Array) -> Array:
    """16-bit floats as the integers that their bits are, which Numba has; other numbers as they are."""
    return array.view(np.uint16) if array.itemsize == 2 else array


def score_rows(
    loss: Any, scores: Array, targets: Array, multiplier: Array | None, scale: float, grad: Array | None,
    row_loss: Array | None, extras: dict[str, Array], n_threads: int,
) -> float:  # fmt: skip
    """`Backend.score_rows`."""
    z, entropy, largest = extras.get("lse"), extras.get("entropy"), extras.get("argmax")
    key = (
        scores.dtype, scores.shape, targets.ndim == 2, grad is not None, z is not None, entropy is not None,
        largest is not None, n_threads,
    )  # fmt: skip
    kept = loss.__dict__.get("_kept")  # by `Loss.once`; to ask it with a function takes a small call too long
    of, table = (kept is not None and kept.get(key)) or call_for(loss, *key)
    return run(of, table, scores, targets, multiplier, scale, grad, row_loss, z, entropy, largest)


def plain_rows(
    loss: Any, scores: Array, targets: Array, grad: Array | None, mean: bool, n_threads: int
) -> float | None:
    """`Backend.plain_rows`, for calls like one that has been: an error must not wait for a compiler."""
    kept = loss.__dict__.get("_kept")
    found = kept and kept.get((scores.dtype, scores.shape, False, grad is not None, False, False, False, n_threads))
    if not found or found[0].workers > 1 or not scores.size:
        return None
    of, table = found
    n, c = scores.shape
    value: float | None = of.start(
        of.shape_at, table, scores, targets, None, grad, None, None, None, None, 1 / n if mean else 1.0, 0, False,
        loss.labels(c),
    )  # fmt: skip
    return value / n if mean and value is not None else value


TRANSFORMS = {
    "softmax": Plan("p"), "log_softmax": Plan("log p"), "logsumexp": Plan("lse"), "sigmoid": Plan("sigmoid")
}  # fmt: skip


NO_OPTIONS = {real: np.zeros(8, real) for real in (np.dtype(np.float32), np.dtype(np.float64))}


def transform(kind: str, scores: Array, out: Array, n_threads: int) -> None:
    """`Backend.transform`."""
    if not scores.size:
        out[...] = 0
        return
    real = Types.of(scores.dtype).real
    grad, losses = (None, out) if kind == "logsumexp" else (out, None)
    if losses is not None and losses.dtype != real:
        losses = np.empty(len(scores), real)
    of = call_of(TRANSFORMS[kind], scores.dtype, *scores.shape, grad is not None, n_threads)
    run(of, NO_OPTIONS[real], scores, NO_TARGETS, None, 1.0, grad, losses, None, None)
    if losses is not None and losses is not out:
        out[...] = losses


def shard_sums(loss: Any, scores: Array, weights: Array, n_threads: int) -> tuple[Array, Array, Array]:
    """Of some of the classes: each row's largest score, Σ exp(d) but for one that has it, and Σ w (−d)."""
    real = np.float64 if scores.dtype == np.float64 else np.float32
    tops, rest, away = np.full(len(scores), -np.inf, real), *np.zeros((2, len(scores)), real)
    if scores.size:
        plan = rowmath.plan_of(loss, False, shard=True)
        table = rowmath.shard_options(loss, plan, 1.0, weights, real)
        of = call_of(plan, scores.dtype, *scores.shape, False, n_threads)
        run(of, table, scores, NO_TARGETS, None, 1.0, None, away, tops, rest)
    return tops, rest, away


# --- gradients from stats --------------------------------------------------------------------------------------------
def from_stats_kernel(plan: Plan, dtype: str) -> Any:
    """The gradient for some of the classes, from the stats of all."""
    stored = cpu.storage(dtype)
    row = rowmath.build(plan, cpu.helper, cpu.tools(stored.real))
    entry, load, save, like, zero = row.from_stats, stored.load, stored.save, stored.like(0), stored.real(0)
    weights = plan.weights
    number = getattr(types, np.dtype(stored.real).name)
    numbers, words = types.Array(number, 1, "C"), types.Array(types.int64, 1, "C")

    @numba.njit(
        types.void(
            types.Array(stored.kind, 2, "A", readonly=True), words, numbers, numbers, numbers, numbers,
            types.Array(stored.kind, 2, "A"), numbers, types.intp, types.intp,
        ),
        nogil=True, error_model="numpy",
    )  # fmt: skip
    def kernel(scores, column, top, pull, at_target, weight, grad, table, first, last):
        mode = cpu.set_rounding_of_tiny(np.int32(-1))
        options = (table[0], table[1], table[2], table[3], table[4], table[5], table[6], table[7])
        c, step, out_step = scores.shape[1], scores.strides[1], grad.strides[1]
        for i in range(first, last):
            source, to = scores.ctypes.data + i * scores.strides[0], grad.ctypes.data + i * grad.strides[0]
            m, share = top[i], weight[i] * options[rowmath.PER_TEMPERATURE]
            factor = pull[i] * share
            if weight[i] == zero:
                for j in range(c):
                    cpu.put(to + j * out_step, save(zero))
            elif step == scores.itemsize and out_step == step:
                row, out = cpu.numbers_at(source, c, like), cpu.numbers_at(to, c, like)
                for j in range(c):
                    w = table[TABLE + j] if weights else zero
                    out[j] = save(entry(load(row[j]), w, m, factor, share, options))
            else:
                for j in range(c):
                    w, x = table[TABLE + j] if weights else zero, load(cpu.get(source + j * step, like))
                    cpu.put(to + j * out_step, save(entry(x, w, m, factor, share, options)))
            if column[i] >= 0 and weight[i] != zero:
                cpu.put(to + column[i] * out_step, save(at_target[i] * weight[i]))
        cpu.set_rounding_of_tiny(mode)

    return kernel


def gradient_from_stats(
    loss: Any, scores: Array, column: Array, top: Array, pull: Array, at_target: Array, weight: Array, share: float,
    weights: Array, grad: Array, n_threads: int,
) -> None:  # fmt: skip
    """The gradient of a shard: each row's column of the target (−1: none), maximum times T, factor of exponentials,
    entry at the target, and multiplier; and u of the other classes, as `rowmath.shard_options` takes it.
    """
    plan = rowmath.plan_of(loss, False, shard=True)
    kernel = cpu.made(from_stats_kernel, plan, scores.dtype.name)
    numbers = raw(scores if scores.flags.aligned else scores.copy())
    table = rowmath.shard_options(loss, plan, share, weights, top.dtype)
    given = column, top, pull, at_target, weight, raw(grad), table
    threads = min(n_threads, scores.size // PARALLEL)
    cpu.run(lambda first, last: kernel(numbers, *given, first, last), len(scores), threads)
