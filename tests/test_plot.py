"""Pictures: what is drawn, how it is labelled, and that nothing of matplotlib's global state is touched."""

import sys

import numpy as np
import pytest

from fastloss import plot
from fastloss.model import LinearModel


def history(n=6, validation=True):
    """The history of a training whose first record stands far off."""
    found = {"epoch": np.arange(n), "loss": np.r_[9.0, 2 - 0.1 * np.arange(1, n)], "accuracy": 0.1 + 0.1 * np.arange(n)}
    return found | ({"validation_accuracy": 0.1 + 0.08 * np.arange(n)} if validation else {})


def model(image_shape, n_classes=3, W=None):
    d = int(np.prod(image_shape)) if image_shape else 4
    W = np.linspace(-1, 2, n_classes * (d + 1)).reshape(n_classes, d + 1) if W is None else W
    return LinearModel(W, tuple(f"class {k}" for k in range(n_classes)), image_shape=image_shape)


def render(figure):
    """Draw it all: what is wrong shows up as an error or a warning here."""
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
    figure = plot.training_curves({"softmax": history(), "hinge": history()})
    styles = {(line.get_marker(), line.get_linestyle()) for line in figure.axes[-1].lines}
    assert len(styles) == 4


def test_the_far_off_start_is_written_and_does_not_flatten_the_rest():
    panel = plot.training_curves({"softmax": history()}).axes[0]
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
    assert draw(panels) is figure
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
    assert plot.class_templates(trained).axes[-1].get_ylabel() == "weight, per standard deviation"


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
