"""Training of linear classifiers: mini-batch SGD, full-batch gradient descent as its special case, random searches."""

from fastloss.train.descent import DivergenceError, Result, State, gradient_descent, sgd
from fastloss.train.search import Trial, random_local_search, random_search
from fastloss.train.sweep import Sweep, step_size_sweep

__all__ = [
    "DivergenceError",
    "Result",
    "State",
    "Sweep",
    "Trial",
    "gradient_descent",
    "random_local_search",
    "random_search",
    "sgd",
    "step_size_sweep",
]
