"""The adapter's way for CUDA tensors, without a GPU: the same functions on CPU tensors, with fastloss's calls on device
arrays played by those on the host; and what is said where there is no GPU, or no numba-cuda."""

import numpy as np
import pytest

import fastloss as fl

torch = pytest.importorskip("torch")

from fastloss.adapters import torch as ft  # noqa: E402
from fastloss.adapters.torch import _compute, _cuda, _functions, _operators  # noqa: E402
from fastloss.adapters.torch._arrays import as_array, as_tensor  # noqa: E402


def host(value):
    return as_array(value.contiguous()) if isinstance(value, torch.Tensor) else value


class OnDevice:
    """A loss whose calls are those on device arrays: tensors in and out, losses as tensors of no dimension."""

    def __init__(self, loss):
        self._loss = loss

    def weighs_inside(self, probabilities):
        return self._loss.weighs_inside(probabilities)

    def value(self, scores, targets, **how):
        return torch.as_tensor(self._loss.value(host(scores), host(targets), **how), dtype=torch.float64)

    def value_and_grad(self, scores, targets, out=None, upstream=None, **how):
        how["upstream"] = host(upstream)
        value, grad = self._loss.value_and_grad(host(scores), host(targets), **how)
        found = as_tensor(np.ascontiguousarray(grad))
        if out is None:
            out = found
        else:
            out.copy_(found)
        return torch.as_tensor(value, dtype=torch.float64), out


def linear_value_and_grad(loss, X, W, targets, b=None, *, upstream=None, wrt, **how):
    value, grads = fl.linear_value_and_grad(
        loss._loss, host(X), host(W), host(targets), host(b), upstream=host(upstream), wrt=wrt, **how
    )
    tensors = {name: as_tensor(np.ascontiguousarray(grad)) for name, grad in grads.items()}
    return torch.as_tensor(value, dtype=torch.float64), tensors


@pytest.fixture
def fake_cuda(monkeypatch):
    """CPU tensors go the way of CUDA tensors, in plain eager calls."""
    plain_loss = _compute.plain_loss
    monkeypatch.setattr(_cuda, "require", lambda name, tensor: None)
    monkeypatch.setattr(_operators, "_room", lambda tensor: _cuda)
    monkeypatch.setattr(_cuda, "scale", lambda gradients, upstream: [g.mul_(upstream) for g in gradients])

    class Room:
        Options = _compute.Options

        def __getattr__(self, name):
            return getattr(_compute, name)

        def plain_loss(self, *options):
            return OnDevice(plain_loss(*options))

    class Public:
        linear_value_and_grad = staticmethod(linear_value_and_grad)

    def replace(loss, class_weight):
        import dataclasses

        return OnDevice(dataclasses.replace(loss._loss, class_weight=class_weight))

    class Dataclasses:
        pass

    Dataclasses.replace = staticmethod(replace)
    monkeypatch.setattr(_cuda, "compute", Room())
    monkeypatch.setattr(_cuda, "fl", Public)
    monkeypatch.setattr(_cuda, "dataclasses", Dataclasses)
    # Gradients by the operators go there, too.
    for operator in ("scores_gradient", "linear_gradient"):
        real = getattr(_operators, operator)
        monkeypatch.setattr(_operators, operator, getattr(_cuda, real._name))


def both(ours, theirs, *tensors, **how):
    """Loss and gradients of both, with an upstream gradient that is not 1."""
    answers = []
    for function in (ours, theirs):
        leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
        loss = function(*leaves, **how)
        (loss * torch.linspace(0.5, 2, max(1, loss.numel())).reshape(loss.shape)).sum().backward()
        answers.append((loss.detach(), *(leaf.grad for leaf in leaves if leaf.is_floating_point())))
    return answers


def agree(ours, theirs, *tensors, **how):
    for a, b in zip(*both(ours, theirs, *tensors, **how), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert a.dtype == b.dtype


WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.5, 1.0])
F = torch.nn.functional


