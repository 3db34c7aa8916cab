"""`mimdet download`: ask, fetch, check, remember. Nothing else in the library calls this.

A fetched file gets an entry in its folder's downloads.json, and later runs compare it with that.
Files of the Hugging Face hub go to the hub's own cache, where the loaders find them.
"""

import hashlib
import http.client
import json
import os
import shutil
import sys
import time
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from email.message import Message
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

from mimdet import __version__
from mimdet.files import sync, write_json

MAE_README = "https://github.com/facebookresearch/mae"
MAE_DECODERS = "https://github.com/facebookresearch/mae/issues/8"
MAE_DEMO = "https://github.com/facebookresearch/mae/blob/main/demo/mae_visualize.ipynb"
MAE_DEMO_SIZES = "https://github.com/facebookresearch/mae/issues/3"
MIMDET_V1 = "https://github.com/hustvl/MIMDet/tree/v1.0.0"
MIMDET_V2 = "https://github.com/hustvl/MIMDet"
V1_FILES = "https://github.com/hustvl/storage/releases/download/v1.0.0/"
V2_FILES = "https://github.com/hustvl/Storage/releases/download/v1.2.0/"
COCO_PAGE = "https://cocodataset.org/#download"

META = "CC-BY-NC 4.0"
# The hub's page says Apache 2.0 of the same weights that Meta's repository puts under CC-BY-NC 4.0.
HUB_META = "Apache 2.0; Meta: CC-BY-NC 4.0"
# "MIMDet is released under the MIT License" (its README); training started from MAE's weights.
MIMDET = "MIT; from MAE: CC-BY-NC 4.0"


@dataclass(frozen=True, slots=True)
class PublicFile:
    name: str
    """What the user types; on the Hugging Face hub the id of the repository."""
    address: str
    page: str
    """Where the authors publish it."""
    licence: str
    good_for: str
    size: str = ""
    """As the page states it."""
    sha256: str = ""
    """As the page states it."""
    md5_start: str = ""
    """The first digits of the MD5, which is all that MAE's README gives."""
    hub_file: str = ""
    """File inside the hub's repository; empty for a plain address."""
    rename: str = ""
    """Name on disk where the address's own is taken: the two versions of MIMDet share names."""

    @property
    def file_name(self) -> str:
        return self.rename or self.address.rsplit("/", 1)[1]


def find(names: Iterable[str]) -> list[PublicFile]:
    """Entries by name, file name or group, each once. ValueError for an unknown name."""
    by_name = {file.name: file for file in CATALOGUE}
    by_name |= {file.file_name: file for file in CATALOGUE if not file.hub_file}
    found: dict[PublicFile, None] = {}
    for word in names:
        for name in GROUPS.get(word, (word,)):
            if name not in by_name:
                close = get_close_matches(name, [*by_name, *GROUPS], n=3, cutoff=0.5)
                hint = f"; did you mean {', '.join(close)}?" if close else ""
                raise ValueError(f"there is no public file {name!r} in `mimdet download`{hint}")
            found[by_name[name]] = None
    return list(found)


def table() -> str:
    """The whole catalogue, one line an entry."""
    rows = [("name", "size", "licence", "what it is good for")]
    rows += [(f.name, f.size or "not stated", f.licence, f.good_for) for f in CATALOGUE]
    rows += [(name, "", "", f"all of {', '.join(parts)}") for name, parts in GROUPS.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
        for row in rows
    )


def _mae(name: str, path: str, page: str, good_for: str, md5_start: str = "") -> PublicFile:
    address = f"https://dl.fbaipublicfiles.com/mae/{path}.pth"
    return PublicFile(name, address, page, META, good_for, md5_start=md5_start)


def _hub(
    name: str, file: str, size: str, licence: str, good_for: str, sha256: str = ""
) -> PublicFile:
    page = f"https://huggingface.co/{name}"
    address = f"{page}/resolve/main/{file}"
    return PublicFile(name, address, page, licence, good_for, size, sha256, hub_file=file)


def _mimdet(name: str, address: str, page: str, good_for: str, rename: str = "") -> PublicFile:
    return PublicFile(name, f"{address}.pth", page, MIMDET, good_for, rename=rename)


def _coco(name: str, path: str, size: str, licence: str, good_for: str) -> PublicFile:
    address = f"http://images.cocodataset.org/{path}.zip"
    return PublicFile(name, address, COCO_PAGE, licence, good_for, size)


