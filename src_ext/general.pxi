# The general form of the row losses: options read when it runs, which a plain row loss knows nothing of.
#
# Softmax. Scores are bent (softcap), then divided by the temperature T: d_j = (bent(s_j) − bent(max)) / T, e_j = exp(d_j),
# L = log Σ e. With u the target vector (of an index, smoothed, or probabilities; times the class weights), U = Σ u and
# z = bent(max) / T + L:
#
#     ℓ = U L − Σ u_j d_j + λ z²        gradient = ((U + 2 λ z) p − u) / T · bent'(s)        entropy = L − Σ p_j d_j
#
# No term of ℓ cancels another. In the gradient, U p − u does where one class has nearly all of both. So sums leave out one
# class k, the pivot, whose entry is Σ_{j≠k} u_j p_k − u_k Σ_{j≠k} p_j. Where u is the same for all classes but the target
# ("flat"), only the target can be such a class, and walks go over the scores alone; else ("dense") they go over u too, and
# the pivot is the lowest class that has the maximum; but of class weights none of which is more than all others together,
# no class but the target can be such a one, and Σ u is known (`even_weights`). As in the plain form, only blocks that hold
# the pivot or the target look at where their lanes are.
#
# Exponentials are kept for the second walk; with a softcap times the slope, which is kept beside them where u is more than
# the target.
#
# Hinge. Margins are those of the row's target, and the target may count: where scores are fetched, in `losses.pxi`.
#
# Shards of the classes. Stats are the first walk's: the maximum, the sum of exponentials and, in place of a loss, Σ u_j (−d_j).
# The gradient from the stats of all shards is one walk, from a maximum and a factor that are given; u is without a target,
# whose entry is given too.

cdef struct Found:
    # Sums over a row of what is walked over, each of its lanes on its own.
    vec others  # e of all classes but the pivot
    vec away  # dense: Σ u_j (−d_j); flat: Σ (−d_j)
    vec u_others  # dense: u of all classes but the pivot, and of it
    vec u_pivot  # (LANED)
    vec spread  # Σ e_j (−d_j)
    vec seen  # the bits of all probabilities, joined


cdef inline bint pivots_on_top(const Options *o) noexcept nogil:
    """Whether the pivot is the largest class, not the target."""
    return o.general and o.kind == SOFTMAX and (o.shard or (o.dense and not o.even_weights))


cdef inline bint keeps_slopes(const Options *o) noexcept nogil:
    """Whether slopes of the softcap are kept beside the exponentials."""
    return o.general and o.kind == SOFTMAX and o.bends and (o.elsewhere != 0 or o.dense)


cdef inline vec class_numbers(int layout, bint part, const real *of_class, Py_ssize_t k, const Walk *w) noexcept nogil:
    """One number for each class: those of vector k; 0 past the end."""
    if layout == LANED:
        return vset(of_class[k])
    if part:
        return vload_part(of_class + k * LANES, w.classes - k * LANES, 0)
    return vload(of_class + w.first + k * LANES)


cdef inline vec row_numbers(int layout, bint part, const Walk *w, Py_ssize_t k) noexcept nogil:
    """One number for each row and class (`Walk.more`): those of vector k; 0 past the end."""
    if layout == LANED:
        return vload(w.more + k * TILE)
    return class_numbers(layout, part, w.more, k, w)


# --- softcap ---------------------------------------------------------------------------------------------------------
# c · tanh(s / c); infinite scores stay as they are, so that a masked class does. Rows are bent in one of these ways, by the
# largest size of their scores beside c. But for the last, results are bent(s) / T in steps of exponentials of 2, relative to
# a whole number of steps, and softcap, temperature and log 2 are folded into coefficients.
cdef enum:
    FAR = 0  # number by number: whatever they are,
    NEAR = 1  # by a polynomial of s²,
    WIDE = 2  # or, of any finite size, by exponentials


cdef inline vec nearness(const Options *o, vec size) noexcept nogil:
    """How rows are bent whose scores are of at most this size."""
    return choose(vlt(size, vset(o.near_scores)), vset(NEAR), choose(vlt(size, vset(o.wide_scores)), vset(WIDE), vset(FAR)))


