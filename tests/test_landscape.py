"""Landscapes against the objective itself, point by point; breakpoints against a search for them; gradient checks."""

import math

import numpy as np
import pytest

import fastloss as fl
from fastloss import check, landscape
from fastloss.check import gradient_check, numerical_gradient
from fastloss.landscape import breakpoints, slice_1d, slice_2d
from tests.conftest import PLAIN


def problem(n=97, d=5, c=4, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    X, y = rng.normal(size=(n, d)).astype(dtype), rng.integers(c, size=n)
    return X, y, rng.normal(size=(c, d + 1)), rng.normal(size=(c, d + 1))


LOSSES = PLAIN | {
    "pairs": fl.Hinge(pair_margins=np.arange(16.0).reshape(4, 4) / 8),
    "pairs max": fl.Hinge(pair_margins=np.arange(16.0).reshape(4, 4) / 8, over="max"),
    "target": fl.Hinge(count_target=True),
    "negative margin": fl.Hinge(margin=-0.5),
    "weights": fl.Hinge(class_weight=[1, 2, 0, 3]),
    "ignored": fl.Hinge(ignore_index=1),
    "smoothing": fl.Softmax(label_smoothing=0.1, class_weight=[1, 2, 0.5, 3]),
    "temperature": fl.Softmax(temperature=2.0, softcap=3.0, z_loss=0.1),
    "columns": fl.Logistic(pos_weight=[1, 2, 0.5, 3], label_smoothing=0.1, over="mean"),
}


@pytest.fixture
def small_parts(monkeypatch):
    """Several parts, of several pieces each."""
    monkeypatch.setattr(landscape, "SCORES", 4 * 30)
    monkeypatch.setattr(landscape, "FEATURES", 5 * 7)


OPTIONS = {
    "plain": {},
    "penalty": {"penalty": fl.L2(0.3)},
    "l1": {"penalty": fl.L1(0.3), "reduction": "sum"},
    "weights": {"sample_weight": np.arange(97) % 3},
    "tiny weights": {"sample_weight": 1e-200 * (np.arange(97) % 3), "reduction": "sum"},
    "standardised": {"shift": np.linspace(-3, 3, 5) * 1e3, "scale": np.linspace(1, 2, 5)},
}


# --- slices ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_plane_is_the_objective(small_parts, loss, options):
    X, y, W, first = problem()
    second = first[::-1]
    if "shift" in options:
        X = X + options["shift"]
    objective = fl.LinearObjective(loss, X, y, **options)
    a, b = np.array([-1.5, 0, 0.25]), np.array([0.0, 2])
    found = slice_2d(objective, W, (first, second), a, b)
    expected = [[objective.value(W + p * first + q * second) for p in a] for q in b]
    np.testing.assert_allclose(found.values, expected, rtol=1e-11)
    rows = [5, 3, 3, 96, 50]
    ray = slice_1d(objective, W, first, a, rows=rows)
    np.testing.assert_allclose(ray.values, [objective.value(W + p * first, rows) for p in a], rtol=1e-11)
    one = slice_1d(objective, W, first, a, rows=[6])
    np.testing.assert_allclose(one.values, [objective.value(W + p * first, [6]) for p in a], rtol=1e-11)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_slices_are_in_float64(small_parts, dtype, bias):
    X = np.random.default_rng(0).integers(0, 9, size=(60, 5)).astype(dtype)
    _, y, W, direction = problem(60)
    W, direction = W[:, : 5 + bias], direction[:, : 5 + bias]
    narrow = fl.LinearObjective(fl.Softmax(), X, y, bias=bias)
    wide = fl.LinearObjective(fl.Softmax(), X.astype(float), y, bias=bias)
    expected = [wide.value(W + a * direction) for a in (-1, 0, 1)]
    np.testing.assert_allclose(slice_1d(narrow, W, direction, [-1, 0, 1]).values, expected, rtol=1e-13)


def test_probabilities_and_few_rows():
    X, y, W, direction = problem()
    objective = fl.LinearObjective(fl.Softmax(), X, np.eye(4)[y])
    assert slice_1d(objective, W, direction, [0.5]).values[0] == pytest.approx(objective.value(W + direction / 2))
    assert np.isnan(slice_1d(objective, W, direction, [0.5], rows=[]).values).all()
    assert slice_1d(objective, W, direction, []).values.shape == (0,)


def test_random_directions():
    X, y, W, _ = problem()
    objective = fl.LinearObjective(fl.Softmax(), X, y)
    ray, plane = slice_1d(objective, W, seed=3), slice_2d(objective, W, seed=3)
    assert ray.a.shape == (101,)
    assert plane.values.shape == (51, 101)
    np.testing.assert_array_equal(ray.direction, plane.directions[0])
    for direction in plane.directions:
        assert np.linalg.norm(direction) == pytest.approx(np.linalg.norm(W))
    assert abs(np.vdot(*plane.directions)) < 1e-12 * np.vdot(W, W)
    np.testing.assert_allclose(plane.values[25], ray.values)
    assert np.linalg.norm(slice_1d(objective, 0 * W, a=[0]).direction) == pytest.approx(1)
    assert (slice_1d(objective, W, a=[0], seed=4).direction != ray.direction).any()


def test_slices_do_not_depend_on_threads():
    X, y, W, direction = problem(3000, 40, 10)
    before = fl.get_num_threads()
    try:
        found = []
        for n_threads in (1, 2, 3):
            fl.set_num_threads(n_threads)
            found.append(slice_1d(fl.LinearObjective(fl.Softmax(), X, y), W, direction).values.tobytes())
    finally:
        fl.set_num_threads(before)
    assert len(set(found)) == 1


# --- breakpoints ----------------------------------------------------------------------------------------------------
PIECEWISE = {name: loss for name, loss in LOSSES.items() if loss.kind == "hinge" and loss.power == 1}


@pytest.mark.parametrize("loss", PIECEWISE.values(), ids=PIECEWISE.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_breakpoints(small_parts, loss, options):
    X, y, W, direction = problem()
    if "shift" in options:
        X = X + options["shift"]
    objective = fl.LinearObjective(loss, X, y, **options)
    bare = fl.LinearObjective(loss, X, y, **{k: v for k, v in options.items() if k != "penalty"})
    found = breakpoints(objective, W, direction, -2, 3)
    assert len(found.a) > 50
    assert (np.diff(found.a) >= 0).all()
    assert (found.changes > 0).all()
    # The function is right at the breakpoints, between them (so there are no others), and at the ends.
    places = np.r_[-2, (found.a[1:] + found.a[:-1]) / 2, found.a, 3]
    expected = slice_1d(bare, W, direction, places).values
    np.testing.assert_allclose(found(places), expected, rtol=1e-10, atol=1e-10 * abs(expected).max())
    np.testing.assert_allclose(found.values, found(found.a))
    # Each row's breakpoints are where its own slope grows by what is said.
    for k in range(0, len(found.a), 29):
        at, h = found.a[k], 1e-7
        low, here, high = slice_1d(bare, W, direction, [at - h, at, at + h], rows=[found.rows[k]]).values
        assert high - 2 * here + low > 0.5 * h * 1e-3 * abs(high)
    place, value = found.minimum()
    assert value == pytest.approx(expected.min())
    assert found(place) == value


def test_breakpoints_of_the_largest_margin_by_hand():
    """One row with margins 1 + a of one class and 2 a of the other: max(0, 1 + a, 2 a)."""
    objective = fl.LinearObjective(fl.Hinge(over="max", margin=0), np.ones((1, 1)), [0], bias=False)
    found = breakpoints(objective, [[0.0], [1], [0]], [[0.0], [1], [2]], -3, 3)
    np.testing.assert_allclose(found.a, [-1, 1])
    np.testing.assert_allclose(found.changes, [1, 1])
    np.testing.assert_allclose(found.values, [0, 2])
    assert found.ends == (0, 6)
    assert found.minimum() == (-3, 0)
    total = breakpoints(fl.LinearObjective(fl.Hinge(margin=0), np.ones((1, 1)), [0], bias=False), [[0.0], [1], [0]],
                        [[0.0], [1], [2]], -3, 3)  # fmt: skip
    np.testing.assert_allclose(total.a, [-1, 0])
    np.testing.assert_allclose(total.changes, [1, 2])


def test_a_direction_that_changes_no_score_has_no_breakpoints():
    X, y, W, _ = problem()
    found = breakpoints(fl.LinearObjective(fl.Hinge(), X, y), W, np.ones_like(W))
    assert len(found.a) == 0
    assert found.ends[0] == pytest.approx(found.ends[1])
    one = breakpoints(fl.LinearObjective(fl.Hinge(), X, 0 * y), W[:1], W[:1])
    assert one.minimum() == (-1, 0)


# --- numerical gradients --------------------------------------------------------------------------------------------
SMOOTH = {name: loss for name, loss in LOSSES.items() if loss.kind != "hinge" or loss.power == 2}


@pytest.mark.parametrize("loss", SMOOTH.values(), ids=SMOOTH.keys())
@pytest.mark.parametrize("at_once", [1, 7, 1 << 22])
@pytest.mark.parametrize(("kind", "tolerance"), [("centred", 1e-8), ("forward", 1e-5)])
def test_numerical_gradient(monkeypatch, backend, loss, at_once, kind, tolerance):
    monkeypatch.setattr(check, "STACK_VALUES", 24 * 2 * at_once)
    X, y, W, _ = problem()
    objective = fl.LinearObjective(loss, X, y, penalty=fl.L2(0.1), backend=backend)
    analytic = objective.value_and_grad(W)[1]
    np.testing.assert_allclose(numerical_gradient(objective, W, kind=kind), analytic, atol=tolerance)
    some = numerical_gradient(objective, W, kind=kind, coordinates=[(3, 5), (0, 0)])
    np.testing.assert_allclose(some, analytic[[3, 0], [5, 0]], atol=tolerance)


def test_numerical_gradient_is_the_lectures_loop():
    X, y, W, _ = problem()
    objective, h = fl.LinearObjective(fl.Softmax(), X, y), 2.0**-17  # a power of two: h itself is not rounded
    expected = np.zeros_like(W)
    for place in np.ndindex(W.shape):
        sides = []
        for sign in (1, -1):
            moved = W.copy()
            moved[place] += sign * h
            sides.append(objective.value(moved))
        expected[place] = (sides[0] - sides[1]) / (2 * h)
    np.testing.assert_allclose(numerical_gradient(objective, W, h), expected, rtol=0, atol=1e-9)


def test_numerical_gradient_in_float32_and_of_functions():
    X, y, W, _ = problem(dtype=np.float32)
    objective = fl.LinearObjective(fl.Softmax(), X, y)
    np.testing.assert_allclose(numerical_gradient(objective, W), objective.value_and_grad(W)[1], atol=1e-3)
    cube = np.arange(24.0).reshape(2, 3, 4) / 10
    np.testing.assert_allclose(numerical_gradient(lambda x: float((x**3).sum()), cube), 3 * cube**2, atol=1e-8)
    assert numerical_gradient(objective, W, coordinates=np.zeros((0, 2), int)).shape == (0,)


# --- the gradient check ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("penalty", [None, fl.L2(0.1), fl.L1(0.1), fl.ElasticNet(0.1), fl.MaxNorm(1.0)], ids=repr)
def test_every_gradient_is_right(loss, penalty):
    X, y, W, _ = problem()
    found = gradient_check(fl.LinearObjective(loss, X, y, penalty=penalty), W, n=24)
    assert found.ok
    assert len(found.coordinates) == 24
    kinked = isinstance(loss, fl.Hinge) and (loss.power == 1 or loss.over == "max")
    assert found.smooth == (not kinked and not isinstance(penalty, fl.L1 | fl.ElasticNet))


class Slipped(fl.LinearObjective):
    """A gradient with a mistake in it."""

    factor = 1.0

    def take(self, rows=None, dtype=None):
        taken = super().take(rows, dtype)
        found = Slipped(taken.loss, taken.X, taken.targets)
        found.factor = self.factor
        return found

    def value_and_grad(self, W, rows=None, out=None):
        value, grad = super().value_and_grad(W, rows, out)
        return value, self.factor * grad


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(1, "happy"), (1 + 3e-6, "fine"), (1.002, "uncomfortable"), (1.1, "wrong"), (-1, "wrong"), (math.nan, "wrong")],
)
def test_mistakes_are_found(factor, verdict):
    X, y, W, _ = problem()
    objective = Slipped(fl.Softmax(), X, y)
    objective.factor = factor
    found = gradient_check(objective, W)
    assert found.verdict == verdict
    assert found.ok == (verdict in ("happy", "fine"))
    if verdict == "wrong" and factor == factor:
        np.testing.assert_allclose(found.relative_errors, abs(factor - 1) / max(1, abs(factor)), rtol=1e-3)


