"""The JavaScript of PatchCanvas in a bare page, with a stand-in for the model: no server at all.

What the user does is what a page sees: pointer and keys. What Python gets is what is `sent`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.browser.chromium import Page, open_page, skip_without_browser

skip_without_browser()
pytest.importorskip("anywidget", reason="anywidget is not installed: .[notebooks]")

from mimdet.viz.draw import data_url  # noqa: E402
from mimdet.viz.widgets.canvas import HERE  # noqa: E402

STATE: dict[str, Any] = {
    "picture": data_url(np.full((4, 6, 3), (0, 0, 255), np.uint8)),
    "rows": 4,
    "columns": 6,
    "size": [240, 160],  # squares of 40 pixels
    "selected": -1,
    "dropped": [],
    "tool": "select",
    "show_grid": False,
    "title": "",
    "label": "a blue picture",
    "seq": 7,
}
MOUNT = """async ([source, css, state]) => {
  const blob = new Blob([source], { type: "text/javascript" });
  const widget = (await import(URL.createObjectURL(blob))).default;
  const listeners = [];
  let unsent = {};
  window.sent = [];
  window.listeners = listeners;
  window.model = {
    get: (name) => state[name],
    set: (name, value) => {
      state[name] = value;
      unsent[name] = value;
      listeners.filter(([event]) => event === `change:${name}`).forEach(([, act]) => act());
    },
    save_changes: () => { window.sent.push(unsent); unsent = {}; },
    on: (event, act) => listeners.push([event, act]),
    off: (event, act) => listeners.splice(
      listeners.findIndex(([e, a]) => e === event && a === act), 1),
  };
  const style = document.createElement("style");
  style.textContent = css;
  const el = document.createElement("div");
  document.body.replaceChildren(style, el);
  window.keys = [];
  document.onkeydown = (event) => window.keys.push(event.key);
  window.close_view = widget.render({ model: window.model, el });
}"""
COLOUR = """([x, y]) => {
  const canvas = document.querySelector("canvas");
  return [...canvas.getContext("2d").getImageData(x, y, 1, 1).data.slice(0, 3)];
}"""
BLUE, RED = [0, 0, 255], (255, 0, 0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with open_page(500, 400, seconds=30) as page:
        yield page


@pytest.fixture
def mount(browser: Page) -> Iterator[Callable[..., Any]]:
    """Show the widget with some traits changed; returns the page. No error may remain."""

    def show(**changed: Any) -> Any:
        source, css = ((HERE / f"patch_canvas.{kind}").read_text() for kind in ("js", "css"))
        browser.page.set_content("<body></body>")
        browser.page.evaluate(MOUNT, [source, css, {**STATE, **changed}])
        browser.page.wait_for_selector("canvas[data-seq='7']")
        return browser.page

    yield show
    assert browser.errors == []


def centre(page: Any, row: int, column: int, side: float = 40) -> tuple[float, float]:
    box = page.locator("canvas").bounding_box()
    return box["x"] + 1 + side * (column + 0.5), box["y"] + 1 + side * (row + 0.5)  # 1: the border


def stroke(page: Any, start: tuple[int, int], end: tuple[int, int], steps: int) -> None:
    page.mouse.move(*centre(page, *start))
    page.mouse.down()
    page.mouse.move(*centre(page, *end), steps=steps)
    page.mouse.up()


def sent(page: Any, count: int) -> list[dict[str, Any]]:
    """The messages, once there are `count` and every event so far has been dealt with."""
    page.wait_for_function(f"sent.length >= {count}")
    page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")
    return page.evaluate("sent")


def set_trait(page: Any, name: str, value: Any) -> None:
    page.evaluate("([name, value]) => model.set(name, value)", [name, value])


# ------------------------------------------------------------------------------- pointer


BRUSH: dict[str, Any] = {"tool": "brush"}


@pytest.mark.parametrize(
    ("traits", "start", "end", "steps", "message"),
    [
        ({}, (0, 0), (0, 0), 1, {"selected": 0}),
        ({}, (2, 3), (2, 3), 1, {"selected": 15}),
        ({}, (3, 5), (3, 5), 1, {"selected": 23}),
        (BRUSH, (1, 0), (1, 5), 40, {"dropped": [6, 7, 8, 9, 10, 11]}),
        (BRUSH, (1, 0), (1, 5), 1, {"dropped": [6, 7, 8, 9, 10, 11]}),  # few places are reported
        (BRUSH, (0, 0), (3, 3), 1, {"dropped": [0, 7, 14, 21]}),
        (BRUSH | {"dropped": [0, 1, 2, 9]}, (0, 1), (0, 3), 10, {"dropped": [0, 9]}),  # brings back
        (BRUSH, (3, 4), (8, 4), 10, {"dropped": [22]}),  # ends outside
    ],
)
def test_a_stroke_is_one_message(
    mount: Any, traits: Any, start: Any, end: Any, steps: int, message: Any
) -> None:
    page = mount(**traits)
    stroke(page, start, end, steps)
    assert sent(page, 1) == [message]
    page.mouse.move(*centre(page, 0, 0))
    assert sent(page, 1) == [message]  # the button is up


def test_click_on_a_shrunken_canvas(mount: Any) -> None:
    """A narrow window makes the picture smaller, not the grid other."""
    page = mount(size=[960, 640])  # shown 484 wide at most
    box = page.locator("canvas").bounding_box()
    assert box["width"] < 500
    assert box["height"] == pytest.approx(box["width"] * 640 / 960, abs=2)
    page.mouse.click(*centre(page, 3, 5, (box["width"] - 2) / 6))
    assert sent(page, 1) == [{"selected": 23}]


def test_other_buttons_do_nothing(mount: Any) -> None:
    page = mount(tool="brush")
    page.mouse.click(*centre(page, 1, 1), button="right")
    assert sent(page, 0) == []


def test_looking_changes_nothing(mount: Any) -> None:
    page = mount(tool="look", selected=3)
    stroke(page, (0, 0), (2, 2), 5)
    page.locator("canvas").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert sent(page, 0) == []
    assert page.evaluate("keys") == ["ArrowRight", "Enter"]  # the notebook's own


# ------------------------------------------------------------------------------- keyboard


@pytest.mark.parametrize(
    ("traits", "key", "message"),
    [
        ({"selected": 8}, "ArrowRight", {"selected": 9}),
        ({"selected": 8}, "ArrowLeft", {"selected": 7}),
        ({"selected": 8}, "ArrowUp", {"selected": 2}),
        ({"selected": 8}, "ArrowDown", {"selected": 14}),
        ({"selected": -1}, "ArrowDown", {"selected": 0}),
        ({"selected": 0, "columns": 1}, "ArrowDown", {"selected": 1}),
        ({"selected": 11}, "ArrowRight", None),  # the edges
        ({"selected": 6}, "ArrowLeft", None),
        ({"selected": 2}, "ArrowUp", None),
        ({"selected": 20}, "ArrowDown", None),
        ({"selected": 0, "columns": 1}, "ArrowRight", None),
        (BRUSH | {"selected": 8}, "Enter", {"dropped": [8]}),
        (BRUSH | {"selected": 8, "dropped": [8, 9]}, " ", {"dropped": [9]}),
    ],
)
def test_keys(mount: Any, traits: Any, key: str, message: Any) -> None:
    page = mount(**traits)
    page.locator("canvas").focus()
    page.keyboard.press(key)
    assert sent(page, int(message is not None)) == [message] * (message is not None)
    assert page.evaluate("keys") == []  # the notebook does not get them


def test_shift_enter_still_runs_the_cell(mount: Any) -> None:
    page = mount(tool="brush", selected=8)
    page.locator("canvas").focus()
    page.keyboard.press("Shift+Enter")
    assert sent(page, 0) == []
    assert "Enter" in page.evaluate("keys")


def test_it_can_be_reached_with_tab(mount: Any) -> None:
    page = mount()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "mimdet-canvas"


# ------------------------------------------------------------------------------- what is shown


def test_it_says_what_it_shows(mount: Any) -> None:
    page = mount()
    canvas = page.locator("canvas")
    assert canvas.get_attribute("aria-label") == "a blue picture"
    assert canvas.get_attribute("role") == "application"
    set_trait(page, "selected", 8)
    assert canvas.get_attribute("aria-label") == "a blue picture: row 1, column 2"
    set_trait(page, "label", "another")
    set_trait(page, "tool", "look")
    assert canvas.get_attribute("aria-label") == "another: row 1, column 2"
    assert canvas.get_attribute("role") == "img"


def test_what_is_drawn(mount: Any) -> None:
    page = mount(dropped=[23], selected=8)
    assert page.evaluate(COLOUR, [20, 20]) == BLUE
    assert min(page.evaluate(COLOUR, [220, 140])) > 190  # the last token is light grey
    assert page.evaluate(COLOUR, [80, 60]) == [0xD5, 0x5E, 0]  # left edge of column 2
    assert page.evaluate(COLOUR, [160, 20]) == BLUE
    set_trait(page, "show_grid", True)
    assert min(page.evaluate(COLOUR, [160, 20])) > 40


def test_the_old_picture_stays_until_the_answer_is_drawn(mount: Any) -> None:
    """Python's messages come one by one; data-seq says that the new picture is on the screen."""
    page = mount()
    red = data_url(np.full((4, 6, 3), RED, np.uint8))
    now = page.evaluate(
        f"""(url) => {{
          model.set("picture", url); model.set("seq", 8);
          return [({COLOUR})([20, 20]), document.querySelector("canvas").dataset.seq];
        }}""",
        red,
    )
    assert now == [BLUE, "7"]
    page.wait_for_selector("canvas[data-seq='8']")
    assert page.evaluate(COLOUR, [20, 20]) == [255, 0, 0]


def test_of_quick_answers_the_last_one_counts(mount: Any) -> None:
    page = mount()
    large = data_url(np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8))
    small = data_url(np.full((1, 1, 3), RED, np.uint8))
    page.evaluate(
        '([a, b]) => { model.set("picture", a); model.set("picture", b); model.set("seq", 8); }',
        [large, small],
    )
    page.wait_for_selector("canvas[data-seq='8']")
    page.wait_for_timeout(300)  # time for the slow one to come late
    assert page.evaluate(COLOUR, [20, 20]) == [255, 0, 0]


def test_a_closed_view_hears_nothing(mount: Any) -> None:
    page = mount()
    assert page.evaluate("listeners.length") > 0
    page.evaluate("close_view()")
    assert page.evaluate("listeners.length") == 0
