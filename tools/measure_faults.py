"""Broken and hostile files, one of a kind: what the kit says to each, in how long, with how much.

    python tools/measure_faults.py            print the table
    python tools/measure_faults.py --write    and write notebooks/results/faults.json and the page
    python tools/measure_faults.py --docs     the page alone, docs/faults.md, from what was measured

tests/faults/corpus.toml says of each file what is wrong with it and what comes of it; small ones
lie in tests/faults/corpus, the others are made by tools/broken_files.py. Each is read in a process
of its own, which has the libraries loaded: seconds and MiB are those of the file alone.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, too

from tools import broken_files, fuzz, readers

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "tests" / "faults"
MEASURED = ROOT / "notebooks" / "results" / "faults.json"
PAGE = ROOT / "docs" / "faults.md"


class Fault(NamedTuple):
    """A row of corpus.toml."""

    reader: str
    file: str
    outcome: str
    said: str
    """A pattern of the error or warning."""
    wrong: str
    """With the file, in words."""


def faults() -> list[Fault]:
    table = tomllib.loads((FAULTS / "corpus.toml").read_text("utf-8"))
    return [
        Fault(reader, file, *row) for reader, rows in table.items() for file, row in rows.items()
    ]


def prepare(fault: Fault, folder: Path, content: bytes | None = None) -> Path:
    """The file in a folder of its own, with what belongs to it; content: if not of the corpus."""
    place = folder / "here"
    place.mkdir()
    if fault.reader == "annotations":
        (place / readers.PICTURES).mkdir()
        for number in (1, 2, 3):
            picture = Image.new("RGB", readers.SIZE[::-1], (50 * number, 90, 90))
            picture.save(place / readers.PICTURES / f"{number}.png")
        Image.new("RGB", readers.SIZE[::-1]).save(place / "outside.png")
    file = place / fault.file
    if content is not None:
        file.write_bytes(content)
    elif fault.file in broken_files.MADE:
        broken_files.MADE[fault.file](file)
    else:
        shutil.copy(FAULTS / "corpus" / fault.reader / fault.file, file)
    return file


def left_behind(folder: Path) -> set[str]:
    """Everything below the folder, but what readers may write: the cache, what is unpacked."""
    own = ("here/unpacked", "here/again.json", "cache")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    return {name for name in names if not name.startswith(own) and "__pycache__" not in name}


def read(fault: Fault, folder: Path) -> tuple[readers.Outcome, float]:
    """Outcome and CPU seconds; `folder` is an empty one. RuntimeError if it left anything there."""
    file = prepare(fault, folder)
    before, home = left_behind(folder), Path.cwd()
    os.chdir(file.parent)
    began = time.process_time()
    try:
        found = readers.outcome(fault.reader, file)
    finally:
        os.chdir(home)
    seconds = time.process_time() - began
    new = left_behind(folder) - before
    if new or (file.parent / broken_files.EVIL).exists():
        raise RuntimeError(f"{fault.file} left {sorted(new)} behind")
    return found, seconds


# ---- measuring -----------------------------------------------------------------------------------


def load_libraries() -> None:
    """By reading a sound file of each kind."""
    for reader, seeds in fuzz.SEEDS.items():
        suffix, data = seeds()[0]
        with tempfile.TemporaryDirectory() as name:
            os.environ["MIMDET_CACHE"] = name
            file = prepare(Fault(reader, f"sound{suffix}", "", "", ""), Path(name), data)
            kind, message = readers.outcome(reader, file)
            assert kind == readers.ACCEPTED, message


def measure(fault: Fault) -> dict[str, Any]:
    """In a child process: outcome, seconds, MiB above what there was before the file was read."""
    to_read, to_write = os.pipe()
    child = os.fork()
    if child == 0:
        with tempfile.TemporaryDirectory() as name:
            os.environ["MIMDET_CACHE"] = str(Path(name, "cache"))
            file = prepare(fault, Path(name))
            os.chdir(file.parent)
            before, began = fuzz.peak_mb(), time.monotonic()
            kind, message = readers.outcome(fault.reader, file)
            message = message.replace(f"{file.parent}/", "").replace(f"{name}/", "")
            row = {"outcome": kind, "seconds": round(time.monotonic() - began, 2)}
            size = file.stat().st_size / 2**20 if file.is_file() else 0
            row |= {"mb": round(fuzz.peak_mb() - before), "file_mb": round(size, 3)}
            os.chdir("/")
        os.write(to_write, json.dumps(row | {"message": message[:400]}).encode())
        os._exit(0)
    os.close(to_write)
    with os.fdopen(to_read, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if status or not told:
        return {
            "outcome": readers.CRASH,
            "seconds": 0,
            "mb": 0,
            "file_mb": 0,
            "message": str(status),
        }
    found: dict[str, Any] = json.loads(told)
    return found


def page(measured: dict[str, Any]) -> str:
    """docs/faults.md."""
    rows = faults()
    lines = [
        "# Files that are broken, and what is said about them",
        "",
        "Made by `python tools/measure_faults.py --write` from `tests/faults/corpus.toml`; the",
        "tests read every one of these files and hold this page to the table. *Refused*: an error",
        "that names the file, and the entry, tensor or field where one is at fault. Nothing is",
        "executed, and nothing written or read outside the folder it belongs to.",
        "",
        "Seconds and MiB are those of reading one file, on one core; MiB above what the process",
        f"had before. {len(rows)} files.",
    ]
    for reader in dict.fromkeys(fault.reader for fault in rows):
        lines += [
            "",
            f"## {reader.capitalize()}",
            "",
            "| file | what is wrong | outcome | s | MiB |",
        ]
        lines.append("|---|---|---|---:|---:|")
        for fault in rows:
            if fault.reader == reader:
                numbers = measured.get(f"{reader}/{fault.file}", {"seconds": "", "mb": ""})
                cells = [f"`{fault.file}`", fault.wrong, fault.outcome]
                cells += [str(numbers["seconds"]), str(numbers["mb"])]
                lines.append(f"| {' | '.join(cells)} |")
    if fuzz.RESULTS.exists():
        found = json.loads(fuzz.RESULTS.read_text())
        lines += [
            "",
            "## Files damaged at random",
            "",
            f"`{found['command']}`; outcomes as above.",
            "",
        ]
        lines.append(fuzz.table(found["readers"]))
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--docs", action="store_true")
    given = parser.parse_args(arguments)
    if given.docs:
        PAGE.write_text(page(json.loads(MEASURED.read_text())["files"]), encoding="utf-8")
        return 0
    load_libraries()
    measured, wrong = {}, 0
    for fault in faults():
        row = measured[f"{fault.reader}/{fault.file}"] = measure(fault)
        differs = row["outcome"] != fault.outcome
        wrong += differs
        print(
            f"{'WRONG ' if differs else ''}{fault.reader}/{fault.file}: {json.dumps(row)}",
            flush=True,
        )
    print(f"{len(measured)} files, {wrong} with another outcome than corpus.toml says")
    if given.write:
        content = {"command": "python tools/measure_faults.py --write", "files": measured}
        MEASURED.write_text(json.dumps(content, indent=1) + "\n")
        PAGE.write_text(page(measured), encoding="utf-8")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
