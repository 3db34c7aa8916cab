"""The playground in a real browser: what Python says, at once, and from its folder alone."""

import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import mimdet
from mimdet.analysis.reliance import altered
from mimdet.images import read_image
from mimdet.models.detector import Detector
from mimdet.models.rcnn import pad_and_normalise
from mimdet.models.sampling import Sample
from mimdet.playground import run_page, runtime_files, write_page
from tests.browser.chromium import Page, open_page, skip_without_browser

skip_without_browser()
pytest.importorskip("onnxscript", reason="onnxscript is not installed: .[export]")
SETTLED = "window.playground && playground.settled()"
BRUSH_SECONDS = 0.3
"""Of one core, from a stroke to the detections and the painting it leads to."""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def model() -> Detector:
    return mimdet.load_detector("tiny")


@pytest.fixture(scope="module")
def folder(model: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        runtime_files()
    except ValueError as error:  # no npm, or no registry
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("playground") / "page"
    write_page(folder, {"tiny": model}, mimdet.load_mae_model("tiny_mae"), scenes=9)
    content = json.loads((folder / "models.json").read_text())
    content["detectors"].append(content["detectors"][0] | {"name": "another"})
    (folder / "models.json").write_text(json.dumps(content))  # as a second model is added
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Page]:
    with open_page(1280, 800) as page:
        page.requests = []  # type: ignore[attr-defined]
        page.page.on("request", lambda request: page.requests.append(request.url))
        page.page.goto(address)
        page.page.wait_for_function(SETTLED)
        yield page
        assert page.errors == []


@contextmanager
def another(page: Page, width: int, height: int) -> Iterator[Page]:
    """A page of the same browser, of another size."""
    context = page.page.context.browser.new_context(viewport={"width": width, "height": height})
    context.set_default_timeout(180_000)
    yield Page(context.new_page())
    context.close()


def settle(page: Page) -> None:
    page.page.wait_for_function(SETTLED)


def stroke(page: Page, *places: tuple[float, float]) -> None:
    """The mouse, pressed, from place to place of the tokens: shares of their width and height."""
    area = page.page.locator("#tokens").bounding_box()
    for i, (x, y) in enumerate(places):
        page.page.mouse.move(area["x"] + x * area["width"], area["y"] + y * area["height"])
        if i == 0:
            page.page.mouse.down()
    page.page.mouse.up()


def start_anew(page: Page, scene: int = 0) -> None:
    page.page.click("#all")
    page.page.locator(f"input[name=scene][value='{scene}']").check(force=True)
    page.page.locator("input[name=tool][value=hide]").check(force=True)
    page.page.wait_for_function(f"playground.state.scene === {scene}")
    settle(page)


def found_on(page: Page) -> list[dict[str, Any]]:
    code = "playground.state.found.map(({label, score, box}) => ({label, score, box}))"
    return page.page.evaluate(code)


def assert_same(page: Page, model: Detector, folder: Path, mean_c4: bool = False) -> None:
    """The page and Python agree about the scene and the tokens that are on it."""
    scene, tokens = page.page.evaluate("[playground.state.scene, playground.tokens()]")
    pixels = read_image(folder / f"scene{scene:02}.png")
    sample = Sample([torch.tensor(tokens)], (16, 16))
    if mean_c4:
        with altered(model, "c4", "mean"):
            ours = mimdet.predict(model, pixels, sample=sample)
    else:
        ours = mimdet.predict(model, pixels, sample=sample)
    theirs = found_on(page)
    assert [one["label"] for one in theirs] == ours.labels.tolist()
    assert len(theirs) > 3
    np.testing.assert_allclose([one["score"] for one in theirs], ours.scores, atol=1e-4)
    np.testing.assert_allclose([one["box"] for one in theirs], ours.boxes, atol=0.01)


def test_it_loads_from_its_folder_alone_and_not_too_much(
    page: Page, folder: Path, address: str
) -> None:
    asked = {url for url in page.requests if not url.startswith(("data:", "blob:"))}  # type: ignore[attr-defined]
    assert asked and all(url.startswith(address) for url in asked)
    sizes = {url: (folder / (url.removeprefix(address) or "index.html")).stat() for url in asked}
    assert sum(size.st_size for size in sizes.values()) <= 16e6
    models = [size.st_size for url, size in sizes.items() if url.endswith(".onnx")]
    assert len(models) == 2 and sum(models) <= 7e6
    assert page.page.inner_text("[data-number=pictures]") == "9"
    page.picture("playground_desktop")


