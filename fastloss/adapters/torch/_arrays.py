"""Tensors as arrays and back, and the memory of large gradients."""

from __future__ import annotations

import functools
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

FLOAT32_MAX = float(np.finfo(np.float32).max)
LARGE = 1 << 22  # bytes of a gradient from which on its memory is kept for the next


@functools.cache
def bfloat16() -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = np.dtype(import_module("ml_dtypes").bfloat16)
    except ImportError as error:
        raise ImportError(f'bfloat16 tensors need ml_dtypes ({error}): pip install "fastloss[torch]"') from error
    return dtype


def as_array(tensor: Tensor) -> Array:
    """The tensor's memory as an array: never a copy, but where PyTorch has put off a change of sign."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor.dtype == torch.bfloat16:  # which NumPy does not know
        array: Array = tensor.view(torch.int16).numpy().view(bfloat16())
    else:
        array = tensor.numpy()
    return array


def scalar(value: float, dtype: torch.dtype) -> Tensor:
    """A loss; infinite where it is too large for its type, as in PyTorch."""
    if dtype is torch.float32 and -FLOAT32_MAX < value < FLOAT32_MAX:  # at once, in a third of the time
        return torch.scalar_tensor(value, dtype=dtype, device="cpu")
    return torch.scalar_tensor(value, dtype=torch.float64, device="cpu").to(dtype)


def as_tensor(array: Array) -> Tensor:
    if array.itemsize == 2 and array.dtype.name == "bfloat16":
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
        self._memory = np.empty(0, np.uint8)
        self._lent: Callable[[], Array | None] = lambda: None

    def lend(self, size: int) -> Tensor:
        """A tensor of that many bytes, aligned to cache lines."""
        with self._lock:
            if self._lent() is not None or len(self._memory) < size + 64:
                self._memory = np.empty(size + 64, np.uint8)
            start = -self._memory.ctypes.data % 64
            loan = self._memory[start : start + size]
            self._lent = weakref.ref(loan)  # PyTorch holds it as long as there is a tensor in this memory
            return torch.from_numpy(loan)


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
    size = x.numel() * x.element_size()
    if size < LARGE:
        return torch.empty_like(x)
    strides = torch.empty_like(x, device="meta").stride()
    return _reserve.lend(size).view(x.dtype).as_strided(x.shape, strides)
