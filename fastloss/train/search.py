"""The lecture's first two strategies: random weights, and random steps that are kept where the loss falls.

Both draw their numbers from one generator in the order of the lecture's loops, so that a loop in NumPy with
`rng = numpy.random.default_rng(seed)` takes the same steps:

    for _ in range(n):                                        W = scale * rng.standard_normal((C, D + 1))
        W = scale * rng.standard_normal((C, D + 1))           for _ in range(n):
        if L(X, y, W) < best: …                                   tried = W + step * rng.standard_normal((C, D + 1))
                                                                  if L(X, y, tried) < best: W, best = tried, …

Weights drawn and steps added are rounded to the objective's compute type.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastloss import _checks as checks
from fastloss._checks import Array
from fastloss.linear import LinearObjective, on_host
from fastloss.train.checkpoint import Checkpoint, PathLike, describe
from fastloss.train.descent import DivergenceError, Result, _initial, _progress_bar

#: Candidates are tried together as far as they have this many numbers, and their products this many terms: about a
#: second's work, after which an interrupt finds what they were worth.
STACK_VALUES, STACK_TERMS = 1 << 22, 1 << 36
FIRST = 8


@dataclass(frozen=True)
class Trial:
    """Where a search or sweep stands, as its callback is given it after each trial.

    Attributes
    ----------
    W : array (C, D + 1), or (C, D) without bias
        The best weights so far; read-only.
    value : float
        The objective there.
    step : int
        Trials so far.
    loss : float
        The objective of the last trial.
    """

    W: Array
    value: float
    step: int
    loss: float


class _Search:
    """A search in progress: what has been tried, and the best of it."""

    def __init__(
        self,
        kind: str,
        objective: LinearObjective,
        n: int,
        options: dict[str, float],
        seed: int,
        n_classes: int | None,
        callback: Callable[[Trial], object] | None,
        progress: bool,
        checkpoint: PathLike | None,
        checkpoint_every: float,
        resume: PathLike | None,
    ) -> None:
        self.objective = on_host(objective)
        self.n = checks.integer(n, "n", low=1)
        self.options = {name: checks.number(value, name, low=0, above=True) for name, value in options.items()}
        seed = checks.integer(seed, "seed", low=0)
        check_callback(callback)
        self.callback, self.progress = callback, progress
        zeros = _initial(objective, None, n_classes)
        objective.check_weights(zeros)
        self.shape, self.rng = zeros.shape, np.random.default_rng(seed)
        described = {"n": self.n, "seed": seed, **self.options}
        self.checkpoint = Checkpoint(
            checkpoint, checkpoint_every, resume, lambda: describe(kind, objective, zeros, described)
        )
        self.losses: Array = np.empty(self.n)
        #: The best weights, their value, and the number of trials; replaced in one assignment.
        self.kept = (zeros, math.inf, 0)

    def draw(self, k: int, scale: float) -> Array:
        drawn = self.rng.standard_normal((k, *self.shape))
        drawn *= scale
        return drawn.astype(self.objective.dtype)

    def begin(self) -> None:
        """Draw what precedes the trials."""

    def batch(self) -> tuple[Array, Array]:
        """The next candidates (K, C, D + 1), and their values (K,)."""
        raise NotImplementedError

    def save(self) -> None:
        W, value, step = self.kept
        if self.checkpoint.due(last=step == self.n):
            state = {"value": value, "step": step, "rng": self.rng.bit_generator.state}
            self.checkpoint.write(state, {"W": W, "losses": self.losses[:step]})

    def take_up(self) -> None:
        state, arrays = self.checkpoint.read(("W", "losses"))
        self.kept = (arrays["W"], state["value"], state["step"])
        self.losses[: state["step"]] = arrays["losses"]
        self.rng.bit_generator.state = state["rng"]

    def take(self, tried: Array, loss: float) -> bool:
        """Take down a trial; whether the callback asks to stop."""
        W, value, step = self.kept
        self.losses[step] = loss
        if loss < value:  # never so for NaN
            W, value = tried.copy(), loss
            W.flags.writeable = False
        self.kept = (W, value, step + 1)
        return self.callback is not None and bool(self.callback(Trial(W, value, step + 1, loss)))

    def run(self) -> Result:
        stopped = "done"
        bar = None
        try:
            self.begin()
            if self.checkpoint.resumes:
                self.take_up()
            bar = _progress_bar(self.n) if self.progress else None
            if bar is not None:
                bar.update(self.kept[2])
            while self.kept[2] < self.n and stopped == "done":
                candidates, losses = self.batch()
                for tried, loss in zip(candidates, losses, strict=True):
                    if self.take(tried, float(loss)):
                        stopped = "callback"
                        break
                else:
                    self.save()
                if bar is not None:
                    bar.update(self.kept[2] - bar.n)
                    bar.set_postfix(best=f"{self.kept[1]:.4g}")
        except KeyboardInterrupt:
            if self.kept[1] == math.inf:
                raise
            stopped = "interrupted"
        finally:
            if bar is not None:
                bar.close()
        W, value, step = self.kept
        if value == math.inf:
            raise DivergenceError(
                f"none of {step} candidates has a finite loss: X has NaN, infinity or huge entries", None
            )
        losses = self.losses[:step].copy()
        history = {"step": np.arange(1, step + 1), "loss": losses, "best": np.fmin.accumulate(losses)}
        result = W.copy()
        return Result(result, value, history, stopped)


class _Random(_Search):
    def batch(self) -> tuple[Array, Array]:
        size, step = math.prod(self.shape), self.kept[2]
        most = max(1, min(STACK_VALUES // size, STACK_TERMS // (size * max(1, len(self.objective.X)))))
        # Few at first, so that an early interrupt finds something. Known from the step alone: a resumed search has the
        # same batches, for in others the products' last bits may differ.
        candidates = self.draw(min(most, max(FIRST, step), self.n - step), self.options["scale"])
        return candidates, self.objective.values(candidates)


class _Local(_Search):
    def begin(self) -> None:
        self.kept = (self.draw(1, self.options["scale"])[0], math.inf, 0)

    def batch(self) -> tuple[Array, Array]:
        # One at a time: near the start about half are kept, and a new W makes void all that was tried beyond it.
        with np.errstate(over="ignore"):
            candidate = self.kept[0] + self.draw(1, self.options["step"])
        return candidate, np.array([self.objective.value(candidate[0])])


def check_callback(callback: object) -> None:
    if callback is not None and not callable(callback):
        raise TypeError(f"callback is {callback!r}; it must be a function of one argument, or None")


def random_search(
    objective: LinearObjective,
    n: int = 1000,
    scale: float = 1e-4,
    seed: int = 0,
    *,
    n_classes: int | None = None,
    callback: Callable[[Trial], Any] | None = None,
    progress: bool = False,
    checkpoint: PathLike | None = None,
    checkpoint_every: float = 10.0,
    resume: PathLike | None = None,
) -> Result:
    """The lecture's strategy 1, "a first very bad idea": the best of many random W.

    Candidates are `scale` times standard normal numbers; many are tried in one pass over X.

    Parameters
    ----------
    objective : LinearObjective
        X on the host.
    n : int
        Candidates to try, at least 1.
    scale : float
        Above 0.
    seed : int
        At least 0. The i-th candidate is the i-th draw of shape (C, D + 1) from `numpy.random.default_rng(seed)`.
    n_classes : int, optional
        C; by default one more than the largest target, or the width of target probabilities.
    callback : function, optional
        Called with a `Trial` after each candidate, in order; the search stops if it returns True.
    progress : bool
        Show a progress bar (needs tqdm).
    checkpoint, checkpoint_every, resume
        As for `sgd`: a file that is written every so many seconds, and one to go on from, to the same bits.

    Returns
    -------
    Result
        With the best W and its value; history has "step" (1 to n), "loss" (of each candidate) and "best" (so far).
        After Ctrl-C too, with `stopped="interrupted"`.

    Raises
    ------
    ValueError, TypeError
        For arguments that do not fit; before anything is computed.
    DivergenceError
        If no candidate has a finite loss.
    ImportError
        For `progress=True` without tqdm.
    fastloss.data.DataError
        If `resume` is no checkpoint, or one of another search.

    References
    ----------
    CS231n, "Optimization: Strategy #1: Random search".

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> from fastloss.train import random_search
    >>> objective = fl.LinearObjective(fl.Softmax(), np.eye(3), np.arange(3))
    >>> result = random_search(objective, n=100, scale=1.0)
    >>> bool(result.value < np.log(3)), len(result.history["loss"])
    (True, 100)
    """
    return _Random(
        "random_search", objective, n, {"scale": scale}, seed, n_classes, callback, progress, checkpoint,
        checkpoint_every, resume,
    ).run()  # fmt: skip


def random_local_search(
    objective: LinearObjective,
    n: int = 1000,
    scale: float = 1e-3,
    step: float = 1e-4,
    seed: int = 0,
    *,
    n_classes: int | None = None,
    callback: Callable[[Trial], Any] | None = None,
    progress: bool = False,
    checkpoint: PathLike | None = None,
    checkpoint_every: float = 10.0,
    resume: PathLike | None = None,
) -> Result:
    """The lecture's strategy 2: random steps from where we are, taken if the loss falls.

    It starts at `scale` times standard normal numbers, whose loss is not asked for: the first step is always taken.

    Parameters
    ----------
    objective : LinearObjective
        X on the host.
    n : int
        Steps to try, at least 1.
    scale, step : float
        Of the start, and of the steps; above 0.
    seed : int
        At least 0. The start is the first draw of shape (C, D + 1) from `numpy.random.default_rng(seed)`, each step
        the next.

    The other parameters, the result and what is raised are those of `random_search`.

    References
    ----------
    CS231n, "Optimization: Strategy #2: Random local search".

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> from fastloss.train import random_local_search
    >>> objective = fl.LinearObjective(fl.Softmax(), np.eye(3), np.arange(3))
    >>> result = random_local_search(objective, n=200, step=0.1)
    >>> bool((np.diff(result.history["best"]) <= 0).all()), result.value < 0.8
    (True, True)
    """
    return _Local(
        "random_local_search", objective, n, {"scale": scale, "step": step}, seed, n_classes, callback, progress,
        checkpoint, checkpoint_every, resume,
    ).run()  # fmt: skip
