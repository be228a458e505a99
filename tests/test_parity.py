"""The peers agree with fastloss: every builder of the benchmarks' table, and options that others have too."""

import ml_dtypes
import numpy as np
import pytest

import fastloss as fl
from fastloss.bench import peers
from fastloss.bench.cases import DTYPES, FLOATS, KINDS, LOSSES, TRANSFORMS, Case, dtype_of

TABLE = {name: peer for name, peer in peers.table().items() if not peer.control}
# A few rows; few classes and many, as NumPy and the kernels go different ways there. N, D and C all differ.
SHAPES = {False: ("33x10", "7x131"), True: ("37x19x7", "5x3x131")}


EPS = {name: ml_dtypes.finfo(dtype_of(name)).eps for name in DTYPES if name != "uint8"}


def _cases(kind, slow):
    """In each type at the first shape; float32 and float64 at the second too, where a job is quickly built."""
    for k, shape in enumerate(SHAPES[KINDS[kind].has_features][: 1 if slow else None]):
        for dtype in DTYPES if k == 0 else FLOATS:
            if dtype != "uint8" or KINDS[kind].has_features:
                yield Case.parse(f"{kind}-{shape}-{dtype}")


def _grid():
    for peer in TABLE.values():
        if peer.why_not() is not None:
            continue
        for kind, variants in peer.variants.items():
            for variant in variants:
                for case in _cases(kind, peer.slow_to_build):
                    if peer.lack(case) is None:
                        yield pytest.param(
                            peer, variant, case, id=f"{peer.name}-{variant.replace(' ', '_')}-{case.name}",
                            marks=pytest.mark.full if peer.slow_to_build else (),
                        )  # fmt: skip


def _answer(peer, variant, case, threads=2):
    inputs = case.inputs()
    work = peer.variants[case.kind][variant](inputs, threads)
    in_place = case.job.verb == "in-place"
    if not in_place:
        work.run()  # twice: what is left in buffers must not count
    answer = work.answer(work.run())
    for given, fresh in list(zip(inputs, case.inputs(), strict=True))[in_place:]:
        np.testing.assert_array_equal(given, fresh, err_msg="an input was written")
    return answer


@pytest.mark.parametrize("name", TABLE)
def test_peer_is_here(name):
    """Peers that are not installed show up in the report, with the reason."""
    reason = TABLE[name].why_not()
    if reason is not None:
        pytest.skip(f"no parity with {name}: {reason}")


@pytest.mark.parametrize("name", TABLE)
def test_every_kind_of_case_has_builders_or_a_reason(name):
    peer = TABLE[name]
    assert set(peer.variants) | set(peer.lacks) == set(KINDS)
    assert not set(peer.variants) & set(peer.lacks)
    assert all(peer.variants.values())


# The compiler's own code warns of its own code.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize(("peer", "variant", "case"), list(_grid()))
def test_peer_agrees(peer, variant, case):
    found = _answer(peer, variant, case)
    # What is computed in 16 bits has their precision; what features of 16 bits are computed in is float32.
    computed_in = case.compute_dtype if case.d is not None else case.dtype
    for name in ("fastloss-reference", "fastloss-cython"):
        if TABLE[name].why_not() is not None:
            continue
        expected = _answer(TABLE[name], "out=", case)
        assert len(found) == len(expected)
        # The scores are up to 13 in size, and s − m is off by eps times that; the exponential makes it relative. The
        # peers form the target's entry as p − 1, and sums over rows, features or classes in their own order, which is
        # off by eps times the largest entry.
        for part, wanted in zip(found, expected, strict=True):
            eps = float(max(EPS[computed_in], ml_dtypes.finfo(getattr(wanted, "dtype", np.float64)).eps))
            if np.ndim(wanted) == 0:
                np.testing.assert_allclose(float(part), float(wanted), rtol=32 * eps)
                continue
            part, wanted = np.asarray(part), np.asarray(wanted)
            assert part.dtype == wanted.dtype or "bfloat16" in case.dtype
            part, wanted = part.astype(np.float64), wanted.astype(np.float64)
            np.testing.assert_allclose(part, wanted, rtol=32 * eps, atol=8 * eps * np.abs(wanted).max())


