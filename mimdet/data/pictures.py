"""Images without annotations -> batches for pre-training, a pure function of (seed, step)."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mimdet.config import PicturesConfig
from mimdet.data.augment import Geometry, rng_for, transform_image
from mimdet.data.loader import stream
from mimdet.data.shapes import ShapesCOCO
from mimdet.images import image_size, pil_to_rgb, read_image, resize_image

IMAGE_FILES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
TRIES = 10
"""Draws of a crop before the whole image is taken."""


class Pictures(Protocol):
    """Anything with these four will do."""

    @property
    def version(self) -> str:
        """What exactly the data is: goes into the run's record."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor:
        """(3, h, w) uint8 RGB."""
        ...

    def name(self, index: int) -> str:
        """What to call an image in messages."""
        ...


class FolderPictures:
    """All image files under a folder and its subfolders, in the order of their names."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"data.folder={str(folder)!r} is not a folder")
        self.files = sorted(
            path for path in self.folder.rglob("*") if path.suffix.lower() in IMAGE_FILES
        )
        if not self.files:
            raise ValueError(f"data.folder={str(folder)!r} holds no image files {IMAGE_FILES}")
        names = "\n".join(str(path.relative_to(self.folder)) for path in self.files)
        digest = hashlib.sha256(names.encode()).hexdigest()[:16]
        self.version = f"{self.folder.name}: {len(self.files)} files, names sha256:{digest}"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return read_image(self.files[index])

    def name(self, index: int) -> str:
        return str(self.files[index])

    def image_size(self, index: int) -> tuple[int, int]:
        return image_size(self.files[index])


class HubPictures:
    """The image column of a Hugging Face table."""

    def __init__(self, name: str, split: str, column: str) -> None:
        from datasets import load_dataset

        self.table = load_dataset(name, split=split)
        if column not in self.table.column_names:
            raise ValueError(
                f"{name} has no column data.hub_column={column!r}; it has {self.table.column_names}"
            )
        self.column = column
        self.version = f"{name} {split} {self.table._fingerprint}"

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Tensor:
        return pil_to_rgb(self.table[index][self.column])

    def name(self, index: int) -> str:
        return f"row {index}"


class ShapesPictures:
    """ShapesCOCO scenes without their annotations."""

    def __init__(self, scenes: ShapesCOCO) -> None:
        self.scenes = scenes
        self.version = scenes.version

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.scenes.scene(index).image).permute(2, 0, 1)

    def name(self, index: int) -> str:
        return f"scene {index}"


class Part:
    """Some of the pictures, by their indices."""

    def __init__(self, pictures: Pictures, indices: Sequence[int]) -> None:
        self.pictures, self.indices = pictures, indices
        self.version = pictures.version

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        return self.pictures[self.indices[index]]

    def name(self, index: int) -> str:
        return self.pictures.name(self.indices[index])


def build_pictures(cfg: PicturesConfig, seed: int) -> tuple[Pictures, Pictures]:
    """(training images, held-out images). Raises ValueError naming the field that is wrong."""
    if cfg.source == "shapes":
        level, size = cfg.shapes_level, cfg.shapes_size
        train = ShapesCOCO(level, size, cfg.shapes_train, "train", seed)
        return ShapesPictures(train), ShapesPictures(ShapesCOCO(level, size, cfg.held_out, "val"))
    pictures: Pictures
    if cfg.source == "folder":
        pictures = FolderPictures(cfg.folder)
    elif cfg.source == "hub":
        pictures = HubPictures(cfg.hub_name, cfg.hub_split, cfg.hub_column)
    else:
        raise ValueError(f"data.source={cfg.source!r}: use 'folder', 'hub' or 'shapes'")
    count = len(pictures) - cfg.held_out
    if count < 1:
        raise ValueError(
            f"data.held_out={cfg.held_out} leaves no image of {len(pictures)} to train on"
        )
    return Part(pictures, range(count)), Part(pictures, range(count, len(pictures)))


@dataclass(slots=True)
class PictureBatch:
    """What one process holds at a time."""

    images: list[Tensor]
    """(3, side, side) uint8."""
    image_ids: list[int | str]
    number: int
    """Position within the global step: 0..accumulate-1, counted over all processes."""


class PictureLoader:
    """Endless batches, addressed by step, of random square crops that are mirrored half the time.

    The same contract as `mimdet.data.loader.TrainLoader`: rank r of `world` gets the micro-batches
    r, r + world, ... of every step, and nothing has to be remembered to resume.
    """

    def __init__(
        self,
        pictures: Pictures,
        cfg: PicturesConfig,
        side: int,
        batch_size: int,
        accumulate: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if accumulate % world:
            raise ValueError(
                f"accumulate={accumulate} micro-batches cannot be shared by {world} processes; "
                f"make training.accumulate a multiple of {world}"
            )
        self.length, self.seed, self.workers = len(pictures), seed, cfg.workers
        self.batch_size, self.accumulate = batch_size, accumulate
        self.rank, self.world = rank, world
        self._task = _CropTask(pictures, cfg, side, seed)
        self._orders: dict[int, np.ndarray[Any, Any]] = {}

    def batches(self, start_step: int, stop_step: int) -> Iterator[list[PictureBatch]]:
        """For each step in [start_step, stop_step): this process's micro-batches, in order."""
        loaded = stream(self._keys(start_step, stop_step), self._task, self.workers)
        for _ in range(start_step, stop_step):
            yield [next(loaded) for _ in range(self.accumulate // self.world)]

    def _keys(self, start_step: int, stop_step: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        for step in range(start_step, stop_step):
            for number in range(self.rank, self.accumulate, self.world):
                first = (step * self.accumulate + number) * self.batch_size
                yield number, [self._item(first + i) for i in range(self.batch_size)]

    def _item(self, position: int) -> tuple[int, int]:
        """(epoch, image) of a position in the endless sequence of epochs."""
        epoch, place = divmod(position, self.length)
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = rng_for("order", self.seed, epoch).permutation(self.length)
        return epoch, int(self._orders[epoch][place])


class _CropTask:
    """(number, items) -> PictureBatch; picklable."""

    def __init__(self, pictures: Pictures, cfg: PicturesConfig, side: int, seed: int) -> None:
        self.pictures, self.cfg, self.side, self.seed = pictures, cfg, side, seed

    def __call__(self, key: tuple[int, list[tuple[int, int]]]) -> PictureBatch:
        number, items = key
        batch = PictureBatch([], [], number)
        for epoch, index in items:
            image = self.pictures[index]
            rng = rng_for("geometry", self.seed, epoch, index)
            crop = draw_crop(self.cfg, image.shape[1], image.shape[2], rng)
            flip = bool(rng.random() < 0.5)
            geometry = Geometry(crop, (self.side, self.side), flip_h=flip)
            batch.images.append(transform_image(geometry, image))
            batch.image_ids.append(self.pictures.name(index))
        return batch


def draw_crop(
    cfg: PicturesConfig, height: int, width: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 of a crop of random area and aspect (torchvision's RandomResizedCrop)."""
    widest = math.log(cfg.crop_aspect)
    for _ in range(TRIES):
        area = height * width * rng.uniform(*cfg.crop_scale)
        aspect = math.exp(rng.uniform(-widest, widest))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return x, y, x + w, y + h
    return centre_square(height, width)


def centre_square(height: int, width: int) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 of the largest square in the middle."""
    side = min(height, width)
    x, y = (width - side) // 2, (height - side) // 2
    return x, y, x + side, y + side


def held_out_images(pictures: Pictures, side: int) -> list[Tensor]:
    """The middle square of every picture, (3, side, side) uint8."""
    images = []
    for index in range(len(pictures)):
        image = pictures[index]
        x1, y1, x2, y2 = centre_square(image.shape[1], image.shape[2])
        images.append(resize_image(image[:, y1:y2, x1:x2], (side, side)))
    return images
