"""The colour floor: its parts by hand, and that it does find what colour alone can find."""

import numpy as np
import pytest

from mimdet.data.shapes import ShapesCOCO
from tools.measure_floor import class_hues, connected_components, otsu, threshold_floor


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
