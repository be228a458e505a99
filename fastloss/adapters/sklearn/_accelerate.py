"""scikit-learn's logistic regression on our kernels, while a block lasts.

`LogisticRegression` and `LogisticRegressionCV` make one object that computes loss, gradient and Hessian products of
their linear model, and hand its methods to a solver. Within the block, names in scikit-learn's module `_logistic` stand
for ours: the class of that object, whose methods build a `LinearObjective` for the arrays that they are given, and keep
it; and the solvers, which get one BLAS thread for what they do between our passes. A binary problem with one row of
weights v is the softmax of two rows, 0 and v.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any

import numpy as np
import sklearn

import fastloss as fl
from fastloss import blocks
from fastloss._checks import FLOAT32, FLOAT64, Array
from fastloss.sparse import is_sparse
from fastloss.train.minimise import load_scipy

#: Minor versions of scikit-learn whose internals are those described above.
KNOWN = ((1, 9),)


class AccelerationWarning(UserWarning):
    """scikit-learn computes something itself within `accelerate()`, and why."""


class _State:
    """What the blocks under way share: how many there are, what the names stood for, and what was warned of."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.blocks = 0
        self.before: dict[str, Any] = {}
        self.said: set[str] = set()

    def say(self, why: str, stacklevel: int = 3) -> None:
        """Warn, once for each reason while a block lasts."""
        with self.lock:
            new = why not in self.said
            self.said.add(why)
        if new:
            message = f"scikit-learn computes this itself: {why}"
            warnings.warn(message, AccelerationWarning, stacklevel=stacklevel)


_state = _State()


def _why_not_here() -> str | None:
    """Why nothing can be replaced in the scikit-learn that is installed; None if it can."""
    if tuple(map(int, sklearn.__version__.split(".")[:2])) not in KNOWN:
        known = ", ".join(".".join(map(str, version)) for version in KNOWN)
        return f"its version is {sklearn.__version__}, and accelerate() knows the internals of {known}"
    return None


def _why_not(base_loss: Any, X: Any, y: Any, sample_weight: Any) -> str | None:
    """Why a problem is not for our kernels; None if it is."""
    from sklearn._loss.loss import HalfBinomialLoss, HalfMultinomialLoss

    if type(base_loss) not in (HalfBinomialLoss, HalfMultinomialLoss):
        return f"the loss is {type(base_loss).__name__}"
    for name, array in {"X": X, "y": y, "sample_weight": sample_weight}.items():
        passes = (name == "X" and is_sparse(array)) or (name == "sample_weight" and array is None)
        if not isinstance(array, np.ndarray) and not passes:
            return f"{name} is of type {type(array).__name__}; fastloss takes NumPy arrays here, and sparse X"
    if X.dtype not in (FLOAT32, FLOAT64):
        return f"X has dtype {X.dtype}"
    if sample_weight is not None and not (np.isfinite(sample_weight).all() and (sample_weight >= 0).all()):
        return "sample_weight has negative entries, or some that are not finite"
    if X.shape[0] == 0 or (sample_weight is not None and not sample_weight.any()):
        return "there is no row of weight above 0"
    return None


