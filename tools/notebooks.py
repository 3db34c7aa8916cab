"""Keep the notebooks in step with their sources.

    python tools/notebooks.py sync  [NAME ...]   sources -> notebooks; unchanged cells keep outputs
    python tools/notebooks.py build [NAME ...]   run the sources and store them with their outputs
    python tools/notebooks.py check              list what is wrong; exit 1 when anything is
    python tools/notebooks.py index [--check]    the README's table of notebooks
    python tools/notebooks.py grade FILE ...     what the checks say to a student's notebooks
    python tools/notebooks.py rehearse [NAME ...] [--out FILE] [--real-size] [--gpus 3x80]
                full mode, on stand-ins for COCO, released weights and GPUs (rehearsal.py)

The reviewed source of `notebooks/NN_name.ipynb` is `notebooks/py/NN_name.py` (py:percent). What
users open is the notebook, with outputs, so that pictures show where nothing can be run. Two
builds give the same file: outputs of cells tagged `timing` are not stored, nor are the times in
progress bars, folders of this machine are left out of the text, and of a panel only its picture is
stored. Every notebook gets one more cell below its title, INSTALL.
"""

import argparse
import ast
import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, too

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
MAX_BYTES = 1_500_000  # a larger file is slow to open, and sites show it as text
MAX_LINES = 15  # of a code cell: more belongs into the library
CELL_SECONDS = 600
GRADE_MINUTES = 10.0
WIDGET = "application/vnd.jupyter.widget-view+json"
INSTALL = """\
# Colab and Binder may start without the kit: this installs the clone that the notebook lies in.
# Anywhere else it does nothing.
from importlib.util import find_spec
from os import environ

hosted = "COLAB_RELEASE_TAG" in environ or "BINDER_SERVICE_HOST" in environ
if hosted and not all(map(find_spec, ("mimdet", "faster_coco_eval", "anywidget"))):
    %pip install --quiet .. anywidget
if "COLAB_RELEASE_TAG" in environ:
    from google.colab import output

    output.enable_custom_widget_manager()"""
SOLUTION = "%%solution"
"""First line of a solution's cell: `mimdet.notebook.solution`; it runs where SOLUTIONS is true."""
README = ROOT / "README.md"
START, END = "<!-- notebooks -->", "<!-- /notebooks -->"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


# ------------------------------------------------------------------------------- reading


def sources(folder: Path = FOLDER) -> list[Path]:
    """The py:percent files, in reading order."""
    return sorted((folder / "py").glob("*.py"))


def target_of(source: Path) -> Path:
    """The notebook that is built from a source."""
    return source.parent.parent / f"{source.stem}.ipynb"


def read_source(source: Path) -> NotebookNode:
    """The source and its install cell as a notebook without outputs, with ids that depend on the
    cells alone."""
    notebook = jupytext.read(source)
    cells = notebook.cells
    install = nbformat.v4.new_code_cell(INSTALL)
    install.metadata = nbformat.from_dict({"jupyter": {"source_hidden": True}, "tags": ["install"]})
    cells.insert(1 if cells and cells[0].cell_type == "markdown" else 0, install)
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: Counter[str] = Counter()
    for cell in notebook.cells:
        if "solution" in tags(cell):
            cell.source = f"{SOLUTION}\n{cell.source}"
        if {"solution", "judge"} & {*tags(cell)}:  # answers do not stand open under the questions
            cell.metadata["jupyter"] = {"source_hidden": True}
        text = f"{source.stem}\0{cell.cell_type}\0{cell.source}"
        seen[text] += 1  # equal cells need different ids
        cell["id"] = hashlib.sha256(f"{text}\0{seen[text]}".encode()).hexdigest()[:8]
    return notebook


