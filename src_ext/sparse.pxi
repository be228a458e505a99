# Sparse features of a linear layer: the producer of scores from rows of a CSR matrix, and the accumulator of dW.
#
# Both go through W or dW laid out (D, C): for each number of a row of X the C classes' weights, or sums, of its feature
# are side by side. The least traffic is X twice and a line or more of W or dW for each of its numbers, which come from
# whatever cache holds them. Scores are shared out by rows. Sums are shared out by features, so that no two threads write
# the same one, and results do not depend on their number. Where a copy of X by columns is kept, sums are what scores
# are: the rows of Xᵀ times dS, held in registers (`csr_scores`). Else a thread finds its columns in each row by bisection
# (indices are sorted), and adds up the rows in their order (`csr_accumulate`; 2.2 times as long on 20 Newsgroups).

cdef enum:
    CSR_VECTORS = 4  # of classes whose sums stay in registers
    CSR_BLOCK = 512  # numbers of a row whose products are added up on their own: long sums lose less
    CSR_SEGMENT = 64  # rows, at least
    CSR_AHEAD = 4  # rows whose indices are fetched before they are bisected

ctypedef fused csr_int:
    int32_t
    int64_t

cdef struct CsrPass:
    const real *values
    char *indices  # of features, and
    char *starts  # of rows,
    char *ends  # and where they end: all of the type `kind`
    char kind
    Py_ssize_t below  # entries of features below this alone, and then starts move on to the others; or -1: all
    Indices rows  # picked, in this order; or none: those from `first` on
    Py_ssize_t first, n, classes, step, W_step  # from row to row of scores, and of W or dW
    const real *W  # (D, C)
    const real *bias  # NULL: what scores have is added to
    real *scores  # (n, C)
    real *dW  # (D, C)
    Py_ssize_t segment
    Indices bounds  # of each thread's features


cdef inline Py_ssize_t csr_row_at(const CsrPass *p, Py_ssize_t i) noexcept nogil:
    return row_index(&p.rows, i) if p.rows.data != NULL else p.first + i


cdef inline Py_ssize_t first_not_below(const csr_int *indices, Py_ssize_t at, Py_ssize_t n, Py_ssize_t bound) noexcept nogil:
    """Position of the first of n sorted indices from `at` on that is at least `bound`."""
    cdef Py_ssize_t half
    if n <= 0:
        return at
    while n > 1:
        half = n // 2
        at += half if indices[at + half - 1] < bound else 0
        n -= half
    return at + (indices[at] < bound)


cdef inline void csr_dot(const csr_int *indices, const CsrPass *p, Py_ssize_t start, Py_ssize_t stop, real *to,
                         Py_ssize_t c, int vectors, Py_ssize_t tail) noexcept nogil:
    """Scores of one row, for `vectors` vectors of classes from c on, the last of them of `tail` classes."""
    cdef vec total[CSR_VECTORS]
    cdef vec even[CSR_VECTORS]
    cdef vec odd[CSR_VECTORS]  # two sums each: one would have every product wait for the last
    cdef const real *w
    cdef const real *u
    cdef const real *first = p.bias
    cdef vec x, y
    cdef Py_ssize_t k, until
    cdef int v, last = vectors - 1
    if first == NULL:
        first = to
    for v in range(last):
        total[v] = vload(first + c + v * LANES)
    total[last] = vload_part(first + c + last * LANES, tail, 0)
    k = start
    while k < stop:
        until = min(stop, k + CSR_BLOCK)
        for v in range(vectors):
            even[v], odd[v] = vset(0), vset(0)
        while k + 1 < until:
            w, x = p.W + <Py_ssize_t> indices[k] * p.W_step + c, vset(p.values[k])
            u, y = p.W + <Py_ssize_t> indices[k + 1] * p.W_step + c, vset(p.values[k + 1])
            for v in range(last):
                even[v] = add(mul(x, vload(w + v * LANES)), even[v])
                odd[v] = add(mul(y, vload(u + v * LANES)), odd[v])
            even[last] = add(mul(x, vload_part(w + last * LANES, tail, 0)), even[last])
            odd[last] = add(mul(y, vload_part(u + last * LANES, tail, 0)), odd[last])
            k += 2
        if k < until:
            w, x = p.W + <Py_ssize_t> indices[k] * p.W_step + c, vset(p.values[k])
            for v in range(last):
                even[v] = add(mul(x, vload(w + v * LANES)), even[v])
            even[last] = add(mul(x, vload_part(w + last * LANES, tail, 0)), even[last])
            k += 1
        for v in range(vectors):
            total[v] = add(total[v], add(even[v], odd[v]))
    for v in range(last):
        vstore(to + c + v * LANES, total[v])
    vstore_part(to + c + last * LANES, total[last], tail)


