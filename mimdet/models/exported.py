"""A trained model as one file that runs without this code: ONNX, or PyTorch's own .pt2.

The forward passes here say for one image, in operations that both formats have, what `Detector` and
`MAE` say for a batch; `tools/measure_export.py` compares them detection by detection.
"""

import copy
import hashlib
import importlib.util
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms, roi_align

from mimdet import __version__
from mimdet.files import write_file
from mimdet.models.backbones import MIMDetBackbone
from mimdet.models.detector import Detector, category_entries
from mimdet.models.mae import MAE, patch_statistics, patchify, unpatchify
from mimdet.models.rcnn import IMAGENET_MEAN, IMAGENET_STD, AlignedRoIPool, non_empty
from mimdet.models.sampling import PATCH
from mimdet.structures import PAD_MULTIPLE

OPSET = 20
LARGEST = 4096
"""Pixels of a side: what the program is proven for when it is exported."""
HALVED = 256
"""Numbers of the smallest tensor that is stored as float16: for less a cast is larger."""


def export_model(
    model: Detector | MAE,
    path: str | Path,
    *,
    inside: bool = False,
    half: bool = False,
    licence: str = "",
) -> dict[str, str]:
    """Write a detector or an autoencoder as `.onnx`, for onnxruntime alone, or `.pt2`, for torch.

    Inputs and outputs are those of `ExportedDetector` and `ExportedAutoencoder`: any height and
    width that are multiples of 32 (of the patch for an autoencoder), any number of kept places.
    inside: take `mean_c4` and give c4 and the encoder's attention as well. half: store weights of
    an .onnx as float16; they are float32 again when it is loaded. licence: of the weights.

    Returns what the file says of itself: strings in the metadata of an .onnx, and `mimdet.json`
    among the extra files of a .pt2. ValueError for another ending, a backbone that samples no
    tokens, and where the packages of `.[export]` are absent.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2") or (half and path.suffix != ".onnx"):
        raise ValueError(f"{path}: name it .onnx, or without half .pt2")
    if path.suffix == ".onnx" and importlib.util.find_spec("onnxscript") is None:
        raise ValueError("writing ONNX needs onnx and onnxscript: pip install 'mimdet[export]'")
    whole: Any = ExportedDetector if isinstance(model, Detector) else ExportedAutoencoder
    module = whole(model, inside)
    program = exported_program(module)
    about = describe(model) | {"licence": licence or "not stated"}
    if path.suffix == ".pt2":
        extra = {"mimdet.json": json.dumps(about)}
        write_file(path, lambda part: _save_program(program, part, extra))
    else:
        proto = onnx_model(program, module, about, half)
        write_file(path, lambda part: part.write_bytes(proto))
    return about


def describe(model: Detector | MAE) -> dict[str, str]:
    """What a program that runs the file needs to know; lists are json."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    about = {
        "mimdet": __version__,
        "kind": "detector" if isinstance(model, Detector) else "autoencoder",
        "weights_sha256": digest.hexdigest(),
        "mean": json.dumps(IMAGENET_MEAN),
        "std": json.dumps(IMAGENET_STD),
    }
    if isinstance(model, MAE):
        side = round((model.pos_embed.shape[1] - 1) ** 0.5) * model.patch_size
        sizes = {"patch": model.patch_size, "multiple": model.patch_size, "short_side": side}
        return about | {name: str(value) for name, value in sizes.items()}
    data = model.config.data
    sizes = {"patch": PATCH, "multiple": PAD_MULTIPLE, "short_side": data.test_short_side}
    about |= {name: str(value) for name, value in sizes.items()}
    about |= {"max_side": str(data.max_side), "preset": model.config.preset}
    return about | {"classes": json.dumps(category_entries(model))}


