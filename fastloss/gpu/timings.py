"""Times on a GPU: losses of scores and of linear layers beside copies of the same bytes, products, and peers.

Device time is the median over rounds of calls between two events, while long copies before them keep the GPU busy
until the host has asked for all of them: so it has nothing of the host's time. The buffers of consecutive calls are
different ones, together larger than the second-level cache. Names that start with "fastloss" are ours.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

import fastloss as fl
from fastloss.gpu.arrays import host_dtype
from fastloss.gpu.sources import Source

Job = Callable[[int], Any]
Entry = dict[str, Any]

LOSSES: dict[str, fl.Loss] = {"softmax": fl.Softmax(), "hinge": fl.Hinge()}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is timed, and how long."""

    scores: tuple[tuple[int, int], ...]
    dtypes: tuple[str, ...]
    small: tuple[int, int]
    layer: tuple[int, int, int]  # N, D, C
    images: tuple[int, int, int]
    cache: int  # bytes that buffers are to exceed together
    round: float  # seconds of device time
    rounds: int
    copied: int  # bytes, for the bandwidth


FULL = Plan(
    (*((32768, c) for c in (256, 1024, 4096, 32768, 131072)), (10_000_000, 10)), ("float32", "bfloat16"), (128, 10),
    (8192, 4096, 128256), (50000, 3072, 10), 256 << 20, 5e-3, 7, 2 << 30,
)  # fmt: skip
QUICK = dataclasses.replace(FULL, scores=((32768, 1024), (1_000_000, 10)), rounds=3)
TINY = Plan(((32, 16), (64, 10)), ("float32",), (8, 10), (16, 8, 40), (20, 12, 10), 1 << 12, 1e-5, 2, 1 << 12)


class Time(NamedTuple):
    """Seconds for each call: the median on the device, and that on the host until the call is back."""

    device: float
    host: float


def in_short(error: BaseException) -> str:
    """An error's class, and the first of its words."""
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0][:200] if words else ''}"


class Clock:
    """Times jobs on a source's device."""

    def __init__(self, source: Source, plan: Plan) -> None:
        self.source, self.plan = source, plan
        self._pair: tuple[Any, Any] | None = None
        self._hold = 0.0

    def release(self) -> None:
        """Give up the memory that holds the GPU busy."""
        self._pair = None
        self.source.forget()

    def prepare(self) -> None:
        """Take the memory, before buffers take what is there."""
        if self._pair is None:
            n = self.plan.copied // 16
            self._pair = self.source.put(np.zeros(n, np.float32)), self.source.put(np.ones(n, np.float32))
            self._hold = 0.0
            for _ in range(3):
                start = self.source.mark()
                self.source.copy(*self._pair)
                self._hold = self.source.seconds(start, self.source.mark())

    def _keep_busy(self, seconds: float) -> None:
        """Enqueue copies that take that long."""
        assert self._pair is not None
        for _ in range(min(300, int(seconds / max(self._hold, 1e-6)) + 1)):
            self.source.copy(*self._pair)

    def time(self, jobs: dict[str, Job], left: Callable[[], float], errors: dict[str, str]) -> dict[str, Time]:
        """Of each job, in turns. A job gets the number of the call, to choose its buffers by. One that fails is left
        out, with its error."""
        self.prepare()
        calls: dict[str, int] = {}
        for name, job in jobs.items():
            try:
                job(0)  # compiles
                self.source.synchronize()
                began = time.perf_counter()
                job(1)
                self.source.synchronize()
                once = time.perf_counter() - began
                calls[name] = max(1, min(50, int(self.plan.round / max(once, 1e-7))))
            except Exception as error:  # a peer's failure is a result
                errors[name] = in_short(error)
        found: dict[str, list[Time]] = {name: [] for name in calls}
        hosts = dict.fromkeys(calls, 1e-3)
        for turn in range(self.plan.rounds):
            for name, count in calls.items():
                if turn >= 2 and left() <= 0:
                    continue
                self.source.synchronize()
                self._keep_busy(1.5 * hosts[name] * count)
                start, began = self.source.mark(), time.perf_counter()
                for k in range(count):
                    jobs[name](k)
                host = (time.perf_counter() - began) / count
                seconds = self.source.seconds(start, self.source.mark()) / count
                hosts[name] = host
                if turn or self.plan.rounds == 1:
                    found[name].append(Time(seconds, host))
        return {
            name: Time(statistics.median(t.device for t in times), statistics.median(t.host for t in times))
            for name, times in found.items()
        }


def table_of(times: dict[str, Time]) -> dict[str, Entry]:
    return {name: {"device_us": 1e6 * t.device, "host_us": 1e6 * t.host} for name, t in times.items()}


