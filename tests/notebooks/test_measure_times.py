"""The tool that measures how long notebooks take and how fast panels answer."""

import json
from pathlib import Path

import pytest

from tests.notebooks.can_fail import write_source
from tools import measure_times

BUSY = """\
# %% tags=["parameters"]
MODE = "full"

# %%
import time
start = time.process_time()
while MODE == "quick" and time.process_time() < start + 0.5:
    pass
"""


def test_cpu_seconds_of_a_kernel_and_medians_of_panels(tmp_path: Path) -> None:
    times = measure_times.measure_notebook(write_source(tmp_path, "00_busy", BUSY))
    assert times["wall_seconds"] >= times["cpu_seconds"] - 0.5
    assert 0.5 <= times["cpu_seconds"] < 60
    said = measure_times.medians({"b": {"x": 10.0, "y": 30.0, "z": 20.0}, "a": {"x": 100.0}})
    assert said["median_ms"] == 25
    assert list(said["panels"]) == ["a", "b"]
    assert said["panels"]["b"]["median_ms"] == 20
    assert said["panels"]["a"]["controls_ms"] == {"x": 100.0}


def test_all_notebooks_are_written_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"cpu_seconds": 2.0, "wall_seconds": 3.0}
    monkeypatch.setattr(measure_times, "RESULTS", tmp_path)
    monkeypatch.setattr(measure_times, "measure_notebook", lambda source: seconds)
    measure_times.main(["notebooks", "02_token_sampling"])
    assert list(tmp_path.iterdir()) == []
    measure_times.main(["notebooks", "--hardware", "a laptop"])
    written = json.loads((tmp_path / "notebook_times.json").read_text())
    count = len(measure_times.notebooks.sources())
    assert written["hardware"] == "a laptop"
    assert len(written["notebooks"]) == count
    assert written["sum"] == {"cpu_seconds": 2.0 * count, "wall_seconds": 3.0 * count}
    with pytest.raises(SystemExit, match="no source notebooks/py/unknown"):
        measure_times.main(["notebooks", "unknown"])
