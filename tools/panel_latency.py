"""Measure how fast the panels answer in a real browser; written to notebooks/results.

    python tools/panel_latency.py [--hardware "2 CPU cores (AMD EPYC)"]

Runs tests/browser/test_panels.py, which uses every control once: milliseconds from the event in
JupyterLab to the new picture on the screen, so with messages, model, drawing and decoding.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "build" / "browser" / "latency.json"
KEPT = ROOT / "notebooks" / "results" / "panel_latency.json"
TEST = "tests/browser/test_panels.py"
PACKAGES = ("torch", "jupyterlab", "ipykernel", "ipywidgets", "anywidget", "playwright")


def summary(measured: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Panel -> control -> milliseconds, with the median of every panel and of all controls."""
    everything = [took for controls in measured.values() for took in controls.values()]
    return {
        "median_ms": round(median(everything)),
        "panels": {
            name: {"median_ms": round(median(controls.values())), "controls_ms": controls}
            for name, controls in sorted(measured.items())
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hardware", default=f"{os.cpu_count()} CPU cores")
    options = parser.parse_args()
    MEASURED.unlink(missing_ok=True)
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", TEST], cwd=ROOT)
    if tests.returncode != 0 or not MEASURED.exists():
        print("nothing was written: the tests failed or skipped, see above")
        return 1
    result = {
        "what": "milliseconds from an event in JupyterLab to the new picture, shipped tiny models",
        "command": "python tools/panel_latency.py",
        "hardware": options.hardware,
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "environment": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        **summary(json.loads(MEASURED.read_text())),
    }
    KEPT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{KEPT.relative_to(ROOT)}: {result['median_ms']} ms, median of all controls")
    return 0


if __name__ == "__main__":
    sys.exit(main())
