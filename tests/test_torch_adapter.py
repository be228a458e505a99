"""fastloss.adapters.torch beside PyTorch itself: values, gradients, shapes, dtypes, and what surrounds a loss."""

import doctest
import gc
import itertools
import os
import re
import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import fastloss as fl

torch = pytest.importorskip("torch", reason='the adapter needs PyTorch: pip install "fastloss[torch]"')
pytest.importorskip("ml_dtypes", reason='bfloat16 needs ml_dtypes: pip install "fastloss[torch]"')

import fastloss.adapters.torch as adapter  # noqa: E402
from fastloss.adapters.torch import _arrays, _compute, _operators  # noqa: E402

F = torch.nn.functional
ROOT = Path(__file__).parent.parent

pytestmark = [
    # Options whose kernels are not compiled are computed by the reference, with a warning.
    pytest.mark.filterwarnings("ignore::fastloss.BackendWarning"),
    # PyTorch's compiler and its testing modules warn of themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

REDUCTIONS = ("mean", "sum", "none")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Relative and absolute tolerances. 16-bit results are compared with PyTorch's in float32, rounded: one place apart.
CLOSE = {
    torch.float32: (1e-4, 2e-5),
    torch.float64: (1e-9, 1e-12),
    torch.bfloat16: (2**-7, 1e-6),
    torch.float16: (2**-9, 1e-6),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(found, wanted, what=None):
    rtol, atol = CLOSE[found.dtype]
    message = (lambda text: f"{text}\n{what}") if what is not None else None
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol, equal_nan=True, msg=message)


def widened(value):
    """What PyTorch computes in place of 16-bit floats."""
    is_short = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype.itemsize == 2
    return value.detach().float().requires_grad_(value.requires_grad) if is_short else value


def assert_same(ours, theirs, tensors, *arguments, **options):
    """Value and gradients, by `tensors` that are floats, with a random upstream factor."""
    dtype = tensors[0].dtype
    results = []
    for loss, prepare in ((ours, lambda x: x), (theirs, widened)):
        leaves = [prepare(t.detach().clone().requires_grad_()) for t in tensors]
        value = loss(*leaves, *map(prepare, arguments), **{name: prepare(option) for name, option in options.items()})
        upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(value.dtype)
        value.backward(upstream)
        results.append([value.detach(), *(leaf.grad for leaf in leaves)])
    for found, wanted in zip(*results, strict=True):
        assert found.dtype == dtype
        close(found, wanted.to(dtype), options)


def grid_tensor(*shape, dtype=torch.float32):
    """Multiples of 1/8: margins of the hinge are exact."""
    return (torch.randn(shape) * 8).round().div(8).to(dtype)


def class_weight(kind, n_classes, dtype):
    if kind == "none":
        return None
    weight = torch.rand(n_classes) + 1
    if kind == "signed":  # which PyTorch allows
        weight[0] = -0.5
    return weight.to(dtype)


WEIGHTS = ("none", "positive", "signed")


# --- the same as PyTorch ------------------------------------------------------------------------------------------
# Samples are handled at once, one by one, or copied; classes few and many.
@pytest.mark.parametrize(
    "shape", [(5,), (4, 7), (3, 5, 4), (2, 3, 4, 5), (2, 600, 9), (2, 11, 30, 20), (0, 4)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy(shape, dtype):
    axis = 1 if len(shape) > 1 else 0
    n_classes, rows = shape[axis], shape[:axis] + shape[axis + 1 :]
    for weight, reduction, smoothing in itertools.product(WEIGHTS, REDUCTIONS, (0.0, 0.1)):
        scores = torch.randn(shape).to(dtype)
        options = {
            "weight": class_weight(weight, n_classes, dtype), "reduction": reduction, "label_smoothing": smoothing
        }  # fmt: skip
        target = torch.randint(0, n_classes, rows)
        assert_same(adapter.cross_entropy, F.cross_entropy, [scores], target, **options)
        if target.numel() > 1:
            target.view(-1)[0] = 2
            assert_same(adapter.cross_entropy, F.cross_entropy, [scores], target, ignore_index=2, **options)
        target = torch.rand(shape).to(dtype)
        assert_same(adapter.cross_entropy, F.cross_entropy, [scores, target], **options)


@pytest.mark.parametrize("shape", [(), (5,), (4, 7), (33, 40), (3000, 7)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multi_margin_loss(shape, dtype):
    n_classes = shape[-1] if shape else 1
    targets = [torch.randint(0, n_classes, shape[:-1])]
    if len(shape) == 1:
        targets.append(torch.randint(0, n_classes, (1,)))
    grid = itertools.product(WEIGHTS, REDUCTIONS, (1, 2), (1.0, 0.0, -3.125), targets)
    for weight, reduction, p, margin, target in grid:
        options = {"weight": class_weight(weight, n_classes, dtype), "reduction": reduction, "p": p, "margin": margin}
        scores = grid_tensor(*shape, dtype=dtype)
        assert_same(adapter.multi_margin_loss, F.multi_margin_loss, [scores], target, **options)


def linear_by_scores(loss, input, linear_weight, target, linear_bias=None, **options):
    """The definition: scores by the linear layer, and the loss of them."""
    flat = linear_weight.reshape(-1, linear_weight.shape[-1])
    scores = F.linear(input, flat, None if linear_bias is None else linear_bias.reshape(-1))
    return loss(scores.reshape(*input.shape[:-1], *linear_weight.shape[:-1]), target, **options)


LAYERS = [(None, 3, 5, ()), (7, 4, 6, ()), (5, 3, 4, (2, 3)), (70, 16, 100, ())]


@pytest.mark.parametrize(("n", "d", "n_classes", "many"), LAYERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_losses(n, d, n_classes, many, dtype):
    batch = () if n is None else (n,)
    theirs = partial(linear_by_scores, F.cross_entropy)
    hinge = partial(linear_by_scores, F.multi_margin_loss)
    for weight, reduction, with_bias in itertools.product(WEIGHTS, REDUCTIONS, (False, True)):
        tensors = [grid_tensor(*batch, d, dtype=dtype), grid_tensor(n_classes, *many, d, dtype=dtype)]
        options = {"weight": class_weight(weight, n_classes, dtype), "reduction": reduction}
        if with_bias:
            tensors.append(grid_tensor(n_classes, *many, dtype=dtype))

        def call(loss, target, input, linear_weight, linear_bias=None, **options):
            return loss(input, linear_weight, target, linear_bias=linear_bias, **options)

        def check(ours, theirs, target, tensors=tensors, **options):
            target = target if dtype.itemsize > 2 or not target.is_floating_point() else target.to(dtype)
            assert_same(partial(call, ours, target), partial(call, theirs, widened(target)), tensors, **options)

        target = torch.randint(0, n_classes, (*batch, *many))
        check(adapter.linear_cross_entropy, theirs, target, **options)
        check(adapter.linear_cross_entropy, theirs, target, label_smoothing=0.1, **options)
        if n is not None:
            target[0] = 2
            check(adapter.linear_cross_entropy, theirs, target, ignore_index=2, **options)
        check(adapter.linear_cross_entropy, theirs, torch.rand(*batch, n_classes, *many), **options)
        if not many:
            check(adapter.linear_multi_margin_loss, hinge, target, p=2, margin=0.5, **options)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:linear_cross_entropy")  # PyTorch's, of options that it does not take here
@pytest.mark.parametrize("name", ["CrossEntropyLoss", "MultiMarginLoss", "LinearCrossEntropyLoss"])
def test_samples_of_pytorch_itself(name):
    """The inputs that PyTorch tests its modules with, and its references for them."""
    modules = pytest.importorskip(
        "torch.testing._internal.common_modules", reason="PyTorch's test modules need expecttest"
    )
    samples = getattr(modules, f"module_inputs_torch_nn_{name}", None)
    theirs = getattr(torch.nn, name, None)
    if samples is None or theirs is None:
        pytest.skip(f"this PyTorch has no {name}, or no samples of it")
    count = 0
    for sample in samples(None, device="cpu", dtype=torch.float64, requires_grad=True, training=True):
        arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
        ours, wanted = getattr(adapter, name)(*arguments, **options), theirs(*arguments, **options)
        ours.load_state_dict(wanted.state_dict())
        results = []
        for module in (ours, wanted):
            tensors = [
                t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t
                for t in sample.forward_input.args
            ]
            value = module(*tensors, **sample.forward_input.kwargs)
            value.sum().backward()
            leaves = [*module.parameters(), *(t for t in tensors if t.requires_grad)]
            results.append([value.detach(), *(leaf.grad for leaf in leaves)])
        for found, expected in zip(*results, strict=True):
            close(found, expected, sample.desc)
        if sample.reference_fn is not None:
            reference = sample.reference_fn(ours, *(t.detach() for t in tensors))
            close(results[0][0], reference.detach(), sample.desc)
        count += 1
    assert count > 5


def test_modules_are_drop_in():
    module = adapter.CrossEntropyLoss(weight=torch.ones(4), label_smoothing=0.1)
    assert isinstance(module, torch.nn.CrossEntropyLoss)
    assert isinstance(adapter.MultiMarginLoss(p=2), torch.nn.MultiMarginLoss)
    for head in (adapter.LinearCrossEntropyLoss(3, 4, bias=True), adapter.LinearMultiMarginLoss(3, 4, bias=True)):
        assert set(head.state_dict()) == {"linear.weight", "linear.bias"}
        assert "num_classes=4" in repr(head)
        head(torch.ones(2, 3), torch.tensor([0, 3])).backward()
        assert head.linear.bias.grad.shape == (4,)


def test_legacy_arguments_stand_for_a_reduction():
    scores, target = torch.randn(4, 3), torch.randint(0, 3, (4,))
    for size_average, reduce in itertools.product((None, True, False), repeat=2):
        if size_average is reduce is None:
            continue
        for ours, theirs in (
            (adapter.cross_entropy, F.cross_entropy),
            (adapter.multi_margin_loss, F.multi_margin_loss),
        ):
            options = {"size_average": size_average, "reduce": reduce}
            with pytest.warns(UserWarning, match="reduction="):
                found = ours(scores, target, **options)
            with pytest.warns(UserWarning, match="reduction="):
                wanted = theirs(scores, target, **options)
            close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_targets_of_any_integer_type(dtype):
    scores, target = torch.randn(40, 3), torch.randint(0, 3, (40,))
    close(adapter.cross_entropy(scores, target.to(dtype)), F.cross_entropy(scores, target))


def test_means_over_nothing():
    """NaN, as PyTorch's, and no gradient."""
    for n in (3, 3000):
        scores = torch.randn(n, 10, requires_grad=True)
        value = adapter.cross_entropy(scores, torch.full((n,), -100), reduction="mean")
        value.backward()
        assert value.isnan()
        assert (scores.grad == 0).all()
        weight = torch.zeros(10, 4, requires_grad=True)
        value = adapter.linear_cross_entropy(torch.randn(n, 4), weight, torch.full((n,), -100))
        value.backward()
        assert value.isnan()
        assert (weight.grad == 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_means_over_targets_of_weight_0(dtype, smoothing):
    """Value and gradient are NaN, as PyTorch's; those of ignored rows are 0."""
    some = torch.tensor([0, 0, 1, 2.0]).to(dtype)

    def layer(loss, input, linear_weight, bias, target, **options):
        return loss(input, linear_weight, target, linear_bias=bias, **options)

    for weight, ignored in itertools.product((some, 0 * some), (-100, 1)):
        options = {"weight": weight, "label_smoothing": smoothing, "ignore_index": ignored}
        for shape in ((4,), (6, 4), (6, 4, 2), (2, 4, 60, 40)):
            target = torch.arange(shape[0]) % 2 if len(shape) > 1 else torch.tensor(0)
            if len(shape) > 2:
                target = target.reshape(-1, *(1,) * (len(shape) - 2)).expand(-1, *shape[2:])
            assert_same(adapter.cross_entropy, F.cross_entropy, [torch.randn(shape).to(dtype)], target, **options)
        for target in (torch.tensor([0, 1, 1, 0, 1]), torch.tensor([[0, 1], [1, 1], [1, 1]])):
            n, *positions = target.shape
            tensors = [torch.randn(shape).to(dtype) for shape in ((n, 3), (4, *positions, 3), (4, *positions))]
            by_scores = partial(linear_by_scores, F.cross_entropy)
            assert_same(
                partial(layer, adapter.linear_cross_entropy), partial(layer, by_scores), tensors, target, **options
            )


def test_means_over_weight_0_of_probabilities_and_of_the_hinge_are_0():
    """They are over rows."""
    scores, weight = torch.randn(2, 3), torch.tensor([0, 0, 1.0])
    for q in (torch.tensor([[0.5, 0.5, 0], [0, 1, 0]]), torch.zeros(2, 3)):
        for smoothing in (0.0, 0.1):
            options = {"weight": weight, "label_smoothing": smoothing}
            assert_same(adapter.cross_entropy, F.cross_entropy, [scores, q], **options)
    assert_same(adapter.multi_margin_loss, F.multi_margin_loss, [scores], torch.tensor([0, 1]), weight=weight)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_mean_over_weights_that_cancel_is_infinite(sign):
    scores, target = torch.tensor([[0.0, 1, 2], [3, 1, 0]]), torch.tensor([0, 1])
    weight = sign * torch.tensor([1, -1, 0.5])
    value = adapter.cross_entropy(scores, target, weight)
    assert value == F.cross_entropy(scores, target, weight) == sign * torch.inf


def test_nan_is_not_swallowed():
    scores = torch.zeros(3, 4)
    scores[1, 2] = torch.nan
    target = torch.tensor([0, 1, 3])
    assert F.multi_margin_loss(scores, target).isfinite()
    assert adapter.multi_margin_loss(scores, target).isnan()
    rows = adapter.multi_margin_loss(scores, target, reduction="none")
    assert rows.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_upstream_factors_that_are_not_finite_or_zero(reduction):
    for n in (4, 4000):
        scores, target = torch.randn(n, 5, requires_grad=True), torch.randint(0, 5, (n,))
        value = adapter.cross_entropy(scores, target, reduction=reduction)
        upstream = torch.ones_like(value)
        if reduction == "none":
            upstream[1:3] = torch.tensor([torch.nan, 0])
        else:
            upstream.fill_(torch.nan)
        (found,) = torch.autograd.grad(value, scores, upstream)
        (wanted,) = torch.autograd.grad(F.cross_entropy(scores, target, reduction=reduction), scores, upstream)
        close(found, wanted)
    weight = torch.zeros(5, 3, requires_grad=True)
    value = adapter.linear_cross_entropy(torch.ones(4, 3), weight, torch.arange(4), reduction=reduction)
    value.backward(torch.full_like(value, torch.nan))
    assert weight.grad.isnan().all()


# --- layouts and memory ---------------------------------------------------------------------------------------------
def layouts(shape):
    x = torch.randn(shape)
    yield "contiguous", x
    yield "class axis last", x.movedim(1, -1).contiguous().movedim(-1, 1)
    yield "every second", torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    yield "expanded", torch.randn(1, *shape[1:]).expand(shape)
    yield "batch last", x.movedim(0, -1).contiguous().movedim(-1, 0)


@pytest.mark.parametrize("shape", [(6, 5), (1500, 20), (3, 5, 4, 6), (3, 7, 30, 40)], ids=str)
def test_layouts(shape):
    """Gradients have the strides that PyTorch's `empty_like` gives."""
    for name, x in layouts(shape):
        target = torch.randint(0, shape[1], shape[:1] + shape[2:])
        for reduction in REDUCTIONS:
            leaf = x.detach().requires_grad_()
            (found,) = torch.autograd.grad(adapter.cross_entropy(leaf, target, reduction=reduction).sum(), leaf)
            (wanted,) = torch.autograd.grad(F.cross_entropy(leaf, target, reduction=reduction).sum(), leaf)
            close(found, wanted, name)
            if x.numel() > _compute.SMALL or x.dim() > 2 or reduction == "none":
                assert found.stride() == torch.empty_like(x).stride(), name


def test_no_copy_where_the_class_axis_is_contiguous():
    for x in (torch.randn(6, 5), torch.randn(6, 5).T, torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)):
        (matrix,) = _compute._matrices(x)
        assert matrix.data_ptr() == x.data_ptr()
    samples = _compute._matrices(torch.randn(2, 7, 30, 40))  # nor where it is not, if samples are large
    assert [s.shape for s in samples] == [(1200, 7)] * 2


def large_gradient(scores, target):
    (gradient,) = torch.autograd.grad(adapter.cross_entropy(scores, target), scores)
    return gradient


def test_memory_of_large_gradients_is_used_again_but_never_while_it_is_held():
    adapter.empty_cache()
    scores = torch.randn(3000, 400, requires_grad=True)
    assert scores.nbytes >= _arrays.LARGE
    target = torch.randint(0, 400, (3000,))
    first = large_gradient(scores, target)
    kept, view = first.clone(), first[5:7].numpy()
    del first
    second = large_gradient(-scores, target)
    assert np.array_equal(view, kept[5:7].numpy())  # an array is a holder, too
    place = second.data_ptr()
    del second, view
    gc.collect()
    third = large_gradient(scores, target)
    assert third.data_ptr() == place
    assert torch.equal(third, kept)
    assert third.data_ptr() % 64 == 0
    adapter.empty_cache()
    assert torch.equal(third, kept)


def peak(work):
    """Bytes that were allocated at most, by NumPy and fastloss."""
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_multi_margin_loss"])
def test_linear_losses_hold_no_array_of_scores(name, reduction):
    n, d, n_classes = 4096, 8, 8192
    loss = getattr(adapter, name)
    input, weight = torch.randn(n, d, requires_grad=True), torch.randn(n_classes, d, requires_grad=True)
    target = torch.randint(0, n_classes, (n,))

    def work():
        loss(input, weight, target, reduction=reduction).sum().backward()

    # Chunks take up to 36 MB, by fastloss's documentation; the scores are 128 MB.
    assert peak(work) < n * n_classes * 4 / 2


def test_chunk_size_of_options():
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        pytest.skip("this PyTorch has no LinearCrossEntropyOptions")
    input, weight, target = torch.randn(4096, 8), torch.randn(2048, 8), torch.randint(0, 2048, (4096,))
    chosen = options(batch_chunk_size=64, chunking_method=None)
    few = peak(lambda: adapter.linear_cross_entropy(input, weight, target, options=chosen))
    assert few < peak(lambda: adapter.linear_cross_entropy(input, weight, target)) / 4
    close(
        adapter.linear_cross_entropy(input, weight, target, options=chosen),
        F.linear_cross_entropy(input, weight, target),
    )


def test_no_gradient_is_computed_when_none_is_required(monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("a gradient was computed")

    wanted = []
    linear_value_and_grad = fl.linear_value_and_grad

    def watch(*arguments, wrt, **options):
        wanted.append(set(wrt))
        return linear_value_and_grad(*arguments, wrt=wrt, **options)

    monkeypatch.setattr(fl.Loss, "value_and_grad", never)
    monkeypatch.setattr(fl, "linear_value_and_grad", watch)
    weight, target = torch.randn(5, 3, requires_grad=True), torch.randint(0, 5, (4,))
    for scores in (torch.randn(4, 5), torch.randn(4, 5, requires_grad=True)):
        with torch.set_grad_enabled(not scores.requires_grad):
            adapter.cross_entropy(scores, target)
            adapter.multi_margin_loss(scores, target)
            adapter.linear_cross_entropy(torch.randn(4, 3), weight.detach(), target)
    assert wanted == [set(), set()]
    adapter.linear_cross_entropy(torch.randn(4, 3), weight, target).backward()
    adapter.linear_cross_entropy(torch.randn(4, 3, requires_grad=True), weight.detach(), target)
    assert wanted[2:] == [{"W"}, {"X"}]


def test_a_graph_that_is_kept_gives_the_same_again():
    for n in (6, 6000):
        scores, target = torch.randn(n, 5, requires_grad=True), torch.randint(0, 5, (n,))
        input, weight = torch.randn(n, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
        for value in (adapter.cross_entropy(scores, target), adapter.linear_cross_entropy(input, weight, target)):
            leaves = [scores] if value.grad_fn.name().startswith("_EagerScores") else [input, weight]
            first = torch.autograd.grad(value, leaves, retain_graph=True)
            copies = [g.clone() for g in first]
            second = torch.autograd.grad(3 * value, leaves)
            for a, b, c in zip(first, copies, second, strict=True):
                assert torch.equal(a, b)
                close(c, 3 * b)


def test_targets_changed_before_the_backward_pass_are_noticed():
    scores, target = torch.randn(4000, 5, requires_grad=True), torch.zeros(4000, dtype=torch.long)
    value = adapter.cross_entropy(scores, target, reduction="none").sum()
    target += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


# --- what surrounds a loss --------------------------------------------------------------------------------------------
N, D, C = 6, 4, 5


def problem():
    make = partial(torch.randn, dtype=torch.float64, requires_grad=True)
    target, weight = torch.randint(0, C, (N,)), torch.rand(C, dtype=torch.float64)
    return make(N, C), make(N, D), make(C, D), make(C), target, weight


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction):
    scores, input, linear, bias, target, weight = problem()
    check = partial(torch.autograd.gradcheck)
    options = {"weight": weight, "reduction": reduction}
    assert check(lambda s: adapter.cross_entropy(s, target, **options), (scores,))
    assert check(lambda s, q: adapter.cross_entropy(s, q, label_smoothing=0.1, **options), (scores, torch.rand_like(scores).requires_grad_()))  # fmt: skip  # noqa: E501
    assert check(lambda s: adapter.multi_margin_loss(s, target, p=2, **options), (scores,))
    for loss in (adapter.linear_cross_entropy, partial(adapter.linear_multi_margin_loss, p=2)):
        assert check(lambda x, w, b, loss=loss: loss(x, w, target, linear_bias=b, **options), (input, linear, bias))


@pytest.mark.parametrize("reduction", ["mean", pytest.param("sum", marks=pytest.mark.full), "none"])
def test_opcheck(reduction):
    scores, input, linear, bias, target, weight = problem()
    upstream = torch.randn(N if reduction == "none" else (), dtype=torch.float64)
    check, every = torch.library.opcheck, [True] * 3
    for options in (("softmax", 1, 1.0, 0.1, -100, reduction), ("hinge", 2, 0.5, 0.0, None, reduction)):
        check(_operators.scores_loss.op, (scores, target, weight, *options, False))
        check(_operators.scores_loss.op, (scores.detach().half(), target, None, *options, True))
        check(_operators.scores_gradient.op, (upstream, scores.detach(), target, weight, *options))
        layer = (input, linear, target, bias, weight)
        check(_operators.linear_loss.op, (*layer, *options, False, None, every))
        check(
            _operators.linear_loss.op,
            (input.detach(), linear, target, None, None, *options, False, 4, [False, True, False]),
        )
        plain = [t.detach() for t in layer]
        check(_operators.linear_gradient.op, (upstream, *plain, *options, None, every))
    large = torch.randn(2, 300, 2000)  # its gradient is in memory that is kept
    assert large.nbytes > _arrays.LARGE
    for x in (large, large.mT):
        target = torch.zeros(2, x.shape[2], dtype=torch.long)
        up = torch.randn(target.shape if reduction == "none" else ())
        check(_operators.scores_gradient.op, (up, x, target, None, *options))
    q = torch.rand(3, 4, 5, 2).double()
    options = ("softmax", 1, 1.0, 0.1, None, reduction)
    upstream = torch.randn((3, 5, 2) if reduction == "none" else (), dtype=torch.float64)
    for x in (torch.randn(q.shape).double(), torch.randn(q.shape).double().to(memory_format=torch.channels_last)):
        check(_operators.scores_loss.op, (x.requires_grad_(), q, None, *options, False))
        check(_operators.scores_gradient.op, (upstream, x.detach(), q, None, *options))


def compiled_losses():
    yield "cross_entropy", lambda s, x, w, b, y: adapter.cross_entropy(s.sin(), y), "inductor", {}
    yield "rows", lambda s, x, w, b, y: adapter.cross_entropy(s.sin(), y, reduction="none").exp(), "aot_eager", {}
    yield "dynamic", lambda s, x, w, b, y: adapter.multi_margin_loss(s.sin(), y, p=2), "aot_eager", {"dynamic": True}
    yield "module", lambda s, x, w, b, y: adapter.CrossEntropyLoss(label_smoothing=0.1)(s, y), "aot_eager", {}
    yield (
        "linear", lambda s, x, w, b, y: adapter.linear_cross_entropy(x.sin(), w, y, linear_bias=b), "inductor", {}
    )  # fmt: skip
    yield (
        "linear rows", lambda s, x, w, b, y: adapter.linear_multi_margin_loss(x, w, y, p=2, reduction="none"),
        "aot_eager", {},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "backend", "options"), [pytest.param(*rest, id=name) for name, *rest in compiled_losses()]
)
def test_compile_without_graph_breaks(loss, backend, options):
    torch._dynamo.reset()
    *floats, target, _ = problem()
    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend=backend, **options)):
        leaves = [t.detach().clone().requires_grad_() for t in floats]
        value = call(*leaves, target)
        (3 * value.sum()).backward()
        results.append([value.detach(), *(t.grad for t in leaves if t.grad is not None)])
    for found, wanted in zip(*results, strict=True):
        close(found, wanted)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_may_be_compiled():
    """Once, those with a gradient raised, in PyTorch's words of `setup_context`."""
    func = torch.func
    scores, input, linear, _, target, weight = (t.detach() for t in problem())

    def total(loss):
        return lambda s: (loss(s, target, weight=weight, reduction="none") ** 2).sum()

    def layer(loss):
        return lambda w: loss(input, w, target)

    def second(loss):
        return func.grad(lambda w: func.grad(layer(loss))(w).sum())

    hinges = adapter.multi_margin_loss, F.multi_margin_loss
    for make, ours, theirs, leaf in (
        (lambda f: func.grad(total(f)), adapter.cross_entropy, F.cross_entropy, scores),
        (lambda f: func.jacrev(func.grad(total(f))), adapter.cross_entropy, F.cross_entropy, scores),
        (lambda f: func.vmap(func.grad(partial(f, target=target[0]))), *hinges, scores),
        (lambda f: func.grad(layer(f)), adapter.linear_cross_entropy, F.linear_cross_entropy, linear),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(make(ours), fullgraph=True, backend="aot_eager")
        close(compiled(leaf), make(theirs)(leaf))
    for transform, message in (
        (second(adapter.linear_cross_entropy), "no second derivatives"),
        (func.hessian(layer(adapter.linear_cross_entropy)), "no forward mode"),
    ):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=message):
            torch.compile(transform, fullgraph=True, backend="aot_eager")(linear)


def test_autocast():
    """16-bit scores give a float32 loss; a layer's tensors may be of several types, and are not rounded."""
    scores, input, linear, _, target, _ = (t.detach().float() if t.is_floating_point() else t for t in problem())
    for dtype in (torch.bfloat16, torch.float16):
        short = scores.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            ours, theirs = adapter.cross_entropy(short, target), F.cross_entropy(short, target)
            hinge, their_hinge = adapter.multi_margin_loss(short, target), F.multi_margin_loss(short, target)
            layer = adapter.linear_cross_entropy(input.to(dtype), linear, target)
            their_layer = F.linear_cross_entropy(input.to(dtype), linear, target)
        assert {t.dtype for t in (ours, theirs, hinge, their_hinge, layer, their_layer)} == {torch.float32}
        close(ours, F.cross_entropy(short.float(), target))
        close(hinge, their_hinge)
        close(layer, F.linear_cross_entropy(input.to(dtype).float(), linear, target))
        ours.backward()
        assert short.grad.dtype == dtype


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap calls the operators one by one
def test_transforms():
    scores, input, linear, _, target, _ = (t.detach() for t in problem())
    func = torch.func
    pairs = [(adapter.cross_entropy, F.cross_entropy), (adapter.multi_margin_loss, F.multi_margin_loss)]
    for ours, theirs in pairs:
        close(func.grad(ours)(scores, target), func.grad(theirs)(scores, target))
        rows = [func.jacrev(partial(loss, reduction="none"))(scores, target) for loss in (ours, theirs)]
        close(*rows)
    close(
        *(func.grad(loss, 1)(input, linear, target) for loss in (adapter.linear_cross_entropy, F.linear_cross_entropy))
    )


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_example_by_vmap():
    scores, input, linear, _, target, _ = (t.detach() for t in problem())
    each = torch.func.vmap(torch.func.grad(adapter.cross_entropy))(scores, target)
    close(each, torch.func.vmap(torch.func.grad(F.cross_entropy))(scores, target))

    def of_weight(loss):
        grad = torch.func.grad(lambda w, x, y: loss(x, w, y))
        return torch.func.vmap(grad, (None, 0, 0))(linear, input, target)

    close(of_weight(adapter.linear_cross_entropy), of_weight(F.linear_cross_entropy))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivatives(reduction):
    """Those of scores, of their target probabilities and of upstream factors; and third ones."""
    torch.manual_seed(5)
    weight = torch.rand(5).double()
    for shape in [(5,), (3, 5), (2, 5, 3)]:
        scores, rows = torch.randn(shape).double(), shape[:1] * (len(shape) > 1) + shape[2:]
        target, q = torch.randint(0, 5, rows), torch.rand(shape).double()
        if len(shape) == 3:
            target[0, 0] = -100
        for options, targets in itertools.product(
            ({}, {"weight": weight, "label_smoothing": 0.3}), ((target, scores), (q, scores, q))
        ):
            results = []
            for loss in (adapter.cross_entropy, F.cross_entropy):
                y, *leaves = (t.clone().requires_grad_(t.is_floating_point()) for t in (targets[0], scores))
                leaves += [y] * (len(targets) == 3)
                value = loss(leaves[0], y, reduction=reduction, **options)
                upstream = torch.linspace(0.5, 1.5, value.numel()).double().reshape(value.shape).requires_grad_()
                (first,) = torch.autograd.grad(value, leaves[0], upstream, create_graph=True)
                second = torch.autograd.grad((first.sin() * q).sum(), [*leaves, upstream], create_graph=True)
                third = torch.autograd.grad(sum(t.square().sum() for t in second), leaves)
                results.append([first, *second, *third])
            for found, wanted in zip(*results, strict=True):
                close(found, wanted)
    scores, target = torch.randn(3, 5).double().requires_grad_(), torch.randint(0, 5, (3,))
    for p in (1, 2):
        hinge = partial(adapter.multi_margin_loss, p=p, weight=weight, reduction=reduction)
        assert torch.autograd.gradgradcheck(lambda s, hinge=hinge: hinge(s, target), (scores,))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_second_derivatives_by_transforms():
    scores, *_, target, _ = (t.detach() for t in problem())
    hessians = [
        torch.func.jacrev(torch.func.grad(loss))(scores, target) for loss in (adapter.cross_entropy, F.cross_entropy)
    ]
    close(*hessians)


def test_second_derivatives_of_layers_and_forward_mode_raise():
    scores, input, linear, _, target, _ = problem()
    loss = partial(adapter.linear_cross_entropy, input, target=target)
    (gradient,) = torch.autograd.grad(loss(linear), linear, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives of a linear layer"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.func.grad(lambda w: torch.func.grad(loss)(w).sum())(linear.detach())
    for loss, leaf in (
        (lambda s: adapter.cross_entropy(s, target), scores),
        (lambda s: adapter.cross_entropy(s.repeat(1000, 1), target.repeat(1000)), scores),
        (lambda w: adapter.linear_cross_entropy(input, w, target), linear),
    ):
        plain = leaf.detach()
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.func.jvp(loss, (plain,), (plain,))
        with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            loss(torch.autograd.forward_ad.make_dual(plain, plain))


def test_calls_that_are_watched_go_to_the_operators():
    """Modes of dispatch see an operator, and tensors without data get their shapes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    scores, target = torch.randn(4, 5), torch.randint(0, 5, (4,))
    with Watch():
        adapter.cross_entropy(scores, target)
    assert "fastloss.scores_loss.default" in seen
    meta = adapter.cross_entropy(scores.to("meta"), target.to("meta"), reduction="none")
    assert meta.shape == (4,)
    assert meta.device.type == "meta"


# --- errors -----------------------------------------------------------------------------------------------------------
def errors():
    s, y, x, w = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), torch.zeros(4, 2), torch.zeros(3, 2)
    bad = torch.tensor([0, 1, 3, 0])
    ce, mm, lce = adapter.cross_entropy, adapter.multi_margin_loss, adapter.linear_cross_entropy
    lmm = adapter.linear_multi_margin_loss
    yield lambda: ce(s, bad), IndexError, r"target\[2\] is 3; it must be a class from 0 to 2 or ignore_index, -100"
    yield lambda: ce(s.T[None].repeat(2, 1, 1), torch.stack([y, bad])), IndexError, r"target\[1, 2\] is 3"
    yield lambda: ce(s, -bad, torch.ones(3)), IndexError, r"target\[1\] is -1"
    yield lambda: mm(s, bad), IndexError, r"target\[2\] is 3; it must be a class from 0 to 2$"
    yield lambda: lce(x, w, bad, weight=torch.ones(3)), IndexError, r"target\[2\] is 3"
    yield lambda: lce(x, w.clone().requires_grad_(), bad, weight=torch.ones(3)), IndexError, r"target\[2\] is 3"
    yield lambda: ce(s, y[:3]), ValueError, r"target has shape \(3,\); class indices must be \(4,\)"
    yield lambda: ce(s, y.float()), ValueError, r"target has shape \(4,\); probabilities must have the scores' shape"
    yield lambda: ce(s, s.long()), ValueError, r"target has shape \(4, 3\)"
    yield lambda: ce(s, y.bool()), TypeError, r"target is torch.bool; class indices must be integers"
    yield lambda: mm(s, s), TypeError, r"target is torch.float32; class indices must be integers"
    yield lambda: ce(s.long(), y), TypeError, r"input is torch.int64; it must be float32, float64, bfloat16 or float16"
    yield lambda: ce(s.numpy(), y), TypeError, r"input is ndarray; it must be a tensor"
    yield lambda: ce(torch.zeros(4, 0), y), ValueError, r"input has shape \(4, 0\); there must be at least one class"
    yield lambda: ce(torch.zeros(()), y), ValueError, r"at least one class"
    yield lambda: mm(torch.zeros(2, 3, 4), y), ValueError, r"input has shape \(2, 3, 4\); it must be \(C,\) or \(N, C\)"
    yield lambda: ce(s, y, torch.ones(4)), ValueError, r"weight has shape \(4,\); it must be \(3,\)"
    yield lambda: ce(s, y, torch.full((3,), torch.nan)), ValueError, r"class_weight\[0\] is nan"
    yield lambda: ce(s, y, reduction="avg"), ValueError, r"reduction is 'avg'; it must be one of"
    yield lambda: ce(s, y, label_smoothing=1.5), ValueError, r"label_smoothing is 1.5; it must be a number from 0 to 1"
    yield lambda: ce(s, s, ignore_index=1), ValueError, r"ignore_index is 1; it has no meaning"
    yield lambda: ce(s, s - 1), ValueError, r"finite and not negative"
    yield lambda: mm(s, y, p=3), ValueError, r"p is 3; it must be one of 1, 2"
    yield lambda: mm(s, y, margin=torch.inf), ValueError, r"margin is inf; it must be a finite number"
    yield lambda: lce(x, torch.zeros(3, 5), y), ValueError, r"linear_weight has shape \(3, 5\); it must be \(C, 2\)"
    yield (
        lambda: lce(x, w, y, linear_bias=torch.zeros(2)),
        ValueError,
        r"linear_bias has shape \(2,\); it must be \(3,\)",
    )
    yield lambda: lce(x[None], w, y), ValueError, r"input has shape \(1, 4, 2\); it must be \(D,\) or \(N, D\)"
    yield lambda: lce(x[0], w[:, None], y[0]), ValueError, r"for one example \(D,\) it must be \(C, D\)"
    yield lambda: lmm(x, w[:, None], y[:, None]), ValueError, r"for this loss it must be \(C, D\)"
    yield lambda: lce(x.double(), w, y), TypeError, r"float32, torch.float64; they must have one dtype"
    yield lambda: adapter.LinearMultiMarginLoss(2, 3, p=3), ValueError, r"p is 3"
    yield lambda: ce(s, y, label_smoothing="a"), TypeError, r"label_smoothing is 'a'; it must be a number"
    yield lambda: ce(s, y, ignore_index=2.0), TypeError, r"ignore_index is 2.0; it must be an integer"
    yield lambda: ce(s, y, ignore_index=None), TypeError, r"ignore_index is None; it must be an integer"
    yield lambda: mm(s, y, margin=None), TypeError, r"margin is None; it must be a number"
    yield lambda: ce(s.to_sparse(), y), TypeError, r"input has layout torch.sparse_coo.*input\.to_dense\(\)"
    yield lambda: lce(x, w, y, options=7), TypeError, r"options is 7; it must be a torch\.nn\.LinearCrossEntropyOptions"
    yield lambda: adapter.LinearCrossEntropyLoss(2, 3, weight=torch.ones(2)), ValueError, r"weight has shape \(2,\)"


@pytest.mark.parametrize(("call", "kind", "message"), [pytest.param(*e, id=e[2][:40]) for e in errors()])
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_tensors_on_a_gpu_raise_with_the_reason():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # needs no GPU
        scores, target = torch.empty(4, 3, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda")
        with pytest.raises(ValueError, match=r"(?s)input is on cuda:0, where fastloss cannot compute.*input\.cpu\(\)"):
            adapter.cross_entropy(scores, target)
        with pytest.raises(ValueError, match="linear_weight is on cuda:0"):
            adapter.linear_cross_entropy(torch.empty(4, 2), torch.empty(3, 2, device="cuda"), target)


def test_without_pytorch_the_extra_is_named():
    code = "import sys; sys.modules['torch'] = None; import fastloss.adapters.torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError" in done.stderr
    assert 'pip install "fastloss[torch]"' in done.stderr


def test_ml_dtypes_is_for_bfloat16_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    _arrays.bfloat16.cache_clear()
    scores, target = torch.randn(4, 3), torch.randint(0, 3, (4,))
    adapter.cross_entropy(scores, target)
    with pytest.raises(ImportError, match=r'bfloat16 tensors need ml_dtypes.*pip install "fastloss\[torch\]"'):
        adapter.cross_entropy(scores.bfloat16(), target)


# --- what users run into ----------------------------------------------------------------------------------------------
def test_weights_have_no_gradient_and_say_so():
    scores, target, weight = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.rand(3, requires_grad=True)
    for loss in (adapter.cross_entropy, adapter.multi_margin_loss):
        call = partial(loss, scores, target)
        with pytest.raises(ValueError, match=r"weight requires a gradient.*weight.detach"):
            call(weight=weight)
        transformed = torch.func.grad(lambda w, call=call: call(weight=w))
        with pytest.raises(ValueError, match=r"weight requires a gradient.*weight.detach"):
            transformed(weight.detach())
        with torch.no_grad():
            call(weight=weight)


def test_a_loss_too_large_for_its_type_is_infinite():
    scores, target = torch.zeros(4, 3), torch.tensor([1, 1, 2, 2])
    scores[:, 0] = 3e38
    for loss in (adapter.cross_entropy, adapter.multi_margin_loss):
        assert loss(scores, target, reduction="sum") == torch.inf
    weight = torch.full((3,), 1e30)
    assert (adapter.cross_entropy(scores, target, weight, reduction="none") == torch.inf).all()


def test_forward_mode_is_turned_away_without_gradients_too():
    scores, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(scores, torch.ones(4, 3))
        with pytest.raises(NotImplementedError, match="jvp"):
            adapter.cross_entropy(dual, target)
        assert torch.isfinite(adapter.cross_entropy(scores, target))


def test_a_change_of_sign_that_is_put_off():
    scores, target = torch.view_as_complex(torch.randn(4, 3, 2)).conj().imag, torch.tensor([0, 1, 2, 0])
    assert scores.is_neg()
    expected = torch.nn.functional.cross_entropy(scores.resolve_neg(), target)
    torch.testing.assert_close(adapter.cross_entropy(scores, target), expected)


@pytest.mark.full
@pytest.mark.parametrize("name", ["cross_entropy", "multi_margin_loss", "linear_cross_entropy"])
def test_the_samples_of_pytorch_for_its_functions(name):
    """Values, dtypes and gradients, those of probability targets too, in 16 and 32 bits (modules are tested in 64)."""
    invocations = pytest.importorskip(
        "torch.testing._internal.common_methods_invocations", reason="PyTorch's samples need expecttest"
    )
    ops = [op for op in invocations.op_db if op.name == f"nn.functional.{name}"]
    if not ops:
        pytest.skip(f"this PyTorch has no samples of {name}")
    ours, theirs, count = getattr(adapter, name), getattr(F, name), 0
    for dtype, requires_grad in itertools.product((torch.float32, torch.bfloat16), (True, False)):
        samples = list(ops[0].sample_inputs("cpu", dtype, requires_grad=requires_grad))
        for sample in samples:
            results = []
            for loss, prepare in ((ours, lambda x: x), (theirs, widened)):

                def copy(x, prepare=prepare):
                    if not isinstance(x, torch.Tensor):
                        return x
                    return prepare(x.detach().clone().requires_grad_(x.requires_grad))

                arguments = [copy(x) for x in (sample.input, *sample.args)]
                options = {key: copy(x) for key, x in sample.kwargs.items()}
                value = loss(*arguments, **options)
                leaves = [x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
                if value.requires_grad:
                    value.sum().backward()
                results.append([value.detach(), *(leaf.grad for leaf in leaves)])
            for found, wanted in zip(*results, strict=True):
                assert (found is None) == (wanted is None)
                if found is not None:
                    assert found.dtype == dtype
                    torch.testing.assert_close(found, wanted.to(dtype), rtol=2e-2, atol=2e-3, equal_nan=True)
            count += 1
    assert count > 20


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_references_of_pytorch(dtype):
    """The functions that PyTorch tests its losses against, over a grid of options and shapes: values and gradients."""
    common = pytest.importorskip("torch.testing._internal.common_nn", reason="PyTorch's references need expecttest")
    references = common.loss_reference_fns
    if "LinearCrossEntropyLoss" not in references:
        pytest.skip("this PyTorch has no reference for linear_cross_entropy")

    def check(name, tensors, target, **options):
        ours, theirs = getattr(adapter, name[0]), references[name[1]]
        results = []
        for loss, wide in ((ours, lambda x: x), (theirs, lambda x: x.double() if x.is_floating_point() else x)):
            leaves = [wide(t.detach().clone()).requires_grad_() for t in tensors]
            given = {key: wide(o) if isinstance(o, torch.Tensor) else o for key, o in options.items()}
            value = loss(*leaves, wide(target), **given)
            moves = value.requires_grad  # the reference of the hinge does not, where no margin is short of it
            grads = torch.autograd.grad(value.sum(), leaves) if moves else map(torch.zeros_like, leaves)
            results.append([value.detach(), *grads])
        for found, wanted in zip(*results, strict=True):
            assert found.dtype == dtype
            close(found, wanted.to(dtype), options)

    for reduction, weight in itertools.product(REDUCTIONS, ("none", "positive")):
        shapes = (4, 7), (33, 40), (3, 5, 4), (2, 7, 3, 5), (2, 3, 1, 4, 2)
        for shape, smoothing in itertools.product(shapes, (0, 0.3)):
            scores, n_classes = torch.randn(shape).to(dtype), shape[1]
            options = {
                "reduction": reduction, "label_smoothing": smoothing,
                "weight": class_weight(weight, n_classes, dtype),
            }  # fmt: skip
            names = "cross_entropy", "CrossEntropyLoss"
            target = torch.randint(0, n_classes, shape[:1] + shape[2:])
            check(names, [scores], target, **options)
            target.view(-1)[::3] = -100
            check(names, [scores], target, **options)
            check(names, [scores], torch.rand(shape).softmax(1).to(dtype), **options)
        for shape, p, margin in itertools.product([(1, 2), (4, 7), (33, 40), (5,)], (1, 2), (1, 0.5, -1)):
            options = {
                "reduction": reduction, "p": p, "margin": margin, "weight": class_weight(weight, shape[-1], dtype)
            }  # fmt: skip
            target = torch.randint(0, shape[-1], shape[:-1])
            check(("multi_margin_loss", "MultiMarginLoss"), [grid_tensor(*shape, dtype=dtype)], target, **options)
        for n, d, n_classes, positions in ((7, 4, 6, ()), (70, 16, 100, ()), (5, 3, 4, (2, 3))):
            tensors = [grid_tensor(n, d, dtype=dtype), grid_tensor(n_classes, *positions, d, dtype=dtype)]
            options = {
                "reduction": reduction, "weight": class_weight(weight, n_classes, dtype), "label_smoothing": 0.1,
                "linear_bias": grid_tensor(n_classes, *positions, dtype=dtype),
            }  # fmt: skip
            target = torch.randint(0, n_classes, (n, *positions))
            check(("linear_cross_entropy", "LinearCrossEntropyLoss"), tensors, target, **options)
            q = torch.rand(n, n_classes, *positions).softmax(1).to(dtype)
            check(("linear_cross_entropy", "LinearCrossEntropyLoss"), tensors, q, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)], ids=str)
def test_losses_of_probabilities_have_the_widest_type(dtypes, reduction):
    short, wide = dtypes
    scores, q, weight = torch.randn(4, 3).to(short), torch.rand(4, 3).to(wide), torch.rand(3).to(wide)
    options = {"weight": weight, "reduction": reduction}
    for loss, tensors in (("cross_entropy", (scores, q)), ("linear_cross_entropy", (scores, scores[:3], q))):
        ours, theirs = (getattr(module, loss)(*tensors, **options) for module in (adapter, F))
        assert ours.dtype == theirs.dtype == wide
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-2)
    compiled = torch.compile(lambda s, q: adapter.cross_entropy(s, q, reduction=reduction), backend="aot_eager")
    assert compiled(scores, q).dtype == wide


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("positions", [(), (2,)], ids=str)
def test_probabilities_have_a_gradient_in_a_linear_layer_too(positions, reduction):
    tensors = [
        torch.randn(4, 3),
        torch.randn(5, *positions, 3),
        torch.rand(4, 5, *positions),
        torch.randn(5, *positions),
    ]
    options = {"weight": torch.rand(5), "reduction": reduction, "label_smoothing": 0.1}

    def call(loss, *tensors, **options):
        return loss(*tensors[:3], linear_bias=tensors[3], **options)

    assert_same(partial(call, adapter.linear_cross_entropy), partial(call, F.linear_cross_entropy), tensors, **options)
    q = tensors[2].requires_grad_()
    (alone,) = torch.autograd.grad(call(adapter.linear_cross_entropy, *tensors, **options).sum(), q)
    (wanted,) = torch.autograd.grad(call(F.linear_cross_entropy, *tensors, **options).sum(), q)
    close(alone, wanted)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_linear_layer_without_features_or_positions(reduction):
    def check(target, *tensors):
        assert_same(
            partial(adapter.linear_cross_entropy, target=target, reduction=reduction),
            partial(F.linear_cross_entropy, target=target, reduction=reduction),
            tensors,
        )

    check(torch.tensor([0, 3, 1]), torch.zeros(3, 0), torch.zeros(4, 0))
    check(torch.zeros(3, 0, dtype=torch.long), torch.randn(3, 5), torch.randn(4, 0, 5))
    check(torch.zeros(0, dtype=torch.long), torch.randn(0, 5), torch.randn(4, 5))


def test_gradients_by_a_batch_of_upstream_factors():
    scores, weight = torch.randn(5, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    target = torch.randint(0, 4, (5,))
    for ours, theirs, leaf in (
        (adapter.cross_entropy, F.cross_entropy, scores),
        (adapter.multi_margin_loss, F.multi_margin_loss, scores),
        (partial(adapter.linear_cross_entropy, scores), partial(F.linear_cross_entropy, scores), weight),
    ):
        for reduction, factors in (("mean", torch.tensor([1.0, -2.0, 0.0])), ("none", torch.eye(5))):
            found, wanted = (
                torch.autograd.grad(loss(leaf, target, reduction=reduction), leaf, factors, is_grads_batched=True)[0]
                for loss in (ours, theirs)
            )
            close(found, wanted)


def test_transforms_without_a_rule_use_the_operators_or_say_so():
    scores, target = torch.randn(5, 4), torch.randint(0, 4, (5,))
    close(torch.func.functionalize(adapter.cross_entropy)(scores, target), F.cross_entropy(scores, target))
    for transform in (torch.func.jacfwd, torch.func.hessian):
        with pytest.raises(NotImplementedError, match=r"fastloss has no forward mode \(jvp\)"):
            transform(lambda s: adapter.cross_entropy(s, target))(scores)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(scores.requires_grad_(), torch.ones(5, 4))
        with pytest.raises(NotImplementedError, match=r"fastloss has no forward mode \(jvp\)"):
            adapter.cross_entropy(dual, target)


def test_a_default_device_is_not_that_of_the_results():
    target = torch.zeros(5, dtype=torch.long)
    with torch.device("meta"):
        scores, weight = (torch.ones(5, 4, device="cpu", requires_grad=True) for _ in range(2))
        adapter.cross_entropy(scores, target).backward()
        adapter.linear_cross_entropy(scores.detach(), weight, target).backward()
    assert scores.grad.device.type == weight.grad.device.type == "cpu"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_while_another_thread_takes_memory_of_gradients():
    """The child has a lock that nobody is there to open."""
    code = """
import os, torch
from fastloss.adapters.torch import _arrays
_arrays._reserve._lock.acquire()
child = os.fork()
if not child:
    _arrays.empty_like(torch.ones(1 << 20))
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "0\n", done.stderr


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of shapes that checks look at
@pytest.mark.parametrize("name", ["CrossEntropyLoss", "LinearCrossEntropyLoss"])
def test_modules_may_be_traced(name):
    module = getattr(adapter, name)(*(4, 4) * name.startswith("Linear"))
    scores, target = torch.randn(5, 4, requires_grad=True), torch.randint(0, 4, (5,))
    traced = torch.jit.trace(module, (scores, target))
    close(traced(2 * scores, target), module(2 * scores, target))
    (found,), (wanted,) = (torch.autograd.grad(m(scores, target), scores) for m in (traced, module))
    close(found, wanted)


def test_scripts_are_turned_away():
    modules = [adapter.CrossEntropyLoss(), adapter.MultiMarginLoss()]
    modules += [adapter.LinearCrossEntropyLoss(3, 4), adapter.LinearMultiMarginLoss(3, 4)]
    functions = [getattr(adapter, name) for name in adapter.__all__ if name[0].islower() and name != "empty_cache"]
    assert len(functions) == 4
    for given in (*modules, *functions, torch.nn.Sequential(adapter.CrossEntropyLoss())):
        with pytest.raises(NotImplementedError, match=r"torch\.jit\.script: use torch\.compile or torch\.jit\.trace"):
            torch.jit.script(given)


def test_modules_tell_their_options():
    text = repr(adapter.LinearCrossEntropyLoss(3, 4, out_features=(2,), ignore_index=1, label_smoothing=0.1))
    for option in ("in_features=3", "num_classes=4", "bias=False", "out_features=(2,)", "reduction=mean",
                   "ignore_index=1", "label_smoothing=0.1", "options=None"):  # fmt: skip
        assert option in text
    assert "p=2, margin=0.5, reduction=sum" in repr(adapter.LinearMultiMarginLoss(3, 4, p=2, margin=0.5, reduction="sum"))  # fmt: skip  # noqa: E501


# --- documentation ----------------------------------------------------------------------------------------------------
# (They are run in test_docs.)
FINDER = doctest.DocTestFinder(exclude_empty=True)


@pytest.mark.parametrize("name", adapter.__all__)
def test_every_public_name_has_an_example(name):
    assert any(example.examples for example in FINDER.find(getattr(adapter, name), name))


def guide():
    text = (ROOT / "docs/torch.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_guide_gives_the_same_curve_when_the_import_changes():
    """Its first block is the training loop, as PyTorch's users have it; the second the import that takes its place."""
    script, swapped, *others = guide()
    before = next(line for line in script.splitlines() if "CrossEntropyLoss" in line and "import" in line)
    assert script.count(before) == 1
    curves = []
    for code in (script, script.replace(before, swapped.strip())):
        names = {}
        exec(compile(code, "docs/torch.md", "exec"), names)
        curves.append(names["curve"])
    assert names["CrossEntropyLoss"] is adapter.CrossEntropyLoss
    assert curves[0][-1] < 0.5 * curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    for code in others:
        exec(compile(code, "docs/torch.md", "exec"), names)
