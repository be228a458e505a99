"""Landscapes: the objective along a ray `W + a W₁` and on a plane `W + a W₁ + b W₂`, and where a hinge has its kinks.

Scores are linear in W, so along a plane they are `S + a T + b U`: X is read once, in chunks of rows, for S, T and U,
and every point costs the loss of given scores. All is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastloss import _checks as checks
from fastloss import blocks, threads
from fastloss._checks import Array
from fastloss.linear import LinearObjective, on_host
from fastloss.losses import Hinge

SCORES = 1 << 17  # handled together: they stay in cache from point to point
FEATURES = 1 << 22  # converted together


@dataclass(frozen=True, eq=False)
class Ray:
    """The objective along a ray.

    Attributes
    ----------
    a : array (K,)
        Where on the ray `W + a · direction`.
    values : array (K,)
        The objective there, penalty included.
    direction : array like W
    """

    a: Array
    values: Array
    direction: Array


@dataclass(frozen=True, eq=False)
class Plane:
    """The objective on a plane.

    Attributes
    ----------
    a, b : array (K,), (L,)
        Where on the plane `W + a · directions[0] + b · directions[1]`.
    values : array (L, K)
        The objective there, penalty included; a row for each b.
    directions : pair of arrays like W
    """

    a: Array
    b: Array
    values: Array
    directions: tuple[Array, Array]


@dataclass(frozen=True, eq=False)
class Breakpoints:
    """A hinge loss along a ray, exactly: it is linear between the breakpoints.

    Attributes
    ----------
    a : array (K,)
        The breakpoints between `low` and `high`, sorted; one for each row and class whose margin crosses 0 (or, for
        `over="max"`, for each row whose largest margin becomes another's).
    values : array (K,)
        The loss there, without penalty.
    rows : array (K,) of int
        The row of X that each is due to.
    changes : array (K,)
        How much the slope grows there, above 0: the loss is convex.
    low, high : float
        The ends of the ray.
    ends : pair of floats
        The loss at `low` and `high`.
    """

    a: Array
    values: Array
    rows: Array
    changes: Array
    low: float
    high: float
    ends: tuple[float, float]

    def __call__(self, a: object) -> Array:
        """The loss at any a between `low` and `high`: array like a."""
        at = checks.as_array(a, "a").astype(np.float64)
        if at.size and not (self.low <= at.min() and at.max() <= self.high):
            raise ValueError(f"a goes from {at.min():g} to {at.max():g}; it must be from {self.low:g} to {self.high:g}")
        positions, values = self._knots()
        return np.asarray(np.interp(at, positions, values))

    def minimum(self) -> tuple[float, float]:
        """Where the loss is lowest between `low` and `high` (the first such place), and the loss there."""
        positions, values = self._knots()
        lowest = int(values.argmin())
        return float(positions[lowest]), float(values[lowest])

    def _knots(self) -> tuple[Array, Array]:
        return np.r_[self.low, self.a, self.high], np.r_[self.ends[0], self.values, self.ends[1]]


class _Part(NamedTuple):
    """Some rows: which, their scores at each of a stack of weights (n, C), targets and weights, all in float64."""

    rows: Array
    scores: list[Array]
    targets: Array
    weight: Array | None
    total: float


class _Rows:
    """The rows of an objective that a landscape is of."""

    def __init__(self, objective: LinearObjective, stack: list[Array], rows: object) -> None:
        if not isinstance(objective.X, np.ndarray):
            raise TypeError("objective has sparse X; this takes dense features")
        self.objective, self.stack = objective, stack
        n, d = objective.X.shape
        self.rows = np.arange(n) if rows is None else checks.picked_rows(rows, n)
        self.total = 0.0  # Σ w, once all parts have been seen
        self.size = max(1, SCORES // len(stack[0]))
        self.step = max(1, min(self.size, FEATURES // max(1, d)))

    def parts(self) -> Iterator[_Part]:
        """Parts of the rows, of a size that depends on the shape alone."""
        for start in range(0, len(self.rows), self.size):
            rows = self.rows[start : start + self.size]
            chunks = [rows[k : k + self.step] for k in range(0, len(rows), self.step)]
            with blocks.Workers(min(threads.resolve(self.objective.n_threads), len(chunks))) as workers:
                pieces = workers.run(self._piece, chunks)
            scores = [np.concatenate(found) for found in zip(*(piece.scores for piece in pieces), strict=True)]
            weights = [piece.weight for piece in pieces if piece.weight is not None]
            total = sum(piece.total for piece in pieces)
            self.total += total
            targets = np.concatenate([piece.targets for piece in pieces])
            yield _Part(rows, scores, targets, np.concatenate(weights) if weights else None, total)

    def _piece(self, rows: Array) -> _Part:
        some = self.objective.take(rows, np.float64)
        some.check_weights(self.stack[0])
        features = some.X if some.centre is None else some.X - some.centre
        scores = []
        for W in self.stack:
            weights, b = some.fold_in(W)
            product = features @ weights.T
            scores.append(product if b is None else product + b)
        multiplier, unit = some.weights.multiplier, some.weights.unit
        weight = None if multiplier is None else multiplier * unit
        return _Part(rows, scores, some.targets, weight, some.weights.total(len(rows)) * unit)

    def mean(self, sums: Array) -> Array:
        """Σ w ℓ as the objective reduces it."""
        if self.objective.reduction == "sum":
            return sums
        return sums / self.total if self.total > 0 else np.full_like(sums, math.nan)


def _weights(objective: object, W: object, name: str, like: Array | None = None) -> Array:
    array = checks.as_array(W, name)
    if like is not None and array.shape != like.shape:
        raise ValueError(f"{name} has shape {array.shape}; it must have W's, {like.shape}")
    array = on_host(objective).check_weights(array, name=name).astype(np.float64)
    return checks.finite(array, name)


def _direction(objective: LinearObjective, given: object, W: Array, name: str, rng: np.random.Generator) -> Array:
    """A direction as it is given, or a random one that is as long as W (of length 1 where W is 0)."""
    if given is not None:
        return _weights(objective, given, name, W)
    drawn: Array = np.asarray(rng.standard_normal(W.shape))
    length = math.sqrt(float(np.square(W).sum())) or 1.0
    return drawn * (length / math.sqrt(float(np.square(drawn).sum())))


def _places(value: object, name: str) -> Array:
    if value is None:
        return np.linspace(-1, 1, 101 if name == "a" else 51)
    array = checks.as_array(value, name)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; it must be one-dimensional: places along the direction")
    return checks.finite(array.astype(np.float64), name)


def _data_plane(
    objective: LinearObjective, W: Array, directions: tuple[Array, Array], a: Array, b: Array, rows: object
) -> Array:
    """The loss without penalty at `W + a directions[0] + b directions[1]`: array (len(b), len(a))."""
    loss, workers = objective.loss, threads.resolve(objective.n_threads)
    backend = objective.take([], np.float64).choose_backend("gradient")
    sums = np.zeros((len(b), len(a)))
    used = _Rows(objective, [W, *directions], rows)
    for part in used.parts():
        start, along, across = part.scores
        scores, base = np.empty_like(start), np.empty_like(start)
        for row, b_k in zip(sums, b, strict=True):
            np.multiply(across, b_k, out=base)
            base += start
            for k, a_k in enumerate(a):
                np.multiply(along, a_k, out=scores)
                scores += base
                row[k] += backend.score_rows(loss, scores, part.targets, part.weight, 1.0, None, None, {}, workers)
    return used.mean(sums)


def _plane(
    objective: LinearObjective, W: Array, directions: tuple[Array, Array], a: Array, b: Array, rows: object
) -> Array:
    """The objective at `W + a directions[0] + b directions[1]`: array (len(b), len(a))."""
    values = _data_plane(objective, W, directions, a, b, rows)
    if objective.penalty is not None:
        first, second = directions
        for row, b_k in zip(values, b, strict=True):
            row += [objective.penalty.value(objective.penalised(W + a_k * first + b_k * second)) for a_k in a]
    return values


def slice_1d(
    objective: LinearObjective,
    W: object,
    direction: object = None,
    a: object = None,
    *,
    rows: object = None,
    seed: int = 0,
) -> Ray:
    """The objective along a ray `W + a · direction`.

    Parameters
    ----------
    objective : LinearObjective
        X on the host.
    W : array (C, D + 1), or (C, D) without bias
    direction : array like W, optional
        By default standard normal numbers, scaled to the Euclidean norm of W (to 1 where W is 0).
    a : array (K,), optional
        Where to look; by default 101 places from −1 to 1.
    rows : array of int, optional
        The rows of X to use: one example, a subset, or by default all data.
    seed : int
        Of the random direction; at least 0.

    Returns
    -------
    Ray

    Raises
    ------
    ValueError, TypeError, IndexError
        For arguments that do not fit; before anything is computed.

    References
    ----------
    CS231n, "Optimization: Visualizing the loss function".

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> from fastloss.landscape import slice_1d
    >>> objective = fl.LinearObjective(fl.Hinge(), np.eye(3), np.arange(3))
    >>> slice_1d(objective, np.zeros((3, 4)), np.eye(3, 4), a=[0, 0.5, 1, 2]).values.tolist()
    [2.0, 1.0, 0.0, 0.0]
    """
    start = _weights(objective, W, "W")
    rng = np.random.default_rng(checks.integer(seed, "seed", low=0))
    along, places = _direction(objective, direction, start, "direction", rng), _places(a, "a")
    values = _plane(objective, start, (along, np.zeros_like(start)), places, np.zeros(1), rows)
    return Ray(places, values[0], along)


def slice_2d(
    objective: LinearObjective,
    W: object,
    directions: object = None,
    a: object = None,
    b: object = None,
    *,
    rows: object = None,
    seed: int = 0,
) -> Plane:
    """The objective on a plane `W + a · W₁ + b · W₂`.

    Parameters
    ----------
    directions : pair of arrays like W, optional
        W₁ and W₂; by default random ones, drawn one after the other as for `slice_1d`, the second made orthogonal to
        the first.
    a, b : array (K,), (L,), optional
        Where to look; by default 101 and 51 places from −1 to 1.

    The other parameters and what is raised are those of `slice_1d`.

    Returns
    -------
    Plane

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> from fastloss.landscape import slice_2d
    >>> objective = fl.LinearObjective(fl.Softmax(), np.eye(3), np.arange(3))
    >>> slice_2d(objective, np.zeros((3, 4)), a=[-1, 0, 1], b=[0, 1]).values.shape
    (2, 3)
    """
    start = _weights(objective, W, "W")
    rng = np.random.default_rng(checks.integer(seed, "seed", low=0))
    if directions is None:
        first, second = (_direction(objective, None, start, "directions", rng) for _ in range(2))
        if start.size > 1:
            length = math.sqrt(float(np.square(second).sum()))
            second -= first * (np.vdot(first, second) / np.vdot(first, first))
            second *= length / math.sqrt(float(np.square(second).sum()))
    else:
        if not isinstance(directions, tuple | list) or len(directions) != 2:
            raise TypeError(f"directions is {type(directions).__name__}; it must be a pair of arrays like W, or None")
        first, second = (_weights(objective, given, f"directions[{k}]", start) for k, given in enumerate(directions))
    places = _places(a, "a"), _places(b, "b")
    return Plane(*places, _plane(objective, start, (first, second), *places, rows), (first, second))


# --- kinks ---------------------------------------------------------------------------------------------------------
class _Lines(NamedTuple):
    """Margins of some rows along a ray, as lines `height + a · slope` (n, C); 0 in the place of the target."""

    height: Array
    slope: Array
    target: Array


def _lines(loss: Hinge, part: _Part) -> _Lines:
    start, along = part.scores
    each = np.arange(len(start))
    margins = loss.margin if loss.pair_margins is None else loss.pair_margins[part.targets]
    height, slope = (scores - scores[each, part.targets, None] for scores in (start, along))
    height += margins
    height[each, part.targets] = 0
    return _Lines(height, slope, part.targets)


class _Kinks(NamedTuple):
    """Kinks of some rows within (low, high): place, row among them, growth of the slope, and whether the larger of two
    margins changes, neither of which is 0; and for every row the slope at `low`, to its right.
    """

    a: Array
    row: Array
    change: Array
    switch: Array
    slope: Array


def _sum_kinks(lines: _Lines, low: float, high: float) -> _Kinks:
    """Where a margin crosses 0."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        at = -lines.height / lines.slope
    row, column = np.nonzero((at > low) & (at < high))
    begin = lines.height + low * lines.slope
    slope = np.where((begin > 0) | ((begin == 0) & (lines.slope > 0)), lines.slope, 0).sum(axis=1)
    change = np.abs(lines.slope[row, column])
    return _Kinks(at[row, column], row, change, np.zeros(len(row), bool), slope)


def _max_kinks(lines: _Lines, low: float, high: float) -> _Kinks:
    """Where another line becomes the highest: a walk along the upper envelope of each row, of all rows at once."""
    height, slope, target = lines
    n = len(height)
    each = np.arange(n)
    begin = height + low * slope
    # Of those that are highest at `low`, the steepest is the highest to the right of it.
    active = np.where(begin == begin.max(axis=1, keepdims=True), slope, -np.inf).argmax(axis=1)
    first = slope[each, active]
    at = np.full(n, low)
    found: list[tuple[Array, ...]] = []
    rows = each
    while len(rows):
        rise = slope[rows] - slope[rows, active[rows], None]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            meet = (height[rows, active[rows], None] - height[rows]) / rise
        meet = np.where(rise > 0, np.maximum(meet, at[rows, None]), np.inf)
        place = meet.min(axis=1)
        inside = place < high
        rows, rise, meet, place = rows[inside], rise[inside], meet[inside], place[inside]
        following = np.where(meet == place[:, None], rise, -np.inf).argmax(axis=1)
        both = (following != target[rows]) & (active[rows] != target[rows])
        found.append((place, rows, rise[np.arange(len(rows)), following], both))
        active[rows], at[rows] = following, place
    joined = [np.concatenate(column) for column in zip(*found, strict=True)] if found else [np.empty(0)] * 4
    return _Kinks(joined[0], joined[1].astype(np.intp), joined[2], joined[3].astype(bool), first)


def _kinks(loss: Hinge, part: _Part, low: float, high: float) -> _Kinks:
    return (_max_kinks if loss.over == "max" else _sum_kinks)(_lines(loss, part), low, high)


def count_kinks(objective: LinearObjective, W: Array, direction: Array, low: float, high: float) -> int:
    """How often the slope of the objective jumps along a ray, between `low` and `high`: for `fastloss.check`.

    A squared hinge has no kink where a margin crosses 0, but has where another class becomes the largest.
    """
    loss, count = objective.loss, 0
    if isinstance(loss, Hinge) and (loss.power == 1 or loss.over == "max"):
        for part in _Rows(objective, [W, direction], None).parts():
            kinks = _kinks(loss, part, low, high)
            live = kinks.change > 0 if part.weight is None else part.weight[kinks.row] > 0
            count += int(np.count_nonzero(live & (kinks.switch | (loss.power == 1))))
    if objective.penalty is not None and objective.penalty.by == "prox":
        start, along = objective.penalised(W), objective.penalised(direction)
        moved = along != 0
        at = -start[moved] / along[moved]
        count += int(np.count_nonzero((at > low) & (at < high)))
    return count


def _interval(low: object, high: object) -> tuple[float, float]:
    low = checks.number(low, "low")
    return low, checks.number(high, "high", low=low, above=True)


def breakpoints(
    objective: LinearObjective,
    W: object,
    direction: object,
    low: float = -1.0,
    high: float = 1.0,
    *,
    rows: object = None,
) -> Breakpoints:
    """The breakpoints of the piecewise-linear hinge along a ray `W + a · direction`, exactly.

    Each margin is linear in a, so it crosses 0 at one place, which is computed rather than looked for.

    Parameters
    ----------
    objective : LinearObjective
        With `Hinge(power=1)`, of any margin and `over`; its penalty does not count.
    W, direction : array (C, D + 1), or (C, D) without bias
    low, high : float
        The ends of the ray; breakpoints strictly between them are found.
    rows : array of int, optional
        The rows of X to use; all by default.

    Returns
    -------
    Breakpoints

    Raises
    ------
    ValueError, TypeError, IndexError
        For arguments that do not fit, and for losses that are not piecewise linear.

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> from fastloss.landscape import breakpoints
    >>> objective = fl.LinearObjective(fl.Hinge(), np.eye(3), np.arange(3))
    >>> found = breakpoints(objective, np.zeros((3, 4)), np.eye(3, 4), low=0, high=2)
    >>> found.a.tolist(), found.ends
    ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], (2.0, 0.0))
    """
    start = _weights(objective, W, "W")
    loss = objective.loss
    if not isinstance(loss, Hinge) or loss.power != 1:
        raise ValueError(f"objective has the loss {loss!r}; only Hinge(power=1) is piecewise linear")
    along = _weights(objective, direction, "direction", start)
    low, high = _interval(low, high)
    used = _Rows(objective, [start, along], rows)
    found: list[tuple[Array, Array, Array]] = []
    slope, share = 0.0, 1 / len(start) if loss.over == "mean" else 1.0
    for part in used.parts():
        kinks = _kinks(loss, part, low, high)
        weight = share * (np.ones(len(part.rows)) if part.weight is None else part.weight)
        change = kinks.change * weight[kinks.row]
        live = change > 0
        found.append((kinks.a[live], part.rows[kinks.row[live]], change[live]))
        slope += float(np.where(weight > 0, kinks.slope, 0) @ weight)
    columns = [np.concatenate(column) for column in zip(*found, strict=True)] if found else [np.empty(0)] * 3
    order = np.argsort(columns[0], kind="stable")
    a, where, change = columns[0][order], columns[1][order].astype(np.intp), used.mean(columns[2][order])
    at_ends = _data_plane(objective, start, (along, np.zeros_like(start)), np.array([low, high]), np.zeros(1), rows)
    ends = (float(at_ends[0, 0]), float(at_ends[0, 1]))
    slopes = float(used.mean(np.array(slope))) + np.r_[0.0, np.cumsum(change)]
    steps = np.diff(np.r_[low, a])
    values = ends[0] + np.cumsum(slopes[:-1] * steps) if len(a) else np.empty(0)
    return Breakpoints(a, values, where, change, low, high, ends)
