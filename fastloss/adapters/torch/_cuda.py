"""What is computed of CUDA tensors: the same operators as `_compute`'s, on the caller's stream, without waiting for it.

Class weights become a factor for each row, looked up on the device; only where they are part of the row loss itself
(label smoothing, probabilities) are they read by the host. What a mean divides by stays on the device. A class outside
the scores' gives NaN, and an error in fastloss's next call, or in `fastloss.synchronize`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import fastloss as fl
from fastloss.adapters.torch import _compute as compute
from fastloss.adapters.torch._arrays import Tensor, torch
from fastloss.adapters.torch._compute import Options


def why_not() -> str | None:
    """Why CUDA tensors cannot be computed on here; None if they can."""
    from fastloss.gpu import device

    return device.why_not()


def require(name: str, tensor: Tensor) -> None:
    """Raise unless there are kernels for a tensor's device."""
    reason = f"it has kernels for CPUs and NVIDIA GPUs, not for {tensor.device.type}"
    if tensor.device.type == "cuda":
        found = why_not()
        if found is None:
            return
        reason = found
    raise ValueError(
        f"{name} is on {tensor.device}, where fastloss cannot compute: {reason}. Use {name}.cpu(), or the loss of "
        "torch.nn.functional there"
    )


class _Rows:
    """The targets of all rows (N, d1, ...), or probabilities (N, C, d1, ...), and what each row counts.

    Attributes
    ----------
    loss : fastloss's, unreduced
    rows : tensor (rows,) or (rows, C)
    factor : tensor (rows,) of float64, or None for 1
        Class weights of the targets.
    """

    def __init__(self, target: Tensor, n_classes: int, weight: Tensor | None, o: Options, like: Tensor) -> None:
        self.o, self.probabilities, self.factor = o, target.is_floating_point(), None
        if self.probabilities:
            if o.label_smoothing:
                wide = target.float() if target.dtype.itemsize == 2 else target
                target = wide * (1 - o.label_smoothing) + o.label_smoothing / n_classes
            self.rows = target.movedim(1, -1).reshape(-1, n_classes).to(_real(like)).contiguous()
        else:
            self.rows = target.reshape(-1)
        smoothing = 0.0 if self.probabilities else o.label_smoothing
        loss = compute.plain_loss(o.kind, o.p, o.margin, smoothing, None if self.probabilities else o.ignore_index)
        self._weight = weight
        if weight is not None and loss.weighs_inside(self.probabilities):
            loss = dataclasses.replace(loss, class_weight=_host(weight))
        elif weight is not None:
            inside = self.rows.long().clamp(0, n_classes - 1)
            self.factor = torch.where(self._counted(), weight.double()[inside], 0.0)
        self.loss = loss

    def _counted(self) -> Tensor:
        """Whether each row counts."""
        if self.o.ignore_index is None or self.probabilities:
            return torch.ones(len(self.rows), dtype=torch.bool, device=self.rows.device)
        return self.rows != self.o.ignore_index

    def total(self) -> Any:
        """What the sum of all rows is divided by: a number, or one on the device."""
        if self.o.reduction != "mean":
            return 1.0
        if self.probabilities or self.o.kind == "hinge":
            return float(len(self.rows))
        if self.factor is not None:
            return self.factor.sum()
        counted = self._counted()
        if self._weight is None:
            return counted.sum(dtype=torch.float64)
        inside = self.rows.long().clamp(0, len(self._weight) - 1)
        total = torch.where(counted, self._weight.double()[inside], 0.0).sum()
        return torch.where(total == 0, torch.nan, total)  # with what label smoothing adds, PyTorch's mean is NaN too

    @property
    def is_plain(self) -> bool:
        """Whether fastloss's own reductions are PyTorch's."""
        return self._weight is None and not (self.o.reduction == "mean" and self.probabilities and not len(self.rows))

    def reduce(self, row_losses: Tensor) -> Tensor:
        """The loss, from those of all rows (which have class weights that are part of them)."""
        values = row_losses.double()
        if self.factor is not None:
            values = torch.where(self.factor == 0, 0.0, values * self.factor)
        if self.o.reduction == "none":
            return values
        return values.sum() / self.total()

    def pull(self, upstream: Tensor, like: Tensor) -> Tensor:
        """The factor of each row's gradient, in the type that `like` is computed in."""
        factors = upstream.double().reshape(-1) / self.total()
        if self.factor is not None:
            factors = factors * self.factor
        return factors.expand(len(self.rows)).to(_real(like)).contiguous()


def _host(weight: Tensor) -> Any:
    host = weight.detach().double().cpu().numpy()
    if (host < 0).any():
        raise ValueError(
            "weight has negative numbers, which label smoothing and probabilities take on the CPU only: move there, "
            "or use weight.clamp(min=0)"
        )
    return host


