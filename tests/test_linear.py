"""The linear objective and the fused linear layer: against plain NumPy, differences, SciPy and scikit-learn."""

import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import scipy.optimize
from sklearn._loss import HalfMultinomialLoss
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model._linear_loss import LinearModelLoss

import fastloss as fl
from tests.conftest import PLAIN

# (N, D, C): nothing a multiple of anything; rows shorter and longer than a vector, a tile and a stretch of features;
# few classes, the change to many, and more than one block of products.
SHAPES = [
    (0, 5, 3), (1, 1, 1), (1, 7, 3), (15, 16, 2), (16, 15, 10), (17, 33, 10), (31, 1, 7), (33, 64, 6), (65, 31, 13),
    (130, 515, 10), (67, 1030, 3), (100, 9, 64), (100, 9, 65), (50, 20, 127), (20, 3, 1025), (1100, 3, 70),
]  # fmt: skip


def oracle(loss, X, W, b, targets, weight=None, reduction="mean"):
    """Value, dW, db and dX in float64: scores by NumPy, row losses by the scores level of the reference."""
    X, W = np.asarray(X).astype(float), np.asarray(W).astype(float)
    scores = X @ W.T + (0 if b is None else np.asarray(b, float))
    value, grad = loss.value_and_grad(scores, targets, sample_weight=weight, reduction=reduction, backend="reference")
    kept = np.ones(len(X), bool) if weight is None else np.asarray(weight) > 0
    return value, grad[kept].T @ X[kept], grad.sum(axis=0), grad @ W


def problem(n, d, c, kind=np.float64, seed=0):
    """Features, weights with the bias last, and targets; sized so that scores stay near 1."""
    rng = np.random.default_rng(seed + n + d + c)
    X = (
        rng.integers(0, 256, (n, d)).astype(kind)
        if np.dtype(kind).kind in "iu"
        else rng.standard_normal((n, d)).astype(kind)
    )
    unit = 100 if np.dtype(kind).kind in "iu" else 1
    W = rng.standard_normal((c, d + 1)) / np.sqrt(d) / unit
    return X, W, rng.integers(0, c, n)


def assert_close(found, expected, dtype, scale, note=""):
    """To the accuracy of a sum in `dtype` of terms whose magnitudes sum to `scale`."""
    eps = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(found, expected, rtol=100 * eps, atol=30 * eps * scale, err_msg=str(note))


# --- against plain NumPy ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["softmax", "hinge squared", "hinge max", "logistic"])
def test_value_and_gradient(backend, name, dtype, bias):
    loss = PLAIN[name]  # one of each kind: the scores level has tests of all
    for n, d, c in SHAPES:
        X, W, y = problem(n, d, c, dtype)
        W = W if bias else W[:, :-1]
        objective = fl.LinearObjective(loss, X, y, bias=bias, backend=backend)
        value, grad = objective.value_and_grad(W)
        expected, dW, db, _ = oracle(loss, X, W[:, :d], W[:, d] if bias else None, y)
        assert grad.shape == W.shape
        assert grad.dtype == W.dtype
        scale = max(1, np.abs(X).max(initial=0)) * (c if loss.kind == "hinge" else 1)
        if n:
            assert value == pytest.approx(expected, rel=1000 * float(np.finfo(dtype).eps))
        else:
            assert math.isnan(value)
        assert_close(grad, np.column_stack([dW, db]) if bias else dW, dtype, scale, (n, d, c))
        np.testing.assert_equal(objective.value(W), value)


def test_zero_features(backend):
    value, grad = fl.LinearObjective(fl.Softmax(), np.empty((4, 0)), [0, 1, 0, 0], backend=backend).value_and_grad(
        np.zeros((2, 1))
    )
    assert value == pytest.approx(math.log(2))
    np.testing.assert_allclose(grad, [[-0.25], [0.25]])


def feature_layouts(X):
    yield "C order", X
    readonly = X.copy()
    readonly.flags.writeable = False
    yield "read-only", readonly
    yield "F order", np.asfortranarray(X)
    yield "every second row", np.repeat(X, 2, axis=0)[::2]
    yield "every second column", np.repeat(X, 2, axis=1)[:, ::2]
    yield "negative strides", X[::-1, ::-1].copy()[::-1, ::-1]
    yield "padded", np.pad(X, ((0, 0), (1, 2)))[:, 1:-2]
    buffer = np.zeros(X.nbytes + 1, np.uint8)
    unaligned = buffer[1:].view(X.dtype).reshape(X.shape)
    unaligned[...] = X
    yield "unaligned", unaligned
    # A record of one label byte and the pixels, as in CIFAR-10's binary files.
    record = np.zeros(len(X), [("label", np.uint8), ("pixels", X.dtype, X.shape[1:])])
    record["pixels"] = X
    yield "record", record["pixels"]


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.uint8, np.int16], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("n", "d", "c"), [(37, 21, 10), (19, 130, 3), (30, 10, 80)])
def test_layouts_of_features(backend, kind, n, d, c):
    X, W, y = problem(n, d, c, kind)
    computed = np.float32 if kind in (np.float32, np.uint8) else np.float64
    rows = np.random.default_rng(0).integers(0, n, 50)
    expected, dW, db, _ = oracle(fl.Softmax(), X, W[:, :-1], W[:, -1], y)
    some, some_dW, some_db, _ = oracle(fl.Softmax(), X[rows], W[:, :-1], W[:, -1], y[rows])
    for name, features in feature_layouts(X):
        before = features.tobytes()
        objective = fl.LinearObjective(fl.Softmax(), features, y, backend=backend)
        value, grad = objective.value_and_grad(W)
        eps, scale = float(np.finfo(computed).eps), np.abs(X.astype(float)).max()
        assert value == pytest.approx(expected, rel=1000 * eps), name
        assert_close(grad, np.column_stack([dW, db]), computed, scale, name)
        value, grad = objective.value_and_grad(W, rows=rows)
        assert value == pytest.approx(some, rel=1000 * eps), name
        assert_close(grad, np.column_stack([some_dW, some_db]), computed, scale, name)
        assert features.tobytes() == before, name


