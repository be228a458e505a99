"""The page, drawn with Bokeh: widgets and pictures of a `State`, a state of its own for each browser tab.

What the browser sends (where the points are, what was chosen) changes the state; then all that is shown is set from it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from bokeh.document import Document
from bokeh.events import Pan, Tap
from bokeh.layouts import column, row
from bokeh.models import (
    Arrow,
    Button,
    CategoricalSlider,
    ColumnDataSource,
    CustomJS,
    Div,
    InlineStyleSheet,
    LinearColorMapper,
    PointDrawTool,
    Range1d,
    Select,
    Toggle,
    VeeHead,
)
from bokeh.plotting import figure

from fastloss._checks import Array
from fastloss.demo import FORMULAS, LIMIT, LOSSES, NAMES, STEP_SIZES, STRENGTHS, State, View
from fastloss.plot import COLOURS
from fastloss.train import DivergenceError

TITLE = "A linear classifier, by hand"
#: A class is told by colour and, in greyscale, by its marker, the dashes of its line, and how light its region is.
MARKERS = ("circle", "square", "triangle")
SIGNS = ("●", "■", "▲")
SIZES = (15, 14, 18)  # of which a triangle's is mostly empty
DASHES = ("solid", [11, 5], [11, 4, 2, 4])
DASH_SIGNS = ("──", "– –", "–·–")
REGIONS = ("#c3d7ea", "#fdf0dd", "#b3b3b3")
TICK = 80  # milliseconds between steps of a run
LOST = 1e6  # a loss from which no descent comes back while one watches

INTRO = f"""
<h1>{TITLE}</h1>
<p>Nine points of three classes, and a score <i>s = w₁x₁ + w₂x₂ + b</i> for each class. A place belongs to the class
whose score is highest there. <b>Drag a point</b>, press <b>Run</b>, and watch the loss pull the lines along.</p>
"""
LEGEND = (
    "<p class='quiet'>"
    + " &nbsp; ".join(
        f"<b style='color:{colour}'>{sign} {dash}</b>&nbsp;class&nbsp;{name}"
        for sign, name, colour, dash in zip(SIGNS, NAMES, COLOURS, DASH_SIGNS, strict=False)
    )
    + "<br>On its line a class has score 0; the score grows along the arrow.<br>The larger the ring around a "
    "point, the larger its loss.</p>"
)
STYLE = """
:host { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; }
h1 { font-size: 1.4rem; margin: 0; }
p { margin: .2rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .05rem .5rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { font-weight: 600; border-bottom: 1px solid #888; }
tr.over th { text-align: center; border-bottom: none; }
td.own { font-weight: 700; background: #eee; }
.gap { padding-left: 1.2rem; }
.quiet { color: #555; font-size: .87rem; }
.total { font-size: 1.15rem; }
.warn { color: #8a1c00; font-weight: 600; }
.wide { overflow-x: auto; }
"""


def _number(value: float) -> str:
    """Two decimals, or three digits of what is large; no minus before a zero."""
    text = f"{value:.2f}" if abs(value) < 1000 else f"{value:.3g}"
    return text.replace("-0.00", "0.00").replace("-", "−")


def _cell(value: float, gap: bool = False, own: bool = False) -> str:
    """A number of a table: with a gap before it, and marked as that of the point's own class."""
    classes = " ".join(["gap"] * gap + ["own"] * bool(own))
    return f"<td class='{classes}'>{_number(value)}</td>"


def _sign(k: int) -> str:
    return f"<span style='color:{COLOURS[k]}'>{SIGNS[k]}</span>&nbsp;{NAMES[k]}"


def _words(text: str = "", **options: Any) -> Div:
    """A piece of HTML, in our style."""
    return Div(text=text, stylesheets=[InlineStyleSheet(css=STYLE)], **options)


def points_table(state: State, view: View) -> str:
    """A row for each point: where it is, its scores, its loss, and the gradient of that with respect to the scores."""
    classes = "".join(f"<th class='{'gap' if k == 0 else ''}'>{_sign(k)}</th>" for k in range(len(NAMES)))
    head = (
        "<tr class='over'><th colspan=4></th><th colspan=3>scores s</th><th></th>"
        "<th colspan=3>gradient ∂L/∂s</th></tr>"
        f"<tr><th>point</th><th>class</th><th>x₁</th><th>x₂</th>{classes}<th class='gap'>loss L</th>{classes}</tr>"
    )
    body = []
    for i, (x, y) in enumerate(zip(state.X, state.y, strict=True)):
        cells = [f"<td>{i + 1}</td><td>{_sign(y)}</td>", *(f"<td>{_number(v)}</td>" for v in x)]
        cells += [_cell(v, k == 0, k == y) for k, v in enumerate(view.scores[i])]
        cells.append(_cell(view.losses[i], True))
        cells += [_cell(v, k == 0, k == y) for k, v in enumerate(view.slopes[i])]
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class='wide'><table>{head}{''.join(body)}</table></div>"


def weights_table(state: State, view: View) -> str:
    """A row for each class: its weights, and the gradient of the objective with respect to them."""
    names = "<th class='gap'>w₁</th><th>w₂</th><th>b</th>"
    head = (
        "<tr class='over'><th></th><th colspan=3>weights W</th><th colspan=3>gradient ∂J/∂W</th></tr>"
        f"<tr><th>class</th>{names}{names}</tr>"
    )
    body = ""
    for k in range(len(NAMES)):
        cells = "".join(_cell(v, j == 0) for part in (state.W[k], view.gradient[k]) for j, v in enumerate(part))
        body += f"<tr><td>{_sign(k)}</td>{cells}</tr>"
    return f"<div class='wide'><table>{head}{body}</table></div>"


def summary(state: State, view: View) -> str:
    """The objective as the sum that it is."""
    return (
        f"<p>L = {FORMULAS[state.loss]}</p><p class='total'>J = mean loss + λ Σ w² = {_number(view.data)} + "
        f"{_number(view.penalty)} = <b>{_number(view.value)}</b></p>"
        f"<p>{np.count_nonzero(view.scores.argmax(axis=1) == state.y)} of {len(state.y)} points are right, after "
        f"{state.steps} step{'s' * (state.steps != 1)}. <span class='quiet'>Bold: the point's own class.</span></p>"
    )


def _lines(W: Array) -> dict[str, list[float]]:
    """For each class the line on which its score is 0, from edge to edge and beyond, and an arrow to where it grows."""
    names = ("x0", "y0", "x1", "y1", "tail_x", "tail_y", "head_x", "head_y")
    found: dict[str, list[float]] = {name: [] for name in names}
    for w1, w2, b in W:
        norm = float(np.hypot(w1, w2))
        if norm == 0:  # the score is the same everywhere
            for name in names:
                found[name].append(float("nan"))
            continue
        foot, along = -b * np.array([w1, w2]) / norm**2, np.array([-w2, w1]) / norm
        tip = foot + 0.16 * np.array([w1, w2]) / norm
        ends = (foot - 4 * LIMIT * along, foot + 4 * LIMIT * along, foot, tip)
        for (x, y), (name_x, name_y) in zip(ends, zip(names[::2], names[1::2], strict=True), strict=True):
            found[name_x].append(float(x))
            found[name_y].append(float(y))
    return found


class Page:
    """The widgets of one document, and the state that they show."""

    def __init__(self, document: Document, seed: int | None = None) -> None:
        self.state, self.document, self.rng = State(), document, np.random.default_rng(seed)
        self.ticking: Any = None
        self.message = ""
        #: Where the points are: the browser changes it while a point is dragged.
        self.points = ColumnDataSource(self._places(), name="places")
        self.rings = ColumnDataSource({"x": [], "y": [], "size": [], "label": []})
        self.ground = ColumnDataSource({"winner": []})
        self.lines = [ColumnDataSource(name=f"line {name}") for name in NAMES]
        self.curve = ColumnDataSource({"step": [], "value": [], "data": []}, name="curve")

        self.loss = Select(title="Loss L", value=self.state.loss, options=list(LOSSES), name="loss")
        self.strength = CategoricalSlider(
            title="Penalty strength λ", categories=[f"{s:g}" for s in STRENGTHS], value=f"{self.state.strength:g}",
            name="strength",
        )  # fmt: skip
        self.step_size = CategoricalSlider(
            title="Learning rate (step size) η", categories=[f"{s:g}" for s in STEP_SIZES],
            value=f"{self.state.step_size:g}", name="step_size",
        )  # fmt: skip
        self.run = Toggle(label="Run", button_type="primary", name="run")
        self.buttons = {
            "step": Button(label="Step", name="step"),
            "reset": Button(label="Reset", name="reset"),
            "new points": Button(label="New points", name="new points"),
            "new weights": Button(label="New weights", name="new weights"),
        }
        self.text = {name: _words(name=name) for name in ("summary", "note", "points", "weights")}

        self.points.on_change("data", lambda attr, old, new: self._moved())
        self.loss.on_change("value", lambda attr, old, new: self._do(partial(self.state.choose, new)))
        self.strength.on_change("value", lambda attr, old, new: self._do(partial(self.state.penalise, float(new))))
        self.step_size.on_change("value", lambda attr, old, new: self._set_step_size(float(new)))
        self.run.on_change("active", lambda attr, old, new: self._run(bool(new)))
        self.buttons["step"].on_click(lambda: self._do(self.state.step))
        self.buttons["reset"].on_click(self._reset)
        self.buttons["new points"].on_click(lambda: self._do(partial(self.state.scatter, self.rng), moved=True))
        self.buttons["new weights"].on_click(lambda: self._do(partial(self.state.shake, self.rng)))
        document.title = f"{TITLE} · fastloss"
        document.add_root(self._layout())
        self.show()

    def _places(self) -> dict[str, object]:
        """The points, and what they look like."""
        y = self.state.y.tolist()
        looks = {"colour": [COLOURS[k] for k in y], "marker": [MARKERS[k] for k in y], "size": [SIZES[k] for k in y]}
        return {"x": self.state.X[:, 0].copy(), "y": self.state.X[:, 1].copy(), **looks}

    # --- what there is to see ----------------------------------------------------------------------------------------
    def _layout(self) -> Any:
        plane = figure(
            x_range=Range1d(-LIMIT, LIMIT), y_range=Range1d(-LIMIT, LIMIT), width=490, height=480, tools="",
            toolbar_location=None, x_axis_label="feature x₁", y_axis_label="feature x₂", name="plane",
            min_border=5,
        )  # fmt: skip
        plane.grid.visible = False
        plane.image(
            "winner", x=-LIMIT, y=-LIMIT, dw=2 * LIMIT, dh=2 * LIMIT, source=self.ground,
            color_mapper=LinearColorMapper(REGIONS, low=-0.5, high=2.5),
        )  # fmt: skip
        for source, colour, dash in zip(self.lines, COLOURS, DASHES, strict=False):
            plane.segment("x0", "y0", "x1", "y1", source=source, color=colour, line_dash=dash, line_width=2.5)
            plane.add_layout(
                Arrow(x_start="tail_x", y_start="tail_y", x_end="head_x", y_end="head_y", source=source,
                      line_color=colour, line_width=2.5, end=VeeHead(size=13, fill_color=colour, line_color=colour))
            )  # fmt: skip
        plane.scatter("x", "y", size="size", source=self.rings, fill_color=None, line_color="black", line_width=1.5)
        dots = plane.scatter(
            "x", "y", marker="marker", size="size", source=self.points, fill_color="colour", line_color="white",
            line_width=1.5,
        )  # fmt: skip
        # Bokeh draws a selected point alone, and greys out the others: here all stay as they are.
        dots.nonselection_glyph = dots.selection_glyph = None
        plane.text("x", "y", text="label", source=self.rings, x_offset=10, y_offset=-6, text_font_size="12px")
        drag = PointDrawTool(renderers=[dots], add=False)
        plane.add_tools(drag)
        plane.toolbar.active_tap = plane.toolbar.active_drag = drag
        # The tool tells the server at the end of a drag; the first of these, on the way too. A click selects a point,
        # which would then be dragged along with others: the second keeps that from being.
        for event, code in (
            (Pan, "points.setv({data: points.data}, {check_eq: false})"),
            (Tap, "points.selected.indices = []"),
        ):
            plane.js_on_event(event, CustomJS(args={"points": self.points}, code=code))

        curve = figure(
            height=220, sizing_mode="stretch_width", tools="", toolbar_location=None, x_axis_label="step",
            y_axis_label="loss", x_range=Range1d(0, 1), y_range=Range1d(0, 1), name="descent", min_border=5,
        )  # fmt: skip
        self.range = (curve.x_range, curve.y_range)
        curve.line("step", "value", source=self.curve, color=COLOURS[0], line_width=2.5, legend_label="J")
        curve.line("step", "data", source=self.curve, color=COLOURS[1], line_width=2, line_dash="dashed",
                   legend_label="mean loss")  # fmt: skip
        curve.legend.location = "top_right"
        curve.legend.orientation = "horizontal"
        curve.legend.background_fill_alpha = 0.7

        wide = {"sizing_mode": "stretch_width"}
        left = column(plane, _words(LEGEND, width=480), width=500)
        right = column(
            self.loss, row(self.strength, self.step_size, **wide),
            row(self.run, *self.buttons.values(), styles={"flex-wrap": "wrap"}, **wide),
            self.text["note"], self.text["summary"], self.text["points"],
            styles={"flex": "1 1 560px", "min-width": "min(560px, 100%)"},
        )  # fmt: skip
        descent = column(curve, styles={"flex": "1 1 480px", "min-width": "min(480px, 100%)"})
        weights = column(self.text["weights"], styles={"flex": "1 1 440px", "min-width": "min(440px, 100%)"})
        for widget in (self.loss, self.strength, self.step_size, self.run, *self.buttons.values(), *self.text.values()):
            widget.sizing_mode = "stretch_width"
        for widget in (self.run, *self.buttons.values()):
            widget.min_width = 105  # a label's: on a narrow page they wrap
        return column(
            _words(INTRO, **wide),
            row(left, right, styles={"flex-wrap": "wrap", "gap": "0 16px"}, **wide),
            row(descent, weights, styles={"flex-wrap": "wrap", "gap": "0 16px"}, **wide),
            styles={"max-width": "1240px", "margin": "2px auto", "padding": "0 12px"}, **wide,
        )  # fmt: skip

    def show(self) -> None:
        """Set all that is shown, but the points, which the browser may be dragging."""
        state, view = self.state, self.state.view()
        self.ground.data = {"winner": [state.regions(240)]}
        for k, source in enumerate(self.lines):
            source.data = _lines(state.W[k : k + 1])
        # The area of a ring grows with the loss; 17 pixels are a ring that touches the point.
        sizes = np.where(view.losses > 0.005, np.sqrt(17**2 + 500 * np.minimum(view.losses, 20)), 0)
        labels = [str(i + 1) for i in range(len(state.X))]
        self.rings.data = {"x": state.X[:, 0], "y": state.X[:, 1], "size": sizes, "label": labels}
        steps, values, data = (np.array(part, float) for part in zip(*state.curve, strict=True))
        self.curve.data = {"step": steps, "value": values, "data": data}
        across, up = self.range
        across.start, across.end = float(steps[0]), float(steps[0]) + max(50.0, 1.05 * float(steps[-1] - steps[0]))
        up.end = 1.1 * max(float(values.max()), 1e-9)
        self.text["summary"].text = summary(state, view)
        self.text["note"].text = f"<p class='warn'>{self.message}</p>"
        self.text["note"].visible = bool(self.message)
        self.text["points"].text = points_table(state, view)
        self.text["weights"].text = weights_table(state, view)

    # --- what the browser says ---------------------------------------------------------------------------------------
    def _do(self, change: Callable[[], None], moved: bool = False) -> None:
        """Change the state, and show it; what cannot be is said, and stops a run."""
        self.message = ""
        try:
            change()
            lost = self.state.curve[-1][1] > LOST
        except DivergenceError:
            lost = True
        if lost:
            self.message = "The loss grows without bound: choose a smaller learning rate, and reset."
            self.run.active = False
        if moved:
            self.points.data = self._places()
        self.show()

    def _moved(self) -> None:
        x, y = (np.asarray(self.points.data[name]) for name in ("x", "y"))
        if x.shape != y.shape or len(x) != len(self.state.X):  # the tool deletes what is held at Backspace
            self.points.data = self._places()
            return
        X = np.column_stack([x, y])
        if not np.array_equal(X, self.state.X):
            self._do(partial(self.state.move, X))

    def _set_step_size(self, value: float) -> None:
        self.state.step_size = value

    def _reset(self) -> None:
        self.run.active = False
        self._do(self.state.reset, moved=True)

    def _run(self, active: bool) -> None:
        self.run.label = "Pause" if active else "Run"
        if active and self.ticking is None:
            self.ticking = self.document.add_periodic_callback(lambda: self._do(self.state.step), TICK)
        elif not active and self.ticking is not None:
            self.document.remove_periodic_callback(self.ticking)
            self.ticking = None


def make(document: Document) -> None:
    """Fill a document for a new browser tab."""
    Page(document)
