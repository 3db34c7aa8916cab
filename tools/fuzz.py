"""Damaged files at random, and what the five readers say to them.

    python tools/fuzz.py                              every reader, 500 files each
    python tools/fuzz.py annotations --count 20000 --seed 0
    python tools/fuzz.py images --seed 0 --show 1234  keep this one and print what it comes to
    python tools/fuzz.py --count 20000 --write        all, into notebooks/results/fuzz.json

File number i of a reader is a function of (seed, reader, i). A process of its own reads them, so
that a crash or a hang (more than LIMIT seconds) is an outcome too; what it has done is kept under
build/fuzz, and the same command goes on from there. The outcomes are those of tools/readers.py.
"""

import argparse
import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, too

from tools import readers

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "fuzz"
RESULTS = ROOT / "notebooks" / "results" / "fuzz.json"
FUZZED = ("annotations", "results", "config", "weights", "images")
LIMIT = 20
"""Seconds for one file."""
ROOM = 6 * 2**30
"""Bytes of address space a reader may take beyond what the libraries have."""
NASTY: list[Any] = [
    *(None, True, 0, -1, 3, 10**18, 10**400, -(10**400), 2**31 - 1, 2**63, 0.5, 1e308, -1e308),
    *(float("nan"), float("inf"), "", "3", "\0", "\ud800", "\x1b[31m", "../../x", "a" * 300),
    *([], [[]], [[[]]], {}, {"counts": []}, {"size": [2, 2], "counts": "\ud800"}, [0, 0, 0, 0]),
    {"size": [10**8, 10**8], "counts": [0, 10**16]},
    {"size": [48, 64], "counts": [10**400]},
    {"size": [48, 64], "counts": [0, 3072, 2**32 - 3072, 3072]},
]
CHANGES = (
    "nasty",
    "nasty",
    "lose",
    "double",
    "other",
    "alike",
    "alike",
    "text",
    "wrap",
    *["number"] * 3,
)
"""Of a place in a json file: each as often as it stands here."""
Seeds = list[tuple[str, bytes]]
"""Sound files: suffix and content."""


# ---- sound files ---------------------------------------------------------------------------------


def annotation_seeds() -> Seeds:
    height, width = readers.SIZE
    files = [f"{number}.png" for number in (1, 2, 3)]
    entries: list[dict[str, Any]] = [
        {"id": i, "file_name": n, "height": height, "width": width} for i, n in enumerate(files)
    ]
    objects: list[dict[str, Any]] = []
    for image in range(3):
        for x, y, w, h in ((4 + image, 6, 20, 16), (34, 20 + image, 24, 18)):
            outline = [x, y, x + w, y, x + w, y + h, x, y + h]
            where = {"image_id": image, "category_id": (1, 3)[len(objects) % 2]}
            shape = {"bbox": [x, y, w, h], "area": w * h, "segmentation": [outline]}
            objects.append({"id": len(objects) + 1, "iscrowd": 0} | where | shape)
    for number in (1, 3, 4):
        text = box_mask(objects[number]["bbox"])
        objects[number]["segmentation"] = {"size": [height, width], "counts": text}
    x, y, w, h = objects[1]["bbox"]
    plain = [height * x + y, *([h, height - h] * w)]
    plain[-1] = height * width - sum(plain[:-1])
    objects[1] |= {"iscrowd": 1, "segmentation": {"size": [height, width], "counts": plain}}
    categories = [{"id": 1, "name": "cell"}, {"id": 3, "name": "nucleus"}]
    content = {"images": entries, "annotations": objects, "categories": categories}
    return [(".json", json.dumps(content).encode())]


def box_mask(box: list[int]) -> str:
    """Compressed run lengths of a filled box in an image of `readers.SIZE`."""
    from mimdet.structures import bitmap_to_rle

    bitmap = np.zeros(readers.SIZE, np.uint8)
    x, y, w, h = box
    bitmap[y : y + h, x : x + w] = 1
    return str(bitmap_to_rle(bitmap)["counts"])


def result_seeds() -> Seeds:
    found = []
    for score, one in enumerate(readers.results_truth()["annotations"], start=1):
        result = {key: one[key] for key in ("image_id", "category_id", "bbox")}
        mask = {"size": list(readers.SIZE), "counts": box_mask(one["bbox"])}
        found.append(result | {"score": score / 8, "segmentation": mask})
    return [(".json", json.dumps(found).encode())]