@pytest.mark.parametrize(
    "kind", [np.uint8, np.int8, np.int64, np.uint16, np.float16, ml_dtypes.bfloat16, bool, ">f4"], ids=str
)
def test_types_of_features(backend, kind):
    """Computed as if the features had been converted, without converting them as a whole."""
    X = np.random.default_rng(0).integers(0, 2 if kind is bool else 100, (40, 11)).astype(kind)
    y, W = np.arange(40) % 7, np.random.default_rng(1).standard_normal((7, 12)) / 50
    narrow = (np.dtype(kind).itemsize == 2 and np.dtype(kind).kind not in "iu") or kind in (np.uint8, ">f4")
    converted = X.astype(np.float32 if narrow else np.float64)
    for use in (None, [3, 3, 0, 39]):
        value, grad = fl.LinearObjective(fl.Softmax(), X, y, backend=backend).value_and_grad(W, rows=use)
        expected, expected_grad = fl.LinearObjective(fl.Softmax(), converted, y, backend=backend).value_and_grad(
            W, rows=use
        )
        eps = float(np.finfo(converted.dtype).eps)
        assert value == pytest.approx(expected, rel=100 * eps)
        assert grad.dtype == np.float64
        assert_close(grad, expected_grad, converted.dtype, 100)


@pytest.mark.parametrize(
    "kind", [np.float16, np.float32, np.float64, np.int64, np.uint8], ids=lambda kind: kind.__name__
)
def test_types_of_weights(backend, kind):
    """W is converted to the compute type; the gradient has W's type, or the compute type for integers."""
    X, y = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32), np.arange(30) % 3
    W = np.random.default_rng(1).integers(0, 3, (3, 5)).astype(kind)
    objective = fl.LinearObjective(fl.Softmax(), X, y, penalty=fl.L2(0.5), backend=backend)
    value, grad = objective.value_and_grad(W)
    expected, expected_grad = objective.value_and_grad(W.astype(np.float32))
    assert value == pytest.approx(expected, rel=1e-6)
    assert grad.dtype == (np.float32 if np.dtype(kind).kind in "iu" else kind)
    np.testing.assert_allclose(grad, expected_grad, rtol=2e-3 if kind is np.float16 else 1e-6, atol=1e-6)


