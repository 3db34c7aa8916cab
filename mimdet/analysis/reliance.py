"""What a detector relies on, and what its tokens hold.

`reliance`: AP when a part of what the model computes is exchanged, and when its encoder sees fewer
tokens. What can be exchanged without loss is not used. `linear_probe`: how well a linear classifier
tells the classes of objects from tokens. `token_scale`: how large the tokens are that enter the
encoder, beside their positions. `token_rank`: in how many directions tokens vary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimdet.analysis.evaluate import evaluate, progress_bar
from mimdet.data.loader import Dataset
from mimdet.data.shapes import ShapesCOCO
from mimdet.images import Resize, to_rgb
from mimdet.inference import (
    DEFAULT_BATCH,
    device_of,
    equal_padded_size,
    generator_for,
    run_detector,
)
from mimdet.models.backbones import MIMDetBackbone
from mimdet.models.detector import Detector, build_detector, evaluating
from mimdet.models.mae import MAE
from mimdet.models.rcnn import pad_and_normalise
from mimdet.models.sampling import PATCH, Grid, Sample, Sampling, scatter
from mimdet.models.vit import resize_table
from mimdet.structures import Crops, crops_to_bitmaps

if TYPE_CHECKING:
    from pandas import DataFrame

Change = Callable[[Tensor], Tensor]
"""The tokens of one image, (N, C) -> (N, C)."""
PLACES = ("c4", "encoder", "fill")
"""Where a model can be altered."""
CHANGES = ("another", "shuffled", "mean", "zero")
"""What tokens can be altered to."""
COLUMNS = ("AP", "AP_small", "AP_medium", "AP_large")
ONE_TOKEN = 1e-6
"""A share of the tokens so small that one is kept."""
RATIOS = (ONE_TOKEN, 0.1, 0.25, 0.5, 1.0)


# ------------------------------------------------------------------------------- altering a model


@contextmanager
def altered(model: Detector, place: str, change: str | Change, seed: int = 0) -> Iterator[None]:
    """Inside the `with`, what the model computes at one place is exchanged, image by image.

    place: "c4", the backbone's map (c5 follows where it is c4 pooled, as in MIMDet and ViTDet);
    "encoder", the tokens that the encoder returns, in the order of the sample; "fill", what the
    decoder is given for places that were not sampled (at ratio 1 there are none).
    change: "mean" of the tokens over all places; "shuffled", the places of each image permuted, by
    draws from `seed`; "zero"; "another", the tokens of the image before it: in its batch, or the
    last one of the batch before, or, at the very first, the last of its own batch. Where that image
    has more or fewer tokens, rows are left out or repeated evenly. Or a function of one image's
    tokens, (N, C) -> (N, C).

    ValueError for a place that the model does not have, and, when the model runs, for "another" of
    a first batch of one image. Everything is as before on leaving, whatever happens inside.
    """
    module, exchange = _module_at(model, place), _exchange(change, seed)

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if place == "c4":
            return _with_c4(output, exchange)
        exchanged = exchange(list(output))
        return exchanged if place == "encoder" else torch.stack(exchanged)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _module_at(model: Detector, place: str) -> nn.Module:
    """What computes it."""
    backbone = model.backbone
    if place not in PLACES:
        raise ValueError(f"place={place!r}: use one of {', '.join(PLACES)}")
    if place == "c4":
        return backbone
    if not isinstance(backbone, MIMDetBackbone):
        name = type(backbone).__name__
        raise ValueError(f"the backbone {name} samples no tokens: it has no {place}, alter its c4")
    if place == "encoder":
        return backbone.encoder
    if not isinstance(backbone.decoder.fill, nn.Module):
        raise ValueError("the fill of this decoder is a plain function: make it an nn.Module")
    return backbone.decoder.fill


def _exchange(change: str | Change, seed: int) -> Callable[[list[Tensor]], list[Tensor]]:
    """A change by name, or of one image -> that of a batch: a list of (N_i, C)."""
    if change == "another":
        return _another()
    generator = torch.Generator().manual_seed(seed)
    of_one: dict[str, Change] = {
        "shuffled": lambda tokens: tokens[
            torch.randperm(len(tokens), generator=generator).to(tokens.device)
        ],
        "mean": lambda tokens: tokens.mean(0, keepdim=True).expand_as(tokens),
        "zero": torch.zeros_like,
    }
    if isinstance(change, str) and change not in of_one:
        raise ValueError(f"change={change!r}: use one of {', '.join(CHANGES)}, or a function")
    function = of_one[change] if isinstance(change, str) else change
    return lambda images: [function(tokens) for tokens in images]


def _another() -> Callable[[list[Tensor]], list[Tensor]]:
    """Every image gets the tokens of the one before it."""
    last: list[Tensor] = []  # of the batch before, once there is one

    def exchange(images: list[Tensor]) -> list[Tensor]:
        if not last and len(images) == 1:
            raise ValueError("one image, and none before it: there is no other to take tokens from")
        others = [*(last or images[-1:]), *images[:-1]]
        last[:] = images[-1:]
        return [
            other[torch.arange(len(own), device=own.device) * len(other) // len(own)]
            for own, other in zip(images, others, strict=True)
        ]

    return exchange


def _with_c4(
    maps: dict[str, Tensor], exchange: Callable[[list[Tensor]], list[Tensor]]
) -> dict[str, Tensor]:
    """c2..c5 with another c4, (B, C, h, w), laid out in memory as the one it replaces."""
    c4 = maps["c4"]
    tokens = torch.stack(exchange(list(c4.flatten(2).transpose(1, 2))))  # (B, h * w, C)
    other = torch.empty_like(c4).copy_(tokens.transpose(1, 2).view(c4.shape))
    changed = maps | {"c4": other}
    if torch.equal(maps["c5"], F.max_pool2d(c4, 2)):
        changed["c5"] = F.max_pool2d(other, 2)
    return changed


# ------------------------------------------------------------------------------- AP


def reliance(
    model: Detector,
    dataset: Dataset,
    ratios: Sequence[float] = RATIOS,
    fill_ratio: float = 0.25,
    *,
    seed: int = 0,
    batch_size: int = DEFAULT_BATCH,
    workers: int = 0,
    progress: bool = True,
) -> "DataFrame":
    """Box AP x 100, of all objects and by their size, with the model as it is and altered.

    A row a condition: "one token", "25 % of tokens", "all tokens" for `ratios`, then "c4: mean" for
    every place and change of `altered`. Where c4 or the encoder is altered, the encoder sees all
    tokens; where the fill is, it sees `fill_ratio` of them, as at 1 there is no fill. Of backbones
    without a sample c4 alone is altered. NaN where the data set has no such object; `table.attrs`
    says what the numbers belong to. Numbers do not depend on the batch size: "another" is the image
    before in the order of the evaluation, and of the first the last.
    """
    from pandas import DataFrame

    conditions = {share(r): (r, "", "") for r in (ratios if model.samples else (1.0,))}
    places = PLACES if isinstance(model.backbone, MIMDetBackbone) else PLACES[:1]
    for place, change in product(places, CHANGES):
        ratio = fill_ratio if place == "fill" else 1.0
        conditions[f"{place}: {change}"] = (ratio, place, change)
    rows, about = {}, {}
    with progress_bar(len(conditions) * len(dataset), progress) as bar:
        for name, (ratio, place, change) in conditions.items():
            bar.set_description(name)
            with _condition(model, dataset, place, change, seed):
                found = evaluate(
                    model,
                    dataset,
                    sample_ratio=ratio,
                    seed=seed,
                    batch_size=batch_size,
                    workers=workers,
                )
            rows[name] = {column: 100 * found.box[column] for column in COLUMNS}
            about = found.about
            bar.update(len(dataset))
    table = DataFrame.from_dict(rows, orient="index").rename_axis("condition")
    about |= {"fill_ratio": fill_ratio}
    table.attrs = {key: about[key] for key in about if key != "sample_ratio"}
    return table


@contextmanager
def _condition(
    model: Detector, dataset: Dataset, place: str, change: str, seed: int
) -> Iterator[None]:
    """`altered`, or nothing where no place is given. The first image has one before it: the last
    one of an evaluation."""
    if not place:
        yield
        return
    with altered(model, place, change, seed):
        if change == "another":
            sizes = [model.resize.size(*dataset.image_size(i)) for i in range(len(dataset))]
            last = model.resize(dataset.image(equal_padded_size(sizes, 1)[-1][0]))
            generators = [generator_for(seed, device_of(model))] * 2
            run_detector(model, [last, last], Sampling(1.0, generators=generators))
        yield


def share(ratio: float) -> str:
    """A sample ratio in words."""
    if ratio <= ONE_TOKEN:
        return "one token"
    return "all tokens" if ratio == 1 else f"{100 * ratio:g} % of tokens"


# ------------------------------------------------------------------------------- tokens


OF_A_MAE: tuple[str, ...] = ("patch_embed", "encoder")
OF_A_MIMDET: tuple[str, ...] = ("stem", "encoder", "c4")
"""Where tokens can be had, in the order in which they are made; of other detectors, c4."""


class Features(NamedTuple):
    """Tokens that can be probed."""

    resize: Resize
    """What brings images to size."""
    tokens: Callable[[Sequence[Tensor]], Tensor]
    """Resized images, uint8 (3, h, w) of equal padded size -> (B, C, rows, columns)."""
    patch: int = PATCH
    """Pixels of a token's side."""


