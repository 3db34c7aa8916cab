"""Other people's checkpoints -> our models, loudly: nothing is left out without being named.

`load_mae` starts a detector from a masked autoencoder, `load_mae_model` loads the autoencoder
itself; released detectors are in official.py.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mimdet.files import write_file
from mimdet.models.checkpoint_files import CheckpointFile, read_checkpoint
from mimdet.models.mae import MAE
from mimdet.models.vit import resize_table

Rule = tuple[str, str, int]
"""(start of their name, start of ours, our number minus theirs); `{}` stands for a number, and what
follows the start is equal on both sides. The first rule that fits counts."""


def translate(name: str, rules: Sequence[Rule], *, back: bool = False) -> str:
    """Their name -> ours; with back=True ours -> theirs. KeyError for a name no rule knows."""
    for theirs, ours, shift in rules:
        source, target = (ours, theirs) if back else (theirs, ours)
        found = re.match(re.escape(source).replace(r"\{\}", r"(\d+)"), name)
        if found:
            number = int(found[1]) + (-shift if back else shift) if found.groups() else 0
            return target.format(number) + name[found.end() :]
    raise KeyError(name)


MAE_RULES: list[Rule] = [
    ("pos_embed", "encoder.pos_embed", 0),
    ("blocks.{}.", "encoder.blocks.{}.", 0),
    ("norm.", "encoder.norm.", 0),
    ("decoder_embed.", "decoder.embed.", 0),
    ("decoder_pos_embed", "decoder.pos_embed", 0),
    ("decoder_blocks.{}.", "decoder.blocks.{}.", 0),
    ("decoder_norm.", "decoder.norm.", 0),
    ("mask_token", "decoder.fill.token", 0),
    ("patch_embed.proj.", "stem.patchify.", 0),
]
"""Meta's MAE files <-> a MIMDet backbone. The paper's ConvStem has no counterpart; the patchify
stem of the ablation takes MAE's patch embedding."""

_HF_LAYER = {
    "attention.attention.query.": "attn.query.",
    "attention.attention.key.": "attn.key.",
    "attention.attention.value.": "attn.value.",
    "attention.output.dense.": "attn.proj.",
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
}
HF_RULES: list[Rule] = [
    *((f"vit.encoder.layer.{{}}.{a}", f"blocks.{{}}.{b}", 0) for a, b in _HF_LAYER.items()),
    *(
        (f"decoder.{layers}.{{}}.{a}", f"decoder_blocks.{{}}.{b}", 0)
        for layers in ("decoder_layers", "decoder_encoder.layer")  # transformers 4; saved by 5
        for a, b in _HF_LAYER.items()
    ),
    ("vit.embeddings.cls_token", "cls_token", 0),
    ("vit.embeddings.position_embeddings", "pos_embed", 0),
    ("vit.embeddings.patch_embeddings.projection.", "patch_embed.proj.", 0),
    ("vit.layernorm.", "norm.", 0),
    ("decoder.mask_token", "mask_token", 0),
    ("decoder.", "", 0),  # decoder.decoder_embed and so on
]
"""`facebook/vit-mae-*` on the Hugging Face hub <-> Meta's names, query, key and value apart."""


# Parts of a MAE file that a detector may have no place for: MIMDet's stem, fill and heads are its
# own, and plain ViT baselines have no decoder, final norm or fixed positions.
EXPECTED_UNUSED = (
    r"cls_token|mask_token|patch_embed\.proj\.|pos_embed$|norm\.|"
    r"decoder_(embed|pos_embed|blocks|norm|pred|pixels)\b"
)
# Width -> attention heads of the standard ViTs; a checkpoint does not say how many it was made for.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
DECODER_HEADS = {512: 16}


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of every tensor. Printing it gives a short table."""

    source: str
    loaded: list[str]
    """Our tensors that took their values from the file."""
    new: list[str]
    """Our tensors the file is not meant to hold: they keep their random values."""
    unused: list[str]
    """The file's tensors that have no place in our model, as expected."""
    missing: list[str] = field(default_factory=list)
    """Our tensors the file should have held; always empty unless that was allowed."""
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [self.source]
        for kind in ("loaded", "new", "unused", "missing"):
            names: list[str] = getattr(self, kind)
            lines.append(f"  {kind:8}{len(names):5}  {_by_part(names)}".rstrip())
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def _by_part(names: list[str]) -> str:
    """'encoder 148, decoder 52': how many names begin with which part."""
    parts = Counter(re.match(r"(?:backbone\.)?(\w+)", name)[1] for name in names)  # type: ignore[index]
    return ", ".join(f"{part} {count}" for part, count in parts.items())