# --- rows -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [np.float32, np.uint8])
@pytest.mark.parametrize(("d", "c"), [(33, 10), (3, 70)])
def test_rows_are_those_rows(backend, kind, d, c):
    """rows= gives what an objective over X[rows] gives: repeats, any order, any integer type, with weights."""
    X, W, y = problem(200, d, c, kind)
    rng = np.random.default_rng(5)
    weight, classes = rng.integers(0, 3, 200) / 2, rng.uniform(0, 2, c)
    y[::7] = -1
    loss = fl.Softmax(class_weight=classes, ignore_index=-1)
    objective = fl.LinearObjective(loss, X, y, sample_weight=weight, penalty=fl.L2(0.1), backend=backend)
    picks = {
        "some": rng.permutation(200)[:64],
        "repeats": rng.integers(0, 200, 300),
        "one": np.array([17]),
        "one, often": np.full(40, 3),
        "all": np.arange(200),
        "backwards": np.arange(200)[::-1],
        "strided int32": np.arange(200, dtype=np.int32)[::4],
        "uint8": rng.integers(0, 200, 50).astype(np.uint8),
        "uint64": rng.integers(0, 200, 50).astype(np.uint64),
        "big-endian": rng.integers(0, 200, 50).astype(">i8"),
        "list": [5, 5, 199, 0],
    }
    for name, rows in picks.items():
        gathered = fl.LinearObjective(
            loss, X[rows], y[rows], sample_weight=weight[rows], penalty=fl.L2(0.1), backend=backend
        )
        (value, grad), (expected, expected_grad) = objective.value_and_grad(W, rows=rows), gathered.value_and_grad(W)
        np.testing.assert_allclose(value, expected, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(objective.value(W, rows=rows), value, rtol=1e-6, err_msg=name)
        if not math.isnan(expected):
            assert_close(grad, expected_grad, np.float32, float(np.abs(X).max()), name)


def test_no_rows_picked(backend):
    X, W, y = problem(10, 4, 3)
    objective = fl.LinearObjective(fl.Softmax(), X, y, penalty=fl.L2(0.5), backend=backend)
    value, grad = objective.value_and_grad(W, rows=[])
    assert math.isnan(value)
    np.testing.assert_allclose(grad[:, :-1], W[:, :-1])
    assert not grad[:, -1].any()
    assert fl.LinearObjective(fl.Softmax(), X, y, reduction="sum", backend=backend).value(W, rows=[]) == 0


@pytest.mark.parametrize("bad", [-1, 10, 2**40])
@pytest.mark.parametrize("position", [0, 3])
def test_rows_out_of_range(backend, bad, position):
    X, W, y = problem(10, 4, 3)
    rows = np.array([1, 2, 3, 4])
    rows[position] = bad
    out = np.full(W.shape, 7.0)
    with pytest.raises(IndexError) as error:
        fl.LinearObjective(fl.Softmax(), X, y, backend=backend).value_and_grad(W, rows=rows, out=out)
    assert str(error.value) == f"rows[{position}] is {bad}, but X has 10 rows (0 to 9)"
    assert (out == 7).all()


# --- weights ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("junk", [np.nan, np.inf])
@pytest.mark.parametrize(("d", "c"), [(33, 10), (3, 70)])
def test_rows_of_weight_0_may_hold_anything(backend, loss, dtype, junk, d, c):
    X, W, y = problem(70, d, c, dtype)
    weight = np.random.default_rng(0).integers(0, 3, 70)
    weight[:17] = 0
    kept = weight > 0
    X[~kept] = junk
    more = {"sample_weight": weight, "backend": backend}
    value, grad = fl.LinearObjective(loss, X, y, **more).value_and_grad(W)
    expected, dW, db, dX = oracle(loss, X[kept], W[:, :-1], W[:, -1], y[kept], weight[kept])
    eps, scale = float(np.finfo(dtype).eps), 3 * (c if loss.kind == "hinge" else 1)
    assert value == pytest.approx(expected, rel=1000 * eps)
    assert_close(grad, np.column_stack([dW, db]), dtype, scale)
    value, grads = fl.linear_value_and_grad(loss, X, W[:, :-1], y, W[:, -1], **more)
    assert value == pytest.approx(expected, rel=1000 * eps)
    assert_close(grads["W"], dW, dtype, scale)
    assert_close(grads["X"][kept], dX, dtype, scale)
    assert not grads["X"][~kept].any()
    values = fl.LinearObjective(loss, X, y, **more).values(np.stack([W, W]))
    np.testing.assert_allclose(values, [expected] * 2, rtol=1000 * eps)


@pytest.mark.parametrize("junk", [np.nan, np.inf])
@pytest.mark.parametrize("c", [10, 70])
def test_nan_and_inf_in_features_propagate_without_a_warning(backend, dtype, junk, c):
    X, W, y = problem(40, 5, c, dtype)
    X[23, 2] = junk
    objective = fl.LinearObjective(fl.Softmax(), X, y, backend=backend)
    value, grad = objective.value_and_grad(W)
    assert not math.isfinite(value)
    assert np.isnan(grad[:, 2]).any()
    rows = np.flatnonzero(np.arange(40) != 23)
    assert math.isfinite(objective.value(W, rows=rows))
    assert np.isfinite(objective.value_and_grad(W, rows=rows)[1]).all()
    row_losses, grads = fl.linear_value_and_grad(fl.Softmax(), X, W[:, :-1], y, reduction="none", backend=backend)
    np.testing.assert_array_equal(np.isfinite(row_losses), np.arange(40) != 23)
    np.testing.assert_array_equal(np.isfinite(grads["X"]).all(axis=1), np.arange(40) != 23)


def test_nan_in_weights_propagates(backend):
    X, W, y = problem(40, 5, 4)
    W[2, 3] = np.nan
    assert math.isnan(fl.LinearObjective(fl.Hinge(), X, y, backend=backend).value(W))


@pytest.mark.parametrize("loss", [fl.Softmax(), fl.Hinge(power=2), fl.Logistic()], ids=["softmax", "hinge", "logistic"])
def test_nan_propagates_through_hessian_products(loss):
    X, W, y = problem(40, 5, 4)
    V = np.linspace(-1, 1, W.size).reshape(W.shape)
    W[2, 3] = np.nan
    assert np.isnan(fl.LinearObjective(loss, X, y, backend="reference").hessp(W, V)).any()


# --- shift, scale, penalties --------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("use", ["shift", "scale", "both"])
@pytest.mark.parametrize("c", [5, 70])
def test_shift_and_scale_stand_for_standardised_features(backend, bias, use, c):
    X, W, y = problem(90, 8, c)
    X = 5 + X * np.linspace(0.1, 20, 8)
    shift = X.mean(axis=0) if use != "scale" else None
    scale = -X.std(axis=0) if use != "shift" else None
    standard = (X - (0 if shift is None else shift)) / (1 if scale is None else scale)
    W = W if bias else W[:, :-1]
    more = {"bias": bias, "penalty": fl.L2(0.3), "backend": backend}
    folded = fl.LinearObjective(fl.Softmax(), X, y, shift=shift, scale=scale, **more)
    plain = fl.LinearObjective(fl.Softmax(), standard, y, **more)
    for rows in (None, [4, 4, 80]):
        (value, grad), (expected, expected_grad) = (
            folded.value_and_grad(W, rows=rows),
            plain.value_and_grad(W, rows=rows),
        )
        assert value == pytest.approx(expected, rel=1e-12)
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(folded.values(np.stack([W, -W])), plain.values(np.stack([W, -W])), rtol=1e-12)
    with fl.use_backend("reference"):
        V = np.linspace(-1, 1, W.size).reshape(W.shape)
        folded = fl.LinearObjective(fl.Softmax(), X, y, bias=bias, shift=shift, scale=scale)
        plain = fl.LinearObjective(fl.Softmax(), standard, y, bias=bias)
        np.testing.assert_allclose(folded.hessp(W, V), plain.hessp(W, V), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, np.uint8], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("c", [5, 70])
def test_features_with_means_of_1000_standard_deviations(backend, kind, bias, c):
    """As accurate as standardised features: the truth is in float64, W is what the objective is given."""
    rng = np.random.default_rng(c)
    normal, wide = rng.standard_normal((300, 23)), np.dtype(kind) == np.float64
    if kind is np.uint8:
        X = np.clip(np.round(rng.uniform(50, 250, 23) + 0.25 * normal), 0, 255).astype(kind)
    elif kind is np.float16:
        X = (rng.uniform(1024, 2048, 23) + normal).astype(kind)
    else:
        X = ((rng.choice([-1000, 1000], 23) + normal) * 10.0 ** rng.uniform(-3, 3, 23)).astype(kind)
    shift, scale = X.mean(axis=0, dtype=np.float64), X.astype(float).std(axis=0)
    scale[scale == 0] = 1
    y, W = rng.integers(0, c, 300), rng.standard_normal((c, 23 + bias)).astype(np.float64 if wide else np.float32) / 3
    V, exact = W[::-1], W.astype(float)
    loss, rows, more = fl.Softmax(), rng.integers(0, 300, 80), {"shift": shift, "scale": scale, "bias": bias}
    objective = fl.LinearObjective(loss, X, y, backend=backend, **more)
    truth = fl.LinearObjective(loss, (X.astype(float) - shift) / scale, y, bias=bias, backend="reference")
    eps = float(np.finfo(W.dtype).eps)
    for picked in (None, rows):
        (value, grad), (expected, expected_grad) = (
            objective.value_and_grad(W, rows=picked),
            truth.value_and_grad(exact, rows=picked),
        )
        assert value == pytest.approx(expected, rel=2 * eps)
        np.testing.assert_allclose(grad, expected_grad, rtol=0, atol=16 * eps * np.abs(expected_grad).max())
    np.testing.assert_allclose(objective.values(np.stack([W, V])), truth.values(np.stack([exact, V])), rtol=2 * eps)
    product = fl.LinearObjective(loss, X, y, backend="reference", **more).hessp(W, V)
    expected = truth.hessp(exact, V.astype(float))
    np.testing.assert_allclose(product, expected, rtol=0, atol=16 * eps * np.abs(expected).max())


def test_shift_beyond_the_compute_type():
    with pytest.raises(ValueError, match=r"shift\[1\] is 1e\+300, too large for float32"):
        fl.LinearObjective(fl.Softmax(), np.ones((3, 2), np.float32), [0, 1, 0], shift=[0, 1e300])


@pytest.mark.parametrize("penalty", [fl.L2(0.3), fl.L1(0.2), fl.ElasticNet(0.2, beta=3.0), fl.MaxNorm(0.5)], ids=repr)
@pytest.mark.parametrize("bias", [True, False])
def test_penalties_are_added_and_spare_the_bias(backend, penalty, bias):
    X, W, y = problem(30, 6, 4)
    W = W if bias else W[:, :-1]
    weights = W[:, :6]
    plain = fl.LinearObjective(fl.Hinge(), X, y, bias=bias, backend=backend)
    objective = fl.LinearObjective(fl.Hinge(), X, y, bias=bias, penalty=penalty, backend=backend)
    (value, grad), (base, base_grad) = objective.value_and_grad(W), plain.value_and_grad(W)
    assert value == pytest.approx(base + penalty.value(weights), rel=1e-14)
    np.testing.assert_allclose(grad[:, :6], base_grad[:, :6] + penalty.value_and_grad(weights)[1], rtol=1e-14)
    np.testing.assert_array_equal(grad[:, 6:], base_grad[:, 6:])
    np.testing.assert_array_equal(objective.data_value_and_grad(W)[1], base_grad)
    assert objective.data_value_and_grad(W)[0] == base
    assert objective.value(W, rows=[1]) == pytest.approx(plain.value(W, rows=[1]) + penalty.value(weights))


def test_reductions(backend):
    X, W, y = problem(30, 6, 4)
    weight = np.linspace(0, 2, 30)
    mean, total = (
        fl.LinearObjective(fl.Softmax(), X, y, sample_weight=weight, reduction=r, backend=backend).value_and_grad(W)
        for r in ("mean", "sum")
    )
    assert total[0] == pytest.approx(mean[0] * weight.sum())
    np.testing.assert_allclose(total[1], mean[1] * weight.sum(), rtol=1e-13, atol=1e-15)


# --- many candidates, products with the Hessian, flat vectors -------------------------------------------------------
@pytest.mark.parametrize("c", [1, 3, 10, 70])
def test_values_of_many_candidates(backend, loss, c):
    X, _, y = problem(150, 7, c)
    objective = fl.LinearObjective(
        loss, X, y, sample_weight=np.arange(150) % 4, penalty=fl.L2(0.1), backend=backend, chunk_rows=64
    )
    stack = np.random.default_rng(8).standard_normal((5, c, 8))
    found = objective.values(stack)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, [objective.value(W) for W in stack], rtol=1e-12)
    assert objective.values(stack[:0]).shape == (0,)
    with fl.use_backend("reference"):
        few = fl.LinearObjective(fl.Softmax(label_smoothing=0.1), X, y)
        np.testing.assert_allclose(few.values(stack), [few.value(W) for W in stack], rtol=1e-12)


