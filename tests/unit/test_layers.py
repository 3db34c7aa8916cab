"""Imports inside the package go one way only, and heavy libraries load only where they are used.

The import statements are read, not executed, also those inside functions.
"""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tools import count_code

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 500  # of a file, blank ones and docstrings included
MAX_FILES = 100
MAX_CODE = {"the package": 16_330, "the core path of the paper": 4_500}  # code lines

# A part may import from the rows above its own, and from itself. The parts of the first row are
# plain data and may use each other; any other two parts of one row may not.
ORDER = (
    ("config", "presets", "structures", "images", "files", "console", "processes", "downloads"),
    ("models", "data"),
    ("inference",),
    ("analysis",),
    ("training",),
    ("experiments",),
    ("viz",),
    ("demo", "playground", "prepare"),
    ("findings",),
    ("commands",),
    ("cli", "notebook"),
    ("__main__",),
)
ROW = {part: row for row, parts in enumerate(ORDER) for part in parts}

# Modules (or whole parts) that may import a slow library while they load. Elsewhere the import
# belongs into the function that needs it.
MAY_LOAD = {
    "timm": ("models",),
    "torchvision.models": ("models",),
    "datasets": ("data",),
    "pycocotools": ("structures", "data", "analysis"),
    "faster_coco_eval": ("analysis",),
    "pandas": ("analysis", "experiments"),
    "matplotlib": ("viz",),
    "IPython": ("viz", "notebook"),
}
# Only these may import widget libraries at all: everything else must run without Jupyter.
WIDGETS = ("ipywidgets", "anywidget")
MAY_USE_WIDGETS = "viz.widgets"


class Import(NamedTuple):
    line: int
    name: str  # dotted: "mimdet.models.vit", "torchvision.models.detection"
    at_load: bool  # False inside a function


def imports_of(source: str, module: str) -> list[Import]:
    """Every import of a module; `module` is its dotted name within mimdet, for relative imports."""
    inside_functions: set[ast.AST] = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inside_functions.update(ast.walk(node))

    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = f"mimdet.{module}".split(".")[: -node.level]
                base = ".".join([*package, *filter(None, [base])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        found += [Import(node.lineno, n, node not in inside_functions) for n in names]
    return found


def problems_of(source: str, module: str) -> list[str]:
    """What is wrong with the imports of one module, each with its remedy."""
    part = module.split(".")[0]
    problems = []
    if module not in ("", "__init__") and part not in ROW:
        problems.append(
            f"mimdet/{part}: a new part of the package. Give it a row in ORDER of this test and a "
            "line in docs/map.md"
        )
    for line, name, at_load in imports_of(source, module):
        where = f"mimdet/{module.replace('.', '/')}.py:{line} imports {name}"
        if name.split(".")[0] == "mimdet":
            problems += _wrong_arrow(part, name, where)
        if name.split(".")[0] in WIDGETS and not f"{module}.".startswith(f"{MAY_USE_WIDGETS}."):
            problems.append(f"{where}: only {MAY_USE_WIDGETS} may, so that all else runs anywhere")
        library = next((heavy for heavy in MAY_LOAD if f"{name}.".startswith(f"{heavy}.")), None)
        if at_load and library and part not in MAY_LOAD[library]:
            problems.append(f"{where} while it loads: move that into the function that needs it")
    return problems


def _wrong_arrow(part: str, name: str, where: str) -> list[str]:
    target = (name.split(".") + [""])[1]
    if target == "__version__" or target == part:
        return []
    if target not in ROW:
        return [f"{where}: import it from the module that defines it, not from the package"]
    if part not in ROW:
        return [f"{where}: the package itself imports nothing; add the name to _NAMES_OF there"]
    if ROW[target] < ROW[part] or ROW[target] == ROW[part] == 0:
        return []
    if ROW[target] == ROW[part]:
        reason = f"{part} and {target} stand side by side and do not know each other"
    else:
        reason = f"{target} is built on {part}, not the other way round"
    remedy = "pass the value in as an argument, or move the shared piece to a row above both"
    return [f"{where}: {reason}; {remedy}"]


def modules() -> dict[str, Path]:
    """Dotted name within mimdet -> file."""
    package = ROOT / "mimdet"
    names = {}
    for path in sorted(package.rglob("*.py")):
        names[".".join(path.relative_to(package).with_suffix("").parts)] = path
    return names


@pytest.mark.parametrize("module", modules())
def test_imports_go_one_way(module: str) -> None:
    problems = problems_of(modules()[module].read_text(encoding="utf-8"), module)
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("models.vit", "from mimdet.data.coco import CocoDataset", "side by side"),
        ("data.coco", "def f():\n    from mimdet.models import vit", "side by side"),
        ("models.vit", "from mimdet.training.run import Run", "training is built on models"),
        ("models.vit", "from ..training import run", "training is built on models"),
        ("analysis.evaluate", "import mimdet.viz.figures as f", "viz is built on analysis"),
        ("config", "from mimdet import presets, train", "from the module that defines it"),
        ("__init__", "from mimdet.config import Config", "add the name to _NAMES_OF"),
        ("__init__", "import timm", "while it loads"),
        ("presets", "import torchvision.models.detection", "while it loads"),
        ("data.coco", "if True:\n    import matplotlib.pyplot as plt", "while it loads"),
        ("viz.figures", "def f():\n    import ipywidgets", "runs anywhere"),
        ("training.train", "class A:\n    import anywidget", "runs anywhere"),
        ("helpers.misc", "", "a new part of the package"),
    ],
)
def test_wrong_imports_are_found(module: str, source: str, said: str) -> None:
    assert said in "\n".join(problems_of(source, module))


