"""Times peers against each other: one process for each, of which exactly one runs at any time.

A round gives every peer a short turn; rounds go back and forth through the peers, so that what the machine does
besides falls on all of them alike. After its turn a process is waited for until it is quiet.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import fastloss as fl
from fastloss import _info
from fastloss.bench import peers
from fastloss.bench.cases import FLOATS, Case
from fastloss.bench.work import Peer
from fastloss.model import replacing

_LIMIT = 3.0  # a peer that has used as many seconds on a case sits out its further rounds
_HOPELESS = 1.5  # a variant that was slower than its peer's best by this factor is not timed again
_LARGE = 2**30  # bytes that are not left to processes which may have no part in the next case
_HANGS = 300.0  # seconds after which a request has failed
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


class WorkerError(RuntimeError):
    """A peer's process ended, or did not answer."""


class Worker:
    """A peer's process; `module` says what it serves."""

    def __init__(self, peer: str, threads: int, module: str = "fastloss.bench.worker") -> None:
        self.peer = peer
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        root = str(Path(fl.__file__).parents[1])
        environment = os.environ | dict.fromkeys((*_THREAD_VARIABLES, "FASTLOSS_NUM_THREADS"), str(threads))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, peer, str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=environment, text=True,
            start_new_session=True,  # an interrupt from the keyboard is the runner's to handle
        )  # fmt: skip

    def ask(self, do: str, **arguments: object) -> Any:
        """Send a request and wait for its reply."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        alarm = threading.Timer(_HANGS, self.process.kill)
        alarm.start()
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            alarm.cancel()
        if not line:
            raise WorkerError(self._last_words())
        answer = json.loads(line)
        if not answer["quiet"]:
            print(f"{self.peer} kept its CPUs busy after its turn; the next peer's time suffers", file=sys.stderr)
        return answer["reply"]

    def _last_words(self) -> str:
        code = self.process.wait()
        self.log.seek(0)
        said = self.log.read().decode(errors="replace").strip().splitlines()
        return f"its process ended with status {code}" + (f": {said[-1]}" if said else "")

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if self.process.poll() is None:
            self.process.kill()  # it holds nothing worth an orderly end
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            with contextlib.suppress(BrokenPipeError):  # a request that it never read
                stream.close()


class Workers:
    """The processes, started when first needed and replaced when they end."""

    def __init__(self, threads: int, module: str = "fastloss.bench.worker") -> None:
        self.threads, self._module = threads, module
        self._by_peer: dict[str, Worker] = {}

    def __getitem__(self, peer: str) -> Worker:
        worker = self._by_peer.get(peer)
        if worker is None or worker.process.poll() is not None:
            if worker is not None:
                worker.close()
            worker = self._by_peer[peer] = Worker(peer, self.threads, self._module)
        return worker

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._by_peer.values():
            worker.close()


@dataclass
class Entry:
    """A peer's part in a case."""

    peer: Peer
    live: list[str] = field(default_factory=list)
    #: Variant → seconds, a median for each round.
    rounds: dict[str, list[float]] = field(default_factory=dict)
    answers: dict[str, list[float]] = field(default_factory=dict)
    #: Variant → bytes beyond inputs and results.
    memory: dict[str, int | None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    used: float = 0.0

    def prepare(self, worker: Worker, case: Case) -> None:
        reply = worker.ask("prepare", name=case.name)
        self.memory = reply["memory"]
        for variant, answer in reply["answers"].items():
            if isinstance(answer, str):
                self.problems.append(f"{variant}: {answer}")
            else:
                self.answers[variant] = answer
                self.rounds[variant] = []
                self.live.append(variant)

    def take_turn(self, worker: Worker, seconds: float) -> None:
        began = time.perf_counter()
        for variant, median in worker.ask("time", variants=self.live, seconds=seconds).items():
            self.rounds[variant].append(median)
        self.used += time.perf_counter() - began
        best = min(statistics.median(self.rounds[variant]) for variant in self.live)
        self.live = [v for v in self.live if statistics.median(self.rounds[v]) <= _HOPELESS * best]

    def row(self) -> dict[str, Any]:
        medians = {variant: statistics.median(times) for variant, times in self.rounds.items() if times}
        row: dict[str, Any] = {"peer": self.peer.name, "problems": self.problems}
        if medians:
            best = min(self.live or medians, key=lambda variant: medians[variant])
            times = self.rounds[best]
            row |= {
                "variant": best,
                "memory": self.memory.get(best),
                "ms": medians[best] * 1e3,
                "spread": (max(times) - min(times)) / medians[best],
                "variants_ms": {variant: [t * 1e3 for t in times] for variant, times in self.rounds.items()},
            }
        return row


def _check_answers(entries: Sequence[Entry], case: Case) -> None:
    """Note a problem where a loss, or the norm of a gradient, is not what most peers found."""
    found = [answer for entry in entries for answer in entry.answers.values() if answer]
    if not found:
        return
    middle = np.nanmedian(found, axis=0)
    tolerance = 1e-3 if case.d is not None or case.dtype in FLOATS else 5e-2  # sums of numbers of 8 or 11 bits
    for entry in entries:
        for variant, answer in entry.answers.items():
            with np.errstate(invalid="ignore"):  # inf in float16
                agrees = np.all(np.abs(np.subtract(answer, middle)) <= tolerance * np.abs(middle)) if answer else True
            if not agrees:
                entry.problems.append(f"{variant}: loss and norms of gradients are {answer}, not {middle.tolist()}")


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _needed_bytes(case: Case, n_peers: int) -> int:
    """A rough count of the arrays that all processes hold together."""
    if case.d is None:  # three such arrays for each, and the reference's temporaries
        return case.n_bytes * (3 * n_peers + 12)
    return case.n_bytes * (n_peers + 3) + 16 * case.c * (case.n + case.d) * n_peers


def _too_large(case: Case, n_peers: int) -> str | None:
    """Why a case does not fit into memory."""
    needed, available = _needed_bytes(case, n_peers), _available_bytes()
    if available is None or needed <= available:
        return None
    return (
        f"{n_peers} processes need about {needed / 1e9:.1f} GB for it, and {available / 1e9:.1f} GB are available; "
        "--peers takes fewer"
    )


@dataclass(frozen=True)
class Settings:
    rounds: int
    threads: int
    #: For each variant in its turn.
    seconds: float


def _floor(case: Case, controls: Mapping[str, float]) -> dict[str, Any] | None:
    """The largest of the sums of controls that the case is compared with, and which it is."""
    sums = {
        " + ".join(names): sum(controls[name] for name in names)
        for names in case.floor
        if all(name in controls for name in names)
    }
    if len(sums) < len(case.floor):
        return None
    by = max(sums, key=lambda names: sums[names])
    return {"ms": sums[by], "by": by}


def time_case(
    case: Case, chosen: Sequence[Peer], workers: Workers, settings: Settings, controls: Sequence[str] | None = None
) -> dict[str, Any]:
    """The results of a case, ready for JSON: of the peers chosen, and of controls (None: those of its floor)."""
    result: dict[str, Any] = {
        "case": case.name, "dtype": case.dtype, "classes": case.c, "bytes": case.n_bytes, "moved": case.moved_bytes,
        "multiply_adds": case.multiply_adds, "exponentials": case.exponentials,
    }  # fmt: skip
    lacks = {peer.name: peer.lack(case) for peer in chosen}
    table = peers.table()
    wanted = [table[name] for name in (case.controls if controls is None else controls)]
    measures = [Entry(peer) for peer in wanted if peer.why_not() is None]
    entries = [Entry(peer) for peer in chosen if lacks[peer.name] is None]
    result["lacks"] = {name: reason for name, reason in lacks.items() if reason is not None}
    result["left_out"] = _too_large(case, len(entries))
    if result["left_out"]:
        return result | {"controls": [], "rows": [], "floor": None, "base": None}

    def guarded(entry: Entry, what: str, step: Callable[..., None], *arguments: object) -> None:
        progress(f"{case.name}: {entry.peer.name}, {what}")
        try:
            step(workers[entry.peer.name], *arguments)
        except WorkerError as error:
            entry.problems.append(str(error))
            entry.live = []

    everyone = [*measures, *entries]
    for entry in everyone:
        guarded(entry, "setting up", entry.prepare, case)
    for k in range(settings.rounds):
        for entry in everyone if k % 2 == 0 else reversed(everyone):
            if entry.live and entry.used < _LIMIT:
                guarded(entry, f"round {k + 1} of {settings.rounds}", entry.take_turn, settings.seconds)
    for entry in (e for e in everyone if e.live and _needed_bytes(case, len(entries)) > _LARGE):
        guarded(entry, "letting go", lambda worker: worker.ask("clear"))
    progress("")
    _check_answers(everyone, case)

    control_rows, rows = [entry.row() for entry in measures], [entry.row() for entry in entries]
    floor = _floor(case, {row["peer"]: row["ms"] for row in control_rows if "ms" in row})
    timed = [row for row in rows if "ms" in row]
    base = next((row for row in timed if row["peer"].startswith("fastloss")), None)
    for row in timed:
        row["ratio_to_base"] = base and row["ms"] / base["ms"]
        row["ratio_to_floor"] = floor and row["ms"] / floor["ms"]
    return result | {"controls": control_rows, "rows": rows, "floor": floor, "base": base and base["peer"]}


def format_case(result: dict[str, Any]) -> str:
    """The results of a case as a table."""
    lines = [f"{result['case']} ({result['dtype']}, {result['bytes'] / 1e6:.3g} MB)"]
    if result["left_out"]:
        return f"{lines[0]}\n  left out: {result['left_out']}"
    base = f"/ {result['base']}" if result["base"] else "/ fastloss"
    width = max(len(base), 8)
    lines.append(f"  {'peer':<20}{'ms':>10}  {base:>{width}}{'/ floor':>9}{'spread':>9}  best variant")
    for row in (*result["controls"], *result["rows"]):
        if "ms" in row:
            ratio, to_floor = row.get("ratio_to_base"), row.get("ratio_to_floor")
            lines.append(
                f"  {row['peer']:<20}{row['ms']:>10.4g}  {'–' if ratio is None else f'{ratio:.2f}':>{width}}"
                f"{'–' if to_floor is None else f'{to_floor:.2f}':>9}{row['spread']:>9.0%}  {row['variant']}"
            )
        lines += [f"  {row['peer']:<20}  failed: {problem}" for problem in row["problems"]]
    lines += [f"  {name:<20}  not here: {reason}" for name, reason in result["lacks"].items()]
    if result["floor"]:
        lines.append(f"  floor: {result['floor']['ms']:.4g} ms, {result['floor']['by']}")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the results depend on besides the code."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    now = datetime.now(UTC).isoformat(timespec="seconds")
    facts = _info.collect()
    for library in facts["blas"]:  # results are kept: no places of one machine
        library["filepath"] = Path(library["filepath"]).name
    facts["environment"].pop("FASTLOSS_DATA", None)
    return facts | {"cpus_usable": usable, "load_average_before": load, "date": now}


def progress(text: str) -> None:
    """Say on a terminal what is under way."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def choose(names: Sequence[str] | None) -> tuple[list[Peer], dict[str, str]]:
    """The peers of these names (or the default ones) that are here, and the reasons of those that are not."""
    wanted = [
        peer for peer in peers.table().values()
        if not peer.control and (peer.default if names is None else peer.name in names)
    ]  # fmt: skip
    reasons = {peer.name: peer.why_not() for peer in wanted}
    absent = {name: reason for name, reason in reasons.items() if reason is not None}
    return [peer for peer in wanted if peer.name not in absent], absent


def print_setting(facts: dict[str, Any], chosen: Sequence[Peer], absent: dict[str, str], settings: Settings) -> None:
    """What is measured, and where."""
    load = facts["load_average_before"]
    busy = "" if load is None else f"; load average before {load:.2f}"
    print(f"{facts['processor']}, {facts['cpus_usable']} CPUs usable{busy}; {facts['date']}")
    versions = facts["packages"] | {"fastloss": facts["fastloss"]}
    names = dict.fromkeys(peer.distribution for peer in chosen) if chosen else [n for n in versions if versions[n]]
    print(", ".join(f"{name} {versions[name]}" for name in names))
    print(f"{settings.threads} threads, {settings.rounds} rounds; medians")
    for name, reason in absent.items():
        print(f"absent: {name}: {reason}")


def main(cases: Sequence[Case], names: Sequence[str] | None, settings: Settings, path: Path | None) -> int:
    """Time, print, and write; 1 if a peer failed."""
    chosen, absent = choose(names)
    facts = machine()
    print_setting(facts, chosen, absent, settings)
    results = []
    with Workers(settings.threads) as workers:
        for case in cases:
            results.append(time_case(case, chosen, workers, settings))
            print(f"\n{format_case(results[-1])}", flush=True)
    if path is not None:
        content = {"machine": facts, "settings": asdict(settings), "absent": absent, "cases": results}
        with replacing(path) as file:
            file.write(json.dumps(content, indent=1).encode())
    return int(any(row["problems"] for result in results for row in (*result["controls"], *result["rows"])))