def _make_loss(base: Any) -> Any:
    """Our class in place of scikit-learn's `LinearModelLoss`."""

    class LinearModelLoss(base):
        """scikit-learn's, with loss, gradient and Hessian products by fastloss where it can."""

        _made: tuple[Any, Any, Any, fl.LinearObjective | None] | None = None
        _kept: tuple[Array, Array] | None = None

        def objective(self, X: Any, y: Any, sample_weight: Any) -> fl.LinearObjective | None:
            """The objective without penalty, made once for the same arrays; None where scikit-learn is to compute."""
            made = self._made
            if made is None or not (made[0] is X and made[1] is y and made[2] is sample_weight):
                why, objective = _why_not(self.base_loss, X, y, sample_weight), None
                if why is None:
                    objective = fl.LinearObjective(
                        fl.Softmax(), X, y.astype(np.intp), bias=bool(self.fit_intercept), sample_weight=sample_weight
                    )
                else:
                    _state.say(why, stacklevel=5)
                self._made = made = (X, y, sample_weight, objective)
                self._kept = None
            return made[3]

        def unpack(self, coef: Array) -> Array:
            """W, from coefficients as scikit-learn's solvers have them."""
            if self.base_loss.is_multiclass:
                return np.reshape(coef, (self.base_loss.n_classes, -1), order="F")
            W = np.zeros((2, len(coef)), coef.dtype)
            W[1] = coef
            return W

        def pack(self, grad: Array, coef: Array) -> Array:
            """A gradient for W, as one for the coefficients."""
            if not self.base_loss.is_multiclass:
                return np.asarray(grad[1])
            return np.asfortranarray(grad) if coef.ndim == 2 else np.ravel(grad, order="F")

        def whole(self, objective: fl.LinearObjective, coef: Array, strength: float) -> tuple[float, Array]:
            W = self.unpack(coef)
            value, grad = objective.value_and_grad(W)
            weights = objective.penalised(W)
            value += 0.5 * float(strength) * float(np.square(weights, dtype=np.float64).sum())
            objective.penalised(grad)[...] += strength * weights
            return value, self.pack(grad, coef)

        def loss(
            self, coef: Any, X: Any, y: Any, sample_weight: Any = None, l2_reg_strength: float = 0.0,
            n_threads: int = 1, raw_prediction: Any = None,
        ) -> Any:  # fmt: skip
            objective = None if raw_prediction is not None else self.objective(X, y, sample_weight)
            if objective is None:
                return super().loss(coef, X, y, sample_weight, l2_reg_strength, n_threads, raw_prediction)
            # Line searches ask for the gradient there next, mostly, and both come of one pass.
            value, grad = self.whole(objective, coef, l2_reg_strength)
            self._kept = (np.append(coef.ravel(order="F"), l2_reg_strength), grad)
            return value

        def loss_gradient(
            self, coef: Any, X: Any, y: Any, sample_weight: Any = None, l2_reg_strength: float = 0.0,
            n_threads: int = 1, raw_prediction: Any = None,
        ) -> Any:  # fmt: skip
            objective = None if raw_prediction is not None else self.objective(X, y, sample_weight)
            if objective is None:
                return super().loss_gradient(coef, X, y, sample_weight, l2_reg_strength, n_threads, raw_prediction)
            return self.whole(objective, coef, l2_reg_strength)

        def gradient(
            self, coef: Any, X: Any, y: Any, sample_weight: Any = None, l2_reg_strength: float = 0.0,
            n_threads: int = 1, raw_prediction: Any = None,
        ) -> Any:  # fmt: skip
            objective = None if raw_prediction is not None else self.objective(X, y, sample_weight)
            if objective is None:
                return super().gradient(coef, X, y, sample_weight, l2_reg_strength, n_threads, raw_prediction)
            kept, self._kept = self._kept, None
            if kept is not None and np.array_equal(kept[0], np.append(coef.ravel(order="F"), l2_reg_strength)):
                return kept[1]
            return self.whole(objective, coef, l2_reg_strength)[1]

        def gradient_hessian_product(
            self, coef: Any, X: Any, y: Any, sample_weight: Any = None, l2_reg_strength: float = 0.0, n_threads: int = 1
        ) -> Any:
            objective = self.objective(X, y, sample_weight)
            if objective is None:
                return super().gradient_hessian_product(coef, X, y, sample_weight, l2_reg_strength, n_threads)
            W = self.unpack(coef)

            def hessp(s: Array) -> Array:
                V = self.unpack(s)
                product = objective.hessp(W, V)
                objective.penalised(product)[...] += l2_reg_strength * objective.penalised(V)
                return self.pack(product, coef)

            return self.whole(objective, coef, l2_reg_strength)[1], hessp

        def gradient_hessian(self, *args: Any, **kwargs: Any) -> Any:
            _state.say("newton-cholesky takes whole Hessian matrices; lbfgs and newton-cg are accelerated")
            return super().gradient_hessian(*args, **kwargs)

    return LinearModelLoss


def _one_blas_thread(function: Any, args: tuple[Any, ...]) -> AbstractContextManager[None]:
    """For a solver of the function: one BLAS thread, where it is ours that will compute."""
    owner = getattr(function, "__self__", None)
    ours = owner is not None and hasattr(owner, "objective") and owner.objective(*args[:3]) is not None
    return blocks.one_blas_thread() if ours else nullcontext()


class _Optimize:
    """`scipy.optimize`, with `minimize` for our functions on one BLAS thread."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def minimize(self, fun: Any, x0: Any, args: tuple[Any, ...] = (), **options: Any) -> Any:
        with _one_blas_thread(fun, args):
            return self._module.minimize(fun, x0, args=args, **options)


def _make_newton(newton_cg: Callable[..., Any]) -> Callable[..., Any]:
    def on_one_blas_thread(*positional: Any, **options: Any) -> Any:
        with _one_blas_thread(options.get("func"), options.get("args", ())):
            return newton_cg(*positional, **options)

    return on_one_blas_thread


@contextmanager
def accelerate() -> Iterator[None]:
    """Within the block, scikit-learn's `LogisticRegression` and `LogisticRegressionCV` compute by fastloss.

    For `solver="lbfgs"` (the default) and `"newton-cg"`, binary and multinomial, dense or sparse, float32 and float64.
    The algorithm stays scikit-learn's, so coefficients, iterations and warnings are the same up to rounding; passes
    over the data are fused, on all threads that fastloss may use. The other solvers run as ever.

    Afterwards all is as before, whatever happened inside. The block counts for all threads of the process; processes
    that it starts (as `n_jobs=2` does) compute as ever. Blocks may be nested, and run in several threads at a time.

    Warns
    -----
    AccelerationWarning
        Once for each reason why scikit-learn computes something itself: its version, arrays that are neither NumPy's
        nor sparse, negative sample weights, `solver="newton-cholesky"`.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.linear_model import LogisticRegression
    >>> from fastloss.adapters.sklearn import accelerate
    >>> X, y = load_iris(return_X_y=True)
    >>> with accelerate():
    ...     model = LogisticRegression(max_iter=1000).fit(X, y)
    >>> round(model.score(X, y), 3)
    0.973
    """
    module: Any = import_module("sklearn.linear_model._logistic")
    why = _why_not_here()
    if why is not None:
        _state.say(why, stacklevel=4)
    load_scipy()
    with _state.lock:
        _state.blocks += 1
        if _state.blocks == 1 and why is None:
            _state.before = {name: getattr(module, name) for name in ("LinearModelLoss", "optimize", "_newton_cg")}
            module.LinearModelLoss = _make_loss(module.LinearModelLoss)
            module.optimize = _Optimize(module.optimize)
            module._newton_cg = _make_newton(module._newton_cg)
    try:
        yield
    finally:
        with _state.lock:
            _state.blocks -= 1
            if _state.blocks == 0:
                for name, thing in _state.before.items():
                    setattr(module, name, thing)
                _state.before = {}
                _state.said.clear()
