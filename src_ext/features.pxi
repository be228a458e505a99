# Features of a linear layer with few classes: the dense producer and its gradient accumulator, and the fused pass.
#
# For a tile of 16 rows: scores = X Wᵀ + b, the row losses with the gradient in place, dW += gradientᵀ X while the rows
# are in cache. Each feature is read from memory once; the products need 4 N D C operations, and on x86-64-v4 in float32
# two of 16 of them start each cycle, so with 10 classes memory is the limit where a core gets under 6 bytes a cycle.
#
# W and the segment's sum of gradients lie in panels (simd.h): blocks of classes whose sums stay in registers, over
# stretches of 512 features, so that a stretch of a panel stays in L1 while the 16 rows pass by. Panels are contiguous: rows
# of W, and of X, are often a multiple of 4096 bytes apart and fall into the same cache sets. That is also why blocks of
# dW are as large as they can be: 16 such rows do not stay in L1 until a next block.
# The next tile's rows are fetched during both products, up to half of their features, in whole stretches, in the first (all
# if it is alone), where two tiles fit in the second-level cache.

cdef enum:
    STRETCH = 512  # features
    AHEAD_BYTES = 1 << 18  # of a tile, at most, for the next one to be fetched while it is computed with
    SEGMENT_ROWS = 64  # at least, so that writing and adding up a segment's sums costs little beside its rows

cdef struct LinearPass:
    char *X
    Py_ssize_t row_stride, feature_stride  # in bytes
    Py_ssize_t n, features, vectors  # rows to handle; D, and D in vectors, rounded up
    bint staged  # rows go through a copy in `real`, contiguous and padded
    Indices rows, targets
    const real *multiplier
    Options options
    Py_ssize_t classes, dot_blocks, outer_blocks
    Py_ssize_t ahead  # vectors of features fetched for the next tile during the first product
    bint fetches
    real *W  # panels
    real *bias
    real *zeros  # a row of features
    bint grad
    real *row_loss
    Py_ssize_t row_loss_stride
    Py_ssize_t segment, segments
    char *partial  # for each segment: panels of dW, then db
    Py_ssize_t partial_size
    double *loss
    char *scratch  # for each thread: a tile of scores, sums, a tile of db, the rows' last vectors, the staged rows
    Py_ssize_t scratch_size
    Matrix dW, db
    real scale


cdef struct FeatureTile:
    int n
    Py_ssize_t place[16]  # positions in the order of the call
    const char *row[16]
    lane_int y[16]
    real mult[16]


