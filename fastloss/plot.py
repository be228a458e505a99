"""Pictures, for slides: curves of training, the templates of a linear classifier, and how fast the kernels are.

Figures are made without pyplot: no window is opened and no global state of matplotlib's is touched. Save one with
`figure.savefig(path)`; a notebook shows what a call returns. Colours differ in lightness, and lines in style, so that
pictures can be told apart in print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from fastloss._checks import Array
from fastloss.model import LinearModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#08519c", "#e6821e", "#3a3a3a", "#7b9e3f", "#d9a0c0")
MARKS = ("o", "s", "^", "D", "v")


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


def training_curves(histories: Mapping[str, Mapping[str, Array]], ax: Axes | Sequence[Axes] | None = None) -> Figure:
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
    matplotlib.figure.Figure
        The figure drawn on.

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
    >>> [axes.get_ylabel() for axes in training_curves({"softmax": result.history}).axes]
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
    return _owner(accuracy_panel)


def _focus(panel: Axes, curves: list[Array]) -> None:
    """Let the panel show all but the first record, which stands far off and would flatten the rest."""
    values = np.concatenate([curve[1:] for curve in curves])
    if len(values) > len(curves) and np.ptp(values) > 0:
        gap = 0.08 * np.ptp(values)
        panel.set_ylim(values.min() - gap, values.max() + gap)


def _owner(panel: Axes) -> Figure:
    figure = panel.get_figure(root=True)
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


def class_templates(model: LinearModel, ax: Axes | Sequence[Axes] | None = None, *, title: str = "") -> Figure:
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
    matplotlib.figure.Figure
        The figure drawn on.

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
    >>> [axes.get_title() for axes in class_templates(model).axes[:2]]
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
    figure = _owner(panels[0])
    if new:
        unit = "weight, per standard deviation" if model.scale is not None else "weight"
        bar = figure.colorbar(shown, ax=panels, fraction=0.03, pad=0.02, ticks=[-limit, 0, limit])
        bar.ax.set_yticklabels([f"−{limit:.2g}", "0", f"+{limit:.2g}"])
        bar.set_label(unit + (" (red, green, blue)" if templates.ndim == 4 else ""))
    return figure


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