cdef inline vec bent_steps(int near, const Options *o, vec s, vec *slope) noexcept nogil:
    """bent(s) / T in steps, and the slope there in units, of rows that are not far."""
    cdef vec u
    if near == WIDE:
        return mul(tanh_of_steps(mul(s, vset(o.wide_steps)), vset(o.wide_slope_unit), slope), vset(o.wide_unit))
    u = odd_polynomial(o.bends_near, BENDS, s)
    slope[0] = sub(vset(o.slope_unit), mul(u, u))
    return u


cdef inline vec bent_as(const Options *o, vec near, vec s, vec *slope) noexcept nogil:
    """The same of one score of each row, as `near` says."""
    cdef vec u, steep
    cdef mask is_near = veq(near, vset(NEAR))
    u = bent_steps(NEAR, o, s, slope)
    if is_likely(all_lanes(is_near), 1):
        return u
    s = bent_steps(WIDE, o, s, &steep)
    slope[0] = choose(is_near, slope[0], steep)
    return choose(is_near, u, s)


cdef inline vec steps_of_origin(const Options *o, vec m, vec near) noexcept nogil:
    """What distances from the maximum m are computed with in rows that are not far; else as below."""
    cdef vec slope, steps = round_to_step(bent_as(o, near, m, &slope))
    cdef mask far = veq(near, vset(FAR))
    return steps if is_likely(none_of(far), 1) else choose(far, origin_of_distance(o, m), steps)


cdef inline vec distance(const Options *o, vec s, vec origin, vec *slope) noexcept nogil:
    """d of the scores s, and the slope there. origin: of the maximum, `origin_of_distance`."""
    cdef vec t, short_of_one, one = vset(1), x
    cdef mask finite, near
    if not o.bends:
        return mul(sub(s, origin), vset(o.per_temperature))
    x = mul(s, vset(o.per_softcap))
    near = vlt(vabs(x), vset(NEAR_TANH))
    if is_likely(all_lanes(near), 1):  # then it is half the work
        t = tanh_near(x)
        slope[0] = sub(one, mul(t, t))
        return product_less(t, vset(o.bent_unit), origin)
    t = vtanh(x, &short_of_one)
    finite = veq(sub(s, s), vset(0))
    # What is near has the bits that it would have among others that are.
    slope[0] = choose(near, sub(one, mul(t, t)), choose(finite, mul(short_of_one, sub(vset(2), short_of_one)), one))
    return choose(finite, product_less(t, vset(o.bent_unit), origin), sub(s, origin))


cdef inline vec origin_of_distance(const Options *o, vec m) noexcept nogil:
    """What distances from the maximum m are computed with: m itself, or where there is a softcap bent(m) / T."""
    cdef vec slope
    return distance(o, m, vset(0), &slope) if o.bends else m


# --- softmax ---------------------------------------------------------------------------------------------------------
cdef inline vec target_part(int layout, bint part, bint careful, const Options *o, const Walk *w, Py_ssize_t k,
                            ivec cls, vec *seen) noexcept nogil:
    """Vector k of a dense u; the bits of probabilities are joined to `seen`, unless that is NULL."""
    cdef vec u
    if not o.probabilities:
        u = class_numbers(layout, part, o.class_weight, k, w)
        return choose(ieq(cls, w.target), mul(u, vset(o.weighted_target)), u) if careful else u
    u = row_numbers(layout, part, w, k)
    if seen != NULL:
        seen[0] = join_bits(seen[0], u)
    return u if o.class_weight == NULL else mul(u, class_numbers(layout, part, o.class_weight, k, w))


cdef inline real target_at(const Options *o, const Walk *w, lane_int k, lane_int target) noexcept nogil:
    """Class k of a dense u (ROWED); 0 if it is none."""
    if k < 0:
        return 0
    if o.probabilities:
        return w.more[k] if o.class_weight == NULL else w.more[k] * o.class_weight[k]
    return o.class_weight[k] * o.weighted_target if k == target else o.class_weight[k]


cdef inline real *slopes_at(int layout, const Walk *w, Py_ssize_t k) noexcept nogil:
    """Where slopes of vector k are kept."""
    return w.slopes + k * (LANES if layout == ROWED else TILE)


