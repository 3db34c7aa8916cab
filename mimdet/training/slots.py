"""Parts written in a notebook cell, kept with the run that used them.

A part passed to `build_detector`, or the data set passed to `train`, may be defined anywhere, also
in a cell that will be gone tomorrow. Its source and a sha256 go into the run; reading it back
executes it, so that needs the reader's consent.
"""

import ast
import builtins
import hashlib
import inspect
import linecache
import symtable
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mimdet.config import Config, PretrainConfig, named_code
from mimdet.files import read_json, write_json, write_text

HEADER = """import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from mimdet.models.rcnn import Losses
from mimdet.models.sampling import Grid
from mimdet.models.stem import StemFeatures


"""
HEADER_NAMES = ("math", "torch", "F", "nn", "Tensor", "Generator", "Losses", "Grid", "StemFeatures")


@dataclass(frozen=True, slots=True)
class SlotText:
    """A part as text, which stays what it is when its cell or file is changed."""

    slot: str
    object: str
    """Name of its function or class in the text."""
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def module(self) -> str:
        return f"mimdet_slot_{self.slot}_{self.sha256[:12]}"

    @property
    def address(self) -> str:
        """`module:function`, which can be imported in a process that has read the part."""
        return f"{self.module}:{self.object}"

    @property
    def entry(self) -> dict[str, str]:
        """The contents of slots.json."""
        return {"object": self.object, "sha256": self.sha256}


def read_slots(slots: Mapping[str, Any]) -> dict[str, SlotText]:
    """The text of every part that was passed in as an object, by slot name.

    Raises ValueError for a part whose text does not stand on its own: it may use HEADER_NAMES;
    everything else it must import inside. And for an object that its class, called without
    arguments, does not make again.
    """
    texts = {}
    for slot, part in slots.items():
        definition = part if inspect.isfunction(part) or inspect.isclass(part) else type(part)
        try:
            source = HEADER + textwrap.dedent(source_of(definition))
        except (OSError, TypeError) as error:
            raise ValueError(
                f"the source of the {slot} {part!r} cannot be read, so the run could not be loaded "
                "again: define it with def or class in a cell or a file"
            ) from error
        texts[slot] = SlotText(slot, definition.__name__, source)
        with torch.random.fork_rng(devices=[]):  # a stem draws its weights
            again = _made(texts[slot], Path(f"{slot}.py"))
        if definition is not part:
            _check_same(slot, part, again)
    return texts


def name_dataset(cfg: Config, texts: Mapping[str, SlotText]) -> None:
    """Say in the configuration that the data are those of the function that was given."""
    if "dataset" in texts:
        cfg.data.source = texts["dataset"].address


def write_slots(run: Path, texts: Mapping[str, SlotText]) -> None:
    """Write `slots/<name>.py` and its sha256 for every part, in place of those that were there."""
    for slot, part in texts.items():
        write_text(run / "slots" / f"{slot}.py", part.text)
    if texts or _entries(run):
        entries = {slot: part.entry for slot, part in texts.items()}
        write_json(run / "slots" / "slots.json", entries)


def load_slots(run: Path, cfg: Config | PretrainConfig, trust_code: bool) -> dict[str, Any]:
    """The parts of a run, by slot name. PermissionError as `check_trust`; ValueError if edited."""
    check_trust(run, cfg, trust_code)
    slots = {}
    for slot, entry in _entries(run).items():
        path = run / "slots" / f"{slot}.py"
        kept = SlotText(slot, entry["object"], path.read_text(encoding="utf-8"))
        if kept.entry != entry:
            raise ValueError(f"{path} was changed after the run wrote it: its sha256 differs")
        slots[slot] = _made(kept, path)
    return slots


def check_slots(run: Path, texts: Mapping[str, SlotText]) -> None:
    """ValueError when the run holds parts with other code than `texts`."""
    old, new = _entries(run), {slot: part.entry for slot, part in texts.items()}
    if new != old:
        names = ", ".join(sorted({*old, *new}))
        raise ValueError(
            f"{run} holds a run with other code for: {names}. Use another run name, or the old "
            f"code to resume it; `mimdet resume {run} --trust-code` takes the code it holds."
        )


