"""The lecture on linear classifiers, told on data: each section computes its numbers and draws its pictures.

The order is that of the lecture (CS231n, "Linear Classification" and "Optimization"): what the losses are, what they
say of an untrained classifier, two bad ways of finding W, the gradient and its check, descent, regularisation, and what
has been learned. All numbers on the page are computed when it is made.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

import fastloss as fl
from fastloss import landscape, plot, train
from fastloss._checks import Array
from fastloss.check import gradient_check
from fastloss.data import Dataset, standardisation
from fastloss.model import LinearModel, predict
from fastloss.train.recipes import Recipe, recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOSSES = ("softmax", "hinge")
#: The root mean square length of CIFAR-10's images less their mean, for which the lecture's scales of W are meant.
LENGTH = 3500.0
WIDE = 640  # pixels
STEPS = 50  # of gradient descent, for each penalty
SEARCHES = "Random search, and random local search"  # the title of a part, whose table the command prints
#: What the lecture found, with one draw each.
LECTURE = {"random": 15.5, "local": 21.4}


@dataclass(frozen=True)
class Table:
    """Text in rows and columns; the first column holds names, the others numbers."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Picture:
    """A PNG file, and what it shows, in words."""

    png: bytes
    caption: str

    @property
    def wide(self) -> bool:
        """Whether it is too wide to stand beside another."""
        return int.from_bytes(self.png[16:20], "big") > WIDE  # where the format keeps the width


@dataclass
class Section:
    """A part of the story."""

    title: str
    text: list[str]
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    seconds: float = 0.0


