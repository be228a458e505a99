"""The two products of the fused linear layer, a block of rows with a block of classes, written in LLVM's language.

scores += x Wᵀ takes 4 rows and a few classes at a time, and dW += gᵀ x a pair of vectors of features and about twice as
many classes, so that all sums stay in registers. A compiler makes neither of loops over numbers: it may not reorder
sums, and given leave to (`reassoc`) it vectorises them, but spills (50000 × 3072 × 10: 6 times the time).

W and dW lie in panels: for each block of classes, for each vector of features, a vector for each class of the block;
the last vector of a row is filled up with zeros. Rows of features are where they are, given by their addresses, of
the type that they have; they are converted, and `centre` is subtracted from them, in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from platform import machine
from typing import Any, NamedTuple

import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from fastloss.jit.vectors import WIDE, WORD, Emitter, Stored, lanes_of

ROWS = 4  # of a block of scores

#: Classes of a block, at most, so that sums (4 for each class of scores, 2 of dW) and what they are made of fit into
#: the registers: 32 with AVX-512 and on ARM, else 16.
MOST_CLASSES, MOST_OUTER_CLASSES = (6, 12) if WIDE or machine() in ("aarch64", "arm64") else (2, 6)


class Kind(NamedTuple):
    """What the products are compiled for."""

    stored: str  # the type of the features
    real: str  # that of all else
    centred: bool

    @property
    def lanes(self) -> int:
        """Numbers of a vector."""
        return lanes_of(self.real)


class _Emitter(Emitter):
    """LLVM instructions for one kind of products."""

    def __init__(self, kind: Kind, builder: Any) -> None:
        super().__init__(builder, kind.real)
        self.kind, self.stored = kind, Stored(self, kind.stored)

    def pointer(self, address: Any, kind: Any = None) -> Any:
        """An address as a pointer to numbers of a kind, else of the compute type."""
        return self.b.inttoptr(address, (kind or self.real).as_pointer())

    def features(self, row: Any, offset: Any, left: Any) -> Any:
        """A vector of a row's features in the compute type; of the last `left` only, and zeros, if that is given."""
        address = self.plus(row, offset, self.stored.size)
        return self.stored.load(address, None if left is None else self.first(left))

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
    builder = e.b
    sums = e.sums(classes * ROWS)

    def step(x_at: list[Any], v: Any, left: Any) -> None:
        offset = builder.mul(v, WORD(e.lanes))
        x = [e.features(at, offset, left) for at in x_at]
        if e.kind.centred:
            middle = e.load(e.plus(given.centre, offset, e.size))
            x = [builder.fsub(vector, middle) for vector in x]
        panel = e.plus(given.panel, offset, classes * e.size)
        for c in range(classes):
            w = e.load(e.plus(panel, c * e.lanes, e.size))
            for r in range(ROWS):
                e.multiply_add(x[r], w, sums[c * ROWS + r])

    with e.loop(WORD(0), given.n, ROWS) as first:
        x_at = [e.load(e.plus(given.rows, builder.add(first, WORD(r)), 8), WORD, 8) for r in range(ROWS)]
        for total in sums:
            builder.store(e.vector(None), total)
        with e.loop(WORD(0), given.whole, 1) as v:
            step(x_at, v, None)
        with builder.if_then(builder.icmp_signed(">", given.left, WORD(0))):
            step(x_at, given.whole, given.left)
        for c in range(classes):
            found = e.fold([builder.load(total) for total in sums[c * ROWS : (c + 1) * ROWS]])
            at = e.plus(given.scores, builder.add(first, builder.mul(given.stride, WORD(c))), e.size)
            e.store(builder.fadd(e.load(at, found.type), found), at)


def outer(e: _Emitter, classes: int, given: Product) -> None:
    """dW += gᵀ x, two vectors of features at a time."""
    builder = e.b
    sums = e.sums(2 * classes)

    def step(v: Any, vectors: int, left: Any) -> None:
        panel = e.plus(given.panel, builder.mul(v, WORD(e.lanes)), classes * e.size)
        used = sums[: vectors * classes]
        for k, total in enumerate(used):
            builder.store(e.load(e.plus(panel, k * e.lanes, e.size)), total)
        offsets = [builder.mul(builder.add(v, WORD(k)), WORD(e.lanes)) for k in range(vectors)]
        middle = [e.load(e.plus(given.centre, offset, e.size)) for offset in offsets] if e.kind.centred else []
        with e.loop(WORD(0), given.n, 1) as r:
            row = e.load(e.plus(given.rows, r, 8), WORD, 8)
            x = [e.features(row, offset, left) for offset in offsets]
            if e.kind.centred:
                x = [builder.fsub(*pair) for pair in zip(x, middle, strict=True)]
            for c in range(classes):
                at = e.plus(given.scores, builder.add(r, builder.mul(given.stride, WORD(c))), e.size)
                pull = e.splat(e.load(at, e.real))
                for k in range(vectors):
                    e.multiply_add(x[k], pull, used[k * classes + c])
        for k, total in enumerate(used):
            e.store(builder.load(total), e.plus(panel, k * e.lanes, e.size))

    pairs = builder.and_(given.whole, WORD(-2))
    with e.loop(WORD(0), pairs, 2) as v:
        step(v, 2, None)
    with builder.if_then(builder.icmp_signed("<", pairs, given.whole)):
        step(pairs, 1, None)
    with builder.if_then(builder.icmp_signed(">", given.left, WORD(0))):
        step(given.whole, 1, given.left)


def copy_row(e: _Emitter, classes: int, given: Product) -> None:
    """A row whose features are `stride` bytes apart, at `rows`, contiguous at `panel`; `n` features."""
    size = e.stored.size
    number = ir.IntType(8 * size)
    with e.loop(WORD(0), given.n, 1) as d:
        at = e.b.add(given.rows, e.b.mul(d, given.stride))
        e.store(e.load(at, number, size), e.plus(given.panel, d, size), size)


_SIGNATURE = types.void(*[types.intp] * len(Product._fields))


def compiled(product: Callable[[_Emitter, int, Product], None], kind: Kind, classes: int) -> Any:
    """The product for a block of so many classes, as a function of C; called by its `address`."""

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
