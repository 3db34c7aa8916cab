"""AttentionExplorer: each control changes what it says it changes, and nothing fails on a click."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mimdet
from mimdet.viz import record as recording
from mimdet.viz.attention import overlay
from mimdet.viz.draw import from_data_url
from mimdet.viz.record import record
from tests.small import small

AttentionExplorer = pytest.importorskip(
    "mimdet.viz.widgets.attention_explorer", reason="ipywidgets and anywidget are not installed"
).AttentionExplorer


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    cfg = small()
    cfg.data.test_short_side = 128  # 8 x 8 tokens
    return mimdet.build_detector(cfg)


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    scenes = mimdet.ShapesCOCO(size=64, length=2, split="val")
    return [scenes[i].image for i in range(2)]


@pytest.fixture
def panel(model, images):
    return AttentionExplorer(model, images)


def tokens_of(canvas) -> np.ndarray:
    """Colour of the middle of every token of a picture, (h, w, 3)."""
    picture = np.asarray(from_data_url(canvas.picture).convert("RGB"))
    side = picture.shape[0] // canvas.rows
    return picture[side // 2 :: side, side // 2 :: side].astype(int)


# ------------------------------------------------------------------------------- what is shown


def test_it_shows_the_attention_of_the_query(model, images, panel):
    name = "backbone.encoder.blocks.1.attn"
    with record(model, name) as seen:  # the same run through the whole detector
        mimdet.predict(model, images[0], sample_ratio=0.25, seed=0)
    place = panel.picture.selected
    kept = seen.sample.keep[0].tolist()
    assert place in kept  # something is to be seen at once
    assert panel.picture.dropped == [p for p in range(64) if p not in kept]
    row = seen.row(name, place).mean(0)
    values = seen.on_grid(name, row)
    assert np.abs(tokens_of(panel.map) - composed(panel, values)).max() <= 1.5
    assert "Encoder block 1, mean of the heads" in panel.status.value
    assert f"equal shares would be {100 / len(kept):.1f} %" in panel.status.value
    assert panel.map.selected == place
    colours = tokens_of(panel.map).reshape(-1, 3)
    assert (np.ptp(colours[panel.picture.dropped], axis=1) <= 2).all()  # light grey
    assert (np.ptp(colours[kept], axis=1) > 2).all()


def composed(panel, values: Tensor) -> np.ndarray:
    """What the map must show in the middle of its tokens: the overlay on the grey picture."""
    layer = overlay(values, float(values.nan_to_num(0).max())).astype(float)
    grey = np.asarray(from_data_url(panel.picture.picture).convert("RGB")).mean(2, keepdims=True)
    side = len(grey) // panel.map.rows
    below = grey[side // 2 :: side, side // 2 :: side]
    opacity = layer[..., 3:] / 255
    return opacity * layer[..., :3] + (1 - opacity) * below


def test_a_click_in_either_picture_moves_the_query(panel):
    kept = [p for p in range(64) if p not in panel.picture.dropped]
    panel.picture.selected = kept[0]
    first = panel.map.picture
    assert panel.map.selected == kept[0]
    panel.map.selected = kept[1]
    assert panel.picture.selected == kept[1]
    assert panel.map.picture != first


def test_a_token_that_was_not_sampled_is_explained(panel):
    hidden = panel.picture.dropped[0]
    panel.picture.selected = hidden
    assert "not sampled" in panel.status.value
    assert "Error" not in panel.status.value
    assert "never saw" in panel.label
    panel.head.value = 1
    panel.part.value = "decoder"  # which has blocks and heads of its own
    assert "Decoder block 0" in panel.status.value
    assert list(panel.block.options) == [0]
    assert panel.head.value == "mean" and len(panel.head.options) == 3
    panel.part.value = "encoder"
    assert "not sampled" in panel.status.value and panel.block.value == 1
    panel.ratio.value = 1.0
    assert "Encoder block 1" in panel.status.value
    assert panel.picture.dropped == []


def test_rollout_says_what_stays_and_a_picture_may_have_padding(panel):
    panel.rollout.value = True
    assert "Rollout up to encoder block 1" in panel.status.value
    assert "of itself" in panel.status.value
    most = panel.status.value.split("goes to ")[1].split(";")[0]
    row, column = divmod(panel.picture.selected, 8)
    assert most != f"row {row}, column {column}"
    panel.add(torch.randint(0, 255, (3, 40, 90), dtype=torch.uint8), "wide.png")
    assert (panel.picture.rows, panel.picture.columns) == (8, 18)  # 128 x 288, 32-pixel padding
    assert panel.picture.selected < 8 * 18
    assert "Error" not in panel.status.value


# ------------------------------------------------------------------------------- how it runs


def test_only_the_backbone_runs_once_per_picture_ratio_and_seed(model, panel):
    calls: list[str] = []
    encoder = model.backbone.encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    heads = model.rpn.register_forward_hook(lambda *_: calls.append("heads"))
    try:
        panel.block.value = 0
        panel.head.value = 1
        panel.rollout.value = True
        assert calls == []
        panel.ratio.value = 1.0
        assert calls == ["encoder"]
        panel.part.value = "decoder"
        panel.part.value = "encoder"
        assert calls == ["encoder"] * 2
    finally:
        encoder.remove()
        heads.remove()


def test_large_grids_keep_one_row_and_have_no_rollout(panel, monkeypatch):
    before = panel.map.picture
    monkeypatch.setattr(recording, "LIMIT_GIB", 0.0)
    panel.seed.value = 1
    panel.seed.value = 0
    assert panel.map.picture == before  # one row gives the same picture
    panel.rollout.value = True
    assert "rollout needs whole maps" in panel.status.value
    panel.rollout.value = False
    assert panel.map.picture == before
