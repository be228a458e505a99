"""The JAX adapter: optax's values and gradients by the same calls, and what JAX may do with a function."""

import functools
import itertools
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import fastloss as fl

jax = pytest.importorskip("jax", reason="JAX is not installed")
optax = pytest.importorskip("optax", reason="optax is not installed")
import jax.numpy as jnp  # noqa: E402

from fastloss.adapters import jax as fast  # noqa: E402

# Probability targets may be served by the reference.
pytestmark = pytest.mark.filterwarnings("ignore::fastloss.BackendWarning")

RTOL = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 2e-2, "float16": 2e-3}
JaxError = jax.errors.JaxRuntimeError


@pytest.fixture(autouse=True)
def _numbers_of_32_bits():
    """JAX's default, which what is benchmarked in the same process changes."""
    with jax.enable_x64(False):
        yield


def draw(shape, dtype="float32", seed=0, scale=3.0):
    return jnp.asarray(np.random.default_rng(seed).normal(scale=scale, size=shape), dtype)


def draw_labels(shape, n_classes, dtype="int32", seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(0, n_classes, shape), dtype)


def assert_close(found, wanted, dtype="float32", factor=1.0):
    found, wanted = jnp.asarray(found), jnp.asarray(wanted)
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    tolerance = factor * RTOL[str(dtype)]
    np.testing.assert_allclose(
        np.asarray(found, np.float64), np.asarray(wanted, np.float64), rtol=tolerance, atol=tolerance
    )


def pulled(function, *arguments, wrt=1):
    """Values, and gradients of the first `wrt` arguments for an upstream gradient that differs from row to row."""

    @jax.jit
    def both(*arguments):
        value, pull = jax.vjp(lambda *chosen: function(*chosen, *arguments[wrt:]), *arguments[:wrt])
        upstream = jnp.linspace(-1, 2, max(value.size, 1))[: value.size].reshape(value.shape)
        return value, pull(upstream.astype(value.dtype))

    return both(*arguments)


def compare(name, *arguments, dtype="float32", wrt=1, factor=4.0, **options):
    ours = functools.partial(getattr(fast, name), **options)
    theirs = functools.partial(getattr(optax.losses, name), **options)
    value, grads = pulled(ours, *arguments, wrt=wrt)
    wanted, wanted_grads = pulled(theirs, *arguments, wrt=wrt)
    assert_close(value, wanted, dtype, factor)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert_close(grad, wanted_grad, dtype, factor)


INTEGER = "softmax_cross_entropy_with_integer_labels"
PROBABILITIES = "softmax_cross_entropy"
HINGE = "multiclass_hinge_loss"


# --- optax's values and gradients ---------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(3, 1), (17, 33), (2, 3, 5), (4,)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_and_dtypes_as_in_optax(shape, dtype):
    scores, labels = draw(shape, dtype), draw_labels(shape[:-1], shape[-1])
    compare(INTEGER, scores, labels, dtype=dtype)
    compare(PROBABILITIES, scores, jax.nn.softmax(draw(shape, seed=2)).astype(dtype), dtype=dtype, wrt=2)
    if dtype == "float32" and shape[-1] > 1:  # optax's hinge has no gradient from its maximum in 16 bits that is exact
        compare(HINGE, scores, labels, dtype=dtype)


def test_float16_as_in_optax():
    compare(INTEGER, draw((17, 33), "float16"), draw_labels((17,), 33), dtype="float16")


def test_float64_as_in_optax():
    with jax.enable_x64(True):
        scores, labels = draw((9, 10), "float64"), draw_labels((9,), 10, "int64")
        compare(INTEGER, scores, labels, dtype="float64")
        compare(PROBABILITIES, scores, jax.nn.softmax(draw((9, 10), "float64", 2)), dtype="float64", wrt=2)
        compare(HINGE, scores, labels, dtype="float64")
        compare(HINGE, draw((9, 10)), labels, dtype="float32")  # promoted to float64, as optax does
        assert fast.multiclass_hinge_loss(draw((9, 10)), labels).dtype == jnp.float64


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_labels_of_any_integer_type(kind):
    scores, labels = draw((5, 4)), draw_labels((5,), 4)
    function = fast.softmax_cross_entropy_with_integer_labels
    np.testing.assert_array_equal(function(scores, labels.astype(kind)), function(scores, labels))


