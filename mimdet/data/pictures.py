"""Images without annotations -> batches for pre-training, a pure function of (seed, step)."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mimdet.config import PicturesConfig
from mimdet.data.augment import Geometry, Window, transform_image
from mimdet.data.loader import Images, Item, Order, StepLoader
from mimdet.data.shapes import ShapesCOCO
from mimdet.images import IMAGE_FILES, images_under, resize_image, to_rgb

TRIES = 10
"""Draws of a crop before the whole image is taken."""


class ListedImages:
    """Image files, or the image column of a Hugging Face table, whose rows are read when asked."""

    def __init__(self, images: Sequence[Any], version: str) -> None:
        self.images, self.version = images, version

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Tensor:
        return to_rgb(self.images[index])

    def image_id(self, index: int) -> str:
        return str(self.images[index]) if isinstance(self.images, list) else f"row {index}"


def build_images(cfg: PicturesConfig, seed: int) -> tuple[Images, Images]:
    """(training images, held-out images). Raises ValueError naming the field that is wrong."""
    if cfg.source == "shapes":
        level, size = cfg.shapes_level, cfg.shapes_size
        scenes = ShapesCOCO(level, size, cfg.shapes_train, "train", seed)
        return scenes, ShapesCOCO(level, size, cfg.held_out, "val")
    if cfg.source == "folder":
        folder = Path(cfg.folder)
        files = images_under(folder)
        if not files:
            raise ValueError(
                f"data.folder={cfg.folder!r} is no folder with image files {sorted(IMAGE_FILES)}"
            )
        count = _training_part(len(files), cfg)
        names = "\n".join(path.relative_to(folder).as_posix() for path in files)
        digest = hashlib.sha256(names.encode()).hexdigest()[:16]
        version = f"{folder.name}: {len(files)} files, names sha256:{digest}"
        return ListedImages(files[:count], version), ListedImages(files[count:], version)
    if cfg.source == "hub":
        from datasets import load_dataset

        table = load_dataset(cfg.hub_name, split=cfg.hub_split)
        if cfg.hub_column not in table.column_names:
            raise ValueError(
                f"{cfg.hub_name} has no column data.hub_column={cfg.hub_column!r}; it has "
                f"{table.column_names}"
            )
        count = _training_part(len(table), cfg)
        version = f"{cfg.hub_name} {cfg.hub_split} {table._fingerprint}"
        parts = (table.select(range(count)), table.select(range(count, len(table))))
        train, held_out = (ListedImages(part[cfg.hub_column], version) for part in parts)
        return train, held_out
    raise ValueError(f"data.source={cfg.source!r}: use 'folder', 'hub' or 'shapes'")


def _training_part(count: int, cfg: PicturesConfig) -> int:
    """How many of the images are trained on: the last are held out."""
    if count <= cfg.held_out:
        raise ValueError(f"data.held_out={cfg.held_out} leaves no image of {count} to train on")
    return count - cfg.held_out


class ImagePlan:
    """Which images form which micro-batch: as they come, for all crops are of one size."""

    def __init__(self, length: int, batch_size: int, accumulate: int, seed: int) -> None:
        self.length, self.batch_size, self.accumulate = length, batch_size, accumulate
        self._order = Order(length, seed)

    def micro_batches(self, step: int) -> list[list[Item]]:
        first = step * self.accumulate * self.batch_size
        starts = range(first, first + self.accumulate * self.batch_size, self.batch_size)
        return [[self._order[start + i] for i in range(self.batch_size)] for start in starts]


class ImageLoader(StepLoader):
    """Random square crops that are mirrored half the time."""

    def __init__(
        self,
        images: Images,
        cfg: PicturesConfig,
        side: int,
        batch_size: int,
        accumulate: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        plan = ImagePlan(len(images), batch_size, accumulate, seed)
        super().__init__(plan, seed, rank, world, cfg.workers)
        self.images, self.cfg, self.side = images, cfg, side

    def show(self, index: int, rng: np.random.Generator) -> tuple[Tensor, None, int | str]:
        image = self.images.image(index)
        crop = draw_crop(self.cfg, image.shape[1], image.shape[2], rng)
        geometry = Geometry(crop, (self.side, self.side), flip_h=bool(rng.random() < 0.5))
        return transform_image(geometry, image), None, self.images.image_id(index)


def draw_crop(cfg: PicturesConfig, height: int, width: int, rng: np.random.Generator) -> Window:
    """A crop of random area and aspect (torchvision's RandomResizedCrop)."""
    widest = math.log(cfg.crop_aspect)
    for _ in range(TRIES):
        area = height * width * rng.uniform(*cfg.crop_scale)
        aspect = math.exp(rng.uniform(-widest, widest))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return x, y, x + w, y + h
    return centre_square(height, width)


def centre_square(height: int, width: int) -> Window:
    """The largest square in the middle."""
    side = min(height, width)
    x, y = (width - side) // 2, (height - side) // 2
    return x, y, x + side, y + side


def held_out_images(images: Images, side: int) -> list[Tensor]:
    """The middle square of every image, (3, side, side) uint8."""
    squares = []
    for index in range(len(images)):
        image = images.image(index)
        x1, y1, x2, y2 = centre_square(image.shape[1], image.shape[2])
        squares.append(resize_image(image[:, y1:y2, x1:x2], (side, side)))
    return squares
