"""What is shipped: examples run, the sdist builds on its own, wheels hold what is needed and no sources of kernels."""

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import fastloss

ROOT = Path(__file__).parents[1]


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Standard output of a command; all that it printed is in the error if it fails."""
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if not name.startswith("FASTLOSS_")} | environment,
    )  # fmt: skip
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_version_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert fastloss.__version__ == project["version"]


def test_the_example_in_the_readme_runs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


@pytest.mark.full
def test_sdist_has_all_that_a_wheel_is_made_of(tmp_path):
    run(sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = [path for folder in ("fastloss", "src_ext") for path in (ROOT / folder).rglob("*") if path.is_file()]
    sources = {str(path.relative_to(ROOT)) for path in files if path.suffix not in (".pyc", ".so", ".pyd")}
    assert sources
    assert sources | {"CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"} <= names


@pytest.mark.full
def test_wheel_from_the_sdist_alone_works_in_a_fresh_environment(tmp_path):
    run(sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / sdist.name.removesuffix(".tar.gz")
    # One level, without much optimisation, is enough here: the real build takes minutes, and came before the tests.
    level = fastloss.backends.get("cython").name.removeprefix("cython-")
    command = sys.executable, "-m", "build", "--wheel", "-Ccmake.build-type=Debug", "--outdir", tmp_path, source
    run(*command, cwd=tmp_path, FASTLOSS_LEVELS=level)
    (wheel,) = tmp_path.glob("*.whl")

    names = zipfile.ZipFile(wheel).namelist()
    assert [n for n in names if n.endswith((".pyx", ".pxi", ".pxd", ".c", ".h"))] == []
    assert {"fastloss/py.typed", "fastloss/cli.py", "fastloss/bench/report.html.j2"} <= set(names)
    assert any(n.startswith("fastloss/_kernels/") and n.endswith((".so", ".pyd")) for n in names)

    venv.create(tmp_path / "env", with_pip=True)
    (python,) = (tmp_path / "env").glob("bin/python")
    run(python, "-m", "pip", "install", wheel, cwd=tmp_path)
    code = "import fastloss as fl; print(round(fl.Hinge().value([[3.2, 5.1, -1.7]], [0], backend='cython'), 6))"
    assert run(python, "-I", "-c", code, cwd=tmp_path).strip() == "2.9"
    assert run(tmp_path / "env/bin/fastloss", "--version", cwd=tmp_path).strip() == f"fastloss {fastloss.__version__}"


NO_COMPILER = {"CC": "/no/compiler", "CXX": "/no/compiler", "CMAKE_EXECUTABLE": "/no/cmake", "FASTLOSS_NO_EXT": "1"}

REAL_CALLS = """
import json, math, warnings
warnings.simplefilter("error")
import numpy as np, fastloss as fl
from fastloss.train import sgd
scores, y = np.array([[3.2, 5.1, -1.7], [1.3, 4.9, 2.0], [2.2, 2.5, -3.1]]), np.array([0, 1, 2])
value, gradient = fl.Softmax().value_and_grad(scores, y)
wanted, wanted_gradient = fl.Softmax().value_and_grad(scores, y, backend="reference")
X = np.random.default_rng(0).integers(0, 256, (500, 33), dtype=np.uint8)
data = fl.Softmax(), X, np.arange(500) % 7
scaled = {"shift": np.full(33, 128.0), "scale": np.full(33, 64.0)}
objective, named = (fl.LinearObjective(*data, **scaled, backend=backend) for backend in (None, "reference"))
W = np.random.default_rng(1).normal(size=(7, 34)).astype(np.float32)
result = sgd(objective, epochs=2, batch_size=50, step_size=0.01, seed=0)
print(json.dumps({
    "hinge": fl.Hinge().value(scores, y, reduction="none").tolist(),
    "softmax": bool(abs(value - wanted) < 1e-12 and np.allclose(gradient, wanted_gradient, rtol=1e-12)),
    "softmax rows": bool(np.allclose(fl.softmax(scores.astype("f")).sum(axis=1), 1)),
    "linear": bool(np.allclose(objective.value_and_grad(W)[1], named.value_and_grad(W)[1], rtol=1e-3, atol=1e-5)),
    "trained": bool(result.history["loss"][-1] < math.log(7) * 2),
    "used": fl.backends.choose(None, "gradient", fl.Softmax(), np.dtype("f4"), ()).name,
}))
"""


@pytest.mark.full
def test_pure_python_wheel_needs_no_compiler_and_runs_on_numba(tmp_path):
    """Built in an environment of its own, which has what the build asks for and nothing else."""
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT, cwd=tmp_path, **NO_COMPILER)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert [n for n in names if not n.endswith((".py", ".pyi", ".j2", "py.typed")) and ".dist-info/" not in n] == []
    assert [n for n in names if n.startswith("fastloss/_kernels")] == []
    (metadata,) = (archive.read(n).decode() for n in names if n.endswith(".dist-info/METADATA"))
    assert re.search(r"^Requires-Dist: numba>=[0-9.]+$", metadata, re.MULTILINE)

    venv.create(tmp_path / "env", with_pip=True)
    (python,) = (tmp_path / "env").glob("bin/python")
    run(python, "-m", "pip", "install", wheel, cwd=tmp_path)
    found = json.loads(run(python, "-I", "-c", REAL_CALLS, cwd=tmp_path))
    assert found.pop("hinge") == pytest.approx([2.9, 0, 12.9])
    assert found.pop("used") == "numba"
    assert all(found.values()), found
    info = run(tmp_path / "env/bin/fastloss", "info", cwd=tmp_path)
    assert re.search(r"^kernels +none: .*pure-Python build", info, re.MULTILINE), info
    assert re.search(r"^backend +numba", info, re.MULTILINE), info