_BASE = "mimdet_vit_base_mask_rcnn_fpn_sr_{}_800_1333_4xdec_coco_3x"
_V1_NAME = "mimdet_v1_vit_{}_mask_rcnn_fpn_sr_{}_800_1333_4xdec_coco_3x.pth"
_LARGE = "mimdet_vit_large_mask_rcnn_fpn_sr_0p5_800_1333_4xdec_coco_3x"
_PLAIN = V1_FILES + "benchmarking_mask_rcnn_base_FPN_{}ep_LSJ_mae"

# fmt: off
CATALOGUE: tuple[PublicFile, ...] = (
    # Masked autoencoders as Meta published them. "full" and "visualize" hold encoder and decoder;
    # "full" predicts patches normalised one by one, "visualize" the pixels themselves.
    _mae("mae-base-full", "pretrain/mae_pretrain_vit_base_full", MAE_DECODERS,
         "MAE ViT-B, encoder AND decoder: what mimdet_base starts from"),
    _mae("mae-large-full", "pretrain/mae_pretrain_vit_large_full", MAE_DECODERS,
         "MAE ViT-L, encoder AND decoder: what mimdet_large starts from"),
    _mae("mae-huge-full", "pretrain/mae_pretrain_vit_huge_full", MAE_DECODERS,
         "MAE ViT-H/14, encoder AND decoder; no preset has this size"),
    _mae("mae-base", "pretrain/mae_pretrain_vit_base", MAE_README,
         "MAE ViT-B, encoder only: for a new decoder (--init-decoder random)", "8cad7c"),
    _mae("mae-large", "pretrain/mae_pretrain_vit_large", MAE_README,
         "MAE ViT-L, encoder only: for a new decoder (--init-decoder random)", "b8b06e"),
    _mae("mae-huge", "pretrain/mae_pretrain_vit_huge", MAE_README,
         "MAE ViT-H/14, encoder only; no preset has this size", "9bdbb0"),
    _mae("mae-base-visualize", "visualize/mae_visualize_vit_base", MAE_DEMO_SIZES,
         "MAE ViT-B trained on plain pixels: reconstructions that look right"),
    _mae("mae-large-visualize", "visualize/mae_visualize_vit_large", MAE_DEMO,
         "MAE ViT-L trained on plain pixels: reconstructions that look right"),
    _mae("mae-huge-visualize", "visualize/mae_visualize_vit_huge", MAE_DEMO_SIZES,
         "MAE ViT-H/14 trained on plain pixels: reconstructions that look right"),
    _mae("mae-large-visualize-gan", "visualize/mae_visualize_vit_large_ganloss", MAE_DEMO,
         "the same ViT-L with a GAN loss besides: more realistic reconstructions"),

    # On the Hugging Face hub. facebook/vit-mae-* are the "visualize" kind (config.json says
    # norm_pix_loss false; transformers' converter starts from mae_visualize_vit_base.pth), timm's
    # were made from the encoder-only files.
    _hub("facebook/vit-mae-base", "model.safetensors", "448 MB", HUB_META,
         "MAE ViT-B trained on plain pixels, like mae-base-visualize; no pickle",
         "479dcef4bd5df06259399027b789f21e9d9a1b79f37155a64176d55bc26fdae8"),
    _hub("facebook/vit-mae-large", "pytorch_model.bin", "1.32 GB", HUB_META,
         "MAE ViT-L trained on plain pixels, like mae-large-visualize",
         "28a019bd1842a7bdea1cfa9bb390047ad3fab82032cea2045873ca0399ca5a84"),
    _hub("facebook/vit-mae-huge", "pytorch_model.bin", "2.63 GB", HUB_META,
         "MAE ViT-H/14 trained on plain pixels, like mae-huge-visualize",
         "89404c28ea8289eaf371f926b9b947738e58135c4e094c2402b033c794414a68"),
    _hub("timm/vit_base_patch16_224.mae", "model.safetensors", "343 MB", META,
         "MAE ViT-B, encoder only, made from mae-base; no pickle"),
    _hub("timm/vit_large_patch16_224.mae", "model.safetensors", "1.21 GB", META,
         "MAE ViT-L, encoder only, made from mae-large; no pickle",
         "d58a1a547a07c3c41917c23069dcaadab6f469a8cf793a3cba5fe404c344ab68"),
    _hub("timm/vit_huge_patch14_224.mae", "model.safetensors", "2.52 GB", META,
         "MAE ViT-H/14, encoder only, made from mae-huge; no pickle",
         "4c1c77c532753bf1d5dc5ec1dd7052d819986a6532df5e1c81b821611948be98"),

    # Detectors the paper's authors trained on COCO, with the box / mask AP they publish.
    _mimdet("mimdet-base", V2_FILES + _BASE.format("0p5"), MIMDET_V2,
            "mimdet_base, trained at ratio 0.5: 51.7 / 46.2"),
    _mimdet("mimdet-large", V2_FILES + _LARGE, MIMDET_V2,
            "mimdet_large, trained at ratio 0.5: 54.3 / 48.2"),
    _mimdet("mimdet-v1-base-0.25", V1_FILES + _BASE.format("0p25"), MIMDET_V1,
            "mimdet_v1_base, trained at ratio 0.25: 49.9 / 44.7", _V1_NAME.format("base", "0p25")),
    _mimdet("mimdet-v1-base", V1_FILES + _BASE.format("0p5"), MIMDET_V1,
            "mimdet_v1_base, trained at ratio 0.5: 51.5 / 46.0", _V1_NAME.format("base", "0p5")),
    _mimdet("mimdet-v1-large", V1_FILES + _LARGE, MIMDET_V1,
            "mimdet_v1_large, trained at ratio 0.5: 53.3 / 47.5", _V1_NAME.format("large", "0p5")),
    _mimdet("benchmarking-base-25", _PLAIN.format(25), MIMDET_V2,
            "plain ViT-B baseline, 25 epochs: 48.0 / 43.0"),
    _mimdet("benchmarking-base-50", _PLAIN.format(50), MIMDET_V2,
            "plain ViT-B baseline, 50 epochs: 50.2 / 44.9"),
    _mimdet("benchmarking-base-100", _PLAIN.format(100), MIMDET_V2,
            "plain ViT-B baseline, 100 epochs: 50.4 / 44.9"),

    # COCO 2017, what the recipes train and evaluate on.
    _coco("coco-train2017", "zips/train2017", "18 GB", "Flickr terms of use",
          "118 thousand training images"),
    _coco("coco-val2017", "zips/val2017", "1 GB", "Flickr terms of use",
          "5 thousand images to evaluate on"),
    _coco("coco-annotations2017", "annotations/annotations_trainval2017", "241 MB", "CC-BY 4.0",
          "boxes and masks of both"),
)
# fmt: on