@pytest.mark.parametrize(("scores", "labels"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "int32")])
def test_types_are_promoted_as_in_optax(scores, labels):
    q = jax.nn.one_hot(draw_labels((6,), 5), 5).astype(labels)
    compare(PROBABILITIES, draw((6, 5), scores), q, dtype="bfloat16")
    hinge = fast.multiclass_hinge_loss(draw((6, 5), scores), draw_labels((6,), 5))
    assert hinge.dtype == optax.losses.multiclass_hinge_loss(draw((6, 5), scores), draw_labels((6,), 5)).dtype


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 2), (2, 1), (-1,)], ids=str)
def test_axes_as_in_optax(axis):
    scores = draw((3, 4, 5))
    axes = [a % 3 for a in (axis if isinstance(axis, tuple) else (axis,))]
    batch = tuple(n for k, n in enumerate(scores.shape) if k not in axes)
    n_classes = scores.size // int(np.prod(batch))
    compare(INTEGER, scores, draw_labels(batch, n_classes), axis=axis)
    q = jax.nn.softmax(draw((3, 4, 5), seed=2), axis)
    compare(PROBABILITIES, scores, q, axis=axis, wrt=2)
    rows = jnp.asarray(np.random.default_rng(4).random(batch) < 0.5)
    if not isinstance(axis, tuple):  # optax expands a mask of rows before it moves several axes
        compare(INTEGER, scores, draw_labels(batch, n_classes), axis=axis, where=rows)
    compare(PROBABILITIES, scores, q, axis=axis, where=rows)


def test_all_axes_are_the_classes():
    compare(PROBABILITIES, draw((3, 4)), jax.nn.softmax(draw((3, 4), seed=2), (0, 1)), axis=None, wrt=2)


def test_where_for_each_score_as_in_optax():
    scores, labels = draw((6, 5)), draw_labels((6,), 5)
    mask = np.random.default_rng(3).random((6, 5)) < 0.6
    mask[np.arange(6), np.asarray(labels)] = True
    mask[2] = False
    q = jax.nn.softmax(draw((6, 5), seed=2))
    compare(PROBABILITIES, scores, q, where=jnp.asarray(mask))
    _, (_, grad) = pulled(functools.partial(fast.softmax_cross_entropy, where=jnp.asarray(mask)), scores, q, wrt=2)
    assert ((grad != 0) == mask).all()  # optax: NaN where the mask is not
    value = fast.softmax_cross_entropy_with_integer_labels(scores, labels, where=jnp.asarray(mask))
    assert_close(value, optax.softmax_cross_entropy_with_integer_labels(scores, labels, where=jnp.asarray(mask)))
    kept = jnp.asarray(np.delete(mask, 2, 0))
    compare(INTEGER, jnp.delete(scores, 2, 0), jnp.delete(labels, 2, 0), where=kept)


def test_a_target_that_is_masked_out_costs_infinity():
    mask = jnp.asarray([[False, True, True]])
    assert fast.softmax_cross_entropy_with_integer_labels(draw((1, 3)), jnp.array([0]), where=mask)[0] == jnp.inf


def test_rows_that_where_leaves_out_count_for_nothing():
    scores = draw((3, 4)).at[1].set(jnp.nan)
    labels = jnp.array([0, -7, 3])  # padding
    where = jnp.array([True, False, True])

    def total(scores):
        return fast.softmax_cross_entropy_with_integer_labels(scores, labels, where=where).sum()

    value, grad = jax.value_and_grad(total)(scores)
    assert jnp.isfinite(value)
    assert (grad[1] == 0).all()
    assert (grad[0] != 0).all()


