"""Arrays, numbers and text out of pickles, without running anything that a pickle asks for.

A pickle is a program: it may name any function and have it called. Here the few names that stand in pickles of NumPy
arrays lead to stand-ins of ours, which take down what they are given; every other name is refused before anything is
called. Arrays are then made from their bytes, for plain number types only.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from fastloss._checks import Array
from fastloss.data.dataset import DataError


class _Type:
    """Stands for a NumPy type: its text, as "u1", and its byte order."""

    def __init__(self, text: Any = None, *_: Any) -> None:
        self.text, self.order = text, "|"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def dtype(self) -> np.dtype[Any]:
        text, order = (_text(part) for part in (self.text, self.order))
        found = np.dtype((order if order in "<>" else "") + text)
        if found.kind not in "iubf":
            raise ValueError(f"an array has the type {text!r}")
        return found


class _Array:
    """Stands for a NumPy array: its shape, type and bytes."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> Array:
        _, shape, kind, by_columns, content = self.state
        flat = np.frombuffer(content.encode("latin-1") if isinstance(content, str) else bytes(content), kind.dtype())
        return flat.reshape(shape, order="F" if by_columns else "C")


class _Ndarray:
    """Stands for the class numpy.ndarray, which is named and never made."""


class _Name:
    """What a name in a pickle leads to: it can be called, and nothing else; a pickle cannot set attributes of it."""

    __slots__ = ("_make",)
    _make: Any

    def __init__(self, make: Any) -> None:
        object.__setattr__(self, "_make", make)

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it sets {name}")


def _encoded(text: Any, encoding: Any) -> bytes:
    """Bytes, as Python 3 writes them into pickles for Python 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes in an unknown encoding")
    return text.encode("latin-1")


_CORE = ("numpy.core.multiarray", "numpy._core.multiarray")
_STAND_INS = {
    **{(module, "_reconstruct"): _Name(_Array) for module in _CORE},
    ("numpy", "ndarray"): _Name(_Ndarray),
    ("numpy", "dtype"): _Name(_Type),
    ("_codecs", "encode"): _Name(_encoded),
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is refused") from None


def _text(value: Any) -> str:
    if not isinstance(value, str | bytes):
        raise ValueError(f"it has {type(value).__name__} in the place of text")
    return value.decode("ascii") if isinstance(value, bytes) else value


def _scalar(value: Any) -> bool:
    """Whether it is a number or text; integers of at most 64 bits, for longer ones cannot even be shown."""
    return value is None or isinstance(value, float | str | bytes) or (
        isinstance(value, int) and value.bit_length() <= 64
    )  # fmt: skip


def _plain(value: Any) -> Any:
    """An array for its stand-in; numbers and text as they are, and lists of them.

    Nothing deeper: a pickle of some bytes can stand for lists within lists whose items no memory would hold.
    """
    if isinstance(value, _Array):
        return value.array()
    if isinstance(value, list | tuple) and all(map(_scalar, value)):
        return list(value)
    if not _scalar(value):
        raise ValueError(f"it holds {type(value).__name__} that is no array, number, text, or list of numbers and text")
    return value


def read_pickle(path: Path) -> dict[str, Any]:
    """The dict in a pickle: text → arrays, numbers, text or bytes, lists of these. DataError, naming the file, for all
    else.
    """
    try:
        with path.open("rb") as file:
            # Python 2's strings are bytes.
            found = _Reader(file, fix_imports=False, encoding="bytes").load()
        if isinstance(found, dict):
            return {_text(key): _plain(held) for key, held in found.items()}
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:
        # What a damaged pickle makes the reader raise is not documented; nothing of ours is called in it but the above.
        what = str(error) or type(error).__name__
        raise DataError(f"{path} is no pickle of arrays that can be read without running it: {what}") from None
    raise DataError(f"{path} holds {type(found).__name__}; expected a dict")
