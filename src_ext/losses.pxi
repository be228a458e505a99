# Row losses: from the scores of some rows and their targets to the row losses, and the gradient in place of the scores.
#
# A row loss is written per lane and works in either layout of a tile:
#   lanes   (layout LANED)  a vector holds one class of LANES rows; vectors of a class are TILE apart; lanes never mix
#   rows    (layout ROWED)  a vector holds LANES classes of one row; sums and maxima are folded over the lanes
# `layout`, `grad`, `power` are constants where the functions are called, so each call is compiled for its case alone.
#
# Classes are walked in blocks of 16 vectors. A block's sum is added to the sum of blocks, so that rounding grows little
# with C; and only a block that holds the target, or the end of a row, looks at where its lanes are (`careful`).
#
# Cost: softmax reads the scores twice and, for the gradient, writes and scales the exponentials; all but the first read
# find the row in cache.

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
    Py_ssize_t vectors
    Py_ssize_t classes
    Py_ssize_t target_block  # where the block starts that holds the target (ROWED)
    ivec target  # of each lane (LANED), or the same in all (ROWED)


cdef inline Walk walk_lanes(real *tile, Py_ssize_t c, ivec target) noexcept nogil:
    cdef Walk w
    w.src, w.dst, w.vectors, w.classes, w.target_block, w.target = tile, tile, c, c, 0, target
    return w


cdef inline Walk walk_row(const real *src, real *dst, Py_ssize_t c, lane_int target) noexcept nogil:
    cdef Walk w
    w.src, w.dst, w.vectors, w.classes = src, dst, (c + LANES - 1) // LANES, c
    w.target_block, w.target = target // (16 * LANES) * 16, iset(target)
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


cdef inline void put_at_target(int layout, const Walk *w, vec v) noexcept nogil:
    """v to dst at the target."""
    cdef Py_ssize_t k
    cdef lane_int y[32]
    cdef real lanes[32]
    if layout == ROWED:
        store_lanes(y, w.target)
        vstore(lanes, v)
        w.dst[y[0]] = lanes[0]
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
    cdef Py_ssize_t k
    for k in range(start, min(w.vectors, start + 16)):
        e = vexp(sub(fetch(layout, careful, w, w.src, k, <real> -INFINITY), m))
        if careful:
            e = choose(at_target(layout, w, k), vset(0), e)
        if layout == ROWED and careful and (k + 1) * LANES > w.classes:
            last[0] = e
        elif keep:
            put(layout, False, w, k, e)
        total = add(total, e)
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


cdef inline vec log_sum(vec total, vec others, mask top) noexcept nogil:
    """log(total); where `top`, total is 1 + others and the logarithm that of the exact sum (log1p)."""
    cdef vec lost = div(sub(others, sub(total, vset(1))), total)
    return add(vlog(total), choose(top, lost, vset(0)))


cdef inline vec softmax(int layout, bint grad, const Walk *w, vec factor) noexcept nogil:
    """log Σ exp(s − m) − (s_y − m), and factor · (p − e_y), whose entry at the target is −Σ_{j≠y} p_j."""
    cdef vec m = row_max(layout, w), st = target_score(layout, w), others, total, r
    cdef vec below = sub(st, m), last = vset(0)
    others = row_exps(layout, grad, w, m, &last)
    total = add(others, vexp(below))
    if grad:
        r = div(factor, total)
        scale(layout, w, last, r, mul(others, sub(vset(0), r)))
    return sub(log_sum(total, others, veq(st, m)), below)


cdef inline vec block_hinge(int layout, bint careful, bint grad, int power, const Options *o, const Walk *w,
                            Py_ssize_t start, vec st, vec share, vec *pull) noexcept nogil:
    cdef vec loss = vset(0), some = vset(0), zero = vset(0), m, active, d
    cdef Py_ssize_t k
    for k in range(start, min(w.vectors, start + 16)):
        m = add(sub(fetch(layout, careful, w, w.src, k, 0), st), vset(o.margin))
        if careful:
            m = choose(not_wrong(layout, w, k), zero, m)
        active = choose(vle(m, zero), zero, m)
        loss = add(loss, active if power == 1 else mul(active, active))
        if grad:
            d = choose(vlt(zero, m), vset(1), active) if power == 1 else mul(vset(2), active)
            some = add(some, d)
            put(layout, careful, w, k, mul(d, share))
    pull[0] = add(pull[0], some)
    return loss


