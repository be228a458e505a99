"""Where checks and timings get arrays, moments and memory on a GPU from: PyTorch, CuPy, or numba-cuda alone.

numba-cuda has no products and no bfloat16. In the simulator its arrays are NumPy's. Nothing is imported before it is
asked for.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from fastloss._checks import Array
from fastloss.gpu import arrays

#: NumPy's names of the types of scores.
FLOATS = ("float32", "float64", "float16", "bfloat16")


class Source:
    """An array library that sees a GPU.

    Attributes
    ----------
    name : str
    dtypes : tuple of str
        The types of scores that it has.
    multiplies : bool
        Whether it has matrix products.
    """

    name: str
    dtypes: tuple[str, ...] = FLOATS
    multiplies = True

    def owns(self, array: object) -> bool:
        """Whether an array is this library's."""
        raise NotImplementedError

    def dtype(self, array: Any) -> str:
        """An array's type, by NumPy's name."""
        raise NotImplementedError

    def put(self, array: Array) -> Any:
        """A copy on the device."""
        raise NotImplementedError

    def get(self, array: Any) -> Array:
        """A copy on the host."""
        raise NotImplementedError

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """An array with anything in it."""
        raise NotImplementedError

    def copy(self, out: Any, array: Any) -> None:
        """out ← array, converted, on the current stream."""
        raise NotImplementedError

    def synchronize(self) -> None:
        raise NotImplementedError

    @contextlib.contextmanager
    def other_stream(self) -> Iterator[None]:
        """A stream that is not the default one is current within; at its end the default one waits for it."""
        raise NotImplementedError
        yield

    def mark(self) -> Any:
        """A moment of the current stream."""
        raise NotImplementedError

    def seconds(self, start: Any, stop: Any) -> float:
        """Between two moments; waits for the second."""
        raise NotImplementedError

    def free_bytes(self) -> int:
        """Memory of the device that can be allocated."""
        raise NotImplementedError

    def forget(self) -> None:
        """Give memory that is kept back to the device."""

    def start_peak(self) -> None:
        """Begin to look at the memory that is allocated."""
        raise NotImplementedError

    def peak(self) -> int | None:
        """Bytes that were allocated at most since then, beyond those at that time; None where nobody knows."""
        return None


