"""Minimising an objective over all rows with SciPy's solvers, and what every solver of this room gives back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from fastloss import _checks as checks
from fastloss import blocks, threads
from fastloss._checks import Array
from fastloss.linear import LinearObjective
from fastloss.sparse import Csr
from fastloss.train.descent import DivergenceError, _initial

Callback = Callable[[Array, float], object]

#: Relative decrease of the objective below which L-BFGS sees nothing but rounding.
RELATIVE_DECREASE = 64 * float(np.finfo(float).eps)
#: Evaluations that the line search of L-BFGS may take for one step.
LINE_SEARCH = 50
#: Rows whose second moments a preconditioner takes, at least; rows at a time; and what is added to their diagonal, as a
#: part of its mean, so that features which depend on each other do no harm.
SAMPLE, CHUNK, JITTER = 4096, 2048, 1e-6


@dataclass(frozen=True)
class Solution:
    """What a solver gives back.

    Attributes
    ----------
    W : array (C, D + 1), or (C, D) without bias
        The weights, in the type that the objective is computed in.
    value : float
        The objective there, penalty included.
    n_iter, n_evaluations : int
        Iterations, and passes over the data for a value with or without its gradient, or for a Hessian product.
    converged : bool
        Whether the solver's own test was met.
    message : str
        Why it ended, in words.
    """

    W: Array
    value: float
    n_iter: int
    n_evaluations: int
    converged: bool
    message: str


def start(
    objective: object, W: object, n_classes: int | None, tol: float, max_iter: int, callback: Callback | None
) -> Array:
    """The arguments that all solvers have, checked; the weights to start from."""
    if not isinstance(objective, LinearObjective):
        raise TypeError(f"objective is {type(objective).__name__}; it must be a fastloss.LinearObjective")
    checks.number(tol, "tol", low=0)
    checks.integer(max_iter, "max_iter", low=0)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback is {callback!r}; it must be a function of W and the value, or None")
    first = _initial(objective, W, n_classes)
    objective.check_weights(first)
    return first


def check_finite(value: float) -> None:
    """Raise at the first value of all if it is none: no step is defined from there."""
    if not np.isfinite(value):
        raise DivergenceError(
            f"the loss is {value} at the start: X or W has NaN, infinity or huge entries, or all rows have no weight",
            None,
        )


@functools.cache
def load_scipy(name: str = "optimize") -> Any:
    """A part of SciPy, its BLAS known to our switch from now on."""
    module = import_module(f"scipy.{name}")
    blocks.one_blas_thread.look_again()
    return module


def minimise(function: Any, w: Array, **options: Any) -> Any:
    """`scipy.optimize.minimize` with one BLAS thread: what it does between our passes is small, and the library's
    other threads, which go on spinning after it, would take their time from our next pass.
    """
    optimize = load_scipy()
    with blocks.one_blas_thread():
        return optimize.minimize(function, w, jac=True, **options)


class Preconditioner:
    """Variables V = W L in which an objective is about equally curved in all directions.

    L Lᵀ is the Hessian that all rows alike would give: their second moments (with a 1 for the bias), weighted, times
    the curvature of the loss at equal scores, and the penalty's. Up to a factor that is Böhning's bound on the Hessian
    of the softmax. Moments are of SAMPLE rows, or four for each feature, at most.

    References
    ----------
    Böhning, "Multinomial logistic regression algorithm", 1992.
    """

    def __init__(self, objective: LinearObjective, n_classes: int) -> None:
        n, d = objective.X.shape
        columns = d + objective.bias
        some = np.arange(0, n, max(1, n // max(SAMPLE, 4 * d)))
        multiplier = objective.weights.multiplier
        weight = np.ones(len(some)) if multiplier is None else multiplier[some].astype(np.float64)
        if not weight.any():
            weight[...] = 1
        weight /= weight.sum()
        moments = np.zeros((columns, columns))
        if isinstance(objective.X, Csr):
            moments[:d, :d], mean = objective.sparse_moments(some, weight)
            if objective.bias:
                moments[:d, d], moments[d, :d], moments[d, d] = mean, mean, 1
        else:
            self._add_dense(objective, some, np.sqrt(weight), moments)
        if not np.isfinite(moments).all():
            raise DivergenceError("X, shifted and scaled, has NaN, infinity or huge entries", None)
        if objective.loss.kind == "softmax":
            moments /= n_classes
        elif objective.loss.kind == "logistic":
            moments /= 4
        diagonal = np.diagonal(moments)
        lift = np.full(columns, JITTER * float(diagonal.mean()))
        if objective.penalty is not None:
            lift[:d] += objective.penalty.decay
        moments[np.diag_indices(columns)] += np.where(diagonal + lift > 0, lift, 1.0)
        self._linalg = load_scipy("linalg")
        with blocks.one_blas_thread():
            self._factor = self._linalg.cholesky(moments, lower=True, overwrite_a=True).astype(objective.dtype)

    @staticmethod
    def _add_dense(objective: LinearObjective, some: Array, root: Array, moments: Array) -> None:
        """Add the moments of some rows, times roots of their weights."""

        def add(rows: slice, features: slice, block: Array) -> None:
            moments[rows, features] += block

        with blocks.Workers(threads.resolve(objective.n_threads)) as workers:
            for part in blocks.cut(len(some), CHUNK):
                x = np.ones((part.stop - part.start, len(moments)), objective.dtype)
                x[:, : objective.X.shape[1]] = objective.load_rows(some[part])
                x *= root[part, None].astype(objective.dtype)
                blocks.multiply(workers, x.T, x, add)

    def _solve(self, right: Array, transposed: bool) -> Array:
        found = self._linalg.solve_triangular(
            self._factor, right.T.astype(self._factor.dtype), lower=True, trans=int(transposed), check_finite=False
        )
        return np.array(found.T, np.float64)

    def weights(self, V: Array) -> Array:
        """W = V L⁻¹, in the objective's precision."""
        return self._solve(V, transposed=True)

    def gradient(self, grad: Array) -> Array:
        """The gradient for V from that for W: G L⁻ᵀ."""
        return self._solve(grad, transposed=False)

    def variables(self, W: Array) -> Array:
        """V = W L."""
        with blocks.one_blas_thread():
            return np.asarray(W.astype(self._factor.dtype) @ self._factor, np.float64)


