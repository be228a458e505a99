"""What the boosting libraries' objectives share: gradient and diagonal Hessian in their layout, and the mean loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import fastloss as fl
from fastloss._checks import Array

SMALLEST = 1e-16  # of a Hessian's entries: trees divide by their sums


def labels_of(y: Array) -> Array:
    """Class labels as integers; they come as floats."""
    labels: Array = np.asarray(y).astype(np.int64)
    wrong = np.flatnonzero(labels != np.asarray(y))
    if len(wrong):
        raise ValueError(f"label[{wrong[0]}] is {y[wrong[0]]}; labels must be whole numbers, the classes' indices")
    return labels


@dataclass(frozen=True)
class Objective:
    """A function of predictions and labels for a boosting library, and for its scikit-learn wrapper.

    The library calls it with (predictions, data set), the wrapper with (labels, predictions, weights or None).
    """

    loss: fl.Loss

    def factor(self, n_classes: int) -> float:
        """What the library's own objective multiplies the Hessian's diagonal by."""
        raise NotImplementedError

    def empty(self, shape: tuple[int, ...]) -> Array:
        """An array in the library's layout and type."""
        raise NotImplementedError

    def unpack(self, first: Any, second: Any, sample_weight: Any) -> tuple[Array, Array, Array | None]:
        """Predictions, labels, weights."""
        if not hasattr(second, "get_label"):
            predictions, labels, weight = second, first, sample_weight
        else:
            predictions, labels, weight = first, second.get_label(), second.get_weight()
        predictions = np.asarray(predictions)
        if predictions.ndim != 2:
            raise ValueError(
                f"predictions have shape {predictions.shape}; they must be (N, C): set num_class to how many classes"
            )
        weight = None if weight is None or len(weight) == 0 else np.asarray(weight)
        return predictions, labels_of(labels), weight

    def __call__(self, first: Any, second: Any, sample_weight: Any = None) -> tuple[Array, Array]:
        scores, y, weight = self.unpack(first, second, sample_weight)
        grad, hess = self.empty(scores.shape), self.empty(scores.shape)
        self.loss.check_classes(scores.shape[1])
        factor = self.factor(scores.shape[1])
        if self.loss.kind == "softmax" and not self.loss.general:
            # A row's gradient is p − e_y, of which |g| (1 − |g|) is p (1 − p) at the target and elsewhere: one pass of
            # exponentials does for both.
            found = fl.Softmax().value_and_grad(scores, y, reduction="sum")[1]
            size = np.abs(found)
            curve = (1 - size) * size * found.dtype.type(factor)
            if self.loss.class_weight is not None:
                weight = self.loss.class_weight[y] * (1.0 if weight is None else weight)
            if weight is not None:
                each = weight.astype(found.dtype)[:, None]
                found, curve = found * each, curve * each
            grad[...], hess[...] = found, curve
        else:
            grad[...] = self.loss.value_and_grad(scores, y, sample_weight=weight, reduction="sum")[1]
            # The factor goes in with the weights, before anything is rounded to the library's type.
            each = np.ones(len(y)) if weight is None else weight.astype(np.float64)
            self.loss.hess_diag(scores, y, sample_weight=each * factor, out=hess)
        np.maximum(hess, hess.dtype.type(SMALLEST), out=hess)
        return grad, hess

    def mean(self, first: Any, second: Any, sample_weight: Any = None) -> float:
        """The mean loss."""
        scores, y, weight = self.unpack(first, second, sample_weight)
        return float(self.loss.value(scores, y, sample_weight=weight))
