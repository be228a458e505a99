"""The row mathematics that the compiled-at-run-time kernels share, on NumPy's scalars: as a simulator runs it.

Rows are walked over in two parts, whose terms are added as a GPU's threads would, and held against 50 digits.
"""

import itertools

import mpmath
import numpy as np
import pytest

import fastloss as fl
from fastloss.backends import reference
from fastloss.jit import rowmath
from tests.conftest import PLAIN, exact_row, ulps

LOSSES = {
    **PLAIN,
    "smoothed": fl.Softmax(label_smoothing=0.125),
    "smoothed, weights": fl.Softmax(label_smoothing=0.125, class_weight=np.arange(1, 8) / 4),
    "z-loss": fl.Softmax(z_loss=0.25),
    "softcap": fl.Softmax(softcap=5.0),
    "temperature": fl.Softmax(temperature=2.0),
    "all": fl.Softmax(softcap=30.0, temperature=0.5, z_loss=0.125, label_smoothing=0.25),
    "pairs": fl.Hinge(pair_margins=np.arange(49).reshape(7, 7) / 8),
    "pairs, squared": fl.Hinge(pair_margins=np.arange(49).reshape(7, 7) / 8, power=2, over="mean"),
    "pairs, max": fl.Hinge(pair_margins=np.arange(49).reshape(7, 7) / 8, over="max"),
    "counted": fl.Hinge(count_target=True, power=2),
    "logistic, mean": fl.Logistic(over="mean", label_smoothing=0.125),
    "logistic, weights": fl.Logistic(pos_weight=np.arange(1, 8) / 4),
}


def keep(function):
    return function


