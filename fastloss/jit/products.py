"""The two products of the fused linear layer, a block of rows with a block of classes, written in LLVM's language.

scores += x Wᵀ takes 4 rows and a few classes at a time, and dW += gᵀ x a pair of vectors of features and about twice as
many classes, so that all sums stay in registers. A compiler makes neither of loops over numbers: it may not reorder
sums, and given leave to (`reassoc`) it vectorises them, but spills (50000 × 3072 × 10: 6 times the time).

W and dW lie in panels: for each block of classes, for each vector of features, a vector for each class of the block;
the last vector of a row is filled up with zeros. Rows of features are where they are, given by their addresses, of
the type that they have; they are converted, and `centre` is subtracted from them, in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from platform import machine
from typing import Any, NamedTuple

import llvmlite.binding
import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

ROWS = 4  # of a block of scores

_features = llvmlite.binding.get_host_cpu_features()
_wide = bool(_features.get("avx512f")) and bool(_features.get("avx512vl"))
VECTOR_BYTES = 64 if _wide else 32 if _features.get("avx") else 16
#: Classes of a block, at most, so that sums (4 for each class of scores, 2 of dW) and what they are made of fit into
#: the registers: 32 with AVX-512 and on ARM, else 16.
MOST_CLASSES, MOST_OUTER_CLASSES = (6, 12) if _wide or machine() in ("aarch64", "arm64") else (2, 6)


class Kind(NamedTuple):
    """What the products are compiled for."""

    stored: str  # the type of the features
    real: str  # that of all else
    centred: bool

    @property
    def lanes(self) -> int:
        """Numbers of a vector; at least 4, which sums are folded to."""
        return max(4, VECTOR_BYTES // (4 if self.real == "float32" else 8))


_STORED = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "uint8": 1}


class _Emitter:
    """LLVM instructions for one kind of products."""

    def __init__(self, kind: Kind, builder: Any) -> None:
        self.kind, self.b, self.lanes = kind, builder, kind.lanes
        self.real = ir.FloatType() if kind.real == "float32" else ir.DoubleType()
        self.real_size = 4 if kind.real == "float32" else 8
        self.vector = ir.VectorType(self.real, self.lanes)
        self.word = ir.IntType(64)

    def pointer(self, address: Any, kind: Any = None) -> Any:
        """An address as a pointer to numbers of a kind, else of the compute type."""
        return self.b.inttoptr(address, (kind or self.real).as_pointer())

    def at(self, base: Any, offset: Any) -> Any:
        """The pointer `offset` numbers after `base`, to a vector."""
        return self.b.bitcast(self.b.gep(base, [offset]), self.vector.as_pointer())

    def load(self, base: Any, offset: Any) -> Any:
        return self.b.load(self.at(base, offset), align=self.real_size)

    def store(self, value: Any, base: Any, offset: Any) -> None:
        self.b.store(value, self.b.bitcast(self.b.gep(base, [offset]), value.type.as_pointer()), align=self.real_size)

    def features(self, row: Any, offset: Any, left: Any) -> Any:
        """A vector of a row's features in the compute type; of the last `left` only, and zeros, if that is given."""
        name, size = self.kind.stored, _STORED[self.kind.stored]
        scalar = {1: ir.IntType(8), 2: ir.IntType(16), 4: ir.FloatType(), 8: ir.DoubleType()}[size]
        vector = ir.VectorType(scalar, self.lanes)
        address = self.b.add(row, self.b.mul(offset, self.word(size)))
        pointer = self.b.inttoptr(address, vector.as_pointer())
        if left is None:
            found = self.b.load(pointer, align=size)
        else:
            mask = self.b.icmp_unsigned("<", self._each_lane(), self.splat(left))
            load = self.intrinsic("masked.load", vector, [pointer.type, ir.IntType(32), mask.type, vector], True)
            found = self.b.call(load, [pointer, ir.IntType(32)(size), mask, vector(None)])
        if name == "uint8":
            found = self.b.uitofp(found, self.vector)
        elif name == "float16":
            found = self.b.fpext(self.b.bitcast(found, ir.VectorType(ir.HalfType(), self.lanes)), self.vector)
        elif name == "bfloat16":
            words = ir.VectorType(ir.IntType(32), self.lanes)
            upper = self.b.shl(self.b.zext(found, words), words([16] * self.lanes))
            found = self.b.bitcast(upper, self.vector)
        return found

    def _each_lane(self) -> Any:
        return ir.Constant(ir.VectorType(self.word, self.lanes), list(range(self.lanes)))

    def splat(self, value: Any) -> Any:
        """The number in each lane."""
        one = ir.VectorType(value.type, self.lanes)
        first = self.b.insert_element(ir.Constant(one, ir.Undefined), value, ir.IntType(32)(0))
        return self.shuffle(first, first, [0] * self.lanes)

    def shuffle(self, a: Any, b: Any, lanes: list[int]) -> Any:
        return self.b.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes))

    def multiply_add(self, a: Any, b: Any, total: Any) -> None:
        """total += a · b, rounded once where the processor can."""
        function = self.intrinsic("fmuladd", self.vector, [self.vector] * 3)
        self.b.store(self.b.call(function, [a, b, self.b.load(total)]), total)

    def intrinsic(self, name: str, result: Any, arguments: list[Any], pointed: bool = False) -> Any:
        """A function of LLVM's own that gives a vector (and, `pointed`, takes a pointer to one)."""
        letter = "i" if isinstance(result.element, ir.IntType) else "f"
        bits = {"half": 16, "float": 32, "double": 64}.get(str(result.element)) or result.element.width
        suffix = f"v{result.count}{letter}{bits}"
        full = f"llvm.{name}.{suffix}" + (f".p0{suffix}" if pointed else "")
        return cgutils.get_or_insert_function(self.b.module, ir.FunctionType(result, arguments), full)

    def fold(self, rows: list[Any]) -> Any:
        """The sums over the lanes of 4 vectors, in a vector of 4."""
        half, quarter = self.lanes // 2, self.lanes // 4

        def halves(a: Any, b: Any, *, starts: list[int], size: int) -> Any:
            low = [start + k for start in starts for k in range(size)]
            return self.b.fadd(self.shuffle(a, b, low), self.shuffle(a, b, [k + size for k in low]))

        pairs = [halves(rows[k], rows[k + 1], starts=[0, self.lanes], size=half) for k in (0, 2)]
        found = halves(*pairs, starts=[0, half, self.lanes, self.lanes + half], size=quarter)
        lanes = self.lanes
        while lanes > 4:
            even = list(range(0, lanes, 2))
            found = self.b.fadd(self.shuffle(found, found, even), self.shuffle(found, found, [k + 1 for k in even]))
            lanes //= 2
        return found

    @contextmanager
    def loop(self, start: Any, stop: Any, step: int) -> Iterator[Any]:
        """The body of a loop that is not unrolled: the compiler would, and run out of registers."""
        b = self.b
        before, head = b.block, b.append_basic_block("head")
        body, end = b.append_basic_block("body"), b.append_basic_block("end")
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(self.word)
        index.add_incoming(start, before)
        b.cbranch(b.icmp_signed("<", index, stop), body, end)
        b.position_at_end(body)
        yield index
        index.add_incoming(b.add(index, self.word(step)), b.block)
        off = b.module.add_metadata(["llvm.loop.unroll.disable"])
        mark = b.module.add_metadata([off, self.word(len(b.module.metadata))])  # none that is there already
        mark.operands = (mark, mark.operands[0])  # a loop's mark names itself
        b.branch(head).set_metadata("llvm.loop", mark)
        b.position_at_end(end)

    def sums(self, n: int) -> list[Any]:
        """Memory for n vectors, which the compiler makes registers of."""
        return [cgutils.alloca_once(self.b, self.vector) for _ in range(n)]


