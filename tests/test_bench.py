"""`fastloss bench`: its options, its processes, and what it reports. No test depends on a timing."""

import argparse
import html.parser
import json
import re
import sys

import numpy as np
import pytest

from fastloss import bench, cli, plot
from fastloss.bench import cases, controls, estimators, fits, peers, report, runner, suite, worker
from fastloss.bench.cases import Case
from fastloss.bench.suite import Bar, Item
from fastloss.bench.work import Peer, Work


def _arguments(*words):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(words)


# --- cases ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "case",
    dict.fromkeys([
        *cases.FULL, *cases.QUICK, Case("hinge-mean", 3, 2, None, "float64"),
        *(item.case for item in suite.cpu() if not item.is_of_sweep),
    ]),
    ids=lambda case: case.name,
)  # fmt: skip
def test_a_case_is_known_by_its_name(case):
    assert Case.parse(case.name) == case


@pytest.mark.parametrize(
    "text",
    [
        "softmax", "softmax-10", "softmax-3x4x5", "linear-softmax-3x4", "squared-3x4", "hinge-3x0", "hinge-3x4-int8",
        "hinge-3x4-uint8", "transform-hinge-3x4", "layer-softmax-3x4",
    ],
)  # fmt: skip
def test_other_names_are_refused(text):
    with pytest.raises(ValueError, match=f"case is '{text}'; it must be named as softmax-128x10"):
        Case.parse(text)


@pytest.mark.parametrize("dtype", cases.SCORE_TYPES)
def test_inputs_that_are_scores(dtype):
    case = Case("softmax", 50, 7, None, dtype)
    scores, targets, *others = case.inputs()
    assert scores.shape == (50, 7)
    assert scores.dtype == cases.dtype_of(dtype)
    assert scores.nbytes == case.n_bytes
    assert set(targets) == set(range(7))
    assert others == [None, None, None]


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_inputs_that_are_features(dtype):
    case = Case("linear-hinge-rows", 50, 7, 30, dtype)
    X, targets, W, b, rows = case.inputs()
    assert (X.shape, W.shape, b.shape, targets.shape) == ((50, 30), (7, 30), (7,), (50,))
    assert X.dtype == cases.dtype_of(dtype)
    assert {W.dtype, b.dtype} == {np.dtype("float64" if dtype == "float64" else "float32")}
    assert X.nbytes == case.n_bytes
    assert sorted(rows) == list(range(50))


@pytest.mark.parametrize("kind", cases.KINDS)
def test_shapes_are_those_of_the_inputs(kind):
    case = Case(kind, 9, 5, 4 if cases.KINDS[kind].has_features else None)
    for shape, array in zip(case.shapes(), case.inputs(), strict=True):
        assert (shape is None) == (array is None)
        if array is not None:
            assert (shape.shape, shape.dtype, shape.nbytes) == (array.shape, array.dtype, array.nbytes)


def test_what_must_be_moved_and_done():
    scores = 4 * 100 * 10
    for kind, moved, exponentials in (
        ("softmax", 2 * scores + 800, 1000), ("hinge-in-place", 2 * scores + 800, 0),
        ("softmax-value", scores + 800, 1000), ("transform-softmax", 2 * scores, 1000),
        ("transform-logsumexp", scores, 1000),
    ):  # fmt: skip
        case = Case(kind, 100, 10)
        assert (case.moved_bytes, case.exponentials) == (moved, exponentials)
    X, W = 100 * 20, 4 * 10 * 20
    for kind, dtype, moved, products in (
        ("linear-softmax", "uint8", X + 2 * W, 2), ("linear-softmax-value", "float16", 2 * X + W, 1),
        ("layer-softmax", "float32", 8 * X + 2 * W, 3), ("layer-softmax-weights", "float32", 4 * X + 2 * W, 2),
    ):  # fmt: skip
        case = Case(kind, 100, 10, 20, dtype)
        assert (case.moved_bytes, case.multiply_adds) == (moved + 800, products * 100 * 10 * 20)


