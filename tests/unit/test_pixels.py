"""Pictures as arrays: sizes, colours and places worked out by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colormaps
from PIL import Image

from mimdet.structures import Crops, Detections, Target, paste
from mimdet.viz import draw
from mimdet.viz.draw import class_colour


def rgb(label: int) -> list[int]:
    return [int(class_colour(label)[i : i + 2], 16) for i in (1, 3, 5)]


def white(height: int, width: int) -> draw.Pixels:
    return np.full((height, width, 3), 255, np.uint8)


@pytest.mark.parametrize("channels", [3, 4])
def test_a_data_url_is_the_picture(channels: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    again = np.asarray(draw.from_data_url(draw.data_url(picture)))
    assert again.shape == (5, 7, 4)
    assert (again[..., :channels] == picture).all()
    assert channels == 4 or (again[..., 3] == 255).all()


# ------------------------------------------------------------------------------- colours


def colour(position: float) -> list[int]:
    return [round(255 * c) for c in colormaps["viridis"](position)[:3]]


@pytest.mark.parametrize(
    ("values", "ends", "expected"),
    [
        ([2.0, 3.0, 4.0], {}, [0.0, 0.5, 1.0]),
        ([-2.0, -1.0, 0.0, 5.0], {"low": -2.0, "high": 0.0}, [0.0, 0.5, 1.0, 1.0]),
        ([-1.0, 0.0, 2.0, 4.0], {"low": 0.0}, [0.0, 0.0, 0.5, 1.0]),  # an end of 0 is an end
        ([7.0, 7.0], {}, [0.0, 0.0]),
        ([math.nan, 1.0, 3.0], {}, [None, 0.0, 1.0]),  # an unsampled place
        ([math.nan, math.nan], {}, [None, None]),
    ],
)
def test_heat(values: list[float], ends: dict[str, float], expected: list[float | None]) -> None:
    picture = draw.heat(torch.tensor([values]), **ends)
    colours = [list(draw.UNSAMPLED) if place is None else colour(place) for place in expected]
    assert picture.tolist() == [colours]


# ------------------------------------------------------------------------------- names


@given(st.lists(st.tuples(*[st.floats(-20, 120)] * 4), max_size=30), st.floats(1, 60))
def test_names_never_overlap_nor_leave_the_image(boxes, width) -> None:
    places = draw.place_names(boxes, [(width, 8.0)] * len(boxes), 100, 80)
    placed = [p for p in places if p is not None]
    for i, (x0, y0, x1, y1) in enumerate(placed):
        assert x0 >= 0 and y0 >= 0 and x1 <= 100 + 1e-9 and y1 <= 80
        for other in placed[:i]:
            assert x1 <= other[0] or other[2] <= x0 or y1 <= other[1] or other[3] <= y0


# ------------------------------------------------------------------------------- objects


def target() -> Target:
    """A box with the left half of it filled, in an image of 20 x 40 pixels."""
    boxes = torch.tensor([[10.0, 4.0, 30.0, 16.0]])
    half = torch.zeros(1, 12, 20, dtype=torch.uint8)
    half[..., :10] = 1
    return Target(boxes, torch.tensor([2]), Crops(boxes, half))


def detections(*scores: float) -> Detections:
    """Boxes side by side, of classes 0, 1, ..., in an image of 20 x 40 pixels."""
    boxes = torch.tensor([[1.0 + 20 * i, 1, 9 + 20 * i, 9] for i in range(len(scores))])
    return Detections(boxes, torch.tensor(scores), torch.arange(len(scores)), (20, 40))


def painted(objects: Target | Detections, scale: int = 3, **options: Any) -> draw.Pixels:
    marks = draw.marks_of(objects, **options)
    return draw.with_marks(white(20 * scale, 40 * scale), marks, (20, 40))


@pytest.mark.parametrize("scale", [3, 10])
def test_a_box_is_drawn_in_the_pixels_of_the_picture(scale: int) -> None:
    picture = painted(target(), scale)
    assert picture[10 * scale, 10 * scale].tolist() == rgb(2)
    assert picture[10 * scale, 30 * scale].tolist() == rgb(2)
    assert (picture[10 * scale, 35 * scale] == 255).all()


def test_a_mask_fills_its_part_of_the_box() -> None:
    mixed = 0.6 * 255 + 0.4 * np.array(rgb(2))
    picture = painted(target())
    assert picture[45, 42] == pytest.approx(mixed, abs=1)
    assert picture[30, 59].tolist() == rgb(2)  # its outline
    assert (picture[45, 80] == 255).all()
    plain = painted(Target(target().boxes, target().labels))
    assert (plain[45, 42] == 255).all() and plain[30, 30].tolist() == rgb(2)
    # A figure draws the same marks at twice the resolution of the screen.
    marks = draw.marks_of(target(), ["a", "b", "c"])
    fig = draw.show_rows("what", [draw.Picture("title", white(20, 40), marks)])
    (ax,) = fig.axes
    picture = np.asarray(ax.images[0].get_array())
    assert picture.shape[1] == pytest.approx(2 * ax.bbox.width, abs=1)
    scale = picture.shape[1] / 40
    assert picture[round(10 * scale), round(10 * scale)].tolist() == rgb(2)
    assert (picture[0, 0] == 255).all()
    assert fig.alt_text == "what: title."


@pytest.mark.parametrize("size", [(40, 100), (1, 1), (3, 900)])
def test_a_mask_is_painted_where_paste_puts_it(size: tuple[int, int]) -> None:
    """At any image size, cut off at the image; nothing of a mask outside or without area."""
    height, width = size
    scale = 640 / max(size)
    shape = (math.ceil(height * scale), math.ceil(width * scale))
    boxes = torch.tensor(
        [
            [0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height],
            [-0.5 * width, 0.5 * height, 0.5 * width, 1.5 * height],
            [2.0 * width, 0, 3.0 * width, height],  # outside
            [0.5 * width, 0, 0.5 * width, height],  # no area
        ]
    )
    for box in boxes:
        crops = Crops(box[None], torch.ones(1, 28, 28))
        layer = Image.new("RGBA", shape[::-1])
        nowhere = (-99, -99, -98, -98)
        draw.draw_marks(layer, [draw.Mark(nowhere, "red", mask=crops)], scale)
        expected = paste(crops.bitmaps, crops.boxes * scale, *shape)[0].numpy()
        assert ((np.asarray(layer)[..., 3] > 0) == expected).all()


def test_weak_detections_are_left_out_and_the_best_is_on_top() -> None:
    assert (painted(detections(0.9, 0.2), 10, score_threshold=0.3)[:, 200:] == 255).all()
    assert painted(detections(0.9, 0.2), 10, score_threshold=0.1)[50, 210].tolist() == rgb(1)
    same = detections(0.4, 0.9)
    same.boxes[0] = same.boxes[1]
    assert [mark.name for mark in draw.marks_of(same, ["cat", "dog"])] == ["dog .90", "cat .40"]
    assert painted(same, 10)[50, 210].tolist() == rgb(1)


def test_weak_marks_are_thin_and_nameless_and_missed_ones_dashed() -> None:
    grey = np.full((60, 120, 3), 128, np.uint8)
    box, colour = (20.0, 30.0, 100.0, 50.0), class_colour(2)

    def coloured(**options: Any) -> int:
        mark = draw.Mark(box, colour, "cat", **options)
        return int((draw.with_marks(grey, [mark], (60, 120)) == rgb(2)).all(-1).sum())

    assert coloured(strong=False) == 2 * 81 + 2 * 19  # one pixel wide, nothing else
    assert coloured() > 2 * coloured(strong=False) > 2 * coloured(strong=False, dashed=True) > 150
    assert (grey == 128).all()  # the picture given is as it was