def test_a_stroke_hides_tokens_and_python_agrees(page: Page, model: Detector, folder: Path) -> None:
    start_anew(page)
    assert_same(page, model, folder)
    stroke(page, (0.1, 0.1), (0.3, 0.1), (0.5, 0.2))
    settle(page)
    tokens = page.page.evaluate("playground.tokens()")
    assert 256 - 9 * 8 < len(tokens) < 256 - 9
    assert 17 not in tokens and 255 in tokens  # row 1, column 1 lies under the brush
    assert_same(page, model, folder)
    painter = mimdet.load_mae_model("tiny_mae")
    batch = pad_and_normalise([read_image(folder / "scene00.png")], painter).tensors
    with torch.no_grad():
        sample = Sample([torch.tensor(tokens)], (16, 16))
        painted = painter.reconstruct(batch, painter(batch, sample=sample)).painted
    theirs = page.page.evaluate("Array.from(playground.state.painted)")
    np.testing.assert_allclose(theirs, painted.flatten(), atol=1e-3)


def test_few_tokens_without_the_transformer_and_from_another_model(
    page: Page, model: Detector, folder: Path
) -> None:
    start_anew(page, 2)
    page.page.locator("#sampler").select_option("block")
    page.page.fill("#ratio", "25")
    settle(page)
    tokens = page.page.evaluate("playground.tokens()")
    assert len(tokens) == 64 and {t for t in tokens if (t // 16) // 4 == (t % 16) // 4 == 0} in (
        set(),
        {row * 16 + column for row in range(4) for column in range(4)},
    )
    assert_same(page, model, folder)
    page.page.check("#without")
    settle(page)
    assert_same(page, model, folder, mean_c4=True)
    page.page.uncheck("#without")
    page.page.select_option("#detector", label="another")
    page.page.wait_for_function("playground.state.detector === 1")
    settle(page)
    assert_same(page, model, folder)
    page.page.locator("#sampler").select_option("random")


def test_attention_is_that_of_the_patch(page: Page, model: Detector, folder: Path) -> None:
    start_anew(page, 1)
    page.page.locator("input[name=tool][value=look]").check(force=True)
    stroke(page, (0.53, 0.28))  # row 4, column 8
    page.page.wait_for_function(
        "document.getElementById('looks').textContent.includes('row 5, column 9')"
    )
    captions = page.page.locator("#blocks figcaption").all_inner_texts()
    from mimdet.models.exported import ExportedDetector

    with torch.no_grad():
        exported = ExportedDetector(model, inside=True)
        pixels = read_image(folder / "scene01.png")
        attention = run_page(exported, pixels, torch.arange(256))[-1].mean(1)[:, 4 * 16 + 8]
    rows, columns = torch.arange(256) // 16 - 4, torch.arange(256) % 16 - 8
    away = (attention * torch.hypot(rows.float(), columns.float())).sum(1).tolist()
    assert captions == [f"Block {i + 1}: {d:.1f} patches away" for i, d in enumerate(away)]


@pytest.mark.slow  # alone: beside another test on the same core it takes up to two thirds longer
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads Linux's /proc")
def test_a_stroke_is_answered_at_once(page: Page) -> None:
    """CPU seconds of the two threads one waits for, the page's and its worker's. The first strokes
    compile."""
    start_anew(page)

    def spent() -> float:
        total = 0.0
        for process in psutil.Process().children(recursive=True):
            if "--type=renderer" in process.cmdline():
                for thread in process.threads():
                    name = Path(f"/proc/{process.pid}/task/{thread.id}/comm").read_text().strip()
                    if thread.id == process.pid or name.startswith("DedicatedWorker"):
                        total += thread.user_time + thread.system_time
        return total

    seconds = []
    for x in (0.2, 0.4, 0.6, 0.8, 0.3, 0.5, 0.7):
        before = spent()
        stroke(page, (x, 0.5))
        settle(page)
        seconds.append(spent() - before)
    print(f"CPU seconds of a stroke: {seconds}; {page.page.inner_text('#status')}")
    assert sorted(seconds[2:])[2] <= BRUSH_SECONDS


@pytest.mark.parametrize(
    ("width", "height", "shown"),
    [(640, 480, (320, 256)), (37, 900, (256, 384)), (256, 256, (256, 256))],
)
def test_a_photo_of_any_size(
    page: Page, tmp_path: Path, width: int, height: int, shown: tuple[int, int]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    page.page.set_input_files("#photo", tmp_path / "photo.png")
    page.page.wait_for_function("playground.state.scene === 'photo'")
    size = "[playground.state.picture.width, playground.state.picture.height]"
    page.page.wait_for_function(f"({size}).join() === '{shown[0]},{shown[1]}'")
    settle(page)
    assert "tokens" in page.page.inner_text("#status")


def test_what_is_no_photo_is_said(page: Page, tmp_path: Path) -> None:
    (tmp_path / "letter.png").write_text("no picture")
    page.page.set_input_files("#photo", tmp_path / "letter.png")
    page.page.wait_for_function(
        "document.getElementById('status').textContent.includes('letter.png')"
    )


def test_the_keyboard_alone(page: Page) -> None:
    """From the top: a scene, tokens, the ratio and an answer are reached by Tab and changed."""
    start_anew(page)
    keys, focused = page.page.keyboard, "document.activeElement.id || document.activeElement.name"
    page.page.evaluate("document.activeElement.blur()")
    page.page.mouse.click(2, 2)
    seen: list[str] = []
    for _ in range(40):
        keys.press("Tab")
        seen.append(page.page.evaluate(focused))
        if seen[-1] == "scene":
            keys.press("ArrowRight")
            page.page.wait_for_function("playground.state.scene === 1")
            settle(page)
        if seen[-1] == "tokens":
            for key in ("ArrowDown", "ArrowRight", "Space", "Shift+ArrowRight", "Enter"):
                keys.press(key)
            settle(page)
            tokens = page.page.evaluate("playground.tokens()")
            assert 17 not in tokens and 18 not in tokens and 0 <= len(tokens) < 256
            label = page.page.get_attribute("#tokens", "aria-label")
            assert "Row 2, column 3: hidden." in label
        if seen[-1] == "ratio":
            keys.press("Home")
            settle(page)
            assert len(page.page.evaluate("playground.tokens()")) == 1
        if page.page.evaluate("document.activeElement.tagName") == "SUMMARY":
            keys.press("Enter")
            break
    assert {"scene", "photo", "tokens", "tool", "ratio", "sampler", "without", "score"} <= set(seen)
    assert page.page.locator("details[open]").count() == 1
    for canvas in page.page.locator("canvas").all():
        assert canvas.get_attribute("aria-label")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(page: Page, address: str, scheme: str) -> None:
    with another(page, 390, 844) as phone:
        phone.page.emulate_media(color_scheme=scheme)
        phone.page.goto(address)
        settle(phone)
        assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390
        ground = phone.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(int(part) for part in ground[4:-1].split(",")) < 200) == (scheme == "dark")
        phone.page.get_by_role("button", name="Set 25 %").click()
        phone.page.wait_for_function("playground.tokens().length === 64")
        settle(phone)
        phone.picture(f"playground_phone_{scheme}")
        assert phone.errors == []


def test_every_experiment_sets_the_page(page: Page) -> None:
    page.page.set_viewport_size({"width": 1280, "height": 800})
    for i, button in enumerate(page.page.locator("[data-set]").all()):
        wanted = json.loads(button.get_attribute("data-set") or "")
        button.click()
        page.page.wait_for_function(
            "([ratio, without]) => playground.state.ratio === ratio &&"
            " document.getElementById('without').checked === without",
            arg=[wanted["ratio"], wanted.get("without", False)],
        )
        page.page.wait_for_timeout(200)  # the picture is read from its file first
        settle(page)
        page.picture(f"playground_experiment_{i}")


def test_what_is_missing_is_said(page: Page, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "page")
    (tmp_path / "page/autoencoder.onnx").unlink()
    handler = partial(Quiet, directory=tmp_path / "page")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with another(page, 1280, 800) as broken:
            broken.page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
            said = "autoencoder.onnx: 404"
            broken.page.wait_for_function(
                f"document.getElementById('status').textContent.includes('{said}')"
            )
        server.shutdown()
