"""CIFAR-10 in its two layouts: binary, records of one label byte and 3,072 pixel bytes (red, green, blue plane of
32 × 32), and Python, pickled dicts of an array and labels, of which nothing is executed (see `pickles`).

Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009;
https://www.cs.toronto.edu/~kriz/cifar.html, "CIFAR-10 binary version" and "CIFAR-10 python version".
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastloss._checks import Array
from fastloss.data.dataset import DataError, Dataset
from fastloss.data.pickles import read_pickle

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
RECORD = 1 + PIXELS


class _Layout(NamedTuple):
    """A version of CIFAR-10: its folder, the ending of its batches, its file of names, and how they are read."""

    folder: str
    ending: str
    names: str
    read: Callable[[Path], tuple[Array, Array]]
    read_names: Callable[[Path], tuple[str, ...]]

    @property
    def train(self) -> tuple[str, ...]:
        return tuple(f"data_batch_{k}{self.ending}" for k in range(1, 6))

    @property
    def test(self) -> str:
        return f"test_batch{self.ending}"


def _place(path: Path) -> tuple[Path, _Layout] | None:
    """The folder that holds the batches, `path` or its CIFAR-10 subfolder, and its layout."""
    for layout in LAYOUTS:
        for folder in (path, path / layout.folder):
            if (folder / layout.train[0]).is_file() or (folder / layout.test).is_file():
                return folder, layout
    return None


def find_cifar10() -> Path | None:
    """The folder of CIFAR-10's batches, if the environment variable FASTLOSS_DATA names it or its parent; else None.

    Raises DataError if FASTLOSS_DATA names no folder.
    """
    text = os.environ.get("FASTLOSS_DATA")
    if not text:
        return None
    path = Path(text)
    if not path.is_dir():
        held = " or ".join(layout.folder for layout in LAYOUTS)
        raise DataError(f"FASTLOSS_DATA is {text!r}, which is no folder; it must hold {held}, or its files")
    found = _place(path)
    return None if found is None else found[0]


def _read_records(path: Path) -> tuple[Array, Array]:
    """The images and labels of a batch in the binary layout: arrays (N, 3072) and (N,) of uint8."""
    size = path.stat().st_size
    if size == 0 or size % RECORD:
        raise DataError(
            f"{path} has {size} bytes; expected records of {RECORD} bytes (a label and 3,072 pixels), "
            f"{10000 * RECORD} bytes in all: the file is truncated, or no batch of CIFAR-10's binary version"
        )
    records = np.fromfile(path, np.uint8).reshape(-1, RECORD)
    bad = records[:, 0] >= 10
    if bad.any():
        position = int(bad.argmax())
        raise DataError(f"{path}: record {position} has the label {records[position, 0]}; CIFAR-10's are 0 to 9")
    return records[:, 1:], records[:, 0]


def _read_lines(path: Path) -> tuple[str, ...]:
    try:
        return tuple(path.read_text(encoding="utf-8").split())
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); it must hold the 10 class names") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is no text; it must hold the 10 class names, one a line") from None


def _read_batch(path: Path) -> tuple[Array, Array]:
    """The same of a batch in the Python layout."""
    found = read_pickle(path)
    X, labels = found.get("data"), found.get("labels")
    if not isinstance(X, np.ndarray) or X.dtype != np.uint8 or X.ndim != 2 or X.shape[1] != PIXELS or len(X) == 0:
        what = f"shape {X.shape} and dtype {X.dtype}" if isinstance(X, np.ndarray) else type(X).__name__
        raise DataError(f"{path}: data is {what}; expected (N, {PIXELS}) of uint8")
    if not isinstance(labels, list) or len(labels) != len(X):
        raise DataError(f"{path}: labels must be a list of {len(X)} integers, one for each row of data")
    for position, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < 10:
            raise DataError(f"{path}: labels[{position}] is {reprlib.repr(label)}; CIFAR-10's are 0 to 9")
    return X, np.array(labels, np.uint8)


def _read_meta(path: Path) -> tuple[str, ...]:
    names = read_pickle(path).get("label_names")
    if not isinstance(names, list) or not all(isinstance(name, str | bytes) for name in names):
        raise DataError(f"{path}: label_names must be a list of the 10 class names")
    return tuple(name if isinstance(name, str) else name.decode("utf-8", "replace") for name in names)


LAYOUTS = (
    _Layout("cifar-10-batches-bin", ".bin", "batches.meta.txt", _read_records, _read_lines),
    _Layout("cifar-10-batches-py", "", "batches.meta", _read_batch, _read_meta),
)


def _stack(batches: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    return np.concatenate([X for X, _ in batches]), np.concatenate([y for _, y in batches]).astype(np.int64)


def load_cifar10(path: str | os.PathLike[str]) -> Dataset:
    """CIFAR-10 from its binary or Python version: 50,000 training and 10,000 test images of 3 × 32 × 32 in 10 classes.

    Parameters
    ----------
    path : str or path
        The folder `cifar-10-batches-bin` or `cifar-10-batches-py`, or the folder that holds it. Of the Python version's
        pickles nothing is executed: they may hold arrays, lists and text; those that name anything else are refused.

    Returns
    -------
    Dataset
        Features are uint8 (N, 3072), the red plane first.

    Raises
    ------
    DataError
        If a file is missing, truncated or foreign.

    Examples
    --------
    >>> from fastloss.data import load_cifar10
    >>> load_cifar10("no/such/folder")
    Traceback (most recent call last):
    fastloss.data.dataset.DataError: no/such/folder holds neither data_batch_1.bin nor cifar-10-batches-bin, nor
    data_batch_1 or cifar-10-batches-py
    """
    place = _place(Path(path))
    if place is None:
        binary, pickled = LAYOUTS
        raise DataError(
            f"{os.fspath(path)} holds neither {binary.train[0]} nor {binary.folder}, nor {pickled.train[0]} or "
            f"{pickled.folder}"
        )
    folder, layout = place
    for name in (*layout.train, layout.test, layout.names):
        if not (folder / name).is_file():
            wanted = f"{', '.join(layout.train)}, {layout.test} and {layout.names}"
            raise DataError(f"{folder / name} is missing; CIFAR-10 has {wanted}")
    X_train, y_train = _stack([layout.read(folder / name) for name in layout.train])
    X_test, y_test = _stack([layout.read(folder / layout.test)])
    names = layout.read_names(folder / layout.names)
    if len(names) != 10:
        raise DataError(f"{folder / layout.names} holds {len(names)} names; expected the 10 class names")
    return Dataset(X_train, y_train, X_test, y_test, names, SHAPE, "cifar10")
