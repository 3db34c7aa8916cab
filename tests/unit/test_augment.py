"""Augmentation: sizes as detectron2 computes them; boxes and masks stay on their pixels."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimdet.config import DataConfig
from mimdet.data.augment import (
    Geometry,
    apply,
    augmented,
    colours_of,
    draw_geometry,
    rng_for,
)
from mimdet.images import resize_image, shortest_edge
from mimdet.structures import Crops, Record, Target, crops_to_bitmaps


def record_of(height: int, width: int, *rectangles: tuple[int, int, int, int]) -> Record:
    """Black image with white rectangles (x1, y1, x2, y2); masks are rings of zeros around ones."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    boxes = torch.tensor(rectangles, dtype=torch.float32).reshape(-1, 4)
    for x1, y1, x2, y2 in rectangles:
        image[:, y1:y2, x1:x2] = 255
    bitmaps = torch.zeros(len(boxes), 112, 112, dtype=torch.uint8)
    bitmaps[:, 1:-1, 1:-1] = 1
    cell = (boxes[:, 2:] - boxes[:, :2]) / 110
    crops = Crops(torch.cat([boxes[:, :2] - cell, boxes[:, 2:] + cell], 1), bitmaps)
    return Record(image, Target(boxes, torch.arange(len(boxes)), crops), 7)


