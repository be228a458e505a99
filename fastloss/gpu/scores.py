"""Kernels of given scores: loss, gradient and extra outputs of rows, and softmax, log-softmax and log-sum-exp.

Rows that fit (`_build_rows`). A block takes tiles of whole rows that follow each other in memory: 1 if many threads (a
`team`) share a row, else as many as it has teams; a thread has a row of its own where there are few classes. The
tile's numbers come in 16 bytes at a time, four loads under way in each thread, wherever rows begin, and are kept in
shared memory in the compute type; walks over them are by four numbers. What is kept for the gradient (exponentials)
takes their place, then the gradient, which leaves in 16 bytes at a time. Traffic: each score is read once and written
once. Rows in shared memory are apart by a pitch that spreads what threads read together over all banks.

Rows that do not fit (`_build_long_rows`). A row is split into blocks of classes. There are two tasks for each: `look`
leaves the block's state in a workspace, `close` waits for all states of its row, adds them up in order, and writes the
gradient of its classes. Tasks are taken in an order in which a row's second task follows soon on its first, so that
the second cache still has its scores; a task waits only for tasks that were taken before it, so there is no deadlock.

Same bits every time: no sum of floats depends on which thread was first. Sums of a row are of its threads' parts, in
order; the blocks' losses are added up in order, in float64, by the block that is done last.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from fastloss.gpu import device
from fastloss.jit import rowmath
from fastloss.jit.rowmath import MARGIN, TERMS

#: What a call wants and has, as bits of `flags`.
GRADIENT, WEIGHTED, PULLED, SHARED_TOTAL, VALUES, ROW_LOSS, LSE, ENTROPY, ARGMAX, WRITES_VALUE = (
    1 << k for k in range(10)
)
#: The numbers that blocks share: tasks taken, blocks done, the first row with a bad target.
TAKEN, DONE, BAD = range(3)
NO_ROW = np.iinfo(np.int64).max
WIDTH = TERMS + 1
#: Numbers of a block of a long row: maximum, state, the target's score; the largest score and its class; the class of
#: the largest margin, and that.
RECORD = WIDTH + 6
#: Where class weights, or margins of class pairs, begin in the array of options: after the numbers of all losses.
TABLE = 8
#: Classes of a block of a long row, and bytes of scores between a row's first task and its second, about.
BLOCK_CLASSES, BETWEEN_BYTES = 1 << 14, 8 << 20
#: What the kernels tell the host of, in words that it sees: what is wrong (0: nothing), where, what is there, classes.
NOTHING, BAD_TARGET, BAD_PROBABILITY, BAD_WEIGHT, BAD_STATS = range(5)


def _trouble(plan: Plan) -> int:
    """What a bad row of a plan is."""
    return BAD_PROBABILITY if plan.row.probabilities else BAD_TARGET


class Plan(NamedTuple):
    """What a kernel is compiled for: the row loss, the type of the scores, and whether the largest class is wanted."""

    row: rowmath.Plan
    dtype: str
    argmax: bool = False

    @property
    def has_index(self) -> bool:
        """Whether targets are class indices."""
        return self.row.has_index

    @property
    def writes_rows(self) -> bool:
        """Whether there is a number for each score."""
        return self.row.kind != "lse"


def _tools(dtype: str) -> Any:
    """What the row mathematics is made of, in the compute type."""
    real = np.float64 if dtype == "float64" else np.float32
    if device.SIMULATED:
        return rowmath.plain_tools(real)
    integer = np.int64 if dtype == "float64" else np.int32
    number = device.float64_of if dtype == "float64" else device.float32_of
    return SimpleNamespace(
        real=real, integer=integer, larger=device.larger, bits=device.bits, number=number, choose=rowmath.choose,
        exp=None,
    )  # fmt: skip


def _row(plan: Plan) -> Any:
    """The row mathematics of a plan, and what kernels add to it.

    A state is what a thread has of a walk: the first term's sum, what it lost by rounding, and the other terms' sums.
    """
    tools, jit = _tools(plan.dtype), device.device_function
    row = rowmath.build(plan.row, jit, tools)
    real, exact_sum, larger = tools.real, row.functions.exact_sum, tools.larger
    is_max = plan.row.kind == "hinge max"
    row.real, row.larger = real, larger
    row.width = width = plan.row.terms + 1
    row.empty = (real(-np.inf if is_max else 0),) + (real(0),) * (width - 1)
    precise = device.REAL[plan.dtype] == plan.dtype  # results of 16 bits have no use for what sums round off

    def first(total, lost, x):
        if is_max:
            return larger(total, x), lost
        if precise:
            total, rest = exact_sum(total, x)
            return total, lost + rest
        return total + x, lost

    scope = {"first": jit(first), "zero": real(0)}
    others = range(2, width)
    source = f"""
def add(state, found):
    total, lost = first(state[0], state[1], found[1])
    return (total, lost{"".join(f", state[{k}] + found[{k}]" for k in others)})

def merge(a, b):
    total, lost = first(a[0], a[1] + b[1], b[0])
    return (total, lost{"".join(f", a[{k}] + b[{k}]" for k in others)})

def sums(state):
    return (state[0]{"".join(f", state[{k}]" for k in others)}{", zero" * (TERMS + 1 - width)})
