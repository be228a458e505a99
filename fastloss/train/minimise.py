"""Minimising an objective over all rows with SciPy's solvers, and what every solver of this room gives back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastloss import _checks as checks
from fastloss import blocks
from fastloss._checks import Array
from fastloss.linear import LinearObjective
from fastloss.train.descent import DivergenceError, _initial

Callback = Callable[[Array, float], object]

#: Relative decrease of the objective below which L-BFGS sees nothing but rounding.
RELATIVE_DECREASE = 64 * float(np.finfo(float).eps)
#: Evaluations that the line search of L-BFGS may take for one step.
LINE_SEARCH = 50


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
def load_scipy() -> Any:
    """`scipy.optimize`, its BLAS known to our switch from now on."""
    import scipy.optimize

    blocks.one_blas_thread.look_again()
    return scipy.optimize


def minimise(function: Any, w: Array, **options: Any) -> Any:
    """`scipy.optimize.minimize` with one BLAS thread: what it does between our passes is small, and the library's
    other threads, which go on spinning after it, would take their time from our next pass.
    """
    optimize = load_scipy()
    with blocks.one_blas_thread():
        return optimize.minimize(function, w, jac=True, **options)


class _Flat:
    """The objective for SciPy: flat float64 vectors, passes counted, the largest entry of the last gradient kept."""

    def __init__(self, objective: LinearObjective, shape: tuple[int, ...]) -> None:
        self.flat, self.shape, self.dtype = objective.flat, shape, objective.dtype
        self.n_evaluations, self.value, self.steepest = 0, np.inf, np.inf
        self._at: Array | None = None

    def __call__(self, w: Array) -> tuple[float, Array]:
        value, grad = self.flat(w)
        if self.n_evaluations == 0:
            check_finite(value)
        self.n_evaluations += 1
        self.value, self.steepest, self._at = value, float(np.abs(grad).max(initial=0)), w.copy()
        return value, grad

    def hessp(self, w: Array, v: Array) -> Array:
        self.n_evaluations += 1
        return self.flat.hessp(w, v)

    def steepest_at(self, w: Array) -> float:
        """The largest entry of the gradient at w; it costs nothing where w is what was evaluated last."""
        if self._at is None or not np.array_equal(self._at, w):
            self(w)
        return self.steepest

    def unmoved(self, first: Array, tol: float) -> Solution:
        """The solution that no step led to."""
        converged = self.steepest_at(first.ravel().astype(np.float64)) <= tol
        message = "the gradient is within tol at the start" if converged else "max_iter is 0"
        return Solution(first, self.value, 0, self.n_evaluations, converged, message)

    def unflatten(self, w: Array) -> Array:
        return w.reshape(self.shape).astype(self.dtype)

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
    Zhu, Byrd, Lu, Nocedal, "Algorithm 778: L-BFGS-B", 1997.

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> from fastloss.train import lbfgs
    >>> objective = fl.LinearObjective(fl.Softmax(), np.eye(3), np.arange(3), penalty=fl.L2(0.1))
    >>> found = lbfgs(objective, tol=1e-8)
    >>> found.converged, round(found.value, 6)
    (True, 0.885697)
    """
    first = start(objective, W, n_classes, tol, max_iter, callback)
    checks.integer(memory, "memory", low=1)
    checks.number(relative_decrease, "relative_decrease", low=0)
    function = _Flat(objective, first.shape)
    options = {
        "maxiter": max_iter,
        "maxfun": (max_iter + 1) * LINE_SEARCH,
        "maxls": LINE_SEARCH,
        "maxcor": memory,
        "gtol": tol,
        "ftol": relative_decrease,
    }
    after = _stopping(function, callback, lambda w: False)
    w = first.ravel().astype(np.float64)
    if max_iter == 0:  # SciPy's would take a step
        return function.unmoved(first, tol)
    found = minimise(function, w, method="L-BFGS-B", options=options, callback=after)
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
    (True, 0.885697)
    """
    first = start(objective, W, n_classes, tol, max_iter, callback)
    objective.choose_backend("hvp")  # raises where there is no Hessian
    function = _Flat(objective, first.shape)
    w = first.ravel().astype(np.float64)

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
