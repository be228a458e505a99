# Row losses: from the scores of some rows and their targets to the row losses, and the gradient in place of the scores.
#
# A row loss is written per lane and works in either layout of a tile:
#   lanes   (layout LANED)  a vector holds one class of LANES rows; vectors of a class are TILE apart; lanes never mix
#   rows    (layout ROWED)  a vector holds LANES classes of one row; sums and maxima are folded over the lanes
# It has three parts. `open_rows` walks over the scores and leaves what it found in a State; `settle` computes with the
# States of several rows, one a lane, in either layout (logarithms and divisions are never for one row); `close_rows` walks
# over the classes again, for the gradient. `layout` and `grad` are constants where they are called, so each call is
# compiled for its case alone.
#
# Classes are walked in blocks of 16 vectors. A block's sum is added to the sum of blocks, so that rounding grows little
# with C; and only a block that holds the target, or the end of a row, looks at where its lanes are (`careful`).
#
# Cost: softmax reads the scores twice and, for the gradient, writes and scales the exponentials; all but the first read
# find the row in cache. softmax, log-softmax and log-sum-exp are row losses too, whose target is the first maximum.

cdef enum:
    LANED = 0
    ROWED = 1

cdef enum:
    SOFTMAX = 0
    HINGE = 1
    HINGE_MAX = 2
    PROBABILITIES = 3
    LOG_PROBABILITIES = 4
    LOG_SUM = 5

cdef struct Options:
    # What a plain row loss reads.
    int kind
    int power
    real margin
    real per_class  # 1, or 1 / C for over="mean"
    # What the general form will read (map the scores, core, map the gradient back): until it is compiled, the backend
    # refuses losses that set them.
    real smoothing, z_loss, softcap, temperature
    const real *class_weight
    const real *pair_margins

cdef struct Walk:
    # How a row loss walks over the classes of a tile, in either layout.
    const real *src
    real *dst
    Py_ssize_t vectors
    Py_ssize_t classes
    Py_ssize_t target_block  # where the block starts that holds the target (ROWED)
    Py_ssize_t src_ahead, dst_ahead  # numbers from a row to that which is walked over a group later (ROWED)
    ivec target  # of each lane (LANED), or the same in all (ROWED)


cdef inline Walk walk_lanes(real *tile, Py_ssize_t c, ivec target) noexcept nogil:
    cdef Walk w
    w.src, w.dst, w.vectors, w.classes, w.target = tile, tile, c, c, target
    w.target_block = w.src_ahead = w.dst_ahead = 0
    return w


cdef inline Walk walk_row(const real *src, real *dst, Py_ssize_t c, lane_int target) noexcept nogil:
    cdef Walk w
    w.src, w.dst, w.vectors, w.classes = src, dst, (c + LANES - 1) // LANES, c
    w.target_block, w.target = target // (16 * LANES) * 16, iset(target)
    w.src_ahead = w.dst_ahead = 0
    return w


cdef inline ivec classes_of(int layout, Py_ssize_t k) noexcept nogil:
    """The class that each lane of vector k holds."""
    return iadd(iota(), iset(<lane_int> (k * LANES))) if layout == ROWED else iset(<lane_int> k)


cdef inline ivec next_classes(int layout, ivec classes) noexcept nogil:
    return iadd(classes, iset(LANES if layout == ROWED else 1))


