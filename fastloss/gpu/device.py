"""The one door to numba.cuda: whether a GPU is there, how kernels are compiled and launched, and what they are made of.

Kernels get pointers and numbers, never arrays: an argument each. In the simulator (NUMBA_ENABLE_CUDASIM=1) a pointer is
a `Pointer`, and every device helper has a plain twin here, so that kernels run unchanged.

Helpers inside kernels
----------------------
`shared(zero)`
    The block's shared memory, as a pointer to numbers of the type of `zero`; aligned to 16 bytes.
`wide(p, i)`, `store_wide(p, i, raw)`
    16 bytes of global memory at once; `p + i` is aligned to that.
`put_wide(p, raw, s, k)`, `take_wide(p, s, k)`
    The numbers in them, to and from shared memory in the compute type; k is a multiple of their count.
`scatter(p, raw, s, k, j, c, skip)`, `gather(p, s, k, j, c, skip)`
    The same for rows of c numbers that are `skip` numbers apart in shared memory: the first is number j of a row.
`load(p, i)`, `store(p, i, x)`
    One number of global memory; 16-bit floats are converted in registers.
`load4(s, k)`, `store4(s, k, a, b, c, d)`
    Four numbers of shared memory; k is a multiple of 4.
`load_index(p, i, kind)`
    An integer of any type: `kind` is its size, negative if it has no sign; p points to bytes.
`add_and_fetch(p, i, n)`, `least(p, i, n)`, `look(p, i)`
    Of numbers (int64) that blocks share: an atomic sum, which returns what was there; an atomic minimum; and a read
    that is not cached, of float64 too.
`quotient(a, b)`
    a // b for numbers from 0 to 2^32 − 1: others are divided by a function, which takes registers.
`exp2(x)`, `fma(a, b, c)`
    One instruction each (exp2 of float32 is off by up to 2 units).
`exp(x)`, `expm1(x)`, `log1p(x)`, `tanh(x)`
    Of the type of its argument.
`larger(a, b)`, `bits(x)`, `float32_of(i)`, `float64_of(i)`
    The maximum, NaN if one is; a number's bits as an integer of its size, and the reverse. Not in the simulator.
`shuffle(x, k)`
    The x of the thread whose number in the warp differs in the bits of k. Not in the simulator.
`reduction(merge, width)`
    A function that merges states of the threads of a row in a fixed order.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

#: Element types that kernels know, by NumPy's names, and their sizes. Pointers to `bfloat16` are to its bits.
SIZES = {
    "float32": 4, "float64": 8, "float16": 2, "bfloat16": 2,
    "int8": 1, "int16": 2, "int32": 4, "int64": 8, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8,
}  # fmt: skip
#: The type that scores of each type are computed in.
REAL = {"float32": "float32", "float64": "float64", "float16": "float32", "bfloat16": "float32"}
WIDE = 16  # bytes of the widest load
WARP = 32
#: Most threads of a block.
MOST_THREADS = 1024

EXTRAS = 'it takes the numba-cuda package: pip install "fastloss[cuda12]" or "fastloss[cuda13]", as the driver is'

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


def _import() -> tuple[Any, str | None]:
    """numba.cuda, and why it cannot be used even to compile."""
    if importlib.util.find_spec("numba_cuda") is None:
        return None, EXTRAS
    try:
        from numba import cuda
    except ImportError as error:
        return None, f"{EXTRAS} ({error})"
    if getattr(cuda, "implementation", None) != "NVIDIA":
        return None, f"numba.cuda here is Numba's own, not numba-cuda's; {EXTRAS}"
    return cuda, None


cuda, _missing = _import()


@functools.cache
def why_not() -> str | None:
    """Why no kernel can run here; None if one can (on a GPU, or in the simulator)."""
    if _missing is not None or SIMULATED:
        return _missing
    try:
        if not cuda.is_available():
            return f"no NVIDIA driver, or no GPU, was found: {_driver_error()}"
        cc = cuda.get_current_device().compute_capability
    except Exception as error:  # the driver's own errors have many classes
        return f"the NVIDIA driver does not start: {type(error).__name__}: {error}"
    if cc < (8, 0):
        return f"the GPU has compute capability {cc[0]}.{cc[1]}; the kernels need 8.0 or later"
    return None


def _driver_error() -> str:
    error = cuda.cuda_error() if hasattr(cuda, "cuda_error") else None
    return "it has no compute capability" if error is None else str(error).strip()


def describe() -> str:
    """What runs the kernels, in words."""
    if SIMULATED:
        return "numba-cuda's simulator: every kernel, on the CPU, slowly"
    gpu = cuda.get_current_device()
    name = gpu.name.decode() if isinstance(gpu.name, bytes) else gpu.name
    major, minor = gpu.compute_capability
    return f"{name}, compute capability {major}.{minor}, by numba-cuda {_version()}"


def _version() -> str:
    from importlib.metadata import version

    return version("numba-cuda")


# --- a device's limits -----------------------------------------------------------------------------------------------
class Limits(SimpleNamespace):
    """What launches depend on: `multiprocessors`, `shared_bytes` a block may have, the `warp`, `most_threads`."""

    multiprocessors: int
    shared_bytes: int
    most_threads: int


def limits() -> Limits:
    """Of the current device. Blocks of the simulator are small: each of its threads is one of Python's."""
    return _limits(current_gpu())


