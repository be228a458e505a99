"""Calls with arrays on a GPU: the checks and the meaning of `fastloss.driver`, on the caller's stream, without waiting.

What a host would have to wait for to check (targets, probabilities, weights on the GPU) is looked at by the kernels:
bad rows give NaN, and the error is raised by the next call, by `fastloss.synchronize()`, or by `check=True`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from fastloss import _checks as checks
from fastloss import driver
from fastloss.backends import Backend, BackendError
from fastloss.gpu import arrays, device, scores
from fastloss.gpu.arrays import View
from fastloss.jit import rowmath

_BACKEND = Backend()  # its checks of host arrays


def require() -> None:
    """Raise `BackendError` unless kernels can run here."""
    reason = device.why_not()
    if reason is not None:
        raise BackendError(f"arrays on a GPU need the backend 'cuda', which is not available: {reason}")


# --- errors that are found on the GPU --------------------------------------------------------------------------------
@functools.cache
def errors(gpu: int) -> tuple[Any, Any]:
    """The words in which kernels say what is wrong, as an array and as a pointer."""
    return device.mapped_words(4)


def raise_errors(gpu: int) -> None:
    """Raise what an earlier call found to be wrong, once. Does not wait."""
    words, _ = errors(gpu)
    code = int(words[0])
    if code == scores.NOTHING:
        return
    row, value, classes = map(int, words[1:])
    words[0] = scores.NOTHING
    late = " (found on the GPU, by this call or an earlier one; its rows are NaN)"
    if code == scores.BAD_TARGET:
        what = "1 class (0 only)" if classes == 1 else f"{classes} classes (0 to {classes - 1})"
        raise ValueError(f"targets[{row}] is {value}, but scores have {what}{late}")
    if code == scores.BAD_STATS:
        must = f"; the shards must have {classes} classes, as class_weight has" if classes else ""
        raise ValueError(
            f"targets[{row}] is {value}, and the stats of this row do not fit: the target must be a class of one of "
            f"the shards that are merged, of stats of this loss{must}{late}"
        )
    if code == scores.BAD_PROBABILITY:
        what = "is not finite, or negative (Logistic: or above 1)"
        raise ValueError(f"a probability of targets[{row}] {what}; it must be finite and not negative{late}")
    raise ValueError(f"sample_weight[{row}] is not finite, or negative; it must be finite and not negative{late}")


def synchronize() -> None:
    """Wait for the GPU that this thread works on, and raise what calls found there."""
    if device.why_not() is None:
        device.synchronize()
        raise_errors(device.current_gpu())


# --- arguments -------------------------------------------------------------------------------------------------------
def _scores(value: Any) -> View:
    view = arrays.view(value, "scores")
    if view.dtype not in device.REAL:
        raise TypeError(
            f"scores has dtype {view.dtype}; on a GPU it must be float16, bfloat16, float32 or float64"
        )
    return view


def _on_gpu(value: Any, name: str, like: View) -> View:
    view = arrays.view(value, name)
    if view.gpu != like.gpu:
        raise ValueError(f"{name} is on GPU {view.gpu}, but scores are on GPU {like.gpu}")
    return view


def _vector(value: Any, name: str, like: View, n: int, of: str) -> View:
    view = _on_gpu(value, name, like)
    if view.shape != (n,):
        raise ValueError(f"{name} has shape {view.shape}; it must be ({n},): one for each {of}")
    if view.dtype not in device.SIZES:
        raise TypeError(f"{name} has dtype {view.dtype}; it must hold real numbers")
    return view.contiguous()


def _targets(value: Any, like: View, loss: Any, n: int, c: int) -> View:
    """Class indices, or probabilities, as `checks.targets` takes them; those of the host are checked at once."""
    if not arrays.is_device(value):
        array = checks.targets(value, n, c)
        if array.ndim == 2:
            loss.check_probabilities()
            array = array.astype(device.REAL[like.dtype], copy=False)
        driver.check_range(_BACKEND, loss, array, c)
        return like.from_host(np.ascontiguousarray(array))
    view = _on_gpu(value, "targets", like)
    is_float = view.dtype in device.REAL
    if view.ndim == 2 and (is_float or view.shape == (n, c)):
        if view.shape != (n, c):
            checks.raise_shape_of_targets(view.shape, n, c)
        loss.check_probabilities()
        if view.dtype != device.REAL[like.dtype]:
            raise TypeError(
                f"targets has dtype {view.dtype}; class probabilities on a GPU must be {device.REAL[like.dtype]}, "
                "which the loss is computed in"
            )
    elif view.shape != (n,):
        raise ValueError(f"targets has shape {view.shape}; it must be ({n},), a class for each row")
    elif is_float or view.dtype not in device.SIZES:
        raise TypeError(f"targets has dtype {view.dtype}; class indices must be integers")
    return view.contiguous()


def upstream_of(
    upstream: Any, reduction: str, like: View, n: int, real: str, of: str
) -> tuple[float, View | None]:
    """The gradient's factor, or one for each row."""
    if arrays.is_device(upstream):
        if reduction != "none":
            raise ValueError(f'upstream is an array on the GPU; with reduction="{reduction}" it must be a number')
        pulled = _vector(upstream, "upstream", like, n, of)
        if pulled.dtype != real:
            raise TypeError(f"upstream has dtype {pulled.dtype}; on a GPU it must be {real}")
        return 1.0, pulled
    if upstream is None:
        return 1.0, None
    checked = driver.check_upstream(upstream, reduction, n)
    if isinstance(checked, np.ndarray):
        return 1.0, like.from_host(checked.astype(real))
    return checked, None


