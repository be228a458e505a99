"""Run in numba-cuda's simulator by `test_gpu_linear.py`: the linear layer on a GPU where products are NumPy's."""

import sys

import numpy as np

import fastloss as fl
from fastloss.gpu import arrays, device, linear, products, sources

cuda = device.cuda


class NumpyProducts(products.Products):
    """Products of the simulator's arrays."""

    def convert(self, array, dtype):
        return array if array.dtype.name == dtype else cuda.to_device(host(array).astype(dtype))

    def pick(self, array, rows):
        return cuda.to_device(host(array)[host(rows)])

    def scores(self, x, W, b, out):
        host(out)[...] = host(x) @ host(W).T + (0 if b is None else host(b))

    def multiply(self, a, b, out, factor, add):
        product = factor * (host(a).astype(np.float32 if a.dtype.itemsize < 8 else float) @ host(b))
        host(out)[...] = product + (host(out) if add else 0)

    def accumulate(self, share, total, add):
        host(total)[...] = host(share) + (host(total) if add else 0)

    def sum_rows(self, array, dtype):
        return cuda.to_device(np.asarray(host(array).sum(axis=0, dtype=dtype)))


def host(array):
    """The memory of an array of the simulator."""
    return array._ary if hasattr(array, "_ary") else array


products._KINDS["numba"] = NumpyProducts()
rng = np.random.default_rng(0)
source = sources.get("numba")
put, get = source.put, source.get
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-2, "uint8": 1e-5}


def close(found, wanted, dtype, what):
    a, b = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert a.shape == b.shape, (what, a.shape, b.shape)
    assert np.linalg.norm(a - b) <= TOLERANCE[dtype] * max(1e-30, np.linalg.norm(b)), (what, a, b)


def check_chunks():
    n, d, c = 7, 5, 66
    for dtype in ("float32", "float64", "float16", "uint8"):
        X = rng.integers(0, 9, (n, d)).astype(dtype) / (1 if dtype == "uint8" else np.dtype(dtype).type(8))
        X = X.astype(dtype)
        like = "float32" if dtype == "uint8" else dtype
        W, b, y = rng.standard_normal((c, d)).astype(like), rng.standard_normal(c).astype(like), rng.integers(0, c, n)
        wrt = ("W", "b") if dtype == "uint8" else ("W", "b", "X")
        weight = rng.uniform(0, 2, n)
        weight[4] = 0
        for chunk_rows in (None, 4):
            for how in ({}, {"sample_weight": weight}, {"reduction": "none", "upstream": weight.astype("f4")}):
                if dtype == "float64" and "upstream" in how:
                    how = {"reduction": "none", "upstream": weight}
                there = {k: put(v) if isinstance(v, np.ndarray) else v for k, v in how.items()}
                value, grads = fl.linear_value_and_grad(
                    fl.Softmax(), put(X), put(W), put(y), put(b), wrt=wrt, chunk_rows=chunk_rows, **there
                )
                wide = X.astype(float), W.astype(float), y, b.astype(float)
                wanted, wanted_grads = fl.linear_value_and_grad(
                    fl.Softmax(), *wide, wrt=wrt, backend="reference", **how
                )
                close(get(value), wanted, dtype, "value")
                for name in wrt:
                    close(get(grads[name]), wanted_grads[name], dtype, name)
                    if name != "X" or dtype != "uint8":
                        assert grads[name].dtype.name == (dtype if name == "X" else like)


def check_objectives():
    n, d = 9, 5
    X = rng.integers(0, 256, (n, d)).astype(np.uint8)
    for c in (3, 66):
        for probabilities in (False, True)[: 2 if c == 3 else 1]:
            y = rng.integers(0, c, n)
            if probabilities:
                y = rng.dirichlet(np.ones(c), n).astype(np.float32)
            W = (rng.standard_normal((c, d + 1)) * 0.01).astype(np.float32)
            rows = np.array([8, 0, 7, 7, 3])
            weight = None if probabilities else rng.uniform(0, 1, n)
            how = {"shift": rng.uniform(0, 255, d), "scale": rng.uniform(50, 80, d)}
            for penalty in (fl.L2(0.3) if probabilities else fl.ElasticNet(0.2, beta=0.5),):
                there = None if weight is None else put(weight)
                ours = fl.LinearObjective(
                    fl.Softmax(), put(X), put(y), penalty=penalty, sample_weight=there, **how
                )
                its = fl.LinearObjective(
                    fl.Softmax(), X, y, penalty=penalty, sample_weight=weight, backend="reference", **how
                )
                for picked in (None, rows) if c == 3 else (rows,):  # the simulator is slow
                    value, grad = ours.value_and_grad(put(W), picked)
                    wanted, wanted_grad = its.value_and_grad(W.astype(float), picked)
                    close(get(value), wanted, "float32", "objective")
                    close(get(grad), wanted_grad, "float32", "gradient of the objective")
                    close(get(ours.value(put(W), picked)), wanted, "float32", "value alone")
        if c == 3:
            stack = np.stack([W, 2 * W])
            close(ours.values(put(stack)), its.values(stack.astype(float)), "float32", "values")


