"""optax's multiclass losses for JAX arrays on the CPU, computed by fastloss; and `linear_cross_entropy`.

Import from here in place of optax: signatures, shapes and dtypes are optax's, and the functions work under `jit`,
`grad`, `vmap` and their combinations. The losses of given scores also have forward mode and second derivatives (these
are computed by XLA). Where results differ, on purpose:

- a class index outside `[0, C)` is an error that names its position (optax: NaN, or counted from the end), but for rows
  that `where` leaves out;
- so is a probability that is negative or not finite (optax computes with it);
- probability 0 times a score of −inf is 0 (optax: NaN), and a target that `where` leaves out gives +inf (optax: its
  score still counts);
- at ties and kinks `multiclass_hinge_loss` takes one class's gradient: the lowest index, and none at the kink itself
  (optax: shares);
- gradients of confident rows are accurate: the target's entry is −Σ of the others' probabilities, not p − 1.

XLA calls fastloss by its foreign function interface, on a thread of its own: `fastloss.use_backend` does not reach
there, `FASTLOSS_BACKEND` and `fastloss.set_num_threads` do. Errors that depend on the values of arrays come when XLA
has found them, where JAX waits for the result: as `jax.errors.JaxRuntimeError`, or as the ValueError that it was.
There is a handler for the CPU alone; XLA refuses to compile for other devices.

Examples
--------
>>> import jax, jax.numpy as jnp
>>> from fastloss.adapters.jax import softmax_cross_entropy_with_integer_labels
>>> logits, labels = jnp.zeros((4, 10)), jnp.arange(4)
>>> def loss(logits):
...     return softmax_cross_entropy_with_integer_labels(logits, labels).mean()
>>> value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
>>> print(f"{value:.4f}", gradient.shape)
2.3026 (4, 10)
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from typing import Any

import numpy as np

import fastloss as fl
from fastloss import _checks as checks
from fastloss._checks import Array

try:
    jax: Any = import_module("jax")
    ffi: Any = import_module("jax.ffi")
except ImportError as error:
    raise ImportError(f'fastloss.adapters.jax needs JAX 0.5 or later ({error}): pip install "fastloss[jax]"') from error
from fastloss.adapters import _xla

jnp: Any = import_module("jax.numpy")
SymbolicZero: Any = import_module("jax.custom_derivatives").SymbolicZero

__all__ = [
    "linear_cross_entropy",
    "multiclass_hinge_loss",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
]

TARGET = "fastloss"
#: Dimensions of each operand and result of a call, before those that vmap adds in front.
DIMENSIONS = {"scores": 2, "targets": 1, "probabilities": 2, "keep": 1, "X": 2, "W": 2, "b": 1}


# --- within XLA: NumPy only ----------------------------------------------------------------------------------------
def _describe(loss: fl.Loss) -> list[Any]:
    given = {f.name: getattr(loss, f.name) for f in fields(loss) if f.init}
    return [type(loss).__name__, {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in given.items()}]


@functools.lru_cache(maxsize=64)
def _read(text: str) -> tuple[fl.Loss, str, tuple[str, ...], tuple[str, ...]]:
    """What a call is: the loss, its reduction, its operands and the gradients that it gives."""
    (kind, options), reduction, operands, wrt = json.loads(text)
    losses: dict[str, type[fl.Loss]] = {"Softmax": fl.Softmax, "Hinge": fl.Hinge}
    return losses[kind](**options), reduction, tuple(operands), tuple(wrt)


def _compute(text: str, inputs: list[Array], outputs: list[Array]) -> None:
    """Serve a call: value, then gradients, into `outputs`."""
    loss, reduction, names, wrt = _read(text)
    operands = dict(zip(names, inputs, strict=True))
    try:
        _serve(loss, reduction, operands, wrt, outputs)
    except ValueError as error:  # of what only the numbers tell: all else was checked before XLA was asked
        raise ValueError(f"labels: {error}") from None


def _serve(
    loss: fl.Loss, reduction: str, operands: dict[str, Array], wrt: tuple[str, ...], outputs: list[Array]
) -> None:
    if "upstream" in operands:
        _pull(loss, reduction, operands, dict(zip(wrt, outputs, strict=True)))
    elif "scores" in operands:
        _row_values(loss, operands, *outputs)
    else:
        value, grads = outputs[0], dict(zip(wrt, outputs[1:], strict=True))
        for at, given in _each(operands, value.shape[: value.ndim - (reduction == "none")]):
            value[at], found = _linear(loss, reduction, given, wrt)
            for name in wrt:
                grads[name][at] = found[name]


def _targets(targets: Array, keep: Array | None) -> Array:
    """Class indices; those of rows left out do not matter, and are not checked."""
    return targets if keep is None else np.where(keep, targets, 0)


def _row_values(loss: fl.Loss, operands: dict[str, Array], value: Array, grad: Array | None = None) -> None:
    """Losses of scores: dimensions that vmap added are more rows, of one call."""
    rows, c = value.size, operands["scores"].shape[-1]
    flat = {}
    for name, array in operands.items():
        core = (c,) if DIMENSIONS[name] == 2 else ()
        flat[name] = np.broadcast_to(array, value.shape + core).reshape((rows, *core))
    scores, keep = flat["scores"], flat.get("keep")
    targets = flat["probabilities"] if "probabilities" in flat else _targets(flat["targets"], keep)
    if grad is None:
        found = loss.value(scores, targets, sample_weight=keep, reduction="none")
    else:
        out = grad.reshape(rows, c)
        found, _ = loss.value_and_grad(scores, targets, sample_weight=keep, reduction="none", out=out)
    value[...] = found.reshape(value.shape)


def _each(operands: dict[str, Array], lead: tuple[int, ...]) -> Any:
    """Each call of those that vmap put together, as its index and its operands."""
    spread = {}
    for name, array in operands.items():
        own = array.shape[len(lead) :]
        spread[name] = np.broadcast_to(array, lead + own)
    for at in np.ndindex(lead):
        yield at, {name: array[at] for name, array in spread.items()}


def _linear(
    loss: fl.Loss, reduction: str, given: dict[str, Array], wrt: tuple[str, ...], upstream: Any = None
) -> tuple[Any, dict[str, Array]]:
    keep = given.get("keep")
    return fl.linear_value_and_grad(
        loss, given["X"], given["W"], _targets(given["targets"], keep), given.get("b"), wrt=wrt, sample_weight=keep,
        reduction=reduction, upstream=upstream,
    )  # fmt: skip


def _pull(loss: fl.Loss, reduction: str, operands: dict[str, Array], grads: dict[str, Array]) -> None:
    """The gradients of the linear layer's row losses times an upstream gradient for each row."""
    lead = next(iter(grads.values())).shape[: -DIMENSIONS[next(iter(grads))]]
    for at, given in _each(operands, lead):
        upstream = given.pop("upstream")
        found: dict[str, Any]
        if not np.isfinite(upstream).all():
            found = dict.fromkeys(grads, math.nan)
        elif upstream.size and (upstream == upstream[0]).all():  # as that of a sum or mean: one pass, not two
            _, found = _linear(loss, "sum", given, tuple(grads), upstream[0])
        else:
            _, found = _linear(loss, reduction, given, tuple(grads), upstream)
        for name, grad in grads.items():
            grad[at] = found[name]


