"""Stats of shards of the classes on a GPU: `Loss.stats`, `Stats.merge`, and the value and the gradient from them.

A shard's sums are found by the kernels of given scores (`scores`), which read each score once; all that is one number a
row is done by a thread for each row, in float64. A gradient takes two kernels: the first makes the numbers of each row,
its entry at the target and that at the class with the largest weight, in a workspace; the second reads each score once
and writes its entry once, by `rowmath`'s `from_stats`. The definition of all of it is in `backends/reference.py`.

Nothing here waits for the GPU: stats that do not fit the targets make NaN of a row, and the error is raised later.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from fastloss import _checks as checks
from fastloss import driver as host_driver
from fastloss.backends import Stats, reference
from fastloss.gpu import arrays, device, driver, scores
from fastloss.gpu.arrays import View
from fastloss.gpu.scores import BAD_STATS, GRADIENT, PULLED, SHARED_TOTAL, TABLE, VALUES, WEIGHTED, WRITES_VALUE
from fastloss.jit import rowmath

#: Threads of a block. The simulator's are fewer.
THREADS = 8 if device.SIMULATED else 256
#: The types of what `Stats` holds.
KINDS = dict.fromkeys(Stats._fields, "float64") | {"found": "int64", "classes": "int64"}
#: What the gradient's first kernel leaves of each row: the maximum, the factor of exponentials, the share of u, and the
#: entries at the target and at the class with the largest weight, all but the first times what the row counts.
NUMBERS = 5


class Options(NamedTuple):
    """The options of a softmax as the kernels of rows take them."""

    temperature: float
    softcap: float  # negative: none
    z_loss: float
    smoothing: float
    known: int  # the number of class weights, of which the first kernel of a gradient has an array; 0: there are none

    @classmethod
    def of(cls, loss: Any) -> Options:
        known = 0 if loss.class_weight is None else len(loss.class_weight)
        cap = -1.0 if loss.softcap is None else loss.softcap
        return cls(float(loss.temperature), float(cap), float(loss.z_loss), float(loss.label_smoothing), known)


_OPTIONS = ("float64", "float64", "float64", "float64", "int64")


# --- kernels --------------------------------------------------------------------------------------------------------
def _mapped() -> Any:
    """`reference.map_scores` for one score: the mapped score, and the maps' slope."""
    exp, tanh = device.exp, device.tanh

    def mapped(s, temperature, softcap):
        slope = 1.0
        if softcap > 0.0 and s - s == 0.0:
            bent = s / softcap
            e = exp(-2.0 * abs(bent))
            slope = 4.0 * e / ((1.0 + e) * (1.0 + e))  # 1 / cosh²
            s = softcap * tanh(bent)
        return s / temperature, slope / temperature

    return device.device_function(mapped)


def _build_complete() -> Any:
    """Stats of a shard from its rows' sums, as `reference.stats_of_sums` has them."""
    load, store, load_index, mapped = device.load, device.store, device.load_index, _mapped()
    thread, block = device.thread_index, device.block_index
    none, infinity, nan = -math.inf, math.inf, math.nan

    def kernel(
        scores, n, c, targets, kind, offset, sums, temperature, softcap, z_loss, smoothing, known, weight, maximum,
        rest, target, found, classes, weights, away, threads,
    ):  # fmt: skip
        i = block() * threads + thread()
        if i < n:
            top, others, far = none, 0.0, 0.0
            if c > 0:
                far, top = float(load(sums, i)), float(load(sums, n + i))
                others = float(load(sums, 2 * n + i))
            if top == none:  # exponentials of −inf − −inf are NaN
                others, far = 0.0, (infinity if weight > 0.0 else 0.0)
            store(maximum, i, mapped(top, temperature, softcap)[0])
            store(rest, i, others)
            column = load_index(targets, i, kind) - offset
            inside = column >= 0 and column < c
            s = 0.0
            if inside:
                s = mapped(float(load(scores, i * c + column)), temperature, softcap)[0]
            store(target, i, s)
            found[i] = 1 if inside else 0
            classes[i] = c
            store(weights, i, weight if smoothing > 0.0 else nan)
            store(away, i, far if smoothing > 0.0 else nan)

    return kernel