class _Flat:
    """The objective for SciPy: flat float64 vectors, passes counted, the largest entry of the last gradient kept.

    With a preconditioner the vectors are its variables; the gradient whose entries count is that for W.
    """

    def __init__(
        self, objective: LinearObjective, shape: tuple[int, ...], preconditioner: Preconditioner | None = None
    ) -> None:
        self.flat, self.shape, self.dtype = objective.flat, shape, objective.dtype
        self.preconditioner = preconditioner
        self.n_evaluations, self.value, self.steepest = 0, np.inf, np.inf
        self._at: Array | None = None

    def __call__(self, w: Array) -> tuple[float, Array]:
        value, grad = self.flat(self.weights(w).ravel())
        if self.n_evaluations == 0:
            check_finite(value)
        self.n_evaluations += 1
        self.value, self.steepest, self._at = value, float(np.abs(grad).max(initial=0)), w.copy()
        if self.preconditioner is not None:
            grad = self.preconditioner.gradient(grad.reshape(self.shape)).ravel()
        return value, grad

    def hessp(self, w: Array, v: Array) -> Array:
        self.n_evaluations += 1
        return self.flat.hessp(w, v)

    def variables(self, W: Array) -> Array:
        """The vector to start from."""
        W = W.astype(np.float64)
        return (W if self.preconditioner is None else self.preconditioner.variables(W)).ravel()

    def weights(self, w: Array) -> Array:
        V = w.reshape(self.shape)
        return V if self.preconditioner is None else self.preconditioner.weights(V)

    def steepest_at(self, w: Array) -> float:
        """The largest entry of the gradient at w; it costs nothing where w is what was evaluated last."""
        if self._at is None or not np.array_equal(self._at, w):
            self(w)
        return self.steepest

    def unmoved(self, first: Array, tol: float) -> Solution:
        """The solution that no step led to."""
        converged = self.steepest_at(self.variables(first)) <= tol
        message = "the gradient is within tol at the start" if converged else "max_iter is 0"
        return Solution(first, self.value, 0, self.n_evaluations, converged, message)

    def unflatten(self, w: Array) -> Array:
        return self.weights(w).astype(self.dtype)

    def solution(self, found: Any, converged: bool, message: str) -> Solution:
        return Solution(
            self.unflatten(found.x), float(found.fun), int(found.nit), self.n_evaluations, converged, message
        )


def _stopping(function: _Flat, callback: Callback | None, done: Callable[[Array], bool]) -> Callable[[Array], None]:
    """SciPy's callback: the caller's, which may end the run, and a test of our own."""

    def after(intermediate_result: Any) -> None:
        w = intermediate_result.x
        if callback is not None and callback(function.unflatten(w), float(intermediate_result.fun)):
            raise StopIteration
        if done(w):
            raise StopIteration

    return after


