"""Looking inside: what `record` gives is what the model computed, and the model stays as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mimdet
from mimdet import presets
from mimdet.models.sampling import Sample, Sampling
from mimdet.viz import attention_names, rollout
from mimdet.viz import record as module
from mimdet.viz.record import record
from tests.small import little_mae, small

ENCODER = "backbone.encoder.blocks.0.attn"
DECODER = "backbone.decoder.blocks.0.attn"
GRID = (4, 4)  # of an image of 64 pixels


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return mimdet.build_detector(small()).eval()


@pytest.fixture(scope="module")
def image() -> Tensor:
    return mimdet.ShapesCOCO(size=64, length=1, split="val")[0].image


def of(*places: int) -> Sample:
    return Sample([torch.tensor(places)], GRID)


ALL = of(*range(16))
SOME = of(9, 2, 14, 5)


# ------------------------------------------------------------------------------- the numbers


def attention_by_hand(attention: Any, x: Tensor) -> Tensor:
    """softmax(q k / sqrt(width)) from the block's own weights: (B, N, D) -> (B, heads, N, N)."""
    q, k, _ = attention.qkv(x).chunk(3, dim=2)  # (B, N, D) each
    heads = attention.num_heads
    q, k = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k))  # (B, heads, N, D / heads)
    logits = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[3] ** 0.5
    return logits.exp() / logits.exp().sum(dim=3, keepdim=True)


