# Features of a linear layer with few classes: the dense producer and its gradient accumulator, and the fused pass.
#
# For a batch of 1 to 4 tiles of 16 rows: scores = X Wᵀ + b, the row losses with the gradient in place, dW += gradientᵀ
# X while the rows are in cache. Each feature is read from memory once; the products need 4 N D C operations, and on
# x86-64-v4 in float32 two of 16 of them start each cycle, so with 10 classes memory is the limit where a core gets under
# 6 bytes a cycle.
#
# W and the segment's sum of gradients lie in panels (simd.h): blocks of classes whose sums stay in registers, over
# stretches of features, so that a stretch of some panels stays in L1 while the batch's rows pass by. Panels are
# contiguous: rows of W, and of X, are often a multiple of 4096 bytes apart and fall into the same cache sets. That is
# also why blocks of dW are as large as they can be: the rows of a batch do not stay in L1 until a next block.
#
# The more rows a batch has, the less often W and dW are loaded and stored, until the rows leave the cache between the
# products. 50000 x 3072 x 64 in float32: 115 ms with one tile, 104 with two, 111 with three. A value alone reads rows
# once, and needs batches only to have several tiles for the row losses.
#
# Later rows are fetched during both products, evenly, in the order in which they will be used. The unit is a piece: as
# much of one row as a call of the first product has vectors to ask for a line each, a stretch of float32 or float64.
# `lead` pieces are ahead when a batch begins, `middle` when its second product does; each product fetches as many as it
# has the time for and leaves the others alone. What is fetched comes into the second-level cache, and no nearer: lines on
# their way from memory to the first level hold its few buffers for misses, and all that comes from the second level waits
# for one (Zen 4, 20000 x 3072 x 10 in float32, one thread: 29 ms, 35 with a fetch into the first level, and 26 where the
# rows are in cache; the loss alone 15 and 21 ms). So they are not asked for in bursts either: as few side by side as
# keep up. With a gradient, the first product fetches only while it has its rows in L1, that is with the last of the
# blocks side by side (29.4 ms, with all of them 30.6).

cdef enum:
    STRETCH_BYTES = 2048  # of a row of W, at most
    SIDE_BY_SIDE = 2  # blocks of W whose stretch stays in L1 while rows pass by
    LEAD_BYTES = 192 << 10  # fetched when a batch begins, at most
    LINE = 64  # bytes of the caches' lines
    PART_BYTES = 256  # of a piece, for one call of the second product
    MOST_TILES = 4  # of a batch,
    BATCH_BYTES_L1 = 16 << 10  # and what its rows take, at most, unless they are 16: in the first-level cache;
    BATCH_BYTES_FEW = 256 << 10  # where that has no room for 16, in the second, if dW is one block,
    BATCH_BYTES_MANY = 384 << 10  # and if not: loads and stores of dW then cost more
    SEGMENT_ROWS = 64  # at least,
    PARTIAL_BYTES = 16 << 20  # and all segments' sums, at most, unless they are so few:
    FEW_SEGMENTS = 16

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
    Py_ssize_t dot_start[32]  # first classes of the blocks, and the number of classes
    Py_ssize_t outer_start[32]
    Py_ssize_t tiles  # of a batch
    Py_ssize_t tile_sums  # vectors from a tile's sums to the next's: 0 where they are used up at once
    Py_ssize_t pieces, piece  # of a row, and their bytes
    int lines  # pieces fetched together during the first product
    Py_ssize_t parts  # of a piece, one for each call of the second product
    double lead, middle  # pieces fetched when a batch begins, and when its second product does
    double dot_rate, outer_rate  # to be fetched with each call of the products
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
    char *scratch  # for each thread: sums; a batch of scores, of what goes with them; a tile of db; ends of rows; staged rows
    Py_ssize_t scratch_size
    Matrix dW, db
    real scale


cdef struct Batch:
    int n, tiles
    Py_ssize_t place[64]  # positions in the order of the call
    const stored *row[64]
    lane_int y[64]
    const real *more[64]
    real mult[64]


