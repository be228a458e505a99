# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True, auto_pickle=False
"""The kernels: one pass over tiles of rows. This module exists once for each float type and instruction-set level.

A tile of TILE rows goes through three rooms, none of which knows the others:

    producer      features.pxi   rows of features → tile of scores;  scores.pxi  given scores → tile
    row loss      losses.pxi     tile of scores and targets → row losses, and the gradient in place
    accumulator   features.pxi   tile of gradients and features → dW, db;  scores.pxi  tile → gradient array

This file owns what is common: the borrowed arrays, targets, row multipliers, segments and threads. Rows are split into
segments whose size depends on the shape alone; a segment's sums are its own and are added in the order of segments.
Results therefore have the same bits for any number of threads.
"""
cimport cython
from cpython.buffer cimport (
    PyBUF_FORMAT, PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
)
from cython.parallel cimport prange
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

cdef extern from "simd.h" nogil:
    ctypedef float real
    ctypedef float stored
    ctypedef int lane_int
    ctypedef struct vec:
        pass
    ctypedef struct ivec:
        pass
    ctypedef struct mask:
        pass
    const int LANES, VBYTES, TILE, TABLE, ROWS, DOT_BLOCK, OUTER_BLOCK
    const bint STORED_IS_REAL, ARE_SCORES, MANY_FORMS
    const char STORED_FORMAT
    vec vload(const real *) noexcept
    void vstore(real *, vec) noexcept
    vec vload_part(const real *, Py_ssize_t, real) noexcept
    void vstore_part(real *, vec, Py_ssize_t) noexcept
    vec vset(real) noexcept
    vec sload(const stored *) noexcept
    vec sload_part(const stored *, Py_ssize_t, real) noexcept
    void sstore(stored *, vec) noexcept
    void sstore_part(stored *, vec, Py_ssize_t) noexcept
    real sone(const stored *) noexcept
    void sstore_one(stored *, real) noexcept
    ivec iload(const lane_int *) noexcept
    void istore(lane_int *, ivec) noexcept
    ivec iset(lane_int) noexcept
    ivec iota() noexcept
    mask vlt(vec, vec) noexcept
    mask vle(vec, vec) noexcept
    mask veq(vec, vec) noexcept
    mask ieq(ivec, ivec) noexcept
    mask ige(ivec, ivec) noexcept
    mask mor(mask, mask) noexcept
    mask mandnot(mask, mask) noexcept
    bint all_lanes(mask) noexcept
    bint none_of(mask) noexcept
    uint64_t bits_of(mask) noexcept
    int first_bit(uint64_t) noexcept
    int count_bits(uint64_t) noexcept
    mask first_bits(Py_ssize_t) noexcept
    mask above_of(mask, vec, vec) noexcept
    mask equal_of(mask, vec, vec) noexcept
    mask unordered_of(mask, vec, vec) noexcept
    mask differ_of(mask, ivec, ivec) noexcept
    vec max_of(mask, vec, vec) noexcept
    vec numbers_of(ivec) noexcept
    mask unordered(vec, vec) noexcept
    vec choose(mask, vec, vec) noexcept
    ivec ichoose(mask, ivec, ivec) noexcept
    vec add_unless(mask, vec, vec) noexcept
    vec add_product_unless(mask, vec, vec, vec) noexcept
    vec vabs(vec) noexcept
    vec with_sign(vec, vec) noexcept
    vec add_where(mask, vec, vec) noexcept
    vec vmax(vec, vec) noexcept
    vec vmin(vec, vec) noexcept
    vec join_bits(vec, vec) noexcept
    bint all_below_2(vec) noexcept
    ivec imin(ivec, ivec) noexcept
    ivec imax(ivec, ivec) noexcept
    ivec quotients(ivec, lane_int) noexcept
    ivec size_bits(vec) noexcept
    const real REAL_MAX, REAL_EPS, FL_NEAR, RAISED, RAISED_BITS, NEAR_TANH
    const double FL_LN2, FL_LN2_HIGH, FL_LN2_LOW, FL_ROUND
    vec nearest_steps(vec) noexcept
    vec round_to_step(vec) noexcept
    vec vexp2(vec, vec) noexcept
    vec less_steps(vec, vec) noexcept
    vec less_powers(vec, vec *) noexcept
    ctypedef struct Steps:
        real per_step, high, low, unit
    Steps plain_steps() noexcept
    Steps steps_of(double) noexcept
    vec usual_exp(bint, Steps, vec, vec) noexcept
    vec any_exp(bint, Steps, vec, vec) noexcept
    vec raised_exp(vec, vec) noexcept
    vec expm1_in_step(vec) noexcept
    vec vexp(vec, vec) noexcept
    vec vlog(vec, vec, vec, vec *) noexcept
    vec vlog1p(vec) noexcept
    vec log_in_full(vec, vec, vec) noexcept
    void one_by_one() noexcept
    vec reciprocal(vec) noexcept
    vec vtanh(vec, vec *) noexcept
    vec tanh_near(vec) noexcept
    vec tanh_of_steps(vec, vec, vec *) noexcept
    const int BENDS
    const double *fl_bends
    vec odd_polynomial(const real *, int, vec) noexcept
    vec less_product(vec, vec, vec) noexcept
    vec product_less(vec, vec, vec) noexcept
    vec rest_of_quotient(vec, vec, vec) noexcept
    vec exact_sum(vec, vec, vec *) noexcept
    vec add_square(vec, vec, vec *) noexcept
    real first_lane(vec) noexcept
    lane_int ifirst(ivec) noexcept
    lane_int lane_least(ivec) noexcept
    vec look_up(vec, ivec) noexcept
    ivec ilook_up(ivec, ivec) noexcept
    ivec bit_counts(const char *, int, int) noexcept
    ivec entries(ivec) noexcept
    real lane_greatest(vec) noexcept
    vec transposed_sum(const vec *) noexcept
    void sums_over_vectors(int, const real *, Py_ssize_t, Py_ssize_t, vec *) noexcept
    vec transposed_sum_in_full(const vec *, vec *) noexcept
    vec near_exact_transposed_sum(const vec *, vec *) noexcept
    vec transposed_max(const vec *) noexcept
    void split_rows(int c, vec *r) noexcept
    void join_rows(int c, vec *r) noexcept
    vec exact_transposed_sum(const vec *, const vec *, vec *) noexcept
    void gather_columns(const stored *, Py_ssize_t, Py_ssize_t, Py_ssize_t, real *) noexcept
    void scatter_columns(stored *, Py_ssize_t, Py_ssize_t, Py_ssize_t, const real *) noexcept
    void gather_rows(const real **, Py_ssize_t, Py_ssize_t, real *) noexcept
    const int GROUP, AHEAD
    ctypedef struct Ahead:
        const stored **rows
        Py_ssize_t at, step
    vec fold_groups(const vec *) noexcept
    void dot_panel(int, int, const stored **, const stored **, Py_ssize_t, Py_ssize_t, const real *, const real *, vec *,
                   bint, const Ahead *) noexcept
    void outer_panel(int, bint, int, const stored **, Py_ssize_t, const real *, const real *, Py_ssize_t, real *, bint,
                     const Ahead *) noexcept
    void add_products(double *, const real *, const real *) noexcept
    void vstream(real *, vec) noexcept
    void streamed() noexcept
    void stream_bytes(char *, const char *, Py_ssize_t) noexcept
    void prefetch(const void *) noexcept
    void prefetch_to_write(const void *) noexcept
    unsigned flush_to_zero() noexcept
    void restore_mode(unsigned) noexcept
    bint is_likely "__builtin_expect" (bint, int) noexcept
    # Arithmetic on vectors is C's.
    vec add "FL_ADD" (vec, vec) noexcept
    vec sub "FL_SUB" (vec, vec) noexcept
    vec mul "FL_MUL" (vec, vec) noexcept
    vec div "FL_DIV" (vec, vec) noexcept
    ivec iadd "FL_ADD" (ivec, ivec) noexcept
    ivec imul "FL_MUL" (ivec, ivec) noexcept

