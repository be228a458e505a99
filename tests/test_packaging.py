"""What is shipped: examples run, the sdist builds on its own, wheels hold what is needed and no sources of kernels."""

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


def run(*command: object, cwd: Path) -> str:
    """Standard output of a command; all that it printed is in the error if it fails."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
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
def test_wheel_from_the_sdist_alone_works_in_a_fresh_environment(tmp_path):
    run(sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / sdist.name.removesuffix(".tar.gz")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, source, cwd=tmp_path)
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
