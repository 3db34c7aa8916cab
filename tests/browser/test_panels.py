"""Every panel in a real JupyterLab: each control is used once, and the picture changes.

The time from an event to the new picture is written to `build/browser/latency.json`
(tools/measure_times.py keeps it); screenshots lie beside it, to be looked at.

What hurt in a student's hands, and what sees that it does not come back:

    numbers that deny their sentences    tools/results.py and claims.py --check; notebooks' checks
    checks spoil panels, in any order    test_a_lesson, test_training_dashboard, test_panel (lists);
                                         tests/notebooks: panels are left as they were made
    the first screen is reading          test_the_first_screen: a brush in less than a minute
    answers stand open, Run All runs them    test_a_lesson
    words of detection                   the site's links to the glossary (tools/build_site.py)
    own photos                           test_photos_of_ones_own
    a failed check ends the lesson       test_a_lesson
    one token, strokes, truth, seeds     test_the_first_screen, test_seeds_are_not_typed
    narrow windows, wide rows            test_the_first_screen, test_panel
    dark theme                           test_dark_theme
    second Run All, kernel restarted     test_a_lesson, test_the_first_screen; slow: every notebook
    cells that test software, length     words and cells are counted in reviews, not here
    pictures of one's own folder         tests/notebooks/test_own_path.py
"""

import io
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree
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
        'viz.PyramidViewer({"trained": model, "half": mimdet.load_detector("tiny_half")})',
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
COLOURS = """() => {
  const canvas = document.querySelector("canvas.mimdet-canvas");
  return [0.05, 0.95].map((down) => [...canvas.getContext("2d")
    .getImageData(canvas.width / 2, down * canvas.height, 1, 1).data]);
}"""
SAYS_ERROR = "document.querySelector('.mimdet-status').innerText.includes('Error')"
CHART = """\
from IPython.display import display
display(viz.show_errors(mimdet.find_errors(scenes.ground_truth(), runs["at 1.0"])))
viz.TokenLab()"""
THEME = "(theme) => jupyterapp.commands.execute('apputils:change-theme', { theme })"
INK = """() => {
  const style = (name) => getComputedStyle(document.querySelector(name));
  const colours = [style(".mimdet-title").color, style(".jp-Notebook").backgroundColor];
  return colours.map((c) => c.match(/\\d+/g).slice(0, 3).reduce((sum, n) => sum + n / 3, 0));
}"""
BRUSH_DOWN = """() => {
  const canvas = document.querySelector("canvas.mimdet-canvas");
  const box = canvas.getBoundingClientRect();
  const place = { clientX: box.right - 0.1 * box.width, clientY: box.bottom - 0.1 * box.height };
  canvas.setPointerCapture = () => {};
  canvas.dispatchEvent(new PointerEvent("pointerdown", place));
}"""
LISTS = """() => [...document.querySelectorAll(".jp-OutputArea select")]
  .map((list) => list.selectedOptions[0]?.textContent ?? "")"""
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
    assert all(notebook.page.evaluate(LISTS)), "a list shows what is chosen"
    times = {}
    for control, act in actions.items():
        before, said = notebook.pictures(), notebook.status()
        times[control] = notebook.answer_to(lambda act=act: act(notebook))
        assert not re.match(r"\w*(Error|Exception)\b", notebook.status()), notebook.status()
        changed = notebook.pictures() != before
        changed |= control in CHOOSES and notebook.status() != said
        assert changed, f"{name}: {control} changes no picture"
    panel = notebook.page.locator(".jp-OutputArea-output:has(canvas)").last
    notebook.browser.picture(name, panel)
    for width in (900, 1400):
        notebook.page.set_viewport_size({"width": width, "height": 1100})
        notebook.page.wait_for_timeout(200)
        boxes = [box for box in notebook.page.evaluate(BOXES) if box[2]]  # of those to be seen
        assert max(x + w for x, _, w, _ in boxes) <= width, f"cut off at {width} pixels"
        notebook.browser.picture(f"{name}_{width}", panel)
    assert len(boxes) > 4 or len({round(y) for _, y, _, _ in boxes}) == 1, "side by side"
    median = statistics.median(times.values())
    print(f"\n{name}: {median:.0f} ms from event to picture, median of {len(times)}")
    file = PICTURES / "latency.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    kept[name] = {control: round(took, 1) for control, took in times.items()}
    file.write_text(json.dumps(kept, indent=2) + "\n")
    assert notebook.browser.errors == []


def jpeg(width: int, height: int, orientation: int = 1) -> bytes:
    """A picture whose left half is red, as a camera stores it that was held like this."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255
    image, stream = Image.fromarray(pixels), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(stream, "JPEG", exif=exif)
    return stream.getvalue()


def test_photos_of_ones_own(notebook: Notebook) -> None:
    """A phone's photo stands upright, a panorama can be used, a broken file is one line."""
    notebook.run_last("viz.TokenLab()")
    notebook.page.wait_for_selector("canvas.mimdet-canvas[data-seq]")

    def give(name: str, content: bytes) -> list[float]:
        notebook.answer_to(lambda: notebook.upload("mimdet-token-upload", name, content))
        return notebook.page.evaluate(BOXES)[0]

    _, _, width, height = give("phone.jpg", jpeg(4032, 3024, orientation=6))
    assert height == pytest.approx(width * 4 / 3, rel=0.1), "upright"
    red = notebook.page.evaluate(COLOURS)
    assert red[0][0] > 150 > 100 > red[1][0], "what was left is at the top"
    _, _, width, height = give("panorama.jpg", jpeg(3000, 300))
    assert min(width, height) >= 40, "high enough for a brush"
    notebook.browser.picture("panorama")
    before = notebook.pictures()
    notebook.upload("mimdet-token-upload", "broken.jpg", jpeg(400, 300)[:200])
    notebook.page.wait_for_function(SAYS_ERROR)
    assert "broken.jpg" in notebook.status() and "Traceback" not in notebook.status()
    assert len(notebook.status().splitlines()) == 1 and notebook.pictures() == before


