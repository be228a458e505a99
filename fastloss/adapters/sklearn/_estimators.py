"""Classifiers with scikit-learn's interface: arguments and labels are checked here, `fastloss.train` does the work.

The objective is scikit-learn's, `C Σ wᵢ ℓᵢ + r ‖W‖₁ + (1 − r) / 2 ‖W‖²` with r = `l1_ratio`, the intercept left out of
the penalty; solvers get it divided by C Σ wᵢ. Two classes have one row of weights v, and are trained as the two rows
−v/2 and v/2: ‖v‖² is twice the sum of their squares, and ‖v‖₁ the sum of their absolute values.

With an intercept, dense features are taken less their mean: W and the minimum stay the same, only the intercept moves,
and solvers need far fewer iterations where means are large beside deviations.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, NamedTuple

import numpy as np
from scipy.sparse import csr_array, issparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state, compute_class_weight
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, column_or_1d, validate_data

import fastloss as fl
from fastloss import _checks as checks
from fastloss import train
from fastloss._checks import Array
from fastloss.model import LinearModel

#: What is taken as it is; the first is what anything else is converted to.
DTYPES = [np.float64, np.float32, np.float16, np.uint8]
#: Iterations (epochs of SGD) where max_iter is None.
MAX_ITER = {"dual": 1000, "lbfgs": 1000, "newton-cg": 100, "fista": 2000, "smoothing": 2000, "sgd": 20}
SOLVERS = {
    "lbfgs": train.lbfgs,
    "newton-cg": train.newton_cg,
    "fista": train.proximal_gradient,
    "smoothing": train.smoothing,
    "dual": train.dual,
}
#: Parameters of SGD alone, and what they are when they are not given.
SGD_ONLY: dict[str, Any] = {
    "batch_size": 256,
    "step_size": "auto",
    "momentum": 0.9,
    "schedule": "cosine",
    "early_stopping": False,  # with it `validation_fraction` and `n_iter_no_change`, which mean nothing without
}
#: Features up to which "lbfgs" and "smoothing" are preconditioned: beyond, a factor of their moments takes too long.
#: Sparse ones must have as many entries as the factor, which is applied twice for each pass over them, or not be many.
PRECONDITIONED, PRECONDITIONED_SPARSE = 4096, 512
SAMPLE_ROWS = 1024  # of which the mean of the features and their size are estimated
#: SGD's step size times the curvature that it meets: about that of the recipes in `fastloss.train.recipes`.
STEP = 0.2
POWER_STEPS = 10  # to find the largest eigenvalue of the features' second moments


class _Data(NamedTuple):
    """Checked training data: rows, the position of each row's class, and what rows count (None: 1)."""

    X: Any  # an array or a CSR matrix
    y: Array
    weight: Array | None

    @property
    def total(self) -> float:
        return float(len(self.y) if self.weight is None else self.weight.sum())

    def pick(self, rows: Array) -> _Data:
        return _Data(self.X[rows], self.y[rows], None if self.weight is None else self.weight[rows])


