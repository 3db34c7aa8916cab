"""Every backbone, neck, stem, sampler, fill and norm through everything a detector has to do.

Each case is a tiny preset, or one changed in a field or two.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import mimdet
from mimdet.config import Config, set_field
from mimdet.data.shapes import ShapesCOCO
from mimdet.models.backbones import BASELINES, build_backbone
from mimdet.models.detector import Detector, autocast, build_detector
from mimdet.models.official import export_detectron2
from mimdet.models.rcnn import PYRAMID
from mimdet.models.sampling import Sample, Sampling
from mimdet.presets import PRESETS
from mimdet.structures import Target
from mimdet.training.optim import parameter_groups

TINY = [name for name in PRESETS if name.startswith("tiny")]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in TINY},
    "mask token": ("tiny", {"backbone.decoder_fill": "mask_token"}),
    "patch stem, mask token": ("tiny_patch_stem", {"backbone.decoder_fill": "mask_token"}),
    "grid sampler, padded": ("tiny", {"backbone.sampler": "grid", "backbone.keep": "padded"}),
    "block sampler": ("tiny", {"backbone.sampler": "block"}),
    "simple pyramid": ("tiny", {"detector.neck": "simple_pyramid"}),
    "LN": ("tiny_vitdet", {"detector.norm": "LN"}),
    "GN": ("tiny", {"detector.norm": "GN"}),
    "ViTDet, FPN": ("tiny_vitdet", {"detector.neck": "fpn"}),
    "bottlenecks": ("tiny_resnet", {"backbone.bottleneck": True, "backbone.embed_dim": 8}),
}
BASELINE_PRESETS = [name for name in TINY if PRESETS[name]().backbone.kind in BASELINES]
FIRST_ATTENTION = {
    "mimdet": "encoder.blocks.0.attn",
    "benchmarking_vit": "encoder.blocks.0.attn",
    "vitdet": "encoder.blocks.0.attn",
    "swin": "stages.layers.0.blocks.0.attn",
    "resnet": "stages.layer1.0.conv1",
}
STRIDES = (4, 8, 16, 32, 64)


def config(case: str, **fields: Any) -> Config:
    preset, changes = CASES[case]
    cfg = PRESETS[preset]()
    for dotted, value in changes.items():
        set_field(cfg, dotted, value)
    for name, value in fields.items():
        setattr(cfg.backbone, name, value)
    return cfg


def detector(case: str, **fields: Any) -> Detector:
    """With noise on every weight: what starts at zero (a residual branch, a bias table) would hide
    whether anything behind it works."""
    torch.manual_seed(0)
    model = build_detector(config(case, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    return model


def scenes(count: int = 2) -> tuple[list[Tensor], list[Target]]:
    data = ShapesCOCO("shapes-v1-medium", 128, count)
    records = [data[i] for i in range(count)]
    return [record.image for record in records], [record.target for record in records]


def training_step(model: Detector) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Losses, and the gradient of every trainable parameter."""
    images, targets = scenes()
    torch.manual_seed(1)  # sampled tokens, stochastic depth, drawn anchors and proposals
    losses = model.train()(images, targets)
    sum(losses.values()).backward()
    return losses, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("height, width", [(96, 160), (224, 32)])
