"""The lecture's searches, the step-size sweep, checkpoints: the steps of NumPy's loops, the same bits after a kill."""

import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import fastloss as fl
from fastloss.data import DataError
from fastloss.train import DivergenceError, gradient_descent, random_local_search, random_search, sgd, step_size_sweep
from fastloss.train import search as search_module


def problem(n=203, d=7, c=4, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(c, size=n)
    X = rng.normal(size=(c, d))[y] + rng.normal(size=(n, d))
    return X.astype(dtype), y


def objective(kind="hinge", dtype=np.float64, **options):
    X, y = problem(dtype=dtype)
    return fl.LinearObjective(fl.Softmax() if kind == "softmax" else fl.Hinge(), X, y, **options)


def lecture_loss(kind, X, y, W):
    """L(X, y, W) of the course notes, with the bias trick."""
    scores = np.c_[X, np.ones(len(X))] @ W.T
    n = np.arange(len(X))
    if kind == "softmax":
        scores -= scores.max(axis=1, keepdims=True)
        return np.mean(np.log(np.exp(scores).sum(axis=1)) - scores[n, y])
    margins = np.maximum(0, scores - scores[n, y][:, None] + 1)
    margins[n, y] = 0
    return margins.sum(axis=1).mean()


def lecture_random(kind, X, y, n, scale, seed):
    rng, best, losses = np.random.default_rng(seed), math.inf, []
    for _ in range(n):
        W = rng.standard_normal((4, 8)) * scale
        losses.append(lecture_loss(kind, X, y, W))
        if losses[-1] < best:
            best, best_W = losses[-1], W
    return best_W, best, losses


def lecture_local(kind, X, y, n, scale, step, seed):
    rng, best, losses = np.random.default_rng(seed), math.inf, []
    W = rng.standard_normal((4, 8)) * scale
    for _ in range(n):
        tried = W + rng.standard_normal((4, 8)) * step
        losses.append(lecture_loss(kind, X, y, tried))
        if losses[-1] < best:
            W, best = tried, losses[-1]
    return W, best, losses


# --- the steps of the lecture's loops -------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["softmax", "hinge"])
@pytest.mark.parametrize("at_once", [1, 7, 1000])
@pytest.mark.parametrize("seed", [0, 3])
def test_random_search_is_the_lectures_loop(monkeypatch, backend, kind, at_once, seed):
    monkeypatch.setattr(search_module, "STACK_VALUES", 32 * at_once)
    result = random_search(objective(kind, backend=backend), n=40, scale=0.5, seed=seed)
    W, value, losses = lecture_random(kind, *problem(), 40, 0.5, seed)
    np.testing.assert_array_equal(result.W, W)
    assert result.value == pytest.approx(value, rel=1e-13)
    np.testing.assert_allclose(result.history["loss"], losses, rtol=1e-13)
    np.testing.assert_array_equal(result.history["best"], np.minimum.accumulate(result.history["loss"]))
    assert result.history["step"].tolist() == list(range(1, 41))
    assert result.stopped == "done"


@pytest.mark.parametrize("kind", ["softmax", "hinge"])
@pytest.mark.parametrize("seed", [0, 3])
def test_random_local_search_is_the_lectures_loop(backend, kind, seed):
    result = random_local_search(objective(kind, backend=backend), n=60, scale=0.1, step=0.05, seed=seed)
    W, value, losses = lecture_local(kind, *problem(), 60, 0.1, 0.05, seed)
    np.testing.assert_array_equal(result.W, W)
    assert result.value == pytest.approx(value, rel=1e-13)
    np.testing.assert_allclose(result.history["loss"], losses, rtol=1e-13)
    assert 0 < np.count_nonzero(np.diff(result.history["best"])) < 59


def test_defaults_are_the_lectures():
    """1000 random W of 1e-4, and 1000 steps of 1e-4 from 1e-3."""
    found = random_search(objective()), random_local_search(objective())
    W, *_ = lecture_random("hinge", *problem(), 1000, 1e-4, 0)
    np.testing.assert_array_equal(found[0].W, W)
    W, *_ = lecture_local("hinge", *problem(), 1000, 1e-3, 1e-4, 0)
    np.testing.assert_array_equal(found[1].W, W)


def test_of_equal_losses_the_first_is_kept():
    """As by the lecture's `<`: where every W has the same loss, nothing moves after the first trial."""
    X, y = problem()
    flat = fl.LinearObjective(fl.Hinge(), 0 * X, y, bias=False)
    rng = np.random.default_rng(2)
    first, second = rng.standard_normal((2, 4, 7))
    np.testing.assert_array_equal(random_search(flat, n=30, scale=1.0, seed=2).W, first)
    found = random_local_search(flat, n=30, scale=1.0, step=0.5, seed=2)
    np.testing.assert_array_equal(found.W, first + 0.5 * second)
    assert found.value == 3


def test_float32_candidates_are_rounded():
    rng = np.random.default_rng(5)
    result = random_search(objective(dtype=np.float32), n=1, scale=0.1, seed=5)
    np.testing.assert_array_equal(result.W, (0.1 * rng.standard_normal((4, 8))).astype(np.float32))
    rng = np.random.default_rng(5)
    start, step = (scale * rng.standard_normal((4, 8)) for scale in (0.1, 0.01))
    result = random_local_search(objective(dtype=np.float32), n=1, scale=0.1, step=0.01, seed=5)
    np.testing.assert_array_equal(result.W, start.astype(np.float32) + step.astype(np.float32))


@pytest.mark.parametrize("search", [random_search, random_local_search])
@pytest.mark.parametrize("options", [{"bias": False}, {"penalty": fl.L2(3.0)}, {"reduction": "sum"}], ids=str)
def test_the_value_is_the_objectives(search, options):
    chosen = objective(**options)
    result = search(chosen, n=30, scale=0.5)
    assert result.value == pytest.approx(chosen.value(result.W), rel=1e-13)
    assert search(chosen, n=30, scale=0.5, n_classes=6).W.shape == (6, 7 + chosen.bias)
    assert (search(chosen, n=30, scale=0.5, seed=1).W != result.W).any()


# --- the sweep ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("run", "length"), [(sgd, {"epochs": 3, "seed": 2}), (gradient_descent, {"steps": 9})])
def test_a_sweep_is_its_trainings(run, length):
    chosen = objective("softmax", penalty=fl.L2(0.01))
    sweep = step_size_sweep(chosen, 1e-3, 1e3, n=7, run=run, **length)
    assert sweep.step_sizes.tolist() == [1e-3, 1e-2, 0.1, 1, 10, 100, 1000]
    assert sweep.stopped == "done"
    for size, loss, history in zip(sweep.step_sizes, sweep.losses, sweep.histories, strict=True):
        try:
            alone = run(chosen, step_size=size, **length)
        except DivergenceError as error:
            assert loss == math.inf
            alone = error.result
        else:
            assert loss == alone.value
        np.testing.assert_array_equal(history["loss"], alone.history["loss"])
    best = int(np.argmin(sweep.losses))
    assert sweep.best == sweep.step_sizes[best]
    assert sweep.value == sweep.losses[best] == chosen.value(sweep.W)


def test_a_sweep_goes_on_past_divergence():
    X, y = problem(dtype=np.float32)
    chosen = fl.LinearObjective(fl.Hinge(), 1e3 * X, y)
    sweep = step_size_sweep(chosen, 1e-7, 1e38, n=3, run=gradient_descent, steps=30)
    assert np.isfinite(sweep.losses).tolist() == [True, True, False]
    with pytest.raises(DivergenceError, match=r"all 2 step sizes from 1e\+37 to 1e\+38 diverged; use smaller ones"):
        step_size_sweep(chosen, 1e37, 1e38, n=2, steps=30, run=gradient_descent)


# --- stopping -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("search", [random_search, random_local_search])
def test_callback_sees_every_trial_and_stops(search):
    seen = []

    def callback(trial):
        assert not trial.W.flags.writeable
        seen.append(trial)
        return trial.step == 17

    result = search(objective(), n=100, scale=0.5, callback=callback)
    assert result.stopped == "callback"
    assert [trial.step for trial in seen] == list(range(1, 18))
    np.testing.assert_array_equal([trial.loss for trial in seen], result.history["loss"])
    np.testing.assert_array_equal([trial.value for trial in seen], result.history["best"])
    np.testing.assert_array_equal(seen[-1].W, result.W)
    np.testing.assert_array_equal(search(objective(), n=17, scale=0.5).W, result.W)


@pytest.mark.parametrize("search", [random_search, random_local_search])
def test_interrupt_keeps_the_best(search):
    def callback(trial):
        if trial.step == 17:
            raise KeyboardInterrupt

    result = search(objective(), n=100, scale=0.5, callback=callback)
    assert result.stopped == "interrupted"
    np.testing.assert_array_equal(search(objective(), n=17, scale=0.5).W, result.W)
    assert result.history["loss"].shape == (17,)


@pytest.mark.parametrize("search", [random_search, random_local_search])
def test_interrupt_before_anything_is_known_is_passed_on(monkeypatch, search):
    chosen = objective()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(chosen, "values", interrupt)
    monkeypatch.setattr(chosen, "value", interrupt)
    with pytest.raises(KeyboardInterrupt):
        search(chosen)


def test_interrupted_descent_keeps_the_best_record():
    """With a step that is too long the loss rises; the best weights are then not the last."""

    def stop(state):
        if state.epoch == 4:
            raise KeyboardInterrupt

    chosen = objective("softmax")
    sizes = [0.5, 0.5, 400.0, 400.0, 400.0]
    result = gradient_descent(chosen, steps=5, step_size=1.0, schedule=lambda t: sizes[t], callback=stop)
    losses = result.history["loss"]
    assert result.stopped == "interrupted"
    assert losses.argmin() == 2
    assert len(losses) == 5
    assert result.value == losses[2] == chosen.value(result.W)


def test_sweep_stops():
    chosen = objective()
    steps = []
    sweep = step_size_sweep(chosen, n=5, epochs=1, callback=lambda trial: steps.append(trial.step) or trial.step == 3)
    assert sweep.stopped == "callback"
    assert steps == [1, 2, 3]
    assert len(sweep.losses) == len(sweep.step_sizes) == len(sweep.histories) == 3

    def interrupt(trial):
        if trial.step == 2:
            raise KeyboardInterrupt

    sweep = step_size_sweep(chosen, n=5, epochs=1, callback=interrupt)
    assert sweep.stopped == "interrupted"
    assert len(sweep.losses) == 2


@pytest.mark.parametrize("search", [random_search, random_local_search])
def test_no_finite_loss_is_an_error(search):
    X, y = problem()
    X[3, 2] = np.nan
    with pytest.raises(DivergenceError, match="none of 5 candidates has a finite loss"):
        search(fl.LinearObjective(fl.Softmax(), X, y), n=5)


def test_progress_bars(capsys):
    for run in (random_search, random_local_search, step_size_sweep):
        run(objective(), n=10, progress=True)
        assert "10/10" in capsys.readouterr().err


# --- checkpoints ----------------------------------------------------------------------------------------------------
RUNS = {
    "sgd": (sgd, {"epochs": 12, "batch_size": 32, "momentum": 0.9, "schedule": "cosine", "evaluate_every": 2}),
    "gradient_descent": (gradient_descent, {"steps": 12, "step_size": 0.01, "evaluate_every": 5}),
    "random_search": (random_search, {"n": 40, "scale": 0.5}),
    "random_local_search": (random_local_search, {"n": 40, "scale": 0.5, "step": 0.1}),
    "step_size_sweep": (step_size_sweep, {"n": 6, "epochs": 2}),
}


@pytest.fixture(params=RUNS)
def run(request, monkeypatch):
    monkeypatch.setattr(search_module, "STACK_VALUES", 32 * 3)
    return RUNS[request.param]


class Stop(Exception):
    """Ends a run in a way that it does not handle."""


@pytest.mark.parametrize("writes", [1, 3])
def test_resume_from_any_checkpoint_has_the_same_bits(run, writes, monkeypatch, tmp_path):
    function, options = run
    path, count = tmp_path / "run.npz", 0
    from fastloss.train import checkpoint

    write = checkpoint.Checkpoint.write

    def counted(self, *arguments):
        nonlocal count
        write(self, *arguments)
        count += 1
        if count == writes:
            raise Stop

    chosen = objective("softmax", penalty=fl.L2(0.01))
    whole = function(chosen, **options)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoint, "write", counted)
        with pytest.raises(Stop):
            function(chosen, **options, checkpoint=path, checkpoint_every=0)
    found = function(chosen, **options, checkpoint=path, checkpoint_every=0, resume=path)
    again = function(chosen, **options, resume=path)  # from the last checkpoint, after which there is little to do
    for result in (found, again):
        assert result.W.tobytes() == whole.W.tobytes()
        assert result.value == whole.value
        assert result.stopped == "done"
        if function is step_size_sweep:
            assert result.losses.tolist() == whole.losses.tolist()
            for one, other in zip(result.histories, whole.histories, strict=True):
                assert {k: v.tolist() for k, v in one.items()} == {k: v.tolist() for k, v in other.items()}
        else:
            assert {k: v.tobytes() for k, v in result.history.items()} == {
                k: v.tobytes() for k, v in whole.history.items()
            }
    assert [file.name for file in tmp_path.iterdir()] == ["run.npz"]


