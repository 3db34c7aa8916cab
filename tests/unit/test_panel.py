"""Panel and ImageChooser without a browser."""

import io
import threading
from datetime import datetime
from typing import Any

import ipywidgets
import numpy as np
import pytest
import torch
from PIL import Image

import mimdet
from mimdet.viz.widgets.canvas import PatchCanvas
from mimdet.viz.widgets.panel import ImageChooser, Panel, few_proposals, ratio_slider

WIDGET = "application/vnd.jupyter.widget-view+json"


class Lamp(Panel):
    """A grey picture as bright as its slider; negative values are an error."""

    label = "a lamp"

    def __init__(self) -> None:
        super().__init__()
        self.level = ipywidgets.IntSlider(100, -1, 255)
        self.other = ipywidgets.IntText(0)
        self.canvases = [PatchCanvas(size=(20, 20)), PatchCanvas(size=(30, 10))]
        self.drawn: list[tuple[int, bool, int]] = []
        self.arrange([self.level, self.other], self.canvases)
        self.watch(self.level, self.other)
        self.redraw()

    def draw(self) -> str:
        if self.level.value < 0:
            raise ValueError("level <b> must not be negative")
        self.other.value += 1  # moves a control that is watched
        self.drawn.append((self.level.value, torch.is_grad_enabled(), threading.get_ident()))
        for canvas in self.canvases:
            canvas.show(np.full((canvas.size[1], canvas.size[0], 3), self.level.value, np.uint8))
        return f"level {self.level.value}"


@pytest.fixture
def lamp() -> Lamp:
    return Lamp()


# ------------------------------------------------------------------------------- the panel


def test_a_control_is_answered_once(lamp: Lamp) -> None:
    lamp.level.value = 7
    assert [level for level, _, _ in lamp.drawn] == [100, 7]  # not again for what draw moved
    assert lamp.status.value == "level 7"
    assert [canvas.seq for canvas in lamp.canvases] == [2, 2]
    assert len(lamp.milliseconds) == 2
    assert all(took > 0 for took in lamp.milliseconds)


def test_it_draws_without_gradients(lamp: Lamp) -> None:
    assert torch.is_grad_enabled()
    assert not any(enabled for _, enabled, _ in lamp.drawn)


def test_an_error_is_written_below_and_does_not_end_it(lamp: Lamp) -> None:
    with pytest.raises(ValueError, match="negative"):
        lamp.level.value = -1
    assert "ValueError" in lamp.status.value
    assert "level &lt;b&gt; must not be negative" in lamp.status.value
    assert lamp.canvases[0].seq == 2  # the page is told, too
    lamp.level.value = 8
    assert lamp.status.value == "level 8"


def test_a_change_from_another_thread_waits_for_its_turn(lamp: Lamp) -> None:
    """JupyterLab's callbacks run beside a cell: a change in the meantime must not be lost."""
    inside, go_on = threading.Event(), threading.Event()
    draw = lamp.draw

    def slow() -> str:
        text = draw()
        if lamp.level.value == 50:
            inside.set()
            assert go_on.wait(10)
        return text

    lamp.draw = slow  # type: ignore[method-assign]
    cell = threading.Thread(target=lambda: setattr(lamp.level, "value", 50))
    cell.start()
    assert inside.wait(10)
    callback = threading.Thread(target=lambda: setattr(lamp.other, "value", 1000))
    callback.start()
    callback.join(0.2)
    assert callback.is_alive()  # it waits
    go_on.set()
    cell.join(10)
    callback.join(10)
    assert [level for level, _, _ in lamp.drawn] == [100, 50, 50]
    assert len({thread for _, _, thread in lamp.drawn}) == 3


def test_panels_take_turns(lamp: Lamp) -> None:
    """Two panels may look into one model."""
    assert Lamp()._lock is lamp._lock


def test_it_arranges_rows_and_ends_with_the_status(lamp: Lamp) -> None:
    controls, pictures, status = lamp.box.children
    assert list(controls.children) == [lamp.level, lamp.other]
    assert list(pictures.children) == lamp.canvases
    assert status is lamp.status


def test_a_saved_notebook_shows_the_canvases(lamp: Lamp) -> None:
    data, metadata = lamp._repr_mimebundle_()
    picture = np.asarray(Image.open(io.BytesIO(data["image/png"])))
    assert picture.shape == (20, 20 + 8 + 30, 3)
    assert (picture[5, 5] == 100).all()
    assert (picture[15, 40] == 255).all()  # below the lower one
    assert data["text/plain"] == "a lamp"
    assert metadata["image/png"]["alt"] == "a lamp"
    assert WIDGET in data