cdef inline vec hinge(int layout, bint grad, int power, const Options *o, const Walk *w, vec factor) noexcept nogil:
    """Σ_{j≠y} max(0, m_j)^power with m_j = s_j − s_y + Δ. `not m_j <= 0` is active, so that NaN is never swallowed."""
    cdef vec st = target_score(layout, w), loss = vset(0), pull = vset(0), share = mul(factor, vset(o.per_class))
    cdef Py_ssize_t start
    for start in range(0, w.vectors, 16):
        if is_careful(layout, w, start):
            loss = add(loss, block_hinge(layout, True, grad, power, o, w, start, st, share, &pull))
        else:
            loss = add(loss, block_hinge(layout, False, grad, power, o, w, start, st, share, &pull))
    if grad:
        put_at_target(layout, w, mul(fold_sum(layout, pull), sub(vset(0), share)))
    return mul(fold_sum(layout, loss), vset(o.per_class))


cdef inline vec hinge_max(int layout, bint grad, const Options *o, const Walk *w, vec factor) noexcept nogil:
    """max(0, max_{j≠y} m_j)^power: the first NaN, else the lowest class that has the largest margin."""
    cdef vec st = target_score(layout, w), zero = vset(0), best = vset(<real> -INFINITY), m, active, d
    cdef ivec index = iset(0), cls
    cdef mask better
    cdef Py_ssize_t k
    for k in range(w.vectors):
        m = add(sub(fetch(layout, True, w, w.src, k, 0), st), vset(o.margin))
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
            put(layout, True, w, k, m)
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
    if c > 0x7fffffff:
        raise ValueError(f"scores have {c} classes; the kernels count them in 31 bits")
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
    cdef vec m = row_max(layout, w), others, total, log, r, last = vset(0)
    cdef Walk top = w[0]
    cdef Py_ssize_t k
    find_first(layout, &top, m)
    others = row_exps(layout, kind == PROBABILITIES, &top, m, &last)
    total = add(others, vexp(sub(m, m)))
    log = log_sum(total, others, veq(m, m))
    if kind == PROBABILITIES:
        r = div(vset(1), total)
        scale(layout, &top, last, r, r)
    elif kind == LOG_PROBABILITIES:
        for k in range(w.vectors):
            put(layout, True, w, k, sub(sub(fetch(layout, True, w, w.src, k, 0), m), log))
    return limit_of_log_sum(layout, w, m, add(m, log)) if kind == LOG_SUM else log


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
        store_lanes(lanes, index)
        first = lanes[0]
        for lane in range(1, LANES):
            first = min(first, lanes[lane])
        index = iset(first)
        w.target_block = first // (16 * LANES) * 16 if first < w.classes else 0
    w.target = ichoose(ige(index, iset(<lane_int> w.classes)), iset(0), index)


cdef inline vec limit_of_log_sum(int layout, const Walk *w, vec m, vec z) noexcept nogil:
    """Where m is infinite the sum met inf − inf: its limit is m, unless the row holds NaN."""
    cdef vec bad = vset(0), x
    cdef mask infinite = mandnot(veq(m, m), veq(sub(m, m), vset(0)))
    cdef Py_ssize_t k
    if lane_max(choose(infinite, vset(1), vset(0))) == 0:
        return z
    for k in range(w.vectors):
        x = fetch(layout, True, w, w.src, k, 0)
        bad = choose(veq(x, x), bad, vset(1))
    bad = fold_max(layout, bad)
    return choose(mandnot(infinite, veq(bad, vset(1))), m, z)
