"""Every named recipe: a function that returns a fresh Config and states its cost and its result.

`PRESETS` maps the names used on the command line to these functions. MIMDet's own stand here, the
baselines' in baseline_presets.py, those for a laptop in tiny_presets.py.
"""

from collections.abc import Callable

from mimdet.baseline_presets import benchmarking_vit_base, resnet50, swin_base, vitdet_base
from mimdet.config import BackboneConfig, Config, DataConfig
from mimdet.tiny_presets import (
    nuclei,
    tiny,
    tiny_benchmarking_vit,
    tiny_no_decoder,
    tiny_patch_stem,
    tiny_resnet,
    tiny_swin,
    tiny_vitdet,
)


def mimdet_base() -> Config:
    """MIMDet ViT-B, version 2 of the paper: the published recipe for COCO.

    127,954,768 parameters; 1.13 T multiply-adds at 800x1280 and sample ratio 1.
    36 epochs, batch 64, sampling half of the tokens. Published: 51.7 box / 46.2 mask AP at
    sample_ratio_eval=1.0 (reproduced by others: 50.0-50.8). Needs COCO and a MAE checkpoint.
    """
    return Config(preset="mimdet_base", data=DataConfig(source="coco", workers=8))


def mimdet_large() -> Config:
    """MIMDet ViT-L, version 2: 349,332,080 parameters; 2.51 T multiply-adds at ratio 1.

    36 epochs, batch 64. Published: 54.3 box / 48.2 mask AP.
    """
    cfg = mimdet_base()
    cfg.preset = "mimdet_large"
    cfg.backbone = BackboneConfig(embed_dim=1024, depth=24, num_heads=16, drop_path=0.4)
    cfg.training.rate_multiplier = 3.5
    cfg.training.batch_size = 4
    cfg.training.accumulate = 16
    return cfg


def mimdet_v1_base() -> Config:
    """MIMDet ViT-B, version 1 of the paper: mask tokens at unsampled places.

    127,561,552 parameters (the released file holds 50x50 position tables). Published: 51.5 box /
    46.0 mask AP at ratio 0.5 and 49.9 / 44.7 at ratio 0.25, 36 epochs, batch 64.
    """
    cfg = mimdet_base()
    cfg.preset = "mimdet_v1_base"
    cfg.backbone.decoder_fill = "mask_token"
    return cfg


def mimdet_v1_large() -> Config:
    """MIMDet ViT-L, version 1 (14x14 position tables): 345,268,848 parameters.

    Published: 53.3 box / 47.5 mask AP, called under-tuned by its authors.
    """
    cfg = mimdet_large()
    cfg.preset = "mimdet_v1_large"
    cfg.backbone.decoder_fill = "mask_token"
    cfg.backbone.position_grid = 14
    cfg.training.rate_multiplier = 2.0
    return cfg


def mimdet_patch_stem() -> Config:
    """Ablation: the pre-trained 16x16 patchify stem instead of the ConvStem.

    125,941,552 parameters. c2 and c3 are won back from its tokens by transposed convolutions.
    """
    cfg = mimdet_base()
    cfg.preset = "mimdet_patch_stem"
    cfg.backbone.stem = "patch"
    return cfg


def mimdet_no_decoder() -> Config:
    """Ablation: no decoder blocks. 115,345,232 parameters.

    c4 holds projected encoder tokens at sampled places and projected stem tokens at the others,
    plus positions, normed: what the paper's code does with a depth of 0.
    """
    cfg = mimdet_base()
    cfg.preset = "mimdet_no_decoder"
    cfg.backbone.decoder_depth = 0
    return cfg


PRESETS: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (
        mimdet_base,
        mimdet_large,
        mimdet_v1_base,
        mimdet_v1_large,
        mimdet_patch_stem,
        mimdet_no_decoder,
        benchmarking_vit_base,
        vitdet_base,
        swin_base,
        resnet50,
        tiny,
        tiny_patch_stem,
        tiny_no_decoder,
        tiny_benchmarking_vit,
        tiny_vitdet,
        tiny_swin,
        tiny_resnet,
        nuclei,
    )
}
