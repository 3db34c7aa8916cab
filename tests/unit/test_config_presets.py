"""Configurations survive json, typos are errors, and presets are what they say."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimdet.config import (
    Config,
    TrainingConfig,
    change,
    difference,
    flat,
    from_dict,
    load_config,
    save_config,
    set_field,
    to_dict,
)
from mimdet.models.detector import build_detector
from mimdet.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_fresh_each_time_and_survives_a_file(name: str, tmp_path: Path) -> None:
    cfg, other = PRESETS[name](), PRESETS[name]()
    assert cfg == other and cfg.preset == name
    for section in ("backbone", "detector", "data", "training"):
        assert getattr(cfg, section) is not getattr(other, section)
    cfg.training.seed = 17
    save_config(cfg, tmp_path / "config.json")
    again = load_config(tmp_path / "config.json")
    assert again == cfg
    assert isinstance(again.detector.anchor_sizes, tuple)  # json knows lists only


@given(st.floats(0, 1, exclude_min=True), st.integers(0, 10**9), st.text(max_size=20))
def test_round_trip_of_any_value(ratio: float, steps: int, path: str) -> None:
    cfg = Config()
    cfg.backbone.sample_ratio, cfg.training.steps, cfg.data.train_json = ratio, steps, path
    assert from_dict(json.loads(json.dumps(to_dict(cfg)))) == cfg
    part = {"training": {"steps": steps}}  # a file may leave fields out
    assert from_dict(part).training == TrainingConfig(steps=steps)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not json"),
        ("[1, 2]", "Expected `object`"),
        ('{"backbone": 3}', r"Expected `object`, got `int` - at `\$.backbone`"),
        ('{"training": {"steps": "3"}}', r"Expected `int`, got `str` - at `\$.training.steps`"),
        ('{"detector": {"anchor_sizes": [8, 1.5]}}', r"got `float` - at `\$.*anchor_sizes\[1\]`"),
        ('{"data": {"augment": "papr"}}', r"Invalid enum value 'papr' - at `\$.data.augment`"),
        ('{"optimizer": {}}', "Config has no field 'optimizer'; it has .'preset'"),
        ('{"backbone": {"sampel_ratio": 0.5}}', "no field 'backbone.sampel_ratio'; it has .*"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"other\.json is not a mimdet configuration: .*{said}"):
        load_config(path)


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    cfg = Config()
    cfg.training.steps = "3"  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"training\.steps"):
        save_config(cfg, tmp_path / "config.json")
    assert not list(tmp_path.iterdir())


def test_fields_are_assigned_and_a_typo_is_an_error() -> None:
    cfg = Config()
    set_field(cfg, "backbone.sample_ratio", 0.25)
    change(cfg.training, steps=3, seed=5)
    assert (cfg.backbone.sample_ratio, cfg.training.steps, cfg.training.seed) == (0.25, 3, 5)
    for section in (cfg, cfg.backbone, cfg.detector, cfg.data, cfg.training):
        with pytest.raises(AttributeError, match="sampel_ratio"):
            section.sampel_ratio = 0.5
        with pytest.raises(AttributeError, match="sampel_ratio"):
            change(section, sampel_ratio=0.5)
    for typo in ("backbone.sampel_ratio", "bakcbone.sample_ratio", "sample_ratio"):
        with pytest.raises(AttributeError, match=r"sampel_ratio|bakcbone|sample_ratio"):
            set_field(cfg, typo, 0.25)


def test_difference_names_the_fields_whose_names_are_unique() -> None:
    a, b = Config(), Config()
    assert difference(a, b) == []
    b.training.steps = 200
    b.detector.anchor_sizes = (16, 32)
    sizes = "detector.anchor_sizes: (32, 64, 128, 256, 512) -> (16, 32)"
    assert difference(a, b) == [sizes, "training.steps: 0 -> 200"]
    # The command line has one flat flag for every field.
    names = ["preset"] + [name.split(".")[1] for name in flat(Config()) if "." in name]
    assert len(names) > 60 and sorted(names) == sorted(set(names))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds_and_has_the_size_it_states(name: str) -> None:
    with torch.device("meta"):
        model = build_detector(PRESETS[name]())
    size = sum(p.numel() for p in model.parameters())
    stated = re.findall(r"\d{1,3}(?:,\d{3}){2}", PRESETS[name].__doc__ or "")
    if stated or name.startswith("mimdet"):
        assert stated == [f"{size:,}"]


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("mimdet")])
def test_published_recipes(name: str) -> None:
    """METHOD: 36 epochs of 64 images, half of the tokens in training, all of them at test time."""
    cfg = PRESETS[name]()
    assert cfg.training.batch_size * cfg.training.accumulate == 64
    assert cfg.training.epochs == 36 and cfg.training.steps == 0
    assert cfg.training.learning_rate == 8e-5 and cfg.training.weight_decay == 0.1
    assert [round(share * 36) for share in cfg.training.milestones] == [27, 33]
    assert (cfg.backbone.sample_ratio, cfg.backbone.sample_ratio_eval) == (0.5, 1.0)
    assert cfg.backbone.drop_path == (0.4 if "large" in name else 0.1)
    assert cfg.backbone.decoder_fill == ("mask_token" if "v1" in name else "stem")
