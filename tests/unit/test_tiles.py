"""Large pictures: tiles and what becomes of objects at their borders; other sizes and caps."""

import warnings

import pytest
import torch

import mimdet
from mimdet.config import model_part
from mimdet.inference import merge_tiles, tile_windows
from mimdet.models.detector import at_size
from mimdet.structures import Detections, paste
from tests.small import nothing_found, small_detector


@pytest.fixture(scope="module")
def model():
    return small_detector()


def boxes(*rows: list[float], size: tuple[int, int] = (100, 100)) -> Detections:
    """Rows of x0, y0, x1, y1, score, label; every mask fills the left half of its box."""
    table = torch.tensor(rows).reshape(-1, 6)
    masks = torch.zeros(len(rows), 28, 28)
    masks[:, :, :14] = 1
    return Detections(table[:, :4], table[:, 4], table[:, 5].long(), size, masks)


def test_windows_by_hand():
    assert tile_windows((100, 100), 100, 20) == [(0, 0, 100, 100)]
    assert tile_windows((60, 180), 100, 20) == [(0, 0, 100, 60), (80, 0, 180, 60)]
    # 181 pixels need a third one: from 0, 40.5 and 81
    assert [x for x, *_ in tile_windows((60, 181), 100, 20)] == [0, 40, 81]
    rows = tile_windows((1000, 900), 512, 64)
    assert [(x, y) for x, y, *_ in rows] == [(x, y) for y in (0, 244, 488) for x in (0, 388)]


LEFT, RIGHT = (0, 0, 100, 100), (80, 0, 180, 100)
WIDE = (100, 180)


def merged(left: Detections, right: Detections, *more: Detections) -> list[list[float]]:
    windows = [LEFT, RIGHT, (0, 0, 180, 100)][: 2 + len(more)]
    found = merge_tiles([left, right, *more], windows, WIDE)
    columns = (found.boxes, found.scores[:, None], found.labels[:, None])
    return torch.cat(columns, 1).round(decimals=3).tolist()


def test_an_object_in_both_tiles_is_one_of_its_surest():
    left, right = boxes([85, 10, 94, 30, 0.6, 1]), boxes([5, 10, 15, 30, 0.9, 1])
    assert merged(left, right) == [pytest.approx([85, 10, 95, 30, 0.9, 1])]
    other = boxes([5, 10, 15, 30, 0.9, 2])
    assert len(merged(left, other)) == 2  # of another class


def test_a_cut_one_gives_way_to_the_whole_one():
    """The object spans 90..110: left sees 90..100 of it, cut at its border; right all of it."""
    cut, whole = boxes([90, 10, 100, 30, 0.8, 0]), boxes([10, 10, 30, 30, 0.6, 0])
    assert merged(cut, whole) == [pytest.approx([90, 10, 110, 30, 0.6, 0])]
    # IoU above .5: the surer cut one would have stayed, were it not for its half score
    cut = boxes([86, 10, 100, 30, 0.8, 0])
    whole = boxes([6, 10, 24, 30, 0.6, 0])
    assert merged(cut, whole) == [pytest.approx([86, 10, 104, 30, 0.6, 0])]
    doubtful = boxes([6, 10, 24, 30, 0.3, 0])  # less than half as sure as the cut one
    assert merged(cut, doubtful) == [pytest.approx([86, 10, 100, 30, 0.8, 0])]
    cut = boxes([90, 10, 100, 30, 0.8, 0])  # IoU .5 with 90..110: covered, but not by these
    for other in ([10, 10, 30, 30, 0.3, 0], [10, 10, 30, 30, 0.6, 1]):
        assert len(merged(cut, boxes(other))) == 2


def test_borders_of_the_image_cut_nothing_and_halves_stay_when_nothing_is_whole():
    at_border = boxes([0, 10, 30, 30, 0.5, 0], [0, 10, 14, 30, 0.4, 0])
    assert len(merged(at_border, boxes())) == 2
    halves = merged(boxes([70, 10, 100, 30, 0.9, 0]), boxes([0, 10, 50, 30, 0.8, 0]))
    assert [row[:4] for row in halves] == [[70, 10, 100, 30], [80, 10, 130, 30]]
    seen = boxes([70, 10, 130, 30, 0.7, 0])  # by the look at the whole image
    halves = boxes([70, 10, 100, 30, 0.9, 0]), boxes([0, 10, 50, 30, 0.8, 0])
    assert merged(*halves, seen) == [pytest.approx([70, 10, 130, 30, 0.7, 0])]


def test_masks_go_with_their_boxes():
    found = merge_tiles([boxes(), boxes([10, 20, 30, 60, 0.9, 0])], [LEFT, RIGHT], WIDE)
    assert found.image_size == WIDE
    expected = torch.zeros(1, *WIDE, dtype=torch.bool)
    expected[0, 20:60, 90:100] = True
    assert torch.equal(paste(found.mask_probabilities, found.boxes, *WIDE), expected)
    empty = merge_tiles([nothing_found(100, 100)] * 2, [LEFT, RIGHT], WIDE)
    assert len(empty) == 0 and empty.image_size == WIDE


