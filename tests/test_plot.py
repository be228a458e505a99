"""Pictures: what is drawn, how it is labelled, and that nothing of matplotlib's global state is touched."""

import sys
from dataclasses import replace

import numpy as np
import pytest

import fastloss as fl
from fastloss import landscape, plot, train
from fastloss.model import LinearModel


def history(n=6, validation=True):
    """The history of a training whose first record stands far off."""
    found = {"epoch": np.arange(n), "loss": np.r_[9.0, 2 - 0.1 * np.arange(1, n)], "accuracy": 0.1 + 0.1 * np.arange(n)}
    return found | ({"validation_accuracy": 0.1 + 0.08 * np.arange(n)} if validation else {})


def model(image_shape, n_classes=3, W=None):
    d = int(np.prod(image_shape)) if image_shape else 4
    W = np.linspace(-1, 2, n_classes * (d + 1)).reshape(n_classes, d + 1) if W is None else W
    return LinearModel(W, tuple(f"class {k}" for k in range(n_classes)), image_shape=image_shape)


def render(drawn):
    """The figure of what was drawn, all of it drawn again: what is wrong shows up as an error or a warning here."""
    figure = drawn[0].figure if isinstance(drawn, list) else drawn
    figure.canvas.draw()
    return figure


def test_training_curves_show_the_histories():
    softmax, hinge = history(), history(4, validation=False)
    figure = render(plot.training_curves({"softmax": softmax, "hinge": hinge}))
    first, second, accuracy = figure.axes
    assert [first.get_title(), second.get_title()] == ["softmax", "hinge"]
    for panel in (first, second):
        assert panel.get_ylabel() == "loss (with penalty)"
        assert "epochs" in panel.get_xlabel()
    assert accuracy.get_ylabel() == "accuracy (%)"
    np.testing.assert_array_equal(first.lines[0].get_ydata(), softmax["loss"])
    np.testing.assert_array_equal(second.lines[0].get_xdata(), hinge["epoch"])
    curves = {line.get_label(): line.get_ydata() for line in accuracy.lines}
    assert list(curves) == ["softmax, training", "softmax, test", "hinge, training"]
    np.testing.assert_allclose(curves["softmax, test"], 100 * softmax["validation_accuracy"])
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == list(curves)


def test_curves_differ_in_more_than_colour():
    figure = render(plot.training_curves({"softmax": history(), "hinge": history()}))
    styles = {(line.get_marker(), line.get_linestyle()) for line in figure.axes[-1].lines}
    assert len(styles) == 4


def test_the_far_off_start_is_written_and_does_not_flatten_the_rest():
    panel = plot.training_curves({"softmax": history()})[0]
    low, high = panel.get_ylim()
    assert low < 1.5 < 1.9 < high < 9
    assert panel.texts[0].get_text() == "at the start: 9"


@pytest.mark.parametrize("n", [1, 2])
def test_short_histories(n):
    figure = render(plot.training_curves({"softmax": history(n)}))
    low, high = figure.axes[0].get_ylim()
    assert low < history(n)["loss"].min() <= history(n)["loss"].max() < high


def test_training_curves_need_a_history():
    with pytest.raises(ValueError, match="histories is empty"):
        plot.training_curves({})


@pytest.mark.parametrize("draw", [lambda ax: plot.training_curves({"softmax": history()}, ax=ax),
                                  lambda ax: plot.class_templates(model((2, 2), 2), ax=ax)])  # fmt: skip
def test_axes_of_the_callers_are_drawn_on(draw):
    figure = plot.figure_class()()
    panels = figure.subplots(1, 2)
    assert draw(panels) == list(panels)
    assert len(figure.axes) == 2
    assert all(panel.has_data() for panel in panels)
    with pytest.raises(ValueError, match=r"ax has 1 Axes; there must be 2"):
        draw(panels[0])


@pytest.mark.parametrize("shape", [(4, 5), (1, 4, 5)])
def test_grey_templates(shape):
    trained = model(shape)
    figure = render(plot.class_templates(trained, title="Templates"))
    *panels, bar = figure.axes
    assert [panel.get_title() for panel in panels] == ["class 0", "class 1", "class 2"]
    for panel, weights in zip(panels, trained.W, strict=True):
        (image,) = panel.images
        np.testing.assert_array_equal(image.get_array(), weights[:-1].reshape(4, 5))
        low, high = image.get_clim()
        assert -low == high > 0  # mid-grey is 0
    assert bar.get_ylabel() == "weight"
    assert figure.get_suptitle() == "Templates"


