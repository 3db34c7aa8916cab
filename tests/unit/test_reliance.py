"""What a model relies on: exchanges by hand, and probes on tokens whose content is known."""

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mimdet
from mimdet import presets
from mimdet.analysis.reliance import (
    CHANGES,
    COLUMNS,
    ONE_TOKEN,
    Features,
    altered,
    features_of,
    image_side,
    linear_probe,
    object_tokens,
    reliance,
    share,
    token_rank,
    token_scale,
    tokens_inside,
    untrained,
)
from mimdet.images import Resize
from mimdet.models.detector import Detector, build_detector
from mimdet.models.mae import MAE
from mimdet.models.sampling import Sample, Sampling
from mimdet.structures import Crops, Record, Target
from mimdet.viz import show_reliance
from tests.small import little_mae, small, small_detector
from tools import measure_reliance

ALL = Sampling(1.0)
GRID = (4, 4)  # of an image of 64 pixels
HALF = [Sample([torch.tensor([5, 0, 9, 3, 12, 7, 8, 1])] * n, GRID) for n in range(3)]


@pytest.fixture(scope="module")
def model() -> Detector:
    return small_detector()


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    scenes = mimdet.ShapesCOCO(size=64, length=4, split="val")
    return [scenes.image(i) for i in range(4)]


def detected(model: Detector, images: Sequence[Tensor], sampling: Sampling = ALL) -> list[Tensor]:
    found = model.detect(images, sampling=sampling)
    return [part for one in found for part in (one.boxes, one.scores, one.labels)]


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@torch.no_grad()
def c4_of(model: Detector, images: Sequence[Tensor], sampling: Sampling = ALL) -> Tensor:
    return model.features(model.batch(images), sampling)["c4"]


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


# ------------------------------------------------------------------------------- altered

BASELINES = ["tiny_swin", "tiny_resnet", "tiny_vitdet", "tiny_benchmarking_vit"]


@pytest.mark.parametrize("place", ["c4", "encoder", "fill"])
def test_exchanging_nothing_changes_no_bit(model, images, place):
    sampling = Sampling(sample=HALF[2])
    before = detected(model, images[:2], sampling)
    with altered(model, place, lambda tokens: tokens):
        inside = detected(model, images[:2], sampling)
    assert equal(before, inside) and len(before[0]) > 5
    with altered(model, place, "zero"):
        assert not equal(before, detected(model, images[:2], sampling))
    assert equal(before, detected(model, images[:2], sampling))


@pytest.mark.parametrize("preset", BASELINES)
def test_exchanging_nothing_changes_no_bit_of_a_baseline(preset, images):
    torch.manual_seed(0)
    model = build_detector(getattr(presets, preset)()).eval()
    batch = model.batch(images[:2])
    with torch.no_grad():
        before = model.features(batch)
        with altered(model, "c4", lambda tokens: tokens):
            inside = model.features(batch)
        with altered(model, "c4", "zero"):
            zero = model.features(batch)
    assert all(torch.equal(before[level], inside[level]) for level in before)
    assert before["c4"].any() and not zero["c4"].any()
    assert zero["c5"].any() == (preset != "tiny_vitdet")  # whose c5 is c4 pooled
    with pytest.raises(ValueError, match="samples no tokens"), altered(model, "fill", "mean"):
        pass


def test_c4_of_zero_is_a_backbone_patched_by_hand(model, images, monkeypatch):
    with altered(model, "c4", "zero"):
        found = detected(model, images[:2])
    forward = model.backbone.forward

    def patched(*arguments: Any) -> dict[str, Tensor]:
        maps = forward(*arguments)
        return maps | {level: torch.zeros_like(maps[level]) for level in ("c4", "c5")}

    monkeypatch.setattr(model.backbone, "forward", patched)
    assert equal(found, detected(model, images[:2]))