def test_arguments_broadcast_as_in_optax():
    compare(PROBABILITIES, draw((1, 5)), jax.nn.softmax(draw((4, 5), seed=2)), wrt=2)
    compare(PROBABILITIES, draw((3, 4, 5)), jax.nn.softmax(draw((5,), seed=2)), wrt=2)
    compare(INTEGER, draw((3, 4, 5)), draw_labels((1, 4), 5))
    compare(INTEGER, draw((3, 1, 5)), draw_labels((3, 4), 5))


def test_probabilities_need_not_sum_to_one():
    compare(PROBABILITIES, draw((4, 6)), jnp.abs(draw((4, 6), seed=2)), wrt=2)


def test_large_common_offsets_and_masked_classes():
    scores = jnp.array([[1e4, 1e4 - 5, -jnp.inf], [-1e4, -jnp.inf, -1e4 + 1]])
    wanted = np.log1p(np.exp([-5.0, -1.0])).astype("float32")  # optax: digits of the offset are lost
    assert_close(fast.softmax_cross_entropy_with_integer_labels(scores, jnp.array([0, 2])), wanted)
    q = jnp.array([[1.0, 0, 0], [0, 0, 1.0]])
    assert_close(fast.softmax_cross_entropy(scores, q), wanted)


def test_gradients_of_confident_rows_are_accurate():
    def loss(scores):
        return fast.softmax_cross_entropy_with_integer_labels(scores, jnp.array([0])).sum()

    grad = jax.grad(loss)(jnp.array([[30.0, 10.0, 5.0, 0.0]]))
    np.testing.assert_allclose(grad[0, 0], -2.0611538e-9 - 1.3887944e-11 - 9.3576230e-14, rtol=1e-6)


@pytest.mark.parametrize("name", [INTEGER, HINGE])
def test_nan_stays_in_its_row(name):
    scores = draw((3, 4)).at[1, 2].set(jnp.nan)
    value, (grad,) = pulled(getattr(fast, name), scores, jnp.array([0, 1, 2]))
    assert jnp.isnan(value).tolist() == [False, True, False]
    assert jnp.isnan(grad).any(axis=1).tolist() == [False, True, False]


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("over", ["sum", "mean", "max"])
def test_hinge_options_are_those_of_hinge(over, power):
    scores, labels = draw((9, 7)), draw_labels((9,), 7)
    options = {"margin": 0.5, "power": power, "over": over}
    value, (grad,) = pulled(functools.partial(fast.multiclass_hinge_loss, **options), scores, labels)
    upstream = np.linspace(-1, 2, 9, dtype=np.float32)
    wanted, wanted_grad = fl.Hinge(**options).value_and_grad(
        np.asarray(scores), np.asarray(labels), reduction="none", upstream=upstream
    )
    np.testing.assert_array_equal(value, wanted)
    np.testing.assert_allclose(grad, wanted_grad, rtol=1e-6)


# --- what JAX does with functions ---------------------------------------------------------------------------------
ALL = [INTEGER, HINGE, PROBABILITIES]


def targets_of(name, shape):
    return jax.nn.softmax(draw(shape, seed=5)) if name == PROBABILITIES else draw_labels(shape[:-1], shape[-1])


@pytest.mark.parametrize("name", ALL)
def test_jit_gives_the_same_bits(name):
    scores, targets = draw((12, 10)), targets_of(name, (12, 10))
    function = getattr(fast, name)
    np.testing.assert_array_equal(jax.jit(function)(scores, targets), function(scores, targets))
    gradient = jax.grad(lambda s: function(s, targets).sum())
    np.testing.assert_array_equal(jax.jit(gradient)(scores), gradient(scores))


