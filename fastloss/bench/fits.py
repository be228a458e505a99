"""What `fastloss bench --suite estimators` trains: real data, and each library's way to fit a model to them.

A *fit* is a function of one setting (iterations, passes, a tolerance) that trains from nothing and says what it
reached: an objective, or a loss on rows held out, which is computed alike for all. Settings are tried from the loosest
on, and the first that reaches the goal is the one that counts: so each library gets the options that suit it best.
"""

from __future__ import annotations

import functools
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastloss as fl
from fastloss._checks import Array
from fastloss.bench import worker
from fastloss.data import DataError, Dataset, find_cifar10, load_cifar10, load_digits, standardisation, standardise

NEWS = "20news-bydate-counts.npz"
HELD_OUT = 5000  # rows that a calibration gets, at most a fifth


class Data(NamedTuple):
    """Features and labels, and those held out."""

    X: Any
    y: Array
    X_test: Any
    y_test: Array


# --- data ----------------------------------------------------------------------------------------------------------
def _data(found: Dataset) -> Data:
    assert found.X_test is not None
    assert found.y_test is not None
    return Data(found.X_train, found.y_train, found.X_test, found.y_test)


def _cifar10() -> Data:
    folder = find_cifar10()
    if folder is None:
        raise DataError("CIFAR-10 is not here: the environment variable FASTLOSS_DATA must name its folder")
    return _data(load_cifar10(folder))


def _digits() -> Data:
    return _data(load_digits())


def dense(quick: bool) -> Data:
    """CIFAR-10 as float32 in [0, 1]; digits where it is a trial."""
    data = _digits() if quick else _cifar10()
    largest = np.float32(data.X.max())
    return data._replace(X=data.X.astype(np.float32) / largest, X_test=data.X_test.astype(np.float32) / largest)


def standardised(quick: bool) -> Data:
    """The same, each feature less its mean and divided by its deviation."""
    data = dense(quick)
    how = standardisation(data.X)
    return data._replace(X=standardise(data.X, *how), X_test=standardise(data.X_test, *how))


def images(quick: bool) -> Data:
    """Half of CIFAR-10's images, averaged over blocks of 4 by 4 pixels: 25000 rows of 192 features, for trees."""
    data = dense(quick)
    if quick:
        return data
    rows = slice(None, None, 2)
    small = data.X[rows].reshape(-1, 3, 8, 4, 8, 4).mean(axis=(3, 5)).reshape(-1, 192)
    return Data(small, data.y[rows], small[:0], data.y[:0])


def _news_file() -> Path:
    text = os.environ.get("FASTLOSS_DATA", "")
    for folder in (Path(text), Path(text).parent) if text else ():
        if (folder / NEWS).is_file():
            return folder / NEWS
    raise DataError(f"{NEWS} is not here: the environment variable FASTLOSS_DATA must name its folder, or one in it")


def sparse(quick: bool) -> Data:
    """20 Newsgroups: log(1 + count), rows of length 1, CSR of float32; digits as CSR where it is a trial."""
    scipy_sparse: Any = import_module("scipy.sparse")
    if quick:
        data = _digits()
        X, y = scipy_sparse.csr_array(data.X.astype(np.float64)), data.y
    else:
        with np.load(_news_file(), allow_pickle=False) as held:
            parts = tuple(held[f"train_{name}"] for name in ("data", "indices", "indptr"))
            columns = 1 + max(int(held[f"{split}_indices"].max()) for split in ("train", "test"))
            y = held["train_y"].astype(np.int64)
        shape = (len(parts[2]) - 1, columns)
        X = scipy_sparse.csr_array((parts[0].astype(np.float64), *parts[1:]), shape=shape)
    X.data = np.log1p(X.data)
    lengths = np.sqrt(np.asarray(X.multiply(X).sum(axis=1)).ravel())
    X = (scipy_sparse.diags_array(1 / np.maximum(lengths, 1e-9)) @ X).tocsr().astype(np.float32)
    X.sort_indices()
    return Data(X, y, X[:0], y[:0])


# --- what is reached -----------------------------------------------------------------------------------------------
def _objective(loss: fl.Loss, data: Data, coef: Any, intercept: Any, C: float, l1: bool = False) -> float:
    """The mean loss plus the penalty over C N: scikit-learn's objective over C N, in float64 beyond the scores."""
    W = np.asarray(coef, np.float64)
    scores = np.asarray(data.X @ W.T.astype(data.X.dtype), np.float64)
    if intercept is not None:
        scores += np.asarray(intercept, np.float64)
    penalty = float(np.abs(W).sum()) if l1 else 0.5 * float(np.square(W).sum())
    return float(loss.value(np.ascontiguousarray(scores), data.y)) + penalty / (C * len(data.y))


