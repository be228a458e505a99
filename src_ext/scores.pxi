# Scores that are given: the identity producer and the store accumulator, and the passes over an array of scores.
#
# Traffic: each score is read from memory once and each gradient written once, as long as a row (or, for few classes, a
# tile of 16 rows) fits in cache. Rows of few classes, or whose classes are not contiguous, go through a transposed tile.

cdef enum:
    FEW = 3  # vectors of classes up to which 16 rows are handled transposed: shorter rows would leave lanes empty

cdef struct ScoresPass:
    Matrix scores, grad
    Indices targets
    Options options
    const real *multiplier
    real scale
    real *row_loss
    Py_ssize_t row_loss_stride
    int transform
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


cdef inline void fetch_rows(const Matrix *a, Py_ssize_t start, Py_ssize_t stop) noexcept nogil:
    """Ask for rows that come next: a tile reads them in an order that the processor does not foresee."""
    cdef Py_ssize_t row, j
    if a.column_stride == 1:
        for row in range(start, stop):
            for j in range(0, a.columns, 64 // 4):
                prefetch(a.data + row * a.row_stride + j)


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
    cdef Py_ssize_t g, k, v
    cdef vec loss, factor, zero = vset(0), part
    cdef mask dead
    cdef Walk w
    for v in range(TILE // LANES):
        g = v * LANES
        w = walk_lanes(tile + g, c, iload(y + g))
        factor = vload(mult + g)
        dead = veq(factor, zero)
        if grad:
            loss = row_loss(LANED, True, o, &w, mul(factor, vset(scale)))
        else:
            loss = row_loss(LANED, False, o, &w, factor)
        if not all_live:
            loss = choose(dead, zero, loss)
            if grad:
                for k in range(c):
                    part = vload(tile + k * TILE + g)
                    vstore(tile + k * TILE + g, choose(dead, zero, part))
        vstore(losses + g, loss)


cdef double scores_laned(const ScoresPass *s, Py_ssize_t start, Py_ssize_t stop, real *tile) noexcept nogil:
    """Σ multiplier · ℓ of rows [start, stop), by transposed tiles."""
    cdef Py_ssize_t row, t, c = s.scores.columns
    cdef int n, i, live
    cdef bint grad = s.grad.data != NULL
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
        fetch_rows(&s.scores, row + TILE, min(row + 2 * TILE, stop))
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


cdef double scores_rowed(const ScoresPass *s, Py_ssize_t start, Py_ssize_t stop) noexcept nogil:
    """The same, row by row."""
    cdef Py_ssize_t row, c = s.scores.columns
    cdef bint grad = s.grad.data != NULL
    cdef real mult = 1, loss
    cdef real lanes[16]
    cdef lane_int y
    cdef double total = 0
    cdef Walk w
    cdef real *dst
    for row in range(start, stop):
        dst = s.grad.data + row * s.grad.row_stride if grad else NULL
        if s.multiplier != NULL:
            mult = s.multiplier[row]
        if mult == 0:
            loss = 0
            if grad:
                memset(dst, 0, c * sizeof(real))
        else:
            convert(&s.targets, row, 1, &y)
            w = walk_row(s.scores.data + row * s.scores.row_stride, dst, c, y)
            if grad:
                vstore(lanes, row_loss(ROWED, True, &s.options, &w, vset(mult * s.scale)))
            else:
                vstore(lanes, row_loss(ROWED, False, &s.options, &w, vset(mult)))
            loss = lanes[0]
            total += <double> loss * <double> mult
        if s.row_loss != NULL:
            s.row_loss[row * s.row_loss_stride] = loss
    return total


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


def score_rows(kind, margin, power, over, scores, targets, multiplier, double scale, grad, losses, int n_threads):
    """Σ multiplier · ℓ over the rows of `scores`; gradients, times scale, into `grad`; row losses into `losses`."""
    cdef _Loan loan = _Loan()
    cdef ScoresPass s
    cdef Matrix m
    cdef double partial[SEGMENTS]
    cdef double total = 0
    cdef Py_ssize_t k, segments
    cdef char *memory = NULL
    s.scores = loan.matrix(scores, False)
    s.grad = loan.matrix(grad, True)
    s.targets = loan.indices(targets)
    m = loan.matrix(multiplier, False)
    s.multiplier = m.data
    m = loan.matrix(losses, True)
    s.row_loss, s.row_loss_stride = m.data, m.column_stride
    s.scale = <real> scale
    read_options(&s.options, kind, margin, power, over, s.scores.columns)
    if s.scores.rows == 0:
        return 0.0
    cdef bint laned = is_laned(&s.scores, &s.grad)
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
        if n_threads == 1:
            for k in range(segments):
                scores_segment(&s, k, 0)
        else:
            for k in prange(segments, schedule="dynamic", num_threads=n_threads):
                scores_segment(&s, k, threadid())
        free(memory)
    for k in range(segments):
        total += partial[k]
    return total


# --- softmax, log-softmax, log-sum-exp -------------------------------------------------------------------------------
cdef inline vec transform_case(int layout, int kind, const Walk *w) noexcept nogil:
    if kind == PROBABILITIES:
        return transform_walk(layout, PROBABILITIES, w)
    if kind == LOG_PROBABILITIES:
        return transform_walk(layout, LOG_PROBABILITIES, w)
    return transform_walk(layout, LOG_SUM, w)


cdef void transform_segment(ScoresPass *s, Py_ssize_t k, int thread) noexcept nogil:
    cdef Py_ssize_t row, start = k * s.segment, stop = min(s.scores.rows, start + s.segment)
    cdef Py_ssize_t c = s.scores.columns, g, t, v
    cdef unsigned mode = flush_to_zero()
    cdef real *tile = <real *> (s.scratch + thread * s.scratch_size)
    cdef real z[16]
    cdef int n, i, rows = TILE if s.scratch != NULL else 1
    cdef Walk w
    for t in range((stop - start + rows - 1) // rows):
        row = start + t * rows
        n = <int> min(<Py_ssize_t> rows, stop - row)
        if s.scratch != NULL:
            load_tile(&s.scores, row, n, tile)
            for v in range(TILE // LANES):
                g = v * LANES
                w = walk_lanes(tile + g, c, iset(0))
                vstore(z + g, transform_case(LANED, s.transform, &w))
            if s.transform != LOG_SUM:
                store_tile(&s.grad, row, n, tile)
        else:
            w = walk_row(s.scores.data + row * s.scores.row_stride, s.grad.data + row * s.grad.row_stride, c, 0)
            vstore(z, transform_case(ROWED, s.transform, &w))
        if s.transform == LOG_SUM:
            for i in range(n):
                s.row_loss[(row + i) * s.row_loss_stride] = z[i]
    restore_mode(mode)


def transform(kind, scores, out, int n_threads):
    """softmax, log_softmax (out like scores) or logsumexp (out a vector) of the rows of `scores`."""
    cdef _Loan loan = _Loan()
    cdef ScoresPass s
    cdef Matrix m
    cdef Py_ssize_t k, segments
    cdef char *memory = NULL
    cdef bint laned
    s.scores = loan.matrix(scores, False)
    m = loan.matrix(out, True)
    s.transform = PROBABILITIES if kind == "softmax" else LOG_PROBABILITIES if kind == "log_softmax" else LOG_SUM
    s.grad = loan.matrix(None, False)
    s.row_loss, s.row_loss_stride = NULL, 0
    if s.transform == LOG_SUM:
        s.row_loss, s.row_loss_stride = m.data, m.column_stride
    else:
        s.grad = m
    if s.scores.rows == 0:
        return
    laned = is_laned(&s.scores, &s.grad)
    s.segment = segment_rows(s.scores.rows, s.scores.columns, TILE if laned else 1)
    segments = (s.scores.rows + s.segment - 1) // s.segment
    n_threads = useful_threads(n_threads, segments, <double> s.scores.rows * s.scores.columns, THREAD_WORK)
    s.scratch, s.scratch_size = NULL, 0
    if laned:
        s.scratch_size = (s.scores.columns * TILE * sizeof(real) + 127) // 64 * 64
        memory = <char *> malloc(s.scratch_size * n_threads + 64)
        if memory == NULL:
            raise MemoryError("no memory for tiles of scores")
        s.scratch = aligned(memory)
    with nogil:
        if n_threads == 1:
            for k in range(segments):
                transform_segment(&s, k, 0)
        else:
            for k in prange(segments, schedule="dynamic", num_threads=n_threads):
                transform_segment(&s, k, threadid())
        free(memory)
