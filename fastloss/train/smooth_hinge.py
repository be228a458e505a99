"""The hinge's minimum, by L-BFGS on smooth losses that come ever closer to it.

With a width μ, the kink of max(0, m) is rounded within |m| ≤ μ / 2:

    h(m) = (max(0, m + μ/2)² − max(0, m − μ/2)²) / 2μ,

so a smooth Weston–Watkins loss is the difference of two squared hinge losses with other margins, and two fused passes
over X compute it. For `over="max"` the maximum is μ log Σ_j exp(m_j / μ), with m_y = 0: the softmax loss at temperature
μ of scores that have the margin taken off the target's, on scores made by BLAS.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fastloss import _checks as checks
from fastloss import blocks
from fastloss._checks import Array
from fastloss.backends import Backend
from fastloss.linear import LinearObjective
from fastloss.losses import Hinge, Softmax
from fastloss.train.minimise import Callback, Preconditioner, Solution, lbfgs, start

WIDEST, NARROWER = 0.5, 4.0  # μ as a part of the margin at first, and what it is divided by from stage to stage
SMALL = 1e-6  # as a part of the margin: an objective that is 0 but for rounding
STAGE, WINDOW = 0.3, 10  # a stage ends when so many iterations together bring less than this part of `tol`
POLISHING, POLISHED, SINGULAR = 20, 1e-9, 1e-12  # Newton steps at most, the last one, and singular values that count
CHUNK = 2048  # rows at a time for a Hessian
MEMORY = 30  # of L-BFGS: what is nearly a kink takes many directions to be known


#: What is not the loss's own, and so the other backend's.
AS_IT_IS = (
    "csr_scores", "csr_accumulate", "csc_accumulate", "goes_by_features", "transposed", "transpose_back", "shrink",
)  # fmt: skip


class _SmoothRows(Backend):
    """A backend whose hinge is smooth: the linear layer and Hessian products alone, on top of another's."""

    def __init__(self, backend: Backend, loss: Hinge, width: float) -> None:
        self._backend, self._width = backend, width
        for name in AS_IT_IS:
            setattr(self, name, getattr(backend, name))
        if loss.over == "max":
            self._softmax = Softmax(temperature=width)
        else:
            # Class weights and ignored rows are in the row multipliers.
            square = replace(loss, power=2, class_weight=None, ignore_index=None)
            self._squares = [self._shifted(square, by) for by in (width / 2, -width / 2)]

    @staticmethod
    def _shifted(loss: Hinge, by: float) -> Hinge:
        pairs = None if loss.pair_margins is None else loss.pair_margins + by
        return replace(loss, margin=loss.margin + by, pair_margins=pairs)

    def linear_rows(
        self, loss: Any, X: Array, rows: Array | None, centre: Array | None, W: Array, b: Array | None, targets: Array,
        multiplier: Array | None, scale: float, dW: Array | None, db: Array | None, dX: Array | None,
        row_loss: Array | None, chunk_rows: int | None, n_threads: int,
    ) -> float:  # fmt: skip
        data = (X, rows, centre, W, b, targets, multiplier)
        rest = (None, None, chunk_rows, n_threads)  # an objective asks for neither dX nor row losses
        if loss.over == "max":
            return blocks.linear_rows(self, loss, *data, scale, dW, db, *rest)
        scale = scale / (2 * self._width)
        upper, lower = self._squares
        less_W, less_b = (None if array is None else np.empty_like(array) for array in (dW, db))
        value = self._backend.linear_rows(upper, *data, scale, dW, db, *rest)
        value -= self._backend.linear_rows(lower, *data, scale, less_W, less_b, *rest)
        for array, less in ((dW, less_W), (db, less_b)):
            if array is not None:
                array -= less
        return value / (2 * self._width)

    def score_rows(
        self, loss: Any, scores: Array, targets: Array, multiplier: Array | None, scale: float,
        grad: Array | None, row_loss: Array | None, extras: dict[str, Array], n_threads: int,
    ) -> float:  # fmt: skip
        """Of a block of scores, which is scratch: the smooth form, and of the maximum its square too."""
        if loss.over != "max":
            upper, lower = self._squares
            less = np.empty_like(scores) if grad is not None else None
            data = (targets, multiplier, scale / (2 * self._width))
            value = -self._backend.score_rows(lower, scores, *data, less, None, extras, n_threads)
            value += self._backend.score_rows(upper, scores, *data, grad, None, extras, n_threads)
            if grad is not None:
                grad -= less
            return value / (2 * self._width)
        self._add_margins(loss, scores, targets)
        losses = np.empty(len(scores), scores.dtype)
        scale *= self._width
        self._backend.score_rows(
            self._softmax, scores, targets, multiplier, scale, grad, losses, extras, n_threads
        )  # fmt: skip
        losses *= scores.dtype.type(self._width)
        if loss.power == 2:
            if grad is not None:
                grad *= 2 * losses[:, None]
            losses *= losses
        return float(np.sum(losses if multiplier is None else losses * multiplier, dtype=np.float64))


    @staticmethod
    def _add_margins(loss: Hinge, scores: Array, targets: Array) -> None:
        """Scores whose softmax is the smooth maximum of the margins, in place."""
        n = np.arange(len(scores))
        if loss.pair_margins is None:
            scores[n, targets] -= scores.dtype.type(loss.margin)
        else:
            own = scores[n, targets]
            scores += loss.pair_margins[targets].astype(scores.dtype)
            scores[n, targets] = own

    def hvp_rows(self, loss: Any, scores: Array, targets: Array, multiplier: Array | None, direction: Array) -> Array:
        hvp = self._backend.hvp_rows
        if loss.over != "max":
            upper, lower = (hvp(square, scores, targets, multiplier, direction) for square in self._squares)
            return (upper - lower) / (2 * self._width)
        scores = scores.copy()
        self._add_margins(loss, scores, targets)
        product = hvp(self._softmax, scores, targets, multiplier, direction) * self._width
        if loss.power == 2:
            gradient, losses = np.empty_like(scores), np.empty(len(scores), scores.dtype)
            self._backend.score_rows(self._softmax, scores, targets, None, self._width, gradient, losses, {}, 1)
            along = 2 * gradient * (gradient * direction).sum(axis=1, keepdims=True)
            product *= 2 * self._width * losses[:, None]
            product += along if multiplier is None else along * multiplier[:, None]
        return product


