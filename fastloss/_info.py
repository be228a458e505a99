"""What `fastloss info` shows: this installation, its kernels and backends, and the machine."""

from __future__ import annotations

import os
import platform
import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fastloss
from fastloss import _checks as checks
from fastloss import backends

PACKAGES = (
    "numpy", "scipy", "threadpoolctl", "scikit-learn", "matplotlib", "tqdm", "bokeh", "numba", "numba-cuda", "torch",
    "jax", "cupy",
)  # fmt: skip
VARIABLES = ("FASTLOSS_BACKEND", "FASTLOSS_LEVEL", "FASTLOSS_NUM_THREADS", "FASTLOSS_DATA", "OMP_NUM_THREADS")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _kernels() -> dict[str, Any]:
    """The level chosen, or why there is none; and every level with its availability and reason."""
    levels = {
        info.name.removeprefix("cython-"): {"available": info.available, "reason": info.reason}
        for info in fastloss.list_backends()
        if info.name.startswith("cython-")
    }
    try:
        level = backends.get("cython").name.removeprefix("cython-")
    except backends.BackendError as error:
        return {"level": None, "reason": str(error), "openmp": None, "levels": levels}
    openmp = bool(import_module(f"fastloss._kernels.f32_{level}").OPENMP)
    return {"level": level, "reason": None, "openmp": openmp, "levels": levels}


def _chosen() -> str:
    """The backend of a plain call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is passed over is listed, with its reason
        try:
            return backends.choose(None, "gradient", fastloss.Softmax(), checks.FLOAT32, ()).name
        except backends.BackendError as error:
            return f"none: {error}"


def collect() -> dict[str, Any]:
    """All facts, as JSON takes them."""
    from threadpoolctl import threadpool_info

    return {
        "fastloss": fastloss.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": fastloss.get_num_threads(),
        "kernels": _kernels(),
        "backend": _chosen(),
        "backends": [info._asdict() for info in fastloss.list_backends()],
        "blas": [
            {key: pool.get(key) for key in ("internal_api", "version", "architecture", "num_threads", "filepath")}
            for pool in threadpool_info()
            if pool["user_api"] == "blas"
        ],
        "packages": {name: _package(name) for name in PACKAGES},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def text(facts: dict[str, Any]) -> str:
    """The same, to be read."""
    kernels = facts["kernels"]
    if kernels["level"] is None:
        chosen = f"none: {kernels['reason']}"
    else:
        others = [name for name, level in kernels["levels"].items() if level["available"]]
        openmp = "with OpenMP" if kernels["openmp"] else "without OpenMP: one thread"
        chosen = f"{kernels['level']} (of {', '.join(others)}), {openmp}"
    blas = [f"{b['internal_api']} {b['version']} ({b['num_threads']} threads)" for b in facts["blas"]]
    rows = [
        ("fastloss", facts["fastloss"]),
        ("kernels", chosen),
        ("backend", facts["backend"]),
        ("threads", f"{facts['threads']} (of {facts['cpus']} CPUs)"),
        ("processor", facts["processor"]),
        ("platform", facts["platform"]),
        ("Python", facts["python"]),
        ("BLAS", "; ".join(blas) or "not known"),
        *((name, found or "not installed") for name, found in facts["packages"].items()),
        *facts["environment"].items(),
    ]
    width = max(len(name) for name, _ in rows) + 2
    lines = [f"{name:<{width}}{value}" for name, value in rows]
    lines += ["", "Backends, fastest first:"]
    for backend in facts["backends"]:
        mark = "yes" if backend["available"] else "no "
        lines.append(f"  {backend['name']:<{width}}{mark}  {backend['reason']}")
    return "\n".join(lines)