def check_sums():
    """Each chunk adds 2 + 3 · 2^-9 to entries of dW, 12 times: in float16 it would be 2 from 16 on."""
    n, c = 24, 66
    X, W, y = np.full((n, 1), 1 + 3 * 2**-10, np.float16), np.zeros((c, 1), np.float16), np.zeros(n, int)
    _, grads = fl.linear_value_and_grad(
        fl.Hinge(), put(X), put(W), put(y), wrt=("W",), reduction="sum", chunk_rows=2
    )
    assert np.array_equal(get(grads["W"])[1:], np.full((c - 1, 1), np.float16(n * (1 + 3 * 2**-10))))


def check_host():
    """X on the host, streamed through the GPU in chunks of rows."""
    from fastloss.gpu import host as streamed

    n, d, c = 5, 3, 2
    streamed.CHUNK_BYTES = 8 * d  # uint8: eight rows at a time; float32: two; float64: one
    calls = []
    run = streamed._run
    streamed._run = lambda *args: (calls.append(args[1]), run(*args))[1]
    bytes_ = rng.integers(0, 256, (n, d)).astype(np.uint8)
    strided = np.asfortranarray(rng.standard_normal((n, d)).astype(np.float32))
    y, weight, rows = rng.integers(0, c, n), rng.uniform(0, 1, n), np.array([4, 0, 3, 3])
    W = (rng.standard_normal((c, d + 1)) * 0.01).astype(np.float32)
    for X, how in ((bytes_, {"shift": np.full(d, 100.0), "scale": np.full(d, 60.0)}), (strided, {})):
        ours, its = (
            fl.LinearObjective(
                fl.Softmax(class_weight=[1, 2]), X, y, penalty=fl.L2(0.3), sample_weight=weight, backend=name, **how
            )
            for name in ("cuda", "reference")
        )
        for picked in (None, rows):
            value, grad = ours.value_and_grad(W, picked)
            wanted, wanted_grad = its.value_and_grad(W.astype(float), picked)
            close(value, wanted, "float32", "objective")
            close(grad, wanted_grad, "float32", "gradient")
    X = strided.astype(np.float64)
    for weights in (None, weight):
        found, wanted = (
            fl.linear_value_and_grad(
                fl.Hinge(), X, W[:, :d].astype(float), y, W[:, d].astype(float), wrt=("W", "b"), reduction="none",
                sample_weight=weights, upstream=np.arange(n) / 7, backend=name,
            )
            for name in ("cuda", "reference")
        )  # fmt: skip
        for a, b in ((found[0], wanted[0]), *((found[1][k], wanted[1][k]) for k in ("W", "b"))):
            close(a, b, "float64", "reduction none")
    probabilities = rng.dirichlet(np.ones(c), n)
    found, wanted = (
        fl.linear_value_and_grad(fl.Softmax(), X, W[:, :d].astype(float), probabilities, wrt=("W",), backend=name)
        for name in ("cuda", "reference")
    )
    close(found[1]["W"], wanted[1]["W"], "float64", "probabilities")
    assert calls.count(n) == 2 + 2 * 2 + 1  # an upstream takes two calls: values, gradient
    assert calls.count(len(rows)) == 2


def check_hessian():
    """Products of the Hessian; and where there is none."""
    n, d = 9, 4
    for c, loss in ((3, fl.Softmax(label_smoothing=0.1, class_weight=[1, 2, 0.5])), (66, fl.Hinge(power=2))):
        for dtype, bias in (("uint8", True), ("float32", False)):
            X = rng.integers(0, 9, (n, d)).astype(dtype)
            y, weight, rows = rng.integers(0, c, n), rng.uniform(0, 1, n), np.array([8, 0, 7, 7, 3])
            weight[3] = 0
            how = {"shift": rng.uniform(0, 9, d), "scale": rng.uniform(1, 3, d)} if dtype == "uint8" else {}
            W, V = rng.standard_normal((2, c, d + bias)).astype(np.float32)
            for given, picked, chunk_rows in ((None, None, None), (weight, rows, 2)):
                same = {"penalty": fl.L2(0.3), "bias": bias, "chunk_rows": chunk_rows, **how}
                there = None if given is None else put(given)
                ours = fl.LinearObjective(loss, put(X), put(y), sample_weight=there, **same)
                its = fl.LinearObjective(loss, X, y, sample_weight=given, backend="reference", **same)
                wanted = its.hessp(W.astype(float), V.astype(float), picked)
                close(get(ours.hessp(put(W), put(V), picked)), wanted, "float32", "Hessian product")
    q = rng.dirichlet(np.ones(3), n).astype(np.float32)
    ours, its = (fl.LinearObjective(fl.Softmax(), X, q) for X, q in ((put(X), put(q)), (X, q)))
    close(get(ours.hessp(put(W[:3, [0, 0, 1, 2, 3]]), put(V[:3, [0, 0, 1, 2, 3]]))), its.hessp(
        W[:3, [0, 0, 1, 2, 3]].astype(float), V[:3, [0, 0, 1, 2, 3]].astype(float)), "float32", "probabilities")
    ours = fl.LinearObjective(fl.Hinge(), put(X), put(y))
    W, V = put(np.ones((66, 5), np.float32)), put(np.ones((66, 4), np.float32))
    raises(ValueError, "V has shape (66, 4); it must be (66, 5)", lambda: ours.hessp(W, V))
    raises(fl.BackendError, "no second derivative", lambda: ours.hessp(W, W))
    for penalty in (fl.L1(0.1), fl.MaxNorm(1.0)):
        ours = fl.LinearObjective(fl.Softmax(), put(X), put(y), penalty=penalty)
        if penalty.by == "prox":
            raises(ValueError, "has no second derivative; use L2", lambda ours=ours: ours.hessp(W, W))
    ours = fl.LinearObjective(fl.Softmax(), put(X[:0]), put(y[:0]))
    assert not get(ours.hessp(W, W)).any()


