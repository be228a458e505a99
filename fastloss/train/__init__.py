"""Training of linear classifiers: mini-batch SGD, and full-batch gradient descent as its special case."""

from fastloss.train.descent import DivergenceError, Result, State, gradient_descent, sgd

__all__ = ["DivergenceError", "Result", "State", "gradient_descent", "sgd"]
