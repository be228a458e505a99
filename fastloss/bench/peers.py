"""The one table of peers: who computes the same losses and gradients, and how each is used at its best.

The table drives the benchmarks and the parity tests alike. A library is imported when its first builder runs.
Every peer computes the same job: the mean loss over rows and its gradient; for hinge in the Weston–Watkins (sum) form.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

import fastloss as fl
from fastloss import backends
from fastloss._checks import Array
from fastloss.bench.cases import KINDS, LOSSES


class Work(NamedTuple):
    """A job, all set up."""

    #: Does the job, `repeats` times, and returns once it is done.
    run: Callable[[], Any]
    #: From what `run` returned: (loss, gradient of the scores) or (loss, dW, db), as NumPy; None for a control.
    answer: Callable[[Any], tuple[Any, ...]] | None
    repeats: int = 1


#: From inputs (`Case.inputs`) and a number of threads to a job: does the conversion and the compilation.
Builder = Callable[[Sequence[Array], int], Work]


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Peer:
    """One row of the table. A kind of case that has no builders is in `lacks`, with the reason."""

    name: str
    #: The distribution that the version is that of.
    distribution: str
    #: Kind of case → name of the variant → builder. The best variant is what counts.
    variants: Mapping[str, Mapping[str, Builder]]
    lacks: Mapping[str, str] = field(default_factory=dict)
    #: Why this peer cannot be used here; None if it can.
    why_not: Callable[[], str | None] = _nothing
    #: Part of a run that names no peers.
    default: bool = True
    #: A measure of the memory, not a computation of the loss.
    control: bool = False
    #: Building takes seconds.
    slow_to_build: bool = False


def _same_answer(result: Any) -> tuple[Any, ...]:
    return tuple(result)


# --- fastloss ------------------------------------------------------------------------------------------------------
def _fastloss(kind: str, backend: str) -> Builder:
    """With `out=` given, as a caller who calls often does."""

    def scores(inputs: Sequence[Array], threads: int) -> Work:
        S, y = inputs
        loss, grad = LOSSES[kind], np.empty_like(S)
        return Work(lambda: loss.value_and_grad(S, y, out=grad, backend=backend, n_threads=threads), _same_answer)

    def linear(inputs: Sequence[Array], threads: int) -> Work:
        X, W, b, y = inputs
        packed = np.concatenate([W, b[:, None]], axis=1)
        loss, grad = LOSSES[kind.removeprefix("linear-")], np.empty_like(packed)
        objective = fl.LinearObjective(loss, X, y, backend=backend, n_threads=threads)
        return Work(lambda: objective.value_and_grad(packed, out=grad), lambda r: (r[0], r[1][:, :-1], r[1][:, -1]))

    return linear if kind.startswith("linear-") else scores


def _backend_missing(name: str) -> str | None:
    try:
        backends.get(name)
    except fl.BackendError as error:
        return str(error)
    return None


# --- NumPy ---------------------------------------------------------------------------------------------------------
@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _row_max(S: Array) -> Array:
    """NumPy's maximum over short rows costs a call for each row; over columns it is a vector operation."""
    if S.shape[1] > 64:
        return np.asarray(S.max(axis=1))
    highest = S[:, 0].copy()
    for j in range(1, S.shape[1]):
        np.maximum(highest, S[:, j], out=highest)
    return highest


def _softmax_rows(S: Array, flat: Array, G: Array, k: float) -> float:
    """k Σ ℓ; and k times the gradient into G, which may be S. `flat` are the positions of the targets in S."""
    entries = G.reshape(-1)
    np.subtract(S, _row_max(S)[:, None], out=G)
    picked = entries[flat]
    np.exp(G, out=G)
    total = np.einsum("ij->i", G)  # faster than sum(axis=1), and no BLAS threads within ours
    G *= (k / total)[:, None]
    entries[flat] -= k
    return k * float(np.log(total).sum(dtype=np.float64) - picked.sum(dtype=np.float64))


def _hinge_rows(S: Array, flat: Array, G: Array, k: float) -> float:
    """The same for the hinge."""
    entries = G.reshape(-1)
    np.subtract(S, (S.reshape(-1)[flat] - 1)[:, None], out=G)
    np.maximum(G, 0, out=G)
    entries[flat] = 0
    value = k * float(G.sum())
    np.multiply(G > 0, k, out=G, dtype=G.dtype)
    entries[flat] = -np.einsum("ij->i", G)
    return value


_NUMPY_ROWS = {"softmax": _softmax_rows, "hinge": _hinge_rows}


