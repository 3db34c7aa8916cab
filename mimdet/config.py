"""Every number of a run as typed fields.

A `Config` is plain data: no tensors, no modules, nothing imported from torch. A preset
(`mimdet.presets`) returns a fresh one, an override is an assignment, and a typo is an
AttributeError because the classes have slots. The command line, the notebooks and the saved
`config.json` of a run are all made from these fields.
"""

import json
import warnings
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from mimdet.files import read_json, write_json


@dataclass(slots=True)
class BackboneConfig:
    """What turns images into c2..c5: MIMDet's ConvNet-ViT hybrid, or a baseline beside it.

    Fields without a kind in their description belong to `mimdet`; a baseline sees every token, so
    it wants both sample ratios to be 1.
    """

    kind: str = "mimdet"
    """`mimdet`, `benchmarking_vit`, `vitdet`, `swin`, `resnet`, or `module:function`."""
    embed_dim: int = 768
    """Encoder width D; the stem ends with D channels, so it must divide by 8. `swin`, `resnet`:
    width of the first stage, doubled by each later one (a resnet's bottlenecks widen it x 4)."""
    depth: int = 12
    """Encoder blocks; also `benchmarking_vit`, `vitdet`."""
    num_heads: int = 12
    """Attention heads of the encoder; also `benchmarking_vit`, `vitdet`. `swin`: of the first
    stage, doubled by each later one."""
    decoder_dim: int = 512
    """Decoder width, which is also the number of channels of c4 and c5."""
    decoder_depth: int = 4
    """Decoder blocks (the first ones of MAE's 8). 0: c4 is the decoder without its blocks, i.e.
    projected tokens at sampled places, the fill elsewhere, plus positions, normed."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""
    drop_path: float = 0.1
    """Stochastic depth of the last encoder block; it grows linearly from 0. All kinds."""
    position_grid: int = 50
    """Side of the stored square position table; it is resized to the image's grid on the fly. Also
    `benchmarking_vit`; `vitdet`: of the tables of relative positions."""
    stem: str = "conv"
    """`conv` (the paper's), `patch` (ablation), or `module:function`."""
    sampler: str = "random"
    """`random`, `grid`, `block`, or `module:function`: scores tokens; the highest are kept."""
    sample_ratio: float = 0.5
    """Share of the tokens the encoder sees while training."""
    sample_ratio_eval: float = 1.0
    """Share of the tokens the encoder sees in evaluation (published APs use 1.0)."""
    keep: Literal["valid", "padded"] = "valid"
    """Count kept tokens on each image's own valid grid, or (the paper's code) on the padded one."""
    decoder_fill: str = "stem"
    """What the decoder sees at unsampled places: projected stem tokens (`stem`, v2), MAE's token
    (`mask_token`, v1), or `module:function`."""
    window_size: int = 16
    """`benchmarking_vit`, `vitdet`, `swin`: side of an attention window, in tokens."""
    global_blocks: int = 4
    """`benchmarking_vit`, `vitdet`: blocks that attend to the whole image, each the last of an
    equal part of the depth; all others attend within windows."""
    stage_depths: tuple[int, int, int, int] = (2, 2, 18, 2)
    """`swin`, `resnet`: blocks of the four stages that end in c2..c5."""
    bottleneck: bool = True
    """`resnet`: blocks of three convolutions (ResNet-50 and deeper) instead of two."""
    checkpointing: Literal["auto", "on", "off"] = "auto"
    """Recompute activations in the backward pass; `auto` = on for a GPU with little memory. All
    kinds but `resnet`, where recomputing would count every batch twice in BatchNorm."""


@dataclass(slots=True)
class DetectorConfig:
    """Neck, RPN and RoI heads (Mask R-CNN as detectron2 computes it)."""

    num_classes: int = 80
    """Foreground classes; set from the data set when training starts."""
    masks: bool = True
    """False drops the mask head (data sets with boxes only)."""
    neck: str = "fpn"
    """`fpn`, `simple_pyramid` (ViTDet's: no path from level to level), or `module:function`."""
    canvas: int = 0
    """Side of the square that every image is placed on, the rest grey (128 before normalisation);
    boxes then return to the image with one factor for both axes. This is how ViTs that were trained
    with large-scale jitter are tested. 0 = zeros up to a multiple of 32."""
    channels: int = 256
    """Channels of p2..p6, the RPN and the head convolutions."""
    norm: Literal["BN", "GN", "LN"] = "BN"
    """Norm of the neck and of the box and mask heads."""
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Anchor side in pixels, one per level p2..p6."""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height / width of the anchors at every place."""
    rpn_convs: int = 2
    rpn_pre_nms: tuple[int, int] = (2000, 1000)
    """Proposals kept per level before NMS: (training, evaluation)."""
    rpn_post_nms: tuple[int, int] = (1000, 1000)
    """Proposals kept per image after NMS: (training, evaluation)."""
    rpn_nms: float = 0.7
    rpn_anchors_per_image: int = 256
    """Anchors per image in the RPN loss, at most half of them positive."""
    rois_per_image: int = 512
    """Proposals per image in the box loss, at most a quarter of them positive."""
    canonical_size: float = 224.0
    """Side of the box that is pooled from p4: level = floor(4 + log2(side / canonical_size))."""
    box_convs: int = 4
    box_fc_dim: int = 1024
    mask_convs: int = 4
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    detections_per_image: int = 100
    loss: str = "mask_rcnn"
    """`mask_rcnn` (cross-entropy and L1, as the paper), or `module:class`."""
    c4_loss: float = 0.0
    """Weight of one more loss in training: a linear layer tells the classes of true boxes from c4.
    The paper has none."""


@dataclass(slots=True)
class DataConfig:
    """Where the images come from and how they are changed on the way in."""

    source: str = "shapes"
    """`shapes`: drawn on the fly; `nuclei`: the microscope picture that comes with the package;
    `coco`: json + image folder; `hub`: a Hugging Face table; or `module:function`, called with
    these fields and the split."""
    shapes_level: str = "shapes-v1-medium"
    """Named, versioned difficulty of ShapesCOCO."""
    shapes_size: int = 128
    """Side of a ShapesCOCO scene in pixels; 0 = that of the level (v1: 128, v2: 256)."""
    shapes_train: int = 100_000
    """Scenes in a training epoch of ShapesCOCO."""
    shapes_val: int = 200
    """Held-out scenes of ShapesCOCO."""
    train_json: str = ""
    """COCO annotation file to train on."""
    train_images: str = ""
    """Folder of the training images."""
    val_json: str = ""
    """COCO annotation file to evaluate on."""
    val_images: str = ""
    """Folder of the evaluation images."""
    hub_name: str = ""
    """Data set id or local path for `datasets.load_dataset`, with an `objects` column."""
    hub_train_split: str = "train"
    hub_val_split: str = "validation"
    bbox_format: Literal["", "xywh", "xyxy", "cxcywh_normalised"] = ""
    """Layout of the boxes of a hub table; must be given, it is never guessed."""
    limit_train: int = 0
    """Use only the first N training images; 0 = all."""
    limit_val: int = 0
    """Use only the first N evaluation images; 0 = all."""
    augment: Literal["paper", "lsj", "multiscale", "none"] = "paper"
    """`paper`: MIMDet's recipe; `lsj`: large-scale jitter of the baselines; `multiscale`: flips
    (all of `flips`) and a random short side; `none`: the test transform."""
    flips: Literal["horizontal", "both", "dihedral"] = "horizontal"
    """Mirror left-right; also up-down; or all eight turns of a square (microscopy, shapes)."""
    short_sides: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 736, 768, 800)
    """Short sides an image may be resized to while training."""
    max_side: int = 1333
    """Upper bound of the long side while training and testing."""
    crop_probability: float = 0.5
    """`paper` only: how often an image is first resized to `crop_short_sides` and cropped."""
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    crop_sides: tuple[int, int] = (384, 600)
    """`paper` only: smallest and largest side of that crop."""
    test_short_side: int = 800
    lsj_size: int = 1024
    """`lsj` only: side of the square canvas."""
    lsj_scale: tuple[float, float] = (0.1, 2.0)
    colour_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Largest random change of brightness, contrast, saturation and hue while training, as
    torchvision's ColorJitter takes them (hue up to 0.5); the paper has none. With hue an image of
    256 pixels takes 25 ms."""
    blur: float = 0.0
    """Half of the training images are blurred, with a sigma from 0.1 to so many pixels."""
    skip_empty: bool = True
    """Leave images without a usable annotation out of training, as the original does."""
    workers: int = 2
    """Loader processes per training process; 0 loads in the training process."""


RANDOM = "random"
"""As `training.init_from`: deliberately no weights."""


@dataclass(slots=True)
class TrainingConfig:
    """The recipe: how long, how fast, how large a batch."""

    epochs: float = 36.0
    """Passes over the training data; `steps`, when not 0, overrides it."""
    steps: int = 0
    """Optimiser steps; 0 = derived from `epochs`."""
    batch_size: int = 8
    """Images of one micro-batch: what one GPU holds at a time."""
    accumulate: int = 8
    """Micro-batches of one optimiser step, shared by all processes: images a step =
    batch_size x accumulate, on one GPU as on eight."""
    learning_rate: float = 8e-5
    """Learning rate of the stem for `reference_batch` images a step."""
    reference_batch: int = 64
    learning_rate_exponent: float = 0.5
    """Rate for another batch B: learning_rate x (B / reference_batch) ^ exponent. The paper's two
    configurations follow 0.5 (square root); 1 is the linear rule."""
    rate_multiplier: float = 2.0
    """Encoder rate = rate / multiplier; decoder, FPN and heads = rate x multiplier."""
    weight_decay: float = 0.1
    """Not applied to biases, other one-dimensional parameters and learnt position tables."""
    decay_biases: bool = False
    """Apply it to biases too, those of norms left out (recipes of the baselines)."""
    betas: tuple[float, float] = (0.9, 0.999)
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`adamw`, as in the paper. `muon` (Jordan et al. 2024) moves a matrix or convolution equally
    far in all its directions, and leaves vectors and positions to NAdamW: from random weights
    `tiny` has twice the AP of as many CPU seconds by AdamW. Its updates are rounded to bfloat16."""
    schedule: Literal["multistep", "cosine"] = "multistep"
    milestones: tuple[float, ...] = (27 / 36, 33 / 36)
    """`multistep`: shares of the training after which the rate falls by ten."""
    whole_at_end: float = 0.0
    """Share of the steps, the last ones, in which the encoder sees all tokens, as it will when the
    trained detector is used; 0 = none, as in the paper."""
    warmup_epochs: float = 0.25
    """Linear warm-up from 0; `warmup_steps`, when not 0, overrides it."""
    warmup_steps: int = 0
    clip_norm: float = 0.0
    """Clip the gradient's norm; 0 = off, as in the paper."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """`auto` = bf16 on CUDA and fp32 elsewhere. `fp64` is slow: it shows that two trainings are
    equal but for rounding."""
    evaluate_every: float = 1.0
    """Epochs between two evaluations, of which there are at most one an epoch or ten in all,
    whichever is more; the last step is always evaluated. 0 = at the end only."""
    evaluate_every_steps: int = 0
    """Steps between two evaluations; overrides `evaluate_every` when not 0."""
    checkpoint_every_steps: int = 0
    """Steps between two checkpoints; 0 = once an epoch, and at least ten in a run."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on disk, besides the best one."""
    seed: int = 0
    init_from: str = ""
    """Starting weights: a masked autoencoder (Meta's full file, as the paper; a hub id; a run of
    `mimdet pretrain`), a released MIMDet, a run or a weights file; of a detector, tensors of other
    shapes (another class count) keep their initial values, and are listed. `random` says that none
    are meant, where a recipe starts from an autoencoder."""
    init_decoder: Literal["pretrained", "random"] = "pretrained"
    """`random` allows an autoencoder file without decoder: MIMDet's decoder then starts new."""
    freeze: tuple[str, ...] = ()
    """Parts that stay as they begin, by their names: `stem encoder`, `backbone`, `neck`, or any
    part of a part, `encoder.blocks.0`. Norms in them keep their statistics."""
    align_stem: int = 0
    """Batches from which a new stem first learns, without labels, to give the tokens that the
    autoencoder's patch embedding gives; 0 = it starts at random, as in the paper."""
    c4_first: int = 0
    """Batches on which the backbone is trained by `detector.c4_loss` alone, before all else, in the
    first of several processes; 0 = none, as in the paper."""
    threads: int = 0
    """CPU threads of a process; 0 = PyTorch's choice. More than one pays on idle cores only."""
    compile: bool = False
    """Compile the stem, attention and MLP of the blocks, neck and heads: equal but for rounding.
    The first steps take minutes longer; worth it for long trainings on a GPU."""
    device: str = "auto"
    """`auto` = cuda, then cpu; or any torch device."""
    answer_minutes: float = 10.0
    """One of several processes may keep the others waiting so long; then all of them end."""

    @property
    def step_images(self) -> int:
        """Images of one optimiser step."""
        return self.batch_size * self.accumulate


