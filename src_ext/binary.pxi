# Two classes, in rows that lie end to end: a row is one number, d = s_o − s_y, of its other class and its target, and all is kept
# in registers from scores to gradient.
#
# Softmax: ℓ = log(1 + exp d) = max(0, d) + log(1 + exp(−|d|)); the gradient's entries are ±exp d / (1 + exp d). Hinge: as in
# losses.pxi, with one margin d + Δ. What d, as rounded, lacks is in all of them. So this layout knows its losses, as packed.pxi
# does.

cdef enum:
    BINARY_ROWS = 256  # that are handled together


cdef bint is_binary(const ScoresPass *s) noexcept nogil:
    return (s.scores.columns == 2 and (s.options.kind == SOFTMAX or s.options.kind == HINGE) and not s.options.general
            and s.top == NULL and s.scores.column_stride == 1 and s.scores.row_stride == 2
            and (s.grad.raw == NULL or (s.grad.column_stride == 1 and s.grad.row_stride == 2)))


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


cdef inline void two_vectors(const stored *src, Py_ssize_t n, vec *a, vec *b) noexcept nogil:
    """n numbers."""
    if n >= 2 * LANES:
        a[0], b[0] = sload(src), sload(src + LANES)
    else:
        a[0] = sload_part(src, min(<Py_ssize_t> LANES, n), 0)
        b[0] = sload_part(src + LANES, n - LANES, 0) if n > LANES else vset(0)


cdef inline void put_two_vectors(stored *to, Py_ssize_t n, vec a, vec b) noexcept nogil:
    if n >= 2 * LANES:
        sstore(to, a)
        sstore(to + LANES, b)
    else:
        sstore_part(to, a, min(<Py_ssize_t> LANES, n))
        if n > LANES:
            sstore_part(to + LANES, b, n - LANES)


cdef inline double binary_case(int kind, int power, bint grad, const ScoresPass *s, Py_ssize_t start, Py_ssize_t stop,
                               stored *held) noexcept nogil:
    cdef Py_ssize_t row, t, at
    cdef int n, i, g, live
    cdef lane_int y[256]
    cdef real mult[256]
    cdef real losses[256]
    cdef double sums[16]
    cdef const stored *src
    cdef stored *dst
    cdef stored *to
    cdef vec a, b, own, other, factor, loss, zero = vset(0), entry = zero, opposite
    cdef mask second, dead
    cdef Options options = s.options
    cdef bint far = (grad and not s.streams and s.grad.raw != s.scores.raw
                     and s.scores.rows * 2 * <Py_ssize_t> sizeof(stored) > FAR_BYTES)
    memset(sums, 0, sizeof(sums))
    for t in range((stop - start + BINARY_ROWS - 1) // BINARY_ROWS):
        row = start + t * BINARY_ROWS
        n = <int> min(<Py_ssize_t> BINARY_ROWS, stop - row)
        src, dst = s.scores.raw + 2 * row, s.grad.raw + 2 * row if grad else NULL
        to = held if s.streams else dst
        live = tile_multipliers(s.multiplier, row, n, (n + TILE - 1) // TILE * TILE, mult)
        convert(&s.targets, row, n, y)
        for g in range((n + LANES - 1) // LANES):
            i = g * LANES
            at = 2 * i
            ask_ahead(src + at, dst + at, 2 * BINARY_ROWS, far)
            ask_ahead(src + at + LANES, dst + at + LANES, 2 * BINARY_ROWS, far)
            two_vectors(src + at, 2 * (n - i), &a, &b)
            second = ieq(iload(y + i), iset(1))
            own, other = even_lanes(a, b), odd_lanes(a, b)
            own, other = choose(second, other, own), choose(second, own, other)
            factor = mul(vload(mult + i), vset(s.scale))
            if kind == SOFTMAX:
                loss = binary_softmax(grad, own, other, factor, &entry)
            else:
                loss = binary_hinge(power, &options, own, other, factor, &entry)
            if live < n:
                dead = veq(vload(mult + i), zero)
                loss, entry = choose(dead, zero, loss), choose(dead, zero, entry)
            vstore(losses + i, loss)
            if grad:
                opposite = sub(zero, entry)
                a, b = choose(second, entry, opposite), choose(second, opposite, entry)
                put_two_vectors(to + at, 2 * (n - i), zip_low(a, b), zip_high(a, b))
        if grad and s.streams:
            stream_bytes(<char *> dst, <char *> to, 2 * n * <Py_ssize_t> sizeof(stored))
        keep_losses(s, row, n, (n + TILE - 1) // TILE * TILE, mult, losses, sums)
    return fold_doubles(sums)


cdef double scores_binary(const ScoresPass *s, Py_ssize_t start, Py_ssize_t stop, real *scratch) noexcept nogil:
    """Σ multiplier · ℓ of rows [start, stop)."""
    cdef bint grad = s.grad.raw != NULL
    cdef stored *held = <stored *> scratch
    if s.options.kind == SOFTMAX and grad:
        return binary_case(SOFTMAX, 1, True, s, start, stop, held)
    if s.options.kind == SOFTMAX:
        return binary_case(SOFTMAX, 1, False, s, start, stop, held)
    if s.options.power == 1 and grad:
        return binary_case(HINGE, 1, True, s, start, stop, held)
    if s.options.power == 1:
        return binary_case(HINGE, 1, False, s, start, stop, held)
    if grad:
        return binary_case(HINGE, 2, True, s, start, stop, held)
    return binary_case(HINGE, 2, False, s, start, stop, held)
