"""Data sets -> micro-batches for training.

Nothing here has a state worth saving: what a step holds follows from (seed, step), so a run resumes
at any step, on any number of processes, with any number of workers, and sees the same images.
"""

import io
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from mimdet.config import DataConfig
from mimdet.data.augment import augmented, colours_of, draw_geometry, rng_for
from mimdet.structures import PAD_MULTIPLE, Record, Target, generic_names, padded_size


def stream(keys: Iterable[Any], task: Callable[[Any], Any], workers: int) -> Iterator[Any]:
    """task(key) for every key, in order, computed here (workers=0) or in `workers` processes.

    task must be picklable, and so must keys and results. Keys are taken as they are needed.
    ChildProcessError where one of the processes ends.
    """
    main = _main_of_workers(task) if workers else None
    if main is None:
        yield from map(task, keys)
        return
    loader: DataLoader[Any] = DataLoader(
        _Keyed(task),  # type: ignore[arg-type]  # [key] is all that is asked of a data set
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        collate_fn=pack,
        worker_init_fn=_start,
        generator=torch.Generator(),  # else a number is drawn from the global generator
    )
    own, sys.modules["__main__"] = sys.modules["__main__"], main
    try:
        loaded = iter(loader)
    finally:
        sys.modules["__main__"] = own
    try:
        yield from map(unpack, loaded)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ChildProcessError(
            "a process that loads images ended: is the memory full, or /dev/shm? Use fewer "
            "data.workers (--workers); with 0 the images are loaded in the training process"
        ) from error


def _main_of_workers(task: Callable[[Any], Any]) -> ModuleType | None:
    """The `__main__` of processes that are to compute `task`; None where they cannot.

    One that is not forked runs the user's script again, from its first line: only where the task
    is defined in it. What a notebook defines, it cannot have.
    """
    main = sys.modules["__main__"]
    if torch.multiprocessing.get_start_method() == "fork":
        return main
    try:
        text = pickle.dumps(task)
    except (pickle.PicklingError, AttributeError, TypeError):
        text = b"mimdet_slot_"
    if b"mimdet_slot_" not in text and b"__main__" not in text:
        return ModuleType("__main__")
    if b"mimdet_slot_" not in text and hasattr(main, "__file__"):
        return main
    warnings.warn(
        "new processes cannot import data sets that are defined in a notebook or inside a "
        "function: images are loaded in this one (data.workers = 0)",
        stacklevel=2,
    )
    return None


def pack(value: Any) -> Tensor:
    """Any picklable object -> (n,) uint8.

    Between processes each tensor would take an open file; one block takes one.
    """
    block = io.BytesIO()
    _Pickler(block, protocol=5).dump(value)
    return torch.frombuffer(block.getbuffer(), dtype=torch.uint8)


def unpack(block: Tensor) -> Any:
    """The object again."""
    return pickle.loads(block.numpy().data)


class _Pickler(pickle.Pickler):
    """Tensors travel as numpy arrays: their own way takes several times as long."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return torch.from_numpy, (obj.contiguous().numpy(),)
        return NotImplemented


class _Keyed:
    def __init__(self, task: Callable[[Any], Any]) -> None:
        self.task = task

    def __getitem__(self, key: Any) -> Any:
        return self.task(key)


def _start(_: int) -> None:
    """Ctrl-C reaches the whole process group: the training process alone decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):  # so does the end of its terminal
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not a handler inherited from training


WINDOW_IMAGES = 1024
"""Images sorted together, unless a step or an epoch sets another bound."""


class Item(NamedTuple):
    """One showing of an image: what its augmentation depends on, besides the seed."""

    epoch: int
    image: int
    """Position in the data set."""


