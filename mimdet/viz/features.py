"""Feature maps as pictures: how strong, which colours, which channel; pyramids side by side.

A map is a float tensor (C, h, w). Places that are not finite (NaN where no token was sampled) take
no part in any statistic and are drawn in light grey.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mimdet.inference import device_of, generator_for
from mimdet.models.detector import Detector, autocast, evaluating
from mimdet.models.sampling import PATCH, Sample, Sampling
from mimdet.viz.draw import UNSAMPLED, Picture, Pixels, heat, show_rows, to_pixels
from mimdet.viz.record import record
from mimdet.viz.style import NotebookFigure

TAIL = 0.02
"""Share of the places beyond each end of a colour's scale, so that an outlier does not set it."""

# ------------------------------------------------------------------------------- numbers of a map


def norm_map(features: Tensor) -> Tensor:
    """(C, h, w) -> (h, w): the length of every place's feature vector."""
    return features.float().norm(dim=0)


def strongest_channels(features: Tensor, count: int) -> list[int]:
    """The channels that vary most over the places, most first; of equal ones the lower number."""
    variance = _places(features).var(dim=0, unbiased=False)
    return variance.sort(descending=True, stable=True).indices[:count].tolist()


class Basis(NamedTuple):
    """Three directions in a map's channels, and the scale of their colours. Made by `fit_basis`."""

    mean: Tensor
    """(C,) float64."""
    axes: Tensor
    """(3, C) float64: unit vectors, or zeros where the data have fewer directions."""
    explained: Tensor
    """(3,) share of the variance along each axis."""
    low: Tensor
    high: Tensor
    """(3,) each: the coordinates drawn as no and as full colour."""


def fit_basis(*maps: Tensor) -> Basis:
    """Principal components of the feature vectors of all places of one or several maps.

    maps: (C, h, w) with equal C. Axes are in order of falling variance, and each points so that its
    largest entry is positive, so two fits to the same numbers give the same colours. Fit once and
    pass the basis on to compare pictures: the same feature vector then has the same colour.
    Raises ValueError when no place is finite.
    """
    places = torch.cat([_places(features) for features in maps])  # (N, C) float64
    mean = places.mean(dim=0)
    covariance = (places - mean).T @ (places - mean) / len(places)
    variances, vectors = torch.linalg.eigh(covariance)  # rising
    axes = mean.new_zeros(3, len(mean))
    explained = mean.new_zeros(3)
    total = float(covariance.trace())
    # Below this, what is left is rounding, and its direction is noise.
    smallest = 1e-12 * max(total, float(mean.square().sum()))
    for i in range(min(3, len(mean))):
        if float(variances[-1 - i]) <= smallest:
            break
        axis = vectors[:, -1 - i]
        axes[i] = axis * axis[axis.abs().argmax()].sign()
        explained[i] = variances[-1 - i] / total
    coordinates = (places - mean) @ axes.T  # (N, 3)
    ends = torch.tensor(np.quantile(coordinates.numpy(), [TAIL, 1 - TAIL], axis=0))
    return Basis(mean, axes, explained, ends[0], ends[1])


def pca_picture(features: Tensor, basis: Basis | None = None) -> Pixels:
    """(C, h, w) -> uint8 (h, w, 3): the first three components as red, green, blue.

    Each colour is stretched over its own range, so the third looks as strong as the first:
    `basis.explained` says how much they really carry. basis: None = fitted to this map alone.
    """
    basis = basis or fit_basis(features)
    if len(features) != len(basis.mean):
        raise ValueError(f"the basis has {len(basis.mean)} channels, the map {len(features)}")
    places = features.cpu().double().permute(1, 2, 0)  # (h, w, C)
    span = basis.high - basis.low
    flat = span <= 1e-12 * basis.mean.norm().clamp(min=1e-300)  # no variation: middle grey
    scaled = ((places - basis.mean) @ basis.axes.T - basis.low) / span.where(~flat, 1)  # (h, w, 3)
    scaled = scaled.where(~flat, 0.5).nan_to_num(0).clamp(0, 1)
    pixels = (scaled * 255).round().to(torch.uint8).numpy()
    pixels[~places.isfinite().all(dim=2).numpy()] = UNSAMPLED
    return pixels


