"""Keep the notebooks in step with their sources.

    python tools/notebooks.py sync  [NAME ...]   sources -> notebooks; unchanged cells keep outputs
    python tools/notebooks.py build [NAME ...]   run the sources and store them with their outputs
    python tools/notebooks.py check              list what is wrong; exit 1 when anything is

The reviewed source of `notebooks/NN_name.ipynb` is `notebooks/py/NN_name.py` (py:percent). What
users open is the notebook, with outputs, so that pictures show where nothing can be run. Two
builds give the same file: outputs of cells tagged `timing` are not stored, nor are the times in
progress bars, and folders of this machine are left out of the text.
"""

import argparse
import ast
import hashlib
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
MAX_BYTES = 1_500_000  # a larger file is slow to open, and sites show it as text
CELL_SECONDS = 600
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
    """The source as a notebook without outputs, with ids that depend on the cells alone."""
    notebook = jupytext.read(source)
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: Counter[str] = Counter()
    for cell in notebook.cells:
        text = f"{source.stem}\0{cell.cell_type}\0{cell.source}"
        seen[text] += 1  # equal cells need different ids
        cell["id"] = hashlib.sha256(f"{text}\0{seen[text]}".encode()).hexdigest()[:8]
    return notebook


def read_notebook(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code_hash(notebook: NotebookNode) -> str:
    """Fingerprint of the code cells: text may change without a new run, code may not."""
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def contents(notebook: NotebookNode) -> list[tuple[str, str, str, tuple[str, ...]]]:
    """What a source decides about its notebook."""
    return [(c["id"], c.cell_type, c.source, tuple(tags(c))) for c in notebook.cells]


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


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


def execute(notebook: NotebookNode, folder: Path = FOLDER) -> None:
    """Run every cell in place, in a fresh copy of the folder's `results`: a run that an earlier
    execution left behind would be resumed, not repeated. Raises CellExecutionError."""
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary).resolve()
        if (folder / "results").is_dir():
            shutil.copytree(folder / "results", scratch / "results")
        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": str(scratch)}},
            record_timing=False,
            store_widget_state=False,
            coalesce_streams=True,
        )
        try:
            client.execute()
        finally:
            tidy(notebook, private=(str(scratch), str(ROOT), sys.prefix, str(Path.home())))


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
            if "execution_count" in output:
                output["execution_count"] = None
            if output.output_type == "stream":
                output["text"] = _repeatable(output["text"], private)
            for kind, value in output.get("data", {}).items():
                if kind.startswith("text/") and isinstance(value, str):
                    output["data"][kind] = _repeatable(value, private)


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
    if path.stat().st_size > MAX_BYTES:
        size = path.stat().st_size / 1e6
        problems.append(f"{size:.1f} MB is over {MAX_BYTES / 1e6}; store fewer or smaller pictures")
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Keep the notebooks in step with their sources.")
    parser.add_argument("command", choices=("sync", "build", "check"))
    parser.add_argument("names", nargs="*", help="such as 00_quickstart; all when none is given")
    options = parser.parse_args(arguments)
    if options.command == "check":
        problems = check()
        print("\n".join(problems) or f"{len(sources())} notebooks follow their sources")
        return min(len(problems), 1)
    unknown = sorted(set(options.names) - {source.stem for source in sources()})
    if unknown:
        parser.error(f"no source notebooks/py/{unknown[0]}.py")
    for source in sources():
        if not options.names or source.stem in options.names:
            print(f"{options.command} {source.stem}", flush=True)
            {"sync": sync, "build": build}[options.command](source)
    return 0


if __name__ == "__main__":
    sys.exit(main())