# ------------------------------------------------------------------ a masked autoencoder's file


def load_mae(
    model: nn.Module,
    source: str | Path,
    *,
    decoder: Literal["pretrained", "random"] = "pretrained",
) -> LoadReport:
    """Start a backbone with a ViT encoder, or a detector that has one, from a masked autoencoder.

    source: Meta's files, `facebook/vit-mae-*` or `timm/...mae` (fetched by `mimdet download`), or
    our own MAE. The encoder takes blocks, norm and positions; the decoder takes its embedding,
    positions, first blocks and norm; position tables are resized bicubically to the model's grid,
    as the original does. A file without decoder is an error, because a random decoder at the
    paper's learning rates ends in NaN for many; decoder="random" says that this is wanted.

    Raises ValueError naming the tensors for a file of another size, with missing or with unknown
    tensors. The model is changed only when everything fits.
    """
    backbone: nn.Module = getattr(model, "backbone", model)
    if not hasattr(backbone, "encoder"):
        raise ValueError(f"a {type(backbone).__name__} has no encoder that a MAE could start")
    file = read_mae(source)
    own = backbone.state_dict()
    learnt = {name for name, p in backbone.named_parameters() if p.requires_grad and p.ndim == 3}
    names = [name for name in own if decoder == "pretrained" or not name.startswith("decoder.")]
    wanted = {theirs: ours for ours in names if (theirs := _mae_name(ours, learnt)) is not None}
    absent = [theirs for theirs in wanted if theirs not in file.tensors]
    has_decoder = any(name.startswith("decoder_") for name in file.tensors)
    if absent and decoder == "pretrained" and not has_decoder:
        raise ValueError(
            f"{file.name} holds the encoder only: MIMDet's decoder starts from the autoencoder's "
            "own. Use the full file (for example mae_pretrain_vit_base_full.pth, "
            '`mimdet download`), or decoder="random" (--init-decoder random) to train a new one'
        )
    if absent:
        raise ValueError(
            f"{file.name} lacks {len(absent)} tensors, first {absent[0]!r}: it has fewer blocks "
            "than this model (backbone.depth), or is another one"
        )
    loaded = {
        ours: _fit(file, theirs, ours, file.tensors[theirs], own[ours])
        for theirs, ours in wanted.items()
    }
    modules = dict(backbone.named_modules())
    for key, part in (("num_heads", "encoder"), ("decoder_heads", "decoder")):
        used = any(name.startswith(f"{part}.blocks.") for name in loaded)
        heads = getattr(modules.get(f"{part}.blocks.0.attn"), "num_heads", None)
        if used and heads is not None and file.metadata.get(key, str(heads)) != str(heads):
            raise ValueError(
                f"{file.name} was trained with {file.metadata[key]} attention heads in its {part}, "
                f"this model has {heads}: set backbone.{key}={file.metadata[key]}"
            )
    unused = [name for name in file.tensors if name not in wanted]
    strange = [name for name in unused if not re.match(EXPECTED_UNUSED, name)]
    if strange:
        raise ValueError(
            f"{file.name} holds {len(strange)} tensors that this model has no place for, first "
            f"{strange[0]!r}: it is another model or has more blocks, or its tensors were renamed"
        )
    backbone.load_state_dict(loaded, strict=False)
    prefix = "backbone." if backbone is not model else ""
    new = [name for name in model.state_dict() if name.removeprefix(prefix) not in loaded]
    report = LoadReport(
        file.name, [prefix + name for name in loaded], new, unused, notes=file.notes
    )
    print(report)
    return report