_HANDLER = _xla.register(ffi, TARGET, _compute)


# --- calls, and their derivatives ----------------------------------------------------------------------------------
def _devices(array: Any) -> frozenset[str]:
    """The axes of devices along which an array differs, within `shard_map`."""
    kind = jax.typeof(array) if hasattr(jax, "typeof") else None
    kind = getattr(kind, "manual_axis_type", kind)  # in JAX 0.10
    found: frozenset[str] = getattr(kind, "varying", getattr(kind, "vma", frozenset()))
    return found


def _vary(array: Any, axes: frozenset[str]) -> Any:
    """The array as one that differs along these axes. Its gradient is then summed over those that are new to it."""
    new = tuple(axes - _devices(array))
    if not new:
        return array
    return jax.lax.pcast(array, new, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(array, new)


def _alike(operands: dict[str, Any]) -> dict[str, Any]:
    """The operands, all of which differ along the axes that one does: XLA's calls ask for that."""
    axes = frozenset().union(*(_devices(array) for array in operands.values() if array is not None))
    return {name: array if array is None else _vary(array, axes) for name, array in operands.items()}


def _call(
    loss: fl.Loss, reduction: str, operands: dict[str, Any], results: dict[str, tuple[tuple[int, ...], Any]]
) -> list[Any]:
    """Ask XLA for a call of `_compute`; `results` are shapes and dtypes, by name."""
    given = {name: array for name, array in operands.items() if array is not None}
    wrt = [name for name in results if name != "value"]
    text = json.dumps([_describe(loss), reduction, list(given), wrt])
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results.values()]
    found = ffi.ffi_call(TARGET, shapes, vmap_method="expand_dims")(*given.values(), call=text)
    axes = _devices(next(iter(given.values())))
    return [_vary(result, axes) for result in found]


