"""What a notebook looks at: its pictures and its finished models, by mode or from one path."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mimdet.config import DataConfig
from mimdet.data.coco import CocoDataset
from mimdet.data.images import read_image
from mimdet.data.shapes import ShapesCOCO
from mimdet.notebook import MODES, full_config
from mimdet.structures import Record, Target

if TYPE_CHECKING:
    from mimdet.models.detector import Detector
    from mimdet.models.mae import MAE

WEIGHTS = "MIMDET_WEIGHTS"
"""Environment variable that names the folder of `mimdet download`, for full mode."""
FULL_WEIGHTS = {
    "detector": "mimdet_vit_base_mask_rcnn_fpn_sr_0p5_800_1333_4xdec_coco_3x.pth",
    "mae": "mae_visualize_vit_base.pth",
}
DOWNLOADS = {"detector": "mimdet-base", "mae": "mae-base-visualize"}
LEVEL = "shapes-v1-medium"


@dataclass(slots=True)
class Pictures:
    """Images to look at, and the data set they come from."""

    records: list[Record]
    categories: list[str]
    dataset: Any
    """A data set with its truth; None for a single photo."""
    data: DataConfig
    """How a configuration names it: `cfg.data = pictures.data`."""

    @property
    def images(self) -> list[Tensor]:
        """uint8 (3, H, W) each."""
        return [record.image for record in self.records]

    @property
    def targets(self) -> list[Target]:
        return [record.target for record in self.records]


def open_pictures(path: str | Path = "", mode: str = "quick", count: int = 8) -> Pictures:
    """The first `count` pictures a notebook shows.

    path: "" = held-out scenes of ShapesCOCO (quick) or COCO val2017 (full, from the folder in
    MIMDET_COCO); a photo, any image file; or a folder with `annotations.json` (COCO format) and
    `images/`. Raises FileNotFoundError and ValueError that say what is expected.
    """
    _check_mode(mode)
    if path:
        place = Path(path)
        if place.is_dir():
            return _folder(place, count)
        if not place.exists():
            raise FileNotFoundError(f"{place} does not exist: give a photo, or a folder of data")
        nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
        photo = Record(read_image(place), nothing, place.name)
        return Pictures([photo], [], None, DataConfig())
    if mode == "full":
        from mimdet.data.coco import build_dataset

        cfg = full_config().data
        return _first(build_dataset(cfg, "val"), count, cfg)
    cfg = DataConfig(source="shapes", shapes_level=LEVEL, shapes_size=128)
    return _first(ShapesCOCO(LEVEL, cfg.shapes_size, cfg.shapes_val, "val"), count, cfg)


def open_detector(mode: str = "quick") -> "Detector":
    """A finished detector in evaluation mode: the shipped `tiny`, or the released MIMDet ViT-B."""
    _check_mode(mode)
    from mimdet.training.run import load_detector

    return load_detector("tiny" if mode == "quick" else _full("detector"))


def open_mae(mode: str = "quick") -> "MAE":
    """A finished autoencoder: the shipped `tiny_mae`, or Meta's ViT-B trained on plain pixels."""
    _check_mode(mode)
    from mimdet.models.weights import load_mae_model

    return load_mae_model("tiny_mae" if mode == "quick" else _full("mae")).eval()


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"MODE={mode!r}: use one of {list(MODES)}")


def _full(kind: str) -> str:
    folder, name = Path(os.environ.get(WEIGHTS, "downloads")), FULL_WEIGHTS[kind]
    if not (folder / name).exists():
        raise FileNotFoundError(
            f"full mode needs {folder / name}: run `mimdet download {DOWNLOADS[kind]}`, or set "
            f"{WEIGHTS} to the folder that holds it"
        )
    return str(folder / name)


def _folder(place: Path, count: int) -> Pictures:
    annotations, images = place / "annotations.json", place / "images"
    if not annotations.is_file() or not images.is_dir():
        raise FileNotFoundError(
            f"{place} must hold annotations.json (COCO format) and images/; "
            "for other layouts use mimdet.CocoDataset(json, images)"
        )
    cfg = DataConfig(source="coco")
    cfg.train_json = cfg.val_json = str(annotations)
    cfg.train_images = cfg.val_images = str(images)
    return _first(CocoDataset(annotations, images), count, cfg)


def _first(dataset: Any, count: int, cfg: DataConfig) -> Pictures:
    if not len(dataset):
        raise ValueError("the data set has no images: look at it with `mimdet check-data`")
    records = [dataset[i] for i in range(min(count, len(dataset)))]
    return Pictures(records, list(dataset.categories), dataset, cfg)
