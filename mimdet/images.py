"""Any image -> (3, H, W) uint8 RGB, resized as the detector wants it.

Files are read upright, as viewers show them: the EXIF orientation of phone photos is applied. Of
images that belong to an annotation file its sizes decide, as boxes and polygons refer to them:
pixels come as they are stored, as in COCO, unless only the upright image has the size that is said.

PIL decodes (torchvision's decoders give the same pixels, are less than a fifth faster and announced
for removal), and every mode has one way to RGB:

- grey and palette: expanded; transparency: dropped, the colour underneath stays;
- CMYK, YCbCr, LAB: converted;
- 16 bit grey: 0..65535 mapped linearly to 0..255 (a 16 bit colour PNG is read at 8 bits).
"""

import io
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is read. Pillow knows more, and some run programs: Ghostscript for PostScript."""
IMAGE_FILES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
"""Endings of their names, in lower case."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the image upright; 1 is upright."""
SIDEWAYS = (5, 6, 7, 8)
"""Orientations that exchange width and height."""
Source = str | Path | bytes
Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True, slots=True)
class Resize:
    """The test transform: every image to one short side, unless its long side grows too long."""

    short_side: int | None = None
    """Pixels; None leaves images as they are."""
    max_side: float = float("inf")

    def __call__(self, image: Tensor) -> Tensor:
        """(3, H, W) uint8 -> (3, h, w) uint8."""
        return resize_image(image, self.size(image.shape[1], image.shape[2]))

    def size(self, height: int, width: int) -> Size:
        """(height, width) an image of this size is brought to."""
        if self.short_side is None:
            return height, width
        return shortest_edge(height, width, self.short_side, self.max_side)


def read_image(source: Source, name: str = "", size: Size | None = None) -> Tensor:
    """Read a file (or its bytes) as (3, H, W) uint8 RGB: upright, or as it has `size`.

    name: how errors call an image that is given as bytes. size: (height, width) that annotations
    say; pixels as stored, unless only the upright image has it. Raises FileNotFoundError, and
    ValueError naming the file when it is no image, is cut off, or holds floating point pixels.
    """
    name = name or ("image" if isinstance(source, bytes) else str(source))
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        with open_image(data) as image:
            return pil_to_rgb(_turned(image, size))
    except Exception as error:  # what a decoder raises for a broken file is not limited to a few
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"it is none of {', '.join(FORMATS)}"
        raise ValueError(
            f"{name} cannot be read as an image ({reason}); replace the file or remove it from the "
            "data set, `mimdet check-data` lists every such file"
        ) from error


def open_image(source: Source) -> Image.Image:
    """A file (or its bytes) of one of `FORMATS`, its header read and no pixel.

    ValueError for more pixels than Pillow takes for a picture: a kilobyte may claim a billion.
    """
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, "r", FORMATS)
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        raise ValueError(
            f"{image.width} x {image.height} pixels are more than {most:,}; if it is a picture, "
            "raise PIL.Image.MAX_IMAGE_PIXELS"
        )
    return image


def _turned(image: Image.Image, size: Size | None) -> Image.Image:
    """The image upright where nothing, or nothing but its upright size, speaks against it."""
    image.load()  # before anything asks for tags, which would hide that it is cut off
    turned = orientation(image)
    stored, other = (image.height, image.width), (image.width, image.height)
    if turned == 1 or (size is not None and not (turned in SIDEWAYS and stored != size == other)):
        return image
    if size is None:
        warnings.warn(
            "an image file has an EXIF orientation, which is applied: boxes and masks refer to the "
            "upright image that viewers show",
            stacklevel=3,
        )
    return image.transpose(TURNS[turned])


def orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 where there is none, or none that can be read."""
    try:
        turned = image.getexif().get(0x0112, 1)
    except Exception:  # a broken tag does not spoil the pixels
        return 1
    return int(turned) if turned in TURNS else 1


def stored_size(source: Source) -> tuple[int, int]:
    """(height, width) of the stored pixels, from the file's header alone."""
    with open_image(source) as image:
        return image.height, image.width