def config_seeds() -> Seeds:
    from mimdet import presets
    from mimdet.config import to_dict

    made = (presets.tiny(), presets.PRESETS["tiny_swin"]())
    return [(".json", json.dumps(to_dict(cfg)).encode()) for cfg in made]


def weight_seeds() -> Seeds:
    """A detector that describes itself; an autoencoder as a zip and as a plain pickle."""
    import torch

    from mimdet import presets
    from mimdet.models.detector import build_detector
    from mimdet.models.mae import MAE
    from mimdet.models.official import save_detector

    cfg = presets.tiny()
    b = cfg.backbone
    b.embed_dim, b.depth, b.num_heads, b.position_grid = 16, 1, 2, 4
    b.decoder_dim, b.decoder_depth, b.decoder_heads = 16, 1, 2
    cfg.detector.channels, cfg.detector.box_fc_dim = 8, 8
    cfg.detector.box_convs, cfg.detector.mask_convs, cfg.detector.rpn_convs = 1, 1, 1
    model = build_detector(cfg)
    model.categories = ["thing"] * cfg.detector.num_classes
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "w.safetensors")
        save_detector(model, file)
        seeds = [(".safetensors", file.read_bytes())]
    state = {"model": MAE(32, 16, 16, 1, 2, 16, 1, 2).state_dict(), "epoch": 1}
    for as_zip in (True, False):
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=as_zip)
        seeds.append((".pth", buffer.getvalue()))
    return seeds


def image_seeds() -> Seeds:
    noise = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    colour = Image.fromarray(noise)
    turned = Image.Exif()
    turned[0x0112] = 6
    made: list[tuple[str, Image.Image, dict[str, Any]]] = [
        (".png", colour, {}),
        (".png", colour.convert("P"), {}),
        (".png", Image.fromarray(noise[..., 0].astype(np.uint16) * 257), {}),
        (".png", colour.convert("RGBA"), {"exif": turned}),
        (".jpg", colour, {"exif": turned}),
        (".jpg", colour.convert("CMYK"), {"progressive": True}),
        (".tif", colour, {"compression": "tiff_lzw"}),
        (".tif", colour.convert("LAB"), {}),
        (".gif", colour.convert("P"), {}),
        (".bmp", colour, {}),
        (".webp", colour, {"lossless": True}),
        (".ppm", colour, {}),
    ]
    seeds = []
    for suffix, image, options in made:
        buffer = io.BytesIO()
        image.save(buffer, Image.registered_extensions()[suffix], **options)
        seeds.append((suffix, buffer.getvalue()))
    return seeds


SEEDS: dict[str, Callable[[], Seeds]] = {
    "annotations": annotation_seeds,
    "results": result_seeds,
    "config": config_seeds,
    "weights": weight_seeds,
    "images": image_seeds,
}


# ---- damage --------------------------------------------------------------------------------------