class Torch(Source):
    """PyTorch; on its CPU where the logic of a caller is tested."""

    name = "torch"

    def __init__(self, device: str = "cuda") -> None:
        self.torch: Any = import_module("torch")
        self.device = device
        if device == "cuda" and not self.torch.cuda.is_available():
            raise ImportError("PyTorch here sees no CUDA device")

    def owns(self, array: object) -> bool:
        return isinstance(array, self.torch.Tensor)

    def dtype(self, array: Any) -> str:
        return str(array.dtype).removeprefix("torch.")

    def put(self, array: Array) -> Any:
        array = np.ascontiguousarray(array)
        if array.dtype.name == "bfloat16":
            return self.torch.from_numpy(array.view(np.int16)).to(self.device).view(self.torch.bfloat16)
        return self.torch.from_numpy(array.copy()).to(self.device)

    def get(self, array: Any) -> Array:
        host = array.detach().cpu()
        if host.dtype == self.torch.bfloat16:
            return np.asarray(host.contiguous().view(self.torch.int16).numpy().view(arrays.bfloat16()))
        return np.asarray(host.numpy())

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self.torch.empty(shape, dtype=getattr(self.torch, dtype), device=self.device)

    def copy(self, out: Any, array: Any) -> None:
        out.copy_(array)

    def synchronize(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    @contextlib.contextmanager
    def other_stream(self) -> Iterator[None]:
        if self.device != "cuda":
            yield
            return
        stream = self.torch.cuda.Stream()
        stream.wait_stream(self.torch.cuda.current_stream())
        with self.torch.cuda.stream(stream):
            yield
        self.torch.cuda.current_stream().wait_stream(stream)

    def mark(self) -> Any:
        if self.device != "cuda":
            return time.perf_counter()
        event = self.torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, stop: Any) -> float:
        if self.device != "cuda":
            return float(stop - start)
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    def free_bytes(self) -> int:
        if self.device != "cuda":
            return 1 << 28
        self.forget()
        return int(self.torch.cuda.mem_get_info()[0])

    def forget(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.empty_cache()

    def start_peak(self) -> None:
        self._before = 0
        if self.device == "cuda":
            self.torch.cuda.reset_peak_memory_stats()
            self._before = int(self.torch.cuda.memory_allocated())

    def peak(self) -> int | None:
        return int(self.torch.cuda.max_memory_allocated()) - self._before if self.device == "cuda" else None


class CuPy(Source):
    """CuPy."""

    name = "cupy"

    def __init__(self) -> None:
        self.cupy: Any = import_module("cupy")
        try:
            found = self.cupy.cuda.runtime.getDeviceCount()
        except Exception as error:  # the runtime's own class, which may not be there either
            raise ImportError(f"CuPy finds no CUDA device: {error}") from error
        if not found:
            raise ImportError("CuPy finds no CUDA device")
        try:
            self.cupy.empty(1, arrays.bfloat16())
        except Exception:  # before CuPy 14, and without ml_dtypes
            self.dtypes = ("float32", "float64", "float16")

    def owns(self, array: object) -> bool:
        return isinstance(array, self.cupy.ndarray)

    def dtype(self, array: Any) -> str:
        return str(array.dtype.name)

    def put(self, array: Array) -> Any:
        return self.cupy.asarray(array)

    def get(self, array: Any) -> Array:
        return np.asarray(self.cupy.asnumpy(array))

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self.cupy.empty(shape, arrays.host_dtype(dtype))

    def copy(self, out: Any, array: Any) -> None:
        out[...] = array

    def synchronize(self) -> None:
        self.cupy.cuda.Device().synchronize()

    @contextlib.contextmanager
    def other_stream(self) -> Iterator[None]:
        stream, before = self.cupy.cuda.Stream(non_blocking=True), self.cupy.cuda.get_current_stream()
        stream.wait_event(before.record())
        with stream:
            yield
        before.wait_event(stream.record())

    def mark(self) -> Any:
        event = self.cupy.cuda.Event()
        event.record()
        return event

    def seconds(self, start: Any, stop: Any) -> float:
        stop.synchronize()
        return float(self.cupy.cuda.get_elapsed_time(start, stop)) / 1e3

    def free_bytes(self) -> int:
        self.forget()
        return int(self.cupy.cuda.runtime.memGetInfo()[0])

    def forget(self) -> None:
        self.cupy.get_default_memory_pool().free_all_blocks()

    def start_peak(self) -> None:
        pass


class Numba(Source):
    """numba-cuda's own device arrays; in its simulator too."""

    name = "numba"
    dtypes = ("float32", "float64", "float16")
    multiplies = False

    def __init__(self) -> None:
        from fastloss.gpu import device

        reason = device.why_not()
        if reason is not None:
            raise ImportError(reason)
        self.cuda: Any = device.cuda
        self._simulated = device.SIMULATED

    def owns(self, array: object) -> bool:
        return arrays.is_device(array)

    def dtype(self, array: Any) -> str:
        return str(array.dtype.name)

    def put(self, array: Array) -> Any:
        return self.cuda.to_device(np.ascontiguousarray(array))

    def get(self, array: Any) -> Array:
        return np.array(array.copy_to_host())

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self.cuda.device_array(shape, arrays.host_dtype(dtype))

    def copy(self, out: Any, array: Any) -> None:
        out.copy_to_device(array)

    def synchronize(self) -> None:
        self.cuda.synchronize()

    @contextlib.contextmanager
    def other_stream(self) -> Iterator[None]:
        yield  # its arrays name their own streams

    def mark(self) -> Any:
        if self._simulated:
            return time.perf_counter()
        event = self.cuda.event()
        event.record()
        return event

    def seconds(self, start: Any, stop: Any) -> float:
        if self._simulated:
            return float(stop - start)
        stop.synchronize()
        return float(self.cuda.event_elapsed_time(start, stop)) / 1e3

    def free_bytes(self) -> int:
        return 1 << 28 if self._simulated else int(self.cuda.current_context().get_memory_info().free)

    def start_peak(self) -> None:
        pass


_KINDS: dict[str, type[Source]] = {"torch": Torch, "cupy": CuPy, "numba": Numba}


@functools.cache
def get(name: str) -> Source:
    """The source of that name; ImportError with the reason where it is not there, or sees no GPU."""
    if name != "numba" and find_spec(name) is None:
        raise ImportError(f"{name} is not installed")
    return _KINDS[name]()


def names() -> tuple[str, ...]:
    """All of them, in the order in which they are asked for."""
    return tuple(_KINDS)
