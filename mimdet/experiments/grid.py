"""Which runs an experiment has: arms (what differs) times seeds (what does not)."""

import copy
import itertools
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from mimdet.config import SLOTS, Config, flat, from_dict, set_field, to_dict
from mimdet.presets import PRESETS
from mimdet.training.slots import SlotText, read_slots

Grid = Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]
"""{field: values} for all combinations, or a list of arms {field: value}."""

NOT_IN_A_GRID = {
    "training.seed": "give seeds=, so that every arm has the same ones",
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
"""Characters; the file systems' limit for a name is 255 bytes."""


@dataclass(slots=True)
class Arm:
    """One way to set the fields of the grid."""

    label: str
    """Readable and unique, also as a part of a folder's name: `sample_ratio=0.25`."""
    values: dict[str, Any]
    """Field -> value; code of your own stands here with its name."""
    cfg: Config
    code: dict[str, SlotText] = field(default_factory=dict)
    """Slot -> the text of the part that was given, as it was then."""


def arms_of(base: Config, grid: Grid) -> list[Arm]:
    """The arms of a grid, in its order; the first one is what the others are compared with.

    The values of `preset` are names of recipes: such an arm is that recipe with what `base` changes
    in its own. Raises ValueError naming the field, with near matches, for a name the configuration
    lacks, and for values that cannot be used or have no effect.
    """
    combinations = _combinations(grid)
    fields = list(dict.fromkeys(name for combination in combinations for name in combination))
    known = flat(Config())
    for name in fields:
        if name in NOT_IN_A_GRID:
            raise ValueError(f"{name} cannot be in a grid: {NOT_IN_A_GRID[name]}")
        if name not in known:
            near = " or ".join(get_close_matches(name, known))
            hint = f": did you mean {near}?" if near else ""
            raise ValueError(f"the configuration has no field {name!r}{hint}")
    short = short_names(fields)
    arms: dict[str, Arm] = {}
    for combination in combinations:
        arm = _arm(base, combination, fields)
        text = ",".join(f"{short[name]}={value_text(value)}" for name, value in arm.values.items())
        arm.label = re.sub(r"[^\w.=,+-]+", "-", text) or "base"
        if len(arm.label) > LONGEST_LABEL:
            arm.label = f"{arm.label[: LONGEST_LABEL - 9]}-{zlib.crc32(text.encode()):08x}"
        if arm.label in arms:
            raise ValueError(
                f"two arms are both called {arm.label}: give each value once, and functions "
                "different names"
            )
        arms[arm.label] = arm
    return list(arms.values())


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """Field -> its last part, or the whole of it where two fields end alike."""
    ends = [name.rpartition(".")[2] for name in fields]
    return {
        name: end if ends.count(end) == 1 else name for name, end in zip(fields, ends, strict=True)
    }


def value_text(value: Any) -> str:
    """A value in a label or a table: 0.25, on, 64-96, random."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return "-".join(value_text(part) for part in value) or "none"
    return str(value) or "none"


# ------------------------------------------------------------------------------- small parts


def _combinations(grid: Grid) -> list[dict[str, Any]]:
    if not isinstance(grid, Mapping):
        if not grid:
            raise ValueError("the grid is empty: give {field: [values]}, or [{field: value}, ...]")
        return [dict(arm) for arm in grid]
    for name, values in grid.items():
        if isinstance(values, str | Mapping) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"{name}: give the values as a list, not {values!r}")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _arm(base: Config, combination: Mapping[str, Any], fields: Sequence[str]) -> Arm:
    """An arm that has no label yet; fields: of the whole grid."""
    cfg = _in_recipe(base, combination.get("preset", base.preset))
    names: dict[str, str] = {}
    code: dict[str, SlotText] = {}
    for name, value in combination.items():
        if name in SLOTS and not isinstance(value, str):
            if getattr(value, "__name__", "") == "<lambda>":
                raise ValueError(f"{name} is a lambda: write it with def, so that it has a name")
            text = code[SLOTS[name]] = read_slots({SLOTS[name]: value})[SLOTS[name]]
            names[name], value = text.object, text.address
        set_field(cfg, name, value)
    cfg = from_dict(to_dict(cfg))  # its error names a field of another type
    values = flat(cfg)
    for name, other in OVERRIDDEN.items():
        if name in fields and values[other]:
            raise ValueError(
                f"{name} has no effect while {other}={values[other]}: put {other} in the grid, or "
                "set it to 0 in the base"
            )
    return Arm("", {name: values[name] for name in fields} | names, cfg, code)


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
