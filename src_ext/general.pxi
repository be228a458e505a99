# The general form of the row losses: options read when it runs, which a plain row loss knows nothing of.
#
# Softmax. Scores are bent (softcap), then divided by the temperature T: d_j = (bent(s_j) − bent(max)) / T, e_j = exp(d_j),
# L = log Σ e. With u the target vector (of an index, smoothed, or probabilities; times the class weights), U = Σ u and
# z = bent(max) / T + L:
#
#     ℓ = U L − Σ u_j d_j + λ z²        gradient = ((U + 2 λ z) p − u) / T · bent'(s)        entropy = L − Σ p_j d_j
#
# No term of ℓ cancels another. In the gradient, U p − u does where one class has nearly all of both (`mark`): there it is
# Σ_{j≠k} u_j p_k − u_k Σ_{j≠k} p_j. Where u is the same for all classes but the target ("flat"), the target's share waits
# until rows are settled, and only it can be such a class; else ("dense") walks go over u too. Exponentials are kept for the
# second walk; with a softcap they are computed again, from what is kept then, tanh.
#
# Hinge. Margins are those of the row's target, and the target may count: where scores are fetched, in `losses.pxi`.
#
# Shards of the classes. Stats are the first walk's: the maximum and the sum of exponentials. The gradient from the stats of
# all shards is one walk, from a maximum and a factor that are given.
#
# The largest class: a walk that looks for where the maximum is.

cdef struct Found:
    # Sums over a row of what is walked over, each of its lanes on its own.
    vec others  # e where it is not 1
    vec tops  # how many are 1
    vec away  # dense: Σ u_j (−d_j); flat: Σ (−d_j)
    vec u_others  # dense: u where e is not 1, and where it is
    vec u_tops
    vec spread  # Σ e_j (−d_j)


cdef inline bint is_dense(const Options *o) noexcept nogil:
    return o.probabilities or o.class_weight != NULL


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


# --- softcap ---------------------------------------------------------------------------------------------------------
# c · tanh(s / c); infinite scores stay as they are, so that a masked class does. The first walk keeps the tanh, or if that
# is at least 1/2 in size 1 − |tanh| · FAR_TANH with its sign: both to the last place, as the slope 1 − tanh² needs them.
cdef inline vec bent(const Options *o, vec s, vec *keep) noexcept nogil:
    """The bent scores, and what is kept of them."""
    cdef vec t, short_of_one, far
    cdef mask finite
    if o.softcap < 0:
        return s
    t = vtanh(mul(s, vset(o.per_softcap)), &short_of_one)
    finite = veq(sub(s, s), vset(0))
    far = with_sign(mul(vmax(short_of_one, vset(1 / FAR_TANH)), vset(FAR_TANH)), s)
    keep[0] = choose(finite, choose(vlt(vset(0.5), short_of_one), t, far), s)
    return choose(finite, mul(t, vset(o.softcap)), s)


cdef inline vec unbent(const Options *o, vec kept, vec *slope) noexcept nogil:
    """The bent scores from what was kept, and the slope there."""
    cdef vec one = vset(1), size = vabs(kept), t
    cdef mask near = vlt(size, one), finite = veq(sub(kept, kept), vset(0))
    size = choose(near, sub(one, size), mul(size, vset(1 / FAR_TANH)))  # 1 − |tanh|
    t = choose(near, kept, with_sign(sub(one, size), kept))
    slope[0] = choose(finite, mul(size, sub(vset(2), size)), one)
    return choose(finite, mul(t, vset(o.softcap)), kept)


# --- softmax ---------------------------------------------------------------------------------------------------------
cdef inline vec target_part(int layout, bint part, const Options *o, const Walk *w, Py_ssize_t k, ivec cls) noexcept nogil:
    """Vector k of a dense u."""
    cdef vec u
    if o.probabilities:
        u = row_numbers(layout, part, w, k)
    else:
        u = choose(ieq(cls, w.target), vset(o.at_target), vset(o.elsewhere))
    return u if o.class_weight == NULL else mul(u, class_numbers(layout, part, o.class_weight, k, w))


cdef inline vec less_product(vec total, vec weight, vec d) noexcept nogil:
    """total − weight · d; d may be −inf where the weight is 0."""
    return sub(total, mul(weight, choose(veq(weight, vset(0)), weight, d)))


