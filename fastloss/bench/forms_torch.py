"""The strongest forms of each job in PyTorch: its fused losses with autograd, and the same by hand.

Forms of (S, y) alone are differentiated by autograd; those that return a pair give loss and gradient themselves;
those with an argument G write the gradient there, in place at every step.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from fastloss._checks import Array
from fastloss.bench.peers import Work

torch: Any = import_module("torch")
F: Any = torch.nn.functional


def cross_entropy(S: Any, y: Any) -> Any:
    return F.cross_entropy(S, y)


def multi_margin_loss(S: Any, y: Any) -> Any:
    """It is the mean over classes, too: times C it is the Weston–Watkins sum."""
    return F.multi_margin_loss(S, y) * S.shape[1]


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
    hit = torch.arange(S.shape[1]) == index
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
    hit = torch.arange(S.shape[1]) == index
    above = torch.where(hit, 0, (S - S.gather(1, index) + 1).clamp_min(0))
    active = (above > 0).to(S.dtype)
    return above.sum() * k, torch.where(hit, -active.sum(1, keepdim=True), active) * k


_AUTOGRAD = (cross_entropy, multi_margin_loss)
_IN_PLACE = (log_softmax_in_place, softmax_in_place, hinge_in_place)


def _linear(form: Callable[..., Any]) -> Callable[..., Any]:
    """The form on top of a linear layer."""
    if form in _AUTOGRAD:
        return lambda X, W, b, y: form(F.linear(X, W, b), y)

    def by_hand(X: Any, W: Any, b: Any, y: Any) -> Any:
        loss, G = form(F.linear(X, W, b), y)
        return loss, G.T @ X, G.sum(0)

    def in_place(X: Any, W: Any, b: Any, y: Any, G: Any, dW: Any) -> Any:
        loss = form(F.linear(X, W, b), y, G)
        return loss, torch.mm(G.T, X, out=dW), G.sum(0)

    return in_place if form in _IN_PLACE else by_hand


def _compile(job: Any) -> Any:
    # A copy of the code: the number of compilations for one code object is limited, and there is one for each shape.
    fresh = types.FunctionType(job.__code__.replace(), job.__globals__, job.__name__, None, job.__closure__)
    return torch.compile(fresh, fullgraph=True, dynamic=False)


def build(name: str, compiled: bool, inputs: Sequence[Array], threads: int) -> Work:
    """The job in the form of that name."""
    torch.set_num_threads(threads)
    form = globals()[name]
    *features, y = map(torch.from_numpy, inputs)
    linear = len(features) == 3
    job = _linear(form) if linear else form
    if compiled:
        job = _compile(job)

    def answer(result: Any) -> tuple[Any, ...]:
        return tuple(part.detach().numpy() for part in result)

    if form in _AUTOGRAD:
        leaves = [part.requires_grad_() for part in features[1:] or features]

        def run() -> Any:
            loss = job(*features, y)
            return loss, *torch.autograd.grad(loss, leaves)

        return Work(run, answer)
    if form in _IN_PLACE:
        G = features[0].new_empty(len(y), len(features[1]) if linear else features[0].shape[1])
        if linear:
            dW = torch.empty_like(features[1])
            return Work(lambda: job(*features, y, G, dW), answer)
        return Work(lambda: (job(*features, y, G), G), answer)
    return Work(lambda: job(*features, y), answer)