@pytest.mark.parametrize("name", ALL)
def test_vmap_alone_and_within_others(name):
    scores, targets = draw((3, 4, 5)), targets_of(name, (3, 4, 5))
    ours, theirs = getattr(fast, name), getattr(optax.losses, name)

    def mean(function):
        return lambda s, y: function(s, y).mean()

    assert_close(jax.vmap(ours)(scores, targets), jax.vmap(theirs)(scores, targets), factor=8)

    def together(f):
        return (
            jax.vmap(jax.vmap(f))(scores, targets),
            jax.vmap(jax.jit(f))(scores, targets),
            jax.vmap(jax.value_and_grad(mean(f)))(scores, targets),
            jax.grad(lambda s: jax.vmap(f)(s, targets).mean())(scores),
            jax.vmap(f, in_axes=1)(scores, targets),
            jax.vmap(f, in_axes=(0, None))(scores, targets[0]),
            jax.vmap(f, in_axes=(None, 0))(scores[0], targets),
        )

    found, wanted = jax.jit(lambda: together(ours))(), jax.jit(lambda: together(theirs))()
    jax.tree.map(lambda a, b: assert_close(a, b, factor=8), found, wanted)


def test_vmap_is_one_call():
    calls = str(
        jax.make_jaxpr(jax.vmap(fast.softmax_cross_entropy_with_integer_labels))(
            draw((8, 4, 5)), draw_labels((8, 4), 5)
        )
    )
    assert calls.count("ffi_call") == 1
    assert "scan" not in calls
    assert "while" not in calls


def test_vmap_over_a_mask():
    scores, labels = draw((3, 4, 5)), draw_labels((4,), 5)
    where = jnp.asarray(np.random.default_rng(0).random((3, 4)) < 0.5)

    def of(function):
        return jax.vmap(lambda s, w: function(s, labels, where=w))(scores, where)

    assert_close(
        of(fast.softmax_cross_entropy_with_integer_labels),
        of(optax.softmax_cross_entropy_with_integer_labels),
        factor=8,
    )


@pytest.mark.parametrize("name", ALL)
def test_forward_mode_and_second_derivatives(name):
    scores, targets = draw((3, 4), scale=1.0), targets_of(name, (3, 4))
    ours, theirs = getattr(fast, name), getattr(optax.losses, name)
    direction = draw((3, 4), seed=9)
    found, wanted = (
        jax.jit(lambda s, v, f=f: jax.jvp(lambda s: f(s, targets), (s,), (v,)))(scores, direction)
        for f in (ours, theirs)
    )
    jax.tree.map(lambda a, b: assert_close(a, b, factor=8), found, wanted)

    def second(function):
        def loss(s):
            return (function(s, targets) ** 2).sum()

        return jax.jit(lambda s: (jax.hessian(loss)(s), jax.jacrev(jax.grad(loss))(s)))(scores)

    for a, b in zip(second(ours), second(theirs), strict=True):
        assert_close(a, b, factor=20)


def test_derivatives_of_both_arguments_together():
    scores, q = draw((3, 4)), jax.nn.softmax(draw((3, 4), seed=2))

    def loss(function):
        return jax.jit(jax.jacfwd(jax.grad(lambda s, q: (function(s, q) ** 2).sum(), (0, 1)), (0, 1)))(scores, q)

    found, wanted = loss(fast.softmax_cross_entropy), loss(optax.softmax_cross_entropy)
    jax.tree.map(lambda a, b: assert_close(a, b, factor=40), found, wanted)


def test_checkpoint_and_scan():
    scores, labels = draw((3, 4, 5)), draw_labels((3, 4), 5)

    def loss(function):
        def total(scores):
            def step(carry, pair):
                return carry + function(*pair).sum(), None

            return jax.lax.scan(jax.checkpoint(step), 0.0, (scores, labels))[0]

        return jax.jit(jax.grad(total))(scores)

    assert_close(
        loss(fast.softmax_cross_entropy_with_integer_labels), loss(optax.softmax_cross_entropy_with_integer_labels)
    )


