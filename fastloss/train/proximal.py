"""Accelerated proximal gradient steps: for penalties without a gradient (L1, ElasticNet) and constraints (MaxNorm)."""

from __future__ import annotations

import math

import numpy as np

from fastloss._checks import Array
from fastloss.linear import LinearObjective
from fastloss.train.minimise import Callback, Solution, check_finite, start

GROWTH, SHRINKING = 2.0, 0.9  # of the curvature, when a step fails its test, and after one that does not


def _inner(a: Array, b: Array) -> float:
    return float(np.sum(np.multiply(a, b, dtype=np.float64)))


def proximal_gradient(
    objective: LinearObjective,
    W: object = None,
    *,
    n_classes: int | None = None,
    tol: float = 1e-4,
    max_iter: int = 1000,
    callback: Callback | None = None,
) -> Solution:
    """Minimise an objective by accelerated proximal gradient steps (FISTA), with backtracking and restarts.

    The step size follows the curvature that is met, up and down. Where the last step and the momentum point in opposite
    directions, momentum is given up and gathered anew: without that the method oscillates where the objective is
    strongly convex. L1 sets weights to exactly 0.

    Parameters
    ----------
    objective : LinearObjective
        With any penalty, or none.
    tol : float
        Ends when no entry of the gradient mapping (Y − W) / η is larger, where W is the proximal step of size η from Y:
        where the penalty has a gradient, that is the gradient.
    max_iter : int
        Iterations at most; each takes one pass for a gradient, and one for a value or, where a step was too long, more.

    The other parameters, the result and what is raised are those of `lbfgs`.

    References
    ----------
    Beck and Teboulle, "A fast iterative shrinkage-thresholding algorithm", 2009; O'Donoghue and Candès, "Adaptive
    restart for accelerated gradient schemes", 2015; Scheinberg, Goldfarb, Bai, "Fast first-order methods for composite
    convex optimization with backtracking", 2014 (momentum when the step size changes).

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> from fastloss.train import proximal_gradient
    >>> X, y = np.array([[1.0, 0.1], [-1.0, 0.1], [2.0, -0.1], [-2.0, -0.1]]), np.array([0, 1, 0, 1])
    >>> objective = fl.LinearObjective(fl.Softmax(), X, y, penalty=fl.L1(0.1))
    >>> found = proximal_gradient(objective, tol=1e-6)
    >>> found.converged, (found.W[:, :-1] != 0).tolist()
    (True, [[True, False], [True, False]])
    """
    x = start(objective, W, n_classes, tol, max_iter, callback).astype(np.float64)
    penalty, penalised = objective.penalty, objective.penalised
    slack = 16 * float(np.finfo(objective.dtype).eps)  # what rounding leaves of a comparison of values
    n_evaluations = 0

    def proximal(at: Array, grad: Array, curvature: float) -> Array:
        moved = at - grad / curvature
        if penalty is not None:
            penalised(moved)[...] = penalty.step(penalised(moved), 1 / curvature)
        return moved

    def whole(data: float, at: Array) -> float:
        return data if penalty is None else data + penalty.value(penalised(at))

    value, grad = objective.data_value_and_grad(x)
    check_finite(value)
    # The curvature along the gradient is one that the objective has: a first guess that is not too large.
    length = math.sqrt(_inner(grad, grad))
    curvature = 1.0
    if length > 0:
        step = 1e-3 * max(1.0, math.sqrt(_inner(x, x))) / length
        bent = objective.data_value_and_grad(x - step * grad)[1] - grad
        curvature = max(math.sqrt(_inner(bent, bent)) / (step * length), 1e-12)
    n_evaluations += 2
    y, t, n_iter, converged, message = x, 1.0, 0, False, "max_iter is reached"
    best = whole(value, x)
    data_at_y = value
    while n_iter < max_iter:
        if n_iter:
            data_at_y, grad = objective.data_value_and_grad(y)
            n_evaluations += 1
        before = curvature
        while True:
            new = proximal(y, grad, curvature)
            moved = new - y
            data = objective.data_value(new)
            n_evaluations += 1
            bound = data_at_y + _inner(grad, moved) + 0.5 * curvature * _inner(moved, moved)
            if data <= bound + slack * abs(data_at_y):
                break
            if not curvature < 1e30:
                return Solution(
                    x.astype(objective.dtype), best, n_iter, n_evaluations, False, "no step size decreases the value"
                )
            curvature *= GROWTH
        n_iter += 1
        steepest = curvature * float(np.abs(moved).max(initial=0))
        forward = new - x
        restart = _inner(moved, forward) < 0
        x, best = new, whole(data, new)
        if callback is not None and callback(x.astype(objective.dtype), best):
            message = "the callback ended it"
            break
        if steepest <= tol:
            converged, message = True, "the gradient mapping is within tol"
            break
        if restart:
            t, y = 1.0, x
        else:
            t, last = (1 + math.sqrt(1 + 4 * t * t * curvature / before)) / 2, t
            y = x + ((last - 1) / t) * forward
        if 0.5 * curvature * _inner(moved, moved) > 4 * slack * abs(data_at_y):  # else the test told rounding alone
            curvature *= SHRINKING
    return Solution(x.astype(objective.dtype), best, n_iter, n_evaluations, converged, message)
