"""The linear layer for sparse features: CSR matrices, never dense, with no N × C array.

Rows are handled in chunks: a backend makes their scores, then the row losses in place, then adds to dW. W and dW are
(D, C) meanwhile: for each number of X the weights, or the sums, of all classes are side by side.
"""

from __future__ import annotations

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
SUM_ROWS = 64


def is_sparse(value: object) -> bool:
    """Whether this is one of SciPy's sparse arrays or matrices."""
    return hasattr(value, "tocsr") and hasattr(value, "nnz")


def features(value: object, name: str = "X") -> Any:
    """An array (N, D), or a `Csr`."""
    if isinstance(value, Csr):
        return value
    if is_sparse(value):
        return Csr(value, name)
    return checks.matrix(value, name, "(N, D): a row of D features for each of N examples")


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
    #: Whether gradients over all rows will be asked for again, so that a copy by features is worth making.
    is_reused = False
    # Found when first asked for, without a lock: a forked child would wait for ever for one that was held.
    _transposed: Csr | None = None
    _entries_before: Array | None = None

    def __init__(self, matrix: Any, name: str = "X") -> None:
        csr = matrix.tocsr()
        if len(csr.shape) != 2:
            raise ValueError(f"{name} has shape {csr.shape}; it must be two-dimensional, (N, D)")
        self.shape: tuple[int, int] = csr.shape
        self.dtype = checks.compute_dtype(csr.data.dtype, name)
        _check(csr, name)
        if not csr.has_sorted_indices:
            csr = csr.sorted_indices()
        kind = np.result_type(csr.indices.dtype, csr.indptr.dtype)
        kind = kind if kind in (np.int32, np.int64) else np.dtype(np.int64)
        self.values = np.ascontiguousarray(csr.data, self.dtype)
        self.indices = np.ascontiguousarray(csr.indices, kind)
        self.starts = np.ascontiguousarray(csr.indptr, kind)

    def __len__(self) -> int:
        return self.shape[0]

    def astype(self, dtype: np.dtype[Any]) -> Csr:
        """The same matrix with values of another type; itself where it has that."""
        if dtype == self.dtype:
            return self
        other: Csr = object.__new__(Csr)
        other.__dict__.update(self.__dict__, dtype=dtype, values=self.values.astype(dtype), _transposed=None)
        return other

    def by_frequency(self) -> tuple[Csr, Array]:
        """The same with features in another order, and the place of each: those with most entries lie together.

        Entries of a row stay as they are, so indices are not sorted.
        """
        order = np.argsort(-np.bincount(self.indices, minlength=self.shape[1]), kind="stable")
        places = np.empty(len(order), self.indices.dtype)
        places[order] = np.arange(len(order))
        other: Csr = object.__new__(Csr)
        other.shape, other.dtype, other.values, other.starts = self.shape, self.dtype, self.values, self.starts
        other.indices = places[self.indices]
        return other, places

    @property
    def transposed(self) -> Csr:
        """The transpose (D, N): the entries of each feature, by rows."""
        if self._transposed is None:
            self._transposed = self._by_feature()
        return self._transposed

    def _by_feature(self) -> Csr:
        from scipy.sparse import csr_array

        by_feature = csr_array((self.values, self.indices, self.starts), shape=self.shape).tocsc()
        other: Csr = object.__new__(Csr)
        other.shape, other.dtype = (self.shape[1], self.shape[0]), self.dtype
        other.values = np.ascontiguousarray(by_feature.data, self.dtype)
        other.indices = np.ascontiguousarray(by_feature.indices, self.indices.dtype)
        other.starts = np.ascontiguousarray(by_feature.indptr, self.indices.dtype)
        return other

    def shares(self, parts: int) -> Array:
        """Bounds of that many ranges of features with about the same number of entries."""
        if self._entries_before is None:  # for each feature, and past the last, the entries of those before it
            counts = np.bincount(self.indices, minlength=self.shape[1])
            self._entries_before = np.concatenate([[0], np.cumsum(counts)])
        wanted = np.arange(1, parts) * (len(self.values) / parts)
        inner = np.searchsorted(self._entries_before, wanted)
        return np.concatenate([[0], np.minimum(inner, self.shape[1]), [self.shape[1]]]).astype(np.int64)

    def __getitem__(self, at: Any) -> Any:
        """SciPy's array of some rows, by a slice or by index."""
        from scipy.sparse import csr_array

        return csr_array((self.values, self.indices, self.starts), shape=self.shape)[at]


