"""Measure the kit against what one would use without it, and against its goals.

    python -m tools.bench                       every case, about half an hour of one idle core
    python -m tools.bench metrics encoder       only these
    python -m tools.bench --list

CPU seconds of one process with one thread, all sides interleaved in it, medians over --repeats
after a run that warms up; a case also checks that the sides give equal results. Figures go to
notebooks/results/speed.json, each case with the load of the machine; docs/measurements.md has the
table (`python tools/results.py readme`).
"""

import argparse
import os
from pathlib import Path

import torch

from mimdet.experiments.results import hardware_text
from mimdet.files import read_json, write_json
from tools.bench import cases, whole

RESULTS = Path(__file__).resolve().parents[2] / "notebooks" / "results" / "speed.json"
CASES = {case.__name__: case for case in (*cases.CASES, *whole.CASES)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="CASE", help="default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(CASES))
    if unknown:
        parser.error(f"there is no case {unknown[0]!r}; there are {', '.join(CASES)}")
    if options.list:
        for name, case in CASES.items():
            print(f"{name:<12} {str(case.__doc__).splitlines()[0]}")
        return
    torch.set_num_threads(1)
    stored = read_json(options.out) if options.out.exists() else {"cases": {}}
    for name in options.names or CASES:
        load = os.getloadavg()[0]
        rows = CASES[name](options.repeats)
        about = {"command": f"python -m tools.bench {name}", "repeats": options.repeats}
        about |= {"torch": torch.__version__, "hardware": hardware_text([]), "threads": 1}
        about["load"] = [round(load, 1), round(os.getloadavg()[0], 1)]
        stored["cases"][name] = about | {"rows": rows}
        write_json(options.out, stored)
        for row in rows:
            print(name, row, flush=True)


if __name__ == "__main__":
    main()
