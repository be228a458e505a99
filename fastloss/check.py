"""Gradients checked against differences of values, as the lecture teaches: slow, approximate, easy to write.

Values at shifted weights are taken many at a time, in one pass over X. What the verdicts say is the course's:
a relative error above 1e-2 means that the gradient is probably wrong, above 1e-4 that one should feel uncomfortable; up
to 1e-4 is usually okay for objectives with kinks, and up to 1e-7 one should be happy.

Source: CS231n, "Neural Networks Part 3: Gradient Checks".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from fastloss import _checks as checks
from fastloss import landscape
from fastloss._checks import Array
from fastloss.linear import LinearObjective, on_host

STACK_VALUES = 1 << 22  # numbers of the weights that are tried in one pass over X
ROUNDING = 8  # units in the last place of a value that its computation may be off
DROWNED = 1e-3  # of the largest number compared: where rounding may do more, agreement within it says nothing

WRONG, UNCOMFORTABLE, FINE, HAPPY = 1e-2, 1e-4, 1e-7, 0.0


def _values(objective: LinearObjective | Callable[[Array], float]) -> Callable[[Array], Array]:
    if callable(objective):
        return lambda stack: np.array([checks.number(objective(W), "objective(W)") for W in stack])
    return objective.values


def numerical_gradient(
    objective: LinearObjective | Callable[[Array], float],
    W: object,
    h: float | None = None,
    *,
    kind: str = "centred",
    coordinates: object = None,
) -> Array:
    """The gradient by differences: `(f(W + h e) − f(W − h e)) / 2h` for each direction e of a coordinate.

    Parameters
    ----------
    objective : LinearObjective, or function of W
        X on the host. A function gets arrays like W and gives numbers.
    W : array; (C, D + 1), or (C, D) without bias, for a LinearObjective
    h : float, optional
        The step, above 0; by default 1e-5 for centred differences and 1e-7 for forward ones, which balances their own
        error with that of rounding in float64. A LinearObjective that computes in float32 takes 1e-2 and 1e-3.
    kind : {"centred", "forward"}
        "forward" is `(f(W + h e) − f(W)) / h`: half the work, and an error of order h in place of h².
    coordinates : array (K, W.ndim) of int, optional
        Where in W; everywhere by default, which takes a value for each number of W, or two.

    Returns
    -------
    array like W, or (K,), of float64

    Raises
    ------
    ValueError, TypeError, IndexError
        For arguments that do not fit; before anything is computed.

    References
    ----------
    CS231n, "Optimization: Computing the gradient numerically with finite differences".

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> from fastloss.check import numerical_gradient
    >>> objective = fl.LinearObjective(fl.Softmax(), np.eye(3), np.arange(3))
    >>> W = np.zeros((3, 4))
    >>> bool(np.allclose(numerical_gradient(objective, W), objective.value_and_grad(W)[1], atol=1e-9))
    True
    >>> numerical_gradient(lambda x: float(x @ x), [3.0, 4.0]).round(6).tolist()
    [6.0, 8.0]
    """
    if isinstance(objective, LinearObjective):
        start = on_host(objective).check_weights(W).astype(objective.dtype)
    elif callable(objective):
        start = checks.as_array(W, "W").astype(np.float64)
    else:
        raise TypeError(
            f"objective is {type(objective).__name__}; it must be a fastloss.LinearObjective or a function of W"
        )
    checks.finite(start, "W")
    checks.one_of(kind, "kind", ("centred", "forward"))
    if h is None:
        single = start.dtype == np.float32
        h = (1e-2 if single else 1e-5) if kind == "centred" else (1e-3 if single else 1e-7)
    h = checks.number(h, "h", low=0, above=True)
    if coordinates is None:
        flat, shape = np.arange(start.size), start.shape
    else:
        flat = _flat(coordinates, start.shape)
        shape = flat.shape
    values = _values(objective)
    base = float(values(start[None])[0]) if kind == "forward" and len(flat) else math.nan
    sides = (1, -1) if kind == "centred" else (1,)
    found, at_once = np.empty(len(flat)), max(1, STACK_VALUES // (len(sides) * max(1, start.size)))
    for begin in range(0, len(flat), at_once):
        some = flat[begin : begin + at_once]
        stack = np.repeat(start.reshape(1, -1), len(sides) * len(some), axis=0)
        places = np.tile(some, len(sides))
        moved = stack[np.arange(len(stack)), places] + np.repeat(sides, len(some)) * start.dtype.type(h)
        stack[np.arange(len(stack)), places] = moved
        results = np.asarray(values(stack.reshape(-1, *start.shape)), np.float64)
        # Divided by how far the weights are apart, as rounded.
        ahead, behind = (
            (results[: len(some)], results[len(some) :]) if len(sides) == 2 else (results, np.full(len(some), base))
        )
        reached = moved.astype(np.float64)
        apart = reached[: len(some)] - (reached[len(some) :] if len(sides) == 2 else start.ravel()[some])
        if not apart.all():
            raise ValueError(f"h is {h:g}, which is lost in {start.dtype} beside W's entries; use a larger one")
        found[begin : begin + at_once] = (ahead - behind) / apart
    return found.reshape(shape)


def _flat(coordinates: object, shape: tuple[int, ...]) -> Array:
    array = checks.as_array(coordinates, "coordinates")
    if array.size == 0:
        return np.zeros(0, np.intp)
    if array.ndim != 2 or array.shape[1] != len(shape):
        raise ValueError(f"coordinates has shape {array.shape}; it must be (K, {len(shape)}): places in W {shape}")
    if array.dtype.kind not in "iu":
        raise TypeError(f"coordinates has dtype {array.dtype}; it must hold integers")
    bad = ((array < 0) | (array >= np.array(shape))).any(axis=1)
    if bad.any():
        position = int(bad.argmax())
        raise IndexError(f"coordinates[{position}] is {tuple(array[position].tolist())}, but W has shape {shape}")
    return np.asarray(np.ravel_multi_index(tuple(array.astype(np.intp).T), shape))


@dataclass(frozen=True, eq=False)
class GradientCheck:
    """An analytic gradient beside the numerical one, at some coordinates.

    Attributes
    ----------
    coordinates : array (K, 2) of int
        Class and feature; the bias is the feature after the last.
    analytic, numerical : array (K,)
    relative_errors : array (K,)
        |analytic − numerical| / max(|analytic|, |numerical|); 0 where both are 0.
    kinks : array (K,) of int
        Kinks of the objective within the step of the difference: with any, the numerical gradient means little.
    noise : float
        What rounding of the values may do to a numerical gradient: a difference below it says nothing.
    smooth : bool
        Whether the objective has no kinks at all.
    """

    coordinates: Array
    analytic: Array
    numerical: Array
    relative_errors: Array
    kinks: Array
    noise: float
    smooth: bool

    @property
    def verdicts(self) -> tuple[str, ...]:
        """For each coordinate "happy", "fine", "uncomfortable", "wrong", "kink" or "noise"; see `verdict`."""
        return tuple(
            "kink" if kinks and error > FINE else self._verdict(error, gap)
            for error, gap, kinks in zip(
                self.relative_errors, np.abs(self.analytic - self.numerical), self.kinks, strict=True
            )
        )

    def _verdict(self, error: float, gap: float) -> str:
        if error <= FINE:
            return "happy"
        if gap <= self.noise:
            size = max(float(np.abs(part).max()) for part in (self.analytic, self.numerical))
            return "noise" if self.noise > DROWNED * size else "happy"
        return "fine" if error <= UNCOMFORTABLE else "uncomfortable" if error <= WRONG else "wrong"

    @property
    def verdict(self) -> str:
        """The worst of the coordinates without a kink within the step, of which rounding leaves something.

        "happy" up to a relative error of 1e-7, or where the difference is within rounding; "fine" up to 1e-4, which is
        usual for objectives with kinks; "uncomfortable" up to 1e-2; "wrong" above. "kink" if all have one, "noise" if
        rounding may do more than a thousandth of the largest number here: the step is too short to tell.
        """
        order = ("wrong", "uncomfortable", "fine", "happy", "noise", "kink")
        return next(verdict for verdict in order if verdict in self.verdicts)

    @property
    def ok(self) -> bool:
        """Whether the verdict is "happy" or "fine"."""
        return self.verdict in ("happy", "fine")


def gradient_check(
    objective: LinearObjective,
    W: object,
    n: int = 10,
    *,
    h: float = 1e-5,
    rows: object = None,
    seed: int = 0,
    dtype: DTypeLike | None = np.float64,
) -> GradientCheck:
    """Compare the objective's gradient with centred differences, at n coordinates drawn at random.

    Parameters
    ----------
    objective : LinearObjective
        X on the host. MaxNorm, a constraint, has no part in the gradient.
    W : array (C, D + 1), or (C, D) without bias
        Better not 0, nor where training has ended: gradients there hide mistakes.
    n : int
        Coordinates, at least 1; with a bias, one of them is of the bias.
    h : float
        The step of the differences.
    rows : array of int, optional
        The rows of X to use, by default all, of which a copy in float64 is made: a few hundred will do, and fewer rows
        have fewer kinks.
    seed : int
        At least 0; of the coordinates.
    dtype : float64, float32 or None
        What the analytic gradient is computed in; None is the objective's own type. The differences are always taken in
        float64: in float32 an error is seldom below 1e-6.

    Returns
    -------
    GradientCheck

    Raises
    ------
    ValueError, TypeError, IndexError
        For arguments that do not fit.

    References
    ----------
    CS231n, "Neural Networks Part 3: Gradient Checks".

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> from fastloss.check import gradient_check
    >>> rng = np.random.default_rng(0)
    >>> objective = fl.LinearObjective(fl.Softmax(), rng.normal(size=(50, 4)), rng.integers(3, size=50))
    >>> gradient_check(objective, rng.normal(size=(3, 5))).verdict
    'happy'
    """
    array = on_host(objective).check_weights(W).astype(np.float64)
    checks.finite(array, "W")
    n = checks.integer(n, "n", low=1)
    h = checks.number(h, "h", low=0, above=True)
    rng = np.random.default_rng(checks.integer(seed, "seed", low=0))
    wide = objective.take(rows, np.float64)
    checked = objective.take(rows, objective.dtype if dtype is None else dtype)

    drawn = rng.choice(array.size, size=min(n, array.size), replace=False)
    coordinates = np.stack(np.unravel_index(np.sort(drawn), array.shape), axis=1)
    last = array.shape[1] - 1
    if objective.bias and not (coordinates[:, 1] == last).any():
        coordinates[-1, 1] = last
    at = tuple(coordinates.T)
    analytic = checked.value_and_grad(array.astype(checked.dtype))[1][at].astype(np.float64)
    numerical = numerical_gradient(wide, array, h, coordinates=coordinates)
    size = np.maximum(np.abs(analytic), np.abs(numerical))
    with np.errstate(invalid="ignore"):
        errors = np.where(size > 0, np.abs(analytic - numerical) / np.where(size > 0, size, 1), np.abs(size))
    kinks = np.empty(len(coordinates), np.intp)
    for k, place in enumerate(map(tuple, coordinates)):
        direction = np.zeros_like(array)
        direction[place] = 1
        kinks[k] = landscape.count_kinks(wide, array, direction, -h, h)
    noise = ROUNDING * float(np.finfo(np.float64).eps) * abs(wide.value(array)) / h
    return GradientCheck(coordinates, analytic, numerical, errors, kinks, noise, smooth(wide))


def smooth(objective: LinearObjective) -> bool:
    """Whether an objective has no kinks anywhere: not those of a hinge, nor those of |w|."""
    loss = objective.loss
    kinked = loss.kind == "hinge" and (getattr(loss, "power", 1) == 1 or getattr(loss, "over", "") == "max")
    return not kinked and (objective.penalty is None or objective.penalty.by != "prox")
