"""The walks over a group of rows, as vectors, in two layouts: what kernels of scores and of the linear layer do.

rowed   a vector holds classes of one row. Rows are where they are, contiguous each. A walk is over all rows of the
        group before the next begins, so that no row waits for what is folded of it; sums are folded over the lanes of
        as many rows at once as there are lanes.
tiled   for few classes: a tile (classes, rows); a vector holds one class of several rows, and lanes never mix.

In both, rows are looked at (maximum, the target's score), aimed, opened (terms are added up), settled, a row in each
lane, and closed (the gradient). Rowed sums are of blocks of 16 vectors: a block's sum is added to that of the blocks
without loss. Only a block that has the target, or the row's end, looks at which classes its lanes are.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from fastloss.jit import rowmath
from fastloss.jit.rowmath import TERMS, Plan
from fastloss.jit.vectors import LINE, WORD, Emitter, Stored, Value

TILE = 64  # rows of a group at most
BLOCK = 16  # vectors
AT_ONCE = 4  # vectors
#: Vectors of each row that are kept between its walks: its terms, what the first lacks, and the end of the row.
LOWS, LAST, SLOTS = TERMS, TERMS + 1, TERMS + 2
#: What is known of the rows of a group: where in `work` the numbers begin, one for each row.
(
    TOP, OWN_SCORE, FACTOR, OWN_NUMBER, KNOWN, SUMS, LOW, LOSS, Z, ENTROPY, ENTRY, NUMBERS, WEIGHT, REACH, WORK,
) = (TILE * k for k in (0, 1, 2, 3, 4, 7, 13, 14, 15, 16, 17, 18, 22, 23, 24))  # fmt: skip
#: Where class weights, or margins of class pairs row by row, begin in the options.
TABLE = 8


class Group(NamedTuple):
    """What the walks are given: whole numbers of 64 bits, addresses among them. Steps are in bytes."""

    n: Any  # rows
    c: Any  # classes
    targets: Any  # int64, of the rows
    work: Any
    table: Any  # options, as `options_of`
    more: Any  # a number for each row and class: probabilities; tiled: or margins
    more_step: Any  # from row to row, or (tiled) from class to class
    # Rowed.
    rows: Any  # the scores
    rows_step: Any
    kept: Any  # what is kept for the gradient, in the compute type
    kept_step: Any
    grads: Any
    grads_step: Any
    vectors: Any  # SLOTS vectors for each row
    ahead: Any  # bytes from a row to that which is walked over a group later
    # Tiled.
    tile: Any
    tile_step: Any  # from class to class


class Walk:
    """Writes the walks of a row loss over a group of rows.

    Parameters
    ----------
    e : Emitter
    plan : Plan
    stored : str
        The type of scores and gradients (rowed).
    wants_gradient : bool
    skips : bool
        Whether rows may have multiplier 0: losses and gradients are then 0, whatever the scores.
    """

    def __init__(self, e: Emitter, plan: Plan, stored: str, wants_gradient: bool, skips: bool, given: Group) -> None:
        self.e, self.plan, self.stored, self.given = e, plan, Stored(e, stored), given
        self.wants_gradient, self.skips = wants_gradient, skips
        self.row = rowmath.build(plan, lambda function: function, e.tools())
        #: The same for rows whose scores are all small beside the softcap.
        self.near = rowmath.build(plan, lambda function: function, e.tools(), near=True) if plan.softcap else self.row
        self.options = tuple(Value(e, e.splat(e.load(e.plus(given.table, k, e.size), e.real))) for k in range(TABLE))
        self.has_index = plan.has_index
        #: Whether the target's score is looked up.
        self.has_own = plan.has_index and not plan.is_apart
        #: Whether a number of the target's own is, in the options.
        self.looks_up = plan.has_own and (plan.even or plan.pairs)
        self.grows = plan.grows
        self.is_max = plan.kind == "hinge max"
        #: Whether squares are summed: what sums lack is kept to the end.
        self.squares = plan.kind == "hinge" and plan.power == 2
        self.zero = e.value(0)

    # --- what is known of a row ---
    def field(self, which: int, r: Any) -> Any:
        return self.e.plus(self.given.work, self.e.b.add(r, WORD(which)), self.e.size)

    def of_rows(self, which: int, r: Any) -> Value:
        """A number of each of the rows from r on."""
        return Value(self.e, self.e.load(self.field(which, r)))

    def keep(self, which: int, r: Any, x: Any) -> None:
        self.e.store(self.e.lift(x, self.e.vector), self.field(which, r))

    def of_row(self, which: int, r: Any) -> Value:
        """A number of row r in all lanes."""
        return Value(self.e, self.e.splat(self.e.load(self.field(which, r), self.e.real)))

    def known(self, at: Callable[[int, Any], Value], r: Any) -> tuple[Value, ...]:
        return tuple(at(KNOWN + k * TILE, r) for k in range(rowmath.KNOWN))

    def numbers(self, at: Callable[[int, Any], Value], r: Any) -> tuple[Value, ...]:
        return tuple(at(NUMBERS + k * TILE, r) for k in range(4))

    def aim(self) -> None:
        e, plan = self.e, self.plan
        with e.loop(WORD(0), self.given.n, e.lanes) as g:
            m = self.of_rows(TOP, g) if plan.looks else self.zero
            sy = self.of_rows(OWN_SCORE, g) if self.has_own else self.zero
            for k, x in enumerate(self.row.aim(m, sy, self.of_rows(FACTOR, g), self.options)):
                self.keep(KNOWN + k * TILE, g, x)

    # --- a softcap ---
    def _reach(self, so_far: Any, x: Value) -> None:
        """The largest |s|; NaN is none, but is the maximum then."""
        size, reach = self.e.size_of(x), self.e.get(so_far)
        self.e.set(so_far, self.e.choose(reach < size, size, reach))

    def _are_near(self, g: Any) -> Value:
        """Whether all scores of rows from g on are near; so are rows that are skipped."""
        top, per_softcap = self.of_rows(TOP, g), self.options[rowmath.PER_SOFTCAP]
        near = (self.of_rows(REACH, g) * per_softcap < rowmath.NEAR) & (top == top)
        found: Value = near | (self.of_rows(WEIGHT, g) == 0)
        return found

    def by_nearness(self, are_near: Callable[[], Any], write: Callable[[Any], None]) -> None:
        """What is written with the row mathematics of near rows, or of any."""
        if not self.plan.softcap:
            write(self.row)
            return
        with self.e.b.if_else(are_near(), likely=True) as (near, far):
            with near:
                write(self.near)
            with far:
                write(self.row)

    def settle(self, g: Any, sums: list[Value], low: Value) -> None:
        """Rows from g on, a row in each lane."""
        e, plan = self.e, self.plan
        m = self.of_rows(TOP, g) if plan.looks else self.zero
        sy = self.of_rows(OWN_SCORE, g) if self.has_own else self.zero
        own = self.zero
        if plan.has_own:
            own = self.of_rows(OWN_NUMBER, g) if self.looks_up else self.options[rowmath.MARGIN]
        sums = sums + [self.zero] * (TERMS - len(sums))
        known, factor = self.known(self.of_rows, g), self.of_rows(FACTOR, g)
        loss, z, entropy, entry, *numbers = self.row.settle(
            m, sy, own, known, tuple(sums), low, factor, self.options
        )  # fmt: skip
        dead = self.of_rows(WEIGHT, g) == 0 if self.skips else False
        for which, x in ((LOSS, loss), (Z, z), (ENTROPY, entropy)):
            if isinstance(x, Value):  # else none is asked for
                self.keep(which, g, e.choose(dead, self.zero, x))
        if self.wants_gradient:
            for which, x in ((ENTRY, entry), *((NUMBERS + k * TILE, x) for k, x in enumerate(numbers))):
                self.keep(which, g, x)

    def step(self, row: Any, x: Any, q: Any, w: Any, is_target: Any, known: Any, product: tuple[Any, Any]) -> Any:
        """`rowmath`'s, or what is left of it once 1 + e has its place in a product."""
        if not self.grows:
            return row.step(x, q, w, is_target, known, self.options)
        kept, found, exp, _ = self.row.open(x, q, w, is_target, known, self.options)
        for place, number in zip(product, self.row.grow(*map(self.e.get, product), exp), strict=True):
            self.e.set(place, number)
        return kept, found

    # --- tiled ---
    def tiled(self) -> None:
        """The gradients take the place of the scores."""
        self._tiled_look()
        self.aim()
        self._tiled_open()
        if self.wants_gradient:
            if self.is_max:
                self._tiled_close_max()
            else:
                self._tiled_close()

    def _at(self, k: Any, g: Any) -> Any:
        """The address of class k of rows from g on."""
        e = self.e
        return e.plus(e.b.add(self.given.tile, e.b.mul(k, self.given.tile_step)), g, e.size)

    def _more_at(self, k: Any, g: Any) -> Value:
        """Their probabilities, or margins."""
        e = self.e
        if not (self.plan.probabilities or self.plan.pairs):
            return self.zero
        return Value(e, e.load(e.plus(e.b.add(self.given.more, e.b.mul(k, self.given.more_step)), g, e.size)))

    def _targets_from(self, g: Any) -> Value:
        """The targets of rows from g on."""
        e = self.e
        left = e.first(e.b.sub(self.given.n, g))
        words = ir.VectorType(WORD, e.lanes)
        found = e.load_some(e.plus(self.given.targets, g, 8), left, words, 8)
        if self.plan.is_apart:  # of one class, labels are 0 and 1: none, and class 0
            is_one = e.b.zext(e.b.icmp_signed("==", self.given.c, WORD(1)), WORD)
            found = e.b.sub(found, e.splat(is_one, words))
        return Value(e, found if e.size == 8 else e.b.trunc(found, e.integers))

    def _class(self, k: Any) -> Value:
        e = self.e
        return Value(e, e.splat(e.lane(k)))

    def _weight_of(self, k: Any) -> Any:
        """The weight of class k, or both of them."""
        e = self.e
        if not self.plan.weights:
            return self.zero

        def load(k: Any) -> Value:
            return Value(e, e.splat(e.load(e.plus(self.given.table, e.b.add(k, WORD(TABLE)), e.size), e.real)))

        return (load(k), load(e.b.add(k, self.given.c))) if self.plan.is_apart else load(k)

    def _tiled_look(self) -> None:
        e, plan = self.e, self.plan
        if not (plan.looks or self.has_own):
            return
        with e.loop(WORD(0), self.given.n, e.lanes) as g:
            y = self._targets_from(g) if self.has_own else None
            top, (own, number, reach) = e.sums(1, -np.inf)[0], e.sums(3)

            def look(classes: list[Any]) -> None:
                for k in classes:
                    x = Value(e, e.load(self._at(k, g)))
                    if plan.looks:
                        e.set(top, self.row.top(e.get(top), x))
                    if plan.softcap:
                        self._reach(reach, x)
                    if y is not None:
                        e.set(own, e.choose(self._class(k) == y, x, e.get(own)))
                        if self.looks_up:
                            x = self._weight_of(k) if plan.even else self._more_at(k, g)
                            e.set(number, e.choose(self._class(k) == y, x, e.get(number)))

            e.each(WORD(0), self.given.c, 2, look)
            if plan.looks:
                self.keep(TOP, g, e.get(top))
            if plan.softcap:
                self.keep(REACH, g, e.get(reach))
            if y is not None:
                self.keep(OWN_SCORE, g, e.get(own))
            if self.looks_up:
                self.keep(OWN_NUMBER, g, e.get(number))

    def _tiled_open(self) -> None:
        e, plan, row = self.e, self.plan, self.row
        exact_sum = row.functions.exact_sum
        exactly = plan.kind in ("hinge", "logistic")
        with e.loop(WORD(0), self.given.n, e.lanes) as g:
            y = self._targets_from(g) if self.has_index else None
            known = self.known(self.of_rows, g)
            sums = e.sums(1, -np.inf if self.is_max else 0) + e.sums(plan.terms - 1)
            low = e.sums(1)[0]
            product, product_low = e.sums(1, 1)[0], e.sums(1)[0]

            def step(row: Any, k: Any) -> list[Any]:
                at = self._at(k, g)
                is_target = False if y is None else self._class(k) == y
                x, q = Value(e, e.load(at)), self._more_at(k, g)
                kept, *terms = self.step(row, x, q, self._weight_of(k), is_target, known, (product, product_low))
                if self.wants_gradient:
                    e.store(e.lift(kept, e.vector), at)
                return list(terms[: plan.terms])

            def open_classes(row: Any, classes: list[Any]) -> None:
                found = [step(row, k) for k in classes]
                if self.is_max:
                    for terms in found:
                        e.set(sums[0], row.top(e.get(sums[0]), terms[0]))
                    return
                first = found[0][0]
                if len(found) == 2 and exactly:
                    first, lost = exact_sum(first, found[1][0])
                    e.set(low, e.get(low) + lost)
                elif len(found) == 2:
                    first = first + found[1][0]
                total, lost = exact_sum(e.get(sums[0]), first)
                e.set(sums[0], total)
                e.set(low, e.get(low) + lost)
                for t in range(1, plan.terms):
                    both = found[0][t] + found[1][t] if len(found) == 2 else found[0][t]
                    e.set(sums[t], e.get(sums[t]) + both)

            def open_rows(row: Any) -> None:
                e.each(WORD(0), self.given.c, 2, functools.partial(open_classes, row))

            self.by_nearness(lambda: e.all_of(self._are_near(g)), open_rows)
            if self.grows:  # of 64 classes at most: no product is too large
                total, lost = row.logged(e.get(product), e.get(product_low), e.get(sums[0]))
                e.set(sums[0], total)
                e.set(low, e.get(low) + lost)
            lost = self.zero if self.is_max else row.functions.number_or_zero(e.get(low))
            self.settle(g, [e.get(total) for total in sums], lost)

    def _tiled_close(self) -> None:
        e, plan, row = self.e, self.plan, self.row
        with e.loop(WORD(0), self.given.n, e.lanes) as g:
            y = self._targets_from(g) if self.has_index else None
            known, numbers = self.known(self.of_rows, g), self.numbers(self.of_rows, g)
            entry = self.of_rows(ENTRY, g)
            dead = self.of_rows(WEIGHT, g) == 0 if self.skips else False

            def close(row: Any, classes: list[Any]) -> None:
                for k in classes:
                    at = self._at(k, g)
                    is_target = False if y is None else self._class(k) == y
                    found = Value(e, e.load(at))
                    if plan.closes:
                        q, w = self._more_at(k, g), self._weight_of(k)
                        found = row.close(found, q, w, is_target, known, numbers, self.options)
                    if plan.has_target:
                        found = e.choose(is_target, entry, found)
                    e.store(e.choose(dead, self.zero, found).v, at)

            def close_rows(row: Any) -> None:
                e.each(WORD(0), self.given.c, 2, functools.partial(close, row))

            if plan.bends_again:
                self.by_nearness(lambda: e.all_of(self._are_near(g)), close_rows)
            else:
                close_rows(row)

    def _tiled_close_max(self) -> None:
        # The gradient goes to the lowest class whose margin is the largest, or the first NaN.
        e = self.e
        with e.loop(WORD(0), self.given.n, e.lanes) as g:
            y, largest = self._targets_from(g), self.of_rows(NUMBERS + TILE, g)
            dead = self.of_rows(WEIGHT, g) == 0 if self.skips else False
            pull = e.choose(dead, self.zero, self.of_rows(NUMBERS, g))
            found = e.sums(1)[0]  # whether it is found
            entry = e.sums(1)[0]  # of the target

            def close(classes: list[Any]) -> None:
                for k in classes:
                    at = self._at(k, g)
                    d, before = Value(e, e.load(at)), e.get(found)
                    here = ((d == largest) | (d != d)) & (self._class(k) != y) & (before == 0)
                    e.set(found, e.choose(here, e.value(1), before))
                    e.store(e.choose(here, pull, self.zero).v, at)

            e.each(WORD(0), self.given.c, 1, close)
            e.set(entry, e.choose(e.get(found) == 0, self.zero, -pull))

            def give(classes: list[Any]) -> None:
                for k in classes:
                    at = self._at(k, g)
                    e.store(e.choose(self._class(k) == y, e.get(entry), Value(e, e.load(at))).v, at)

            e.each(WORD(0), self.given.c, 1, give)

    # --- rowed ---
    def rowed(self) -> None:
        e, given = self.e, self.given
        self.whole = e.b.sdiv(given.c, WORD(e.lanes))  # vectors
        self.left = e.b.srem(given.c, WORD(e.lanes))
        self.end = e.first(self.left)  # lanes of the last vector
        self.has_end = e.b.icmp_signed(">", self.left, WORD(0))
        self._rowed_look()
        self.aim()
        with self._each_live_row() as r:
            self.by_nearness(lambda: self._is_near(r), functools.partial(self._rowed_open, r))
        self._fold_and_settle()
        if self.wants_gradient:
            self._rowed_close()

    def _each_live_row(self) -> Any:
        return _LiveRows(self)

    def _slot(self, which: int, r: Any) -> Any:
        """A vector of row r."""
        e = self.e
        return e.plus(self.given.vectors, e.b.add(r, WORD(which * TILE)), e.lanes * e.size)

    def _row(self, base: Any, step: Any, r: Any) -> Any:
        return self.e.b.add(base, self.e.b.mul(r, step))

    def _vector(self, base: Any, k: Any, size: int) -> Any:
        """The address of vector k of numbers of a size."""
        return self.e.plus(base, k, self.e.lanes * size)

    def _target(self, r: Any) -> Any:
        e = self.e
        return e.load(e.plus(self.given.targets, r, 8), WORD, 8)

    def _rowed_look(self) -> None:
        e, plan, given = self.e, self.plan, self.given
        if not (plan.looks or self.has_own):
            return
        with self._each_live_row() as r:
            source = self._row(given.rows, given.rows_step, r)
            if plan.looks:
                tops, reaches = e.sums(AT_ONCE, -np.inf), e.sums(AT_ONCE)

                def look(vectors: list[Any]) -> None:
                    for top, reach, k in zip(tops, reaches, vectors, strict=False):
                        x = Value(e, self.stored.load(self._vector(source, k, self.stored.size)))
                        e.set(top, self.row.top(e.get(top), x))
                        if plan.softcap:
                            self._reach(reach, x)

                e.each(WORD(0), self.whole, AT_ONCE, look)
                with e.b.if_then(self.has_end):
                    x = Value(e, self.stored.load(self._vector(source, self.whole, self.stored.size), self.end))
                    if plan.softcap:
                        self._reach(reaches[0], x)
                    x = e.choose(Value(e, self.end), x, e.value(-np.inf))
                    e.set(tops[0], self.row.top(e.get(tops[0]), x))
                found = e.get(tops[0])
                for top in tops[1:]:
                    found = self.row.top(found, e.get(top))
                e.store(found.v, self._slot(0, r))
            if plan.softcap:
                for reach in reaches[1:]:
                    self._reach(reaches[0], e.get(reach))
                e.store(e.get(reaches[0]).v, self._slot(1, r))
            if self.has_own:
                y = self._target(r)
                e.store(self.stored.one(e.plus(source, y, self.stored.size)), self.field(OWN_SCORE, r))
                if self.looks_up:
                    at = e.b.add(y if plan.even else e.b.mul(y, e.b.add(given.c, WORD(1))), WORD(TABLE))
                    e.store(e.load(e.plus(given.table, at, e.size), e.real), self.field(OWN_NUMBER, r))
        if plan.looks:
            with e.loop(WORD(0), given.n, e.lanes) as g:
                self.keep(TOP, g, self._folded(0, g, self.row.top))
                if plan.softcap:
                    self.keep(REACH, g, self._folded(1, g, lambda a, b: e.choose(a < b, b, a)))
                    self.keep(REACH, g, e.choose(self._are_near(g), e.value(1), self.zero))

    def _folded(self, which: int, g: Any, join: Callable[[Any, Any], Any]) -> Any:
        """A vector of each of the rows from g on, folded over its lanes: a row in each lane."""
        e = self.e
        return e.transposed([Value(e, e.load(self._slot(which, e.b.add(g, WORD(i))))) for i in range(e.lanes)], join)

    def _more_of(self, r: Any) -> Any:
        """Where the numbers of the row's classes begin, if there are any."""
        e, given = self.e, self.given
        if self.plan.probabilities:
            return self._row(given.more, given.more_step, r)
        if self.plan.pairs:
            at = e.b.add(e.b.mul(self._target(r), given.c), WORD(TABLE))
            return e.plus(given.table, at, e.size)
        return None

    def _numbers_of_classes(self, more: Any, k: Any, mask: Any) -> tuple[Value, Any]:
        """Of vector k of a row: its probabilities or margins, and weights, one for each class or two."""
        e = self.e

        def load(base: Any) -> Value:
            at = self._vector(base, k, e.size)
            return Value(e, e.load(at) if mask is None else e.load_some(at, mask, e.vector, e.size))

        q = self.zero if more is None else load(more)
        if not self.plan.weights:
            return q, self.zero
        weights = e.plus(self.given.table, TABLE, e.size)
        return q, (load(weights), load(e.plus(weights, self.given.c, e.size))) if self.plan.is_apart else load(weights)

    def _classes(self, k: Any) -> Value:
        """Which classes the lanes of vector k are."""
        e = self.e
        first = e.splat(e.lane(e.b.mul(k, WORD(e.lanes))))
        return Value(e, e.b.add(first, e.each_lane(e.integer)))

    def _is_near(self, r: Any) -> Any:
        e = self.e
        return e.b.fcmp_ordered("!=", e.load(self.field(REACH, r), e.real), e.lift(0, e.real))

    def _rowed_open(self, r: Any, row: Any) -> None:
        e, plan, given, stored = self.e, self.plan, self.given, self.stored
        exact_sum, number_or_zero = row.functions.exact_sum, row.functions.number_or_zero
        b, terms = e.b, plan.terms
        source = self._row(given.rows, given.rows_step, r)
        ahead = b.add(source, given.ahead)
        direct = plan.kind == "hinge" or plan.is_apart  # what is kept is the gradient
        kept_type = stored if direct else Stored(e, e.name)
        where = (given.grads, given.grads_step) if direct else (given.kept, given.kept_step)
        kept_at = self._row(*where, r)
        more, known = self._more_of(r), self.known(self.of_row, r)
        excludes = self.has_index
        y = self._target(r) if excludes else WORD(-1)
        lane_y = Value(e, e.splat(e.lane(y)))
        start = -np.inf if self.is_max else 0
        totals, losts = e.sums(1, start) + e.sums(terms - 1), e.sums(terms)
        block, low = e.sums(1, start) + e.sums(terms - 1), e.sums(1)[0]
        product = e.sums(1, 1)[0], e.sums(1)[0]

        def step(k: Any, careful: bool, mask: Any = None) -> list[Any]:
            x = Value(e, stored.load(self._vector(source, k, stored.size), mask))
            if mask is not None and self.grows:  # 1 + e of these is 1
                x = e.choose(Value(e, mask), x, e.value(-np.inf))
            q, w = self._numbers_of_classes(more, k, mask)
            is_target = self._classes(k) == lane_y if careful and excludes else False
            kept, *found = self.step(row, x, q, w, is_target, known, product)
            kept = e.lift(kept, e.vector)
            if self.wants_gradient and mask is None:
                kept_type.store(kept, self._vector(kept_at, k, kept_type.size))
            elif self.wants_gradient and direct:
                kept_type.store(kept, self._vector(kept_at, k, kept_type.size), mask)
            elif self.wants_gradient:
                # Part of a vector that has just been written cannot be read again without a stall.
                e.store(kept, self._slot(LAST, r))
            if mask is not None:
                nothing = [e.value(start)] + [self.zero] * (terms - 1)
                return [e.choose(Value(e, mask), x, none) for x, none in zip(found, nothing, strict=False)]
            return [e.value(x) for x in found[:terms]]

        def add(found: list[list[Any]]) -> None:
            """The terms of some vectors, to the block's."""
            for t in range(terms):
                parts = [each[t] for each in found]
                if t == 0 and self.is_max:
                    while len(parts) > 1:
                        parts = [row.top(parts[0], parts[1]), *parts[2:]]
                    e.set(block[0], row.top(e.get(block[0]), parts[0]))
                elif t == 0 and (self.squares or (direct and e.lanes < 8)):
                    for x in parts:
                        total, lost = exact_sum(e.get(block[0]), x)
                        e.set(block[0], total)
                        e.set(low, e.get(low) + lost)
                else:
                    while len(parts) > 1:
                        parts = [*parts[2:], parts[0] + parts[1]]
                    total, lost = exact_sum(e.get(block[t]), parts[0])
                    e.set(block[t], total)
                    if t == 0 and plan.is_apart:  # one score may be all of the loss
                        e.set(low, e.get(low) + lost)

        def end_block() -> None:
            if self.is_max:
                e.set(totals[0], row.top(e.get(totals[0]), e.get(block[0])))
            if self.grows:
                total, lost = row.logged(*map(e.get, product), e.get(block[0]))
                e.set(block[0], total)
                e.set(low, e.get(low) + lost)
            for t in range(1 if self.is_max else 0, terms):
                total, lost = exact_sum(e.get(totals[t]), e.get(block[t]))
                e.set(totals[t], total)
                if t == 0:
                    lost = lost + e.get(low)
                e.set(losts[t], e.get(losts[t]) + lost)
            for place in [*block, low, *product]:
                e.set(place, start if place is block[0] else 1 if place is product[0] else 0)

        def ask(k: Any) -> None:
            e.fetch(e.plus(ahead, k, e.lanes * stored.size))

        def plain(vectors: list[Any]) -> None:
            ask(vectors[0])
            if len(vectors) * e.lanes * stored.size > LINE:
                for k in vectors[1:]:
                    ask(k)
            add([step(k, False) for k in vectors])

        def careful(vectors: list[Any]) -> None:
            for k in vectors:
                ask(k)
            add([step(k, True) for k in vectors])

        vectors = b.add(self.whole, b.zext(self.has_end, WORD))
        in_block = b.sdiv(b.sdiv(y, WORD(e.lanes)), WORD(BLOCK)) if excludes else WORD(-1)
        in_block = b.mul(in_block, WORD(BLOCK))
        with e.loop(WORD(0), vectors, BLOCK) as first:
            stop = b.add(first, WORD(BLOCK))
            is_plain = b.icmp_signed("<=", stop, self.whole)
            if excludes:
                is_plain = b.and_(is_plain, b.icmp_signed("!=", first, in_block))
            with b.if_else(is_plain) as (easy, hard):
                with easy, e.loop(first, stop, AT_ONCE) as k:
                    plain([b.add(k, WORD(i)) for i in range(AT_ONCE)])
                with hard:
                    e.each(first, e.least(stop, self.whole), AT_ONCE, careful)
                    is_end = b.and_(self.has_end, b.icmp_signed(">", stop, self.whole))
                    with b.if_then(is_end):
                        ask(self.whole)
                        add([step(self.whole, True, self.end)])
            end_block()
        for t in range(terms):
            total, lost = e.get(totals[t]), number_or_zero(e.get(losts[t]))
            if t == 0 and self.squares:
                e.store(lost.v, self._slot(LOWS, r))
            elif not (t == 0 and self.is_max):
                total = total + lost
            e.store(total.v, self._slot(t, r))

    def _fold_and_settle(self) -> None:
        e, plan, row = self.e, self.plan, self.row
        exact_sum, number_or_zero = row.functions.exact_sum, row.functions.number_or_zero

        def exactly(low: Any, high: Any) -> Any:
            total, lost = exact_sum(low[0], high[0])
            return total, low[1] + high[1] + lost

        with e.loop(WORD(0), self.given.n, e.lanes) as g:
            lost = self.zero
            if self.is_max:
                first = self._folded(0, g, row.top)
            elif plan.kind in ("hinge", "logistic"):
                rows = []
                for i in range(e.lanes):
                    r = e.b.add(g, WORD(i))
                    low = Value(e, e.load(self._slot(LOWS, r))) if self.squares else self.zero
                    rows.append((Value(e, e.load(self._slot(0, r))), low))
                first, lost = e.transposed(rows, exactly)
                lost = number_or_zero(lost)
            else:
                first = self._folded(0, g, lambda a, b: a + b)
            others = [self._folded(t, g, lambda a, b: a + b) for t in range(1, plan.terms)]
            self.settle(g, [first, *others], lost)

    def _rowed_close(self) -> None:
        e, plan, given, row, stored = self.e, self.plan, self.given, self.row, self.stored
        b, real = e.b, Stored(e, e.name)
        with e.loop(WORD(0), given.n, 1) as r:
            to = self._row(given.grads, given.grads_step, r)
            kept_at = self._row(given.kept, given.kept_step, r)

            def put(k: Any, x: Any, mask: Any = None) -> None:
                stored.store(e.lift(x, e.vector), self._vector(to, k, stored.size), mask)

            def close_row(row: Any) -> None:
                if self.is_max:
                    self._close_max(r, to, kept_at, put)
                    return
                more, known, numbers = self._more_of(r), self.known(self.of_row, r), self.numbers(self.of_row, r)
                y = self._target(r) if self.has_index and plan.weights and not plan.has_target else None

                def close(k: Any, found: Any, mask: Any = None) -> None:
                    q, w = self._numbers_of_classes(more, k, mask)
                    is_target: Any = False
                    if y is not None:
                        is_target = self._classes(k) == Value(e, e.splat(e.lane(y)))
                    put(k, row.close(Value(e, found), q, w, is_target, known, numbers, self.options), mask)

                def close_all(vectors: list[Any]) -> None:
                    for k in vectors:
                        close(k, real.load(self._vector(kept_at, k, e.size)))

                if plan.closes:
                    e.each(WORD(0), self.whole, AT_ONCE, close_all)
                    with b.if_then(self.has_end):
                        close(self.whole, e.load(self._slot(LAST, r)), self.end)
                if plan.has_target:
                    entry = e.load(self.field(ENTRY, r), e.real)
                    stored.put_one(entry, e.plus(to, self._target(r), stored.size))

            def clear_row() -> None:
                with e.loop(WORD(0), self.whole, 1) as k:
                    put(k, self.zero)
                with b.if_then(self.has_end):
                    put(self.whole, self.zero, self.end)

            with b.if_else(self._is_live(r)) as (live, dead):
                with live:
                    if plan.bends_again:
                        self.by_nearness(lambda: self._is_near(r), close_row)
                    else:
                        close_row(row)
                with dead:
                    clear_row()

    def _is_live(self, r: Any) -> Any:
        e = self.e
        return e.b.fcmp_unordered("!=", e.load(self.field(WEIGHT, r), e.real), e.lift(0, e.real))

    def _close_max(self, r: Any, to: Any, kept_at: Any, put: Callable[..., None]) -> None:
        e, b, given, stored = self.e, self.e.b, self.given, self.stored
        y = self._target(r)
        lane_y = Value(e, e.splat(e.lane(y)))
        top = self.of_row(NUMBERS + TILE, r)
        c = e.lane(given.c)
        none = Value(e, e.splat(c))
        place = cgutils.alloca_once(b, e.integers)
        b.store(none.v, place)

        def close(k: Any, found: Any, mask: Any = None) -> None:
            d, classes = Value(e, found), self._classes(k)
            here = ((d == top) | (d != d)) & (classes != lane_y)
            if mask is not None:
                here = here & Value(e, mask)
            at, least = e.choose(here, classes, none), Value(e, b.load(place))
            b.store(e.choose(at < least, at, least).v, place)
            put(k, self.zero, mask)

        with e.loop(WORD(0), self.whole, 1) as k:
            close(k, e.load(self._vector(kept_at, k, e.size)))
        with b.if_then(self.has_end):
            close(self.whole, e.load(self._slot(LAST, r)), self.end)
        kind = ir.FunctionType(e.integer, [e.integers])
        name = f"llvm.vector.reduce.smin.v{e.lanes}i{e.integer.width}"
        least = b.call(cgutils.get_or_insert_function(b.module, kind, name), [b.load(place)])
        with b.if_then(b.icmp_signed("<", least, c)):
            at = e.word(least)
            stored.put_one(e.load(self.field(NUMBERS, r), e.real), e.plus(to, at, stored.size))
            stored.put_one(e.load(self.field(ENTRY, r), e.real), e.plus(to, y, stored.size))


class _LiveRows:
    """A loop over the rows that are not skipped."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk

    def __enter__(self) -> Any:
        walk = self.walk
        self.loop = walk.e.loop(WORD(0), walk.given.n, 1)
        r = self.loop.__enter__()
        self.live = None
        if walk.skips:
            self.live = walk.e.b.if_then(walk._is_live(r))
            self.live.__enter__()
        return r

    def __exit__(self, *error: Any) -> None:
        if self.live is not None:
            self.live.__exit__(*error)
        self.loop.__exit__(*error)