SCRIPT = """
import sys
import numpy as np, fastloss as fl
from pathlib import Path
from fastloss import train
kind, path, out = sys.argv[1:]
rng = np.random.default_rng(0)
y = rng.integers(4, size=3000)
X = (rng.normal(size=(4, 200))[y] + rng.normal(size=(3000, 200))).astype(np.float32)
objective = fl.LinearObjective(fl.Softmax(), X, y, penalty=fl.L2(0.001))
options = {"checkpoint": path, "checkpoint_every": 0, "resume": path if Path(path).exists() else None}
if kind == "sgd":
    result = train.sgd(objective, epochs=20, batch_size=8, momentum=0.9, schedule="cosine", seed=3, **options)
else:
    result = train.random_local_search(objective, n=60, seed=3, **options)
np.save(out, result.W)
"""


@pytest.mark.parametrize("kind", ["sgd", "local"])
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(kind, tmp_path):
    """kill -9 in the middle of work or of a write; then to the end."""
    command = [sys.executable, "-c", SCRIPT, kind]
    whole, found, path = tmp_path / "whole.npy", tmp_path / "found.npy", tmp_path / "run.npz"
    subprocess.run([*command, tmp_path / "other.npz", whole], check=True)
    killed = 0
    for delay in (0.013, 0.041) if kind == "sgd" else (0.027,):
        before = path.stat().st_mtime_ns if path.exists() else 0
        process = subprocess.Popen([*command, path, found])
        deadline = time.monotonic() + 60
        while not (path.exists() and path.stat().st_mtime_ns > before):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert killed
    subprocess.run([*command, path, found], check=True)
    assert found.read_bytes() == whole.read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"run.npz", "other.npz", "whole.npy", "found.npy"}