@dataclass(slots=True)
class Config:
    """Everything that decides a run's result."""

    preset: str = ""
    """The preset this configuration started from (information only)."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass(slots=True)
class MAEConfig:
    """The autoencoder. MIMDet takes its encoder and the first blocks of its decoder."""

    image_size: int = 224
    """Side of the square training images, pixels."""
    patch_size: int = 16
    embed_dim: int = 768
    """Encoder width."""
    depth: int = 12
    num_heads: int = 12
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    sample_ratio: float = 0.25
    """Share of the patches the encoder sees (the MAE paper: 75 % are masked)."""
    norm_pix_loss: bool = True
    """Predict patches normalised by their own mean and deviation: better features. Without it,
    reconstructions have the right colours."""
    pixel_head: bool = False
    """A second head beside it, for plain pixels: features and colours both."""


@dataclass(slots=True)
class PicturesConfig:
    """Images without annotations, cropped at random to `image_size`."""

    source: Literal["folder", "hub", "shapes"] = "folder"
    """`folder`: all image files under a folder; `hub`: a Hugging Face table with an image column;
    `shapes`: ShapesCOCO scenes, drawn on the fly."""
    folder: str = ""
    """Folder of images, searched with its subfolders."""
    hub_name: str = ""
    """Data set id or local path for `datasets.load_dataset`."""
    hub_split: str = "train"
    hub_column: str = "image"
    shapes_level: str = "shapes-v1-medium"
    shapes_size: int = 128
    shapes_train: int = 100_000
    """Scenes in an epoch of ShapesCOCO."""
    held_out: int = 64
    """Images kept out of training (of a folder or table the last ones): their loss is the
    validation loss, the first of them are the reconstructions one looks at. 0 = neither."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the image's area that a random crop covers."""
    crop_aspect: float = 4 / 3
    """Largest ratio of the crop's sides."""
    workers: int = 2
    """Loader processes per training process; 0 loads in the training process."""


