"""The one table of peers: who does the same jobs, and how each is used at its best; and the controls.

The table drives the benchmarks and the parity tests alike. A library is imported when its first builder runs.
Every peer does the same: the mean loss over rows, and its gradient.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

import fastloss as fl
from fastloss import backends
from fastloss._checks import Array
from fastloss.bench import controls
from fastloss.bench.cases import DTYPES, KINDS, LOSSES, SCORE_TYPES, Inputs, Kind
from fastloss.bench.work import Builder, Peer, Work, as_it_is, missing, pool


# --- fastloss ------------------------------------------------------------------------------------------------------
def _fastloss(kind: Kind, backend: str, dtype: str | None = None) -> Builder:
    """With `out=` given where there is one, as a caller who calls often does; on features converted to `dtype`."""

    def build(inputs: Inputs, threads: int) -> Work:
        how: dict[str, Any] = {"backend": backend, "n_threads": threads}
        X, y, W, b, rows = inputs
        if dtype is not None:
            X = X.astype(dtype)
        if kind.family == "transform":
            out = np.empty(len(X), X.dtype) if kind.of == "logsumexp" else np.empty_like(X)
            return Work(lambda: getattr(fl, kind.of)(X, out=out, **how), as_it_is)
        loss = LOSSES[kind.of]
        if W is None:
            if kind.verb == "value":
                return Work(lambda: loss.value(X, y, **how), as_it_is)
            grad = X if kind.verb == "in-place" else np.empty_like(X)
            return Work(lambda: loss.value_and_grad(X, y, out=grad, **how), as_it_is)
        assert b is not None
        if kind.family == "layer":
            wrt = ("W", "b") if kind.verb == "weights" else ("W", "b", "X")
            return Work(
                lambda: fl.linear_value_and_grad(loss, X, W, y, b, wrt=wrt, **how),
                lambda result: (result[0], *(result[1][name] for name in wrt)),
            )
        packed = np.concatenate([W, b[:, None]], axis=1)
        objective = fl.LinearObjective(loss, X, y, **how)
        if kind.verb == "value":
            return Work(lambda: objective.value(packed), as_it_is)
        out = np.empty_like(packed)
        return Work(
            lambda: objective.value_and_grad(packed, rows, out), lambda r: (r[0], r[1][:, :-1], r[1][:, -1])
        )  # fmt: skip

    return build


def _backend_missing(name: str) -> str | None:
    try:
        backends.get(name)
    except fl.BackendError as error:
        return str(error)
    return None


# --- NumPy ---------------------------------------------------------------------------------------------------------
def _row_max(S: Array) -> Array:
    """NumPy's maximum over short rows costs a call for each row; over columns it is a vector operation."""
    if S.shape[1] > 64:
        return np.asarray(S.max(axis=1))
    highest = S[:, 0].copy()
    for j in range(1, S.shape[1]):
        np.maximum(highest, S[:, j], out=highest)
    return highest


def _softmax_rows(S: Array, flat: Array, G: Array, k: float, grad: bool) -> float:
    """k Σ ℓ; and k times the gradient into G, which may be S. `flat` are the positions of the targets in S."""
    entries = G.reshape(-1)
    np.subtract(S, _row_max(S)[:, None], out=G)
    picked = entries[flat]
    np.exp(G, out=G)
    total = np.einsum("ij->i", G)  # faster than sum(axis=1), and no BLAS threads within ours
    if grad:
        G *= (k / total)[:, None]
        entries[flat] -= k
    return k * float(np.log(total).sum(dtype=np.float64) - picked.sum(dtype=np.float64))


def _hinge_rows(S: Array, flat: Array, G: Array, k: float, grad: bool, power: int = 1) -> float:
    """The same for the hinge: the sum over classes."""
    entries = G.reshape(-1)
    np.subtract(S, (S.reshape(-1)[flat] - 1)[:, None], out=G)
    np.maximum(G, 0, out=G)
    entries[flat] = 0
    value = k * float(G.sum() if power == 1 else np.vdot(entries, entries))
    if grad:
        if power == 1:
            np.multiply(G > 0, k, out=G, dtype=G.dtype)
        else:
            G *= 2 * k
        entries[flat] = -np.einsum("ij->i", G)
    return value


def _hinge_mean_rows(S: Array, flat: Array, G: Array, k: float, grad: bool) -> float:
    return _hinge_rows(S, flat, G, k / S.shape[1], grad)


def _hinge_squared_rows(S: Array, flat: Array, G: Array, k: float, grad: bool) -> float:
    return _hinge_rows(S, flat, G, k, grad, power=2)