cdef inline bint holds_either(int layout, const Walk *w, Py_ssize_t start, ivec pivot) noexcept nogil:
    """`is_careful` of a walk with a pivot."""
    return is_careful(layout, w, start) or start == block_of(ifirst(pivot))


cdef inline void general_step(int layout, bint part, bint careful, bint dense, int near, bint keeps_some, const Options *o,
                              const Walk *w, Py_ssize_t k, ivec cls, ivec pivot, vec origin, Found *f, vec *keep) noexcept nogil:
    """Vector k of the first walk, and what is kept of it. d is in steps where the row is not far."""
    cdef vec d, e, u, slope
    cdef mask left_out
    d = fetch(layout, part, w, k, 0 if near else <real> -INFINITY)
    if near:  # fewer multiplications, which is what a softcap costs
        d = bent_steps(near, o, d, &slope)
        e, d = vexp2(d, origin), sub(d, origin)
        if part:
            e = choose(past_end(layout, w, cls), vset(0), e)
    else:
        d = distance(o, d, origin, &slope)
        e = raised_exp(d, vset(0))
        if o.slopes_in_units:
            slope = mul(slope, vset(o.slope_unit))
    keep[0] = mul(e, slope) if o.bends else e
    if keeps_some and o.bends and o.spreads:
        vstore(slopes_at(layout, w, k), slope)
    if careful:
        left_out = ieq(cls, pivot)
        f.others = add_unless(left_out, f.others, e)
    else:
        f.others = add(f.others, e)
    if dense:
        u = target_part(layout, part, careful, o, w, k, cls, &f.seen)
        if careful and layout == LANED:
            f.u_pivot = add_where(left_out, f.u_pivot, u)
        if careful and not o.even_weights:
            f.u_others = add_unless(left_out, f.u_others, u)
        elif not o.even_weights:
            f.u_others = add(f.u_others, u)
        f.away = less_product(f.away, u, d)
    elif o.spreads:
        f.away = sub(f.away, choose(past_end(layout, w, cls), vset(0), d) if part else d)
    if o.entropy:
        f.spread = less_product(f.spread, e, d)


cdef inline Found nothing_found() noexcept nogil:
    cdef Found f
    cdef vec zero = vset(0)
    f.others, f.away, f.u_others, f.u_pivot, f.spread, f.seen = zero, zero, zero, zero, zero, zero
    return f


cdef inline Found general_block(int layout, bint careful, bint dense, int near, bint keeps_some, const Options *o, const Walk *w,
                                Py_ssize_t start, ivec pivot, vec origin, vec *last) noexcept nogil:
    cdef Found f = nothing_found()
    cdef vec keep = vset(0)
    cdef ivec cls = classes_of(layout, start)
    cdef Py_ssize_t k, stop = min(w.vectors, start + 16), whole = whole_vectors(layout, careful, w, stop)
    for k in range(start, whole):
        general_step(layout, False, careful, dense, near, keeps_some, o, w, k, cls, pivot, origin, &f, &keep)
        fetch_ahead(layout, keeps_some, w, k)
        if layout == ROWED and dense and o.probabilities:
            prefetch(w.more + w.more_ahead + k * LANES)
        if keeps_some:
            vstore(kept(layout, w, k), keep)
        if careful:
            cls = next_classes(layout, cls)
    if careful and whole < stop:
        general_step(layout, True, True, dense, near, keeps_some, o, w, whole, cls, pivot, origin, &f, last)
        fetch_ahead(layout, keeps_some, w, whole)
    return f


cdef inline Found general_blocks(int layout, bint careful, bint dense, int near, bint keeps_some, const Options *o,
                                 const Walk *w, Py_ssize_t start, ivec pivot, vec origin, vec *last) noexcept nogil:
    """`general_block` with `careful` as a constant."""
    if careful:
        return general_block(layout, True, dense, near, keeps_some, o, w, start, pivot, origin, last)
    return general_block(layout, False, dense, near, keeps_some, o, w, start, pivot, origin, last)


