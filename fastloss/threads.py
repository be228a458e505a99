"""How many threads the CPU kernels may use."""

from __future__ import annotations

import os

from fastloss import _checks as checks


def _default() -> int:
    for variable in ("FASTLOSS_NUM_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(variable, "").split(",")[0].strip()
        if text.isdigit() and int(text) > 0:
            return int(text)
        if text and variable.startswith("FASTLOSS"):
            raise ValueError(f"{variable} is {text!r}; it must be a whole number, at least 1")
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_n_threads: int | None = None  # the default, until it is asked for
_forked = False


def set_num_threads(n: int) -> None:
    """Let the CPU kernels use up to `n` threads (one, in a forked child). Results do not depend on it, bit for bit.

    The default is FASTLOSS_NUM_THREADS, else OMP_NUM_THREADS, else the number of CPUs that the process may use.

    Examples
    --------
    >>> import fastloss as fl
    >>> n = fl.get_num_threads()
    >>> fl.set_num_threads(1)
    >>> fl.get_num_threads()
    1
    >>> fl.set_num_threads(n)
    """
    global _n_threads
    _n_threads = checks.integer(n, "n", low=1)


def get_num_threads() -> int:
    """How many threads the CPU kernels may use; 1 in a forked child."""
    global _n_threads
    if _n_threads is None:
        _n_threads = _default()
    return 1 if _forked else _n_threads


def resolve(n_threads: int | None) -> int:
    """The number of threads for a call. A forked child has no thread pool (OpenMP's does not survive) and uses one."""
    wanted = _n_threads if n_threads is None else checks.integer(n_threads, "n_threads", low=1)
    if wanted is None:
        wanted = get_num_threads()
    return 1 if _forked else wanted if wanted < 1024 else 1024


def _after_fork() -> None:
    global _n_threads, _forked
    _n_threads, _forked = 1, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
