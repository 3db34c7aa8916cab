"""What a masked autoencoder paints from the patches it sees: as pictures, and as a figure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mimdet.images import resize_image, shortest_edge, to_rgb
from mimdet.inference import generator_for
from mimdet.models.mae import MAE, Reconstruction
from mimdet.models.rcnn import pad_and_normalise, to_uint8
from mimdet.models.sampling import SAMPLERS, Grid, Sample, Sampler, draw
from mimdet.viz.draw import UNSAMPLED, Picture, image_size, show_rows, to_pixels
from mimdet.viz.style import NotebookFigure

LONGEST = 2.0
"""A photo's long side is at most so many times the side the autoencoder was trained on."""


@dataclass(frozen=True, slots=True)
class Painted:
    """One image through a masked autoencoder. Pictures are uint8 (3, h * patch, w * patch)."""

    seen: Tensor
    """The kept patches; the others are light grey."""
    painted: Tensor
    """What the decoder predicts, everywhere."""
    pasted: Tensor
    """The prediction with the kept patches pasted over it."""
    loss: float
    """Mean squared error over the patches that were not kept, as in pre-training; 0 without any."""
    errors: Tensor
    """(h, w): mean absolute error of each patch of `painted`, in grey levels of 0..255."""
    sample: Sample


def paint(image: Tensor, mae: MAE, sample: Sample) -> Painted:
    """Reconstruct an image of whole patches from exactly the patches of `sample`.

    image: uint8 (3, h * patch, w * patch) with (h, w) = sample.grid, see `whole_patches`. Raises
    ValueError when it does not fit the sample.
    """
    height, width = image_size(image)
    side = mae.patch_size
    if (height, width) != (sample.grid[0] * side, sample.grid[1] * side):
        raise ValueError(
            f"an image of {height} x {width} pixels is not a grid of {sample.grid} patches of "
            f"{side}: fit it with whole_patches(image, {sample.grid}, {side})"
        )
    pixels = _normalised(image, mae)
    with torch.inference_mode():
        output = mae(pixels, sample=sample.to(pixels.device))
        parts: Reconstruction = mae.reconstruct(pixels, output)
    pictures = {name: to_uint8(part[0]) for name, part in parts._asdict().items()}
    off = (pictures["painted"].float() - image.cpu().float()).abs().mean(0)  # (H, W)
    errors = F.avg_pool2d(off[None, None], side)[0, 0]
    seen = sample.mask()[0].repeat_interleave(side, 0).repeat_interleave(side, 1)  # (H, W)
    visible = torch.where(seen.cpu(), pictures["visible"], UNSAMPLED[0])
    painted, pasted, own = pictures["painted"], pictures["pasted"], sample.to(torch.device("cpu"))
    return Painted(visible, painted, pasted, float(output.loss), errors, own)


def whole_patches(image: Tensor, grid: Grid, patch: int, token: int | None = None) -> Tensor:
    """uint8 (3, H, W) -> (3, h * patch, w * patch): the image as `grid` = (h, w) whole patches.

    token: pixels of a patch's side in `image` (default: patch). The image is first extended at the
    right and at the bottom, by repeating its edge, to whole patches of that side; then it is
    resized when the two differ. So a patch covers the same part of the picture before and after.
    """
    token = token or patch
    height, width = image_size(image)
    right, below = grid[1] * token - width, grid[0] * token - height
    if not (0 <= right < token and 0 <= below < token):
        raise ValueError(
            f"an image of {height} x {width} pixels does not touch a grid of {grid} patches of "
            f"{token} pixels, all of them"
        )
    extended = F.pad(image[None].float(), (0, right, 0, below), mode="replicate")[0]
    return resize_image(extended.to(torch.uint8), (grid[0] * patch, grid[1] * patch))


def native_side(mae: MAE) -> int:
    """Pixels of the square images an autoencoder was trained on."""
    return round((mae.pos_embed.shape[1] - 1) ** 0.5) * mae.patch_size


def fit_to_mae(image: Tensor, mae: MAE) -> tuple[Tensor, Grid]:
    """Any image at the size the autoencoder knows: uint8 (3, h * patch, w * patch), and (h, w).

    The short side becomes that of its training images; the aspect ratio stays.
    """
    side, patch = native_side(mae), mae.patch_size
    resized = resize_image(to_rgb(image), shortest_edge(*image_size(image), side, LONGEST * side))
    height, width = image_size(resized)
    grid = -(-height // patch), -(-width // patch)
    return whole_patches(resized, grid, patch), grid


def draw_sample(
    mae: MAE, image: Tensor, grid: Grid, ratio: float, seed: int, sampler: Sampler
) -> Sample:
    """Score the autoencoder's own patch embeddings with a sampler and keep the best."""
    tokens = patch_tokens(image, mae)[None]
    generators = [generator_for(seed, tokens.device)]
    return draw(sampler, tokens, [grid], grid, ratio, generators=generators)


def patch_tokens(image: Tensor, mae: MAE) -> Tensor:
    """An image of whole patches -> their embeddings (L, D)."""
    with torch.inference_mode():
        return mae.patch_embed(_normalised(image, mae))[0].flatten(1).T


def _normalised(image: Tensor, mae: MAE) -> Tensor:
    """uint8 (3, H, W) -> (1, 3, H, W) as the autoencoder takes it."""
    height, width = image_size(image)
    return pad_and_normalise([image], mae).tensors[:, :, :height, :width]


def show_reconstruction(
    images: Tensor | Sequence[Tensor], mae: MAE, ratio: float = 0.25, *, seed: int = 0
) -> NotebookFigure:
    """A row an image: the patches seen, what is painted, seen pasted over painted, the original.

    images: uint8 (3, H, W), one or several, of any size; each is resized to what the autoencoder
    was trained on. ratio: share of the patches KEPT, drawn at random from `seed` + the row. Raises
    ValueError for no image.
    """
    pictures = []
    for i, image in enumerate([images] if isinstance(images, Tensor) else images):
        fitted, grid = fit_to_mae(image, mae)
        own = draw_sample(mae, fitted, grid, ratio, seed + i, SAMPLERS["random"])
        row = paint(fitted, mae, own)
        panels = {
            f"seen: {len(own.keep[0])} of {grid[0] * grid[1]} patches": row.seen,
            f"painted (loss {row.loss:.3f})": row.painted,
            "seen, pasted over painted": row.pasted,
            "original": fitted,
        }
        pictures += [Picture(title, to_pixels(part)) for title, part in panels.items()]
    return show_rows("Images through a masked autoencoder", pictures)


def show_pictures(pictures: Mapping[str, Tensor]) -> NotebookFigure:
    """Pictures, uint8 (3, H, W), in rows under their titles. Raises ValueError without any."""
    return show_rows("Pictures", [Picture(title, to_pixels(p)) for title, p in pictures.items()])