"""
    exec(source, scope)
    row.add, row.merge, row.sums = jit(scope["add"]), jit(scope["merge"]), jit(scope["sums"])

    def first_top(value, at, x, j):
        # The larger, of equals the lower class; NaN is above all.
        # Without branches: where threads part, registers are taken that there are few of.
        is_lower = j < at
        better = (x > value) | ((x == value) & is_lower)
        better = ((x != x) & (is_lower | (value == value))) | (better & (value == value))
        return (x if better else value), (j if better else at)

    row.first_top = jit(first_top)
    return row


def _scratch(plan: Plan) -> int:
    """Numbers of shared memory before the rows: what reductions take, and sums in float64."""
    return device.SCRATCH * WIDTH


def _walks(plan: Plan, row: Any) -> SimpleNamespace:
    """Walks of one thread of a team over numbers in shared memory, four at a time: k, k + stride, ... below stop.
    `first` is the class of the first number there.
    """
    jit, load4, store4, load = device.device_function, device.load4, device.store4, device.load
    real, zero, none = row.real, row.real(0), row.real(-np.inf)
    step, close, add, larger, empty = row.step, row.close, row.add, row.larger, row.empty
    first_top, nowhere = row.first_top, real(np.inf)
    probabilities, pairs, weights, kind = plan.row.probabilities, plan.row.pairs, plan.row.weights, plan.row.kind
    # −inf, which fills rows up to a multiple of four, adds nothing here.
    is_neutral = kind in ("p", "log p", "lse") or (kind == "softmax" and not plan.row.general)
    has_target, closes, is_max = plan.row.has_target, plan.row.closes, kind == "hinge max"
    table = TABLE

    def extra(j, c, y, table_of, q, q_at):
        # The class's probability, or margin of the pair.
        if probabilities and j < c:
            return load(q, q_at + j)
        if pairs and j < c:
            return load(table_of, table + y * c + j)
        return zero

    def weight(j, c, table_of):
        return load(table_of, table + j) if weights and j < c else zero

    def two_weights(j, c, table_of):
        if j < c:
            return load(table_of, table + j), load(table_of, table + c + j)
        return zero, zero

    extra, weight = jit(extra), jit(two_weights if weights and plan.row.is_apart else weight)

    def one_step(state, x, j, c, y, known, options, table_of, q, q_at):
        found = step(x, extra(j, c, y, table_of, q, q_at), weight(j, c, table_of), j == y, known, options)
        if is_neutral or j < c:
            state = add(state, found)
        return state, found[0]

    one_step = jit(one_step)

    def entry(x, again, j, c, y, known, options, table_of, q, q_at, at_target, numbers):
        if has_target and j == y:
            return at_target
        if again or closes:
            u, w = extra(j, c, y, table_of, q, q_at), weight(j, c, table_of)
            if again:
                x = step(x, u, w, j == y, known, options)[0]
            if closes:
                x = close(x, u, w, j == y, known, numbers, options)
        return x

    entry = jit(entry)

    def top(s, at, k, stride, stop):
        m = none
        while k < stop:
            a, b, c, d = load4(s, at + k)
            m = larger(m, larger(larger(a, b), larger(c, d)))
            k += stride
        return m

    def argmax(s, at, k, stride, stop, first, c):
        value, index = none, nowhere
        while k < stop:
            j = first + k
            four = load4(s, at + k)
            value, index = first_top(value, index, four[0], real(j))
            if j + 1 < c:
                value, index = first_top(value, index, four[1], real(j + 1))
            if j + 2 < c:
                value, index = first_top(value, index, four[2], real(j + 2))
            if j + 3 < c:
                value, index = first_top(value, index, four[3], real(j + 3))
            k += stride
        return value, index

    def state(s, at, k, stride, stop, first, keeps, c, y, known, options, table_of, q, q_at):
        found = empty
        while k < stop:
            j = first + k
            x0, x1, x2, x3 = load4(s, at + k)
            found, x0 = one_step(found, x0, j, c, y, known, options, table_of, q, q_at)
            found, x1 = one_step(found, x1, j + 1, c, y, known, options, table_of, q, q_at)
            found, x2 = one_step(found, x2, j + 2, c, y, known, options, table_of, q, q_at)
            found, x3 = one_step(found, x3, j + 3, c, y, known, options, table_of, q, q_at)
            if keeps:
                store4(s, at + k, x0, x1, x2, x3)
            k += stride
        return found

    def gradient(again):
        # `again`: nothing was kept, the scores are still there.
        def walk(s, at, k, stride, stop, first, c, y, known, options, table_of, q, q_at, at_target, numbers):
            while k < stop:
                j = first + k
                x0, x1, x2, x3 = load4(s, at + k)
                x0 = entry(x0, again, j, c, y, known, options, table_of, q, q_at, at_target, numbers)
                x1 = entry(x1, again, j + 1, c, y, known, options, table_of, q, q_at, at_target, numbers)
                x2 = entry(x2, again, j + 2, c, y, known, options, table_of, q, q_at, at_target, numbers)
                x3 = entry(x3, again, j + 3, c, y, known, options, table_of, q, q_at, at_target, numbers)
                store4(s, at + k, x0, x1, x2, x3)
                k += stride

        return jit(walk)

    def lowest(s, at, k, stride, stop, first, c, y, known, options, table_of, q, q_at, top):
        # over="max": the first class whose margin is the largest; NaN is.
        found = nowhere
        while k < stop:
            for e in range(4):
                j = first + k + e
                u, w = extra(j, c, y, table_of, q, q_at), weight(j, c, table_of)
                x = step(s[at + k + e], u, w, j == y, known, options)[0]
                is_top = (j < c) & ((x == top) | (x != x))
                found = min(found, real(j) if is_top else nowhere)
            k += stride
        return found

    def at_class(s, at, k, stride, stop, first, y, at_target, index, at_index):
        # over="max": two entries, and zeros.
        while k < stop:
            j = first + k
            x0 = at_target if j == y else (at_index if real(j) == index else zero)
            x1 = at_target if j + 1 == y else (at_index if real(j + 1) == index else zero)
            x2 = at_target if j + 2 == y else (at_index if real(j + 2) == index else zero)
            x3 = at_target if j + 3 == y else (at_index if real(j + 3) == index else zero)
            store4(s, at + k, x0, x1, x2, x3)
            k += stride

    def fill(s, at, k, stride, stop, x):
        while k < stop:
            store4(s, at + k, x, x, x, x)
            k += stride

    return SimpleNamespace(
        top=jit(top), argmax=jit(argmax), state=jit(state), gradient=gradient, at_class=jit(at_class), fill=jit(fill),
        lowest=jit(lowest), is_max=is_max,
    )  # fmt: skip


def _mover(into_shared: bool, size: int) -> Any:
    """Numbers `start` to `start + count` of global memory to rows of c in shared memory, `pitch` apart, or back.

    lead: how many numbers `start` is past a multiple of 16 bytes. A block's threads share the work.
    """
    wide, put_wide, scatter, load = device.wide, device.put_wide, device.scatter, device.load
    store_wide, take_wide, gather, store = device.store_wide, device.take_wide, device.gather, device.store
    per = device.WIDE // size
    half = np.float32(0.5)

    def aligned_in(p, start, count, s, at, c, skip, t, threads):
        per_c = np.float32(1) / np.float32(c)
        step = per * threads
        e = per * t
        while e + 3 * step < count:
            a, b = wide(p, start + e), wide(p, start + e + step)
            d, f = wide(p, start + e + 2 * step), wide(p, start + e + 3 * step)
            put_wide(p, a, s, at + e + skip * int((np.float32(e) + half) * per_c))
            put_wide(p, b, s, at + e + step + skip * int((np.float32(e + step) + half) * per_c))
            put_wide(p, d, s, at + e + 2 * step + skip * int((np.float32(e + 2 * step) + half) * per_c))
            put_wide(p, f, s, at + e + 3 * step + skip * int((np.float32(e + 3 * step) + half) * per_c))
            e += 4 * step
        while e < count:
            put_wide(p, wide(p, start + e), s, at + e + skip * int((np.float32(e) + half) * per_c))
            e += step

    def aligned_out(p, start, count, s, at, c, skip, t, threads):
        per_c = np.float32(1) / np.float32(c)
        step = per * threads
        e = per * t
        while e < count:
            store_wide(p, start + e, take_wide(p, s, at + e + skip * int((np.float32(e) + half) * per_c)))
            e += step

    def any_in(p, start, count, s, at, c, skip, t, threads, lead):
        per_c = np.float32(1) / np.float32(c)
        e = per * t - lead
        while e < count:
            if e >= 0 and e + per <= count:
                r = int((np.float32(e) + half) * per_c)
                scatter(p, wide(p, start + e), s, at + e + skip * r, e - c * r, c, skip)
            else:
                for d in range(per):
                    x = e + d
                    if x >= 0 and x < count:
                        s[at + x + skip * int((np.float32(x) + half) * per_c)] = load(p, start + x)
            e += per * threads

    def any_out(p, start, count, s, at, c, skip, t, threads, lead):
        per_c = np.float32(1) / np.float32(c)
        e = per * t - lead
        while e < count:
            if e >= 0 and e + per <= count:
                r = int((np.float32(e) + half) * per_c)
                store_wide(p, start + e, gather(p, s, at + e + skip * r, e - c * r, c, skip))
            else:
                for d in range(per):
                    x = e + d
                    if x >= 0 and x < count:
                        store(p, start + x, s[at + x + skip * int((np.float32(x) + half) * per_c)])
            e += per * threads

    jit = device.device_function
    aligned = jit(aligned_in if into_shared else aligned_out)
    unaligned = jit(any_in if into_shared else any_out)

    def move(p, start, count, s, at, c, pitch, t, threads, lead):
        if lead == 0 and c % per == 0:
            aligned(p, start, count, s, at, c, pitch - c, t, threads)
        else:
            unaligned(p, start, count, s, at, c, pitch - c, t, threads, lead)

    return jit(move)


def _finisher(plan: Plan, code: int) -> Any:
    """What the block that is done last does: add up the sums of all in order, report a bad row, and clear the words."""
    jit, look, store, load_index = device.device_function, device.look, device.store, device.load_index
    add_and_fetch, threadfence, syncthreads, shared = (
        device.add_and_fetch, device.threadfence, device.syncthreads, device.shared,
    )  # fmt: skip
    zero64, nan, threadfence_system = np.float64(0), np.float64(np.nan), device.threadfence_system
    has_index, least_labels = plan.has_index, 2 if plan.row.is_apart else 1
    taken, done, bad, no_row = TAKEN, DONE, BAD, NO_ROW
    writes_value, shared_total = WRITES_VALUE, SHARED_TOTAL

    def plus(a, b):
        return (a[0] + b[0],)

    reduce = device.reduction(jit(plus), 1)

    def finish(sums, count, blocks, words, errors, targets, kind, c, value, total, value_scale, flags, t, threads):
        # All threads of the block call it; its sums are stored by then.
        d = shared(zero64)
        threadfence()
        syncthreads()
        if t == 0:
            d[0] = float(add_and_fetch(words, done, 1))
        syncthreads()
        last = d[0] == blocks - 1
        syncthreads()
        if not last:
            return
        threadfence()
        found = zero64
        k = t
        while k < count:
            found += look(sums, k)
            k += threads
        (found,) = reduce(d, (found,), (zero64,), t, threads)
        if t == 0:
            if flags & writes_value:
                if flags & shared_total:
                    weight = look(total, 0)
                    found = found / weight if weight > zero64 else nan
                else:
                    found = found * value_scale
                store(value, 0, found)
            row = look(words, bad)
            if row != no_row:
                errors[1] = row
                errors[2] = load_index(targets, row, kind) if has_index else 0
                errors[3] = max(c, least_labels)
                threadfence_system()
                errors[0] = code
            words[bad] = no_row
            words[taken] = 0
            words[done] = 0

    return jit(finish)


#: The arguments of both kernels that are alike. `kind`: see `device.load_index`. scores_lead, grad_lead: how many
#: numbers past a multiple of 16 bytes the arrays begin. extras: row losses, lse and entropies, n each.
_ARGUMENTS = (
    ("scores", "T*"), ("grad", "T*"), ("scores_lead", "int64"), ("grad_lead", "int64"), ("n", "int64"), ("c", "int64"),
    ("targets", "uint8*"), ("kind", "int64"), ("q", "R*"), ("options", "R*"),
    ("weight", "float64*"), ("upstream", "float64*"), ("total", "float64*"), ("grad_scale", "float64"),
    ("value_scale", "float64"), ("value", "float64*"), ("values", "R*"), ("extras", "R*"), ("argmax", "int64*"),
    ("sums", "float64*"), ("words", "int64*"), ("errors", "int64*"), ("flags", "int64"), ("blocks", "int64"),
    ("threads", "int64"),
)  # fmt: skip
_OF_ROWS = (("team", "int64"), ("rows", "int64"), ("pitch", "int64"))
_OF_LONG_ROWS = (("records", "float64*"), ("arrived", "int64*"), ("parts", "int64"), ("classes", "int64"),
                 ("group", "int64"), ("groups", "int64"))  # fmt: skip


def _signature(plan: Plan, more: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    names = {"T*": f"{plan.dtype}*", "R*": f"{device.REAL[plan.dtype]}*"}
    return tuple(names.get(kind, kind) for _, kind in _ARGUMENTS + more)


def _row_outputs(plan: Plan, row: Any) -> Any:
    """What one thread writes of a row: its loss, and what else is asked for."""
    store = device.store
    is_lse = plan.row.kind == "lse"
    values_of, row_loss_of, lse_of, entropy_of, argmax_of = VALUES, ROW_LOSS, LSE, ENTROPY, ARGMAX
    real, has_argmax = row.real, plan.argmax

    def put(i, n, loss, z, entropy, index, w, grad, values, extras, argmax, flags):
        if is_lse:
            store(grad, i, loss)
        if flags & values_of:
            store(values, i, real(w * loss) if w != 0.0 else real(0))
        if flags & row_loss_of:
            store(extras, i, loss)
        if flags & lse_of:
            store(extras, n + i, z)
        if flags & entropy_of:
            store(extras, 2 * n + i, entropy)
        if has_argmax and flags & argmax_of:
            argmax[i] = int(index)

    return device.device_function(put)


def _parts(plan: Plan) -> SimpleNamespace:
    """What both kernels are made of."""
    row, size = _row(plan), device.SIZES[plan.dtype]
    jit, load, least, load_index = device.device_function, device.load, device.least, device.load_index
    first_top, larger = row.first_top, row.larger
    real, zero, none = row.real, row.real(0), row.real(-np.inf)
    nowhere, has_index, probabilities, bad_of = real(np.inf), plan.has_index, plan.row.probabilities, BAD
    weighted, pulled, shared_total = WEIGHTED, PULLED, SHARED_TOTAL
    pairs, table, margin = plan.row.pairs, TABLE, MARGIN
    is_apart, most = plan.row.is_apart, real(1 if plan.row.is_apart else np.inf)

    def largest(a, b):
        return (larger(a[0], b[0]),)

    def lowest(a, b):
        return (min(a[0], b[0]),)

    def first(a, b):
        return first_top(a[0], a[1], b[0], b[1])

    def plus(a, b):
        return (a[0] + b[0],)

    def options_of(p):
        return load(p, 0), load(p, 1), load(p, 2), load(p, 3), load(p, 4), load(p, 5), load(p, 6), load(p, 7)

    def open_row(i, n, c, targets, kind, q, q_at, k, stop, stride, weight, words, flags):
        # What a row counts, its target, and whether that is bad; a probability that is is looked for in [k, stop).
        w = 1.0 if i < n else 0.0
        y = -1
        is_bad = False
        if i < n and flags & weighted:
            w = load(weight, i)
        if w != 0.0:
            if has_index:
                y = load_index(targets, i, kind)
                labels = c
                if is_apart and c == 1:  # labels are 0 and 1: none, and class 0
                    labels = 2
                is_bad = y < 0 or y >= labels
                y -= labels - c
                if is_bad:
                    least(words, bad_of, i)
            if probabilities:
                while k < stop:
                    u = load(q, q_at + k)
                    if not (u >= zero and u <= most and u - u == zero):
                        is_bad = True
                        least(words, bad_of, i)
                    k += stride
        return w, y, is_bad

    def factor_of(i, n, w, upstream, total, grad_scale, flags):
        scale = grad_scale
        if flags & shared_total:
            weights = load(total, 0)
            scale = grad_scale / weights if weights > 0.0 else 0.0
        factor = w * scale
        if i < n and flags & pulled:
            factor = factor * load(upstream, i)
        return real(factor)

    def own_margin(y, c, options, table_of):
        return load(table_of, table + y * c + y) if pairs else options[margin]

    return SimpleNamespace(
        row=row, walks=_walks(plan, row), move_in=_mover(True, size), move_out=_mover(False, size),
        finish=_finisher(plan, _trouble(plan)), put=_row_outputs(plan, row), per=device.WIDE // size, zero=zero,
        none=none, nan=real(np.nan), nowhere=nowhere, options_of=jit(options_of), open_row=jit(open_row),
        factor_of=jit(factor_of), own_margin=jit(own_margin), reduce_top=device.reduction(jit(largest), 1),
        reduce_lowest=device.reduction(jit(lowest), 1), reduce_first=device.reduction(jit(first), 2),
        reduce_state=device.reduction(row.merge, row.width), reduce_sum=device.reduction(jit(plus), 1),
    )  # fmt: skip


def _build_rows(plan: Plan) -> Any:
    """The kernel for rows that fit; see the module."""
    have = _parts(plan)
    row, walks, zero, none, nan, nowhere = have.row, have.walks, have.zero, have.none, have.nan, have.nowhere
    shared, quotient = device.shared, device.quotient
    syncthreads, thread_index, block_index = device.syncthreads, device.thread_index, device.block_index
    zero64, per, scratch = np.float64(0), have.per, _scratch(plan)
    move_in, move_out, finish, put = have.move_in, have.move_out, have.finish, have.put
    options_of, open_row, factor_of, own_margin = have.options_of, have.open_row, have.factor_of, have.own_margin
    reduce_top, reduce_lowest, reduce_first, reduce_state, reduce_sum = (
        have.reduce_top, have.reduce_lowest, have.reduce_first, have.reduce_state, have.reduce_sum,
    )  # fmt: skip
    walk_top, walk_argmax, walk_state, walk_fill, at_class = (
        walks.top, walks.argmax, walks.state, walks.fill, walks.at_class,
    )  # fmt: skip
    walk_gradient, walk_lowest, is_max = walks.gradient(False), walks.lowest, walks.is_max
    aim, settle, empty, sums_of = row.aim, row.settle, row.empty, row.sums
    looks, has_index, has_target, has_argmax, counts_target, writes_rows = (
        plan.row.looks, plan.has_index, plan.row.has_target, plan.argmax, plan.row.counts_target, plan.writes_rows,
    )  # fmt: skip
    gradient = GRADIENT

    def kernel(
        scores, grad, scores_lead, grad_lead, n, c, targets, kind, q, table_of, weight, upstream, total, grad_scale,
        value_scale, value, values, extras, argmax, sums, words, errors, flags, blocks, threads, team, rows, pitch,
    ):  # fmt: skip
        s = shared(zero)
        d = shared(zero64)
        t = thread_index()
        block = block_index()
        lane = t & (team - 1)
        own_row = quotient(t, team)
        k = 4 * lane
        stride = 4 * team
        at = scratch + own_row * pitch
        padded = (c + 3) & -4
        keeps = writes_rows and flags & gradient != 0
        options = options_of(table_of)
        found = zero64
        start = block * rows
        while start < n:
            here = min(rows, n - start)
            begin = start * c
            move_in(scores, begin, here * c, s, scratch, c, pitch, t, threads, (scores_lead + begin) & (per - 1))
            if c + lane < padded and own_row < here:  # −inf is the score of a class that is not there
                s[at + c + lane] = none
                if team == 1:
                    s[at + padded - 1] = none
                    s[at + ((c + padded) >> 1)] = none
                if team == 2:
                    s[at + padded - 1] = none
            syncthreads()
            i = start + own_row
            live = own_row < here
            limit = n if live else 0
            w, y, bad = open_row(i, limit, c, targets, kind, q, i * c, lane, c, team, weight, words, flags)
            stop = padded if w != 0.0 and not (bad and has_index) else 0
            index = zero
            if has_argmax:
                top, index = walk_argmax(s, at, k, stride, stop, 0, c)
                top, index = reduce_first(s, (top, index), (none, nowhere), t, team)
            m = zero
            sy = zero
            own = zero
            if has_target and stop > 0:
                sy = s[at + y]
            if looks:
                (m,) = reduce_top(s, (walk_top(s, at, k, stride, stop),), (none,), t, team)
            syncthreads()  # the walk may write where another thread reads the target's score
            if counts_target and stop > 0:
                own = own_margin(y, c, options, table_of)
            factor = factor_of(i, limit, w, upstream, total, grad_scale, flags)
            known = aim(m, sy, factor, options)
            state = walk_state(
                s, at, k, stride, stop, 0, keeps and not is_max, c, y, known, options, table_of, q, i * c
            )  # fmt: skip
            state = reduce_state(s, state, empty, t, team)
            loss, z, entropy, at_target, n0, n1, n2, n3 = settle(
                m, sy, own, known, sums_of(state), state[1], factor, options
            )  # fmt: skip
            bad = bad or w != w
            if bad:
                loss, z, entropy = nan, nan, nan
            if live and lane == 0:
                if w == 0.0:
                    loss, z, entropy = zero, zero, zero
                else:
                    found += w * loss
                put(i, n, loss, z, entropy, index if stop > 0 else zero, w, grad, values, extras, argmax, flags)
            if keeps:
                if is_max:
                    low = walk_lowest(s, at, k, stride, stop, 0, c, y, known, options, table_of, q, i * c, n1)
                    (low,) = reduce_lowest(s, (low,), (nowhere,), t, team)
                if live:
                    if bad or w == 0.0 or factor == zero:
                        walk_fill(s, at, k, stride, padded, nan if bad else zero)
                    elif is_max:
                        at_class(s, at, k, stride, stop, 0, y, at_target, low, n0)
                    else:
                        walk_gradient(
                            s, at, k, stride, stop, 0, c, y, known, options, table_of, q, i * c, at_target,
                            (n0, n1, n2, n3),
                        )  # fmt: skip
                syncthreads()
                move_out(grad, begin, here * c, s, scratch, c, pitch, t, threads, (grad_lead + begin) & (per - 1))
            syncthreads()
            start += blocks * rows
        (found,) = reduce_sum(d, (found,), (zero64,), t, threads)
        if t == 0:
            sums[block] = found
        finish(sums, blocks, blocks, words, errors, targets, kind, c, value, total, value_scale, flags, t, threads)

    return kernel


def _combiner(plan: Plan) -> Any:
    """Adds the state of a block of a long row (float64, from the block's own maximum) to that of those before, as if
    all were from the row's maximum.

    known, own_known: what `aim` makes of either maximum.
    """
    exp, none, log2 = device.exp, -np.inf, float(np.log(2))
    kind, dense, smooths, general = plan.row.kind, plan.row.dense, plan.row.smooths, plan.row.general
    rounder = rowmath.CONSTANTS[np.float64 if plan.dtype == "float64" else np.float32].rounder
    width, unit = plan.row.terms + 1, plan.row.unit

    scope: dict[str, Any] = {}
    more = "".join(f", state[{k}] + own[{k}]" for k in range(2, width))
    # What an infinite sum lost is NaN.
    whole = "own[0] + own[1] if own[1] == own[1] else own[0]"
    exec(f"def add(state, own): return (state[0] + ({whole}), 0.0{more})", scope)
    add = device.device_function(scope["add"])

    def as_is(state, m, own, own_m, known, own_known, count, options):
        return add(state, own)

    def largest(state, m, own, own_m, known, own_known, count, options):
        if state[0] != state[0] or own[0] != own[0]:
            return own[0] + state[0], 0.0
        return max(state[0], own[0]), 0.0

    def weight_of(m, own_m, known, own_known):
        if own_m == m:
            return 1.0
        return exp((float(own_known[0]) - known[0]) + (float(known[1]) - own_known[1]) * log2)

    weight_of = device.device_function(weight_of)

    def plain(state, m, own, own_m, known, own_known, count, options):
        if own_m == none:
            return state
        return state[0] + (own[0] + own[1]) * weight_of(m, own_m, known, own_known), 0.0

    def with_tops(state, m, own, own_m, known, own_known, count, options):
        if own_m == none:
            return state
        found, tops, w = own[0] + own[1], own[2], weight_of(m, own_m, known, own_known)
        if own_m != m:
            found += tops * exp((own_m - own_known[0]) + (float(own_known[1]) - rounder) * log2)
            tops = 0.0
        return state[0] + found * w, 0.0, state[2] + tops

    def bent(state, m, own, own_m, known, own_known, count, options):
        d = 0.0
        if own_m > none and own_m != m:
            d = (float(own_known[0]) - known[0]) * options[unit]
        w = exp(d)
        found, tops, away, u_others, u_tops = (own[0] + own[1]) * w, own[2], own[3], own[4], own[5]
        spread = w * (own[6] - d * (own[0] + own[1] + tops)) if w > 0.0 else 0.0
        u = u_others + u_tops if dense else (count if smooths else 0.0)
        if u != 0.0:
            away -= d * u
        if w != 1.0:
            found, tops, u_others, u_tops = found + tops * w, 0.0, u_others + u_tops, 0.0
        return (
            state[0] + found, 0.0, state[2] + tops, state[3] + away, state[4] + u_others, state[5] + u_tops,
            state[6] + spread,
        )  # fmt: skip

    if kind == "hinge" or plan.row.is_apart:
        chosen = as_is
    elif kind == "hinge max":
        chosen = largest
    elif general:
        chosen = bent
    else:
        chosen = with_tops if kind in ("log p", "lse") else plain
    return device.device_function(chosen)


def _build_long_rows(plan: Plan) -> Any:
    """The kernel for rows that are split into `parts` blocks of `classes`; see the module.

    Tasks: those of a `group` of rows are looked at, then of each later group, before the group before it is closed.
    """
    have = _parts(plan)
    row, walks, zero, none, nan, nowhere = have.row, have.walks, have.zero, have.none, have.nan, have.nowhere
    jit, shared, load, look, add_and_fetch, quotient = (
        device.device_function, device.shared, device.load, device.look, device.add_and_fetch, device.quotient,
    )  # fmt: skip
    syncthreads, threadfence, thread_index = device.syncthreads, device.threadfence, device.thread_index
    real, zero64, per, scratch = row.real, np.float64(0), have.per, _scratch(plan)
    move_in, move_out, finish, put = have.move_in, have.move_out, have.finish, have.put
    options_of, open_row, factor_of, own_margin = have.options_of, have.open_row, have.factor_of, have.own_margin
    reduce_top, reduce_lowest, reduce_first, reduce_state = (
        have.reduce_top, have.reduce_lowest, have.reduce_first, have.reduce_state,
    )  # fmt: skip
    walk_top, walk_argmax, walk_state, walk_fill = walks.top, walks.argmax, walks.state, walks.fill
    walk_gradient, walk_lowest, at_class, is_max = walks.gradient(True), walks.lowest, walks.at_class, walks.is_max
    aim, settle, empty, sums_of, first_top = row.aim, row.settle, row.empty, row.sums, row.first_top
    combine, width = _combiner(plan), row.width
    looks, has_index, has_target, has_argmax, counts_target, writes_rows = (
        plan.row.looks, plan.has_index, plan.row.has_target, plan.argmax, plan.row.counts_target, plan.writes_rows,
    )  # fmt: skip
    misses_sums, probabilities = plan.row.general and not plan.row.shard, plan.row.probabilities
    gradient, taken, record = GRADIENT, TAKEN, RECORD
    none64, nowhere64 = -np.inf, np.inf
    empty64 = (float(row.empty[0]),) + (0.0,) * (width - 1)
    scope: dict[str, Any] = {"look": look, "real": real}
    exec(
        f"""
def read(p, at): return ({"".join(f"look(p, at + {1 + k})," for k in range(width))})
def write(p, at, x):
{chr(10).join(f"    p[at + {1 + k}] = x[{k}]" for k in range(width))}
def narrow(x):
    first = real(x[0])
    return (first, real(x[0] - first){"".join(f", real(x[{k}])" for k in range(2, width))})
""",
        scope,
    )
    read, write, narrow = jit(scope["read"]), jit(scope["write"]), jit(scope["narrow"])

    def kernel(
        scores, grad, scores_lead, grad_lead, n, c, targets, kind, q, table_of, weight, upstream, total, grad_scale,
        value_scale, value, values, extras, argmax, sums, words, errors, flags, blocks, threads, records, arrived,
        parts, classes, group, groups,
    ):  # fmt: skip
        s = shared(zero)
        d = shared(zero64)
        t = thread_index()
        k = 4 * t
        stride = 4 * threads
        if t == 0:
            d[0] = float(add_and_fetch(words, taken, 1))
        syncthreads()
        task = int(d[0])
        syncthreads()
        # Which block of which row, and whether it is closed: groups in the order 0, 1, −0, 2, −1, ... (− closes).
        per_group = group * parts
        closes = False
        within = task
        which = 0
        if task >= per_group:
            which = quotient(task - per_group, 2 * per_group)
            within = task - per_group - which * (2 * per_group)
            closes = which == groups - 1 or within >= per_group
            if within >= per_group:
                within = within - per_group
            if not closes:
                which = which + 1
        i = quotient(within, parts)
        part = within - i * parts
        i += which * group
        first_class = part * classes
        here = min(classes, c - first_class)
        live = i < n
        begin = i * c + first_class
        w, y, bad = open_row(i, n if live else 0, c, targets, kind, q, begin, t, here, threads, weight, words, flags)
        counts = live and w != 0.0 and not (bad and has_index)
        keeps = writes_rows and flags & gradient != 0
        options = options_of(table_of)
        padded = (here + 3) & -4
        stop = 0
        if counts and (keeps or not closes):
            stop = padded
            move_in(scores, begin, here, s, scratch, here, padded, t, threads, (scores_lead + begin) & (per - 1))
            if t < padded - here:
                s[scratch + here + t] = none
        syncthreads()
        m = zero
        sy = zero
        own = zero
        if counts_target and counts:
            own = own_margin(y, c, options, table_of)
        at = i * parts * record
        if not closes:
            if counts and has_target:
                sy = real(load(scores, i * c + y))
            mine = at + part * record
            if has_argmax:
                top, index = walk_argmax(s, scratch, k, stride, stop, first_class, c)
                top, index = reduce_first(s, (top, index), (none, nowhere), t, threads)
                if t == 0 and counts:
                    records[mine + width + 2] = float(top)
                    records[mine + width + 3] = float(index)
            if looks:
                (m,) = reduce_top(s, (walk_top(s, scratch, k, stride, stop),), (none,), t, threads)
            known = aim(zero if m == none else m, sy, zero, options)  # a block may have no finite score
            state = walk_state(
                s, scratch, k, stride, stop, first_class, False, c, y, known, options, table_of, q, i * c
            )  # fmt: skip
            state = reduce_state(s, state, empty, t, threads)
            low = zero
            largest = zero
            if is_max:
                largest = settle(m, sy, own, known, sums_of(state), state[1], zero, options)[5]
                low = walk_lowest(
                    s, scratch, k, stride, stop, first_class, c, y, known, options, table_of, q, i * c, largest
                )  # fmt: skip
                (low,) = reduce_lowest(s, (low,), (nowhere,), t, threads)
            if t == 0 and live:
                if counts:
                    records[mine + width + 4] = float(low)
                    records[mine + width + 5] = float(largest)
                    records[mine] = float(m)
                    write(records, mine, state)
                    records[mine + width + 1] = float(sy)
                threadfence()
                add_and_fetch(arrived, i, 1)
        elif live:
            if t == 0:
                while look(arrived, i) < parts:
                    pass
                threadfence()
            syncthreads()
            m64 = none64
            state64 = empty64
            best64 = none64
            index64 = nowhere64
            margin64 = none64
            low64 = nowhere64
            if counts:
                if has_target:
                    sy = real(look(records, at + width + 1))
                b = 0
                while b < parts:
                    found = look(records, at + b * record)
                    m64 = m64 + found if m64 != m64 or found != found else max(m64, found)
                    b += 1
            if looks:
                m = real(m64)
            factor = factor_of(i, n, w, upstream, total, grad_scale, flags)
            known = aim(m, sy, factor, options)
            if counts:
                b = 0
                while b < parts:
                    mine = at + b * record
                    found = look(records, mine)
                    own_known = aim(zero if found == none64 else real(found), sy, factor, options)
                    state64 = combine(
                        state64, m64, read(records, mine), found, known, own_known,
                        float(min(classes, c - b * classes)), options,
                    )  # fmt: skip
                    if has_argmax:
                        best64, index64 = first_top(
                            best64, index64, look(records, mine + width + 2), look(records, mine + width + 3)
                        )
                    if is_max:
                        margin64, low64 = first_top(
                            margin64, low64, look(records, mine + width + 5), look(records, mine + width + 4)
                        )
                    b += 1
            state = narrow(state64)
            loss, z, entropy, at_target, n0, n1, n2, n3 = settle(
                m, sy, own, known, sums_of(state), state[1], factor, options
            )  # fmt: skip
            if misses_sums and m == none:  # no finite score: there is no sum
                loss, z, entropy, at_target, n0, n1, n2, n3 = nan, nan, nan, nan, nan, nan, nan, nan
            bad = bad or w != w or (probabilities and loss != loss)
            if bad:
                loss, z, entropy = nan, nan, nan
            if part == 0 and t == 0:
                weighted_loss = zero64
                if w == 0.0:
                    loss, z, entropy = zero, zero, zero
                else:
                    weighted_loss = w * loss
                put(i, n, loss, z, entropy, index64 if counts else 0.0, w, grad, values, extras, argmax, flags)
                sums[i] = weighted_loss
            if keeps:
                if bad or w == 0.0 or factor == zero:
                    walk_fill(s, scratch, k, stride, padded, nan if bad else zero)
                elif is_max:
                    at_class(s, scratch, k, stride, stop, first_class, y, at_target, real(low64), n0)
                else:
                    walk_gradient(
                        s, scratch, k, stride, stop, first_class, c, y, known, options, table_of, q, i * c, at_target,
                        (n0, n1, n2, n3),
                    )  # fmt: skip
                syncthreads()
                move_out(grad, begin, here, s, scratch, here, padded, t, threads, (grad_lead + begin) & (per - 1))
            if t == 0 and add_and_fetch(arrived, i, 1) == 2 * parts - 1:
                arrived[i] = 0
        finish(sums, n, blocks, words, errors, targets, kind, c, value, total, value_scale, flags, t, threads)

    return kernel


# --- how kernels are launched ----------------------------------------------------------------------------------------
def threads_bound(plan: Plan) -> int:
    """The most threads of a block, on any GPU: fewer for what would else spill registers."""
    is_double = plan.dtype == "float64"
    plain = not plan.row.general and not is_double and plan.row.kind != "hinge max"
    return device.MOST_THREADS // (1 if plain else 4 if is_double and plan.row.softcap else 2)


@functools.lru_cache(maxsize=512)
def rows_kernel(plan: Plan) -> device.Kernel:
    """The kernel for rows that fit."""
    return device.Kernel(lambda: _build_rows(plan), _signature(plan, _OF_ROWS), threads_bound(plan))


@functools.lru_cache(maxsize=512)
def long_rows_kernel(plan: Plan) -> device.Kernel:
    """The kernel for rows that are split."""
    return device.Kernel(lambda: _build_long_rows(plan), _signature(plan, _OF_LONG_ROWS), device.MOST_THREADS // 2)


class Layout(NamedTuple):
    """How rows that fit are laid over a block."""

    team: int  # threads of a row
    rows: int  # of a tile
    pitch: int  # numbers of shared memory from one row to the next
    threads: int
    shared_bytes: int
    resident: int  # blocks that are on the GPU at a time


@functools.lru_cache(maxsize=4096)
def layout(plan: Plan, c: int, gpu: int) -> Layout | None:
    """The layout for rows of c classes; None if a row does not fit."""
    limits = device.limits()
    size = 8 if plan.dtype == "float64" else 4
    team = 1
    while team < min(threads_bound(plan), limits.most_threads) and c > 32 * team:
        team *= 2
    threads = max(team, min(128, limits.most_threads))
    fours = (c + 3) // 4
    if team < 8:  # rows that are read together are in different banks
        fours += (team - fours) % (2 * team)
    head, rows_ = _scratch(plan), threads // team
    while rows_ > 1 and (head + rows_ * fours * 4) * size > limits.shared_bytes // 2:
        rows_ //= 2
    shared_bytes = (head + rows_ * fours * 4) * size
    if shared_bytes > limits.shared_bytes or (c + 3) // 4 * 4 > LONGEST:
        return None
    per_multiprocessor = max(1, min(32, 1024 // (team * rows_), (limits.shared_bytes + 2048) // shared_bytes))
    return Layout(
        team, rows_, fours * 4, team * rows_, shared_bytes, per_multiprocessor * limits.multiprocessors
    )  # fmt: skip


#: Rows of more classes are split whatever fits (tests make it small).
LONGEST = 1 << 20


class Split(NamedTuple):
    """How rows that do not fit are split."""

    parts: int
    classes: int
    threads: int
    shared_bytes: int


@functools.lru_cache(maxsize=512)
def split(plan: Plan, c: int, gpu: int, block_classes: int) -> Split:
    parts = -(-c // block_classes)
    classes = -(-c // parts)
    classes = -(-classes // 8) * 8
    parts = -(-c // classes)
    size = 8 if plan.dtype == "float64" else 4
    return Split(
        parts, classes, min(device.MOST_THREADS // 2, device.limits().most_threads), (_scratch(plan) + classes) * size
    )  # fmt: skip


class Arguments(NamedTuple):
    """What a launch is given; pointers may be 0. See `_ARGUMENTS`."""

    scores: Any
    grad: Any
    scores_lead: int
    grad_lead: int
    n: int
    c: int
    targets: Any
    kind: int
    q: Any
    options: Any
    weight: Any
    upstream: Any
    total: Any
    grad_scale: float
    value_scale: float
    value: Any
    values: Any
    extras: Any
    argmax: Any
    flags: int


def launch(plan: Plan, arguments: Arguments, gpu: int, stream: int, errors: Any) -> None:
    """Launch the kernel for the rows of a call; n and c are at least 1."""
    n, c = arguments.n, arguments.c
    workspace = device.workspace(gpu, stream)
    words = workspace.words()
    found = layout(plan, c, gpu)
    *before, flags = arguments
    if found is not None:
        tiles = -(-n // found.rows)
        blocks = min(tiles, found.resident)
        rows_kernel(plan).launch(
            blocks, found.threads, found.shared_bytes, stream, *before, workspace.get("sums", blocks, np.float64),
            words, errors, flags, blocks, found.threads, found.team, found.rows, found.pitch,
        )  # fmt: skip
        return
    long = split(plan, c, gpu, BLOCK_CLASSES)
    row_bytes = c * device.SIZES[plan.dtype]
    group = max(1, min(n, BETWEEN_BYTES // row_bytes))
    groups = -(-n // group)
    blocks = 2 * groups * group * long.parts
    long_rows_kernel(plan).launch(
        blocks, long.threads, long.shared_bytes, stream, *before, workspace.get("sums", n, np.float64), words, errors,
        flags, blocks, long.threads, workspace.get("records", n * long.parts * RECORD, np.float64),
        workspace.get("arrived", n, np.int64), long.parts, long.classes, group, groups,
    )  # fmt: skip


# --- what rows count -------------------------------------------------------------------------------------------------
def _build_weigh(has_classes: bool, ignores: bool, has_samples: bool, inside: bool) -> Any:
    """Row multipliers (float64) and what a mean divides by: see `driver.fold`."""
    jit, load, load_index, least = device.device_function, device.load, device.load_index, device.least
    thread_index, block_index, shared = device.thread_index, device.block_index, device.shared
    finish = _finisher(Plan(rowmath.Plan("p"), "float64"), BAD_WEIGHT)
    zero64, nan64, bad_of, writes_value = np.float64(0), np.float64(np.nan), BAD, WRITES_VALUE

    def plus(a, b):
        return (a[0] + b[0],)

    reduce_sum = device.reduction(jit(plus), 1)

    def kernel(n, c, targets, kind, ignored, of_class, of_sample, weight, sums, words, errors, total, blocks, threads):
        d = shared(zero64)
        t = thread_index()
        block = block_index()
        found = zero64
        i = block * threads + t
        while i < n:
            w = 1.0
            if has_samples:
                w = float(load(of_sample, i))
                if not (w >= 0.0 and w - w == 0.0):
                    w = nan64
                    least(words, bad_of, i)
            y = 0
            if has_classes or ignores:
                y = load_index(targets, i, kind)
            if ignores and y == ignored:
                w = 0.0
            counted = w
            if has_classes and w != 0.0 and y >= 0 and y < c:
                counted = w * load(of_class, y)
            weight[i] = w if inside else counted
            found += counted
            i += blocks * threads
        (found,) = reduce_sum(d, (found,), (zero64,), t, threads)
        if t == 0:
            sums[block] = found
        finish(sums, blocks, blocks, words, errors, targets, kind, c, total, total, 1.0, writes_value, t, threads)

    return kernel


@functools.lru_cache(maxsize=64)
def weigh_kernel(dtype: str, has_classes: bool, ignores: bool, has_samples: bool, inside: bool) -> device.Kernel:
    """The kernel of `_build_weigh` for sample weights of a type."""
    signature = (
        "int64", "int64", "uint8*", "int64", "int64", "float64*", f"{dtype}*", "float64*", "float64*", "int64*",
        "int64*", "float64*", "int64", "int64",
    )  # fmt: skip
    return device.Kernel(lambda: _build_weigh(has_classes, ignores, has_samples, inside), signature, 256)
