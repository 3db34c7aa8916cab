"""Every panel in a real JupyterLab: each control is used once, and the picture changes.

The time from an event to the new picture is written to `build/browser/latency.json`
(tools/measure_times.py keeps it); screenshots lie beside it, to be looked at.
"""

import io
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mimdet
from mimdet.training.run import CheckpointStore
from tests.browser.chromium import PICTURES, Page, skip_without_browser
from tests.browser.lab import Notebook, Server
from tools import notebooks

skip_without_browser()
pytest.importorskip("jupyterlab", reason="jupyterlab is not installed: .[notebooks]")

pytestmark = pytest.mark.timeout(900)

Act = Callable[[Notebook], object]

MODELS = """\
import torch, mimdet
from mimdet import viz
torch.set_num_threads(1)
from mimdet.notebook import open_pictures
pictures = open_pictures(count=3)
model = mimdet.load_detector("tiny")"""


@pytest.fixture(scope="module")
def notebook(server: Server, page: Page) -> Iterator[Notebook]:
    """A notebook with models; one kernel for all panels, as starting one takes most of the time."""
    notebook = Notebook(server, page, "panels", [MODELS, "'the panel'"])
    notebook.run_all()
    yield notebook
    notebook.close()


def photo() -> bytes:
    """A picture of one's own, wider than high."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (96, 144, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def upload(name: str) -> Act:
    return lambda n: n.upload(name, "mine.png", photo())


def brush(notebook: Notebook, tool: str) -> None:
    notebook.toggle("mimdet-token-tool", tool)
    notebook.page.wait_for_timeout(300)  # the canvas hears of it through Python
    if tool == "brush":
        notebook.stroke(0, 0.5)
    else:
        notebook.click_canvas(0, 0.4, 0.4)


def arrow(notebook: Notebook) -> None:
    notebook.find("mimdet-attention-picture").locator("canvas").focus()
    notebook.page.keyboard.press("ArrowRight")


RUNS = """\
scenes = mimdet.ShapesCOCO("shapes-v1-medium", 128, length=6, split="val")
runs = {f"at {r}": mimdet.evaluate(model, scenes, sample_ratio=r).results for r in (1.0, 0.1)}
"""
PANELS: dict[str, tuple[str, dict[str, Act]]] = {
    "token_lab": (
        "viz.TokenLab()",
        {
            "image": lambda n: n.choose("mimdet-token-image", 1),
            "ratio": lambda n: n.slide("mimdet-token-ratio"),
            "seed": lambda n: n.slide("mimdet-token-seed"),
            "sampler": lambda n: n.choose("mimdet-token-sampler", 1),
            "select": lambda n: brush(n, "select"),
            "brush": lambda n: brush(n, "brush"),
            "reconstruction": lambda n: n.choose("mimdet-token-reconstruction", 1),
            "reset": lambda n: n.press("mimdet-token-reset"),
            "upload": upload("mimdet-token-upload"),
        },
    ),
    "attention_explorer": (
        "viz.AttentionExplorer(model)",
        {
            "image": lambda n: n.choose("mimdet-attention-image", 1),
            "ratio": lambda n: n.slide("mimdet-attention-ratio", "End"),
            "click the picture": lambda n: n.click_canvas(0, 0.3, 0.7),
            "click the map": lambda n: n.click_canvas(1, 0.6, 0.2),
            "arrow key": arrow,
            "block": lambda n: n.choose("mimdet-attention-block", 0),
            "head": lambda n: n.choose("mimdet-attention-head", 2),
            "rollout": lambda n: n.tick("mimdet-attention-rollout"),
            "part": lambda n: n.choose("mimdet-attention-part", 1),
            "ratio again": lambda n: n.slide("mimdet-attention-ratio", "ArrowLeft"),
            "seed": lambda n: n.slide("mimdet-attention-seed"),
            "upload": upload("mimdet-attention-upload"),
        },
    ),
    "pyramid_viewer": (
        'viz.PyramidViewer({"trained": model, "from mae": mimdet.load_detector("tiny_from_mae")})',
        {
            "image": lambda n: n.choose("mimdet-pyramid-image", 1),
            "level": lambda n: n.choose("mimdet-pyramid-level", 3),
            "ratio": lambda n: n.slide("mimdet-pyramid-ratio", "ArrowLeft"),
            "seed": lambda n: n.slide("mimdet-pyramid-seed"),
            "scale": lambda n: n.tick("mimdet-pyramid-scale"),
            "view": lambda n: n.toggle("mimdet-pyramid-view", "channel"),
            "channel": lambda n: n.slide("mimdet-pyramid-channel"),
            "model": lambda n: n.choose("mimdet-pyramid-model", 2),
            "upload": upload("mimdet-pyramid-upload"),
        },
    ),
    "ratio_dial": (
        "viz.RatioDial(model, pictures.images, pictures.targets, pictures.categories)",
        {
            "image": lambda n: n.choose("mimdet-ratio-image", 1),
            "ratio": lambda n: n.slide("mimdet-ratio-ratio", "ArrowLeft"),
            "seed": lambda n: n.slide("mimdet-ratio-seed"),
            "score": lambda n: n.slide("mimdet-ratio-score", "End"),
            "pale": lambda n: n.tick("mimdet-ratio-pale"),
            "upload": upload("mimdet-ratio-upload"),
        },
    ),
    "result_browser": (
        RUNS + "viz.ResultBrowser(scenes, runs)",
        {
            "next": lambda n: n.press("mimdet-results-next"),
            "previous": lambda n: n.press("mimdet-results-previous"),
            "position": lambda n: n.write("mimdet-results-position", "3"),
            "verdict": lambda n: n.choose("mimdet-results-verdict", 1),
            "class": lambda n: n.choose("mimdet-results-category", 1),
            "all classes": lambda n: n.choose("mimdet-results-category", 0),
            "size": lambda n: n.choose("mimdet-results-size", 1),
            "all sizes": lambda n: n.choose("mimdet-results-size", 0),
            "where": lambda n: n.choose("mimdet-results-where", 3),
            "either run": lambda n: n.choose("mimdet-results-where", 0),
            "any verdict": lambda n: n.choose("mimdet-results-verdict", 0),
            "score": lambda n: n.slide("mimdet-results-score", "End"),
        },
    ),
    "sample_browser": (
        "viz.SampleBrowser(pictures.dataset, pictures.data)",
        {
            "image": lambda n: n.write("mimdet-data-index", "2"),
            "augmentation": lambda n: n.toggle("mimdet-data-kind", "lsj"),
            "seed": lambda n: n.slide("mimdet-data-seed"),
        },
    ),
}
BOXES = """() => [...document.querySelectorAll("canvas.mimdet-canvas")]
  .map((c) => c.getBoundingClientRect()).map((b) => [b.x, b.y, b.width, b.height])"""
BRUSH_DOWN = """() => {
  const canvas = document.querySelector("canvas.mimdet-canvas");
  const box = canvas.getBoundingClientRect();
  const place = { clientX: box.right - 0.1 * box.width, clientY: box.bottom - 0.1 * box.height };
  canvas.setPointerCapture = () => {};
  canvas.dispatchEvent(new PointerEvent("pointerdown", place));
}"""
CHOOSES = {"class", "all classes", "size", "all sizes", "where", "either run", "any verdict"}
"""Controls that choose another set of images, of which the first may be the same one: they may
change the status line only."""


@pytest.mark.parametrize("name", PANELS)
def test_panel(notebook: Notebook, name: str) -> None:
    """The controls one after the other: each is answered without an error and changes a picture."""
    cell, actions = PANELS[name]
    notebook.browser.errors.clear()
    notebook.run_last(cell)
    notebook.page.wait_for_selector("canvas.mimdet-canvas[data-seq]")
    times = {}
    for control, act in actions.items():
        before, said = notebook.pictures(), notebook.status()
        times[control] = notebook.answer_to(lambda act=act: act(notebook))
        assert not re.match(r"\w*(Error|Exception)\b", notebook.status()), notebook.status()
        changed = notebook.pictures() != before
        changed |= control in CHOOSES and notebook.status() != said
        assert changed, f"{name}: {control} changes no picture"
    notebook.browser.picture(name, notebook.page.locator(".jp-OutputArea-output:has(canvas)").last)
    median = statistics.median(times.values())
    print(f"\n{name}: {median:.0f} ms from event to picture, median of {len(times)}")
    file = PICTURES / "latency.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    kept[name] = {control: round(took, 1) for control, took in times.items()}
    file.write_text(json.dumps(kept, indent=2) + "\n")
    assert notebook.browser.errors == []


TRAINING = """\
from mimdet.notebook import quick_config
from mimdet.viz import TrainingDashboard
cfg = quick_config()
cfg.data.limit_val = cfg.data.shapes_val = 2
cfg.training.steps = 24
cfg.training.threads = 1"""
DASHBOARD = 'TrainingDashboard(cfg, "runs/browser", processes=1)'


def test_training_dashboard(server: Server, page: Page, tmp_path: Path) -> None:
    """Start, Stop & save, close the notebook and its kernel, open it again: it finds the run, and
    resumes to the weights of a training that was never disturbed. The last test: it takes the page.
    """
    name = "mimdet-training"
    page.errors.clear()

    def wait_for(state: str, step: int) -> None:
        page.page.wait_for_function(
            "([state, step]) => { const now = document.querySelector('[data-state]').dataset;"
            " return now.state === state && Number(now.step) >= step }",
            arg=[state, step],
            timeout=200_000,
        )

    first = Notebook(server, page, "training", [TRAINING, DASHBOARD])
    first.run_all()
    at_first = first.pictures()
    first.press(f"{name}-start")
    wait_for("training", 1)
    assert first.find(f"{name}-start").is_disabled()
    first.press(f"{name}-stop")
    wait_for("stopped", 1)
    page.picture("training_stopped")
    first.close()

    again = Notebook(server, page, "training", [TRAINING, DASHBOARD])
    again.run_all()
    wait_for("stopped", 1)
    again.press(f"{name}-resume")
    wait_for("finished", 24)
    page.page.wait_for_selector(f".{name}-detections canvas[aria-label*='of step 24']")
    assert again.pictures() != at_first
    page.picture("training_dashboard")
    (_, top, _, height), (_, below, _, _) = page.page.evaluate(BOXES)
    assert 0 <= below - top - height < 60, "one picture right below the other"
    again.close()
    assert page.errors == []

    cells: dict[str, Any] = {}
    exec(TRAINING, cells)
    steps = [step.number for step in mimdet.train(cells["cfg"], tmp_path / "undisturbed")]
    assert steps == list(range(1, 25))
    runs = server.folder / "runs/browser", tmp_path / "undisturbed"
    ours, theirs = (last_weights(run) for run in runs)
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    last = CheckpointStore(run / "checkpoints").load_last()
    assert last is not None
    return last.weights


@pytest.mark.parametrize("width", [900, 1400])
def test_the_first_screen(server: Server, page: Page, width: int) -> None:
    """Notebook 00 as a student meets it: a brush within a minute, brush and effect seen together,
    one token, what a stroke does in words; and what is said when the kernel is gone."""
    source = notebooks.read_source(notebooks.FOLDER / "py" / "00_quickstart.py")
    cells = [cell.source for cell in source.cells if cell.cell_type == "code"]
    last = next(i for i, cell in enumerate(cells) if "TokenLab(" in cell)
    titles = ".mimdet-title"
    size = {"width": width, "height": 900}
    with page.page.context.browser.new_context(viewport=size) as context:
        browser = Page(context.new_page())
        browser.page.set_default_timeout(180_000)
        start = time.monotonic()
        first = Notebook(server, browser, f"first{width}", cells[: last + 1])
        first.run_all()
        screen = browser.page
        screen.wait_for_selector("canvas.mimdet-canvas[data-seq]")
        first.answer_to(lambda: first.slide("mimdet-token-ratio", "Home"))
        assert "kept 1 of 256 tokens" in first.status()
        screen.evaluate(BRUSH_DOWN)
        assert "brings tokens back" in screen.locator(titles).first.inner_text()
        first.answer_to(lambda: first.stroke(0, 0.4))
        assert time.monotonic() - start < 60, "seconds from opening to the first brush"
        assert "brought back" in first.status() and "truth: 5 objects" in screen.inner_text("body")
        boxes = screen.evaluate(BOXES)
        assert max(x + w for x, _, w, _ in boxes) <= width
        assert max(y + h for _, y, _, h in boxes) - min(y for _, y, _, _ in boxes) < 560
        assert first.find("mimdet-hint").is_hidden()
        browser.picture(f"first_{width}")
        assert browser.errors == []
        screen.evaluate("jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
        screen.wait_for_function("document.body.innerText.includes('no kernel answers')")
        screen.evaluate("jupyterapp.commands.execute('docmanager:save')")
        screen.reload()
        screen.wait_for_selector(".mimdet-hint")
        assert "Run All Above" in first.find("mimdet-hint").inner_text()
