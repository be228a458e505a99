"""Losses of a linear layer `scores = X Wᵀ + b`, fused with its gradients: one pass over X, no array of scores."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fastloss import _checks as checks
from fastloss import backends, blocks, driver, sparse, threads
from fastloss._checks import Array
from fastloss.losses import Loss
from fastloss.penalties import Penalty

FOLD_VALUES = 1 << 18  # of W, converted at a time
TINY_WEIGHT = 1e-20  # of picked rows beside the others: their products would be lost in float32


def _check_loss(loss: object) -> Loss:
    if not isinstance(loss, Loss):
        raise TypeError(f"loss is {loss!r}; it must be a loss, such as fastloss.Softmax() or fastloss.Hinge()")
    return loss


def _layer(backend: backends.Backend, X: Any) -> Callable[..., float]:
    """`Backend.linear_rows` for such features."""
    return functools.partial(sparse.linear_rows, backend) if isinstance(X, sparse.Csr) else backend.linear_rows


def on_host(objective: object) -> LinearObjective:
    """An objective given as an argument, whose X must be an array of the host."""
    if not isinstance(objective, LinearObjective):
        raise TypeError(f"objective is {type(objective).__name__}; it must be a fastloss.LinearObjective")
    if not isinstance(objective.X, np.ndarray | sparse.Csr):
        raise TypeError("objective has X on a GPU; this takes arrays of the host")
    return objective


class LinearObjective:
    """The objective of a linear classifier: a loss of `X Wᵀ + b` over all rows, or some, plus a penalty on W.

    W is `(C, D + 1)` with the bias in the last column, or `(C, D)` for `bias=False`.

    Parameters
    ----------
    loss : Softmax, Hinge or Logistic
    X : array or SciPy sparse array (N, D)
        Features, of any real type; used as they are, never copied or converted as a whole. Computed in float32
        (16-bit floats, uint8, float32) or float64. Sparse: CSR with sorted indices and float32 or float64 values is
        used as it is, anything else is converted to that once; never made dense, but gradients are. Gradients over all
        rows keep a copy of it by columns from the first on: as many numbers and row indices as X has entries.
    targets : array (N,) of integers, or (N, C): for Softmax probabilities, for Logistic labels
        Copied: later changes to the array do not count.
    penalty : L2, L1, ElasticNet or MaxNorm, optional
        On the weights, not on the bias.
    bias : bool
        Whether W has a last column for the bias.
    sample_weight : array (N,), optional
        Finite, at least 0.
    reduction : {"mean", "sum"}
        With w the applied weights: Σ w ℓ / Σ w over the rows, or Σ w ℓ.
    shift, scale : array (D,), optional
        The features are taken as `(X − shift) / scale`; X itself stays as it is. The scale is folded into W; the
        shift is subtracted from features as they are loaded, so that large means cost no digits. Of sparse X the
        shift is folded into the bias.
    chunk_rows : int, optional
        With many classes rows are handled in chunks of this many, which bounds memory; the default is a good one.
    backend, n_threads
        As in `Loss.value`; for every call of this objective.

    Raises
    ------
    ValueError, TypeError
        For arguments that do not fit together.

    X may be on a GPU, then so must W: values are arrays there, without dimensions, and nothing waits for it. There is
    no `flat` then; `rows`, `shift` and `scale` are read by the host.

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> X, y = np.eye(3), np.arange(3)
    >>> objective = fl.LinearObjective(fl.Hinge(), X, y, penalty=fl.L2(0.1))
    >>> value, grad = objective.value_and_grad(np.zeros((3, 4)))
    >>> value, grad.shape
    (2.0, (3, 4))
    """

    def __new__(cls, loss: Loss, X: object, *arguments: Any, **options: Any) -> LinearObjective:
        if cls is LinearObjective and type(X) is not np.ndarray and driver.on_gpu(X, options.get("backend")):
            from fastloss.gpu.linear import DeviceObjective

            return super().__new__(DeviceObjective)
        return super().__new__(cls)

    def __init__(
        self,
        loss: Loss,
        X: object,
        targets: object,
        *,
        penalty: Penalty | None = None,
        bias: bool = True,
        sample_weight: object = None,
        reduction: str = "mean",
        shift: object = None,
        scale: object = None,
        chunk_rows: int | None = None,
        backend: str | None = None,
        n_threads: int | None = None,
    ) -> None:
        self.loss = _check_loss(loss)
        self.X = sparse.features(X)
        if isinstance(self.X, sparse.Csr):
            self.X.is_reused = True
        n, d = self.X.shape
        if penalty is not None and not isinstance(penalty, Penalty):
            raise TypeError(f"penalty is {penalty!r}; it must be a penalty, such as fastloss.L2(1e-3), or None")
        checks.one_of(reduction, "reduction", ("mean", "sum"))
        if not isinstance(bias, bool):
            raise TypeError(f"bias is {bias!r}; it must be True or False")
        self.penalty, self.bias, self.reduction = penalty, bias, reduction
        self.dtype = checks.compute_dtype(self.X.dtype, "X")
        self.chunk_rows = None if chunk_rows is None else checks.integer(chunk_rows, "chunk_rows", low=1)
        self.backend, self.n_threads = backend, n_threads
        threads.resolve(n_threads)
        if backend is not None:
            backends.get(backend)

        y = checks.as_array(targets, "targets")
        y = checks.targets(y, n, y.shape[1] if y.ndim == 2 else 0)
        self.targets = y.astype(self.dtype) if y.ndim == 2 else y.copy()
        self.targets.flags.writeable = False
        if self.targets.ndim == 2:
            loss.check_probabilities()
            checks.finite_nonnegative(y, "targets", loss.most_of_targets)
        self._needs = driver.needs(loss, self.targets, ())
        self._checked_for = 0
        weight = None if sample_weight is None else checks.weights(sample_weight, "sample_weight", n, "row of X")
        self._sample_weight = weight
        self._shift = None if shift is None else checks.finite(checks.vector(shift, "shift", d, "feature"), "shift")
        self._scale = None if scale is None else checks.finite(checks.vector(scale, "scale", d, "feature"), "scale")
        if self._scale is not None and not self._scale.all():
            position = int(np.argmin(self._scale != 0))
            raise ValueError(f"scale[{position}] is 0; the features are divided by it")
        #: Subtracted from the features as they are loaded, in the compute type: what is left of large means is exact.
        self.centre: Array | None = None
        self._rest: Array | None = None  # of the shift, beyond the centre's precision
        if self._shift is not None and isinstance(self.X, sparse.Csr):
            self._rest = self._shift
        elif self._shift is not None:
            with np.errstate(over="ignore"):
                self.centre = self._shift.astype(self.dtype)
            if not np.isfinite(self.centre).all():
                position = int(np.argmin(np.isfinite(self.centre)))
                raise ValueError(
                    f"shift[{position}] is {self._shift[position]}, too large for {self.dtype}, which X is computed in"
                )
            rest = self._shift - self.centre
            self._rest = rest if rest.any() else None

    # `__new__` has none of the parameters' names, and would be shown.
    __signature__ = inspect.signature(__init__)
    __signature__ = __signature__.replace(parameters=list(__signature__.parameters.values())[1:])

    def check_weights(self, W: object, ndim: int = 2, name: str = "W") -> Array:
        """W, checked; and, once for each number of classes, the targets and the row multipliers that go with it."""
        array = checks.as_array(W, name)
        columns = self.X.shape[1] + self.bias
        if array.ndim != ndim or array.shape[-1] != columns or array.shape[-2] == 0:
            wanted = f"{'(K, C, ' if ndim == 3 else '(C, '}{columns})"
            what = f"X has {self.X.shape[1]} features" + (" and the bias takes the last column" if self.bias else "")
            raise ValueError(f"{name} has shape {array.shape}; it must be {wanted}: {what}")
        n_classes = array.shape[-2]
        if n_classes != self._checked_for:
            self.loss.check_classes(n_classes, self.targets.ndim == 2)
            if self.targets.ndim == 2 and self.targets.shape[1] != n_classes:
                raise ValueError(
                    f"{name} has {n_classes} classes, but the target probabilities {self.targets.shape[1]}"
                )
            backend = self.choose_backend("gradient")
            driver.check_range(backend, self.loss, self.targets, n_classes)
            self.weights = driver.fold(
                self.loss, self.targets, self._sample_weight, self.dtype, self.reduction, backend
            )
            self._total = self.weights.total(len(self.X))
            self._checked_for = n_classes
        return array

    @property
    def _room(self) -> Any:
        """Where candidates and Hessian products of such features are at home."""
        return sparse if isinstance(self.X, sparse.Csr) else blocks

    def take(self, rows: object = None, dtype: DTypeLike | None = None) -> LinearObjective:
        """The same objective over some of the rows, with a copy of their features.

        Parameters
        ----------
        rows : array of int, optional
            Rows of X, in this order, repeats allowed; all by default.
        dtype : float32 or float64, optional
            What the features are converted to, and so what is computed in; by default they keep their type.

        Raises
        ------
        ValueError, TypeError, IndexError
            For arguments that do not fit.

        Examples
        --------
        >>> import numpy as np, fastloss as fl
        >>> objective = fl.LinearObjective(fl.Softmax(), np.eye(3, dtype=np.float32), np.arange(3))
        >>> objective.take([0, 2], dtype=np.float64).dtype
        dtype('float64')
        """
        if dtype is not None and np.dtype(dtype) not in (checks.FLOAT32, checks.FLOAT64):
            raise TypeError(f"dtype is {dtype!r}; it must be float32 or float64")
        picked: Any = slice(None) if rows is None else checks.picked_rows(rows, len(self.X))
        some = self.X[picked]
        features = some.astype(dtype or some.dtype) if sparse.is_sparse(some) else np.array(some, dtype)
        return LinearObjective(
            self.loss, features, self.targets[picked], penalty=self.penalty, bias=self.bias,
            sample_weight=None if self._sample_weight is None else self._sample_weight[picked],
            reduction=self.reduction, shift=self._shift, scale=self._scale, chunk_rows=self.chunk_rows,
            backend=self.backend, n_threads=self.n_threads,
        )  # fmt: skip

    @property
    def transforms(self) -> bool:
        """Whether the features are taken with a shift or a scale."""
        return self._shift is not None or self._scale is not None

    @property
    def row_scale(self) -> float:
        """What a row's loss, times its multiplier, counts in the objective."""
        return self.weights.scale(self.reduction, self._total)

    def choose_backend(self, verb: str) -> backends.Backend:
        """The backend that serves a call of this objective: verb is "gradient" (value and gradient) or "hvp"."""
        return backends.choose(self.backend, verb, self.loss, self.dtype, self._needs)

    def _rows(self, rows: object, backend: backends.Backend) -> tuple[Array | None, float]:
        """Row indices, checked, and the weight that a mean over them divides by."""
        if rows is None:
            return None, self._total
        picked = checks.rows(rows, len(self.X))
        position = backend.first_outside(picked, len(self.X), None)
        if position >= 0:
            checks.raise_bad_row(picked, position, len(self.X))
        return picked, self.weights.total(len(self.X), picked)

    def fold_in(self, W: Array) -> tuple[Array, Array | None]:
        """W and b for the features less `centre`, in the compute type: scale and the rest of the shift folded in."""
        if self._rest is None and self._scale is None:
            W = W.astype(self.dtype, copy=False)
            return (W[..., :-1], W[..., -1]) if self.bias else (W, None)
        given = W.reshape(-1, W.shape[-1])
        weights = np.empty((len(given), self.X.shape[1]), self.dtype)
        b = given[:, -1].astype(np.float64) if self.bias else np.zeros(len(given))
        for part in self._some_classes(len(given)):
            some = self.penalised(given)[part].astype(np.float64)
            if self._scale is not None:
                some /= self._scale
            if self._rest is not None:
                b[part] -= (some * self._rest).sum(axis=-1)  # not by BLAS, whose bits may depend on threads
            weights[part] = some
        folded_b = b.astype(self.dtype).reshape(W.shape[:-1]) if self.bias or self._rest is not None else None
        return weights.reshape(*W.shape[:-1], -1), folded_b

    def _fold_out(self, dW: Array, db: Array | None, out: Array) -> None:
        """The gradient for W as given into `out` (C, D), which may be dW, from that for the folded W."""
        for part in self._some_classes(len(dW)):
            some = dW[part].astype(np.float64)
            if self._rest is not None:
                assert db is not None
                some -= np.multiply.outer(db[part], self._rest)
            if self._scale is not None:
                some /= self._scale
            out[part] = some

    def _some_classes(self, n: int) -> list[slice]:
        """Parts of n rows of weights, for temporary copies in float64."""
        return blocks.cut(n, max(1, FOLD_VALUES // max(1, self.X.shape[1])))

    def _data(self, W: Array, rows: object, grad: Array | None) -> float:
        """Value of the loss without the penalty; its gradient into `grad` (C, D + 1)."""
        backend = self.choose_backend("gradient")
        picked, total = self._rows(rows, backend)
        folded = self.weights
        if 0 < total < TINY_WEIGHT:
            folded, total = folded.magnified(total)
        weights, b = self.fold_in(W)
        dW = db = None
        if grad is not None:
            # In the compute type gradients are written where they belong, and folded out in place.
            direct = grad.dtype == self.dtype
            dW = self.penalised(grad) if direct else np.empty(weights.shape, self.dtype)
            if self.bias and direct:
                db = grad[:, -1]
            elif self.bias or self._rest is not None:
                db = np.empty(len(weights), self.dtype)
        scale = folded.scale(self.reduction, total)
        value = _layer(backend, self.X)(
            self.loss, self.X, picked, self.centre, weights, b, self.targets, folded.multiplier, scale, dW, db, None,
            None, self.chunk_rows, threads.resolve(self.n_threads),
        )  # fmt: skip
        if grad is not None and dW is not None:
            if not direct or self._rest is not None or self._scale is not None:
                self._fold_out(dW, db, self.penalised(grad))
            if self.bias and not direct:
                grad[:, -1] = db
        return folded.reduce(value, self.reduction, total)

    def _gradient_out(self, W: Array, out: Array | None) -> Array:
        dtype = W.dtype if W.dtype.kind not in "iub" else self.dtype
        if out is None:
            return np.empty(W.shape, dtype)
        checks.out(out, "out", W.shape, dtype)
        checks.apart(out, "out", {"W": W, "X": getattr(self.X, "values", self.X), "targets": self.targets})
        return out

    def load_rows(self, rows: Any) -> Array:
        """Rows of X by a slice or indices as the loss takes them, `(X − shift) / scale`: a new array (N, D), dense
        where X is sparse."""
        some = self.X[rows]
        found: Array = (some.toarray() if sparse.is_sparse(some) else some).astype(self.dtype)
        if self._shift is not None:
            found -= self._shift.astype(self.dtype)
        if self._scale is not None:
            found /= self._scale.astype(self.dtype)
        return found

    def sparse_squares(self) -> Array:
        """The mean square of each feature of sparse X as the loss takes it (D,), every row weighing as it does."""
        weight = self.weights.multiplier
        weight = np.ones(len(self.X)) if weight is None or not weight.any() else weight.astype(np.float64)
        weight = np.repeat(weight / weight.sum(), np.diff(self.X.starts))
        values, d = self.X.values.astype(np.float64), self.X.shape[1]
        squares = np.bincount(self.X.indices, weight * values * values, d)
        if self._shift is not None:
            squares += self._shift * (self._shift - 2 * np.bincount(self.X.indices, weight * values, d))
        return squares if self._scale is None else squares / self._scale**2

    def sparse_moments(self, rows: Array, weight: Array) -> tuple[Array, Array]:
        """Of some rows of sparse X as the loss takes them, with weights that sum to 1: Σ w x xᵀ (D, D) and Σ w x."""
        some = self.X[rows].astype(np.float64)
        moments, mean = (some.T @ (some * weight[:, None])).toarray(), some.T @ weight
        if self._shift is not None:
            cross = np.multiply.outer(mean, self._shift)
            moments += np.multiply.outer(self._shift, self._shift) - cross - cross.T
            mean = mean - self._shift
        if self._scale is not None:
            moments, mean = moments / np.multiply.outer(self._scale, self._scale), mean / self._scale
        return moments, mean

    def penalised(self, W: Array) -> Array:
        """The part of W (or of a gradient) that the penalty acts on: all but the bias."""
        return W[..., :-1] if self.bias else W

    def value(self, W: object, rows: object = None) -> float:
        """The objective at W, over all rows or those given by index.

        Parameters
        ----------
        W : array (C, D + 1), or (C, D) without bias
        rows : array of int, optional
            Rows of X to use, in this order, repeats allowed.
        """
        array = self.check_weights(W)
        value = self._data(array, rows, None)
        return value if self.penalty is None else value + self.penalty.value(self.penalised(array))

    def value_and_grad(self, W: object, rows: object = None, out: Array | None = None) -> tuple[float, Array]:
        """The objective at W and its gradient, an array like W (into `out`, if given).

        For L1 and ElasticNet the gradient is a subgradient (0 where a weight is 0). Parameters as for `value`.
        """
        array = self.check_weights(W)
        grad = self._gradient_out(array, out)
        value = self._data(array, rows, grad)
        penalty = self.penalty
        if penalty is not None and penalty.by == "gradient" and array.dtype == grad.dtype:
            weights, workers = self.penalised(array), threads.resolve(self.n_threads)
            backend = self.choose_backend("gradient")
            value += 0.5 * penalty.decay * backend.shrink(weights, self.penalised(grad), penalty.decay, workers)
        elif penalty is not None:
            penalty_value, penalty_grad = penalty.value_and_grad(self.penalised(array))
            value += penalty_value
            self.penalised(grad)[...] += penalty_grad
        return value, grad

    def data_value_and_grad(self, W: object, rows: object = None, out: Array | None = None) -> tuple[float, Array]:
        """As `value_and_grad`, without the penalty: what proximal methods step along."""
        array = self.check_weights(W)
        grad = self._gradient_out(array, out)
        return self._data(array, rows, grad), grad

    def data_value(self, W: object, rows: object = None) -> float:
        """As `value`, without the penalty."""
        return self._data(self.check_weights(W), rows, None)

    def values(self, W_stack: object) -> Array:
        """The objective at K candidates `(K, C, D + 1)`, in one pass over X: array (K,) of float64."""
        stack = self.check_weights(W_stack, ndim=3, name="W_stack")
        backend = self.choose_backend("gradient")
        weights, b = self.fold_in(stack)
        flat, flat_b = weights.reshape(-1, self.X.shape[1]), None if b is None else b.ravel()
        sums = self._room.values(
            backend, self.loss, self.X, self.centre, flat, flat_b, len(stack), self.targets, self.weights.multiplier,
            self.chunk_rows, threads.resolve(self.n_threads),
        )  # fmt: skip
        values = np.array([self.weights.reduce(float(v), self.reduction, self._total) for v in sums])
        if self.penalty is not None:
            values += [self.penalty.value(self.penalised(W)) for W in stack]
        return values

    def hessp(self, W: object, V: object, rows: object = None) -> Array:
        """The Hessian of the objective at W times V, both `(C, D + 1)`; for Hinge(power=2) a generalised Hessian.

        Raises
        ------
        BackendError
            If the loss has no second derivative, as Hinge(power=1).
        ValueError
            If the penalty has none (L1, ElasticNet).
        """
        array, direction = self.check_weights(W), checks.as_array(V, "V")
        if direction.shape != array.shape:
            raise ValueError(f"V has shape {direction.shape}; it must have W's, {array.shape}")
        if self.penalty is not None and self.penalty.by == "prox":
            raise ValueError(f"penalty is {self.penalty!r}, which has no second derivative; use L2 or none")
        backend = self.choose_backend("hvp")
        picked, total = self._rows(rows, backend)
        (weights, b), (along, along_b) = self.fold_in(array), self.fold_in(direction)
        HW, Hb = self._room.hvp(
            backend, self.loss, self.X, picked, self.centre, weights, b, along, along_b, self.targets,
            self.weights.multiplier, self.chunk_rows, threads.resolve(self.n_threads),
        )  # fmt: skip
        scale = self.weights.scale(self.reduction, total)
        HW, Hb = HW * scale, Hb * scale
        if self._rest is not None or self._scale is not None:
            self._fold_out(HW, Hb, HW)
        if self.penalty is not None and self.penalty.by == "gradient":
            HW += self.penalty.value_and_grad(self.penalised(direction))[1]
        product = np.concatenate([HW, Hb[:, None]], axis=1) if self.bias else HW
        return product.astype(direction.dtype if direction.dtype.kind == "f" else self.dtype)

    @property
    def flat(self) -> Flat:
        """The objective over flat vectors, for `scipy.optimize.minimize(objective.flat, w0, jac=True)`.

        Raises ValueError if the penalty has no gradient (L1, ElasticNet) or is a constraint (MaxNorm).
        """
        if self.penalty is not None and self.penalty.by != "gradient":
            raise ValueError(
                f"penalty is {self.penalty!r}, which has no gradient everywhere; use L2, or a proximal method"
            )
        return Flat(self)


class Flat:
    """`LinearObjective` over flat vectors of C · (D + 1) numbers: value and gradient, always in a fresh array."""

    def __init__(self, objective: LinearObjective) -> None:
        self.objective = objective

    def _unflatten(self, w: object, name: str) -> Array:
        columns = self.objective.X.shape[1] + self.objective.bias
        array = checks.as_array(w, name)
        if array.ndim != 1 or array.size == 0 or array.size % columns:
            raise ValueError(f"{name} has shape {array.shape}; it must be (C * {columns},), the rows of W one by one")
        return array.reshape(-1, columns)

    def __call__(self, w: object) -> tuple[float, Array]:
        value, grad = self.objective.value_and_grad(self._unflatten(w, "w"))
        return value, grad.ravel()

    def hessp(self, w: object, v: object) -> Array:
        """The Hessian at w times v, both flat; for `minimize(..., hessp=objective.flat.hessp)`."""
        return self.objective.hessp(self._unflatten(w, "w"), self._unflatten(v, "v")).ravel()


def linear_value_and_grad(
    loss: Loss,
    X: object,
    W: object,
    targets: object,
    b: object = None,
    *,
    wrt: tuple[str, ...] = ("W", "b", "X"),
    sample_weight: object = None,
    reduction: str = "mean",
    upstream: object = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
    n_threads: int | None = None,
) -> tuple[Any, dict[str, Array]]:
    """The loss of `X Wᵀ + b` and its gradients: large output layers, without an array of N × C scores.

    Parameters
    ----------
    loss : Softmax, Hinge or Logistic
    X : array or SciPy sparse array (N, D)
    W : array (C, D)
    targets : array (N,) of integers, or (N, C): for Softmax probabilities, for Logistic labels
    b : array (C,), optional
    wrt : tuple of "W", "b", "X"
        The gradients to compute; leaving out "X" saves a product of its size, and must be done where X is sparse.
        "b" may be asked for without `b` (0).
    sample_weight, reduction, upstream, backend, n_threads
        As in `Loss.value_and_grad`. With `reduction="none"` the gradients are those of Σ upstream · w ℓ.
    chunk_rows : int, optional
        Rows handled at a time when there are many classes.

    X and W may be on a GPU: then so are the results, and many classes take CuPy's or PyTorch's arrays.

    Returns
    -------
    value : float, or array (N,) for `reduction="none"`
    grads : dict
        For each name in `wrt` an array like the argument, of its dtype (that of W for "b" without `b`).

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> X, W = np.ones((4, 3), np.float32), np.zeros((5, 3), np.float32)
    >>> value, grads = fl.linear_value_and_grad(fl.Softmax(), X, W, np.arange(4), wrt=("W",))
    >>> round(value, 4), grads["W"].shape
    (1.6094, (5, 3))
    """
    _check_loss(loss)
    if type(X) is not np.ndarray and driver.on_gpu(X, backend):
        from fastloss.gpu import linear as on_gpu

        threads.resolve(n_threads)
        return on_gpu.linear_call(loss, X, W, targets, b, wrt, sample_weight, reduction, upstream, chunk_rows)
    features = sparse.features(X)
    weights = checks.matrix(W, "W", "(C, D): a row of D weights for each of C classes")
    n, d = features.shape
    if weights.shape[1] != d or len(weights) == 0:
        raise ValueError(f"W has shape {weights.shape}; it must be (C, {d}), as X has {d} features")
    c = len(weights)
    bias = None if b is None else checks.as_array(b, "b")
    if bias is not None and bias.shape != (c,):
        raise ValueError(f"b has shape {bias.shape}; it must be ({c},): one for each row of W")
    if isinstance(wrt, str) or not set(wrt) <= {"W", "b", "X"}:
        raise ValueError(f'wrt is {wrt!r}; it must be a tuple of "W", "b" and "X"')
    if "X" in wrt and isinstance(features, sparse.Csr):
        raise ValueError(f'wrt is {wrt!r}, but X is sparse, and its gradient would not be; leave out "X"')
    checks.one_of(reduction, "reduction", checks.REDUCTIONS)
    y = checks.targets(targets, n, c)
    loss.check_classes(c, y.ndim == 2)
    if y.ndim == 2:
        loss.check_probabilities()
    weight = None if sample_weight is None else checks.weights(sample_weight, "sample_weight", n, "row of X")
    factor = 1.0 if upstream is None else driver.check_upstream(upstream, reduction, n)
    chunk_rows = None if chunk_rows is None else checks.integer(chunk_rows, "chunk_rows", low=1)
    workers = threads.resolve(n_threads)
    dtype = checks.compute_dtype(features.dtype, "X")
    chosen = backends.choose(backend, "gradient", loss, dtype, driver.needs(loss, y, ()))
    driver.check_range(chosen, loss, y, c, workers)

    folded = driver.fold(loss, y, weight, dtype, reduction, chosen, workers)
    multiplier, total = folded.multiplier, folded.total(n)
    like = {"W": weights, "b": np.empty(c, weights.dtype) if bias is None else bias, "X": features}
    found = {name: np.empty(like[name].shape, dtype) for name in wrt}
    row_loss = np.empty(n, dtype) if reduction == "none" else None
    weights, bias = weights.astype(dtype, copy=False), None if bias is None else bias.astype(dtype)
    layer = _layer(chosen, features)
    common = (loss, features, None, None, weights, bias, y)
    gradients = (found.get("W"), found.get("b"), found.get("X"))
    if isinstance(factor, np.ndarray):
        pulled, twice = driver.pull(factor, multiplier, dtype)
        value = 0.0  # of no use: this is reduction="none"
        if twice:
            layer(*common, multiplier, 1.0, None, None, None, row_loss, chunk_rows, workers)
        layer(*common, pulled, folded.unit, *gradients, None if twice else row_loss, chunk_rows, workers)
    else:
        scale = folded.scale(reduction, total) * factor
        value = layer(*common, multiplier, scale, *gradients, row_loss, chunk_rows, workers)
    for name, array in found.items():
        if like[name].dtype.kind not in "iub":
            found[name] = array.astype(like[name].dtype, copy=False)
    if row_loss is not None:
        return folded.row_values(row_loss), found
    return folded.reduce(value, reduction, total), found