def test_shard_map_over_two_devices():
    """Gradients of what is the same on all devices are summed over them; once they were not, in silence."""
    code = """
import jax, jax.numpy as jnp, numpy as np, optax
from functools import partial
from jax.sharding import Mesh, PartitionSpec as P
from fastloss.adapters import jax as fast

if not hasattr(jax, "shard_map"):
    from jax.experimental.shard_map import shard_map
    jax.shard_map = shard_map
mesh = Mesh(np.array(jax.devices()), ("d",))
assert mesh.size == 2
rng = np.random.default_rng(0)
S, X, W = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 5), (4, 3), (5, 3)))
y = jnp.asarray(rng.integers(0, 5, 4))

def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)

def total(loss, specs, *arguments):
    def part(*arguments):
        return jax.lax.psum(loss(*arguments).sum(), "d")
    return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P())(*arguments)

grads = lambda *losses: [jax.jit(jax.grad(lambda s: total(f, (P(), P("d")), s, y)))(S) for f in losses]
name = "softmax_cross_entropy_with_integer_labels"
ours, theirs = getattr(fast, name), getattr(optax.losses, name)
close(*grads(lambda s, y: ours(s[:2], y), lambda s, y: theirs(s[:2], y)))
for reduction, reduce in (("mean", jnp.mean), ("none", lambda r: r)):
    layer = partial(fast.linear_cross_entropy, reduction=reduction)
    scores = lambda X, W, y: reduce(theirs(X @ W.T, y))
    specs = P("d"), P(), P("d")
    both = [jax.jit(jax.grad(lambda *a: total(f, specs, *a, y), (0, 1)))(X, W) for f in (layer, scores)]
    for found, wanted in zip(*both):
        close(found, wanted)
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ | flags
    )
    assert done.returncode == 0, done.stderr


def test_shard_map_of_all_losses():
    """On one device; the values were right even where types were not."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("d",))
    specs = (jax.sharding.PartitionSpec("d"),) * 2

    def total(name, scores, targets):
        mapped = jax.shard_map(getattr(fast, name), mesh=mesh, in_specs=specs, out_specs=specs[0])
        return mapped(scores, targets).sum()

    for name in ALL:
        scores, targets = draw((4, 5)), targets_of(name, (4, 5))
        found = jax.jit(jax.grad(functools.partial(total, name)))(scores, targets)
        wanted = jax.grad(lambda s, name=name, targets=targets: getattr(fast, name)(s, targets).sum())(scores)
        np.testing.assert_array_equal(found, wanted)


def test_python_numbers_do_not_widen_the_type():
    scores = draw((4, 5), "bfloat16")
    for q in (0.25, jnp.where(scores > 0, 0.4, 0.1)):
        assert fast.softmax_cross_entropy(scores, q).dtype == optax.losses.softmax_cross_entropy(scores, q).dtype


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)], ids=str)
def test_empty_batches(shape):
    for name in ALL:
        value, (grad,) = pulled(getattr(fast, name), draw(shape), targets_of(name, shape))
        assert value.shape == shape[:-1]
        assert grad.shape == shape


def test_large_results():
    """Above what large pages are asked for."""
    compare(INTEGER, draw((1100, 1001)), draw_labels((1100,), 1001), factor=16)


