"""`fastloss bench --suite estimators`: how long a model takes to reach a goal, beside the libraries it stands in for.

Each library has a process of its own, and they take turns. First each finds the loosest setting that reaches the goal
(see `fits`); then that is timed again, in alternating rounds, until it has used `LIMIT` seconds: short fits get
medians, a fit of half a minute is made once, and serves all jobs that ask for it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastloss.bench import report, runner
from fastloss.bench.fits import Contest, contests, why_not
from fastloss.bench.runner import Settings, WorkerError, Workers
from fastloss.bench.suite import OURS, Bar, best_peer, conclude, judge, save

LIMIT = 3.0  # seconds of timed fits after which a library sits out further rounds
ROUNDING = 1e-6  # by which figures of the same work differ

#: What is asked for, by contest.
BARS = {
    "accelerate-cifar10": (Bar("scikit-learn", 4.0), Bar("scikit-learn-intelex", 1.0)),
    "softmax-classifier-cifar10": (Bar("scikit-learn", 5.0),),
    "sgd-cifar10": (Bar("scikit-learn", 4.0),),
    "l1-20news": (Bar("scikit-learn", 5.0),),
    "crammer-singer-20news": (Bar("scikit-learn", 3.0),),
    "loss-and-gradient-20news": (Bar("scikit-learn", 3.0),),
    # At most 1.1 times the time of the built-in objective.
    "xgboost-cifar10": (Bar("xgboost", 1 / 1.1),),
    "lightgbm-cifar10": (Bar("lightgbm", 1 / 1.1),),
}


@dataclass(frozen=True)
class Item:
    """A contest with its bars."""

    contest: Contest
    bars: tuple[Bar, ...]


def items(names: Sequence[str] | None = None) -> list[Item]:
    """Those of these names; all for None."""
    return [Item(contest, BARS[name]) for name, contest in contests().items() if names is None or name in names]


@dataclass
class Entry:
    """A library's part: the setting that counts, and what was found with it."""

    peer: str
    setting: Any = None
    reached: float | None = None
    seconds: list[float] = field(default_factory=list)
    tried: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class Run:
    """Contests, one after the other."""

    def __init__(self, settings: Settings, workers: Workers, quick: bool) -> None:
        self.settings, self.workers, self.quick = settings, workers, quick
        #: Long fits of this measurement, which another contest may ask for too.
        self._known: dict[tuple[Any, ...], tuple[float, float]] = {}

    def _fit(self, contest: Contest, entry: Entry, setting: Any) -> tuple[float, float] | None:
        """Seconds and what was reached; None where it failed. DataError where there are no data."""
        key = entry.peer, contest.ways[entry.peer].fit, contest.data, setting
        if key in self._known:
            return self._known[key]
        runner.progress(f"{contest.name}: {entry.peer}, {setting}")
        try:
            reply = self.workers[entry.peer].ask("fit", contest=contest.name, setting=setting, quick=self.quick)
        except WorkerError as error:
            reply = {"problem": str(error)}
        if "absent" in reply:
            raise _AbsentError(reply["absent"])
        if "problem" in reply:
            entry.problems.append(f"{contest.ways[entry.peer].name}: {reply['problem']}")
            return None
        if reply["seconds"] >= LIMIT:
            self._known[key] = reply["seconds"], reply["reached"]
        return reply["seconds"], reply["reached"]

    def _search(self, contest: Contest, entry: Entry, goal: float) -> None:
        """The loosest setting that reaches the goal."""
        way = contest.ways[entry.peer]
        for setting in way.quick if self.quick else way.settings:
            found = self._fit(contest, entry, setting)
            if found is None:
                return
            entry.tried[str(setting)] = found[1]
            if found[1] <= goal:
                entry.setting, entry.reached, entry.seconds = setting, found[1], [found[0]]
                return
        best = min(entry.tried.values())
        entry.problems.append(f"{way.name}: no setting of its reaches {goal:.6g}; the least is {best:.6g}")

    def _goal(self, contest: Contest, lacks: dict[str, str]) -> float:
        name, full, quick = contest.best
        entry = Entry(name)
        found = None if name in lacks else self._fit(contest, entry, quick if self.quick else full)
        if found is None:
            raise _AbsentError(lacks.get(name) or entry.problems[0])
        return found[1] + abs(found[1]) * (contest.gap + ROUNDING)

    def measure(self, contest: Contest, peers: Sequence[str] | None = None) -> dict[str, Any]:
        """A result as `runner.time_case` has them."""
        result: dict[str, Any] = {
            "case": contest.name, "dtype": "float32", "classes": 0, "bytes": 0, "moved": 0, "multiply_adds": 0,
            "exponentials": 0, "controls": [], "rows": [], "floor": None, "base": None, "left_out": None, "goal": None,
        }  # fmt: skip
        reasons = {name: why_not(way) for name, way in contest.ways.items()}
        lacks = {name: reason for name, reason in reasons.items() if reason is not None}
        chosen = [name for name in contest.ways if name == OURS or peers is None or name in peers]
        entries = [Entry(name) for name in chosen if name not in lacks]
        try:
            goal = self._goal(contest, lacks)
            for entry in entries:
                self._search(contest, entry, goal)
            for k in range(1, self.settings.rounds):
                for entry in entries if k % 2 == 0 else reversed(entries):
                    if entry.setting is not None and sum(entry.seconds) < LIMIT:
                        found = self._fit(contest, entry, entry.setting)
                        entry.seconds += [] if found is None else [found[0]]
        except _AbsentError as error:
            return result | {"lacks": lacks, "left_out": str(error)}
        finally:
            runner.progress("")
        rows = [self._row(contest, entry) for entry in entries]
        base = next((row for row in rows if row["peer"] == OURS and "ms" in row), None)
        for row in rows:
            if "ms" in row:
                row["ratio_to_base"] = base and row["ms"] / base["ms"]
                row["ratio_to_floor"] = None
        return result | {"lacks": lacks, "rows": rows, "base": base and OURS, "goal": goal}

    @staticmethod
    def _row(contest: Contest, entry: Entry) -> dict[str, Any]:
        row: dict[str, Any] = {"peer": entry.peer, "problems": entry.problems, "tried": entry.tried}
        if entry.seconds:
            median = statistics.median(entry.seconds)
            variant = f"{contest.ways[entry.peer].name}, {entry.setting}"
            row |= {
                "variant": variant, "memory": None, "ms": median * 1e3, "reached": entry.reached,
                "spread": (max(entry.seconds) - min(entry.seconds)) / median,
                "variants_ms": {variant: [seconds * 1e3 for seconds in entry.seconds]},
            }  # fmt: skip
        return row

    def single(self, item: Item) -> dict[str, Any]:
        """A contest; what misses a bar is measured again, and once more where the two do not agree."""
        results = [self.measure(item.contest)]
        for _ in range(2):
            checks = judge(item, *results)
            missed = [check["bar"] for check in checks if check["met"] is False]
            undecided = any(check["met"] and len(check["figures"]) == 2 for check in checks)
            if not (missed and len(results) == 1) and not undecided:
                break
            self._known.clear()
            results.append(self.measure(item.contest, missed or [check["bar"] for check in checks]))
        first, *others = results
        known = {"section": item.contest.section, "checks": judge(item, *results), "again": others}
        entry = first | known | {"best": best_peer(first)}
        print(report.line(entry), flush=True)
        for row in (row for row in first["rows"] if "ms" in row):
            print(f"  {'':<6}{row['peer']}: {row['variant']}: {row['ms'] / 1e3:.4g} s, reached {row['reached']:.6g}")
        for name, reason in first["lacks"].items():
            print(f"  {'':<6}{name} not here: {reason}", flush=True)
        return entry


class _AbsentError(Exception):
    """There are no data, or nothing to set the goal."""


def main(chosen: Sequence[Item], settings: Settings, quick: bool, folder: Path) -> int:
    """Run the suite, print its tables, and write results.json and report.html; 1 if fastloss failed."""
    report.check()
    facts = runner.machine()
    runner.print_setting(facts, [], {}, settings)
    entries = []
    with Workers(settings.threads, "fastloss.bench.fits") as workers:
        run = Run(settings, workers, quick)
        for section in dict.fromkeys(item.contest.section for item in chosen):
            print(f"\n{report.heading(section)}", flush=True)
            entries += [run.single(item) for item in chosen if item.contest.section == section]
    absent = {name: reason for entry in entries for name, reason in entry["lacks"].items()}
    content = {
        "suite": "estimators", "quick": quick, "machine": facts, "settings": asdict(settings), "absent": absent,
        "limit": LIMIT, "cases": entries,
    }  # fmt: skip
    save(content, folder)
    conclude(content, folder)
    return int(any(row["problems"] for entry in entries for row in entry["rows"] if row["peer"] == OURS))
