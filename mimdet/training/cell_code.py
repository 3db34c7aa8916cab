"""Parts written in a notebook cell, kept with the run that used them.

A sampler or stem passed to `build_detector` may be defined anywhere, also in a cell that will be
gone tomorrow. Its source and a sha256 go into the run; reading it back executes it, so that needs
the reader's consent.
"""

import ast
import builtins
import dis
import hashlib
import inspect
import linecache
import sys
import textwrap
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from mimdet.files import write_json, write_text

HEADER = """import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


"""


def save_slots(folder: Path, slots: dict[str, Any]) -> None:
    """Write `slots/<name>.py` and its sha256 for every part that was passed in as an object.

    Raises ValueError for a part whose source does not stand on its own: it may use torch, F, nn,
    Tensor and math; everything else it must import inside.
    """
    index = {}
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
        write_text(folder / f"{name}.py", source)
        index[name] = {
            "kind": "function" if is_function else "class",
            "object": definition.__name__,
            "sha256": _sha256(source),
        }
    if index:
        write_json(folder / "slots.json", index)


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
