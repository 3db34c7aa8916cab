"""Readers of VOC xml, YOLO txt, LabelMe json and masks as PNG: a file or folder -> pictures.

Nothing is guessed: what a file says that cannot be right is a ValueError with its place, and what
COCO has no room for is counted.
"""

import base64
import binascii
import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import msgspec
import numpy as np
from msgspec import Meta, Struct

from mimdet.data.annotations import Mask, brief, mask_extent
from mimdet.data.coco_file import in_words
from mimdet.images import IMAGE_FILES, SIDEWAYS, images_under, open_image, orientation
from mimdet.structures import bitmap_to_rle

NAMES_OF: dict[str, str] = {
    "voc": "VOC xml",
    "yolo": "YOLO txt",
    "labelme": "LabelMe json",
    "masks": "masks as PNG",
    "table": "a Hugging Face table",
}
Point = Annotated[list[float], Meta(min_length=2, max_length=2)]


@dataclass(slots=True)
class Thing:
    """One object: its class, box as x, y, width, height in pixels, and mask where there is one."""

    name: str
    bbox: tuple[float, float, float, float]
    mask: Mask = None
    crowd: bool = False
    area: float | None = None


@dataclass(slots=True)
class Picture:
    """An image file, height and width in pixels, and what is in it."""

    file: Path
    size: tuple[int, int]
    things: list[Thing]


def recognise(path: Path) -> str:
    """A key of NAMES_OF for a file or folder of annotations that are not COCO's; "" for others."""
    if path.is_file():
        kinds = {".xml": "voc", ".yaml": "yolo", ".yml": "yolo", ".txt": "yolo"}
        with path.open("rb") as opened:
            labelme = path.suffix == ".json" and re.search(rb'"shapes"\s*:', opened.read(100_000))
        return "labelme" if labelme else kinds.get(path.suffix.lower(), "")
    if any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        return "table"
    if next(path.rglob("*.xml"), None):
        return "voc"
    if next(path.glob("*.y*ml"), None) or next(_label_files(path), None):
        return "yolo"
    if next((file for file in path.rglob("*.json") if recognise(file)), None):
        return "labelme"
    return "masks" if next(_mask_folders(path), None) else ""


def _image_of(stem: Path, places: Sequence[Path], name: str = "") -> Path:
    """The image that belongs to an annotation file: `name`, or its stem with any known ending."""
    endings = [*IMAGE_FILES, *map(str.upper, IMAGE_FILES)]
    names = [*filter(None, [name]), *(stem.stem + ending for ending in endings)]
    for file in (place / name for place in places for name in names):
        if file.is_file():
            return file
    where = ", ".join(dict.fromkeys(map(str, places)))
    raise FileNotFoundError(
        f"{stem}: there is no image {name or stem.stem + '.*'} in {where}; give its folder "
        "(--images)"
    )


def _size(image: Path, where: Path, said: tuple[int, ...] | None = None) -> tuple[int, int]:
    """(height, width) that boxes refer to: those of the upright image, as tools show it.

    said: by the file `where`. ValueError where it is neither that nor that of the stored pixels.
    """
    with open_image(image) as opened:
        stored, turned = (opened.height, opened.width), orientation(opened) in SIDEWAYS
    upright = stored[::-1] if turned else stored
    if said is None or said in (upright, stored):
        return said or upright  # type: ignore[return-value]
    raise ValueError(
        f"{where} is for {said[1]} x {said[0]} pixels, {image} has {upright[1]} x {upright[0]}; "
        "was the image resized after it was annotated?"
    )


def _masked(name: str, mask: Any) -> Thing:
    """An object whose box is the extent of its mask."""
    x0, y0, x1, y1 = mask_extent(mask)
    return Thing(name, (x0, y0, x1 - x0, y1 - y0), mask)


def _files(source: Path, suffix: str) -> list[Path]:
    return [source] if source.is_file() else sorted(source.rglob(f"*{suffix}"))


# ------------------------------------------------------------------------------- VOC