def evaluate(loss, scores, target, entropy=False, whole=False):
    """A row by the helpers: loss, gradient, z and entropy."""
    real, c = scores.dtype.type, len(scores)
    plan = rowmath.plan_of(loss, np.ndim(target) == 1, entropy=entropy, whole=whole)
    row = rowmath.build(plan, keep, rowmath.plain_tools(real))
    options = tuple(rowmath.numbers_of(loss, c, real))
    zero, one = real(0), real(1)
    q = target.astype(real) if plan.probabilities else np.zeros(c, real)
    own = real(getattr(loss, "margin", 0))
    if plan.pairs:
        q = loss.pair_margins[target].astype(real)
        own = q[target]
    w = np.zeros(c, real)
    if plan.kind == "logistic" and plan.weights:
        w = rowmath.table_of(loss, c, plan).astype(real).reshape(2, c).T
    elif plan.weights:
        w = loss.class_weight.astype(real)
        own = w[target] if plan.even else own
    m = zero
    for k in range(c if plan.looks else 0):
        m = row.top(m, scores[k]) if k else scores[0]
    sy = zero if plan.probabilities else scores[target]
    is_target = np.zeros(c, bool)
    if not plan.probabilities:
        is_target[target] = True
    known = row.aim(m, sy, one, options)
    steps = [row.step(scores[j], q[j], w[j], is_target[j], known, options) for j in range(c)]
    if plan.kind == "hinge max":
        top = steps[0][1]
        for step in steps[1:]:
            top = row.top(top, step[1])
        sums, low = (top, *steps[0][2:]), zero
    else:
        halves = [
            [sum((step[k] for step in part), start=zero) for k in range(1, 1 + rowmath.TERMS)]
            for part in (steps[: c // 2], steps[c // 2 :])
        ]
        first, low = row.functions.exact_sum(halves[0][0], halves[1][0])
        sums = (first, *(a + b for a, b in zip(halves[0][1:], halves[1][1:], strict=True)))
    found, z, spread, entry, *numbers = row.settle(m, sy, own, known, sums, low, one, options)
    if plan.kind == "hinge max":
        gradient = np.zeros(c, real)
        hits = [j for j in range(c) if not is_target[j] and (steps[j][0] == numbers[1] or steps[j][0] != steps[j][0])]
        if hits:
            gradient[hits[0]] = numbers[0]
    else:
        gradient = np.array([
            row.close(steps[j][0], q[j], w[j], is_target[j], known, numbers, options) for j in range(c)
        ])  # fmt: skip
    if plan.has_target:
        gradient[target] = entry
    assert {type(x) for x in (found, entry, *known, *numbers)} == {real}
    return found, gradient, z, spread


@pytest.fixture(autouse=True)
def quiet():
    with np.errstate(all="ignore"):
        yield


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("spread", "offset"), [(1, 0), (4, 100), (30, 0), (8, -1000)])
def test_against_50_digits(name, dtype, spread, offset):
    rng, loss = np.random.default_rng(5), LOSSES[name]
    wholes = {False, rowmath.plan_of(loss, False, whole=True).pivots}
    for target, whole in itertools.product(range(7), wholes):
        scores = (rng.standard_normal(7) * spread + offset).astype(dtype)
        if loss.kind == "softmax" and loss.softcap is not None:
            scores = (scores - dtype(offset)).astype(dtype)
        with mpmath.workdps(50):
            true, true_gradient = exact_row(loss, scores, target)
            found, gradient, _, _ = evaluate(loss, scores, target, whole=whole)
            unit = np.finfo(dtype).eps * 2.0 ** np.floor(np.log2(max(1.0, abs(float(true)))))
            assert abs(mpmath.mpf(float(found)) - true) <= (2 if name in PLAIN else 8) * unit
            largest = max(max(abs(float(g)) for g in true_gradient), float(np.finfo(dtype).tiny))
            unit = np.finfo(dtype).eps * 2.0 ** np.floor(np.log2(largest))
            errors = [abs(mpmath.mpf(float(g)) - t) for g, t in zip(gradient, true_gradient, strict=True)]
            assert max(errors) <= (8 if name in PLAIN else 128) * unit, (gradient, true_gradient)


def test_a_target_that_dominates(dtype):
    scores = np.array([30, 10, 5, 0], dtype)
    with mpmath.workdps(50):
        true, true_gradient = exact_row(fl.Softmax(), scores, 0)
        found, gradient, _, _ = evaluate(fl.Softmax(), scores, 0)
        assert ulps(np.array([found]), [true]).max() <= 4
        assert ulps(gradient, true_gradient).max() <= 8


ROWS = [
    [1, np.nan, 2], [np.inf, 1, 2], [-np.inf, 1, 2], [-np.inf] * 3, [1, 2, -np.inf], [np.inf, np.inf, 0], [5, 5, 5],
    [0, 0, 1e30], [-1e30, -1e30, -1e30],
]  # fmt: skip


@pytest.mark.parametrize("name", [n for n in LOSSES if "pairs" not in n and "weights" not in n])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_special_rows(name, dtype, row):
    loss, scores = LOSSES[name], np.array(row, dtype)
    for target in range(3):
        losses, gradient, _ = reference.row_math(loss, scores[None], np.array([target]))
        found, found_gradient, _, _ = evaluate(loss, scores, target)
        np.testing.assert_allclose(found, losses[0], rtol=2e-6)
        np.testing.assert_allclose(found_gradient, gradient[0], rtol=2e-6, atol=2e-7)


def test_probabilities_and_extras(dtype):
    rng = np.random.default_rng(7)
    loss = fl.Softmax(class_weight=np.arange(1, 8) / 4, z_loss=0.125)
    targets = rng.dirichlet(np.ones(7), 3).astype(dtype)
    scores = rng.standard_normal((3, 7)).astype(dtype)
    losses, gradient, extras = reference.row_math(loss, scores, targets)
    for k in range(3):
        found, found_gradient, z, entropy = evaluate(loss, scores[k], targets[k], entropy=True)
        np.testing.assert_allclose(found, losses[k], rtol=2e-6)
        np.testing.assert_allclose(found_gradient, gradient[k], rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose([z, entropy], [extras["lse"][k], extras["entropy"][k]], rtol=2e-6)


@pytest.mark.parametrize("kind", ["p", "log p", "lse"])
@pytest.mark.parametrize("row", [*ROWS, [0.3, 0.2, -1]], ids=str)
def test_transforms(kind, dtype, row):
    scores = np.array(row, dtype)
    plan, zero = rowmath.Plan(kind), dtype(0)
    made = rowmath.build(plan, keep, rowmath.plain_tools(dtype))
    options = (zero,) * 8
    m = scores.max()
    known = made.aim(m, zero, zero, options)
    steps = [made.step(x, zero, zero, False, known, options) for x in scores]
    sums = tuple(sum((step[k] for step in steps), start=zero) for k in range(1, 1 + rowmath.TERMS))
    found, _, _, _, *numbers = made.settle(m, zero, zero, known, sums, zero, zero, options)
    closed = [made.close(step[0], zero, zero, False, known, numbers, options) for step in steps]
    name = {"p": "softmax", "log p": "log_softmax", "lse": "logsumexp"}[kind]
    expected = reference.TRANSFORMS[name](scores[None])[0]
    np.testing.assert_allclose(found if kind == "lse" else closed, expected, rtol=2e-6, atol=1e-30)
