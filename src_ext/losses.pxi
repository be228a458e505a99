# Row losses: from the scores of some rows and their targets to the row losses, and the gradient.
#
# A row loss is written per lane and works in either layout of a tile:
#   lanes   (layout LANED)  a vector holds one class of LANES rows; vectors of a class are TILE apart; lanes never mix
#   rows    (layout ROWED)  a vector holds LANES classes of one row; sums and maxima are folded over the lanes
# It has three parts. `open_rows` walks over the scores and leaves what it found in a State; the driver of the layout folds
# it (`fold`) for several rows at once; `settle` computes with the States of several rows, one a lane, in either layout
# (logarithms and divisions are never for one row); `close_rows` walks over the classes again, for the gradient. `layout`
# and `grad` are constants where they are called, so each call is compiled for its case alone.
#
# Classes are walked in blocks of 16 vectors. A block's sum is added to the sum of blocks, so that rounding grows little
# with C (softmax: not at all); and only a block that holds the target, or the end of a row, looks at where its lanes are
# (`careful`).
#
# Cost: softmax reads the scores twice, of many classes once, and, for the gradient, keeps and scales the exponentials; all but
# the first read find the row in cache. softmax, log-softmax and log-sum-exp are row losses too, without a target.

cdef enum:
    LANED = 0
    ROWED = 1
    # Those of given scores that know their losses: short.pxi, packed.pxi, narrow.pxi, thin.pxi.
    SHORT = 2
    PACKED = 3
    NARROW = 4
    THIN = 5

cdef enum:
    SOFTMAX = 0
    HINGE = 1
    HINGE_MAX = 2
    PROBABILITIES = 3
    LOG_PROBABILITIES = 4
    LOG_SUM = 5
    FROM_STATS = 6
    LOGISTIC = 7

cdef enum:
    # Forms that a row loss is compiled in.
    PLAIN = 0
    MANY = 9  # the same, for rows of many classes: they may be sent late (`Late`), and need no walk for the maximum (`glance`)
    # Of the softmax, as general.pxi has them:
    FLAT = 1  # without a softcap,
    WEIGHED = 2  # the same, u being class weights that are even,
    GIVEN = 3  # or probabilities
    BENT = 4  # a softcap, and no other u than at the target
    BENT_ANY = 8  # a softcap, and whatever else there is
    UNEVEN = 7  # u being class weights of which one is more than all others together
    # Of the hinge:
    PAIRED = 5  # margins of class pairs, no more
    # The logistic loss has GIVEN for targets (N, C) without weights of columns or smoothing.
    ANY = 6  # whatever options there are; of the softmax, if there are more forms, but for a softcap

cdef enum:
    MANY_CLASSES = 384  # from which on gradients go past the caches from a walk, and plain rows have the form MANY
    GLANCE = 8  # vectors whose maximum is taken for the row's,
    GLANCE_SIZE = 24  # if their scores are no larger in size,
    GLANCE_BEYOND = 20  # and the row's, as the walk finds it, is no more above (and the gradient's factor is of a usual size)

cdef enum:
    # How what is left of a row is sent past the caches (see `late_value`).
    LATE_SHARE = 0
    LATE_WEIGHED = 1
    LATE_LOG = 2
    LATE_ZEROS = 3

cdef struct Options:
    # What a plain row loss reads.
    int kind
    int power
    real margin
    real per_class  # 1, or 1 / C for over="mean"
    real classes
    # What the general form reads too (general.pxi).
    bint general
    bint many  # the form is MANY
    real at_target, elsewhere  # u of the target and of other classes, before class weights
    bint spreads  # whether u may be more than the target's: set by `fix_form`
    real z_loss
    real per_softcap, bent_unit  # 1 / softcap; and softcap / T
    real bends_near[11]  # a polynomial that bends small scores; 1 / (T log 2) included
    # The same of any finite size: 2 / (softcap log 2); bent_unit / log 2; 4 times its square.
    real wide_steps, wide_unit, wide_slope_unit
    # Below which size; 0 where coefficients would be no normal numbers, or values too large.
    real near_scores, wide_scores
    bint slopes_in_units  # slopes are times (bent_unit / log 2)^2
    real slope_unit, per_slope_unit  # that, and 1 / that
    real per_temperature
    Steps steps  # of exponentials of scores / T; unit 0: T is of no usual size
    # What u is multiplied by, smoothing / C of an index target included; NULL: all 1. Logistic: what targets 0 count in
    # each column, then what targets 1 do.
    const real *class_weight
    real weighted_target, per_weighted_target  # u of an index target, and 1 of other classes, before that
    bint even_weights  # they are part of u, and none is more than all others together
    real all_weights  # their sum then
    bint probabilities  # u comes with the rows
    bint dense  # u is not the same for all classes but the target
    bint bends  # there is a softcap
    bint entropy  # is wanted
    const real *pairs  # margins, C of each target, in place of `margin`, which is then 0; or NULL
    bint paired  # there are some
    bint counts_target
    bint shard  # stats of some of the classes are wanted, no loss
    Py_ssize_t stats_step  # numbers from one of a row's stats to the next (FROM_STATS)

cdef inline void fix_form(Options *o, int layout, int form) noexcept nogil:
    """What a form says of the options, as constants."""
    o.general, o.many = form != PLAIN and form != MANY, form == MANY
    o.slopes_in_units, o.spreads = form == BENT or form == BENT_ANY, o.dense or o.elsewhere != 0
    if o.kind == LOGISTIC:
        o.bends = o.dense = o.entropy = o.shard = o.paired = False
        if form == PLAIN or form == MANY or form == GIVEN:
            o.probabilities = form == GIVEN
        return
    if form == FLAT or form == WEIGHED or form == UNEVEN or form == GIVEN or form == BENT:
        o.bends, o.dense, o.probabilities = form == BENT, form != FLAT and form != BENT, form == GIVEN
        o.even_weights = form == WEIGHED
        if form != FLAT:
            o.entropy, o.shard, o.spreads = False, False, form != BENT
        if form == BENT:
            o.elsewhere = 0
    else:
        o.even_weights = False
        if MANY_FORMS and o.kind == SOFTMAX:
            o.bends = form == BENT_ANY
            if form == ANY:  # what is not dense is FLAT
                o.dense = o.spreads = True
        if form == PAIRED:
            o.paired, o.counts_target = True, False


cdef inline int form_of(const Options *o) noexcept nogil:
    """The form that is made for some options."""
    if o.kind == HINGE:
        return PAIRED if o.paired and not o.counts_target else ANY
    if o.kind == LOGISTIC:
        return GIVEN if o.probabilities and o.class_weight == NULL and o.elsewhere == 0 else ANY
    if o.kind != SOFTMAX:
        return ANY
    if not o.bends and not o.dense:
        return FLAT
    if o.bends and (o.entropy or o.shard or o.dense or o.elsewhere != 0):
        return BENT_ANY
    if o.entropy or o.shard:
        return ANY
    return BENT if o.bends else GIVEN if o.probabilities else WEIGHED if o.even_weights else UNEVEN


cdef struct Late


cdef struct Walk:
    # How a row loss walks over the classes of a tile, in either layout.
    real *tile  # LANED: the scores, and the gradient in their place. ROWED: what the first walk keeps for the second
    const stored *src  # ROWED: the row's scores
    stored *dst  # ROWED: its gradient
    stored *past  # where that goes past the caches, if a walk is to send it there (ROWED)
    Py_ssize_t first  # where `more` and numbers of classes begin for vector 0: not 0 in a part of a row (ROWED)
    Py_ssize_t vectors
    Py_ssize_t classes
    Py_ssize_t target_block  # where the block starts that holds the target (ROWED)
    const stored *ahead  # scores that come next, asked for `ahead_step` numbers further with each vector (ROWED)
    Py_ssize_t ahead_step
    Py_ssize_t dst_ahead  # numbers from the gradient to that of the row that is walked over a group later (ROWED)
    ivec target  # of each lane (LANED), or the same in all (ROWED)
    const real *more  # a number for each row and class, laid out as `tile` or `src`; NULL: none. LATE_WEIGHED: class weights
    Py_ssize_t more_ahead  # numbers from there to those that come next (ROWED)
    int near  # `nearness` of all scores, in the general form
    real *slopes  # where the general form keeps them, if it does, laid out as `tile`
    Late *late  # what is sent past the caches meanwhile, if anything (ROWED)