def _check(csr: Any, name: str) -> None:
    """Raise if a CSR matrix points outside of itself: SciPy and the kernels would read there."""
    (n, d), starts, indices, count = csr.shape, csr.indptr, csr.indices, len(csr.data)
    if len(starts) != n + 1 or starts[0] != 0 or starts[-1] > count or len(indices) != count:
        raise ValueError(
            f"{name} is not a CSR matrix of {n} rows: its indptr has {len(starts)} numbers, from {starts[0]} to "
            f"{starts[-1]}, and it has {len(indices)} indices and {count} numbers"
        )
    if (starts[1:] < starts[:-1]).any():
        raise ValueError(f"{name} is not a CSR matrix: its indptr decreases")
    outside = (indices < 0) | (indices >= d)
    if outside.any():
        raise ValueError(f"{name} has an entry of feature {indices[int(outside.argmax())]}, but {d} features")


def useful_threads(n_threads: int, X: Csr, n: int, c: int) -> int:
    """How many threads n rows of X and c classes keep busy."""
    products = len(X.values) * c * n // max(1, len(X))
    return max(1, min(n_threads, products // THREAD_PRODUCTS))


class _ByFeatures:
    """dW (D, C), a feature at a time, from the transpose of X: each of its sums stays in registers."""

    def __init__(self, backend: Backend, X: Csr, n: int, c: int, dtype: np.dtype[Any]) -> None:
        self._backend, self._XT = backend, X.transposed
        self._at = self._XT.starts[:-1].copy()
        self.rows = max(1, n)
        # Each chunk looks at all features: it is to have as many entries.
        self.least = -(-X.shape[1] * n // max(1, len(X.values)))
        self.total = np.zeros((X.shape[1], c), dtype) if n == 0 else np.empty((X.shape[1], c), dtype)

    def add(self, rows: slice, scores: Array, ends: bool, n_threads: int) -> None:
        self._backend.csc_accumulate(self._XT, self._at, rows, scores, self.total, n_threads)


class _ByRows:
    """dW (D, C), added up in parts of some rows each, so that large sums lose little of what is added to them."""

    least = 1

    def __init__(self, backend: Backend, X: Csr, n: int, c: int, dtype: np.dtype[Any]) -> None:
        self._backend, self._X = backend, X
        entries = len(X.values) * n // max(1, len(X))
        parts = max(1, min(SUMS, entries // (NUMBERS * max(1, X.shape[1]))))
        self.rows = -(-n // parts)
        self.part = np.zeros((X.shape[1], c), dtype)
        self.total = self.part if parts == 1 else np.zeros_like(self.part)

    def add(self, at: Any, scores: Array, ends: bool, n_threads: int) -> None:
        """What some rows add; `ends` says that a part is complete."""
        self._backend.csr_accumulate(self._X, at, scores, self.part, n_threads)
        if ends and self.total is not self.part:
            self.total += self.part
            self.part[...] = 0


def _sums(backend: Backend, X: Csr, used: blocks.Rows, c: int, dtype: np.dtype[Any]) -> _ByFeatures | _ByRows:
    """By features for all rows, where that is a job that comes again."""
    by_features = X.is_reused and used.takes_all and backend.goes_by_features
    return (_ByFeatures if by_features else _ByRows)(backend, X, len(used), c, dtype)


def _sum_rows(scores: Array) -> Array:
    """Σ over rows in float64, of sums of SUM_ROWS at most in their own type, which take no conversion each."""
    n, c = scores.shape
    total = np.zeros(c)
    for start in range(0, n, SUM_ROWS * SUM_ROWS):
        some = scores[start : start + SUM_ROWS * SUM_ROWS]
        whole = len(some) // SUM_ROWS * SUM_ROWS
        sums = some[:whole].reshape(-1, SUM_ROWS * c).sum(axis=0).reshape(SUM_ROWS, c)
        total += sums.sum(axis=0, dtype=np.float64) + some[whole:].sum(axis=0, dtype=np.float64)
    return total


def _chunks(
    n: int, c: int, itemsize: int, chunk_rows: int | None, most: int, least: int = 1
) -> list[tuple[slice, bool]]:
    """range(n) in chunks, and whether one is the last of `most` rows (the last chunks of a partial sum are shorter)."""
    size = max(1, min(chunk_rows or n, max(least, CHUNK_BYTES // max(1, c * itemsize)), most))
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
    sums = None if dW is None else _sums(backend, X, used, c, dtype)
    total_db = np.zeros(c)
    least, most = (1, n) if sums is None else (sums.least, sums.rows)
    parts = _chunks(n, c, dtype.itemsize, chunk_rows, max(1, most), least)
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
            sums.add(at, scores, ends, threads)
        if db is not None:
            total_db += _sum_rows(scores)
    if sums is not None and dW is not None:
        backend.transpose_back(sums.total, dW, scale, n_threads)
    if db is not None:
        db[...] = total_db * scale
    return value


def scores(backend: Backend, X: Csr, W: Array, b: Array | None, store: Array, n_threads: int) -> None:
    """Scores of X into `store` (N, C), or their argmax (N,), in the type of W (C, D)."""
    X, c = X.astype(W.dtype), len(W)
    weights = backend.transposed(W, n_threads)
    bias = np.zeros(c, W.dtype) if b is None else np.ascontiguousarray(b, W.dtype)
    for part, _ in _chunks(len(X), c, W.itemsize, None, max(1, len(X))):
        found = np.empty((part.stop - part.start, c), W.dtype)
        backend.csr_scores(X, part, weights, bias, found, useful_threads(n_threads, X, len(found), c))
        store[part] = found if store.ndim == 2 else found.argmax(axis=1)


def hvp(
    backend: Backend, loss: Any, X: Csr, rows: Array | None, centre: None, W: Array, b: Array | None,
    V: Array, v: Array | None, targets: Array, multiplier: Array | None, chunk_rows: int | None, n_threads: int,
) -> tuple[Array, Array]:  # fmt: skip
    """`blocks.hvp` for sparse X."""
    c, dtype = len(W), W.dtype
    used = blocks.Rows(X, rows, None, targets, multiplier, dtype)
    n, Hb = len(used), np.zeros(c)
    sums = _sums(backend, X, used, c, dtype)
    layers = [
        (backend.transposed(some, n_threads), np.zeros(c, dtype) if a is None else np.ascontiguousarray(a))
        for some, a in ((W, b), (V, v))
    ]
    for part, ends in _chunks(n, 2 * c, dtype.itemsize, chunk_rows, max(1, sums.rows), sums.least):
        at = used.at(part)
        scores, direction = (np.empty((part.stop - part.start, c), dtype) for _ in layers)
        threads = useful_threads(n_threads, X, len(scores), c)
        for (weights, bias), out in zip(layers, (scores, direction), strict=True):
            backend.csr_scores(X, at, weights, bias, out, threads)
        scores[...] = backend.hvp_rows(loss, scores, used.targets(part), used.multiplier(part), direction)
        sums.add(at, scores, ends, threads)
        Hb += _sum_rows(scores)
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
