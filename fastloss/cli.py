"""The command `fastloss`: train linear classifiers on images, show what this installation is, time it beside others.

Errors that a user can mend are one line on standard error and exit code 2. Results go to standard output, progress to
standard error.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import runpy
import statistics
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

import fastloss as fl
from fastloss import _checks as checks
from fastloss import _info, backends, bench, plot, threads
from fastloss._checks import FLOAT32, Array
from fastloss.check import GradientCheck, gradient_check
from fastloss.data import (
    DataError,
    Dataset,
    find_cifar10,
    load_cifar10,
    load_digits,
    load_libsvm,
    load_npz,
    standardisation,
    standardise,
)
from fastloss.data.npz import read_arrays
from fastloss.demo import server
from fastloss.lecture import SEARCHES, Lecture, Table, page
from fastloss.model import LinearModel, replacing
from fastloss.train import DivergenceError, State, sgd
from fastloss.train.recipes import Recipe, recipe

LOSSES = {
    "softmax": ("softmax",), "hinge": ("hinge",), "logistic": ("logistic",), "both": ("softmax", "hinge"),
}  # fmt: skip
LOSS_OPTIONS = {
    "softmax": ("label_smoothing", "temperature", "z_loss", "softcap"),
    "hinge": ("margin", "power", "over"),
    "logistic": ("label_smoothing", "over", "pos_weight"),
}
LIBSVM = (".libsvm", ".svm", ".txt")
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
  fastloss predict out/hinge.npz what a trained model makes of the test images
  fastloss demo                  drag points, and watch losses, gradients and the descent in a browser
  fastloss lecture               the lecture on linear classifiers, with your numbers and pictures, as one page
  fastloss gradcheck             is the gradient right?
  fastloss info                  which kernels this machine runs, and which backends there are
  fastloss bench --quick         a first table of times beside NumPy and what else is installed
  fastloss accelerate script.py  run a script with scikit-learn's logistic regression on these kernels""",
    )
    parser.add_argument("--version", action="version", version=f"fastloss {fl.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = commands.add_parser(
        "train",
        help="train linear classifiers, on images or other data",
        description="""\
Train linear classifiers, on images or other data, with softmax and with hinge (SVM) loss. Shows loss and accuracy on
training and test data, and the time of one loss and gradient over all training data beside the NumPy reference's.
Writes models (.npz) and pictures of training curves and class templates.

Features are standardised: their mean is subtracted, and what is left divided by its standard deviation. Settings
that are not given come from a recipe for the data set and the loss, and are shown when training starts.""",
        epilog="""examples:
  fastloss train
  fastloss train --data path/to/cifar-10-batches-bin --loss softmax
  fastloss train --loss hinge --power 2 --penalty l1 --strength 0.001
  fastloss train --data mine.npz --epochs 20 --step-size 0.01 --out results

An .npz file holds X (rows of numbers) and y (class indices from 0), and maybe X_test and y_test. Beside a file in
libsvm's format, one of the same name with .t added holds the test data.""",
    )
    train.set_defaults(run=_train)
    what = _add_data(train)
    what.add_argument(
        "--out", metavar="FOLDER", type=Path, default=Path("out"), help="where models and pictures go (default: out)"
    )
    _add_loss(train)
    how = train.add_argument_group("training (defaults: the recipe's)")
    how.add_argument("--epochs", type=int, metavar="N", help="passes over the training data")
    how.add_argument("--batch-size", type=int, metavar="N", help="rows for each step")
    how.add_argument("--step-size", type=float, metavar="X", help="the length of a step along the gradient")
    how.add_argument("--momentum", type=float, metavar="X", help="at least 0, below 1")
    how.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the order of rows; same seed, same bits (default: 0)"
    )
    _add_computing(train)

    gradcheck = commands.add_parser(
        "gradcheck",
        help="check gradients against differences of losses",
        description="""\
Check the gradient of a linear classifier's objective against centred differences of its values,
(f(W + h) − f(W − h)) / 2h, at a few numbers of W drawn at random. Data are standardised; W is random, for at W = 0 and
at a minimum mistakes can hide.

The verdict is the one that courses teach (CS231n): a relative error up to 1e-7 is a reason to be happy; up to 1e-4 is
fine for objectives with kinks, as the hinge and l1 have; up to 1e-2 should make you uncomfortable; above, the gradient
is probably wrong. Where a kink lies within the step the two cannot agree, and the number does not count. The exit code
is 0 for happy and fine, else 1.""",
        epilog="""examples:
  fastloss gradcheck
  fastloss gradcheck --loss hinge --power 2 --over max --n 50
  fastloss gradcheck --loss softmax --label-smoothing 0.1 --penalty l1 --strength 0.01 --data mine.npz
  fastloss gradcheck --dtype float32      why courses say: use double precision""",
    )
    gradcheck.set_defaults(run=_gradcheck)
    _add_data(gradcheck)
    _add_loss(gradcheck)
    how = gradcheck.add_argument_group("check")
    how.add_argument("--n", type=int, default=10, metavar="N", help="how many numbers of W to check (default: 10)")
    how.add_argument("--rows", type=int, default=500, metavar="N", help="training rows to use (default: 500)")
    how.add_argument("--h", type=float, default=1e-5, metavar="X", help="the step of the differences (default: 1e-5)")
    how.add_argument(
        "--dtype", choices=("float64", "float32"), default="float64",
        help="what the gradient is computed in; differences are always taken in float64 (default: float64)",
    )  # fmt: skip
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of W, rows and what is checked (default: 0)")
    _add_computing(gradcheck)

    predict = commands.add_parser(
        "predict",
        help="predict classes with a model that fastloss train has written",
        description="""\
Predict the classes of data with a model that 'fastloss train' has written (an .npz file; nothing in it is executed).
Shows what the model is, and how often it is right for each class; with --out, also writes the predictions as CSV.

Of data with a test part, that is used. An .npz file may hold X alone: then there are no labels to compare with.""",
        epilog="""examples:
  fastloss predict out/softmax.npz
  fastloss predict out/hinge.npz --data mine.npz --out predictions.csv""",
    )
    predict.set_defaults(run=_predict)
    predict.add_argument("model", metavar="MODEL", type=Path, help="the model, as out/softmax.npz")
    _add_data(predict)
    predict.add_argument(
        "--out", metavar="FILE", type=Path, help="a CSV file to write: row, class index, class name, and the true class"
    )
    predict.add_argument(
        "--threads", type=int, metavar="N",
        help=f"how many threads to use; results do not depend on it (default: {fl.get_num_threads()})",
    )  # fmt: skip

    story = commands.add_parser(
        "lecture",
        help="tell the lecture on linear classifiers on your data, as one page",
        description="""\
Tell the story of the lecture on linear classifiers (CS231n) on CIFAR-10, or on digits where it is absent: the losses,
an untrained classifier, 1000 random W, random local search, the gradient check, step sizes, stochastic gradient descent
with both losses, regularisers compared, templates, and the landscape of the loss. Writes one HTML page with numbers and
pictures, which needs no other file. All numbers are computed in the run.

On CIFAR-10 and 2 cores it takes a few minutes, most of them for the searches; on digits seconds.""",
        epilog="""examples:
  fastloss lecture
  fastloss lecture --data path/to/cifar-10-batches-bin --out cifar10.html
  fastloss lecture --data digits --seeds 20 --out digits.html""",
    )
    story.set_defaults(run=_lecture)
    what = _add_data(story)
    what.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("out/lecture.html"),
        help="the page to write (default: out/lecture.html)",
    )  # fmt: skip
    how = story.add_argument_group("searches")
    how.add_argument(
        "--tries", type=int, default=1000, metavar="N", help="trials of each random search (default: 1000)"
    )
    how.add_argument(
        "--seeds", type=int, default=5, metavar="N", help="how often each search is done, for its range (default: 5)"
    )
    _add_computing(story)

    demo = commands.add_parser(
        "demo",
        help="drag points, and watch a linear classifier learn, in a browser",
        description="""\
Open a page in the browser: nine points of three classes, which you drag; scores, the loss and gradient of each point,
decision regions, and gradient descent step by step, for five losses and eight strengths of the L2 penalty. All of it
is computed by fastloss as you watch.

The page is for browsers on this machine alone, and needs no internet. Each browser tab has points of its own. Ctrl-C
ends it.""",
        epilog="""examples:
  fastloss demo
  fastloss demo --port 8000 --no-browser      then open http://127.0.0.1:8000/""",
    )
    demo.set_defaults(run=_demo)
    demo.add_argument(
        "--port", type=int, default=server.PORT, metavar="N",
        help=f"where to listen; 0 takes any that is free (default: {server.PORT})",
    )  # fmt: skip
    demo.add_argument("--no-browser", action="store_true", help="do not open a browser; the address is printed")

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
measured again before it counts. The folder given by --out receives results.json, three pictures and report.html.