def _sample(data: _Data) -> tuple[Any, Array | None]:
    """Some rows, evenly spaced, as float64, and what they count; None for all the same (as where none counts)."""
    some = slice(None, None, max(1, len(data.y) // SAMPLE_ROWS))
    weight = None if data.weight is None or not data.weight[some].any() else data.weight[some]
    rows = data.X[some].astype(np.float64)
    return csr_array(rows) if issparse(rows) else rows, weight


def _spread(rows: Any, weight: Array | None, batch_size: int) -> float:
    """The largest eigenvalue of the second moments of (x, 1), and what the noise of a batch adds to it."""
    norms = (rows * rows).sum(axis=1) + 1
    share = np.full(rows.shape[0], 1 / rows.shape[0]) if weight is None else weight / weight.sum()
    longest = rows[[int((share * (norms - 1)).argmax())]]
    direction, largest = np.ravel(longest.toarray() if issparse(longest) else longest), 0.0
    for _ in range(POWER_STEPS):
        length = float(np.sqrt(np.square(direction).sum()))
        if length == 0:
            break
        largest, direction = length, rows.T @ (share * (rows @ (direction / length)))
    return max(1.0, largest) + float(np.average(norms, weights=weight)) / batch_size


def _worth_preconditioning(X: Any) -> bool:
    d = X.shape[1]
    most = PRECONDITIONED if not issparse(X) or X.nnz >= d * d else PRECONDITIONED_SPARSE
    return bool(d <= most)


def _trains_by_sgd(estimator: Any) -> bool:
    if estimator.solver == "sgd":
        return True
    raise AttributeError(f'partial_fit needs solver="sgd"; this one has solver={estimator.solver!r}')


class _LinearClassifier(ClassifierMixin, BaseEstimator):
    """What both classifiers share: all but the loss."""

    C: float
    l1_ratio: float
    fit_intercept: bool
    class_weight: Any
    solver: str
    max_iter: int | None
    tol: float
    warm_start: bool
    random_state: Any
    verbose: int
    batch_size: int
    step_size: Any
    momentum: float
    schedule: Any
    early_stopping: bool
    validation_fraction: float
    n_iter_no_change: int

    # --- parameters ------------------------------------------------------------------------------------------------
    def _loss(self) -> fl.Loss:
        raise NotImplementedError

    def _curvature(self, n_classes: int) -> float:
        """About the largest eigenvalue of the row loss's Hessian with respect to the scores, for SGD's step size."""
        raise NotImplementedError

    def _solvers(self) -> tuple[str, ...]:
        """The solvers that can train the loss with the penalty asked for, the best first."""
        raise NotImplementedError

    def _solver_for(self, name: str, X: Any) -> str:
        """The solver for such features: the one asked for, or the best that takes them."""
        if name != "dual" or issparse(X):
            return name
        if self.solver != "auto":
            raise ValueError('solver is "dual", which takes sparse X; this X is dense: use "auto" or "smoothing"')
        return self._solvers()[1]

    def _check_parameters(self) -> str:
        """Raise for what is not allowed; the name of the solver."""
        if not self._is_free():
            checks.number(self.C, "C", low=0, above=True)
        checks.number(self.l1_ratio, "l1_ratio", low=0, high=1)
        checks.number(self.tol, "tol", low=0)
        if self.max_iter is not None:
            checks.integer(self.max_iter, "max_iter", low=0)
        checks.flag(self.fit_intercept, "fit_intercept")
        checks.flag(self.warm_start, "warm_start")
        checks.integer(int(self.verbose), "verbose", low=0)
        possible = self._solvers()
        checks.one_of(self.solver, "solver", ("auto", *SOLVERS, "sgd"))
        name = possible[0] if self.solver == "auto" else self.solver
        if name not in possible:
            raise ValueError(
                f"solver is {name!r}, which cannot train {self._loss()!r} with l1_ratio={self.l1_ratio}, "
                f"fit_intercept={self.fit_intercept}; "
                f'use "auto", or one of {", ".join(map(repr, possible))}'
            )
        if name != "sgd":
            for option, default in SGD_ONLY.items():
                if getattr(self, option) != default:
                    raise ValueError(
                        f'{option} is {getattr(self, option)!r}, an option of solver="sgd"; solver {name!r} has none'
                    )
        else:
            checks.integer(self.batch_size, "batch_size", low=1)
            checks.integer(self.n_iter_no_change, "n_iter_no_change", low=1)
            checks.number(self.validation_fraction, "validation_fraction", low=0, high=1)
            checks.flag(self.early_stopping, "early_stopping")
            if self.step_size != "auto":
                checks.number(self.step_size, "step_size", low=0, above=True)
        return name

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    # --- data ------------------------------------------------------------------------------------------------------
    def _labels(self, y: Array, classes: Array) -> Array:
        """The position of each label in the sorted classes."""
        positions = np.searchsorted(classes, y).clip(max=len(classes) - 1)
        unknown = classes[positions] != y
        if unknown.any():
            raise ValueError(f"y[{int(unknown.argmax())}] is {y[unknown.argmax()]!r}, which is not one of the classes")
        return positions

    def _weigh(self, X: Array, y: Array, positions: Array, classes: Array, sample_weight: Any) -> Array | None:
        """Sample weights times class weights."""
        if sample_weight is None and self.class_weight is None:
            return None
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, copy=True)
        checks.finite_nonnegative(weight, "sample_weight")
        if self.class_weight is None:
            return np.asarray(weight)
        if isinstance(self.class_weight, str) and self.class_weight == "balanced":
            sums = np.bincount(positions, weights=weight, minlength=len(classes))
            with np.errstate(divide="ignore"):
                each = np.where(sums > 0, weight.sum() / (len(classes) * sums), 0.0)
        else:
            each = compute_class_weight(self.class_weight, classes=classes, y=y)
        return np.asarray(weight * each[positions])

    def _data(self, X: Any, y: Any, sample_weight: Any, classes: Any, reset: bool) -> _Data:
        """Checked data; sets `classes_` where it is new."""
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=DTYPES, reset=reset)
        check_classification_targets(y)
        y = column_or_1d(y, warn=True)
        known = np.unique(y) if classes is None else classes
        if len(known) < 2:
            raise ValueError(
                f"{type(self).__name__} needs samples of at least 2 classes in y; there is only 1 class: {known[0]!r}"
            )
        positions = self._labels(y, known)
        weight = self._weigh(X, y, positions, known, sample_weight)
        if weight is not None and not weight.sum() > 0:
            raise ValueError("sample_weight, times class_weight, is 0 in sum; at least one row must count")
        self.classes_ = known
        return _Data(X, positions, weight)

    # --- training --------------------------------------------------------------------------------------------------
    def _is_free(self) -> bool:
        """Whether there is no penalty."""
        return isinstance(self.C, float | np.floating) and bool(np.isposinf(self.C))

    def _penalty(self, total: float) -> fl.Penalty | None:
        if self._is_free():
            return None
        strength, ratio = 1 / (float(self.C) * total), float(self.l1_ratio)
        half = 1.0 if len(self.classes_) == 2 else 0.5
        if ratio == 0:
            return fl.L2(strength * half)
        if ratio == 1:
            return fl.L1(strength)
        return fl.ElasticNet(strength * ratio, beta=half * (1 - ratio) / ratio)

    def _objective(self, data: _Data, total: float) -> fl.LinearObjective:
        dtype = checks.compute_dtype(data.X.dtype, "X")
        shift = None
        if self.fit_intercept and not issparse(data.X):
            rows, weight = _sample(data)
            shift = np.average(rows, axis=0, weights=weight).astype(dtype)
        return fl.LinearObjective(
            self._loss(), data.X, data.y, penalty=self._penalty(total), bias=bool(self.fit_intercept),
            sample_weight=data.weight, shift=shift,
        )  # fmt: skip

    def _start(self, objective: fl.LinearObjective) -> Array | None:
        """The weights of the last fit for the objective's rows; None without one."""
        if not hasattr(self, "coef_"):
            return None
        coef, intercept = self.coef_.astype(np.float64), self.intercept_.astype(np.float64)
        rows = 1 if len(self.classes_) == 2 else len(self.classes_)
        if coef.shape != (rows, objective.X.shape[1]):
            return None
        if objective.bias:
            if objective.centre is not None:
                intercept = intercept + coef @ objective.centre
            coef = np.column_stack([coef, intercept])
        return coef if rows > 1 else np.concatenate([-coef / 2, coef / 2])

    def _finish(self, W: Array, objective: fl.LinearObjective) -> None:
        """`coef_` and `intercept_` of what a solver found."""
        W = W.astype(np.float64)
        if len(self.classes_) == 2:
            W = W[1:] - W[:1]
        if objective.bias:
            coef, intercept = W[:, :-1], W[:, -1]
            if objective.centre is not None:
                intercept = intercept - coef @ objective.centre
        else:
            coef, intercept = W, np.zeros(len(W))
        self.coef_, self.intercept_ = coef.astype(objective.dtype), intercept.astype(objective.dtype)

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> _LinearClassifier:
        """Train.

        Parameters
        ----------
        X : array or sparse matrix (n_samples, n_features)
            float32, float64, float16 and uint8 are used as they are, anything else as float64. CSR of float32 or
            float64 with sorted indices is used as it is, other sparse formats are converted to it; never made dense.
        y : array (n_samples,)
            Labels of any kind.
        sample_weight : array (n_samples,), optional
            At least 0.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            For parameters and data that do not fit; before anything is computed.
        """
        name = self._check_parameters()
        before = getattr(self, "classes_", None)
        data = self._data(X, y, sample_weight, None, reset=True)
        name = self._solver_for(name, data.X)
        objective = self._objective(data, data.total)
        same = before is not None and np.array_equal(before, self.classes_)
        W = self._start(objective) if self.warm_start and same else None
        max_iter = MAX_ITER[name] if self.max_iter is None else self.max_iter
        if name == "sgd":
            self._fit_sgd(data, W, max_iter)
            return self
        more: dict[str, Any] = {}
        if name in ("lbfgs", "smoothing"):
            more["precondition"] = _worth_preconditioning(data.X)
        elif name == "dual":
            more["seed"] = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        found = SOLVERS[name](
            objective, W, n_classes=len(self.classes_) if W is None else None, tol=self.tol, max_iter=max_iter,
            callback=self._reporter(name), **more,
        )  # fmt: skip
        self._finish(found.W, objective)
        self.n_iter_ = np.array([found.n_iter], np.int32)
        if self.verbose:
            print(f"{name}: {found.n_iter} iterations, objective {found.value:.6g} ({found.message})")
        if not found.converged:
            warnings.warn(
                f"{name} did not converge in {found.n_iter} iterations: {found.message}. Scaled features (as by "
                "StandardScaler), a larger max_iter or a larger tol may help.",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def _reporter(self, name: str) -> Any:
        """Prints a line for each iteration if asked to."""
        if self.verbose < 2:
            return None
        count = iter(range(1, 1 << 62))
        return lambda W, value: print(f"{name}: iteration {next(count)}, objective {value:.6g}")

    # --- SGD -------------------------------------------------------------------------------------------------------
    def _descend(
        self, data: _Data, W: Array | None, total: float, epochs: int, seed: int, more: dict[str, Any]
    ) -> train.Result:
        objective = self._objective(data, total)
        if W is not None:
            W = self._start(objective)  # for the shift of these rows
        size = self.step_size
        if size == "auto":
            rows, weight = _sample(data)
            if objective.centre is not None:
                rows -= objective.centre
            size = STEP / (self._curvature(len(self.classes_)) * _spread(rows, weight, self.batch_size))
        result = train.sgd(
            objective, W, n_classes=len(self.classes_) if W is None else None, epochs=epochs,
            batch_size=self.batch_size, step_size=size, momentum=self.momentum, seed=seed, **more,
        )  # fmt: skip
        if result.stopped == "interrupted":
            raise KeyboardInterrupt
        self._finish(result.W, objective)
        return result

    def _fit_sgd(self, data: _Data, W: Array | None, epochs: int) -> None:
        random = check_random_state(self.random_state)
        seed = int(random.randint(np.iinfo(np.int32).max))
        more: dict[str, Any] = {"schedule": self.schedule, "evaluate_every": max(1, epochs)}
        total = data.total
        stopping = None
        if self.early_stopping:
            held = random.permutation(len(data.y))
            count = max(1, round(self.validation_fraction * len(held)))
            if count >= len(held):
                raise ValueError(
                    f"validation_fraction is {self.validation_fraction}, which leaves none of {len(held)} rows to train"
                )
            kept, out = np.sort(held[count:]), np.sort(held[:count])
            validation, data = data.pick(out), data.pick(kept)
            if not data.total > 0:
                raise ValueError("the rows left to train on have no weight; use a smaller validation_fraction")
            total = data.total
            stopping = _Stopping(self.tol, self.n_iter_no_change)
            more |= {"evaluate_every": 1, "validation": (validation.X, validation.y), "callback": stopping}
        result = self._descend(data, W, total, epochs, seed, more)
        self.n_iter_ = np.array([result.history["epoch"][-1]], np.int32)
        self._seen = total
        if self.verbose:
            print(f"sgd: {self.n_iter_[0]} epochs, objective {result.value:.6g}")
        if stopping is not None and result.stopped == "done":
            warnings.warn(
                f"sgd took all {epochs} epochs, and the accuracy on the rows held out may still be rising: a larger "
                "max_iter, or larger steps, may help.",
                ConvergenceWarning,
                stacklevel=3,
            )

    @available_if(_trains_by_sgd)  # type: ignore[untyped-decorator]
    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> _LinearClassifier:
        """One epoch of mini-batches over some rows, from the weights as they are; for `solver="sgd"`.

        Steps get shorter with each call, as 1 / √calls. The penalty is as strong as if the rows seen so far were all
        there are.

        Parameters
        ----------
        X, y, sample_weight
            As in `fit`.
        classes : array (n_classes,)
            All labels there will be; needed by the first call, and by none after it.

        Returns
        -------
        self
        """
        self._check_parameters()
        first = not hasattr(self, "coef_")
        if first and classes is None:
            raise ValueError("classes is None; the first call of partial_fit needs all classes there will be")
        if classes is not None:
            classes = np.unique(classes)
            if not first and not np.array_equal(classes, self.classes_):
                raise ValueError(f"classes is {classes!r}, but earlier calls had {self.classes_!r}")
        if self.class_weight == "balanced":
            raise ValueError('class_weight="balanced" needs all data at once; give partial_fit weights as a dict')
        data = self._data(X, y, sample_weight, self.classes_ if classes is None else classes, reset=first)
        calls = 0 if first else int(getattr(self, "_calls", 0))
        self._seen = data.total + (0.0 if first else self._seen)
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max)) + calls
        W = None if first else np.empty(0)
        factor = 1 / np.sqrt(1 + calls)
        self._descend(data, W, self._seen, 1, seed, {"schedule": lambda step: factor})
        self._calls = calls + 1
        self.n_iter_ = np.array([1 if first else self.n_iter_[0] + 1], np.int32)
        return self

    # --- prediction ------------------------------------------------------------------------------------------------
    def decision_function(self, X: Any) -> Array:
        """Scores of the classes, by chunks of rows: (n_samples, n_classes), or (n_samples,) of the second of two."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", dtype=DTYPES, reset=False)
        W = np.column_stack([self.coef_, self.intercept_])
        scores = LinearModel(W, ("",) * len(W)).scores(X)
        return scores.ravel() if len(W) == 1 else scores

    def predict(self, X: Any) -> Array:
        """The class of the highest score for each row of X: (n_samples,)."""
        scores = self.decision_function(X)
        positions = scores.argmax(axis=1) if scores.ndim == 2 else (scores > 0).astype(np.intp)
        return np.asarray(self.classes_[positions])


class _Stopping:
    """A callback that stops when the accuracy on held-out rows has not risen by `tol` for some epochs."""

    def __init__(self, tol: float, patience: int) -> None:
        self.tol, self.patience, self.best, self.waited = tol, patience, -np.inf, 0

    def __call__(self, state: train.State) -> bool:
        accuracy = -np.inf if state.validation_accuracy is None else state.validation_accuracy
        self.waited = 0 if accuracy > self.best + self.tol else self.waited + 1
        self.best = max(self.best, accuracy)
        return self.waited >= self.patience


PARAMETERS = """C : float
        The inverse of the penalty's strength, above 0; `inf` for no penalty.
    l1_ratio : float in [0, 1]
        0 for ½ ‖W‖², 1 for ‖W‖₁, between for both (elastic net).
    fit_intercept : bool
        Whether scores have an intercept. It is not penalised.
    class_weight : dict, "balanced" or None
        What the rows of each class count, times `sample_weight`; "balanced": as much in sum for each class.
    solver : {{"auto", {solvers}, "sgd"}}
        "auto" takes {auto}. An option that a solver cannot honour raises.
    max_iter : int or None
        Iterations at most, or epochs for "sgd"; None: a number that does for most data, by solver.
    tol : float
        {tol}
    warm_start : bool
        Begin where the last fit ended.
    random_state : int, RandomState or None
        For the order of rows in SGD and in the dual, and the rows that SGD holds out.
    verbose : int
        1 for a line at the end, 2 for one at each iteration.
    batch_size : int
        Rows for each step of SGD; it, and what follows, is for `solver="sgd"` alone.
    step_size : float or "auto"
        "auto" goes by the largest eigenvalue of the features' second moments, on a sample of rows.
    momentum : float in [0, 1)
    schedule : {{"cosine", "constant", "step"}} or function
        How the step size falls: see `fastloss.train.sgd`.
    early_stopping : bool
        Hold out a part of the rows, and stop when their accuracy has not risen by `tol` for `n_iter_no_change` epochs.
    validation_fraction : float
        The part that is held out.
    n_iter_no_change : int"""

ATTRIBUTES = """classes_ : array (n_classes,)
        The labels, sorted.
    coef_ : array (n_classes, n_features), or (1, n_features) for two classes
        float64 if X was, else float32.
    intercept_ : array (n_classes,), or (1,)
    n_iter_ : array (1,)
        Iterations, or epochs.
    n_features_in_ : int
    feature_names_in_ : array (n_features,)
        Where X had names that are strings."""


def _document(solvers: str, auto: str, tol: str) -> Any:
    """Fills in what both docstrings have in common."""

    def fill(cls: Any) -> Any:
        parameters = PARAMETERS.format(solvers=solvers, auto=auto, tol=tol)
        cls.__doc__ = cls.__doc__.replace("<parameters>", parameters).replace("<attributes>", ATTRIBUTES)
        return cls

    return fill


@_document(
    solvers='"lbfgs", "newton-cg", "fista"',
    auto='"lbfgs" where the penalty has a gradient (l1_ratio=0), else "fista"',
    tol="Solvers end when no entry of the gradient of the objective, divided by C Σ w, is larger.",
)
class SoftmaxClassifier(_LinearClassifier):
    """Softmax (multinomial logistic) regression; for two classes logistic regression.

    Minimises `C Σ w ℓ + r ‖W‖₁ + (1 − r) / 2 ‖W‖²`, as scikit-learn's `LogisticRegression`: ℓ is the cross-entropy of a
    row, r is `l1_ratio`.

    Parameters
    ----------
    <parameters>

    Attributes
    ----------
    <attributes>

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from fastloss.adapters.sklearn import SoftmaxClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> classifier = SoftmaxClassifier().fit(X, y)
    >>> round(classifier.score(X, y), 3), classifier.predict_proba(X[:1]).round(2).tolist()
    (0.973, [[0.98, 0.02, 0.0]])
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        l1_ratio: float = 0.0,
        fit_intercept: bool = True,
        class_weight: Any = None,
        solver: str = "auto",
        max_iter: int | None = None,
        tol: float = 1e-4,
        warm_start: bool = False,
        random_state: Any = None,
        verbose: int = 0,
        batch_size: int = 256,
        step_size: Any = "auto",
        momentum: float = 0.9,
        schedule: Any = "cosine",
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 5,
    ) -> None:
        self.C = C
        self.l1_ratio = l1_ratio
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose
        self.batch_size = batch_size
        self.step_size = step_size
        self.momentum = momentum
        self.schedule = schedule
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change

    def _loss(self) -> fl.Loss:
        return fl.Softmax()

    def _curvature(self, n_classes: int) -> float:
        return 1 / n_classes  # where all are equally likely

    def _solvers(self) -> tuple[str, ...]:
        return ("lbfgs", "newton-cg", "fista", "sgd") if self.l1_ratio == 0 else ("fista", "sgd")

    def _two_columns(self, X: Any) -> Array:
        scores = self.decision_function(X)
        return scores if scores.ndim == 2 else np.column_stack([np.zeros_like(scores), scores])

    def predict_proba(self, X: Any) -> Array:
        """The probabilities of the classes: (n_samples, n_classes)."""
        scores = self._two_columns(X)
        return fl.softmax(scores, out=scores)

    def predict_log_proba(self, X: Any) -> Array:
        """The logarithms of the probabilities, without underflow: (n_samples, n_classes)."""
        scores = self._two_columns(X)
        return fl.log_softmax(scores, out=scores)


