# Scores that are given: the identity producer and the store accumulator, and the passes over an array of scores.
#
# Traffic: each score is read from memory once and each gradient written once, as long as a row (or, for few classes, a
# tile of 16 rows) fits in cache. Rows of few classes, or whose classes are not contiguous, go through a transposed tile.

cdef enum:
    FEW = 3  # vectors of classes up to which 16 rows are handled transposed: shorter rows would leave lanes empty

    FAR_BYTES = 1 << 23  # of an array: above, the gradient's lines are asked for ahead too; below, they are near enough
    GROUP_BYTES = 8192  # of rows that are opened, settled and closed together

cdef struct ScoresPass:
    Matrix scores, grad
    Indices targets
    Options options
    const real *multiplier
    real scale
    real *row_loss
    Py_ssize_t row_loss_stride
    Py_ssize_t segment
    char *scratch
    Py_ssize_t scratch_size
    double *partial


cdef bint is_laned(const Matrix *a, const Matrix *b) noexcept nogil:
    """Whether the tile is transposed: few classes, or classes that are not contiguous in source or destination."""
    return a.columns <= FEW * LANES or a.column_stride != 1 or (b.data != NULL and b.column_stride != 1)


cdef inline void load_tile(const Matrix *a, Py_ssize_t row, int n, real *tile) noexcept nogil:
    """n rows from `row` on as a transposed tile; lanes past n hold zeros."""
    cdef const real *p = a.data + row * a.row_stride
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
                vstore(tile + j * TILE + g, vload(p + j * a.column_stride + g))
    else:
        for j in range(a.columns):
            for i in range(TILE):
                tile[j * TILE + i] = p[i * a.row_stride + j * a.column_stride] if i < n else 0


