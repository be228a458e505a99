# Rows of the hinge that are a few vectors long: a fifth layout, for vectors whose lanes have masks.
#
# Rows are walked over one by one, as in scores_rowed, but each step is for all rows of a batch before the next, which nothing but
# numbers and vectors of numbers then stand between: targets' scores; then what is looked for in a row (whose gradient, but for the
# target's entry, is written with it); losses, LANES rows at a time; then the entries that need them. Classes are counted by bits
# of masks. So rows take little more than their vectors, and more than their lanes never.

cdef enum:
    NARROW_ROWS = 128  # that are handled together, at most,
    NARROW_BYTES = 16384  # and what they take; but no less than a tile
    SET_BITS = 64  # of a set of classes


cdef inline int narrow_least(const Options *o) noexcept nogil:
    """Classes from which on this is faster than transposes: there is more to fold of squares. In place or not, and with a gradient
    or without, it is the same layout, and so the same bits."""
    return 2 * LANES if o.kind == HINGE and o.power == 2 else LANES


cdef bint is_narrow(const ScoresPass *s) noexcept nogil:
    cdef Py_ssize_t c = s.scores.columns
    return (VBYTES == 64 and (s.options.kind == HINGE or s.options.kind == HINGE_MAX) and not s.options.general
            and narrow_least(&s.options) <= c < MANY_CLASSES and s.scores.column_stride == 1
            and (s.grad.raw == NULL or s.grad.column_stride == 1))


cdef inline bint is_held(const ScoresPass *s) noexcept nogil:
    """Whether gradients of a batch are put together in scratch: to go past the caches; or in place, where a row is read next to
    what was written of another, for which it would wait (short rows that end in part of a vector)."""
    return s.streams or (s.grad.raw == s.scores.raw and s.grad.row_stride == s.grad.columns and s.grad.columns <= 3 * LANES
                         and s.grad.columns % LANES != 0)


cdef inline Py_ssize_t narrow_size(const ScoresPass *s) noexcept nogil:
    """Bytes of scratch."""
    return s.scores.columns * narrow_rows(s.scores.columns) * <Py_ssize_t> sizeof(stored) if is_held(s) else 0


