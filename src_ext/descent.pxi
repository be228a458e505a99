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
