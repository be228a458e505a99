"""Arrays on a GPU, of any library: what kernels read and write, new ones of the caller's kind, and the caller's stream.

Known are CuPy's arrays, PyTorch's CUDA tensors, numba-cuda's device arrays, and whatever has
`__cuda_array_interface__`. This module imports none of those libraries before an array of theirs is given.
Nothing here waits for the GPU.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Shape = tuple[int, ...]


def is_device(value: object) -> bool:
    """Whether `value` is an array on a GPU (or, in numba-cuda's simulator, one of its stand-ins for such)."""
    kind = type(value)
    if kind is np.ndarray:
        return False
    if hasattr(kind, "is_cuda"):  # torch.Tensor has the interface on any device, and raises
        return bool(value.is_cuda)  # type: ignore[attr-defined]
    return hasattr(kind, "__cuda_array_interface__") or kind.__name__ == "FakeCUDAArray"


class View:
    """What is known of an array on a GPU.

    Attributes
    ----------
    owner : the array itself, which keeps its memory
    pointer : int
        The address of its first element; in the simulator, a `device.Pointer`.
    shape : tuple of int
    strides : tuple of int
        In elements.
    dtype : str
        NumPy's name of the type, or "bfloat16".
    gpu : int
        The number of its GPU.
    library : Library
        Makes more arrays of the kind.
    """

    __slots__ = ("dtype", "gpu", "library", "owner", "pointer", "shape", "strides")

    def __init__(
        self, owner: Any, pointer: Any, shape: Shape, strides: Shape, dtype: str, gpu: int, library: Library
    ) -> None:
        self.owner, self.pointer, self.shape, self.strides = owner, pointer, shape, strides
        self.dtype, self.gpu, self.library = dtype, gpu, library

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether it is in C order without gaps."""
        step = 1
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1 and stride != step:
                return self.size == 0
            step *= n
        return True

    @property
    def stream(self) -> int:
        """The handle of the stream that the array's library works on now."""
        return self.library.stream(self)

    def extent(self) -> tuple[int, int]:
        """The bytes from the first that the array may touch to the one past the last: addresses."""
        from fastloss.gpu import device

        size = device.SIZES[self.dtype]
        spans = [(n - 1) * stride * size for n, stride in zip(self.shape, self.strides, strict=True)]
        start = self.address()
        if self.size == 0:
            return start, start
        return start + sum(s for s in spans if s < 0), start + sum(s for s in spans if s > 0) + size

    def address(self) -> int:
        pointer = self.pointer
        return pointer if isinstance(pointer, int) else int(pointer.numbers.__array_interface__["data"][0])

    def overlaps(self, other: View) -> bool:
        """Whether memory is shared, or may be."""
        (a, b), (c, d) = self.extent(), other.extent()
        return a < d and c < b

    def is_same(self, other: View) -> bool:
        """Whether both are the same numbers at the same place."""
        return (self.address(), self.shape, self.dtype) == (other.address(), other.shape, other.dtype) and (
            self.strides == other.strides or (self.is_contiguous and other.is_contiguous)
        )

    def contiguous(self) -> View:
        """This array, or a copy of it in C order."""
        return self if self.is_contiguous else view(self.library.contiguous(self), "the copy")

    def empty(self, shape: Shape, dtype: str) -> View:
        """A new array of the same kind on the same GPU; `.owner` is what a caller gets."""
        return view(self.library.empty(self, shape, dtype), "the result")

    def assign(self, other: View) -> None:
        """Copy the numbers of an array of the same kind, shape and dtype to this one."""
        self.library.assign(self, other)

    def from_host(self, array: Any) -> View:
        """A copy on the same GPU, of the same kind, of a NumPy array."""
        return view(self.library.from_host(self, array), "the copy")

    def to_host(self) -> Any:
        """A copy as a NumPy array; waits for the GPU."""
        return self.library.to_host(self)


class Library:
    """What a library of arrays does. The methods are for arrays like a `View` of one of its arrays."""

    name: str

    def view(self, array: Any, name: str) -> View:
        raise NotImplementedError

    def stream(self, like: View) -> int:
        raise NotImplementedError

    def empty(self, like: View, shape: Shape, dtype: str) -> Any:
        raise NotImplementedError

    def contiguous(self, like: View) -> Any:
        raise NotImplementedError

    def assign(self, target: View, source: View) -> None:
        raise NotImplementedError

    def from_host(self, like: View, array: Any) -> Any:
        raise NotImplementedError

    def to_host(self, array: View) -> Any:
        raise NotImplementedError


class Torch(Library):
    """PyTorch's CUDA tensors. NumPy's names of types are PyTorch's too."""

    name = "torch"

    def view(self, array: Any, name: str) -> View:
        import torch

        if array.layout is not torch.strided:
            raise TypeError(f"{name} is a tensor of layout {array.layout}; it must be dense")
        dtype = str(array.dtype).removeprefix("torch.")
        return View(
            array, array.data_ptr(), tuple(array.shape), tuple(array.stride()), dtype, array.device.index, self
        )

    def stream(self, like: View) -> int:
        import torch

        return int(torch.cuda.current_stream(like.gpu).cuda_stream)

    def empty(self, like: View, shape: Shape, dtype: str) -> Any:
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.owner.device)

    def contiguous(self, like: View) -> Any:
        return like.owner.detach().contiguous()

    def assign(self, target: View, source: View) -> None:
        target.owner.detach().copy_(source.owner)

    def from_host(self, like: View, array: Any) -> Any:
        import torch

        return torch.from_numpy(np.require(array, requirements=["C", "A", "W"])).to(like.owner.device)

    def to_host(self, array: View) -> Any:
        tensor = array.owner.detach()
        if array.dtype == "bfloat16":
            import torch

            return tensor.view(torch.int16).cpu().numpy().view(bfloat16())
        return tensor.cpu().numpy()


