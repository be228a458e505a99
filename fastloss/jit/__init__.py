"""Kernels that Numba compiles at run time, for the backends `numba` and `cuda`."""
