"""Kernels of a linear layer with few classes: scores, row losses and dW in one pass over the features.

A block takes tiles of `ROWS` rows. Warps share the rows (four each) and the features: a thread has the sums of its four
rows and some classes in registers, with W from the first cache; a warp's sums are scattered over its lanes as they are
added up. Then a thread for each row adds what the warps found, and does the row loss. Then each thread adds to dW, of
its own features and all classes, in registers: the tile's rows are still in the caches. A block's dW goes to a
workspace; a second kernel adds those of all blocks in order, in float64. So nothing depends on which block was first.

Traffic: X once from memory, W from the caches, a workspace of blocks · C · (D + 1) numbers.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from fastloss.gpu import device, scores
from fastloss.gpu.scores import ROW_LOSS, VALUES, WEIGHTED, Plan

#: Threads of a block, lanes of a warp, and warps that share the features of four rows. The simulator's are fewer.
THREADS, LANES, PARTS = (16, 4, 2) if device.SIMULATED else (384, 32, 3)
#: Rows of a tile: four for each group of warps.
ROWS = 4 * (THREADS // LANES // PARTS)
#: Numbers of dW that a thread can keep in registers.
KEPT = {"float32": 80, "float64": 36}
#: Classes whose scores a thread sums at a time.
AT_A_TIME = {"float32": 10, "float64": 5}
#: The most classes: more are products' work.
MOST_CLASSES = 64
#: Threads of the smaller kernels.
FEW_THREADS = 8 if device.SIMULATED else 256


class Layer(NamedTuple):
    """What a kernel is compiled for: `plan` is the row loss, in W's compute type; the others are the features'."""

    plan: Plan
    features: str
    classes: int
    width: int  # features of a thread
    picked: bool = False
    centred: bool = False
    gradient: bool = True

    @property
    def pitch(self) -> int:
        """Numbers of shared memory from a row's scores to the next one's."""
        return (self.classes + 3) // 4 * 4

    @property
    def begin(self) -> int:
        """Where the scores are in shared memory; before them the parts of the scores that warps found."""
        return max(scores._scratch(self.plan), (PARTS * ROWS * self.classes + 3) // 4 * 4)

    @property
    def shared_bytes(self) -> int:
        numbers = self.begin + ROWS * self.pitch
        if device.SIMULATED:  # what lanes exchange
            numbers += THREADS * 4 * groups(self.classes, self.plan.dtype)[0]
        return numbers * device.SIZES[self.plan.dtype]


def width(d: int) -> int:
    """Features of each thread."""
    return max(1, -(-d // THREADS))


def fits(c: int, d: int, real: str) -> bool:
    """Whether dW fits in the registers of a block."""
    return 0 < c <= MOST_CLASSES and c * width(d) <= KEPT[real]


def groups(c: int, real: str) -> tuple[int, int]:
    """How many classes are summed at a time, and how often."""
    times = -(-c // AT_A_TIME[real])
    return -(-c // times), times


def _lane_sums(count: int) -> tuple[str, int]:
    """The source of `sums(t, x)`: x is a tuple of `count` numbers of each lane; each lane is left with `kept` of their
    sums over the warp, those from number `first` on: halves are exchanged between lanes, so that each sum is made once.

    Returns it, whose result is the kept sums, `first` and how many of them count, and `kept`.
    """
    lines, names = ["def sums(t, x):", f" first, size = 0, {count}"], [f"x[{i}]" for i in range(count)]
    n, k, step = count, LANES // 2, 0
    while k:
        half = -(-n // 2)
        lines.append(f" up = t & {k}")
        found = []
        for i in range(half):
            low, high = names[i], names[i + half] if i + half < n else "zero"
            name = f"y{step}_{i}"
            lines.append(f" {name} = ({high} if up else {low}) + shuffle({low} if up else {high}, {k})")
            found.append(name)
        lines.append(f" first += {half} if up else 0")
        lines.append(f" size = max(size - {half}, 0) if up else min(size, {half})")
        names, n, k, step = found, half, k // 2, step + 1
    lines.append(f" return ({''.join(name + ',' for name in names)}), first, size")
    return "\n".join(lines), n


def _reducer(count: int, real: Any) -> tuple[Any, int]:
    """`reduce(s, at, t, x)` and `kept`: see `_lane_sums`. In the simulator, without shuffles, through shared memory."""
    source, kept = _lane_sums(count)
    zero = real(0)
    if not device.SIMULATED:
        scope: dict[str, Any] = {"shuffle": device.shuffle, "zero": zero}
        exec(source, scope)
        sums = device.device_function(scope["sums"])

        def reduce(s, at, t, x):
            return sums(t, x)

        return device.device_function(reduce), kept
    sync = device.syncthreads

    def simulated(s, at, t, x):
        for i in range(count):
            s[at + t * count + i] = x[i]
        sync()
        first, size, n, k = 0, count, count, LANES // 2
        while k:
            half = -(-n // 2)
            first, size = (first + half, max(size - half, 0)) if t & k else (first, min(size, half))
            n, k = half, k // 2
        warp = t - t % LANES
        found = tuple(
            sum((s[at + (warp + lane) * count + i] for lane in range(LANES)), zero) if i < count else zero
            for i in range(first, first + kept)
        )
        sync()
        return found, first, size

    return simulated, kept


def _packer(count: int) -> Any:
    """`pack(a)`: the numbers of a local array as a tuple."""
    scope: dict[str, Any] = {}
    exec(f"def pack(a): return ({''.join(f'a[{i}],' for i in range(count))})", scope)
    return device.device_function(scope["pack"])


def _row_work(layer: Layer, have: SimpleNamespace) -> Any:
    """A row's loss, by one thread; its scores in shared memory become its gradient. Returns w · ℓ, and stores it, or ℓ.
    """
    plan, row, walks, c = layer.plan, have.row, have.walks, layer.classes
    zero, nan, nowhere, real = have.zero, have.nan, have.nowhere, row.real
    options_of, open_row, factor_of, own_margin = have.options_of, have.open_row, have.factor_of, have.own_margin
    walk_top, walk_state, walk_fill, at_class = walks.top, walks.state, walks.fill, walks.at_class
    walk_gradient, is_max, store = walks.gradient(False), walks.is_max, device.store
    aim, settle, sums_of = row.aim, row.settle, row.sums
    looks, has_index, has_target, counts_target = (
        plan.row.looks, plan.has_index, plan.row.has_target, plan.row.counts_target,
    )  # fmt: skip
    gradient, pitch, values_of, unweighted = layer.gradient, layer.pitch, VALUES, ROW_LOSS

    def work(s, at, i, live, targets, kind, q, table_of, weight, upstream, total, grad_scale, values, words, flags):
        limit = i + 1 if live else 0
        w, y, bad = open_row(i, limit, c, targets, kind, q, i * c, 0, c, 1, weight, words, flags)
        options = options_of(table_of)
        stop = pitch if w != 0.0 and not (bad and has_index) else 0
        m, sy, own = zero, zero, zero
        if has_target and stop > 0:
            sy = s[at + y]
        if looks:
            m = walk_top(s, at, 0, 4, stop)
        if counts_target and stop > 0:
            own = own_margin(y, c, options, table_of)
        factor = factor_of(i, limit, w, upstream, total, grad_scale, flags)
        known = aim(m, sy, factor, options)
        state = walk_state(s, at, 0, 4, stop, 0, gradient, c, y, known, options, table_of, q, i * c)
        loss, _, _, at_target, n0, n1, n2, n3 = settle(
            m, sy, own, known, sums_of(state), state[1], factor, options
        )  # fmt: skip
        bad = bad or w != w
        if bad:
            loss = nan
        if w == 0.0:
            loss = zero
        if gradient:
            if bad or w == 0.0 or factor == zero:
                walk_fill(s, at, 0, 4, pitch, nan if bad else zero)
            elif is_max:
                low = nowhere
                for k in range(c):
                    x = s[at + k]
                    if x == state[0] or x != x:
                        low = min(low, real(k))
                at_class(s, at, 0, 4, stop, 0, y, at_target, low, n0)
            else:
                walk_gradient(
                    s, at, 0, 4, stop, 0, c, y, known, options, table_of, q, i * c, at_target, (n0, n1, n2, n3)
                )  # fmt: skip
        found = w * loss if w != 0.0 else 0.0
        if live and flags & values_of:
            store(values, i, real(loss if flags & unweighted else found))
        return found

    return device.device_function(work)


def _build_pass(layer: Layer) -> Any:
    plan, c, features = layer.plan, layer.classes, layer.width
    have = scores._parts(plan)
    jit, load, load4, store, fma = device.device_function, device.load, device.load4, device.store, device.fma
    shared, sync, thread, block = device.shared, device.syncthreads, device.thread_index, device.block_index
    cuda, number = local_arrays(plan.dtype)
    real, zero, none, zero64 = have.row.real, have.zero, have.none, np.float64(0)
    some, times = groups(c, plan.dtype)
    four = 4 * some
    reduce, kept = _reducer(four, real)
    pack, work_on, finish = _packer(four), _row_work(layer, have), have.finish
    picked, centred, gradient, pitch, begin_scores = (
        layer.picked, layer.centred, layer.gradient, layer.pitch, layer.begin,
    )  # fmt: skip
    n_rows, parts, lanes, threads, kept_dw = ROWS, PARTS, LANES, THREADS, c * features
    row_groups, scratch = THREADS // LANES // PARTS, layer.begin + ROWS * layer.pitch
    weighted, values_of = WEIGHTED, VALUES

    def place(k, n, index, weight, flags):
        # The row of X that is row k of the call; −1 for none, and for those that are skipped.
        if k >= n:
            return -1
        if flags & weighted and load(weight, k) == 0.0:
            return -1
        return load(index, k) if picked else k

    place = jit(place)

    def feature(X, i, j, stride, centre):
        if i < 0:
            return zero
        x = real(load(X, i * stride + j))
        return x - load(centre, j) if centred else x

    feature = jit(feature)

    def dot(g0, x0, g1, x1, g2, x2, g3, x3, total):
        return fma(g0, x0, fma(g1, x1, fma(g2, x2, fma(g3, x3, total))))

    dot = jit(dot)

    def kernel(
        X, stride, index, centre, W, b, n, d, targets, kind, q, table_of, weight, upstream, total, grad_scale,
        value_scale, value, values, work, sums, words, errors, flags, blocks,
    ):  # fmt: skip
        t = thread()
        s = shared(zero)
        warp, lane = t // lanes, t % lanes
        group, part = warp % row_groups, warp // row_groups
        span = (d + parts - 1) // parts
        begin = part * span
        stop = min(d, begin + span)
        acc = cuda.local.array(kept_dw, number)
        a = cuda.local.array(four, number)
        for i in range(kept_dw):
            acc[i] = zero
        acc_b, found = zero, zero64
        tile = block() * n_rows
        while tile < n:
            own = tile + 4 * group
            i0, i1 = place(own, n, index, weight, flags), place(own + 1, n, index, weight, flags)
            i2, i3 = place(own + 2, n, index, weight, flags), place(own + 3, n, index, weight, flags)
            turn = 0
            while turn < times:
                for i in range(four):
                    a[i] = zero
                j = begin + lane
                while j < stop:
                    x0, x1 = feature(X, i0, j, stride, centre), feature(X, i1, j, stride, centre)
                    x2, x3 = feature(X, i2, j, stride, centre), feature(X, i3, j, stride, centre)
                    for k in range(some):
                        w = load(W, min(turn * some + k, c - 1) * d + j)
                        a[4 * k] = fma(w, x0, a[4 * k])
                        a[4 * k + 1] = fma(w, x1, a[4 * k + 1])
                        a[4 * k + 2] = fma(w, x2, a[4 * k + 2])
                        a[4 * k + 3] = fma(w, x3, a[4 * k + 3])
                    j += lanes
                mine, first, size = reduce(s, scratch, t, pack(a))
                for i in range(kept):
                    e = first + i
                    k = turn * some + e // 4
                    if i < size and k < c:
                        s[(part * n_rows + 4 * group + e % 4) * c + k] = mine[i]
                turn += 1
            sync()
            if t < n_rows:
                i = place(tile + t, n, index, weight, flags)
                at = begin_scores + t * pitch
                for k in range(pitch):
                    score = none  # of a class that is not there
                    if k < c:
                        score = load(b, k)
                        for p in range(parts):
                            score += s[(p * n_rows + t) * c + k]
                    s[at + k] = score
                found += work_on(
                    s, at, min(tile + t, n - 1), i >= 0, targets, kind, q, table_of, weight, upstream, total,
                    grad_scale, values, words, flags,
                )  # fmt: skip
                if i < 0 and tile + t < n and flags & values_of:
                    store(values, tile + t, zero)
            sync()
            if gradient:
                r = 0
                while r < n_rows:
                    i0, i1 = place(tile + r, n, index, weight, flags), place(tile + r + 1, n, index, weight, flags)
                    i2, i3 = place(tile + r + 2, n, index, weight, flags), place(tile + r + 3, n, index, weight, flags)
                    g = begin_scores + r * pitch
                    for i in range(features):
                        j = t + i * threads
                        if j < d:
                            x0, x1 = feature(X, i0, j, stride, centre), feature(X, i1, j, stride, centre)
                            x2, x3 = feature(X, i2, j, stride, centre), feature(X, i3, j, stride, centre)
                            for k in range(0, c, 4):
                                g0, g1 = load4(s, g + k), load4(s, g + pitch + k)
                                g2, g3 = load4(s, g + 2 * pitch + k), load4(s, g + 3 * pitch + k)
                                at = i * c + k
                                acc[at] = dot(g0[0], x0, g1[0], x1, g2[0], x2, g3[0], x3, acc[at])
                                if k + 1 < c:
                                    acc[at + 1] = dot(g0[1], x0, g1[1], x1, g2[1], x2, g3[1], x3, acc[at + 1])
                                if k + 2 < c:
                                    acc[at + 2] = dot(g0[2], x0, g1[2], x1, g2[2], x2, g3[2], x3, acc[at + 2])
                                if k + 3 < c:
                                    acc[at + 3] = dot(g0[3], x0, g1[3], x1, g2[3], x2, g3[3], x3, acc[at + 3])
                    if t < c:
                        acc_b += (s[g + t] + s[g + pitch + t]) + (s[g + 2 * pitch + t] + s[g + 3 * pitch + t])
                    r += 4
                sync()
            tile += blocks * n_rows
        if gradient:
            own = block() * c * (d + 1)
            for i in range(features):
                j = t + i * threads
                if j < d:
                    for k in range(c):
                        store(work, own + k * (d + 1) + j, acc[i * c + k])
            if t < c:
                store(work, own + t * (d + 1) + d, acc_b)
        wide = shared(zero64)
        sync()
        if t < n_rows:
            wide[t] = found
        sync()
        if t == 0:
            for r in range(1, n_rows):
                found += wide[r]
            store(sums, block(), found)
        sync()
        finish(sums, blocks, blocks, words, errors, targets, kind, c, value, total, value_scale, flags, t, threads)

    return kernel


def local_arrays(real: str) -> tuple[Any, Any]:
    """What `cuda.local.array(count, number)` is in a kernel, and `number`; a list in the simulator."""
    if device.SIMULATED:
        zero = np.dtype(real).type(0)
        return SimpleNamespace(local=SimpleNamespace(array=lambda count, number: [zero] * count)), zero
    return device.cuda, getattr(device.cuda.types, real)


def _build_prepare(real_name: str) -> Any:
    """W as given, and what scale and shift make of it, to contiguous weights and b: a block for each class."""
    load, store, shared = device.load, device.store, device.shared
    thread, block = device.thread_index, device.block_index
    zero64 = np.float64(0)
    real = np.dtype(real_name).type

    def plus(a, b):
        return (a[0] + b[0],)

    reduce = device.reduction(device.device_function(plus), 1)

    def kernel(W, row_step, step, given_b, b_step, scale, rest, weights, b, d, has_b, scaled, has_rest, threads):
        s = shared(zero64)
        t, k = thread(), block()
        moved = zero64
        j = t
        while j < d:
            w = np.float64(load(W, k * row_step + j * step))
            if scaled:
                w /= load(scale, j)
            if has_rest:
                moved += w * load(rest, j)
            store(weights, k * d + j, real(w))
            j += threads
        (moved,) = reduce(s, (moved,), (zero64,), t, threads)
        if t == 0:
            own = np.float64(load(given_b, k * b_step)) if has_b else zero64
            store(b, k, real(own - moved))

    return kernel


def _build_finish(real_name: str) -> Any:
    """dW and db, of those of all blocks, added up in order: a thread for each number."""
    load, store, thread, block = device.load, device.store, device.thread_index, device.block_index
    zero64 = np.float64(0)
    real = np.dtype(real_name).type

    def add_up(work, blocks, size, e):
        found = zero64
        k = 0
        while k < blocks:
            found += load(work, k * size + e)
            k += 1
        return found

    add_up = device.device_function(add_up)

    def kernel(
        work, blocks, c, d, scale, rest, scaled, has_rest, dW, row_step, step, db, db_step, has_dW, has_db, threads
    ):  # fmt: skip
        e = block() * threads + thread()
        size = c * (d + 1)
        if e < size:
            k, j = e // (d + 1), e % (d + 1)
            if j == d:
                if has_db:
                    store(db, k * db_step, real(add_up(work, blocks, size, e)))
            elif has_dW:
                found = add_up(work, blocks, size, e)
                if has_rest:
                    found -= add_up(work, blocks, size, k * (d + 1) + d) * load(rest, j)
                if scaled:
                    found /= load(scale, j)
                store(dW, k * row_step + j * step, real(found))

    return kernel


@functools.cache
def pass_kernel(layer: Layer) -> device.Kernel:
    """Compiled for a layer: a launch has `THREADS` threads a block, and `layer.shared_bytes` of shared memory."""
    real = layer.plan.dtype
    return device.Kernel(
        lambda: _build_pass(layer),
        (f"{layer.features}*", "int64", "int64*", f"{real}*", f"{real}*", f"{real}*", "int64", "int64", "uint8*",
         "int64", f"{real}*", f"{real}*", "float64*", "float64*", "float64*", "float64", "float64", "float64*",
         f"{real}*", f"{real}*", "float64*", "int64*", "int64*", "int64", "int64"),
        THREADS,
    )  # fmt: skip


@functools.cache
def prepare_kernel(given: str, given_b: str, real: str) -> device.Kernel:
    """W and b in their types to those of the compute type."""
    return device.Kernel(
        lambda: _build_prepare(real),
        (f"{given}*", "int64", "int64", f"{given_b}*", "int64", "float64*", "float64*", f"{real}*", f"{real}*", "int64",
         "int64", "int64", "int64", "int64"),
        FEW_THREADS,
    )  # fmt: skip


@functools.cache
def finish_kernel(real: str, result: str, result_b: str) -> device.Kernel:
    """A workspace of the compute type to dW and db in their types."""
    return device.Kernel(
        lambda: _build_finish(real),
        (f"{real}*", "int64", "int64", "int64", "float64*", "float64*", "int64", "int64", f"{result}*", "int64",
         "int64", f"{result_b}*", "int64", "int64", "int64", "int64"),
        FEW_THREADS,
    )  # fmt: skip


# --- smaller kernels --------------------------------------------------------------------------------------------------
def _build_pick(indices: bool) -> Any:
    """Rows by index: class indices of any type as int64, or rows of c numbers."""
    load, store, load_index, thread, block = (
        device.load, device.store, device.load_index, device.thread_index, device.block_index,
    )  # fmt: skip

    def kernel(source, kind, index, out, n, c, threads):
        e = block() * threads + thread()
        if e < n * c:
            at = load(index, e // c) * c + e % c
            if indices:
                store(out, e, load_index(source, at, kind))
            else:
                store(out, e, load(source, at))

    return kernel


@functools.cache
def pick_kernel(dtype: str) -> device.Kernel:
    """Of class indices ("int64", from any type), or of numbers of a type."""
    indices = dtype == "int64"
    source = "uint8*" if indices else f"{dtype}*"
    signature = source, "int64", "int64*", f"{dtype}*", "int64", "int64", "int64"
    return device.Kernel(lambda: _build_pick(indices), signature, FEW_THREADS)


def _build_penalise(real_name: str) -> Any:
    """Adds the gradient of Σ square · w² + absolute · |w| to one of W's shape; the blocks' sums of the value."""
    load, store, shared, thread, block = (
        device.load, device.store, device.shared, device.thread_index, device.block_index,
    )  # fmt: skip
    zero64 = np.float64(0)
    real = np.dtype(real_name).type

    def plus(a, b):
        return (a[0] + b[0],)

    reduce = device.reduction(device.device_function(plus), 1)

    def kernel(
        W, row_step, step, grad, grad_row_step, grad_step, c, d, square, absolute, has_grad, sums, blocks, threads
    ):  # fmt: skip
        s = shared(zero64)
        t = thread()
        found = zero64
        e = block() * threads + t
        while e < c * d:
            k, j = e // d, e % d
            w = np.float64(load(W, k * row_step + j * step))
            size = abs(w)
            found += square * w * w + absolute * size
            if has_grad:
                sign = zero64
                if size > zero64:
                    sign = absolute if w > zero64 else -absolute
                at = k * grad_row_step + j * grad_step
                store(grad, at, real(load(grad, at) + (2.0 * square * w + sign)))
            e += blocks * threads
        (found,) = reduce(s, (found,), (zero64,), t, threads)
        if t == 0:
            store(sums, block(), found)

    return kernel


def _build_add_up() -> Any:
    """value ← value + Σ of some numbers."""
    load, store = device.load, device.store

    def kernel(sums, count, value):
        found = load(value, 0)
        k = 0
        while k < count:
            found += load(sums, k)
            k += 1
        store(value, 0, found)

    return kernel


@functools.cache
def penalise_kernel(dtype: str) -> device.Kernel:
    return device.Kernel(
        lambda: _build_penalise("float64" if dtype == "float64" else "float32"),
        (f"{dtype}*", "int64", "int64", f"{dtype}*", "int64", "int64", "int64", "int64", "float64", "float64", "int64",
         "float64*", "int64", "int64"),
        FEW_THREADS,
    )  # fmt: skip


@functools.cache
def add_up_kernel() -> device.Kernel:
    return device.Kernel(_build_add_up, ("float64*", "int64", "float64*"), 32)


def _build_rescale(real_name: str) -> Any:
    """numbers ← factor · numbers; nothing is read or written where the factor is 1."""
    load, store, thread, block = device.load, device.store, device.thread_index, device.block_index
    real, one = np.dtype(real_name).type, np.float64(1)

    def kernel(numbers, n, factor, blocks, threads):
        f = load(factor, 0)
        if f != one:
            e = block() * threads + thread()
            while e < n:
                store(numbers, e, real(f * load(numbers, e)))
                e += blocks * threads

    return kernel


@functools.cache
def rescale_kernel(dtype: str) -> device.Kernel:
    return device.Kernel(
        lambda: _build_rescale("float64" if dtype == "float64" else "float32"),
        (f"{dtype}*", "int64", "float64*", "int64", "int64"),
        FEW_THREADS,
    )  # fmt: skip
