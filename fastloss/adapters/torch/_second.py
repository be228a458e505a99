"""Second derivatives of the losses of scores, by PyTorch's own operations: these have derivatives of all orders."""

from __future__ import annotations

import math

from fastloss.adapters.torch._arrays import Tensor, torch
from fastloss.adapters.torch._compute import Options, batched


def _row_factors(x: Tensor, y: Tensor, weight: Tensor | None, o: Options) -> Tensor:
    """Σ_j u_j of each row's target vector u, or the weight of a row of the hinge, over what a mean divides by.

    (N, 1, d1, ...)
    """
    n_classes, rows = x.shape[1], x.numel() // x.shape[1]
    if y.is_floating_point():
        share = y.to(x.dtype) * (1 - o.label_smoothing) + o.label_smoothing / n_classes
        if weight is not None:
            share = share * weight.reshape(-1, *(1,) * (x.dim() - 2))
        factors, total = share.sum(1, keepdim=True), rows
    else:
        kept = torch.ones_like(y, dtype=torch.bool) if o.ignore_index is None else y != o.ignore_index
        counts = kept.to(x.dtype) if weight is None else torch.where(kept, weight[torch.where(kept, y, 0)], 0)
        everywhere = o.label_smoothing * (1.0 if weight is None else weight.mean())
        factors = ((1 - o.label_smoothing) * counts + everywhere * kept).unsqueeze(1)
        total = rows if o.kind == "hinge" else counts.sum()
    return factors / total if o.reduction == "mean" else factors


def _product(along: Tensor, x: Tensor, y: Tensor, o: Options) -> Tensor:
    """Each row's Hessian times `along`, for a target vector of sum 1."""
    if o.kind == "softmax":
        p = torch.softmax(x, 1)
        return p * (along - (p * along).sum(1, keepdim=True))
    if o.p == 1:
        return torch.zeros_like(x)
    at = y.unsqueeze(1)
    active = (x - x.gather(1, at) + o.margin > 0).scatter(1, at, False)
    pull = torch.where(active, along - along.gather(1, at), 0) * (2 / x.shape[1])
    return pull.scatter_add(1, at, -pull.sum(1, keepdim=True))


def scores_products(
    along: Tensor, upstream: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, o: Options
) -> tuple[Tensor, Tensor | None]:
    """The derivatives of ⟨along, gradient⟩, upstream factors included: with respect to the scores, and to the target if
    that holds probabilities.

    With p the probabilities and U = Σ u: U (p ⊙ v − p ⟨p, v⟩), and ⟨p, v⟩ − v times the class weights.
    """
    real = torch.promote_types(input.dtype, torch.float32)
    x, y = batched(input.to(real), target)
    y = y if y.is_floating_point() else y.long()
    v, w = along.to(real).reshape(x.shape), None if weight is None else weight.to(real)
    pull = upstream.to(real)
    if o.reduction == "none":
        pull = pull.reshape(x.shape[0], 1, *x.shape[2:])
    scores = _product(v, x, y, o) * (_row_factors(x, y, w, o) * pull)
    of_target = None
    if y.is_floating_point():
        of_target = ((torch.softmax(x, 1) * v).sum(1, keepdim=True) - v) * (pull * (1 - o.label_smoothing))
        if w is not None:
            of_target = of_target * w.reshape(-1, *(1,) * (x.dim() - 2))
        if o.reduction == "mean":
            of_target = of_target / math.prod(x.shape[:1] + x.shape[2:])
        of_target = of_target.reshape(target.shape).to(target.dtype)
    return scores.reshape(input.shape).to(input.dtype), of_target
