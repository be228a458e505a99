"""How many threads the CPU kernels may use."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from fastloss import _checks as checks


def _quotas(root: Path) -> Iterator[float]:
    """CPUs' worth of time allowed by each limited control group, from that of this process to the top of its mount."""
    groups: dict[str, str] = {}
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        groups |= dict.fromkeys(controllers.split(","), path)  # version 2 names no controllers
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        top, point = mount.split()[3:5]
        version, options = kind.split()[0], kind.split()[-1].split(",")
        own = groups.get("" if version == "cgroup2" else "cpu")
        if own is None or not (version == "cgroup2" or (version == "cgroup" and "cpu" in options)):
            continue
        inside = os.path.relpath(own, top)  # a container may see its own group as the top of the mount
        folder = base = root / point.lstrip("/")
        if not inside.startswith(".."):
            folder /= inside
        for group in (folder, *folder.parents[: len(folder.parts) - len(base.parts)]):
            names = ("cpu.max",) if version == "cgroup2" else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            if all((group / name).exists() for name in names):  # the top group of all has none
                quota, period = " ".join((group / name).read_text() for name in names).split()
                if quota not in ("max", "-1"):
                    yield int(quota) / int(period)


def cpus(root: Path = Path("/")) -> int:
    """The number of CPUs that this process may use: its affinity, and what its control groups allow, rounded up."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if (root / "proc/self/mountinfo").exists():
        allowed = min([allowed, *map(math.ceil, _quotas(root))])
    return max(1, allowed)


def _default() -> int:
    for variable in ("FASTLOSS_NUM_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(variable, "").split(",")[0].strip()
        if text.isdigit() and int(text) > 0:
            return int(text)
        if text and variable.startswith("FASTLOSS"):
            raise ValueError(f"{variable} is {text!r}; it must be a whole number, at least 1")
    return cpus()


_n_threads: int | None = None  # the default, until it is asked for
_forked = False


def set_num_threads(n: int) -> None:
    """Let the CPU kernels use up to `n` threads (one, in a forked child). Results do not depend on it, bit for bit.

    The default is FASTLOSS_NUM_THREADS, else OMP_NUM_THREADS, else the number of CPUs that the process may use by its
    affinity and by the limits of its control groups (containers), rounded up.

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


def synchronize() -> None:
    """Wait for the GPU that this thread works on, and raise what calls found to be wrong with their arrays.

    Calls with arrays on a GPU do not wait for it. Targets outside the classes give rows of NaN there, and an error in a
    later call, or here. Without such calls there is nothing to wait for.

    Raises
    ------
    ValueError
        For a target, probability or weight that an earlier call was given on the GPU.

    Examples
    --------
    >>> import fastloss as fl
    >>> fl.synchronize()
    """
    module = sys.modules.get("fastloss.gpu.driver")
    if module is not None:
        module.synchronize()