HESSIANS = {
    "softmax": fl.Softmax(),
    "temperature": fl.Softmax(temperature=0.5),
    "smoothing, class weight": fl.Softmax(label_smoothing=0.1, class_weight=[1, 0.5, 2, 3]),
    "class weight": fl.Softmax(class_weight=[1, 0.5, 2, 3]),
    "logistic": fl.Logistic(),
    "logistic, options": fl.Logistic(pos_weight=[1, 0.5, 2, 3], label_smoothing=0.1, over="mean"),
    "hinge squared": fl.Hinge(power=2),
    "hinge squared mean": fl.Hinge(power=2, over="mean"),
    "hinge squared max": fl.Hinge(power=2, over="max", margin=2.0),
    "hinge squared, pair margins": fl.Hinge(power=2, pair_margins=np.arange(16.0).reshape(4, 4) / 8),
}


@pytest.mark.parametrize("loss", HESSIANS.values(), ids=HESSIANS.keys())
@pytest.mark.parametrize("rows", [None, [0, 5, 5, 29]], ids=["all", "rows"])
def test_hessian_product_is_the_difference_of_gradients(loss, rows):
    X, W, y = problem(30, 6, 4)
    weight = np.arange(30) % 3
    objective = fl.LinearObjective(loss, X, y, sample_weight=weight, penalty=fl.L2(0.2), backend="reference")
    V, h = np.random.default_rng(9).standard_normal(W.shape), 1e-6
    rise = objective.value_and_grad(W + h * V, rows)[1] - objective.value_and_grad(W - h * V, rows)[1]
    np.testing.assert_allclose(objective.hessp(W, V, rows), rise / (2 * h), atol=1e-7)


