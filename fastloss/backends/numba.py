"""Kernels that Numba compiles as they are first used: no compiler is needed to install them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from fastloss import blocks
from fastloss._checks import Array
from fastloss.backends import NotInstalled, reference


def load(variant: str) -> NumbaBackend:
    """The only variant."""
    if find_spec("numba") is None:
        raise NotInstalled('numba is not installed: pip install "fastloss[numba]"')
    return NumbaBackend()


class NumbaBackend(reference.ReferenceBackend):
    """Loops compiled at run time, on threads of our own."""

    name = "numba"

    def __init__(self) -> None:
        # Now, not at the first call; and an installation of Numba that is broken is no backend.
        self._version: str = import_module("numba").__version__
        self._features = import_module("fastloss.jit.features")

    def __str__(self) -> str:
        return f"compiled as it is used by Numba {self._version}"

    def why_not(self, verb: str, loss: Any, dtype: np.dtype[Any], needs: tuple[str, ...]) -> str | None:
        return "Hessian products are not compiled yet" if verb == "hvp" else None

    def linear_rows(
        self, loss: Any, X: Array, rows: Array | None, centre: Array | None, W: Array, b: Array | None, targets: Array,
        multiplier: Array | None, scale: float, dW: Array | None, db: Array | None, dX: Array | None,
        row_loss: Array | None, chunk_rows: int | None, n_threads: int,
    ) -> float:  # fmt: skip
        if dX is not None or not self._features.can_fuse(X, W):
            return blocks.linear_rows(
                self, loss, X, rows, centre, W, b, targets, multiplier, scale, dW, db, dX, row_loss, chunk_rows,
                n_threads,
            )  # fmt: skip
        value: float = self._features.linear_rows(
            loss, X, rows, centre, W, b, targets, multiplier, scale, dW, db, row_loss, n_threads
        )
        return value
