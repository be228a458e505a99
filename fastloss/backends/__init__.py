"""Backends: what computes. A lazy registry that says of each whether it is there, and why not.

A backend is a module with a class derived from `Backend`. Above this package only
the penalties know one by name: the reference, which defines them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastloss import _checks as checks
from fastloss._checks import Array

if TYPE_CHECKING:
    from fastloss.sparse import Csr


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve the call; the message says why."""


class NotInstalled(ImportError):
    """A backend is no part of this installation, by choice: no reason to warn where another compiled one is there."""


class BackendWarning(UserWarning):
    """The automatic choice passed over a faster backend; the message says why."""


class Stats(NamedTuple):
    """What a shard of the classes tells about its rows: all that the softmax loss and gradient need of the others.

    Shards of the class axis are merged in any order, by `merge`; the arrays may travel between processes in any way.
    They are float64, whatever the scores are, so that what merges round off does not show in a float32 result.
    Stats are of one loss: options that change scores, and class weights within label smoothing, are part of them.
    Of scores on a GPU they are arrays there, and merged there.

    Attributes
    ----------
    maximum : array (N,)
        The largest score; −inf where there is none. Scores here are those after softcap and temperature.
    rest : array (N,)
        Σ exp(s_j − maximum) over all but one class that has the maximum; NaN where a score is NaN or +inf.
    target : array (N,)
        The target's score, 0 where the target is in none of the shards.
    found : array (N,) of integers
        How many of the shards have the target: 1 once all are merged.
    classes : array (N,) of integers
        How many classes the shards have.
    weight : array (N,)
        Σ w_j over the classes, of class weights w, or ones; NaN for a loss without label smoothing, which needs none.
    away : array (N,)
        Σ w_j (maximum − s_j) over the classes whose weight is not 0; NaN as well.

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> scores, targets, loss = np.array([[3.2, 5.1, -1.7]]), np.array([0]), fl.Softmax()
    >>> left, right = loss.stats(scores[:, :2], targets), loss.stats(scores[:, 2:], targets, offset=2)
    >>> merged = left.merge(right)
    >>> round(loss.value_from_stats(merged, targets), 2), round(loss.value(scores, targets), 2)
    (2.04, 2.04)
    """

    maximum: Array
    rest: Array
    target: Array
    found: Array
    classes: Array
    weight: Array
    away: Array

    def merge(self, other: Stats) -> Stats:
        """The stats of the classes of both, which must not overlap. Associative and commutative, up to rounding."""
        if checks.on_gpu(*self, *other):
            from fastloss.gpu import stats as gpu

            return gpu.merge(self, other)
        with np.errstate(all="ignore"):
            maximum = np.maximum(self.maximum, other.maximum)
            # Σ exp(s − maximum) over all of a side. A side without finite scores has nothing, and −inf − −inf is NaN.
            own, others = (
                np.where(side.maximum == -np.inf, 0, (1 + side.rest) * np.exp(side.maximum - maximum))
                for side in (self, other)
            )
            rest = np.where(self.maximum >= other.maximum, self.rest + others, other.rest + own)
            # Of a side without finite scores, this is 0 or infinite, however far away the maximum is.
            away, more = (
                side.away + side.weight * np.where(side.maximum == -np.inf, 0, maximum - side.maximum)
                for side in (self, other)
            )
        target, found = self.target + other.target, self.found + other.found
        classes, weight = self.classes + other.classes, self.weight + other.weight
        return Stats(maximum, rest, target, found, classes, weight, away + more)


