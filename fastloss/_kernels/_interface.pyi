# What every kernel module offers; src_ext/kernels.pyx says what the arguments are. (A stub alone: no such module.)
from fastloss._checks import Array

__test__: dict[str, str]

OPENMP: bool
VECTOR_BYTES: int
CONTROLS: tuple[str, ...]

def first_outside(indices: Array, stop: int, ignored: int | None, n_threads: int = 1) -> int: ...
def score_rows(
    row_loss: tuple[str, float, int, str],
    scores: Array,
    targets: Array,
    multiplier: Array | None,
    scale: float,
    grad: Array | None,
    losses: Array | None,
    n_threads: int,
) -> float: ...
def linear_rows(
    row_loss: tuple[str, float, int, str],
    X: Array,
    rows: Array | None,
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
def descend(
    W: Array, velocity: Array, grad: Array, step_size: float, momentum: float, decay: float, decayed: int
) -> None: ...
def transform(kind: str, scores: Array, out: Array, n_threads: int) -> None: ...
def control(kind: str, source: Array, target: Array, repeats: int, n_threads: int) -> int: ...