@pytest.mark.parametrize(
    ("name", "floor"),
    [
        ("softmax-10x100", (("copy",),)),
        ("softmax-10x64", (("copy", "targets"), ("exponentials",))),
        ("hinge-10x64", (("copy", "targets"),)),
        ("hinge-in-place-10x100", (("pass",),)),
        ("softmax-value-10x100-float16", (("read",),)),
        ("transform-logsumexp-10x10", (("read",), ("exponentials",))),
        ("transform-softmax-10x10", (("copy",), ("exponentials",))),
        ("linear-softmax-value-10x9x64-uint8", (("read",), ("multiply-add",))),
        ("linear-softmax-10x9x65", (("products",),)),
        ("layer-softmax-10x9x5", (("products",),)),
    ],
)
def test_floors(name, floor):
    assert Case.parse(name).floor == floor


# --- options -------------------------------------------------------------------------------------------------------
def test_cases_by_name_and_by_pattern():
    found = bench._matching(_arguments("--cases", "hinge-*", "softmax-3x4").cases, cases.FULL)
    assert [case.kind for case in found] == ["hinge"] * 6 + ["softmax"]
    assert found[-1] == Case("softmax", 3, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cases", "max*"], "--cases 'max*' matches none of softmax-128x10, "),
        (["--out", "."], "--out has no meaning without --suite"),
        (["--suite", "cpu", "--json", "x.json"], "--json has no meaning with --suite"),
        (["--suite", "cpu", "--cases", "softmax-7x7"], "--cases softmax-7x7: the suite has no such case"),
        (["--suite", "estimators", "--cases", "softmax-7x7"], "'softmax-7x7' matches none of accelerate-cifar10, "),
        (["--suite", "estimators", "--peers", "numpy"], "--peers has no meaning with --suite estimators"),
        (["--cases", "l1-20news"], "case is 'l1-20news'; it must be named as"),
    ],
)
def test_options_that_do_not_go_together(words, message, capsys):
    assert cli.main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cases", "softmax"], "case is 'softmax'; it must be named as"),
        (["--peers", "tensorflow"], "invalid choice: 'tensorflow'"),
        (["--rounds", "0"], "'0'; it must be a whole number, at least 1"),
        (["--threads", "two"], "'two'; it must be a whole number, at least 1"),
        (["--json", "no/such/folder/x.json"], "it must be a file in a folder that exists"),
        (["--out", __file__], "it must be a folder that can be made or written to"),
        (["--suite", "gpu"], "invalid choice: 'gpu'"),
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
        case = Case.parse(result["case"])
        assert [row["peer"] for row in result["rows"]] == [name for name in chosen if name not in result["lacks"]]
        compiled = controls.table()[0].why_not() is None
        assert [row["peer"] for row in result["controls"]] == list(case.controls if compiled else ())
        assert (result["floor"] is not None) == compiled
        assert not compiled or set(result["floor"]["by"].split(" + ")) <= set(case.controls)
        assert result["base"] == "fastloss-reference"
        by_name = {row["peer"]: row for row in result["rows"]}
        for name, row in by_name.items():
            assert row["problems"] == []
            assert set(row["variants_ms"]) == set(peers.table()[name].variants[case.kind])
            assert len(row["variants_ms"][row["variant"]]) == 2
            assert row["ms"] == pytest.approx(np.median(row["variants_ms"][row["variant"]]))
            assert row["ratio_to_base"] == pytest.approx(row["ms"] / by_name["fastloss-reference"]["ms"])
            if compiled:
                assert row["ratio_to_floor"] == pytest.approx(row["ms"] / result["floor"]["ms"])
    assert found["cases"][1]["lacks"] == {"scipy": "SciPy has no multiclass hinge"}
    assert "scipy                 not here: SciPy has no multiclass hinge" in printed
    assert printed.count("/ fastloss-reference") == 3


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
        assert set(first.ask("prepare", name=case.name)["answers"]) == {"in place", "blocks in threads"}
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
    peer = Peer("mixed", "numpy", {"softmax": {"broken": broken, "good": good}})
    answers = worker.Session(peer, 1).prepare("softmax-20x3")["answers"]
    assert answers["broken"] == "OSError: no compiler"
    loss, norm = answers["good"]
    assert loss > 0
    assert norm > 0


