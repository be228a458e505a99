"""Pictures of training, for slides: curves of loss and accuracy, and the templates of a linear classifier.

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

COLOURS = ("#08519c", "#e6821e", "#3a3a3a", "#7b9e3f")
MARKS = ("o", "s", "^", "D")


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
