"""Pictures, for slides: what losses look like, curves of training, templates, landscapes, and how fast the kernels are.

A picture takes the Axes to draw on as `ax`, or makes a figure of its own, and returns the Axes: those of several panels
take and return a list. Figures are made without pyplot: no window is opened and no global state of matplotlib's is
touched. Save one with `figure_of(axes).savefig(path)`; a notebook shows `figure_of(axes)`. Colours differ in lightness,
and lines in style, so that pictures can be told apart in print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from fastloss import _checks as checks
from fastloss._checks import Array
from fastloss.landscape import Breakpoints, Plane, Ray
from fastloss.losses import Hinge, Loss, Softmax
from fastloss.model import LinearModel
from fastloss.train import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#08519c", "#e6821e", "#3a3a3a", "#7b9e3f", "#d9a0c0")
MARKS = ("o", "s", "^", "D", "v")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
#: Markers in a scatter of many rows; more would hide each other.
MOST_POINTS = 3000
#: Classes of a confusion matrix that has names, and counts in its cells; with more it does not grow any further.
MOST_COUNTS = 30


def figure_class() -> type[Figure]:
    """matplotlib's Figure; ImportError, with the extra that brings it, where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "fastloss[cli]"') from error
    return Figure


def _figure(width: float, height: float) -> Figure:
    """A figure of its own, in inches."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return figure_class()(figsize=(width, height), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))


def _axes(ax: Axes | Sequence[Axes], n: int, of: str) -> list[Axes]:
    """The Axes given, as a list of n."""
    given = list(np.ravel(np.asarray(ax, dtype=object)))
    if len(given) != n:
        raise ValueError(f"ax has {len(given)} Axes; there must be {n}: {of}")
    return given


def training_curves(
    histories: Mapping[str, Mapping[str, Array]], ax: Axes | Sequence[Axes] | None = None
) -> list[Axes]:
    """Loss and accuracy over the epochs of one or more trainings.

    Each loss has a panel of its own, since losses differ in unit; the accuracies share the last panel. The panels show
    what follows the first record; the loss of that one is written in its panel.

    Parameters
    ----------
    histories : dict
        Name → `history` of a `fastloss.train.Result`.
    ax : sequence of Axes, optional
        To draw on, in place of a new figure: one for each history, then one for the accuracies.

    Returns
    -------
    list of matplotlib.axes.Axes
        Those drawn on, as in `ax`.

    Raises
    ------
    ValueError
        If there is no history, or `ax` has another number of Axes.
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> from fastloss.plot import training_curves
    >>> from fastloss.train import gradient_descent
    >>> result = gradient_descent(fl.LinearObjective(fl.Softmax(), np.eye(3), np.arange(3)), steps=5)
    >>> [axes.get_ylabel() for axes in training_curves({"softmax": result.history})]
    ['loss (with penalty)', 'accuracy (%)']
    """
    if not histories:
        raise ValueError("histories is empty; it must hold at least one history by name")
    n = len(histories) + 1
    if ax is None:
        figure = _figure(4.2 * n, 3.6)
        ax = list(figure.subplots(1, n))
    from matplotlib.ticker import MaxNLocator

    *loss_panels, accuracy_panel = _axes(ax, n, "one for each history, then one for the accuracies")

    accuracies = []
    looks = zip(cycle(COLOURS), cycle(MARKS), strict=False)
    for (name, history), panel, (colour, mark) in zip(histories.items(), loss_panels, looks, strict=False):
        epochs = history["epoch"]
        every = max(1, len(epochs) // 12)
        style: dict[str, Any] = {"color": colour, "marker": mark, "markersize": 3.5, "markevery": every}
        panel.plot(epochs, history["loss"], **style)
        panel.set_ylabel("loss (with penalty)")
        panel.set_title(name)
        start = f"at the start: {history['loss'][0]:.4g}"
        panel.text(0.97, 0.95, start, transform=panel.transAxes, ha="right", va="top")
        _focus(panel, [history["loss"]])
        for key, label, line, fill in (
            ("accuracy", "training", "-", colour),
            ("validation_accuracy", "test", "--", "white"),
        ):
            if key in history:
                accuracies.append(100 * history[key])
                accuracy_panel.plot(epochs, accuracies[-1], label=f"{name}, {label}", linestyle=line, mfc=fill, **style)
    _focus(accuracy_panel, accuracies)
    accuracy_panel.set_ylabel("accuracy (%)")
    accuracy_panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False, fontsize=9)
    for panel in (*loss_panels, accuracy_panel):
        panel.set_xlabel("epochs (passes over the training data)")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return [*loss_panels, accuracy_panel]


def _focus(panel: Axes, curves: list[Array]) -> None:
    """Let the panel show all but the first record, which stands far off and would flatten the rest."""
    values = np.concatenate([curve[1:] for curve in curves])
    if len(values) > len(curves) and np.ptp(values) > 0:
        gap = 0.08 * np.ptp(values)
        panel.set_ylim(values.min() - gap, values.max() + gap)


def figure_of(drawn: Axes | Sequence[Axes]) -> Figure:
    """The figure that Axes, or the first of several, are in: to save it."""
    panel: Any = np.ravel(np.asarray(drawn, dtype=object))[0]
    figure: Figure | None = panel.get_figure(root=True)
    assert figure is not None
    return figure


def _pictures(model: LinearModel) -> tuple[Array, float]:
    """Templates (C, height, width), or (C, height, width, 3), and the weight that is shown as white; −it is black.

    All templates of a model share one scale, which cuts off the largest weights, one in 200.
    """
    shape = model.image_shape
    if shape is None or len(shape) not in (2, 3) or shape[:-2] not in ((), (1,), (3,)):
        raise ValueError(
            f"model.image_shape is {shape}; templates are pictures of (height, width), (1, height, width) "
            "or (3, height, width)"
        )
    templates = model.W[:, :-1].astype(np.float64).reshape(len(model.W), *shape)
    if templates.ndim == 4:
        templates = np.moveaxis(templates, 1, -1)
        if templates.shape[-1] == 1:
            templates = templates[..., 0]
    limit = float(np.quantile(np.abs(templates), 0.995))
    return templates, limit or 1.0


def class_templates(model: LinearModel, ax: Axes | Sequence[Axes] | None = None, *, title: str = "") -> list[Axes]:
    """The weights of each class as a picture: what a linear classifier looks for.

    The score of a class is the inner product of the image and its template, so the template is what it matches images
    with. Mid-grey is a weight of 0: lighter pixels speak for the class, darker ones against it. For colour images
    that is so in each of red, green and blue.

    Parameters
    ----------
    model : fastloss.model.LinearModel
        With `image_shape` (height, width), (1, height, width) or (3, height, width).
    ax : sequence of Axes, optional
        To draw on, in place of a new figure: one for each class.
    title : str
        Over a new figure.

    Returns
    -------
    list of matplotlib.axes.Axes
        Those drawn on, as in `ax`.

    Raises
    ------
    ValueError
        If the model's features are no image, or `ax` has another number of Axes.
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> import numpy as np
    >>> from fastloss.model import LinearModel
    >>> from fastloss.plot import class_templates
    >>> model = LinearModel(np.eye(2, 5), ("left", "right"), image_shape=(2, 2))
    >>> [axes.get_title() for axes in class_templates(model)]
    ['left', 'right']
    """
    templates, limit = _pictures(model)
    n = len(templates)
    new = ax is None
    if ax is None:
        columns = min(n, 5)
        rows = -(-n // columns)
        figure = _figure(1.7 * columns + 0.9, 1.95 * rows + 0.4 * bool(title))
        ax = list(figure.subplots(rows, columns, squeeze=False).flat)
        for unused in ax[n:]:
            unused.remove()
        ax = ax[:n]
        if title:
            figure.suptitle(title)
    panels = _axes(ax, n, "one for each class")
    shown: Any = None
    for panel, template, name in zip(panels, templates, model.class_names, strict=True):
        if template.ndim == 3:
            template = np.clip(0.5 + 0.5 * template / limit, 0, 1)
        # For colours the limits matter only to the bar beside them.
        shown = panel.imshow(template, cmap="gray", vmin=-limit, vmax=limit, interpolation="nearest")
        panel.set_title(name, fontsize=11)
        panel.set_xticks([])
        panel.set_yticks([])
    figure = figure_of(panels[0])
    if new:
        unit = "weight, per standard deviation" if model.scale is not None else "weight"
        bar = figure.colorbar(shown, ax=panels, fraction=0.03, pad=0.02, ticks=[-limit, 0, limit])
        bar.ax.set_yticklabels([f"−{limit:.2g}", "0", f"+{limit:.2g}"])
        bar.set_label(unit + (" (red, green, blue)" if templates.ndim == 4 else ""))
    return panels


# --- one panel -----------------------------------------------------------------------------------------------------
def _panel(ax: Axes | None, width: float = 5.2, height: float = 3.8) -> Axes:
    """The Axes given, or those of a new figure, with light lines behind and no frame at the top and right."""
    panel = _figure(width, height).subplots() if ax is None else ax
    panel.grid(alpha=0.3)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    return panel


def _looks(n: int) -> list[dict[str, Any]]:
    """Lines that differ in lightness, dashes and marks."""
    styles = zip(cycle(COLOURS), cycle(LINES), cycle(MARKS), strict=False)
    return [
        {"color": c, "linestyle": line, "marker": mark} for (c, line, mark), _ in zip(styles, range(n), strict=False)
    ]


def loss_along_ray(
    ray: Ray, ax: Axes | None = None, *, breakpoints: Breakpoints | None = None, label: str = "objective"
) -> Axes:
    """The objective along a ray `W + a W₁`, with its lowest point marked.

    Parameters
    ----------
    ray : fastloss.landscape.Ray
    ax : Axes, optional
        To draw on, in place of a new figure; several rays may share it.
    breakpoints : fastloss.landscape.Breakpoints, optional
        Of the hinge along the same ray: drawn as ticks below the curve (the data loss is linear between them).
    label : str
        What the curve is of, for a legend.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        If the ray has no points.
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> from fastloss.landscape import slice_1d
    >>> from fastloss.plot import loss_along_ray
    >>> objective = fl.LinearObjective(fl.Hinge(), np.eye(3), np.arange(3))
    >>> loss_along_ray(slice_1d(objective, np.zeros((3, 4)))).get_ylabel()
    'loss'
    """
    if len(ray.a) == 0:
        raise ValueError("ray has no points")
    panel = _panel(ax)
    look = _looks(len(panel.lines) // 2 + 1)[-1]
    lowest = int(np.argmin(ray.values))
    level = np.flatnonzero(ray.values == ray.values[lowest])  # empty where it is NaN
    if len(level):
        lowest = int(level[np.argmin(np.abs(ray.a[level]))])  # of a level stretch, where it is nearest to W
    panel.plot(ray.a, ray.values, color=look["color"], linestyle=look["linestyle"], label=label)
    panel.plot([ray.a[lowest]], [ray.values[lowest]], color=look["color"], marker=look["marker"], linestyle="none")
    if breakpoints is not None:
        inside = breakpoints.a[(breakpoints.a >= ray.a.min()) & (breakpoints.a <= ray.a.max())]
        shown = inside[:: max(1, len(inside) // 1000)]
        panel.plot(shown, np.full(len(shown), 0.015), "|", color="0.25", markersize=7, markeredgewidth=0.6,
                   transform=panel.get_xaxis_transform(), label=f"{len(inside):,} breakpoints")  # fmt: skip
    panel.set_xlabel("a (multiples of the direction W₁; 0 is W)")
    panel.set_ylabel("loss")
    if len(panel.lines) > 2:
        panel.legend(frameon=False, fontsize=9)
    return panel


def loss_on_plane(plane: Plane, ax: Axes | None = None) -> Axes:
    """The objective on a plane `W + a W₁ + b W₂`: dark is low, and lines of equal loss carry its value.

    Parameters
    ----------
    plane : fastloss.landscape.Plane
        At least 2 × 2 places.
    ax : Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        If there are too few places.
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> from fastloss.landscape import slice_2d
    >>> from fastloss.plot import loss_on_plane
    >>> objective = fl.LinearObjective(fl.Hinge(), np.eye(3), np.arange(3))
    >>> loss_on_plane(slice_2d(objective, np.zeros((3, 4)))).get_ylabel()
    'b (multiples of W₂)'
    """
    if min(plane.values.shape) < 2:
        raise ValueError(f"plane has {plane.values.shape} places; there must be at least 2 × 2")
    panel = _panel(ax, 5.2, 4.6)
    panel.grid(False)
    if np.ptp(plane.values) > 0:
        panel.contourf(plane.a, plane.b, plane.values, levels=24, cmap="gray", alpha=0.85)
        lines = panel.contour(plane.a, plane.b, plane.values, levels=10, colors="black", linewidths=0.7)
        panel.clabel(lines, fontsize=8, fmt="%.3g", colors="black",
                     rightside_up=True)  # fmt: skip
        for text in panel.texts:
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85})
    row, column = np.unravel_index(np.argmin(plane.values), plane.values.shape)
    for a, b, mark, label in (
        (0.0, 0.0, "+", "W"),
        (plane.a[column], plane.b[row], "*", f"lowest: {plane.values[row, column]:.3g}"),
    ):
        if plane.a.min() <= a <= plane.a.max() and plane.b.min() <= b <= plane.b.max():
            panel.plot([a], [b], mark, color=COLOURS[1], markersize=12, mec="black" if mark == "*" else COLOURS[1],
                       mew=0.6 if mark == "*" else 3, label=label, linestyle="none")  # fmt: skip
    panel.set_xlabel("a (multiples of W₁)")
    panel.set_ylabel("b (multiples of W₂)")
    panel.legend(loc="upper right", fontsize=9, framealpha=1).set_zorder(6)  # above what is written on the lines
    return panel


def step_sizes(sweep: Sweep, ax: Axes | None = None, *, start: float | None = None) -> Axes:
    """What trainings of different step sizes reach; those that diverged are crosses at the top.

    Parameters
    ----------
    sweep : fastloss.train.Sweep
    ax : Axes, optional
    start : float, optional
        The loss before training, drawn as a line; what ends above three times it is a cross at the top too.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> from fastloss.plot import step_sizes
    >>> from fastloss.train import step_size_sweep
    >>> sweep = step_size_sweep(fl.LinearObjective(fl.Softmax(), np.eye(3), np.arange(3)), n=3, epochs=1)
    >>> step_sizes(sweep).get_xscale()
    'log'
    """
    panel = _panel(ax)
    bound = np.finfo(float).max if start is None else 3 * start
    lost = ~(sweep.losses <= bound)
    panel.plot(sweep.step_sizes[~lost], sweep.losses[~lost], color=COLOURS[0], marker=MARKS[0], label="after training")
    panel.set_xscale("log")
    positive = sweep.losses[~lost]
    if len(positive) and positive.min() > 0 and positive.max() > 20 * positive.min():
        panel.set_yscale("log")
    if start is not None:
        panel.axhline(start, color="0.4", linestyle=":", label=f"before training: {start:.3g}")
    if lost.any():
        panel.plot(sweep.step_sizes[lost], np.full(lost.sum(), 0.97), "x", color="black", markersize=8, mew=2,
                   transform=panel.get_xaxis_transform(),
                   label="diverged" if start is None else "diverged, or lost ground")  # fmt: skip
    if not lost.all():
        panel.plot([sweep.best], [sweep.value], "*", color=COLOURS[1], markersize=15, mec="black", mew=0.6,
                   linestyle="none", label=f"best: {sweep.best:.2g}")  # fmt: skip
    panel.set_xlabel("step size (log scale)")
    panel.set_ylabel("loss (with penalty)")
    panel.legend(frameon=False, fontsize=9)
    return panel


def search_progress(histories: Mapping[str, Mapping[str, Array]], ax: Axes | None = None) -> Axes:
    """The best loss so far over the trials of searches.

    Parameters
    ----------
    histories : dict
        Name → `history` of a result of `random_search` or `random_local_search`. Names that are equal up to a last
        word, such as "local 0" and "local 1", are drawn alike.
    ax : Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        If there is no history.
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> import numpy as np, fastloss as fl
    >>> from fastloss.plot import search_progress
    >>> from fastloss.train import random_search
    >>> result = random_search(fl.LinearObjective(fl.Softmax(), np.eye(3), np.arange(3)), n=50)
    >>> search_progress({"random": result.history}).get_xlabel()
    'trials'
    """
    if not histories:
        raise ValueError("histories is empty; it must hold at least one history by name")
    panel = _panel(ax)
    kinds = list(dict.fromkeys(_kind(name) for name in histories))
    looks = dict(zip(kinds, _looks(len(kinds)), strict=True))
    drawn: set[str] = set()
    for name, history in histories.items():
        kind = _kind(name)
        look = looks[kind]
        panel.plot(history["step"], history["best"], color=look["color"], linestyle=look["linestyle"], linewidth=1.3,
                   label="" if kind in drawn else kind)  # fmt: skip
        drawn.add(kind)
    panel.set_xlabel("trials")
    panel.set_ylabel("best loss so far")
    panel.legend(frameon=False, fontsize=9)
    return panel


def _kind(name: str) -> str:
    first, _, last = name.rpartition(" ")
    return first if last.isdigit() and first else name


def hinge_shape(ax: Axes | None = None, *, margin: float = 1.0) -> Axes:
    """The loss of one wrong class over the difference of scores: hinge, squared hinge and softmax of two classes.

    Parameters
    ----------
    ax : Axes, optional
    margin : float
        Δ of the hinge.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> from fastloss.plot import hinge_shape
    >>> [line.get_label() for line in hinge_shape().lines][:3]
    ['hinge: max(0, 1 − d)', 'squared hinge: max(0, 1 − d)²', 'softmax: log(1 + exp(−d))']
    """
    margin = checks.number(margin, "margin")
    panel = _panel(ax)
    d = np.linspace(margin - 3.5, margin + 3, 400)
    scores, targets = np.stack([d, np.zeros_like(d)], axis=1), np.zeros(len(d), np.intp)
    curves: dict[str, Loss] = {
        f"hinge: max(0, {margin:g} − d)": Hinge(margin=margin),
        f"squared hinge: max(0, {margin:g} − d)²": Hinge(margin=margin, power=2),
        "softmax: log(1 + exp(−d))": Softmax(),
    }
    for (label, loss), look in zip(curves.items(), _looks(3), strict=True):
        values = loss.value(scores, targets, reduction="none")
        panel.plot(d, values, color=look["color"], linestyle=look["linestyle"], linewidth=2, label=label)
    panel.axvline(margin, color="0.4", linewidth=0.8, linestyle=":")
    panel.text(margin, 0.3, f" d = Δ = {margin:g}", transform=panel.get_xaxis_transform(), va="top", fontsize=9)
    panel.set_ylim(-0.15, 5.2)
    panel.set_xlabel("d = score of the right class − score of the other")
    panel.set_ylabel("loss")
    panel.legend(frameon=False, fontsize=9)
    return panel


def losses_compared(
    scores: object, targets: object, ax: Axes | None = None, *, losses: Mapping[str, Loss] | None = None
) -> Axes:
    """Two losses of the same scores: one point for each row. The hinge is satisfied at 0; the softmax never is.

    Parameters
    ----------
    scores : array (N, C)
    targets : array (N,) of integers
    ax : Axes, optional
    losses : dict of two losses, optional
        Name → loss, for the two axes; by default hinge and softmax.

    Returns
    -------
    matplotlib.axes.Axes
        At most 3000 rows are drawn, evenly spread over N.

    Raises
    ------
    ValueError, TypeError
        For arguments that do not fit.
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> from fastloss.plot import losses_compared
    >>> losses_compared([[10, -2, 3], [10, 9, 9], [10, -100, -100]], [0, 0, 0]).get_xlabel()
    'hinge loss'
    """
    chosen = {"hinge": Hinge(), "softmax": Softmax()} if losses is None else dict(losses)
    if len(chosen) != 2:
        raise ValueError(f"losses holds {len(chosen)} losses; it must hold two")
    (first, x), (second, y) = (
        (name, np.asarray(loss.value(scores, targets, reduction="none"))) for name, loss in chosen.items()
    )
    panel = _panel(ax)
    some = np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_POINTS)).astype(np.intp)) if len(x) else np.arange(0)
    size, alpha = (6.0, 0.9) if len(some) <= 100 else (3.5, 0.6) if len(some) <= 1000 else (2.5, 0.35)
    panel.plot(x[some], y[some], "o", color=COLOURS[0], markersize=size, alpha=alpha, mew=0)
    for values, limit in ((x, panel.set_xlim), (y, panel.set_ylim)):
        top = float(values[some].max(initial=0)) or 1.0  # a width, where all rows have no loss
        limit(-0.04 * top, 1.1 * top)
    if len(x):
        zero = 100 * np.count_nonzero(x == 0) / len(x)
        panel.text(0.97, 0.05, f"{zero:.3g} % of {len(x):,} rows\nhave {first} loss 0", transform=panel.transAxes,
                   ha="right", fontsize=9)  # fmt: skip
    panel.set_xlabel(f"{first} loss")
    panel.set_ylabel(f"{second} loss")
    return panel


def decision_regions(model: LinearModel, X: object, y: object, ax: Axes | None = None) -> Axes:
    """A classifier of two features: where each class wins, and the line on which its score is 0, which grows along the
    arrow.

    Parameters
    ----------
    model : fastloss.model.LinearModel
        Of two features.
    X : array (N, 2)
    y : array (N,) of integers
        Class indices.
    ax : Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        If the model or the data have another number of features.
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> import numpy as np
    >>> from fastloss.model import LinearModel
    >>> from fastloss.plot import decision_regions
    >>> model = LinearModel(np.array([[1.0, 0, 0], [-1, 0, 0]]), ("right", "left"))
    >>> decision_regions(model, [[2, 0], [-2, 1]], [0, 1]).get_xlabel()
    'feature 1'
    """
    points, labels = checks.matrix(X, "X", "(N, 2)"), checks.as_array(y, "y")
    if model.W.shape[1] != 3 or points.shape[1] != 2:
        raise ValueError(f"model has {model.W.shape[1] - 1} features and X {points.shape[1]}; both must have 2")
    if labels.shape != (len(points),) or labels.dtype.kind not in "iu":
        raise ValueError(f"y has shape {labels.shape} and dtype {labels.dtype}; it must be ({len(points)},), integers")
    if len(points) == 0:
        raise ValueError("X has no rows; there must be at least one point to show")
    panel = _panel(ax, 5.4, 4.6)
    panel.grid(False)
    c = len(model.W)
    low, high = points.min(axis=0).astype(float), points.max(axis=0).astype(float)
    gap = 0.12 * np.where(high > low, high - low, 1)
    low, high = low - gap, high + gap
    x1, x2 = np.linspace(low[0], high[0], 400), np.linspace(low[1], high[1], 400)
    grid = np.stack(np.meshgrid(x1, x2), axis=-1).reshape(-1, 2)
    winner = model.predict(grid).reshape(400, 400)
    from matplotlib.colors import ListedColormap

    shades = ListedColormap([str(shade) for shade in np.linspace(0.97, 0.72, max(2, c))])
    panel.imshow(winner, origin="lower", extent=(low[0], high[0], low[1], high[1]), cmap=shades, vmin=0,
                 vmax=max(1, c - 1), aspect="auto", interpolation="nearest")  # fmt: skip
    scale = np.ones(2) if model.scale is None else model.scale
    shift = np.zeros(2) if model.shift is None else model.shift
    weights = model.W[:, :2] / scale
    offsets = model.W[:, 2] - weights @ shift
    centre, reach = (low + high) / 2, 0.11 * (high - low)
    for k, (w, b, look) in enumerate(zip(weights, offsets, _looks(c), strict=True)):
        mine = labels == k
        point = {"marker": look["marker"], "color": look["color"], "mec": "black", "mew": 0.5, "markersize": 6}
        panel.plot(*points[mine].T, **point | {"linestyle": "none"})
        panel.plot([], [], **point, linestyle=look["linestyle"], label=model.class_names[k])  # for the legend
        norm = np.linalg.norm(w)
        if norm == 0:
            continue
        foot = centre - w * (w @ centre + b) / norm**2  # of the line w x + b = 0, nearest to the centre
        along = np.array([-w[1], w[0]]) / norm
        foot = foot + 2.6 * along / max(
            float(np.linalg.norm(along / reach)), 1e-300
        )  # apart from the other lines' arrows
        panel.axline(foot, foot + along, color=look["color"], linestyle=look["linestyle"], linewidth=1.6)
        tip = w * reach**2
        tip = tip / max(float(np.linalg.norm(tip / reach)), 1e-300)
        panel.annotate("", foot + tip, foot, arrowprops={"arrowstyle": "-|>", "color": look["color"], "lw": 1.6})
    panel.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel="feature 1", ylabel="feature 2")
    # Beside the panel where there is room, which is in a figure of its own.
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if ax is None else {"loc": "best"}
    panel.legend(fontsize=9, framealpha=0.9, title="classes\n(line: score 0)", title_fontsize=9, **place)
    return panel


def confusion_matrix(y: object, predicted: object, class_names: Sequence[str], ax: Axes | None = None) -> Axes:
    """How many rows of each class (down) are taken for which (across): the darker, the larger the share of the class.

    Of more than 30 classes there are shades alone, and indices in the place of names.

    Parameters
    ----------
    y, predicted : array (N,) of integers
        Class indices.
    class_names : sequence of str
        C names.
    ax : Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        If the arrays do not fit together, or have classes without a name.
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> from fastloss.plot import confusion_matrix
    >>> [text.get_text() for text in confusion_matrix([0, 1, 1], [0, 1, 0], ["cat", "dog"]).texts]
    ['1', '0', '1', '1']
    """
    found = [checks.as_array(value, name) for name, value in (("y", y), ("predicted", predicted))]
    names, c = list(class_names), len(class_names)
    for name, array in zip(("y", "predicted"), found, strict=True):
        if array.shape != (len(found[0]),) or (array.dtype.kind not in "iu" and array.size):
            raise ValueError(f"{name} has shape {array.shape} and dtype {array.dtype}; it must be (N,), integers")
        if array.size and not (array.min() >= 0 and array.max() < c):
            raise ValueError(f"{name} goes from {array.min()} to {array.max()}, but there are {c} class_names")
    counts = np.zeros((c, c), np.int64)
    np.add.at(counts, tuple(array.astype(np.intp) for array in found), 1)
    share = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    side = min(c, MOST_COUNTS)
    panel = _panel(ax, 1.6 + 0.52 * side, 1.3 + 0.45 * side)
    panel.grid(False)
    panel.imshow(share, cmap="gray_r", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(c, c) if c <= MOST_COUNTS else ():
        colour = "white" if share[row, column] > 0.5 else "black"
        panel.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=colour, fontsize=8)
    if c <= MOST_COUNTS:
        panel.set_xticks(range(c), names, rotation=45, ha="right")
        panel.set_yticks(range(c), names)
    panel.set_xlabel("predicted class")
    panel.set_ylabel("class (shade: share of its rows)")
    return panel


def weight_magnitudes(weights: Mapping[str, object], ax: Axes | None = None) -> Axes:
    """What penalties do to weights: their magnitudes, from the largest to the smallest. L1 makes many exactly 0.

    Parameters
    ----------
    weights : dict of arrays
        Name → weights (C, D), without the bias.
    ax : Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        If there are no weights.
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> import numpy as np
    >>> from fastloss.plot import weight_magnitudes
    >>> weight_magnitudes({"L1": np.array([[3.0, 0.0]])}).lines[0].get_label()
    'L1: 50 % are 0'
    """
    arrays = {name: np.abs(checks.as_array(W, name).astype(np.float64)).ravel() for name, W in weights.items()}
    if not arrays or any(array.size == 0 for array in arrays.values()):
        raise ValueError("weights must hold at least one array, and none that is empty")
    panel = _panel(ax)
    for (name, array), look in zip(arrays.items(), _looks(len(arrays)), strict=True):
        ordered = np.sort(array)[::-1]
        zeros = 100 * np.count_nonzero(ordered == 0) / len(ordered)
        rank = 100 * (np.arange(len(ordered)) + 0.5) / len(ordered)
        label = f"{name}: {zeros:.3g} % are 0" if zeros else f"{name}: none is 0"
        panel.plot(rank, ordered, color=look["color"], linestyle=look["linestyle"], linewidth=1.8, label=label)
    panel.set_xlabel("weights, the largest first (%)")
    panel.set_ylabel("magnitude |w|")
    panel.set_ylim(0, None)
    panel.set_xlim(0, 100)
    panel.legend(frameon=False, fontsize=9)
    return panel


def roofline(
    groups: Mapping[str, Mapping[str, tuple[float, float]]],
    bandwidths: Mapping[str, float],
    peaks: Mapping[str, float],
) -> Figure:
    """Jobs among the ceilings of a machine: operations per second over operations per byte.

    A job cannot be above the slanted line of the bytes it moves, nor above the level line of its operations. Each is a
    numbered point; the numbers are explained beside the picture.

    Parameters
    ----------
    groups : dict of dicts
        Group → job → (operations per byte, 10⁹ operations per second).
    bandwidths : dict
        Ceiling → GB per second.
    peaks : dict
        Ceiling → 10⁹ operations per second.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If there is no job, or no ceiling of either kind.
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> from fastloss.plot import roofline
    >>> figure = roofline({"losses": {"softmax": (2.0, 40.0)}}, {"copy": 25.0}, {"multiply-add": 500.0})
    >>> figure.axes[0].get_ylabel()
    '10⁹ operations per second'
    """
    points = [(group, name, x, y) for group, jobs in groups.items() for name, (x, y) in jobs.items()]
    if not points or not bandwidths or not peaks:
        raise ValueError("groups, bandwidths and peaks must each hold at least one entry")
    figure = _figure(13, 0.5 + max(6.5, 0.145 * (len(points) + 2 * len(groups))))
    panel, key = figure.subplots(1, 2, width_ratios=(3, 1.15))
    xs, ys = np.array([p[2] for p in points]), np.array([p[3] for p in points])
    highest = max(peaks.values())
    low = min(xs.min(), highest / max(bandwidths.values())) / 3
    high = max(xs.max(), highest / min(bandwidths.values())) * 3
    grid = np.geomspace(low, high, 200)
    for (name, bandwidth), style in zip(bandwidths.items(), cycle(("-", "--", ":")), strict=False):
        panel.plot(grid, np.minimum(bandwidth * grid, highest), color="0.35", linestyle=style, linewidth=1.2,
                   label=f"{name}: {bandwidth:.3g} GB/s")  # fmt: skip
    for name, peak in peaks.items():
        panel.plot(grid, np.full_like(grid, peak), color="black", linewidth=1.6, label=f"{name}: {peak:.3g} · 10⁹/s")
    panel.set(xscale="log", yscale="log", xlim=(low, high), ylim=(ys.min() / 2, highest * 1.8))
    labels = _spread(np.log(xs), np.log(ys), gap=np.log(highest * 3.6 / ys.min()) / 62, reach=np.log(high / low) / 25)
    lines: list[tuple[str, str, str, bool]] = []
    looks = dict(zip(groups, zip(cycle(COLOURS), cycle(MARKS), strict=False), strict=False))
    for number, ((group, name, x, y), label) in enumerate(zip(points, np.exp(labels), strict=True), 1):
        colour, mark = looks[group]
        panel.plot([x], [y], marker=mark, color=colour, markersize=5, linestyle="none", mec="black", mew=0.4)
        panel.plot([x, x * 1.13], [y, label], color="0.6", linewidth=0.5)
        panel.text(x * 1.15, label, str(number), fontsize=7, va="center")
        if name == next(iter(groups[group])):
            lines.append((group, mark, colour, True))
        lines.append((f"{number}  {name}", "", colour, False))
    key.set(xlim=(0, 1), ylim=(len(lines) + 1, 0))
    key.axis("off")
    for k, (text, mark, colour, title) in enumerate(lines, 1):
        if title:
            key.plot([0.02], [k], marker=mark, color=colour, markersize=6, mec="black", mew=0.4)
        key.text(0.07, k, text, fontsize=8 if title else 7.5, weight="bold" if title else "normal", va="center")
    from matplotlib.ticker import LogLocator

    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda tick, _: f"{tick:,g}")
        axis.set_minor_formatter("")
    panel.set_xlabel("operations per byte that must be moved (an exponential counts as what its time is worth)")
    panel.set_ylabel("10⁹ operations per second")
    panel.grid(alpha=0.25, which="both", linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(loc="lower right", fontsize=9, frameon=False)
    return figure


def times(jobs: Mapping[str, Mapping[str, float]], ours: str = "fastloss") -> Figure:
    """How long each library takes for a few jobs: a panel for each job, the fastest at the top.

    Parameters
    ----------
    jobs : dict of dicts
        Job → library → milliseconds.
    ours : str
        The library that is drawn dark.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If there is no job, or a job without a time.
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> from fastloss.plot import times
    >>> figure = times({"softmax, 65536 × 10": {"fastloss": 0.147, "numpy": 1.02}})
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['fastloss', 'numpy']
    """
    if not jobs or not all(jobs.values()):
        raise ValueError("jobs must hold at least one job, and each at least one time")
    figure = _figure(3.1 * len(jobs) + 0.4, 1.1 + 0.26 * max(map(len, jobs.values())))
    panels = figure.subplots(1, len(jobs), squeeze=False)[0]
    for panel, (job, found) in zip(panels, jobs.items(), strict=True):
        names = sorted(found, key=lambda name: found[name])
        values = [found[name] for name in names]
        panel.barh(names, values, color=[COLOURS[0] if name == ours else "0.75" for name in names], height=0.7)
        for k, value in enumerate(values):
            panel.text(value, k, f" {value:.3g}", va="center", fontsize=9, weight="bold" if names[k] == ours else None)
        panel.invert_yaxis()
        panel.set_xlim(0, 1.2 * max(values))
        panel.set_title(job, fontsize=10)
        panel.set_xlabel("ms", fontsize=9)
        panel.tick_params(labelsize=9, left=False)
        panel.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _spread(x: Array, y: Array, gap: float, reach: float) -> Array:
    """Heights of labels: near y, but `gap` apart from those of points that are within `reach` to the side."""
    heights = y.astype(np.float64)
    for _ in range(200):
        order = np.argsort(heights)
        moved = False
        for position, j in enumerate(order):
            for k in order[position + 1 :]:
                lack = gap - (heights[k] - heights[j])
                if lack <= 1e-9:
                    break
                if abs(x[j] - x[k]) < reach:
                    heights[j] -= lack / 2
                    heights[k] += lack / 2
                    moved = True
        if not moved:
            break
    return heights


def throughput(curves: Mapping[str, Sequence[tuple[int, float, float | None, bool]]]) -> Figure:
    """Throughput over the number of classes, with a copy beside it.

    Parameters
    ----------
    curves : dict
        Name → points: classes, GB per second, that of the copy (None: not known), and whether the point falls off from
        its neighbours, which is marked.

    Returns
    -------
    matplotlib.figure.Figure
        With a panel for each name.

    Raises
    ------
    ValueError
        If there is no curve.
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> from fastloss.plot import throughput
    >>> points = [(2, 20.0, 25.0, False), (10, 12.0, 25.0, True), (100, 22.0, 25.0, False)]
    >>> figure = throughput({"softmax": points})
    >>> [line.get_label() for line in figure.axes[0].lines]
    ['softmax', 'copy', 'below 70 % of a neighbour']
    """
    if not curves:
        raise ValueError("curves is empty; it must hold the points of at least one")
    figure = _figure(11, 3.6 * len(curves))
    panels = figure.subplots(len(curves), 1, squeeze=False, sharex=True)[:, 0]
    for panel, (name, points), colour in zip(panels, curves.items(), cycle(COLOURS), strict=False):
        classes, rates = np.array([p[0] for p in points]), np.array([p[1] for p in points])
        copies = [(p[0], p[2]) for p in points if p[2] is not None]
        falls = np.array([p[3] for p in points], dtype=bool)
        panel.plot(classes, rates, color=colour, marker="o", markersize=4, label=name)
        if copies:
            panel.plot(*zip(*copies, strict=True), color="0.45", linestyle="--", linewidth=1.2, label="copy")
        if falls.any():
            panel.plot(classes[falls], rates[falls], color="black", marker="x", markersize=11, mew=2, linestyle="none",
                       label="below 70 % of a neighbour")  # fmt: skip
        panel.set(xscale="log", ylim=(0, None), ylabel="GB per second")
        panel.set_xticks(ticks := [10.0**k for k in range(int(np.ceil(np.log10(classes.max()))) + 1)])
        panel.set_xticklabels([f"{tick:,.0f}" for tick in ticks])
        panel.set_xlim(classes.min() / 1.2, classes.max() * 1.2)
        panel.legend(loc="best", frameon=False, fontsize=9)
        panel.grid(alpha=0.3, which="both", linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("classes, at a constant number of scores")
    return figure
