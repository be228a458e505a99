"""What kernels that Numba compiles for the CPU are made of: primitives, ways to compile, threads.

Loops are plain and scalar, and LLVM turns them into vectors. It does so with a sum only in a function that may reorder
additions (`reducer`: no more than that, so NaN, infinities and divisions are as they should be); the mathematics is in
functions of its own (`helper`), which are inlined and keep their order.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, arg-type, untyped-decorator"

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import NativeValue, intrinsic, models, register_model, unbox

from fastloss._checks import Array
from fastloss.jit import rowmath

MOST_THREADS = 256  # that are kept; each starts when it is first of use
SHARES = 4  # of the work, for each thread, so that a slow one holds up no other

# Called from kernels alone: without what calls from Python take, compiling takes a quarter less time.
INNER: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "error_model": "numpy"}
helper = numba.njit(forceinline=True, fastmath={"contract"}, **INNER)
reducer = numba.njit(fastmath={"contract", "reassoc", "nsz"}, **INNER)


@helper
def nothing():
    """What stands for a function that is not used."""


# --- primitives -----------------------------------------------------------------------------------------------------
@intrinsic
def larger(context, a, b):
    """The larger of two numbers, NaN if one is: the form whose reduction LLVM turns into vectors."""

    def generate(context, builder, signature, args):
        kind = args[0].type
        function = builder.module.declare_intrinsic("llvm.maximum", [kind], ir.FunctionType(kind, [kind, kind]))
        return builder.call(function, args)

    return a(a, a), generate


INTEGERS = {types.float32: types.int32, types.float64: types.int64}


@intrinsic
def bits(context, x):
    """The bits of a float, as an integer."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    integer: Any = INTEGERS[x]
    return integer(x), generate


@intrinsic
def number32(context, i):
    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def number64(context, i):
    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), generate


