"""What every reader gives back, and raises."""

from __future__ import annotations

from dataclasses import dataclass

from fastloss._checks import Array


class DataError(ValueError):
    """A file is not what it should be; the message names it, what was expected and what was found."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled data, split into training and test data.

    Attributes
    ----------
    X_train, X_test : array (N, D)
        Features as they are stored; of `load_libsvm(…, sparse=True)` SciPy's sparse arrays. X_test and y_test may be
        None.
    y_train, y_test : array (N,) of int64
        Class indices in `[0, C)`.
    class_names : tuple of str
        The C names.
    image_shape : tuple of int, or None
        What a row of X is reshaped to for a picture: (height, width), or (channels, height, width).
    name : str
        "cifar10", "digits", or that of the file: what `fastloss.train.recipes.recipe` goes by.
    """

    X_train: Array
    y_train: Array
    X_test: Array | None
    y_test: Array | None
    class_names: tuple[str, ...]
    image_shape: tuple[int, ...] | None
    name: str
