"""fastloss: multiclass losses and their gradients, fused with the linear layer, as fast as the hardware allows.

>>> import numpy as np, fastloss as fl
>>> scores = np.array([[3.2, 5.1, -1.7]])
>>> value, grad = fl.Hinge().value_and_grad(scores, [0])
>>> round(value, 1), grad.tolist()
(2.9, [[-1.0, 1.0, 0.0]])
"""

from fastloss.backends import BackendError, BackendWarning, Stats, list_backends, use_backend
from fastloss.linear import LinearObjective, linear_value_and_grad
from fastloss.losses import Hinge, Logistic, Loss, Softmax, log_softmax, logsumexp, sigmoid, softmax
from fastloss.penalties import L1, L2, ElasticNet, MaxNorm, Penalty
from fastloss.threads import get_num_threads, set_num_threads, synchronize

__version__ = "0.1.0"

__all__ = [
    "L1",
    "L2",
    "BackendError",
    "BackendWarning",
    "ElasticNet",
    "Hinge",
    "LinearObjective",
    "Logistic",
    "Loss",
    "MaxNorm",
    "Penalty",
    "Softmax",
    "Stats",
    "get_num_threads",
    "linear_value_and_grad",
    "list_backends",
    "log_softmax",
    "logsumexp",
    "set_num_threads",
    "sigmoid",
    "softmax",
    "synchronize",
    "use_backend",
]
