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
# Exponentials are kept for the second walk; with a softcap they are kept times the slope where u is 0 but at the target,
# else computed again, from what is kept then, tanh.
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


cdef inline bint keeps_slope(const Options *o) noexcept nogil:
    """Whether exponentials are kept times the slope of the softcap."""
    return not o.bends or (o.elsewhere == 0 and not o.dense)


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
# Rows whose scores are all small beside it, or not much larger, are bent by one polynomial of s², into which softcap,
# temperature and log 2 are folded: bent(s) / T in steps of exponentials of 2, which are relative to a whole number of steps.
cdef enum:
    FAR = 0  # how a row is bent: number by number,
    NEAR = 1  # by a short polynomial,
    FAIRLY_NEAR = 2  # or by a longer one


cdef inline vec nearness(const Options *o, vec size) noexcept nogil:
    """How rows are bent whose scores are of at most this size."""
    return choose(vlt(size, vset(o.near_scores)), vset(NEAR),
                  choose(vlt(size, vset(o.fairly_near_scores)), vset(FAIRLY_NEAR), vset(FAR)))


cdef inline vec bent_steps(int near, const Options *o, vec s) noexcept nogil:
    """bent(s) / T in steps, of rows that are near or fairly near."""
    if near == NEAR:
        return odd_polynomial(o.bends_near, BENDS, s)
    return odd_polynomial(o.bends_fair, FAIR_BENDS, mul(s, vset(o.per_softcap)))


cdef inline vec bent_maximum(const Options *o, vec m, vec near) noexcept nogil:
    """The same of maxima, as `near` says."""
    return choose(veq(near, vset(NEAR)), bent_steps(NEAR, o, m), bent_steps(FAIRLY_NEAR, o, m))


cdef inline vec steps_of_origin(const Options *o, vec m, vec near) noexcept nogil:
    """What distances from the maximum m are computed with in rows that are not far; else as below."""
    return choose(veq(near, vset(FAR)), origin_of_distance(o, m), round_to_step(bent_maximum(o, m, near)))


cdef inline vec from_maximum(const Options *o, vec m, vec near, vec steps) noexcept nogil:
    """What exponentials relative to `steps` are multiplied by to be relative to the maximum m, in rows that are not far."""
    return vexp2(sub(steps, bent_maximum(o, m, near)), vset(0))


cdef inline vec distance(const Options *o, vec s, vec origin, vec *keep, vec *slope) noexcept nogil:
    """d of the scores s, what is kept of them, and the slope there. origin: of the maximum, `origin_of_distance`."""
    cdef vec t, short_of_one, far, one = vset(1), x
    cdef mask finite
    if not o.bends:
        return mul(sub(s, origin), vset(o.per_temperature))
    x = mul(s, vset(o.per_softcap))
    if is_likely(all_lanes(vlt(mul(x, x), vset(NEAR_TANH * NEAR_TANH))), 1):  # then it is half the work
        t = tanh_near(x)
        keep[0], slope[0] = t, sub(one, mul(t, t))
        return product_less(t, vset(o.bent_unit), origin)
    t = vtanh(x, &short_of_one)
    finite = veq(sub(s, s), vset(0))
    slope[0] = choose(finite, mul(short_of_one, sub(vset(2), short_of_one)), one)
    far = with_sign(mul(vmax(short_of_one, vset(1 / FAR_TANH)), vset(FAR_TANH)), s)
    keep[0] = choose(finite, choose(vlt(vset(0.5), short_of_one), t, far), s)
    return choose(finite, product_less(t, vset(o.bent_unit), origin), sub(s, origin))


cdef inline vec origin_of_distance(const Options *o, vec m) noexcept nogil:
    """What distances from the maximum m are computed with: m itself, or where there is a softcap bent(m) / T."""
    cdef vec keep, slope
    return distance(o, m, vset(0), &keep, &slope) if o.bends else m