def test_many_threads_at_once():
    function = jax.jit(jax.value_and_grad(lambda s, y: fast.softmax_cross_entropy_with_integer_labels(s, y).mean()))
    inputs = [(draw((64, 10), seed=k), draw_labels((64,), 10, seed=k)) for k in range(4)]
    wanted = [jax.block_until_ready(function(*pair)) for pair in inputs]

    def repeat(k):
        return [function(*inputs[k]) for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        for k, results in enumerate(pool.map(repeat, range(4))):
            for value, grad in results:
                np.testing.assert_array_equal(value, wanted[k][0])
                np.testing.assert_array_equal(grad, wanted[k][1])


# --- the linear layer -----------------------------------------------------------------------------------------------
def plain_linear(X, W, y, b=None, *, reduction="mean", where=None, smoothing=0.0):
    scores = X @ W.T + (0 if b is None else b)
    target = (1 - smoothing) * jax.nn.one_hot(y, len(W)) + smoothing / len(W)
    rows = -(target * jax.nn.log_softmax(scores)).sum(-1)
    kept = jnp.ones(rows.shape) if where is None else where.astype(rows.dtype)
    rows = rows * kept
    return {"mean": rows.sum() / kept.sum(), "sum": rows.sum(), "none": rows}[reduction]


def layer(batch=(7,), d=6, c=5, dtype="float32"):
    return (
        draw((*batch, d), dtype, 1, 1.0),
        draw((c, d), dtype, 2, 1.0),
        draw_labels(batch, c),
        draw((c,), dtype, 3),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("batch", "c", "with_bias"), [((7,), 5, True), ((7,), 70, False), ((2, 3), 5, True)], ids=str)
def test_linear_gradients(batch, reduction, with_bias, c):
    X, W, y, b = layer(batch, c=c)
    where = jnp.asarray(np.random.default_rng(5).random(batch) < 0.7)

    def loss(function, **options):
        def weighted(X, W, b):
            value = function(X, W, y, b if with_bias else None, reduction=reduction, **options)
            return (value * jnp.linspace(1, 2, value.size).reshape(value.shape)).sum(), value

        return jax.jit(jax.value_and_grad(weighted, (0, 1, 2), has_aux=True))(X, W, b)

    for options in ({}, {"where": where}):
        found, wanted = loss(fast.linear_cross_entropy, **options), loss(plain_linear, **options)
        jax.tree.map(lambda a, b: assert_close(a, b, factor=20), found, wanted)


def test_linear_with_options():
    X, W, y, b = layer()
    loss = fl.Softmax(label_smoothing=0.1)
    found = jax.grad(lambda *a: fast.linear_cross_entropy(*a, loss=loss), (0, 1))(X, W, y, b)
    wanted = jax.grad(lambda *a: plain_linear(*a, smoothing=0.1), (0, 1))(X, W, y, b)
    jax.tree.map(lambda a, b: assert_close(a, b, factor=20), found, wanted)
    ignoring = fl.Softmax(ignore_index=-100, class_weight=[1.0, 2, 3, 4, 5])
    y = y.at[2].set(-100)
    value = fast.linear_cross_entropy(X, W, y, b, loss=ignoring, reduction="none")
    np.testing.assert_array_equal(
        value,
        fl.linear_value_and_grad(ignoring, *map(np.asarray, (X, W, y, b)), wrt=(), reduction="none")[0],
    )


def test_linear_under_vmap():
    X, W, y, b = layer((3, 4))
    stack = jnp.stack([W, 2 * W, -W])
    cases = [
        ((X, stack, y, b), (0, 0, 0, None)),
        ((X, W, y, b), (0, None, 0, None)),
        ((X[0], stack, y[0], b), (None, 0, None, None)),
    ]
    for (arguments, axes), reduction in itertools.product(cases, ("mean", "none")):

        def of(function, arguments=arguments, axes=axes, reduction=reduction):
            def loss(X, W, y, b):
                value = function(X, W, y, b, reduction=reduction)
                return (value * jnp.linspace(1, 2, value.size).reshape(value.shape)).sum()

            return jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1, 3)), in_axes=axes))(*arguments)

        jax.tree.map(lambda a, b: assert_close(a, b, factor=20), of(fast.linear_cross_entropy), of(plain_linear))


def test_linear_in_sixteen_bits():
    X, W, y, b = layer(dtype="bfloat16")
    value, grads = jax.value_and_grad(fast.linear_cross_entropy, (0, 1, 3))(X, W, y, b)
    wide = (X.astype("float32"), W.astype("float32"), y, b.astype("float32"))
    wanted, wanted_grads = jax.value_and_grad(plain_linear, (0, 1, 3))(*wide)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert_close(grad, wanted_grad.astype("bfloat16"), "bfloat16")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_computes_what_is_asked_for_and_holds_no_scores(reduction):
    n, d, c = 60, 3, 70
    X, W, y, b = layer((n,), d, c)

    def loss(W):
        return fast.linear_cross_entropy(X, W, y, b, reduction=reduction).sum()

    program = jax.jit(jax.grad(loss)).lower(W).as_text()
    assert f"tensor<{n}x{c}xf32>" not in program
    results = [line.partition("->")[2] for line in program.splitlines() if "@fastloss" in line]
    assert any(f"tensor<{c}x{d}xf32>" in result for result in results)  # dW
    assert all(f"tensor<{n}x{d}xf32>" not in result for result in results)  # dX


