"""The fused linear layer of few classes: scores, row losses and dW for a tile of rows while it is in the cache.

For each tile of rows: scores against W in panels (`products.dot`), the row losses (`walks`) with the gradient in place, class
by class with the rows side by side, then dW in panels (`products.outer`). Rows are read from memory once, where they
are and of the type that they have; only rows whose numbers are not contiguous are copied, a tile at a time. Rows of
multiplier 0 are not in a tile at all.

Rows are split into segments by the shape alone; each sums dW, db and the loss on its own, and the sums are added in
order: the same bits for any number of threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types

from fastloss._checks import Array
from fastloss.blocks import Workers, split
from fastloss.jit import cpu, products, rowmath, scores, walks

FEW_CLASSES = 64
PANEL_BYTES = 1 << 20  # of W: above, the sums of all segments would take over 64 MB
SEGMENTS = 64  # at most,
SEGMENT_ROWS = 64  # each at least,
PARTIAL_BYTES = 16 << 20  # and all segments' sums, at most, unless they are so few:
FEW_SEGMENTS = 16
SHARES = 8  # of the segments, for each thread
MOST_ROWS = 64  # of a tile,
LEAST_ROWS = 16
TILE_BYTES = 64 << 10  # and what they take, unless they are the least
SMALL = 1 << 21  # multiplications for each thread, at least: starting one costs about a tenth of a millisecond

TYPES = ("float32", "float64", "float16", "bfloat16", "uint8")


def can_fuse(X: Array, W: Array) -> bool:
    """Whether the fused pass serves a layer."""
    few = len(W) <= FEW_CLASSES and W.nbytes <= PANEL_BYTES
    return few and X.dtype.name in TYPES and X.dtype.isnative and X.flags.aligned


def aligned(size: int, dtype: Any) -> Array:
    """Memory that begins at a multiple of 64 bytes, so that vectors do not lie across two lines of the cache."""
    dtype = np.dtype(dtype)
    memory = np.empty(size * dtype.itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64
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


def table(which: Callable[..., None], kind: products.Kind, blocks: list[Block], vectors: int) -> Array:
    """For each block: the address of its product, its first class, where its panel begins."""
    step = vectors * kind.lanes
    rows = [(product(which, kind, b.classes).address, b.first, b.first * step) for b in blocks]
    return np.array(rows, np.int64).reshape(-1, 3)


# --- a segment ------------------------------------------------------------------------------------------------------
def tile_rows(row_bytes: int) -> int:
    """Rows of a tile, by their size alone."""
    rows = LEAST_ROWS
    while rows < MOST_ROWS and 2 * rows * row_bytes <= TILE_BYTES:
        rows *= 2
    return rows


def segment_kernel(plan: rowmath.Plan, compute: str, wants_gradient: bool) -> Any:
    """The work on some segments, for a row loss in a type."""
    real, walk = getattr(types, compute), scores.tiled_walk(plan, compute, wants_gradient, False)
    probable, pairs = plan.probabilities, plan.pairs
    LOSS, FACTOR, WEIGHT, WORK, TABLE = walks.LOSS, walks.FACTOR, walks.WEIGHT, walks.WORK, walks.TABLE
    word, numbers, table = types.intp, types.Array(real, 1, "C", readonly=True), types.Array(types.int64, 2, "C")
    words, matrix = types.Array(types.int64, 1, "C", readonly=True), types.Array(real, 2, "C", readonly=True)
    signature = types.void(
        word, word, word, word, word, word, words, words, matrix, numbers, table, table, word, numbers, word, word,
        word, word, word, types.Array(real, 1, "A"), numbers, word, word, types.Array(real, 2, "C"),
        types.Array(types.float64, 2, "C"), word, word,
    )  # fmt: skip

    @numba.njit(signature, nogil=True, error_model="numpy")
    def segments(
        X, row_stride, feature_stride, copy_row, n_features, row_bytes, rows, targets, probabilities, multiplier, dots,
        outers, W, bias, centre, zeros, size, whole, left, losses, options, n_rows, segment, partial,
        sums, first, last,
    ):  # fmt: skip
        classes = bias.size
        mode = cpu.set_rounding_of_tiny(np.int32(-1))
        tile = np.empty((classes, size), bias.dtype)
        more = np.empty((classes if probable or pairs else 0, size), bias.dtype)
        copies = np.empty(size * row_bytes if copy_row else 0, np.uint8)
        pulls, totals = np.empty((classes, size), bias.dtype), np.empty(size, np.float64)
        place, address = np.empty(size, np.int64), np.empty(size, np.int64)
        y, work = np.zeros(size, np.int64), np.zeros(WORK, bias.dtype)
        itemsize = bias.itemsize
        for k in range(first, last):
            i, stop = k * segment, min(n_rows, (k + 1) * segment)
            dW = partial[k]
            for j in range(dW.size):
                dW[j] = 0
            for r in range(size):
                totals[r] = 0
                for c in range(classes):
                    pulls[c, r] = 0
            address_at, tile_at, work_at, y_at = address.ctypes.data, tile.ctypes.data, work.ctypes.data, y.ctypes.data
            while i < stop:
                n = 0
                while n < size and i < stop:
                    m = multiplier[i] if multiplier.size else bias.dtype.type(1)
                    if m != 0:
                        row = X + (rows[i] if rows.size else i) * row_stride
                        if copy_row:
                            to = copies.ctypes.data + n * row_bytes  # taken here: a last use frees it
                            products.call(copy_row, row, n_features, 0, feature_stride, 0, to, 0, 0)
                            row = to
                        place[n], address[n], work[WEIGHT + n], work[FACTOR + n] = i, row, m, m
                        if probable:
                            for c in range(classes):
                                more[c, n] = probabilities[i, c]
                        else:
                            y[n] = targets[i]
                        if pairs:
                            for c in range(classes):
                                more[c, n] = options[TABLE + targets[i] * classes + c]
                        n += 1
                    elif losses.size:
                        losses[i] = 0
                    i += 1
                filled = (n + products.ROWS - 1) // products.ROWS * products.ROWS
                for r in range(n, filled):
                    address[r] = zeros
                for c in range(classes):
                    for r in range(filled):
                        tile[c, r] = bias[c]
                for b in range(len(dots)):
                    at = tile_at + dots[b, 1] * size * itemsize
                    products.call(
                        dots[b, 0], address_at, filled, at, size, centre, W + dots[b, 2] * itemsize, whole, left
                    )
                step = size * itemsize
                walk(n, classes, y_at, work_at, options.ctypes.data, more.ctypes.data, step, tile_at, step)
                for r in range(n):
                    totals[r] += np.float64(work[WEIGHT + r]) * np.float64(work[LOSS + r])
                if losses.size:
                    for r in range(n):
                        losses[place[r]] = work[LOSS + r]
                if wants_gradient:
                    for c in range(classes):
                        for r in range(n):
                            pulls[c, r] += tile[c, r]
                    for b in range(len(outers)):
                        at = tile_at + outers[b, 1] * size * itemsize
                        panel = dW.ctypes.data + outers[b, 2] * itemsize
                        products.call(outers[b, 0], address_at, n, at, size, centre, panel, whole, left)
            for r in range(size):
                sums[k, classes] += totals[r]
                for c in range(classes):
                    sums[k, c] += pulls[c, r]
        cpu.set_rounding_of_tiny(mode)

    return segments


def add_up(partial: Array, scale: Any, total: Array, part: slice) -> None:
    """The sums of the segments in their order, scaled; each of NumPy's calls adds one to one, in no other order."""
    to = total[part]
    to[...] = partial[0, part]
    for term in partial[1:, part]:
        to += term
    to *= scale


