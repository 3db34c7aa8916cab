"""The colour floor: its parts by hand, and that it does find what colour alone can find."""

import numpy as np
import pytest

from mimdet.data.scenes import LAMPS
from mimdet.data.shapes import ShapesCOCO
from tools.measure_floor import class_hues, connected_components, otsu, threshold_floor
from tools.measure_transport import lit_objects


def test_components_agree_with_flood_fill():
    bands = np.random.default_rng(0).integers(0, 3, (30, 40))
    got = connected_components(bands)
    seen = np.zeros_like(bands)
    count = 0
    for start in zip(*np.nonzero(bands), strict=True):
        if seen[start]:
            continue
        count += 1
        stack = [start]
        while stack:
            y, x = stack.pop()
            if seen[y, x]:
                continue
            seen[y, x] = count
            for a, b in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if 0 <= a < 30 and 0 <= b < 40 and bands[a, b] == bands[y, x]:
                    stack.append((a, b))
    pairs = set(zip(got.ravel().tolist(), seen.ravel().tolist(), strict=True))
    assert len(pairs) == got.max() + 1 == count + 1  # the same regions, one to one


def test_groups_and_hues_by_hand():
    values = np.array([1.0, 2.0, 1.5] * 50 + [9.0, 10.0, 9.5] * 20)
    assert 2.0 <= otsu(values) < 9.0
    hues = class_hues(ShapesCOCO("shapes-v1-easy", length=60))
    assert np.linalg.norm(hues, axis=1) == pytest.approx(1.0)
    disc, leaf, square, heart = hues[[0, 2, 4, 5]]
    assert disc[0] > 0.5 and square[1] < 0 and leaf[1] > 0.5 and heart[0] > 0.5


def test_the_floor_finds_something_and_speaks_coco():
    from pycocotools import mask as coco_mask

    dataset = ShapesCOCO("shapes-v1-easy", length=8, split="val")
    results = threshold_floor(dataset, ShapesCOCO("shapes-v1-easy", length=30))
    assert {result["image_id"] for result in results} == set(range(8))
    found = 0
    for annotation in dataset.ground_truth()["annotations"]:
        own = (annotation["image_id"], annotation["category_id"])
        same = [r["segmentation"] for r in results if (r["image_id"], r["category_id"]) == own]
        overlaps = coco_mask.iou(same, [annotation["segmentation"]], [0]) if same else [[0.0]]
        found += bool(np.max(overlaps) > 0.5)
    assert found >= 5
    assert all(0 <= result["score"] <= 1 for result in results)


def test_lit_objects_are_asked_for_the_colour_of_their_lamp():
    data = ShapesCOCO("shapes-v2-context", length=20)
    images, boxes, colours = lit_objects(data, range(20))
    assert images.shape == (20, 3, 256, 256) and len(colours) == sum(map(len, boxes)) > 20
    names = [data.categories[label] for i in range(20) for label in data.scene(i).labels]
    told = [name.split(", ")[1] for name in names if name.endswith(" lamp")]
    assert [f"{list(LAMPS)[colour]} lamp" for colour in colours] == told
