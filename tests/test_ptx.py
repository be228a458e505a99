"""What the CUDA kernels compile to, without a GPU: wide loads in the PTX, registers and spills by `ptxas -v`.

Some kernels are compiled for one compute capability, one of them for all; the full grid is `make test-all`.
"""

import importlib.util
import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest

INSTALLED = importlib.util.find_spec("numba_cuda") is not None
SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


def find_ptxas():
    """The assembler that was installed beside the compiler: an older one does not know its PTX."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else list(spec.submodule_search_locations)
    found = [path for place in places for path in Path(place).glob("*/bin/ptxas")]
    return found[0] if found else None


PTXAS = find_ptxas() if INSTALLED else None
if not INSTALLED:
    pytest.skip("no CUDA kernel was compiled: numba-cuda is not installed", allow_module_level=True)
if SIMULATED:
    pytest.skip("the simulator compiles nothing", allow_module_level=True)
if PTXAS is None:
    WHY = 'no CUDA kernel was assembled: pip install "cuda-toolkit[nvcc]==13.*" brings ptxas'
    pytest.skip(WHY, allow_module_level=True)

from fastloss.gpu import device, hessian, scores, stats  # noqa: E402
from fastloss.jit.rowmath import Plan as Row  # noqa: E402

CAPABILITIES = [(8, 0), (9, 0), (10, 0)]
KINDS = {
    "softmax": Row("softmax"),
    "options": Row("softmax", general=True, smooths=True, softcap=True, entropy=True, z_loss=True),
    "weights inside": Row("softmax", general=True, weights=True, smooths=True, softcap=True, entropy=True, z_loss=True),
    "probabilities": Row(
        "softmax", general=True, probabilities=True, weights=True, softcap=True, entropy=True, z_loss=True
    ),
    "hinge": Row("hinge"),
    "hinge squared": Row("hinge", power=2, mean=True, pairs=True, counts_target=True),
    "hinge max": Row("hinge max", power=2, pairs=True),
    "logistic": Row("logistic"),
    "logistic, options": Row("logistic", probabilities=True, weights=True, smooths=True, mean=True),
    "p": Row("p"),
    "log p": Row("log p"),
    "lse": Row("lse"),
    "sigmoid": Row("sigmoid"),
}
KERNELS = {"rows": scores.rows_kernel, "long rows": scores.long_rows_kernel}
FEW = {
    *(("rows", kind, "float32", (9, 0)) for kind in ("options", "hinge max")),
    ("long rows", "softmax", "bfloat16", (9, 0)),
    *(("rows", "softmax", "bfloat16", cc) for cc in CAPABILITIES[::2]),
}
GRID = [
    pytest.param(*case, marks=() if case in FEW else pytest.mark.full)
    for case in itertools.product(KERNELS, KINDS, device.REAL, CAPABILITIES)
]


def assemble(ptx, cc, folder):
    """What ptxas says of the kernel: registers, and bytes that are spilled."""
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [PTXAS, "-v", f"-arch=sm_{cc[0]}{cc[1]}", source, "-o", folder / "kernel.cubin"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (registers,) = re.findall(r"Used (\d+) registers", done.stderr)
    spilled = [int(count) for count in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", done.stderr)]
    return int(registers), spilled


@pytest.mark.parametrize(("kernel", "kind", "dtype", "cc"), GRID)
def test_scores_kernels(kernel, kind, dtype, cc, tmp_path):
    plan = scores.Plan(KINDS[kind], dtype, argmax=kind == "options")
    ptx = KERNELS[kernel](plan).ptx(cc)
    assert re.search(r"ld\.global\.(v4\.[bfu]32|v2\.[bfu]64)", ptx), "scores are not loaded in 16 bytes"
    if kind != "lse":
        assert re.search(r"st\.global\.(v4\.[bfu]32|v2\.[bfu]64)", ptx), "gradients are not stored in 16 bytes"
    assert "ld.shared.v" in ptx
    assert not re.search(r"\.local\b|\bcall\.uni.*vprintf", ptx)
    assert not re.search(r"atom\.[a-z.]*\.f(16|32|64)|red\.[a-z.]*\.f(16|32|64)", ptx), "a sum depends on who is first"
    registers, spilled = assemble(ptx, cc, tmp_path)
    assert not any(spilled), spilled
    threads = scores.threads_bound(plan) if kernel == "rows" else device.MOST_THREADS // 2
    assert registers * threads <= 65536
    print(f"{registers} registers")


def check_small(kernel, cc, folder):
    """A kernel of which no number spills, and no float is summed in an order of chance."""
    ptx = kernel.ptx(cc)
    assert not re.search(r"atom\.[a-z.]*\.f(16|32|64)|red\.[a-z.]*\.f(16|32|64)", ptx)
    registers, spilled = assemble(ptx, cc, folder)
    assert not any(spilled), spilled
    assert registers * 256 <= 65536


SHARD = Row("softmax", general=True, weights=True, smooths=True, softcap=True, shard=True)
OF_STATS = {
    "sums": lambda: scores.rows_kernel(scores.Plan(SHARD, "bfloat16")),
    "sums of long rows": lambda: scores.long_rows_kernel(scores.Plan(SHARD, "float32")),
    "complete": lambda: stats.complete_kernel("bfloat16"),
    "merge": stats.merge_kernel,
    "value": stats.value_kernel,
    "rows": lambda: stats.row_kernel("float32"),
    "entries": lambda: stats.entries_kernel(scores.Plan(SHARD, "float32")),
    "entries in 16 bits": lambda: stats.entries_kernel(scores.Plan(SHARD, "float16")),
    "Hessian products": lambda: hessian.kernel(scores.Plan(Row("softmax"), "float32"), True),
    "Hessian products of hinges": lambda: hessian.kernel(
        scores.Plan(Row("hinge max", power=2, pairs=True), "float32"), True
    ),
    "diagonals": lambda: hessian.kernel(scores.Plan(KINDS["weights inside"], "bfloat16"), False),
    "diagonals of hinges": lambda: hessian.kernel(scores.Plan(Row("hinge", power=2, mean=True), "float64"), False),
}  # fmt: skip
#: What `make test` compiles: one for each capability.
FEW_SMALL = {("entries", (8, 0)), ("rows", (9, 0)), ("diagonals", (10, 0))}
SMALL = [
    pytest.param(*case, marks=() if case in FEW_SMALL else pytest.mark.full)
    for case in itertools.product(OF_STATS, CAPABILITIES)
]


@pytest.mark.parametrize(("name", "cc"), SMALL, ids=str)
def test_kernels_of_stats_and_second_derivatives(name, cc, tmp_path):
    check_small(OF_STATS[name](), cc, tmp_path)


@pytest.mark.parametrize("inside", [False, True])
def test_the_kernel_of_weights(inside, tmp_path):
    ptx = scores.weigh_kernel("float32", True, True, True, inside).ptx((9, 0))
    assert not any(assemble(ptx, (9, 0), tmp_path)[1])


def test_the_kernel_that_copies(tmp_path):
    assert not any(assemble(device._copy_kernel("bfloat16").ptx((8, 0)), (8, 0), tmp_path)[1])
