"""Kernels that Numba compiles as they are first used: no compiler is needed to install them."""

from __future__ import annotations

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
        import numba  # an installation that is broken is no backend

        self._version = numba.__version__

    def __str__(self) -> str:
        return f"compiled as it is used by Numba {self._version}"

    def why_not(self, verb: str, loss: Any, dtype: np.dtype[Any], needs: tuple[str, ...]) -> str | None:
        return "Hessian products are not compiled yet" if verb == "hvp" else None

    def linear_rows(
        self, loss: Any, X: Array, rows: Array | None, centre: Array | None, W: Array, b: Array | None, targets: Array,
        multiplier: Array | None, scale: float, dW: Array | None, db: Array | None, dX: Array | None,
        row_loss: Array | None, chunk_rows: int | None, n_threads: int,
    ) -> float:  # fmt: skip
        from fastloss.jit import features, placeholder

        if dX is not None or not features.can_fuse(X, W) or loss.kind != "softmax" or loss.general or targets.ndim == 2:
            return blocks.linear_rows(
                self, loss, X, rows, centre, W, b, targets, multiplier, scale, dW, db, dX, row_loss, chunk_rows,
                n_threads,
            )  # fmt: skip
        options = np.empty(0, W.dtype)
        return features.linear_rows(
            placeholder.LOSSES[loss.kind], options, X, rows, centre, W, b, targets, multiplier, scale, dW, db, row_loss,
            n_threads,
        )  # fmt: skip
