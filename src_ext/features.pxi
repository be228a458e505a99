# Features of a linear layer with few classes: the dense producer and its gradient accumulator, and the fused pass.
#
# For a tile of 16 rows: scores = X Wᵀ + b, the row losses with the gradient in place, dW += gradientᵀ X while the rows
# are in cache. Each feature is read from memory once; the products need 4 N D C operations, and on x86-64-v4 in float32
# two of 16 of them start each cycle, so with 10 classes memory is the limit where a core gets under 6 bytes a cycle.
#
# W and the segment's sum of gradients lie in panels (simd.h): blocks of classes whose sums stay in registers, over
# stretches of features, so that a stretch of some panels stays in L1 while the 16 rows pass by. Panels are
# contiguous: rows of W, and of X, are often a multiple of 4096 bytes apart and fall into the same cache sets. That is
# also why blocks of dW are as large as they can be: 16 such rows do not stay in L1 until a next block.
#
# Later rows are fetched during both products, evenly, in the order in which they will be used. The unit is a piece: a
# stretch of one row. `lead` pieces are ahead when a tile begins; the first product, and then the second, fetch as many
# as keep it so, and what is fetched stays in the second-level cache until it is used.

cdef enum:
    STRETCH_BYTES = 2048  # of a row of W, at most
    SIDE_BY_SIDE = 2  # blocks of W whose stretch stays in L1 while rows pass by
    LEAD = 64  # pieces, at most
    PARTS = 8  # of a piece, one for each call of the second product
    SEGMENT_ROWS = 64  # at least, so that writing and adding up a segment's sums costs little beside its rows

cdef struct LinearPass:
    char *X
    Py_ssize_t row_stride, feature_stride  # in bytes
    Py_ssize_t n, features, vectors  # rows to handle; D, and D in vectors, rounded up
    Py_ssize_t stretch, stretches  # vectors of a stretch
    bint staged  # rows go through a copy, contiguous and padded
    Indices rows, targets
    Matrix probabilities
    const real *multiplier
    Options options
    Py_ssize_t classes, dot_blocks, outer_blocks
    int lines  # pieces fetched together during the first product: more than one, so that memory answers side by side
    double lead, dot_rate, outer_rate  # pieces ahead when a tile begins; to be fetched with each call of the products
    real *W  # panels
    real *bias
    real *centre  # subtracted from each row; NULL: none
    stored *zeros  # a row of features
    bint grad
    real *row_loss
    Py_ssize_t row_loss_stride
    Py_ssize_t segment, segments
    char *partial  # for each segment: panels of dW, then db
    Py_ssize_t partial_size
    double *loss
    char *scratch  # for each thread: sums, tiles of scores, db and what goes with the rows, the rows' last vectors, the staged rows
    Py_ssize_t scratch_size
    Matrix dW, db
    real scale


cdef struct FeatureTile:
    int n
    Py_ssize_t place[16]  # positions in the order of the call
    const stored *row[16]
    lane_int y[16]
    const real *more[16]
    real mult[16]


cdef struct Fetcher:
    const FeatureTile *tile
    const FeatureTile *following
    Py_ssize_t cursor  # pieces of both tiles fetched, by stretches
    double due
    Ahead none
    Ahead ahead


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
            t.row[t.n] = <const stored *> (p.X + i * p.row_stride)
            t.mult[t.n] = m
            t.y[t.n] = -1
            convert(&p.targets, i, 1, &t.y[t.n])
            t.more[t.n] = row_more(&p.options, &p.probabilities, i, p.classes, t.y[t.n])
            t.n += 1
        cursor[0] += 1
    for k in range(t.n, TILE):
        t.row[k], t.mult[k], t.y[k], t.more[k] = p.zeros, 0, 0, NULL


cdef void stage(const LinearPass *p, FeatureTile *t, stored *rows) noexcept nogil:
    """The tile's rows contiguous, padded with zeros to whole vectors."""
    cdef Py_ssize_t d, width = p.vectors * LANES
    cdef int k
    cdef stored *to
    cdef const char *row
    for k in range(t.n):
        to, row = rows + k * width, <const char *> t.row[k]
        for d in range(p.features):
            to[d] = (<const stored *> (row + d * p.feature_stride))[0]
        t.row[k] = to


