"""One peer in a process of its own, which the runner tells over a pipe what to set up and when to run.

A request is a line of JSON on the standard input, the reply one on the standard output.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fastloss.bench import peers
from fastloss.bench.cases import Case
from fastloss.bench.work import Peer, Work


def choose_cpus(threads: int) -> list[int]:
    """As many CPUs as threads, of different cores as far as possible; all that there are, if fewer."""
    usable = sorted(os.sched_getaffinity(0))
    first: dict[str, int] = {}
    for cpu in usable:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        first.setdefault(siblings.read_text() if siblings.exists() else str(cpu), cpu)
    cores = list(first.values())
    return (cores + [cpu for cpu in usable if cpu not in cores])[:threads]


def settle(limit: float = 2.0) -> bool:
    """Wait until this process is quiet: thread pools spin for a while after their work. False if it never was."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        used = time.process_time()  # of all threads
        time.sleep(0.01)
        if time.process_time() - used < 0.001:
            return True
    return False


def measure(work: Work, seconds: float) -> float:
    """The median time of one job, over about `seconds`, of a job that has run before."""
    began = now = time.perf_counter()
    once = 0.0
    while now - began < 0.02:  # wake the threads, fill the caches
        work.run()
        once, now = time.perf_counter() - now, time.perf_counter()
    if once > 0.5:  # a long job does not notice, and is not waited for again
        return once / work.repeats
    calls = max(1, int(2e-4 / once)) if once > 0 else 1000  # enough for the clock
    samples: list[float] = []
    gc.disable()
    try:
        deadline = time.perf_counter() + seconds
        while not samples or time.perf_counter() < deadline:
            began = time.perf_counter()
            for _ in range(calls):
                work.run()
            samples.append((time.perf_counter() - began) / calls / work.repeats)
    finally:
        gc.enable()
    return statistics.median(samples)


def memory_mark() -> int | None:
    """Bytes that this process holds, from which its peak counts on; None where the system does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class Session:
    """The jobs of the present case, by variant."""

    def __init__(self, peer: Peer, threads: int) -> None:
        self.peer, self.threads = peer, threads
        self.works: dict[str, Work] = {}

    def prepare(self, name: str) -> dict[str, Any]:
        """Set the case up in every variant.

        Variant → the loss and the norms of its gradients, or what went wrong; and variant → bytes that the first run
        took at its peak, those for its results left out (None for a control, or where the system does not tell).
        """
        self.clear()
        case = Case.parse(name)
        inputs = case.inputs() if self.peer.needs_inputs else case.shapes()
        answers: dict[str, Any] = {}
        memory: dict[str, int | None] = {}
        for variant, build in self.peer.variants[case.kind].items():
            if case.job.verb == "in-place" and answers:
                inputs = case.inputs()  # the variant before has written to its own
            try:
                work = build(inputs, self.threads)
                before = memory_mark()
                result = work.run()
                unknown = before is None or self.peer.control
                memory[variant] = None if unknown else _status("VmHWM") - (before or 0) - case.written_bytes
                answer = work.answer(result) if work.answer else ()
                answers[variant] = [float(np.linalg.norm(np.ravel(part).astype(np.float64))) for part in answer]
                del result, answer
                self.works[variant] = work
            except Exception as error:  # whatever a peer raises is a result
                answers[variant] = f"{type(error).__name__}: {error}"
        return {"answers": answers, "memory": memory}

    def clear(self) -> None:
        """Let go of the case's arrays."""
        self.works.clear()
        gc.collect()

    def time(self, variants: list[str], seconds: float) -> dict[str, float]:
        return {variant: measure(self.works[variant], seconds) for variant in variants}


def serve(session: object, threads: int) -> None:
    """Answer requests, each the name of a method of `session` with its arguments, until there are no more."""
    # Libraries print: what they say goes to the standard error.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, choose_cpus(threads))
    for line in sys.stdin:
        request = json.loads(line)
        reply = getattr(session, request.pop("do"))(**request)
        quiet = settle()
        print(json.dumps({"reply": reply, "quiet": quiet}), file=replies, flush=True)


if __name__ == "__main__":
    serve(Session(peers.table()[sys.argv[1]], int(sys.argv[2])), int(sys.argv[2]))
