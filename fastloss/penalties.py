"""Penalties R(W) on the weights of a linear classifier, exactly as in the lecture; the bias is never penalised.

A penalty is used in one of three ways, named by `by`: its gradient is added ("gradient"), a proximal step follows
each gradient step ("prox"), or the weights are projected ("projection"). The formulas are the reference's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastloss import _checks as checks
from fastloss._checks import Array
from fastloss.backends import reference


@dataclass(frozen=True)
class Penalty:
    """A penalty with its `strength` λ, a finite number, at least 0."""

    strength: float = 1.0
    by: ClassVar[str]

    @property
    def decay(self) -> float:
        """The q of a penalty whose gradient is q W, which a descent step can take in as it goes; 0 for others."""
        return 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "strength", checks.number(self.strength, "strength", low=0))

    def value(self, W: Array) -> float:
        """R(W) times the strength; W is (C, D), without the bias."""
        return self.value_and_grad(W)[0]

    def value_and_grad(self, W: Array) -> tuple[float, Array]:
        """The value and a (sub)gradient (C, D)."""
        raise NotImplementedError

    def step(self, W: Array, step_size: float) -> Array:
        """The proximal step, or projection, that follows a gradient step of `step_size`: new weights (C, D)."""
        raise NotImplementedError


@dataclass(frozen=True)
class L2(Penalty):
    """λ Σ W²; no hidden ½.

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> fl.L2(0.5).value(np.array([[1.0, 1, 1, 1], [0.25, 0.25, 0.25, 0.25]]))
    2.125
    """

    by: ClassVar[str] = "gradient"

    @property
    def decay(self) -> float:
        return 2 * self.strength

    def value_and_grad(self, W: Array) -> tuple[float, Array]:
        return reference.l2(W, self.strength)

    def step(self, W: Array, step_size: float) -> Array:
        return W / (1 + 2 * step_size * self.strength)


@dataclass(frozen=True)
class L1(Penalty):
    """λ Σ |W|; handled by the proximal step (soft threshold), which sets weights to exactly 0.

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> fl.L1(1.0).step(np.array([[3.0, -0.5, -2.0]]), step_size=1.0).tolist()
    [[2.0, -0.0, -1.0]]
    """

    by: ClassVar[str] = "prox"

    def value_and_grad(self, W: Array) -> tuple[float, Array]:
        return reference.l1(W, self.strength)

    def step(self, W: Array, step_size: float) -> Array:
        return reference.soft_threshold(W, step_size * self.strength)


@dataclass(frozen=True)
class ElasticNet(Penalty):
    """λ (β Σ W² + Σ |W|), handled by the proximal step.

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> fl.ElasticNet(1.0, beta=0.5).value(np.array([[2.0, -1.0]]))
    5.5
    """

    beta: float = 1.0
    by: ClassVar[str] = "prox"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "beta", checks.number(self.beta, "beta", low=0))

    def value_and_grad(self, W: Array) -> tuple[float, Array]:
        return reference.elastic_net(W, self.strength, self.beta)

    def step(self, W: Array, step_size: float) -> Array:
        shrunk = reference.soft_threshold(W, step_size * self.strength)
        return shrunk / (1 + 2 * step_size * self.strength * self.beta)


@dataclass(frozen=True)
class MaxNorm(Penalty):
    """The constraint ‖w_c‖₂ ≤ strength for the weights of each class, kept by projection; it adds no value.

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> fl.MaxNorm(1.0).step(np.array([[3.0, 4.0]]), step_size=1.0).round(3).tolist()
    [[0.6, 0.8]]
    """

    by: ClassVar[str] = "projection"

    def __post_init__(self) -> None:
        object.__setattr__(self, "strength", checks.number(self.strength, "strength", low=0, above=True))

    def value_and_grad(self, W: Array) -> tuple[float, Array]:
        return 0.0, W * 0

    def step(self, W: Array, step_size: float) -> Array:
        return reference.max_norm(W, self.strength)
