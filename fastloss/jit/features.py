"""The fused linear layer of few classes: scores, row losses and dW for a tile of rows while it is in the cache.

For each tile of rows: scores against W in panels (`products.dot`), the row losses (`walks`) with the gradient in
place, class by class with the rows side by side, then dW in panels (`products.outer`). Rows are read from memory once,
where they are and of the type that they have; only rows whose numbers are not contiguous are copied, a tile at a time.
Rows of multiplier 0 are not in a tile at all.

Rows are split into segments by the shape alone; each sums dW, db and the loss on its own, and the sums are added in
order: the same bits for any number of threads.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from struct import Struct
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types

from fastloss._checks import Array
from fastloss.jit import cpu, products, rowmath, scores, vectors, walks
from fastloss.jit.vectors import LINE
from fastloss.jit.walks import FACTOR, LOSS, TABLE, WEIGHT, WORK

FEW_CLASSES = 64
PANEL_BYTES = 1 << 20  # of W: above, the sums of all segments would take over 64 MB
SEGMENTS = 64  # at most,
SEGMENT_ROWS = 64  # each at least,
PARTIAL_BYTES = 16 << 20  # and all segments' sums, at most, unless they are so few:
FEW_SEGMENTS = 16
MOST_ROWS = 64  # of a tile,
LEAST_ROWS = 16
TILE_BYTES = 64 << 10  # and what they take, unless they are the least
SMALL = 1 << 19  # multiplications for each thread, at least

TYPES = ("float32", "float64", "float16", "bfloat16", "uint8")


def can_fuse(X: Array, W: Array) -> bool:
    """Whether the fused pass serves a layer."""
    return len(W) <= FEW_CLASSES and W.nbytes <= PANEL_BYTES and serves(X.dtype) and X.flags.aligned


@functools.cache  # the name alone takes NumPy as long as a part of a small call
def serves(dtype: np.dtype[Any]) -> bool:
    """Whether there are products for such features."""
    return dtype.name in TYPES and dtype.isnative


class Block(NamedTuple):
    """Some classes of a product."""

    first: int
    classes: int


def split_classes(classes: int, most: int) -> list[Block]:
    """Blocks of at most that many classes, as even as can be."""
    count = -(-classes // most)
    bounds = [k * (classes // count) + min(k, classes % count) for k in range(count + 1)] if count else [0]
    return [Block(a, b - a) for a, b in itertools.pairwise(bounds)]


def product(which: Callable[..., None], kind: products.Kind, classes: int) -> Any:
    """A compiled product."""
    return cpu.made(products.compiled, which, kind, classes)


@functools.cache
def table(which: Callable[..., None], kind: products.Kind, classes: int, most: int, panel: int) -> Array:
    """A product of all classes, by blocks of at most so many: for each, the address of its product, its first class,
    where its panel begins, its number of classes. `panel`: numbers of a row of W, filled up.
    """
    rows = [
        (product(which, kind, b.classes).address, b.first, b.first * panel, b.classes)
        for b in split_classes(classes, most)
    ]
    return np.array(rows, np.int64).reshape(-1, 4)


class Layout(NamedTuple):
    """What follows from the shape of W, and from what is asked for: all but the number of rows."""

    dots: Array  # as `table` has them
    outers: Array
    panel: int  # numbers of a row of W, filled up
    whole: int  # vectors of a row, and features after them
    left: int
    most_segments: int
    tile: int  # rows
    words: tuple[int, ...]  # of the job: tables, W, the centre
    packed_bytes: int
    partial_size: int


@functools.cache
def layout(kind: products.Kind, classes: int, features: int, wants_dW: bool) -> Layout:
    size, lanes = np.dtype(kind.real).itemsize, kind.lanes
    whole = features // lanes
    panel = -(-features // lanes) * lanes
    dots = table(products.dot, kind, classes, products.MOST_CLASSES, panel)
    outers = table(products.outer, kind, classes if wants_dW else 0, products.MOST_OUTER_CLASSES, panel)
    partial_size = classes * panel if wants_dW else 0
    segments = SEGMENTS
    while segments > FEW_SEGMENTS and segments * partial_size * size > PARTIAL_BYTES:
        segments //= 2
    words = cpu.address(dots), len(dots), cpu.address(outers), len(outers)
    return Layout(
        dots, outers, panel, whole, features - whole * lanes, segments, tile_rows(panel * size), words,
        -(-(classes + 1) * panel * size // LINE) * LINE, partial_size,
    )  # fmt: skip


# --- a segment ------------------------------------------------------------------------------------------------------
def tile_rows(row_bytes: int) -> int:
    """Rows of a tile, by their size alone."""
    rows = LEAST_ROWS
    while rows < MOST_ROWS and 2 * rows * row_bytes <= TILE_BYTES:
        rows *= 2
    return rows


#: What the kernels are told of a call: words, at an address. Arrays are `cpu.reference`s. After the words are the
#: segments' sums of losses, and of the gradient's entries, for db.
(
    X_ARRAY, ROW_STEP, FEATURE_STEP, PICKED, TARGETS, TARGETS_KIND, PROBABILITIES, MULTIPLIER, W_ARRAY, W_ROW_STEP,
    W_STEP, BIAS, BIAS_STEP, CENTRE_FROM, LOSSES, LOSSES_STEP, OPTIONS, DW, DW_ROW_STEP, DW_STEP, DB, DB_STEP, SHAPE,
    TAKEN, ADDED, SCALE,
) = range(26)  # fmt: skip
JOB = Struct("=25qd")
SUMS_AT = -(-JOB.size // LINE) * LINE
#: Words that follow from the shape, made once, at the address SHAPE. Tables are addresses of words, four for each
#: block; places of what is made in a call are after the job's.
(
    COPY_ROW, FEATURES, ROW_BYTES, DOTS, N_DOTS, OUTERS, N_OUTERS, PACKED, CENTRE, PANEL, WHOLE, LEFT, ROWS, CLASSES,
    TILE_ROWS, SEGMENT, SEGMENTS_AT, PARTIAL, PARTIAL_SIZE, SCRATCH, SCRATCH_STEP, BEFORE, AFTER,
) = range(23)  # fmt: skip
ADDED_AT_ONCE = 1024  # numbers of dW


@cpu.helper
def told(job, which):
    return cpu.get(job + 8 * which, np.int64(0))


@cpu.helper
def array(job, which):
    return cpu.numbers_of(told(job, which))


@cpu.helper
def index_at(address, i, kind):
    """A whole number of any type: `kind` is its size, negative if it has no sign."""
    if kind == 8:
        return cpu.get(address + 8 * i, np.int64(0))
    if kind == 4:
        return np.int64(cpu.get(address + 4 * i, np.int32(0)))
    if kind == -1:
        return np.int64(cpu.get(address + i, np.uint8(0)))
    if kind == 1:
        return np.int64(cpu.get(address + i, np.int8(0)))
    if kind == 2:
        return np.int64(cpu.get(address + 2 * i, np.int16(0)))
    if kind == -2:
        return np.int64(cpu.get(address + 2 * i, np.uint16(0)))
    if kind == -4:
        return np.int64(cpu.get(address + 4 * i, np.uint32(0)))
    return np.int64(cpu.get(address + 8 * i, np.uint64(0)))


@functools.cache
def index_kind(dtype: np.dtype[Any]) -> int:
    """What `index_at` calls a type; 0: it does not know it."""
    if dtype.kind not in "iu" or not dtype.isnative:
        return 0
    return -dtype.itemsize if dtype.kind == "u" else dtype.itemsize


@functools.cache
def scratch_bytes(classes: int, tile: int, row_bytes: int, size: int) -> int:
    """A thread's memory: the tile, numbers beside it, pulls, work; totals; addresses, places, targets; copies of rows.
    Once they are done, what is added at once.
    """
    parts = [classes * tile * size] * 3 + [walks.WORK * size] + [tile * 8] * 4 + [tile * row_bytes]
    return max(sum(-(-part // LINE) * LINE for part in parts), ADDED_AT_ONCE * size)


def packing_kernel(compute: str) -> Any:
    """W to panels, and the centre to a row that is filled up: the work of one thread."""
    size, zero, lanes = np.dtype(compute).itemsize, getattr(np, compute)(0), vectors.lanes_of(compute)

    @cpu.helper
    def copy(to, source, step, n):
        if step == size:
            there, here = cpu.numbers_at(to, n, zero), cpu.numbers_at(source, n, zero)
            for j in range(n):
                there[j] = here[j]
        else:
            for j in range(n):
                cpu.put(to + j * size, cpu.get(source + j * step, zero))

    @numba.cfunc(types.void(types.intp, types.intp), error_model="numpy")
    def pack(job, worker):
        shape = told(job, SHAPE)
        whole, left, step, W = told(shape, WHOLE), told(shape, LEFT), told(job, W_STEP), array(job, W_ARRAY)
        for b in range(told(shape, N_DOTS)):
            row = told(shape, DOTS) + 32 * b
            first, start, count = told(row, 1), told(row, 2), told(row, 3)
            for c in range(count):
                source = W + (first + c) * told(job, W_ROW_STEP)
                to = job + told(shape, PACKED) + (start + c * lanes) * size
                for v in range(whole):
                    copy(to + v * count * lanes * size, source + v * lanes * step, step, lanes)
                if left:
                    to += whole * count * lanes * size
                    cpu.numbers_at(to, lanes, zero)[:] = zero
                    copy(to, source + whole * lanes * step, step, left)
        if told(job, CENTRE_FROM):
            centre = job + told(shape, CENTRE)
            cpu.numbers_at(centre, told(shape, PANEL), zero)[:] = zero
            copy(centre, array(job, CENTRE_FROM), size, told(shape, FEATURES))

    return cpu.Kernel(pack)


def segment_kernel(plan: rowmath.Plan, compute: str, wants_gradient: bool) -> Any:
    """The work of one thread on segments, for a row loss in a type."""
    real, walk = getattr(np, compute), scores.tiled_walk(plan, compute, wants_gradient, False)
    probable, pairs = plan.probabilities, plan.pairs
    size, zero, one, word, double = np.dtype(real).itemsize, real(0), real(1), np.int64(0), np.float64(0)

    @cpu.reducer  # one sum would wait for each addition: a microsecond for 10 classes
    def sum_of(numbers):
        total = double
        for x in numbers:
            total += np.float64(x)
        return total

    @numba.cfunc(types.void(types.intp, types.intp), error_model="numpy")
    def segments(job, worker):
        shape = told(job, SHAPE)
        if told(shape, BEFORE):
            cpu.call_address(told(shape, BEFORE), job, worker)
        mode = cpu.set_rounding_of_tiny(np.int32(-1))
        classes, tile_rows = told(shape, CLASSES), told(shape, TILE_ROWS)
        n_rows, segment = told(shape, ROWS), told(shape, SEGMENT)
        row_bytes, copy_row, features = told(shape, ROW_BYTES), told(shape, COPY_ROW), told(shape, FEATURES)
        X, row_step, feature_step = array(job, X_ARRAY), told(job, ROW_STEP), told(job, FEATURE_STEP)
        picked, losses, options = array(job, PICKED), array(job, LOSSES), array(job, OPTIONS)
        targets, probabilities, multiplier = array(job, TARGETS), array(job, PROBABILITIES), array(job, MULTIPLIER)
        centre, packed = job + told(shape, CENTRE), job + told(shape, PACKED)
        whole, left, step = told(shape, WHOLE), told(shape, LEFT), tile_rows * size
        bias, bias_step, kind = array(job, BIAS), told(job, BIAS_STEP), told(job, TARGETS_KIND)
        scratch = job + told(shape, SCRATCH) + worker * told(shape, SCRATCH_STEP)
        # As `scratch_bytes` has it.
        full = (classes * step + LINE - 1) // LINE * LINE
        tile_at, more_at, pulls_at, work_at = scratch, scratch + full, scratch + 2 * full, scratch + 3 * full
        line_rows = (tile_rows * 8 + LINE - 1) // LINE * LINE
        totals_at = work_at + (WORK * size + LINE - 1) // LINE * LINE
        address_at, place_at, y_at = totals_at + line_rows, totals_at + 2 * line_rows, totals_at + 3 * line_rows
        copies = totals_at + 4 * line_rows
        tile = cpu.numbers_at(tile_at, classes * tile_rows, zero)
        pulls = cpu.numbers_at(pulls_at, classes * tile_rows, zero)
        work, totals = cpu.numbers_at(work_at, WORK, zero), cpu.numbers_at(totals_at, tile_rows, double)
        address, place = cpu.numbers_at(address_at, tile_rows, word), cpu.numbers_at(place_at, tile_rows, word)
        y = cpu.numbers_at(y_at, tile_rows, word)
        y[:] = 0
        work[:] = 0
        k = cpu.take(job + 8 * TAKEN)
        while k < told(shape, SEGMENTS_AT):
            i, stop = k * segment, min(n_rows, (k + 1) * segment)
            dW_at = job + told(shape, PARTIAL) + k * told(shape, PARTIAL_SIZE) * size
            cpu.numbers_at(dW_at, told(shape, PARTIAL_SIZE), zero)[:] = 0
            totals[:] = 0
            pulls[:] = 0
            while i < stop:
                n = 0
                while n < tile_rows and i < stop:
                    at = cpu.get(picked + 8 * i, word) if picked else i
                    m = cpu.get(multiplier + at * size, zero) if multiplier else one
                    if m != zero:
                        row = X + at * row_step
                        if copy_row:
                            to = copies + n * row_bytes
                            cpu.call_address(copy_row, row, features, 0, feature_step, 0, to, 0, 0)
                            row = to
                        place[n], address[n], work[WEIGHT + n], work[FACTOR + n] = i, row, m, m
                        if not probable:
                            y[n] = index_at(targets, at, kind)
                        if probable or pairs:
                            for c in range(classes):
                                if probable:
                                    number = cpu.get(probabilities + (at * classes + c) * size, zero)
                                else:
                                    number = cpu.get(options + (TABLE + y[n] * classes + c) * size, zero)
                                cpu.put(more_at + c * step + n * size, number)
                        n += 1
                    elif losses:
                        cpu.put(losses + i * told(job, LOSSES_STEP), zero)
                    i += 1
                filled = (n + products.ROWS - 1) // products.ROWS * products.ROWS
                for r in range(n, filled):
                    address[r] = address[0]  # any row: what comes of it is not looked at
                for c in range(classes):
                    tile[c * tile_rows : c * tile_rows + filled] = cpu.get(bias + c * bias_step, zero) if bias else zero
                for b in range(told(shape, N_DOTS)):
                    row = told(shape, DOTS) + 32 * b
                    function, first, start = cpu.get(row, word), cpu.get(row + 8, word), cpu.get(row + 16, word)
                    cpu.call_address(
                        function, address_at, filled, tile_at + first * step, tile_rows, centre, packed + start * size,
                        whole, left,
                    )  # fmt: skip
                walk(n, classes, y_at, work_at, options, more_at, step, tile_at, step)
                for r in range(n):
                    totals[r] += np.float64(work[WEIGHT + r]) * np.float64(work[LOSS + r])
                if losses:
                    for r in range(n):
                        cpu.put(losses + place[r] * told(job, LOSSES_STEP), work[LOSS + r])
                if wants_gradient:
                    for c in range(classes):
                        for r in range(c * tile_rows, c * tile_rows + n):
                            pulls[r] += tile[r]
                    for b in range(told(shape, N_OUTERS)):
                        row = told(shape, OUTERS) + 32 * b
                        function, first, start = cpu.get(row, word), cpu.get(row + 8, word), cpu.get(row + 16, word)
                        cpu.call_address(
                            function, address_at, n, tile_at + first * step, tile_rows, centre, dW_at + start * size,
                            whole, left,
                        )  # fmt: skip
            if wants_gradient:
                sums = cpu.numbers_at(job + SUMS_AT + 8 * (SEGMENTS + k * classes), classes, double)
                for c in range(classes):
                    sums[c] = sum_of(pulls[c * tile_rows : (c + 1) * tile_rows])
            cpu.put(job + SUMS_AT + 8 * k, sum_of(totals))
            k = cpu.take(job + 8 * TAKEN)
        cpu.set_rounding_of_tiny(mode)
        if told(shape, AFTER):
            cpu.call_address(told(shape, AFTER), job, worker)

    return cpu.Kernel(segments)


def adding_kernel(compute: str) -> Any:
    """The sums of the segments in their order, scaled, to dW and db: the work of one thread."""
    real = getattr(np, compute)
    size, zero, double, lanes = np.dtype(real).itemsize, real(0), np.float64(0), vectors.lanes_of(compute)
    at_once = ADDED_AT_ONCE // lanes * lanes

    @cpu.helper
    def add_to(total, term):
        for j in range(total.size):
            total[j] += term[j]

    @cpu.helper
    def store(to, step, total, n, scale):
        if step == size:
            there = cpu.numbers_at(to, n, zero)
            for j in range(n):
                there[j] = total[j] * scale
        else:
            for j in range(n):
                cpu.put(to + j * step, total[j] * scale)

    @numba.cfunc(types.void(types.intp, types.intp), error_model="numpy")
    def add_up(job, worker):
        shape, factor = told(job, SHAPE), cpu.get(job + 8 * SCALE, double)
        count, classes, segments = told(shape, PARTIAL_SIZE), told(shape, CLASSES), told(shape, SEGMENTS_AT)
        scale, whole, left = real(factor), told(shape, WHOLE), told(shape, LEFT)
        row_step, step, dW, db = told(job, DW_ROW_STEP), told(job, DW_STEP), array(job, DW), array(job, DB)
        partial, total_at = job + told(shape, PARTIAL), job + told(shape, SCRATCH) + worker * told(shape, SCRATCH_STEP)
        turn = cpu.take(job + 8 * ADDED)
        if turn == 0 and db:
            for c in range(classes):
                sum_of = double
                for k in range(segments):
                    sum_of += cpu.get(job + SUMS_AT + 8 * (SEGMENTS + k * classes + c), double)
                cpu.put(db + c * told(job, DB_STEP), real(sum_of * factor))
        while turn * at_once < count:
            first = turn * at_once
            n = min(at_once, count - first)
            total = cpu.numbers_at(total_at, n, zero)
            total[:] = 0
            for k in range(segments):
                add_to(total, cpu.numbers_at(partial + (k * count + first) * size, n, zero))
            block, blocks = told(shape, OUTERS), told(shape, N_OUTERS)
            b = 0
            for u in range(first, first + n, lanes):
                while b + 1 < blocks and told(block + 32, 2) <= u:
                    block, b = block + 32, b + 1
                at, classes_here = (u - told(block, 2)) // lanes, told(block, 3)
                v = at // classes_here
                to = dW + (told(block, 1) + at - v * classes_here) * row_step + v * lanes * step
                here = cpu.numbers_at(total_at + (u - first) * size, lanes, zero)
                if v < whole:
                    store(to, step, here, lanes, scale)
                else:
                    store(to, step, here, left, scale)
            turn = cpu.take(job + 8 * ADDED)

    return cpu.Kernel(add_up)


# --- the layer ------------------------------------------------------------------------------------------------------
class Call(NamedTuple):
    """What follows from a plan, the types and shapes of arrays, what is asked for, and the number of threads."""

    pack: cpu.Kernel | None  # before the segments, and
    segments: cpu.Kernel
    add_up: cpu.Kernel | None  # after them; None: a thread that is alone does all of it in one call
    shape: Array  # words for the kernels,
    shape_at: int
    bytes: int
    sums: Struct
    workers: int
    adders: int
    kept: Layout


@functools.lru_cache(1024)
def call_of(
    plan: rowmath.Plan, of_X: np.dtype[Any], of_W: np.dtype[Any], centres: bool, classes: int, features: int, n: int,
    wants_dW: bool, wants_gradient: bool, copies: bool, n_threads: int,
) -> Call:  # fmt: skip
    kind, size = products.Kind(of_X.name, of_W.name, centres), of_W.itemsize
    of = layout(kind, classes, features, wants_dW)
    tile = of.tile
    segment = -(-max(-(-n // of.most_segments), SEGMENT_ROWS) // tile) * tile
    segments = -(-n // segment)
    useful = max(1, min(n_threads, segments, n * classes * features // SMALL))
    row_bytes = features * of_X.itemsize
    step = scratch_bytes(classes, tile, row_bytes if copies else 0, size)
    packed = SUMS_AT + -(-8 * (SEGMENTS + (segments * classes if wants_gradient else 0)) // LINE) * LINE
    partial = packed + of.packed_bytes
    scratch = partial + -(-segments * of.partial_size * size // LINE) * LINE
    pack: Any = cpu.made(packing_kernel, kind.real)
    add_up: Any = cpu.made(adding_kernel, kind.real) if wants_gradient else None
    is_alone = useful == 1
    shape = np.array([
        product(products.copy_row, kind, 0).address if copies else 0, features, row_bytes, *of.words, packed,
        packed + classes * of.panel * size, of.panel, of.whole, of.left, n, classes, tile, segment, segments, partial,
        of.partial_size, scratch, step, pack.address if is_alone else 0, add_up.address if is_alone and add_up else 0,
    ])  # fmt: skip
    return Call(
        None if is_alone else pack, cpu.made(segment_kernel, plan, kind.real, wants_gradient),
        None if is_alone else add_up, shape, cpu.address(shape), scratch + useful * step + LINE,
        Struct(f"={segments}d"), useful, min(useful, max(1, of.partial_size // ADDED_AT_ONCE)), of,
    )  # fmt: skip


def linear_rows(
    loss: Any, X: Array, rows: Array | None, centre: Array | None, W: Array, b: Array | None, targets: Array,
    multiplier: Array | None, scale: float, dW: Array | None, db: Array | None, row_loss: Array | None, n_threads: int,
) -> float:  # fmt: skip
    """`Backend.linear_rows` for few classes (`can_fuse`), without dX."""
    (classes, features), n, steps = W.shape, len(X) if rows is None else len(rows), X.strides
    plan, options = scores.prepared(loss, classes, W.dtype, targets.ndim == 2)
    of = call_of(
        plan, X.dtype, W.dtype, centre is not None, classes, features, n, dW is not None,
        dW is not None or db is not None, steps[1] != X.itemsize and features > 1, n_threads,
    )  # fmt: skip
    y = probabilities = None
    y_kind = 0
    if targets.ndim == 2:
        probabilities = np.ascontiguousarray(targets, W.dtype)
    else:
        y_kind = index_kind(targets.dtype)
        y = targets if y_kind and targets.flags.c_contiguous else np.ascontiguousarray(targets, np.int64)
        y_kind = y_kind or 8
    weight = None if multiplier is None else np.ascontiguousarray(multiplier, W.dtype)
    if rows is not None:
        rows = np.ascontiguousarray(rows, np.int64)
    if centre is not None:
        centre = np.ascontiguousarray(centre, W.dtype)

    memory: Any = np.empty(of.bytes, np.uint8)
    reference = cpu.reference
    at = cpu.address(memory)
    start = -at % LINE  # so that vectors do not lie across two lines of the cache
    at += start
    JOB.pack_into(
        memory, start, id(X), *steps, reference(rows), reference(y), y_kind, reference(probabilities),
        reference(weight), id(W), *W.strides, reference(b), 0 if b is None else b.strides[0], reference(centre),
        reference(row_loss), 0 if row_loss is None else row_loss.strides[0], id(options), reference(dW),
        *((0, 0) if dW is None else dW.strides), reference(db), 0 if db is None else db.strides[0], of.shape_at, 0, 0,
        scale,
    )  # fmt: skip
    if of.pack is not None:
        of.pack.call(at, 0)
    if of.workers == 1:
        of.segments.call(at, 0)
    else:
        cpu.run_kernel(of.segments, at, of.workers)
    if of.add_up is not None:
        cpu.run_kernel(of.add_up, at, of.adders)
    return sum(of.sums.unpack_from(memory, start + SUMS_AT), 0.0)