def test_hessian_product_that_does_not_exist():
    X, W, y = problem(30, 6, 4)
    with fl.use_backend("reference"):
        for loss in (fl.Hinge(), fl.Softmax(z_loss=0.1), fl.Softmax(softcap=3.0)):
            with pytest.raises(fl.BackendError, match=r"second derivative|Hessian"):
                fl.LinearObjective(loss, X, y).hessp(W, W)
        with pytest.raises(ValueError, match="penalty is L1"):
            fl.LinearObjective(fl.Softmax(), X, y, penalty=fl.L1(1.0)).hessp(W, W)
        with pytest.raises(ValueError, match="V has shape"):
            fl.LinearObjective(fl.Softmax(), X, y).hessp(W, W[:3])


def test_hessian_products_of_every_backend(backend):
    X, W, y = problem(30, 6, 4)
    for loss in (fl.Softmax(), fl.Hinge(power=2)):
        found = fl.LinearObjective(loss, X, y, backend=backend).hessp(W, W)
        np.testing.assert_allclose(found, fl.LinearObjective(loss, X, y, backend="reference").hessp(W, W))


# All of SciPy's methods that use a gradient, but for those that want the whole Hessian.
METHODS = {
    "L-BFGS-B": {"ftol": 1e-15, "gtol": 1e-9},
    "BFGS": {"gtol": 1e-7},
    "CG": {"gtol": 1e-7},
    "TNC": {"ftol": 0, "gtol": 1e-8, "maxfun": 10000},
    "SLSQP": {"ftol": 1e-14, "maxiter": 1000},
    "Newton-CG": {"xtol": 1e-10},
    "trust-ncg": {"gtol": 1e-7},
    "trust-krylov": {"gtol": 1e-7},
    "trust-constr": {"gtol": 1e-7},
}
WITH_HESSIAN = ("Newton-CG", "trust-ncg", "trust-krylov", "trust-constr")


