"""AttentionExplorer: click a patch of a picture and see what it attends to."""

import math
from typing import Any

import ipywidgets
import torch
import torch.nn.functional as F
import traitlets
from torch import Tensor

from mimdet.inference import device_of, generator_for
from mimdet.models.backbones import MIMDetBackbone
from mimdet.models.detector import Detector, autocast, evaluating
from mimdet.models.sampling import Sampling
from mimdet.viz import attention, draw
from mimdet.viz import record as recording
from mimdet.viz.record import Recording, attention_names, record
from mimdet.viz.widgets.canvas import PatchCanvas
from mimdet.viz.widgets.panel import ImagePanel, dropdown

WIDTH = 352
"""Pixels of a picture on the screen."""
MEAN = "mean"


class AttentionExplorer(ImagePanel):
    """Left the picture, right what the chosen token takes from every other token.

    image, your own: another picture. Click a patch of either picture, or move with the arrow keys:
    the *query*, framed. part: the encoder, which sees the sampled tokens only (the others are light
    grey), or the decoder, which sees all places. block: which of its blocks. head: one head, or the
    mean of all. rollout: through all blocks from the first to the chosen one, heads averaged.
    ratio kept: the share of tokens the encoder sees; seed: which ones. Only the backbone runs, once
    per picture, ratio and seed; where all maps would not fit (`mimdet.viz.record.LIMIT_GIB`) it
    runs for every query, and rollout is not available.
    """

    name = "attention"

    def __init__(self, model: Detector, images: Any = None) -> None:
        """model: a MIMDet; images: as `predict` takes them, by default scenes of ShapesCOCO. Raises
        ValueError for a model with another backbone, whose tokens are not sampled."""
        super().__init__(images)
        if not isinstance(model.backbone, MIMDetBackbone):
            raise ValueError(
                f"{type(model.backbone).__name__} has no encoder of sampled tokens and no decoder: "
                "give a detector with a MIMDet backbone"
            )
        self.model = model
        self.names = {
            part: [n for n in attention_names(model) if n.startswith(f"backbone.{part}.")]
            for part in ("encoder", "decoder")
        }
        self.part = dropdown("part", [part for part, names in self.names.items() if names])
        self.block, self.head = dropdown("block", []), dropdown("head", [])
        self.rollout = ipywidgets.Checkbox(description="rollout", indent=False)
        self.rollout.layout.width = "90px"
        self.picture = PatchCanvas(tool="select", show_grid=True)
        self.map = PatchCanvas(tool="select")
        traitlets.link((self.picture, "selected"), (self.map, "selected"))
        self.picture.observe(self.changed, "selected")
        self.canvases = [self.picture, self.map]
        self.open(self.inputs, [self.part, self.block, self.head, self.rollout], self.canvases)

    def draw(self) -> str:
        self.once("blocks", self.part.value, self._offer_blocks)
        key = (self.image.value, self.ratio.value, self.seed.value)
        self.once("inputs", key, self._prepare)
        h, w = self.sample.grid
        for canvas in self.canvases:
            canvas.rows, canvas.columns = h, w
        if not 0 <= self.picture.selected < h * w:  # there is something to see at once
            self.picture.selected = attention.nearest_sampled(self.sample, h // 2 * w + w // 2)
        place = self.picture.selected
        kept = self.sample.keep[0].tolist()
        self.picture.dropped = sorted({*range(h * w)} - {*kept})
        self.picture.label = f"The picture; the encoder sees {len(kept)} tokens, the rest is grey."
        where = f"row {place // w}, column {place % w}"
        if self.part.value == "encoder" and place not in kept:
            self._show_map(torch.full((h, w), torch.nan), 1.0)
            self.map.label = self.label = f"No attention: the encoder never saw {where}."
            return (
                f"The token in {where} was <b>not sampled</b>: the encoder never saw it, so it "
                "attends to nothing there. Click a token in colour, change the seed or the ratio, "
                "or look at the decoder, which sees every place."
            )
        values, high, text = self._attention(key, place)
        self._show_map(values, high)
        shares = values.flatten().nan_to_num(-1)
        if self.rollout.value:
            shares[place] = -1  # its own share is in the text
        best = int(shares.argmax())
        most = f"row {best // w}, column {best % w}"
        self.map.label = self.label = f"{text}, of the token in {where}; most goes to {most}."
        largest = attention.share(float(shares[best]))
        even = attention.share(1 / int(values.isfinite().sum()))
        return (
            f"{text}. Query {where}; most, {largest}, goes to {most}; equal shares would be {even}."
        )

    def _attention(self, key: Any, place: int) -> tuple[Tensor, float, str]:
        """(h, w) shares, the end of the colour scale, and what they are. key: of the inputs."""
        part = self.part.value
        names = self.names[part]
        name = names[self.block.value]
        tokens = len(self.sample.keep[0]) if part == "encoder" else math.prod(self.sample.grid)
        gib = len(names) * self._heads() * tokens**2 * 4 / 2**30
        query = None if gib <= recording.LIMIT_GIB else place  # every map, or its rows alone
        seen: Recording = self.once(("seen", part), (key, query), lambda: self._look(names, query))
        title = attention.block_title(seen, name)
        if self.rollout.value:
            if query is not None:
                raise ValueError(
                    "rollout needs whole maps, and those of so many tokens do not fit: lower the "
                    "ratio, take a smaller picture, or switch rollout off"
                )
            values, own = attention.rolled_out(seen, names[: self.block.value + 1], place)
            text = f"Rollout up to {title}, {attention.share(own)} of itself"
            return values, attention.largest_other(values, place), text
        rows = seen.row(name, place)  # (heads, N)
        mean = self.head.value == MEAN
        row = rows.mean(0) if mean else rows[self.head.value]
        text = f"{title}, {'mean of the heads' if mean else f'head {self.head.value}'}"
        return seen.on_grid(name, row), float(row.max()), text.capitalize()

    def _show_map(self, values: Tensor, high: float) -> None:
        self.map.show(attention.laid_over(self.grey, attention.overlay(values, high)))

    def _prepare(self) -> None:
        """Image and sample of these controls: the same for every query, block and head."""
        backbone: Any = self.model.backbone
        self.batch = batch = self.model.prepare(self.chosen)
        device = device_of(self.model)
        with autocast(device, "auto"):
            tokens = backbone.stem(batch.tensors).tokens  # (1, D, h, w)
        grid = (tokens.shape[2], tokens.shape[3])
        flat = tokens.flatten(2).transpose(1, 2)  # (1, L, D)
        sampling = Sampling(self.ratio.value, generators=[generator_for(self.seed.value, device)])
        sample = backbone.draw(flat, grid, batch.image_sizes, sampling)
        image, (height, width) = batch.images[0], batch.tensors.shape[2:]
        padding = (0, width - image.shape[2], 0, height - image.shape[1])
        padded = F.pad(image, padding, value=255)
        self.picture.show(draw.to_pixels(padded, WIDTH))
        self.grey = draw.to_pixels(attention.greyed(padded), WIDTH)
        self.sample = sample.to(torch.device("cpu"))

    def _look(self, names: list[str], query: int | None) -> Recording:
        """The attention of these blocks: every map, or every row of one place."""
        backbone = self.model.backbone
        with (
            evaluating(backbone),
            record(self.model, *names, query=query) as seen,
            autocast(device_of(self.model), "auto"),
        ):
            sampling = Sampling(sample=self.sample)
            backbone(self.batch.tensors, self.batch.image_sizes, sampling)
        return seen

    def _heads(self) -> int:
        block: Any = self.model.get_submodule(self.names[self.part.value][0])
        return int(block.num_heads)

    def _offer_blocks(self) -> None:
        """Blocks and heads of the chosen part; the last block and the mean are chosen first."""
        self.block.options = range(len(self.names[self.part.value]))
        self.block.value = self.block.options[-1]
        self.head.options = [MEAN, *range(self._heads())]
        self.head.value = MEAN
