"""The order of training, size buckets, workers, evaluation groups."""

import itertools
import pickle
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from mimdet.config import DataConfig
from mimdet.data.augment import draw_geometry, rng_for
from mimdet.data.loader import Plan, TrainLoader, bucket, pack, padded_size, unpack
from mimdet.inference import equal_padded_size
from mimdet.structures import Crops, Record, Target

SMALL = DataConfig(augment="multiscale", short_sides=(32, 40, 64), test_short_side=32, max_side=96)


class Sizes:
    """What planning reads of a data set: (n, 2) heights and widths."""

    def __init__(self, sizes: np.ndarray) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def image_size(self, index: int) -> tuple[int, int]:
        height, width = self.sizes[index]
        return int(height), int(width)


class Noise(Sizes):
    """Images of noise in many sizes, with a varying number of objects. Image i is called "i"."""

    has_masks = True
    version = "noise"
    categories, category_ids = ["a", "b"], [1, 2]

    def __init__(self, length: int) -> None:
        super().__init__(np.random.default_rng(5).integers(20, 60, (length, 2)))

    def image_id(self, index: int) -> str:
        return str(index)

    def image(self, index: int) -> torch.Tensor:
        torch_rng = torch.Generator().manual_seed(index)
        size = (3, *self.image_size(index))
        return torch.randint(0, 256, size, generator=torch_rng, dtype=torch.uint8)

    def __getitem__(self, index: int) -> Record:
        torch_rng = torch.Generator().manual_seed(index)
        corner = torch.rand(index % 4, 2, generator=torch_rng) * 10
        boxes = torch.cat([corner, corner + 9], 1)
        crops = Crops(boxes, torch.ones(len(boxes), 112, 112, dtype=torch.uint8))
        labels = torch.zeros(len(boxes), dtype=torch.long)
        return Record(self.image(index), Target(boxes, labels, crops), self.image_id(index))

    def ground_truth(self) -> dict:
        return {}


def coco_sizes(length: int) -> Sizes:
    """Sizes as frequent as in COCO: three quarters landscape 640 wide, most of them 480 or 427."""
    rng = np.random.default_rng(0)
    shares = [0.38, 0.22, 0.11, 0.09, 0.07, 0.07, 0.06]
    short = rng.choice([480, 427, 426, 425, 360, 500, 612], length, p=shares)
    sizes = np.stack([short, np.full(length, 640)], 1)
    portrait = rng.random(length) > 0.75
    sizes[portrait] = sizes[portrait, ::-1]
    return Sizes(sizes)


def shown(loader: TrainLoader, start: int, stop: int) -> list[list[tuple]]:
    """(number, image ids) of every micro-batch of every step."""
    return [[(b.number, tuple(b.image_ids)) for b in step] for step in loader.batches(start, stop)]


def equal(a, b) -> bool:
    """Same micro-batch, bit for bit."""
    same = a.number == b.number and a.image_ids == b.image_ids
    for x, y in zip(a.images, b.images, strict=True):
        same &= torch.equal(x, y)
    for x, y in zip(a.targets, b.targets, strict=True):
        same &= torch.equal(x.boxes, y.boxes) and torch.equal(x.labels, y.labels)
        same &= torch.equal(x.masks.boxes, y.masks.boxes)
        same &= torch.equal(x.masks.bitmaps, y.masks.bitmaps)
    return same


def test_every_image_once_an_epoch():
    loader = TrainLoader(Noise(48), SMALL, batch_size=4, accumulate=3, seed=1)
    for epoch in range(3):
        steps = shown(loader, 4 * epoch, 4 * epoch + 4)
        assert [[number for number, _ in step] for step in steps] == [[0, 1, 2]] * 4
        ids = [i for step in steps for _, members in step for i in members]
        assert sorted(ids, key=int) == [str(i) for i in range(48)]
    assert shown(loader, 0, 1) != shown(loader, 4, 5)
    single = TrainLoader(Noise(1), SMALL, 1, 1, seed=0)
    sizes = {tuple(step[0].images[0].shape) for step in single.batches(0, 12)}
    assert len(sizes) == 3  # it looks different in another epoch: three short sides


@pytest.mark.parametrize(("length", "batch_size", "accumulate"), [(1, 2, 2), (5, 4, 4), (7, 3, 1)])
def test_odd_lengths_wrap_evenly(length, batch_size, accumulate):
    """After n steps no image has been seen more than twice more often than another."""
    loader = TrainLoader(Noise(length), SMALL, batch_size, accumulate, seed=0)
    seen = Counter()
    for step in shown(loader, 0, 9):
        assert len(step) == accumulate
        assert all(len(members) == batch_size for _, members in step)
        seen.update(i for _, members in step for i in members)
    counts = [seen[str(i)] for i in range(length)]
    assert sum(counts) == 9 * batch_size * accumulate
    assert max(counts) - min(counts) <= 1 + (length > batch_size * accumulate)


def test_a_step_does_not_depend_on_where_the_run_started():
    dataset, cfg = Noise(50), SMALL
    whole = list(TrainLoader(dataset, cfg, 2, 2, seed=3).batches(0, 40))
    for start in (1, 12, 13, 39):
        resumed = next(TrainLoader(dataset, cfg, 2, 2, seed=3).batches(start, start + 1))
        assert all(equal(a, b) for a, b in zip(whole[start], resumed, strict=True))
    other = next(TrainLoader(dataset, cfg, 2, 2, seed=4).batches(12, 13))
    assert not all(equal(a, b) for a, b in zip(whole[12], other, strict=True))


