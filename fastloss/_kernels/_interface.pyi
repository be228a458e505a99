# What every kernel module offers; src_ext/kernels.pyx says what the arguments are. (A stub alone: no such module.)
from typing import Any

from fastloss._checks import Array

__test__: dict[str, str]

OPENMP: bool
VECTOR_BYTES: int
CONTROLS: tuple[str, ...]

def first_outside(indices: Array, stop: int, ignored: int | None, n_threads: int = 1) -> int: ...
def first_unfit(numbers: Array, most: float, n_threads: int) -> int: ...
def weigh(
    targets: Array,
    class_weight: Array | None,
    ignored: int | None,
    sample_weight: Array | None,
    multiplier: Array,
    n_threads: int,
) -> tuple[float, float]: ...
def score_rows(
    row_loss: tuple[Any, ...],
    scores: Array,
    targets: Array | None,
    multiplier: Array | None,
    scale: float,
    grad: Array | None,
    losses: Array | None,
    n_threads: int,
    z: Array | None = None,
    entropy: Array | None = None,
) -> float: ...
def plain_rows(
    row_loss: tuple[Any, ...],
    scores: Array,
    targets: Array,
    labels: int,
    grad: Array | None,
    mean: bool,
    n_threads: int,
) -> float | None: ...
def gradient_from_stats(
    row_loss: tuple[Any, ...],
    scores: Array,
    targets: Array,
    stats: Array,
    multiplier: Array | None,
    scale: float,
    grad: Array,
    n_threads: int,
) -> None: ...
def linear_rows(
    row_loss: tuple[Any, ...],
    X: Array,
    rows: Array | None,
    centre: Array | None,
    W: Array,
    b: Array | None,
    targets: Array,
    multiplier: Array | None,
    scale: float,
    dW: Array | None,
    db: Array | None,
    losses: Array | None,
    n_threads: int,
) -> float: ...
def csr_scores(
    values: Array,
    indices: Array,
    starts: Array,
    rows: Array | None,
    first: int,
    W: Array,
    bias: Array,
    scores: Array,
    n_threads: int,
) -> None: ...
def csr_accumulate(
    values: Array,
    indices: Array,
    starts: Array,
    rows: Array | None,
    first: int,
    scores: Array,
    dW: Array,
    bounds: Array,
    n_threads: int,
) -> None: ...
def transpose(matrix: Array, transposed: Array, factor: float, back: bool, n_threads: int) -> None: ...
def descend(
    W: Array, velocity: Array, grad: Array, step_size: float, momentum: float, decay: float, decayed: int
) -> None: ...
def transform(kind: str, scores: Array, out: Array, n_threads: int) -> None: ...
def control(kind: str, source: Array, target: Array, repeats: int, n_threads: int) -> int: ...
def dual_epoch(
    values: Array,
    indices: Array,
    starts: Array,
    rows: Array,
    targets: Array,
    bounds: Array,
    squares: Array,
    margin: float,
    W: Array,
    alpha: Array,
) -> tuple[float, float]: ...
def shrink(W: Array, grad: Array, q: float, n_threads: int) -> float: ...