cdef inline void walk_general(int layout, bint dense, bint keeps_some, const Options *o, const Walk *w, State *s,
                              vec *last) noexcept nogil:
    """Blocks of 16 vectors, whose sums are added up so that rounding does not grow with the classes. State.c: the origin."""
    cdef Found f, all = nothing_found(), lost = all
    cdef vec origin = s.c
    cdef Py_ssize_t start
    cdef bint careful
    for start in range(0, w.vectors, 16):
        if layout == ROWED and STORED_IS_REAL and keeps_some and w.late != NULL:
            send_late(LATE_WEIGHED if dense else LATE_SHARE, w.late, start)
        careful = holds_either(layout, w, start, s.pivot)
        if o.slopes_in_units and w.near == NEAR:
            f = general_blocks(layout, careful, dense, NEAR, keeps_some, o, w, start, s.pivot, origin, last)
        elif o.slopes_in_units and w.near == WIDE:
            f = general_blocks(layout, careful or dense, dense, WIDE, keeps_some, o, w, start, s.pivot, origin, last)
        else:  # few rows, if there is a softcap
            f = general_blocks(layout, careful or o.slopes_in_units, dense, FAR, keeps_some, o, w, start, s.pivot, origin, last)
        add_block(start, f.others, &all.others, &lost.others)
        if o.spreads:
            add_block(start, f.away, &all.away, &lost.away)
        if dense and not o.even_weights:
            add_block(start, f.u_others, &all.u_others, &lost.u_others)
        if dense and layout == LANED:
            all.u_pivot = add(all.u_pivot, f.u_pivot)
        if dense and o.probabilities:
            all.seen = join_bits(all.seen, f.seen)
        all.spread = add(all.spread, f.spread)
    # What an infinite sum lost is NaN.
    s.a, s.b = add(all.others, lost.others), choose(veq(lost.away, lost.away), add(all.away, lost.away), all.away)
    s.more[0], s.more[1], s.more[2], s.more[3] = add(all.u_others, lost.u_others), all.u_pivot, all.spread, all.seen


cdef inline void open_general(int layout, bint keeps_some, const Options *o, const Walk *w, State *s, vec *last) noexcept nogil:
    if o.dense:
        walk_general(layout, True, keeps_some, o, w, s, last)
    else:
        walk_general(layout, False, keeps_some, o, w, s, last)


cdef inline void fold_general(const Options *o, const vec *b, const vec *u_others, const vec *spread,
                              const real *u_pivot, State *s) noexcept nogil:
    """What the lanes of LANES rows hold, one row a lane (ROWED), of what `fold` leaves out."""
    s.b = s.more[0] = s.more[1] = s.more[2] = vset(0)
    if o.dense:
        s.more[1] = vload(u_pivot)
    if o.dense and not o.even_weights:
        s.more[0] = transposed_sum(u_others)
    if o.spreads:
        s.b = transposed_sum(b)
    if o.entropy:
        s.more[2] = transposed_sum(spread)


