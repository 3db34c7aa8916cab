"""What a training will take, and where its time goes: by hand, and of real steps."""

import time

import pytest
import torch

from mimdet.analysis.cost import training_bytes, transformer_cost
from mimdet.config import Config
from mimdet.models.detector import build_detector, compile_parts
from mimdet.presets import mimdet_base
from mimdet.training import plan
from mimdet.training.plan import Card, Forecast, Pace, PeakMemory, fitting, forecast
from mimdet.training.profile import profile
from mimdet.viz import show_forecast, show_profile
from tests.small import small


def test_hours_price_and_advice_by_hand() -> None:
    pace = Pace(0.5, 36.0, 30.0, 2.0, 0.25, 3_000, 1_000, 2_500)
    found = Forecast("base", "a CPU", 8, 8, 1_000, 64, 4, 2.0, 0.5, paces=[pace])
    assert found.hours(pace) == pytest.approx(2.5)  # 36 s x 1,000 / 3,600 / 4
    assert "| 0.5 | 2 | 25 % | 3.00kB | 2.5 | 20.00 | +25 % |" in str(found)  # 4 x 2.5 h x 2
    said = [Card(8, kept, recomputed).advice(8) for kept, recomputed in ((8, 9), (2, 8), (2, 4))]
    assert said == ["off", "on", "on, batch_size=4"]
    assert Card(8, 3, 3).advice(8) == "off, batch_size=3"
    assert Card(8, 0, 0).advice(8) == "too small"


def test_what_fits_follows_from_the_count() -> None:
    cfg = mimdet_base()
    once, image = training_bytes(cfg, (800, 1344))
    card, little = fitting(cfg, 24, 2)
    assert once + card.kept * image <= 0.9 * 24e9 < once + (card.kept + 1) * image
    assert card.recomputed > card.kept > 0
    assert little == Card(2, 0, 0)  # weights and moments alone are 2 GB
    cfg.training.precision = "bf16"
    assert fitting(cfg, 24)[0].kept > card.kept  # half the bytes of most that is kept


def test_a_forecast_measures_steps_here_and_leaves_the_configuration_alone() -> None:
    cfg = small(600)
    cfg.training.freeze = ("neck",)
    before = repr(cfg)
    found = forecast(cfg, gpus=2, steps=2)
    assert repr(cfg) == before
    assert [pace.ratio for pace in found.paces] == [0.25, 0.5, 1]
    for pace in found.paces:
        assert pace.images_per_second * pace.step_seconds == pytest.approx(4)  # 2 x 2 a step
        assert min(pace.peak, pace.before, pace.counted) > 0
        assert found.hours(pace) == pytest.approx(pace.step_seconds * 600 / 3600 / 2)
    assert [card.gigabytes for card in found.cards] == list(plan.CARDS)
    assert "hours, 2 device(s)" in str(found) and "as if nothing were frozen" in str(found)
    assert "600 steps" in show_forecast(found).axes[0].get_title(loc="left")
    with pytest.raises(ValueError, match="gpus=0"):
        forecast(cfg, gpus=0)


def test_a_peak_that_is_over_is_seen() -> None:
    with PeakMemory() as memory:
        before = memory.now()
        held = torch.ones(64 << 20)  # 256 MiB
        time.sleep(0.1)
        del held
        time.sleep(0.1)
        assert memory.peak() > before + (200 << 20) and memory.now() < before + (100 << 20)


def test_a_recipe_without_files_is_measured_on_stand_ins() -> None:
    cfg = Config()
    cfg.data.source = "coco"
    copy, data, stand_in = plan.training_data(cfg)
    assert stand_in and data[0].image.shape == (3, 640, 640)
    assert (copy.detector.num_classes, cfg.detector.num_classes) == (12, 80)
    assert not plan.training_data(small())[2]


def test_a_profile_counts_every_part_once() -> None:
    cfg = small()
    cfg.data.short_sides, cfg.data.augment = (64,), "none"
    cfg.backbone.drop_path = 0.0
    found = profile(cfg, steps=1)
    parts = {part.name: part for part in found.parts}
    assert found.images == 2 and found.seconds == sum(p.seconds for p in found.parts) > 0
    # 16 tokens of an image, half of them kept, in two blocks; two images.
    assert parts["encoder"].multiply_adds == 2 * transformer_cost(8, 32, 2)
    others = ("backward", "optimiser")  # Muon multiplies matrices, too
    forward = sum(p.multiply_adds for p in found.parts if p.name not in others)
    assert 1.8 * forward < parts["backward"].multiply_adds < 2.1 * forward
    assert {"stem", "decoder", "FPN", "RPN", "mask head", "optimiser", "loading"} <= parts.keys()
    assert 0 < found.share_of_peak() < 1.5 and str(found).count("\n") == 3 + len(parts)
    assert len(show_profile(found).axes[0].patches) == len(parts)
    with pytest.raises(ValueError, match="steps=0"):
        profile(cfg, steps=0)


@pytest.mark.slow
def test_compiled_parts_give_equal_losses_and_gradients() -> None:
    cfg = small()
    cfg.detector.norm = "GN"
    torch.manual_seed(0)
    model = build_detector(cfg).train().double()  # rounding in single precision hides mistakes
    twin = build_detector(cfg).train().double()
    twin.load_state_dict(model.state_dict())
    compile_parts(twin)
    assert list(twin.state_dict()) == list(model.state_dict())
    data = plan.training_data(cfg)[1]
    for first in (0, 2):  # another image size would be compiled once for all
        records = [data[first], data[first + 1]]
        found = []
        for net in (model, twin):
            torch.manual_seed(1)
            losses = net([r.image for r in records], [r.target for r in records])
            net.zero_grad()
            sum(losses.values()).backward()
            found.append((losses, [p.grad for p in net.parameters() if p.grad is not None]))
        for name, value in found[0][0].items():
            torch.testing.assert_close(found[1][0][name], value, rtol=1e-9, atol=1e-12)
        for ours, theirs in zip(found[1][1], found[0][1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-11)
