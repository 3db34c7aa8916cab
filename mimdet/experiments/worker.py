"""One run of an experiment in a process of its own: `python -m mimdet.experiments.worker RUN ...`.

The folder RUN holds the configuration, and the code of its slots, before this process starts. The
process ends, after saving, on Ctrl-C, on SIGTERM, and when its standard input is closed: that is
how it learns that the process which started it has stopped or died.
"""

import _thread
import argparse
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from mimdet.experiments.plan import CLOCK, RATIOS, passes, read_ratios
from mimdet.files import write_json
from mimdet.training.lock import alone_in

STOPPED = 130
"""Exit code after an interruption; everything is saved."""
FAILED = "error: "
"""Begins the last line that a failed run prints."""
LOCK_SECONDS = 60.0
"""How long to wait for a process that still works on the same run; one that stops needs 20 s."""


def main(words: list[str]) -> int:
    """The process. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="mimdet.experiments.worker")
    parser.add_argument("run", type=Path)
    parser.add_argument("--ratios", type=float, nargs="+", required=True)
    parser.add_argument("--draws", type=int, required=True)
    parser.add_argument("--trust-code", action="store_true")
    options = parser.parse_args(words)
    from mimdet.training.signals import TrainingStopped

    try:
        with alone_in(options.run, LOCK_SECONDS):
            train_run(options.run, options.trust_code)
            evaluate_run(options.run, options.ratios, options.draws, options.trust_code)
    except (TrainingStopped, KeyboardInterrupt) as stopped:
        print(str(stopped) or "stopped")
        return STOPPED
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        print(FAILED + f"{type(error).__name__}: {error}".replace("\n", " "))
        return 1
    return 0


def train_run(path: Path, trust_code: bool) -> None:
    """Train, or go on, to the last step. Notes the seconds of every step."""
    from mimdet.training.resume import resume

    wall, cpu = time.perf_counter(), time.process_time()
    with (path / CLOCK).open("a", encoding="utf-8") as clock:
        for step in resume(path, trust_code=trust_code, locked=True):
            now = time.perf_counter(), time.process_time()
            row = {"step": step.number, "wall_seconds": now[0] - wall, "cpu_seconds": now[1] - cpu}
            clock.write(json.dumps(row) + "\n")
            clock.flush()
            wall, cpu = now


def evaluate_run(path: Path, ratios: list[float], draws: int, trust_code: bool) -> None:
    """Evaluate the last checkpoint at every ratio that has not been evaluated with as many draws.

    Evaluations on other data than there is now are done again. Each ratio is on the disk before the
    next one begins.
    """
    from mimdet.analysis.evaluate import evaluate_ratios
    from mimdet.data.coco import build_dataset
    from mimdet.training.run import load_detector
    from mimdet.training.trainer import pick_device, use_threads

    model = load_detector(path, trust_code=trust_code)
    model = model.to(pick_device(model.config.training.device))
    use_threads(model.config.training.threads)
    dataset = build_dataset(model.config.data, "val", model.config.training.seed)
    known = {row["sample_ratio"]: row for row in read_ratios(path, dataset.version)}
    missing = [r for r in ratios if known.get(r, {}).get("draws") != passes(r, draws)]
    for ratio in missing:
        cpu = time.process_time()
        row: dict[str, Any] = evaluate_ratios(
            model, dataset, [ratio], draws, batch_size=model.config.training.batch_size
        )[0]
        known[ratio] = row | {"cpu_seconds": round(time.process_time() - cpu, 2)}
        rows = [known[ratio] for ratio in sorted(known)]
        write_json(path / RATIOS, {"data": dataset.version, "rows": rows})


# ------------------------------------------------------------------------------- processes


def listen() -> None:
    """Raise KeyboardInterrupt in the main thread on SIGINT, SIGTERM and the end of standard input.

    SIGINT is set too: a process started in the background of a script inherits it as ignored.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)

    def wait_for_the_end() -> None:
        while os.read(0, 1024):  # not sys.stdin: its lock must be free when Python exits
            pass
        main_thread = threading.main_thread().ident
        if hasattr(signal, "pthread_kill") and main_thread is not None:
            signal.pthread_kill(main_thread, signal.SIGINT)  # also ends a wait for the system
        else:
            _thread.interrupt_main()

    threading.Thread(target=wait_for_the_end, daemon=True).start()


if __name__ == "__main__":
    listen()
    sys.exit(main(sys.argv[1:]))
