"""The README's pictures: single outputs of the stored notebooks, byte for byte.

python tools/gallery.py            copy them to notebooks/results/gallery
python tools/gallery.py --check    exit 1 when a copy is not what its notebook shows
"""

import argparse
import base64
import sys
from pathlib import Path
from typing import NamedTuple

import nbformat

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks/results/gallery"


class Picture(NamedTuple):
    notebook: str
    place: int
    """Among the pictures of the notebook, from 0."""
    name: str


GALLERY = (
    Picture("01_mae_loading", 2, "reconstruction"),
    Picture("02_token_sampling", 1, "samplers"),
    Picture("03_conv_stem_features", 1, "pyramid"),
    Picture("05_attention", 4, "attention"),
    Picture("08_results", 10, "result_browser"),
    Picture("02_token_sampling", 6, "nuclei"),
    Picture("02_token_sampling", 7, "token_lab"),
)


def pictures_of(notebook: Path) -> list[tuple[str, bytes]]:
    """(file ending, content) of every picture among the outputs, in order."""
    found = []
    for cell in nbformat.read(notebook, as_version=4).cells:
        for output in cell.get("outputs", []):
            for kind, value in output.get("data", {}).items():
                if kind in ("image/png", "image/jpeg"):
                    ending = "jpg" if kind == "image/jpeg" else "png"
                    found.append((ending, base64.b64decode(value)))
    return found


def files(notebooks: Path = ROOT / "notebooks", folder: Path = FOLDER) -> dict[Path, bytes]:
    """Every file of the gallery -> what belongs into it."""
    wanted = {}
    for picture in GALLERY:
        found = pictures_of(notebooks / f"{picture.notebook}.ipynb")
        if picture.place >= len(found):
            raise ValueError(f"{picture.notebook} has {len(found)} pictures, none {picture.place}")
        ending, content = found[picture.place]
        wanted[folder / f"{picture.name}.{ending}"] = content
    return wanted


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path, content in files().items():
        same = path.exists() and path.read_bytes() == content
        if options.check and not same:
            sys.exit(f"{path.relative_to(ROOT)} is not its notebook's: run tools/gallery.py")
        if not same:
            path.write_bytes(content)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
