"""Everything that turns images into c2..c5. A backbone is `(images, image_sizes) -> dict`."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mimdet.config import BackboneConfig
from mimdet.models.baselines import build_benchmarking_vit, build_resnet, build_swin, build_vitdet
from mimdet.models.sampling import (
    DEFAULT,
    SAMPLERS,
    Grid,
    Keep,
    Sample,
    Sampler,
    Sampling,
    draw,
    token_grid,
)
from mimdet.models.stem import STEMS, StemFeatures
from mimdet.models.vit import FILLS, Decoder, Encoder, Fill, init_like_mae


def resolve(name: str, registered: Mapping[str, Any], slot: str) -> Any:
    """The part called `name`. Raises ValueError that lists the choices."""
    if name in registered:
        return registered[name]
    module, separator, attribute = name.partition(":")
    if not separator:
        raise ValueError(
            f"{slot}={name!r} is not known: use one of {sorted(registered)}, or 'module:function', "
            f"or pass the {slot} itself to build_detector({slot}=...)"
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{slot}={name!r} cannot be imported: {error}") from error


class SampledBackbone(nn.Module):
    """A backbone whose encoder sees a sample of the tokens: `(images, image_sizes, sampling)`.

    Any other backbone is called with images and sizes alone; asking it for a sample is an error.
    """

    sample_ratio: float
    """Share of the tokens kept while training."""
    sample_ratio_eval: float
    """The same in evaluation."""


class MIMDetBackbone(SampledBackbone):
    """The ConvNet-ViT hybrid: a small stem gives c2 and c3, a sampled ViT is the third stage.

    Strides of c2..c5 are 4, 8, 16, 32.
    """

    def __init__(
        self,
        stem: nn.Module,
        encoder: Encoder,
        decoder: Decoder,
        channels: dict[str, int],
        sampler: Sampler = SAMPLERS["random"],
        sample_ratio: float = 0.5,
        sample_ratio_eval: float = 1.0,
        keep: Keep = "valid",
    ) -> None:
        super().__init__()
        self.stem = stem
        self.encoder = encoder
        self.decoder = decoder
        self.channels = channels
        self.sampler = sampler
        self.sample_ratio = sample_ratio
        self.sample_ratio_eval = sample_ratio_eval
        self.keep: Keep = keep

    def forward(
        self,
        images: Tensor,
        image_sizes: Sequence[tuple[int, int]],
        sampling: Sampling = DEFAULT,
    ) -> dict[str, Tensor]:
        """images: (B, 3, H, W), normalised and padded; image_sizes: (height, width) before it."""
        stem: StemFeatures = self.stem(images)
        tokens = stem.tokens.flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, L, D)
        grid = (stem.tokens.shape[2], stem.tokens.shape[3])
        sample = self.draw(tokens, grid, image_sizes, sampling)
        c4 = self.decoder(self.encoder(tokens, sample), sample, tokens)
        return {"c2": stem.c2, "c3": stem.c3, "c4": c4, "c5": F.max_pool2d(c4, 2)}

    def draw(
        self,
        tokens: Tensor,
        grid: Grid,
        image_sizes: Sequence[tuple[int, int]],
        sampling: Sampling = DEFAULT,
    ) -> Sample:
        """The tokens (B, L, D) that are kept: the ready sample, or one that is drawn."""
        given = sampling.sample
        if given is not None:
            if given.grid != grid or len(given.keep) != len(tokens):
                raise ValueError(
                    f"the given sample is for {len(given.keep)} images on a grid of {given.grid}; "
                    f"this batch has {len(tokens)} on a padded grid of {grid}"
                )
            return given.to(tokens.device)
        ratio = sampling.ratio
        if ratio is None:
            ratio = self.sample_ratio if self.training else self.sample_ratio_eval
        grids = [token_grid(*size) for size in image_sizes]
        keep = sampling.keep or self.keep
        return draw(self.sampler, tokens, grids, grid, ratio, keep, sampling.generators)


def build_mimdet(
    cfg: BackboneConfig,
    stem: nn.Module | None = None,
    sampler: Sampler | None = None,
    fill: Fill | None = None,
) -> MIMDetBackbone:
    dim, decoder_dim = cfg.embed_dim, cfg.decoder_dim
    encoder = Encoder(
        dim, cfg.depth, cfg.num_heads, cfg.drop_path, cfg.position_grid, cfg.checkpointing
    )
    if fill is None:
        fill = resolve(cfg.decoder_fill, FILLS, "decoder_fill")(dim, decoder_dim)
    decoder = Decoder(
        dim,
        decoder_dim,
        cfg.decoder_depth,
        cfg.decoder_heads,
        fill,
        cfg.position_grid,
        cfg.checkpointing,
    )
    encoder.apply(init_like_mae)
    decoder.apply(init_like_mae)
    if stem is None:
        stem = resolve(cfg.stem, STEMS, "stem")(dim)
    return MIMDetBackbone(
        stem,
        encoder,
        decoder,
        channels={"c2": dim // 4, "c3": dim // 2, "c4": decoder_dim, "c5": decoder_dim},
        sampler=resolve(cfg.sampler, SAMPLERS, "sampler") if sampler is None else sampler,
        sample_ratio=cfg.sample_ratio,
        sample_ratio_eval=cfg.sample_ratio_eval,
        keep=cfg.keep,
    )


BASELINES: dict[str, Callable[[BackboneConfig], nn.Module]] = {
    "benchmarking_vit": build_benchmarking_vit,
    "vitdet": build_vitdet,
    "swin": build_swin,
    "resnet": build_resnet,
}
BACKBONES: dict[str, Callable[..., nn.Module]] = {"mimdet": build_mimdet, **BASELINES}


def build_backbone(cfg: BackboneConfig, **parts: Any) -> nn.Module:
    """The backbone a configuration names; parts of it (stem, sampler, fill) may be passed in."""
    build = resolve(cfg.kind, BACKBONES, "backbone")
    given = {name: part for name, part in parts.items() if part is not None}
    if cfg.kind in BASELINES:
        if given:
            raise ValueError(f"a {cfg.kind} backbone has no {' and no '.join(given)} to replace")
        if (cfg.sample_ratio, cfg.sample_ratio_eval) != (1, 1):
            raise ValueError(
                f"a {cfg.kind} backbone sees every token: set backbone.sample_ratio and "
                f"backbone.sample_ratio_eval to 1, not {cfg.sample_ratio}, {cfg.sample_ratio_eval}"
            )
    return build(cfg, **given)