class Order:
    """The endless sequence of showings: epoch after epoch, each in an order of its own."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed
        self._orders: dict[int, NDArray[np.int64]] = {}

    def __getitem__(self, position: int) -> Item:
        epoch, place = divmod(position, self.length)
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = rng_for("order", self.seed, epoch).permutation(self.length)
        return Item(epoch, int(self._orders[epoch][place]))


class Plan:
    """Which images form which micro-batch. dataset: anything with `len` and `image_size(index)`.

    first_batch: the batch_size that the run began with, 0 = this one. Which images form a step
    follows from it, so that another batch_size leaves every step its images.
    """

    def __init__(
        self,
        dataset: Any,
        cfg: DataConfig,
        batch_size: int,
        accumulate: int,
        seed: int,
        first_batch: int = 0,
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
        self.first_batch = first_batch or batch_size
        self._order = Order(self.length, seed)
        self._window: tuple[int, int] = (0, 0)
        self._batches: list[list[Item]] = []

    def micro_batches(self, step: int) -> list[list[Item]]:
        """The `accumulate` micro-batches of a step, of batch_size items each."""
        start, stop = self._window
        if not start <= step < stop:
            self._window = start, stop = self.window(step)
            self._batches = self._fill(start, stop)
        count = self.step_images // self.first_batch
        first = (step - start) * count
        batches = self._batches[first : first + count]
        if self.first_batch == self.batch_size:
            return batches
        return self._grouped([item for batch in batches for item in batch], self.batch_size)

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
        groups = self._grouped([self._order[position] for position in positions], self.first_batch)
        order = rng_for("shuffle", self.seed, start).permutation(len(groups))
        return [groups[g] for g in order]

    def _grouped(self, items: list[Item], batch_size: int) -> list[list[Item]]:
        sizes = np.array([self._cells(item) for item in items])  # (n, 2)
        return [[items[i] for i in group] for group in bucket(sizes, batch_size)]

    def padded(self, items: Sequence[Item]) -> tuple[int, int]:
        """Height and width in pixels of the batch that these showings make."""
        height, width = np.max([self._cells(item) for item in items], axis=0)
        return int(height) * PAD_MULTIPLE, int(width) * PAD_MULTIPLE

    def _cells(self, item: Item) -> tuple[int, int]:
        """Output size in units of PAD_MULTIPLE."""
        height, width = self.dataset.image_size(item.image)
        rng = rng_for("geometry", self.seed, *item)
        output = draw_geometry(self.cfg, height, width, rng, train=True).output_size
        height, width = padded_size(*output)
        return height // PAD_MULTIPLE, width // PAD_MULTIPLE


def bucket(
    sizes: NDArray[np.int64], batch_size: int, chosen: NDArray[np.int64] | None = None
) -> list[NDArray[np.int64]]:
    """Group (n, 2) heights and widths into batches of similar size; n divides by batch_size.

    Halves the set again and again along the side (height or width) that leaves less padding. Equal
    sizes keep their order. chosen: the part to group, as indices. -> index arrays of batch_size.
    """
    if chosen is None:
        chosen = np.arange(len(sizes))
    batches = len(chosen) // batch_size
    if batches <= 1:
        return [chosen]
    middle = batches // 2 * batch_size
    splits = []
    for axis in (0, 1):
        order = chosen[np.argsort(sizes[chosen, axis], kind="stable")]
        splits.append((order[:middle], order[middle:]))
    best = min(splits, key=lambda parts: sum(_padded_area(sizes[part]) for part in parts))
    return [group for part in best for group in bucket(sizes, batch_size, part)]


def _padded_area(sizes: NDArray[np.int64]) -> int:
    return int(len(sizes) * sizes[:, 0].max() * sizes[:, 1].max())


class Images(Protocol):
    """What pre-training asks of images; any class with these four will do."""

    @property
    def version(self) -> str:
        """What exactly the data is, for a run's record: name and revision, or a hash."""
        ...

    def __len__(self) -> int: ...

    def image(self, index: int) -> Tensor:
        """(3, H, W) uint8 RGB: a record's image alone, which is all that evaluation reads."""
        ...

    def image_id(self, index: int) -> int | str: ...


class Dataset(Images, Protocol):
    """What a data set must offer; any class with these attributes will do."""

    categories: list[str]
    """Names; the position is our label."""
    category_ids: list[int]
    """COCO id of each label."""
    has_masks: bool

    def __getitem__(self, index: int) -> Record: ...

    def image_size(self, index: int) -> tuple[int, int]:
        """(height, width), without decoding the image."""
        ...

    def ground_truth(self) -> dict[str, Any]:
        """COCO dictionary for evaluation: crowds included, annotation ids from 1."""
        ...