@functools.cache
def _limits(gpu: int) -> Limits:
    if SIMULATED:
        return Limits(multiprocessors=2, shared_bytes=48 << 10, most_threads=8)
    facts = cuda.gpus[gpu]
    return Limits(
        multiprocessors=facts.MULTIPROCESSOR_COUNT,
        shared_bytes=facts.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN - 2048,  # what helpers and the system take
        most_threads=MOST_THREADS,
    )


# --- compiling and launching -----------------------------------------------------------------------------------------
def _type(name: str) -> Any:
    """The Numba type of an argument: "float32*" is a pointer, "int64" a number."""
    element = name.removesuffix("*")
    element = "uint16" if element == "bfloat16" else element
    found = getattr(cuda.types, element)
    return cuda.types.CPointer(found) if name.endswith("*") else found


def device_function(function: Callable[..., Any]) -> Any:
    """`function` for calls from kernels; it belongs to the compute capability that is compiled for now."""
    return function if SIMULATED else cuda.jit(device=True, forceinline=True)(function)


class Kernel:
    """A compiled kernel.

    Parameters
    ----------
    build : callable
        Returns the kernel's Python function; called when the kernel is compiled, so that the device functions that
        it makes are for the same compute capability.
    signature : tuple of str
        Its arguments: "int64", "float64", or pointers as "float32*".
    threads : int
        The most threads a block will have; registers are bounded by that.

    Examples
    --------
    >>> from fastloss.gpu import device  # doctest: +SKIP
    >>> kernel = device.Kernel(build, ("float32*", "int64"))  # doctest: +SKIP
    >>> kernel.launch(blocks, threads, shared_bytes, stream, pointer, 17)  # doctest: +SKIP
    """

    def __init__(
        self, build: Callable[[], Callable[..., None]], signature: tuple[str, ...], threads: int = MOST_THREADS
    ) -> None:
        self._build, self._signature, self._threads = build, signature, threads
        self._by_device: dict[int, tuple[Any, dict[Any, Any]]] = {}
        self._lock = threading.Lock()

    def launch(self, blocks: int, threads: int, shared_bytes: int, stream: int, *args: Any) -> None:
        """Launch on a stream (its handle), asynchronously. Pointers are integers (in the simulator, `Pointer`s)."""
        if SIMULATED:
            _check_arguments(self._signature, args)
            self._simulated()[blocks, threads, 0, shared_bytes](*args)
            return
        gpu = current_gpu()
        compiled, configurations = self._by_device.get(gpu) or self._compiled(gpu)
        shape = blocks, threads, shared_bytes
        configuration = configurations.get(shape)
        if configuration is None:
            configuration = _configuration(compiled, *shape)
            if len(configurations) > 256:  # shapes that never come again
                configurations.clear()
            configurations[shape] = configuration
        _launch(_stream(stream), configuration, compiled.kernel, *args)

    def _simulated(self) -> Any:
        with self._lock:
            if 0 not in self._by_device:
                self._by_device[0] = cuda.jit(self._build()), {}
            return self._by_device[0][0]

    def _compiled(self, gpu: int) -> tuple[Any, dict[Any, Any]]:
        with self._lock:
            if gpu not in self._by_device:
                types = tuple(map(_type, self._signature))
                dispatcher = cuda.jit(types, launch_bounds=(self._threads, 1))(self._build())
                (compiled,) = dispatcher.overloads.values()
                compiled.bind()
                self._by_device[gpu] = compiled._codelibrary.get_cufunc(), {}
            return self._by_device[gpu]

    def ptx(self, cc: tuple[int, int]) -> str:
        """The PTX for a compute capability; no GPU is needed."""
        with self._lock, _compiling_for(cc):
            types = tuple(map(_type, self._signature))
            text: str = cuda.compile_ptx(self._build(), types, cc=cc, launch_bounds=(self._threads, 1))[0]
        return text


def _check_arguments(signature: tuple[str, ...], args: tuple[Any, ...]) -> None:
    """Raise unless arguments have just the types that a GPU takes them by: a bool or an int would have other bytes."""
    kinds = {"int64": (int, np.int64), "float64": (float, np.float64)}
    for k, (kind, argument) in enumerate(zip(signature, args, strict=True)):
        wanted = (Pointer,) if kind.endswith("*") else kinds[kind]
        if type(argument) not in wanted:
            raise TypeError(f"argument {k} is {argument!r}, a {type(argument).__name__}; the kernel takes {kind}")