def test_colour_templates_have_red_green_and_blue_last():
    W = np.zeros((1, 13))
    W[0, :4], W[0, 4], W[0, 8:12] = 1.0, -1.0, [0, 0, 0, 0.5]  # red everywhere, green against in one pixel
    panel = render(plot.class_templates(model((3, 2, 2), 1, W))).axes[0]
    shown = np.asarray(panel.images[0].get_array())
    assert shown.shape == (2, 2, 3)
    np.testing.assert_allclose(shown[0, 0], [1, 0, 0.5])
    np.testing.assert_allclose(shown[1, 1], [1, 0.5, 0.75])


def test_the_unit_of_standardised_features_is_named():
    trained = LinearModel(np.ones((2, 5)), ("a", "b"), scale=np.full(4, 2.0), image_shape=(2, 2))
    assert render(plot.class_templates(trained)).axes[-1].get_ylabel() == "weight, per standard deviation"


@pytest.mark.parametrize("n_classes", [1, 5, 7])
def test_any_number_of_classes_and_zero_weights(n_classes):
    figure = render(plot.class_templates(model((2, 2), n_classes, np.zeros((n_classes, 5)))))
    assert len(figure.axes) == n_classes + 1


@pytest.mark.parametrize("shape", [None, (4,), (2, 1, 2), (1, 1, 2, 2)])
def test_templates_need_an_image(shape):
    with pytest.raises(ValueError, match=r"model.image_shape is .*; templates are pictures of"):
        plot.class_templates(model(shape))


def test_a_roofline_numbers_every_job_and_explains_it():
    groups = {f"group {g}": {f"job {g}{k}": (2.0 + g, 10.0 + k) for k in range(4)} for g in range(5)}
    figure = render(plot.roofline(groups, {"read": 60.0, "copy": 40.0}, {"multiply-add": 500.0}))
    panel, key = figure.axes
    assert [text.get_text() for text in panel.texts] == [str(k) for k in range(1, 21)]
    explained = [text.get_text() for text in key.texts]
    assert explained[:2] == ["group 0", "1  job 00"]
    assert len(explained) == 25
    assert len({line.get_marker() for line in key.lines}) == 5  # told apart without colour
    heights = [text.get_position()[1] for text in panel.texts[:4]]
    assert sorted(heights) == heights
    assert min(np.diff(np.log(heights))) > 0.05  # numbers of points that are close stand apart
    styles = [line.get_linestyle() for line in panel.lines if line.get_label() in ("read: 60 GB/s", "copy: 40 GB/s")]
    assert len(set(styles)) == 2
    with pytest.raises(ValueError, match="must each hold at least one"):
        plot.roofline({}, {"read": 1.0}, {"multiply-add": 1.0})


def test_throughput_marks_what_falls_off():
    points = [(2, 10.0, 30.0, False), (10, 5.0, 30.0, True), (1000, 12.0, None, False)]
    figure = render(plot.throughput({"softmax": points, "hinge": points[:1]}))
    first, second = figure.axes
    curve, copy, marks = first.lines
    np.testing.assert_array_equal(curve.get_ydata(), [10, 5, 12])
    np.testing.assert_array_equal(copy.get_xdata(), [2, 10])
    np.testing.assert_array_equal(marks.get_xdata(), [10])
    assert [line.get_label() for line in second.lines] == ["hinge", "copy"]
    assert first.get_xscale() == "log"
    with pytest.raises(ValueError, match="curves is empty"):
        plot.throughput({})


def test_pyplot_is_not_touched():
    before = "matplotlib.pyplot" in sys.modules
    plot.class_templates(model((2, 2)))
    plot.training_curves({"softmax": history()})
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "fastloss\[cli\]"'):
        plot.class_templates(model((2, 2)))


# --- one panel ------------------------------------------------------------------------------------------------------
def small(loss=None):
    rng = np.random.default_rng(0)
    return fl.LinearObjective(loss or fl.Hinge(), rng.normal(size=(40, 2)), rng.integers(3, size=40))


