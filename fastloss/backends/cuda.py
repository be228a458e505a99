"""NVIDIA GPUs, through numba-cuda. Arrays on a GPU go to `fastloss.gpu.driver` at once; this is for the host's."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import os
from typing import Any

import numpy as np

from fastloss import blocks
from fastloss._checks import Array
from fastloss.backends import Backend

EXTRAS = 'it takes the numba-cuda package: pip install "fastloss[cuda12]" or "fastloss[cuda13]", as the driver is'


def load(variant: str) -> CudaBackend:
    """The backend, if kernels can run here. What is missing is looked for first without importing Numba: slow."""
    if importlib.util.find_spec("numba_cuda") is None:
        raise ImportError(EXTRAS)
    if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") in ("", "0") and not _has_driver():
        raise ImportError("no NVIDIA driver was found (libcuda): there is no GPU here that it could run on")
    from fastloss.gpu import device

    reason = device.why_not()
    if reason is not None:
        raise ImportError(reason)
    return CudaBackend()


def _has_driver() -> bool:
    name = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    try:
        ctypes.CDLL(name)
    except OSError:
        return ctypes.util.find_library("cuda") is not None
    return True


class CudaBackend(Backend):
    """Kernels on the GPU; host arrays are streamed through it in chunks of rows."""

    name = "cuda"

    def __str__(self) -> str:
        from fastloss.gpu import device

        return device.describe()

    def why_not(self, verb: str, loss: Any, dtype: np.dtype[Any], needs: tuple[str, ...]) -> str | None:
        if verb == "hvp":
            return "Hessian products of host arrays do not go through the GPU; put X on it"
        if verb == "stats":
            return "stats of host arrays do not go through the GPU; put the scores on it"
        return None

    def reads(self, dtype: np.dtype[Any]) -> bool:
        return dtype.isnative and dtype.name in ("float16", "bfloat16")

    def score_rows(
        self, loss: Any, scores: Array, targets: Array, multiplier: Array | None, scale: float,
        grad: Array | None, row_loss: Array | None, extras: dict[str, Array], n_threads: int,
    ) -> float:  # fmt: skip
        from fastloss.gpu import host

        return host.score_rows(loss, scores, targets, multiplier, scale, grad, row_loss, extras)

    def linear_rows(
        self, loss: Any, X: Array, rows: Array | None, centre: Array | None, W: Array, b: Array | None, targets: Array,
        multiplier: Array | None, scale: float, dW: Array | None, db: Array | None, dX: Array | None,
        row_loss: Array | None, chunk_rows: int | None, n_threads: int,
    ) -> float:  # fmt: skip
        """Few classes: X is streamed through the GPU. Many, and dX: row losses on the GPU, products by the CPU's BLAS.

        X that is on the GPU itself goes to `gpu.linear`.
        """
        from fastloss.gpu import host

        if dX is None and host.fuses(X, W):
            return host.linear_rows(loss, X, rows, centre, W, b, targets, multiplier, scale, dW, db, row_loss)
        return blocks.linear_rows(
            self, loss, X, rows, centre, W, b, targets, multiplier, scale, dW, db, dX, row_loss, chunk_rows, n_threads
        )  # fmt: skip

    def transform(self, kind: str, scores: Array, out: Array, n_threads: int) -> None:
        from fastloss.gpu import host

        host.transform(kind, scores, out)