@pytest.mark.parametrize(("over", "power"), [("sum", 1), ("mean", 1), ("max", 1), ("max", 2)])
def test_kinks_are_detected(over, power):
    """A margin, or two largest margins, that meet within the step: the numerical gradient is of neither side."""
    X, y = np.array([[1.0]]), [0]
    W = np.array([[1.0], [1.0 + 3e-6 if over == "max" else 3e-6], [1.0 if over == "max" else -9]])
    objective = fl.LinearObjective(fl.Hinge(over=over, power=power), X, y, bias=False)
    found = gradient_check(objective, W, n=3)
    np.testing.assert_array_equal(found.coordinates, [[0, 0], [1, 0], [2, 0]])
    expected = {"max": [0, 1, 1]}.get(over, [1, 1, 0])
    assert found.kinks.tolist() == expected
    for verdict, kinks in zip(found.verdicts, expected, strict=True):
        assert verdict == ("kink" if kinks else "happy")
    assert gradient_check(objective, W, n=3, h=1e-6).kinks.tolist() == [0, 0, 0]
    assert not found.smooth


@pytest.mark.parametrize("factor", [1, -1, 3])
def test_a_step_too_short_to_tell_makes_nobody_happy(factor):
    X, y, W, _ = problem()
    objective = Slipped(fl.Softmax(), X, y)
    objective.factor = factor
    for h, verdicts in ((1e-15, {"noise", "wrong"}), (1e-7, {"happy"} if factor == 1 else {"wrong"})):
        found = gradient_check(objective, W, n=24, h=h)
        assert found.verdict in verdicts
        assert found.ok == (found.verdict == "happy")
    zero = gradient_check(fl.LinearObjective(fl.Softmax(), 0 * X, y), W, n=24)  # entries of exactly 0, beside others
    assert zero.verdict == "happy"


