"""What becomes of a training by several processes when one of them is killed, stopped or slow.

    python -m tests.faults.ranks        # figures go to notebooks/results/ranks.json, 5 minutes

After each case the same command is given again; its end has to be that of an undisturbed run.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from mimdet.files import write_json
from tests.faults.test_kill import (
    EVERY,
    STEPS,
    family,
    finish,
    last_step,
    start_several,
    wait_for_step,
)
from tests.small import assert_same_end

RESULTS = Path(__file__).resolve().parents[2] / "notebooks/results/ranks.json"
LIMIT_MINUTES = 0.1
"""`training.answer_minutes` of these runs."""
SLOW_SECONDS = 3.0


def disturb(run: Path, count: int, what: str, rank: int) -> dict[str, Any]:
    """One run in which this happens to a process: how it ended, and when."""
    torchrun = start_several(run, LIMIT_MINUTES, count)
    wait_for_step(run, EVERY + 3)
    member = family(torchrun)[rank]
    begin = time.monotonic()
    if what == "killed":
        member.kill()
    elif what == "asked to stop":
        torchrun.terminate()
    else:
        member.suspend()
    if what == "slow":
        time.sleep(SLOW_SECONDS)
        member.resume()
    printed = finish(torchrun, seconds=200)
    named = f"process {rank} ({member.pid} on " in printed
    return {
        "processes": count,
        "what": f"process {rank} {what}",
        "ended": "done" if torchrun.returncode == 0 else "stopped, to be resumed",
        "says how to go on": "run the same command again to resume" in printed,
        "names the process": named,
        "seconds": round(time.monotonic() - begin, 1),
        "last checkpoint": last_step(run),
    }


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for count in (2, 4):
            reference = Path(scratch, f"undisturbed {count}")
            assert "done: " in finish(start_several(reference, count=count))
            cases = [("killed", 0), ("killed", count - 1), ("stopped", count - 1)]
            cases += [("slow", count - 1), ("asked to stop", 0)]
            for what, rank in cases:
                run = Path(scratch, f"{count} {what} {rank}")
                row = disturb(run, count, what, rank)
                begin = time.monotonic()
                assert "done: " in finish(start_several(run, count=count))
                assert last_step(run) == STEPS
                assert_same_end(run, reference)
                row["again, to the same end, seconds"] = round(time.monotonic() - begin, 1)
                rows.append(row)
                print(json.dumps(row))
    write_json(RESULTS, {"command": "python -m tests.faults.ranks", "rows": rows})


if __name__ == "__main__":
    main()
