"""The strongest forms of each job in PyTorch: its fused losses with autograd, and the same by hand.

Forms of (S, y) alone are differentiated by autograd; those that return a pair give loss and gradient themselves;
those with an argument G write the gradient there, in place at every step; those of (X, W, b, y) hold the linear layer.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from fastloss._checks import Array
from fastloss.bench.cases import Inputs, Kind
from fastloss.bench.work import Work

torch: Any = import_module("torch")
F: Any = torch.nn.functional


def cross_entropy(S: Any, y: Any) -> Any:
    return F.cross_entropy(S, y)


def multi_margin_loss_mean(S: Any, y: Any, p: int = 1) -> Any:
    """Over classes, too. It knows no types of 16 bits."""
    return F.multi_margin_loss(S.float() if S.dtype.itemsize == 2 else S, y, p=p)


def multi_margin_loss(S: Any, y: Any) -> Any:
    """The Weston–Watkins sum."""
    return multi_margin_loss_mean(S, y) * S.shape[1]


def multi_margin_loss_squared(S: Any, y: Any) -> Any:
    return multi_margin_loss_mean(S, y, p=2) * S.shape[1]


def hinge_max(S: Any, y: Any) -> Any:
    index = y[:, None]
    others = S.scatter(1, index, -torch.inf)
    return (others.max(1, keepdim=True).values - S.gather(1, index) + 1).clamp_min(0).sum() / len(S)


def linear_cross_entropy(X: Any, W: Any, b: Any, y: Any) -> Any:
    return F.linear_cross_entropy(X, W, y, linear_bias=b)


def linear_cross_entropy_chunked(X: Any, W: Any, b: Any, y: Any) -> Any:
    return F.linear_cross_entropy(X, W, y, linear_bias=b, options=torch.nn.LinearCrossEntropyOptions())


def linear_cross_entropy_256(X: Any, W: Any, b: Any, y: Any) -> Any:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256, chunking_method=None)
    return F.linear_cross_entropy(X, W, y, linear_bias=b, options=options)


def log_softmax_in_place(S: Any, y: Any, G: Any) -> Any:
    index, k = y[:, None], 1 / S.shape[0]
    torch.log_softmax(S, 1, out=G)
    loss = -G.gather(1, index).mean()
    G.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=S.dtype)).mul_(k)
    return loss


def softmax_in_place(S: Any, y: Any, G: Any) -> Any:
    index, k = y[:, None], 1 / S.shape[0]
    torch.sub(S, S.amax(1, keepdim=True), out=G)
    picked = G.gather(1, index)
    total = G.exp_().sum(1, keepdim=True)
    G.mul_(k / total).scatter_add_(1, index, torch.full_like(picked, -k))
    return (total.log_() - picked).mean()


def softmax(S: Any, y: Any) -> Any:
    index, k = y[:, None], 1 / S.shape[0]
    highest = S.amax(1, keepdim=True)
    exps = (S - highest).exp()
    total = exps.sum(1, keepdim=True)
    hit = torch.arange(S.shape[1], device=S.device) == index
    return (total.log() - (S.gather(1, index) - highest)).mean(), (exps * (1 / total) - hit.to(S.dtype)) * k


def hinge_in_place(S: Any, y: Any, G: Any) -> Any:
    index, k = y[:, None], 1 / S.shape[0]
    torch.sub(S, S.gather(1, index) - 1, out=G)
    loss = G.clamp_min_(0).scatter_(1, index, 0).sum() * k
    torch.gt(G, 0, out=G)
    G.scatter_(1, index, -G.sum(1, keepdim=True)).mul_(k)
    return loss


def hinge(S: Any, y: Any) -> Any:
    index, k = y[:, None], 1 / S.shape[0]
    hit = torch.arange(S.shape[1], device=S.device) == index
    above = torch.where(hit, 0, (S - S.gather(1, index) + 1).clamp_min(0))
    active = (above > 0).to(S.dtype)
    return above.sum() * k, torch.where(hit, -active.sum(1, keepdim=True), active) * k


_BY_HAND = (softmax, hinge)
_IN_PLACE = (log_softmax_in_place, softmax_in_place, hinge_in_place)
_FUSED = (linear_cross_entropy, linear_cross_entropy_chunked, linear_cross_entropy_256)
_TRANSFORMS = {"softmax": torch.softmax, "log_softmax": torch.log_softmax, "logsumexp": torch.logsumexp}


def _tensor(array: Array) -> Any:
    if array.dtype.name == "bfloat16":  # a type that PyTorch does not know from NumPy
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _answer(result: Any) -> tuple[Any, ...]:
    parts = [part.detach() for part in (result if isinstance(result, tuple) else (result,))]
    return tuple((part.float() if part.dtype == torch.bfloat16 else part).numpy() for part in parts)


def _linear(form: Callable[..., Any], with_dX: bool) -> Callable[..., Any]:
    """The form on top of a linear layer."""
    if form in _FUSED:
        return form
    if form not in _BY_HAND and form not in _IN_PLACE:
        return lambda X, W, b, y: form(F.linear(X, W, b), y)

    def by_hand(X: Any, W: Any, b: Any, y: Any) -> Any:
        loss, G = form(F.linear(X, W, b), y)
        return (loss, G.T @ X, G.sum(0), G @ W) if with_dX else (loss, G.T @ X, G.sum(0))

    def in_place(X: Any, W: Any, b: Any, y: Any, G: Any, dW: Any) -> Any:
        loss = form(F.linear(X, W, b), y, G)
        torch.mm(G.T, X, out=dW)
        return (loss, dW, G.sum(0), G @ W) if with_dX else (loss, dW, G.sum(0))

    return in_place if form in _IN_PLACE else by_hand


def _of_rows(job: Callable[..., Any], rows: Any) -> Callable[..., Any]:
    return lambda X, W, b, y, *out: job(X[rows], W, b, y[rows], *out)


def compile_form(job: Any) -> Any:
    # A copy of the code: the number of compilations for one code object is limited, and there is one for each shape.
    fresh = types.FunctionType(job.__code__.replace(), job.__globals__, job.__name__, job.__defaults__, job.__closure__)
    return torch.compile(fresh, fullgraph=True, dynamic=False)


def _transform(name: str, compiled: bool, S: Any) -> Work:
    transform = _TRANSFORMS[name]
    if compiled:
        job = compile_form(lambda S: transform(S, 1))
        return Work(lambda: job(S), _answer)
    out = S.new_empty(len(S)) if name == "logsumexp" else torch.empty_like(S)
    return Work(lambda: transform(S, 1, out=out), _answer)


def build(kind: Kind, name: str, compiled: bool, inputs: Inputs, threads: int) -> Work:
    """The job in the form of that name."""
    torch.set_num_threads(threads)
    X, y = _tensor(inputs.X), _tensor(inputs.targets)
    if kind.family == "transform":
        return _transform(name, compiled, X)
    job = form = globals()[name]
    weights = [] if inputs.W is None or inputs.b is None else [_tensor(inputs.W), _tensor(inputs.b)]
    with_dX = kind == Kind("layer", "softmax")
    if weights:
        job = _linear(form, with_dX)
    if inputs.rows is not None:
        job = _of_rows(job, _tensor(inputs.rows))
    if compiled:
        job = compile_form(job)
    given = [X, *weights, y]

    def value() -> Any:
        with torch.no_grad():
            return job(*given)

    if kind.verb == "value":
        return Work(value, _answer)
    if form in _IN_PLACE:
        if weights:
            G, dW = X.new_empty(len(y), len(weights[0])), torch.empty_like(weights[0])
            return Work(lambda: job(*given, G, dW), _answer)
        G = X if kind.verb == "in-place" else torch.empty_like(X)
        return Work(lambda: (job(*given, G), G), _answer)
    if form in _BY_HAND:
        return Work(lambda: job(*given), _answer)
    leaves = [*weights, X] if with_dX else weights or [X]
    for leaf in leaves:
        leaf.requires_grad_()

    def by_autograd() -> Any:
        loss = job(*given)
        return loss, *torch.autograd.grad(loss, leaves)

    return Work(by_autograd, _answer)
