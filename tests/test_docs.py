"""Public docstrings: there for every name, and their examples run."""

import doctest
import importlib
import inspect
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import fastloss as fl

PACKAGE = Path(fl.__file__).parent


def importable(name):
    """An adapter has the name of the library that it needs."""
    _, room, library, *_ = (*name.split("."), "", "")
    return room != "adapters" or find_spec(library) is not None


# By their text, so that none is imported that needs a library which is not there.
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
FINDER = doctest.DocTestFinder(exclude_empty=True)
EXAMPLES = [
    test for name in filter(importable, MODULES) for test in FINDER.find(importlib.import_module(name)) if test.examples
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_examples_run(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = []
    failed, _ = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=output.append)
    assert not failed, "".join(output)


@pytest.mark.parametrize("name", fl.__all__)
def test_every_public_name_is_documented(name):
    """With an example, but for base classes, errors, and what another's example shows."""
    thing = getattr(fl, name)
    assert inspect.getdoc(thing)
    if name not in ("Loss", "Penalty", "BackendError", "BackendWarning", "get_num_threads"):
        where = f"{thing.__module__}.{name}"
        assert any(example.name == where or example.name.startswith(where + ".") for example in EXAMPLES)
    if inspect.isclass(thing) and not issubclass(thing, Exception):
        for method, function in inspect.getmembers(thing, inspect.isfunction):
            assert method.startswith("_") or inspect.getdoc(function), f"{name}.{method}"


def test_parameters_are_documented():
    """Each parameter of a public function stands in its docstring, or the docstring says where it does."""
    for function in (fl.Loss.value, fl.linear_value_and_grad, fl.softmax, fl.LinearObjective):
        text = inspect.getdoc(function)
        for parameter in inspect.signature(function).parameters:
            if parameter not in ("self", "backend", "n_threads"):
                assert parameter in text, f"{function.__name__}: {parameter}"


def test_all_is_complete():
    public = {name for name, thing in vars(fl).items() if not name.startswith("_") and not inspect.ismodule(thing)}
    assert public == set(fl.__all__)


@pytest.mark.parametrize("name", ["index", "tour", "losses", "linear", "threads", "backends", "demo"])
def test_guides_run(name):
    """Every block of Python in a guide, one after the other. Those of the adapters run with the adapters' tests."""
    text = (PACKAGE.parent / "docs" / f"{name}.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, f"docs/{name}.md", "exec"), names)


def test_every_guide_and_module_is_in_the_site():
    docs = PACKAGE.parent / "docs"
    for folder in (docs, docs / "api"):
        text = (folder / "index.md").read_text(encoding="utf-8")
        listed = re.findall(r"```{toctree}.*?\n\n(.*?)```", text, re.DOTALL)
        named = {line for block in listed for line in block.split() if "/" not in line}
        assert named == {path.stem for path in folder.glob("*.md")} - {"index"}
    modules = set(re.findall(r"automodule:: (\S+)", "".join(path.read_text() for path in (docs / "api").glob("*.md"))))
    for module in modules:
        assert find_spec(module) or not importable(module)
    for path in (PACKAGE / "adapters").iterdir():
        if not path.name.startswith("_") and path.suffix in (".py", ""):
            assert f"fastloss.adapters.{path.stem}" in modules


def test_the_guide_to_the_lecture_runs(tmp_path, monkeypatch, capsys):
    """Every block of Python in it, one after the other; its figures of trials are made smaller."""
    guide = (Path(__file__).parents[1] / "docs" / "lecture.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        exec(block.replace("n=1000", "n=100"), names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.npz", "pictures.png", "steps.png"]
    assert "happy" in capsys.readouterr().out
    from fastloss import plot

    for name in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", guide, re.MULTILINE):
        assert all(hasattr(plot, function) for function in re.findall(r"\w+", name))