def pick(rng: Generator, values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def damaged_bytes(data: bytes, rng: Generator) -> bytes:
    """One or two of: cut off, bits turned, bytes overwritten, a piece doubled, lost or moved."""
    content = bytearray(data)
    for _ in range(1 + int(rng.random() < 0.3)):
        size = len(content)
        if not size:
            break
        start = int(rng.integers(size))
        length = int(rng.integers(1, 1 + min(size - start, pick(rng, (1, 4, 64, size)))))
        stop = start + length
        match pick(rng, ("cut", "turn", "turn", "random", "extreme", "double", "lose", "move")):
            case "cut":
                del content[start:]
            case "turn":
                content[start] ^= 1 << int(rng.integers(8))
            case "random":
                content[start : start + 8] = rng.bytes(min(8, size - start))
            case "extreme":
                extreme = pick(rng, (b"\0", b"\xff", b"\x7f", b"\x80")) * int(rng.integers(1, 9))
                content[start : start + len(extreme)] = extreme
            case "double":
                content[start:start] = content[start:stop]
            case "lose":
                del content[start:stop]
            case "move":
                piece = content[start:stop]
                del content[start:stop]
                place = int(rng.integers(len(content) + 1))
                content[place:place] = piece
    return bytes(content)


def damaged_value(value: Any, rng: Generator) -> Any:
    """The content of a json file with one or two places changed, mostly fields of an entry."""
    holder = [value]
    for _ in range(1 + int(rng.random() < 0.3)):
        places = [(parent, key) for parent in _containers(holder) for key in _keys(parent)]
        fields = [place for place in places if isinstance(place[0], dict)]
        parent, key = pick(rng, fields if fields and rng.random() < 0.6 else places)
        old, other = parent[key], pick(rng, places)
        alike = [p[k] for p, k in places if k == key and type(p) is type(parent)]
        match pick(rng, CHANGES):
            case "nasty":
                parent[key] = pick(rng, NASTY)
            case "lose" if parent is not holder:
                del parent[key]
            case "double" if isinstance(parent, list) and parent is not holder:
                parent.insert(key, old)
            case "double" if isinstance(parent, dict):
                parent[f"{key}_"] = parent.pop(key)
            case "other":
                parent[key] = json.loads(json.dumps(other[0][other[1]]))
            case "alike":
                parent[key] = json.loads(json.dumps(pick(rng, alike)))
            case "text":
                parent[key] = json.dumps(old) if rng.random() < 0.5 else str(old)
            case "wrap":
                parent[key] = [old] if rng.random() < 0.5 else {"size": old}
            case "number" if _is_moderate(old):
                parent[key] = pick(rng, (-old, old + 1, old * 1.5, old * 1e6, float(old), old / 7))
            case "number" if isinstance(old, list) and all(map(_is_moderate, old)):
                parent[key] = [pick(rng, (-1, 0.5, 2, 10)) * one for one in old]
    return holder[0]


def _is_moderate(value: Any) -> bool:
    """A number that one can calculate with."""
    return isinstance(value, int | float) and abs(value) < 1e300


def _containers(value: Any) -> list[Any]:
    found = [value]
    for one in found:
        inner = one.values() if isinstance(one, dict) else one
        found += [part for part in inner if isinstance(part, dict | list)]
    return found


def _keys(container: Any) -> list[Any]:
    return list(container) if isinstance(container, dict) else list(range(len(container)))


def damaged_json(data: bytes, rng: Generator) -> bytes:
    if rng.random() < 0.2:
        return damaged_bytes(data, rng)
    text = json.dumps(damaged_value(json.loads(data), rng)).encode()
    return damaged_bytes(text, rng) if rng.random() < 0.1 else text


def damaged_safetensors(data: bytes, rng: Generator) -> bytes:
    """Mostly in the header, with its length right: the reader gets past the first bytes."""
    if rng.random() < 0.2:
        return damaged_bytes(data, rng)
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    if rng.random() < 0.5:
        stored = header["__metadata__"]
        name = pick(rng, ("config", "config", "categories"))
        stored[name] = damaged_json(stored[name].encode(), rng).decode(errors="replace")
    else:
        names = [pick(rng, list(header)) for _ in range(4)]
        changed = damaged_value({name: header[name] for name in names}, rng)
        header = header | changed if isinstance(changed, dict) else changed
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def damaged_zip(data: bytes, rng: Generator) -> bytes:
    """One of its entries, with the sum right; or anything."""
    if rng.random() < 0.4:
        return damaged_bytes(data, rng)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(buffer, "w") as target:
        names = source.namelist()
        pickle = next(name for name in names if name.endswith("data.pkl"))
        chosen = pickle if rng.random() < 0.7 else pick(rng, names)
        for name in names:
            content = source.read(name)
            target.writestr(name, damaged_bytes(content, rng) if name == chosen else content)
    return buffer.getvalue()


def file_number(reader: str, seed: int, index: int, seeds: Seeds) -> tuple[str, bytes]:
    """Suffix and content of the damaged file."""
    rng = np.random.default_rng([seed, FUZZED.index(reader), index])
    suffix, data = pick(rng, seeds)
    if suffix == ".json":
        return suffix, damaged_json(data, rng)
    if suffix == ".safetensors":
        return suffix, damaged_safetensors(data, rng)
    if suffix == ".pth" and data.startswith(b"PK"):
        return suffix, damaged_zip(data, rng)
    return suffix, damaged_bytes(data, rng)


# ---- reading them --------------------------------------------------------------------------------


def peak_mb() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def work(reader: str, seed: int, start: int, stop: int, file: Path) -> None:
    """Read the files from start to stop; append what each comes to, a line of json, to `file`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MIMDET_CACHE"] = str(folder / "cache")
        pictures = folder / readers.PICTURES
        pictures.mkdir()
        for number in (1, 2, 3):
            Image.new("RGB", readers.SIZE[::-1], (50 * number, 90, 90)).save(
                pictures / f"{number}.png"
            )
        seeds = SEEDS[reader]()
        for suffix, data in seeds:  # loads what there is to load
            path = folder / f"sound{suffix}"
            path.write_bytes(data)
            kind, message = readers.outcome(reader, path)
            assert kind in (readers.ACCEPTED, readers.WARNED), message
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        before = peak_mb()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever it is doing
        with file.open("a") as log:
            for index in range(start, stop):
                suffix, data = file_number(reader, seed, index, seeds)
                path = folder / f"damaged{suffix}"
                path.write_bytes(data)
                signal.alarm(LIMIT)
                began = time.monotonic()
                kind, message = readers.outcome(reader, path)
                signal.alarm(0)
                row = {
                    "index": index,
                    "outcome": kind,
                    "seconds": round(time.monotonic() - began, 3),
                }
                row["mb"] = round(peak_mb() - before)
                if kind not in readers.GOOD:
                    row["message"] = message[:300]
                print(json.dumps(row), file=log, flush=True)
                for table in (folder / "cache").glob("*"):
                    table.unlink()


def run(reader: str, count: int, seed: int, folder: Path = KEPT) -> list[dict[str, Any]]:
    """What each of `count` files comes to; goes on with what `folder` holds of them."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{reader}-{seed}.jsonl"
    while len(rows := _rows(file)) < count:
        words = ["--work", str(file), "--seed", str(seed), "--count", str(count)]
        child = subprocess.run(
            [sys.executable, __file__, reader, *words, "--start", str(len(rows))],
            capture_output=True,
            text=True,
        )
        if child.returncode > 0:
            raise RuntimeError(f"the reading process ended: {child.stderr[-2000:]}")
        if -child.returncode in (signal.SIGTERM, signal.SIGINT):
            raise KeyboardInterrupt("stopped from outside; the same command goes on")
        if child.returncode < 0:
            hung = -child.returncode == signal.SIGALRM
            ended = {"index": len(_rows(file)), "outcome": readers.HANG if hung else readers.CRASH}
            ended |= {"seconds": LIMIT if hung else 0, "mb": 0}
            ended["message"] = signal.Signals(-child.returncode).name
            with file.open("a") as log:
                print(json.dumps(ended), file=log)
    return rows[:count]


def _rows(file: Path) -> list[dict[str, Any]]:
    """The complete lines; half a one, of a killed process, is taken off."""
    if not file.exists():
        return []
    whole = file.read_text().rpartition("\n")[0]
    file.write_text(whole + "\n" if whole else "")
    return [json.loads(line) for line in whole.splitlines()]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    counts = Counter(row["outcome"] for row in rows)
    figures = {"slowest_seconds": max(row["seconds"] for row in rows)}
    figures["peak_mb"] = max(row["mb"] for row in rows)
    return {"files": len(rows)} | {kind: counts[kind] for kind in readers.OUTCOMES} | figures


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, a row a reader."""
    columns = ["files", *readers.OUTCOMES, "slowest_seconds", "peak_mb"]
    heads = [
        name.replace("slowest_seconds", "slowest, s").replace("peak_mb", "peak, MB")
        for name in columns
    ]
    lines = ["| reader | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(columns)]
    for reader, row in results.items():
        lines.append(f"| {reader} | " + " | ".join(f"{row[name]:,}" for name in columns) + " |")
    return "\n".join(lines)


def show(reader: str, seed: int, index: int) -> None:
    suffix, data = file_number(reader, seed, index, SEEDS[reader]())
    path = KEPT / f"{reader}-{seed}-{index}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    print(path, *readers.outcome(reader, path), sep="\n")
    readers.READERS[reader](path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("readers", nargs="*", choices=[*FUZZED, []], default=[])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    chosen = given.readers or FUZZED
    if given.work:
        work(chosen[0], given.seed, given.start, given.count, given.work)
        return 0
    if given.show is not None:
        show(chosen[0], given.seed, given.show)
        return 0
    found, bad = {}, 0
    for reader in chosen:
        rows = run(reader, given.count, given.seed)
        found[reader] = summary(rows)
        for row in rows:
            if row["outcome"] not in readers.GOOD:
                bad += 1
                print(reader, json.dumps(row))
    print(table(found))
    if given.write:
        command = f"python tools/fuzz.py --count {given.count} --seed {given.seed} --write"
        RESULTS.write_text(json.dumps({"command": command, "readers": found}, indent=2) + "\n")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