@pytest.mark.parametrize("method", METHODS)
def test_scipy_minimises(backend, method):
    """All methods reach the same minimum: those that keep the gradient would go wrong if it were reused."""
    X, W, y = problem(60, 4, 3)
    objective = fl.LinearObjective(fl.Softmax(), X, y, penalty=fl.L2(0.05), backend=backend).flat
    hessp = {"hessp": objective.hessp} if method in WITH_HESSIAN else {}
    found = scipy.optimize.minimize(objective, W.ravel(), jac=True, method=method, options=METHODS[method], **hessp)
    assert np.abs(objective(found.x)[1]).max() < 1e-5
    assert found.fun == pytest.approx(best_value(X, y), abs=1e-9)


def best_value(X, y):
    """The minimum, by steps of gradient descent on plain NumPy."""
    W, one_hot = np.zeros((3, 5)), np.eye(3)[y]
    extended = np.column_stack([X, np.ones(len(X))])
    for _ in range(4000):
        p = np.exp(extended @ W.T)
        p /= p.sum(axis=1, keepdims=True)
        grad = (p - one_hot).T @ extended / len(X)
        grad[:, :-1] += 0.1 * W[:, :-1]
        W -= 0.5 * grad
    return -np.log(p[np.arange(len(X)), y]).mean() + 0.05 * (W[:, :-1] ** 2).sum()


def test_flat_gives_fresh_arrays_and_refuses_penalties_without_gradient(backend):
    X, W, y = problem(60, 4, 3)
    flat = fl.LinearObjective(fl.Softmax(), X, y, backend=backend).flat
    first, second = flat(W.ravel())[1], flat(W.ravel())[1]
    assert not np.shares_memory(first, second)
    assert first.shape == (15,)
    for penalty in (fl.L1(0.1), fl.ElasticNet(0.1, beta=1.0), fl.MaxNorm(1.0)):
        with pytest.raises(ValueError, match=f"penalty is {type(penalty).__name__}"):
            _ = fl.LinearObjective(fl.Softmax(), X, y, penalty=penalty, backend=backend).flat
    with pytest.raises(ValueError, match=r"w has shape \(14,\)"):
        flat(np.zeros(14))


def test_out_receives_the_gradient(backend, dtype):
    for c in (3, 70):
        X, W, y = problem(60, 4, c, dtype)
        W = W.astype(dtype)
        objective = fl.LinearObjective(fl.Softmax(), X, y, penalty=fl.L2(0.1), backend=backend)
        _, expected = objective.value_and_grad(W)
        wide = np.full((2 * c, 12), 9, dtype)
        for out in (np.empty_like(W), np.empty((5, c), dtype).T, wide[::2, 1:6], np.empty((c, 5), dtype)[::-1, ::-1]):
            _, grad = objective.value_and_grad(W, out=out)
            assert grad is out
            np.testing.assert_array_equal(out, expected)
        wide[::2, 1:6] = 9
        assert (wide == 9).all()


def test_one_objective_for_any_number_of_classes(backend):
    """Targets are checked against the classes of each W; a W with too few of them raises, and harms nothing."""
    X, _, y = problem(60, 4, 3)
    objective = fl.LinearObjective(fl.Softmax(), X, y, backend=backend)
    expected = objective.value(np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"targets\[\d+\] is 2, but scores have 2 classes"):
        objective.value(np.zeros((2, 5)))
    assert objective.value(np.zeros((3, 5))) == expected
    assert objective.value(np.zeros((100, 5))) == pytest.approx(math.log(100))


def test_later_changes_to_targets_and_weights_do_not_count(backend):
    X, W, y = problem(60, 4, 3)
    weight = np.ones(60)
    objective = fl.LinearObjective(fl.Softmax(), X, y, sample_weight=weight, backend=backend)
    before = objective.value(W)
    y[:], weight[:] = 77, np.nan
    assert objective.value(W) == before


# --- linear_value_and_grad --------------------------------------------------------------------------------------
SUBSETS = [(), ("W",), ("b",), ("X",), ("W", "b"), ("b", "X"), ("X", "W"), ("W", "b", "X")]


@pytest.mark.parametrize(("n", "d", "c"), [(37, 11, 10), (41, 13, 500), (33, 1500, 66)])
@pytest.mark.parametrize("chunk_rows", [None, 1, 16])
def test_linear_layer(backend, dtype, n, d, c, chunk_rows):
    X, W, y = problem(n, d, c, dtype)
    b, W = W[:, -1].astype(dtype), W[:, :-1].astype(dtype)
    eps = float(np.finfo(dtype).eps)
    for loss in (fl.Softmax(), fl.Hinge(over="mean")):
        expected, dW, db, dX = oracle(loss, X, W, b, y)
        for wrt in SUBSETS:
            value, grads = fl.linear_value_and_grad(loss, X, W, y, b, wrt=wrt, chunk_rows=chunk_rows, backend=backend)
            assert value == pytest.approx(expected, rel=1000 * eps)
            assert set(grads) == set(wrt)
            for name, grad in grads.items():
                assert grad.dtype == dtype
                assert_close(grad, {"W": dW, "b": db, "X": dX}[name], dtype, 5 / n, (name, wrt))


