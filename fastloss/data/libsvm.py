"""libsvm's text format: a line for each row, its label and then `index:value` for what is not 0."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from fastloss import _checks as checks
from fastloss._checks import Array
from fastloss.data.dataset import DataError, Dataset

#: Bytes that features may take as dense float32.
LARGEST = 1 << 32


def load_libsvm(
    path: str | os.PathLike[str], test: str | os.PathLike[str] | None = None, n_features: int | None = None, *,
    sparse: bool = False,
) -> Dataset:  # fmt: skip
    """Labelled data from files in libsvm's format.

    Parameters
    ----------
    path : str or path
        Training data. Labels are integers, or numbers without a fraction; classes are named by them, in increasing
        order.
    test : str or path, optional
        Test data; by default the file of the same name with `.t` added, if it is there, as libsvm's collection has it.
    n_features : int, optional
        D; by default the largest index in either file.
    sparse : bool
        Whether features are SciPy's `csr_array`, never dense.

    Returns
    -------
    Dataset
        Features are float32 (N, D); named as the file of training data.

    Raises
    ------
    DataError
        If a file is missing or no such text, if labels are not integers, or if dense features would take more than
        4 GB.
    ImportError
        Without scikit-learn, whose reader is used.

    Examples
    --------
    >>> import os, tempfile
    >>> from fastloss.data import load_libsvm
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "points.libsvm")
    ...     with open(path, "w") as file:
    ...         _ = file.write("-1 1:0.5 3:2\\n+1 2:1\\n")
    ...     points = load_libsvm(path)
    >>> points.X_train.tolist(), points.class_names
    ([[0.5, 0.0, 2.0], [0.0, 1.0, 0.0]], ('-1', '1'))
    """
    name = os.fspath(path)
    beside = f"{name}.t"
    if test is None and os.path.isfile(beside):
        test = beside
    parts = [_read(name)] + ([] if test is None else [_read(os.fspath(test))])
    from scipy.sparse import csr_array

    d = max(X.shape[1] for X, _ in parts)
    if n_features is not None:
        wanted = checks.integer(n_features, "n_features", low=0)
        if d > wanted:
            raise DataError(f"{name} has features up to {d}; expected at most n_features, {wanted}")
        d = wanted
    checks.flag(sparse, "sparse")
    size = 4 * d * sum(X.shape[0] for X, _ in parts)
    if size > LARGEST and not sparse:
        raise DataError(
            f"{name} has {d} features, dense {size / 2**30:.1f} GB; expected at most {LARGEST >> 30} GB: "
            "use sparse=True"
        )
    labels = np.unique(np.concatenate([y for _, y in parts]))
    found = []
    for X, y in parts:
        X.resize(X.shape[0], d)
        found.append((csr_array(X) if sparse else X.toarray(), np.searchsorted(labels, y).astype(np.int64)))
    X_test, y_test = found[1] if len(found) > 1 else (None, None)
    return Dataset(*found[0], X_test, y_test, tuple(str(label) for label in labels), None, Path(name).name)


def _read(name: str) -> tuple[Any, Array]:
    try:
        from sklearn.datasets import load_svmlight_file
    except ImportError as error:
        raise ImportError('libsvm files need scikit-learn: pip install "fastloss[cli]"') from error
    if not os.path.isfile(name):
        raise DataError(f"{name} is no file; expected one in libsvm's format")
    try:
        X, y = load_svmlight_file(name, dtype=np.float32, zero_based=False)
    except (ValueError, OverflowError, UnicodeDecodeError) as error:
        raise DataError(f"{name} is not in libsvm's format (label index:value …, indices from 1): {error}") from None
    if len(y) == 0:
        raise DataError(f"{name} is empty; expected at least one row")
    if not (np.isfinite(y).all() and (y == np.floor(y)).all() and np.abs(y).max() < 2**53):
        position = int(np.argmin(np.isfinite(y) & (y == np.floor(y))))
        raise DataError(f"{name}: row {position} has the label {y[position]}; expected integers, which name classes")
    return X, y.astype(np.int64)
