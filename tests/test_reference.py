"""The NumPy reference, which defines all results, against mpmath, centred differences, SciPy and scikit-learn."""

import numpy as np
import pytest
import scipy.special
import sklearn.metrics

import fastloss as fl
from tests.conftest import PLAIN, exact, exact_row

RNG = np.random.default_rng(2)
PAIRS = RNG.uniform(-0.5, 2, (7, 7))
CLASS_WEIGHT = np.array([1.0, 0, 2.5, 0.1, 1, 3, 0.7])

# Every option, and every two that meet in one formula.
SOFTMAX_OPTIONS = {
    "smoothing": {"label_smoothing": 0.1},
    "all smoothing": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 0.3},
    "softcap": {"softcap": 2.0},
    "temperature": {"temperature": 0.4},
    "class weight": {"class_weight": CLASS_WEIGHT},
    "smoothing, class weight": {"label_smoothing": 0.2, "class_weight": CLASS_WEIGHT},
    "smoothing, z-loss": {"label_smoothing": 0.2, "z_loss": 0.1},
    "softcap, temperature": {"softcap": 3.0, "temperature": 2.0},
    "all": {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 3.0, "temperature": 2.0, "class_weight": CLASS_WEIGHT},
}
HINGE_OPTIONS = {
    f"{over}, power {power}, {name}": {"over": over, "power": power, **options}
    for over in ("sum", "mean", "max")
    for power in (1, 2)
    for name, options in {
        "plain": {},
        "margin": {"margin": 2.5},
        "negative margin": {"margin": -0.5},
        "pair margins": {"pair_margins": PAIRS},
        "count target": {"count_target": True},
        "class weight": {"class_weight": CLASS_WEIGHT},
    }.items()
    if not (over == "max" and name == "count target")
}
GENERAL = {f"softmax, {name}": fl.Softmax(**options) for name, options in SOFTMAX_OPTIONS.items()} | {
    f"hinge, {name}": fl.Hinge(**options) for name, options in HINGE_OPTIONS.items()
}
general = pytest.mark.parametrize("loss", GENERAL.values(), ids=GENERAL.keys())
with_probabilities = pytest.mark.parametrize(
    "loss",
    [fl.Softmax(), *(fl.Softmax(**o) for o in SOFTMAX_OPTIONS.values() if "label_smoothing" not in o)],
    ids=["plain", *(name for name, o in SOFTMAX_OPTIONS.items() if "label_smoothing" not in o)],
)


def problem(n=9, c=7, spread=2.0):
    rng = np.random.default_rng(n + c)
    return spread * rng.standard_normal((n, c)), rng.integers(0, c, n)


def probabilities(n, c):
    q = np.random.default_rng(3).dirichlet(np.ones(c), n)
    q[0] = np.eye(c)[1]  # certain
    q[1] = [0.5, 0.5] + [0] * (c - 2)
    return q


def row_multiplier(loss, targets):
    """What the class weights multiply a row by, where they are not part of the row loss (design, options)."""
    inside = loss.kind == "softmax" and loss.label_smoothing > 0
    return np.ones(len(targets)) if loss.class_weight is None or inside else loss.class_weight[targets]


def value_and_grad(loss, scores, targets, **more):
    return loss.value_and_grad(scores, targets, backend="reference", **more)


