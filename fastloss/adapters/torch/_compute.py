"""What is computed: losses and gradients of tensors on the CPU, by fastloss's losses."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

import fastloss as fl
from fastloss._checks import Array
from fastloss.adapters.torch._arrays import Tensor, as_array, as_tensor, empty_like, scalar, torch

SMALL = 1 << 14  # scores whose gradient's memory costs less than a look at their strides
SAMPLE = 4096  # scores of a sample below which samples (N, C, d1, ...) are copied row by row, not handled one by one


class Options(NamedTuple):
    """What the operators take besides tensors, in this order."""

    kind: str
    p: int = 1
    margin: float = 1.0
    label_smoothing: float = 0.0
    ignore_index: int | None = None
    reduction: str = "mean"


SCHEMA = "str kind, int p, float margin, float label_smoothing, int? ignore_index, str reduction"


@functools.lru_cache(maxsize=256)
def plain_loss(kind: str, p: int, margin: float, label_smoothing: float, ignore_index: int | None) -> fl.Loss:
    if kind == "hinge":
        return fl.Hinge(over="mean", power=p, margin=margin)
    return fl.Softmax(label_smoothing=label_smoothing, ignore_index=ignore_index)


class _Targets:
    """The targets of all rows, and what depends on them: the loss with its options, what a mean divides by.

    rows : array (rows,) or (rows, C), a target for each row of scores
    terms : the loss, as a sum of fastloss's losses with these signs: theirs have no negative class weights
    """

    def __init__(self, target: Tensor, n_classes: int, weight: Tensor | None, options: Options) -> None:
        """target: (N, d1, ...) or (N, C, d1, ...)"""
        self._target, self._n_classes, self._options = target, n_classes, options
        self.probabilities = target.is_floating_point()
        smoothing, ignored = options.label_smoothing, 0
        if self.probabilities:
            if smoothing:
                wide = target.float() if target.dtype.itemsize == 2 else target
                target = wide * (1 - smoothing) + smoothing / n_classes
            self.rows = as_array(target.movedim(1, -1).reshape(-1, n_classes))
        else:
            self.rows = as_array(target.reshape(-1))
            if options.ignore_index is not None:
                ignored = int(np.count_nonzero(self.rows == options.ignore_index))
        loss = plain_loss(
            options.kind, options.p, options.margin, 0.0 if self.probabilities else smoothing,
            options.ignore_index if ignored else None,
        )  # fmt: skip
        self._weight = None if weight is None else as_array(weight.double())
        self.terms = [(1.0, loss)]
        if self._weight is not None:
            parts = [(1.0, np.maximum(self._weight, 0))]
            if (self._weight < 0).any():
                parts.append((-1.0, np.maximum(-self._weight, 0)))
            self.terms = [(sign, dataclasses.replace(loss, class_weight=part)) for sign, part in parts]
        self._count = len(self.rows) - ignored

    def total(self) -> float:
        """What the sum of all rows is divided by."""
        if self._options.reduction != "mean":
            return 1.0
        weights = self._weights()
        return float(self._count if weights is None else weights.sum())

    def divided(self, value: float, total: float) -> float:
        """The sum of all rows by `total`, as in IEEE arithmetic; a mean over nothing is NaN.

        PyTorch divides what label smoothing adds on its own: of targets that all have weight 0, the rest is 0 / 0.
        """
        if total:
            return value / total
        weights = self._weights()
        return value * math.inf if weights is not None and weights.any() else math.nan

    def _weights(self) -> Array | None:
        """Of the targets that count; None where a mean is over rows."""
        if self._weight is None or self._options.kind == "hinge" or self.probabilities:
            return None
        return np.asarray(self._weight[self.rows[self._kept()]])

    def _kept(self) -> Any:
        """Which rows are not ignored, as an index."""
        ignored = self._options.ignore_index
        return slice(None) if ignored is None or self.probabilities else self.rows != ignored

    def factors(self, upstream: Array) -> tuple[Array, Array | None]:
        """The gradient's factors, finite; and what each row's is to be multiplied by then (rows,), if they were not."""
        total, n_rows = self.total(), len(self.rows)
        if not total:  # PyTorch's 0 / 0, but for ignored rows, which have no gradient
            spoilt = np.ones(n_rows)
            spoilt[self._kept()] = math.nan
            return np.zeros(1), spoilt
        values = upstream if total == 1 else upstream / total
        finite = np.isfinite(values)
        if finite.all():
            return values, None
        return np.where(finite, values, 1.0), np.broadcast_to(np.where(finite, 1.0, values), n_rows)

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
        found = as_array(self._target)
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


def _factors(targets: _Targets, upstream: Tensor) -> tuple[Array, Array | None]:
    return targets.factors(as_array(upstream.double()).reshape(-1))


def _pull(factors: Array, sign: float, reduction: str) -> dict[str, Any]:
    """Arguments for a gradient with these factors. Rows with factor 0 are skipped, so that one pass does for all."""
    if reduction != "none":
        return {"reduction": "sum", "upstream": sign * float(factors[0])}
    if factors.all():
        return {"reduction": "none", "upstream": sign * factors}
    kept = factors != 0
    return {"reduction": "none", "upstream": sign * np.where(kept, factors, 1.0), "sample_weight": kept}


# --- losses of scores -----------------------------------------------------------------------------------------------
def batched(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
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
        yield as_array(matrix), slice(start, stop)
        start = stop


def scores_loss(input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
    *rest, wide = options
    o = Options(*rest)
    x, batch = batched(input, target)
    targets = _Targets(batch, x.shape[1], weight, o)
    matrices = _matrices(x) or [x.movedim(1, -1).reshape(-1, x.shape[1])]
    reduction, threads = "none" if o.reduction == "none" else "sum", _threads()
    dtype = loss_dtype(input, target, weight, wide)
    with targets.checked():
        values = [
            sum(
                sign * loss.value(scores, targets.rows[part], reduction=reduction, n_threads=threads)
                for sign, loss in targets.terms
            )
            for scores, part in _slices(matrices)
        ]
        if reduction == "none":
            return torch.from_numpy(np.concatenate(values)).to(dtype).reshape(rows_shape(input, target))
        return scalar(targets.divided(sum(values), targets.total()), dtype)


def scores_gradient(upstream: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
    o = Options(*options)
    x, batch = batched(input, target)
    targets = _Targets(batch, x.shape[1], weight, o)
    if len(targets.terms) > 1 and input.dtype.itemsize == 2:  # the difference of large terms
        return scores_gradient(upstream, input.float(), target, weight, *options).to(input.dtype)
    gradient = empty_like(input)
    out, _ = batched(gradient, target)
    scores, grads, threads = _matrices(x), _matrices(out), _threads()
    direct = scores is not None and grads is not None and len(scores) == len(grads)
    if not direct:  # in place in a copy
        rows = x.movedim(1, -1).clone(memory_format=torch.contiguous_format)
        scores = grads = [rows.view(-1, x.shape[1])]
    assert scores is not None
    assert grads is not None
    factors, spoilt = _factors(targets, upstream)
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
            g *= spoilt[part, None].astype(g.dtype)
    if not direct:
        out.movedim(1, -1).copy_(rows)
    return gradient


def loss_and_gradient(input: Tensor, target: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    """Of scores (N, C) and class indices, reduced and without class weights: in one pass.

    That no row is ignored is found in the check of the targets, which stops at the first that is no class.
    """
    kind, p, margin, label_smoothing, ignored, reduction, wide = options
    n_classes = input.shape[1]
    out = empty_like(input) if input.numel() > SMALL else None
    scores, rows = as_array(input), as_array(target)
    how = {"out": None if out is None else as_array(out), "reduction": reduction, "n_threads": _threads()}
    found = None
    if ignored is None or not 0 <= ignored < n_classes:
        try:
            found = plain_loss(kind, p, margin, label_smoothing, None).value_and_grad(scores, rows, **how)
        except ValueError:  # before anything is computed
            found = None
    if found is None:
        targets = _Targets(target, n_classes, None, Options(*options[:-1]))
        with targets.checked():
            found = targets.terms[0][1].value_and_grad(scores, rows, **how)
    value, gradient = found
    return scalar(value, torch.float32 if wide else input.dtype), as_tensor(gradient) if out is None else out


def loss_dtype(input: Tensor, target: Tensor, weight: Tensor | None, wide: bool) -> Any:
    """PyTorch multiplies by probabilities, and by their weights, without a conversion: the wider type is the loss's."""
    dtype = torch.float32 if wide else input.dtype
    if target.is_floating_point():
        for other in (target, weight):
            dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)
    return dtype