cdef struct Late:
    # A row whose last walk is left to be made while the next row is walked over: memory that is written to while it is read from
    # is as busy as in a copy.
    Walk inside  # what of it are whole vectors where the gradient goes
    vec r, less, target  # what `late_value` takes, and the target's entry
    ivec other  # LATE_ZEROS: the class whose entry is `less`
    Py_ssize_t sent  # how many vectors are there


cdef inline Walk walk_lanes(real *tile, Py_ssize_t c, ivec target, const real *more) noexcept nogil:
    cdef Walk w
    w.tile, w.src, w.dst, w.past, w.first, w.vectors, w.classes, w.target = tile, NULL, NULL, NULL, 0, c, c, target
    w.ahead, w.target_block, w.ahead_step, w.dst_ahead, w.more, w.more_ahead, w.near, w.slopes = NULL, 0, 0, 0, more, 0, 0, NULL
    w.late = NULL
    return w


cdef inline Py_ssize_t block_of(lane_int k) noexcept nogil:
    """Where the block of 16 vectors starts that holds class k (ROWED); less than 0 if it is none."""
    return (k & -<lane_int> (16 * LANES)) // LANES


cdef inline Walk walk_row(const stored *src, stored *dst, real *kept, Py_ssize_t c, lane_int target,
                          const real *more) noexcept nogil:
    cdef Walk w
    w.tile, w.src, w.dst, w.past, w.first, w.vectors, w.classes = kept, src, dst, NULL, 0, (c + LANES - 1) // LANES, c
    w.target_block, w.target = block_of(target), iset(target)
    w.ahead, w.ahead_step, w.dst_ahead, w.more, w.more_ahead, w.near, w.slopes = src, 0, 0, more, 0, 0, NULL
    w.late = NULL
    return w


cdef inline ivec classes_of(int layout, Py_ssize_t k) noexcept nogil:
    """The class that each lane of vector k holds."""
    return iadd(iota(), iset(<lane_int> (k * LANES))) if layout == ROWED else iset(<lane_int> k)


cdef inline ivec next_classes(int layout, ivec classes) noexcept nogil:
    return iadd(classes, iset(LANES if layout == ROWED else 1))


cdef inline mask past_end(int layout, const Walk *w, ivec classes) noexcept nogil:
    """Lanes past the last class: none in LANED."""
    return ige(classes, iset(<lane_int> w.classes))


cdef inline bint is_careful(int layout, const Walk *w, Py_ssize_t start) noexcept nogil:
    """Whether the block of 16 vectors from `start` on holds the target, or the end of a row."""
    if layout == LANED:
        return True
    return start == w.target_block or (start + 16) * LANES > w.classes


