"""One image through an autoencoder and a detector that are given exactly the same tokens."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mimdet.analysis.cost import transformer_cost
from mimdet.data.augment import resize_image, shortest_edge
from mimdet.models.detector import on_canvas
from mimdet.models.mae import MAE
from mimdet.models.rcnn import pad_and_normalise
from mimdet.models.sampling import PATCH, Grid, Sample, padded_places, token_grid
from mimdet.predict import device_of, run_detector
from mimdet.structures import Detections, padded_size
from mimdet.viz.reconstruction import LONGEST, Painted, native_side, paint, whole_patches

if TYPE_CHECKING:
    from mimdet.models.detector import Detector

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

    def __init__(
        self, detector: "Detector | None" = None, mae: MAE | None = None, side: int = 0
    ) -> None:
        """side: short side of the image in pixels of the detector; 0 = what it is tested at, or
        without a detector what the autoencoder was trained at. Raises ValueError without a model,
        and for a detector that cannot leave tokens out."""
        if detector is None and mae is None:
            raise ValueError("neither a detector nor an autoencoder: give at least one")
        if detector is not None and not hasattr(detector.backbone, "draw"):
            raise ValueError(
                f"a {detector.config.backbone.kind} detector sees every token: give one whose "
                'backbone samples (backbone.kind="mimdet"), or an autoencoder alone'
            )
        self.detector = detector
        self.mae = mae
        self.side = side

    def view(self, image: Tensor) -> View:
        """Resize an image, uint8 (3, H, W), for both models."""
        height, width = image.shape[1:]
        if self.detector is not None:
            data = self.detector.config.data
            short = self.side or data.test_short_side
            longest = data.max_side * short / data.test_short_side
        else:
            assert self.mae is not None
            # In the detector's measure, where a token is 16 pixels.
            short = self.side or native_side(self.mae) // self.mae.patch_size * PATCH
            longest = LONGEST * short
        resized = resize_image(image, shortest_edge(height, width, short, longest))
        grid = token_grid(resized.shape[1], resized.shape[2])
        patches = None
        if self.mae is not None:
            patches = whole_patches(resized, grid, self.mae.patch_size, PATCH)
        return View(resized, grid, patches, whole_patches(resized, grid, PATCH))

    def tokens(self, view: View) -> Tensor:
        """What a sampler may look at, (L, D): the detector's stem, or patch embeddings."""
        if self.detector is not None:
            image = view.resized
            if self.detector.canvas:
                image = on_canvas(image, self.detector.canvas)
            batch = pad_and_normalise([image], device_of(self.detector))
            stem: Any = self.detector.backbone.stem
            tokens = stem(batch.tensors).tokens.flatten(2)[0].transpose(0, 1)  # (D, h, w) -> (L, D)
            return tokens[padded_places(view.grid, self._padded_grid(view), tokens.device)]
        assert self.mae is not None and view.patches is not None
        height, width = view.patches.shape[1:]
        pixels = pad_and_normalise([view.patches], device_of(self.mae)).tensors
        return self.mae.patch_embed(pixels[:, :, :height, :width]).flatten(2)[0].transpose(0, 1)

    def ask(self, view: View, sample: Sample) -> Answer:
        """Run the models on exactly these tokens. sample: of one image, on `view.grid`."""
        took: dict[str, float] = {}
        painted = found = None
        if self.mae is not None:
            mae, patches = self.mae, view.patches
            assert patches is not None
            painted, took["autoencoder"] = timed(lambda: paint(patches, mae, sample))
        if self.detector is not None:
            detector, grid = self.detector, self._padded_grid(view)
            # The batch is padded to multiples of 32; the view's tokens are its upper left part.
            places = padded_places(view.grid, grid, torch.device("cpu"))[sample.keep[0]]
            padded = Sample([places], grid)
            found, took["detector"] = timed(
                lambda: run_detector(detector, [view.resized], sample=padded)[0].to("cpu")
            )
        return Answer(painted, found, took)

    def encoder_cost(self, kept: int) -> int:
        """Multiply-adds of the encoder's blocks: the detector's, or the autoencoder's."""
        if self.detector is not None:
            cfg = self.detector.config.backbone
            return transformer_cost(kept, cfg.embed_dim, cfg.depth)
        assert self.mae is not None  # one token more: it has a class token
        return transformer_cost(kept + 1, self.mae.pos_embed.shape[2], len(self.mae.blocks))

    def _padded_grid(self, view: View) -> Grid:
        assert self.detector is not None
        side = self.detector.canvas
        height, width = (side, side) if side else view.resized.shape[1:]
        return token_grid(*padded_size(height, width))


def timed(run: Callable[[], Result]) -> tuple[Result, float]:
    """What it returns, and the milliseconds it took."""
    start = time.perf_counter()
    result = run()
    return result, 1000 * (time.perf_counter() - start)