cdef inline vec general_step(int layout, bint part, bint dense, const Options *o, const Walk *w, Py_ssize_t k, ivec cls,
                             vec m, Found *f, vec *keep) noexcept nogil:
    """Vector k of the first walk, and what is kept of it."""
    cdef vec one = vset(1), d, e, u
    cdef mask top
    d = mul(sub(bent(o, fetch(layout, part, w, k, <real> -INFINITY), keep), m), vset(o.per_temperature))
    e = vexp(d, vset(0))
    if o.softcap < 0:
        keep[0] = e
    top = veq(e, one)
    f.others, f.tops = add_unless(top, f.others, e), add_where(top, f.tops, one)
    if dense:
        u = target_part(layout, part, o, w, k, cls)
        f.u_others, f.u_tops = add_unless(top, f.u_others, u), add_where(top, f.u_tops, u)
        f.away = less_product(f.away, u, d)
    elif o.elsewhere != 0:
        f.away = sub(f.away, choose(past_end(layout, w, cls), vset(0), d) if part else d)
    if o.entropy:
        f.spread = less_product(f.spread, e, d)
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


cdef inline void walk_general(int layout, bint dense, bint keeps_some, const Options *o, const Walk *w, State *s,
                              vec *last) noexcept nogil:
    """Blocks of 16 vectors: their sums are added up exactly, so that rounding does not grow with the classes."""
    cdef Found f, all = nothing_found(), lost = nothing_found()
    cdef vec keep = vset(0), m = bent(o, s.m, &keep)
    cdef ivec cls = classes_of(layout, 0)
    cdef Py_ssize_t start, k, stop, whole
    for start in range(0, w.vectors, 16):
        f = nothing_found()
        stop = min(w.vectors, start + 16)
        whole = whole_vectors(layout, True, w, stop)
        for k in range(start, whole):
            general_step(layout, False, dense, o, w, k, cls, m, &f, &keep)
            fetch_ahead(layout, keeps_some, w, k)
            if layout == ROWED and dense and o.probabilities:
                prefetch(w.more + w.more_ahead + k * LANES)
            if keeps_some:
                vstore(kept(layout, w, k), keep)
            if dense:
                cls = next_classes(layout, cls)
        if layout == ROWED and whole < stop:
            if not dense:
                cls = classes_of(layout, whole)
            general_step(layout, True, dense, o, w, whole, cls, m, &f, last)
        add_exactly(&all.others, &lost.others, f.others)
        add_exactly(&all.away, &lost.away, f.away)
        if dense:
            add_exactly(&all.u_others, &lost.u_others, f.u_others)
        all.tops, all.u_tops, all.spread = add(all.tops, f.tops), add(all.u_tops, f.u_tops), add(all.spread, f.spread)
    # What an infinite sum lost is NaN.
    s.a, s.b = add(all.others, lost.others), choose(veq(lost.away, lost.away), add(all.away, lost.away), all.away)
    s.more[0], s.more[1], s.more[2] = all.tops, add(all.u_others, lost.u_others), all.u_tops
    s.more[3] = all.spread


cdef inline void open_general(int layout, bint keeps_some, const Options *o, const Walk *w, State *s, vec *last) noexcept nogil:
    if is_dense(o):
        walk_general(layout, True, keeps_some, o, w, s, last)
    else:
        walk_general(layout, False, keeps_some, o, w, s, last)


cdef inline vec settle_general(bint grad, const Options *o, State *s, vec factor) noexcept nogil:
    """Leaves in `more` what is left to ask for: z, and the entropy."""
    cdef vec zero = vset(0), one = vset(1), others = s.a, away = s.b, tops = s.more[0], u_others = s.more[1]
    cdef vec u_tops = s.more[2], u, d, e = zero, m, z, rest, loss, slope = one, top_pull, least = vset(o.at_target), keep = zero
    cdef vec total = exact_sum(tops, others, &rest), size = vlog(total, div(rest, total), zero, &d)
    cdef mask alone
    m = bent(o, s.m, &keep)
    if is_dense(o):
        u = add(u_others, u_tops)
    else:
        d = mul(sub(bent(o, s.target, &keep), m), vset(o.per_temperature))
        e = vexp(d, zero)
        if o.softcap >= 0:
            unbent(o, keep, &slope)
        u = vset(o.at_target + o.elsewhere * (o.classes - 1))
        u_others, u_tops = vset(o.elsewhere * (o.classes - 1)), least
        # at_target is (1 − ε) + ε / C, whose second part is among the others.
        away = less_product(mul(away, vset(o.elsewhere)) if o.elsewhere != 0 else zero, vset(o.at_target - o.elsewhere), d)
    z = add(mul(m, vset(o.per_temperature)), size)
    loss = add(mul(u, size), away)
    top_pull = sub(u_others, mul(u_tops, others))
    if o.z_loss != 0:
        loss = add(loss, mul(vset(o.z_loss), mul(z, z)))
        z = mul(vset(2 * o.z_loss), z)
        u, top_pull = add(u, z), add(top_pull, z)
        z = mul(z, vset(1 / (2 * o.z_loss)))
    if grad:
        factor = mul(factor, vset(o.per_temperature))
        alone = veq(tops, one)
        s.a, s.b, s.c = div(mul(factor, u), total), div(mul(factor, top_pull), total), factor
        s.mark = choose(alone, one, vset(<real> NAN))
        if not is_dense(o):  # s.b is the entry of the target, complete
            s.b = mul(choose(veq(e, s.mark), s.b, sub(mul(s.a, e), mul(factor, least))), slope)
    s.more[0], s.more[1] = z, add(size, div(s.more[3], total))
    if o.shard:
        s.more[0], s.more[1] = s.m, add(others, sub(tops, one))
    return loss