cdef struct Fetcher:
    Batch *batch  # of the next piece,
    Batch *following  # and the other one
    Py_ssize_t place, row, part  # of the next piece: which of its row, whose row, what is next of it
    double ahead  # pieces, less those that should be
    const stored *nowhere[64]
    Ahead none
    Ahead some


cdef void split_evenly(Py_ssize_t classes, Py_ssize_t blocks, Py_ssize_t *start) noexcept nogil:
    cdef Py_ssize_t b
    for b in range(blocks + 1):
        start[b] = b * (classes // blocks) + min(b, classes % blocks)


cdef void next_batch(const LinearPass *p, Py_ssize_t *cursor, Py_ssize_t stop, Batch *t) noexcept nogil:
    """The next rows that are not skipped, up to p.tiles tiles; rows of zeros with multiplier 0 fill up a last tile."""
    cdef Py_ssize_t i, first = cursor[0]
    cdef Py_ssize_t index[64]
    cdef int k, n = 0, most = <int> p.tiles * TILE
    cdef real m = 1
    while cursor[0] < stop and n < most:
        i = row_index(&p.rows, cursor[0]) if p.rows.data != NULL else cursor[0]
        if p.multiplier != NULL:
            m = p.multiplier[i]
        if m == 0:
            if p.row_loss != NULL:
                p.row_loss[cursor[0] * p.row_loss_stride] = 0
        else:
            t.place[n], index[n] = cursor[0], i
            t.row[n] = <const stored *> (p.X + i * p.row_stride)
            t.mult[n] = m
            n += 1
        cursor[0] += 1
    if p.rows.data == NULL and cursor[0] - first == n:
        convert(&p.targets, first, n, t.y)
    else:
        for k in range(n):
            convert(&p.targets, index[k], 1, &t.y[k])
    if has_more(&p.options):
        for k in range(n):
            t.more[k] = row_more(&p.options, &p.probabilities, index[k], p.classes, t.y[k])
    for k in range(n, most):
        t.row[k], t.mult[k], t.y[k] = p.zeros, 0, 0
        t.more[k] = t.more[0] if n and has_more(&p.options) else NULL
    t.n, t.tiles = n, (n + TILE - 1) // TILE


cdef void stage(const LinearPass *p, Batch *t, stored *rows) noexcept nogil:
    """The batch's rows contiguous, padded with zeros to whole vectors."""
    cdef Py_ssize_t d, width = p.vectors * LANES
    cdef int k
    cdef stored *to
    cdef const char *row
    for k in range(t.n):
        to, row = rows + k * width, <const char *> t.row[k]
        for d in range(p.features):
            to[d] = (<const stored *> (row + d * p.feature_stride))[0]
        t.row[k] = to


cdef void copy_ends(const LinearPass *p, Batch *t, stored *ends) noexcept nogil:
    """What is left of the rows after their whole vectors, 2 vectors apart; what is behind it stays zero.

    Where a row has a whole vector, its last LANES numbers are copied, whatever is left: those too many go before it.
    """
    cdef Py_ssize_t left = p.features % LANES, k
    if p.features < LANES:
        for k in range(t.tiles * TILE):
            memcpy(ends + k * 2 * LANES, t.row[k], left * sizeof(stored))
    else:
        for k in range(t.tiles * TILE):
            memcpy(ends + k * 2 * LANES + left - LANES, t.row[k] + p.features - LANES, LANES * sizeof(stored))


cdef void aim_fetches(const LinearPass *p, Fetcher *f, Batch *t, Batch *following, double piece) noexcept nogil:
    """What is fetched next is this piece of t, or as many further of the batch that follows. Others had their time."""
    cdef Py_ssize_t rows = p.tiles * TILE, together = AHEAD * p.tiles, at = <Py_ssize_t> piece // together * together
    f.batch, f.following, f.place, f.row, f.part, f.ahead = t, following, at // rows, at % rows, 0, 0
    if f.place >= p.pieces:
        f.batch, f.following, f.place = following, t, f.place - p.pieces


cdef inline void fetched(const LinearPass *p, Fetcher *f, Py_ssize_t pieces) noexcept nogil:
    """Go on to the next pieces, of `pieces` rows."""
    f.ahead += pieces
    f.row += pieces
    if f.row == p.tiles * TILE:
        f.row = 0
        f.place += 1
        if f.place == p.pieces:
            f.place = 0
            f.batch, f.following = f.following, f.batch


cdef inline const Ahead *fetch_some(const LinearPass *p, Fetcher *f) noexcept nogil:
    """What the next call of the first product fetches: `lines` pieces, or nothing yet."""
    f.ahead -= p.dot_rate
    if f.ahead >= 0:
        return &f.none
    f.some.rows, f.some.at, f.some.step = &f.batch.row[f.row], f.place * p.piece, LINE
    fetched(p, f, p.lines)
    return &f.some


cdef inline const Ahead *fetch_part(const LinearPass *p, Fetcher *f) noexcept nogil:
    """What the next call of the second product fetches: a part of AHEAD pieces for each tile, or nothing yet."""
    f.ahead -= p.outer_rate
    if f.ahead >= 0:
        return &f.none
    f.some.rows, f.some.at, f.some.step = &f.batch.row[f.row], f.place * p.piece + f.part * PART_BYTES, LINE
    f.part += 1
    if f.part == p.parts:
        f.part = 0
        fetched(p, f, AHEAD * p.tiles)
    return &f.some


cdef void produce(const LinearPass *p, Batch *t, stored *ends, const stored **last, vec *sums, real *scores,
                  Fetcher *f) noexcept nogil:
    """Scores of a batch, transposed."""
    cdef Py_ssize_t whole = p.vectors if p.staged else p.features // LANES
    cdef Py_ssize_t s, at, n, side, stop, b, c, size, v, g
    cdef const stored **end
    cdef vec *tile_sums
    cdef real *tile
    for s in range(p.stretches):
        at = s * p.stretch
        n = min(p.stretch, whole - at)
        end = NULL
        if s == p.stretches - 1 and whole < p.vectors:  # not before: they are fetched with this stretch
            copy_ends(p, t, ends)
            end = last
        side = 0
        while side < p.dot_blocks:
            stop = min(side + SIDE_BY_SIDE, p.dot_blocks)
            for g in range(t.tiles * (TILE // ROWS)):
                tile_sums = sums + g // (TILE // ROWS) * p.tile_sums
                for b in range(side, stop):
                    c, size = p.dot_start[b], p.dot_start[b + 1] - p.dot_start[b]
                    dot_panel(<int> size, p.lines, t.row + g * ROWS, end + g * ROWS if end != NULL else NULL,
                              at * LANES, n, p.centre + at * LANES if p.centre != NULL else NULL,
                              p.W + (c * p.vectors + at * size) * LANES,
                              tile_sums + (c * TILE + g % (TILE // ROWS) * ROWS) // GROUP, s == 0,
                              fetch_some(p, f) if b == stop - 1 or not p.grad else &f.none)
                if s == p.stretches - 1 and g % (TILE // ROWS) == TILE // ROWS - 1:
                    tile = scores + g // (TILE // ROWS) * p.classes * TILE
                    for c in range(p.dot_start[side], p.dot_start[stop]):
                        for v in range(TILE // LANES):
                            vstore(tile + c * TILE + v * LANES,
                                   add(fold_groups(tile_sums + (c * TILE + v * LANES) // GROUP), vset(p.bias[c])))
            side = stop


cdef void accumulate(const LinearPass *p, Batch *t, const stored **last, const real *tile, real *dW, bint first,
                     Fetcher *f) noexcept nogil:
    """dW += gradientᵀ X in panels."""
    cdef Py_ssize_t whole = p.vectors if p.staged else p.features // LANES
    cdef Py_ssize_t at = 0, b, c, size
    cdef const Ahead *ahead
    cdef const stored **rows
    cdef bint two
    while at < p.vectors:
        two = at + 2 <= whole
        rows = &t.row[0] if at < whole else last
        ahead = fetch_part(p, f)
        for b in range(p.outer_blocks):
            c, size = p.outer_start[b], p.outer_start[b + 1] - p.outer_start[b]
            outer_panel(<int> size, two, t.tiles, rows, at * LANES if at < whole else 0,
                        p.centre + at * LANES if p.centre != NULL else NULL, tile + c * TILE, p.classes * TILE,
                        dW + (c * p.vectors + at * size) * LANES, first, ahead)
            ahead = &f.none
        at += 2 if two else 1


cdef void linear_segment(void *job, Py_ssize_t k, int thread) noexcept nogil:
    cdef LinearPass *p = <LinearPass *> job
    cdef Py_ssize_t cursor = k * p.segment, stop = min(p.n, (k + 1) * p.segment), c = p.classes, j, r
    cdef Py_ssize_t rows = p.tiles * TILE
    cdef unsigned mode = flush_to_zero()
    cdef vec *sums = <vec *> (p.scratch + thread * p.scratch_size)
    cdef real *scores = <real *> (sums + (c * (TILE // GROUP) if p.tile_sums == 0 else p.tiles * p.tile_sums))
    cdef real *bias_sums = scores + c * rows
    cdef real *more = bias_sums + c * TILE if has_more(&p.options) else NULL
    cdef stored *ends = <stored *> (bias_sums + c * TILE + c * rows * ((more != NULL) + keeps_slopes(&p.options))) + LANES
    cdef stored *staged = ends + rows * 2 * LANES
    cdef real *dW = <real *> (p.partial + k * p.partial_size)
    cdef real *db = dW + c * p.vectors * LANES
    cdef Batch batches[2]
    cdef Batch *t = &batches[0]
    cdef Batch *following = &batches[1]
    cdef Fetcher f
    cdef const stored *last[64]
    cdef real losses[64]
    cdef double total[16]
    cdef bint first = True
    memset(total, 0, sizeof(total))
    memset(bias_sums, 0, c * TILE * sizeof(real))
    memset(ends, 0, rows * 2 * LANES * sizeof(stored))
    memset(staged, 0, rows * p.vectors * LANES * sizeof(stored) if p.staged else 0)
    for r in range(rows):
        last[r], f.nowhere[r] = ends + r * 2 * LANES, p.zeros
    f.none.rows, f.none.at, f.none.step = f.nowhere, 0, 0
    next_batch(p, &cursor, stop, t)
    while t.n:
        next_batch(p, &cursor, stop, following)
        if p.staged:
            stage(p, t, staged)
        aim_fetches(p, &f, t, following, p.lead)
        produce(p, t, ends, last, sums, scores, &f)
        if more != NULL:
            for r in range(t.tiles):
                load_more(t.more + r * TILE, c, more + r * c * TILE)
        tile_losses(&p.options, p.grad, scores, t.tiles, c, t.y, t.mult, 1, t.n == t.tiles * TILE, losses, more, NULL,
                    bias_sums + c * TILE + (c * rows if more != NULL else 0))
        for j in range(t.tiles):
            add_products(total, losses + j * TILE, t.mult + j * TILE)
        if p.row_loss != NULL:
            for j in range(t.n):
                p.row_loss[t.place[j] * p.row_loss_stride] = losses[j]
        if p.grad:
            for r in range(t.tiles):
                for j in range(c * TILE // LANES):
                    vstore(bias_sums + j * LANES,
                           add(vload(bias_sums + j * LANES), vload(scores + r * c * TILE + j * LANES)))
            if p.dW.data != NULL:
                aim_fetches(p, &f, t, following, p.middle)
                accumulate(p, t, last, scores, dW, first, &f)
        first = False
        t, following = following, t
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
        c, size = p.outer_start[b], p.outer_start[b + 1] - p.outer_start[b]
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
        c, size = p.dot_start[k], p.dot_start[k + 1] - p.dot_start[k]
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


cdef Py_ssize_t batch_tiles_of_rows(const LinearPass *p) noexcept nogil:
    cdef Py_ssize_t size = TILE * (p.vectors + (2 if p.features % LANES else 0)) * LANES * <Py_ssize_t> sizeof(stored)
    cdef Py_ssize_t most = BATCH_BYTES_L1
    if size > most and p.grad:
        most = BATCH_BYTES_FEW if p.outer_blocks == 1 else BATCH_BYTES_MANY
    return max(<Py_ssize_t> 1, min(<Py_ssize_t> MOST_TILES, most // max(size, <Py_ssize_t> 1)))


cdef void plan_fetches(LinearPass *p) noexcept nogil:
    """How far ahead rows are fetched, and how fast.

    Without a second product, one piece of each row of a batch ahead. With it, as far as makes both fetch as much, if the
    second-level cache has the room; an eighth of that is left when the first product ends.
    """
    cdef Py_ssize_t rows = p.tiles * TILE, calls = rows // ROWS * p.stretches
    cdef Py_ssize_t row_size = max(<Py_ssize_t> 1, p.features * <Py_ssize_t> sizeof(stored))
    cdef Py_ssize_t most_piece = max(<Py_ssize_t> 1, p.stretch) * LINE
    cdef double all, most
    p.pieces = (row_size + most_piece - 1) // most_piece
    p.piece = ((row_size + p.pieces - 1) // p.pieces + LINE - 1) // LINE * LINE
    p.parts = (p.piece + PART_BYTES - 1) // PART_BYTES
    calls *= (p.dot_blocks + SIDE_BY_SIDE - 1) // SIDE_BY_SIDE if p.grad else p.dot_blocks
    all = p.pieces * rows
    most = max(<double> rows, min(all * 2 / 3, <double> LEAD_BYTES / p.piece))
    p.lead = most if p.grad else <double> rows
    p.middle = max(p.lead + all / 2, all + most / 8) if p.grad else p.lead + all
    p.dot_rate = (p.middle - p.lead) / max(calls, <Py_ssize_t> 1)
    p.lines = 1 if p.dot_rate <= 1 else 2 if p.dot_rate <= 2 else AHEAD
    p.outer_rate = (all + p.lead - p.middle) / max((p.vectors + 1) // 2, <Py_ssize_t> 1)
    if p.staged:
        p.dot_rate, p.outer_rate = 0, 0


def linear_rows(row_loss, X, rows, centre, W, b, targets, multiplier, double scale, dW, db, losses, int n_threads):
    """Σ multiplier · ℓ of the scores X Wᵀ + b, of all rows or those picked; scaled gradients into dW (C, D) and db (C,).

    X is of the type `stored`, of any strides; `centre` (D,), contiguous, or None, is subtracted from its rows. targets
    and multiplier belong to X, losses to the rows picked.
    """
    cdef _Loan loan = _Loan()
    cdef LinearPass p
    cdef Matrix w, bias, middle, m
    cdef Py_buffer *view = loan.borrow(X, False)
    cdef Py_ssize_t k, longest, row_size, panel_size, segments
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
    split_evenly(p.classes, p.dot_blocks, p.dot_start)
    split_evenly(p.classes, p.outer_blocks, p.outer_start)
    p.tiles = 1 if p.staged else batch_tiles_of_rows(&p)
    p.tile_sums = p.classes * (TILE // GROUP) if p.stretches > 1 else 0
    plan_fetches(&p)
    # Writing and adding up a segment's sums is to cost little beside its rows, and they are to fit into the cache.
    row_size = p.vectors * LANES * sizeof(real)
    panel_size = p.classes * row_size
    p.partial_size = (panel_size + p.classes * sizeof(real) + 63) // 64 * 64 if p.grad else 0
    segments = SEGMENTS
    while segments > FEW_SEGMENTS and segments * p.partial_size > PARTIAL_BYTES:
        segments //= 2
    p.segment = max((p.n + segments - 1) // segments, <Py_ssize_t> SEGMENT_ROWS)
    p.segment = (p.segment + TILE - 1) // TILE * TILE
    p.segments = (p.n + p.segment - 1) // p.segment
    n_threads = useful_threads(n_threads, p.n, p.segment, <double> p.n * (p.classes * p.features + ROW_PRODUCTS),
                               THREAD_PRODUCTS)

    # One piece of memory: packed W, the centre, a row of zeros, the bias; partial sums of the segments; scratch of the
    # threads.
    p.scratch_size = max(p.tiles * p.tile_sums, p.classes * (TILE // GROUP)) * sizeof(vec)
    p.scratch_size += p.classes * TILE * ((1 + has_more(&p.options) + keeps_slopes(&p.options)) * p.tiles + 1) * sizeof(real)
    p.scratch_size += (p.tiles * TILE * 2 + 1) * LANES * sizeof(stored)
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
