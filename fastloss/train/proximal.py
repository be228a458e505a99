"""Accelerated proximal gradient steps: for penalties without a gradient (L1, ElasticNet) and constraints (MaxNorm)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastloss._checks import Array
from fastloss.linear import LinearObjective
from fastloss.sparse import Csr
from fastloss.train.minimise import Callback, Solution, check_finite, start

GROWTH, SHRINKING = 2.0, 0.9  # of the curvature, when a step fails its test, and after one that does not
#: Rows whose squares a metric takes of dense features, and the least that a feature counts in it beside the largest.
SAMPLE, RAREST = 4096, 1e-6


def _inner(a: Array, b: Array) -> float:
    return float(np.sum(np.multiply(a, b, dtype=np.float64)))


def _metric(objective: LinearObjective) -> Array:
    """The mean square of each feature, 1 for the bias: what is nearly the curvature along each weight, up to a factor.

    A projection onto balls has none: all 1.
    """
    d = objective.X.shape[1]
    found = np.ones(d + objective.bias)
    if objective.penalty is not None and objective.penalty.by == "projection":
        return found
    if isinstance(objective.X, Csr):
        squares = objective.sparse_squares()
    else:
        some = slice(None, None, max(1, len(objective.X) // SAMPLE))
        squares, weight = np.square(objective.load_rows(some), dtype=np.float64), objective.weights.multiplier
        weight = None if weight is None or not weight[some].any() else weight[some]
        squares = np.average(squares, axis=0, weights=weight) if len(squares) else np.ones(d)
    largest = float(squares.max(initial=0))
    if np.isfinite(largest) and largest > 0:
        found[:d] = np.maximum(squares, RAREST * largest)
    return found


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

    The step size follows the curvature that is met, up and down, and is each weight's own: over the mean square of its
    feature, so that rare words take long steps and frequent ones short. Where the last step and the momentum point in
    opposite directions, momentum is given up and gathered anew: without that the method oscillates where the objective
    is strongly convex. L1 sets weights to exactly 0.

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
    convex optimization with backtracking", 2014 (momentum when the step size changes); Combettes and Vũ, "Variable
    metric forward-backward splitting", 2014 (steps of each weight's own).

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
    metric = _metric(objective)
    slack = 16 * float(np.finfo(objective.dtype).eps)  # what rounding leaves of a comparison of values
    n_evaluations = 0

    def proximal(at: Array, grad: Array, curvature: float) -> Array:
        steps = 1 / (curvature * metric)
        moved = at - grad * steps
        if penalty is not None:
            size: Any = 1 / curvature if penalty.by == "projection" else penalised(steps[None])
            penalised(moved)[...] = penalty.step(penalised(moved), size)
        return moved

    def whole(data: float, at: Array) -> float:
        return data if penalty is None else data + penalty.value(penalised(at))

    value, grad = objective.data_value_and_grad(x)
    check_finite(value)
    # The curvature along the gradient is one that the objective has: a first guess that is not too large.
    direction = grad / metric
    length = math.sqrt(_inner(grad, direction))
    curvature = 1.0
    if length > 0:
        step = 1e-3 * max(1.0, math.sqrt(_inner(x, x))) / math.sqrt(_inner(direction, direction))
        bent = objective.data_value_and_grad(x - step * direction)[1] - grad
        curvature = max(math.sqrt(_inner(bent, bent / metric)) / (step * length), 1e-12)
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
            weighed = moved * metric
            data = objective.data_value(new)
            n_evaluations += 1
            bound = data_at_y + _inner(grad, moved) + 0.5 * curvature * _inner(weighed, moved)
            if data <= bound + slack * abs(data_at_y):
                break
            if not curvature < 1e30:
                return Solution(
                    x.astype(objective.dtype), best, n_iter, n_evaluations, False, "no step size decreases the value"
                )
            curvature *= GROWTH
        n_iter += 1
        steepest = curvature * float(np.abs(weighed).max(initial=0))
        forward = new - x
        restart = _inner(weighed, forward) < 0
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
        if 0.5 * curvature * _inner(weighed, moved) > 4 * slack * abs(data_at_y):  # else the test told rounding alone
            curvature *= SHRINKING
    return Solution(x.astype(objective.dtype), best, n_iter, n_evaluations, converged, message)
