"""Data sets -> micro-batches for training, groups of equal padded size for evaluation.

Nothing here has a state worth saving: what a step holds follows from (seed, step), so a run resumes
at any step, on any number of processes, with any number of workers, and sees the same images.
"""

import io
import pickle
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from mimdet.config import DataConfig
from mimdet.data.augment import apply, draw_geometry, rng_for
from mimdet.images import Resize, Size
from mimdet.structures import PAD_MULTIPLE, Record, Target, padded_size

Packed = tuple[Tensor, list[tuple[torch.dtype, torch.Size]], bytes]
"""All bytes of all tensors; their types and shapes; everything else, pickled."""


def stream(keys: Iterable[Any], task: Callable[[Any], Any], workers: int) -> Iterator[Any]:
    """task(key) for every key, in order, computed here (workers=0) or in `workers` processes.

    task must be picklable, and so must keys and results. Keys are taken as they are needed.
    """
    if not workers:
        yield from map(task, keys)
        return
    loader: DataLoader[Any] = DataLoader(
        _PackedTask(task),  # type: ignore[arg-type]  # [key] is all that is asked of a data set
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_start,
        generator=torch.Generator(),  # else a number is drawn from the global generator
    )
    for packed in loader:
        yield unpack(packed)


def pack(value: Any) -> Packed:
    """Any picklable object -> its tensors in one (n,) uint8 block, and the rest."""
    rest = io.BytesIO()
    pickler = _Pickler(rest, protocol=pickle.HIGHEST_PROTOCOL)
    pickler.dump(value)
    parts = []
    for tensor in pickler.tensors:
        flat = tensor.contiguous().flatten().view(torch.uint8)
        parts += [flat, torch.zeros(-len(flat) % 8, dtype=torch.uint8)]  # keeps 8-byte alignment
    block = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8)
    return block, [(tensor.dtype, tensor.shape) for tensor in pickler.tensors], rest.getvalue()


def unpack(packed: Packed) -> Any:
    """The object again; its tensors are views of the block."""
    block, kinds, rest = packed
    tensors = []
    start = 0
    for dtype, shape in kinds:
        size = shape.numel() * dtype.itemsize
        tensors.append(block[start : start + size].view(dtype).view(shape))
        start += size + -size % 8
    return _Unpickler(io.BytesIO(rest), tensors).load()


class _Pickler(pickle.Pickler):
    """Sets tensors aside and leaves their number in their place."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(obj)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, pid: Any) -> Tensor:
        return self.tensors[pid]


class _PackedTask:
    def __init__(self, task: Callable[[Any], Any]) -> None:
        self.task = task

    def __getitem__(self, key: Any) -> Packed:
        return pack(self.task(key))


def _start(_: int) -> None:
    """Ctrl-C reaches the whole process group: the training process alone decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not a handler inherited from training


def _as_it_is(value: Any) -> Any:
    return value


WINDOW_IMAGES = 1024
"""Images sorted together, unless a step or an epoch sets another bound."""


class Item(NamedTuple):
    """One showing of an image: what its augmentation depends on, besides the seed."""

    epoch: int
    image: int
    """Position in the data set."""