def features_of(model: Detector | MAE, place: str) -> Features:
    """The tokens at a place of a model, which sees all of an image.

    place: of a detector "c4", and of a MIMDet "stem" or "encoder"; of an autoencoder "patch_embed"
    or "encoder". ValueError for another one.
    """
    if isinstance(model, MAE):
        resize, patch, known = Resize(image_side(model)), model.patch_size, OF_A_MAE
    else:
        resize, patch, known = model.resize, PATCH, OF_A_MIMDET
        if not isinstance(model.backbone, MIMDetBackbone):
            known = ("c4",)
    if place not in known:
        raise ValueError(f"place={place!r}: of this model there is {', '.join(known)}")

    @torch.no_grad()
    def tokens(images: Sequence[Tensor]) -> Tensor:
        with evaluating(model):
            return _tokens_at(model, place, images)

    return Features(resize, tokens, patch)


def _tokens_at(model: Detector | MAE, place: str, images: Sequence[Tensor]) -> Tensor:
    """(B, C, h, w); where padding never enters an encoder, its places hold 0."""
    if isinstance(model, MAE):
        patches = model.patch_embed(pad_and_normalise(images, model).tensors)
        grid: Grid = (patches.shape[2], patches.shape[3])
        if place == "patch_embed":
            return patches
        every = torch.arange(grid[0] * grid[1], device=patches.device)
        sample = Sample([every] * len(images), grid)
        encoded = model.encode(patches.flatten(2).transpose(1, 2), sample)[:, 1:]  # (B, L, D)
        return encoded.transpose(1, 2).unflatten(2, grid)
    batch, net = model.batch(images), model.backbone
    if place == "c4" or not isinstance(net, MIMDetBackbone):
        return model.features(batch, Sampling(1.0))["c4"]
    stem = net.stem(batch.tensors).tokens
    if place == "stem":
        return stem
    grid = (stem.shape[2], stem.shape[3])
    tokens = stem.flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, L, D)
    sample = net.draw(tokens, grid, batch.image_sizes, Sampling(1.0))
    full = scatter(net.encoder(tokens, sample), sample, torch.zeros_like(tokens))
    return full.transpose(1, 2).unflatten(2, grid)


