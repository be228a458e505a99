"""Vectors in LLVM's own language: `Emitter` writes instructions, and `Value` is what they compute.

A compiler makes vectors of loops over numbers only where it may reorder sums, copies what may overlap, and leaves ends
of rows to loops over single numbers. So walks are written as vectors. `Value` has Python's operators, and
`Emitter.tools` are those of `rowmath`: its functions run on vectors as they are on numbers, and leave instructions.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba.core import cgutils

from fastloss.jit import rowmath

_features = llvmlite.binding.get_host_cpu_features()
#: AVX-512, with masks for vectors of any size.
WIDE = bool(_features.get("avx512f")) and bool(_features.get("avx512vl"))
VECTOR_BYTES = 64 if WIDE else 32 if _features.get("avx") else 16
LINE = 64  # bytes of a line of the cache
BIT, BYTE, HALF, INT, WORD = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_ELEMENTS = {"float32": ir.FloatType(), "float64": ir.DoubleType(), "uint8": BYTE, "float16": HALF, "bfloat16": HALF}
_SIZES = {"float32": 4, "float64": 8, "uint8": 1, "float16": 2, "bfloat16": 2}


def lanes_of(real: str) -> int:
    """Numbers of a vector; at least 4, which sums are folded to."""
    return max(4, VECTOR_BYTES // _SIZES[real])


def is_float(kind: Any) -> bool:
    return isinstance(kind, (ir.HalfType, ir.FloatType, ir.DoubleType))


class Value:
    """A vector of numbers, or of truth values, that instructions compute."""

    __slots__ = ("e", "v")
    __array_ufunc__ = None  # NumPy's numbers leave operators to vectors
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, e: Emitter, v: Any) -> None:
        self.e, self.v = e, v

    def _both(self, other: Any, of_floats: str, of_integers: str, swapped: bool = False) -> Value:
        a, b = self.v, self.e.lift(other, self.v.type)
        if swapped:
            a, b = b, a
        if is_float(self.v.type.element):
            return Value(self.e, getattr(self.e.b, of_floats)(a, b, flags=("contract",)))
        return Value(self.e, getattr(self.e.b, of_integers)(a, b))

    def _compare(self, how: str, other: Any) -> Value:
        a, b = self.v, self.e.lift(other, self.v.type)
        if not is_float(self.v.type.element):
            return Value(self.e, self.e.b.icmp_signed(how, a, b))
        compare = self.e.b.fcmp_unordered if how == "!=" else self.e.b.fcmp_ordered
        return Value(self.e, compare(how, a, b))

    def __add__(self, other):
        return self._both(other, "fadd", "add")

    def __radd__(self, other):
        return self._both(other, "fadd", "add", swapped=True)

    def __sub__(self, other):
        return self._both(other, "fsub", "sub")

    def __rsub__(self, other):
        return self._both(other, "fsub", "sub", swapped=True)

    def __mul__(self, other):
        return self._both(other, "fmul", "mul")

    def __rmul__(self, other):
        return self._both(other, "fmul", "mul", swapped=True)

    def __truediv__(self, other):
        return self._both(other, "fdiv", "sdiv")

    def __rtruediv__(self, other):
        return self._both(other, "fdiv", "sdiv", swapped=True)

    def __lshift__(self, other):
        return self._both(other, "", "shl")

    def __rshift__(self, other):
        return self._both(other, "", "ashr")

    def __neg__(self):
        return Value(self.e, self.e.b.fneg(self.v))

    def __lt__(self, other):
        return self._compare("<", other)

    def __le__(self, other):
        return self._compare("<=", other)

    def __gt__(self, other):
        return self._compare(">", other)

    def __ge__(self, other):
        return self._compare(">=", other)

    def __eq__(self, other):
        return self._compare("==", other)

    def __ne__(self, other):
        return self._compare("!=", other)

    def __and__(self, other):
        return self._both(other, "", "and_")

    def __or__(self, other):
        return self._both(other, "", "or_")

    __rand__, __ror__ = __and__, __or__


class Emitter:
    """Instructions for vectors of a compute type, "float32" or "float64". Addresses are whole numbers of 64 bits."""

    def __init__(self, builder: Any, real: str) -> None:
        self.b, self.name = builder, real
        self.real, self.size, self.lanes = _ELEMENTS[real], _SIZES[real], lanes_of(real)
        self.vector = ir.VectorType(self.real, self.lanes)
        self.integer = ir.IntType(8 * self.size)
        self.integers = ir.VectorType(self.integer, self.lanes)

    # --- values ---
    def lift(self, x: Any, kind: Any) -> Any:
        """What computes x, a vector or a number that is the same in all lanes, of a type of vectors or numbers."""
        if isinstance(x, Value):
            return x.v
        element = kind.element if isinstance(kind, ir.VectorType) else kind
        one = float(x) if is_float(element) else int(x)
        return ir.Constant(kind, [one] * kind.count if element is not kind else one)

    def splat(self, value: Any, kind: Any = None) -> Any:
        """A number in each lane."""
        one = ir.VectorType(value.type, self.lanes)
        first = self.b.insert_element(ir.Constant(one, ir.Undefined), value, INT(0))
        return self.shuffle(first, first, [0] * self.lanes)

    def shuffle(self, a: Any, b: Any, lanes: list[int]) -> Any:
        return self.b.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT, len(lanes)), lanes))

    def value(self, x: Any) -> Value:
        """A number of the compute type, the same in each lane, as a vector."""
        return x if isinstance(x, Value) else Value(self, self.lift(x, self.vector))

    def each_lane(self, kind: Any) -> Any:
        """0, 1, 2, ..., in integers."""
        return ir.Constant(ir.VectorType(kind, self.lanes), list(range(self.lanes)))

    def first(self, count: Any) -> Any:
        """Whether a lane is one of the first `count`, any number of 64 bits."""
        stop = self.splat(self.lane(self.least(count, WORD(self.lanes))))
        return self.b.icmp_signed("<", self.each_lane(self.integer), stop)

    def lane(self, word: Any) -> Any:
        """A number of 64 bits as one of a lane's size."""
        return word if self.size == 8 else self.b.trunc(word, self.integer)

    def word(self, lane: Any) -> Any:
        return lane if self.size == 8 else self.b.sext(lane, WORD)

    def least(self, a: Any, b: Any) -> Any:
        return self.b.select(self.b.icmp_signed("<", a, b), a, b)

    def choose(self, whether: Any, a: Any, b: Any) -> Any:
        if not isinstance(whether, Value):
            return a if whether else b
        kind = a.v.type if isinstance(a, Value) else b.v.type if isinstance(b, Value) else self.vector
        return Value(self, self.b.select(whether.v, self.lift(a, kind), self.lift(b, kind)))

    def larger(self, a: Any, b: Any) -> Value:
        """NaN if one is; of 0 and −0 any."""
        kind = (a if isinstance(a, Value) else b).v.type
        function = self.intrinsic("maximum", kind, [kind, kind])
        return Value(self, self.b.call(function, [self.lift(a, kind), self.lift(b, kind)], fastmath=("nsz",)))

    def size_of(self, x: Value) -> Value:
        """|x|."""
        return Value(self, self.b.call(self.intrinsic("fabs", x.v.type, [x.v.type]), [x.v]))

    def all_of(self, truths: Value) -> Any:
        """Whether all lanes are true."""
        whole = self.b.bitcast(truths.v, ir.IntType(self.lanes))
        return self.b.icmp_signed("==", whole, whole.type(-1))

    def _bits(self, x: Any) -> Value:
        return Value(self, self.b.bitcast(x.v, self.integers))

    def _number(self, i: Any) -> Value:
        return Value(self, self.b.bitcast(i.v, self.vector))

    def tools(self) -> SimpleNamespace:
        """The tools of `rowmath`."""
        real: Any = getattr(np, self.name)
        wide = WIDE and self.lanes * self.size == 64
        return SimpleNamespace(
            real=real, integer=np.int32 if real is np.float32 else np.int64, larger=self.larger, bits=self._bits,
            number=self._number, choose=self.choose, exp=self._exp if wide else None,
        )  # fmt: skip

    def _exp(self, x: Value, start: Any) -> Value:
        """exp of AVX-512: the nearest 1 / lanes of a power of two by a table that is a register, and a short series."""
        k, b, single = rowmath.CONSTANTS[getattr(np, self.name)], self.b, self.size == 4
        rounder = k.rounder / self.lanes  # adding it rounds to a multiple of 1 / lanes
        start = (start - k.rounder) + rounder
        least = self.value(-512.0 if single else -4096.0)  # whose exponential is 0 from wherever; −inf has no rest
        x = self.choose(least > x, least, x)  # NaN stays
        t = x * 1.4426950408889634 + start
        n = t - start
        r = (x - n * k.log2_high) - n * k.log2_low
        degree = 3 if single else 8
        q = self.value(1 / math.factorial(degree))
        for d in range(degree - 1, 0, -1):
            q = q * r + 1 / math.factorial(d)
        q = q * r
        powers = ir.Constant(self.vector, [float(np.float64(2) ** (k / self.lanes)) for k in range(self.lanes)])
        letters = "s" if single else "d"
        kind = ir.FunctionType(self.vector, [self.vector, self.integers])
        look_up = cgutils.get_or_insert_function(b.module, kind, f"llvm.x86.avx512.permvar.{letters}f.512")
        power = Value(self, b.call(look_up, [powers, self._bits(t).v]))
        mask = ir.IntType(self.lanes)
        kind = ir.FunctionType(self.vector, [self.vector, self.vector, self.vector, mask, INT])
        scale = cgutils.get_or_insert_function(b.module, kind, f"llvm.x86.avx512.mask.scalef.p{letters}.512")
        found = (power * q + power).v
        return Value(self, b.call(scale, [found, (t - rounder).v, found, mask(-1), INT(4)]))

    def intrinsic(self, name: str, result: Any, arguments: list[Any], pointed: bool = False) -> Any:
        """A function of LLVM's own that gives a vector (and, `pointed`, takes a pointer to one)."""
        letter = "i" if isinstance(result.element, ir.IntType) else "f"
        bits = {"half": 16, "float": 32, "double": 64}.get(str(result.element)) or result.element.width
        suffix = f"v{result.count}{letter}{bits}"
        full = f"llvm.{name}.{suffix}" + (f".p0{suffix}" if pointed else "")
        return cgutils.get_or_insert_function(self.b.module, ir.FunctionType(result, arguments), full)

    # --- addresses ---
    def plus(self, address: Any, index: Any, size: int) -> Any:
        """The address of number `index` of those from `address` on."""
        if isinstance(index, int):
            return self.b.add(address, WORD(index * size)) if index else address
        return self.b.add(address, self.b.mul(index, WORD(size)))

    def load(self, address: Any, kind: Any = None, size: int = 0) -> Any:
        """What is of a type at an address: a vector of the compute type, unless another is given."""
        kind = kind or self.vector
        return self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=size or self.size)

    def store(self, value: Any, address: Any, size: int = 0) -> None:
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=size or self.size)

    def load_some(self, address: Any, mask: Any, kind: Any, size: int) -> Any:
        """Lanes of a vector in memory; zeros where there are none."""
        pointer = self.b.inttoptr(address, kind.as_pointer())
        load = self.intrinsic("masked.load", kind, [pointer.type, INT, mask.type, kind], True)
        return self.b.call(load, [pointer, INT(size), mask, kind(None)])

    def store_some(self, value: Any, address: Any, mask: Any, size: int) -> None:
        pointer = self.b.inttoptr(address, value.type.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [value.type, pointer.type, INT, mask.type])
        like = self.intrinsic("masked.load", value.type, [pointer.type, INT, mask.type, value.type], True).name
        store = cgutils.get_or_insert_function(self.b.module, kind, like.replace("masked.load", "masked.store"))
        self.b.call(store, [value, pointer, INT(size), mask])

    def fetch(self, address: Any, write: bool = False) -> None:
        """Ask for a line of memory."""
        pointer = BYTE.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, INT, INT, INT])
        function = cgutils.get_or_insert_function(self.b.module, kind, "llvm.prefetch.p0i8")
        self.b.call(function, [self.b.inttoptr(address, pointer), INT(int(write)), INT(2), INT(1)])

    # --- control ---
    @contextmanager
    def loop(self, start: Any, stop: Any, step: int) -> Iterator[Any]:
        """The body of a loop that is not unrolled: the compiler would, and run out of registers."""
        b = self.b
        before, head = b.block, b.append_basic_block("head")
        body, end = b.append_basic_block("body"), b.append_basic_block("end")
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(WORD)
        index.add_incoming(start, before)
        b.cbranch(b.icmp_signed("<", index, stop), body, end)
        b.position_at_end(body)
        yield index
        index.add_incoming(b.add(index, WORD(step)), b.block)
        off = b.module.add_metadata(["llvm.loop.unroll.disable"])
        mark = b.module.add_metadata([off, WORD(len(b.module.metadata))])  # none that is there already
        mark.operands = (mark, mark.operands[0])  # a loop's mark names itself
        b.branch(head).set_metadata("llvm.loop", mark)
        b.position_at_end(end)

    def each(self, start: Any, stop: Any, at_once: int, body: Callable[[list[Any]], None]) -> None:
        """body([k, ...]) for all k from start on, so many at once, then those left one by one."""
        b = self.b
        whole = b.sub(stop, b.srem(b.sub(stop, start), WORD(at_once)))
        with self.loop(start, whole, at_once) as k:
            body([b.add(k, WORD(i)) if i else k for i in range(at_once)])
        if at_once > 1:
            with self.loop(whole, stop, 1) as k:
                body([k])

    def sums(self, n: int, start: Any = 0) -> list[Any]:
        """Memory for n vectors, which the compiler makes registers of, set to a number."""
        found = [cgutils.alloca_once(self.b, self.vector) for _ in range(n)]
        for place in found:
            self.b.store(self.lift(start, self.vector), place)
        return found

    def get(self, place: Any) -> Value:
        return Value(self, self.b.load(place))

    def set(self, place: Any, x: Any) -> None:
        self.b.store(self.lift(x, self.vector), place)

    def multiply_add(self, a: Any, b: Any, total: Any) -> None:
        """total += a · b, rounded once where the processor can."""
        function = self.intrinsic("fmuladd", self.vector, [self.vector] * 3)
        self.b.store(self.b.call(function, [a, b, self.b.load(total)]), total)

    # --- lanes of several vectors at once ---
    def transposed(self, vectors: list[Any], join: Callable[[Any, Any], Any]) -> Any:
        """A vector of what each of them is, its lanes joined. Items may be tuples, which are joined as one."""
        while len(vectors) > 1:
            half = len(vectors) // 2
            vectors = [join(*self._zipped(vectors[k], vectors[k + half])) for k in range(half)]
        return vectors[0]

    def _zipped(self, a: Any, b: Any) -> tuple[Any, Any]:
        if isinstance(a, tuple):
            pairs = [self._zipped(x, y) for x, y in zip(a, b, strict=True)]
            return tuple(low for low, _ in pairs), tuple(high for _, high in pairs)
        n = self.lanes
        low = [lane for k in range(n // 2) for lane in (k, n + k)]
        return (
            Value(self, self.shuffle(a.v, b.v, low)), Value(self, self.shuffle(a.v, b.v, [k + n // 2 for k in low]))
        )  # fmt: skip


class Stored:
    """Numbers as they are in memory, of a type by name, and how vectors of the compute type are made of them."""

    def __init__(self, e: Emitter, name: str) -> None:
        self.e, self.name, self.size, self.element = e, name, _SIZES[name], _ELEMENTS[name]
        self.vector = ir.VectorType(self.element, e.lanes)
        self.is_real = name == e.name

    def widened(self, found: Any) -> Any:
        """Numbers, or vectors of any size, in the compute type."""
        b, like = self.e.b, self._like(found)
        if self.name == "uint8":
            return b.uitofp(found, like(self.e.real))
        if self.name == "float16":
            return b.fpext(b.bitcast(found, like(ir.HalfType())), like(self.e.real))
        if self.name == "bfloat16":
            bits = b.shl(b.zext(found, like(INT)), self.e.lift(16, like(INT)))
            return b.bitcast(bits, like(self.e.real))
        return found

    def narrowed(self, x: Any) -> Any:
        """Numbers, or vectors of any size, as they are stored; to nearest, ties to even."""
        b, lift, like = self.e.b, self.e.lift, self._like(x)
        if self.name == "float16":
            return b.bitcast(b.fptrunc(x, like(ir.HalfType())), like(HALF))
        if self.name == "bfloat16":
            kind = like(INT)
            raw = b.bitcast(x, kind)
            odd = b.and_(b.lshr(raw, lift(16, kind)), lift(1, kind))
            rounded = b.lshr(b.add(b.add(raw, lift(0x7FFF, kind)), odd), lift(16, kind))
            return b.trunc(b.select(b.fcmp_ordered("==", x, x), rounded, lift(0x7FC0, kind)), like(HALF))
        return x

    @staticmethod
    def _like(x: Any) -> Callable[[Any], Any]:
        count = x.type.count if isinstance(x.type, ir.VectorType) else 0
        return lambda element: ir.VectorType(element, count) if count else element

    def load(self, address: Any, mask: Any = None) -> Any:
        """A vector; zeros where there is a mask that says so."""
        if mask is None:
            return self.widened(self.e.load(address, self.vector, self.size))
        return self.widened(self.e.load_some(address, mask, self.vector, self.size))

    def store(self, value: Any, address: Any, mask: Any = None) -> None:
        if mask is None:
            self.e.store(self.narrowed(value), address, self.size)
        else:
            self.e.store_some(self.narrowed(value), address, mask, self.size)

    def one(self, address: Any) -> Any:
        """A single number, in the compute type."""
        return self.widened(self.e.load(address, self.element, self.size))

    def put_one(self, number: Any, address: Any) -> None:
        self.e.store(self.narrowed(number), address, self.size)

    # Columns of rows, by pieces of 16 bytes of the compute type: a vector is joined from pieces of the rows k, k + P,
    # k + 2 P, ...; a transpose within pieces, of P such vectors, makes vectors of one column each.
    def gather(self, rows: Any, step: Any, columns: int) -> list[Any]:
        """At most P columns of as many rows as there are lanes; rows are `step` bytes apart."""
        e, pieces = self.e, self._pieces()
        joined = []
        for k in range(pieces):
            parts = [
                self._piece(e.b.add(rows, e.b.mul(step, WORD(k + i * pieces))), columns, pieces)
                for i in range(e.lanes // pieces)
            ]
            while len(parts) > 1:
                n = 2 * parts[0].type.count
                parts = [e.shuffle(*parts[i : i + 2], list(range(n))) for i in range(0, len(parts), 2)]
            joined.append(self.widened(parts[0]))
        return self._transposed_pieces(joined)[:columns]

    def scatter(self, vectors: list[Any], rows: Any, step: Any) -> None:
        """The reverse."""
        e, pieces, columns = self.e, self._pieces(), len(vectors)
        some = vectors + [vectors[0]] * (pieces - columns)
        for k, vector in enumerate(self._transposed_pieces(some)):
            stored = self.narrowed(vector)
            for i in range(e.lanes // pieces):
                address = e.b.add(rows, e.b.mul(step, WORD(k + i * pieces)))
                start = i * pieces
                for first, count in self._parts(columns):
                    lanes = list(range(start + first, start + first + count))
                    part = e.shuffle(stored, stored, lanes) if count > 1 else e.b.extract_element(stored, INT(lanes[0]))
                    e.store(part, e.plus(address, first, self.size), self.size)

    def _pieces(self) -> int:
        return 16 // self.e.size

    @staticmethod
    def _parts(columns: int) -> list[tuple[int, int]]:
        """A piece as loads and stores: (first, count) of each, counts powers of two."""
        return [(0, 2), (2, 1)] if columns == 3 else [(0, columns)]

    def _piece(self, address: Any, columns: int, pieces: int) -> Any:
        e, whole = self.e, ir.VectorType(self.element, pieces)
        if columns == pieces:
            return e.load(address, whole, self.size)
        found = ir.Constant(whole, ir.Undefined)
        for first, count in self._parts(columns):
            at = e.plus(address, first, self.size)
            if count == 1:
                found = e.b.insert_element(found, e.load(at, self.element, self.size), INT(first))
            else:
                two = e.load(at, ir.VectorType(self.element, 2), self.size)
                found = e.shuffle(two, two, [0, 1, *[0] * (pieces - 2)])
        return found

    def _transposed_pieces(self, vectors: list[Any]) -> list[Any]:
        e, pieces = self.e, self._pieces()

        def zipped(a: Any, b: Any, high: bool) -> Any:
            half = pieces // 2
            start = [p + k + high * half for p in range(0, e.lanes, pieces) for k in range(half)]
            return e.shuffle(a, b, [lane for k in start for lane in (k, e.lanes + k)])

        if pieces == 2:
            a, b = vectors
            return [zipped(a, b, False), zipped(a, b, True)]
        a, b, c, d = vectors
        found = []
        for high in (False, True):
            even, odd = zipped(a, c, high), zipped(b, d, high)
            found += [zipped(even, odd, False), zipped(even, odd, True)]
        return found
