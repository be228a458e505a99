# Rows of few classes of the hinge that lie end to end, where of losses but their sum is asked for: a sixth layout, for vectors in which
# a table can be looked up.
#
# Scores are taken as they come, as in packed.pxi: full vectors, no transposes, and what belongs to a row is looked up for the lanes
# that hold it. What is summed over all rows need not be folded for any, and active classes are counted by bits of masks: so what a
# row has in several vectors, or beside others in one, is never brought together. Its gradient, but for the target's entry, is
# written at once.
#
# A class is active where s_j > s_y − Δ, and that is where s_j is above s_y − Δ rounded down (Thin.edge). Then its margin is
# s_j − edge less what edge lacks, which is taken off once classes are counted. NaN, and sums that are not finite, show in the total:
# then the rows are computed transposed.

cdef enum:
    THIN_LEAST = 5  # classes
    THIN_ROWS = 128  # that are handled together, at most,
    THIN_BYTES = 12288  # and what they take


cdef inline bint is_thin_for(Py_ssize_t c) noexcept nogil:
    """Whether this is faster, for c classes, than what short.pxi and narrow.pxi have; and `bit_counts` can count them."""
    if VBYTES == 64:
        return THIN_LEAST <= c <= 2 * LANES or (2 * LANES < c < 4 * LANES and c % LANES != 0)
    return THIN_LEAST <= c < min(64, 12 * LANES)


cdef bint is_thin(const ScoresPass *s) noexcept nogil:
    cdef Py_ssize_t c = s.scores.columns
    return (TABLE >= LANES and s.options.kind == HINGE and s.options.power == 1 and not s.options.general
            and s.row_loss == NULL and is_thin_for(c) and s.scores.column_stride == 1 and s.scores.row_stride == c
            and (s.grad.raw == NULL or (s.grad.column_stride == 1 and s.grad.row_stride == c)))