def test_times_are_for_one_job(monkeypatch):
    clock = _Clock(busy_until=0)
    clock.perf_counter = clock.monotonic
    monkeypatch.setattr(worker, "time", clock)
    for seconds, repeats in ((0.001, 1), (1e-6, 1), (0.03, 1000), (3.0, 1)):
        work = Work(lambda: clock.sleep(seconds), None, repeats)  # noqa: B023
        assert worker.measure(work, 0.1) == pytest.approx(seconds / repeats)


# --- judging -------------------------------------------------------------------------------------------------------
class _Worker:
    """Replies as a worker whose variants take the times given."""

    def __init__(self, **times):
        self.times = times

    def ask(self, do, **arguments):
        if do == "prepare":
            return {"answers": {name: [1.0, 2.0] for name in self.times}, "memory": dict.fromkeys(self.times, 5)}
        return {name: self.times[name] for name in arguments["variants"]}


def test_the_best_variant_counts_and_a_hopeless_one_is_timed_once():
    entry = runner.Entry(peers.table()["numpy"])
    fake = _Worker(slow=1.6, close=1.1, best=1.0)
    entry.prepare(fake, Case("softmax", 3, 4))
    for _ in range(3):
        entry.take_turn(fake, 0.01)
    assert {name: len(times) for name, times in entry.rounds.items()} == {"slow": 1, "close": 3, "best": 3}
    row = entry.row()
    assert (row["variant"], row["ms"], row["spread"], row["memory"]) == ("best", 1000.0, 0.0, 5)


def test_an_answer_unlike_the_others_is_a_problem():
    answers = [[1.0, 2.0], [1.0001, 2.0], [1.0, 2.1], [1.0, 2.0], [np.nan, 2.0], []]  # none: a control
    entries = [runner.Entry(peers.table()["numpy"], answers={"a": answer}) for answer in answers]
    runner._check_answers(entries, Case("softmax", 3, 4))
    assert [bool(entry.problems) for entry in entries] == [False, False, True, False, True, False]
    assert entries[2].problems == ["a: loss and norms of gradients are [1.0, 2.1], not [1.0, 2.0]"]


def test_answers_of_16_bits_may_differ_more():
    for dtype, problems in (("float32", 1), ("bfloat16", 0)):
        entries = [runner.Entry(peers.table()["numpy"], answers={"a": [answer]}) for answer in (1.0, 1.0, 1.01)]
        runner._check_answers(entries, Case("softmax", 3, 4, None, dtype))
        assert len(entries[2].problems) == problems


def test_a_job_in_place_has_fresh_inputs_for_each_variant():
    answers = worker.Session(peers.table()["numpy"], 1).prepare("hinge-in-place-20x3")["answers"]
    first, second = answers.values()
    assert first == pytest.approx(second)


def test_memory_beyond_inputs_and_results():
    """The 96 MB that are needed for a while count, the 48 MB of the result do not. (Smaller ones may lie in memory that
    the process still holds from before.)"""
    if worker.memory_mark() is None:
        pytest.skip("this system does not tell a process its peak of memory")
    case = Case("transform-softmax", 12000, 1000)

    def build(inputs, threads):
        return Work(lambda: np.ones((2, *inputs.X.shape), np.float32).sum(axis=0), None)

    peer = Peer("greedy", "numpy", {case.kind: {"a": build}})
    assert worker.Session(peer, 1).prepare(case.name)["memory"]["a"] == pytest.approx(96e6, rel=0.2)


def test_a_case_that_does_not_fit_into_memory_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(runner, "_available_bytes", lambda: 10**9)
    case = Case("softmax", 10**6, 100)
    result = runner.time_case(case, [peers.table()["numpy"]], None, runner.Settings(1, 1, 0.01))
    assert result["rows"] == []
    assert result["left_out"] == "1 processes need about 6.0 GB for it, and 1.0 GB are available; --peers takes fewer"
    assert "left out: 1 processes need" in runner.format_case(result)


