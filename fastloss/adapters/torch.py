"""PyTorch's multiclass losses on the CPU, computed by fastloss: change the import, keep the training loop.

Signatures, shapes, dtypes, reductions and the denominators of means are PyTorch's. What differs, on purpose:

- `multi_margin_loss` and `linear_multi_margin_loss` give NaN for scores with NaN, which PyTorch drops.
- Targets may be of any integer type. A class outside the scores' is an IndexError that says where it stands.
- Rows that count nothing (class weight 0, or ignored) are skipped, even with NaN in them.
- Class weights must be finite; probability targets finite and not negative.
- There are no second derivatives, and tensors must be on the CPU: both raise.

How a call goes. In a plain eager call, loss and gradient of a matrix of scores come of one pass in forward; backward
hands the gradient on, scaled in place where its upstream factor is not 1. With `reduction="none"`, class weights,
probabilities or more dimensions, and wherever something watches (a compiler, a transform), forward computes the loss
alone; backward reads the scores again and writes their gradient, upstream factor included. Either way the gradient is
the only array of the scores' size. The linear losses compute their gradients in forward, where the scores of each chunk
of rows are at hand, and backward scales them; with `reduction="none"`, in float16, and if it runs again, it computes
them anew.

All this is in operators of `torch.library`, which `torch.compile` keeps as they are. Plain eager calls go to the
same functions without the dispatcher's Python, which would cost more than a small call itself.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple, TypeAlias

import numpy as np

import fastloss as fl
from fastloss import _checks as checks
from fastloss._checks import Array

try:
    torch: Any = import_module("torch")
except ImportError as error:
    raise ImportError(f'fastloss.adapters.torch needs PyTorch ({error}): pip install "fastloss[torch]"') from error

Tensor: TypeAlias = Any

__all__ = [
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "LinearMultiMarginLoss",
    "MultiMarginLoss",
    "cross_entropy",
    "empty_cache",
    "linear_cross_entropy",
    "linear_multi_margin_loss",
    "multi_margin_loss",
]

SMALL = 1 << 14  # scores whose gradient's memory costs less than a look at their strides
SAMPLE = 4096  # scores of a sample below which samples (N, C, d1, ...) are copied row by row, not handled one by one
LARGE = 1 << 22  # bytes of a gradient from which on its memory is kept for the next
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DEFAULT_IGNORED = -100


# --- tensors as arrays ----------------------------------------------------------------------------------------------
@functools.cache
def _bfloat16() -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = np.dtype(import_module("ml_dtypes").bfloat16)
    except ImportError as error:
        raise ImportError(f'bfloat16 tensors need ml_dtypes ({error}): pip install "fastloss[torch]"') from error
    return dtype


def _array(tensor: Tensor) -> Array:
    """The tensor's memory as an array: never a copy, but where PyTorch has put off a change of sign."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor.dtype == torch.bfloat16:  # which NumPy does not know
        array: Array = tensor.detach().view(torch.int16).numpy().view(_bfloat16())
    else:
        array = tensor.detach().numpy()
    return array


def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    """A loss; infinite where it is too large for its type, as in PyTorch."""
    return torch.scalar_tensor(value, dtype=torch.float64).to(dtype)


def _tensor(array: Array) -> Tensor:
    if array.itemsize == 2 and array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


class _Reserve:
    """The memory of the last large gradient, lent again once no tensor holds it.

    Fresh memory costs a page fault for every 4 KB, or 2 MB where the system has huge pages (NumPy asks for them,
    PyTorch does not); at 64 MB these take longer than the gradient itself.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.empty()

    def empty(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._lent: Callable[[], Array | None] = lambda: None

    def lend(self, size: int) -> Tensor:
        """A tensor of that many bytes, aligned to cache lines."""
        with self._lock:
            if self._lent() is not None or len(self._memory) < size + 64:
                self._memory = np.empty(size + 64, np.uint8)
            start = -self._memory.ctypes.data % 64
            loan = self._memory[start : start + size]
            self._lent = weakref.ref(loan)  # PyTorch holds it as long as there is a tensor in this memory
            return torch.from_numpy(loan)


_reserve = _Reserve()


def empty_cache() -> None:
    """Give back the memory that is kept for the next large gradient, as `torch.cuda.empty_cache` does on the GPU.

    One gradient's memory stays with the process when its tensor is gone, and the next one is computed there.

    Examples
    --------
    >>> from fastloss.adapters.torch import empty_cache
    >>> empty_cache()
    """
    _reserve.empty()


def _empty_like(x: Tensor) -> Tensor:
    """A tensor with x's shape and dtype and the strides that `torch.empty_like` gives."""
    size = x.numel() * x.element_size()
    if size < LARGE:
        return torch.empty_like(x)
    strides = torch.empty_like(x, device="meta").stride()
    return _reserve.lend(size).view(x.dtype).as_strided(x.shape, strides)