class Product(NamedTuple):
    """The arguments of a product, whole numbers all."""

    rows: Any  # where the addresses of the rows are
    n: Any  # how many; for scores, a multiple of 4
    scores: Any  # where the first of the scores, or of their gradients, is: (C, R)
    stride: Any  # R
    centre: Any  # where it is
    panel: Any  # where the block's panel of W, or dW, begins
    whole: Any  # vectors of features,
    left: Any  # and features after them


def dot(e: _Emitter, classes: int, given: Product) -> None:
    """scores += x Wᵀ, 4 rows at a time."""
    builder, lanes = e.b, e.word(e.lanes)
    W, centre = e.pointer(given.panel), e.pointer(given.centre)
    sums = e.sums(classes * ROWS)

    def step(x_at: list[Any], v: Any, left: Any) -> None:
        offset = builder.mul(v, lanes)
        x = [e.features(at, offset, left) for at in x_at]
        if e.kind.centred:
            middle = e.load(centre, offset)
            x = [builder.fsub(vector, middle) for vector in x]
        panel = builder.mul(offset, e.word(classes))
        for c in range(classes):
            w = e.load(W, builder.add(panel, e.word(c * e.lanes)))
            for r in range(ROWS):
                e.multiply_add(x[r], w, sums[c * ROWS + r])

    with e.loop(e.word(0), given.n, ROWS) as first:
        rows, scores = (e.pointer(given.rows, e.word), e.pointer(given.scores))
        x_at = [builder.load(builder.gep(rows, [builder.add(first, e.word(r))])) for r in range(ROWS)]
        for total in sums:
            builder.store(e.vector(None), total)
        with e.loop(e.word(0), given.whole, 1) as v:
            step(x_at, v, None)
        with builder.if_then(builder.icmp_signed(">", given.left, e.word(0))):
            step(x_at, given.whole, given.left)
        for c in range(classes):
            found = e.fold([builder.load(total) for total in sums[c * ROWS : (c + 1) * ROWS]])
            at = builder.gep(scores, [builder.add(first, builder.mul(given.stride, e.word(c)))])
            at = builder.bitcast(at, found.type.as_pointer())
            builder.store(builder.fadd(builder.load(at, align=e.real_size), found), at, align=e.real_size)


