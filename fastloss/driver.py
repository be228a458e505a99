"""The driver: what every loss, every kind of features and every backend have in common.

It checks arguments, folds weights into one multiplier for each row, chooses the backend, and scales the result.
Loops over elements are the backends'.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastloss import _checks as checks
from fastloss import backends, threads
from fastloss._checks import Array

#: Of a block of rows whose Hessians' diagonals NumPy computes: it stays in cache.
HESSIAN_VALUES = 1 << 16
#: Of a plain call that a backend may check as it computes: with more, that would not be felt.
FEW_SCORES = 1 << 17
FLOATS = (checks.FLOAT32, checks.FLOAT64)


def check_range(backend: backends.Backend, loss: Any, targets: Array, n_classes: int, n_threads: int = 1) -> None:
    """Raise if a class index is none of the loss's labels and not ignored, or a probability is not finite, negative or
    too large for the loss: a pass of its own, before all else."""
    if targets.ndim == 1:
        labels = loss.labels(n_classes)
        position = backend.first_outside(targets, labels, loss.ignore_index, n_threads)
        if position >= 0:
            checks.raise_bad_target(targets, position, labels, loss.ignore_index)
        return
    position = backend.first_unfit(targets, n_threads, loss.most_of_targets)
    if position >= 0:
        checks.raise_unfit(targets, position, "targets", loss.most_of_targets)


class Weights(NamedTuple):
    """What the rows of a call count, folded from sample weights, class weights and `ignore_index`."""

    #: One multiplier for each row, in the compute type; None stands for all 1. 0: skip the row.
    multiplier: Array | None = None
    #: What a mean divides by where that is not the multiplier: class weights that are part of the row loss (label
    #: smoothing) still count in the mean, for the targets' classes, as in PyTorch.
    denominator: Array | None = None
    #: Weights too large or small for the compute type are given in this unit, a power of two.
    unit: float = 1.0
    #: Σ of what a mean divides by, over all rows, where that is known.
    whole: float | None = None

    def total(self, n: int, rows: Array | None = None) -> float:
        """Σ w over all n rows, or those picked, in the unit."""
        if rows is None and self.whole is not None:
            return self.whole
        weights = self.multiplier if self.denominator is None else self.denominator
        if weights is None:
            return float(n if rows is None else len(rows))
        return float((weights if rows is None else weights[rows]).sum(dtype=np.float64))

    def reduce(self, value: float, reduction: str, total: float) -> float:
        """The loss, from Σ multiplier · ℓ."""
        if reduction == "mean":
            return value / total if total > 0 else math.nan
        return value * self.unit

    def scale(self, reduction: str, total: float) -> float:
        """What the gradient of Σ multiplier · ℓ is multiplied by; 0 for a mean over no weight."""
        if reduction == "mean":
            return 1 / total if total > 0 else 0.0
        return self.unit

    def magnified(self, total: float) -> tuple[Weights, float]:
        """The same weights in a unit near `total`, and the total in it: for rows that weigh next to nothing."""
        factor = math.ldexp(0.5, 1 - max(-1000, math.frexp(total)[1]))

        def times(weights: Array | None) -> Array | None:
            with np.errstate(over="ignore"):  # of rows that are not picked
                return None if weights is None else (weights.astype(np.float64) * factor).astype(weights.dtype)

        return Weights(times(self.multiplier), times(self.denominator), self.unit / factor), total * factor

    def row_values(self, row_loss: Array) -> Array:
        """w ℓ for each row."""
        if self.multiplier is None:
            return row_loss
        if self.unit == 1:
            return np.asarray(row_loss * self.multiplier)
        with np.errstate(over="ignore"):  # the unit alone may be more than the type holds
            return (row_loss * (self.multiplier * np.float64(self.unit))).astype(row_loss.dtype)


UNWEIGHTED = Weights()  # made once: a tuple with names costs as much as a call of the kernels


def fold(
    loss: Any, targets: Array, sample_weight: Array | None, dtype: np.dtype[Any], reduction: str,
    backend: backends.Backend, n_threads: int = 1,
) -> Weights:  # fmt: skip
    """Sample weights, class weights of index targets and `ignore_index`, as row multipliers."""
    weight, ignored = (loss.class_weight, loss.ignore_index) if targets.ndim == 1 else (None, None)
    if sample_weight is None and weight is None and ignored is None:
        return UNWEIGHTED
    inside = weight is not None and loss.weighs_inside(probabilities=False)
    outside = None if inside else weight
    multiplier, top, total, unit = None, 1.0, float(len(targets)), 1.0
    if sample_weight is not None or outside is not None or ignored is not None:
        multiplier, top, total = backend.weigh(targets, outside, ignored, sample_weight, dtype, n_threads)
    if top > 0 and not 1e-10 < top < 1e10:
        unit = math.ldexp(0.5, math.frexp(top)[1])  # 2^1024 would overflow
        sample_weight = (np.ones(len(targets)) if sample_weight is None else sample_weight) / unit
        multiplier, _, total = backend.weigh(targets, outside, ignored, sample_weight, dtype, n_threads)
    if not inside:
        return Weights(multiplier, None, unit, total)
    denominator, top, total = backend.weigh(targets, weight, ignored, sample_weight, checks.FLOAT64, n_threads)
    if reduction == "mean" and top == 0:
        multiplier = np.zeros(len(targets), dtype)  # a mean over no weight has no gradient, whatever the scores
    return Weights(multiplier, denominator, unit, total)


def pull(factor: Array, multiplier: Array | None, dtype: np.dtype[Any]) -> tuple[Array, bool]:
    """The multipliers of a gradient with a factor for each row, and whether it needs a pass of its own: a row whose
    factor is 0 is skipped there, but has a loss.
    """
    pulled: Array = (factor if multiplier is None else factor * multiplier).astype(dtype)
    rows = len(factor) if multiplier is None else np.count_nonzero(multiplier)
    return pulled, bool(np.count_nonzero(pulled) < rows)


def needs(loss: Any, targets: Array, outputs: tuple[str, ...]) -> tuple[str, ...]:
    """What a call asks for beyond the plain form of a loss."""
    wanted: tuple[str, ...] = loss.general
    if targets.ndim == 2:
        wanted += ("probability targets",)
    return wanted + tuple(f"output {name!r}" for name in outputs if name != "row_loss") if outputs else wanted


def check_outputs(loss: Any, outputs: tuple[str, ...]) -> None:
    if isinstance(outputs, str):
        raise TypeError(f"outputs is {outputs!r}; it must be a tuple of names, as ({outputs!r},)")
    for name in outputs:
        checks.one_of(name, "outputs", loss.extra_outputs)


def check_upstream(upstream: object, reduction: str, n: int) -> float | Array:
    """The gradient's factor: one number, or with reduction="none" one for each row."""
    array = np.asarray(upstream)
    if reduction == "none" and array.ndim == 1:
        return checks.finite(checks.vector(upstream, "upstream", n, "row"), "upstream")
    if array.ndim != 0:
        raise ValueError(f'upstream has shape {array.shape}; with reduction="{reduction}" it must be a number')
    return checks.number(array[()], "upstream")