class CuPy(Library):
    """CuPy's arrays."""

    name = "cupy"

    def view(self, array: Any, name: str) -> View:
        size = array.dtype.itemsize
        strides = tuple(stride // size for stride in array.strides)
        return View(array, int(array.data.ptr), array.shape, strides, array.dtype.name, int(array.device.id), self)

    def stream(self, like: View) -> int:
        import cupy

        return int(cupy.cuda.get_current_stream().ptr)

    def empty(self, like: View, shape: Shape, dtype: str) -> Any:
        import cupy

        return cupy.empty(shape, host_dtype(dtype))

    def contiguous(self, like: View) -> Any:
        import cupy

        return cupy.ascontiguousarray(like.owner)

    def assign(self, target: View, source: View) -> None:
        target.owner[...] = source.owner

    def from_host(self, like: View, array: Any) -> Any:
        import cupy

        return cupy.asarray(array)

    def to_host(self, array: View) -> Any:
        return array.owner.get()


class Numba(Library):
    """numba-cuda's device arrays, and those of all libraries that are known by `__cuda_array_interface__` alone.

    New arrays are numba-cuda's. The interface is read here, for numba-cuda would wait for the stream that it names.
    """

    name = "numba"

    def view(self, array: Any, name: str) -> View:
        from fastloss.gpu import device

        if device.SIMULATED:
            numbers = array._ary
            kind = numbers.dtype.name
            size = numbers.itemsize
            strides = tuple(stride // size for stride in numbers.strides)
            bits = numbers.view(np.uint16) if kind == "bfloat16" else numbers
            pointer = device.Pointer(bits, kind) if bits.flags.c_contiguous else device.Pointer(bits[:0], kind)
            return View(array, pointer, numbers.shape, strides, kind, 0, self)
        facts = array.__cuda_array_interface__
        if facts.get("mask") is not None:
            raise TypeError(f"{name} is a masked array, whose mask would be lost; give its data, and rows weights of 0")
        try:
            dtype = np.dtype(facts["typestr"])
        except TypeError:
            raise TypeError(f"{name} has the type {facts['typestr']!r}, which is not known here") from None
        if not dtype.isnative:
            raise TypeError(f"{name} has dtype {dtype}, in the other byte order; it must be native")
        shape, steps = tuple(facts["shape"]), facts.get("strides")
        if steps is None:
            strides = tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))
        else:
            strides = tuple(step // dtype.itemsize for step in steps)
        return View(array, int(facts["data"][0]), shape, strides, dtype.name, device.current_gpu(), self)

    def stream(self, like: View) -> int:
        from fastloss.gpu import device

        if device.SIMULATED:
            return 0
        named = like.owner.__cuda_array_interface__.get("stream")
        return int(named) if named else 0

    def empty(self, like: View, shape: Shape, dtype: str) -> Any:
        from fastloss.gpu import device

        return device.cuda.device_array(shape, host_dtype(dtype))

    def contiguous(self, like: View) -> Any:
        from fastloss.gpu import device

        if device.SIMULATED:
            return device.cuda.to_device(np.ascontiguousarray(like.owner._ary))
        copy = view(self.empty(like, like.shape, like.dtype), "the copy")
        device.copy_strided(like, copy)
        return copy.owner

    def assign(self, target: View, source: View) -> None:
        from fastloss.gpu import device

        if device.SIMULATED:
            target.owner._ary[...] = source.owner._ary
        else:
            device.copy_strided(source, target)

    def from_host(self, like: View, array: Any) -> Any:
        from fastloss.gpu import device

        handle = self.stream(like)
        stream = device.cuda.external_stream(handle) if handle else 0
        return device.cuda.to_device(np.asarray(array, order="C"), stream=stream)

    def to_host(self, array: View) -> Any:
        from fastloss.gpu import device

        if device.SIMULATED:
            return array.owner._ary.copy()
        contiguous = array.contiguous().owner
        if not hasattr(contiguous, "copy_to_host"):
            contiguous = device.cuda.as_cuda_array(contiguous)  # it waits, as is meant here
        return contiguous.copy_to_host()


_LIBRARIES = {"torch": Torch(), "cupy": CuPy()}
NUMBA = Numba()


def view(array: Any, name: str) -> View:
    """What is known of an array for which `is_device` holds; `name` is what errors call it."""
    return _LIBRARIES.get(type(array).__module__.partition(".")[0], NUMBA).view(array, name)


def bfloat16() -> Any:
    """NumPy's bfloat16, which ml_dtypes brings."""
    try:
        import ml_dtypes
    except ImportError:
        raise ImportError("bfloat16 needs the ml_dtypes package: pip install ml_dtypes") from None
    return np.dtype(ml_dtypes.bfloat16)


def host_dtype(dtype: str) -> Any:
    """NumPy's type of that name."""
    return bfloat16() if dtype == "bfloat16" else np.dtype(dtype)