@pytest.mark.parametrize("sample", [ALL, SOME], ids=["all", "some"])
@pytest.mark.parametrize("name", [ENCODER, "backbone.encoder.blocks.1.attn", DECODER])
def test_attention_is_the_softmax_of_the_blocks_own_weights(model, image, sample, name):
    norm = name.replace("attn", "norm1")  # what the attention is given
    with record(model, name, norm) as seen:
        model.detect([image], sample=sample)
    with torch.no_grad():
        expected = attention_by_hand(model.get_submodule(name), seen[norm])
    tokens = 16 if "decoder" in name else len(sample.keep[0])
    assert seen[name].shape == (1, 2, tokens, tokens)
    torch.testing.assert_close(seen[name], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(seen[name].sum(3), torch.ones(1, 2, tokens), atol=1e-5, rtol=0)
    assert seen[name].std() > 1e-3  # not uniform: a wrong order would be seen


def test_detections_stay_the_same(image):
    """What runs with the plain formula of attention differs by rounding only."""
    trained = mimdet.load_detector("tiny")  # its scores differ enough to keep their order
    plain = trained.detect([image])[0]
    with record(trained, *attention_names(trained)):
        looked_at = trained.detect([image])[0]
    assert len(plain) == len(looked_at) > 0
    assert (plain.boxes - looked_at.boxes).abs().max() < 1e-2  # pixels
    assert (plain.scores - looked_at.scores).abs().max() < 1e-5


def test_outputs_are_copies_of_what_a_module_gave(model, image):
    with record(model, "backbone.stem", "backbone.encoder.norm", "backbone.encoder") as seen:
        model.detect([image], sample=SOME)
    assert seen["backbone.stem"]._fields == ("c2", "c3", "tokens")
    assert seen["backbone.stem"].tokens.shape == (1, 32, *GRID)
    assert torch.equal(seen["backbone.encoder.norm"][0], seen["backbone.encoder"][0])
    assert not seen["backbone.encoder"][0].requires_grad
    assert seen.attention == set()
    assert sorted(seen) == ["backbone.encoder", "backbone.encoder.norm", "backbone.stem"]
    # A recording in a training step keeps copies and does not cut the graph.
    model.zero_grad()
    batch = torch.rand(1, 3, 64, 64)
    with record(model, ENCODER) as seen:
        model.backbone(batch, [(64, 64)], Sampling(sample=ALL))["c4"].sum().backward()
    assert model.get_submodule(ENCODER).qkv.weight.grad.abs().sum() > 0
    assert not seen[ENCODER].requires_grad
    model.zero_grad()


# ------------------------------------------------------------------------------- left as it was


def test_everything_is_restored_after_an_exception(model, image):
    names = attention_names(model)
    model.get_submodule(names[0]).fused_attn = False  # a setting of the user's own
    before = {name: model.get_submodule(name).fused_attn for name in names}
    hooks = count_hooks(model)
    with pytest.raises(RuntimeError, match="in the middle"), record(model, *names, "backbone.stem"):
        assert not any(model.get_submodule(name).fused_attn for name in names)
        assert count_hooks(model) > hooks
        raise RuntimeError("in the middle")
    assert {name: model.get_submodule(name).fused_attn for name in names} == before
    assert set(before.values()) == {True, False}
    assert count_hooks(model) == hooks
    model.get_submodule(names[0]).fused_attn = True


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_recordings_may_lie_in_each_other_and_a_pattern_means_every_name_it_fits(model, image):
    with record(model, ENCODER) as outer:
        with record(model, ENCODER, query=9) as inner:
            model.detect([image], sample=SOME)
        assert not model.get_submodule(ENCODER).fused_attn
    assert model.get_submodule(ENCODER).fused_attn
    assert torch.equal(outer[ENCODER][:, :, 0], inner[ENCODER])
    with record(model, "backbone.encoder.blocks.*.attn", ENCODER) as seen:
        model.detect([image], sample=SOME)
    assert list(seen) == [ENCODER, "backbone.encoder.blocks.1.attn"]


# ------------------------------------------------------------------------------- names


def test_an_unknown_name_is_refused_and_what_was_not_recorded_is_said(model, image):
    said = r"no module 'backbone\.encoder\.block\.0\.attn'.*blocks\.0"
    with pytest.raises(ValueError, match=said), record(model, "backbone.encoder.block.0.attn"):
        pass
    with pytest.raises(ValueError, match="name at least one"), record(model):
        pass
    with record(model, ENCODER) as seen:
        pass
    with pytest.raises(KeyError, match="has the model run"):
        seen[ENCODER]
    with record(model, ENCODER) as seen:
        model.detect([image])
    with pytest.raises(KeyError, match="there is"):
        seen[DECODER]


# ------------------------------------------------------------------------------- on the grid


def test_a_row_of_a_sampled_encoder_lands_on_the_sampled_places(model, image):
    with record(model, ENCODER, DECODER) as seen:
        model.detect([image], sample=SOME)
    row = seen.row(ENCODER, query=14)
    assert torch.equal(row, seen[ENCODER][0, :, 2])  # place 14 is the third of the sample
    on_grid = seen.on_grid(ENCODER, row)
    assert on_grid.shape == (2, *GRID)
    sampled = torch.zeros(16, dtype=torch.bool)
    sampled[SOME.keep[0]] = True
    assert torch.equal(on_grid.flatten(1).isfinite(), sampled.expand(2, -1))
    for order, place in enumerate([9, 2, 14, 5]):
        assert torch.equal(on_grid[:, place // 4, place % 4], row[:, order])

    row = seen.row(DECODER, query=14)
    assert torch.equal(seen.on_grid(DECODER, row), seen[DECODER][0, :, 14].unflatten(1, GRID))


@pytest.mark.parametrize("name", [ENCODER, DECODER])
def test_one_query_is_the_row_of_the_whole_map(model, image, name):
    with record(model, name) as whole:
        model.detect([image], sample=SOME)
    with record(model, name, query=2) as one:
        model.detect([image], sample=SOME)
    assert one[name].shape == (1, 2, 4 if name == ENCODER else 16)
    assert torch.equal(one.row(name, 2), whole.row(name, 2))
    with pytest.raises(ValueError, match="only query 2 was recorded"):
        one.row(name, 9)


def test_an_unsampled_query_is_refused_in_the_encoder_only(model, image):
    said = "row 3, column 1 was not sampled"
    with pytest.raises(ValueError, match=said), record(model, ENCODER, query=13):
        model.detect([image], sample=SOME)
    assert model.get_submodule(ENCODER).fused_attn
    with record(model, ENCODER, DECODER) as seen:
        model.detect([image], sample=SOME)
    with pytest.raises(ValueError, match=said):
        seen.row(ENCODER, 13)
    assert seen.row(DECODER, 13).shape == (2, 16)
    for wrong in (16, -1):
        with pytest.raises(ValueError, match="not on the grid of 4 x 4"):
            seen.row(DECODER, wrong)


def test_images_of_one_batch_whose_unequal_numbers_of_tokens_are_several_calls(model, image):
    sample = Sample([torch.tensor([9, 2]), torch.tensor([1, 9])], GRID)
    with record(model, ENCODER) as seen:
        model.detect([image, image.flip(2)], sample=sample)
    with record(model, ENCODER, query=9) as one:
        model.detect([image, image.flip(2)], sample=sample)
    assert torch.equal(seen.row(ENCODER, 9, index=1), seen[ENCODER][1, :, 1])
    assert torch.equal(one.row(ENCODER, 9, index=1), seen[ENCODER][1, :, 1])
    assert torch.equal(one.row(ENCODER, 9, index=0), seen[ENCODER][0, :, 0])
    sample = Sample([torch.tensor([9, 2]), torch.tensor([1, 9, 3])], GRID)
    with record(model, ENCODER, DECODER) as seen:
        model.detect([image, image], sample=sample)
    assert [call.shape for call in seen.calls[ENCODER]] == [(1, 2, 2, 2), (1, 2, 3, 3)]
    with pytest.raises(ValueError, match="ran 2 times"):
        seen[ENCODER]
    assert seen.row(DECODER, 13, index=1).shape == (2, 16)
    with pytest.raises(ValueError, match="one image at a time"), record(model, ENCODER, query=9):
        model.detect([image, image], sample=sample)


# ------------------------------------------------------------------------------- memory


def test_more_memory_than_allowed_is_refused(model, image, monkeypatch):
    one_encoder, one_decoder = (2 * tokens**2 * 4 / 2**30 for tokens in (4, 16))
    monkeypatch.setattr(module, "LIMIT_GIB", 2 * one_encoder + one_decoder)
    with record(model, "backbone.*.attn") as seen:  # exactly as much as there is room for
        model.detect([image], sample=SOME)
    monkeypatch.setattr(module, "LIMIT_GIB", 2 * one_encoder + 0.99 * one_decoder)
    said = r"query=, or whole=True"
    with pytest.raises(ValueError, match=said), record(model, "backbone.*.attn"):
        model.detect([image], sample=SOME)
    with record(model, "backbone.*.attn", whole=True) as whole:
        model.detect([image], sample=SOME)
    assert torch.equal(whole[DECODER], seen[DECODER])
    with record(model, "backbone.*.attn", query=9) as row:
        model.detect([image], sample=SOME)
    assert torch.equal(row[DECODER], seen[DECODER][:, :, 9])
    # A long run must not fail at its end: blocks of one kind need equally much.
    monkeypatch.setattr(module, "LIMIT_GIB", 1.5 * 2 * 16**2 * 4 / 2**30)
    names = "backbone.encoder.blocks.*.attn"
    with pytest.raises(ValueError, match="2 blocks"), record(model, names) as seen:
        model.detect([image])
    assert len(seen) == 0


# ------------------------------------------------------------------------------- autoencoder


def test_an_autoencoder_has_a_class_token():
    mae = little_mae()
    sample = of(9, 2, 14)
    with torch.no_grad(), record(mae, "blocks.1.attn", "decoder_blocks.0.attn") as seen:
        mae(torch.rand(1, 3, 64, 64), sample=sample)
    encoder, decoder = seen["blocks.1.attn"], seen["decoder_blocks.0.attn"]
    assert encoder.shape == (1, 2, 4, 4)
    assert decoder.shape == (1, 2, 17, 17)
    assert torch.equal(seen.row("blocks.1.attn", 2), encoder[0, :, 2, 1:])
    assert torch.equal(seen.row("decoder_blocks.0.attn", 2), decoder[0, :, 3, 1:])
    on_grid = seen.on_grid("blocks.1.attn", seen.row("blocks.1.attn", 2))
    assert torch.equal(on_grid[:, 3, 2], encoder[0, :, 2, 3])  # place 14
    assert int(on_grid[0].isfinite().sum()) == 3
    with pytest.raises(ValueError, match="omit"), record(mae, "blocks.1.attn", query=2):
        pass


# ------------------------------------------------------------------------------- other models


@pytest.mark.parametrize("preset", ["tiny_vitdet", "tiny_swin", "tiny_benchmarking_vit"])
def test_baselines_give_maps_but_have_no_sample(preset, image):
    torch.manual_seed(0)
    baseline = mimdet.build_detector(getattr(presets, preset)()).eval()
    name = attention_names(baseline)[-1]
    with record(baseline, name, "backbone") as seen:
        baseline.detect([image])
    baseline.detect([image])
    sums = seen[name].sum(dim=-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-5, rtol=0)
    for look in (
        lambda: seen.row(name, 0),
        lambda: seen.on_grid(name, torch.zeros(16)),
        lambda: seen.position(name, 0),
    ):
        with pytest.raises(ValueError, match="encoder and decoder of MIMDet"):
            look()
    with pytest.raises(ValueError, match="query= needs"), record(baseline, name, query=0):
        pass


def test_a_backbone_or_a_decoder_alone(model, image):
    """What counts is where the attention is, not how its path begins."""
    tokens = torch.rand(1, 16, 32)
    decoder: Callable[..., Any] = model.backbone.decoder
    with torch.no_grad(), record(model.backbone.decoder, "blocks.0.attn") as seen:
        decoder([torch.rand(4, 32)], SOME, tokens)
    assert seen.row("blocks.0.attn", 13).shape == (2, 16)
    with torch.no_grad(), record(model.backbone, "encoder.blocks.0.attn") as seen:
        model.backbone(torch.rand(1, 3, 64, 64), [(64, 64)], Sampling(sample=SOME))
    assert seen.row("encoder.blocks.0.attn", 14).shape == (2, 4)


# ------------------------------------------------------------------------------- rollout


def test_rollout_of_two_tokens_by_hand():
    first = torch.tensor([[[0.5, 0.5], [0.0, 1.0]], [[0.7, 0.3], [0.4, 0.6]]])
    # mean of the heads: .6 .4 / .2 .8; with half of the token itself: .8 .2 / .1 .9
    second = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])  # with half of itself: .5 .5 / .5 .5
    torch.testing.assert_close(rollout([first]), torch.tensor([[0.8, 0.2], [0.1, 0.9]]))
    torch.testing.assert_close(rollout([first, second]), torch.tensor([[0.45, 0.55], [0.45, 0.55]]))
    # the other order: .8 * .5 + .2 * .5 and .1 * .5 + .9 * .5
    torch.testing.assert_close(rollout([second, first]), torch.full((2, 2), 0.5))


@pytest.mark.parametrize(
    ("maps", "said"),
    [
        ([], "at least one"),
        ([torch.rand(1, 2, 4, 4)], "one image"),
        ([torch.rand(2, 4)], "one image"),
        ([torch.rand(2, 4, 4), torch.rand(2, 16, 16)], "4 tokens.*16"),
    ],
)
def test_rollout_refuses_what_it_cannot_follow(maps, said):
    with pytest.raises(ValueError, match=said):
        rollout(maps)