class Backend:
    """What a backend can do. The driver has checked all arguments; arrays are NumPy's, native, of the compute dtype
    (float32 or float64) where nothing else is said, of any strides. Scores, and what is like them, may be of another
    type that the backend reads (`reads`).

    Common arguments
    ----------------
    targets : (N,) integers, checked; (N, C) probabilities only if `why_not` did not refuse them
    multiplier : (N,) float or None (all 1)
        The row multiplier. 0: skip the row; write zeros.
    scale : float
        Multiplies the gradients, not the sum that is returned.
    row_loss : (N,) or None
        Receives the unweighted row losses.
    """

    name: str

    def why_not(self, verb: str, loss: Any, dtype: np.dtype[Any], needs: tuple[str, ...]) -> str | None:
        """Why this backend cannot serve a call; None if it can.

        verb is "gradient" (value and gradient), "hvp", "stats" (and the gradient from them) or "transform" (then `loss`
        is its name); needs names the options, kinds of targets and extra outputs that are beyond a plain call.
        """
        raise NotImplementedError

    def reads(self, dtype: np.dtype[Any]) -> bool:
        """Whether scores of a type (16-bit floats) are taken as they are; others are converted before."""
        return False

    def first_outside(self, indices: Array, stop: int, ignored: int | None, n_threads: int = 1) -> int:
        """The position of the first index outside [0, stop) that is not `ignored`; −1 if there is none."""
        bad = (indices < 0) | (indices >= stop)
        if ignored is not None:
            bad &= indices != ignored
        return int(bad.argmax()) if bad.any() else -1

    def checks_as_it_reads(self, probabilities: Array, dtype: np.dtype[Any]) -> bool:
        """Whether `score_rows`, computing in a type, looks at probabilities itself where `extras` has "unfit" (1,): it
        then puts what `first_unfit` finds there, unless that is −1."""
        return False

    def first_unfit(self, numbers: Array, n_threads: int = 1, most: float = np.inf) -> int:
        """The flat position of the first number that is not finite, or not in [0, most]; −1 if there is none."""
        return checks.first_unfit(numbers, most)

    def weigh(
        self, targets: Array, class_weight: Array | None, ignored: int | None, sample_weight: Array | None,
        dtype: np.dtype[Any], n_threads: int = 1,
    ) -> tuple[Array, float, float]:  # fmt: skip
        """What each row counts: sample weight times class weight (both float64), 0 if the target is `ignored`.

        Returns that in `dtype`, the largest before it was rounded, and the sum of the rounded. targets are checked;
        they are class indices if either of the first two options is given.
        """
        weight = np.ones(len(targets)) if sample_weight is None else sample_weight
        if ignored is not None:
            weight = np.where(targets == ignored, 0.0, weight)
        if class_weight is not None:
            weight = weight * class_weight[np.where(weight == 0, 0, targets)]
        with np.errstate(over="ignore"):  # then the largest says so
            rounded = weight.astype(dtype)
        return rounded, float(weight.max(initial=0)), float(rounded.sum(dtype=np.float64))

    def plain_rows(
        self, loss: Any, scores: Array, targets: Array, grad: Array | None, mean: bool, n_threads: int
    ) -> float | None:
        """Σ ℓ or its mean, of scores that are floats and a loss without weights or other options; and its gradient.

        Of the arrays only the dimensions are checked: all else is here, in one step. None where something is wrong, or
        there is no such step; then nothing is written, and the driver goes on.
        """
        return None

    def score_rows(
        self, loss: Any, scores: Array, targets: Array, multiplier: Array | None, scale: float,
        grad: Array | None, row_loss: Array | None, extras: dict[str, Array], n_threads: int,
    ) -> float:  # fmt: skip
        """Σ multiplier · ℓ of given scores; the gradient into `grad` (which may be `scores`)."""
        raise NotImplementedError

    def linear_rows(
        self, loss: Any, X: Array, rows: Array | None, centre: Array | None, W: Array, b: Array | None, targets: Array,
        multiplier: Array | None, scale: float, dW: Array | None, db: Array | None, dX: Array | None,
        row_loss: Array | None, chunk_rows: int | None, n_threads: int,
    ) -> float:  # fmt: skip
        """The same for scores (X − centre) Wᵀ + b, of all rows of X or of `rows`; gradients into those of dW, db, dX
        given.

        X is of any real type and not converted as a whole; `centre` (D,) is subtracted from its rows in the compute
        type, that of W, as they are loaded. targets and multiplier belong to X, not to `rows`.
        """
        raise NotImplementedError

    def hvp_rows(self, loss: Any, scores: Array, targets: Array, multiplier: Array | None, direction: Array) -> Array:
        """multiplier · (Hessian of ℓ) · direction, for each row."""
        raise NotImplementedError

    # --- sparse features (fastloss.sparse); `at` is a slice of X's rows, or their indices ----------------------------
    def csr_scores(self, X: Csr, at: Any, W: Array, b: Array, scores: Array, n_threads: int) -> None:
        """scores (n, C) ← rows of X times W (D, C), plus b; W, b and scores in C order."""
        scores[...] = X[at] @ W
        scores += b

    def csr_accumulate(self, X: Csr, at: Any, scores: Array, dW: Array, n_threads: int) -> None:
        """dW (D, C) += those rowsᵀ times scores (n, C), in C order."""
        dW += X[at].T @ scores

    def dual_epoch(
        self, X: Csr, rows: Array, targets: Array, bounds: Array, squares: Array, margin: float, W: Array, alpha: Array
    ) -> tuple[float, float]:
        """Crammer and Singer's hinge in the dual: each of some rows in turn takes its best alpha (N, C) for those of
        the others, and W = Xᵀ alpha (D, C) follows. For each row a class (int64), C_i, and the square of its length.
        Returns Σ C_i ℓ_i of those rows, each as it was when its turn came, and by how much ‖W‖² grew.
        """
        loss = growth = 0.0
        for i in rows[(bounds[rows] > 0) & (squares[rows] > 0)]:
            part = slice(X.starts[i], X.starts[i + 1])
            features, values = X.indices[part], X.values[part]
            most = np.zeros(len(alpha[i]))
            most[targets[i]] = bounds[i]
            scores, wrong = values.astype(np.float64) @ W[features], most == 0
            loss += float(bounds[i]) * max(0.0, float((scores + margin - scores[targets[i]])[wrong].max(initial=0)))
            D = scores + margin * wrong - squares[i] * (alpha[i] - most)
            sums = np.cumsum(np.sort(D)[::-1]) - squares[i] * bounds[i]
            beta = (sums / np.arange(1, len(D) + 1)).max()
            new = most - np.maximum(D - beta, 0) / squares[i]
            change = (new - alpha[i]).astype(alpha.dtype)
            alpha[i] += change
            np.add.at(W, features, np.multiply.outer(values, change))
            # ‖W + x δᵀ‖² = ‖W‖² + 2 s·δ + ‖x‖² ‖δ‖²
            growth += 2 * float(scores @ change) + float(squares[i]) * float(np.square(change, dtype=np.float64).sum())
        return loss, growth

    #: Whether `csc_accumulate` is there, for which a copy of X by features is kept.
    goes_by_features = False

    def csc_accumulate(self, XT: Csr, at: Array, rows: slice, scores: Array, dW: Array, n_threads: int) -> None:
        """The same by the transpose of X, for rows that follow those before: `at` is where entries of features go on,
        and moves on. With the first rows, dW is written, whatever it has.
        """
        raise NotImplementedError

    def shrink(self, W: Array, grad: Array, q: float, n_threads: int) -> float:
        """grad += q W; the sum of the squares of W, both (C, D) and of one type."""
        grad += grad.dtype.type(q) * W
        return float(np.sum(np.square(W, dtype=np.float64)))

    def transposed(self, W: Array, n_threads: int) -> Array:
        """W (C, D) as (D, C) in C order; W itself, seen from the other side, where it is that."""
        return np.ascontiguousarray(W.T)

    def transpose_back(self, found: Array, dW: Array, scale: float, n_threads: int) -> None:
        """dW (C, D) ← scale times what was found, (D, C)."""
        np.multiply(found.T, found.dtype.type(scale), out=dW)

    def stats_rows(self, loss: Any, scores: Array, targets: Array, offset: int, n_threads: int) -> Stats:
        """The stats of the classes `offset`, `offset + 1`, … whose scores (N, any number of classes) are given."""
        raise NotImplementedError

    def stats_gradient_rows(
        self, loss: Any, scores: Array, targets: Array, offset: int, stats: Stats, multiplier: Array | None,
        scale: float, grad: Array, n_threads: int,
    ) -> None:  # fmt: skip
        """The gradient for those classes, given the stats of all, into `grad` (which may be `scores`)."""
        raise NotImplementedError

    def transform(self, kind: str, scores: Array, out: Array, n_threads: int) -> None:
        """softmax, log_softmax, logsumexp or sigmoid of given scores into `out` (which may be `scores`)."""
        raise NotImplementedError

    def descend(
        self, W: Array, velocity: Array, grad: Array, step_size: float, momentum: float, decay: float, decayed: int
    ) -> None:
        """In place: v ← μ v − η (g + decay · W), W ← W + v, all (C, D); without decay from column `decayed` on."""
        velocity *= momentum
        velocity -= step_size * grad
        velocity[:, :decayed] -= step_size * decay * W[:, :decayed]
        W += velocity


