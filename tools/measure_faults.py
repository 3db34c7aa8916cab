"""Broken and hostile files, one of a kind: what the kit says to each, in how long, with how much.

    python tools/measure_faults.py            print the table
    python tools/measure_faults.py --write    and write notebooks/results/faults.json and the page
    python tools/measure_faults.py --docs     the page alone, docs/faults.md, from what was measured

tests/faults/corpus.toml says of each file what is wrong with it and what comes of it; small ones
lie in tests/faults/corpus, the others are made here. Each is read in a process of its own, which
has the libraries loaded: seconds and MiB are those of the file alone.
"""

import argparse
import io
import json
import os
import pickle
import shutil
import stat
import struct
import sys
import tempfile
import time
import tomllib
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, too

from tools import fuzz, readers

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "tests" / "faults"
MEASURED = ROOT / "notebooks" / "results" / "faults.json"
PAGE = ROOT / "docs" / "faults.md"
EVIL = "was-executed"
"""A file of this name appears where a hostile file got code executed."""


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


# ---- files that are made -------------------------------------------------------------------------


def make_safetensors(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def detector_file(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A detector that describes itself, with a changed configuration."""
    (_, sound), *_ = fuzz.weight_seeds()
    length = struct.unpack("<Q", sound[:8])[0]
    header = json.loads(sound[8 : 8 + length])
    config = json.loads(header["__metadata__"]["config"])
    change(config)
    header["__metadata__"]["config"] = json.dumps(config)
    make_safetensors(path, header, sound[8 + length :])


def changed(section: str, **fields: Any) -> Callable[[Path], None]:
    return lambda path: detector_file(path, lambda config: config[section].update(fields))


def deep_json(path: Path) -> None:
    path.write_text("[" * 200_000)


def long_number(path: Path) -> None:
    path.write_text('{"images": ' + "1" * 20_000 + "}")


def image_link(path: Path) -> None:
    """An annotation file, and a link in its image folder that leads out."""
    (path.parent / "secret").mkdir()
    secret = path.parent / "secret" / "1.png"
    Image.new("RGB", readers.SIZE[::-1]).save(secret)
    (path.parent / readers.PICTURES / "link.png").symlink_to(secret)
    content = json.loads(fuzz.annotation_seeds()[0][1])
    content["images"][0]["file_name"] = "link.png"
    path.write_text(json.dumps(content))


class CallsTouch:
    def __reduce__(self) -> Any:
        return os.system, (f"touch {EVIL}",)


def pickle_that_calls(path: Path) -> None:
    import torch

    torch.save({"model": {"weight": torch.zeros(1)}, "more": CallsTouch()}, path)


def plain_pickle_that_calls(path: Path) -> None:
    path.write_bytes(pickle.dumps({"model": CallsTouch()}, protocol=2))


def repeated_tensor(path: Path) -> None:
    """4 TB as one number that stands for all."""
    import torch

    torch.save({"model": {"pos_embed": torch.zeros(1).expand(1, 10**6, 10**6)}}, path)


def deflated_weights(path: Path) -> None:
    """A PyTorch file whose zeros are packed: 1 GB in 1 MB."""
    import torch

    buffer = io.BytesIO()
    torch.save({"model": {"pos_embed": torch.zeros(1000)}}, buffer)
    with (
        zipfile.ZipFile(buffer) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in source.namelist():
            if not name.endswith("/data/0"):
                packed.writestr(name, source.read(name))
                continue
            with packed.open(name, "w", force_zip64=True) as entry:
                for _ in range(1024):
                    entry.write(bytes(2**20))


def long_header(path: Path) -> None:
    make_safetensors(path, b'{"a": "' + b" " * 99_000_000 + b'"}')


def many_tensors(path: Path) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    make_safetensors(path, {f"blocks.{i}.weight": entry for i in range(200_000)})


def png(path: Path, width: int, height: int, rows: int) -> None:
    """A black-and-white one that claims width x height pixels and holds some rows."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(rows * (1 + (width + 7) // 8)), 9)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def text_bomb(path: Path) -> None:
    """A PNG with 500 MB of text, packed."""
    png(path, 8, 8, 8)
    text = b"Comment\0\0" + zlib.compress(bytes(500_000_000), 9)
    check = zlib.crc32(b"zTXt" + text)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", check)
    data = path.read_bytes()
    path.write_bytes(data[:33] + chunk + data[33:])


def zipped(path: Path, *names: str, link: bool = False) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            entry = zipfile.ZipInfo(name)
            if link:
                entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(entry, b"..")


def damaged_archive(path: Path) -> None:
    zipped(path, "1.txt")
    path.write_bytes(path.read_bytes().replace(b"..", b".,", 1))


def run_of(path: Path, change: Callable[[dict[str, Any]], None] = lambda config: None) -> None:
    """A run with one checkpoint, its configuration changed."""
    (_, sound), *_ = fuzz.weight_seeds()
    length = struct.unpack("<Q", sound[:8])[0]
    metadata = json.loads(sound[8 : 8 + length])["__metadata__"]
    place = path / "checkpoints" / "000002"
    place.mkdir(parents=True)
    (place / "model.safetensors").write_bytes(sound)
    (path / "checkpoints" / "last").write_text("000002\n")
    config = json.loads(metadata["config"])
    change(config)
    (path / "config.json").write_text(json.dumps(config))
    (path / "categories.json").write_text(metadata["categories"])


def run_with_module(path: Path) -> None:
    run_of(path, lambda config: config["backbone"].update(sampler="helpful:part"))
    (path.parent / "helpful.py").write_text(f"open({EVIL!r}, 'w')\ndef part(*given): ...\n")


def run_with_stored_code(path: Path) -> None:
    run_of(path, lambda config: config["backbone"].update(sampler="own_sampler:part"))
    (path / "slots").mkdir()
    (path / "slots" / "own_sampler.py").write_text(f"open({EVIL!r}, 'w')\ndef part(*given): ...\n")
    stored = {"sampler": {"file": "own_sampler.py", "name": "part", "sha256": ""}}
    (path / "slots" / "slots.json").write_text(json.dumps(stored))


def last_outside(path: Path) -> None:
    run_of(path)
    run_of(path.parent / "other_run")
    (path / "checkpoints" / "last").write_text("../../other_run/checkpoints/000002\n")


def run_without_checkpoint(path: Path) -> None:
    run_of(path)
    shutil.rmtree(path / "checkpoints")


def run_cut_off(path: Path) -> None:
    run_of(path)
    file = path / "checkpoints" / "000002" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])


