"""Make mimdet/pretrained/nuclei: one microscope picture of DSB2018 with its nuclei, in nine tiles.

    pip download --no-deps stardist
    unzip stardist-*.whl 'stardist/data/images/*2d.tif'
    python tools/ship_nuclei.py stardist/data/images

StarDist (BSD 3-Clause) carries the picture and the labels of its 125 nuclei as test data; both come
from BBBC038, the 2018 Data Science Bowl, which is in the public domain (CC0). The tiles of the last
row are held out, so no nucleus is in both sets, but for those that lie across the border.
"""

import argparse
from pathlib import Path
from shutil import copy
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

import mimdet
from mimdet.data.formats import convert

FOLDER = Path(mimdet.__file__).parent / "pretrained/nuclei"
TILES = 3  # a side
SMALLEST = 16  # pixels of a nucleus that a border cuts


def cut(picture: np.ndarray, labels: np.ndarray, out: Path) -> None:
    """Tiles and their labels below `out`/train and `out`/val, each in images/ and masks/."""
    edges = np.linspace(0, len(picture), TILES + 1).round().astype(int)
    for row in range(TILES):
        part = out / ("val" if row == TILES - 1 else "train")
        for column in range(TILES):
            here = (slice(*edges[row : row + 2]), slice(*edges[column : column + 2]))
            tile = labels[here].copy()
            for label, pixels in zip(*np.unique(tile, return_counts=True), strict=True):
                if pixels < SMALLEST:
                    tile[tile == label] = 0
            for kind, pixels in (("images", picture[here]), ("masks", tile)):
                (part / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(part / kind / f"{row}{column}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="folder with img2d.tif and mask2d.tif")
    folder = parser.parse_args().images
    picture, labels = (np.array(Image.open(folder / f"{n}2d.tif")) for n in ("img", "mask"))
    if max(picture.max(), labels.max()) > 255:
        raise ValueError(f"{folder}: values above 255 do not fit into a PNG of 8 bits")
    (FOLDER / "images").mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        cut(picture, labels, Path(scratch))
        for part in ("train", "val"):
            print(convert(Path(scratch, part), FOLDER / f"{part}.json", names=["nucleus"]))
            for file in Path(scratch, part, "images").iterdir():
                copy(file, FOLDER / "images")


if __name__ == "__main__":
    main()