@pytest.mark.parametrize(("n", "d", "c"), [(5000, 6, 70), (20, 5, 5000), (4500, 300, 66), (40, 2000, 1500)])
def test_linear_layer_of_products_in_several_parts(backend, dtype, n, d, c):
    """Long sums in parts of their own, several blocks of classes and of features; features of other types too."""
    X, W, y = problem(n, d, c, np.uint8)
    b, W, X = W[:, -1].astype(dtype), W[:, :-1].astype(dtype), X.astype(dtype)
    expected, dW, db, dX = oracle(fl.Softmax(), X, W, b, y)
    eps = float(np.finfo(dtype).eps)
    for features in (X, X.astype(np.uint8) if dtype is np.float32 else X.astype(np.int16)):
        value, grads = fl.linear_value_and_grad(fl.Softmax(), features, W, y, b, backend=backend)
        assert value == pytest.approx(expected, rel=1000 * eps)
        assert_close(grads["W"], dW, dtype, 255)
        assert_close(grads["b"], db, dtype, 1)
        assert_close(grads["X"], dX, dtype, np.abs(W).max())


@pytest.mark.parametrize(("n", "d", "c"), [(300, 40, 2000), (100, 30, 200)])
def test_gradients_that_are_not_asked_for_cost_no_product(compiled, monkeypatch, n, d, c):
    X, W, y = problem(n, d, c)
    seen, matmul = [], np.matmul

    def counted(left, right, out):
        seen.append(left.shape[0] * left.shape[1] * right.shape[1])
        return matmul(left, right, out=out)

    monkeypatch.setattr(np, "matmul", counted)
    for wrt, products in (((), 1), (("b",), 1), (("W", "b"), 2), (("X",), 2), (("W", "b", "X"), 3)):
        seen.clear()
        fl.linear_value_and_grad(fl.Softmax(), X, W[:, :-1], y, wrt=wrt, backend=compiled)
        assert sum(seen) == products * n * d * c, wrt


@pytest.mark.parametrize(("n", "d", "c"), [(4000, 8, 8192), (400, 8, 100_000), (500_000, 2, 100)])
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.uint8], ids=lambda kind: kind.__name__)
def test_memory_of_many_classes(n, d, c, kind):
    """The scores alone would take at least 130 MB."""
    X, y = np.random.default_rng(0).integers(0, 9, (n, d)).astype(kind), np.arange(n) % c
    W, b = np.zeros((c, d), np.float64 if kind is np.float64 else np.float32), np.zeros(c)
    tracemalloc.start()
    try:
        value, grads = fl.linear_value_and_grad(fl.Softmax(), X, W, y, b, n_threads=2)
        _, peak = tracemalloc.get_traced_memory()
        objective = fl.LinearObjective(fl.Softmax(), X, y, n_threads=2, scale=np.full(d, 2.0), shift=np.ones(d))
        stack = np.zeros((2, c, d + 1), W.dtype)
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        values = objective.values(stack)
        _, peak_of_values = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert value == pytest.approx(math.log(c))
    np.testing.assert_allclose(values, math.log(c))
    assert peak - sum(grad.nbytes for grad in grads.values()) < 64e6
    assert peak_of_values - before < 64e6


@pytest.mark.parametrize("layout", ["F order", "every second column", "uint8", "picked"])
def test_features_are_never_converted_as_a_whole(layout):
    X = np.zeros(
        (300_000, 64), np.uint8 if layout == "uint8" else np.float32, order="F" if layout == "F order" else "C"
    )
    X = np.zeros((300_000, 128), np.float32)[:, ::2] if layout == "every second column" else X
    objective = fl.LinearObjective(fl.Softmax(), X, np.zeros(len(X), np.uint8), shift=np.ones(64), n_threads=2)
    plain = fl.LinearObjective(fl.Softmax(), X, np.zeros(len(X), np.uint8), n_threads=2)
    W, rows = np.zeros((70, 65), np.float32), np.arange(len(X), dtype=np.int32) if layout == "picked" else None
    tracemalloc.start()
    try:
        for some in (objective, plain):
            some.value_and_grad(W, rows=rows)
            some.values(W[None])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 48e6 < 4 * X.size