def rows_shape(input: Tensor, target: Tensor) -> Any:
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
    positions = math.prod(linear_weight.shape[1:-1])
    X: Array = as_array(input).reshape(math.prod(input.shape[:-1]), features)
    W: Array = as_array(linear_weight).reshape(classes, positions, features)
    b: Array | None = None if linear_bias is None else as_array(linear_bias).reshape(classes, positions)
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
    done: list[Array | None] = [None] * 3
    if not positions:
        for k, (name, array) in enumerate(zip("XWb", (X, W, b), strict=True)):
            if name in found and array is not None:
                done[k] = np.zeros_like(array)
        return np.zeros(0) if reduction == "none" else 0.0, done
    total = np.stack(values, axis=1).reshape(-1) if reduction == "none" else sum(values)
    for k, name in enumerate("XWb"):
        if name in found:
            terms = found[name]
            whole = terms[0] if positions == 1 else sum(terms[1:], terms[0]) if name == "X" else np.stack(terms, axis=1)
            done[k] = whole.astype(dtypes[k], copy=False)
    return total, done


def _spoil(arrays: list[Array | None], spoilt: Array | None, n_rows: int) -> None:
    """Multiply a layer's gradients by what is not finite in their rows' factors: sums over rows, all of them."""
    if spoilt is None or not len(spoilt):
        return
    grid = spoilt.reshape(n_rows, -1)  # rows, positions
    finite = np.isfinite(grid)
    of_rows, of_positions = (np.where(finite.all(axis), 1.0, grid.sum(axis)) for axis in (1, 0))
    for array, factor in zip(arrays, (of_rows[:, None], of_positions[:, None], of_positions), strict=True):
        if array is not None:
            array *= factor.astype(array.dtype)