class _compiling_for:
    """Device functions are compiled for `cc` within, which need not be a GPU's that is here."""

    def __init__(self, cc: tuple[int, int]) -> None:
        self._gpu = SimpleNamespace(compute_capability=cc)

    def __enter__(self) -> None:
        from numba.cuda import dispatcher

        self._module, self._found = dispatcher, dispatcher.get_current_device
        dispatcher.get_current_device = lambda: self._gpu

    def __exit__(self, *_: object) -> None:
        self._module.get_current_device = self._found


def _configuration(compiled: Any, blocks: int, threads: int, shared_bytes: int) -> Any:
    from cuda.core import LaunchConfig

    if shared_bytes > 40 << 10:  # more than is given unasked, with what helpers have
        from cuda.bindings import driver

        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (error,) = driver.cuKernelSetAttribute(attribute, limits().shared_bytes, compiled.handle, current_gpu())
        if error != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"a block cannot have {shared_bytes} bytes of shared memory: {error}")
    return LaunchConfig(grid=blocks, block=threads, shmem_size=shared_bytes)


def current_gpu() -> int:
    """The number of the GPU that this thread works on."""
    return 0 if SIMULATED else int(cuda.get_current_device().id)


def on(gpu: int) -> Any:
    """A context in which this thread works on the GPU of that number."""
    return contextlib.nullcontext() if SIMULATED or gpu == current_gpu() else cuda.gpus[gpu]


@functools.lru_cache(maxsize=64)
def _stream(handle: int) -> Any:
    from cuda.core import Stream

    return Stream.from_handle(handle)


def _launch(*args: Any) -> None:
    global _launch
    from cuda.core import launch as _launch

    _launch(*args)


def synchronize() -> None:
    """Wait for the current device."""
    if not SIMULATED:
        cuda.synchronize()


def mapped_words(count: int) -> tuple[Any, Any]:
    """`count` zeros (int64) that the host and kernels both see without copies: as an array, and as a pointer."""
    if SIMULATED:
        words = np.zeros(count, np.int64)
        return words, Pointer(words)
    mapped = cuda.mapped_array(count, np.int64, portable=True)
    words = np.ndarray((count,), np.int64, buffer=mapped)
    words[:] = 0
    pointer = int(mapped.device_ctypes_pointer.value)
    _kept.append(mapped)
    return words, pointer


_kept: list[Any] = []


class Pointer:
    """A pointer in the simulator: the numbers of an array from a position on. bfloat16 is uint16 here, its bits."""

    __slots__ = ("kind", "numbers")

    def __init__(self, numbers: Any, kind: str | None = None) -> None:
        self.kind = kind or numbers.dtype.name
        self.numbers = numbers.reshape(-1)

    def __getitem__(self, index: Any) -> Any:
        return self.numbers[_checked(index)]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.numbers[_checked(index)] = value

    def __add__(self, count: int) -> Pointer:
        return Pointer(self.numbers[_checked(count) :], self.kind)


def _checked(index: Any) -> int:
    if index < 0:
        raise IndexError(f"position {index} is before the array")  # NumPy would take it from the end
    return int(index)