def parts(n: int, n_threads: int) -> list[slice]:
    """range(n) in a few parts for each thread, so that a slow one holds up no other."""
    return split(n, 1 if n_threads == 1 else SHARES * n_threads)


# --- the layer ------------------------------------------------------------------------------------------------------
def linear_rows(
    loss: Any, X: Array, rows: Array | None, centre: Array | None, W: Array, b: Array | None, targets: Array,
    multiplier: Array | None, scale: float, dW: Array | None, db: Array | None, row_loss: Array | None, n_threads: int,
) -> float:  # fmt: skip
    """`Backend.linear_rows` for few classes (`can_fuse`), without dX."""
    (classes, features), n = W.shape, len(X) if rows is None else len(rows)
    kind = products.Kind(X.dtype.name, W.dtype.name, centre is not None)
    plan, lanes = rowmath.plan_of(loss, targets.ndim == 2), kind.lanes
    options = scores.options_of(loss, classes, plan, getattr(np, kind.real))
    vectors, whole = -(-features // lanes), features // lanes
    panel = vectors * lanes
    wants_gradient = dW is not None or db is not None

    if rows is not None:
        targets, multiplier = targets[rows], None if multiplier is None else multiplier[rows]
    y = targets if targets.ndim == 1 else NONE
    probabilities = np.empty((0, 0), W.dtype) if targets.ndim == 1 else np.ascontiguousarray(targets, W.dtype)
    weight = np.empty(0, W.dtype) if multiplier is None else np.ascontiguousarray(multiplier, W.dtype)

    blocks = split_classes(classes, products.MOST_CLASSES)
    outer_blocks = split_classes(classes, products.MOST_OUTER_CLASSES) if dW is not None else []
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
    partial = aligned(segments * partial_size, W.dtype).reshape(segments, partial_size)
    sums = np.zeros((segments, classes + 1))

    kernel = cpu.made(segment_kernel, plan, kind.real, wants_gradient)
    copies = X.strides[1] != X.itemsize and features > 1
    zeros = np.zeros(features, X.dtype)
    arguments = (
        X.ctypes.data, X.strides[0], X.strides[1], product(products.copy_row, kind, 0).address if copies else 0,
        features, features * X.itemsize, NONE if rows is None else np.ascontiguousarray(rows, np.int64),
        np.ascontiguousarray(y, np.int64), probabilities, weight, table(products.dot, kind, blocks, vectors),
        table(products.outer, kind, outer_blocks, vectors), packed.ctypes.data, bias,
        packed.ctypes.data + classes * panel * W.itemsize, zeros.ctypes.data, size, whole, features - whole * lanes,
        np.empty(0, W.dtype) if row_loss is None else row_loss, options, n, segment, partial, sums,
    )  # fmt: skip

    useful = max(1, min(n_threads, segments, n * W.size // SMALL))
    with Workers(useful, blas=False) as workers:
        workers.run(lambda part: kernel(*arguments, part.start, part.stop), parts(segments, useful))
        if dW is not None:
            total = np.zeros(partial_size, W.dtype)
            if segments:
                scaled = W.dtype.type(scale)
                workers.run(lambda part: add_up(partial, scaled, total, part), split(partial_size, useful))
            for block in outer_blocks:
                part = block.panel(total, vectors, lanes).transpose(1, 0, 2).reshape(block.classes, panel)
                dW[block.first : block.first + block.classes] = part[:, :features]
    if db is not None:
        db[...] = sums[:, :classes].sum(axis=0) * scale
    return float(sums[:, classes].sum())


NONE = np.empty(0, np.int64)
