"""Stems, encoders, decoder, position tables: numbers by hand, timm, and what must not matter."""

import math
from functools import partial

import pytest
import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mimdet.models.baselines import (
    RelativePositionBias,
    WindowedEncoder,
    global_block_places,
    relative_index,
)
from mimdet.models.sampling import Sample, select
from mimdet.models.stem import STEMS, PatchStem
from mimdet.models.vit import (
    FEW_TOKENS,
    Decoder,
    Encoder,
    FewTokensAttention,
    MaskTokenFill,
    StemFill,
    init_like_mae,
    resize_table,
    sincos_table,
)

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


def test_patch_stem_is_a_matrix_product_of_patches_and_stems_halve_their_width_thrice() -> None:
    for make in STEMS.values():
        with pytest.raises(ValueError, match=r"embed_dim=36: .* multiple of 8"):
            make(36)
    stem, image = PatchStem(DIM), torch.randn(1, 3, 32, 48)
    patch = image[0, :, 16:32, 32:48].flatten()
    expected = stem.patchify.weight.flatten(1) @ patch + stem.patchify.bias
    torch.testing.assert_close(stem(image).tokens[0, :, 1, 2], expected, rtol=1e-4, atol=1e-5)


def test_encoder_equals_timm() -> None:
    sizes = {"img_size": (64, 96), "embed_dim": DIM, "depth": 3, "num_heads": 4}
    ends = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    norm = partial(nn.LayerNorm, eps=1e-5)
    vit = VisionTransformer(**sizes, **ends, norm_layer=norm).eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = encoder()
    ours.blocks.load_state_dict(vit.blocks.state_dict())
    ours.norm.load_state_dict(vit.norm.state_dict())
    tokens = torch.randn(2, LENGTH, DIM)

    encoded = torch.stack(ours(tokens, everything(2)))
    expected = vit.norm(vit.blocks(tokens + resize_table(ours.pos_embed, GRID)))
    torch.testing.assert_close(encoded, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [24, FEW_TOKENS + 1])
def test_attention_in_mixed_precision_is_timms_but_for_rounding(tokens: int) -> None:
    """Few tokens attend in float32 while they learn; many tokens, and all that is only looked at,
    give timm's own bits."""
    torch.manual_seed(0)
    timms, ours = Attention(DIM, 4, qkv_bias=True), FewTokensAttention(DIM, 4, qkv_bias=True)
    ours.load_state_dict(timms.state_dict())
    start = 4 * torch.randn(3, tokens, DIM)
    found = {}
    for name, layer in (("timm", timms), ("ours", ours), ("exact", timms)):
        x = start.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=name != "exact"):
            y = layer(x)
        y.float().square().sum().backward()
        found[name] = (y.detach().float(), x.grad)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(start), timms(start))
    assert torch.equal(ours(start), timms(start))  # in float32, learning or not
    for own, other, exact in zip(*(found[name] for name in ("ours", "timm", "exact")), strict=True):
        if tokens > FEW_TOKENS:
            assert torch.equal(own, other)
        else:
            assert not torch.equal(own, other)
            assert (own - exact).norm() < 1.1 * (other - exact).norm() < 0.05 * exact.norm()


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


def test_neither_dropped_tokens_nor_the_order_of_kept_ones_matter() -> None:
    made, sample = encoder(), half(1)
    (keep,) = sample.keep
    tokens, changed = torch.randn(2, 1, LENGTH, DIM)
    changed[0, keep] = tokens[0, keep]
    straight = made(tokens, sample)[0]
    assert torch.equal(straight, made(changed, sample)[0])
    order = torch.randperm(len(keep))
    permuted = made(tokens, Sample([keep[order]], GRID))[0]
    assert not torch.allclose(straight, permuted)
    torch.testing.assert_close(straight[order], permuted, rtol=1e-5, atol=1e-5)