With --suite estimators whole fits of models run beside those of scikit-learn, XGBoost and LightGBM, to the same goal.
That takes some minutes, and CIFAR-10 and 20 Newsgroups; with --quick digits take their place.""",
        epilog="""examples:
  fastloss bench --quick
  fastloss bench --cases softmax-65536x100 'hinge-*' --json times.json
  fastloss bench --suite cpu --out results
  fastloss bench --suite cpu --cases 'linear-*' --peers torch --out results
  fastloss bench --suite estimators --cases 'sgd-*' --out results""",
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


def _add_data(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", metavar="PATH",
        help="a folder of CIFAR-10 (binary or Python version), an .npz file, a file in libsvm's format (.libsvm, .svm "
        "or .txt), or 'digits', the images that come with scikit-learn (default: CIFAR-10, if the environment variable "
        "FASTLOSS_DATA names its folder; else digits)",
    )  # fmt: skip
    return group


def _add_loss(parser: argparse.ArgumentParser) -> None:
    loss = parser.add_argument_group("loss")
    loss.add_argument("--loss", choices=LOSSES, default="both", help="which loss (default: both softmax and hinge)")
    loss.add_argument("--margin", type=float, metavar="X", help="hinge: the margin Δ (default: 1)")
    loss.add_argument("--power", type=int, choices=(1, 2), help="hinge: 1, or 2 for the squared hinge (default: 1)")
    loss.add_argument(
        "--over", choices=("sum", "mean", "max"),
        help="hinge: take the sum, mean or max over the wrong classes; logistic: sum or mean over all (default: sum)",
    )  # fmt: skip
    loss.add_argument(
        "--penalty", choices=PENALTIES,
        help="on the weights W: l2 is Σ W², l1 is Σ |W|, elasticnet their sum, maxnorm a bound on the norm of each row "
        "of W (default: l2)",
    )  # fmt: skip
    loss.add_argument(
        "--strength", type=float, metavar="X",
        help="what the penalty is multiplied by, or the bound for maxnorm (default for l2: the recipe's)",
    )  # fmt: skip
    loss.add_argument("--label-smoothing", type=float, metavar="X", help="softmax, logistic: from 0 to 1 (default: 0)")
    loss.add_argument("--temperature", type=float, metavar="X", help="softmax: scores are divided by it (default: 1)")
    loss.add_argument("--z-loss", type=float, metavar="X", help="softmax: adds X times log² of the sum (default: 0)")
    loss.add_argument("--softcap", type=float, metavar="X", help="softmax: scores become X · tanh(s/X) (default: not)")
    loss.add_argument(
        "--pos-weight", type=float, metavar="X", help="logistic: how much a row counts in its own class (default: 1)"
    )


def _add_computing(parser: argparse.ArgumentParser) -> None:
    compute = parser.add_argument_group("computing")
    compute.add_argument(
        "--threads", type=int, metavar="N",
        help=f"how many threads to use; results do not depend on it (default: {fl.get_num_threads()})",
    )  # fmt: skip
    compute.add_argument(
        "--backend", metavar="NAME", help="one that 'fastloss info' lists (default: the fastest that is available)"
    )


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
    with _computing(args):
        data = _load(args.data)
        recipes = {kind: _recipe(args, data, kind) for kind in LOSSES[args.loss]}
        chosen = backends.choose(None, "gradient", fl.Softmax(), FLOAT32, ()).name
        print(f"{'data':<10}{_describe(data)}")
        _print_backend(chosen)
        features = _standardised(data, recipes)
        trained = {kind: _fit(kind, settings, data, features, args.seed, chosen) for kind, settings in recipes.items()}
    _print_scores(trained)
    _print_times(trained, data)
    _write(args.out, trained)
    return 0


@contextmanager
def _computing(args: argparse.Namespace) -> Iterator[None]:
    """The backend and the threads that were asked for; the caller's again afterwards."""
    with ExitStack() as stack:
        if getattr(args, "backend", None) is not None:
            stack.enter_context(fl.use_backend(args.backend))
        if args.threads is not None:
            stack.callback(fl.set_num_threads, fl.get_num_threads())
            fl.set_num_threads(args.threads)
        yield


