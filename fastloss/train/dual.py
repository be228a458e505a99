"""Crammer and Singer's support vector machine on sparse features, in the dual: one row's variables at a time."""

from __future__ import annotations

import numpy as np

from fastloss import _checks as checks
from fastloss.linear import LinearObjective
from fastloss.losses import Hinge
from fastloss.penalties import L2
from fastloss.sparse import Csr
from fastloss.train.minimise import Callback, Solution, check_finite, start

REFRESH = 64  # epochs after which W is made anew of the dual variables, so that rounding does not gather in it
#: The gap is found, by a pass over the data, where an epoch's own estimate of it is at most so many times `tol`. The
#: estimate has each row's loss as it was before its step, when W was not as good as it is at the end.
LIKELY = 1.5
#: Of so many epochs one has all rows; the others those that it changed by more than a part STILL of their bound, unless
#: these are fewer than one in FEW. (20 Newsgroups, to a gap of 1 %: four fifths
#: of the time that epochs of all rows take.)
ROUND, STILL, FEW = 3, 0.01, 8


def why_no_dual(objective: LinearObjective) -> str | None:
    """Why `dual` cannot minimise an objective; None if it can."""
    loss, penalty = objective.loss, objective.penalty
    if not isinstance(loss, Hinge) or loss.over != "max" or loss.power != 1:
        return f"the loss is {loss!r}; it must be Hinge(over='max', power=1)"
    if loss.pair_margins is not None or loss.margin <= 0:
        return f"the loss is {loss!r}; it must have one margin, above 0"
    if not isinstance(penalty, L2) or penalty.strength == 0:
        return f"the penalty is {penalty!r}; it must be L2, of a strength above 0"
    if objective.bias:
        return "there is a bias, which the dual's variables would have to balance; it must be bias=False"
    if not isinstance(objective.X, Csr) or objective.transforms:
        return "X is dense, or has a shift or a scale; it must be sparse, as it is"
    return None