W3 = np.arange(9.0).reshape(3, 3) / 9
RAY = landscape.slice_1d(small(), W3)
PLANE = landscape.slice_2d(small(), W3, a=np.linspace(-1, 1, 7), b=np.linspace(-1, 1, 5))
SWEEP = train.step_size_sweep(small(), 1e-3, 10, n=5, epochs=1)
POINTS = np.random.default_rng(1).normal(size=(20, 2))
LABELS = np.arange(20) % 3
PANELS = {
    "ray": lambda ax=None: plot.loss_along_ray(RAY, ax),
    "plane": lambda ax=None: plot.loss_on_plane(PLANE, ax),
    "sweep": lambda ax=None: plot.step_sizes(SWEEP, ax, start=2.0),
    "search": lambda ax=None: plot.search_progress({"random": train.random_search(small(), 9).history}, ax),
    "hinge": lambda ax=None: plot.hinge_shape(ax),
    "compared": lambda ax=None: plot.losses_compared(POINTS, LABELS % 2, ax),
    "regions": lambda ax=None: plot.decision_regions(LinearModel(W3, ("a", "b", "c")), POINTS, LABELS, ax),
    "confusion": lambda ax=None: plot.confusion_matrix(LABELS, LABELS[::-1], "abc", ax),
    "weights": lambda ax=None: plot.weight_magnitudes({"L1": W3}, ax),
}


@pytest.mark.parametrize("draw", PANELS.values(), ids=PANELS.keys())
def test_a_panel_takes_its_axes_and_names_them(draw):
    made = draw()
    render(made.figure)
    given = made.figure.__class__().subplots()
    assert draw(given) is given
    for axes in (made, given):
        assert axes.get_xlabel()
        assert axes.get_ylabel()


def test_a_ray_is_drawn_with_its_lowest_point_and_breakpoints():
    found = landscape.breakpoints(small(), W3, RAY.direction)
    axes = plot.loss_along_ray(RAY, breakpoints=found, label="hinge")
    curve, lowest, ticks = axes.lines
    np.testing.assert_array_equal(curve.get_ydata(), RAY.values)
    assert lowest.get_ydata()[0] == RAY.values.min()
    np.testing.assert_array_equal(ticks.get_xdata(), found.a)
    plot.loss_along_ray(RAY, axes, label="again")
    named = [line for line in axes.lines if line.get_label() in ("hinge", "again")]
    assert len({line.get_linestyle() for line in named}) == 2
    with pytest.raises(ValueError, match="ray has no points"):
        plot.loss_along_ray(landscape.slice_1d(small(), W3, a=[]))


def test_of_a_level_stretch_the_place_nearest_to_the_weights_is_marked():
    a = np.linspace(-1, 1, 9)
    for values, place in ((np.maximum(a, 0.5), 0), (np.maximum(-a, -0.5), 0.5), (np.where(a > 0, np.nan, a), 0.25)):
        assert plot.loss_along_ray(replace(RAY, a=a, values=values)).lines[1].get_xdata()[0] == place


def test_a_plane_marks_its_lowest_point():
    axes = plot.loss_on_plane(PLANE)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["W", f"lowest: {PLANE.values.min():.3g}"]
    flat = landscape.Plane(PLANE.a, PLANE.b, 0 * PLANE.values, PLANE.directions)
    render(plot.loss_on_plane(flat).figure)
    with pytest.raises(ValueError, match="must be at least 2 × 2"):
        plot.loss_on_plane(landscape.slice_2d(small(), W3, a=[0]))


def test_a_sweep_marks_what_diverged():
    sweep = train.Sweep(np.array([0.1, 1, 10]), np.array([1.0, 0.5, np.inf]), ({},) * 3, 1.0, W3, 0.5, "done")
    axes = render(plot.step_sizes(sweep, start=2.0).figure).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_array_equal(lines["diverged, or lost ground"].get_xdata(), [10])
    np.testing.assert_array_equal(lines["after training"].get_ydata(), [1, 0.5])
    assert lines["best: 1"].get_xdata() == [1.0]
    assert "before training: 2" in lines


def test_searches_of_a_kind_are_drawn_alike():
    histories = {f"{kind} {k}": {"step": np.arange(3), "best": np.arange(3)} for kind in ("a", "b") for k in range(2)}
    axes = plot.search_progress(histories)
    assert len({line.get_linestyle() for line in axes.lines}) == 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    with pytest.raises(ValueError, match="histories is empty"):
        plot.search_progress({})


