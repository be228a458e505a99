"""The linear layer by BLAS: what many classes, gradients of X, stacked candidates and Hessian products share.

Rows are handled in chunks, so that no N × C array exists; the products are BLAS's, the row losses a backend's. The
shape of every product depends on the shape of the problem alone, and each runs on one thread inside ours (the BLAS
is switched for the call, in the whole process, and switched back): so results do not depend on threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np

from fastloss._checks import Array
from fastloss.backends import Backend

CHUNK_BYTES = 32 << 20  # of scores in one chunk
PRODUCT_BLOCK = 1024  # classes, and features, of one product
SMALL = 1 << 20  # multiplications below which starting threads costs more than it brings


class BlasSwitch:
    """One thread for each BLAS call while any call of ours is under way; then as it was, whoever ends last.

    threadpoolctl lets the first thread that changes a BLAS of its own threads (OpenBLAS) be the only one to do so, and
    ignores others; but the switch must work from any thread, so that claim is taken over, and given up after.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: list[tuple[Any, int]] = []
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._in_child
            )

    def _in_child(self) -> None:
        self._restore()  # the calls under way are the parent's
        self._users = 0
        self._lock.release()

    @cached_property
    def _libraries(self) -> list[Any]:
        from threadpoolctl import ThreadpoolController

        return list(ThreadpoolController().select(user_api="blas").lib_controllers)

    @staticmethod
    def _set(library: Any, n_threads: int) -> None:
        give_up_claim = getattr(library, "clear_controlling_thread", lambda force: None)
        give_up_claim(force=True)
        library.set_num_threads(n_threads)
        give_up_claim(force=True)

    def _restore(self) -> None:
        for library, n_threads in self._before:
            self._set(library, n_threads)
        self._before = []

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = [(library, library.get_num_threads()) for library in self._libraries]
            self._users += 1
            self._limit()

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._restore()

    def limit_this_thread(self) -> None:
        """Some libraries (MKL, OpenMP's) keep a number for each thread: our own threads set theirs as they start."""
        with self._lock:
            self._limit()

    def _limit(self) -> None:
        for library in self._libraries:
            self._set(library, 1)


one_blas_thread = BlasSwitch()


class Workers:
    """Threads of our own for one call: `run` calls a function on each of some parts, in any order."""

    def __init__(self, n_threads: int) -> None:
        self._pool = None
        if n_threads > 1:
            self._pool = ThreadPoolExecutor(n_threads, initializer=one_blas_thread.limit_this_thread)

    def __enter__(self) -> Workers:
        one_blas_thread.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        one_blas_thread.__exit__()

    def run(self, task: Callable[[Any], Any], parts: list[Any]) -> list[Any]:
        def quiet(part: Any) -> Any:
            with np.errstate(all="ignore"):  # NaN and inf in features propagate, they are no event
                return task(part)

        if self._pool is None or len(parts) == 1:
            return [quiet(part) for part in parts]
        return list(self._pool.map(quiet, parts))


def split(n: int, size: int) -> list[slice]:
    """Consecutive parts of range(n) of `size` each, the last maybe shorter."""
    return [slice(start, min(n, start + size)) for start in range(0, n, size)]


def pairs(rows: list[slice], columns: list[slice]) -> list[tuple[slice, slice]]:
    return [(r, c) for c in columns for r in rows]


