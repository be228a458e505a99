"""Same bits for any number of threads and from run to run; forked children; concurrent callers."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController, threadpool_info

import fastloss as fl
from fastloss import blocks, threads
from tests.conftest import BACKENDS, COMPILED, ONE_OF_EACH

THREADS = (1, 2, 3, 5)
needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork")
# Python 3.12 warns of what the test is about: forking a process that has threads. So does JAX, once it is imported.
FORK_WARNINGS = ("ignore:.*multi-threaded.*fork:DeprecationWarning", "ignore:os.fork:RuntimeWarning")


def forking(test):
    for warning in FORK_WARNINGS:
        test = pytest.mark.filterwarnings(warning)(test)
    return test


@pytest.fixture(autouse=True)
def _threads_for_small_problems_too(monkeypatch):
    monkeypatch.setattr(blocks, "SMALL", 0)


# Several segments each, the last a short one, and work for several threads.
SCORES = {
    "few classes": (20_011, 10),
    "two classes": (40_001, 2),
    "lanes in part": (6007, 37),
    "many classes": (301, 1003),
    "few rows": (7, 60_001),
}
# (N, D, C): few classes with short and long rows, many classes, and more than one block of them.
LINEAR = {
    "few classes": (2003, 33, 10),
    "long rows": (300, 1100, 10),
    "many classes": (1500, 40, 70),
    "most": (300, 20, 1100),
    "long sums": (5000, 10, 66),
    "few rows": (40, 6, 5000),
}


def bits(results):
    """Values and arrays, nested in any way, each as a digest of its bytes."""
    if isinstance(results, dict):
        return [(name, bits(result)) for name, result in results.items()]
    if isinstance(results, tuple | list):
        return [bits(result) for result in results]
    return hashlib.sha256(np.asarray(results).tobytes()).hexdigest()[:12]


def same_for_all_threads(call):
    first = bits(call(1))
    for n in (*THREADS, 2, 5):  # and again
        assert bits(call(n)) == first, f"{n} threads"


def scores_problem(n, c, dtype, seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.uniform(0, 1, n)
    weight[rng.random(n) < 0.1] = 0
    return rng.standard_normal((n, c)).astype(dtype), rng.integers(0, c, n), weight


@pytest.mark.parametrize("shape", SCORES.values(), ids=SCORES.keys())
@pytest.mark.parametrize("order", ["C", "F"])
def test_scores(backend, loss, dtype, shape, order):
    scores, y, weight = scores_problem(*shape, dtype)
    scores = np.asarray(scores, order=order)
    same_for_all_threads(
        lambda n: [
            loss.value_and_grad(scores, y, sample_weight=weight, backend=backend, n_threads=n),
            loss.value(scores, y, reduction="none", backend=backend, n_threads=n),
        ]
    )


HINGES = [fl.Hinge(power=p, over=over) for p in (1, 2) for over in ("sum", "mean", "max")]


@pytest.mark.parametrize("shape", SCORES.values(), ids=SCORES.keys())
@pytest.mark.parametrize("loss", [fl.Softmax(), *HINGES], ids=str)
def test_every_loss_on_several_threads(compiled, loss, dtype, shape):
    """In place, out of place and value alone, with row losses; enough work that all threads are used."""
    scores, y, weight = scores_problem(*shape, dtype)

    def call(n):
        more = {"backend": compiled, "n_threads": n}
        into = scores.copy()
        return [
            loss.value_and_grad(into, y, out=into, **more),
            loss.value_and_grad(scores, y, sample_weight=weight, reduction="none", **more),
            loss.value(scores, y, **more),
        ]

    same_for_all_threads(call)


@pytest.mark.parametrize("shape", SCORES.values(), ids=SCORES.keys())
@pytest.mark.parametrize("kind", [fl.softmax, fl.log_softmax, fl.logsumexp])
def test_transforms(backend, dtype, shape, kind):
    scores, _, _ = scores_problem(*shape, dtype)
    same_for_all_threads(lambda n: kind(scores, backend=backend, n_threads=n))


@pytest.mark.parametrize("shape", LINEAR.values(), ids=LINEAR.keys())
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.uint8], ids=["float32", "float64", "uint8"])
def test_linear(compiled, shape, kind):
    n_rows, d, c = shape
    rng = np.random.default_rng(1)
    X = rng.integers(0, 200, (n_rows, d)).astype(kind)
    y, weight = rng.integers(0, c, n_rows), rng.integers(0, 3, n_rows)
    W, rows = rng.standard_normal((c, d + 1)) / 200, rng.integers(0, n_rows, n_rows // 2)
    for loss in (fl.Softmax(), fl.Hinge(), fl.Hinge(power=2, over="max")):

        def call(n, loss=loss):
            more = {"sample_weight": weight, "backend": compiled, "n_threads": n}
            objective = fl.LinearObjective(loss, X, y, penalty=fl.L2(0.1), **more)
            return [
                objective.value_and_grad(W),
                objective.value_and_grad(W, rows=rows),
                objective.value(W),
                objective.values(np.stack([W, 2 * W])),
                fl.linear_value_and_grad(loss, X, W[:, :-1], y, W[:, -1], **more),
            ]

        same_for_all_threads(call)


def test_hessian_products():
    rng = np.random.default_rng(2)
    X, y, W = rng.standard_normal((3001, 20)), rng.integers(0, 5, 3001), rng.standard_normal((5, 21))

    def call(n):
        objective = fl.LinearObjective(fl.Softmax(), X, y, backend="reference", n_threads=n)
        return objective.hessp(W, W[::-1]), objective.values(np.stack([W, 2 * W]))

    same_for_all_threads(call)


def test_default_number_of_threads():
    before = fl.get_num_threads()
    try:
        for n in THREADS:
            fl.set_num_threads(n)
            assert fl.get_num_threads() == n
        for bad in (0, -1):
            with pytest.raises(ValueError, match=f"n is {bad}"):
                fl.set_num_threads(bad)
        with pytest.raises(TypeError, match="integer"):
            fl.set_num_threads(1.5)
        assert fl.get_num_threads() == THREADS[-1]
    finally:
        fl.set_num_threads(before)


# --- the default: control groups, affinity, environment -------------------------------------------------------------
V2 = "36 25 0:31 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "36 25 0:31 {top} /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct"
OTHER = "24 1 8:1 / / rw,relatime - ext4 /dev/root rw"

# name: (lines of /proc/self/cgroup, mounts, files below /sys/fs/cgroup, CPUs of eight)
GROUPS = {
    "no limit": (["0::/a"], [V2.format(top="/")], {"a/cpu.max": "max 100000"}, 8),
    "version 2": (["0::/a"], [V2.format(top="/")], {"a/cpu.max": "300000 100000"}, 3),
    "rounded up": (["0::/a"], [V2.format(top="/")], {"a/cpu.max": "250000 100000"}, 3),
    "less than one": (["0::/a"], [V2.format(top="/")], {"a/cpu.max": "5000 100000"}, 1),
    "more than there are": (["0::/a"], [V2.format(top="/")], {"a/cpu.max": "6400000 100000"}, 8),
    "a group above": (
        ["0::/a/b/c"],
        [V2.format(top="/")],
        {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000", "a/b/c/cpu.max": "400000 100000"},
        2,
    ),
    "another process's group": (["0::/a"], [V2.format(top="/")], {"b/cpu.max": "100000 100000"}, 8),
    "the top of a container": (["0::/"], [V2.format(top="/")], {"cpu.max": "150000 50000"}, 3),
    "outside the mount": (["0::/../x"], [V2.format(top="/")], {"cpu.max": "200000 100000"}, 2),
    "version 1": (
        ["4:cpu,cpuacct:/a", "1:name=systemd:/"],
        [V1.format(top="/")],
        {"cpu,cpuacct/a/cpu.cfs_quota_us": "350000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
        4,
    ),
    "version 1, mounted from within": (
        ["4:cpu,cpuacct:/docker/x"],
        [V1.format(top="/docker/x")],
        {"cpu,cpuacct/cpu.cfs_quota_us": "200000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        2,
    ),
    "version 1, no limit, beside an empty version 2": (
        ["4:cpu,cpuacct:/", "0::/"],
        [V1.format(top="/"), V2.format(top="/").replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")],
        {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        8,
    ),
}


@pytest.mark.parametrize("case", GROUPS.values(), ids=GROUPS.keys())
def test_control_groups_limit_the_default(tmp_path, monkeypatch, case):
    groups, mounts, files, expected = case
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    files |= {"proc/self/cgroup": "\n".join(groups), "proc/self/mountinfo": "\n".join([OTHER, *mounts])}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert threads.cpus(tmp_path) == expected


def test_affinity_is_the_default_without_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 4, 5}, raising=False)
    assert threads.cpus(tmp_path) == 3


@pytest.mark.parametrize(
    ("fastloss", "openmp", "expected"),
    [("3", "5", 3), ("", "5", 5), (None, "6,2", 6), (None, None, 7), (None, "many", 7), (None, "0", 7)],
)
def test_the_environment_comes_before_the_cpus(monkeypatch, fastloss, openmp, expected):
    for name, value in {"FASTLOSS_NUM_THREADS": fastloss, "OMP_NUM_THREADS": openmp}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(threads, "cpus", lambda: 7)
    monkeypatch.setattr(threads, "_n_threads", None)
    assert fl.get_num_threads() == expected
    assert threads.resolve(None) == expected
    assert threads.resolve(2) == 2


@pytest.mark.parametrize("value", ["0", "two", "-1", "1.5"])
def test_a_bad_number_of_threads_in_the_environment(monkeypatch, value):
    monkeypatch.setenv("FASTLOSS_NUM_THREADS", value)
    monkeypatch.setattr(threads, "_n_threads", None)
    with pytest.raises(ValueError, match=f"FASTLOSS_NUM_THREADS is '{value}'"):
        fl.Softmax().value([[1.0, 2.0]], [0])


# --- forks ------------------------------------------------------------------------------------------------------
def everything(backend, n_threads=2):
    """A call of each kind, with several threads where there are."""
    scores, y, _ = scores_problem(20_000, 10, np.float32)
    X, W = scores[:, :5], np.linspace(-1, 1, 60, dtype=np.float32).reshape(10, 6)
    many, labels = np.tile(W, (200, 1)), y * 200
    return bits(
        [
            fl.Softmax().value_and_grad(scores, y, backend=backend, n_threads=n_threads),
            fl.logsumexp(scores, backend=backend, n_threads=n_threads),
            fl.LinearObjective(fl.Hinge(), X, y, backend=backend, n_threads=n_threads).value_and_grad(W),
            fl.LinearObjective(
                fl.Softmax(), X[:2000], labels[:2000], backend=backend, n_threads=n_threads
            ).value_and_grad(many),
        ]
    )


def child(backend, expected, queue):
    queue.put("same" if everything(backend) == expected else "different")


def run_forked(backend, expected, timeout=60):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(backend, expected, queue), daemon=True)
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        return "hangs"
    return queue.get() if process.exitcode == 0 else f"exit code {process.exitcode}"


@needs_fork
@forking
@pytest.mark.parametrize("backend", COMPILED)
def test_forked_child_after_threads_in_the_parent(backend):
    expected = everything(backend)
    assert run_forked(backend, expected) == "same"
    assert everything(backend) == expected, "the parent is as before"


def grandchild(backend, expected, queue):
    queue.put(run_forked(backend, expected))


@needs_fork
@forking
@pytest.mark.parametrize("backend", ONE_OF_EACH)
def test_forked_child_forks(backend):
    expected, context = everything(backend), multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=grandchild, args=(backend, expected, queue))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert queue.get() == "same"


@needs_fork
@forking
@pytest.mark.parametrize("backend", ONE_OF_EACH)
def test_fork_while_another_thread_computes(backend):
    """What another thread holds at the moment of the fork (locks, the switch of the BLAS) must not stop the child."""
    X, y = np.random.default_rng(3).standard_normal((64, 4)), np.arange(64)
    objective = fl.LinearObjective(fl.Softmax(), X, y, backend=backend, n_threads=2)
    W, stop, expected = np.zeros((100, 5)), threading.Event(), everything(backend)

    def busy():
        while not stop.is_set():
            objective.value_and_grad(W)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        outcomes = [run_forked(backend, expected, timeout=10) for _ in range(8)]
    finally:
        stop.set()
        thread.join()
    assert outcomes == ["same"] * 8


@needs_fork
@pytest.mark.parametrize(
    "layer", ["omp", *(pytest.param(name, marks=pytest.mark.full) for name in ("workqueue", "tbb"))]
)
def test_run_time_compilation_is_safe_whatever_the_threading_layer(layer):
    """The first calls of a process, which compile, from four threads at once; then children, which compile others."""
    code = """
