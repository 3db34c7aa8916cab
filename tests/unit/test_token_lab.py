"""TokenLab: every control changes what it says, and both models get exactly the chosen tokens."""

import re

import pytest
import torch

import mimdet
from mimdet.analysis.cost import multiply_adds, transformer_cost
from mimdet.models.sampling import Sample
from mimdet.models.vit import Encoder
from tests.small import little_mae, noise, small_detector

pytest.importorskip("anywidget", reason='panels need pip install "mimdet[notebooks]"')
from mimdet.structures import Target
from mimdet.viz import TokenLab
from mimdet.viz.widgets.panel import ONE_TOKEN


@pytest.fixture(scope="module")
def models():
    return small_detector(), little_mae(32, 8, norm_pix_loss=False)


@pytest.fixture
def lab(models):
    return TokenLab(*models, images=[noise(64, 64), noise(64, 96, 1)])


def kept(lab: TokenLab) -> list[int]:
    return lab.sample.keep[0].tolist()


@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (70, 100)])
def test_a_token_covers_the_same_part_of_the_picture_in_both_models(models, rows, columns):
    """A token of one grey level each: the patch of 8 pixels has that level too."""
    lab = TokenLab(*models, images=[noise(rows, columns)])
    h, w = lab.canvas.rows, lab.canvas.columns
    assert lab.whole.shape == (3, 16 * h, 16 * w)
    assert lab.patches.shape == (3, 8 * h, 8 * w)
    coarse = torch.nn.functional.avg_pool2d(lab.whole.float(), 16)
    fine = torch.nn.functional.avg_pool2d(lab.patches.float(), 8)
    assert (coarse - fine).abs().max() < 4  # resizing blurs across the edges of tokens


def test_the_detector_gets_the_chosen_tokens_and_no_padding(models, monkeypatch):
    """64 x 100 pixels: 4 x 7 tokens of its own, on a batch padded to 4 x 8."""
    seen = []
    lab = TokenLab(*models, images=[noise(64, 100)])
    encode = lab.detector.backbone.encoder.forward
    noted = lambda tokens, sample: seen.append(sample) or encode(tokens, sample)  # noqa: E731
    monkeypatch.setattr(lab.detector.backbone.encoder, "forward", noted)
    lab.canvas.dropped = sorted({*range(28)} - {0, 6, 7, 27})
    assert seen[0].grid == (4, 8)
    assert seen[0].keep[0].tolist() == [0, 6, 8, 30]


def test_the_answer_is_that_of_the_models_themselves(models):
    image = noise(64, 64)
    lab = TokenLab(*models, images=[image])
    lab.canvas.dropped = sorted({*range(16)} - {1, 2, 11})
    expected = mimdet.predict(models[0], image, sample=Sample([torch.tensor([1, 2, 11])], (4, 4)))
    assert torch.equal(lab.found.boxes, expected.boxes)
    assert torch.equal(lab.found.scores, expected.scores)
    assert lab.painted.sample.keep[0].tolist() == [1, 2, 11]
    assert set(lab.milliseconds) == {"autoencoder", "detector"}


def test_one_model_is_enough_and_without_any_it_is_the_shipped_ones(models):
    lab = TokenLab(None, models[1], [noise(50, 100)])  # trained on 4 x 4 patches
    assert (lab.canvas.rows, lab.canvas.columns) == (4, 8)
    assert lab.found is None and lab.painted is not None and list(lab.milliseconds)
    lab = TokenLab(models[0], None, [noise(64, 64)])
    assert lab.painted is None and lab.found is not None
    lab = TokenLab(images=[noise(64, 64)])
    assert lab.painted is not None and lab.found is not None


@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_cost_by_hand_is_what_is_counted(tokens):
    with torch.device("meta"), torch.no_grad():  # where attention is counted, as in cost_of
        encoder = Encoder(dim=32, depth=3, heads=2, position_grid=4)
        sample = Sample([torch.arange(tokens)], (4, 4))
        counted = multiply_adds(lambda: encoder(torch.zeros(1, 16, 32), sample))
    assert transformer_cost(tokens, 32, 3) == counted
    # METHOD of the paper, ViT-B at 800 x 1280 pixels: 635, 244 and 103 G.
    giga = [round(transformer_cost(n, 768, 12) / 1e9) for n in (4000, 2000, 1000)]
    assert giga == [635, 244, 103]