class Plan:
    """The order of training. dataset: anything with `len` and `image_size(index)`."""

    def __init__(
        self, dataset: Any, cfg: DataConfig, batch_size: int, accumulate: int, seed: int
    ) -> None:
        if batch_size < 1 or accumulate < 1 or seed < 0:
            raise ValueError(
                f"batch_size={batch_size}, accumulate={accumulate}, seed={seed}: the first two "
                "must be at least 1, the seed at least 0"
            )
        self.dataset, self.cfg = dataset, cfg
        self.batch_size, self.accumulate, self.seed = batch_size, accumulate, seed
        self.length = len(dataset)
        self.step_images = batch_size * accumulate
        self._window: tuple[int, int] = (0, 0)
        self._batches: list[list[Item]] = []
        self._orders: dict[int, NDArray[np.int64]] = {}

    def micro_batches(self, step: int) -> list[list[Item]]:
        """The `accumulate` micro-batches of a step, of batch_size items each."""
        start, stop = self._window
        if not start <= step < stop:
            self._window = start, stop = self.window(step)
            self._batches = self._fill(start, stop)
        first = (step - start) * self.accumulate
        return self._batches[first : first + self.accumulate]

    def window(self, step: int) -> tuple[int, int]:
        """The steps [start, stop) that are sorted together with this one.

        A window never crosses the end of an epoch (a step may), so that a small data set is still
        seen image after image.
        """
        epoch = step * self.step_images // self.length
        first = -(-epoch * self.length // self.step_images)  # first step that begins in this epoch
        end = -(-(epoch + 1) * self.length // self.step_images)
        steps = max(1, WINDOW_IMAGES // self.step_images)
        start = first + (step - first) // steps * steps
        return start, min(start + steps, end)

    def _fill(self, start: int, stop: int) -> list[list[Item]]:
        positions = range(start * self.step_images, stop * self.step_images)
        items = [self._item(position) for position in positions]
        sizes = np.array([self._cells(item) for item in items])  # (n, 2)
        groups = bucket(sizes, self.batch_size)
        order = rng_for("shuffle", self.seed, start).permutation(len(groups))
        return [[items[i] for i in groups[g]] for g in order]

    def _item(self, position: int) -> Item:
        epoch, place = divmod(position, self.length)
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = rng_for("order", self.seed, epoch).permutation(self.length)
        return Item(epoch, int(self._orders[epoch][place]))

    def _cells(self, item: Item) -> Size:
        """Output size in units of PAD_MULTIPLE."""
        height, width = self.dataset.image_size(item.image)
        rng = rng_for("geometry", self.seed, *item)
        output = draw_geometry(self.cfg, height, width, rng, train=True).output_size
        height, width = padded_size(*output)
        return height // PAD_MULTIPLE, width // PAD_MULTIPLE


def bucket(sizes: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    """Group (n, 2) heights and widths into batches of similar size; n divides by batch_size.

    Halves the set again and again along the side (height or width) that leaves less padding. Equal
    sizes keep their order. -> index arrays of batch_size each.
    """
    return _halved(np.arange(len(sizes)), sizes, batch_size)


def _halved(
    chosen: NDArray[np.int64], sizes: NDArray[np.int64], batch_size: int
) -> list[NDArray[np.int64]]:
    batches = len(chosen) // batch_size
    if batches <= 1:
        return [chosen]
    middle = batches // 2 * batch_size
    splits = []
    for axis in (0, 1):
        order = chosen[np.argsort(sizes[chosen, axis], kind="stable")]
        splits.append((order[:middle], order[middle:]))
    best = min(splits, key=lambda parts: sum(_padded_area(sizes[part]) for part in parts))
    return [group for part in best for group in _halved(part, sizes, batch_size)]


def _padded_area(sizes: NDArray[np.int64]) -> int:
    return int(len(sizes) * sizes[:, 0].max() * sizes[:, 1].max())


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
        resize: Resize,
        batch_size: int,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.order = eval_order(dataset, resize, batch_size)[rank::world]
        self.workers = workers
        self._load = _EvalTask(dataset, resize)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[EvalBatch]:
        return stream(self.order, self._load, self.workers)


def eval_order(dataset: Dataset, resize: Resize, batch_size: int) -> list[list[int]]:
    """Indices in groups of at most batch_size whose test transforms pad to one size."""
    groups: dict[Size, list[int]] = {}
    for index in range(len(dataset)):
        size = resize.size(*dataset.image_size(index))
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

    def __init__(self, dataset: Dataset, resize: Resize) -> None:
        self.dataset, self.resize = dataset, resize

    def __call__(self, indices: list[int]) -> EvalBatch:
        batch = EvalBatch(indices, [], [])
        for index in indices:
            image = self.dataset[index].image
            batch.images.append(self.resize(image))
            batch.original_sizes.append((image.shape[1], image.shape[2]))
        return batch
