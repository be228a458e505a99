# Scores that are given: the identity producer and the store accumulator, and the passes over an array of scores.
#
# Traffic: each score is read from memory once and each gradient written once, as long as a row (or, for few classes, a
# tile of 16 rows) fits in cache. Rows of few classes, or whose classes are not contiguous, go through a transposed tile.
# A store to memory that is not in cache reads it first. So a large gradient that is not in place is held in scratch, a
# group of rows at a time, and goes to memory past the caches: two passes over memory, where there would be three.

cdef enum:
    STREAM_BYTES = 1 << 25  # of a gradient: above, it would push all else out of the caches; if vectors are whole lines, half of that for packed and thin rows
    FAR_BYTES = 1 << 23  # of an array: above, the gradient's lines are asked for ahead too; below, they are near enough
    BATCH = 16  # transposed tiles that are handled together, at most,
    BATCH_BYTES = 8192  # and what they take
    EXTRAS = 256  # rows of a batch, at most: where entropies begin behind log-sum-exps
    GROUP_ROWS = 32  # that are walked over together, at most,
    GROUP_BYTES = 24576  # and what they take
    LONG_ROW = 1 << 18  # bytes of a row's scores, from which on what is asked for ahead is not the next row but
    NEAR_AHEAD = 49152  # what lies so many bytes ahead

cdef struct ScoresPass:
    Matrix scores, grad
    Indices targets
    Matrix probabilities  # of each row's classes; FROM_STATS: the stats
    Options options
    const real *multiplier
    real scale
    real *row_loss
    Py_ssize_t row_loss_stride
    real *z  # log-sum-exps, and entropies, where they are asked for; contiguous
    real *entropy
    Py_ssize_t *top  # the largest classes, where they are asked for; contiguous
    Py_ssize_t *unfit  # of each segment, the position of the first probability that is none, or -1; NULL: that is known
    Py_ssize_t segment
    int layout
    bint streams  # the gradient goes past the caches
    char *scratch  # for each thread: transposed tiles, or what is kept of a group, and its gradient if it streams
    Py_ssize_t scratch_size
    double *partial


cdef inline int few(const Options *o) noexcept nogil:
    """Halves of vectors of classes up to which rows are handled transposed: shorter rows would leave lanes empty.

    More where there is more to do for each row (softmax), or a logarithm for its lanes (logistic); and where a row's end takes
    more than a mask (vectors of less than 64 bytes).
    """
    cdef bint wide = VBYTES == 64
    if o.kind == LOGISTIC and not o.general:
        return 12
    if o.kind == SOFTMAX and o.general:
        return 8 if wide and o.bends else 10
    if o.kind == SOFTMAX:
        return 5 if wide else 10
    return 4 if wide else 7


cdef bint is_laned(const Options *o, const Matrix *a, const Matrix *b) noexcept nogil:
    """Whether the tile is transposed: few classes, or classes that are not contiguous in source or destination."""
    return 2 * a.columns <= few(o) * LANES or a.column_stride != 1 or (b.raw != NULL and b.column_stride != 1)


