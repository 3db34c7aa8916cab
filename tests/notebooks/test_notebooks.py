"""Every notebook runs in quick mode and is what its source says."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from tests.notebooks import can_fail
from tools import notebooks
from tools.rehearsal import rehearse

SOURCES = notebooks.sources()
FAILED = notebooks.ROOT / "build" / "notebooks"


def test_there_is_a_notebook() -> None:
    assert SOURCES, "notebooks/py holds no source"


def test_notebooks_follow_their_sources() -> None:
    assert notebooks.check() == []


def test_the_readme_lists_them() -> None:
    readme = notebooks.README.read_text(encoding="utf-8")
    assert notebooks.index(readme) == readme, "run python tools/notebooks.py index"


def test_panels_are_left_as_they_were_made() -> None:
    """Only the cell that makes a panel moves its controls, so what a student meets is live."""
    for source in SOURCES:
        for cell in notebooks.read_source(source).cells:
            code = cell.source if cell.cell_type == "code" else ""
            for name in re.findall(r"(?m)^(\w+)\.\w+\.(?:value\b.*=|click\()", code):
                assert re.search(rf"(?m)^{name} = \w+\(", code), f"{source.stem}: {code}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_notebook_runs_in_quick_mode(source: Path) -> None:
    """And each of its sanity checks could have failed (can_fail.py)."""
    notebook = notebooks.read_source(source)
    notebooks.inject(notebook, MODE="quick", SOLUTIONS=True)
    can_fail.add_to(notebook)
    try:
        notebooks.execute(notebook)
    except CellExecutionError:
        FAILED.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, FAILED / f"{source.stem}.ipynb")
        raise
    assert can_fail.vacuous(notebook) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_a_second_run_all_holds_too(source: Path) -> None:
    """In the kernel and the folder as the first one left them."""
    notebook = notebooks.read_source(source)
    again = notebooks.read_source(source).cells
    for cell in again:
        cell["id"] += "again"
    notebook.cells += again
    notebooks.execute(notebook)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_two_builds_are_the_same_file(source: Path, tmp_path: Path) -> None:
    shutil.copytree(notebooks.FOLDER / "results", tmp_path / "results")
    (tmp_path / "py").mkdir()
    own = Path(shutil.copy(source, tmp_path / "py"))
    built = []
    for _ in range(2):
        notebooks.build(own)
        built.append(notebooks.target_of(own).read_bytes())
    assert built[0] == built[1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_full_mode_is_rehearsed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every cell of every notebook, on drawn scenes in COCO's layout and random weights."""
    failures = rehearse(SOURCES, tmp_path / "table.md")
    assert failures == 0, capsys.readouterr().out
    assert (tmp_path / "table.md").read_text().count("\n| ") == 1 + len(SOURCES)
