"""What every peer and control is: a name, and for each kind of case ways to set the job up."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastloss.bench.cases import FLOATS, KINDS, Case, Inputs, Kind


class Work(NamedTuple):
    """A job, all set up."""

    #: Does the job, `repeats` times, and returns once it is done.
    run: Callable[[], Any]
    #: From what `run` returned to NumPy: the loss and its gradients (of the scores; of W and b; of W, b and X), or what
    #: a transform gives. None for a control.
    answer: Callable[[Any], tuple[Any, ...]] | None
    #: A part of it, below 1, for a control that does a part of the work.
    repeats: float = 1


#: From inputs and a number of threads to a job: does the conversion and the compilation.
Builder = Callable[[Inputs, int], Work]


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Peer:
    """One row of the table. A kind of case that has no builders is in `lacks`, with the reason."""

    name: str
    #: The distribution that the version is that of.
    distribution: str
    #: Kind of case → name of the variant → builder. The best variant is what counts.
    variants: Mapping[str, Mapping[str, Builder]]
    lacks: Mapping[str, str] = field(default_factory=dict)
    #: Types of scores that it computes with.
    dtypes: tuple[str, ...] = FLOATS
    #: Whether it takes features of another type than that of W.
    mixes_types: bool = False
    #: Why this peer cannot be used here; None if it can.
    why_not: Callable[[], str | None] = _nothing
    #: Part of a run that names no peers.
    default: bool = True
    #: A measure of the machine, not a computation of the loss.
    control: bool = False
    #: Whether its builders take inputs; else their shapes are enough.
    needs_inputs: bool = True
    #: Building takes seconds.
    slow_to_build: bool = False

    def lack(self, case: Case) -> str | None:
        """Why it has no part in a case; None if it has."""
        if case.kind in self.lacks:
            return self.lacks[case.kind]
        if case.d is not None and case.dtype not in FLOATS:
            return None if self.mixes_types else "it takes X in the type of W alone"
        return None if case.dtype in self.dtypes else f"it has nothing compiled for {case.dtype}"


def as_it_is(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def missing(variants: Mapping[str, object], reason: Callable[[Kind], str]) -> dict[str, str]:
    """Reasons for the kinds that have no variants."""
    return {name: reason(kind) for name, kind in KINDS.items() if name not in variants}


@functools.cache
def pool(threads: int) -> ThreadPoolExecutor:
    """Python threads, for NumPy to work in; the same at every call."""
    return ThreadPoolExecutor(threads)
