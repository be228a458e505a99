"""`fastloss demo`: what it computes against loops of its own; the page without a browser; the server; a browser."""

import http.client
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import fastloss as fl
from fastloss import cli, demo
from fastloss.demo import server
from fastloss.train import DivergenceError

HINGES = [name for name in demo.LOSSES if "hinge" in name]


def loss_of_row(name, s, y):
    """The loss of one point, as the page prints its formula."""
    if "softmax" in name:
        return -np.log(np.exp(s[y]) / np.exp(s).sum())
    terms = [max(0.0, s[j] - s[y] + 1) for j in range(3) if j != y]
    if "squared" in name:
        return sum(t**2 for t in terms)
    return max(terms) if "worst" in name else sum(terms) / (3 if "mean" in name else 1)


def objective(name, X, y, W, strength):
    scores = [W[:, :2] @ x + W[:, 2] for x in X]
    losses = np.array([loss_of_row(name, s, k) for s, k in zip(scores, y, strict=True)])
    return losses.mean() + strength * (W[:, :2] ** 2).sum(), losses, np.array(scores)


def differences(name, state):
    """The gradient by centred differences."""
    found, h = np.zeros((3, 3)), 1e-6
    for place in np.ndindex(3, 3):
        values = []
        for sign in (1, -1):
            W = state.W.copy()
            W[place] += sign * h
            values.append(objective(name, state.X, state.y, W, state.strength)[0])
        found[place] = (values[0] - values[1]) / (2 * h)
    return found


# --- what is computed ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", demo.LOSSES)
def test_what_is_shown_is_the_definition(name):
    state = demo.State()
    state.choose(name)
    state.penalise(0.3)
    state.scatter(np.random.default_rng(1))
    state.shake(np.random.default_rng(2))
    view = state.view()
    value, losses, scores = objective(name, state.X, state.y, state.W, 0.3)
    np.testing.assert_allclose(view.scores, scores, atol=1e-13)
    np.testing.assert_allclose(view.losses, losses, atol=1e-12)
    assert view.value == pytest.approx(value, abs=1e-12)
    assert view.data == pytest.approx(losses.mean(), abs=1e-12)
    assert view.data + view.penalty == pytest.approx(view.value, abs=1e-12)
    assert view.accuracy == np.mean(scores.argmax(axis=1) == state.y)
    np.testing.assert_allclose(view.gradient, differences(name, state), atol=1e-6)
    for i in range(9):
        for k in range(3):
            up, down = scores[i].copy(), scores[i].copy()
            up[k] += 1e-6
            down[k] -= 1e-6
            slope = (loss_of_row(name, up, state.y[i]) - loss_of_row(name, down, state.y[i])) / 2e-6
            assert view.slopes[i, k] == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize("name", demo.LOSSES)
def test_a_step_goes_against_the_gradient(name):
    state = demo.State()
    state.choose(name)
    W, expected = state.W.copy(), [objective(name, state.X, state.y, state.W, 0.01)[0]]
    state.step_size = 0.3
    for _ in range(3):
        W -= 0.3 * fl.LinearObjective(
            demo.LOSSES[name], state.X, state.y, penalty=fl.L2(0.01), backend="reference"
        ).value_and_grad(W)[1]
        expected.append(objective(name, state.X, state.y, W, 0.01)[0])
        state.step()
    np.testing.assert_allclose(state.W, W, atol=1e-12)
    assert [step for step, *_ in state.curve] == [0, 1, 2, 3]
    np.testing.assert_allclose([value for _, value, _ in state.curve], expected, atol=1e-12)
    again = demo.State()
    again.choose(name)
    again.step_size = 0.3
    again.step(3)
    np.testing.assert_array_equal(again.W, state.W)


def test_regions_are_those_of_the_highest_score():
    state = demo.State()
    found = state.regions(7)
    places = (np.arange(7) + 0.5) / 7 * 2 - 1
    for i, j in np.ndindex(7, 7):
        assert found[i, j] == (state.W[:, :2] @ [places[j], places[i]] + state.W[:, 2]).argmax()


