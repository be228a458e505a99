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


def check_range(backend: backends.Backend, loss: Any, targets: Array, n_classes: int, n_threads: int = 1) -> None:
    """Raise if a class index is outside [0, C) and not ignored: a pass of its own, before all else."""
    if targets.ndim == 1:
        position = backend.first_outside(targets, n_classes, loss.ignore_index, n_threads)
        if position >= 0:
            checks.raise_bad_target(targets, position, n_classes, loss.ignore_index)


class Weights(NamedTuple):
    """What the rows of a call count, folded from sample weights, class weights and `ignore_index`."""

    #: One multiplier for each row, in the compute type; None stands for all 1. 0: skip the row.
    multiplier: Array | None = None
    #: What a mean divides by where that is not the multiplier: class weights that are part of the row loss (label
    #: smoothing) still count in the mean, for the targets' classes, as in PyTorch.
    denominator: Array | None = None
    #: Weights too large or small for the compute type are given in this unit, a power of two.
    unit: float = 1.0

    def total(self, n: int, rows: Array | None = None) -> float:
        """Σ w over all n rows, or those picked, in the unit."""
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
        factor = 2.0 ** -math.frexp(total)[1]

        def times(weights: Array | None) -> Array | None:
            with np.errstate(over="ignore"):  # of rows that are not picked
                return None if weights is None else (weights.astype(np.float64) * factor).astype(weights.dtype)

        return Weights(times(self.multiplier), times(self.denominator), self.unit / factor), total * factor

    def row_values(self, row_loss: Array) -> Array:
        """w ℓ for each row."""
        return row_loss if self.multiplier is None else row_loss * (self.multiplier * self.unit)


UNWEIGHTED = Weights()  # made once: a tuple with names costs as much as a call of the kernels


def fold(loss: Any, targets: Array, sample_weight: Array | None, dtype: np.dtype[Any], reduction: str) -> Weights:
    """Sample weights, class weights of index targets and `ignore_index`, as row multipliers."""
    by_class = targets.ndim == 1 and not (loss.class_weight is None and loss.ignore_index is None)
    if sample_weight is None and not by_class:
        return UNWEIGHTED
    multiplier = np.ones(len(targets)) if sample_weight is None else sample_weight
    denominator = None
    if by_class and loss.ignore_index is not None:
        multiplier = np.where(targets == loss.ignore_index, 0.0, multiplier)
    if by_class and loss.class_weight is not None:
        weighted = multiplier * loss.class_weight[np.where(multiplier == 0, 0, targets)]
        if loss.weighs_inside(probabilities=False):
            denominator = weighted
        else:
            multiplier = weighted
    if reduction == "mean" and denominator is not None and not denominator.any():
        multiplier = np.zeros(len(targets))  # a mean over no weight has no gradient, whatever the scores
    top, unit = float(multiplier.max(initial=0)), 1.0
    if top > 0 and not 1e-10 < top < 1e10:
        unit = 2.0 ** math.frexp(top)[1]
        multiplier, denominator = multiplier / unit, None if denominator is None else denominator / unit
    return Weights(multiplier.astype(dtype), denominator, unit)


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


def scores_call(
    loss: Any, scores: object, targets: object, want_grad: bool, out: Array | None, sample_weight: object,
    reduction: str, upstream: object, outputs: tuple[str, ...], backend_name: str | None, n_threads: int | None,
) -> tuple[Any, Array | None, dict[str, Array]]:  # fmt: skip
    """Loss, gradient and extra outputs of given scores."""
    if reduction not in checks.REDUCTIONS:
        checks.one_of(reduction, "reduction", checks.REDUCTIONS)
    s = checks.scores(scores)
    n, c = s.shape
    loss.check_classes(c)
    y = checks.targets(targets, n, c)
    if y.ndim == 2:
        loss.check_probabilities()
    weight = None if sample_weight is None else checks.weights(sample_weight, "sample_weight", n, "row of scores")
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
    check_range(backend, loss, y, c, workers)

    weights = fold(loss, y, weight, dtype, reduction)
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


def transform_call(
    kind: str, scores: object, out: Array | None, backend_name: str | None, n_threads: int | None
) -> Array:
    """softmax, log_softmax or logsumexp along the last axis."""
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