def exported_program(module: Any) -> Any:
    """The module as torch.export's program, for any size of image and any number of kept places."""
    detector = isinstance(module, ExportedDetector)
    step = PAD_MULTIPLE if detector else module.model.patch_size
    h, w = (torch.export.Dim(name, min=1, max=LARGEST // step) for name in "hw")
    inputs = {"image": torch.zeros(1, 3, 8 * step, 10 * step), "keep": torch.arange(7)}
    moves: dict[str, Any] = {"image": {2: step * h, 3: step * w}}
    moves["keep"] = {0: torch.export.Dim("K", min=1)}
    if detector:
        inputs["size"] = torch.tensor([8 * step, 10 * step - 1])
        inputs |= {"mean_c4": torch.tensor(False)} if module.inside else {}
    shapes = {name: moves.get(name) for name in inputs}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torchvision's own
        return torch.export.export(module.eval(), (), inputs, dynamic_shapes=shapes)


def _save_program(program: Any, path: Path, extra: dict[str, str]) -> None:
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files=extra)


def onnx_model(program: Any, module: Any, about: dict[str, str], half: bool) -> bytes:
    """A program as the bytes of an ONNX file, with strings that describe it."""
    names: dict[str, Any] = {"input_names": module.inputs, "output_names": module.outputs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, verbose=False, optimize=True, **names
        )
    assert made is not None
    proto = made.model_proto
    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.value_info):
        del part.metadata_props[:]  # where in the source each step came from
    if half:
        store_halves(proto)
    for name, value in about.items():
        proto.metadata_props.add(key=name, value=value)
    return proto.SerializeToString()


