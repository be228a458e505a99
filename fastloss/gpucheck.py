"""`python -m fastloss.gpucheck`: on a machine with a GPU, checks every result on the device, then measures.

It ends within its minutes, and writes each result to a JSON file as soon as it is there. Exit status: 0 if all is
well, 1 if a check failed or could not run, 2 without a GPU, 3 if it had to be stopped, 4 if all that ran is well but
time was too short for the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fastloss as fl
from fastloss._info import _package
from fastloss.gpu import checks, device, sources, timings

Entry = dict[str, Any]
Left = Callable[[], float]

PACKAGES = (
    "numpy", "numba-cuda", "numba", "cuda-core", "cuda-bindings", "torch", "triton", "cupy-cuda12x", "cupy-cuda13x",
    "liger-kernel", "quack-kernels", "ml_dtypes",
)  # fmt: skip
TOOLS = ("memcheck", "racecheck", "initcheck")
NO_TIME = "no time was left"
UNFINISHED = 4  # the exit status where something was not run for lack of time
GRACE = 20.0  # seconds after which what is under way is given up


class Record:
    """The results so far, in a JSON file that is whole at any time; None for no file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.facts: Entry = {}
        self._lock = threading.RLock()

    def put(self, name: str, value: Any) -> None:
        with self._lock:
            self.facts[name] = value
            self.write()

    def add(self, name: str, entry: Entry) -> None:
        with self._lock:
            self.facts.setdefault(name, []).append(entry)
            self.write()

    def write(self) -> None:
        with self._lock:
            if self.path is not None:
                new = self.path.with_name(self.path.name + ".new")
                new.write_text(json.dumps(self.facts, indent=1) + "\n")
                new.replace(self.path)