def _print_backend(name: str) -> None:
    n = threads.resolve(None)
    print(f"{'backend':<10}{name}, {n} thread{'s' * (n > 1)}", flush=True)


def _check_options(args: argparse.Namespace) -> None:
    """Turn away options that would have no effect."""
    for name in dict.fromkeys(name for names in LOSS_OPTIONS.values() for name in names):
        kinds = [kind for kind, names in LOSS_OPTIONS.items() if name in names]
        if getattr(args, name) is not None and not set(kinds) & set(LOSSES[args.loss]):
            option, of = f"--{name.replace('_', '-')}", " and the ".join(kinds)
            raise ValueError(f"{option} is an option of the {of} loss; with --loss {args.loss} it has no meaning")
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
            print(f"fastloss: FASTLOSS_DATA ({where}) holds no CIFAR-10: the data are digits", file=sys.stderr)
        return load_digits()
    if where == "digits":
        return load_digits()
    if Path(where).suffix == ".npz":
        return load_npz(where)
    if Path(where).is_dir():
        return load_cifar10(where)
    if Path(where).is_file() and Path(where).suffix in LIBSVM:
        return load_libsvm(where)
    what = f"is neither a folder nor an .npz or {LIBSVM[0]} file" if Path(where).exists() else "does not exist"
    raise ValueError(f"--data {where} {what}; name a folder of CIFAR-10, an .npz or {LIBSVM[0]} file, or digits")