def read_mae(source: str | Path) -> CheckpointFile:
    """Any supported autoencoder file, its tensors under Meta's names."""
    file = read_checkpoint(source)
    if any(name.startswith("vit.") for name in file.tensors):
        file.tensors = _from_hub_names(file)
    if file.is_detector:
        raise ValueError(f"{file.name} is a detector, not an autoencoder: use load_detector")
    if "pos_embed" not in file.tensors or "blocks.0.attn.qkv.weight" not in file.tensors:
        raise ValueError(
            f"{file.name} is no masked autoencoder: it lacks pos_embed or blocks.0.attn.qkv.weight "
            f"(its first tensor is {next(iter(file.tensors))!r})"
        )
    for name in ("pos_embed", "decoder_pos_embed"):
        shape = tuple(file.tensors[name].shape) if name in file.tensors else (1, 2, 0)
        square = len(shape) == 3 and shape[1] > 1 and math.isqrt(shape[1] - 1) ** 2 == shape[1] - 1
        if not square or shape[0] != 1:
            raise ValueError(
                f"{file.name}: {name} has shape {shape}, not (1, 1 + side x side, width), which is "
                "a row for the class token and those of a square grid"
            )
    return file


def _from_hub_names(file: CheckpointFile) -> dict[str, Tensor]:
    """`facebook/vit-mae-*`: other names, and query, key and value apart."""
    renamed: dict[str, Tensor] = {}
    for name, value in file.tensors.items():
        try:
            renamed[translate(name, HF_RULES)] = value
        except KeyError:
            raise ValueError(f"{file.name}: no ViT-MAE of the hub has a tensor {name!r}") from None
    for name in [name for name in renamed if ".attn.query." in name]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        lost = [part for part in parts if part not in renamed]
        if lost:
            raise ValueError(f"{file.name} has {name!r} but not {lost[0]!r}")
        renamed[name.replace("query", "qkv")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


def _mae_name(ours: str, learnt: set[str]) -> str | None:
    """What a MAE file calls a tensor of our backbone; None for what it does not hold.

    learnt: three-dimensional parameters that are trained. Benchmarking ViT's position table is one:
    the original sets it anew after loading, so it is not taken from the file.
    """
    if ours.startswith("encoder.patch_embed."):  # ViTDet keeps it in the encoder
        return ours.removeprefix("encoder.")
    if "rel_pos" in ours or "relative_position" in ours:  # windowed attention's own tables
        return None
    try:
        theirs = translate(ours, MAE_RULES, back=True)
    except KeyError:
        return None
    return None if theirs == "pos_embed" and ours in learnt else theirs


def _count_blocks(tensors: dict[str, Tensor], part: str) -> int:
    return len({name.split(".")[1] for name in tensors if name.startswith(f"{part}.")})


def _fit(file: CheckpointFile, theirs: str, ours: str, value: Tensor, own: Tensor) -> Tensor:
    """The value in our shape: position tables are resized, everything else must be equal."""
    if ours.endswith("pos_embed") and value.ndim == 3 and value.shape[2] == own.shape[-1]:
        if own.ndim == 4:  # ViTDet: (1, h, w, D), no row for the class token
            return resize_table(value, (own.shape[1], own.shape[2])).view_as(own)
        side = round((own.shape[1] - 1) ** 0.5)
        return torch.cat([value[:, :1], resize_table(value, (side, side))], dim=1)
    if value.shape != own.shape:
        raise ValueError(
            f"{file.name}: {theirs} has shape {tuple(value.shape)}, our {ours} has "
            f"{tuple(own.shape)}: use the preset of the file's size (width 768: mimdet_base, 1024: "
            "mimdet_large), or set backbone.embed_dim and backbone.depth"
        )
    return value


# ------------------------------------------------------------------ the autoencoder itself


def load_mae_model(
    source: str | Path,
    *,
    num_heads: int = 0,
    decoder_heads: int = 0,
    norm_pix_loss: bool | None = None,
) -> MAE:
    """The whole autoencoder, for reconstructions, in evaluation mode; sizes follow from the file.

    num_heads, decoder_heads: needed for widths no standard ViT has. norm_pix_loss: None = what the
    file says; Meta's files say nothing, except by "visualize" in the name of those trained without,
    and `facebook/vit-mae-*` on the hub are converted from these.
    """
    file = read_mae(source)
    t, meta = file.tensors, file.metadata
    if "decoder_pred.weight" not in t:
        raise ValueError(
            f"{file.name} holds the encoder only, which reconstructs nothing: use the full or the "
            "visualize file (`mimdet download`), or facebook/vit-mae-base"
        )
    needed = ("decoder_pos_embed", "patch_embed.proj.weight")
    if any(name not in t or not t[name].numel() for name in needed):
        raise ValueError(f"{file.name} lacks {' or '.join(needed)}: its sizes cannot be read")
    width, decoder_dim = t["pos_embed"].shape[2], t["decoder_pos_embed"].shape[2]
    given = {"num_heads": num_heads, "decoder_heads": decoder_heads}
    for key, value in given.items():
        if value and meta.get(key, str(value)) != str(value):
            raise ValueError(f"{file.name} was trained with {key}={meta[key]}, not {value}")
    heads = num_heads or int(meta.get("num_heads", HEADS.get(width, 0)))
    own_heads = decoder_heads or int(meta.get("decoder_heads", DECODER_HEADS.get(decoder_dim, 0)))
    if not heads or not own_heads:
        raise ValueError(
            f"{file.name}: how many attention heads has a ViT of width {width} with a decoder of "
            f"width {decoder_dim}? Say num_heads= and decoder_heads="
        )
    if norm_pix_loss is None:
        visualize = "visualize" in file.name or file.name.startswith("facebook/vit-mae-")
        norm_pix_loss = meta.get("norm_pix_loss", str(not visualize)) == "True"
    patch = t["patch_embed.proj.weight"].shape[-1]
    build = partial(
        MAE,
        math.isqrt(t["pos_embed"].shape[1] - 1) * patch,
        patch,
        width,
        _count_blocks(t, "blocks"),
        heads,
        decoder_dim,
        _count_blocks(t, "decoder_blocks"),
        own_heads,
        norm_pix_loss,
        "decoder_pixels.weight" in t,
    )
    check_sizes(build, t, file.name)
    model = build()
    load_exactly(model, t, file.name)
    return model.eval()


def save_mae(model: MAE, path: str | Path, *, half: bool = False) -> None:
    """Write an autoencoder in Meta's layout: `.pth` for other tools, `.safetensors` for ours, which
    also keeps the number of heads and norm_pix_loss. half: as float16."""
    from safetensors.torch import save_file

    state = stored(model, half)
    if Path(path).suffix == ".safetensors":
        metadata = {
            "num_heads": str(model.num_heads),
            "decoder_heads": str(model.decoder_heads),
            "norm_pix_loss": str(model.norm_pix_loss),
        }
        write_file(path, lambda partial: save_file(state, partial, metadata))
    else:
        write_file(path, lambda partial: torch.save({"model": state}, partial))


def stored(model: nn.Module, half: bool) -> dict[str, Tensor]:
    """A model's tensors as a file holds them; half: floating-point ones as float16."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    return {n: v.half() if half and v.is_floating_point() else v for n, v in state.items()}


def check_sizes(build: Callable[[], nn.Module], tensors: dict[str, Tensor], name: str) -> None:
    """ValueError for tensors that are not those of the model that `build` makes.

    It is made without memory first, because the numbers it is built from come out of a file too.
    """
    try:
        with torch.device("meta"):
            own = build().state_dict()
    except (AssertionError, ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: no model can be built of its sizes: {error}") from error
    check_fit(own, tensors, name)


def load_exactly(model: nn.Module, tensors: dict[str, Tensor], name: str) -> None:
    """Every name and shape must fit; ValueError as `check_fit`, and nothing is changed."""
    check_fit(model.state_dict(), tensors, name)
    model.load_state_dict(tensors)


def check_fit(own: dict[str, Tensor], tensors: dict[str, Tensor], name: str) -> None:
    """ValueError that names the first of a file's tensors that is not as the model's own."""
    for key, value in own.items():
        if key not in tensors:
            raise ValueError(f"{name} lacks the tensor {key!r} of this model")
        if tensors[key].shape != value.shape:
            raise ValueError(
                f"{name}: {key} has shape {tuple(tensors[key].shape)}, this model's has "
                f"{tuple(value.shape)}: class count, width or depth of cfg differ from the file"
            )
    extra = [key for key in tensors if key not in own]
    if extra:
        raise ValueError(f"{name} holds {len(extra)} more tensors than this model: {extra[0]!r}")
