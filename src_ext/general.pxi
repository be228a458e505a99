# The general form of the row losses: options read when it runs, which a plain row loss knows nothing of.
#
# Softmax. Scores are bent (softcap), then divided by the temperature T: d_j = (bent(s_j) − bent(max)) / T, e_j = exp(d_j),
# L = log Σ e. With u the target vector (of an index, smoothed, or probabilities; times the class weights), U = Σ u and
# z = bent(max) / T + L:
#
#     ℓ = U L − Σ u_j d_j + λ z²        gradient = ((U + 2 λ z) p − u) / T · bent'(s)        entropy = L − Σ p_j d_j
#
# No term of ℓ cancels another. In the gradient, U p − u does where one class has nearly all of both; there (`mark`) it is
# Σ_{j≠k} u_j p_k − u_k Σ_{j≠k} p_j. Exponentials are kept for the second walk, but with a softcap they are computed again:
# their place is the scores', which its slope needs.
#
# Hinge. Margins are those of the row's target (`margin_of`), and the target may count (`losses.pxi`).
#
# The largest class: a walk that looks for where the maximum is.

cdef struct Found:
    # Sums over a row of what `walk_general` walks over, each of its lanes on its own.
    vec others  # e where it is not 1
    vec tops  # how many are 1
    vec away  # Σ u_j (−d_j)
    vec u_others  # u where e is not 1, and where it is
    vec u_tops
    vec spread  # Σ e_j (−d_j)


cdef inline vec bent(const Options *o, vec s, vec *slope) noexcept nogil:
    """The softcap: c · tanh(s / c), and its slope; infinite scores stay as they are, so that a masked class does."""
    cdef vec t, cap = vset(o.softcap)
    cdef mask finite
    slope[0] = vset(1)
    if o.softcap < 0:
        return s
    t = vtanh(div(s, cap), slope)
    finite = veq(sub(s, s), vset(0))
    slope[0] = choose(finite, slope[0], vset(1))
    return choose(finite, mul(t, cap), s)


cdef inline vec class_numbers(int layout, bint part, const real *of_class, Py_ssize_t k, const Walk *w) noexcept nogil:
    """One number for each class: those of vector k; 0 past the end."""
    if layout == LANED:
        return vset(of_class[k])
    if part:
        return vload_part(of_class + k * LANES, w.classes - k * LANES, 0)
    return vload(of_class + k * LANES)


cdef inline vec row_numbers(int layout, bint part, const Walk *w, Py_ssize_t k) noexcept nogil:
    """One number for each row and class (`Walk.more`): those of vector k; 0 past the end."""
    if layout == LANED:
        return vload(w.more + k * TILE)
    return class_numbers(layout, part, w.more, k, w)


cdef inline vec margin_of(int layout, bint part, const Options *o, const Walk *w, Py_ssize_t k) noexcept nogil:
    """The hinge's Δ for vector k."""
    return row_numbers(layout, part, w, k) if o.general and o.pairs != NULL else vset(o.margin)


cdef inline vec target_part(int layout, bint part, const Options *o, const Walk *w, Py_ssize_t k, ivec cls) noexcept nogil:
    """Vector k of u."""
    cdef vec u
    if o.probabilities:
        u = row_numbers(layout, part, w, k)
    else:
        u = choose(ieq(cls, w.target), vset(o.at_target), vset(o.elsewhere))
        if part:
            u = choose(past_end(layout, w, cls), vset(0), u)
    return u if o.class_weight == NULL else mul(u, class_numbers(layout, part, o.class_weight, k, w))


cdef inline vec times_distance(vec weight, vec d) noexcept nogil:
    """weight · (−d); 0 where the weight is, infinite distances too."""
    return choose(veq(weight, vset(0)), vset(0), mul(weight, sub(vset(0), d)))


cdef inline vec general_step(int layout, bint part, const Options *o, const Walk *w, Py_ssize_t k, ivec cls, vec m,
                             Found *f) noexcept nogil:
    """Vector k of the first walk; its exponentials."""
    cdef vec slope, one = vset(1), d, e, u
    cdef mask top
    d = mul(sub(bent(o, fetch(layout, part, w, k, <real> -INFINITY), &slope), m), vset(o.per_temperature))
    e = vexp(d, vset(0))
    u = target_part(layout, part, o, w, k, cls)
    top = veq(e, one)
    f.others, f.u_others = add_unless(top, f.others, e), add_unless(top, f.u_others, u)
    f.tops, f.u_tops = add(f.tops, choose(top, one, vset(0))), add(f.u_tops, choose(top, u, vset(0)))
    f.away = add(f.away, times_distance(u, d))
    if o.entropy:
        f.spread = add(f.spread, times_distance(e, d))
    return e


cdef inline Found nothing_found() noexcept nogil:
    cdef Found f
    cdef vec zero = vset(0)
    f.others, f.tops, f.away, f.u_others, f.u_tops, f.spread = zero, zero, zero, zero, zero, zero
    return f


cdef inline void add_exactly(vec *total, vec *lost, vec term) noexcept nogil:
    cdef vec rest
    total[0] = exact_sum(total[0], term, &rest)
    lost[0] = add(lost[0], rest)