cdef extern from *:
    """
    #define FL_ADD(a, b) ((a) + (b))
    #define FL_SUB(a, b) ((a) - (b))
    #define FL_MUL(a, b) ((a) * (b))
    #define FL_DIV(a, b) ((a) / (b))
    #include <sched.h>
    #ifdef _OPENMP
    #include <omp.h>
    #define FASTLOSS_OPENMP 1
    #define team_size() omp_get_num_threads()
    #else
    #define FASTLOSS_OPENMP 0
    #define team_size() 1
    #endif
    #define take_one(count) __atomic_fetch_add(count, 1, __ATOMIC_RELAXED)
    #define look_at(count) __atomic_load_n(count, __ATOMIC_RELAXED)
    #ifdef __linux__
    static int this_cpu(void) { return sched_getcpu(); }
    /* Have this thread moved to another CPU that it may use, if there is one. */
    static void leave_cpu(int cpu) {
        cpu_set_t all, others;
        if (sched_getaffinity(0, sizeof all, &all) != 0) return;
        others = all;
        CPU_CLR(cpu, &others);
        if (CPU_COUNT(&others) == 0) return;
        sched_setaffinity(0, sizeof others, &others);
        sched_setaffinity(0, sizeof all, &all);
    }
    #else
    static int this_cpu(void) { return -1; }
    static void leave_cpu(int cpu) { (void) cpu; }
    #endif
    """
    const int FASTLOSS_OPENMP
    int team_size() noexcept nogil
    Py_ssize_t take_one(Py_ssize_t *) noexcept nogil
    Py_ssize_t look_at(Py_ssize_t *) noexcept nogil
    int sched_yield() noexcept nogil
    int this_cpu() noexcept nogil
    void leave_cpu(int) noexcept nogil