def test_changes_of_c4_by_hand(model, images):
    c4 = c4_of(model, images[:2])
    changed = {}
    for change in CHANGES:
        with altered(model, "c4", change):
            changed[change] = c4_of(model, images[:2])
    assert torch.equal(changed["another"], c4.flip(0))
    mean = c4.mean((2, 3), keepdim=True).expand_as(c4)
    torch.testing.assert_close(changed["mean"], mean, atol=1e-6, rtol=0)
    draws = torch.Generator().manual_seed(0)
    for own, shuffled in zip(c4, changed["shuffled"], strict=True):
        order = torch.randperm(16, generator=draws)
        assert torch.equal(shuffled.flatten(1), own.flatten(1)[:, order])


def test_another_is_the_image_before_also_over_batches(model, images):
    c4 = [c4_of(model, [image])[0] for image in images]
    with altered(model, "c4", "another"):
        first = c4_of(model, images[:2])
        alone = c4_of(model, images[2:3])
        last = c4_of(model, [images[3], images[0]])
    found = [*first, *alone, *last]
    for own, source in zip(found, [1, 0, 1, 2, 3], strict=True):
        torch.testing.assert_close(own, c4[source], atol=1e-5, rtol=0)
    with altered(model, "c4", "another"), pytest.raises(ValueError, match="no other"):
        c4_of(model, images[:1])
    assert hooks_of(model) == 0
    # Of another size rows are repeated.
    wide = F.pad(images[0], (0, 64))  # 4 x 8 tokens
    with altered(model, "c4", "another"):
        c4_of(model, images[1:3])
        found = c4_of(model, [wide])[0].flatten(1)  # (C, 32)
    expected = c4_of(model, images[2:3])[0].flatten(1).repeat_interleave(2, 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_encoder_and_fill_are_what_the_decoder_gets(model, images):
    """c4 by the decoder's own parts, with the tokens exchanged by hand."""
    net, sample = model.backbone, HALF[2]
    batch = model.batch(images[:2])
    with torch.no_grad():
        tokens = net.stem(batch.tensors).tokens.flatten(2).transpose(1, 2)
        encoded = net.encoder(tokens, sample)
        by_hand = net.decoder(encoded[::-1], sample, tokens)
        with altered(model, "encoder", "another"):
            assert torch.equal(c4_of(model, images[:2], Sampling(sample=sample)), by_hand)
        by_hand = net.decoder(encoded, sample, tokens.flip(0))
        with altered(model, "fill", "another"):
            assert torch.equal(c4_of(model, images[:2], Sampling(sample=sample)), by_hand)
        mean = [own.mean(0, keepdim=True).expand_as(own) for own in encoded]
        with altered(model, "encoder", "mean"):
            found = c4_of(model, images[:2], Sampling(sample=sample))
        assert torch.equal(found, net.decoder(mean, sample, tokens))
    whole = c4_of(model, images[:2])
    with altered(model, "fill", "zero"):  # of which nothing is left at ratio 1
        assert torch.equal(c4_of(model, images[:2]), whole)


def test_hooks_are_gone_after_an_exception_and_unknown_words_are_refused(model):
    for place in ("c4", "encoder", "fill"):
        with pytest.raises(RuntimeError, match="inside"), altered(model, place, "mean"):
            assert hooks_of(model) == 1
            raise RuntimeError("inside")
    for words, said in (
        (("c5", "mean"), "place='c5': use one of c4"),
        (("c4", "none"), "change='none': use one of"),
    ):
        with pytest.raises(ValueError, match=said), altered(model, *words):
            pass
    assert hooks_of(model) == 0
    model = build_detector(small(), fill=lambda stem_tokens: stem_tokens)
    with pytest.raises(ValueError, match=r"plain function: make it an nn\.Module"):
        altered(model, "fill", "mean").__enter__()


# ------------------------------------------------------------------------------- the table


def test_the_table_holds_what_evaluations_give(model):
    scenes = mimdet.ShapesCOCO(size=64, length=5, split="val")
    table = reliance(model, scenes, (ONE_TOKEN, 1.0), fill_ratio=0.5, progress=False)
    changes = [f"{place}: {change}" for place in ("c4", "encoder", "fill") for change in CHANGES]
    assert list(table.index) == ["one token", "all tokens", *changes]
    assert list(table.columns) == list(COLUMNS)
    with altered(model, "fill", "shuffled"):
        found = mimdet.evaluate(model, scenes, sample_ratio=0.5)
    expected = [100 * found.box[column] for column in COLUMNS]
    assert table.loc["fill: shuffled"].tolist() == pytest.approx(expected, abs=0, nan_ok=True)
    assert table.attrs["data"] == scenes.version and table.attrs["images"] == 5
    assert hooks_of(model) == 0
    again = reliance(model, scenes, (1.0,), batch_size=2, progress=False)  # 2 + 2 + 1, not 4 + 1
    expected = pytest.approx(table.loc["c4: another"].tolist(), abs=0.01, nan_ok=True)  # rounding
    assert again.loc["c4: another"].tolist() == expected


def test_images_of_one_size_each_have_another(model):
    """The first batch holds one image: it takes the tokens of the last."""

    class Mixed(mimdet.ShapesCOCO):
        def image(self, index: int) -> Tensor:
            return F.pad(super().image(index), (0, 32 * index))

        def image_size(self, index: int) -> tuple[int, int]:
            return 64, 64 + 32 * index

    scenes = Mixed(size=64, length=3, split="val")
    table = reliance(model, scenes, (1.0,), progress=False)
    assert "c4: another" in table.index
    # A backbone without a sample has c4 alone.
    torch.manual_seed(0)
    cfg = presets.tiny_resnet()
    cfg.data.test_short_side = 64
    model = build_detector(cfg).eval()
    table = reliance(model, mimdet.ShapesCOCO(size=64, length=2, split="val"), progress=False)
    assert list(table.index) == ["all tokens", *[f"c4: {change}" for change in CHANGES]]


def test_figure_says_the_numbers_and_shares_are_words():
    words = ["one token", "10 % of tokens", "12.5 % of tokens", "all tokens"]
    assert [share(ratio) for ratio in (ONE_TOKEN, 0.1, 0.125, 1.0)] == words
    rows = {"all tokens": [40.0, 50.0, 30.0, math.nan], "c4: mean": [10.0, 49.0, 5.0, math.nan]}
    fig = show_reliance(pd.DataFrame.from_dict(rows, orient="index", columns=COLUMNS))
    assert [ax.get_title(loc="left") for ax in fig.axes][1:] == ["small", "medium", "large"]
    small_bars = fig.axes[1]
    assert [bar.get_width() for bar in small_bars.patches] == [50.0, 49.0]
    assert [text.get_text() for text in fig.axes[3].texts] == ["-", "-"]
    assert "all tokens 40.0, c4: mean 10.0" in fig.alt_text
    with pytest.raises(ValueError, match="columns AP, AP_small"):
        show_reliance(pd.DataFrame({"AP": [1.0]}))


# ------------------------------------------------------------------------------- tokens


def test_scale_by_hand(model, images):
    got = token_scale(model, images[:2])
    net = model.backbone
    with torch.no_grad():
        tokens = net.stem(model.batch(images[:2]).tensors).tokens.flatten(2).transpose(1, 2)
        positions = F.interpolate(  # the stored table of 16 x 16 at 4 x 4
            net.encoder.pos_embed[:, 1:].unflatten(1, (16, 16)).permute(0, 3, 1, 2),
            size=GRID,
            mode="bicubic",
        )
        positions = positions.flatten(2).transpose(1, 2).expand_as(tokens)
    for name, values in (("tokens", tokens), ("positions", positions)):
        assert got[name] == pytest.approx(float(values.std(correction=0)), rel=1e-3)
    assert got["sum"] == pytest.approx(float((tokens + positions).std()), rel=1e-3)
    resnet = build_detector(presets.tiny_resnet())
    with pytest.raises(ValueError, match="of this model there is c4"):
        token_scale(resnet, images[:1])


@pytest.mark.parametrize("directions", [1, 2, 4])
def test_the_rank_of_tokens_that_lie_in_a_few_directions(directions):
    """With equal variance in each of them the effective rank is their number."""
    corners = torch.tensor(list(product((-1.0, 1.0), repeat=directions)))  # uncorrelated
    basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))).Q
    tokens = (5 + corners @ basis[:directions]).T  # (8, 2 ** directions)
    maps = iter(tokens.tensor_split(2, dim=1))  # two images
    features = Features(Resize(16), lambda images: next(maps)[None, :, None])
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    assert token_rank(features, [image, image]) == pytest.approx(directions, rel=1e-5)