# --- the suite -----------------------------------------------------------------------------------------------------
def _result(ms, controls=(), rows=(), moved=1000, **other):
    """What `runner.time_case` gives, fastloss taking `ms`."""
    rows = {suite.OURS: ms, **dict(rows)}
    floor = {"ms": controls[0][1], "by": controls[0][0]} if controls else None
    return {
        "case": "softmax-65536x10", "dtype": "float32", "classes": 10, "bytes": 400, "moved": moved,
        "multiply_adds": 50, "exponentials": 50, "lacks": {}, "left_out": None, "floor": floor, "base": suite.OURS,
        "controls": [{"peer": name, "ms": time, "problems": []} for name, time in controls],
        "rows": [
            {"peer": name, "ms": time, "problems": [], "memory": 70e6, "ratio_to_base": time / ms,
             "ratio_to_floor": floor and time / floor["ms"]}
            for name, time in rows.items()
        ],
    } | other  # fmt: skip


@pytest.mark.parametrize(
    ("bar", "figure", "met"),
    [
        (Bar("floor", 2.0), 2.0, True),
        (Bar("floor", 1.9), 2.0, False),
        (Bar("best", 3.0), 3.0, True),
        (Bar("best", 3.1), 3.0, False),
        (Bar("scipy", 5.0), 5.0, True),
        (Bar("µs", 3999.0), 4000.0, False),
        (Bar("MB", 64), 70.0, False),
        (Bar("control as float32", 1.0), 0.8, True),
        (Bar("jax", 1.0), None, None),
        (Bar("neighbours", 0.7), None, None),
    ],
)
def test_bars(bar, figure, met):
    result = _result(4.0, [("copy", 2.0), ("as float32", 5.0)], {"numpy": 12.0, "scipy": 20.0})
    assert bar.figure(result) == figure
    assert bar.met(figure) is met


def _measured(results, *bars):
    """The entry of an item whose measurements give these results, and the peers asked each time."""
    item = Item("Loss", Case("softmax", 65536, 10), ("numpy", "torch"), bars)
    run = suite.Run([item], [peers.table()[name] for name in item.peers], None, None)
    asked = []

    def measure(item, names):
        asked.append(list(names))
        return results[len(asked) - 1]

    run.measure = measure
    ((entry,),) = run.sections()
    return entry, asked


def test_a_miss_is_measured_again_before_it_counts(capsys):
    first = _result(4.0, [("copy", 2.0)], {"numpy": 12.0, "torch": 9.0})
    second = _result(4.0, [("copy", 2.2)], {"torch": 8.0})
    entry, asked = _measured([first, second], Bar("floor", 1.6), Bar("best", 2.5), Bar("µs", 5000))
    assert asked == [["numpy", "torch"], ["torch"]]  # again with those alone that the missed bars take
    assert [check["figures"] for check in entry["checks"]] == [[2.0, 4 / 2.2], [2.25, 2.0], [4000.0]]
    assert [check["met"] for check in entry["checks"]] == [False, False, True]
    assert entry["again"] == [second]
    assert "best 2.25, again 2 (at least 2.5): missed" in capsys.readouterr().out


@pytest.mark.parametrize(("third", "met"), [(3.0, True), (4.0, False)])
def test_where_two_measurements_do_not_agree_a_third_decides(third, met, capsys):
    results = [_result(ms, [("copy", 2.0)]) for ms in (4.0, 3.0, third)]
    entry, asked = _measured(results, Bar("floor", 1.6), Bar("µs", 100))
    assert asked == [["numpy", "torch"], [], []]
    assert [check["met"] for check in entry["checks"]] == [met, False]
    verdict = f"floor 2, again 1.5, again {third / 2:.3g} (at most 1.6): {'met' if met else 'missed'}"
    assert verdict in capsys.readouterr().out


