"""Second derivatives of row losses on a GPU: the diagonal of each row's Hessian, and its products with a direction.

`team` threads share a row. They walk over it three times, for the maximum, for sums and for what is written: the second
time and the third it is in the caches. Sums are in an order of their own, of the compute type. The definition is in
`backends/reference.py` (`HVP`, `HESS_DIAG`).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools
from typing import Any

from fastloss import _checks as checks
from fastloss.backends import BackendError, reference
from fastloss.gpu import arrays, device, driver, scores
from fastloss.gpu.arrays import View
from fastloss.gpu.scores import WEIGHTED, Plan
from fastloss.jit import rowmath
from fastloss.jit.rowmath import AT_TARGET, ELSEWHERE, MARGIN, PER_CLASS, PER_TEMPERATURE

#: Threads of a block. The simulator's are fewer.
THREADS = 8 if device.SIMULATED else 256


def _softmax(plan: Plan, have: Any, is_product: bool) -> Any:
    """U (p ∘ v − p ⟨p, v⟩) / T², or U p (1 − p) / T² with Σ of the others for 1 − p."""
    jit, load, store = device.device_function, device.load, device.store
    real, zero, one, none = have.row.real, have.zero, have.row.real(1), have.none
    exp, rounder, larger = have.row.functions.exp, have.row.functions.rounder, have.row.larger
    probabilities, weights, table = plan.row.probabilities, plan.row.weights, scores.TABLE
    reduce_top = have.reduce_top

    def plus(a, b):
        return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]

    reduce = device.reduction(jit(plus), 4)

    def work(s, given, direction, out, begin, c, y, q, factor, options, table_of, t, lane, team, live):
        stop = c if live else 0
        m = none
        j = lane
        while j < stop:
            m = larger(m, real(load(given, begin + j)))
            j += team
        (m,) = reduce_top(s, (m,), (none,), t, team)
        # Σ of exponentials that are not 1, how many are, Σ e v; and what of Σ u comes with the classes.
        others, tops, along, u = zero, zero, zero, zero
        j = lane
        while j < stop:
            e = exp((real(load(given, begin + j)) - m) * options[PER_TEMPERATURE], rounder)
            if e == one:
                tops += one
            else:
                others += e
            if is_product:
                along += e * load(direction, begin + j)
            if probabilities:
                u += load(q, begin + j) * (load(table_of, table + j) if weights else one)
            elif weights:
                u += load(table_of, table + j) * options[ELSEWHERE]
            j += team
        others, tops, along, u = reduce(s, (others, tops, along, u), (zero, zero, zero, zero), t, team)
        if not probabilities:
            if weights:
                u += (options[AT_TARGET] - options[ELSEWHERE]) * (load(table_of, table + y) if live else zero)
            else:
                u = one
        total = others + tops
        scale = factor * u * (options[PER_TEMPERATURE] * options[PER_TEMPERATURE])
        j = lane
        while j < stop:
            e = exp((real(load(given, begin + j)) - m) * options[PER_TEMPERATURE], rounder)
            p = e / total
            if is_product:
                x = p * load(direction, begin + j) - p * (along / total)
            else:
                x = p * (((others + (tops - one)) if e == one else (total - e)) / total)
            store(out, begin + j, scale * x)
            j += team

    return jit(work)


def _hinge(plan: Plan, have: Any, is_product: bool) -> Any:
    """2 (v_j − v_y) of active classes j, or 2; the target's is minus their sum, or their sum."""
    jit, load, store = device.device_function, device.load, device.store
    real, zero, two, none, nowhere = have.row.real, have.zero, have.row.real(2), have.none, have.nowhere
    first_top, reduce_first = have.row.first_top, have.reduce_first
    pairs, table, is_max = plan.row.pairs, scores.TABLE, plan.row.kind == "hinge max"

    def plus(a, b):
        return (a[0] + b[0],)

    reduce = device.reduction(jit(plus), 1)

    def margin_of(given, begin, j, c, y, at_y, options, table_of):
        margin = load(table_of, table + y * c + j) if pairs else options[MARGIN]
        return (real(load(given, begin + j)) - at_y) + margin

    margin_of = jit(margin_of)

    def curve(m, v, v_y):
        # Where a margin is NaN, so is this.
        if m <= zero:
            return zero
        found = two * (v - v_y) if is_product else two
        return found + m if m != m else found

    curve = jit(curve)

    def work(s, given, direction, out, begin, c, y, q, factor, options, table_of, t, lane, team, live):
        stop = c if live else 0
        at_y, v_y = zero, zero
        if live:
            at_y = real(load(given, begin + y))
            if is_product:
                v_y = load(direction, begin + y)
        chosen = nowhere
        if is_max:
            top, chosen = none, nowhere
            j = lane
            while j < stop:
                if j != y:
                    m = margin_of(given, begin, j, c, y, at_y, options, table_of)
                    top, chosen = first_top(top, chosen, m, real(j))
                j += team
            top, chosen = reduce_first(s, (top, chosen), (none, nowhere), t, team)
        found = zero
        j = lane
        while j < stop:
            if j != y and (not is_max or real(j) == chosen):
                v = load(direction, begin + j) if is_product else zero
                found += curve(margin_of(given, begin, j, c, y, at_y, options, table_of), v, v_y)
            j += team
        (found,) = reduce(s, (found,), (zero,), t, team)
        scale = factor * options[PER_CLASS]
        j = lane
        while j < stop:
            x = zero
            if j == y:
                x = -found if is_product else found
            elif not is_max or real(j) == chosen:
                v = load(direction, begin + j) if is_product else zero
                x = curve(margin_of(given, begin, j, c, y, at_y, options, table_of), v, v_y)
            store(out, begin + j, scale * x)
            j += team

    return jit(work)


