"""Matrix products on a GPU, by the library whose arrays are given: PyTorch's or CuPy's, each through cuBLAS.

Sums of 16-bit products are float32's; float32's own precision (TF32 or not) is what the caller has chosen there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from fastloss.gpu.arrays import View, host_dtype


class Products:
    """What the linear layer asks of a library, for arrays like those of a `View`."""

    def convert(self, array: Any, dtype: str) -> Any:
        """In another type; the array itself where it has that type."""
        raise NotImplementedError

    def pick(self, array: Any, rows: Any) -> Any:
        """Rows of an array by index."""
        raise NotImplementedError

    def scores(self, x: Any, W: Any, b: Any, out: Any) -> None:
        """out ← x Wᵀ + b; b may be None."""
        raise NotImplementedError

    def multiply(self, a: Any, b: Any, out: Any, factor: float, add: bool) -> None:
        """out ← factor · a b, or out + factor · a b."""
        raise NotImplementedError

    def accumulate(self, share: Any, total: Any, add: bool) -> None:
        """total ← share, or total + share; in the type of the total."""
        if add:
            total += share
        else:
            total[...] = share

    def sum_rows(self, array: Any, dtype: str) -> Any:
        """Σ over the rows of a matrix, in a type."""
        raise NotImplementedError


class TorchProducts(Products):
    """PyTorch's."""

    def convert(self, array: Any, dtype: str) -> Any:
        import torch

        return array.detach().to(getattr(torch, dtype))

    def pick(self, array: Any, rows: Any) -> Any:
        return array.detach()[rows]

    def scores(self, x: Any, W: Any, b: Any, out: Any) -> None:
        import torch

        with torch.no_grad(), _float32_sums(x):
            if b is None:
                torch.mm(x, W.T, out=out)
            else:
                torch.addmm(b, x, W.T, out=out)

    def multiply(self, a: Any, b: Any, out: Any, factor: float, add: bool) -> None:
        import torch

        with torch.no_grad(), _float32_sums(a):
            if add or factor != 1:
                torch.addmm(out, a, b, beta=1 if add else 0, alpha=factor, out=out)
            else:
                torch.mm(a, b, out=out)

    def sum_rows(self, array: Any, dtype: str) -> Any:
        import torch

        return array.sum(0, dtype=getattr(torch, dtype))


@contextlib.contextmanager
def _float32_sums(array: Any) -> Iterator[None]:
    """PyTorch lets parts of a 16-bit product's sums be added in 16 bits, unless it is told not to."""
    import torch

    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(array.dtype)
    if name is None:
        yield
        return
    switch = f"allow_{name}_reduced_precision_reduction"
    matmul = torch.backends.cuda.matmul
    before = getattr(matmul, switch)
    setattr(matmul, switch, False)
    try:
        yield
    finally:
        setattr(matmul, switch, before)


class CuPyProducts(Products):
    """CuPy's."""

    def convert(self, array: Any, dtype: str) -> Any:
        return array.astype(host_dtype(dtype), copy=False)

    def pick(self, array: Any, rows: Any) -> Any:
        return array[rows]

    def scores(self, x: Any, W: Any, b: Any, out: Any) -> None:
        import cupy

        cupy.matmul(x, W.T, out=out)
        if b is not None:
            out += b

    def multiply(self, a: Any, b: Any, out: Any, factor: float, add: bool) -> None:
        import cupy

        if not add and factor == 1:
            cupy.matmul(a, b, out=out)
            return
        for some in _parts(a.shape[0], max(1, (64 << 20) // max(1, b.shape[1] * out.itemsize))):
            product = cupy.matmul(a[some], b)  # a part of the result, for it takes memory of its own
            if factor != 1:
                product *= out.dtype.type(factor)
            if add:
                out[some] += product
            else:
                out[some] = product

    def sum_rows(self, array: Any, dtype: str) -> Any:
        return array.sum(axis=0, dtype=host_dtype(dtype))


def _parts(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


_KINDS: dict[str, Products] = {"torch": TorchProducts(), "cupy": CuPyProducts()}


def of(view: View) -> Products | None:
    """The products of an array's library; None where it has none."""
    return _KINDS.get(view.library.name)