@pytest.fixture
def mae() -> MAE:
    return little_mae()


def test_tokens_of_a_detector_and_of_an_autoencoder(model, images, mae):
    assert torch.equal(features_of(model, "c4").tokens(images), c4_of(model, images))
    net, batch = model.backbone, model.batch(images)
    every = Sample([torch.arange(16)] * 4, GRID)
    with torch.no_grad():
        stem = net.stem(batch.tensors).tokens
        encoded = torch.stack(net.encoder(stem.flatten(2).transpose(1, 2), every))
    assert torch.equal(features_of(model, "stem").tokens(images), stem)
    found = features_of(model, "encoder").tokens(images)
    assert torch.equal(found.flatten(2).transpose(1, 2), encoded)
    model.train()
    assert torch.equal(features_of(model, "encoder").tokens(images), found)
    assert model.training
    model.eval()
    batch = mimdet.models.rcnn.pad_and_normalise(images, mae).tensors
    every = Sample([torch.arange(16)] * 4, GRID)
    with torch.no_grad():
        patches = mae.patch_embed(batch)
        encoded = mae.encode(patches.flatten(2).transpose(1, 2), every)[:, 1:]
    assert torch.equal(features_of(mae, "patch_embed").tokens(images), patches)
    found = features_of(mae, "encoder").tokens(images)
    assert torch.equal(found.flatten(2).transpose(1, 2), encoded)
    assert image_side(mae) == 64 and features_of(mae, "encoder").resize == Resize(64)
    with pytest.raises(ValueError, match="patch_embed, encoder"):
        features_of(mae, "c4")


