"""`fastloss bench --suite cpu`: every job at the shapes that the project holds itself to, against bars.

A bar is a bound on a ratio that is measured within one run: to the floor (what the machine can do, `Case.floor`), to
the best peer, to SciPy. What misses one is measured again before it counts, and once more where the two figures do
not agree; all are kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from fastloss.bench import report, runner
from fastloss.bench.cases import FEW_CLASSES, TRANSFORMS, Case
from fastloss.bench.runner import Settings, Workers
from fastloss.bench.work import Peer
from fastloss.model import replacing

OURS = "fastloss-cython"
PEERS: tuple[str, ...] = ("numpy", "scipy", "scikit-learn", "torch", "jax")
#: Compiling takes seconds for each shape; with many classes PyTorch's compiler was slower than PyTorch itself.
WITH_COMPILER = (*PEERS, "torch-compile")
CLIFF = 0.7  # of the throughput at the neighbours


@dataclass(frozen=True)
class Bar:
    """A bound on a figure of a case, `kind` saying which.

    floor: time over that of the floor; control NAME: over that of a control; best, or a peer's name: that peer's time
    over ours; µs: the time itself; MB: memory beyond inputs and results; neighbours: throughput over that of the better
    neighbour in the sweep.
    """

    kind: str
    bound: float

    @property
    def at_least(self) -> bool:
        """Whether it is a lower bound."""
        return self.kind not in ("floor", "µs", "MB") and not self.kind.startswith("control ")

    def met(self, figure: float | None) -> bool | None:
        """None where there is no figure: nothing to compare with."""
        if figure is None:
            return None
        return figure >= self.bound if self.at_least else figure <= self.bound

    def figure(self, result: dict[str, Any]) -> float | None:
        """The figure in a result of `runner.time_case`."""
        ours = next((row for row in result["rows"] if row["peer"] == OURS and "ms" in row), None)
        if ours is None:
            return None
        if self.kind == "floor":
            return ours["ratio_to_floor"]  # type: ignore[no-any-return]
        if self.kind == "µs":
            return float(ours["ms"] * 1e3)
        if self.kind == "MB":
            return None if ours["memory"] is None else ours["memory"] / 1e6
        if self.kind == "neighbours":
            return result.get("to_neighbours")
        if self.kind.startswith("control "):
            control = self.kind.removeprefix("control ")
            times = [row["ms"] for row in result["controls"] if row["peer"] == control and "ms" in row]
            return ours["ms"] / times[0] if times else None
        peer = best_peer(result) if self.kind == "best" else self.kind
        times = [row["ms"] for row in result["rows"] if row["peer"] == peer and "ms" in row]
        return times[0] / ours["ms"] if times else None


def best_peer(result: dict[str, Any]) -> str | None:
    """The fastest that is not fastloss."""
    others = [row for row in result["rows"] if "ms" in row and not row["peer"].startswith("fastloss")]
    return min(others, key=lambda row: row["ms"])["peer"] if others else None


@dataclass(frozen=True)
class Item:
    """A case of the suite: under which heading, against whom, with which bars."""

    section: str
    case: Case
    peers: tuple[str, ...] = ()
    bars: tuple[Bar, ...] = ()

    @property
    def is_of_sweep(self) -> bool:
        return any(bar.kind == "neighbours" for bar in self.bars)

    @property
    def controls(self) -> tuple[str, ...]:
        """What is measured along with it: the floor, and what a bar asks for; in a sweep the copy alone."""
        asked = (bar.kind.removeprefix("control ") for bar in self.bars if bar.kind.startswith("control "))
        return ("copy",) if self.is_of_sweep else (*self.case.controls, *asked)


def _floor(case: Case) -> Bar:
    if case.job.family == "layer" or (case.d is not None and case.c > FEW_CLASSES):
        return Bar("floor", 1.15)
    if case.d is not None:
        return Bar("floor", 1.5)
    if case.c < 100:
        return Bar("floor", 2.0)
    return Bar("floor", 1.2 if case.job.verb == "in-place" else 1.25)


_FEW = ((2097152, 2), (1398101, 3), (65536, 10), (419430, 10), (262144, 16), (113359, 37), (65536, 64))
_MANY = ((65536, 100), (16384, 1000), (2048, 32768), (256, 131072))
_PAIR = ((65536, 10), (16384, 1000))
_CIFAR = (50000, 10, 3072)
_SWEEP_SCORES = 2**23
_SWEEP = (
    2, 3, 4, 5, 7, 8, 10, 13, 16, 17, 24, 31, 32, 33, 37, 47, 48, 49, 63, 64, 65, 80, 99, 100, 101, 127, 128, 129, 200,
    255, 257, 384, 500, 777, 1000, 1023, 1024, 1025, 2000, 2047, 2048, 4095, 4096, 4097, 8191, 8192, 10000, 16384,
    20001, 32768, 32769, 50257, 65536, 100000, 131072, 150001, 200000,
)  # fmt: skip


def cpu() -> list[Item]:
    """The suite for processors."""
    found: list[Item] = []

    def add(section: str, kind: str, *shape: Any, peers: tuple[str, ...] = (), bars: Iterable[Bar] = ()) -> None:
        case = Case(kind, *shape)
        found.append(Item(section, case, peers, (_floor(case), *bars)))

    def faster(c: int) -> tuple[Bar]:
        return (Bar("best", 2.5 if c <= 100 else 4.0),)

    for loss in ("softmax", "hinge"):
        for n, c in (*_FEW, *_MANY):
            peers = WITH_COMPILER if c in (10, 100) else PEERS
            add("Loss and gradient of scores", loss, n, c, peers=peers, bars=faster(c))
    for loss in ("softmax", "hinge"):
        for n, c in _MANY:
            add("In place", f"{loss}-in-place", n, c, peers=("numpy", "torch"), bars=faster(c))
    for loss in ("hinge-mean", "hinge-max", "hinge-squared"):
        for n, c in _PAIR:
            add("Other forms of the hinge", loss, n, c, peers=("numpy", "torch", "jax"), bars=faster(c))
    for dtype in ("float64", "float16", "bfloat16"):
        for n, c in ((65536, 10), (65536, 100), (16384, 1000)):
            add("Other types of scores", "softmax", n, c, None, dtype, peers=PEERS, bars=faster(c))
        add("Other types of scores", "hinge", 16384, 1000, None, dtype, peers=PEERS, bars=faster(1000))
    scipy = (Bar("scipy", 4.0),)
    for n, c in (*_PAIR, (256, 131072)):
        add("Loss alone", "softmax-value", n, c, peers=PEERS, bars=scipy)
        add("Loss alone", "hinge-value", n, c, peers=("numpy", "torch"))
    for name in TRANSFORMS:
        for n, c in _PAIR:
            add("softmax, log_softmax, logsumexp", f"transform-{name}", n, c, peers=PEERS, bars=scipy)
    for loss in ("softmax", "hinge"):
        for n, most in ((128, 5.0), (32, 4.0)):
            found.append(Item("Small calls", Case(loss, n, 10), PEERS, (Bar("µs", most),)))

    linear = "Linear layer, few classes"
    for loss in ("softmax", "hinge"):
        peers = ("numpy", "scikit-learn", "torch", "torch-compile", "jax")
        add(linear, f"linear-{loss}", *_CIFAR, peers=peers, bars=[Bar("best", 2.6)])
    for c in (2, 16, 37, 64):
        add(linear, "linear-softmax", 50000, c, 3072)
    add(linear, "linear-softmax", 500000, 10, 64)
    for dtype in ("float64", "float16", "bfloat16"):
        add(linear, "linear-softmax", *_CIFAR, dtype)
    for verb in ("value", "rows"):
        add(linear, f"linear-softmax-{verb}", *_CIFAR)
    for kind in ("linear-softmax", "linear-hinge", "linear-softmax-value", "linear-softmax-rows"):
        add(linear, kind, *_CIFAR, "uint8", bars=[Bar("control as float32", 1.0)])

    for kind, peers in (("layer-softmax", ("numpy", "torch", "jax")), ("layer-softmax-weights", ("numpy", "torch"))):
        add("Linear layer, many classes", kind, 2048, 32768, 1024, peers=peers, bars=[Bar("best", 1.0), Bar("MB", 64)])
    for loss in ("softmax", "hinge"):
        for shape in ((1, 200000), (10**7, 2)):
            add("Extreme numbers of rows", loss, *shape)
    for loss, classes in (("softmax", _SWEEP), ("hinge", _SWEEP[::2])):
        for c in classes:
            case = Case(loss, _SWEEP_SCORES // c, c)
            found.append(Item(f"Throughput over C, {loss}", case, (), (Bar("neighbours", CLIFF),)))
    return found


SUITES = {"cpu": cpu}


def tiny(items: Sequence[Item]) -> list[Item]:
    """One of each section, three of a sweep, at shapes that take no time: to try the suite, not to judge by it."""
    found: dict[str, list[Item]] = {}
    for item in items:
        section, case = found.setdefault(item.section, []), item.case
        if len(section) < (3 if item.is_of_sweep else 1):
            c = min(case.c, 130)
            case = replace(case, n=max(1, min(case.n, 4096 // c)), c=c, d=None if case.d is None else min(case.d, 24))
            section.append(replace(item, case=case))
    return [item for section in found.values() for item in section]


class _Judged(Protocol):
    """What has bars."""

    @property
    def bars(self) -> tuple[Bar, ...]: ...


def judge(item: _Judged, *results: dict[str, Any]) -> list[dict[str, Any]]:
    """The bars of a case with their figures, of the first measurement and, after a miss, of those that followed.

    Of three the majority counts, of two the second.
    """
    found = []
    for bar in item.bars:
        figures = [bar.figure(result) for result in results]
        met = [bar.met(figure) for figure in figures]
        known = [k for k in range(len(met)) if met[k] is not None] if met[0] is False else [0]
        votes = [met[k] for k in known]
        verdict = votes.count(True) > 1 if len(votes) > 2 else votes[-1]
        figures = [figures[k] for k in known]
        found.append(
            {"bar": bar.kind, "bound": bar.bound, "at_least": bar.at_least, "figures": figures, "met": verdict}
        )
    return found


def with_neighbours(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of a sweep, with each one's throughput over that of the better neighbour."""
    times = [[row["ms"] for row in result["rows"] if "ms" in row] for result in results]
    rates = [result["moved"] / ms[0] if ms else None for result, ms in zip(results, times, strict=True)]
    marked = []
    for k, (result, rate) in enumerate(zip(results, rates, strict=True)):
        beside = [other for other in (*rates[max(0, k - 1) : k], *rates[k + 1 : k + 2]) if other is not None]
        marked.append(result | {"to_neighbours": rate / max(beside) if rate is not None and beside else None})
    return marked


