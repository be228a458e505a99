"""The strongest forms of each job in JAX: a loss under jit(value_and_grad), and loss and gradient by hand under jit.

JAX has no switch for its threads: it takes as many as the process may use CPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from fastloss.bench.cases import Inputs, Kind
from fastloss.bench.work import Work

jax: Any = import_module("jax")
jnp: Any = import_module("jax.numpy")


def _picked(S: Any, y: Any) -> Any:
    return jnp.take_along_axis(S, y[:, None], axis=1)


def _hit(S: Any, y: Any) -> Any:
    return jnp.arange(S.shape[1]) == y[:, None]


def cross_entropy(S: Any, y: Any) -> Any:
    """As optax's softmax_cross_entropy_with_integer_labels; log_softmax in its place is slower."""
    return (jax.nn.logsumexp(S, axis=1) - _picked(S, y)[:, 0]).mean()


def softmax(S: Any, y: Any) -> Any:
    shifted = S - S.max(axis=1, keepdims=True)
    exps = jnp.exp(shifted)
    total = exps.sum(axis=1, keepdims=True)
    loss = (jnp.log(total) - _picked(shifted, y)).mean()
    return loss, exps / (len(S) * total) - jnp.where(_hit(S, y), 1 / len(S), 0)


def _above(S: Any, y: Any) -> Any:
    return jnp.where(_hit(S, y), 0, jnp.maximum(S - _picked(S, y) + 1, 0))


def hinge_loss(S: Any, y: Any) -> Any:
    return _above(S, y).sum() / len(S)


def hinge(S: Any, y: Any) -> Any:
    above = _above(S, y)
    active = (above > 0).astype(S.dtype)
    return above.sum() / len(S), jnp.where(_hit(S, y), -active.sum(axis=1, keepdims=True), active) / len(S)


def hinge_mean(S: Any, y: Any) -> Any:
    return hinge_loss(S, y) / S.shape[1]


def hinge_squared(S: Any, y: Any) -> Any:
    return (_above(S, y) ** 2).sum() / len(S)


def hinge_max(S: Any, y: Any) -> Any:
    """As optax's multiclass_hinge_loss."""
    return _above(S, y).max(axis=1).mean()


_BY_HAND = (softmax, hinge)
_TRANSFORMS = {"softmax": jax.nn.softmax, "log_softmax": jax.nn.log_softmax, "logsumexp": jax.nn.logsumexp}


def _linear(form: Callable[..., Any], with_dX: bool) -> Callable[..., Any]:
    """The form on top of a linear layer; what it is differentiated by comes first, as value_and_grad's argument."""
    if form in _BY_HAND:

        def by_hand(X: Any, W: Any, b: Any, y: Any) -> Any:
            loss, G = form(X @ W.T + b, y)
            return (loss, G.T @ X, G.sum(axis=0), G @ W) if with_dX else (loss, G.T @ X, G.sum(axis=0))

        return by_hand

    def loss_of(leaves: Any, X: Any, y: Any) -> Any:
        W, b, *features = leaves
        return form((features[0] if features else X) @ W.T + b, y)

    value_and_grad = jax.value_and_grad(loss_of)

    def by_autograd(X: Any, W: Any, b: Any, y: Any) -> Any:
        loss, gradients = value_and_grad((W, b, X) if with_dX else (W, b), X, y)
        return loss, *gradients

    return by_autograd


def _job(kind: Kind, name: str) -> Callable[..., Any]:
    """The job as a function of the inputs, in their order."""
    if kind.family == "transform":
        return lambda S, y: _TRANSFORMS[name](S, axis=1)
    form: Callable[..., Any] = globals()[name]
    if not kind.has_features:
        by_hand = kind.verb == "value" or form in _BY_HAND
        return form if by_hand else lambda S, y: jax.value_and_grad(form)(S, y)
    if kind.verb == "value":
        return lambda X, y, W, b: form(X @ W.T + b, y)
    job = _linear(form, kind == Kind("layer", "softmax"))
    if kind.verb == "rows":
        return lambda X, y, W, b, rows: job(X[rows], W, b, y[rows])
    return lambda X, y, W, b: job(X, W, b, y)


def build(kind: Kind, name: str, inputs: Inputs) -> Work:
    """The job in the form of that name."""
    # Off, JAX makes float32 of float64; on, it would compute indices in 64 bits.
    jax.config.update("jax_enable_x64", inputs.X.dtype == np.float64)
    job = jax.jit(_job(kind, name))
    cpu = jax.devices("cpu")[0]
    narrow = [a.astype(np.int32) if a.dtype == np.int64 else a for a in inputs if a is not None]
    arrays = [jax.device_put(array, cpu) for array in narrow]

    def answer(result: Any) -> tuple[Any, ...]:
        return tuple(np.asarray(part) for part in (result if isinstance(result, tuple) else (result,)))

    return Work(lambda: jax.block_until_ready(job(*arrays)), answer)
