"""Pictures as arrays: sizes, colours and places worked out by hand."""

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from mimdet.structures import Crops, Detections, Target
from mimdet.viz import draw
from mimdet.viz.draw import class_colour


def rgb(label: int) -> list[int]:
    return [int(class_colour(label)[i : i + 2], 16) for i in (1, 3, 5)]


def white(height: int, width: int) -> draw.Pixels:
    return np.full((height, width, 3), 255, np.uint8)


# ------------------------------------------------------------------------------- conversions


def test_images_become_rows_of_pixels() -> None:
    image = torch.arange(24, dtype=torch.uint8).reshape(3, 2, 4)
    picture = draw.to_pixels(image)
    assert picture.shape == (2, 4, 3)
    assert picture[1, 2].tolist() == [6, 14, 22]


def test_floats_are_rounded_and_clipped() -> None:
    image = torch.tensor([-0.5, 0.5, 7.0]).reshape(3, 1, 1)
    assert draw.to_pixels(image).tolist() == [[[0, 128, 255]]]


@pytest.mark.parametrize("channels", [3, 4])
def test_a_data_url_is_the_picture(channels: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    again = np.asarray(draw.from_data_url(draw.data_url(picture)))
    assert again.shape == (5, 7, 4)
    assert (again[..., :channels] == picture).all()
    assert channels == 4 or (again[..., 3] == 255).all()


def test_png_bytes_are_a_png() -> None:
    content = draw.png_bytes(Image.new("RGB", (3, 2), "red"))
    assert content.startswith(b"\x89PNG")


def test_enlarging_keeps_proportions_and_sharp_edges() -> None:
    checks = np.array([[0, 255, 0], [255, 0, 255]], np.uint8)[..., None].repeat(3, axis=2)
    sharp = draw.enlarged(checks, 30, smooth=False)
    assert sharp.shape == (20, 30, 3)
    assert set(sharp.flat) == {0, 255}
    assert (sharp[:10, 10:20] == 255).all()
    assert len(set(draw.enlarged(checks, 30).flat)) > 2


def test_a_very_flat_picture_keeps_a_row() -> None:
    assert draw.enlarged(white(1, 300), 20).shape == (1, 20, 3)


# ------------------------------------------------------------------------------- colours


def colour(position: float) -> list[int]:
    return [round(255 * c) for c in colormaps["viridis"](position)[:3]]


def test_heat_goes_from_the_smallest_to_the_largest_value() -> None:
    picture = draw.heat(torch.tensor([[2.0, 3.0, 4.0]]))
    assert picture.tolist() == [[colour(0.0), colour(0.5), colour(1.0)]]


def test_heat_with_given_ends_of_which_one_is_zero() -> None:
    """An end of 0 is an end, not a missing one."""
    values = torch.tensor([[-2.0, -1.0, 0.0, 5.0]])
    picture = draw.heat(values, low=-2.0, high=0.0)
    assert picture.tolist() == [[colour(0.0), colour(0.5), colour(1.0), colour(1.0)]]
    picture = draw.heat(torch.tensor([[-1.0, 0.0, 2.0, 4.0]]), low=0.0)
    assert picture.tolist() == [[colour(0.0), colour(0.0), colour(0.5), colour(1.0)]]


def test_unsampled_places_are_grey() -> None:
    picture = draw.heat(torch.tensor([[float("nan"), 1.0, 3.0]]))
    assert picture[0].tolist() == [list(draw.UNSAMPLED), colour(0.0), colour(1.0)]
    nothing = draw.heat(torch.full((2, 2), float("nan")))
    assert (nothing == draw.UNSAMPLED).all()


def test_equal_values_are_one_colour() -> None:
    assert len({tuple(p) for p in draw.heat(torch.full((2, 2), 7.0)).reshape(-1, 3)}) == 1


# ------------------------------------------------------------------------------- layout


def test_pictures_beside_each_other() -> None:
    row = draw.beside([white(4, 3) // 2, white(2, 5) // 3], gap=2)
    assert row.shape == (4, 10, 3)
    assert (row[:, :3] == 127).all()
    assert (row[:, 3:5] == 255).all()
    assert (row[:2, 5:] == 85).all()
    assert (row[2:, 5:] == 255).all()


def test_no_pictures_beside_each_other() -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        draw.beside([])


def test_a_caption_stands_above() -> None:
    picture = draw.captioned(np.zeros((10, 60, 3), np.uint8), "text", size=15)
    assert picture.shape == (32, 60, 3)
    assert (picture[22:] == 0).all()
    assert 0 < (picture[:22] < 128).mean() < 0.5


# ------------------------------------------------------------------------------- objects


def target() -> Target:
    """A box with the left half of it filled, in an image of 20 x 40 draw."""
    boxes = torch.tensor([[10.0, 4.0, 30.0, 16.0]])
    half = torch.zeros(1, 12, 20, dtype=torch.uint8)
    half[..., :10] = 1
    return Target(boxes, torch.tensor([2]), Crops(boxes, half))


@pytest.mark.parametrize("scale", [3, 10])
def test_a_box_is_drawn_in_the_pixels_of_the_picture(scale: int) -> None:
    picture = draw.with_objects(white(20 * scale, 40 * scale), target(), (20, 40))
    assert picture[10 * scale, 10 * scale].tolist() == rgb(2)
    assert picture[10 * scale, 30 * scale].tolist() == rgb(2)
    assert (picture[10 * scale, 35 * scale] == 255).all()


def test_a_mask_fills_its_part_of_the_box() -> None:
    picture = draw.with_objects(white(60, 120), target(), (20, 40))
    mixed = 0.6 * 255 + 0.4 * np.array(rgb(2))
    assert picture[45, 42] == pytest.approx(mixed, abs=1)
    assert (picture[45, 80] == 255).all()


def test_a_target_without_masks_has_boxes_only() -> None:
    plain = Target(target().boxes, target().labels)
    picture = draw.with_objects(white(60, 120), plain, (20, 40))
    assert (picture[45, 42] == 255).all()
    assert picture[30, 30].tolist() == rgb(2)


def test_weak_detections_are_left_out() -> None:
    found = Detections(
        torch.tensor([[1.0, 1, 9, 9], [21, 1, 29, 9]]),
        torch.tensor([0.9, 0.2]),
        torch.tensor([0, 1]),
        (20, 40),
    )
    picture = draw.with_objects(white(200, 400), found, (20, 40))
    assert (picture[:, 200:] == 255).all()
    both = draw.with_objects(white(200, 400), found, (20, 40), score_threshold=0.1)
    assert both[50, 210].tolist() == rgb(1)


def test_the_picture_that_was_given_is_not_changed() -> None:
    given = white(20, 40)
    draw.with_objects(given, target(), (20, 40))
    assert (given == 255).all()


def test_a_mask_outside_the_image_is_cut() -> None:
    boxes = torch.tensor([[-10.0, -10, 5, 5], [60, 60, 90, 90]])
    masks = Crops(boxes, torch.ones(2, 15, 15, dtype=torch.uint8))
    outside = Target(boxes, torch.tensor([0, 0]), masks)
    picture = draw.with_objects(white(200, 400), outside, (20, 40))
    assert (picture[100:, 200:] == 255).all()
    assert (picture[40, 10] != 255).any()
