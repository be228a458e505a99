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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import fastloss as fl
from fastloss import _info
from fastloss.bench import peers
from fastloss.bench.cases import Case
from fastloss.model import replacing

_LIMIT = 3.0  # a peer that has used as many seconds on a case sits out its further rounds
_HOPELESS = 1.5  # a variant that was slower than its peer's best by this factor is not timed again
_HANGS = 300.0  # seconds after which a request has failed
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


class WorkerError(RuntimeError):
    """A peer's process ended, or did not answer."""


class Worker:
    """A peer's process."""

    def __init__(self, peer: str, threads: int) -> None:
        self.peer = peer
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        root = str(Path(fl.__file__).parents[1])
        environment = os.environ | dict.fromkeys((*_THREAD_VARIABLES, "FASTLOSS_NUM_THREADS"), str(threads))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fastloss.bench.worker", peer, str(threads)],
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

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._by_peer: dict[str, Worker] = {}

    def __getitem__(self, peer: str) -> Worker:
        worker = self._by_peer.get(peer)
        if worker is None or worker.process.poll() is not None:
            if worker is not None:
                worker.close()
            worker = self._by_peer[peer] = Worker(peer, self.threads)
        return worker

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._by_peer.values():
            worker.close()


@dataclass
class Entry:
    """A peer's part in a case."""

    peer: peers.Peer
    live: list[str] = field(default_factory=list)
    #: Variant → seconds, a median for each round.
    rounds: dict[str, list[float]] = field(default_factory=dict)
    answers: dict[str, list[float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    used: float = 0.0

    def prepare(self, worker: Worker, case: Case) -> None:
        for variant, answer in worker.ask("prepare", name=case.name).items():
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
                "ms": medians[best] * 1e3,
                "spread": (max(times) - min(times)) / medians[best],
                "variants_ms": {variant: [t * 1e3 for t in times] for variant, times in self.rounds.items()},
            }
        return row


def _check_answers(entries: Sequence[Entry]) -> None:
    """Note a problem where a loss, or the norm of a gradient, is not what most peers found."""
    found = [answer for entry in entries for answer in entry.answers.values() if answer]
    if not found:
        return
    middle = np.nanmedian(found, axis=0)
    for entry in entries:
        for variant, answer in entry.answers.items():
            if answer and not np.all(np.abs(answer - middle) <= 1e-3 * np.abs(middle)):
                entry.problems.append(f"{variant}: loss and norms of gradients are {answer}, not {middle.tolist()}")


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _too_large(case: Case, n_peers: int) -> str | None:
    """Why a case does not fit into memory, by a rough count of the arrays that all processes hold together."""
    # Scores: three such arrays for each, and the reference's temporaries; features: X for each, and some copies.
    needed = case.n_bytes * (3 * n_peers + 12 if case.d is None else n_peers + 3)
    available = _available_bytes()
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


def time_case(case: Case, chosen: Sequence[peers.Peer], workers: Workers, settings: Settings) -> dict[str, Any]:
    """The results of a case, ready for JSON."""
    result: dict[str, Any] = {"case": case.name, "dtype": case.dtype, "bytes": case.n_bytes}
    entries = [Entry(peer) for peer in chosen if case.kind not in peer.lacks]
    result["lacks"] = {peer.name: peer.lacks[case.kind] for peer in chosen if case.kind in peer.lacks}
    result["left_out"] = _too_large(case, len(entries))
    if result["left_out"]:
        return result | {"rows": []}

    def guarded(entry: Entry, what: str, step: Callable[..., None], *arguments: object) -> None:
        _progress(f"{case.name}: {entry.peer.name}, {what}")
        try:
            step(workers[entry.peer.name], *arguments)
        except WorkerError as error:
            entry.problems.append(str(error))
            entry.live = []

    for entry in entries:
        guarded(entry, "setting up", entry.prepare, case)
    for k in range(settings.rounds):
        for entry in entries if k % 2 == 0 else reversed(entries):
            if entry.live and entry.used < _LIMIT:
                guarded(entry, f"round {k + 1} of {settings.rounds}", entry.take_turn, settings.seconds)
    _progress("")
    _check_answers(entries)

    rows = [entry.row() for entry in entries]
    timed = [row for row in rows if "ms" in row]
    memory = next((row["ms"] for row in timed if row["peer"] == "memory"), None)
    base = next((row for row in timed if row["peer"].startswith("fastloss")), None)
    result["base"] = base and base["peer"]
    for row in timed:
        row["ratio_to_base"] = base and row["ms"] / base["ms"]
        row["ratio_to_memory"] = memory and row["ms"] / memory
    return result | {"rows": rows}


def format_case(result: dict[str, Any]) -> str:
    """The results of a case as a table."""
    lines = [f"{result['case']} ({result['dtype']}, {result['bytes'] / 1e6:.3g} MB)"]
    if result["left_out"]:
        return f"{lines[0]}\n  left out: {result['left_out']}"
    memory = "/ read" if "linear" in result["case"] else "/ copy"
    base = f"/ {result['base']}" if result["base"] else "/ fastloss"
    width = max(len(base), 8)
    lines.append(f"  {'peer':<20}{'ms':>10}  {base:>{width}}{memory:>9}{'spread':>9}  best variant")
    for row in result["rows"]:
        if "ms" in row:
            ratio, to_memory = row["ratio_to_base"], row["ratio_to_memory"]
            lines.append(
                f"  {row['peer']:<20}{row['ms']:>10.4g}  {'–' if ratio is None else f'{ratio:.2f}':>{width}}"
                f"{'–' if to_memory is None else f'{to_memory:.2f}':>9}{row['spread']:>9.0%}  {row['variant']}"
            )
        lines += [f"  {row['peer']:<20}  failed: {problem}" for problem in row["problems"]]
    lines += [f"  {name:<20}  not here: {reason}" for name, reason in result["lacks"].items()]
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the results depend on besides the code."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return _info.collect() | {"cpus_usable": usable, "load_average_before": load, "date": now}


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def main(cases: Sequence[Case], names: Sequence[str] | None, settings: Settings, path: Path | None) -> int:
    """Time, print, and write; 1 if a peer failed."""
    wanted = [
        peer for peer in peers.table().values()
        if peer.control or (peer.default if names is None else peer.name in names)
    ]  # fmt: skip
    reasons = {peer.name: peer.why_not() for peer in wanted}
    absent = {name: reason for name, reason in reasons.items() if reason is not None}
    chosen = [peer for peer in wanted if peer.name not in absent]
    facts = machine()
    load = facts["load_average_before"]
    busy = "" if load is None else f"; load average before {load:.2f}"
    print(f"{facts['processor']}, {facts['cpus_usable']} CPUs usable{busy}; {facts['date']}")
    versions = facts["packages"] | {"fastloss": facts["fastloss"]}
    print(", ".join(f"{name} {versions[name]}" for name in dict.fromkeys(peer.distribution for peer in chosen)))
    print(f"{settings.threads} threads, {settings.rounds} rounds; medians")
    for name, reason in absent.items():
        print(f"absent: {name}: {reason}")
    results = []
    with Workers(settings.threads) as workers:
        for case in cases:
            results.append(time_case(case, chosen, workers, settings))
            print(f"\n{format_case(results[-1])}", flush=True)
    if path is not None:
        content = {"machine": facts, "settings": asdict(settings), "absent": absent, "cases": results}
        with replacing(path) as file:
            file.write(json.dumps(content, indent=1).encode())
    return int(any(row["problems"] for result in results for row in result["rows"]))
