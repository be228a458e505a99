# Row losses: from the scores of some rows and their targets to the row losses, and the gradient in place of the scores.
#
# A row loss is written per lane and works in either layout of a tile:
#   lanes   (layout LANED)  a vector holds one class of LANES rows; vectors of a class are TILE apart; lanes never mix
#   rows    (layout ROWED)  a vector holds LANES classes of one row; sums and maxima are folded over the lanes
# `layout`, `grad`, `power` are constants where the functions are called, so each call is compiled for its case alone.
#
# Cost: softmax reads the scores twice and, for the gradient, writes and scales the exponentials; all but the first read
# find the row in cache. Sums over classes are blocked by 64 vectors, so that rounding does not grow with C.

cdef enum:
    LANED = 0
    ROWED = 1

cdef enum:
    SOFTMAX = 0
    HINGE = 1
    HINGE_MAX = 2

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
    Py_ssize_t step  # numbers from one vector to the next
    Py_ssize_t vectors
    Py_ssize_t classes
    ivec target  # of each lane (LANED), or the same in all (ROWED)


cdef inline Walk walk_lanes(real *tile, Py_ssize_t c, ivec target) noexcept nogil:
    cdef Walk w
    w.src, w.dst, w.step, w.vectors, w.classes, w.target = tile, tile, TILE, c, c, target
    return w


cdef inline Walk walk_row(const real *src, real *dst, Py_ssize_t c, lane_int target) noexcept nogil:
    cdef Walk w
    w.src, w.dst, w.step, w.vectors, w.classes, w.target = src, dst, LANES, (c + LANES - 1) // LANES, c, iset(target)
    return w


cdef inline ivec classes_of(int layout, Py_ssize_t k) noexcept nogil:
    """The class that each lane of vector k holds."""
    return iadd(iota(), iset(<lane_int> (k * LANES))) if layout == ROWED else iset(<lane_int> k)


cdef inline mask at_target(int layout, const Walk *w, Py_ssize_t k) noexcept nogil:
    return ieq(classes_of(layout, k), w.target)


cdef inline mask not_wrong(int layout, const Walk *w, Py_ssize_t k) noexcept nogil:
    """Lanes that hold no wrong class: the target, or past the last class."""
    cdef mask m = at_target(layout, w, k)
    if layout == ROWED and (k + 1) * LANES > w.classes:
        m = mor(m, ige(classes_of(layout, k), iset(<lane_int> w.classes)))
    return m


cdef inline vec fetch(int layout, const Walk *w, const real *p, Py_ssize_t k, real fill) noexcept nogil:
    cdef Py_ssize_t left
    if layout == ROWED:
        left = w.classes - k * LANES
        if left < LANES:
            return vload_part(p + k * LANES, left, fill)
        return vload(p + k * LANES)
    return vload(p + k * TILE)


cdef inline void put(int layout, const Walk *w, Py_ssize_t k, vec v) noexcept nogil:
    cdef Py_ssize_t left
    if layout == ROWED:
        left = w.classes - k * LANES
        if left < LANES:
            vstore_part(w.dst + k * LANES, v, left)
        else:
            vstore(w.dst + k * LANES, v)
    else:
        vstore(w.dst + k * TILE, v)


cdef inline vec fold_sum(int layout, vec v) noexcept nogil:
    return vset(lane_sum(v)) if layout == ROWED else v


cdef inline vec fold_max(int layout, vec v) noexcept nogil:
    return vset(lane_max(v)) if layout == ROWED else v


cdef inline vec target_score(int layout, const Walk *w) noexcept nogil:
    cdef vec s
    cdef Py_ssize_t k
    cdef lane_int y[32]
    if layout == ROWED:
        store_lanes(y, w.target)
        return vset(w.src[y[0]])
    s = vset(0)
    for k in range(w.vectors):
        s = choose(at_target(layout, w, k), vload(w.src + k * TILE), s)
    return s


cdef extern from *:
    """
    static inline __attribute__((always_inline)) void fl_store_lanes(lane_int *to, ivec v) { memcpy(to, &v, sizeof v); }
    """
    void store_lanes "fl_store_lanes" (lane_int *, ivec) noexcept nogil


cdef inline vec row_max(int layout, const Walk *w) noexcept nogil:
    cdef vec m = vset(<real> -INFINITY)
    cdef Py_ssize_t k
    for k in range(w.vectors):
        m = vmax(m, fetch(layout, w, w.src, k, <real> -INFINITY))
    return fold_max(layout, m)