# --- what is computed -----------------------------------------------------------------------------------------------
class _Options(NamedTuple):
    """What the operators take besides tensors, in this order."""

    kind: str
    p: int = 1
    margin: float = 1.0
    label_smoothing: float = 0.0
    ignore_index: int | None = None
    reduction: str = "mean"


_SCHEMA = "str kind, int p, float margin, float label_smoothing, int? ignore_index, str reduction"


@functools.lru_cache(maxsize=256)
def _loss(kind: str, p: int, margin: float, label_smoothing: float, ignore_index: int | None) -> fl.Loss:
    if kind == "hinge":
        return fl.Hinge(over="mean", power=p, margin=margin)
    return fl.Softmax(label_smoothing=label_smoothing, ignore_index=ignore_index)


class _Targets:
    """The targets of all rows, and what depends on them: the loss with its options, what a mean divides by.

    rows : array (rows,) or (rows, C), a target for each row of scores
    terms : the loss, as a sum of fastloss's losses with these signs: theirs have no negative class weights
    """

    def __init__(self, target: Tensor, n_classes: int, weight: Tensor | None, options: _Options) -> None:
        """target: (N, d1, ...) or (N, C, d1, ...)"""
        self._target, self._n_classes, self._options = target, n_classes, options
        self.probabilities = target.is_floating_point()
        smoothing, ignored = options.label_smoothing, 0
        if self.probabilities:
            if smoothing:
                wide = target.float() if target.dtype.itemsize == 2 else target
                target = wide * (1 - smoothing) + smoothing / n_classes
            self.rows = _array(target.movedim(1, -1).reshape(-1, n_classes))
        else:
            self.rows = _array(target.reshape(-1))
            if options.ignore_index is not None:
                ignored = int(np.count_nonzero(self.rows == options.ignore_index))
        loss = _loss(
            options.kind, options.p, options.margin, 0.0 if self.probabilities else smoothing,
            options.ignore_index if ignored else None,
        )  # fmt: skip
        self._weight = None if weight is None else _array(weight.double())
        self.terms = [(1.0, loss)]
        if self._weight is not None:
            parts = [(1.0, np.maximum(self._weight, 0))]
            if (self._weight < 0).any():
                parts.append((-1.0, np.maximum(-self._weight, 0)))
            self.terms = [(sign, dataclasses.replace(loss, class_weight=part)) for sign, part in parts]
        self._count = len(self.rows) - ignored

    def total(self) -> float:
        """What the sum of all rows is divided by."""
        options = self._options
        if options.reduction != "mean":
            return 1.0
        if self._weight is None or options.kind == "hinge" or self.probabilities:
            return float(self._count)
        kept = self.rows if options.ignore_index is None else self.rows[self.rows != options.ignore_index]
        return float(self._weight[kept].sum())

    @contextmanager
    def checked(self) -> Iterator[None]:
        """An error within is one about the target, if a class of it is outside the scores'."""
        try:
            yield
        except (ValueError, IndexError):
            self._raise_if_outside()
            raise

    def _raise_if_outside(self) -> None:
        if self.probabilities:
            return
        found = _array(self._target)
        bad = (found < 0) | (found >= self._n_classes)
        ignored = self._options.ignore_index
        if ignored is not None:
            bad &= found != ignored
        if bad.any():
            place = tuple(int(k) for k in np.unravel_index(int(bad.argmax()), found.shape))
            at = ", ".join(map(str, place))
            also = "" if ignored is None else f" or ignore_index, {ignored}"
            raise IndexError(
                f"target[{at}] is {found[place]}; it must be a class from 0 to {self._n_classes - 1}{also}"
            )


def _threads() -> int:
    return min(int(torch.get_num_threads()), fl.get_num_threads())


def _quotient(value: float, total: float) -> float:
    """As in IEEE arithmetic; a mean over nothing is NaN."""
    return value / total if total else value * math.inf