@pytest.mark.parametrize("has_features", SHAPES)
def test_no_margin_of_the_hinge_cases_is_at_the_kink(has_features):
    """There the gradient would depend on rounding, and on how a peer splits ties."""
    for case in _cases("linear-hinge" if has_features else "hinge", slow=False):
        X, targets, W, b, _ = case.inputs()
        if case.dtype not in FLOATS and W is None:
            continue  # rounded to 16 bits alike for all
        scores = X if W is None else X.astype(W.dtype) @ W.T + b
        margins = scores - np.take_along_axis(scores, targets[:, None], axis=1) + 1
        assert np.abs(margins).min() > 1e-5


# --- options that others have too, beyond what is benchmarked --------------------------------------------------------
def _scores(n=41, c=9):
    rng = np.random.default_rng(1)
    return 2 * rng.standard_normal((n, c)), rng.integers(0, c, n), rng.random(c) + 0.5


def _by_autograd(function, scores):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    leaf = torch.from_numpy(scores).requires_grad_()
    loss = function(torch.nn.functional, leaf, torch.from_numpy)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach().numpy(), grad.numpy()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"weight"}, {"ignore_index"}, {"label_smoothing"}, {"weight", "ignore_index", "label_smoothing"}],
    ids=lambda options: "+".join(sorted(options)) or "plain",
)  # fmt: skip
def test_softmax_options_as_in_torch(options, reduction):
    scores, targets, weight = _scores()

    def cross_entropy(F, s, tensor):
        given = {"weight": tensor(weight), "ignore_index": 3, "label_smoothing": 0.2}
        return F.cross_entropy(s, tensor(targets), reduction=reduction, **{name: given[name] for name in options})

    ours = {"class_weight": weight, "ignore_index": 3, "label_smoothing": 0.2}
    loss = fl.Softmax(**{name: option for name, option in ours.items() if name.removeprefix("class_") in options})
    value, grad = loss.value_and_grad(scores, targets, reduction=reduction, backend="reference")
    wanted_value, wanted_grad = _by_autograd(cross_entropy, scores)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-13)
    np.testing.assert_allclose(grad, wanted_grad, rtol=1e-12, atol=1e-15)


def test_probability_targets_as_in_torch():
    """PyTorch divides by N here, not by the weights, and so does Softmax."""
    scores, _, weight = _scores()
    q = np.random.default_rng(2).dirichlet(np.ones(scores.shape[1]), len(scores))
    value, grad = fl.Softmax(class_weight=weight).value_and_grad(scores, q, backend="reference")
    wanted = _by_autograd(lambda F, s, tensor: F.cross_entropy(s, tensor(q), weight=tensor(weight)), scores)
    np.testing.assert_allclose(value, wanted[0], rtol=1e-13)
    np.testing.assert_allclose(grad, wanted[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [(), ("weight",), ("pos_weight",), ("weight", "pos_weight")], ids="+".join)
def test_logistic_as_binary_cross_entropy_of_torch(options, reduction):
    scores, _, weight = _scores()
    rng = np.random.default_rng(3)
    labels = np.where(rng.random(scores.shape) < 0.5, rng.random(scores.shape), rng.random(scores.shape) < 0.3)
    given = {"weight": weight, "pos_weight": weight[::-1] + 1}

    def cross_entropy(F, s, tensor):
        more = {name: tensor(given[name].copy()) for name in options}
        loss = F.binary_cross_entropy_with_logits(s, tensor(labels), reduction="none", **more)
        return loss.sum(1) if reduction == "none" else getattr(loss, reduction)()

    names = {"weight": "class_weight", "pos_weight": "pos_weight"}
    loss = fl.Logistic(over="mean" if reduction == "mean" else "sum", **{names[name]: given[name] for name in options})
    value, grad = loss.value_and_grad(scores, labels, reduction=reduction, backend="reference")
    wanted_value, wanted_grad = _by_autograd(cross_entropy, scores)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-13)
    np.testing.assert_allclose(grad, wanted_grad, rtol=1e-12, atol=1e-15)


