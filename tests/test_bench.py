"""`fastloss bench`: its options, its processes, and what it reports. No test depends on a timing."""

import argparse
import json

import numpy as np
import pytest

from fastloss import bench
from fastloss.bench import cases, controls, peers, runner, worker
from fastloss.bench.cases import Case


def _arguments(*words):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(words)


# --- cases ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "case", {*cases.FULL, *cases.QUICK, Case("hinge", 3, 2, 5, "float64")}, ids=lambda case: case.name
)
def test_a_case_is_known_by_its_name(case):
    assert Case.parse(case.name) == case


@pytest.mark.parametrize(
    "text",
    ["softmax", "softmax-10", "softmax-3x4x5", "linear-softmax-3x4", "squared-3x4", "hinge-3x0", "hinge-3x4-int8"],
)
def test_other_names_are_refused(text):
    with pytest.raises(ValueError, match=f"case is '{text}'; it must be named as softmax-128x10"):
        Case.parse(text)


def test_inputs():
    scores, targets = Case("softmax", 50, 7, None, "float64").inputs()
    assert scores.shape == (50, 7)
    assert scores.dtype == np.float64
    assert scores.nbytes == Case("softmax", 50, 7, None, "float64").n_bytes
    assert set(targets) == set(range(7))
    X, W, b, targets = (case := Case("hinge", 50, 7, 30)).inputs()
    assert (X.shape, W.shape, b.shape, targets.shape) == ((50, 30), (7, 30), (7,), (50,))
    assert {array.dtype for array in (X, W, b)} == {np.dtype(np.float32)}
    assert X.nbytes == case.n_bytes


# --- options -------------------------------------------------------------------------------------------------------
def test_cases_by_name_and_by_pattern():
    groups = _arguments("--cases", "hinge-*", "softmax-3x4").cases
    assert {case.loss for case in groups[0]} == {"hinge"}
    assert len(groups[0]) == 6
    assert groups[1] == (Case("softmax", 3, 4),)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cases", "softmax"], "case is 'softmax'; it must be named as"),
        (["--cases", "max*"], "'max*' matches none of softmax-128x10, "),
        (["--peers", "tensorflow"], "invalid choice: 'tensorflow'"),
        (["--rounds", "0"], "'0'; it must be a whole number, at least 1"),
        (["--threads", "two"], "'two'; it must be a whole number, at least 1"),
        (["--json", "no/such/folder/x.json"], "it must be a file in a folder that exists"),
    ],
)
def test_bad_options_are_refused_at_once(words, message, capsys):
    with pytest.raises(SystemExit):
        _arguments(*words)
    assert message in capsys.readouterr().err


