"""Every notebook runs in quick mode and is what its source says; the tool finds what is not."""

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from tools import notebooks

SOURCES = notebooks.sources()
FAILED = notebooks.ROOT / "build" / "notebooks"

SMALL = """\
# %% [markdown]
# # A small notebook

# %% tags=["parameters"]
MODE = "quick"
steps = {"quick": 2, "full": 9}[MODE]

# %%
import os, sys, time
for step in range(steps):
    print(f"\\rstep {step}/2 [00:0{step}<00:01, {time.time()}it/s]", end="")
print("", os.getcwd() + "/runs", file=sys.stdout)
steps

# %% tags=["timing"]
print(time.time())
"""


# ------------------------------------------------------------------------------- the series


def test_there_is_a_notebook() -> None:
    assert SOURCES, "notebooks/py holds no source"


def test_notebooks_follow_their_sources() -> None:
    assert notebooks.check() == []


@pytest.mark.timeout(900)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_notebook_runs_in_quick_mode(source: Path) -> None:
    notebook = notebooks.read_source(source)
    notebooks.inject(notebook, MODE="quick")
    try:
        notebooks.execute(notebook)
    except CellExecutionError:
        FAILED.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, FAILED / f"{source.stem}.ipynb")
        raise


# ------------------------------------------------------------------------------- the tool


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small notebook, built."""
    folder = tmp_path_factory.mktemp("built")
    return _build(folder)


def _build(folder: Path) -> Path:
    (folder / "py").mkdir()
    source = folder / "py" / "00_small.py"
    source.write_text(SMALL)
    notebooks.build(source)
    return folder


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    (tmp_path / "py").mkdir()
    for name in ("py/00_small.py", "00_small.ipynb"):
        (tmp_path / name).write_bytes((built / name).read_bytes())
    return tmp_path


def test_build_stores_outputs_without_times_and_places(built: Path) -> None:
    assert notebooks.check(built) == []
    parameters, loop, timing = (
        cell
        for cell in notebooks.read_notebook(built / "00_small.ipynb").cells
        if cell.cell_type == "code"
    )
    assert parameters.outputs == []
    assert loop.outputs[0].text == "step 1/2 runs\n"  # the last state of the bar, a relative path
    assert loop.outputs[1].data["text/plain"] == "2"
    assert loop.execution_count is None
    assert "execution" not in loop.metadata
    assert timing.outputs == []


def test_two_builds_are_identical(built: Path, tmp_path: Path) -> None:
    again = _build(tmp_path)
    name = "00_small.ipynb"
    assert (again / name).read_bytes() == (built / name).read_bytes()


def test_sync_keeps_outputs_of_unchanged_cells(copy: Path) -> None:
    source = copy / "py" / "00_small.py"
    before = notebooks.read_notebook(copy / "00_small.ipynb")
    source.write_text(SMALL.replace("A small notebook", "Another title"))
    notebooks.sync(source)
    after = notebooks.read_notebook(copy / "00_small.ipynb")
    assert "Another title" in after.cells[0].source
    assert [cell.id for cell in after.cells[1:]] == [cell.id for cell in before.cells[1:]]
    assert after.cells[2].outputs == before.cells[2].outputs
    assert notebooks.check(copy) == []  # a word of text needs no new run


def _edit_text(folder: Path) -> None:
    (folder / "py" / "00_small.py").write_text(SMALL.replace("# # A", "# # Some"))


def _edit_code_and_sync(folder: Path) -> None:
    source = folder / "py" / "00_small.py"
    source.write_text(SMALL.replace("range(steps)", "range(1, steps)"))
    notebooks.sync(source)


def _edit_tag(folder: Path) -> None:
    (folder / "py" / "00_small.py").write_text(SMALL.replace('"timing"', '"solution"'))


def _store_widgets(folder: Path) -> None:
    _change(folder, lambda notebook: notebook.metadata.update(widgets={}))


def _forget_the_run(folder: Path) -> None:
    _change(folder, lambda notebook: notebook.metadata.pop("mimdet"))


def _untag_parameters(folder: Path) -> None:
    source = folder / "py" / "00_small.py"
    source.write_text(SMALL.replace('tags=["parameters"]', ""))
    notebooks.sync(source)


def _store_a_large_picture(folder: Path) -> None:
    _change(folder, lambda notebook: notebook.cells[2].outputs[0].update(text="x" * 1_600_000))


def _change(folder: Path, edit: Callable[[NotebookNode], object]) -> None:
    notebook = notebooks.read_notebook(folder / "00_small.ipynb")
    edit(notebook)
    nbformat.write(notebook, folder / "00_small.ipynb")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_edit_text, "differs from its source"),
        (_edit_tag, "differs from its source"),
        (_edit_code_and_sync, "outputs are of other code"),
        (_forget_the_run, "outputs are of other code"),
        (_store_widgets, "stores widget state"),
        (_untag_parameters, "no code cell is tagged 'parameters'"),
        (_store_a_large_picture, "1.6 MB is over 1.5"),
        (lambda folder: (folder / "00_small.ipynb").unlink(), "is missing"),
        (lambda folder: (folder / "py" / "00_small.py").unlink(), "has no source"),
    ],
)
def test_check_finds(copy: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(copy)
    problems = notebooks.check(copy)
    assert len(problems) == 1, problems
    assert said in problems[0]


def test_inject_replaces_a_value(copy: Path) -> None:
    notebook = notebooks.read_source(copy / "py" / "00_small.py")
    notebooks.inject(notebook, MODE="full")
    names: dict[str, object] = {}
    exec(notebooks.parameters_cell(notebook).source, names)
    assert names["steps"] == 9  # what follows from a parameter follows


def test_inject_refuses_an_unknown_parameter(copy: Path) -> None:
    notebook = notebooks.read_source(copy / "py" / "00_small.py")
    with pytest.raises(AssertionError, match=r"no \['mode'\]; it has \['MODE', 'steps'\]"):
        notebooks.inject(notebook, mode="full")


def test_a_failing_cell_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "py").mkdir()
    source = tmp_path / "py" / "01_broken.py"
    source.write_text("# %%\n1 / 0\n")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        notebooks.build(source)
    assert not notebooks.target_of(source).exists()