def voc(source: Path, folder: Path | None, lost: Counter[str]) -> Iterator[Picture]:
    """PASCAL's own files count pixels from 1 to the last one inside; those of other tools are taken
    as the corners they are. `difficult` objects, which VOC's evaluation leaves out, become crowds.
    """
    for file in _files(source, ".xml"):
        try:
            root = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as error:
            raise ValueError(f"{file} is not xml ({error}); was it cut off?") from error
        if root.tag != "annotation":
            raise ValueError(f"{file} holds <{brief(root.tag)}>, not a VOC <annotation>")
        here = file.parent
        places = [folder] if folder else [here, *_siblings(here, "JPEGImages", "images")]
        image = _image_of(file, places, Path(root.findtext("filename") or "").name)
        said = [int(float(root.findtext(f"size/{n}") or 0)) for n in ("height", "width")]
        size = _size(image, file, (said[0], said[1]) if all(said) else None)
        first = 1.0 if "The VOC" in (root.findtext("source/database") or "") else 0.0
        things = []
        for rank, item in enumerate(root.iterfind("object")):
            where = f"{file}, object {rank}"
            name = (item.findtext("name") or "").strip()
            try:
                words = [item.findtext(f"bndbox/{n}") for n in ("xmin", "ymin", "xmax", "ymax")]
                x0, y0, x1, y1 = (float(word or "") for word in words)
            except ValueError:
                raise ValueError(f"{where}: bndbox needs xmin, ymin, xmax, ymax") from None
            if not name:
                raise ValueError(f"{where} has no name")
            if x1 < x0 or y1 < y0:
                raise ValueError(f"{where}: xmax or ymax is below xmin or ymin")
            hard = (item.findtext("difficult") or "0").strip() == "1"
            lost["difficult objects, now crowds (left out of training)"] += hard
            for tag in ("pose", "truncated", "occluded"):
                lost[f"`{tag}`"] += (item.findtext(tag) or "0").strip() not in ("0", "Unspecified")
            lost["parts of objects"] += len(item.findall("part"))
            box = (x0 - first, y0 - first, x1 - x0 + first, y1 - y0 + first)
            things.append(Thing(name, box, None, hard))
        yield Picture(image, size, things)


def _siblings(place: Path, *names: str) -> list[Path]:
    """Folders of these names beside `place` and beside its parents' chain, e.g. of a split."""
    return [place.parent / name for name in names] + [
        place.parent.parent / name / place.name for name in names
    ]


# ------------------------------------------------------------------------------- YOLO


class _Yaml(Struct):
    """data.yaml: names as a list, or number -> name."""

    names: list[str] | dict[int, str]
    path: str = ""
    train: str | list[str] = ""
    val: str | list[str] = ""
    test: str | list[str] = ""
    kpt_shape: list[int] | None = None


def _label_files(path: Path) -> Iterator[Path]:
    """Texts whose first line begins as YOLO's: a class number and at least four more numbers."""
    for file in path.rglob("*.txt"):
        with file.open(encoding="utf-8", errors="replace") as lines:
            words = lines.readline().split()
        with_numbers = len(words) >= 5 and words[0].isdecimal()
        if with_numbers and all(word.replace(".", "", 1).isdecimal() for word in words[1:5]):
            yield file


def yolo(
    source: Path, folder: Path | None, split: str, names: Sequence[str], lost: Counter[str]
) -> tuple[Iterator[Picture], list[str]]:
    import yaml  # type: ignore[import-untyped]

    file = source if source.suffix in (".yaml", ".yml") else next(source.glob("*.y*ml"), None)
    if file:
        try:
            about = msgspec.convert(yaml.safe_load(file.read_bytes()), _Yaml)
        except (msgspec.ValidationError, yaml.YAMLError) as error:
            raise ValueError(f"{file}: {in_words(error)}; it needs `names` and a split") from error
        if about.kpt_shape:
            raise ValueError(
                f"{file} is of key points (kpt_shape), which would be read as polygons"
            )
        parts = getattr(about, split, "") if split in ("train", "val", "test") else ""
        if not parts:
            raise ValueError(f"{file} has no split {split!r}; give --split train, val or test")
        known = about.names if isinstance(about.names, dict) else dict(enumerate(about.names))
        base = file.parent / about.path if (file.parent / about.path).exists() else file.parent
        roots = [base / part for part in ([parts] if isinstance(parts, str) else parts)]
    else:
        listed = next((f for n in ("classes.txt", "obj.names") for f in source.rglob(n)), None)
        if not names and listed:
            names = [line.strip() for line in listed.read_text("utf-8").splitlines() if line]
        if not names:
            raise ValueError(
                f"{source}: YOLO files hold numbers of classes; name them, in order (--names cell "
                "...), or give the data.yaml"
            )
        known, roots = dict(enumerate(names)), [folder or source]
    return _yolo_pictures(roots, source, known, lost), list(known.values())


