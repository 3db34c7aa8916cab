"""The masked autoencoder that MIMDet's encoder and decoder come from (He et al., CVPR 2022).

An encoder sees a quarter of an image's patches, a small decoder paints the rest. Parameters have
the names of Meta's released files, so `MAE.state_dict()` is such a file's content.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from timm.layers import PatchEmbed
from torch import Generator, Tensor, nn

from mimdet.models.sampling import SAMPLERS, Sample, Sampler, draw, gather, scatter
from mimdet.models.vit import frozen_positions, init_like_mae, resize_table, transformer_block

MAELayerNorm = partial(nn.LayerNorm, eps=1e-6)


class MAEOutput(NamedTuple):
    loss: Tensor
    """() mean squared error over the patches that were not kept; of two heads the sum of both."""
    prediction: Tensor
    """(B, L, patch * patch * 3), one row a patch, pixel by pixel with the channels last."""
    sample: Sample
    """The patches the encoder saw."""
    pixels: Tensor | None = None
    """The same of the head for plain pixels, where there is one."""


class Reconstruction(NamedTuple):
    """Normalised images (B, 3, H, W), ready to be shown."""

    visible: Tensor
    """The kept patches; the others are 0, which is mid-grey."""
    painted: Tensor
    """What the decoder predicts, everywhere."""
    pasted: Tensor
    """The prediction with the kept patches pasted over it."""


class MAE(nn.Module):
    """A ViT encoder over the kept patches, and a smaller ViT decoder over all places."""

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        norm_pix_loss: bool = True,
        pixel_head: bool = False,
    ) -> None:
        """image_size: pixels of the square images it is trained on; others work, with resized
        position tables. norm_pix_loss: predict patches normalised by their own mean and deviation,
        which trains better features; without it reconstructions look right. pixel_head: a second
        head beside it, for plain pixels: both."""
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is no multiple of patch_size {patch_size}")
        side = image_size // patch_size
        self.patch_size = patch_size
        self.num_heads = num_heads
        self.decoder_heads = decoder_heads
        self.norm_pix_loss = norm_pix_loss
        self.patch_embed = PatchEmbed(
            None, patch_size, 3, embed_dim, flatten=False, strict_img_size=False
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = frozen_positions(embed_dim, side)
        self.blocks = nn.ModuleList(
            transformer_block(embed_dim, num_heads, norm=MAELayerNorm) for _ in range(depth)
        )
        self.norm = MAELayerNorm(embed_dim)

        self.decoder_embed = nn.Linear(embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = frozen_positions(decoder_dim, side)
        self.decoder_blocks = nn.ModuleList(
            transformer_block(decoder_dim, decoder_heads, norm=MAELayerNorm)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = MAELayerNorm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, patch_size**2 * 3)
        self.decoder_pixels = nn.Linear(decoder_dim, patch_size**2 * 3) if pixel_head else None

        self.apply(init_like_mae)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        images: Tensor,
        ratio: float = 0.25,
        *,
        sample: Sample | None = None,
        sampler: Sampler = SAMPLERS["random"],
        generators: Sequence[Generator] | None = None,
    ) -> MAEOutput:
        """images: (B, 3, H, W) float, ImageNet-normalised, H and W multiples of the patch size.

        ratio: share of the patches KEPT (the paper speaks of 75 % masked). A ready sample is used
        as it is; all its images must keep equally many patches.
        """
        tokens = self.patch_embed(images)  # (B, D, h, w)
        grid = (tokens.shape[2], tokens.shape[3])
        tokens = tokens.flatten(2).transpose(1, 2)  # (B, L, D)
        if sample is None:
            grids = [grid] * len(tokens)
            sample = draw(sampler, tokens, grids, grid, ratio, generators=generators)
        decoded = self.decode(self.encode(tokens, sample), sample)
        prediction = self.decoder_pred(decoded)
        loss = self.loss(images, prediction, sample)
        if self.decoder_pixels is None:
            return MAEOutput(loss, prediction, sample)
        pixels = self.decoder_pixels(decoded)
        loss = loss + hidden_error(pixels, patchify(images, self.patch_size), sample)
        return MAEOutput(loss, prediction, sample, pixels)

    def encode(self, tokens: Tensor, sample: Sample) -> Tensor:
        """(B, L, D) -> (B, 1 + K, D): the class token, then the kept ones in the sample's order."""
        kept = gather(tokens + resize_table(self.pos_embed, sample.grid), sample)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        x = torch.cat([first, torch.stack(kept)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, latent: Tensor, sample: Sample) -> Tensor:
        """(B, 1 + K, D) -> (B, L, C), of which the heads make pixels."""
        x = self.decoder_embed(latent)
        places = self.mask_token.expand(len(x), sample.grid[0] * sample.grid[1], -1)
        full = scatter(list(x[:, 1:]), sample, places)  # (B, L, C)
        full = full + resize_table(self.decoder_pos_embed, sample.grid)
        x = torch.cat([x[:, :1] + self.decoder_pos_embed[:, :1], full], dim=1)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, 1:]

    def loss(self, images: Tensor, prediction: Tensor, sample: Sample) -> Tensor:
        """Mean squared error over the pixels of the patches that were not kept: ()."""
        truth = patchify(images, self.patch_size)
        if self.norm_pix_loss:
            mean, deviation = patch_statistics(truth)
            truth = (truth - mean) / deviation
        return hidden_error(prediction, truth, sample)

    def reconstruct(self, images: Tensor, output: MAEOutput) -> Reconstruction:
        """The prediction as pictures.

        With norm_pix_loss alone the model predicts no brightness or contrast: those of each patch
        are then borrowed from the truth, as every such picture does.
        """
        truth = patchify(images, self.patch_size)
        painted = output.prediction if output.pixels is None else output.pixels
        if self.norm_pix_loss and output.pixels is None:
            mean, deviation = patch_statistics(truth)
            painted = painted * deviation + mean
        kept = output.sample.mask().flatten(1)[..., None].to(truth.device)
        parts = truth * kept, painted, torch.where(kept, truth, painted)
        return Reconstruction(*(unpatchify(part, output.sample.grid) for part in parts))


def hidden_error(prediction: Tensor, truth: Tensor, sample: Sample) -> Tensor:
    """Mean squared error of (B, L, patch * patch * 3) over the places that were not kept: ()."""
    error = ((prediction - truth) ** 2).mean(dim=2)  # (B, L)
    hidden = ~sample.mask().flatten(1).to(error.device)
    return error[hidden].mean() if hidden.any() else prediction.sum() * 0


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, 3, H, W) -> (B, L, patch * patch * 3): patches row by row, channels last in a pixel."""
    squares = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, 3, h, p, w, p)
    return squares.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, h * w, patch * patch * 3) -> (B, 3, H, W)."""
    patch = round((patches.shape[2] / 3) ** 0.5)
    squares = patches.unflatten(2, (patch, patch, 3)).unflatten(1, grid)  # (B, h, w, p, p, 3)
    return squares.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every patch, both (B, L, 1); the variance is unbiased, plus 1e-6."""
    mean = patches.mean(dim=2, keepdim=True)
    return mean, (patches.var(dim=2, keepdim=True) + 1e-6).sqrt()