cdef inline Py_ssize_t narrow_rows(Py_ssize_t c) noexcept nogil:
    """Rows that are handled together."""
    return max(<Py_ssize_t> TILE, min(<Py_ssize_t> NARROW_ROWS, NARROW_BYTES // (c * <Py_ssize_t> sizeof(real))) // TILE * TILE)


cdef struct NarrowRows:
    # Some rows that are handled together. What is written while they are walked over lies elsewhere, or this would be read anew.
    const stored *src
    stored *to  # where gradients are put, or NULL
    Py_ssize_t step, to_step  # from row to row
    int vectors  # of a row
    Py_ssize_t c, last  # classes of a row, and of its last vector
    Py_ssize_t ahead, to_ahead  # where the rows lie that come next
    bint far  # whether their gradients' lines are asked for too
    bint all_live
    bint summed  # whether of losses but their sum is asked for
    int n
    real scale


cdef struct Narrow:
    # What is known of each row.
    lane_int y[128]
    real mult[128]
    # State's m and target; and what is found, which is what the gradient needs, later.
    real m[128]
    real target[128]
    real a[128]
    real b[128]
    real low[128]
    lane_int active[128]  # classes
    bint summed[16]  # of each group of LANES rows: whether its losses are in `totals` already
    double totals[16]  # Σ multiplier · Σ_j of those, over lanes


cdef inline void aim_narrow(const Options *o, const NarrowRows *p, Narrow *w) noexcept nogil:
    cdef vec m, target
    cdef int i, g
    for i in range(p.n):
        w.target[i] = sone(p.src + i * p.step + w.y[i])
        one_by_one()
    for i in range(p.n, (p.n + LANES - 1) // LANES * LANES):
        w.target[i] = w.b[i] = 0
        w.active[i] = 0
    for g in range((p.n + LANES - 1) // LANES):
        i = g * LANES
        m, target = vset(0), vload(w.target + i)
        aim(o, &m, &target)
        vstore(w.m + i, m)
        vstore(w.target + i, target)


cdef inline vec narrow_score(bint last, const NarrowRows *p, const stored *src, Py_ssize_t k) noexcept nogil:
    """Vector k of a row; asks for that of a row that comes next."""
    prefetch(src + k * LANES + p.ahead)
    return sload_part(src + k * LANES, p.last, 0) if last else sload(src + k * LANES)


cdef inline void put_narrow(bint last, const NarrowRows *p, stored *to, Py_ssize_t k, vec entry) noexcept nogil:
    if p.far:
        prefetch_to_write(to + k * LANES + p.to_ahead)
    if last:
        sstore_part(to + k * LANES, entry, p.last)
    else:
        sstore(to + k * LANES, entry)


cdef inline mask wrong_classes(bint last, const NarrowRows *p, ivec y, Py_ssize_t k) noexcept nogil:
    """Lanes of vector k that hold a class which is not the target."""
    cdef ivec cls = iadd(iota(), iset(<lane_int> (k * LANES)))
    return differ_of(first_bits(p.last if last else LANES), cls, y)


cdef inline void margin_step(bint last, bint grad, const NarrowRows *p, const stored *src, stored *to, Py_ssize_t k, ivec y,
                             const State *edge, vec share, vec *loss, int *active_classes) noexcept nogil:
    """`hinge_step`, with classes counted by bits."""
    cdef vec d = add(narrow_score(last, p, src, k), edge.target)
    cdef mask active = above_of(wrong_classes(last, p, y, k), d, edge.m)
    loss[0] = add_where(active, loss[0], d)
    active_classes[0] += count_bits(bits_of(active))
    if grad:
        put_narrow(last, p, to, k, choose(active, choose(vlt(edge.m, d), share, d), vset(0)))


cdef struct NarrowRow:
    # What is found of a row: over lanes, but for classes that are active, and whether there is NaN.
    vec first
    vec second
    vec low
    int active
    bint bad


cdef inline NarrowRow margins_of(int vectors, bint grad, const NarrowRows *p, const stored *src, stored *to, ivec y, const State *edge,
                                 vec share) noexcept nogil:
    cdef NarrowRow r
    cdef vec second = vset(0)  # one of two sums, in turn
    cdef Py_ssize_t k
    r.first, r.active = vset(0), 0
    for k in range(vectors - 1):
        margin_step(False, grad, p, src, to, k, y, edge, share, &r.first, &r.active)
        r.first, second = second, r.first
    margin_step(True, grad, p, src, to, vectors - 1, y, edge, share, &r.first, &r.active)
    if vectors > 1:
        r.first = add(r.first, second)
    return r


cdef inline void square_step(bint last, bint grad, const NarrowRows *p, const stored *src, stored *to, Py_ssize_t k, ivec y,
                             const State *edge, vec share, HingeSums *sums) noexcept nogil:
    cdef mask skipped = mandnot(first_bits(LANES), wrong_classes(last, p, y, k))
    cdef vec entry = hinge_step(grad, 2, narrow_score(last, p, src, k), skipped, edge, share, sums)
    if grad:
        put_narrow(last, p, to, k, entry)


cdef inline NarrowRow squares_of(int vectors, bint grad, const NarrowRows *p, const stored *src, stored *to, ivec y, const State *edge,
                                 vec share) noexcept nogil:
    cdef NarrowRow r
    cdef HingeSums sums
    cdef Py_ssize_t k
    sums.loss = sums.low = sums.slack = sums.pull = vset(0)
    for k in range(vectors - 1):
        square_step(False, grad, p, src, to, k, y, edge, share, &sums)
    square_step(True, grad, p, src, to, vectors - 1, y, edge, share, &sums)
    r.first, r.second, r.low = sums.loss, sums.pull, add(sums.low, sums.slack)
    return r


cdef inline void distance_step(bint last, const NarrowRows *p, const stored *src, Py_ssize_t k, ivec y, vec target, vec *top,
                               mask *bad) noexcept nogil:
    """The largest s_j − s_y of a wrong class so far, and lanes with NaN."""
    cdef vec d = sub(narrow_score(last, p, src, k), target)
    cdef mask wrong = wrong_classes(last, p, y, k)
    bad[0] = mor(bad[0], unordered_of(wrong, d, d))
    top[0] = max_of(wrong, top[0], d)


cdef inline NarrowRow top_of(int vectors, const NarrowRows *p, const stored *src, ivec y, vec target) noexcept nogil:
    cdef NarrowRow r
    cdef mask bad = first_bits(0)
    cdef Py_ssize_t k
    r.first = vset(<real> -INFINITY)
    for k in range(vectors - 1):
        distance_step(False, p, src, k, y, target, &r.first, &bad)
    distance_step(True, p, src, vectors - 1, y, target, &r.first, &bad)
    r.bad = not none_of(bad)
    return r


cdef inline void walk_over(int kind, int power, int vectors, bint grad, const Options *o, const NarrowRows *p, Narrow *w, int start, int n,
                           vec *first, vec *second, vec *low) noexcept nogil:
    """n rows from `start` on, into vectors and numbers that the next steps read."""
    cdef const stored *src = p.src + start * p.step
    cdef stored *to = p.to + start * p.to_step if grad else NULL
    cdef real unit = power * o.per_class
    cdef vec share
    cdef ivec y
    cdef State edge
    cdef NarrowRow r
    cdef int i
    r.first = r.second = r.low = vset(0)
    for i in range(n, LANES):
        first[i] = second[i] = low[i] = r.first
    for i in range(n):
        if p.all_live or w.mult[start + i] != 0:
            y, share = iset(w.y[start + i]), vset(w.mult[start + i] * p.scale * unit)
            edge.m, edge.target = vset(w.m[start + i]), vset(w.target[start + i])
            if kind == HINGE_MAX:
                r = top_of(vectors, p, src, y, edge.target)
            elif power == 1:
                r = margins_of(vectors, grad, p, src, to, y, &edge, share)
            else:
                r = squares_of(vectors, grad, p, src, to, y, &edge, share)
        else:
            r.first = r.second = r.low = vset(0)
            r.active = r.bad = 0
            if grad:
                memset(to, 0, p.c * sizeof(stored))
        first[i] = r.first
        if kind == HINGE_MAX:
            w.b[start + i] = r.bad
        elif power == 1:
            w.active[start + i] = r.active
        else:
            second[i], low[i] = r.second, r.low
        src += p.step
        if grad:
            to += p.to_step


cdef inline uint64_t tops_of(bint last, const Options *o, const NarrowRows *p, const stored *src, Py_ssize_t k, ivec y, vec target,
                             vec top, bint bad) noexcept nogil:
    """Wrong classes of vector k whose margin is `top`, or NaN if `bad`, as bits."""
    cdef vec s = sload_part(src + k * LANES, p.last, 0) if last else sload(src + k * LANES)
    cdef vec m = add(sub(s, target), vset(o.margin))
    cdef mask wrong = wrong_classes(last, p, y, k)
    return bits_of(unordered_of(wrong, m, m)) if bad else bits_of(equal_of(wrong, m, top))


cdef inline void put_top(int vectors, const Options *o, const NarrowRows *p, const Narrow *w, int i) noexcept nogil:
    """The gradient of a row: the slope at its largest margin."""
    cdef const stored *src = p.src + i * p.step
    cdef stored *to = p.to + i * p.to_step
    cdef real slope = w.a[i]
    cdef vec target = vset(w.target[i]), top = vset(w.b[i]), zero = vset(0)
    cdef ivec y = iset(w.y[i])
    cdef bint bad = w.b[i] != w.b[i]
    cdef uint64_t found = 0
    cdef Py_ssize_t k, start = 0, next = 0
    while found == 0 and next < vectors:
        start, next = next, next + SET_BITS // LANES
        for k in range(start, min(next, <Py_ssize_t> vectors - 1)):
            found |= tops_of(False, o, p, src, k, y, target, top, bad) << ((k - start) * LANES)
        if vectors <= next:
            found |= tops_of(True, o, p, src, vectors - 1, y, target, top, bad) << ((vectors - 1 - start) * LANES)
    for k in range(vectors - 1):
        put_narrow(False, p, to, k, zero)
    put_narrow(True, p, to, vectors - 1, zero)
    if found:
        sstore_one(to + start * LANES + first_bit(found), slope)
        sstore_one(to + w.y[i], 0 - slope)


cdef inline bint add_totals(bint counts, Narrow *w, int i, const vec *first, const vec *low) noexcept nogil:
    """Σ multiplier · Σ_j of LANES rows from i on, if that is finite: what is summed need not be folded for each."""
    cdef vec even = vset(0), odd = even
    cdef real found[16]
    cdef real ones[16]
    cdef int r
    for r in range(TILE):
        found[r], ones[r] = 0, 1
    for r in range(LANES // 2):
        even = add(even, mul(vset(w.mult[i + 2 * r]), first[2 * r]))
        odd = add(odd, mul(vset(w.mult[i + 2 * r + 1]), first[2 * r + 1]))
    if counts:
        odd = sub(odd, mul(mul(numbers_of(iload(w.active + i)), vload(w.m + i)), vload(w.mult + i)))
    else:
        for r in range(LANES):
            odd = add(odd, mul(vset(w.mult[i + r]), low[r]))
    even = add(even, odd)
    if not all_lanes(veq(sub(even, even), vset(0))):
        return False
    vstore(found, even)
    add_products(w.totals, found, ones)
    return True


cdef inline void narrow_batch(int kind, int power, int vectors, bint grad, const Options *options, const NarrowRows *rows, Narrow *w,
                              real *losses) noexcept nogil:
    """Losses and gradients of the rows; both 0 where the multiplier is 0."""
    cdef vec first[16]
    cdef vec second[16]
    cdef vec low[16]
    cdef vec factor
    cdef State s
    cdef Options own = options[0]
    cdef const Options *o = &own
    cdef NarrowRows own_rows = rows[0]
    cdef const NarrowRows *p = &own_rows
    cdef int i, g, n = p.n
    cdef bint counts = kind == HINGE and power == 1
    own.kind, own.power = kind, power
    fix_form(&own, ROWED, PLAIN)
    aim_narrow(o, p, w)
    for g in range((n + LANES - 1) // LANES):
        i = g * LANES
        walk_over(kind, power, vectors, grad, o, p, w, i, min(LANES, n - i), first, second, low)
        w.summed[g] = kind == HINGE and p.summed and add_totals(counts, w, i, first, low)
        if kind == HINGE and not counts and w.summed[g]:
            s.b = transposed_sum(second)
        elif counts and not w.summed[g]:
            s.a = near_exact_transposed_sum(first, &s.low)
        elif not counts:
            fold(o, first, second, low, &s)
        if not w.summed[g]:
            vstore(w.a + i, s.a)
        if kind == HINGE and not w.summed[g]:
            vstore(w.low + i, s.low)
        if kind == HINGE and not counts:
            vstore(w.b + i, s.b)
    for g in range((n + LANES - 1) // LANES):
        i = g * LANES
        factor = mul(vload(w.mult + i), vset(p.scale))
        s.b = numbers_of(iload(w.active + i)) if counts else vload(w.b + i)
        if w.summed[g]:
            s.b = pull_at_target(o, s.b, factor)
            vstore(losses + i, vset(0))
        else:
            s.m, s.target, s.a, s.low = vload(w.m + i), vload(w.target + i), vload(w.a + i), vload(w.low + i)
            vstore(losses + i, settle(ROWED, grad, o, &s, factor))
            vstore(w.a + i, s.a)
        vstore(w.b + i, s.b)
    for i in range(n):
        if not p.all_live and w.mult[i] == 0:
            losses[i] = 0
        elif grad and kind == HINGE_MAX:
            put_top(vectors, o, p, w, i)
        elif grad:
            sstore_one(p.to + i * p.to_step + w.y[i], w.b[i])
            one_by_one()


cdef inline void narrow_case(int kind, int power, bint grad, const Options *o, const NarrowRows *p, Narrow *w, real *losses) noexcept nogil:
    """Of the fewest vectors, their number is a constant."""
    if grad and p.vectors == 1 and (kind == HINGE_MAX or power == 1):
        narrow_batch(kind, power, 1, True, o, p, w, losses)
    elif grad and p.vectors == 2:
        narrow_batch(kind, power, 2, True, o, p, w, losses)
    elif grad and p.vectors == 3:
        narrow_batch(kind, power, 3, True, o, p, w, losses)
    elif grad:
        narrow_batch(kind, power, p.vectors, True, o, p, w, losses)
    else:
        narrow_batch(kind, power, p.vectors, False, o, p, w, losses)


# Functions of their own: the arrays of one that holds them all would lie apart on the stack.
cdef void narrow_margins(bint grad, const Options *o, const NarrowRows *p, Narrow *w, real *losses) noexcept nogil:
    narrow_case(HINGE, 1, grad, o, p, w, losses)


cdef void narrow_squares(bint grad, const Options *o, const NarrowRows *p, Narrow *w, real *losses) noexcept nogil:
    narrow_case(HINGE, 2, grad, o, p, w, losses)


cdef void narrow_tops(bint grad, const Options *o, const NarrowRows *p, Narrow *w, real *losses) noexcept nogil:
    narrow_case(HINGE_MAX, o.power, grad, o, p, w, losses)


cdef double scores_narrow(const ScoresPass *s, Py_ssize_t start, Py_ssize_t stop, real *scratch) noexcept nogil:
    """Σ multiplier · ℓ of rows [start, stop)."""
    cdef NarrowRows p
    cdef Narrow w
    cdef Py_ssize_t c = s.scores.columns, batch = narrow_rows(c), row, t
    cdef real losses[128]
    cdef double sums[16]
    cdef stored *dst
    cdef bint grad = s.grad.raw != NULL, held = is_held(s)
    cdef int i, live
    memset(sums, 0, sizeof(sums))
    memset(w.totals, 0, sizeof(w.totals))
    p.summed = s.row_loss == NULL
    p.c, p.vectors, p.last, p.scale = c, <int> ((c + LANES - 1) // LANES), (c - 1) % LANES + 1, s.scale
    p.step, p.to_step = s.scores.row_stride, c if held else s.grad.row_stride
    p.ahead, p.to_ahead = batch * p.step, batch * p.to_step
    p.far = grad and not s.streams and s.grad.raw != s.scores.raw and s.scores.rows * c * <Py_ssize_t> sizeof(stored) > FAR_BYTES
    for t in range((stop - start + batch - 1) // batch):
        row = start + t * batch
        p.n = <int> min(batch, stop - row)
        p.src, dst = s.scores.raw + row * p.step, s.grad.raw + row * s.grad.row_stride if grad else NULL
        p.to = <stored *> scratch if held else dst
        live = tile_multipliers(s.multiplier, row, p.n, (p.n + TILE - 1) // TILE * TILE, w.mult)
        p.all_live = live == p.n
        keep_tops(s, row, p.n, w.mult)
        convert(&s.targets, row, p.n, w.y)
        if not p.all_live:
            for i in range(p.n):
                w.y[i] = 0 if w.mult[i] == 0 else w.y[i]  # an ignored target may be no class
        if s.options.kind == HINGE_MAX:
            narrow_tops(grad, &s.options, &p, &w, losses)
        elif s.options.power == 1:
            narrow_margins(grad, &s.options, &p, &w, losses)
        else:
            narrow_squares(grad, &s.options, &p, &w, losses)
        if s.streams:
            stream_bytes(<char *> dst, <char *> p.to, p.n * c * <Py_ssize_t> sizeof(stored))
        elif held:
            memcpy(dst, p.to, p.n * c * sizeof(stored))
        keep_losses(s, row, p.n, (p.n + TILE - 1) // TILE * TILE, w.mult, losses, sums)
    return fold_doubles(sums) + fold_doubles(w.totals) / (1 if s.options.per_class == 1 else c)
