"""The Mask R-CNN, read top-down."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimdet.config import BackboneConfig, Config, DetectorConfig
from mimdet.images import Resize, to_rgb
from mimdet.models.backbones import SampledBackbone, build_backbone, resolve
from mimdet.models.rcnn import (
    LOSSES,
    NECKS,
    AnchorGrid,
    Batch,
    Losses,
    make_norm,
    pad_and_normalise,
)
from mimdet.models.roi_heads import BoxHead, C4Classes, MaskHead, RoIHeads
from mimdet.models.rpn import RPN
from mimdet.models.sampling import DEFAULT, Sample, Sampler, Sampling
from mimdet.models.vit import Fill
from mimdet.structures import Detections, Target

STRIDES = (4, 8, 16, 32, 64)
CANVAS_GREY = 128  # what large-scale jitter fills its square with; data/augment.py has the same

OVERLAP = 64
"""Pixels that neighbouring tiles share."""


class Tiling(NamedTuple):
    """How images are cut into square tiles."""

    side: int
    overlap: int
    zoom: float
    """Pixels that the detector sees to one of a tile."""
    whole: Resize
    """Of the image as a whole."""


class Detector(nn.Module):
    """Finished parts in, no configuration inside: backbone -> neck -> RPN -> RoI heads.

    What `build_detector` adds is what it knows of the model, for those who use it: how images are
    brought to size (`resize`), the configuration it was built from; and what a training or a file
    adds: names and COCO ids of the labels (without: 1, 2, ...), and the step of the weights.
    """

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module,
        rpn: RPN,
        roi_heads: RoIHeads,
        *,
        resize: Resize | None = None,
        canvas: int = 0,
    ) -> None:
        """resize: for `prepare` and `mimdet.predict`; None leaves images at their own size.
        canvas: side of the grey square that every image is placed on; 0 = none."""
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.rpn = rpn
        self.roi_heads = roi_heads
        self.c4_classes: C4Classes | None = None  # an own loss on c4, of training alone
        self.resize = resize or Resize()
        self.canvas = canvas
        self.tiling: Tiling | None = None
        self.config = Config()
        self.categories: list[str] = []
        self.category_ids: list[int] = []
        self.slots: dict[str, Any] = {}
        self.step: int | None = None

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Target] | None = None,
        sample: Sample | None = None,
        *,
        sampling: Sampling = DEFAULT,
    ) -> Any:
        """images: uint8 (3, h, w) RGB, any sizes.

        With targets -> dict of loss_rpn_cls, loss_rpn_loc, loss_cls, loss_box_reg, loss_mask and,
        where `detector.c4_loss` asks for it, loss_c4 (float32 scalars); without -> list of
        Detections in the pixels of these images, or of the canvas where there is one. `sampling`
        says which tokens the encoder sees; a ready `sample` is short for `Sampling(sample=sample)`.
        """
        batch = self.batch(images)
        maps = self.features(batch, sampling if sample is None else Sampling(sample=sample))
        levels = list(self.neck(maps).values())  # p2..p6
        if targets is not None:
            check_targets(targets, len(images), self.roi_heads.num_classes)
            targets = [target.to(batch.tensors.device) for target in targets]
        proposals, losses = self.rpn(batch, levels, targets)
        boxes = [p.boxes for p in proposals]
        if targets is not None:
            if self.c4_classes is not None:
                losses["loss_c4"] = self.c4_classes.loss(maps["c4"], targets)
            return losses | self.roi_heads.losses(levels[:4], boxes, targets)
        return self.roi_heads.detect(batch, levels[:4], boxes)

    def features(self, batch: Batch, sampling: Sampling = DEFAULT) -> dict[str, Tensor]:
        """c2..c5. ValueError where tokens are to be left out of a backbone that sees every one."""
        if isinstance(self.backbone, SampledBackbone):
            return self.backbone(batch.tensors, batch.image_sizes, sampling)
        if sampling.sample is not None or sampling.ratio not in (None, 1):
            raise ValueError(
                f"the backbone {type(self.backbone).__name__} samples no tokens: ask for no sample "
                "and no ratio below 1"
            )
        return self.backbone(batch.tensors, batch.image_sizes)

    @property
    def sample_ratio_eval(self) -> float:
        """Share of the tokens kept in evaluation, unless a call says otherwise."""
        backbone = self.backbone
        return backbone.sample_ratio_eval if isinstance(backbone, SampledBackbone) else 1.0

    @property
    def samples(self) -> bool:
        """Whether its encoder can see a sample of the tokens."""
        return isinstance(self.backbone, SampledBackbone)

    def prepare(self, *images: Any) -> Batch:
        """What the backbone sees of images: resized, on the canvas, padded, normalised.

        images: paths, PIL images, uint8 arrays or tensors (`mimdet.images.to_rgb`).
        """
        return self.batch([self.resize(to_rgb(image)) for image in images])

    def batch(self, images: Sequence[Tensor]) -> Batch:
        """uint8 (3, h, w) images as they are -> one padded batch on the model's device."""
        if self.canvas:
            images = [on_canvas(image, self.canvas) for image in images]
        return pad_and_normalise(images, self)

    @torch.inference_mode()
    def detect(
        self,
        images: Sequence[Tensor],
        sample: Sample | None = None,
        *,
        sampling: Sampling = DEFAULT,
    ) -> list[Detections]:
        """`forward` without targets, in evaluation mode."""
        with evaluating(self):
            return self(images, sample=sample, sampling=sampling)