def test_points_stay_in_the_plane_and_bad_ones_are_turned_away():
    state = demo.State()
    X = state.X.copy()
    X[0] = (5, -7)
    state.move(X)
    assert state.X[0].tolist() == [1, -1]
    for bad, message in ((X[:8], "X has shape"), (X[:, :1], "X has shape"), (X * np.nan, "X"), ("many", "X")):
        with pytest.raises((ValueError, TypeError), match=message):
            state.move(bad)
    with pytest.raises(ValueError, match="loss is 'absolute'; it must be one of"):
        state.choose("absolute")
    with pytest.raises(ValueError, match="strength is -1"):
        state.penalise(-1)
    assert state.X[0].tolist() == [1, -1]
    for seed in range(20):
        state.scatter(np.random.default_rng(seed))
        assert np.abs(state.X).max() <= demo.LIMIT
    state.step()
    state.reset()
    np.testing.assert_array_equal(state.X, demo.POINTS)
    np.testing.assert_array_equal(state.W, demo.START)
    assert state.steps == 0
    assert len(state.curve) == 1


def test_a_step_too_long_is_an_error_that_leaves_the_weights():
    state = demo.State()
    state.choose("squared hinge, sum over the wrong classes")
    state.step_size = 1e200
    with pytest.raises(DivergenceError):
        state.step(5)
    np.testing.assert_array_equal(state.W, demo.START)
    assert state.steps == 0


# --- the page, without a browser -----------------------------------------------------------------------------------
@pytest.fixture
def page():
    from bokeh.document import Document

    from fastloss.demo.page import Page

    return Page(Document(), seed=0)


def click(page, name):
    from bokeh.events import ButtonClick

    page.buttons[name]._trigger_event(ButtonClick(page.buttons[name]))


def shown(text):
    """The objective that a summary shows."""
    plain = re.sub(r"<[^>]+>", "", text).replace("−", "-")
    return float(re.search(r"J = .* = (\d+\.\d\d)", plain)[1])


def test_the_page_shows_what_is_computed(page):
    state = page.state
    assert shown(page.text["summary"].text) == pytest.approx(state.view().value, abs=0.005)
    page.loss.value = "softmax (cross-entropy)"
    page.strength.value = "0.1"
    page.step_size.value = "1"
    assert (state.loss, state.strength, state.step_size) == ("softmax (cross-entropy)", 0.1, 1.0)
    data = dict(page.points.data)
    page.points.data = data | {"x": np.array([0.9, *data["x"][1:]])}
    assert state.X[0, 0] == 0.9
    expected = objective(state.loss, state.X, state.y, state.W, 0.1)
    assert shown(page.text["summary"].text) == pytest.approx(expected[0], abs=0.005)
    rows = re.findall(r"<tr><td.*?</tr>", page.text["points"].text)
    cells = [re.sub(r"<[^>]+>", " ", row.replace("</td>", "|")).replace("−", "-").split("|")[:-1] for row in rows]
    assert [float(row[7]) for row in cells] == pytest.approx(expected[1], abs=0.0051)
    assert [float(row[2]) for row in cells] == pytest.approx(state.X[:, 0], abs=0.0051)
    click(page, "step")
    assert state.steps == 1
    assert page.curve.data["value"].tolist() == [value for _, value, _ in state.curve]
    weights = re.findall(r"<tr><td.*?</tr>", page.text["weights"].text)
    numbers = [[float(x) for x in re.findall(r">(-?[\d.]+)<", row.replace("−", "-"))] for row in weights]
    np.testing.assert_allclose(numbers, np.hstack([state.W, state.view().gradient]), atol=0.0051)
    click(page, "new points")
    np.testing.assert_array_equal(page.points.data["y"], state.X[:, 1])
    click(page, "new weights")
    assert state.steps == 0
    click(page, "reset")
    np.testing.assert_array_equal(page.points.data["x"], np.array(demo.POINTS)[:, 0])
    assert state.loss == "softmax (cross-entropy)"