def test_an_empty_sample_gives_the_stem_fill() -> None:
    """A brush that keeps nothing of one image: everything the decoder sees comes from the stem."""
    tokens = torch.randn(1, LENGTH, DIM)
    nothing = Sample([torch.zeros(0, dtype=torch.long)], GRID)
    encoded = encoder()(tokens, nothing)
    assert encoded[0].shape == (0, DIM)
    decoder = Decoder(DIM, 16, 1, 2, StemFill(DIM, 16))
    assert decoder(encoded, nothing, tokens).shape == (1, 16, *GRID)


@pytest.mark.parametrize("kind", [StemFill, MaskTokenFill])
def test_what_the_decoder_sees_by_hand(kind: type[StemFill]) -> None:
    """Depth 0: kept places hold embed(token), the others the fill, positions added to both."""
    decoder = Decoder(DIM, 16, 0, 2, kind(DIM, 16))
    decoder.norm = nn.Identity()  # type: ignore[assignment]
    for parameter in decoder.fill.parameters():
        nn.init.normal_(parameter)
    sample = Sample([torch.tensor([5, 2])], GRID)
    token, stem = torch.randn(2, DIM), torch.randn(1, LENGTH, DIM)
    with torch.inference_mode():
        seen = decoder([token], sample, stem)[0].flatten(1).T  # (L, C)
        fill = decoder.fill
        expected = fill.proj(stem)[0] if kind is StemFill else fill.token[0].repeat(24, 1)
        expected[5], expected[2] = decoder.embed(token)
    torch.testing.assert_close(seen, expected + resize_table(decoder.pos_embed, GRID)[0])


def test_initialisation_is_maes_and_drop_path_grows_linearly() -> None:
    decoder = Decoder(256, 128, 1, 4, MaskTokenFill(256, 128))
    decoder.apply(init_like_mae)
    bound = (6 / (256 + 128)) ** 0.5  # Xavier, uniform
    assert decoder.embed.weight.abs().max() <= bound
    assert decoder.embed.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert decoder.embed.bias.abs().max() == 0
    assert decoder.fill.token.std().item() == pytest.approx(0.02, rel=0.3)
    rates = [block.drop_path1.drop_prob for block in Encoder(8, 4, 1, drop_path=0.3).blocks[1:]]
    assert rates == pytest.approx([0.1, 0.2, 0.3])
    assert isinstance(Encoder(8, 4, 1, drop_path=0.3).blocks[0].drop_path1, nn.Identity)


def test_a_table_of_2x2_by_hand() -> None:
    # Four channels a coordinate: frequencies 1 and 1/100, sines before cosines.
    zero = [0.0, 0.0, 1.0, 1.0]
    one = [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]
    # MAE's class token; then the first half is the column, the second the row.
    expected = [[0.0] * 8, zero + zero, one + zero, zero + one, one + one]
    table = sincos_table(8, 2)
    assert table.shape == (1, 5, 8) and table.dtype == torch.float32
    torch.testing.assert_close(table[0], torch.tensor(expected))
    with pytest.raises(ValueError, match="divisible by 4, not 6"):
        sincos_table(6, 2)


def test_resizing_keeps_axes_apart() -> None:
    """A value that depends on the row alone still does so on a wide grid, and the other way; the
    stored grid is returned unchanged."""
    row, column = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    places = torch.stack([row, column], dim=-1).view(1, 16, 2)
    table = torch.cat([torch.full((1, 1, 2), 1e6), places], dim=1)  # class row: must not leak in
    assert torch.equal(resize_table(table, (4, 4)), table[:, 1:])
    resized = resize_table(table, (3, 8)).view(3, 8, 2)
    assert resized.abs().max() < 4
    for i in range(3):
        torch.testing.assert_close(resized[i, :, 0], resized[i, :1, 0].expand(8))
    for j in range(8):
        torch.testing.assert_close(resized[:, j, 1], resized[:1, j, 1].expand(3))
    assert (resized[:, 0, 0].diff() > 0).all() and (resized[0, :, 1].diff() > 0).all()


