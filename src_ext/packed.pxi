# Rows of few classes that lie end to end: softmax in a third layout, plain or with a temperature, label smoothing and z-loss; and
# probabilities and log-sum-exps.
#
# LANES rows are as many vectors as they have classes, all full, without a transpose. Exponentials are kept as they come, with 0
# in place of the target's; rows are then read one by one, for their sums, which are folded together; and the factor of each
# row's gradient is looked up for the lanes that hold the row. As long as all scores are of a usual size, exponentials are of the
# scores themselves, and no row's maximum is looked for. Else they start from a whole power of 2 near that of the row's maximum:
# so they have the same bits, and what comes of a row does not depend on those beside it.
#
# ℓ = log(1 + Σ_{j≠y} exp s_j / exp s_y), in full where the target dominates; gradient as in losses.pxi. With options, as
# general.pxi has them: d = s / T, L = log(1 + Σ_{j≠y} exp d_j / exp d_y), z = log Σ exp d_j and ℓ = U L + Σ u_j (d_y − d_j) + λ z²,
# where only smoothing of more than half would have terms cancel. So this layout knows its loss, as the other two do not: without
# a maximum there is another formula, and between its steps rows are met in two ways.

cdef enum:
    PACKED_LEAST = 4  # classes, from which on this is faster than transposes
    PACKED_SPREAD = 8  # the same with label smoothing, and for probabilities
    PACKED_WEIGHED = 10  # and with class weights within smoothing
    PACKED_BYTES = 8192  # of scores that are handled together, and at most
    PACKED_ROWS = 256  # rows; but no less than a tile
    PATIENCE = 7  # times that scores are not tried again, once they were not usual
    USUAL_SIZE = 40  # of scores: exponentials of MANY_CLASSES of them, and what they are divided by, stay normal numbers


