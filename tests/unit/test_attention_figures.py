"""Figures of attention and positions: what is drawn where, and what is refused."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mimdet
from mimdet.models.sampling import Sample, Sampling
from mimdet.models.vit import sincos_table
from mimdet.viz import nearest_sampled, rollout, show_attention, show_positions, show_rollout
from mimdet.viz.attention import LITTLE, MUCH, UNKNOWN, overlay, rolled_out, share
from mimdet.viz.draw import UNSAMPLED
from mimdet.viz.record import Recording, record
from tests.small import little_mae, small

SAMPLE = Sample([torch.tensor([9, 2, 14, 5])], (4, 4))
BLOCKS = [f"backbone.encoder.blocks.{i}.attn" for i in range(2)]
DECODER = "backbone.decoder.blocks.0.attn"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return mimdet.build_detector(small()).eval()


@pytest.fixture(scope="module")
def image() -> Tensor:
    return mimdet.ShapesCOCO(size=64, length=1, split="val")[0].image


@pytest.fixture(scope="module")
def seen(model, image) -> Recording:
    with record(model, "backbone.*.attn") as recording:
        model.detect([image], sample=SAMPLE)
    return recording


def tokens(ax) -> np.ndarray:
    """The colours in the middles of the 4 x 4 tokens of a panel: (16, 3)."""
    pixels = np.asarray(ax.images[0].get_array())
    middles = ((np.arange(4) + 0.5) * len(pixels) / 4).astype(int)
    return pixels[middles][:, middles].reshape(16, 3).astype(int)


def titles(fig) -> list[str]:
    return [ax.get_title(loc="left") for ax in fig.axes]


# ------------------------------------------------------------------------------- attention


def test_a_panel_a_block_or_a_head(image, seen):
    fig = show_attention(image, seen, "backbone.encoder*", query=(3, 2))
    assert len(fig.axes) == 3
    mean = [seen.row(name, 14).mean(0) for name in BLOCKS]
    assert titles(fig) == [
        "encoder: 4 of 16 tokens",
        f"encoder block 0: ≤ {share(float(mean[0].max()))}",
        f"encoder block 1: ≤ {share(float(mean[1].max()))}",
    ]
    assert "mean of the heads, of the token in row 3, column 2" in fig.alt_text
    fig = show_attention(image, seen, BLOCKS[1], query=14, heads=True)
    highest = seen.row(BLOCKS[1], 14).amax(1).tolist()
    expected = [f"encoder block 1, head {i}: ≤ {share(highest[i])}" for i in range(2)]
    assert titles(fig)[1:] == expected
    fig = show_attention(image, seen, [BLOCKS[0], DECODER], query=14)
    heads = [title.split(":")[0] for title in titles(fig)[1:]]
    assert heads == ["encoder block 0", "decoder block 0"]


def test_the_query_is_framed_in_every_panel(image, seen):
    fig = show_attention(image, seen, "*", query=(3, 2))
    for ax in fig.axes:
        pixels = np.asarray(ax.images[0].get_array()).astype(int)
        rows, columns = (np.abs(pixels - [0xD5, 0x5E, 0]).sum(2) < 40).nonzero()
        token = len(pixels) / 4
        assert token * 2.9 < rows.min() < token * 3 < rows.max() < token * 4
        assert token * 1.9 < columns.min() < token * 2 and token * 3 < columns.max() < token * 3.1


def test_overlay_by_hand_and_unsampled_places_in_light_grey(image, seen):
    values = torch.tensor([[0.0, 0.5], [torch.nan, 0.125]])
    layer = overlay(values, high=0.5)  # the last is a quarter of it, its square root a half
    opacity = [LITTLE, MUCH, UNKNOWN, (LITTLE + MUCH) / 2]
    assert layer[..., 3].flatten().tolist() == [round(255 * a) for a in opacity]
    assert tuple(layer[1, 0, :3]) == UNSAMPLED
    assert tuple(layer[0, 1, :3]) == (253, 231, 37)  # the bright end of viridis
    hidden = [place for place in range(16) if place not in SAMPLE.keep[0].tolist()]
    for ax in show_attention(image, seen, BLOCKS[0], query=14).axes:
        grey = np.abs(tokens(ax) - UNSAMPLED).max(1) < 26  # opacity .9 over any colour
        assert np.flatnonzero(grey).tolist() == hidden
    decoder = show_attention(image, seen, DECODER, query=0)  # it sees every place
    assert not (np.abs(tokens(decoder.axes[1]) - UNSAMPLED).max(1) < 26).any()


def test_a_padded_image_stays_in_its_corner(model):
    image = mimdet.ShapesCOCO(size=64, length=1, split="val")[0].image[:, :40, :48]
    with record(model, BLOCKS[0]) as recording:
        model.detect([image], sampling=Sampling(1.0))
    assert recording.grid == (4, 4)
    fig = show_attention(image, recording, BLOCKS[0], query=0)
    assert titles(fig)[0] == "encoder: 9 of 16 tokens"
    assert tokens(fig.axes[0])[15].min() > 225  # padding, not kept


def test_what_is_refused(image, seen):
    for picture, names, query, said in (
        (image, BLOCKS[0], 13, "was not sampled"),
        (image, BLOCKS[0], (4, 0), r"query \(4, 0\) is not on the grid of 4 x 4"),
        (image, "blocks", 14, "no module 'blocks'"),
        (image.repeat(1, 2, 1), BLOCKS[0], 14, "as it was fed to the network"),
    ):
        with pytest.raises(ValueError, match=said):
            show_attention(picture, seen, names, query=query)


@pytest.mark.parametrize(("place", "nearest"), [(9, 9), (13, 9), (3, 2), (0, 5), (15, 14)])
def test_the_nearest_sampled_token(place, nearest):
    assert nearest_sampled(SAMPLE, place) == nearest


# ------------------------------------------------------------------------------- rollout


def test_rollout_after_each_block(image, seen):
    fig = show_rollout(image, seen, "backbone.encoder*", query=14)
    total = rollout([seen[name][0] for name in BLOCKS])
    own = float(total[2, 2])  # place 14 is the third of the sample
    assert titles(fig)[2] == f"encoder blocks 0-1: itself {share(own)}"
    first = float(rollout([seen[BLOCKS[0]][0]])[2, 2])
    assert titles(fig)[1] == f"encoder block 0: itself {share(first)}"
    assert own < first
    values, itself = rolled_out(seen, BLOCKS, 14)
    assert itself == own
    assert torch.equal(values.flatten()[SAMPLE.keep[0]], total[2])
    assert titles(fig)[2] in fig.alt_text
    with pytest.raises(ValueError, match="encoder and decoder see other tokens"):
        show_rollout(image, seen, "*", query=14)


def test_an_autoencoders_own_patches(image):
    mae = little_mae(patch=8)
    with torch.no_grad(), record(mae, "blocks.*.attn") as recording:
        mae(torch.rand(1, 3, 64, 64), sample=Sample([torch.tensor([9, 2, 63])], (8, 8)))
    fig = show_rollout(image, recording, "blocks.*", query=(7, 7))
    assert "row 7, column 7" in fig.alt_text
    assert titles(fig)[0] == "encoder: 3 of 64 tokens"


# ------------------------------------------------------------------------------- positions


def test_positions_stored_and_resized():
    fig = show_positions(sincos_table(32, 8), (6, 16), at=(0.5, 0.25))
    assert titles(fig) == ["along the row", "stored: 8 × 8", "resized: 6 × 16"]
    stored, resized, again = fig.axes[0].lines
    assert (len(stored.get_xdata()), len(resized.get_xdata())) == (8, 16)
    assert stored.get_xdata()[2] == resized.get_xdata()[4] == 0  # a quarter from the left
    for line in (stored, resized, again):
        assert max(line.get_ydata()) == pytest.approx(1)
    # An eighth of the width to the right: one place of the stored table, two of the resized.
    assert resized.get_ydata()[6] == pytest.approx(stored.get_ydata()[3], abs=0.03)
    assert again.get_ydata()[6] < stored.get_ydata()[3] - 0.05
    assert "8 x 8" in fig.alt_text


@pytest.mark.parametrize("shape", [(1, 16, 32), (2, 17, 32), (17, 32), (1, 1, 32)])
def test_no_table_is_refused(shape):
    with pytest.raises(ValueError, match="position table of shape"):
        show_positions(torch.zeros(shape), (4, 4))
    with pytest.raises(ValueError, match="at="):
        show_positions(sincos_table(32, 4), (4, 4), at=(1.0, 0.5))
