"""The command `fastloss`: train linear classifiers on images, show what this installation is, time it beside others.

Errors that a user can mend are one line on standard error and exit code 2. Results go to standard output, progress to
standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

import fastloss as fl
from fastloss import _info, backends, bench, plot, threads
from fastloss._checks import FLOAT32, Array
from fastloss.data import Dataset, find_cifar10, load_cifar10, load_digits, load_npz, standardisation, standardise
from fastloss.model import LinearModel, replacing
from fastloss.train import DivergenceError, State, sgd
from fastloss.train.recipes import Recipe, recipe

LOSSES = {"softmax": ("softmax",), "hinge": ("hinge",), "both": ("softmax", "hinge")}
PENALTIES: dict[str, type[fl.Penalty] | None] = {
    "l2": fl.L2,
    "l1": fl.L1,
    "elasticnet": fl.ElasticNet,
    "maxnorm": fl.MaxNorm,
    "none": None,
}
#: Timing beside the reference: rounds, and how long each backend is called in each.
ROUNDS, SECONDS = 5, 0.2


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastloss",
        description="Multiclass losses and their gradients, fused with the linear layer, on compiled kernels.",
        epilog="""examples:
  fastloss train                 softmax and hinge classifiers on images; models and pictures go to out/
  fastloss train --help          all that can be chosen
  fastloss info                  which kernels this machine runs, and which backends there are
  fastloss bench --quick         a first table of times beside NumPy and what else is installed
  fastloss accelerate script.py  run a script with scikit-learn's logistic regression on these kernels""",
    )
    parser.add_argument("--version", action="version", version=f"fastloss {fl.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = commands.add_parser(
        "train",
        help="train linear classifiers on images",
        description="""\
Train linear classifiers on images, with softmax and with hinge (SVM) loss. Shows loss and accuracy on training and
test data, and the time of one loss and gradient over all training data beside the NumPy reference's. Writes models
(.npz) and pictures of training curves and class templates.

Features are standardised: the mean image is subtracted, and what is left divided by its standard deviation. Settings
that are not given come from a recipe for the data set and the loss, and are shown when training starts.""",
        epilog="""examples:
  fastloss train
  fastloss train --data path/to/cifar-10-batches-bin --loss softmax
  fastloss train --loss hinge --power 2 --penalty l1 --strength 0.001
  fastloss train --data mine.npz --epochs 20 --step-size 0.01 --out results

An .npz file holds X (rows of numbers) and y (class indices from 0), and maybe X_test and y_test.""",
    )
    train.set_defaults(run=_train)
    what = train.add_argument_group("data")
    what.add_argument(
        "--data", metavar="PATH",
        help="a folder of CIFAR-10's binary version, an .npz file, or 'digits', the images that come with scikit-learn "
        "(default: CIFAR-10, if the environment variable FASTLOSS_DATA names its folder; else digits)",
    )  # fmt: skip
    what.add_argument(
        "--out", metavar="FOLDER", type=Path, default=Path("out"), help="where models and pictures go (default: out)"
    )
    loss = train.add_argument_group("loss")
    loss.add_argument("--loss", choices=LOSSES, default="both", help="what to train with (default: both)")
    loss.add_argument("--margin", type=float, help="hinge: the margin Δ (default: 1)")
    loss.add_argument("--power", type=int, choices=(1, 2), help="hinge: 1, or 2 for the squared hinge (default: 1)")
    loss.add_argument(
        "--over", choices=("sum", "mean", "max"),
        help="hinge: take the sum, mean or max over the wrong classes (default: sum)",
    )  # fmt: skip
    loss.add_argument(
        "--penalty", choices=PENALTIES,
        help="on the weights W: l2 is Σ W², l1 is Σ |W|, elasticnet their sum, maxnorm a bound on the norm of each row "
        "of W (default: l2)",
    )  # fmt: skip
    loss.add_argument(
        "--strength", type=float,
        help="what the penalty is multiplied by, or the bound for maxnorm (default for l2: the recipe's)",
    )  # fmt: skip
    how = train.add_argument_group("training (defaults: the recipe's)")
    how.add_argument("--epochs", type=int, metavar="N", help="passes over the training data")
    how.add_argument("--batch-size", type=int, metavar="N", help="rows for each step")
    how.add_argument("--step-size", type=float, metavar="X", help="the length of a step along the gradient")
    how.add_argument("--momentum", type=float, metavar="X", help="at least 0, below 1")
    how.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the order of rows; same seed, same bits (default: 0)"
    )
    compute = train.add_argument_group("computing")
    compute.add_argument(
        "--threads", type=int, metavar="N",
        help=f"how many threads to use; results do not depend on it (default: {fl.get_num_threads()})",
    )  # fmt: skip
    compute.add_argument(
        "--backend", metavar="NAME", help="one that 'fastloss info' lists (default: the fastest that is available)"
    )

    info = commands.add_parser(
        "info",
        help="show this installation",
        description="Show the version, the kernels chosen for this processor, threads, backends with reasons, BLAS.",
        epilog="examples:\n  fastloss info\n  fastloss info --json > machine.json",
    )
    info.add_argument("--json", action="store_true", help="print it as JSON")
    info.set_defaults(run=_show)

    table = commands.add_parser(
        "bench",
        help="time the kernels beside their peers",
        description="""\
Time loss and gradient beside NumPy, SciPy, scikit-learn, PyTorch and JAX, where installed. Each runs in a process of
its own, in alternating rounds. Beside them, in the same rounds, stands the floor: what the machine can do at most
(copies and reads of the same bytes, exponentials, multiply-adds, bare products), as far as a case needs it.

With --suite all that the project holds itself to is run against bars, in about a quarter of an hour. What misses one is
measured again before it counts. The folder given by --out receives results.json, two pictures and report.html.""",
        epilog="""examples:
  fastloss bench --quick
  fastloss bench --cases softmax-65536x100 'hinge-*' --json times.json
  fastloss bench --suite cpu --out results
  fastloss bench --suite cpu --cases 'linear-*' --peers torch --out results""",
    )
    bench.add_arguments(table)
    table.set_defaults(run=bench.main)

    faster = commands.add_parser(
        "accelerate",
        help="run a Python script with scikit-learn's logistic regression on these kernels",
        description="""\
Run a Python script, or a module, as python itself does, within fastloss.adapters.sklearn.accelerate(): scikit-learn's
LogisticRegression and LogisticRegressionCV compute by fastloss with the solvers lbfgs and newton-cg. What cannot be
accelerated runs as ever, with one warning that says why. Processes that the script starts compute as ever.""",
        epilog="examples:\n  fastloss accelerate script.py --its own options\n  fastloss accelerate -m package.module",
    )
    faster.add_argument("-m", dest="module", action="store_true", help="run a module, as python -m does")
    faster.add_argument("script", help="the path of the script, or with -m the name of the module")
    faster.add_argument("arguments", nargs=argparse.REMAINDER, help="what the script is given")
    faster.set_defaults(run=_accelerate)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Options that cannot be parsed end in SystemExit(2)."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except BrokenPipeError:  # the reader of our output has gone, as in `fastloss info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, ImportError, OSError, backends.BackendError, DivergenceError) as error:
        print(f"fastloss: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastloss: interrupted; nothing was written", file=sys.stderr)
        return 130


