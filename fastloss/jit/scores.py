"""Row losses of given scores: groups of rows, each read once into scratch that stays in cache.

For each group: its rows are copied to scratch, in the compute type, and the maximum is found; a walk (`rowmath`'s
steps) leaves there what the gradient needs; rows are settled, all of the group at once, so that none waits for a
logarithm or a division of its own; the last walk writes the gradient to where it belongs. Two layouts:

rowed   scratch (rows, classes), padded with −inf to whole vectors: a walk goes along a row, in blocks whose terms are
        added up in vectors; blocks are added in float64
tiled   for few classes; scratch (classes, rows): a walk goes along the rows of a class, and no sum is over a vector

`tile_losses` is the tiled form for whoever makes scores itself.

Rows are split into segments by the shape alone, and each has its sum: the same bits for any number of threads. Rows of
multiplier 0 are not read.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg"
# mypy: disable-error-code="arg-type, untyped-decorator, var-annotated"

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types

from fastloss._checks import Array
from fastloss.jit import cpu, rowmath
from fastloss.jit.rowmath import Plan

FEW_CLASSES = 40  # up to here rows are tiled
TILE = 64  # rows of a tile
# Classes of a block. Equal terms are all rounded the same way, and there are that many of them in a vector's lane:
BLOCKS = {("hinge", np.float32): 1024, ("hinge", np.float64): 32}
BLOCK = 128
PAD = 32  # classes that rows are padded to a multiple of: what is left of vectors is added one by one, less accurately
GROUP_BYTES = 4 << 10  # of a group of rows, unless one is larger: with their scores and gradients, in the L1 cache
SEGMENTS = 64  # at most,
SEGMENT_BYTES = 16 << 10  # of scores each at least

#: What is known of the rows of a group: where in `work` the numbers begin, one for each row. Offsets are constants, so
#: that LLVM sees that they do not overlap.
(
    TOP, OWN_SCORE, FACTOR, OWN_MARGIN, KNOWN, SUMS, LOW, LOSS, Z, ENTROPY, ENTRY, NUMBERS, TARGET, WEIGHT, WORK,
) = (TILE * k for k in (0, 1, 2, 3, 4, 7, 13, 14, 15, 16, 17, 18, 22, 23, 24))  # fmt: skip
K1, K2 = KNOWN + TILE, KNOWN + 2 * TILE
S1, S2, S3, S4, S5 = (SUMS + k * TILE for k in range(1, 6))
N1, N2, N3 = (NUMBERS + k * TILE for k in range(1, 4))
#: Where class weights, or margins of class pairs row by row, begin in the options.
TABLE = 8


def options_of(loss: Any, classes: int, plan: Plan, real: Any) -> np.ndarray[Any, Any]:
    """All options of a loss as the kernels take them: numbers, then class weights or margins of class pairs."""
    numbers, real = rowmath.numbers_of(loss, classes, real), np.dtype(real)
    if plan.weights:
        return np.concatenate([numbers, loss.converted("class_weight", real)])
    if plan.pairs:
        return np.concatenate([numbers, loss.converted("pair_margins", real).ravel()])
    return numbers


# --- what both layouts share ----------------------------------------------------------------------------------------
def _aim_and_settle(plan: Plan, row: Any, real: Any) -> Any:
    aim, settle, counts, looks = row.aim, row.settle, plan.counts_target, plan.looks
    zero, terms = real(0), plan.terms

    @cpu.helper
    def aim_rows(work, n, options):
        for r in range(n):
            a, b, c = aim(
                work[TOP + r] if looks else zero, work[OWN_SCORE + r], work[FACTOR + r], options
            )  # fmt: skip
            work[KNOWN + r], work[K1 + r], work[K2 + r] = a, b, c

    @cpu.helper
    def settle_rows(work, n, options):
        for r in range(n):
            known = work[KNOWN + r], work[K1 + r], work[K2 + r]
            sums = (
                work[SUMS + r], work[S1 + r] if terms > 1 else zero, work[S2 + r] if terms > 2 else zero,
                work[S3 + r] if terms > 3 else zero, work[S4 + r] if terms > 4 else zero,
                work[S5 + r] if terms > 5 else zero,
            )  # fmt: skip
            own = work[OWN_MARGIN + r] if counts else zero
            loss, z, entropy, entry, a, b, c, d = settle(
                work[TOP + r] if looks else zero, work[OWN_SCORE + r], own, known, sums, work[LOW + r],
                work[FACTOR + r], options,
            )  # fmt: skip
            work[LOSS + r], work[Z + r], work[ENTROPY + r], work[ENTRY + r] = loss, z, entropy, entry
            work[NUMBERS + r], work[N1 + r], work[N2 + r], work[N3 + r] = a, b, c, d

    return aim_rows, settle_rows


# --- tiled ----------------------------------------------------------------------------------------------------------
class Walks(NamedTuple):
    """The walks over a group of rows, in either layout."""

    open: Any
    close: Any


def _tiled(plan: Plan, row: Any, real: Any) -> Walks:
    step, close, top, exact_sum = row.step, row.close, row.top, row.functions.exact_sum
    number_or_zero = row.functions.number_or_zero
    aim_rows, settle_rows = _aim_and_settle(plan, row, real)
    zero, none = real(0), real(-np.inf)
    probabilities, weights, pairs, looks, terms = (
        plan.probabilities, plan.weights, plan.pairs, plan.looks, plan.terms
    )  # fmt: skip
    is_max, closes, has_target = plan.kind == "hinge max", plan.closes, plan.has_target
    knows_class = not probabilities and plan.kind in ("softmax", "hinge", "hinge max") and not plan.shard
    counts, exactly = plan.counts_target, plan.kind == "hinge"

    @cpu.helper
    def number(more, table, y, work, k, c, r):
        # The number of row r and class k: a probability, or the margin of the pair.
        if probabilities:
            return more[k, r]
        if pairs:
            return table[TABLE + y[r] * c + k]
        return zero

    @cpu.helper
    def one(tile, more, table, y, work, k, c, r, w, options):
        known = work[KNOWN + r], work[K1 + r], work[K2 + r]
        is_target = work[TARGET + r] == real(k) if knows_class else False
        kept, t0, t1, t2, t3, t4, t5 = step(
            tile[k, r], number(more, table, y, work, k, c, r), w, is_target, known, options
        )  # fmt: skip
        tile[k, r] = kept
        return t0, t1, t2, t3, t4, t5

    @cpu.helper
    def open_class(tile, more, table, y, work, k, c, n, options):
        w = table[TABLE + k] if weights else zero
        for r in range(n):
            t0, t1, t2, t3, t4, t5 = one(tile, more, table, y, work, k, c, r, w, options)
            if is_max:
                work[SUMS + r] = top(work[SUMS + r], t0)
            else:
                total, lost = exact_sum(work[SUMS + r], t0)
                work[SUMS + r] = total
                work[LOW + r] += lost
            if terms > 1:
                work[S1 + r] += t1
            if terms > 2:
                work[S2 + r] += t2
            if terms > 3:
                work[S3 + r] += t3
                work[S4 + r] += t4
                work[S5 + r] += t5

    @cpu.helper
    def open_pair(tile, more, table, y, work, k, c, n, options):
        w, v = (table[TABLE + k] if weights else zero), (table[TABLE + k + 1] if weights else zero)
        for r in range(n):
            t0, t1, t2, t3, t4, t5 = one(tile, more, table, y, work, k, c, r, w, options)
            u0, u1, u2, u3, u4, u5 = one(tile, more, table, y, work, k + 1, c, r, v, options)
            if is_max:
                work[SUMS + r] = top(work[SUMS + r], top(t0, u0))
            else:
                both = t0 + u0
                if exactly:
                    both, lost = exact_sum(t0, u0)
                    work[LOW + r] += lost
                total, lost = exact_sum(work[SUMS + r], both)
                work[SUMS + r] = total
                work[LOW + r] += lost
            if terms > 1:
                work[S1 + r] += t1 + u1
            if terms > 2:
                work[S2 + r] += t2 + u2
            if terms > 3:
                work[S3 + r] += t3 + u3
                work[S4 + r] += t4 + u4
                work[S5 + r] += t5 + u5

    @cpu.helper
    def open_rows(tile, more, table, y, work, c, n, options):
        for r in range(n):
            work[TOP + r] = tile[0, r]
        if looks:
            for k in range(1, c):
                for r in range(n):
                    work[TOP + r] = top(work[TOP + r], tile[k, r])
        for r in range(n):
            work[OWN_SCORE + r] = tile[y[r], r] if knows_class else zero
            if counts:
                work[OWN_MARGIN + r] = table[TABLE + y[r] * (c + 1)] if pairs else options[rowmath.MARGIN]
        aim_rows(work, n, options)
        for r in range(n):
            work[TARGET + r] = real(y[r]) if knows_class else zero
            work[SUMS + r] = none if is_max else zero
            work[LOW + r] = zero
            for t in range(1, terms):
                work[SUMS + TILE * t + r] = zero
        k = 0
        while k + 2 <= c:
            open_pair(tile, more, table, y, work, k, c, n, options)
            k += 2
        if k < c:
            open_class(tile, more, table, y, work, k, c, n, options)
        if not is_max:
            for r in range(n):
                work[LOW + r] = number_or_zero(work[LOW + r])
        settle_rows(work, n, options)

    @cpu.helper
    def close_rows(tile, more, table, y, work, c, n, options):
        if is_max:
            _give_to_the_largest(tile, y, work, c, n)
        elif closes:
            for k in range(c):
                w = table[TABLE + k] if weights else zero
                for r in range(n):
                    known = work[KNOWN + r], work[K1 + r], work[K2 + r]
                    numbers = work[NUMBERS + r], work[N1 + r], work[N2 + r], work[N3 + r]
                    is_target = work[TARGET + r] == real(k) if knows_class else False
                    q = number(more, table, y, work, k, c, r)
                    tile[k, r] = close(tile[k, r], q, w, is_target, known, numbers, options)
        if has_target and not is_max:
            for r in range(n):
                tile[y[r], r] = work[ENTRY + r]

    @cpu.helper
    def _give_to_the_largest(tile, y, work, c, n):
        for r in range(n):
            largest, at = work[N1 + r], -1
            for k in range(c):
                if at < 0 and k != y[r] and (tile[k, r] == largest or tile[k, r] != tile[k, r]):
                    at = k
                tile[k, r] = zero
            if at >= 0:
                tile[at, r] = work[NUMBERS + r]
                tile[y[r], r] = -work[NUMBERS + r]

    return Walks(open_rows, close_rows)


def tile_losses(plan: Plan, real: Any) -> Any:
    """The row losses of a tile of scores, and the gradient in its place: for whoever makes scores itself.

    Returns a function that kernels can call:

    tile_losses(scores, n, y, probabilities, weights, losses, wants_gradient, options)
        scores : (C, R) contiguous, R ≤ TILE: row r of the tile is scores[:, r]. The first n rows are computed; they
            receive the gradients times `weights`, or, without `wants_gradient`, anything.
        y : (R,) int64, class indices; not read if the plan has probabilities
        probabilities : (C, R), or (0, R) if the plan has none
        weights : (R,) the rows' multipliers, not 0
        losses : (R,) receives the unweighted row losses
        options : `options_of`(loss, C, plan, real)

    Parameters
    ----------
    plan : Plan
        `rowmath.plan_of`(loss, whether targets are probabilities).
    real : np.float32 or np.float64
        The type of all of these.
    """
    walks = _tiled(plan, rowmath.build(plan, cpu.helper, cpu.tools(real)), real)
    open_tile, close_tile = walks.open, walks.close

    @numba.njit(error_model="numpy")
    def losses_of_tile(scores, n, y, probabilities, weights, losses, wants_gradient, options):
        work = np.empty(WORK, real)
        for r in range(n):
            work[FACTOR + r] = weights[r]
        numbers = (
            options[0], options[1], options[2], options[3], options[4], options[5], options[6], options[7]
        )  # fmt: skip
        c = len(scores)
        open_tile(scores, probabilities, options, y, work, c, n, numbers)
        if wants_gradient:
            close_tile(scores, probabilities, options, y, work, c, n, numbers)
        for r in range(n):
            losses[r] = work[LOSS + r]

    return losses_of_tile


# --- rowed ----------------------------------------------------------------------------------------------------------
def _rowed(plan: Plan, row: Any, real: Any, load: Any, save: Any, writes: bool, direct: bool) -> Any:
    """The walk along one row: its terms, added up. `direct`: from the scores themselves, as they are stored."""
    step, top, exact_sum = row.step, row.top, row.functions.exact_sum
    zero, none = real(0), real(-np.inf)
    probabilities, weights, pairs = plan.probabilities, plan.weights, plan.pairs
    is_max, wide = plan.kind == "hinge max", real is np.float32
    size = BLOCKS.get((plan.kind, real), BLOCK)
    # Terms of the hinge are as large as their sum's rounding allows; those of the softmax only matter by a logarithm.
    sum_type = np.float64 if plan.kind == "hinge" else real
    excludes = plan.kind in ("softmax", "hinge", "hinge max") and not plan.shard and not probabilities

    def block_walk(is_careful):
        @cpu.reducer
        def walk(source, kept, more, weight, y, known, options):
            t0, t1, t2, t3, t4, t5 = none if is_max else sum_type(0), zero, zero, zero, zero, zero
            for j in range(source.size):
                q = more[j] if probabilities or pairs else zero
                w = weight[j] if weights else zero
                # In place is said so: where two arrays may overlap, vectors are not made.
                x = load(source[j]) if direct else kept[j]
                k, u0, u1, u2, u3, u4, u5 = step(x, q, w, is_careful and j == y, known, options)
                if writes:
                    kept[j] = save(k)
                t0 = top(t0, u0) if is_max else t0 + sum_type(u0)
                t1 += u1
                t2 += u2
                t3 += u3
                t4 += u4
                t5 += u5
            return t0, t1, t2, t3, t4, t5

        return walk

    plain, careful = block_walk(False), block_walk(excludes)

    @cpu.helper
    def add(total, lost, x):
        if wide:
            return total + np.float64(x), lost
        found, rest = exact_sum(total, x)
        return found, lost + rest

    @cpu.helper
    def tail(lost):
        # Where a sum is infinite, what it lacks is NaN.
        return lost if lost == lost else np.float64(0)

    @cpu.helper
    def open_row(source, kept, more, weight, c, y, known, options):
        # The row's terms, and what the first lacks. If direct, `source` and `kept` do not overlap; else they are one.
        t0, low = np.float64(none if is_max else zero), np.float64(0)
        t1, t2, t3, t4, t5 = np.float64(0), np.float64(0), np.float64(0), np.float64(0), np.float64(0)
        l1, l2, l3, l4, l5 = np.float64(0), np.float64(0), np.float64(0), np.float64(0), np.float64(0)
        for a in range(0, c, size):
            b = min(c, a + size)
            part = more[a:b] if probabilities or pairs else more
            some = weight[a:b] if weights else weight
            if excludes and a <= y < b:
                u0, u1, u2, u3, u4, u5 = careful(source[a:b], kept[a:b], part, some, y - a, known, options)
            else:
                u0, u1, u2, u3, u4, u5 = plain(source[a:b], kept[a:b], part, some, 0, known, options)
            if is_max:
                t0 = cpu.larger(t0, np.float64(u0))
            else:
                t0, low = add(t0, low, u0)
            t1, l1 = add(t1, l1, u1)
            t2, l2 = add(t2, l2, u2)
            t3, l3 = add(t3, l3, u3)
            t4, l4 = add(t4, l4, u4)
            t5, l5 = add(t5, l5, u5)
        if not wide:
            t1, t2, t3, t4, t5 = t1 + tail(l1), t2 + tail(l2), t3 + tail(l3), t4 + tail(l4), t5 + tail(l5)
        if wide and not is_max:
            low = t0 - np.float64(real(t0))
        low = tail(low)
        return real(t0), real(t1), real(t2), real(t3), real(t4), real(t5), real(low)

    return open_row


# --- the kernel -----------------------------------------------------------------------------------------------------
def rows_kernel(plan: Plan, dtype: str, tiled: bool, wants_gradient: bool) -> Any:
    """The work on some segments of rows of scores of a type."""
    stored = cpu.storage(dtype)
    real = stored.real
    row = rowmath.build(plan, cpu.helper, cpu.tools(real))
    load, save, close, top = stored.load, stored.save, row.close, row.top
    none, zero, one, like = real(-np.inf), real(0), real(1), stored.like(0)
    stored_type = stored.like
    itemsize = np.dtype(stored_type).itemsize
    probabilities, pairs, weights, looks, closes = (
        plan.probabilities, plan.pairs, plan.weights, plan.looks, plan.closes
    )  # fmt: skip
    has_target, is_max, counts, general = plan.has_target, plan.kind == "hinge max", plan.counts_target, plan.general
    with_targets = plan.kind in ("softmax", "hinge", "hinge max") and not plan.shard and not probabilities
    padded = looks and not general
    direct = plan.kind == "hinge"  # the first walk makes the gradient: from the scores to where it belongs
    if tiled:
        walks = _tiled(plan, row, real)
        open_tile, close_tile = walks.open, walks.close
        open_row = aim_rows = settle_rows = cpu.nothing
    else:
        open_tile = close_tile = cpu.nothing
        if direct:
            open_row = _rowed(plan, row, real, load, save, wants_gradient, True)
        else:
            open_row = _rowed(plan, row, real, cpu.same, cpu.same, wants_gradient or is_max, False)
        aim_rows, settle_rows = _aim_and_settle(plan, row, real)

    @cpu.reducer
    def copy_and_look(source, kept):
        m = none
        for j in range(source.size):
            x = load(source[j])
            kept[j] = x
            if looks:
                m = top(m, x)
        return m

    @cpu.helper
    def fetch(base, step, c, kept):
        # A row to scratch; its maximum.
        if step == itemsize:
            m = copy_and_look(cpu.numbers_at(base, c, like), kept[:c])
        else:
            m = none
            for j in range(c):
                x = load(cpu.get(base + j * step, like))
                kept[j] = x
                m = top(m, x)
        if padded:
            for j in range(c, kept.size):
                kept[j] = none
        return m

    @cpu.helper
    def finish(kept, out, more, weight, y, known, numbers, options):
        # The gradient of a row from scratch; `out` may be the same.
        for j in range(out.size):
            if closes and not is_max:
                q = more[j] if probabilities or pairs else zero
                w = weight[j] if weights else zero
                out[j] = save(close(kept[j], q, w, weights and with_targets and j == y, known, numbers, options))
            elif is_max:
                out[j] = save(zero)
            else:
                out[j] = save(kept[j])

    @cpu.helper
    def largest(kept, y, top_margin):
        # The lowest class with the largest margin, or the first NaN; the row's size if none.
        for j in range(kept.size):
            if j != y and (kept[j] == top_margin or kept[j] != kept[j]):
                return j
        return kept.size

    @cpu.helper
    def give(out, kept, work, r, y):
        # What is not like other entries.
        if is_max:
            at = largest(kept, y, work[N1 + r])
            if at < out.size:
                out[at] = save(work[NUMBERS + r])
                out[y] = save(work[ENTRY + r])
        elif has_target:
            out[y] = save(work[ENTRY + r])

    @cpu.helper
    def rowed_group(base, strides, out_base, out_strides, place, y, q, table, work, tile, buffer, n, c, options):
        for r in range(n):
            m = fetch(base + place[r] * strides[0], strides[1], c, tile[r])
            work[TOP + r] = m
            work[OWN_SCORE + r] = tile[r, y[r]] if with_targets else zero
            if counts:
                work[OWN_MARGIN + r] = table[TABLE + y[r] * (c + 1)] if pairs else options[rowmath.MARGIN]
        aim_rows(work, n, options)
        stop = tile.shape[1] if padded else c
        some = table[TABLE : TABLE + c] if weights else table
        for r in range(n):
            more = q[place[r]] if probabilities else table
            if pairs:
                more = table[TABLE + y[r] * c : TABLE + (y[r] + 1) * c]
            known = work[KNOWN + r], work[K1 + r], work[K2 + r]
            t0, t1, t2, t3, t4, t5, low = open_row(tile[r], tile[r], more, some, stop, y[r], known, options)
            work[SUMS + r], work[S1 + r], work[S2 + r], work[S3 + r] = t0, t1, t2, t3
            work[S4 + r], work[S5 + r], work[LOW + r] = t4, t5, low
        settle_rows(work, n, options)
        if wants_gradient:
            for r in range(n):
                more = q[place[r]] if probabilities else table
                if pairs:
                    more = table[TABLE + y[r] * c : TABLE + (y[r] + 1) * c]
                known = work[KNOWN + r], work[K1 + r], work[K2 + r]
                numbers = work[NUMBERS + r], work[N1 + r], work[N2 + r], work[N3 + r]
                to = out_base + place[r] * out_strides[0]
                out = cpu.numbers_at(to, c, like) if out_strides[1] == itemsize else buffer[:c]
                finish(tile[r, :c], out, more, some, y[r], known, numbers, options)
                give(out, tile[r, :c], work, r, y[r])
                if out_strides[1] != itemsize:
                    for j in range(c):
                        cpu.put(to + j * out_strides[1], buffer[j])

    @cpu.helper
    def direct_group(base, strides, out_base, out_strides, place, y, q, table, work, tile, buffer, n, c, options):
        for r in range(n):
            work[OWN_SCORE + r] = load(cpu.get(base + place[r] * strides[0] + y[r] * strides[1], like))
            if counts:
                work[OWN_MARGIN + r] = table[TABLE + y[r] * (c + 1)] if pairs else options[rowmath.MARGIN]
        aim_rows(work, n, options)
        for r in range(n):
            at, to = base + place[r] * strides[0], out_base + place[r] * out_strides[0]
            more = table[TABLE + y[r] * c : TABLE + (y[r] + 1) * c] if pairs else table
            source, out = buffer[:c], buffer[c:]
            if strides[1] != itemsize or at == to:  # vectors are made only where what is read is not what is written
                for j in range(c):
                    buffer[j] = cpu.get(at + j * strides[1], like)
            else:
                source = cpu.numbers_at(at, c, like)
            if wants_gradient and out_strides[1] == itemsize:
                out = cpu.numbers_at(to, c, like)
            known = work[KNOWN + r], work[K1 + r], work[K2 + r]
            t0, t1, t2, t3, t4, t5, low = open_row(source, out, more, table, c, y[r], known, options)
            work[SUMS + r], work[S1 + r], work[S2 + r], work[S3 + r] = t0, t1, t2, t3
            work[S4 + r], work[S5 + r], work[LOW + r] = t4, t5, low
            if wants_gradient and out_strides[1] != itemsize:
                for j in range(c):
                    cpu.put(to + j * out_strides[1], out[j])
        settle_rows(work, n, options)
        if wants_gradient:
            for r in range(n):
                to = out_base + place[r] * out_strides[0] + y[r] * out_strides[1]
                cpu.put(to, save(work[ENTRY + r]))

    @cpu.helper
    def tiled_group(base, strides, out_base, out_strides, place, y, q, table, work, tile, more, n, c, options):
        for r in range(n):
            at = base + place[r] * strides[0]
            for k in range(c):
                tile[k, r] = load(cpu.get(at + k * strides[1], like))
            if probabilities:
                for k in range(c):
                    more[k, r] = q[place[r], k]
        open_tile(tile, more, table, y, work, c, n, options)
        if wants_gradient:
            close_tile(tile, more, table, y, work, c, n, options)
            for r in range(n):
                to = out_base + place[r] * out_strides[0]
                for k in range(c):
                    cpu.put(to + k * out_strides[1], save(tile[k, r]))

    number = getattr(types, np.dtype(real).name)
    vector, matrix = types.Array(number, 1, "A"), types.Array(number, 2, "C", readonly=True)
    numbers = types.Array(number, 1, "C", readonly=True)
    signature = types.void(
        types.Array(stored.kind, 2, "A", readonly=True), types.Array(types.int64, 1, "C", readonly=True), numbers,
        number, types.Array(stored.kind, 2, "A"), vector, vector, vector, matrix, numbers,
        types.Array(types.float64, 1, "C"), types.intp, types.intp, types.intp,
    )  # fmt: skip

    @numba.njit(signature, nogil=True, error_model="numpy")
    def kernel(
        scores, targets, multiplier, scale, grad, losses, zs, entropies, q, table, sums, segment, first, last
    ):
        mode = cpu.set_rounding_of_tiny(np.int32(-1))
        n_rows, c = scores.shape
        options = (table[0], table[1], table[2], table[3], table[4], table[5], table[6], table[7])
        place, y, work = np.zeros(TILE, np.int64), np.zeros(TILE, np.int64), np.zeros(WORK, real)
        if tiled:
            size, tile = TILE, np.zeros((c, TILE), real)
            more = np.zeros((c if probabilities else 0, TILE), real)
        else:
            width = (c + PAD - 1) // PAD * PAD
            size = max(1, min(TILE, GROUP_BYTES // (width * work.itemsize)))
            tile, buffer = np.empty((size, width), real), np.empty(2 * c, stored_type)
        base, out_base = scores.ctypes.data, grad.ctypes.data
        for s in range(first, last):
            i, stop, total = s * segment, min(n_rows, (s + 1) * segment), 0.0
            while i < stop:
                n = 0
                while n < size and i < stop:
                    weight = multiplier[i] if multiplier.size else one
                    if weight != zero:
                        place[n] = i
                        if with_targets:
                            y[n] = targets[i]
                        work[WEIGHT + n], work[FACTOR + n] = weight, weight * scale
                        n += 1
                    else:
                        if wants_gradient:
                            for k in range(c):
                                grad[i, k] = save(zero)
                        if losses.size:
                            losses[i] = zero
                        if zs.size:
                            zs[i] = zero
                        if entropies.size:
                            entropies[i] = zero
                    i += 1
                if tiled:
                    tiled_group(
                        base, scores.strides, out_base, grad.strides, place, y, q, table, work, tile, more, n, c,
                        options,
                    )  # fmt: skip
                elif direct:
                    direct_group(
                        base, scores.strides, out_base, grad.strides, place, y, q, table, work, tile, buffer, n, c,
                        options,
                    )  # fmt: skip
                else:
                    rowed_group(
                        base, scores.strides, out_base, grad.strides, place, y, q, table, work, tile, buffer, n, c,
                        options,
                    )  # fmt: skip
                for r in range(n):
                    total += np.float64(work[WEIGHT + r]) * np.float64(work[LOSS + r])
                if losses.size:
                    for r in range(n):
                        losses[place[r]] = work[LOSS + r]
                if zs.size:
                    for r in range(n):
                        zs[place[r]] = work[Z + r]
                if entropies.size:
                    for r in range(n):
                        entropies[place[r]] = work[ENTROPY + r]
            sums[s] = total
        cpu.set_rounding_of_tiny(mode)

    return kernel


# --- from Python ----------------------------------------------------------------------------------------------------
PARALLEL = 1 << 15  # numbers for each thread, at least
NO_TARGETS = np.empty(0, np.int64)


def raw(array: Array) -> Array:
    """16-bit floats as the integers that their bits are, which Numba has; other numbers as they are."""
    return array.view(np.uint16) if array.itemsize == 2 else array


class Nothing(NamedTuple):
    """Arguments that are left out, in a compute type."""

    vector: Array
    matrix: Array

    @classmethod
    @functools.cache
    def of(cls, real: Any) -> Nothing:
        return cls(np.empty(0, real), np.empty((0, 0), real))


@functools.cache
def no_gradient(dtype: np.dtype[Any]) -> Array:
    return raw(np.empty((0, 0), dtype))


def run(
    plan: Plan, table: Array, scores: Array, targets: Array, multiplier: Array | None, scale: float,
    grad: Array | None, losses: Array | None, z: Array | None, entropy: Array | None, n_threads: int,
) -> float:  # fmt: skip
    """A plan on all rows; Σ multiplier · ℓ. Targets are probabilities if the plan has them."""
    n, c = scores.shape
    tiled = c <= FEW_CLASSES
    kernel = cpu.made(rows_kernel, plan, scores.dtype.name, tiled, grad is not None)
    if not n:
        return 0.0
    real = table.dtype
    none = Nothing.of(real)
    q, y = none.matrix, targets
    if plan.probabilities:
        q, y = np.require(targets, real, ["C", "A"]), NO_TARGETS
    elif y.dtype != np.int64 or not y.flags.c_contiguous or not y.flags.aligned:
        y = np.require(y, np.int64, ["C", "A"])
    if not scores.flags.aligned:
        scores = scores.copy()
    segments = min(SEGMENTS, -(-scores.size * real.itemsize // SEGMENT_BYTES))
    segment = -(-n // segments)
    if tiled:
        segment = -(-segment // TILE) * TILE
    segments = -(-n // segment)
    sums = np.empty(segments)
    vector = none.vector
    arguments = (
        raw(scores), y, vector if multiplier is None else np.require(multiplier, real, ["C", "A"]), real.type(scale),
        no_gradient(scores.dtype) if grad is None else raw(grad), vector if losses is None else losses,
        vector if z is None else z, vector if entropy is None else entropy, q, table, sums, segment,
    )  # fmt: skip
    cpu.run(lambda first, last: kernel(*arguments, first, last), segments, min(n_threads, scores.size // PARALLEL))
    return float(sums[0]) if segments == 1 else float(sums.sum())


def score_rows(
    loss: Any, scores: Array, targets: Array, multiplier: Array | None, scale: float, grad: Array | None,
    row_loss: Array | None, extras: dict[str, Array], n_threads: int,
) -> float:  # fmt: skip
    """`Backend.score_rows`."""
    if "argmax" in extras:  # before the gradient, which may be written to the scores
        find_largest(scores, multiplier, extras["argmax"], n_threads)
    z, entropy = extras.get("lse"), extras.get("entropy")
    plan = rowmath.plan_of(loss, targets.ndim == 2, z is not None, entropy is not None)
    real = np.float64 if scores.dtype == np.float64 else np.float32
    table = options_of(loss, scores.shape[1], plan, real)
    return run(plan, table, scores, targets, multiplier, scale, grad, row_loss, z, entropy, n_threads)


TRANSFORMS = {"softmax": Plan("p"), "log_softmax": Plan("log p"), "logsumexp": Plan("lse")}


def transform(kind: str, scores: Array, out: Array, n_threads: int) -> None:
    """`Backend.transform`."""
    if not scores.size:
        out[...] = 0
        return
    real = np.float64 if scores.dtype == np.float64 else np.float32
    grad, losses = (None, out) if kind == "logsumexp" else (out, None)
    if losses is not None and losses.dtype != real:
        losses = np.empty(len(scores), real)
    table = np.zeros(8, real)
    run(TRANSFORMS[kind], table, scores, NO_TARGETS, None, 1.0, grad, losses, None, None, n_threads)
    if losses is not None and losses is not out:
        out[...] = losses


def shard_options(loss: Any, plan: Plan, share: float, weights: Array, real: Any) -> Array:
    """The options of a shard of classes; u, without a target, is `share`, times the class weights if it has them."""
    table = rowmath.numbers_of(loss, len(weights), real)
    table[rowmath.ELSEWHERE] = table[rowmath.AT_TARGET] = share
    return np.concatenate([table, weights.astype(real)]) if plan.weights else table


def shard_sums(loss: Any, scores: Array, weights: Array, n_threads: int) -> tuple[Array, Array, Array]:
    """Of some of the classes: each row's largest score, Σ exp(d) but for one that has it, and Σ w (−d)."""
    real = np.float64 if scores.dtype == np.float64 else np.float32
    tops, rest, away = np.full(len(scores), -np.inf, real), *np.zeros((2, len(scores)), real)
    if scores.size:
        plan = rowmath.plan_of(loss, False, shard=True)
        table = shard_options(loss, plan, 1.0, weights, real)
        run(plan, table, scores, NO_TARGETS, None, 1.0, None, away, tops, rest, n_threads)
    return tops, rest, away


