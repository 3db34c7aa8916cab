"""The whole detector at toy size: what goes in, what comes out, and what must not change."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mimdet import presets
from mimdet.config import Config
from mimdet.inference import predict
from mimdet.models.detector import Detector, build_detector
from mimdet.models.roi_heads import C4Classes
from mimdet.models.sampling import Sample, Sampling
from mimdet.models.stem import STEMS, ConvStem
from mimdet.structures import Crops, Target
from tests.small import small

LOSSES = ["loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"]


def small_config(**detector: Any) -> Config:
    cfg, changed = small(), {"num_classes": 3, "score_threshold": 0.0, "detections_per_image": 10}
    cfg.detector = replace(cfg.detector, **changed, **detector)
    return cfg


def picture(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def two_objects() -> Target:
    boxes = torch.tensor([[8.0, 8, 40, 40], [30, 20, 60, 50]])
    bitmaps = torch.ones(2, 16, 16, dtype=torch.uint8)
    return Target(boxes, torch.tensor([0, 2]), Crops(boxes, bitmaps))


def no_objects() -> Target:
    masks = Crops(torch.zeros(0, 4), torch.zeros(0, 16, 16, dtype=torch.uint8))
    return Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), masks)


@pytest.mark.parametrize(
    ("name", "parameters", "trainable"),
    [
        ("mimdet_base", 127_954_768, 124_753_488),
        ("mimdet_large", 349_332_080, 345_490_544),
        ("mimdet_v1_base", 127_561_552, 124_360_272),
        ("mimdet_v1_large", 345_268_848, 344_966_256),
    ],
)
def test_parameter_counts_are_the_published_ones(name, parameters, trainable) -> None:
    with torch.device("meta"):
        model = build_detector(presets.PRESETS[name]())
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    assert sum(n for n, _ in counts) == parameters
    assert sum(n for n, learns in counts if learns) == trainable


def test_a_batch_without_any_object_trains() -> None:
    """Every parameter takes part, so that no process of several waits for a gradient."""
    model = build_detector(small_config())
    losses = model([picture(64, 64), picture(64, 64)], [no_objects(), no_objects()])
    assert losses["loss_rpn_loc"] == losses["loss_box_reg"] == losses["loss_mask"] == 0
    sum(losses.values()).backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learning)


def test_boxes_only() -> None:
    model = build_detector(small_config(masks=False))
    truth = two_objects()
    truth.masks = None
    assert list(model([picture(64, 64)], [truth])) == LOSSES[:4]
    found = model.detect([picture(64, 64)])[0]
    assert len(found) == 10 and found.mask_probabilities is None
    with pytest.raises(ValueError, match=r"detector\.masks=False"):
        build_detector(small_config())([picture(64, 64)], [truth])


def test_c4_tells_classes_by_hand() -> None:
    """c4 of two channels; LayerNorm makes (2, 0) and (5, 1) of it (1, -1), whatever the scale."""
    part = C4Classes(2, 2, weight=3.0)
    with torch.no_grad():
        part.linear.weight.copy_(torch.eye(2))
        part.linear.bias.zero_()
    c4 = torch.zeros(2, 2, 4, 4)
    c4[0, 0, :, 2:], c4[1, 0], c4[1, 1] = 2.0, 5.0, 1.0  # of image 0 the right half alone
    box = torch.tensor([[32.0, 0, 64, 64]])
    targets = [Target(box, torch.tensor([0])), Target(box, torch.tensor([1]))]
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert float(part.loss(c4, targets)) == pytest.approx(3 * (right + wrong) / 2, abs=1e-3)
    assert float(part.loss(c4, [no_objects(), no_objects()])) == 0


def test_a_loss_on_c4_is_one_more_in_training_and_nothing_later() -> None:
    torch.manual_seed(0)
    plain, told = (build_detector(small_config(c4_loss=weight)).eval() for weight in (0.0, 2.0))
    extra = told.load_state_dict(plain.state_dict(), strict=False)
    assert {name.partition(".")[0] for name in extra.missing_keys} == {"c4_classes"}
    image = picture(64, 64)
    same = torch.equal(plain.detect([image])[0].boxes, told.detect([image])[0].boxes)
    losses = told.train()([image], [two_objects()])
    assert same and list(losses)[2] == "loss_c4" and len(losses) == len(LOSSES) + 1
    losses["loss_c4"].backward()
    assert next(told.backbone.parameters()).grad is not None


def test_wrong_targets_are_explained() -> None:
    """Label 3 of 3 classes would silently train as background."""
    model, images = build_detector(small_config()), [picture(64, 64)] * 2
    for labels in ([0, 3], [-1, 2]):
        truth = two_objects()
        truth.labels = torch.tensor(labels)
        with pytest.raises(ValueError, match=r"targets\[1\]\.labels .*knows 0\.\.2"):
            model(images, [two_objects(), truth])
    with pytest.raises(ValueError, match="1 targets for 2 images"):
        model(images, [two_objects()])


def test_detections_of_images_of_mixed_sizes() -> None:
    model, sizes = build_detector(small_config()), [(64, 96), (30, 31), (100, 20)]
    found = model.detect([picture(*size) for size in sizes])
    assert [d.image_size for d in found] == sizes
    for d, (height, width) in zip(found, sizes, strict=True):
        assert 0 < len(d) <= 10
        assert d.boxes.dtype == d.scores.dtype == torch.float32 and d.labels.dtype == torch.int64
        assert d.mask_probabilities.shape == (len(d), 28, 28)
        assert d.boxes.min() >= 0
        assert d.boxes[:, 0::2].max() <= width and d.boxes[:, 1::2].max() <= height
        assert (d.scores.diff() <= 0).all() and d.labels.min() >= 0 and d.labels.max() <= 2


def test_detect_changes_nothing_in_the_model() -> None:
    model = build_detector(small_config()).train()
    model.backbone.stem.eval()  # a part frozen by hand
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    found = model.detect([picture(64, 64)])
    assert [module.training for module in model.modules()] == modes
    assert model.training and not model.backbone.stem.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not found[0].boxes.requires_grad

    with pytest.raises(ValueError):
        model.detect([picture(64, 64)], sampling=Sampling(7.0))
    assert model.training and not model.backbone.stem.training  # after an error as well


def test_ratio_and_rule_of_a_phase_and_of_a_call() -> None:
    model, seen = build_detector(small_config()), []
    model.backbone.encoder.register_forward_hook(
        lambda module, given, output: seen.append([len(kept) for kept in output])
    )
    image = [picture(64, 64)]  # 16 tokens
    model(image, [two_objects()])
    model.detect(image)
    model.detect(image, sampling=Sampling(0.25))
    model.backbone.sample_ratio_eval = 0.75
    model.detect(image)
    model.eval()(image, [two_objects()])
    assert seen == [[8], [16], [4], [12], [12]]
    images = [*image, picture(32, 64)]  # 8 tokens on a grid of 16
    model.detect(images, sampling=Sampling(1.0))
    model.detect(images, sampling=Sampling(1.0, keep="padded"))
    assert seen[5:] == [[16, 8], [16, 16]]


def test_a_sampler_and_a_stem_of_ones_own() -> None:
    def centre(tokens: Tensor, grid: tuple[int, int], generator: object) -> Tensor:
        assert tokens.shape == (grid[0] * grid[1], 32)
        places = torch.arange(len(tokens))
        row, column = places // grid[1], places % grid[1]
        return -((row - grid[0] / 2 + 0.5) ** 2) - (column - grid[1] / 2 + 0.5) ** 2

    stem, seen = ConvStem(32), []
    model = build_detector(small_config(), sampler=centre, stem=stem)
    assert model.backbone.stem is stem
    assert model.slots == {"sampler": centre, "stem": stem}
    model.backbone.encoder.register_forward_pre_hook(lambda module, given: seen.append(given[1]))
    model([picture(64, 64)], [two_objects()], sampling=Sampling(0.25))
    assert sorted(seen[0].keep[0].tolist()) == [5, 6, 9, 10]  # the middle of a 4 x 4 grid
    model = build_detector(small_config(), sampler=lambda tokens, grid, generator: torch.rand(grid))
    with pytest.raises(ValueError, match=r"scores of shape \(4, 2\).*one score per token: \(8,\)"):
        model.detect([picture(64, 32)])


def test_a_part_that_is_empty_is_used_all_the_same() -> None:
    """`nn.Sequential()` hands its input on, and counts as false."""
    cfg = small_config()
    cfg.backbone.decoder_dim = cfg.backbone.embed_dim
    nothing = nn.Sequential()
    model = build_detector(cfg, fill=nothing)
    assert not nothing and model.backbone.decoder.fill is nothing
    assert len(model([picture(64, 64)], [two_objects()])) == 5


def test_a_backbone_and_a_neck_of_ones_own() -> None:
    class Pyramid(nn.Module):
        """The smallest one that keeps the contract."""

        def __init__(self) -> None:
            super().__init__()
            self.channels = dict.fromkeys(["c2", "c3", "c4", "c5"], 3)

        def forward(self, images: Tensor, image_sizes: object) -> dict[str, Tensor]:
            pool = nn.functional.avg_pool2d
            return {f"c{i}": pool(images, 2**i) for i in range(2, 6)}

    class Widen(nn.Module):
        def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
            levels = [m.repeat(1, 6, 1, 1)[:, :16] for m in maps.values()]
            levels.append(levels[3][:, :, ::2, ::2])
            return dict(zip(["p2", "p3", "p4", "p5", "p6"], levels, strict=True))

    alone = build_detector(small_config(), backbone=Pyramid())
    assert len(alone([picture(64, 64)], [two_objects()])) == 5
    both = build_detector(small_config(), backbone=Pyramid(), neck=Widen())
    assert len(both.detect([picture(64, 64)])) == 1
    assert predict(alone, picture(64, 64)).image_size == (64, 64)
    with pytest.raises(ValueError, match="backbone Pyramid samples no tokens"):
        predict(alone, picture(64, 64), sample_ratio=0.5)
    assert list(both.slots) == ["backbone", "neck"]
    with pytest.raises(ValueError, match="backbone= is complete"):
        build_detector(small_config(), backbone=Pyramid(), stem=ConvStem(32))


def test_a_ready_sample_is_used_as_it_is() -> None:
    model, images = build_detector(small_config()).eval(), [picture(64, 64), picture(64, 33)]
    keep = [torch.tensor([3, 15, 0]), torch.tensor([9])]
    seen: list[Sample] = []
    model.backbone.encoder.register_forward_pre_hook(lambda module, given: seen.append(given[1]))
    model.detect(images, sample=Sample(keep, (4, 4)))
    assert [places.tolist() for places in seen[0].keep] == [[3, 15, 0], [9]]
    for wrong in (Sample(keep, (2, 8)), Sample(keep[:1], (4, 4))):
        with pytest.raises(ValueError, match=r"this batch has 2 on a padded grid of \(4, 4\)"):
            model.detect(images, sample=wrong)


def test_slots_are_named_in_the_configuration() -> None:
    cfg = small_config()
    cfg.backbone.stem = "mimdet.models.stem:PatchStem"
    cfg.backbone.sampler = "mimdet.models.sampling:block_sampler"
    model = build_detector(cfg)
    assert isinstance(model.backbone.stem, STEMS["patch"])
    assert len(model.detect([picture(64, 64)])) == 1
    for name, said in [
        ("cnov", r"stem='cnov' is not known: use one of \['conv', 'patch'\]"),
        ("mimdet.models.stem:Nothing", "cannot be imported: .*Nothing"),
        ("no_such_module:f", "cannot be imported: No module named"),
    ]:
        cfg.backbone.stem = name
        with pytest.raises(ValueError, match=said):
            build_detector(cfg)
    built = build_detector(small_config())
    again = Detector(built.backbone, built.neck, built.rpn, built.roi_heads)
    assert again.config == Config() and again.slots == {} and again.categories == []
    assert again.state_dict().keys() == built.state_dict().keys()
