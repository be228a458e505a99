"""The operators of `torch.library`, their derivatives, and how calls get there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastloss.adapters.torch import _compute as compute
from fastloss.adapters.torch import _cuda as cuda
from fastloss.adapters.torch._arrays import MOST, Tensor, torch
from fastloss.adapters.torch._compute import Options
from fastloss.adapters.torch._second import scores_products

transforming = getattr(torch._C, "_are_functorch_transforms_active", None)
_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
_functorch: Any = getattr(torch._C, "_functorch", None)

PLAIN = (torch.Tensor, torch.nn.Parameter)


def _is_batch(tensor: Tensor) -> bool:
    """Whether a factor stands for a batch of them, as in `torch.autograd.grad(..., is_grads_batched=True)`."""
    return _functorch is not None and bool(_functorch.is_legacy_batchedtensor(tensor))


def _is_plain(tensors: Any) -> bool:
    """Whether nothing watches tensors of the CPU or CUDA but autograd: no compiler, transform, mode, or subclass."""
    if transforming is None or _modes is None or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if transforming() or _modes() or _is_batch(tensors[0]):
        return False
    for t in tensors:  # noqa: SIM110 - all() of them takes twice as long
        if t is not None and not (type(t) in PLAIN and (t.is_cpu or t.is_cuda)):
            return False
    return True


def is_everyday(input: Tensor, target: Tensor) -> bool:
    """Whether tensors are what nearly all calls have, of which nothing else is to be checked: a matrix of scores that
    requires a gradient, and int64 class indices for its rows, on the CPU, where nothing watches but autograd.

    Checks one by one took up to a tenth of a call with scores in the caches, where they are not.
    """
    if type(input) not in PLAIN or type(target) is not torch.Tensor or not _is_plain((input, target)):
        return False
    shape = input.shape
    return bool(
        input.requires_grad
        and torch.is_grad_enabled()
        and input.is_cpu
        and target.is_cpu
        and input.dtype in MOST
        and target.dtype is torch.int64
        and input.layout is torch.strided is target.layout
        and len(shape) == 2
        and shape[1] > 0
        and target.shape == shape[:1]
    )


def _room(tensor: Tensor) -> Any:
    """What computes on a tensor's device."""
    return cuda if tensor.is_cuda else compute


def _no_forward_mode(*_: Any) -> Any:
    raise NotImplementedError("fastloss has no forward mode (jvp): use reverse mode, or PyTorch's own loss")


def _check_tangents(tensors: Any) -> None:
    """Forward mode works where gradients are not asked for, too; there autograd, which turns it away, is not passed."""
    forward_ad = torch.autograd.forward_ad
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        _no_forward_mode()


_library = torch.library.Library("fastloss", "FRAGMENT")