def _build_merge() -> Any:
    """`Stats.merge`."""
    load, store, exp, thread, block = device.load, device.store, device.exp, device.thread_index, device.block_index
    none = np.float64(-np.inf)

    def kernel(
        n, a_max, a_rest, a_target, a_found, a_classes, a_weight, a_away, b_max, b_rest, b_target, b_found, b_classes,
        b_weight, b_away, maximum, rest, target, found, classes, weight, away, threads,
    ):  # fmt: skip
        i = block() * threads + thread()
        if i < n:
            a, b = load(a_max, i), load(b_max, i)
            top = a if a >= b or a != a else b
            a_others, b_others, a_moved, b_moved = 0.0, 0.0, 0.0, 0.0
            if a != none:
                a_others, a_moved = (1.0 + load(a_rest, i)) * exp(a - top), top - a
            if b != none:
                b_others, b_moved = (1.0 + load(b_rest, i)) * exp(b - top), top - b
            store(maximum, i, top)
            store(rest, i, load(a_rest, i) + b_others if a >= b else load(b_rest, i) + a_others)
            store(target, i, load(a_target, i) + load(b_target, i))
            found[i] = a_found[i] + b_found[i]
            classes[i] = a_classes[i] + b_classes[i]
            own, other = load(a_weight, i), load(b_weight, i)
            store(weight, i, own + other)
            store(away, i, (load(a_away, i) + own * a_moved) + (load(b_away, i) + other * b_moved))

    return kernel


def _fitting() -> Any:
    """Whether the stats of a row are of all classes, its target among them; as `driver.check_stats` has it."""

    def fits(found, classes, first, weight, y, smoothing, known):
        good = found == 1 and (known == 0 or (classes == known and y >= 0 and y < known))
        return good and (smoothing == 0.0 or (weight == weight and classes == first))

    return device.device_function(fits)


def _build_value() -> Any:
    """The row losses, as `reference.softmax_stats_rows` has them, and their sum."""
    load, store, load_index, shared = device.load, device.store, device.load_index, device.shared
    thread, block, least, log1p = device.thread_index, device.block_index, device.least, device.log1p
    fits, finish = _fitting(), scores._finisher(_PLAN, BAD_STATS)
    nan, zero64, none = np.float64(np.nan), np.float64(0), np.float64(-np.inf)
    weighted, values_of, bad_of = WEIGHTED, VALUES, scores.BAD

    def plus(a, b):
        return (a[0] + b[0],)

    reduce = device.reduction(device.device_function(plus), 1)

    def row_loss(maximum, rest, target, classes, weight, away, at_target, z_loss, smoothing):
        log = log1p(rest)
        loss = zero64
        if at_target != 0.0:
            loss = at_target * (log + (maximum - target))
        if smoothing > 0.0:
            loss += smoothing / classes * (weight * log + away)
        if z_loss > 0.0:
            loss += z_loss * ((maximum + log) * (maximum + log))
        return nan if log != log or maximum == none else loss

    row_loss = device.device_function(row_loss)

    def kernel(
        n, maximum, rest, target, found, classes, weight, away, targets, kind, temperature, softcap, z_loss, smoothing,
        known, of_class, row_weight, total, value_scale, value, values, sums, words, errors, flags, blocks, threads,
    ):  # fmt: skip
        d = shared(zero64)
        t = thread()
        here = zero64
        i = block() * threads + t
        while i < n:
            w = load(row_weight, i) if flags & weighted else 1.0
            counted = zero64
            if w != 0.0:
                y = load_index(targets, i, kind)
                counted = nan
                if fits(load(found, i), load(classes, i), load(classes, 0), load(weight, i), y, smoothing, known):
                    at_target = 1.0 - smoothing
                    if smoothing > 0.0 and known > 0:
                        at_target = at_target * load(of_class, y)
                    counted = w * row_loss(
                        load(maximum, i), load(rest, i), load(target, i), float(load(classes, i)), load(weight, i),
                        load(away, i), at_target, z_loss, smoothing,
                    )  # fmt: skip
                else:
                    least(words, bad_of, i)
            if flags & values_of:
                store(values, i, counted)
            here += counted
            i += blocks * threads
        (here,) = reduce(d, (here,), (zero64,), t, threads)
        if t == 0:
            store(sums, block(), here)
        finish(sums, blocks, blocks, words, errors, targets, kind, known, value, total, value_scale, flags, t, threads)

    return kernel


