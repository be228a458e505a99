"""`fastloss bench`: fastloss and its peers at the same jobs, each in a process of its own, in alternating rounds."""

from __future__ import annotations

import argparse
from fnmatch import fnmatch
from pathlib import Path

from fastloss import threads
from fastloss.bench.cases import FULL, QUICK, Case


def _cases(text: str) -> tuple[Case, ...]:
    if any(sign in text for sign in "*?["):
        found = tuple(case for case in FULL if fnmatch(case.name, text))
        if not found:
            raise argparse.ArgumentTypeError(f"{text!r} matches none of {', '.join(case.name for case in FULL)}")
        return found
    try:
        return (Case.parse(text),)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; it must be a whole number, at least 1")
    return int(text)


def _writable_path(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}; it must be a file in a folder that exists")
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fastloss bench` to a parser."""
    from fastloss.bench import peers  # here, so that importing this module is cheap

    names = [name for name, peer in peers.table().items() if not peer.control]
    parser.add_argument("--quick", action="store_true", help="few cases and small ones, 3 short rounds")
    parser.add_argument(
        "--cases", nargs="+", type=_cases, metavar="CASE",
        help="LOSS-NxC or linear-LOSS-NxDxC, LOSS being softmax or hinge, with -float64 behind it for that type; or a "
        f"pattern, as 'hinge-*', over the default cases: {', '.join(case.name for case in FULL)}",
    )  # fmt: skip
    parser.add_argument(
        "--peers", nargs="+", choices=names, metavar="PEER",
        help=f"of {', '.join(names)}; default: all but single instruction-set levels",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=_at_least_one, metavar="N", help="rounds over all peers (default: 5; with --quick, 3)"
    )
    parser.add_argument(
        "--threads", type=_at_least_one, metavar="N", default=min(2, threads.get_num_threads()),
        help="threads for every peer and for the copy that they are compared with (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", type=_writable_path, metavar="PATH", help="also write all results to this file")


def main(args: argparse.Namespace) -> int:
    """Run `fastloss bench` with parsed arguments; 1 if a peer failed or gave another answer than the others."""
    from fastloss.bench import runner

    cases = [case for group in args.cases for case in group] if args.cases else QUICK if args.quick else FULL
    settings = runner.Settings(args.rounds or (3 if args.quick else 5), args.threads, 0.04 if args.quick else 0.1)
    return runner.main(cases, args.peers, settings, args.json)