def test_kinks_of_the_penalty():
    X, y, W, _ = problem()
    W[1, 2] = 4e-6
    found = gradient_check(fl.LinearObjective(fl.Softmax(), X, y, penalty=fl.L1(1.0)), W, n=24)
    assert found.kinks.sum() == 1
    assert found.verdicts[1 * 6 + 2] == "kink"
    assert found.ok


def test_coordinates_and_rows():
    X, y, W, _ = problem(dtype=np.float32)
    objective = fl.LinearObjective(fl.Softmax(), X, y)
    for seed in range(20):
        assert (gradient_check(objective, W, n=1, seed=seed).coordinates[:, 1] == 5).all()  # the bias
    some = gradient_check(objective, W, n=8, rows=[1, 2, 3], seed=1)
    assert some.verdict == "happy"
    assert len(np.unique(some.coordinates, axis=0)) == 8
    single = gradient_check(objective, W, n=8, rows=[1, 2, 3], seed=1, dtype=None)
    assert (single.analytic != some.analytic).any()
    assert 0 < single.relative_errors.max() < 1e-3
    np.testing.assert_array_equal(single.numerical, some.numerical)


# --- bad input ------------------------------------------------------------------------------------------------------
X0, Y0, W0, _ = problem()
HINGE, SOFTMAX = fl.LinearObjective(fl.Hinge(), X0, Y0), fl.LinearObjective(fl.Softmax(), X0, Y0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: slice_1d(fl.Hinge(), W0), TypeError, "objective is Hinge"),
        (lambda: slice_1d(HINGE, W0[:, 1:]), ValueError, r"W has shape \(4, 5\)"),
        (lambda: slice_1d(HINGE, W0, W0[:3]), ValueError, r"direction has shape \(3, 6\); it must have W's"),
        (lambda: slice_1d(HINGE, W0 * np.nan), ValueError, "W.0. is nan"),
        (lambda: slice_1d(HINGE, W0, W0, [[1.0]]), ValueError, r"a has shape \(1, 1\)"),
        (lambda: slice_1d(HINGE, W0, W0, [np.inf]), ValueError, "a.0. is inf"),
        (lambda: slice_1d(HINGE, W0, rows=[97]), IndexError, r"rows\[0\] is 97, but X has 97 rows"),
        (lambda: slice_1d(HINGE, W0, rows=[-1]), IndexError, r"rows\[0\] is -1"),
        (lambda: slice_1d(HINGE, W0, seed=-1), ValueError, "seed is -1"),
        (lambda: slice_2d(HINGE, W0, W0), TypeError, "directions is ndarray; it must be a pair"),
        (lambda: slice_2d(HINGE, W0, (W0, W0[0])), ValueError, r"directions\[1\] has shape \(6,\)"),
        (lambda: breakpoints(SOFTMAX, W0, W0), ValueError, r"only Hinge\(power=1\) is piecewise linear"),
        (lambda: breakpoints(HINGE, W0, W0, 1, 1), ValueError, "high is 1; it must be .* above 1"),
        (lambda: breakpoints(HINGE, W0, W0, -np.inf), ValueError, "low is -inf"),
        (lambda: breakpoints(HINGE, W0, W0)(2), ValueError, "a goes from 2 to 2; it must be from -1 to 1"),
        (lambda: numerical_gradient(3, W0), TypeError, "objective is int; it must be a fastloss.LinearObjective or a"),
        (lambda: numerical_gradient(HINGE, W0, 0), ValueError, "h is 0"),
        (lambda: numerical_gradient(HINGE, 1e9 * W0, 1e-9), ValueError, "h is 1e-09, which is lost in float64"),
        (lambda: numerical_gradient(HINGE, W0, kind="backward"), ValueError, "kind is 'backward'"),
        (lambda: numerical_gradient(HINGE, W0, coordinates=[1]), ValueError, r"coordinates has shape \(1,\)"),
        (lambda: numerical_gradient(HINGE, W0, coordinates=[(0, 6)]), IndexError, r"coordinates\[0\] is \(0, 6\)"),
        (lambda: numerical_gradient(HINGE, W0, coordinates=[(0, 1.5)]), TypeError, "coordinates has dtype float64"),
        (lambda: gradient_check(HINGE, W0, n=0), ValueError, "n is 0"),
        (lambda: gradient_check(HINGE, W0, h=-1), ValueError, "h is -1"),
        (lambda: gradient_check(lambda W: 0, W0), TypeError, "objective is function"),
        (lambda: gradient_check(HINGE, W0, dtype=np.float16), TypeError, "must be float32 or float64"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
