# Rows of 2 to 4 classes that lie end to end: all is kept in registers, from scores to gradient, and the number of classes is a
# constant of the compiled code.
#
# Two classes are one number, d = s_o − s_y, of the other class and the target. Softmax: ℓ = log(1 + exp d) = max(0, d) +
# log(1 + exp(−|d|)); the gradient's entries are ±exp d / (1 + exp d). Hinge: as in losses.pxi, with one margin d + Δ. What d, as
# rounded, lacks is in all of them. Three and four have the formulas of packed.pxi, for scores of any size, and of losses.pxi. So
# this layout knows its losses, as packed.pxi does.

cdef enum:
    SHORT_ROWS = 256  # that are handled together
    SHORT_MOST = 4  # classes


cdef bint is_short(const ScoresPass *s) noexcept nogil:
    cdef Py_ssize_t c = s.scores.columns
    return (2 <= c <= SHORT_MOST and (s.options.kind == SOFTMAX or s.options.kind == HINGE) and not s.options.general
            and s.scores.column_stride == 1 and s.scores.row_stride == c
            and (s.grad.raw == NULL or (s.grad.column_stride == 1 and s.grad.row_stride == c)))


cdef inline vec binary_softmax(bint grad, vec own, vec other, vec factor, vec *entry) noexcept nogil:
    """Losses of LANES rows; and the gradient's entry of the other class, times factor: the target's is the opposite.

    Exponentials are raised, as those of other rows: what a large factor makes of the smallest is not lost.
    """
    cdef vec zero = vset(0), one = vset(1), lower = vset(1 / RAISED), raised, e, r, top
    cdef vec rest, d = exact_sum(other, sub(zero, own), &rest)
    cdef mask above = vlt(zero, d)
    top, rest = vmax(own, other), number_or_zero(rest)
    raised = vexp(with_sign(d, vset(-1)), vset(-RAISED_BITS))
    raised = mul(raised, add(one, choose(above, sub(zero, rest), rest)))
    e = mul(raised, lower)
    top = sub(top, top)  # NaN where the maximum is infinite, else 0
    if grad:
        r = div(one, add(one, e))
        entry[0] = mul(choose(above, r, mul(e, r)), factor)
        entry[0] = choose(mandnot(vlt(raised, one), above), mul(mul(raised, factor), mul(r, lower)), entry[0])
        entry[0] = add(entry[0], top)
    return add(add(choose(above, d, zero), add(vlog1p(e), choose(above, rest, zero))), top)


cdef inline vec binary_hinge(int power, const Options *o, vec own, vec other, vec factor, vec *entry) noexcept nogil:
    cdef vec zero = vset(0), lost, rest, d, m
    cdef mask idle
    aim_hinge(o, &lost, &own)
    d = exact_sum(other, own, &rest)
    idle = vle(d, lost)
    if power == 1:
        entry[0] = choose(idle, zero, choose(vlt(lost, d), mul(factor, vset(o.per_class)), d))
        return choose(idle, zero, mul(sub(d, lost), vset(o.per_class)))
    rest = choose(idle, zero, number_or_zero(sub(rest, lost)))
    d = choose(idle, zero, d)
    m = add(d, rest)
    rest = number_or_zero(sub(rest, sub(m, d)))
    entry[0] = mul(m, mul(factor, vset(2 * o.per_class)))
    return mul(mul(m, add(m, add(rest, rest))), vset(o.per_class))


cdef inline vec binary_loss(int kind, int power, bint grad, const Options *o, ivec y, vec factor, vec *row) noexcept nogil:
    cdef mask second = ieq(y, iset(1))
    cdef vec own = choose(second, row[1], row[0]), other = choose(second, row[0], row[1]), loss, entry = vset(0), opposite
    if kind == SOFTMAX:
        loss = binary_softmax(grad, own, other, factor, &entry)
    else:
        loss = binary_hinge(power, o, own, other, factor, &entry)
    opposite = sub(vset(0), entry)
    row[0], row[1] = choose(second, entry, opposite), choose(second, opposite, entry)
    return loss


cdef inline vec of_class(int c, ivec y, const vec *row) noexcept nogil:
    """The numbers of class y."""
    cdef vec own = row[0]
    cdef int k
    for k in range(1, c):
        own = choose(ieq(y, iset(k)), row[k], own)
    return own


