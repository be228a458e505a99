"""What is benchmarked: a loss at a shape, and its inputs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastloss import Hinge, Softmax
from fastloss._checks import Array

LOSSES: dict[str, Any] = {"softmax": Softmax(), "hinge": Hinge()}
KINDS = (*LOSSES, *(f"linear-{name}" for name in LOSSES))


@dataclass(frozen=True)
class Case:
    """Loss and gradient of given scores (N, C), or, where there is a D, of a linear layer on features (N, D).

    Examples
    --------
    >>> from fastloss.bench.cases import Case
    >>> Case.parse("softmax-128x10")
    Case(loss='softmax', n=128, c=10, d=None, dtype='float32')
    >>> Case.parse("linear-hinge-300x20x5-float64").name
    'linear-hinge-300x20x5-float64'
    """

    loss: str
    n: int
    c: int
    d: int | None = None
    dtype: str = "float32"

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case of a name: LOSS-NxC or linear-LOSS-NxDxC, with -float64 behind it for that type."""
        pattern = rf"(linear-)?({'|'.join(LOSSES)})-(\d+)x(\d+)(?:x(\d+))?(?:-(float32|float64))?"
        found = re.fullmatch(pattern, text)
        sizes = [int(size) for size in found.group(3, 4, 5) if size is not None] if found else []
        if found is None or (found[1] is None) != (found[5] is None) or 0 in sizes:
            names = "softmax-128x10, hinge-65536x100-float64 or linear-softmax-50000x3072x10"
            raise ValueError(f"case is {text!r}; it must be named as {names}")
        return cls(found[2], sizes[0], sizes[-1], sizes[1] if found[1] else None, found[6] or "float32")

    @property
    def kind(self) -> str:
        """Which job this is, one of `KINDS`."""
        return self.loss if self.d is None else f"linear-{self.loss}"

    @property
    def name(self) -> str:
        shape = f"{self.n}x{self.c}" if self.d is None else f"{self.n}x{self.d}x{self.c}"
        return f"{self.kind}-{shape}" + ("" if self.dtype == "float32" else f"-{self.dtype}")

    @property
    def n_bytes(self) -> int:
        """The size of the large input: the scores, or X."""
        return self.n * (self.c if self.d is None else self.d) * np.dtype(self.dtype).itemsize

    def inputs(self) -> tuple[Array, ...]:
        """Scores and targets, or X, W, b and targets: random, the same at every call."""
        rng = np.random.default_rng(0)
        dtype: Any = np.dtype(self.dtype).type
        targets = rng.integers(0, self.c, self.n)
        if self.d is None:
            scores = rng.standard_normal((self.n, self.c), dtype=dtype)
            scores *= 3  # so that some classes stand out, and exp() sees a range
            return scores, targets
        X = rng.random((self.n, self.d), dtype=dtype)  # as pixels are
        W = rng.standard_normal((self.c, self.d), dtype=dtype) / dtype(math.sqrt(self.d))
        return X, W, rng.standard_normal(self.c, dtype=dtype), targets


_SHAPES = ((128, 10), (65536, 10), (65536, 100), (16384, 1000), (2048, 32768), (256, 131072))
_LINEAR = (50000, 10, 3072)  # CIFAR-10's

#: The shapes of the project's tables, and a small one that shows what a call costs.
FULL = (
    *(Case(loss, *shape) for loss in LOSSES for shape in _SHAPES),
    *(Case(loss, *_LINEAR) for loss in LOSSES),
)
#: What fits into a minute.
QUICK = (
    Case("softmax", 128, 10),
    *(Case(loss, *shape) for loss in LOSSES for shape in ((65536, 10), (4096, 1000))),
    *(Case(loss, 10000, 10, 3072) for loss in LOSSES),
)
