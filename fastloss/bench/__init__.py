"""`fastloss bench`: fastloss and its peers at the same jobs, each in a process of its own, in alternating rounds."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from fastloss import threads
from fastloss.bench.cases import FULL, KINDS, QUICK, Case


def _is_pattern(text: str) -> bool:
    return any(sign in text for sign in "*?[")


def _case(text: str) -> str:
    from fastloss.bench.estimators import BARS

    if not _is_pattern(text) and text not in BARS:
        try:
            Case.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _matching(texts: Sequence[str], known: Sequence[Case]) -> list[Case]:
    """The cases of these names; those of the known ones that match, where it is a pattern."""
    found: dict[Case, None] = {}
    for text in texts:
        cases = [case for case in known if fnmatch(case.name, text)] if _is_pattern(text) else [Case.parse(text)]
        if not cases:
            raise ValueError(f"--cases {text!r} matches none of {', '.join(case.name for case in known)}")
        found |= dict.fromkeys(cases)
    return list(found)


def _contests(texts: Sequence[str], known: Sequence[str]) -> list[str]:
    """The names that these are, or match."""
    found = [name for name in known if any(fnmatch(name, text) for text in texts)]
    unknown = [text for text in texts if not any(fnmatch(name, text) for name in known)]
    if unknown:
        raise ValueError(f"--cases {unknown[0]!r} matches none of {', '.join(known)}")
    return found


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; it must be a whole number, at least 1")
    return int(text)


def _writable_path(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}; it must be a file in a folder that exists")
    return path


def _new_folder(text: str) -> Path:
    path = Path(text)
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{text!r}; it must be a folder that can be made or written to")
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fastloss bench` to a parser."""
    from fastloss.bench import peers  # here, so that importing this module is cheap

    names = [name for name, peer in peers.table().items() if not peer.control]
    parser.add_argument("--quick", action="store_true", help="few cases and small ones, in short rounds")
    parser.add_argument(
        "--suite", choices=("cpu", "estimators", "accuracy"),
        help="cpu: all that the project holds itself to, against bars, with a report in --out; estimators: how long "
        "models of scikit-learn, XGBoost and LightGBM take to reach a goal, and ours, on CIFAR-10 and 20 Newsgroups in "
        "the folder that FASTLOSS_DATA names; accuracy: worst errors of softmax beside its peers', in units in the "
        "last place",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=_new_folder, metavar="FOLDER",
        help="with --suite: where results.json, the pictures and report.html go (default: out)",
    )  # fmt: skip
    parser.add_argument(
        "--cases", nargs="+", type=_case, metavar="CASE",
        help="KIND-NxC, or KIND-NxDxC for a linear layer, with -float64, -float16, -bfloat16 or (features) -uint8 "
        f"after it for another type than float32; KIND being one of {', '.join(KINDS)}; or a pattern, as 'hinge-*', "
        f"over those of the suite or the default ones: {', '.join(case.name for case in FULL)}",
    )  # fmt: skip
    parser.add_argument(
        "--peers", nargs="+", choices=names, metavar="PEER",
        help=f"of {', '.join(names)}; default: all but single instruction-set levels",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=_at_least_one, metavar="N",
        help="rounds over all peers (default: 5; with --quick, 3, or 1 for a suite)",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=_at_least_one, metavar="N", default=min(2, threads.get_num_threads()),
        help="threads for every peer and for the copy that they are compared with (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", type=_writable_path, metavar="PATH", help="also write all results to this file")


def main(args: argparse.Namespace) -> int:
    """Run `fastloss bench` with parsed arguments; 1 if a peer failed or gave another answer than the others."""
    from fastloss.bench import accuracy, estimators, runner, suite

    if args.suite == "accuracy":
        for option in ("quick", "cases", "peers", "rounds", "out"):
            if getattr(args, option):
                raise ValueError(f"--{option} has no meaning with --suite accuracy")
        return accuracy.main(args.json)
    for option, of_suite in (("json", False), ("out", True)):
        if getattr(args, option) is not None and of_suite != (args.suite is not None):
            raise ValueError(f"--{option} has no meaning {'without' if of_suite else 'with'} --suite")
    rounds = args.rounds or (5 if not args.quick else 1 if args.suite else 3)
    if args.suite == "estimators":
        if args.peers:
            raise ValueError("--peers has no meaning with --suite estimators: each job has peers of its own")
        names = None if args.cases is None else _contests(args.cases, list(estimators.BARS))
        settings = runner.Settings(rounds, args.threads, 0.0)
        return estimators.main(estimators.items(names), settings, args.quick, args.out or Path("out"))
    if args.suite:
        items = suite.SUITES[args.suite]()
        if args.cases:
            cases = _matching(args.cases, [item.case for item in items])
            items = [item for item in items if item.case in cases]
            if not items:
                raise ValueError(f"--cases {' '.join(args.cases)}: the suite has no such case")
        if args.quick:
            items = suite.tiny(items)
        settings = runner.Settings(rounds, args.threads, 0.005 if args.quick else 0.04)
        return suite.main(args.suite, items, args.peers, settings, args.quick, args.out or Path("out"))
    chosen: Sequence[Case] = _matching(args.cases, FULL) if args.cases else QUICK if args.quick else FULL
    length = 0.04 if args.quick else 0.1
    return runner.main(chosen, args.peers, runner.Settings(rounds, args.threads, length), args.json)