def ids_of_labels(categories: Sequence[str], dataset: Dataset) -> list[int | None]:
    """COCO id of each of a detector's labels, by name; None for a class the data set lacks.

    categories: the detector's; where it knows none, its labels are in the data set's order. Raises
    ValueError naming the classes of the data set that the detector does not know.
    """
    unnamed = list(categories) in ([], generic_names(len(categories)))
    if unnamed and categories and len(categories) != len(dataset.categories):
        raise ValueError(
            f"the detector has {len(categories)} classes without names, the data set "
            f"{len(dataset.categories)}: they cannot be paired"
        )
    if unnamed or list(categories) == list(dataset.categories):
        return list(dataset.category_ids)
    unknown = [name for name in dataset.categories if name not in categories]
    if unknown:
        raise ValueError(
            f"the detector does not know the classes {unknown} of the data set; it was trained on "
            f"{list(categories)}. If they are the same under other names, in the same order, set "
            "model.categories = dataset.categories"
        )
    ids = dict(zip(dataset.categories, dataset.category_ids, strict=True))
    return [ids.get(name) for name in categories]


@dataclass(slots=True)
class MicroBatch:
    """What one process holds at a time."""

    images: list[Tensor]
    """(3, h, w) uint8, of similar size."""
    targets: list[Target]
    """None each for pre-training."""
    image_ids: list[int | str]
    number: int
    """Position within the global step: 0..accumulate-1, counted over all processes."""


class StepLoader:
    """Endless micro-batches, addressed by step: nothing has to be remembered to resume.

    plan: `micro_batches(step)` lists the `accumulate` micro-batches of a step, over all processes;
    rank r of `world` processes gets r, r + world, ... of every step. workers: loader processes; 0
    loads in this one.
    """

    def __init__(self, plan: Any, seed: int, rank: int, world: int, workers: int) -> None:
        if plan.accumulate % world:
            raise ValueError(
                f"accumulate={plan.accumulate} micro-batches cannot be shared by {world} "
                f"processes; make training.accumulate a multiple of {world} (and batch_size "
                "smaller in turn)"
            )
        self.plan, self.seed = plan, seed
        self.rank, self.world, self.workers = rank, world, workers

    def show(self, index: int, rng: np.random.Generator) -> tuple[Tensor, Target | None, int | str]:
        """An image as it is shown: its pixels, objects and id; all that is drawn comes from rng."""
        raise NotImplementedError

    def load(self, key: tuple[int, list[Item]]) -> MicroBatch:
        """One micro-batch of the plan: its number within the step, and its items."""
        number, items = key
        shown = [self.show(item.image, rng_for("geometry", self.seed, *item)) for item in items]
        images, targets, ids = (list(column) for column in zip(*shown, strict=True))
        return MicroBatch(images, targets, ids, number)

    def batches(self, start_step: int, stop_step: int) -> Iterator[list[MicroBatch]]:
        """For each step in [start_step, stop_step): this process's micro-batches, in order."""
        loaded = stream(self._keys(start_step, stop_step), self.load, self.workers)
        for _ in range(start_step, stop_step):
            yield [next(loaded) for _ in range(self.plan.accumulate // self.world)]

    def _keys(self, start_step: int, stop_step: int) -> Iterator[tuple[int, list[Item]]]:
        for step in range(start_step, stop_step):
            batches = list(enumerate(self.plan.micro_batches(step)))
            yield from batches[self.rank :: self.world]


class TrainLoader(StepLoader):
    """Augmented images and their objects, of similar size within a micro-batch."""

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
        first_batch: int = 0,
    ) -> None:
        plan = Plan(dataset, cfg, batch_size, accumulate, seed, first_batch)
        super().__init__(plan, seed, rank, world, workers)
        self.dataset, self.cfg = dataset, cfg
        colours_of(cfg)  # what is wrong with it is said before the first step

    def show(self, index: int, rng: np.random.Generator) -> tuple[Tensor, Target, int | str]:
        record = self.dataset[index]
        _, image, target = augmented(self.cfg, record, rng)
        return image, target, record.image_id