def test_tiles_are_seen_at_full_resolution_or_zoomed(model, monkeypatch):
    """A detector that finds the bright spot of a tile, and in the image as a whole two objects, of
    which the one that is larger than the overlap counts."""
    seen = []

    def found(images, **_):
        seen.extend(tuple(image.shape[1:]) for image in images)
        return [spot(image) for image in images]

    def spot(image):
        y, x = (image[0].float() == image[0].max()).nonzero().float().mean(0).tolist()
        rows = [[x - 9, y - 9, x + 10, y + 10, 0.9, 0]] * bool(image.max() > 200)
        if image.shape[2] == 98:
            rows = [[0, 0, 16, 8, 0.8, 1], [50, 0, 65, 8, 0.8, 1]]
        return boxes(*rows, size=tuple(image.shape[1:]))

    monkeypatch.setattr(model, "detect", found)
    image = torch.zeros(3, 130, 200, dtype=torch.uint8)
    image[:, 70:74, 95:99] = 255
    detections = mimdet.predict(model, image, tile=96, overlap=32)
    assert sorted(set(seen)) == [(64, 98), (96, 96)]  # the whole at its short side of 64
    large = [0, 0, 16 * 200 / 98, 8 * 130 / 64]  # 32.7 pixels wide; the other 30.6
    for box, expected in zip(detections.boxes, ([87.5, 62.5, 106.5, 81.5], large), strict=True):
        assert box.tolist() == pytest.approx(expected)
    seen.clear()
    mimdet.predict(model, [image, image], tile=96, overlap=32, short_side=192)
    assert set(seen) == {(64, 98), (192, 192)} and len(seen) == 2 * (2 * 3 + 1)
    seen.clear()
    mimdet.predict(model, image[:, :80, :90], tile=96)
    assert seen == [(80, 90)]
    with pytest.raises(ValueError, match="sample= is of one image"):
        sample = mimdet.Sample([torch.tensor([0])], (4, 4))
        mimdet.predict(model, image, tile=96, sample=sample)


def test_evaluation_by_tiles_is_that_of_predict(model):
    scenes = mimdet.ShapesCOCO(size=96, length=2, split="val")
    plain = mimdet.evaluate(model, scenes)
    tiled = mimdet.evaluate(model, scenes, tile=64, overlap=16)
    own = mimdet.predict(model, scenes[0].image, tile=64, overlap=16)
    first = [r["score"] for r in tiled.results if r["image_id"] == scenes.image_id(0)]
    assert first == pytest.approx(own.scores.tolist(), abs=1e-5)
    assert tiled.about["tiles"] == (64, 16, 1.0) and "tiles" not in plain.about


def test_another_size_and_cap_are_said_and_leave_the_model_as_it_is(model):
    """At most 2 detections; 50 was the cap, so 100 want twice the proposals."""
    image = mimdet.ShapesCOCO(size=96, length=1, split="val")[0].image
    before, part = mimdet.predict(model, image), model_part(model.config)
    assert len(mimdet.predict(model, image, detections=2)) == 2
    other = at_size(model, short_side=128, detections=100)
    assert other.resize(image).shape == (3, 128, 128) and other.resize.max_side == 2666
    assert (other.rpn.post_nms, other.rpn.pre_nms) == ((150, 300), (300, 600))
    assert model.rpn.post_nms == (150, 150) and model.resize.short_side == 64
    assert model_part(other.config) != part == model_part(model.config)
    assert other.config.detector.detections_per_image == 100
    torch.testing.assert_close(mimdet.predict(model, image).scores, before.scores)
    scenes = mimdet.ShapesCOCO(size=96, length=1, split="val")
    abouts = [mimdet.evaluate(model, scenes, short_side=side).about for side in (0, 128)]
    assert abouts[0]["config"] != abouts[1]["config"]
    for wrong in ({"short_side": -1}, {"tile": 512, "overlap": 512}, {"tile": 64, "overlap": -1}):
        with pytest.raises(ValueError, match="must be larger than their overlap"):
            mimdet.predict(model, image, **wrong)


@pytest.mark.parametrize(("side", "warned"), [(31, True), (33, False)])
def test_objects_that_shrink_are_warned_of(model, monkeypatch, side, warned):
    """256 pixels become 64: a side of 32 is 8."""

    def found(images, **_):
        row = [4, 4, 4 + side / 4, 4 + side / 4, 0.9, 0]
        unsure = [0, 0, 64, 64, 0.4, 0]
        return [boxes(row, unsure, unsure, unsure, size=(64, 64)) for _ in images]

    monkeypatch.setattr(model, "detect", found)
    image = torch.zeros(3, 256, 256, dtype=torch.uint8)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mimdet.predict(model, image)
    assert [("--short-side" in str(one.message)) for one in said] == [True] * warned
