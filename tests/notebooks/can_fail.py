"""Can each sanity check of a notebook fail? Asked in its kernel, while it runs.

A hidden first cell installs a transformer of cells: it leaves their source alone, but hands every
`check(text, condition, ...)` to `Guard.prove` as well. There the condition is written out (a name
that its cell assigns exactly once is replaced by that expression), split at its `and`s, and its
parts are replaced, outermost first, by broken values (broken_values.py): a number changed, a bool
negated, a tensor with one element changed or one fewer, a list with an item doubled, or the value
of another part. Parts beside the broken one keep the value they had, so little is computed again.
One broken value must make each operand of `and` false; an error does not count.

What this proves: the condition depends on what the cells computed, so it is no literal, no
comparison of a thing with itself, and no `len(x) >= 0`. What it does not: that the broken value
could ever occur, or that a bug of the library would produce it (test_checks.py breaks the library
for some); or that a flag set in an `except` is set for the right reason.
"""

import ast
import contextlib
import copy
import dataclasses
import io
import itertools
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import torch
from nbformat import NotebookNode

from tests.notebooks.broken_values import broken
from tools.notebooks import ROOT

KEEP, PROVE, BROKEN = "__keep__", "__prove__", "__broken__"
PARTS = (ast.Name, ast.Attribute, ast.Subscript, ast.Call, ast.ListComp, ast.SetComp, ast.DictComp)
PLAIN = (bool, int, float, str, list, tuple, set, dict, np.generic, np.ndarray, torch.Tensor)
STORED = (ast.Name, ast.Attribute, ast.Subscript)
DISPLAYS = (ast.List, ast.Tuple, ast.Set, ast.Dict)
NEVER_NEGATIVE = {"len", "abs", "norm", "numel", "std", "var", "square"}
PASS_ON = {"max", "min", "mean", "sum", "item", "float", "int", "round"}
HEAVY = "train evaluate fit experiment predict detect main paint next load_detector record"
HEAVY_CALLS = {*HEAVY.split(), "cost_of", "find_errors", "coco_metrics", "compare_runs", "load_mae"}