def _log_loss(probabilities: Any, y: Array) -> float:
    return float(-np.log(np.maximum(np.asarray(probabilities)[np.arange(len(y)), y], 1e-300)).mean())


#: Data and a setting → seconds, and what was reached.
Outcome = tuple[float, float]
Fit = Callable[[Data, Any, int], Outcome]


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged: it is told when to stop
        found = work()
    return time.perf_counter() - began, found


# --- ways to fit ---------------------------------------------------------------------------------------------------
def _logistic(how: str) -> Fit:
    def fit(data: Data, iterations: int, threads: int) -> Outcome:
        module: Any = import_module("sklearnex.linear_model" if how == "intelex" else "sklearn.linear_model")
        model = module.LogisticRegression(C=1.0, max_iter=iterations, tol=1e-12)
        if how == "accelerate":
            accelerate = import_module("fastloss.adapters.sklearn").accelerate
            with accelerate():
                seconds, model = _timed(lambda: model.fit(data.X, data.y))
        else:
            seconds, model = _timed(lambda: model.fit(data.X, data.y))
        return seconds, _objective(fl.Softmax(), data, model.coef_, model.intercept_, 1.0)

    return fit


def _softmax_classifier(data: Data, iterations: int, threads: int) -> Outcome:
    classifier = import_module("fastloss.adapters.sklearn").SoftmaxClassifier(max_iter=iterations, tol=0.0)
    seconds, model = _timed(lambda: classifier.fit(data.X, data.y))
    return seconds, _objective(fl.Softmax(), data, model.coef_, model.intercept_, 1.0)


def _sgd_ours(data: Data, epochs: int, threads: int) -> Outcome:
    made = import_module("fastloss.adapters.sklearn").SoftmaxClassifier
    classifier = made(solver="sgd", max_iter=epochs, random_state=0)
    seconds, model = _timed(lambda: classifier.fit(data.X, data.y))
    return seconds, _log_loss(model.predict_proba(data.X_test), data.y_test)