def _upstream(upstream: Tensor, total: float) -> tuple[Array, Array | None]:
    """The gradient's factors, finite; and what the gradient is to be multiplied by then, if they were not."""
    values = _array(upstream.double()).reshape(-1)
    if total != 1:
        values = values / total if total else values * 0  # a mean over nothing has no gradient
    finite = np.isfinite(values)
    if finite.all():
        return values, None
    return np.where(finite, values, 1.0), np.where(finite, 1.0, values)


def _pull(factors: Array, sign: float, reduction: str) -> dict[str, Any]:
    """Arguments for a gradient with these factors. Rows with factor 0 are skipped, so that one pass does for all."""
    if reduction != "none":
        return {"reduction": "sum", "upstream": sign * float(factors[0])}
    if factors.all():
        return {"reduction": "none", "upstream": sign * factors}
    kept = factors != 0
    return {"reduction": "none", "upstream": sign * np.where(kept, factors, 1.0), "sample_weight": kept}


# --- losses of scores -----------------------------------------------------------------------------------------------
def _batched(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (N, C, d1, ...) and their targets, from those of one example too."""
    if input.dim() > 1:
        return input, target
    return input.reshape(1, -1), target.reshape(1, -1) if target.is_floating_point() else target.reshape(1)


def _matrices(x: Tensor) -> list[Tensor] | None:
    """(N, C, d1, ...) as matrices (rows, C) that hold its rows in order, without a copy; None if there are none."""
    if x.dim() == 2:
        return [x]
    rows, classes = x.movedim(1, -1), x.shape[1]
    try:
        return [rows.view(-1, classes)]
    except RuntimeError:
        pass
    if rows[0].numel() < SAMPLE:
        return None
    try:
        return [sample.view(-1, classes) for sample in rows]
    except RuntimeError:
        return None


def _slices(matrices: list[Tensor]) -> Iterator[tuple[Array, slice]]:
    """The matrices as arrays, and where their rows are among all."""
    start = 0
    for matrix in matrices:
        stop = start + len(matrix)
        yield _array(matrix), slice(start, stop)
        start = stop


def _scores_loss(input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
    *rest, wide = options
    o = _Options(*rest)
    x, batch = _batched(input, target)
    targets = _Targets(batch, x.shape[1], weight, o)
    matrices = _matrices(x) or [x.movedim(1, -1).reshape(-1, x.shape[1])]
    reduction, threads = "none" if o.reduction == "none" else "sum", _threads()
    dtype = torch.float32 if wide else input.dtype
    with targets.checked():
        values = [
            sum(
                sign * loss.value(scores, targets.rows[part], reduction=reduction, n_threads=threads)
                for sign, loss in targets.terms
            )
            for scores, part in _slices(matrices)
        ]
        if reduction == "none":
            return torch.from_numpy(np.concatenate(values)).to(dtype).reshape(_rows_shape(input, target))
        return _scalar(_quotient(sum(values), targets.total()), dtype)


def _scores_gradient(upstream: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
    o = _Options(*options)
    x, batch = _batched(input, target)
    targets = _Targets(batch, x.shape[1], weight, o)
    if len(targets.terms) > 1 and input.dtype.itemsize == 2:  # the difference of large terms
        return _scores_gradient(upstream, input.float(), target, weight, *options).to(input.dtype)
    gradient = _empty_like(input)
    out, _ = _batched(gradient, target)
    scores, grads, threads = _matrices(x), _matrices(out), _threads()
    direct = scores is not None and grads is not None and len(scores) == len(grads)
    if not direct:  # in place in a copy
        rows = x.movedim(1, -1).clone(memory_format=torch.contiguous_format)
        scores = grads = [rows.view(-1, x.shape[1])]
    assert scores is not None
    assert grads is not None
    factors, spoilt = _upstream(upstream, targets.total())
    for (s, part), (g, _) in zip(_slices(scores), _slices(grads), strict=True):
        some, y = factors[part] if o.reduction == "none" else factors, targets.rows[part]
        (sign, first), *others = targets.terms
        more = [
            loss.value_and_grad(s, y, n_threads=threads, **_pull(some, other_sign, o.reduction))[1]
            for other_sign, loss in others
        ]
        first.value_and_grad(s, y, out=g, n_threads=threads, **_pull(some, sign, o.reduction))
        for term in more:
            g += term
        if spoilt is not None:
            g *= (spoilt[part][:, None] if o.reduction == "none" else spoilt).astype(g.dtype)
    if not direct:
        out.movedim(1, -1).copy_(rows)
    return gradient


def _loss_and_gradient(input: Tensor, target: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    """Of scores (N, C) and class indices, reduced and without class weights: in one pass."""
    *rest, wide = options
    o = _Options(*rest)
    targets = _Targets(target, input.shape[1], None, o)
    (_, loss), *_ = targets.terms
    out = _empty_like(input) if input.numel() > SMALL else None
    with targets.checked():
        value, gradient = loss.value_and_grad(
            _array(input), targets.rows, out=None if out is None else _array(out), reduction=o.reduction,
            n_threads=_threads(),
        )  # fmt: skip
    dtype = torch.float32 if wide else input.dtype
    return _scalar(value, dtype), _tensor(gradient) if out is None else out


def _rows_shape(input: Tensor, target: Tensor) -> Any:
    """The shape of a loss for each row."""
    return input.shape[:1] * (input.dim() > 1) + input.shape[2:] if target.is_floating_point() else target.shape


# --- losses of a linear layer -----------------------------------------------------------------------------------------
def _linear_pass(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, targets: _Targets, reduction: str,
    chunk_rows: int | None, wrt: Any, factors: Array | None,
) -> tuple[Any, list[Array | None]]:  # fmt: skip
    """Σ of the rows' losses, or each of them; and with `factors` the gradients that `wrt` asks for, of input,
    linear_weight, linear_bias. A K-dimensional layer (C, d1, ..., D) is a classifier (C, D) at each position d1, ...
    """
    classes, features = linear_weight.shape[0], input.shape[-1]
    X: Array = _array(input).reshape(-1, features)
    W: Array = _array(linear_weight).reshape(classes, -1, features)
    b: Array | None = None if linear_bias is None else _array(linear_bias).reshape(classes, -1)
    positions = W.shape[1]
    dtypes = [None if a is None else a.dtype for a in (X, W, b)]
    if X.itemsize == 2 and positions * len(targets.terms) > 1:  # the gradients are sums
        X, W, b = X.astype(np.float32), W.astype(np.float32), None if b is None else b.astype(np.float32)
    names = tuple(name for name, wanted in zip("XWb", wrt, strict=True) if wanted)
    values: list[Any] = []
    found: dict[str, list[Array]] = {name: [] for name in names}
    for p in range(positions):
        value: Any = 0.0
        some = factors if factors is None or reduction != "none" else factors[p::positions]
        for k, (sign, loss) in enumerate(targets.terms):
            pull = {"reduction": reduction} if some is None else _pull(some, sign, reduction)
            term, grads = fl.linear_value_and_grad(
                loss, X, W[:, p], targets.rows[p::positions], None if b is None else b[:, p], wrt=names,
                chunk_rows=chunk_rows, n_threads=_threads(), **pull,
            )  # fmt: skip
            value = value + sign * term
            for name in names:
                if k:
                    found[name][-1] += grads[name]
                else:
                    found[name].append(grads[name])
        values.append(value)
    total = np.stack(values, axis=1).reshape(-1) if reduction == "none" else sum(values)
    done: list[Array | None] = [None] * 3
    for k, name in enumerate("XWb"):
        if name in found:
            terms = found[name]
            whole = terms[0] if positions == 1 else sum(terms[1:], terms[0]) if name == "X" else np.stack(terms, axis=1)
            done[k] = whole.astype(dtypes[k], copy=False)
    return total, done


def _gradients(arrays: list[Array | None], tensors: list[Tensor | None], empty: Tensor) -> tuple[Tensor, ...]:
    """As tensors of the shapes of what they are gradients of; empty ones for those not asked for."""
    return tuple(
        empty.new_empty(0) if array is None or tensor is None else _tensor(array).reshape(tensor.shape)
        for array, tensor in zip(arrays, tensors, strict=True)
    )


def _scales_later(input: Tensor, options: Any) -> bool:
    """Whether a layer's gradients may be computed before their upstream factor is known. Small ones in float16 would be
    0, which the factor (of a gradient scaler) is to prevent.
    """
    return bool(options[5] != "none" and input.dtype != torch.float16)


def _linear_targets(
    input: Tensor, linear_weight: Tensor, target: Tensor, weight: Tensor | None, o: _Options
) -> _Targets:
    batch = target if input.dim() > 1 else target[None]
    return _Targets(batch, linear_weight.shape[0], weight, o)


def _linear_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The loss, and for a reduction the gradients that `wrt` asks for: of input, linear_weight, linear_bias."""
    *rest, wide, chunk_rows, wrt = options
    o = _Options(*rest)
    targets = _linear_targets(input, linear_weight, target, weight, o)
    reduction, factors = "none" if o.reduction == "none" else "sum", None
    wanted = any(wrt) and _scales_later(input, options)
    with targets.checked():
        total = targets.total()
        if wanted:
            factors = np.array([1 / total if total else 0.0])
        value, arrays = _linear_pass(
            input, linear_weight, linear_bias, targets, reduction, chunk_rows, wrt if wanted else (False,) * 3, factors
        )
    dtype = torch.float32 if wide else input.dtype
    if reduction == "none":
        loss = torch.from_numpy(value).to(dtype).reshape(_linear_rows_shape(input, linear_weight, target))
    else:
        loss = _scalar(_quotient(value, total), dtype)
    return loss, *_gradients(arrays, [input, linear_weight, linear_bias], input)


def _linear_gradient(
    upstream: Tensor, input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None,
    weight: Tensor | None, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *rest, chunk_rows, wrt = options
    o = _Options(*rest)
    targets = _linear_targets(input, linear_weight, target, weight, o)
    factors, spoilt = _upstream(upstream, targets.total())
    reduction = "none" if o.reduction == "none" else "sum"
    _, arrays = _linear_pass(input, linear_weight, linear_bias, targets, reduction, chunk_rows, wrt, factors)
    if spoilt is not None:  # a sum over rows of which one has no finite factor is not finite
        for array in arrays:
            if array is not None:
                array *= spoilt.sum().astype(array.dtype)
    return _gradients(arrays, [input, linear_weight, linear_bias], input)


def _linear_rows_shape(input: Tensor, linear_weight: Tensor, target: Tensor) -> Any:
    return input.shape[:-1] + linear_weight.shape[1:-1] if target.is_floating_point() else target.shape


# --- operators, and how calls get there -------------------------------------------------------------------------------
_transforming = getattr(torch._C, "_are_functorch_transforms_active", None)
_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)


def _is_plain(tensors: Any) -> bool:
    """Whether tensors are on the CPU and nothing watches but autograd: no compiler, transform, mode, or subclass."""
    if _transforming is None or _modes is None or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if _transforming() or _modes():
        return False
    return all(t is None or ((type(t) is torch.Tensor or type(t) is torch.nn.Parameter) and t.is_cpu) for t in tensors)


def _check_tangents(tensors: Any) -> None:
    """Forward mode works where gradients are not asked for, too; there autograd, which turns it away, is not passed."""
    forward_ad = torch.autograd.forward_ad
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise NotImplementedError("fastloss has no forward mode (jvp): use reverse mode, or PyTorch's own loss")


class _Operator:
    """A function of tensors and options as an operator of `torch.library`, and the shortest way to it.

    Parameters
    ----------
    schema : str
    compute, fake : callable
        What it does, and what shapes and strides come of it.
    save, backward : callable
        `setup_context` and `backward` of autograd.
    eager : callable, optional
        What a plain call goes to where gradients may be asked for, instead of the operator.
    """

    def __init__(
        self, schema: str, compute: Callable[..., Any], fake: Callable[..., Any], save: Callable[..., Any],
        backward: Callable[..., Any], eager: Callable[..., Any] | None = None,
    ) -> None:  # fmt: skip
        name = "fastloss::" + compute.__name__.lstrip("_")
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        torch.library.impl(name, "cpu")(compute)
        torch.library.register_fake(name)(fake)
        torch.library.register_autograd(name, backward, setup_context=save)
        self._compute, self._eager = compute, eager
        self._n_tensors = schema.count("Tensor", 0, schema.index("str kind"))
        namespace = torch.ops.fastloss
        self.op = getattr(namespace, compute.__name__.lstrip("_")).default
        members = {
            "forward": staticmethod(self.op),
            "setup_context": staticmethod(save),
            "backward": staticmethod(backward),
            "generate_vmap_rule": True,
        }
        self._transformable = type(compute.__name__, (torch.autograd.Function,), members)

    def __call__(self, *arguments: Any) -> Any:
        tensors = arguments[: self._n_tensors]
        if _is_plain(tensors):
            if not torch.is_grad_enabled():
                _check_tangents(tensors)
                return self._compute(*arguments)
            if self._eager is not None:
                return self._eager(*arguments)
        elif _transforming is not None and not torch.compiler.is_compiling() and _transforming():
            return self._transformable.apply(*arguments)  # type: ignore[attr-defined]
        return self.op(*arguments)


def _save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _no_second_derivative(ctx: Any, *upstream: Any) -> Any:
    raise RuntimeError(
        "fastloss has no second derivatives of its losses: the gradient cannot be differentiated again (it was made "
        "with create_graph=True, or within torch.func); for that use the loss of torch.nn.functional"
    )


def _fake_scores_loss(input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
    *rest, wide = options
    shape = _rows_shape(input, target) if _Options(*rest).reduction == "none" else ()
    return input.new_empty(shape, dtype=torch.float32 if wide else input.dtype)


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
        target_gradient = _target_gradient(upstream, input, target, weight, _Options(*options))
    return gradient, target_gradient, *(None,) * (1 + len(ctx.options))


def _target_gradient(upstream: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, o: _Options) -> Tensor:
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
        if one_pass and ctx.needs_input_grad[0]:
            loss, ctx.gradient = _loss_and_gradient(input, target, options)
            return loss
        return _scores_loss(input, target, weight, *options)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        gradient, ctx.gradient = ctx.gradient, None  # its own, to scale and give away: a second pass computes a new one
        if gradient is not None and not torch.is_grad_enabled():
            factor = upstream.item()
            if factor == 1:
                return gradient, None, None, None
            if gradient.dtype.itemsize > 2:
                return gradient.mul_(factor), None, None, None
        del gradient  # 16-bit floats are rounded once
        return *_scores_backward(ctx, upstream)[:3], None


scores_gradient = _Operator(
    f"(Tensor upstream, Tensor input, Tensor target, Tensor? weight, {_SCHEMA}) -> Tensor",
    _scores_gradient,
    lambda upstream, input, *rest: torch.empty_like(input),
    _save_nothing,
    _no_second_derivative,
)
scores_loss = _Operator(
    f"(Tensor input, Tensor target, Tensor? weight, {_SCHEMA}, bool wide) -> Tensor",
    _scores_loss,
    _fake_scores_loss,
    _save_scores,
    _scores_backward,
    lambda input, target, weight, *options: _EagerScores.apply(input, target, weight, options),
)


def _fake_gradients(tensors: Any, wrt: Any) -> tuple[Tensor, ...]:
    empty = tensors[0].new_empty(0)
    return tuple(t.new_empty(t.shape) if wanted else empty.new_empty(0) for t, wanted in zip(tensors, wrt, strict=True))


def _fake_linear_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *rest, wide, _, wrt = options
    shape = _linear_rows_shape(input, linear_weight, target) if _Options(*rest).reduction == "none" else ()
    loss = input.new_empty(shape, dtype=torch.float32 if wide else input.dtype)
    return loss, *_fake_gradients(
        (input, linear_weight, linear_bias), wrt if _scales_later(input, options) else (False,) * 3
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
    *options, _, chunk_rows, _ = ctx.options
    wrt = _wanted(ctx)
    if torch.is_grad_enabled() or not grads or not _scales_later(tensors[0], ctx.options):
        found = linear_gradient(upstream, *tensors, *options, chunk_rows, wrt)
    else:
        found = tuple(upstream * g for g in grads)
    return _for_inputs(found, wrt, ctx.options)


def _wanted(ctx: Any) -> list[bool]:
    """Whether there is to be a gradient of input, linear_weight, linear_bias."""
    dX, dW, _, db, *_ = ctx.needs_input_grad
    return [dX, dW, db]


def _for_inputs(found: Any, wrt: list[bool], options: Any) -> tuple[Any, ...]:
    dX, dW, db = (g if wanted else None for g, wanted in zip(found, wrt, strict=True))
    return dX, dW, None, db, None, *(None,) * len(options)


class _EagerLinear(torch.autograd.Function):  # type: ignore[misc]
    """The gradients are the backward pass's own, to scale and give away: a second one computes new ones."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        _save_linear(ctx, arguments, None)
        loss, *ctx.gradients = _linear_loss(*arguments)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        found, ctx.gradients = ctx.gradients, None
        *options, _, chunk_rows, _ = ctx.options
        wrt = _wanted(ctx)
        tensors = ctx.saved_tensors
        if torch.is_grad_enabled() or found is None or not _scales_later(tensors[0], ctx.options):
            found = linear_gradient(upstream, *tensors, *options, chunk_rows, wrt)
        elif (factor := upstream.item()) != 1:
            for gradient in found:
                gradient *= factor
        return _for_inputs(found, wrt, ctx.options)


_LAYER = "Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight"
linear_gradient = _Operator(
    f"(Tensor upstream, {_LAYER}, {_SCHEMA}, int? chunk_rows, bool[] wrt) -> (Tensor, Tensor, Tensor)",
    _linear_gradient,
    _fake_linear_gradient,
    _save_nothing,
    _no_second_derivative,
)
linear_loss = _Operator(
    f"({_LAYER}, {_SCHEMA}, bool wide, int? chunk_rows, bool[] wrt) -> (Tensor, Tensor, Tensor, Tensor)",
    _linear_loss,
    _fake_linear_loss,
    _save_linear,
    _linear_backward,
    lambda *arguments: (_EagerLinear.apply(*arguments),),
)


# --- what users call --------------------------------------------------------------------------------------------------
def _reduction(reduction: str, size_average: bool | None, reduce: bool | None) -> str:
    if size_average is not None or reduce is not None:
        wanted = "none" if reduce is False else "sum" if size_average is False else "mean"
        warnings.warn(
            f'size_average and reduce are deprecated, here as in PyTorch: use reduction="{wanted}"', UserWarning,
            stacklevel=3,
        )  # fmt: skip
        return wanted
    checks.one_of(reduction, "reduction", checks.REDUCTIONS)
    return reduction


def _check_tensors(**tensors: Tensor | None) -> None:
    """Raise for what is no tensor, of no type of floats, or not on the CPU."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; it must be a tensor")
        if tensor.device.type not in ("cpu", "meta"):
            raise ValueError(
                f"{name} is on {tensor.device}; fastloss has no kernels for it yet and computes on the CPU: use "
                f"{name}.cpu(), or the loss of torch.nn.functional there"
            )
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


def _check_weight(weight: Tensor | None, n_classes: int) -> None:
    if weight is not None and weight.shape != (n_classes,):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be ({n_classes},), a number for each class")
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight requires a gradient, which these losses do not have: use weight.detach()")


def _entropy_options(target: Tensor, ignore_index: int | None, label_smoothing: float, reduction: str) -> _Options:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing!r}; it must be a number from 0 to 1")
    if target.is_floating_point():
        if ignore_index is not None and ignore_index >= 0:
            raise ValueError(
                f"ignore_index is {ignore_index}; it has no meaning for targets that are class probabilities"
            )
        ignore_index = None
    return _Options("softmax", 1, 1.0, float(label_smoothing), ignore_index, reduction)


def _hinge_options(p: int, margin: float, reduction: str) -> _Options:
    checks.one_of(p, "p", (1, 2))
    if not -math.inf < margin < math.inf:  # in words that torch.compile knows
        raise ValueError(f"margin is {margin!r}; it must be a finite number")
    return _Options("hinge", int(p), float(margin), reduction=reduction)


def _is_wide(input: Tensor) -> bool:
    """Whether the loss is float32 because of autocast, as PyTorch's losses are."""
    return bool(input.dtype.itemsize == 2 and torch.is_autocast_enabled("cpu"))


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
    """`torch.nn.functional.cross_entropy` on the CPU: the softmax cross-entropy of scores.

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
    tensor of input's dtype; float32 for 16-bit scores under autocast

    Raises
    ------
    IndexError
        For a class outside [0, C), with its place.
    ValueError, TypeError
        For arguments that do not fit, and for tensors that are not on the CPU.

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
    reduction = _reduction(reduction, size_average, reduce)
    _check_tensors(input=input, target=target, weight=weight)
    shape = input.shape
    axis = 1 if len(shape) > 1 else 0
    if not shape or shape[axis] == 0:
        raise _no_scores(input)
    _check_target(target, shape[:axis] + shape[axis + 1 :], shape, True)
    _check_weight(weight, shape[axis])
    options = _entropy_options(target, ignore_index, label_smoothing, reduction)
    return scores_loss(input, target, weight, *options, _is_wide(input))


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
    """`torch.nn.functional.multi_margin_loss` on the CPU: `Σ_j max(0, margin − s_y + s_j)^p / C`, over j ≠ y.

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
    reduction = _reduction(reduction, size_average, reduce)
    _check_tensors(input=input, target=target, weight=weight)
    shape = input.shape
    if len(shape) > 2:
        raise ValueError(f"input has shape {tuple(shape)}; it must be (C,) or (N, C)")
    if 0 in shape[-1:]:
        raise _no_scores(input)
    batch = shape[:-1]
    _check_target(target, target.shape if target.shape == (1,) and not batch else batch, shape, False)
    _check_weight(weight, shape[-1] if shape else 1)
    return scores_loss(input, target, weight, *_hinge_options(p, margin, reduction), _is_wide(input))


def _layer_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None,
    options: _Options, chunk_rows: int | None,
) -> Tensor:  # fmt: skip
    """Of a layer whose tensors have been checked."""
    wrt = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (input, linear_weight, linear_bias)]
    if target.requires_grad:
        raise ValueError(
            "target requires a gradient, which the losses of a linear layer do not have: use target.detach(), or the "
            "loss of the scores"
        )
    if _transforming is not None and not torch.compiler.is_compiling() and _transforming():
        wrt = [False] * 3  # there the backward pass computes them
    arguments = (input, linear_weight, target, linear_bias, weight, *options, _is_wide(input), chunk_rows, wrt)
    return linear_loss(*arguments)[0]


