"""One contract, every combination: stem x sampler x fill x keep."""

import itertools

import pytest
import torch
from torch import Tensor

from mimdet.config import BackboneConfig
from mimdet.models.backbones import build_backbone
from mimdet.models.rcnn import FPN, PYRAMID, make_norm
from mimdet.models.sampling import SAMPLERS, Sampling
from mimdet.models.stem import STEMS

FILLS = ("stem", "mask_token")
KEEPS = ("valid", "padded")
HEIGHT, WIDTH = 128, 160
SIZES = [(128, 160), (96, 130)]  # the second image has padding below and on the right


def config(drop_path: float = 0.0, **settings: object) -> BackboneConfig:
    return BackboneConfig(
        embed_dim=32,
        depth=2,
        num_heads=2,
        decoder_dim=24,
        decoder_depth=2,
        decoder_heads=2,
        drop_path=drop_path,
        position_grid=5,
        **settings,  # type: ignore[arg-type]
    )


def weighted_sum(maps: dict[str, Tensor]) -> Tensor:
    """A scalar in which every value of every map has a weight of its own."""
    torch.manual_seed(5)
    return sum(((m * torch.randn_like(m)).sum() for m in maps.values()), torch.zeros(()))


@pytest.mark.parametrize(
    ("stem", "sampler", "fill", "keep"), list(itertools.product(STEMS, SAMPLERS, FILLS, KEEPS))
)
def test_contract_of_a_backbone_and_its_pyramid(
    stem: str, sampler: str, fill: str, keep: str
) -> None:
    backbone = build_backbone(config(stem=stem, sampler=sampler, decoder_fill=fill, keep=keep))
    maps = backbone(torch.randn(2, 3, HEIGHT, WIDTH), SIZES)
    assert list(maps) == ["c2", "c3", "c4", "c5"]
    assert {name: m.shape[1] for name, m in maps.items()} == backbone.channels
    assert [tuple(m.shape[2:]) for m in maps.values()] == [
        (HEIGHT // stride, WIDTH // stride) for stride in (4, 8, 16, 32)
    ]

    pyramid = FPN(backbone.channels, 16, make_norm("BN"))(maps)
    assert tuple(pyramid) == PYRAMID
    assert [tuple(m.shape) for m in pyramid.values()] == [
        (2, 16, 32, 40), (2, 16, 16, 20), (2, 16, 8, 10), (2, 16, 4, 5), (2, 16, 2, 3),
    ]  # fmt: skip
    assert torch.equal(pyramid["p6"], pyramid["p5"][:, :, ::2, ::2])

    weighted_sum(maps).backward()
    for name, parameter in backbone.named_parameters():
        if name in ("encoder.pos_embed", "decoder.pos_embed"):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("fill", FILLS)
def test_at_ratio_1_only_the_fill_learns_nothing(fill: str) -> None:
    """Every place is taken by an encoded token; the fill stays in the graph with gradient 0."""
    backbone = build_backbone(config(decoder_fill=fill, sample_ratio=1.0))
    weighted_sum(backbone(torch.randn(1, 3, HEIGHT, WIDTH), SIZES[:1])).backward()
    unused = {"decoder.fill.proj.weight", "decoder.fill.proj.bias", "decoder.fill.token"}
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert (parameter.grad.abs().max() == 0) == (name in unused), name


@pytest.mark.parametrize(("stem", "fill"), list(itertools.product(STEMS, FILLS)))
def test_checkpointing_changes_neither_result_nor_gradients(stem: str, fill: str) -> None:
    images = torch.randn(2, 3, HEIGHT, WIDTH)
    results = []
    for mode in ("on", "off"):
        torch.manual_seed(0)
        backbone = build_backbone(config(0.5, stem=stem, decoder_fill=fill, checkpointing=mode))
        loss = weighted_sum(backbone(images, SIZES))  # the same draws, also of drop path
        loss.backward()
        results.append((loss.detach(), [p.grad for p in backbone.parameters() if p.requires_grad]))
    (loss_on, gradients_on), (loss_off, gradients_off) = results
    torch.testing.assert_close(loss_on, loss_off)
    for on, off in zip(gradients_on, gradients_off, strict=True):
        torch.testing.assert_close(on, off, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_images_draw_does_not_depend_on_its_batch(sampler: str) -> None:
    backbone = build_backbone(config(sampler=sampler))
    tokens = torch.zeros(2, 80, 1)

    def draw(images: list[int]) -> list[list[int]]:
        generators = [torch.Generator().manual_seed(9 + i) for i in images]
        sizes = [SIZES[i] for i in images]
        sample = backbone.draw(tokens[images], (8, 10), sizes, Sampling(0.5, generators=generators))
        return [places.tolist() for places in sample.keep]

    assert draw([0, 1]) == draw([0]) + draw([1])