@pytest.mark.parametrize("shape", [(5,), (7, 5), (3, 5, 2, 4)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy(fake_cuda, shape, reduction, weight, smoothing):
    torch.manual_seed(0)
    scores = torch.randn(shape)
    target = torch.randint(0, 5, (*shape[:1], *shape[2:]) if len(shape) > 1 else ())
    if target.dim():
        target.reshape(-1)[0] = -100
    how = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    agree(
        lambda s: ft.cross_entropy(s, target, **how), lambda s: F.cross_entropy(s, target, **how), scores
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_probabilities(fake_cuda, reduction, weight, smoothing):
    torch.manual_seed(1)
    scores, target = torch.randn(6, 5, 3), torch.rand(6, 5, 3)
    how = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    agree(lambda s: ft.cross_entropy(s, target, **how), lambda s: F.cross_entropy(s, target, **how), scores)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("p", [1, 2])
def test_multi_margin_loss(fake_cuda, reduction, weight, p):
    torch.manual_seed(2)
    scores, target = torch.randn(6, 5), torch.randint(0, 5, (6,))
    how = {"weight": weight, "reduction": reduction, "p": p}
    agree(lambda s: ft.multi_margin_loss(s, target, **how), lambda s: F.multi_margin_loss(s, target, **how), scores)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("many", [(), (3,)])
def test_linear_cross_entropy(fake_cuda, reduction, weight, smoothing, many):
    torch.manual_seed(3)
    X, W, b = torch.randn(6, 4), torch.randn(5, *many, 4), torch.randn(5, *many)
    target = torch.randint(0, 5, (6, *many))
    target.reshape(-1)[1] = -100
    how = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}

    def theirs(X, W, b):
        scores = torch.einsum("nd,c...d->nc...", X, W) + b
        return F.cross_entropy(scores, target, **how)

    agree(lambda X, W, b: ft.linear_cross_entropy(X, W, target, linear_bias=b, **how), theirs, X, W, b)


def test_a_mean_over_nothing(fake_cuda):
    target = torch.full((4,), -100)
    agree(lambda s: ft.cross_entropy(s, target), lambda s: F.cross_entropy(s, target) * 1, torch.randn(4, 5))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_mean_over_targets_of_weight_0(fake_cuda, smoothing):
    target, how = torch.tensor([2, -100, 2]), {"weight": WEIGHT, "label_smoothing": smoothing}
    assert ft.cross_entropy(torch.randn(3, 5), target, **how).isnan()


def test_negative_weights_within_smoothing_are_turned_away(fake_cuda):
    with pytest.raises(ValueError, match="weight has negative numbers"):
        ft.cross_entropy(torch.randn(4, 5), torch.arange(4), -WEIGHT, label_smoothing=0.1)


def test_sixteen_bits(fake_cuda):
    torch.manual_seed(4)
    scores, target = torch.randn(8, 5).bfloat16(), torch.randint(0, 5, (8,))
    leaf = scores.clone().requires_grad_()
    loss = ft.cross_entropy(leaf, target)
    (3 * loss).backward()
    assert loss.dtype == leaf.grad.dtype == torch.bfloat16
    wide = scores.float().requires_grad_()
    (3 * F.cross_entropy(wide, target)).backward()
    torch.testing.assert_close(leaf.grad.float(), wide.grad, rtol=1e-2, atol=1e-3)


def test_operators_have_a_cuda_implementation():
    for name in ("scores_loss", "scores_gradient", "linear_loss", "linear_gradient"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastloss::{name}", "CUDA"), name


class Elsewhere(torch.Tensor):
    """A tensor that says it is somewhere else."""

    @property
    def device(self):
        return torch.device(self.place)

    @property
    def is_cpu(self):
        return self.device.type == "cpu"


def elsewhere(tensor, place):
    found = tensor.as_subclass(Elsewhere)
    found.place = place
    return found


@pytest.mark.parametrize("reason", ["no GPU was found", "numba-cuda is not installed"])
def test_the_reason_where_there_is_no_gpu(monkeypatch, reason):
    monkeypatch.setattr(_cuda, "why_not", lambda: reason)
    with pytest.raises(ValueError, match=f"input is on cuda:0, where fastloss cannot compute: {reason}"):
        _functions.check_tensors(input=elsewhere(torch.randn(2, 3), "cuda:0"))


def test_other_devices_are_turned_away():
    with pytest.raises(ValueError, match="input is on mps:0, where fastloss cannot compute: it has kernels for"):
        _functions.check_tensors(input=elsewhere(torch.randn(2, 3), "mps:0"))


def test_tensors_on_two_devices(monkeypatch):
    monkeypatch.setattr(_cuda, "why_not", lambda: None)
    with pytest.raises(ValueError, match="target is on cpu, but input on cuda:0; they must be on one device"):
        _functions.check_tensors(input=elsewhere(torch.randn(2, 3), "cuda:0"), target=torch.zeros(2).long())


def test_without_numba_cuda_the_reason_is_that(monkeypatch):
    from fastloss.gpu import device

    device.why_not.cache_clear()
    monkeypatch.setattr(device, "_missing", device.EXTRAS)
    try:
        assert "fastloss[cuda12]" in _cuda.why_not()
    finally:
        device.why_not.cache_clear()