cdef struct Ratios:
    # What the losses of three and four classes come of, of the rows that are handled together.
    real others[256]
    real at[256]
    real target[256]
    real shift[256]
    real start[256]


cdef inline void short_softmax(int c, bint grad, ivec y, vec factor, int i, Ratios *p, vec *row) noexcept nogil:
    """Gradients, times factor, in place of scores, and what the losses of LANES rows come of: these have a loop of their own,
    since each is a long chain of operations."""
    cdef Steps by = plain_steps()
    cdef vec zero = vset(0), top = row[0], others = zero, shift, start, at, r
    cdef int k
    for k in range(1, c):
        top = vmax(top, row[k])
    start_from(by, top, &shift, &start)
    vstore(p.target + i, of_class(c, y, row))
    vstore(p.shift + i, shift)
    vstore(p.start + i, start)
    for k in range(c):
        row[k] = any_exp(True, by, sub(row[k], shift), start)
    at = of_class(c, y, row)
    for k in range(c):
        others = add_unless(ieq(y, iset(k)), others, row[k])
    vstore(p.at + i, at)
    vstore(p.others + i, others)
    if grad:
        r = div(factor, add(others, at))
        others = mul(others, sub(zero, r))
        for k in range(c):
            row[k] = choose(ieq(y, iset(k)), others, mul(row[k], r))


