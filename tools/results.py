"""Measured results: from a run's directory into notebooks/results, and from there into the pages.

python tools/results.py collect RUN notebooks/results/NAME.json --command "mimdet demo" --note ""
python tools/results.py readme            # rewrite their blocks in README and docs
python tools/results.py readme --check    # exit 1 if one is not what the json files say
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from mimdet.experiments.results import hardware_text
from mimdet.files import read_json, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, too

from tools.measured import long_tables, short_table
from tools.measured_grids import ROOT, fine_tuning_table

START, END = "<!-- results -->", "<!-- /results -->"
KEPT = ("mimdet", "git", "torch", "torchvision", "timm", "python", "seed", "data")


def collect(run: Path, command: str, hardware: str, note: str, minutes: float) -> dict[str, Any]:
    """What a run's own files say, without its weights and predictions."""
    from mimdet.training.checkpoints import MetricsFile

    rows = MetricsFile(run / "metrics.jsonl").read()
    steps = [row for row in rows if "loss" in row]
    environment = read_json(run / "environment.json")
    final = [row["evaluation"] for row in rows if "evaluation" in row][-1]
    result: dict[str, Any] = {
        "command": command,
        "note": note,
        "hardware": hardware,
        "environment": {name: environment[name] for name in KEPT},
        **({"minutes_in_all": minutes} if minutes else {}),
        "training_minutes": round(sum(row["time"]["seconds"] for row in steps) / 60, 1),
        "steps": steps[-1]["step"],
        "images": sum(row["images"] for row in steps),
        "curve": [
            {
                "step": row["step"],
                "box_ap": row["evaluation"]["box"]["AP"],
                "mask_ap": row["evaluation"]["mask"]["AP"],
            }
            for row in rows
            if "evaluation" in row
        ],
        "final": {kind: final[kind] for kind in ("box", "mask")},
    }
    ratios = run / "evaluation.json"
    if ratios.exists():
        result["ratios"] = read_json(ratios)["ratios"]
    return result


def with_block(text: str, results: str) -> str:
    before, rest = text.split(START)
    return f"{before}{START}\n{results}\n{END}{rest.split(END)[1]}"


def write_blocks(check_only: bool) -> None:
    """The generated blocks of both pages. Exits with 1 when they differ and may not be written."""
    pages = {"README.md": short_table(), "docs/measurements.md": long_tables()}
    pages["docs/guides/recipes.md"] = fine_tuning_table()
    for name, results in pages.items():
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        new = with_block(text, results)
        if check_only and new != text:
            sys.exit(f"{name} does not show notebooks/results: run python tools/results.py readme")
        path.write_text(new, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="task", required=True)
    one = commands.add_parser("collect")
    one.add_argument("run", type=Path)
    one.add_argument("out", type=Path)
    one.add_argument("--command", required=True)
    one.add_argument("--hardware", default=hardware_text([]))
    one.add_argument("--note", default="")
    one.add_argument("--minutes", type=float, default=0.0, help="wall time, start to end")
    readme = commands.add_parser("readme")
    readme.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.task == "collect":
        result = collect(
            options.run, options.command, options.hardware, options.note, options.minutes
        )
        write_json(options.out, result)
        return
    write_blocks(options.check)


if __name__ == "__main__":
    main()