cdef inline Py_ssize_t block_start(const LinearPass *p, Py_ssize_t blocks, Py_ssize_t b) noexcept nogil:
    """First class of block b of `blocks`: classes are split evenly."""
    return b * (p.classes // blocks) + min(b, p.classes % blocks)


cdef void next_tile(const LinearPass *p, Py_ssize_t *cursor, Py_ssize_t stop, FeatureTile *t) noexcept nogil:
    """The next rows that are not skipped, up to TILE; rows of zeros with multiplier 0 fill up a last tile."""
    cdef Py_ssize_t i
    cdef int k
    cdef real m = 1
    t.n = 0
    while cursor[0] < stop and t.n < TILE:
        i = row_index(&p.rows, cursor[0]) if p.rows.data != NULL else cursor[0]
        if p.multiplier != NULL:
            m = p.multiplier[i]
        if m == 0:
            if p.row_loss != NULL:
                p.row_loss[cursor[0] * p.row_loss_stride] = 0
        else:
            t.place[t.n] = cursor[0]
            t.row[t.n] = p.X + i * p.row_stride
            t.mult[t.n] = m
            convert(&p.targets, i, 1, &t.y[t.n])
            t.n += 1
        cursor[0] += 1
    for k in range(t.n, TILE):
        t.row[k], t.mult[k], t.y[k] = <const char *> p.zeros, 0, 0


cdef void stage(const LinearPass *p, const FeatureTile *t, real *rows, const real **x) noexcept nogil:
    """The tile's rows in `real`, contiguous, padded with zeros to whole vectors."""
    cdef Py_ssize_t d, width = p.vectors * LANES
    cdef int k
    cdef real *to
    cdef const char *row
    for k in range(TILE):
        if k >= t.n:
            x[k] = p.zeros
            continue
        to, row = rows + k * width, t.row[k]
        x[k] = to
        if p.feature_stride == sizeof(stored):
            for d in range(p.features // LANES):
                vstore(to + d * LANES, sload(<const stored *> row + d * LANES))
            for d in range(p.features // LANES * LANES, p.features):
                to[d] = sone(<const stored *> row + d)
        else:
            for d in range(p.features):
                to[d] = sone(<const stored *> (row + d * p.feature_stride))
        for d in range(p.features, width):
            to[d] = 0


cdef void produce(const LinearPass *p, const real **x, const real **last, vec *sums, real *tile,
                  const FeatureTile *following) noexcept nogil:
    """Scores of a tile, transposed."""
    cdef Py_ssize_t whole = p.vectors if p.staged else p.features // LANES
    cdef Py_ssize_t stretch = STRETCH // LANES, at, n, b, c, size, v, step
    cdef const char *next[4]
    cdef int r, i
    memset(sums, 0, p.classes * TILE * sizeof(vec))
    for v in range((whole + stretch - 1) // stretch):
        at = v * stretch
        n = min(stretch, whole - at)
        for b in range(p.dot_blocks):
            c = block_start(p, p.dot_blocks, b)
            size = block_start(p, p.dot_blocks, b + 1) - c
            step = LANES * p.feature_stride if b == 0 and at < p.ahead and following.n == TILE else 0
            for r in range(TILE // ROWS):
                for i in range(ROWS):
                    next[i] = following.row[r * ROWS + i] + at * LANES * p.feature_stride
                dot_panel(<int> size, x + r * ROWS, at * LANES, n, p.W + (c * p.vectors + at * size) * LANES,
                          sums + c * TILE + r * ROWS, next, step)
    if whole < p.vectors:
        for b in range(p.dot_blocks):
            c = block_start(p, p.dot_blocks, b)
            size = block_start(p, p.dot_blocks, b + 1) - c
            for r in range(TILE // ROWS):
                dot_panel(<int> size, last + r * ROWS, 0, 1, p.W + (c * p.vectors + whole * size) * LANES,
                          sums + c * TILE + r * ROWS, NULL, 0)
    for c in range(p.classes):
        for v in range(TILE // LANES):
            vstore(tile + c * TILE + v * LANES,
                   add(transposed_sum(sums + c * TILE + v * LANES, 1), vset(p.bias[c])))


cdef void accumulate(const LinearPass *p, const real **x, const real **last, const real *tile, real *dW, bint first,
                     const FeatureTile *following) noexcept nogil:
    """dW += gradientᵀ X in panels."""
    cdef Py_ssize_t whole = p.vectors if p.staged else p.features // LANES
    cdef Py_ssize_t at, b, c, size, n, pair, ahead
    cdef int r
    for pair in range((whole + 1) // 2):
        at = 2 * pair
        n = min(<Py_ssize_t> 2, whole - at)
        if p.fetches and at >= p.ahead:
            ahead = at * LANES * p.feature_stride
            for r in range(following.n):
                prefetch(following.row[r] + ahead)
                if LANES * sizeof(real) == 64:
                    prefetch(following.row[r] + ahead + 64)
        for b in range(p.outer_blocks):
            c = block_start(p, p.outer_blocks, b)
            size = block_start(p, p.outer_blocks, b + 1) - c
            outer_panel(<int> size, n == 2, x, at * LANES, tile + c * TILE, dW + (c * p.vectors + at * size) * LANES, first)
    if whole < p.vectors:
        for b in range(p.outer_blocks):
            c = block_start(p, p.outer_blocks, b)
            size = block_start(p, p.outer_blocks, b + 1) - c
            outer_panel(<int> size, False, last, 0, tile + c * TILE, dW + (c * p.vectors + whole * size) * LANES, first)


cdef void linear_segment(void *job, Py_ssize_t k, int thread) noexcept nogil:
    cdef LinearPass *p = <LinearPass *> job
    cdef Py_ssize_t cursor = k * p.segment, stop = min(p.n, (k + 1) * p.segment), c = p.classes, whole, j
    cdef unsigned mode = flush_to_zero()
    cdef char *mine = p.scratch + thread * p.scratch_size
    cdef vec *sums = <vec *> mine
    cdef real *ends = <real *> (mine + c * TILE * sizeof(vec))
    cdef real *tile = ends + TILE * LANES
    cdef real *bias_sums = tile + c * TILE
    cdef real *staged = bias_sums + c * TILE
    cdef real *dW = <real *> (p.partial + k * p.partial_size)
    cdef real *db = dW + c * p.vectors * LANES
    cdef FeatureTile tiles[2]
    cdef FeatureTile *t = &tiles[0]
    cdef FeatureTile *following = &tiles[1]
    cdef FeatureTile *other
    cdef const real *x[16]
    cdef const real *last[16]
    cdef real losses[16]
    cdef double total[16]
    cdef bint first = True
    cdef int r
    memset(total, 0, sizeof(total))
    memset(bias_sums, 0, c * TILE * sizeof(real))
    whole = p.features // LANES * LANES
    for r in range(TILE):
        last[r] = ends + r * LANES
    next_tile(p, &cursor, stop, t)
    while t.n:
        next_tile(p, &cursor, stop, following)
        if p.staged:
            stage(p, t, staged, x)
        else:
            for r in range(TILE):
                x[r] = <const real *> t.row[r]
                for j in range(LANES):
                    ends[r * LANES + j] = x[r][whole + j] if whole + j < p.features else 0
        produce(p, x, last, sums, tile, following)
        tile_losses(&p.options, p.grad, tile, 1, c, t.y, t.mult, 1, t.n == TILE, losses)
        add_products(total, losses, t.mult)
        if p.row_loss != NULL:
            for r in range(t.n):
                p.row_loss[t.place[r] * p.row_loss_stride] = losses[r]
        if p.grad:
            for j in range(c * TILE // LANES):
                vstore(bias_sums + j * LANES, add(vload(bias_sums + j * LANES), vload(tile + j * LANES)))
            if p.dW.data != NULL:
                accumulate(p, x, last, tile, dW, first, following)
        first = False
        other, t = t, following
        following = other
    p.loss[k] = fold_doubles(total)
    if p.grad:
        if first:
            memset(dW, 0, p.partial_size)
        for j in range(c):
            db[j] = 0
            for r in range(TILE):
                db[j] += bias_sums[j * TILE + r]
    restore_mode(mode)


cdef void add_up(void *job, Py_ssize_t v, int thread) noexcept nogil:
    """Vector v of dW, of all classes: the segments' sums in their order, scaled."""
    cdef const LinearPass *p = <LinearPass *> job
    cdef Py_ssize_t b, c, size, j, s, at, i, left = min(<Py_ssize_t> LANES, p.features - v * LANES)
    cdef unsigned mode = flush_to_zero()
    cdef vec total
    cdef real lanes[16]
    cdef real *to
    for b in range(p.outer_blocks):
        c = block_start(p, p.outer_blocks, b)
        size = block_start(p, p.outer_blocks, b + 1) - c
        for j in range(size):
            at = (c * p.vectors + v * size + j) * LANES
            total = vset(0)
            for s in range(p.segments):
                total = add(total, vload(<real *> (p.partial + s * p.partial_size) + at))
            total = mul(total, vset(p.scale))
            to = p.dW.data + (c + j) * p.dW.row_stride + v * LANES * p.dW.column_stride
            if p.dW.column_stride == 1:
                vstore_part(to, total, left)
            else:
                vstore(lanes, total)
                for i in range(left):
                    to[i * p.dW.column_stride] = lanes[i]
    restore_mode(mode)


cdef void pack(LinearPass *p, const Matrix *W, const Matrix *b) noexcept nogil:
    """W in panels, padded with zeros; b, or zeros."""
    cdef Py_ssize_t k, c, size, j, v, i, d
    cdef real *to
    cdef const real *row
    for k in range(p.dot_blocks):
        c = block_start(p, p.dot_blocks, k)
        size = block_start(p, p.dot_blocks, k + 1) - c
        for j in range(size):
            row = W.data + (c + j) * W.row_stride
            for v in range(p.vectors):
                to = p.W + (c * p.vectors + v * size + j) * LANES
                if W.column_stride == 1 and (v + 1) * LANES <= p.features:
                    vstore(to, vload(row + v * LANES))
                else:
                    for i in range(LANES):
                        d = v * LANES + i
                        to[i] = row[d * W.column_stride] if d < p.features else 0
    for c in range(p.classes):
        p.bias[c] = b.data[c * b.column_stride] if b.data != NULL else 0


def linear_rows(row_loss, X, rows, W, b, targets, multiplier, double scale, dW, db, losses, int n_threads):
    """Σ multiplier · ℓ of the scores X Wᵀ + b, of all rows or those picked; scaled gradients into dW (C, D) and db (C,).

    X is of the type `stored`, of any strides. targets and multiplier belong to X, losses to the rows picked.
    """
    cdef _Loan loan = _Loan()
    cdef LinearPass p
    cdef Matrix w, bias, m
    cdef Py_buffer *view = loan.borrow(X, False)
    cdef Py_ssize_t k, row_size, panel_size
    cdef char *memory
    cdef char *at
    cdef double total = 0
    cdef double loss[SEGMENTS]
    p.X, p.n, p.features = <char *> view.buf, view.shape[0], view.shape[1]
    p.row_stride, p.feature_stride = view.strides[0], view.strides[1]
    if view.itemsize != sizeof(stored) or view.format[0] != STORED_FORMAT:
        raise TypeError("features of another type than the kernel's")
    p.staged = not STORED_IS_REAL or p.feature_stride != sizeof(stored)
    p.rows, p.targets = loan.indices(rows), loan.indices(targets)
    if rows is not None:
        p.n = p.rows.size
    w, bias, m = loan.matrix(W, False), loan.matrix(b, False), loan.matrix(multiplier, False)
    p.multiplier = m.data
    p.dW, p.db, m = loan.matrix(dW, True), loan.matrix(db, True), loan.matrix(losses, True)
    p.grad = dW is not None or db is not None
    p.row_loss, p.row_loss_stride = m.data, m.column_stride
    p.classes, p.scale = w.rows, <real> scale
    read_options(&p.options, row_loss, p.classes)
    p.dot_blocks = (p.classes + DOT_BLOCK - 1) // DOT_BLOCK
    p.outer_blocks = (p.classes + OUTER_BLOCK - 1) // OUTER_BLOCK
    p.vectors = (p.features + LANES - 1) // LANES
    p.fetches = p.features * view.itemsize * TILE <= AHEAD_BYTES
    p.ahead = 0 if not p.fetches else p.vectors // 2 // (STRETCH // LANES) * (STRETCH // LANES) if p.grad else p.vectors
    p.segment = max((p.n + SEGMENTS - 1) // SEGMENTS, <Py_ssize_t> SEGMENT_ROWS)
    p.segment = (p.segment + TILE - 1) // TILE * TILE
    p.segments = (p.n + p.segment - 1) // p.segment
    n_threads = useful_threads(n_threads, p.n, p.segment, <double> p.n * (p.classes * p.features + ROW_PRODUCTS),
                               THREAD_PRODUCTS)

    # One piece of memory: packed W, bias, a row of zeros; partial sums of the segments; scratch of the threads.
    row_size = p.vectors * LANES * sizeof(real)
    panel_size = p.classes * row_size
    p.partial_size = (panel_size + p.classes * sizeof(real) + 63) // 64 * 64 if p.grad else 0
    p.scratch_size = p.classes * TILE * (sizeof(vec) + 2 * sizeof(real)) + TILE * sizeof(vec)
    p.scratch_size = (p.scratch_size + (TILE * row_size if p.staged else 0) + 127) // 64 * 64
    memory = <char *> malloc(64 + panel_size + row_size + p.classes * sizeof(real) + 64 + p.segments * p.partial_size
                             + n_threads * p.scratch_size)
    if memory == NULL:
        raise MemoryError("no memory for the partial sums of dW")
    at = aligned(memory)
    p.W = <real *> at
    p.zeros = <real *> (at + panel_size)
    p.bias = <real *> (at + panel_size + row_size)
    at = aligned(at + panel_size + row_size + p.classes * sizeof(real))
    p.partial, p.scratch, p.loss = at, at + p.segments * p.partial_size, loss
    with nogil:
        memset(p.zeros, 0, row_size)
        pack(&p, &w, &bias)
        share(linear_segment, &p, p.segments, n_threads)
        if p.dW.data != NULL:
            share(add_up, &p, p.vectors, n_threads)
        if p.db.data != NULL:
            sum_bias(&p)
        free(memory)
    for k in range(p.segments):
        total += loss[k]
    return total


cdef void sum_bias(const LinearPass *p) noexcept nogil:
    cdef Py_ssize_t c, s
    cdef real total
    for c in range(p.classes):
        total = 0
        for s in range(p.segments):
            total += (<real *> (p.partial + s * p.partial_size))[p.classes * p.vectors * LANES + c]
        p.db.data[c * p.db.column_stride] = total * p.scale