def check_trust(run: Path, cfg: Config | PretrainConfig, trust_code: bool) -> None:
    """PermissionError where a run holds code, or names some in its configuration `cfg`."""
    code = [*_entries(run), *named_code(cfg)]
    if code and not trust_code:
        raise PermissionError(
            f"{run} holds or names code ({', '.join(sorted(code))}), under slots/ and in "
            "config.json. Read it; if you trust it, use trust_code=True (--trust-code)."
        )


def source_of(definition: Any) -> str:
    """The text of a function or class. OSError or TypeError where there is none.

    Before Python 3.13 `inspect` does not find a class that was written in a notebook cell; the file
    name of one of its methods leads to the cell's text.
    """
    try:
        return inspect.getsource(definition)
    except (OSError, TypeError):
        if not inspect.isclass(definition):
            raise
    for method in filter(inspect.isfunction, vars(definition).values()):
        cell = "".join(linecache.getlines(method.__code__.co_filename))
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, ast.ClassDef) and node.name == definition.__name__:
                return (ast.get_source_segment(cell, node) or "") + "\n"
    raise OSError(f"no text of {definition.__name__} was found")


def _entries(run: Path) -> dict[str, dict[str, str]]:
    """Slot -> `SlotText.entry` of the parts that a run holds."""
    file = run / "slots" / "slots.json"
    found: dict[str, dict[str, str]] = read_json(file) if file.exists() else {}
    return found


def _made(part: SlotText, path: Path) -> Any:
    """The function that a text defines, or an object of its class, in a module of its own.

    ValueError for a name that the text lacks, and for a class that needs arguments.
    """
    names = symtable.symtable(part.text, str(path), "exec")
    own = {symbol.get_name() for symbol in names.get_symbols() if symbol.is_assigned()}
    outside = set(_globals_in(names)) - own - set(HEADER_NAMES) - vars(builtins).keys()
    if outside:
        raise ValueError(
            f"the {part.slot} {part.object} uses {', '.join(sorted(outside))} from outside itself: "
            "move it inside the function, so that the run can be loaded again (known are "
            f"{', '.join(HEADER_NAMES)})"
        )
    module = ModuleType(part.module)
    module.__file__ = str(path)
    sys.modules[part.module] = module  # so that it can be imported, and its source is found again
    exec(compile(part.text, str(path), "exec", dont_inherit=True), module.__dict__)
    made = getattr(module, part.object)
    if inspect.isfunction(made):
        return made
    try:
        inspect.signature(made).bind()
    except TypeError as error:
        raise ValueError(
            f"the {part.slot} {part.object} cannot be built without arguments ({error}): give "
            "every constructor argument a default, so that the run can be loaded again"
        ) from None
    return made()


def _globals_in(names: symtable.SymbolTable) -> Iterator[str]:
    """Names that a text takes from its module, in all its functions and classes."""
    yield from (symbol.get_name() for symbol in names.get_symbols() if symbol.is_global())
    for part in names.get_children():
        yield from _globals_in(part)


def _check_same(slot: str, part: Any, again: Any) -> None:
    """ValueError when `again`, which a run makes for itself, is another object than `part`."""
    differ = [
        key
        for key, value in vars(part).items()
        if isinstance(value, bool | int | float | str | tuple | None) and key != "training"
        if key not in vars(again) or vars(again)[key] != value
    ]
    if isinstance(part, torch.nn.Module):
        ours, theirs = part.state_dict(), again.state_dict()
        differ += [k for k in ours if k not in theirs or ours[k].shape != theirs[k].shape]
    if differ:
        raise ValueError(
            f"the {slot} {type(part).__name__}() made without arguments differs in "
            f"{', '.join(differ)}: write its values as defaults of the class, so that the run can "
            "be loaded again"
        )