def test_the_same_controls_draw_the_same_tokens_for_both_models(lab):
    first = kept(lab)
    now, whole = transformer_cost(4, 32, 2), transformer_cost(16, 32, 2)
    assert f"{now / 1e9:.3g} of {whole / 1e9:.3g} G" in lab.status.value
    lab.ratio.value = 0.5
    assert len(kept(lab)) == 8
    lab.ratio.value = 0.25
    assert kept(lab) == first and len(first) == 4
    lab.ratio.value = ONE_TOKEN
    assert len(kept(lab)) == 1 and "1 of 16" in lab.status.value
    lab.ratio.value, lab.sampler.value = 0.25, "grid"
    assert {place // 4 % 2 for place in kept(lab)} != {0, 1}, "every second row"
    assert lab.painted.sample.keep[0].tolist() == kept(lab)


def test_another_image_brings_its_own_grid(lab):
    lab.image.value = 1
    assert (lab.canvas.rows, lab.canvas.columns) == (4, 6)
    assert len(kept(lab)) == 6
    assert lab.canvas.size == (300, 200) == lab.painting.size == lab.detections.size


def test_the_truth_stands_beside_where_it_is_known(models):
    truth = [Target(torch.tensor([[8.0, 8, 40, 40]]), torch.tensor([0]))]
    lab = TokenLab(*models, images=[noise(64, 64)], targets=truth)
    assert lab.canvases[-1] is lab.truth and lab.truth.title == "truth: 1 object"
    lab.add(noise(64, 96), "mine.png")
    assert lab.truth.title == "no truth is known" and lab.truth.size == (300, 200)
    assert TokenLab(*models).truth.title.startswith("truth: ")  # drawn scenes bring their own
    assert TokenLab(None, models[1], [noise(64, 64)]).truth.title == ""
    with pytest.raises(ValueError, match="1 targets for 2 images"):
        TokenLab(*models, images=[noise(64, 64)] * 2, targets=truth)


def test_brush_takes_tokens_away_from_both_models_and_reset_brings_them_back(lab):
    drawn, picture = list(lab.canvas.dropped), lab.detections.picture
    lost = kept(lab)[0]
    lab.canvas.dropped = sorted([*drawn, lost])
    assert len(kept(lab)) == 3 and lost not in kept(lab)
    assert lab.painted.sample.keep[0].tolist() == kept(lab)
    expected = mimdet.predict(lab.detector, noise(64, 64), sample=lab.sample)
    assert torch.equal(lab.found.scores, expected.scores)
    assert "3 of 16" in lab.status.value
    assert "by hand 1 dropped, 0 brought back" in lab.status.value
    lab.reset.click()
    assert lab.canvas.dropped == drawn
    assert lab.detections.picture == picture
    assert "by hand" not in lab.status.value


def test_nothing_kept_is_said_and_the_models_are_not_asked(lab):
    before = lab.canvas.seq
    lab.canvas.dropped = list(range(16))
    assert "Nothing is kept" in lab.status.value
    assert lab.canvas.seq == before + 1
    lab.canvas.dropped = list(range(15))
    assert "1 of 16" in lab.status.value


def test_select_says_what_happened_to_a_token_without_asking_the_models(lab, monkeypatch):
    lab.tool.value = "select"
    assert lab.canvas.tool == "select"
    monkeypatch.setattr(lab, "_ask", lambda: pytest.fail("the tokens are the same"))
    lab.canvas.selected = 6
    fate = "kept" if 6 in kept(lab) else "left out"
    off = float(lab.painted.errors[1, 2])
    assert f"row 1, column 2: {fate}; painted {off:.0f} of 255" in lab.status.value
    assert lab.painting.selected == 6


def test_a_sampler_of_ones_own_is_in_the_list_and_its_shape_is_checked(models):
    own = {
        "last": lambda tokens, grid, generator: torch.arange(len(tokens)).float(),
        "wrong": lambda tokens, grid, generator: torch.zeros(3),
    }
    lab = TokenLab(*models, images=[noise(64, 64)], samplers=own)
    lab.sampler.value = "last"
    assert kept(lab) == [12, 13, 14, 15]
    lab.sampler.value = "wrong"
    assert re.search(r"ValueError.*returned scores of shape \(3,\).*\(16,\)", lab.status.value)