def test_a_measurement_that_fails_takes_nothing_back():
    entry, _ = _measured([_result(4.0, [("copy", 2.0)]), _result(4.0)], Bar("floor", 1.6))
    assert (entry["checks"][0]["figures"], entry["checks"][0]["met"]) == ([2.0], False)


def test_what_is_met_is_not_measured_again():
    entry, asked = _measured([_result(4.0, [("copy", 2.0)])], Bar("floor", 2.0))
    assert len(asked) == 1
    assert entry["again"] == []


def test_a_point_of_the_sweep_that_falls_off_is_marked():
    times = {2: [1.0], 3: [2.0, 1.2], 4: [1.0], 5: [1.0, 1.1], 6: [2.0, 2.1]}
    items = [Item("Sweep", Case("softmax", 10, c), (), (Bar("neighbours", 0.7),)) for c in times]
    assert items[0].controls == ("copy",)
    run = suite.Run(items, [], None, None)
    run.measure = lambda item, names: _result(
        times[item.case.c].pop(0) if len(times[item.case.c]) > 1 else times[item.case.c][0], [("copy", 1.0)]
    )
    (entries,) = run.sections()
    assert [entry["checks"][0]["met"] for entry in entries] == [True, True, True, True, False]
    assert entries[1]["checks"][0]["figures"] == [pytest.approx(0.5), pytest.approx(1 / 1.2)]
    assert entries[4]["checks"][0]["figures"] == [pytest.approx(0.5), pytest.approx(1.1 / 2.1)]


def test_every_item_of_the_suite_can_be_measured():
    table = peers.table()
    items = suite.cpu()
    assert len({(item.section, item.case) for item in items}) == len(items)
    for item in items:
        for name in item.controls:
            assert table[name].lack(item.case) is None
        assert table[suite.OURS].lack(item.case) is None
        assert item.is_of_sweep or any(bar.kind in ("floor", "µs") for bar in item.bars)
    assert {item.case.c % 2 for item in items if item.is_of_sweep} == {0, 1}