def test_resume_turns_away_what_is_another_run(tmp_path):
    path = tmp_path / "run.npz"
    X, y = problem()
    make = {"objective": objective("softmax"), "epochs": 3, "validation": (X[:9], y[:9])}
    sgd(**make, checkpoint=path)
    more = np.concatenate([X[1:], X[:1]])
    for changes, message in (
        ({"epochs": 4}, "epochs 3, but now it is 4"),
        ({"seed": 1}, "seed 0, but now it is 1"),
        ({"momentum": 0.5}, "momentum 0.0, but now it is 0.5"),
        ({"W": np.ones((4, 8))}, "with W array"),
        ({"validation": None}, "with validation"),
        ({"objective": objective("hinge")}, r"with loss Softmax\(.*, but now it is Hinge\("),
        ({"objective": objective("softmax", penalty=fl.L2(1.0))}, "with penalty None"),
        ({"objective": objective("softmax", backend="reference")}, "with backend"),
        ({"objective": fl.LinearObjective(fl.Softmax(), more, y)}, "with data with an objective of"),
        ({"objective": fl.LinearObjective(fl.Softmax(), X, np.roll(y, 1))}, "with data with an objective of"),
    ):
        with pytest.raises(DataError, match=message):
            sgd(**make | changes, resume=path)
    with pytest.raises(DataError, match="kind sgd, but now it is random_search"):
        random_search(objective("softmax"), resume=path)