# --- a whole run ---------------------------------------------------------------------------------------------------
def test_a_run_prints_a_table_and_writes_json(tmp_path, capsys):
    path = tmp_path / "bench.json"
    names = ["softmax-128x10", "hinge-40x9-float64", "linear-softmax-60x20x5"]
    chosen = ["fastloss-reference", "numpy", "scipy"]
    code = bench.main(
        _arguments("--cases", *names, "--peers", *chosen, "--rounds", "2", "--threads", "1", "--json", str(path))
    )
    printed = capsys.readouterr().out
    assert code == 0, printed
    found = json.loads(path.read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["bench.json"]

    assert found["settings"]["threads"] == 1
    assert {"processor", "cpus_usable", "load_average_before", "date", "python"} <= set(found["machine"])
    assert found["machine"]["packages"]["numpy"] == np.__version__
    assert [result["case"] for result in found["cases"]] == names
    for result in found["cases"]:
        expected = ["memory", *(name for name in chosen if name not in result["lacks"])]
        assert [row["peer"] for row in result["rows"]] == expected
        assert result["base"] == "fastloss-reference"
        by_name = {row["peer"]: row for row in result["rows"]}
        assert by_name["memory"]["ratio_to_memory"] == 1
        for name, row in by_name.items():
            assert row["problems"] == []
            assert set(row["variants_ms"]) == set(peers.table()[name].variants[Case.parse(result["case"]).kind])
            assert len(row["variants_ms"][row["variant"]]) == 2
            assert row["ms"] == pytest.approx(np.median(row["variants_ms"][row["variant"]]))
            assert row["ratio_to_base"] == pytest.approx(row["ms"] / by_name["fastloss-reference"]["ms"])
            assert row["ratio_to_memory"] == pytest.approx(row["ms"] / by_name["memory"]["ms"])
    assert found["cases"][1]["lacks"] == {"scipy": "SciPy has no multiclass hinge"}
    assert "scipy                 not here: SciPy has no multiclass hinge" in printed
    assert printed.count("/ fastloss-reference") == 3
    assert printed.count("/ read") == 1


def test_absent_peers_are_reported_with_the_reason(monkeypatch, capsys):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert runner.main([], ["torch", "torch-compile", "jax"], runner.Settings(1, 1, 0.01), None) == 0
    printed = capsys.readouterr().out
    assert "absent: torch: torch is not installed (pip install torch)" in printed
    assert "absent: torch-compile: torch is not installed (pip install torch)" in printed
    assert "absent: jax: jax is not installed (pip install jax)" in printed


# --- processes -----------------------------------------------------------------------------------------------------
def test_a_process_that_ends_is_reported_and_replaced():
    case, numpy = Case("softmax", 20, 3), peers.table()["numpy"]
    with runner.Workers(1) as workers:
        first = workers["numpy"]
        assert set(first.ask("prepare", name=case.name)) == {"in place", "blocks in threads"}
        assert workers["numpy"] is first
        first.process.kill()
        first.process.wait()
        with pytest.raises(runner.WorkerError, match="its process ended with status -9"):
            first.ask("prepare", name=case.name)
        result = runner.time_case(case, [numpy], workers, runner.Settings(1, 1, 0.01))
        assert workers["numpy"] is not first
    assert result["rows"][0]["problems"] == []


def test_what_a_failing_process_said_is_reported():
    message = "status 1: KeyError: 'no such peer'"
    with runner.Workers(1) as workers, pytest.raises(runner.WorkerError, match=message):
        workers["no such peer"].ask("prepare", name="softmax-3x4")


def test_a_process_takes_no_more_cpus_than_threads():
    cpus = worker.choose_cpus(1)
    assert len(cpus) == 1
    assert worker.choose_cpus(10**6) != []


class _Clock:
    """Time passes in sleep; the process uses its CPUs until `busy_until`."""

    def __init__(self, busy_until):
        self.now, self.busy_until = 0.0, busy_until

    def sleep(self, seconds):
        self.now += seconds

    def monotonic(self):
        return self.now

    def process_time(self):
        return 2 * min(self.now, self.busy_until)


def test_settle_waits_until_the_process_is_quiet(monkeypatch):
    monkeypatch.setattr(worker, "time", clock := _Clock(busy_until=0.5))
    assert worker.settle()
    assert 0.5 <= clock.now < 0.53
    monkeypatch.setattr(worker, "time", clock := _Clock(busy_until=100))
    assert not worker.settle()
    assert clock.now < 2.1


def test_a_variant_that_fails_does_not_take_the_others_along():
    def broken(inputs, threads):
        raise OSError("no compiler")

    good = peers.table()["numpy"].variants["softmax"]["in place"]
    peer = peers.Peer("mixed", "numpy", {"softmax": {"broken": broken, "good": good}})
    answers = worker.Session(peer, 1).prepare("softmax-20x3")
    assert answers["broken"] == "OSError: no compiler"
    loss, norm = answers["good"]
    assert loss > 0
    assert norm > 0


def test_times_are_for_one_job(monkeypatch):
    clock = _Clock(busy_until=0)
    clock.perf_counter = clock.monotonic
    monkeypatch.setattr(worker, "time", clock)
    for seconds, repeats in ((0.001, 1), (1e-6, 1), (0.03, 1000), (3.0, 1)):
        work = peers.Work(lambda: clock.sleep(seconds), None, repeats)  # noqa: B023
        assert worker.measure(work, 0.1) == pytest.approx(seconds / repeats)


# --- judging -------------------------------------------------------------------------------------------------------
class _Worker:
    """Replies as a worker whose variants take the times given."""

    def __init__(self, **times):
        self.times = times

    def ask(self, do, **arguments):
        if do == "prepare":
            return {name: [1.0, 2.0] for name in self.times}
        return {name: self.times[name] for name in arguments["variants"]}


def test_the_best_variant_counts_and_a_hopeless_one_is_timed_once():
    entry = runner.Entry(peers.table()["numpy"])
    fake = _Worker(slow=1.6, close=1.1, best=1.0)
    entry.prepare(fake, Case("softmax", 3, 4))
    for _ in range(3):
        entry.take_turn(fake, 0.01)
    assert {name: len(times) for name, times in entry.rounds.items()} == {"slow": 1, "close": 3, "best": 3}
    row = entry.row()
    assert (row["variant"], row["ms"], row["spread"]) == ("best", 1000.0, 0.0)


def test_an_answer_unlike_the_others_is_a_problem():
    answers = [[1.0, 2.0], [1.0001, 2.0], [1.0, 2.1], [1.0, 2.0], [np.nan, 2.0], []]  # none: a control
    entries = [runner.Entry(peers.table()["numpy"], answers={"a": answer}) for answer in answers]
    runner._check_answers(entries)
    assert [bool(entry.problems) for entry in entries] == [False, False, True, False, True, False]
    assert entries[2].problems == ["a: loss and norms of gradients are [1.0, 2.1], not [1.0, 2.0]"]


def test_a_case_that_does_not_fit_into_memory_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(runner, "_available_bytes", lambda: 10**9)
    case = Case("softmax", 10**6, 100)
    result = runner.time_case(case, [peers.table()["numpy"]], None, runner.Settings(1, 1, 0.01))
    assert result["rows"] == []
    assert result["left_out"] == "1 processes need about 6.0 GB for it, and 1.0 GB are available; --peers takes fewer"
    assert "left out: 1 processes need" in runner.format_case(result)


# --- controls ------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(bool(peers._backend_missing("cython")), reason="the controls are compiled with the kernels")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("threads", [1, 3])
def test_controls_do_what_they_say(dtype, threads):
    module = controls.kernels(dtype)
    lanes = module.VECTOR_BYTES // np.dtype(dtype).itemsize
    whole = 1000 // lanes // threads * lanes * threads  # whole vectors of each thread's part
    for kind in module.CONTROLS:
        source, target = controls.ones(1000 * np.dtype(dtype).itemsize, dtype), controls.ones(8000, dtype)[:1000]
        source[:], target[:] = np.arange(1000) + 3, 7
        done = module.control(kind, source, target, 2, threads)
        assert done == 2 * (whole if kind != "multiply-add" else threads * lanes * 12 * 4096)
        expected = np.full(1000, 7.0)
        if kind in ("copy", "stream"):
            expected[:whole] = source[:whole]
        elif kind == "pass":
            expected[:whole] *= 3 * 3
        np.testing.assert_array_equal(target, expected)
        np.testing.assert_array_equal(source, np.arange(1000) + 3)


@pytest.mark.skipif(bool(peers._backend_missing("cython")), reason="the controls are compiled with the kernels")
def test_controls_refuse_what_they_cannot_do():
    control, array = controls.kernels().control, controls.ones(4096)
    for source, target in ((array, array[:-16]), (array[1:], array[1:]), (array[:1], array[:1])):
        with pytest.raises(ValueError, match="source and target must be of equal length, at least 2, and begin at a"):
            control("copy", source, target, 1, 1)
    with pytest.raises(ValueError, match="n_threads is 0; it must be from 1 to 64"):
        control("copy", array, array, 1, 0)