def picture(drawn: Axes | list[Axes], caption: str) -> Picture:
    """The figure of what was drawn, as a file."""
    buffer = BytesIO()
    plot.figure_of(drawn).savefig(buffer, format="png", dpi=110)
    return Picture(buffer.getvalue(), caption)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Median and range."""
    if len(values) == 1:
        return form(values[0])
    return f"{form(statistics.median(values))} ({form(min(values))} to {form(max(values))})"


def _finished(result: Any) -> Any:
    """A result of training, unless Ctrl-C was pressed meanwhile."""
    if result.stopped == "interrupted":
        raise KeyboardInterrupt
    return result


class Lecture:
    """The story of one data set.

    Parameters
    ----------
    data : fastloss.data.Dataset
        With test data.
    tries : int
        Trials of each search; the lecture has 1000.
    seeds : int
        How often each search is done.
    """

    def __init__(self, data: Dataset, tries: int = 1000, seeds: int = 5) -> None:
        if data.X_test is None or data.y_test is None:
            raise ValueError(f"{data.name} has no test data, which the story needs; give X_test and y_test")
        self.data, self.tries, self.seeds = data, tries, seeds
        self.X, self.y, self.X_test, self.y_test = data.X_train, data.y_train, data.X_test, data.y_test
        self.n_classes = len(data.class_names)
        self.recipes: dict[str, Recipe] = {kind: recipe(data.name, kind, self.X.shape[1]) for kind in LOSSES}
        self.shift, self.scale = standardisation(self.X, per_feature=self.recipes["softmax"].per_feature)
        self.results: dict[str, train.Result] = {}

    def sections(self) -> Iterator[Section]:
        """The parts of the story, each when it has been computed."""
        for part in (
            self.losses, self.start, self.searches, self.check, self.sweep, self.descent, self.penalties,
            self.templates, self.landscape,
        ):  # fmt: skip
            begin = time.perf_counter()
            section = part()
            section.seconds = time.perf_counter() - begin
            yield section

    # --- what the parts share --------------------------------------------------------------------------------------
    def objective(self, loss: fl.Loss, penalty: fl.Penalty | None = None) -> fl.LinearObjective:
        """Over standardised training data, which stay as they are."""
        return fl.LinearObjective(loss, self.X, self.y, penalty=penalty, shift=self.shift, scale=self.scale)

    def accuracy(self, objective: fl.LinearObjective, W: Array) -> float:
        """On the test data."""
        weights, b = objective.fold_in(W)
        return float(np.mean(predict(self.X_test, weights, b, objective.centre) == self.y_test))

    def fit(self, settings: Recipe) -> train.Result:
        result = train.sgd(
            self.objective(settings.loss, settings.penalty), n_classes=self.n_classes,
            validation=(self.X_test, self.y_test), **settings.options,
        )  # fmt: skip
        return _finished(result)  # type: ignore[no-any-return]

    def some_rows(self, n: int) -> Array:
        size = len(self.X)
        return np.sort(np.random.default_rng(0).choice(size, size=min(n, size), replace=False))

    @property
    def raw_scale(self) -> float:
        """What the lecture's scales of W are multiplied by on other data than CIFAR-10, for scores of the same size."""
        if self.data.name == "cifar10":
            return 1.0
        return float(f"{LENGTH / float(np.linalg.norm(self.scale)):.1g}")

    # --- the parts -------------------------------------------------------------------------------------------------
    def losses(self) -> Section:
        scores = np.array([[3.2, 5.1, -1.7], [1.3, 4.9, 2.0], [2.2, 2.5, -3.1]])
        targets = np.arange(3)
        hinge = fl.Hinge().value(scores, targets, reduction="none")
        softmax = fl.Softmax().value(scores, targets, reduction="none")
        rows = [
            (name, *(f"{s:.1f}" for s in row), f"{a:.1f}", f"{b:.2f}")
            for name, row, a, b in zip(("cat", "car", "frog"), scores, hinge, softmax, strict=True)
        ]
        rows.append(("mean", "", "", "", f"{hinge.mean():.2f}", f"{softmax.mean():.2f}"))
        satisfied = np.array([[10, -2, 3], [10, 9, 9], [10, -100, -100]], float)
        jiggled = [fl.Softmax().value(satisfied + d, [0, 0, 0]) for d in ([0, 0, 0], [0.5, 0, 0])]
        return Section(
            "Two losses",
            [
                "A linear classifier gives an image x a score for each class, s = W x + b. The hinge (SVM) loss sums "
                "max(0, s_j − s_y + 1) over the wrong classes j: it wants the right class ahead by 1 and no more. "
                "The softmax loss is −log of the probability exp(s_y) / Σ exp(s_j): it is never satisfied.",
                "Three images of the lecture. (Its slides print base-10 logarithms by slip, 0.89 for the cat; the loss "
                f"is the natural one, {softmax[0]:.2f}.)",
                f"Where the right class is far ahead, as with scores (10, −2, 3), (10, 9, 9) and (10, −100, −100), the "
                f"hinge loss is 0 and stays so if a score moves a little; the softmax loss falls from {jiggled[0]:.4f} "
                f"to {jiggled[1]:.4f} as the first score grows by 0.5.",
            ],
            [Table(("image", "cat", "car", "frog", "hinge", "softmax"), rows)],
            [picture(plot.hinge_shape(), "The loss of one wrong class, over the difference of the two scores.")],
        )

    def start(self) -> Section:
        c, d = self.n_classes, self.X.shape[1]
        small = 1e-4 * np.random.default_rng(0).standard_normal((c, d + 1))
        rows = []
        for name, loss, expected, formula in (
            ("hinge", fl.Hinge(), float(c - 1), "C − 1"),
            ("softmax", fl.Softmax(), math.log(c), "ln C"),
        ):
            objective = self.objective(loss)
            found = [objective.value(W) for W in (np.zeros_like(small), small)]
            rows.append((name, f"{formula} = {expected:.4f}", *(f"{value:.4f}" for value in found)))
        return Section(
            "The loss of an untrained classifier",
            [
                "With W = 0 all scores are equal, so the hinge loss is C − 1 and the softmax loss ln C, whatever the "
                "data: the first thing to look at when a training starts. Small random weights come close."
            ],
            [Table(("loss", "expected", "W = 0", "W random, 10⁻⁴"), rows)],
        )

    def searches(self) -> Section:
        # Less the mean, but not scaled: so the lecture's first losses, 8.6 to 9.4, come out.
        objective = fl.LinearObjective(fl.Hinge(), self.X, self.y, shift=self.shift)
        factor, c = self.raw_scale, self.n_classes
        histories: dict[str, dict[str, Array]] = {}
        accuracies: dict[str, list[float]] = {"random": [], "local": []}
        values: dict[str, list[float]] = {"random": [], "local": []}
        for seed in range(self.seeds):
            found = {
                "random": train.random_search(objective, self.tries, 1e-4 * factor, seed, n_classes=c),
                "local": train.random_local_search(
                    objective, self.tries, 1e-3 * factor, 1e-4 * factor, seed, n_classes=c
                ),
            }
            for name, result in found.items():
                _finished(result)
                histories[f"{name} {seed}"] = result.history
                values[name].append(result.value)
                accuracies[name].append(self.accuracy(objective, result.W))
        done = "Each was done once, with seed 0."
        if self.seeds > 1:
            done = f"Each was done {self.seeds} times, with seeds 0 to {self.seeds - 1}: median and range are given."
        chance = float(np.bincount(self.y_test).max()) / len(self.y_test)
        cifar = self.data.name == "cifar10"
        rows = [
            (
                f"{title}, best of {self.tries}", _spread(values[name], "{:.3f}".format),
                _spread(accuracies[name], _percent), *((f"{LECTURE[name]} %",) if cifar else ()),
            )
            for name, title in (("random", "random W"), ("local", "random local search"))
        ]  # fmt: skip
        texts = [
            "Two bad ways to find W, with the hinge loss, on features less their mean. The first tries weights at "
            "random and keeps the best. The second starts somewhere, and takes a random step whenever it lowers the "
            "loss. As in the lecture, it starts from weights ten times as large, and so from a larger loss.",
            f"{done} Always naming the most frequent class would be right for {_percent(chance)}.",
        ]
        if cifar:
            texts.append(
                "The lecture's figures are single draws of such a search, from the original images; these are how far "
                "draws differ."
            )
        else:
            texts.append(
                f"The lecture's scales of W, made for CIFAR-10, are multiplied by {factor:g} here, so that scores are "
                "of the same size."
            )
        header = ("search", "hinge loss", "test accuracy", *(("the lecture",) if cifar else ()))
        caption = f"The best loss so far, {self.seeds} times for each search."
        return Section(
            SEARCHES, texts, [Table(header, rows)],
            [picture(plot.search_progress(histories), caption)],
        )  # fmt: skip

    def check(self) -> Section:
        rows, verdicts = [], []
        W = np.random.default_rng(0).standard_normal((self.n_classes, self.X.shape[1] + 1))
        W /= math.sqrt(self.X.shape[1])
        for kind, settings in self.recipes.items():
            found = gradient_check(self.objective(settings.loss, settings.penalty), W, 6, rows=self.some_rows(500))
            for place, analytic, numerical, error, verdict in zip(
                found.coordinates, found.analytic, found.numerical, found.relative_errors, found.verdicts, strict=True
            ):
                feature = "bias" if place[1] == self.X.shape[1] else f"feature {place[1]}"
                where = f"{kind}, {self.data.class_names[place[0]]}, {feature}"
                rows.append((where, f"{analytic:.7g}", f"{numerical:.7g}", f"{error:.1e}", verdict))
            verdicts.append(f"{kind}: {found.verdict}")
        return Section(
            "The gradient, checked",
            [
                "The gradient is computed by a formula, which is fast and exact but easy to get wrong; differences of "
                "losses, (f(W + h) − f(W − h)) / 2h, are slow and approximate but easy to get right. Here both are "
                "compared at a few numbers of a random W, on 500 images, in float64, with h = 10⁻⁵.",
                "A relative error up to 10⁻⁷ is a reason to be happy; up to 10⁻⁴ is fine for an objective with kinks; "
                f"above 10⁻² the gradient is probably wrong. Verdicts: {'; '.join(verdicts)}.",
            ],
            [Table(("number of W", "formula", "differences", "relative error", "verdict"), rows)],
        )

    def sweep(self) -> Section:
        rows, pictures = [], []
        for kind, settings in self.recipes.items():
            options = settings.options | {"epochs": 1, "schedule": "constant"}
            del options["step_size"]
            objective = self.objective(settings.loss, settings.penalty)
            found = _finished(train.step_size_sweep(objective, 1e-6, 1.0, 13, n_classes=self.n_classes, **options))
            start = objective.value(np.zeros((self.n_classes, self.X.shape[1] + 1)))
            rows.append((kind, f"{start:.3f}", f"{found.value:.3f}", f"{found.best:.2g}", f"{settings.step_size:g}"))
            caption = f"{kind}: the loss after one epoch, over the step size."
            pictures.append(picture(plot.step_sizes(found, start=start), caption))
        return Section(
            "How long should a step be?",
            [
                "The gradient says which way to go, not how far. One epoch of mini-batch descent with each of 13 step "
                "sizes, spread evenly on a log scale: too short hardly moves, too long overshoots. For a longer "
                "training whose steps shrink the best is another; the last column is what the next section takes."
            ],
            [Table(("loss", "before", "best after an epoch", "at step size", "recipe"), rows)],
            pictures,
        )

    def descent(self) -> Section:
        rows = []
        for kind, settings in self.recipes.items():
            begin = time.perf_counter()
            result = self.results[kind] = self.fit(settings)
            seconds = time.perf_counter() - begin
            accuracy, test = (float(result.history[name][-1]) for name in ("accuracy", "validation_accuracy"))
            rows.append((kind, f"{result.value:.3f}", _percent(accuracy), _percent(test), f"{seconds:.1f}"))
        best = max(LOSSES, key=lambda kind: float(self.results[kind].history["validation_accuracy"][-1]))
        model = self.model(best)
        curves = plot.training_curves({kind: result.history for kind, result in self.results.items()})
        scores = self.model("softmax").scores(self.X_test)
        confusion = plot.confusion_matrix(self.y_test, model.predict(self.X_test), self.data.class_names)
        settings = self.recipes["softmax"]
        return Section(
            "Stochastic gradient descent",
            [
                f"Mini-batches of {settings.batch_size}, {settings.epochs} epochs, momentum {settings.momentum:g}, "
                f"steps that shrink as a cosine; features standardised. Penalties: "
                + "; ".join(f"{kind} {settings.penalty!r}" for kind, settings in self.recipes.items())
                + "."
            ],
            [Table(("loss", "objective", "training accuracy", "test accuracy", "seconds"), rows)],
            [
                picture(curves, "Objective and accuracy over the epochs."),
                picture(confusion, f"What the {best} classifier takes the test images for."),
                picture(
                    plot.losses_compared(scores, self.y_test),
                    "Both losses of the same scores, those of the softmax classifier: a point for each test image.",
                ),
            ],
        )

    def model(self, kind: str) -> LinearModel:
        return LinearModel(
            self.results[kind].W, self.data.class_names, self.shift, self.scale, repr(self.recipes[kind].loss),
            self.data.image_shape,
        )  # fmt: skip

    def penalties(self) -> Section:
        settings = self.recipes["softmax"]
        known = settings.penalty.strength if settings.penalty is not None else 0.01
        # Ten times what generalises best, so that what each does is plain to see.
        choices: dict[str, Callable[[float], fl.Penalty | None]] = {
            "none": lambda norm: None,
            "L2": lambda norm: fl.L2(10 * known),
            "L1": lambda norm: fl.L1(known),
            "elastic net": lambda norm: fl.ElasticNet(known, beta=10.0),  # the sum of those two
            "max norm": lambda norm: fl.MaxNorm(float(f"{norm / 2:.2g}") or 1.0),  # 0 if nothing is learned
        }
        rows, weights, norm, note = [], {}, 1.0, ""
        for name, choose in choices.items():
            penalty = choose(norm)
            # On all data: the noise of mini-batches is larger than a proximal step, and leaves no weight at 0.
            result = _finished(
                train.gradient_descent(
                    self.objective(settings.loss, penalty), n_classes=self.n_classes, steps=STEPS,
                    step_size=settings.step_size, momentum=settings.momentum, evaluate_every=STEPS,
                    validation=(self.X_test, self.y_test),
                )
            )  # fmt: skip
            W = weights[name] = result.W[:, :-1]
            accuracy, test = (float(result.history[key][-1]) for key in ("accuracy", "validation_accuracy"))
            zeros, norms = np.count_nonzero(W == 0) / W.size, np.linalg.norm(W.astype(np.float64), axis=1)
            if penalty is None:
                norm = float(norms.mean())
            if penalty is None and zeros:
                note = " Weights of features that are the same in all rows are never moved from 0."
            rows.append((repr(penalty) if penalty else "none", _percent(accuracy), _percent(test), _percent(zeros),
                         f"{np.linalg.norm(norms):.3g}", f"{np.abs(W).max():.2g}"))  # fmt: skip
        return Section(
            "Regularisation",
            [
                "Many W have almost the same loss; a penalty says which to prefer. L2 (Σ W²) spreads weights out, L1 "
                "(Σ |W|) makes many of them exactly 0, the elastic net is their sum (here of the two before it), and "
                "max norm bounds the length of each class's weights (here to half of what it is without). Softmax with "
                f"each, after {STEPS} steps of gradient descent on all data, with step size and momentum from "
                f"above.{note}"
            ],
            [
                Table(
                    ("penalty", "training accuracy", "test accuracy", "weights that are 0", "‖W‖", "largest |w|"), rows
                )
            ],
            [
                picture(
                    plot.weight_magnitudes(weights), "The magnitudes of the weights, from the largest to the smallest."
                )
            ],
        )

    def templates(self) -> Section:
        if self.data.image_shape is None:
            text = "The features of these data are no images, so there are no templates to look at."
            return Section("What has been learned", [text])
        return Section(
            "What has been learned",
            [
                "The score of a class is the inner product of the image and the weights of the class: a template that "
                "images are matched with. Grey is 0, lighter speaks for the class, darker against it."
            ],
            [],
            [picture(plot.class_templates(self.model(kind), title=kind), f"Templates of the {kind} classifier.")
             for kind in LOSSES],
        )  # fmt: skip

    def landscape(self) -> Section:
        trained = {kind: np.asarray(self.results[kind].W, np.float64) for kind in LOSSES}
        hinge = self.objective(self.recipes["hinge"].loss, self.recipes["hinge"].penalty)
        ray = landscape.slice_1d(hinge, trained["hinge"])
        kinks = landscape.breakpoints(hinge, trained["hinge"], ray.direction)
        bent = [int(np.bincount(kinks.rows, minlength=1).argmax())]  # the image with the most breakpoints
        bare = self.objective(self.recipes["hinge"].loss)
        one = landscape.slice_1d(bare, trained["hinge"], ray.direction, np.linspace(-1, 1, 401), rows=bent)
        its = landscape.breakpoints(bare, trained["hinge"], ray.direction, rows=bent)
        softmax = self.objective(self.recipes["softmax"].loss, self.recipes["softmax"].penalty)
        toward = landscape.slice_1d(softmax, trained["softmax"], trained["softmax"], np.linspace(-1, 3, 101))
        some, grid = self.some_rows(10_000), np.linspace(-1, 1, 41)
        plane = landscape.slice_2d(hinge, trained["hinge"], a=grid, b=grid, rows=some)
        lowest = f"{kinks.minimum()[0]:.3g}"
        return Section(
            "The landscape of the loss",
            [
                "The loss is a function of all numbers of W; along a ray or on a plane through the trained W it can be "
                "seen. The hinge loss of one image is piecewise linear along a ray: it bends where a margin crosses 0. "
                f"The mean over all {len(self.X):,} images bends at {len(kinks.a):,} places between a = −1 and 1, and "
                f"looks smooth. Exactly computed, it is lowest, without the penalty, at a = {lowest}.",
                "Directions W₁, W₂ are random and as long as W, but for the third picture.",
            ],
            [],
            [
                picture(plot.loss_along_ray(one, breakpoints=its, label="one image"), "One image's hinge loss."),
                picture(plot.loss_along_ray(ray, label="all images"), "All images' hinge objective on the same ray."),
                picture(
                    plot.loss_along_ray(toward, label="softmax"),
                    "Softmax objective from W = 0 (a = −1) through the trained W (a = 0) and beyond: W₁ = W.",
                ),
                picture(
                    plot.loss_on_plane(plane),
                    f"Hinge objective of {len(some):,} images on a plane through the trained W.",
                ),
            ],
        )