cdef inline void fetch_rows(const Matrix *a, Py_ssize_t start, Py_ssize_t stop, bint write) noexcept nogil:
    """Ask for rows that come next: a tile reads and writes them in an order that the processor does not foresee."""
    cdef char *p = <char *> (a.data + start * a.row_stride)
    cdef Py_ssize_t j, bytes_ = max(<Py_ssize_t> 0, stop - start) * a.columns * <Py_ssize_t> sizeof(real)
    if a.column_stride == 1 and a.row_stride == a.columns:
        for j in range((bytes_ + 63) // 64):
            if write:
                prefetch_to_write(p + 64 * j)
            else:
                prefetch(p + 64 * j)


cdef inline void store_tile(const Matrix *a, Py_ssize_t row, int n, const real *tile) noexcept nogil:
    cdef real *p = a.data + row * a.row_stride
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
                vstore(p + j * a.column_stride + g, vload(tile + j * TILE + g))
    else:
        for j in range(a.columns):
            for i in range(n):
                p[i * a.row_stride + j * a.column_stride] = tile[j * TILE + i]


cdef inline int tile_multipliers(const real *multiplier, Py_ssize_t row, int n, real *mult) noexcept nogil:
    """Row multipliers of a tile, 0 past n; how many are not 0."""
    cdef int i, live = 0
    for i in range(TILE):
        mult[i] = 0 if i >= n else 1 if multiplier == NULL else multiplier[row + i]
        live += mult[i] != 0
    return live


cdef inline void tile_losses(const Options *o, bint grad, real *tile, Py_ssize_t c, const lane_int *y, const real *mult,
                             real scale, bint all_live, real *losses) noexcept nogil:
    """Row losses of a transposed tile, and gradients in place; both 0 in lanes whose multiplier is 0."""
    if grad:
        tile_losses_case(o, True, tile, c, y, mult, scale, all_live, losses)
    else:
        tile_losses_case(o, False, tile, c, y, mult, scale, all_live, losses)


cdef inline void tile_losses_case(const Options *o, bint grad, real *tile, Py_ssize_t c, const lane_int *y,
                                  const real *mult, real scale, bint all_live, real *losses) noexcept nogil:
    cdef Py_ssize_t g, k, v
    cdef vec loss, factor, last = vset(0), zero = vset(0)
    cdef mask dead
    cdef Walk w
    cdef State s
    for v in range(TILE // LANES):
        g = v * LANES
        w = walk_lanes(tile + g, c, iload(y + g))
        dead = veq(vload(mult + g), zero)
        factor = mul(vload(mult + g), vset(scale))
        open_rows(LANED, grad, o, &w, factor, look_ahead(LANED, o, &w), &s, &last)
        loss = settle(grad, o, &s, factor)
        if grad:
            close_rows(LANED, o, &w, &s, last)
        if not all_live:
            loss = choose(dead, zero, loss)
            if grad:
                for k in range(c):
                    vstore(tile + k * TILE + g, choose(dead, zero, vload(tile + k * TILE + g)))
        vstore(losses + g, loss)


cdef double scores_laned(const ScoresPass *s, Py_ssize_t start, Py_ssize_t stop, real *tile) noexcept nogil:
    """Σ multiplier · ℓ of rows [start, stop), by transposed tiles."""
    cdef Py_ssize_t row, t, c = s.scores.columns
    cdef int n, i, live
    cdef bint grad = s.grad.data != NULL
    cdef bint far = grad and s.grad.data != s.scores.data and s.scores.rows * c * <Py_ssize_t> sizeof(real) > FAR_BYTES
    cdef lane_int y[16]
    cdef real mult[16]
    cdef real losses[16]
    cdef double sums[16]
    memset(sums, 0, sizeof(sums))
    memset(y, 0, sizeof(y))
    for t in range((stop - start + TILE - 1) // TILE):
        row = start + t * TILE
        n = <int> min(<Py_ssize_t> TILE, stop - row)
        live = tile_multipliers(s.multiplier, row, n, mult)
        convert(&s.targets, row, n, y)
        fetch_rows(&s.scores, row + TILE, min(row + 2 * TILE, stop), False)
        if far:
            fetch_rows(&s.grad, row + TILE, min(row + 2 * TILE, stop), True)
        load_tile(&s.scores, row, n, tile)
        tile_losses(&s.options, grad, tile, c, y, mult, s.scale, live == TILE, losses)
        if grad:
            store_tile(&s.grad, row, n, tile)
        if s.row_loss != NULL:
            for i in range(n):
                s.row_loss[(row + i) * s.row_loss_stride] = losses[i]
        add_products(sums, losses, mult)
    return fold_doubles(sums)


cdef inline double fold_doubles(double *sums) noexcept nogil:
    cdef int i
    cdef double total = 0
    for i in range(TILE):
        total += sums[i]
    return total


cdef inline void group_losses(const ScoresPass *s, bint grad, Py_ssize_t start, int n, Py_ssize_t ahead, lane_int *y,
                              const real *mult, real *losses) noexcept nogil:
    """Row losses, and gradients, of n <= TILE rows that are contiguous; both 0 where the multiplier is 0."""
    cdef vec last[16]
    cdef real a[16]
    cdef real b[16]
    cdef real m[16]
    cdef lane_int index[16]
    # What is walked on lives in variables of its own: through a pointer it would be read anew after every store.
    cdef Walk w
    cdef State state
    cdef vec end = vset(0)
    state.a = state.b = state.c = end
    state.index = iset(0)
    cdef Py_ssize_t c = s.scores.columns, g, v
    cdef const real *src = s.scores.data + start * s.scores.row_stride
    cdef real *dst = s.grad.data + start * s.grad.row_stride if grad else NULL
    cdef int i
    memset(a, 0, sizeof(a))
    memset(b, 0, sizeof(b))
    memset(m, 0, sizeof(m))
    memset(index, 0, sizeof(index))
    for i in range(n):
        w = walk_row(src + i * s.scores.row_stride, NULL, c, 0)
        m[i] = first_lane(look_ahead(ROWED, &s.options, &w))
    for i in range(n):
        if mult[i] == 0:
            continue
        w = walk_row(src + i * s.scores.row_stride, dst + i * s.grad.row_stride if grad else NULL, c, y[i])
        w.src_ahead, w.dst_ahead = ahead * s.scores.row_stride, ahead * s.grad.row_stride
        open_rows(ROWED, grad, &s.options, &w, vset(mult[i] * s.scale), vset(m[i]), &state, &end)
        a[i], b[i], index[i] = first_lane(state.a), first_lane(state.b), ifirst(state.index)
        y[i], last[i] = ifirst(w.target), end
    for v in range((n + LANES - 1) // LANES):
        g = v * LANES
        state.a, state.b, state.c, state.index = vload(a + g), vload(b + g), vload(m + g), iload(index + g)
        vstore(losses + g, settle(grad, &s.options, &state, mul(vload(mult + g), vset(s.scale))))
        vstore(a + g, state.a)
        vstore(b + g, state.b)
    for i in range(n):
        if mult[i] == 0:
            losses[i] = 0
            if grad:
                memset(dst + i * s.grad.row_stride, 0, c * sizeof(real))
        elif grad:
            w = walk_row(src + i * s.scores.row_stride, dst + i * s.grad.row_stride, c, y[i])
            state.a, state.b, state.c, state.index = vset(a[i]), vset(b[i]), vset(m[i]), iset(index[i])
            close_rows(ROWED, &s.options, &w, &state, last[i])


cdef double scores_rowed(const ScoresPass *s, Py_ssize_t start, Py_ssize_t stop) noexcept nogil:
    """The same, by groups of rows: as many as stay in L1 between their two walks."""
    cdef Py_ssize_t row, t, group = GROUP_BYTES // (s.scores.columns * sizeof(real))
    cdef int n, i
    cdef lane_int y[16]
    cdef real mult[16]
    cdef real losses[16]
    cdef double sums[16]
    memset(sums, 0, sizeof(sums))
    memset(y, 0, sizeof(y))
    memset(losses, 0, sizeof(losses))
    group = max(<Py_ssize_t> 1, min(<Py_ssize_t> TILE, group))
    for t in range((stop - start + group - 1) // group):
        row = start + t * group
        n = <int> min(group, stop - row)
        tile_multipliers(s.multiplier, row, n, mult)
        convert(&s.targets, row, n, y)
        if s.grad.data != NULL:
            group_losses(s, True, row, n, group, y, mult, losses)
        else:
            group_losses(s, False, row, n, group, y, mult, losses)
        for i in range(n, TILE):
            losses[i] = 0
        if s.row_loss != NULL:
            for i in range(n):
                s.row_loss[(row + i) * s.row_loss_stride] = losses[i]
        add_products(sums, losses, mult)
    return fold_doubles(sums)


cdef void scores_segment(ScoresPass *s, Py_ssize_t k, int thread) noexcept nogil:
    cdef Py_ssize_t start = k * s.segment, stop = min(s.scores.rows, start + s.segment)
    cdef unsigned mode = flush_to_zero()
    if s.scratch != NULL:
        s.partial[k] = scores_laned(s, start, stop, <real *> (s.scratch + thread * s.scratch_size))
    else:
        s.partial[k] = scores_rowed(s, start, stop)
    restore_mode(mode)


cdef char *aligned(char *p) noexcept nogil:
    return p + (64 - <size_t> p % 64) % 64


cdef double run_scores(ScoresPass *s, int n_threads) except? -1:
    """Σ multiplier · ℓ over all rows, by segments."""
    cdef double partial[SEGMENTS]
    cdef double total = 0
    cdef Py_ssize_t k, segments
    cdef char *memory = NULL
    cdef bint laned = is_laned(&s.scores, &s.grad)
    if s.scores.rows == 0:
        return 0
    s.segment = segment_rows(s.scores.rows, s.scores.columns, TILE if laned else 1)
    segments = (s.scores.rows + s.segment - 1) // s.segment
    n_threads = useful_threads(n_threads, segments, <double> s.scores.rows * s.scores.columns, THREAD_WORK)
    s.partial, s.scratch, s.scratch_size = partial, NULL, 0
    if laned:
        s.scratch_size = (s.scores.columns * TILE * sizeof(real) + 127) // 64 * 64
        memory = <char *> malloc(s.scratch_size * n_threads + 64)
        if memory == NULL:
            raise MemoryError("no memory for tiles of scores")
        s.scratch = aligned(memory)
    with nogil:
        if n_threads == 1:  # a parallel region of one thread would cost 0.6 µs, a third of a small call
            for k in range(segments):
                scores_segment(s, k, 0)
        else:
            for k in prange(segments, schedule="dynamic", num_threads=n_threads):
                scores_segment(s, k, threadid())
        free(memory)
    for k in range(segments):
        total += partial[k]
    return total


def score_rows(kind, margin, power, over, scores, targets, multiplier, double scale, grad, losses, int n_threads):
    """Σ multiplier · ℓ over the rows of `scores`; gradients, times scale, into `grad`; row losses into `losses`."""
    cdef _Loan loan = _Loan()
    cdef ScoresPass s
    cdef Matrix m
    s.scores, s.grad, s.targets = loan.matrix(scores, False), loan.matrix(grad, True), loan.indices(targets)
    m = loan.matrix(multiplier, False)
    s.multiplier = m.data
    m = loan.matrix(losses, True)
    s.row_loss, s.row_loss_stride, s.scale = m.data, m.column_stride, <real> scale
    read_options(&s.options, kind, margin, power, over, s.scores.columns)
    return run_scores(&s, n_threads)


def transform(kind, scores, out, int n_threads):
    """softmax, log_softmax (out like scores) or logsumexp (out a vector) of the rows of `scores`."""
    cdef _Loan loan = _Loan()
    cdef ScoresPass s
    cdef Matrix m = loan.matrix(out, True)
    s.scores, s.grad, s.targets = loan.matrix(scores, False), loan.matrix(None, False), loan.indices(None)
    s.multiplier, s.scale, s.row_loss, s.row_loss_stride = NULL, 1, NULL, 0
    read_options(&s.options, "transform " + kind, 0, 1, "", s.scores.columns)
    if s.options.kind == LOG_SUM:
        s.row_loss, s.row_loss_stride = m.data, m.column_stride
    else:
        s.grad = m
    run_scores(&s, n_threads)
