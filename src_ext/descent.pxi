# The step of gradient descent with momentum, in one pass over weights, velocity and gradient.


cdef inline void descend_row(real *w, real *v, const real *g, Py_ssize_t n, Py_ssize_t w_stride, Py_ssize_t v_stride,
                             Py_ssize_t g_stride, real eta, real mu, real q) noexcept nogil:
    cdef Py_ssize_t j
    cdef real new
    for j in range(n):
        new = mu * v[j * v_stride] - eta * (g[j * g_stride] + q * w[j * w_stride])
        v[j * v_stride] = new
        w[j * w_stride] += new


def descend(W, velocity, grad, double step_size, double momentum, double decay, Py_ssize_t decayed):
    """In place on W and velocity: v ← μ v − η (g + q W), W ← W + v, all (C, D); q = 0 from column `decayed` on."""
    cdef _Loan loan = _Loan()
    cdef Matrix w = loan.matrix(W, True), v = loan.matrix(velocity, True), g = loan.matrix(grad, False)
    cdef real eta = <real> step_size, mu = <real> momentum, q = <real> decay
    cdef real *a
    cdef real *b
    cdef real *c
    cdef Py_ssize_t i, d = decayed, rest = w.columns - decayed
    cdef unsigned mode
    with nogil:
        mode = flush_to_zero()
        for i in range(w.rows):
            a, b, c = w.data + i * w.row_stride, v.data + i * v.row_stride, g.data + i * g.row_stride
            if w.column_stride == 1 and v.column_stride == 1 and g.column_stride == 1:
                descend_row(a, b, c, d, 1, 1, 1, eta, mu, q)
                descend_row(a + d, b + d, c + d, rest, 1, 1, 1, eta, mu, 0)
            else:
                descend_row(a, b, c, d, w.column_stride, v.column_stride, g.column_stride, eta, mu, q)
                descend_row(a + d * w.column_stride, b + d * v.column_stride, c + d * g.column_stride, rest,
                            w.column_stride, v.column_stride, g.column_stride, eta, mu, 0)
        restore_mode(mode)


# The quadratic penalty, in one pass over weights and gradient.

cdef enum:
    SHRINK_PIECE = 2048  # numbers of a row at a time
    SHRINK_BLOCK = 256  # squares that are added up in `real`, at most in as many sums as a vector has lanes

cdef struct ShrinkPass:
    Matrix W
    Matrix grad
    real q
    Py_ssize_t pieces, in_row, segment  # of all rows, of a row; pieces for each sum
    double total[SEGMENTS]


cdef inline double shrink_line(const real *w, real *g, Py_ssize_t n, real q) noexcept nogil:
    """g += q w; the sum of the squares of w."""
    cdef real lanes[LANES]
    cdef double total = 0
    cdef Py_ssize_t k = 0, stop = 0
    cdef int lane
    cdef vec x, factor = vset(q), sums
    while k < n:
        stop, sums = min(n, k + <Py_ssize_t> SHRINK_BLOCK), vset(0)
        while k + LANES <= stop:
            x = vload(w + k)
            sums = add(mul(x, x), sums)
            vstore(g + k, add(mul(factor, x), vload(g + k)))
            k += LANES
        if k < stop:
            x = vload_part(w + k, stop - k, 0)
            sums = add(mul(x, x), sums)
            vstore_part(g + k, add(mul(factor, x), vload_part(g + k, stop - k, 0)), stop - k)
            k = stop
        vstore(lanes, sums)
        for lane in range(LANES):
            total += lanes[lane]
    return total


cdef void shrink_segment(void *job, Py_ssize_t k, int thread) noexcept nogil:
    cdef ShrinkPass *p = <ShrinkPass *> job
    cdef Py_ssize_t i, j, n, piece
    cdef const real *w
    cdef real *g
    cdef double total = 0
    cdef unsigned mode = flush_to_zero()
    for piece in range(k * p.segment, min(p.pieces, (k + 1) * p.segment)):
        i, j = piece // p.in_row, piece % p.in_row * SHRINK_PIECE
        n = min(<Py_ssize_t> SHRINK_PIECE, p.W.columns - j)
        w = p.W.data + i * p.W.row_stride + j * p.W.column_stride
        g = p.grad.data + i * p.grad.row_stride + j * p.grad.column_stride
        if p.W.column_stride == 1 and p.grad.column_stride == 1:
            total += shrink_line(w, g, n, p.q)
        else:
            for j in range(n):
                total += <double> w[j * p.W.column_stride] * w[j * p.W.column_stride]
                g[j * p.grad.column_stride] += p.q * w[j * p.W.column_stride]
    p.total[k] = total
    restore_mode(mode)


cdef inline void turn(Matrix *m) noexcept nogil:
    m.rows, m.columns, m.row_stride, m.column_stride = m.columns, m.rows, m.column_stride, m.row_stride


def shrink(W, grad, double q, int n_threads):
    """grad += q W, both (C, D); the sum of the squares of W."""
    if not STORED_IS_REAL:
        raise TypeError("weights are float32 or float64")
    cdef _Loan loan = _Loan()
    cdef ShrinkPass p
    cdef Py_ssize_t segments
    cdef double total = 0
    p.W, p.grad, p.q = loan.matrix(W, False), loan.matrix(grad, True), <real> q
    if p.W.row_stride == 1 and p.grad.row_stride == 1:
        turn(&p.W)
        turn(&p.grad)
    if p.W.row_stride == p.W.columns and p.grad.row_stride == p.W.columns and p.W.column_stride == p.grad.column_stride == 1:
        p.W.columns, p.W.rows = p.W.columns * p.W.rows, 1
    p.in_row = (p.W.columns + SHRINK_PIECE - 1) // SHRINK_PIECE
    p.pieces = p.in_row * p.W.rows
    p.segment = max((p.pieces + SEGMENTS - 1) // SEGMENTS, <Py_ssize_t> 1)
    segments = (p.pieces + p.segment - 1) // p.segment
    with nogil:
        share(shrink_segment, &p, segments,
              useful_threads(n_threads, segments, 1, <double> p.W.rows * p.W.columns, 2 * THREAD_WORK))
    for k in range(segments):
        total += p.total[k]
    return total
