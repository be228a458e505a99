"""Descent along (mini-batch) gradients: one loop, which `sgd` and `gradient_descent` call.

A step is the lecture's: with η the step size, μ the momentum and g the gradient over a batch,
`v ← μ v − η g`, `W ← W + v`. What a penalty adds is decided by `penalty.by` alone: "gradient" (L2) is part of g;
"prox" (L1, ElasticNet) and "projection" (MaxNorm) leave it out of g and follow the step with
`W ← penalty.step(W, η)`, and v becomes what W moved in all: with the v from before, descent with momentum would rest
where the penalty's strength is (1 − μ) λ (Ochs et al., iPiano, 2014). The bias is never penalised.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastloss import _checks as checks
from fastloss import sparse
from fastloss._checks import Array
from fastloss.linear import LinearObjective, on_host
from fastloss.model import predict
from fastloss.train.checkpoint import Checkpoint, PathLike, describe

Schedule = str | Callable[[int], float]


@dataclass(frozen=True)
class State:
    """Where training stands, as a callback is given it, and as the history keeps it (all but W).

    Attributes
    ----------
    W : array (C, D + 1), or (C, D) without bias
        The weights; read-only, and changed by the steps that follow: copy what is to be kept.
    epoch, step : int
        Passes over the training data, and steps, taken so far.
    step_size : float
        Of the last step taken; before the first step, its own.
    loss : float
        The objective, penalty included, at W over all training data.
    grad_norm : float
        The Euclidean norm of the objective's gradient at W over all training data. For penalties that act by a
        proximal step or projection T: of (W − T(W − η g)) / η with η as in the call, which is 0 at a minimum.
    accuracy : float
        The share of training rows whose target has the highest score; rows with `ignore_index` are left out.
    validation_accuracy : float or None
        The same on the validation data.
    """

    W: Array
    epoch: int
    step: int
    step_size: float
    loss: float
    grad_norm: float
    accuracy: float
    validation_accuracy: float | None = None


@dataclass(frozen=True)
class Result:
    """What training gives back.

    Attributes
    ----------
    W : array (C, D + 1), or (C, D) without bias
        The weights that the last record of the history describes; those of the lowest objective so far after an
        interrupt, and of searches always.
    value : float
        The objective there.
    history : dict of arrays (K,)
        "epoch", "step", "step_size", "loss", "grad_norm", "accuracy" and, with validation data,
        "validation_accuracy", at the start and after epochs: see `State`. Of searches: see `random_search`.
    stopped : {"done", "callback", "interrupted", "diverged"}
        Why training ended; "diverged" only within a `DivergenceError`.
    """

    W: Array
    value: float
    history: dict[str, Array]
    stopped: str


class DivergenceError(ArithmeticError):
    """The loss is no longer finite. `result` holds what the last record describes; None if there is no record."""

    def __init__(self, message: str, result: Result | None) -> None:
        super().__init__(message)
        self.result = result


def _factor(schedule: Schedule, n_steps: int) -> Callable[[int], float]:
    """The function that a schedule stands for: number of steps taken → what the step size is multiplied by."""
    if callable(schedule):

        def checked(step: int) -> float:
            return checks.number(schedule(step), f"schedule({step})", low=0)

        return checked
    checks.one_of(schedule, "schedule", ("constant", "cosine", "step"))
    if schedule == "cosine":
        return lambda step: 0.5 * (1 + math.cos(math.pi * step / n_steps))
    if schedule == "step":
        return lambda step: 1.0 if 2 * step < n_steps else 0.1 if 4 * step < 3 * n_steps else 0.01
    return lambda step: 1.0


def _norm(array: Array) -> float:
    # By NumPy's own sum: a BLAS norm may depend on the number of threads in its last bits.
    return math.sqrt(float(np.square(array, dtype=np.float64).sum()))


def _initial(objective: LinearObjective, W: object, n_classes: int | None) -> Array:
    """A copy of W in the compute type, or zeros for as many classes as were asked for or are found in the targets."""
    if n_classes is not None:
        n_classes = checks.integer(n_classes, "n_classes", low=1)
    if W is not None:
        array = checks.as_array(W, "W").astype(objective.dtype)
        if n_classes is not None and array.ndim == 2 and len(array) != n_classes:
            raise ValueError(f"n_classes is {n_classes}, but W has shape {array.shape}; give one of them")
        return array
    targets, loss = objective.targets, objective.loss
    if n_classes is None and targets.ndim == 2:
        n_classes = targets.shape[1]
    elif n_classes is None:
        known = targets if loss.ignore_index is None else targets[targets != loss.ignore_index]
        n_classes = int(known.max()) + 1 if known.size else 0  # not max(initial=-1): labels may be unsigned
        if n_classes < 1:
            raise ValueError("n_classes is None, and the objective has no targets to find it from; give n_classes")
    return np.zeros((n_classes, objective.X.shape[1] + objective.bias), objective.dtype)


def _validation(objective: LinearObjective, validation: object, n_classes: int) -> tuple[Any, Array] | None:
    """Validation data, checked."""
    if validation is None:
        return None
    if not isinstance(validation, tuple | list) or len(validation) != 2:
        raise TypeError(f"validation is {type(validation).__name__}; it must be a pair (X, targets)")
    X = sparse.features(validation[0], "validation X")
    if isinstance(X, sparse.Csr) and objective.centre is not None:
        raise ValueError("validation X is sparse, but the objective's X is dense with a shift; give it dense")
    y = checks.as_array(validation[1], "validation targets")
    if X.shape[1] != objective.X.shape[1]:
        raise ValueError(f"validation X has shape {X.shape}; it must have the {objective.X.shape[1]} features of X")
    if y.shape != (len(X),) or y.dtype.kind not in "iu":
        raise ValueError(
            f"validation targets has shape {y.shape} and dtype {y.dtype}; it must be ({len(X)},) class indices"
        )
    bad = (y < 0) | (y >= objective.loss.labels(n_classes))
    if objective.loss.ignore_index is not None:
        bad &= y != objective.loss.ignore_index
    if bad.any():
        position = int(bad.argmax())
        raise ValueError(f"validation targets[{position}] is {y[position]}, but W has {n_classes} classes")
    return X, y


def _accuracy(objective: LinearObjective, W: Array, X: Any, targets: Array) -> float:
    weights, b = objective.fold_in(W)
    classes = targets.argmax(axis=1) if targets.ndim == 2 else targets
    if objective.loss.labels(len(W)) > len(W):  # one column, of label 1: that of label 0 would have scores of 0
        weights, b = np.vstack([0 * weights, weights]), None if b is None else np.array([0, b[0]], b.dtype)
        classes = targets[:, 0] > 0.5 if targets.ndim == 2 else targets
    hit = predict(X, weights, b, objective.centre) == classes
    if targets.ndim == 1 and objective.loss.ignore_index is not None:
        hit = hit[targets != objective.loss.ignore_index]
    return float(hit.mean()) if hit.size else math.nan


def _progress_bar(n_steps: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError('progress=True needs tqdm: pip install "fastloss[cli]"') from error
    return tqdm(total=n_steps, unit="step", dynamic_ncols=True)


class _Descent:
    """A training in progress: its checked arguments, the weights and velocity, and how far it has come.

    An epoch is a pass over the rows in batches; over one batch of all rows, if `batch_size` is None.
    """

    def __init__(
        self,
        objective: LinearObjective,
        W: object,
        n_classes: int | None,
        epochs: int,
        batch_size: int | None,
        step_size: float,
        momentum: float,
        schedule: Schedule,
        seed: int,
        validation: object,
        evaluate_every: int,
        callback: Callable[[State], object] | None,
        progress: bool,
        checkpoint: PathLike | None,
        checkpoint_every: float,
        resume: PathLike | None,
    ) -> None:
        on_host(objective)
        self.objective, self.epochs, self.seed = objective, epochs, seed
        self.step_size = checks.number(step_size, "step_size", low=0, above=True)
        self.momentum = checks.number(momentum, "momentum", low=0)
        if self.momentum >= 1:
            raise ValueError(f"momentum is {momentum}; it must be below 1")
        self.evaluate_every = checks.integer(evaluate_every, "evaluate_every", low=1)
        if callback is not None and not callable(callback):
            raise TypeError(f"callback is {callback!r}; it must be a function of one argument, or None")
        self.callback = callback

        self.W = _initial(objective, W, n_classes)
        objective.check_weights(self.W)  # checks W against X, and the targets against W
        self.validation = _validation(objective, validation, len(self.W))
        # Rows of weight 0 would make batches of no weight, which have no mean.
        multiplier = objective.weights.multiplier
        self.rows = np.arange(len(objective.X)) if multiplier is None else np.flatnonzero(multiplier)
        if len(self.rows) == 0:
            raise ValueError("objective has no row of weight above 0; there is nothing to train on")
        size = len(self.rows) if batch_size is None else min(batch_size, len(self.rows))
        self.full = size == len(self.rows)
        if not self.full and objective.reduction != "mean":
            raise ValueError(
                f"objective has reduction={objective.reduction!r}; mini-batches estimate the gradient of a mean: "
                'use reduction="mean", or the full batch'
            )
        self.order = np.empty(len(self.rows), np.intp)
        self.batches: list[Array | None] = [None]
        if not self.full:  # views that stay: each epoch fills `order` anew
            self.batches = [self.order[start : start + size] for start in range(0, len(self.rows), size)]
        n_steps = epochs * len(self.batches)
        self.factor = _factor(schedule, n_steps)

        penalty = objective.penalty
        self.after_step = None if penalty is None or penalty.by == "gradient" else penalty.step
        self.grad, self.velocity = np.empty_like(self.W), np.zeros_like(self.W)
        self.epoch, self.step, self.last_size = 0, 0, self.step_size * self.factor(0)
        self.records: list[dict[str, Any]] = []
        # Weights of the last record, how many records there are, and the lowest loss with its weights; replaced in one
        # assignment: an interrupt finds what fits.
        self.kept = (self.W.copy(), 0, math.inf, self.W)
        options = {
            "epochs": epochs, "batch_size": size, "step_size": self.step_size, "momentum": self.momentum,
            "schedule": schedule, "seed": seed, "evaluate_every": self.evaluate_every, "validation": self.validation,
        }  # fmt: skip
        self.checkpoint = Checkpoint(
            checkpoint, checkpoint_every, resume, lambda: describe("sgd", objective, self.W, options)
        )
        self.bar = _progress_bar(n_steps) if progress else None

    def result(self, stopped: str) -> Result:
        W, n_records, lowest, best = self.kept
        records = self.records[:n_records]
        history = {name: np.array([record[name] for record in records]) for name in records[0]}
        if stopped == "interrupted":
            return Result(best, lowest, history, stopped)
        return Result(W, records[-1]["loss"], history, stopped)

    def check(self, loss: float) -> None:
        if math.isfinite(loss):
            return
        result = self.result("diverged") if self.kept[1] else None
        if self.step == 0:
            raise DivergenceError(f"the loss is {loss} at the start: X or W has NaN, infinity or huge entries", result)
        raise DivergenceError(
            f"the loss is {loss} after {self.step} steps (epoch {self.epoch}) with step_size={self.step_size:g}; "
            "use a smaller one",
            result,
        )

    def full_pass(self) -> float:
        """The objective at W; the gradient that a step takes into `grad`."""
        with np.errstate(over="ignore", invalid="ignore"):
            if self.after_step is None:
                loss, _ = self.objective.value_and_grad(self.W, None, self.grad)
            else:
                loss, _ = self.objective.data_value_and_grad(self.W, None, self.grad)
                loss += self.objective.penalty.value(self.objective.penalised(self.W))  # type: ignore[union-attr]
        self.check(loss)
        return loss

    def grad_norm(self) -> float:
        if self.after_step is None:
            return _norm(self.grad)
        penalised, mapped, size = self.objective.penalised, self.grad.copy(), self.step_size
        moved = penalised(self.W) - size * penalised(self.grad)
        penalised(mapped)[...] = (penalised(self.W) - self.after_step(moved, size)) / size
        return _norm(mapped)

    def record(self, loss: float) -> State:
        """Take down where training stands, after a full pass."""
        objective = self.objective
        record: dict[str, Any] = {
            "epoch": self.epoch,
            "step": self.step,
            "step_size": self.last_size,
            "loss": loss,
            "grad_norm": self.grad_norm(),
            "accuracy": _accuracy(objective, self.W, objective.X, objective.targets),
        }
        if self.validation is not None:
            record["validation_accuracy"] = _accuracy(objective, self.W, *self.validation)
        self.records.append(record)
        W, (_, _, lowest, best) = self.W.copy(), self.kept
        self.kept = (W, len(self.records), loss, W) if loss <= lowest else (W, len(self.records), lowest, best)
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.4g}", accuracy=f"{record['accuracy']:.4f}")
        shown = self.W.view()
        shown.flags.writeable = False
        return State(shown, **record)

    def run_epoch(self) -> None:
        """The steps of one epoch. The body is lean: with small batches its Python is what a step costs."""
        W, grad, velocity, momentum, bar = self.W, self.grad, self.velocity, self.momentum, self.bar
        value_and_grad, after_step, factor = self.objective.data_value_and_grad, self.after_step, self.factor
        descend = self.objective.choose_backend("gradient").descend
        penalty, penalised = self.objective.penalty, self.objective.penalised(W)
        penalised_velocity, n_penalised = self.objective.penalised(velocity), penalised.shape[1]
        # The gradient of the full batch is there already, the penalty's part included.
        decay = 0.0 if penalty is None or after_step is not None or self.full else penalty.decay
        if not self.full:
            # A function of seed and epoch alone: the order of any epoch can be had without those before it.
            self.order[:] = np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)
        with np.errstate(over="ignore", invalid="ignore"):  # divergence is reported by `check`
            for batch in self.batches:
                if batch is not None:
                    loss, _ = value_and_grad(W, batch, grad)
                    if not math.isfinite(loss):
                        self.check(loss)
                self.last_size = size = self.step_size * factor(self.step)
                descend(W, velocity, grad, size, momentum, decay, n_penalised)
                if after_step is not None:
                    moved = after_step(penalised, size)
                    if momentum:
                        penalised_velocity += moved - penalised
                    penalised[...] = moved
                self.step += 1
                if bar is not None:
                    bar.update()
        self.epoch += 1

    def save(self) -> None:
        """A checkpoint after an epoch, before it is evaluated: from there all that follows is done again."""
        if not self.checkpoint.due(last=self.epoch == self.epochs):
            return
        recorded, _, lowest, best = self.kept
        state = {
            "epoch": self.epoch, "step": self.step, "last_size": self.last_size, "records": self.records,
            "lowest": lowest,
        }  # fmt: skip
        arrays = {"W": self.W, "velocity": self.velocity, "recorded": recorded, "best": best}
        self.checkpoint.write(state, arrays)

    def take_up(self) -> None:
        """Go on where the checkpoint is."""
        state, arrays = self.checkpoint.read(("W", "velocity", "recorded", "best"))
        self.W[...], self.velocity[...] = arrays["W"], arrays["velocity"]
        self.epoch, self.step, self.last_size = state["epoch"], state["step"], state["last_size"]
        self.records = state["records"]
        self.kept = (arrays["recorded"], len(self.records), state["lowest"], arrays["best"])
        if self.bar is not None:
            self.bar.update(self.step)

    def run(self) -> Result:
        stopped = "done"
        try:
            if self.checkpoint.resumes:
                self.take_up()
            while True:
                due = self.epoch % self.evaluate_every == 0 or self.epoch == self.epochs
                loss = self.full_pass() if due or self.full else math.nan
                if due:
                    state = self.record(loss)
                    if self.callback is not None and self.callback(state):
                        stopped = "callback"
                        break
                if self.epoch == self.epochs:
                    break
                self.run_epoch()
                self.save()
        except KeyboardInterrupt:
            if not self.kept[1]:
                raise
            stopped = "interrupted"
        finally:
            if self.bar is not None:
                self.bar.close()
        return self.result(stopped)


def sgd(
    objective: LinearObjective,
    W: object = None,
    *,
    n_classes: int | None = None,
    epochs: int = 10,
    batch_size: int = 256,
    step_size: float = 0.1,
    momentum: float = 0.0,
    schedule: Schedule = "constant",
    seed: int = 0,
    validation: object = None,
    evaluate_every: int = 1,
    callback: Callable[[State], object] | None = None,
    progress: bool = False,
    checkpoint: PathLike | None = None,
    checkpoint_every: float = 10.0,
    resume: PathLike | None = None,
) -> Result:
    """Mini-batch stochastic gradient descent, with momentum: `v ← μ v − η g`, `W ← W + v`.

    The same arguments give the same bits, with any number of threads.

    Parameters
    ----------
    objective : LinearObjective
        With `reduction="mean"`. Its penalty is part of the gradient (L2), or follows each step as a proximal step
        (L1, ElasticNet) or projection (MaxNorm).
    W : array (C, D + 1), or (C, D) without bias, optional
        Where to start; copied, in the compute type of the objective. Zeros by default.
    n_classes : int, optional
        C, where W is not given; by default one more than the largest target, or the width of target probabilities.
    epochs : int
        Passes over the training data. Each takes the rows in an order drawn anew.
    batch_size : int
        Rows for each step; the last batch of an epoch may be smaller. Rows of weight 0 are left out. With as many as
        there are rows, or more, this is `gradient_descent`.
    step_size : float
        η, above 0.
    momentum : float
        μ in [0, 1).
    schedule : {"constant", "cosine", "step"} or function
        What η is multiplied by at step t = 0, 1, … of T: 1; ½ (1 + cos(π t / T)); 1, and 0.1 from half of the
        steps, 0.01 from three quarters of them; or `schedule(t)`, at least 0.
    seed : int
        At least 0; gives the order of the rows.
    validation : pair (X, targets), optional
        Data to report accuracy on, with the features as the objective takes them, dense or sparse.
    evaluate_every : int
        The history gets a record at the start, every so many epochs, and at the end; each takes a pass over the data
        for loss and gradient, and one for accuracy.
    callback : function, optional
        Called with a `State` at every record; training stops if it returns True.
    progress : bool
        Show a progress bar (needs tqdm).
    checkpoint : path, optional
        A file (`.npz`, without pickles) that all it takes to go on is written to, after an epoch; replaced as a whole,
        so that it is complete at any moment.
    checkpoint_every : float
        Seconds between two checkpoints, at least 0, which is: after every epoch. The last epoch has one in any case.
    resume : path, optional
        A checkpoint to go on from, to the same bits as without the interruption: with the same data and arguments,
        which is checked, but for what a function given as `schedule` does. It may be that of `checkpoint` too.

    Returns
    -------
    Result
        After Ctrl-C (KeyboardInterrupt) too, with `stopped="interrupted"` and the best W so far: that of the record
        with the lowest objective.

    Raises
    ------
    ValueError, TypeError
        For arguments that do not fit; before anything is computed.
    DivergenceError
        As soon as the loss of a batch, or of all data, is not finite.
    ImportError
        For `progress=True` without tqdm.
    fastloss.data.DataError
        If `resume` is no checkpoint, or one of another training.

    References
    ----------
    CS231n, "Optimization: Stochastic Gradient Descent" and "Neural Networks Part 3" (momentum).

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> from fastloss.train import sgd
    >>> rng = np.random.default_rng(0)
    >>> y = rng.integers(3, size=300)
    >>> X = np.eye(3)[y] + 0.1 * rng.normal(size=(300, 3))
    >>> result = sgd(fl.LinearObjective(fl.Softmax(), X, y, penalty=fl.L2(1e-3)), epochs=5, batch_size=32, momentum=0.9)
    >>> result.history["accuracy"].tolist()[-1]
    1.0
    """
    epochs = checks.integer(epochs, "epochs", low=0)
    batch_size = checks.integer(batch_size, "batch_size", low=1)
    seed = checks.integer(seed, "seed", low=0)
    return _Descent(
        objective, W, n_classes, epochs, batch_size, step_size, momentum, schedule, seed, validation, evaluate_every,
        callback, progress, checkpoint, checkpoint_every, resume,
    ).run()  # fmt: skip


def gradient_descent(
    objective: LinearObjective,
    W: object = None,
    *,
    n_classes: int | None = None,
    steps: int = 100,
    step_size: float = 0.1,
    momentum: float = 0.0,
    schedule: Schedule = "constant",
    validation: object = None,
    evaluate_every: int = 1,
    callback: Callable[[State], object] | None = None,
    progress: bool = False,
    checkpoint: PathLike | None = None,
    checkpoint_every: float = 10.0,
    resume: PathLike | None = None,
) -> Result:
    """Gradient descent on all data: `sgd` whose batch is the whole, so that an epoch is one step.

    Parameters
    ----------
    objective : LinearObjective
        Of either reduction.
    steps : int
        Steps to take.

    The other parameters, the result and what is raised are those of `sgd`.

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> from fastloss.train import gradient_descent
    >>> result = gradient_descent(fl.LinearObjective(fl.Softmax(), np.eye(3), np.arange(3)), steps=2, step_size=1.0)
    >>> result.history["loss"].round(3).tolist()
    [1.099, 0.889, 0.726]
    """
    steps = checks.integer(steps, "steps", low=0)
    return _Descent(
        objective, W, n_classes, steps, None, step_size, momentum, schedule, 0, validation, evaluate_every, callback,
        progress, checkpoint, checkpoint_every, resume,
    ).run()  # fmt: skip
