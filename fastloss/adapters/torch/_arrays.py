"""Tensors as arrays and back, and the memory of large gradients."""

from __future__ import annotations

import functools
import math
import os
import threading
import weakref
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np

from fastloss._checks import Array

try:
    torch: Any = import_module("torch")
except ImportError as error:
    raise ImportError(f'fastloss.adapters.torch needs PyTorch ({error}): pip install "fastloss[torch]"') from error

Tensor: TypeAlias = Any

#: The largest number of each type; a loss above it is infinite.
MOST = {t: torch.finfo(t).max for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
NUMPY: dict[Any, np.dtype[Any]] = {
    torch.float32: np.dtype("f4"),
    torch.float64: np.dtype("f8"),
    torch.float16: np.dtype("f2"),
}
LARGE = 1 << 22  # bytes of a gradient from which on its memory is kept for the next


@functools.cache
def bfloat16() -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = np.dtype(import_module("ml_dtypes").bfloat16)
    except ImportError as error:
        raise ImportError(f'bfloat16 tensors need ml_dtypes ({error}): pip install "fastloss[torch]"') from error
    return dtype


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return bfloat16() if dtype is torch.bfloat16 else NUMPY[dtype]


def as_array(tensor: Tensor) -> Array:
    """The memory of a tensor on the CPU as an array: never a copy, but where PyTorch has put off a change of sign."""
    if tensor.dtype is torch.bfloat16:  # which NumPy does not know, and which has no sign to put off
        array: Array = tensor.view(torch.int16).numpy().view(bfloat16())
    else:
        array = tensor.numpy(force=True)  # which is of a tensor that requires a gradient, too
    return array


def scalar(value: float, dtype: torch.dtype) -> Tensor:
    """A loss; infinite where it is too large for its type, as in PyTorch."""
    if abs(value) < MOST[dtype]:  # at once, in a third of the time
        return torch.scalar_tensor(value, dtype=dtype, device="cpu")
    return torch.scalar_tensor(value, dtype=torch.float64, device="cpu").to(dtype)


def as_tensor(array: Array) -> Tensor:
    if array.dtype.kind == "V":  # bfloat16's, of NumPy's kinds; its name takes longer
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


class _Reserve:
    """The memory of the last large gradient, lent again once no tensor holds it.

    Fresh memory costs a page fault for every 4 KB, or 2 MB where the system has huge pages (NumPy asks for them,
    PyTorch does not); at 64 MB these take longer than the gradient itself.
    """

    def __init__(self) -> None:
        self.unlock()
        self.empty()

    def unlock(self) -> None:
        """A new lock: in a forked child nobody may be left to open the one that there was."""
        self._lock = threading.Lock()

    def empty(self) -> None:
        self._memory = np.empty(0, np.uint8)  # from an address that begins a cache line
        self._lent: Callable[[], Array | None] = lambda: None

    def lend(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array there, whose holder keeps the memory: PyTorch, as long as there is a tensor in it."""
        size = math.prod(shape) * dtype.itemsize
        with self._lock:
            if self._lent() is not None or len(self._memory) < size:
                fresh = np.empty(size + 64, np.uint8)
                self._memory = fresh[-fresh.ctypes.data % 64 :]
            loan: Array = np.ndarray(shape, dtype, self._memory)
            self._lent = weakref.ref(loan)
            return loan


_reserve = _Reserve()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reserve.unlock)


def empty_cache() -> None:
    """Give back the memory that is kept for the next large gradient, as `torch.cuda.empty_cache` does on the GPU.

    One gradient's memory stays with the process when its tensor is gone, and the next one is computed there.

    Examples
    --------
    >>> from fastloss.adapters.torch import empty_cache
    >>> empty_cache()
    """
    _reserve.empty()


def empty_like(x: Tensor) -> Tensor:
    """A tensor with x's shape and dtype and the strides that `torch.empty_like` gives."""
    if x.nbytes < LARGE:
        return torch.empty_like(x)
    if x.is_contiguous():
        return as_tensor(_reserve.lend(x.shape, numpy_dtype(x.dtype)))
    strides = torch.empty_like(x, device="meta").stride()
    return as_tensor(_reserve.lend((x.numel(),), numpy_dtype(x.dtype))).as_strided(x.shape, strides)
