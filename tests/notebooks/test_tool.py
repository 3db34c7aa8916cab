"""The tool that builds, checks and lists the notebooks, on a small one."""

import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from tests.notebooks.can_fail import write_source
from tools import notebooks, rehearsal

SMALL = """\
# %% [markdown]
# # 00 · Small: a notebook for a test
#
# | | quick (`MODE = "quick"`) | full |
# |---|---|---|
# | time | 2 seconds on one core (or three) | 9 hours |

# %% tags=["parameters"]
MODE = "quick"
steps = {"quick": 2, "full": 9}[MODE]

# %%
import os, sys, time
for step in range(steps):
    print(f"\\rstep {step}/2 [00:0{step}<00:01, {time.time()}it/s]", end="")
print("", os.getcwd() + "/runs", file=sys.stdout)
steps

# %%
import torch
from mimdet.viz import Panel, PatchCanvas
class Orange(Panel):
    label = "an orange square"
    def draw(self):
        self.canvases[0].show(torch.tensor([213, 94, 0]).expand(8, 8, 3).byte(), width=32)
        return "done"
panel = Orange()
panel.canvases = [PatchCanvas()]
panel.open(panel.canvases)
panel

# %% tags=["timing"]
print(time.time())
"""
NAME = "00_small.ipynb"
INSTALL, PARAMETERS, LOOP, PANEL, TIMING = range(1, 6)  # its cells; the title is cell 0


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small notebook, built."""
    return _build(tmp_path_factory.mktemp("built"))


def _build(folder: Path) -> Path:
    notebooks.build(write_source(folder, "00_small", SMALL))
    return folder


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    (tmp_path / "py").mkdir()
    for name in ("py/00_small.py", "00_small.ipynb"):
        (tmp_path / name).write_bytes((built / name).read_bytes())
    return tmp_path


def test_build_stores_outputs_without_times_and_places_and_the_picture_of_a_panel(built) -> None:
    assert notebooks.check(built) == []
    cells = notebooks.read_notebook(built / NAME).cells
    loop = cells[LOOP]
    assert cells[INSTALL].outputs == cells[PARAMETERS].outputs == cells[TIMING].outputs == []
    assert loop.outputs[0].text == "step 1/2 runs\n"  # the last state of the bar, a relative path
    assert loop.outputs[1].data["text/plain"] == "2"
    assert loop.execution_count is None and "execution" not in loop.metadata
    output, hint = cells[PANEL].outputs
    assert "Run All Above" in hint.data["text/html"]  # for who sees the picture alone
    assert sorted(output.data) == ["image/png", "text/plain"]
    assert output.metadata == {"image/png": {"alt": "an orange square"}}


def test_two_builds_are_identical(built: Path, tmp_path: Path) -> None:
    again = _build(tmp_path)
    assert (again / NAME).read_bytes() == (built / NAME).read_bytes()


def test_sync_keeps_outputs_of_unchanged_cells(copy: Path) -> None:
    source = copy / "py" / "00_small.py"
    before = notebooks.read_notebook(copy / "00_small.ipynb")
    source.write_text(SMALL.replace("a notebook for a test", "another title"))
    notebooks.sync(source)
    after = notebooks.read_notebook(copy / "00_small.ipynb")
    assert "another title" in after.cells[0].source
    assert [cell.id for cell in after.cells[1:]] == [cell.id for cell in before.cells[1:]]
    assert after.cells[LOOP].outputs == before.cells[LOOP].outputs != []
    assert notebooks.check(copy) == []  # a word of text needs no new run


def rewrite(old: str, new: str, sync: bool = True) -> Callable[[Path], None]:
    """Damage to the source, of which the notebook hears by `sync`."""

    def damage(folder: Path) -> None:
        source = folder / "py" / "00_small.py"
        source.write_text(SMALL.replace(old, new))
        if sync:
            notebooks.sync(source)

    return damage


def change(edit: Callable[[NotebookNode], object]) -> Callable[[Path], None]:
    """Damage to the notebook."""

    def damage(folder: Path) -> None:
        notebook = notebooks.read_notebook(folder / NAME)
        edit(notebook)
        nbformat.write(notebook, folder / NAME)

    return damage


def widget_without_picture(notebook: NotebookNode) -> None:
    data = {notebooks.WIDGET: {"model_id": "1"}, "text/plain": "VBox()"}
    notebook.cells[PANEL].outputs[0].update(data=nbformat.from_dict(data), metadata={})


def widget_beside_its_picture(notebook: NotebookNode) -> None:
    notebook.cells[PANEL].outputs[0].data[notebooks.WIDGET] = {"model_id": "1"}


def add_cells(folder: Path, cells: str) -> None:
    """More cells, and a notebook that says that they were run."""
    source = folder / "py" / "00_small.py"
    source.write_text(f"{SMALL}\n{cells}")
    notebooks.sync(source)
    code = notebooks.code_hash(notebooks.read_source(source))
    change(lambda notebook: notebook.metadata.mimdet.update(executed_code=code))(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (rewrite("a test", "one test", sync=False), "differs from its source"),
        (rewrite('"timing"', '"solution"', sync=False), "differs from its source"),
        (rewrite("range(steps)", "range(1, steps)"), "outputs are of other code"),
        (change(lambda notebook: notebook.metadata.pop("mimdet")), "outputs are of other code"),
        (change(lambda notebook: notebook.metadata.update(widgets={})), "stores widget state"),
        (rewrite('tags=["parameters"]', ""), "no code cell is tagged 'parameters'"),
        (
            change(lambda notebook: notebook.cells[LOOP].outputs[0].update(text="x" * 1_600_000)),
            "1.6 MB is over 1.5",
        ),
        (change(lambda notebook: notebook.cells.pop(INSTALL)), "differs from its source"),
        (change(widget_beside_its_picture), "cell 5 stores a widget that has ended"),
        (change(widget_without_picture), "cell 5 shows a widget without a picture"),
        (
            lambda folder: add_cells(folder, "# %%\n" + "1\n\n" * 16),
            "cell 7 has 16 lines of code, over 15",
        ),
        (rewrite("# # 00 · Small:", "# # Small:"), "must start with `# NN · Title"),
        (rewrite("# | time", "# | hours"), "a column `quick` and a row `time`"),
        (rewrite("# | | quick", "# | | slow"), "a column `quick` and a row `time`"),
        (lambda folder: (folder / "00_small.ipynb").unlink(), "is missing"),
        (lambda folder: (folder / "py" / "00_small.py").unlink(), "has no source"),
    ],
)
def test_check_finds(copy: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(copy)
    problems = notebooks.check(copy)
    assert len(problems) == 1, problems
    assert said in problems[0]


def test_a_solution_may_be_long(copy: Path) -> None:
    line = "1\n\n"
    add_cells(copy, f'# %%\n{15 * line}# %% tags=["solution"]\n{16 * line}')
    assert notebooks.check(copy) == []


@pytest.mark.parametrize("wanted", [False, True])
def test_a_solution_is_hidden_and_runs_where_it_is_asked_for(copy: Path, wanted: bool) -> None:
    source = copy / "py" / "00_small.py"
    cells = '# %%\nimport mimdet.notebook\n\n# %% tags=["solution"]\nMODE + "er"'
    source.write_text(source.read_text().replace("MODE =", f"SOLUTIONS = {wanted}\nMODE =") + cells)
    notebook = notebooks.read_source(source)
    notebooks.execute(notebook, copy)
    last = notebook.cells[-1]
    assert last.metadata["jupyter"]["source_hidden"]
    (output,) = last.outputs
    assert ("quicker" in str(output)) == wanted
    assert ("not run: set SOLUTIONS = True" in str(output)) != wanted


TITLE, _ = SMALL.split("# %%\nimport os")
ASKED = """
# %%
from mimdet import check, judge
check("two steps", steps == 2)