# --- helpers inside kernels ------------------------------------------------------------------------------------------
if SIMULATED:

    def shared(zero: Any) -> Pointer:
        from numba.cuda.simulator.kernel import _get_kernel_context

        return Pointer(_get_kernel_context().shared.array(0, zero.dtype))

    def wide(p: Pointer, i: Any) -> list[Any]:
        return [load(p, i + k) for k in range(WIDE // SIZES[p.kind])]

    def store_wide(p: Pointer, i: Any, raw: list[Any]) -> None:
        for k, x in enumerate(raw):
            store(p, i + k, x)

    def put_wide(p: Pointer, raw: list[Any], s: Pointer, k: Any) -> None:
        for x in raw:
            s[k] = x
            k += 1

    def take_wide(p: Pointer, s: Pointer, k: Any) -> list[Any]:
        return [s[k + d] for d in range(WIDE // SIZES[p.kind])]

    def scatter(p: Pointer, raw: list[Any], s: Pointer, k: Any, j: Any, c: Any, skip: Any) -> None:
        for x in raw:
            s[k] = x
            k, j = k + 1, j + 1
            if j == c:
                k, j = k + skip, 0

    def gather(p: Pointer, s: Pointer, k: Any, j: Any, c: Any, skip: Any) -> list[Any]:
        raw = []
        for _ in range(WIDE // SIZES[p.kind]):
            raw.append(s[k])
            k, j = k + 1, j + 1
            if j == c:
                k, j = k + skip, 0
        return raw

    def load(p: Pointer, i: Any) -> Any:
        x = p[i]
        if p.kind == "float16":
            return np.float32(x)
        return (np.uint32(x) << np.uint32(16)).view(np.float32) if p.kind == "bfloat16" else x

    def store(p: Pointer, i: Any, x: Any) -> None:
        p[i] = _to_bfloat16(np.float32(x)) if p.kind == "bfloat16" else x

    def _to_bfloat16(x: Any) -> Any:
        bits = x.view(np.uint32)
        if x != x:
            return np.uint16(0x7FFF)
        return np.uint16((int(bits) + 0x7FFF + (int(bits) >> 16 & 1)) >> 16)

    def load4(s: Pointer, k: Any) -> Any:
        return s[k], s[k + 1], s[k + 2], s[k + 3]

    def store4(s: Pointer, k: Any, *four: Any) -> None:
        for d, x in enumerate(four):
            s[k + d] = x

    def load_index(p: Pointer, i: Any, kind: Any) -> Any:
        return int(p[i].astype(np.int64))  # of 64 bits without a sign, the bits

    def add_and_fetch(p: Pointer, i: Any, n: Any) -> Any:
        with _atomics:
            found = p[i]
            p[i] = found + n
        return found

    _atomics = threading.Lock()

    def look(p: Pointer, i: Any) -> Any:
        return p[i]

    def exp2(x: Any) -> Any:
        return np.exp2(x)

    def fma(a: Any, b: Any, c: Any) -> Any:
        # Exact for float32, whose products float64 holds; close for float64.
        return type(c)(np.float64(a) * np.float64(b) + np.float64(c))

    def quotient(a: Any, b: Any) -> Any:
        return a // b

    def least(p: Pointer, i: Any, n: Any) -> None:
        with _atomics:
            p[i] = min(p[i], n)

    exp, expm1, log1p, tanh = np.exp, np.expm1, np.log1p, np.tanh

    def syncthreads() -> None:
        threading.current_thread().syncthreads()  # type: ignore[attr-defined]

    def threadfence() -> None:
        pass

    threadfence_system = threadfence

    def thread_index() -> Any:
        return threading.current_thread().threadIdx.x  # type: ignore[attr-defined]

    def block_index() -> Any:
        return threading.current_thread().blockIdx.x  # type: ignore[attr-defined]

elif cuda is not None:
    from llvmlite import ir
    from numba.cuda import cgutils
    from numba.cuda.extending import intrinsic

    _I32, _I64, _F32, _F64, _F16 = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType(), ir.HalfType()
    _t = cuda.types

    def _at(builder: Any, pointer: Any, index: Any, kind: Any, space: int) -> Any:
        """The address of element `index`, as one of `kind` in an address space."""
        address = builder.bitcast(builder.gep(pointer, [index]), ir.PointerType(kind))
        return builder.addrspacecast(address, ir.PointerType(kind, space))

    def _vector(builder: Any, numbers: list[Any]) -> Any:
        vector = ir.Constant(ir.VectorType(numbers[0].type, len(numbers)), ir.Undefined)
        for k, x in enumerate(numbers):
            vector = builder.insert_element(vector, x, ir.Constant(_I32, k))
        return vector

    def _parts(builder: Any, vector: Any) -> list[Any]:
        return [builder.extract_element(vector, ir.Constant(_I32, k)) for k in range(vector.type.count)]

    def _real(pointer: Any) -> Any:
        """The compute type of what a pointer points to, and that of LLVM."""
        return (_t.float64, _F64) if pointer.dtype == _t.float64 else (_t.float32, _F32)

    def _unpack(builder: Any, element: Any, raw: Any) -> list[Any]:
        """The numbers in 16 bytes, as four words, in the compute type."""
        words = cgutils.unpack_tuple(builder, raw, 4)
        if element in (_t.float32, _t.float64):
            kind, count = (_F32, 4) if element == _t.float32 else (_F64, 2)
            return _parts(builder, builder.bitcast(_vector(builder, words), ir.VectorType(kind, count)))
        if element == _t.float16:
            halves = _parts(builder, builder.bitcast(_vector(builder, words), ir.VectorType(_F16, 8)))
            return [builder.fpext(x, _F32) for x in halves]
        numbers = []
        for word in words:
            low, high = builder.shl(word, ir.Constant(_I32, 16)), builder.and_(word, ir.Constant(_I32, 0xFFFF0000))
            numbers += [builder.bitcast(low, _F32), builder.bitcast(high, _F32)]
        return numbers

    def _pack(builder: Any, element: Any, numbers: list[Any]) -> Any:
        if element in (_t.float32, _t.float64):
            words = _parts(builder, builder.bitcast(_vector(builder, numbers), ir.VectorType(_I32, 4)))
        elif element == _t.float16:
            halves = _vector(builder, [builder.fptrunc(x, _F16) for x in numbers])
            words = _parts(builder, builder.bitcast(halves, ir.VectorType(_I32, 4)))
        else:
            pair = ir.InlineAsm(ir.FunctionType(_I32, [_F32, _F32]), "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f")
            words = [builder.call(pair, [numbers[k + 1], numbers[k]]) for k in range(0, 8, 2)]
        return cgutils.pack_array(builder, words)

    def _count(element: Any) -> int:
        return {_t.float32: 4, _t.float64: 2}.get(element, 8)

    _RAW = _t.UniTuple(_t.uint32, 4)
    _WORDS = ir.VectorType(_I32, 4)

    @intrinsic
    def shared(typing: Any, zero: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.ArrayType(context.get_data_type(zero), 0)
            name = f"fastloss_shared_{zero}"
            found = builder.module.globals.get(name)
            if found is None:
                found = cgutils.add_global_variable(builder.module, kind, name, 3)
                found.linkage, found.align = "external", 16
            address = builder.bitcast(found, ir.PointerType(kind.element, 3))
            return builder.addrspacecast(address, ir.PointerType(kind.element))

        return _t.CPointer(zero)(zero), code

    @intrinsic
    def wide(typing: Any, p: Any, i: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            words = builder.load(_at(builder, args[0], args[1], _WORDS, 1), align=16)
            return cgutils.pack_array(builder, _parts(builder, words))

        return _RAW(p, _t.int64), code

    @intrinsic
    def store_wide(typing: Any, p: Any, i: Any, raw: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            words = _vector(builder, cgutils.unpack_tuple(builder, args[2], 4))
            builder.store(words, _at(builder, args[0], args[1], _WORDS, 1), align=16)
            return context.get_dummy_value()

        return _t.void(p, _t.int64, _RAW), code

    def _shared_vectors(builder: Any, s: Any, k: Any, real: Any, count: int) -> list[Any]:
        """The addresses of 16 bytes each that `count` numbers of shared memory take from k on."""
        step = 2 if real == _F64 else 4
        kind = ir.VectorType(real, step)
        return [
            _at(builder, s, builder.add(k, ir.Constant(k.type, d)), kind, 3) for d in range(0, count, step)
        ]  # fmt: skip

    def _put(builder: Any, s: Any, k: Any, numbers: list[Any]) -> None:
        addresses = _shared_vectors(builder, s, k, numbers[0].type, len(numbers))
        step = len(numbers) // len(addresses)
        for at, address in enumerate(addresses):
            builder.store(_vector(builder, numbers[at * step : at * step + step]), address, align=16)

    def _take(builder: Any, s: Any, k: Any, real: Any, count: int) -> list[Any]:
        vectors = [builder.load(address, align=16) for address in _shared_vectors(builder, s, k, real, count)]
        return [x for vector in vectors for x in _parts(builder, vector)]

    @intrinsic
    def put_wide(typing: Any, p: Any, raw: Any, s: Any, k: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _put(builder, args[2], args[3], _unpack(builder, p.dtype, args[1]))
            return context.get_dummy_value()

        return _t.void(p, _RAW, s, _t.int64), code

    @intrinsic
    def take_wide(typing: Any, p: Any, s: Any, k: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _pack(builder, p.dtype, _take(builder, args[1], args[2], _real(p)[1], _count(p.dtype)))

        return _RAW(p, s, _t.int64), code

    def _walk(builder: Any, s: Any, k: Any, j: Any, c: Any, skip: Any, real: Any, count: int) -> Any:
        """The addresses in shared memory of `count` numbers of rows of c that are `skip` apart."""
        one, zero = ir.Constant(_I64, 1), ir.Constant(_I64, 0)
        for _ in range(count):
            yield _at(builder, s, k, real, 3)
            k, j = builder.add(k, one), builder.add(j, one)
            ends = builder.icmp_signed("==", j, c)
            k = builder.add(k, builder.select(ends, skip, zero))
            j = builder.select(ends, zero, j)

    @intrinsic
    def scatter(typing: Any, p: Any, raw: Any, s: Any, k: Any, j: Any, c: Any, skip: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            numbers = _unpack(builder, p.dtype, args[1])
            walk = _walk(builder, *args[2:], _real(p)[1], len(numbers))
            for x, address in zip(numbers, walk, strict=True):
                builder.store(x, address)
            return context.get_dummy_value()

        return _t.void(p, _RAW, s, *[_t.int64] * 4), code

    @intrinsic
    def gather(typing: Any, p: Any, s: Any, k: Any, j: Any, c: Any, skip: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            walk = _walk(builder, *args[1:], _real(p)[1], _count(p.dtype))
            return _pack(builder, p.dtype, [builder.load(address) for address in walk])

        return _RAW(p, s, *[_t.int64] * 4), code

    @intrinsic
    def load(typing: Any, p: Any, i: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            element = p.dtype
            if element == _t.float16:
                return builder.fpext(builder.load(_at(builder, *args, _F16, 1)), _F32)
            if element == _t.uint16:
                bits = builder.zext(builder.load(_at(builder, *args, ir.IntType(16), 1)), _I32)
                return builder.bitcast(builder.shl(bits, ir.Constant(_I32, 16)), _F32)
            return builder.load(_at(builder, *args, context.get_data_type(element), 1))

        result = _t.float32 if p.dtype in (_t.float16, _t.uint16) else p.dtype
        return result(p, _t.int64), code

    @intrinsic
    def store(typing: Any, p: Any, i: Any, x: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            element, x = p.dtype, args[2]
            if element == _t.float16:
                x = builder.fptrunc(x, _F16)
            elif element == _t.uint16:
                half = ir.InlineAsm(ir.FunctionType(ir.IntType(16), [_F32]), "cvt.rn.bf16.f32 $0, $1;", "=h,f")
                x = builder.call(half, [x])
            builder.store(x, _at(builder, args[0], args[1], x.type, 1))
            return context.get_dummy_value()

        number = _t.float32 if p.dtype in (_t.float16, _t.uint16) else p.dtype
        return _t.void(p, _t.int64, number), code

    @intrinsic
    def load4(typing: Any, s: Any, k: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return cgutils.pack_array(builder, _take(builder, args[0], args[1], context.get_data_type(s.dtype), 4))

        return _t.UniTuple(s.dtype, 4)(s, _t.int64), code

    @intrinsic
    def store4(typing: Any, s: Any, k: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _put(builder, args[0], args[1], list(args[2:]))
            return context.get_dummy_value()

        return _t.void(s, _t.int64, *[s.dtype] * 4), code

    @intrinsic
    def load_index(typing: Any, p: Any, i: Any, kind: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer, i, kind = args
            result = cgutils.alloca_once(builder, _I64)
            for size in (8, 4, 2, 1):
                number = ir.IntType(8 * size)
                for sign in (1, -1):
                    match = builder.icmp_signed("==", kind, ir.Constant(_I64, sign * size))
                    with builder.if_then(match):
                        x = builder.load(_at(builder, builder.bitcast(pointer, ir.PointerType(number)), i, number, 1))
                        wider = builder.sext if sign > 0 else builder.zext
                        builder.store(x if size == 8 else wider(x, _I64), result)
            return builder.load(result)

        return _t.int64(p, _t.int64, _t.int64), code

    @intrinsic
    def add_and_fetch(typing: Any, p: Any, i: Any, n: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address = builder.gep(args[0], [args[1]])
            return builder.atomic_rmw("add", address, args[2], "monotonic")

        return p.dtype(p, _t.int64, p.dtype), code

    @intrinsic
    def quotient(typing: Any, a: Any, b: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            a, b = (builder.trunc(x, _I32) for x in args)
            return builder.zext(builder.udiv(a, b), _I64)

        return _t.int64(_t.int64, _t.int64), code

    @intrinsic
    def least(typing: Any, p: Any, i: Any, n: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.atomic_rmw("min", builder.gep(args[0], [args[1]]), args[2], "monotonic")
            return context.get_dummy_value()

        return _t.void(p, _t.int64, p.dtype), code

    @intrinsic
    def look(typing: Any, p: Any, i: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address = builder.gep(args[0], [args[1]])
            kind, name, letter = (_F64, "f64", "d") if p.dtype == _t.float64 else (_I64, "s64", "l")
            read = f"ld.volatile.global.{name} $0, [$1];"
            function = ir.FunctionType(kind, [address.type])
            return builder.call(ir.InlineAsm(function, read, f"={letter},l", True), [address])

        return p.dtype(p, _t.int64), code

    @intrinsic
    def bits(typing: Any, x: Any) -> Any:
        integer = _t.int64 if x == _t.float64 else _t.int32

        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], _I64 if x == _t.float64 else _I32)

        return integer(x), code

    def _number_of(result: Any, kind: Any, width: Any) -> Any:
        @intrinsic
        def number(typing: Any, i: Any) -> Any:
            def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                i = builder.trunc(args[0], width) if args[0].type.width > width.width else args[0]
                return builder.bitcast(i, kind)

            return result(i), code

        return number

    float32_of, float64_of = _number_of(_t.float32, _F32, _I32), _number_of(_t.float64, _F64, _I64)

    @intrinsic
    def larger(typing: Any, a: Any, b: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if a == _t.float32:
                pick = ir.InlineAsm(ir.FunctionType(_F32, [_F32, _F32]), "max.NaN.f32 $0, $1, $2;", "=f,f,f")
                return builder.call(pick, args)
            left, right = args
            is_left = builder.or_(builder.fcmp_ordered(">=", left, right), builder.fcmp_unordered("uno", left, left))
            return builder.select(is_left, left, right)

        return a(a, a), code

    exp, expm1, log1p, tanh = math.exp, math.expm1, math.log1p, math.tanh  # type: ignore[assignment]

    @intrinsic
    def exp2(typing: Any, x: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.FunctionType(_F32, [_F32])
            return builder.call(ir.InlineAsm(kind, "ex2.approx.ftz.f32 $0, $1;", "=f,f"), args)

        return _t.float32(_t.float32), code

    @intrinsic
    def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.fma(*args)

        return c(c, c, c), code

    def _call(name: str, result: Any = None) -> Any:
        """A function of no arguments that is one of LLVM's for this target."""

        @intrinsic
        def instruction(typing: Any) -> Any:
            def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                kind = ir.FunctionType(ir.VoidType() if result is None else _I32, [])
                found = builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])
                return context.get_dummy_value() if result is None else builder.zext(found, _I64)

            return (_t.void if result is None else result)(), code

        return instruction

    syncthreads, threadfence = _call("llvm.nvvm.barrier0"), _call("llvm.nvvm.membar.gl")
    threadfence_system = _call("llvm.nvvm.membar.sys")
    thread_index = _call("llvm.nvvm.read.ptx.sreg.tid.x", _t.int64)
    block_index = _call("llvm.nvvm.read.ptx.sreg.ctaid.x", _t.int64)

    @intrinsic
    def shuffle(typing: Any, x: Any, k: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            number, lanes = args
            lanes = builder.trunc(lanes, _I32) if lanes.type != _I32 else lanes
            kind = ir.FunctionType(ir.LiteralStructType([_I32, ir.IntType(1)]), [_I32] * 5)
            swap = cgutils.get_or_insert_function(builder.module, kind, "llvm.nvvm.shfl.sync.i32")
            everyone, by_bits, clamp = (ir.Constant(_I32, k) for k in (0xFFFFFFFF, 3, 0x1F))
            words = builder.bitcast(number, ir.VectorType(_I32, 2 if x == _t.float64 else 1))
            found = [
                builder.extract_value(builder.call(swap, [everyone, by_bits, word, lanes, clamp]), 0)
                for word in _parts(builder, words)
            ]
            return builder.bitcast(_vector(builder, found), number.type)

        return x(x, _t.int64), code


def _build_copy() -> Any:
    thread, block = thread_index, block_index

    def copy(source, s0, s1, target, t0, t1, rows, columns, blocks):
        i = block()
        while i < rows:
            j = thread()
            while j < columns:
                store(target, i * t0 + j * t1, load(source, i * s0 + j * s1))
                j += 256
            i += blocks

    return copy


@functools.cache
def _copy_kernel(dtype: str) -> Kernel:
    pointer = f"{dtype}*"
    return Kernel(_build_copy, (pointer, "int64", "int64", pointer, *["int64"] * 5), 256)


def copy_strided(source: Any, target: Any) -> None:
    """Copy between two `arrays.View`s of the same shape, of at most two dimensions, and dtype."""
    if source.size == 0:
        return
    rows, columns = (1, 1, *source.shape)[-2:]
    s, t = (0, 0, *source.strides)[-2:], (0, 0, *target.strides)[-2:]
    blocks = min(rows, 65536)
    with on(source.gpu):
        kernel = _copy_kernel(source.dtype)
        kernel.launch(blocks, 256, 0, source.stream, source.pointer, *s, target.pointer, *t, rows, columns, blocks)


def tuples(width: int) -> SimpleNamespace:
    """Device functions on states of `width` numbers: `swap` (of the thread k lanes away), `read` and `write`."""
    source = "\n".join(
        [
            f"def swap(x, k): return ({''.join(f'shuffle(x[{i}], k),' for i in range(width))})",
            f"def read(s, at): return ({''.join(f's[at + {WARP * i}],' for i in range(width))})",
            "def write(s, at, x):",
            *(f"    s[at + {WARP * i}] = x[{i}]" for i in range(width)),
        ]
    )
    scope: dict[str, Any] = {"shuffle": None if SIMULATED else shuffle}
    exec(source, scope)
    return SimpleNamespace(**{name: device_function(scope[name]) for name in ("swap", "read", "write")})


#: Numbers of shared memory that `reduction` takes for each number of a state.
SCRATCH = WARP


def reduction(merge: Any, width: int) -> Any:
    """`reduce(s, x, empty, t, team)`: the merged states x (tuples of `width` numbers) of a row's threads, in a fixed
    order, the same in all of them.

    t is the thread's number in the block; `team` threads share a row: a power of two, or in a block of one row whole
    warps. s: `SCRATCH * width` numbers of shared memory; `empty` is the state of no class.
    All threads of a block call it together.
    """
    parts = tuples(width)
    read, write = parts.read, parts.write
    if SIMULATED:

        def in_turn(s: Any, x: Any, empty: Any, t: Any, team: Any) -> Any:
            write(s, t, x)
            syncthreads()
            first = t // team * team
            x = read(s, first)
            for other in range(first + 1, first + team):
                x = merge(x, read(s, other))
            syncthreads()
            return x

        return in_turn
    return by_warps(merge, parts.swap, read, write, syncthreads, quotient, device_function)


def by_warps(
    merge: Any, swap: Any, read: Any, write: Any, sync: Any, quotient: Any, jit: Callable[[Any], Any]
) -> Any:  # fmt: skip
    """`reduction` on a GPU, of what it is made of: tests have it run without one."""

    def within(x, t, team):
        k = 1
        while k < team:
            other = swap(x, k)
            x = merge(other, x) if t & k else merge(x, other)
            k += k
        return x

    within = jit(within)

    def reduce(s, x, empty, t, team):
        if team <= 32:
            return within(x, t, team)
        x = within(x, t, 32)
        if t % 32 == 0:
            write(s, t // 32, x)
        sync()
        x = empty
        warps = team >> 5
        if t % 32 < warps:
            x = read(s, quotient(t, team) * warps + t % 32)  # its row's warps
        x = within(x, t, 32)
        sync()
        return x

    return jit(reduce)


# --- memory of our own -----------------------------------------------------------------------------------------------
class Buffer:
    """Memory on the current GPU that no array library knows of; `pointer` is its address.

    Parameters
    ----------
    numbers : NumPy array, whose contents it gets
    """

    __slots__ = ("owner", "pointer", "size")

    def __init__(self, numbers: Any) -> None:
        self.size = numbers.size
        self.owner = numbers.copy() if SIMULATED else cuda.to_device(numbers)
        if not SIMULATED:  # the copy may not be done yet, and other streams do not wait for it
            cuda.default_stream().synchronize()
        self.pointer = Pointer(self.owner) if SIMULATED else int(self.owner.device_ctypes_pointer.value)


class Workspace:
    """Buffers kept from call to call, that grow. Calls of one thread on one stream follow each other, so they share;
    those of two threads may take turns between one kernel and the next, so they do not.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Buffer] = {}

    def get(self, name: str, count: int, dtype: Any, fill: int = 0) -> Any:
        """A pointer to at least `count` numbers, which are `fill` when they are new."""
        found = self._buffers.get(name)
        if found is None or found.size < count:
            size = 1 << max(4, (count - 1).bit_length())
            found = self._buffers[name] = Buffer(np.full(size, fill, dtype))
        return found.pointer

    def words(self) -> Any:
        """Three numbers (int64) that blocks share: 0, 0 and the largest there is; kernels leave them so."""
        found = self._buffers.get("words")
        if found is None:
            found = self._buffers["words"] = Buffer(np.array([0, 0, np.iinfo(np.int64).max]))
        return found.pointer


class _Workspaces(threading.local):
    def __init__(self) -> None:
        self.found: dict[tuple[int, int], Workspace] = {}


_workspaces = _Workspaces()


def workspace(gpu: int, stream: int) -> Workspace:
    """This thread's workspace for a stream."""
    kept, key = _workspaces.found, (gpu, stream)
    found = kept.get(key)
    if found is None:
        found = kept[key] = Workspace()
    return found


class Lane:
    """A stream of our own, with buffers on the host (pinned, so that copies overlap kernels) and on the GPU."""

    def __init__(self) -> None:
        self._stream = cuda.stream()
        self.handle = 0 if SIMULATED else int(self._stream)
        self._pairs: dict[str, tuple[Any, Any]] = {}

    def host(self, name: str, count: int, dtype: Any) -> Any:
        """`count` numbers of the host's buffer of that name."""
        found = self._pairs.get(name)
        if found is None or found[0].size < count or found[0].dtype != dtype:
            found = self._pairs[name] = cuda.pinned_array(count, dtype), cuda.device_array(count, dtype)
        return found[0][:count]

    def pointer(self, name: str, kind: str | None = None) -> Any:
        """The address of the GPU's buffer; `kind`: what its numbers are, if not what its dtype says."""
        there = self._pairs[name][1]
        return Pointer(there._ary, kind) if SIMULATED else int(there.device_ctypes_pointer.value)

    def send(self, name: str, count: int) -> None:
        here, there = self._pairs[name]
        there[:count].copy_to_device(here[:count], stream=self._stream)

    def fetch(self, name: str, count: int) -> None:
        here, there = self._pairs[name]
        there[:count].copy_to_host(here[:count], stream=self._stream)

    def wait(self) -> None:
        """Until all that was asked for is done."""
        self._stream.synchronize()
