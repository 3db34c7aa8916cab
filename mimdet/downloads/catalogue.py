"""The public files a user of the kit may want: weights to start from, released detectors, COCO.

Each entry repeats what the page beside it says; what that page leaves open is empty here. Nothing
in this file fetches anything: that is fetch.py, after asking.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

MAE_README = "https://github.com/facebookresearch/mae"
MAE_DECODERS = "https://github.com/facebookresearch/mae/issues/8"
MAE_DEMO = "https://github.com/facebookresearch/mae/blob/main/demo/mae_visualize.ipynb"
MAE_DEMO_SIZES = "https://github.com/facebookresearch/mae/issues/3"
MIMDET_V1 = "https://github.com/hustvl/MIMDet/tree/v1.0.0"
MIMDET_V2 = "https://github.com/hustvl/MIMDet"
V1_FILES = "https://github.com/hustvl/storage/releases/download/v1.0.0/"
V2_FILES = "https://github.com/hustvl/Storage/releases/download/v1.2.0/"
COCO_PAGE = "https://cocodataset.org/#download"

META = "CC-BY-NC 4.0"
# The hub's page says Apache 2.0 of the same weights that Meta's repository puts under CC-BY-NC 4.0.
HUB_META = "Apache 2.0; Meta: CC-BY-NC 4.0"
# "MIMDet is released under the MIT License" (its README); training started from MAE's weights.
MIMDET = "MIT; from MAE: CC-BY-NC 4.0"


@dataclass(frozen=True, slots=True)
class PublicFile:
    name: str
    """What the user types; on the Hugging Face hub the id of the repository."""
    address: str
    page: str
    """Where the authors publish it."""
    licence: str
    good_for: str
    size: str = ""
    """As the page states it."""
    sha256: str = ""
    """As the page states it."""
    md5_start: str = ""
    """The first digits of the MD5, which is all that MAE's README gives."""
    hub_file: str = ""
    """File inside the hub's repository; empty for a plain address."""
    rename: str = ""
    """Name on disk where the address's own is taken: the two versions of MIMDet share names."""

    @property
    def file_name(self) -> str:
        return self.rename or self.address.rsplit("/", 1)[1]


def find(names: Iterable[str]) -> list[PublicFile]:
    """Entries by name, file name or group, each once. ValueError for an unknown name."""
    by_name = {file.name: file for file in CATALOGUE}
    by_name |= {file.file_name: file for file in CATALOGUE if not file.hub_file}
    found: dict[PublicFile, None] = {}
    for word in names:
        for name in GROUPS.get(word, (word,)):
            if name not in by_name:
                close = get_close_matches(name, [*by_name, *GROUPS], n=3, cutoff=0.5)
                hint = f"; did you mean {', '.join(close)}?" if close else ""
                raise ValueError(f"there is no public file {name!r} in `mimdet download`{hint}")
            found[by_name[name]] = None
    return list(found)


def table() -> str:
    """The whole catalogue, one line an entry."""
    rows = [("name", "size", "licence", "what it is good for")]
    rows += [(f.name, f.size or "not stated", f.licence, f.good_for) for f in CATALOGUE]
    rows += [(name, "", "", f"all of {', '.join(parts)}") for name, parts in GROUPS.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
        for row in rows
    )


def _mae(name: str, path: str, page: str, good_for: str, md5_start: str = "") -> PublicFile:
    address = f"https://dl.fbaipublicfiles.com/mae/{path}.pth"
    return PublicFile(name, address, page, META, good_for, md5_start=md5_start)


def _hub(
    name: str, file: str, size: str, licence: str, good_for: str, sha256: str = ""
) -> PublicFile:
    page = f"https://huggingface.co/{name}"
    address = f"{page}/resolve/main/{file}"
    return PublicFile(name, address, page, licence, good_for, size, sha256, hub_file=file)


def _mimdet(name: str, address: str, page: str, good_for: str, rename: str = "") -> PublicFile:
    return PublicFile(name, f"{address}.pth", page, MIMDET, good_for, rename=rename)


def _coco(name: str, path: str, size: str, licence: str, good_for: str) -> PublicFile:
    address = f"http://images.cocodataset.org/{path}.zip"
    return PublicFile(name, address, COCO_PAGE, licence, good_for, size)


_BASE = "mimdet_vit_base_mask_rcnn_fpn_sr_{}_800_1333_4xdec_coco_3x"
_V1_NAME = "mimdet_v1_vit_{}_mask_rcnn_fpn_sr_{}_800_1333_4xdec_coco_3x.pth"
_LARGE = "mimdet_vit_large_mask_rcnn_fpn_sr_0p5_800_1333_4xdec_coco_3x"
_PLAIN = V1_FILES + "benchmarking_mask_rcnn_base_FPN_{}ep_LSJ_mae"

