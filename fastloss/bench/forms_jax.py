"""The strongest forms of each job in JAX: a loss under jit(value_and_grad), and loss and gradient by hand under jit.

JAX has no switch for its threads: it takes as many as the process may use CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from fastloss._checks import Array
from fastloss.bench.peers import Work

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


_AUTOGRAD = (cross_entropy, hinge_loss)


def _linear(form: Callable[..., Any]) -> Callable[..., Any]:
    """The form on top of a linear layer; W and b come first, as value_and_grad's arguments."""
    if form in _AUTOGRAD:
        value_and_grad = jax.value_and_grad(lambda Wb, X, y: form(X @ Wb[0].T + Wb[1], y))

        def by_autograd(X: Any, W: Any, b: Any, y: Any) -> Any:
            loss, (dW, db) = value_and_grad((W, b), X, y)
            return loss, dW, db

        return by_autograd

    def by_hand(X: Any, W: Any, b: Any, y: Any) -> Any:
        loss, G = form(X @ W.T + b, y)
        return loss, G.T @ X, G.sum(axis=0)

    return by_hand


def build(name: str, inputs: Sequence[Array]) -> Work:
    """The job in the form of that name."""
    # Off, JAX makes float32 of float64; on, it would compute indices in 64 bits.
    jax.config.update("jax_enable_x64", inputs[0].dtype == np.float64)
    form = globals()[name]
    if len(inputs) == 4:
        job = jax.jit(_linear(form))
    else:
        job = jax.jit(jax.value_and_grad(form) if form in _AUTOGRAD else form)
    cpu = jax.devices("cpu")[0]
    arrays = [jax.device_put(array, cpu) for array in (*inputs[:-1], inputs[-1].astype(np.int32))]
    return Work(lambda: jax.block_until_ready(job(*arrays)), lambda result: tuple(np.asarray(part) for part in result))