# %%
mine = {1: ..., 2: ...}  # your answers

# %% tags=["judge"]
judge(1, mine[1], 0.0625)
judge(2, mine[2], "encoder")

# %% tags=["solution"]
print("✓ exercise 2: encoder")
"""


def test_a_students_notebook_is_graded(tmp_path: Path) -> None:
    answered = hand_in(tmp_path, ("{1: ..., 2: ...}", "{1: 64**2 / 256**2, 2: ...}"))
    assert notebooks.grade(answered, folder=tmp_path) == [
        "✓ exercise 1: 0.0625",
        "· exercise 2: no answer yet",
        "· 1 checks pass",
    ]


def test_a_judge_of_ones_own_is_not_asked(tmp_path: Path) -> None:
    judge = "def judge(*_): print('✓ exercise 1: stem')\nmine = {1: 'stem', 2: 'encoder'}\njudge("
    damaged = hand_in(
        tmp_path, ("steps == 2", "True"), ("judge(1, mine[1], ", f"{judge}nothing, ")
    )
    assert notebooks.grade(damaged, folder=tmp_path) == [
        "✗ exercise 1: 'stem' is not it",
        "✓ exercise 2: 'encoder'",
        "· 1 checks pass",
        "✗ is gone or changed: check('two steps', steps == 2)",
        "✗ code cell 5: NameError: name 'nothing' is not defined",
    ]


def hand_in(folder: Path, *changes: tuple[str, str]) -> Path:
    """A student's copy of a small notebook with two exercises."""
    source = write_source(folder, "00_small", TITLE + ASKED)
    notebook = notebooks.read_source(source)
    for cell in notebook.cells:
        for old, new in changes:
            cell.source = cell.source.replace(old, new)
    nbformat.write(notebook, folder / "somebody.ipynb")
    return folder / "somebody.ipynb"


def test_a_students_notebook_has_its_time(tmp_path: Path) -> None:
    endless = hand_in(tmp_path, ('check("two', 'while True: pass\ncheck("two'))
    said = notebooks.grade(endless, 0.1, tmp_path)
    assert said[0] == "✗ exercise 1: never reached"
    assert said[-1] == "✗ not at its end after 0.1 minutes"