def at_size(
    model: Detector,
    short_side: int = 0,
    detections: int = 0,
    tile: int = 0,
    overlap: int = OVERLAP,
) -> Detector:
    """The detector, of the same weights, that looks at images in another way; 0 = as it does.

    short_side: pixels of a resized image; its longest side grows alike. detections: the most in an
    image, or in a tile; the number of proposals grows alike. tile: side of the tiles that an image
    is cut into. They share `overlap` pixels, and are seen at full resolution or, with `short_side`,
    at short_side / tile times that. ValueError for values that make no sense.
    """
    if min(short_side, detections, tile) < 0 or (tile and not 0 <= overlap < tile):
        given = f"short_side={short_side}, detections={detections}, tile={tile}, overlap={overlap}"
        raise ValueError(f"{given}: from 1, 0 = as it is; tiles must be larger than their overlap")
    other = copy.copy(model)
    other._modules = dict(model._modules)
    other.config = copy.deepcopy(model.config)
    data, d = other.config.data, other.config.detector
    if tile:
        zoom = short_side / tile if short_side else 1.0
        other.tiling, other.resize = Tiling(tile, overlap, zoom, model.resize), Resize()
    elif short_side:
        data.max_side = round(data.max_side * short_side / data.test_short_side)
        data.test_short_side = short_side
        other.resize = Resize(short_side, data.max_side)
    if detections:
        more = max(1.0, detections / d.detections_per_image)
        d.detections_per_image = detections
        d.rpn_pre_nms = d.rpn_pre_nms[0], round(more * d.rpn_pre_nms[1])
        d.rpn_post_nms = d.rpn_post_nms[0], round(more * d.rpn_post_nms[1])
        other.rpn, other.roi_heads = copy.copy(model.rpn), copy.copy(model.roi_heads)
        other.rpn.pre_nms, other.rpn.post_nms = d.rpn_pre_nms, d.rpn_post_nms
        other.roi_heads.detections_per_image = detections
    return other


class Category(msgspec.Struct):
    """A class as a file names it."""

    id: int
    """COCO's."""
    name: str


def category_entries(model: Detector) -> list[dict[str, Any]]:
    """The classes of a detector, in the order of its labels, for a file."""
    ids = model.category_ids or range(1, len(model.categories) + 1)
    pairs = zip(ids, model.categories, strict=True)
    return [{"id": number, "name": name} for number, name in pairs]