import os, threading, numpy as np, fastloss as fl
X, y = np.random.default_rng(0).standard_normal((20000, 20)), np.arange(20000) % 10
W, outcomes = np.linspace(-1, 1, 210).reshape(10, 21), []
def call(loss):
    objective = fl.LinearObjective(loss, X, y, backend="numba", n_threads=2)
    return objective.value_and_grad(W)[0], loss.value(X[:, :10], y, backend="numba", n_threads=2)
threads = [threading.Thread(target=lambda: outcomes.append(call(fl.Softmax()))) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
codes = []
for loss in (fl.Softmax(), fl.Hinge()):
    pid = os.fork()
    if pid == 0:
        found = call(loss)
        os._exit(7 if loss.kind == "hinge" or found == outcomes[0] else 8)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(codes, len(set(outcomes)), len(outcomes))
"""
    root = str(Path(fl.__file__).parents[1])
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FASTLOSS_", "NUMBA_"))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60, check=False,
        env=kept | {"PYTHONPATH": root, "NUMBA_THREADING_LAYER": layer},
    )  # fmt: skip
    assert done.stdout.split("\n")[0] == "[7, 7] 1 4", done.stdout + done.stderr


@needs_fork
@forking
def test_forked_child_uses_one_thread():
    pid = os.fork()
    if pid == 0:
        os._exit(fl.get_num_threads() if fl.get_num_threads() == 1 else 99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


# --- concurrent callers -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_threads", [1, 2])
def test_concurrent_callers(backend, n_threads):
    """Each caller gets its own right results, whatever the others do."""
    problems = [scores_problem(1200 + 37 * k, 10 + 30 * k, np.float64, seed=k) for k in range(4)]

    def call(k):
        scores, y, weight = problems[k % 4]
        objective = fl.LinearObjective(
            fl.Hinge(power=2), scores, y, sample_weight=weight, backend=backend, n_threads=n_threads
        )
        W = np.linspace(-1, 1, scores.shape[1] * (scores.shape[1] + 1)).reshape(scores.shape[1], -1)
        return [
            fl.Softmax().value_and_grad(scores, y, sample_weight=weight, backend=backend, n_threads=n_threads),
            objective.value_and_grad(W),
        ]

    alone = [call(k) for k in range(4)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(call, range(24)))
    for k, found in enumerate(together):
        if backend == "reference":  # its products are BLAS's, on as many threads as BLAS thinks best
            for a, b in zip(found, alone[k % 4], strict=True):
                assert a[0] == pytest.approx(b[0], rel=1e-12)
                np.testing.assert_allclose(a[1], b[1], rtol=1e-9, atol=1e-12)
        else:
            assert bits(found) == bits(alone[k % 4])


@pytest.mark.parametrize("backend", ONE_OF_EACH)
def test_one_objective_serves_several_threads(backend):
    scores, y, _ = scores_problem(5000, 10, np.float32)
    objective = fl.LinearObjective(fl.Softmax(), scores, y, backend=backend)
    candidates = [np.random.default_rng(k).standard_normal((10 + k % 3, 11)) for k in range(12)]
    alone = bits([objective.value_and_grad(W) for W in candidates])
    with ThreadPoolExecutor(4) as pool:
        assert bits(list(pool.map(objective.value_and_grad, candidates))) == alone


def test_use_backend_is_of_one_thread():
    """`use_backend` in one thread leaves the others alone."""
    inside, done, found = threading.Event(), threading.Event(), []

    def other():
        inside.wait(10)
        found.append(fl.Softmax().value([[1.0, 2.0]], [0], backend=BACKENDS[0]))
        found.append(fl.Softmax().value([[1.0, 2.0]], [0]))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with fl.use_backend("reference"):
        inside.set()
        assert done.wait(10)
    thread.join()
    assert found[0] == found[1] or BACKENDS[0] == "reference" or os.environ.get("FASTLOSS_BACKEND")


def blas_threads():
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


def many_classes(n_threads=2):
    """An objective whose products are BLAS's, with weights for it."""
    X, y = np.random.default_rng(4).standard_normal((835, 100)), np.arange(835) % 100
    return fl.LinearObjective(fl.Softmax(), X, y, n_threads=n_threads), np.linspace(-1, 1, 10_100).reshape(100, 101)


def test_blas_gets_its_threads_back():
    objective, W = many_classes()
    before = blas_threads()
    objective.value_and_grad(W)
    assert blas_threads() == before
    with pytest.raises(ValueError, match="W has shape"):
        objective.value_and_grad(W[:, 1:])
    assert blas_threads() == before


def test_blas_gets_its_threads_back_after_concurrent_calls():
    """Whichever call is the last to end, in whichever thread."""
    objective, W = many_classes()
    before = blas_threads()
    for _ in range(5):
        with ThreadPoolExecutor(2) as pool:
            others = [pool.submit(objective.value_and_grad, W) for _ in range(8)]
            objective.value_and_grad(W)
            for other in others:
                other.result()
        assert blas_threads() == before


@pytest.mark.parametrize("n_threads", [1, 3])
def test_inside_a_call_blas_has_one_thread_and_no_more_of_ours_than_asked_for(n_threads):
    blocks.one_blas_thread.look_again()  # a test before may have loaded SciPy's
    before, running = blas_threads(), threading.active_count()
    with blocks.Workers(n_threads) as workers:
        seen = workers.run(lambda part: (blas_threads(), threading.active_count()), list(range(20)))
    for numbers, active in seen:
        assert set(numbers) == {1}
        assert active <= running + n_threads - 1
    assert blas_threads() == before


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_blas_gets_its_threads_back_after_an_error(n_threads, error):
    before, done = blas_threads(), []

    def task(part):
        if part == 4:
            raise error
        done.append(part)

    with pytest.raises(error), blocks.Workers(n_threads) as workers:
        workers.run(task, list(range(1000)))
    assert blas_threads() == before
    assert len(done) < 1000, "what was left is not begun"


class Library:
    """A BLAS, with a number of threads for the process, or one for each thread."""

    def __init__(self, per_thread):
        self.kept = threading.local() if per_thread else type("", (), {})()

    def get_num_threads(self):
        return getattr(self.kept, "number", 8)

    def set_num_threads(self, number):
        self.kept.number = number


def test_numbers_of_each_thread_and_of_the_process_are_put_back():
    """Two callers at a time; the first to begin is the first to end."""
    shared, own = Library(False), Library(True)
    assert not blocks.has_number_of_each_thread(shared)
    assert blocks.has_number_of_each_thread(own)
    switch = blocks.BlasSwitch()
    switch._libraries = ([shared], [own])
    began, ended, found = threading.Event(), threading.Event(), []

    def second():
        own.set_num_threads(3)
        with switch():
            found.append((shared.get_num_threads(), own.get_num_threads()))
            began.set()
            ended.wait(10)
            found.append((shared.get_num_threads(), own.get_num_threads()))
        found.append((shared.get_num_threads(), own.get_num_threads()))

    shared.set_num_threads(6)
    own.set_num_threads(5)
    thread = threading.Thread(target=second)
    with switch():
        thread.start()
        assert began.wait(10)
        assert (shared.get_num_threads(), own.get_num_threads()) == (1, 1)
    assert (shared.get_num_threads(), own.get_num_threads()) == (1, 5), "another call is under way"
    ended.set()
    thread.join()
    assert found == [(1, 1), (1, 1), (6, 3)]
    assert (shared.get_num_threads(), own.get_num_threads()) == (6, 5)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_same_bits_in_any_python_thread(n_threads):
    """The products are single-threaded, and so the same, whichever thread calls, and whoever called before."""
    objective, W = many_classes(n_threads)
    expected = bits(objective.value_and_grad(W))
    for _ in range(3):
        with ThreadPoolExecutor(1) as pool:
            assert bits(pool.submit(objective.value_and_grad, W).result()) == expected
        assert bits(objective.value_and_grad(W)) == expected
        with ThreadpoolController().limit(limits=1, user_api="blas"), ThreadPoolExecutor(1) as pool:
            assert bits(pool.submit(objective.value_and_grad, W).result()) == expected


def test_threads_do_not_outlive_a_call():
    X, y = np.random.default_rng(5).standard_normal((3000, 8)), np.arange(3000) % 100
    objective = fl.LinearObjective(fl.Softmax(), X, y, n_threads=3)
    before = threading.active_count()
    objective.value_and_grad(np.zeros((100, 9)))
    for _ in range(100):
        if threading.active_count() <= before:
            return
        time.sleep(0.01)
    raise AssertionError("threads of the call are still there")