def _hinge_max_rows(S: Array, flat: Array, G: Array, k: float, grad: bool) -> float:
    entries = G.reshape(-1)
    picked = S.reshape(-1)[flat]
    np.copyto(G, S)
    entries[flat] = -np.inf
    best = G.argmax(axis=1) + np.arange(len(G)) * G.shape[1]
    margin = np.maximum(entries[best] - picked + 1, 0)
    if grad:
        slope = np.multiply(margin > 0, k, dtype=G.dtype)
        G[...] = 0
        entries[best], entries[flat] = slope, -slope
    return k * float(margin.sum(dtype=np.float64))


_NUMPY_ROWS: dict[str, Callable[..., float]] = {
    "softmax": _softmax_rows,
    "hinge": _hinge_rows,
    "hinge-mean": _hinge_mean_rows,
    "hinge-max": _hinge_max_rows,
    "hinge-squared": _hinge_squared_rows,
}


def _numpy(kind: Kind, threaded: bool) -> Builder:
    """Whole arrays, in place; or blocks of rows that stay in the cache, shared out to Python threads."""
    rows_of = _NUMPY_ROWS[kind.of]
    grad = kind.verb != "value"

    def build(inputs: Inputs, threads: int) -> Work:
        X, y, W, b, rows = inputs
        n, c = X.shape if W is None else (len(X), len(W))
        S = X if W is None else np.empty((n, c), X.dtype)
        G = np.empty_like(S) if W is None and kind.verb != "in-place" else S
        # About 1 MB a block, at least one for each thread.
        step = max(1, min(-(-n // threads), 2**20 // (c * S.itemsize))) if threaded else n
        picked = y if rows is None else y[rows]
        slices = [slice(start, start + step) for start in range(0, n, step)]
        parts = [(S[part], np.arange(len(y[part])) * c + picked[part], G[part], 1 / n, grad) for part in slices]

        def scores() -> tuple[Any, ...]:
            # The pool's own cost would be most of a small job.
            if len(parts) == 1 or S.nbytes < 2**16:
                value = sum(rows_of(*part) for part in parts)
            else:
                value = sum(pool(threads).map(lambda part: rows_of(*part), parts))
            return (value, G) if grad else (value,)

        if W is None:
            return Work(scores, as_it_is)
        assert b is not None
        dW = np.empty_like(W)
        dX = np.empty_like(X) if kind == Kind("layer", "softmax") else None
        taken = X if rows is None else np.empty_like(X)

        def linear() -> tuple[Any, ...]:
            if rows is not None:
                np.take(X, rows, axis=0, out=taken, mode="clip")  # "raise" would buffer the output
            np.matmul(taken, W.T, out=S)
            np.add(S, b, out=S)
            value, *_ = scores()
            if not grad:
                return (value,)
            gradients = np.matmul(G.T, taken, out=dW), G.sum(axis=0)
            return (value, *gradients) if dX is None else (value, *gradients, np.matmul(G, W, out=dX))

        return Work(linear, as_it_is)

    return build


# --- SciPy and scikit-learn ----------------------------------------------------------------------------------------
def _scipy(kind: Kind) -> Builder:
    def build(inputs: Inputs, threads: int) -> Work:
        special: Any = import_module("scipy.special")
        X, y, W, b, _ = inputs
        n = len(y)
        row = np.arange(n)
        if kind.family == "transform":
            transform = getattr(special, kind.of)
            return Work(lambda: transform(X, axis=1), as_it_is)

        def scores(S: Array) -> tuple[Any, ...]:
            log_p = special.log_softmax(S, axis=1)
            loss = -float(log_p[row, y].mean(dtype=np.float64))
            if kind.verb == "value":
                return (loss,)
            G = np.exp(log_p, out=log_p)
            G[row, y] -= 1
            G *= 1 / n
            return loss, G

        def linear() -> tuple[Any, ...]:
            assert W is not None
            S = X @ W.T
            S += b
            loss, G = scores(S)
            return loss, G.T @ X, G.sum(axis=0)

        return Work((lambda: scores(X)) if W is None else linear, as_it_is)

    return build


def _sklearn(kind: Kind) -> Builder:
    """The private losses that LogisticRegression and gradient boosting run on."""

    def build(inputs: Inputs, threads: int) -> Work:
        multinomial: Any = import_module("sklearn._loss").HalfMultinomialLoss
        X, targets, W, b, _ = inputs
        y = targets.astype(X.dtype)
        n = len(X)
        if W is None:
            # Weights 1/N make it the mean over rows, in the same pass.
            rows, weight = multinomial(n_classes=X.shape[1]), np.full(n, 1 / n, X.dtype)
            row_loss, grad = np.empty(n, X.dtype), np.empty_like(X)

            def value() -> float:
                rows.loss(y, X, sample_weight=weight, loss_out=row_loss, n_threads=threads)
                return float(row_loss.sum(dtype=np.float64))

            def gradient() -> tuple[Any, ...]:
                buffers = {"loss_out": row_loss, "gradient_out": grad}
                rows.loss_gradient(y, X, sample_weight=weight, n_threads=threads, **buffers)
                return float(row_loss.sum(dtype=np.float64)), grad

            return Work(value if kind.verb == "value" else gradient, as_it_is)
        assert b is not None
        model: Any = import_module("sklearn.linear_model._linear_loss").LinearModelLoss
        objective = model(multinomial(n_classes=len(W)), fit_intercept=True)
        coef = np.concatenate([W, b[:, None]], axis=1).ravel(order="F")
        if kind.verb == "value":
            return Work(lambda: objective.loss(coef, X, y, n_threads=threads), as_it_is)

        def answer(result: Any) -> tuple[Any, ...]:
            grad = result[1].reshape(len(W), -1, order="F")
            return result[0], grad[:, :-1], grad[:, -1]

        return Work(lambda: objective.loss_gradient(coef, X, y, n_threads=threads), answer)

    return build


# --- PyTorch and JAX: their forms are in modules of their own, which import them --------------------------------------
def _torch(kind: Kind, form: str, compiled: bool = False) -> Builder:
    def build(inputs: Inputs, threads: int) -> Work:
        work: Work = import_module("fastloss.bench.forms_torch").build(kind, form, compiled, inputs, threads)
        return work

    return build


def _jax(kind: Kind, form: str) -> Builder:
    def build(inputs: Inputs, threads: int) -> Work:
        work: Work = import_module("fastloss.bench.forms_jax").build(kind, form, inputs)
        return work

    return build


def _module_missing(name: str, distribution: str) -> str | None:
    return None if find_spec(name) else f"{distribution} is not installed (pip install {distribution})"


def _compiler_missing() -> str | None:
    compiler = os.environ.get("CXX", "g++")
    missing = f"no C++ compiler: {compiler!r} is not found (CXX names another)"
    return _module_missing("torch", "torch") or (None if shutil.which(compiler) else missing)


# --- the table -----------------------------------------------------------------------------------------------------
_TORCH = {
    "softmax": {
        "cross_entropy, autograd": "cross_entropy",
        "log_softmax, in place": "log_softmax_in_place",
        "by hand, in place": "softmax_in_place",
    },
    "hinge": {"multi_margin_loss, autograd": "multi_margin_loss", "by hand, in place": "hinge_in_place"},
    "hinge-mean": {"multi_margin_loss, autograd": "multi_margin_loss_mean"},
    "hinge-max": {"by hand, autograd": "hinge_max"},
    "hinge-squared": {"multi_margin_loss, autograd": "multi_margin_loss_squared"},
}
# The compiler fuses, and does better with whole expressions than with operations in place.
_TORCH_COMPILED = {
    "softmax": {"cross_entropy, autograd": "cross_entropy", "by hand": "softmax"},
    "hinge": {"multi_margin_loss, autograd": "multi_margin_loss", "by hand": "hinge"},
    "hinge-mean": {"multi_margin_loss, autograd": "multi_margin_loss_mean"},
    "hinge-max": {"by hand, autograd": "hinge_max"},
    "hinge-squared": {"multi_margin_loss, autograd": "multi_margin_loss_squared"},
}
_JAX = {
    "softmax": {"value_and_grad": "cross_entropy", "by hand": "softmax"},
    "hinge": {"value_and_grad": "hinge_loss", "by hand": "hinge"},
    "hinge-mean": {"value_and_grad": "hinge_mean"},
    "hinge-max": {"value_and_grad": "hinge_max"},
    "hinge-squared": {"value_and_grad": "hinge_squared"},
}
_LAYER = {
    "linear_cross_entropy": "linear_cross_entropy",
    "linear_cross_entropy, chunks by its options": "linear_cross_entropy_chunked",
    "linear_cross_entropy, chunks of 256 rows": "linear_cross_entropy_256",
}


def _forms(kind: Kind, of: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Variant → form, of those that can do a job."""
    if kind.family == "transform":
        return {kind.of: kind.of}
    forms = dict(of[kind.of])
    if kind.family == "layer":  # where the loss is a small part, one form in place is enough
        forms.pop("log_softmax, in place", None)
    if kind.verb == "in-place":
        return {variant: form for variant, form in forms.items() if form.endswith("in_place")}
    if kind.verb == "value":
        return {variant: form for variant, form in forms.items() if not form.endswith(("in_place", "softmax", "hinge"))}
    return forms


def _by_kind(builder: Callable[..., Builder], of: Mapping[str, Mapping[str, str]], **how: Any) -> dict[str, Any]:
    """Kind → variant → builder, but for kinds that no form can do."""
    found = {name: _forms(kind, of) for name, kind in KINDS.items()}
    return {
        name: {variant: builder(KINDS[name], form, **how) for variant, form in forms.items()}
        for name, forms in found.items()
        if forms
    }


def table() -> dict[str, Peer]:
    """All peers by name, in the order of display; the controls first."""
    fastloss = [
        Peer(
            f"fastloss-{name}",
            "fastloss",
            {kind.name: {"out=": _fastloss(kind, name)} for kind in KINDS.values()},
            why_not=functools.partial(_backend_missing, name),
            dtypes=DTYPES,
            mixes_types=True,
            default="-" not in name,  # not each instruction-set level
        )
        for name in backends.names()
    ]
    by_numpy = {
        kind.name: {"in place": _numpy(kind, False), "blocks in threads": _numpy(kind, True)}
        for kind in KINDS.values()
        if kind.family != "transform"
    }
    plain = ("gradient", "value")
    scipy_jobs = (("scores", "gradient"), ("scores", "value"), ("linear", "gradient"))
    by_scipy = {
        kind.name: {"logsumexp" if kind.of == "logsumexp" else "log_softmax": _scipy(kind)}
        for kind in KINDS.values()
        if kind.family == "transform" or (kind.of == "softmax" and (kind.family, kind.verb) in scipy_jobs)
    }
    by_sklearn = {
        kind.name: {"HalfMultinomialLoss" if kind.family == "scores" else "LinearModelLoss": _sklearn(kind)}
        for kind in KINDS.values()
        if kind.family in ("scores", "linear") and kind.of == "softmax" and kind.verb in plain
    }
    by_torch = _by_kind(_torch, _TORCH)
    by_torch["layer-softmax"] |= {name: _torch(KINDS["layer-softmax"], form) for name, form in _LAYER.items()}
    compiled = _by_kind(_torch, _TORCH_COMPILED, compiled=True)
    by_jax = _by_kind(_jax, _JAX)

    def only_softmax(whose: str, hinge: str) -> Callable[[Kind], str]:
        def reason(kind: Kind) -> str:
            return f"{whose} has no such form of it" if kind.is_softmax else f"{whose} {hinge}"

        return reason

    others = [
        Peer("numpy", "numpy", by_numpy, missing(by_numpy, lambda kind: "SciPy's functions are NumPy code")),
        Peer("scipy", "scipy", by_scipy, missing(by_scipy, only_softmax("SciPy", "has no multiclass hinge"))),
        Peer(
            "scikit-learn",
            "scikit-learn",
            by_sklearn,
            missing(
                by_sklearn,
                only_softmax("scikit-learn", "has the multiclass hinge as a metric only, without gradient"),
            ),
            why_not=functools.partial(_module_missing, "sklearn", "scikit-learn"),
        ),
        Peer(
            "torch",
            "torch",
            by_torch,
            dtypes=SCORE_TYPES,
            why_not=functools.partial(_module_missing, "torch", "torch"),
        ),
        Peer(
            "torch-compile",
            "torch",
            compiled,
            missing(compiled, lambda kind: "its compiler makes new arrays"),
            dtypes=SCORE_TYPES,
            why_not=_compiler_missing,
            slow_to_build=True,
        ),
        Peer(
            "jax",
            "jax",
            by_jax,
            missing(by_jax, lambda kind: "JAX writes to no array in place"),
            dtypes=SCORE_TYPES,
            why_not=functools.partial(_module_missing, "jax", "jax"),
        ),
    ]
    # The same on features of float32, beside those of a byte.
    wide = {kind.name: {"out=": _fastloss(kind, "cython", "float32")} for kind in KINDS.values() if kind.has_features}
    as_float32 = Peer(
        "as float32", "fastloss", wide, missing(wide, lambda kind: "it has no features"), mixes_types=True,
        why_not=functools.partial(_backend_missing, "cython"), control=True,
    )  # fmt: skip
    return {peer.name: peer for peer in (*controls.table(), as_float32, *fastloss, *others)}