@dataclass(slots=True)
class PretrainConfig:
    """Everything that decides a pre-training's result."""

    preset: str = ""
    mae: MAEConfig = field(default_factory=MAEConfig)
    data: PicturesConfig = field(default_factory=PicturesConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


SLOTS = {
    "backbone.sampler": "sampler",
    "backbone.stem": "stem",
    "backbone.kind": "backbone",
    "backbone.decoder_fill": "fill",
    "detector.neck": "neck",
    "detector.loss": "loss",
    "data.source": "dataset",
}
"""Field whose value may be "module:function" -> its slot, which takes the function itself."""


def to_dict(cfg: Any) -> dict[str, Any]:
    """A configuration (this one, or another dataclass of sections) as nested dictionaries."""
    return asdict(cfg)


def from_dict(values: Any, kind: type = Config) -> Any:
    """Rebuild a configuration from `to_dict` output or parsed json; fields may be left out.

    Raises ValueError naming the field for a key this version does not know, or for a value that is
    not of the field's type.
    """
    import msgspec  # here, because `mimdet --help` reads no file

    cfg: Any = msgspec.convert(values, kind)
    unknown = sorted(_flat(values).keys() - flat(cfg).keys())
    if unknown:
        section = unknown[0].rpartition(".")[0]
        known = [name for name in flat(cfg) if name.rpartition(".")[0] == section]
        raise ValueError(f"{kind.__name__} has no field {unknown[0]!r}; it has {known}")
    return cfg


def save_config(cfg: Any, path: str | Path) -> None:
    """Write the json file. ValueError, as `from_dict`, for what could not be read back."""
    from_dict(to_dict(cfg), type(cfg))
    write_json(path, to_dict(cfg))


def load_config(path: str | Path, kind: type = Config) -> Any:
    """Read `config.json` of a run. Raises ValueError naming file and field when it is not one."""
    try:
        return from_dict(read_json(path), kind)
    except ValueError as error:
        raise ValueError(f"{path} is not a mimdet configuration: {error}") from error


def difference(a: Any, b: Any) -> list[str]:
    """Lines `training.steps: 100 -> 200` for every field in which two configurations differ."""
    flat_a, flat_b = flat(a), flat(b)
    return [f"{k}: {flat_a[k]} -> {flat_b[k]}" for k in flat_a if flat_a[k] != flat_b[k]]


# What the same weights may be used with is said, what changes what they compute is refused.
WHILE_TRAINING = (
    "backbone.drop_path",
    "backbone.checkpointing",
    "backbone.sample_ratio",
    "detector.rpn_anchors_per_image",
    "detector.rois_per_image",
    "detector.loss",
    "mae.sample_ratio",
)
"""Fields of a model that change nothing once it is trained."""
AT_USE = (
    "backbone.sample_ratio_eval",
    "detector.rpn_pre_nms",
    "detector.rpn_post_nms",
    "detector.rpn_nms",
    "detector.score_threshold",
    "detector.nms_threshold",
    "detector.detections_per_image",
    "data.test_short_side",
    "data.max_side",
)
"""Fields that may be chosen anew for trained weights: they change what is found, not what the
weights were trained to compute."""


MODEL_PART = "model_part"
"""Under this key `model_part` is stored with weights."""


def model_part(cfg: Any) -> str:
    """What a model's numbers depend on besides its weights, as json that is stored with them."""
    parts = ("backbone.", "detector.", "mae.")
    own = {k: v for k, v in flat(cfg).items() if k.startswith(parts) or k in AT_USE}
    return json.dumps({name: own[name] for name in own if name not in WHILE_TRAINING})


def check_model_part(trained: str, cfg: Any, where: str) -> None:
    """ValueError where weights that were trained with the `model_part` `trained` would compute
    other numbers with `cfg`, which comes from `where`; a warning names what differs in AT_USE."""
    import msgspec  # here, because `mimdet --help` reads no file

    try:
        then = msgspec.convert(json.loads(trained), dict[str, Any])
    except ValueError as error:
        raise ValueError(f"{where}: what it was trained as cannot be read: {error}") from error
    now = json.loads(model_part(cfg))
    changed = {k: f"{k}: {then[k]} -> {now[k]}" for k in now if then.get(k, now[k]) != now[k]}
    lines = "\n  ".join(changed.values())
    if changed.keys() - set(AT_USE):
        raise ValueError(
            f"{where}: the weights were trained with another configuration than this one, with "
            f"which they compute other numbers:\n  {lines}\nPut the first value of each back."
        )
    if changed:
        warnings.warn(
            f"{where}: used with another configuration than in training:\n  {lines}", stacklevel=2
        )


def change(section: Any, **fields: Any) -> None:
    """Assign several fields of a section. AttributeError on a typo."""
    for name, value in fields.items():
        setattr(section, name, value)


def set_field(cfg: Any, dotted: str, value: Any) -> None:
    """Assign a field by its dotted name, "backbone.sample_ratio". AttributeError on a typo."""
    parent, _, name = dotted.rpartition(".")
    setattr(attrgetter(parent)(cfg) if parent else cfg, name, value)


def flat(cfg: Any) -> dict[str, Any]:
    """Dotted name -> value of every field; lists are tuples, as a configuration is read back."""
    return _flat(to_dict(cfg))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if value and isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = tuple(value) if isinstance(value, list) else value
    return found


def named_code(cfg: Any) -> list[str]:
    """ "field=module:function" of every part that a configuration takes from elsewhere.

    Importing such a part runs its module, so a name that comes out of a file needs consent.
    """
    fields = flat(cfg).items()
    return [f"{name}={value}" for name, value in fields if name in SLOTS and ":" in value]