def test_linear_upstream_that_is_not_finite_is_not_hidden():
    X, W, y, b = layer()

    def loss(W):
        rows = fast.linear_cross_entropy(X, W, y, b, reduction="none")
        return (rows * jnp.full(rows.shape, jnp.inf)).sum()

    assert jnp.isnan(jax.grad(loss)(W)).all()


def test_linear_has_first_derivatives_only():
    X, W, y, b = layer()
    for reduction in ("mean", "none"):

        def loss(W, reduction=reduction):
            return fast.linear_cross_entropy(X, W, y, b, reduction=reduction).sum()

        with pytest.raises(NotImplementedError, match="first derivatives in reverse mode only"):
            jax.jacrev(jax.grad(loss))(W)
        with pytest.raises((TypeError, NotImplementedError), match=r"forward-mode|reverse mode only"):
            jax.jvp(loss, (W,), (W,))


def test_linear_of_no_rows():
    X, W, y, b = layer((0,))
    value, grad = jax.value_and_grad(fast.linear_cross_entropy, 1)(X, W, y, b)
    assert jnp.isnan(value)
    assert (grad == 0).all()
    assert fast.linear_cross_entropy(X, W, y, b, reduction="none").shape == (0,)


# --- errors ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("label", [5, -1])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_labels_out_of_range(wrap, label):
    scores, labels = draw((4, 5)), jnp.array([0, 1, label, 2])
    message = rf"labels: targets\[2\] is {label}, but scores have 5 classes \(0 to 4\)"
    for function in (fast.softmax_cross_entropy_with_integer_labels, fast.multiclass_hinge_loss):
        with pytest.raises((ValueError, JaxError), match=message):
            jax.block_until_ready(wrap(function)(scores, labels))
    with pytest.raises((ValueError, JaxError), match=message):
        jax.block_until_ready(wrap(fast.linear_cross_entropy)(draw((4, 3)), draw((5, 3)), labels))


def test_negative_probabilities():
    with pytest.raises((ValueError, JaxError), match=r"labels: targets\[0, 1\] is -1.0; targets must be finite"):
        jax.block_until_ready(fast.softmax_cross_entropy(draw((1, 2)), jnp.array([[0.5, -1.0]])))


