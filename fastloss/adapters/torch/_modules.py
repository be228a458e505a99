"""The losses as modules, with the state of PyTorch's own."""

from __future__ import annotations

import math
from typing import Any

from fastloss import _checks as checks
from fastloss.adapters.torch._arrays import Tensor, torch
from fastloss.adapters.torch._functions import (
    check_tensors,
    check_weight,
    checked_reduction,
    cross_entropy,
    hinge_options,
    linear_cross_entropy,
    linear_multi_margin_loss,
    multi_margin_loss,
    no_script,
)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):  # type: ignore[misc]
    """`torch.nn.CrossEntropyLoss` on the CPU, by `cross_entropy`: the same arguments.

    Examples
    --------
    >>> import torch
    >>> from fastloss.adapters.torch import CrossEntropyLoss
    >>> round(CrossEntropyLoss()(torch.zeros(2, 10), torch.tensor([3, 9])).item(), 4)
    2.3026
    """

    __prepare_scriptable__ = no_script

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip


class MultiMarginLoss(torch.nn.MultiMarginLoss):  # type: ignore[misc]
    """`torch.nn.MultiMarginLoss` on the CPU, by `multi_margin_loss`: the same arguments.

    Examples
    --------
    >>> import torch
    >>> from fastloss.adapters.torch import MultiMarginLoss
    >>> round(MultiMarginLoss(p=2)(torch.zeros(2, 10), torch.tensor([3, 9])).item(), 4)
    0.9
    """

    __prepare_scriptable__ = no_script

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return multi_margin_loss(input, target, self.p, self.margin, self.weight, reduction=self.reduction)


class _LinearLoss(torch.nn.Module):  # type: ignore[misc]
    """A linear layer and the loss of its scores, with the state of `torch.nn.LinearCrossEntropyLoss`."""

    __prepare_scriptable__ = no_script

    #: Options that the module's text tells.
    _shown: tuple[str, ...] = ("reduction",)

    def __init__(
        self, in_features: int, num_classes: int, out_features: tuple[int, ...], bias: bool, device: Any, dtype: Any,
        weight: Tensor | None, reduction: str,
    ) -> None:  # fmt: skip
        super().__init__()
        check_tensors(weight=weight)
        check_weight(weight, num_classes)
        self.register_buffer("weight", weight)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.reduction = checked_reduction(reduction, None, None)
        outputs = math.prod(self.out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)

    def _layer(self) -> tuple[Tensor, Tensor | None]:
        """Weight (C, d1, ..., D) and bias."""
        shape, bias = (self.num_classes, *self.out_features), self.linear.bias
        weight = self.linear.weight.reshape(*shape, self.linear.in_features)
        return weight, None if bias is None else bias.reshape(shape)

    def extra_repr(self) -> str:
        first = f"in_features={self.linear.in_features}, num_classes={self.num_classes}"
        bias = f"bias={self.linear.bias is not None}"
        return ", ".join([first, bias, *(f"{name}={getattr(self, name)}" for name in self._shown)])


class LinearCrossEntropyLoss(_LinearLoss):
    """`torch.nn.LinearCrossEntropyLoss` on the CPU, by `linear_cross_entropy`: the same arguments and parameters.

    Examples
    --------
    >>> import torch
    >>> from fastloss.adapters.torch import LinearCrossEntropyLoss
    >>> head = LinearCrossEntropyLoss(3, 10, bias=True)
    >>> head(torch.ones(4, 3), torch.arange(4)).backward()
    >>> head.linear.weight.grad.shape
    torch.Size([10, 3])
    """

    _shown = ("out_features", "reduction", "ignore_index", "label_smoothing", "options")

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        super().__init__(in_features, num_classes, out_features, bias, device, dtype, weight, reduction)
        self.ignore_index, self.options = ignore_index, options
        self.label_smoothing = checks.number(label_smoothing, "label_smoothing", low=0, high=1)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        linear_weight, linear_bias = self._layer()
        return linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, weight=self.weight, reduction=self.reduction,
            ignore_index=self.ignore_index, label_smoothing=self.label_smoothing, options=self.options,
        )  # fmt: skip


class LinearMultiMarginLoss(_LinearLoss):
    """A linear layer and its `linear_multi_margin_loss`: a multiclass SVM whose parameters are in `linear`.

    Parameters
    ----------
    in_features, num_classes : int
    bias : bool
    p, margin, weight, reduction
        As for `linear_multi_margin_loss`.

    Examples
    --------
    >>> import torch
    >>> from fastloss.adapters.torch import LinearMultiMarginLoss
    >>> head = LinearMultiMarginLoss(3, 10)
    >>> head(torch.ones(4, 3), torch.arange(4)).backward()
    >>> head.linear.weight.grad.shape
    torch.Size([10, 3])
    """

    _shown = ("p", "margin", "reduction")

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        p: int = 1,
        margin: float = 1.0,
        weight: Tensor | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(in_features, num_classes, (), bias, device, dtype, weight, reduction)
        options = hinge_options(p, margin, reduction)
        self.p, self.margin = options.p, options.margin

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        linear_weight, linear_bias = self._layer()
        return linear_multi_margin_loss(
            input, linear_weight, target, linear_bias=linear_bias, p=self.p, margin=self.margin, weight=self.weight,
            reduction=self.reduction,
        )  # fmt: skip
