"""The solvers of `fastloss.train` find minima: each beside another method, or by the conditions for a minimum."""

import numpy as np
import pytest
import scipy.optimize

import fastloss as fl
from fastloss.train import DivergenceError, lbfgs, newton_cg, proximal_gradient, smoothing


def problem(n=120, d=5, c=4, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    y = rng.integers(c, size=n)
    y[:c] = range(c)
    X = (rng.normal(size=(c, d))[y] + rng.normal(size=(n, d))).astype(dtype)
    return X, y


def objective(loss, X, y, **more):
    return fl.LinearObjective(loss, X, y, **{"penalty": fl.L2(0.05), **more})


SMOOTH = {
    "softmax": fl.Softmax(),
    "smoothed targets": fl.Softmax(label_smoothing=0.1, class_weight=[1, 2, 3, 0.5]),
    "squared hinge": fl.Hinge(power=2),
    "squared mean": fl.Hinge(power=2, over="mean", margin=0.5),
}


@pytest.mark.parametrize("loss", SMOOTH.values(), ids=SMOOTH)
@pytest.mark.parametrize("more", [{}, {"bias": False}, {"reduction": "sum"}], ids=["bias", "none", "sum"])
def test_solvers_agree(loss, more):
    X, y = problem()
    strength = 5.0 if "reduction" in more else 0.05  # first-order methods are slow where it is small beside the loss
    o = objective(loss, X, y, sample_weight=np.arange(len(y)) % 3, penalty=fl.L2(strength), **more)
    exact = scipy.optimize.minimize(
        o.flat, np.zeros(4 * (5 + o.bias)), jac=True, method="BFGS", options={"gtol": 1e-9}
    ).fun  # fmt: skip
    for solver in (lbfgs, newton_cg, proximal_gradient):
        found = solver(o, tol=1e-6, max_iter=5000)
        assert found.converged, found
        assert found.value == pytest.approx(exact, rel=1e-9)
        assert o.value(found.W) == pytest.approx(found.value, rel=1e-12)
        assert solver is not newton_cg or np.abs(o.value_and_grad(found.W)[1]).max() < 2e-6
        assert found.n_evaluations >= found.n_iter > 0


@pytest.mark.parametrize("loss", SMOOTH.values(), ids=SMOOTH)
@pytest.mark.parametrize("penalty", [fl.L2(1e-6), None], ids=["L2", "none"])
def test_a_preconditioner_takes_less_iterations_to_the_same_minimum(loss, penalty):
    """Features of all sizes, far from 0, some of them twice; shift, scale and weights."""
    X, y = problem(n=400, d=6)
    X = np.column_stack([X * [1, 3, 0.1, 10, 1, 1] + 20, X[:, :2] + X[:, 2:4]])
    more = {"sample_weight": np.arange(400) % 3, "shift": X.mean(axis=0), "scale": np.full(8, 2.0)}
    o = objective(loss, X, y, penalty=penalty, **more)
    plain, quick = lbfgs(o, tol=1e-7, max_iter=3000), lbfgs(o, tol=1e-7, max_iter=3000, precondition=True)
    assert quick.value <= plain.value * (1 + 1e-7)
    assert quick.n_iter < plain.n_iter / 2
    assert np.abs(o.value_and_grad(quick.W)[1]).max() < 1e-5
    again = lbfgs(o, quick.W, tol=1e-7, precondition=True)
    assert again.n_iter <= 2
    assert again.value <= quick.value * (1 + 1e-9)


def test_preconditioned_smoothing():
    X, y = problem(n=24, d=2, c=3)
    o = objective(fl.Hinge(), X, y)
    assert smoothing(o, tol=1e-6, precondition=True).value == pytest.approx(smoothing(o, tol=1e-6).value, rel=1e-3)
    with pytest.raises(TypeError, match="precondition is 3"):
        smoothing(o, precondition=3)
    with pytest.raises(TypeError, match="precondition is 3"):
        lbfgs(objective(fl.Softmax(), X, y), precondition=3)


@pytest.mark.parametrize("penalty", [fl.L1(0.02), fl.ElasticNet(0.02, beta=0.5)], ids=repr)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_proximal_gradient_meets_the_conditions_of_a_minimum(penalty, dtype):
    """0 is in the subdifferential: g = −λ sign(w) − 2 λ β w where w ≠ 0, |g| ≤ λ where w = 0."""
    X, y = problem(d=9, dtype=dtype)
    X[:, 6:] *= 0.1
    o = objective(fl.Softmax(), X, y, penalty=penalty)
    found = proximal_gradient(o, tol=1e-5, max_iter=5000)
    assert found.converged
    assert found.W.dtype == dtype
    w, g = found.W[:, :-1], o.data_value_and_grad(found.W)[1]
    smooth = 2 * penalty.strength * getattr(penalty, "beta", 0) * w
    off = w == 0
    assert 0 < off.sum() < off.size
    assert np.abs(g[:, :-1])[off].max() <= penalty.strength + 2e-5
    np.testing.assert_allclose((g[:, :-1] + smooth)[~off], -penalty.strength * np.sign(w[~off]), atol=3e-5)
    assert np.abs(g[:, -1]).max() < 3e-5


def test_proximal_gradient_keeps_a_constraint():
    X, y = problem()
    o = objective(fl.Softmax(), X, y, penalty=fl.MaxNorm(0.7))
    W = proximal_gradient(o, tol=1e-8, max_iter=5000).W
    assert np.linalg.norm(W[:, :-1], axis=1).max() == pytest.approx(0.7, abs=1e-9)
    others = W + 0.1 * np.random.default_rng(0).normal(size=(20, *W.shape))
    others[..., :-1] = [fl.MaxNorm(0.7).step(V[:, :-1], 1.0) for V in others]
    assert all(o.value(V) >= o.value(W) for V in others)


def quadratic_program(loss, X, y, strength):
    """The minimum of a hinge objective by SciPy's SLSQP, with a slack for each margin."""
    n, d = X.shape
    c = y.max() + 1
    wrong = [(i, j) for i in range(n) for j in range(c) if j != y[i]]
    n_slack = n if loss.over == "max" else len(wrong)
    which = [i for i, _ in wrong] if loss.over == "max" else range(len(wrong))
    A = np.zeros((len(wrong), c * (d + 1) + n_slack))
    for row, ((i, j), slack) in enumerate(zip(wrong, which, strict=True)):
        x = np.append(X[i], 1)
        A[row, y[i] * (d + 1) : (y[i] + 1) * (d + 1)] += x
        A[row, j * (d + 1) : (j + 1) * (d + 1)] -= x
        A[row, c * (d + 1) + slack] = 1
    scale = 1 / n / (c if loss.over == "mean" else 1)

    def value(z):
        W, slack = z[: c * (d + 1)].reshape(c, d + 1), z[c * (d + 1) :]
        grad = np.zeros_like(z)
        grad[: c * (d + 1)].reshape(c, d + 1)[:, :-1] = 2 * strength * W[:, :-1]
        grad[c * (d + 1) :] = scale * loss.power * slack ** (loss.power - 1)
        return strength * (W[:, :-1] ** 2).sum() + scale * (slack**loss.power).sum(), grad

    z = np.append(np.zeros(c * (d + 1)), np.ones(n_slack))
    bounds = [(None, None)] * (c * (d + 1)) + [(0, None)] * n_slack
    constraint = {"type": "ineq", "fun": lambda z: A @ z - loss.margin, "jac": lambda z: A}
    return scipy.optimize.minimize(
        value, z, jac=True, method="SLSQP", bounds=bounds, constraints=constraint, options={"ftol": 1e-12}
    ).fun  # fmt: skip


KINKED = [fl.Hinge(), fl.Hinge(over="mean", margin=2.0), fl.Hinge(over="max"), fl.Hinge(over="max", power=2)]


@pytest.mark.parametrize("loss", KINKED, ids=repr)
def test_smoothing_finds_the_minimum_of_a_hinge(loss):
    X, y = problem(n=24, d=2, c=3)
    o = objective(loss, X, y)
    found = smoothing(o, tol=1e-6)
    best = quadratic_program(loss, X, y, 0.05)
    assert found.value == o.value(found.W)
    assert best - 1e-7 <= found.value <= best * (1 + 1e-3)
    assert found.converged


@pytest.mark.parametrize("over", ["sum", "max"])
def test_smoothing_takes_all_options(over):
    """Weights, pairs of margins, shift and scale: W is no worse than what moves away from it a little."""
    X, y = problem(n=90, d=3, c=3)
    rng = np.random.default_rng(5)
    loss = fl.Hinge(over=over, pair_margins=1 + rng.random((3, 3)), class_weight=[1, 2, 0.5], ignore_index=2)
    o = objective(loss, X, y, sample_weight=rng.random(90), shift=[1, -1, 0.5], scale=[2.0, 1, 0.3])
    found = smoothing(o, tol=1e-5, n_classes=3)
    for size in (1e-1, 1e-2):
        assert all(o.value(found.W + size * rng.normal(size=(3, 4))) > found.value for _ in range(20))


@pytest.mark.parametrize("solver", [lbfgs, newton_cg, proximal_gradient, smoothing])
def test_a_callback_watches_and_ends_a_run(solver):
    X, y = problem()
    loss = fl.Hinge() if solver is smoothing else fl.Softmax()
    seen = []

    def callback(W, value):
        seen.append((W.copy(), value))
        return len(seen) == 3

    found = solver(objective(loss, X, y), callback=callback)
    assert len(seen) == 3
    assert not found.converged
    assert seen[0][0].shape == (4, 6)


def test_bad_arguments_are_turned_away():
    X, y = problem()
    o = objective(fl.Softmax(), X, y)
    for solver in (lbfgs, newton_cg, proximal_gradient, smoothing):
        for bad, match in [
            ({"tol": -1}, "tol is -1"),
            ({"max_iter": 1.5}, "max_iter is 1.5"),
            ({"W": np.zeros((4, 7))}, "W has shape"),
            ({"W": np.zeros((4, 6)), "n_classes": 3}, "n_classes is 3"),
            ({"callback": 3}, "callback is 3"),
        ]:
            with pytest.raises((ValueError, TypeError), match=match):
                solver(o, **bad)
        with pytest.raises(TypeError, match="objective is int"):
            solver(3)
    with pytest.raises(ValueError, match="penalty is L1"):
        lbfgs(objective(fl.Softmax(), X, y, penalty=fl.L1()))
    with pytest.raises(fl.BackendError, match="second derivative"):
        newton_cg(objective(fl.Hinge(), X, y))
    for loss in (fl.Softmax(), fl.Hinge(power=2)):
        with pytest.raises(ValueError, match="gradient everywhere"):
            smoothing(objective(loss, X, y))
    with pytest.raises(ValueError, match="margin 0"):
        smoothing(objective(fl.Hinge(margin=0), X, y))
    with pytest.raises(ValueError, match="count_target"):
        smoothing(objective(fl.Hinge(count_target=True), X, y))
    with pytest.raises(ValueError, match="memory"):
        lbfgs(o, memory=0)


@pytest.mark.parametrize("solver", [lbfgs, newton_cg, proximal_gradient])
def test_what_is_not_finite_is_said(solver):
    X, y = problem()
    X[3, 2] = np.nan
    with pytest.raises(DivergenceError, match="at the start"):
        solver(objective(fl.Softmax(), X, y))


@pytest.mark.parametrize("solver", [lbfgs, newton_cg, proximal_gradient, smoothing])
def test_limits_and_starts(solver):
    X, y = problem(dtype=np.float32)
    o = objective(fl.Hinge() if solver is smoothing else fl.Softmax(), X, y)
    none = solver(o, max_iter=0)
    assert (none.n_iter, none.converged) == (0, False)
    few = solver(o, max_iter=2)
    assert few.n_iter <= 2
    assert not few.converged
    assert few.W.dtype == np.float32
    done = solver(o)
    again = solver(o, done.W)
    assert again.n_iter <= done.n_iter
    assert again.value <= done.value * (1 + 1e-4)


def test_the_same_bits_for_any_threads():
    X, y = problem(n=400, d=30, dtype=np.float32)
    for solver, loss in ((lbfgs, fl.Softmax()), (newton_cg, fl.Softmax()), (smoothing, fl.Hinge(over="max"))):
        for more in ({}, {"precondition": True})[: 1 + (solver is not newton_cg)]:
            one, two = (solver(objective(loss, X, y, n_threads=n), max_iter=15, **more).W for n in (1, 2))
            assert one.tobytes() == two.tobytes()