class BackendInfo(NamedTuple):
    name: str
    available: bool
    reason: str


# Name → (module, factory and its argument), fastest first. A module is imported when it is first asked for.
_TABLE: dict[str, tuple[str, str]] = {
    "cython": ("fastloss.backends.cython", "best"),
    "cython-v4": ("fastloss.backends.cython", "v4"),
    "cython-v3": ("fastloss.backends.cython", "v3"),
    "cython-v2": ("fastloss.backends.cython", "v2"),
    "cython-base": ("fastloss.backends.cython", "base"),
    "numba": ("fastloss.backends.numba", "best"),
    "cuda": ("fastloss.backends.cuda", "gpu"),
    "reference": ("fastloss.backends.reference", "best"),
}
_AUTOMATIC = ("cython", "numba", "reference")
_loaded: dict[str, Backend | ImportError] = {}
_warned: set[tuple[str, str]] = set()


@functools.cache
def _environment() -> str | None:
    name = os.environ.get("FASTLOSS_BACKEND") or None
    if name is not None and name not in _TABLE:
        raise BackendError(f"FASTLOSS_BACKEND is {name!r}; it must be one of {', '.join(_TABLE)}")
    return name


_forced: ContextVar[str | None] = ContextVar("fastloss backend", default=None)


def _load(name: str) -> Backend | ImportError:
    """The backend, or the reason why it is not there."""
    found = _loaded.get(name)
    if found is None:
        module_name, variant = _TABLE[name]
        try:
            found = import_module(module_name).load(variant)
        except ImportError as error:
            found = error.with_traceback(None)
        assert isinstance(found, Backend | ImportError)
        _loaded[name] = found
    return found


