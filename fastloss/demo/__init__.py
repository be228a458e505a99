"""The page of `fastloss demo`, and what it computes: points in the plane, a linear classifier, its loss and descent.

`State` is all that the page shows, without the page: no browser and no Bokeh are needed to use it. `page` draws it with
Bokeh, and `server` serves that to browsers on this machine.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

import fastloss as fl
from fastloss import _checks as checks
from fastloss import train
from fastloss._checks import Array
from fastloss.model import LinearModel

LOSSES: dict[str, fl.Loss] = {
    "hinge, sum over the wrong classes": fl.Hinge(),
    "hinge, mean over the classes": fl.Hinge(over="mean"),
    "hinge, the worst wrong class": fl.Hinge(over="max"),
    "squared hinge, sum over the wrong classes": fl.Hinge(power=2),
    "softmax (cross-entropy)": fl.Softmax(),
}
#: The losses in a formula, where s_y is the score of the right class.
FORMULAS = {
    "hinge, sum over the wrong classes": "Σ<sub>j≠y</sub> max(0, s<sub>j</sub> − s<sub>y</sub> + 1)",
    "hinge, mean over the classes": "Σ<sub>j≠y</sub> max(0, s<sub>j</sub> − s<sub>y</sub> + 1) / 3",
    "hinge, the worst wrong class": "max<sub>j≠y</sub> max(0, s<sub>j</sub> − s<sub>y</sub> + 1)",
    "squared hinge, sum over the wrong classes": "Σ<sub>j≠y</sub> max(0, s<sub>j</sub> − s<sub>y</sub> + 1)²",
    "softmax (cross-entropy)": "−log( exp(s<sub>y</sub>) / Σ<sub>j</sub> exp(s<sub>j</sub>) )",
}
STRENGTHS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
STEP_SIZES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
NAMES = ("A", "B", "C")
#: The plane goes from −LIMIT to LIMIT, both ways.
LIMIT = 1.0
POINTS = (
    (0.5, 0.4), (0.8, 0.3), (0.3, 0.8), (-0.4, 0.3), (-0.3, 0.7), (-0.7, 0.2), (0.7, -0.4), (0.5, -0.6), (-0.4, -0.5),
)  # fmt: skip
TARGETS = (0, 0, 0, 1, 1, 1, 2, 2, 2)
#: A poor start, so that there is something to descend.
START = ((1.0, 2.0, 0.0), (2.0, -4.0, 0.5), (3.0, -1.0, -0.5))


@dataclass(frozen=True)
class View:
    """What there is to see of a state.

    Attributes
    ----------
    scores : array (N, C)
        X Wᵀ + b.
    losses : array (N,)
        The loss of each point.
    slopes : array (N, C)
        The gradient of each point's loss with respect to its scores.
    data, penalty, value : float
        The mean of the losses, the penalty's value, and their sum: the objective.
    gradient : array (C, 3)
        Of the objective with respect to W; the bias is the last column.
    accuracy : float
        The share of points whose class has the highest score.
    """

    scores: Array
    losses: Array
    slopes: Array
    data: float
    penalty: float
    value: float
    gradient: Array
    accuracy: float


class State:
    """Points of three classes in the plane, a linear classifier of them, and how far it has descended.

    Attributes
    ----------
    X : array (9, 2)
        The points; set them with `move`.
    y : array (9,)
        Their classes.
    W : array (3, 3)
        Weights of the two features and the bias, a row for each class.
    loss : str
        A name in `LOSSES`.
    strength, step_size : float
        Of the L2 penalty, and of the steps.
    steps : int
        Taken since the last start.
    curve : deque of (steps, objective, mean loss)
        One for each step, the latest 1000.

    Examples
    --------
    >>> from fastloss.demo import State
    >>> state = State()
    >>> before = state.view().value
    >>> state.step()
    >>> state.steps, state.view().value < before
    (1, True)
    """

    def __init__(self) -> None:
        self.y = np.array(TARGETS)
        self.loss, self.strength, self.step_size = next(iter(LOSSES)), 0.01, 0.1
        self.reset()

    def reset(self) -> None:
        """Points and weights as at the start; loss, strength and step size stay."""
        self.X, self.W = np.array(POINTS), np.array(START)
        self.restart()

    def restart(self) -> None:
        """Count steps from here."""
        self.steps = 0
        self.curve: deque[tuple[int, float, float]] = deque(maxlen=1000)
        self._record()

    def choose(self, loss: str) -> None:
        """Take another loss, and count steps from here.

        Raises
        ------
        ValueError
            If it is not in `LOSSES`.
        """
        checks.one_of(loss, "loss", LOSSES)
        self.loss = loss
        self.restart()

    def penalise(self, strength: float) -> None:
        """Take another strength of the penalty.

        Raises
        ------
        ValueError, TypeError
            If it is no finite number, or below 0.
        """
        self.strength = checks.number(strength, "strength", low=0)
        self._record()

    def move(self, X: object) -> None:
        """Put the points elsewhere; what lies outside the plane is put on its edge.

        Raises
        ------
        ValueError, TypeError
            If X is not (9, 2), or not finite.
        """
        points = checks.finite(checks.matrix(X, "X", "(9, 2)"), "X").astype(np.float64)
        if points.shape != self.X.shape:
            raise ValueError(f"X has shape {points.shape}; it must be {self.X.shape}: a row for each point")
        self.X = np.clip(points, -LIMIT, LIMIT)
        self._record()

    def scatter(self, rng: np.random.Generator) -> None:
        """Draw new points: each class around a centre of its own, somewhere in the plane."""
        angles = rng.uniform(0, 2 * np.pi) + 2 * np.pi * (np.arange(3) + rng.uniform(-0.3, 0.3, 3)) / 3
        centres = 0.5 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        self.move(centres[self.y] + rng.uniform(-0.4, 0.4, self.X.shape))

    def shake(self, rng: np.random.Generator) -> None:
        """Draw new weights, and count steps from here."""
        self.W = rng.normal(scale=2.0, size=self.W.shape)
        self.restart()

    def step(self, n: int = 1) -> None:
        """Take n steps of gradient descent.

        Raises
        ------
        fastloss.train.DivergenceError
            If the loss is no longer finite: the step size is too large. The weights are those before.
        """
        result = train.gradient_descent(self._objective(), self.W, steps=n, step_size=self.step_size, evaluate_every=n)
        self.W = result.W.copy()
        self.steps += n
        self._record()

    def view(self) -> View:
        """All that there is to see."""
        objective = self._objective()
        scores = LinearModel(self.W, NAMES).scores(self.X)
        losses, slopes = LOSSES[self.loss].value_and_grad(scores, self.y, reduction="none")
        value, gradient = objective.value_and_grad(self.W)
        data, penalty = objective.data_value(self.W), fl.L2(self.strength).value(self.W[:, :2])
        right = float(np.mean(scores.argmax(axis=1) == self.y))
        return View(scores, losses, slopes, data, penalty, value, gradient, right)

    def regions(self, n: int = 100) -> Array:
        """The class that wins at each place of the plane: array (n, n) of uint8, the lowest x2 first."""
        places = (np.arange(n) + 0.5) / n * 2 * LIMIT - LIMIT
        grid = np.stack(np.meshgrid(places, places), axis=-1).reshape(-1, 2)
        return LinearModel(self.W, NAMES).predict(grid).reshape(n, n).astype(np.uint8)

    def _objective(self) -> fl.LinearObjective:
        return fl.LinearObjective(LOSSES[self.loss], self.X, self.y, penalty=fl.L2(self.strength))

    def _record(self) -> None:
        """The objective where things stand now, in place of what was recorded at the same step."""
        objective = self._objective()
        if self.curve and self.curve[-1][0] == self.steps:
            self.curve.pop()
        self.curve.append((self.steps, objective.value(self.W), objective.data_value(self.W)))