def _named(scores: Any, targets: Any, keep: Any) -> dict[str, Any]:
    return {"scores": scores, "probabilities" if targets.ndim == 2 else "targets": targets, "keep": keep}


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rows(loss: fl.Loss, scores: Any, targets: Any, keep: Any) -> Any:
    """Row losses of scores `(N, C)`; the rows where `keep` is 0 are 0."""
    return _call(loss, "none", _named(scores, targets, keep), {"value": (scores.shape[:1], scores.dtype)})[0]


def _rows_jvp(loss: fl.Loss, primals: Any, tangents: Any) -> Any:
    scores, targets, keep = primals
    along, along_targets, _ = tangents
    value, gradient = _rows_with_gradient(loss, scores, targets, keep)
    tangent = jnp.zeros_like(value)
    if not isinstance(along, SymbolicZero):
        tangent += (gradient * along).sum(axis=-1)
    if targets.ndim == 2 and not isinstance(along_targets, SymbolicZero):
        share = -(jax.nn.log_softmax(scores) * along_targets).sum(axis=-1)
        tangent += share if keep is None else jnp.where(keep, share, 0)
    return value, tangent


_rows.defjvp(_rows_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rows_with_gradient(loss: fl.Loss, scores: Any, targets: Any, keep: Any) -> tuple[Any, Any]:
    results = {"value": (scores.shape[:1], scores.dtype), "scores": (scores.shape, scores.dtype)}
    value, gradient = _call(loss, "none", _named(scores, targets, keep), results)
    return value, gradient


def _rows_with_gradient_jvp(loss: fl.Loss, primals: Any, tangents: Any) -> Any:
    """Second derivatives, and all above: those of XLA for the same formula."""

    def both(*arguments: Any) -> Any:
        _, pull = jax.vjp(lambda scores: _formula(loss, scores, *arguments[1:]), arguments[0])
        rows = _formula(loss, *arguments)
        return rows, pull(jnp.ones_like(rows))[0]

    _, along = jax.jvp(both, primals, tangents)
    return _rows_with_gradient(loss, *primals), along


_rows_with_gradient.defjvp(_rows_with_gradient_jvp)


def _formula(loss: Any, scores: Any, targets: Any, keep: Any) -> Any:
    """The row losses by XLA's own operations."""
    if targets.ndim == 2:
        finite = jnp.where(jnp.isneginf(scores), 0, scores)  # their probability as a target is 0
        rows = targets.sum(axis=-1) * jax.nn.logsumexp(scores, axis=-1) - (targets * finite).sum(axis=-1)
    else:
        picked = jnp.take_along_axis(scores, targets[:, None], axis=-1)
        if loss.kind == "softmax":
            rows = jax.nn.logsumexp(scores, axis=-1) - picked[:, 0]
        else:
            wrong = targets[:, None] != jnp.arange(scores.shape[-1])
            terms = jnp.where(wrong, jax.nn.relu(scores - picked + loss.margin) ** loss.power, 0)
            rows = {"sum": jnp.sum, "mean": jnp.mean, "max": jnp.max}[loss.over](terms, axis=-1)
    return rows if keep is None else jnp.where(keep, rows, 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 3))