def _out(out: Any, like: View, shape: tuple[int, ...], inputs: dict[str, View | None], in_place: bool) -> View:
    """An array given for a result: `checks.out` and `checks.apart`."""
    if not arrays.is_device(out):
        raise TypeError(f"out is {type(out).__name__}; it must be an array on the GPU, as scores are")
    view = _on_gpu(out, "out", like)
    if view.shape != shape or view.dtype != like.dtype:
        raise ValueError(
            f"out has shape {view.shape} and dtype {view.dtype}; it must have {shape} and {like.dtype}"
        )
    for name, other in inputs.items():
        if other is not None and view.overlaps(other) and not (name == "scores" and in_place and view.is_same(other)):
            hint = "; it may be scores itself, or share nothing with it" if name == "scores" and in_place else ""
            raise ValueError(f"out overlaps {name}{hint}")
    return view


def _index_kind(view: View) -> int:
    """What `device.load_index` calls the type of class indices."""
    size = device.SIZES[view.dtype]
    return -size if view.dtype.startswith("u") else size


def _lead(view: View) -> int:
    """How many numbers an array begins after a multiple of 16 bytes."""
    return view.address() % device.WIDE // device.SIZES[view.dtype]


# --- what is kept ----------------------------------------------------------------------------------------------------
def options(loss: Any, plan: rowmath.Plan, c: int, dtype: str, gpu: int) -> Any:
    """A pointer to the options of a loss on a GPU: numbers, then class weights or margins of class pairs."""
    kept: dict[Any, device.Buffer] = loss.__dict__.setdefault("_on_gpu", {})
    key = plan, c, dtype, gpu
    found = kept.get(key)
    if found is None:
        real = np.dtype(device.REAL[dtype])
        table, numbers = rowmath.table_of(loss, c, plan), rowmath.numbers_of(loss, c, real.type)
        every = numbers if table is None else np.concatenate([numbers, table])
        found = kept[key] = device.Buffer(every.astype(real))
    return found.pointer


def _class_weight(loss: Any, gpu: int) -> Any:
    kept: dict[Any, device.Buffer] = loss.__dict__.setdefault("_on_gpu", {})
    if ("class_weight", gpu) not in kept:
        kept["class_weight", gpu] = device.Buffer(np.asarray(loss.class_weight, np.float64))
    return kept["class_weight", gpu].pointer


@functools.cache
def _zeros(gpu: int, dtype: str) -> device.Buffer:
    return device.Buffer(np.zeros(16, dtype))


def nothing(gpu: int, dtype: str) -> Any:
    """A pointer where none is needed: to a few zeros, which are kept, as kernels may read them (a transform's options).
    """
    return _zeros(gpu, dtype).pointer


def _ignored(loss: Any, targets: View) -> int:
    """The target to ignore, as kernels read one: its 64 bits, whatever their sign."""
    number = int(loss.ignore_index)
    return number - (1 << 64) if targets.dtype == "uint64" and number >= 1 << 63 else number