def test_random_weights_are_those_of_a_fresh_model(model, mae):
    torch.manual_seed(5)
    fresh = build_detector(model.config).state_dict()
    state = torch.random.get_rng_state()
    copy = untrained(model, seed=5)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, fresh[name]) for name, value in copy.state_dict().items())
    other = untrained(mae, seed=5)
    shapes = {name: value.shape for name, value in mae.state_dict().items()}
    assert {name: value.shape for name, value in other.state_dict().items()} == shapes
    assert not torch.equal(other.patch_embed.proj.weight, mae.patch_embed.proj.weight)
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_dim": 32, "decoder_depth": 1}
    two_heads = MAE(64, decoder_heads=2, pixel_head=True, **sizes)
    assert untrained(two_heads).state_dict().keys() == two_heads.state_dict().keys()
    given = build_detector(small(), fill=lambda stem_tokens: stem_tokens)
    with pytest.raises(ValueError, match="fill of this detector was passed in"):
        untrained(given)


# ------------------------------------------------------------------------------- linear probe

CLASSES = 4


class Squares:
    """One square of 32 x 32 pixels an image of 64, its brightness 50 times its class plus 50."""

    def __init__(self, seed: int, length: int = 80) -> None:
        self.categories = [f"class {i}" for i in range(CLASSES)]
        draws = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, CLASSES, (length,), generator=draws)
        self.corners = 16 * torch.randint(0, 3, (length, 2), generator=draws)

    def __len__(self) -> int:
        return len(self.labels)

    def image_size(self, index: int) -> tuple[int, int]:
        return 64, 64

    def __getitem__(self, index: int) -> Record:
        image = torch.zeros(3, 64, 64, dtype=torch.uint8)
        x, y = self.corners[index].tolist()
        image[:, y : y + 32, x : x + 32] = 50 + 50 * int(self.labels[index])
        boxes = torch.tensor([[x, y, x + 32, y + 32]]).float()
        masks = Crops(boxes, torch.ones(1, 8, 8).byte())
        return Record(image, Target(boxes, self.labels[index : index + 1], masks), index)


def one_hot(images: Sequence[Tensor]) -> Tensor:
    """Tokens that hold the brightness at their centre, a channel a class."""
    value = torch.stack([image[0, 8::16, 8::16] for image in images]).long() // 50
    return F.one_hot(value.clamp(max=CLASSES), CLASSES + 1).permute(0, 3, 1, 2).float()


def noise(images: Sequence[Tensor]) -> Tensor:
    return torch.randn(len(images), 8, 4, 4)


