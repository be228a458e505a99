"""fastloss.adapters.torch beside PyTorch, eager and compiled: forward and backward pass, a fresh gradient each time.

`pytest benchmarks/test_torch_adapter.py`; the memory that each of them needs at most:
`pytest benchmarks/test_torch_adapter.py -k memory -s`.
"""

import resource
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason='the adapter needs PyTorch: pip install "fastloss[torch]"')

import fastloss as fl  # noqa: E402
from fastloss.adapters import torch as adapter  # noqa: E402

SHAPES = [(128, 10), (65536, 10), (16384, 1000), (2048, 32768)]
LAYERS = [(50000, 3072, 10), (4096, 512, 32768)]
LARGE = [*SHAPES[2:], (65536, 64, 64), LAYERS[1]]
FUNCTIONS = {"fastloss": adapter, "PyTorch": torch.nn.functional}


def problem(name, shape, dtype=torch.float32):
    """Tensors that gradients are wanted of, and the target."""
    torch.manual_seed(0)
    n, *d, c = shape
    sizes = [(n, d[0]), (c, d[0])] if d else [(n, c)]
    return [torch.randn(size, dtype=dtype).requires_grad_() for size in sizes], torch.randint(0, c, (n,))


def step(loss, leaves, target):
    return torch.autograd.grad(loss(*leaves, target), leaves)


@pytest.mark.benchmark(min_rounds=5, max_time=1)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's compiler, of its own code
@pytest.mark.parametrize("peer", ["fastloss", "PyTorch", "torch.compile"])
@pytest.mark.parametrize("shape", [*SHAPES, *LAYERS], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", ["cross_entropy", "multi_margin_loss"])
def test_forward_and_backward(benchmark, name, shape, peer):
    if len(shape) == 3:
        name = "linear_" + name
    if peer != "fastloss" and not hasattr(torch.nn.functional, name):
        pytest.skip(f"this PyTorch has no {name}")
    loss = getattr(FUNCTIONS.get(peer, torch.nn.functional), name)
    if peer == "torch.compile":
        torch._dynamo.reset()
        loss = torch.compile(lambda *tensors, loss=loss: loss(*tensors), fullgraph=True, dynamic=False)
    torch.set_num_threads(fl.get_num_threads())
    leaves, target = problem(name, shape)
    benchmark.group = f"{name} {'x'.join(map(str, shape))}"
    for _ in range(2):
        step(loss, leaves, target)
    benchmark(step, loss, leaves, target)


def peak_growth(peer, name, shape):
    """By how many bytes a step raises the peak memory of this process."""
    leaves, target = problem(name, shape)
    small, few = problem(name, (4, *shape[1:-1], 4))
    step(getattr(FUNCTIONS[peer], name), small, few)  # what is loaded once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(getattr(FUNCTIONS[peer], name), leaves, target)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is told in other units there")
@pytest.mark.parametrize("shape", LARGE, ids=lambda shape: "x".join(map(str, shape)))
def test_peak_memory_is_below_that_of_pytorch(shape):
    """Each in a process of its own."""
    name = "linear_cross_entropy" if len(shape) == 3 else "cross_entropy"
    if not hasattr(torch.nn.functional, name):
        pytest.skip(f"this PyTorch has no {name}")
    found = {}
    for peer in FUNCTIONS:
        command = [sys.executable, __file__, peer, name, *map(str, shape)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[peer] = int(done.stdout)
    print(name, shape, {peer: f"{size / 2**20:.0f} MB" for peer, size in found.items()})
    assert found["fastloss"] < found["PyTorch"]


if __name__ == "__main__":
    print(peak_growth(sys.argv[1], sys.argv[2], tuple(map(int, sys.argv[3:]))))
