"""The handwritten digits that come with scikit-learn."""

from __future__ import annotations

import numpy as np

from fastloss import _checks as checks
from fastloss.data.dataset import Dataset

N_TEST = 360


def load_digits(seed: int = 0) -> Dataset:
    """scikit-learn's embedded digits: 1,797 images of 8 × 8 with values 0 to 16, in 10 classes.

    The images are shuffled by `numpy.random.default_rng(seed)`; the last 360 (one in five) are the test data.

    Parameters
    ----------
    seed : int
        At least 0.

    Returns
    -------
    Dataset
        Features are float32 (N, 64).

    Raises
    ------
    ImportError
        Without scikit-learn.

    References
    ----------
    Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.

    Examples
    --------
    >>> from fastloss.data import load_digits
    >>> digits = load_digits()
    >>> digits.X_train.shape, digits.X_test.shape
    ((1437, 64), (360, 64))
    """
    seed = checks.integer(seed, "seed", low=0)
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError('the digits need scikit-learn: pip install "fastloss[cli]"') from error
    X, y = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(X))
    X, y = X[order].astype(np.float32), y[order].astype(np.int64)
    names = tuple(str(k) for k in range(10))
    return Dataset(X[:-N_TEST], y[:-N_TEST], X[-N_TEST:], y[-N_TEST:], names, (8, 8), "digits")
