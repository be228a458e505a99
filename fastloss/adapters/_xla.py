"""XLA's foreign function interface (FFI), from Python: a function that reads and writes XLA's own buffers.

The structures are those of `xla/ffi/api/c_api.h`, as far as they are used; XLA checks their version as the handler is
registered. Against `jax.pure_callback`, which the same function could be called through, nothing is copied, no JAX
array is made while XLA waits for the call, and an error of the function reaches the caller with its own message.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import math
import mmap
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from fastloss._checks import Array

try:
    gate = import_module("fastloss._kernels.gate")
except ModuleNotFoundError as error:
    raise ImportError(
        "fastloss.adapters.jax needs a compiled module, fastloss._kernels.gate, which this build has not: install "
        "fastloss without FASTLOSS_NO_EXT set"
    ) from error

METADATA = 1  # the extension by which XLA asks a handler for its version
MAJOR, MINOR = 0, 1
INVALID_ARGUMENT, INTERNAL = 3, 13
STRING = 4  # the type of an attribute

BFLOAT16 = np.dtype(import_module("ml_dtypes").bfloat16)  # JAX requires ml_dtypes
#: XLA's numbers for the types that losses take.
DTYPES = {
    number: np.dtype(dtype)
    for number, dtype in {
        1: bool, 2: "i1", 3: "i2", 4: "i4", 5: "i8", 6: "u1", 7: "u2", 8: "u4", 9: "u8", 10: "f2", 11: "f4", 12: "f8",
        16: BFLOAT16,
    }.items()
}  # fmt: skip

#: As NumPy does with its own: below, large pages gain nothing.
LARGE = 1 << 22
_libc: Any = ctypes.CDLL(None) if hasattr(mmap, "MADV_HUGEPAGE") else None


def _structure(**members: Any) -> Any:
    """A structure of C with these members, in order, after its size and XLA's pointer to extensions of it."""
    head = {"size_of": ctypes.c_size_t, "extension": ctypes.c_void_p}
    return type("Structure", (ctypes.Structure,), {"_fields_": list((head | members).items())})


_pointer: Any = ctypes.POINTER
_INT, _INT64, _ADDRESS = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_Error = _structure(message=ctypes.c_char_p, code=_INT)
_ENDED = _Error(ctypes.sizeof(_Error), None, b"the Python interpreter has ended", 1)  # 1: cancelled
_Version = _structure(major=_INT, minor=_INT)
_Api = _structure(version=_Version, internal=_ADDRESS, make_error=ctypes.CFUNCTYPE(_ADDRESS, _pointer(_Error)))
_Buffer = _structure(dtype=_INT, data=_ADDRESS, rank=_INT64, dims=_pointer(_INT64))
_Buffers = _structure(size=_INT64, types=_ADDRESS, items=_pointer(_pointer(_Buffer)))
_Text = type("Text", (ctypes.Structure,), {"_fields_": [("start", _ADDRESS), ("size", ctypes.c_size_t)]})
_Attributes = _structure(size=_INT64, types=_pointer(_INT), names=_ADDRESS, items=_pointer(_pointer(_Text)))
_Call = _structure(
    api=_pointer(_Api), context=_ADDRESS, stage=_INT, inputs=_Buffers, outputs=_Buffers, attributes=_Attributes
)


class _Metadata(ctypes.Structure):
    """What XLA asks of a handler as it is registered."""

    _fields_ = (("size_of", ctypes.c_size_t), ("version", _Version), ("traits", ctypes.c_uint32))


class _Extension(ctypes.Structure):
    """One of a list; this is the whole of that for metadata, and the start of any other."""

    _fields_ = (("size_of", ctypes.c_size_t), ("type", _INT), ("next", _ADDRESS), ("metadata", _pointer(_Metadata)))


def _array(buffer: Any) -> Array:
    """A view of a buffer."""
    shape, dtype = tuple(buffer.dims[: buffer.rank]), DTYPES[buffer.dtype]
    size = math.prod(shape)
    if size == 0:
        return np.empty(shape, dtype)
    memory = (ctypes.c_char * (size * dtype.itemsize)).from_address(buffer.data)
    return np.frombuffer(memory, dtype).reshape(shape)


def _in_large_pages(array: Array) -> Array:
    """Ask for large pages under a fresh result: faults of small ones cost several times what the kernels do."""
    if _libc is not None and array.nbytes >= LARGE:
        start = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (array.ctypes.data + array.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)  # a hint: it may be declined
    return array


def _error(call: Any, error: BaseException) -> Any:
    code = INVALID_ARGUMENT if isinstance(error, ValueError | TypeError) else INTERNAL
    text = str(error) if code == INVALID_ARGUMENT else f"{type(error).__name__}: {error}"
    made = _Error(ctypes.sizeof(_Error), None, text.encode(), code)
    return call.api.contents.make_error(ctypes.byref(made))


_known: list[Any] = []  # XLA's functions, from the first call


def _serve(function: Callable[[str, list[Array], list[Array]], None], pointer: Any) -> Any:
    """One call of XLA's: None, or an error."""
    call = pointer.contents
    if not _known and call.api:  # some versions do not give it when they ask for metadata
        _known.append(call.api.contents)
    next_extension = call.extension
    while next_extension:
        extension = _Extension.from_address(next_extension)
        if extension.type == METADATA:
            asked = extension.metadata.contents
            # All that is used has been there from the first version on: what XLA has, if of this major version.
            version = call.api.contents.version if call.api else None
            minor = version.minor if version is not None and version.major == MAJOR else MINOR
            asked.version.major, asked.version.minor, asked.traits = MAJOR, minor, 0
            return None
        next_extension = extension.next
    try:
        attributes = call.attributes
        if attributes.size != 1 or attributes.types[0] != STRING:
            raise RuntimeError(f"XLA handed over {attributes.size} attributes, not one string")
        text = attributes.items[0].contents
        inputs = [_array(call.inputs.items[k].contents) for k in range(call.inputs.size)]
        for array in inputs:
            array.flags.writeable = False
        outputs = [_in_large_pages(_array(call.outputs.items[k].contents)) for k in range(call.outputs.size)]
        function(ctypes.string_at(text.start, text.size).decode(), inputs, outputs)
    except BaseException as error:  # none may pass through C
        return _error(call, error)
    return None


def _close() -> None:
    """Before the interpreter ends: what XLA still has under way gets an error in place of a call of Python."""
    if _known:
        gate.close(ctypes.cast(_known[0].make_error, _ADDRESS).value or 0, ctypes.addressof(_ENDED))
    while gate.is_inside():
        time.sleep(0.001)  # lets go of the interpreter, for those inside


def register(jax_ffi: Any, name: str, function: Callable[[str, list[Array], list[Array]], None]) -> Any:
    """Let XLA call `function(attribute, inputs, outputs)` on the CPU by this name, with one string attribute.

    The function writes the outputs. It runs on a thread of XLA's and must not use JAX. To be called once; what is
    returned must live as long as the process.
    """
    served = ctypes.CFUNCTYPE(_ADDRESS, _pointer(_Call))(functools.partial(_serve, function))
    address = gate.guard(ctypes.cast(served, _ADDRESS).value or 0)
    jax_ffi.register_ffi_target(name, jax_ffi.pycapsule(address), platform="cpu")
    atexit.register(_close)
    return served
