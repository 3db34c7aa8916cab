"""What an autoencoder paints, as pictures: which pixels come from where, and on which grid."""

import pytest
import torch

import mimdet
from mimdet.models.mae import MAE
from mimdet.models.sampling import SAMPLERS, Sample
from mimdet.viz import draw_sample, fit_to_mae, paint, show_reconstruction
from mimdet.viz.reconstruction import native_side, whole_patches
from tests.small import little_mae, noise


@pytest.fixture(scope="module")
def mae() -> MAE:
    return little_mae(norm_pix_loss=False)


def test_pictures_come_from_the_image_where_seen_and_from_the_decoder_elsewhere(mae):
    image = noise(64, 48)
    got = paint(image, mae, Sample([torch.tensor([5, 0])], (4, 3)))
    kept = torch.zeros(12, dtype=torch.bool)
    kept[[0, 5]] = True
    kept = kept.view(4, 3).repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert torch.equal(got.pasted[:, kept], image[:, kept])
    assert torch.equal(got.pasted[:, ~kept], got.painted[:, ~kept])
    assert torch.equal(got.seen[:, kept], image[:, kept])
    assert (got.seen[:, ~kept] == 225).all()
    assert not torch.equal(got.painted[:, kept], image[:, kept])
    off = (got.painted.float() - image.float()).abs()
    assert torch.isclose(got.errors[1, 2], off[:, 16:32, 32:48].mean(), rtol=1e-5)


def test_loss_is_that_of_the_autoencoder_and_0_when_nothing_is_hidden(mae):
    image = noise(64, 64)
    sample = Sample([torch.arange(4)], (4, 4))
    mean = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
    deviation = torch.tensor([58.395, 57.12, 57.375])[:, None, None]
    with torch.no_grad():
        expected = mae(((image.float() - mean) / deviation)[None], sample=sample).loss
    assert paint(image, mae, sample).loss == pytest.approx(float(expected), rel=1e-6)
    assert paint(image, mae, Sample([torch.arange(16)], (4, 4))).loss == 0


def test_whole_patches_extend_right_and_below_and_keep_every_token_in_its_place():
    image = noise(40, 50)
    whole = whole_patches(image, (3, 4), 16)
    assert whole.shape == (3, 48, 64)
    assert torch.equal(whole[:, :40, :50], image)
    assert torch.equal(whole[:, :40, 63], image[:, :, 49])
    assert torch.equal(whole[:, 47, :50], image[:, 39, :])
    # Tokens of one grey level each stay themselves when a token becomes a patch of another size.
    levels = torch.arange(12, dtype=torch.uint8).view(3, 4) * 20
    flat = levels.repeat_interleave(16, 0).repeat_interleave(16, 1).expand(3, -1, -1).contiguous()
    small = whole_patches(flat, (3, 4), 8, token=16)
    assert small.shape == (3, 24, 32)
    assert torch.equal(small[0, 4::8, 4::8], levels)
    with pytest.raises(ValueError, match=r"40 x 50 .* grid of \(2, 4\)"):
        whole_patches(image, (2, 4), 16)
    with pytest.raises(ValueError, match="grid of"):
        whole_patches(image, (3, 5), 16)


def test_any_image_is_brought_to_the_size_the_autoencoder_knows(mae):
    assert native_side(mae) == 64
    fitted, grid = fit_to_mae(noise(100, 200), mae)
    assert (fitted.shape, grid) == ((3, 64, 128), (4, 8))
    for strip in (noise(1, 5000), noise(5000, 1)):
        fitted, grid = fit_to_mae(strip, mae)  # at most twice as long as its training images
        assert sorted(grid) == [1, 8] and show_reconstruction(strip, mae).axes
    fitted, grid = fit_to_mae(noise(100, 130), mae)  # 64 x 83 pixels touch 4 x 6 patches
    assert (fitted.shape, grid) == ((3, 64, 96), (4, 6))


def test_equal_seeds_draw_equal_patches(mae):
    fitted, grid = fit_to_mae(noise(64, 64), mae)
    samples = [draw_sample(mae, fitted, grid, 0.5, s, SAMPLERS["random"]) for s in (1, 1, 2)]
    one, same, other = (sample.keep[0].tolist() for sample in samples)
    assert len(one) == 8 and one == same and {*one} != {*other}


def test_figure_has_four_panels_an_image_and_says_what_was_seen(mae):
    fig = show_reconstruction([noise(64, 64), noise(64, 96)], mae, ratio=0.25)
    titles = [ax.get_title(loc="left") for ax in fig.axes]
    assert len(titles) == 8 and titles[1].startswith("painted (loss ")
    assert [titles[0], titles[4]] == ["seen: 4 of 16 patches", "seen: 6 of 24 patches"]
    assert fig.alt_text.startswith("Images through a masked autoencoder: seen: 4 of 16 patches;")
    with pytest.raises(ValueError, match="nothing to show"):
        show_reconstruction([], mae)
    with pytest.raises(ValueError, match="whole_patches"):
        paint(noise(60, 64), mae, Sample([torch.tensor([0])], (4, 4)))


def test_shipped_autoencoder_paints_better_than_grey():
    """Its held-out loss is 0.23 (the card); painting the mean colour of a scene costs three times
    as much."""
    mae = mimdet.load_mae_model("tiny_mae")
    scenes = mimdet.ShapesCOCO("shapes-v1-medium", length=4, split="val")
    losses, grey = [], []
    for i in range(4):
        fitted, grid = fit_to_mae(scenes[i].image, mae)
        got = paint(fitted, mae, draw_sample(mae, fitted, grid, 0.25, i, SAMPLERS["random"]))
        losses.append(got.loss)
        scaled = fitted.float() / torch.tensor([58.395, 57.12, 57.375])[:, None, None]
        grey.append(float(scaled.var(dim=(1, 2)).mean()))
    assert sum(losses) / 4 < 0.35
    assert sum(losses) < 0.5 * sum(grey)
