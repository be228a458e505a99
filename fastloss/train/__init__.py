"""Training of linear classifiers: mini-batch SGD, gradient descent, and solvers that find an objective's minimum."""

from fastloss.train.descent import DivergenceError, Result, State, gradient_descent, sgd
from fastloss.train.minimise import Solution, lbfgs, newton_cg
from fastloss.train.proximal import proximal_gradient
from fastloss.train.smooth_hinge import smoothing

__all__ = [
    "DivergenceError",
    "Result",
    "Solution",
    "State",
    "gradient_descent",
    "lbfgs",
    "newton_cg",
    "proximal_gradient",
    "sgd",
    "smoothing",
]
