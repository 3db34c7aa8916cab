"""What a pixel of every kind of image file becomes."""

import numpy as np
import pytest
import torch
from PIL import Image

from mimdet.images import read_image, stored_size


def test_image_modes(tmp_path):
    """What a pixel of every mode becomes."""
    expected = {
        "RGB": ((10, 20, 30), [10, 20, 30]),
        "L": (77, [77, 77, 77]),
        "1": (1, [255, 255, 255]),
        "LA": ((77, 0), [77, 77, 77]),
        "RGBA": ((10, 20, 30, 0), [10, 20, 30]),
        "CMYK": ((0, 0, 255, 0), [255, 255, 0]),
        "I;16": (32896, [128, 128, 128]),
    }
    for mode, (pixel, rgb) in expected.items():
        path = tmp_path / f"{mode[0]}{len(mode)}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (5, 4), pixel).save(path)
        image = read_image(path)
        assert image.shape == (3, 4, 5) and image.dtype == torch.uint8
        assert image[:, 2, 3].tolist() == rgb, mode
        assert stored_size(path) == (4, 5)
    palette = Image.new("P", (5, 4), 3)
    palette.putpalette([0] * 9 + [9, 8, 7] + [0] * 756)
    palette.save(tmp_path / "p.png")
    assert read_image(tmp_path / "p.png")[:, 0, 0].tolist() == [9, 8, 7]
    Image.new("F", (5, 4)).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match=r"f.tif.*floating point"):
        read_image(tmp_path / "f.tif")


def test_jpeg_is_stored_pixels(tmp_path):
    smooth = np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    Image.fromarray(smooth).save(tmp_path / "x.jpg", quality=95, exif=exif)
    image = read_image(tmp_path / "x.jpg")
    assert image.shape == (3, 40, 60)
    difference = image.permute(1, 2, 0).int() - torch.from_numpy(smooth).int()
    assert difference.abs().float().mean() < 4
    Image.new("L", (9, 8), 100).save(tmp_path / "grey.jpg")
    assert (read_image(tmp_path / "grey.jpg") == 100).all()
    Image.new("CMYK", (9, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    red, green, blue = read_image(tmp_path / "cmyk.jpg")[:, 4, 4].tolist()
    assert red > 240 and green < 15 and blue < 15