def untrained(model: Detector | MAE, seed: int = 0) -> Any:
    """The same model with random weights, as a training from scratch begins with.

    ValueError for a detector with parts that were passed in: they are not built from its numbers.
    """
    if isinstance(model, Detector) and model.slots:
        raise ValueError(f"{', '.join(model.slots)} of this detector was passed in ready-made")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(model, Detector):
            return build_detector(model.config).to(device_of(model)).eval()
        new = MAE(
            image_side(model),
            model.patch_size,
            model.pos_embed.shape[2],
            len(model.blocks),
            model.num_heads,
            model.decoder_pos_embed.shape[2],
            len(model.decoder_blocks),
            model.decoder_heads,
            model.norm_pix_loss,
            model.decoder_pixels is not None,
        )
    return new.to(device_of(model)).eval()


def image_side(mae: MAE) -> int:
    """Pixels of the square images that an autoencoder was trained on."""
    return math.isqrt(mae.pos_embed.shape[1] - 1) * mae.patch_size


@torch.no_grad()
def token_scale(model: Detector | MAE, images: Sequence[Any]) -> dict[str, float]:
    """Standard deviation, over images, places and channels, of what enters the encoder.

    "tokens": of the stem, or of a MAE's patch embedding; "positions": what is added to them; "sum":
    of both. images: paths, PIL images, arrays or tensors. Where positions are much the larger ones,
    the encoder sees mostly where a token is. ValueError for a backbone without these.
    """
    features = features_of(model, "patch_embed" if isinstance(model, MAE) else "stem")
    encoder: Any = model if isinstance(model, MAE) else model.backbone.encoder
    parts: dict[str, list[Tensor]] = {"tokens": [], "positions": [], "sum": []}
    for image in images:
        tokens = features.tokens([features.resize(to_rgb(image))])
        positions = resize_table(encoder.pos_embed, (tokens.shape[2], tokens.shape[3]))
        tokens = tokens.flatten(2).transpose(1, 2)  # (1, D, h, w) -> (1, L, D)
        for name, values in zip(parts, (tokens, positions, tokens + positions), strict=True):
            parts[name].append(values.flatten().float())
    return {name: float(torch.cat(values).std()) for name, values in parts.items()}


