# Rows of few classes that lie end to end: plain softmax in a third layout.
#
# LANES rows are as many vectors as they have classes, all full, without a transpose. Exponentials are kept as they come, with 0
# in place of the target's; rows are then read one by one, for their sums, which are folded together; and the factor of each
# row's gradient is looked up for the lanes that hold the row. As long as all scores are of a usual size, exponentials are of the
# scores themselves, and no row's maximum is looked for. Else they start from a whole power of 2 near that of the row's maximum:
# so they have the same bits, and what comes of a row does not depend on those beside it.
#
# ℓ = log(1 + Σ_{j≠y} exp s_j / exp s_y), in full where the target dominates; gradient as in losses.pxi.

cdef enum:
    PACKED_LEAST = 4  # classes, from which on this is faster than transposes
    PACKED_BYTES = 8192  # of scores that are handled together, and at most
    PACKED_ROWS = 256  # rows; but no less than a tile
    PATIENCE = 7  # times that scores are not tried again, once they were not usual
    USUAL_SIZE = 40  # of scores: exponentials of MANY_CLASSES of them, and what they are divided by, stay normal numbers


cdef inline Py_ssize_t packed_rows(Py_ssize_t c) noexcept nogil:
    """Rows that are handled together."""
    return max(<Py_ssize_t> TILE, min(<Py_ssize_t> PACKED_ROWS, PACKED_BYTES // (c * <Py_ssize_t> sizeof(real))) // TILE * TILE)


cdef bint is_packed(const ScoresPass *s) noexcept nogil:
    cdef Py_ssize_t c = s.scores.columns
    return (TABLE >= LANES and s.options.kind == SOFTMAX and not s.options.general and s.top == NULL
            and PACKED_LEAST <= c < MANY_CLASSES and s.scores.column_stride == 1 and s.scores.row_stride == c
            and (s.grad.raw == NULL or (s.grad.column_stride == 1 and s.grad.row_stride == c)))


cdef inline Py_ssize_t packed_size(Py_ssize_t c) noexcept nogil:
    """Numbers of scratch, in whole vectors."""
    return c * (LANES + packed_rows(c))


cdef struct Packed:
    # Some rows that are handled together.
    const stored *src
    stored *dst  # their gradient, or NULL
    Py_ssize_t c, vectors
    int n, groups  # rows, and groups of LANES
    const ivec *rows  # of c vectors: the row of its group that each lane holds
    real *kept  # exponentials
    # Of each row: what is taken from its scores, and the power of 2 that exponentials start from, where scores are not usual;
    real shift[256]
    real start[256]
    # the exponential of the target's score, and what the gradient needs.
    real target[256 + 16]
    real a[256]
    real b[256]


cdef void number_rows(Py_ssize_t c, ivec *rows) noexcept nogil:
    """The row that each lane holds, of c vectors."""
    cdef Py_ssize_t k
    for k in range(c):
        rows[k] = quotients(iadd(iota(), iset(<lane_int> (k * LANES))), <lane_int> c)


cdef inline void ask_ahead(const Packed *p, const stored *at, bint far) noexcept nogil:
    """Ask for the scores that come next, and the lines of their gradient if it is large, while what is `at` is computed with."""
    prefetch(at + p.n * p.c)
    if far:
        prefetch_to_write(p.dst + (at - p.src) + p.n * p.c)


cdef inline bint keep_usual(const Packed *p, bint far) noexcept nogil:
    """Exponentials of scores; False, once some have been written, if they are not of a usual size."""
    cdef ivec size = iset(0), most = size_bits(vset(USUAL_SIZE))
    cdef Py_ssize_t start, k, ahead = p.n * p.c, vectors = p.vectors
    cdef const stored *src = p.src
    cdef real *kept = p.kept
    cdef vec x, zero = vset(0)
    for start in range(0, vectors, 16):
        for k in range(start, min(start + 16, ahead // LANES)):
            x = sload(src + k * LANES)
            ask_ahead(p, src + k * LANES, far)
            size = imax(size, size_bits(x))
            vstore(kept + k * LANES, usual_exp(x, zero))
        if start + 16 >= vectors and ahead % LANES:
            x = sload_part(src + (vectors - 1) * LANES, ahead % LANES, 0)
            size = imax(size, size_bits(x))
            vstore(kept + (vectors - 1) * LANES, usual_exp(x, zero))
        if not all_lanes(ige(most, size)):
            return False
    return True


cdef inline vec row_maxima(const stored *p, Py_ssize_t c, int n) noexcept nogil:
    """Of n <= LANES rows of scores."""
    cdef Py_ssize_t i, k, whole = c // LANES, some = c % LANES
    cdef vec rows[16]
    for i in range(n, LANES):
        rows[i] = vset(0)
    for i in range(n):
        rows[i] = sload_part(p + i * c + whole * LANES, some, <real> -INFINITY) if some else vset(<real> -INFINITY)
    if whole:
        for i in range(n):
            for k in range(whole):
                rows[i] = vmax(rows[i], sload(p + i * c + k * LANES))
    return transposed_max(rows)


cdef void keep_any(Packed *p, bint far) noexcept nogil:
    """Exponentials of any scores, from whole powers of 2."""
    cdef vec top, steps, start, shift, x
    cdef mask near
    cdef bint all_near = True
    cdef Py_ssize_t k, c = p.c, left
    cdef const stored *src = p.src
    cdef real *kept = p.kept
    cdef const ivec *rows = p.rows
    cdef int g, i
    for g in range(p.groups):
        i = g * LANES
        top = row_maxima(src + i * c, c, LANES) if p.n - i >= LANES else row_maxima(src + i * c, c, p.n - i)
        near = is_near(top)
        all_near = all_near and all_lanes(near)
        steps = sub(add(mul(top, vset(<real> (1 / FL_LN2))), vset(FL_ROUND)), vset(FL_ROUND))
        vstore(p.shift + i, choose(near, vset(0), top))
        vstore(p.start + i, sub(choose(near, steps, vset(0)), vset(RAISED_BITS)))
    for g in range(p.groups):
        start, shift, left = vload(p.start + g * LANES), vload(p.shift + g * LANES), p.n * c - g * LANES * c
        if all_near:
            for k in range(min(c, left // LANES)):
                x = sload(src + k * LANES)
                ask_ahead(p, src + k * LANES, far)
                vstore(kept + k * LANES, raised_exp(x, look_up(start, rows[k])))
        else:
            for k in range(min(c, left // LANES)):
                x = sub(sload(src + k * LANES), look_up(shift, rows[k]))
                ask_ahead(p, src + k * LANES, far)
                vstore(kept + k * LANES, raised_exp(x, look_up(start, rows[k])))
        if left < c * LANES and left % LANES:
            k = left // LANES
            x = sub(sload_part(src + k * LANES, left % LANES, 0), look_up(shift, rows[k]))
            vstore(kept + k * LANES, raised_exp(x, look_up(start, rows[k])))
        src, kept = src + c * LANES, kept + c * LANES


cdef inline vec row_sum(const real *p, Py_ssize_t whole, Py_ssize_t some) noexcept nogil:
    """Of `whole` vectors of a row, at least two, and `some` numbers, over lanes. Four sums in turn, as in block_exps."""
    cdef vec first = vload(p), second = vload(p + LANES), third = vset(0), fourth = third
    cdef Py_ssize_t k
    for k in range(2, whole):
        third, fourth, first, second = fourth, first, second, add(third, vload(p + k * LANES))
    third = add(third, vload_part(p + whole * LANES, some, 0))
    return add(add(first, second), add(third, fourth))


cdef inline vec row_sums(const real *p, Py_ssize_t c, int n) noexcept nogil:
    """Of n <= LANES rows."""
    cdef Py_ssize_t i, whole = c // LANES, some = c % LANES
    cdef vec rows[16]
    for i in range(n, LANES):
        rows[i] = vset(0)
    if whole == 0:
        for i in range(n):
            rows[i] = vload_part(p + i * c, some, 0)
    elif whole == 1:
        for i in range(n):
            rows[i] = add(vload(p + i * c), vload_part(p + i * c + LANES, some, 0))
    else:
        for i in range(n):
            rows[i] = row_sum(p + i * c, whole, some)
    return transposed_sum(rows)


cdef vec distant_loss(const Packed *p, int first, const lane_int *y, vec others, vec at) noexcept nogil:
    """Losses of LANES rows from `first` on, where the target is so far below others that its exponential is 0 beside theirs."""
    cdef real scores[16]
    cdef vec rest
    cdef int i
    for i in range(LANES):
        scores[i] = sone(p.src + (first + i) * p.c + y[first + i]) if first + i < p.n else 0
    rest = add(sub(vload(p.shift + first), vload(scores)), mul(vload(p.start + first), vset(<real> FL_LN2)))
    return add(vlog(others, vset(0), rest, &rest), sub(at, at))  # NaN where that is one


cdef inline void settle_packed(Packed *p, bint usual, const lane_int *y, const real *mult, real scale, real *losses) noexcept nogil:
    """Losses, from the sums in p.a; and what the gradient needs."""
    cdef vec zero = vset(0), others, at, ratio, r, lost, total, loss, factor
    cdef mask dead, fits
    cdef int g, i
    for g in range(p.groups):
        i = g * LANES
        others, at, factor = vload(p.a + i), vload(p.target + i), vload(mult + i)
        ratio, r = div(others, at), div(vset(1), add(others, at))
        total = exact_sum(ratio, vset(1), &lost)
        # What total lacks, as rounded, and what the ratio does, relative to it.
        lost = mul(sub(mul(lost, at), product_less(ratio, at, others)), r)
        loss = log_in_full(total, lost)
        if not usual:
            fits = vle(ratio, vset(<real> (REAL_MAX / 8)))
            if not all_lanes(fits):
                loss = choose(fits, loss, distant_loss(p, i, y, others, at))
        dead = veq(factor, zero)
        vstore(losses + i, choose(dead, zero, loss))
        r = mul(r, mul(factor, vset(scale)))
        vstore(p.a + i, choose(dead, zero, r))
        vstore(p.b + i, choose(dead, zero, mul(others, sub(zero, r))))


cdef inline void put_packed(const Packed *p, stored *to, const lane_int *y, const real *mult, bint all_live) noexcept nogil:
    """The gradient. `to` may be where exponentials are kept: none is written over before it is read."""
    cdef Py_ssize_t k, c = p.c, left = p.n * c
    cdef const ivec *rows = p.rows
    cdef const real *kept = p.kept
    cdef vec r
    cdef int g, i
    for g in range(p.groups):
        r = vload(p.a + g * LANES)
        for k in range(min(c, left // LANES)):
            sstore(to + k * LANES, mul(vload(kept + k * LANES), look_up(r, rows[k])))
        if left < c * LANES and left % LANES:
            k = left // LANES
            sstore_part(to + k * LANES, mul(vload(kept + k * LANES), look_up(r, rows[k])), left % LANES)
        kept, left = kept + c * LANES, left - c * LANES
        for i in range(min(LANES, p.n - g * LANES)):
            one_by_one()
            sstore_one(to + i * c + y[g * LANES + i], p.b[g * LANES + i])
        to += c * LANES
    if not all_live:
        to -= p.groups * LANES * c
        for i in range(p.n):
            if mult[i] == 0:
                memset(to + i * c, 0, c * sizeof(stored))


cdef inline bint are_usual_factors(const real *mult, int n, real scale) noexcept nogil:
    """Whether no gradient would be lost as exponentials of usual scores are multiplied by these: 0 are those of rows without one."""
    cdef int i
    cdef real factor
    for i in range(n):
        factor = mult[i] * scale
        if mult[i] != 0 and -5e-13 < factor < 5e-13:
            return False
    return True


cdef double scores_packed(const ScoresPass *s, Py_ssize_t start, Py_ssize_t stop, real *scratch) noexcept nogil:
    """Σ multiplier · ℓ of rows [start, stop)."""
    cdef Packed own
    cdef Packed *p = &own
    cdef Py_ssize_t c = s.scores.columns, batch = packed_rows(c), row, t, k
    cdef lane_int y[256]
    cdef real mult[256]
    cdef real losses[256]
    cdef double sums[16]
    cdef int i, live, patience = 0
    cdef bint usual
    cdef bint far = (s.grad.raw != NULL and not s.streams and s.grad.raw != s.scores.raw
                     and s.scores.rows * c * <Py_ssize_t> sizeof(stored) > FAR_BYTES)
    memset(sums, 0, sizeof(sums))
    number_rows(c, <ivec *> scratch)
    own.c, own.rows, own.kept = c, <ivec *> scratch, scratch + c * LANES
    for t in range((stop - start + batch - 1) // batch):
        row = start + t * batch
        own.n = <int> min(batch, stop - row)
        own.src, own.dst = s.scores.raw + row * c, s.grad.raw + row * c if s.grad.raw != NULL else NULL
        own.groups, own.vectors = (own.n + LANES - 1) // LANES, (own.n * c + LANES - 1) // LANES
        live = tile_multipliers(s.multiplier, row, own.n, (own.n + TILE - 1) // TILE * TILE, mult)
        convert(&s.targets, row, own.n, y)
        if live < own.n:
            for i in range(own.n):
                y[i] = 0 if mult[i] == 0 else y[i]  # an ignored target may be no class
        usual = are_usual_factors(mult, 1 if s.multiplier == NULL else own.n, s.scale)
        if usual and patience == 0:
            usual = keep_usual(p, True) if far else keep_usual(p, False)
            patience = 0 if usual else PATIENCE
        else:
            usual, patience = False, max(0, patience - 1)
        if not usual:
            keep_any(p, far)
        for i in range(own.n):
            k = i * c + y[i]
            own.target[i], own.kept[k] = own.kept[k], 0
        for i in range(own.n // LANES):
            vstore(own.a + i * LANES, row_sums(own.kept + i * LANES * c, c, LANES))
        i = own.n // LANES * LANES
        if i < own.n:
            vstore(own.target + own.n, vset(1))
            vstore(own.a + i, row_sums(own.kept + i * c, c, own.n - i))
        if usual:
            settle_packed(p, True, y, mult, s.scale, losses)
        else:
            settle_packed(p, False, y, mult, s.scale, losses)
        if own.dst != NULL and s.streams:
            put_packed(p, <stored *> own.kept, y, mult, live == own.n)
            stream_bytes(<char *> own.dst, <char *> own.kept, own.n * c * <Py_ssize_t> sizeof(stored))
        elif own.dst != NULL:
            put_packed(p, own.dst, y, mult, live == own.n)
        for i in range(own.n, (own.n + TILE - 1) // TILE * TILE):
            losses[i] = 0
        if s.row_loss != NULL:
            for i in range(own.n):
                s.row_loss[(row + i) * s.row_loss_stride] = losses[i]
        for i in range((own.n + TILE - 1) // TILE):
            add_products(sums, losses + i * TILE, mult + i * TILE)
    return fold_doubles(sums)
