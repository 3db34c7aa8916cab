"""Broken and hostile files of weights: refused by name, in seconds, without memory."""

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mimdet
from mimdet.models.checkpoint_files import read_safetensors
from mimdet.models.detector import build_detector
from mimdet.models.mae import MAE
from tests.small import small

ROOT = Path(__file__).resolve().parents[2]
READ = """
import json, re, resource, sys, time
from pathlib import Path
import mimdet

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

mimdet.load_detector("tiny")
resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, 16 * 2**30))
for path in sys.stdin.read().splitlines():
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = peak(), time.process_time()
    try:
        (mimdet.load_mae_model if "mae" in path else mimdet.load_detector)(path)
        outcome = "accepted"
    except (ValueError, FileNotFoundError) as error:
        outcome = str(error)
    cost = time.process_time() - start, peak() - before
    print(json.dumps([Path(path).name, outcome, *cost]), flush=True)
"""


def described(path: Path, **fields: Any) -> None:
    """A file that describes itself, with other numbers in its configuration."""
    mimdet.save_detector(build_detector(small()), path)
    tensors, metadata = read_safetensors(path)
    config = json.loads(metadata["config"])
    for name, value in fields.items():
        section, _, field = name.partition("_")
        config[section][field] = value
    del metadata["model_part"]
    save_file(tensors, path, metadata | {"config": json.dumps(config)})


