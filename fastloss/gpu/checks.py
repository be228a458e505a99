"""What must be true of results on a device: each check compares a call on device arrays with the NumPy reference.

The tests run them in the simulator on tiny shapes, `python -m fastloss.gpucheck` on a GPU on larger ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import fastloss as fl
from fastloss._checks import Array
from fastloss.gpu.arrays import host_dtype
from fastloss.gpu.sources import Source

Expected = tuple[Any, Array, dict[str, Array]]

#: Relative error of a gradient's entry and of a loss, in units of its type's precision, and what sums may cancel.
UNITS = 64
NARROW = ("float16", "bfloat16")


class Check(NamedTuple):
    """A name, and what raises AssertionError where it is not true."""

    name: str
    run: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The shapes that checks are made on, edges first."""

    scores: tuple[tuple[int, int], ...]
    options: tuple[int, int]
    few: tuple[tuple[int, int, int], ...]  # of a linear layer: N, D, C
    many: tuple[int, int, int]
    streamed: tuple[int, int]  # host arrays


TINY = Sizes(((1, 1), (5, 2), (4, 10), (3, 33)), (5, 7), ((5, 9, 3),), (7, 5, 40), (9, 6))
FULL = Sizes(
    ((1, 1), (1001, 2), (4097, 10), (2050, 31), (1031, 33), (515, 257), (257, 1000), (131, 1500), (129, 4096),
     (65, 8191), (33, 32768), (9, 131072), (3, 300001)),
    (1003, 130),
    ((1001, 17, 2), (5003, 784, 10), (2049, 3072, 10), (513, 100, 31)),
    (1500, 256, 5003),
    (20011, 100),
)  # fmt: skip

PLAIN: dict[str, fl.Loss] = {
    "softmax": fl.Softmax(),
    "hinge": fl.Hinge(),
    "squared hinge": fl.Hinge(power=2, margin=0.5),
    "hinge mean": fl.Hinge(over="mean", margin=2.0),
    "hinge max": fl.Hinge(over="max"),
    "squared hinge max": fl.Hinge(over="max", power=2, margin=0.25),
}


