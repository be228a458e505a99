"""The functions that users call, and the checks of what they are given."""

from __future__ import annotations

import math
import operator
import warnings
from typing import Any

from fastloss import _checks as checks
from fastloss.adapters.torch import _cuda as cuda
from fastloss.adapters.torch._arrays import Tensor, torch
from fastloss.adapters.torch._compute import Options
from fastloss.adapters.torch._operators import is_everyday, linear_loss, scores_loss, transforming

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DEFAULT_IGNORED = -100


def checked_reduction(reduction: str, size_average: bool | None, reduce: bool | None) -> str:
    if size_average is not None or reduce is not None:
        wanted = "none" if reduce is False else "sum" if size_average is False else "mean"
        warnings.warn(
            f'size_average and reduce are deprecated, here as in PyTorch: use reduction="{wanted}"', UserWarning,
            stacklevel=3,
        )  # fmt: skip
        return wanted
    if reduction not in checks.REDUCTIONS:
        checks.one_of(reduction, "reduction", checks.REDUCTIONS)
    return reduction


def check_tensors(**tensors: Tensor | None) -> None:
    """Raise for what is no tensor, of no type of floats, or where fastloss cannot compute."""
    first, elsewhere = None, False
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; it must be a tensor")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name} has layout {tensor.layout}; it must be dense ({name}.to_dense())")
        if elsewhere or not tensor.is_cpu:  # objects for devices would take a third of the time of these checks
            elsewhere = True
            if tensor.device.type not in ("cpu", "meta") and not torch.compiler.is_compiling():
                cuda.require(name, tensor)
            if first is not None and tensor.device != first[1].device:
                raise ValueError(
                    f"{name} is on {tensor.device}, but {first[0]} on {first[1].device}; they must be on one device"
                )
        first = first or (name, tensor)
        if name != "target" and tensor.dtype not in DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}; it must be float32, float64, bfloat16 or float16")


def _check_target(target: Tensor, rows: Any, scores: Any, probabilities: bool) -> None:
    """rows, scores: the shapes of class indices and of probabilities."""
    if probabilities and target.is_floating_point():
        if target.shape != scores:
            raise ValueError(
                f"target has shape {tuple(target.shape)}; probabilities must have the scores' shape, {tuple(scores)}, "
                "and class indices an integer type"
            )
        return
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target is {target.dtype}; class indices must be integers (target.long())")
    if target.shape != rows:
        raise ValueError(
            f"target has shape {tuple(target.shape)}; class indices must be {tuple(rows)}, one for each row"
        )


def check_weight(weight: Tensor | None, n_classes: int) -> None:
    if weight is not None and weight.shape != (n_classes,):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be ({n_classes},), a number for each class")
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight requires a gradient, which these losses do not have: use weight.detach()")


def _number(value: Any, name: str) -> float:
    """A float of any number, also in torch.compile."""
    if type(value) in (int, float):
        return value  # type: ignore[no-any-return]
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}; it must be a number") from None


def _index(value: Any, name: str) -> int:
    if type(value) is int:
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it must be an integer") from None


def _entropy_options(target: Tensor, ignore_index: int, label_smoothing: float, reduction: str) -> Options:
    label_smoothing, ignore_index = _number(label_smoothing, "label_smoothing"), _index(ignore_index, "ignore_index")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing!r}; it must be a number from 0 to 1")
    if target.is_floating_point():
        if ignore_index >= 0:
            raise ValueError(
                f"ignore_index is {ignore_index}; it has no meaning for targets that are class probabilities"
            )
        return Options("softmax", 1, 1.0, float(label_smoothing), None, reduction)
    return Options("softmax", 1, 1.0, float(label_smoothing), ignore_index, reduction)


def hinge_options(p: int, margin: float, reduction: str) -> Options:
    checks.one_of(p, "p", (1, 2))
    margin = _number(margin, "margin")
    if not -math.inf < margin < math.inf:  # in words that torch.compile knows
        raise ValueError(f"margin is {margin!r}; it must be a finite number")
    return Options("hinge", int(p), float(margin), reduction=reduction)


def _is_wide(input: Tensor) -> bool:
    """Whether the loss is float32 because of autocast, as PyTorch's losses are."""
    if input.dtype.itemsize != 2:
        return False
    return bool(torch.is_autocast_enabled("cpu" if input.is_cpu else input.device.type))  # a name that takes longer


