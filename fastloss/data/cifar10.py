"""CIFAR-10 in its binary layout: records of one label byte and 3,072 pixel bytes (red, green, blue plane of 32 × 32).

Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009;
https://www.cs.toronto.edu/~kriz/cifar.html, "CIFAR-10 binary version".
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fastloss._checks import Array
from fastloss.data.dataset import DataError, Dataset

FOLDER = "cifar-10-batches-bin"
TRAIN = tuple(f"data_batch_{k}.bin" for k in range(1, 6))
TEST = "test_batch.bin"
NAMES = "batches.meta.txt"
SHAPE = (3, 32, 32)
RECORD = 1 + 3 * 32 * 32


def _folder(path: Path) -> Path | None:
    """The folder that holds the batches: `path` or its CIFAR-10 subfolder."""
    for folder in (path, path / FOLDER):
        if (folder / TRAIN[0]).is_file() or (folder / TEST).is_file():
            return folder
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
        raise DataError(f"FASTLOSS_DATA is {text!r}, which is no folder; it must hold {FOLDER}, or its files")
    return _folder(path)


def _read_records(path: Path) -> Array:
    """The records of a batch: array (N, 3073) of uint8."""
    if not path.is_file():
        raise DataError(f"{path} is missing; CIFAR-10 has {', '.join(TRAIN)}, {TEST} and {NAMES}")
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
    return records


def _stack(batches: list[Array]) -> tuple[Array, Array]:
    labels = np.concatenate([records[:, 0] for records in batches]).astype(np.int64)
    return np.concatenate([records[:, 1:] for records in batches]), labels


def load_cifar10(path: str | os.PathLike[str]) -> Dataset:
    """CIFAR-10 from its binary version: 50,000 training and 10,000 test images of 3 × 32 × 32 in 10 classes.

    Parameters
    ----------
    path : str or path
        The folder `cifar-10-batches-bin`, or the folder that holds it.

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
    fastloss.data.dataset.DataError: no/such/folder holds neither data_batch_1.bin nor cifar-10-batches-bin
    """
    folder = _folder(Path(path))
    if folder is None:
        raise DataError(f"{os.fspath(path)} holds neither {TRAIN[0]} nor {FOLDER}")
    X_train, y_train = _stack([_read_records(folder / name) for name in TRAIN])
    X_test, y_test = _stack([_read_records(folder / TEST)])
    names_file = folder / NAMES
    try:
        names = tuple(names_file.read_text(encoding="utf-8").split())
    except OSError as error:
        raise DataError(f"{names_file} cannot be read ({error.strerror}); it must hold the 10 class names") from None
    except UnicodeDecodeError:
        raise DataError(f"{names_file} is no text; it must hold the 10 class names, one a line") from None
    if len(names) != 10:
        raise DataError(f"{names_file} holds {len(names)} names; expected the 10 class names, one a line")
    return Dataset(X_train, y_train, X_test, y_test, names, SHAPE, "cifar10")