def _called(node: ast.AST) -> str:
    """`f` of f(...) and of x.f(...), else nothing."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", getattr(function, "id", ""))


def _never_negative(node: ast.AST) -> bool:
    while _called(node) in PASS_ON:
        node = node.func.value if isinstance(node.func, ast.Attribute) else node.args[0]
    return _called(node) in NEVER_NEGATIVE


def _is_check(node: ast.AST) -> bool:
    return _called(node) == "check" and isinstance(node.func, ast.Name)


def _is_bool(value: Any) -> bool:
    scalar = isinstance(value, torch.Tensor) and value.dtype == torch.bool and value.dim() == 0
    return scalar or isinstance(value, (bool, np.bool_))


def _names(node: ast.AST, context: type) -> set[str]:
    found = (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, context))
    return {n.id for n in found} | {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}


def _parts(node: ast.AST) -> list[ast.AST]:
    """Outermost first; not what stands inside a call that takes long or has effects."""
    found = [node]
    for part in found:
        if _called(part) not in HEAVY_CALLS:
            found += ast.iter_child_nodes(part)
    return found


def _outside_functions(tree: ast.AST) -> list[ast.AST]:
    found = [tree]
    for node in found:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            found += ast.iter_child_nodes(node)
    return found


def _operands(node: ast.AST) -> list[ast.AST]:
    """Of `and`: each must be able to fail."""
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        return [operand for value in node.values for operand in _operands(value)]
    return [node]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one is other or torch.equal(one, other)
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    return one is other or bool(one == other)


class Wrap(ast.NodeTransformer):
    """Report the value of every numbered part, and every condition, as they are computed."""

    def visit(self, node: ast.AST) -> ast.AST:
        marks = [(getattr(node, "slot", None), KEEP), (getattr(node, "site", None), PROVE)]
        node = self.generic_visit(node)
        for number, use in marks:
            if number is not None:
                node = ast.Call(ast.Name(use, ast.Load()), [ast.Constant(number), node], [])
        return node


@dataclasses.dataclass
class Site:
    """A check: where, its condition, the names it may use, and what is not yet known to fail."""

    cell: int
    text: str
    condition: ast.AST
    definitions: dict[str, ast.AST]
    assigned: dict[str, list[ast.AST | None]]
    left: set[str] | None = None  # operands; None before it ran
    runs: int = 0


class Guard:
    """The transformer, and what it knows about each check."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        self.namespace, self.numbers, self.cell = namespace, itertools.count(), 0
        self.kept: dict[int, Any] = {}
        self.sites: list[Site] = []
        namespace.update({KEEP: self.keep, PROVE: self.prove})

    def visit(self, tree: ast.Module) -> ast.Module:
        self.cell += 1
        nodes = _outside_functions(tree)
        checks = [node for node in nodes if _is_check(node)]
        if not checks:
            return tree
        self.kept.clear()
        assigned: dict[str, list[ast.AST | None]] = defaultdict(list)
        for name in (n for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)):
            assigned[name.id].append(None)
        for node in nodes:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                values = assigned[node.targets[0].id]
                values[values.index(None)] = node.value
        definitions = {}
        for name, values in assigned.items():
            value = values[0]
            if len(values) > 1 or value is None or isinstance(value, DISPLAYS):
                continue
            if not {*map(_called, ast.walk(value))} & HEAVY_CALLS:
                self.number(value)
                if not isinstance(value, ast.Constant) and not hasattr(value, "slot"):
                    value.slot = next(self.numbers)  # it has a name, so it is a part
                definitions[name] = copy.deepcopy(value)
        for call in checks:
            self.number(call.args[1])
            before = {n: v for n, v in definitions.items() if v.lineno <= call.lineno}
            text, condition = ast.unparse(call.args[0]), copy.deepcopy(call.args[1])
            self.sites.append(Site(self.cell, text, condition, before, assigned))
            call.args[1].site = len(self.sites) - 1
        return ast.fix_missing_locations(Wrap().visit(tree))

    def number(self, tree: ast.AST) -> None:
        """A slot for every part with a value of its own: without names of a comprehension."""
        bound = _names(tree, ast.Store)
        functions = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for part in ast.walk(tree):
            free = _names(part, ast.Load) - _names(part, ast.Store)
            read = isinstance(getattr(part, "ctx", ast.Load()), ast.Load)
            if isinstance(part, PARTS) and read and id(part) not in functions and not free & bound:
                part.slot = next(self.numbers)

    def keep(self, slot: int, value: Any) -> Any:
        if isinstance(value, PLAIN):  # nothing else: an object kept alive might hold a lock
            self.kept[slot] = value
        return value

    def prove(self, number: int, value: Any) -> Any:
        site = self.sites[number]
        if site.left != set() and site.runs < 3:  # in a loop one of three rounds must do
            with torch.random.fork_rng([]), contextlib.redirect_stdout(io.StringIO()):
                operands = _operands(self.written_out(site.condition, site.definitions))
                said = {ast.unparse(operand): operand for operand in operands}
                site.left = set(said) if site.left is None else site.left
                site.left -= {
                    t for t, o in said.items() if t in site.left and self.can_fail(o, site)
                }
        site.runs += 1
        return value

    def written_out(self, tree: ast.AST, definitions: dict[str, ast.AST]) -> ast.AST:
        """With the expressions of its names; a name stays where that has another value by now."""
        guard = self

        class WriteOut(ast.NodeTransformer):
            def visit_Name(self, node: ast.Name) -> ast.AST:
                now = guard.namespace.get(node.id)
                if node.id not in definitions or not isinstance(now, PLAIN):
                    return node
                rest = {n: value for n, value in definitions.items() if n != node.id}
                full = guard.written_out(definitions[node.id], rest)
                full.stands_for = node.id  # type: ignore[attr-defined]
                with contextlib.suppress(Exception):
                    return full if _equal(guard.compute(full), now) else node
                return node

        return WriteOut().visit(copy.deepcopy(tree))

    def can_fail(self, condition: ast.AST, site: Site) -> bool:
        """Whether a broken value of one of its parts makes this condition false."""
        core = condition
        while isinstance(core, ast.UnaryOp) and isinstance(core.op, ast.Not):
            core = core.operand
        if isinstance(core, ast.Name):  # a flag: set to another value somewhere, or by a loop
            values = site.assigned.get(core.id, [])
            return any(not (isinstance(v, ast.Constant) and v.value) for v in values)
        parts: dict[Any, list[ast.AST]] = defaultdict(list)  # equal ones are broken together
        for part in _parts(condition):
            if hasattr(part, "slot"):  # what is stored may have changed from one to the other
                stored = id(self.current(part)) if isinstance(part, STORED) else 0
                parts[ast.unparse(part), stored].append(part)
        values = [self.current(same[0]) for same in parts.values()]
        words = [n.value for n in ast.walk(condition) if isinstance(n, ast.Constant)]
        for value, same in zip(values, parts.values(), strict=True):
            slots = [part.slot for part in same]
            if _is_bool(value) and not isinstance(same[0], STORED):
                continue  # an answer: what was asked about is broken instead
            known = slots[0] in self.kept
            if not self.holds(condition, slots if known else (), value):
                continue  # computed again it does not even hold
            others = [other for other in (*values, *words) if type(other) is type(value)]
            if isinstance(value, list):
                others += [[*value, word] for word in words]
            if isinstance(value, torch.Tensor) and "isfinite" in ast.unparse(condition):
                others += [value * float("nan")]  # anywhere else it fails every comparison
            signed = not _never_negative(same[0])
            # Two names of equal expressions: does the second give what the first gave?
            alone = [[part.slot] for part in same if hasattr(part, "stands_for")]
            for wrong in itertools.chain(broken(value, signed), others):
                if any(self.holds(condition, places, wrong) is False for places in (slots, *alone)):
                    return True
        return False

    def current(self, part: ast.AST) -> Any:
        """The value of a numbered part, None where it is not known."""
        name = part.id if isinstance(part, ast.Name) else None
        return self.kept.get(part.slot, self.namespace.get(name))

    def holds(self, condition: ast.AST, slots: Sequence[int], value: Any) -> bool | None:
        """Whether it is true with `value` in these slots; None when that raises an error."""
        try:
            return bool(self.compute(condition, slots, value))
        except Exception:
            return None

    def compute(self, tree: ast.AST, slots: Sequence[int] = (), value: Any = None) -> Any:
        """What an expression is: with `value` in these slots, with what was kept in the others."""
        kept = self.kept

        class Fill(ast.NodeTransformer):
            def visit(self, node: ast.AST) -> ast.AST:
                slot = getattr(node, "slot", None)
                if slot in slots:
                    return ast.Name(BROKEN, ast.Load())
                inside = {getattr(part, "slot", None) for part in ast.walk(node)}
                if slot in kept and not inside & set(slots):
                    return ast.Name(f"__kept_{slot}", ast.Load())
                return self.generic_visit(node)

        expression = ast.fix_missing_locations(ast.Expression(Fill().visit(copy.deepcopy(tree))))
        values = {f"__kept_{slot}": held for slot, held in kept.items()}
        return eval(
            compile(expression, "<check>", "eval"), {**self.namespace, **values, BROKEN: value}
        )

    def report(self) -> str:
        known = [None if site.left is None else sorted(site.left) for site in self.sites]
        return json.dumps(
            [(site.cell, site.text, left) for site, left in zip(self.sites, known, strict=True)]
        )


