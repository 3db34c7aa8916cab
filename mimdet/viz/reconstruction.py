"""What a masked autoencoder paints from the patches it sees: as pictures, and as a figure."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mimdet.analysis.cost import transformer_cost
from mimdet.images import Resize, resize_image, shortest_edge, to_rgb
from mimdet.inference import generator_for, run_detector
from mimdet.models.mae import MAE, Reconstruction
from mimdet.models.rcnn import pad_and_normalise, to_uint8
from mimdet.models.sampling import (
    PATCH,
    SAMPLERS,
    Grid,
    Sample,
    Sampler,
    Sampling,
    draw,
    padded_places,
    token_grid,
)
from mimdet.structures import Detections
from mimdet.viz.draw import UNSAMPLED, Picture, image_size, show_rows, to_pixels
from mimdet.viz.style import NotebookFigure

if TYPE_CHECKING:
    from mimdet.models.detector import Detector


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


# ------------------------------------------------------------------------- two models, one grid

Result = TypeVar("Result")


class View(NamedTuple):
    """An image as both models are given it."""

    resized: Tensor
    """uint8 (3, H, W): the detector's input, before padding."""
    grid: Grid
    """(h, w): the tokens of 16 pixels that it touches."""
    patches: Tensor | None
    """uint8 (3, h * patch, w * patch): the same tokens as patches of the autoencoder."""
    whole: Tensor
    """uint8 (3, 16 h, 16 w): the image extended to whole tokens."""
    padded: Grid
    """The grid of the detector's batch, of which this one is the upper left part."""


class Answer(NamedTuple):
    """What the models made of a set of tokens."""

    painted: Painted | None
    found: Detections | None
    """In the pixels of `View.resized`."""
    milliseconds: dict[str, float]
    """By model."""


class SameTokens:
    """A detector and an autoencoder on one grid of tokens.

    A detector's token is 16 x 16 pixels of its resized image. The same image, extended at the right
    and the bottom to whole tokens, is resized until a token is one patch of the autoencoder. So a
    token covers the same part of the picture in both, and both resize their position tables to the
    grid, as always. Padding is never kept.
    """

    def __init__(self, detector: "Detector | None" = None, mae: MAE | None = None) -> None:
        """An image has the side that the detector is tested at, without one that the autoencoder
        was trained at. Raises ValueError without a model, and for a detector that cannot leave
        tokens out."""
        if detector is None and mae is None:
            raise ValueError("neither a detector nor an autoencoder: give at least one")
        if detector is not None and not detector.samples:
            raise ValueError(
                f"a {detector.config.backbone.kind} detector sees every token: give one whose "
                'backbone samples (backbone.kind="mimdet"), or an autoencoder alone'
            )
        self.detector = detector
        self.mae = mae
        if detector is not None:
            self.resize = detector.resize
        elif mae is not None:
            # In the detector's measure, where a token is 16 pixels.
            side = native_side(mae) // mae.patch_size * PATCH
            self.resize = Resize(side, LONGEST * side)

    def view(self, image: Tensor) -> View:
        """Resize an image, uint8 (3, H, W), for both models."""
        resized = self.resize(image)
        grid = padded = token_grid(*image_size(resized))
        if self.detector is not None:
            height, width = self.detector.batch([resized]).tensors.shape[2:]
            padded = token_grid(height, width)
        patches = None
        if self.mae is not None:
            patches = whole_patches(resized, grid, self.mae.patch_size, PATCH)
        return View(resized, grid, patches, whole_patches(resized, grid, PATCH), padded)

    def tokens(self, view: View) -> Tensor:
        """What a sampler may look at, (L, D): the detector's stem, or patch embeddings."""
        if self.detector is None:
            assert self.mae is not None and view.patches is not None
            return patch_tokens(view.patches, self.mae)
        stem: Any = self.detector.backbone.stem
        tokens = stem(self.detector.batch([view.resized]).tensors).tokens  # (1, D, h, w)
        return tokens[0].flatten(1).T[padded_places(view.grid, view.padded, tokens.device)]

    def ask(self, view: View, sample: Sample) -> Answer:
        """Run the models on exactly these tokens. sample: of one image, on `view.grid`."""
        took: dict[str, float] = {}
        painted = found = None
        mae, patches, detector = self.mae, view.patches, self.detector
        if mae is not None and patches is not None:
            painted, took["autoencoder"] = timed(lambda: paint(patches, mae, sample))
        if detector is not None:
            places = padded_places(view.grid, view.padded, torch.device("cpu"))[sample.keep[0]]
            padded = Sampling(sample=Sample([places], view.padded))
            found, took["detector"] = timed(
                lambda: run_detector(detector, [view.resized], padded)[0].to("cpu")
            )
        return Answer(painted, found, took)

    def encoder_cost(self, kept: int) -> int:
        """Multiply-adds of the encoder's blocks: the detector's, or the autoencoder's."""
        if self.detector is not None:
            cfg = self.detector.config.backbone
            return transformer_cost(kept, cfg.embed_dim, cfg.depth)
        assert self.mae is not None  # one token more: it has a class token
        return transformer_cost(kept + 1, self.mae.pos_embed.shape[2], len(self.mae.blocks))


def timed(run: Callable[[], Result]) -> tuple[Result, float]:
    """What it returns, and the milliseconds it took."""
    start = time.perf_counter()
    result = run()
    return result, 1000 * (time.perf_counter() - start)
