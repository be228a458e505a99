"""Training: against plain NumPy loops of the lecture, and what the contract promises."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastloss as fl
from fastloss import data
from fastloss.model import LinearModel
from fastloss.train import DivergenceError, gradient_descent, sgd
from fastloss.train.recipes import RECIPES, recipe


def problem(n=203, d=7, c=4, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(c, size=n)
    X = rng.normal(size=(c, d))[y] + rng.normal(size=(n, d))
    return X.astype(dtype), y


def lecture_gradient(kind, X, y, W):
    """Mean loss gradient with respect to W, as the course notes compute it."""
    n = np.arange(len(X))
    scores = np.c_[X, np.ones(len(X))] @ W.T
    if kind == "softmax":
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        p[n, y] -= 1
    else:
        margins = scores - scores[n, y][:, None] + 1
        margins[n, y] = 0
        p = (margins > 0).astype(float)
        p[n, y] = -p.sum(axis=1)
    return p.T @ np.c_[X, np.ones(len(X))] / len(X)


@pytest.mark.parametrize("kind", ["softmax", "hinge"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("batch_size", [1, 16, 33, 203])
def test_steps_are_the_lectures(backend, kind, momentum, batch_size):
    X, y = problem()
    strength, step_size, epochs, seed = 0.01, 0.02, 3, 5
    W = np.random.default_rng(1).normal(size=(4, 8))
    loss = fl.Softmax() if kind == "softmax" else fl.Hinge()
    objective = fl.LinearObjective(loss, X, y, penalty=fl.L2(strength), backend=backend)
    result = sgd(
        objective, W, epochs=epochs, batch_size=batch_size, step_size=step_size, momentum=momentum, seed=seed,
        schedule="cosine",
    )  # fmt: skip

    expected, v, t = W.copy(), np.zeros_like(W), 0
    n_batches = math.ceil(len(X) / batch_size)
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(X))
        for k in range(n_batches):
            rows = order[k * batch_size : (k + 1) * batch_size]
            gradient = lecture_gradient(kind, X[rows], y[rows], expected)
            gradient[:, :-1] += 2 * strength * expected[:, :-1]
            size = step_size * 0.5 * (1 + np.cos(np.pi * t / (epochs * n_batches)))
            v = momentum * v - size * gradient
            expected += v
            t += 1
    np.testing.assert_allclose(result.W, expected, rtol=0, atol=1e-12)
    assert result.stopped == "done"
    assert result.history["step"].tolist() == [n_batches * k for k in range(epochs + 1)]


@pytest.mark.parametrize("penalty", [None, fl.L2(0.01), fl.L1(0.01), fl.ElasticNet(0.01), fl.MaxNorm(0.5)], ids=repr)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_descent_is_sgd_with_the_full_batch(backend, penalty, reduction):
    X, y = problem()
    objective = fl.LinearObjective(fl.Softmax(), X, y, penalty=penalty, reduction=reduction, backend=backend)
    options = {"step_size": 0.001, "momentum": 0.5, "schedule": "step"}
    one = gradient_descent(objective, steps=8, **options)
    other = sgd(objective, epochs=8, batch_size=1000, **options)
    np.testing.assert_array_equal(one.W, other.W)
    for name, values in one.history.items():
        np.testing.assert_array_equal(values, other.history[name], err_msg=name)
    assert (np.diff(one.history["loss"]) < 0).all()


def run_with_threads(n_threads, objective, **options):
    before = fl.get_num_threads()
    fl.set_num_threads(n_threads)
    try:
        return sgd(objective, **options)
    finally:
        fl.set_num_threads(before)


@pytest.mark.parametrize("penalty", [fl.L2(0.01), fl.L1(0.01), fl.MaxNorm(0.5)], ids=repr)
def test_same_seed_same_bits(backend, penalty):
    X, y = problem(1500, 70, 5, np.float32)
    objective = fl.LinearObjective(fl.Softmax(), X, y, penalty=penalty, backend=backend)
    options = {"epochs": 2, "batch_size": 700, "momentum": 0.9, "seed": 3, "validation": (X[:100], y[:100])}
    first = run_with_threads(1, objective, **options)
    for n_threads in (1, 2, 3, 5):
        again = run_with_threads(n_threads, objective, **options)
        assert again.W.tobytes() == first.W.tobytes()
        assert {name: v.tobytes() for name, v in again.history.items()} == {
            name: v.tobytes() for name, v in first.history.items()
        }
    assert (sgd(objective, **options | {"seed": 4}).W != first.W).any()


def test_history_describes_the_weights():
    X, y = problem()
    objective = fl.LinearObjective(fl.Hinge(), X, y, penalty=fl.L2(0.1))
    seen = []

    def callback(state):
        assert not state.W.flags.writeable
        value, gradient = objective.value_and_grad(state.W)
        assert state.loss == value
        assert state.grad_norm == pytest.approx(np.linalg.norm(gradient), rel=1e-12)
        scores = X @ state.W[:, :-1].T + state.W[:, -1]
        assert state.accuracy == np.mean(scores.argmax(axis=1) == y)
        assert state.validation_accuracy == np.mean(scores[:50].argmax(axis=1) == y[:50])
        seen.append((state.epoch, state.step, state.step_size, state.loss))

    result = sgd(
        objective, epochs=5, batch_size=100, step_size=0.01, schedule=lambda t: 1 / (1 + t), evaluate_every=2,
        validation=(X[:50], y[:50]), callback=callback,
    )  # fmt: skip
    assert [epoch for epoch, *_ in seen] == [0, 2, 4, 5]
    assert [step for _, step, *_ in seen] == [0, 6, 12, 15]
    np.testing.assert_allclose([s for _, _, s, _ in seen], 0.01 / np.array([1, 6, 12, 15]), rtol=1e-15)
    assert list(zip(*(result.history[k].tolist() for k in ("epoch", "step", "step_size", "loss")), strict=True)) == seen
    assert result.value == seen[-1][-1] == objective.value(result.W)


@pytest.mark.parametrize(("loss", "start"), [(fl.Softmax(), math.log(10)), (fl.Hinge(), 9.0)], ids=["softmax", "hinge"])
def test_zero_weights_start_at_the_lectures_loss(backend, loss, start):
    X, y = problem(c=10)
    result = gradient_descent(fl.LinearObjective(loss, X, y, backend=backend), steps=1, n_classes=10)
    assert result.history["loss"][0] == pytest.approx(start, rel=1e-15)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1, 1, 1, 1, 1, 1, 1, 1]),
        ("cosine", [(1 + math.cos(math.pi * t / 8)) / 2 for t in range(8)]),
        ("step", [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]),
        (lambda t: t, list(range(8))),
    ],
    ids=["constant", "cosine", "step", "function"],
)
def test_schedules(schedule, factors):
    X, y = problem()
    result = gradient_descent(fl.LinearObjective(fl.Softmax(), X, y), steps=8, step_size=0.5, schedule=schedule)
    np.testing.assert_allclose(result.history["step_size"][1:], 0.5 * np.array(factors), rtol=1e-15)
    assert result.history["step_size"][0] == 0.5 * factors[0]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_l1_reaches_its_minimum_with_exact_zeros(momentum):
    X, y = problem()
    X[:, 3] = np.random.default_rng(2).normal(size=len(X))  # says nothing about the class
    strength = 0.05
    objective = fl.LinearObjective(fl.Softmax(), X, y, penalty=fl.L1(strength))
    result = gradient_descent(objective, steps=2000, step_size=0.3, momentum=momentum, evaluate_every=1000)
    assert result.history["grad_norm"][-1] < 1e-7
    weights = result.W[:, :-1]
    gradient = objective.data_value_and_grad(result.W)[1][:, :-1]
    assert (weights[:, 3] == 0).all()
    assert (weights != 0).any()
    # The optimality conditions of the lasso.
    np.testing.assert_allclose(gradient[weights != 0], -strength * np.sign(weights[weights != 0]), atol=1e-7)
    assert (np.abs(gradient[weights == 0]) <= strength).all()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_proximal_steps_are_istas(momentum):
    X, y = problem()
    objective = fl.LinearObjective(fl.Softmax(), X, y, penalty=fl.ElasticNet(0.05, beta=0.5))
    result = gradient_descent(objective, steps=9, step_size=0.2, momentum=momentum)
    W = before = np.zeros((4, 8))
    for _ in range(9):
        moved = W + momentum * (W - before) - 0.2 * lecture_gradient("softmax", X, y, W)
        shrunk = np.sign(moved[:, :-1]) * np.maximum(np.abs(moved[:, :-1]) - 0.2 * 0.05, 0)
        moved[:, :-1] = shrunk / (1 + 2 * 0.2 * 0.05 * 0.5)
        W, before = moved, W
    np.testing.assert_allclose(result.W, W, atol=1e-13)


def test_max_norm_is_kept():
    X, y = problem()
    objective = fl.LinearObjective(fl.Softmax(), X + 3, y, penalty=fl.MaxNorm(0.25))
    result = sgd(objective, epochs=20, batch_size=20, step_size=0.1)
    norms = np.linalg.norm(result.W[:, :-1], axis=1)
    assert norms.max() == pytest.approx(0.25, rel=1e-12)
    assert np.abs(result.W[:, -1]).max() > 0.25


@pytest.mark.parametrize("penalty", [fl.L2(0.5), fl.L1(10.0), fl.ElasticNet(10.0), fl.MaxNorm(1e-6)], ids=repr)
def test_the_bias_is_never_penalised(penalty):
    X, y = problem()
    objective = fl.LinearObjective(fl.Softmax(), np.zeros_like(X), y, penalty=penalty)
    W = np.random.default_rng(0).normal(size=(4, 8))
    result = gradient_descent(objective, W, steps=500, step_size=0.9)
    shares = np.bincount(y) / len(y)
    np.testing.assert_allclose(fl.softmax(result.W[:, -1]), shares, rtol=1e-9)
    assert np.abs(result.W[:, :-1]).max() < 1e-5


def test_without_bias():
    X, y = problem()
    result = sgd(fl.LinearObjective(fl.Softmax(), X, y, bias=False, penalty=fl.L2(0.1)), epochs=2, batch_size=32)
    assert result.W.shape == (4, 7)
    assert result.history["accuracy"][-1] > 0.5


def test_rows_of_no_weight_are_left_out(backend):
    X, y = problem()
    keep = np.random.default_rng(1).random(len(X)) < 0.5
    ignored = np.where(keep, y, -1)
    X_bad = np.where(keep[:, None], X, np.nan)
    options = {"epochs": 2, "batch_size": 1, "step_size": 0.01, "n_classes": 4}
    expected = sgd(fl.LinearObjective(fl.Softmax(), X[keep], y[keep], backend=backend), **options)
    by_index = sgd(fl.LinearObjective(fl.Softmax(ignore_index=-1), X_bad, ignored, backend=backend), **options)
    by_weight = sgd(fl.LinearObjective(fl.Softmax(), X_bad, y, sample_weight=keep, backend=backend), **options)
    np.testing.assert_allclose(by_index.W, expected.W, atol=1e-13)
    np.testing.assert_allclose(by_weight.W, expected.W, atol=1e-13)
    np.testing.assert_allclose(by_index.history["accuracy"], expected.history["accuracy"])


def test_shift_and_scale_of_the_objective():
    X, y = problem()
    raw = 50 + 20 * X
    shift, scale = data.standardisation(raw)
    options = {"epochs": 3, "batch_size": 32, "validation": (raw[:40], y[:40])}
    inside = sgd(fl.LinearObjective(fl.Softmax(), raw, y, shift=shift, scale=scale), **options)
    options["validation"] = ((raw[:40] - shift) / scale, y[:40])
    outside = sgd(fl.LinearObjective(fl.Softmax(), (raw - shift) / scale, y), **options)
    np.testing.assert_allclose(inside.W, outside.W, atol=1e-10)
    np.testing.assert_array_equal(inside.history["accuracy"], outside.history["accuracy"])
    np.testing.assert_array_equal(inside.history["validation_accuracy"], outside.history["validation_accuracy"])


def test_the_start_is_copied_and_converted():
    X, y = problem(dtype=np.float32)
    W = np.ones((4, 8), int)
    result = sgd(fl.LinearObjective(fl.Hinge(), X, y), W, epochs=0)
    assert result.W.dtype == np.float32
    np.testing.assert_array_equal(result.W, W)
    probabilities = fl.LinearObjective(fl.Softmax(), X, np.eye(6)[y], backend="reference")
    assert sgd(probabilities, epochs=0).W.shape == (6, 8)


# --- stopping ---------------------------------------------------------------------------------------------------
def test_callback_stops():
    X, y = problem()
    kept = []

    def callback(state):
        kept.append(state.W.copy())
        return state.epoch == 2

    result = sgd(fl.LinearObjective(fl.Softmax(), X, y), epochs=10, callback=callback)
    assert result.stopped == "callback"
    assert result.history["epoch"].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(result.W, kept[-1])


def test_interrupt_gives_back_the_last_record():
    X, y = problem()

    def schedule(step):
        if step == 17:  # in the third epoch of 7 batches
            raise KeyboardInterrupt
        return 1.0

    objective = fl.LinearObjective(fl.Softmax(), X, y)
    result = sgd(objective, epochs=10, batch_size=32, schedule=schedule)
    whole = sgd(objective, epochs=2, batch_size=32)
    assert result.stopped == "interrupted"
    np.testing.assert_array_equal(result.W, whole.W)
    assert result.history["loss"].tolist() == whole.history["loss"].tolist()
    assert result.value == objective.value(result.W)


def test_interrupt_before_anything_is_known_is_passed_on(monkeypatch):
    X, y = problem()
    objective = fl.LinearObjective(fl.Softmax(), X, y)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(objective, "value_and_grad", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sgd(objective)


@pytest.mark.parametrize("run", [gradient_descent, sgd])
def test_divergence_is_an_error(run):
    X, y = problem(dtype=np.float32)
    with pytest.raises(DivergenceError, match=r"the loss is (nan|inf) after \d+ steps .* step_size=1e\+38; use a") as e:
        run(fl.LinearObjective(fl.Hinge(), X * 1e3, y), step_size=1e38)
    assert e.value.result.stopped == "diverged"
    assert e.value.result.value == 3.0
    assert np.isfinite(e.value.result.W).all()


def test_divergence_by_the_penalty_is_an_error():
    X, y = problem(dtype=np.float32)
    objective = fl.LinearObjective(fl.Softmax(), X, y, penalty=fl.L2(1e6))
    with pytest.raises(DivergenceError):
        sgd(objective, epochs=50, batch_size=64)


def test_nan_in_the_data_is_named_at_the_start():
    X, y = problem()
    X[5, 2] = np.nan
    with pytest.raises(DivergenceError, match="at the start: X or W has NaN") as e:
        sgd(fl.LinearObjective(fl.Softmax(), X, y))
    assert e.value.result is None


# --- progress ---------------------------------------------------------------------------------------------------
def test_progress_bar(capsys):
    X, y = problem()
    sgd(fl.LinearObjective(fl.Softmax(), X, y), epochs=2, batch_size=50, progress=True)
    assert "10/10" in capsys.readouterr().err


def test_progress_without_tqdm_names_the_extra(monkeypatch):
    X, y = problem()
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r'pip install "fastloss\[cli\]"'):
        sgd(fl.LinearObjective(fl.Softmax(), X, y), progress=True)


# --- bad input --------------------------------------------------------------------------------------------------
X_GOOD, Y_GOOD = problem()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": -1}, ValueError, "epochs is -1"),
        ({"epochs": 1.5}, TypeError, "epochs is 1.5"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"step_size": 0}, ValueError, "step_size is 0"),
        ({"step_size": math.nan}, ValueError, "step_size is nan"),
        ({"step_size": "fast"}, TypeError, "step_size is 'fast'"),
        ({"momentum": 1}, ValueError, "momentum is 1"),
        ({"momentum": -0.1}, ValueError, "momentum is -0.1"),
        ({"schedule": "linear"}, ValueError, "schedule is 'linear'; it must be one of 'constant', 'cosine', 'step'"),
        ({"schedule": lambda t: -1.0}, ValueError, r"schedule\(0\) is -1.0"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"evaluate_every": 0}, ValueError, "evaluate_every is 0"),
        ({"callback": 3}, TypeError, "callback is 3"),
        ({"n_classes": 0}, ValueError, "n_classes is 0"),
        ({"n_classes": 3}, ValueError, r"targets\[\d+\] is 3, but scores have 3 classes"),
        ({"n_classes": 3, "W": np.zeros((4, 8))}, ValueError, r"n_classes is 3, but W has shape \(4, 8\)"),
        ({"W": np.zeros((4, 7))}, ValueError, r"W has shape \(4, 7\)"),
        ({"W": np.zeros(8)}, ValueError, r"W has shape \(8,\)"),
        ({"W": np.zeros((4, 8), complex)}, TypeError, "W has dtype complex128"),
        ({"validation": X_GOOD}, TypeError, r"validation is ndarray; it must be a pair"),
        ({"validation": (X_GOOD[:, :3], Y_GOOD)}, ValueError, r"validation X has shape \(203, 3\)"),
        ({"validation": (X_GOOD, Y_GOOD[:9])}, ValueError, r"validation targets has shape \(9,\)"),
        ({"validation": (X_GOOD, Y_GOOD * 1.0)}, ValueError, "validation targets .* dtype float64"),
        ({"validation": (X_GOOD, Y_GOOD + 1)}, ValueError, r"validation targets\[\d+\] is 4, but W has 4 classes"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        sgd(fl.LinearObjective(fl.Softmax(), X_GOOD, Y_GOOD), **options)


def test_bad_objectives():
    with pytest.raises(TypeError, match="objective is Softmax"):
        sgd(fl.Softmax())
    with pytest.raises(ValueError, match="steps is -1"):
        gradient_descent(fl.LinearObjective(fl.Softmax(), X_GOOD, Y_GOOD), steps=-1)
    with pytest.raises(ValueError, match="objective has reduction='sum'"):
        sgd(fl.LinearObjective(fl.Softmax(), X_GOOD, Y_GOOD, reduction="sum"), batch_size=10)
    with pytest.raises(ValueError, match="no row of weight above 0"):
        sgd(fl.LinearObjective(fl.Softmax(), X_GOOD, Y_GOOD, sample_weight=np.zeros(len(X_GOOD))))
    with pytest.raises(ValueError, match="give n_classes"):
        sgd(fl.LinearObjective(fl.Softmax(), X_GOOD[:0], Y_GOOD[:0]))


# --- real images ------------------------------------------------------------------------------------------------
def train_by_recipe(dataset, loss):
    chosen = recipe(dataset.name, loss, dataset.X_train.shape[1])
    shift, scale = data.standardisation(dataset.X_train, per_feature=chosen.per_feature)
    X = data.standardise(dataset.X_train, shift, scale)
    objective = fl.LinearObjective(chosen.loss, X, dataset.y_train, penalty=chosen.penalty)
    result = sgd(objective, **chosen.options, evaluate_every=chosen.epochs)
    return LinearModel(result.W, dataset.class_names, shift, scale, repr(chosen.loss), dataset.image_shape)


@pytest.mark.parametrize("name", ["digits", "another"])
@pytest.mark.parametrize("loss", ["softmax", "hinge", "logistic"])
def test_recipes_learn_digits(name, loss):
    digits = data.load_digits()
    model = train_by_recipe(data.Dataset(**{**vars(digits), "name": name}), loss)
    assert model.accuracy(digits.X_test, digits.y_test) >= 0.94


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    """CIFAR-10 where FASTLOSS_DATA points, or unpacked from the archive beside the checkout."""
    folder = data.find_cifar10()
    if folder is None:
        named = os.environ.get("FASTLOSS_DATA")
        shared = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
        if not (shared / "cifar10-jpeg.zip").is_file():
            pytest.skip(f"no CIFAR-10 in {shared}; set FASTLOSS_DATA to the folder that holds it")
        folder = tmp_path_factory.mktemp("cifar10")
        subprocess.run([sys.executable, shared / "unpack_cifar10.py", folder], check=True)
    return data.load_cifar10(folder)


@pytest.mark.parametrize(
    ("loss", "least"), [("softmax", 0.40), pytest.param("hinge", 0.36, marks=pytest.mark.full)]
)
def test_recipes_learn_cifar10(cifar10, loss, least):
    assert cifar10.X_train.shape == (50000, 3072)
    assert np.bincount(cifar10.y_train).tolist() == [5000] * 10
    assert np.bincount(cifar10.y_test).tolist() == [1000] * 10
    assert cifar10.class_names[:2] == ("airplane", "automobile")
    assert train_by_recipe(cifar10, loss).accuracy(cifar10.X_test, cifar10.y_test) >= least


@pytest.mark.parametrize("as_columns", [False, True])
def test_a_single_column_of_scores(as_columns):
    """Binary problems: the labels are 0 and 1, and accuracy is by the sign of the score."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((300, 3))
    y = (X[:, 0] + 0.1 * rng.standard_normal(300) > 0).astype(int)
    objective = fl.LinearObjective(fl.Logistic(), X, y[:, None] if as_columns else y, penalty=fl.L2(1e-3))
    result = sgd(objective, n_classes=1, epochs=5, batch_size=32, step_size=0.5, validation=(X, y))
    assert result.W.shape == (1, 4)
    right = np.mean((X @ result.W[0, :3] + result.W[0, 3] > 0) == y)
    assert result.history["accuracy"][-1] == result.history["validation_accuracy"][-1] == right > 0.9


def test_every_recipe_is_of_its_name():
    assert all(entry.loss.kind == loss for (_, loss), entry in RECIPES.items())
    with pytest.raises(ValueError, match="loss is 'logit'"):
        recipe("digits", "logit", 64)