def largest_difference(now: Tensor, reference: Tensor) -> float:
    """The largest difference of two tensors over the largest value of the second: 1e-6 is rounding.

    Raises ValueError for unequal shapes, which would be compared after broadcasting.
    """
    if now.shape != reference.shape:
        raise ValueError(f"shapes {tuple(now.shape)} and {tuple(reference.shape)} differ")
    scale = float(reference.abs().max())
    return float((now - reference).abs().max()) / max(scale, 1e-12)


def _places(features: Tensor) -> Tensor:
    """(C, h, w) -> (N, C) float64: the feature vectors of the places that are finite."""
    if features.ndim != 3:
        raise ValueError(f"a map of shape {tuple(features.shape)}: give (C, h, w) of one image")
    places = features.detach().cpu().double().flatten(1).T
    places = places[places.isfinite().all(dim=1)]
    if not len(places):
        raise ValueError("no place of this map has finite numbers in all channels")
    return places


# ------------------------------------------------------------------------------- figures


def show_pyramid(image: Tensor, maps: Mapping[str, Tensor]) -> NotebookFigure:
    """The image, and for every level its principal components in colour above its norms.

    image: uint8 (3, H, W) that the maps belong to, with its padding; maps: level -> (C, h, w).
    """
    pixels = to_pixels(image)
    colours = [Picture("image", pixels)]
    norms = [Picture("below: norms\ndark = small", np.full_like(pixels, 255))]
    for level, features in maps.items():
        basis = fit_basis(features)
        shape = " × ".join(map(str, features.shape))
        stride = round(len(pixels) / features.shape[1])
        picture = pca_picture(features, basis)
        colours.append(Picture(f"{level}: {shape}\nstride {stride}", picture))
        norms.append(plane_of(f"{level}: {explained(basis)}\nnorm", norm_map(features)))
    what = "An image and its maps in the colours of a PCA"
    return show_rows(what, colours + norms, len(colours), len(colours), sharp=True)


def show_channels(features: Tensor, count: int = 12) -> NotebookFigure:
    """The `count` channels of a map (C, h, w) that vary most, each on its own scale."""
    numbers = strongest_channels(features, count)
    pictures = [plane_of(f"channel {n}:", features[n]) for n in numbers]
    what = f"The {len(numbers)} of {len(features)} channels that vary most"
    return show_rows(what, pictures, columns=6, sharp=True)


def show_planes(planes: Mapping[str, Tensor], shared: bool = False) -> NotebookFigure:
    """Planes of numbers (h, w) in a row as colours, NaN light grey: title -> plane.

    shared: one scale for all of them.
    """
    ends = scale_of(planes.values()) if shared else ()
    pictures = [plane_of(f"{name}\n", plane, *ends) for name, plane in planes.items()]
    what = "Planes of numbers as colours"
    return show_rows(what, pictures, len(pictures), widest=2.2, sharp=True)


def compare_pyramids(
    pyramids: Mapping[str, Mapping[str, Tensor]], shared: bool = True
) -> NotebookFigure:
    """A PCA of every map: one row a model (or ratio), one column a level that all of them have.

    pyramids: name -> level -> (C, h, w). shared: one PCA for all pictures of a column whose
    channels are equally many: needed to compare ratios of one model.
    Networks trained apart name their channels differently: there a shared PCA shows which of them
    varies more, not that equal colours mean the same.
    """
    first = next(iter(pyramids.values()), {})
    levels = [level for level in first if all(level in maps for maps in pyramids.values())]
    pictures = []
    for name, own in pyramids.items():
        for level in levels:
            features = own[level]
            title = f"{name}, {level}: {' × '.join(map(str, features.shape))}\n"
            others = [maps[level] for maps in pyramids.values()]
            alike = shared and all(len(other) == len(features) for other in others)
            basis = fit_basis(*others) if alike else fit_basis(features)
            pictures.append(Picture(title + explained(basis), pca_picture(features, basis)))
    return show_rows("Maps, a row each", pictures, len(levels), len(levels), 2.2, sharp=True)


