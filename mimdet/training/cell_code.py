"""Parts written in a notebook cell, kept with the run that used them.

A sampler or stem passed to `build_detector` may be defined anywhere, also in a cell that will be
gone tomorrow. Its source and a sha256 go into the run; reading it back executes it, so that needs
the reader's consent.
"""

import __future__

import ast
import builtins
import dis
import hashlib
import inspect
import linecache
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Literal

from mimdet.files import write_json, write_text

HEADER = """import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


"""


@dataclass(frozen=True, slots=True)
class SlotText:
    """A part as text, which stays what it is when its cell or file is changed."""

    kind: Literal["function", "class"]
    object: str
    """Its name in the text."""
    text: str

    @property
    def sha256(self) -> str:
        return _sha256(self.text)


def read_slots(slots: Mapping[str, Any]) -> dict[str, SlotText]:
    """The text of every part that was passed in as an object, by slot name.

    Raises ValueError for a part whose text does not stand on its own: it may use torch, F, nn,
    Tensor and math; everything else it must import inside. And for one whose file was changed since
    it was imported.
    """
    texts = {}
    for name, part in slots.items():
        is_function = inspect.isfunction(part)
        definition = part if is_function or inspect.isclass(part) else type(part)
        try:
            source = HEADER + textwrap.dedent(source_of(definition))
        except (OSError, TypeError) as error:
            raise ValueError(
                f"the source of the {name} {part!r} cannot be read, so the run could not be loaded "
                "again: define it with def or class in a cell or a file"
            ) from error
        if is_function:
            _check_self_contained(name, part)
        else:
            _check_default_constructor(name, definition)
        _check_current(name, definition, source)
        kind: Literal["function", "class"] = "function" if is_function else "class"
        texts[name] = SlotText(kind, definition.__name__, source)
    return texts


def write_slots(folder: Path, texts: Mapping[str, SlotText]) -> None:
    """Write `slots/<name>.py` and its sha256 for every part."""
    for name, part in texts.items():
        write_text(folder / f"{name}.py", part.text)
    if texts:
        write_json(folder / "slots.json", slots_index(texts))


def slots_index(texts: Mapping[str, SlotText]) -> dict[str, dict[str, str]]:
    """What stands in slots.json."""
    return {
        name: {"kind": part.kind, "object": part.object, "sha256": part.sha256}
        for name, part in texts.items()
    }


def save_slots(folder: Path, slots: Mapping[str, Any]) -> None:
    """`read_slots`, then `write_slots`."""
    write_slots(folder, read_slots(slots))


def load_slots(folder: Path, trust_code: bool) -> dict[str, Any]:
    """The parts of a run, by slot name. PermissionError without consent; ValueError if edited."""
    import json

    if not (folder / "slots.json").exists():
        return {}
    index = json.loads((folder / "slots.json").read_text())
    if not trust_code:
        raise PermissionError(
            f"{folder} holds code written for this run ({', '.join(sorted(index))}). Read it; if "
            "you trust it, load with trust_code=True."
        )
    slots = {}
    for name, entry in index.items():
        path = folder / f"{name}.py"
        source = path.read_text(encoding="utf-8")
        if _sha256(source) != entry["sha256"]:
            raise ValueError(f"{path} was changed after the run wrote it: its sha256 differs")
        module = ModuleType(f"mimdet_slot_{name}_{entry['sha256'][:12]}")
        module.__file__ = str(path)
        sys.modules[module.__name__] = module  # so that the source of a class is found again
        exec(compile(source, str(path), "exec"), module.__dict__)
        part = getattr(module, entry["object"])
        slots[name] = part if entry["kind"] == "function" else part()
    return slots


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


def _check_self_contained(name: str, function: Any) -> None:
    allowed = {"math", "torch", "F", "Tensor", "nn", function.__name__}
    outside = sorted(_names_outside(function) - allowed)
    if outside:
        raise ValueError(
            f"the {name} {function.__name__} uses {', '.join(outside)} from outside itself: move "
            "it inside the function, so that the run can be loaded again"
        )


def _names_outside(function: Any) -> set[str]:
    """Names that a function takes from around it, builtins left out.

    `inspect.getclosurevars` also counts what is imported inside, where the notebook has a global of
    that name.
    """
    names, codes = set(function.__code__.co_freevars), [function.__code__]
    for code in codes:  # grows by the functions inside
        codes += [part for part in code.co_consts if isinstance(part, CodeType)]
        names |= {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return {name for name in names if name not in vars(builtins)}


def _check_current(name: str, definition: Any, source: str) -> None:
    """ValueError when the part in memory was made from another text than `source`.

    Python reads a text from its file when it is asked for, and by line numbers. So every function
    in memory must be one that `source` compiles to.
    """
    inside = [definition] if inspect.isfunction(definition) else vars(definition).values()
    functions = [inspect.unwrap(part) for part in inside if inspect.isfunction(part)]
    for code in (function.__code__ for function in functions):
        flags = (
            code.co_flags & __future__.annotations.compiler_flag
        )  # `from __future__ import annotations`
        written = _codes_in(compile(source, name, "exec", flags, dont_inherit=True))
        generated = code.co_filename == "<string>"  # by @dataclass, for example
        enclosed = set(code.co_freevars) - {"__class__"}  # compiles differently outside
        if generated or enclosed or any(_same_code(code, other) for other in written):
            continue
        raise ValueError(
            f"the text of the {name} {definition.__name__} was changed since it was imported: "
            "import it again (restart the kernel), so that what is kept is what runs"
        )


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    yield code
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _codes_in(part)


def _same_code(a: CodeType, b: CodeType) -> bool:
    """Equal but for the place of their text."""
    if (a.co_name, a.co_code, a.co_names) != (b.co_name, b.co_code, b.co_names):
        return False
    if (a.co_varnames, len(a.co_consts)) != (b.co_varnames, len(b.co_consts)):
        return False
    for x, y in zip(a.co_consts, b.co_consts, strict=True):
        both_code = isinstance(x, CodeType) and isinstance(y, CodeType)
        if type(x) is not type(y) or not (_same_code(x, y) if both_code else x == y):
            return False
    return True


def _check_default_constructor(name: str, kind: type) -> None:
    required = [
        p.name
        for p in inspect.signature(kind).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if required:
        raise ValueError(
            f"the {name} {kind.__name__} needs {', '.join(required)} to be built: give every "
            "constructor argument a default, so that the run can be loaded again"
        )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
