"""Objectives and metrics for XGBoost, computed by fastloss: `softmax_objective`, and those that XGBoost lacks.

Trees are those of "multi:softprob" where both start from the same scores: XGBoost fits a `base_score` for each class to
its own objective, and starts a custom one at 0.5. Set `base_score` to compare.
>>> import numpy as np, xgboost
>>> from fastloss.adapters.xgboost import softmax_metric, softmax_objective
>>> rng = np.random.default_rng(0)
>>> y = rng.integers(3, size=90)
>>> X = rng.normal(size=(90, 4)) + y[:, None]
>>> trees = xgboost.train({"num_class": 3, "base_score": 0.5, "disable_default_eval_metric": 1}, xgboost.DMatrix(X, y),
...                       num_boost_round=5, obj=softmax_objective(), custom_metric=softmax_metric())
>>> trees.num_boosted_rounds()
5
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import fastloss as fl
from fastloss._checks import Array
from fastloss.adapters import _boosting

__all__ = ["softmax_metric", "softmax_objective", "squared_hinge_objective"]


class Objective(_boosting.Objective):
    """A function for XGBoost and its scikit-learn wrapper: see `softmax_objective`."""

    def factor(self, n_classes: int) -> float:
        return 2.0

    def empty(self, shape: tuple[int, ...]) -> Array:
        return np.empty(shape, np.float32, order="C")


def softmax_objective(*, label_smoothing: float = 0.0, class_weight: Any = None) -> Objective:
    """The softmax cross-entropy as an objective, with the Hessian of XGBoost's own.

    Parameters
    ----------
    label_smoothing, class_weight
        As in `fastloss.Softmax`.

    Returns
    -------
    function
        For `xgboost.train`, and as `objective=` of the scikit-learn wrapper; sample weights count.
    """
    return Objective(fl.Softmax(label_smoothing=label_smoothing, class_weight=class_weight))


def squared_hinge_objective(*, over: str = "sum", margin: float = 1.0, class_weight: Any = None) -> Objective:
    """The squared multiclass hinge as an objective.

    Parameters
    ----------
    over, margin, class_weight
        As in `fastloss.Hinge`.
    """
    return Objective(fl.Hinge(power=2, over=over, margin=margin, class_weight=class_weight))


def softmax_metric(*, name: str = "softmax") -> Callable[[Any, Any], tuple[str, float]]:
    """The mean softmax cross-entropy of raw scores, as a metric for `xgboost.train`'s `custom_metric`.

    Parameters
    ----------
    name : str
        What it is shown as.
    """
    objective = Objective(fl.Softmax())

    def metric(predictions: Any, dataset: Any) -> tuple[str, float]:
        return name, objective.mean(predictions, dataset)

    return metric