class Budget:
    """Shares of the time: a part may take its own and what earlier ones left."""

    def __init__(self, seconds: float, shares: dict[str, float], now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._end = now, now() + seconds
        self._shares = {name: seconds * share / sum(shares.values()) for name, share in shares.items()}

    def left(self, name: str) -> Left:
        """The seconds left for a part, that those after it do not need."""
        names = list(self._shares)
        later = sum(self._shares[other] for other in names[names.index(name) + 1 :])
        return lambda: self._end - later - self._now()


# --- the parts -------------------------------------------------------------------------------------------------------
def environment() -> Entry:
    """Card, versions, date."""
    facts: Entry = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "fastloss": fl.__version__,
        "device": device.describe(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _package(name) or "not installed" for name in PACKAGES},
    }
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current"
        found = subprocess.run(
            [tool, f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
        )
        facts["nvidia-smi"] = found.stdout.strip().splitlines() or found.stderr.strip()
    return facts


def found_sources() -> tuple[list[sources.Source], dict[str, str]]:
    """The array libraries that see a GPU, and why the others do not count."""
    found, missing = [], {}
    for name in sources.names():
        try:
            found.append(sources.get(name))
        except ImportError as error:
            missing[name] = str(error)
    return found, missing


def correctness(record: Record, source: sources.Source, sizes: checks.Sizes, left: Left) -> None:
    """Run the checks, until the time is up; the record says which failed and which were not run."""
    entry: Entry = {"arrays": source.name, "passed": 0, "failed": {}, "not run": []}
    began = time.perf_counter()
    for check in checks.Suite(source, sizes).all():
        if left() <= 0:
            entry["not run"].append(check.name)
            record.put(f"correctness, {source.name}", entry)
            continue
        try:
            check.run()
            entry["passed"] += 1
        except Exception as error:
            entry["failed"][check.name] = f"{type(error).__name__}: {error}"
            print(f"  FAILED {check.name}: {type(error).__name__}: {error}", file=sys.stderr)
        entry["seconds"] = round(time.perf_counter() - began, 3)
        record.put(f"correctness, {source.name}", entry)


PEERS: dict[str, Callable[[str], dict[str, Callable[..., Any]]]] = {
    "none": lambda loss: {},
    "eager": timings.eager_peers,
    "compiled": timings.compiled_peers,
}


def scores(record: Record, clock: timings.Clock, peers: str, left: Left) -> None:
    """Losses of scores beside copies, and peers: "none", "eager" or "compiled"."""
    for loss, n, c, dtype in timings.scores_cases(clock.plan):
        if dtype not in clock.source.dtypes:
            continue
        name = f"{loss} {n} x {c} {dtype}"
        if left() <= 0:
            record.add(f"scores, {peers}", {"name": name, "not run": NO_TIME})
            continue
        try:
            found = PEERS[peers](loss)
            entry = timings.time_scores(clock, loss, n, c, dtype, found, left, copies=peers == "none")
        except Exception as error:
            entry = {"error": f"{type(error).__name__}: {error}"}
        record.add(f"scores, {peers}", {"name": name, **entry})
        clock.source.forget()


def layer(record: Record, clock: timings.Clock, left: Left) -> None:
    """The large output layer: first ours and PyTorch's own, then what compiles."""
    for names in (("torch",), ("torch.compile", "liger", "quack")):
        name = f"linear with {', '.join(names)}"
        if left() <= 0:
            record.add("linear", {"name": name, "not run": NO_TIME})
            continue
        try:
            dtype = clock.plan.dtypes[-1]
            entry = timings.time_layer(clock, dtype, timings.layer_peers(names), left)
        except Exception as error:
            entry = {"error": f"{type(error).__name__}: {error}"}
        record.add("linear", {"name": name, **entry})
        clock.source.forget()


def images(record: Record, clock: timings.Clock, left: Left) -> None:
    for dtype in ("float32", "uint8"):
        try:
            entry = timings.time_images(clock, dtype, left)
        except Exception as error:
            entry = {"error": f"{type(error).__name__}: {error}"}
        record.add("few classes", {"name": f"CIFAR-10's shape, {dtype}", **entry})
        clock.source.forget()


def sanitized(record: Record, left: Left) -> None:
    """A short run of the checks under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        record.put("compute-sanitizer", {name: {"not run": "it is not installed"} for name in TOOLS})
        return
    entry: Entry = {}
    command = [sys.executable, "-m", "fastloss.gpucheck", "--parts", "correctness", "--tiny", "--minutes", "1"]
    for name in TOOLS:
        limit = left()
        if limit <= 5:
            entry[name] = {"not run": NO_TIME}
        else:
            try:
                run = subprocess.run(
                    [tool, "--tool", name, "--error-exitcode", "9", *command],
                    capture_output=True, text=True, timeout=limit,
                )  # fmt: skip
                entry[name] = sanitizer_entry(run.returncode, run.stdout + run.stderr)
            except subprocess.TimeoutExpired:
                entry[name] = {"not run": f"{NO_TIME}: it took more than {limit:.0f} s"}
        record.put("compute-sanitizer", entry)


def sanitizer_entry(status: int, text: str) -> Entry:
    """What a run under the tool says: its summary, and its last words where it found something."""
    summary = re.findall(r"ERROR SUMMARY: (\d+) errors?", text) or re.findall(r"(\d+) hazards? displayed", text)
    entry: Entry = {"status": status, "errors": int(summary[-1]) if summary else None}
    if status not in (0, UNFINISHED):
        entry["output"] = text.strip().splitlines()[-12:]
    return entry


# --- the table -------------------------------------------------------------------------------------------------------
def _number(value: float | None, width: int, digits: int = 2) -> str:
    return f"{'-' if value is None else f'{value:.{digits}f}':>{width}}"


def _ratios(times: dict[str, Entry], own: str) -> str:
    """How many times as long as we the others took."""
    mine = times[own]["device_us"]
    others = {k: v for k, v in times.items() if not k.startswith(("fastloss", "copy")) and mine > 0}
    return "  ".join(f"{name} {entry['device_us'] / mine:.2f}x" for name, entry in others.items())


def table(facts: Entry) -> str:
    """All results to be read: one line for each case."""
    lines = [f"fastloss {facts.get('fastloss', '')} on {facts.get('device', 'no device')}, {facts.get('date', '')}"]
    missing = [name for name, found in facts.get("packages", {}).items() if found == "not installed"]
    if missing:
        lines.append("not installed: " + ", ".join(missing))
    lines += [f"{name} arrays were not checked: {why}" for name, why in facts.get("no arrays of", {}).items()]
    lines.append("")
    for name, entry in _checked(facts).items():
        lines.append(
            f"{name}: {entry['passed']} checks passed, {len(entry['failed'])} failed, "
            f"{len(entry['not run'])} not run for lack of time, {entry.get('seconds', 0):.0f} s"
        )
        lines += [f"  FAILED {check}: {why}" for check, why in entry["failed"].items()]
    lines += [f"{name}: {why}" for name, why in facts.items() if name.endswith((", left out", ", failed"))]
    for name, entry in facts.get("compute-sanitizer", {}).items():
        said = entry.get("not run") or f"{entry['errors']} errors, status {entry['status']}"
        lines.append(f"compute-sanitizer {name}: {said}")
    if "bandwidth" in facts:
        lines += ["", f"copy on the device: {facts['bandwidth']['gb_per_s']:.0f} GB/s, read and written"]
    lines += _scores_lines(facts) + _small_lines(facts) + _layer_lines(facts) + _images_lines(facts)
    return "\n".join(lines)


def _trouble(entry: Entry) -> list[str]:
    found = [f"    {name}: {why}" for name, why in entry.get("errors", {}).items()]
    return found + ([f"    {entry['cut']}: {entry['n']} were taken"] if "cut" in entry else [])


def _scores_lines(facts: Entry) -> list[str]:
    cases: dict[str, list[Entry]] = {}
    for peers in ("none", "eager", "compiled"):
        for entry in facts.get(f"scores, {peers}", []):
            cases.setdefault(entry["name"], []).append(entry)
    if not cases:
        return []
    lines = ["", f"{'loss and gradient of scores':<36}{'us':>12}{'GB/s':>8}{'of copy':>9}  others take, times ours"]
    for name, entries in cases.items():
        first = entries[0]
        times = first.get("times", {})
        if "fastloss" not in times:
            lines.append(f"{name:<36}  {first.get('not run') or first.get('error') or first.get('errors')}")
            continue
        mine = times["fastloss"]["device_us"]
        share = times["copy"]["device_us"] / mine if "copy" in times and mine else None
        others = [_ratios(e["times"], "fastloss") for e in entries if "fastloss" in e.get("times", {})]
        lines.append(
            f"{name:<36}{_number(mine, 12)}{_number(first['bytes'] / mine / 1e3 if mine else None, 8, 0)}"
            f"{_number(None if share is None else 100 * share, 8, 1)}%  {'  '.join(filter(None, others))}".rstrip()
        )
        for entry in entries:
            lines += _trouble(entry)
    return lines


def _small_lines(facts: Entry) -> list[str]:
    if "small call" not in facts:
        return []
    entry = facts["small call"]
    if "host_us" not in entry:
        return ["", f"a small call: {entry.get('error')}"]
    lines = ["", f"a call with {entry['n']} x {entry['c']} scores: the host's time, us"]
    return lines + [f"  {name:<40}{_number(us, 9)}" for name, us in entry["host_us"].items()]


def _layer_lines(facts: Entry) -> list[str]:
    lines: list[str] = []
    for entry in facts.get("linear", []):
        times = entry.get("times")
        if not times or "fastloss" not in times:
            lines += ["", f"{entry['name']}: {entry.get('not run') or entry.get('error') or entry.get('errors')}"]
            continue
        lines += ["", "linear + softmax, {n} x {d} x {c} {dtype}: loss, dX, dW".format(**entry)]
        base = times["products"]["device_us"] if "products" in times else None
        lines.append(f"  {'':<30}{'ms':>10}{'of products':>13}{'extra GB':>10}")
        for name, t in times.items():
            extra = entry["extra_bytes"].get(name)
            lines.append(
                f"  {name:<30}{_number(t['device_us'] / 1e3, 10)}{_number(t['device_us'] / base if base else None, 13)}"
                f"{_number(None if extra is None else extra / 1e9, 10)}"
            )
        lines += _trouble({"errors": entry.get("errors", {})})
    return lines


def _images_lines(facts: Entry) -> list[str]:
    lines: list[str] = []
    for entry in facts.get("few classes", []):
        if "times" not in entry:
            lines += ["", f"{entry['name']}: {entry.get('error')}"]
            continue
        lines += ["", f"linear objective, {entry['name']}, {entry['n']} x {entry['d']}, {entry['c']} classes: loss, dW"]
        for name, t in entry["times"].items():
            traffic = entry["bytes"] * (2 if name == "copy" else 1)
            rate = traffic / t["device_us"] / 1e3 if t["device_us"] else None
            lines.append(f"  {name:<30}{_number(t['device_us'], 10)} us{_number(rate, 8, 0)} GB/s of X")
        lines += _trouble({"errors": entry.get("errors", {})})
    return lines


# --- the command -----------------------------------------------------------------------------------------------------
#: The parts in their order, and their shares of the time.
PARTS: dict[str, float] = {
    "correctness": 150, "bandwidth": 6, "scores": 50, "small": 8, "linear": 50, "images": 20, "eager": 40,
    "compiled": 100, "sanitizer": 50,
}  # fmt: skip


def run(
    record: Record, found: Sequence[sources.Source], parts: Iterable[str], sizes: checks.Sizes, plan: timings.Plan,
    budget: Budget,
) -> None:  # fmt: skip
    """The parts, one after the other."""
    main = found[0]
    clock = timings.Clock(main, plan)
    peers_exist = main.name == "torch"
    for part in parts:
        left = budget.left(part)
        if left() <= 0:
            record.put(f"{part}, left out", NO_TIME)
            continue
        print(f"{part} ...", file=sys.stderr, flush=True)
        try:
            if part == "correctness":
                for k, source in enumerate(found):
                    correctness(record, source, sizes if k == 0 else checks.TINY, left)
            elif part == "bandwidth":
                record.put("bandwidth", timings.bandwidth(main, plan))
            elif part == "scores":
                scores(record, clock, "none", left)
            elif part == "small":
                record.put("small call", timings.time_small(clock, left))
            elif part == "linear" and peers_exist:
                layer(record, clock, left)
            elif part == "images":
                images(record, clock, left)
            elif part in ("eager", "compiled") and peers_exist:
                scores(record, clock, part, left)
            elif part == "sanitizer":
                clock.release()
                sanitized(record, left)
            else:
                record.put(f"{part}, left out", "it takes PyTorch with CUDA, which is not here")
        except Exception as error:
            record.put(f"{part}, failed", f"{type(error).__name__}: {error}")
            print(f"  FAILED: {type(error).__name__}: {error}", file=sys.stderr)
    clock.release()


def status(facts: Entry) -> int:
    """The exit status: 1 if a check failed, a part could not run, or the sanitizer found something; else 4 if time was
    too short for all of it."""
    bad = [name for name in facts if name.endswith(", failed")]
    bad += [name for name, entry in _checked(facts).items() if entry["failed"]]
    tools = facts.get("compute-sanitizer", {})
    bad += [name for name in TOOLS if tools.get(name, {}).get("status", 0) not in (0, UNFINISHED)]
    bad += [entry["name"] for entry in _entries(facts) if "error" in entry or "fastloss" in entry.get("errors", {})]
    return 1 if bad else UNFINISHED if _unfinished(facts) else 0


def _unfinished(facts: Entry) -> bool:
    """Whether something was not run for lack of time."""
    tools = facts.get("compute-sanitizer", {}).values()
    said = [entry.get("not run", "") for entry in (*_entries(facts), *tools)]
    said += [value for name, value in facts.items() if name.endswith(", left out")]
    return (
        any(words.startswith(NO_TIME) for words in said)
        or any(entry.get("status") == UNFINISHED for entry in tools)
        or any(entry["not run"] for entry in _checked(facts).values())
    )


def _checked(facts: Entry) -> dict[str, Entry]:
    """What the checks found, for each kind of arrays."""
    return {name: entry for name, entry in facts.items() if name.startswith("correctness,") and isinstance(entry, dict)}


def _entries(facts: Entry) -> Iterator[Entry]:
    for value in facts.values():
        if isinstance(value, list):
            yield from (entry for entry in value if isinstance(entry, dict))


def _stop(record: Record) -> None:
    """Give up, with what there is."""
    record.put("stopped", "it took longer than it may")
    print(table(record.facts), flush=True)
    print("stopped: it took longer than it may", file=sys.stderr, flush=True)
    os._exit(3)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m fastloss.gpucheck", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Check all of fastloss's results on this machine's GPU against the NumPy reference, then measure:\n"
        "losses of scores beside copies of the same bytes, a large linear layer beside its bare products,\n"
        "and PyTorch, torch.compile, Liger-Kernel and QuACK where they are installed.",
        epilog="Exit status: 0 all is well; 1 a check failed, or a part could not run; 2 there is no GPU, or no\n"
        "numba-cuda; 3 it was stopped, for it took too long; 4 all that ran is well, but time was too short for\n"
        "the rest, which is named (give more --minutes).",
    )  # fmt: skip
    p.add_argument("--out", type=Path, metavar="FILE.json", help="write results here, each as soon as it is there")
    p.add_argument("--quick", action="store_true", help="fewer shapes and shorter measurements: a minute or two")
    p.add_argument("--tiny", action="store_true", help="tiny shapes, as in the simulator: says nothing of speed")
    p.add_argument("--minutes", type=float, metavar="M", help="the time it may take (7.5; 2 with --quick)")
    p.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
        help=f"only these: {', '.join(PARTS)}",
    )  # fmt: skip
    return p


def why_not_writeable(path: Path) -> str | None:
    """Why no file can be written there; None if one can. Results are moved there from a file beside it."""
    if path.is_dir():
        return "which is a folder"
    if not path.parent.is_dir():
        return f"but there is no folder {path.parent}"
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return f"but nothing may be written to {path.parent}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit status is returned."""
    options = parser().parse_args(arguments)
    minutes = (2.0 if options.quick else 7.5) if options.minutes is None else options.minutes
    if not minutes > 0:
        parser().error(f"--minutes is {minutes}; it must be above 0")
    if options.out is not None:
        why = why_not_writeable(options.out)
        if why is not None:
            parser().error(f"--out is {options.out}, {why}; it must name a file in a folder that can be written to")
    reason = device.why_not()
    if reason is not None:
        print(f"fastloss.gpucheck needs an NVIDIA GPU: {reason}", file=sys.stderr)
        return 2
    record = Record(options.out)
    for name, fact in environment().items():
        record.put(name, fact)
    found, missing = found_sources()
    record.put("no arrays of", missing)
    seconds = 60 * minutes
    parts = [part for part in PARTS if part in options.parts]
    sizes = checks.TINY if options.tiny else checks.FULL
    plan = timings.TINY if options.tiny else timings.QUICK if options.quick else timings.FULL
    watch = threading.Timer(seconds + GRACE, _stop, [record])
    watch.daemon = True
    watch.start()
    run(record, found, parts, sizes, plan, Budget(seconds, {part: PARTS[part] for part in parts}))
    watch.cancel()
    record.put("finished", datetime.now(UTC).isoformat(timespec="seconds"))
    print(table(record.facts))
    return status(record.facts)


if __name__ == "__main__":
    sys.exit(main())