@pytest.mark.parametrize(
    ("statement", "not_loaded"),
    [
        ("import mimdet", {"torch", "numpy"}),
        ("from mimdet import Config, presets", {"torch", "numpy"}),
        ("import mimdet.viz", {"torch", "numpy"}),
        ("from mimdet import Detections", set()),
    ],
)
def test_what_an_import_costs(statement: str, not_loaded: set[str]) -> None:
    """Reading a configuration must not take the seconds that the detector's libraries take."""
    not_loaded = not_loaded | set(MAY_LOAD) | set(WIDGETS)
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not_loaded & set(done.stdout.split()) == set()


@pytest.mark.parametrize("module", modules())
def test_files_are_short(module: str) -> None:
    lines = len(modules()[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{module} has {lines} lines: one idea a file; split it by idea"


def test_the_package_is_compact() -> None:
    """An issue that adds to it may raise a budget by what it adds, and says so."""
    counts, core = count_code.count(count_code.PACKAGE), count_code.core_files()
    lines = {"the package": sum(counts.values())}
    lines["the core path of the paper"] = sum(counts[name] for name in core)
    too_long = [
        f"{what} has {lines[what]:,} code lines, more than {most:,}: see python tools/count_code.py"
        for what, most in MAX_CODE.items()
        if lines[what] > most
    ]
    if len(counts) > MAX_FILES:
        too_long.append(f"the package has {len(counts)} files, more than {MAX_FILES}")
    assert not too_long, "\n".join(too_long)
    gone = [name for name in count_code.CORE if not list(count_code.PACKAGE.glob(name))]
    assert not gone, f"tools/count_code.py: CORE names {gone}, which are not there"


def test_code_lines_are_counted_without_comments_and_docstrings() -> None:
    source = '''"""A docstring
of two lines."""

X = 1  # a comment behind code
# a comment alone

def f(
    a,
):
    """A docstring."""
    return """a string
    of two lines"""
'''
    assert count_code.code_lines(source) == 6


def test_no_import_cycle() -> None:
    """Imports inside functions count too. CycleError names the modules of a cycle."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        names = {i.name.partition(".")[2] for i in imports_of(path.read_text("utf-8"), module)}
        targets = {name if name in known else name.rpartition(".")[0] for name in names}
        graph[module] = targets & known.keys() - {module}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_map_of_the_code_lists_every_module() -> None:
    shown = (ROOT / "docs" / "map.md").read_text(encoding="utf-8")
    names = {path.name for path in modules().values() if path.name != "__init__.py"}
    missing = sorted(name for name in names if name not in shown)
    assert not missing, f"docs/map.md does not show {missing}"
