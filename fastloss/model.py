"""A trained linear classifier: what it takes to predict from features as they are, in one file without pickles."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import IO

import numpy as np
from numpy.typing import DTypeLike

from fastloss import _checks as checks
from fastloss import backends, blocks, sparse, threads
from fastloss._checks import Array
from fastloss.data.dataset import DataError
from fastloss.data.npz import read_arrays
from fastloss.data.standard import row_chunks, standardise
from fastloss.losses import Softmax

FORMAT = "fastloss.LinearModel 1"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of `path` only once it is complete."""
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target} cannot be written: {target.parent} is no folder")
    _clear(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _clear(target: Path) -> None:
    """Remove what processes that were killed while they wrote to `target` have left beside it."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        pid = left.name.split(".")[-2]
        if os.name == "posix" and pid.isdecimal():  # elsewhere signal 0 is not a question
            try:
                os.kill(int(pid), 0)
            except (ProcessLookupError, OverflowError):
                left.unlink(missing_ok=True)
            except PermissionError:  # another user's, which is at work
                pass


def _score_sparse(X: sparse.Csr, W: Array, b: Array | None, store: Array) -> None:
    """The same for sparse X."""
    backend = backends.choose(None, "gradient", Softmax(), W.dtype, ())
    sparse.scores(backend, X, W, b, store, threads.resolve(None))


def _score(X: Array, W: Array, b: Array | None, prepare: Callable[[Array], Array], store: Array) -> None:
    """Scores of X by chunks of rows into `store` (N, C), or their argmax (N,); the same bits for any threads."""

    def some_rows(part: slice) -> None:
        scores = prepare(X[part]) @ W.T
        if b is not None:
            scores += b
        store[part] = scores if store.ndim == 2 else scores.argmax(axis=1)

    chunks = row_chunks(X)
    with blocks.Workers(min(threads.resolve(None), len(chunks))) as workers:
        workers.run(some_rows, chunks)


def predict(X: Array | sparse.Csr, W: Array, b: Array | None, centre: Array | None = None) -> Array:
    """The class of highest score `(X − centre) Wᵀ + b` for each row, the lowest at a tie: array (N,); X is converted by
    chunks. Sparse X has no centre.
    """
    found = np.empty(len(X), np.intp)
    if isinstance(X, sparse.Csr):
        _score_sparse(X, W, b, found)
        return found

    def prepare(rows: Array) -> Array:
        rows = rows.astype(W.dtype, copy=False)
        return rows if centre is None else rows - centre

    _score(X, W, b, prepare, found)
    return found


@dataclass(frozen=True, eq=False)
class LinearModel:
    """A linear classifier with scores `W [(x − shift) / scale, 1]`.

    Parameters
    ----------
    W : array (C, D + 1)
        Finite; the bias in the last column.
    class_names : tuple of str
        C names.
    shift, scale : array (D,), optional
        What the features were standardised with (see `fastloss.data.standardisation`).
    loss : str
        A description of the loss and penalty that it was trained with.
    image_shape : tuple of int, optional
        The shape of a row of features as a picture.
    provenance : dict of str, optional
        Where the model comes from: what it was trained on, how, and by what.

    Raises
    ------
    ValueError, TypeError
        If the parts do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> from fastloss.model import LinearModel
    >>> model = LinearModel(np.array([[1.0, 0.0], [-1.0, 0.0]]), ("right", "left"), shift=np.array([5.0]))
    >>> [model.class_names[k] for k in model.predict([[4.0], [7.0]])]
    ['left', 'right']
    """

    W: Array
    class_names: tuple[str, ...]
    shift: Array | None = None
    scale: Array | None = None
    loss: str = ""
    image_shape: tuple[int, ...] | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        W = checks.finite(checks.matrix(self.W, "W", "(C, D + 1)"), "W")
        c, d = W.shape[0], W.shape[1] - 1
        if c < 1 or d < 0:
            raise ValueError(f"W has shape {W.shape}; it must be (C, D + 1), with at least one class")
        names = tuple(self.class_names)
        if len(names) != c or not all(isinstance(name, str) for name in names):
            raise ValueError(f"class_names is {names!r}; it must hold {c} names, one for each row of W")
        if not isinstance(self.loss, str):
            raise TypeError(f"loss is {self.loss!r}; it must be a description, such as repr(loss)")
        fields: dict[str, object] = {"W": W.astype(checks.compute_dtype(W.dtype, "W")), "class_names": names}
        for name in ("shift", "scale"):
            value = getattr(self, name)
            if value is not None:
                fields[name] = checks.finite(checks.vector(value, name, d, "feature"), name)
        if self.scale is not None and not np.all(np.asarray(fields["scale"])):
            raise ValueError("scale holds 0; the features are divided by it")
        if self.image_shape is not None:
            shape = fields["image_shape"] = tuple(checks.integer(k, "image_shape", low=1) for k in self.image_shape)
            if np.prod(shape) != d:
                raise ValueError(f"image_shape is {shape}; its product must be {d}, as W has {d} features")
        if not isinstance(self.provenance, Mapping) or not all(
            isinstance(part, str) for item in self.provenance.items() for part in item
        ):
            raise TypeError(f"provenance is {self.provenance!r}; it must be a dict of text")
        fields["provenance"] = MappingProxyType(dict(self.provenance))
        for name, value in fields.items():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False
            object.__setattr__(self, name, value)

    def _score(self, X: object, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        features = sparse.features(X)
        d = self.W.shape[1] - 1
        if features.shape[1] != d:
            raise ValueError(f"X has shape {features.shape}; it must be (N, {d}): the model has {d} features")
        store: Array = np.empty((len(features), *shape), dtype)
        if isinstance(features, sparse.Csr):
            W = self.W[:, :-1].astype(np.float64)
            W = W if self.scale is None else W / self.scale
            b = self.W[:, -1] if self.shift is None else self.W[:, -1] - (W * self.shift).sum(axis=1)
            _score_sparse(features, W.astype(self.W.dtype), b.astype(self.W.dtype), store)
            return store

        def prepare(rows: Array) -> Array:
            if self.shift is None and self.scale is None:
                return rows.astype(self.W.dtype, copy=False)
            return standardise(rows, self.shift, self.scale)

        _score(features, self.W[:, :-1], self.W[:, -1], prepare, store)
        return store

    def scores(self, X: object) -> Array:
        """Class scores (N, C) of features X (N, D), of any real type; they are converted by chunks of rows.

        Sparse X (SciPy's) is used as it is: shift and scale are folded into W.
        """
        return self._score(X, (len(self.W),), self.W.dtype)

    def predict(self, X: object) -> Array:
        """The class index of the highest score for each row of X (N, D): array (N,)."""
        return self._score(X, (), np.intp)

    def accuracy(self, X: object, y: object) -> float:
        """The share of rows of X (N, D) whose class is predicted as in y (N,); NaN for no rows."""
        predicted, labels = self.predict(X), checks.as_array(y, "y")
        if labels.shape != predicted.shape or labels.dtype.kind not in "iu":
            raise ValueError(
                f"y has shape {labels.shape} and dtype {labels.dtype}; it must be {predicted.shape}, class indices"
            )
        return float((predicted == labels).mean()) if len(labels) else float("nan")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model as an `.npz` file without pickles, to exactly `path`: a complete file or none.

        Examples
        --------
        >>> import numpy as np, os, tempfile
        >>> from fastloss.model import LinearModel
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "model.npz")
        ...     LinearModel(np.eye(2, 3), ("a", "b")).save(path)
        ...     LinearModel.load(path).class_names
        ('a', 'b')
        """
        arrays = {
            "format": np.array(FORMAT),
            "W": self.W,
            "class_names": np.array(self.class_names, dtype=np.str_),
            "loss": np.array(self.loss),
            "provenance": np.array(json.dumps(dict(self.provenance))),
        }
        for name in ("shift", "scale", "image_shape"):
            if getattr(self, name) is not None:
                arrays[name] = np.asarray(getattr(self, name))
        with replacing(path) as file:
            np.savez(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LinearModel:
        """Read a model that `save` wrote; raises DataError, naming the file, for anything else."""
        name = os.fspath(path)
        found = read_arrays(
            path, ("format", "W", "class_names", "loss"), ("shift", "scale", "image_shape", "provenance")
        )
        if str(found["format"]) != FORMAT:
            raise DataError(f"{name} has the format {str(found['format'])!r}; expected {FORMAT!r}")
        shape = found.get("image_shape")
        try:
            for key in ("class_names", "image_shape"):
                if key in found and found[key].ndim != 1:
                    raise ValueError(f"{key} has shape {found[key].shape}; it must be one-dimensional")
            return cls(
                W=found["W"],
                class_names=tuple(found["class_names"].tolist()),
                shift=found.get("shift"),
                scale=found.get("scale"),
                loss=str(found["loss"]),
                image_shape=None if shape is None else tuple(shape.tolist()),
                provenance=json.loads(str(found.get("provenance", "{}"))),
            )
        except (ValueError, TypeError) as error:
            raise DataError(f"{name} is no model of fastloss: {error}") from None
