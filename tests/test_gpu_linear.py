"""The linear layer on a GPU, without one: in numba-cuda's simulator, in processes of their own; and what its kernels
compile to."""

import itertools
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import fastloss as fl

pytest.importorskip("numba_cuda")

from fastloss.gpu import device, features, scores
from fastloss.jit import rowmath
from tests.conftest import one_core
from tests.test_ptx import CAPABILITIES, assemble


@pytest.mark.parametrize(
    "check",
    [
        pytest.param("check_chunks", marks=pytest.mark.full),
        *["check_objectives", "check_hessian", "check_sums", "check_host", "check_memory", "check_exact_scores"],
        *["check_errors", "check_rescale"],
    ],
)
def test_in_the_simulator(check):
    root = str(Path(fl.__file__).parents[1])
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": root}
    command = [sys.executable, "-P", "-W", "ignore", str(Path(__file__).with_name("simulated_linear.py")), check]
    with one_core():
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "all is well" in run.stdout


@pytest.mark.parametrize(("team", "threads"), [(2, 32), (32, 64), (64, 128), (96, 96)])
def test_rows_are_reduced_by_warps(team, threads):
    """What the simulator has a twin of: each row gets its own threads' states, however many warps they are."""
    shuffled, shared, barrier = [None] * threads, {}, threading.Barrier(threads)
    found, numbers = [None] * threads, np.random.default_rng(0).integers(0, 1000, threads)

    def work(t):
        def swap(x, k):
            barrier.wait()
            shuffled[t] = x
            barrier.wait()
            return shuffled[t ^ k]

        reduce = device.by_warps(
            lambda a, b: (a[0] + b[0], max(a[1], b[1])), swap, lambda s, at: s[at], shared_write, barrier.wait,
            lambda a, b: a // b, lambda function: function,
        )  # fmt: skip
        found[t] = reduce(shared, (numbers[t], numbers[t]), (0, 0), t, team)

    def shared_write(s, at, x):
        s[at] = x

    workers = [threading.Thread(target=work, args=(t,)) for t in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    rows = numbers.reshape(-1, team)
    assert found == [(row.sum(), row.max()) for row in rows for _ in range(team)]
    assert len(shared) <= device.SCRATCH


def layer(loss, dtype, kind, c, d, **how):
    plan = scores.Plan(rowmath.plan_of(loss, False), dtype)
    return features.Layer(plan, kind, c, features.width(d), **how)


LAYERS = {
    "softmax float32": layer(fl.Softmax(), "float32", "float32", 10, 3072),
    "softmax uint8, centred": layer(fl.Softmax(), "float32", "uint8", 10, 3072, centred=True),
    "hinge bfloat16, picked": layer(fl.Hinge(), "float32", "bfloat16", 3, 784, picked=True),
    "options float16": layer(
        fl.Softmax(label_smoothing=0.1, class_weight=np.ones(10), softcap=3.0), "float32", "float16", 10, 784
    ),
    "hinge max float64": layer(fl.Hinge(over="max"), "float64", "float64", 10, 784),
    "value alone": layer(fl.Softmax(), "float32", "float32", 10, 3072, gradient=False),
}  # fmt: skip


#: What `make test` compiles: these take longest to compile.
FEW = {("softmax uint8, centred", (8, 0)), ("hinge bfloat16, picked", (10, 0))}
GRID = [
    pytest.param(*case, marks=() if case in FEW else pytest.mark.full)
    for case in itertools.product(LAYERS, CAPABILITIES)
]


@pytest.mark.parametrize(("name", "cc"), GRID, ids=str)
def test_the_pass(name, cc, tmp_path):
    of = LAYERS[name]
    text = features.pass_kernel(of).ptx(cc)
    assert f".target sm_{cc[0]}{cc[1]}" in text
    # A tile's dot products of the classes that are summed at a time, and the numbers of dW: none of them in a call, or
    # a loop of their own. (The loop over such groups of classes may stay one.)
    products = 4 * (features.groups(of.classes, of.plan.dtype)[0] + of.classes * of.width * of.gradient)
    assert len(re.findall(r"fma\.rn\.f(?:32|64)", text)) >= products
    assert "atom" not in "".join(line for line in text.splitlines() if ".f32" in line or ".f64" in line)
    registers, spilled = assemble(text, cc, tmp_path)
    assert max(spilled) <= 64, spilled  # of the row losses; dW and the sums of a tile stay in registers
    assert registers * features.THREADS <= 1 << 16


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_smaller_kernels_compile(dtype):
    real = "float64" if dtype == "float64" else "float32"
    for kernel in (
        features.prepare_kernel(dtype, dtype, real), features.finish_kernel(real, dtype, dtype),
        features.penalise_kernel(dtype), features.rescale_kernel(dtype), features.pick_kernel("int64"),
        features.pick_kernel(real), features.add_up_kernel(),
    ):  # fmt: skip
        assert ".visible .entry" in kernel.ptx((9, 0))


def test_what_is_fused():
    assert features.fits(10, 3072, "float32")
    assert features.fits(2, 15000, "float32")
    assert not features.fits(10, 4000, "float32")
    assert not features.fits(65, 1, "float32")
    assert not features.fits(10, 3072, "float64")
    assert features.groups(10, "float32") == (10, 1)
    assert features.groups(23, "float32") == (8, 3)


@pytest.mark.parametrize("count", [4, 12, 40])
def test_sums_over_the_lanes_of_a_warp(count):
    """The butterfly that scatters as it adds, on 32 lanes at once: each sum is made once, and is complete."""
    source, kept = features._lane_sums(count) if features.LANES == 32 else pytest.skip("in the simulator")
    numbers = np.random.default_rng(0).integers(0, 100, (32, count)).astype(float)
    found = {}


    lanes = np.arange(32)
    # Lane by lane would need threads: all at once, conditions become np.where.
    scope = {"shuffle": lambda x, k: np.broadcast_to(x, 32)[lanes ^ k], "zero": 0.0, "where": np.where}
    source = re.sub(r"up = t & (\d+)", r"up = (t & \1) != 0", source)
    source = re.sub(r"\((\S+) if up else (\S+)\)", r"where(up, \1, \2)", source)
    source = re.sub(r"shuffle\((\S+) if up else (\S+), (\d+)\)", r"shuffle(where(up, \1, \2), \3)", source)
    source = re.sub(r"first \+= (\d+) if up else 0", r"first = first + where(up, \1, 0)", source)
    source = re.sub(r"size = (.*) if up else (.*)", r"size = where(up, \1, \2)", source)
    scope |= {"max": np.maximum, "min": np.minimum}
    exec(source, scope)
    sums, first, size = scope["sums"](lanes, [numbers[:, i] for i in range(count)])
    for i in range(kept):
        for lane in range(32):
            e = int(first[lane]) + i
            if i < size[lane]:
                found.setdefault(e, []).append(np.broadcast_to(sums[i], 32)[lane])
    assert sorted(found) == list(range(count))
    for e, values in found.items():
        assert values == [numbers[:, e].sum()]
