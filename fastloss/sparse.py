"""The linear layer for sparse features: CSR matrices, never dense, with no N × C array.

Rows are handled in chunks: a backend makes their scores, then the row losses in place, then adds to dW. W and dW are
(D, C) meanwhile: for each number of X the weights, or the sums, of all classes are side by side.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from fastloss import _checks as checks
from fastloss import blocks
from fastloss._checks import Array
from fastloss.backends import Backend

CHUNK_BYTES = 4 << 20  # of the scores of a chunk
SUMS = 64  # of dW's partial sums at most,
NUMBERS = 32  # and of X, for each number of a partial sum, at least: else adding them up costs more than finding them
THREAD_PRODUCTS = 1 << 18  # multiplications for each thread, at least


def is_sparse(value: object) -> bool:
    """Whether this is one of SciPy's sparse arrays or matrices."""
    return hasattr(value, "tocsr") and hasattr(value, "nnz")


class Csr:
    """A sparse matrix (N, D) by its rows, as SciPy's `csr_array`.

    Attributes
    ----------
    values : array (number of entries,)
        float32 or float64.
    indices : array (number of entries,)
        The feature of each; sorted within a row; int32 or int64.
    starts : array (N + 1,)
        Where the entries of each row begin; of the type of the indices.
    shape : (N, D)
    """

    ndim = 2

    def __init__(self, matrix: Any) -> None:
        csr = matrix.tocsr()
        if len(csr.shape) != 2:
            raise ValueError(f"X has shape {csr.shape}; it must be two-dimensional, (N, D)")
        self.shape: tuple[int, int] = csr.shape
        self.dtype = checks.compute_dtype(csr.data.dtype, "X")
        _check(csr)
        if not csr.has_sorted_indices:
            csr = csr.sorted_indices()
        kind = np.result_type(csr.indices.dtype, csr.indptr.dtype)
        kind = kind if kind in (np.int32, np.int64) else np.dtype(np.int64)
        self.values = np.ascontiguousarray(csr.data, self.dtype)
        self.indices = np.ascontiguousarray(csr.indices, kind)
        self.starts = np.ascontiguousarray(csr.indptr, kind)

    def __len__(self) -> int:
        return self.shape[0]

    @cached_property
    def _entries_before(self) -> Array:
        """For each feature, and past the last, the entries of those before it."""
        counts = np.bincount(self.indices, minlength=self.shape[1])
        return np.concatenate([[0], np.cumsum(counts)])

    def shares(self, parts: int) -> Array:
        """Bounds of that many ranges of features with about the same number of entries."""
        wanted = np.arange(1, parts) * (len(self.values) / parts)
        inner = np.searchsorted(self._entries_before, wanted)
        return np.concatenate([[0], np.minimum(inner, self.shape[1]), [self.shape[1]]]).astype(np.int64)

    def __getitem__(self, at: Any) -> Any:
        """SciPy's array of some rows, by a slice or by index."""
        from scipy.sparse import csr_array

        return csr_array((self.values, self.indices, self.starts), shape=self.shape)[at]


def _check(csr: Any) -> None:
    """Raise if a CSR matrix points outside of itself: SciPy and the kernels would read there."""
    (n, d), starts, indices, count = csr.shape, csr.indptr, csr.indices, len(csr.data)
    if len(starts) != n + 1 or starts[0] != 0 or starts[-1] > count or len(indices) != count:
        raise ValueError(
            f"X is not a CSR matrix of {n} rows: its indptr has {len(starts)} numbers, from {starts[0]} to "
            f"{starts[-1]}, and it has {len(indices)} indices and {count} numbers"
        )
    if (starts[1:] < starts[:-1]).any():
        raise ValueError("X is not a CSR matrix: its indptr decreases")
    outside = (indices < 0) | (indices >= d)
    if outside.any():
        raise ValueError(f"X has an entry of feature {indices[int(outside.argmax())]}, but {d} features")