cdef inline vec distance_again(const Options *o, vec kept, vec origin, vec *slope) noexcept nogil:
    """The same from what was kept, with a softcap."""
    cdef vec one = vset(1), size = vabs(kept), t
    cdef mask near = vlt(size, one), finite = veq(sub(kept, kept), vset(0))
    size = choose(near, sub(one, size), mul(size, vset(1 / FAR_TANH)))  # 1 − |tanh|
    t = choose(near, kept, with_sign(sub(one, size), kept))
    slope[0] = choose(finite, mul(size, sub(vset(2), size)), one)
    return choose(finite, product_less(t, vset(o.bent_unit), origin), sub(kept, origin))


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


cdef inline bint holds_either(int layout, const Walk *w, Py_ssize_t start, ivec pivot) noexcept nogil:
    """`is_careful` of a walk with a pivot."""
    return is_careful(layout, w, start) or start == ifirst(pivot) // (16 * LANES) * 16


cdef inline void general_step(int layout, bint part, bint careful, bint dense, int near, const Options *o, const Walk *w,
                              Py_ssize_t k, ivec cls, ivec pivot, vec origin, Found *f, vec *keep) noexcept nogil:
    """Vector k of the first walk, and what is kept of it."""
    cdef vec d, e, u, slope
    cdef mask left_out
    d = fetch(layout, part, w, k, 0 if near else <real> -INFINITY)
    if near:  # fewer multiplications, which is what a softcap costs
        u = bent_steps(near, o, d)
        slope, e = sub(vset(o.slope_unit), mul(u, u)), vexp2(u, origin)
        if part:
            e = choose(past_end(layout, w, cls), vset(0), e)
    else:
        d = distance(o, d, origin, keep, &slope)
        e = vexp(d, vset(0))
        if o.slopes_in_units:
            slope = mul(slope, vset(o.slope_unit))
    if not o.bends:
        keep[0] = e
    elif keeps_slope(o):
        keep[0] = mul(e, slope)
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
    elif o.elsewhere != 0:
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
        general_step(layout, False, careful, dense, near, o, w, k, cls, pivot, origin, &f, &keep)
        fetch_ahead(layout, keeps_some, w, k)
        if layout == ROWED and dense and o.probabilities:
            prefetch(w.more + w.more_ahead + k * LANES)
        if keeps_some:
            vstore(kept(layout, w, k), keep)
        if careful:
            cls = next_classes(layout, cls)
    if careful and whole < stop:
        general_step(layout, True, True, dense, near, o, w, whole, cls, pivot, origin, &f, last)
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
        careful = holds_either(layout, w, start, s.pivot)
        if o.slopes_in_units and w.near == NEAR:
            f = general_blocks(layout, careful, dense, NEAR, keeps_some, o, w, start, s.pivot, origin, last)
        elif o.slopes_in_units and w.near == FAIRLY_NEAR:
            f = general_block(layout, True, dense, FAIRLY_NEAR, keeps_some, o, w, start, s.pivot, origin, last)
        else:
            f = general_blocks(layout, careful, dense, FAR, keeps_some, o, w, start, s.pivot, origin, last)
        add_block(start, f.others, &all.others, &lost.others)
        if dense or o.elsewhere != 0:
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
        s.more[0] = transposed_sum(u_others, 1)
    if o.dense or o.elsewhere != 0:
        s.b = transposed_sum(b, 1)
    if o.entropy:
        s.more[2] = transposed_sum(spread, 1)


cdef inline vec settle_general(bint grad, const Options *o, State *s, vec factor) noexcept nogil:
    """Leaves in `more` what is left to ask for: z, and the entropy."""
    cdef vec zero = vset(0), others = s.a, away = s.b, u_others = s.more[0], u_pivot = s.more[1], u, origin, off, d, e
    cdef vec total, rest
    cdef vec size, loss, pull, z, keep = zero, slope = vset(1), again = vset(1)
    origin = origin_of_distance(o, s.m)
    off = distance(o, s.m, origin, &keep, &slope)
    d = sub(distance(o, s.m if pivots_on_top(o) else s.target, origin, &keep, &slope), off)
    e = vexp(d, zero)
    if o.bends:  # the origin is rounded, the maximum's distance from it is not 0
        again = sub(again, off)
        if o.slopes_in_units:
            again = choose(veq(s.near, vset(FAR)), again, from_maximum(o, s.m, s.near, s.c))
        others, origin = mul(others, again), add(origin, off)
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
    s.more[0], s.more[1] = z, add(size, add(div(s.more[2], total), sub(vset(1), again)))
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
            again = mul(again, vset(o.per_slope_unit))
        s.a, s.b = mul(div(mul(s.c, u), total), again), mul(div(mul(s.c, pull), total), slope)
    return loss


