"""What people have their annotations in -> one COCO json: VOC xml, YOLO txt, LabelMe json, masks as
PNG, a Hugging Face table.

Nothing is guessed: what a file says that cannot be right is a ValueError with its place, and what
COCO has no room for is counted and said. (`supervision`, which reads most of these too, rounds
polygons to whole pixels, holds masks as bitmaps of the image and numbers images anew.)
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mimdet.data.annotations import mask_area
from mimdet.data.foreign import NAMES_OF, Picture, Thing, labelme, masks, recognise, voc, yolo
from mimdet.files import write_file, write_json
from mimdet.images import open_image


@dataclass(slots=True)
class Converted:
    """What `convert` wrote."""

    kind: str
    folder: Path
    """Of the images: the file names in the json are relative to it."""
    images: int
    classes: Counter[str]
    """Class -> objects."""
    masks: int
    """Objects with a mask."""
    empty: int
    lost: Counter[str] = field(default_factory=Counter)
    """What COCO has no room for, or what was mapped to something else."""

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {count:,}" for name, count in self.classes.most_common(10))
        more = f" and {len(self.classes) - 10} more classes" if len(self.classes) > 10 else ""
        total = sum(self.classes.values())
        lost = "; ".join(f"{what}: {count:,}" for what, count in self.lost.items())
        return (
            f"{NAMES_OF[self.kind]}: {self.images:,} images, {self.empty:,} of them without "
            f"objects; {total:,} objects, {self.masks:,} with a mask\n"
            f"classes: {counts}{more}\nlost: {lost or 'nothing'}\nimage folder: {self.folder}"
        )


def convert(
    source: str | Path,
    out: str | Path,
    *,
    kind: str = "",
    images: str | Path = "",
    split: str = "train",
    names: Sequence[str] = (),
    bbox_format: str = "",
) -> Converted:
    """Write the annotations of `source` to `out` as COCO json.

    kind: a key of NAMES_OF; "" = as `recognise` finds it. images: folder of the images, where it is
    not beside the annotations. split: of a YOLO data.yaml or of a table. names: classes of YOLO
    numbers without a data.yaml, or the one class of masks. bbox_format: of a table.

    Raises ValueError naming file and line or entry for what cannot be read, FileNotFoundError for
    an image that is not there.
    """
    source, out = Path(source), Path(out)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; check the path")
    kind = kind or recognise(source)
    if kind not in NAMES_OF:
        raise ValueError(
            f"{source}: no VOC xml, YOLO txt, LabelMe json, masks or table in it; say which by "
            f"--kind, one of {', '.join(NAMES_OF)}"
        )
    lost: Counter[str] = Counter()
    folder = Path(images) if str(images) else None
    if kind == "table":
        folder, pictures, order = _table(str(source), out, split, bbox_format)
    elif kind == "yolo":
        pictures, order = yolo(source, folder, split, names, lost)
    elif kind == "masks":
        pictures, order = masks(source, folder, names), list(names[:1]) or ["object"]
    else:
        pictures, order = {"voc": voc, "labelme": labelme}[kind](source, folder, lost), []
    found = list(pictures)
    if not found:
        raise ValueError(f"{source}: no image with annotations ({NAMES_OF[kind]}) in it")
    folder = folder or Path(os.path.commonpath([picture.file.parent for picture in found]))
    things = [thing for picture in found for thing in picture.things]
    classes = Counter(thing.name for thing in things)
    write_json(out, _coco(found, folder, order or sorted(classes)))
    masked = sum(thing.mask is not None for thing in things)
    if 0 < masked < len(things):
        lost[f"only {masked:,} objects have a mask (train with --no-masks); without"] = (
            len(things) - masked
        )
    empty = sum(not picture.things for picture in found)
    return Converted(kind, folder, len(found), classes, masked, empty, +lost)


def _coco(pictures: list[Picture], folder: Path, order: list[str]) -> dict[str, Any]:
    """Images, annotations and classes are numbered from 1 in the order given."""
    number = {name: rank for rank, name in enumerate(order, 1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for picture in pictures:
        height, width = picture.size
        name = picture.file.resolve().relative_to(folder.resolve()).as_posix()
        entry = {"id": len(images) + 1, "file_name": name, "width": width, "height": height}
        images.append(entry)
        for thing in picture.things:
            item = {
                "id": len(annotations) + 1,
                "image_id": entry["id"],
                "category_id": number[thing.name],
                "bbox": [round(value, 4) for value in thing.bbox],
                "area": thing.area or mask_area(thing.mask, thing.bbox, height, width),
                "iscrowd": int(thing.crowd),
            }
            annotations.append(item | ({"segmentation": thing.mask} if thing.mask else {}))
    categories = [{"id": rank, "name": name} for name, rank in number.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


# ------------------------------------------------------------------------------- tables


def _table(
    source: str, out: Path, split: str, bbox_format: str
) -> tuple[Path, Iterator[Picture], list[str]]:
    """Images are written beside the json, as the table holds them."""
    from mimdet.data.hub import HubDataset

    table = HubDataset(source, split, bbox_format)
    folder = out.with_suffix("")
    names = dict(zip(table.category_ids, table.categories, strict=True))

    def pictures() -> Iterator[Picture]:
        for index in range(len(table)):
            source = table.source(index)
            data = source if isinstance(source, bytes) else Path(source).read_bytes()
            with open_image(data) as opened:
                file = folder / f"{index:06d}.{str(opened.format).lower()}"
            write_file(file, partial(Path.write_bytes, data=data))
            things = [
                Thing(names[a.category_id], a.bbox, a.mask, a.iscrowd, a.area)
                for a in table.annotations(index)
            ]
            yield Picture(file, table.image_size(index), things)

    return folder, pictures(), list(table.categories)