def _autograd(name: str, save: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """What an operator is for autograd, at each of the levels that `torch.func` makes.

    `torch.library.register_autograd` gives a function of all levels, which compiled transforms turn away.
    """

    def forward(ctx: Any, *given: Any) -> Any:
        *arguments, keyset, graded = given
        op = getattr(torch.ops.fastloss, name).default
        # PyTorch switches both modes off for a function's forward pass; levels further out have derivatives, too.
        with torch.set_grad_enabled(graded), forward_ad._set_fwd_grad_enabled(True), below():
            output = op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
        save(ctx, arguments, output)
        return output

    def back(ctx: Any, *upstream: Any) -> Any:
        return *backward(ctx, *upstream), None, None

    below, forward_ad = torch._C._AutoDispatchBelowAutograd, torch.autograd.forward_ad
    members = {"forward": staticmethod(forward), "backward": staticmethod(back), "jvp": staticmethod(_no_forward_mode)}
    function: Any = type(name, (torch.autograd.Function,), members)
    apply = super(torch.autograd.Function, function).apply  # which knows of no levels

    def call(keyset: Any, *arguments: Any) -> Any:
        graded = torch.is_grad_enabled() and transforming is not None and transforming()
        with torch._functorch.utils.enable_single_level_autograd_function():
            return apply(*arguments, keyset, graded)

    return call


class _Operator:
    """A function of tensors and options as an operator of `torch.library`, and the shortest way to it.

    Parameters
    ----------
    schema : str
    function, fake : callable
        What it does on the CPU, and what shapes and strides come of it; on CUDA, the function of its name in `_cuda`.
    save, backward : callable
        `setup_context` and `backward` of autograd.
    eager : callable, optional
        What a plain call goes to where gradients may be asked for, instead of the operator.
    """

    def __init__(
        self, schema: str, function: Callable[..., Any], fake: Callable[..., Any], save: Callable[..., Any],
        backward: Callable[..., Any], eager: Callable[..., Any] | None = None,
    ) -> None:  # fmt: skip
        name = "fastloss::" + function.__name__
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        torch.library.impl(name, "cpu")(function)
        torch.library.impl(name, "cuda")(getattr(cuda, function.__name__))
        torch.library.register_fake(name)(fake)
        _library.impl(name, _autograd(function.__name__, save, backward), "Autograd", with_keyset=True)
        self._name = function.__name__
        self.eager: Any = eager
        self._n_tensors = schema.count("Tensor", 0, schema.index("str kind"))
        namespace = torch.ops.fastloss
        self.op = getattr(namespace, function.__name__).default

    def __call__(self, *arguments: Any) -> Any:
        tensors = arguments[: self._n_tensors]
        if _is_plain(tensors):
            if not torch.is_grad_enabled():
                _check_tangents(tensors)
                return getattr(_room(tensors[0]), self._name)(*arguments)
            if self.eager is not None:
                return self.eager(*arguments)
        return self.op(*arguments)


def _save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _no_second_derivative(ctx: Any, *upstream: Any) -> Any:
    raise RuntimeError(
        "fastloss has no second derivatives of a linear layer's losses: the gradient cannot be differentiated again "
        "(it was made with create_graph=True, or within torch.func); for that compute the scores, and use their loss"
    )


def _fake_scores_loss(input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
    *rest, wide = options
    shape = compute.rows_shape(input, target) if Options(*rest).reduction == "none" else ()
    return input.new_empty(shape, dtype=compute.loss_dtype(input, target, weight, wide))


def _save_scores(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _scores_backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    input, target, weight = ctx.saved_tensors
    *options, _ = ctx.options
    gradient = target_gradient = None
    if ctx.needs_input_grad[0]:
        gradient = scores_gradient(upstream, input, target, weight, *options)
    if ctx.needs_input_grad[1]:
        target_gradient = _target_gradient(upstream, input, target, weight, Options(*options))
    return gradient, target_gradient, *(None,) * (1 + len(ctx.options))


def _save_scores_gradient(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _scores_gradient_backward(ctx: Any, along: Tensor) -> tuple[Any, ...]:
    upstream, input, target, weight = ctx.saved_tensors
    options = Options(*ctx.options)
    pulled = scores = of_target = None
    if ctx.needs_input_grad[0]:
        pulled = along * scores_gradient(torch.ones_like(upstream), input, target, weight, *options)
        if options.reduction == "none":
            pulled = pulled.sum(1 if input.dim() > 1 else 0).reshape(upstream.shape)
        else:
            pulled = pulled.sum()
        pulled = pulled.to(upstream.dtype)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        scores, of_target = scores_products(along, upstream, input, target, weight, options)
    return pulled, scores, of_target, *(None,) * (1 + len(ctx.options))


def _target_gradient(upstream: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, o: Options) -> Tensor:
    """Of probabilities: −w log p, by PyTorch."""
    axis = 1 if input.dim() > 1 else 0
    gradient = -torch.log_softmax(input.double(), axis) * (1 - o.label_smoothing)
    if weight is not None:
        gradient = gradient * weight.reshape(-1, *(1,) * (input.dim() - axis - 1))
    if o.reduction == "none":
        upstream = upstream.unsqueeze(axis)
    elif o.reduction == "mean":
        upstream = upstream / (input.numel() // input.shape[axis])
    return (gradient * upstream).to(target.dtype)


class _EagerScores(torch.autograd.Function):  # type: ignore[misc]
    """Where it can be one pass, the gradient is computed with the loss: nearly always its upstream factor is 1."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, options: Any) -> Any:
        ctx.save_for_backward(input, target, weight)
        ctx.options, ctx.gradient = options, None
        one_pass = weight is None and input.dim() == 2 and not target.is_floating_point() and options[5] != "none"
        # On a GPU nobody looks at the factor; of float16 too small for its numbers, it is to prevent zeros.
        one_pass = one_pass and not (input.is_cuda and input.dtype == torch.float16)
        if one_pass and ctx.needs_input_grad[0]:
            loss, ctx.gradient = _room(input).loss_and_gradient(input, target, options)
            return loss
        return _room(input).scores_loss(input, target, weight, *options)

    jvp = staticmethod(_no_forward_mode)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        gradient, ctx.gradient = ctx.gradient, None  # its own, to scale and give away: a second pass computes a new one
        if gradient is not None and not torch.is_grad_enabled() and not _is_batch(upstream):
            if gradient.is_cuda:
                cuda.scale([gradient], upstream)
                return gradient, None, None, None
            factor = upstream.item()
            if factor == 1:
                return gradient, None, None, None
            if gradient.dtype.itemsize > 2:
                return gradient.mul_(factor), None, None, None
        del gradient  # 16-bit floats are rounded once
        return *_scores_backward(ctx, upstream)[:3], None


# As `_EagerScores.apply`, which first looks for transforms: that was done.
_apply_scores: Any = super(torch.autograd.Function, _EagerScores).apply

scores_gradient = _Operator(
    f"(Tensor upstream, Tensor input, Tensor target, Tensor? weight, {compute.SCHEMA}) -> Tensor",
    compute.scores_gradient,
    lambda upstream, input, *rest: torch.empty_like(input),
    _save_scores_gradient,
    _scores_gradient_backward,
)
scores_loss = _Operator(
    f"(Tensor input, Tensor target, Tensor? weight, {compute.SCHEMA}, bool wide) -> Tensor",
    compute.scores_loss,
    _fake_scores_loss,
    _save_scores,
    _scores_backward,
    lambda input, target, weight, *options: _apply_scores(input, target, weight, options),
)


def _fake_gradients(tensors: Any, wrt: Any) -> tuple[Tensor, ...]:
    empty = tensors[0].new_empty(0)
    return tuple(t.new_empty(t.shape) if wanted else empty.new_empty(0) for t, wanted in zip(tensors, wrt, strict=True))


def _fake_linear_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *rest, wide, _, wrt = options
    shape = compute.linear_rows_shape(input, linear_weight, target) if Options(*rest).reduction == "none" else ()
    loss = input.new_empty(shape, dtype=compute.loss_dtype(input, target, weight, wide))
    return loss, *_fake_gradients(
        (input, linear_weight, linear_bias), wrt if compute.scales_later(input, options) else (False,) * 3
    )


def _fake_linear_gradient(
    upstream: Tensor, input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return _fake_gradients((input, linear_weight, linear_bias), rest[-1])


def _save_linear(ctx: Any, inputs: Any, output: Any) -> None:
    tensors, ctx.options = inputs[:5], inputs[5:]
    grads = () if output is None else output[1:]
    if output is not None:
        ctx.mark_non_differentiable(*grads)
    ctx.save_for_backward(*tensors, *grads)


def _linear_backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    tensors, grads = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
    *options, _, chunk_rows, asked = ctx.options
    wrt = _wanted(ctx)
    known = compute.scales_later(tensors[0], ctx.options) and all(a >= w for a, w in zip(asked, wrt, strict=True))
    if torch.is_grad_enabled() or not known:
        found = linear_gradient(upstream, *tensors, *options, chunk_rows, wrt)
    else:
        found = tuple(upstream * g for g in grads)
    return _for_inputs(ctx, found, wrt, upstream)


def _wanted(ctx: Any) -> list[bool]:
    """Whether there is to be a gradient of input, linear_weight, linear_bias."""
    dX, dW, _, db, *_ = ctx.needs_input_grad
    return [dX, dW, db]


def _for_inputs(ctx: Any, found: Any, wrt: list[bool], upstream: Tensor) -> tuple[Any, ...]:
    dX, dW, db = (g if wanted else None for g, wanted in zip(found, wrt, strict=True))
    target_gradient = None
    if ctx.needs_input_grad[2]:
        input, linear_weight, target, linear_bias, weight = ctx.saved_tensors[:5]
        flat, bias = linear_weight.flatten(0, -2), None if linear_bias is None else linear_bias.flatten()
        real = torch.promote_types(torch.promote_types(flat.dtype, input.dtype), torch.float32)
        scores = torch.nn.functional.linear(input.to(real), flat.to(real), None if bias is None else bias.to(real))
        options = Options(*ctx.options[: len(Options._fields)])
        target_gradient = _target_gradient(upstream, scores.reshape(target.shape), target, weight, options)
    return dX, dW, target_gradient, db, None, *(None,) * len(ctx.options)


class _EagerLinear(torch.autograd.Function):  # type: ignore[misc]
    """The gradients are the backward pass's own, to scale and give away: a second one computes new ones."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        _save_linear(ctx, arguments, None)
        loss, *ctx.gradients = _room(arguments[0]).linear_loss(*arguments)
        return loss

    jvp = staticmethod(_no_forward_mode)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        found, ctx.gradients = ctx.gradients, None
        *options, _, chunk_rows, _ = ctx.options
        wrt = _wanted(ctx)
        tensors = ctx.saved_tensors
        if (
            torch.is_grad_enabled()
            or found is None
            or not compute.scales_later(tensors[0], ctx.options)
            or _is_batch(upstream)
        ):
            found = linear_gradient(upstream, *tensors, *options, chunk_rows, wrt)
        elif tensors[0].is_cuda:
            cuda.scale(found, upstream)
        elif (factor := upstream.item()) != 1:
            for gradient in found:
                gradient *= factor
        return _for_inputs(ctx, found, wrt, upstream)


_LAYER = "Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight"
linear_gradient = _Operator(
    f"(Tensor upstream, {_LAYER}, {compute.SCHEMA}, int? chunk_rows, int[] wrt) -> (Tensor, Tensor, Tensor)",
    compute.linear_gradient,
    _fake_linear_gradient,
    _save_nothing,
    _no_second_derivative,
)
linear_loss = _Operator(
    f"({_LAYER}, {compute.SCHEMA}, bool wide, int? chunk_rows, int[] wrt) -> (Tensor, Tensor, Tensor, Tensor)",
    compute.linear_loss,
    _fake_linear_loss,
    _save_linear,
    _linear_backward,
    lambda *arguments: (_EagerLinear.apply(*arguments),),
)