GROUPS = {"coco": ("coco-train2017", "coco-val2017", "coco-annotations2017")}
"""One word for several files."""


TRIES = 4
"""Tries in a row that bring nothing new before a download gives up."""
WAIT = 2.0
"""Seconds before a second try; doubles with each further one."""
TIMEOUT = 60.0
"""Seconds without a byte after which a connection counts as broken."""
CHUNK = 1 << 20
AGENT = {"User-Agent": f"mimdet/{__version__}"}
BROKEN = (URLError, http.client.HTTPException, ConnectionError, TimeoutError)


def receive(address: str, part: Path) -> None:
    """Complete the file `part`, going on from what is there if the server still has that version.

    Raises ConnectionError when the server refuses or keeps breaking off (what came is kept), and
    ValueError for a full disk, a web page in place of the file, or more bytes than announced.
    """
    tries = 0
    while True:
        before = size_of(part)
        try:
            return _receive_rest(address, part)
        except BROKEN as error:
            tries = 1 if size_of(part) > before else tries + 1
            refused = isinstance(error, HTTPError) and error.code < 500
            if refused or tries == TRIES:
                kept = f"; {part} ({readable(size_of(part))}) is kept" if part.exists() else ""
                raise ConnectionError(f"{address}: {error}{kept}") from error
            print(f"{part.stem}: {error}; trying again", file=sys.stderr)
            time.sleep(WAIT * 2 ** (tries - 1))


def _receive_rest(address: str, part: Path) -> None:
    """One try."""
    known = read_json(note_of(part)) if part.exists() else {}
    have = size_of(part) if known.get("address") == address else 0
    if have and known["bytes"] and have >= known["bytes"]:
        return _check_length(part, known["bytes"])
    request = Request(address, headers=AGENT)
    if have and known["version"]:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", known["version"])  # any other version is sent whole
    with urlopen(request, timeout=TIMEOUT) as response:
        headers: Message = response.headers
        if headers.get_content_type() == "text/html":
            raise ValueError(f"{address} answers with a web page instead of the file")
        version = _version(headers)
        if response.status != 206:
            if have:
                print(f"{part.stem}: its source changed or cannot go on, starting over")
            have = 0
        elif version != known["version"] or _first_byte(headers) != have:
            part.unlink()
            raise ConnectionError("its source changed")
        length = headers["Content-Length"]
        total = have + int(length) if length else None
        check_space(part.parent, (total or have) - have)
        write_json(note_of(part), {"address": address, "version": version, "bytes": total})
        _append(response, part, have, total)
    _check_length(part, total)