@pytest.mark.parametrize("side", [64, 128])
def test_probe_finds_what_tokens_hold(side):
    features = Features(Resize(side), one_hot)
    assert linear_probe(features, Squares(0), Squares(1)) == 1.0


def test_probe_of_noise_is_chance_and_of_the_same_tokens_the_same():
    found = linear_probe(Features(Resize(), noise), Squares(0), Squares(1, 400))
    assert abs(found - 1 / CLASSES) < 4 * (3 / 16 / 400) ** 0.5  # 4 deviations of 400 guesses
    fixed = Features(Resize(), lambda images: torch.stack([i[:, ::16, ::16] for i in images]) / 9)
    first, again = (linear_probe(fixed, Squares(0), Squares(1)) for _ in range(2))
    assert first == again


def test_tokens_inside_by_hand_whose_mean_an_object_is():
    """Half of a token's square counts, less does not; without any, the centre of mass decides."""
    boxes = torch.tensor(
        [
            [0.0, 0, 25, 16],  # the first token and 9/16 of the second, but for a rounded corner
            [0.0, 0, 23, 16],  # the first, and 7/16 of the second
            [28.0, 28, 38, 38],  # 1/16 of the first of four tokens and 36/256 of the last
            [0.0, 0, 64, 64],  # of which the lower right 1/8 x 1/8 is the object
            [70.0, 70, 90, 90],  # outside
        ]
    )
    bitmaps = torch.ones(5, 8, 8, dtype=torch.uint8)
    bitmaps[3] = 0
    bitmaps[3, 7, 7] = 1
    inside = tokens_inside(Crops(boxes, bitmaps), GRID)
    assert [row.nonzero()[:, 0].tolist() for row in inside] == [[0, 1], [0], [10], [15], [15]]
    number = torch.arange(16.0).view(1, 1, 4, 4)  # a token's value is its place
    features = Features(Resize(), lambda images: number.expand(len(images), 1, 4, 4))
    data = Squares(0, 12)
    found, labels = object_tokens(features, data)
    columns, rows = (data.corners // 16).T
    assert torch.equal(found[:, 0], 4.0 * rows + columns + 2.5)  # of p, p + 1, p + 4, p + 5
    assert torch.equal(labels, data.labels) and found.dtype == torch.float64


def test_data_without_masks_are_refused():
    class Boxes(Squares):
        def __getitem__(self, index: int) -> Record:
            record = super().__getitem__(index)
            record.target.masks = None
            return record

    with pytest.raises(ValueError, match="image 0 has no masks"):
        linear_probe(Features(Resize(), one_hot), Boxes(0), Squares(1))


# ------------------------------------------------------------------------------- the tool


@pytest.fixture
def measure(monkeypatch, tmp_path) -> Callable[[str], Any]:
    """The tool on these weights; its report."""

    def call(source: str) -> Any:
        out = str(tmp_path / "report.json")
        words = ["measure_reliance.py", source, "--scenes", "3", "--out", out]
        monkeypatch.setattr("sys.argv", words)
        measure_reliance.main()
        return mimdet.files.read_json(out)

    return call


def test_one_command_makes_the_tables(measure, tmp_path, capsys):
    path = tmp_path / "detector.safetensors"
    mimdet.save_detector(build_detector(small()), path)
    report = measure(str(path))
    command = "python tools/measure_reliance.py detector.safetensors --scenes 3"
    assert report["command"] == command and report["about"]["images"] == 3
    assert set(report["box_ap"]["one token"]) == set(COLUMNS)
    assert list(report["probe"]) == list(report["token_rank"]) == ["stem", "encoder", "c4"]
    assert "c4: another" in capsys.readouterr().out
    with pytest.raises(ValueError, match="nothing is neither"):
        measure("nothing")


def test_the_command_knows_autoencoders(measure, tmp_path, mae):
    mimdet.save_mae(mae, tmp_path / "mae.safetensors")
    report = measure(str(tmp_path))
    assert list(report["probe"]) == ["patch_embed", "encoder"] and "box_ap" not in report
    assert set(report["token_scale"]["these weights"]) == {"tokens", "positions", "sum"}