def _numpy(kind: str, threaded: bool) -> Builder:
    """Whole arrays, in place; or blocks of rows that stay in the cache, shared out to Python threads."""
    rows = _NUMPY_ROWS[kind.removeprefix("linear-")]

    def build(inputs: Sequence[Array], threads: int) -> Work:
        X, y, W = inputs[0], inputs[-1], inputs[1]
        n, c = X.shape if len(inputs) == 2 else (len(X), len(W))
        S = X if len(inputs) == 2 else np.empty((n, c), X.dtype)
        G = np.empty_like(S) if len(inputs) == 2 else S
        # About 1 MB a block, at least one for each thread.
        step = max(1, min(-(-n // threads), 2**20 // (c * S.itemsize))) if threaded else n
        slices = [slice(start, start + step) for start in range(0, n, step)]
        parts = [(S[part], np.arange(len(y[part])) * c + y[part], G[part], 1 / n) for part in slices]

        def scores() -> tuple[Any, ...]:
            # The pool's own cost would be most of a small job.
            if len(parts) == 1 or S.nbytes < 2**16:
                return sum(rows(*part) for part in parts), G
            return sum(_pool(threads).map(lambda part: rows(*part), parts)), G

        if len(inputs) == 2:
            return Work(scores, _same_answer)
        b, dW = inputs[2], np.empty_like(W)

        def linear() -> tuple[Any, ...]:
            np.matmul(X, W.T, out=S)
            np.add(S, b, out=S)
            value, _ = scores()
            return value, np.matmul(G.T, X, out=dW), G.sum(axis=0)

        return Work(linear, _same_answer)

    return build


# --- SciPy and scikit-learn ----------------------------------------------------------------------------------------
def _scipy(kind: str) -> Builder:
    def build(inputs: Sequence[Array], threads: int) -> Work:
        log_softmax: Any = import_module("scipy.special").log_softmax
        y = inputs[-1]
        n = len(y)
        row = np.arange(n)

        def scores(S: Array) -> tuple[Any, ...]:
            log_p = log_softmax(S, axis=1)
            loss = -float(log_p[row, y].mean(dtype=np.float64))
            G = np.exp(log_p, out=log_p)
            G[row, y] -= 1
            G *= 1 / n
            return loss, G

        def linear() -> tuple[Any, ...]:
            X, W, b, _ = inputs
            S = X @ W.T
            S += b
            loss, G = scores(S)
            return loss, G.T @ X, G.sum(axis=0)

        return Work(linear if kind.startswith("linear-") else lambda: scores(inputs[0]), _same_answer)

    return build


def _sklearn(inputs: Sequence[Array], threads: int) -> Work:
    """The private losses that LogisticRegression and gradient boosting run on."""
    multinomial: Any = import_module("sklearn._loss").HalfMultinomialLoss
    first = inputs[0]
    y = inputs[-1].astype(first.dtype)
    n = len(first)
    if len(inputs) == 2:
        # Weights 1/N make it the mean over rows, in the same pass.
        rows, weight = multinomial(n_classes=first.shape[1]), np.full(n, 1 / n, first.dtype)
        row_loss, grad = np.empty(n, first.dtype), np.empty_like(first)
        buffers = {"loss_out": row_loss, "gradient_out": grad}

        def run() -> tuple[Any, ...]:
            rows.loss_gradient(y, first, sample_weight=weight, n_threads=threads, **buffers)
            return float(row_loss.sum(dtype=np.float64)), grad

        return Work(run, _same_answer)
    X, W, b, _ = inputs
    model: Any = import_module("sklearn.linear_model._linear_loss").LinearModelLoss
    objective = model(multinomial(n_classes=len(W)), fit_intercept=True)
    coef = np.concatenate([W, b[:, None]], axis=1).ravel(order="F")

    def answer(result: Any) -> tuple[Any, ...]:
        grad = result[1].reshape(len(W), -1, order="F")
        return result[0], grad[:, :-1], grad[:, -1]

    return Work(lambda: objective.loss_gradient(coef, X, y, n_threads=threads), answer)


# --- PyTorch and JAX: their forms are in modules of their own, which import them --------------------------------------
def _torch(form: str, compiled: bool = False) -> Builder:
    def build(inputs: Sequence[Array], threads: int) -> Work:
        work: Work = import_module("fastloss.bench.forms_torch").build(form, compiled, inputs, threads)
        return work

    return build


def _jax(form: str) -> Builder:
    def build(inputs: Sequence[Array], threads: int) -> Work:
        work: Work = import_module("fastloss.bench.forms_jax").build(form, inputs)
        return work

    return build


def _module_missing(name: str, distribution: str) -> str | None:
    return None if find_spec(name) else f"{distribution} is not installed (pip install {distribution})"


def _compiler_missing() -> str | None:
    compiler = os.environ.get("CXX", "g++")
    missing = f"no C++ compiler: {compiler!r} is not found (CXX names another)"
    return _module_missing("torch", "torch") or (None if shutil.which(compiler) else missing)


# --- controls ------------------------------------------------------------------------------------------------------
def _memory(kind: str, threaded: bool) -> Builder:
    """What the memory allows: a copy of the scores, or one read of X."""

    def build(inputs: Sequence[Array], threads: int) -> Work:
        # The pool's threads are ours; BLAS must not start its own within them. The process is this control's alone.
        import_module("threadpoolctl").threadpool_limits(1, "blas")
        source = inputs[0].reshape(-1)
        target = np.empty_like(source) if len(inputs) == 2 else None
        count = threads if threaded else 1
        bounds = [len(source) * k // count for k in range(count + 1)]
        parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
        # Threads are woken once for many copies of a small array, or waking them would be what is measured.
        repeats = max(1, 2**24 // source.nbytes) if threaded else 1

        def job(part: slice) -> None:
            for _ in range(repeats):
                if target is None:
                    np.dot(source[part], source[part])
                else:
                    np.copyto(target[part], source[part])

        if count == 1:
            return Work(lambda: job(parts[0]), None, repeats)
        return Work(lambda: list(_pool(threads).map(job, parts)), None, repeats)

    return build


# --- the table -----------------------------------------------------------------------------------------------------
def _memory_variants(kind: str) -> dict[str, Builder]:
    what = "read of X" if kind.startswith("linear-") else "copy"
    return {f"{what}, one thread": _memory(kind, False), f"{what}, all threads": _memory(kind, True)}


_SOFTMAX_KINDS = tuple(kind for kind in KINDS if kind.endswith("softmax"))


def _softmax_only(reason: str) -> dict[str, str]:
    return {kind: reason for kind in KINDS if kind not in _SOFTMAX_KINDS}


def _by_loss(builder: Callable[..., Builder], forms: Mapping[str, Mapping[str, str]], **how: Any) -> dict[str, Any]:
    """Loss → variant → form, made builders for scores and for the linear layer."""
    return {
        kind: {variant: builder(form, **how) for variant, form in forms[kind.removeprefix("linear-")].items()}
        for kind in KINDS
    }


_TORCH = {
    "softmax": {
        "cross_entropy, autograd": "cross_entropy",
        "log_softmax, in place": "log_softmax_in_place",
        "by hand, in place": "softmax_in_place",
    },
    "hinge": {"multi_margin_loss, autograd": "multi_margin_loss", "by hand, in place": "hinge_in_place"},
}
# The compiler fuses, and does better with whole expressions than with operations in place.
_TORCH_COMPILED = {
    "softmax": {"cross_entropy, autograd": "cross_entropy", "by hand": "softmax"},
    "hinge": {"multi_margin_loss, autograd": "multi_margin_loss", "by hand": "hinge"},
}
_JAX = {
    "softmax": {"value_and_grad": "cross_entropy", "by hand": "softmax"},
    "hinge": {"value_and_grad": "hinge_loss", "by hand": "hinge"},
}


def table() -> dict[str, Peer]:
    """All peers by name, in the order of display."""
    fastloss = [
        Peer(
            f"fastloss-{name}",
            "fastloss",
            {kind: {"out=": _fastloss(kind, name)} for kind in KINDS},
            why_not=functools.partial(_backend_missing, name),
            default="-" not in name,  # not each instruction-set level
        )
        for name in backends._TABLE
    ]
    others = [
        Peer(
            "numpy",
            "numpy",
            {kind: {"in place": _numpy(kind, False), "blocks in threads": _numpy(kind, True)} for kind in KINDS},
        ),
        Peer(
            "scipy",
            "scipy",
            {kind: {"log_softmax": _scipy(kind)} for kind in _SOFTMAX_KINDS},
            lacks=_softmax_only("SciPy has no multiclass hinge"),
        ),
        Peer(
            "scikit-learn",
            "scikit-learn",
            {"softmax": {"HalfMultinomialLoss": _sklearn}, "linear-softmax": {"LinearModelLoss": _sklearn}},
            lacks=_softmax_only("scikit-learn has the multiclass hinge as a metric only, without gradient"),
            why_not=functools.partial(_module_missing, "sklearn", "scikit-learn"),
        ),
        Peer(
            "torch",
            "torch",
            _by_loss(_torch, _TORCH),
            why_not=functools.partial(_module_missing, "torch", "torch"),
        ),
        Peer(
            "torch-compile",
            "torch",
            _by_loss(_torch, _TORCH_COMPILED, compiled=True),
            why_not=_compiler_missing,
            slow_to_build=True,
        ),
        Peer("jax", "jax", _by_loss(_jax, _JAX), why_not=functools.partial(_module_missing, "jax", "jax")),
    ]
    memory = Peer("memory", "numpy", {kind: _memory_variants(kind) for kind in KINDS}, control=True)
    return {peer.name: peer for peer in (memory, *fastloss, *others)}
