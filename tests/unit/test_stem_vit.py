"""Stems, encoder and decoder: counts by hand, timm's ViT, and what must not matter."""

from functools import partial

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mimdet.models.sampling import Sample, select
from mimdet.models.stem import STEMS, ConvStem, PatchStem
from mimdet.models.vit import Decoder, Encoder, MaskTokenFill, StemFill, init_like_mae, resize_table

GRID = (4, 6)
LENGTH = 24
DIM = 32


def everything(images: int) -> Sample:
    return Sample([torch.arange(LENGTH)] * images, GRID)


def half(images: int) -> Sample:
    return select(list(torch.rand(images, LENGTH)), [GRID] * images, GRID, 0.5)


def encoder(**settings: object) -> Encoder:
    """A small one with weights large enough that a mistake shows."""
    made = Encoder(DIM, depth=3, heads=4, position_grid=5, **settings).eval()  # type: ignore[arg-type]
    for parameter in made.blocks.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


# ------------------------------------------------------------------ stems


@pytest.mark.parametrize("name", STEMS)
def test_shapes_of_a_stem(name: str) -> None:
    c2, c3, tokens = STEMS[name](DIM)(torch.randn(2, 3, 64, 96))
    assert c2.shape == (2, DIM // 4, 16, 24)
    assert c3.shape == (2, DIM // 2, 8, 12)
    assert tokens.shape == (2, DIM, 4, 6)


@pytest.mark.parametrize("name", STEMS)
def test_a_stem_halves_its_width_three_times(name: str) -> None:
    with pytest.raises(ValueError, match=r"embed_dim=36: .* multiple of 8"):
        STEMS[name](36)


def test_parameters_of_the_base_stem_by_hand() -> None:
    convolutions = 9 * (3 * 96 + 96 * 192 + 192 * 384 + 384 * 768)
    norms = 2 * (96 + 192 + 384 + 768)
    last = 768 * 768 + 768
    count = sum(p.numel() for p in ConvStem(768).parameters())
    assert count == convolutions + norms + last == 4_079_712


def test_conv_stem_normalises_over_all_of_an_image() -> None:
    """One group: mean 0 and variance 1 over channels and places together, for each image."""
    stem = ConvStem(DIM)
    convolution, norm, _ = stem.stage1
    features = norm(convolution(torch.randn(2, 3, 32, 32)))
    assert features.mean(dim=(1, 2, 3)).abs().max() < 1e-5
    assert (features.var(dim=(1, 2, 3), unbiased=False) - 1).abs().max() < 1e-3
    assert convolution.bias is None and norm.eps == 1e-6


def test_patch_stem_is_a_matrix_product_of_patches() -> None:
    stem, image = PatchStem(DIM), torch.randn(1, 3, 32, 48)
    patch = image[0, :, 16:32, 32:48].flatten()
    expected = stem.patchify.weight.flatten(1) @ patch + stem.patchify.bias
    torch.testing.assert_close(stem(image).tokens[0, :, 1, 2], expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ encoder


def test_encoder_equals_timm() -> None:
    vit = VisionTransformer(
        img_size=(64, 96),
        embed_dim=DIM,
        depth=3,
        num_heads=4,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    ).eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = encoder()
    ours.blocks.load_state_dict(vit.blocks.state_dict())
    ours.norm.load_state_dict(vit.norm.state_dict())
    tokens = torch.randn(2, LENGTH, DIM)

    encoded = torch.stack(ours(tokens, everything(2)))
    expected = vit.norm(vit.blocks(tokens + resize_table(ours.pos_embed, GRID)))
    torch.testing.assert_close(encoded, expected, rtol=1e-5, atol=1e-5)


def test_an_image_alone_equals_the_image_in_a_batch() -> None:
    """Same tokens and positions; the neighbours have other counts, some have the same."""
    made = encoder()
    tokens = torch.randn(4, LENGTH, DIM)
    keep = [torch.randperm(LENGTH)[:count] for count in (7, 24, 7, 1)]
    with torch.inference_mode():
        together = made(tokens, Sample(keep, GRID))
        assert [tuple(e.shape) for e in together] == [(len(places), DIM) for places in keep]
        for i in range(4):
            alone = made(tokens[i : i + 1], Sample(keep[i : i + 1], GRID))[0]
            torch.testing.assert_close(alone, together[i], rtol=0, atol=1e-5)


def test_what_is_not_kept_does_not_matter() -> None:
    made, sample = encoder(), half(1)
    tokens = torch.randn(1, LENGTH, DIM)
    changed = torch.randn(1, LENGTH, DIM)
    changed[0, sample.keep[0]] = tokens[0, sample.keep[0]]
    assert torch.equal(made(tokens, sample)[0], made(changed, sample)[0])


def test_the_order_of_kept_tokens_does_not_matter() -> None:
    made, tokens, sample = encoder(), torch.randn(1, LENGTH, DIM), half(1)
    order = torch.randperm(len(sample.keep[0]))
    shuffled = Sample([sample.keep[0][order]], GRID)
    straight, permuted = made(tokens, sample)[0], made(tokens, shuffled)[0]
    assert not torch.allclose(straight, permuted)
    torch.testing.assert_close(straight[order], permuted, rtol=1e-5, atol=1e-5)


def test_positions_reach_the_tokens() -> None:
    """Equal tokens at two places differ after the encoder."""
    encoded = encoder()(torch.zeros(1, LENGTH, DIM), everything(1))[0]
    assert (encoded[0] - encoded[1]).abs().max() > 1e-2


def test_drop_path_grows_linearly() -> None:
    rates = [block.drop_path1.drop_prob for block in Encoder(8, 4, 1, drop_path=0.3).blocks[1:]]
    assert rates == pytest.approx([0.1, 0.2, 0.3])
    assert isinstance(Encoder(8, 4, 1, drop_path=0.3).blocks[0].drop_path1, nn.Identity)


def test_an_empty_sample_gives_the_stem_fill() -> None:
    """A brush that keeps nothing of one image: everything the decoder sees comes from the stem."""
    tokens = torch.randn(1, LENGTH, DIM)
    nothing = Sample([torch.zeros(0, dtype=torch.long)], GRID)
    encoded = encoder()(tokens, nothing)
    assert encoded[0].shape == (0, DIM)
    assert Decoder(DIM, 16, 1, 2, StemFill(DIM, 16))(encoded, nothing, tokens).shape == (
        1,
        16,
        *GRID,
    )


# ------------------------------------------------------------------ decoder


def decoders() -> tuple[Decoder, Decoder]:
    """Version 2 and version 1 with all shared weights equal."""
    v2 = Decoder(DIM, 16, 2, 2, StemFill(DIM, 16), position_grid=5)
    token = MaskTokenFill(DIM, 16)
    nn.init.normal_(token.token)
    v1 = Decoder(DIM, 16, 2, 2, token, position_grid=5)
    left_over = v1.load_state_dict(v2.state_dict(), strict=False)
    assert left_over.missing_keys == ["fill.token"]
    assert left_over.unexpected_keys == ["fill.proj.weight", "fill.proj.bias"]
    return v2, v1


def decode(decoder: Decoder, sample: Sample, encoded: list[Tensor], stem: Tensor) -> Tensor:
    with torch.inference_mode():
        return decoder(encoded, sample, stem)


def test_both_fills_are_equal_when_every_token_is_kept() -> None:
    v2, v1 = decoders()
    stem, encoded = torch.randn(2, LENGTH, DIM), list(torch.randn(2, LENGTH, DIM))
    c4 = decode(v2, everything(2), encoded, stem)
    assert c4.shape == (2, 16, *GRID)
    assert torch.equal(c4, decode(v1, everything(2), encoded, stem))


def test_fills_differ_below_ratio_1_and_only_v2_sees_the_stem() -> None:
    v2, v1 = decoders()
    sample, encoded = half(1), [torch.randn(LENGTH // 2, DIM)]
    one, other = torch.randn(2, 1, LENGTH, DIM)
    assert not torch.allclose(decode(v2, sample, encoded, one), decode(v1, sample, encoded, one))
    assert not torch.allclose(decode(v2, sample, encoded, one), decode(v2, sample, encoded, other))
    assert torch.equal(decode(v1, sample, encoded, one), decode(v1, sample, encoded, other))


@pytest.mark.parametrize("kind", [StemFill, MaskTokenFill])
def test_what_the_decoder_sees_by_hand(kind: type[StemFill]) -> None:
    """Depth 0: kept places hold embed(token), the others the fill, positions added to both."""
    decoder = Decoder(DIM, 16, 0, 2, kind(DIM, 16))
    decoder.norm = nn.Identity()  # type: ignore[assignment]
    sample = Sample([torch.tensor([5, 2])], GRID)
    token, stem = torch.randn(2, DIM), torch.randn(1, LENGTH, DIM)
    seen = decode(decoder, sample, [token], stem)[0].flatten(1).T  # (L, C)

    fill = decoder.fill
    expected = fill.proj(stem)[0] if kind is StemFill else fill.token[0].repeat(24, 1)
    expected = expected.detach().clone()
    expected[5], expected[2] = decoder.embed(token).detach()
    torch.testing.assert_close(seen, expected + resize_table(decoder.pos_embed, GRID)[0])


# ------------------------------------------------------------------ both


def test_initialisation_is_maes() -> None:
    decoder = Decoder(256, 128, 1, 4, MaskTokenFill(256, 128))
    decoder.apply(init_like_mae)
    bound = (6 / (256 + 128)) ** 0.5  # Xavier, uniform
    assert decoder.embed.weight.abs().max() <= bound
    assert decoder.embed.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert decoder.embed.bias.abs().max() == 0
    assert decoder.fill.token.std().item() == pytest.approx(0.02, rel=0.3)


def test_every_layer_norm_has_the_detectors_epsilon() -> None:
    """1e-5, while MAE and timm's default have 1e-6: too close for any output to tell."""
    for part in (Encoder(8, 2, 1), Decoder(8, 8, 2, 1, StemFill(8, 8))):
        norms = [module for module in part.modules() if isinstance(module, nn.LayerNorm)]
        assert [norm.eps for norm in norms] == [1e-5] * 5


def test_position_tables_are_stored_but_not_trained() -> None:
    for part in (Encoder(8, 1, 1), Decoder(8, 8, 1, 1, StemFill(8, 8))):
        assert "pos_embed" in part.state_dict() and not part.pos_embed.requires_grad
        assert part.pos_embed.shape == (1, 2501, 8)


def test_checkpointing_recomputes_the_same_drop_path() -> None:
    gradients = []
    tokens = torch.randn(3, LENGTH, DIM)
    made = encoder(drop_path=0.5).train()
    for mode in ("on", "off", "auto"):
        made.checkpointing = mode
        made.zero_grad()
        torch.manual_seed(3)
        torch.stack(made(tokens, everything(3))).square().sum().backward()
        gradients.append([p.grad for p in made.parameters() if p.grad is not None])
    for others in gradients[1:]:
        assert len(others) == len(gradients[0]) == 3 * 12 + 2
        for a, b in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
