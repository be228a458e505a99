"""The linear layer on a GPU: losses of `X Wᵀ + b` and their gradients, on the caller's stream, without waiting.

Few classes: one pass over X, fused (`features`). Others, and the gradient of X: chunks of rows, with products by the
array library (`products`), row losses by the kernels of given scores in place on the chunk. Memory beyond inputs and
outputs stays below `EXTRA_BYTES`.

Products are of X's and W's type where both have the same 16-bit one (so scores are of 16 bits, as PyTorch's are; sums
are float32's), else of the compute type. Then dW is rounded to 16 bits as each chunk is added; chunks are as large as
memory allows, so that they are few. Every sum is in an order of its own: the same bits every time.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from fastloss import _checks as checks
from fastloss import penalties, threads
from fastloss.backends import BackendError
from fastloss.gpu import arrays, device, driver, features, hessian, products, scores
from fastloss.gpu.arrays import View
from fastloss.jit import rowmath
from fastloss.linear import LinearObjective

#: Bytes beyond inputs and outputs that a call with products takes, at most, what of that chunks get, and what of theirs
#: a sum of dW in a wider type may take.
EXTRA_BYTES, CHUNK_BYTES, SUM_BYTES = 1_000_000_000, 940_000_000, 300_000_000
UNIT = 128  # rows: chunks are whole numbers of them, where there are so many
NARROW = ("float16", "bfloat16")


def features_type(dtype: str, name: str = "X") -> str:
    """The compute type of features; a TypeError for those that no kernel reads."""
    if dtype not in (*device.REAL, "uint8"):
        raise TypeError(f"{name} has dtype {dtype}; on a GPU it must be uint8, float16, bfloat16, float32 or float64")
    return "float64" if dtype == "float64" else "float32"


class Data(NamedTuple):
    """Rows of a call, and what goes with them."""

    X: View
    rows: View | None  # indices of rows of X (int64)
    centre: View | None  # (D,), of the compute type
    y: View  # of the rows of the call
    n: int  # rows of the call
    weights: Any  # pointers: row multipliers (float64) and their sum
    total: Any
    weighted: bool


class Wanted(NamedTuple):
    """What a call is to write."""

    value: View | None  # () of float64
    values: View | None  # (N,) of the compute type
    dW: View | None
    db: View | None
    dX: View | None


class Folded(NamedTuple):
    """What shift and scale do to W and to its gradient: (D,) of float64, or None."""

    scale: View | None
    rest: View | None


PLAIN = Folded(None, None)


class Layer:
    """One call: where its arrays are, and what is launched."""

    def __init__(
        self, loss: Any, data: Data, W: View, b: View | None, folded: Folded, wanted: Wanted, grad_scale: float,
        value_scale: float, shared_total: bool, upstream: View | None, chunk_rows: int | None,
    ) -> None:  # fmt: skip
        self.loss, self.data, self.W, self.b, self.folded, self.wanted = loss, data, W, b, folded, wanted
        self.grad_scale, self.value_scale, self.upstream = grad_scale, value_scale, upstream
        self.chunk_rows = chunk_rows
        self.gpu, self.stream = data.X.gpu, data.X.stream
        self.c, self.d = W.shape
        self.real = features_type(data.X.dtype)
        self.row = rowmath.plan_of(loss, data.y.ndim == 2)
        self.flags = (
            scores.WEIGHTED * data.weighted
            | scores.SHARED_TOTAL * shared_total
            | scores.PULLED * (upstream is not None)
            | scores.VALUES * (wanted.values is not None)
            | scores.WRITES_VALUE * (wanted.value is not None)
        )
        self.nothing = functools.partial(driver.nothing, self.gpu)

    @property
    def wants_gradient(self) -> bool:
        wanted = self.wanted
        return not (wanted.dW is None and wanted.db is None and wanted.dX is None)

    def run(self) -> None:
        """Launch everything."""
        fused = self.wanted.dX is None and features.fits(self.c, self.d, self.real) and self.data.X.strides[1] == 1
        if fused:
            self.run_fused()
            return
        self.run_chunks(self.library(f"{self.c} classes of {self.d} features, or the gradient of X,"))

    def library(self, what: str) -> products.Products:
        """The products of the features' library; an error for `what` where it has none."""
        found = products.of(self.data.X)
        if found is None:
            raise BackendError(
                f"{what} take matrix products, which {type(self.data.X.owner).__name__} does not have: give arrays of "
                "CuPy or PyTorch"
            )
        return found

    # --- one pass ----------------------------------------------------------------------------------------------------
    def prepare(self, weights: Any, b: Any) -> None:
        """Weights (C, D) and b (C,) for the features less the centre, in the compute type, to what is pointed to."""
        W, given, scale, rest = self.W, self.b, self.folded.scale, self.folded.rest
        like = W if given is None else given
        none = self.nothing("float64")
        few = features.FEW_THREADS
        features.prepare_kernel(W.dtype, like.dtype, self.real).launch(
            self.c, few, device.SCRATCH * 8, self.stream, W.pointer, W.strides[0], W.strides[1], like.pointer,
            like.strides[0], none if scale is None else scale.pointer, none if rest is None else rest.pointer, weights,
            b, self.d, int(given is not None), int(scale is not None), int(rest is not None), few,
        )  # fmt: skip

    def run_fused(self) -> None:
        data, wanted, nothing, c, d = self.data, self.wanted, self.nothing, self.c, self.d
        workspace = device.workspace(self.gpu, self.stream)
        weights = workspace.get(f"W {self.real}", c * d, self.real)
        b = workspace.get(f"b {self.real}", c, self.real)
        self.prepare(weights, b)
        layer = features.Layer(
            scores.Plan(self.row, self.real), data.X.dtype, c, features.width(d), data.rows is not None,
            data.centre is not None, self.wants_gradient,
        )  # fmt: skip
        blocks = max(1, min(-(-data.n // features.ROWS), device.limits().multiprocessors))
        work = workspace.get(f"dW {self.real}", blocks * c * (d + 1), self.real)
        probabilities = data.y.ndim == 2
        flags = self.flags | scores.GRADIENT * self.wants_gradient
        features.pass_kernel(layer).launch(
            blocks, features.THREADS, layer.shared_bytes, self.stream, data.X.pointer, data.X.strides[0],
            nothing("int64") if data.rows is None else data.rows.pointer,
            nothing(self.real) if data.centre is None else data.centre.pointer, weights, b, data.n, d,
            nothing("uint8") if probabilities else data.y.pointer, 1 if probabilities else driver._index_kind(data.y),
            data.y.pointer if probabilities else nothing(self.real),
            driver.options(self.loss, self.row, c, self.real, self.gpu), data.weights,
            nothing(self.real) if self.upstream is None else self.upstream.pointer, data.total, self.grad_scale,
            self.value_scale, nothing("float64") if wanted.value is None else wanted.value.pointer,
            nothing(self.real) if wanted.values is None else wanted.values.pointer, work,
            workspace.get("sums", blocks, np.float64), workspace.words(), driver.errors(self.gpu)[1], flags, blocks,
        )  # fmt: skip
        if self.wants_gradient:
            self.finish(work, blocks)

    def finish(self, work: Any, blocks: int) -> None:
        """The blocks' dW and db to those wanted."""
        dW, db, few = self.wanted.dW, self.wanted.db, features.FEW_THREADS
        kinds = (self.real if a is None else a.dtype for a in (dW, db))
        nothing, scale, rest = self.nothing, self.folded.scale, self.folded.rest
        size = self.c * (self.d + 1)
        features.finish_kernel(self.real, *kinds).launch(
            -(-size // few), few, 0, self.stream, work, blocks, self.c, self.d,
            nothing("float64") if scale is None else scale.pointer,
            nothing("float64") if rest is None else rest.pointer,
            int(scale is not None), int(rest is not None), nothing(self.real) if dW is None else dW.pointer,
            0 if dW is None else dW.strides[0], 0 if dW is None else dW.strides[1],
            nothing(self.real) if db is None else db.pointer, 0 if db is None else db.strides[0],
            int(dW is not None), int(db is not None), few,
        )  # fmt: skip

    # --- chunks -----------------------------------------------------------------------------------------------------
    def run_chunks(self, library: products.Products) -> None:
        """Scores of each chunk of rows, row losses in place, and the gradients' products."""
        data, wanted, c, d = self.data, self.wanted, self.c, self.d
        same = data.X.dtype == self.W.dtype and data.X.dtype in NARROW and self.folded == PLAIN and data.centre is None
        kind = data.X.dtype if same else self.real
        size = device.SIZES[kind]
        W, b = self.converted(library, kind)
        converts = data.X.dtype != kind or data.centre is not None
        picks = data.rows is not None
        spare = CHUNK_BYTES - (0 if self.W.dtype == kind and W is self.W.owner else c * d * size)
        sum_bytes = c * d * device.SIZES[self.real]
        if wide := wanted.dW is not None and kind != self.real and sum_bytes <= SUM_BYTES:
            spare -= sum_bytes
        row_bytes = c * size + (2 * d * size if converts else 0) + (d * device.SIZES[data.X.dtype] if picks else 0)
        chunks = cut_rows(data.n, max(1, spare // row_bytes), self.chunk_rows)
        length = max((part.stop - part.start for part in chunks), default=1)
        block = data.X.empty((length, c), kind).owner
        dW, dX = (None if a is None else self.target(a, kind) for a in (wanted.dW, wanted.dX))
        share = dW
        if wide := wide and len(chunks) > 1:
            dW = data.X.empty((c, d), self.real).owner
        db: Any = None
        parts = None if wanted.value is None else data.X.empty((max(1, len(chunks)),), "float64")
        # Entries of a mean over many rows are too small for float16: its gradients are scaled by their product.
        factor = self.grad_scale if kind == "float16" else 1.0
        plan = scores.Plan(self.row, kind)
        for k, part in enumerate(chunks):
            x = self.loaded(library, part, kind)
            s = block[: part.stop - part.start]
            library.scores(x, W, b, s)
            self.row_losses(plan, s, part, self.grad_scale / factor, parts, k)
            if dW is not None:
                library.multiply(s.T, x, share, factor, k > 0 and not wide)
                if wide:
                    library.accumulate(share, dW, k > 0)
            if wanted.db is not None:
                found = library.sum_rows(s, self.real)
                db = found if db is None else db + found
            if dX is not None:
                library.multiply(s, W, dX[part], factor, False)
        if wanted.value is not None and parts is not None:
            wanted.value.assign(arrays.view(library.sum_rows(parts.owner, "float64"), "the value"))
        self.deliver(library, dW, db, dX, factor)

    def run_hessian(self, direction: Layer) -> None:
        """The Hessian's product with the other layer's weights, in the place of gradients: chunks as above."""
        data, wanted, c, d, kind = self.data, self.wanted, self.c, self.d, self.real
        library = self.library("Hessian products")
        (W, b), (V, vb) = self.converted(library, kind), direction.converted(library, kind)
        size = device.SIZES[kind]
        row_bytes = 2 * (c + d) * size + d * device.SIZES[data.X.dtype] * (data.rows is not None)
        chunks = cut_rows(data.n, max(1, (CHUNK_BYTES - 2 * c * d * size) // row_bytes), self.chunk_rows)
        length = max(part.stop - part.start for part in chunks)
        blocks = [data.X.empty((length, c), kind).owner for _ in range(2)]
        assert wanted.dW is not None
        HW, Hb = data.X.empty((c, d), kind).owner, None
        probabilities = data.y.ndim == 2
        for k, part in enumerate(chunks):
            x = self.loaded(library, part, kind)
            s, v = (block[: part.stop - part.start] for block in blocks)
            library.scores(x, W, b, s)
            library.scores(x, V, vb, v)
            along = arrays.view(v, "the direction")
            hessian.rows(
                self.loss, arrays.view(s, "scores"), along, along,
                offset(data.y.pointer, part.start * (c if probabilities else 1), data.y.dtype),
                0 if probabilities else driver._index_kind(data.y),
                offset(data.weights, part.start, "float64") if data.weighted else data.weights, data.total,
                self.grad_scale, self.flags & (scores.WEIGHTED | scores.SHARED_TOTAL),
            )  # fmt: skip
            library.multiply(v.T, x, HW, 1.0, k > 0)
            found = library.sum_rows(v, kind)
            Hb = found if Hb is None else Hb + found
        self.deliver(library, HW, Hb, None, 1.0)

    def converted(self, library: products.Products, kind: str) -> tuple[Any, Any]:
        """W and b for the products."""
        if self.folded != PLAIN:
            W, b = self.W.empty((self.c, self.d), self.real), self.W.empty((self.c,), self.real)
            self.prepare(W.pointer, b.pointer)
            return W.owner, b.owner
        W = library.convert(self.W.owner, kind)
        return W, None if self.b is None else library.convert(self.b.owner, kind)

    def loaded(self, library: products.Products, part: slice, kind: str) -> Any:
        """The features of a chunk."""
        data = self.data
        x = data.X.owner[part] if data.rows is None else library.pick(data.X.owner, data.rows.owner[part])
        x = library.convert(x, kind)
        return x if data.centre is None else x - data.centre.owner

    def row_losses(self, plan: scores.Plan, s: Any, part: slice, grad_scale: float, parts: Any, k: int) -> None:
        """Row losses of a chunk's scores, which become their gradients."""
        data, wanted, nothing = self.data, self.wanted, self.nothing
        n, start = part.stop - part.start, part.start
        block = arrays.view(s, "scores")
        probabilities = data.y.ndim == 2
        y = offset(data.y.pointer, start * (self.c if probabilities else 1), data.y.dtype)
        real = self.real
        arguments = scores.Arguments(
            block.pointer, block.pointer, driver._lead(block), driver._lead(block), n, self.c,
            nothing("uint8") if probabilities else y, 1 if probabilities else driver._index_kind(data.y),
            y if probabilities else nothing(self.real),
            driver.options(self.loss, self.row, self.c, plan.dtype, self.gpu),
            offset(data.weights, start, "float64") if data.weighted else data.weights,
            nothing(real) if self.upstream is None else offset(self.upstream.pointer, start, real), data.total,
            grad_scale, self.value_scale, nothing("float64") if parts is None else offset(parts.pointer, k, "float64"),
            nothing(real) if wanted.values is None else offset(wanted.values.pointer, start, real),
            nothing(self.real), nothing("int64"), self.flags | scores.GRADIENT * self.wants_gradient,
        )  # fmt: skip
        scores.launch(plan, arguments, self.gpu, self.stream, driver.errors(self.gpu)[1])

    def target(self, wanted: View, kind: str) -> Any:
        """Where a product's result goes: what is wanted itself, where it has the product's type."""
        if wanted.dtype == kind and wanted.is_contiguous and self.folded == PLAIN:
            return wanted.owner
        return wanted.empty(wanted.shape, kind).owner

    def deliver(self, library: products.Products, dW: Any, db: Any, dX: Any, factor: float) -> None:
        """Gradients to where they are wanted, in their types."""
        wanted, folded = self.wanted, self.folded
        if db is not None and factor != 1:
            db = db * factor
        if dW is not None and wanted.dW is not None and dW is not wanted.dW.owner:
            if folded.rest is not None:
                dW = dW - db[:, None] * folded.rest.owner[None, :]
            if folded.scale is not None:
                dW = dW / folded.scale.owner[None, :]
            wanted.dW.assign(arrays.view(library.convert(dW, wanted.dW.dtype), "dW"))
        if db is not None and wanted.db is not None:
            wanted.db.assign(arrays.view(library.convert(db, wanted.db.dtype), "db"))
        if dX is not None and wanted.dX is not None and dX is not wanted.dX.owner:
            wanted.dX.assign(arrays.view(library.convert(dX, wanted.dX.dtype), "dX"))


def offset(pointer: Any, count: int, dtype: str) -> Any:
    """A pointer some numbers further."""
    return pointer + (count if device.SIMULATED else count * device.SIZES[dtype])


def cut_rows(n: int, limit: int, chunk_rows: int | None) -> list[slice]:
    """range(n) in chunks of about the same size, at most the limit, or chunk_rows where that is less."""
    most = limit if chunk_rows is None else min(limit, chunk_rows)
    count = -(-n // most)
    size = -(-n // max(1, count))
    whole = -(-size // UNIT) * UNIT
    if chunk_rows is None and whole <= most:
        size = whole
    return [slice(start, min(n, start + size)) for start in range(0, n, max(1, size))]


# --- calls -----------------------------------------------------------------------------------------------------------
def _like(value: Any, name: str, like: View, shape: tuple[int, ...], what: str) -> View:
    """An array of floats of a shape, on the GPU of the features."""
    if not arrays.is_device(value):
        raise TypeError(f"{name} is {type(value).__name__}; it must be an array on the GPU, as X is")
    view = driver._on_gpu(value, name, like)
    if view.shape != shape:
        raise ValueError(f"{name} has shape {view.shape}; it must be {shape}: {what}")
    if view.dtype not in device.REAL:
        raise TypeError(f"{name} has dtype {view.dtype}; it must be float16, bfloat16, float32 or float64")
    return view


def _weights_of(value: Any, like: View, n: int) -> View | None:
    if value is None:
        return None
    if arrays.is_device(value):
        return driver._vector(value, "sample_weight", like, n, "row of X")
    return like.from_host(checks.weights(value, "sample_weight", n, "row of X"))


def _features(value: Any) -> View:
    X = arrays.view(value, "X")
    if X.ndim != 2:
        raise ValueError(
            f"X has shape {X.shape}; it must be two-dimensional, (N, D): a row of D features for each of N examples"
        )
    features_type(X.dtype)
    return X


def _folded_weights(
    loss: Any, y: View, weight: View | None, n: int, c: int, X: View
) -> tuple[Any, Any, bool]:
    """Pointers to multipliers and their sum, and whether there are any."""
    indices = y.ndim == 1
    if weight is None and not (indices and (loss.class_weight is not None or loss.ignore_index is not None)):
        nothing = driver.nothing(X.gpu, "float64")
        return nothing, nothing, False
    return *driver._weigh(loss, y, weight, n, c, X.gpu, X.stream), True


def _fill_empty(wanted: Wanted, mean: bool) -> None:
    """No rows: gradients are 0."""
    for target, number in ((wanted.value, math.nan if mean else 0.0), (wanted.dW, 0.0), (wanted.db, 0.0)):
        if target is not None:
            zeros = np.full(target.shape, number, np.float32 if target.dtype in NARROW else target.dtype)
            found = target.from_host(zeros)
            if found.dtype != target.dtype:
                library = products.of(target)
                assert library is not None  # 16-bit W without products are float16
                found = arrays.view(library.convert(found.owner, target.dtype), "zeros")
            target.assign(found)


def linear_call(
    loss: Any, X: Any, W: Any, targets: Any, b: Any, wrt: tuple[str, ...], sample_weight: Any, reduction: str,
    upstream: Any, chunk_rows: int | None,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """`fastloss.linear_value_and_grad` for X on a GPU: values and gradients are arrays there, of its library."""
    driver.require()
    given = _features(X)
    with device.on(given.gpu):
        driver.raise_errors(given.gpu)
        n, d = given.shape
        weights = arrays.view(W, "W") if arrays.is_device(W) else None
        c = weights.shape[0] if weights is not None and weights.ndim == 2 else 0
        weights = _like(W, "W", given, (max(1, c), d), f"X has {d} features")
        bias = None if b is None else _like(b, "b", given, (c,), "one for each row of W")
        if isinstance(wrt, str) or not set(wrt) <= {"W", "b", "X"}:
            raise ValueError(f'wrt is {wrt!r}; it must be a tuple of "W", "b" and "X"')
        checks.one_of(reduction, "reduction", checks.REDUCTIONS)
        real = features_type(given.dtype)
        y = driver._targets(targets, _typed(given, real), loss, n, c)
        loss.check_classes(c, y.ndim == 2)
        weight = _weights_of(sample_weight, given, n)
        factor, pulled = driver.upstream_of(upstream, reduction, given, n, real, "row of X")
        chunk_rows = None if chunk_rows is None else checks.integer(chunk_rows, "chunk_rows", low=1)
        multipliers, total, weighted = _folded_weights(loss, y, weight, n, c, given)
        mean = reduction == "mean"
        unit = 1.0 if not mean or weighted or not n else 1.0 / n
        value = None if reduction == "none" else given.empty((), "float64")
        values = given.empty((n,), real) if reduction == "none" else None
        shapes = {"W": (c, d), "b": (c,), "X": (n, d)}
        kinds = {"W": weights.dtype, "b": weights.dtype if bias is None else bias.dtype, "X": given.dtype}
        found = {
            name: given.empty(shapes[name], real if kinds[name] == "uint8" else kinds[name])
            for name in wrt
        }  # fmt: skip
        wanted = Wanted(value, values, found.get("W"), found.get("b"), found.get("X"))
        if n == 0:
            _fill_empty(wanted, mean)
        else:
            data = Data(given, None, None, y, n, multipliers, total, weighted)
            Layer(
                loss, data, weights, bias, PLAIN, wanted, factor * unit, unit, mean and weighted, pulled, chunk_rows
            ).run()
        result = values if value is None else value
        assert result is not None
        return result.owner, {name: view.owner for name, view in found.items()}


def _typed(view: View, dtype: str) -> View:
    """The same array, as if of another type: what targets are checked by."""
    return View(view.owner, view.pointer, view.shape, view.strides, dtype, view.gpu, view.library)


def rescale(gradients: list[Any], factor: Any) -> None:
    """gradients ← factor · gradients in place; factor is a number on the GPU (float64), and 1 costs next to nothing."""
    number = arrays.view(factor, "the factor")
    with device.on(number.gpu):
        for gradient in gradients:
            view = arrays.view(gradient, "the gradient")
            few = features.FEW_THREADS
            blocks = max(1, min(-(-view.size // few), 8 * device.limits().multiprocessors))
            features.rescale_kernel(view.dtype).launch(
                blocks, few, 0, view.stream, view.pointer, view.size, number.pointer, blocks, few
            )


class DeviceObjective(LinearObjective):
    """`LinearObjective` for X on a GPU: values are arrays there (of no dimension), gradients are like W.

    `rows` may be an array of the host or the GPU; the latter is copied to the host to be checked. L-BFGS (`flat`) takes
    host vectors: it raises.
    """

    def __init__(
        self, loss: Any, X: Any, targets: Any, *, penalty: Any = None, bias: bool = True, sample_weight: Any = None,
        reduction: str = "mean", shift: Any = None, scale: Any = None, chunk_rows: int | None = None,
        backend: str | None = None, n_threads: int | None = None,
    ) -> None:  # fmt: skip
        from fastloss.linear import _check_loss

        driver.require()
        self.loss = _check_loss(loss)
        if penalty is not None and not isinstance(penalty, penalties.Penalty):
            raise TypeError(f"penalty is {penalty!r}; it must be a penalty, such as fastloss.L2(1e-3), or None")
        checks.one_of(reduction, "reduction", ("mean", "sum"))
        if not isinstance(bias, bool):
            raise TypeError(f"bias is {bias!r}; it must be True or False")
        threads.resolve(n_threads)
        self.penalty, self.bias, self.reduction, self.backend, self.n_threads = (
            penalty, bias, reduction, backend, n_threads,
        )  # fmt: skip
        self.chunk_rows = None if chunk_rows is None else checks.integer(chunk_rows, "chunk_rows", low=1)
        self.coefficients = _coefficients(penalty)
        self.X = X
        self.features = _features(X)
        n, d = self.features.shape
        real = features_type(self.features.dtype)
        self.dtype = np.dtype(real)
        self._given_targets, self._targets_for = targets, 0
        self._sample_weight: Any = _weights_of(sample_weight, self.features, n)
        if self._sample_weight is not None and self._sample_weight.dtype != "float64":
            host = self._sample_weight.to_host().astype(np.float64)
            self._sample_weight = self.features.from_host(host)
        shift = None if shift is None else checks.finite(checks.vector(_host(shift), "shift", d, "feature"), "shift")
        scale = None if scale is None else checks.finite(checks.vector(_host(scale), "scale", d, "feature"), "scale")
        if scale is not None and not scale.all():
            raise ValueError(f"scale[{int(np.argmin(scale != 0))}] is 0; the features are divided by it")
        self.folded, self.centring = PLAIN, None
        rest = None
        if shift is not None:
            with np.errstate(over="ignore"):
                centre = shift.astype(self.dtype)
            if not np.isfinite(centre).all():
                position = int(np.argmin(np.isfinite(centre)))
                raise ValueError(
                    f"shift[{position}] is {shift[position]}, too large for {real}, which X is computed in"
                )
            self.centring = self.features.from_host(centre)
            rest = shift - centre if (shift != centre).any() else None
        self.folded = Folded(*(None if a is None else self.features.from_host(a) for a in (scale, rest)))

    def _targets(self, c: int) -> View:
        if self._targets_for != c:
            like = _typed(self.features, self.dtype.name)
            self.labels = driver._targets(self._given_targets, like, self.loss, self.features.shape[0], c)
            self.loss.check_classes(c, self.labels.ndim == 2)
            self._targets_for = c
        return self.labels

    def _weights(self, W: Any) -> View:
        columns = self.features.shape[1] + self.bias
        view = arrays.view(W, "W") if arrays.is_device(W) else None
        c = view.shape[0] if view is not None and view.ndim == 2 else 1
        what = f"X has {self.features.shape[1]} features" + (" and the bias takes the last column" if self.bias else "")
        return _like(W, "W", self.features, (max(1, c), columns), what)

    def _rows_of(self, c: int, rows: Any) -> Data:
        """The rows of a call with c classes."""
        y, weight, n, index = self._targets(c), self._sample_weight, self.features.shape[0], None
        if rows is not None:
            picked = checks.rows(_host(rows), n)
            outside = (picked < 0) | (picked >= n)
            if outside.any():
                checks.raise_bad_row(picked, int(outside.argmax()), n)
            index, n, stream = self.features.from_host(picked.astype(np.int64)), len(picked), self.features.stream
            y = self._picked(y, index, n, "int64" if y.ndim == 1 else y.dtype, stream)
            weight = None if weight is None else self._picked(weight, index, n, "float64", stream)
        found = _folded_weights(self.loss, y, weight, n, c, self.features)
        return Data(self.features, index, self.centring, y, n, *found)

    def _data_call(self, W: View, rows: Any, grad: View | None) -> View:
        """The value without the penalty, and its gradient into `grad`."""
        d, mean = self.features.shape[1], self.reduction == "mean"
        data = self._rows_of(W.shape[0], rows)
        n, weighted = data.n, data.weighted
        unit = 1.0 if not mean or weighted or not n else 1.0 / n
        value = self.features.empty((), "float64")
        dW, db = (None, None) if grad is None else (_columns(grad, 0, d), _column(grad, d) if self.bias else None)
        wanted = Wanted(value, None, dW, db, None)
        if n == 0:
            if grad is not None:
                _fill_empty(Wanted(None, None, grad, None, None), mean)
            _fill_empty(Wanted(value, None, None, None, None), mean)
            return value
        b = _column(W, d) if self.bias else None
        layer = Layer(
            self.loss, data, _columns(W, 0, d), b, self.folded, wanted, unit, unit, mean and weighted, None,
            self.chunk_rows,
        )  # fmt: skip
        layer.run()
        return value

    def _picked(self, source: View, index: View, n: int, dtype: str, stream: int) -> View:
        """Rows of targets, probabilities or weights, by index."""
        shape = (n, *source.shape[1:])
        out, few, c = source.empty(shape, dtype), features.FEW_THREADS, math.prod(shape[1:])
        if n:
            kind = driver._index_kind(source) if dtype == "int64" else 0
            features.pick_kernel(dtype).launch(
                -(-n * c // few), few, 0, stream, source.pointer, kind, index.pointer, out.pointer, n, c, few
            )
        return out

    def _with_penalty(self, W: View, value: View, grad: View | None) -> None:
        square, absolute = self.coefficients
        if not square and not absolute:
            return
        c, d, few = W.shape[0], self.features.shape[1], features.FEW_THREADS
        stream, gpu = self.features.stream, self.features.gpu
        blocks = max(1, min(-(-c * d // few), 2 * device.limits().multiprocessors))
        sums = device.workspace(gpu, stream).get("penalty", blocks, np.float64)
        target = W if grad is None else grad
        features.penalise_kernel(W.dtype).launch(
            blocks, few, device.SCRATCH * 8, stream, W.pointer, W.strides[0], W.strides[1], target.pointer,
            target.strides[0], target.strides[1], c, d, float(square), float(absolute), int(grad is not None), sums,
            blocks, few,
        )  # fmt: skip
        features.add_up_kernel().launch(1, 1, 0, stream, sums, blocks, value.pointer)

    def _call(self, W: Any, rows: Any, out: Any, want_grad: bool, penalised: bool) -> tuple[Any, Any]:
        with device.on(self.features.gpu):
            driver.raise_errors(self.features.gpu)
            view = self._weights(W)
            grad = None
            if want_grad:
                grad = view.empty(view.shape, view.dtype) if out is None else _result(out, view, self.features)
            value = self._data_call(view, rows, grad)
            if penalised:
                self._with_penalty(view, value, grad)
            return value.owner, None if grad is None else grad.owner

    def value(self, W: Any, rows: Any = None) -> Any:
        """The objective at W, an array of no dimension; see `LinearObjective.value`."""
        return self._call(W, rows, None, False, True)[0]

    def value_and_grad(self, W: Any, rows: Any = None, out: Any = None) -> tuple[Any, Any]:
        """The objective at W and its gradient; see `LinearObjective.value_and_grad`."""
        return self._call(W, rows, out, True, True)

    def data_value_and_grad(self, W: Any, rows: Any = None, out: Any = None) -> tuple[Any, Any]:
        """As `value_and_grad`, without the penalty."""
        return self._call(W, rows, out, True, False)

    def values(self, W_stack: Any) -> Any:
        """The objective at K candidates `(K, C, D + 1)`, on a GPU one after the other: an array on the host (K,)."""
        stack = arrays.view(W_stack, "W_stack")
        if stack.ndim != 3:
            columns = self.features.shape[1] + self.bias
            raise ValueError(f"W_stack has shape {stack.shape}; it must be (K, C, {columns})")
        found = [self.value(W_stack[k]) for k in range(stack.shape[0])]
        return np.array([float(arrays.view(value, "value").to_host()) for value in found])

    def take(self, rows: Any = None, dtype: Any = None) -> Any:
        raise BackendError("rows of X are copied on the host; this objective's X is on a GPU: use X on the host")

    def hessp(self, W: Any, V: Any, rows: Any = None) -> Any:
        """The Hessian of the objective at W times V, an array like V; see `LinearObjective.hessp`.

        Products are the array library's, in the compute type.
        """
        with device.on(self.features.gpu):
            driver.raise_errors(self.features.gpu)
            view = self._weights(W)
            what = "W's shape"
            direction = _like(V, "V", self.features, view.shape, what)
            if self.penalty is not None and self.penalty.by == "prox":
                raise ValueError(f"penalty is {self.penalty!r}, which has no second derivative; use L2 or none")
            hessian.check(self.loss)
            data = self._rows_of(view.shape[0], rows)
            found = direction.empty(direction.shape, direction.dtype)
            mean, d = self.reduction == "mean", self.features.shape[1]
            db = _column(found, d) if self.bias else None
            wanted = Wanted(None, None, _columns(found, 0, d), db, None)
            scale = 1.0 / data.n if mean and data.n and not data.weighted else 1.0
            if data.n == 0:
                _fill_empty(Wanted(None, None, found, None, None), mean)
            else:
                layer, other = (
                    Layer(
                        self.loss, data, _columns(given, 0, d), _column(given, d) if self.bias else None, self.folded,
                        wanted, scale, 1.0, mean and data.weighted, None, self.chunk_rows,
                    )
                    for given in (view, direction)
                )  # fmt: skip
                layer.run_hessian(other)
            scratch = self.features.empty((), "float64")
            self._with_penalty(direction, scratch, found)
            return found.owner

    @property
    def flat(self) -> Any:
        raise BackendError("SciPy's optimisers take host vectors; this objective's X is on a GPU: use X on the host")


def _result(out: Any, W: View, X: View) -> View:
    if not arrays.is_device(out):
        raise TypeError(f"out is {type(out).__name__}; it must be an array on the GPU, as W is")
    view = driver._on_gpu(out, "out", W)
    if view.shape != W.shape or view.dtype != W.dtype:
        raise ValueError(f"out has shape {view.shape} and dtype {view.dtype}; it must have {W.shape} and {W.dtype}")
    for name, other in (("W", W), ("X", X)):
        if view.overlaps(other):
            raise ValueError(f"out overlaps {name}")
    return view


def _host(value: Any) -> Any:
    """An array of the host; one on the GPU is copied."""
    return arrays.view(value, "the array").to_host() if arrays.is_device(value) else value


def _columns(view: View, start: int, stop: int) -> View:
    """Some columns of a matrix, where they are; `owner` is cut for the products of its library."""
    owner = view.owner if products.of(view) is None else view.owner[:, start:stop]
    pointer = offset(view.pointer, start * view.strides[1], view.dtype)
    return View(owner, pointer, (view.shape[0], stop - start), view.strides, view.dtype, view.gpu, view.library)


def _column(view: View, k: int) -> View:
    owner = view.owner if products.of(view) is None else view.owner[:, k]
    pointer = offset(view.pointer, k * view.strides[1], view.dtype)
    return View(owner, pointer, view.shape[:1], view.strides[:1], view.dtype, view.gpu, view.library)


def _coefficients(penalty: Any) -> tuple[float, float]:
    """What a penalty is, as the factors of Σ w² and of Σ |w|."""
    if isinstance(penalty, penalties.ElasticNet):
        return penalty.strength * penalty.beta, penalty.strength
    if isinstance(penalty, penalties.L1):
        return 0.0, penalty.strength
    if isinstance(penalty, penalties.L2):
        return penalty.strength, 0.0
    if penalty is None or isinstance(penalty, penalties.MaxNorm):
        return 0.0, 0.0
    raise BackendError(f"backend 'cuda' does not know the penalty {penalty!r}; it knows L2, L1, ElasticNet and MaxNorm")