def on_gpu(array: object, backend_name: str | None) -> bool:
    """Whether an array is on a GPU, where `fastloss.gpu.driver` takes the call; raise if another backend is named.

    Only asked for what is no NumPy array, so that a call with one costs nothing.
    """
    if not checks.on_gpu(array):
        return False
    name = backends.named(backend_name)
    if name not in (None, "cuda"):
        raise backends.BackendError(f"backend {name!r} cannot serve this call: the arrays are on a GPU; use 'cuda'")
    return True


def scores_call(
    loss: Any, scores: object, targets: object, want_grad: bool, out: Array | None, sample_weight: object,
    reduction: str, upstream: object, outputs: tuple[str, ...], backend_name: str | None, n_threads: int | None,
    check: bool = False,
) -> tuple[Any, Array | None, dict[str, Array]]:  # fmt: skip
    """Loss, gradient and extra outputs of given scores."""
    if type(scores) is not np.ndarray and on_gpu(scores, backend_name):
        from fastloss.gpu import driver as gpu

        threads.resolve(n_threads)
        return gpu.scores_call(
            loss, scores, targets, want_grad, out, sample_weight, reduction, upstream, outputs, check
        )  # fmt: skip
    if reduction not in checks.REDUCTIONS:
        checks.one_of(reduction, "reduction", checks.REDUCTIONS)
    if (
        type(scores) is np.ndarray
        and type(targets) is np.ndarray
        and scores.size <= FEW_SCORES
        and (scores.dtype in FLOATS or scores.dtype.kind in "fV")  # bfloat16's kind
        and scores.ndim == 2
        and targets.ndim == 1
        and (out is None or (type(out) is np.ndarray and out.ndim == 2))
        and not (loss.general or outputs or reduction == "none")
        and sample_weight is upstream is loss.class_weight is loss.ignore_index is None
    ):
        dtype = scores.dtype if scores.dtype in FLOATS else checks.compute_dtype(scores.dtype, "scores")
        backend = backends.choose(backend_name, "gradient", loss, dtype, ())
        grad = np.empty(scores.shape, scores.dtype) if want_grad and out is None else out
        found = backend.plain_rows(loss, scores, targets, grad, reduction == "mean", threads.resolve(n_threads))
        if found is not None:
            return found, grad, {}
    s = checks.scores(scores)
    n, c = s.shape
    y = checks.targets(targets, n, c)
    loss.check_classes(c, y.ndim == 2)
    if y.ndim == 2:
        loss.check_probabilities()
    weight = None if sample_weight is None else checks.vector(sample_weight, "sample_weight", n, "row of scores")
    if outputs:
        check_outputs(loss, outputs)
    factor = 1.0 if upstream is None else check_upstream(upstream, reduction, n)
    dtype = checks.compute_dtype(s.dtype, "scores")
    result_dtype = s.dtype if s.dtype.kind not in "iub" else dtype
    if out is not None:
        checks.out(out, "out", s.shape, result_dtype)
        inputs = {"scores": s, "targets": y, "sample_weight": sample_weight, "upstream": upstream}
        checks.apart(out, "out", inputs, in_place="scores")
    workers = threads.resolve(n_threads)
    backend = backends.choose(backend_name, "gradient", loss, dtype, needs(loss, y, outputs))
    if weight is not None and (position := backend.first_unfit(weight, workers)) >= 0:
        checks.raise_unfit(weight, position, "sample_weight")
    # Probabilities are as large as the scores: where nothing of the caller's is written, they are read once.
    unfit = None
    if y.ndim == 2 and (out is None or not want_grad) and backend.checks_as_it_reads(y, dtype):
        unfit = np.full(1, -1)
    else:
        check_range(backend, loss, y, c, workers)

    weights = fold(loss, y, weight, dtype, reduction, backend, workers)
    multiplier, total = weights.multiplier, weights.total(n)
    work = s if s.dtype == dtype or backend.reads(s.dtype) else s.astype(dtype)
    direct = work is s or result_dtype == dtype  # the gradient is computed in the type that it is wanted in
    grad = None
    if want_grad:
        grad = out if out is not None and direct else np.empty(s.shape, work.dtype)
    kept = np.empty(n, dtype) if reduction == "none" or "row_loss" in outputs else None
    extras: dict[str, Array] = {}
    for name in outputs:
        if name != "row_loss":
            extras[name] = np.empty(n, np.intp if name == "argmax" else dtype)
    if unfit is not None:
        extras["unfit"] = unfit

    if isinstance(factor, np.ndarray):
        pulled, twice = pull(factor, multiplier, dtype)
        value = 0.0  # of no use: this is reduction="none"
        if twice:
            backend.score_rows(loss, work, y, multiplier, 1.0, None, kept, extras, workers)
        once = (None, {}) if twice else (kept, extras)
        backend.score_rows(loss, work, y, pulled, weights.unit, grad, *once, workers)
    else:
        scale = weights.scale(reduction, total) * factor
        value = backend.score_rows(loss, work, y, multiplier, scale, grad, kept, extras, workers)
    if unfit is not None and extras.pop("unfit")[0] >= 0:
        checks.raise_unfit(y, int(unfit[0]), "targets", loss.most_of_targets)

    if grad is not None and not direct:
        if out is None:
            grad = grad.astype(result_dtype)
        else:
            out[...] = grad
            grad = out
    if outputs and "row_loss" in outputs:
        assert kept is not None
        extras["row_loss"] = kept
    if reduction == "none":
        assert kept is not None
        values = weights.row_values(kept)
        return values.copy() if values is extras.get("row_loss") else values, grad, extras
    return weights.reduce(value, reduction, total), grad, extras


