"""`fastloss lecture`: the story's numbers against the definitions, and a page that needs nothing else."""

import math
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

import fastloss as fl
from fastloss import cli, data, lecture, train


@pytest.fixture(scope="module")
def story():
    """The story of some digits, with few trials."""
    digits = data.load_digits()
    some = data.Dataset(
        digits.X_train[:300], digits.y_train[:300], digits.X_test, digits.y_test, digits.class_names, (8, 8), "digits"
    )
    told = lecture.Lecture(some, tries=30, seeds=3)
    return told, {section.title: section for section in told.sections()}


def numbers(text):
    return [float(x) for x in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", text)]


def test_every_part_is_there(story):
    _, sections = story
    assert len(sections) == 9
    for section in sections.values():
        assert section.text
        assert section.seconds > 0
        for table in section.tables:
            assert all(len(row) == len(table.header) for row in table.rows)
        for picture in section.pictures:
            assert picture.png.startswith(b"\x89PNG")
            assert picture.caption.endswith(".")


def test_the_lectures_images(story):
    rows = story[1]["Two losses"].tables[0].rows
    assert [row[-2] for row in rows] == ["2.9", "0.0", "12.9", "5.27"]
    assert rows[0][-1] == "2.04"


def test_the_start_is_c_minus_1_and_ln_c(story):
    hinge, softmax = story[1]["The loss of an untrained classifier"].tables[0].rows
    assert hinge[1:3] == ("C − 1 = 9.0000", "9.0000")
    assert softmax[1:3] == (f"ln C = {math.log(10):.4f}", f"{math.log(10):.4f}")


def test_searches_are_those_of_the_seeds(story):
    told, sections = story
    mean = told.X.mean(axis=0, dtype=float)
    objective = fl.LinearObjective(fl.Hinge(), told.X - mean, told.y)
    factor = told.raw_scale
    assert math.sqrt(((told.X - mean) ** 2).sum(axis=1).mean()) * factor == pytest.approx(lecture.LENGTH, rel=0.5)
    for row, search, scales in zip(
        sections[lecture.SEARCHES].tables[0].rows,
        (train.random_search, train.random_local_search),
        ((1e-4,), (1e-3, 1e-4)),
        strict=True,
    ):
        results = [search(objective, 30, *(s * factor for s in scales), seed) for seed in range(3)]
        values = sorted(result.value for result in results)
        np.testing.assert_allclose(numbers(row[1]), [values[1], values[0], values[2]], atol=6e-4)
        X = np.c_[told.X_test - mean, np.ones(len(told.X_test))]
        shares = sorted(100 * np.mean((X @ result.W.T).argmax(axis=1) == told.y_test) for result in results)
        np.testing.assert_allclose(numbers(row[2]), [shares[1], shares[0], shares[2]], atol=0.06)


def test_gradients_are_right(story):
    section = story[1]["The gradient, checked"]
    assert all(row[-1] in ("happy", "fine", "kink") for row in section.tables[0].rows)
    assert "softmax: happy" in section.text[1]


def test_descent_learns_and_l1_has_zeros(story):
    for row in story[1]["Stochastic gradient descent"].tables[0].rows:
        assert numbers(row[3])[0] > 85
    none, l2, l1, net, max_norm = story[1]["Regularisation"].tables[0].rows
    assert [row[0] for row in (l2, l1)] == ["L2(strength=0.01)", "L1(strength=0.001)"]
    assert net[0] == "ElasticNet(strength=0.001, beta=10.0)"
    zeros = [numbers(row[3])[0] for row in (none, l2, l1)]
    assert zeros[2] > max(zeros[:2]) + 5
    assert float(l2[4]) < float(none[4])
    assert float(max_norm[4]) == pytest.approx(float(none[4]) / 2, rel=0.1)


@pytest.mark.parametrize("X", [np.ones((20, 3)), np.arange(60.0).reshape(20, 3)], ids=["constant", "one class"])
def test_where_there_is_nothing_to_learn(X):
    y = np.arange(20) % 2 if np.ptp(X) == 0 else np.zeros(20, int)
    some = data.Dataset(X, y, X[:4], y[:4], tuple("ab"[: y.max() + 1]), None, "none.npz")
    sections = {section.title: section for section in lecture.Lecture(some, tries=2, seeds=1).sections()}
    assert sections["Regularisation"].tables[0].rows[-1][0] == "MaxNorm(strength=1.0)"


def test_files_called_like_a_known_data_set_are_not_it(tmp_path):
    np.savez(tmp_path / "cifar10.npz", X=np.eye(3), y=np.arange(3), X_test=np.eye(3), y_test=np.arange(3))
    told = lecture.Lecture(data.load_npz(tmp_path / "cifar10.npz"), tries=1, seeds=1)
    assert told.recipes["softmax"].per_feature
    assert told.raw_scale > 1


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.targets = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.targets += [value for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_nothing_else(capsys, tmp_path):
    rng = np.random.default_rng(0)
    y = rng.integers(3, size=90)
    X = 4 * np.eye(3)[y] + rng.normal(size=(90, 3))
    np.savez(tmp_path / "a & b.npz", X=X[:60], y=y[:60], X_test=X[60:], y_test=y[60:])
    command = ["lecture", "--data", str(tmp_path / "a & b.npz"), "--tries", "5", "--seeds", "2"]
    out = tmp_path / "new" / "page.html"
    assert cli.main([*command, "--out", str(out), "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "a & b.npz: 60 training and 30 test rows of 3 features, 3 classes" in printed
    assert "random local search, best of 5" in printed
    assert f"Written to {out}" in printed
    text = out.read_text(encoding="utf-8")
    page = Links()
    page.feed(text)
    assert all(target.startswith(("data:image/png;base64,", "#part")) for target in page.targets)
    assert "script" not in page.tags
    assert page.tags.count("h2") == 9
    assert "a &amp; b.npz" in text
    assert "max(0, s<sub>j</sub> − s<sub>y</sub> + 1)" in text
    assert ">−1.7<" in text
    assert re.search(r">\d\.\de-\d\d<", text), "exponents stay as they are"
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tries", "0"), "tries is 0; it must be at least 1"),
        (("--seeds", "0"), "seeds is 0"),
        (("--out", "."), "--out . is a folder; name a file"),
        (("--data", "no_test.npz"), "no_test.npz has no test data"),
        (("--data", "nowhere"), "--data nowhere does not exist"),
    ],
)
def test_errors(capsys, monkeypatch, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    np.savez("no_test.npz", X=np.eye(3), y=np.arange(3))
    assert cli.main(["lecture", "--data", "digits", *options]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["no_test.npz"]


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert cli.main(["lecture", "--data", "digits"]) == 2
    assert 'the page needs Jinja2: pip install "fastloss[cli]"' in capsys.readouterr().err


def test_an_interrupt_writes_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def interrupted(*arguments, **options):
        result = train.sgd(*arguments, **options)
        return train.Result(result.W, result.value, result.history, "interrupted")

    monkeypatch.setattr(lecture.train, "random_search", lambda objective, *_, n_classes: interrupted(objective))
    assert cli.main(["lecture", "--data", "digits", "--tries", "1", "--seeds", "1"]) == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
