"""Kernels that Numba compiles as they are first used: no compiler is needed to install them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from fastloss import blocks
from fastloss._checks import Array, compute_dtype
from fastloss.backends import NotInstalled, Stats, reference

if TYPE_CHECKING:
    from fastloss.sparse import Csr


def load(variant: str) -> NumbaBackend:
    """The only variant."""
    if find_spec("numba") is None:
        raise NotInstalled('numba is not installed: pip install "fastloss[numba]"')
    return NumbaBackend()


class NumbaBackend(reference.ReferenceBackend):
    """Loops compiled at run time, on threads of our own."""

    name = "numba"

    def __init__(self) -> None:
        # Now, not at the first call; and an installation of Numba that is broken is no backend.
        self._version: str = import_module("numba").__version__
        self._checks = import_module("fastloss.jit.checks")
        self._features = import_module("fastloss.jit.features")
        self._scores = import_module("fastloss.jit.scores")
        self._sparse = import_module("fastloss.jit.sparse")
        self.plain_rows = self._scores.plain_rows  # type: ignore[method-assign]  # a frame less
        self.score_rows = self._scores.score_rows  # type: ignore[method-assign]

    def __str__(self) -> str:
        return f"compiled as it is used by Numba {self._version}"

    def why_not(self, verb: str, loss: Any, dtype: np.dtype[Any], needs: tuple[str, ...]) -> str | None:
        return reference.why_no_hessian(loss) if verb == "hvp" else None

    def reads(self, dtype: np.dtype[Any]) -> bool:
        found: bool = self._scores.reads(dtype)
        return found

    def first_outside(self, indices: Array, stop: int, ignored: int | None, n_threads: int = 1) -> int:
        position: int | None = self._checks.first_outside(indices, stop, ignored)
        return super().first_outside(indices, stop, ignored) if position is None else position

    def first_unfit(self, numbers: Array, n_threads: int = 1, most: float = np.inf) -> int:
        position: int | None = self._checks.first_unfit(numbers, n_threads, most)
        return super().first_unfit(numbers, n_threads, most) if position is None else position

    def weigh(
        self, targets: Array, class_weight: Array | None, ignored: int | None, sample_weight: Array | None,
        dtype: np.dtype[Any], n_threads: int = 1,
    ) -> tuple[Array, float, float]:  # fmt: skip
        if class_weight is None and ignored is None:
            return super().weigh(targets, None, None, sample_weight, dtype)
        found: tuple[Array, float, float] = self._checks.weigh(targets, class_weight, ignored, sample_weight, dtype)
        return found

    def shrink(self, W: Array, grad: Array, q: float, n_threads: int) -> float:
        total: float | None = self._checks.shrink(W, grad, q)
        return super().shrink(W, grad, q, n_threads) if total is None else total

    def transform(self, kind: str, scores: Array, out: Array, n_threads: int) -> None:
        self._scores.transform(kind, scores, out, n_threads)

    def _shard(self, scores: Array) -> tuple[Array, np.dtype[Any]]:
        """Scores of a shard of the classes as kernels take them, and the compute type."""
        if not self.reads(scores.dtype):
            scores = scores.astype(np.float64)
        return scores, compute_dtype(scores.dtype, "scores")

    def stats_rows(self, loss: Any, scores: Array, targets: Array, offset: int, n_threads: int) -> Stats:
        numbers, _ = self._shard(scores)
        weights = reference.shard_weights(loss, offset, scores.shape[1])
        sums = self._scores.shard_sums(loss, numbers, weights, n_threads)
        return reference.stats_of_sums(loss, scores, targets, offset, *sums)

    def stats_gradient_rows(
        self, loss: Any, scores: Array, targets: Array, offset: int, stats: Stats, multiplier: Array | None,
        scale: float, grad: Array, n_threads: int,
    ) -> None:  # fmt: skip
        numbers, dtype = self._shard(scores)
        if not scores.size:
            return
        column, at_target = np.full(len(scores), -1), np.zeros(len(scores), dtype)
        with np.errstate(all="ignore"):
            rows, columns, entries = reference.target_entries(loss, scores, targets, offset, stats)
            heavy = reference.heavy_entries(loss, scores, targets, offset, stats)
            column[rows], at_target[rows] = columns, entries
            top = (stats.maximum * loss.temperature).astype(dtype)
            pull = reference.stats_factors(loss, stats, targets).astype(dtype)
            weight = (np.ones(len(scores)) if multiplier is None else multiplier.astype(np.float64)) * scale
            share = reference.stats_shares(loss, stats, targets)[1]
            weights = reference.shard_weights(loss, offset, scores.shape[1])
        self._scores.gradient_from_stats(
            loss, numbers, column, top, pull, at_target, weight.astype(dtype), share, weights, grad, n_threads
        )
        reference.put_entries(grad, heavy, multiplier, scale)

    def linear_rows(
        self, loss: Any, X: Array, rows: Array | None, centre: Array | None, W: Array, b: Array | None, targets: Array,
        multiplier: Array | None, scale: float, dW: Array | None, db: Array | None, dX: Array | None,
        row_loss: Array | None, chunk_rows: int | None, n_threads: int,
    ) -> float:  # fmt: skip
        if dX is not None or not self._features.can_fuse(X, W):
            return blocks.linear_rows(
                self, loss, X, rows, centre, W, b, targets, multiplier, scale, dW, db, dX, row_loss, chunk_rows,
                n_threads,
            )  # fmt: skip
        value: float = self._features.linear_rows(
            loss, X, rows, centre, W, b, targets, multiplier, scale, dW, db, row_loss, n_threads
        )
        return value

    def csr_scores(self, X: Csr, at: Any, W: Array, b: Array, scores: Array, n_threads: int) -> None:
        self._sparse.csr_scores(X, at, W, b, scores, n_threads)

    def csr_accumulate(self, X: Csr, at: Any, scores: Array, dW: Array, n_threads: int) -> None:
        self._sparse.csr_accumulate(X, at, scores, dW, n_threads)

    goes_by_features = True

    def csc_accumulate(self, XT: Csr, at: Array, rows: slice, scores: Array, dW: Array, n_threads: int) -> None:
        self._sparse.csc_accumulate(XT, at, rows, scores, dW, n_threads)