class _Shard(NamedTuple):
    """What the calls with a shard of the classes have in common."""

    backend: backends.Backend
    scores: Array
    targets: Array
    offset: int


def _shard(loss: Any, scores: object, targets: object, offset: object, backend_name: str | None) -> _Shard:
    s = checks.matrix(scores, "scores", SHARD)
    start = check_offset(loss, offset, s.shape[1])
    y = shard_targets(targets, len(s))
    dtype = checks.compute_dtype(s.dtype, "scores")
    return _Shard(backends.choose(backend_name, "stats", loss, dtype, loss.general), s, y, start)


#: What scores of a shard are.
SHARD = "(N, C): a row of scores for each of N examples, for a shard of the classes"


def check_offset(loss: Any, offset: object, n_classes: int) -> int:
    """The first class of a shard, checked against the class weights, which are those of all shards."""
    start = checks.integer(offset, "offset", low=0)
    known = None if loss.class_weight is None else len(loss.class_weight)
    if known is not None and start + n_classes > known:
        raise ValueError(
            f"scores have classes {start} to {start + n_classes - 1}, but class_weight has {known}: it must be (C,), "
            "for the classes of all shards"
        )
    return start


def check_one_target(shape: tuple[int, ...], n: int) -> None:
    """Raise unless targets of a shape are class indices."""
    if len(shape) != 1:
        raise ValueError(
            f"targets has shape {shape}; with shards of the classes it must be ({n},), class indices: stats hold "
            "the score of one target for each row, which class probabilities have not"
        )