def lbfgs(
    objective: LinearObjective,
    W: object = None,
    *,
    n_classes: int | None = None,
    tol: float = 1e-4,
    max_iter: int = 100,
    memory: int = 10,
    relative_decrease: float = RELATIVE_DECREASE,
    precondition: bool | Preconditioner = False,
    callback: Callback | None = None,
) -> Solution:
    """Minimise an objective with a gradient by SciPy's L-BFGS, one fused pass over X for each evaluation.

    Parameters
    ----------
    objective : LinearObjective
        With L2 or no penalty.
    W : array (C, D + 1), or (C, D) without bias, optional
        Where to start; zeros by default.
    n_classes : int, optional
        C where W is not given; by default the targets tell.
    tol : float
        Ends when no entry of the gradient is larger.
    max_iter : int
        Iterations at most.
    memory : int
        Pairs of steps and changes of the gradient that are kept, at least 1.
    relative_decrease : float
        Ends, too, when an iteration brings less than this part of the objective.
    precondition : bool or Preconditioner
        Work in variables in which the objective is about equally curved in all directions: far fewer iterations where
        features are correlated, as pixels are. Takes D² numbers, D³ / 3 operations, and products as of 4 D rows; of
        sparse X too, which stays sparse.
    callback : function, optional
        Called with W and the value after each iteration; the run ends if it returns True.

    Returns
    -------
    Solution

    Raises
    ------
    ValueError, TypeError
        For arguments that do not fit, and penalties that have no gradient.
    DivergenceError
        If the objective is not finite at the start.

    References
    ----------
    Zhu, Byrd, Lu, Nocedal, "Algorithm 778: L-BFGS-B", 1997; Böhning, "Multinomial logistic regression algorithm", 1992
    (the preconditioner).

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> from fastloss.train import lbfgs
    >>> objective = fl.LinearObjective(fl.Softmax(), np.eye(3), np.arange(3), penalty=fl.L2(0.1))
    >>> found = lbfgs(objective, tol=1e-8)
    >>> found.converged, round(found.value, 6)
    (True, 0.751002)
    """
    first = start(objective, W, n_classes, tol, max_iter, callback)
    checks.integer(memory, "memory", low=1)
    checks.number(relative_decrease, "relative_decrease", low=0)
    _ = objective.flat  # raises for penalties without a gradient
    if not isinstance(precondition, bool | Preconditioner):
        raise TypeError(f"precondition is {precondition!r}; it must be True, False or a Preconditioner")
    if isinstance(precondition, bool):
        preconditioner = Preconditioner(objective, len(first)) if precondition else None
    else:
        preconditioner = precondition
    function = _Flat(objective, first.shape, preconditioner)
    options = {
        "maxiter": max_iter,
        "maxfun": (max_iter + 1) * LINE_SEARCH,
        "maxls": LINE_SEARCH,
        "maxcor": memory,
        "gtol": tol if preconditioner is None else 0.0,
        "ftol": relative_decrease,
    }

    def flat_enough(w: Array) -> bool:
        return preconditioner is not None and function.steepest_at(w) <= tol

    w = function.variables(first)
    if max_iter == 0 or flat_enough(w):  # SciPy's would take a step
        return function.unmoved(first, tol)
    after = _stopping(function, callback, flat_enough)
    found = minimise(function, w, method="L-BFGS-B", options=options, callback=after)
    if flat_enough(found.x):
        return function.solution(found, True, "the gradient is within tol")
    return function.solution(found, bool(found.success), str(found.message))


def newton_cg(
    objective: LinearObjective,
    W: object = None,
    *,
    n_classes: int | None = None,
    tol: float = 1e-4,
    max_iter: int = 100,
    callback: Callback | None = None,
) -> Solution:
    """Minimise an objective with a Hessian by SciPy's Newton method, whose steps conjugate gradients find.

    They need products of the Hessian with vectors alone, and each takes one pass over X (`LinearObjective.hessp`).
    For few iterations to high accuracy; `Hinge(power=2)` has a generalised Hessian, Hinge(power=1) none.

    The parameters, the result and what is raised are those of `lbfgs`; BackendError if the loss has no Hessian.

    References
    ----------
    Nocedal and Wright, Numerical Optimization, 2006, section 7.1.

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> from fastloss.train import newton_cg
    >>> objective = fl.LinearObjective(fl.Softmax(), np.eye(3), np.arange(3), penalty=fl.L2(0.1))
    >>> found = newton_cg(objective, tol=1e-8)
    >>> found.converged, round(found.value, 6)
    (True, 0.751002)
    """
    first = start(objective, W, n_classes, tol, max_iter, callback)
    objective.choose_backend("hvp")  # raises where there is no Hessian
    function = _Flat(objective, first.shape)
    w = function.variables(first)

    def flat_enough(w: Array) -> bool:
        return function.steepest_at(w) <= tol

    if flat_enough(w) or max_iter == 0:
        return function.unmoved(first, tol)
    after = _stopping(function, callback, flat_enough)
    options = {"maxiter": max_iter, "xtol": 0.0}
    found = minimise(function, w, method="Newton-CG", hessp=function.hessp, options=options, callback=after)
    if flat_enough(found.x):
        return function.solution(found, True, "the gradient is within tol")
    # With xtol=0 success means that a step was 0: less than the type of the weights can tell.
    return function.solution(found, bool(found.success), "no step changes W" if found.success else str(found.message))