cdef inline vec settle_general(bint grad, const Options *o, State *s, vec factor) noexcept nogil:
    """Leaves in `more` what is left to ask for: z, and the entropy."""
    cdef vec zero = vset(0), others = s.a, away = s.b, u_others = s.more[0], u_pivot = s.more[1], u, origin, off, d, e
    cdef vec total, rest, top, at = s.m if pivots_on_top(o) else s.target, bent
    cdef vec size, loss, pull, z, slope = vset(1), again = vset(1), steep = slope
    cdef mask far
    off = d = zero
    if not o.slopes_in_units or not is_likely(none_of(veq(s.near, vset(FAR))), 1):
        origin = origin_of_distance(o, s.m)
        off = distance(o, s.m, origin, &slope)
        d = sub(distance(o, at, origin, &slope), off)
        if o.bends:  # the origin is rounded, the maximum's distance from it is not 0
            again, origin = sub(again, off), add(origin, off)
        if o.slopes_in_units:
            slope = mul(slope, vset(o.slope_unit))
    if o.slopes_in_units:
        far = veq(s.near, vset(FAR))
        top, bent = bent_as(o, s.near, s.m, &steep), bent_as(o, s.near, at, &steep)
        again, slope = choose(far, again, vexp2(sub(s.c, top), zero)), choose(far, slope, steep)
        origin, off = choose(far, origin, mul(top, vset(<real> FL_LN2))), choose(far, off, mul(sub(top, s.c), vset(<real> FL_LN2)))
        # Where both are one score that is 0, though of one of both products the compiler may have kept what is rounded off.
        d = choose(far, d, choose(veq(at, s.m), zero, mul(sub(bent, top), vset(<real> FL_LN2))))
        if o.spreads:
            away = choose(far, away, mul(away, vset(<real> FL_LN2)))
        if o.entropy:
            s.more[2] = choose(far, s.more[2], mul(s.more[2], mul(again, vset(<real> FL_LN2))))
    e = raised_exp(d, zero)
    if o.bends:
        others = mul(others, again)
        away = add(away, mul(off, add(u_others, u_pivot) if o.dense else vset(o.classes)))
    total = exact_sum(e, others, &rest)
    size = vlog(total, div(rest, total), zero, &rest)
    if o.even_weights:
        u_others = sub(vset(o.all_weights), mul(u_pivot, vset(o.per_weighted_target)))
    if not o.dense:
        u_others, u_pivot = vset(o.elsewhere * (o.classes - 1)), vset(o.at_target)
        # at_target is (1 − ε) + ε / C, whose second part is among the others.
        away = less_product(mul(away, vset(o.elsewhere)) if o.elsewhere != 0 else zero, vset(o.at_target - o.elsewhere), d)
    u = add(u_others, u_pivot)
    z = add(origin if o.bends else mul(origin, vset(o.per_temperature)), size)
    loss = add(mul(u, size), away)
    pull = sub(mul(u_others, e), mul(u_pivot, others))
    s.more[0], s.more[1] = z, add(size, div(s.more[2], total))
    if o.bends:
        s.more[1] = add(s.more[1], off)
    if o.shard:
        s.more[0], s.more[1] = s.m, add(others, sub(d, d))  # NaN where m is infinite
        return away
    if o.z_loss != 0:
        loss = add(loss, mul(vset(o.z_loss), mul(z, z)))
        z = mul(vset(2 * o.z_loss), z)
        u, pull = add(u, z), add(pull, mul(z, e))
    if grad:
        s.c = mul(factor, vset(o.per_temperature))
        if o.slopes_in_units:
            again, slope = mul(again, vset(o.per_slope_unit)), mul(slope, vset(o.per_slope_unit))
        s.a, s.b = mul(div(mul(s.c, u), total), again), mul(div(mul(s.c, pull), total), slope)
        if o.slopes_in_units:
            s.c = mul(s.c, vset(o.per_slope_unit))
    return loss


cdef inline vec general_slope(int layout, bint part, bint careful, bint dense, const Options *o, const Walk *w,
                              Py_ssize_t k, ivec cls, const State *s, vec last) noexcept nogil:
    """Vector k of the gradient; where u is flat but for the target's entry."""
    cdef vec kept_there = last if part else vload(kept(layout, w, k)), u
    if o.spreads:
        u = mul(s.c, target_part(layout, part, careful, o, w, k, cls, NULL) if dense else vset(o.elsewhere))
        return product_less(s.a, kept_there, mul(u, vload(slopes_at(layout, w, k))) if o.bends else u)
    return mul(s.a, kept_there)


cdef inline vec with_pivot(const State *s, ivec cls, vec g) noexcept nogil:
    """A vector of the gradient, of the classes `cls`, that may hold the pivot's entry."""
    return choose(ieq(cls, s.pivot), s.b, g)


cdef inline void back_block(int layout, bint past, bint careful, bint dense, const Options *o, const Walk *w, Py_ssize_t start,
                            const State *s, vec last) noexcept nogil:
    cdef ivec cls = classes_of(layout, start)
    cdef vec g
    cdef Py_ssize_t k, stop = min(w.vectors, start + 16), whole = whole_vectors(layout, careful, w, stop)
    for k in range(start, whole):
        g = general_slope(layout, False, careful, dense, o, w, k, cls, s, last)
        if past:
            vstream(<real *> w.past + k * LANES, with_pivot(s, cls, g) if careful else g)
        else:
            put(layout, False, w, k, with_pivot(s, cls, g) if layout == LANED else g)
        if careful:
            cls = next_classes(layout, cls)
    if careful and whole < stop:
        put(layout, True, w, whole, general_slope(layout, True, True, dense, o, w, whole, cls, s, last))