cdef inline Py_ssize_t whole_vectors(int layout, bint careful, const Walk *w, Py_ssize_t stop) noexcept nogil:
    """Where the vectors before `stop` end that are full."""
    return min(stop, w.classes // LANES) if layout == ROWED and careful else stop


cdef inline mask at_target(int layout, const Walk *w, Py_ssize_t k) noexcept nogil:
    return ieq(classes_of(layout, k), w.target)


cdef inline mask not_wrong(int layout, const Walk *w, Py_ssize_t k) noexcept nogil:
    """Lanes that hold no wrong class: the target, or past the last class."""
    cdef mask m = at_target(layout, w, k)
    if layout == ROWED and (k + 1) * LANES > w.classes:
        m = mor(m, ige(classes_of(layout, k), iset(<lane_int> w.classes)))
    return m


cdef inline bint is_careful(int layout, const Walk *w, Py_ssize_t start) noexcept nogil:
    """Whether the block of 16 vectors from `start` on holds the target, or the end of a row."""
    if layout == LANED:
        return True
    return start == w.target_block or (start + 16) * LANES > w.classes


cdef inline vec fetch(int layout, bint careful, const Walk *w, const real *p, Py_ssize_t k, real fill) noexcept nogil:
    cdef Py_ssize_t left
    if layout == ROWED and careful:
        left = w.classes - k * LANES
        if left < LANES:
            return vload_part(p + k * LANES, left, fill)
    return vload(p + k * (LANES if layout == ROWED else TILE))


cdef inline void fetch_ahead(int layout, bint writes, const Walk *w, Py_ssize_t k) noexcept nogil:
    """Ask for what is walked over next, while this is computed with."""
    if layout == ROWED:
        prefetch(w.src + w.src_ahead + k * LANES)
        if writes:
            prefetch_to_write(w.dst + w.dst_ahead + k * LANES)


cdef inline void put(int layout, bint careful, const Walk *w, Py_ssize_t k, vec v) noexcept nogil:
    cdef Py_ssize_t left
    if layout == ROWED and careful:
        left = w.classes - k * LANES
        if left < LANES:
            vstore_part(w.dst + k * LANES, v, left)
            return
    vstore(w.dst + k * (LANES if layout == ROWED else TILE), v)


cdef inline vec fold_sum(int layout, vec v) noexcept nogil:
    return vset(lane_sum(v)) if layout == ROWED else v


cdef inline vec fold_max(int layout, vec v) noexcept nogil:
    return vset(lane_max(v)) if layout == ROWED else v


cdef inline vec target_score(int layout, const Walk *w) noexcept nogil:
    cdef vec s
    cdef Py_ssize_t k
    if layout == ROWED:
        return vset(w.src[ifirst(w.target)])
    s = vset(0)
    for k in range(w.vectors):
        s = choose(at_target(layout, w, k), vload(w.src + k * TILE), s)
    return s


cdef inline void put_at_target(int layout, const Walk *w, vec v) noexcept nogil:
    """v to dst at the target."""
    cdef Py_ssize_t k
    if layout == ROWED:
        w.dst[ifirst(w.target)] = first_lane(v)
    else:
        for k in range(w.vectors):
            put(layout, True, w, k, choose(at_target(layout, w, k), v, vload(w.dst + k * TILE)))


cdef inline vec row_max(int layout, const Walk *w) noexcept nogil:
    cdef vec m = vset(<real> -INFINITY)
    cdef Py_ssize_t k, whole = w.classes // LANES if layout == ROWED else w.vectors
    for k in range(whole):
        m = vmax(m, fetch(layout, False, w, w.src, k, 0))
    if whole < w.vectors:
        m = vmax(m, fetch(layout, True, w, w.src, whole, <real> -INFINITY))
    return fold_max(layout, m)


cdef inline vec block_exps(int layout, bint careful, bint keep, const Walk *w, Py_ssize_t start, vec m,
                           vec *last) noexcept nogil:
    cdef vec total = vset(0), e
    cdef ivec cls = classes_of(layout, start)
    cdef Py_ssize_t k, stop = min(w.vectors, start + 16), whole = whole_vectors(layout, careful, w, stop)
    for k in range(start, whole):
        e = vexp(sub(fetch(layout, False, w, w.src, k, 0), m))
        if careful:
            e = choose(ieq(cls, w.target), vset(0), e)
            cls = next_classes(layout, cls)
        fetch_ahead(layout, keep, w, k)
        if keep:
            put(layout, False, w, k, e)
        total = add(total, e)
    if careful and whole < stop:
        e = vexp(sub(fetch(layout, True, w, w.src, whole, <real> -INFINITY), m))
        last[0] = choose(ieq(cls, w.target), vset(0), e)
        total = add(total, last[0])
    return total


cdef inline vec row_exps(int layout, bint keep, const Walk *w, vec m, vec *last) noexcept nogil:
    """Σ exp(s − m) without the target; the exponentials are kept in dst, 0 at the target.

    Those of the last vector of a row, if it is not full, are kept in `last`: part of a vector that has just been written
    cannot be read again without a stall.
    """
    cdef vec total = vset(0)
    cdef Py_ssize_t start
    for start in range(0, w.vectors, 16):
        if is_careful(layout, w, start):
            total = add(total, block_exps(layout, True, keep, w, start, m, last))
        else:
            total = add(total, block_exps(layout, False, keep, w, start, m, last))
    return fold_sum(layout, total)


cdef inline void scale(int layout, const Walk *w, vec last, vec r, vec target) noexcept nogil:
    """What row_exps kept, times r, to dst; but `target` at the target."""
    cdef Py_ssize_t k, whole = w.classes // LANES
    if layout == LANED:
        for k in range(w.vectors):
            put(LANED, False, w, k, choose(at_target(LANED, w, k), target, mul(vload(w.dst + k * TILE), r)))
        return
    for k in range(whole):
        put(ROWED, False, w, k, mul(fetch(ROWED, False, w, w.dst, k, 0), r))
    if whole < w.vectors:
        put(ROWED, True, w, whole, mul(last, r))
    put_at_target(ROWED, w, target)


cdef struct State:
    # What is known of some rows, one a lane, or of one row, the same in all lanes.
    vec a
    vec b
    vec c
    ivec index


cdef inline vec log_sum(vec total, vec others, mask top) noexcept nogil:
    """log(total); where `top`, total is 1 + others and the logarithm that of the exact sum (log1p)."""
    cdef vec lost = div(sub(others, sub(total, vset(1))), total)
    return add(vlog(total), choose(top, lost, vset(0)))


# --- softmax -------------------------------------------------------------------------------------------------------
# ℓ = log Σ exp(s − m) − (s_y − m); gradient p − e_y, whose entry at the target is −Σ_{j≠y} p_j.
cdef inline void open_softmax(int layout, bint grad, const Walk *w, vec m, State *s, vec *last) noexcept nogil:
    s.b = sub(target_score(layout, w), m)
    s.a = row_exps(layout, grad, w, m, last)


cdef inline vec settle_softmax(bint grad, State *s, vec factor) noexcept nogil:
    cdef vec others = s.a, below = s.b, total = add(others, vexp(below))
    if grad:
        s.a = div(factor, total)
        s.b = mul(others, sub(vset(0), s.a))
    return sub(log_sum(total, others, veq(below, vset(0))), below)


# --- hinge ---------------------------------------------------------------------------------------------------------
# Σ_{j≠y} max(0, m_j)^power with m_j = s_j − s_y + Δ. `not m_j <= 0` is active, so that NaN is never swallowed.
cdef inline vec hinge_step(int layout, bint careful, bint grad, int power, const Walk *w, Py_ssize_t k, vec m,
                           vec share, vec *pull) noexcept nogil:
    """One vector of margins: its losses; its gradient to dst, and added to pull."""
    cdef vec zero = vset(0), active = choose(vle(m, zero), zero, m), d
    if grad:
        d = choose(vlt(zero, m), vset(1), active) if power == 1 else mul(vset(2), active)
        pull[0] = add(pull[0], d)
        put(layout, careful, w, k, mul(d, share))
    return active if power == 1 else mul(active, active)


cdef inline vec block_hinge(int layout, bint careful, bint grad, int power, const Options *o, const Walk *w,
                            Py_ssize_t start, vec st, vec share, vec *pull) noexcept nogil:
    cdef vec loss = vset(0), some = vset(0), zero = vset(0), m
    cdef ivec cls = classes_of(layout, start)
    cdef Py_ssize_t k, stop = min(w.vectors, start + 16), whole = whole_vectors(layout, careful, w, stop)
    for k in range(start, whole):
        m = add(sub(fetch(layout, False, w, w.src, k, 0), st), vset(o.margin))
        if careful:
            m = choose(ieq(cls, w.target), zero, m)
            cls = next_classes(layout, cls)
        fetch_ahead(layout, grad, w, k)
        loss = add(loss, hinge_step(layout, False, grad, power, w, k, m, share, &some))
    if careful and whole < stop:
        m = add(sub(fetch(layout, True, w, w.src, whole, 0), st), vset(o.margin))
        m = choose(not_wrong(layout, w, whole), zero, m)
        loss = add(loss, hinge_step(layout, True, grad, power, w, whole, m, share, &some))
    pull[0] = add(pull[0], some)
    return loss


cdef inline void open_hinge(int layout, bint grad, int power, const Options *o, const Walk *w, vec factor,
                            State *s) noexcept nogil:
    cdef vec st = target_score(layout, w), loss = vset(0), pull = vset(0), share = mul(factor, vset(o.per_class))
    cdef Py_ssize_t start
    for start in range(0, w.vectors, 16):
        if is_careful(layout, w, start):
            loss = add(loss, block_hinge(layout, True, grad, power, o, w, start, st, share, &pull))
        else:
            loss = add(loss, block_hinge(layout, False, grad, power, o, w, start, st, share, &pull))
    s.a, s.b = fold_sum(layout, loss), fold_sum(layout, pull)


cdef inline vec settle_hinge(const Options *o, State *s, vec factor) noexcept nogil:
    s.b = mul(s.b, sub(vset(0), mul(factor, vset(o.per_class))))
    return mul(s.a, vset(o.per_class))


# --- hinge, over="max" -----------------------------------------------------------------------------------------------
# max(0, max_{j≠y} m_j)^power: the first NaN, else the lowest class that has the largest margin.
cdef inline void open_hinge_max(int layout, const Options *o, const Walk *w, State *s) noexcept nogil:
    cdef vec st = target_score(layout, w), m
    cdef mask better
    cdef Py_ssize_t k
    s.a, s.index = vset(<real> -INFINITY), iset(0)
    for k in range(w.vectors):
        m = add(sub(fetch(layout, True, w, w.src, k, 0), st), vset(o.margin))
        m = choose(not_wrong(layout, w, k), vset(<real> -INFINITY), m)
        better = mandnot(veq(s.a, s.a), vle(m, s.a))
        s.a = choose(better, m, s.a)
        s.index = ichoose(better, classes_of(layout, k), s.index)
    if layout == ROWED:
        fold_best(&s.a, &s.index)


cdef inline void fold_best(vec *best, ivec *index) noexcept nogil:
    """Over the lanes: the lowest class with NaN, else the lowest class with the largest value; to all lanes."""
    cdef real value[32]
    cdef lane_int cls[32]
    cdef int k, top = 0
    vstore(value, best[0])
    istore(cls, index[0])
    for k in range(1, LANES):
        if value[top] != value[top]:
            if value[k] != value[k] and cls[k] < cls[top]:
                top = k
        elif not value[k] <= value[top] or (value[k] == value[top] and cls[k] < cls[top]):
            top = k
    best[0] = vset(value[top])
    index[0] = iset(cls[top])


cdef inline vec settle_hinge_max(const Options *o, State *s, vec factor) noexcept nogil:
    cdef vec active = choose(vle(s.a, vset(0)), vset(0), s.a), slope
    if o.power == 1:
        slope = choose(vlt(vset(0), s.a), vset(1), active)
    else:
        slope = mul(vset(2), active)
    s.a = mul(slope, factor)
    return active if o.power == 1 else mul(active, active)


cdef inline void close_hinge_max(int layout, const Walk *w, const State *s) noexcept nogil:
    cdef vec zero = vset(0), v
    cdef ivec cls
    cdef Py_ssize_t k
    for k in range(w.vectors):
        cls = classes_of(layout, k)
        v = choose(ieq(cls, w.target), sub(zero, s.a), choose(ieq(cls, s.index), s.a, zero))
        put(layout, True, w, k, v)


# --- softmax, log-softmax and log-sum-exp themselves -----------------------------------------------------------------
cdef inline void find_first(int layout, Walk *w, vec m) noexcept nogil:
    """Make the first class whose score is m the target; class 0 where there is none (NaN)."""
    cdef ivec index = iset(<lane_int> w.classes)
    cdef lane_int lanes[32]
    cdef lane_int first
    cdef int lane
    cdef Py_ssize_t k
    for k in range(w.vectors - 1, -1, -1):
        index = ichoose(veq(fetch(layout, True, w, w.src, k, <real> NAN), m), classes_of(layout, k), index)
    if layout == ROWED:
        istore(lanes, index)
        first = lanes[0]
        for lane in range(1, LANES):
            first = min(first, lanes[lane])
        index = iset(first)
        w.target_block = first // (16 * LANES) * 16 if first < w.classes else 0
    w.target = ichoose(ige(index, iset(<lane_int> w.classes)), iset(0), index)


cdef inline vec holds_nan(int layout, const Walk *w) noexcept nogil:
    """1 for rows with NaN in them."""
    cdef vec bad = vset(0), x
    cdef Py_ssize_t k
    for k in range(w.vectors):
        x = fetch(layout, True, w, w.src, k, 0)
        bad = choose(veq(x, x), bad, vset(1))
    return fold_max(layout, bad)


cdef inline mask is_infinite(vec x) noexcept nogil:
    return mandnot(veq(x, x), veq(sub(x, x), vset(0)))


cdef inline void open_transform(int layout, int kind, Walk *w, vec m, State *s, vec *last) noexcept nogil:
    find_first(layout, w, m)
    s.c, s.b = m, vset(0)
    if kind == LOG_SUM and lane_max(choose(is_infinite(m), vset(1), vset(0))) > 0:
        s.b = holds_nan(layout, w)
    s.a = row_exps(layout, kind == PROBABILITIES, w, m, last)


cdef inline vec settle_transform(int kind, State *s) noexcept nogil:
    """The log-sum-exp. Where the maximum is infinite that is NaN, and its limit for `logsumexp`, unless there is NaN."""
    cdef vec others = s.a, m = s.c, total = add(others, vexp(sub(m, m))), log = log_sum(total, others, veq(m, m)), z
    z = add(m, log)
    if kind == PROBABILITIES:
        s.a = s.b = div(vset(1), total)
    elif kind == LOG_PROBABILITIES:
        s.a = log
    else:
        z = choose(mandnot(is_infinite(m), veq(s.b, vset(1))), m, z)
    return z


cdef inline void close_log_probabilities(int layout, const Walk *w, const State *s) noexcept nogil:
    cdef Py_ssize_t k
    for k in range(w.vectors):
        put(layout, True, w, k, sub(sub(fetch(layout, True, w, w.src, k, 0), s.c), s.a))


# --- the doors to all of them ----------------------------------------------------------------------------------------
cdef inline vec look_ahead(int layout, const Options *o, const Walk *w) noexcept nogil:
    """What `open_rows` has to know first: the maximum, for the softmax family.

    It is a walk of its own, over all rows of a group, so that no row waits for the folding of its maximum.
    """
    return vset(0) if o.kind == HINGE or o.kind == HINGE_MAX else row_max(layout, w)


cdef inline void open_rows(int layout, bint grad, const Options *o, Walk *w, vec factor, vec m, State *s,
                           vec *last) noexcept nogil:
    """First walk over one row (ROWED) or LANES rows (LANED), whose maximum is m."""
    if o.kind == SOFTMAX:
        open_softmax(layout, grad, w, m, s, last)
    elif o.kind == HINGE_MAX:
        open_hinge_max(layout, o, w, s)
    elif o.kind == HINGE and o.power == 1:
        open_hinge(layout, grad, 1, o, w, factor, s)
    elif o.kind == HINGE:
        open_hinge(layout, grad, 2, o, w, factor, s)
    elif o.kind == PROBABILITIES:
        open_transform(layout, PROBABILITIES, w, m, s, last)
    else:
        open_transform(layout, o.kind, w, m, s, last)


cdef inline vec settle(bint grad, const Options *o, State *s, vec factor) noexcept nogil:
    """Losses of LANES rows; and in the State what the gradient needs, times `factor`."""
    if o.kind == SOFTMAX:
        return settle_softmax(grad, s, factor)
    if o.kind == HINGE:
        return settle_hinge(o, s, factor)
    if o.kind == HINGE_MAX:
        return settle_hinge_max(o, s, factor)
    return settle_transform(o.kind, s)


cdef inline void close_rows(int layout, const Options *o, const Walk *w, const State *s, vec last) noexcept nogil:
    """Second walk: the gradient, complete in dst."""
    if o.kind == SOFTMAX or o.kind == PROBABILITIES:
        scale(layout, w, last, s.a, s.b)
    elif o.kind == HINGE:
        put_at_target(layout, w, s.b)
    elif o.kind == HINGE_MAX:
        close_hinge_max(layout, w, s)
    else:
        close_log_probabilities(layout, w, s)


cdef dict _KINDS = {
    "softmax": SOFTMAX, "hinge": HINGE,
    "transform softmax": PROBABILITIES, "transform log_softmax": LOG_PROBABILITIES, "transform logsumexp": LOG_SUM,
}


cdef int read_options(Options *o, kind, margin, power, over, Py_ssize_t c) except -1:
    if c > 0x7fffffff - 16:
        raise ValueError(f"scores have {c} classes; the kernels count them in 31 bits")
    memset(o, 0, sizeof(Options))
    o.kind = HINGE_MAX if over == "max" else _KINDS[kind]
    o.power, o.margin = power, margin
    o.per_class = <real> (1.0 / c) if over == "mean" else 1
    return 0
