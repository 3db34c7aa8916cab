"""Feature maps as pictures: PCA by hand, what must not change it, and what figures say."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

import mimdet
from mimdet.models.detector import Detector
from mimdet.models.sampling import Sample
from mimdet.viz import (
    compare_pyramids,
    largest_difference,
    pyramid_of,
    show_channels,
    show_planes,
    show_pyramid,
)
from mimdet.viz.draw import UNSAMPLED
from mimdet.viz.features import (
    LEVELS,
    fit_basis,
    pale_dropped,
    pca_picture,
    strongest_channels,
)
from tests.small import noise

CROSS = torch.tensor([[[2.0, -2.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, -1.0]]])
"""(2, 2, 2): the points (2, 0), (-2, 0), (0, 1), (0, -1)."""


def random_map(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_pca_and_its_colours_by_hand() -> None:
    """Covariance of the cross: diag(8/4, 2/4), so the axes are those of the channels."""
    basis = fit_basis(CROSS)
    assert basis.mean.tolist() == [0, 0]
    torch.testing.assert_close(basis.axes, torch.tensor([[1.0, 0], [0, 1], [0, 0]]).double())
    torch.testing.assert_close(basis.explained, torch.tensor([0.8, 0.2, 0]).double())
    assert np.array_equal(pca_picture(CROSS + 5), pca_picture(CROSS))
    # The ends of the scale are the 2 % and 98 % quantiles: here 2 - 0.06 * 2 = 1.88 and 0.94.
    torch.testing.assert_close(basis.high, torch.tensor([1.88, 0.94, 0]).double())
    picture = pca_picture(CROSS)
    assert picture[0, 0].tolist() == [255, 128, 128]  # middle of green; blue has no direction
    assert picture[1, 1].tolist() == [128, 0, 128]


def test_a_basis_is_reused() -> None:
    """The same feature vector has the same colour, whatever else is in the map."""
    features = random_map(6, 4, 8)
    basis = fit_basis(features)
    part = pca_picture(features[:, :2], basis)
    assert np.array_equal(part, pca_picture(features, basis)[:2])
    assert not np.array_equal(part, pca_picture(features[:, :2]))


def test_a_basis_is_the_same_whatever_the_order_or_size_of_the_places() -> None:
    features = random_map(6, 4, 8)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    mixed = features.flatten(1)[:, order].unflatten(1, (8, 4))
    twice = torch.cat([features, features], dim=1)
    for other in (mixed, twice):
        torch.testing.assert_close(fit_basis(other).axes, fit_basis(features).axes)
    whole, half = fit_basis(features), fit_basis(features[:, :2], features[:, 2:])
    torch.testing.assert_close(whole.axes, half.axes)
    # The largest entry of an axis is positive, so mirrored data have mirrored coordinates.
    basis, mirrored = fit_basis(features), fit_basis(-features)
    largest = basis.axes.gather(1, basis.axes.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    torch.testing.assert_close(basis.axes, mirrored.axes)


def test_unsampled_places_are_grey_and_do_not_count() -> None:
    features = random_map(5, 3, 4)
    holes = torch.cat([features, torch.full((5, 1, 4), torch.nan)], dim=1)
    holes[0, 3, 0] = torch.inf
    picture = pca_picture(holes)
    assert np.array_equal(picture[:3], pca_picture(features))
    assert (picture[3] == UNSAMPLED).all()


@pytest.mark.parametrize("value", [0.0, 3.7, -1e6])
def test_a_constant_map_is_middle_grey(value: float) -> None:
    """So is a direction that a map has not: one channel has one colour."""
    basis = fit_basis(torch.full((4, 3, 3), value))
    assert basis.explained.tolist() == [0, 0, 0]
    assert (pca_picture(torch.full((4, 3, 3), value)) == 128).all()
    assert (pca_picture(random_map(1, 4, 4))[..., 1:] == 128).all()


def test_channels_by_variance_and_the_largest_difference() -> None:
    features = torch.stack([torch.tensor([[0.0, a]]) for a in (1.0, 3.0, 1.0, 2.0)])
    assert strongest_channels(features, 3) == [1, 3, 0]
    assert strongest_channels(features, 9) == [1, 3, 0, 2]
    fig = show_channels(features, count=2)
    assert [ax.get_title(loc="left").split(":")[0] for ax in fig.axes] == ["channel 1", "channel 3"]
    assert "channel 1: 0.0 to 3.0; channel 3: 0.0 to 2.0" in fig.alt_text
    reference = torch.tensor([1.0, -4.0])
    assert largest_difference(torch.tensor([1.5, -3.0]), reference) == 0.25
    assert largest_difference(reference, reference) == 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: largest_difference(torch.zeros(2, 1), torch.zeros(1, 2)), "differ"),
        (lambda: show_planes({}), "nothing to show"),
        (lambda: fit_basis(CROSS[None]), "one image"),
        (lambda: fit_basis(torch.full((2, 2, 2), torch.nan)), "finite"),
        (lambda: pca_picture(random_map(3, 2, 2), fit_basis(CROSS)), "has 2 channels"),
        (lambda: compare_pyramids({}), "nothing to show"),
    ],
)
def test_wrong_inputs_say_what_to_do(call: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()  # type: ignore[operator]


@pytest.fixture(scope="module")
def tiny() -> Detector:
    return mimdet.load_detector("tiny")


def test_a_pyramid_has_every_level(tiny: Detector) -> None:
    tiny.train()
    found = pyramid_of(tiny, noise(128, 150))  # 256 x 300 as fed, 256 x 320 with padding
    assert tiny.training and tiny.backbone.training
    assert tuple(found.image.shape) == (3, 256, 320)
    assert (found.image[:, :, 300:] == 0).all()
    assert tuple(found.maps) == LEVELS
    strides = {"c2": 4, "c3": 8, "tokens": 16, "c4": 16, "c5": 32}
    strides |= {f"p{level}": 2**level for level in range(2, 7)}
    for level, features in found.maps.items():
        assert tuple(features.shape[1:]) == (256 // strides[level], 320 // strides[level]), level


def test_a_pyramid_is_what_the_detector_computes_without_tokens_for_a_baseline(tiny) -> None:
    with mimdet.record(tiny, "backbone.decoder", "neck") as seen:
        mimdet.predict(tiny, noise(128, 128), sample_ratio=0.25, seed=3)
    found = pyramid_of(tiny, noise(128, 128), sample_ratio=0.25, seed=3)
    assert found.sample is not None and seen.sample is not None
    assert torch.equal(found.sample.keep[0], seen.sample.keep[0])
    torch.testing.assert_close(found.maps["c4"], seen["backbone.decoder"][0])
    torch.testing.assert_close(found.maps["p6"], seen["neck"]["p6"][0])
    assert list(found.only("p3", "c2")) == ["p3", "c2"]
    found = pyramid_of(mimdet.build_detector(mimdet.presets.tiny_resnet()), noise(128, 128))
    assert "tokens" not in found.maps and "c2" in found.maps
    assert found.sample is None


def test_dropped_tokens_turn_pale() -> None:
    """A grid of 2 x 2 tokens over an image of 32 x 24 as fed; the picture is twice as large."""
    sample = Sample([torch.tensor([0, 3])], (2, 2))
    black = np.zeros((64, 48, 3), np.uint8)
    pale = pale_dropped(black, sample, (32, 24))
    light = round(0.75 * UNSAMPLED[0])
    assert (pale[:32, :32] == 0).all() and (pale[32:, 32:] == 0).all()
    assert (pale[:32, 32:] == light).all() and (pale[32:, :32] == light).all()
    assert (black == 0).all()


def test_figures_of_pyramids() -> None:
    picture = noise(64, 96)
    maps = {"c2": random_map(8, 16, 24), "c3": random_map(4, 8, 12)}
    fig = show_pyramid(picture, maps)
    titles = [ax.get_title(loc="left") for ax in fig.axes]
    assert "c2: 8 × 16 × 24\nstride 4" in titles and "c3: 4 × 8 × 12\nstride 8" in titles
    assert "stride 8" in fig.alt_text
    assert any("3 colours: " in title for title in titles)


def pixels(fig: Figure) -> list[np.ndarray]:
    return [np.asarray(ax.images[0].get_array()) for ax in fig.axes]


def test_planes_on_one_scale() -> None:
    planes = {"weak": torch.tensor([[0.0, 1.0]]), "strong": torch.tensor([[0.0, 10.0]])}
    own, shared = show_planes(planes), show_planes(planes, shared=True)
    assert np.array_equal(*pixels(own)) and not np.array_equal(*pixels(shared))
    assert "weak, 0.0 to 1.0; strong" in own.alt_text


def test_comparison_shares_its_basis_in_what_both_have() -> None:
    features = random_map(6, 4, 4)
    two = {"a": {"c2": features}, "b": {"c2": features * 0.1}}
    own = pixels(compare_pyramids(two, shared=False))
    assert np.array_equal(own[0], own[1])  # each stretched over its own range
    shared = pixels(compare_pyramids(two))
    assert shared[1].std() < 0.3 * shared[0].std()
    two = {"a": {"c2": features, "c3": random_map(6, 2, 2)}, "b": {"c2": random_map(5, 4, 4)}}
    fig = compare_pyramids(two)  # widths differ: a basis each
    assert [ax.get_title(loc="left").split(":")[0] for ax in fig.axes] == ["a, c2", "b, c2"]