cdef inline Py_ssize_t packed_rows(Py_ssize_t c) noexcept nogil:
    """Rows that are handled together."""
    return max(<Py_ssize_t> TILE, min(<Py_ssize_t> PACKED_ROWS, PACKED_BYTES // (c * <Py_ssize_t> sizeof(real))) // TILE * TILE)


cdef inline bint is_packable(const ScoresPass *s) noexcept nogil:
    """Whether options are such as are made for this layout: the target's u is at least half of all."""
    cdef const Options *o = &s.options
    cdef Py_ssize_t c = s.scores.columns, k
    if o.entropy or o.shard or s.z != NULL or o.steps.unit == 0:
        return False
    if form_of(o) == WEIGHED and c >= PACKED_WEIGHED:
        for k in range(c):
            if not o.weighted_target * o.class_weight[k] >= o.all_weights:
                return False
        return True
    return form_of(o) == FLAT and o.at_target >= 0.5 and (o.elsewhere == 0 or c >= PACKED_SPREAD)


cdef bint is_packed(const ScoresPass *s) noexcept nogil:
    cdef Py_ssize_t c = s.scores.columns
    cdef int kind = s.options.kind
    return (TABLE >= LANES and (kind == SOFTMAX or kind == PROBABILITIES or kind == LOG_SUM)
            and (not s.options.general or is_packable(s))
            and (PACKED_SPREAD if kind == PROBABILITIES else PACKED_LEAST) <= c < MANY_CLASSES
            and s.scores.column_stride == 1 and s.scores.row_stride == c
            and (s.grad.raw == NULL or (s.grad.column_stride == 1 and s.grad.row_stride == c)))


cdef inline Py_ssize_t packed_size(const ScoresPass *s) noexcept nogil:
    """Numbers of scratch, in whole vectors."""
    cdef Py_ssize_t c = s.scores.columns
    return c * (LANES + packed_rows(c) + (LANES if s.options.class_weight != NULL else 0))


cdef struct Packed:
    # Some rows that are handled together.
    const stored *src
    stored *dst  # their gradient, or NULL,
    stored *to  # and where it is put at first
    Py_ssize_t c
    int n, groups  # rows, and groups of LANES
    const ivec *rows  # of c vectors: the row of its group that each lane holds
    real *kept  # exponentials
    const real *weights  # u of classes but the target, of c vectors, as their lanes are; NULL: the same for all
    # Of each row: what is taken from its scores, and the power of 2 that exponentials start from, where scores are not usual;
    real shift[256]
    real start[256]
    # the exponential of the target's score, and what the gradient needs.
    real target[256 + 16]
    real a[256]
    real b[256]
    real low[256]  # what sums lack, as rounded
    # With options, or scores that are not usual: the target's; and with smoothing its part of the loss, then what entries have less
    # than their share.
    real score[256]
    real less[256]
    real own[256]  # the target's of `weights`
    Steps steps
    real usual_size


cdef void number_rows(Py_ssize_t c, ivec *rows) noexcept nogil:
    """The row that each lane holds, of c vectors, to be looked up."""
    cdef Py_ssize_t k
    for k in range(c):
        rows[k] = entries(quotients(iadd(iota(), iset(<lane_int> (k * LANES))), <lane_int> c))


cdef inline void ask_ahead(const stored *src, stored *dst, Py_ssize_t ahead, bint far) noexcept nogil:
    """Ask for the scores that come next, and the lines of their gradient if it is large, while these are computed with."""
    prefetch(src + ahead)
    if far:
        prefetch_to_write(dst + ahead)


cdef inline bint keep_usual(bint in_full, const Packed *p, Steps steps, bint far) noexcept nogil:
    """Exponentials of scores; False, once some have been written, if they are not of a usual size."""
    cdef ivec size = iset(0), most = size_bits(vset(p.usual_size))
    cdef Py_ssize_t start, k, ahead = p.n * p.c, vectors = (ahead + LANES - 1) // LANES
    cdef const stored *src = p.src
    cdef stored *dst = p.dst
    cdef real *kept = p.kept
    cdef vec x, zero = vset(0)
    for start in range(0, vectors, 16):
        for k in range(start, min(start + 16, ahead // LANES)):
            x = sload(src + k * LANES)
            ask_ahead(src + k * LANES, dst + k * LANES, ahead, far)
            size = imax(size, size_bits(x))
            vstore(kept + k * LANES, usual_exp(in_full, steps, x, zero))
        if start + 16 >= vectors and ahead % LANES:
            x = sload_part(src + (vectors - 1) * LANES, ahead % LANES, 0)
            size = imax(size, size_bits(x))
            vstore(kept + (vectors - 1) * LANES, usual_exp(in_full, steps, x, zero))
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


cdef inline bint start_from(Steps by, vec top, vec *shift, vec *start) noexcept nogil:
    """What is taken from scores of rows whose maxima are `top`, and the power of 2 that their exponentials start from; whether
    nothing is taken from any."""
    cdef mask near = is_near(mul(top, vset(by.unit)))
    cdef vec steps = sub(add(mul(top, vset(by.per_step)), vset(<real> FL_ROUND)), vset(<real> FL_ROUND))
    shift[0], start[0] = choose(near, vset(0), top), sub(choose(near, steps, vset(0)), vset(RAISED_BITS))
    return all_lanes(near)


cdef inline void keep_any(bint in_full, Packed *p, bint far) noexcept nogil:
    """Exponentials of any scores, from whole powers of 2."""
    cdef Steps by = p.steps
    cdef vec top, start, shift, x
    cdef bint all_near = True
    cdef Py_ssize_t k, c = p.c, left, ahead = p.n * c
    cdef const stored *src = p.src
    cdef stored *dst = p.dst
    cdef real *kept = p.kept
    cdef const ivec *rows = p.rows
    cdef int g, i
    for g in range(p.groups):
        i = g * LANES
        top = row_maxima(src + i * c, c, LANES) if p.n - i >= LANES else row_maxima(src + i * c, c, p.n - i)
        all_near = start_from(by, top, &shift, &start) and all_near
        vstore(p.shift + i, shift)
        vstore(p.start + i, start)
    for g in range(p.groups):
        start, shift, left = vload(p.start + g * LANES), vload(p.shift + g * LANES), p.n * c - g * LANES * c
        for k in range(min(c, left // LANES)):
            x = sload(src + k * LANES)
            ask_ahead(src + k * LANES, dst + k * LANES, ahead, far)
            if not all_near:
                x = sub(x, look_up(shift, rows[k]))
            vstore(kept + k * LANES, any_exp(in_full, by, x, look_up(start, rows[k])))
        if left < c * LANES and left % LANES:
            k = left // LANES
            x = sub(sload_part(src + k * LANES, left % LANES, 0), look_up(shift, rows[k]))
            vstore(kept + k * LANES, any_exp(in_full, by, x, look_up(start, rows[k])))
        src, dst, kept = src + c * LANES, dst + c * LANES, kept + c * LANES


cdef void keep_any_in_full(Packed *p, bint far) noexcept nogil:
    keep_any(True, p, far)


cdef void keep_any_as_usual(Packed *p, bint far) noexcept nogil:
    keep_any(False, p, far)


cdef inline vec row_sum(const real *p, Py_ssize_t whole, Py_ssize_t some) noexcept nogil:
    """Of `whole` vectors of a row and `some` numbers, over lanes. Four sums in turn, as in block_exps; of few vectors with the bits of
    `sums_over_vectors`."""
    cdef vec first, second, third = vset(0), fourth = third, end = vload_part(p + whole * LANES, some, 0)
    cdef Py_ssize_t k
    if whole == 0:
        return end
    if whole == 1:
        return add(vload(p), end)
    first, second = vload(p), vload(p + LANES)
    for k in range(2, whole):
        third, fourth, first, second = fourth, first, second, add(third, vload(p + k * LANES))
    return add(add(first, second), add(add(third, end), fourth))


cdef inline vec folded_sums(bint in_full, int whole, const real *p, Py_ssize_t c, vec *rest) noexcept nogil:
    """`row_sums` of LANES rows of few vectors, whose number is a constant."""
    cdef vec rows[16]
    sums_over_vectors(whole, p, c, c % LANES, rows)
    return transposed_sum_in_full(rows, rest) if in_full else transposed_sum(rows)


cdef inline vec row_sums(bint in_full, const real *p, Py_ssize_t c, int n, vec *rest) noexcept nogil:
    """Of n <= LANES rows; in_full: and what the last steps' sums, as rounded, lack."""
    cdef Py_ssize_t i, whole = c // LANES, some = c % LANES
    cdef vec rows[16]
    if n == LANES and whole == 0:
        return folded_sums(in_full, 0, p, c, rest)
    if n == LANES and whole == 1:
        return folded_sums(in_full, 1, p, c, rest)
    if n == LANES and whole == 2:
        return folded_sums(in_full, 2, p, c, rest)
    if n == LANES and whole == 3:
        return folded_sums(in_full, 3, p, c, rest)
    for i in range(n, LANES):
        rows[i] = vset(0)
    for i in range(n):
        rows[i] = row_sum(p + i * c, whole, some)
    return transposed_sum_in_full(rows, rest) if in_full else transposed_sum(rows)


cdef inline void sum_rows(bint in_full, Packed *p) noexcept nogil:
    """To p.a; in_full: what they lack, as rounded, to p.low."""
    cdef vec rest
    cdef int g, i
    for g in range(p.groups):
        i = g * LANES
        if p.n - i >= LANES:
            vstore(p.a + i, row_sums(in_full, p.kept + i * p.c, p.c, LANES, &rest))
        else:
            vstore(p.a + i, row_sums(in_full, p.kept + i * p.c, p.c, p.n - i, &rest))
        if in_full:
            vstore(p.low + i, rest)


cdef vec distant_loss(Steps by, vec shift, vec start, vec target, vec others, vec at) noexcept nogil:
    """L of rows where the target is so far below others that its exponential is 0 beside theirs."""
    # Both parts may be hundreds of times the result: what they lack, as rounded, is in `low`.
    cdef vec lost, away = exact_sum(shift, sub(vset(0), target), &lost), parts = mul(away, vset(by.unit))
    cdef vec low = add(product_less(away, vset(by.unit), parts), mul(lost, vset(by.unit)))
    parts = exact_sum(parts, mul(start, vset(<real> FL_LN2_HIGH)), &lost)
    low = add(add(low, lost), mul(start, vset(<real> FL_LN2_LOW)))
    return add(vlog(others, low, parts, &lost), sub(at, at))  # NaN where that is one


cdef inline vec loss_of_ratio(vec others, vec low, vec at, vec *ratio, vec *r) noexcept nogil:
    """L = log(1 + (others + low) / at), for a small low; others / at and 1 / (others + at)."""
    cdef vec lost, total
    ratio[0], r[0] = div(others, at), div(vset(1), add(others, at))
    total = exact_sum(ratio[0], vset(1), &lost)
    # What total lacks, as rounded, and what the ratio does, relative to it.
    lost = mul(sub(add(low, mul(lost, at)), product_less(ratio[0], at, others)), r[0])
    return log_in_full(total, lost, vset(0))


cdef inline vec log_sums(const Packed *p, bint usual, int i, vec total, vec low) noexcept nogil:
    """z of LANES rows from i on: of the sums of their exponentials as kept, and what they lack, relative to them."""
    if usual:
        return log_in_full(total, low, vset(0))
    return add(log_in_full(total, low, vload(p.start + i)), mul(vload(p.shift + i), vset(p.steps.unit)))


cdef inline vec weight_of(bint weighted, const real *weights, Py_ssize_t some, vec unit) noexcept nogil:
    """Of `some` classes, times unit."""
    if not weighted:
        return unit
    return mul(unit, vload(weights) if some == LANES else vload_part(weights, some, 0))


cdef inline vec distances(bint weighted, const Packed *p, int first, int n, vec unit) noexcept nogil:
    """Σ (s_y − s_j) u_j of n <= LANES rows from `first` on: of the largest numbers too, which mask classes."""
    cdef Py_ssize_t i, k, c = p.c, whole = c // LANES, some = c % LANES
    cdef const stored *q = p.src + first * c
    cdef const real *target = p.score + first
    cdef const real *w = p.weights
    cdef vec rows[16]
    cdef vec a, b, t, last = weight_of(weighted, w + whole * LANES, some, unit)
    for i in range(n, LANES):
        rows[i] = vset(0)
    if whole == 0:
        for i in range(n):
            rows[i] = mul(sub(vset(target[i]), sload_part(q + i * c, some, target[i])), last)
    else:
        for i in range(n):
            a, b, t = vset(0), vset(0), vset(target[i])
            if some:
                a = mul(sub(t, sload_part(q + i * c + whole * LANES, some, target[i])), last)
            for k in range(whole):
                a, b = b, add(a, mul(sub(t, sload(q + i * c + k * LANES)), weight_of(weighted, w + k * LANES, LANES, unit)))
            rows[i] = add(a, b)
    return transposed_sum(rows)


cdef inline void settle_packed(bint flat, bint weighted, Packed *p, bint usual, const Options *o, const real *mult, real scale,
                               real *losses) noexcept nogil:
    """Losses, from the sums in p.a; and what the gradient needs."""
    cdef vec zero = vset(0), others, at, ratio, r, total, loss, factor, target, pull, z, u, mine, each
    cdef mask dead, fits
    cdef int g, i
    for g in range(p.groups):
        i = g * LANES
        others, at, factor = vload(p.a + i), vload(p.target + i), vload(mult + i)
        loss = loss_of_ratio(others, vload(p.low + i), at, &ratio, &r)
        target = vload(p.score + i) if flat or not usual else zero
        if not usual:
            fits = vle(ratio, vset(<real> (REAL_MAX / 8)))
            if not all_lanes(fits):
                loss = choose(fits, loss, distant_loss(p.steps, vload(p.shift + i), vload(p.start + i), target, others, at))
        dead = veq(factor, zero)
        factor = mul(factor, vset(scale))
        u = zero
        if flat:
            u, mine, each = vset(o.elsewhere * (o.classes - 1)), vset(o.at_target), vset(o.elsewhere)
            if weighted:
                mine, each = vload(p.own + i), vset(1)
                u, mine = sub(vset(o.all_weights), mine), mul(mine, vset(o.weighted_target))
            factor = mul(factor, vset(p.steps.unit))
            loss = mul(loss, add(u, mine))
            if weighted or o.elsewhere != 0:
                # A target that is masked: its infinite loss is not made less by others.
                total = add(loss, vload(p.less + i))
                loss = choose(veq(sub(loss, loss), zero), total, loss)
                vstore(p.less + i, choose(dead, zero, mul(factor, each)))
            if o.z_loss != 0:
                z = log_sums(p, usual, i, add(others, at), zero)
                loss = add(loss, mul(vset(o.z_loss), mul(z, z)))
                u = add(u, mul(vset(2 * o.z_loss), z))
        vstore(losses + i, choose(dead, zero, loss))
        if flat:
            pull = sub(mul(u, mul(at, r)), mul(mine, mul(others, r)))
            r = mul(r, add(u, mine))
            vstore(p.b + i, choose(dead, zero, mul(pull, factor)))
            vstore(p.a + i, choose(dead, zero, mul(r, factor)))
        else:
            r = mul(r, factor)
            vstore(p.b + i, choose(dead, zero, mul(others, sub(zero, r))))
            vstore(p.a + i, choose(dead, zero, r))


cdef inline vec packed_slope(bint spreads, bint weighted, const real *kept, vec r, vec less, ivec row,
                             const real *weights) noexcept nogil:
    if spreads:
        less = look_up(less, row)
        return product_less(vload(kept), look_up(r, row), mul(less, vload(weights)) if weighted else less)
    return mul(vload(kept), look_up(r, row))


cdef inline void put_packed(bint spreads, bint weighted, const Packed *p, const lane_int *y, const real *mult, bint all_live) noexcept nogil:
    """The gradient, or without targets (y is NULL) probabilities. It may take the place of the exponentials: none is written over
    before it is read."""
    cdef Py_ssize_t k, c = p.c, left = p.n * c
    cdef const ivec *rows = p.rows
    cdef const real *kept = p.kept
    cdef const real *w = p.weights
    cdef stored *to = p.to
    cdef vec r, less = vset(0)
    cdef int g, i
    for g in range(p.groups):
        r = vload(p.a + g * LANES)
        if spreads:
            less = vload(p.less + g * LANES)
        for k in range(min(c, left // LANES)):
            sstore(to + k * LANES, packed_slope(spreads, weighted, kept + k * LANES, r, less, rows[k], w + k * LANES))
        if left < c * LANES and left % LANES:
            k = left // LANES
            sstore_part(to + k * LANES, packed_slope(spreads, weighted, kept + k * LANES, r, less, rows[k], w + k * LANES), left % LANES)
        kept, left = kept + c * LANES, left - c * LANES
        for i in range(min(LANES, p.n - g * LANES) if y != NULL else 0):
            one_by_one()
            sstore_one(to + i * c + y[g * LANES + i], p.b[g * LANES + i])
        to += c * LANES
    if not all_live:
        to -= p.groups * LANES * c
        for i in range(p.n):
            if mult[i] == 0:
                memset(to + i * c, 0, c * sizeof(stored))


cdef inline bint are_usual_factors(const real *mult, int n, real scale) noexcept nogil:
    """Whether the gradient, for these factors, stays within normal numbers on its way from exponentials of usual scores: 0 are those
    of rows without one."""
    cdef int i
    cdef real size
    for i in range(n):
        size = mult[i] * scale
        size = -size if size < 0 else size
        if mult[i] != 0 and (is_tiny(size) or not size <= <real> 1e12):
            return False
    return True


cdef inline bint keep_exps(bint in_full, Packed *p, Steps steps, bint usual, bint far, int *patience) noexcept nogil:
    """Exponentials of scores, if they may be of scores of a usual size; whether they are. in_full: see `usual_exp`."""
    if usual and patience[0] == 0:
        usual = keep_usual(in_full, p, steps, True) if far else keep_usual(in_full, p, steps, False)
        patience[0] = 0 if usual else PATIENCE
    else:
        usual, patience[0] = False, max(0, patience[0] - 1)
    if not usual:
        if in_full:
            keep_any_in_full(p, far)
        else:
            keep_any_as_usual(p, far)
    return usual


cdef inline void packed_losses(bint flat, bint weighted, Packed *p, const ScoresPass *s, bint far, bint all_live, const lane_int *y,
                               const real *mult, int *patience, real *losses) noexcept nogil:
    cdef Steps steps = p.steps if flat else plain_steps()
    cdef bint usual = are_usual_factors(mult, 1 if s.multiplier == NULL else p.n, s.scale * p.steps.unit)
    cdef bint spreads = weighted or (flat and s.options.elsewhere != 0)
    cdef Py_ssize_t k
    cdef int i
    cdef vec unit
    usual = keep_exps(True, p, steps, usual, far, patience)
    for i in range(p.n):
        k = i * p.c + y[i]
        p.target[i], p.kept[k] = p.kept[k], 0
    vstore(p.target + p.n, vset(1))
    sum_rows(True, p)
    if flat or not usual:
        for i in range(p.n):
            p.score[i] = sone(p.src + i * p.c + y[i])
        for i in range(p.n, p.groups * LANES):
            p.score[i] = 0
    if weighted:
        for i in range(p.n):
            p.own[i] = p.weights[y[i]]
        for i in range(p.n, p.groups * LANES):
            p.own[i] = 0
    if spreads:
        unit = vset(steps.unit if weighted else s.options.elsewhere * steps.unit)
        for i in range(p.n // LANES):
            vstore(p.less + i * LANES, distances(weighted, p, i * LANES, LANES, unit))
        i = p.n // LANES * LANES
        if i < p.n:
            vstore(p.less + i, distances(weighted, p, i, p.n - i, unit))
    if usual:
        settle_packed(flat, weighted, p, True, &s.options, mult, s.scale, losses)
    else:
        settle_packed(flat, weighted, p, False, &s.options, mult, s.scale, losses)
    if p.dst != NULL and spreads:
        put_packed(True, weighted, p, y, mult, all_live)
    elif p.dst != NULL:
        put_packed(False, False, p, y, mult, all_live)


cdef inline void packed_probabilities(Packed *p, bint far, int *patience) noexcept nogil:
    cdef int g
    keep_exps(False, p, plain_steps(), True, far, patience)
    sum_rows(False, p)
    for g in range(p.groups):
        vstore(p.a + g * LANES, div(vset(1), vload(p.a + g * LANES)))
    put_packed(False, False, p, NULL, NULL, True)


cdef inline void packed_log_sums(Packed *p, int *patience, real *z) noexcept nogil:
    cdef bint usual = keep_exps(True, p, plain_steps(), True, False, patience)
    cdef const stored *row
    cdef Py_ssize_t k
    cdef int g, i
    cdef vec total
    sum_rows(True, p)
    for g in range(p.groups):
        i = g * LANES
        total = vload(p.a + i)
        vstore(z + i, add(log_sums(p, usual, i, total, div(vload(p.low + i), total)), sub(total, total)))  # NaN where that is one
    for i in range(0 if usual else p.n):
        if p.shift[i] - p.shift[i] != 0:  # a maximum that is infinite is the limit, unless there is NaN
            row, z[i] = p.src + i * p.c, p.shift[i]
            for k in range(p.c):
                z[i] = z[i] if sone(row + k) == sone(row + k) else sone(row + k)


cdef double scores_packed(const ScoresPass *s, Py_ssize_t start, Py_ssize_t stop, real *scratch) noexcept nogil:
    """Σ multiplier · ℓ of rows [start, stop)."""
    cdef Packed own
    cdef Packed *p = &own
    cdef Py_ssize_t c = s.scores.columns, batch = packed_rows(c), row, t
    cdef lane_int y[256]
    cdef real mult[256]
    cdef real losses[256]
    cdef double sums[16]
    cdef int i, live, patience = 0
    cdef bint far = (s.grad.raw != NULL and not s.streams and s.grad.raw != s.scores.raw
                     and s.scores.rows * c * <Py_ssize_t> sizeof(stored) > FAR_BYTES)
    memset(sums, 0, sizeof(sums))
    number_rows(c, <ivec *> scratch)
    own.steps = s.options.steps if s.options.general else plain_steps()
    own.usual_size = USUAL_SIZE / own.steps.unit
    own.c, own.rows, own.kept, own.weights = c, <ivec *> scratch, scratch + c * LANES, NULL
    if s.options.general and s.options.class_weight != NULL:
        own.weights = own.kept + c * batch
        for t in range(LANES):
            memcpy(own.kept + (batch + t) * c, s.options.class_weight, c * sizeof(real))
    for t in range((stop - start + batch - 1) // batch):
        row = start + t * batch
        own.n = <int> min(batch, stop - row)
        own.src, own.dst = s.scores.raw + row * c, s.grad.raw + row * c if s.grad.raw != NULL else NULL
        own.groups = (own.n + LANES - 1) // LANES
        live = tile_multipliers(s.multiplier, row, own.n, (own.n + TILE - 1) // TILE * TILE, mult)
        keep_tops(s, row, own.n, mult)
        convert(&s.targets, row, own.n, y)
        if live < own.n:
            for i in range(own.n):
                y[i] = 0 if mult[i] == 0 else y[i]  # an ignored target may be no class
        own.to = <stored *> own.kept if s.streams else own.dst
        if s.options.kind == PROBABILITIES:
            packed_probabilities(p, far, &patience)
            memset(losses, 0, sizeof(losses))
        elif s.options.kind == LOG_SUM:
            packed_log_sums(p, &patience, losses)
        elif own.weights != NULL:
            packed_losses(True, True, p, s, far, live == own.n, y, mult, &patience, losses)
        elif s.options.general:
            packed_losses(True, False, p, s, far, live == own.n, y, mult, &patience, losses)
        else:
            packed_losses(False, False, p, s, far, live == own.n, y, mult, &patience, losses)
        if own.dst != NULL and s.streams:
            stream_bytes(<char *> own.dst, <char *> own.to, own.n * c * <Py_ssize_t> sizeof(stored))
        keep_losses(s, row, own.n, (own.n + TILE - 1) // TILE * TILE, mult, losses, sums)
    return fold_doubles(sums)