def _linear_call(loss: fl.Loss, reduction: str, operands: dict[str, Any], results: Any) -> list[Any]:
    return _call(loss, reduction, operands, dict(results))


def _linear_call_jvp(loss: fl.Loss, reduction: str, results: Any, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "linear_cross_entropy has first derivatives in reverse mode only; for others, give the scores "
        "`features @ weight.T + bias` to softmax_cross_entropy_with_integer_labels"
    )


_linear_call.defjvp(_linear_call_jvp)


def _value_result(reduction: str, operands: dict[str, Any]) -> tuple[str, tuple[tuple[int, ...], Any]]:
    X = operands["X"]
    return "value", (X.shape[:1] if reduction == "none" else (), jnp.promote_types(X.dtype, jnp.float32))


def _like(operands: dict[str, Any], names: Sequence[str]) -> tuple[tuple[str, tuple[tuple[int, ...], Any]], ...]:
    return tuple((name, (operands[name].shape, operands[name].dtype)) for name in names)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear_loss(loss: fl.Loss, reduction: str, operands: dict[str, Any]) -> Any:
    return _linear_call(loss, reduction, operands, (_value_result(reduction, operands),))[0]


def _linear_forward(loss: fl.Loss, reduction: str, primals: dict[str, Any]) -> Any:
    """A reduced loss is computed with its gradients, which backward scales; row losses keep what they came from."""
    operands = {name: primal.value for name, primal in primals.items()}
    wrt = [name for name in ("X", "W", "b") if name in primals and primals[name].perturbed]
    value = _value_result(reduction, operands)
    if reduction == "none":
        return _linear_loss(loss, reduction, operands), (dict.fromkeys(wrt), operands)
    found, *grads = _linear_call(loss, reduction, operands, (value, *_like(operands, wrt)))
    return found, (dict(zip(wrt, grads, strict=True)), dict.fromkeys(operands))


def _linear_backward(loss: fl.Loss, reduction: str, kept: Any, upstream: Any) -> tuple[dict[str, Any]]:
    grads, operands = kept
    if not isinstance(upstream, SymbolicZero) and grads:
        if reduction == "none":
            results = _like(operands, list(grads))
            found = _linear_call(loss, reduction, operands | {"upstream": upstream}, results)
            grads = dict(zip(grads, found, strict=True))
        else:
            grads = {name: (grad * upstream).astype(grad.dtype) for name, grad in grads.items()}
    return (dict.fromkeys(operands) | grads,)


_linear_loss.defvjp(_linear_forward, _linear_backward, symbolic_zeros=True)


# --- arguments -----------------------------------------------------------------------------------------------------
def _floats(value: Any, name: str) -> Any:
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.itemsize < 2:
        raise TypeError(f"{name} has dtype {array.dtype}; it must hold floats of 16 to 64 bits")
    return array


def _labels(value: Any, shape: tuple[int, ...], of: str) -> Any:
    """Class indices for scores of batch dimensions `shape`, or that these broadcast with."""
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"labels has dtype {array.dtype}; it must hold integers, a class index for each row of {of}")
    if array.ndim != len(shape) or not all(a == b or 1 in (a, b) for a, b in zip(array.shape, shape, strict=True)):
        raise ValueError(f"labels has shape {array.shape}; it must be {shape}, a class index for each row of {of}")
    return array


