"""Training of linear classifiers: mini-batch SGD, gradient descent, random searches, and solvers that find an
objective's minimum."""

from fastloss.train.descent import DivergenceError, Result, State, gradient_descent, sgd
from fastloss.train.dual import dual
from fastloss.train.minimise import Solution, lbfgs, newton_cg
from fastloss.train.proximal import proximal_gradient
from fastloss.train.search import Trial, random_local_search, random_search
from fastloss.train.smooth_hinge import smoothing
from fastloss.train.sweep import Sweep, step_size_sweep

__all__ = [
    "DivergenceError",
    "Result",
    "Solution",
    "State",
    "Sweep",
    "Trial",
    "dual",
    "gradient_descent",
    "lbfgs",
    "newton_cg",
    "proximal_gradient",
    "random_local_search",
    "random_search",
    "sgd",
    "smoothing",
    "step_size_sweep",
]