# ------------------------------------------------------------------------------- for the test


INSTALL = f"""\
import sys
sys.path.append({str(ROOT)!r})
from tests.notebooks import can_fail
can_fail_guard = can_fail.Guard(get_ipython().user_ns)
get_ipython().ast_transformers.append(can_fail_guard)"""


def write_source(folder: Path, name: str, text: str) -> Path:
    """A notebook's source in a folder of its own, where the tool expects it."""
    source = folder / "py" / f"{name}.py"
    source.parent.mkdir(exist_ok=True)
    source.write_text(text)
    return source


def add_to(notebook: NotebookNode) -> None:
    """Two hidden cells: one that installs the guard, one that prints what it found."""
    notebook.cells.insert(0, nbformat.v4.new_code_cell(INSTALL))
    notebook.cells.append(nbformat.v4.new_code_cell("print(can_fail_guard.report())"))


def vacuous(notebook: NotebookNode) -> list[str]:
    """The checks of an executed notebook that were not shown to be able to fail."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    rows = json.loads(cells[-1].outputs[0]["text"])
    written = sum(
        _is_check(node)
        for cell in cells
        if "%pip" not in cell.source
        for node in ast.walk(ast.parse(cell.source))
    )
    assert len(rows) == written, f"{written} checks are written, the kernel saw {len(rows)}"
    return [
        f"code cell {cell}, {text}: "
        + ("never ran" if left is None else f"nothing made it false: {' and '.join(left)}")
        for cell, text, left in rows
        if left != []
    ]
