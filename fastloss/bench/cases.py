"""What is benchmarked: a job at a shape in a type, its inputs, and what it costs at least."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from fastloss import Hinge, Softmax
from fastloss._checks import Array

LOSSES: dict[str, Any] = {
    "softmax": Softmax(),
    "hinge": Hinge(),
    "hinge-mean": Hinge(over="mean"),
    "hinge-max": Hinge(over="max"),
    "hinge-squared": Hinge(power=2),
}
TRANSFORMS = ("softmax", "log_softmax", "logsumexp")
FLOATS = ("float32", "float64")
SCORE_TYPES = (*FLOATS, "float16", "bfloat16")
DTYPES = (*SCORE_TYPES, "uint8")
#: Above, the linear layer goes by BLAS, and its bar is set by the products.
FEW_CLASSES = 64


@dataclass(frozen=True)
class Kind:
    """A job, whatever its shape and type.

    family : "scores" (a loss of scores), "transform" (of scores), "linear" (the objective of a linear layer) or "layer"
        (the same with the gradient of X too: a layer among others)
    of : a name in LOSSES, or in TRANSFORMS
    verb : "gradient" (and value), "in-place" (over the scores), "value" alone, "rows" (value and gradient over rows
        picked by index), "weights" (the gradients of W and b alone)
    """

    family: str
    of: str
    verb: str = "gradient"

    @property
    def name(self) -> str:
        parts = (self.family if self.family != "scores" else "", self.of, self.verb if self.verb != "gradient" else "")
        return "-".join(filter(None, parts))

    @property
    def is_softmax(self) -> bool:
        return self.family == "transform" or self.of == "softmax"

    @property
    def has_features(self) -> bool:
        return self.family in ("linear", "layer")


_TWO = ("softmax", "hinge")
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        *(Kind("scores", loss) for loss in LOSSES),
        *(Kind("scores", loss, verb) for verb in ("in-place", "value") for loss in _TWO),
        *(Kind("transform", name) for name in TRANSFORMS),
        *(Kind("linear", loss, verb) for verb in ("gradient", "value", "rows") for loss in _TWO),
        *(Kind("layer", "softmax", verb) for verb in ("gradient", "weights")),
    )
}


def dtype_of(name: str) -> np.dtype[Any]:
    """The NumPy type of a name in DTYPES; bfloat16 is that of ml_dtypes."""
    return np.dtype(import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)


class Inputs(NamedTuple):
    """What a job is given."""

    #: Scores (N, C), or features (N, D).
    X: Array
    targets: Array
    W: Array | None = None
    b: Array | None = None
    #: Rows of X to use.
    rows: Array | None = None


@dataclass(frozen=True)
class Case:
    """A job at a shape: scores (N, C), or, where there is a D, a linear layer on features (N, D).

    Examples
    --------
    >>> from fastloss.bench.cases import Case
    >>> Case.parse("softmax-128x10")
    Case(kind='softmax', n=128, c=10, d=None, dtype='float32')
    >>> Case.parse("linear-hinge-value-300x20x5-uint8").job
    Kind(family='linear', of='hinge', verb='value')
    """

    kind: str
    n: int
    c: int
    d: int | None = None
    dtype: str = "float32"

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case of a name: KIND-NxC or KIND-NxDxC, with the type behind it if it is not float32."""
        found = re.fullmatch(rf"({'|'.join(KINDS)})-(\d+)x(\d+)(?:x(\d+))?(?:-({'|'.join(DTYPES)}))?", text)
        sizes = [int(size) for size in found.group(2, 3, 4) if size is not None] if found else []
        features = found is not None and KINDS[found[1]].has_features
        if found is None or features != (len(sizes) == 3) or 0 in sizes or (found[5] == "uint8" and not features):
            names = "softmax-128x10, hinge-value-65536x100-float64 or linear-softmax-50000x3072x10-uint8"
            raise ValueError(f"case is {text!r}; it must be named as {names}")
        return cls(found[1], sizes[0], sizes[-1], sizes[1] if features else None, found[5] or "float32")

    @property
    def job(self) -> Kind:
        return KINDS[self.kind]

    @property
    def name(self) -> str:
        shape = f"{self.n}x{self.c}" if self.d is None else f"{self.n}x{self.d}x{self.c}"
        return f"{self.kind}-{shape}" + ("" if self.dtype == "float32" else f"-{self.dtype}")

    @property
    def compute_dtype(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def n_bytes(self) -> int:
        """The size of the large input: the scores, or X."""
        return self.n * (self.c if self.d is None else self.d) * dtype_of(self.dtype).itemsize

    @property
    def written_bytes(self) -> int:
        """The size of what the job leaves, but for numbers one a call or a row."""
        if self.d is not None:
            weights = 0 if self.job.verb == "value" else self.c * self.d * np.dtype(self.compute_dtype).itemsize
            return weights + (self.n_bytes if self.job == Kind("layer", "softmax") else 0)
        return 0 if self.job.verb == "value" or self.job.of == "logsumexp" else self.n_bytes

    @property
    def moved_bytes(self) -> int:
        """What must be read and written at least: the large arrays once, and the targets."""
        targets = 0 if self.job.family == "transform" else 8 * self.n
        W = 0 if self.d is None else self.c * self.d * np.dtype(self.compute_dtype).itemsize
        return self.n_bytes + W + self.written_bytes + targets

    @property
    def multiply_adds(self) -> int:
        """Of the products of a linear layer; for given scores two for each: shift or compare, and sum."""
        if self.d is None:
            return 2 * self.n * self.c
        products = 1 if self.job.verb == "value" else 3 if self.job == Kind("layer", "softmax") else 2
        return products * self.n * self.d * self.c

    @property
    def exponentials(self) -> int:
        return self.n * self.c if self.job.is_softmax else 0

    @property
    def floor(self) -> tuple[tuple[str, ...], ...]:
        """What the case is compared with: the largest of some sums of controls, by their names.

        Many scores a row: the bytes alone. Few: also the targets, and the exponentials and logarithms. A linear layer:
        one read of X, or its multiply-adds; with many classes the products by BLAS.
        """
        if self.job.family == "layer" or (self.d is not None and self.c > FEW_CLASSES):
            return (("products",),)
        if self.d is not None:
            return (("read",), ("multiply-add",))
        reads = self.job.verb == "value" or self.job.of == "logsumexp"
        moved = "pass" if self.job.verb == "in-place" else "read" if reads else "copy"
        if self.c >= 100:
            return ((moved,),)
        bytes_moved = (moved,) if self.job.family == "transform" else (moved, "targets")
        return (bytes_moved, ("exponentials",)) if self.job.is_softmax else (bytes_moved,)

    @property
    def controls(self) -> tuple[str, ...]:
        """The names in the floor."""
        return tuple(dict.fromkeys(name for names in self.floor for name in names))

    def shapes(self) -> Inputs:
        """The inputs as arrays that take no memory: for controls, which need their sizes alone."""
        c, n, d = self.c, self.n, self.d

        def empty(dtype: Any, *shape: int) -> Array:
            return np.broadcast_to(np.zeros((), dtype), shape)

        if d is None:
            return Inputs(empty(dtype_of(self.dtype), n, c), empty(np.int64, n))
        return Inputs(
            empty(dtype_of(self.dtype), n, d), empty(np.int64, n), empty(self.compute_dtype, c, d),
            empty(self.compute_dtype, c), empty(np.int64, n) if self.job.verb == "rows" else None,
        )  # fmt: skip

    def inputs(self) -> Inputs:
        """Random inputs, the same at every call."""
        rng = np.random.default_rng(0)
        dtype, real = dtype_of(self.dtype), np.dtype(self.compute_dtype).type
        targets = rng.integers(0, self.c, self.n)
        if self.d is None:
            scores = rng.standard_normal((self.n, self.c), dtype=real)
            scores *= 3  # so that some classes stand out, and exp() sees a range
            return Inputs(scores.astype(dtype, copy=False), targets)
        # As pixels are, from 0 to 255 or to 1.
        if self.dtype == "uint8":
            X, largest = rng.integers(0, 256, (self.n, self.d), np.uint8), 255.0
        else:
            X, largest = rng.random((self.n, self.d), dtype=real).astype(dtype, copy=False), 1.0
        W = rng.standard_normal((self.c, self.d), dtype=real) / real(largest * math.sqrt(self.d))
        b = rng.standard_normal(self.c, dtype=real)
        return Inputs(X, targets, W, b, rng.permutation(self.n) if self.job.verb == "rows" else None)


_SHAPES = ((128, 10), (65536, 10), (65536, 100), (16384, 1000), (2048, 32768), (256, 131072))
_LINEAR = (50000, 10, 3072)  # CIFAR-10's

#: The shapes of the project's tables, and a small one that shows what a call costs.
FULL = (
    *(Case(loss, *shape) for loss in _TWO for shape in _SHAPES),
    *(Case(f"linear-{loss}", *_LINEAR) for loss in _TWO),
)
#: What fits into a minute.
QUICK = (
    Case("softmax", 128, 10),
    *(Case(loss, *shape) for loss in _TWO for shape in ((65536, 10), (4096, 1000))),
    *(Case(f"linear-{loss}", 10000, 10, 3072) for loss in _TWO),
)
