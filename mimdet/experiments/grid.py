"""Which runs an experiment has: arms (what differs) times seeds (what does not)."""

import copy
import dataclasses
import inspect
import itertools
import re
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mimdet.config import Config, flat, set_field
from mimdet.presets import PRESETS
from mimdet.training.slots import SlotText, load_slots, read_slots, write_slots

Grid = Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]
"""{field: values} for all combinations, or a list of arms {field: value}."""

SLOTS = {
    "backbone.sampler": "sampler",
    "backbone.stem": "stem",
    "backbone.kind": "backbone",
    "detector.neck": "neck",
}
"""Fields whose value may be a function or class -> argument of `build_detector`."""
FROM_CELL = "cell:"
"""Begins the name that such a value has in the configuration; its source's sha256 ends it."""

NOT_IN_A_GRID = {
    "training.seed": "give seeds=, so that every arm has the same ones",
    "detector.num_classes": "it is that of the data",
    "backbone.sample_ratio_eval": "it does not change a training: give evaluate_ratios=(...), and "
    "one training is evaluated at all of them",
}
OVERRIDDEN = {
    "training.epochs": "training.steps",
    "training.warmup_epochs": "training.warmup_steps",
    "training.evaluate_every": "training.evaluate_every_steps",
}
"""Field -> the one that counts instead of it where that is not 0."""
LONGEST_LABEL = 80


@dataclass(slots=True)
class Arm:
    """One way to set the fields of the grid."""

    label: str
    """Readable and unique, also as a part of a folder's name: `sample_ratio=0.25`."""
    values: dict[str, Any]
    """Field -> value; a function or class stands here with its name."""
    cfg: Config
    code: dict[str, SlotText] = field(default_factory=dict)
    """Slot -> the text of the function or class that was given, as it was then."""


def arms_of(base: Config, grid: Grid) -> list[Arm]:
    """The arms of a grid, in its order; the first one is what the others are compared with.

    The values of `preset` are names of recipes: such an arm is that recipe with what `base` changes
    in its own. Raises ValueError naming the field, with near matches, for a name the configuration
    lacks, and for values that cannot be used or have no effect.
    """
    kinds = field_kinds(Config)
    combinations = _combinations(grid)
    fields = list(dict.fromkeys(name for combination in combinations for name in combination))
    for name in fields:
        _check_field(name, kinds)
    short = short_names(fields)
    arms = []
    for combination in combinations:
        cfg = _in_recipe(base, combination.get("preset", base.preset))
        code: dict[str, SlotText] = {}
        values: dict[str, Any] = {}
        for name in fields:
            value = combination.get(name, field_of(cfg, name))
            if name in SLOTS and not isinstance(value, str):
                values[name] = _code_name(name, value)
                text = code[SLOTS[name]] = _checked_code(SLOTS[name], value)
                value = f"{FROM_CELL}{values[name]}@{text.sha256[:12]}"
            else:
                value = values[name] = _checked(name, value, kinds[name])
            set_field(cfg, name, value)
        _check_effective(cfg, fields)
        arms.append(Arm(_label(short, values), values, cfg, code))
    _check_unique(arms)
    return arms


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """Field -> its last part, or the whole of it where two fields end alike."""
    ends = [name.rpartition(".")[2] for name in fields]
    return {
        name: end if ends.count(end) == 1 else name for name, end in zip(fields, ends, strict=True)
    }


def field_of(cfg: Config, name: str) -> Any:
    """The value of a field by its dotted name."""
    value: Any = cfg
    for part in name.split("."):
        value = getattr(value, part)
    return value