cdef inline vec general_slope(int layout, bint part, bint careful, bint dense, const Options *o, const Walk *w,
                              Py_ssize_t k, ivec cls, const State *s, vec origin, vec last) noexcept nogil:
    """Vector k of the gradient; where u is flat but for the target's entry."""
    cdef vec e = last if part else vload(kept(layout, w, k)), slope = vset(1), g
    if not keeps_slope(o):
        e = vexp(distance_again(o, e, origin, &slope), vset(0))
    g = sub(mul(s.a, e), mul(s.c, target_part(layout, part, careful, o, w, k, cls, NULL) if dense else vset(o.elsewhere)))
    return g if keeps_slope(o) else mul(g, slope)


cdef inline void back_block(int layout, bint careful, bint dense, const Options *o, const Walk *w, Py_ssize_t start,
                            const State *s, vec origin, vec last) noexcept nogil:
    cdef ivec cls = classes_of(layout, start)
    cdef vec g
    cdef Py_ssize_t k, stop = min(w.vectors, start + 16), whole = whole_vectors(layout, careful, w, stop)
    for k in range(start, whole):
        g = general_slope(layout, False, careful, dense, o, w, k, cls, s, origin, last)
        if layout == LANED:
            g = choose(ieq(cls, s.pivot), s.b, g)
        put(layout, False, w, k, g)
        if careful:
            cls = next_classes(layout, cls)
    if careful and whole < stop:
        put(layout, True, w, whole, general_slope(layout, True, True, dense, o, w, whole, cls, s, origin, last))


cdef inline void walk_back(int layout, bint dense, const Options *o, const Walk *w, const State *s, vec last) noexcept nogil:
    cdef vec origin = s.m
    cdef Py_ssize_t start
    if not keeps_slope(o):
        origin = origin_of_distance(o, s.m)
    for start in range(0, w.vectors, 16):
        if is_careful(layout, w, start):
            back_block(layout, True, dense, o, w, start, s, origin, last)
        else:
            back_block(layout, False, dense, o, w, start, s, origin, last)
    if layout == ROWED and 0 <= ifirst(s.pivot):
        sstore_one(w.dst + ifirst(s.pivot), first_lane(s.b))


cdef inline void close_general(int layout, const Options *o, const Walk *w, const State *s, vec last) noexcept nogil:
    if o.dense:
        walk_back(layout, True, o, w, s, last)
    else:
        walk_back(layout, False, o, w, s, last)


cdef inline vec stat(int layout, const Options *o, const Walk *w, int k) noexcept nogil:
    """Stat k of each lane's row."""
    cdef const real *p = w.more + k * o.stats_step
    return vload(p) if layout == LANED else vset(p[0])


cdef inline void open_from_stats(int layout, const Options *o, const Walk *w, vec factor, State *s) noexcept nogil:
    """The gradient, complete. Stats: the origin of distances; the factor of exponentials; the target's entry."""
    cdef vec m = stat(layout, o, w, 0), slope = vset(1), keep, g, u
    cdef vec share = mul(vset(o.per_temperature), factor), pull = mul(stat(layout, o, w, 1), share)
    cdef Py_ssize_t k, whole = w.classes // LANES if layout == ROWED else w.vectors
    for k in range(w.vectors):
        g = fetch(layout, layout == ROWED and k == whole, w, k, <real> -INFINITY)
        g = mul(vexp(distance(o, g, m, &keep, &slope), vset(0)), pull)
        if o.dense or o.elsewhere != 0:
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