def dual(
    objective: LinearObjective,
    W: object = None,
    *,
    n_classes: int | None = None,
    tol: float = 1e-4,
    max_iter: int = 1000,
    seed: int = 0,
    callback: Callback | None = None,
) -> Solution:
    """Minimise Crammer and Singer's hinge with an L2 penalty by coordinate ascent in the dual, on sparse features.

    The dual has a number for each row and class (N C in all are kept). Those of a row are chosen at their best in
    closed form, given those of all others, and W follows at once; an iteration does that for each row, or two times of
    three for those that still change, in an order drawn anew, on one thread. The gap between the objective and the
    dual's value tells how far the minimum can be.

    Parameters
    ----------
    objective : LinearObjective
        Of Hinge(over="max", power=1) with L2 and without bias; X sparse, without shift and scale.
    W : array (C, D), optional
        Gives the number of classes alone: the dual starts where all its variables are 0.
    tol : float
        Ends when the gap is at most this part of the objective.
    max_iter : int
        Iterations at most.
    seed : int
        For the order of rows.
    callback : function, optional
        Called with W and the value after each iteration; the run ends if it returns True.

    The other parameters, the result and what is raised are those of `lbfgs`; ValueError for other objectives. W is the
    best that was found.

    References
    ----------
    Keerthi, Sundararajan, Chang, Hsieh, Lin, "A sequential dual method for large scale multi-class linear SVMs", 2008;
    Michelot, "A finite algorithm for finding the projection of a point onto the canonical simplex", 1986.

    Examples
    --------
    >>> import numpy as np, scipy.sparse, fastloss as fl
    >>> from fastloss.train import dual
    >>> X, y = scipy.sparse.eye_array(3, format="csr"), np.arange(3)
    >>> found = dual(fl.LinearObjective(fl.Hinge(over="max"), X, y, penalty=fl.L2(0.1), bias=False), tol=1e-6)
    >>> found.converged, round(found.value, 4)
    (True, 0.2)
    """
    first = start(objective, W, n_classes, tol, max_iter, callback)
    reason = why_no_dual(objective)
    if reason is not None:
        raise ValueError(f"objective is not for dual: {reason}")
    seed = checks.integer(seed, "seed", low=0)
    X, dtype, c = objective.X, objective.dtype, len(first)
    margin = float(objective.loss.margin)  # type: ignore[attr-defined]
    backend, strength = objective.choose_backend("gradient"), objective.penalty.strength  # type: ignore[union-attr]
    multiplier = objective.weights.multiplier
    # The objective is 2 λ times ½ ‖W‖² + Σ_i C_i ℓ_i.
    bounds = np.ones(len(X)) if multiplier is None else multiplier.astype(np.float64)
    bounds *= objective.row_scale / (2 * strength)
    each = np.square(X.values, dtype=np.float64)
    squares = np.bincount(np.repeat(np.arange(len(X)), np.diff(X.starts)), weights=each, minlength=len(X))
    targets = np.where(bounds > 0, objective.targets, 0).astype(np.int64)
    constant = 2 * strength * float(bounds[squares == 0].sum()) * margin  # of rows that no W can help
    with np.errstate(over="ignore"):  # then squares are infinite, which is looked for below
        bounds, squares = bounds.astype(dtype), squares.astype(dtype)
    # W, by features, is too large for the nearer caches: what most rows need lies together.
    X, places = X.by_frequency()
    alpha, weights = np.zeros((len(X), c), dtype), np.zeros((X.shape[1], c), dtype)
    rows = np.flatnonzero((bounds > 0) & (squares > 0))
    at_target = np.arange(len(X)), targets
    if c > 1 and len(rows):  # where W is 0 each row has the margin for its loss
        loss = 2 * strength * float(bounds[rows].sum(dtype=np.float64)) * margin + constant
    else:
        loss = objective.data_value(weights[places].T)
    square, moved, is_whole = 0.0, rows, True
    check_finite(loss + float(squares.sum(dtype=np.float64)))
    best, best_W, n_iter, n_passes, converged, message = loss, weights.copy(), 0, 0, False, "max_iter is reached"

    def below() -> float:
        """The dual's value, which the minimum is not below."""
        return 2 * strength * (margin * float(alpha[at_target].sum(dtype=np.float64)) - 0.5 * square) + constant

    while True:
        is_last, seems = n_iter == max_iter, loss + strength * square
        may_be_done = is_whole and seems - below() <= LIKELY * tol * abs(seems)
        if n_iter > 0 and (is_last or callback is not None or may_be_done):
            square = float(np.einsum("dc,dc->", weights, weights, dtype=np.float64))
            found = weights[places]
            value, n_passes = objective.data_value(found.T) + strength * square, n_passes + 1
            if callback is not None and callback(np.ascontiguousarray(found.T), value):
                message = "the callback ended it"
            if value < best:
                best, best_W = value, found
            if message.startswith("the callback"):
                break
        gap = best - below()
        if gap <= tol * abs(best):
            converged, message = True, f"the minimum is at most {max(0.0, gap):.1e} lower"
            break
        if is_last:
            break
        is_whole = n_iter % ROUND == 0 or FEW * len(moved) < len(rows)
        before = alpha.copy()
        order = np.random.default_rng([seed, n_iter]).permutation(rows if is_whole else moved)
        loss, growth = backend.dual_epoch(X, order, targets, bounds, squares, margin, weights, alpha)
        loss, square, n_iter = 2 * strength * loss + constant, square + growth, n_iter + 1
        if is_whole:
            change = np.abs(np.subtract(alpha, before, out=before), out=before).max(axis=1, initial=0)
            moved = rows[(change > STILL * bounds)[rows]]
        if n_iter % REFRESH == 0:
            weights[...] = 0
            backend.csr_accumulate(X, slice(0, len(X)), alpha, weights, 1)
            square = float(np.einsum("dc,dc->", weights, weights, dtype=np.float64))
    return Solution(np.ascontiguousarray(best_W.T), best, n_iter, n_iter + n_passes, converged, message)
