"""The command for a machine with a GPU, without one: budget, record, table, exit status; timings and peers on PyTorch's
CPU; every check in numba-cuda's simulator, in a process of its own."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fastloss as fl
from fastloss import gpucheck
from fastloss.gpu import checks, device, sources, timings
from tests.conftest import one_core


class OnTensors:
    """A loss of CPU tensors, as those of a device are called: gradients into tensors."""

    def __init__(self, loss):
        self._loss = loss

    def value_and_grad(self, scores, targets, out=None):
        into = None if out is None else out.numpy()
        value, grad = self._loss.value_and_grad(scores.numpy(), targets.numpy(), out=into)
        return value, grad if out is None else out

    def value(self, scores, targets):
        return self._loss.value(scores.numpy(), targets.numpy())


@pytest.fixture
def cpu(monkeypatch):
    pytest.importorskip("torch")
    losses = {"softmax": OnTensors(fl.Softmax()), "hinge": OnTensors(fl.Hinge())}
    monkeypatch.setattr(timings, "LOSSES", losses)
    return sources.Torch("cpu")


def endless():
    return 1e9


def test_budget_gives_a_part_what_later_ones_do_not_need():
    clock = itertools.count().__next__
    budget = gpucheck.Budget(90, {"a": 1, "b": 2, "c": 6}, now=lambda: 0)
    assert [budget.left(name)() for name in "abc"] == [10, 30, 90]
    late = gpucheck.Budget(90, {"a": 1, "b": 2}, now=clock)
    left = late.left("a")
    assert left() > left()


def test_record_is_whole_at_any_time(tmp_path):
    path = tmp_path / "out.json"
    record = gpucheck.Record(path)
    record.put("device", "a card")
    assert json.loads(path.read_text()) == {"device": "a card"}
    record.add("list", {"name": "x"})
    record.add("list", {"name": "y"})
    assert [entry["name"] for entry in json.loads(path.read_text())["list"]] == ["x", "y"]
    assert os.listdir(tmp_path) == ["out.json"]


def test_correctness_counts_failures_and_what_is_left_out(monkeypatch, capsys):
    def fail():
        raise AssertionError("it is not so")

    left = iter([1, 1, 0, 0])
    listed = [checks.Check("good", lambda: None), checks.Check("bad", fail), checks.Check("late", fail)]
    monkeypatch.setattr(checks.Suite, "all", lambda self: iter(listed))
    record = gpucheck.Record(None)
    source = sources.Source()
    source.name = "some"
    gpucheck.correctness(record, source, checks.TINY, lambda: next(left))
    entry = record.facts["correctness, some"]
    assert (entry["passed"], list(entry["failed"]), entry["not run"]) == (1, ["bad"], ["late"])
    assert gpucheck.status(record.facts) == 1
    assert "FAILED bad: AssertionError: it is not so" in gpucheck.table(record.facts)
    assert "FAILED bad" in capsys.readouterr().err


@pytest.mark.parametrize("loss", ["softmax", "hinge"])
def test_scores_are_timed_beside_copies_and_peers(cpu, loss):
    clock = timings.Clock(cpu, timings.TINY)
    entry = timings.time_scores(clock, loss, 32, 16, "float32", timings.eager_peers(loss), endless)
    assert set(entry["times"]) == {"fastloss", "copy", "torch"}, entry
    assert all(t["device_us"] > 0 and t["host_us"] > 0 for t in entry["times"].values())
    assert entry["bytes"] == 2 * 32 * 16 * 4


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
def test_compiled_peers_do_the_same_job(cpu):
    pytest.importorskip("torch")
    clock = timings.Clock(cpu, timings.TINY)
    entry = timings.time_scores(clock, "softmax", 32, 16, "float32", timings.compiled_peers("softmax"), endless)
    assert "errors" not in entry
    assert {"torch.compile", "torch.compile by hand"} <= set(entry["times"])


def test_a_peer_that_does_another_job_or_fails_is_left_out(cpu):
    def fail(scores, targets):
        raise RuntimeError("no kernel for this\nmore")

    peers = {"wrong": lambda scores, targets: (scores.sum(), scores), "broken": fail}
    entry = timings.time_scores(timings.Clock(cpu, timings.TINY), "softmax", 32, 16, "float32", peers, endless)
    assert set(entry["times"]) == {"fastloss", "copy"}
    assert "its loss is" in entry["errors"]["wrong"]
    assert entry["errors"]["broken"] == "RuntimeError: no kernel for this"


def test_rows_are_cut_to_what_fits(cpu, monkeypatch):
    monkeypatch.setattr(cpu, "free_bytes", lambda: 4096)
    buffers = timings.Scores(cpu, timings.TINY, 1000, 16, "float32", 2.2)
    assert buffers.n == int(0.9 * 4096 / (2.2 * 16 * 4))
    assert len(buffers.sets) == 1


def test_buffers_exceed_the_cache_together(cpu):
    buffers = timings.Scores(cpu, timings.TINY, 16, 10, "float32", 2.2)
    assert sum(2 * s.numel() * 4 for s, _, _ in buffers.sets) >= timings.TINY.cache


def test_the_layer_beside_its_products(cpu, monkeypatch):
    real = fl.linear_value_and_grad
    plan = timings.TINY
    monkeypatch.setattr(timings.fl, "linear_value_and_grad", lambda loss, *a, **k: real(loss._loss, *a, **k))
    entry = timings.time_layer(timings.Clock(cpu, plan), "float32", timings.layer_peers(("torch",)), endless)
    assert {"fastloss", "products", "torch"} <= set(entry["times"]), entry
    assert entry["outputs_bytes"] == (16 + 40) * 8 * 4


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_few_classes(cpu, monkeypatch, dtype):
    real = fl.LinearObjective
    monkeypatch.setattr(timings.fl, "LinearObjective", lambda loss, *a, **k: real(loss._loss, *a, **k))
    entry = timings.time_images(timings.Clock(cpu, timings.TINY), dtype, endless)
    assert set(entry["times"]) == {"copy", "fastloss softmax", "fastloss hinge", "torch softmax"}, entry


def test_all_parts_make_one_table(cpu, monkeypatch):
    layer, objective = fl.linear_value_and_grad, fl.LinearObjective
    monkeypatch.setattr(timings.fl, "linear_value_and_grad", lambda loss, *a, **k: layer(loss._loss, *a, **k))
    monkeypatch.setattr(timings.fl, "LinearObjective", lambda loss, *a, **k: objective(loss._loss, *a, **k))
    monkeypatch.setattr(gpucheck.shutil, "which", lambda name: None)
    record = gpucheck.Record(None)
    parts = [part for part in gpucheck.PARTS if part not in ("correctness", "compiled")]
    record.put("packages", {"liger-kernel": "not installed"})
    gpucheck.run(record, [cpu], parts, checks.TINY, timings.TINY, gpucheck.Budget(600, gpucheck.PARTS))
    text = gpucheck.table(record.facts)
    assert gpucheck.status(record.facts) == 0, text
    for words in (
        "not installed: liger-kernel", "softmax 32 x 16 float32", "hinge 64 x 10 float32", "of copy", "torch ",
        "a call with 8 x 10 scores", "linear + softmax, 16 x 8 x 40 float32", "CIFAR-10's shape, uint8",
        "compute-sanitizer racecheck: it is not installed", "copy on the device",
    ):  # fmt: skip
        assert words in text, text


def test_parts_without_time_are_named(cpu):
    record = gpucheck.Record(None)
    gpucheck.run(record, [cpu], ["bandwidth", "scores"], checks.TINY, timings.TINY, gpucheck.Budget(0, gpucheck.PARTS))
    assert record.facts["scores, left out"] == "no time was left"
    assert gpucheck.status(record.facts) == 4
    assert "scores, left out: no time was left" in gpucheck.table(record.facts)


def test_checks_without_time_are_in_the_status():
    record = gpucheck.Record(None)
    nowhere = SimpleNamespace(name="numba", dtypes=("float32",), multiplies=False)
    gpucheck.correctness(record, nowhere, checks.TINY, lambda: 0)
    assert len(record.facts["correctness, numba"]["not run"]) > 50
    assert gpucheck.status(record.facts) == 4
    record.facts["correctness, numba"]["failed"]["softmax"] = "it is off"
    assert gpucheck.status(record.facts) == 1
    assert gpucheck.status({"compute-sanitizer": {"memcheck": {"status": 4, "errors": 0}}}) == 4
    assert gpucheck.status({"correctness, left out": gpucheck.NO_TIME}) == 4
    assert gpucheck.status({"correctness, failed": "RuntimeError: no"}) == 1


def test_what_the_sanitizer_says():
    clean = gpucheck.sanitizer_entry(0, "====\n========= ERROR SUMMARY: 0 errors\n")
    assert clean == {"status": 0, "errors": 0}
    bad = gpucheck.sanitizer_entry(9, "x\n========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n")
    assert (bad["status"], bad["errors"]) == (9, 3)
    assert gpucheck.status({"compute-sanitizer": {"racecheck": bad}}) == 1


@pytest.mark.skipif(device.why_not() is None, reason="there is a GPU here: the command runs")
def test_without_a_gpu_it_says_so(capsys):
    assert gpucheck.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_help_and_bad_arguments(capsys):
    with pytest.raises(SystemExit) as end:
        gpucheck.main(["--help"])
    assert end.value.code == 0
    assert "Exit status" in capsys.readouterr().out
    for arguments in (["--minutes", "0"], ["--parts", "nothing"]):
        with pytest.raises(SystemExit) as end:
            gpucheck.main(arguments)
        assert end.value.code == 2


def test_out_that_cannot_be_written(capsys, tmp_path, monkeypatch):
    """It is said before anything runs, a GPU or none."""
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(gpucheck.device, "why_not", lambda: pytest.fail("something ran"))
        for path, why in (
            (tmp_path / "missing" / "out.json", "there is no folder"), (tmp_path, "is a folder"),
            (tmp_path / "file" / "out.json", "there is no folder"),
        ):  # fmt: skip
            with pytest.raises(SystemExit) as end:
                gpucheck.main(["--out", str(path)])
            assert end.value.code == 2
            said = capsys.readouterr().err
            assert str(path) in said
            assert why in said
    monkeypatch.setattr(gpucheck.device, "why_not", lambda: "none here")
    assert gpucheck.main(["--out", str(tmp_path / "out.json")]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


#: The command for arrays of float32 alone.
OF_FLOAT32 = """
import sys
from fastloss import gpucheck
from fastloss.gpu import sources
found = sources.get("numba")
found.dtypes = ("float32",)
gpucheck.found_sources = lambda: ([found], {})
sys.exit(gpucheck.main(sys.argv[1:]))
"""


def simulate(start, tmp_path):
    """The command in numba-cuda's simulator, which is chosen as numba is imported."""
    root = str(Path(fl.__file__).parents[1])
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": root}
    out = tmp_path / "out.json"
    arguments = ["--tiny", "--out", str(out), "--parts", "correctness", "--minutes", "10"]
    command = [sys.executable, "-P", *start, *arguments]
    with one_core():
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    return run, json.loads(out.read_text()) if out.exists() else None


@pytest.mark.full
@pytest.mark.parametrize("start", [["-c", OF_FLOAT32], ["-m", "fastloss.gpucheck"]], ids=["float32", "all types"])
def test_every_check_in_the_simulator(start, tmp_path):
    pytest.importorskip("numba_cuda")
    run, facts = simulate(start, tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    entry = facts["correctness, numba"]
    assert entry["failed"] == {}
    assert entry["not run"] == []
    assert entry["passed"] > 50


def test_agreement_is_strict():
    with pytest.raises(AssertionError, match="the loss is"):
        checks.compare(1.0001, 1.0, "float32", "the loss")
    with pytest.raises(AssertionError, match="shape"):
        checks.compare(np.ones(2), np.ones(3), "float32", "it")
    with pytest.raises(AssertionError, match=r"nan at \[1\]"):
        checks.compare([0.0, np.nan], [0.0, 1.0], "float32", "it")
    checks.compare([np.inf, np.nan, -0.0], [np.inf, np.nan, 0.0], "float32", "it")
    with pytest.raises(AssertionError, match="off by"):
        checks.close(np.ones(3), np.full(3, 1.1), 1e-3, "W")