cdef inline void short_losses(const Ratios *p, int n, real *losses) noexcept nogil:
    cdef vec others, at, ratio, r, loss
    cdef mask fits
    cdef int i, g
    for g in range((n + LANES - 1) // LANES):
        i = g * LANES
        others, at = vload(p.others + i), vload(p.at + i)
        loss = loss_of_ratio(others, vset(0), at, &ratio, &r)
        fits = vle(ratio, vset(<real> (REAL_MAX / 8)))
        if not all_lanes(fits):
            loss = choose(fits, loss, distant_loss(plain_steps(), vload(p.shift + i), vload(p.start + i), vload(p.target + i), others, at))
        vstore(losses + i, loss)


cdef inline vec short_hinge(int c, int power, bint grad, const Options *o, ivec y, vec factor, vec *row) noexcept nogil:
    cdef State s
    cdef HingeSums sums
    cdef vec second = vset(0), third = second, fourth = second, share = mul(factor, vset(power * o.per_class))
    cdef int k
    s.target = of_class(c, y, row)
    aim_hinge(o, &s.m, &s.target)
    sums.loss = sums.low = sums.slack = sums.pull = second
    for k in range(c):
        row[k] = hinge_step(grad, power, row[k], ieq(y, iset(k)), &s, share, &sums)
        if power == 1:
            sums.loss, second, third, fourth = second, third, fourth, sums.loss
    if power == 1:
        sums.loss = join_sums(True, sums.loss, second, third, fourth, &sums.low)
    s.a, s.b, s.low = sums.loss, sums.pull, add(sums.low, sums.slack)
    sums.loss = settle_hinge(o, &s, factor)
    if grad:
        for k in range(c):
            row[k] = choose(ieq(y, iset(k)), s.b, row[k])
    return sums.loss


cdef inline vec short_loss(int c, int kind, int power, bint grad, const Options *o, ivec y, vec factor, vec *row) noexcept nogil:
    """Losses of LANES rows; and their gradients, times factor, in place of their scores."""
    if c == 2:
        return binary_loss(kind, power, grad, o, y, factor, row)
    return short_hinge(c, power, grad, o, y, factor, row)


cdef inline double short_case(int c, int kind, int power, bint grad, const ScoresPass *s, Py_ssize_t start, Py_ssize_t stop,
                              stored *held) noexcept nogil:
    cdef Py_ssize_t t, first
    cdef int n, i, k, live, step, whole
    cdef lane_int y[256]
    cdef real mult[256]
    cdef real losses[256]
    cdef double sums[16]
    cdef const stored *src
    cdef const stored *p
    cdef stored *dst
    cdef stored *to
    cdef stored *q
    cdef stored rest[64]  # scores, then gradients, of the rows that are less than a group
    cdef vec row[4]
    cdef vec factor, loss, scale = vset(s.scale), zero = vset(0)
    cdef mask dead
    cdef Options options = s.options
    cdef Ratios ratios
    cdef bint late = kind == SOFTMAX and c > 2, end
    cdef bint far = (grad and not s.streams and s.grad.raw != s.scores.raw
                     and s.scores.rows * c * <Py_ssize_t> sizeof(stored) > FAR_BYTES)
    memset(sums, 0, sizeof(sums))
    memset(rest, 0, sizeof(rest))
    for t in range((stop - start + SHORT_ROWS - 1) // SHORT_ROWS):
        first = start + t * SHORT_ROWS
        n = <int> min(<Py_ssize_t> SHORT_ROWS, stop - first)
        whole = n // LANES * LANES
        src, dst = s.scores.raw + c * first, s.grad.raw + c * first if grad else NULL
        to = held if s.streams else dst
        live = tile_multipliers(s.multiplier, first, n, (n + TILE - 1) // TILE * TILE, mult)
        keep_tops(s, first, n, mult)
        convert(&s.targets, first, n, y)
        i, p, q = 0, src, to
        for end in range(2):
            if end:
                if whole == n:
                    break
                memcpy(rest, src + c * whole, c * (n - whole) * sizeof(stored))
                p, q = rest, rest
            for step in range(1 if end else n // LANES):
                for k in range(c):
                    ask_ahead(p + k * LANES, dst + c * i + k * LANES, c * SHORT_ROWS, far)
                    row[k] = sload(p + k * LANES)
                split_rows(c, row)
                factor = mul(vload(mult + i), scale)
                if late:
                    short_softmax(c, grad, iload(y + i), factor, i, &ratios, row)
                else:
                    loss = short_loss(c, kind, power, grad, &options, iload(y + i), factor, row)
                    vstore(losses + i, loss)
                if live < n and grad:
                    dead = veq(vload(mult + i), zero)
                    for k in range(c):
                        row[k] = choose(dead, zero, row[k])
                if grad:
                    join_rows(c, row)
                    for k in range(c):
                        sstore(q + k * LANES, row[k])
                i, p, q = i + LANES, p + c * LANES, q + c * LANES
        if grad and whole < n:
            memcpy(to + c * whole, rest, c * (n - whole) * sizeof(stored))
        if late:
            short_losses(&ratios, n, losses)
        if live < n:
            for i in range(n):
                losses[i] = 0 if mult[i] == 0 else losses[i]
        if grad and s.streams:
            stream_bytes(<char *> dst, <char *> to, c * n * <Py_ssize_t> sizeof(stored))
        keep_losses(s, first, n, (n + TILE - 1) // TILE * TILE, mult, losses, sums)
    return fold_doubles(sums)


cdef inline double scores_of_short(int c, const ScoresPass *s, Py_ssize_t start, Py_ssize_t stop, stored *held) noexcept nogil:
    cdef bint grad = s.grad.raw != NULL  # no constant: looking at it costs nothing, and half the code is saved
    if s.options.kind == SOFTMAX:
        return short_case(c, SOFTMAX, 1, grad, s, start, stop, held)
    if s.options.power == 1:
        return short_case(c, HINGE, 1, grad, s, start, stop, held)
    return short_case(c, HINGE, 2, grad, s, start, stop, held)


# A function for each: the arrays of one that holds them all would lie apart on the stack.
cdef double scores_of_two(const ScoresPass *s, Py_ssize_t start, Py_ssize_t stop, stored *held) noexcept nogil:
    return scores_of_short(2, s, start, stop, held)


cdef double scores_of_three(const ScoresPass *s, Py_ssize_t start, Py_ssize_t stop, stored *held) noexcept nogil:
    return scores_of_short(3, s, start, stop, held)


cdef double scores_of_four(const ScoresPass *s, Py_ssize_t start, Py_ssize_t stop, stored *held) noexcept nogil:
    return scores_of_short(4, s, start, stop, held)


cdef double scores_short(const ScoresPass *s, Py_ssize_t start, Py_ssize_t stop, real *scratch) noexcept nogil:
    """Σ multiplier · ℓ of rows [start, stop)."""
    if s.scores.columns == 2:
        return scores_of_two(s, start, stop, <stored *> scratch)
    if s.scores.columns == 3:
        return scores_of_three(s, start, stop, <stored *> scratch)
    return scores_of_four(s, start, stop, <stored *> scratch)