cdef inline const stored *piece(const LinearPass *p, const Fetcher *f, Py_ssize_t at) noexcept nogil:
    cdef Py_ssize_t all = p.stretches * TILE
    cdef const FeatureTile *t = f.tile if at < all else f.following
    at = min(at if at < all else at - all, all - 1)
    return t.row[at % TILE] + at // TILE * p.stretch * LANES


cdef inline const Ahead *fetch_some(const LinearPass *p, Fetcher *f) noexcept nogil:
    """What the next call of the first product fetches: `lines` pieces, or nothing yet."""
    cdef int i
    cdef bint now = f.cursor < f.due
    f.due += p.dot_rate
    if not now:
        return &f.none
    for i in range(p.lines):
        f.ahead.at[i] = <const char *> piece(p, f, f.cursor + i)
    f.ahead.step = LANES * sizeof(stored)
    f.cursor += p.lines
    return &f.ahead


cdef inline const Ahead *fetch_part(const LinearPass *p, Fetcher *f, Py_ssize_t part) noexcept nogil:
    """What the next call of the second product fetches: a part of AHEAD pieces, or nothing yet."""
    cdef Py_ssize_t size = p.stretch * LANES * sizeof(stored) // PARTS
    cdef bint now = f.cursor < f.due
    cdef int i
    f.due += p.outer_rate
    if not now:
        return &f.none
    for i in range(AHEAD):
        f.ahead.at[i] = <const char *> piece(p, f, f.cursor + i) + part * size
    f.ahead.step = size * AHEAD // TILE
    f.cursor += AHEAD if part == PARTS - 1 else 0
    return &f.ahead