@_document(
    solvers='"lbfgs", "newton-cg", "fista", "smoothing", "dual"',
    auto='"lbfgs" where the objective has a gradient (power=2 over the sum or mean, l1_ratio=0), "fista" where only '
    'the penalty has none, "smoothing" where only the loss has none ("dual" for sparse X, power=1 over the maximum and '
    'no intercept), else "sgd"',
    tol='Solvers end when no entry of the gradient of the objective, divided by C Σ w, is larger; "smoothing" when '
    'a sharper loss lowers the objective by no more than this part of it; "dual" when the minimum is lower by no more '
    "than that.",
)
class HingeClassifier(_LinearClassifier):
    """A linear support vector machine with one of the multiclass hinge losses.

    Minimises `C Σ w ℓ + r ‖W‖₁ + (1 − r) / 2 ‖W‖²`, where ℓ is made of the margins m_j = s_j − s_y + 1 of the wrong
    classes, r is `l1_ratio`. With two classes, all forms are the support vector machine of one row of weights ("mean"
    halves the loss).

    Parameters
    ----------
    over : {"sum", "mean", "max"}
        Σ_j max(0, m_j)^power (Weston–Watkins); that divided by the number of classes; or max(0, max_j m_j)^power
        (Crammer–Singer).
    power : {1, 2}
        The hinge, or its square, as in `LinearSVC`.
    <parameters>

    Attributes
    ----------
    <attributes>

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from fastloss.adapters.sklearn import HingeClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> round(HingeClassifier(over="max").fit(X, y).score(X, y), 2)
    0.99
    """

    #: Crammer–Singer's maximum has kinks where two classes tie, squared or not.
    _kinks: ClassVar[tuple[str, ...]] = ("max",)

    def __init__(
        self,
        C: float = 1.0,
        *,
        over: str = "sum",
        power: int = 2,
        l1_ratio: float = 0.0,
        fit_intercept: bool = True,
        class_weight: Any = None,
        solver: str = "auto",
        max_iter: int | None = None,
        tol: float = 1e-4,
        warm_start: bool = False,
        random_state: Any = None,
        verbose: int = 0,
        batch_size: int = 256,
        step_size: Any = "auto",
        momentum: float = 0.9,
        schedule: Any = "cosine",
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 5,
    ) -> None:
        self.C = C
        self.over = over
        self.power = power
        self.l1_ratio = l1_ratio
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose
        self.batch_size = batch_size
        self.step_size = step_size
        self.momentum = momentum
        self.schedule = schedule
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change

    def _loss(self) -> fl.Loss:
        return fl.Hinge(over=self.over, power=self.power)

    def _curvature(self, n_classes: int) -> float:
        # Of the square: Σ_j 2 (e_j − e_y)(e_j − e_y)ᵀ, over one j or all. The hinge has none; 1 does for it.
        curvature = 1.0 if self.power == 1 else 4.0 if self.over == "max" else 2.0 * n_classes
        return curvature / n_classes if self.over == "mean" else curvature

    def _solvers(self) -> tuple[str, ...]:
        smooth = self._loss() and self.power == 2 and self.over not in self._kinks
        if smooth:
            return ("lbfgs", "newton-cg", "fista", "sgd") if self.l1_ratio == 0 else ("fista", "sgd")
        if self.l1_ratio > 0:
            return ("sgd",)
        in_dual = self.over == "max" and self.power == 1 and not (self.fit_intercept or self.warm_start)
        in_dual = in_dual and not self._is_free()
        return ("dual", "smoothing", "sgd") if in_dual else ("smoothing", "sgd")
