"""Sparse features: against the same features dense, by the reference in float64."""

import numpy as np
import pytest
import scipy.sparse as sp

import fastloss as fl
from fastloss import backends, landscape, sparse
from fastloss.data import load_libsvm
from fastloss.model import LinearModel
from fastloss.train import dual, lbfgs, sgd, smoothing
from tests.conftest import BACKENDS, same_bits

LOSSES = {
    "softmax": fl.Softmax(),
    "hinge": fl.Hinge(),
    "hinge squared": fl.Hinge(power=2),
    "logistic": fl.Logistic(),
    "options": fl.Softmax(label_smoothing=0.1, class_weight=np.arange(1, 34)),
}
SHAPES = [(50, 30, 33), (7, 5, 2), (9, 40, 70), (1, 1, 3), (40, 3, 16), (33, 17, 1), (300, 5, 100)]


def problem(shape, dtype, density=0.3, empty=True):
    n, d, c = shape
    rng = np.random.default_rng(list(shape))
    X = sp.random(n, d, density, format="csr", dtype=dtype, random_state=rng)
    if empty:
        X.data[np.repeat(np.arange(n) % 3 == 0, np.diff(X.indptr))] = 0
        X.eliminate_zeros()
    return X, rng.integers(0, c, n), rng.standard_normal((c, d + 1)).astype(dtype), rng


def close(found, wanted, dtype, factor=1):
    scale = max(1.0, np.abs(wanted).max(initial=0))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=factor * scale * {"f": 1e-5, "d": 1e-13}[dtype])


