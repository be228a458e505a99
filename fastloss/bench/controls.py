"""The controls: what the machine can do at most, which the cases are compared with.

They are given `Case.shapes`, not inputs, and make arrays of their own. A copy, pass or read is a call like any other,
whose threads are woken for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from fastloss import backends
from fastloss._checks import Array
from fastloss.bench.cases import DTYPES, KINDS, Inputs, Kind
from fastloss.bench.work import Builder, Peer, Work, missing, pool


def kernels(dtype: str = "float32") -> Any:
    """The kernel module of a float type (float32 for all but float64), at the level that this processor runs."""
    level = backends.get("cython").name.removeprefix("cython-")
    return import_module(f"fastloss._kernels.f{64 if dtype == 'float64' else 32}_{level}")


def ones(n_bytes: int, dtype: str = "float32") -> Array:
    """An array of ones of at least so many bytes, that begins at a multiple of 64 bytes."""
    itemsize = np.dtype(dtype).itemsize
    n_bytes = max(256, -(-n_bytes // itemsize) * itemsize)
    memory = np.empty(n_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array = memory[start : start + n_bytes].view(dtype)
    array[:] = 1
    return array


def _why_not() -> str | None:
    try:
        backends.get("cython")
    except backends.BackendError as error:
        return f"the controls are compiled with the kernels: {error}"
    return None


def _memory(control: str, n_bytes: Callable[[Inputs], int]) -> dict[str, Builder]:
    """The ways to go over so many bytes."""
    ways = {"copy": ("copy", "stream"), "pass": ("pass",), "read": ("read",)}[control]

    def compiled(way: str) -> Builder:
        def build(inputs: Inputs, threads: int) -> Work:
            source = ones(n_bytes(inputs))
            target = ones(source.nbytes) if control != "read" else source
            run = kernels().control
            return Work(lambda: run(way, source, target, 1, threads), None)

        return build

    def by_numpy(inputs: Inputs, threads: int) -> Work:
        # The pool's threads are ours; BLAS must not start its own within them. The process is this control's alone.
        import_module("threadpoolctl").threadpool_limits(1, "blas")
        source = ones(n_bytes(inputs))
        target = np.empty_like(source)
        bounds = [len(source) * k // threads for k in range(threads + 1)]
        parts = [slice(*pair) for pair in itertools.pairwise(bounds)]

        def job(part: slice) -> None:
            if control == "read":
                np.dot(source[part], source[part])
            else:
                np.copyto(target[part], source[part])

        return Work(lambda: list(pool(threads).map(job, parts)), None)

    return {way: compiled(way) for way in ways} | ({} if control == "pass" else {"NumPy, in threads": by_numpy})


def _exponentials(kind: Kind) -> Builder:
    """N·C exponentials of numbers in the cache, and N logarithms (none for softmax itself)."""

    def build(inputs: Inputs, threads: int) -> Work:
        (n, c), dtype = inputs.X.shape, "float64" if inputs.X.dtype == np.float64 else "float32"
        source, run = ones(2**14 * threads, dtype), kernels(dtype).control
        logarithms = 0 if kind == Kind("transform", "softmax") else -(-1024 // c)
        passes = -(-1024 // c) * c

        def job() -> int:
            run("log", source, source, logarithms, threads)
            return int(run("exp", source, source, passes, threads))

        return Work(job, None, job() / (n * c))

    return build


def _multiply_adds(kind: Kind) -> Builder:
    def build(inputs: Inputs, threads: int) -> Work:
        assert inputs.W is not None
        dtype = str(inputs.W.dtype)
        source, run = ones(256, dtype), kernels(dtype).control
        source[0], source[1] = 0.5, 1  # the chains stay at finite numbers that are not 0
        wanted = (1 if kind.verb == "value" else 2) * len(inputs.X) * inputs.W.size

        def job() -> int:
            return int(run("multiply-add", source, source, 128, threads))

        return Work(job, None, job() / wanted)

    return build


def _products(kind: Kind, chunk_rows: int, own_threads: bool) -> Builder:
    """The bare products by BLAS, for one chunk of the rows."""

    def build(inputs: Inputs, threads: int) -> Work:
        assert inputs.W is not None
        n, d, c, dtype = len(inputs.X), inputs.X.shape[1], len(inputs.W), inputs.W.dtype
        chunk = min(n, chunk_rows)
        rng = np.random.default_rng(0)
        X, W, S = (rng.random(shape, np.float32).astype(dtype) for shape in ((chunk, d), (c, d), (chunk, c)))
        dW, dX = np.empty_like(W), np.empty_like(X)
        products = [(X, W.T, S)]
        if kind.verb != "value":
            products.append((S.T, X, dW))
        if kind == Kind("layer", "softmax"):
            products.append((S, W, dX))
        limits: Any = import_module("threadpoolctl").threadpool_limits
        count = threads if own_threads else 1

        def multiply(a: Array, b: Array, out: Array) -> None:
            """Each thread makes some columns of the larger side."""
            if count == 1:
                np.matmul(a, b, out=out)
                return
            by_rows = out.shape[0] >= out.shape[1]
            bounds = [max(out.shape) * k // count for k in range(count + 1)]
            parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
            if by_rows:
                list(pool(count).map(lambda part: np.matmul(a[part], b, out=out[part]), parts))
            else:
                list(pool(count).map(lambda part: np.matmul(a, b[:, part], out=out[:, part]), parts))

        def job() -> None:
            with limits(1 if own_threads else threads, "blas"):
                for product in products:
                    multiply(*product)

        return Work(job, None, chunk / n)

    return build


def table() -> list[Peer]:
    """The controls: what a case is compared with (`Case.floor`)."""

    def over(names: Callable[[Kind], bool], builders: Callable[[Kind], dict[str, Builder]]) -> dict[str, Any]:
        return {name: builders(kind) for name, kind in KINDS.items() if names(kind)}

    def array(inputs: Inputs) -> int:
        return inputs.X.nbytes

    def targets(inputs: Inputs) -> int:
        return inputs.targets.nbytes

    by_blas = {
        "1024 rows, threads of BLAS": (1024, False),
        "1024 rows, own threads": (1024, True),
        "512 rows, own threads": (512, True),
    }
    variants = {
        "copy": over(lambda kind: not kind.has_features, lambda kind: _memory("copy", array)),
        "pass": over(lambda kind: not kind.has_features, lambda kind: _memory("pass", array)),
        "read": over(lambda kind: True, lambda kind: _memory("read", array)),
        "targets": over(lambda kind: not kind.has_features, lambda kind: _memory("read", targets)),
        "exponentials": over(lambda kind: not kind.has_features, lambda kind: {"exp, log": _exponentials(kind)}),
        "multiply-add": over(lambda kind: kind.has_features, lambda kind: {"in registers": _multiply_adds(kind)}),
        "products": over(
            lambda kind: kind.has_features,
            lambda kind: {name: _products(kind, *how) for name, how in by_blas.items()},
        ),
    }
    return [
        Peer(
            name, "fastloss", found, missing(found, lambda kind: "not what it is compared with"), dtypes=DTYPES,
            mixes_types=True, why_not=_why_not, control=True, needs_inputs=False,
        )
        for name, found in variants.items()
    ]  # fmt: skip