def _build(plan: Plan, is_product: bool) -> Any:
    have = scores._parts(plan)
    work = (_softmax if plan.row.kind == "softmax" else _hinge)(plan, have, is_product)
    open_row, factor_of, options_of, finish = have.open_row, have.factor_of, have.options_of, have.finish
    zero, nan, has_index = have.zero, have.nan, plan.has_index
    shared, quotient, store = device.shared, device.quotient, device.store
    thread, block = device.thread_index, device.block_index

    def kernel(
        given, direction, out, n, c, targets, kind, q, table_of, weight, total, scale, words, errors, flags, blocks,
        threads, team,
    ):  # fmt: skip
        s = shared(zero)
        t = thread()
        lane, own_row, rows = t & (team - 1), quotient(t, team), quotient(threads, team)
        options = options_of(table_of)
        start = block() * rows
        while start < n:
            i = start + own_row
            begin = i * c
            limit = n if i < n else 0
            w, y, bad = open_row(i, limit, c, targets, kind, q, begin, lane, c, team, weight, words, flags)
            live = w != 0.0 and not (bad and has_index)
            factor = nan if bad else factor_of(i, limit, w, total, total, scale, flags)
            work(s, given, direction, out, begin, c, y, q, factor, options, table_of, t, lane, team, live)
            if i < n and not live:
                j = lane
                while j < c:
                    store(out, begin + j, nan if bad else zero)
                    j += team
            start += blocks * rows
        finish(total, 0, blocks, words, errors, targets, kind, c, total, total, 1.0, 0, t, threads)

    return kernel


@functools.lru_cache(maxsize=64)
def kernel(plan: Plan, is_product: bool) -> device.Kernel:
    """For scores of `plan.dtype`, whose compute type a direction has; what is written is of one or the other."""
    real = device.REAL[plan.dtype]
    signature = (
        f"{plan.dtype}*", f"{real}*", f"{real if is_product else plan.dtype}*", "int64", "int64", "uint8*", "int64",
        f"{real}*", f"{real}*", "float64*", "float64*", "float64", "int64*", "int64*", "int64", "int64", "int64",
        "int64",
    )  # fmt: skip
    return device.Kernel(lambda: _build(plan, is_product), signature, THREADS)


def rows(
    loss: Any, given: View, direction: View | None, out: View, targets: Any, kind: int, weights: Any, total: Any,
    scale: float, flags: int,
) -> None:  # fmt: skip
    """Launch for all rows of scores in C order; `kind` of targets as in `device.load_index`, 0 for probabilities."""
    (n, c), gpu, stream = given.shape, given.gpu, given.stream
    real, none = device.REAL[given.dtype], functools.partial(driver.nothing, gpu)
    plan = Plan(rowmath.plan_of(loss, kind == 0), given.dtype)
    team = min(THREADS, 1 << (c - 1).bit_length())
    blocks = max(1, min(-(-n // (THREADS // team)), 16 * device.limits().multiprocessors))
    kernel(plan, direction is not None).launch(
        blocks, THREADS, device.SCRATCH * 4 * device.SIZES[real], stream, given.pointer,
        none(real) if direction is None else direction.pointer, out.pointer, n, c,
        targets if kind else none("uint8"), kind or 1, none(real) if kind else targets,
        driver.options(loss, plan.row, c, given.dtype, gpu), weights, total, scale,
        device.workspace(gpu, stream).words(), driver.errors(gpu)[1], flags, blocks, THREADS, team,
    )  # fmt: skip


def diagonal_call(loss: Any, given: Any, targets: Any, out: Any, sample_weight: Any) -> Any:
    """`Loss.hess_diag` for scores on a GPU: an array like them."""
    driver.require()
    s = driver._scores(given)
    if s.ndim != 2 or s.shape[1] == 0:
        raise ValueError(
            f"scores has shape {s.shape}; it must be (N, C): a row of C class scores for each of N examples"
        )
    with device.on(s.gpu):
        driver.raise_errors(s.gpu)
        n, c = s.shape
        loss.check_classes(c)
        y = driver._targets(targets, s, loss, n, c)
        weight: View | None = None
        if arrays.is_device(sample_weight):
            weight = driver._vector(sample_weight, "sample_weight", s, n, "row of scores")
        elif sample_weight is not None:
            weight = s.from_host(checks.weights(sample_weight, "sample_weight", n, "row of scores"))
        check(loss)
        target: View | None = None
        if out is not None:
            target = driver._out(out, s, s.shape, {"scores": s, "targets": y, "sample_weight": weight}, False)
        found = target if target is not None and target.is_contiguous else s.empty(s.shape, s.dtype)
        if n:
            weights = total = driver.nothing(s.gpu, "float64")
            indices = y.ndim == 1
            weighted = weight is not None or (
                indices and (loss.class_weight is not None or loss.ignore_index is not None)
            )
            if weighted:
                weights, total = driver._weigh(loss, y, weight, n, c, s.gpu, s.stream)
            kind = driver._index_kind(y) if indices else 0
            rows(loss, s.contiguous(), None, found, y.pointer, kind, weights, total, 1.0, WEIGHTED * weighted)
        if target is not None and found is not target:
            target.assign(found)
            found = target
        return found.owner


def check(loss: Any) -> None:
    """Raise unless the loss has second derivatives."""
    reason = reference.why_no_hessian(loss)
    if reason is not None:
        raise BackendError(reason)
