"""Look inside a model while it runs: `with record(model, NAME, ...) as seen: model.detect(...)`.

A name is a module's path, `backbone.stem.stage2`, or a pattern, `backbone.encoder.blocks.*.attn`.
Of an attention module the attention itself is recorded, of any other module what it returns. All
hooks are removed on leaving, whatever happens inside.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mimdet.models.mae import MAE
from mimdet.models.sampling import PATCH, Grid, Sample
from mimdet.models.vit import Decoder, Encoder

LIMIT_GIB = 1.0
"""More attention than this is refused unless whole=True: the 12 maps of a ViT-B encoder at 1024
pixels take 9 GiB in float32, one query row of each 2.3 MiB."""


class Recording:
    """What was seen: `seen[name]`, and the sample it belongs to."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Any]] = {}
        """Name -> what it gave in every call. Images with unequal numbers of kept tokens run
        through the encoder one after the other."""
        self.sample: Sample | None = None
        """Which tokens the encoder saw, last."""
        self.query: int | None = None
        self.attention: set[str] = set()
        """The names that are attention."""
        self.full_grid: set[str] = set()
        """Those of them that see every place of the grid: the decoder's."""
        self.prefix = 0
        """Rows before the first token: 1 in a MAE, which has a class token."""
        self.patch = PATCH
        """Pixels of a token's side."""

    def __getitem__(self, name: str) -> Any:
        """What the module gave. KeyError with what there is; ValueError for several calls."""
        if name not in self.calls:
            seen = sorted(self.calls) or "nothing: has the model run inside the `with`?"
            raise KeyError(f"{name} was not recorded; there is {seen}")
        found = self.calls[name]
        if len(found) > 1:
            raise ValueError(
                f"{name} ran {len(found)} times: look at .calls[{name!r}], or run one image"
            )
        return found[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.calls)

    def __len__(self) -> int:
        return len(self.calls)

    @property
    def grid(self) -> Grid:
        """(h, w) of all the tokens. Raises ValueError when no sample was seen."""
        return self._sample().grid

    def row(self, name: str, query: int, index: int = 0) -> Tensor:
        """Attention that the token at place `query` of the grid pays, (heads, N) float32.

        N = the kept tokens in the order of `sample.keep[index]` for an encoder, every place of the
        grid for a decoder; a MAE's class token is left out, so its rows do not quite sum to 1.
        Raises ValueError when the encoder never saw that token.
        """
        self._sample()
        attention = self[name][index].float()  # (heads, N, N), or (heads, N) of one query
        if attention.dim() == 3:
            attention = attention[:, self.position(name, query, index)]
        elif query != self.query:
            raise ValueError(f"only query {self.query} was recorded: leave query= out for all")
        return attention[:, self.prefix :]

    def position(self, name: str, place: int, index: int = 0) -> int:
        """Where the token of a place on the grid stands among the rows of attention `name`."""
        sample = self._sample()
        h, w = sample.grid
        if not 0 <= place < h * w:
            raise ValueError(f"place {place} is not on the grid of {h} x {w} tokens")
        if name in self.full_grid:
            return place + self.prefix
        found = (sample.keep[index] == place).nonzero()
        if not len(found):
            raise ValueError(
                f"the token in row {place // w}, column {place % w} was not sampled: the encoder "
                "never saw it, so it attends to nothing there (in the decoder it does)"
            )
        return int(found[0]) + self.prefix

    def on_grid(self, name: str, values: Tensor, index: int = 0) -> Tensor:
        """(..., N) values of tokens, in the order of `row` -> (..., h, w); NaN where unsampled."""
        sample = self._sample()
        values = values.float()
        if name in self.full_grid:
            return values.unflatten(-1, sample.grid)
        full = values.new_full((*values.shape[:-1], sample.grid[0] * sample.grid[1]), torch.nan)
        full[..., sample.keep[index]] = values
        return full.unflatten(-1, sample.grid)

    def _sample(self) -> Sample:
        if self.sample is None:
            raise ValueError(
                "no sample was seen, so tokens have no known places: run the model inside the "
                "`with`. Only the encoder and decoder of MIMDet and of a MAE have samples; of "
                "other models look at seen[name] itself"
            )
        return self.sample


def attention_names(model: nn.Module) -> list[str]:
    """Every attention module that `record` can look into, in the order they run."""
    return [name for name, module in model.named_modules() if _is_attention(module)]