cdef inline void back_blocks(int layout, bint past, bint dense, const Options *o, const Walk *w, const State *s,
                             vec last) noexcept nogil:
    cdef Py_ssize_t start
    for start in range(0, w.vectors, 16):
        if is_careful(layout, w, start) or (past and holds_either(layout, w, start, s.pivot)):
            back_block(layout, past, True, dense, o, w, start, s, last)
        else:
            back_block(layout, past, False, dense, o, w, start, s, last)


cdef inline void walk_back(int layout, bint dense, const Options *o, const Walk *w, const State *s, vec last) noexcept nogil:
    cdef Py_ssize_t end = w.classes // LANES
    cdef Walk inside
    cdef State shifted
    cdef vec head, tail
    if layout == LANED or not STORED_IS_REAL or w.past == NULL:
        back_blocks(layout, False, dense, o, w, s, last)
    else:
        inside, shifted = walk_past(w), s[0]
        shifted.pivot = iadd(s.pivot, iset(-<lane_int> inside.first))
        head = general_slope(ROWED, False, True, dense, o, w, 0, classes_of(ROWED, 0), s, last)
        tail = general_slope(ROWED, False, True, dense, o, w, end - 1, classes_of(ROWED, end - 1), s, last)
        if end < w.vectors:
            last = general_slope(ROWED, True, True, dense, o, w, end, classes_of(ROWED, end), s, last)
        back_blocks(ROWED, True, dense, o, &inside, &shifted, last)
        put_ends(w, head, tail, last)
    if layout == ROWED and 0 <= ifirst(s.pivot):
        sstore_one(w.dst + ifirst(s.pivot), first_lane(s.b))


cdef inline void close_general(int layout, const Options *o, const Walk *w, const State *s, vec last) noexcept nogil:
    if o.dense:
        walk_back(layout, True, o, w, s, last)
    else:
        walk_back(layout, False, o, w, s, last)


cdef inline vec less_of(const Options *o, vec factor) noexcept nogil:
    """What a gradient's entries have less than their share of what was kept (`general_slope`): in all, or times class weights."""
    if o.dense:
        return factor
    return mul(factor, vset(o.elsewhere)) if o.spreads else vset(0)


cdef inline vec stat(int layout, const Options *o, const Walk *w, int k) noexcept nogil:
    """Stat k of each lane's row."""
    cdef const real *p = w.more + k * o.stats_step
    return vload(p) if layout == LANED else vset(p[0])


cdef inline void open_from_stats(int layout, const Options *o, const Walk *w, vec factor, State *s) noexcept nogil:
    """The gradient, complete. Stats: the origin of distances; the factor of exponentials; the target's entry."""
    cdef vec m = stat(layout, o, w, 0), slope = vset(1), g, u
    cdef vec share = mul(vset(o.per_temperature), factor), pull = mul(stat(layout, o, w, 1), share)
    cdef Py_ssize_t k, whole = w.classes // LANES if layout == ROWED else w.vectors
    for k in range(w.vectors):
        g = fetch(layout, layout == ROWED and k == whole, w, k, <real> -INFINITY)
        g = mul(vexp(distance(o, g, m, &slope), vset(0)), pull)
        if o.spreads:
            u = vset(o.elsewhere)
            if o.dense:
                u = class_numbers(layout, layout == ROWED and k == whole, o.class_weight, k, w)
            g = sub(g, mul(u, share))
        g = mul(g, slope)
        fetch_ahead(layout, True, w, k)
        put(layout, layout == ROWED and k == whole, w, k, g)
    put_at_target(layout, w, mul(stat(layout, o, w, 2), factor))
    s.a = s.b = s.more[0] = s.more[1] = s.more[2] = vset(0)


# --- the largest class -----------------------------------------------------------------------------------------------
# A row without NaN is told by the sum of its scores, which is one operation for each vector; it is NaN too where both
# infinities are. Then the lowest class that has the maximum is found without a branch that depends on where it is. (To keep
# the class of the largest in each lane, which reads rows once, was no faster.)
cdef inline lane_int row_argmax(const Walk *w) noexcept nogil:
    """The lowest class that has the maximum, or the first NaN (ROWED): of rows that may have NaN."""
    cdef real m = sone(w.src), x
    cdef Py_ssize_t k, top = 0
    for k in range(w.classes):
        x = sone(w.src + k)
        if x != x:
            return <lane_int> k
        if x > m:
            m, top = x, k
    return <lane_int> top


