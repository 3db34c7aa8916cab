"""Any image file -> (3, H, W) uint8 RGB.

Pixels come as they are stored: the EXIF orientation is not applied, because COCO's sizes, boxes and
polygons refer to stored pixels. PIL decodes (torchvision's decoders give the same pixels, are less
than a fifth faster and announced for removal), and every mode has one way to RGB:

- grey and palette: expanded; transparency: dropped, the colour underneath stays;
- CMYK, YCbCr, LAB: converted;
- 16 bit grey: 0..65535 mapped linearly to 0..255 (a 16 bit colour PNG is read at 8 bits).
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Source = str | Path | bytes


def read_image(source: Source, name: str = "") -> Tensor:
    """Read a file (or its bytes) as (3, H, W) uint8 RGB.

    name: how errors call an image that is given as bytes. Raises FileNotFoundError, and ValueError
    naming the file when it is no image, is cut off, or holds floating point pixels.
    """
    name = name or ("image" if isinstance(source, bytes) else str(source))
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as image:
            return pil_to_rgb(image)
    except Exception as error:  # what a decoder raises for a broken file is not limited to a few
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{name} cannot be read as an image ({reason}); replace the file or remove it from the "
            "data set, `mimdet check-data` lists every such file"
        ) from error


def image_size(source: Source) -> tuple[int, int]:
    """(height, width) of the stored pixels, from the file's header alone."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return image.height, image.width


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
