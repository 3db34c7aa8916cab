"""What must not change while the code behind it does: public names, signatures, numbers.

The numbers lie in tests/data/contract.json. They were measured before the library was made compact;
`MIMDET_FREEZE=1 pytest tests/unit/test_contract.py` measures them again, on purpose.
"""

import copy
import inspect
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator

import mimdet
from mimdet.models.sampling import Sample
from mimdet.training.optim import build_optimizer
from mimdet.training.train import train

FROZEN = Path(__file__).parents[1] / "data" / "contract.json"
SCENES = 20
STEPS = 10


def frozen(name: str, measured: Any) -> Any:
    """The stored value of `name`, which is measured again where that is asked for."""
    values = json.loads(FROZEN.read_text()) if FROZEN.exists() else {}
    if os.environ.get("MIMDET_FREEZE") == "1":
        FROZEN.write_text(json.dumps(values | {name: measured}) + "\n")
        return measured
    return values[name]


def close(measured: Any, stored: Any, bound: float) -> None:
    ours, theirs = (torch.tensor(numbers, dtype=torch.float64) for numbers in (measured, stored))
    torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


def test_public_names_are_those_of_the_design() -> None:
    names = sorted(set(mimdet.__all__) - {"__version__"})
    assert set(frozen("names", names)) <= set(names)
    assert all(hasattr(mimdet, name) for name in names)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("build_detector", "cfg, backbone, neck, stem, sampler"),
        ("load_mae", "model, source, decoder"),
        ("load_detector", "source, cfg"),
        ("load_mae_model", "source"),
        ("predict", "model, images, sample_ratio, keep, sample, seed"),
        ("train", "cfg, run, model, train_data, val_data"),
        ("fit", "cfg, name"),
        ("evaluate", "model, dataset, sample_ratio"),
        ("experiment", "base, grid, seeds"),
        ("record", "model"),
    ],
)
def test_signatures_are_those_of_the_design(name: str, wanted: str) -> None:
    has = inspect.signature(getattr(mimdet, name)).parameters
    assert [part for part in wanted.split(", ") if part not in has] == []


def test_detector_takes_a_sample() -> None:
    """`model(images, targets, sample=...)`: a ready sample goes into training too."""
    model = mimdet.build_detector(mimdet.presets.tiny())
    scene = mimdet.ShapesCOCO(size=64, length=1)[0]
    sample = Sample([torch.arange(4)], (4, 4))
    losses = model([scene.image], [scene.target], sample=sample)
    names = ["loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"]
    assert list(losses) == names


def test_predictions_of_the_shipped_detector_are_the_same() -> None:
    model = mimdet.load_detector("tiny")
    data = mimdet.ShapesCOCO(length=SCENES, split="val", seed=7)
    found = mimdet.predict(model, [data[i].image for i in range(SCENES)], sample_ratio=0.25, seed=3)
    measured = {
        "found": [len(d) for d in found],
        "boxes": [[round(x, 3) for x in d[:8].boxes.flatten().tolist()] for d in found],
        "scores": [[round(x, 5) for x in d[:8].scores.tolist()] for d in found],
        "labels": [d[:8].labels.tolist() for d in found],
    }
    stored = frozen("predictions", measured)
    assert (measured["found"], measured["labels"]) == (stored["found"], stored["labels"])
    for ours, theirs in zip(measured["boxes"], stored["boxes"], strict=True):
        close(ours, theirs, 2e-3)
    for ours, theirs in zip(measured["scores"], stored["scores"], strict=True):
        close(ours, theirs, 2e-5)


def test_losses_of_a_training_are_the_same(tmp_path: Path) -> None:
    """Ten steps of `tiny` as it was first, through all that a training goes through, in float64."""
    cfg = mimdet.presets.tiny()
    cfg.backbone.decoder_depth, cfg.backbone.decoder_fill = 2, "stem"
    cfg.training.optimizer, cfg.training.learning_rate = "adamw", 1.6e-3
    cfg.training.precision, cfg.training.steps, cfg.training.threads = "fp64", STEPS, 1
    cfg.data.shapes_val, cfg.data.workers = 2, 0
    measured = [list(step.losses.values()) for step in train(cfg, tmp_path / "run")]
    close(measured, frozen("losses of tiny", measured), 1e-9)


@pytest.fixture
def exact_logarithms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes are float32 in a float64 model, too, and the last digit of a float32 logarithm depends
    on the maker of the processor (1e-8 of a loss): here it is rounded from float64 everywhere."""
    for name in ("log", "exp"):
        exact = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda x, exact=exact: exact(x.double()).to(x.dtype)
        )


@pytest.mark.slow
@pytest.mark.usefixtures("exact_logarithms")
def test_losses_of_the_paper_s_model_are_the_same() -> None:
    """Ten updates of `mimdet_base` on scenes of 64 pixels, in float64."""
    cfg = mimdet.presets.mimdet_base()
    cfg.detector.num_classes, cfg.detector.rois_per_image = 12, 16
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        measured = paper_losses(cfg)
    finally:
        torch.set_default_dtype(torch.float32)
    close(measured, frozen("losses of mimdet_base", measured), 1e-9)


def paper_losses(cfg: mimdet.Config) -> list[list[float]]:
    model = mimdet.build_detector(copy.deepcopy(cfg)).train()
    optimizer = build_optimizer(model, cfg.training)
    data = mimdet.ShapesCOCO(size=64, length=2 * STEPS)
    measured = []
    for step in range(STEPS):
        torch.manual_seed(step)
        pair = [data[2 * step], data[2 * step + 1]]
        sample = Sample(
            [torch.randperm(16, generator=Generator().manual_seed(step))[:8]] * 2, (4, 4)
        )
        losses = model([r.image for r in pair], [r.target for r in pair], sample=sample)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        measured.append([value.item() for value in losses.values()])
    return measured
