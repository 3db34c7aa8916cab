"""The weights that come with the package are those of their cards, and do what the cards say."""

import hashlib
import json

import pytest
import torch

import mimdet
from mimdet.data.shapes import ShapesCOCO
from mimdet.models.checkpoint_files import SHIPPED, shipped

CARDS = json.loads((SHIPPED / "cards.json").read_text())


@pytest.mark.parametrize("name", CARDS)
def test_files_are_those_of_the_cards(name: str) -> None:
    path = SHIPPED / f"{name}.safetensors"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == CARDS[name]["sha256"]
    assert CARDS[name]["sha256"] in (SHIPPED / "README.md").read_text()


def test_all_have_a_card_and_are_small() -> None:
    assert set(shipped()) == set(CARDS)
    assert sum(path.stat().st_size for path in SHIPPED.glob("*.safetensors")) < 12e6


@pytest.mark.parametrize("name", ["tiny", "tiny_scratch"])
def test_ap_is_that_of_the_card(name: str) -> None:
    """On other machines sums are rounded otherwise, so a few detections near a threshold differ."""
    model = mimdet.load_detector(name)
    result = mimdet.evaluate(model, ShapesCOCO("shapes-v1-medium", 128, 200, "val"))
    assert 100 * result.box["AP"] == pytest.approx(CARDS[name]["box_ap"], abs=0.5)
    assert 100 * result.mask["AP"] == pytest.approx(CARDS[name]["mask_ap"], abs=0.5)


@pytest.mark.parametrize("name", ["tiny", "tiny_scratch"])
def test_the_encoder_tells_tokens_apart(name: str) -> None:
    """In a training that goes wrong it gives every token the same output; the detector then lives
    on the stem's tokens at places that were not sampled, and falls at ratio 1."""
    model = mimdet.load_detector(name)
    image = ShapesCOCO("shapes-v1-medium", 128, 1, "val")[0].image
    with mimdet.record(model, "backbone.encoder") as seen:
        mimdet.predict(model, image, sample_ratio=1.0)
    outputs = seen["backbone.encoder"][0]  # (L, D)
    assert outputs.std(dim=0).mean() > 0.2


def test_the_autoencoder_paints_what_it_does_not_see() -> None:
    """Better than the mean colour of the visible patches, on scenes it was not trained on."""
    from mimdet.models.mae import patchify
    from mimdet.models.rcnn import pad_and_normalise

    model = mimdet.load_mae_model("tiny_mae")
    scenes = ShapesCOCO("shapes-v1-medium", 128, 16, "val")
    images = [scenes[i].image for i in range(16)]
    large = [torch.nn.functional.interpolate(x[None].float(), 256)[0].byte() for x in images]
    batch = pad_and_normalise(large, torch.device("cpu")).tensors
    with torch.inference_mode():
        out = model(batch)
    patches = patchify(batch, 16)
    kept = out.sample.mask().flatten(1)[..., None]
    mean = (patches * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True)
    plain = ((patches - mean) ** 2).mean(2)[~kept[..., 0]].mean()
    assert out.loss < 0.5 * plain


def test_a_detector_starts_from_the_shipped_autoencoder(capsys) -> None:
    model = mimdet.build_detector(mimdet.presets.tiny())
    report = mimdet.load_mae(model, "tiny_mae")
    assert not report.missing and len(report.loaded) > 60
    assert "tiny_mae" in capsys.readouterr().out
