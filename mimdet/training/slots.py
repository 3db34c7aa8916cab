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
import json
import linecache
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Literal

import torch

from mimdet.files import write_json, write_text

HEADER = """import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from mimdet.models.sampling import Grid
from mimdet.models.stem import StemFeatures


"""
GENERATED = "<string>"
"""File name of methods that no text holds: those of @dataclass."""
HEADER_NAMES = ("math", "torch", "F", "nn", "Tensor", "Generator", "Grid", "StemFeatures")


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

    Raises ValueError for a part whose text does not stand on its own: it may use HEADER_NAMES;
    everything else it must import inside. For an object that its class does not make without
    arguments. And for a part whose file was changed since it was imported.
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
        kind: Literal["function", "class"] = "function" if is_function else "class"
        text = SlotText(kind, definition.__name__, source)
        _check_current(name, definition)
        if is_function:
            _check_self_contained(name, part)
        else:
            _check_default_constructor(name, definition)
            for method in filter(inspect.isfunction, vars(definition).values()):
                if method.__code__.co_filename != GENERATED:
                    _check_self_contained(name, method, definition.__name__)
        read_back = _executed(name, text, Path(f"{name}.py"), f"mimdet_slot_{name}_read_back")
        if not is_function and not inspect.isclass(part):
            _check_rebuilt(name, part, read_back)
        texts[name] = text
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
        kept = SlotText(entry["kind"], entry["object"], source)
        part = _executed(name, kept, path, f"mimdet_slot_{name}_{kept.sha256[:12]}")
        slots[name] = part if entry["kind"] == "function" else part()
    return slots


def check_slots(run: Path, texts: Mapping[str, SlotText]) -> None:
    """ValueError when the run holds parts with other code than `texts`."""
    index = run / "slots" / "slots.json"
    old = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {}
    new = slots_index(texts)
    if new != old:
        names = ", ".join(sorted({*old, *new}))
        raise ValueError(
            f"{run} holds a run with other code for: {names}. Use another run name, or the old "
            f"code to resume it; `mimdet resume {run} --trust-code` takes the code it holds."
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


def _executed(name: str, part: SlotText, path: Path, module_name: str) -> Any:
    """The function or class that a text defines, in a module `module_name` of its own.

    Raises ValueError for a name that it lacks: of a default value, an annotation, a base class.
    """
    module = ModuleType(module_name)
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # so that the source of a class is found again
    try:
        exec(compile(part.text, str(path), "exec", dont_inherit=True), module.__dict__)
    except NameError as error:
        raise ValueError(_outside(name, part.object, [str(error.name)])) from error
    return getattr(module, part.object)


def _check_self_contained(name: str, function: Any, part: str = "") -> None:
    function = inspect.unwrap(function)
    allowed = {*HEADER_NAMES, function.__name__, part, "__class__"}
    outside = sorted(_names_outside(function) - allowed)
    if outside:
        raise ValueError(_outside(name, part or function.__name__, outside))


def _outside(name: str, part: str, names: Sequence[str]) -> str:
    return (
        f"the {name} {part} uses {', '.join(names)} from outside itself: move it inside the "
        f"function, so that the run can be loaded again (known are {', '.join(HEADER_NAMES)})"
    )


def _check_rebuilt(name: str, part: Any, kind: Any) -> None:
    """ValueError when `kind()` is another object than `part`: a run makes its own, like this."""
    with torch.random.fork_rng(devices=[]):  # a stem draws its weights
        fresh = kind()
    differ = [
        key
        for key, value in vars(part).items()
        if isinstance(value, bool | int | float | str | tuple | None) and key != "training"
        if key not in vars(fresh) or vars(fresh)[key] != value
    ]
    if isinstance(part, torch.nn.Module):
        ours, theirs = part.state_dict(), fresh.state_dict()
        differ += [k for k in ours if k not in theirs or ours[k].shape != theirs[k].shape]
    if differ:
        raise ValueError(
            f"the {name} {kind.__name__}() made without arguments differs in {', '.join(differ)}: "
            "write its values as defaults of the class, so that the run can be loaded again"
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


def _check_current(name: str, definition: Any) -> None:
    """ValueError when the file or cell of a part holds another text than it was made from.

    Python takes a text from its file when it is asked for, and by line numbers. So every function
    in memory must be one that the file still compiles to, in the same line.
    """
    inside = [definition] if inspect.isfunction(definition) else vars(definition).values()
    functions = [inspect.unwrap(part) for part in inside if inspect.isfunction(part)]
    for code in (function.__code__ for function in functions):
        if code.co_filename == GENERATED:
            continue
        linecache.checkcache(code.co_filename)
        text = "".join(linecache.getlines(code.co_filename))
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT  # as in a cell
        written = _codes_in(compile(text, code.co_filename, "exec", flags, dont_inherit=True))
        if not any(_same_code(code, other) for other in written):
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
    """Equal, in the same line; the name of the file does not count."""
    for field in ("co_name", "co_firstlineno", "co_code", "co_names", "co_varnames"):
        if getattr(a, field) != getattr(b, field):
            return False
    if len(a.co_consts) != len(b.co_consts):
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