cdef extern from "math.h" nogil:
    const double NAN, INFINITY

cdef enum:
    SEGMENTS = 64  # at most; what bounds the threads that can share a call
    SEGMENT_WORK = 8192  # scores in a segment, at least: a few microseconds
    # What pays for a thread: a parallel region costs 1 to 4 µs, and the caches of two cores exchange lines. Measured on
    # two cores, value alone and gradient: with hinge two threads win from 15,000 (C = 2), 50,000 (10) and 130,000 (1000)
    # scores on, with exponentials from half of that; the linear pass from 10 to 15 µs on. So a row counts for some
    # scores or products more than it has.
    THREAD_WORK = 65536  # float32 hinge scores for each thread, at least; float64 takes twice as long
    ROW_WORK = 24
    EXP_WORK = 2  # hinge scores that a score with its exponential counts for
    THREAD_PRODUCTS = 1 << 18  # multiplications for each thread, at least
    ROW_PRODUCTS = 512
    THREAD_CHECKS = 32768  # indices for each thread, at least
    THREAD_WEIGHTS = 8192  # row multipliers for each thread, at least

OPENMP = bool(FASTLOSS_OPENMP)
VECTOR_BYTES = LANES * sizeof(real)

ctypedef fused integer:
    int8_t
    int16_t
    int32_t
    int64_t
    uint8_t
    uint16_t
    uint32_t
    uint64_t


# --- borrowed arrays -----------------------------------------------------------------------------------------------
cdef struct Matrix:
    real *data  # one of both: numbers computed with,
    stored *raw  # or scores as they are stored
    Py_ssize_t rows, columns, row_stride, column_stride  # strides in numbers


cdef struct Indices:
    char *data
    Py_ssize_t size, stride  # in bytes
    char kind  # as in the buffer protocol's format; 0 for none