# fmt: off
CATALOGUE: tuple[PublicFile, ...] = (
    # Masked autoencoders as Meta published them. "full" and "visualize" hold encoder and decoder;
    # "full" predicts patches normalised one by one, "visualize" the pixels themselves.
    _mae("mae-base-full", "pretrain/mae_pretrain_vit_base_full", MAE_DECODERS,
         "MAE ViT-B, encoder AND decoder: what mimdet_base starts from"),
    _mae("mae-large-full", "pretrain/mae_pretrain_vit_large_full", MAE_DECODERS,
         "MAE ViT-L, encoder AND decoder: what mimdet_large starts from"),
    _mae("mae-huge-full", "pretrain/mae_pretrain_vit_huge_full", MAE_DECODERS,
         "MAE ViT-H/14, encoder AND decoder; no preset has this size"),
    _mae("mae-base", "pretrain/mae_pretrain_vit_base", MAE_README,
         "MAE ViT-B, encoder only: for a new decoder (--init-decoder random)", "8cad7c"),
    _mae("mae-large", "pretrain/mae_pretrain_vit_large", MAE_README,
         "MAE ViT-L, encoder only: for a new decoder (--init-decoder random)", "b8b06e"),
    _mae("mae-huge", "pretrain/mae_pretrain_vit_huge", MAE_README,
         "MAE ViT-H/14, encoder only; no preset has this size", "9bdbb0"),
    _mae("mae-base-visualize", "visualize/mae_visualize_vit_base", MAE_DEMO_SIZES,
         "MAE ViT-B trained on plain pixels: reconstructions that look right"),
    _mae("mae-large-visualize", "visualize/mae_visualize_vit_large", MAE_DEMO,
         "MAE ViT-L trained on plain pixels: reconstructions that look right"),
    _mae("mae-huge-visualize", "visualize/mae_visualize_vit_huge", MAE_DEMO_SIZES,
         "MAE ViT-H/14 trained on plain pixels: reconstructions that look right"),
    _mae("mae-large-visualize-gan", "visualize/mae_visualize_vit_large_ganloss", MAE_DEMO,
         "the same ViT-L with a GAN loss besides: more realistic reconstructions"),

    # On the Hugging Face hub. facebook/vit-mae-* are the "visualize" kind (config.json says
    # norm_pix_loss false; transformers' converter starts from mae_visualize_vit_base.pth), timm's
    # were made from the encoder-only files.
    _hub("facebook/vit-mae-base", "model.safetensors", "448 MB", HUB_META,
         "MAE ViT-B trained on plain pixels, like mae-base-visualize; no pickle",
         "479dcef4bd5df06259399027b789f21e9d9a1b79f37155a64176d55bc26fdae8"),
    _hub("facebook/vit-mae-large", "pytorch_model.bin", "1.32 GB", HUB_META,
         "MAE ViT-L trained on plain pixels, like mae-large-visualize",
         "28a019bd1842a7bdea1cfa9bb390047ad3fab82032cea2045873ca0399ca5a84"),
    _hub("facebook/vit-mae-huge", "pytorch_model.bin", "2.63 GB", HUB_META,
         "MAE ViT-H/14 trained on plain pixels, like mae-huge-visualize",
         "89404c28ea8289eaf371f926b9b947738e58135c4e094c2402b033c794414a68"),
    _hub("timm/vit_base_patch16_224.mae", "model.safetensors", "343 MB", META,
         "MAE ViT-B, encoder only, made from mae-base; no pickle"),
    _hub("timm/vit_large_patch16_224.mae", "model.safetensors", "1.21 GB", META,
         "MAE ViT-L, encoder only, made from mae-large; no pickle",
         "d58a1a547a07c3c41917c23069dcaadab6f469a8cf793a3cba5fe404c344ab68"),
    _hub("timm/vit_huge_patch14_224.mae", "model.safetensors", "2.52 GB", META,
         "MAE ViT-H/14, encoder only, made from mae-huge; no pickle",
         "4c1c77c532753bf1d5dc5ec1dd7052d819986a6532df5e1c81b821611948be98"),

    # Detectors the paper's authors trained on COCO, with the box / mask AP they publish.
    _mimdet("mimdet-base", V2_FILES + _BASE.format("0p5"), MIMDET_V2,
            "mimdet_base, trained at ratio 0.5: 51.7 / 46.2"),
    _mimdet("mimdet-large", V2_FILES + _LARGE, MIMDET_V2,
            "mimdet_large, trained at ratio 0.5: 54.3 / 48.2"),
    _mimdet("mimdet-v1-base-0.25", V1_FILES + _BASE.format("0p25"), MIMDET_V1,
            "mimdet_v1_base, trained at ratio 0.25: 49.9 / 44.7", _V1_NAME.format("base", "0p25")),
    _mimdet("mimdet-v1-base", V1_FILES + _BASE.format("0p5"), MIMDET_V1,
            "mimdet_v1_base, trained at ratio 0.5: 51.5 / 46.0", _V1_NAME.format("base", "0p5")),
    _mimdet("mimdet-v1-large", V1_FILES + _LARGE, MIMDET_V1,
            "mimdet_v1_large, trained at ratio 0.5: 53.3 / 47.5", _V1_NAME.format("large", "0p5")),
    _mimdet("benchmarking-base-25", _PLAIN.format(25), MIMDET_V2,
            "plain ViT-B baseline, 25 epochs: 48.0 / 43.0"),
    _mimdet("benchmarking-base-50", _PLAIN.format(50), MIMDET_V2,
            "plain ViT-B baseline, 50 epochs: 50.2 / 44.9"),
    _mimdet("benchmarking-base-100", _PLAIN.format(100), MIMDET_V2,
            "plain ViT-B baseline, 100 epochs: 50.4 / 44.9"),

    # COCO 2017, what the recipes train and evaluate on.
    _coco("coco-train2017", "zips/train2017", "18 GB", "Flickr terms of use",
          "118 thousand training images"),
    _coco("coco-val2017", "zips/val2017", "1 GB", "Flickr terms of use",
          "5 thousand images to evaluate on"),
    _coco("coco-annotations2017", "annotations/annotations_trainval2017", "241 MB", "CC-BY 4.0",
          "boxes and masks of both"),
)
# fmt: on

GROUPS = {"coco": ("coco-train2017", "coco-val2017", "coco-annotations2017")}
"""One word for several files."""