def shard_targets(targets: object, n: int) -> Array:
    array = checks.as_array(targets, "targets")
    check_one_target(array.shape, n)
    return checks.targets(array, n, 0)


def stats_call(
    loss: Any, scores: object, targets: object, offset: object, backend_name: str | None, n_threads: int | None
) -> backends.Stats:
    """What a shard of the classes tells about its rows."""
    workers = threads.resolve(n_threads)
    loss.check_shards()
    if type(scores) is not np.ndarray and on_gpu(scores, backend_name):
        from fastloss.gpu import stats as gpu

        return gpu.stats_call(loss, scores, targets, offset)
    shard = _shard(loss, scores, targets, offset, backend_name)
    return shard.backend.stats_rows(loss, shard.scores, shard.targets, shard.offset, workers)


def check_stats(loss: Any, stats: object, targets: Array) -> backends.Stats:
    """Raise unless the stats are of all classes: each target that counts is in one shard."""
    if not isinstance(stats, backends.Stats):
        raise TypeError(f"stats is {type(stats).__name__}; it must be what fastloss.Stats.merge gives")
    arrays = backends.Stats(*(np.asarray(array) for array in stats))
    for name, array in arrays._asdict().items():
        if array.shape != targets.shape:
            raise ValueError(f"stats.{name} has shape {array.shape}; it must be {targets.shape}, as targets")
    bad = arrays.found != 1
    if loss.ignore_index is not None:
        bad &= targets != loss.ignore_index
    if bad.any():
        k = int(bad.argmax())
        where = "none of the shards that are merged" if arrays.found[k] == 0 else "several shards, which overlap"
        raise ValueError(f"targets[{k}] is {targets[k]}, a class of {where}")
    if loss.class_weight is not None:
        c = len(loss.class_weight)
        outside = (targets < 0) | (targets >= c)
        if loss.ignore_index is not None:
            outside &= targets != loss.ignore_index
        if outside.any():
            checks.raise_bad_target(targets, int(outside.argmax()), c, loss.ignore_index)
        if (arrays.classes != c).any():
            k = int((arrays.classes != c).argmax())
            raise ValueError(f"the shards that are merged have {arrays.classes[k]} classes, but class_weight has {c}")
    if loss.weighs_inside(probabilities=False):
        if np.isnan(arrays.weight).any():
            raise ValueError("stats are of a loss without label_smoothing; make those of all shards with this loss")
        if (arrays.classes != arrays.classes[:1]).any():
            raise ValueError("stats.classes are not all the same; label_smoothing takes one number of classes")
    return arrays