def field_kinds(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type of every field that holds a value."""
    kinds: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            kinds |= field_kinds(hint, f"{prefix}{name}.")
        else:
            kinds[prefix + name] = hint
    return kinds


# ------------------------------------------------------------------------------- reading the grid


def _combinations(grid: Grid) -> list[dict[str, Any]]:
    if not isinstance(grid, Mapping):
        if not grid or not all(isinstance(arm, Mapping) for arm in grid):
            raise ValueError(
                f"grid={grid!r}: give {{field: [values]}}, or a list of {{field: value}}"
            )
        return [dict(arm) for arm in grid]
    for name, values in grid.items():
        if isinstance(values, str | Mapping) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"{name}: give the values as a list, not {values!r}")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _check_field(name: str, kinds: dict[str, Any]) -> None:
    if name in NOT_IN_A_GRID:
        raise ValueError(f"{name} cannot be in a grid: {NOT_IN_A_GRID[name]}")
    if name in kinds:
        return
    ends: dict[str, list[str]] = {}
    for known in kinds:
        ends.setdefault(known.rpartition(".")[2], []).append(known)
    near = get_close_matches(str(name).rpartition(".")[2], ends, n=3)
    choices = [known for end in near for known in ends[end]]
    hint = f"did you mean {' or '.join(choices)}?" if choices else f"sections: {_sections(kinds)}"
    raise ValueError(f"the configuration has no field {name!r}: {hint}")


def _sections(kinds: dict[str, Any]) -> str:
    return ", ".join(dict.fromkeys(f"{n.partition('.')[0]}.*" for n in kinds if "." in n))


def _in_recipe(base: Config, preset: str) -> Config:
    """The recipe `preset`, with every field that `base` sets otherwise than its own recipe does.

    For another kind of backbone, what `base` changes in its own is left out.
    """
    if preset == base.preset:
        return copy.deepcopy(base)
    for name in (preset, base.preset):
        if name not in PRESETS:
            raise ValueError(
                f"preset={name!r}: recipes can be compared where the base and every value are one "
                f"of {', '.join(PRESETS)}"
            )
    cfg, own = PRESETS[preset](), flat(PRESETS[base.preset]())
    same_kind = cfg.backbone.kind == base.backbone.kind
    for name, value in flat(base).items():
        if value != own[name] and name != "preset" and (same_kind or "backbone." not in name):
            set_field(cfg, name, value)
    return cfg


def _check_effective(cfg: Config, fields: Sequence[str]) -> None:
    for name, other in OVERRIDDEN.items():
        if name in fields and field_of(cfg, other):
            raise ValueError(
                f"{name} has no effect while {other}={field_of(cfg, other)}: put {other} in the "
                "grid, or set it to 0 in the base"
            )


def _checked(name: str, value: Any, kind: Any) -> Any:
    """The value, as the field stores it. Raises ValueError when it is of another type."""
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(value)
    if kind is float and type(value) is int:
        return float(value)
    if not _fits(value, kind):
        raise ValueError(f"{name}={value!r}: it must be {_kind_text(kind)}")
    return value


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(kind))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, get_origin(kind) or kind)


def _kind_text(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(kind))
    return str(getattr(kind, "__name__", kind))


# ------------------------------------------------------------------------------- code from a cell


def _code_name(name: str, part: Any) -> str:
    """The name of a function or class. Raises ValueError for anything else."""
    if not inspect.isfunction(part) and not inspect.isclass(part):
        raise ValueError(
            f"{name}={part!r}: give a registered name, 'module:function', a function, or a class "
            "(not an object made of it: every run makes its own)"
        )
    if not part.__name__.isidentifier():
        raise ValueError(f"{name} is a {part.__name__}: write it with def, so that it has a name")
    return str(part.__name__)


def _checked_code(slot: str, part: Any) -> SlotText:
    """Its text, read back as a run will, so that what it lacks is known now."""
    texts = read_slots({slot: part})
    with tempfile.TemporaryDirectory() as folder:
        write_slots(Path(folder), texts)
        load_slots(Path(folder), trust_code=True)
    return texts[slot]


# ------------------------------------------------------------------------------- labels


def _label(short: dict[str, str], values: dict[str, Any]) -> str:
    if not values:
        return "base"
    text = ",".join(f"{short[name]}={value_text(value)}" for name, value in values.items())
    label = re.sub(r"[^\w.=,+-]+", "-", text)
    if len(label) > LONGEST_LABEL:
        label = f"{label[: LONGEST_LABEL - 9]}-{zlib.crc32(text.encode()):08x}"
    return label


def value_text(value: Any) -> str:
    """A value in a label or a table: 0.25, on, 64-96, random."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return "-".join(value_text(part) for part in value)
    return str(value) or "none"


def _check_unique(arms: list[Arm]) -> None:
    labels = [arm.label for arm in arms]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(
                f"two arms are both called {label}: give each value once, and functions different "
                "names"
            )