def test_seeds_are_not_typed(notebook: Notebook) -> None:
    """Of `1e3` in a field a browser would take 13."""
    notebook.run_last("viz.TokenLab()")
    notebook.page.wait_for_selector("canvas.mimdet-canvas[data-seq]")
    seed = notebook.find("mimdet-token-seed")
    seed.locator(".widget-readout").click(force=True)
    notebook.page.keyboard.type("1e3")
    notebook.page.keyboard.press("Enter")
    seed.locator(".noUi-handle").focus()
    notebook.page.keyboard.press("Tab")
    notebook.page.keyboard.type("1e3")
    assert seed.locator(".widget-readout").inner_text() == "0"


def test_dark_theme(notebook: Notebook) -> None:
    """Titles can be read, and a chart is no white field."""
    notebook.run_last(RUNS + CHART)
    page = notebook.page
    page.wait_for_selector("canvas.mimdet-canvas[data-seq]")
    try:
        for dark, theme in enumerate(("JupyterLab Light", "JupyterLab Dark")):
            page.evaluate(THEME, theme)
            body = f"body[data-jp-theme-light={'false' if dark else 'true'}]"
            page.wait_for_selector(body, state="attached")
            page.wait_for_timeout(500)
            picture = notebook.browser.picture("dark" if dark else "light")
            chart = page.locator(".jp-RenderedImage img").last
            shot = np.asarray(Image.open(io.BytesIO(chart.screenshot())).convert("L"))
            assert (shot.mean() < 90) == bool(dark), f"a chart in {picture}"
            ink, paper = page.evaluate(INK)
            assert abs(ink - paper) > 100, "brightness of titles and of what they stand on"
    finally:
        page.evaluate(THEME, "JupyterLab Light")


def test_a_lesson(server: Server, page: Page) -> None:
    """A notebook as it is handed out: answers closed and not run, panels as a student should find
    them, also after a second Run All and a restart; a check that fails ends nothing."""
    source = notebooks.read_source(notebooks.FOLDER / "py" / "05_attention.py")
    tags = [notebooks.tags(cell) for cell in source.cells]
    closed = sum(bool({"solution", "judge", "install"} & {*each}) for each in tags)
    copytree(notebooks.FOLDER / "results", server.folder / "results", dirs_exist_ok=True)
    page.errors.clear()
    failing = "import mimdet\nmimdet.check('two is more', 1 > 2)\nprint('it goes on')"
    lesson = Notebook(server, page, "lesson", [*source.cells, failing])
    for again in range(3):
        if again == 2:
            lesson.restart()
        lesson.run_all()
        page.page.wait_for_selector("canvas.mimdet-canvas[data-seq]")
        assert page.page.locator(".jp-CodeCell .jp-InputPlaceholder").count() == closed
        text = page.page.inner_text(".jp-Notebook")
        assert text.count("A solution, not run") == sum("solution" in each for each in tags)
        assert "no answer yet" in text and "✗ two is more" in text and "it goes on" in text
        before, said = lesson.pictures(), lesson.status()
        lesson.answer_to(lambda: lesson.click_canvas(0, 0.8, 0.8))
        assert lesson.pictures() != before and lesson.status() != said, "the panel answers"
    page.picture("lesson")
    lesson.close()
    assert page.errors == []


def test_real_pictures(server: Server, page: Page, shared_data: Path, tmp_path: Path) -> None:
    """A class's own pictures, by one variable, stand beside the drawn ones of notebook 00."""
    annotations = (shared_data / "nuclei/annotations/instances_val.json").read_bytes()
    (tmp_path / "annotations.json").write_bytes(annotations)
    (tmp_path / "images").symlink_to(shared_data / "nuclei/val")
    ids = [str(entry["id"]) for entry in json.loads(annotations)["images"]]
    source = notebooks.read_source(notebooks.FOLDER / "py" / "00_quickstart.py")
    cells = [cell.source for cell in source.cells if cell.cell_type == "code"]
    last = next(i for i, cell in enumerate(cells) if "TokenLab(" in cell)
    page.errors.clear()
    named = f"%env MIMDET_PICTURES={tmp_path}"
    own = Notebook(server, page, "own", [named, *cells[: last + 1]])
    own.run_all()
    page.page.wait_for_selector("canvas.mimdet-canvas[data-seq]")
    menu = own.find("mimdet-token-image").locator("select")
    offered = menu.locator("option").all_inner_texts()
    assert offered[:4] == ids[:4][::-1]
    drawn = page.page.evaluate(COLOURS)
    own.answer_to(lambda: menu.select_option(offered[0]))
    assert page.page.evaluate(COLOURS) != drawn, "another picture"
    before = own.pictures()
    own.answer_to(lambda: own.stroke(0, 0.4))
    assert own.pictures() != before and "Error" not in own.status()
    page.picture("real_pictures")
    own.close()
    assert page.errors == []


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
    assert first.find(f"{name}-start").is_enabled() and first.find(f"{name}-stop").is_disabled()
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
