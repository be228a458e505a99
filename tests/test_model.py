"""The model: predictions by chunks, and the file it is kept in."""

import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

import fastloss as fl
from fastloss.data import DataError, standard
from fastloss.model import LinearModel, predict


@pytest.fixture
def model():
    rng = np.random.default_rng(0)
    return LinearModel(
        rng.normal(size=(4, 7)).astype(np.float32), ("a", "b", "Zürich", "d"), shift=rng.normal(size=6),
        scale=rng.uniform(1, 2, size=6), loss="Softmax(), L2(0.1)", image_shape=(1, 2, 3),
    )  # fmt: skip


def expected_scores(model, X):
    return ((X - model.shift) / model.scale) @ model.W[:, :-1].astype(float).T + model.W[:, -1]


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64, np.int64])
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 1000])
@pytest.mark.parametrize("chunk", [1 << 20, 6 * 16])
def test_scores_by_chunks(monkeypatch, model, dtype, n, chunk):
    monkeypatch.setattr(standard, "CHUNK_VALUES", chunk)
    X = np.random.default_rng(1).integers(0, 5, size=(n, 6)).astype(dtype)
    scores = model.scores(X)
    assert scores.shape == (n, 4)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected_scores(model, X.astype(float)), rtol=0, atol=2e-5)
    np.testing.assert_array_equal(model.predict(X), scores.argmax(axis=1))
    y = np.random.default_rng(2).integers(4, size=n)
    if n:
        assert model.accuracy(X, y) == np.mean(scores.argmax(axis=1) == y)
    else:
        assert np.isnan(model.accuracy(X, y))


def test_layouts_and_threads(model):
    X = np.random.default_rng(1).normal(size=(300, 6)).astype(np.float32)
    scores = model.scores(X)
    wide = np.zeros((300, 12), np.float32)
    wide[:, ::2] = X
    for same in (np.asfortranarray(X), wide[:, ::2], X[::-1][::-1], X.tolist()):
        np.testing.assert_allclose(model.scores(same), scores, rtol=0, atol=1e-6)
    before = fl.get_num_threads()
    try:
        for n_threads in (1, 2, 3, 5):
            fl.set_num_threads(n_threads)
            assert model.scores(X).tobytes() == scores.tobytes()
    finally:
        fl.set_num_threads(before)


def test_predictions_take_little_memory():
    X = np.zeros((40_000, 1000), np.uint8)
    model = LinearModel(np.zeros((3, 1001), np.float32), ("a", "b", "c"), scale=np.ones(1000))
    before = fl.get_num_threads()
    fl.set_num_threads(2)
    tracemalloc.start()
    try:
        model.predict(X)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        fl.set_num_threads(before)
    assert peak < X.nbytes  # all of X in float32 would be four times this


def test_the_lowest_class_wins_a_tie():
    assert predict(np.ones((3, 2)), np.ones((4, 2)), None).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"W": np.zeros(3)}, ValueError, r"W has shape \(3,\)"),
        ({"W": np.zeros((2, 0))}, ValueError, r"W has shape \(2, 0\)"),
        ({"W": np.full((2, 4), np.nan)}, ValueError, r"W\[0\] is nan"),
        ({"class_names": ("a",)}, ValueError, "it must hold 2 names"),
        ({"class_names": (1, 2)}, ValueError, "it must hold 2 names"),
        ({"shift": np.zeros(2)}, ValueError, r"shift has shape \(2,\); it must be \(3,\)"),
        ({"scale": np.array([1, 0, 1])}, ValueError, "scale holds 0"),
        ({"scale": np.array([1, np.inf, 1])}, ValueError, r"scale\[1\] is inf"),
        ({"loss": 3}, TypeError, "loss is 3"),
        ({"image_shape": (2, 2)}, ValueError, r"image_shape is \(2, 2\); its product must be 3"),
    ],
)
def test_parts_that_do_not_fit(changes, error, message):
    with pytest.raises(error, match=message):
        LinearModel(**({"W": np.zeros((2, 4)), "class_names": ("a", "b")} | changes))


def test_bad_features(model):
    with pytest.raises(ValueError, match=r"X has shape \(2, 5\); it must be \(N, 6\)"):
        model.predict(np.zeros((2, 5)))
    with pytest.raises(ValueError, match=r"X has shape \(6,\)"):
        model.scores(np.zeros(6))
    with pytest.raises(ValueError, match=r"y has shape \(3,\) .* must be \(2,\)"):
        model.accuracy(np.zeros((2, 6)), np.zeros(3, int))
    with pytest.raises(ValueError, match="dtype float64"):
        model.accuracy(np.zeros((2, 6)), np.zeros(2))