cdef inline vec row_exps(int layout, bint keep, bint spare, const Walk *w, vec m) noexcept nogil:
    """Σ exp(s − m), without the target where it is spared; the exponentials are kept in dst (0 at a spared target)."""
    cdef vec total = vset(0), part, e
    cdef Py_ssize_t start, k
    for start in range(0, w.vectors, 64):
        part = vset(0)
        for k in range(start, min(w.vectors, start + 64)):
            e = vexp(sub(fetch(layout, w, w.src, k, <real> -INFINITY), m))
            if spare:
                e = choose(at_target(layout, w, k), vset(0), e)
            if keep:
                put(layout, w, k, e)
            part = add(part, e)
        total = add(total, part)
    return fold_sum(layout, total)


cdef inline vec log_sum(vec total, vec others, mask top) noexcept nogil:
    """log(total); where `top`, total is 1 + others and the logarithm that of the exact sum (log1p)."""
    cdef vec lost = div(sub(others, sub(total, vset(1))), total)
    return add(vlog(total), choose(top, lost, vset(0)))


cdef inline vec softmax(int layout, bint grad, const Walk *w, vec factor) noexcept nogil:
    """log Σ exp(s − m) − (s_y − m), and factor · (p − e_y), whose entry at the target is −Σ_{j≠y} p_j."""
    cdef vec m = row_max(layout, w), st = target_score(layout, w), others, total, r, g
    cdef vec below = sub(st, m)
    cdef Py_ssize_t k
    others = row_exps(layout, grad, True, w, m)
    total = add(others, vexp(below))
    if grad:
        r = div(factor, total)
        g = mul(others, sub(vset(0), r))
        for k in range(w.vectors):
            put(layout, w, k, choose(at_target(layout, w, k), g, mul(fetch(layout, w, w.dst, k, 0), r)))
    return sub(log_sum(total, others, veq(st, m)), below)


cdef inline vec hinge(int layout, bint grad, int power, const Options *o, const Walk *w, vec factor) noexcept nogil:
    """Σ_{j≠y} max(0, m_j)^power with m_j = s_j − s_y + Δ. `not m_j <= 0` is active, so that NaN is never swallowed."""
    cdef vec st = target_score(layout, w), zero = vset(0), one = vset(1), two = vset(2)
    cdef vec loss = zero, pull = zero, part, some, m, active, d, share
    cdef Py_ssize_t start, k
    share = mul(factor, vset(o.per_class))
    for start in range(0, w.vectors, 64):
        part = some = zero
        for k in range(start, min(w.vectors, start + 64)):
            m = add(sub(fetch(layout, w, w.src, k, 0), st), vset(o.margin))
            m = choose(not_wrong(layout, w, k), zero, m)
            active = choose(vle(m, zero), zero, m)
            part = add(part, active if power == 1 else mul(active, active))
            if grad:
                d = choose(vlt(zero, m), one, active) if power == 1 else mul(two, active)
                some = add(some, d)
                put(layout, w, k, mul(d, share))
        loss = add(loss, part)
        pull = add(pull, some)
    if grad:
        pull = mul(fold_sum(layout, pull), sub(zero, share))
        target_gradient(layout, w, pull)
    return mul(fold_sum(layout, loss), vset(o.per_class))


cdef inline void target_gradient(int layout, const Walk *w, vec g) noexcept nogil:
    """Write the gradient's entry at the target."""
    cdef Py_ssize_t k
    cdef lane_int y[32]
    cdef real lanes[32]
    if layout == ROWED:
        store_lanes(y, w.target)
        vstore(lanes, g)
        w.dst[y[0]] = lanes[0]
    else:
        for k in range(w.vectors):
            put(layout, w, k, choose(at_target(layout, w, k), g, vload(w.dst + k * TILE)))


cdef inline vec hinge_max(int layout, bint grad, const Options *o, const Walk *w, vec factor) noexcept nogil:
    """max(0, max_{j≠y} m_j)^power: the first NaN, else the lowest class that has the largest margin."""
    cdef vec st = target_score(layout, w), zero = vset(0), best = vset(<real> -INFINITY), m, active, d
    cdef ivec index = iset(0), cls
    cdef mask better
    cdef Py_ssize_t k
    for k in range(w.vectors):
        m = add(sub(fetch(layout, w, w.src, k, 0), st), vset(o.margin))
        m = choose(not_wrong(layout, w, k), vset(<real> -INFINITY), m)
        better = mandnot(veq(best, best), vle(m, best))
        best = choose(better, m, best)
        index = ichoose(better, classes_of(layout, k), index)
    if layout == ROWED:
        fold_best(&best, &index)
    active = choose(vle(best, zero), zero, best)
    if grad:
        if o.power == 1:
            d = choose(vlt(zero, best), vset(1), active)
        else:
            d = mul(vset(2), active)
        d = mul(d, factor)
        for k in range(w.vectors):
            cls = classes_of(layout, k)
            m = choose(ieq(cls, w.target), sub(zero, d), choose(ieq(cls, index), d, zero))
            put(layout, w, k, m)
    return active if o.power == 1 else mul(active, active)