def plane_of(
    title: str, values: Tensor, low: float | None = None, high: float | None = None
) -> Picture:
    """(h, w) numbers as colours; the ends of what is known are added to the title."""
    known = values[values.isfinite()]
    ends = f"{known.min():.1f} to {known.max():.1f}" if len(known) else "unknown"
    return Picture(f"{title} {ends}".replace("\n ", "\n"), heat(values, low, high))


def scale_of(planes: Iterable[Tensor]) -> tuple[float, float]:
    """Ends of the colours of several planes together."""
    values = torch.cat([plane[plane.isfinite()].float() for plane in planes])
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)


def explained(basis: Basis) -> str:
    return f"3 colours: {100 * float(basis.explained.sum()):.0f} %"


# ------------------------------------------------------------------------------- a detector's maps

LEVELS = ("c2", "c3", "tokens", "c4", "c5", "p2", "p3", "p4", "p5", "p6")
"""Every map of a detector, in the order they are made; "tokens" is what the stem hands on."""
PALE = 0.75  # share of light grey over a token that was dropped


@dataclass(slots=True)
class Pyramid:
    """One image and every map a detector makes of it."""

    image: Tensor
    """uint8 (3, H, W): resized as the detector wants it, padded with black to multiples of 32."""
    size: tuple[int, int]
    """(height, width) of the image before padding."""
    maps: dict[str, Tensor]
    """Level -> (C, h, w) float32 on the CPU, in the order of LEVELS."""
    sample: Sample | None = None
    """Which tokens the encoder saw; None for a backbone that sees all."""

    def only(self, *levels: str) -> dict[str, Tensor]:
        """The maps of these levels."""
        return {level: self.maps[level] for level in levels}


def pyramid_of(
    model: Detector, image: Tensor, *, sample_ratio: float | None = None, seed: int = 0
) -> Pyramid:
    """The maps c2..c5, tokens and p2..p6 of one image, uint8 (3, H, W), prepared as `predict` does.

    sample_ratio: None = the model's `sample_ratio_eval`; below 1 the tokens are drawn from `seed`.
    The model is run in evaluation mode and left in the mode it was in.
    """
    device = device_of(model)
    batch = model.prepare(image)
    generators = [generator_for(seed, device)]
    watched = "backbone.stem" if model.samples else "neck"
    with (
        evaluating(model),
        torch.inference_mode(),
        autocast(device, "auto"),
        record(model, watched) as seen,
    ):
        maps = model.features(batch, Sampling(sample_ratio, generators=generators))
        maps = {**maps, **model.neck(maps)}
    if model.samples:
        maps["tokens"] = seen[watched].tokens
    image = batch.images[0]
    height, width = batch.tensors.shape[2:]
    padded = F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]))
    ordered = {level: maps[level][0].float().cpu() for level in LEVELS if level in maps}
    return Pyramid(padded, batch.image_sizes[0], ordered, seen.sample)


def pale_dropped(pixels: Pixels, sample: Sample, size: tuple[int, int], index: int = 0) -> Pixels:
    """A picture of the image, the tokens that the encoder does not see faded to a light grey.

    pixels: uint8 (H, W, 3) of any size that shows the image as fed; size: (height, width) of that
    image in pixels, before padding or after, so that tokens fall on their places.
    """
    rows = (torch.arange(pixels.shape[0]) + 0.5) * size[0] / pixels.shape[0] / PATCH
    columns = (torch.arange(pixels.shape[1]) + 0.5) * size[1] / pixels.shape[1] / PATCH
    dropped = ~sample.mask()[index][rows.long()][:, columns.long()].numpy()  # (H, W)
    pale = pixels.copy()
    grey = pixels[dropped].mean(axis=1, keepdims=True)
    pale[dropped] = ((1 - PALE) * grey + PALE * np.array(UNSAMPLED)).round()
    return pale