def raises(kind, words, call):
    try:
        call()
    except kind as error:
        found = str(error)
    else:
        found = "nothing was raised"
    assert words in found, found


def check_memory():
    parts = linear.cut_rows(8192, 3898, None)
    assert len(parts) == 3
    assert parts[-1].stop == 8192
    assert max(p.stop - p.start for p in parts) <= 3898
    assert [p.stop - p.start for p in linear.cut_rows(10, 100, 4)] == [4, 4, 2]
    assert linear.cut_rows(0, 100, None) == []


def check_exact_scores():
    """What a hinge is checked with has the same scores in 16 bits: in one pass, and by products."""
    from fastloss.gpu import checks

    suite = checks.Suite(source, checks.TINY)
    for dtype in ("float16", "bfloat16"):
        for shape in checks.FULL.few[:1] + checks.FULL.few[2:]:
            X, W, b, _ = (a.astype(float) for a in suite.problem(shape, dtype, kinks=True))
            scores = X @ W.T + b
            assert np.array_equal(scores, scores.astype(arrays.host_dtype(dtype)).astype(float))
            assert np.count_nonzero(X)
    suite.linear(checks.PLAIN["hinge"], checks.TINY.few[0], "float16")


def check_errors():
    X, W, y = put(np.ones((4, 3), np.float32)), put(np.ones((2, 3), np.float32)), put(np.zeros(4, np.int64))

    loss = fl.Softmax()
    here = np.ones((2, 3))
    raises(TypeError, "W is ndarray; it must be an array on", lambda: fl.linear_value_and_grad(loss, X, here, y))
    raises(ValueError, "W has shape (2, 3); it must be (2, 4)", lambda: fl.LinearObjective(loss, X, y).value(W))
    raises(TypeError, "X has dtype int32", lambda: fl.linear_value_and_grad(loss, put(np.ones((4, 3), np.int32)), W, y))
    raises(fl.BackendError, "cython", lambda: fl.linear_value_and_grad(loss, X, W, y, backend="cython"))
    threads = "n_threads is 0; it must be"
    raises(ValueError, threads, lambda: loss.value(X, y, n_threads=0))
    raises(ValueError, threads, lambda: fl.softmax(X, n_threads=0))
    raises(ValueError, threads, lambda: fl.linear_value_and_grad(loss, X, W, y, n_threads=0))
    raises(ValueError, threads, lambda: fl.LinearObjective(loss, X, y, n_threads=0))
    objective = fl.LinearObjective(loss, X, y, bias=False)
    raises(IndexError, "rows[1] is 4, but X has 4 rows", lambda: objective.value(W, rows=[0, 4]))
    raises(fl.BackendError, "host vectors", lambda: objective.flat)
    raises(ValueError, "out overlaps W", lambda: objective.value_and_grad(W, out=W))
    ones = put(np.ones(4, "f4"))
    raises(ValueError, "upstream is an array", lambda: fl.linear_value_and_grad(loss, X, W, y, upstream=ones))
    del products._KINDS["numba"]
    raises(fl.BackendError, "Hessian products take matrix products", lambda: objective.hessp(W, W))
    raises(fl.BackendError, "arrays of CuPy or PyTorch", lambda: fl.linear_value_and_grad(loss, X, W, y, wrt=("X",)))
    products._KINDS["numba"] = NumpyProducts()


def check_rescale():
    numbers = put(np.arange(40, dtype=np.float32))
    linear.rescale([numbers], put(np.array(1.0)))
    linear.rescale([numbers], put(np.array(2.5)))
    assert np.array_equal(get(numbers), np.arange(40, dtype=np.float32) * 2.5)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        globals()[name]()
    assert arrays.is_device(put(np.zeros(1)))
    print("all is well")