def read_categories(text: str | bytes) -> list[Category]:
    """The classes in a file's json. Older files hold names alone. ValueError for anything else."""
    entries = msgspec.json.decode(text, type=list[Category | str])
    numbered = enumerate(entries, start=1)
    return [Category(i, one) if isinstance(one, str) else one for i, one in numbered]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every part is back in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


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


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Mixed precision as configured; `auto` is bf16 on CUDA and fp32 elsewhere.

    `fp64` makes new tensors float64, as the weights of the model have to be already.
    """
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if precision == "fp64" else default)
    try:
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            yield
    finally:
        torch.set_default_dtype(default)


COMPILED = ("stem", "attn", "mlp", "neck", "head", "box_head", "mask_head")


def compile_parts(model: nn.Module) -> None:
    """Have PyTorch compile the parts with these names when they first run, for any input size.

    Weights keep their names. What draws at random (stochastic depth) or chooses (NMS, matching)
    stays as it is; so blocks of different drop rates share what is compiled.
    """
    for name, part in model.named_modules():
        if name.rpartition(".")[2] in COMPILED:
            part.compile(dynamic=True)


def check_targets(targets: Sequence[Target], images: int, num_classes: int) -> None:
    """ValueError for labels outside 0..num_classes-1: the next one would train as background."""
    if len(targets) != images:
        raise ValueError(f"{len(targets)} targets for {images} images: give one per image")
    labels = torch.cat([target.labels for target in targets])
    unknown = (labels < 0) | (labels >= num_classes)
    if unknown.any():
        image = torch.cat([torch.full_like(t.labels, i) for i, t in enumerate(targets)])
        raise ValueError(
            f"targets[{image[unknown][0]}].labels hold {labels[unknown][0]}; the detector knows "
            f"0..{num_classes - 1} (detector.num_classes={num_classes})"
        )


def build_detector(
    cfg: Config,
    *,
    backbone: nn.Module | Callable[[BackboneConfig], nn.Module] | None = None,
    neck: nn.Module | None = None,
    stem: nn.Module | None = None,
    sampler: Sampler | None = None,
    fill: Fill | None = None,
    loss: Losses | None = None,
) -> Detector:
    """The detector a configuration describes; any slot may be passed in ready-made.

    A part written in a notebook cell is used as it is, without registering it anywhere. A function
    as `backbone` makes one of `cfg.backbone`, like one that is named `module:function`.
    """
    passed = dict(backbone=backbone, neck=neck, stem=stem, sampler=sampler, fill=fill, loss=loss)
    if backbone is None:
        backbone = build_backbone(cfg.backbone, stem=stem, sampler=sampler, fill=fill)
    elif (stem, sampler, fill) != (None, None, None):
        raise ValueError("backbone= is complete: give stem, sampler and fill to it, not beside it")
    if not isinstance(backbone, nn.Module):
        backbone = backbone(cfg.backbone)
    d = cfg.detector
    if neck is None:
        neck = resolve(d.neck, NECKS, "neck")(backbone.channels, d.channels, make_norm(d.norm))
    losses = resolve(d.loss, LOSSES, "loss")() if loss is None else loss
    resize = Resize(cfg.data.test_short_side, cfg.data.max_side)
    rpn, roi_heads = build_rpn(d, losses), build_roi_heads(d, losses)
    detector = Detector(backbone, neck, rpn, roi_heads, resize=resize, canvas=d.canvas)
    widths: Any = backbone.channels
    detector.c4_classes = C4Classes(widths["c4"], d.num_classes, d.c4_loss) if d.c4_loss else None
    detector.config = copy.deepcopy(cfg)  # a later change of cfg must not change the model's
    detector.slots = {name: part for name, part in passed.items() if part is not None}
    return detector


def build_rpn(d: DetectorConfig, losses: Losses | None = None) -> RPN:
    anchors = AnchorGrid(d.anchor_sizes, d.anchor_ratios, STRIDES)
    return RPN(
        d.channels,
        anchors,
        d.rpn_convs,
        d.rpn_pre_nms,
        d.rpn_post_nms,
        d.rpn_nms,
        d.rpn_anchors_per_image,
        losses,
    )


def build_roi_heads(d: DetectorConfig, losses: Losses | None = None) -> RoIHeads:
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
        losses,
    )