@pytest.mark.parametrize("case", CASES)
def test_shapes(case: str, height: int, width: int) -> None:
    """Grids that no window divides, one of them two tokens wide."""
    model = build_detector(config(case))
    images = torch.randn(2, 3, height, width)
    maps = model.backbone(images, [(height, width), (height - 5, width - 17)])
    assert list(maps) == ["c2", "c3", "c4", "c5"]
    assert {level: m.shape[1] for level, m in maps.items()} == model.backbone.channels
    pyramid = model.neck(maps)
    assert tuple(pyramid) == PYRAMID
    for maps_of_one_kind, channels in ((maps, None), (pyramid, model.config.detector.channels)):
        for m, stride in zip(maps_of_one_kind.values(), STRIDES, strict=False):
            assert m.shape[2:] == (-(-height // stride), -(-width // stride))
            assert channels is None or m.shape[1] == channels
            assert m.isfinite().all()
    assert torch.equal(pyramid["p6"], pyramid["p5"][:, :, ::2, ::2])


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_learns(case: str) -> None:
    """One training step at ratio 0.5 (baselines: 1): a gradient everywhere, no exceptions."""
    losses, gradients = training_step(detector(case))
    assert list(losses) == ["loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"]
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("case", ["tiny", "mask token"])
def test_at_ratio_1_only_the_fill_learns_nothing(case: str) -> None:
    """Every place is taken by an encoded token; the fill stays in the graph with gradient 0."""
    _, gradients = training_step(detector(case, sample_ratio=1.0))
    for name, gradient in gradients.items():
        assert gradient is not None
        assert (gradient.abs().max() == 0) == name.startswith("backbone.decoder.fill."), name


@pytest.mark.parametrize("case", TINY)
def test_mixed_precision(case: str) -> None:
    """bfloat16 inside; losses in float32 and near those of full precision."""
    full, _ = training_step(detector(case))
    with autocast(torch.device("cpu"), "bf16"):
        losses, gradients = training_step(detector(case))
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(full[name].item(), rel=0.2), name
    assert all(
        gradient is not None and gradient.isfinite().all() for gradient in gradients.values()
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_checkpointing_changes_nothing(case: str, drop_path: float) -> None:
    """Recomputed activations are the same, also of stochastic depth."""
    results = []
    for mode in ("on", "off"):
        model = detector(case, checkpointing=mode, drop_path=drop_path)
        results.append((*training_step(model), dict(model.named_buffers())))
    (losses_on, gradients_on, buffers_on), (losses_off, gradients_off, buffers_off) = results
    for name, loss in losses_off.items():
        torch.testing.assert_close(losses_on[name], loss)
    for name, gradient in gradients_off.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(gradients_on[name], gradient, rtol=1e-4, atol=1e-5 * scale)
    for name, buffer in buffers_off.items():
        torch.testing.assert_close(buffers_on[name], buffer)


@pytest.mark.parametrize("case", TINY)
@pytest.mark.parametrize("mode", ["on", "off", "auto"])
def test_checkpointing_runs_blocks_twice(case: str, mode: str) -> None:
    """While training with "on"; never in evaluation, for ResNet, or by itself on a CPU."""
    model = detector(case, checkpointing=mode)
    part = model.backbone.get_submodule(FIRST_ATTENTION[model.config.backbone.kind])
    calls: list[int] = []
    part.register_forward_pre_hook(lambda *_: calls.append(1))
    training_step(model)
    assert len(calls) == (2 if mode == "on" and case != "tiny_resnet" else 1)
    calls.clear()
    model.detect(scenes(1)[0])
    assert len(calls) == 1


@pytest.mark.parametrize("case", TINY)
def test_detections_and_their_file(case: str, tmp_path: Path) -> None:
    """Weights written and loaded into a new model give the same detections, bit for bit."""
    model = detector(case).eval()
    model.roi_heads.score_threshold = 0.0  # untrained: scores are low
    images, _ = scenes(1)
    images[0] = images[0][:, :101, :77]
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    again = mimdet.load_detector(tmp_path / "weights.safetensors", config(case))
    again.roi_heads.score_threshold = 0.0
    (found,), (same,) = model.detect(images), again.detect(images)
    assert len(found) > 0
    assert found.boxes.isfinite().all() and found.mask_probabilities is not None
    for part in ("boxes", "scores", "labels", "mask_probabilities"):
        assert torch.equal(getattr(found, part), getattr(same, part))


@pytest.mark.parametrize("case", BASELINE_PRESETS)
def test_a_baseline_samples_nothing(case: str) -> None:
    model = detector(case).eval()
    images, _ = scenes(1)
    generators = [torch.Generator()]
    everything = model.detect(images, sampling=Sampling(1.0, "valid", None, generators))
    assert torch.equal(everything[0].boxes, model.detect(images)[0].boxes)
    name = type(model.backbone).__name__
    for asked in (Sampling(0.5), Sampling(sample=Sample([torch.arange(3)], (8, 8)))):
        with pytest.raises(ValueError, match=f"the backbone {name} samples no tokens"):
            model.detect(images, sampling=asked)


@pytest.mark.parametrize(
    ("fields", "parts", "said"),
    [
        ({"sample_ratio": 0.5}, {}, "a swin backbone sees every token: set backbone.sample_ratio"),
        ({"sample_ratio_eval": 0.5}, {}, "sample_ratio_eval to 1, not 1.0, 0.5"),
        ({}, {"stem": torch.nn.Identity()}, "a swin backbone has no stem to replace"),
        ({}, {"sampler": len}, "a swin backbone has no sampler to replace"),
        ({"kind": "swim"}, {}, r"backbone='swim' is not known: use one of \['benchmarking_vit'"),
        ({"kind": "benchmarking_vit", "global_blocks": 3}, {}, "global_blocks=3: each of c2..c5"),
        ({"kind": "vitdet", "depth": 6}, {}, "global_blocks=4 cannot be spread evenly over depth"),
    ],
)
def test_wrong_configurations_are_explained(fields, parts, said) -> None:
    with pytest.raises(ValueError, match=said):
        build_backbone(config("tiny_swin", **fields).backbone, **parts)


@pytest.mark.parametrize("case", BASELINE_PRESETS)
def test_rates_and_weight_decay(case: str) -> None:
    """Pre-trained parts are one group. Norms and positions never decay, biases where asked."""
    cfg = config(case)
    model = build_detector(cfg)
    cfg.training.rate_multiplier = 4.0
    cfg.training.decay_biases = True
    groups = parameter_groups(model, cfg.training)
    decay = {name: group["weight_decay"] > 0 for group in groups for name in group["names"]}
    part = {name: group["part"] for group in groups for name in group["names"]}
    assert decay.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    trunk = ("backbone.encoder.", "backbone.stages.")
    assert {part[name] for name in part if name.startswith(trunk)} == {"encoder"}
    assert {part[name] for name in part if not name.startswith("backbone.")} == {"rest"}
    norms = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(prefix=path, recurse=False):
            if isinstance(module, norms) or name.endswith(("pos_embed", "bias_table")):
                assert not decay[name], name
            else:
                assert decay[name], name
    cfg.training.decay_biases = False
    plain = [group for group in parameter_groups(model, cfg.training) if group["weight_decay"] > 0]
    assert not any(name.endswith("bias") for group in plain for name in group["names"])


@pytest.mark.parametrize("case", ["tiny_swin", "tiny_vitdet"])
def test_only_released_models_have_the_originals_names(case: str, tmp_path: Path) -> None:
    model = build_detector(config(case))
    kind = model.config.backbone.kind
    with pytest.raises(ValueError, match=f"has no counterpart of a '{kind}' backbone"):
        export_detectron2(model, tmp_path / "exported.pth")


def test_an_unknown_neck_and_an_image_larger_than_the_canvas_are_explained() -> None:
    cfg = config("tiny")
    cfg.detector.neck = "giraffe"
    with pytest.raises(ValueError, match=r"neck='giraffe' is not known: use one of \['fpn', 'sim"):
        build_detector(cfg)
    model = build_detector(config("tiny_benchmarking_vit"))
    with pytest.raises(ValueError, match=r"300x200 does not fit .*canvas=256: set .*max_side"):
        model.detect([torch.zeros(3, 300, 200, dtype=torch.uint8)])