@contextmanager
def record(
    model: nn.Module, *names: str, query: int | None = None, whole: bool = False
) -> Iterator[Recording]:
    """Record what the named modules do while the model runs inside the `with`.

    Attention is (B, heads, N, N): row i says how much token i takes from every token, and sums to
    1. query: keep the row of this place of the grid only (row * w + column), (B, heads, N), N times
    less memory; the token must be among the sampled ones. whole: allow more than LIMIT_GIB.
    Recorded tensors are detached copies on the CPU. timm's fused attention never forms the map, so
    the named blocks use the plain formula inside (their outputs differ by rounding). Of windowed
    models, such as Swin, the maps come as the block forms them, windows in place of images.

    Raises ValueError for a name that matches nothing (with near ones), when the maps would need
    more memory than allowed, and for query= with a model whose tokens have no known places.
    """
    modules = dict(model.named_modules())
    if not names:
        raise ValueError("nothing to record: name at least one module, or a pattern")
    chosen = matching(names, list(modules)[1:])  # the first is the model itself, without a name
    seen = Recording()
    seen.query = query
    if isinstance(model, MAE):
        seen.prefix, seen.patch = 1, model.patch_size
    seen.attention = {name for name in chosen if _is_attention(modules[name])}
    decoders: list[nn.Module] = [m for m in modules.values() if isinstance(m, Decoder)]
    decoders += [m.decoder_blocks for m in modules.values() if isinstance(m, MAE)]
    of_decoders = {module for decoder in decoders for module in decoder.modules()}
    seen.full_grid = {name for name in seen.attention if modules[name] in of_decoders}
    sampling = [m for m in modules.values() if isinstance(m, Encoder | Decoder | MAE)]
    if query is not None and (not sampling or isinstance(model, MAE)):
        raise ValueError(
            "query= needs to know where tokens are, and only the encoder and decoder of MIMDet say "
            "so: omit it for other models (the maps of a MAE are small)"
        )
    hooks: list[Any] = []
    fused: dict[Any, bool] = {}
    try:
        hooks += [_watch_sample(module, seen) for module in sampling]
        for name in chosen:
            module: Any = modules[name]
            keep = partial(_keep, seen, name, whole)
            if name in seen.attention:
                fused[module] = module.fused_attn
                module.fused_attn = False
                hooks.append(module.attn_drop.register_forward_pre_hook(keep))
            else:
                hooks.append(module.register_forward_hook(keep))
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
        for module, was_fused in fused.items():
            module.fused_attn = was_fused


def rollout(maps: Sequence[Tensor]) -> Tensor:
    """Attention through several blocks at once (Abnar and Zuidema, 2020): (N, N), rows sum to 1.

    maps: (heads, N, N) of successive blocks. Each block passes on half of a token (the residual
    connection) and half of what it attends to, averaged over its heads; the product over blocks
    says how much of every input token reaches an output token. A rough picture: values and MLPs
    are left out.
    """
    if not maps:
        raise ValueError("rollout of no block: give the attention of at least one")
    for attention in maps:
        if attention.dim() != 3 or attention.shape[1] != attention.shape[2]:
            raise ValueError(
                f"attention of shape {tuple(attention.shape)}: give (heads, N, N) of one image, as "
                "in seen[name][0], recorded without query="
            )
        if attention.shape[1] != maps[0].shape[1]:
            raise ValueError(
                f"blocks on {maps[0].shape[1]} tokens and on {attention.shape[1]}: encoder and "
                "decoder see other tokens, so follow one of them"
            )
    total = torch.eye(maps[0].shape[-1])
    for attention in maps:
        total = (0.5 * attention.float().mean(0) + 0.5 * torch.eye(len(total))) @ total
    return total


# ------------------------------------------------------------------------------- hooks


def _is_attention(module: nn.Module) -> bool:
    """timm's attention, whose map can be had by switching its fused kernel off."""
    drop = getattr(module, "attn_drop", None)
    return hasattr(module, "fused_attn") and isinstance(drop, nn.Module)


def matching(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names that these names or patterns mean, in their order. Raises ValueError for a pattern
    that means none, with near ones."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
            raise ValueError(f"no module {pattern!r} to look into; near names: {near}")
    return [name for name in names if any(fnmatchcase(name, p) for p in patterns)]


def _watch_sample(module: nn.Module, seen: Recording) -> Any:
    """Encoder and decoder are given a sample, before their blocks run; a MAE returns it."""

    def given(_: nn.Module, arguments: tuple[Any, ...], output: Any = None) -> None:
        seen.sample = _to_cpu(arguments[1] if output is None else output.sample)

    if isinstance(module, MAE):
        return module.register_forward_hook(given)
    return module.register_forward_pre_hook(given)


def _keep(
    seen: Recording, name: str, whole: bool, _: nn.Module, arguments: Any, output: Any = None
) -> None:
    """A hook: store what a module returns, or the attention (B, heads, N, N) a dropout is given."""
    if name in seen.attention:
        output = arguments[0]
        if seen.query is not None:
            output = _rows_of(seen.query, output, seen, name)
        elif not whole:
            _check_memory(output, seen, name)
    seen.calls.setdefault(name, []).append(_to_cpu(output))


def _rows_of(query: int, attention: Tensor, seen: Recording, name: str) -> Tensor:
    """(B, heads, N, N) -> what the token at place `query` of each image pays: (B, heads, N)."""
    if len(attention) != len(seen._sample().keep):
        raise ValueError(
            "these images keep unequal numbers of tokens and run in turn: with query=, run one "
            "image at a time"
        )
    return torch.stack([own[:, seen.position(name, query, i)] for i, own in enumerate(attention)])


def _check_memory(attention: Tensor, seen: Recording, name: str) -> None:
    """Add up what is kept and what is to come, as if blocks not seen yet were as large as this."""
    kept = sum(map_.nbytes for other in seen.attention for map_ in seen.calls.get(other, []))
    missing = len(seen.attention - set(seen.calls) - {name}) + 1
    needed = (kept + missing * attention.nbytes) / 2**30
    if needed > LIMIT_GIB:
        raise ValueError(
            f"the whole attention of {len(seen.attention)} blocks, here on {attention.shape[-1]} "
            f"tokens, takes {needed:.1f} GiB: name fewer blocks, give query=, or whole=True"
        )


def _to_cpu(value: Any) -> Any:
    """Detached copies of the tensors in whatever a module returns."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_cpu(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = map(_to_cpu, value)
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
