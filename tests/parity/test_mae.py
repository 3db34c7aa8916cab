"""The masked autoencoder against Meta's code: losses, prediction, pictures, gradients."""

from pathlib import Path

import pytest
import torch

import mimdet
from mimdet.config import BackboneConfig
from mimdet.models.backbones import build_backbone
from mimdet.models.mae import MAE, patchify, unpatchify
from mimdet.models.sampling import Sample, select
from mimdet.models.weights import load_mae, load_mae_model
from tests.parity.reference import reference, relative

GRID = (8, 8)
MEAN, STD = [torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]


@pytest.fixture
def stored(golden: Path) -> dict[str, torch.Tensor]:
    return reference(golden / "mae_small/mae_io")


def load(golden: Path, norm_pix_loss: bool) -> MAE:
    path = golden / "mae_small/mae_model.safetensors"
    return load_mae_model(path, num_heads=4, decoder_heads=4, norm_pix_loss=norm_pix_loss)


def original_sample(stored: dict[str, torch.Tensor]) -> Sample:
    return select(list(-stored["noise"]), [GRID] * 3, GRID, 1 - float(stored["mask_ratio"]))


@pytest.mark.parametrize("kind", ["raw", "norm"])
def test_loss_prediction_and_gradients(golden: Path, measured, stored, kind: str) -> None:
    model = load(golden, norm_pix_loss=kind == "norm")
    sample = original_sample(stored)
    seen = {}
    model.norm.register_forward_hook(lambda module, given, out: seen.update(latent=out))
    out = model(stored["imgs"], sample=sample)
    out.loss.backward()

    where = f"mae_small {kind}"
    measured(where, "latent", relative(seen["latent"], stored["latent"]), 1e-5)
    measured(where, "prediction", relative(out.prediction, stored["pred"]), 1e-5)
    measured(where, "loss", relative(out.loss, stored[f"loss_{kind}"]), 1e-5)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    expected = {n.split("/")[1]: v for n, v in stored.items() if n.startswith(f"grad_{kind}/")}
    assert gradients.keys() == expected.keys()
    # The gradient of a key's bias is zero: softmax does not see a shift. What is left is rounding.
    scale = max(v.abs().max() for v in expected.values())
    error = max(
        (gradients[n] - v).abs().max() / torch.maximum(v.abs().max(), 1e-4 * scale)
        for n, v in expected.items()
    )
    measured(where, "gradients", error, 1e-3)


def test_the_sample_is_the_originals_mask(stored) -> None:
    sample = original_sample(stored)
    order = stored["ids_restore"].argsort(dim=1)
    assert all(torch.equal(a, b[:16]) for a, b in zip(sample.keep, order, strict=True))
    mask = torch.ones(3, 64).scatter(1, torch.stack(sample.keep), 0.0)
    assert torch.equal(mask, stored["mask"])


def test_pictures(golden: Path, measured, stored) -> None:
    model = load(golden, norm_pix_loss=False)
    images = stored["imgs"]
    with torch.inference_mode():
        out = model(images, sample=original_sample(stored))
        pictures = model.reconstruct(images, out)
    assert torch.equal(patchify(images, 8), stored["patchify_imgs"])
    assert torch.equal(unpatchify(stored["patchify_imgs"], GRID), images)
    expected = {"visible": "im_masked", "painted": "unpatchify_pred", "pasted": "im_paste"}
    for ours, theirs in expected.items():
        picture = getattr(pictures, ours)
        measured("mae_small pictures", ours, relative(picture, stored[theirs]), 1e-5)
        shown = ((picture * STD + MEAN) * 255).clip(0, 255).int()
        difference = (shown - stored[f"vis_{theirs}"]).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3  # rounding down


def test_normalised_patches_are_painted_in_the_truths_contrast(golden: Path, stored) -> None:
    """A perfect prediction of normalised patches gives the image back."""
    model = load(golden, norm_pix_loss=True)
    images = stored["imgs"]
    out = model(images, sample=original_sample(stored))
    truth = patchify(images, 8)
    deviation = (truth.var(dim=2, keepdim=True) + 1e-6).sqrt()
    perfect = out._replace(prediction=(truth - truth.mean(dim=2, keepdim=True)) / deviation)
    torch.testing.assert_close(model.reconstruct(images, perfect).painted, images)
    assert model.loss(images, perfect.prediction, out.sample) < 1e-10


def test_round_trip_through_metas_layout(golden: Path, tmp_path) -> None:
    original = reference(golden / "mae_small/mae_model")
    model = load(golden, norm_pix_loss=True)
    for name in ("mae.pth", "mae.safetensors"):
        mimdet.save_mae(model, tmp_path / name)
    again = torch.load(tmp_path / "mae.pth", weights_only=True)["model"]
    assert again.keys() == original.keys()
    assert all(torch.equal(again[name], value) for name, value in original.items())
    ours = load_mae_model(tmp_path / "mae.safetensors")  # knows its heads and its loss itself
    assert ours.norm_pix_loss and ours.blocks[0].attn.num_heads == 4
    assert all(torch.equal(v, original[n]) for n, v in ours.state_dict().items())


def test_mimdet_takes_the_same_tensors(golden: Path, measured, capsys) -> None:
    """7x7 position tables become 14x14, two of the four decoder blocks are used."""
    folder = golden / "mae_to_mimdet"
    sizes = {"embed_dim": 96, "depth": 3, "num_heads": 4, "position_grid": 14}
    cfg = BackboneConfig(**sizes, decoder_dim=64, decoder_depth=2, decoder_heads=4)
    backbone = build_backbone(cfg)
    report = load_mae(backbone, folder / "mae_full.safetensors")
    theirs = reference(folder / "expected_bottom_up_after_load")
    names = {
        "encoder.": "encoder.",
        "decoder.embed.": "decoder.decoder_embed.",
        "decoder.": "decoder.decoder_",
    }
    error, exact = 0.0, 0
    for name in report.loaded:
        start = next(start for start in names if name.startswith(start))
        expected = theirs[names[start] + name.removeprefix(start)]
        ours = backbone.state_dict()[name]
        assert ours.shape == expected.shape
        exact += torch.equal(ours, expected)
        error = max(error, relative(ours, expected))
    measured("mae_to_mimdet", f"{len(report.loaded)} tensors, {exact} of them equal", error, 1e-6)
    assert exact == len(report.loaded)
    assert len(report.loaded) == len(theirs)  # the original took these, and no others
    assert all("stem" in name or "fill" in name for name in report.new)  # ConvStem, its projection
    assert "loaded" in capsys.readouterr().out
