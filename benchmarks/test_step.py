"""What a training step costs besides its kernels: the same training with kernels that do nothing.

A step on a batch of 256 × 3072 with L2 and momentum; the time shown is that of an epoch of 20 steps, the draw of its
order included.
"""

import numpy as np
import pytest

import fastloss as fl
from fastloss import backends
from fastloss.train.descent import _Descent

STEPS = 20


class NoKernels(backends.Backend):
    """Takes every call, checks rows as the compiled backend does, and computes nothing."""

    name = "no kernels"

    def __init__(self):
        self.first_outside = backends.get("cython").first_outside

    def why_not(self, verb, loss, dtype, needs):
        return None

    def linear_rows(self, *arguments):
        return 1.0

    def descend(self, *arguments):
        return None


@pytest.mark.parametrize("kernels", ["none", "cython"])
def test_an_epoch_of_20_steps(benchmark, monkeypatch, kernels):
    rng = np.random.default_rng(0)
    X = rng.random((256 * STEPS, 3072), np.float32)
    objective = fl.LinearObjective(fl.Softmax(), X, rng.integers(0, 10, len(X)), penalty=fl.L2(1e-3))
    if kernels == "none":
        stub = NoKernels()
        monkeypatch.setattr(fl.LinearObjective, "choose_backend", lambda self, verb: stub)
    training = _Descent(
        objective, None, 10, 10**6, 256, 1e-5, 0.9, "constant", 0, None, 1, None, False
    )  # fmt: skip
    training.full_pass()
    before = training.step
    benchmark(training.run_epoch)
    assert (training.step - before) % STEPS == 0
    assert training.step > before