def _axes(axis: Any, ndim: int) -> tuple[int, ...]:
    """The class axes, from 0 on."""
    given = axis if isinstance(axis, tuple) else (axis,)
    if ndim == 0:
        raise ValueError("logits have shape (); they must have an axis of classes, (..., C)")
    if not given or not all(isinstance(a, int | np.integer) and not isinstance(a, bool) for a in given):
        raise ValueError(f"axis is {axis!r}; it must be an integer, or a tuple of integers")
    for a in given:
        if not -ndim <= a < ndim:
            raise ValueError(f"axis is {axis!r}, but logits have {ndim} dimensions ({-ndim} to {ndim - 1})")
    found = tuple(int(a) % ndim for a in given)
    if len(set(found)) < len(found):
        raise ValueError(f"axis is {axis!r}; it must name each dimension once")
    return found


def _classes_last(array: Any, axes: tuple[int, ...]) -> Any:
    """The class axes, as one, behind the others."""
    batch = tuple(k for k in range(array.ndim) if k not in axes)
    moved = array.transpose(batch + axes)
    return moved.reshape((*moved.shape[: len(batch)], math.prod(moved.shape[len(batch) :])))


def _mask(where: Any, shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[Any, Any]:
    """`where` over logits of `shape`, as a mask of classes (None where it is one of rows) and a mask of rows."""
    if where is None:
        return None, None
    mask = jnp.asarray(where).astype(bool)
    batch = tuple(n for k, n in enumerate(shape) if k not in axes)
    try:
        if mask.ndim != len(shape):
            return None, jnp.broadcast_to(mask, batch)
        classes = _classes_last(jnp.broadcast_to(mask, shape), axes)
    except ValueError:
        raise ValueError(f"where has shape {mask.shape}; it must be {batch}, or broadcast to logits {shape}") from None
    return classes, classes.any(axis=-1)


def _row_losses(loss: fl.Loss, scores: Any, targets: Any, keep: Any) -> Any:
    """Losses of scores `(..., C)`: (...)."""
    *batch, c = scores.shape
    if c == 0:
        raise ValueError(f"logits have shape {scores.shape}; there must be at least one class")
    flat = targets.reshape((-1, c) if targets.ndim == scores.ndim else -1)
    if math.prod(batch) == 0:  # then -1 is ambiguous, and there is nothing to compute
        return jnp.zeros(tuple(batch), scores.dtype)
    operands = {"scores": scores.reshape(-1, c), "targets": flat, "keep": None if keep is None else keep.reshape(-1)}
    return _rows(loss, *_alike(operands).values()).reshape(batch)


# --- the losses ----------------------------------------------------------------------------------------------------
def softmax_cross_entropy_with_integer_labels(logits: Any, labels: Any, axis: Any = -1, where: Any = None) -> Any:
    """Softmax cross-entropy of class indices: `log Σ_j exp(s_j) − s_y`; as optax's function of this name.

    Parameters
    ----------
    logits : array (..., C) of floats
        Scores.
    labels : array (...) of integers
        Class indices in `[0, C)`.
    axis : int or tuple of int
        The class axis; of several, a label is the flat index into them.
    where : array of bool, optional
        What to include: for each row (...), or for each score. Rows without any give 0, and their labels do not count.

    Returns
    -------
    array (...) of the dtype of `logits`

    Raises
    ------
    TypeError, ValueError
        For dtypes, shapes and axes that do not fit.
    ValueError, jax.errors.JaxRuntimeError
        For a label outside `[0, C)`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from fastloss.adapters import jax as fast
    >>> fast.softmax_cross_entropy_with_integer_labels(jnp.array([[3.2, 5.1, -1.7]]), jnp.array([0])).round(2).tolist()
    [2.0399999618530273]
    """
    scores = _floats(logits, "logits")
    axes = _axes(axis, scores.ndim)
    classes, keep = _mask(where, scores.shape, axes)
    scores = _classes_last(scores, axes)
    targets = _labels(labels, scores.shape[:-1], "logits")
    batch = jnp.broadcast_shapes(targets.shape, scores.shape[:-1])
    if classes is not None:
        scores = jnp.where(classes, scores, -jnp.inf)
    keep = None if keep is None else jnp.broadcast_to(keep, batch)
    scores = jnp.broadcast_to(scores, (*batch, scores.shape[-1]))
    return _row_losses(fl.Softmax(), scores, jnp.broadcast_to(targets, batch), keep)


def softmax_cross_entropy(logits: Any, labels: Any, axis: Any = -1, where: Any = None) -> Any:
    """Softmax cross-entropy of class probabilities: `−Σ_j q_j log p_j`; as optax's function of this name.

    Parameters
    ----------
    logits : array (..., C) of floats
        Scores.
    labels : array (..., C)
        Probabilities, or one-hot rows: finite and at least 0. They broadcast with `logits` and have a gradient.
    axis : int, tuple of int, or None
        The class axis or axes; None for all.
    where : array of bool, optional
        What to include: for each row (...), or for each score. Rows without any give 0.

    Returns
    -------
    array (...) of the dtype of `logits * labels`

    Raises
    ------
    TypeError, ValueError
        For dtypes, shapes and axes that do not fit.
    ValueError, jax.errors.JaxRuntimeError
        For probabilities that are negative or not finite.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from fastloss.adapters import jax as fast
    >>> fast.softmax_cross_entropy(jnp.zeros((1, 4)), jnp.array([[0.5, 0.5, 0.0, 0.0]])).round(4).tolist()
    [1.386299967765808]
    """
    scores, q = _floats(logits, "logits"), jnp.asarray(labels)
    dtype = jnp.result_type(scores, q)  # Python's numbers do not count, as in optax
    try:
        shape = jnp.broadcast_shapes(scores.shape, q.shape)
    except ValueError:
        raise ValueError(f"labels has shape {q.shape}; it must broadcast with logits {scores.shape}") from None
    scores, q = jnp.broadcast_to(scores, shape).astype(dtype), jnp.broadcast_to(q, shape).astype(dtype)
    axes = tuple(range(len(shape))) if axis is None else _axes(axis, len(shape))
    classes, keep = _mask(where, shape, axes)
    scores, q = _classes_last(scores, axes), _classes_last(q, axes)
    if classes is not None:
        scores, q = jnp.where(classes, scores, -jnp.inf), jnp.where(classes, q, 0)
    return _row_losses(fl.Softmax(), scores, q, keep)


def multiclass_hinge_loss(scores: Any, labels: Any, *, margin: float = 1.0, power: int = 1, over: str = "max") -> Any:
    """Multiclass hinge loss, `max(0, max_{j≠y} s_j − s_y + Δ)`; as optax's function of this name.

    Parameters
    ----------
    scores : array (..., C)
    labels : array (...) of integers
        Class indices in `[0, C)`.
    margin, power, over
        What optax does not have: options of `fastloss.Hinge`. The default is optax's loss.

    Returns
    -------
    array (...) of the dtype of `scores`, at least of JAX's default float

    Raises
    ------
    TypeError, ValueError
        For dtypes, shapes and options that do not fit.
    ValueError, jax.errors.JaxRuntimeError
        For a label outside `[0, C)`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from fastloss.adapters import jax as fast
    >>> fast.multiclass_hinge_loss(jnp.array([[3.0, 5.0, -1.5]]), jnp.array([0])).tolist()
    [3.0]
    """
    loss = fl.Hinge(margin=margin, power=power, over=over)
    array = jnp.asarray(scores)
    array = array if jnp.issubdtype(array.dtype, jnp.integer) else _floats(array, "scores")
    if array.ndim == 0:
        raise ValueError("scores has shape (); it must be (..., C)")
    array = array.astype(jnp.promote_types(array.dtype, jnp.zeros(()).dtype))
    targets = _labels(labels, array.shape[:-1], "scores")
    batch = jnp.broadcast_shapes(targets.shape, array.shape[:-1])
    array = jnp.broadcast_to(array, (*batch, array.shape[-1]))
    return _row_losses(loss, array, jnp.broadcast_to(targets, batch), None)


def linear_cross_entropy(
    features: Any,
    weight: Any,
    labels: Any,
    bias: Any = None,
    *,
    reduction: str = "mean",
    where: Any = None,
    loss: fl.Softmax | None = None,
) -> Any:
    """Softmax cross-entropy of `features @ weight.T + bias`, whose scores are never held as an array.

    With a reduction the gradients are computed along with the value; row losses (`reduction="none"`) are computed
    again for their gradients. First derivatives, in reverse mode. Gradients that are not asked for are not computed.

    Parameters
    ----------
    features : array (..., D) of floats
    weight : array (C, D) of floats
        For Flax's kernel (D, C), its transpose.
    labels : array (...) of integers
        Class indices in `[0, C)`, or the loss's `ignore_index`.
    bias : array (C,) of floats, optional
    reduction : {"mean", "sum", "none"}
        A mean is over the rows that count, each by its class weight if the loss has any; over none it is NaN.
    where : array (...) of bool, optional
        The rows that count; labels of the others do not matter.
    loss : fastloss.Softmax, optional
        Its options: label smoothing, class weights, `ignore_index`, z-loss, softcap, temperature.

    Returns
    -------
    array (), or (...) for `reduction="none"`, of the dtype of `features`, at least float32

    Raises
    ------
    TypeError, ValueError
        For dtypes, shapes and options that do not fit.
    ValueError, jax.errors.JaxRuntimeError
        For a label outside `[0, C)`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from fastloss.adapters import jax as fast
    >>> features, weight, labels = jnp.ones((4, 3)), jnp.zeros((5, 3)), jnp.arange(4)
    >>> value, gradient = jax.value_and_grad(fast.linear_cross_entropy, argnums=1)(features, weight, labels)
    >>> print(f"{value:.4f}", gradient.shape)
    1.6094 (5, 3)
    """
    checks.one_of(reduction, "reduction", checks.REDUCTIONS)
    if loss is not None and not isinstance(loss, fl.Softmax):
        raise TypeError(f"loss is {loss!r}; it must be a fastloss.Softmax")
    loss = fl.Softmax() if loss is None else loss
    X, W = _floats(features, "features"), _floats(weight, "weight")
    if X.ndim == 0 or W.ndim != 2 or len(W) == 0 or W.shape[1] != X.shape[-1]:
        raise ValueError(f"weight has shape {W.shape}, features {X.shape}; they must be (C, D) and (..., D)")
    loss.check_classes(len(W))
    batch = X.shape[:-1]
    y = jnp.asarray(labels)
    if y.shape != batch:
        raise ValueError(f"labels has shape {y.shape}; it must be {batch}, a class index for each row of features")
    rows = math.prod(batch)
    operands = {"X": X.reshape(rows, X.shape[-1]), "W": W, "targets": _labels(y, batch, "features").reshape(rows)}
    if bias is not None:
        operands["b"] = b = _floats(bias, "bias")
        if b.shape != W.shape[:1]:
            raise ValueError(f"bias has shape {b.shape}; it must be {W.shape[:1]}, one for each row of weight")
    if where is not None:
        keep = jnp.asarray(where).astype(bool)
        if keep.shape != batch:
            raise ValueError(f"where has shape {keep.shape}; it must be {batch}: whether each row counts")
        operands["keep"] = keep.reshape(rows)
    value = _linear_loss(loss, reduction, _alike(operands))
    return value.reshape(batch) if reduction == "none" else value
