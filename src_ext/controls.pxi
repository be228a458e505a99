# What the machine can do at most: the controls that benchmarks compare with. Nothing else uses them.
#
# Each thread has a contiguous part of the arrays and goes over it `repeats` times, so that waking it costs little:
#   copy, stream    target = source, with plain stores, and with stores that go past the caches
#   pass            target *= source[0], in place
#   read            every vector of the source, added up
#   exp, log        the kernels' own functions of the source, added up; the source is to fit into the cache
#   multiply-add    12 chains of them in registers, 4096 steps each, of source[0] and source[1]
#   transpose       target = source, matrices, by transposed tiles of 16 rows, as few classes are handled

cdef enum Control:
    COPY, STREAM, PASS, READ, EXP, LOG, MULTIPLY_ADD, TRANSPOSE

CONTROLS = ("copy", "stream", "pass", "read", "exp", "log", "multiply-add", "transpose")


cdef inline vec multiply_add_chains(vec x, vec y) noexcept nogil:
    cdef vec a = vset(0), b = vset(1), c = vset(2), d = vset(3), e = vset(4), f = vset(5)
    cdef vec g = vset(6), h = vset(7), i = vset(8), j = vset(9), k = vset(10), m = vset(11)
    for _ in range(4096):
        a, b, c = add(mul(a, x), y), add(mul(b, x), y), add(mul(c, x), y)
        d, e, f = add(mul(d, x), y), add(mul(e, x), y), add(mul(f, x), y)
        g, h, i = add(mul(g, x), y), add(mul(h, x), y), add(mul(i, x), y)
        j, k, m = add(mul(j, x), y), add(mul(k, x), y), add(mul(m, x), y)
    return add(add(add(a, b), add(c, d)), add(add(add(e, f), add(g, h)), add(add(i, j), add(k, m))))


cdef inline vec control_pass(Control what, const real *p, real *q, Py_ssize_t n, vec factor) noexcept nogil:
    """Once over n vectors; `what` is a constant here."""
    cdef vec a = vset(0), b = vset(0), c = vset(0), d = vset(0), rest
    cdef Py_ssize_t k, whole = n // 4 * 4 if what == READ else 0
    for k in range(0, whole, 4):  # four sums: one would be a chain of waiting additions
        a, b = add(a, vload(p + k * LANES)), add(b, vload(p + (k + 1) * LANES))
        c, d = add(c, vload(p + (k + 2) * LANES)), add(d, vload(p + (k + 3) * LANES))
    for k in range(whole, n):
        if what == COPY: vstore(q + k * LANES, vload(p + k * LANES))
        elif what == STREAM: vstream(q + k * LANES, vload(p + k * LANES))
        elif what == PASS: vstore(q + k * LANES, mul(vload(q + k * LANES), factor))
        elif what == READ: a = add(a, vload(p + k * LANES))
        elif what == EXP: a = add(a, raised_exp(vload(p + k * LANES), c))
        else: a = add(a, vlog(vload(p + k * LANES), c, c, &rest))
    if what == STREAM:
        streamed()
    return add(add(a, b), add(c, d))


cdef void control_part(Control what, const real *p, real *q, Py_ssize_t n, Py_ssize_t repeats, vec factor, vec summand,
                       real *last) noexcept nogil:
    cdef vec result
    for _ in range(repeats):
        if what == COPY: result = control_pass(COPY, p, q, n, factor)
        elif what == STREAM: result = control_pass(STREAM, p, q, n, factor)
        elif what == PASS: result = control_pass(PASS, p, q, n, factor)
        elif what == READ: result = control_pass(READ, p, q, n, factor)
        elif what == EXP: result = control_pass(EXP, p, q, n, factor)
        elif what == LOG: result = control_pass(LOG, p, q, n, factor)
        else: result = multiply_add_chains(factor, summand)
        vstore(last, result)  # within the loop: each repetition counts


cdef void transpose_part(const Matrix *s, const Matrix *t, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t repeats,
                         real *tile) noexcept nogil:
    cdef Py_ssize_t k
    for _ in range(repeats):
        for k in range((stop - start) // TILE):
            load_tile(s, start + k * TILE, TILE, tile)
            store_tile(t, start + k * TILE, TILE, tile)


cdef Py_ssize_t transposes(_Loan loan, source, target, Py_ssize_t repeats, int n_threads) except -1:
    cdef Matrix s = loan.scores(source, False), t = loan.scores(target, True)
    cdef Py_ssize_t n = s.rows // TILE // max(1, n_threads) * TILE, k
    cdef real tiles[8 * 32 * TILE]
    if s.rows != t.rows or s.columns != t.columns or s.columns > 32 or not 1 <= n_threads <= 8:
        raise ValueError("source and target must have the same shape, at most 32 columns; n_threads is from 1 to 8")
    with nogil:
        for k in prange(n_threads, schedule="static", num_threads=n_threads):
            transpose_part(&s, &t, k * n, (k + 1) * n, repeats, &tiles[k * 32 * TILE])
    return n * n_threads * s.columns * repeats


def control(kind, source, target, Py_ssize_t repeats, int n_threads):
    """Do it; the number of multiply-adds done, or of numbers gone over, by all threads and repetitions.

    source and target are contiguous, of equal length, and begin at a multiple of 64 bytes; for "transpose" any matrices.
    Each thread takes as many whole vectors, or tiles; the rest is left out.
    """
    cdef _Loan loan = _Loan()
    cdef Control what = CONTROLS.index(kind)
    cdef Matrix s, t
    cdef Py_ssize_t n, k
    cdef real last[64 * 32]
    if what == TRANSPOSE:
        return transposes(loan, source, target, repeats, n_threads)
    s, t = loan.matrix(source, False), loan.matrix(target, True)
    n = s.columns // LANES // max(1, n_threads)
    if s.columns != t.columns or s.columns < 2 or <size_t> s.data % 64 or <size_t> t.data % 64:
        raise ValueError("source and target must be of equal length, at least 2, and begin at a multiple of 64 bytes")
    if not 1 <= n_threads <= 64:
        raise ValueError(f"n_threads is {n_threads}; it must be from 1 to 64")
    with nogil:
        for k in prange(n_threads, schedule="static", num_threads=n_threads):
            control_part(what, s.data + k * n * LANES, t.data + k * n * LANES, n, repeats,
                         vset(s.data[0]), vset(s.data[1]), &last[32 * k])
    return (4096 * 12 if what == MULTIPLY_ADD else n) * LANES * n_threads * repeats