class _Smooth(LinearObjective):
    """A hinge objective whose loss has no kink; all else is the objective's."""

    def __init__(self, objective: LinearObjective, width: float) -> None:
        self.__dict__.update(objective.__dict__)
        self._width = width

    def choose_backend(self, verb: str) -> Backend:
        # The smooth loss has a Hessian, whatever verb is asked for.
        return _SmoothRows(super().choose_backend("gradient"), self.loss, self._width)  # type: ignore[arg-type]

    def hessian(self, W: Array) -> Array:
        """The whole Hessian at W (float64), (C · columns, C · columns)."""
        (c, columns), backend = W.shape, self.choose_backend("hvp")
        found = np.zeros((c, columns, c, columns))
        for part in blocks.cut(len(self.X), CHUNK):
            x = np.ones((part.stop - part.start, columns))
            x[:, : self.X.shape[1]] = self.load_rows(part)
            multiplier = None if self.weights.multiplier is None else self.weights.multiplier[part].astype(np.float64)
            for k, unit in enumerate(np.eye(c)):
                direction = np.broadcast_to(unit, (len(x), c))
                curved = backend.hvp_rows(self.loss, x @ W.T, self.targets[part], multiplier, direction)
                for j in range(c):
                    found[j, :, k] += (x * curved[:, j, None]).T @ x
        found *= self.row_scale
        if self.penalty is not None:
            for k in range(c):
                diagonal = np.einsum("ii->i", found[k, :, k])
                self.penalised(diagonal)[...] += self.penalty.decay
        return found.reshape(W.size, W.size)

    def polish(self, W: Array, passes: int) -> Array | None:
        """The minimum near W to all digits, by Newton's method with whole Hessian matrices; None where those would
        take longer than some passes over the data, or do not lead there.
        """
        steps = min(POLISHING, 4 * passes // W.size)
        if steps < POLISHING // 2:
            return None
        W = W.astype(np.float64)
        value, grad = self.value_and_grad(W)
        for _ in range(steps):
            step = np.linalg.lstsq(self.hessian(W), -grad.ravel(), rcond=SINGULAR)[0].reshape(W.shape)
            if np.abs(step).max() <= POLISHED * max(1.0, np.abs(W).max()):
                return (W + step).astype(self.dtype)
            for _ in range(POLISHING):
                new_value, new_grad = self.value_and_grad(W + step)
                if new_value < value or np.abs(new_grad).max() < np.abs(grad).max():
                    break
                step /= 2
            W, value, grad = W + step, new_value, new_grad
        return None


def smoothing(
    objective: LinearObjective,
    W: object = None,
    *,
    n_classes: int | None = None,
    tol: float = 1e-4,
    max_iter: int = 1000,
    precondition: bool = False,
    callback: Callback | None = None,
) -> Solution:
    """Minimise a hinge objective that has kinks: L-BFGS on smooth losses, each from where the last one ended.

    The width μ of what is rounded off falls from stage to stage by a factor of 4, until a stage lowers the objective by
    no more than a part `tol` of it. Where W has few numbers, Newton's method ends the last stage.

    Parameters
    ----------
    objective : LinearObjective
        Of a Hinge with power=1 or over="max", with L2 or no penalty.
    tol : float
        Ends when halving μ twice lowers the objective by less than this part of it. What is left to gain is then about
        as much again, or less.
    max_iter : int
        Iterations of L-BFGS at most, in all stages together.
    precondition : bool
        As in `lbfgs`.
    callback : function, optional
        Called with W and the smooth objective's value after each iteration; the run ends if it returns True.

    The other parameters and what is raised are those of `lbfgs`; ValueError for losses that have a gradient everywhere,
    a margin of 0 or less, and `count_target`.

    Returns
    -------
    Solution
        `value` is that of the objective itself; W is the best that was found at the end of a stage.

    References
    ----------
    Nesterov, "Smooth minimization of non-smooth functions", 2005; Chapelle, "Training a support vector machine in the
    primal", 2007 (the rounded hinge); Becker, Bobin, Candès, "NESTA", 2011 (continuation).

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> from fastloss.train import smoothing
    >>> objective = fl.LinearObjective(fl.Hinge(), np.eye(3), np.arange(3), penalty=fl.L2(0.1))
    >>> found = smoothing(objective, tol=1e-6)
    >>> found.converged, round(found.value, 4)
    (True, 0.2)
    """
    best_W = start(objective, W, n_classes, tol, max_iter, callback)
    loss = objective.loss
    if not isinstance(loss, Hinge) or (loss.power == 2 and loss.over != "max"):
        raise ValueError(f"objective has the loss {loss!r}, which has a gradient everywhere; use lbfgs")
    margin = loss.margin if loss.pair_margins is None else float(np.median(loss.pair_margins))
    if margin <= 0:
        raise ValueError(f"objective has a hinge with margin {margin}; the width of what is smoothed is a part of it")
    if loss.count_target:
        raise ValueError("objective has a hinge with count_target, which adds a constant; leave it out")
    _ = objective.flat  # raises for penalties without a gradient
    checks.number(tol, "tol", low=0)

    checks.flag(precondition, "precondition")
    preconditioner = precondition and Preconditioner(objective, len(best_W))

    ended, values = [], []

    def watched(W: Array, value: float) -> object:
        values.append(value)
        if callback is not None and callback(W, value):
            ended.append(True)
        slow = len(values) > WINDOW and values[-1 - WINDOW] - value <= STAGE * tol * max(value, small)
        return bool(ended) or slow

    best, width, W = np.inf, WIDEST * margin, best_W
    best_width = width
    # Where margins near the kink have few digits left beside μ, there is nothing more to be found.
    narrowest = margin * max(float(np.finfo(objective.dtype).eps) ** 0.6, 1e-7)
    small = SMALL * margin**loss.power
    n_iter = n_evaluations = 0
    while True:
        values.clear()
        smooth = lbfgs(
            _Smooth(objective, width), W, tol=0.0, max_iter=max_iter - n_iter, memory=MEMORY,
            precondition=preconditioner, callback=watched,
        )  # fmt: skip
        n_iter, n_evaluations = n_iter + smooth.n_iter, n_evaluations + smooth.n_evaluations
        W, value = smooth.W, objective.value(smooth.W)
        n_evaluations += 1
        gain = best - value
        if value < best:
            best, best_W, best_width = value, W, width

        converged, message = False, ""
        if ended:
            message = "the callback ended it"
        elif n_iter >= max_iter:
            message = "max_iter is reached"
        elif gain <= tol * max(best, small):
            converged, message = True, f"a stage of width {width:.1e} lowered the objective by less than tol of it"
        elif width <= narrowest:
            message = f"the narrowest stage, of width {width:.1e}, still lowered the objective by {gain:.1e}"
        if converged:
            # With few weights, what rounding does on the way is to leave no trace in the result.
            polished = _Smooth(objective, best_width).polish(best_W, n_evaluations)
            if polished is not None and (value := objective.value(polished)) <= best + tol * max(best, small):
                best, best_W = value, polished
        if message:
            return Solution(best_W, best, n_iter, n_evaluations, converged, message)
        width /= NARROWER