def test_the_hinge_is_drawn_by_the_losses():
    hinge, squared, softmax, _ = plot.hinge_shape(margin=2).lines
    d = hinge.get_xdata()
    np.testing.assert_allclose(hinge.get_ydata(), np.maximum(0, 2 - d), atol=1e-12)
    np.testing.assert_allclose(squared.get_ydata(), np.maximum(0, 2 - d) ** 2, atol=1e-12)
    np.testing.assert_allclose(softmax.get_ydata(), np.log1p(np.exp(-d)), rtol=1e-9)
    with pytest.raises(TypeError, match="margin is 'wide'"):
        plot.hinge_shape(margin="wide")


def test_losses_of_the_lectures_three_images():
    axes = render(plot.losses_compared([[10, -2, 3], [10, 9, 9], [10, -100, -100]], [0, 0, 0]).figure).axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), 0)
    assert axes.lines[0].get_ydata()[1] == pytest.approx(0.5514, abs=1e-4)
    assert axes.texts[0].get_text() == "100 % of 3 rows\nhave hinge loss 0"
    many = plot.losses_compared(np.random.default_rng(0).normal(size=(9000, 2)), np.zeros(9000, int))
    assert len(many.lines[0].get_xdata()) == plot.MOST_POINTS
    render(plot.losses_compared(np.zeros((0, 3)), np.zeros(0, int)).figure)
    with pytest.raises(ValueError, match="losses holds 1 losses"):
        plot.losses_compared([[1.0]], [0], losses={"hinge": fl.Hinge()})


def test_decision_regions_are_the_models():
    shifted = LinearModel(W3, ("a", "b", "c"), shift=np.array([3.0, -2]), scale=np.array([2.0, 5]))
    axes = plot.decision_regions(shifted, POINTS, LABELS)
    image = axes.images[0]
    left, right, bottom, top = image.get_extent()
    shown = np.asarray(image.get_array())
    x = np.array([[left, bottom], [right, top], [left, top]])
    np.testing.assert_array_equal(shifted.predict(x), shown[[0, -1, -1], [0, -1, 0]])
    for line, row in zip([line for line in axes.lines if hasattr(line, "get_slope")], W3, strict=True):
        (x0, y0), slope = line.get_xy1(), line.get_slope()
        other = line.get_xy2() if slope is None else (x0 + 1, y0 + slope)
        for point in ((x0, y0), other):
            z = (np.asarray(point) - [3, -2]) / [2, 5]
            assert row[:2] @ z + row[2] == pytest.approx(0, abs=1e-9)
    for bad, message in (
        ((LinearModel(np.ones((2, 4)), ("a", "b")), POINTS, LABELS), "model has 3 features and X 2"),
        ((shifted, POINTS, LABELS[:3]), r"y has shape \(3,\)"),
        ((shifted, POINTS[:0], LABELS[:0]), "X has no rows"),
    ):
        with pytest.raises(ValueError, match=message):
            plot.decision_regions(*bad)
    same = plot.decision_regions(LinearModel(0 * W3, ("a", "b", "c")), np.ones((4, 2)), np.zeros(4, int))
    render(same.figure)


def test_a_confusion_matrix_counts():
    axes = plot.confusion_matrix([0, 0, 1, 2, 2], [0, 1, 1, 2, 0], ("a", "b", "c"))
    assert [int(text.get_text()) for text in axes.texts] == [1, 1, 0, 0, 1, 0, 1, 0, 1]
    for y, predicted, message in (
        ([0, 1], [0], r"predicted has shape \(1,\)"),
        ([0, 3], [0, 1], "y goes from 0 to 3, but there are 3 class_names"),
        ([0.5], [0], "y has shape .* dtype float64"),
    ):
        with pytest.raises(ValueError, match=message):
            plot.confusion_matrix(y, predicted, "abc")
    render(plot.confusion_matrix([], [], "abc").figure)


def test_a_confusion_matrix_of_many_classes_has_shades_alone():
    y = np.arange(60) % 31
    axes = plot.confusion_matrix(y, y, [str(k) for k in range(31)])
    assert not axes.texts
    assert plot.figure_of(axes).get_size_inches().max() < 20
    assert axes.images[0].get_array().shape == (31, 31)


def test_weights_are_sorted_and_zeros_counted():
    line = plot.weight_magnitudes({"L1": np.array([[0, -3.0], [1, 0]])}).lines[0]
    np.testing.assert_array_equal(line.get_ydata(), [3, 1, 0, 0])
    np.testing.assert_array_equal(line.get_xdata(), [12.5, 37.5, 62.5, 87.5])
    assert line.get_label() == "L1: 50 % are 0"
    with pytest.raises(ValueError, match="weights must hold at least one"):
        plot.weight_magnitudes({})
