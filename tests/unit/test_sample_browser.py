"""The sample browser: what it draws is what a training sees, and every control is answered."""

import dataclasses

import pytest
import torch

from mimdet.config import DataConfig
from mimdet.data.augment import apply, draw_geometry, rng_for
from mimdet.data.loader import TrainLoader
from mimdet.data.shapes import ShapesCOCO
from mimdet.structures import Record, Target

pytest.importorskip("anywidget")
from mimdet.viz.widgets.sample_browser import KINDS, SampleBrowser

SCENES = ShapesCOCO("shapes-v1-easy", 64, length=5, split="val")
DATA = DataConfig(short_sides=(96, 128), crop_short_sides=(80,), crop_sides=(48, 64))
DATA.crop_probability, DATA.test_short_side, DATA.lsj_size = 1.0, 112, 160


@pytest.fixture
def panel():
    return SampleBrowser(SCENES, DATA)


def test_it_shows_the_image_a_training_with_that_seed_sees(panel):
    panel.kind.value, panel.seed.value = "multiscale", 3
    loader = TrainLoader(SCENES, dataclasses.replace(DATA, augment="multiscale"), 1, 5, seed=3)
    (batches,) = loader.batches(0, 1)  # five images: the first epoch
    seen = {batch.image_ids[0]: batch for batch in batches}
    for index in range(len(SCENES)):
        panel.index.value = index
        image, target = apply(panel.geometry, SCENES[index])
        assert torch.equal(image, seen[index].images[0])
        torch.testing.assert_close(target.boxes, seen[index].targets[0].boxes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_status_says_sizes_objects_and_tokens(panel, kind):
    panel.kind.value, panel.seed.value = kind, 1
    cfg = dataclasses.replace(DATA, augment=kind)
    expected = draw_geometry(cfg, 64, 64, rng_for("geometry", 1, 0, 0), train=True)
    assert panel.geometry == expected
    height, width = expected.output_size
    _, target = apply(expected, SCENES[0])
    left = f"{len(target)} of {len(SCENES[0].target)} objects are left"
    assert left in panel.status.value
    rows, columns = -(-height // 16), -(-width // 16)
    assert f"{rows} × {columns} = {rows * columns} tokens" in panel.status.value
    assert ("mirrored left-right" in panel.status.value) == expected.flip_h
    assert ("cut out" in panel.status.value) == (expected.crop != (0, 0, 64, 64))


def test_a_photo_without_truth_can_be_browsed_():
    nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    photo = torch.randint(0, 255, (3, 40, 90), dtype=torch.uint8)
    panel = SampleBrowser([Record(photo, nothing, "photo.jpg")], DATA)
    assert "0 of 0 objects" in panel.status.value
    assert panel.index.max == 0


def test_an_image_is_read_once(monkeypatch):
    reads = []

    class Counted(list):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    panel = SampleBrowser(Counted(SCENES[i] for i in range(2)), DATA)
    panel.seed.value, panel.kind.value = 1, "none"
    assert reads == [0]
    panel.index.value = 1
    assert reads == [0, 1]