def _weigh(
    loss: Any, targets: View, weight: View | None, n: int, c: int, gpu: int, stream: int
) -> tuple[Any, Any]:
    """Pointers to the row multipliers and to their sum (what a mean divides by); see `driver.fold`."""
    indices = targets.ndim == 1
    has_classes = indices and loss.class_weight is not None
    ignores = indices and loss.ignore_index is not None
    workspace = device.workspace(gpu, stream)
    weights, total = workspace.get("weights", n, np.float64), workspace.get("total", 1, np.float64)
    threads = min(256, device.limits().most_threads)
    blocks = max(1, min(-(-n // threads), 4 * device.limits().multiprocessors))
    kernel = scores.weigh_kernel(
        "float64" if weight is None else weight.dtype, has_classes, ignores, weight is not None,
        has_classes and loss.weighs_inside(False),
    )  # fmt: skip
    kernel.launch(
        blocks, threads, device.SCRATCH * scores.WIDTH * 8, stream, n, loss.labels(c),
        targets.pointer if indices else nothing(gpu, "uint8"), _index_kind(targets) if indices else 1,
        _ignored(loss, targets) if ignores else 0, _class_weight(loss, gpu) if has_classes else nothing(gpu, "float64"),
        nothing(gpu, "float64") if weight is None else weight.pointer, weights,
        workspace.get("sums", blocks, np.float64), workspace.words(), errors(gpu)[1], total, blocks, threads,
    )  # fmt: skip
    return weights, total


# --- calls -----------------------------------------------------------------------------------------------------------
def scores_call(
    loss: Any, given: Any, targets: Any, want_grad: bool, out: Any, sample_weight: Any, reduction: str, upstream: Any,
    outputs: tuple[str, ...], check: bool,
) -> tuple[Any, Any, dict[str, Any]]:  # fmt: skip
    """`fastloss.driver.scores_call` for scores on a GPU: values are arrays there, of the caller's kind."""
    require()
    checks.one_of(reduction, "reduction", checks.REDUCTIONS)
    s = _scores(given)
    if s.ndim != 2 or s.shape[1] == 0:
        raise ValueError(
            f"scores has shape {s.shape}; it must be (N, C): a row of C class scores for each of N examples"
        )
    with device.on(s.gpu):
        raise_errors(s.gpu)
        n, c = s.shape
        y = _targets(targets, s, loss, n, c)
        loss.check_classes(c, y.ndim == 2)
        if outputs:
            driver.check_outputs(loss, outputs)
        real = device.REAL[s.dtype]
        weight: View | None = None
        if arrays.is_device(sample_weight):
            weight = _vector(sample_weight, "sample_weight", s, n, "row of scores")
        elif sample_weight is not None:
            weight = s.from_host(checks.weights(sample_weight, "sample_weight", n, "row of scores"))
        factor, pulled = upstream_of(upstream, reduction, s, n, real, "row of scores")
        target: View | None = None
        if out is not None:
            inputs = {"scores": s, "targets": y, "sample_weight": weight, "upstream": pulled}
            target = _out(out, s, s.shape, inputs, True)
        if n == 0:
            return _empty(s, loss, want_grad, target, reduction, outputs, real)
        return _run(loss, s, y, want_grad, target, weight, reduction, factor, pulled, outputs, real, check)


def _empty(
    s: View, loss: Any, want_grad: bool, target: View | None, reduction: str, outputs: tuple[str, ...], real: str
) -> tuple[Any, Any, dict[str, Any]]:
    """No rows: nothing to launch."""
    extras = {name: s.empty((0,), "int64" if name == "argmax" else real).owner for name in outputs}
    if reduction == "none":
        value = s.empty((0,), real).owner
    else:
        value = s.from_host(np.array(math.nan if reduction == "mean" else 0.0)).owner
    grad = None
    if want_grad:
        grad = s.empty(s.shape, s.dtype).owner if target is None else target.owner
    return value, grad, extras


def _run(
    loss: Any, s: View, y: View, want_grad: bool, target: View | None, weight: View | None, reduction: str,
    factor: float, pulled: View | None, outputs: tuple[str, ...], real: str, check: bool,
) -> tuple[Any, Any, dict[str, Any]]:  # fmt: skip
    n, c = s.shape
    gpu, stream, work = s.gpu, s.stream, s.contiguous()
    probabilities = y.ndim == 2
    row = rowmath.plan_of(loss, probabilities, z="lse" in outputs, entropy="entropy" in outputs)
    plan = scores.Plan(row, s.dtype, "argmax" in outputs)
    flags, none = 0, functools.partial(nothing, gpu)
    grad = None
    if want_grad:
        flags |= scores.GRADIENT
        grad = target if target is not None and target.is_contiguous else s.empty(s.shape, s.dtype)
    weights, total = none("float64"), none("float64")
    if weight is not None or (not probabilities and (loss.class_weight is not None or loss.ignore_index is not None)):
        weights, total = _weigh(loss, y, weight, n, c, gpu, stream)
        flags |= scores.WEIGHTED
        if reduction == "mean":
            flags |= scores.SHARED_TOTAL
    mean = 1.0 / n if reduction == "mean" and not flags & scores.SHARED_TOTAL else 1.0
    values = value = None
    if reduction == "none":
        values = s.empty((n,), real)
        flags |= scores.VALUES
    else:
        value = s.empty((), "float64")
        flags |= scores.WRITES_VALUE
    extras: dict[str, Any] = {}
    rows_of = [name for name in ("row_loss", "lse", "entropy") if name in outputs]
    extra = None
    if rows_of:
        extra = s.empty((3, n), real)
        for k, name in enumerate(("row_loss", "lse", "entropy")):
            if name in outputs:
                extras[name] = extra.owner[k]
                flags |= scores.ROW_LOSS << k
    index = None
    if plan.argmax:
        index = s.empty((n,), "int64")
        extras["argmax"] = index.owner
        flags |= scores.ARGMAX
    if pulled is not None:
        flags |= scores.PULLED
    arguments = scores.Arguments(
        work.pointer, work.pointer if grad is None else grad.pointer, _lead(work), 0 if grad is None else _lead(grad),
        n, c, none("uint8") if probabilities else y.pointer, 1 if probabilities else _index_kind(y),
        y.pointer if probabilities else none(real), options(loss, row, c, s.dtype, gpu), weights,
        none(real) if pulled is None else pulled.pointer, total, factor * mean, mean,
        none("float64") if value is None else value.pointer, none(real) if values is None else values.pointer,
        none(real) if extra is None else extra.pointer, none("int64") if index is None else index.pointer, flags,
    )  # fmt: skip
    scores.launch(plan, arguments, gpu, stream, errors(gpu)[1])
    if grad is not None and target is not None and grad is not target:
        target.assign(grad)
        grad = target
    if check:
        device.synchronize()
        raise_errors(gpu)
    result = values if values is not None else value
    assert result is not None
    return result.owner, None if grad is None else grad.owner, extras


TRANSFORMS = {"softmax": "p", "log_softmax": "log p", "logsumexp": "lse", "sigmoid": "sigmoid"}


def transform_call(kind: str, given: Any, out: Any) -> Any:
    """`fastloss.driver.transform_call` for scores on a GPU."""
    require()
    s = _scores(given)
    if s.ndim == 0 or s.shape[-1] == 0:
        raise ValueError(f"scores has shape {s.shape}; it must be (N, C) with at least one class along the last axis")
    shape = s.shape[:-1] if kind == "logsumexp" else s.shape
    with device.on(s.gpu):
        raise_errors(s.gpu)
        target = None if out is None else _out(out, s, shape, {"scores": s}, kind != "logsumexp")
        n, c = math.prod(s.shape[:-1]), s.shape[-1]
        result = target if target is not None and target.is_contiguous else s.empty(shape, s.dtype)
        if n:
            gpu, work = s.gpu, s.contiguous()
            real, none = device.REAL[s.dtype], functools.partial(nothing, gpu)
            plan = scores.Plan(rowmath.Plan(TRANSFORMS[kind]), s.dtype)
            arguments = scores.Arguments(
                work.pointer, result.pointer, _lead(work), _lead(result), n, c, none("uint8"), 1, none(real),
                none(real), none("float64"), none(real), none("float64"), 1.0, 1.0, none("float64"),
                none(real), none(real), none("int64"), scores.GRADIENT,
            )  # fmt: skip
            scores.launch(plan, arguments, gpu, s.stream, errors(gpu)[1])
        if target is not None and result is not target:
            target.assign(result)
            result = target
        return result.owner