def _real(tensor: Tensor) -> Any:
    """The type that is computed in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _matrix(x: Tensor) -> Tensor:
    """Scores (N, C, d1, ...) as a matrix of its rows: a view where there is one."""
    return x if x.dim() == 2 else x.movedim(1, -1).reshape(-1, x.shape[1])


# --- losses of scores -------------------------------------------------------------------------------------------------
def scores_loss(input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
    require("input", input)
    *rest, wide = options
    o = Options(*rest)
    x, batch = compute.batched(input.detach(), target.detach())
    rows, scores = _Rows(batch, x.shape[1], weight, o, input), _matrix(x)
    if rows.is_plain:
        value = rows.loss.value(scores, rows.rows, reduction=o.reduction)
    else:
        value = rows.reduce(rows.loss.value(scores, rows.rows, reduction="none"))
    value = value.to(compute.loss_dtype(input, target, weight, wide))
    return value.reshape(compute.rows_shape(input, target)) if o.reduction == "none" else value


def scores_gradient(upstream: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
    require("input", input)
    o = Options(*options)
    x, batch = compute.batched(input.detach(), target.detach())
    rows = _Rows(batch, x.shape[1], weight, o, input)
    gradient = torch.empty_like(input)
    out, _ = compute.batched(gradient, target)
    found = _matrix(out)
    direct = out.dim() == 2 or found.data_ptr() == out.data_ptr()
    rows.loss.value_and_grad(_matrix(x), rows.rows, out=found, reduction="none", upstream=rows.pull(upstream, input))
    if not direct:
        moved = out.movedim(1, -1)
        moved.copy_(found.reshape(moved.shape))
    return gradient


def loss_and_gradient(input: Tensor, target: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    """Of scores (N, C) and class indices, reduced and without class weights: in one pass."""
    require("input", input)
    *rest, wide = options
    o = Options(*rest)
    rows = _Rows(target, input.shape[1], None, o, input)
    out = torch.empty_like(input)
    value, gradient = rows.loss.value_and_grad(input.detach(), rows.rows, out=out, reduction=o.reduction)
    return value.to(compute.loss_dtype(input, target, None, wide)), gradient


def scale(gradients: Any, upstream: Tensor) -> None:
    """gradients ← upstream · gradients, in place: of no cost where it is 1, without asking."""
    from fastloss.gpu import linear

    linear.rescale([gradient for gradient in gradients if gradient.numel()], upstream.double())


# --- losses of a linear layer -----------------------------------------------------------------------------------------
def _layer(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, rows: _Rows, chunk_rows: int | None,
    wrt: tuple[str, ...], upstream: Tensor | None,
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """The loss, and the gradients of input, linear_weight and linear_bias that `wrt` names, with the factors of
    `upstream`. A K-dimensional layer (C, d1, ..., D) is a classifier (C, D) at each position d1, ...
    """
    classes, features = linear_weight.shape[0], input.shape[-1]
    X, W = input.detach().reshape(-1, features), linear_weight.detach().reshape(classes, -1, features)
    b = None if linear_bias is None else linear_bias.detach().reshape(classes, -1)
    positions, factors = W.shape[1], None if upstream is None else rows.pull(upstream, input)
    whole = _is_whole(linear_weight, rows) and upstream is None
    values: list[Tensor] = []
    found: list[dict[str, Any]] = []
    for p in range(positions):
        if whole:
            pull: dict[str, Any] = {"reduction": rows.o.reduction}
        else:
            pull = {"reduction": "none", "upstream": None if factors is None else factors[p::positions].contiguous()}
        value, grads = fl.linear_value_and_grad(
            rows.loss, X, W[:, p], rows.rows[p::positions].contiguous(), None if b is None else b[:, p].contiguous(),
            wrt=wrt, chunk_rows=chunk_rows, **pull,
        )  # fmt: skip
        values.append(value)
        found.append(grads)
    loss = values[0] if whole else rows.reduce(torch.stack(values, dim=1).reshape(-1))
    done: list[Tensor | None] = [None] * 3
    for k, (name, like) in enumerate(zip("XWb", (input, linear_weight, linear_bias), strict=True)):
        if name in wrt and like is not None:
            terms: list[Tensor] = [grads[name] for grads in found]
            if positions == 1:
                total: Tensor = terms[0]
            elif name == "X":
                total = torch.stack([term.float() if term.itemsize == 2 else term for term in terms]).sum(0)
            else:
                total = torch.stack(terms, dim=1)
            done[k] = total.to(like.dtype).reshape(like.shape)
    return loss, done


def _is_whole(linear_weight: Tensor, rows: _Rows) -> bool:
    """Whether the layer's loss is one of fastloss's, reduced by it."""
    return linear_weight.dim() == 2 and rows.is_plain and rows.o.reduction != "none"


def _names(wrt: Any) -> tuple[str, ...]:
    return tuple(name for name, wanted in zip("XWb", wrt, strict=True) if wanted)


def _filled(found: list[Tensor | None], input: Tensor) -> tuple[Tensor, ...]:
    """Empty tensors for gradients that were not asked for."""
    return tuple(input.new_empty(0) if gradient is None else gradient for gradient in found)


def _layer_rows(input: Tensor, linear_weight: Tensor, target: Tensor, weight: Tensor | None, o: Options) -> _Rows:
    batch = target.detach() if input.dim() > 1 else target.detach()[None]
    return _Rows(batch, linear_weight.shape[0], weight, o, input)


def linear_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The loss, and for a reduction the gradients that `wrt` asks for: of input, linear_weight, linear_bias."""
    require("input", input)
    *rest, wide, chunk_rows, wrt = options
    o = Options(*rest)
    rows = _layer_rows(input, linear_weight, target, weight, o)
    names = _names(wrt) if compute.scales_later(input, options) else ()
    one = None
    if names and not _is_whole(linear_weight, rows):
        one = torch.ones((), dtype=torch.float64, device=input.device)
    loss, found = _layer(input, linear_weight, linear_bias, rows, chunk_rows, names, one)
    loss = loss.to(compute.loss_dtype(input, target, weight, wide))
    if o.reduction == "none":
        loss = loss.reshape(compute.linear_rows_shape(input, linear_weight, target))
    return loss, *_filled(found, input)


def linear_gradient(
    upstream: Tensor, input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None,
    weight: Tensor | None, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    require("input", input)
    *rest, chunk_rows, wrt = options
    rows = _layer_rows(input, linear_weight, target, weight, Options(*rest))
    _, found = _layer(input, linear_weight, linear_bias, rows, chunk_rows, _names(wrt), upstream)
    return _filled(found, input)