def test_bad_checkpoints(tmp_path):
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "other.npz", format="another", run="{}", state="{}")
    np.savez(tmp_path / "broken.npz", format="fastloss.checkpoint 1", run="{", state="{}")
    for name, message in (
        ("none.npz", "none.npz is no file"),
        ("text.npz", "text.npz is no .npz file"),
        ("other.npz", "resume: .*other.npz has the format 'another'"),
        ("broken.npz", "broken.npz is no checkpoint"),
    ):
        with pytest.raises(DataError, match=message):
            sgd(objective(), resume=tmp_path / name)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        sgd(objective(), checkpoint=tmp_path / "no" / "run.npz")
    with pytest.raises(IsADirectoryError, match="is a folder; name a file"):
        sgd(objective(), checkpoint=tmp_path)
    with pytest.raises(TypeError, match="checkpoint is True; it must be the path"):
        sgd(objective(), checkpoint=True)
    with pytest.raises(ValueError, match="checkpoint_every is -1"):
        sgd(objective(), checkpoint=tmp_path / "run.npz", checkpoint_every=-1)


def test_checkpoints_have_an_interval(tmp_path):
    path = tmp_path / "run.npz"
    seen = []
    sgd(objective(), epochs=3, checkpoint=path, checkpoint_every=1e6, callback=lambda state: seen.append(path.exists()))
    assert seen == [False, False, False, True]  # the last epoch has one, before it is evaluated


