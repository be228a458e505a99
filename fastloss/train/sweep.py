"""Step sizes on a log scale: the first thing to find out about a training."""

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
from fastloss.train.descent import DivergenceError, Result, _initial, _progress_bar, sgd
from fastloss.train.search import Trial, check_callback


@dataclass(frozen=True)
class Sweep:
    """What a sweep over step sizes found.

    Attributes
    ----------
    step_sizes, losses : array (K,)
        The step sizes tried, and the objective where each training ended; infinity where it diverged.
    histories : tuple of dicts
        The history of each training, up to where it diverged (empty where it did so at once).
    best : float
        The step size of the lowest loss.
    W : array (C, D + 1), or (C, D) without bias
        The weights that it led to.
    value : float
        The objective there.
    stopped : {"done", "callback", "interrupted"}
        Why the sweep ended.
    """

    step_sizes: Array
    losses: Array
    histories: tuple[dict[str, Array], ...]
    best: float
    W: Array
    value: float
    stopped: str


def step_size_sweep(
    objective: LinearObjective,
    low: float = 1e-6,
    high: float = 1.0,
    n: int = 13,
    *,
    run: Callable[..., Result] = sgd,
    callback: Callable[[Trial], Any] | None = None,
    progress: bool = False,
    checkpoint: PathLike | None = None,
    checkpoint_every: float = 10.0,
    resume: PathLike | None = None,
    **options: Any,
) -> Sweep:
    """Train with step sizes that are spread evenly on a log scale, and compare what is reached.

    Parameters
    ----------
    objective : LinearObjective
        X on the host.
    low, high : float
        The smallest and the largest step size, above 0; both are tried.
    n : int
        How many step sizes, at least 1 (then `low` alone).
    run : function
        `sgd` or `gradient_descent`.
    callback : function, optional
        Called with a `Trial` after each training; the sweep stops if it returns True.
    progress : bool
        Show a progress bar over the trainings (needs tqdm).
    checkpoint, checkpoint_every, resume
        As for `sgd`; written after whole trainings.
    **options
        For `run`: `epochs`, `batch_size`, `momentum`, `schedule`, `seed`, `validation` and so on.

    Returns
    -------
    Sweep
        After Ctrl-C too, with `stopped="interrupted"` and the trainings that were complete.

    Raises
    ------
    ValueError, TypeError
        For arguments that do not fit.
    DivergenceError
        If every training diverged.
    fastloss.data.DataError
        If `resume` is no checkpoint, or one of another sweep.

    References
    ----------
    CS231n, "Neural Networks Part 3: Hyperparameter optimization" (search on a log scale).

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> from fastloss.train import gradient_descent, step_size_sweep
    >>> objective = fl.LinearObjective(fl.Softmax(), np.eye(3), np.arange(3))
    >>> sweep = step_size_sweep(objective, 0.01, 10, n=4, run=gradient_descent, steps=5)
    >>> sweep.step_sizes.tolist(), sweep.best
    ([0.01, 0.1, 1.0, 10.0], 10.0)
    """
    on_host(objective)
    low = checks.number(low, "low", low=0, above=True)
    high = checks.number(high, "high", low=low)
    n = checks.integer(n, "n", low=1)
    if not callable(run):
        raise TypeError(f"run is {run!r}; it must be sgd or gradient_descent")
    check_callback(callback)
    for name in ("step_size", "callback", "progress", "checkpoint", "resume"):
        if name in options:
            raise TypeError(f"{name} is no option of the trainings of a sweep; the sweep sets it itself")
    # A power of 10 is that power, not a neighbour of it.
    sizes = [low] if n == 1 else [float(f"{size:.12g}") for size in np.geomspace(low, high, n)]
    W = _initial(objective, options.get("W"), options.get("n_classes"))
    described = {"run": getattr(run, "__name__", "a function"), "step_sizes": tuple(sizes), **options}
    file = Checkpoint(
        checkpoint, checkpoint_every, resume, lambda: describe("step_size_sweep", objective, W, described)
    )
    losses: list[float] = []
    histories: list[dict[str, Array]] = []
    best: tuple[float, Array | None] = (math.inf, None)
    if file.resumes:
        state, arrays = file.read(("W",))
        losses, best = state["losses"], (state["value"], arrays["W"] if arrays["W"].size else None)
        histories = [{name: np.array(values) for name, values in history.items()} for history in state["histories"]]
    stopped = "done"
    bar = _progress_bar(n) if progress else None
    try:
        if bar is not None:
            bar.update(len(losses))
        while len(losses) < n:
            result = _try(run, objective, sizes[len(losses)], options)
            loss = math.inf if result is None or result.stopped == "diverged" else result.value
            if result is not None and result.stopped == "interrupted":
                raise KeyboardInterrupt
            if result is not None and loss < best[0]:
                best = (loss, result.W)
            histories.append({} if result is None else result.history)
            losses.append(loss)
            if bar is not None:
                bar.update()
            if file.due(last=len(losses) == n):
                kept = [{name: values.tolist() for name, values in history.items()} for history in histories]
                state = {"losses": losses, "histories": kept, "value": best[0]}
                file.write(state, {"W": np.empty((0, 0)) if best[1] is None else best[1]})
            if callback is not None and best[1] is not None:
                shown = best[1].view()
                shown.flags.writeable = False
                if callback(Trial(shown, best[0], len(losses), loss)):
                    stopped = "callback"
                    break
    except KeyboardInterrupt:
        if best[1] is None:
            raise
        stopped = "interrupted"
    finally:
        if bar is not None:
            bar.close()
    value, W_best = best
    if W_best is None:
        raise DivergenceError(f"all {len(losses)} step sizes from {low:g} to {high:g} diverged; use smaller ones", None)
    done = len(losses)
    return Sweep(
        np.array(sizes[:done]), np.array(losses), tuple(histories[:done]), sizes[losses.index(value)], W_best, value,
        stopped,
    )  # fmt: skip


def _try(run: Callable[..., Result], objective: LinearObjective, size: float, options: dict[str, Any]) -> Result | None:
    """A training; where it diverges, what it has up to there."""
    try:
        return run(objective, step_size=size, **options)
    except DivergenceError as error:
        return error.result