def test_a_panel_has_to_draw() -> None:
    with pytest.raises(NotImplementedError):
        Panel().redraw()


# ------------------------------------------------------------------------------- own pictures


def file(name: str, content: bytes) -> dict[str, Any]:
    """As a browser sends it."""
    kind = {"type": "image/png", "last_modified": datetime(2026, 1, 1)}
    return {"name": name, "size": len(content), "content": memoryview(content), **kind}


def png(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (1, 2, 3)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def chooser() -> ImageChooser:
    return ImageChooser([torch.zeros(3, 4, 4, dtype=torch.uint8) + i for i in range(3)])


def test_choosing_a_picture(chooser: ImageChooser) -> None:
    assert chooser.image[0, 0, 0] == 0
    chooser.choice.value = 2
    assert chooser.image[0, 0, 0] == 2
    assert chooser.widgets == [chooser.choice, chooser.upload]


def test_an_uploaded_picture_is_chosen_with_a_single_change(chooser: ImageChooser) -> None:
    chooser.choice.value = 1
    seen: list[int] = []
    chooser.choice.observe(lambda change: seen.append(change.new), "value")
    chooser.upload.value = (file("mine.png", png(6, 5)),)
    assert seen == [3]
    assert chooser.image.shape == (3, 5, 6)
    assert chooser.image[:, 0, 0].tolist() == [1, 2, 3]
    assert chooser.choice.label == "mine.png"
    chooser.choice.value = 2
    assert chooser.image[0, 0, 0] == 2  # the others are where they were


def test_an_upload_while_the_first_is_chosen(chooser: ImageChooser) -> None:
    chooser.upload.value = (file("one.png", png(6, 5)),)
    chooser.upload.value = (file("two.png", png(7, 5)),)
    assert chooser.image.shape == (3, 5, 7)
    assert chooser.choice.label == "two.png"


def test_a_file_that_is_no_picture_changes_nothing_and_is_said(chooser: ImageChooser) -> None:
    chooser.choice.value = 1
    chooser.upload.value = (file("notes.txt", b"words"),)
    assert chooser.choice.value == 1
    assert len(chooser.images) == 3
    assert chooser.upload.description == "not an image"
    assert "notes.txt" in chooser.upload.tooltip
    chooser.upload.value = (file("mine.png", png(6, 5)),)
    assert chooser.upload.description == "your own"


def test_without_images_it_has_eight_scenes() -> None:
    chooser = ImageChooser()
    assert len(chooser.images) == len(chooser.choice.options) == 8
    assert chooser.image.dtype == torch.uint8


def test_no_images_is_an_error() -> None:
    with pytest.raises(ValueError, match="give at least one"):
        ImageChooser([])


def test_ratios_go_from_a_twentieth_to_all() -> None:
    slider = ratio_slider(0.5)
    values = [value for _, value in slider.options]
    assert values == pytest.approx([0.05 * i for i in range(1, 21)])
    assert slider.value == 0.5
    assert slider.continuous_update is False  # an answer may take longer than a step


def test_a_large_detector_answers_with_few_proposals() -> None:
    """A thousand proposals become the hundred best; the model is itself again, also after an error.

    Random weights score nothing above a threshold, so the proposals themselves are counted.
    """
    cfg = mimdet.presets.tiny()
    cfg.detector.rpn_pre_nms = cfg.detector.rpn_post_nms = (10, 400)
    cfg.detector.rpn_nms = 1.0  # no proposal suppresses another
    model = mimdet.build_detector(cfg).eval()
    image = torch.randint(0, 255, (3, 128, 128), dtype=torch.uint8)
    counts = []
    model.roi_heads.box_head.register_forward_hook(
        lambda _, given, __: counts.append(len(given[0]))
    )
    mimdet.predict(model, image)
    with pytest.raises(RuntimeError), few_proposals(model) as remark:
        mimdet.predict(model, image)
        raise RuntimeError
    mimdet.predict(model, image)
    assert counts == [400, 100, 400]
    assert remark == "heads on the 100 best proposals, not 400"


def test_a_small_detector_is_left_as_it_is() -> None:
    model = mimdet.build_detector(mimdet.presets.tiny())
    before = model.rpn.post_nms
    with few_proposals(model) as remark:
        assert model.rpn.post_nms == before and remark == ""
    with few_proposals(None) as remark:
        assert remark == ""
