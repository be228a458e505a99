"""The worked numbers of the lecture on linear classifiers (CS231n, lectures 2 and 3), on every backend."""

import math

import numpy as np
import pytest

import fastloss as fl

CAT_CAR_FROG = np.array([[3.2, 5.1, -1.7], [1.3, 4.9, 2.0], [2.2, 2.5, -3.1]])


def test_hinge_of_three_images(backend):
    losses = fl.Hinge().value(CAT_CAR_FROG, [0, 1, 2], reduction="none", backend=backend)
    np.testing.assert_allclose(losses, [2.9, 0, 12.9], atol=1e-14)
    assert fl.Hinge().value(CAT_CAR_FROG, [0, 1, 2], backend=backend) == pytest.approx(15.8 / 3, abs=1e-14)
    assert round(15.8 / 3, 2) == 5.27


def test_squared_hinge_of_three_images(backend):
    losses = fl.Hinge(power=2).value(CAT_CAR_FROG, [0, 1, 2], reduction="none", backend=backend)
    np.testing.assert_allclose(losses, [2.9**2, 0, 6.3**2 + 6.6**2], atol=1e-13)


def test_weights_doubled_have_the_same_zero_loss(backend):
    X, W = np.array([[1.0, 2.0], [-3.0, 0.5]]), np.array([[1.5, 2.5], [-2.0, -1.0]])
    objective = fl.LinearObjective(fl.Hinge(), X, [0, 1], bias=False, backend=backend)
    for k in (1, 2):
        value, grad = objective.value_and_grad(k * W)
        assert value == 0
        assert not grad.any()
    penalised = fl.LinearObjective(fl.Hinge(), X, [0, 1], bias=False, penalty=fl.L2(0.1), backend=backend)
    assert penalised.value(2 * W) == pytest.approx(4 * penalised.value(W)), "the penalty tells them apart"


@pytest.mark.parametrize("separate_bias", [False, True])
def test_image_of_four_pixels(backend, separate_bias):
    W = np.array([[0.01, -0.05, 0.1, 0.05], [0.7, 0.2, 0.05, 0.16], [0.0, -0.45, -0.2, 0.03]])
    x, b, y = np.array([[-15.0, 22, -44, 56]]), np.array([0.0, 0.2, -0.3]), [2]
    for loss, expected, exact in (
        (fl.Hinge(), 1.58, 1.58),
        (fl.Softmax(), 1.04, -math.log(math.exp(0.28) / (math.exp(-2.85) + math.exp(0.86) + math.exp(0.28)))),
    ):
        if separate_bias:
            value, _ = fl.linear_value_and_grad(loss, x, W, y, b, backend=backend)
        else:
            value = fl.LinearObjective(loss, x, y, backend=backend).value(np.column_stack([W, b]))
        assert round(value, 2) == expected
        assert value == pytest.approx(exact, abs=1e-13)


def test_softmax_of_the_cat_and_the_base_10_slip(backend):
    """The slides print log10: 0.89 for −log(0.13) and 0.452 for −log(0.353). The loss uses the natural logarithm."""
    value = fl.Softmax().value(CAT_CAR_FROG[:1], [0], backend=backend)
    assert round(value, 2) == 2.04
    p = fl.softmax(CAT_CAR_FROG[:1], backend=backend)
    np.testing.assert_allclose(p.round(2), [[0.13, 0.87, 0.0]])
    assert round(-math.log10(0.13), 2) == 0.89
    assert round(-math.log(0.13), 2) == 2.04
    assert round(value / math.log(10), 2) == 0.89

    four_pixels = fl.Softmax().value([[-2.85, 0.86, 0.28]], [2], backend=backend)
    assert round(-math.log10(0.353), 3) == 0.452
    assert round(-math.log(0.353), 2) == round(four_pixels, 2) == 1.04
    assert round(four_pixels / math.log(10), 2) == 0.45


@pytest.mark.parametrize("c", [1, 2, 3, 10, 100])
def test_sanity_of_an_untrained_classifier(backend, c):
    """At W = 0 all scores are equal: hinge gives C − 1 and softmax ln C."""
    X, y = np.random.default_rng(0).standard_normal((7, 5)), np.arange(7) % c
    W = np.zeros((c, 6))
    assert fl.LinearObjective(fl.Hinge(), X, y, backend=backend).value(W) == c - 1
    assert fl.LinearObjective(fl.Softmax(), X, y, backend=backend).value(W) == pytest.approx(math.log(c), rel=1e-15)


def test_softmax_is_never_satisfied_and_hinge_is(backend):
    scores, y = np.array([[10.0, -2, 3], [10, 9, 9], [10, -100, -100]]), [0, 0, 0]
    np.testing.assert_array_equal(fl.Hinge().value(scores, y, reduction="none", backend=backend), [0, 0, 0])
    losses = fl.Softmax().value(scores, y, reduction="none", backend=backend)
    expected = [math.log1p(math.exp(-12) + math.exp(-7)), math.log1p(2 * math.exp(-1)), 2 * math.exp(-110)]
    np.testing.assert_allclose(losses, expected, rtol=1e-14)


def test_large_scores_do_not_overflow(backend):
    for y, expected in enumerate((666.0, 333.0, 0.0)):
        assert fl.Softmax().value([[123.0, 456.0, 789.0]], [y], backend=backend) == pytest.approx(expected, abs=1e-100)
    np.testing.assert_allclose(
        fl.softmax([[123.0, 456.0, 789.0]], backend=backend), [[math.exp(-666), math.exp(-333), 1]]
    )
    np.testing.assert_allclose(fl.logsumexp([[123.0, 456.0, 789.0]], backend=backend), [789])


def test_confident_softmax_keeps_its_gradient(backend, dtype):
    """p_y − 1 would round to 0 (design, contract item 1)."""
    scores = np.array([[30, 10, 5, 0]], dtype)
    value, grad = fl.Softmax().value_and_grad(scores, [0], backend=backend)
    others = np.exp([-20.0, -25, -30])
    p, eps = others / (1 + others.sum()), float(np.finfo(dtype).eps)
    assert f"{grad[0, 0]:.1e}" == "-2.1e-09"
    np.testing.assert_allclose(grad[0], [-p.sum(), *p], rtol=8 * eps)
    assert value == pytest.approx(math.log1p(others.sum()), rel=8 * eps)


def test_regularised_objective_of_the_lecture(backend):
    """x = [1, 1, 1, 1]: both weights score 1, and L2 prefers the spread-out one."""
    x = np.ones((1, 4))
    peaked, spread = np.array([[1.0, 0, 0, 0]]), np.full((1, 4), 0.25)
    objective = fl.LinearObjective(fl.Softmax(), x, [0], bias=False, penalty=fl.L2(1.0), backend=backend)
    assert (objective.value(peaked), objective.value(spread)) == (1.0, 0.25)
