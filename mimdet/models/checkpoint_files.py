"""Checkpoint files of any origin, read without trusting them: no file can run code here."""

import argparse
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mimdet.files import SHIPPED

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
MAX_HEADER = 10_000_000
"""Bytes of a safetensors header that are read; that of ViT-L with its configuration is 0.1 MB."""
# A training script's options, stored beside the weights by Meta's files. Plain data.
HARMLESS: list[Any] = [argparse.Namespace]


@dataclass(slots=True)
class CheckpointFile:
    """The tensors of one file, under the names they have there."""

    name: str
    """What to call it in messages: the file's name or its id on the Hugging Face hub."""
    tensors: dict[str, Tensor]
    """On the CPU, floating-point ones as float32."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Strings stored in a safetensors header."""
    notes: list[str] = field(default_factory=list)
    """What was changed while reading."""

    @property
    def is_detector(self) -> bool:
        """Of ours or in detectron2's layout, rather than an autoencoder."""
        return any(name.startswith(("backbone.", "roi_heads.")) for name in self.tensors)


def read_checkpoint(source: str | Path) -> CheckpointFile:
    """Read weights from a file, the package itself, or the local cache of the Hugging Face hub.

    source: a `.safetensors`, `.pth`, `.pt` or `.bin` file; the name of shipped weights ("tiny",
    "tiny_mae"); or an id such as "facebook/vit-mae-base" that `mimdet download` has fetched. In a
    `.pth` the weights may stand under "model" or "state_dict"; what is beside them is ignored.

    Raises FileNotFoundError, or ValueError that names the file, and the tensor where one is at
    fault, and says what to do: not a checkpoint, cut off, holding code, not floating point, not
    finite.
    """
    path = find(source)
    name = path.name if Path(source).exists() else str(source)
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
    else:
        tensors, metadata = _read_torch(path), {}
    if not tensors:
        raise ValueError(f"{name} holds no tensors")
    file = CheckpointFile(name, tensors, metadata)
    _to_float32(file)
    check_finite(file.tensors, str(path))
    return file


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """ValueError naming the first tensor that holds NaN or infinite values."""
    parts = {name: v for name, v in tensors.items() if v.is_floating_point() and v.numel()}
    # The extremes are NaN where a number is; they are found ten times faster than all that is.
    ends = [torch.stack([v.detach().min(), v.detach().max()]) for v in parts.values()]
    finite = [pair.isfinite().all() for pair in ends]
    if finite and not torch.stack(finite).all():  # a GPU is waited for once
        name = list(parts)[torch.stack(finite).tolist().index(False)]
        raise ValueError(f"{where}: {name} holds NaN or infinite values; do not use these weights")


def find(source: str | Path) -> Path:
    """The file itself, shipped weights, or a hub id's file in the cache; nothing is downloaded."""
    path = Path(source)
    if path.is_file():
        return path
    if str(source) in shipped():
        return SHIPPED / f"{source}.safetensors"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and path.suffix not in SUFFIXES:
        from huggingface_hub import try_to_load_from_cache

        for file in HUB_FILES:
            cached = try_to_load_from_cache(str(source), file)
            if isinstance(cached, str):
                return Path(cached)
        raise FileNotFoundError(
            f"{source} is neither a file nor in the local cache of the Hugging Face hub: fetch it "
            f"with `mimdet download {source}`"
        )
    raise FileNotFoundError(
        f"there is no file {source}; `mimdet download` lists public weights, and {shipped()} come "
        "with the package"
    )


def shipped() -> list[str]:
    """Names of the weights that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.safetensors"))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors as they are stored, and the strings of the header.

    ValueError for a damaged file, and for a header that no model needs, before it is read.
    """
    with path.open("rb") as start:
        length = int.from_bytes(start.read(8), "little")
    if length > MAX_HEADER:
        raise ValueError(_damaged(path, f"a header of {length:,} bytes"))
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(_damaged(path, error)) from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    if start.startswith((b"<", b"version https://git-lfs")):
        raise ValueError(f"{path} is a web page or a pointer, not the weights: download it again")
    if not (zipfile.is_zipfile(path) or start.startswith(b"\x80")):
        raise ValueError(_damaged(path, "neither a PyTorch nor a safetensors file"))
    records = _record_sizes(path)
    try:
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(_refused(path, str(error))) from None
    except Exception as error:  # what a damaged pickle raises is not limited to a few
        raise ValueError(_damaged(path, str(error) or type(error).__name__)) from error
    tensors = _find_tensors(path, content)
    _check_sizes(path, tensors, records)
    return tensors


def _record_sizes(path: Path) -> set[int] | None:
    """Bytes of the records of a zip, which torch.save does not compress; None for the old format.

    ValueError, before anything is unpacked, where they are more than the file.
    """
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as file:
            sizes = [record.file_size for record in file.infolist()]
    except Exception as error:
        raise ValueError(_damaged(path, error)) from error
    if sum(sizes) > path.stat().st_size:
        raise ValueError(_damaged(path, f"it would unpack to {sum(sizes):,} bytes"))
    return set(sizes)


def _check_sizes(path: Path, tensors: dict[str, Tensor], records: set[int] | None) -> None:
    """ValueError for a tensor of more numbers than the file holds for it, before one is read."""
    total = 0
    for name, value in tensors.items():
        if value.layout != torch.strided or value.device.type != "cpu":
            raise ValueError(
                f"{path}: {name} is {value.layout} on {value.device}, not plain numbers"
            )
        held, size = value.untyped_storage().nbytes(), value.numel() * value.element_size()
        total += size
        if size > held or (records is not None and held not in records):
            raise ValueError(
                f"{path}: {name} of shape {tuple(value.shape)} takes {size:,} bytes, but the file "
                "does not hold as many for it: a view that repeats its numbers, or damage"
            )
    if total > 2 * path.stat().st_size + 10_000:  # tied weights are stored once
        raise ValueError(_damaged(path, f"its tensors take {total:,} bytes"))


def _find_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """The dictionary of tensors inside what a .pth holds."""
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path} is no dictionary of tensors by name: {name!r} holds a "
                f"{type(value).__name__}. Save the model's state_dict() alone, or under the key "
                '"model"'
            )
    return content


def _to_float32(file: CheckpointFile) -> None:
    """Half and double precision become float32, with a note; anything else is an error."""
    converted: set[str] = set()
    for name, value in file.tensors.items():
        if name.endswith(("num_batches_tracked", "relative_position_index")):
            continue  # counters and index tables
        if not value.is_floating_point():
            raise ValueError(
                f"{file.name}: {name} is {value.dtype}, not floating point: quantised or damaged "
                "weights cannot be loaded"
            )
        if value.dtype != torch.float32:
            converted.add(str(value.dtype))
            file.tensors[name] = value.float()
    file.notes += [f"{kind} converted to float32" for kind in sorted(converted)]


def _refused(path: Path, error: str) -> str:
    if "Unsupported" not in error and "GLOBAL" not in error:
        return _damaged(path, error.splitlines()[0])
    found = re.search(r"(?:GLOBAL|class|global:?) ([\w.]+\.[\w.]+)", error)
    what = f" ({found[1]})" if found else ""
    return (
        f"{path} holds Python objects{what} besides tensors. Loading those can run any code, so it "
        "is refused. If you trust its origin, strip it once where that does no harm: "
        'torch.save({"model": torch.load(FILE, weights_only=False)["model"]}, "clean.pth")'
    )


def _damaged(path: Path, error: object) -> str:
    return (
        f"{path} cannot be read as weights, it is cut off or damaged ({error}): download it again"
    )
