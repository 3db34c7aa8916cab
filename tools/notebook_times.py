"""Measure how long every notebook takes in quick mode; written to notebooks/results.

    python tools/notebook_times.py [--hardware "2 CPU cores (AMD EPYC), 1 thread"]
    python tools/notebook_times.py 02_token_sampling    only printed

CPU seconds are those of the whole kernel and of the processes it has waited for, imports included.
They depend little on what else runs; wall seconds, from the start of the kernel to its end, do.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, too

from tools import notebooks

KEPT = notebooks.FOLDER / "results" / "notebook_times.json"
PACKAGES = ("torch", "jupyter_client", "ipykernel", "nbclient")
ASK = """\
import psutil
print(sum(getattr(psutil.Process().cpu_times(), kind, 0)
          for kind in ("user", "system", "children_user", "children_system")))"""


def measure(source: Path) -> dict[str, float]:
    """Run a source in quick mode: its CPU and its wall seconds. Raises CellExecutionError."""
    notebook = notebooks.read_source(source)
    notebooks.inject(notebook, MODE="quick")
    notebook.cells.append(nbformat.v4.new_code_cell(ASK))
    start = time.perf_counter()
    notebooks.execute(notebook, source.parent.parent)
    wall = time.perf_counter() - start
    cpu = float(notebook.cells[-1].outputs[0]["text"])
    return {"cpu_seconds": round(cpu, 1), "wall_seconds": round(wall, 1)}


def summary(measured: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The notebooks and the sum of each kind of seconds."""
    total = {
        kind: round(sum(times[kind] for times in measured.values()), 1)
        for kind in ("cpu_seconds", "wall_seconds")
    }
    return {"notebooks": dict(measured), "sum": total}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="only these, and nothing is written")
    parser.add_argument("--hardware", default=f"{os.cpu_count()} CPU cores")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - {source.stem for source in notebooks.sources()})
    if unknown:
        parser.error(f"no source notebooks/py/{unknown[0]}.py")
    measured = {}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    for source in notebooks.sources():
        if not options.names or source.stem in options.names:
            measured[source.stem] = measure(source)
            print(source.stem, measured[source.stem], flush=True)
    if options.names:
        return 0
    result = {
        "what": "seconds of each notebook in quick mode, from a fresh kernel",
        "command": "python tools/notebook_times.py",
        "hardware": options.hardware,
        "load_average_before": None if load is None else round(load, 1),
        "environment": {
            "threads": os.environ.get("OMP_NUM_THREADS", "default"),
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        **summary(measured),
    }
    KEPT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{KEPT.relative_to(notebooks.ROOT)}: {result['sum']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
