"""Checkpoints: files that a training or search is taken up from, to the same bits as if it had never stopped.

A checkpoint is an `.npz` file without pickles: arrays, a state in JSON (which keeps floats exactly), and what the run
was, in JSON too. It is written to a temporary file that takes its place, so that it is complete whenever the process
is killed.
"""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastloss import _checks as checks
from fastloss._checks import Array
from fastloss.data.dataset import DataError
from fastloss.data.npz import read_arrays
from fastloss.linear import LinearObjective
from fastloss.model import replacing
from fastloss.sparse import Csr

FORMAT = "fastloss.checkpoint 1"

PathLike = str | os.PathLike[str]


def describe(kind: str, objective: LinearObjective, W: Array, options: dict[str, Any]) -> dict[str, Any]:
    """What must be the same where a run is taken up: its kind, the objective, the start, and options.

    The objective's value at weights of its own stands for the data.
    """
    probe = np.asarray(np.random.default_rng(0).standard_normal(W.shape) / math.sqrt(W.size), objective.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        value = objective.value(probe)
    return {
        "kind": kind,
        "loss": repr(objective.loss),
        "penalty": repr(objective.penalty),
        "reduction": objective.reduction,
        "X": f"{objective.X.shape} {objective.X.dtype}",
        "backend": objective.choose_backend("gradient").name,
        "W": _text(W),
        **{name: _text(option) for name, option in options.items()},
        "data with an objective of": repr(value),
    }


def _text(value: object) -> str:
    """An option as a checkpoint keeps it: arrays by shape, type and a checksum, functions not at all."""
    if isinstance(value, np.ndarray):
        return f"array {value.shape} {value.dtype} {zlib.crc32(value.tobytes()):08x}"
    if isinstance(value, Csr):
        return f"sparse {value.shape} {_text((value.values, value.indices, value.starts))}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_text, value))})"
    return "a function" if callable(value) else repr(value)


class Checkpoint:
    """Where a run writes what it takes to go on, and what it goes on from; either may be None."""

    def __init__(
        self, path: PathLike | None, every: float, resume: PathLike | None, run: Callable[[], dict[str, Any]]
    ) -> None:
        self.path = None if path is None else Path(_path(path, "checkpoint"))
        self.every = checks.number(every, "checkpoint_every", low=0)
        self.source = None if resume is None else _path(resume, "resume")
        if self.path is not None:
            if not self.path.parent.is_dir():
                raise FileNotFoundError(f"checkpoint {self.path} cannot be written: {self.path.parent} is no folder")
            if self.path.is_dir():
                raise IsADirectoryError(f"checkpoint {self.path} is a folder; name a file")
        self.run = {} if self.path is None and self.source is None else run()
        self.found = self._load() if self.source is not None else None
        self.last = time.monotonic()

    @property
    def resumes(self) -> bool:
        return self.found is not None

    def due(self, last: bool) -> bool:
        """Whether to write one now; `last` if nothing follows."""
        return self.path is not None and (last or time.monotonic() - self.last >= self.every)

    def write(self, state: dict[str, Any], arrays: dict[str, Array]) -> None:
        assert self.path is not None
        texts = {"format": FORMAT, "run": json.dumps(self.run), "state": json.dumps(state)}
        with replacing(self.path) as file:
            np.savez(file, allow_pickle=False, **arrays, **{name: np.array(text) for name, text in texts.items()})
        self.last = time.monotonic()

    def _load(self) -> dict[str, Array]:
        assert self.source is not None
        found = read_arrays(self.source, ("format", "run", "state"), ())
        if str(found["format"]) != FORMAT:
            raise DataError(f"resume: {self.source} has the format {str(found['format'])!r}; expected {FORMAT!r}")
        try:
            was = json.loads(str(found["run"]))
            json.loads(str(found["state"]))
        except ValueError:
            raise DataError(f"resume: {self.source} is no checkpoint of fastloss") from None
        for name in dict.fromkeys((*was, *self.run)):
            before, now = was.get(name), self.run.get(name)
            if before != now:
                raise DataError(
                    f"resume: {self.source} was written with {name} {before}, but now it is {now}; "
                    "give what it was written with, or start without resume"
                )
        return found

    def read(self, names: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Array]]:
        """State and arrays to go on from."""
        assert self.found is not None
        assert self.source is not None
        return json.loads(str(self.found["state"])), read_arrays(self.source, names, ())


def _path(value: PathLike, name: str) -> str:
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} is {value!r}; it must be the path of a file")
    return os.fspath(value)
