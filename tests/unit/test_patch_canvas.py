"""PatchCanvas without a browser: what it sends, and the picture of a saved notebook."""

import io

import numpy as np
import pytest
from PIL import Image

from mimdet.viz import PatchCanvas
from mimdet.viz.draw import from_data_url
from mimdet.viz.widgets.canvas import HERE

BLUE = np.full((8, 12, 3), (0, 0, 255), np.uint8)


@pytest.fixture
def canvas() -> PatchCanvas:
    canvas = PatchCanvas(rows=2, columns=3, label="a blue picture")
    canvas.show(BLUE, width=60)
    return canvas


def shown(canvas: PatchCanvas, x: int, y: int) -> tuple[int, ...]:
    colour = canvas.snapshot().getpixel((x, y))
    assert isinstance(colour, tuple)
    return colour


def test_the_height_follows_from_the_picture_and_both_are_one_message(canvas, monkeypatch) -> None:
    assert canvas.size == (60, 40)
    canvas.show(BLUE)
    assert canvas.size == (12, 8)
    assert (np.asarray(from_data_url(canvas.picture))[..., :3] == BLUE).all()
    sent: list[set[str]] = []
    monkeypatch.setattr(canvas, "send_state", lambda key=None: sent.append(set(key)))
    canvas.show(BLUE // 2, width=30)
    assert sent == [{"size", "picture"}]


def test_everything_the_page_reads_is_sent_and_the_other_way(canvas: PatchCanvas) -> None:
    """A trait that is not synchronised would be undefined in the page, silently."""
    source = (HERE / "patch_canvas.js").read_text()
    names = "picture rows columns size selected dropped tool show_grid title label seq"
    for name in names.split():
        assert name in source
        assert canvas.traits()[name].metadata.get("sync"), name


# ------------------------------------------------------------------------------- the snapshot


def test_snapshot_shows_picture_title_tokens_and_grid(canvas: PatchCanvas) -> None:
    assert shown(PatchCanvas(size=(20, 10)), 5, 5) == (255, 255, 255)  # nothing was shown yet
    assert canvas.snapshot().size == (60, 40)
    assert shown(canvas, 30, 20) == (0, 0, 255)
    canvas.dropped, canvas.selected = [5], 1
    assert min(shown(canvas, 50, 30)) > 190  # the last token: row 1, column 2
    assert shown(canvas, 20, 10) == (0xD5, 0x5E, 0x00)  # left edge of column 1
    assert shown(canvas, 30, 10) == (0, 0, 255)
    canvas.show_grid = True
    assert min(shown(canvas, 20, 30)) > 50 and shown(canvas, 10, 10) == (0, 0, 255)
    canvas.show(BLUE, width=60, title="blue")
    assert canvas.snapshot().size == (60, 60) and canvas.label == "blue"
    assert shown(canvas, 10, 0) == (255, 255, 255) and shown(canvas, 10, 59) != (255, 255, 255)


def test_a_saved_notebook_has_picture_and_words(canvas: PatchCanvas) -> None:
    data, metadata = canvas._repr_mimebundle_()
    assert Image.open(io.BytesIO(data["image/png"])).size == (60, 40)
    assert data["text/plain"] == "a blue picture"
    assert metadata["image/png"] == {"alt": "a blue picture"}
    assert "application/vnd.jupyter.widget-view+json" in data
