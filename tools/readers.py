"""What the kit makes of one file from elsewhere: its readers, as those who use them call them.

A reader returns, with or without a warning, or raises one of `DOCUMENTED` with the file's name in
the message. Everything else is a fault of the kit. Used by the corpus of broken files
(tests/faults, tools/measure_faults.py) and by tools/fuzz.py.
"""

import contextlib
import io
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DOCUMENTED = (ValueError, FileNotFoundError, PermissionError)
ACCEPTED, WARNED, REFUSED = "accepted", "accepted with a warning", "refused"
UNNAMED, UNDOCUMENTED = "refused without a name", "undocumented error"
SILENT = "accepted in silence, check-data refuses"
HANG, CRASH = "hang", "crash"
GOOD = (ACCEPTED, WARNED, REFUSED)
OUTCOMES = (*GOOD, UNNAMED, UNDOCUMENTED, SILENT, HANG, CRASH)

PICTURES = "pictures"
"""Folder of the images that an annotation file names, beside it: 1.png, 2.png, 3.png of `SIZE`."""
SIZE = (48, 64)
"""Height, width."""


class SilentlyAccepted(Exception):
    """Taken without a word, though `mimdet check-data` calls it an error."""


class Outcome(NamedTuple):
    kind: str
    """One of OUTCOMES."""
    message: str
    """Of the error or the first warning."""


def annotations(path: Path) -> None:
    """Open it, read every image with its objects, evaluate something on it."""
    from mimdet.analysis.metrics import coco_metrics
    from mimdet.data.checks import ERRORS, check_dataset
    from mimdet.data.coco import CocoDataset

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        dataset = CocoDataset(path, path.parent / PICTURES)
        records = [dataset[i] for i in range(len(dataset))]
    for record in records:
        masks = record.target.masks
        if masks is not None and masks.bitmaps.numel() and masks.bitmaps.max() > 1:
            raise SilentlyAccepted("a mask is neither 0 nor 1")
    truth = dataset.ground_truth()
    coco_metrics(truth, [], ["bbox"])
    if dataset.has_masks:
        coco_metrics(truth, everywhere(truth), ["segm"])
    told = [one for one in said if path.name in str(one.message)]  # others warn as well
    for one in told:
        warnings.warn(one.message, stacklevel=2)
    report = check_dataset(path, path.parent / PICTURES, decode=False)
    if not told and not report.ok:
        raise SilentlyAccepted(", ".join(kind for kind in report.by_kind() if kind in ERRORS))


def everywhere(truth: dict[str, Any]) -> list[dict[str, Any]]:
    """A detection of each category that covers the whole of each image."""
    from mimdet.structures import bitmap_to_rle

    return [
        {
            "image_id": image["id"],
            "category_id": category["id"],
            "bbox": [0, 0, image["width"], image["height"]],
            "segmentation": bitmap_to_rle(np.ones((image["height"], image["width"]), np.uint8)),
            "score": 0.5,
        }
        for image in truth["images"]
        for category in truth["categories"]
    ]


def results(path: Path) -> None:
    """Read a results file of two images, and the errors in it."""
    from mimdet.analysis.errors import find_errors
    from mimdet.analysis.metrics import IouType, coco_metrics, read_results

    found = read_results(path, results_truth())
    fields: dict[IouType, str] = {"bbox": "bbox", "segm": "segmentation"}
    kinds = [kind for kind, name in fields.items() if all(one.get(name) for one in found)]
    coco_metrics(results_truth(), found, kinds)
    find_errors(results_truth(), found, kinds[-1]).table()


@cache
def results_truth() -> dict[str, Any]:
    """A COCO ground truth: images 1 and "two", categories 1 and 3, an object of each in each."""
    height, width = SIZE
    objects: list[dict[str, Any]] = [
        {"image_id": image, "category_id": category, "bbox": [x, y, 20, 16], "area": 320}
        for image in (1, "two")
        for category, x, y in ((1, 4, 6), (3, 34, 20))
    ]
    for number, one in enumerate(objects, start=1):
        x, y, w, h = one["bbox"]
        outline = [x, y, x + w, y, x + w, y + h, x, y + h]
        one |= {"id": number, "iscrowd": 0, "segmentation": [outline]}
    return {
        "images": [{"id": image, "height": height, "width": width} for image in (1, "two")],
        "annotations": objects,
        "categories": [{"id": 1, "name": "cell"}, {"id": 3, "name": "nucleus"}],
    }


def config(path: Path) -> None:
    from mimdet.config import load_config, save_config

    cfg = load_config(path)
    again = path.with_name("again.json")
    save_config(cfg, again)
    if load_config(again) != cfg:
        raise SilentlyAccepted("it is read back otherwise")


def weights(path: Path) -> None:
    """A detector that describes itself, else an autoencoder."""
    import mimdet
    from mimdet.models.checkpoint_files import read_checkpoint

    if "config" in read_checkpoint(path).metadata:
        model = mimdet.load_detector(path)
    else:
        model = mimdet.load_mae_model(path, num_heads=2, decoder_heads=2)
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise SilentlyAccepted("it holds NaN or infinite values")


def run(path: Path) -> None:
    """A run that someone else made."""
    import mimdet

    mimdet.load_detector(path)


def images(path: Path) -> None:
    from mimdet.images import read_image

    image = read_image(path)
    if image.dim() != 3 or image.shape[0] != 3 or not image.numel():
        raise SilentlyAccepted(f"an image of shape {tuple(image.shape)}")


def archives(path: Path) -> None:
    """Unpack it into the folder `unpacked` beside it."""
    from mimdet.downloads import unzip

    unzip(path, path.with_name("unpacked"))


READERS: dict[str, Callable[[Path], None]] = {
    "annotations": annotations,
    "results": results,
    "config": config,
    "weights": weights,
    "images": images,
    "run": run,
    "archives": archives,
}


def outcome(reader: str, path: Path) -> Outcome:
    """What reading this file comes to; what it prints is dropped."""
    with warnings.catch_warnings(record=True) as said, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        try:
            READERS[reader](path)
        except SilentlyAccepted as error:
            return Outcome(SILENT, str(error))
        except DOCUMENTED as error:
            named = path.name in str(error) or str(path.parent) in str(error)
            return Outcome(REFUSED if named else UNNAMED, _one_line(error))
        except Exception as error:
            return Outcome(UNDOCUMENTED, f"{type(error).__name__}: {_one_line(error)}")
    told = [str(one.message) for one in said if path.name in str(one.message)]
    return Outcome(WARNED, told[0]) if told else Outcome(ACCEPTED, "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:2000]