@pytest.mark.parametrize("dtype", ["f", "d"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_objective(name, shape, dtype):
    X, y, W, rng = problem(shape, dtype)
    n, d, c = shape
    weight = rng.uniform(0, 2, n)
    weight[1::4] = 0
    dense, rows = X.toarray().astype(float), rng.integers(0, n, 9)
    for loss in LOSSES.values():
        if loss.class_weight is not None and len(loss.class_weight) != c:
            continue
        for options in (
            {}, {"sample_weight": weight}, {"shift": rng.standard_normal(d), "scale": rng.uniform(1, 2, d)},
            {"bias": False, "chunk_rows": 3, "reduction": "sum"},
        ):  # fmt: skip
            bias = options.get("bias", True)
            at = W if bias else np.ascontiguousarray(W[:, :d])
            for layout in (np.ascontiguousarray, np.asfortranarray):
                ours = fl.LinearObjective(loss, X, y, penalty=fl.L2(0.1), backend=name, **options)
                its = fl.LinearObjective(loss, dense, y, penalty=fl.L2(0.1), backend="reference", **options)
                for picked in (None, rows):
                    wanted, wanted_grad = its.value_and_grad(at.astype(float), picked)
                    value, grad = ours.value_and_grad(layout(at), picked, out=layout(np.empty_like(at)))
                    close(value, wanted, dtype)
                    close(grad, wanted_grad, dtype, 4)
                    close(ours.value(layout(at), picked), wanted, dtype)
                stack = np.stack([at, 2 * at])
                close(ours.values(stack), its.values(stack.astype(float)), dtype)


@pytest.mark.parametrize("name", BACKENDS)
def test_layer(name):
    X, y, W, rng = problem((40, 9, 5), "f")
    weight, upstream = rng.uniform(0, 2, 40), rng.standard_normal(40)
    weight[::5] = 0
    none = {"reduction": "none", "sample_weight": weight, "upstream": upstream}
    for options in ({}, {"sample_weight": weight}, none):
        arguments = {"wrt": ("W", "b"), "backend": name, **options}
        b = W[:, -1].copy()
        found, grads = fl.linear_value_and_grad(fl.Softmax(), X, W[:, :-1], y, b, **arguments)
        wanted, wanted_grads = fl.linear_value_and_grad(
            fl.Softmax(), X.toarray().astype(float), W[:, :-1].astype(float), y, b.astype(float),
            **(arguments | {"backend": "reference"}),
        )  # fmt: skip
        close(found, wanted, "f")
        for key in ("W", "b"):
            close(grads[key], wanted_grads[key], "f")


@pytest.mark.parametrize(("dtype", "index"), [("f", np.int32), ("d", np.int64), ("f", np.int64), ("d", np.int32)])
@pytest.mark.parametrize("name", BACKENDS)
def test_products(name, dtype, index):
    """Scores and sums of all rows, some, and picked ones; rows of many numbers; all numbers of classes of a vector."""
    backend, rng, eps = backends.get(name), np.random.default_rng(0), np.finfo(dtype).eps
    shapes = [(50, 30, 33), (0, 4, 3), (5, 0, 3), (2000, 3, 17), (130, 700, 64), (3, 1500, 129)]
    for n, d, c in shapes + [(9, 7, c) for c in range(1, 18)]:
        its = rng.standard_normal((n, d)) * (rng.random((n, d)) < (1 if n == 3 else 0.3))
        X = sparse.Csr(sp.csr_array(its.astype(dtype)))
        X.indices, X.starts = X.indices.astype(index), X.starts.astype(index)
        W, b = rng.standard_normal((d, c)).astype(dtype), rng.standard_normal(c).astype(dtype)
        scale = 20 * eps * (1 + np.abs(its).sum(axis=1).max(initial=0) + np.abs(its).sum(axis=0).max(initial=0))
        for at in (slice(0, n), slice(n // 3, n), rng.integers(0, max(1, n), 2 * n)):
            some, found = its[at].astype(dtype).astype("d"), []
            for threads in (1, 3):
                scores, dW = np.full((len(some), c), np.nan, dtype), W.copy()
                backend.csr_scores(X, at, W, b, scores, threads)
                np.testing.assert_allclose(scores, some @ W + b, rtol=0, atol=scale)
                scores[...] = np.sin(scores)
                backend.csr_accumulate(X, at, scores, dW, threads)
                np.testing.assert_allclose(dW, W + some.T @ scores, rtol=0, atol=2 * scale)
                found.append((scores, dW))
            assert all(same_bits(one, other) for one, other in zip(*found, strict=True))
        for chunk in (n, 7) if backend.goes_by_features and n else ():
            found = []
            for threads in (1, 3):
                place, dW = X.transposed.starts[:-1].copy(), np.full((d, c), np.nan, dtype)
                scores = np.cos(rng.permutation(n * c)).reshape(n, c).astype(dtype) if threads == 1 else scores
                for start in range(0, n, chunk):
                    rows = slice(start, min(n, start + chunk))
                    backend.csc_accumulate(X.transposed, place, rows, scores[rows].copy(), dW, threads)
                np.testing.assert_allclose(dW, its.astype(dtype).T.astype("d") @ scores, rtol=0, atol=scale)
                found.append(dW)
            assert same_bits(*found)


def test_another_type_has_a_transpose_of_its_own():
    X = sparse.Csr(problem((50, 30, 33), "d")[0])
    transposed = X.transposed
    assert X.transposed is transposed, "made once"
    other = X.astype(np.dtype("f"))
    assert other.transposed.values.dtype == np.float32
    assert same_bits(other.transposed.values, transposed.values.astype("f"))


def test_hessian_products():
    X, y, W, rng = problem((40, 9, 5), "d")
    V = rng.standard_normal(W.shape)
    for loss in (fl.Softmax(), fl.Hinge(power=2)):
        how = {"penalty": fl.L2(0.1), "shift": rng.standard_normal(9)}
        found = fl.LinearObjective(loss, X, y, backend="reference", **how).hessp(W, V, np.arange(30))
        wanted = fl.LinearObjective(loss, X.toarray(), y, backend="reference", **how).hessp(W, V, np.arange(30))
        close(found, wanted, "d", 10)


@pytest.mark.parametrize("format", ["csc", "coo", "lil", "bsr", "dok"])
def test_other_formats_and_types(format):
    X, y, W, _ = problem((20, 6, 3), "d")
    wanted = fl.LinearObjective(fl.Softmax(), X, y).value(W)
    assert fl.LinearObjective(fl.Softmax(), X.asformat(format), y).value(W) == wanted
    assert fl.LinearObjective(fl.Softmax(), sp.csr_array(X).asformat(format), y).value(W) == wanted
    counts = sp.csr_array((X * 100).astype(np.int32))
    close(
        fl.LinearObjective(fl.Softmax(), counts, y).value(W / 100),
        fl.LinearObjective(fl.Softmax(), counts.toarray(), y).value(W / 100),
        "d",
    )
    long = sp.csr_array(X)
    long.indices, long.indptr = long.indices.astype(np.int64), long.indptr.astype(np.int64)
    assert fl.LinearObjective(fl.Softmax(), long, y).value_and_grad(W)[0] == wanted


def test_unsorted_and_repeated_entries():
    y, W = np.array([0, 1]), np.random.default_rng(0).standard_normal((2, 5))
    X = sp.csr_array((np.array([1.0, 2.0, 3.0, 4.0]), np.array([3, 0, 3, 1]), np.array([0, 3, 4])), shape=(2, 4))
    value, grad = fl.LinearObjective(fl.Softmax(), X, y).value_and_grad(W)
    wanted, wanted_grad = fl.LinearObjective(fl.Softmax(), X.toarray(), y).value_and_grad(W)
    close(value, wanted, "d")
    close(grad, wanted_grad, "d")
    assert not X.has_sorted_indices  # it is the caller's, and stays so


def test_same_bits_for_any_number_of_threads():
    X, y, W, _ = problem((3000, 200, 20), "f", density=0.2)
    objective = [fl.LinearObjective(fl.Softmax(), X, y, n_threads=k) for k in (1, 2, 3, 7)]
    first = objective[0].value_and_grad(W)
    for other in objective[1:]:
        value, grad = other.value_and_grad(W)
        assert value == first[0]
        assert same_bits(grad, first[1])


def test_many_rows_lose_nothing():
    """A feature that all rows have: its sum is far larger than what each row adds."""
    n = 400_000
    X = sp.csr_array((np.full(n, 0.1, np.float32), np.zeros(n, np.int32), np.arange(n + 1)), shape=(n, 1))
    _, grad = fl.LinearObjective(fl.Hinge(), X, np.zeros(n, int), bias=False, reduction="sum").value_and_grad(
        np.zeros((2, 1), np.float32)
    )
    np.testing.assert_allclose(grad[1, 0], n * float(np.float32(0.1)), rtol=2e-5)  # one sum: 5e-4


def test_training():
    X, y, _, _ = problem((200, 30, 3), "f", empty=False)
    found = sgd(fl.LinearObjective(fl.Softmax(), X, y), n_classes=3, epochs=2, step_size=0.1, seed=0)
    dense = sgd(fl.LinearObjective(fl.Softmax(), X.toarray(), y), n_classes=3, epochs=2, step_size=0.1, seed=0)
    close(found.W, dense.W, "f")


@pytest.mark.parametrize("dtype", ["f", "d"])
def test_gradients_by_features_in_chunks(dtype, monkeypatch):
    """Several chunks of rows, each of which finds its entries behind those of the last."""
    X, y, W, rng = problem((300, 40, 5), dtype, density=0.2)
    plain = fl.LinearObjective(fl.Softmax(), X, y)
    wanted, wanted_grad = plain.value_and_grad(W)
    V = rng.standard_normal(W.shape).astype(dtype)
    monkeypatch.setattr(sparse, "CHUNK_BYTES", 20 * 5 * W.itemsize)
    for change in (np.int32, np.int64):
        features = sp.csr_array(X)
        features.indices, features.indptr = features.indices.astype(change), features.indptr.astype(change)
        for rows in (None, 7):
            objective = fl.LinearObjective(fl.Softmax(), features, y, chunk_rows=rows)
            value, grad = objective.value_and_grad(W)
            close(value, wanted, dtype)
            close(grad, wanted_grad, dtype)
            close(objective.hessp(W, V), plain.hessp(W, V), dtype, 10)
            assert same_bits(objective.value_and_grad(W)[1], grad)


@pytest.mark.parametrize("name", BACKENDS)
def test_quadratic_penalty_in_one_pass(name):
    backend, rng = backends.get(name), np.random.default_rng(0)
    for shape in [(20, 3001), (1, 1), (10, 2049), (7, 0), (2, 300)]:
        for dtype in "fd":
            for order in "CF":
                W, G = (np.asarray(rng.standard_normal(shape), dtype, order=order) for _ in range(2))
                W, G = (array[:, : shape[1] - 1] if shape[1] > 1 else array for array in (W, G))
                wanted = G + 0.3 * W.astype(float)
                square, other = backend.shrink(W, G, 0.3, 2), G.copy(order)
                np.testing.assert_allclose(G, wanted, rtol=0, atol=1e-6 if dtype == "f" else 1e-14)
                np.testing.assert_allclose(square, np.square(W, dtype=float).sum(), rtol=1e-6)
                assert backend.shrink(W, other, 0.3, 1) == square


def test_sparse_validation_and_predictions(tmp_path):
    X, y, W, rng = problem((200, 30, 3), "f", empty=False)
    objective = fl.LinearObjective(fl.Softmax(), X, y, shift=rng.random(30), scale=rng.uniform(1, 2, 30))
    options = {"epochs": 2, "step_size": 0.1, "checkpoint": tmp_path / "run.npz"}
    for validation in (X.tocsc(), X.toarray()):
        history = sgd(objective, validation=(validation.astype("d"), y), **options).history
        assert (history["accuracy"] == history["validation_accuracy"]).all()
    resumed = sgd(objective, validation=(X.toarray().astype("d"), y), **options, resume=tmp_path / "run.npz")
    assert (resumed.history["accuracy"] == history["accuracy"]).all()
    for dtype in "fd":
        model = LinearModel(W.astype(dtype), ("a", "b", "c"), shift=rng.random(30), scale=rng.uniform(1, 2, 30))
        close(model.scores(X), model.scores(X.toarray()), "f", 3)
        assert model.accuracy(X, model.predict(X.toarray())) > 0.99
    with pytest.raises(ValueError, match="the model has 30 features"):
        model.predict(X[:, :7])
    dense = fl.LinearObjective(fl.Softmax(), X.toarray(), y, shift=rng.random(30))
    with pytest.raises(ValueError, match="validation X is sparse, but the objective's X is dense"):
        sgd(dense, validation=(X, y))


def test_preconditioner_of_sparse_rows():
    X, y, _, rng = problem((400, 20, 4), "d")
    how = {"penalty": fl.L2(0.01), "shift": rng.random(20), "scale": rng.uniform(1, 2, 20)}
    how["sample_weight"] = rng.random(400)
    found, dense = (
        lbfgs(fl.LinearObjective(fl.Softmax(), features, y, **how), precondition=True, tol=1e-8)
        for features in (X, X.toarray())
    )
    assert abs(found.n_iter - dense.n_iter) <= 2
    close(found.W, dense.W, "d", 1e6)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", ["f", "d"])
def test_dual(name, dtype):
    X, y, _, rng = problem((120, 15, 4), dtype)
    weight = rng.uniform(0, 2, 120)
    weight[::5] = 0
    for how in ({}, {"sample_weight": weight}, {"reduction": "sum", "penalty": fl.L2(3.0)}):
        how = {"penalty": fl.L2(0.02), "bias": False, **how}
        for loss in (fl.Hinge(over="max"), fl.Hinge(over="max", margin=0.5)):
            found = dual(fl.LinearObjective(loss, X, y, backend=name, **how), tol=1e-5)
            assert found.converged
            exact = smoothing(fl.LinearObjective(loss, X.toarray().astype(float), y, **how), tol=1e-8, max_iter=5000)
            assert abs(found.value - exact.value) <= 3e-5 * exact.value
    again = dual(fl.LinearObjective(loss, X, y, backend=name, n_threads=1, **how), tol=1e-5)
    assert same_bits(again.W, found.W)


def test_dual_errors():
    X, y, _, _ = problem((20, 5, 3), "d")
    loss, l2 = fl.Hinge(over="max"), fl.L2(0.1)
    for features, its, penalty, options, match in (
        (X, fl.Hinge(), l2, {"bias": False}, "it must be Hinge"),
        (X, fl.Hinge(over="max", margin=-1.0), l2, {"bias": False}, "it must have one margin, above 0"),
        (X, loss, fl.L1(0.1), {"bias": False}, "it must be L2"),
        (X, loss, l2, {}, "it must be bias=False"),
        (X, loss, l2, {"bias": False, "shift": np.ones(5)}, "it must be sparse, as it is"),
        (X.toarray(), loss, l2, {"bias": False}, "X is dense"),
    ):
        with pytest.raises(ValueError, match=match):
            dual(fl.LinearObjective(its, features, y, penalty=penalty, **options))
    objective = fl.LinearObjective(loss, X, y.astype(np.uint8), penalty=l2, bias=False)
    assert dual(objective, max_iter=0).message == "max_iter is reached"
    assert dual(objective, callback=lambda W, value: True).n_iter == 1


def test_libsvm_files_as_sparse_features(tmp_path):
    (tmp_path / "a").write_text("1 1:0.5 3:2\n2 2:1\n")
    (tmp_path / "a.t").write_text("2 1:1\n")
    found, dense = load_libsvm(tmp_path / "a", sparse=True), load_libsvm(tmp_path / "a")
    for one, other in ((found.X_train, dense.X_train), (found.X_test, dense.X_test)):
        assert one.format == "csr"
        assert one.dtype == np.float32
        assert (one.toarray() == other).all()


def test_no_rows():
    X, y, W, _ = problem((4, 6, 3), "f")
    empty = fl.LinearObjective(fl.Softmax(), X[:0], y[:0], reduction="sum")
    value, grad = empty.value_and_grad(W)
    assert (value, empty.value(W), empty.values(W[None])[0]) == (0, 0, 0)
    assert not grad.any()
    assert np.isnan(fl.LinearObjective(fl.Softmax(), X[:0], y[:0]).value(W))
    assert fl.LinearObjective(fl.Softmax(), X, y, reduction="sum").value(W, np.array([], int)) == 0


def test_tools_that_take_dense_features_say_so():
    X, y, W, _ = problem((4, 6, 3), "f")
    with pytest.raises(TypeError, match=r"sparse X; this takes dense features"):
        landscape.slice_1d(fl.LinearObjective(fl.Softmax(), X, y), W)


def test_errors():
    X, y, W, _ = problem((20, 6, 3), "d")
    loss = fl.Softmax()
    with pytest.raises(ValueError, match="X is sparse, and its gradient would not be"):
        fl.linear_value_and_grad(loss, X, W[:, :-1], y)
    with pytest.raises(ValueError, match=r"W has shape \(3, 6\); it must be \(C, 7\)"):
        fl.LinearObjective(loss, X, y).value(W[:, :-1])
    with pytest.raises(TypeError, match="X has dtype complex128"):
        fl.LinearObjective(loss, X.astype(complex), y)
    with pytest.raises(TypeError, match="scores is a sparse matrix"):
        loss.value(X, y)
    broken = sp.csr_array(X)
    broken.indices = broken.indices.copy()
    broken.indices[3] = 6
    with pytest.raises(ValueError, match="X has an entry of feature 6, but 6 features"):
        fl.LinearObjective(loss, broken, y)
    broken.indices[3] = -1
    with pytest.raises(ValueError, match="feature -1"):
        fl.LinearObjective(loss, broken, y)
    broken = sp.csr_array(X)
    broken.indptr = broken.indptr.copy()
    broken.indptr[5] = 10_000
    with pytest.raises(ValueError, match="not a CSR matrix"):
        fl.LinearObjective(loss, broken, y)
    overlapping = sp.csr_array((np.ones(21), np.tile(np.arange(7), 3), np.arange(0, 22, 7)), shape=(3, 7))
    with pytest.raises(ValueError, match="out overlaps X"):
        fl.LinearObjective(loss, overlapping, [0, 1, 2], bias=False).value_and_grad(
            np.zeros((3, 7)), out=overlapping.data.reshape(3, 7)
        )
