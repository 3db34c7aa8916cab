"""What panels share, without a browser: redrawing, errors, uploads, large detectors."""

import io
import threading
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import ipywidgets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import mimdet
from mimdet.viz import Panel, PatchCanvas, to_pixels
from mimdet.viz.widgets.panel import ONE_TOKEN, ImagePanel, few_proposals

WIDGET = "application/vnd.jupyter.widget-view+json"


class Lamp(Panel):
    """A grey picture as bright as its slider; negative values are an error."""

    name, label = "lamp", "a lamp"

    def __init__(self) -> None:
        super().__init__()
        self.level = ipywidgets.IntSlider(100, -1, 255)
        self.other = ipywidgets.IntText(0)
        self.canvases = [PatchCanvas(size=(20, 20)), PatchCanvas(size=(30, 10))]
        self.drawn: list[tuple[int, bool, int]] = []
        self.open([self.level, self.other], self.canvases)

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
    assert torch.is_grad_enabled() and not any(enabled for _, enabled, _ in lamp.drawn)
    assert [level for level, _, _ in lamp.drawn] == [100, 7]  # not again for what draw moved
    assert lamp.status.value == "level 7" and [c.seq for c in lamp.canvases] == [2, 2]


def test_an_error_is_written_below_and_does_not_end_it(lamp: Lamp) -> None:
    lamp.level.value = -1
    assert "ValueError" in lamp.status.value and "Traceback" not in lamp.status.value
    assert "level &lt;b&gt; must not be negative" in lamp.status.value
    assert lamp.canvases[0].seq == 2  # the page is told, too
    assert lamp.canvases[0].picture == "" and lamp.label.startswith("ValueError: level <b>")
    lamp.level.value = 8
    assert lamp.status.value == "level 8" and lamp.canvases[0].picture and lamp.label == "a lamp"


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
    assert Lamp()._lock is lamp._lock  # two panels may look into one model


def test_rows_of_the_panel_and_what_a_saved_notebook_shows(lamp: Lamp) -> None:
    data, metadata = lamp._repr_mimebundle_()
    picture = np.asarray(Image.open(io.BytesIO(data["image/png"])))
    assert picture.shape == (20, 20 + 8 + 30, 3)
    assert (picture[5, 5] == 100).all()
    assert (picture[15, 40] == 255).all()  # below the lower one
    assert data["text/plain"] == "a lamp"
    assert metadata["image/png"]["alt"] == "a lamp"
    assert WIDGET in data
    controls, pictures, status = lamp.box.children
    assert list(controls.children) == [lamp.level, lamp.other]
    assert list(pictures.children) == lamp.canvases
    assert status is lamp.status
    assert "mimdet-lamp-level" in lamp.level._dom_classes


# ------------------------------------------------------------------------------- own pictures


def file(name: str, content: bytes) -> dict[str, Any]:
    """As a browser sends it."""
    kind = {"type": "image/png", "last_modified": datetime(2026, 1, 1)}
    return {"name": name, "size": len(content), "content": memoryview(content), **kind}


def png(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (1, 2, 3)).save(stream, "PNG")
    return stream.getvalue()


class Chosen(ImagePanel):
    """Shows the picture that is chosen."""

    def __init__(self, images: Sequence[Tensor] | None = None) -> None:
        super().__init__(images)
        self.canvases = [PatchCanvas()]
        self.open(self.inputs, self.canvases)

    def draw(self) -> str:
        self.canvases[0].show(to_pixels(self.chosen))
        return f"{self.chosen.shape[1]} rows"


@pytest.fixture
def panel() -> Chosen:
    return Chosen([torch.zeros(3, 4, 4, dtype=torch.uint8) + i for i in range(3)])


def test_choosing_a_picture(panel: Chosen) -> None:
    assert panel.chosen[0, 0, 0] == 0
    panel.image.value = 2
    assert panel.chosen[0, 0, 0] == 2
    assert [canvas.seq for canvas in panel.canvases] == [2] * len(panel.canvases)
    values = [value for _, value in panel.ratio.options]
    assert values == pytest.approx([ONE_TOKEN, *(0.05 * i for i in range(1, 21))])
    assert panel.ratio.continuous_update is False  # an answer may take longer than a step
    # Without images it has eight scenes; none are an error.
    panel = Chosen()
    assert len(panel.images) == len(panel.image.options) == 8
    assert panel.chosen.dtype == torch.uint8
    with pytest.raises(ValueError, match="give at least one"):
        Chosen([])


def test_an_uploaded_picture_is_chosen_with_a_single_change(panel: Chosen) -> None:
    panel.upload.value = (file("mine.png", png(6, 5)),)  # while the first is chosen
    panel.upload.value = (file("two.png", png(7, 8)),)
    assert panel.image.value == 4 and panel.image.label == "two.png"
    assert panel.chosen.shape == (3, 8, 7)
    assert panel.chosen[:, 0, 0].tolist() == [1, 2, 3]
    assert panel.status.value == "8 rows"
    assert panel.canvases[0].seq == 3  # one answer each
    panel.image.value = 2
    assert panel.chosen[0, 0, 0] == 2  # the others are where they were


def test_a_file_that_is_no_picture_changes_nothing_and_is_said(panel: Chosen) -> None:
    panel.image.value = 1
    panel.upload.value = (file("notes.txt", b"words"),)
    assert panel.image.value == 1
    assert len(panel.images) == 3
    assert "notes.txt" in panel.status.value
    panel.upload.value = (file("mine.png", png(6, 5)),)
    assert panel.status.value == "5 rows"


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
    assert remark == " · heads on the 100 best proposals, not 400"
    # A small one is left as it is.
    model = mimdet.build_detector(mimdet.presets.tiny())
    before = model.rpn.post_nms
    with few_proposals(model) as remark:
        assert model.rpn.post_nms == before and remark == ""