def test_resizing_is_bicubic_without_antialiasing() -> None:
    """By hand: PyTorch's cubic kernel (a = -0.75) halfway between 0, 0, 1, 1 and its neighbours."""
    table = torch.tensor([0.0, 0, 1, 1]).repeat(4)[None, :, None]  # a step from column 1 to 2
    resized = resize_table(torch.cat([torch.zeros(1, 1, 1), table], dim=1), (4, 2))
    half = torch.tensor([-0.09375, 0.59375, 0.59375, -0.09375])  # weights of the four neighbours
    left = (half * torch.tensor([0.0, 0, 0, 1])).sum()  # places -1, 0, 1, 2; the edge repeats
    right = (half * torch.tensor([0.0, 1, 1, 1])).sum()
    torch.testing.assert_close(resized.view(4, 2), torch.stack([left, right]).expand(4, 2))


def test_relative_positions_by_hand_and_global_blocks_at_the_ends_of_equal_parts() -> None:
    """Two rows of three: the index is (rows apart + 1) * 5 + columns apart + 2."""
    index = relative_index(2, 3)
    for a in range(6):
        for b in range(6):
            rows, columns = a // 3 - b // 3, a % 3 - b % 3
            assert index[a, b] == (rows + 1) * 5 + columns + 2
    for depth, count, places in ((12, 4, (2, 5, 8, 11)), (4, 4, (0, 1, 2, 3)), (6, 1, (5,))):
        assert global_block_places(depth, count) == places
    for depth, count in ((12, 5), (12, 0), (3, 4)):
        with pytest.raises(ValueError, match=f"global_blocks={count} cannot be spread evenly"):
            global_block_places(depth, count)


@pytest.mark.parametrize("grid", [(5, 2), (2, 2), (7, 3)])
def test_bias_of_another_grid(grid: tuple[int, int]) -> None:
    """A table that rises with the rows apart still does after resizing; no offset stays at 0."""
    bias = RelativePositionBias(3, 1)
    rising = torch.arange(-2.0, 3).repeat_interleave(5)[:, None]  # 5 x 5 offsets
    bias.relative_position_bias_table.data = rising
    values = bias(grid)[0]
    h, w = grid
    assert values.shape == (h * w, h * w)
    torch.testing.assert_close(values.diagonal(), torch.zeros(h * w), atol=1e-6, rtol=0)
    down = values.unflatten(0, (h, w)).unflatten(2, (h, w))[:, 0, 0, 0]  # from the first place
    assert (down.diff() > 0).all()
    torch.testing.assert_close(values, -values.T)


def reached(encoder: WindowedEncoder, grid: tuple[int, int]) -> list[Tensor]:
    """Which places of each map change when the first token does: one (h, w) bool a map."""
    x = torch.randn(1, 16, *grid, dtype=torch.float64)
    moved = x.clone()
    moved[:, :, 0, 0] += torch.randn(16)
    with torch.no_grad():
        pairs = zip(encoder(x), encoder(moved), strict=True)
        return [((a - b).abs() > 1e-9).any(dim=1)[0] for a, b in pairs]


def test_a_token_reaches_its_window_first_and_all_others_by_global_blocks() -> None:
    torch.manual_seed(0)
    encoder = WindowedEncoder(16, 4, 2, 0.0, 6, window_size=4, global_blocks=2).double().eval()
    assert all(m.all() for m in reached(encoder, (6, 6)))
    encoder.blocks[1] = torch.nn.Identity()  # the first global block
    encoder.blocks[1].forward = lambda x, attn_mask=None: x  # type: ignore[method-assign]
    first_map, second_map = reached(encoder, (6, 6))
    window = torch.zeros(6, 6, dtype=torch.bool)
    window[:4, :4] = True
    assert torch.equal(first_map, window)
    assert second_map.all()
