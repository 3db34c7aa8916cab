"""The two halves of a masked autoencoder as a detector uses them, on timm's ViT blocks."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mimdet.models.sampling import Sample, gather, scatter


def sincos_table(dim: int, side: int) -> Tensor:
    """MAE's position table of a square grid: (1, 1 + side*side, dim) float32.

    The first half of the channels encodes the column, the second half the row. Row 0 belongs to
    MAE's class token; MIMDet has none, but the released checkpoints store the row, so we do too.
    """
    if dim % 4:
        raise ValueError(f"position tables need a width divisible by 4, not {dim}")
    steps = torch.arange(side, dtype=torch.float64)
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    places = torch.cat([_sincos(columns, dim // 2), _sincos(rows, dim // 2)], dim=1)  # (side², dim)
    return torch.cat([torch.zeros(1, dim), places.float()])[None]


def _sincos(positions: Tensor, dim: int) -> Tensor:
    """One coordinate of every place -> (places, dim): sines, then cosines, of falling frequency."""
    frequency = 1 / 10000 ** (torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = positions.flatten()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def resize_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """A stored table (1, 1 + side*side, D) -> the positions of `grid` = (h, w): (1, h*w, D).

    Bicubic without antialiasing, as the original does on every forward; the stored size itself is
    returned unchanged.
    """
    side = round((table.shape[1] - 1) ** 0.5)
    places = table[:, 1:]
    if grid == (side, side):
        return places
    square = places.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, side, side)
    resized = F.interpolate(square.float(), size=grid, mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(table.dtype)  # (1, h*w, D)


Checkpointing = Literal["auto", "on", "off"]
# The detector's LayerNorms use 1e-5 although MAE was trained with 1e-6 (as the original code).
DetectorLayerNorm = partial(nn.LayerNorm, eps=1e-5)


FEW_TOKENS = 400
"""Up to so many, gradients of attention on a CPU take less time in float32 than in bfloat16: half
of it for 256 tokens, a sixth for 64 (PyTorch 2.14, Intel Xeon; `tools.bench attention`)."""


class FewTokensAttention(Attention):
    """timm's attention; while few tokens learn on a CPU in mixed precision, they attend in float32.

    Everything else, and every result in float32 and float64, is timm's.
    """

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B, N, D) -> the same."""
        mixed = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        slow = mixed and torch.is_grad_enabled() and x.shape[1] <= FEW_TOKENS
        if not (slow and self.fused_attn):
            return super().forward(x, attn_mask, is_causal)  # type: ignore[no-any-return]
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim))
        with torch.autocast("cpu", enabled=False):
            q, k, v = qkv.float().permute(2, 0, 3, 1, 4)  # each (B, heads, N, head_dim)
            x = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal)
        return self.proj(x.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def transformer_block(
    dim: int, heads: int, drop_path: float = 0.0, norm: Callable[..., nn.Module] = DetectorLayerNorm
) -> Block:
    options: dict[str, Any] = {"qkv_bias": True, "drop_path": drop_path, "norm_layer": norm}
    return Block(dim, heads, mlp_ratio=4.0, attn_layer=FewTokensAttention, **options)


def frozen_positions(dim: int, side: int) -> nn.Parameter:
    """A fixed table is stored as a frozen parameter: it is in the published parameter counts."""
    return nn.Parameter(sincos_table(dim, side), requires_grad=False)


class Encoder(nn.Module):
    """ViT encoder without class token that sees only the sampled tokens (paper section 3.1)."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        drop_path: float = 0.0,
        position_grid: int = 50,
        checkpointing: Checkpointing = "off",
    ) -> None:
        super().__init__()
        rates = [drop_path * block / max(1, depth - 1) for block in range(depth)]
        self.pos_embed = frozen_positions(dim, position_grid)
        self.blocks = nn.ModuleList(transformer_block(dim, heads, rate) for rate in rates)
        self.norm = DetectorLayerNorm(dim)
        self.checkpointing = checkpointing

    def forward(self, tokens: Tensor, sample: Sample) -> list[Tensor]:
        """tokens: (B, L, D) on sample.grid -> per image (K_i, D), in the order of sample.keep.

        Images with equal K run as one batch; no image ever sees another one or any padding, so its
        output does not depend on what else is in the batch.
        """
        kept = gather(tokens + resize_table(self.pos_embed, sample.grid), sample)
        groups: dict[int, list[int]] = defaultdict(list)
        for image, own in enumerate(kept):
            groups[len(own)].append(image)
        encoded: dict[int, Tensor] = {}
        for members in groups.values():
            x = torch.stack([kept[image] for image in members])  # (members, K, D)
            for block in self.blocks:
                x = run_block(block, x, self.checkpointing)
            encoded |= dict(zip(members, self.norm(x), strict=True))
        return [encoded[image] for image in range(len(kept))]


class StemFill(nn.Module):
    """Version 2 of the paper: unsampled places hold the stem's own tokens, newly projected."""

    def __init__(self, encoder_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(encoder_dim, dim)

    def forward(self, stem_tokens: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, C)."""
        return self.proj(stem_tokens)


class MaskTokenFill(nn.Module):
    """Version 1 of the paper: unsampled places hold MAE's one learned token."""

    def __init__(self, encoder_dim: int, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, dim))

    def forward(self, stem_tokens: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, C)."""
        return self.token.expand(*stem_tokens.shape[:2], -1)


Fill = Callable[[Tensor], Tensor]
"""What stands at unsampled places before the positions are added: stem tokens (B, L, D), without
positions -> (B, L, C)."""
FILLS: dict[str, type[nn.Module]] = {"stem": StemFill, "mask_token": MaskTokenFill}


class Decoder(nn.Module):
    """MAE's decoder turned into the third stage's output: sampled tokens in, full c4 map out."""

    def __init__(
        self,
        encoder_dim: int,
        dim: int,
        depth: int,
        heads: int,
        fill: Fill,
        position_grid: int = 50,
        checkpointing: Checkpointing = "off",
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_dim, dim)
        self.fill = fill
        self.pos_embed = frozen_positions(dim, position_grid)
        self.blocks = nn.ModuleList(transformer_block(dim, heads) for _ in range(depth))
        self.norm = DetectorLayerNorm(dim)
        self.checkpointing = checkpointing

    def forward(self, encoded: list[Tensor], sample: Sample, stem_tokens: Tensor) -> Tensor:
        """encoded: per image (K_i, D); stem_tokens: (B, L, D), no positions -> (B, C, h, w)."""
        projected = self.embed(torch.cat(encoded))  # (sum K_i, C)
        x = scatter([projected], sample, self.fill(stem_tokens))  # (B, L, C)
        x = x + resize_table(self.pos_embed, sample.grid)
        for block in self.blocks:
            x = run_block(block, x, self.checkpointing)
        return self.norm(x).transpose(1, 2).unflatten(2, sample.grid)  # (B, L, C) -> (B, C, h, w)


def init_like_mae(module: nn.Module) -> None:
    """MAE's initialisation: Xavier for linear layers; apply it to an encoder or decoder."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, MaskTokenFill):
        nn.init.normal_(module.token, std=0.02)


def run_block(block: Callable[[Tensor], Tensor], x: Tensor, mode: Checkpointing) -> Tensor:
    """One block, with its activations recomputed in the backward pass where that is wanted."""
    if recompute(mode, x.device):
        return checkpoint(block, x, use_reentrant=False)
    return block(x)


def recompute(mode: Checkpointing, device: torch.device) -> bool:
    """Whether this forward pass keeps no activations. "auto": on a GPU below 40 GB, where ViT-B at
    800x1333 and more than two images needs that."""
    small = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < 40e9
    return torch.is_grad_enabled() and (mode == "on" or (mode == "auto" and small))