cdef inline Py_ssize_t thin_rows(Py_ssize_t c) noexcept nogil:
    """Rows that are handled together."""
    return min(<Py_ssize_t> THIN_ROWS, THIN_BYTES // (c * <Py_ssize_t> sizeof(real))) // TILE * TILE


cdef inline Py_ssize_t thin_size(const ScoresPass *s) noexcept nogil:
    """Bytes of scratch: rows of lanes; gradients that are held; and the tiles of rows that are computed transposed."""
    cdef Py_ssize_t c = s.scores.columns
    return c * (VBYTES + thin_rows(c) * <Py_ssize_t> sizeof(stored)) + laned_size(s)


cdef struct ThinRows:
    # Some rows that are handled together.
    const stored *src
    stored *to  # where gradients are put
    const ivec *rows  # of c vectors: the row of its group that each lane holds
    Py_ssize_t c
    int n
    bint far  # whether the lines of the gradients that come next are asked for
    real scale


cdef struct Thin:
    # What is known of each row,
    lane_int y[128]
    real mult[128]
    real edge[128]
    real rest[128]  # what edge lacks
    real at_target[128]  # the gradient's entry
    # and of lanes:
    real total[128]  # Σ multiplier · ℓ
    char active[384 + 128]  # a bit for each score; `bit_counts` reads as much as a vector


cdef inline void aim_thin(const Options *o, const ThinRows *p, Thin *w) noexcept nogil:
    cdef vec s, rest, down
    cdef int i, g
    for i in range(p.n):
        w.edge[i] = sone(p.src + i * p.c + w.y[i])
        one_by_one()
    for i in range(p.n, (p.n + LANES - 1) // LANES * LANES):
        w.edge[i] = w.y[i] = 0
    for g in range((p.n + LANES - 1) // LANES):
        i = g * LANES
        s = exact_sum(vload(w.edge + i), vset(-o.margin), &rest)
        rest = number_or_zero(rest)
        # Less 5/8 to 5/4 of a unit in the last place: rounded, the number before.
        down = choose(vlt(rest, vset(0)), sub(s, mul(vabs(s), vset(<real> (0.625 * REAL_EPS)))), s)
        vstore(w.edge + i, down)
        vstore(w.rest + i, add(sub(s, down), rest))


cdef inline void thin_step(bint last, bint grad, bint even, const ThinRows *p, Py_ssize_t g, Py_ssize_t k, Py_ssize_t some, vec edge,
                           ivec target, vec share, vec mult, ivec cls, vec *total, Thin *w) noexcept nogil:
    """Vector k of group g."""
    cdef Py_ssize_t at = (g * p.c + k) * LANES
    cdef ivec row = p.rows[k]
    cdef vec d = sub(sload_part(p.src + at, some, 0) if last else sload(p.src + at), look_up(edge, row))
    cdef mask active = above_of(differ_of(first_bits(some if last else LANES), cls, ilook_up(target, row)), d, vset(0))
    cdef uint64_t bits = bits_of(active)
    cdef vec entry
    ask_ahead(p.src + at, p.to + at, p.n * p.c, grad and p.far)
    if LANES >= 8 or at % 8 == 0:
        memcpy(w.active + at // 8, &bits, (LANES + 7) // 8)
    else:
        w.active[at // 8] |= <char> (bits << 4)
    total[0] = add_where(active, total[0], d if even else mul(d, look_up(mult, row)))
    if grad:
        entry = choose(active, share if even else look_up(share, row), vset(0))
        if last:
            sstore_part(p.to + at, entry, some)
        else:
            sstore(p.to + at, entry)


cdef inline void walk_thin(bint grad, bint even, const Options *o, const ThinRows *p, Thin *w) noexcept nogil:
    cdef vec edge, share, mult, total, odd
    cdef ivec target, cls, first = imul(iota(), iset(<lane_int> p.c))
    cdef real unit = o.per_class
    cdef Py_ssize_t g, k, left = p.n * p.c
    for g in range((p.n + LANES - 1) // LANES):
        edge, mult = vload(w.edge + g * LANES), vload(w.mult + g * LANES)
        target, share = iadd(iload(w.y + g * LANES), first), mul(mul(mult, vset(p.scale)), vset(unit))
        if even:
            share = vset(first_lane(share))
        total = odd = vset(0)
        cls = iota()
        for k in range(min(p.c, left // LANES)):
            thin_step(False, grad, even, p, g, k, 0, edge, target, share, mult, cls, &total, w)
            total, odd = odd, total
            cls = iadd(cls, iset(LANES))
        if left < p.c * LANES and left % LANES:
            thin_step(True, grad, even, p, g, left // LANES, left % LANES, edge, target, share, mult, cls, &total, w)
        vstore(w.total + g * LANES, add(total, odd))
        left -= p.c * LANES


cdef inline bint thin_batch(bint grad, bint even, const Options *o, const ThinRows *rows, Thin *w, double *sums) noexcept nogil:
    """Gradients of the rows, and their losses to the sums; False, once gradients have been written, if the sum is not finite."""
    cdef ThinRows own = rows[0]
    cdef const ThinRows *p = &own
    cdef real ones[16]
    cdef vec found, mult, factor
    cdef mask finite = first_bits(LANES)
    cdef Py_ssize_t at
    cdef int g, i, groups = (p.n + LANES - 1) // LANES
    aim_thin(o, p, w)
    walk_thin(grad, even, o, p, w)
    for g in range(groups):
        at = g * LANES * p.c
        found, mult = numbers_of(bit_counts(w.active + at // 8, 0 if LANES >= 8 else <int> (at % 8), <int> p.c)), vload(w.mult + g * LANES)
        factor = mul(mult, vset(p.scale))
        if grad:
            vstore(w.at_target + g * LANES, pull_at_target(o, found, factor))
        found = sub(vload(w.total + g * LANES), mul(mul(found, vload(w.rest + g * LANES)), mult))
        finite = equal_of(finite, sub(found, found), vset(0))
        vstore(w.total + g * LANES, found)
    if not all_lanes(finite):
        return False
    for i in range(groups * LANES, (groups * LANES + TILE - 1) // TILE * TILE):
        w.total[i] = 0
    for i in range(TILE):
        ones[i] = 1
    for i in range((groups * LANES + TILE - 1) // TILE):
        add_products(sums, w.total + i * TILE, ones)
    for i in range(p.n if grad else 0):
        sstore_one(p.to + i * p.c + w.y[i], w.at_target[i])
        one_by_one()
    return True


cdef double scores_thin(const ScoresPass *s, Py_ssize_t start, Py_ssize_t stop, real *scratch) noexcept nogil:
    """Σ multiplier · ℓ of rows [start, stop)."""
    cdef ThinRows p
    cdef Thin w
    cdef Py_ssize_t c = s.scores.columns, batch = thin_rows(c), row, t
    cdef stored *held = <stored *> (scratch + c * LANES)
    cdef real *tiles = <real *> (held + c * batch)
    cdef stored *dst = NULL
    cdef double sums[16]
    cdef double others = 0
    cdef bint grad = s.grad.raw != NULL, holds = grad and (s.streams or s.grad.raw == s.scores.raw), done
    cdef int i, live
    memset(sums, 0, sizeof(sums))
    number_rows(c, <ivec *> scratch)
    p.rows, p.c, p.scale = <ivec *> scratch, c, s.scale
    p.far = not holds and s.scores.rows * c * <Py_ssize_t> sizeof(stored) > FAR_BYTES
    for t in range((stop - start + batch - 1) // batch):
        row = start + t * batch
        p.n = <int> min(batch, stop - row)
        p.src = s.scores.raw + row * c
        if grad:
            dst = s.grad.raw + row * c
        p.to = held if holds else dst
        live = tile_multipliers(s.multiplier, row, p.n, (p.n + TILE - 1) // TILE * TILE, w.mult)
        keep_tops(s, row, p.n, w.mult)
        convert(&s.targets, row, p.n, w.y)
        if live < p.n:
            for i in range(p.n):
                w.y[i] = 0 if w.mult[i] == 0 else w.y[i]  # an ignored target may be no class
        if s.multiplier != NULL:
            done = thin_batch(True, False, &s.options, &p, &w, sums) if grad else thin_batch(False, False, &s.options, &p, &w, sums)
        else:
            done = thin_batch(True, True, &s.options, &p, &w, sums) if grad else thin_batch(False, True, &s.options, &p, &w, sums)
        if not done:
            others += scores_laned(s, row, row + p.n, tiles)
        elif s.streams:
            stream_bytes(<char *> dst, <char *> held, p.n * c * <Py_ssize_t> sizeof(stored))
        elif holds:
            memcpy(dst, held, p.n * c * sizeof(stored))
    return others + fold_doubles(sums) / (1 if s.options.per_class == 1 else c)
