"""ShapesCOCO: the built-in benchmark, drawn on the fly from a seed.

Scenes of textured shapes that cover each other on cluttered backgrounds, with exact instance
masks. Scene i of a split is a pure function of (level, size, seed, split, i) and has the same bytes
on every machine, so nothing is stored and any process may draw any scene.
"""

import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mimdet.data.annotations import AnnotatedImages, Annotation, RunLengths
from mimdet.data.rasters import crops_from_bitmaps, extent
from mimdet.data.scenes import LEVELS, Scene, draw_scene
from mimdet.data.textures import Draws
from mimdet.files import read_json, write_folder, write_json
from mimdet.images import to_rgb
from mimdet.structures import Record, Target, bitmap_to_rle

SPLITS = ("train", "val")
SMALLEST = 32
"""Side of the smallest scene: the small objects of a smaller one would be a single pixel."""


class ShapesCOCO(AnnotatedImages):
    """`length` scenes of one level; meets the data set contract of `mimdet.data.loader`."""

    has_masks = True

    def __init__(
        self,
        level: str = "shapes-v1-medium",
        size: int = 0,
        length: int = 1000,
        split: Literal["train", "val"] = "train",
        seed: int = 0,
    ) -> None:
        """level: a key of LEVELS; size: side of the square scenes in pixels, 0 = that of the level
        (v1: 128, v2: 256).

        Scenes do not depend on `length`, and no scene of one split occurs in the other.
        Raises ValueError naming the argument that cannot be used.
        """
        if level not in LEVELS:
            raise ValueError(f"level={level!r} is not one of {sorted(LEVELS)}")
        size = size or LEVELS[level].size
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is not one of {list(SPLITS)}")
        if size < SMALLEST:
            raise ValueError(f"size={size}: scenes have at least {SMALLEST} pixels a side")
        if length < 0 or seed < 0:
            raise ValueError(f"length={length}, seed={seed}: neither may be negative")
        self.level = level
        self.size = size
        self.length = length
        self.split = split
        self.seed = seed
        self.categories = list(LEVELS[level].classes)
        self.category_ids = list(range(1, len(self.categories) + 1))
        self._ground_truth: dict[str, Any] | None = None

    @property
    def area_scale(self) -> float:
        """Evaluation: v1 calls small what is as small, in share, on a 640-pixel COCO image; v2 what
        is below COCO's 32 pixels in scenes of 256."""
        return (self.size / LEVELS[self.level].coco_size) ** 2

    @property
    def version(self) -> str:
        """Level, size and revision of the drawing code: belongs to every result."""
        return f"{self.level}@{self.size}/r{LEVELS[self.level].revision}"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Record:
        scene = self.scene(index)
        boxes = np.array([extent(mask) for mask in scene.masks], dtype=np.float32).reshape(-1, 4)
        target = Target(
            torch.from_numpy(boxes),
            torch.from_numpy(scene.labels),
            crops_from_bitmaps(scene.masks, boxes),
        )
        return Record(to_rgb(scene.image), target, self.image_id(index))

    def image(self, index: int) -> Tensor:
        return to_rgb(self.scene(index).image)

    def scene(self, index: int) -> Scene:
        """Everything that is known of a scene. Raises IndexError outside 0..length-1."""
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        name = zlib.crc32(self.level.encode())
        draws = Draws(name, self.size, self.seed, SPLITS.index(self.split), index)
        return draw_scene(LEVELS[self.level], self.size, draws)

    def image_size(self, index: int) -> tuple[int, int]:
        return self.size, self.size

    def image_id(self, index: int) -> int:
        return index

    def ground_truth(self) -> dict[str, Any]:
        """COCO format with exact run lengths; draws every scene once, then remembers."""
        if self._ground_truth is None:
            info: dict[str, Any] = {"description": "ShapesCOCO", "version": self.version}
            info |= {"split": self.split, "seed": self.seed}
            self._ground_truth = super().ground_truth() | {"info": info}
        return self._ground_truth

    def annotations(self, index: int) -> list[Annotation]:
        scene = self.scene(index)
        found = []
        for mask, label in zip(scene.masks, scene.labels.tolist(), strict=True):
            left, top, right, bottom = extent(mask)
            bbox = (left, top, right - left, bottom - top)
            counts = bitmap_to_rle(mask)["counts"]
            runs = RunLengths(size=[self.size, self.size], counts=counts)
            number = self.category_ids[label]
            found.append(Annotation("", number, bbox, int(mask.sum()), False, runs))
        return found


def export(dataset: ShapesCOCO, folder: str | Path) -> None:
    """Write `annotations.json` (COCO format, run lengths) and `images/000000.png`, ...

    The folder appears under its name when it is complete. An earlier export is replaced; any other
    folder that is not empty, or a file, is left alone and raises ValueError.
    """
    from PIL import Image

    folder = Path(folder)
    if folder.exists() and not _replaceable(folder):
        raise ValueError(f"{folder} holds something else than an export; name a new folder")
    truth = dataset.ground_truth()
    images = [entry | {"file_name": f"{entry['id']:06d}.png"} for entry in truth["images"]]

    def write(beside: Path) -> None:
        (beside / "images").mkdir()
        for entry in images:
            image = Image.fromarray(dataset.scene(entry["id"]).image)
            image.save(beside / "images" / entry["file_name"])
        write_json(beside / "annotations.json", truth | {"images": images}, indent=None)

    write_folder(folder, write)


def _replaceable(folder: Path) -> bool:
    """True for an empty folder and for a complete export with nothing added."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if names != {"images", "annotations.json"}:
        return not names
    try:
        content = read_json(folder / "annotations.json")
        return content["info"]["description"] == "ShapesCOCO"
    except (ValueError, KeyError, TypeError, OSError):
        return False