def test_a_run_steps_until_it_is_paused_or_diverges(page):
    page.run.active = True
    assert page.run.label == "Pause"
    (tick,) = page.document.session_callbacks
    for _ in range(3):
        tick.callback()
    assert page.state.steps == 3
    page.run.active = False
    assert page.run.label == "Run"
    assert page.document.session_callbacks == []
    page.loss.value = "squared hinge, sum over the wrong classes"
    page.step_size.value = "3"
    page.strength.value = "1"
    page.run.active = True
    (tick,) = page.document.session_callbacks
    for _ in range(100):
        if not page.run.active:
            break
        tick.callback()
    assert not page.run.active
    assert page.state.view().value < 1e20, "stopped while there are numbers to show"
    assert "smaller learning rate" in page.text["note"].text
    assert page.text["note"].visible
    click(page, "reset")
    assert not page.text["note"].visible

    def diverge():
        raise DivergenceError("the loss is not finite", None)

    page.state.step = diverge
    click(page, "step")
    assert page.text["note"].visible
    click(page, "reset")
    assert not page.text["note"].visible


def test_a_deleted_point_comes_back(page):
    """Bokeh's tool deletes a point that is held, at a press of Backspace."""
    data = {name: list(column)[1:] for name, column in page.points.data.items()}
    page.points.data = data
    np.testing.assert_array_equal(page.points.data["x"], np.array(demo.POINTS)[:, 0])
    assert page.state.X.shape == (9, 2)


def test_lines_are_where_a_score_is_0_and_grow_along_their_arrows(page):
    for w, source in zip(page.state.W, page.lines, strict=True):
        (found,) = np.stack([source.data[name] for name in ("x0", "y0", "x1", "y1", "tail_x", "tail_y")], axis=1)
        np.testing.assert_allclose(found.reshape(3, 2) @ w[:2] + w[2], 0, atol=1e-12)
        assert w[:2] @ [source.data["head_x"][0], source.data["head_y"][0]] + w[2] > 0
    page.state.W[0] = 0, 0, 1
    page.show()
    assert np.isnan(page.lines[0].data["x0"][0])


def test_classes_can_be_told_apart_in_greyscale():
    from fastloss.demo.page import COLOURS, DASHES, MARKERS, REGIONS

    def lightness(colour):
        return np.dot([int(colour[k : k + 2], 16) for k in (1, 3, 5)], [0.299, 0.587, 0.114])

    for shades, apart in ((REGIONS, 25), (COLOURS[:3], 0)):
        grey = sorted(map(lightness, shades))
        assert np.diff(grey).min() > apart
    assert len(set(MARKERS)) == len(set(map(str, DASHES))) == 3