def stats_value_call(loss: Any, stats: object, targets: object, sample_weight: object, reduction: str) -> Any:
    """The loss, from the stats of all classes."""
    loss.check_shards()
    if isinstance(stats, backends.Stats) and checks.on_gpu(*stats):
        from fastloss.gpu import stats as gpu

        return gpu.value_call(loss, stats, targets, sample_weight, reduction)
    checks.one_of(reduction, "reduction", checks.REDUCTIONS)
    y = checks.as_array(targets, "targets")
    y = shard_targets(y, len(y) if y.ndim else 0)
    weight = None if sample_weight is None else checks.weights(sample_weight, "sample_weight", len(y), "target")
    whole = check_stats(loss, stats, y)
    backend = backends.choose(None, "gradient", loss, checks.FLOAT64, ())
    weights = fold(loss, y, weight, checks.FLOAT64, reduction, backend)
    row_loss, multiplier = loss.rows_from_stats(whole, y), weights.multiplier
    if multiplier is not None:
        row_loss[multiplier == 0] = 0
    if reduction == "none":
        return weights.row_values(row_loss)
    value = float((row_loss if multiplier is None else row_loss * multiplier).sum())
    return weights.reduce(value, reduction, weights.total(len(y)))


def stats_gradient_call(
    loss: Any, scores: object, targets: object, stats: object, offset: object, out: Array | None,
    sample_weight: object, reduction: str, upstream: object, backend_name: str | None, n_threads: int | None,
) -> Array:  # fmt: skip
    """The gradient for a shard of the classes, from the stats of all."""
    checks.one_of(reduction, "reduction", checks.REDUCTIONS)
    workers = threads.resolve(n_threads)
    loss.check_shards()
    if type(scores) is not np.ndarray and on_gpu(scores, backend_name):
        from fastloss.gpu import stats as gpu

        return gpu.gradient_call(  # type: ignore[no-any-return]
            loss, scores, targets, stats, offset, out, sample_weight, reduction, upstream
        )
    backend, s, y, start = _shard(loss, scores, targets, offset, backend_name)
    weight = None if sample_weight is None else checks.weights(sample_weight, "sample_weight", len(y), "row of scores")
    factor = 1.0 if upstream is None else check_upstream(upstream, reduction, len(y))
    result_dtype = s.dtype if s.dtype.kind not in "iub" else checks.FLOAT64
    whole = check_stats(loss, stats, y)
    if out is None:
        out = np.empty(s.shape, result_dtype)
    else:
        checks.out(out, "out", s.shape, result_dtype)
        inputs = {"scores": s, "targets": y, "sample_weight": sample_weight, "upstream": upstream}
        checks.apart(out, "out", inputs, in_place="scores")
    weights = fold(loss, y, weight, checks.FLOAT64, reduction, backend)
    multiplier, scale = weights.multiplier, weights.scale(reduction, weights.total(len(y)))
    if isinstance(factor, np.ndarray):
        multiplier = factor if multiplier is None else factor * multiplier
    else:
        scale *= factor
    backend.stats_gradient_rows(loss, s, y, start, whole, multiplier, scale, out, workers)
    return out


