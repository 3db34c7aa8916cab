"""Data sets -> micro-batches for training, groups of equal padded size for evaluation.

Nothing here has a state worth saving: what a step holds follows from (seed, step), so a run resumes
at any step, on any number of processes, with any number of workers, and sees the same images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mimdet.config import DataConfig
from mimdet.data.augment import Size, apply, draw_geometry, resize_image, rng_for, test_size
from mimdet.data.plan import Item, Plan
from mimdet.data.workers import stream
from mimdet.structures import Record, Target, padded_size


class Dataset(Protocol):
    """What a data set must offer; any class with these attributes will do."""

    categories: list[str]
    """Names; the position is our label."""
    category_ids: list[int]
    """COCO id of each label."""
    has_masks: bool

    @property
    def version(self) -> str:
        """What exactly the data is, for a run's record: name and revision, or a hash."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def image_size(self, index: int) -> tuple[int, int]:
        """(height, width), without decoding the image."""
        ...

    def image_id(self, index: int) -> int | str: ...

    def ground_truth(self) -> dict[str, Any]:
        """COCO dictionary for evaluation: crowds included, annotation ids from 1."""
        ...


@dataclass(slots=True)
class MicroBatch:
    """What one process holds at a time."""

    images: list[Tensor]
    """(3, h, w) uint8, of similar size."""
    targets: list[Target]
    image_ids: list[int | str]
    number: int
    """Position within the global step: 0..accumulate-1, counted over all processes."""


@dataclass(slots=True)
class EvalBatch:
    """Images that pad to one size."""

    indices: list[int]
    """Positions in the data set."""
    images: list[Tensor]
    """(3, h, w) uint8 after the test transform."""
    original_sizes: list[Size]
    """(height, width) of the stored images."""


class TrainLoader:
    """Endless training data, addressed by step.

    batch_size: images of a micro-batch; accumulate: micro-batches of a step, over all processes;
    rank r of `world` processes gets the micro-batches r, r + world, ... of every step.
    workers: loader processes; 0 loads in this one.
    """

    def __init__(
        self,
        dataset: Dataset,
        cfg: DataConfig,
        batch_size: int,
        accumulate: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        if accumulate % world:
            raise ValueError(
                f"accumulate={accumulate} micro-batches cannot be shared by {world} processes; "
                f"make training.accumulate a multiple of {world} (and batch_size smaller in turn)"
            )
        self.plan = Plan(dataset, cfg, batch_size, accumulate, seed)
        self.rank, self.world, self.workers = rank, world, workers
        self._load = _TrainTask(dataset, cfg, seed)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that read the data set once, rounded to a whole number, at least 1."""
        return max(1, round(self.plan.length / self.plan.step_images))

    def batches(self, start_step: int, stop_step: int) -> Iterator[list[MicroBatch]]:
        """For each step in [start_step, stop_step): this process's micro-batches, in order."""
        loaded = stream(self._keys(start_step, stop_step), self._load, self.workers)
        for _ in range(start_step, stop_step):
            yield [next(loaded) for _ in range(self.plan.accumulate // self.world)]

    def _keys(self, start_step: int, stop_step: int) -> Iterator[tuple[int, list[Item]]]:
        for step in range(start_step, stop_step):
            batches = list(enumerate(self.plan.micro_batches(step)))
            yield from batches[self.rank :: self.world]


class EvalLoader:
    """Every image once, in groups of equal padded size, the largest first.

    Padding changes a detector's output a little (GroupNorm, positions, decoder), so evaluation
    never mixes padded sizes; with the largest first, memory runs out at once or not at all.
    Process `rank` of `world` gets every world-th group.
    """

    def __init__(
        self,
        dataset: Dataset,
        cfg: DataConfig,
        batch_size: int,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.order = eval_order(dataset, cfg, batch_size)[rank::world]
        self.workers = workers
        self._load = _EvalTask(dataset, cfg)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[EvalBatch]:
        return stream(self.order, self._load, self.workers)


def eval_order(dataset: Dataset, cfg: DataConfig, batch_size: int) -> list[list[int]]:
    """Indices in groups of at most batch_size whose test transforms pad to one size."""
    groups: dict[Size, list[int]] = {}
    for index in range(len(dataset)):
        size = test_size(cfg, *dataset.image_size(index))
        groups.setdefault(padded_size(*size), []).append(index)
    largest_first = sorted(groups, key=lambda size: (-size[0] * size[1], size))
    return [
        groups[size][start : start + batch_size]
        for size in largest_first
        for start in range(0, len(groups[size]), batch_size)
    ]


class _TrainTask:
    """(number, items) -> MicroBatch; picklable, so that a worker started afresh can run it."""

    def __init__(self, dataset: Dataset, cfg: DataConfig, seed: int) -> None:
        self.dataset, self.cfg, self.seed = dataset, cfg, seed

    def __call__(self, key: tuple[int, list[Item]]) -> MicroBatch:
        number, items = key
        batch = MicroBatch([], [], [], number)
        for item in items:
            record = self.dataset[item.image]
            rng = rng_for("geometry", self.seed, *item)
            height, width = record.image.shape[1:]
            image, target = apply(draw_geometry(self.cfg, height, width, rng, train=True), record)
            batch.images.append(image)
            batch.targets.append(target)
            batch.image_ids.append(record.image_id)
        return batch


class _EvalTask:
    """Indices -> EvalBatch."""

    def __init__(self, dataset: Dataset, cfg: DataConfig) -> None:
        self.dataset, self.cfg = dataset, cfg

    def __call__(self, indices: list[int]) -> EvalBatch:
        batch = EvalBatch(indices, [], [])
        for index in indices:
            image = self.dataset[index].image
            height, width = image.shape[1:]
            batch.images.append(resize_image(image, test_size(self.cfg, height, width)))
            batch.original_sizes.append((height, width))
        return batch