def test_logistic_regressions_of_scikit_learn():
    """Binary, with a single column of scores and class weights; and one class against the rest."""
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    multiclass, minimize = pytest.importorskip("sklearn.multiclass"), pytest.importorskip("scipy.optimize").minimize
    rng = np.random.default_rng(4)
    X, y = rng.standard_normal((200, 4)), rng.integers(0, 3, 200)
    X[:, 0] += y
    for labels, loss, columns, how in (
        (np.minimum(y, 1), fl.Logistic(class_weight=[1.0, 3.0]), 1, {"class_weight": {0: 1, 1: 3}}),
        (y, fl.Logistic(), 3, {}),
    ):
        theirs = linear.LogisticRegression(C=0.5, tol=1e-10, max_iter=1000, **how)
        theirs = (theirs if columns == 1 else multiclass.OneVsRestClassifier(theirs)).fit(X, labels)
        parts = [theirs] if columns == 1 else theirs.estimators_
        wanted = np.concatenate([np.hstack([part.coef_, part.intercept_[:, None]]) for part in parts])
        objective = fl.LinearObjective(loss, X, labels, penalty=fl.L2(1.0), reduction="sum")
        found = minimize(objective.flat, np.zeros(5 * columns), jac=True, tol=1e-12)
        np.testing.assert_allclose(found.x.reshape(columns, 5), wanted, atol=1e-5)
        scores = X @ wanted[:, :-1].T + wanted[:, -1]
        positive = fl.sigmoid(scores)[:, -1] if columns == 1 else fl.sigmoid(scores[:, 2])
        np.testing.assert_allclose(positive, parts[-1].predict_proba(X)[:, 1], rtol=1e-12)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("margin", [1.0, 0.3])
def test_mean_hinge_as_torch_multi_margin_loss(power, margin):
    scores, targets, weight = _scores()

    def multi_margin_loss(F, s, tensor):
        # With weights it divides by N, not by their sum: compare sums.
        return F.multi_margin_loss(s, tensor(targets), p=power, margin=margin, weight=tensor(weight), reduction="sum")

    loss = fl.Hinge(over="mean", power=power, margin=margin, class_weight=weight)
    value, grad = loss.value_and_grad(scores, targets, reduction="sum", backend="reference")
    wanted_value, wanted_grad = _by_autograd(multi_margin_loss, scores)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-13)
    np.testing.assert_allclose(grad, wanted_grad, rtol=1e-12, atol=1e-15)


def test_nan_that_torch_multi_margin_loss_drops_is_kept_here():
    scores = np.array([[1.0, np.nan, 2.0]])
    theirs, _ = _by_autograd(lambda F, s, tensor: F.multi_margin_loss(s, tensor(np.array([0]))), scores)
    assert not np.isnan(theirs)
    assert np.isnan(fl.Hinge(over="mean").value(scores, [0], backend="reference"))


def test_max_hinge_as_in_scikit_learn():
    scores, targets, _ = _scores()
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    value = fl.Hinge(over="max").value(scores, targets, backend="reference")
    np.testing.assert_allclose(value, metrics.hinge_loss(targets, scores, labels=range(scores.shape[1])), rtol=1e-13)


def test_max_hinge_as_in_optax():
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    optax = pytest.importorskip("optax", reason="optax is not installed")
    scores, targets, _ = _scores()
    scores = scores.astype(np.float32)

    def mean_loss(s):
        return optax.losses.multiclass_hinge_loss(s, targets).mean()

    wanted_value, wanted_grad = jax.value_and_grad(mean_loss)(scores)
    value, grad = fl.Hinge(over="max").value_and_grad(scores, targets, backend="reference")
    np.testing.assert_allclose(value, wanted_value, rtol=1e-6)
    np.testing.assert_allclose(grad, wanted_grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_transforms_as_in_scipy(name):
    special = pytest.importorskip("scipy.special")
    scores, _, _ = _scores()
    ours = getattr(fl, name)(scores, backend="reference")
    np.testing.assert_allclose(ours, getattr(special, name)(scores, axis=1), rtol=1e-13)


def test_the_table_covers_every_loss_and_transform():
    assert {kind.of for kind in KINDS.values()} == {*LOSSES, *TRANSFORMS}
