"""Every tiny baseline, trained for the same number of scenes on one core: is it any good?

    python tools/measure_baselines.py RUNS [--steps 1200] [--presets tiny_swin ...] [--out FILE]

All share neck, heads, data, recipe and seed 0 (ViTDet has its own neck and learning rate), from
random weights on `shapes-v1-medium`, evaluated on 200 held-out scenes. Time is CPU time of one
process with one thread, training and evaluations included. Runs that are complete are read, not
repeated.
"""

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from mimdet.experiments.results import hardware_text
from mimdet.files import read_json, write_json
from mimdet.presets import PRESETS

LIMIT_MINUTES = 12
CHOSEN = [name for name in PRESETS if name.startswith("tiny")]


def measure(preset: str, runs: Path, steps: int) -> dict[str, Any]:
    """Train one preset with its default recipe; its scores and what it cost."""
    run = runs / preset
    clock = run / "cpu_minutes.json"
    words = ["train", preset, str(run), "--steps", str(steps), "--evaluate-every-steps", str(steps)]
    if not clock.exists():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "mimdet", *words], check=True, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        write_json(clock, round(seconds / 60, 1))
    final = read_json(run / "eval.json")
    environment_file = read_json(run / "environment.json")
    return {
        "preset": preset,
        "command": f"mimdet {' '.join(words[:2])} RUN {' '.join(words[3:])}",
        "steps": steps,
        "images": 4 * steps,
        "box_ap": round(100 * final["box"]["AP"], 1),
        "mask_ap": round(100 * final["mask"]["AP"], 1),
        "cpu_minutes": read_json(clock),
        "data": environment_file["data"],
        "torch": environment_file["torch"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--presets", nargs="+", default=CHOSEN, choices=CHOSEN)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for preset in options.presets:
        rows.append(measure(preset, options.runs, options.steps))
        print(rows[-1], flush=True)
    if options.out:
        known = {"limit_minutes": LIMIT_MINUTES, "hardware": f"1 of {hardware_text([])}"}
        write_json(options.out, {**known, "rows": rows})


if __name__ == "__main__":
    main()