def _build_rows() -> Any:
    """What a gradient needs of each row: see `NUMBERS`. Entries are those of `reference.stats_entries`."""
    load, store, load_index = device.load, device.store, device.load_index
    thread, block, least, log1p, exp, expm1 = (
        device.thread_index, device.block_index, device.least, device.log1p, device.exp, device.expm1,
    )  # fmt: skip
    mapped, fits, finish = _mapped(), _fitting(), scores._finisher(_PLAN, BAD_STATS)
    nan, zero64 = np.float64(np.nan), np.float64(0)
    weighted, pulled, shared_total, bad_of, numbers = WEIGHTED, PULLED, SHARED_TOTAL, scores.BAD, NUMBERS

    def entry(s, slope, maximum, rest, u, others, more):
        # No difference cancels: rest + (1 − exp(d)) is the sum of the others' exponentials.
        d = s - maximum
        return ((others + more) * exp(d) + u * (expm1(d) - rest)) / (1.0 + rest) * slope

    entry = device.device_function(entry)

    def kernel(
        scores, n, c, targets, kind, offset, heavy, maximum, rest, found, classes, weight, temperature, softcap, z_loss,
        smoothing, known, of_class, row_weight, upstream, total, grad_scale, columns, out, words, errors, flags, blocks,
        threads,
    ):  # fmt: skip
        t = thread()
        i = block() * threads + t
        while i < n:
            at = numbers * i
            w = load(row_weight, i) if flags & weighted else 1.0
            column = -1
            factor, top, pull, share, own, heaviest = zero64, zero64, zero64, zero64, zero64, zero64
            if w != 0.0:
                scale = grad_scale
                if flags & shared_total:
                    weights = load(total, 0)
                    scale = grad_scale / weights if weights > 0.0 else 0.0
                factor = w * scale
                if flags & pulled:
                    factor = factor * load(upstream, i)
                y = load_index(targets, i, kind)
                if not fits(load(found, i), load(classes, i), load(classes, 0), load(weight, i), y, smoothing, known):
                    least(words, bad_of, i)
                    factor = nan
                elif factor != 0.0:
                    m, others, count = load(maximum, i), load(rest, i), float(load(classes, i))
                    at_target, smooth = 1.0 - smoothing, smoothing / count
                    if smoothing > 0.0 and known > 0:
                        at_target = at_target * load(of_class, y)
                    more = 2.0 * z_loss * (m + log1p(others)) if z_loss > 0.0 else 0.0
                    u_all = at_target + (smooth * load(weight, i) if smoothing > 0.0 else 0.0)
                    top, pull, share = m * temperature, (u_all + more) / (1.0 + others), smooth
                    if y >= offset and y < offset + c:
                        column = y - offset
                        s, slope = mapped(float(load(scores, i * c + column)), temperature, softcap)
                        u, u_others = at_target, zero64
                        if smoothing > 0.0:
                            if known > 0:
                                u += smooth * load(of_class, y)
                                u_others = smooth * load(of_class, known + y)
                            else:
                                u += smooth
                                u_others = smooth * (count - 1.0)
                        own = entry(s, slope, m, others, u, u_others, more)
                    if heavy >= 0:
                        s, slope = mapped(float(load(scores, i * c + heavy)), temperature, softcap)
                        u, u_others = smooth * load(of_class, offset + heavy), at_target
                        if y == offset + heavy:
                            u, u_others = u + at_target, zero64
                        u_others += smooth * load(of_class, known + offset + heavy)
                        heaviest = entry(s, slope, m, others, u, u_others, more)
                    pull, share, own, heaviest = pull * factor, share * factor, own * factor, heaviest * factor
            if factor == 0.0 or factor != factor:  # no entry is computed: all are 0, or NaN
                column = -2
                own = factor
            columns[i] = column
            store(out, at, top)
            store(out, at + 1, pull)
            store(out, at + 2, share)
            store(out, at + 3, own)
            store(out, at + 4, heaviest)
            i += blocks * threads
        finish(out, 0, blocks, words, errors, targets, kind, known, out, total, 1.0, 0, t, threads)

    return kernel