def chunks(n: int, row_bytes: int, chunk_rows: int | None) -> list[slice]:
    """Chunks of rows whose scores take at most CHUNK_BYTES; the size depends on the shape alone."""
    return split(n, chunk_rows or max(16, min(1024, CHUNK_BYTES // row_bytes)))


def take(X: Array, rows: Array | None, part: slice, dtype: np.dtype[Any]) -> Array:
    """A chunk of features, contiguous and in the compute type."""
    return np.ascontiguousarray(X[part] if rows is None else X[rows[part]], dtype)


def pick(array: Array | None, rows: Array | None, part: slice) -> Any:
    """A chunk of what goes with the rows of X."""
    if array is None:
        return None
    return array[part] if rows is None else array[rows[part]]


def drop_skipped(rows: Array | None, multiplier: Array | None) -> Array | None:
    """The rows whose multiplier is not 0."""
    if multiplier is None or multiplier.all():
        return rows
    return np.flatnonzero(multiplier) if rows is None else rows[multiplier[rows] != 0]


def linear_rows(
    backend: Backend, loss: Any, X: Array, rows: Array | None, W: Array, b: Array | None, targets: Array,
    multiplier: Array | None, scale: float, dW: Array | None, db: Array | None, dX: Array | None,
    row_loss: Array | None, chunk_rows: int | None, n_threads: int,
) -> float:  # fmt: skip
    """`Backend.linear_rows` by blocks: for each chunk of rows the scores, the row losses in place, the gradients."""
    c = len(W)
    kept = drop_skipped(rows, multiplier)
    if kept is not rows:
        for array in (dX, row_loss):
            if array is not None:
                array[...] = 0
    # Where row k of a chunk goes in dX and row_loss: skipping leaves gaps, picking rows does not.
    places = None
    if kept is not rows and multiplier is not None:
        places = kept if rows is None else np.flatnonzero(multiplier[rows] != 0)
    n = len(X) if kept is None else len(kept)
    wants_gradient = not (dW is None and db is None and dX is None)
    W = np.ascontiguousarray(W)
    classes, features = split(c, PRODUCT_BLOCK), split(W.shape[1], PRODUCT_BLOCK)
    total = 0.0
    if n * W.size < SMALL:
        n_threads = 1
    if n == 0:
        for array in (dW, db):
            if array is not None:
                array[...] = 0
    with Workers(n_threads) as workers:
        for part in chunks(n, c * W.itemsize, chunk_rows):
            x, y, w = take(X, kept, part, W.dtype), pick(targets, kept, part), pick(multiplier, kept, part)
            scores = np.empty((len(x), c), W.dtype)
            losses = None if row_loss is None else np.empty(len(x), W.dtype)

            def produce(at: tuple[slice, slice], x: Array = x, scores: Array = scores) -> None:
                some, block = at
                np.matmul(x[some], W[block].T, out=scores[at])
                if b is not None:
                    scores[at] += b[block]

            def reduce(block: slice, y: Array = y, w: Any = w, scores: Array = scores, losses: Any = losses) -> float:
                some = scores[block]
                grad, kept_losses = some if wants_gradient else None, None if losses is None else losses[block]
                weights = None if w is None else w[block]
                return backend.score_rows(loss, some, y[block], weights, 1.0, grad, kept_losses, {}, 1)

            def accumulate(
                at: tuple[slice, slice], x: Array = x, scores: Array = scores, first: bool = part.start == 0
            ) -> None:
                grad = scores[:, at[0]].T
                add_to(dW, at, grad, x[:, at[1]], first)
                if at[1].start == 0:
                    add_to(db, at[0], grad, np.ones(len(x), W.dtype), first)

            # Where classes alone do not give each thread a product, rows are split too; by the shape, not the threads.
            few = len(classes) < 4
            workers.run(produce, pairs(split(len(x), 256 if few else len(x)), classes))
            total += sum(workers.run(reduce, split(len(x), 64)))
            if dW is not None or db is not None:
                workers.run(accumulate, pairs(classes, features))
            where = part if places is None else places[part]
            if dX is not None:

                def pull(block: slice, scores: Array = scores, where: Any = where) -> None:
                    at = slice(where.start + block.start, where.start + block.stop) if places is None else where[block]
                    dX[at] = (scores[block] @ W) * W.dtype.type(scale)

                workers.run(pull, split(len(x), 256))
            if row_loss is not None:
                row_loss[where] = losses
    for array in (dW, db):
        if array is not None:
            array *= W.dtype.type(scale)
    return total


def add_to(sums: Array | None, at: Any, left: Array, right: Array, first: bool) -> None:
    """sums[at] += left @ right; the first product is written, so that nothing needs to be cleared."""
    if sums is not None:
        product = left @ right
        sums[at] = product if first else sums[at] + product


def values(
    backend: Backend, loss: Any, X: Array, W: Array, b: Array | None, targets: Array, multiplier: Array | None,
    chunk_rows: int | None, n_threads: int,
) -> Array:  # fmt: skip
    """Σ multiplier · ℓ for each of K stacked candidates W (K, C, D), b (K, C): K · C classes, the loss on each C."""
    k, c, d = W.shape
    flat, flat_b = np.ascontiguousarray(W).reshape(k * c, d), None if b is None else b.ravel()
    kept = drop_skipped(None, multiplier)
    n = len(X) if kept is None else len(kept)

    def some_rows(part: slice) -> Array:
        x, y, w = take(X, kept, part, W.dtype), pick(targets, kept, part), pick(multiplier, kept, part)
        scores = x @ flat.T
        if flat_b is not None:
            scores += flat_b
        losses = np.empty(len(x) * k, W.dtype)
        backend.score_rows(loss, scores.reshape(-1, c), np.repeat(y, k, axis=0), None, 1.0, None, losses, {}, 1)
        table = losses.reshape(len(x), k).astype(np.float64)
        return np.asarray(table.sum(axis=0) if w is None else w.astype(np.float64) @ table)

    with Workers(n_threads) as workers:
        sums = workers.run(some_rows, chunks(n, 4 * k * c * W.itemsize, chunk_rows))
    return np.asarray(sum(sums, np.zeros(k)))


def hvp(
    backend: Backend, loss: Any, X: Array, rows: Array | None, W: Array, b: Array | None, V: Array,
    v: Array | None, targets: Array, multiplier: Array | None, chunk_rows: int | None, n_threads: int,
) -> tuple[Array, Array]:  # fmt: skip
    """Σ multiplier · (Hessian of ℓ in W and b) · (V, v), as float64 (C, D) and (C,)."""
    kept = drop_skipped(rows, multiplier)
    n = len(X) if kept is None else len(kept)

    def some_rows(part: slice) -> tuple[Array, Array]:
        x, y, w = take(X, kept, part, W.dtype), pick(targets, kept, part), pick(multiplier, kept, part)
        scores, direction = x @ W.T, x @ V.T
        if b is not None and v is not None:
            scores, direction = scores + b, direction + v
        curve = backend.hvp_rows(loss, scores, y, w, direction)
        return curve.T @ x, curve.sum(axis=0)

    HW, Hb = np.zeros(W.shape), np.zeros(len(W))
    with Workers(n_threads) as workers:
        # A few chunks at a time, so that their partial products do not pile up.
        for group in split(len(parts := chunks(n, len(W) * W.itemsize, chunk_rows)), 8):
            for dW, db in workers.run(some_rows, parts[group]):
                HW += dW
                Hb += db
    return HW, Hb
