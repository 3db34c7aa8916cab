"""A short training, killed and starved of disk at every operation on a file, then run again.

    python -m tests.faults.interruptions kill       # one process killed per place
    python -m tests.faults.interruptions disk       # ENOSPC, EIO, read-only at every place

Each case is the same two commands, `mimdet train` (evaluations, checkpoints, rotation) and `mimdet
evaluate`, in a process of its own; then again without a fault. The end has to be that of a run that
nothing happened to: weights bit-identical, the same rows, nothing left over. Figures go to
notebooks/results/interruptions.json.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from tqdm import tqdm

from mimdet import cli
from mimdet.files import write_json
from tests.faults.layer import Fault, Operations, in_child
from tests.small import WORDS, assert_same_end, write_coco

RESULTS = Path(__file__).resolve().parents[2] / "notebooks/results/interruptions.json"
OPTIONS = "--accumulate 2 --workers 0 --checkpoint-every-steps 1 --keep-checkpoints 2"
REMEDIES = ("free", "space", "permission", "writ", "disk", "again")


@dataclass
class Place:
    """A folder with data, and the run that is trained on them."""

    folder: Path
    steps: int = 8
    log: Path = field(init=False)
    run: Path = field(init=False)

    def __post_init__(self) -> None:
        self.run = self.folder / "run"
        self.log = self.folder.with_suffix(".log")
        (self.folder / "data").mkdir(parents=True)
        write_coco(self.folder / "data", [[[8, 8, 24, 24]], [[20, 10, 30, 30], [4, 4, 12, 40]]] * 2)

    def commands(self) -> None:
        os.environ["MIMDET_CACHE"] = str(self.folder / "cache")
        data = self.folder / "data"
        words = ["--source", "coco", "--steps", str(self.steps), "--evaluate-every-steps", "3"]
        for split in ("train", "val"):
            words += [f"--{split}-json", str(data / "annotations.json")]
            words += [f"--{split}-images", str(data / "images")]
        cli.main(
            ["train", "tiny", str(self.run), *WORDS, *OPTIONS.split(), "--batch-size", "1", *words]
        )
        cli.main(["evaluate", str(self.run), "--ratios", "0.5", "1"])

    def undisturbed(self) -> int:
        """Run the commands; how they ended."""
        return in_child(self.commands, self.log)

    def with_fault(self, fault: Fault | None) -> tuple[int, dict[str, Any]]:
        """Run them with a fault: how they ended, and what the layer saw."""
        told = self.folder.with_suffix(".json")
        told.unlink(missing_ok=True)

        def work() -> None:
            layer = Operations(self.folder, fault)
            try:
                self.commands()
            finally:
                layer._busy = True
                told.write_text(json.dumps({"seen": layer.seen, "failed": layer.failed}))

        code = in_child(work, self.log)
        return code, json.loads(told.read_text()) if told.exists() else {}


@contextmanager
def fresh(folder: Path, steps: int = 8) -> Iterator[Place]:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield Place(folder, steps)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def leftovers(folder: Path) -> list[str]:
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if "partial" in p.name]


def damaged(folder: Path) -> list[str]:
    """Files of a run that cannot be read."""
    found = []
    for path in sorted(folder.rglob("*")):
        if "partial" in str(path.relative_to(folder)) or not path.is_file():
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
        except Exception as error:
            found.append(f"{path.relative_to(folder)}: {error}")
    return found


def goes_on(place: Place, reference: Place) -> list[str]:
    """What is wrong once the same commands were given again; nothing is right."""
    code = place.undisturbed()
    if code:
        return [f"the same command ended with {code}: {place.log.read_text()[-400:]}"]
    wrong = leftovers(place.folder)
    try:
        assert_same_end(place.run, reference.run)
    except AssertionError as error:
        wrong.append(f"another end: {str(error)[:200]}")
    for name in ("eval.json", "predictions.json", "evaluation.json"):
        if _numbers(place.run / name) != _numbers(reference.run / name):
            wrong.append(f"another {name}")
    return wrong


TIMES = ("seconds", "time", "milliseconds", "images_per_second")


def _numbers(path: Path) -> Any:
    """What a file says, without times and places."""

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: bare(v) for k, v in value.items() if not any(t in k for t in TIMES)}
        return [bare(v) for v in value] if isinstance(value, list) else value

    return bare(json.loads(path.read_text()))


def killed_at_random(place: Place, seconds: float) -> int:
    """Run the commands and kill them after a while."""

    def work() -> None:
        timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
        place.commands()

    return in_child(work, place.log)


def kill(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """`count` kills: a tenth in the middle of a write, a tenth at random moments, the others
    before an operation, spread over all of them."""
    rng = random.Random(seed)
    wrong: dict[str, list[str]] = {}
    with fresh(folder / "reference") as reference:
        begin = time.monotonic()
        code, told = reference.with_fault(None)
        assert code == 0, reference.log.read_text()
        took = time.monotonic() - begin
        seen = told["seen"]
        writes = [i for i, (what, _) in enumerate(seen) if what in ("fsync", "write", "append")]
        tenth = max(1, count // 10)
        halves = rng.sample(writes, min(tenth, len(writes)))
        cases: list[Fault | float] = [Fault(i, "half") for i in halves]
        cases += [rng.uniform(0, took) for _ in range(tenth)]
        rest = min(count - len(cases), len(seen))
        cases += [Fault(i, "kill") for i in sorted(rng.sample(range(len(seen)), rest))]
        left = 0
        kinds: Counter[str] = Counter()
        for case in tqdm(cases, "kills"):
            with fresh(folder / "case") as place:
                if isinstance(case, Fault):
                    code, _ = place.with_fault(case)
                    name = f"{case.kind} at {case.at}: {' '.join(seen[case.at])}"
                    kinds[case.kind] += 1
                    if code != -signal.SIGKILL:
                        wrong[name] = [f"was not killed: {code}"]
                        continue
                else:
                    killed_at_random(place, case)
                    name = f"after {case:.2f} s"
                    kinds["random moment"] += 1
                left += bool(leftovers(place.folder))
                found = damaged(place.folder) + goes_on(place, reference)
                if found:
                    wrong[name] = found
    return {
        "kills": dict(kinds),
        "operations of the run": len(seen),
        "with leftovers right after the kill": left,
        "wrong": wrong,
    }


def disk(folder: Path, every: int) -> dict[str, Any]:
    """ENOSPC and a read-only folder from each operation on, EIO at each; then the fault is over."""
    wrong: dict[str, list[str]] = {}
    kinds: Counter[str] = Counter()
    with fresh(folder / "reference") as reference:
        code, told = reference.with_fault(None)
        assert code == 0, reference.log.read_text()
        seen = told["seen"]
        places = range(0, len(seen), every)
        errors = ("ENOSPC", "EIO", "EROFS")
        faults = [Fault(i, kind, kind != "EIO") for i in places for kind in errors]
        for fault in tqdm(faults, "faults"):
            with fresh(folder / "case") as place:
                code, told = place.with_fault(fault)
                name = f"{fault.kind} at {fault.at}: {' '.join(seen[fault.at])}"
                found = damaged(place.folder)
                kinds[f"{fault.kind}, exit code {code}"] += 1
                if told.get("failed") and code:
                    found += words_of(place.log.read_text(), told["failed"][0])
                elif code < 0 or code == 1:
                    found.append(f"ended with {code}: {place.log.read_text()[-300:]}")
                found += goes_on(place, reference)
                if found:
                    wrong[name] = found
    return {"faults": dict(kinds), "operations of the run": len(seen), "wrong": wrong}


def names(printed: str, place: Path) -> bool:
    """Whether the words name a file, a file in that folder, or the folder that it is in."""
    printed = re.sub(r"\.partial-[\w-]+", "", printed)  # how it is called while it is made
    itself, above = (re.escape(str(part)) for part in (place, place.parent))
    return bool(re.search(rf"/{itself}(?![\w.-])|/{above}(?![\w./-])", printed))


def words_of(printed: str, failed: str) -> list[str]:
    """What is wrong with the words after a failure of this file."""
    last = printed.strip().splitlines()[-1:] or [""]
    place = Path(*(part.partition(".partial-")[0] for part in Path(failed).parts))
    wrong = []
    if "Traceback" in printed:
        wrong.append(f"a traceback: {printed[-300:]}")
    elif not names(printed, place):
        wrong.append(f"does not name {failed}: {last}")
    if not any(word in printed for word in REMEDIES):
        wrong.append(f"no remedy: {last}")
    return wrong


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=("kill", "disk"))
    parser.add_argument("--count", type=int, default=300, help="kills")
    parser.add_argument("--every", type=int, default=1, help="disk faults at every so many places")
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if words.what == "kill":
            found = kill(Path(scratch), words.count, words.seed)
        else:
            found = disk(Path(scratch), words.every)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    command = f"python -m tests.faults.interruptions {words.what}"
    write_json(RESULTS, known | {words.what: {"command": command, **found}})
    print(json.dumps(found, indent=1)[:6000])


if __name__ == "__main__":
    main()