# --- files --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("plain", [False, True])
def test_save_and_load(model, tmp_path, plain):
    if plain:
        model = LinearModel(model.W.astype(np.float64), model.class_names)
    path = tmp_path / "model"  # written as named, without an ending added
    model.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    found = LinearModel.load(path)
    for name in ("W", "shift", "scale"):
        np.testing.assert_array_equal(getattr(found, name), getattr(model, name))
    assert found.W.dtype == model.W.dtype
    assert (found.class_names, found.loss, found.image_shape) == (model.class_names, model.loss, model.image_shape)
    with np.load(path, allow_pickle=False) as archive:
        assert all(archive[name].dtype != object for name in archive.files)


def test_a_failed_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "model.npz"
    model.save(path)
    before = path.read_bytes()

    def fail(file, **_):
        file.write(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="No space left"):
        model.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.npz"]


def test_what_a_killed_writer_left_is_cleared(model, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    gone, at_work = (f".model.npz.{pid}.tmp" for pid in (ended.pid, os.getppid()))
    names = {gone, at_work, f".other.npz.{ended.pid}.tmp", ".model.npz.x.tmp"}
    for name in names:
        (tmp_path / name).touch()
    model.save(tmp_path / "model.npz")
    left = {file.name for file in tmp_path.iterdir()}
    assert left == (names | {"model.npz"}) - {gone}


def test_save_into_no_folder(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such is no folder"):
        model.save(tmp_path / "no such" / "model.npz")


def test_a_model_cut_short(model, tmp_path):
    path = tmp_path / "model.npz"
    model.save(path)
    good = path.read_bytes()
    for k in range(0, len(good), 11):
        path.write_bytes(good[:k])
        with pytest.raises(DataError, match=r"model\.npz"):
            LinearModel.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, "format is missing"),
        ({"W": None}, "W is missing"),
        ({"format": np.array("fastloss.LinearModel 99")}, "has the format 'fastloss.LinearModel 99'; expected"),
        ({"W": np.zeros((5, 7))}, "is no model of fastloss: class_names"),
        ({"W": np.array([[None]], object)}, "without pickles"),
        ({"W": np.array("text")}, "is no model of fastloss: W has dtype"),
        ({"class_names": np.array("abcd")}, r"is no model of fastloss: class_names has shape \(\)"),
        ({"class_names": np.arange(4)}, "is no model of fastloss: class_names"),
        ({"scale": np.zeros(6)}, "is no model of fastloss: scale holds 0"),
        ({"image_shape": np.array(6)}, r"is no model of fastloss: image_shape has shape \(\)"),
        ({"image_shape": np.array([1.5, 4])}, "is no model of fastloss: image_shape is 1.5"),
    ],
)
def test_foreign_files(model, tmp_path, changes, message):
    path = tmp_path / "model.npz"
    model.save(path)
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files} | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    with pytest.raises(DataError, match=rf"model\.npz .*{message}"):
        LinearModel.load(path)


def test_provenance_is_kept(tmp_path, model):
    kept = LinearModel(model.W, model.class_names, provenance={"data": "Zürich", "seed": "3"})
    kept.save(tmp_path / "model.npz")
    found = LinearModel.load(tmp_path / "model.npz").provenance
    assert dict(found) == {"data": "Zürich", "seed": "3"}
    with pytest.raises(TypeError):
        found["data"] = "elsewhere"
    assert dict(model.provenance) == {}
    for bad in ({"seed": 3}, "text", {1: "a"}):
        with pytest.raises(TypeError, match=r"provenance is .*; it must be a dict of text"):
            LinearModel(model.W, model.class_names, provenance=bad)


def test_models_of_before_provenance_are_read(tmp_path, model):
    model.save(tmp_path / "model.npz")
    with np.load(tmp_path / "model.npz") as archive:
        arrays = {name: archive[name] for name in archive.files if name != "provenance"}
    np.savez(tmp_path / "old.npz", **arrays)
    assert dict(LinearModel.load(tmp_path / "old.npz").provenance) == {}
    np.savez(tmp_path / "bad.npz", **arrays, provenance="[1")
    with pytest.raises(DataError, match=r"bad\.npz is no model of fastloss"):
        LinearModel.load(tmp_path / "bad.npz")