def _recipe(args: argparse.Namespace, data: Dataset, kind: str) -> Recipe:
    """The recipe for the data and a loss, changed as the options say."""
    settings = recipe(data.name, kind, data.X_train.shape[1])
    names = ("epochs", "batch_size", "step_size", "momentum")
    given = {name: getattr(args, name, None) for name in names}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    options = {name: getattr(args, name) for name in LOSS_OPTIONS[kind] if getattr(args, name) is not None}
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
    provenance = {
        "data": _describe(data),
        "training": "sgd, " + ", ".join(f"{name}={value}" for name, value in (options | {"seed": seed}).items()),
        "computed by": f"fastloss {fl.__version__}, backend {backend}",
    }
    model = LinearModel(
        result.W, data.class_names, features.shift, features.scale, description, data.image_shape, provenance
    )
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
    for name, drawn in pictures.items():
        with replacing(folder / name) as file:
            plot.figure_of(drawn).savefig(file, format="png")
        written.append(name)
    print(f"\nWritten to {folder}{os.sep}: {', '.join(written)}")


# --- predict -------------------------------------------------------------------------------------------------------
def _predict(args: argparse.Namespace) -> int:
    model = LinearModel.load(args.model)
    if args.out is not None:
        _check_out(args.out.parent)
        if args.out.is_dir():
            raise ValueError(f"--out {args.out} is a folder; name a file, as {args.out / 'predictions.csv'}")
    with _computing(args):
        X, y, what = _rows_to_predict(args.data, model)
        found = model.predict(X)
    print(f"{'model':<10}{args.model}: {model.loss}")
    for name, origin in model.provenance.items():
        print(f"{'':<10}{name}: {origin}")
    print(f"{'rows':<10}{what}\n")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO(newline="")
        table = csv.writer(text)
        table.writerow(["row", "class", "name", *(["true"] if y is not None else [])])
        for row, predicted in enumerate(found.tolist()):
            true = [] if y is None else [int(y[row])]
            table.writerow([row, predicted, model.class_names[predicted], *true])
        with replacing(args.out) as file:
            file.write(text.getvalue().encode())
    width = max(map(len, (*model.class_names, "class")))
    print(f"{'class':<{width}}  predicted" + ("" if y is None else "  rows  right"))
    for k, name in enumerate(model.class_names):
        line = f"{name:<{width}}  {np.count_nonzero(found == k):>9}"
        if y is not None:
            n, right = np.count_nonzero(y == k), np.count_nonzero((y == k) & (found == k))
            line += f"  {n:>4}  {100 * right / n:>5.1f} %" if n else f"  {n:>4}"
        print(line)
    if y is not None:
        print(f"\n{np.count_nonzero(found == y)} of {len(y)} rows are right: {100 * np.mean(found == y):.2f} %")
    if args.out is not None:
        print(f"Written to {args.out}")
    return 0