@cython.final
@cython.freelist(8)
cdef class _Loan:
    """Buffers borrowed for one call and given back at its end."""
    cdef Py_buffer views[12]
    cdef int used

    def __cinit__(self):
        self.used = 0

    def __dealloc__(self):
        for k in range(self.used):
            PyBuffer_Release(&self.views[k])

    cdef Py_buffer *borrow(self, object array, bint write) except NULL:
        """The array's buffer; to be read, that of a copy where its numbers are not aligned: kernels read whole ones."""
        cdef Py_buffer *view = &self.views[self.used]
        PyObject_GetBuffer(array, view, PyBUF_STRIDES | PyBUF_FORMAT | (PyBUF_WRITABLE if write else 0))
        if view.format[0] == c"=" and not write:  # NumPy's format of numbers that are not aligned
            PyBuffer_Release(view)
            PyObject_GetBuffer(array.copy(), view, PyBUF_STRIDES | PyBUF_FORMAT)
        self.used += 1
        return view

    cdef Matrix matrix(self, object array, bint write) except *:
        """A matrix, or a vector as one row, of `real`; data is NULL for None."""
        cdef Matrix m = self.numbers(array, write, sizeof(real), c"f" if sizeof(real) == 4 else c"d")
        m.data, m.raw = <real *> m.raw, NULL
        return m

    cdef Matrix scores(self, object array, bint write) except *:
        """A matrix of `stored`; raw is NULL for None."""
        return self.numbers(array, write, sizeof(stored), STORED_FORMAT)

    cdef Matrix numbers(self, object array, bint write, Py_ssize_t size, char form) except *:
        cdef Matrix m
        cdef Py_buffer *view
        memset(&m, 0, sizeof(m))
        if array is None:
            return m
        view = self.borrow(array, write)
        if view.itemsize != size or view.format[0] != form:
            raise TypeError("array of another type than the kernel's")
        m.raw = <stored *> view.buf
        m.columns, m.column_stride = view.shape[view.ndim - 1], view.strides[view.ndim - 1] // size
        m.rows = view.shape[0] if view.ndim == 2 else 1
        m.row_stride = view.strides[0] // size if view.ndim == 2 else 0
        return m

    cdef Indices indices(self, object array) except *:
        cdef Indices found
        cdef Py_buffer *view
        found.data, found.size, found.stride, found.kind = NULL, 0, 0, 0
        if array is None:
            return found
        view = self.borrow(array, False)
        found.data, found.size, found.stride = <char *> view.buf, view.shape[0], view.strides[0]
        found.kind = view.format[0]
        if found.kind == c"l":  # C's long is of either size
            found.kind = c"q" if view.itemsize == 8 else c"i"
        elif found.kind == c"L":
            found.kind = c"Q" if view.itemsize == 8 else c"I"
        if found.kind not in (c"b", c"h", c"i", c"q", c"B", c"H", c"I", c"Q"):
            raise TypeError(f"indices of the buffer format {view.format}")
        return found


# --- targets and other indices -------------------------------------------------------------------------------------
cdef inline Py_ssize_t outside_typed(integer *p, Py_ssize_t stride, Py_ssize_t n, uint64_t stop, bint ignores,
                                     int64_t ignored) noexcept nogil:
    cdef integer beside[1024]
    cdef integer *block
    cdef Py_ssize_t i, k, size
    cdef bint bad
    for i in range(0, n, 1024):  # by blocks, so that the test vectorises and the position is found afterwards
        size, block, bad = min(1024, n - i), p + i, False
        if stride != sizeof(integer):
            block = beside
            for k in range(size):
                block[k] = (<integer *> (<char *> p + (i + k) * stride))[0]
        if ignores:
            for k in range(size):
                bad |= (<uint64_t> <int64_t> block[k] >= stop) & (<int64_t> block[k] != ignored)
        else:
            for k in range(size):
                bad |= <uint64_t> <int64_t> block[k] >= stop
        if bad:
            for k in range(size):
                if <uint64_t> <int64_t> block[k] >= stop and not (ignores and <int64_t> block[k] == ignored):
                    return i + k
    return -1


cdef inline void convert_typed(integer *p, Py_ssize_t stride, int n, lane_int *to) noexcept nogil:
    cdef int k, whole = n // TILE * TILE if stride == sizeof(integer) else 0
    for k in range(whole):  # by whole tiles, so that it vectorises without a rest
        to[k] = <lane_int> p[k]
    for k in range(whole, n):
        to[k] = <lane_int> (<integer *> (<char *> p + k * stride))[0]


cdef Py_ssize_t outside(const Indices *a, uint64_t stop, bint ignores, int64_t ignored) noexcept nogil:
    """Position of the first index outside [0, stop) that is not ignored; -1 if there is none."""
    if a.kind == c"q": return outside_typed(<int64_t *> a.data, a.stride, a.size, stop, ignores, ignored)
    if a.kind == c"i": return outside_typed(<int32_t *> a.data, a.stride, a.size, stop, ignores, ignored)
    if a.kind == c"h": return outside_typed(<int16_t *> a.data, a.stride, a.size, stop, ignores, ignored)
    if a.kind == c"b": return outside_typed(<int8_t *> a.data, a.stride, a.size, stop, ignores, ignored)
    if a.kind == c"Q": return outside_typed(<uint64_t *> a.data, a.stride, a.size, stop, ignores, ignored)
    if a.kind == c"I": return outside_typed(<uint32_t *> a.data, a.stride, a.size, stop, ignores, ignored)
    if a.kind == c"H": return outside_typed(<uint16_t *> a.data, a.stride, a.size, stop, ignores, ignored)
    return outside_typed(<uint8_t *> a.data, a.stride, a.size, stop, ignores, ignored)