class Run:
    """One run of a suite."""

    def __init__(self, items: Sequence[Item], chosen: Sequence[Peer], settings: Settings, workers: Workers) -> None:
        self.items, self.settings, self.workers = items, settings, workers
        self.chosen = {peer.name: peer for peer in chosen}

    def measure(self, item: Item, peers: Sequence[str]) -> dict[str, Any]:
        taking_part = [self.chosen[name] for name in (OURS, *peers) if name in self.chosen]
        few = replace(self.settings, rounds=min(3, self.settings.rounds))
        settings = few if item.is_of_sweep else self.settings
        return runner.time_case(item.case, taking_part, self.workers, settings, item.controls)

    def again(self, item: Item, result: dict[str, Any]) -> dict[str, Any]:
        """The case measured again, with the peers that the bars take which it missed."""
        missed = [check["bar"] for check in judge(item, result) if check["met"] is False]
        against = {best_peer(result) if kind == "best" else kind for kind in missed}
        return self.measure(item, [name for name in item.peers if name in against])

    def finish(self, item: Item, *results: dict[str, Any]) -> dict[str, Any]:
        first, *others = results
        known = {"section": item.section, "checks": judge(item, *results), "again": others, "best": best_peer(first)}
        print(report.line(entry := first | known), flush=True)
        return entry

    def single(self, item: Item) -> dict[str, Any]:
        results = [self.measure(item, item.peers)]
        if any(check["met"] is False for check in judge(item, *results)):
            results.append(self.again(item, results[0]))
            if any(check["met"] and len(check["figures"]) > 1 for check in judge(item, *results)):
                results.append(self.again(item, results[0]))
        return self.finish(item, *results)

    def sweep(self, items: Sequence[Item]) -> list[dict[str, Any]]:
        """All points first, since each is judged by its neighbours; a miss is measured again along with them."""
        results = with_neighbours([self.measure(item, ()) for item in items])
        missed = {k for k, item in enumerate(items) if judge(item, results[k])[0]["met"] is False}
        renewed = {j for k in missed for j in (k - 1, k, k + 1) if 0 <= j < len(items)}
        second = [self.measure(item, ()) if k in renewed else results[k] for k, item in enumerate(items)]
        second = with_neighbours(second)
        return [
            self.finish(item, results[k], *([second[k]] if k in missed else [])) for k, item in enumerate(items)
        ]  # fmt: skip

    def sections(self) -> Iterator[list[dict[str, Any]]]:
        """Entries of each section, when it is done."""
        for section in dict.fromkeys(item.section for item in self.items):
            print(f"\n{report.heading(section)}", flush=True)
            of_section = [item for item in self.items if item.section == section]
            yield self.sweep(of_section) if of_section[0].is_of_sweep else [self.single(item) for item in of_section]


