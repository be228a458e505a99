"""The compiled kernels: which level of them this processor can run, and what they can do."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from fastloss import blocks
from fastloss._checks import FLOAT32, FLOAT64, Array, compute_dtype
from fastloss.backends import Backend, BackendError, NotInstalled, Stats, reference

if TYPE_CHECKING:
    from fastloss.sparse import Csr

LEVELS = ("v4", "v3", "v2", "base")
#: Bytes of one segment's partial dW: above, the sums of all segments would take over 64 MB, and blocks take over.
PANEL_BYTES = 1 << 20
FEW_CLASSES = 64
#: The kernels for each type of scores, and of features; the type that they compute in is `checks.compute_dtype`'s.
TYPES = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16", "uint8": "u8"}


def processor_level() -> int:
    """The x86-64 level of this processor, 0 on other architectures; `NotInstalled` where no kernels were compiled."""
    try:
        found: int = import_module("fastloss._kernels.cpu").level()
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("fastloss._kernels"):
            raise
        raise NotInstalled("this is a pure-Python build (FASTLOSS_NO_EXT), without compiled kernels") from None
    return found


def why_no_level(level: str) -> str | None:
    """Why the kernels of a level cannot be used here; None if they can."""
    if processor_level() < (0 if level == "base" else int(level[1:])):
        return f"this processor does not have x86-64-{level}"
    try:
        for kind in TYPES.values():
            import_module(f"fastloss._kernels.{kind}_{level}")
    except ImportError as error:
        return f"it is not part of this build: {error}"
    return None


def load(level: str) -> CythonBackend:
    """The backend at a level, or at the best that this processor has (FASTLOSS_LEVEL forces one)."""
    processor_level()  # before all else: without kernels there are no levels
    if level != "best":
        reason = why_no_level(level)
        if reason is not None:
            raise ImportError(reason)
        return CythonBackend(level)
    forced = os.environ.get("FASTLOSS_LEVEL")
    if forced:
        if forced not in LEVELS:
            raise BackendError(f"FASTLOSS_LEVEL is {forced!r}; it must be one of {', '.join(LEVELS)}")
        reason = why_no_level(forced)
        if reason is not None:
            raise BackendError(f"FASTLOSS_LEVEL is {forced!r}, but {reason}")
        return CythonBackend(forced)
    reasons = {level: why_no_level(level) for level in LEVELS}
    for level, reason in reasons.items():
        if reason is None:
            return CythonBackend(level)
    raise ImportError("; ".join(f"{level}: {reason}" for level, reason in reasons.items()))


SOFTMAX = "softmax", 0.0, 1, "", None


def bits(array: Any) -> Any:
    """16-bit floats as the numbers that their bits are: buffers know no bfloat16."""
    return array if array is None or array.itemsize != 2 else array.view(np.uint16)


def row_options(loss: Any) -> tuple[Any, ...]:
    """What the kernels know of a plain loss: kind, margin, power, over; None for the options of the general form."""
    if loss.kind == "softmax":
        return SOFTMAX
    if loss.kind == "logistic":
        return "logistic", 0.0, 1, loss.over, None
    return loss.kind, loss.margin, loss.power, loss.over, None


def general_options(
    loss: Any, probabilities: bool, n_classes: int, dtype: np.dtype[Any], entropy: bool = False
) -> tuple[Any, ...]:
    """The same for the general form, in the compute type `dtype`: made once for a loss."""
    key = "options", probabilities, n_classes, dtype, entropy
    found: tuple[Any, ...] = loss.once(key, lambda: _general_options(loss, probabilities, n_classes, dtype, entropy))
    return found


def _general_options(
    loss: Any, probabilities: bool, n_classes: int, dtype: np.dtype[Any], entropy: bool
) -> tuple[Any, ...]:
    if loss.kind == "softmax":
        weight, total = loss.converted("class_weight", dtype) if loss.weighs_inside(probabilities) else None, 0.0
        smoothing = loss.label_smoothing
        if weight is not None and not probabilities:  # of all but the target, smoothing / C included: normal
            smoothing = max(smoothing, 1e-30 * n_classes)
            weight = weight * dtype.type(smoothing / n_classes)
            total = weight.sum(dtype=np.float64)
            if not weight.max(initial=0) <= total / 2 <= np.finfo(dtype).max / 4:
                total = 0.0
        elsewhere = smoothing / n_classes
        return _softmax_options(loss, 1 - smoothing + elsewhere, elsewhere, weight, entropy, False, total)
    if loss.kind == "logistic":
        at, elsewhere = loss.smoothed
        weights = loss.column_weights(probabilities, n_classes)
        weights = None if weights is None else weights.astype(dtype)
        return *row_options(loss)[:4], (at, elsewhere, 0.0, -1.0, 1.0, weights, 0.0, None, False, False, False)
    pairs = loss.converted("pair_margins", dtype)
    return *row_options(loss)[:4], (1.0, 0.0, 0.0, -1.0, 1.0, None, 0.0, pairs, loss.count_target, False, False)


def _softmax_options(
    loss: Any, at_target: float, elsewhere: float, weight: Array | None, entropy: bool, shard: bool, total: float = 0.0
) -> tuple[Any, ...]:
    """u of the target and of other classes, or, if that is not the same for all of these, `weight` of each class.

    total: their sum, if no class has more than half of it.
    """
    softcap = -1.0 if loss.softcap is None else loss.softcap
    numbers = at_target, elsewhere, loss.z_loss, softcap, loss.temperature
    return *SOFTMAX[:4], (*numbers, weight, total, None, False, entropy, shard)


def shard_options(
    loss: Any, offset: int, n_classes: int, share: float, dtype: np.dtype[Any]
) -> tuple[Any, ...]:
    """The same for a shard of `n_classes` classes, none of them the target's; their u is `share`, times the weights."""
    if not loss.label_smoothing:
        return _softmax_options(loss, 0.0, 0.0, None, False, True)
    if loss.class_weight is None:
        return _softmax_options(loss, share, share, None, False, True)
    weight = (reference.shard_weights(loss, offset, n_classes) * share).astype(dtype)
    return _softmax_options(loss, 1.0, 1.0, weight, False, True)