@general
def test_options_are_their_formulas(loss):
    scores, y = problem()
    losses, gradient = exact(loss, scores, y)
    weight = row_multiplier(loss, y)
    found, grad = value_and_grad(loss, scores, y, reduction="none")
    np.testing.assert_allclose(found, (losses * weight).astype(float), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(grad, (gradient * weight[:, None]).astype(float), rtol=1e-12, atol=1e-15)


@with_probabilities
def test_probability_targets_are_their_formula(loss):
    scores, _ = problem()
    q = probabilities(*scores.shape)
    losses, gradient = exact(loss, scores, q)
    found, grad = value_and_grad(loss, scores, q, reduction="none")
    np.testing.assert_allclose(found, losses.astype(float), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(grad, gradient.astype(float), rtol=1e-12, atol=1e-15)
    assert value_and_grad(loss, scores, q)[0] == pytest.approx(found.mean()), "the mean is over sample weights alone"


def test_integer_one_hot_probabilities_equal_indices():
    scores, y = problem()
    one_hot = np.eye(7, dtype=int)[y]
    for a, b in zip(
        value_and_grad(fl.Softmax(), scores, y), value_and_grad(fl.Softmax(), scores, one_hot), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-14, atol=1e-17)


@pytest.mark.parametrize("loss", PLAIN.values(), ids=PLAIN.keys())
@pytest.mark.parametrize("c", [1, 2, 3, 16, 17, 65])
def test_plain_losses_are_their_formulas(loss, c):
    scores, y = problem(5, c, spread=5.0)
    losses, gradient = exact(loss, scores, y)
    found, grad = value_and_grad(loss, scores, y, reduction="none")
    np.testing.assert_allclose(found, losses.astype(float), rtol=2e-14, atol=1e-300)
    np.testing.assert_allclose(grad, gradient.astype(float), rtol=2e-14, atol=1e-300)


@pytest.mark.parametrize("options", [{"softcap": 1.0}, {"softcap": 5.0, "temperature": 0.5}])
def test_softcap_keeps_the_gradient_of_large_scores(options):
    """The slope 1 − tanh² cancels where the softcap saturates; 1 / cosh² does not."""
    scores, loss = np.array([[6.0, -5.5, 4.0], [0.1, 12.0, -9.0]]), fl.Softmax(**options)
    for dtype, rtol in ((np.float64, 1e-13), (np.float32, 1e-5)):
        _, gradient = exact(loss, scores, [0, 2])
        _, grad = value_and_grad(loss, scores.astype(dtype), [0, 2], reduction="none")
        np.testing.assert_allclose(grad, gradient.astype(float), rtol=rtol)


@pytest.mark.parametrize("smoothing", [1e-3, 1e-6])
def test_light_smoothing_keeps_its_gradient(smoothing):
    """U − u_y is the sum of the other entries of u, not a difference that rounds away, also in float32."""
    scores, loss = np.array([[40.0, 1.0, 0.0, -3.0]], np.float32), fl.Softmax(label_smoothing=smoothing)
    _, gradient = exact(loss, scores, [0])
    _, grad = value_and_grad(loss, scores, [0], reduction="none")
    np.testing.assert_allclose(grad, gradient.astype(float), rtol=1e-5)


# --- centred differences ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss", (PLAIN | GENERAL).values(), ids=(PLAIN | GENERAL).keys())
def test_gradient_is_that_of_centred_differences(loss):
    scores, y = problem(4)
    weight = np.array([1.0, 0.5, 0, 2])
    _, grad = value_and_grad(loss, scores, y, sample_weight=weight)
    h = 1e-6  # no margin of this problem is nearer to its kink, or to another margin, than 1e-4

    def value(s):
        return loss.value(s, y, sample_weight=weight, backend="reference")

    numeric = np.zeros_like(scores)
    for at in np.ndindex(scores.shape):
        step = np.zeros_like(scores)
        step[at] = h
        numeric[at] = (value(scores + step) - value(scores - step)) / (2 * h)
    scale = max(1, np.abs(numeric).max())
    np.testing.assert_allclose(grad, numeric, rtol=0, atol=1e-7 * scale)


@with_probabilities
def test_gradient_with_probabilities_is_that_of_centred_differences(loss):
    scores, _ = problem(4)
    q, h = probabilities(4, 7), 1e-6
    _, grad = value_and_grad(loss, scores, q)
    for at in np.ndindex(scores.shape):
        step = np.zeros_like(scores)
        step[at] = h
        rise = loss.value(scores + step, q, backend="reference") - loss.value(scores - step, q, backend="reference")
        assert grad[at] == pytest.approx(rise / (2 * h), abs=1e-7)


# --- class weights, smoothing and the mean ----------------------------------------------------------------------
def test_mean_with_smoothing_divides_by_the_weights_of_the_targets():
    """As PyTorch's cross_entropy does."""
    scores, y = problem()
    loss = fl.Softmax(label_smoothing=0.2, class_weight=CLASS_WEIGHT)
    total = float(sum(exact_row(loss, row, target)[0] for row, target in zip(scores, y, strict=True)))
    assert loss.value(scores, y, backend="reference") == pytest.approx(total / CLASS_WEIGHT[y].sum(), rel=1e-14)


def test_ignored_rows_with_smoothing_count_nothing():
    scores, y = problem()
    y[::3] = -100
    kept = y >= 0
    loss = fl.Softmax(label_smoothing=0.2, ignore_index=-100, class_weight=CLASS_WEIGHT)
    value, grad = value_and_grad(loss, scores, y)
    kept_value, kept_grad = value_and_grad(loss, scores[kept], y[kept])
    assert value == kept_value
    np.testing.assert_array_equal(grad[kept], kept_grad)
    assert not grad[~kept].any()


# --- extra outputs and transforms -------------------------------------------------------------------------------
def test_extra_outputs():
    scores, y = problem(30)
    scores[3, [1, 4]] = 50  # a tie: the lowest class
    value, extras = fl.Softmax().value(scores, y, outputs=("row_loss", "lse", "argmax", "entropy"), backend="reference")
    p = scipy.special.softmax(scores, axis=1)
    np.testing.assert_allclose(extras["lse"], scipy.special.logsumexp(scores, axis=1), rtol=1e-14)
    np.testing.assert_array_equal(extras["argmax"], scores.argmax(axis=1))
    np.testing.assert_allclose(extras["entropy"], scipy.special.entr(p).sum(axis=1), rtol=1e-12, atol=1e-15)
    assert extras["row_loss"].mean() == pytest.approx(value)
    assert [extras[name].shape for name in extras] == [(30,)] * 4


def test_extra_outputs_of_skipped_rows_are_zero_and_row_loss_is_unweighted():
    scores, y = problem(4)
    scores[1] = np.nan
    plain = fl.Softmax().value(scores, y, reduction="none", backend="reference")
    losses, extras = fl.Softmax().value(
        scores,
        y,
        sample_weight=[2, 0, 1, 3],
        reduction="none",
        outputs=("row_loss", "lse", "argmax"),
        backend="reference",
    )
    np.testing.assert_array_equal(extras["row_loss"], np.where([1, 0, 1, 1], plain, 0))
    np.testing.assert_array_equal(losses, extras["row_loss"] * [2, 0, 1, 3])
    assert extras["lse"][1] == extras["argmax"][1] == 0


def test_transforms_agree_with_scipy():
    scores, _ = problem(50, 13, spread=10)
    for kind in ("softmax", "log_softmax", "logsumexp"):
        expected = getattr(scipy.special, kind)(scores, axis=1)
        np.testing.assert_allclose(getattr(fl, kind)(scores, backend="reference"), expected, rtol=3e-14, atol=1e-15)


def test_losses_agree_with_scikit_learn():
    scores, y = problem(60, 7)
    log_loss = sklearn.metrics.log_loss(y, scipy.special.softmax(scores, axis=1), labels=range(7))
    assert fl.Softmax().value(scores, y, backend="reference") == pytest.approx(log_loss, rel=1e-12)
    crammer_singer = sklearn.metrics.hinge_loss(y, scores, labels=range(7))
    assert fl.Hinge(over="max").value(scores, y, backend="reference") == pytest.approx(crammer_singer, rel=1e-12)


# --- penalties ---------------------------------------------------------------------------------------------------
W = np.array([[3.0, -4.0, 0.0], [0.25, 0.0, -0.5]])


@pytest.mark.parametrize(
    ("penalty", "value", "gradient"),
    [
        (fl.L2(0.5), 0.5 * 25.3125, W),
        (fl.L1(2.0), 2 * 7.75, 2 * np.sign(W)),
        (fl.ElasticNet(2.0, beta=0.25), 2 * (0.25 * 25.3125 + 7.75), W + 2 * np.sign(W)),
        (fl.MaxNorm(1.0), 0, 0 * W),
    ],
    ids=["L2", "L1", "elastic net", "max-norm"],
)
def test_penalty_values_and_gradients(penalty, value, gradient):
    found, grad = penalty.value_and_grad(W)
    assert found == pytest.approx(value)
    assert penalty.value(W) == found
    np.testing.assert_allclose(grad, gradient)


@pytest.mark.parametrize(
    "penalty", [fl.L2(0.5), fl.L1(0.7), fl.ElasticNet(0.3, beta=2.0)], ids=["L2", "L1", "elastic net"]
)
def test_proximal_step_minimises(penalty):
    """step(V, t) is the minimum of ½ ‖W − V‖² + t R(W)."""
    best = penalty.step(W, 0.4)

    def goal(V):
        return 0.5 * np.sum((V - W) ** 2) + 0.4 * penalty.value(V)

    for direction in np.random.default_rng(0).standard_normal((50, *W.shape)):
        assert goal(best) <= goal(best + 1e-3 * direction)


def test_max_norm_projects_each_class():
    projected = fl.MaxNorm(1.0).step(W, 0.4)
    np.testing.assert_allclose(projected, [[0.6, -0.8, 0], W[1]])
    np.testing.assert_array_equal(fl.MaxNorm(1.0).step(0 * W, 0.4), 0 * W)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.float16])
def test_penalties_of_narrow_weights_do_not_overflow(dtype):
    narrow = np.full((2, 3), 100, dtype)
    for penalty, expected in ((fl.L2(1.0), 6e4), (fl.L1(1.0), 600), (fl.ElasticNet(1.0, beta=1.0), 6e4 + 600)):
        assert penalty.value(narrow * dtype(1)) == pytest.approx(expected)
    assert fl.L2(1.0).value(np.full((2, 3), 300, np.float16)) == pytest.approx(6 * 9e4)
