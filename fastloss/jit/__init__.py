"""Kernels compiled at run time, by Numba: what the backends `numba` and `cuda` run. Imports nothing by itself."""
