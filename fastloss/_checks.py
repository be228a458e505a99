"""Checks of arguments: the one place where bad input is turned away, before anything is computed or written.

Every message names the argument, says what came, and says what would do.
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, NoReturn

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_ndarray = np.ndarray
FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
REDUCTIONS = ("mean", "sum", "none")


# What is asked for at every call, found without asking NumPy.
_COMPUTE: dict[np.dtype[Any], np.dtype[Any]] = {
    FLOAT32: FLOAT32,
    FLOAT64: FLOAT64,
    np.dtype(np.int32): FLOAT64,
    np.dtype(np.int64): FLOAT64,
}


def compute_dtype(dtype: np.dtype[Any], name: str) -> np.dtype[Any]:
    """The float type that values of `dtype` are computed in: float32 for 16-bit floats and uint8, else float64."""
    known = _COMPUTE.get(dtype)
    if known is None:
        known = _COMPUTE[dtype] = _compute_dtype(dtype, name)
    return known


def _compute_dtype(dtype: np.dtype[Any], name: str) -> np.dtype[Any]:
    if dtype.kind == "f" and dtype.itemsize in (4, 8):
        return dtype.newbyteorder("=")
    if (dtype.kind == "f" and dtype.itemsize == 2) or dtype.name == "bfloat16" or dtype == np.uint8:
        return FLOAT32
    if dtype.kind in "iub":
        return FLOAT64
    raise TypeError(f"{name} has dtype {dtype}; it must hold real numbers: floats of 16 to 64 bits, or integers")


def as_array(value: object, name: str) -> Array:
    """`value` as a NumPy array of real numbers, without a copy where none is needed."""
    if type(value) is not np.ndarray:
        if hasattr(value, "toarray") and hasattr(value, "tocsr"):
            raise TypeError(f"{name} is a sparse matrix; this version takes dense arrays ({name}.toarray())")
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(f"{name} is a masked array, whose mask would be lost; give its data, and rows weights of 0")
        try:
            value = np.asarray(value)
        except (ValueError, TypeError) as error:
            raise TypeError(f"{name} is no array of numbers: {error}") from None
    if value.dtype not in _COMPUTE:
        compute_dtype(value.dtype, name)
    return value


def matrix(value: object, name: str, shape: str) -> Array:
    """A 2-D array of real numbers. `shape` is the wanted shape in words, as "(N, C)"."""
    array = as_array(value, name)
    if array.ndim != 2:
        raise ValueError(f"{name} has shape {array.shape}; it must be two-dimensional, {shape}")
    return array


def scores(value: object) -> Array:
    array = matrix(value, "scores", "(N, C): a row of C class scores for each of N examples")
    if array.shape[1] == 0:
        raise ValueError(f"scores has shape {array.shape}; there must be at least one class")
    return array


def targets(value: object, n_rows: int, n_classes: int) -> Array:
    """Class indices `(N,)` of an integer type, or class probabilities `(N, C)`; the driver checks the numbers."""
    array = as_array(value, "targets")
    dtype = array.dtype
    if dtype.kind in "iu" and array.shape == (n_rows,) and dtype.isnative:
        return array
    if array.ndim == 2 and (array.dtype.kind not in "iub" or array.shape == (n_rows, n_classes)):
        if array.shape != (n_rows, n_classes):
            raise_shape_of_targets(array.shape, n_rows, n_classes)
        return array
    if array.shape != (n_rows,):
        raise ValueError(f"targets has shape {array.shape}; it must be ({n_rows},), a class for each row")
    if array.dtype.kind not in "iu":
        if array.size == 0:
            return np.zeros(0, np.int64)
        raise TypeError(f"targets has dtype {array.dtype}; class indices must be integers (targets.astype(int))")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def raise_shape_of_targets(shape: tuple[int, ...], n_rows: int, n_classes: int) -> NoReturn:
    raise ValueError(
        f"targets has shape {shape}; class probabilities, or labels of each column, must have the scores' shape "
        f"{(n_rows, n_classes)}"
    )


def raise_bad_target(targets: Array, position: int, n_classes: int, ignore_index: int | None) -> None:
    what = "1 class (0 only)" if n_classes == 1 else f"{n_classes} classes (0 to {n_classes - 1})"
    ignored = "" if ignore_index is None else f", and ignore_index is {ignore_index}"
    raise ValueError(f"targets[{position}] is {targets[position]}, but scores have {what}{ignored}")


def rows(value: object, n_rows: int) -> Array:
    array = np.asarray(value)
    if array.ndim != 1:
        raise ValueError(f"rows has shape {array.shape}; it must be one-dimensional: indices of rows of X")
    if array.dtype.kind not in "iu":
        if array.size == 0:
            return np.zeros(0, np.int64)
        raise TypeError(f"rows has dtype {array.dtype}; it must hold integers, indices of rows of X")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def raise_bad_row(rows: Array, position: int, n_rows: int) -> None:
    raise IndexError(f"rows[{position}] is {rows[position]}, but X has {n_rows} rows (0 to {n_rows - 1})")


def picked_rows(value: object, n_rows: int) -> Array:
    """`rows`, all of them in `[0, n_rows)`."""
    array = rows(value, n_rows)
    bad = (array < 0) | (array >= n_rows)
    if bad.any():
        raise_bad_row(array, int(bad.argmax()), n_rows)
    return array


def finite_nonnegative(array: Array, name: str, most: float = np.inf) -> None:
    """Raise unless every entry is finite and in [0, most], naming the first that is not."""
    position = first_unfit(array, most)
    if position >= 0:
        raise_unfit(array, position, name, most)


def first_unfit(array: Array, most: float = np.inf) -> int:
    """The flat position of the first entry that is not finite, or not in [0, most]; −1 if there is none."""
    good = np.isfinite(array) & (array >= 0) & (array <= most)
    return -1 if good.all() else int(np.argmin(good))


def raise_unfit(array: Array, position: int, name: str, most: float = np.inf) -> None:
    where = tuple(int(k) for k in np.unravel_index(position, array.shape))
    at = ", ".join(map(str, where))
    wanted = "finite and not negative" if most == np.inf else f"in [0, {most:g}]"
    raise ValueError(f"{name}[{at}] is {array[where]}; {name} must be {wanted}")


def vector(value: object, name: str, size: int, of: str) -> Array:
    """A float64 vector of `size` entries, one for each of `of`."""
    array = as_array(value, name)
    if array.shape != (size,):
        raise ValueError(f"{name} has shape {array.shape}; it must be ({size},): one for each {of}")
    return array.astype(np.float64)


def finite(array: Array, name: str) -> Array:
    if not np.isfinite(array).all():
        position = int(np.argmin(np.isfinite(array)))
        raise ValueError(f"{name}[{position}] is {array.flat[position]}; {name} must be finite")
    return array


def weights(value: object, name: str, size: int, of: str) -> Array:
    array = vector(value, name, size, of)
    finite_nonnegative(array, name)
    return array


def number(value: object, name: str, *, low: float = -np.inf, high: float = np.inf, above: bool = False) -> float:
    """A finite real number in [low, high], or in (low, high] where `above`."""
    if not isinstance(value, Real | np.number) or isinstance(value, bool | np.complexfloating):
        raise TypeError(f"{name} is {value!r}; it must be a number")
    try:
        x = float(value)
    except OverflowError:
        x = np.inf
    if not (np.isfinite(x) and low <= x <= high and not (above and x == low)):
        bounds = [f"above {low:g}" if above else f"at least {low:g}"] if low > -np.inf else []
        bounds += [f"at most {high:g}"] if high < np.inf else []
        raise ValueError(f"{name} is {value!r}; it must be a finite number{' ' * bool(bounds)}{' and '.join(bounds)}")
    return x


def integer(value: object, name: str, *, low: int | None = None) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be an integer")
    if low is not None and value < low:
        raise ValueError(f"{name} is {value!r}; it must be at least {low}")
    return int(value)


def flag(value: object, name: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} is {value!r}; it must be True or False")
    return bool(value)


def one_of(value: object, name: str, choices: Iterable[object]) -> None:
    choices = tuple(choices)
    if value not in choices or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")


def out(array: object, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array given to receive a result."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} is {type(array).__name__}; it must be a NumPy array")
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{name} has shape {array.shape} and dtype {array.dtype}; it must have {shape} and {dtype}")
    flags = array.flags
    if not flags.behaved:
        what = f"not aligned to its dtype {dtype}" if flags.writeable else "read-only"
        raise ValueError(f"{name} is {what}; it must be {'aligned' if flags.writeable else 'writeable'}")
    return array


def apart(out: Array, name: str, inputs: dict[str, object], in_place: str | None = None) -> None:
    """Raise if `out` shares memory with an input, or is that input `in_place` only in part."""
    owner = out.flags.owndata
    for other_name, other in inputs.items():
        if other is None or not isinstance(other, _ndarray) or (other is out and other_name == in_place):
            continue
        if owner and other is not out and other.flags.owndata:  # found three times faster than by NumPy's bounds
            continue
        if np.may_share_memory(out, other) and _share(out, other):
            same = (
                other_name == in_place
                and out.__array_interface__["data"] == other.__array_interface__["data"]
                and out.dtype == other.dtype
                and out.shape == other.shape
                and all(a == b or n == 1 for a, b, n in zip(out.strides, other.strides, out.shape, strict=True))
            )
            if not same:
                hint = f"; it may be {in_place} itself, or share nothing with it" if other_name == in_place else ""
                raise ValueError(f"{name} overlaps {other_name}{hint}")


def _share(a: Array, b: Array) -> bool:
    try:
        return bool(np.shares_memory(a, b, max_work=10_000))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def on_gpu(*values: object) -> bool:
    """Whether one of some arrays is on a GPU (or, in numba-cuda's simulator, one of its stand-ins for such)."""
    for value in values:
        kind = type(value)
        if hasattr(kind, "__cuda_array_interface__") or kind.__name__ == "FakeCUDAArray":
            from fastloss.gpu import arrays

            if arrays.is_device(value):
                return True
    return False