class _Page(html.parser.HTMLParser):
    """Checks that tags are closed in order, and keeps what matters."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.outside, self.rows = [], [], [], 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.outside += [given[key] for key in ("src", "href") if key in given and not given[key].startswith("data:")]
        self.images += [given["src"]] if tag == "img" else []
        self.rows += tag == "tr"
        assert tag != "script"
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.skipif(bool(peers._backend_missing("cython")), reason="the suite measures the compiled kernels")
def test_the_whole_suite_at_tiny_shapes(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert (
        cli.main(["bench", "--suite", "cpu", "--quick", "--peers", "numpy", "--threads", "2", "--out", str(out)]) == 0
    )
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["classes.png", "report.html", "results.json", "roofline.png"]
    found = json.loads((out / "results.json").read_text())
    sections = {item.section for item in suite.cpu()}
    assert {entry["section"] for entry in found["cases"]} == sections
    assert {"processor", "date", "packages"} <= set(found["machine"])
    for entry in found["cases"]:
        assert f"  {entry['case']} " in printed
        assert entry["checks"]
        for row in (*entry["controls"], *entry["rows"]):
            assert row["ms"] > 0
            assert row["problems"] == []
    for name in ("classes.png", "roofline.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    page = _Page((out / "report.html").read_text(encoding="utf-8"))
    assert len(page.images) == 2
    assert page.outside == []  # self-contained
    assert page.rows == len(sections) + len(found["cases"])
    assert re.search(r"\d+ of \d+ bars met", printed)


def test_first_cases_are_drawn_beside_their_peers():
    def entry(case, **times):
        return {"case": case, "rows": [{"peer": name.replace("_", "-"), "ms": ms} for name, ms in times.items()]}

    alone = entry("softmax-65536x100", fastloss_cython=1.0)
    other = entry("hinge-65536x10", fastloss_cython=1.0, jax=2.0)
    both = entry("softmax-65536x10", jax=3.0, fastloss_cython=0.5, scikit_learn=20.0)
    assert report.peers([alone, other]) is None
    (panel,) = report.peers([alone, both, other]).axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["fastloss", "jax", "scikit-learn"]
    assert [bar.get_width() for bar in panel.patches] == [0.5, 3.0, 20.0]
    with pytest.raises(ValueError, match="at least one"):
        plot.times({"softmax": {}})


def test_a_page_without_pictures_and_with_failures(tmp_path):
    """Without the compiled controls there are no ceilings to draw."""
    bad = _result(4.0, section="Loss", checks=[], again=[], best=None)
    bad["rows"][0]["problems"] = ["a <b>: failed"]
    left = _result(4.0, section="Loss", checks=[], again=[], best=None, left_out="too large")
    content = {
        "suite": "cpu", "quick": False, "machine": runner.machine(), "absent": {"jax": "jax is not installed"},
        "settings": {"rounds": 5, "threads": 2}, "cases": [bad, left],
    }  # fmt: skip
    report.write(content, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "a &lt;b&gt;: failed" in text
    assert "jax is not installed" in text
    assert "left out: too large" in text
    assert _Page(text).images == []


def test_a_report_needs_jinja2(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert cli.main(["bench", "--suite", "cpu", "--quick"]) == 2
    assert 'a report needs Jinja2: pip install "fastloss[bench]"' in capsys.readouterr().err


# --- controls ------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(bool(peers._backend_missing("cython")), reason="the controls are compiled with the kernels")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("threads", [1, 3])
def test_controls_do_what_they_say(dtype, threads):
    module = controls.kernels(dtype)
    lanes = module.VECTOR_BYTES // np.dtype(dtype).itemsize
    vectors = 1000 // lanes // threads * lanes * threads  # whole ones of each thread's part
    tiles = 125 // 16 // threads * 16 * threads * 8  # of rows of 8
    for kind in module.CONTROLS:
        source, target = controls.ones(1000 * np.dtype(dtype).itemsize, dtype), controls.ones(8000, dtype)[:1000]
        source[:], target[:] = np.arange(1000) + 3, 7
        shape, whole = ((125, 8), tiles) if kind == "transpose" else (1000, vectors)
        done = module.control(kind, source.reshape(shape), target.reshape(shape), 2, threads)
        assert done == 2 * (whole if kind != "multiply-add" else threads * lanes * 12 * 4096)
        expected = np.full(1000, 7.0)
        if kind in ("copy", "stream", "transpose"):
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


def test_options_without_meaning_for_the_accuracy_suite_are_refused(capsys):
    for options in (["--quick"], ["--peers", "numpy"], ["--rounds", "2"], ["--cases", "softmax-3x4"], ["--out", "x"]):
        assert cli.main(["bench", "--suite", "accuracy", *options]) == 2
        assert f"{options[0]} has no meaning with --suite accuracy" in capsys.readouterr().err


# --- models that reach a goal --------------------------------------------------------------------------------------
class _Fits:
    """Workers whose fits take and reach what a table says: peer -> setting -> (seconds, reached)."""

    def __init__(self, table):
        self.table, self.asked = table, []

    def __getitem__(self, peer):
        self.peer = peer
        return self

    def ask(self, do, contest, setting, quick):
        self.asked.append((self.peer, setting))
        found = self.table[self.peer][setting]
        return found if isinstance(found, dict) else dict(zip(("seconds", "reached"), found, strict=True))


def _contest(gap=0.1, best=("other", 3, 3)):
    def way(name, *settings):
        return fits.Way(name, lambda data, setting, threads: (0.0, 0.0), settings, settings[:1])

    ways = {suite.OURS: way("mine", 1, 2, 3), "other": way("theirs", 1, 3)}
    return fits.Contest("race", "Races", fits.dense, ways, best, gap)


def _race(table):
    workers = _Fits(table)
    run = estimators.Run(runner.Settings(3, 2, 0.0), workers, False)
    return run.single(estimators.Item(_contest(), (Bar("other", 2.0),))), workers.asked


def test_the_loosest_setting_that_reaches_the_goal_counts(capsys):
    entry, asked = _race({suite.OURS: {1: (0.1, 1.2), 2: (0.2, 1.05)}, "other": {1: (0.5, 1.3), 3: (0.6, 1.0)}})
    assert entry["goal"] == pytest.approx(1.1, rel=1e-5)
    assert [row["variant"] for row in entry["rows"]] == ["mine, 2", "theirs, 3"]
    assert [row["ms"] for row in entry["rows"]] == pytest.approx([200, 600])
    assert entry["checks"][0]["figures"] == pytest.approx([3.0])
    assert entry["checks"][0]["met"]
    assert asked.count((suite.OURS, 2)) == asked.count(("other", 3)) - 1 == 3  # rounds; and one for the goal
    assert "mine, 2: 0.2 s, reached 1.05" in capsys.readouterr().out


def test_long_fits_are_made_once_and_a_miss_is_measured_again():
    entry, asked = _race({suite.OURS: {1: (5.0, 1.0)}, "other": {1: (7.0, 1.0), 3: (9.0, 1.0)}})
    assert entry["checks"][0]["figures"] == pytest.approx([1.4, 1.4])
    assert entry["checks"][0]["met"] is False
    assert asked == 2 * [("other", 3), (suite.OURS, 1), ("other", 1)]


def test_what_fails_or_never_gets_there_is_said():
    broken = {"problem": "ValueError: no"}
    entry, _ = _race({suite.OURS: {1: broken}, "other": {1: (1.0, 9.0), 3: (1.0, 1.0)}})
    assert entry["rows"][0]["problems"] == ["mine: ValueError: no"]
    assert entry["checks"][0]["met"] is None
    far = dict.fromkeys((1, 2, 3), (0.1, 2.0))
    entry, _ = _race({suite.OURS: far, "other": {1: (1.0, 1.0), 3: (1.0, 1.0)}})
    assert entry["rows"][0]["problems"] == ["mine: no setting of its reaches 1.1; the least is 2"]
    entry, _ = _race({"other": {3: {"absent": "no data"}}})
    assert (entry["left_out"], entry["rows"]) == ("no data", [])


def test_data_that_are_absent_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLOSS_DATA", str(tmp_path))
    for name, message in (("l1-20news", fits.NEWS), ("sgd-cifar10", "CIFAR-10 is not here")):
        reply = fits.Session("scikit-learn", 1).fit(name, 1, False)
        assert list(reply) == ["absent"]
        assert message in reply["absent"]
        assert "FASTLOSS_DATA must name its folder" in reply["absent"]


def test_every_contest_has_bars_and_peers():
    assert list(estimators.BARS) == list(fits.contests())
    for name, contest in fits.contests().items():
        assert next(iter(contest.ways)) == suite.OURS
        assert {bar.kind for bar in estimators.BARS[name]} <= set(contest.ways)
        assert contest.best[0] in contest.ways


@pytest.mark.full
@pytest.mark.skipif(bool(peers._backend_missing("cython")), reason="the suite measures the compiled kernels")
def test_the_suite_of_estimators_on_digits(tmp_path, capsys):
    """The jobs that need scikit-learn alone, and no data."""
    words = ["--quick", "--cases", "acc*", "sgd*", "crammer*", "loss-*", "--threads", "2", "--out", str(tmp_path)]
    assert cli.main(["bench", "--suite", "estimators", *words]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert [entry["case"].partition("-")[0] for entry in found["cases"]] == ["accelerate", "sgd", "crammer", "loss"]
    for entry in found["cases"]:
        rows = {row["peer"]: row for row in entry["rows"]}
        assert {suite.OURS, "scikit-learn"} <= set(rows)
        for row in rows.values():
            assert row["problems"] == []
            assert row["ms"] > 0
            assert row["reached"] <= entry["goal"]
    assert re.search(r"\d+ of \d+ bars met", capsys.readouterr().out)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    _Page(page)
    assert "that reaches the job's goal" in page