MADE: dict[str, Callable[[Path], None]] = {
    "deep.json": deep_json,
    "long_number.json": long_number,
    "image_link.json": image_link,
    "pickle_that_calls.pth": pickle_that_calls,
    "plain_pickle_that_calls.pth": plain_pickle_that_calls,
    "one_number_for_4_tb.pth": repeated_tensor,
    "packed_1_gb.pth": deflated_weights,
    "header_of_99_mb.safetensors": long_header,
    "200000_tensors.safetensors": many_tensors,
    "names_a_function.safetensors": changed("backbone", stem="os:_exit"),
    "names_a_module.safetensors": changed("backbone", kind="this:x"),
    "describes_2_tb.safetensors": changed("backbone", embed_dim=2**19, depth=24),
    "describes_another_depth.safetensors": changed("backbone", depth=3),
    "describes_no_model.safetensors": changed("backbone", num_heads=0),
    "claims_900_megapixels.png": lambda path: png(path, 30_000, 30_000, 8),
    "900_megapixels.png": lambda path: png(path, 30_000, 30_000, 30_000),
    "142_megapixels.png": lambda path: png(path, 4_120, 34_560, 34_560),
    "claims_4_gigapixels.png": lambda path: png(path, 2**31 - 1, 2, 1),
    "text_of_500_mb.png": text_bomb,
    "leaves_the_folder.zip": lambda path: zipped(path, "../evil", "a/../../evil", "/tmp/../evil"),
    "link.zip": lambda path: zipped(path, "link", link=True),
    "damaged.zip": damaged_archive,
    "names_a_module": run_with_module,
    "holds_code": run_with_stored_code,
    "last_outside": last_outside,
    "no_checkpoint": run_without_checkpoint,
    "cut_off_weights": run_cut_off,
}
"""Too large for the corpus, links, or folders: name -> what makes it."""


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
    elif fault.file in MADE:
        MADE[fault.file](file)
    else:
        shutil.copy(FAULTS / "corpus" / fault.reader / fault.file, file)
    return file


def left_behind(folder: Path) -> set[str]:
    """Everything below the folder, but what readers may write: the cache, what is unpacked."""
    own = ("here/unpacked", "here/again.json", "cache")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    return {name for name in names if not name.startswith(own) and "__pycache__" not in name}


def read(fault: Fault, folder: Path) -> readers.Outcome:
    """Read one in `folder`, an empty one. RuntimeError if anything was written beside it."""
    file = prepare(fault, folder)
    before, home = left_behind(folder), Path.cwd()
    os.chdir(file.parent)
    try:
        found = readers.outcome(fault.reader, file)
    finally:
        os.chdir(home)
    new = left_behind(folder) - before
    if new or (file.parent / EVIL).exists():
        raise RuntimeError(f"{fault.file} left {sorted(new)} behind")
    return found


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