def _check_layer(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None,
    probabilities: bool,
) -> None:  # fmt: skip
    _check_tensors(input=input, linear_weight=linear_weight, target=target, linear_bias=linear_bias, weight=weight)
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
    if len(dtypes) > 1 and (torch.float64 in dtypes or not torch.is_autocast_enabled("cpu")):
        raise TypeError(
            f"input, linear_weight and linear_bias are {', '.join(sorted(map(str, dtypes)))}; they must have one dtype "
            "(under autocast 16-bit floats go with float32)"
        )
    classes, batch = linear_weight.shape[:1], input.shape[:-1]
    _check_target(target, batch + many, batch + classes + many, probabilities)
    _check_weight(weight, classes[0])


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
    """`torch.nn.functional.linear_cross_entropy` on the CPU: of the scores `input @ linear_weight.T + linear_bias`.

    The scores are never held as a whole, whatever the options. Computed in float32 at least, under autocast too.

    Parameters
    ----------
    input : tensor (D,) or (N, D)
    linear_weight : tensor (C, D), or (C, d1, ..., D) for a K-dimensional loss
    target : tensor
        Class indices of any integer type, (), (N,) or (N, d1, ...); or probabilities (C,), (N, C) or (N, C, d1, ...),
        which have no gradient here.
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
    reduction = _reduction(reduction, None, None)
    _check_layer(input, linear_weight, target, linear_bias, weight, True)
    if ignore_index is None:
        ignore_index = DEFAULT_IGNORED
    entropy = _entropy_options(target, ignore_index, label_smoothing, reduction)
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
    reduction = _reduction(reduction, None, None)
    _check_layer(input, linear_weight, target, linear_bias, weight, False)
    hinge = _hinge_options(p, margin, reduction)
    return _layer_loss(input, linear_weight, target, linear_bias, weight, hinge, None)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):  # type: ignore[misc]
    """`torch.nn.CrossEntropyLoss` on the CPU, by `cross_entropy`: the same arguments.

    Examples
    --------
    >>> import torch
    >>> from fastloss.adapters.torch import CrossEntropyLoss
    >>> round(CrossEntropyLoss()(torch.zeros(2, 10), torch.tensor([3, 9])).item(), 4)
    2.3026
    """

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

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return multi_margin_loss(input, target, self.p, self.margin, self.weight, reduction=self.reduction)


class _LinearLoss(torch.nn.Module):  # type: ignore[misc]
    """A linear layer and the loss of its scores, with the state of `torch.nn.LinearCrossEntropyLoss`."""

    def __init__(
        self, in_features: int, num_classes: int, out_features: tuple[int, ...], bias: bool, device: Any, dtype: Any,
        weight: Tensor | None, reduction: str,
    ) -> None:  # fmt: skip
        super().__init__()
        _check_tensors(weight=weight)
        _check_weight(weight, num_classes)
        self.register_buffer("weight", weight)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.reduction = _reduction(reduction, None, None)
        outputs = math.prod(self.out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)

    def _layer(self) -> tuple[Tensor, Tensor | None]:
        """Weight (C, d1, ..., D) and bias."""
        shape, bias = (self.num_classes, *self.out_features), self.linear.bias
        return self.linear.weight.reshape(*shape, -1), None if bias is None else bias.reshape(shape)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, reduction={self.reduction!r}"


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
        options = _hinge_options(p, margin, reduction)
        self.p, self.margin = options.p, options.margin

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        linear_weight, linear_bias = self._layer()
        return linear_multi_margin_loss(
            input, linear_weight, target, linear_bias=linear_bias, p=self.p, margin=self.margin, weight=self.weight,
            reduction=self.reduction,
        )  # fmt: skip