def names() -> tuple[str, ...]:
    """The names of all backends, fastest first, whether they are there or not."""
    return tuple(_TABLE)


def get(name: str) -> Backend:
    """The backend of that name; `BackendError` with the reason where it is not there."""
    if name not in _TABLE:
        raise BackendError(f"backend is {name!r}; it must be one of {', '.join(_TABLE)}")
    found = _load(name)
    if isinstance(found, ImportError):
        raise BackendError(f"backend {name!r} is not available: {found}")
    return found


def named(name: str | None) -> str | None:
    """The backend that is asked for: by that name, by `use_backend`, or by FASTLOSS_BACKEND; None for any."""
    return name or _forced.get() or _environment()


def choose(name: str | None, verb: str, loss: Any, dtype: np.dtype[Any], needs: tuple[str, ...]) -> Backend:
    """The backend for a call: the one named (here, by `use_backend` or FASTLOSS_BACKEND), else the first that can."""
    name = named(name)
    if name is not None:
        backend = get(name)
        reason = backend.why_not(verb, loss, dtype, needs)
        if reason is not None:
            raise BackendError(f"backend {name!r} cannot serve this call: {reason}")
        return backend
    passed: list[tuple[str, str | ImportError]] = []
    for candidate in _AUTOMATIC:
        found = _loaded.get(candidate) or _load(candidate)
        if isinstance(found, ImportError):
            passed.append((candidate, found))
            continue
        reason = found.why_not(verb, loss, dtype, needs)
        if reason is None:
            if passed:
                _warn(candidate, passed)
            return found
        passed.append((candidate, reason))
    raise BackendError("no backend can serve this call: " + "; ".join(f"{n}: {why}" for n, why in passed))


def _warn(chosen: str, passed: list[tuple[str, str | ImportError]]) -> None:
    """Say once why faster backends were passed over. Those that are not installed are named only where there is no
    other, and then the last of them: what is easiest to install."""
    worth = [(name, why) for name, why in passed if not isinstance(why, NotInstalled)]
    if not worth and chosen == _AUTOMATIC[-1]:
        worth = passed[-1:]
    said = "; ".join(f"{name!r}: {why}" for name, why in worth)
    if said and (chosen, said) not in _warned:
        _warned.add((chosen, said))
        message = f"backend {chosen!r} is used, which is slower than those passed over: {said}"
        warnings.warn(message, BackendWarning, stacklevel=5)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use the named backend within the block (in this thread or task); it raises where it cannot serve a call.

    Examples
    --------
    >>> import fastloss as fl
    >>> with fl.use_backend("reference"):
    ...     round(fl.Hinge().value([[1.3, 4.9, 2.0]], [1]), 1)
    0.0
    """
    get(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def list_backends() -> list[BackendInfo]:
    """Every backend: its name, whether it is available, and what it is or why it is not.

    Examples
    --------
    >>> import fastloss as fl
    >>> [b.available for b in fl.list_backends() if b.name == "reference"]
    [True]
    """
    found = {name: _load(name) for name in _TABLE}
    return [BackendInfo(name, isinstance(b, Backend), str(b)) for name, b in found.items()]
