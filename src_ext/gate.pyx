# cython: language_level=3
"""A C function in front of a Python callback that threads of another library call, closed before the interpreter ends.

A thread that asks for the interpreter's lock while the interpreter ends is ended itself; a library that waits for it then
waits for ever. `close` waits for the calls that are in, and turns away those that come: they get an error, made in C.
"""

cdef extern from *:
    """
    typedef void *(*fastloss_callback)(void *);
    static fastloss_callback fastloss_inner, fastloss_refuse;
    static void *fastloss_refusal;
    static int fastloss_closed, fastloss_inside;
    static void *fastloss_gate(void *argument) {
        void *result;
        /* Counted before it looks, while close() closes before it counts: none slips through. */
        __atomic_add_fetch(&fastloss_inside, 1, __ATOMIC_SEQ_CST);
        result = __atomic_load_n(&fastloss_closed, __ATOMIC_SEQ_CST) ? fastloss_refuse(fastloss_refusal)
                                                                     : fastloss_inner(argument);
        __atomic_sub_fetch(&fastloss_inside, 1, __ATOMIC_SEQ_CST);
        return result;
    }
    static size_t fastloss_set_inner(size_t inner) {
        fastloss_inner = (fastloss_callback)inner;
        return (size_t)&fastloss_gate;
    }
    static void fastloss_close(size_t refuse, size_t refusal) {
        fastloss_refuse = (fastloss_callback)refuse;
        fastloss_refusal = (void *)refusal;
        __atomic_store_n(&fastloss_closed, 1, __ATOMIC_SEQ_CST);
    }
    static int fastloss_is_inside(void) { return __atomic_load_n(&fastloss_inside, __ATOMIC_SEQ_CST) > 0; }
    """
    size_t fastloss_set_inner(size_t inner) nogil
    void fastloss_close(size_t refuse, size_t refusal) nogil
    bint fastloss_is_inside() nogil


def guard(callback: int) -> int:
    """The address of the function in front of that at `callback`: of one argument and one result, both pointers."""
    return fastloss_set_inner(callback)


def close(refuse: int, refusal: int) -> None:
    """From now on calls give what the function at `refuse` makes of the pointer `refusal`, which must live on."""
    fastloss_close(refuse, refusal)


def is_inside() -> bool:
    """Whether any thread is in a call, or at its door."""
    return fastloss_is_inside()
