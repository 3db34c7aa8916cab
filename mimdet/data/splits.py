"""A COCO json in two, by image or by group, each class in proportion; images that are in both."""

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mimdet.data.coco_file import CocoReader, Problem
from mimdet.files import read_json, write_json
from mimdet.images import open_image

ALIKE = 0.995
"""Correlation of two images' thumbnails from which they are reported. The same picture saved again
has above 0.999 (a hundred photographs, half the size, JPEG of quality 40); of the 20,100 pairs of
268 and 75 other photographs of COCO no pair has more than 0.83."""
THUMBNAIL = 16


def split_file(
    json_path: str | Path,
    out: str | Path,
    share: float = 0.2,
    *,
    by_name: str = "",
    by_field: str = "",
    seed: int = 0,
) -> str:
    """Write `out`/train.json and val.json -> a table of what each got.

    share: of the images, for val.json. by_name: regular expression whose first group, or match,
    in a file name is the image's group; by_field: field of the image's entry that is. Groups stay
    whole. ValueError where a name or entry has no group, or where one set would be empty.
    """
    from pandas import DataFrame

    json_path, out = Path(json_path), Path(out)
    if not 0 < share < 1:
        raise ValueError(
            f"share={share}: the part of the images that val.json gets, between 0 and 1"
        )
    CocoReader(json_path)  # refuses what is not COCO, by the entry's place
    content: dict[str, Any] = read_json(json_path)
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    classes: dict[Any, Counter[str]] = defaultdict(Counter)
    for entry in content["annotations"]:
        classes[entry["image_id"]][names.get(entry["category_id"], "?")] += 1
    groups: dict[str, list[Any]] = defaultdict(list)
    for image in content["images"]:
        groups[_group(image, by_name, by_field, json_path)].append(image["id"])
    held_out = chosen(groups, classes, share, seed)
    counts: dict[str, dict[str, int]] = {}
    for part in ("train", "val"):
        images = [i for i in content["images"] if (i["id"] in held_out) == (part == "val")]
        if not images:
            raise ValueError(
                f"{json_path}: {part}.json would have no image; {len(groups)} group(s)"
            )
        ids = {image["id"] for image in images}
        kept = [entry for entry in content["annotations"] if entry["image_id"] in ids]
        write_json(out / f"{part}.json", content | {"images": images, "annotations": kept})
        found: Counter[str] = sum((classes[number] for number in ids), Counter())
        own = sum(bool(ids & set(members)) for members in groups.values())
        counts[part] = {"images": len(images), "groups": own}
        counts[part] |= {name: found[name] for name in names.values()}
    table = DataFrame(counts).map("{:,}".format).to_string()
    return f"{table}\nin {out}: train.json, val.json; the images stay where they are"


def _group(image: dict[str, Any], by_name: str, by_field: str, file: Path) -> str:
    if by_field:
        if by_field not in image:
            raise ValueError(f"{file}: image {image['id']} has no field {by_field!r}")
        return str(image[by_field])
    if not by_name:
        return str(image["id"])
    found = re.search(by_name, image["file_name"])
    if not found:
        raise ValueError(f"{file}: {by_name!r} finds nothing in {image['file_name']!r}")
    return str(found[1] if found.re.groups else found[0])


def chosen(
    groups: dict[str, list[Any]], classes: dict[Any, Counter[str]], share: float, seed: int
) -> set[Any]:
    """Ids of the images that are held out: whole groups, the rarest classes first.

    Each group goes where classes and images stay nearer to their shares so far; of a class that
    more than one group has, the first goes to training and, at the latest, the last is held out.
    """
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    of_group = {name: sum((classes[i] for i in groups[name]), Counter()) for name in order}
    total: Counter[str] = sum(of_group.values(), Counter())
    having = Counter(label for name in order for label in of_group[name])

    def rarest(name: str) -> str:
        return min(of_group[name], key=lambda label: (total[label], label), default="")

    order.sort(key=lambda name: total[rarest(name)] or 1 << 62)
    total[""] = sum(map(len, groups.values()))  # images
    seen, held_out, met = Counter[str](), Counter[str](), Counter[str]()
    found: set[Any] = set()
    for name in order:
        counts = of_group[name] + Counter({"": len(groups[name])})
        seen.update(counts)
        met.update(of_group[name])
        label = rarest(name)
        off = [
            sum(
                ((held_out[c] + h * n - share * seen[c]) / total[c]) ** 2 for c, n in counts.items()
            )
            for h in (0, 1)
        ]
        first, last = seen[label] == counts[label], met[label] == total[label]
        held = off[1] < off[0]
        if having[label] > 1:
            held = (held and not first) or (last and not held_out[label])
        if held:
            held_out.update(counts)
            found.update(groups[name])
    return found


def shared_images(
    one: tuple[str | Path, str | Path], other: tuple[str | Path, str | Path]
) -> list[Problem]:
    """Images that two sets have in common; each set is its json and its image folder.

    The same bytes are an error (`in-both-sets`), thumbnails that correlate by ALIKE a warning
    (`nearly-in-both-sets`). Files that cannot be read are `check_dataset`'s to find.
    """
    here, there = list(_looks(*one)), list(_looks(*other))
    names, problems = {digest: name for name, digest, _ in there}, []
    looks = np.array([look for *_, look in there]).reshape(len(there), -1)
    for name, digest, look in here:
        kind, twin = "in-both-sets", names.get(digest)
        words = "has the same bytes as"
        if twin is None and len(looks):
            alike = looks @ look
            if alike.max() >= ALIKE:
                kind, twin = "nearly-in-both-sets", there[int(alike.argmax())][0]
                words = f"looks as (correlation {alike.max():.4f})"
        if twin is not None:
            message = f"{name} {words} {twin}"
            problems.append(Problem(kind, message, str(one[0]), file_name=Path(name).name))
    return problems


def _looks(json_path: str | Path, folder: str | Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """File, sha256 and normalised thumbnail (THUMBNAIL^2,) of each image that can be read."""
    reader = CocoReader(Path(json_path), lambda problem: None)
    for image in reader.images.values():
        path = Path(folder) / image.entry.file_name
        try:
            data = path.read_bytes()
            with open_image(data) as opened:
                grey = opened.convert("L").resize((THUMBNAIL, THUMBNAIL))
        except Exception:  # whatever a decoder raises
            continue
        look = np.asarray(grey, dtype=np.float64).ravel()
        look -= look.mean()
        look /= max(float(np.linalg.norm(look)), 1e-9)
        yield str(path), hashlib.sha256(data).hexdigest(), look