def options(c: int) -> dict[str, fl.Loss]:
    """Losses with every option, for c classes."""
    rng = np.random.default_rng(c)
    weight = rng.uniform(0.5, 2, c).round(2)
    weight[c // 2] = 0
    return {
        "class weights": fl.Softmax(class_weight=weight),
        "ignored": fl.Softmax(ignore_index=1),
        "smoothing": fl.Softmax(label_smoothing=0.1),
        "smoothing, class weights": fl.Softmax(label_smoothing=0.1, class_weight=weight, ignore_index=0),
        "z-loss, softcap, temperature": fl.Softmax(z_loss=1e-2, softcap=5.0, temperature=0.7),
        "hinge class weights": fl.Hinge(class_weight=weight, ignore_index=-1),
        "pair margins": fl.Hinge(pair_margins=rng.integers(0, 32, (c, c)) / 16),
        "counted target": fl.Hinge(count_target=True, power=2),
        "max pair margins": fl.Hinge(pair_margins=rng.integers(0, 32, (c, c)) / 16, over="max"),
    }


def scores_and_targets(n: int, c: int, dtype: str, seed: int = 0) -> tuple[Array, Array]:
    """Multiples of 1/16 between −8 and 8, which every type holds, and targets."""
    rng = np.random.default_rng([seed, n, c])
    return (rng.integers(-128, 129, (n, c)) / 16).astype(host_dtype(dtype)), rng.integers(0, c, n)


def resolution(dtype: str) -> float:
    return {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]


def compare(found: Any, wanted: Any, dtype: str, what: str, units: float = UNITS, floor: float = 0.0) -> None:
    """Raise unless each number is within `units` of its type's precision, NaN and infinities where they are wanted.

    floor: the size of terms whose sum a number is, where they may cancel.
    """
    a, b = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    if a.shape != b.shape:
        raise AssertionError(f"{what} has shape {a.shape}; it must be {b.shape}")
    if dtype in NARROW:
        units = 4  # rounded once, from float32
    tiny = 2.0**-24 if dtype == "float16" else 2.0**-126 if dtype != "float64" else 2.0**-1022
    with np.errstate(all="ignore"):
        near = np.abs(a - b) <= units * (resolution(dtype) * np.maximum(np.abs(b), floor) + tiny)
    good = near | (a == b) | (np.isnan(a) & np.isnan(b))
    if not good.all():
        at = tuple(int(k) for k in np.argwhere(~good)[0])
        raise AssertionError(
            f"{what} is {a[at]} at {list(at)}; it must be {b[at]} ({(~good).sum()} of {good.size} are off)"
        )


def same_bits(a: Array, b: Array, what: str) -> None:
    if a.tobytes() != b.tobytes():
        raise AssertionError(f"{what} has other bits the second time")


def expected(loss: fl.Loss, scores: Array, targets: Array, **arguments: Any) -> Any:
    """The reference's answer, in float64."""
    return loss.value_and_grad(scores.astype(np.float64), targets, backend="reference", **arguments)


def number(source: Source, value: Any) -> Any:
    """A loss on the host: a float, or an array of row losses."""
    return source.get(value) if source.owns(value) else np.asarray(value)


class Suite:
    """The checks for the arrays of one source.

    Parameters
    ----------
    source : Source
    sizes : Sizes
    """

    def __init__(self, source: Source, sizes: Sizes) -> None:
        self.source, self.sizes = source, sizes

    def all(self) -> Iterator[Check]:
        """Every check; those of many shapes and types last, for time may be short."""
        n, c = self.sizes.options
        for name in ("extra_outputs", "empty", "bad_targets", "target_types", "determinism", "streams", "host_arrays"):
            yield Check(name.replace("_", " "), getattr(self, name))
        yield Check("linear objective, options", self.objective)
        yield Check("linear, rows one by one", self.layer_rows)
        yield Check("linear, bad targets", self.layer_bad_targets)
        if self.source.multiplies:
            yield Check("linear, in chunks", self.chunked)
            yield Check("linear, Hessian products", self.hessian_products)
        for dtype in self.source.dtypes:
            for name in (
                "probabilities", "weights", "row_gradients", "extremes", "in_place", "transforms", "strided", "shards",
                "diagonals",
            ):  # fmt: skip
                yield Check(f"{name.replace('_', ' ')}, {dtype}", partial(getattr(self, name), dtype))
        for dtype in (*self.source.dtypes, "uint8"):
            for shape in self.sizes.few:
                for name in ("softmax", "hinge"):
                    words = "linear {}, {} x {}, {} classes, {}".format(name, *shape, dtype)
                    yield Check(words, partial(self.linear, PLAIN[name], shape, dtype))
            if self.source.multiplies:
                words = f"linear softmax, many classes, {dtype}"
                yield Check(words, partial(self.linear, PLAIN["softmax"], self.sizes.many, dtype))
        for dtype in self.source.dtypes:
            for name, loss in options(c).items():
                yield Check(f"{name}, {dtype}", partial(self.scores, loss, n, c, dtype))
        for dtype in self.source.dtypes:
            for name, loss in PLAIN.items():
                for n, c in self.sizes.scores:
                    yield Check(f"{name}, {n} x {c} {dtype}", partial(self.scores, loss, n, c, dtype))

    # --- given scores ----------------------------------------------------------------------------------------------
    def call(self, loss: fl.Loss, scores: Array, targets: Array, **arguments: Any) -> tuple[Any, Any]:
        """Loss and gradient of device arrays, on the host."""
        put, get = self.source.put, self.source.get
        value, grad = loss.value_and_grad(put(scores), put(targets), **arguments)
        if not self.source.owns(grad):
            raise AssertionError(f"the gradient is {type(grad).__name__}, not an array of {self.source.name}")
        return number(self.source, value), get(grad)

    def scores(self, loss: fl.Loss, n: int, c: int, dtype: str) -> None:
        scores, targets = scores_and_targets(n, c, dtype)
        for reduction in ("mean", "none"):
            value, grad = self.call(loss, scores, targets, reduction=reduction)
            wanted, wanted_grad = expected(loss, scores, targets, reduction=reduction)
            self.agree((value, grad), (wanted, wanted_grad), dtype, n if reduction == "mean" else 1)
        alone = number(self.source, loss.value(self.source.put(scores), self.source.put(targets)))
        compare(alone, expected(loss, scores, targets)[0], value_type(dtype), "the value alone")

    def agree(self, found: tuple[Any, Any], wanted: tuple[Any, Any], dtype: str, n: int) -> None:
        compare(found[0], wanted[0], value_type(dtype), "the loss")
        if found[1].dtype.name != dtype:
            raise AssertionError(f"the gradient is {found[1].dtype}; it must be {dtype}")
        compare(found[1], wanted[1], dtype, "the gradient", floor=1e-3 / max(1, n))

    def probabilities(self, dtype: str) -> None:
        n, c = self.sizes.options
        scores, _ = scores_and_targets(n, c, dtype)
        raw = np.random.default_rng(1).uniform(0, 1, (n, c)).astype(np.float32)
        targets = (raw / raw.sum(axis=1, keepdims=True)).astype(value_type(dtype))
        found = self.call(fl.Softmax(), scores, targets)
        self.agree(found, expected(fl.Softmax(), scores, targets), dtype, n)

    def weights(self, dtype: str) -> None:
        n, c = self.sizes.options
        scores, targets = scores_and_targets(n, c, dtype)
        weight = np.random.default_rng(2).uniform(0, 2, n)
        weight[::3] = 0
        scores[0] = np.nan  # a row of weight 0
        for loss in (fl.Softmax(), fl.Hinge()):
            for reduction in ("mean", "sum"):
                found = self.call(loss, scores, targets, sample_weight=self.source.put(weight), reduction=reduction)
                wanted = expected(loss, scores, targets, sample_weight=weight, reduction=reduction)
                self.agree(found, wanted, dtype, n if reduction == "mean" else 1)

    def row_gradients(self, dtype: str) -> None:
        n, c = self.sizes.options
        scores, targets = scores_and_targets(n, c, dtype)
        upstream = np.random.default_rng(3).uniform(-2, 2, n).astype(value_type(dtype))
        upstream[::4] = 0
        found = self.call(fl.Softmax(), scores, targets, upstream=self.source.put(upstream), reduction="none")
        self.agree(found, expected(fl.Softmax(), scores, targets, upstream=upstream, reduction="none"), dtype, 1)

    def extremes(self, dtype: str) -> None:
        """NaN, infinities, masked classes, large offsets, a dominant target: items 1 and 5 of the contract."""
        c = self.sizes.options[1]
        scores, _ = scores_and_targets(9, c, dtype)
        targets = np.zeros(9, np.int64)
        scores[0, 1] = np.nan
        scores[1, 1] = np.inf
        scores[2, 1:] = -np.inf
        scores[3, 0] = -np.inf
        scores[4, :] = -np.inf
        scores[5, 0] = np.inf
        scores[6] += 2048
        scores[7, 0], scores[7, 1:] = 30, 0
        for loss in (fl.Softmax(), fl.Softmax(label_smoothing=0.1), fl.Hinge(), fl.Hinge(over="max", power=2)):
            found = self.call(loss, scores, targets, reduction="none")
            wanted = expected(loss, scores, targets, reduction="none")
            self.agree(found, wanted, dtype, 1)

    def in_place(self, dtype: str) -> None:
        for n, c in self.sizes.scores[1:]:
            scores, targets = scores_and_targets(n, c, dtype)
            array = self.source.put(scores)
            value, grad = fl.Softmax().value_and_grad(array, self.source.put(targets), out=array)
            if grad is not array:
                raise AssertionError("out= was not handed back")
            apart = self.call(fl.Softmax(), scores, targets)
            same_bits(self.source.get(array), apart[1], f"the gradient in place of {n} x {c} scores")
            same_bits(number(self.source, value), apart[0], "the loss in place")

    def strided(self, dtype: str) -> None:
        """Rows that are padded, and off the 16 bytes that wide loads want."""
        n, c = self.sizes.options
        scores, targets = scores_and_targets(n, c + 3, dtype)
        if self.source.name == "numba":
            return self._strided_whole(scores, targets, dtype)
        array, out = self.source.put(scores), self.source.put(np.zeros_like(scores))
        labels = targets % c
        inner = out[:, 2 : c + 2]
        value, _ = fl.Softmax().value_and_grad(array[:, 1 : c + 1], self.source.put(labels), out=inner)
        wanted = expected(fl.Softmax(), scores[:, 1 : c + 1], labels)
        whole = self.source.get(out)
        self.agree((number(self.source, value), whole[:, 2 : c + 2]), wanted, dtype, n)
        if np.asarray(whole[:, :2], np.float64).any() or np.asarray(whole[:, c + 2 :], np.float64).any():
            raise AssertionError("numbers beside the gradient were written")
        return None

    def _strided_whole(self, scores: Array, targets: Array, dtype: str) -> None:
        """numba's arrays are cut along rows only: the second half of them."""
        half = len(scores) // 2
        value, grad = fl.Softmax().value_and_grad(self.source.put(scores)[half:], self.source.put(targets)[half:])
        found = number(self.source, value), self.source.get(grad)
        self.agree(found, expected(fl.Softmax(), scores[half:], targets[half:]), dtype, len(scores) - half)

    def transforms(self, dtype: str) -> None:
        n, c = self.sizes.options
        scores, _ = scores_and_targets(n, c, dtype)
        for name in ("softmax", "log_softmax", "logsumexp"):
            found = self.source.get(getattr(fl, name)(self.source.put(scores)))
            wanted = getattr(fl, name)(scores.astype(np.float64), backend="reference")
            compare(found, wanted, dtype, name, floor=1.0 if name != "softmax" else 0.0)

    def shards(self, dtype: str) -> None:
        """The classes in two shards: stats, merged; and the value and the gradients from them."""
        put, get = self.source.put, self.source.get
        for n, c in (self.sizes.options, self.sizes.scores[-1]):
            scores, targets = scores_and_targets(n, c, dtype)
            loss = fl.Softmax(label_smoothing=0.1, temperature=0.5)
            wanted, wanted_grad = expected(loss, scores, targets, reduction="none")
            cut, y = c // 3, put(targets)
            parts = [(a, put(np.ascontiguousarray(scores[:, a:b]))) for a, b in ((0, cut), (cut, c))]
            left, right = (loss.stats(part, y, offset=a) for a, part in parts)
            stats = left.merge(right)
            found = get(loss.value_from_stats(stats, y, reduction="none"))
            compare(found, wanted, value_type(dtype), "the losses from stats", units=4 * UNITS)
            how: dict[str, Any] = {"reduction": "none"}
            grads = [get(loss.gradient_from_stats(part, y, stats, offset=a, **how)) for a, part in parts]
            # Smoothing is taken off, and exponentials of s − m are rounded.
            compare(np.concatenate(grads, axis=1), wanted_grad, dtype, "the gradient from stats", floor=0.1)

    def diagonals(self, dtype: str) -> None:
        for n, c in (self.sizes.options, self.sizes.scores[-2]):
            scores, targets = scores_and_targets(n, c, dtype)
            for loss in (fl.Softmax(), fl.Hinge(power=2), fl.Hinge(power=2, over="max")):
                found = self.source.get(loss.hess_diag(self.source.put(scores), self.source.put(targets)))
                wanted = loss.hess_diag(scores.astype(np.float64), targets)
                compare(found, wanted, dtype, "the diagonal", floor=1e-6)

    def extra_outputs(self) -> None:
        n, c = self.sizes.options
        scores, targets = scores_and_targets(n, c, "float32")
        for loss in (fl.Softmax(), fl.Softmax(z_loss=0.1, temperature=2.0), fl.Hinge()):
            names = loss.extra_outputs
            put = self.source.put
            _, _, found = loss.value_and_grad(put(scores), put(targets), outputs=names)
            _, _, wanted = expected(loss, scores, targets, outputs=names)
            for name in names:
                compare(self.source.get(found[name]), wanted[name], "float32", name, floor=1.0)

    def empty(self) -> None:
        for n, c in ((0, 3), (0, 1)):
            value, grad = self.call(fl.Softmax(), np.zeros((n, c), np.float32), np.zeros(n, np.int64))
            if not np.isnan(value) or grad.shape != (n, c):
                raise AssertionError(f"no rows give a mean of {value} and a gradient of shape {grad.shape}")

    def bad_targets(self) -> None:
        """A class outside the scores' gives NaN in its row, and an error later; nothing else suffers."""
        n, c = self.sizes.options
        scores, targets = scores_and_targets(n, c, "float32")
        for bad in (c, -1, 1 << 40):
            wrong = targets.copy()
            wrong[2] = bad
            value, grad = self.call(fl.Softmax(), scores, wrong, reduction="none")
            wanted, wanted_grad = expected(fl.Softmax(), scores, targets, reduction="none")
            wanted[2], wanted_grad[2] = np.nan, np.nan
            self.agree((value, grad), (wanted, wanted_grad), "float32", 1)
            try:
                fl.synchronize()
            except ValueError as error:
                if "targets[2]" not in str(error) or str(bad) not in str(error):
                    raise AssertionError(f"the error does not name the target: {error}") from None
            else:
                raise AssertionError(f"a target of {bad} raised nothing")
        self.call(fl.Softmax(), scores, targets)  # the error is raised once

    def target_types(self) -> None:
        scores, targets = scores_and_targets(7, 5, "float32")
        wanted = expected(fl.Softmax(), scores, targets)
        for dtype in (np.int8, np.uint8, np.int16, np.int32, np.int64):
            self.agree(self.call(fl.Softmax(), scores, targets.astype(dtype)), wanted, "float32", 7)

    def determinism(self) -> None:
        for n, c in self.sizes.scores[-4:]:
            scores, targets = scores_and_targets(n, c, "float32")
            scores = scores + np.random.default_rng(4).standard_normal((n, c)).astype(np.float32)
            first, second = (self.call(fl.Softmax(), scores, targets) for _ in range(2))
            same_bits(first[0], second[0], f"the loss of {n} x {c} scores")
            same_bits(first[1], second[1], f"the gradient of {n} x {c} scores")
        for shape in self.sizes.few:
            one, other = (self.layer(fl.Softmax(), shape, "float32")[1] for _ in range(2))
            for name in ("W", "b"):
                same_bits(one[name], other[name], f"the gradient of {name}")

    def streams(self) -> None:
        """On the caller's stream: what it waits for is waited for, without a word to the host."""
        n, c = self.sizes.scores[-1]
        scores, targets = scores_and_targets(n, c, "float32")
        wanted = expected(fl.Softmax(), scores, targets)
        array, labels = self.source.put(np.full_like(scores, np.nan)), self.source.put(targets)
        source = self.source.put(scores)
        with self.source.other_stream():
            for _ in range(20):  # the last of many copies makes the scores what they must be
                self.source.copy(array, source)
            value, grad = fl.Softmax().value_and_grad(array, labels)
        self.agree((number(self.source, value), self.source.get(grad)), wanted, "float32", n)

    def host_arrays(self) -> None:
        n, c = self.sizes.streamed
        for dtype in ("float32", "float64"):
            scores, targets = scores_and_targets(n, c, dtype)
            value, grad = fl.Softmax().value_and_grad(scores, targets, backend="cuda")
            if not isinstance(grad, np.ndarray):
                raise AssertionError(f"host arrays gave a gradient of type {type(grad).__name__}")
            self.agree((value, grad), expected(fl.Softmax(), scores, targets), dtype, n)
        for dtype in ("float32", "uint8"):
            X, W, b, targets = self.problem((n, 48, 3), dtype)
            value, grads = fl.linear_value_and_grad(fl.Softmax(), X, W, targets, b, wrt=("W", "b"), backend="cuda")
            wanted, wanted_grads = fl.linear_value_and_grad(
                fl.Softmax(), X, W.astype(np.float64), targets, b.astype(np.float64), wrt=("W", "b")
            )
            compare(value, wanted, "float32", "the loss", units=256)
            for name, grad in grads.items():
                close(grad, wanted_grads[name], 2e-5, name)

    # --- the linear layer ------------------------------------------------------------------------------------------
    def problem(
        self, shape: tuple[int, int, int], dtype: str, kinks: bool = False
    ) -> tuple[Array, Array, Array, Array]:
        """X, W, b, targets: X of that type, W and b of the type that goes with it; short numbers, exact in each.

        kinks: a rounded score would be on the other side of one, so scores are exact, too: in 16-bit types, few
        features of a row are not 0.
        """
        n, d, c = shape
        rng = np.random.default_rng(list(shape))
        if kinks and dtype in NARROW:
            X, like = np.zeros((n, d), host_dtype(dtype)), dtype
            for _ in range(3):
                X[np.arange(n), rng.integers(0, d, n)] = rng.choice([-1.0, 1.0], n)
            W = rng.integers(-8, 9, (c, d)) / 8
        elif dtype == "uint8":
            X, like = rng.integers(0, 256, (n, d)).astype(np.uint8), "float32"
            W = rng.integers(-64, 65, (c, d)) / 2.0**14
        else:
            X, like = (rng.integers(-16, 17, (n, d)) / 16).astype(host_dtype(dtype)), dtype
            W = rng.integers(-64, 65, (c, d)) / 64 / max(1.0, d**0.5)
            W = np.round(W * 256) / 256
        b = rng.integers(-8, 9, c) / 8
        return X, W.astype(host_dtype(like)), b.astype(host_dtype(like)), rng.integers(0, c, n)

    def layer(
        self, loss: fl.Loss, shape: tuple[int, int, int], dtype: str, **arguments: Any
    ) -> tuple[Any, dict[str, Array]]:
        put = self.source.put
        X, W, b, targets = self.problem(shape, dtype, loss.kind == "hinge")
        wrt = arguments.setdefault("wrt", ("W", "b"))
        value, grads = fl.linear_value_and_grad(loss, put(X), put(W), put(targets), put(b), **arguments)
        if set(grads) != set(wrt):
            raise AssertionError(f"there are gradients of {', '.join(grads)}; there must be of {', '.join(wrt)}")
        return number(self.source, value), {name: self.source.get(grad) for name, grad in grads.items()}

    def linear(self, loss: fl.Loss, shape: tuple[int, int, int], dtype: str) -> None:
        """The gradient of W in one pass, where it fits; and with that of X, where there are products."""
        X, W, b, targets = self.problem(shape, dtype, loss.kind == "hinge")
        with_X = self.source.multiplies and dtype != "uint8"
        wanted, wanted_grads = fl.linear_value_and_grad(
            loss, X.astype(np.float64), W.astype(np.float64), targets, b.astype(np.float64),
            wrt=("W", "b", "X"), backend="reference",
        )  # fmt: skip
        rounded = dtype in NARROW and loss.kind != "hinge"
        tolerance = {"float64": 1e-13, "float16": 4e-3, "bfloat16": 2e-2}.get(dtype, 2e-5)
        for wrt in (("W", "b"), ("W", "b", "X"))[: 1 + with_X]:
            value, grads = self.layer(loss, shape, dtype, wrt=wrt)
            compare(value, wanted, value_type(dtype), "the loss", units=2e5 if rounded else 256)
            for name, grad in grads.items():
                close(grad, wanted_grads[name], tolerance, name)

    def layer_rows(self) -> None:
        """Row losses, weights and a factor for each row's gradient."""
        shape = self.sizes.few[0]
        X, W, b, targets = self.problem(shape, "float32")
        rng = np.random.default_rng(6)
        weight, upstream = rng.uniform(0, 2, shape[0]), rng.uniform(-1, 1, shape[0]).astype(np.float32)
        weight[::3], X[0] = 0, np.nan
        for loss in (fl.Softmax(label_smoothing=0.1), fl.Hinge(class_weight=np.arange(shape[2]))):
            how: dict[str, Any] = {"reduction": "none", "wrt": ("W", "b")}
            put, get = self.source.put, self.source.get
            value, grads = fl.linear_value_and_grad(
                loss, put(X), put(W), put(targets), put(b), sample_weight=put(weight), upstream=put(upstream), **how
            )
            wanted, wanted_grads = fl.linear_value_and_grad(
                loss, X, W, targets, b, sample_weight=weight, upstream=upstream, backend="reference", **how
            )
            compare(get(value), wanted, "float32", "the row losses", units=256, floor=1e-3)
            for name, grad in grads.items():
                close(get(grad), wanted_grads[name], 2e-5, name)

    def layer_bad_targets(self) -> None:
        shape = self.sizes.few[0]
        X, W, _, targets = self.problem(shape, "float32")
        put = self.source.put
        wrong = targets.copy()
        wrong[3] = shape[2]
        value, _ = fl.linear_value_and_grad(
            fl.Softmax(), put(X), put(W), put(wrong), wrt=("W",), reduction="none"
        )
        if not np.array_equal(np.flatnonzero(np.isnan(self.source.get(value))), [3]):
            raise AssertionError("not just the row with the bad target is NaN")
        try:
            fl.synchronize()
        except ValueError as error:
            if "targets[3]" not in str(error):
                raise AssertionError(f"the error does not name the target: {error}") from None
        else:
            raise AssertionError("a target outside the classes raised nothing")

    def objective(self) -> None:
        """Weights, picked rows, shift and scale, penalty."""
        n, d, c = self.sizes.few[0]
        X, W, b, targets = self.problem((n, d, c), "uint8")
        rng = np.random.default_rng(5)
        packed = np.concatenate([W, b[:, None]], axis=1)
        weight, rows = rng.uniform(0, 2, n), rng.integers(0, n, n // 2)
        weight[0] = 0
        put, get = self.source.put, self.source.get
        how: dict[str, Any] = {"penalty": fl.L2(0.1), "shift": rng.uniform(0, 200, d), "scale": rng.uniform(50, 90, d)}
        ours = fl.LinearObjective(fl.Softmax(), put(X), put(targets), sample_weight=put(weight), **how)
        its = fl.LinearObjective(fl.Softmax(), X, targets, sample_weight=weight, backend="reference", **how)
        for picked in (None, rows):
            value, grad = ours.value_and_grad(put(packed), None if picked is None else put(picked))
            wanted, wanted_grad = its.value_and_grad(packed.astype(np.float64), picked)
            compare(number(self.source, value), wanted, "float32", "the objective", units=256)
            close(get(grad), wanted_grad, 2e-5, "the gradient of the objective")

    def hessian_products(self) -> None:
        X, W, b, targets = self.problem(self.sizes.many, "float32")
        put, packed = self.source.put, np.concatenate([W, b[:, None]], axis=1)
        along = np.random.default_rng(7).uniform(-1, 1, packed.shape).astype(np.float32)
        for loss in (fl.Softmax(), fl.Hinge(power=2)):
            how: dict[str, Any] = {"penalty": fl.L2(0.1), "chunk_rows": self.sizes.many[0] // 2}
            ours = fl.LinearObjective(loss, put(X), put(targets), **how)
            its = fl.LinearObjective(loss, X, targets, backend="reference", **how)
            wanted = its.hessp(packed.astype(np.float64), along.astype(np.float64))
            close(self.source.get(ours.hessp(put(packed), put(along))), wanted, 1e-4, "the Hessian's product")

    def chunked(self) -> None:
        """The chunk's size changes no more than rounding."""
        wrt = ("W", "b", "X")
        X, W, b, targets = self.problem(self.sizes.many, "float32")
        wanted, wanted_grads = fl.linear_value_and_grad(fl.Softmax(), X, W, targets, b, wrt=wrt, backend="reference")
        for chunk_rows in (1, self.sizes.many[0] // 3 + 1, None):
            value, grads = self.layer(fl.Softmax(), self.sizes.many, "float32", chunk_rows=chunk_rows, wrt=wrt)
            compare(value, wanted, "float32", "the loss", units=256)
            for name, grad in grads.items():
                close(grad, wanted_grads[name], 2e-5, name)


def value_type(dtype: str) -> str:
    """The type that losses of scores, or features, of a type are computed in."""
    return "float64" if dtype == "float64" else "float32"


def close(found: Array, wanted: Array, tolerance: float, what: str) -> None:
    """Raise unless ‖found − wanted‖ ≤ tolerance · ‖wanted‖."""
    a, b = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    if a.shape != b.shape:
        raise AssertionError(f"the gradient of {what} has shape {a.shape}; it must be {b.shape}")
    error, size = float(np.linalg.norm(a - b)), float(np.linalg.norm(b))
    if not error <= tolerance * size:
        raise AssertionError(f"the gradient of {what} is off by {error / size if size else error:.1e} of its size")