def _build_entries(plan: scores.Plan) -> Any:
    """The gradient's entries: `team` threads for a row."""
    row, load, store = scores._row(plan), device.load, device.store
    thread, block, quotient = device.thread_index, device.block_index, device.quotient
    from_stats, real, zero = row.from_stats, row.real, row.real(0)
    weights, table, per_temperature, numbers = plan.row.weights, TABLE, rowmath.PER_TEMPERATURE, NUMBERS

    def kernel(scores, grad, n, c, heavy, table_of, columns, given, blocks, threads, team):
        t = thread()
        lane, own_row, rows = t & (team - 1), quotient(t, team), quotient(threads, team)
        p = table_of
        options = (load(p, 0), load(p, 1), load(p, 2), load(p, 3), load(p, 4), load(p, 5), load(p, 6), load(p, 7))
        i = block() * rows + own_row
        while i < n:
            at = numbers * i
            column = load(columns, i)
            m, pull, share = real(load(given, at)), load(given, at + 1), load(given, at + 2)
            pull, share = real(pull * options[per_temperature]), real(share * options[per_temperature])
            own, heaviest = real(load(given, at + 3)), real(load(given, at + 4))
            j = lane
            while j < c:
                if column == -2:
                    x = own
                elif j == heavy:
                    x = heaviest
                elif j == column:
                    x = own
                else:
                    w = load(table_of, table + j) if weights else zero
                    x = from_stats(real(load(scores, i * c + j)), w, m, pull, share, options)
                store(grad, i * c + j, x)
                j += team
            i += blocks * rows

    return kernel


_PLAN = scores.Plan(rowmath.Plan("softmax"), "float64")
_EACH = tuple(f"{kind}*" for kind in KINDS.values())


@functools.cache
def complete_kernel(dtype: str) -> device.Kernel:
    """Of a shard's scores of a type."""
    real = device.REAL[dtype]
    signature = (f"{dtype}*", "int64", "int64", "uint8*", "int64", "int64", f"{real}*", *_OPTIONS, "float64", *_EACH)
    return device.Kernel(_build_complete, (*signature, "int64"), THREADS)


@functools.cache
def merge_kernel() -> device.Kernel:
    return device.Kernel(_build_merge, ("int64", *_EACH, *_EACH, *_EACH, "int64"), THREADS)


@functools.cache
def value_kernel() -> device.Kernel:
    signature = (
        "int64", *_EACH, "uint8*", "int64", *_OPTIONS, "float64*", "float64*", "float64*", "float64", "float64*",
        "float64*", "float64*", "int64*", "int64*", "int64", "int64", "int64",
    )  # fmt: skip
    return device.Kernel(_build_value, signature, THREADS)


@functools.cache
def row_kernel(dtype: str) -> device.Kernel:
    """Of a shard's scores of a type."""
    signature = (
        f"{dtype}*", "int64", "int64", "uint8*", "int64", "int64", "int64", "float64*", "float64*", "int64*", "int64*",
        "float64*", *_OPTIONS, "float64*", "float64*", "float64*", "float64*", "float64", "int64*", "float64*",
        "int64*", "int64*", "int64", "int64", "int64",
    )  # fmt: skip
    return device.Kernel(_build_rows, signature, THREADS)


@functools.lru_cache(maxsize=64)
def entries_kernel(plan: scores.Plan) -> device.Kernel:
    signature = (
        f"{plan.dtype}*", f"{plan.dtype}*", "int64", "int64", "int64", f"{device.REAL[plan.dtype]}*", "int64*",
        "float64*", "int64", "int64", "int64",
    )  # fmt: skip
    return device.Kernel(lambda: _build_entries(plan), signature, THREADS)