def store_halves(proto: Any) -> None:
    """Larger float32 weights of an ONNX model become float16, each followed by a cast."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for weight in proto.graph.initializer:
        values = numpy_helper.to_array(weight)
        if weight.data_type == TensorProto.FLOAT and values.size >= HALVED:
            name = weight.name
            weight.CopyFrom(numpy_helper.from_array(values.astype("float16"), f"{name}.half"))
            casts.append(helper.make_node("Cast", [weight.name], [name], to=TensorProto.FLOAT))
    steps = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(steps)


class ExportedDetector(nn.Module):
    """`Detector` for one image whose kept places are given."""

    inputs: tuple[str, ...] = ("image", "keep", "size")
    outputs: tuple[str, ...] = ("boxes", "labels", "scores", "masks")

    def __init__(self, model: Detector, inside: bool = False) -> None:
        """inside: take `mean_c4` and return c4 and the encoder's attention as well."""
        super().__init__()
        if not isinstance(model.backbone, MIMDetBackbone):
            name = model.config.backbone.kind
            raise ValueError(f"a {name} backbone samples no tokens: only MIMDet's are exported")
        self.model: Any = with_open_norms(model)
        self.inside = inside
        if model.roi_heads.mask_head is None:
            self.outputs = self.outputs[:3]
        if inside:
            self.inputs = (*self.inputs, "mean_c4")
            self.outputs = (*self.outputs, "c4", "attention")

    def forward(
        self, image: Tensor, keep: Tensor, size: Tensor, mean_c4: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """image: (1, 3, H, W) float32, normalised, then padded with 0 to multiples of 32; keep:
        (K,) int64 places; size: (2,) int64 height and width before padding; mean_c4: () bool, put
        the mean of c4 at each of its places.

        -> boxes (N, 4) in pixels of the image, labels (N,), scores (N,), masks (N, 28, 28)
        probabilities, best first; c4 (1, C, H/16, W/16), attention (blocks, heads, K, K).
        """
        stem = self.model.backbone.stem(image)
        c4, attention = self.transformer(stem.tokens, keep)
        if mean_c4 is not None:
            c4 = torch.where(mean_c4, c4.mean((2, 3), keepdim=True), c4)
        maps = {"c2": stem.c2, "c3": stem.c3, "c4": c4, "c5": F.max_pool2d(c4, 2)}
        levels = list(self.model.neck(maps).values())  # p2..p6
        found = self.detect(levels[:4], self.propose(levels, size), size)
        return (*found, c4, attention) if self.inside else found

    def transformer(self, stem_tokens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """(1, D, h, w), (K,) -> c4 (1, C, h, w), attention (blocks, heads, K, K)."""
        encoder, decoder = self.model.backbone.encoder, self.model.backbone.decoder
        tokens = stem_tokens.flatten(2).transpose(1, 2)  # (1, D, h, w) -> (1, L, D)
        grid = (stem_tokens.shape[2], stem_tokens.shape[3])
        x = (tokens + positions(encoder.pos_embed, grid)).index_select(1, keep)  # (1, K, D)
        x, attention = run_blocks(encoder.blocks, x)
        kept = decoder.embed(encoder.norm(x))
        x = decoder.fill(tokens).index_copy(1, keep, kept)  # (1, L, C)
        x, _ = run_blocks(decoder.blocks, x + positions(decoder.pos_embed, grid))
        return decoder.norm(x).transpose(1, 2).reshape(1, -1, *grid), attention

    def propose(self, levels: Sequence[Tensor], size: Tensor) -> Tensor:
        """p2..p6 -> the best boxes (P, 4) after NMS within each level."""
        rpn = self.model.rpn
        anchors = rpn.anchors([(level.shape[2], level.shape[3]) for level in levels])
        boxes, scores = [], []
        for own, logits, deltas in zip(anchors, *rpn.head(list(levels)), strict=True):
            logits = logits.permute(0, 2, 3, 1).flatten()  # (h * w * A,)
            deltas = deltas.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).reshape(-1, 4)
            best, index = logits.topk(torch.sym_min(rpn.pre_nms[1], logits.shape[0]))
            decoded = clip(rpn.coder.decode(own[index], deltas[index]), size)
            kept = nms(decoded, best, rpn.nms)
            kept = kept[non_empty(decoded[kept])]
            boxes.append(decoded[kept])
            scores.append(best[kept])
        order = torch.cat(scores).sort(descending=True).indices
        return torch.cat(boxes)[order[: rpn.post_nms[1]]]

    def detect(self, features: Sequence[Tensor], proposals: Tensor, size: Tensor) -> Any:
        """p2..p5 and (P, 4) -> boxes, labels, scores, masks."""
        heads = self.model.roi_heads
        logits, deltas = heads.box_head(pool(heads.box_pool, features, proposals))
        boxes = clip(heads.coder.decode(proposals, deltas), size)  # (P, classes, 4)
        scores = logits.softmax(1)[:, :-1]
        proposal, labels = (scores > heads.score_threshold).nonzero().unbind(1)
        boxes, scores = boxes[proposal, labels], scores[proposal, labels]
        apart = labels[:, None].to(boxes) * (size.max() + 1)  # classes do not meet
        kept = nms(boxes + apart, scores, heads.nms_threshold)[: heads.detections_per_image]
        boxes, labels, scores = boxes[kept], labels[kept], scores[kept]
        if heads.mask_head is None:
            return boxes, labels, scores
        masks = heads.mask_head(pool(heads.mask_pool, features, boxes))  # (N, classes, 28, 28)
        own = masks[torch.arange(labels.shape[0]), labels].sigmoid()
        return boxes, labels, scores, own


class ExportedAutoencoder(nn.Module):
    """`MAE` for one image whose kept places are given: what it paints, everywhere."""

    inputs: tuple[str, ...] = ("image", "keep")
    outputs: tuple[str, ...] = ("painted",)

    def __init__(self, model: MAE, inside: bool = False) -> None:
        super().__init__()
        self.model = model
        self.inside = inside
        if inside:
            self.outputs = (*self.outputs, "attention")

    def forward(self, image: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
        """image: (1, 3, H, W) float32, normalised; keep: (K,) int64 places -> painted (1, 3, H, W),
        normalised too; attention (blocks, heads, 1 + K, 1 + K), the class token first."""
        mae = self.model
        tokens = mae.patch_embed(image)
        grid = (tokens.shape[2], tokens.shape[3])
        tokens = tokens.flatten(2).transpose(1, 2) + positions(mae.pos_embed, grid)  # (1, L, D)
        first = mae.cls_token + mae.pos_embed[:, :1]
        x, attention = run_blocks(mae.blocks, torch.cat([first, tokens.index_select(1, keep)], 1))
        x = mae.decoder_embed(mae.norm(x))
        places = mae.mask_token.expand(1, tokens.shape[1], -1)
        full = places.index_copy(1, keep, x[:, 1:]) + positions(mae.decoder_pos_embed, grid)
        x = torch.cat([x[:, :1] + mae.decoder_pos_embed[:, :1], full], 1)
        x, _ = run_blocks(mae.decoder_blocks, x)
        x = mae.decoder_norm(x)[:, 1:]
        if mae.decoder_pixels is not None:
            painted = mae.decoder_pixels(x)
        else:
            painted = mae.decoder_pred(x)
            if mae.norm_pix_loss:
                mean, deviation = patch_statistics(patchify(image, mae.patch_size))
                painted = painted * deviation + mean
        picture = unpatchify(painted, grid)
        return (picture, attention) if self.inside else (picture,)


def positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """`resize_table` without a branch on the grid's size: of its own size the table is unchanged
    by the interpolation too, whose weights are then 0 and 1."""
    side = round((table.shape[1] - 1) ** 0.5)
    square = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, side, side)
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2)