def outer(e: _Emitter, classes: int, given: Product) -> None:
    """dW += gᵀ x, two vectors of features at a time."""
    builder, lanes = e.b, e.word(e.lanes)
    rows, g = e.pointer(given.rows, e.word), e.pointer(given.scores)
    dW, centre = e.pointer(given.panel), e.pointer(given.centre)
    sums = e.sums(2 * classes)

    def step(v: Any, vectors: int, left: Any) -> None:
        panel = builder.mul(builder.mul(v, lanes), e.word(classes))
        used = sums[: vectors * classes]
        for k, total in enumerate(used):
            builder.store(e.load(dW, builder.add(panel, e.word(k * e.lanes))), total)
        offsets = [builder.mul(builder.add(v, e.word(k)), lanes) for k in range(vectors)]
        middle = [e.load(centre, offset) for offset in offsets] if e.kind.centred else []
        with e.loop(e.word(0), given.n, 1) as r:
            row = builder.load(builder.gep(rows, [r]))
            x = [e.features(row, offset, left) for offset in offsets]
            if e.kind.centred:
                x = [builder.fsub(*pair) for pair in zip(x, middle, strict=True)]
            for c in range(classes):
                at = builder.gep(g, [builder.add(r, builder.mul(given.stride, e.word(c)))])
                pull = e.splat(builder.load(at))
                for k in range(vectors):
                    e.multiply_add(x[k], pull, used[k * classes + c])
        for k, total in enumerate(used):
            e.store(builder.load(total), dW, builder.add(panel, e.word(k * e.lanes)))

    pairs = builder.and_(given.whole, e.word(-2))
    with e.loop(e.word(0), pairs, 2) as v:
        step(v, 2, None)
    with builder.if_then(builder.icmp_signed("<", pairs, given.whole)):
        step(pairs, 1, None)
    with builder.if_then(builder.icmp_signed(">", given.left, e.word(0))):
        step(given.whole, 1, given.left)


def copy_row(e: _Emitter, classes: int, given: Product) -> None:
    """A row whose features are `stride` bytes apart, at `rows`, contiguous at `panel`; `n` features."""
    word = ir.IntType(8 * _STORED[e.kind.stored])
    to = e.pointer(given.panel, word)
    with e.loop(e.word(0), given.n, 1) as d:
        at = e.b.add(given.rows, e.b.mul(d, given.stride))
        e.b.store(e.b.load(e.pointer(at, word)), e.b.gep(to, [d]))


_SIGNATURE = types.void(*[types.intp] * len(Product._fields))


def compiled(product: Callable[[_Emitter, int, Product], None], kind: Kind, classes: int) -> Any:
    """The product for a block of so many classes, as a function of C; `call` calls it by its `address`."""

    def body(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        product(_Emitter(kind, builder), classes, Product(*arguments))
        return context.get_dummy_value()

    @intrinsic
    def emitted(typing, rows, n, scores, stride, centre, panel, whole, left):
        return _SIGNATURE, body

    @numba.cfunc(_SIGNATURE)
    def function(rows, n, scores, stride, centre, panel, whole, left):
        emitted(rows, n, scores, stride, centre, panel, whole, left)

    return function


@intrinsic
def call(typing, address, rows, n, scores, stride, centre, panel, whole, left):
    """Call the compiled product at an address."""

    def body(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        function = ir.FunctionType(ir.VoidType(), [word] * len(Product._fields))
        builder.call(builder.inttoptr(arguments[0], function.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(types.intp, *_SIGNATURE.args), body