def header(path: Path, entries: dict[str, Any], data: bytes = b"") -> None:
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(shape: list[int], *offsets: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": list(offsets)}


def expanded(path: Path) -> None:
    torch.save({"model": {"a": torch.ones(1).expand(10**12)}}, path)


def many_views(path: Path) -> None:
    """Each fits into its storage; together they are a hundred times the file."""
    whole = torch.ones(2**20, dtype=torch.float16)
    torch.save({f"a{i}": whole.view(2**10, 2**10)[:, :] for i in range(4000)}, path)


def compressed(path: Path) -> None:
    torch.save({"a": torch.zeros(8)}, path)
    with zipfile.ZipFile(path) as file:
        records = {info.filename: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in records.items():
            if not name.endswith("data.pkl"):
                file.writestr(name, content)
                continue
            with file.open(name, "w", force_zip64=True) as record:
                for _ in range(3 * 2**10):
                    record.write(bytes(2**20))


def longer_storage(path: Path) -> None:
    """The pickle says that a record is longer than it is: what follows in memory would be read."""
    torch.save({"a": torch.ones(64)}, path)
    with zipfile.ZipFile(path) as file:
        records = {info.filename: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in records.items():
            if name.endswith("data.pkl"):
                assert content.count(b"K@") == 2  # 64: numbers of the storage, and of the tensor
                content = content.replace(b"K@", b"K\xff")
            file.writestr(name, content)


class Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch was-executed",)


class Takes:
    """A call that the reader allows, with a number that is not."""

    def __reduce__(self) -> Any:
        return bytearray, (10**11,)


def old_format(path: Path) -> None:
    torch.save({"a": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"K\x04", b"M\xff\xff"))


def mae_tensors(changed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return MAE(64, 16, 64, 2, 4, 32, 1, 2).state_dict() | changed


def wide_mae(path: Path) -> None:
    """20 MB of positions, from whose width layers of 12 TB would follow."""
    file = mae_tensors({"pos_embed": torch.ones(1, 5, 2**20)})
    save_file(file, path, {"num_heads": "16", "decoder_heads": "2"})


def cut(path: Path) -> None:
    described(path)
    path.write_bytes(path.read_bytes()[:-1000])


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a stride of 0.pth": (expanded, "a of shape .* the file does not hold as many"),
    "views.pth": (many_views, "its tensors take 8,388,608,000 bytes"),
    "compressed.pth": (compressed, r"would unpack to 3,22\d,\d+,\d+ bytes"),
    "a longer storage.pth": (longer_storage, "record size|the file does not hold as many"),
    "code.pth": (lambda p: torch.save({"a": Runs()}, p), r"can run any code"),
    "code without a zip.pth": (
        lambda p: p.write_bytes(pickle.dumps({"a": Runs()})),
        "damaged|code",
    ),
    "a long array.pth": (lambda p: torch.save({"a": Takes()}, p), "bytearray|damaged"),
    "old format.pth": (old_format, "cut off or damaged|not hold as many"),
    "sparse.pth": (lambda p: torch.save({"a": torch.eye(3).to_sparse()}, p), "a is torch.sparse"),
    "meta.pth": (
        lambda p: torch.save({"a": torch.empty(10**12, device="meta")}, p),
        "a is .* on meta|damaged",
    ),
    "names.pth": (lambda p: torch.save(OrderedDict({1: torch.ones(1)}), p), "name"),
    "a long header.safetensors": (
        lambda p: header(p, {f"{i:0990}": entry([0], 0, 0) for i in range(93_000)}),
        r"a header of 9\d,\d+,\d+ bytes",
    ),
    "a header beyond its end.safetensors": (
        lambda p: p.write_bytes(struct.pack("<Q", 5_000_000) + b"{}"),
        "cut off or damaged",
    ),
    "overlap.safetensors": (
        lambda p: header(p, {"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
        "cut off or damaged",
    ),
    "negative.safetensors": (
        lambda p: header(p, {"a": entry([2], -8, 0)}, bytes(8)),
        "cut off or damaged",
    ),
    "a shape too large.safetensors": (
        lambda p: header(p, {"a": entry([2**40, 2**40], 0, 8)}, bytes(8)),
        "cut off or damaged",
    ),
    "truncated.safetensors": (cut, "cut off or damaged"),
    "2 TB.safetensors": (
        lambda p: described(p, backbone_embed_dim=2**17, backbone_num_heads=2**10),
        "has shape .* this model's has",
    ),
    "a deep one.safetensors": (
        lambda p: described(p, backbone_depth=10**9),
        "describes 1,000,000,000 blocks",
    ),
    "many convolutions.safetensors": (
        lambda p: described(p, detector_box_convs=10**8),
        "describes 100,000,000 blocks",
    ),
    "many stages.safetensors": (
        lambda p: described(p, backbone_kind="swin", backbone_stage_depths=[2, 2, 10**9, 2]),
        "describes 1,000,000,000 blocks|samples|sees every token",
    ),
    "many classes.safetensors": (
        lambda p: described(p, detector_num_classes=10**17),
        "no model can be built|has shape",
    ),
    "more classes than a number.safetensors": (
        lambda p: described(p, detector_num_classes=10**30),
        "no model can be built|has shape|cannot be read",
    ),
    "large positions.safetensors": (
        lambda p: described(p, backbone_position_grid=10**6),
        "has shape",
    ),
    "no heads.safetensors": (lambda p: described(p, backbone_num_heads=0), "no model can be built"),
    "odd heads.safetensors": (
        lambda p: described(p, backbone_num_heads=7),
        "no model can be built",
    ),
    "wide mae.safetensors": (wide_mae, "has shape .* this model's has|no model can be built"),
    "cut mae.safetensors": (
        lambda p: save_file(mae_tensors({"pos_embed": torch.ones(16, 64)}), p),
        r"pos_embed has shape \(16, 64\)",
    ),
    "half a mae.safetensors": (
        lambda p: save_file(mae_tensors({"decoder_pos_embed": torch.ones(1, 1, 32)}), p),
        r"decoder_pos_embed has shape \(1, 1, 32\)",
    ),
    "nested.safetensors": (
        lambda p: save_file({"a": torch.ones(1)}, p, {"config": "[" * 10**5, "categories": "[]"}),
        "configuration cannot be read",
    ),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, tuple[Any, ...]]:
    """What a process that reads one file after the other says: outcome, CPU seconds, peak bytes."""
    folder = tmp_path_factory.mktemp("files")
    for name, (make, _) in FILES.items():
        make(folder / name)
    done = subprocess.run(
        [sys.executable, "-c", READ],
        input="\n".join(str(folder / name) for name in FILES),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = {
        name: (outcome, *cost) for name, outcome, *cost in map(json.loads, done.stdout.splitlines())
    }
    found["run"] = (folder / "was-executed").exists()
    return found | {name: (*found[name], (folder / name).stat().st_size) for name in FILES}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("name", FILES)
def test_refused_by_name_within_2_seconds_and_300_mb(name, outcomes, record_property) -> None:
    outcome, seconds, memory, size = outcomes[name]
    record_property("refused", [name, outcome])
    assert re.search(FILES[name][1], outcome), outcome
    assert name in outcome
    assert seconds < 2 and memory < 300e6 + size, (seconds, memory)
    assert not outcomes["run"]


def test_tied_weights_and_a_slice_are_no_fault(tmp_path) -> None:
    from mimdet.models.checkpoint_files import read_checkpoint

    whole = torch.arange(12.0)
    torch.save({"a": whole, "b": whole.view(3, 4), "c": whole[2:4]}, tmp_path / "a.pth")
    tensors = read_checkpoint(tmp_path / "a.pth").tensors
    assert torch.equal(tensors["b"].flatten(), whole) and tensors["c"].tolist() == [2, 3]