cdef void convert(const Indices *a, Py_ssize_t at, int n, lane_int *to) noexcept nogil:
    """n indices from position `at` on, as lanes."""
    cdef char *p = a.data + at * a.stride
    if a.kind == 0: return  # transforms have no targets
    if a.kind == c"q": convert_typed(<int64_t *> p, a.stride, n, to)
    elif a.kind == c"i": convert_typed(<int32_t *> p, a.stride, n, to)
    elif a.kind == c"h": convert_typed(<int16_t *> p, a.stride, n, to)
    elif a.kind == c"b": convert_typed(<int8_t *> p, a.stride, n, to)
    elif a.kind == c"Q": convert_typed(<uint64_t *> p, a.stride, n, to)
    elif a.kind == c"I": convert_typed(<uint32_t *> p, a.stride, n, to)
    elif a.kind == c"H": convert_typed(<uint16_t *> p, a.stride, n, to)
    else: convert_typed(<uint8_t *> p, a.stride, n, to)


cdef inline Py_ssize_t row_index(const Indices *a, Py_ssize_t at) noexcept nogil:
    """One index as it is; rows of X are not bounded by a lane's range."""
    cdef char *p = a.data + at * a.stride
    if a.kind == c"q": return (<int64_t *> p)[0]
    if a.kind == c"i": return (<int32_t *> p)[0]
    if a.kind == c"h": return (<int16_t *> p)[0]
    if a.kind == c"b": return (<int8_t *> p)[0]
    if a.kind == c"Q": return <Py_ssize_t> (<uint64_t *> p)[0]
    if a.kind == c"I": return (<uint32_t *> p)[0]
    if a.kind == c"H": return (<uint16_t *> p)[0]
    return (<uint8_t *> p)[0]


