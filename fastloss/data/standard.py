"""Standardised features: `(X − shift) / scale`, by chunks of rows, so that no copy of X in another type is made."""

from __future__ import annotations

import numpy as np

from fastloss import _checks as checks
from fastloss._checks import Array

CHUNK_VALUES = 1 << 20


def row_chunks(X: Array) -> list[slice]:
    """Chunks of rows, of a size that depends on the number of features alone."""
    rows = max(16, CHUNK_VALUES // max(1, X.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(X), rows)]


def standardisation(X: object, *, per_feature: bool = True) -> tuple[Array, Array]:
    """The mean of each feature, and its standard deviation.

    Parameters
    ----------
    X : array (N, D)
        Training data, N at least 1.
    per_feature : bool
        Whether each feature has a scale of its own; if not, all share the root of their mean variance, which keeps
        the proportions of images, and pixels that hardly ever change small.

    Returns
    -------
    shift, scale : array (D,) of float64
        A scale that would be 0 (a constant feature) is 1.

    Raises
    ------
    ValueError
        If a feature has NaN or infinity in it.

    Examples
    --------
    >>> import numpy as np
    >>> from fastloss.data import standardisation
    >>> shift, scale = standardisation(np.array([[0.0, 5.0], [2.0, 5.0]]))
    >>> shift.tolist(), scale.tolist()
    ([1.0, 5.0], [1.0, 1.0])
    """
    features = checks.matrix(X, "X", "(N, D)")
    if len(features) == 0:
        raise ValueError(f"X has shape {features.shape}; there must be at least one row")
    chunks = row_chunks(features)
    shift = np.sum([features[part].sum(axis=0, dtype=np.float64) for part in chunks], axis=0) / len(features)
    if not np.isfinite(shift).all():
        position = int(np.argmin(np.isfinite(shift)))
        raise ValueError(f"X[:, {position}] has the mean {shift[position]}; features must be finite to be standardised")
    variance = np.zeros_like(shift)
    for part in chunks:
        centred = features[part] - shift
        variance += np.einsum("nd,nd->d", centred, centred)
    variance /= len(features)
    if not per_feature:
        variance = np.full_like(variance, variance.mean())
    return shift, np.where(variance > 0, np.sqrt(variance), 1.0)


def standardise(X: object, shift: Array | None, scale: Array | None) -> Array:
    """`(X − shift) / scale` in float32; a shift of None is 0, a scale of None is 1.

    Parameters
    ----------
    X : array (N, D)
    shift, scale : array (D,) or None

    Returns
    -------
    array (N, D) of float32

    Examples
    --------
    >>> import numpy as np
    >>> from fastloss.data import standardise
    >>> standardise(np.array([[0, 250]], np.uint8), np.array([100.0, 100.0]), np.array([50.0, 50.0])).tolist()
    [[-2.0, 3.0]]
    """
    features = checks.matrix(X, "X", "(N, D)")
    # Centred in the type that X is computed in: float64 features far from 0 keep their digits.
    dtype = checks.compute_dtype(features.dtype, "X")
    offset = None if shift is None else shift.astype(dtype)
    inverse = None if scale is None else (1 / scale).astype(dtype)
    result = np.empty(features.shape, np.float32)
    for part in row_chunks(features):
        rows = features[part]
        if offset is not None:
            rows = np.subtract(rows, offset, dtype=dtype)
        if inverse is not None:
            rows = np.multiply(rows, inverse, dtype=dtype)
        result[part] = rows
    return result