def test_ranks_share_a_step():
    dataset = Noise(40)
    whole = shown(TrainLoader(dataset, SMALL, 2, 4, seed=0), 0, 6)
    parts = [shown(TrainLoader(dataset, SMALL, 2, 4, 0, rank=r, world=2), 0, 6) for r in (0, 1)]
    for step, first, second in zip(whole, *parts, strict=True):
        assert first == step[0::2] and second == step[1::2]
    with pytest.raises(ValueError, match=r"accumulate=4.*3 processes.*multiple of 3"):
        TrainLoader(dataset, SMALL, 2, 4, 0, world=3)
    with pytest.raises(ValueError, match=r"batch_size=0"):
        TrainLoader(dataset, SMALL, 0, 4, 0)


def test_workers_change_nothing():
    dataset, cfg = Noise(30), replace(SMALL, colour_jitter=(0.4, 0.4, 0.4, 0.1), blur=1.0)
    torch.manual_seed(0)
    expected = list(TrainLoader(dataset, cfg, 3, 2, seed=0).batches(2, 7))
    untouched = torch.random.get_rng_state()
    loader = TrainLoader(dataset, cfg, 3, 2, seed=0, workers=2)
    found = list(loader.batches(2, 7))
    assert torch.equal(torch.random.get_rng_state(), untouched)
    assert [len(step) for step in found] == [2] * 5
    pairs = zip(itertools.chain(*expected), itertools.chain(*found), strict=True)
    assert all(equal(a, b) for a, b in pairs)
    pickle.loads(pickle.dumps(loader))  # what a worker that is started afresh receives


def test_sizes_are_planned_as_they_are_made():
    """The plan draws sizes without pixels; the images must come out exactly so."""
    dataset = Noise(64)
    loader = TrainLoader(dataset, SMALL, 4, 2, seed=9)
    plan = Plan(dataset, SMALL, 4, 2, seed=9)
    for number, step in enumerate(loader.batches(0, 4)):
        for batch, items in zip(step, plan.micro_batches(number), strict=True):
            for image, item in zip(batch.images, items, strict=True):
                rng = rng_for("geometry", 9, *item)
                geometry = draw_geometry(SMALL, *dataset.image_size(item.image), rng, train=True)
                assert tuple(image.shape[1:]) == geometry.output_size
                assert image.dtype == torch.uint8


def test_padding_stays_small():
    """Padded / valid tokens (16 x 16 px) of the paper's recipe at batch size 16."""
    dataset, cfg = coco_sizes(20_000), DataConfig()
    plan = Plan(dataset, cfg, 16, 4, seed=0)
    batches = itertools.chain(*(plan.micro_batches(step) for step in range(1000, 1032)))
    sizes = []
    for item in itertools.chain(*batches):
        rng = rng_for("geometry", 0, *item)
        size = dataset.image_size(item.image)
        sizes.append(draw_geometry(cfg, *size, rng, train=True).output_size)
    valid = np.ceil(np.array(sizes) / 16).prod(1).sum()
    padded = np.ceil(np.array(sizes) / 32) * 2

    def waste(order: np.ndarray) -> float:
        largest = padded[order].reshape(-1, 16, 2).max(1)
        return float(largest.prod(1).sum() * 16 / valid)

    assert waste(np.arange(len(sizes))) <= 1.15
    # In random order it is much, so the sizes of this test are as uneven as COCO's.
    assert waste(np.random.default_rng(0).permutation(len(sizes))) > 1.8


def test_bucket_by_hand_and_micro_batches_do_not_come_in_order_of_size():
    sizes = np.array([[1, 9], [9, 1], [1, 9], [9, 1], [5, 5], [5, 5]])
    groups = sorted(sorted(map(int, group)) for group in bucket(sizes, 2))
    assert groups == [[0, 2], [1, 3], [4, 5]]
    equal_sizes = bucket(np.ones((6, 2), dtype=int), 2)
    assert [group.tolist() for group in equal_sizes] == [[0, 1], [2, 3], [4, 5]]
    plan = Plan(coco_sizes(2000), DataConfig(), 8, 8, seed=0)
    batches = itertools.chain(*(plan.micro_batches(step) for step in range(16)))
    heights = [plan.dataset.image_size(items[0].image)[0] for items in batches]
    changes = sum(a != b for a, b in itertools.pairwise(heights))
    assert changes > len(heights) / 3


def test_a_late_start_is_immediate():
    dataset = coco_sizes(118_000)
    began = time.process_time()
    loader = TrainLoader(dataset, DataConfig(), 8, 8, seed=0)
    batches = loader.plan.micro_batches(50_000)
    assert time.process_time() - began < 1.0
    assert len(batches) == 8


def test_evaluation_never_mixes_padded_sizes():
    sizes = [Noise(23).image_size(i) for i in range(23)]
    groups = equal_padded_size(sizes, 4)
    padded = [{padded_size(*sizes[i]) for i in group} for group in groups]
    assert all(len(own) == 1 for own in padded) and max(map(len, groups)) <= 4
    areas = [height * width for ((height, width),) in padded]
    assert areas == sorted(areas, reverse=True) and len(areas) < 23
    assert sorted(itertools.chain(*groups)) == list(range(23))


def test_pack_keeps_any_tensors_and_all_else():
    value = [torch.arange(7, dtype=torch.uint8), torch.arange(5).reshape(1, 5), torch.zeros(0, 4)]
    value += [torch.rand(3, 4).T, torch.tensor(2.5)]
    found, rest = unpack(pack((value, ["x", 3])))
    assert rest == ["x", 3]
    for ours, theirs in zip(found, value, strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    assert unpack(pack("plain")) == "plain"