cdef inline bint row_top(const Walk *w, vec *m) noexcept nogil:
    """The maximum of each lane, and whether all is known of the row (ROWED)."""
    cdef vec top = vset(<real> -INFINITY), second_top = top, x
    cdef vec first = vset(0), second = first
    cdef Py_ssize_t k, whole = w.classes // LANES
    for k in range(whole // 2):
        x = fetch(ROWED, False, w, 2 * k, 0)
        top, first = vmax(top, x), add(first, x)
        x = fetch(ROWED, False, w, 2 * k + 1, 0)
        second_top, second = vmax(second_top, x), add(second, x)
    if whole % 2:
        x = fetch(ROWED, False, w, whole - 1, 0)
        top, first = vmax(top, x), add(first, x)
    if whole < w.vectors:
        x = fetch(ROWED, True, w, whole, sone(w.src))  # a score once more changes neither the maximum nor whether there is NaN
        second_top, second = vmax(second_top, x), add(second, x)
    m[0], first = vmax(top, second_top), add(first, second)
    return none_of(unordered(first, first))


cdef inline lane_int class_of(const Walk *w, vec m) noexcept nogil:
    """The lowest class whose score is m; -1: none (ROWED)."""
    cdef Py_ssize_t k = 0, least = w.classes
    cdef uint64_t found = 0
    for k in range(w.classes // (4 * LANES)):
        if none_of(mor(mor(veq(fetch(ROWED, False, w, 4 * k, 0), m), veq(fetch(ROWED, False, w, 4 * k + 1, 0), m)),
                       mor(veq(fetch(ROWED, False, w, 4 * k + 2, 0), m), veq(fetch(ROWED, False, w, 4 * k + 3, 0), m)))):
            continue
        found = bits_of(veq(fetch(ROWED, False, w, 4 * k, 0), m))
        found |= bits_of(veq(fetch(ROWED, False, w, 4 * k + 1, 0), m)) << LANES
        found |= bits_of(veq(fetch(ROWED, False, w, 4 * k + 2, 0), m)) << 2 * LANES
        found |= bits_of(veq(fetch(ROWED, False, w, 4 * k + 3, 0), m)) << 3 * LANES
        return <lane_int> (4 * k * LANES + first_bit(found))
    for k in range(w.vectors - 1, w.classes // (4 * LANES) * 4 - 1, -1):
        found = found << LANES | bits_of(veq(fetch(ROWED, k * LANES + LANES > w.classes, w, k, <real> -INFINITY), m))
    if found:
        least = w.classes // (4 * LANES) * 4 * LANES + first_bit(found)
    return <lane_int> least if least < w.classes else -1


cdef inline ivec tile_top(const Walk *w, vec m) noexcept nogil:
    """The lowest class of each lane whose score is m; -1: none (LANED)."""
    cdef ivec top = iset(-1)
    cdef Py_ssize_t k
    for k in range(w.vectors - 1, -1, -1):
        top = ichoose(veq(vload(w.tile + k * TILE), m), iset(<lane_int> k), top)
    return top


cdef inline ivec tile_argmax(const Walk *w) noexcept nogil:
    """The lowest class of each lane that has the maximum, or the first NaN (LANED)."""
    cdef ivec cls = iset(0), top = cls, bad = iset(<lane_int> w.classes)
    cdef vec x, m = vload(w.tile), total = m
    cdef mask more
    cdef Py_ssize_t k
    for k in range(1, w.vectors):
        x = vload(w.tile + k * TILE)
        m, total = vmax(m, x), add(total, x)
    if is_likely(all_lanes(veq(total, total)), 1):
        return tile_top(w, m)
    m = vload(w.tile)
    for k in range(w.vectors):
        x = vload(w.tile + k * TILE)
        more = vlt(m, x)
        m, top = choose(more, x, m), ichoose(more, cls, top)
        bad = imin(bad, ichoose(unordered(x, x), cls, bad))
        cls = next_classes(LANED, cls)
    return ichoose(ige(bad, iset(<lane_int> w.classes)), top, bad)