@torch.no_grad()
def token_rank(features: Features, images: Sequence[Any]) -> float:
    """In how many directions tokens vary, 1..C: their effective rank (Roy & Vetterli, 2007).

    The exponential of the entropy of the shares that the principal directions have in the variance
    over images and places. 1: every token is one vector times a number. images: as `token_scale`.
    """
    found = [features.tokens([features.resize(to_rgb(image))]).flatten(2)[0] for image in images]
    tokens = torch.cat(found, dim=1).double().cpu()  # (C, N)
    shares = torch.linalg.eigvalsh(torch.cov(tokens)).clamp(min=0)
    shares = shares[shares > 0] / shares.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


# ------------------------------------------------------------------------------- linear probe


def linear_probe(
    features: Features,
    train: Dataset | None = None,
    test: Dataset | None = None,
    *,
    l2: float = 1e-3,
    progress: bool = False,
) -> float:
    """Share of the objects of `test` whose class a linear classifier tells from their tokens, 0..1.

    An object is the mean of the tokens that its mask covers at least by half; one that covers no
    token so far is the token at its mask's centre of mass. Multinomial logistic regression on
    features standardised by `train`, with a penalty of l2 / 2 times the squared weights, fitted to
    the end: nothing is drawn. Default data: 400 training and 200 held-out scenes of
    `shapes-v1-medium`. ValueError for data without masks.
    """
    train = ShapesCOCO(length=400) if train is None else train
    test = ShapesCOCO(length=200, split="val") if test is None else test
    with progress_bar(len(train) + len(test), progress) as bar:
        known, labels = object_tokens(features, train, bar.update)
        unseen, truth = object_tokens(features, test, bar.update)
    mean, deviation = known.mean(0), known.std(0).clamp(min=1e-6)
    weight, bias = _logistic((known - mean) / deviation, labels, len(train.categories), l2)
    said = ((unseen - mean) / deviation @ weight + bias).argmax(1)
    return float((said == truth).double().mean())


@torch.no_grad()
def object_tokens(
    features: Features, dataset: Dataset, done: Callable[[int], Any] = lambda images: None
) -> tuple[Tensor, Tensor]:
    """Every object as its mean token, (N, C) float64 on the CPU, and its label, (N,)."""
    sizes = [features.resize.size(*dataset.image_size(i)) for i in range(len(dataset))]
    found, labels = [], []
    for members in equal_padded_size(sizes, DEFAULT_BATCH):
        records = [dataset[i] for i in members]
        maps = features.tokens([features.resize(record.image) for record in records])
        for i, record, tokens in zip(members, records, maps, strict=True):
            if record.target.masks is None:
                raise ValueError(f"image {record.image_id!r} has no masks: objects are unknown")
            height, width = record.image.shape[1:]
            scale = torch.tensor([sizes[i][1] / width, sizes[i][0] / height]).repeat(2)
            masks = Crops(record.target.masks.boxes * scale, record.target.masks.bitmaps)
            inside = tokens_inside(masks, (tokens.shape[1], tokens.shape[2]), features.patch)
            weights = inside.double() / inside.sum(1, keepdim=True)  # (n, h * w)
            found.append(weights @ tokens.flatten(1).T.double().cpu())
            labels.append(record.target.labels)
        done(len(members))
    return torch.cat(found), torch.cat(labels)


def tokens_inside(masks: Crops, grid: Grid, patch: int = PATCH) -> Tensor:
    """(n, h * w) bool: the tokens of each of n objects, by the rule of `linear_probe`."""
    h, w = grid
    pixels = crops_to_bitmaps(masks, h * patch, w * patch).float()
    inside = F.avg_pool2d(pixels, patch).flatten(1) >= 0.5
    rows, columns = masks.bitmaps.shape[1:]
    mass = masks.bitmaps.double() / masks.bitmaps.sum((1, 2), keepdim=True)  # sums to 1 in each
    y = (mass.sum(2) @ ((torch.arange(rows) + 0.5) / rows).double()).float()  # 0..1 in the box
    x = (mass.sum(1) @ ((torch.arange(columns) + 0.5) / columns).double()).float()
    x0, y0, x1, y1 = masks.boxes.T
    row = ((y0 + y * (y1 - y0)) / patch).long().clamp(0, h - 1)
    column = ((x0 + x * (x1 - x0)) / patch).long().clamp(0, w - 1)
    lone = ~inside.any(1)
    inside[lone, (row * w + column)[lone]] = True
    return inside


def _logistic(x: Tensor, y: Tensor, classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Weights (C, classes) and bias (classes,) of the best fit to x (N, C) and y (N,)."""
    weight = x.new_zeros(x.shape[1], classes, requires_grad=True)
    bias = x.new_zeros(classes, requires_grad=True)
    fit = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> float:
        fit.zero_grad()
        value = F.cross_entropy(x @ weight + bias, y) + l2 / 2 * weight.square().sum()
        value.backward()
        return value.item()

    fit.step(loss)
    return weight.detach(), bias.detach()
