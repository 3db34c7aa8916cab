"""Which images form which micro-batch of which step: a pure function of (seed, step).

Every epoch is a permutation of the data set, and the steps read the epochs one after the other.
Output sizes are drawn before batching, so a window of several steps can be sorted into
micro-batches of similar size: at batch 16 of the paper's recipe on COCO, padding then adds about a
tenth to the tokens instead of doubling them. Micro-batches are shuffled within their window. Only
one window is computed at a time, so a start at any step is immediate.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mimdet.config import DataConfig
from mimdet.data.augment import Size, draw_geometry, rng_for
from mimdet.structures import PAD_MULTIPLE, padded_size

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