def read_notebook(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code_hash(notebook: NotebookNode) -> str:
    """Fingerprint of the code cells: text may change without a new run, code may not."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code = "\0".join(code_of(cell) for cell in cells if "install" not in tags(cell))
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def contents(notebook: NotebookNode) -> list[tuple[str, str, str, tuple[str, ...]]]:
    """What a source decides about its notebook."""
    return [(c["id"], c.cell_type, c.source, tuple(tags(c))) for c in notebook.cells]


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def code_of(cell: NotebookNode) -> str:
    """The Python of a cell, without the magic that guards a solution."""
    return cell.source.removeprefix(f"{SOLUTION}\n")


def parameters_cell(notebook: NotebookNode) -> NotebookNode | None:
    """The code cell tagged `parameters`."""
    cells = (c for c in notebook.cells if c.cell_type == "code" and "parameters" in tags(c))
    return next(cells, None)


# ------------------------------------------------------------------------------- running


def inject(notebook: NotebookNode, **values: Any) -> None:
    """Replace values in the parameters cell. AssertionError for a name that is not assigned there.

    Libraries that do this only warn, and a misspelled parameter then tests the wrong thing.
    """
    cell = parameters_cell(notebook)
    assert cell is not None, "the notebook has no cell tagged 'parameters'"
    tree = ast.parse(cell.source)
    assigned = {
        target.id: statement
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    unknown = sorted(set(values) - set(assigned))
    assert not unknown, f"the parameters cell has no {unknown}; it has {sorted(assigned)}"
    for name, value in values.items():
        assigned[name].value = ast.parse(repr(value), mode="eval").body
    cell.source = ast.unparse(tree)


def execute(notebook: NotebookNode, folder: Path = FOLDER, minutes: float = 0) -> float:
    """Run every cell in place, in a fresh copy of the folder's `results`: a run that an earlier
    execution left behind would be resumed, not repeated. Raises CellExecutionError. -> GB left.

    minutes: not 0 for the notebook of a student, which goes on after an error or a failed check,
    keeps all outputs, and as a whole may take so long. Raises CellTimeoutError then.
    """
    deadline = time.monotonic() + 60 * minutes
    rules: dict[str, Any] = {"timeout": CELL_SECONDS}
    if minutes:
        rules = {"timeout_func": lambda cell: max(1, int(deadline - time.monotonic()))}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary).resolve()
        if (folder / "results").is_dir():
            shutil.copytree(folder / "results", scratch / "results")
        client = NotebookClient(
            notebook,
            allow_errors=minutes > 0,
            kernel_name="python3",
            resources={"metadata": {"path": str(scratch)}},
            record_timing=False,
            store_widget_state=False,
            coalesce_streams=True,
            **rules,
        )
        if minutes:
            client.execute()
            return sum(f.stat().st_size for f in scratch.rglob("*") if f.is_file()) / 1e9
        try:
            client.execute(env={**os.environ, "MIMDET_STRICT_CHECKS": "1"})
        finally:
            tidy(notebook, private=(str(scratch), str(ROOT), sys.prefix, str(Path.home())))
    return 0


def tidy(notebook: NotebookNode, private: tuple[str, ...] = ()) -> None:
    """Remove from the outputs what differs between two runs of the same code."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        cell.metadata.pop("execution", None)
        if "timing" in tags(cell):
            cell.outputs = []
        for output in cell.outputs:
            data = output.get("data", {})
            if WIDGET in data and _has_picture(data):
                del data[WIDGET]  # random, and of a model that ended with the kernel
            if "execution_count" in output:
                output["execution_count"] = None
            if output.output_type == "stream":
                output["text"] = _repeatable(output["text"], private)
            for kind, value in data.items():
                if kind.startswith("text/") and isinstance(value, str):
                    data[kind] = _repeatable(value, private)


def _has_picture(data: dict[str, Any]) -> bool:
    return any(kind.startswith("image/") for kind in data)


def _repeatable(text: str, private: tuple[str, ...]) -> str:
    """Without the times of progress bars, and with paths relative to the folders in `private`."""
    text = re.sub(r" ?\[\d+:\d\d(:\d\d)?<[^\]\n]*\]", "", text)
    for folder in private:
        text = text.replace(folder + "/", "").replace(folder, ".")
    return text


# ------------------------------------------------------------------------------- the commands


def sync(source: Path) -> None:
    """Rewrite a notebook from its source. Cells whose code is unchanged keep their outputs."""
    notebook, target = read_source(source), target_of(source)
    if target.exists():
        old = read_notebook(target)
        kept = {cell.source: cell.outputs for cell in old.cells if cell.cell_type == "code"}
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = kept.get(cell.source, [])
        if "mimdet" in old.metadata:
            notebook.metadata["mimdet"] = old.metadata["mimdet"]
    nbformat.write(notebook, target)


def build(source: Path) -> None:
    """Run a source and store it with its outputs."""
    notebook = read_source(source)
    execute(notebook, source.parent.parent)
    notebook.metadata["mimdet"] = {"executed_code": code_hash(notebook)}
    nbformat.write(notebook, target_of(source))


def check(folder: Path = FOLDER) -> list[str]:
    """What is wrong with the notebooks of a folder, each with its remedy."""
    problems = []
    targets = {target_of(source): source for source in sources(folder)}
    for path in sorted({*targets, *folder.glob("*.ipynb")}):
        if path not in targets:
            problems.append(f"{path.name}: has no source py/{path.stem}.py; write one or delete it")
        elif not path.exists():
            problems.append(f"{path.name}: is missing; run tools/notebooks.py build {path.stem}")
        else:
            problems += [f"{path.name}: {said}" for said in _problems(targets[path], path)]
    return problems


def _problems(source: Path, path: Path) -> list[str]:
    wanted, stored = read_source(source), read_notebook(path)
    problems = []
    if contents(wanted) != contents(stored):
        problems.append(f"differs from its source; run tools/notebooks.py sync {source.stem}")
    if stored.metadata.get("mimdet", {}).get("executed_code") != code_hash(wanted):
        problems.append(
            f"its outputs are of other code; run tools/notebooks.py build {source.stem}"
        )
    if "widgets" in stored.metadata:
        problems.append("stores widget state, which GitHub cannot show; build it with this tool")
    if parameters_cell(wanted) is None:
        problems.append("no code cell is tagged 'parameters'; tests need one with MODE in it")
    for number, cell in enumerate(stored.cells, start=1):
        if cell.cell_type == "code":
            problems += [f"cell {number} {said}" for said in _cell_problems(cell)]
    try:
        index_row(wanted, source.stem)
    except ValueError as error:
        problems.append(str(error))
    if path.stat().st_size > MAX_BYTES:
        size = path.stat().st_size / 1e6
        problems.append(f"{size:.1f} MB is over {MAX_BYTES / 1e6}; store fewer or smaller pictures")
    return problems


def _cell_problems(cell: NotebookNode) -> list[str]:
    problems = []
    lines = sum(bool(line.strip()) for line in cell.source.splitlines())
    if lines > MAX_LINES and not {"solution", "judge"} & {*tags(cell)}:
        problems.append(f"has {lines} lines of code, over {MAX_LINES}; move some to the library")
    widgets = [output.data for output in cell.outputs if WIDGET in output.get("data", {})]
    if not all(_has_picture(data) for data in widgets):
        problems.append("shows a widget without a picture; end it with a Panel or its snapshot()")
    elif widgets:
        problems.append("stores a widget that has ended; build it with this tool")
    return problems


# ------------------------------------------------------------------------------- a student's


def calls(cell: NotebookNode, name: str) -> list[str]:
    """The calls of a function in a code cell, as text; none where it is no Python."""
    try:
        nodes = list(ast.walk(ast.parse(code_of(cell) if cell.cell_type == "code" else "")))
    except SyntaxError:
        return []
    found = [node for node in nodes if isinstance(node, ast.Call)]
    return [ast.unparse(node) for node in found if getattr(node.func, "id", "") == name]


def with_judges(student: NotebookNode, original: NotebookNode) -> NotebookNode:
    """The student's notebook without solutions, and with the original's cells that judge after the
    last one that speaks of `mine`."""
    cells = [cell for cell in student.cells if "solution" not in tags(cell)]
    cells = [cell for cell in cells if not cell.source.startswith(SOLUTION)]
    code = [cell.source if cell.cell_type == "code" else "" for cell in cells]
    speak = [place for place, text in enumerate(code, start=1) if re.search(r"\bmine\b", text)]
    place = max(speak, default=len(cells))
    text = "\n".join(cell.source for cell in original.cells if "solution" not in tags(cell))
    dots = re.search(r"^mine = (\{.*?\})", text, re.MULTILINE)
    first = (
        f"from mimdet import judge\nmine = {dots[1] if dots else {}} | globals().get('mine', {{}})"
    )
    judges = [cell.source for cell in original.cells if calls(cell, "judge")]
    new = [nbformat.v4.new_code_cell(f"{first}\n{code}") for code in judges]
    together = [*cells[:place], *new, *cells[place:]]
    graded = nbformat.v4.new_notebook(cells=together, metadata=METADATA)
    if parameters_cell(graded):
        inject(graded, MODE="quick")
    return graded


def grade(path: Path, minutes: float = GRADE_MINUTES, folder: Path = FOLDER) -> list[str]:
    """What is to be said of a student's notebook: a line an exercise, `✓`, `✗` or `·`; then what is
    wrong with its checks. It runs in quick mode, in a process and a folder of its own.

    Raises ValueError when its first cell is not the title of one of the notebooks in `folder`.
    """
    student = read_notebook(path)
    number = re.match(r"# (\d\d) ", student.cells[0].source if student.cells else "")
    source = next((s for s in sources(folder) if number and s.stem[:2] == number[1]), None)
    if source is None:
        raise ValueError(f"{path}: its first cell is not the title of a notebook of {folder}")
    original = read_source(source)
    graded, end = with_judges(student, original), ""
    try:
        execute(graded, folder, minutes)
    except CellTimeoutError:
        end = f"✗ not at its end after {minutes:g} minutes"
    except DeadKernelError:
        end = "✗ its process died"
    return [*_verdicts(graded, original), *([end] if end else [])]


def _verdicts(graded: NotebookNode, original: NotebookNode) -> Iterator[str]:
    cells = [cell for cell in graded.cells if cell.cell_type == "code"]
    lines = [line for cell in cells for line in printed(cell).splitlines()]
    ours = [cell for cell in original.cells if "solution" not in tags(cell)]
    said = {line.split(":")[0][2:]: line for line in lines if line[2:].startswith("exercise ")}
    for call in [call for cell in ours for call in calls(cell, "judge")]:
        name = f"exercise {call.removeprefix('judge(').split(',')[0]}"
        yield said.get(name, f"✗ {name}: never reached")
    checks = [line for line in lines if line[:1] in "✓✗" and line[2:10] != "exercise"]
    yield f"· {sum(line[:1] == '✓' for line in checks)} checks pass"
    yield from (line for line in checks if line[:1] == "✗")
    wanted, left = (Counter(c for cell in of for c in calls(cell, "check")) for of in (ours, cells))
    yield from (f"✗ is gone or changed: {call}" for call in wanted - left)
    for number, cell in enumerate(cells, start=1):
        errors = [output for output in cell.outputs if output.output_type == "error"]
        yield from (f"✗ code cell {number}: {e.ename}: {e.evalue}" for e in errors)


def printed(cell: NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def write_grades(files: list[str], minutes: float) -> int:
    bad = 0
    for file in files:
        print(file, flush=True)
        lines = grade(Path(file), minutes)
        bad += any(line.startswith("✗") or line.endswith("no answer yet") for line in lines)
        print("\n".join(f"  {line}" for line in lines), flush=True)
    return min(bad, 1)


# ------------------------------------------------------------------------------- the index


def index_row(notebook: NotebookNode, stem: str) -> str:
    """A notebook's line in the README, from its first cell. ValueError when that cell lacks it.

    The cell has `# NN · Title: summary` and a table with a column `quick` and a row `time`.
    """
    lines = notebook.cells[0].source.splitlines() if notebook.cells else [""]
    title = re.fullmatch(r"# (\d+ · [^:]+): (.+)", lines[0])
    if title is None:
        raise ValueError("its first cell must start with `# NN · Title: what it is about`")
    table = [[c.strip() for c in row.strip("|").split("|")] for row in lines if row[:1] == "|"]
    columns = [i for i, name in enumerate(table[0]) if name.startswith("quick")] if table else []
    times = [row for row in table if row[0] == "time"]
    if not columns or not times:
        raise ValueError("its first cell needs a table with a column `quick` and a row `time`")
    time = re.split(r" o[nf] | \(|[,;]", times[0][columns[0]])[0]
    return f"| [{title[1]}](notebooks/{stem}.ipynb) | {title[2]} | {time} |"


def index(readme: str, folder: Path = FOLDER) -> str:
    """The README with a table of the notebooks between its two markers."""
    rows = [index_row(read_source(source), source.stem) for source in sources(folder)]
    head = ["| notebook | what it is about | time, quick mode |", "|---|---|---|"]
    before, rest = readme.split(START)
    return "\n".join([before + START, *head, *rows, END]) + rest.split(END)[1]


def write_index(check_only: bool) -> int:
    readme = README.read_text(encoding="utf-8")
    wanted = index(readme)
    if not check_only:
        README.write_text(wanted, encoding="utf-8")
    elif wanted != readme:
        print("README.md has another table of notebooks: run python tools/notebooks.py index")
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Keep the notebooks in step with their sources.")
    commands = ("sync", "build", "check", "index", "grade", "rehearse")
    parser.add_argument("command", choices=commands)
    parser.add_argument("names", nargs="*", help="such as 00_quickstart; all when none is given")
    parser.add_argument("--minutes", type=float, default=GRADE_MINUTES, help="grade: for each file")
    parser.add_argument("--check", action="store_true", help="index: only compare")
    parser.add_argument("--out", type=Path, help="rehearse: a file for the table")
    parser.add_argument("--real-size", action="store_true", help="rehearse: with ViT-B, slow")
    parser.add_argument("--gpus", default="", help="rehearse: such as 3x80, three of 80 GB")
    options = parser.parse_args(arguments)
    if options.command == "index":
        return write_index(options.check)
    if options.command == "grade":
        return write_grades(options.names, options.minutes)
    if options.command == "check":
        problems = check()
        print("\n".join(problems) or f"{len(sources())} notebooks follow their sources")
        return min(len(problems), 1)
    unknown = sorted(set(options.names) - {source.stem for source in sources()})
    if unknown:
        parser.error(f"no source notebooks/py/{unknown[0]}.py")
    chosen = [s for s in sources() if not options.names or s.stem in options.names]
    if options.command == "rehearse":
        from tools.rehearsal import rehearse

        return min(rehearse(chosen, options.out, options.real_size, options.gpus), 1)
    for source in chosen:
        print(f"{options.command} {source.stem}", flush=True)
        {"sync": sync, "build": build}[options.command](source)
    return 0


if __name__ == "__main__":
    sys.exit(main())
