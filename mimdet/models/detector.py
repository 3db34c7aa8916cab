"""The Mask R-CNN, read top-down."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from mimdet.config import Config, DetectorConfig
from mimdet.models.backbones import build_backbone, resolve
from mimdet.models.necks import NECKS
from mimdet.models.rcnn import AnchorGrid, make_norm, pad_and_normalise
from mimdet.models.roi_heads import BoxHead, MaskHead, RoIHeads
from mimdet.models.rpn import RPN, init_rpn
from mimdet.models.sampling import Keep, Sample, Sampler
from mimdet.structures import Detections, Target

STRIDES = (4, 8, 16, 32, 64)
CANVAS_GREY = 128  # what large-scale jitter fills its square with; data/augment.py has the same


class Detector(nn.Module):
    """Finished parts in, no configuration inside: backbone -> neck -> RPN -> RoI heads.

    canvas: side of the grey square that every image is placed on; 0 = none.
    """

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module,
        rpn: RPN,
        roi_heads: RoIHeads,
        canvas: int = 0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.rpn = rpn
        self.roi_heads = roi_heads
        self.canvas = canvas
        self.config = Config()
        self.categories: list[str] = []
        self.slots: dict[str, Any] = {}

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Target] | None = None,
        *,
        sample: Sample | None = None,
        sample_ratio: float | None = None,
        keep: Keep | None = None,
        generators: Sequence[Generator] | None = None,
    ) -> Any:
        """images: uint8 (3, h, w) RGB, any sizes.

        With targets -> dict of loss_rpn_cls, loss_rpn_loc, loss_cls, loss_box_reg, loss_mask
        (float32 scalars); without -> list of Detections in the pixels of these images, or of the
        canvas where there is one. The keyword arguments decide which tokens the encoder sees
        (`mimdet.models.sampling`).
        """
        device = next(self.parameters()).device
        if self.canvas:
            images = [on_canvas(image, self.canvas) for image in images]
        batch = pad_and_normalise(images, device)
        choice = dict(sample=sample, sample_ratio=sample_ratio, keep=keep, generators=generators)
        given = {name: value for name, value in choice.items() if value is not None}
        if not takes_sampling(self.backbone):
            given = refuse_sampling(given, type(self.backbone).__name__)
        maps = self.backbone(batch.tensors, batch.image_sizes, **given)
        levels = list(self.neck(maps).values())  # p2..p6
        if targets is not None:
            check_targets(targets, len(images), self.roi_heads.num_classes)
            targets = [target.to(device) for target in targets]
        proposals, losses = self.rpn(batch, levels, targets)
        boxes = [p.boxes for p in proposals]
        if targets is not None:
            return losses | self.roi_heads.losses(levels[:4], boxes, targets)
        return self.roi_heads.detect(batch, levels[:4], boxes)

    @torch.inference_mode()
    def detect(self, images: Sequence[Tensor], **sampling: Any) -> list[Detections]:
        """Evaluation mode for one call; every part returns to the mode it was in."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            return self(images, **sampling)
        finally:
            for module, training in modes.items():
                module.training = training


def takes_sampling(backbone: nn.Module) -> bool:
    """Whether a backbone's `forward` has the arguments that decide which tokens it sees."""
    parameters = inspect.signature(backbone.forward).parameters
    return "sample_ratio" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def refuse_sampling(given: dict[str, Any], name: str) -> dict[str, Any]:
    """Nothing, for a backbone of your own that takes images and sizes alone.

    Raises ValueError where a sample, or a share of the tokens below 1, was asked for.
    """
    if "sample" in given or given.get("sample_ratio", 1) != 1:
        raise ValueError(
            f"the backbone {name} samples no tokens: set backbone.sample_ratio_eval=1, and ask for "
            "no sample and no ratio below 1"
        )
    return {}


def on_canvas(image: Tensor, side: int) -> Tensor:
    """uint8 (3, h, w) -> (3, side, side): the image top left, grey elsewhere.

    What follows takes the canvas for the image, as the original does: boxes may reach into the
    grey part until `mimdet.inference.to_original` cuts them off.
    """
    height, width = image.shape[1:]
    if height > side or width > side:
        raise ValueError(
            f"an image of {height}x{width} does not fit on the canvas of detector.canvas={side}: "
            f"set data.test_short_side and data.max_side to at most {side}"
        )
    return F.pad(image, (0, side - width, 0, side - height), value=CANVAS_GREY)


def check_targets(targets: Sequence[Target], images: int, num_classes: int) -> None:
    """ValueError for labels outside 0..num_classes-1: the next one would train as background."""
    if len(targets) != images:
        raise ValueError(f"{len(targets)} targets for {images} images: give one per image")
    for i, labels in enumerate(target.labels for target in targets):
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(
                f"targets[{i}].labels reach from {int(labels.min())} to {int(labels.max())}; the "
                f"detector knows 0..{num_classes - 1} (detector.num_classes={num_classes})"
            )


def build_detector(
    cfg: Config,
    *,
    backbone: nn.Module | None = None,
    neck: nn.Module | None = None,
    stem: nn.Module | None = None,
    sampler: Sampler | None = None,
) -> Detector:
    """The detector a configuration describes; any slot may be passed in ready-made.

    A sampler or stem written in a notebook cell is used as it is, without registering it anywhere.
    """
    if backbone is not None and (stem is not None or sampler is not None):
        raise ValueError("backbone= is complete: give stem= and sampler= to it, not beside it")
    d = cfg.detector
    given_backbone, given_neck = backbone, neck
    backbone = backbone if backbone is not None else build_backbone(cfg.backbone, stem, sampler)
    if neck is None:
        neck = resolve(d.neck, NECKS, "neck")(backbone.channels, d.channels, make_norm(d.norm))
    detector = Detector(backbone, neck, build_rpn(d), build_roi_heads(d), d.canvas)
    detector.config = copy.deepcopy(cfg)  # a later change of cfg must not change the model's
    passed = {"backbone": given_backbone, "neck": given_neck, "stem": stem, "sampler": sampler}
    detector.slots = {name: part for name, part in passed.items() if part is not None}
    return detector


def build_rpn(d: DetectorConfig) -> RPN:
    anchors = AnchorGrid(d.anchor_sizes, d.anchor_ratios, STRIDES)
    rpn = RPN(
        d.channels,
        anchors,
        d.rpn_convs,
        d.rpn_pre_nms,
        d.rpn_post_nms,
        d.rpn_nms,
        d.rpn_anchors_per_image,
    )
    init_rpn(rpn)
    return rpn


def build_roi_heads(d: DetectorConfig) -> RoIHeads:
    norm = make_norm(d.norm)
    mask_head = MaskHead(d.channels, d.num_classes, d.mask_convs, norm) if d.masks else None
    return RoIHeads(
        BoxHead(d.channels, d.num_classes, d.box_convs, d.box_fc_dim, norm),
        mask_head,
        STRIDES[:4],
        d.canonical_size,
        d.rois_per_image,
        d.score_threshold,
        d.nms_threshold,
        d.detections_per_image,
    )