def run_blocks(blocks: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """timm's blocks in evaluation, (1, N, D) -> the same and attention (blocks, heads, N, N)."""
    maps = []
    for block in blocks:
        attend = block.attn
        qkv = attend.qkv(block.norm1(x)).unflatten(2, (3, attend.num_heads, attend.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (1, heads, N, D / heads)
        attention = (q * attend.scale @ k.transpose(2, 3)).softmax(3)
        x = x + attend.proj((attention @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
        maps.append(attention[0])
    return x, torch.stack(maps) if maps else x.new_zeros(0)


def pool(pooler: AlignedRoIPool, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """`AlignedRoIPool` for the boxes (N, 4) of one image."""
    rois = F.pad(boxes, (1, 0))  # all of image 0
    level = pooler.level_of(boxes)
    pooled = boxes.new_zeros(boxes.shape[0], features[0].shape[1], pooler.size, pooler.size)
    for i, (feature, stride) in enumerate(zip(features, pooler.strides, strict=True)):
        own = (level == i).nonzero()[:, 0]
        part = roi_align(feature, rois[own], pooler.size, 1 / stride, 0, aligned=True)
        pooled = pooled.index_copy(0, own, part)
    return pooled


class Affine(nn.Module):
    """What BatchNorm is in evaluation; it takes any number of maps, none too."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        self.register_buffer("scale", scale[:, None, None])
        self.register_buffer("shift", (norm.bias - norm.running_mean * scale)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.get_buffer("scale") + self.get_buffer("shift")


class Groups(nn.Module):
    """What GroupNorm is; it takes any number of maps, none too. It averages one dimension after
    the other: onnxruntime adds a float32 at a time, which costs digits on a million numbers."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(1, (self.norm.num_groups, -1))  # (N, G, C / G, h, w)
        centred = groups - average(groups)
        even = (centred * (average(centred.square()) + self.norm.eps).rsqrt()).flatten(1, 2)
        return even * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]


def average(groups: Tensor) -> Tensor:
    """(N, G, C / G, h, w) -> (N, G, 1, 1, 1)."""
    return groups.mean(4, keepdim=True).mean(3, keepdim=True).mean(2, keepdim=True)


def with_open_norms(model: Detector) -> Detector:
    """A copy with an `Affine` for each BatchNorm and `Groups` for each GroupNorm."""
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, Affine(child))
            elif isinstance(child, nn.GroupNorm):
                setattr(module, name, Groups(child))
    return model


def clip(boxes: Tensor, size: Tensor) -> Tensor:
    """(..., 4) boxes clipped to an image of size (2,): height, width."""
    return torch.minimum(boxes.clamp(min=0), size.flip(0).repeat(2).to(boxes))