def useful_threads(n_threads: int, X: Csr, n: int, c: int) -> int:
    """How many threads n rows of X and c classes keep busy."""
    products = len(X.values) * c * n // max(1, len(X))
    return max(1, min(n_threads, products // THREAD_PRODUCTS))


class _Sums:
    """dW (D, C), added up in parts of some rows each, so that large sums lose little of what is added to them."""

    def __init__(self, X: Csr, n: int, c: int, dtype: np.dtype[Any]) -> None:
        entries = len(X.values) * n // max(1, len(X))
        parts = max(1, min(SUMS, entries // (NUMBERS * max(1, X.shape[1]))))
        self.rows = -(-n // parts)
        self.part = np.zeros((X.shape[1], c), dtype)
        self.total = self.part if parts == 1 else np.zeros_like(self.part)

    def close(self) -> None:
        """A part is complete."""
        if self.total is not self.part:
            self.total += self.part
            self.part[...] = 0


def _chunks(n: int, c: int, itemsize: int, chunk_rows: int | None, most: int) -> list[tuple[slice, bool]]:
    """range(n) in chunks, and whether one is the last of `most` rows (the last chunks of a partial sum are shorter)."""
    size = max(1, min(chunk_rows or n, CHUNK_BYTES // max(1, c * itemsize), most))
    found = []
    for start in range(0, n, most):
        stop = min(n, start + most)
        for at in range(start, stop, size):
            found.append((slice(at, min(stop, at + size)), at + size >= stop))
    return found


def linear_rows(
    backend: Backend, loss: Any, X: Csr, rows: Array | None, centre: None, W: Array, b: Array | None,
    targets: Array, multiplier: Array | None, scale: float, dW: Array | None, db: Array | None, dX: None,
    row_loss: Array | None, chunk_rows: int | None, n_threads: int,
) -> float:  # fmt: skip
    """`Backend.linear_rows` for sparse X, which has no centre, and whose own gradient would be dense."""
    c, dtype = len(W), W.dtype
    used = blocks.Rows(X, rows, None, targets, multiplier, dtype)
    n, wants_gradient, value = len(used), not (dW is None and db is None), 0.0
    if row_loss is not None and used.skips:
        row_loss[...] = 0
    weights = backend.transposed(W, n_threads)
    bias = np.zeros(c, dtype) if b is None else np.ascontiguousarray(b)
    sums = None if dW is None else _Sums(X, n, c, dtype)
    total_db = np.zeros(c)
    parts = _chunks(n, c, dtype.itemsize, chunk_rows, max(1, n if sums is None else sums.rows))
    buffer = np.empty((max((part.stop - part.start for part, _ in parts), default=0), c), dtype)
    for part, ends in parts:
        at, scores, place = used.at(part), buffer[: part.stop - part.start], used.place(part)
        threads = useful_threads(n_threads, X, len(scores), c)
        backend.csr_scores(X, at, weights, bias, scores, threads)
        losses = None if row_loss is None else row_loss[place]
        grad, y, w = scores if wants_gradient else None, used.targets(part), used.multiplier(part)
        value += backend.score_rows(loss, scores, y, w, 1.0, grad, losses, {}, n_threads)
        if row_loss is not None and used.skips:
            row_loss[place] = losses
        if sums is not None:
            backend.csr_accumulate(X, at, scores, sums.part, threads)
            if ends:
                sums.close()
        if db is not None:
            total_db += scores.sum(axis=0, dtype=np.float64)
    if sums is not None and dW is not None:
        backend.transpose_back(sums.total, dW, scale, n_threads)
    if db is not None:
        db[...] = total_db * scale
    return value


def hvp(
    backend: Backend, loss: Any, X: Csr, rows: Array | None, centre: None, W: Array, b: Array | None,
    V: Array, v: Array | None, targets: Array, multiplier: Array | None, chunk_rows: int | None, n_threads: int,
) -> tuple[Array, Array]:  # fmt: skip
    """`blocks.hvp` for sparse X."""
    c, dtype = len(W), W.dtype
    used = blocks.Rows(X, rows, None, targets, multiplier, dtype)
    n, sums, Hb = len(used), _Sums(X, len(used), c, dtype), np.zeros(c)
    layers = [
        (backend.transposed(some, n_threads), np.zeros(c, dtype) if a is None else np.ascontiguousarray(a))
        for some, a in ((W, b), (V, v))
    ]
    for part, ends in _chunks(n, 2 * c, dtype.itemsize, chunk_rows, max(1, sums.rows)):
        at = used.at(part)
        scores, direction = (np.empty((part.stop - part.start, c), dtype) for _ in layers)
        threads = useful_threads(n_threads, X, len(scores), c)
        for (weights, bias), out in zip(layers, (scores, direction), strict=True):
            backend.csr_scores(X, at, weights, bias, out, threads)
        scores[...] = backend.hvp_rows(loss, scores, used.targets(part), used.multiplier(part), direction)
        backend.csr_accumulate(X, at, scores, sums.part, threads)
        if ends:
            sums.close()
        Hb += scores.sum(axis=0, dtype=np.float64)
    return sums.total.T.astype(np.float64), Hb


def values(
    backend: Backend, loss: Any, X: Csr, centre: None, W: Array, b: Array | None, k: int, targets: Array,
    multiplier: Array | None, chunk_rows: int | None, n_threads: int,
) -> Array:  # fmt: skip
    """`blocks.values` for sparse X: in one pass over it."""
    used = blocks.Rows(X, None, None, targets, multiplier, W.dtype)
    stacked, dtype = len(W), W.dtype
    c = stacked // max(1, k)
    weights = backend.transposed(W, n_threads)
    bias = np.zeros(stacked, dtype) if b is None else np.ascontiguousarray(b)
    found = np.zeros(k)
    for part, _ in _chunks(len(used), stacked, dtype.itemsize, chunk_rows, max(1, len(used))):
        n = part.stop - part.start
        scores, losses = np.empty((n, stacked), dtype), np.empty(n * k, dtype)
        threads = useful_threads(n_threads, X, n, stacked)
        backend.csr_scores(X, used.at(part), weights, bias, scores, threads)
        each = np.repeat(used.targets(part), k, axis=0)
        backend.score_rows(loss, scores.reshape(-1, c), each, None, 1.0, None, losses, {}, n_threads)
        table, w = losses.reshape(n, k).astype(np.float64), used.multiplier(part)
        found += table.sum(axis=0) if w is None else (w.astype(np.float64)[:, None] * table).sum(axis=0)
    return found