# --- rows of an objective -------------------------------------------------------------------------------------------
def test_take():
    rng = np.random.default_rng(1)
    X, y = problem(dtype=np.float32)
    options = {"penalty": fl.L2(0.1), "shift": rng.normal(size=7), "scale": rng.uniform(1, 2, 7)}
    weight = rng.uniform(size=len(X))
    chosen = fl.LinearObjective(fl.Hinge(), X, y, sample_weight=weight, **options)
    rows, W = [5, 3, 3, 200], rng.normal(size=(4, 8))
    some = chosen.take(rows)
    assert some.dtype == np.float32
    assert some.value(W) == pytest.approx(chosen.value(W, rows), rel=1e-6)
    wide = chosen.take(dtype=np.float64)
    expected = fl.LinearObjective(fl.Hinge(), X.astype(float), y, sample_weight=weight, **options)
    assert wide.value(W) == expected.value(W)
    assert not np.shares_memory(chosen.take().X, X)
    with pytest.raises(IndexError, match=r"rows\[1\] is 203, but X has 203 rows"):
        chosen.take([0, 203])
    with pytest.raises(TypeError, match=r"dtype is .*; it must be float32 or float64"):
        chosen.take(dtype=np.int32)


# --- bad input ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("function", "options", "error", "message"),
    [
        (random_search, {"n": 0}, ValueError, "n is 0; it must be at least 1"),
        (random_search, {"n": 1.5}, TypeError, "n is 1.5"),
        (random_search, {"scale": 0}, ValueError, "scale is 0"),
        (random_search, {"scale": math.inf}, ValueError, "scale is inf"),
        (random_search, {"seed": -1}, ValueError, "seed is -1"),
        (random_search, {"callback": 3}, TypeError, "callback is 3"),
        (random_search, {"n_classes": 3}, ValueError, r"targets\[\d+\] is 3"),
        (random_local_search, {"step": -1}, ValueError, "step is -1"),
        (step_size_sweep, {"low": 0}, ValueError, "low is 0"),
        (step_size_sweep, {"low": 1, "high": 0.1}, ValueError, "high is 0.1; it must be .*at least 1"),
        (step_size_sweep, {"n": 0}, ValueError, "n is 0"),
        (step_size_sweep, {"run": "sgd"}, TypeError, "run is 'sgd'"),
        (step_size_sweep, {"step_size": 1}, TypeError, "step_size is no option of the trainings"),
        (step_size_sweep, {"epochs": -1}, ValueError, "epochs is -1"),
    ],
)
def test_bad_arguments(function, options, error, message):
    with pytest.raises(error, match=message):
        function(objective(), **options)
    with pytest.raises(TypeError, match="objective is Softmax"):
        function(fl.Softmax())