def save(content: dict[str, Any], folder: Path) -> None:
    """results.json, as far as the cases have come."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "results.json") as file:
        file.write(json.dumps(content, indent=1).encode())


def conclude(content: dict[str, Any], folder: Path) -> None:
    """The report, and how many bars were met."""
    report.write(content, folder)
    checks = [check for entry in content["cases"] for check in entry["checks"] if check["met"] is not None]
    print(f"\n{sum(check['met'] for check in checks)} of {len(checks)} bars met; written to {folder}")


def main(
    name: str, items: Sequence[Item], names: Sequence[str] | None, settings: Settings, quick: bool, folder: Path
) -> int:
    """Run a suite, print its tables, and write results.json, the pictures and report.html; 1 if fastloss failed.

    results.json is written after each section. What went wrong with a peer is part of the report: some are far off in
    float16, or in sums over many classes.
    """
    report.check()
    chosen, absent = runner.choose((OURS, *(WITH_COMPILER if names is None else names)))
    facts = runner.machine()
    runner.print_setting(facts, chosen, absent, settings)
    entries: list[dict[str, Any]] = []
    content = {
        "suite": name, "quick": quick, "machine": facts, "settings": asdict(settings), "absent": absent,
        "cases": entries,
    }  # fmt: skip
    with Workers(settings.threads) as workers:
        for of_section in Run(items, chosen, settings, workers).sections():
            entries += of_section
            save(content, folder)
    conclude(content, folder)
    ours = (row for entry in entries for row in entry["rows"] if row["peer"] == OURS)
    controls = (row for entry in entries for row in entry["controls"])
    return int(any(row["problems"] for row in (*ours, *controls)))