# --- arguments ------------------------------------------------------------------------------------------------------
def _shard(loss: Any, given: Any, targets: Any, offset: Any) -> tuple[View, View, int]:
    """Scores of a shard, targets among all classes, the shard's first class: as `driver._shard` checks them."""
    driver.require()
    s = driver._scores(given)
    if s.ndim != 2:
        raise ValueError(f"scores has shape {s.shape}; it must be two-dimensional, {host_driver.SHARD}")
    start = host_driver.check_offset(loss, offset, s.shape[1])
    return s, _targets(targets, s), start


def _targets(value: Any, like: View | None) -> View:
    """Class indices; those of the host are copied to where `like` is."""
    if not arrays.is_device(value):
        array = checks.as_array(value, "targets")
        n = like.shape[0] if like is not None else len(array) if array.ndim else 0
        array = np.ascontiguousarray(host_driver.shard_targets(array, n))
        return like.from_host(array) if like is not None else arrays.view(device.cuda.to_device(array), "targets")
    y = arrays.view(value, "targets") if like is None else driver._on_gpu(value, "targets", like)
    n = (y.shape[0] if y.ndim else 0) if like is None else like.shape[0]
    host_driver.check_one_target(y.shape, n)
    if y.shape != (n,):
        raise ValueError(f"targets has shape {y.shape}; it must be ({n},), a class for each row")
    if y.dtype in device.REAL or y.dtype not in device.SIZES:
        raise TypeError(f"targets has dtype {y.dtype}; class indices must be integers")
    return y.contiguous()


def _views(stats: Any, like: View, n: int) -> list[View]:
    """The arrays of some stats, on the GPU of others; those of the host are copied."""
    if not isinstance(stats, Stats):
        raise TypeError(f"stats is {type(stats).__name__}; it must be what fastloss.Stats.merge gives")
    found = []
    for name, value in stats._asdict().items():
        if not arrays.is_device(value):
            value = like.from_host(np.ascontiguousarray(value, KINDS[name])).owner
        view = driver._on_gpu(value, f"stats.{name}", like)
        if view.shape != (n,):
            raise ValueError(f"stats.{name} has shape {view.shape}; it must be ({n},), as targets")
        if view.dtype != KINDS[name]:
            raise TypeError(f"stats.{name} has dtype {view.dtype}; it must be {KINDS[name]}")
        found.append(view.contiguous())
    return found


def _weights(
    loss: Any, y: View, sample_weight: Any, reduction: str, n: int
) -> tuple[Any, Any, int, float]:
    """Pointers to row multipliers and to their sum, flags, and what a value is multiplied by."""
    weight: View | None = None
    if arrays.is_device(sample_weight):
        weight = driver._vector(sample_weight, "sample_weight", y, n, "target")
    elif sample_weight is not None:
        weight = y.from_host(checks.weights(sample_weight, "sample_weight", n, "target"))
    none = driver.nothing(y.gpu, "float64")
    if weight is None and loss.class_weight is None and loss.ignore_index is None:
        return none, none, 0, 1.0 / max(1, n) if reduction == "mean" else 1.0
    known = 0 if loss.class_weight is None else len(loss.class_weight)
    weights, total = driver._weigh(loss, y, weight, n, known, y.gpu, y.stream)
    return weights, total, WEIGHTED | (SHARED_TOTAL if reduction == "mean" else 0), 1.0


def _of_class(loss: Any, gpu: int) -> Any:
    """A pointer to the class weights, and after them to the sums of all but each."""
    if loss.class_weight is None:
        return driver.nothing(gpu, "float64")
    kept: dict[Any, device.Buffer] = loss.__dict__.setdefault("_on_gpu", {})
    if ("all but", gpu) not in kept:
        weight = np.asarray(loss.class_weight, np.float64)
        kept["all but", gpu] = device.Buffer(np.concatenate([weight, _sums_of_others(weight)]))
    return kept["all but", gpu].pointer