def bandwidth(source: Source, plan: Plan) -> Entry:
    """Bytes read and written by a large copy on the device, a second."""
    n = plan.copied // 4
    a, b = source.put(np.zeros(n, np.float32)), source.put(np.ones(n, np.float32))
    seconds = []
    for _ in range(3 + plan.rounds):
        start = source.mark()
        source.copy(a, b)
        seconds.append(source.seconds(start, source.mark()))
    best = statistics.median(seconds[3:])
    return {"copied_bytes": 4 * n, "device_us": 1e6 * best, "gb_per_s": 8 * n / best / 1e9}


# --- losses of scores ------------------------------------------------------------------------------------------------
class Scores:
    """Buffers for a shape and type: sets of scores, targets and gradients, that together exceed the cache."""

    def __init__(self, source: Source, plan: Plan, n: int, c: int, dtype: str, arrays: float) -> None:
        size = host_dtype(dtype).itemsize
        self.shape_wanted, room = (n, c), 0.9 * source.free_bytes()
        n = max(1, min(n, int(room / (arrays * c * size))))
        self.n, self.c, self.dtype, self.bytes = n, c, dtype, n * c * size
        sets = max(1, min(-(-plan.cache // (2 * self.bytes)), int(room / (arrays * self.bytes)), 64))
        rng = np.random.default_rng(0)
        block = min(n, max(1, (1 << 22) // c))
        host = rng.standard_normal((block, c), np.float32).astype(host_dtype(dtype))
        repeats = -(-n // block)
        self.sets = []
        for _ in range(sets):
            scores = source.empty((n, c), dtype)
            some = source.put(host)
            for k in range(repeats):
                part = slice(k * block, min(n, (k + 1) * block))
                source.copy(scores[part], some[: part.stop - part.start])
            targets = source.put(rng.integers(0, c, n))
            self.sets.append((scores, targets, source.empty((n, c), dtype)))

    def __getitem__(self, k: int) -> tuple[Any, Any, Any]:
        return self.sets[k % len(self.sets)]


def _call(peer: Callable[..., Any], buffers: Scores, k: int) -> Any:
    return peer(*buffers[k][:2])


def our_scores(loss: fl.Loss, buffers: Scores) -> Job:
    def job(k: int) -> Any:
        scores, targets, grad = buffers[k]
        return loss.value_and_grad(scores, targets, out=grad)

    return job


def _autograd(form: Callable[..., Any]) -> Callable[..., Any]:
    torch = import_module("torch")

    def both(scores: Any, targets: Any) -> Any:
        leaf = scores.detach().requires_grad_()
        loss = form(leaf, targets)
        return loss, torch.autograd.grad(loss, leaf)[0]

    return both


def eager_peers(loss: str) -> dict[str, Callable[..., Any]]:
    """PyTorch as it is."""
    forms = import_module("fastloss.bench.forms_torch")
    return {"torch": _autograd(forms.cross_entropy if loss == "softmax" else forms.multi_margin_loss)}


def compiled_peers(loss: str) -> dict[str, Callable[..., Any]]:
    """What compiles first: torch.compile of the fused loss and of loss and gradient by hand; Liger-Kernel; QuACK."""
    forms = import_module("fastloss.bench.forms_torch")
    found: dict[str, Callable[..., Any]] = {}
    if loss == "softmax":
        found["torch.compile"] = _autograd(forms.compile_form(forms.cross_entropy))
        if find_spec("liger_kernel") is not None:
            liger = import_module("liger_kernel.transformers.functional").liger_cross_entropy

            def copied(scores: Any, targets: Any) -> Any:  # it writes the gradient over the scores
                return liger(scores * 1, targets)

            found["liger"] = _autograd(copied)
        if find_spec("quack") is not None:
            quack = import_module("quack.cross_entropy").cross_entropy
            found["quack"] = _autograd(lambda scores, targets: quack(scores, targets, reduction="mean"))
    found["torch.compile by hand"] = forms.compile_form(getattr(forms, loss))
    return found


def scores_cases(plan: Plan) -> Iterator[tuple[str, int, int, str]]:
    for dtype in plan.dtypes:
        for n, c in plan.scores:
            for loss in LOSSES:
                yield loss, n, c, dtype


def time_scores(
    clock: Clock, loss: str, n: int, c: int, dtype: str, peers: dict[str, Callable[..., Any]],
    left: Callable[[], float], copies: bool = True,
) -> Entry:  # fmt: skip
    """Loss and gradient of scores beside a copy of the same bytes and peers: `peers` take scores and targets."""
    source = clock.source
    clock.prepare()
    buffers = Scores(source, clock.plan, n, c, dtype, 2.2 if not peers else 7.0)
    jobs: dict[str, Job] = {"fastloss": our_scores(LOSSES[loss], buffers)}
    if copies:
        jobs["copy"] = lambda k: source.copy(buffers[k][2], buffers[k][0])
    for name, peer in peers.items():
        jobs[name] = functools.partial(_call, peer, buffers)
    errors: dict[str, str] = {}
    entry: Entry = {"loss": loss, "n": buffers.n, "c": c, "dtype": dtype, "bytes": 2 * buffers.bytes}
    if buffers.n != n:
        entry["cut"] = f"{n} rows do not fit"
    for name in list(peers):
        problem = _disagreement(source, LOSSES[loss], buffers, jobs[name])
        if problem is not None:
            errors[name] = problem
            del jobs[name]
    entry["times"] = table_of(clock.time(jobs, left, errors))
    if errors:
        entry["errors"] = errors
    return entry


def _disagreement(source: Source, loss: fl.Loss, buffers: Scores, job: Job) -> str | None:
    """Why a peer's job is not the same job as ours; None if it is."""
    try:
        value, grad = job(0)
        scores, targets, out = buffers[0]
        wanted, _ = loss.value_and_grad(scores, targets, out=out)
        a, b = (float(np.asarray(source.get(x) if source.owns(x) else x, np.float64)) for x in (value, wanted))
        rows = slice(0, 2)
        g, h = (np.asarray(source.get(x[rows]) if source.owns(x) else x[rows], np.float64) for x in (grad, out))
    except Exception as error:
        return in_short(error)
    if not abs(a - b) <= 0.02 * abs(b):
        return f"its loss is {a:g}, ours {b:g}"
    if not np.linalg.norm(g - h) <= 0.05 * np.linalg.norm(h):
        return "its gradient is another one"
    return None


# --- a small call ----------------------------------------------------------------------------------------------------
def time_small(clock: Clock, left: Callable[[], float]) -> Entry:
    """The host's time for a small call, and for less than one: what it is made of."""
    source, (n, c) = clock.source, clock.plan.small
    buffers = Scores(source, clock.plan, n, c, "float32", 2.2)
    scores, targets, grad = buffers[0]
    loss = LOSSES["softmax"]
    stages: dict[str, Job] = {
        "value and gradient, out=": lambda k: loss.value_and_grad(scores, targets, out=grad),
        "value and gradient": lambda k: loss.value_and_grad(scores, targets),
        "value": lambda k: loss.value(scores, targets),
        "one copy by the library": lambda k: source.copy(grad, scores),
        "one new array by the library": lambda k: source.empty((n, c), "float32"),
        "the events of a measurement": lambda k: source.mark(),
    }
    if source.name == "torch":
        theirs = eager_peers("softmax")["torch"]
        stages["PyTorch's loss and its backward pass, for comparison"] = lambda k: theirs(scores, targets)
    found = {}
    for name, stage in stages.items():
        for k in range(20):
            stage(k)
        source.synchronize()
        rounds = []
        for _ in range(clock.plan.rounds):
            began = time.perf_counter()
            for k in range(100):
                stage(k)
            rounds.append((time.perf_counter() - began) / 100)
            source.synchronize()
            if left() <= 0:
                break
        found[name] = 1e6 * statistics.median(rounds)
    return {"n": n, "c": c, "host_us": found}


# --- the linear layer ------------------------------------------------------------------------------------------------
def layer_peers(names: tuple[str, ...]) -> dict[str, Callable[..., Any]]:
    """Loss, dX and dW of a softmax layer without bias: functions of X, W and targets."""
    torch = import_module("torch")
    F = torch.nn.functional

    def plain(X: Any, W: Any, y: Any) -> Any:
        return F.cross_entropy(F.linear(X, W).float(), y)

    def differentiated(form: Callable[..., Any]) -> Callable[..., Any]:
        def all_three(X: Any, W: Any, y: Any) -> Any:
            leaves = [X.detach().requires_grad_(), W.detach().requires_grad_()]
            loss = form(*leaves, y)
            return loss, *torch.autograd.grad(loss, leaves)

        return all_three

    found: dict[str, Callable[..., Any]] = {}
    if "torch" in names:
        found["torch"] = differentiated(plain)
        if hasattr(F, "linear_cross_entropy"):
            found["torch linear_cross_entropy"] = differentiated(lambda X, W, y: F.linear_cross_entropy(X, W, y))
    if "torch.compile" in names:
        forms = import_module("fastloss.bench.forms_torch")
        found["torch.compile"] = differentiated(forms.compile_form(plain))
    if "liger" in names and find_spec("liger_kernel") is not None:
        fused = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
        found["liger"] = differentiated(lambda X, W, y: fused(X, W, y))
    if "quack" in names and find_spec("quack") is not None:
        try:
            chunked = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
        except (ImportError, AttributeError):
            return found
        found["quack"] = differentiated(lambda X, W, y: chunked(X, W, y))
    return found


def _layer_call(peer: Callable[..., Any], X: Any, W: Any, y: Any, k: int) -> Any:
    return peer(X, W, y)


def time_layer(clock: Clock, dtype: str, peers: dict[str, Callable[..., Any]], left: Callable[[], float]) -> Entry:
    """Loss and both gradients of a large output layer: time and memory, ours, the bare products' and peers'."""
    source, (n, d, c) = clock.source, clock.plan.layer
    torch = import_module("torch")
    generator = torch.Generator(device=source.device)  # type: ignore[attr-defined]
    generator.manual_seed(0)

    def normal(*shape: int) -> Any:
        numbers = torch.randn(shape, generator=generator, device=source.device)  # type: ignore[attr-defined]
        return numbers.to(getattr(torch, dtype))

    X, W = normal(n, d), normal(c, d) * d**-0.5
    y = torch.randint(0, c, (n,), generator=generator, device=source.device)  # type: ignore[attr-defined]
    loss = LOSSES["softmax"]
    ours: Job = lambda k: fl.linear_value_and_grad(loss, X, W, y, wrt=("W", "X"))  # noqa: E731
    S, dW, dX = (torch.empty(shape, dtype=X.dtype, device=X.device) for shape in ((n, c), (c, d), (n, d)))

    def products(k: int) -> None:
        torch.mm(X, W.T, out=S)
        torch.mm(S.T, X, out=dW)
        torch.mm(S, W, out=dX)

    errors: dict[str, str] = {}
    jobs: dict[str, Job] = {"fastloss": ours}
    entry: Entry = {"n": n, "d": d, "c": c, "dtype": dtype, "outputs_bytes": (c + n) * d * X.element_size()}
    memory = {}
    for name, peer in peers.items():
        jobs[name] = functools.partial(_layer_call, peer, X, W, y)
    for name in list(jobs):
        source.forget()
        try:
            jobs[name](0)  # compiles
            source.synchronize()
            source.start_peak()
            result = jobs[name](0)
            source.synchronize()
            memory[name] = source.peak()
            del result
        except Exception as error:
            errors[name] = in_short(error)
            del jobs[name]
        if left() <= 0:
            break
    jobs["products"] = products
    entry["times"] = table_of(clock.time(jobs, left, errors))
    entry["peak_bytes"] = memory
    entry["extra_bytes"] = {name: None if b is None else b - entry["outputs_bytes"] for name, b in memory.items()}
    if errors:
        entry["errors"] = errors
    return entry


def _objective_call(objective: fl.LinearObjective, W: Any, k: int) -> Any:
    return objective.value_and_grad(W)


def time_images(clock: Clock, dtype: str, left: Callable[[], float]) -> Entry:
    """Few classes fused: loss and dW in one pass over X, beside a copy of X (twice the bytes) and PyTorch."""
    source, (n, d, c) = clock.source, clock.plan.images
    rng = np.random.default_rng(0)
    host = rng.integers(0, 256, (n, d)).astype(np.uint8)
    X = source.put(host if dtype == "uint8" else (host / np.float32(255)).astype(host_dtype(dtype)))
    other = source.empty((n, d), dtype)
    W = source.put((rng.standard_normal((c, d + 1)) * 1e-3).astype(np.float32))
    y = source.put(rng.integers(0, c, n))
    entry: Entry = {"n": n, "d": d, "c": c, "dtype": dtype, "bytes": host_dtype(dtype).itemsize * n * d}
    jobs: dict[str, Job] = {"copy": lambda k: source.copy(other, X)}
    for name in LOSSES:
        objective = fl.LinearObjective(LOSSES[name], X, y)
        jobs[f"fastloss {name}"] = functools.partial(_objective_call, objective, W)
    if source.name == "torch":
        torch = import_module("torch")
        leaf, bias = W[:, :-1].contiguous().requires_grad_(), W[:, -1].contiguous().requires_grad_()

        def eager(k: int) -> Any:
            x = X.float() if dtype == "uint8" else X
            scores = torch.nn.functional.linear(x, leaf, bias)
            return torch.autograd.grad(torch.nn.functional.cross_entropy(scores, y), [leaf, bias])

        jobs["torch softmax"] = eager
    errors: dict[str, str] = {}
    entry["times"] = table_of(clock.time(jobs, left, errors))
    if errors:
        entry["errors"] = errors
    return entry