def test_a_notebook_of_something_else_cannot_be_graded(copy: Path) -> None:
    change(lambda notebook: notebook.cells[0].update(source="# Homework"))(copy)
    with pytest.raises(ValueError, match="is not the title of a notebook"):
        notebooks.grade(copy / NAME, folder=copy)


def test_index_is_read_from_the_first_cells(copy: Path) -> None:
    said = notebooks.index(f"Before\n{notebooks.START}\nold\n{notebooks.END}\nAfter\n", copy)
    assert said.splitlines() == [
        "Before",
        notebooks.START,
        "| notebook | what it is about | time, quick mode |",
        "|---|---|---|",
        "| [00 · Small](notebooks/00_small.ipynb) | a notebook for a test | 2 seconds |",
        notebooks.END,
        "After",
    ]
    assert notebooks.index(said, copy) == said


def test_index_command_writes_and_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"{notebooks.START}\n{notebooks.END}\n", encoding="utf-8")
    monkeypatch.setattr(notebooks, "README", readme)
    assert notebooks.main(["index", "--check"]) == 1
    assert "run python tools/notebooks.py index" in capsys.readouterr().out
    assert notebooks.main(["index"]) == 0
    assert "(notebooks/00_quickstart.ipynb)" in readme.read_text(encoding="utf-8")
    assert notebooks.main(["index", "--check"]) == 0


@pytest.mark.parametrize(
    ("host", "installed", "asked"),
    [
        ("", False, []),
        ("BINDER_SERVICE_HOST", True, []),
        ("BINDER_SERVICE_HOST", False, [("pip", "install --quiet .. anywidget")]),
        ("COLAB_RELEASE_TAG", True, ["widgets"]),
        ("COLAB_RELEASE_TAG", False, [("pip", "install --quiet .. anywidget"), "widgets"]),
    ],
)
def test_install_cell(
    monkeypatch: pytest.MonkeyPatch, host: str, installed: bool, asked: list[object]
) -> None:
    """Nothing happens on one's own machine, with the kit or without."""
    for name in ("COLAB_RELEASE_TAG", "BINDER_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    if host:
        monkeypatch.setenv(host, "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    done: list[object] = []
    colab: Any = types.ModuleType("google.colab")
    manager = types.SimpleNamespace(enable_custom_widget_manager=lambda: done.append("widgets"))
    colab.output = manager
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    shell = types.SimpleNamespace(run_line_magic=lambda *call: done.append(call[:2]))
    code = TransformerManager().transform_cell(notebooks.INSTALL)
    exec(code, {"get_ipython": lambda: shell})
    assert done == asked


REHEARSED = """\
# %% tags=["parameters"]
MODE = "quick"
SOLUTIONS = False

# %%
import mimdet
from mimdet.notebook import full_config, open_detector, open_mae, open_pictures
pictures = open_pictures("", MODE, count=99)
sizes = {tuple(image.shape[1:]) for image in pictures.images}
mimdet.check("COCO's classes", len(pictures.categories) == 80)
mimdet.check("photographs' sizes", len(pictures.images) == 32 and len(sizes) > 20)
mimdet.check("crowds", any(a["iscrowd"] for a in pictures.dataset.ground_truth()["annotations"]))
mimdet.check("an autoencoder", mimdet.load_mae_model(full_config().training.init_from).norm_pix_loss)
found = mimdet.predict(open_detector(MODE), pictures.images[0])
mimdet.check("it finds something", len(found) > 0)
mimdet.check("what is right", MODE == "quick", trained=True)

# %%
mimdet.check("quick mode", MODE == "quick")
1 / 0
"""


def test_a_rehearsal_counts_what_runs_and_what_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, table = dict(os.environ), tmp_path / "table.md"
    assert rehearsal.rehearse([write_source(tmp_path, "00_small", REHEARSED)], table) == 2
    said = capsys.readouterr().out
    assert "code cell 4, mimdet.check" in said and "✗ quick mode" in said
    assert "ZeroDivisionError: division by zero" in said
    rehearsal.write(table, {"10_other": "| 10_other | 1 |"})
    first, _, _, row, other, last = table.read_text().splitlines()
    assert (first, last) == (rehearsal.START, rehearsal.END)
    assert row.startswith("| 00_small | 4 | 2 | 5 | 1 | ") and row.endswith(" | what is right |")
    assert other == "| 10_other | 1 |"  # a later call keeps the rows of others
    assert dict(os.environ) == before


def test_inject_replaces_a_value_and_refuses_an_unknown_parameter(copy: Path) -> None:
    notebook = notebooks.read_source(copy / "py" / "00_small.py")
    notebooks.inject(notebook, MODE="full")
    names: dict[str, object] = {}
    exec(notebooks.parameters_cell(notebook).source, names)
    assert names["steps"] == 9  # what follows from a parameter follows
    with pytest.raises(AssertionError, match=r"no \['mode'\]; it has \['MODE', 'steps'\]"):
        notebooks.inject(notebook, mode="full")


def test_a_failing_cell_is_an_error(tmp_path: Path) -> None:
    source = write_source(tmp_path, "01_broken", "# %%\n1 / 0\n")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        notebooks.build(source)
    assert not notebooks.target_of(source).exists()
