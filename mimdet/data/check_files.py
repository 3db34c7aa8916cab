"""The image files of a data set: are they there, whole, and as large as the annotations say?"""

import hashlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import NamedTuple

from mimdet.data.check_report import brief
from mimdet.data.check_rules import Finding

EXIF_ORIENTATION = 0x0112


class ImageFacts(NamedTuple):
    """What an image file says about itself."""

    width: int
    height: int
    mode: str
    """Pillow's: L, RGB, I;16, ..."""
    orientation: int
    """EXIF tag 274: 1 = upright, 2..8 = mirrored or turned."""
    digest: str
    """sha256 of the file; empty when it was not read to its end."""


class ImageFolder:
    """The image folder: every file is opened once, and its content remembered by its digest."""

    def __init__(self, folder: Path, decode: bool) -> None:
        self.folder = folder
        self.decode = decode
        self.digests: dict[str, str] = {}
        self.by_name: dict[str, str] | None = None

    def check(
        self, name: str, stored: tuple[int, int] | None
    ) -> tuple[list[Finding], tuple[int, int] | None]:
        """Faults of one image, and its (width, height): the file's or, failing that, `stored`."""
        findings: list[Finding] = []
        path = PurePath(name)
        if path.is_absolute() or ".." in path.parts:
            findings.append(("file-name-leaves-folder", f"file_name is {brief(name)}"))
        if not os.path.isfile(self.folder / name):  # also False for names no file can have
            findings.append(("image-missing", self.elsewhere(path.name)))
            return findings, stored
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of odd tags and of large images
                facts = inspect_image(self.folder / name, self.decode)
        except Exception as error:  # Pillow's readers raise nearly anything
            findings.append(("image-unreadable", reason(error)))
            return findings, stored
        if stored is not None:
            findings += size_findings(stored, (facts.width, facts.height))
        if facts.orientation in range(2, 9):
            findings.append(("image-rotated", f"EXIF orientation {facts.orientation}"))
        if facts.mode == "F":
            findings.append(("image-float", "Pillow's mode is F"))
        elif facts.mode.startswith("I"):
            findings.append(("image-16-bit", f"Pillow's mode is {facts.mode}"))
        if facts.digest:
            twin = self.digests.setdefault(facts.digest, name)
            if twin != name:
                findings.append(("duplicate-image-content", f"the same bytes as {brief(twin)}"))
        return findings, (facts.width, facts.height)

    def elsewhere(self, name: str) -> str:
        """Where else the folder has a file of this name, case ignored."""
        if self.by_name is None:
            files = (Path(root, file) for root, _, names in os.walk(self.folder) for file in names)
            self.by_name = {
                file.name.lower(): file.relative_to(self.folder).as_posix() for file in files
            }
        other = self.by_name.get(name.lower())
        return "no such file" + (f"; did you mean {brief(other)}?" if other else "")


def inspect_image(path: Path, decode: bool) -> ImageFacts:
    """Read an image's header and, with `decode`, all its pixels.

    Raises whatever Pillow raises for a file that is broken, truncated, of an unknown format, or
    so large that it looks like a decompression bomb.
    """
    from PIL import Image

    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if decode else ""
        file.seek(0)
        with Image.open(file) as image:
            width, height = image.size
            if decode:
                image.load()
            orientation = 1
            if decode or image.format != "PNG":  # a PNG may keep its EXIF behind the pixels
                orientation = image.getexif().get(EXIF_ORIENTATION, 1)
            return ImageFacts(width, height, image.mode, orientation, digest)


def size_findings(stored: tuple[int, int], own: tuple[int, int]) -> Iterator[Finding]:
    """Compare the (width, height) of the annotation file with those of the image file."""
    if stored != own:
        kind = "image-size-swapped" if stored == own[::-1] else "image-size-wrong"
        yield (
            kind,
            f"the annotations say {stored[0]} x {stored[1]}, the file is {own[0]} x {own[1]}",
        )


def reason(error: Exception) -> str:
    """Why an image could not be read, on one line."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):  # its text is about our file object
        return "not an image, or of a format that Pillow does not know"
    return f"{type(error).__name__}: {error}"