def _sums_of_others(weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(reference.sum_of_others(weight[None])[0])


def _table(loss: Any, offset: int, c: int, dtype: str, gpu: int) -> tuple[scores.Plan, Any]:
    """The plan of a shard, and a pointer to its options."""
    row = rowmath.plan_of(loss, False, shard=True)
    kept: dict[Any, device.Buffer] = loss.__dict__.setdefault("_on_gpu", {})
    key = "shard", row, offset if row.weights else 0, c, dtype, gpu
    if key not in kept:
        real = np.dtype(device.REAL[dtype]).type
        kept[key] = device.Buffer(rowmath.shard_options(loss, row, 1.0, reference.shard_weights(loss, offset, c), real))
    return scores.Plan(row, dtype), kept[key].pointer


def _blocks(n: int) -> int:
    return max(1, min(-(-n // THREADS), 8 * device.limits().multiprocessors))


# --- calls ----------------------------------------------------------------------------------------------------------
def stats_call(loss: Any, given: Any, targets: Any, offset: Any) -> Stats:
    """`Loss.stats` for scores on a GPU: arrays of their kind."""
    s, y, start = _shard(loss, given, targets, offset)
    with device.on(s.gpu):
        driver.raise_errors(s.gpu)
        n, c = s.shape
        found = [s.empty((n,), kind) for kind in KINDS.values()]
        if n:
            work = s.contiguous()
            sums = _sums(loss, work, start)
            weight = float(c if loss.class_weight is None else loss.class_weight[start : start + c].sum())
            complete_kernel(s.dtype).launch(
                -(-n // THREADS), THREADS, 0, s.stream, work.pointer, n, c, y.pointer, driver._index_kind(y), start,
                sums, *Options.of(loss), weight, *(view.pointer for view in found), THREADS,
            )  # fmt: skip
        return Stats(*(view.owner for view in found))


def _sums(loss: Any, work: View, start: int) -> Any:
    """A pointer to three numbers of each row: Σ w (m − s), the largest score m, Σ exp(s − m) but for one that is m."""
    (n, c), gpu, stream, none = work.shape, work.gpu, work.stream, functools.partial(driver.nothing, work.gpu)
    real = device.REAL[work.dtype]
    if c == 0:
        return none(real)
    plan, table = _table(loss, start, c, work.dtype, gpu)
    sums = device.workspace(gpu, stream).get(f"shard {real}", 3 * n, real)
    arguments = scores.Arguments(
        work.pointer, work.pointer, driver._lead(work), 0, n, c, none("uint8"), 1, none(real), table, none("float64"),
        none(real), none("float64"), 1.0, 1.0, none("float64"), none(real), sums, none("int64"),
        scores.ROW_LOSS | scores.LSE | scores.ENTROPY,
    )  # fmt: skip
    scores.launch(plan, arguments, gpu, stream, driver.errors(gpu)[1])
    return sums


def merge(a: Stats, b: Stats) -> Stats:
    """`Stats.merge` where some of the arrays are on a GPU."""
    driver.require()
    like = next(
        arrays.view(value, f"stats.{name}")
        for stats in (a, b)
        for name, value in stats._asdict().items()
        if arrays.is_device(value)
    )
    n = like.shape[0] if like.ndim else 0
    with device.on(like.gpu):
        driver.raise_errors(like.gpu)
        given = [*_views(a, like, n), *_views(b, like, n)]
        found = [like.empty((n,), kind) for kind in KINDS.values()]
        if n:
            pointers = (view.pointer for view in (*given, *found))
            merge_kernel().launch(-(-n // THREADS), THREADS, 0, like.stream, n, *pointers, THREADS)
        return Stats(*(view.owner for view in found))


def value_call(loss: Any, stats: Stats, targets: Any, sample_weight: Any, reduction: str) -> Any:
    """`Loss.value_from_stats`: an array on the GPU."""
    driver.require()
    checks.one_of(reduction, "reduction", checks.REDUCTIONS)
    like = next(arrays.view(array, "stats") for array in stats if arrays.is_device(array))
    with device.on(like.gpu):
        driver.raise_errors(like.gpu)
        n = like.shape[0] if like.ndim else 0
        y = _targets(targets, like if like.ndim else None)
        views = _views(stats, like, n)
        values = like.empty((n,), "float64") if reduction == "none" else None
        value = None if reduction == "none" else like.empty((), "float64")
        if n == 0:
            if value is not None:
                value = like.from_host(np.array(math.nan if reduction == "mean" else 0.0))
        else:
            weights, total, flags, unit = _weights(loss, y, sample_weight, reduction, n)
            flags |= VALUES if values is not None else WRITES_VALUE
            workspace, none = device.workspace(like.gpu, like.stream), driver.nothing(like.gpu, "float64")
            blocks = _blocks(n)
            value_kernel().launch(
                blocks, THREADS, device.SCRATCH * 8, like.stream, n, *(view.pointer for view in views), y.pointer,
                driver._index_kind(y), *Options.of(loss), _of_class(loss, like.gpu), weights, total, unit,
                none if value is None else value.pointer, none if values is None else values.pointer,
                workspace.get("sums", blocks, np.float64), workspace.words(), driver.errors(like.gpu)[1], flags, blocks,
                THREADS,
            )  # fmt: skip
        result = values if value is None else value
        assert result is not None
        return result.owner


def gradient_call(
    loss: Any, given: Any, targets: Any, stats: Any, offset: Any, out: Any, sample_weight: Any, reduction: str,
    upstream: Any,
) -> Any:  # fmt: skip
    """`Loss.gradient_from_stats` for scores on a GPU: an array like them."""
    checks.one_of(reduction, "reduction", checks.REDUCTIONS)
    s, y, start = _shard(loss, given, targets, offset)
    with device.on(s.gpu):
        driver.raise_errors(s.gpu)
        n, c = s.shape
        views = dict(zip(Stats._fields, _views(stats, s, n), strict=True))
        factor, pulled = driver.upstream_of(upstream, reduction, s, n, "float64", "row of scores")
        target: View | None = None
        if out is not None:
            target = driver._out(out, s, s.shape, {"scores": s, "targets": y, "upstream": pulled}, True)
        grad = target if target is not None and target.is_contiguous else s.empty(s.shape, s.dtype)
        if n and c:
            weights, total, flags, unit = _weights(loss, y, sample_weight, reduction, n)
            flags |= GRADIENT | (0 if pulled is None else PULLED)
            workspace, none = device.workspace(s.gpu, s.stream), driver.nothing(s.gpu, "float64")
            columns = workspace.get("columns", n, np.int64)
            numbers = workspace.get("numbers", NUMBERS * n, np.float64)
            heavy = -1
            if loss.class_weight is not None and loss.label_smoothing:
                heavy = int(loss.class_weight.argmax()) - start
                heavy = heavy if 0 <= heavy < c else -1
            work, blocks = s.contiguous(), _blocks(n)
            of_rows = (views[name] for name in ("maximum", "rest", "found", "classes", "weight"))
            row_kernel(s.dtype).launch(
                blocks, THREADS, device.SCRATCH * 8, s.stream, work.pointer, n, c, y.pointer, driver._index_kind(y),
                start, heavy, *(view.pointer for view in of_rows),
                *Options.of(loss), _of_class(loss, s.gpu), weights, none if pulled is None else pulled.pointer, total,
                factor * unit, columns, numbers, workspace.words(), driver.errors(s.gpu)[1], flags, blocks, THREADS,
            )  # fmt: skip
            plan, table = _table(loss, start, c, s.dtype, s.gpu)
            team = min(THREADS, 1 << (c - 1).bit_length())
            rows = THREADS // team
            blocks = max(1, min(-(-n // rows), 64 * device.limits().multiprocessors))
            entries_kernel(plan).launch(
                blocks, THREADS, 0, s.stream, work.pointer, grad.pointer, n, c, heavy, table, columns, numbers, blocks,
                THREADS, team,
            )  # fmt: skip
        if target is not None and grad is not target:
            target.assign(grad)
            grad = target
        return grad.owner
