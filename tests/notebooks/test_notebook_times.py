"""The tool that measures how long the notebooks take."""

import json
from pathlib import Path

import pytest

from tests.notebooks.can_fail import write_source
from tools import notebook_times

BUSY = """\
# %% tags=["parameters"]
MODE = "full"

# %%
import time
start = time.process_time()
while MODE == "quick" and time.process_time() < start + 0.5:
    pass
"""


def test_cpu_seconds_of_a_kernel(tmp_path: Path) -> None:
    times = notebook_times.measure(write_source(tmp_path, "00_busy", BUSY))
    assert times["wall_seconds"] >= times["cpu_seconds"] - 0.5
    assert 0.5 <= times["cpu_seconds"] < 60


def test_all_notebooks_are_written_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notebook_times.notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(notebook_times, "KEPT", tmp_path / "times.json")
    monkeypatch.setattr(
        notebook_times, "measure", lambda source: {"cpu_seconds": 2.0, "wall_seconds": 3.0}
    )
    assert notebook_times.main(["02_token_sampling"]) == 0
    assert not (tmp_path / "times.json").exists()
    assert notebook_times.main(["--hardware", "a laptop"]) == 0
    written = json.loads((tmp_path / "times.json").read_text())
    count = len(notebook_times.notebooks.sources())
    assert written["hardware"] == "a laptop"
    assert len(written["notebooks"]) == count
    assert written["sum"] == {"cpu_seconds": 2.0 * count, "wall_seconds": 3.0 * count}
