"""MIMDet in plain PyTorch: a ViT detector that sees a sample of an image's tokens.

The public names below are imported when they are first used, so `import mimdet` costs next to
nothing and a program that only reads configurations never loads the detector.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULE_OF = {
    "Config": "mimdet.config",
    "BackboneConfig": "mimdet.config",
    "build_detector": "mimdet.models.detector",
    "Sample": "mimdet.models.sampling",
    "Sampling": "mimdet.models.sampling",
    "select": "mimdet.models.sampling",
    "Crops": "mimdet.structures",
    "Detections": "mimdet.structures",
    "Target": "mimdet.structures",
    "predict": "mimdet.inference",
    "ShapesCOCO": "mimdet.data.shapes",
    "CocoDataset": "mimdet.data.coco",
    "build_dataset": "mimdet.data.coco",
    "check_dataset": "mimdet.data.checks",
    "train": "mimdet.training.train",
    "fit": "mimdet.training.train",
    "load_detector": "mimdet.training.run",
    "Losses": "mimdet.models.rcnn",
    "load_mae": "mimdet.models.weights",
    "load_mae_model": "mimdet.models.weights",
    "save_mae": "mimdet.models.weights",
    "export_detectron2": "mimdet.models.official",
    "save_detector": "mimdet.models.official",
    "MAE": "mimdet.models.mae",
    "evaluate": "mimdet.analysis.evaluate",
    "find_errors": "mimdet.analysis.errors",
    "compare_runs": "mimdet.analysis.comparison",
    "pretrain": "mimdet.training.pretrain",
    "experiment": "mimdet.experiments.experiment",
    "record": "mimdet.viz.record",
    "notebook_setup": "mimdet.notebook",
    "check": "mimdet.notebook",
}

_SUBMODULES = ("presets",)

__all__ = ["__version__", *_MODULE_OF, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name in _SUBMODULES:
        return importlib.import_module(f"mimdet.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"mimdet has no {name!r}; its public names are {sorted(__all__)}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