@intrinsic
def half_to_float(context, i):
    """The number that the bits of a float16 are."""

    def generate(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def float_to_half(context, x):
    """The bits of a number rounded to float16."""

    def generate(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def pointer(context, address, like):
    """An address as a pointer to numbers of the type of `like`."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.intp, like), generate


X86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
FLUSH = 0x8040  # results, and inputs, that are too small to be normal become 0


def _control(builder, name, place):
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer()])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.sse.{name}")
    builder.call(function, [builder.bitcast(place, ir.IntType(8).as_pointer())])


@intrinsic
def set_rounding_of_tiny(context, mode):
    """Sets the thread's floating-point mode (−1: as it is, but results flush to zero), and gives that before."""

    def generate(context, builder, signature, args):
        if not X86:
            return args[0]
        place = cgutils.alloca_once(builder, ir.IntType(32))
        _control(builder, "stmxcsr", place)
        before = builder.load(place)
        flushing = builder.or_(before, before.type(FLUSH & 0x8000))
        asked = builder.icmp_signed("==", args[0], args[0].type(-1))
        builder.store(builder.select(asked, flushing, args[0]), place)
        _control(builder, "ldmxcsr", place)
        return before

    return types.int32(types.int32), generate


def tools(real: Any) -> SimpleNamespace:
    """The tools of `rowmath` in a type."""
    single = real is np.float32
    return SimpleNamespace(
        real=real, integer=np.int32 if single else np.int64, larger=larger, bits=bits,
        number=number32 if single else number64, choose=rowmath.choose, exp=None,
    )  # fmt: skip


# --- numbers as they are stored -------------------------------------------------------------------------------------
@helper
def same(x):
    return x


@helper
def _bfloat16_to_float(raw):
    return number32(np.int32(np.uint32(raw) << np.uint32(16)))


@helper
def _float_to_bfloat16(x):
    # To nearest, ties to even.
    raw = np.uint32(bits(x))
    rounded = (raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(rounded) if x == x else np.uint16(0x7FC0)


def storage(dtype: str) -> SimpleNamespace:
    """How numbers of a type are stored and converted: `kind` (of arrays), `real`, `load(raw)`, `save(x)`."""
    if dtype in ("float32", "float64"):
        real = getattr(np, dtype)
        return SimpleNamespace(kind=getattr(types, dtype), like=real, real=real, load=same, save=same)
    load, save = (half_to_float, float_to_half) if dtype == "float16" else (_bfloat16_to_float, _float_to_bfloat16)
    return SimpleNamespace(kind=types.uint16, like=np.uint16, real=np.float32, load=load, save=save)


# --- compiling ------------------------------------------------------------------------------------------------------
_lock = threading.RLock()


@functools.cache
def _made(factory: Callable[..., Any], *what: Any) -> Any:
    return factory(*what)


def made(factory: Callable[..., Any], *what: Any) -> Any:
    """What a factory makes, made once, whichever thread asks first."""
    with _lock:
        return _made(factory, *what)


#: An ndarray begins, after what all objects have, with the address of its numbers: NumPy's C interface promises so, and
#: what follows: the number of dimensions, the addresses of sizes and strides, the base, the type, the flags.
HEAD = object.__basicsize__
_SIZES, _STRIDES, _TYPE, _FLAGS = HEAD + 16, HEAD + 24, HEAD + 40, HEAD + 48
_CONTIGUOUS, _ALIGNED, _WRITEABLE = 0x1, 0x100, 0x400


# --- calls from Python ----------------------------------------------------------------------------------------------
class Object(types.Type):  # type: ignore[misc]
    """Any object, as the address that it is at; None is 0. Numba's own way takes as long for an array as a small call
    may take: what a kernel has to know of one it reads itself. Whoever calls keeps it meanwhile."""

    def __init__(self) -> None:
        super().__init__(name="fastloss.Object")


@register_model(Object)
class _ObjectModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, ir.IntType(64))


@unbox(Object)
def _unbox(kind, found, c):
    address = c.builder.ptrtoint(found, ir.IntType(64))
    is_none = c.builder.icmp_unsigned("==", found, c.pyapi.borrow_none())
    return NativeValue(c.builder.select(is_none, address.type(0), address))


OBJECT = Object()


def of_array(builder, array, offset, instead):
    """A word of an array at an address, or 0 where that is 0 (`instead`: words that can be read then)."""
    is_none = builder.icmp_unsigned("==", array, array.type(0))
    place = builder.add(builder.select(is_none, instead, array), array.type(offset))
    return builder.select(is_none, array.type(0), builder.load(builder.inttoptr(place, array.type.as_pointer())))


def stride_of(builder, array, axis, instead):
    """A stride, in bytes; 0 for none."""
    strides = of_array(builder, array, _STRIDES, instead)
    return of_array(builder, strides, 8 * axis, instead)


def size_of(builder, array, axis, instead):
    """How many there are along an axis; 0 for none."""
    sizes = of_array(builder, array, _SIZES, instead)
    return of_array(builder, sizes, 8 * axis, instead)


def type_of(builder, array, instead):
    """The address of its type; 0 for none."""
    return of_array(builder, array, _TYPE, instead)


def is_fit(builder, array, kind, instead, writeable=False):
    """Whether an array is aligned and, where a type is given by its address, of that type and in C order; none is."""
    wanted = array.type(_ALIGNED | (0 if kind is None else _CONTIGUOUS) | (_WRITEABLE if writeable else 0))
    flags = of_array(builder, array, _FLAGS, instead)
    found = builder.icmp_unsigned("==", builder.and_(flags, wanted), wanted)
    if kind is not None:
        of_type = builder.icmp_unsigned("==", type_of(builder, array, instead), kind)
        found = builder.and_(found, of_type)
    return builder.or_(found, builder.icmp_unsigned("==", array, array.type(0)))


def entry(function: Any) -> Callable[..., Any]:
    """A function compiled for one signature, without the choice among several that Numba makes at each call."""
    (found,) = function.overloads.values()
    point: Callable[..., Any] = found.entry_point
    return point


# --- memory by address ----------------------------------------------------------------------------------------------
@intrinsic
def get(context, address, like):
    """The number of the type of `like` at an address."""

    def generate(context, builder, signature, args):
        kind = context.get_value_type(signature.return_type)
        return builder.load(builder.inttoptr(args[0], kind.as_pointer()), align=1)

    return like(types.intp, like), generate


@intrinsic
def put(context, address, x):
    """A number to an address."""

    def generate(context, builder, signature, args):
        builder.store(args[1], builder.inttoptr(args[0], args[1].type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.intp, x), generate


@intrinsic
def take(context, address):
    """The whole number of 64 bits at an address, which is then one more; of several threads, each gets its own."""

    def generate(context, builder, signature, args):
        place = builder.inttoptr(args[0], args[0].type.as_pointer())
        return builder.atomic_rmw("add", place, args[0].type(1), "monotonic")

    return types.int64(types.intp), generate


@intrinsic
def look(context, address):
    """That number, as another thread may have changed it."""

    def generate(context, builder, signature, args):
        place = builder.inttoptr(args[0], args[0].type.as_pointer())
        return builder.load_atomic(place, "acquire", 8)

    return types.int64(types.intp), generate


@intrinsic
def swap(context, address, new):
    """Puts another number in its place, and gives the one that was there."""

    def generate(context, builder, signature, args):
        place = builder.inttoptr(args[0], args[0].type.as_pointer())
        return builder.atomic_rmw("xchg", place, args[1], "acq_rel")

    return types.int64(types.intp, types.int64), generate


@intrinsic
def swap_if(context, address, old, new):
    """The same if that is `old`; whether it was."""

    def generate(context, builder, signature, args):
        place = builder.inttoptr(args[0], args[0].type.as_pointer())
        found = builder.cmpxchg(place, args[1], args[2], "acq_rel", "acquire")
        return builder.extract_value(found, 1)

    return types.boolean(types.intp, types.int64, types.int64), generate


@intrinsic
def reserve(context, size):
    """The address of new memory, to be freed by `release`; 0 if there is none."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.IntType(8).as_pointer(), [args[0].type])
        found = builder.call(cgutils.get_or_insert_function(builder.module, kind, "malloc"), args)
        return builder.ptrtoint(found, args[0].type)

    return types.intp(types.intp), generate


@intrinsic
def release(context, address):
    def generate(context, builder, signature, args):
        pointer = ir.IntType(8).as_pointer()
        free = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), [pointer]), "free")
        builder.call(free, [builder.inttoptr(args[0], pointer)])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def pause(context):
    """Nothing, for a moment in which another thread of the same core has the more."""

    def generate(context, builder, signature, args):
        if X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def call_address(context, address, *words):
    """Call the compiled function of so many whole numbers at an address."""

    def generate(context, builder, signature, args):
        given = cgutils.unpack_tuple(builder, args[1])
        kind = ir.FunctionType(ir.VoidType(), [word.type for word in given])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), given)
        return context.get_dummy_value()

    return types.void(types.intp, types.StarArgTuple(words)), generate


@helper
def numbers_of(array):
    """Where the numbers of an array begin that is given as its `reference`; 0 for none."""
    return get(array + HEAD, np.int64(0)) if array else 0


@helper
def numbers_at(address, count, like):
    """Numbers that lie one after the other, as an array."""
    return carray(pointer(address, like), (count,))


# --- threads ----------------------------------------------------------------------------------------------------------
_pool: ThreadPoolExecutor | None = None


def _forget() -> None:
    global _pool, _lock
    _pool, _lock = None, threading.RLock()  # a child has none of its parent's threads
    _helpers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _submit(task: Callable[[], None]) -> Future[None] | None:
    """A task for another thread; None where the interpreter is about to end and starts none any more."""
    global _pool
    if _pool is None:
        with _lock:
            _pool = _pool or ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="fastloss")
    try:
        return _pool.submit(task)
    except RuntimeError:
        return None


_Pointer = ctypes.c_size_t.from_address


def address(array: Array | None) -> int:
    """Where an array's numbers begin; 0 for none. NumPy's own ways to it take as long as a small call may take."""
    return 0 if array is None else _Pointer(id(array) + HEAD).value


def reference(array: Array | None) -> int:
    """An array as kernels take it that look up its address themselves (`numbers_of`), in less time than Python; 0 for
    none. Whoever gives it keeps the array for as long as they run."""
    return 0 if array is None else id(array)


def in_order(array: Array, dtype: np.dtype[Any]) -> Array:
    """An array of that type in C order, aligned; itself where it is. NumPy's `require` takes a microsecond for that."""
    if array.dtype == dtype and (flags := array.flags).c_contiguous and flags.aligned:
        return array
    return np.require(array, dtype, ["C", "A"])


class Kernel:
    """A compiled function of two whole numbers, called without the interpreter's lock."""

    def __init__(self, function: Any) -> None:
        self._function = function  # kept: the others are no more than its address
        self.call: Callable[[int, int], Any] = function.ctypes
        self.address: int = function.address


# A thread that has to be woken is late: by 300 microseconds on a virtual machine whose processors sleep. So one that is
# done waits awake for a while, as OpenMP's do. Some systems wake it where its waker runs, and leave both there (seen:
# half the speed for as long as the process lived): so it is woken elsewhere, and where each thread has a processor, the
# one that waits for its end stays awake, too. Each has a line of memory: what state it is in, and a function's address
# and arguments.
ASLEEP, AWAKE, GIVEN, TAKEN, STOP = range(5)
PATIENCE = 50_000  # pauses, of about 20 ns each: how long a thread waits awake for work,
PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SHORT = 2_000  # and for the end of another's, where there are more threads than processors


def _serve(mailbox, patience):
    """Does what is given, until nothing has been given for long."""
    idle = 0
    while True:
        state = look(mailbox)
        if state == GIVEN and swap_if(mailbox, GIVEN, TAKEN):
            word = np.int64(0)
            call_address(get(mailbox + 8, word), get(mailbox + 16, word), get(mailbox + 24, word))
            swap(mailbox, AWAKE)
            idle = 0
        elif state == STOP or (idle > patience and swap_if(mailbox, AWAKE, ASLEEP)):
            return
        else:
            pause()
            idle += 1


def _give(mailbox, function, job, k):
    """Gives a thread that has nothing to do a call; the state that it was in."""
    put(mailbox + 8, function)
    put(mailbox + 16, job)
    put(mailbox + 24, k)
    return swap(mailbox, GIVEN)


def _end(mailbox, patience):
    """Takes a call back that has not begun, or waits for its end; whether it has come."""
    if swap_if(mailbox, GIVEN, AWAKE):
        return 1
    for _ in range(patience):
        if look(mailbox) != TAKEN:
            return 1
        pause()
    return 0


def _stop(mailbox, patience):
    return swap(mailbox, STOP)


def _compiled_crew() -> SimpleNamespace:
    word = types.intp
    serve = numba.cfunc(types.void(word, word), error_model="numpy")(_serve)
    give = numba.cfunc(word(word, word, word, word), error_model="numpy")(_give)
    end = numba.cfunc(word(word, word), error_model="numpy")(_end)
    stop = numba.cfunc(word(word, word), error_model="numpy")(_stop)
    kept = serve, give, end, stop
    return SimpleNamespace(kept=kept, serve=serve.ctypes, give=give.ctypes, end=end.ctypes, stop=stop.ctypes)


def _processors() -> set[int]:
    """The processors that this thread may run on, where the system tells and can be told."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()


@functools.cache
def _current_processor() -> Callable[[], int] | None:
    """What tells the processor that a thread runs on."""
    try:
        found: Callable[[], int] = ctypes.CDLL(None).sched_getcpu
    except (AttributeError, OSError, TypeError):
        return None
    return found


class Helper:
    """A thread that kernels can be given to. It has no part in the interpreter but while it falls asleep or wakes."""

    def __init__(self) -> None:
        self.crew = made(_compiled_crew)
        self.memory = np.zeros(2 * 64 // 8, np.int64)
        self.mailbox = -(-address(self.memory) // 64) * 64
        self.allowed: set[int] = set()
        self.wake = threading.Lock()
        self.wake.acquire()
        self.thread = threading.Thread(target=self._work, name="fastloss", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while self.wake.acquire():
            self.crew.serve(self.mailbox, PATIENCE)
            if self.memory[(self.mailbox - address(self.memory)) // 8] == STOP:
                return

    def give(self, kernel: Kernel, job: int, k: int) -> None:
        if self.crew.give(self.mailbox, kernel.address, job, k) == ASLEEP:
            self._elsewhere()
            self.wake.release()

    def _elsewhere(self) -> None:
        """It may run on no processor of its waker's, until the end of the call."""
        allowed, current = _processors(), _current_processor()
        if len(allowed) > 1 and current is not None:
            with contextlib.suppress(OSError):  # it is a favour, which the system need not do
                os.sched_setaffinity(self.thread.native_id or 0, allowed - {current()})
                self.allowed = allowed

    def dismiss(self) -> None:
        if self.crew.stop(self.mailbox, 0) == ASLEEP:
            self.wake.release()
        self.thread.join()

    def end(self, patience: int) -> None:
        while not self.crew.end(self.mailbox, patience):
            time.sleep(1e-5)  # this one makes room
        if self.allowed:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(self.thread.native_id or 0, self.allowed)
            self.allowed = set()


_helpers: list[Helper] = []  # that have nothing to do, whoever was busy last at the end


def _helper() -> Helper | None:
    """A thread to help; None where the interpreter is about to end and starts none any more."""
    try:
        return _helpers.pop()
    except IndexError:
        pass
    try:
        return Helper()
    except RuntimeError:
        return None


def run_kernel(kernel: Kernel, job: int, n_threads: int) -> None:
    """kernel(job, k) for each k < n_threads, on as many threads as there are; it must share out its work itself."""
    if n_threads == 1:
        kernel.call(job, 0)
        return
    helpers = [found for found in (_helper() for _ in range(n_threads - 1)) if found is not None]
    try:
        for k, helper in enumerate(helpers, 1):
            helper.give(kernel, job, k)
        kernel.call(job, 0)
    finally:
        patience = PATIENCE if n_threads <= PROCESSORS else SHORT
        for helper in helpers:
            helper.end(patience)
        _helpers.extend(reversed(helpers))


@atexit.register
def _dismiss() -> None:
    """Compiled code is unloaded as the interpreter ends: nobody may be in it then."""
    while _helpers:
        _helpers.pop().dismiss()


def run(task: Callable[[int, int], None], count: int, n_threads: int) -> None:
    """task(first, last) for ranges that make up range(count), on threads that are kept, the caller's among them.

    Threads take ranges as they come to it: an order of events that results must not depend on.
    """
    n_threads = min(n_threads, count)
    if n_threads <= 1:
        task(0, count)
        return
    parts = SHARES * n_threads
    left = deque((k * count // parts, (k + 1) * count // parts) for k in range(parts))

    def work() -> None:
        while True:
            try:
                first, last = left.popleft()
            except IndexError:
                return
            if last > first:
                task(first, last)

    others = [_submit(work) for _ in range(n_threads - 1)]
    work()
    for other in others:
        if other is not None and not other.cancel():
            other.result()
