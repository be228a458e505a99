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
from fastloss.jit import cpu, products, rowmath, scores, walks
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
    few = len(W) <= FEW_CLASSES and W.nbytes <= PANEL_BYTES
    return few and name_of(X.dtype) in TYPES and X.dtype.isnative and X.flags.aligned


@functools.cache  # the name alone takes NumPy as long as a part of a small call
def name_of(dtype: np.dtype[Any]) -> str:
    return dtype.name


def aligned(size: int, dtype: Any) -> Array:
    """Memory that begins at a multiple of 64 bytes, so that vectors do not lie across two lines of the cache."""
    dtype = np.dtype(dtype)
    memory = np.empty(size * dtype.itemsize + 64, np.uint8)
    start = -cpu.address(memory) % 64
    return memory[start : start + size * dtype.itemsize].view(dtype)


class Block(NamedTuple):
    """Some classes of a product."""

    first: int
    classes: int

    def panel(self, panels: Array, vectors: int, lanes: int) -> Array:
        """The block's part of panels, as (vectors, classes, lanes)."""
        size = vectors * lanes
        part = panels[self.first * size : (self.first + self.classes) * size]
        return part.reshape(vectors, self.classes, lanes)


def split_classes(classes: int, most: int) -> list[Block]:
    """Blocks of at most that many classes, as even as can be."""
    count = -(-classes // most)
    bounds = [k * (classes // count) + min(k, classes % count) for k in range(count + 1)] if count else [0]
    return [Block(a, b - a) for a, b in itertools.pairwise(bounds)]


def product(which: Callable[..., None], kind: products.Kind, classes: int) -> Any:
    """A compiled product."""
    return cpu.made(products.compiled, which, kind, classes)


class Table(NamedTuple):
    """A product of all classes."""

    blocks: list[Block]
    rows: Array  # for each block: the address of its product, its first class, where its panel begins


@functools.cache
def table(which: Callable[..., None], kind: products.Kind, classes: int, most: int, panel: int) -> Table:
    """By blocks of at most so many classes; `panel`: numbers of a row of W, filled up."""
    blocks = split_classes(classes, most)
    rows = [(product(which, kind, b.classes).address, b.first, b.first * panel) for b in blocks]
    return Table(blocks, np.array(rows, np.int64).reshape(-1, 3))


# --- a segment ------------------------------------------------------------------------------------------------------
def tile_rows(row_bytes: int) -> int:
    """Rows of a tile, by their size alone."""
    rows = LEAST_ROWS
    while rows < MOST_ROWS and 2 * rows * row_bytes <= TILE_BYTES:
        rows *= 2
    return rows


#: What the kernels are told of a call: words, at an address. Tables are addresses of words, three for each block.
(
    X_AT, ROW_STEP, FEATURE_STEP, COPY_ROW, FEATURES, ROW_BYTES, PICKED, TARGETS, PROBABILITIES, MULTIPLIER, DOTS,
    N_DOTS, OUTERS, N_OUTERS, PACKED, BIAS, CENTRE, ZEROS, WHOLE, LEFT, LOSSES, LOSSES_STEP, OPTIONS, ROWS, CLASSES,
    TILE_ROWS, SEGMENT, SEGMENTS_AT, PARTIAL, PARTIAL_SIZE, SUMS_AT, TOTAL, SCRATCH, SCRATCH_STEP, TAKEN, ADDED, SCALE,
) = range(37)  # fmt: skip
JOB = Struct("=36qd")
ADDED_AT_ONCE = 1024  # numbers of dW


@cpu.helper
def told(job, which):
    return cpu.get(job + 8 * which, np.int64(0))


def scratch_bytes(classes: int, tile: int, row_bytes: int, size: int) -> tuple[int, ...]:
    """Where a thread's memory is divided: the tile, numbers beside it, pulls, work; totals; addresses, places, targets;
    copies of rows; and its end.
    """
    parts = [classes * tile * size] * 3 + [walks.WORK * size] + [tile * 8] * 4 + [tile * row_bytes]
    return tuple(itertools.accumulate((-(-part // LINE) * LINE for part in parts), initial=0))


def segment_kernel(plan: rowmath.Plan, compute: str, wants_gradient: bool) -> Any:
    """The work of one thread on segments, for a row loss in a type."""
    real, walk = getattr(np, compute), scores.tiled_walk(plan, compute, wants_gradient, False)
    probable, pairs = plan.probabilities, plan.pairs
    size, zero, one, word, double = np.dtype(real).itemsize, real(0), real(1), np.int64(0), np.float64(0)

    @numba.cfunc(types.void(types.intp, types.intp), error_model="numpy")
    def segments(job, worker):
        mode = cpu.set_rounding_of_tiny(np.int32(-1))
        classes, tile_rows = told(job, CLASSES), told(job, TILE_ROWS)
        n_rows, segment = told(job, ROWS), told(job, SEGMENT)
        row_bytes, copy_row, features = told(job, ROW_BYTES), told(job, COPY_ROW), told(job, FEATURES)
        X, row_step, feature_step = told(job, X_AT), told(job, ROW_STEP), told(job, FEATURE_STEP)
        picked = told(job, PICKED)
        targets, probabilities, multiplier = told(job, TARGETS), told(job, PROBABILITIES), told(job, MULTIPLIER)
        centre, packed, whole, left = told(job, CENTRE), told(job, PACKED), told(job, WHOLE), told(job, LEFT)
        losses, options, step = told(job, LOSSES), told(job, OPTIONS), tile_rows * size
        bias = cpu.numbers_at(told(job, BIAS), classes, zero)
        scratch = told(job, SCRATCH) + worker * told(job, SCRATCH_STEP)
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
        while k < told(job, SEGMENTS_AT):
            i, stop = k * segment, min(n_rows, (k + 1) * segment)
            dW_at = told(job, PARTIAL) + k * told(job, PARTIAL_SIZE) * size
            cpu.numbers_at(dW_at, told(job, PARTIAL_SIZE), zero)[:] = 0
            totals[:] = 0
            pulls[:] = 0
            while i < stop:
                n = 0
                while n < tile_rows and i < stop:
                    m = cpu.get(multiplier + i * size, zero) if multiplier else one
                    if m != zero:
                        row = X + (cpu.get(picked + 8 * i, word) if picked else i) * row_step
                        if copy_row:
                            to = copies + n * row_bytes
                            products.call(copy_row, row, features, 0, feature_step, 0, to, 0, 0)
                            row = to
                        place[n], address[n], work[WEIGHT + n], work[FACTOR + n] = i, row, m, m
                        if not probable:
                            y[n] = cpu.get(targets + 8 * i, word)
                        if probable or pairs:
                            for c in range(classes):
                                if probable:
                                    number = cpu.get(probabilities + (i * classes + c) * size, zero)
                                else:
                                    number = cpu.get(options + (TABLE + y[n] * classes + c) * size, zero)
                                cpu.put(more_at + c * step + n * size, number)
                        n += 1
                    elif losses:
                        cpu.put(losses + i * told(job, LOSSES_STEP), zero)
                    i += 1
                filled = (n + products.ROWS - 1) // products.ROWS * products.ROWS
                for r in range(n, filled):
                    address[r] = told(job, ZEROS)
                for c in range(classes):
                    tile[c * tile_rows : c * tile_rows + filled] = bias[c]
                for b in range(told(job, N_DOTS)):
                    row = told(job, DOTS) + 24 * b
                    function, first, start = cpu.get(row, word), cpu.get(row + 8, word), cpu.get(row + 16, word)
                    products.call(
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
                    for b in range(told(job, N_OUTERS)):
                        row = told(job, OUTERS) + 24 * b
                        function, first, start = cpu.get(row, word), cpu.get(row + 8, word), cpu.get(row + 16, word)
                        products.call(
                            function, address_at, n, tile_at + first * step, tile_rows, centre, dW_at + start * size,
                            whole, left,
                        )  # fmt: skip
            sums = cpu.numbers_at(told(job, SUMS_AT) + 8 * k * (classes + 1), classes + 1, double)
            for c in range(classes):
                total = double
                for r in range(tile_rows):
                    total += np.float64(pulls[c * tile_rows + r])
                sums[c] = total
            total = double
            for r in range(tile_rows):
                total += totals[r]
            sums[classes] = total
            k = cpu.take(job + 8 * TAKEN)
        cpu.set_rounding_of_tiny(mode)

    return cpu.Kernel(segments)


def adding_kernel(compute: str) -> Any:
    """The sums of the segments in their order, scaled: the work of one thread."""
    real = getattr(np, compute)
    size, zero, double = np.dtype(real).itemsize, real(0), np.float64(0)

    @cpu.helper
    def add_to(total, term):
        for j in range(total.size):
            total[j] += term[j]

    @numba.cfunc(types.void(types.intp, types.intp), error_model="numpy")
    def add_up(job, worker):
        count, scale = told(job, PARTIAL_SIZE), real(cpu.get(job + 8 * SCALE, double))
        first = cpu.take(job + 8 * ADDED) * ADDED_AT_ONCE
        while first < count:
            n = min(ADDED_AT_ONCE, count - first)
            total = cpu.numbers_at(told(job, TOTAL) + first * size, n, zero)
            total[:] = 0
            for k in range(told(job, SEGMENTS_AT)):
                add_to(total, cpu.numbers_at(told(job, PARTIAL) + (k * count + first) * size, n, zero))
            for j in range(n):
                total[j] *= scale
            first = cpu.take(job + 8 * ADDED) * ADDED_AT_ONCE

    return cpu.Kernel(add_up)


# --- the layer ------------------------------------------------------------------------------------------------------
def linear_rows(
    loss: Any, X: Array, rows: Array | None, centre: Array | None, W: Array, b: Array | None, targets: Array,
    multiplier: Array | None, scale: float, dW: Array | None, db: Array | None, row_loss: Array | None, n_threads: int,
) -> float:  # fmt: skip
    """`Backend.linear_rows` for few classes (`can_fuse`), without dX."""
    (classes, features), n = W.shape, len(X) if rows is None else len(rows)
    kind = products.Kind(name_of(X.dtype), name_of(W.dtype), centre is not None)
    (plan, options), lanes = scores.prepared(loss, classes, W.dtype, targets.ndim == 2), kind.lanes
    vectors, whole = -(-features // lanes), features // lanes
    panel = vectors * lanes
    wants_gradient = dW is not None or db is not None

    if rows is not None:
        targets, multiplier = targets[rows], None if multiplier is None else multiplier[rows]
    y = targets if targets.ndim == 1 else NONE
    probabilities = None if targets.ndim == 1 else np.ascontiguousarray(targets, W.dtype)
    weight = None if multiplier is None else np.ascontiguousarray(multiplier, W.dtype)

    blocks, dots = table(products.dot, kind, classes, products.MOST_CLASSES, panel)
    outer_blocks, outers = table(
        products.outer, kind, classes if dW is not None else 0, products.MOST_OUTER_CLASSES, panel
    )
    packed = aligned((classes + 1) * panel, W.dtype)  # the centre is last
    packed[...] = 0
    for block in blocks:
        to, part = block.panel(packed, vectors, lanes), W[block.first : block.first + block.classes]
        to[:whole] = part[:, : whole * lanes].reshape(block.classes, whole, lanes).transpose(1, 0, 2)
        if vectors > whole:
            to[whole, :, : features - whole * lanes] = part[:, whole * lanes :]
    if centre is not None:
        packed[classes * panel : classes * panel + features] = centre
    bias = np.zeros(classes, W.dtype)
    if b is not None:
        bias[...] = b

    partial_size = classes * panel if dW is not None else 0
    segments = SEGMENTS
    while segments > FEW_SEGMENTS and segments * partial_size * W.itemsize > PARTIAL_BYTES:
        segments //= 2
    size = tile_rows(panel * W.itemsize)
    segment = -(-max(-(-n // segments), SEGMENT_ROWS) // size) * size
    segments = -(-n // segment)
    partial = aligned(segments * partial_size, W.dtype)
    sums = np.zeros((segments, classes + 1))
    useful = max(1, min(n_threads, segments, n * W.size // SMALL))

    kernel = cpu.made(segment_kernel, plan, kind.real, wants_gradient)
    copies = X.strides[1] != X.itemsize and features > 1
    zeros, total = np.zeros(features, X.dtype), np.empty(partial_size, W.dtype)
    if rows is not None:
        rows = np.ascontiguousarray(rows, np.int64)
    y = np.ascontiguousarray(y, np.int64)
    *_, step = scratch_bytes(classes, size, features * X.itemsize if copies else 0, W.itemsize)
    scratch = aligned(useful * step, np.uint8)
    job: Any = np.empty(JOB.size // 8, np.int64)
    address = cpu.address
    JOB.pack_into(
        job, 0, address(X), *X.strides, product(products.copy_row, kind, 0).address if copies else 0, features,
        features * X.itemsize, address(rows), address(y), address(probabilities), address(weight),
        address(dots), len(dots), address(outers), len(outers), address(packed), address(bias),
        address(packed) + classes * panel * W.itemsize, address(zeros), whole, features - whole * lanes,
        address(row_loss), 0 if row_loss is None else row_loss.strides[0], address(options), n, classes, size, segment,
        segments, address(partial), partial_size, address(sums), address(total), address(scratch), step, 0, 0, scale,
    )  # fmt: skip
    cpu.run_kernel(kernel, address(job), useful)
    if dW is not None:
        useful = min(useful, max(1, partial_size // ADDED_AT_ONCE))
        cpu.run_kernel(cpu.made(adding_kernel, kind.real), address(job), useful)
        for block in outer_blocks:
            part = block.panel(total, vectors, lanes).transpose(1, 0, 2).reshape(block.classes, panel)
            dW[block.first : block.first + block.classes] = part[:, :features]
    if db is not None:
        db[...] = sums[:, :classes].sum(axis=0) * scale
    return float(sums[:, classes].sum())


NONE = np.empty(0, np.int64)