cdef inline void fold_best(vec *best, ivec *index) noexcept nogil:
    """Over the lanes: the lowest class with NaN, else the lowest class with the largest value; to all lanes."""
    cdef real value[32]
    cdef lane_int cls[32]
    cdef int k, top = 0
    vstore(value, best[0])
    store_lanes(cls, index[0])
    for k in range(1, LANES):
        if value[top] != value[top]:
            if value[k] != value[k] and cls[k] < cls[top]:
                top = k
        elif not value[k] <= value[top] or (value[k] == value[top] and cls[k] < cls[top]):
            top = k
    best[0] = vset(value[top])
    index[0] = iset(cls[top])


cdef inline vec row_loss(int layout, bint grad, const Options *o, const Walk *w, vec factor) noexcept nogil:
    """The one door to the row losses: losses of the rows; gradients, times `factor`, in dst."""
    if o.kind == SOFTMAX:
        return softmax(layout, grad, w, factor)
    if o.kind == HINGE_MAX:
        return hinge_max(layout, grad, o, w, factor)
    if o.power == 1:
        return hinge(layout, grad, 1, o, w, factor)
    return hinge(layout, grad, 2, o, w, factor)


cdef int read_options(Options *o, kind, margin, power, over, Py_ssize_t c) except -1:
    memset(o, 0, sizeof(Options))
    o.kind = SOFTMAX if kind == "softmax" else HINGE_MAX if over == "max" else HINGE
    o.power, o.margin = power, margin
    o.per_class = <real> (1.0 / c) if over == "mean" else 1
    return 0


# --- softmax, log-softmax and log-sum-exp ----------------------------------------------------------------------------
cdef enum:
    PROBABILITIES = 0
    LOG_PROBABILITIES = 1
    LOG_SUM = 2


cdef inline vec transform_walk(int layout, int kind, const Walk *w) noexcept nogil:
    """softmax or log-softmax into dst, or the log-sum-exp as result.

    The first maximum plays the part of the target: its exponential is 1 and is spared from the sum.
    """
    cdef vec m = row_max(layout, w), others, total, log, r
    cdef Walk top = w[0]
    cdef Py_ssize_t k
    top.target = first_equal(layout, w, m)
    others = row_exps(layout, kind == PROBABILITIES, True, &top, m)
    total = add(others, vexp(sub(m, m)))
    log = log_sum(total, others, veq(m, m))
    if kind == PROBABILITIES:
        r = div(vset(1), total)
        for k in range(w.vectors):
            put(layout, w, k, choose(at_target(layout, &top, k), r, mul(fetch(layout, w, w.dst, k, 0), r)))
    elif kind == LOG_PROBABILITIES:
        for k in range(w.vectors):
            put(layout, w, k, sub(sub(fetch(layout, w, w.src, k, 0), m), log))
    return limit_of_log_sum(layout, w, m, add(m, log)) if kind == LOG_SUM else log


cdef inline ivec first_equal(int layout, const Walk *w, vec m) noexcept nogil:
    """The first class whose score is m; 0 where there is none (NaN)."""
    cdef ivec index = iset(<lane_int> w.classes), cls
    cdef lane_int lanes[32]
    cdef int lane, first
    cdef Py_ssize_t k
    for k in range(w.vectors - 1, -1, -1):
        cls = classes_of(layout, k)
        index = ichoose(veq(fetch(layout, w, w.src, k, <real> NAN), m), cls, index)
    if layout == ROWED:
        store_lanes(lanes, index)
        first = lanes[0]
        for lane in range(1, LANES):
            first = min(first, lanes[lane])
        index = iset(first)
    return ichoose(ige(index, iset(<lane_int> w.classes)), iset(0), index)


cdef inline vec limit_of_log_sum(int layout, const Walk *w, vec m, vec z) noexcept nogil:
    """Where m is infinite the sum met inf − inf: its limit is m, unless the row holds NaN."""
    cdef vec bad = vset(0), x
    cdef mask infinite = mandnot(veq(m, m), veq(sub(m, m), vset(0)))
    cdef Py_ssize_t k
    if lane_max(choose(infinite, vset(1), vset(0))) == 0:
        return z
    for k in range(w.vectors):
        x = fetch(layout, w, w.src, k, 0)
        bad = choose(veq(x, x), bad, vset(1))
    bad = fold_max(layout, bad)
    return choose(mandnot(infinite, veq(bad, vset(1))), m, z)