S, Y, X, W = (np.zeros(shape, kind) for shape, kind in (((4, 5), "f4"), (4, "i4"), ((4, 3), "f4"), ((5, 3), "f4")))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fast.softmax_cross_entropy_with_integer_labels(S.astype(int), Y), TypeError, "logits has dtype int32"),
        (lambda: fast.softmax_cross_entropy_with_integer_labels(S, S), TypeError, "labels has dtype float32"),
        (lambda: fast.softmax_cross_entropy_with_integer_labels(S, Y[:3]), ValueError, r"labels has shape \(3,\)"),
        (lambda: fast.softmax_cross_entropy_with_integer_labels(S, Y, axis=2), ValueError, "axis is 2, but logits"),
        (lambda: fast.softmax_cross_entropy_with_integer_labels(S, Y, axis=None), ValueError, "axis is None"),
        (lambda: fast.softmax_cross_entropy_with_integer_labels(S, Y, axis=(1, -1)), ValueError, "each dimension once"),
        (lambda: fast.softmax_cross_entropy_with_integer_labels(S, Y, axis="x"), ValueError, "axis is 'x'"),
        (lambda: fast.softmax_cross_entropy_with_integer_labels(S, Y, where=Y[:3]), ValueError, "where has shape"),
        (lambda: fast.softmax_cross_entropy_with_integer_labels(S[:, :0], Y), ValueError, "at least one class"),
        (lambda: fast.softmax_cross_entropy(S, S[:, :3]), ValueError, r"labels has shape \(4, 3\)"),
        (lambda: fast.softmax_cross_entropy(S.astype(int), S), TypeError, "logits has dtype"),
        (lambda: fast.softmax_cross_entropy(jnp.zeros((2, 3), "float8_e5m2"), S), TypeError, "floats of 16 to 64 bits"),
        (lambda: fast.softmax_cross_entropy_with_integer_labels(1.0, Y), ValueError, r"logits have shape \(\)"),
        (lambda: fast.multiclass_hinge_loss(S[0, 0], Y[0]), ValueError, r"scores has shape \(\)"),
        (lambda: fast.multiclass_hinge_loss(S > 0, Y), TypeError, "scores has dtype bool"),
        (lambda: fast.multiclass_hinge_loss(S, Y, over="all"), ValueError, "over is 'all'"),
        (lambda: fast.multiclass_hinge_loss(S, S), TypeError, "labels has dtype float32"),
        (lambda: fast.linear_cross_entropy(X, W.T, Y), ValueError, r"weight has shape \(3, 5\)"),
        (lambda: fast.linear_cross_entropy(X, W, Y[:2]), ValueError, r"labels has shape \(2,\)"),
        (lambda: fast.linear_cross_entropy(X, W, Y, Y), TypeError, "bias has dtype int32"),
        (lambda: fast.linear_cross_entropy(X, W, Y, S[0, :3]), ValueError, r"bias has shape \(3,\)"),
        (lambda: fast.linear_cross_entropy(X, W, Y, where=Y[:2]), ValueError, r"where has shape \(2,\)"),
        (lambda: fast.linear_cross_entropy(X, W, Y, reduction="max"), ValueError, "reduction is 'max'"),
        (lambda: fast.linear_cross_entropy(X, W, Y, loss=fl.Hinge()), TypeError, "must be a fastloss.Softmax"),
        (lambda: fast.linear_cross_entropy(X, W, Y, loss=fl.Softmax(class_weight=[1])), ValueError, "class_weight has"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_process_ends_with_calls_under_way():
    """Once it hung: XLA's thread asked for the lock of an interpreter that was at its end."""
    code = """
import jax, jax.numpy as jnp
from fastloss.adapters import jax as fast
f = jax.jit(jax.grad(lambda s, y: fast.softmax_cross_entropy_with_integer_labels(s @ s.T @ s, y).mean()))
s = jnp.ones((500, 500))
for _ in range(20):
    s = f(s, jnp.zeros(500, int))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_call_after_the_end_is_an_error():
    code = """
import atexit, sys
import jax, jax.numpy as jnp
def late():
    try:
        print(jax.block_until_ready(fast.multiclass_hinge_loss(jnp.ones((2, 3)), jnp.zeros(2, int))))
    except Exception as error:
        print(error)
atexit.register(late)
from fastloss.adapters import jax as fast
late()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "the Python interpreter has ended" in done.stdout, done.stdout + done.stderr


def test_without_jax_the_error_names_the_extra():
    code = "import sys; sys.modules['jax'] = None; import fastloss.adapters.jax"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError" in done.stderr
    assert 'pip install "fastloss[jax]"' in done.stderr


# --- the guide ------------------------------------------------------------------------------------------------------
def test_the_guide_gives_the_same_curve_when_only_the_import_changes():
    text = (Path(__file__).parents[1] / "docs" / "jax.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(examples) >= 2
    spaces = []
    for example in examples:
        spaces.append({})
        exec(compile(example, "docs/jax.md", "exec"), spaces[-1])
    theirs = {}
    ours = "from fastloss.adapters.jax import"
    assert examples[0].count(ours) == 1
    exec(compile(examples[0].replace(ours, "from optax import"), "docs/jax.md", "exec"), theirs)
    assert len(theirs["curve"]) == len(spaces[0]["curve"]) > 10
    assert theirs["curve"][-1] < 0.6 * theirs["curve"][0]
    np.testing.assert_allclose(spaces[0]["curve"], theirs["curve"], rtol=1e-4)