cdef inline void load_tile(const Matrix *a, Py_ssize_t row, int n, real *tile) noexcept nogil:
    """n rows from `row` on as a transposed tile; lanes past n hold zeros."""
    cdef const stored *p = a.raw + row * a.row_stride
    cdef Py_ssize_t j, i, g, u, v
    if a.column_stride == 1:
        for u in range((a.columns + LANES - 1) // LANES):
            j = u * LANES
            for v in range(TILE // LANES):
                g = v * LANES
                gather_columns(p + g * a.row_stride + j, a.row_stride, n - g, min(<Py_ssize_t> LANES, a.columns - j),
                               tile + j * TILE + g)
    elif a.row_stride == 1 and n == TILE:
        for j in range(a.columns):
            for v in range(TILE // LANES):
                g = v * LANES
                vstore(tile + j * TILE + g, sload(p + j * a.column_stride + g))
    else:
        for j in range(a.columns):
            for i in range(TILE):
                tile[j * TILE + i] = sone(p + i * a.row_stride + j * a.column_stride) if i < n else 0


cdef inline void fetch_rows(const Matrix *a, Py_ssize_t start, Py_ssize_t stop, bint write) noexcept nogil:
    """Ask for rows that come next: a tile reads and writes them in an order that the processor does not foresee."""
    cdef char *p = <char *> (a.raw + start * a.row_stride)
    cdef Py_ssize_t j, bytes_ = max(<Py_ssize_t> 0, stop - start) * a.columns * <Py_ssize_t> sizeof(stored)
    if a.column_stride == 1 and a.row_stride == a.columns:
        for j in range((bytes_ + 63) // 64):
            if write:
                prefetch_to_write(p + 64 * j)
            else:
                prefetch(p + 64 * j)


cdef inline void fetch_numbers(const Matrix *a, Py_ssize_t start, Py_ssize_t stop) noexcept nogil:
    """The same of numbers to compute with."""
    cdef Py_ssize_t j, bytes_ = max(<Py_ssize_t> 0, stop - start) * a.columns * <Py_ssize_t> sizeof(real)
    if a.row_stride == a.columns:
        for j in range((bytes_ + 63) // 64):
            prefetch(<const char *> (a.data + start * a.row_stride) + 64 * j)


cdef inline void store_tile(const Matrix *a, Py_ssize_t row, int n, const real *tile) noexcept nogil:
    cdef stored *p = a.raw + row * a.row_stride
    cdef Py_ssize_t j, i, g, u, v
    if a.column_stride == 1:
        for u in range((a.columns + LANES - 1) // LANES):
            j = u * LANES
            for v in range(TILE // LANES):
                g = v * LANES
                scatter_columns(p + g * a.row_stride + j, a.row_stride, n - g, min(<Py_ssize_t> LANES, a.columns - j),
                                tile + j * TILE + g)
    elif a.row_stride == 1 and n == TILE:
        for j in range(a.columns):
            for v in range(TILE // LANES):
                g = v * LANES
                sstore(p + j * a.column_stride + g, vload(tile + j * TILE + g))
    else:
        for j in range(a.columns):
            for i in range(n):
                sstore_one(p + i * a.row_stride + j * a.column_stride, tile[j * TILE + i])


cdef inline int tile_multipliers(const real *multiplier, Py_ssize_t row, int n, int size, real *mult) noexcept nogil:
    """Row multipliers of n rows, 0 past n up to `size`; how many are not 0."""
    cdef int i, live = 0
    if multiplier == NULL:
        for i in range(size):
            mult[i] = 1 if i < n else 0
        return n
    for i in range(size):
        mult[i] = multiplier[row + i] if i < n else 0
        live += mult[i] != 0
    return live


cdef inline void keep_losses(const ScoresPass *s, Py_ssize_t row, int n, int size, const real *mult, real *losses,
                             double *sums) noexcept nogil:
    """Losses of n rows: to where they are asked for, and times multipliers to their sums; `size`: n in whole tiles."""
    cdef int i
    for i in range(n, size):
        losses[i] = 0
    if s.row_loss != NULL and s.row_loss_stride == 1:
        memcpy(s.row_loss + row, losses, n * sizeof(real))
    elif s.row_loss != NULL:
        for i in range(n):
            s.row_loss[(row + i) * s.row_loss_stride] = losses[i]
    for i in range(size // TILE):
        add_products(sums, losses + i * TILE, mult + i * TILE)


cdef inline const real *row_more(const Options *o, const Matrix *probabilities, Py_ssize_t row, Py_ssize_t c,
                                 lane_int y) noexcept nogil:
    """What the general form is given of a row beside its scores: margins of its target, probabilities, stats; or NULL."""
    if o.kind == FROM_STATS:
        return probabilities.data + row
    if o.paired:
        return o.pairs + y * c
    return probabilities.data + row * probabilities.row_stride if probabilities.data != NULL else NULL


cdef inline bint has_more(const Options *o) noexcept nogil:
    return o.general and (o.probabilities or o.paired)


cdef inline void load_more(const real **rows, Py_ssize_t c, real *tile) noexcept nogil:
    """That of TILE rows as a transposed tile."""
    cdef Py_ssize_t j, g, u, v
    for u in range((c + LANES - 1) // LANES):
        j = u * LANES
        for v in range(TILE // LANES):
            g = v * LANES
            gather_rows(rows + g, j, min(<Py_ssize_t> LANES, c - j), tile + j * TILE + g)


cdef inline void look_up_pairs(const Options *o, const lane_int *y, Py_ssize_t c, real *tile) noexcept nogil:
    """The same of margins that all fit in a register; rows whose target is no class get any of them."""
    cdef vec table = vload_part(o.pairs, c * c, 0)
    cdef ivec first
    cdef Py_ssize_t j, g, v
    for v in range(TILE // LANES):
        g = v * LANES
        first = imul(iload(y + g), iset(<lane_int> c))
        for j in range(c):
            vstore(tile + j * TILE + g, look_up(table, iadd(first, iset(<lane_int> j))))


cdef inline Walk walk_group(const Options *o, real *tile, Py_ssize_t c, const lane_int *y, int g, const real *more,
                            real *slopes) noexcept nogil:
    """The walk over group g of LANES rows: tiles hold TILE / LANES groups each."""
    cdef Py_ssize_t at = g * LANES // TILE * c * TILE + g * LANES % TILE
    cdef Walk w
    if o.kind == FROM_STATS:
        more += g * LANES
    elif more != NULL:
        more += at
    w = walk_lanes(tile + at, c, iload(y + g * LANES), more)
    if keeps_slopes(o):
        w.slopes = slopes + at
    return w


cdef inline void tile_losses_case(int kind, int power, int form, bint grad, const Options *options, real *tile,
                                  int tiles, Py_ssize_t c, const lane_int *y, const real *mult, real scale,
                                  bint all_live, real *losses, const real *more, real *extras,
                                  real *slopes, bint *doubtful) noexcept nogil:
    # Each step is for all groups of rows before the next, so that none waits for another's result.
    cdef Options own = options[0]
    cdef const Options *o = &own
    cdef vec m[128]
    cdef vec target[128]
    cdef vec a[128]
    cdef vec b[128]
    cdef vec low[128]
    # The same for the general form.
    cdef vec c_factor[128]
    cdef vec found[3][128]
    cdef ivec pivot[128]
    cdef int near[128]
    cdef vec loss, last = vset(0), zero = vset(0), seen = zero, size
    cdef mask dead
    cdef Walk w
    cdef State s
    cdef int g, groups = tiles * (TILE // LANES)
    cdef Py_ssize_t k
    cdef bint general = form != PLAIN
    own.kind, own.power = kind, power
    fix_form(&own, LANED, form)
    for g in range(groups):
        w = walk_group(o, tile, c, y, g, more, slopes)
        look_ahead(o, &w, &m[g], &target[g], &size)
        if general and o.slopes_in_units:
            near[g] = <int> first_lane(nearness(o, vset(lane_greatest(size))))
        if general and pivots_on_top(o):
            pivot[g] = tile_top(&w, m[g])
        aim(o, &m[g], &target[g])
    for g in range(groups):
        w = walk_group(o, tile, c, y, g, more, slopes)
        s.m, s.target, s.a, s.b = m[g], target[g], zero, zero
        if general:
            s.pivot = pivot[g] if pivots_on_top(o) else w.target
            if o.kind == SOFTMAX and o.slopes_in_units:
                w.near, s.c = near[g], steps_of_origin(o, s.m, vset(near[g]))
            elif o.kind == SOFTMAX:
                s.c = origin_of_distance(o, s.m)
        open_rows(LANED, grad, o, &w, mul(vload(mult + g * LANES), vset(scale)), &s, &last)
        a[g], b[g] = s.a, s.b
        if general and o.slopes_in_units:
            c_factor[g] = s.c
        if has_low(o):
            low[g] = s.low
        if general and o.dense:
            found[0][g], found[1][g] = s.more[0], s.more[1]
        if general and o.entropy:
            found[2][g] = s.more[2]
        if general and o.kind == SOFTMAX and o.probabilities:
            seen = join_bits(seen, s.more[3])
    if general and doubtful != NULL:
        doubtful[0] = not all_below_2(seen)
    for g in range(groups):
        s.m, s.target, s.a, s.b = m[g], target[g], a[g], b[g]
        if has_low(o):
            s.low = low[g]
        s.more[0] = s.more[1] = s.more[2] = zero
        if general and o.dense:
            s.more[0], s.more[1] = found[0][g], found[1][g]
        if general and o.entropy:
            s.more[2] = found[2][g]
        if general and o.slopes_in_units:
            s.c, s.near = c_factor[g], vset(near[g])
        loss = settle(LANED, grad, o, &s, mul(vload(mult + g * LANES), vset(scale)))
        if not all_live:
            loss = choose(veq(vload(mult + g * LANES), zero), zero, loss)
        vstore(losses + g * LANES, loss)
        a[g], b[g] = s.a, s.b
        if general:
            if o.kind == SOFTMAX:
                c_factor[g] = s.c
            if extras != NULL:
                dead = veq(vload(mult + g * LANES), zero)
                vstore(extras + g * LANES, choose(dead, zero, s.more[0]))
                vstore(extras + EXTRAS + g * LANES, choose(dead, zero, s.more[1]))
    if not grad:
        return
    for g in range(groups):
        w = walk_group(o, tile, c, y, g, more, slopes)
        s.m, s.target, s.a, s.b = m[g], target[g], a[g], b[g]
        if general:
            s.pivot = pivot[g] if pivots_on_top(o) else w.target
            if o.kind == SOFTMAX:
                s.c = c_factor[g]
        close_rows(LANED, o, &w, &s, last)
        if not all_live:
            dead = veq(vload(mult + g * LANES), zero)
            for k in range(c):
                vstore(w.tile + k * TILE, choose(dead, zero, vload(w.tile + k * TILE)))


cdef void tile_losses(const Options *o, bint grad, real *tile, int tiles, Py_ssize_t c, const lane_int *y,
                      const real *mult, real scale, bint all_live, real *losses, const real *more,
                      real *extras, real *slopes, bint *doubtful=NULL) noexcept nogil:
    """Row losses of up to BATCH transposed tiles, and gradients in place; both 0 in lanes whose multiplier is 0.

    slopes: as large as the tiles, if `keeps_slopes`.
    doubtful: whether a probability may be none, unless it is NULL (softmax).
    """
    cdef Call t
    t.o, t.tile, t.tiles, t.c, t.y, t.mult, t.scale, t.all_live = o, tile, tiles, c, y, mult, scale, all_live
    t.losses, t.more, t.extras, t.doubtful, t.slopes = losses, more, extras, doubtful, slopes
    by_kind(LANED, grad, &t)


cdef inline Py_ssize_t batch_tiles(Py_ssize_t columns) noexcept nogil:
    return max(<Py_ssize_t> 1, min(<Py_ssize_t> BATCH, BATCH_BYTES // (columns * TILE * <Py_ssize_t> sizeof(real))))


cdef inline Py_ssize_t laned_size(const ScoresPass *s) noexcept nogil:
    """Bytes of scratch."""
    cdef Py_ssize_t c = s.scores.columns
    return (2 + keeps_slopes(&s.options)) * batch_tiles(c) * TILE * c * <Py_ssize_t> sizeof(real)


cdef inline void keep_extras(const ScoresPass *s, const real *extras, Py_ssize_t row, int n) noexcept nogil:
    if s.z != NULL:
        memcpy(s.z + row, extras, n * sizeof(real))
    if s.entropy != NULL:
        memcpy(s.entropy + row, extras + EXTRAS, n * sizeof(real))


cdef void keep_tile_tops(const ScoresPass *s, Py_ssize_t row, int n, const real *mult, real *tile) noexcept nogil:
    """The largest classes of the n rows of a transposed tile; 0 where the multiplier is 0."""
    cdef lane_int some[16]
    cdef Walk w
    cdef int i, g, live = 0
    for i in range(TILE // LANES):
        g = i * LANES
        w = walk_lanes(tile + g, s.scores.columns, iset(0), NULL)
        istore(some + g, tile_argmax(&w))
    for i in range(TILE):
        live += mult[i] != 0
    if live == TILE:  # as nearly always; then it is all vectors
        for i in range(TILE):
            s.top[row + i] = some[i]
    else:
        for i in range(n):
            s.top[row + i] = some[i] if mult[i] != 0 else 0


cdef void keep_group_tops(const ScoresPass *s, Py_ssize_t row, int n, const real *mult) noexcept nogil:
    """The same of n <= GROUP_ROWS rows that are contiguous."""
    cdef vec top[32]
    cdef bint is_known[32]
    cdef real m[32]
    cdef Walk w
    cdef int i
    cdef Py_ssize_t v, g
    for i in range(n):
        w = walk_row(s.scores.raw + (row + i) * s.scores.row_stride, NULL, NULL, s.scores.columns, 0, NULL)
        is_known[i] = row_top(&w, &top[i])
    for i in range(n, (n + LANES - 1) // LANES * LANES):
        top[i] = vset(0)
    for v in range((n + LANES - 1) // LANES):
        g = v * LANES
        vstore(m + g, transposed_max(top + g))
    for i in range(n):
        w = walk_row(s.scores.raw + (row + i) * s.scores.row_stride, NULL, NULL, s.scores.columns, 0, NULL)
        if mult[i] == 0:
            s.top[row + i] = 0
        elif is_known[i]:
            s.top[row + i] = class_of(&w, vset(m[i]))
        else:
            s.top[row + i] = row_argmax(&w)


cdef void keep_all_tops(const ScoresPass *s, Py_ssize_t row, int n, const real *mult) noexcept nogil:
    cdef real tile[32 * 16]
    cdef int k, i
    if s.scores.columns <= 2 * LANES:
        for k in range((n + TILE - 1) // TILE):
            i = k * TILE
            load_tile(&s.scores, row + i, min(TILE, n - i), tile)
            keep_tile_tops(s, row + i, min(TILE, n - i), mult + i, tile)
    else:
        for k in range((n + GROUP_ROWS - 1) // GROUP_ROWS):
            i = k * GROUP_ROWS
            keep_group_tops(s, row + i, min(<int> GROUP_ROWS, n - i), mult + i)


cdef inline void keep_tops(const ScoresPass *s, Py_ssize_t row, int n, const real *mult) noexcept nogil:
    """The largest classes of n rows, each contiguous, if they are asked for: before gradients take the scores' place. Multipliers
    are in whole tiles."""
    if s.top != NULL:
        keep_all_tops(s, row, n, mult)


# Not inline: beside a second load of tiles, plain rows of 2 classes took 5 to 8 % longer.
cdef void load_beside(const ScoresPass *s, Py_ssize_t row, int n, const lane_int *y, const real *mult,
                      real *tile) noexcept nogil:
    """What the general form is given of n rows beside their scores, as a transposed tile; of rows that are skipped, any."""
    cdef Py_ssize_t c = s.scores.columns
    cdef Matrix given = s.probabilities
    cdef const real *rows[16]
    cdef int r
    if s.options.paired and c * c <= TABLE:
        look_up_pairs(&s.options, y, c, tile)
    elif s.options.paired:
        for r in range(TILE):
            rows[r] = s.options.pairs + (y[r] if mult[r] != 0 else 0) * c
        load_more(rows, c, tile)
    elif STORED_IS_REAL:
        given.raw = <stored *> given.data
        load_tile(&given, row, n, tile)
    else:
        for r in range(TILE):
            rows[r] = given.data + (row + min(r, n - 1)) * given.row_stride
        load_more(rows, c, tile)


cdef inline bint checks_apart(const ScoresPass *s) noexcept nogil:
    """Whether probabilities are looked at a group of rows at a time, before that is computed with, and not as it is."""
    return s.unfit != NULL and s.options.kind != SOFTMAX


cdef void check_probabilities(const ScoresPass *s, Py_ssize_t row, int n) noexcept nogil:
    """Look at those of n rows."""
    cdef Py_ssize_t c = s.scores.columns, segment = row // s.segment
    cdef Py_ssize_t found = unfit_of(s.probabilities.data + row * c, n * c, 1 if s.options.kind == LOGISTIC else <real> REAL_MAX)
    if found >= 0 and s.unfit[segment] < 0:
        s.unfit[segment] = row * c + found


cdef double scores_laned(const ScoresPass *s, Py_ssize_t start, Py_ssize_t stop, real *tile) noexcept nogil:
    """Σ multiplier · ℓ of rows [start, stop), by batches of transposed tiles."""
    cdef Py_ssize_t row, first, next, c = s.scores.columns
    cdef int n, i, live, tiles
    cdef bint grad = s.grad.raw != NULL
    cdef bint far = grad and s.grad.raw != s.scores.raw and s.scores.rows * c * <Py_ssize_t> sizeof(stored) > FAR_BYTES
    cdef lane_int y[256]
    cdef real mult[256]
    cdef real losses[256]
    cdef real extras[512]
    cdef bint wants_extras = s.z != NULL or s.entropy != NULL, doubtful
    cdef double sums[16]
    cdef Py_ssize_t batch = TILE * batch_tiles(c)
    cdef real *kept_more = tile + batch * c if has_more(&s.options) else NULL
    cdef const real *more = kept_more
    memset(sums, 0, sizeof(sums))
    memset(y, 0 if has_target(&s.options) else 0xff, sizeof(y))  # class −1 is none
    for first in range((stop - start + batch - 1) // batch):
        row = start + first * batch
        n = <int> min(batch, stop - row)
        tiles = (n + TILE - 1) // TILE
        live = tile_multipliers(s.multiplier, row, n, tiles * TILE, mult)
        convert(&s.targets, row, n, y)
        if checks_apart(s):
            check_probabilities(s, row, n)
        for i in range(tiles):
            next = row + batch + i * TILE
            fetch_rows(&s.scores, next, min(next + TILE, stop), False)
            if s.options.probabilities:
                fetch_numbers(&s.probabilities, next, min(next + TILE, stop))
            load_tile(&s.scores, row + i * TILE, min(TILE, n - i * TILE), tile + i * c * TILE)
            if s.top != NULL:
                keep_tile_tops(s, row + i * TILE, min(TILE, n - i * TILE), mult + i * TILE, tile + i * c * TILE)
            if kept_more != NULL:
                load_beside(s, row + i * TILE, min(TILE, n - i * TILE), y + i * TILE, mult + i * TILE,
                            kept_more + i * c * TILE)
        if s.options.kind == FROM_STATS:
            more = s.probabilities.data + row
        doubtful = False
        tile_losses(&s.options, grad, tile, tiles, c, y, mult, s.scale, live == tiles * TILE, losses, more,
                    extras if wants_extras else NULL, tile + 2 * batch * c, &doubtful if s.unfit != NULL else NULL)
        if doubtful:
            check_probabilities(s, row, n)
        keep_extras(s, extras, row, n)
        if grad:
            for i in range(tiles):
                next = row + batch + i * TILE
                if far:
                    fetch_rows(&s.grad, next, min(next + TILE, stop), True)
                store_tile(&s.grad, row + i * TILE, min(TILE, n - i * TILE), tile + i * c * TILE)
        keep_losses(s, row, n, tiles * TILE, mult, losses, sums)
    return fold_doubles(sums)


cdef inline double fold_doubles(double *sums) noexcept nogil:
    cdef int i
    cdef double total = 0
    for i in range(TILE):
        total += sums[i]
    return total


cdef inline void aim_group(const Options *o, int n, const vec *top, real *m, real *target) noexcept nogil:
    """What the first walk starts from, of n rows: `top` holds the maximum of each over its lanes."""
    cdef vec start, at
    cdef Py_ssize_t v, g
    for v in range((n + LANES - 1) // LANES):
        g = v * LANES
        start, at = transposed_max(top + g) if shifts(o) else vset(0), vload(target + g)
        aim(o, &start, &at)
        vstore(m + g, start)
        vstore(target + g, at)


cdef inline void settle_group(bint grad, const Options *o, int n, const vec *first, const vec *second, const vec *low,
                              const real *begin, const real *m, const real *target, const real *mult, real factor,
                              real *a, real *b, real *losses) noexcept nogil:
    """Losses of n rows, and in a and b what the gradient needs, from what was found of each over its lanes."""
    cdef State state
    cdef Py_ssize_t v, g
    for v in range((n + LANES - 1) // LANES):
        g = v * LANES
        state.start, state.m, state.target = vload(begin + g), vload(m + g), vload(target + g)
        fold(o, first + g, second + g, low + g, &state)
        vstore(losses + g, settle(ROWED, grad, o, &state, mul(vload(mult + g), vset(factor))))
        vstore(a + g, state.a)
        vstore(b + g, state.b)


cdef inline void settle_general_group(bint grad, const Options *o, int n, const vec *first, const vec *second,
                                      const vec *low, vec found[2][32], const real *u_pivot, const real *m,
                                      const real *origin, const real *near, const real *target, const real *mult,
                                      real factor, real *a, real *b, real *coefficient, real *losses,
                                      real *extras) noexcept nogil:
    """The same for the general form."""
    cdef State state
    cdef Py_ssize_t v, g
    for v in range((n + LANES - 1) // LANES):
        g = v * LANES
        state.m, state.target = vload(m + g), vload(target + g)
        fold(o, first + g, second + g, low + g, &state)
        if o.kind == SOFTMAX:
            fold_general(o, second + g, found[0] + g, found[1] + g, u_pivot + g, &state)
        if o.slopes_in_units:
            state.c, state.near = vload(origin + g), vload(near + g)
        vstore(losses + g, settle(ROWED, grad, o, &state, mul(vload(mult + g), vset(factor))))
        vstore(a + g, state.a)
        vstore(b + g, state.b)
        vstore(coefficient + g, state.c)
        if extras != NULL:
            vstore(extras + g, state.more[0])
            vstore(extras + EXTRAS + g, state.more[1])


cdef struct LateGroup:
    # Rows whose gradients are sent past the caches while the next group is walked over.
    Late rows[32]
    int n, way
    Py_ssize_t columns
    stored *to
    # What lies between rows, and before the first and behind the last: the end of one and the beginning of the next, which share
    # a line there (`end_of`). Written long before it is sent: what is read across two stores that are still on their way waits
    # for them, and for all that are ahead of them, past the caches.
    real between[33][48]


cdef inline Py_ssize_t end_of(Py_ssize_t c) noexcept nogil:
    """Where rows of c classes end in `between`: the last whole vector of one begins at 0."""
    return LANES + c % LANES


cdef inline void leave(int way, LateGroup *late, int i, const Walk *w, vec last, vec r, vec less, vec target,
                       lane_int other) noexcept nogil:
    """Leave the last walk over row i for later, but for its ends, of which the last is `last` of what was kept. Rows are left in
    order."""
    cdef Late *row = &late.rows[i]
    cdef Py_ssize_t c = w.classes, whole = c // LANES * LANES
    cdef real end[16]
    vstore(late.between[i] + end_of(c), late_value(way, w.tile, w.more, r, less))
    vstore(late.between[i + 1], late_value(way, w.tile + whole - LANES, w.more + whole - LANES, r, less))
    vstore(end, last)
    vstore(late.between[i + 1] + LANES,
           product_less(last, r, mul(less, vload_part(w.more + whole, c - whole, 0))) if way == LATE_WEIGHED else
           late_value(way, end, NULL, r, less))
    put_between(late, i, c, ifirst(w.target), first_lane(target))
    if way == LATE_ZEROS:
        put_between(late, i, c, other, first_lane(less))
    row.inside, row.r, row.less, row.target, row.sent = walk_past(w), r, less, target, 0
    row.other = iset(other - <lane_int> row.inside.first)


cdef inline void put_between(LateGroup *late, int i, Py_ssize_t c, lane_int k, real entry) noexcept nogil:
    """The entry of class k, if that lies at an end of row i."""
    cdef Py_ssize_t whole = c // LANES * LANES
    if 0 <= k < LANES:
        late.between[i][end_of(c) + k] = entry
    elif whole - LANES <= k < c:
        late.between[i + 1][k - whole + LANES] = entry


cdef void finish(LateGroup *late) noexcept nogil:
    """Send what is left of them."""
    cdef Py_ssize_t c, first, end
    cdef int i
    if late.n == 0:
        return
    c, end = late.columns, before_vector(late.to)
    stream_bytes(<char *> late.to, <char *> (late.between[0] + end_of(c)), end * <Py_ssize_t> sizeof(stored))
    for i in range(late.n):
        if late.way == LATE_WEIGHED:
            send_late(LATE_WEIGHED, &late.rows[i], late.rows[i].inside.vectors)
        elif late.way == LATE_LOG:
            send_late(LATE_LOG, &late.rows[i], late.rows[i].inside.vectors)
        elif late.way == LATE_ZEROS:
            send_late(LATE_ZEROS, &late.rows[i], late.rows[i].inside.vectors)
        else:
            send_late(LATE_SHARE, &late.rows[i], late.rows[i].inside.vectors)
        late.rows[i].sent = late.rows[i].inside.vectors = 0
        first = (i + 1) * c - c % LANES
        first -= since_vector(late.to + first)
        end = (i + 1) * c
        if i + 1 < late.n:
            end += before_vector(late.to + end)
        stream_bytes(<char *> (late.to + first), <char *> (late.between[i + 1] + end_of(c) + first - (i + 1) * c),
                     (end - first) * <Py_ssize_t> sizeof(stored))
    late.n = 0


cdef inline void group_losses_case(int kind, int power, int form, bint grad, const ScoresPass *s, Py_ssize_t start,
                                   int n, Py_ssize_t ahead, const lane_int *y, const real *mult, real *scratch,
                                   real *losses, real *extras, LateGroup *late) noexcept nogil:
    """Row losses, and gradients, of n <= GROUP_ROWS rows that are contiguous; both 0 where the multiplier is 0.

    A walk is over all rows of the group before the next begins, so that no row waits for what is folded of it. Gradients that go
    past the caches may be left in `late`.
    """
    cdef Options own = s.options
    cdef const Options *o = &own
    # Of each row, over its lanes (`first`: its maximum, then what the first walk finds); and what comes of that, one number a row.
    cdef vec first[32]
    cdef vec second[32]
    cdef vec low[32]
    cdef vec last[32]
    cdef ivec place[32]
    cdef real m[32]
    cdef real begin[32]  # where it `glances`: what the first walk started from
    cdef real target[32]
    cdef real a[32]
    cdef real b[32]
    # The same for the general form.
    cdef vec found[2][32]
    cdef real origin[32]
    cdef real coefficient[32]
    cdef lane_int pivot[32]
    cdef real u_pivot[32]
    cdef vec size[32]
    cdef real near[32]
    # What is walked on lives in variables of its own: through a pointer it would be read anew after every store.
    cdef Walk w
    cdef State state
    cdef vec end = vset(0), seen = end
    cdef Py_ssize_t c = s.scores.columns
    cdef const stored *src = s.scores.raw + start * s.scores.row_stride
    cdef stored *dst = s.grad.raw + start * s.grad.row_stride if grad else NULL
    cdef Py_ssize_t stride = s.grad.row_stride
    # The next group's scores are asked for during the first walk.
    cdef const stored *next = src + ahead * s.scores.row_stride
    cdef const real *more = NULL
    cdef int i, r
    cdef bint general = form != PLAIN and form != MANY, doubtful = False
    cdef bint past, is_late, apart, is_max = kind == HINGE_MAX and form == MANY, is_log = kind == LOG_PROBABILITIES
    cdef int way = LATE_WEIGHED if form == WEIGHED else LATE_ZEROS if is_max else LATE_LOG if is_log else LATE_SHARE
    cdef real beyond
    cdef lane_int found_class
    cdef mask fits
    cdef stored *to
    cdef Py_ssize_t done
    own.kind, own.power = kind, power
    fix_form(&own, ROWED, form)
    # Whether gradients go past the caches from the last walk, or while the next group is walked over; but for what lies between.
    past = (grad and STORED_IS_REAL and sends_late(o) and s.streams and c >= MANY_CLASSES
            and (keeps(o) or has_low(o) or is_max or is_log))
    is_late = past and (form == MANY or has_low(o) or form == FLAT or form == WEIGHED or form == BENT)
    # Whether what is kept is apart from the gradient's place, where scores that are walked over again may be.
    apart = grad and (not STORED_IS_REAL or (glances(o) and keeps(o) and s.grad.raw == s.scores.raw))
    if grad and s.streams:
        dst, stride = held_rows(scratch, c), whole_columns(c) if is_late else c
    for i in range(n, (n + LANES - 1) // LANES * LANES):
        first[i] = second[i] = low[i] = end
        if general:
            found[0][i] = found[1][i] = size[i] = end
            u_pivot[i] = 0
    memset(m, 0, sizeof(m))
    memset(target, 0, sizeof(target))
    for i in range(n):
        if shifts(o):
            w = walk_row(src + i * s.scores.row_stride, NULL, NULL, c, 0, NULL)
            if glances(o):
                first[i] = glance(&w, &fits)
            if not (glances(o) and all_lanes(fits)):
                first[i] = row_max(&w, &size[i] if o.slopes_in_units else NULL)
        if has_target(o):
            target[i] = sone(src + i * s.scores.row_stride + y[i])
    aim_group(o, n, first, m, target)
    if glances(o):
        memcpy(begin, m, sizeof(m))
    if general and o.kind == SOFTMAX:
        for r in range((n + LANES - 1) // LANES):
            end = vload(m + r * LANES)
            if o.slopes_in_units:
                vstore(near + r * LANES, nearness(o, transposed_max(size + r * LANES)))
                end = steps_of_origin(o, end, vload(near + r * LANES))
            else:
                end = origin_of_distance(o, end)
            vstore(origin + r * LANES, end)
        end = vset(0)
    if general:  # ahead of the walks, which a branch that was foreseen wrongly would hold up
        for i in range(n):
            w = walk_row(src + i * s.scores.row_stride, NULL, NULL, c, 0, NULL)
            pivot[i] = class_of(&w, vset(m[i])) if pivots_on_top(o) else y[i]
    for i in range(n):
        first[i] = second[i] = low[i] = end
        if general:
            found[0][i] = found[1][i] = end
            u_pivot[i] = 0
        if mult[i] == 0:
            doubtful = True
            continue
        if general:
            more = row_more(o, &s.probabilities, start + i, c, y[i])
        w = walk_row(src + i * s.scores.row_stride, dst + i * stride if grad else NULL,
                     kept_row(grad, apart, dst + i * stride, scratch, c, i), c, y[i], more)
        w.ahead, w.ahead_step = next + i * s.scores.row_stride, LANES
        if c * <Py_ssize_t> sizeof(stored) >= LONG_ROW:  # two of them, and what is kept of one, would not stay in a cache
            w.ahead = w.src + NEAR_AHEAD // sizeof(stored)
        w.dst_ahead = 0 if s.streams else ahead * stride
        if is_late:
            w.late = &late.rows[i]
        if general:
            w.more_ahead, w.near = ahead * s.probabilities.row_stride, <int> near[i] if o.slopes_in_units else FAR
            if keeps_slopes(o):
                w.slopes = kept_slopes(scratch, c, i)
            u_pivot[i] = target_at(o, &w, pivot[i], y[i]) if o.dense else 0
            state.pivot = iset(pivot[i])
            if o.kind == SOFTMAX:
                state.c = vset(origin[i])
        state.target = vset(target[i])
        for r in range(2):
            state.m = vset(m[i])
            open_rows(ROWED, grad, o, &w, vset(mult[i] * s.scale), &state, &last[i])
            if not glances(o):
                break
            begin[i], m[i] = m[i], lane_greatest(state.top)
            beyond = 0 if grad and is_tiny(mult[i] * s.scale) else GLANCE_BEYOND
            if all_lanes(vle(state.top, vset(begin[i] + beyond))):
                break
        first[i], second[i] = state.a, state.b
        if has_low(o):
            low[i] = state.low
        if is_max:
            place[i] = state.place
        if general:
            found[0][i], found[1][i] = state.more[0], state.more[2]
            if o.kind == SOFTMAX and o.probabilities:
                seen = join_bits(seen, state.more[3])
    if general and o.kind == SOFTMAX and o.probabilities and s.unfit != NULL and (doubtful or not all_below_2(seen)):
        check_probabilities(s, start, n)
    if general:
        settle_general_group(grad, o, n, first, second, low, found, u_pivot, m, origin, near, target, mult, s.scale, a, b, coefficient, losses,
                             extras)
    else:
        settle_group(grad, o, n, first, second, low, begin, m, target, mult, s.scale, a, b, losses)
    if is_late:
        finish(late)
    for r in range(n):
        # What was kept is read from the last row on: a read waits for a masked store, of a row's end, that lies just before.
        i = n - 1 - r if keeps(o) and not is_late else r
        if mult[i] == 0:
            losses[i] = 0
            if general and extras != NULL:
                extras[i] = extras[EXTRAS + i] = 0
            if grad:
                memset(dst + i * stride, 0, c * sizeof(stored))
            if is_late:
                w = walk_row(src, dst + i * stride, <real *> dst + i * stride, c, y[i], o.class_weight if form == WEIGHED else NULL)
                w.past = s.grad.raw + (start + i) * c
                leave(way, late, i, &w, end, end, end, end, -1)
        elif grad:
            if general:
                more = row_more(o, &s.probabilities, start + i, c, y[i])
                state.c, state.pivot = vset(coefficient[i]), iset(pivot[i])
            w = walk_row(src + i * s.scores.row_stride, dst + i * stride,
                         kept_row(grad, apart, dst + i * stride, scratch, c, i), c, y[i], more)
            if general and keeps_slopes(o):
                w.slopes = kept_slopes(scratch, c, i)
            state.m, state.target, state.a, state.b = vset(m[i]), vset(target[i]), vset(a[i]), vset(b[i])
            if is_max:
                state.low, state.place = first[i], place[i]
            if past:
                w.past = s.grad.raw + (start + i) * c
            if is_late and is_max:
                found_class = top_class(o, &w, &state)
                if found_class == c:
                    state.a = end
                leave(way, late, i, &w, end, end, state.a, sub(end, state.a), found_class)
            elif is_late and is_log:  # what is sent is of the scores
                if c % LANES:
                    last[i] = sload_part(w.src + c // LANES * LANES, c % LANES, 0)
                w.tile = <real *> w.src
                leave(way, late, i, &w, last[i], state.b, state.a, end, -1)
            elif is_late and not keeps(o):  # what was written is the gradient, but at the target
                if not has_target(o):
                    w.target = iset(-1)
                if c % LANES:
                    last[i] = vload_part(w.tile + c // LANES * LANES, c % LANES, 0)
                w.more = NULL
                leave(way, late, i, &w, last[i], vset(1), end, state.b, -1)
            elif is_late:
                w.more = o.class_weight if form == WEIGHED else NULL
                leave(way, late, i, &w, last[i], state.a, less_of(o, state.c) if general else end, state.b, -1)
            else:
                close_rows(ROWED, o, &w, &state, last[i])
    if is_late:
        late.n, late.way, late.columns, late.to = n, way, c, s.grad.raw + start * c
    elif grad and s.streams:
        done, to = 0, s.grad.raw + start * c
        for i in range(n if past else 0):
            if mult[i] != 0:
                r = before_vector(to + i * c)
                stream_bytes(<char *> (to + done), <char *> (dst + done), (i * c + r - done) * <Py_ssize_t> sizeof(stored))
                done = i * c + r + vectors_past(c, r) * LANES
        stream_bytes(<char *> (to + done), <char *> (dst + done), (n * c - done) * <Py_ssize_t> sizeof(stored))


cdef inline real *kept_row(bint grad, bint apart, stored *dst, real *scratch, Py_ssize_t columns, int i) noexcept nogil:
    """Where the numbers of row i of a group are kept between its walks: the gradient's place, if that may be."""
    if not grad:
        return NULL
    return scratch + i * columns if apart else <real *> dst


cdef inline stored *held_rows(real *scratch, Py_ssize_t columns) noexcept nogil:
    """Where the gradient of a group is held before it streams."""
    return <stored *> (scratch if STORED_IS_REAL else scratch + columns * group_rows(columns))


cdef inline real *kept_slopes(real *scratch, Py_ssize_t columns, int i) noexcept nogil:
    """Where slopes of row i of a group are kept, in whole vectors."""
    return scratch + 2 * columns * group_rows(columns) + i * whole_columns(columns)


cdef inline Py_ssize_t whole_columns(Py_ssize_t columns) noexcept nogil:
    """Up to whole vectors."""
    return (columns + LANES - 1) // LANES * LANES


cdef void group_losses(const ScoresPass *s, Py_ssize_t start, int n, Py_ssize_t ahead, const lane_int *y,
                       const real *mult, real *scratch, real *losses, real *extras, LateGroup *late) noexcept nogil:
    cdef Call t
    t.o, t.s, t.start, t.n, t.ahead, t.y, t.mult, t.scratch = &s.options, s, start, n, ahead, y, mult, scratch
    t.losses, t.extras, t.late = losses, extras, late
    by_kind(ROWED, s.grad.raw != NULL, &t)


# --- each kind is compiled for itself, in both layouts ---------------------------------------------------------------
cdef struct Call:
    const Options *o
    const lane_int *y
    const real *mult
    real *losses
    real *extras
    # Tiles (LANED).
    real *tile
    const real *more
    bint *doubtful
    real *slopes
    int tiles
    Py_ssize_t c
    real scale
    bint all_live
    # A group of rows (ROWED).
    const ScoresPass *s
    real *scratch
    Py_ssize_t start, ahead
    int n
    LateGroup *late


cdef inline void of_kind(int layout, int kind, int power, int form, bint grad, const Call *t) noexcept nogil:
    if layout == LANED:
        tile_losses_case(kind, power, form, grad, t.o, t.tile, t.tiles, t.c, t.y, t.mult, t.scale, t.all_live, t.losses,
                         t.more, t.extras, t.slopes, t.doubtful)
    else:
        group_losses_case(kind, power, form, grad, t.s, t.start, t.n, t.ahead, t.y, t.mult, t.scratch, t.losses,
                          t.extras, t.late)


cdef inline void by_general_kind(int layout, bint grad, const Call *t) noexcept nogil:
    cdef int kind = t.o.kind, power = t.o.power, form = form_of(t.o)
    if kind == SOFTMAX and form == FLAT and grad:
        of_kind(layout, SOFTMAX, 1, FLAT, True, t)
    elif kind == SOFTMAX and form == FLAT:
        of_kind(layout, SOFTMAX, 1, FLAT, False, t)
    elif MANY_FORMS and kind == SOFTMAX and form == GIVEN and grad:
        of_kind(layout, SOFTMAX, 1, GIVEN, True, t)
    elif MANY_FORMS and kind == SOFTMAX and form == GIVEN:
        of_kind(layout, SOFTMAX, 1, GIVEN, False, t)
    elif MANY_FORMS and kind == SOFTMAX and form == WEIGHED and grad:
        of_kind(layout, SOFTMAX, 1, WEIGHED, True, t)
    elif MANY_FORMS and STORED_IS_REAL and kind == SOFTMAX and form == UNEVEN and grad:
        of_kind(layout, SOFTMAX, 1, UNEVEN, True, t)
    elif MANY_FORMS and kind == SOFTMAX and form == BENT and grad:
        of_kind(layout, SOFTMAX, 1, BENT, True, t)
    elif MANY_FORMS and kind == SOFTMAX and (form == BENT or form == BENT_ANY):
        of_kind(layout, SOFTMAX, 1, BENT_ANY, grad, t)
    elif kind == SOFTMAX:
        of_kind(layout, SOFTMAX, 1, ANY, grad, t)
    elif MANY_FORMS and kind == HINGE and power == 1 and form == PAIRED and grad:
        of_kind(layout, HINGE, 1, PAIRED, True, t)
    elif MANY_FORMS and kind == HINGE and form == PAIRED and grad:
        of_kind(layout, HINGE, 2, PAIRED, True, t)
    elif kind == HINGE:
        of_kind(layout, HINGE, power, ANY, grad, t)
    elif kind == HINGE_MAX:
        of_kind(layout, HINGE_MAX, power, ANY, grad, t)
    elif MANY_FORMS and kind == LOGISTIC and form == GIVEN and grad:
        of_kind(layout, LOGISTIC, 1, GIVEN, True, t)
    elif kind == LOGISTIC:
        of_kind(layout, LOGISTIC, 1, ANY, grad, t)
    else:
        of_kind(layout, FROM_STATS, 1, ANY, True, t)


# Some are functions of their own, which the compiler must not put into their caller (CMakeLists.txt): of a function that has many
# of them arrays lie apart on the stack, and with the rows they should stay in the first-level cache (2 to 5 % of short rows).
cdef void general_tiles(bint grad, const Call *t) noexcept nogil:
    by_general_kind(LANED, grad, t)


cdef void general_groups(bint grad, const Call *t) noexcept nogil:
    by_general_kind(ROWED, grad, t)


cdef void softmax_groups(const Call *t) noexcept nogil:
    of_kind(ROWED, SOFTMAX, 1, PLAIN, True, t)


cdef inline void by_plain_kind(int layout, int form, bint grad, const Call *t) noexcept nogil:
    cdef int kind = t.o.kind, power = t.o.power
    if layout == ROWED and form == PLAIN and kind == SOFTMAX and grad:
        softmax_groups(t)
    elif kind == SOFTMAX and grad:
        of_kind(layout, SOFTMAX, 1, form, True, t)
    elif kind == SOFTMAX:
        of_kind(layout, SOFTMAX, 1, form, False, t)
    elif VBYTES == 64 and layout == ROWED and form == PLAIN and grad and (kind == HINGE or kind == HINGE_MAX):
        return  # such rows are narrow, or of so many classes that they have the form MANY
    elif kind == HINGE and power == 1 and grad:
        of_kind(layout, HINGE, 1, form, True, t)
    elif kind == HINGE and grad:
        of_kind(layout, HINGE, 2, form, True, t)
    elif kind == HINGE_MAX and grad:
        of_kind(layout, HINGE_MAX, power, form, True, t)
    elif kind == LOGISTIC:  # one walk: there is little to gain from a constant
        of_kind(layout, LOGISTIC, 1, form, grad, t)
    elif kind == PROBABILITIES:
        of_kind(layout, PROBABILITIES, 1, form, True, t)
    elif kind == LOG_PROBABILITIES:
        of_kind(layout, LOG_PROBABILITIES, 1, form, True, t)
    elif kind == LOG_SUM:
        of_kind(layout, LOG_SUM, 1, form, False, t)
    elif form == MANY:  # what is left has no gradient to send
        return
    elif kind == HINGE and power == 1:
        of_kind(layout, HINGE, 1, PLAIN, False, t)
    elif kind == HINGE:
        of_kind(layout, HINGE, 2, PLAIN, False, t)
    else:
        of_kind(layout, HINGE_MAX, power, PLAIN, False, t)


cdef void groups_of_many(bint grad, const Call *t) noexcept nogil:
    by_plain_kind(ROWED, MANY, grad, t)


cdef inline void by_kind(int layout, bint grad, const Call *t) noexcept nogil:
    """Kind, power and gradient or not as constants, so that each is compiled for its case alone."""
    if t.o.general or t.o.kind == FROM_STATS:
        if layout == LANED:
            general_tiles(grad, t)
        else:
            general_groups(grad, t)
    elif layout == ROWED and is_many(t.o, grad, t.s.scores.columns):
        groups_of_many(grad, t)
    else:
        by_plain_kind(layout, PLAIN, grad, t)


cdef double scores_rowed(const ScoresPass *s, Py_ssize_t start, Py_ssize_t stop, real *scratch) noexcept nogil:
    """The same, by groups of rows."""
    cdef Py_ssize_t row, t, group = group_rows(s.scores.columns)
    cdef int n, i
    cdef lane_int y[32]
    cdef real mult[32]
    cdef real losses[32]
    cdef real extras[512]
    cdef LateGroup late
    cdef double sums[16]
    memset(sums, 0, sizeof(sums))
    memset(y, 0 if has_target(&s.options) else 0xff, sizeof(y))  # class −1 is none
    memset(losses, 0, sizeof(losses))
    late.n = 0
    for i in range(GROUP_ROWS if s.streams else 0):
        late.rows[i].sent = late.rows[i].inside.vectors = 0
    for t in range((stop - start + group - 1) // group):
        row = start + t * group
        n = <int> min(group, stop - row)
        tile_multipliers(s.multiplier, row, n, GROUP_ROWS, mult)
        convert(&s.targets, row, n, y)
        if s.multiplier != NULL:
            for i in range(n):
                y[i] = 0 if mult[i] == 0 else y[i]  # an ignored target may be no class
        if checks_apart(s):
            check_probabilities(s, row, n)
        keep_tops(s, row, n, mult)
        group_losses(s, row, n, group, y, mult, scratch, losses, extras if s.z != NULL or s.entropy != NULL else NULL, &late)
        keep_extras(s, extras, row, n)
        keep_losses(s, row, n, (n + TILE - 1) // TILE * TILE, mult, losses, sums)
    finish(&late)
    return fold_doubles(sums)


# --- few rows of very many classes ------------------------------------------------------------------------------------
# A row is split into blocks of classes, whose size depends on the shape alone; each walk is over all blocks, shared among
# threads, before what it found is merged in order.
cdef enum:
    LONG_CLASSES = 65536
    LONG_ROWS = 8  # more keep the threads busy by themselves
    LONG_BLOCK = 16384  # classes of a block, at least

cdef enum:
    LOOK = 0
    OPEN = 1
    CLOSE = 2

cdef struct LongPass:
    ScoresPass *s
    int walk
    Py_ssize_t size, blocks  # of a row
    # Of each block, over its lanes, and of each row.
    vec *a
    vec *b
    vec *low
    vec *last
    Py_ssize_t holder[LONG_ROWS]  # the block whose class has the gradient (HINGE_MAX)
    lane_int y[LONG_ROWS]
    real mult[16]
    real m[16]
    real target[16]
    real row_a[16]
    real row_b[16]


cdef void long_block(void *job, Py_ssize_t k, int thread) noexcept nogil:
    cdef LongPass *p = <LongPass *> job
    cdef ScoresPass *s = p.s
    cdef const Options *o = &s.options
    cdef Py_ssize_t row = k // p.blocks, first = k % p.blocks * p.size, c = min(p.size, s.scores.columns - first)
    cdef bint grad = s.grad.raw != NULL
    cdef stored *dst = s.grad.raw + row * s.grad.row_stride + first if grad else NULL
    cdef real *kept = kept_row(grad, not STORED_IS_REAL, dst, <real *> s.scratch, s.scores.columns, <int> row)
    cdef Walk w = walk_row(s.scores.raw + row * s.scores.row_stride + first, dst,
                           kept if STORED_IS_REAL or not grad else kept + first, c, p.y[row] - <lane_int> first, NULL)
    cdef State state
    cdef unsigned mode = flush_to_zero()
    w.ahead, w.ahead_step = w.src, LANES
    state.m, state.target = vset(p.m[row]), vset(p.target[row])
    if p.mult[row] == 0:
        if p.walk == CLOSE:
            memset(dst, 0, c * sizeof(stored))
    elif p.walk == LOOK:
        p.a[k] = row_max(&w, NULL)
    elif p.walk == OPEN and grad:
        open_rows(ROWED, True, o, &w, vset(p.mult[row] * s.scale), &state, &p.last[k])
    elif p.walk == OPEN:
        open_rows(ROWED, False, o, &w, vset(p.mult[row] * s.scale), &state, &p.last[k])
    else:
        state.a, state.b = vset(p.row_a[row] if p.holder[row] in (-1, k % p.blocks) else 0), vset(p.row_b[row])
        close_rows(ROWED, o, &w, &state, p.last[k])
    if p.walk == OPEN and p.mult[row] != 0:
        p.a[k], p.b[k], p.low[k] = state.a, state.b, state.low if has_low(o) else vset(0)
    restore_mode(mode)


cdef void long_top(void *job, Py_ssize_t row, int thread) noexcept nogil:
    cdef LongPass *p = <LongPass *> job
    keep_group_tops(p.s, row, 1, p.mult + row)


cdef double scores_long(ScoresPass *s, int n_threads) except? -1:
    """Σ multiplier · ℓ over the rows, and their gradients, by blocks of classes."""
    cdef LongPass p
    cdef const Options *o = &s.options
    cdef Py_ssize_t c = s.scores.columns, n = s.scores.rows, k, i
    cdef bint grad = s.grad.raw != NULL
    cdef vec rows[4][16]
    cdef vec none = vset(0)
    cdef State state, more
    cdef real losses[16]
    cdef double total = 0
    cdef char *memory
    cdef unsigned mode
    p.s, p.size = s, max(<Py_ssize_t> LONG_BLOCK, (c + SEGMENTS - 1) // SEGMENTS)
    p.size = (p.size + 16 * LANES - 1) // (16 * LANES) * 16 * LANES
    p.blocks = (c + p.size - 1) // p.size
    k = n * p.blocks
    memory = <char *> malloc(4 * k * sizeof(vec) + (0 if STORED_IS_REAL or not grad else n * c * sizeof(real)) + 64)
    if memory == NULL:
        raise MemoryError("no memory for rows of scores")
    p.a = <vec *> aligned(memory)
    p.b, p.low, p.last, s.scratch = p.a + k, p.a + 2 * k, p.a + 3 * k, <char *> (p.a + 4 * k)
    memset(p.y, 0 if has_target(o) else 0xff, sizeof(p.y))
    memset(p.target, 0, sizeof(p.target))
    tile_multipliers(s.multiplier, 0, <int> n, 16, p.mult)
    convert(&s.targets, 0, <int> n, p.y)
    with nogil:
        if s.top != NULL:
            share(long_top, &p, n, n_threads)
        if shifts(o):
            p.walk = LOOK
            share(long_block, &p, n * p.blocks, n_threads)
        mode = flush_to_zero()
        for i in range(16):
            rows[0][i] = rows[1][i] = rows[2][i] = none
        for i in range(n):
            if p.mult[i] == 0:
                continue
            if shifts(o):
                rows[0][i] = p.a[i * p.blocks]
                for k in range(i * p.blocks, (i + 1) * p.blocks):
                    rows[0][i] = vmax(rows[0][i], p.a[k])
            if has_target(o):
                p.target[i] = sone(s.scores.raw + i * s.scores.row_stride + p.y[i])
        aim_group(o, <int> n, rows[0], p.m, p.target)
        p.walk = OPEN
        share(long_block, &p, n * p.blocks, n_threads)
        for i in range(n):
            if p.mult[i] == 0:
                rows[0][i] = none
                continue
            state.a, state.b, state.low = p.a[i * p.blocks], p.b[i * p.blocks], p.low[i * p.blocks]
            for k in range(i * p.blocks + 1, (i + 1) * p.blocks):
                more.a, more.b, more.low = p.a[k], p.b[k], p.low[k]
                merge(o, &state, &more)
            rows[0][i], rows[1][i], rows[2][i] = state.a, state.b, state.low
        settle_group(grad, o, <int> n, rows[0], rows[1], rows[2], p.m, p.m, p.target, p.mult, s.scale, p.row_a, p.row_b,
                     losses)
        for i in range(n):
            p.holder[i] = -1
            k = 0
            while o.kind == HINGE_MAX and p.holder[i] < 0 and k < p.blocks:
                if holds_top(o, p.a[i * p.blocks + k], p.b[i * p.blocks + k], p.row_b[i]):
                    p.holder[i] = k
                k += 1
            if p.mult[i] == 0:
                losses[i] = 0
            if s.row_loss != NULL:
                s.row_loss[i * s.row_loss_stride] = losses[i]
            total += <double> losses[i] * p.mult[i]
        if grad:
            p.walk = CLOSE
            share(long_block, &p, n * p.blocks, n_threads)
            for i in range(n):
                if o.kind == HINGE_MAX and p.mult[i] != 0:
                    sstore_one(s.grad.raw + i * s.grad.row_stride + p.y[i], 0 - p.row_a[i])
        restore_mode(mode)
        free(memory)
    return total


cdef inline Py_ssize_t group_rows(Py_ssize_t columns) noexcept nogil:
    """Rows of a group: as many as stay in L1 between their walks."""
    return max(<Py_ssize_t> 1, min(<Py_ssize_t> GROUP_ROWS, GROUP_BYTES // (columns * <Py_ssize_t> sizeof(real))))


cdef void scores_segment(void *job, Py_ssize_t k, int thread) noexcept nogil:
    cdef ScoresPass *s = <ScoresPass *> job
    cdef Py_ssize_t start = k * s.segment, stop = min(s.scores.rows, start + s.segment)
    cdef real *scratch = <real *> (s.scratch + thread * s.scratch_size)
    cdef unsigned mode = flush_to_zero()
    if s.layout == SHORT:
        s.partial[k] = scores_short(s, start, stop, scratch)
    elif s.layout == PACKED:
        s.partial[k] = scores_packed(s, start, stop, scratch)
    elif VBYTES == 64 and s.layout == NARROW:  # else it is not compiled
        s.partial[k] = scores_narrow(s, start, stop, scratch)
    elif TABLE >= LANES and s.layout == THIN:
        s.partial[k] = scores_thin(s, start, stop, scratch)
    elif s.layout == LANED:
        s.partial[k] = scores_laned(s, start, stop, scratch)
    else:
        s.partial[k] = scores_rowed(s, start, stop, scratch)
    if s.streams:
        streamed()
    restore_mode(mode)


cdef char *aligned(char *p) noexcept nogil:
    return p + (64 - <size_t> p % 64) % 64


cdef int layout_of(const ScoresPass *s) noexcept nogil:
    if is_short(s):
        return SHORT
    if is_packed(s):
        return PACKED
    if is_thin(s):
        return THIN
    if is_narrow(s):
        return NARROW
    return LANED if is_laned(&s.options, &s.scores, &s.grad) else ROWED


cdef double run_scores(ScoresPass *s, int n_threads) except? -1:
    """Σ multiplier · ℓ over all rows, by segments."""
    cdef double partial[SEGMENTS]
    cdef double work, total = 0
    cdef Py_ssize_t k, segments, most = STREAM_BYTES
    cdef char *memory = NULL
    s.layout = layout_of(s)
    if (s.layout == PACKED or s.layout == THIN) and VBYTES == 64:
        most //= 2
    s.streams = (s.layout != LANED and s.grad.raw != NULL and s.grad.raw != s.scores.raw
                 and s.grad.row_stride == s.grad.columns
                 and s.scores.rows * s.scores.columns * <Py_ssize_t> sizeof(stored) > most)
    if s.scores.rows == 0:
        return 0
    s.segment = segment_rows(s.scores.rows, s.scores.columns + ROW_WORK, 1 if s.layout == ROWED else TILE)
    segments = (s.scores.rows + s.segment - 1) // s.segment
    work = <double> s.scores.rows * (s.scores.columns + ROW_WORK) * (sizeof(real) // 4)
    if s.options.kind != HINGE and s.options.kind != HINGE_MAX:
        work *= EXP_WORK
    if (s.layout != LANED and s.scores.rows <= LONG_ROWS and s.scores.columns > LONG_CLASSES and not s.options.general):
        # Three regions, not one, cost a little more.
        return scores_long(s, useful_threads(n_threads, SEGMENTS, 1, work, 1.125 * THREAD_WORK))
    n_threads = useful_threads(n_threads, s.scores.rows, s.segment, work, THREAD_WORK)
    s.partial, s.scratch, s.scratch_size = partial, NULL, 0
    if s.layout == SHORT:
        s.scratch_size = s.scores.columns * SHORT_ROWS * <Py_ssize_t> sizeof(stored) if s.streams else 0
    elif s.layout == PACKED:
        s.scratch_size = packed_size(s) * <Py_ssize_t> sizeof(real)
    elif s.layout == NARROW:
        s.scratch_size = narrow_size(s)
    elif s.layout == THIN:
        s.scratch_size = thin_size(s)
    elif s.layout == LANED:
        s.scratch_size = laned_size(s)
    elif s.grad.raw != NULL and (s.streams or not STORED_IS_REAL or (
            s.grad.raw == s.scores.raw and keeps(&s.options) and is_many(&s.options, True, s.scores.columns))):
        s.scratch_size = (1 if STORED_IS_REAL else 2) * whole_columns(s.scores.columns) * group_rows(s.scores.columns) * sizeof(real)
    if s.layout == ROWED and keeps_slopes(&s.options):
        s.scratch_size = 2 * s.scores.columns + whole_columns(s.scores.columns)
        s.scratch_size *= group_rows(s.scores.columns) * <Py_ssize_t> sizeof(real)
    if s.scratch_size:
        s.scratch_size = (s.scratch_size + 127) // 64 * 64
        memory = <char *> malloc(s.scratch_size * n_threads + 64)
        if memory == NULL:
            raise MemoryError("no memory for tiles of scores")
        s.scratch = aligned(memory)
    with nogil:
        share(scores_segment, s, segments, n_threads)
        free(memory)
    for k in range(segments):
        total += partial[k]
    return total


cdef int read_targets(_Loan loan, targets, Indices *indices, Matrix *probabilities, Options *o) except -1:
    """Class indices; in the general form also probabilities of the classes of each row."""
    o.probabilities = o.general and targets is not None and targets.ndim == 2
    o.dense = o.dense or o.probabilities
    indices[0] = loan.indices(None if o.probabilities else targets)
    probabilities[0] = loan.matrix(targets if o.probabilities else None, False)
    if o.probabilities and probabilities.column_stride != 1:
        raise ValueError("probabilities must be contiguous in each row")
    return 0


def score_rows(row_loss, scores, targets, multiplier, double scale, grad, losses, int n_threads, z=None, entropy=None,
               top=None, unfit=None):
    """Σ multiplier · ℓ over the rows of `scores`; gradients, times scale, into `grad`; row losses into `losses`.

    The largest classes into `top`, contiguous, of NumPy's intp; in the general form also log-sum-exps and entropies, into
    `z` and `entropy`, contiguous. Into `unfit`, of one intp: the position of the first probability that is not finite, or
    negative, or -1; unless it is None they are looked at as they come.
    """
    if not ARE_SCORES:
        raise TypeError("the kernels of this type take features, not scores")
    cdef _Loan loan = _Loan()
    cdef ScoresPass s
    cdef Matrix m
    cdef Py_ssize_t found[SEGMENTS]
    cdef Py_ssize_t *first
    cdef Py_ssize_t k
    cdef double total
    s.scores, s.grad = loan.scores(scores, False), loan.scores(grad, True)
    m = loan.matrix(multiplier, False)
    s.multiplier = m.data
    m = loan.matrix(losses, True)
    s.row_loss, s.row_loss_stride, s.scale = m.data, m.column_stride, <real> scale
    s.z = s.entropy = NULL
    if z is not None:
        m = loan.matrix(z, True)
        s.z = m.data
    if entropy is not None:
        m = loan.matrix(entropy, True)
        s.entropy = m.data
    s.top = NULL if top is None else <Py_ssize_t *> loan.borrow(top, True).buf
    s.unfit = NULL
    read_options(&s.options, row_loss, loan, s.scores.columns)
    read_targets(loan, targets, &s.targets, &s.probabilities, &s.options)
    if unfit is None:
        return run_scores(&s, n_threads)
    first, s.unfit = <Py_ssize_t *> loan.borrow(unfit, True).buf, found
    for k in range(SEGMENTS):
        found[k] = -1
    total = run_scores(&s, n_threads)
    for k in range(SEGMENTS):
        if found[k] >= 0:
            first[0] = found[k]
            break
    return total


cdef bint are_apart(const Py_buffer *a, const Py_buffer *b) noexcept:
    """Whether no byte of one array lies between the first and the last of the other."""
    cdef const Py_buffer *views[2]
    cdef char *first[2]
    cdef char *end[2]
    cdef Py_ssize_t length
    cdef int i, k
    views[0], views[1] = a, b
    for i in range(2):
        first[i] = <char *> views[i].buf
        end[i] = first[i] + views[i].itemsize
        for k in range(views[i].ndim):
            length = (views[i].shape[k] - 1) * views[i].strides[k]
            if length < 0:
                first[i] += length
            else:
                end[i] += length
    return end[0] <= first[1] or end[1] <= first[0]


def plain_rows(row_loss, scores, targets, Py_ssize_t labels, grad, bint mean, int n_threads):
    """Σ ℓ over the rows, or its mean, and the gradient of that into `grad`, checked and computed in one call.

    Arrays are NumPy's, with two dimensions, one and two. None, and nothing is written, unless they are scores (N, C) of
    `real`, of at least one row and class; targets (N,), integers in [0, labels); and None or a writeable array like
    scores: these themselves, or apart from both.
    """
    if not ARE_SCORES:
        raise TypeError("the kernels of this type take features, not scores")
    cdef _Loan loan = _Loan()
    cdef ScoresPass s
    cdef const Py_buffer *views = loan.views
    cdef Py_ssize_t n, c
    try:
        s.scores, s.targets, s.grad = loan.scores(scores, False), loan.indices(targets), loan.scores(grad, True)
    except (TypeError, ValueError, BufferError):
        return None
    n, c = s.scores.rows, s.scores.columns
    if n == 0 or c == 0 or s.targets.size != n or outside(&s.targets, <uint64_t> labels, False, 0) >= 0:
        return None
    if grad is not None:
        if s.grad.rows != n or s.grad.columns != c or not are_apart(&views[2], &views[1]):
            return None
        if grad is not scores and not are_apart(&views[2], &views[0]):
            return None
    read_options(&s.options, row_loss, loan, c)
    s.multiplier, s.row_loss, s.row_loss_stride, s.scale = NULL, NULL, 0, <real> (1.0 / n if mean else 1.0)
    s.z = s.entropy = NULL
    s.top = s.unfit = NULL
    memset(&s.probabilities, 0, sizeof(Matrix))
    return run_scores(&s, n_threads) / (n if mean else 1)


def gradient_from_stats(row_loss, scores, targets, stats, multiplier, double scale, grad, int n_threads):
    """The gradient of a shard of the classes, times scale, into `grad`.

    targets: the target's column in the shard, or -1. stats (3, N + 16): of each row the maximum times T, with a softcap the bent maximum / T; the
    factor of its exponentials; the target's entry.
    """
    if not ARE_SCORES:
        raise TypeError("the kernels of this type take features, not scores")
    cdef _Loan loan = _Loan()
    cdef ScoresPass s
    cdef Matrix m
    s.scores, s.grad, s.targets = loan.scores(scores, False), loan.scores(grad, True), loan.indices(targets)
    m = loan.matrix(multiplier, False)
    s.multiplier, s.scale, s.row_loss, s.row_loss_stride, s.z, s.entropy = m.data, <real> scale, NULL, 0, NULL, NULL
    s.top = s.unfit = NULL
    s.probabilities = loan.matrix(stats, False)
    read_options(&s.options, row_loss, loan, s.scores.columns)
    s.options.kind, s.options.stats_step = FROM_STATS, s.probabilities.row_stride
    run_scores(&s, n_threads)


def transform(kind, scores, out, int n_threads):
    """softmax, log_softmax, sigmoid (out like scores) or logsumexp (out a vector of `real`) of the rows of `scores`."""
    if not ARE_SCORES:
        raise TypeError("the kernels of this type take features, not scores")
    cdef _Loan loan = _Loan()
    cdef ScoresPass s
    cdef Matrix m
    s.scores, s.grad, s.targets = loan.scores(scores, False), loan.scores(None, False), loan.indices(None)
    s.multiplier, s.scale, s.row_loss, s.row_loss_stride, s.z, s.entropy = NULL, 1, NULL, 0, NULL, NULL
    s.top = s.unfit = NULL
    s.probabilities = loan.matrix(None, False)
    read_options(&s.options, ("transform " + kind, 0, 1, "", None), loan, s.scores.columns)
    if s.options.kind == LOG_SUM:
        m = loan.matrix(out, True)
        s.row_loss, s.row_loss_stride = m.data, m.column_stride
    else:
        s.grad = loan.scores(out, True)
    run_scores(&s, n_threads)
