"""Can each sanity check of a notebook fail, and did it run?

Of `check(text, condition, ...)` every operand of `and` is read: it may be no literal, no
comparison of a thing with itself, no `len(x) >= 0`, and no flag that is never set to anything
false; a name that its cell assigns once stands for what is assigned. That a fault of the library
is noticed is not proven so: test_checks.py breaks the library to see it. Whether every check ran
is asked in the kernel, by a hidden first cell that takes the place of `mimdet.check`.
"""

import ast
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from tools.notebooks import code_of, tags

NEVER_NEGATIVE = {"len", "abs", "norm", "numel", "std", "var", "square"}
PASS_ON = {"max", "min", "mean", "sum", "item", "float", "int", "round"}
Definitions = dict[str, list[ast.expr | None]]
"""What a cell assigns to each of its names; None for a loop, an import and the like."""

RECORD = """\
import sys
import mimdet
checks_that_ran = set()
def check(text, condition, why="", *, original=mimdet.check, **more):
    checks_that_ran.add((len(In) - 1, sys._getframe(1).f_lineno))
    original(text, condition, why, **more)
mimdet.check = check"""


def _called(node: ast.AST) -> str:
    """`f` of f(...) and of x.f(...), else nothing."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", getattr(function, "id", ""))


def _never_negative(node: ast.expr, known: Definitions) -> bool:
    node = _written_out(node, known)
    while isinstance(node, ast.Call) and _called(node) in PASS_ON:
        node = node.func.value if isinstance(node.func, ast.Attribute) else node.args[0]
    return _called(node) in NEVER_NEGATIVE


def _written_out(node: ast.expr, known: Definitions) -> ast.expr:
    """What a name of the cell stands for, if it is assigned once."""
    values = known.get(node.id, []) if isinstance(node, ast.Name) else []
    return values[0] if len(values) == 1 and values[0] is not None else node


def _is_true_word(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and bool(node.value)


def _always_true(node: ast.expr, known: Definitions) -> bool:
    node = _written_out(node, known)
    if isinstance(node, ast.Name):  # a flag
        values = known.get(node.id, [])
        return bool(values) and all(map(_is_true_word, values))
    if isinstance(node, ast.BoolOp):
        some = any if isinstance(node.op, ast.Or) else all
        return some(_always_true(value, known) for value in node.values)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        left, operator, right = node.left, node.ops[0], node.comparators[0]
        if ast.unparse(left) == ast.unparse(right):
            return True
        if isinstance(operator, ast.GtE) and ast.unparse(right) == "0":
            return _never_negative(left, known)
    return not any(isinstance(part, ast.Name) for part in ast.walk(node))


def operands(node: ast.expr, known: Definitions) -> Iterator[ast.expr]:
    """Of `and`: each must be able to fail."""
    node = _written_out(node, known)
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        for value in node.values:
            yield from operands(value, known)
    else:
        yield node


def checks_of(source: str) -> dict[int, tuple[str, list[str]]]:
    """Line of each check of a cell -> its text, and those of its operands that cannot fail."""
    nodes = list(ast.walk(ast.parse(source)))
    known: Definitions = defaultdict(list)
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            known[node.id].append(None)
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values = known[node.targets[0].id]
            values[values.index(None)] = node.value
    found = {}
    for node in nodes:
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and _called(node) == "check"
        ):
            wrong = [o for o in operands(node.args[1], known) if _always_true(o, known)]
            found[node.lineno] = (ast.unparse(node.args[0]), [ast.unparse(o) for o in wrong])
    return found


def add_to(notebook: NotebookNode) -> None:
    """Two hidden cells: one that records which checks run, one that prints it."""
    notebook.cells.insert(0, nbformat.v4.new_code_cell(RECORD))
    last = "import json\nprint(json.dumps(sorted(checks_that_ran)))"
    notebook.cells.append(nbformat.v4.new_code_cell(last))


def vacuous(notebook: NotebookNode) -> list[str]:
    """The checks of an executed notebook that cannot fail or did not run."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    ran = {(cell, line) for cell, line in json.loads(cells[-1].outputs[0]["text"])}
    problems = []
    for number, cell in enumerate(cells[1:-1], start=2):
        if "install" in tags(cell):
            continue
        for line, (text, wrong) in checks_of(code_of(cell)).items():
            where = f"code cell {number}, {text}"
            problems += [f"{where}: nothing makes it false: {operand}" for operand in wrong]
            problems += [] if (number, line) in ran else [f"{where}: never ran"]
    return problems


def write_source(folder: Path, name: str, text: str) -> Path:
    """A notebook's source in a folder of its own, where the tool expects it."""
    source = folder / "py" / f"{name}.py"
    source.parent.mkdir(exist_ok=True)
    source.write_text(text)
    return source
