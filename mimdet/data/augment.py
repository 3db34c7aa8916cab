"""The paper's training and test transforms, and the large-scale jitter of the baselines.

A transform is drawn as a `Geometry` first, from the image's size alone, and applied later. So the
loader knows every output size before it reads a pixel and can batch images of similar size; and a
recipe of several steps (resize, crop, resize) becomes one crop and one antialiased resize, which is
faster and sharper than repeated interpolation. The sizes are exactly those of the steps; a crop's
edges are rounded to whole pixels of the stored image, and boxes follow the rounded edges. Colour
and blur, which the paper leaves as they are, are changed last.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from mimdet.config import DataConfig
from mimdet.images import Resize, Size, resize_image, shortest_edge
from mimdet.structures import Crops, Record, Target

Window = tuple[int, int, int, int]
"""x1, y1, x2, y2 in whole pixels."""

LSJ_FILL = 128
"""Grey of the empty part of an LSJ canvas, as detectron2's FixedSizeCrop pads."""

MIN_SIDE = 1e-5
"""Pixels; an object whose box is not larger is dropped, as detectron2 does."""


def rng_for(purpose: Literal["order", "geometry", "shuffle"], *numbers: int) -> np.random.Generator:
    """A generator that is a pure function of its arguments, e.g. ("geometry", seed, epoch, index).

    The purpose separates streams: numpy pads a seed with zeros, so (1, 2) and (1, 2, 0) are one.
    """
    purposes = {"order": 1, "geometry": 2, "shuffle": 3}
    return np.random.default_rng((purposes[purpose], *numbers))


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where each pixel of an image goes: crop, resize, transpose, flip, pad, in this order."""

    crop: Window
    """The part of the stored image that is used."""
    size: Size
    """What the crop is resized to."""
    transpose: bool = False
    """Swap rows and columns (mirror at the main diagonal)."""
    flip_h: bool = False
    """Mirror left-right."""
    flip_v: bool = False
    """Mirror up-down."""
    canvas: Size | None = None
    """Pad with grey, right and bottom, to this size; None = no padding."""

    @property
    def content_size(self) -> Size:
        """(height, width) of the picture without padding."""
        height, width = self.size
        return (width, height) if self.transpose else (height, width)

    @property
    def output_size(self) -> Size:
        return self.canvas or self.content_size


def resize_of(cfg: DataConfig) -> Resize:
    """The test transform: short side `test_short_side`, long side at most `max_side`."""
    return Resize(cfg.test_short_side, cfg.max_side)


def draw_geometry(
    cfg: DataConfig, height: int, width: int, rng: np.random.Generator, train: bool
) -> Geometry:
    """Draw the transform of an image of height x width pixels; needs no pixels.

    train=False, or `augment="none"`, is the test transform and takes nothing from rng.
    """
    whole = (0, 0, width, height)
    if not train or cfg.augment == "none":
        return Geometry(whole, resize_of(cfg).size(height, width))
    flip_h = rng.random() < 0.5
    flip_v = cfg.flips != "horizontal" and rng.random() < 0.5
    transpose = cfg.flips == "dihedral" and rng.random() < 0.5
    canvas = None
    if cfg.augment == "lsj":
        crop, size = _draw_lsj(cfg, (height, width), rng)
        canvas = (cfg.lsj_size, cfg.lsj_size)
    elif cfg.augment in ("paper", "multiscale"):
        crop, seen = whole, (height, width)
        if cfg.augment == "paper" and rng.random() < cfg.crop_probability:
            crop, seen = _draw_crop(cfg, (height, width), rng)
        short_side = cfg.short_sides[rng.integers(len(cfg.short_sides))]
        size = shortest_edge(*seen, short_side, cfg.max_side)
    else:
        raise ValueError(
            f"data.augment={cfg.augment!r}: use 'paper', 'lsj', 'multiscale' or 'none'"
        )
    return Geometry(crop, size, transpose, flip_h, flip_v, canvas)


def augmented(
    cfg: DataConfig, record: Record, rng: np.random.Generator
) -> tuple[Geometry, Tensor, Target]:
    """A training's showing of an image: how it was moved, its pixels and objects, as of `apply`.

    All that is drawn comes from rng.
    """
    height, width = record.image.shape[1:]
    geometry = draw_geometry(cfg, height, width, rng, train=True)
    image, target = apply(geometry, record)
    colours = colours_of(cfg)
    if colours is not None:
        image = image.clone()  # it may be the record's own
        height, width = geometry.content_size  # padding stays grey
        with torch.random.fork_rng(devices=()):  # torchvision draws from PyTorch's own generator
            torch.default_generator.manual_seed(int(rng.integers(1 << 63)))
            image[:, :height, :width] = colours(image[:, :height, :width])
    return geometry, image, target


def colours_of(cfg: DataConfig) -> v2.Transform | None:
    """The transform that `data.colour_jitter` and `data.blur` ask for. ValueError naming them."""
    steps: list[v2.Transform] = []
    try:
        if any(cfg.colour_jitter):
            steps.append(v2.ColorJitter(*cfg.colour_jitter))
        if cfg.blur:
            reach = 2 * max(1, math.ceil(3 * cfg.blur)) + 1  # pixels; beyond, the bell is nought
            steps.append(v2.RandomApply([v2.GaussianBlur(reach, (0.1, cfg.blur))]))
    except ValueError as error:
        where = f"data.colour_jitter={cfg.colour_jitter}, data.blur={cfg.blur}"
        raise ValueError(f"{where}: {error}") from error
    return v2.Compose(steps) if steps else None


def apply(geometry: Geometry, record: Record) -> tuple[Tensor, Target]:
    """-> image (3, *geometry.output_size) uint8, and its objects in the new pixels.

    Boxes are clipped to the picture; objects with no box or no part of their mask left are dropped.
    """
    return transform_image(geometry, record.image), transform_target(geometry, record.target)


def transform_image(geometry: Geometry, image: Tensor) -> Tensor:
    """image: (3, H, W) uint8 -> (3, *geometry.output_size) uint8."""
    x1, y1, x2, y2 = geometry.crop
    assert x2 <= image.shape[2] and y2 <= image.shape[1], "geometry of another image"
    image = _flipped(geometry, resize_image(image[:, y1:y2, x1:x2], geometry.size))
    if geometry.canvas is not None:
        height, width = geometry.content_size
        padded = torch.full((3, *geometry.canvas), LSJ_FILL, dtype=torch.uint8)
        padded[:, :height, :width] = image
        image = padded
    return image.contiguous()


def transform_target(geometry: Geometry, target: Target) -> Target:
    """The objects after the transform; masks keep their bitmaps, only flipped with the image."""
    height, width = geometry.content_size
    limits = torch.tensor([width, height, width, height], dtype=torch.float32)
    boxes = _moved(geometry, target.boxes).clamp(min=0).minimum(limits)
    keep = (boxes[:, 2:] - boxes[:, :2] > MIN_SIDE).all(1)
    masks = None
    if target.masks is not None:
        bitmaps = _flipped(geometry, target.masks.bitmaps)
        masks = Crops(_moved(geometry, target.masks.boxes), bitmaps)
        keep &= _visible(masks, height, width)
        masks = masks[keep]
    return Target(boxes[keep], target.labels[keep], masks)


def _draw_crop(cfg: DataConfig, stored: Size, rng: np.random.Generator) -> tuple[Window, Size]:
    """Resize the short side to one of `crop_short_sides`, then cut a window with both sides drawn
    from `crop_sides` (detectron2's "absolute_range": a side the image does not have is its whole).

    -> the window in stored pixels, its (height, width) in resized pixels.
    """
    short_side = cfg.crop_short_sides[rng.integers(len(cfg.crop_short_sides))]
    resized = shortest_edge(*stored, short_side, float("inf"))
    low, high = cfg.crop_sides
    crop_h, crop_w = (int(rng.integers(min(s, low), min(s, high) + 1)) for s in resized)
    top = int(rng.integers(resized[0] - crop_h + 1))
    left = int(rng.integers(resized[1] - crop_w + 1))
    window = (left, top, left + crop_w, top + crop_h)
    return _stored_pixels(window, resized, stored), (crop_h, crop_w)


def _draw_lsj(cfg: DataConfig, stored: Size, rng: np.random.Generator) -> tuple[Window, Size]:
    """Resize to fit a square of lsj_size x scale, then cut out at most lsj_size x lsj_size.

    detectron2's FixedSizeCrop draws one number for both offsets; so do we.
    -> the window in stored pixels, its (height, width) in resized pixels.
    """
    side = cfg.lsj_size
    factor = side * rng.uniform(*cfg.lsj_scale) / max(stored)
    resized = max(1, round(stored[0] * factor)), max(1, round(stored[1] * factor))
    place = rng.random()
    top, left = (round(max(length - side, 0) * place) for length in resized)
    size = min(resized[0], side), min(resized[1], side)
    window = (left, top, left + size[1], top + size[0])
    return _stored_pixels(window, resized, stored), size


def _stored_pixels(window: Window, resized: Size, stored: Size) -> Window:
    """A window of the resized image in whole pixels of the stored one, at least 1 x 1."""
    x1, x2 = (round(x * stored[1] / resized[1]) for x in window[::2])
    y1, y2 = (round(y * stored[0] / resized[0]) for y in window[1::2])
    x1, y1 = min(x1, stored[1] - 1), min(y1, stored[0] - 1)
    return x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)


def _flipped(geometry: Geometry, planes: Tensor) -> Tensor:
    """planes: (N, h, w) -> transposed and flipped as the geometry says."""
    if geometry.transpose:
        planes = planes.transpose(1, 2)
    axes = [axis for axis, flip in ((2, geometry.flip_h), (1, geometry.flip_v)) if flip]
    return planes.flip(axes) if axes else planes


def _moved(geometry: Geometry, boxes: Tensor) -> Tensor:
    """boxes: (N, 4) xyxy in stored pixels -> in output pixels, not clipped."""
    x1, y1, x2, y2 = geometry.crop
    scale_x, scale_y = geometry.size[1] / (x2 - x1), geometry.size[0] / (y2 - y1)
    scale = torch.tensor([scale_x, scale_y, scale_x, scale_y], dtype=torch.float32)
    boxes = (boxes - torch.tensor([x1, y1, x1, y1], dtype=torch.float32)) * scale
    if geometry.transpose:
        boxes = boxes[:, [1, 0, 3, 2]]
    height, width = geometry.content_size
    if geometry.flip_h:
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    if geometry.flip_v:
        boxes[:, [1, 3]] = height - boxes[:, [3, 1]]
    return boxes


def _visible(masks: Crops, height: int, width: int) -> Tensor:
    """(N,) bool: whether the centre of any cell of the mask lies inside height x width."""
    rows, columns = masks.bitmaps.shape[1:]
    x1, y1, x2, y2 = masks.boxes[:, :, None].unbind(1)  # (N, 1) each
    xs = x1 + (x2 - x1) * (torch.arange(columns) + 0.5) / columns  # (N, columns)
    ys = y1 + (y2 - y1) * (torch.arange(rows) + 0.5) / rows  # (N, rows)
    inside_x = (xs >= 0) & (xs <= width)
    inside_y = (ys >= 0) & (ys <= height)
    parts = (part.split(1000) for part in (masks.bitmaps, inside_y, inside_x))  # of few bytes each
    seen = [
        (bitmaps.bool() & in_y[:, :, None] & in_x[:, None, :]).flatten(1).any(1)
        for bitmaps, in_y, in_x in zip(*parts, strict=True)
    ]
    return torch.cat(seen)