def _append(response: BinaryIO, part: Path, have: int, total: int | None) -> None:
    """Write the body behind the first `have` bytes, with a progress bar."""
    bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None)
    with part.open("ab" if have else "wb") as sink, bar:
        while chunk := response.read(CHUNK):
            sink.write(chunk)
            bar.update(len(chunk))


def _check_length(part: Path, total: int | None) -> None:
    if total is not None and size_of(part) < total:
        raise ConnectionError(f"the connection ended after {size_of(part)} of {total} bytes")
    if total is not None and size_of(part) > total:
        raise ValueError(f"{part} is longer than its source ({total} bytes): delete it, run again")


def _version(headers: Message) -> str:
    """What names this version of the remote file; "" if nothing does that If-Range may use."""
    tag = headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")


def _first_byte(headers: Message) -> int:
    """`Content-Range: bytes 600-999/1000` -> 600; -1 for anything else."""
    first = headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return int(first) if first.isdigit() else -1


def announced_size(address: str) -> int | None:
    """Bytes the server says a file has, None if it does not say; nothing of it is fetched."""
    request = Request(address, headers=AGENT, method="HEAD")
    try:
        with urlopen(request, timeout=TIMEOUT / 4) as response:
            length = response.headers["Content-Length"]
    except BROKEN:
        return None
    return int(length) if length else None


# ------------------------------------------------------------------------------ small helpers


def checksum(path: Path, kind: str = "sha256") -> str:
    """Hexadecimal digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def check_space(folder: Path, need: int) -> None:
    if need > free_space(folder):
        raise ValueError(
            f"{folder} has {readable(free_space(folder))} free, {readable(need)} are needed: make "
            "room, or choose another folder with --to"
        )


def free_space(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def readable(count: int) -> str:
    """18000000000 -> '18 GB'."""
    size, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.3g} {unit}"


def note_of(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def read_json(path: Path) -> dict[str, Any]:
    """A json object; empty if there is no file, ValueError that names a damaged one."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): repair or delete it") from error


def size_of(path: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def unzip(archive: Path, folder: Path) -> str:
    """Unpack into `folder`; files that are there with the right size and CRC are left alone.

    Returns how many were written. Raises ValueError, before anything is written, for an entry that
    would land outside the folder or for a full disk; also for a damaged archive.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            entries = [entry for entry in content.infolist() if not entry.is_dir()]
            for entry in entries:
                _refuse_outside(entry, archive)
            lacking = [e for e in entries if size_of(folder / e.filename) != e.file_size]
            folder.mkdir(parents=True, exist_ok=True)
            check_space(folder, sum(entry.file_size for entry in lacking))
            written = 0
            for entry in tqdm(entries, desc=f"unpack {archive.name}", unit="file", disable=None):
                if not _is_complete(folder / entry.filename, entry):
                    _unpack_entry(content, entry, folder / entry.filename)
                    written += 1
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{archive} is damaged ({error}): delete it and download again") from error
    return f"{folder}: {written} files unpacked, {len(entries) - written} were there"


def _refuse_outside(entry: zipfile.ZipInfo, archive: Path) -> None:
    path = PurePosixPath(entry.filename)
    is_link = entry.external_attr >> 28 == 0o12
    strange = path.is_absolute() or ".." in path.parts or set("\\:") & set(entry.filename)
    if strange or is_link:
        kind = "is a link" if is_link else "points outside the folder"
        raise ValueError(f"{archive}: its entry {entry.filename!r} {kind}; do not use this file")


def _is_complete(path: Path, entry: zipfile.ZipInfo) -> bool:
    if size_of(path) != entry.file_size or not path.is_file():
        return False
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc == entry.CRC


def _unpack_entry(content: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> None:
    """Under another name first; without a flush to disk, as the CRC tells what is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".part")
    with content.open(entry) as source, half.open("wb") as sink:
        shutil.copyfileobj(source, sink, CHUNK)
    os.replace(half, path)


RECORD = "downloads.json"


