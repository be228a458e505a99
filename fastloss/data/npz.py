"""`.npz` files, never with pickles."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path

import numpy as np

from fastloss._checks import Array
from fastloss.data.dataset import DataError, Dataset


def read_arrays(path: str | os.PathLike[str], required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Array]:
    """Arrays of a `.npz` file by name; raises DataError for what is no such file, or lacks one that is required."""
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise DataError(f"{name} is no file; expected an .npz file")
    if not zipfile.is_zipfile(name):
        raise DataError(f"{name} is no .npz file (a zip archive of arrays), or is truncated")
    found = {}
    try:
        # Opened here: NumPy leaves its own file open where the archive turns out to be damaged.
        with open(name, "rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = [key for key in required if key not in archive.files]
            if missing:
                held = ", ".join(archive.files) or "nothing"
                raise DataError(f"{name} holds {held}; expected {', '.join(required)}: {', '.join(missing)} is missing")
            for key in (*required, *optional):
                if key in archive.files:
                    found[key] = archive[key]
                    if not isinstance(found[key], np.ndarray):
                        raise DataError(f"{name}: {key} is no array in NumPy's format")
    except DataError:
        raise
    except (ValueError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{name} cannot be read as an .npz file without pickles: {error}") from None
    return found


def _labelled(name: str, arrays: dict[str, Array], suffix: str) -> tuple[Array, Array]:
    X, y = arrays["X" + suffix], arrays["y" + suffix]
    if X.ndim != 2 or X.dtype.kind not in "iubf":
        raise DataError(f"{name}: X{suffix} has shape {X.shape} and dtype {X.dtype}; expected real numbers (N, D)")
    if y.shape != (len(X),) or y.dtype.kind not in "iu":
        raise DataError(
            f"{name}: y{suffix} has shape {y.shape} and dtype {y.dtype}; expected ({len(X)},) class indices, "
            f"one integer for each row of X{suffix}"
        )
    if len(y) == 0:
        raise DataError(f"{name}: X{suffix} and y{suffix} are empty; expected at least one row")
    if y.min() < 0:
        position = int(y.argmin())
        raise DataError(f"{name}: y{suffix}[{position}] is {y[position]}; class indices start at 0")
    return X, y.astype(np.int64)


def load_npz(path: str | os.PathLike[str]) -> Dataset:
    """Labelled data from an `.npz` file.

    Parameters
    ----------
    path : str or path
        A file with arrays `X` (N, D) of real numbers and `y` (N,) of integers from 0, and maybe `X_test` and
        `y_test`. Arrays that would need pickles are refused.

    Returns
    -------
    Dataset
        With classes named "0" to the largest label, no image shape, and the file's name.

    Raises
    ------
    DataError
        If the file is missing, truncated or foreign, or its arrays do not fit together.

    Examples
    --------
    >>> import numpy as np, os, tempfile
    >>> from fastloss.data import load_npz
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "points.npz")
    ...     np.savez(path, X=np.eye(3), y=np.arange(3))
    ...     load_npz(path).class_names
    ('0', '1', '2')
    """
    name = os.fspath(path)
    arrays = read_arrays(path, ("X", "y"), ("X_test", "y_test"))
    X, y = _labelled(name, arrays, "")
    if ("X_test" in arrays) != ("y_test" in arrays):
        raise DataError(f"{name} holds only one of X_test and y_test; expected both, or none")
    X_test = y_test = None
    if "X_test" in arrays:
        X_test, y_test = _labelled(name, arrays, "_test")
        if X_test.shape[1] != X.shape[1]:
            raise DataError(f"{name}: X_test has {X_test.shape[1]} features; expected {X.shape[1]}, as X has")
    n_classes = int(max(y.max(), 0 if y_test is None else y_test.max())) + 1
    return Dataset(X, y, X_test, y_test, tuple(map(str, range(n_classes))), None, Path(path).name)