def images_under(folder: Path) -> list[Path]:
    """The image files in a folder and those inside it, in order."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_FILES)


def find_images(words: Sequence[str]) -> list[Path]:
    """Files that are named, lie under a named folder or fit a pattern, each once; `-` reads names
    from standard input, one a line. FileNotFoundError for a word that names no image."""
    found: list[Path] = []
    for word in words:
        path = Path(word)
        if word == "-":
            found += find_images(sys.stdin.read().splitlines())
            continue
        fitting = sorted(map(Path, glob(word, recursive=True)))
        own = [path] if path.is_file() else images_under(path) if path.is_dir() else fitting
        if not own:
            holds = (
                "holds no image file" if path.is_dir() else "is no file, folder or pattern of any"
            )
            raise FileNotFoundError(f"{word} {holds}: images end with {', '.join(IMAGE_FILES)}")
        found += own
    return list(dict.fromkeys(found))


def pil_to_rgb(image: Image.Image) -> Tensor:
    """A PIL image of any mode -> (3, H, W) uint8 RGB; in memory the channels lie side by side.

    Raises ValueError for floating point pixels.
    """
    if image.mode == "F":
        raise ValueError("floating point pixels have no fixed range: save it as 8 or 16 bit")
    if image.mode == "I" or image.mode.startswith("I;"):
        grey = np.asarray(image).astype(np.float32) / 257.0  # 65535 / 257 = 255
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    data = bytearray(image.convert("RGB").tobytes())  # faster than numpy's way to the pixels
    pixels = torch.frombuffer(data, dtype=torch.uint8).view(image.height, image.width, 3)
    return pixels.permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)


def to_rgb(image: Any, name: str = "") -> Tensor:
    """A path, a file's bytes (which errors call `name`), PIL image, uint8 array or uint8 tensor ->
    uint8 (3, H, W) RGB."""
    if isinstance(image, Source):
        return read_image(image, name)
    if isinstance(image, np.ndarray):
        channels = image.shape[2] if image.ndim == 3 else int(image.ndim == 2)
        if image.dtype != np.uint8 or channels not in (1, 3, 4):
            raise ValueError(
                f"an array image must be uint8 of shape (H, W, 3) or (H, W), not {image.dtype} "
                f"{image.shape}; floats in 0..1 become (array * 255).astype('uint8'), and "
                "(3, H, W) becomes array.transpose(1, 2, 0)"
            )
        pixels = image[:, :, None] if image.ndim == 2 else image[:, :, :3]  # without alpha
        colours = pixels.repeat(3, axis=2) if channels == 1 else pixels
        return torch.from_numpy(np.ascontiguousarray(colours)).permute(2, 0, 1).contiguous()
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(
                f"a tensor image must be uint8 (3, H, W), not {image.dtype} {tuple(image.shape)}"
            )
        return image
    if hasattr(image, "convert"):
        image.load()
        if orientation(image) != 1:
            warnings.warn(
                "a PIL image has an EXIF orientation, which is not applied: give its path, or "
                "PIL.ImageOps.exif_transpose(image), for boxes and masks of the upright image",
                stacklevel=2,
            )
        return pil_to_rgb(image)
    raise ValueError(
        f"cannot read an image from {type(image).__name__}: give a path, a PIL image, an array "
        "or a tensor"
    )


def resize_image(image: Tensor, size: Size) -> Tensor:
    """image: (3, H, W) uint8 -> (3, *size) uint8, bilinear and antialiased."""
    if tuple(image.shape[1:]) == size:
        return image
    batch = image[None].contiguous(memory_format=torch.channels_last)  # the fast uint8 kernel
    return F.interpolate(batch, size, mode="bilinear", antialias=True)[0].contiguous()


def shortest_edge(height: int, width: int, short_side: int, max_side: float) -> Size:
    """Size with the given short side, smaller where the long side would exceed max_side.

    Rounds as detectron2's ResizeShortestEdge.
    """
    scale = short_side / min(height, width)
    new_height, new_width = height * scale, width * scale
    if max(new_height, new_width) > max_side:
        shrink = max_side / max(new_height, new_width)
        new_height, new_width = new_height * shrink, new_width * shrink
    return max(1, int(new_height + 0.5)), max(1, int(new_width + 0.5))