def _gradients(arrays: list[Array | None], tensors: list[Tensor | None], empty: Tensor) -> tuple[Tensor, ...]:
    """As tensors of the shapes of what they are gradients of; empty ones for those not asked for."""
    return tuple(
        empty.new_empty(0) if array is None or tensor is None else as_tensor(array).reshape(tensor.shape)
        for array, tensor in zip(arrays, tensors, strict=True)
    )


def scales_later(input: Tensor, options: Any) -> bool:
    """Whether a layer's gradients may be computed before their upstream factor is known. Small ones in float16 would be
    0, which the factor (of a gradient scaler) is to prevent.
    """
    return bool(options[5] != "none" and input.dtype != torch.float16)


def _linear_targets(
    input: Tensor, linear_weight: Tensor, target: Tensor, weight: Tensor | None, o: Options
) -> _Targets:
    batch = target if input.dim() > 1 else target[None]
    return _Targets(batch, linear_weight.shape[0], weight, o)


def linear_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The loss, and for a reduction the gradients that `wrt` asks for: of input, linear_weight, linear_bias."""
    *rest, wide, chunk_rows, wrt = options
    o = Options(*rest)
    targets = _linear_targets(input, linear_weight, target, weight, o)
    reduction, factors, spoilt = "none" if o.reduction == "none" else "sum", None, None
    wanted = any(wrt) and scales_later(input, options)
    with targets.checked():
        total = targets.total()
        if wanted:
            factors, spoilt = targets.factors(np.ones(1))
        value, arrays = _linear_pass(
            input, linear_weight, linear_bias, targets, reduction, chunk_rows, wrt if wanted else (False,) * 3, factors
        )
    _spoil(arrays, spoilt, math.prod(input.shape[:-1]))
    dtype = loss_dtype(input, target, weight, wide)
    if reduction == "none":
        loss = torch.from_numpy(value).to(dtype).reshape(linear_rows_shape(input, linear_weight, target))
    else:
        loss = scalar(targets.divided(value, total), dtype)
    return loss, *_gradients(arrays, [input, linear_weight, linear_bias], input)


def linear_gradient(
    upstream: Tensor, input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None,
    weight: Tensor | None, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *rest, chunk_rows, wrt = options
    o = Options(*rest)
    targets = _linear_targets(input, linear_weight, target, weight, o)
    factors, spoilt = _factors(targets, upstream)
    reduction = "none" if o.reduction == "none" else "sum"
    _, arrays = _linear_pass(input, linear_weight, linear_bias, targets, reduction, chunk_rows, wrt, factors)
    _spoil(arrays, spoilt, math.prod(input.shape[:-1]))
    return _gradients(arrays, [input, linear_weight, linear_bias], input)


def linear_rows_shape(input: Tensor, linear_weight: Tensor, target: Tensor) -> Any:
    return input.shape[:-1] + linear_weight.shape[1:-1] if target.is_floating_point() else target.shape