cdef inline Py_ssize_t whole_vectors(int layout, bint careful, const Walk *w, Py_ssize_t stop) noexcept nogil:
    """Where the vectors before `stop` end that are full."""
    return min(stop, w.classes // LANES) if layout == ROWED and careful else stop


cdef inline vec fetch(int layout, bint part, const Walk *w, Py_ssize_t k, real fill) noexcept nogil:
    """Vector k of the scores; `part`: the last of a row, whose lanes past the end are `fill`."""
    if layout == LANED:
        return vload(w.tile + k * TILE)
    if part:
        return sload_part(w.src + k * LANES, w.classes - k * LANES, fill)
    return sload(w.src + k * LANES)


cdef inline void put(int layout, bint part, const Walk *w, Py_ssize_t k, vec v) noexcept nogil:
    """Vector k of the gradient."""
    if layout == LANED:
        vstore(w.tile + k * TILE, v)
    elif part:
        sstore_part(w.dst + k * LANES, v, w.classes - k * LANES)
    else:
        sstore(w.dst + k * LANES, v)


cdef inline real *kept(int layout, const Walk *w, Py_ssize_t k) noexcept nogil:
    """Where the first walk keeps vector k for the second."""
    return w.tile + k * (LANES if layout == ROWED else TILE)


cdef inline void fetch_ahead(int layout, bint writes, const Walk *w, Py_ssize_t k) noexcept nogil:
    """Ask for what is walked over next, while this is computed with."""
    if layout == ROWED:
        prefetch(w.ahead + k * w.ahead_step)
        if writes:
            prefetch_to_write(w.dst + w.dst_ahead + k * LANES)


cdef inline void put_at_target(int layout, const Walk *w, vec v) noexcept nogil:
    """v to the gradient's entry at the target."""
    cdef ivec cls = iset(0)
    cdef Py_ssize_t k
    if layout == ROWED:
        if 0 <= ifirst(w.target) < w.classes:  # not in another block of a long row
            sstore_one(w.dst + ifirst(w.target), first_lane(v))
    else:
        for k in range(w.vectors):
            vstore(w.tile + k * TILE, choose(ieq(cls, w.target), v, vload(w.tile + k * TILE)))
            cls = iadd(cls, iset(1))


cdef inline vec row_max(const Walk *w, vec *size) noexcept nogil:
    """The maximum, of each lane; and, unless it is NULL, the largest size of what is not NaN (ROWED)."""
    cdef vec m = vset(<real> -INFINITY), lowest = vset(<real> INFINITY), x
    cdef Py_ssize_t k, whole = w.classes // LANES
    for k in range(whole):
        x = fetch(ROWED, False, w, k, 0)
        m = vmax(m, x)
        if size != NULL:
            lowest = vmin(lowest, x)
    if whole < w.vectors:
        m = vmax(m, fetch(ROWED, True, w, whole, <real> -INFINITY))
        if size != NULL:
            lowest = vmin(lowest, fetch(ROWED, True, w, whole, <real> INFINITY))
    if size != NULL:
        size[0] = vmax(m, sub(vset(0), lowest))
    return m


cdef inline bint is_tiny(real factor) noexcept nogil:
    """Whether a gradient's factor may be lost to flushing, times what brings exponentials to where they should start."""
    return -5e-13 < factor < 5e-13


cdef inline vec glance(const Walk *w, mask *fits) noexcept nogil:
    """The maximum, of each lane, of GLANCE vectors of a row; and in which lanes they are not too large (ROWED).

    Exponentials may be of the distance from that, in place of the row's maximum, as long as they fit: then the walk that takes
    them finds the maximum too, and one walk is saved. Else the row is walked over again.
    """
    cdef vec m = vset(<real> -INFINITY), lowest = vset(<real> INFINITY), x
    cdef Py_ssize_t k, step = w.classes // LANES // GLANCE
    for k in range(GLANCE):
        x = fetch(ROWED, False, w, k * step, 0)
        m, lowest = vmax(m, x), vmin(lowest, x)
    fits[0] = vle(vmax(m, sub(vset(0), lowest)), vset(GLANCE_SIZE))
    return m


cdef inline void look_ahead(const Options *o, const Walk *w, vec *m, vec *target, vec *size) noexcept nogil:
    """The maximum, the target's score and the largest size of each lane, as far as `open_rows` needs them (LANED)."""
    cdef vec x, top = vset(<real> -INFINITY), s = vset(0), lowest = sub(s, top)
    cdef ivec cls = iset(0)
    cdef Py_ssize_t k
    for k in range(w.vectors):
        x = vload(w.tile + k * TILE)
        if shifts(o):
            top = vmax(top, x)
        if o.slopes_in_units:
            lowest = vmin(lowest, x)
        if has_target(o):
            s = choose(ieq(cls, w.target), x, s)
            cls = next_classes(LANED, cls)
    m[0], target[0], size[0] = top, s, vmax(top, sub(vset(0), lowest))


cdef inline void add_block(Py_ssize_t start, vec block, vec *total, vec *lost) noexcept nogil:
    """Add a block's sum; `lost` is what the sum of blocks loses by rounding: of 2048 blocks that would be tens of units."""
    cdef vec rest
    if start == 0:
        total[0] = block
    else:
        total[0] = exact_sum(total[0], block, &rest)
        lost[0] = add(lost[0], rest)


cdef struct State:
    # What is known of some rows, one a lane; while a row is walked over (ROWED) of its lanes.
    vec m  # softmax family: the maximum. Hinge: see `aim`
    vec start  # MANY: the maximum that the first walk started from,
    vec top  # and the one that it found
    vec target  # the target's score
    vec a  # what the walks find
    vec b
    vec low  # what a lacks, as rounded (hinge); of HINGE_MAX, for the gradient: a as the walk left it, over the lanes (MANY)
    ivec place  # HINGE_MAX: the first block that holds a lane's largest margin (MANY)
    vec c  # and in the general form
    vec near  # `nearness`: how the row was bent; unless it is far, from c on (slopes_in_units)
    vec more[4]
    ivec pivot  # the class that its sums leave out; not in the Walk, which plain rows would pay for (12 cycles each)


cdef struct Sum:
    # Of a row; times 2^RAISED_BITS, as its exponentials are.
    vec others  # Σ_{j≠y} exp(s_j − m)
    vec total  # the same and exp(s_y − m)
    vec low  # what total, as rounded, lacks, relative to it
    vec q  # exponentials as kept, times 1 + q, are relative to m itself


cdef inline Sum complete(const Origin *o, vec others, vec low, vec m, vec target, vec at) noexcept nogil:
    """The sums of a row with maximum m: `at` is the exponential of the target's score, `others` and `low` the sum without."""
    cdef vec beyond = less_steps(sub(m, o.shift), add(o.steps, vset(RAISED_BITS))), lost, rest
    cdef Sum s
    s.q = expm1_in_step(sub(vset(0), beyond))
    s.others = add(others, mul(others, s.q))
    lost = add(low, add(sub(others, s.others), mul(others, s.q)))
    at = choose(veq(target, m), vset(RAISED), add(at, mul(at, s.q)))
    s.total = exact_sum(s.others, at, &rest)
    s.low = div(add(rest, lost), s.total)
    return s


cdef inline vec log_of(const Sum *s, vec plus, vec *rest) noexcept nogil:
    """plus + log Σ exp(s − m), and what it lacks, as rounded."""
    return vlog(mul(s.total, vset(1 / RAISED)), s.low, plus, rest)


# --- softmax -------------------------------------------------------------------------------------------------------
# ℓ = log Σ exp(s − m) − (s_y − m); gradient p − e_y, whose entry at the target is −Σ_{j≠y} p_j. Where y is the maximum, the
# logarithm is that of 1 + others, in full: Sum.low holds what the rounded sum lacks.
cdef struct Origin:
    # Where the exponentials of a row start: they are exp(s − shift − steps · log 2), which at the maximum m is RAISED but
    # for half a step; raised, so that sums of the smallest lose nothing to flushing. If m is near 0, shift is 0: s − m
    # would be rounded, by up to 64 units of its exponential. If it is far (`far`), shift is m: then s − m is exact wherever
    # its exponential is not 0, but a subtraction for every class.
    vec shift
    vec steps


cdef inline mask is_near(vec m) noexcept nogil:
    return vle(mul(m, m), vset(FL_NEAR * FL_NEAR))


cdef inline Origin origin_of(vec m) noexcept nogil:
    cdef mask near = is_near(m)
    cdef Origin o
    o.shift, o.steps = choose(near, vset(0), m), sub(choose(near, nearest_steps(m), vset(0)), vset(RAISED_BITS))
    return o


cdef inline vec exp_from(bint far, const Origin *o, vec s) noexcept nogil:
    return raised_exp(sub(s, o.shift) if far else s, o.steps)


cdef inline vec block_exps(int layout, bint careful, bint far, bint keep, bint seek, const Walk *w, Py_ssize_t start,
                           const Origin *o, vec *at_target, vec *top, vec *last) noexcept nogil:
    # Four sums in turn: a class's exponential is then rounded into at most 4 of a block's 16 additions and 2 more, which
    # equal scores would else round the same way every time.
    cdef vec first = vset(0), second = first, third = first, fourth = first, e, found = at_target[0], largest = top[0]
    cdef mask at
    cdef ivec cls = classes_of(layout, start)
    cdef Py_ssize_t k, stop = min(w.vectors, start + 16), whole = whole_vectors(layout, careful, w, stop)
    for k in range(start, whole):
        e = fetch(layout, False, w, k, 0)
        if seek:
            largest = vmax(largest, e)
        e = exp_from(far, o, e)
        fetch_ahead(layout, keep, w, k)
        if keep:
            vstore(kept(layout, w, k), e)
        if careful:
            at = ieq(cls, w.target)
            if layout == LANED:
                found = choose(at, e, found)
            e = add_unless(at, first, e)
            cls = next_classes(layout, cls)
        else:
            e = add(first, e)
        first, second, third, fourth = second, third, fourth, e
    if careful and whole < stop:
        e = fetch(layout, True, w, whole, <real> -INFINITY)
        if seek:
            largest = vmax(largest, e)
        last[0] = exp_from(far, o, e)
        fetch_ahead(layout, keep, w, whole)
        first = add_unless(ieq(cls, w.target), first, last[0])
    at_target[0], top[0] = found, largest
    return add(add(first, second), add(third, fourth))


cdef inline vec late_value(int way, const real *kept, const real *weights, vec r, vec less) noexcept nogil:
    """A vector of what is sent late: r times what was kept, less `less`, that times class weights (LATE_WEIGHED); scores less
    `less` and r (LATE_LOG); or zeros."""
    if way == LATE_ZEROS:
        return vset(0)
    if way == LATE_LOG:
        return sub(sub(vload(kept), less), r)
    return product_less(vload(kept), r, mul(less, vload(weights)) if way == LATE_WEIGHED else less)


cdef inline void late_vectors(int way, const Late *late, Py_ssize_t start, Py_ssize_t stop) noexcept nogil:
    """Some of a row's vectors past the caches."""
    # In variables of their own: through a pointer they would be read anew after every store.
    cdef vec r = late.r, less = late.less, target = late.target
    cdef ivec y = late.inside.target, other = late.other, cls = classes_of(ROWED, start)
    cdef const real *p = late.inside.tile
    cdef const real *u = late.inside.more + late.inside.first if way == LATE_WEIGHED else NULL
    cdef real *q = <real *> late.inside.past
    cdef lane_int first = ifirst(y)
    cdef Py_ssize_t k, at = first // LANES if 0 <= first < late.inside.classes else late.inside.vectors
    if way == LATE_ZEROS:
        for k in range(start, stop):
            vstream(q + k * LANES, choose(ieq(cls, other), less, choose(ieq(cls, y), target, vset(0))))
            cls = next_classes(ROWED, cls)
        return
    for k in range(start, min(at, stop)):
        vstream(q + k * LANES, late_value(way, p + k * LANES, u + k * LANES, r, less))
    if start <= at < stop:
        vstream(q + at * LANES, choose(ieq(classes_of(ROWED, at), y), target,
                                       late_value(way, p + at * LANES, u + at * LANES, r, less)))
    for k in range(max(start, at + 1), stop):
        vstream(q + k * LANES, late_value(way, p + k * LANES, u + k * LANES, r, less))


cdef inline void send_late(int way, Late *late, Py_ssize_t start) noexcept nogil:
    """Send what waits where the block of 16 vectors from `start` on is to be written, and no less."""
    cdef Py_ssize_t until = min(start + 16, late.inside.vectors)
    if late.sent < until:
        late_vectors(way, late, late.sent, until)
        late.sent = until


cdef inline vec row_exps(int layout, bint keep, bint seek, const Walk *w, vec m, vec *at_target, vec *top,
                         vec *last) noexcept nogil:
    """Σ of the exponentials from `origin_of(m)` without the target, of each lane, and (LANED) the target's; they are kept.
    If `seek`, the maximum.

    The exponentials of the last vector of a row, if it is not full, are kept in `last`: part of a vector that has just been
    written cannot be read again without a stall.
    """
    cdef vec total = vset(0), lost = vset(0), block
    cdef Origin o = origin_of(m)
    cdef Py_ssize_t start
    cdef bint far = not all_lanes(is_near(m))
    at_target[0], top[0] = total, vset(<real> -INFINITY)
    for start in range(0, w.vectors, 16):
        if STORED_IS_REAL and seek and keep and w.late != NULL:
            send_late(LATE_SHARE, w.late, start)
        if far:
            block = block_exps(layout, True, True, keep, seek, w, start, &o, at_target, top, last)
        elif is_careful(layout, w, start):
            block = block_exps(layout, True, False, keep, seek, w, start, &o, at_target, top, last)
        else:
            block = block_exps(layout, False, False, keep, seek, w, start, &o, at_target, top, last)
        add_block(start, block, &total, &lost)
    return add(total, lost)


cdef inline Py_ssize_t before_vector(const stored *p) noexcept nogil:
    """Numbers from p to the next place for a whole vector in memory."""
    return <Py_ssize_t> ((0 - <size_t> p) % VBYTES // sizeof(stored))


cdef inline Py_ssize_t since_vector(const stored *p) noexcept nogil:
    """Numbers from the last place for a whole vector in memory to p."""
    return <Py_ssize_t> (<size_t> p % VBYTES // sizeof(stored))


cdef inline Py_ssize_t vectors_past(Py_ssize_t c, Py_ssize_t first) noexcept nogil:
    """How many whole vectors of a row the last walk sends past the caches, from number `first` on."""
    return (c // LANES * LANES - first) // LANES


cdef inline Walk walk_past(const Walk *w) noexcept nogil:
    """The walk over what are whole vectors where the row's gradient goes past the caches (ROWED)."""
    cdef Walk inside = w[0]
    cdef Py_ssize_t first = before_vector(w.past)
    cdef lane_int y = ifirst(w.target) - <lane_int> first
    inside.first, inside.tile, inside.past, inside.vectors = first, w.tile + first, w.past + first, vectors_past(w.classes, first)
    inside.slopes = w.slopes + first if w.slopes != NULL else NULL
    inside.classes, inside.target, inside.target_block = inside.vectors * LANES, iset(y), block_of(y)
    return inside


cdef inline void put_ends(const Walk *w, vec head, vec tail, vec last) noexcept nogil:
    """The first and last whole vectors of such a row, and what is left of it, to w.dst: where exponentials may have been kept."""
    cdef Py_ssize_t whole = w.classes // LANES
    put(ROWED, False, w, whole - 1, tail)
    put(ROWED, False, w, 0, head)
    if whole < w.vectors:
        put(ROWED, True, w, whole, last)


cdef inline void scale(int layout, bint has_target, const Walk *w, vec last, vec r, vec target) noexcept nogil:
    """The exponentials that were kept, times r, as the gradient; but `target` at the target."""
    cdef ivec cls = iset(0)
    cdef vec v
    cdef Py_ssize_t k, whole = w.classes // LANES if layout == ROWED else w.vectors
    for k in range(whole):
        v = mul(vload(kept(layout, w, k)), r)
        if has_target and layout == LANED:
            v = choose(ieq(cls, w.target), target, v)
            cls = next_classes(LANED, cls)
        put(layout, False, w, k, v)
    if whole < w.vectors:
        put(layout, True, w, whole, mul(last, r))
    if has_target and layout == ROWED:
        put_at_target(ROWED, w, target)


cdef inline vec from_start(const Origin *o, const State *s, vec *low, vec *power) noexcept nogil:
    """What a walk summed (s.a), from what it started from to what it should have; and what that lacks, as rounded."""
    cdef vec others, less
    power[0] = less_powers(sub(o.steps, origin_of(s.start).steps), &less)
    others = mul(s.a, power[0])
    low[0] = add(product_less(s.a, power[0], others), mul(s.a, less))
    return others


cdef inline vec settle_softmax(int layout, bint grad, bint glanced, State *s, vec factor) noexcept nogil:
    cdef Origin o = origin_of(s.m)
    cdef vec others = s.a, low = vset(0), power, above, lost, rest, r
    cdef Sum sums
    if glanced:
        others = from_start(&o, s, &low, &power)
    sums = complete(&o, others, low, s.m, s.target, s.b if layout == LANED else exp_from(True, &o, s.target))
    if grad:
        r = div(factor, sums.total)
        s.a, s.b = add(r, mul(r, sums.q)), mul(sums.others, sub(vset(0), r))
        if glanced:
            s.a = mul(s.a, power)
    above = exact_sum(s.m, sub(vset(0), s.target), &lost)
    sums.low = add(sums.low, lost)
    return log_of(&sums, above, &rest)


# --- hinge ---------------------------------------------------------------------------------------------------------
# Σ_{j≠y} max(0, m_j)^power with m_j = s_j − s_y + Δ. `not m_j <= 0` is active, so that NaN is never swallowed. What the
# differences and sums round off is kept (State.low) as far as it shows: a difference is of both signs, its square is not.
# s_y − Δ is m − target of a State, exactly, once `aim` has made that of the target's score: m_j = (s_j + target) − m. The sum
# is exact where m_j is small beside s_j; s_j − s_y + Δ would be off by the same part of Δ for all classes that are tied.
cdef inline void aim_hinge(const Options *o, vec *m, vec *target) noexcept nogil:
    target[0] = sub(vset(0), exact_sum(target[0], vset(-o.margin), m))
    m[0] = number_or_zero(m[0])


cdef inline vec number_or_zero(vec rest) noexcept nogil:
    """What a sum lacks; of an infinite one that is NaN."""
    return choose(veq(rest, rest), rest, vset(0))


cdef struct HingeSums:
    # What is summed of a row's classes.
    vec loss
    vec low  # what loss lacks, as rounded
    vec slack  # of squares: what they lack because margins do
    vec pull


cdef inline vec hinge_step(bint grad, int power, vec s, mask skipped, const State *edge, vec share,
                           HingeSums *sums) noexcept nogil:
    """One vector of scores: its losses, and its pull, added to `sums`; returns its gradient."""
    cdef vec zero = vset(0), rest = zero, d = exact_sum(s, edge.target, &rest), m
    cdef mask idle = mor(vle(d, edge.m), skipped)
    if power == 1:  # less edge.m for each that is active, once they are counted
        sums.pull = add_unless(idle, sums.pull, vset(1))
        sums.loss = add_unless(idle, sums.loss, d)
        return choose(idle, zero, choose(vlt(edge.m, d), share, d)) if grad else zero
    m, rest = choose(idle, zero, d), sub(rest, edge.m)
    sums.slack = add_product_unless(idle, sums.slack, rest, add(mul(vset(2), m), rest))
    sums.loss = add_square(sums.loss, m, &sums.low)
    if not grad:
        return zero
    m = choose(idle, zero, sub(d, edge.m))
    sums.pull = add(sums.pull, m)
    return mul(m, share)


cdef inline vec hinge_score(int layout, bint part, const Options *o, const Walk *w, Py_ssize_t k) noexcept nogil:
    """Scores of vector k; with margins of class pairs, plus the margin."""
    cdef vec s = fetch(layout, part, w, k, 0)
    return add(s, row_numbers(layout, part, w, k)) if has_pairs(o) else s


cdef inline void add_target_term(int layout, bint part, int power, const Options *o, const Walk *w, Py_ssize_t k, ivec cls,
                                 HingeSums *sums) noexcept nogil:
    """max(0, Δ)^power in the target's lane, with margins of class pairs."""
    cdef vec zero = vset(0), m = vmax(zero, row_numbers(layout, part, w, k))
    sums.loss = add(sums.loss, choose(ieq(cls, w.target), m if power == 1 else mul(m, m), zero))


cdef inline void block_hinge(int layout, bint careful, bint grad, int power, const Options *o, const Walk *w,
                             Py_ssize_t start, const State *edge, vec share, HingeSums *sums) noexcept nogil:
    # Four sums in turn, as in block_exps; of squares one (`add_square`).
    cdef vec second = vset(0), third = second, fourth = second, g
    cdef HingeSums own
    cdef mask none = vlt(second, second)
    cdef ivec cls = classes_of(layout, start)
    cdef Py_ssize_t k, stop = min(w.vectors, start + 16), whole = whole_vectors(layout, careful, w, stop)
    own.loss = own.low = own.slack = own.pull = second
    for k in range(start, whole):
        g = hinge_step(grad, power, hinge_score(layout, False, o, w, k), ieq(cls, w.target) if careful else none, edge, share, &own)
        if grad:
            put(layout, False, w, k, g)
        if careful and counts_pair(o):
            add_target_term(layout, False, power, o, w, k, cls, &own)
        fetch_ahead(layout, grad, w, k)
        cls = next_classes(layout, cls)
        if power == 1:
            own.loss, second, third, fourth = second, third, fourth, own.loss
    if careful and whole < stop:
        g = hinge_step(grad, power, hinge_score(layout, True, o, w, whole), mor(ieq(cls, w.target), past_end(layout, w, cls)), edge,
                       share, &own)
        if grad:
            put(layout, True, w, whole, g)
        fetch_ahead(layout, grad, w, whole)
        if counts_pair(o):
            add_target_term(layout, True, power, o, w, whole, cls, &own)
    if power == 1:
        own.loss = join_sums(layout == LANED or LANES < 8, own.loss, second, third, fourth, &own.low)
    else:
        own.low = add(own.low, own.slack)
    sums[0] = own


cdef inline vec join_sums(bint exact, vec first, vec second, vec third, vec fourth, vec *low) noexcept nogil:
    """Their sum; if it is to be exact (a lane has few classes), what it lacks, as rounded, is added to `low`."""
    cdef vec rest
    if not exact:
        return add(add(first, second), add(third, fourth))
    first = exact_sum(first, second, &rest)
    low[0] = add(low[0], rest)
    third = exact_sum(third, fourth, &rest)
    low[0] = add(low[0], rest)
    first = exact_sum(first, third, &rest)
    low[0] = add(low[0], rest)
    return first


cdef inline void open_hinge(int layout, bint grad, int power, const Options *o, const Walk *w, vec factor,
                            State *s) noexcept nogil:
    cdef vec loss = vset(0), lost = loss, pull = loss, pull_lost = loss, share = mul(factor, vset(power * o.per_class))
    cdef HingeSums block
    cdef Py_ssize_t start
    for start in range(0, w.vectors, 16):
        if layout == ROWED and grad and STORED_IS_REAL and sends_late(o) and w.late != NULL:
            send_late(LATE_SHARE, w.late, start)
        if is_careful(layout, w, start):
            block_hinge(layout, True, grad, power, o, w, start, s, share, &block)
        else:
            block_hinge(layout, False, grad, power, o, w, start, s, share, &block)
        add_block(start, block.loss, &loss, &lost)
        lost = add(lost, block.low)
        if power == 1:  # counts
            pull = add(pull, block.pull)
        else:
            add_block(start, block.pull, &pull, &pull_lost)
    s.a, s.b, s.low = loss, add(pull, number_or_zero(pull_lost)), lost
    if layout == ROWED and power == 1:  # over the lanes, what is rounded here is little; so there is less to fold
        s.a = add(loss, number_or_zero(lost))


cdef inline vec pull_at_target(const Options *o, vec pull, vec factor) noexcept nogil:
    """The gradient's entry of the target, from the sum of those of the others."""
    return mul(pull, sub(vset(0), mul(factor, vset(o.power * o.per_class))))


cdef inline vec settle_hinge(const Options *o, State *s, vec factor) noexcept nogil:
    cdef vec low = choose(veq(sub(s.a, s.a), vset(0)), s.low, vset(0)), loss, own  # of an infinite sum, it may be any
    if o.power == 1:
        low = sub(low, mul(s.b, s.m))
    if o.general and o.counts_target and not o.paired:
        own = vmax(vset(0), vset(o.margin))
        s.a = exact_sum(s.a, own if o.power == 1 else mul(own, own), &own)
        low = add(low, number_or_zero(own))
    loss = add(s.a, low)
    s.b = choose(veq(loss, loss), pull_at_target(o, s.b, factor), loss)  # active classes are counted, with NaN or not
    return per_class_of(o, s.a, low)


cdef inline vec per_class_of(const Options *o, vec total, vec low) noexcept nogil:
    """A sum over the classes and what it lacks, as rounded: together, or with over="mean" divided by their number."""
    cdef vec loss = add(total, low), mean
    if o.per_class == 1:
        return loss
    mean = div(loss, vset(o.classes))
    low = add(add(sub(total, loss), low), rest_of_quotient(loss, vset(o.classes), mean))
    low = mul(low, vset(o.per_class))
    return add(mean, number_or_zero(low))


# --- hinge, over="max" -----------------------------------------------------------------------------------------------
# max(0, max_{j≠y} m_j)^power. The gradient goes to the lowest class that has the largest margin; in a row with NaN, to
# the first NaN. The walk finds the largest s_j − s_y of a wrong class and whether there is NaN, and of each lane of a
# row of many classes the first block that holds its largest margin: the class is looked for there. Else in a second walk.
cdef inline vec block_hinge_max(int layout, bint careful, bint grad, const Options *o, const Walk *w, Py_ssize_t start,
                                vec top, vec st, vec *bad) noexcept nogil:
    cdef vec d, low = vset(<real> -INFINITY), some = bad[0]
    cdef ivec cls = classes_of(layout, start)
    cdef Py_ssize_t k, stop = min(w.vectors, start + 16), whole = whole_vectors(layout, careful, w, stop)
    for k in range(start, whole):
        d = sub(hinge_score(layout, False, o, w, k), st)
        if careful:
            d = choose(ieq(cls, w.target), low, d)
            cls = next_classes(layout, cls)
        fetch_ahead(layout, grad, w, k)
        top, some = vmax(top, d), choose(veq(d, d), some, vset(1))
    if careful and whole < stop:
        d = sub(hinge_score(layout, True, o, w, whole), st)
        d = choose(mor(ieq(cls, w.target), past_end(layout, w, cls)), low, d)
        fetch_ahead(layout, grad, w, whole)
        top, some = vmax(top, d), choose(veq(d, d), some, vset(1))
    bad[0] = some
    return top


cdef inline void open_hinge_max(int layout, bint grad, const Options *o, const Walk *w, State *s) noexcept nogil:
    cdef vec top = vset(<real> -INFINITY), most = top, bad = vset(0), own, m
    cdef ivec place = iset(0)
    cdef Py_ssize_t start
    for start in range(0, w.vectors, 16):
        own = vset(<real> -INFINITY)
        if is_careful(layout, w, start):
            own = block_hinge_max(layout, True, grad, o, w, start, own, s.target, &bad)
        else:
            own = block_hinge_max(layout, False, grad, o, w, start, own, s.target, &bad)
        if o.many and STORED_IS_REAL and w.late != NULL:
            send_late(LATE_ZEROS, w.late, start)
        top = vmax(top, own)
        if o.many:
            m = add(own, vset(o.margin))
            place, most = ichoose(vlt(most, m), iset(<lane_int> start), place), vmax(most, m)
    s.a, s.b, s.place = top, bad, place


cdef inline vec settle_hinge_max(const Options *o, State *s, vec factor) noexcept nogil:
    cdef vec zero = vset(0), rest, m = exact_sum(s.a, vset(o.margin), &rest), active, slope
    m = choose(veq(s.b, zero), m, vset(<real> NAN))
    active = choose(vle(m, zero), zero, m)
    slope = choose(vlt(zero, m), vset(1), active) if o.power == 1 else mul(vset(2), active)
    s.a, s.b = mul(slope, factor), m
    return active if o.power == 1 else add(mul(active, active), number_or_zero(mul(add(active, active), rest)))


cdef inline bint holds_top(const Options *o, vec a, vec b, real top) noexcept nogil:
    """Whether the class with the gradient is in a block of a long row: a and b are what its first walk found."""
    cdef vec m = add(a, vset(o.margin))
    if top != top:
        return not all_lanes(veq(b, vset(0)))
    return not all_lanes(mandnot(veq(m, m), veq(m, vset(top))))


cdef inline mask is_top(int layout, bint part, const Options *o, const Walk *w, Py_ssize_t k, vec st, vec top,
                        mask bad) noexcept nogil:
    """Lanes of vector k whose margin is `top`; where `bad`, lanes with NaN."""
    cdef vec m = add(sub(hinge_score(layout, part, o, w, k), st), vset(o.margin))
    return mor(veq(m, top), mandnot(bad, veq(m, m)))


cdef inline ivec top_classes(int layout, bint writes, Py_ssize_t start, Py_ssize_t stop, const Options *o, const Walk *w,
                             const State *s) noexcept nogil:
    """The lowest class of each lane that `is_top`, in some of the vectors; none: the number of classes. If `writes`, zeros for
    the gradient."""
    cdef vec zero = vset(0), top = s.b
    cdef mask bad = mandnot(veq(zero, zero), veq(top, top)), wrong
    cdef ivec none = iset(<lane_int> w.classes), found = none, cls = classes_of(layout, start)
    cdef Py_ssize_t k, whole = whole_vectors(layout, True, w, stop)
    for k in range(start, whole):
        wrong = mandnot(is_top(layout, False, o, w, k, s.target, top, bad), ieq(cls, w.target))
        found = imin(found, ichoose(wrong, cls, none))
        if writes:
            put(layout, False, w, k, zero)
        cls = next_classes(layout, cls)
    if start <= whole < stop:
        wrong = mandnot(is_top(layout, True, o, w, whole, s.target, top, bad), ieq(cls, w.target))
        found = imin(found, ichoose(wrong, cls, none))
        if writes:
            put(layout, True, w, whole, zero)
    return found


cdef inline lane_int top_class(const Options *o, const Walk *w, const State *s) noexcept nogil:
    """The class with the gradient, of a row of many classes; none: their number (ROWED)."""
    cdef Py_ssize_t start = 0, stop = w.vectors
    cdef vec m = add(s.low, vset(o.margin))
    if all_lanes(veq(s.b, s.b)):
        start = lane_least(ichoose(veq(m, s.b), s.place, iset(<lane_int> w.classes)))
        stop = min(stop, start + 16)
    return lane_least(top_classes(ROWED, False, start, stop, o, w, s))


cdef inline void close_hinge_max(int layout, const Options *o, const Walk *w, const State *s) noexcept nogil:
    cdef vec zero = vset(0)
    cdef ivec found, cls = iset(0)
    cdef lane_int top
    cdef Py_ssize_t k
    if layout == ROWED:
        if o.many:
            top = top_class(o, w, s)
            memset(w.dst, 0, w.classes * sizeof(stored))
        else:
            top = lane_least(top_classes(ROWED, True, 0, w.vectors, o, w, s))
        if top < w.classes:
            sstore_one(w.dst + top, first_lane(s.a))
            put_at_target(ROWED, w, sub(zero, s.a))
        return
    found = top_classes(LANED, False, 0, w.vectors, o, w, s)
    for k in range(w.vectors):
        put(LANED, False, w, k, choose(ieq(cls, found), s.a, choose(ieq(cls, w.target), sub(zero, s.a), zero)))
        cls = iadd(cls, iset(1))


# --- logistic --------------------------------------------------------------------------------------------------------
# Each class for itself: α log(1 + exp(−s)) + β log(1 + exp(s)), α and β what t and 1 − t count. With e = exp(−|s|), `away` the
# weight of the side that s is on (β where s > 0, else α) and `near` the other, that is
#
#     away |s| + (away + near) log(1 + e)        gradient ± (away − near e) / (1 + e)
#
# where nothing cancels. One walk does all. Where α + β = 1, logarithms are for a block, of Π (1 + e) in twice the precision
# (high + low, so that small losses count in full); only where columns have weights is there one for each class. A plain row
# has t = 0 but at its target, or, of one class, as the target is: there s counts as −s.
cdef inline void logistic_step(int layout, bint part, bint careful, bint grad, const Options *o, const Walk *w,
                               Py_ssize_t k, ivec cls, vec share, vec *sums, vec *high, vec *low) noexcept nogil:
    """One vector of scores: what is not in the product is added to `sums`."""
    cdef vec zero = vset(0), one = vset(1), s = fetch(layout, part, w, k, <real> -INFINITY), e, t, away, near, next, lost
    cdef mask at
    if not o.general:
        at = ieq(cls, w.target)
        if careful:
            s = choose(at, sub(zero, s), s)
        e = vexp(sub(zero, vabs(s)), zero)
        sums[0] = add(sums[0], vmax(s, zero))
        if grad:
            t = div(choose(vlt(s, zero), mul(e, share), share), add(one, e))
            put(layout, part, w, k, choose(at, sub(zero, t), t) if careful else t)
    else:
        if o.probabilities:
            t = row_numbers(layout, part, w, k)
        else:
            t = choose(ieq(cls, w.target), one, zero)
        at = vlt(zero, s)
        near, away = sub(one, t), t
        if o.elsewhere != 0:
            near = add(vset(o.elsewhere), mul(near, vset(o.at_target - o.elsewhere)))
            away = add(vset(o.elsewhere), mul(away, vset(o.at_target - o.elsewhere)))
        if o.class_weight != NULL:
            near = mul(near, class_numbers(layout, part, o.class_weight, k, w))
            away = mul(away, class_numbers(layout, part, o.class_weight + w.classes, k, w))
        near, away = choose(at, away, near), choose(at, near, away)
        if part and o.elsewhere != 0:
            away = choose(past_end(layout, w, cls), zero, away)
        e = vexp(sub(zero, vabs(s)), zero)
        sums[0] = less_product(sums[0], away, sub(zero, vabs(s)))
        t = mul(sub(away, mul(near, e)), share)
        if o.class_weight != NULL:
            sums[0] = add(sums[0], mul(add(away, near), vlog1p(e)))
            t = mul(t, reciprocal(add(one, e)))
        elif grad:
            t = div(t, add(one, e))
        if grad:
            put(layout, part, w, k, choose(at, t, sub(zero, t)))
        if o.class_weight != NULL:
            return
    next = add(high[0], mul(high[0], e))
    lost = add(sub(high[0], next), mul(high[0], e))
    high[0], low[0] = next, add(add(low[0], lost), mul(low[0], e))


cdef inline vec block_logistic(int layout, bint careful, bint grad, const Options *o, const Walk *w, Py_ssize_t start,
                               vec share, vec *lost) noexcept nogil:
    # Four sums in turn, as in block_exps.
    cdef vec first = vset(0), second = first, third = first, fourth = first, high = vset(1), low = first, rest, own = first
    cdef ivec cls = classes_of(layout, start)
    cdef Py_ssize_t k, stop = min(w.vectors, start + 16), whole = whole_vectors(layout, careful, w, stop)
    if layout == LANED and w.classes == 1:  # labels are 0 and 1
        cls = iset(1)
    for k in range(start, whole):
        logistic_step(layout, False, careful, grad, o, w, k, cls, share, &first, &high, &low)
        fetch_ahead(layout, grad, w, k)
        if layout == ROWED and o.general and o.probabilities:
            prefetch(w.more + w.more_ahead + k * LANES)
        first, second, third, fourth = second, third, fourth, first
        cls = next_classes(layout, cls)
    if careful and whole < stop:
        logistic_step(layout, True, True, grad, o, w, whole, cls, share, &first, &high, &low)
    first = join_sums(True, first, second, third, fourth, &own)
    if not (o.general and o.class_weight != NULL):
        first = vlog(high, div(low, high), first, &rest)
        own = add(own, rest)
    lost[0] = own
    return first


cdef inline void open_logistic(int layout, bint grad, const Options *o, const Walk *w, vec factor, State *s) noexcept nogil:
    cdef vec total = vset(0), lost = total, block, share = mul(factor, vset(o.per_class)), own
    cdef Py_ssize_t start
    for start in range(0, w.vectors, 16):
        if layout == ROWED and grad and STORED_IS_REAL and sends_late(o) and w.late != NULL:
            send_late(LATE_SHARE, w.late, start)
        if is_careful(layout, w, start):
            block = block_logistic(layout, True, grad, o, w, start, share, &own)
        else:
            block = block_logistic(layout, False, grad, o, w, start, share, &own)
        add_block(start, block, &total, &lost)
        lost = add(lost, own)
    s.a, s.b, s.low = total, vset(0), number_or_zero(lost)


# --- softmax, log-softmax and log-sum-exp themselves -----------------------------------------------------------------
cdef inline vec block_rests(bint careful, bint writes, const Walk *w, Py_ssize_t start, const Origin *o, vec *most,
                            vec *top) noexcept nogil:
    """Σ of the exponentials of each lane without its largest, which is in `most`; and the maximum (ROWED)."""
    cdef vec first = vset(0), second = first, third = first, fourth = first, greatest = most[0], largest = top[0], x
    cdef Py_ssize_t k, stop = min(w.vectors, start + 16), whole = whole_vectors(ROWED, careful, w, stop)
    for k in range(start, whole):
        x = fetch(ROWED, False, w, k, 0)
        largest = vmax(largest, x)
        x = exp_from(False, o, x)
        fetch_ahead(ROWED, writes, w, k)
        # Of NaN and a number, the second is the smaller (and NaN of a sum stays).
        first, second, third, fourth = second, third, fourth, add(first, vmin(greatest, x))
        greatest = vmax(greatest, x)
    if careful and whole < stop:
        x = fetch(ROWED, True, w, whole, <real> -INFINITY)
        largest = vmax(largest, x)
        x = exp_from(False, o, x)
        fetch_ahead(ROWED, writes, w, whole)
        first = add(first, vmin(greatest, x))
        greatest = vmax(greatest, x)
    most[0], top[0] = greatest, largest
    return add(add(first, second), add(third, fourth))


cdef inline vec without_greatest(vec v) noexcept nogil:
    """v, but 0 in one lane, which holds the greatest."""
    cdef ivec none = iset(LANES)
    return choose(ieq(iota(), iset(lane_least(ichoose(veq(v, vset(lane_greatest(v))), iota(), none)))), vset(0), v)


cdef inline vec block_tops(int layout, bint careful, bint far, bint writes, const Walk *w, Py_ssize_t start, vec m,
                           const Origin *o, vec *tops) noexcept nogil:
    """Σ of the exponentials without those of scores that are m, which are counted. Sums in turn as in block_exps."""
    cdef vec first = vset(0), second = first, third = first, fourth = first, some = first, x
    cdef mask top, past
    cdef Py_ssize_t k, stop = min(w.vectors, start + 16), whole = whole_vectors(layout, careful, w, stop)
    for k in range(start, whole):
        x = fetch(layout, False, w, k, 0)
        top = veq(x, m)
        some = add(some, choose(top, vset(1), vset(0)))
        fetch_ahead(layout, writes, w, k)
        x = add_unless(top, first, exp_from(far, o, x))
        first, second, third, fourth = second, third, fourth, x
    if careful and whole < stop:
        x = fetch(layout, True, w, whole, 0)
        fetch_ahead(layout, writes, w, whole)
        past = past_end(layout, w, classes_of(layout, whole))
        top = mandnot(veq(x, m), past)
        some = add(some, choose(top, vset(1), vset(0)))
        first = add_unless(mor(top, past), first, exp_from(far, o, x))
    tops[0] = add(tops[0], some)
    return add(add(first, second), add(third, fourth))


cdef inline void open_transform(int layout, int kind, bint seek, const Walk *w, State *s, vec *last) noexcept nogil:
    cdef vec total = vset(0), lost = total, tops = total, block
    cdef Origin o = origin_of(s.m)
    cdef Py_ssize_t start
    cdef bint writes = kind == LOG_PROBABILITIES, far = not all_lanes(is_near(s.m))
    if kind == PROBABILITIES:
        s.a = row_exps(layout, True, seek, w, s.m, &s.b, &s.top, last)
        return
    if seek:
        s.top = s.m if far else vset(<real> -INFINITY)
    for start in range(0, w.vectors, 16):
        if far:
            block = block_tops(layout, True, True, writes, w, start, s.m, &o, &tops)
        elif seek and is_careful(layout, w, start):
            block = block_rests(True, writes, w, start, &o, &tops, &s.top)
        elif seek:
            block = block_rests(False, writes, w, start, &o, &tops, &s.top)
        elif is_careful(layout, w, start):
            block = block_tops(layout, True, False, writes, w, start, s.m, &o, &tops)
        else:
            block = block_tops(layout, False, False, writes, w, start, s.m, &o, &tops)
        if STORED_IS_REAL and seek and writes and w.late != NULL:
            send_late(LATE_LOG, w.late, start)
        add_block(start, block, &total, &lost)
    if seek and not far:
        lost, tops = add(lost, without_greatest(tops)), choose(ieq(iota(), iset(0)), vset(1), vset(0))
    s.a, s.b = add(total, lost), tops


cdef inline vec settle_transform(int kind, bint glanced, State *s) noexcept nogil:
    """The log-sum-exp. Where the maximum is infinite that is NaN; its limit for `logsumexp`, unless there is NaN."""
    cdef vec m = s.m, one = vset(1), others = s.a, low = vset(0), top, z, rest
    cdef Origin o = origin_of(m)
    cdef Sum sums
    cdef mask infinite
    if kind == PROBABILITIES:
        s.a = div(one, others)
        return m
    top = exp_from(True, &o, m)
    others = from_start(&o, s, &low, &rest) if glanced else s.a
    sums = complete(&o, add(others, mul(sub(s.b, one), top)), low, m, m, top)
    z = log_of(&sums, m, &rest)
    if kind == LOG_SUM:
        infinite = mandnot(veq(m, m), veq(sub(m, m), vset(0)))
        # The exponentials of all scores but m are then 0, or NaN.
        return choose(mandnot(infinite, mandnot(veq(m, m), veq(others, others))), m, z)
    s.a, s.b = z, rest
    return z


cdef inline void close_log_probabilities(int layout, const Walk *w, const State *s) noexcept nogil:
    """s − z, of which s.b is the part that z itself, rounded, lacks: z may be much larger than the result."""
    cdef Py_ssize_t k, whole = w.classes // LANES if layout == ROWED else w.vectors
    for k in range(whole):
        put(layout, False, w, k, sub(sub(fetch(layout, False, w, k, 0), s.a), s.b))
    if whole < w.vectors:
        put(layout, True, w, whole, sub(sub(fetch(layout, True, w, whole, 0), s.a), s.b))


# --- the doors to all of them ----------------------------------------------------------------------------------------
cdef inline bint shifts(const Options *o) noexcept nogil:
    """Whether `open_rows` has to know the maximum first."""
    return o.kind != HINGE and o.kind != HINGE_MAX and o.kind != FROM_STATS and o.kind != LOGISTIC


cdef inline bint has_target(const Options *o) noexcept nogil:
    return (o.kind == SOFTMAX or o.kind == HINGE or o.kind == HINGE_MAX) and not (
        o.general and (o.probabilities or o.shard))


cdef inline bint is_general_softmax(const Options *o) noexcept nogil:
    return o.general and o.kind == SOFTMAX


cdef inline bint has_pairs(const Options *o) noexcept nogil:
    return o.general and o.paired


cdef inline bint counts_pair(const Options *o) noexcept nogil:
    """Whether the target's own term is its margin with itself."""
    return o.general and o.paired and o.counts_target


cdef inline bint has_low(const Options *o) noexcept nogil:
    """Whether State's low is used."""
    return o.kind == HINGE or o.kind == LOGISTIC


cdef inline bint folds_low(const Options *o) noexcept nogil:
    """Whether `fold` joins the lanes of State's low too."""
    return o.kind == LOGISTIC or (o.kind == HINGE and o.power == 2)


cdef inline bint keeps(const Options *o) noexcept nogil:
    """Whether the first walk keeps numbers for the second."""
    return o.kind == SOFTMAX or o.kind == PROBABILITIES


cdef inline bint is_transform(const Options *o) noexcept nogil:
    return o.kind == PROBABILITIES or o.kind == LOG_PROBABILITIES or o.kind == LOG_SUM


cdef inline bint glances(const Options *o) noexcept nogil:
    """Whether a row's maximum is found by the walk that takes exponentials (see `glance`)."""
    return o.many and (o.kind == SOFTMAX or is_transform(o))


cdef inline bint sends_late(const Options *o) noexcept nogil:
    """Whether rows may have to be sent late (`Late`); some general forms are not."""
    return o.many or o.general


cdef inline bint is_many(const Options *o, bint grad, Py_ssize_t c) noexcept nogil:
    """Whether plain rows that are not transposed have the form MANY."""
    return c >= MANY_CLASSES and (grad or o.kind == SOFTMAX or is_transform(o))


cdef inline void aim(const Options *o, vec *m, vec *target) noexcept nogil:
    """What `open_rows` starts from, of the maximum and the target's score of LANES rows."""
    if o.kind == HINGE:
        aim_hinge(o, m, target)


cdef inline void open_rows(int layout, bint grad, const Options *o, const Walk *w, vec factor, State *s,
                           vec *last) noexcept nogil:
    """First walk over one row (ROWED) or LANES rows (LANED), whose maximum and target's score are in the State."""
    if is_general_softmax(o):
        open_general(layout, grad, o, w, s, last)
    elif o.kind == SOFTMAX:
        s.a = row_exps(layout, grad, glances(o), w, s.m, &s.b, &s.top, last)
    elif o.kind == FROM_STATS:
        open_from_stats(layout, o, w, factor, s)
    elif o.kind == HINGE_MAX:
        open_hinge_max(layout, grad, o, w, s)
    elif o.kind == HINGE and o.power == 1:
        open_hinge(layout, grad, 1, o, w, factor, s)
    elif o.kind == HINGE:
        open_hinge(layout, grad, 2, o, w, factor, s)
    elif o.kind == LOGISTIC:
        open_logistic(layout, grad, o, w, factor, s)
    elif o.kind == PROBABILITIES:
        open_transform(layout, PROBABILITIES, glances(o), w, s, last)
    else:
        open_transform(layout, o.kind, glances(o), w, s, last)


cdef inline void fold(const Options *o, const vec *a, const vec *b, const vec *low, State *s) noexcept nogil:
    """What the lanes of LANES rows hold, one row a lane (ROWED)."""
    if o.kind == HINGE_MAX:
        s.a = transposed_max(a)
    elif has_low(o):
        s.a = exact_transposed_sum(a, low if folds_low(o) else NULL, &s.low)
    else:
        s.a = transposed_sum(a)
    if not keeps(o) and o.kind != LOGISTIC:
        s.b = transposed_sum(b)


cdef inline void merge(const Options *o, State *s, const State *more) noexcept nogil:
    """What another block of classes holds in its lanes, from the same State.m, to what is known of those before it."""
    cdef vec rest
    if o.kind == HINGE_MAX:
        s.a = vmax(s.a, more.a)
    else:
        s.a = exact_sum(s.a, more.a, &rest)
        s.low = add(s.low, add(more.low, rest))
        if not folds_low(o):
            s.a, s.low = add(s.a, number_or_zero(s.low)), vset(0)
    s.b = add(s.b, more.b)


cdef inline vec settle(int layout, bint grad, const Options *o, State *s, vec factor) noexcept nogil:
    """Losses of LANES rows; and in the State what the gradient needs, times `factor`."""
    if is_general_softmax(o):
        return settle_general(grad, o, s, factor)
    if o.kind == SOFTMAX:
        return settle_softmax(layout, grad, glances(o), s, factor)
    if o.kind == FROM_STATS:
        return s.a
    if o.kind == HINGE:
        return settle_hinge(o, s, factor)
    if o.kind == LOGISTIC:
        return per_class_of(o, s.a, number_or_zero(s.low))
    if o.kind == HINGE_MAX:
        return settle_hinge_max(o, s, factor)
    return settle_transform(o.kind, glances(o), s)


cdef inline void close_rows(int layout, const Options *o, const Walk *w, const State *s, vec last) noexcept nogil:
    """Second walk: the gradient, complete."""
    if is_general_softmax(o):
        close_general(layout, o, w, s, last)
    elif keeps(o):
        scale(layout, o.kind == SOFTMAX, w, last, s.a, s.b)
    elif o.kind == HINGE:
        put_at_target(layout, w, s.b)
    elif o.kind == HINGE_MAX:
        close_hinge_max(layout, o, w, s)
    elif o.kind == LOG_PROBABILITIES:
        close_log_probabilities(layout, w, s)


cdef dict _KINDS = {
    "softmax": SOFTMAX, "hinge": HINGE, "transform softmax": PROBABILITIES, "transform log_softmax": LOG_PROBABILITIES,
    "transform logsumexp": LOG_SUM, "logistic": LOGISTIC,
    "transform sigmoid": LOGISTIC,  # its gradient where every t is 0
}


cdef int read_options(Options *o, row_loss, _Loan loan, Py_ssize_t c) except -1:
    """Options of a row loss, as `row_options` and `general_options` of backends/cython.py give them."""
    kind, margin, power, over, general = row_loss
    cdef Matrix m
    # Through double: a Python float is not given to `real`, which Cython takes for float in every module.
    cdef double some = margin, at_target, elsewhere, z_loss, softcap, temperature, all_weights, unit
    cdef bint bends_near
    cdef int k
    if c > 0x7fffffff - 16:
        raise ValueError(f"scores have {c} classes; the kernels count them in 31 bits")
    memset(o, 0, sizeof(Options))
    o.kind = HINGE_MAX if over == "max" else _KINDS[kind]
    o.power, o.margin, o.classes = power, <real> some, <real> c
    o.per_class = <real> (1.0 / c) if over == "mean" else 1
    if general is not None:
        (at_target, elsewhere, z_loss, softcap, temperature, class_weight, all_weights, pairs, o.counts_target, o.entropy,
         o.shard) = general
        o.general, o.z_loss, o.bends = True, <real> z_loss, softcap >= 0
        o.per_softcap, o.bent_unit = <real> (1 / softcap), <real> (softcap / temperature)
        bends_near = 2.0**-12 <= softcap <= 2.0**15 and 1 <= softcap / temperature <= 2.0**16
        o.near_scores = <real> (softcap * NEAR_TANH) if bends_near else 0
        o.wide_scores = <real> (softcap * 40) if bends_near else 0
        unit = softcap / temperature / FL_LN2 if bends_near else 1
        o.slope_unit, o.per_slope_unit = <real> (unit * unit), <real> (1 / (unit * unit))
        o.wide_steps, o.wide_unit, o.wide_slope_unit = <real> (2 / (softcap * FL_LN2)), <real> unit, <real> (4 * unit * unit)
        unit = 1 / temperature / FL_LN2 if bends_near else 0
        for k in range(BENDS):
            o.bends_near[k] = <real> (unit * fl_bends[k])
            unit /= softcap * softcap
        o.per_temperature, o.elsewhere, o.at_target = <real> (1 / temperature), <real> elsewhere, <real> at_target
        o.steps = steps_of(temperature)
        m = loan.matrix(class_weight, False)
        o.class_weight, o.dense = m.data, m.data != NULL
        o.weighted_target = <real> (at_target / elsewhere) if elsewhere else 1
        o.per_weighted_target = 1 / o.weighted_target
        o.all_weights, o.even_weights = <real> all_weights, all_weights > 0
        m = loan.matrix(pairs, False)
        o.pairs, o.paired = m.data, m.data != NULL
        if o.paired:
            o.margin = 0  # they are added to the scores
    return 0
