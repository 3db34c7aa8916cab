"""What a pixel of every kind of image file becomes."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mimdet.images import read_image, stored_size, to_rgb


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
    image = read_image(tmp_path / "x.jpg", size=(40, 60))
    assert image.shape == (3, 40, 60)
    difference = image.permute(1, 2, 0).int() - torch.from_numpy(smooth).int()
    assert difference.abs().float().mean() < 4
    Image.new("L", (9, 8), 100).save(tmp_path / "grey.jpg")
    assert (read_image(tmp_path / "grey.jpg") == 100).all()
    Image.new("CMYK", (9, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    red, green, blue = read_image(tmp_path / "cmyk.jpg")[:, 4, 4].tolist()
    assert red > 240 and green < 15 and blue < 15


PIXELS = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)


def tagged(path, orientation):
    """A PNG of 2 x 3 (H x W) stored pixels."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(path, exif=exif)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_upright_unless_annotations_say_otherwise(tmp_path, orientation):
    path = tagged(tmp_path / "photo.png", orientation)
    with Image.open(path) as image:
        upright = torch.from_numpy(np.array(ImageOps.exif_transpose(image))).permute(2, 0, 1)
    stored = torch.from_numpy(PIXELS).permute(2, 0, 1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert torch.equal(to_rgb(path), upright)
        assert [1 for one in said if "EXIF" in str(one.message)] == [1] * (orientation > 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(read_image(path, size=(2, 3)), stored)
        sideways = read_image(path, size=(3, 2))  # the annotations are of the upright image
        assert torch.equal(sideways, upright if orientation > 4 else stored)


def test_a_pil_image_is_taken_as_it_is_held_and_a_broken_tag_does_not_spoil_a_file(tmp_path):
    with Image.open(tagged(tmp_path / "photo.png", 6)) as image:
        with pytest.warns(UserWarning, match="EXIF orientation, which is not applied"):
            assert to_rgb(image).shape == (3, 2, 3)
        assert to_rgb(ImageOps.exif_transpose(image)).shape == (3, 3, 2)
    Image.fromarray(PIXELS).save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert read_image(tmp_path / "x.jpg").shape == (3, 2, 3)
    assert read_image(tagged(tmp_path / "y.png", 77)).shape == (3, 2, 3)
