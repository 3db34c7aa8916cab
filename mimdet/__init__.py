"""MIMDet in plain PyTorch: a ViT detector that sees a sample of an image's tokens.

The public names below are imported when they are first used, so `import mimdet` costs next to
nothing and a program that only reads configurations never loads the detector.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES_OF = {
    "config": ("Config", "BackboneConfig"),
    "models.detector": ("build_detector",),
    "models.sampling": ("Sample", "Sampling", "select"),
    "structures": ("Crops", "Detections", "Target"),
    "inference": ("predict",),
    "data.shapes": ("ShapesCOCO",),
    "data.coco": ("CocoDataset", "Nuclei", "build_dataset"),
    "data.checks": ("check_dataset",),
    "training.train": ("train", "fit"),
    "training.run": ("load_detector",),
    "models.rcnn": ("Losses",),
    "models.weights": ("load_mae", "load_mae_model", "save_mae"),
    "models.official": ("export_detectron2", "save_detector"),
    "models.mae": ("MAE",),
    "analysis.evaluate": ("evaluate",),
    "analysis.errors": ("find_errors",),
    "analysis.comparison": ("compare_runs",),
    "analysis.reliance": ("reliance", "linear_probe", "token_rank", "token_scale"),
    "training.pretrain": ("pretrain",),
    "training.proposal": ("propose",),
    "experiments.experiment": ("experiment",),
    "viz.record": ("record",),
    "notebook": ("notebook_setup", "check", "judge"),
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}

__all__ = ["__version__", *_MODULE_OF, "presets"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name == "presets":
        return importlib.import_module("mimdet.presets")
    if name not in _MODULE_OF:
        raise AttributeError(f"mimdet has no {name!r}; its public names are {sorted(__all__)}")
    value = getattr(importlib.import_module(f"mimdet.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