def _sgd_one_vs_rest(data: Data, epochs: int, threads: int) -> Outcome:
    """Calibrated on rows that SGD does not see; the calibration's own time is not counted."""
    linear: Any = import_module("sklearn.linear_model")
    frozen: Any = import_module("sklearn.frozen")
    calibration: Any = import_module("sklearn.calibration")
    held = min(HELD_OUT, len(data.y) // 5)
    X, y = data.X[:-held], data.y[:-held]
    machine = linear.SGDClassifier(loss="log_loss", max_iter=epochs, tol=None, random_state=0, n_jobs=threads)
    seconds, machine = _timed(lambda: machine.fit(X, y))
    calibrated = calibration.CalibratedClassifierCV(frozen.FrozenEstimator(machine))
    _, calibrated = _timed(lambda: calibrated.fit(data.X[-held:], data.y[-held:]))
    return seconds, _log_loss(calibrated.predict_proba(data.X_test), data.y_test)


def _lasso_ours(data: Data, iterations: int, threads: int) -> Outcome:
    made = import_module("fastloss.adapters.sklearn").SoftmaxClassifier
    classifier = made(C=1.0, l1_ratio=1.0, max_iter=iterations, tol=0.0)
    seconds, model = _timed(lambda: classifier.fit(data.X, data.y))
    return seconds, _objective(fl.Softmax(), data, model.coef_, model.intercept_, 1.0, l1=True)


def _lasso_saga(data: Data, passes: int, threads: int) -> Outcome:
    linear: Any = import_module("sklearn.linear_model")
    model = linear.LogisticRegression(C=1.0, l1_ratio=1.0, solver="saga", max_iter=passes, tol=1e-12, random_state=0)
    seconds, model = _timed(lambda: model.fit(data.X, data.y))
    return seconds, _objective(fl.Softmax(), data, model.coef_, model.intercept_, 1.0, l1=True)


def _crammer_singer_ours(data: Data, tol: float, threads: int) -> Outcome:
    made = import_module("fastloss.adapters.sklearn").HingeClassifier
    classifier = made(over="max", power=1, fit_intercept=False, tol=tol, random_state=0)
    seconds, model = _timed(lambda: classifier.fit(data.X, data.y))
    return seconds, _objective(fl.Hinge(over="max"), data, model.coef_, None, 1.0)


def _crammer_singer_liblinear(data: Data, tol: float, threads: int) -> Outcome:
    svm: Any = import_module("sklearn.svm")
    machine = svm.LinearSVC(multi_class="crammer_singer", fit_intercept=False, tol=tol, random_state=0)
    seconds, model = _timed(lambda: machine.fit(data.X, data.y))
    return seconds, _objective(fl.Hinge(over="max"), data, model.coef_, None, 1.0)


def _point(data: Data) -> Array:
    """Weights away from the start, alike for all: (C, D + 1)."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((int(data.y.max()) + 1, data.X.shape[1] + 1)).astype(data.X.dtype)


def _per_call(call: Callable[[], float], calls: int) -> Outcome:
    value = call()  # and what is made once for the data
    times = [_timed(call)[0] for _ in range(calls)]
    return float(np.median(times)), value


def _gradient_ours(data: Data, calls: int, threads: int) -> Outcome:
    strength = 1e-4
    objective = fl.LinearObjective(fl.Softmax(), data.X, data.y, penalty=fl.L2(strength / 2))
    W = np.asfortranarray(_point(data))
    return _per_call(lambda: objective.value_and_grad(W)[0], calls)


def _gradient_sklearn(data: Data, calls: int, threads: int) -> Outcome:
    losses: Any = import_module("sklearn._loss")
    module: Any = import_module("sklearn.linear_model._linear_loss")
    W = _point(data)
    model = module.LinearModelLoss(losses.HalfMultinomialLoss(n_classes=len(W)), fit_intercept=True)
    y, coef = data.y.astype(data.X.dtype), W.ravel(order="F")
    options = {"l2_reg_strength": 1e-4, "n_threads": threads}
    return _per_call(lambda: float(model.loss_gradient(coef, data.X, y, **options)[0]), calls)


def _xgboost(ours: bool) -> Fit:
    def fit(data: Data, rounds: int, threads: int) -> Outcome:
        xgboost: Any = import_module("xgboost")
        n_classes = int(data.y.max()) + 1
        table = xgboost.QuantileDMatrix(data.X, data.y)
        options = {
            "num_class": n_classes, "max_depth": 6, "nthread": threads, "base_score": [0.5] * n_classes,
        }  # fmt: skip
        objective = None
        if ours:
            objective = import_module("fastloss.adapters.xgboost").softmax_objective()
        else:
            options["objective"] = "multi:softprob"
        seconds, trees = _timed(lambda: xgboost.train(options, table, num_boost_round=rounds, obj=objective))
        scores = trees.predict(table, output_margin=True).reshape(-1, n_classes)
        return seconds, fl.Softmax().value(np.ascontiguousarray(scores), data.y)

    return fit


def _lightgbm(ours: bool) -> Fit:
    def fit(data: Data, rounds: int, threads: int) -> Outcome:
        lightgbm: Any = import_module("lightgbm")
        table = lightgbm.Dataset(data.X, data.y, free_raw_data=False)
        options = {
            "objective": "multiclass", "num_class": int(data.y.max()) + 1, "num_threads": threads, "verbosity": -1,
            "boost_from_average": False,
        }  # fmt: skip
        if ours:
            options["objective"] = import_module("fastloss.adapters.lightgbm").softmax_objective()
        table.construct()
        seconds, trees = _timed(lambda: lightgbm.train(options, table, num_boost_round=rounds))
        return seconds, fl.Softmax().value(trees.predict(data.X, raw_score=True), data.y)

    return fit


# --- the table -----------------------------------------------------------------------------------------------------
class Way(NamedTuple):
    """A library's way to a goal: settings from the loosest on, and those of a trial."""

    name: str
    fit: Fit
    settings: tuple[Any, ...]
    quick: tuple[Any, ...]
    needs: str = "sklearn"


@dataclass(frozen=True)
class Contest:
    """What is to be reached, by whom; what is ours comes first.

    The goal is `1 + gap` times what the first setting of `best` reaches (a way's name), or the least that any did.
    """

    name: str
    section: str
    data: Callable[[bool], Data]
    ways: Mapping[str, Way]
    best: tuple[str, Any, Any]
    gap: float


_OURS = "fastloss-cython"
_LBFGS = Way("LogisticRegression", _logistic("plain"), (100,), (10,))
_INTEL = Way("LogisticRegression", _logistic("intelex"), (25, 50, 75, 100), (10, 20, 40), "sklearnex")


def contests() -> dict[str, Contest]:
    """All, by name."""
    fit = "Time to an objective, scikit-learn's models"
    found = [
        Contest(
            "accelerate-cifar10", fit, dense,
            {
                _OURS: Way("accelerate()", _logistic("accelerate"), (100,), (10,)),
                "scikit-learn": _LBFGS,
                "scikit-learn-intelex": _INTEL,
            },
            ("scikit-learn", 100, 10), 1e-3,
        ),
        Contest(
            "softmax-classifier-cifar10", fit, dense,
            {
                _OURS: Way("SoftmaxClassifier", _softmax_classifier, (1, 2, 3, 4, 6, 8, 12, 16), (1, 2, 4, 8, 16, 32)),
                "scikit-learn": _LBFGS,
            },
            ("scikit-learn", 100, 10), 1e-3,
        ),
        Contest(
            "sgd-cifar10", fit, standardised,
            {
                _OURS: Way('SoftmaxClassifier(solver="sgd")', _sgd_ours, (1, 2, 3, 5), (1, 2, 4, 8, 16, 32)),
                "scikit-learn": Way("SGDClassifier, calibrated", _sgd_one_vs_rest, (5,), (5,)),
            },
            ("scikit-learn", 5, 5), 0.0,
        ),
        Contest(
            "l1-20news", fit, sparse,
            {
                _OURS: Way(
                    "SoftmaxClassifier(l1_ratio=1)", _lasso_ours,
                    (50, 60, 70, 80, 90, 100, 125, 150, 200, 300, 500), (30, 300),
                ),
                "scikit-learn": Way("saga", _lasso_saga, (25, 30, 35, 40, 45, 50, 60, 80), (30, 300, 3000)),
            },
            (_OURS, 1500, 1000), 1e-3,
        ),
        Contest(
            "crammer-singer-20news", fit, sparse,
            {
                _OURS: Way(
                    "HingeClassifier", _crammer_singer_ours,
                    (0.02, 0.0175, 0.015, 0.0125, 0.01, 0.005), (0.05, 0.005),
                ),
                "scikit-learn": Way(
                    "LinearSVC", _crammer_singer_liblinear,
                    (0.3, 0.25, 0.2, 0.175, 0.15, 0.125, 0.1, 0.05), (0.3, 0.01),
                ),
            },
            (_OURS, 1e-4, 1e-4), 1e-2,
        ),
        Contest(
            "loss-and-gradient-20news", fit, sparse,
            {
                _OURS: Way("LinearObjective", _gradient_ours, (15,), (3,)),
                "scikit-learn": Way("LinearModelLoss", _gradient_sklearn, (15,), (3,)),
            },
            (_OURS, 1, 1), 1e-3,
        ),
    ]  # fmt: skip
    for name, made in (("xgboost", _xgboost), ("lightgbm", _lightgbm)):
        of = {
            _OURS: Way("softmax_objective", made(True), (20,), (2,), name),
            name: Way("its own objective", made(False), (20,), (2,), name),
        }
        # Trees on rounded gradients are not the same to all digits.
        found.append(Contest(f"{name}-cifar10", "Training of boosted trees", images, of, (name, 20, 2), 1e-2))
    return {contest.name: contest for contest in found}


def why_not(way: Way) -> str | None:
    """Why a way cannot be gone here; None if it can."""
    distribution = {"sklearn": "scikit-learn", "sklearnex": "scikit-learn-intelex"}.get(way.needs, way.needs)
    return None if find_spec(way.needs) else f"{distribution} is not installed (pip install {distribution})"


class Session:
    """One library's fits, in its own process."""

    def __init__(self, peer: str, threads: int) -> None:
        self.peer, self.threads = peer, threads
        self._data = functools.lru_cache(maxsize=1)(lambda make, quick: make(quick))
        self._warm: set[str] = set()

    def fit(self, contest: str, setting: Any, quick: bool) -> dict[str, Any]:
        """Seconds and what was reached, or what went wrong."""
        of = contests()[contest]
        way = of.ways[self.peer]
        try:
            data = self._data(of.data, quick)
            with fl.use_backend("cython"):
                if contest not in self._warm:  # imports, and threads that start
                    way.fit(of.data(True), way.quick[0], self.threads)
                    self._warm.add(contest)
                seconds, reached = way.fit(data, setting, self.threads)
        except DataError as error:
            return {"absent": str(error)}
        except Exception as error:  # whatever a library raises is a result
            return {"problem": f"{type(error).__name__}: {error}"}
        return {"seconds": seconds, "reached": reached}


if __name__ == "__main__":
    worker.serve(Session(sys.argv[1], int(sys.argv[2])), int(sys.argv[2]))