def _show(args: argparse.Namespace) -> int:
    facts = _info.collect()
    print(json.dumps(facts, indent=2) if args.json else _info.text(facts))
    return 0


def _accelerate(args: argparse.Namespace) -> int:
    from fastloss.adapters.sklearn import accelerate

    if not args.module and not Path(args.script).exists():
        raise ValueError(f"{args.script} does not exist; name a Python script, or a module with -m")
    sys.argv = [args.script, *args.arguments]
    sys.path.insert(0, os.getcwd() if args.module else str(Path(args.script).resolve().parent))
    try:
        with accelerate():
            if args.module:
                runpy.run_module(args.script, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(args.script, run_name="__main__")
    except SystemExit:
        raise
    except BaseException as error:  # the script's own, shown as python shows them
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>", runpy.__file__):
            trace = trace.tb_next
        traceback.print_exception(type(error), error, trace)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


# --- train ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Trained:
    """A trained classifier, and what is said of it."""

    model: LinearModel
    history: dict[str, Array]
    #: Mean loss without penalty and accuracy: on training data, and on test data where there are any.
    scores: list[tuple[float, float]]
    #: Backend → times in seconds of one loss and gradient over all training data.
    times: dict[str, list[float]]


def _train(args: argparse.Namespace) -> int:
    # What can fail without training fails first.
    _check_options(args)
    _check_out(args.out)
    plot.figure_class()
    with ExitStack() as stack:
        if args.backend is not None:
            stack.enter_context(fl.use_backend(args.backend))
        if args.threads is not None:
            stack.callback(fl.set_num_threads, fl.get_num_threads())
            fl.set_num_threads(args.threads)
        data = _load(args.data)
        recipes = {kind: _recipe(args, data, kind) for kind in LOSSES[args.loss]}
        chosen = backends.choose(None, "gradient", fl.Softmax(), FLOAT32, ()).name
        print(f"{'data':<10}{_describe(data)}")
        n = threads.resolve(None)
        print(f"{'backend':<10}{chosen}, {n} thread{'s' * (n > 1)}", flush=True)
        features = _standardised(data, recipes)
        trained = {kind: _fit(kind, settings, data, features, args.seed, chosen) for kind, settings in recipes.items()}
    _print_scores(trained)
    _print_times(trained, data)
    _write(args.out, trained)
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Turn away options that would have no effect."""
    for name in ("margin", "power", "over"):
        if args.loss == "softmax" and getattr(args, name) is not None:
            raise ValueError(f"--{name} is an option of the hinge loss; with --loss softmax it has no meaning")
    if args.penalty == "none" and args.strength is not None:
        raise ValueError("--strength has no meaning with --penalty none")
    if args.penalty in ("l1", "elasticnet", "maxnorm") and args.strength is None:
        raise ValueError(f"--penalty {args.penalty} needs --strength; the recipes know one only for l2")


def _check_out(folder: Path) -> None:
    """Raise if files could not be written to `folder`, which need not exist yet."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        what = "is no folder" if not nearest.is_dir() else "cannot be written to"
        raise ValueError(f"--out {folder}: {nearest} {what}; name a folder that can be made or written to")


def _load(where: str | None) -> Dataset:
    if where is None:
        folder = find_cifar10()
        if folder is not None:
            return load_cifar10(folder)
        if os.environ.get("FASTLOSS_DATA"):
            where = os.environ["FASTLOSS_DATA"]
            print(f"fastloss: FASTLOSS_DATA ({where}) holds no CIFAR-10: training on digits", file=sys.stderr)
        return load_digits()
    if where == "digits":
        return load_digits()
    if Path(where).suffix == ".npz":
        return load_npz(where)
    if Path(where).is_dir():
        return load_cifar10(where)
    what = "is neither a folder nor an .npz file" if Path(where).exists() else "does not exist"
    raise ValueError(f"--data {where} {what}; name a folder of CIFAR-10's binary version, an .npz file, or digits")


def _recipe(args: argparse.Namespace, data: Dataset, kind: str) -> Recipe:
    """The recipe for the data and a loss, changed as the options say."""
    settings = recipe(data.name, kind, data.X_train.shape[1])
    names = ("epochs", "batch_size", "step_size", "momentum")
    changes: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if kind == "hinge":
        options = {name: getattr(args, name) for name in ("margin", "power", "over") if getattr(args, name) is not None}
        changes["loss"] = replace(settings.loss, **options)
    known = settings.penalty
    if args.penalty is not None or args.strength is not None:
        make = PENALTIES[args.penalty] if args.penalty is not None else type(known) if known is not None else fl.L2
        strength = args.strength if args.strength is not None else known.strength if known is not None else 0.0
        changes["penalty"] = None if make is None else make(strength)
    return replace(settings, **changes)


def _describe(data: Dataset) -> str:
    tests = 0 if data.X_test is None else len(data.X_test)
    shape = data.image_shape
    what = f"rows of {data.X_train.shape[1]} features" if shape is None else f"images of {' × '.join(map(str, shape))}"
    return f"{data.name}: {len(data.X_train)} training and {tests} test {what}, {len(data.class_names)} classes"


class _Features(NamedTuple):
    """Standardised features, and what they were standardised with."""

    shift: Array
    scale: Array
    train: Array
    #: With their targets; None where the data have no test part.
    test: tuple[Array, Array] | None


def _standardised(data: Dataset, recipes: dict[str, Recipe]) -> _Features:
    (per_feature,) = {settings.per_feature for settings in recipes.values()}  # a property of the data
    shift, scale = standardisation(data.X_train, per_feature=per_feature)
    test = None
    if data.X_test is not None and data.y_test is not None:
        test = (standardise(data.X_test, shift, scale), data.y_test)
    return _Features(shift, scale, standardise(data.X_train, shift, scale), test)


def _fit(kind: str, settings: Recipe, data: Dataset, features: _Features, seed: int, backend: str) -> _Trained:
    loss, penalty, options = settings.loss, settings.penalty, settings.options
    print(
        f"{kind:<10}{penalty or 'no penalty'}, {options['epochs']} epochs of batches of {options['batch_size']}, "
        f"step size {options['step_size']:g} ({options['schedule']}), momentum {options['momentum']:g}, seed {seed}",
        flush=True,
    )
    terminal = sys.stderr.isatty()
    result = sgd(
        fl.LinearObjective(loss, features.train, data.y_train, penalty=penalty),
        n_classes=len(data.class_names), seed=seed, validation=features.test, progress=terminal,
        callback=None if terminal else _Reporter(kind, options["epochs"]), **options,
    )  # fmt: skip
    if result.stopped == "interrupted":
        raise KeyboardInterrupt
    names = dict.fromkeys((backend, "reference"))
    plain = {name: fl.LinearObjective(loss, features.train, data.y_train, backend=name) for name in names}
    scores = [(plain[backend].value(result.W), float(result.history["accuracy"][-1]))]
    if features.test is not None:
        accuracy = float(result.history["validation_accuracy"][-1])
        scores.append((fl.LinearObjective(loss, *features.test).value(result.W), accuracy))
    description = f"{loss!r}, {penalty!r}"
    model = LinearModel(result.W, data.class_names, features.shift, features.scale, description, data.image_shape)
    return _Trained(model, result.history, scores, _time(plain, result.W))


class _Reporter:
    """Progress where there is no terminal for a bar: a line on standard error, at most every 10 seconds."""

    def __init__(self, kind: str, epochs: int) -> None:
        self.kind, self.epochs, self.last = kind, epochs, time.monotonic()

    def __call__(self, state: State) -> None:
        if time.monotonic() - self.last >= 10:
            self.last = time.monotonic()
            print(f"{self.kind}: epoch {state.epoch} of {self.epochs}, loss {state.loss:.4g}", file=sys.stderr)


def _time(objectives: dict[str, fl.LinearObjective], W: Array) -> dict[str, list[float]]:
    """Times in seconds of one loss and gradient for each objective.

    In alternating rounds, so that all meet the same machine; with a pause before each, since the idle threads of BLAS
    and OpenMP spin for a while and would disturb the others, and one call that does not count.
    """
    grad = np.empty_like(W)
    times: dict[str, list[float]] = {name: [] for name in objectives}
    for _ in range(ROUNDS):
        for name, objective in objectives.items():
            time.sleep(0.05)
            objective.value_and_grad(W, out=grad)
            end = time.perf_counter() + SECONDS
            for _ in range(100):
                start = time.perf_counter()
                objective.value_and_grad(W, out=grad)
                times[name].append(time.perf_counter() - start)
                if time.perf_counter() > end:
                    break
    return times


def _print_scores(trained: dict[str, _Trained]) -> None:
    print()
    print(f"{'':<10}{'training':<22}test")
    print(f"{'':<10}{'loss':<12}{'accuracy':<10}{'loss':<12}accuracy")
    for kind, found in trained.items():
        cells = [f"{loss:<12.4f}{accuracy:<10.4f}" for loss, accuracy in found.scores]
        print(f"{kind:<10}{''.join(cells)}{'no test data' * (len(cells) == 1)}".rstrip())
    print("Losses are means over the rows, without the penalty.")


def _print_times(trained: dict[str, _Trained], data: Dataset) -> None:
    calls = min(len(times) for found in trained.values() for times in found.times.values())
    names = list(next(iter(trained.values())).times)
    (n, d), c = data.X_train.shape, len(data.class_names)
    print(f"\nTime of one loss and gradient over all training data ({n} × {d} float32, {c} classes),")
    print(f"in ms: medians of at least {calls} calls, in alternating rounds")
    print(f"{'':<10}{''.join(f'{name:<14}' for name in names)}{'ratio' * (len(names) == 2)}".rstrip())
    for kind, found in trained.items():
        medians = [statistics.median(times) for times in found.times.values()]
        ratio = f"{medians[1] / medians[0]:.1f}" if len(medians) == 2 else "(nothing to compare the reference with)"
        print(f"{kind:<10}{''.join(f'{1e3 * t:<14.3g}' for t in medians)}{ratio}")


def _write(folder: Path, trained: dict[str, _Trained]) -> None:
    """Models and pictures; all pictures are drawn before the first file is written."""
    pictures = {"curves.png": plot.training_curves({kind: found.history for kind, found in trained.items()})}
    for kind, found in trained.items():
        if found.model.image_shape is not None:
            pictures[f"{kind}_templates.png"] = plot.class_templates(
                found.model, title=f"Weights of the {kind} classifier: what each class looks for"
            )
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, found in trained.items():
        found.model.save(folder / f"{kind}.npz")
        written.append(f"{kind}.npz")
    for name, figure in pictures.items():
        with replacing(folder / name) as file:
            figure.savefig(file, format="png")
        written.append(name)
    print(f"\nWritten to {folder}{os.sep}: {', '.join(written)}")