def _yolo_pictures(
    roots: list[Path], source: Path, names: dict[int, str], lost: Counter[str]
) -> Iterator[Picture]:
    for root in roots:
        images = images_under(root)
        if not images:
            raise FileNotFoundError(f"{root} holds no images; give their folder (--images)")
        for image in images:
            swapped = [
                Path(*image.parts[:i], "labels", *image.parts[i + 1 :])
                for i, part in enumerate(image.parts)
                if part == "images"
            ]
            places = [*swapped[::-1], image, source / "labels" / image.name, source / image.name]
            labels = (place.with_suffix(".txt") for place in places)
            text = next((file for file in labels if file.is_file()), None)
            if text is None:
                lost["images without a txt, taken as empty"] += 1
            size = _size(image, text or image)
            yield Picture(image, size, [] if text is None else _yolo_things(text, size, names))


def _yolo_things(file: Path, size: tuple[int, int], names: dict[int, str]) -> list[Thing]:
    """A line an object: class, then centre and size or the corners of a polygon, as shares."""
    height, width = size
    things = []
    for row, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}, line {row}"
        try:
            label, *values = line.split()
            numbers = [float(value) for value in values]
            name = names[int(label)]
        except KeyError:
            raise ValueError(f"{where}: class {label}; there are {sorted(names)}") from None
        except ValueError:
            raise ValueError(f"{where}: {brief(line)} is not a class and numbers") from None
        if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
            raise ValueError(f"{where}: {len(numbers)} numbers; a box has 4, a polygon x y pairs")
        if not all(-0.01 <= number <= 1.01 for number in numbers):
            raise ValueError(f"{where}: YOLO's numbers are shares of the image, 0 to 1, not pixels")
        if len(numbers) == 4:
            x, y, w, h = numbers
            box = ((x - w / 2) * width, (y - h / 2) * height, w * width, h * height)
            things.append(Thing(name, box))
        else:
            flat = [n * (height if i % 2 else width) for i, n in enumerate(numbers)]
            things.append(_masked(name, [flat]))
    return things


# ------------------------------------------------------------------------------- LabelMe


class _Shape(Struct):
    label: Annotated[str, Meta(min_length=1)]
    points: list[Point]
    shape_type: str = "polygon"
    group_id: int | None = None
    mask: str | None = None
    flags: dict[str, bool] | None = None


class _LabelMe(Struct, rename="camel"):
    shapes: list[_Shape]
    image_path: str
    image_height: int
    image_width: int
    flags: dict[str, bool] | None = None


def labelme(source: Path, folder: Path | None, lost: Counter[str]) -> Iterator[Picture]:
    """Shapes of one label and group are one object, so that it may have several parts."""
    for file in _files(source, ".json"):
        if not recognise(file):
            continue
        try:
            about = msgspec.json.decode(file.read_bytes(), type=_LabelMe)
        except msgspec.DecodeError as error:
            raise ValueError(f"{file} is no LabelMe file: {in_words(error)}") from error
        name = Path(about.image_path.replace("\\", "/"))
        image = _image_of(file, [folder] if folder else [file.parent], name.name)
        size = _size(image, file, (about.image_height, about.image_width))
        things: dict[Any, Thing] = {}
        for rank, shape in enumerate(about.shapes):
            if any((shape.flags or {}).values()):
                lost["flags of shapes"] += 1
            thing = _shape(shape, size, f"{file}, shape {rank}")
            if thing is None:
                lost[f"shapes that enclose nothing ({shape.shape_type})"] += 1
                continue
            key = (shape.label, shape.group_id if shape.group_id is not None else f"shape {rank}")
            other = things.setdefault(key, thing)
            if other is not thing:
                things[key] = _joined(other, thing, f"{file}, shape {rank}")
        if any((about.flags or {}).values()):
            lost["flags of images"] += 1
        yield Picture(image, size, list(things.values()))