cdef inline void open_general(int layout, bint keep, const Options *o, const Walk *w, State *s, vec *last) noexcept nogil:
    """Blocks of 16 vectors: their sums are added up exactly, so that rounding does not grow with the classes."""
    cdef Found f, all = nothing_found(), lost = nothing_found()
    cdef vec e, slope, m = bent(o, s.m, &slope)
    cdef ivec cls = classes_of(layout, 0)
    cdef Py_ssize_t start, k, stop, whole
    for start in range(0, w.vectors, 16):
        f = nothing_found()
        stop = min(w.vectors, start + 16)
        whole = whole_vectors(layout, True, w, stop)
        for k in range(start, whole):
            e = general_step(layout, False, o, w, k, cls, m, &f)
            fetch_ahead(layout, keep, w, k)
            if keep and o.softcap < 0:
                vstore(kept(layout, w, k), e)
            cls = next_classes(layout, cls)
        if layout == ROWED and whole < stop:
            last[0] = general_step(layout, True, o, w, whole, cls, m, &f)
        add_exactly(&all.others, &lost.others, f.others)
        add_exactly(&all.away, &lost.away, f.away)
        add_exactly(&all.u_others, &lost.u_others, f.u_others)
        all.tops, all.u_tops = add(all.tops, f.tops), add(all.u_tops, f.u_tops)
        all.spread = add(all.spread, f.spread)
    # What an infinite sum lost is NaN.
    s.a, s.b = add(all.others, lost.others), choose(veq(lost.away, lost.away), add(all.away, lost.away), all.away)
    s.more[0], s.more[1], s.more[2] = add(all.u_others, lost.u_others), all.u_tops, all.tops
    s.more[3] = all.spread


cdef inline vec settle_general(bint grad, const Options *o, State *s, vec factor) noexcept nogil:
    """Leaves in `more` what is left to ask for: z, and the entropy."""
    cdef vec rest, slope, others = s.a, away = s.b, u_others = s.more[0], u_tops = s.more[1], tops = s.more[2]
    cdef vec total = exact_sum(tops, others, &rest), size = vlog(total, div(rest, total), vset(0), &slope)
    cdef vec u = add(u_others, u_tops), z, pull = u, loss, nan = vset(<real> NAN)
    z = add(mul(bent(o, s.m, &slope), vset(o.per_temperature)), size)
    loss = add(mul(u, size), away)
    if o.z_loss != 0:
        pull = mul(vset(2 * o.z_loss), z)
        loss = add(loss, mul(vset(o.z_loss), mul(z, z)))
    if grad:
        factor = mul(factor, vset(o.per_temperature))
        u_others = sub(u_others, mul(u_tops, others))
        if o.z_loss != 0:
            u_others, pull = add(u_others, pull), add(u, pull)
        s.a, s.b, s.c = div(mul(factor, pull), total), div(mul(factor, u_others), total), factor
        s.mark = choose(veq(tops, vset(1)), vset(1), nan)
    s.more[0], s.more[1] = z, add(size, div(s.more[3], total))
    return loss


cdef inline void close_general(int layout, const Options *o, const Walk *w, const State *s, vec last) noexcept nogil:
    cdef Py_ssize_t k, whole = w.classes // LANES if layout == ROWED else w.vectors
    cdef ivec cls = classes_of(layout, 0)
    cdef vec slope, m = bent(o, s.m, &slope)
    for k in range(whole):
        put(layout, False, w, k, general_slope(layout, False, o, w, k, cls, s, m, vset(0)))
        cls = next_classes(layout, cls)
    if layout == ROWED and whole < w.vectors:
        put(layout, True, w, whole, general_slope(layout, True, o, w, whole, cls, s, m, last))


cdef inline vec general_slope(int layout, bint part, const Options *o, const Walk *w, Py_ssize_t k, ivec cls,
                              const State *s, vec m, vec last) noexcept nogil:
    """Vector k of the gradient."""
    cdef vec e, slope = vset(1), u = target_part(layout, part, o, w, k, cls)
    if o.softcap >= 0:
        e = bent(o, fetch(layout, part, w, k, <real> -INFINITY), &slope)
        e = vexp(mul(sub(e, m), vset(o.per_temperature)), vset(0))
    elif part:
        e = last
    else:
        e = vload(kept(layout, w, k))
    return mul(choose(veq(e, s.mark), s.b, sub(mul(s.a, e), mul(s.c, u))), slope)


# --- the largest class -----------------------------------------------------------------------------------------------
cdef inline void open_argmax(int layout, const Walk *w, State *s) noexcept nogil:
    """The lowest class that has the maximum, or the first NaN; as a class number in the lanes' bits."""
    cdef ivec none = iset(<lane_int> w.classes), top = none, bad = none, cls = classes_of(layout, 0)
    cdef Py_ssize_t k, whole = w.classes // LANES if layout == ROWED else w.vectors
    cdef vec x
    cdef mask right
    for k in range(whole):
        x = fetch(layout, False, w, k, 0)
        top, bad = imin(top, ichoose(veq(x, s.m), cls, none)), imin(bad, ichoose(veq(x, x), none, cls))
        cls = next_classes(layout, cls)
    if layout == ROWED and whole < w.vectors:
        x = fetch(layout, True, w, whole, 0)
        right = mandnot(veq(x, s.m), past_end(layout, w, cls))
        top, bad = imin(top, ichoose(right, cls, none)), imin(bad, ichoose(veq(x, x), none, cls))
    if layout == ROWED:
        top, bad = iset(lane_least(top)), iset(lane_least(bad))
    s.a = ivec_bits(ichoose(ige(bad, none), top, bad))