cdef void produce(const LinearPass *p, const stored **x, const stored **last, vec *sums, real *tile,
                  Fetcher *f) noexcept nogil:
    """Scores of a tile, transposed."""
    cdef Py_ssize_t whole = p.vectors if p.staged else p.features // LANES
    cdef Py_ssize_t s, at, n, side, b, c, size, v
    cdef const stored **end
    cdef int r
    for s in range(p.stretches):
        at = s * p.stretch
        n = min(p.stretch, whole - at)
        end = last if s == p.stretches - 1 and whole < p.vectors else NULL
        side = 0
        while side < p.dot_blocks:
            for r in range(TILE // ROWS):
                for b in range(side, min(side + SIDE_BY_SIDE, p.dot_blocks)):
                    c = block_start(p, p.dot_blocks, b)
                    size = block_start(p, p.dot_blocks, b + 1) - c
                    dot_panel(<int> size, p.lines, x + r * ROWS, end + r * ROWS if end != NULL else NULL, at * LANES, n,
                              p.centre + at * LANES if p.centre != NULL else NULL,
                              p.W + (c * p.vectors + at * size) * LANES, sums + (c * TILE + r * ROWS) // GROUP, s == 0,
                              fetch_some(p, f))
            side += SIDE_BY_SIDE
    for c in range(p.classes):
        for v in range(TILE // LANES):
            vstore(tile + c * TILE + v * LANES,
                   add(fold_groups(sums + (c * TILE + v * LANES) // GROUP), vset(p.bias[c])))


cdef void accumulate(const LinearPass *p, const stored **x, const stored **last, const real *tile, real *dW, bint first,
                     Fetcher *f) noexcept nogil:
    """dW += gradientᵀ X in panels."""
    cdef Py_ssize_t whole = p.vectors if p.staged else p.features // LANES
    cdef Py_ssize_t at = 0, b, c, size
    cdef const Ahead *ahead
    cdef const stored **rows
    cdef bint two
    while at < p.vectors:
        two = at + 2 <= whole
        rows = x if at < whole else last
        ahead = fetch_part(p, f, at // 2 % PARTS)
        for b in range(p.outer_blocks):
            c = block_start(p, p.outer_blocks, b)
            size = block_start(p, p.outer_blocks, b + 1) - c
            outer_panel(<int> size, two, rows, at * LANES if at < whole else 0,
                        p.centre + at * LANES if p.centre != NULL else NULL, tile + c * TILE,
                        dW + (c * p.vectors + at * size) * LANES, first, ahead)
            ahead = &f.none
        at += 2 if two else 1


cdef void linear_segment(void *job, Py_ssize_t k, int thread) noexcept nogil:
    cdef LinearPass *p = <LinearPass *> job
    cdef Py_ssize_t cursor = k * p.segment, stop = min(p.n, (k + 1) * p.segment), c = p.classes, whole, j
    cdef unsigned mode = flush_to_zero()
    cdef vec *sums = <vec *> (p.scratch + thread * p.scratch_size)
    cdef real *tile = <real *> (sums + c * (TILE // GROUP))
    cdef real *bias_sums = tile + c * TILE
    cdef real *more = bias_sums + c * TILE
    cdef stored *ends = <stored *> (more + c * TILE)
    cdef bint has_more = p.options.probabilities or p.options.pairs != NULL
    cdef stored *staged = ends + TILE * LANES
    cdef real *dW = <real *> (p.partial + k * p.partial_size)
    cdef real *db = dW + c * p.vectors * LANES
    cdef FeatureTile tiles[2]
    cdef FeatureTile *t = &tiles[0]
    cdef FeatureTile *following = &tiles[1]
    cdef FeatureTile *other
    cdef Fetcher f
    cdef const stored *last[16]
    cdef real losses[16]
    cdef double total[16]
    cdef bint first = True
    cdef int r
    memset(total, 0, sizeof(total))
    memset(bias_sums, 0, c * TILE * sizeof(real))
    memset(ends, 0, TILE * LANES * sizeof(stored))
    memset(staged, 0, TILE * p.vectors * LANES * sizeof(stored) if p.staged else 0)
    whole = p.features // LANES * LANES
    for r in range(TILE):
        last[r] = ends + r * LANES
    for r in range(AHEAD):
        f.none.at[r] = <const char *> p.zeros
    f.none.step, f.cursor, f.due = 0, TILE, p.lead  # the first stretch is read at once: too late for its pieces
    next_tile(p, &cursor, stop, t)
    while t.n:
        next_tile(p, &cursor, stop, following)
        f.tile, f.following = t, following
        if p.staged:
            stage(p, t, staged)
        elif whole < p.features:
            for r in range(TILE):
                memcpy(ends + r * LANES, t.row[r] + whole, (p.features - whole) * sizeof(stored))
        produce(p, t.row, last, sums, tile, &f)
        if has_more:
            load_more(t.more, c, more)
        tile_losses(&p.options, p.grad, tile, 1, c, t.y, t.mult, 1, t.n == TILE, losses, more if has_more else NULL, NULL)
        add_products(total, losses, t.mult)
        if p.row_loss != NULL:
            for r in range(t.n):
                p.row_loss[t.place[r] * p.row_loss_stride] = losses[r]
        if p.grad:
            for j in range(c * TILE // LANES):
                vstore(bias_sums + j * LANES, add(vload(bias_sums + j * LANES), vload(tile + j * LANES)))
            if p.dW.data != NULL:
                accumulate(p, t.row, last, tile, dW, first, &f)
        first = False
        f.cursor -= p.stretches * TILE
        f.due -= p.stretches * TILE
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


cdef void plan_fetches(LinearPass *p) noexcept nogil:
    """How far ahead rows are fetched, and how fast.

    Without a second product, one stretch of a tile ahead. With it, as far as makes both fetch as much, if the
    second-level cache has the room; a quarter of that is left when the first product ends.
    """
    cdef double all = p.stretches * TILE, end
    cdef Py_ssize_t calls = p.dot_blocks * (TILE // ROWS) * p.stretches
    p.lines = 4 if p.dot_blocks == 1 else 2
    p.lead = min(all, <double> (LEAD if p.grad else TILE))
    end = max(p.lead + all / 2, all + min(all, <double> LEAD) / 4) if p.grad else p.lead + all
    p.dot_rate = (end - p.lead) / max(calls, <Py_ssize_t> 1)
    p.outer_rate = (all + p.lead - end) / max((p.vectors + 1) // 2, <Py_ssize_t> 1)
    if p.staged:
        p.lead, p.dot_rate, p.outer_rate = -INFINITY, 0, 0


def linear_rows(row_loss, X, rows, centre, W, b, targets, multiplier, double scale, dW, db, losses, int n_threads):
    """Σ multiplier · ℓ of the scores X Wᵀ + b, of all rows or those picked; scaled gradients into dW (C, D) and db (C,).

    X is of the type `stored`, of any strides; `centre` (D,), contiguous, or None, is subtracted from its rows. targets
    and multiplier belong to X, losses to the rows picked.
    """
    cdef _Loan loan = _Loan()
    cdef LinearPass p
    cdef Matrix w, bias, middle, m
    cdef Py_buffer *view = loan.borrow(X, False)
    cdef Py_ssize_t k, longest, row_size, panel_size
    cdef char *memory
    cdef char *at
    cdef double total = 0
    cdef double loss[SEGMENTS]
    p.X, p.n, p.features = <char *> view.buf, view.shape[0], view.shape[1]
    p.row_stride, p.feature_stride = view.strides[0], view.strides[1]
    if view.itemsize != sizeof(stored) or view.format[0] != STORED_FORMAT:
        raise TypeError("features of another type than the kernel's")
    p.staged = p.feature_stride != sizeof(stored)
    p.rows = loan.indices(rows)
    if rows is not None:
        p.n = p.rows.size
    w, bias, middle = loan.matrix(W, False), loan.matrix(b, False), loan.matrix(centre, False)
    m = loan.matrix(multiplier, False)
    p.multiplier = m.data
    p.dW, p.db, m = loan.matrix(dW, True), loan.matrix(db, True), loan.matrix(losses, True)
    p.grad = dW is not None or db is not None
    p.row_loss, p.row_loss_stride = m.data, m.column_stride
    p.classes, p.scale = w.rows, <real> scale
    read_options(&p.options, row_loss, loan, p.classes)
    read_targets(loan, targets, &p.targets, &p.probabilities, &p.options)
    p.dot_blocks = (p.classes + DOT_BLOCK - 1) // DOT_BLOCK
    p.outer_blocks = (p.classes + OUTER_BLOCK - 1) // OUTER_BLOCK
    p.vectors = (p.features + LANES - 1) // LANES
    longest = STRETCH_BYTES // <Py_ssize_t> sizeof(vec)
    p.stretches = max(<Py_ssize_t> 1, (p.vectors + longest - 1) // longest)
    p.stretch = (p.vectors + p.stretches - 1) // p.stretches
    plan_fetches(&p)
    p.segment = max((p.n + SEGMENTS - 1) // SEGMENTS, <Py_ssize_t> SEGMENT_ROWS)
    p.segment = (p.segment + TILE - 1) // TILE * TILE
    p.segments = (p.n + p.segment - 1) // p.segment
    n_threads = useful_threads(n_threads, p.n, p.segment, <double> p.n * (p.classes * p.features + ROW_PRODUCTS),
                               THREAD_PRODUCTS)

    # One piece of memory: packed W, the centre, a row of zeros, the bias; partial sums of the segments; scratch of the
    # threads.
    row_size = p.vectors * LANES * sizeof(real)
    panel_size = p.classes * row_size
    p.partial_size = (panel_size + p.classes * sizeof(real) + 63) // 64 * 64 if p.grad else 0
    p.scratch_size = p.classes * TILE * (sizeof(vec) // GROUP + 3 * sizeof(real)) + TILE * LANES * sizeof(stored)
    p.scratch_size = (p.scratch_size + (TILE * row_size if p.staged else 0) + 127) // 64 * 64
    memory = <char *> malloc(64 + panel_size + 2 * row_size + p.classes * sizeof(real) + 64 + p.segments * p.partial_size
                             + n_threads * p.scratch_size)
    if memory == NULL:
        raise MemoryError("no memory for the partial sums of dW")
    at = aligned(memory)
    p.W = <real *> at
    p.centre = <real *> (at + panel_size) if middle.data != NULL else NULL
    p.zeros = <stored *> (at + panel_size + row_size)
    p.bias = <real *> (at + panel_size + 2 * row_size)
    at = aligned(at + panel_size + 2 * row_size + p.classes * sizeof(real))
    p.partial, p.scratch, p.loss = at, at + p.segments * p.partial_size, loss
    with nogil:
        memset(p.W + p.classes * p.vectors * LANES, 0, 2 * row_size)
        if p.centre != NULL:
            memcpy(p.centre, middle.data, p.features * sizeof(real))
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
