# cython: language_level=3
"""What the processor can run: compiled for the baseline, so that it can be asked before any kernel is loaded."""

cdef extern from "level.h" nogil:
    int fastloss_level()


def level() -> int:
    """The x86-64 level of this processor and its operating system: 1 to 4; 0 on other architectures."""
    return fastloss_level()