def _rows_to_predict(where: str | None, model: LinearModel) -> tuple[Array, Array | None, str]:
    """Features, the model's index of each row's class where that is known, and what they are in words."""
    if where is not None and Path(where).suffix == ".npz":
        arrays = read_arrays(where, ("X",), ("y",))
        if "y" not in arrays:
            X = arrays["X"]
            return X, None, f"{where}: X {X.shape}, no labels"
    if where is not None and Path(where).suffix in LIBSVM:
        data = load_libsvm(where, n_features=model.W.shape[1] - 1)  # trailing zeros are not in the file
    else:
        data = _load(where)
    X, y = (data.X_train, data.y_train) if data.X_test is None else (data.X_test, data.y_test)
    assert y is not None
    what = f"{_describe(data)}; the {'training' if data.X_test is None else 'test'} part is used"
    known = {name: k for k, name in enumerate(model.class_names)}
    unknown = [name for name in data.class_names if name not in known]
    if not unknown:
        return X, np.array([known[name] for name in data.class_names])[y], what
    if where is not None and Path(where).suffix == ".npz" and len(data.class_names) <= len(model.class_names):
        return X, y, what  # indices, whatever the classes are called
    raise DataError(f"{data.name} has the class {unknown[0]!r}; the model knows {', '.join(model.class_names)}")


