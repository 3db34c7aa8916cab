"""The driver and the canvas in a real JupyterLab: kernel, messages, threads, picture."""

from collections.abc import Iterator

import pytest

from tests.browser.chromium import Page, skip_without_browser
from tests.browser.lab import Notebook, Server

skip_without_browser()
pytest.importorskip("jupyterlab", reason="jupyterlab is not installed: .[notebooks]")

PANEL = """\
import ipywidgets, numpy as np, threading, torch
from mimdet.viz import Panel, PatchCanvas
class Lamp(Panel):
    def __init__(self):
        super().__init__()
        self.canvases = [PatchCanvas(rows=2, columns=3, tool="select", size=(120, 80))]
        self.level = ipywidgets.IntSlider(0, 0, 255, 5)
        self.level.add_class("lamp-level")
        self.canvases[0].add_class("lamp-canvas")
        self.canvases[0].observe(self.changed, "selected")
        self.open([self.level], self.canvases)
    def draw(self):
        if self.level.value == 10:
            raise ValueError("too <dark>")
        self.canvases[0].show(np.full((20, 30, 3), self.level.value, np.uint8), 120)
        return f"level {self.level.value}, grad {torch.is_grad_enabled()}"
lamp = Lamp()
lamp
"""


@pytest.fixture(scope="module")
def notebook(server: Server, page: Page) -> Iterator[Notebook]:
    notebook = Notebook(server, page, "lamp", [PANEL])
    notebook.run_all()
    yield notebook
    notebook.close()


def test_a_click_reaches_python_and_the_answer_the_page(notebook: Notebook) -> None:
    took = notebook.answer_to(lambda: notebook.click_canvas(0, 0.8, 0.8))
    canvas = notebook.find("mimdet-canvas")
    assert canvas.get_attribute("data-selected") == "5"  # row 2, column 3
    assert 0 < took < 20_000
    assert notebook.browser.errors == []


def test_a_slider_changes_the_picture(notebook: Notebook) -> None:
    before = notebook.pictures()
    notebook.answer_to(lambda: notebook.slide("lamp-level"))
    assert notebook.pictures() != before
    assert notebook.status() == "level 5, grad False"
    notebook.browser.picture("lamp")
    assert notebook.browser.errors == []


def test_what_goes_wrong_is_written_below_the_panel(notebook: Notebook) -> None:
    notebook.answer_to(lambda: notebook.slide("lamp-level"))
    assert notebook.status() == "ValueError: too <dark>"
    notebook.answer_to(lambda: notebook.slide("lamp-level"))  # and it goes on
    assert notebook.status().startswith("level 15")
    assert notebook.browser.errors == []


def test_the_driver_reports_a_cell_that_fails(server: Server, page: Page) -> None:
    broken = Notebook(server, page, "broken", ["1 / 0"])
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        broken.run_all()
    broken.close()