# --- the largest class, and gradients from stats --------------------------------------------------------------------
def largest_kernel(dtype: str) -> Any:
    """The lowest class that has the row's maximum, or the first NaN."""
    stored = cpu.storage(dtype)
    load, like, none = stored.load, stored.like(0), stored.real(-np.inf)

    @cpu.reducer
    def look(row):
        m = none
        for j in range(row.size):
            m = cpu.larger(m, load(row[j]))
        return m

    @numba.njit(
        types.void(
            types.Array(stored.kind, 2, "A", readonly=True), types.Array(types.boolean, 1, "C"),
            types.Array(types.intp, 1, "A"), types.intp, types.intp,
        ),
        nogil=True, error_model="numpy",
    )  # fmt: skip
    def kernel(scores, skipped, found, first, last):
        c, step = scores.shape[1], scores.strides[1]
        for i in range(first, last):
            found[i] = 0
            if skipped.size and skipped[i]:
                continue
            at = scores.ctypes.data + i * scores.strides[0]
            if step == scores.itemsize:
                m = look(cpu.numbers_at(at, c, like))
            else:
                m = none
                for j in range(c):
                    m = cpu.larger(m, load(cpu.get(at + j * step, like)))
            for j in range(c):
                x = load(cpu.get(at + j * step, like))
                if x == m or x != x:
                    found[i] = j
                    break

    return kernel


def find_largest(scores: Array, multiplier: Array | None, found: Array, n_threads: int) -> None:
    """The largest class of each row; 0 for rows that are skipped."""
    skipped = np.empty(0, np.bool_) if multiplier is None else multiplier == 0
    kernel = cpu.made(largest_kernel, scores.dtype.name)
    numbers = raw(scores if scores.flags.aligned else scores.copy())
    threads = min(n_threads, scores.size // PARALLEL)
    cpu.run(lambda first, last: kernel(numbers, skipped, found, first, last), len(scores), threads)


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
    entry at the target, and multiplier; and u of the other classes, as `shard_options` takes it.
    """
    plan = rowmath.plan_of(loss, False, shard=True)
    kernel = cpu.made(from_stats_kernel, plan, scores.dtype.name)
    numbers = raw(scores if scores.flags.aligned else scores.copy())
    table = shard_options(loss, plan, share, weights, top.dtype)
    given = column, top, pull, at_target, weight, raw(grad), table
    threads = min(n_threads, scores.size // PARALLEL)
    cpu.run(lambda first, last: kernel(numbers, *given, first, last), len(scores), threads)
