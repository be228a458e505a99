# What every kernel module offers; src_ext/kernels.pyx says what the arguments are. (A stub alone: no such module.)
from fastloss._checks import Array

__test__: dict[str, str]

OPENMP: bool
VECTOR_BYTES: int

def first_outside(indices: Array, stop: int, ignored: int | None) -> int: ...
def score_rows(
    kind: str,
    margin: float,
    power: int,
    over: str,
    scores: Array,
    targets: Array,
    multiplier: Array | None,
    scale: float,
    grad: Array | None,
    losses: Array | None,
    n_threads: int,
) -> float: ...
def linear_rows(
    kind: str,
    margin: float,
    power: int,
    over: str,
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