cdef inline void csr_outer(const csr_int *indices, const CsrPass *p, Py_ssize_t start, Py_ssize_t stop, const real *scores,
                           Py_ssize_t c, int vectors, Py_ssize_t tail) noexcept nogil:
    """dW += what one row adds to it, for the same classes."""
    cdef vec g[CSR_VECTORS]
    cdef real *w
    cdef vec x
    cdef Py_ssize_t k
    cdef int v, last = vectors - 1
    for v in range(last):
        g[v] = vload(scores + c + v * LANES)
    g[last] = vload_part(scores + c + last * LANES, tail, 0)
    for k in range(start, stop):
        w, x = p.dW + <Py_ssize_t> indices[k] * p.W_step + c, vset(p.values[k])
        for v in range(last):
            vstore(w + v * LANES, add(mul(x, g[v]), vload(w + v * LANES)))
        vstore_part(w + last * LANES, add(mul(x, g[last]), vload_part(w + last * LANES, tail, 0)), tail)


cdef inline void csr_row(const csr_int *indices, const CsrPass *p, Py_ssize_t start, Py_ssize_t stop, real *scores,
                         bint outer) noexcept nogil:
    """One row with all classes; the number of vectors is a constant where it is used."""
    cdef Py_ssize_t c = 0, left, tail
    cdef int vectors
    while c < p.classes:
        left = p.classes - c
        vectors = <int> min((left + LANES - 1) // LANES, <Py_ssize_t> CSR_VECTORS)
        tail = min(left - (vectors - 1) * LANES, <Py_ssize_t> LANES)
        if outer:
            if vectors == 1: csr_outer(indices, p, start, stop, scores, c, 1, tail)
            elif vectors == 2: csr_outer(indices, p, start, stop, scores, c, 2, tail)
            elif vectors == 3: csr_outer(indices, p, start, stop, scores, c, 3, tail)
            else: csr_outer(indices, p, start, stop, scores, c, 4, tail)
        elif vectors == 1: csr_dot(indices, p, start, stop, scores, c, 1, tail)
        elif vectors == 2: csr_dot(indices, p, start, stop, scores, c, 2, tail)
        elif vectors == 3: csr_dot(indices, p, start, stop, scores, c, 3, tail)
        else: csr_dot(indices, p, start, stop, scores, c, 4, tail)
        c += vectors * LANES


cdef inline void csr_scores_typed(const csr_int *indices, const CsrPass *p, Py_ssize_t k) noexcept nogil:
    cdef csr_int *starts = <csr_int *> p.starts
    cdef const csr_int *ends = <const csr_int *> p.ends
    cdef Py_ssize_t i, row, start, stop
    for i in range(k * p.segment, min(p.n, (k + 1) * p.segment)):
        row = csr_row_at(p, i)
        start, stop = starts[row], ends[row]
        if p.below >= 0:
            stop = first_not_below(indices, start, stop - start, p.below)
            starts[row] = <csr_int> stop
        csr_row(indices, p, start, stop, p.scores + i * p.step, False)


cdef void csr_scores_segment(void *job, Py_ssize_t k, int thread) noexcept nogil:
    cdef CsrPass *p = <CsrPass *> job
    if p.kind == c"i": csr_scores_typed(<const int32_t *> p.indices, p, k)
    else: csr_scores_typed(<const int64_t *> p.indices, p, k)


cdef inline void csr_accumulate_typed(const csr_int *indices, const CsrPass *p, Py_ssize_t k) noexcept nogil:
    cdef const csr_int *starts = <const csr_int *> p.starts
    cdef Py_ssize_t i, j, row, start, stop, low = row_index(&p.bounds, k), high = row_index(&p.bounds, k + 1)
    cdef Py_ssize_t line = 16 if csr_int is int32_t else 8  # indices
    cdef bint is_first = k == 0, is_last = k == p.bounds.size - 2
    for i in range(p.n):
        row = csr_row_at(p, i)
        start, stop = starts[row], starts[row + 1]
        if not (is_first and is_last) and i + CSR_AHEAD < p.n:
            row = csr_row_at(p, i + CSR_AHEAD)
            for j in range((starts[row + 1] - starts[row]) // line + 1):
                prefetch(indices + starts[row] + j * line)
        if not is_first:
            start = first_not_below(indices, start, stop - start, low)
        if not is_last:
            stop = first_not_below(indices, start, stop - start, high)
        csr_row(indices, p, start, stop, p.scores + i * p.step, True)


cdef void csr_accumulate_segment(void *job, Py_ssize_t k, int thread) noexcept nogil:
    cdef CsrPass *p = <CsrPass *> job
    cdef unsigned mode = flush_to_zero()
    if p.kind == c"i": csr_accumulate_typed(<const int32_t *> p.indices, p, k)
    else: csr_accumulate_typed(<const int64_t *> p.indices, p, k)
    restore_mode(mode)


cdef int csr_borrow(_Loan loan, CsrPass *p, values, indices, starts, ends, rows, Py_ssize_t first, scores,
                    bint writes) except -1:
    cdef Indices of_features = loan.indices(indices), of_rows = loan.indices(starts), of_ends = loan.indices(ends)
    cdef Matrix m = loan.matrix(scores, writes)
    if of_features.kind != of_rows.kind or of_features.kind != of_ends.kind or of_rows.kind not in (c"i", c"q"):
        raise TypeError("indices, starts and ends of different types")
    p.values, p.indices, p.starts, p.kind = loan.matrix(values, False).data, of_features.data, of_rows.data, of_rows.kind
    p.ends = of_ends.data
    p.rows, p.first, p.scores, p.n, p.classes, p.step = loan.indices(rows), first, m.data, m.rows, m.columns, m.row_stride
    return 0


def csr_scores(values, indices, starts, ends, Py_ssize_t below, rows, Py_ssize_t first, W, Py_ssize_t W_first, bias,
               scores, int n_threads):
    """scores (n, C) ← rows of a CSR matrix times W (D, C), plus bias (C,), or for None added to what is there. The rows
    are those picked, or, for None, n of them from `first` on. W has rows from `W_first` on; `below` is at most where
    they end: then `starts` is written too."""
    if not STORED_IS_REAL:
        raise TypeError("sparse features are float32 or float64")
    cdef _Loan loan = _Loan()
    cdef CsrPass p
    cdef Matrix weights = loan.matrix(W, False)
    cdef Py_ssize_t segments
    csr_borrow(loan, &p, values, indices, starts, ends, rows, first, scores, True)
    p.below = below
    p.W, p.W_step, p.bias = weights.data - W_first * weights.row_stride, weights.row_stride, loan.matrix(bias, False).data
    p.segment = max((p.n + SEGMENTS - 1) // SEGMENTS, <Py_ssize_t> CSR_SEGMENT)
    segments = (p.n + p.segment - 1) // p.segment
    with nogil:
        share(csr_scores_segment, &p, segments, n_threads)


def csr_accumulate(values, indices, starts, rows, Py_ssize_t first, scores, dW, bounds, int n_threads):
    """dW (D, C) += those rowsᵀ times scores (n, C), features by features of the parts that `bounds` has."""
    if not STORED_IS_REAL:
        raise TypeError("sparse features are float32 or float64")
    cdef _Loan loan = _Loan()
    cdef CsrPass p
    cdef Matrix m = loan.matrix(dW, True)
    csr_borrow(loan, &p, values, indices, starts, starts, rows, first, scores, False)
    p.dW, p.W_step, p.bounds = m.data, m.row_stride, loan.indices(bounds)
    with nogil:
        share(csr_accumulate_segment, &p, p.bounds.size - 1, n_threads)


cdef struct TransposePass:
    Matrix matrix  # (C, D)
    real *transposed  # (D, C)
    real factor
    bint back
    Py_ssize_t segment


cdef void transpose_segment(void *job, Py_ssize_t k, int thread) noexcept nogil:
    cdef TransposePass *p = <TransposePass *> job
    cdef Py_ssize_t start, c, j, stop, n = p.matrix.rows, last = min(p.matrix.columns, (k + 1) * p.segment)
    cdef Py_ssize_t step = p.matrix.column_stride
    cdef real *a
    cdef real *b
    for start in range(k * p.segment, last, 16):  # a line of each row at a time
        stop = min(last, start + 16)
        for c in range(n):
            a, b = p.matrix.data + c * p.matrix.row_stride, p.transposed + c
            if p.back:
                for j in range(start, stop):
                    a[j * step] = p.factor * b[j * n]
            else:
                for j in range(start, stop):
                    b[j * n] = a[j * step]


def transpose(matrix, transposed, double factor, bint back, int n_threads):
    """transposed (D, C), contiguous, ← matrixᵀ; or back, times a factor."""
    if not STORED_IS_REAL:
        raise TypeError("sparse features are float32 or float64")
    cdef _Loan loan = _Loan()
    cdef TransposePass p
    cdef Py_ssize_t segments
    p.matrix, p.transposed = loan.matrix(matrix, back), loan.matrix(transposed, not back).data
    p.factor, p.back = <real> factor, back
    p.segment = max((p.matrix.columns // SEGMENTS + 16) // 16 * 16, <Py_ssize_t> 256)
    segments = (p.matrix.columns + p.segment - 1) // p.segment
    with nogil:
        share(transpose_segment, &p, segments,
              useful_threads(n_threads, p.matrix.columns, p.segment, <double> p.matrix.columns * p.matrix.rows,
                             THREAD_WORK))


# --- Crammer and Singer's hinge in the dual ---------------------------------------------------------------------------
# min ½ ‖W‖² + Σ_i C_i max_m (Δ [m ≠ y] + w_m·x_i − w_y·x_i): with W = Σ_i x_i α_iᵀ, the α of one row are chosen at their
# best for the others', in closed form, and W follows (Keerthi et al., 2008). With A = ‖x_i‖², G_m the score plus the
# margin, and u = C_i at the target, 0 elsewhere: α_m = u_m − max(0, D_m − β) / A, D_m = G_m − A (α_m − u_m), where β is such
# that the α sum to 0, as in a projection onto a simplex.

cdef inline bint best_alphas(real *G, real *alpha, Py_ssize_t n, Py_ssize_t y, double bound, double square,
                             double margin, double *D) noexcept nogil:
    """Scores G (n,) of a row ← the changes of its alpha; whether there are any."""
    cdef Py_ssize_t m, count = 0, last = -1
    cdef double total, beta = -INFINITY, new, largest = 0
    for m in range(n):
        D[m] = G[m] + (0 if m == y else margin) - square * (alpha[m] - (bound if m == y else 0))
    while True:  # those above β are ever fewer, until they stay
        total, count = 0, 0
        for m in range(n):
            if D[m] > beta:
                total += D[m]
                count += 1
        if count == 0 or not total - total == 0:  # NaN or infinity
            return False
        if count == last:
            break
        beta, last = (total - square * bound) / count, count
    for m in range(n):
        new = (bound if m == y else 0) - (D[m] - beta if D[m] > beta else 0) / square
        G[m] = <real> (new - alpha[m])
        largest = max(largest, <double> (G[m] if G[m] > 0 else -G[m]))
    if largest <= 1e-12 * bound:
        return False
    for m in range(n):
        alpha[m] += G[m]
    return True


cdef inline void csr_outer_changed(const csr_int *indices, const CsrPass *p, Py_ssize_t start, Py_ssize_t stop,
                                   const real *change) noexcept nogil:
    """W += what one row's changes add to it, leaving out vectors of classes that have none: most rows change few."""
    cdef Py_ssize_t c = 0, m, tail
    cdef bint any_change
    while c < p.classes:
        tail = min(p.classes - c, <Py_ssize_t> LANES)
        any_change = False
        for m in range(c, c + tail):
            any_change = any_change or change[m] != 0
        if any_change:
            csr_outer(indices, p, start, stop, change, c, 1, tail)
        c += LANES


cdef inline double row_hinge(const real *scores, Py_ssize_t n, Py_ssize_t y, double margin) noexcept nogil:
    """max(0, the largest s_m + Δ - s_y of the wrong classes)."""
    cdef Py_ssize_t m
    cdef double largest = scores[y] - margin
    for m in range(n):
        if m != y: largest = max(largest, <double> scores[m])
    return largest + margin - scores[y]


cdef inline void dual_epoch_typed(const csr_int *indices, CsrPass *p, const int64_t *y, real *alpha, const real *bounds,
                                  const real *squares, double margin, double *D, real *scores, double *loss,
                                  double *growth) noexcept nogil:
    cdef const csr_int *starts = <const csr_int *> p.starts
    cdef Py_ssize_t i, k, m, row, line = 64 // sizeof(real), step = min(p.classes, 4 * line)
    cdef const real *w
    cdef double along, length
    for i in range(p.rows.size):
        if i + 2 < p.rows.size:  # rows come in no order that the processor could foresee
            row = csr_row_at(p, i + 2)
            k = starts[row]
            while k < starts[row + 1]:
                prefetch(p.values + k)
                prefetch(indices + k)
                k += 64 // sizeof(real) if sizeof(real) > sizeof(csr_int) else 64 // sizeof(csr_int)
        if i + 1 < p.rows.size:  # ask for what the next row needs: its weights come from a far cache
            row = csr_row_at(p, i + 1)
            for k in range(starts[row], starts[row + 1]):
                w = p.W + <Py_ssize_t> indices[k] * p.W_step
                prefetch(w)
                if step > line: prefetch(w + step - 1)
        row = csr_row_at(p, i)
        if bounds[row] > 0 and squares[row] > 0:
            csr_row(indices, p, starts[row], starts[row + 1], p.scores, False)
            loss[0] += bounds[row] * row_hinge(p.scores, p.classes, y[row], margin)
            for m in range(p.classes):
                scores[m] = p.scores[m]
            if best_alphas(p.scores, alpha + row * p.classes, p.classes, y[row], bounds[row], squares[row], margin, D):
                csr_outer_changed(indices, p, starts[row], starts[row + 1], p.scores)
                along, length = 0, 0  # ‖W + x δᵀ‖² = ‖W‖² + 2 s·δ + ‖x‖² ‖δ‖²
                for m in range(p.classes):
                    along += <double> scores[m] * p.scores[m]
                    length += <double> p.scores[m] * p.scores[m]
                growth[0] += 2 * along + squares[row] * length


def dual_epoch(values, indices, starts, rows, targets, bounds, squares, double margin, W, alpha):
    """Each of some rows of a CSR matrix in turn: alpha (N, C) at its best, W (D, C) with it; in place. The int64 `targets`,
    `bounds` C_i and `squares` ‖x_i‖² are for all rows. Returns Σ C_i ℓ_i of them, as each was found, and by how much
    ‖W‖² grew."""
    if not STORED_IS_REAL:
        raise TypeError("sparse features are float32 or float64")
    cdef _Loan loan = _Loan()
    cdef CsrPass p
    cdef Matrix weights = loan.matrix(W, True), a = loan.matrix(alpha, True)
    cdef const real *limits = loan.matrix(bounds, False).data
    cdef const real *lengths = loan.matrix(squares, False).data
    cdef const int64_t *y = <const int64_t *> loan.indices(targets).data
    cdef real *room
    cdef double *D
    cdef double loss = 0, growth = 0
    csr_borrow(loan, &p, values, indices, starts, starts, rows, 0, alpha, True)
    p.W, p.dW, p.W_step, p.below = weights.data, weights.data, weights.row_stride, -1
    room, D = <real *> malloc(3 * a.columns * sizeof(real) + 1), <double *> malloc(a.columns * sizeof(double) + 1)
    if room == NULL or D == NULL:
        free(room)
        free(D)
        raise MemoryError()
    memset(room, 0, a.columns * sizeof(real))
    p.bias, p.scores = room, room + a.columns
    with nogil:
        if p.kind == c"i":
            dual_epoch_typed(<const int32_t *> p.indices, &p, y, a.data, limits, lengths, margin, D,
                             room + 2 * a.columns, &loss, &growth)
        else:
            dual_epoch_typed(<const int64_t *> p.indices, &p, y, a.data, limits, lengths, margin, D,
                             room + 2 * a.columns, &loss, &growth)
        free(room)
        free(D)
    return loss, growth