def hess_diag_call(
    loss: Any, scores: object, targets: object, out: Array | None, sample_weight: object, n_threads: int | None
) -> Array:
    """The diagonals of the rows' Hessians, by blocks of rows that threads share."""
    from fastloss import blocks
    from fastloss.backends import reference

    if type(scores) is not np.ndarray and on_gpu(scores, None):
        from fastloss.gpu import hessian

        threads.resolve(n_threads)
        return hessian.diagonal_call(loss, scores, targets, out, sample_weight)  # type: ignore[no-any-return]
    s = checks.scores(scores)
    n, c = s.shape
    y = checks.targets(targets, n, c)
    loss.check_classes(c, y.ndim == 2)
    if y.ndim == 2:
        loss.check_probabilities()
    weight = None if sample_weight is None else checks.weights(sample_weight, "sample_weight", n, "row of scores")
    reason = reference.why_no_hessian(loss)
    if reason is not None:
        raise backends.BackendError(reason)
    dtype = checks.compute_dtype(s.dtype, "scores")
    result_dtype = s.dtype if s.dtype.kind not in "iub" else dtype
    if out is None:
        out = np.empty(s.shape, result_dtype)
    elif not isinstance(out, np.ndarray) or out.dtype.kind != "f" or out.shape != s.shape:
        raise ValueError(f"out must be an array {s.shape} of floats, not {getattr(out, 'shape', out)}")
    checks.apart(out, "out", {"scores": s, "targets": y, "sample_weight": sample_weight})
    workers = threads.resolve(n_threads)
    backend = backends.choose(None, "gradient", loss, dtype, needs(loss, y, ()))
    check_range(backend, loss, y, c, workers)
    weights = fold(loss, y, weight, dtype, "sum", backend, workers)
    multiplier, store = weights.multiplier, out

    def some_rows(part: slice) -> None:
        live = slice(None) if multiplier is None else np.flatnonzero(multiplier[part])
        found = reference.HESS_DIAG[loss.kind](loss, s[part][live].astype(dtype, copy=False), y[part][live])
        if multiplier is not None:
            found = found * (multiplier[part][live, None] * dtype.type(weights.unit))
            store[part] = 0
        store[part][live] = found

    with blocks.Workers(workers, blas=False) as shared:
        shared.run(some_rows, blocks.cut(n, max(16, HESSIAN_VALUES // c)))
    return out


def transform_call(
    kind: str, scores: object, out: Array | None, backend_name: str | None, n_threads: int | None
) -> Array:
    """softmax, log_softmax or logsumexp along the last axis; or sigmoid."""
    if type(scores) is not np.ndarray and on_gpu(scores, backend_name):
        from fastloss.gpu import driver as gpu

        threads.resolve(n_threads)
        return gpu.transform_call(kind, scores, out)  # type: ignore[no-any-return]
    s = checks.as_array(scores, "scores")
    if s.ndim == 0 or s.shape[-1] == 0:
        raise ValueError(f"scores has shape {s.shape}; it must be (N, C) with at least one class along the last axis")
    dtype = checks.compute_dtype(s.dtype, "scores")
    result_dtype = s.dtype if s.dtype.kind not in "iub" else dtype
    shape = s.shape[:-1] if kind == "logsumexp" else s.shape
    if out is not None:
        checks.out(out, "out", shape, result_dtype)
        checks.apart(out, "out", {"scores": s}, in_place=None if kind == "logsumexp" else "scores")
    workers = threads.resolve(n_threads)
    backend = backends.choose(backend_name, "transform", kind, dtype, ())
    as_is = s.dtype == dtype or backend.reads(s.dtype)
    work = s if s.ndim == 2 else s.reshape(-1, s.shape[-1])
    work = work if as_is else work.astype(dtype)
    wanted = dtype if kind == "logsumexp" else work.dtype
    if s.ndim == 2 and out is not None and out.dtype == wanted:
        backend.transform(kind, work, out, workers)
        return out
    result = np.empty(len(work) if kind == "logsumexp" else work.shape, wanted)
    backend.transform(kind, work, result, workers)
    shaped = result.reshape(shape).astype(result_dtype, copy=False)
    if out is None:
        return shaped
    out[...] = shaped
    return out