# --- lecture -------------------------------------------------------------------------------------------------------
def _lecture(args: argparse.Namespace) -> int:
    _check_out(args.out.parent)
    if args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder; name a file, as {args.out / 'lecture.html'}")
    tries, seeds = checks.integer(args.tries, "tries", low=1), checks.integer(args.seeds, "seeds", low=1)
    page.check()
    with _computing(args):
        data = _load(args.data)
        story = Lecture(data, tries, seeds)
        chosen = backends.choose(None, "gradient", fl.Softmax(), FLOAT32, ()).name
        print(f"{'data':<10}{_describe(data)}")
        _print_backend(chosen)
        sections = []
        for section in story.sections():
            sections.append(section)
            print(f"{section.seconds:>8.1f} s  {section.title}", flush=True)
        n = threads.resolve(None)
    machine = _info.collect()
    facts = {
        "Data": _describe(data),
        "Computed by": f"fastloss {fl.__version__}, backend {chosen}, {n} thread{'s' * (n > 1)}",
        "On": f"{machine['processor']}, Python {machine['python']}, NumPy {np.__version__}",
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    content = page.page(f"The lecture on linear classifiers, on {data.name}", facts, sections)
    with replacing(args.out) as file:
        file.write(content)
    for section in sections:
        for table in section.tables if section.title == SEARCHES else ():
            _print_table(table)
    print(f"\nWritten to {args.out} ({len(content) / 1e6:.1f} MB), after {sum(s.seconds for s in sections):.0f} s")
    return 0


def _print_table(table: Table) -> None:
    print()
    widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
    for row in (table.header, *table.rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


# --- demo ----------------------------------------------------------------------------------------------------------
def _demo(args: argparse.Namespace) -> int:
    server.serve(args.port, browser=not args.no_browser)
    return 0


# --- gradcheck -----------------------------------------------------------------------------------------------------
#: A verdict of `fastloss.check` in words.
VERDICTS = {
    "happy": "be happy",
    "fine": "fine for an objective with kinks",
    "uncomfortable": "this should make you uncomfortable",
    "wrong": "the gradient is probably wrong",
    "noise": "all of it is within the rounding of the losses; use a larger --h",
    "kink": "every number here has a kink within the step; use a smaller --h or fewer --rows",
}
SMOOTH_FINE = "fine for an objective with kinks, which this is not: 1e-7 would be better"


def _gradcheck(args: argparse.Namespace) -> int:
    _check_options(args)
    rng = np.random.default_rng(checks.integer(args.seed, "seed", low=0))
    n_rows = checks.integer(args.rows, "rows", low=1)
    with _computing(args):
        data = _load(args.data)
        recipes = {kind: _recipe(args, data, kind) for kind in LOSSES[args.loss]}
        (n, d), c = data.X_train.shape, len(data.class_names)
        rows = np.sort(rng.choice(n, size=min(n, n_rows), replace=False))
        W = rng.standard_normal((c, d + 1)) / np.sqrt(d)  # standardised features have scores near 1
        print(f"{'data':<10}{_describe(data)}; {len(rows)} training rows are used")
        _print_backend(backends.choose(None, "gradient", fl.Softmax(), np.dtype(args.dtype), ()).name)
        found = {}
        for kind, settings in recipes.items():
            shift, scale = standardisation(data.X_train, per_feature=settings.per_feature)
            objective = fl.LinearObjective(
                settings.loss, data.X_train, data.y_train, penalty=settings.penalty, shift=shift, scale=scale
            )
            found[kind] = gradient_check(
                objective, W, args.n, h=args.h, rows=rows, seed=args.seed, dtype=np.dtype(args.dtype)
            )
            print(f"{kind:<10}{settings.loss!r}, {settings.penalty or 'no penalty'}, gradient in {args.dtype}")
    for kind, result in found.items():
        _print_check(kind, result, data, args.h)
    return 0 if all(result.ok for result in found.values()) else 1


def _print_check(kind: str, found: GradientCheck, data: Dataset, h: float) -> None:
    names = f"{'feature':>8}{'analytic':>16}{'numerical':>16}{'rel. error':>12}{'kinks':>7}"
    print(f"\n{kind:<10}{'class':<14}{names}  verdict")
    columns = (found.coordinates, found.analytic, found.numerical, found.relative_errors, found.kinks, found.verdicts)
    for (c, d), analytic, numerical, error, kinks, verdict in zip(*columns, strict=True):
        feature = "bias" if d == data.X_train.shape[1] else str(d)
        numbers = f"{analytic:>16.8g}{numerical:>16.8g}{error:>12.1e}{kinks:>7}"
        print(f"{'':<10}{data.class_names[c]:<14}{feature:>8}{numbers}  {verdict}")
    counted = [e for e, v in zip(found.relative_errors, found.verdicts, strict=True) if v not in ("kink", "noise")]
    worst = f"relative error at most {max(counted):.1e} (h {h:g}): " if counted else ""
    unkinked = found.verdict == "fine" and found.smooth
    print(f"{'':<10}{worst}{SMOOTH_FINE if unkinked else VERDICTS[found.verdict]}")
    if any(0 < abs(a - b) <= found.noise and e > 1e-7 for a, b, e in zip(*columns[1:4], strict=True)):
        print(f"{'':<10}Differences up to {found.noise:.0e} are within the rounding of the losses.")
