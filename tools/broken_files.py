"""Broken and hostile files that are too large to keep, or are links or folders: what makes each.

tools/measure_faults.py and tests/faults make them when they are read.
"""

import io
import json
import os
import pickle
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from tools import fuzz, readers

EVIL = "was-executed"
"""A file of this name appears where a hostile file got code executed."""


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
    header["__metadata__"].pop("model_part", None)  # else that is what is refused
    make_safetensors(path, header, sound[8 + length :])


def changed(section: str, **fields: Any) -> Callable[[Path], None]:
    return lambda path: detector_file(path, lambda config: config[section].update(fields))


def trained_as(record: str) -> Callable[[Path], None]:
    """A detector whose record of what it was trained as is this text."""

    def make(path: Path) -> None:
        (_, sound), *_ = fuzz.weight_seeds()
        length = struct.unpack("<Q", sound[:8])[0]
        header = json.loads(sound[8 : 8 + length])
        header["__metadata__"]["model_part"] = record
        make_safetensors(path, header, sound[8 + length :])

    return make


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


def repacked(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """A PyTorch file of 64 numbers with a changed entry."""
    import torch

    buffer = io.BytesIO()
    torch.save({"norm.weight": torch.ones(64)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))


def longer_storage(path: Path) -> None:
    """The pickle says 255 numbers where there are 64: what follows in memory would be read."""
    repacked(path, lambda name, content: content.replace(b"K@", b"K\xff"))


def old_format(path: Path) -> None:
    import torch

    torch.save({"a": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"K\x04", b"M\xff\xff"))


def many_views(path: Path) -> None:
    """Each fits into its storage; together they are a hundred times the file."""
    import torch

    whole = torch.ones(2**20, dtype=torch.float16)
    torch.save({f"a{i}": whole.view(2**10, 2**10)[:, :] for i in range(4000)}, path)


def saved(make: Callable[[Any], Any]) -> Callable[[Path], None]:
    """What torch.save makes of what `make` makes of torch."""

    def write(path: Path) -> None:
        import torch

        torch.save(make(torch), path)

    return write


class TakesRoom:
    """A call that the reader allows, with a number that is not."""

    def __reduce__(self) -> Any:
        return bytearray, (10**11,)


def autoencoder(**tensors: tuple[int, ...]) -> Callable[[Path], None]:
    """A small one, with tensors of other shapes."""

    def write(path: Path) -> None:
        import torch
        from safetensors.torch import save_file

        from mimdet.models.mae import MAE

        state = MAE(64, 16, 64, 2, 4, 32, 1, 2).state_dict()
        other = {name: torch.ones(shape) for name, shape in tensors.items()}
        save_file(state | other, path, {"num_heads": "16", "decoder_heads": "2"})

    return write


def nested_config(path: Path) -> None:
    metadata = {"config": "[" * 10**5, "categories": "[]"}
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    make_safetensors(path, {"__metadata__": metadata, "a": one}, bytes(8))


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
    "4000_views.pth": many_views,
    "storage_of_more_than_there_is.pth": longer_storage,
    "the_same_in_the_old_format.pth": old_format,
    "room_for_100_gb.pth": saved(lambda torch: {"a": TakesRoom()}),
    "mostly_zeros.pth": saved(lambda torch: {"a": torch.eye(3).to_sparse()}),
    "without_numbers.pth": saved(lambda torch: {"a": torch.empty(10**12, device="meta")}),
    "numbers_for_names.pth": saved(lambda torch: {1: torch.ones(1)}),
    "header_of_99_mb.safetensors": long_header,
    "200000_tensors.safetensors": many_tensors,
    "names_a_function.safetensors": changed("backbone", stem="os:_exit"),
    "names_a_module.safetensors": changed("backbone", kind="this:x"),
    "describes_2_tb.safetensors": changed("backbone", embed_dim=2**19, depth=24),
    "describes_an_unknown_loss.safetensors": changed("detector", loss="mas{_rcnn"),
    "trained_as_a_list.safetensors": trained_as("[]"),
    "trained_as_half_a_record.safetensors": trained_as('{"backbone.depth": '),
    "describes_another_depth.safetensors": changed("backbone", depth=3),
    "describes_no_model.safetensors": changed("backbone", num_heads=0),
    "describes_half_a_head.safetensors": changed("backbone", num_heads=7),
    "describes_1e9_blocks.safetensors": changed("backbone", depth=10**9),
    "describes_1e8_convolutions.safetensors": changed("detector", box_convs=10**8),
    "describes_1e17_classes.safetensors": changed("detector", num_classes=10**17),
    "describes_1e12_positions.safetensors": changed("backbone", position_grid=10**6),
    "config_of_100000_brackets.safetensors": nested_config,
    "autoencoder_of_width_1048576.safetensors": autoencoder(pos_embed=(1, 5, 2**20)),
    "autoencoder_without_a_class_row.safetensors": autoencoder(pos_embed=(16, 64)),
    "autoencoder_of_one_position.safetensors": autoencoder(decoder_pos_embed=(1, 1, 32)),
    "claims_900_megapixels.png": lambda path: png(path, 30_000, 30_000, 8),
    "900_megapixels.png": lambda path: png(path, 30_000, 30_000, 30_000),
    "142_megapixels.png": lambda path: png(path, 4_120, 34_560, 34_560),
    "claims_4_gigapixels.png": lambda path: png(path, 2**31 - 1, 2, 1),
    "text_of_500_mb.png": text_bomb,
    "leaves_the_folder.zip": lambda path: zipped(path, "../evil", "a/../../evil", "/var/../evil"),
    "link.zip": lambda path: zipped(path, "link", link=True),
    "damaged.zip": damaged_archive,
    "names_a_module": run_with_module,
    "holds_code": run_with_stored_code,
    "last_outside": last_outside,
    "no_checkpoint": run_without_checkpoint,
    "cut_off_weights": run_cut_off,
}
"""Name of the file -> what makes it."""