def _no_scores(input: Tensor) -> ValueError:
    return ValueError(f"input has shape {tuple(input.shape)}; there must be at least one class")


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = DEFAULT_IGNORED,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.cross_entropy` on CPUs and NVIDIA GPUs: the softmax cross-entropy of scores.

    Scores are not copied, and their gradient is the only array of their size that is made, where the classes are
    contiguous (any (N, C); (N, C, d1, ...) in channels-last order) or a sample has thousands of scores.

    Parameters
    ----------
    input : tensor (C,), (N, C) or (N, C, d1, ...)
        Scores: float32, float64, bfloat16 or float16.
    target : tensor
        Class indices of any integer type, (), (N,) or (N, d1, ...); or probabilities, floats of the scores' shape.
    weight : tensor (C,), optional
        A finite weight for each class.
    ignore_index : int
        Rows with this target are skipped.
    reduction : {"mean", "sum", "none"}
        The mean is over the applied weights for class indices (NaN if there are none), over rows for probabilities.
    label_smoothing : float in [0, 1]
    size_average, reduce : bool, optional
        Deprecated, as in PyTorch: they stand for a reduction.

    Returns
    -------
    tensor of input's dtype; float32 for 16-bit scores under autocast; of the widest dtype for probabilities

    Raises
    ------
    IndexError
        For a class outside [0, C), with its place.
    ValueError, TypeError
        For arguments that do not fit, and for tensors on a device where fastloss cannot compute.

    Examples
    --------
    >>> import torch
    >>> from fastloss.adapters.torch import cross_entropy
    >>> scores = torch.tensor([[3.2, 5.1, -1.7]], requires_grad=True)
    >>> loss = cross_entropy(scores, torch.tensor([0]))
    >>> loss.backward()
    >>> round(loss.item(), 2), scores.grad.shape
    (2.04, torch.Size([1, 3]))
    """
    reduction = checked_reduction(reduction, size_average, reduce)
    everyday = weight is None and is_everyday(input, target)
    if not everyday:
        check_tensors(input=input, target=target, weight=weight)
        shape = input.shape
        axis = 1 if len(shape) > 1 else 0
        if not shape or shape[axis] == 0:
            raise _no_scores(input)
        _check_target(target, shape[:axis] + shape[axis + 1 :], shape, True)
        check_weight(weight, shape[axis])
    options = _entropy_options(target, ignore_index, label_smoothing, reduction)
    call = scores_loss.eager if everyday else scores_loss
    return call(input, target, weight, *options, _is_wide(input))


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`torch.nn.functional.multi_margin_loss`: `Σ_j max(0, margin − s_y + s_j)^p / C`, over j ≠ y.

    NaN among the scores of a row gives NaN; PyTorch drops it.

    Parameters
    ----------
    input : tensor (C,) or (N, C)
        Scores: float32, float64, bfloat16 or float16 (PyTorch has the first two).
    target : tensor () or (N,) of any integer type
        Class indices.
    p : {1, 2}
    margin : float
    weight : tensor (C,), optional
        A finite weight for each class. The mean is over rows, whatever their weights.
    size_average, reduce, reduction
        As for `cross_entropy`; so are results and errors.

    Examples
    --------
    >>> import torch
    >>> from fastloss.adapters.torch import multi_margin_loss
    >>> round(multi_margin_loss(torch.tensor([[0.1, 0.2, 0.4, 0.8]]), torch.tensor([3])).item(), 3)
    0.325
    """
    reduction = checked_reduction(reduction, size_average, reduce)
    everyday = weight is None and is_everyday(input, target)
    if not everyday:
        check_tensors(input=input, target=target, weight=weight)
        shape = input.shape
        if len(shape) > 2:
            raise ValueError(f"input has shape {tuple(shape)}; it must be (C,) or (N, C)")
        if 0 in shape[-1:]:
            raise _no_scores(input)
        batch = shape[:-1]
        _check_target(target, target.shape if target.shape == (1,) and not batch else batch, shape, False)
        check_weight(weight, shape[-1] if shape else 1)
    call = scores_loss.eager if everyday else scores_loss
    return call(input, target, weight, *hinge_options(p, margin, reduction), _is_wide(input))


def _layer_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None,
    options: Options, chunk_rows: int | None,
) -> Tensor:  # fmt: skip
    """Of a layer whose tensors have been checked."""
    graded = torch.is_grad_enabled()
    wrt = [int(graded and t is not None and t.requires_grad) for t in (input, linear_weight, linear_bias)]
    if not torch.compiler.is_compiling() and ((transforming is not None and transforming()) or torch.jit.is_tracing()):
        wrt = [0] * 3  # there the backward pass computes them
    arguments = (input, linear_weight, target, linear_bias, weight, *options, _is_wide(input), chunk_rows, wrt)
    return linear_loss(*arguments)[0]


def _check_layer(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None,
    probabilities: bool,
) -> None:  # fmt: skip
    check_tensors(input=input, linear_weight=linear_weight, target=target, linear_bias=linear_bias, weight=weight)
    if input.dim() not in (1, 2):
        raise ValueError(f"input has shape {tuple(input.shape)}; it must be (D,) or (N, D)")
    many = linear_weight.shape[1:-1]
    if linear_weight.dim() < 2 or linear_weight.shape[-1] != input.shape[-1] or linear_weight.shape[0] == 0:
        raise ValueError(
            f"linear_weight has shape {tuple(linear_weight.shape)}; it must be (C, {input.shape[-1]}), as input has "
            f"{input.shape[-1]} features"
        )
    if many and (input.dim() == 1 or not probabilities):
        where = "one example (D,)" if probabilities else "this loss"
        raise ValueError(f"linear_weight has shape {tuple(linear_weight.shape)}; for {where} it must be (C, D)")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise ValueError(
            f"linear_bias has shape {tuple(linear_bias.shape)}; it must be {tuple(linear_weight.shape[:-1])}"
        )
    dtypes = {t.dtype for t in (input, linear_weight, linear_bias) if t is not None}
    if len(dtypes) > 1 and (torch.float64 in dtypes or not torch.is_autocast_enabled(input.device.type)):
        raise TypeError(
            f"input, linear_weight and linear_bias are {', '.join(sorted(map(str, dtypes)))}; they must have one dtype "
            "(under autocast 16-bit floats go with float32)"
        )
    classes, batch = linear_weight.shape[:1], input.shape[:-1]
    _check_target(target, batch + many, batch + classes + many, probabilities)
    check_weight(weight, classes[0])


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """`torch.nn.functional.linear_cross_entropy`: of the scores `input @ linear_weight.T + linear_bias`.

    The scores are never held as a whole, whatever the options. Computed in float32 at least, under autocast too.

    Parameters
    ----------
    input : tensor (D,) or (N, D)
    linear_weight : tensor (C, D), or (C, d1, ..., D) for a K-dimensional loss
    target : tensor
        Class indices of any integer type, (), (N,) or (N, d1, ...); or probabilities (C,), (N, C) or (N, C, d1, ...),
        of which a gradient takes the scores as a whole.
    linear_bias : tensor (C,), or (C, d1, ...), optional
    ignore_index : int, optional
        Rows with this target are skipped, and not multiplied either. None stands for -100.
    options : torch.nn.LinearCrossEntropyOptions, optional
        Its `batch_chunk_size` is the number of rows handled at a time when there are many classes. What else it
        chooses is always so here: chunks, sums in float32, and a graph that may be kept.
    weight, reduction, label_smoothing
        As for `cross_entropy`; so are results and errors.

    Examples
    --------
    >>> import torch
    >>> from fastloss.adapters.torch import linear_cross_entropy
    >>> weight = torch.zeros(10, 3, requires_grad=True)
    >>> loss = linear_cross_entropy(torch.ones(4, 3), weight, torch.arange(4))
    >>> loss.backward()
    >>> round(loss.item(), 4), weight.grad.shape
    (2.3026, torch.Size([10, 3]))
    """
    reduction = checked_reduction(reduction, None, None)
    _check_layer(input, linear_weight, target, linear_bias, weight, True)
    if ignore_index is None:
        ignore_index = DEFAULT_IGNORED
    entropy = _entropy_options(target, ignore_index, label_smoothing, reduction)
    if options is not None and not hasattr(options, "batch_chunk_size"):
        raise TypeError(f"options is {options!r}; it must be a torch.nn.LinearCrossEntropyOptions")
    chunk_rows = None if options is None else options.batch_chunk_size
    return _layer_loss(input, linear_weight, target, linear_bias, weight, entropy, chunk_rows)


def linear_multi_margin_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`multi_margin_loss` of `input @ linear_weight.T + linear_bias`, without an array of scores.

    Parameters
    ----------
    input : tensor (D,) or (N, D)
    linear_weight : tensor (C, D)
    target : tensor () or (N,) of any integer type
        Class indices.
    linear_bias : tensor (C,), optional
    p, margin, weight, reduction
        As for `multi_margin_loss`; so are results and errors.

    Examples
    --------
    >>> import torch
    >>> from fastloss.adapters.torch import linear_multi_margin_loss
    >>> round(linear_multi_margin_loss(torch.ones(4, 3), torch.zeros(10, 3), torch.arange(4)).item(), 4)
    0.9
    """
    reduction = checked_reduction(reduction, None, None)
    _check_layer(input, linear_weight, target, linear_bias, weight, False)
    hinge = hinge_options(p, margin, reduction)
    return _layer_loss(input, linear_weight, target, linear_bias, weight, hinge, None)


def no_script(*_: Any) -> Any:
    """What torch.jit.script calls before it compiles a function or module, or what calls it."""
    raise NotImplementedError(
        "fastloss's losses cannot be compiled by torch.jit.script: use torch.compile or torch.jit.trace, or script the "
        "model without its loss"
    )


for _loss in (cross_entropy, multi_margin_loss, linear_cross_entropy, linear_multi_margin_loss):
    vars(_loss)["__prepare_scriptable__"] = no_script