def class_targets(targets: Array, dtype: np.dtype[Any]) -> Array:
    """Class indices as they are; probabilities in the compute type, each row contiguous."""
    return targets if targets.ndim == 1 else np.require(targets, dtype, ["C", "A"])


class _Kernels(dict[np.dtype[Any], Any]):
    """The kernels of a level for each type that they read; None for other types."""

    def __init__(self, level: str) -> None:
        self._modules = {name: import_module(f"fastloss._kernels.{kind}_{level}") for name, kind in TYPES.items()}

    def __missing__(self, dtype: np.dtype[Any]) -> Any:
        self[dtype] = found = self._modules.get(dtype.name) if dtype.isnative else None
        return found


def _rows_at(at: Any) -> tuple[Array | None, int]:
    """Rows as the sparse kernels take them: indices, or the first of consecutive ones."""
    return (None, at.start) if isinstance(at, slice) else (at, 0)


class CythonBackend(Backend):
    """Cython kernels with OpenMP at one instruction-set level."""

    def __init__(self, level: str) -> None:
        self.name = f"cython-{level}"
        self.level = level
        self._kernels = _Kernels(level)
        self.first_outside = self._kernels[FLOAT32].first_outside  # type: ignore[method-assign]  # a frame less

    def __str__(self) -> str:
        kernels = self._kernels[FLOAT32]
        target = "the compiler's default target" if self.level == "base" else f"x86-64-{self.level}"
        openmp = "OpenMP" if kernels.OPENMP else "no OpenMP: one thread"
        return f"compiled for {target}, {8 * kernels.VECTOR_BYTES}-bit vectors, {openmp}"

    def why_not(self, verb: str, loss: Any, dtype: np.dtype[Any], needs: tuple[str, ...]) -> str | None:
        return reference.why_no_hessian(loss) if verb == "hvp" else None

    def reads(self, dtype: np.dtype[Any]) -> bool:
        return dtype.kind != "u" and self._kernels[dtype] is not None

    def first_unfit(self, numbers: Array, n_threads: int = 1, most: float = np.inf) -> int:
        kernels = self._kernels[numbers.dtype] if numbers.dtype.kind == "f" and numbers.itemsize > 2 else None
        if kernels is None or not (numbers.flags.c_contiguous and numbers.flags.aligned):
            return super().first_unfit(numbers, n_threads, most)
        position: int = kernels.first_unfit(numbers.reshape(-1), most, n_threads)
        return position

    def checks_as_it_reads(self, probabilities: Array, dtype: np.dtype[Any]) -> bool:
        # Converted, a number may be another.
        return probabilities.dtype == dtype and probabilities.flags.c_contiguous and probabilities.flags.aligned

    def weigh(
        self, targets: Array, class_weight: Array | None, ignored: int | None, sample_weight: Array | None,
        dtype: np.dtype[Any], n_threads: int = 1,
    ) -> tuple[Array, float, float]:  # fmt: skip
        multiplier = np.empty(len(targets), dtype)
        indices = None if class_weight is None and ignored is None else targets
        top, total = self._kernels[dtype].weigh(indices, class_weight, ignored, sample_weight, multiplier, n_threads)
        return multiplier, top, total

    def plain_rows(
        self, loss: Any, scores: Array, targets: Array, grad: Array | None, mean: bool, n_threads: int
    ) -> float | None:
        kernels = self._kernels[scores.dtype]
        if kernels is None:
            return None
        if scores.itemsize == 2:
            if grad is not None and grad.dtype != scores.dtype:  # whose bits would be taken for the same
                return None
            in_place, scores = grad is scores, bits(scores)
            grad = scores if in_place else bits(grad)
        found: float | None = kernels.plain_rows(
            row_options(loss), scores, targets, loss.labels(scores.shape[1]), grad, mean, n_threads
        )
        return found

    def score_rows(
        self, loss: Any, scores: Array, targets: Array, multiplier: Array | None, scale: float,
        grad: Array | None, row_loss: Array | None, extras: dict[str, Array], n_threads: int,
    ) -> float:  # fmt: skip
        kernels = self._kernels[scores.dtype]
        if extras or loss.general or targets.ndim == 2:
            return self._general_rows(
                kernels, loss, scores, targets, multiplier, scale, grad, row_loss, extras, n_threads
            )
        if scores.itemsize == 2:
            scores, grad = bits(scores), bits(grad)
        value: float = kernels.score_rows(
            row_options(loss), scores, targets, multiplier, scale, grad, row_loss, n_threads
        )
        return value

    def _general_rows(
        self, kernels: Any, loss: Any, scores: Array, targets: Array, multiplier: Array | None, scale: float,
        grad: Array | None, row_loss: Array | None, extras: dict[str, Array], n_threads: int,
    ) -> float:  # fmt: skip
        """`score_rows` with all that a plain call has not."""
        dtype = compute_dtype(scores.dtype, "scores")
        scores, grad = bits(scores), bits(grad)
        z, entropy = extras.get("lse"), extras.get("entropy")
        if loss.general or targets.ndim == 2 or z is not None or entropy is not None:
            options = general_options(loss, targets.ndim == 2, scores.shape[1], dtype, entropy is not None)
            targets = class_targets(targets, dtype)
        else:
            options = row_options(loss)
        value: float = kernels.score_rows(
            options, scores, targets, multiplier, scale, grad, row_loss, n_threads, z, entropy, extras.get("argmax"),
            extras.get("unfit"),
        )
        return value

    def linear_rows(
        self, loss: Any, X: Array, rows: Array | None, centre: Array | None, W: Array, b: Array | None, targets: Array,
        multiplier: Array | None, scale: float, dW: Array | None, db: Array | None, dX: Array | None,
        row_loss: Array | None, chunk_rows: int | None, n_threads: int,
    ) -> float:  # fmt: skip
        fused = (
            len(W) <= FEW_CLASSES
            and W.nbytes <= PANEL_BYTES
            and (kernels := self._kernels[X.dtype]) is not None
            and X.flags.aligned
            and dX is None
        )
        if not fused:
            return blocks.linear_rows(
                self, loss, X, rows, centre, W, b, targets, multiplier, scale, dW, db, dX, row_loss, chunk_rows,
                n_threads,
            )  # fmt: skip
        if loss.general or targets.ndim == 2:
            options = general_options(loss, targets.ndim == 2, len(W), W.dtype)
            targets = class_targets(targets, W.dtype)
        else:
            options = row_options(loss)
        value: float = kernels.linear_rows(
            options, bits(X), rows, centre, W, b, targets, multiplier, scale, dW, db, row_loss, n_threads
        )
        return value

    def csr_scores(self, X: Csr, at: Any, W: Array, b: Array, scores: Array, n_threads: int) -> None:
        self._kernels[W.dtype].csr_scores(
            X.values, X.indices, X.starts, X.starts[1:], -1, *_rows_at(at), W, 0, b, scores, n_threads
        )

    def csr_accumulate(self, X: Csr, at: Any, scores: Array, dW: Array, n_threads: int) -> None:
        kernels, bounds = self._kernels[dW.dtype], X.shares(n_threads)
        kernels.csr_accumulate(X.values, X.indices, X.starts, *_rows_at(at), scores, dW, bounds, n_threads)

    def dual_epoch(
        self, X: Csr, rows: Array, targets: Array, bounds: Array, squares: Array, margin: float, W: Array, alpha: Array
    ) -> tuple[float, float]:
        found: tuple[float, float] = self._kernels[W.dtype].dual_epoch(
            X.values, X.indices, X.starts, rows, targets, bounds, squares, margin, W, alpha
        )
        return found

    goes_by_features = True

    def csc_accumulate(self, XT: Csr, at: Array, rows: slice, scores: Array, dW: Array, n_threads: int) -> None:
        below = rows.stop if rows.stop < XT.shape[1] else -1
        bias = np.zeros(dW.shape[1], dW.dtype) if rows.start == 0 else None
        self._kernels[dW.dtype].csr_scores(
            XT.values, XT.indices, at, XT.starts[1:], below, None, 0, scores, rows.start, bias, dW, n_threads
        )

    def shrink(self, W: Array, grad: Array, q: float, n_threads: int) -> float:
        if W.dtype != grad.dtype or W.dtype not in (FLOAT32, FLOAT64):
            return super().shrink(W, grad, q, n_threads)
        total: float = self._kernels[W.dtype].shrink(W, grad, q, n_threads)
        return total

    def transposed(self, W: Array, n_threads: int) -> Array:
        if W.T.flags.c_contiguous:
            return W.T
        out = np.empty(W.shape[::-1], W.dtype)
        self._kernels[W.dtype].transpose(W, out, 1.0, False, n_threads)
        return out

    def transpose_back(self, found: Array, dW: Array, scale: float, n_threads: int) -> None:
        self._kernels[dW.dtype].transpose(dW, found, scale, True, n_threads)

    def hvp_rows(self, loss: Any, scores: Array, targets: Array, multiplier: Array | None, direction: Array) -> Array:
        # The products are BLAS's, and take nearly all of the time: the rows are NumPy's.
        return reference.hvp_rows(loss, scores, targets, multiplier, direction)

    def descend(
        self, W: Array, velocity: Array, grad: Array, step_size: float, momentum: float, decay: float, decayed: int
    ) -> None:
        self._kernels[W.dtype].descend(W, velocity, grad, step_size, momentum, decay, decayed)

    def _shard(self, scores: Array) -> tuple[Any, Array, np.dtype[Any]]:
        """Kernels, scores and compute type for a shard of the classes."""
        if not self.reads(scores.dtype):
            scores = scores.astype(np.float64)
        return self._kernels[scores.dtype], bits(scores), compute_dtype(scores.dtype, "scores")

    def stats_rows(self, loss: Any, scores: Array, targets: Array, offset: int, n_threads: int) -> Stats:
        kernels, numbers, dtype = self._shard(scores)
        tops, (rest, away) = np.full(len(scores), -np.inf, dtype), np.zeros((2, len(scores)), dtype)
        if scores.size:
            options = shard_options(loss, offset, scores.shape[1], 1.0, dtype)
            kernels.score_rows(options, numbers, None, None, 1.0, None, away, n_threads, tops, rest)
        return reference.stats_of_sums(loss, scores, targets, offset, tops, rest, away)

    def stats_gradient_rows(
        self, loss: Any, scores: Array, targets: Array, offset: int, stats: Stats, multiplier: Array | None,
        scale: float, grad: Array, n_threads: int,
    ) -> None:  # fmt: skip
        kernels, numbers, dtype = self._shard(scores)
        if not scores.size:
            return
        column, given = np.full(len(scores), -1), np.zeros((3, len(scores) + 16), dtype)
        with np.errstate(all="ignore"):
            rows, columns, entries = reference.target_entries(loss, scores, targets, offset, stats)
            heavy = reference.heavy_entries(loss, scores, targets, offset, stats)
            column[rows], given[2, rows] = columns, entries
            given[0, : len(scores)] = stats.maximum * (loss.temperature if loss.softcap is None else 1)
            given[1, : len(scores)] = reference.stats_factors(loss, stats, targets)
            share = reference.stats_shares(loss, stats, targets)[1]
        weight = None if multiplier is None else multiplier.astype(dtype)
        options = shard_options(loss, offset, scores.shape[1], share, dtype)
        kernels.gradient_from_stats(options, numbers, column, given, weight, scale, bits(grad), n_threads)
        reference.put_entries(grad, heavy, multiplier, scale)

    def transform(self, kind: str, scores: Array, out: Array, n_threads: int) -> None:
        self._kernels[scores.dtype].transform(kind, bits(scores), bits(out), n_threads)