@pytest.mark.parametrize("c", [10, 130])
def test_linear_layer_with_weights_and_upstream(backend, c):
    X, W, y = problem(60, 7, c)
    b, W = W[:, -1], W[:, :-1]
    rng = np.random.default_rng(7)
    weight, upstream = rng.integers(0, 3, 60) / 2, rng.integers(-1, 2, 60) / 4
    y[::5] = 3
    loss = fl.Softmax(ignore_index=3)
    scores_losses, scores_grad = loss.value_and_grad(
        X @ W.T + b, y, sample_weight=weight, upstream=upstream, reduction="none", backend="reference"
    )
    losses, grads = fl.linear_value_and_grad(
        loss, X, W, y, b, sample_weight=weight, upstream=upstream, reduction="none", backend=backend
    )
    np.testing.assert_allclose(losses, scores_losses, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(grads["W"], scores_grad.T @ X, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(grads["b"], scores_grad.sum(axis=0), rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(grads["X"], scores_grad @ W, rtol=1e-10, atol=1e-13)
    _, plain = fl.linear_value_and_grad(loss, X, W, y, b, reduction="sum", backend=backend)
    _, pulled = fl.linear_value_and_grad(loss, X, W, y, b, reduction="sum", upstream=-3.0, backend=backend)
    for name in plain:
        np.testing.assert_allclose(pulled[name], -3 * plain[name], rtol=1e-12, atol=1e-14)


def test_linear_layer_without_b_has_its_gradient(backend):
    X, W, y = problem(60, 7, 10)
    value, grads = fl.linear_value_and_grad(fl.Softmax(), X, W[:, :-1], y, backend=backend)
    expected, expected_grads = fl.linear_value_and_grad(fl.Softmax(), X, W[:, :-1], y, np.zeros(10), backend=backend)
    assert value == expected
    for name in ("W", "b", "X"):
        np.testing.assert_array_equal(grads[name], expected_grads[name])


@pytest.mark.parametrize("c", [10, 130])
def test_linear_layer_layouts(backend, c):
    X, W, y = problem(60, 7, c)
    b, W = W[:, -1], W[:, :-1]
    value, grads = fl.linear_value_and_grad(fl.Softmax(), X, W, y, b, backend=backend)
    for name, features in feature_layouts(X):
        for weights in (np.asfortranarray(W), W[::-1, ::-1].copy()[::-1, ::-1], W.tolist()):
            found, some = fl.linear_value_and_grad(
                fl.Softmax(), features, weights, y, np.repeat(b, 2)[::2], backend=backend
            )
            assert found == pytest.approx(value, rel=1e-13)
            for key in grads:
                np.testing.assert_allclose(some[key], grads[key], rtol=1e-9, atol=1e-13, err_msg=name)


def test_linear_layer_of_nothing(backend):
    value, grads = fl.linear_value_and_grad(fl.Softmax(), np.empty((0, 4)), np.ones((100, 4)), [], backend=backend)
    assert math.isnan(value)
    assert grads["X"].shape == (0, 4)
    assert not grads["W"].any()
    assert not grads["b"].any()


# --- against scikit-learn -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return X / 16, y


def test_objective_is_that_of_scikit_learn(backend, digits):
    X, y = digits
    rng = np.random.default_rng(0)
    W, weight = rng.standard_normal((10, 65)), rng.uniform(0, 2, len(y))
    theirs = LinearModelLoss(base_loss=HalfMultinomialLoss(n_classes=10), fit_intercept=True)
    expected, expected_grad = theirs.loss_gradient(
        W.ravel(order="F"), X, y.astype(float), sample_weight=weight, l2_reg_strength=0.3, n_threads=1
    )
    objective = fl.LinearObjective(fl.Softmax(), X, y, sample_weight=weight, penalty=fl.L2(0.15), backend=backend)
    value, grad = objective.value_and_grad(W)
    assert value == pytest.approx(expected, rel=1e-13)
    np.testing.assert_allclose(grad.ravel(order="F"), expected_grad, rtol=1e-11, atol=1e-14)


def test_minimum_is_that_of_scikit_learn(digits):
    X, y = digits[0][:300], digits[1][:300]
    strength = 1 / (2 * 0.1 * len(y))  # C · Σ loss + ½ ‖w‖², divided by C · N
    theirs = LogisticRegression(C=0.1, tol=1e-6, max_iter=1000).fit(X, y)
    objective = fl.LinearObjective(fl.Softmax(), X, y, penalty=fl.L2(strength))
    options = {"gtol": 1e-7, "ftol": 1e-14}
    found = scipy.optimize.minimize(objective.flat, np.zeros(10 * 65), jac=True, method="L-BFGS-B", options=options)
    W = found.x.reshape(10, 65)
    np.testing.assert_allclose(W[:, :-1], theirs.coef_, atol=2e-4)
    np.testing.assert_allclose(W[:, -1] - W[:, -1].mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=2e-4)


def test_rows_and_weights_that_are_not_aligned_in_memory(backend):
    """As a field of a record may be: kernels read whole numbers."""
    X, W, y = problem(600, 5, 4)
    objective = fl.LinearObjective(fl.Softmax(), X, y, backend=backend)
    wanted = np.random.default_rng(0).integers(256, 600, 50)
    rows = np.zeros(50 * 8 + 1, np.uint8)[1:].view(np.int64)
    rows[:] = wanted
    records = np.zeros(len(W), [("a", "u1"), ("W", W.dtype, W.shape[1])])
    records["W"] = W
    assert not rows.flags.aligned
    assert not records["W"].flags.aligned
    assert objective.value(records["W"], rows=rows) == objective.value(W, rows=wanted)


def test_picked_rows_that_weigh_next_to_nothing(backend):
    X, W, y = problem(40, 5, 4, np.float32)
    weight = np.ones(40)
    weight[7] = 1e-37
    objective = fl.LinearObjective(fl.Softmax(), X, y, sample_weight=weight, backend=backend)
    alone = fl.LinearObjective(fl.Softmax(), X[7:8], y[7:8], backend=backend)
    value, grad = objective.value_and_grad(W, rows=[7])
    expected, expected_grad = alone.value_and_grad(W)
    assert value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-6)
