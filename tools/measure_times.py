"""Measure how long notebooks take and how fast panels answer; written to notebooks/results.

    python tools/measure_times.py notebooks [--hardware "2 CPU cores, 1 thread"]
    python tools/measure_times.py notebooks 02_token_sampling    only printed
    python tools/measure_times.py panels [--hardware "2 CPU cores"]

Notebooks run in quick mode. CPU seconds are those of the whole kernel and of the processes it has
waited for, imports included. They depend little on what else runs; wall seconds, from the start of
the kernel to its end, do.

Panels are measured by tests/browser/test_panels.py, which uses every control once: milliseconds
from the event in JupyterLab to the new picture on the screen, so with messages, model, drawing and
decoding.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import nbformat

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, too

from tools import notebooks

RESULTS = notebooks.FOLDER / "results"
LATENCIES = notebooks.ROOT / "build" / "browser" / "latency.json"
PACKAGES = (
    "torch",
    "jupyterlab",
    "jupyter_client",
    "ipykernel",
    "nbclient",
    "ipywidgets",
    "anywidget",
    "playwright",
)
ASK = """\
import psutil
print(sum(getattr(psutil.Process().cpu_times(), kind, 0)
          for kind in ("user", "system", "children_user", "children_system")))"""


def measure_notebook(source: Path) -> dict[str, float]:
    """Run a source in quick mode: its CPU and its wall seconds. Raises CellExecutionError."""
    notebook = notebooks.read_source(source)
    notebooks.inject(notebook, MODE="quick")
    notebook.cells.append(nbformat.v4.new_code_cell(ASK))
    start = time.perf_counter()
    notebooks.execute(notebook, source.parent.parent)
    wall = time.perf_counter() - start
    cpu = float(notebook.cells[-1].outputs[0]["text"])
    return {"cpu_seconds": round(cpu, 1), "wall_seconds": round(wall, 1)}


def measure_notebooks(names: list[str]) -> dict[str, Any]:
    """Every notebook of the names (none = all), and the sum of each kind of seconds."""
    unknown = sorted(set(names) - {source.stem for source in notebooks.sources()})
    if unknown:
        sys.exit(f"no source notebooks/py/{unknown[0]}.py")
    measured = {}
    for source in notebooks.sources():
        if not names or source.stem in names:
            measured[source.stem] = measure_notebook(source)
            print(source.stem, measured[source.stem], flush=True)
    kinds = ("cpu_seconds", "wall_seconds")
    total = {kind: round(sum(times[kind] for times in measured.values()), 1) for kind in kinds}
    return {"notebooks": measured, "sum": total}


def measure_panels() -> dict[str, Any]:
    LATENCIES.unlink(missing_ok=True)
    words = [sys.executable, "-m", "pytest", "-q", "tests/browser/test_panels.py"]
    tests = subprocess.run(words, cwd=notebooks.ROOT)
    if tests.returncode != 0 or not LATENCIES.exists():
        sys.exit("nothing was written: the tests failed or skipped, see above")
    return medians(json.loads(LATENCIES.read_text()))


def medians(measured: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Panel -> control -> milliseconds, with the median of every panel and of all controls."""
    everything = [took for controls in measured.values() for took in controls.values()]
    return {
        "median_ms": round(median(everything)),
        "panels": {
            name: {"median_ms": round(median(controls.values())), "controls_ms": controls}
            for name, controls in sorted(measured.items())
        },
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("notebooks", "panels"))
    parser.add_argument("names", nargs="*", help="of notebooks: only these, nothing is written")
    parser.add_argument("--hardware", default=f"{os.cpu_count()} CPU cores")
    options = parser.parse_args(arguments)
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    if options.what == "notebooks":
        name, numbers = "notebook_times", measure_notebooks(options.names)
        what = "seconds of each notebook in quick mode, from a fresh kernel"
    else:
        name, numbers = "panel_latency", measure_panels()
        what = "milliseconds from an event in JupyterLab to the new picture, shipped tiny models"
    if options.names:
        return
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    result = {
        "what": what,
        "command": f"python tools/measure_times.py {options.what}",
        "hardware": options.hardware,
        "load_average_before": load,
        "environment": {
            "threads": os.environ.get("OMP_NUM_THREADS", "default"),
            "python": platform.python_version(),
            **versions,
        },
        **numbers,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"{name}.json: {numbers.get('sum') or numbers['median_ms']}")


if __name__ == "__main__":
    main()