def download(
    names: Iterable[str], to: str | Path, *, yes: bool = False, unpack: bool = False
) -> list[Path]:
    """Fetch catalogue entries or groups into the folder `to`; where each lies, [] if refused.

    yes: do not ask. unpack: unzip COCO to `to`/coco/train2017, val2017 and annotations.
    Raises ValueError for an unknown name, a file that is not what it should be, a full disk, or
    when there is no terminal to ask on; ConnectionError when the server refuses or breaks off.
    """
    files, folder = find(names), Path(to)
    if unpack and not any(file.file_name.endswith(".zip") for file in files):
        raise ValueError("--unpack is for COCO's zip files, and none of them is named")
    absent = [file for file in files if not is_there(file, folder)]
    if absent and not yes and not agreed(absent, folder):
        print("nothing was downloaded")
        return []
    places = []
    for file in files:
        place = fetch_from_hub(file) if file.hub_file else fetch(file, folder)
        print(f"{file.name}: complete and checked: {place}")
        if unpack and place.suffix == ".zip":
            print(unzip(place, folder / "coco"))
        places.append(place)
    return places


def is_there(file: PublicFile, folder: Path) -> bool:
    if not file.hub_file:
        return (folder / file.file_name).exists()
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(file.name, file.hub_file), str)


def agreed(files: list[PublicFile], folder: Path) -> bool:
    """Show what would be fetched, from where, under which licence and to where; then ask."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise ValueError("there is no terminal to ask on: add --yes to download without asking")
    for file in files:
        size = file.size
        if not size:
            announced = announced_size(file.address)
            size = readable(announced) if announced else "neither its page nor its server says"
        place = _hub_cache() if file.hub_file else folder / file.file_name
        print(
            f"{file.name}: {file.good_for}\n  from     {file.address}\n  page     {file.page}\n"
            f"  size     {size}\n  licence  {file.licence}\n"
            f"  to       {place} ({readable(free_space(place))} free)"
        )
    try:
        return input("Download? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def fetch(file: PublicFile, folder: Path) -> Path:
    """A plain address's file in `folder`; one that is there already is checked, not fetched."""
    place = folder / file.file_name
    if place.exists():
        check_existing(file, place)
        return place
    folder.mkdir(parents=True, exist_ok=True)
    part = place.with_name(place.name + ".part")
    receive(file.address, part)
    sync(part)
    remember(file, place, part.stat().st_size, check(file, part))
    os.replace(part, place)
    note_of(part).unlink()
    sync(folder)
    return place


def fetch_from_hub(file: PublicFile) -> Path:
    """The file in the hub's cache, fetched if the hub has a newer one or none is there."""
    from huggingface_hub import hf_hub_download

    place = Path(hf_hub_download(file.name, file.hub_file))
    check(file, place.resolve())  # the cache links to where the bytes lie
    return place


def check(file: PublicFile, path: Path) -> str:
    """The file's sha256; ValueError if it, or the MD5, is not what the authors' page says."""
    found, wrong = checksum(path), ""
    if file.sha256 and found != file.sha256:
        wrong = f"sha256 {found} instead of {file.sha256}"
    if file.md5_start and not checksum(path, "md5").startswith(file.md5_start):
        wrong = f"an MD5 that does not begin with {file.md5_start}"
    if wrong:
        raise ValueError(
            f"{path} has {wrong}, which {file.page} gives: it was damaged on its way, or its "
            "authors replaced it. Do not use it; delete it to download it again"
        )
    return found


def check_existing(file: PublicFile, place: Path) -> None:
    """Compare a file with its entry in downloads.json; one without gets it if its sum is known."""
    entry = read_json(place.parent / RECORD).get(place.name)
    if entry is None and not file.sha256 and not file.md5_start:
        raise ValueError(
            f"{place} is there, but {place.parent / RECORD} says nothing of it, so it cannot be "
            "checked: use it as it is, or move it away to download it"
        )
    if entry is None:
        remember(file, place, place.stat().st_size, check(file, place))
    elif checksum(place) != entry["sha256"]:
        raise ValueError(
            f"{place} is not what was downloaded on {entry['date']}: it was changed or damaged "
            "since. Move it away to download it again"
        )


def remember(file: PublicFile, place: Path, size: int, sha256: str) -> None:
    record = read_json(place.parent / RECORD)
    record[place.name] = {
        "address": file.address,
        "bytes": size,
        "sha256": sha256,
        "date": datetime.now(UTC).date().isoformat(),
        "licence": file.licence,
    }
    write_json(place.parent / RECORD, record)


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)
