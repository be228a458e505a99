"""The linear layer by BLAS: what many classes, gradients of X, stacked candidates and Hessian products share.

Rows are handled in chunks, so that no N × C array exists; the products are BLAS's, the row losses a backend's. The
shape of every product depends on the shape of the problem alone, and each runs on one thread inside ours (the BLAS
is switched for the call, and switched back): so results do not depend on threads.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

from fastloss._checks import Array
from fastloss.backends import Backend

CHUNK_BYTES = 48 << 20  # of scores and features in a chunk, at most
CACHE_BYTES = 8 << 20  # of the same, where that leaves a chunk enough rows:
CHUNK_ROWS = 2048  # beside products over so many, reading and writing dW once for each chunk costs little
BLOCK = 1 << 19  # numbers in the result of one product, at most: it is added to dW from the cache
WIDE = 1024  # columns of them, at most; and classes that a thread handles at once
SCORES, CLASSES = 1 << 20, 2048  # the same of scores, which stay where they are: each block of rows has W packed anew
PARTS = 8  # of a product at least, where it is large enough: any few threads get even shares
LEAST = 256  # rows or columns of a product's result that are not split further,
LEAST_TERMS = 1024  # and terms of its sums
PARTIAL_BYTES = 8 << 20  # of partial sums, at most
UNIT = 16  # rows: chunks are whole numbers of them, which BLAS's inner loops are
LEAST_SCORES = 1 << 13  # of a part of the rows
SMALL = 12 << 20  # multiplications of a product below which starting threads costs more than it brings


# --- threads of our own, and one for each call of BLAS --------------------------------------------------------------
def has_number_of_each_thread(library: Any) -> bool:
    """Whether a BLAS library's number of threads is one for each calling thread (OpenMP's), not for the process."""
    with ThreadPoolExecutor(1) as other:
        seen, mine = other.submit(library.get_num_threads).result(), library.get_num_threads()
        number = 1 if seen != 1 else 2
        try:
            set_number(library, number)
            return bool(other.submit(library.get_num_threads).result() != number)
        finally:
            set_number(library, mine)


def set_number(library: Any, n_threads: int) -> None:
    """threadpoolctl lets the first thread that changes a BLAS of its own threads (OpenBLAS) be the only one to do so,
    and ignores others; but the switch must work from any thread: the claim is taken over, and given up after.
    """
    give_up_claim = getattr(library, "clear_controlling_thread", lambda force: None)
    give_up_claim(force=True)
    library.set_num_threads(n_threads)
    give_up_claim(force=True)


class BlasSwitch:
    """One thread for each BLAS call while any call of ours is under way; then as it was.

    Most libraries have one number for the process: the first call switches it, and whoever ends last switches it back.
    Others have one for each thread: each call switches that of its threads, and puts its caller's back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._libraries: tuple[list[Any], list[Any]] | None = None
        self._users = 0
        self._before: list[tuple[Any, int]] = []
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._in_child
            )

    def _in_child(self) -> None:
        try:
            self._restore(self._before)  # the calls under way are the parent's
        finally:
            self._users, self._before = 0, []
            self._lock.release()

    def _found(self) -> tuple[list[Any], list[Any]]:
        """The libraries with one number for the process, and those with one for each thread; the lock is held."""
        if self._libraries is None:
            from threadpoolctl import ThreadpoolController

            found = ThreadpoolController().select(user_api="blas").lib_controllers
            per_thread = [has_number_of_each_thread(library) for library in found]
            self._libraries = (
                [library for library, own in zip(found, per_thread, strict=True) if not own],
                [library for library, own in zip(found, per_thread, strict=True) if own],
            )
        return self._libraries

    def look_again(self) -> None:
        """Find the BLAS libraries anew at the next call: one was loaded since, maybe (SciPy brings its own)."""
        with self._lock:
            self._libraries = None

    @staticmethod
    def _limit(libraries: list[Any], before: list[tuple[Any, int]]) -> None:
        """One thread for each; what they had goes into `before`, as it is changed."""
        for library in libraries:
            before.append((library, library.get_num_threads()))
            set_number(library, 1)

    @staticmethod
    def _restore(before: list[tuple[Any, int]]) -> None:
        while before:
            set_number(*before.pop())

    @contextmanager
    def __call__(self) -> Iterator[None]:
        mine: list[tuple[Any, int]] = []
        try:
            with self._lock:
                self._users += 1
                shared, own = self._found()
                if self._users == 1:
                    self._limit(shared, self._before)
            self._limit(own, mine)
            yield
        finally:
            self._restore(mine)
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._restore(self._before)

    def limit_this_thread(self) -> None:
        """In a thread that ends with the call: for libraries with a number for each."""
        with self._lock:
            own = self._found()[1]
        self._limit(own, [])


