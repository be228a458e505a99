"""What the machine can do at most: measures of memory and arithmetic, compiled, that the cases are compared with."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from fastloss import backends
from fastloss._checks import Array


def kernels(dtype: str = "float32") -> Any:
    """The kernel module of a float type (float32 for all but float64), at the level that this processor runs."""
    level = backends.get("cython").name.removeprefix("cython-")
    return import_module(f"fastloss._kernels.f{64 if dtype == 'float64' else 32}_{level}")


def ones(n_bytes: int, dtype: str = "float32") -> Array:
    """An array of ones of at least so many bytes, that begins at a multiple of 64 bytes."""
    itemsize = np.dtype(dtype).itemsize
    n_bytes = max(256, -(-n_bytes // itemsize) * itemsize)
    memory = np.empty(n_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array = memory[start : start + n_bytes].view(dtype)
    array[:] = 1
    return array