# --- segments and threads ------------------------------------------------------------------------------------------
cdef Py_ssize_t segment_rows(Py_ssize_t n, Py_ssize_t row_work, Py_ssize_t multiple) noexcept nogil:
    """Rows of a segment: from the shape alone; a multiple of `multiple`."""
    cdef Py_ssize_t rows = max((n + SEGMENTS - 1) // SEGMENTS, (SEGMENT_WORK + row_work - 1) // row_work)
    return (rows + multiple - 1) // multiple * multiple


cdef int useful_threads(int n_threads, Py_ssize_t n, Py_ssize_t segment, double work, double thread_work) noexcept nogil:
    """Threads for n rows: a last segment of less than half its rows is no work for another."""
    cdef double most = min(<double> ((n + segment // 2) // segment), work / thread_work)
    return <int> max(1.0, min(<double> n_threads, most))


ctypedef void (*Piece)(void *job, Py_ssize_t k, int thread) noexcept nogil

cdef struct Part:
    Py_ssize_t next, stop
    char line[48]  # a cache line for each, as different threads write to them


cdef void take_pieces(Piece f, void *job, Part *parts, int n, int thread, int cpu, Py_ssize_t *present) noexcept nogil:
    """What one thread does; `cpu` is the caller's."""
    cdef Py_ssize_t k
    cdef int i
    cdef Part *part
    if thread > 0 and cpu >= 0 and this_cpu() == cpu:
        leave_cpu(cpu)
    take_one(present)
    for i in range(n):
        part = &parts[(thread + i) % n]
        k = take_one(&part.next)
        while k < part.stop:
            f(job, k, thread)
            k = take_one(&part.next)
    if thread == 0:
        for i in range(1000):
            if look_at(present) >= team_size():
                break
            sched_yield()


cdef void share(Piece f, void *job, Py_ssize_t pieces, int n_threads) noexcept nogil:
    """f(job, k, thread) for all pieces k, on several threads.

    Each thread has a part of its own, the same from call to call, so that what it read or wrote last time is still in
    the cache of its core (in-cache gradients: 1.95 times faster on two threads, against 1.4 to 1.9 where any thread
    takes the next piece). Who is done takes from the others' parts.

    Linux may wake a sleeping thread on the caller's own CPU. There they would wait for each other in OpenMP's busy
    loops, until the system moves one of them (8 ms on two CPUs, at every call after a pause). So such a thread moves
    away, and the caller, when all is taken, lets others run until all have come.
    """
    cdef Part parts[SEGMENTS]
    cdef Py_ssize_t present = 0, k
    cdef int t, cpu, n = <int> min(<Py_ssize_t> n_threads, min(pieces, <Py_ssize_t> SEGMENTS))
    if n <= 1:  # a parallel region of one thread would cost 0.6 µs, a third of a small call
        for k in range(pieces):
            f(job, k, 0)
        return
    for t in range(n):
        parts[t].next, parts[t].stop = pieces * t // n, pieces * (t + 1) // n
    cpu = this_cpu()
    for t in prange(n, schedule="static", chunksize=1, num_threads=n):
        take_pieces(f, job, parts, n, t, cpu, &present)


cdef struct CheckPass:
    Indices indices
    uint64_t stop
    bint ignores
    int64_t ignored
    Py_ssize_t segment
    Py_ssize_t found[SEGMENTS]


cdef void check_segment(void *job, Py_ssize_t k, int thread) noexcept nogil:
    cdef CheckPass *p = <CheckPass *> job
    cdef Indices part = p.indices
    part.data += k * p.segment * part.stride
    part.size = min(p.segment, part.size - k * p.segment)
    p.found[k] = outside(&part, p.stop, p.ignores, p.ignored)


cdef int ignored_in(Indices *indices, ignored, bint *ignores, int64_t *value) except -1:
    """`ignored` (None: nothing is) as the kernels compare with it."""
    ignores[0], value[0] = ignored is not None, 0
    if ignores[0]:
        if (0 <= ignored < 1 << 64) if indices.kind == c"Q" else (-(1 << 63) <= ignored < 1 << 63):
            value[0] = <int64_t> <uint64_t> (ignored & ((1 << 64) - 1))
        else:
            ignores[0] = False  # no index of this type can be it
    return 0


def first_outside(indices, Py_ssize_t stop, ignored, int n_threads=1):
    """The position of the first index outside [0, stop) that is not `ignored` (None: no such exception), or -1."""
    cdef _Loan loan = _Loan()
    cdef CheckPass p
    cdef Py_ssize_t k, segments
    p.indices, p.stop = loan.indices(indices), <uint64_t> stop
    ignored_in(&p.indices, ignored, &p.ignores, &p.ignored)
    if p.indices.size <= SEGMENT_WORK:
        return outside(&p.indices, p.stop, p.ignores, p.ignored)
    p.segment = max((p.indices.size + SEGMENTS - 1) // SEGMENTS, <Py_ssize_t> SEGMENT_WORK)
    segments = (p.indices.size + p.segment - 1) // p.segment
    with nogil:
        n_threads = useful_threads(n_threads, p.indices.size, p.segment, <double> p.indices.size, THREAD_CHECKS)
        share(check_segment, &p, segments, n_threads)
    for k in range(segments):
        if p.found[k] >= 0:
            return k * p.segment + p.found[k]
    return -1


cdef struct UnfitPass:
    const real *numbers
    real most
    Py_ssize_t size, segment
    Py_ssize_t found[SEGMENTS]


cdef Py_ssize_t unfit_of(const real *p, Py_ssize_t n, real most) noexcept nogil:
    """The position of the first of n numbers that is not in [0, most]; or -1."""
    cdef Py_ssize_t start, last, i, v
    cdef vec seen, x, top
    for start in range(0, n, 1024):  # by blocks, so that the position is found afterwards
        last, seen, top = min(n, start + 1024), vset(0), vset(0)
        for v in range((last - start) // LANES):
            x = vload(p + start + v * LANES)
            seen, top = join_bits(seen, x), vmax(top, x)
        i = last - (last - start) % LANES
        if i < last:
            x = vload_part(p + i, last - i, 0)
            seen, top = join_bits(seen, x), vmax(top, x)
        if all_below_2(seen) and all_lanes(vle(top, vset(most))):  # as probabilities are
            continue
        for i in range(start, last):
            if not 0 <= p[i] <= most:
                return i
    return -1


cdef void unfit_segment(void *job, Py_ssize_t k, int thread) noexcept nogil:
    cdef UnfitPass *p = <UnfitPass *> job
    cdef Py_ssize_t start = k * p.segment, found = unfit_of(p.numbers + start, min(p.segment, p.size - start), p.most)
    p.found[k] = start + found if found >= 0 else -1


def first_unfit(numbers, double most, int n_threads):
    """The position of the first of some numbers, contiguous, that is not finite, or not in [0, most]; or -1."""
    cdef _Loan loan = _Loan()
    cdef UnfitPass p
    cdef Matrix m = loan.matrix(numbers, False)
    cdef Py_ssize_t k, segments
    p.numbers, p.size = m.data, m.columns
    p.most = <real> min(most, <double> REAL_MAX)
    p.segment = max((p.size + SEGMENTS - 1) // SEGMENTS, <Py_ssize_t> SEGMENT_WORK)
    segments = (p.size + p.segment - 1) // p.segment
    with nogil:
        share(unfit_segment, &p, segments, useful_threads(n_threads, p.size, p.segment, <double> p.size, THREAD_WORK))
    for k in range(segments):
        if p.found[k] >= 0:
            return p.found[k]
    return -1


# --- row multipliers -----------------------------------------------------------------------------------------------
cdef struct WeighPass:
    Indices targets
    const double *class_weight
    const double *sample_weight
    Py_ssize_t class_step, sample_step
    bint ignores
    int64_t ignored
    real *to
    Py_ssize_t segment
    double total[SEGMENTS]
    double top[SEGMENTS]


cdef inline void weigh_typed(integer *p, WeighPass *w, Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t i, start = k * w.segment, stop = min(w.targets.size, start + w.segment)
    cdef int64_t y
    cdef double weight, total = 0, top = 0
    for i in range(start, stop):
        weight = w.sample_weight[i * w.sample_step] if w.sample_weight != NULL else 1
        y = <int64_t> (<integer *> (<char *> p + i * w.targets.stride))[0] if p != NULL else 0
        if w.ignores and y == w.ignored:
            weight = 0
        elif w.class_weight != NULL:
            weight = weight * w.class_weight[y * w.class_step] if weight != 0 else 0
        w.to[i] = <real> weight
        total += w.to[i]
        top = max(top, weight)
    w.total[k], w.top[k] = total, top


cdef void weigh_segment(void *job, Py_ssize_t k, int thread) noexcept nogil:
    cdef WeighPass *w = <WeighPass *> job
    cdef char kind = w.targets.kind
    cdef char *p = w.targets.data
    if kind == c"q": weigh_typed(<int64_t *> p, w, k)
    elif kind == c"i": weigh_typed(<int32_t *> p, w, k)
    elif kind == c"h": weigh_typed(<int16_t *> p, w, k)
    elif kind == c"b": weigh_typed(<int8_t *> p, w, k)
    elif kind == c"Q": weigh_typed(<uint64_t *> p, w, k)
    elif kind == c"I": weigh_typed(<uint32_t *> p, w, k)
    elif kind == c"H": weigh_typed(<uint16_t *> p, w, k)
    else: weigh_typed(<uint8_t *> p, w, k)


def weigh(targets, class_weight, ignored, sample_weight, multiplier, int n_threads):
    """Into `multiplier`: sample weight times the weight of the target's class (float64 both, or None), 0 where the target is
    `ignored`; targets may be None where neither is asked for. Returns the largest before it was rounded, and the sum of the
    rounded."""
    cdef _Loan loan = _Loan()
    cdef WeighPass w
    cdef Matrix m
    cdef Py_ssize_t k, segments
    cdef double top = 0, total = 0
    w.targets = loan.indices(targets)
    ignored_in(&w.targets, ignored, &w.ignores, &w.ignored)
    m = loan.numbers(class_weight, False, sizeof(double), c"d")
    w.class_weight, w.class_step = <const double *> <void *> m.raw, m.column_stride
    m = loan.numbers(sample_weight, False, sizeof(double), c"d")
    w.sample_weight, w.sample_step = <const double *> <void *> m.raw, m.column_stride
    m = loan.matrix(multiplier, True)
    w.to, w.targets.size = m.data, m.columns
    w.segment = max((w.targets.size + SEGMENTS - 1) // SEGMENTS, <Py_ssize_t> SEGMENT_WORK)
    segments = (w.targets.size + w.segment - 1) // w.segment
    with nogil:
        share(weigh_segment, &w, segments,
              useful_threads(n_threads, w.targets.size, w.segment, <double> w.targets.size, THREAD_WEIGHTS))
    for k in range(segments):
        top, total = max(top, w.top[k]), total + w.total[k]
    return top, total


include "losses.pxi"
include "general.pxi"
include "scores.pxi"
include "packed.pxi"
include "short.pxi"
include "narrow.pxi"
include "thin.pxi"
include "features.pxi"
include "sparse.pxi"
include "descent.pxi"
include "controls.pxi"
