"""The readers: good files, and every kind of bad one."""

import os
import pickle
import sys

import numpy as np
import pytest

from fastloss import data
from fastloss.data import DataError, standard

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def cifar(tmp_path):
    """A folder in CIFAR-10's layout, with 3 records a batch; and the records, all batches in order."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    records = np.random.default_rng(0).integers(256, size=(6, 3, 3073), dtype=np.uint8)
    records[:, :, 0] %= 10
    for k in range(5):
        records[k].tofile(folder / f"data_batch_{k + 1}.bin")
    records[5].tofile(folder / "test_batch.bin")
    (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")  # as in the original
    return folder, records


# --- CIFAR-10 -----------------------------------------------------------------------------------------------------
def test_cifar10(cifar):
    folder, records = cifar
    for path in (folder, folder.parent, str(folder)):
        found = data.load_cifar10(path)
        assert found.X_train.dtype == np.uint8
        assert found.X_train.flags.c_contiguous
        np.testing.assert_array_equal(found.X_train, records[:5].reshape(15, 3073)[:, 1:])
        np.testing.assert_array_equal(found.y_train, records[:5].reshape(15, 3073)[:, 0])
        np.testing.assert_array_equal(found.X_test, records[5, :, 1:])
        np.testing.assert_array_equal(found.y_test, records[5, :, 0])
        assert found.class_names == tuple(NAMES)
        assert found.image_shape == (3, 32, 32)
        assert found.name == "cifar10"


@pytest.mark.parametrize("missing", ["data_batch_1.bin", "data_batch_4.bin", "test_batch.bin", "batches.meta.txt"])
def test_cifar10_with_a_file_missing(cifar, missing):
    (cifar[0] / missing).unlink()
    with pytest.raises(DataError, match=missing):
        data.load_cifar10(cifar[0])


@pytest.mark.parametrize("size", [0, 1, 3072, 3074, 3 * 3073 - 1])
@pytest.mark.parametrize("name", ["data_batch_2.bin", "test_batch.bin"])
def test_cifar10_truncated(cifar, name, size):
    (cifar[0] / name).write_bytes(bytes(size))
    with pytest.raises(DataError, match=rf"{name} has {size} bytes; expected records of 3073 bytes"):
        data.load_cifar10(cifar[0])


def test_cifar10_foreign(cifar):
    folder, records = cifar
    records[2, 1, 0] = 10
    records[2].tofile(folder / "data_batch_3.bin")
    with pytest.raises(DataError, match=r"data_batch_3.bin: record 1 has the label 10; CIFAR-10's are 0 to 9"):
        data.load_cifar10(folder)


@pytest.mark.parametrize(
    ("text", "message"), [(b"cat\ndog\n", "holds 2 names"), (b"\xff\xfe\x00", "is no text")], ids=["few", "binary"]
)
def test_cifar10_bad_names(cifar, text, message):
    (cifar[0] / "batches.meta.txt").write_bytes(text)
    with pytest.raises(DataError, match=rf"batches.meta.txt {message}"):
        data.load_cifar10(cifar[0])


def test_cifar10_elsewhere(tmp_path):
    with pytest.raises(DataError, match=r"holds neither data_batch_1\.bin nor cifar-10-batches-bin"):
        data.load_cifar10(tmp_path)


def test_find_cifar10(cifar, tmp_path, monkeypatch):
    monkeypatch.delenv("FASTLOSS_DATA", raising=False)
    assert data.find_cifar10() is None
    for path in (cifar[0], cifar[0].parent):
        monkeypatch.setenv("FASTLOSS_DATA", str(path))
        assert data.find_cifar10() == cifar[0]
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("FASTLOSS_DATA", str(empty))
    assert data.find_cifar10() is None
    monkeypatch.setenv("FASTLOSS_DATA", str(tmp_path / "no such"))
    with pytest.raises(DataError, match=r"FASTLOSS_DATA is .*no such"):
        data.find_cifar10()


# --- CIFAR-10, Python version -------------------------------------------------------------------------------------
class Python2Array:
    """Pickled as Python 2 pickled NumPy arrays: protocol 2, names of old modules, strings of bytes."""

    def __init__(self, array):
        self.array = array

    def write(self, out):
        """GLOBAL, arguments and REDUCE for the array, then for its type, then BUILD."""
        out.write(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R")
        n, d = self.array.shape
        out.write(b"(K\x01" + b"M" + n.to_bytes(2, "little") + b"M" + d.to_bytes(2, "little") + b"\x86")
        out.write(b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb")
        content = self.array.tobytes()
        out.write(b"\x89T" + len(content).to_bytes(4, "little") + content + b"tb")


def write_python2(path, records):
    """A batch as the files of the Python version are: {'data': array, 'labels': list, 'batch_label': text}."""
    with path.open("wb") as out:
        out.write(b"\x80\x02}(U\x04data")
        Python2Array(np.ascontiguousarray(records[:, 1:])).write(out)
        out.write(b"U\x06labels](" + b"".join(b"K" + bytes([label]) for label in records[:, 0]) + b"e")
        out.write(b"U\x0bbatch_labelU\x06a testu.")


@pytest.fixture
def python_cifar(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    records = np.random.default_rng(0).integers(256, size=(6, 3, 3073), dtype=np.uint8)
    records[:, :, 0] %= 10
    for k in range(5):
        write_python2(folder / f"data_batch_{k + 1}", records[k])
    write_python2(folder / "test_batch", records[5])
    names = b"".join(b"U" + bytes([len(name)]) + name.encode() for name in NAMES)
    (folder / "batches.meta").write_bytes(b"\x80\x02}U\x0blabel_names](" + names + b"es.")
    return folder, records


def test_the_fixture_is_what_python_reads(python_cifar):
    with open(python_cifar[0] / "data_batch_1", "rb") as file:
        found = pickle.load(file, encoding="bytes")
    np.testing.assert_array_equal(found[b"data"], python_cifar[1][0, :, 1:])


def test_cifar10_python_version(python_cifar, monkeypatch):
    folder, records = python_cifar
    for path in (folder, folder.parent):
        found = data.load_cifar10(path)
        assert found.X_train.dtype == np.uint8
        np.testing.assert_array_equal(found.X_train, records[:5].reshape(15, 3073)[:, 1:])
        np.testing.assert_array_equal(found.y_train, records[:5].reshape(15, 3073)[:, 0])
        np.testing.assert_array_equal(found.X_test, records[5, :, 1:])
        assert (found.class_names, found.name, found.image_shape) == (tuple(NAMES), "cifar10", (3, 32, 32))
    monkeypatch.setenv("FASTLOSS_DATA", str(folder.parent))
    assert data.find_cifar10() == folder
    (folder / "data_batch_4").unlink()
    with pytest.raises(DataError, match="data_batch_4 is missing"):
        data.load_cifar10(folder)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_python_3(python_cifar, protocol):
    folder, records = python_cifar
    batch = {"data": np.asfortranarray(records[0, :, 1:]), "labels": records[0, :, 0].tolist()}
    (folder / "data_batch_1").write_bytes(pickle.dumps(batch, protocol))
    if protocol < 5:
        np.testing.assert_array_equal(data.load_cifar10(folder).X_train[:3], records[0, :, 1:])
    else:  # NumPy has other functions called there
        with pytest.raises(DataError, match="it names numpy"):
            data.load_cifar10(folder)


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("function", [os.mkdir, eval, exec, getattr, np.load, np.zeros], ids=lambda f: f.__name__)
def test_nothing_in_a_pickle_is_executed(python_cifar, monkeypatch, tmp_path, function, protocol):
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps({"data": Evil(function, "made"), "labels": []}, protocol)
    (python_cifar[0] / "data_batch_2").write_bytes(content)
    with pytest.raises(DataError, match=r"data_batch_2 is no pickle .*: it names .*, which is refused"):
        data.load_cifar10(python_cifar[0])
    assert not (tmp_path / "made").exists()


def doubled(times):
    """A list of the same list twice, and so on."""
    held = []
    for _ in range(times):
        held = [held, held]
    return held


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02cnumpy\nndarray\n}U\x04evilK\x01sb.",  # attributes of what a name leads to
        b"\x80\x02cnumpy\nndarray\nN}U\x05_makeK\x01s\x86b.",
        b"\x80\x02cnumpy\ndtype\nN}U\x0c__setstate__K\x01s\x86b.",
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00rot\x86R.",
        b"\x80\x02P0\n.",  # persistent identifiers
        b"\x80\x02\x82\x01.",  # registered extensions
        b"\x80\x02]q\x00h\x00a.",  # a list within itself
        b"\x80\x02cnumpy\nndarray\n.",
        pickle.dumps({"data": doubled(60), "labels": []}, 2),  # no memory would hold what these stand for
        pickle.dumps({"data": 0, "labels": [doubled(60)]}, 2),
        pickle.dumps({"data": 0, "labels": [1 << 20000]}, 2),  # nor can this be shown
        b"\x80\x05\x96" + (1 << 62).to_bytes(8, "little") + b".",
        b"\x80\x02}K\x01K\x01s.",
        b"\x80\x02K\x01.",
        b"\x80\x02",
        b"",
        b"text",
    ],
)
def test_odd_pickles(python_cifar, content):
    (python_cifar[0] / "data_batch_2").write_bytes(content)
    for _ in range(2):
        with pytest.raises(DataError, match="data_batch_2"):
            data.load_cifar10(python_cifar[0])
    (python_cifar[0] / "data_batch_2").unlink()
    write_python2(python_cifar[0] / "data_batch_2", python_cifar[1][1])
    data.load_cifar10(python_cifar[0])  # nothing has been changed for later


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"labels": [0]}, "data is NoneType"),
        ({"data": np.zeros((1, 3072)), "labels": [0]}, r"data is shape \(1, 3072\) and dtype float64"),
        ({"data": np.zeros((1, 3071), np.uint8), "labels": [0]}, r"data is shape \(1, 3071\)"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [0, 1]}, "labels must be a list of 1 integers"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}, r"labels\[0\] is 10; CIFAR-10's are 0 to 9"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": ["a"]}, r"labels\[0\] is 'a'"),
        ({"data": np.array([[None]]), "labels": [0]}, "is no pickle of arrays"),
    ],
)
def test_foreign_batches(python_cifar, batch, message):
    (python_cifar[0] / "test_batch").write_bytes(pickle.dumps(batch, 2))
    with pytest.raises(DataError, match=rf"test_batch:? {message}"):
        data.load_cifar10(python_cifar[0])


def test_a_pickle_damaged_anywhere(python_cifar):
    """Cut or changed in a byte of its program, a batch is read or refused with a DataError; nothing else comes out."""
    path = python_cifar[0] / "data_batch_1"
    good = path.read_bytes()
    program = [*range(180), *range(len(good) - 60, len(good))]  # around the pixels
    for k in program:
        for content in (good[:k], good[:k] + bytes([good[k] ^ 0x41]) + good[k + 1 :]):
            path.write_bytes(content)
            try:
                data.cifar10._read_batch(path)
            except DataError as error:
                assert "data_batch_1" in str(error)  # noqa: PT017


# --- libsvm -------------------------------------------------------------------------------------------------------
def test_libsvm(tmp_path):
    path = tmp_path / "points.libsvm"
    path.write_text("-1 1:0.5 3:2 # a comment\n+1 2:1\n\n3.0 \n")
    found = data.load_libsvm(path)
    np.testing.assert_array_equal(found.X_train, [[0.5, 0, 2], [0, 1, 0], [0, 0, 0]])
    assert found.X_train.dtype == np.float32
    assert found.y_train.tolist() == [0, 1, 2]
    assert (found.class_names, found.name, found.X_test) == (("-1", "1", "3"), "points.libsvm", None)
    (tmp_path / "points.libsvm.t").write_text("1 5:7\n2 1:1\n")
    found = data.load_libsvm(str(path))
    assert found.X_train.shape == (3, 5)
    np.testing.assert_array_equal(found.X_test, [[0, 0, 0, 0, 7], [1, 0, 0, 0, 0]])
    assert found.class_names == ("-1", "1", "2", "3")
    assert found.y_train.tolist() == [0, 1, 3]
    assert found.y_test.tolist() == [1, 2]
    assert data.load_libsvm(path, n_features=9).X_test.shape == (2, 9)
    with pytest.raises(DataError, match="has features up to 5; expected at most n_features, 4"):
        data.load_libsvm(path, n_features=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; expected at least one row"),
        ("cat 1:2\n", "is not in libsvm's format"),
        ("1 a:2\n", "is not in libsvm's format"),
        ("1 0:2\n", "is not in libsvm's format"),
        ("1 2:1 1:1\n", "is not in libsvm's format"),
        ("1,2 1:1\n", "is not in libsvm's format"),
        ("1 1:1\n0.5 1:1\n", r"row 1 has the label 0.5; expected integers"),
        ("nan 1:1\n", "row 0 has the label nan"),
        ("1 99999999:1\n" * 99, "has 99999999 features, dense .* GB; expected at most 4 GB"),
    ],
)
def test_bad_libsvm(tmp_path, text, message):
    (tmp_path / "bad.libsvm").write_text(text)
    with pytest.raises(DataError, match=message):
        data.load_libsvm(tmp_path / "bad.libsvm")
    with pytest.raises(DataError, match=r"none\.libsvm is no file"):
        data.load_libsvm(tmp_path / "none.libsvm")


# --- digits -------------------------------------------------------------------------------------------------------
def test_digits():
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    found = data.load_digits()
    assert found.X_train.dtype == np.float32
    assert found.image_shape == (8, 8)
    assert found.class_names == tuple("0123456789")
    order = np.random.default_rng(0).permutation(1797)
    np.testing.assert_array_equal(np.concatenate([found.X_train, found.X_test]), X[order])
    np.testing.assert_array_equal(np.concatenate([found.y_train, found.y_test]), y[order])
    assert len(found.y_test) == 360
    np.testing.assert_array_equal(data.load_digits(seed=0).X_test, found.X_test)
    assert (data.load_digits(seed=1).y_test != found.y_test).any()


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r'pip install "fastloss\[cli\]"'):
        data.load_digits()


# --- npz ----------------------------------------------------------------------------------------------------------
GOOD = {"X": np.arange(12.0).reshape(4, 3), "y": np.array([0, 2, 1, 0], np.uint8)}
TEST = {"X_test": np.ones((2, 3), np.float32), "y_test": np.array([3, 0])}


def test_npz(tmp_path):
    np.savez(tmp_path / "points.npz", **GOOD)
    found = data.load_npz(tmp_path / "points.npz")
    np.testing.assert_array_equal(found.X_train, GOOD["X"])
    np.testing.assert_array_equal(found.y_train, GOOD["y"])
    assert found.y_train.dtype == np.int64
    assert found.X_test is None
    assert found.y_test is None
    assert (found.class_names, found.image_shape, found.name) == (("0", "1", "2"), None, "points.npz")
    np.savez_compressed(tmp_path / "both.npz", **GOOD, **TEST, other=np.zeros(1))
    found = data.load_npz(str(tmp_path / "both.npz"))
    np.testing.assert_array_equal(found.X_test, TEST["X_test"])
    assert found.class_names == ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"X": None}, "holds y; expected X, y: X is missing"),
        ({"y": None}, "holds X; expected X, y: y is missing"),
        ({"y": np.array([0, 1, 2])}, r"y has shape \(3,\) and dtype int64; expected \(4,\)"),
        ({"y": np.array([0.0, 1, 2, 0])}, "y has shape .* dtype float64"),
        ({"y": np.array(["a", "b", "c", "d"])}, "y has shape .* dtype <U1"),
        ({"y": np.array([0, 1, -1, 0])}, r"y\[2\] is -1; class indices start at 0"),
        ({"X": np.zeros(4)}, r"X has shape \(4,\)"),
        ({"X": np.zeros((4, 3), complex)}, "X has shape .* dtype complex128"),
        ({"X": np.zeros((0, 3)), "y": np.zeros(0, int)}, "X and y are empty"),
        ({"X_test": TEST["X_test"]}, "holds only one of X_test and y_test"),
        ({"y_test": TEST["y_test"]}, "holds only one of X_test and y_test"),
        ({"X_test": np.ones((2, 4)), "y_test": TEST["y_test"]}, "X_test has 4 features; expected 3"),
        ({"X_test": TEST["X_test"], "y_test": np.zeros(3, int)}, r"y_test has shape \(3,\)"),
        ({"X": np.array([[1, None]] * 4, object)}, "cannot be read as an .npz file without pickles"),
        ({"y": np.array([0, 1, None, 2], object)}, "cannot be read as an .npz file without pickles"),
    ],
)
def test_npz_with_bad_arrays(tmp_path, changes, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **{name: value for name, value in (GOOD | changes).items() if value is not None})
    with pytest.raises(DataError, match=rf"bad\.npz:? {message}"):
        data.load_npz(path)


def test_npz_of_another_kind(tmp_path):
    np.save(tmp_path / "one.npy", GOOD["X"])
    (tmp_path / "text.npz").write_text("X,y\n1,2\n")
    (tmp_path / "empty.npz").write_bytes(b"")
    for name, message in (("one.npy", "is no .npz"), ("text.npz", "is no .npz"), ("empty.npz", "is no .npz")):
        with pytest.raises(DataError, match=rf"{name} {message}"):
            data.load_npz(tmp_path / name)
    for name in ("missing.npz", "."):
        with pytest.raises(DataError, match=r"is no file; expected an \.npz file"):
            data.load_npz(tmp_path / name)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_damaged_anywhere(tmp_path, save):
    """Cut or changed at any third byte, a file is read whole or refused with a DataError; nothing else comes out."""
    path = tmp_path / "damaged.npz"
    save(path, **GOOD)
    good = path.read_bytes()
    for k in range(0, len(good), 3):
        path.write_bytes(good[:k])
        with pytest.raises(DataError, match=r"damaged\.npz"):
            data.load_npz(path)
        path.write_bytes(good[:k] + bytes([good[k] ^ 0x81]) + good[k + 1 :])
        try:
            np.testing.assert_array_equal(data.load_npz(path).X_train, GOOD["X"])
        except DataError as error:
            assert "damaged.npz" in str(error)  # noqa: PT017


# --- standardised features ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64, np.int32])
@pytest.mark.parametrize("chunk", [1 << 20, 8 * 16])
def test_standardisation(monkeypatch, dtype, chunk):
    monkeypatch.setattr(standard, "CHUNK_VALUES", chunk)
    X = np.random.default_rng(0).integers(0, 200, size=(101, 8)).astype(dtype)
    X[:, 3] = 7
    wide = X.astype(np.float64)
    shift, scale = data.standardisation(X)
    np.testing.assert_allclose(shift, wide.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(scale, np.where(np.arange(8) == 3, 1, wide.std(axis=0)), rtol=1e-13)
    Z = data.standardise(X, shift, scale)
    assert Z.dtype == np.float32
    np.testing.assert_allclose(Z, (wide - shift) / scale, rtol=0, atol=1e-6)
    _, shared = data.standardisation(X, per_feature=False)
    np.testing.assert_allclose(shared, np.full(8, np.sqrt(wide.var(axis=0).mean())), rtol=1e-13)
    np.testing.assert_array_equal(data.standardise(X, None, None), X.astype(np.float32))


def test_standardise_far_from_zero():
    X = 1e9 + np.random.default_rng(0).normal(size=(50, 2))
    shift, scale = data.standardisation(X)
    np.testing.assert_allclose(data.standardise(X, shift, scale).std(axis=0), 1, rtol=1e-5)


def test_standardisation_of_bad_features():
    with pytest.raises(ValueError, match=r"X\[:, 1\] has the mean nan"):
        data.standardisation(np.array([[0, np.nan], [1, 2]]))
    with pytest.raises(ValueError, match=r"X has shape \(0, 2\)"):
        data.standardisation(np.zeros((0, 2)))
    with pytest.raises(ValueError, match=r"X has shape \(2,\)"):
        data.standardisation(np.zeros(2))