# --- the server ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def address():
    """The port of a running `fastloss demo`, which must end well at Ctrl-C."""
    command = [sys.executable, "-m", "fastloss", "demo", "--port", "0", "--no-browser"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started behind a shell does not heed it
    process = subprocess.Popen(command, **pipes)
    signal.signal(signal.SIGINT, before)
    with process:
        line = process.stdout.readline()
        try:
            yield int(re.search(r"http://127\.0\.0\.1:(\d+)/", line)[1])
        finally:
            process.send_signal(signal.SIGINT)
            try:
                errors = process.communicate(timeout=60)[1]
            finally:
                process.kill()
            assert process.returncode == 0
            assert "Traceback" not in errors


def answer(port, path="/", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def test_the_page_needs_nothing_from_elsewhere(address):
    status, text = answer(address)
    assert status == 200
    scripts = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert scripts
    for script in scripts:
        assert not re.match(r"(https?:)?//", script), script
        assert answer(address, f"/{script.lstrip('/')}")[0] == 200
    assert not re.search(r"cdn|unpkg|googleapis", text)


def test_only_this_machine_and_this_page_are_served(address):
    assert answer(address, Host=f"localhost:{address}")[0] == 200
    assert answer(address, Host=f"attacker.example:{address}")[0] == 404
    websocket = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec_WebSocket_Version": "13",
                 "Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ=="}  # fmt: skip
    assert answer(address, "/ws", Origin="http://attacker.example", **websocket)[0] == 403
    assert answer(address, "/ws", Origin=f"http://127.0.0.1:{address + 1}", **websocket)[0] == 403
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", address), timeout=5).close()


def test_each_tab_has_points_of_its_own(page):
    from bokeh.document import Document

    other = type(page)(Document(), seed=1)
    click(page, "new points")
    np.testing.assert_array_equal(other.state.X, demo.POINTS)


def test_errors_are_one_line(capsys, monkeypatch, address):
    for options, message in (
        (("--port", str(address)), f"port {address} cannot be listened on"),
        (("--port", "-1"), "port is -1; it must be at least 0"),
        (("--port", "65536"), "port is 65536; it must be at most 65535"),
    ):
        assert cli.main(["demo", "--no-browser", *options]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""
    monkeypatch.setitem(sys.modules, "bokeh.application", None)
    assert cli.main(["demo", "--no-browser"]) == 2
    assert 'pip install "fastloss[demo]"' in capsys.readouterr().err


def test_a_browser_is_opened_unless_told_not_to(monkeypatch):
    seen = []
    monkeypatch.setattr(server, "serve", lambda port, *, browser: seen.append((port, browser)))
    assert cli.main(["demo"]) == cli.main(["demo", "--port", "8000", "--no-browser"]) == 0
    assert seen == [(5006, True), (8000, False)]


# --- a real browser ------------------------------------------------------------------------------------------------
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


class Tab:
    """The page in a browser: what a student sees and does."""

    def __init__(self, driver):
        self.driver = driver

    def view(self, name, then):
        """What a line of JavaScript finds in the view of a model."""
        find = "const model = Bokeh.documents[0].get_model_by_name(arguments[0]), view = Bokeh.index.find_one(model);"
        return self.driver.execute_script(find + then, name)

    def text(self, name):
        return self.view(name, "return view.shadow_el.textContent").replace("−", "-")

    def value(self):
        return shown(self.text("summary"))

    def element(self, name, selector):
        return self.view(name, f"return view.shadow_el.querySelector('{selector}')")

    def points(self):
        xy = self.view("places", "return [Array.from(model.data.x), Array.from(model.data.y)]")
        return np.array(xy).T

    def pixels(self, points):
        """Where in the window points of the plane are."""
        box = "const box = view.el.getBoundingClientRect(), at = [box.left, box.top];"
        scales = "return [at, view.frame.x_scale.v_compute([-1, 1]), view.frame.y_scale.v_compute([-1, 1])]"
        scales = scales.replace("v_compute([-1, 1])", "compute(%d)")
        low = self.view("plane", box + scales % (-1, -1))
        high = self.view("plane", box + scales % (1, 1))
        start, end = (np.array([at[0] + x, at[1] + y]) for at, x, y in (low, high))
        return start + (np.asarray(points) + 1) / 2 * (end - start)

    def drag(self, start, end):
        """Press the button of the mouse at one place of the plane, and release it at another, by way of the half."""
        from selenium.webdriver.common.action_chains import ActionChains

        places = self.pixels([start, np.add(start, end) / 2, end]).round()
        chain = ActionChains(self.driver, duration=20)
        pointer = chain.w3c_actions.pointer_action
        pointer.move_to_location(*places[0].tolist())
        pointer.pointer_down()
        pointer.move_to_location(*places[1].tolist())
        pointer.move_to_location(*places[2].tolist())
        chain.perform()
        yield  # still held
        chain = ActionChains(self.driver, duration=20)
        chain.w3c_actions.pointer_action.pointer_up()
        chain.perform()
        yield

    def wait(self, condition):
        """Until something is so, which takes a few messages between browser and server."""
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end, self.text("summary")
            time.sleep(0.02)


@pytest.fixture(scope="module")
def tab(address):
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("NO BROWSER HAS SEEN THE DEMO: chromium and chromedriver (Debian: chromium-driver) are not here")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1280,1000"):
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.get(f"http://127.0.0.1:{address}/")
        found = Tab(driver)
        ready = "return window.Bokeh?.documents[0]?.is_idle ?? false"
        end = time.monotonic() + 30
        while not driver.execute_script(ready):
            assert time.monotonic() < end
            time.sleep(0.05)
        yield found
        problems = [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
        assert problems == []
    finally:
        driver.quit()


def expected(tab, W, loss=None, strength=0.01):
    """The reference's value for the points that the browser has."""
    chosen = demo.LOSSES[loss or next(iter(demo.LOSSES))]
    y = np.array(demo.TARGETS)
    return fl.LinearObjective(chosen, tab.points(), y, penalty=fl.L2(strength), backend="reference").value_and_grad(W)


def test_drag_step_reset_in_a_browser(tab):
    W = np.array(demo.START)
    start = tab.value()
    assert start == pytest.approx(expected(tab, W)[0], abs=0.005)

    # A point is dragged: the loss follows while it is held, and stays when it is released.
    holding = tab.drag(demo.POINTS[4], (0.6, -0.8))
    next(holding)
    tab.wait(lambda: tab.value() != start)
    next(holding)
    np.testing.assert_allclose(tab.points()[4], (0.6, -0.8), atol=0.01)
    others = np.delete(np.arange(9), 4)
    np.testing.assert_array_equal(tab.points()[others], np.array(demo.POINTS)[others])
    moved, gradient = expected(tab, W)
    tab.wait(lambda: tab.value() == pytest.approx(moved, abs=0.0051))
    assert abs(moved - start) > 0.02
    assert "0.60-0.80" in tab.text("points")

    # A step of 0.1 against the gradient.
    tab.element("step", "button").click()
    W = W - 0.1 * gradient
    tab.wait(lambda: "after 1 step." in tab.text("summary"))
    assert tab.value() == pytest.approx(expected(tab, W)[0], abs=0.0051)

    # Run, and pause.
    tab.element("run", "button").click()
    tab.wait(lambda: re.search(r"after ([3-9]|\d\d) steps", tab.text("summary")))
    tab.element("run", "button").click()
    tab.wait(lambda: "Run" in tab.text("run"))
    assert tab.value() < start

    # A click on a point, and Backspace, neither select nor delete it.
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    chain = ActionChains(tab.driver, duration=20)
    chain.w3c_actions.pointer_action.move_to_location(*tab.pixels(demo.POINTS[0]).round().tolist())
    chain.w3c_actions.pointer_action.click()
    chain.perform()
    ActionChains(tab.driver).send_keys(Keys.BACKSPACE).perform()
    assert len(tab.points()) == 9

    tab.element("reset", "button").click()
    tab.wait(lambda: "after 0 steps" in tab.text("summary"))
    tab.wait(lambda: np.array_equal(tab.points(), demo.POINTS))
    assert tab.value() == start


def test_choices_in_a_browser(tab):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.select import Select

    W, choice = np.array(demo.START), Select(tab.element("loss", "select"))
    for name in [*reversed(demo.LOSSES)]:
        choice.select_by_value(name)
        value = expected(tab, W, name)[0]
        tab.wait(lambda value=value: tab.value() == pytest.approx(value, abs=0.0051))
    tab.element("strength", ".noUi-handle").send_keys(Keys.ARROW_RIGHT)
    value = expected(tab, W, strength=0.03)[0]
    tab.wait(lambda: tab.value() == pytest.approx(value, abs=0.0051))
