"""Objectives and metrics for LightGBM, computed by fastloss: `softmax_objective`, and those that LightGBM lacks.

Trees are those of "multiclass" where both start from the same scores: LightGBM's own starts from the classes' shares, a
custom objective from 0. Give `init_score`, or `boost_from_average=False`, to compare.
>>> import numpy as np, lightgbm
>>> from fastloss.adapters.lightgbm import softmax_metric, softmax_objective
>>> rng = np.random.default_rng(0)
>>> y = rng.integers(3, size=90)
>>> X = rng.normal(size=(90, 4)) + y[:, None]
>>> trees = lightgbm.train({"num_class": 3, "objective": softmax_objective(), "verbosity": -1}, lightgbm.Dataset(X, y),
...                        num_boost_round=5, feval=softmax_metric())
>>> trees.num_trees()
15
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
    """A function for LightGBM and its scikit-learn wrapper: see `softmax_objective`."""

    def factor(self, n_classes: int) -> float:
        return n_classes / (n_classes - 1) if n_classes > 1 else 1.0

    def empty(self, shape: tuple[int, ...]) -> Array:
        return np.empty(shape, np.float32, order="F")


def softmax_objective(*, label_smoothing: float = 0.0, class_weight: Any = None) -> Objective:
    """The softmax cross-entropy as an objective, with the Hessian of LightGBM's own.

    Parameters
    ----------
    label_smoothing, class_weight
        As in `fastloss.Softmax`.

    Returns
    -------
    function
        For `lightgbm.train`, and as `objective=` of the scikit-learn wrapper; sample weights count.
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


def softmax_metric(*, name: str = "softmax") -> Callable[[Any, Any], tuple[str, float, bool]]:
    """The mean softmax cross-entropy of raw scores, as a metric for `lightgbm.train`'s `feval`.

    Parameters
    ----------
    name : str
        What it is shown as.
    """
    objective = Objective(fl.Softmax())

    def metric(predictions: Any, dataset: Any) -> tuple[str, float, bool]:
        return name, objective.mean(predictions, dataset), False

    return metric