cdef inline vec general_slope(int layout, bint part, bint dense, const Options *o, const Walk *w, Py_ssize_t k, ivec cls,
                              const State *s, vec m, vec last) noexcept nogil:
    """Vector k of the gradient; where u is flat but for the target's entry."""
    cdef vec e = last if part else vload(kept(layout, w, k)), slope = vset(1), g
    if o.softcap >= 0:
        e = vexp(mul(sub(unbent(o, e, &slope), m), vset(o.per_temperature)), vset(0))
    if dense:
        g = choose(veq(e, s.mark), s.b, sub(mul(s.a, e), mul(s.c, target_part(layout, part, o, w, k, cls))))
    else:
        g = sub(mul(s.a, e), mul(s.c, vset(o.elsewhere)))
    return g if o.softcap < 0 else mul(g, slope)


cdef inline void walk_back(int layout, bint dense, const Options *o, const Walk *w, const State *s, vec last) noexcept nogil:
    cdef Py_ssize_t k, whole = w.classes // LANES if layout == ROWED else w.vectors
    cdef ivec cls = classes_of(layout, 0)
    cdef vec keep = s.m, slope, m = bent(o, s.m, &keep), g
    if o.softcap >= 0:
        m = unbent(o, keep, &slope)  # as scores are, so that e is exactly 1 at the largest
    for k in range(whole):
        g = general_slope(layout, False, dense, o, w, k, cls, s, m, last)
        if layout == LANED and not dense:
            g = choose(ieq(cls, w.target), s.b, g)
        put(layout, False, w, k, g)
        if layout == LANED or dense:
            cls = next_classes(layout, cls)
    if layout == ROWED and whole < w.vectors:
        put(layout, True, w, whole, general_slope(layout, True, dense, o, w, whole, cls, s, m, last))
    if layout == ROWED and not dense:
        put_at_target(ROWED, w, s.b)


cdef inline void close_general(int layout, const Options *o, const Walk *w, const State *s, vec last) noexcept nogil:
    if is_dense(o):
        walk_back(layout, True, o, w, s, last)
    else:
        walk_back(layout, False, o, w, s, last)


cdef inline vec stat(int layout, const Options *o, const Walk *w, int k) noexcept nogil:
    """Stat k of each lane's row."""
    cdef const real *p = w.more + k * o.stats_step
    return vload(p) if layout == LANED else vset(p[0])


cdef inline void open_from_stats(int layout, const Options *o, const Walk *w, vec factor, State *s) noexcept nogil:
    """The gradient, complete. Stats: the maximum times T; the factor of exponentials; the target's entry."""
    cdef vec m = stat(layout, o, w, 0), slope = vset(1), keep, g
    cdef vec pull = mul(mul(stat(layout, o, w, 1), vset(o.per_temperature)), factor)
    cdef Py_ssize_t k, whole = w.classes // LANES if layout == ROWED else w.vectors
    for k in range(w.vectors):
        g = fetch(layout, layout == ROWED and k == whole, w, k, <real> -INFINITY)
        g = bent(o, g, &keep)
        if o.softcap >= 0:
            unbent(o, keep, &slope)
        g = mul(mul(vexp(mul(sub(g, m), vset(o.per_temperature)), vset(0)), pull), slope)
        fetch_ahead(layout, True, w, k)
        put(layout, layout == ROWED and k == whole, w, k, g)
    put_at_target(layout, w, mul(stat(layout, o, w, 2), factor))
    s.a = s.b = s.more[0] = s.more[1] = s.more[2] = s.more[3] = vset(0)


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