def notched(record: Record) -> Record:
    """Cut the upper left quarter out of the only object: no flip leaves it as it is."""
    x1, y1, x2, y2 = record.target.boxes[0].int().tolist()
    record.image[:, y1 : (y1 + y2) // 2, x1 : (x1 + x2) // 2] = 0
    columns = (x1 + (x2 - x1) * (torch.arange(110) + 0.5) / 110).long()
    rows = (y1 + (y2 - y1) * (torch.arange(110) + 0.5) / 110).long()
    record.target.masks.bitmaps[0, 1:-1, 1:-1] = record.image[0][rows][:, columns] > 127
    return record


def test_sizes_by_hand_and_resizing_keeps_flat_colours():
    assert shortest_edge(480, 640, 800, 1333) == (800, 1067)  # 640 * 800 / 480 = 1066.67
    assert shortest_edge(640, 427, 800, 1333) == (1199, 800)  # 640 * 800 / 427 = 1199.06
    assert shortest_edge(300, 900, 800, 1333) == (444, 1333)  # limited by the long side
    assert shortest_edge(100, 100, 33, 1333) == (33, 33)
    assert shortest_edge(1, 5000, 800, 1333) == (1, 1333)  # never 0
    picture = torch.randint(0, 256, (3, 30, 40), dtype=torch.uint8)
    assert resize_image(picture, (30, 40)) is picture
    flat = resize_image(torch.full((3, 31, 41), 77, dtype=torch.uint8), (17, 90))
    assert flat.shape == (3, 17, 90) and (flat == 77).all()


def test_test_transform_draws_nothing_and_random_streams_do_not_collide():
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    geometry = draw_geometry(DataConfig(), 480, 640, rng, train=False)
    assert geometry == Geometry((0, 0, 640, 480), (800, 1067))
    assert rng.bit_generator.state == before
    assert geometry == draw_geometry(DataConfig(augment="none"), 480, 640, rng, train=True)
    with pytest.raises(ValueError, match=r"'rotate'.*lsj"):
        draw_geometry(DataConfig(augment="rotate"), 9, 9, rng, train=True)
    streams = [("geometry", 1, 2, 0), ("geometry", 1, 2), ("order", 1, 2), ("geometry", 2, 1, 0)]
    draws = [rng_for(*stream).integers(2**60) for stream in streams]
    assert draws[0] == rng_for("geometry", 1, 2, 0).integers(2**60)
    assert draws[1] != draws[2] and draws[0] != draws[3]


def test_training_on_tiles_is_a_crop_of_stored_pixels():
    """As docs/guides/own_data.md says it: windows of 256 pixels everywhere, shown at 512."""
    sides = {"crop_short_sides": (1920,), "crop_sides": (256, 256), "short_sides": (512,)}
    cfg = DataConfig(augment="paper", crop_probability=1.0, max_side=1024, **sides)
    drawn = [draw_geometry(cfg, 1920, 2560, rng_for("geometry", 0, i), True) for i in range(300)]
    assert {(g.crop[2] - g.crop[0], g.crop[3] - g.crop[1]) for g in drawn} == {(256, 256)}
    assert {g.size for g in drawn} == {(512, 512)}
    assert min(g.crop[0] for g in drawn) < 100 and max(g.crop[2] for g in drawn) > 2460


def test_paper_recipe_has_the_stated_distribution():
    cfg = DataConfig()
    drawn = [draw_geometry(cfg, 480, 640, rng_for("geometry", 0, i), True) for i in range(2000)]
    cropped = [g for g in drawn if g.crop != (0, 0, 640, 480)]
    whole = [g for g in drawn if g.crop == (0, 0, 640, 480)]
    assert 0.46 < len(cropped) / len(drawn) < 0.54
    assert 0.46 < sum(g.flip_h for g in drawn) / len(drawn) < 0.54
    assert not any(g.flip_v or g.transpose or g.canvas for g in drawn)
    assert {min(g.size) for g in whole} == set(cfg.short_sides)
    assert max(max(g.size) for g in drawn) <= 1333
    # A crop of 384..600 pixels out of an image resized to a short side of 400, 500 or 600:
    shares = [(g.crop[3] - g.crop[1]) / 480 for g in cropped]
    assert min(shares) >= 384 / 600 - 0.01 and max(shares) == 1.0
    assert all(g.crop[0] >= 0 and g.crop[2] <= 640 and g.crop[3] <= 480 for g in cropped)
    # The size follows from the crop's size in resized pixels, so the aspect ratio is kept:
    for g in cropped:
        aspect = (g.crop[2] - g.crop[0]) / (g.crop[3] - g.crop[1])
        assert abs(g.size[1] / g.size[0] / aspect - 1) < 0.01


def test_flips_reach_the_symmetries_they_name():
    def seen(flips):
        cfg = DataConfig(augment="multiscale", flips=flips)
        drawn = (draw_geometry(cfg, 64, 64, rng_for("geometry", 0, i), True) for i in range(200))
        return len({(g.transpose, g.flip_h, g.flip_v) for g in drawn})

    assert [seen("horizontal"), seen("both"), seen("dihedral")] == [2, 4, 8]


def test_lsj_makes_squares_between_the_scales():
    cfg = DataConfig(augment="lsj", lsj_size=256)
    drawn = [draw_geometry(cfg, 240, 320, rng_for("geometry", 0, i), True) for i in range(300)]
    assert {g.output_size for g in drawn} == {(256, 256)}
    shrunk = [g.size[1] for g in drawn if g.crop == (0, 0, 320, 240)]
    assert 25 <= min(shrunk) < 40  # 0.1 x 256 wide at least
    enlarged = [(g.crop[2] - g.crop[0]) / 320 for g in drawn if g.size == (256, 256)]
    assert enlarged and min(enlarged) < 0.55  # at scale 2 half of the width fits

    small = next(g for g in drawn if g.size[1] < 128)
    image, target = apply(small, record_of(240, 320, (0, 0, 320, 240)))
    height, width = small.size
    assert (image[:, :height, :width] == 255).all()
    assert (image[:, height:] == 128).all() and (image[:, :, width:] == 128).all()
    assert target.boxes.tolist() == [[0, 0, width, height]]


@pytest.mark.parametrize(
    ("geometry", "box"),
    [  # an image of 8 x 6 pixels (W x H), a box at (1, 2)-(3, 5)
        (Geometry((0, 0, 8, 6), (6, 8)), [1, 2, 3, 5]),
        (Geometry((0, 0, 8, 6), (12, 16)), [2, 4, 6, 10]),
        (Geometry((0, 0, 8, 6), (6, 8), flip_h=True), [5, 2, 7, 5]),
        (Geometry((0, 0, 8, 6), (6, 8), flip_v=True), [1, 1, 3, 4]),
        (Geometry((0, 0, 8, 6), (6, 8), transpose=True), [2, 1, 5, 3]),
        (Geometry((0, 0, 8, 6), (6, 8), transpose=True, flip_h=True), [1, 1, 4, 3]),
        (Geometry((2, 1, 6, 5), (4, 4)), [0, 1, 1, 4]),
        (Geometry((2, 1, 6, 5), (8, 4)), [0, 2, 1, 8]),
    ],
)
def test_boxes_by_hand(geometry, box):
    image, target = apply(geometry, record_of(6, 8, (1, 2, 3, 5)))
    assert target.boxes.tolist() == [box]
    x1, y1, x2, y2 = box
    expected = torch.zeros(geometry.output_size, dtype=torch.bool)
    expected[y1:y2, x1:x2] = True
    if geometry.size == (6, 8):  # without interpolation the image shows exactly the box
        assert torch.equal(image[0] > 127, expected)


def test_what_leaves_the_picture_is_dropped():
    record = record_of(100, 100, (0, 0, 10, 10), (40, 40, 60, 60), (90, 0, 100, 100))
    _, target = apply(Geometry((20, 20, 90, 90), (70, 70)), record)
    assert target.labels.tolist() == [1]
    assert target.boxes.tolist() == [[20, 20, 40, 40]]
    assert len(target.masks) == 1

    bitmap = record.target.masks.bitmaps
    bitmap[1, :, :60] = 0  # only the right half of the object is there
    _, target = apply(Geometry((0, 0, 48, 100), (100, 48)), record)
    assert target.labels.tolist() == [0]  # of object 1 the box is visible, the mask is not

    boxes_only = Record(record.image, Target(record.target.boxes, record.target.labels), 7)
    _, target = apply(Geometry((0, 0, 48, 100), (100, 48)), boxes_only)
    assert target.labels.tolist() == [0, 1] and target.masks is None

    image, target = apply(Geometry((0, 0, 20, 10), (20, 40), flip_h=True), record_of(10, 20))
    assert image.shape == (3, 20, 40) and image.dtype == torch.uint8
    assert target.boxes.shape == (0, 4) and target.masks.bitmaps.shape == (0, 112, 112)


def test_brightness_is_one_factor_and_moves_nothing_else():
    record = record_of(40, 60, (10, 10, 30, 30))
    record.image[:, 10:30, 10:30] = torch.tensor([100, 60, 20]).byte()[:, None, None]
    stored, random = record.image.clone(), torch.random.get_rng_state()
    plain = DataConfig(augment="lsj", lsj_size=64)
    bright = replace(plain, colour_jitter=(0.5, 0.0, 0.0, 0.0))
    shown = [augmented(cfg, record, rng_for("geometry", 3)) for cfg in (plain, bright, bright)]
    (geometry, image, target), (_, changed, moved), (_, again, _) = shown
    assert changed.equal(again) and target.boxes.equal(moved.boxes)
    height, width = geometry.content_size
    inside = torch.zeros(64, 64, dtype=torch.bool)
    inside[:height, :width] = True
    assert changed[:, ~inside].equal(image[:, ~inside])  # the grey of the canvas
    factor = float(changed[0][inside].max()) / float(image[0][inside].max())
    assert 0.5 <= factor <= 1.5 and abs(factor - 1) > 0.02
    assert ((image * factor).clamp(max=255) - changed)[:, inside].abs().max() <= 1  # whole numbers
    assert record.image.equal(stored) and torch.random.get_rng_state().equal(random)


def test_blur_takes_half_of_the_images_and_leaves_flat_ones_flat():
    cfg = DataConfig(augment="none", test_short_side=40, blur=2.0)
    sharp, flat = record_of(40, 40, (10, 10, 30, 30)), record_of(40, 40)
    changed = [
        not augmented(cfg, sharp, rng_for("geometry", i))[1].equal(sharp.image) for i in range(200)
    ]
    assert 70 <= sum(changed) <= 130  # 100 expected, 7 is its standard deviation
    assert all(augmented(cfg, flat, rng_for("geometry", i))[1].equal(flat.image) for i in range(9))


@pytest.mark.parametrize(
    ("colour", "blur", "said"),
    [
        ((0, 0, 0, 0.9), 0, r"colour_jitter=\(0, 0, 0, 0.9\).*hue"),
        ((0,) * 4, -1, r"blur=-1: sigma"),
    ],
)
def test_wrong_colours_are_named(colour, blur, said):
    with pytest.raises(ValueError, match=said):
        colours_of(DataConfig(colour_jitter=colour, blur=blur))


PAPER = DataConfig(short_sides=(48, 64, 90), crop_short_sides=(50, 60), crop_sides=(30, 55))
RECIPES = [
    replace(PAPER, max_side=150, flips="dihedral"),
    DataConfig(augment="multiscale", short_sides=(40, 100), max_side=160, flips="dihedral"),
    DataConfig(augment="lsj", lsj_size=96, lsj_scale=(0.5, 2.0), flips="both"),
]


@settings(max_examples=300)
@given(
    recipe=st.sampled_from(RECIPES),
    height=st.integers(5, 160),
    width=st.integers(5, 160),
    seed=st.integers(0, 10**6),
    notch=st.booleans(),
    data=st.data(),
)
def test_image_boxes_and_masks_move_together(recipe, height, width, seed, notch, data):
    """A white object, any transform: the mask is where the image is white."""
    x1 = data.draw(st.integers(0, width - 4))
    y1 = data.draw(st.integers(0, height - 4))
    x2 = data.draw(st.integers(x1 + 4, width))
    y2 = data.draw(st.integers(y1 + 4, height))
    geometry = draw_geometry(recipe, height, width, rng_for("geometry", seed), train=True)
    record = record_of(height, width, (x1, y1, x2, y2))
    image, target = apply(geometry, notched(record) if notch else record)
    assert tuple(image.shape[1:]) == geometry.output_size

    height, width = geometry.content_size
    white = image[0, :height, :width] > 127
    masked = torch.zeros_like(white)
    if len(target):
        masked = crops_to_bitmaps(target.masks, height, width)[0]
        box = target.boxes[0]
        assert (box >= 0).all() and (box <= torch.tensor([width, height] * 2)).all()
        filled = torch.zeros_like(white)
        left, top, right, bottom = (box + 0.5).floor().long().tolist()
        filled[top:bottom, left:right] = True
        assert notch or (filled ^ masked).sum() <= rim(box)
    # Interpolation moves the half-grey line by less than a pixel, so only the rim may differ.
    drawn = target.boxes[0] if len(target) else torch.zeros(4)
    assert (white ^ masked).sum() <= rim(drawn)


def rim(box: torch.Tensor) -> float:
    """Pixels along the outline of a box, and a few at its corners."""
    x1, y1, x2, y2 = box.tolist()
    return 2 * (x2 - x1 + y2 - y1) + 4