one_blas_thread = BlasSwitch()


class Workers:
    """Threads for one call, the caller's among them: `run` calls a function on each of some parts, in any order.

    BLAS runs on one thread in each of them meanwhile, unless the functions do not call it (`blas=False`).
    """

    def __init__(self, n_threads: int, blas: bool = True) -> None:
        self._n_threads = n_threads
        self._limit = one_blas_thread.limit_this_thread if blas else None
        self._kept = threading.local()

    def __enter__(self) -> Workers:
        self._switch: AbstractContextManager[None] = one_blas_thread() if self._limit else nullcontext()
        self._switch.__enter__()
        self._pool = None
        if self._n_threads > 1:
            self._pool = ThreadPoolExecutor(self._n_threads - 1, initializer=self._limit)
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if self._pool is not None:
                self._pool.shutdown()
        finally:
            self._switch.__exit__(*error)

    def run(self, task: Callable[[Any], Any], parts: list[Any]) -> list[Any]:
        """The results in the order of the parts; an error in one of them, once no thread is at work any more."""
        left, results = deque(enumerate(parts)), [None] * len(parts)

        def work() -> None:
            with np.errstate(all="ignore"):  # NaN and inf in features propagate, they are no event
                while left:
                    try:
                        position, part = left.popleft()
                    except IndexError:  # another thread took the last
                        return
                    try:
                        results[position] = task(part)
                    except BaseException:
                        left.clear()
                        raise

        others = [self._pool.submit(work) for _ in range(min(self._n_threads, len(parts)) - 1)] if self._pool else []
        try:
            work()
        finally:
            wait(others)
        for other in others:
            other.result()
        return results

    def scratch(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array of this thread, with anything in it; the memory is the same each time, as long as it fits."""
        size = math.prod(shape)
        found = getattr(self._kept, name, None)
        if found is None or found.size < size:
            found = np.empty(size, dtype)
            setattr(self._kept, name, found)
        return np.asarray(found[:size].reshape(shape))


# --- parts, by the shape alone --------------------------------------------------------------------------------------
def split(n: int, parts: int) -> list[slice]:
    """range(n) in that many consecutive parts of sizes as even as can be; none of them empty."""
    parts = max(1, min(n, parts))
    return [slice(k * n // parts, (k + 1) * n // parts) for k in range(parts)] if n else []


def cut(n: int, size: int) -> list[slice]:
    """range(n) in consecutive parts of at most that size."""
    return split(n, -(-n // size))


def grid(
    m: int, n: int, k: int = 0, itemsize: int = 1, block: int = BLOCK, wide: int = WIDE
) -> tuple[list[slice], list[slice], list[slice]]:
    """Parts of the rows, the columns and the k terms of a product (m, n); terms are split only where k is given."""
    across, deep = max(1, -(-n // wide)), 1
    down = max(1, -(-m // (block // max(1, min(n, wide)))))
    while down * across * deep < PARTS:
        if k >= (deep + 1) * LEAST_TERMS and (deep + 1) * m * n * itemsize <= PARTIAL_BYTES:
            deep += 1
        elif max(m // down, n // across) < 2 * LEAST:
            break
        elif m // down > n // across:
            down += 1
        else:
            across += 1
    return split(m, down), split(n, across), split(k, deep)


def chunks(n: int, row_bytes: int, chunk_rows: int | None) -> list[slice]:
    """range(n) in chunks of about the same size, as large as chunk_rows, or else the limits above, allow."""
    limit = chunk_rows or max(1, min(CHUNK_BYTES // row_bytes, max(CACHE_BYTES // row_bytes, CHUNK_ROWS)))
    unit = UNIT if limit >= UNIT else 1
    even = -(-n // max(1, -(-n // (limit - limit % unit))))
    size = max(1, -(-even // unit) * unit)
    return [slice(start, min(n, start + size)) for start in range(0, n, size)]


# --- rows -----------------------------------------------------------------------------------------------------------
def has_blas_rows(a: Array) -> bool:
    """Whether BLAS can take the rows of a matrix as they are; NumPy would copy it for each product, or do without."""
    step, within = a.strides
    return a.flags.aligned and within == a.itemsize and step % a.itemsize == 0 and step >= a.shape[1] * a.itemsize


def for_blas(a: Array) -> Array:
    return a if has_blas_rows(a) else np.ascontiguousarray(a)


class Rows:
    """The rows of a call that are not skipped, and what goes with them, by slices of range(len(rows)).

    Of sparse X only the length is used here.
    """

    def __init__(
        self, X: Any, rows: Array | None, centre: Array | None, targets: Array, multiplier: Array | None,
        dtype: np.dtype[Any],
    ) -> None:  # fmt: skip
        self._X, self._centre, self._targets, self._multiplier, self._dtype = X, centre, targets, multiplier, dtype
        self._rows = rows
        self._places = None  # in the order of the call, where rows are skipped
        if multiplier is not None and not multiplier.all():
            self._places = np.flatnonzero(multiplier if rows is None else multiplier[rows])
            self._rows = self._places if rows is None else rows[self._places]

    def __len__(self) -> int:
        return len(self._X if self._rows is None else self._rows)

    def at(self, part: slice) -> Any:
        """Index of rows in X."""
        return part if self._rows is None else self._rows[part]

    def place(self, part: slice) -> Any:
        """Index of rows in what the call returns for each row."""
        return part if self._places is None else self._places[part]

    @property
    def skips(self) -> bool:
        return self._places is not None

    @property
    def takes_all(self) -> bool:
        """Whether they are all of X's, in its order."""
        return self._rows is None

    @property
    def direct(self) -> bool:
        """Whether features can be used where they are."""
        same = self._rows is None and self._centre is None and self._X.dtype == self._dtype
        return same and has_blas_rows(self._X)

    def features(self, part: slice) -> Array:
        """Where they are."""
        return np.asarray(self._X[part])

    def load(self, part: slice, into: Array) -> None:
        """Features in the compute type, less the centre."""
        into[...] = self._X[self.at(part)]
        if self._centre is not None:
            into -= self._centre

    def targets(self, part: slice) -> Array:
        return np.asarray(self._targets[self.at(part)])

    def multiplier(self, part: slice) -> Any:
        return None if self._multiplier is None else self._multiplier[self.at(part)]


# --- the layer ------------------------------------------------------------------------------------------------------
def within(part: slice, block: slice) -> slice:
    """The rows of a block of a part, in the order of all."""
    return slice(part.start + block.start, part.start + block.stop)


def add(total: Array, term: Array, first: bool, factor: float | None) -> None:
    """total += term, in place; the first term is written, and after the last the sum is multiplied by the factor."""
    if first:
        total[...] = term
    else:
        total += term
    if factor is not None:
        total *= total.dtype.type(factor)


def multiply(workers: Workers, left: Array, right: Array, store: Callable[[slice, slice, Array], None]) -> None:
    """left @ right, by blocks that threads share; each goes to `store(rows, columns, block)`, which may change it."""
    (m, k), n, dtype = left.shape, right.shape[1], left.dtype
    downs, acrosses, deeps = grid(m, n, k, dtype.itemsize)
    partial = workers.scratch("partial", (len(deeps), m, n), dtype) if len(deeps) > 1 else None

    def block(at: tuple[slice, slice, int]) -> None:
        rows, columns, deep = at
        if partial is not None:
            out = partial[deep, rows, columns]
        else:
            out = workers.scratch("product", (rows.stop - rows.start, columns.stop - columns.start), dtype)
        np.matmul(left[rows, deeps[deep]], right[deeps[deep], columns], out=out)
        if partial is None:
            store(rows, columns, out)

    def add_up(rows: slice) -> None:
        assert partial is not None
        for term in partial[1:, rows]:
            partial[0, rows] += term
        store(rows, slice(0, n), partial[0, rows])

    workers.run(block, list(itertools.product(downs, acrosses, range(len(deeps)))))
    if partial is not None:
        workers.run(add_up, split(m, PARTS))


def sweep(
    rows: Rows, layers: list[tuple[Array, Array | None]], row_work: Callable[..., float], scale: float,
    dW: Array | None, db: Array | None, dX: Array | None, chunk_rows: int | None, n_threads: int,
) -> float:  # fmt: skip
    """For each chunk of rows the scores x Wᵀ + b of each layer, then `row_work(rows, scores of each layer …)`, which
    leaves a gradient in the first; from that dW, db and, for the first layer, dX, each multiplied by `scale`.

    Returns the sum of what `row_work` returned.
    """
    layers = [(for_blas(W), b) for W, b in layers]
    first_W = layers[0][0]
    n, (c, d), dtype = len(rows), first_W.shape, first_W.dtype
    parts = chunks(n, (len(layers) * c + d) * dtype.itemsize, chunk_rows)
    size = parts[0].stop if parts else 0
    buffers = [np.empty((size, c), dtype) for _ in layers]
    loaded = None if rows.direct else np.empty((size, d), dtype)
    ones = np.ones(size, dtype)
    for array in (dW, db):
        if n == 0 and array is not None:
            array[...] = 0

    def handle(part: slice, workers: Workers) -> float:
        size = part.stop - part.start
        x = rows.features(part) if loaded is None else loaded[:size]
        scores = [buffer[:size] for buffer in buffers]
        first, factor = part.start == 0, scale if part.stop == n else None

        def load(block: slice) -> None:
            if loaded is not None:
                rows.load(within(part, block), loaded[block])

        def produce(at: tuple[slice, slice]) -> None:
            for (W, b), product in zip(layers, scores, strict=True):
                np.matmul(x[at[0]], W[at[1]].T, out=product[at])
                if b is not None:
                    product[at] += b[at[1]]

        def turn(block: slice) -> tuple[float, Array | None]:
            value = row_work(within(part, block), *(array[block] for array in scores))
            return value, None if db is None else ones[: block.stop - block.start] @ scores[0][block]

        def all_of(block: slice) -> tuple[float, Array | None]:
            load(block)
            produce((block, slice(0, c)))
            return turn(block)

        def store_dW(classes: slice, features: slice, block: Array) -> None:
            assert dW is not None
            add(dW[classes, features], block, first, factor)

        def store_dX(block_rows: slice, features: slice, block: Array) -> None:
            assert dX is not None
            block *= dtype.type(scale)
            dX[rows.place(within(part, block_rows)), features] = block

        blocks = split(size, min(PARTS, size * c // LEAST_SCORES))
        if c <= WIDE:  # rows stay with a thread for all three
            found = workers.run(all_of, blocks)
        else:
            if loaded is not None:
                workers.run(load, blocks)
            some_rows, some_classes, _ = grid(size, c, block=SCORES, wide=CLASSES)
            workers.run(produce, list(itertools.product(some_rows, some_classes)))
            found = workers.run(turn, blocks)
        if dW is not None:
            multiply(workers, scores[0].T, x, store_dW)
        if db is not None:
            add(db, sum(term for _, term in found), first, factor)
        if dX is not None:
            multiply(workers, scores[0], first_W, store_dX)
        return float(sum(value for value, _ in found))

    with Workers(n_threads if n * first_W.size >= SMALL else 1) as workers:
        return sum((handle(part, workers) for part in parts), 0.0)


def linear_rows(
    backend: Backend, loss: Any, X: Array, rows: Array | None, centre: Array | None, W: Array, b: Array | None,
    targets: Array, multiplier: Array | None, scale: float, dW: Array | None, db: Array | None, dX: Array | None,
    row_loss: Array | None, chunk_rows: int | None, n_threads: int,
) -> float:  # fmt: skip
    """`Backend.linear_rows` by blocks: for each chunk of rows the scores, the row losses in place, the gradients."""
    used = Rows(X, rows, centre, targets, multiplier, W.dtype)
    for array in (dX, row_loss):
        if used.skips and array is not None:
            array[...] = 0
    wants_gradient = not (dW is None and db is None and dX is None)

    def row_work(part: slice, scores: Array) -> float:
        place, grad = used.place(part), scores if wants_gradient else None
        losses = None if row_loss is None else row_loss[place]
        y, w = used.targets(part), used.multiplier(part)
        value = backend.score_rows(loss, scores, y, w, 1.0, grad, losses, {}, 1)
        if row_loss is not None and used.skips:
            row_loss[place] = losses
        return value

    return sweep(used, [(W, b)], row_work, scale, dW, db, dX, chunk_rows, n_threads)


def hvp(
    backend: Backend, loss: Any, X: Array, rows: Array | None, centre: Array | None, W: Array, b: Array | None,
    V: Array, v: Array | None, targets: Array, multiplier: Array | None, chunk_rows: int | None, n_threads: int,
) -> tuple[Array, Array]:  # fmt: skip
    """Σ multiplier · (Hessian of ℓ in W and b) · (V, v), as float64 (C, D) and (C,)."""
    used = Rows(X, rows, centre, targets, multiplier, W.dtype)
    HW, Hb = np.empty(W.shape), np.empty(len(W))

    def row_work(part: slice, scores: Array, direction: Array) -> float:
        y, w = used.targets(part), used.multiplier(part)
        scores[...] = backend.hvp_rows(loss, scores, y, w, direction)
        return 0.0

    sweep(used, [(W, b), (V, v)], row_work, 1.0, HW, Hb, None, chunk_rows, n_threads)
    return HW, Hb


def values(
    backend: Backend, loss: Any, X: Array, centre: Array | None, W: Array, b: Array | None, k: int, targets: Array,
    multiplier: Array | None, chunk_rows: int | None, n_threads: int,
) -> Array:  # fmt: skip
    """Σ multiplier · ℓ for each of K candidates, stacked in W (K · C, D) and b (K · C,): in one pass over X."""
    rows, W = Rows(X, None, centre, targets, multiplier, W.dtype), for_blas(W)
    n, (stacked, d), dtype = len(rows), W.shape, W.dtype
    c = stacked // max(1, k)
    groups = cut(k, max(1, WIDE // max(1, c)))  # of candidates, in a product each
    width = max((c * (group.stop - group.start) for group in groups), default=0)
    row_bytes = 4 * (width + d) * dtype.itemsize  # each thread has a chunk of its own

    def some_rows(segment: slice) -> Array:
        sums = np.zeros(k)
        for block in chunks(segment.stop - segment.start, row_bytes, chunk_rows):
            part = within(segment, block)
            length, y, w = part.stop - part.start, rows.targets(part), rows.multiplier(part)
            if rows.direct:
                x = rows.features(part)
            else:
                x = workers.scratch("features", (length, d), dtype)
                rows.load(part, x)
            for group in groups:
                many, some = group.stop - group.start, slice(c * group.start, c * group.stop)
                scores = np.matmul(x, W[some].T, out=workers.scratch("scores", (length, c * many), dtype))
                if b is not None:
                    scores += b[some]
                losses = np.empty(length * many, dtype)
                flat, each = scores.reshape(-1, c), np.repeat(y, many, axis=0)
                backend.score_rows(loss, flat, each, None, 1.0, None, losses, {}, 1)
                table = losses.reshape(length, many).astype(np.float64)
                sums[group] += table.sum(axis=0) if w is None else w.astype(np.float64) @ table
        return sums

    with Workers(n_threads if n * W.size >= SMALL else 1) as workers:
        found = workers.run(some_rows, split(n, min(64, len(chunks(n, row_bytes, chunk_rows)))))
    return np.asarray(sum(found, np.zeros(k)))