def _shape(shape: _Shape, size: tuple[int, int], where: str) -> Thing | None:
    xs, ys = [x for x, _ in shape.points], [y for _, y in shape.points]
    if shape.shape_type == "polygon" and len(xs) >= 3:
        return _masked(shape.label, [[v for point in shape.points for v in point]])
    if shape.shape_type == "rectangle" and len(xs) >= 2:
        left, top = min(xs), min(ys)
        return Thing(shape.label, (left, top, max(xs) - left, max(ys) - top))
    if shape.shape_type == "circle" and len(xs) == 2:
        radius = math.dist(*shape.points)
        angles = [2 * math.pi * step / 64 for step in range(64)]
        places = [(xs[0] + radius * math.cos(a), ys[0] + radius * math.sin(a)) for a in angles]
        return _masked(shape.label, [[v for place in places for v in place]])
    if shape.shape_type == "mask" and shape.mask:
        try:
            small = _pixels(io.BytesIO(base64.b64decode(shape.mask, validate=True))) > 0
            left, top = round(min(xs)), round(min(ys))
            whole = np.zeros(size, bool)
            place = whole[top : top + small.shape[0], left : left + small.shape[1]]
            place[:] = small[: place.shape[0], : place.shape[1]]
        except (OSError, binascii.Error, ValueError) as error:
            raise ValueError(f"{where}: its mask cannot be read ({error})") from error
        return _masked(shape.label, bitmap_to_rle(whole))
    return None


def _joined(a: Thing, b: Thing, where: str) -> Thing:
    if not isinstance(a.mask, list) or not isinstance(b.mask, list):
        raise ValueError(f"{where}: only polygons can be parts of one object (group_id)")
    return _masked(a.name, [*a.mask, *b.mask])


# ------------------------------------------------------------------------------- masks


def _mask_folders(path: Path) -> Iterator[Path]:
    for name in ("masks", "Masks", "PedMasks", "labels"):
        yield from (f for f in path.rglob(name) if next(f.glob("*.png"), None))


def masks(source: Path, folder: Path | None, names: Sequence[str]) -> Iterator[Picture]:
    """A folder an image, with its image in `images` and an object a file in `masks` (DSB2018); or
    one PNG an image, in which 0 is background and every other value an object."""
    name = names[0] if names else "object"
    for masks in sorted(_mask_folders(source)):
        own = sorted((masks.parent / "images").glob("*"))
        files = sorted(masks.glob("*.png"))
        if len(own) == 1 and own[0].stem not in {file.stem for file in files}:
            bitmaps = [(file, _pixels(file) > 0) for file in files]
            size = _size(own[0], files[0], bitmaps[0][1].shape)
            yield Picture(own[0], size, [_placed(name, m, size, f) for f, m in bitmaps if m.any()])
            continue
        for file in files:
            stem = Path(file.stem.removesuffix("_mask"))
            places = [folder] if folder else _siblings(masks, "images", "PNGImages", "JPEGImages")
            image, ids = _image_of(stem, places), _pixels(file)
            size = _size(image, file, ids.shape)
            values = [value for value in np.unique(ids) if value]
            yield Picture(image, size, [_placed(name, ids == v, size, file) for v in values])


def _pixels(source: Any) -> np.ndarray:
    """Values of a PNG with one channel as they are stored: of a palette its indices, (H, W)."""
    from PIL import Image

    with Image.open(source) as opened:
        if opened.mode in ("RGB", "RGBA"):
            values = np.asarray(opened.convert("RGB")).astype(np.int64)
            return values @ np.array([1 << 16, 1 << 8, 1])  # a colour an object
        return np.asarray(opened)


def _placed(name: str, bitmap: np.ndarray, size: tuple[int, int], file: Path) -> Thing:
    if bitmap.shape != size:
        raise ValueError(f"{file} has {bitmap.shape[::-1]} pixels, its image {size[::-1]}")
    return _masked(name, bitmap_to_rle(bitmap))
