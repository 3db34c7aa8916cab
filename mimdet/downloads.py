"""`mimdet download`: ask, fetch, check, remember. Nothing else in the library calls this.

Files of the Hugging Face hub go to the hub's own cache, where the loaders find them. Any other file
is noted in its folder's downloads.json, and later runs compare it with that.
"""

import hashlib
import shutil
import stat
import sys
import time
import tomllib
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from http.client import HTTPException
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.request import Request, urlopen

from tqdm import tqdm

from mimdet import __version__
from mimdet.files import read_json, sync, write_json

ON_THE_HUB = "/resolve/main/"
MIMDET_V1 = "https://github.com/hustvl/MIMDet/tree/v1.0.0"


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

    @property
    def hub_file(self) -> str:
        """File inside the hub's repository; empty for a plain address."""
        return self.address.partition(ON_THE_HUB)[2]

    @property
    def file_name(self) -> str:
        """Name on disk. The two versions of MIMDet published files under the same names."""
        name = self.address.rsplit("/", 1)[1]
        return name.replace("mimdet_", "mimdet_v1_", 1) if self.page == MIMDET_V1 else name


_TEXT = Path(__file__).with_name("catalogue.toml").read_text(encoding="utf-8")
CATALOGUE = tuple(PublicFile(name, **fields) for name, fields in tomllib.loads(_TEXT).items())
"""What there is."""
GROUPS = {"coco": ("coco-train2017", "coco-val2017", "coco-annotations2017")}
"""One word for several files."""

RECORD = "downloads.json"
TRIES = 4
"""Tries in a row that bring nothing new before a download gives up."""
WAIT = 2.0
"""Seconds before a second try; doubles with each further one."""
TIMEOUT = 60.0
"""Seconds without a byte after which a connection counts as broken."""
CHUNK = 1 << 20
AGENT = {"User-Agent": f"mimdet/{__version__}"}


def download(
    names: Sequence[str], folder: Path, *, yes: bool = False, unpack: bool = False
) -> list[Path]:
    """Fetch catalogue entries or groups into `folder`; where each file is, [] if the user refused.

    yes: do not ask. unpack: unzip COCO to `folder`/coco/train2017, val2017 and annotations, DSB2018
    to `folder`/dsb2018. Raises ValueError for an unknown name, a file that is not what it should
    be, a full disk, or when there is no terminal to ask on; ConnectionError when the server refuses
    or breaks off.
    """
    files = files_named(*names)
    if unpack and not any(file.file_name.endswith(".zip") for file in files):
        raise ValueError("--unpack is for data sets (zip files), and none of them is named")
    absent = [file for file in files if not is_there(file, folder)]
    if absent and not yes and not agreed(absent, folder):
        print("nothing was downloaded")
        return []
    paths = []
    for file in files:
        path = fetch_from_hub(file) if file.hub_file else fetch(file, folder)
        known = file.hub_file or path.name in recorded(folder)
        own = f"used as it is, unchecked ({RECORD} says nothing of it)"
        print(f"{file.name}: {'complete and checked' if known else own}: {path}")
        if unpack and path.suffix == ".zip":
            print(unzip(path, folder / file.name.partition("-")[0]))
        paths.append(path)
    return paths


def files_named(*names: str) -> list[PublicFile]:
    """Entries by name or group, each once. ValueError for an unknown name."""
    by_name = {file.name: file for file in CATALOGUE}
    words = [word for name in names for word in GROUPS.get(name, (name,))]
    unknown = [word for word in words if word not in by_name]
    if unknown:
        raise ValueError(
            f"there is no public file {unknown[0]!r}; `mimdet download` lists those there are"
        )
    return list(dict.fromkeys(by_name[word] for word in words))


def table() -> str:
    """The whole catalogue, one line an entry."""
    rows = [("name", "size", "licence", "what it is good for")]
    rows += [(f.name, f.size or "not stated", f.licence, f.good_for) for f in CATALOGUE]
    rows += [(name, "", "", f"all of {', '.join(parts)}") for name, parts in GROUPS.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def is_there(file: PublicFile, folder: Path) -> bool:
    if not file.hub_file:
        return (folder / file.file_name).exists()
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(file.name, file.hub_file), str)


def agreed(files: list[PublicFile], folder: Path) -> bool:
    """Show what would be fetched, from where, under which licence and to where; then ask."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise ValueError("there is no terminal to ask on: add --yes to download without asking")
    from huggingface_hub.constants import HF_HUB_CACHE

    for file in files:
        size = file.size or readable(look_at(file.address)[0])
        path = Path(HF_HUB_CACHE) if file.hub_file else folder / file.file_name
        print(
            f"{file.name}: {file.good_for}\n  from     {file.address}\n  page     {file.page}\n"
            f"  size     {size}\n  licence  {file.licence}\n"
            f"  to       {path} ({readable(free_space(path))} free)"
        )
    try:
        return input("Download? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def fetch_from_hub(file: PublicFile) -> Path:
    """The file in the hub's cache, fetched if the hub has a newer one or none is there."""
    from huggingface_hub import hf_hub_download

    path = Path(hf_hub_download(file.name, file.hub_file))
    verify(file, path.resolve())  # the cache links to where the bytes are
    return path


def fetch(file: PublicFile, folder: Path) -> Path:
    """A plain address's file in `folder`; one that is there already is not fetched, but checked as
    far as anything is known of it."""
    path = folder / file.file_name
    if path.exists():
        check_existing(file, path)
        return path
    size, version = look_at(file.address)
    folder.mkdir(parents=True, exist_ok=True)
    # The version in the name: a part is never continued with the bytes of another one.
    part = folder / f"{path.name}.{hashlib.sha256(version.encode()).hexdigest()[:8]}.part"
    for other in folder.glob(f"{path.name}.*.part"):
        # A part is a file of this function's own, never what a link leads to or a pipe.
        if other != part or not version or other.is_symlink() or not other.is_file():
            other.unlink()
    check_space(folder, size - size_of(part))
    receive(file.address, part, size, version)
    sync(part)
    remember(file, path, size, verify(file, part))
    part.replace(path)
    return path


# ------------------------------------------------------------------------------ one file


def look_at(address: str) -> tuple[int, str]:
    """Size in bytes and version of a remote file; its contents are not read.

    Raises ConnectionError when the server refuses, ValueError for a web page in its place.
    """
    try:  # not HEAD: a signed address, as GitHub's are, may allow GET alone
        with urlopen(Request(address, headers=AGENT), timeout=TIMEOUT) as response:
            headers: Message = response.headers
    except (OSError, HTTPException) as error:
        raise ConnectionError(f"{address}: {error}") from error
    if headers.get_content_type() == "text/html" or "Content-Length" not in headers:
        raise ValueError(f"{address} answers with a web page instead of the file")
    return int(headers["Content-Length"]), version_of(headers)


def version_of(headers: Message) -> str:
    """What names this version of the remote file; "" if nothing does that If-Range may use."""
    tag = headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")


def receive(address: str, part: Path, size: int, version: str) -> None:
    """Complete the file `part`, going on from what is there.

    Raises ConnectionError when the server keeps breaking off; what came is kept.
    """
    failures = 0
    while (have := size_of(part)) < size:
        reason = "the connection ended"
        try:
            append_rest(address, part, size, version)
        except (OSError, HTTPException) as error:
            reason = str(error)
        failures = 0 if size_of(part) > have else failures + 1
        if failures == TRIES:
            raise ConnectionError(
                f"{address}: {reason} after {size_of(part)} of {size} bytes; {part} is kept"
            )
        if size_of(part) < size:
            print(f"{part.name}: {reason}; trying again", file=sys.stderr)
            time.sleep(WAIT * 2**failures)
    if have > size:
        raise ValueError(f"{part} is longer than its source ({size} bytes): delete it, run again")


def append_rest(address: str, part: Path, size: int, version: str) -> None:
    """One try, with a progress bar; a server that cannot go on is made to start over."""
    have = size_of(part) if version else 0
    # If-Range: any other version is sent whole.
    rest = {"Range": f"bytes={have}-", "If-Range": version} if have else {}
    with urlopen(Request(address, headers=AGENT | rest), timeout=TIMEOUT) as response:
        if version_of(response.headers) != version:
            raise ConnectionError("its source changed")
        have = have if response.status == 206 else 0
        bar = tqdm(total=size, initial=have, unit="B", unit_scale=True, disable=None)
        with part.open("ab" if have else "wb") as sink, bar:
            while chunk := response.read(CHUNK):
                sink.write(chunk)
                bar.update(len(chunk))


def verify(file: PublicFile, path: Path) -> str:
    """The file's sha256; ValueError if it, or the MD5, is not what the authors' page says."""
    sha256, md5 = digest(path, "sha256"), digest(path, "md5")
    if not (sha256.startswith(file.sha256) and md5.startswith(file.md5_start)):
        raise ValueError(
            f"{path} has the sha256 {sha256} and the MD5 {md5}, but {file.page} gives "
            f"{file.sha256 or file.md5_start}: it was damaged on its way, or its authors replaced "
            "it. Do not use it; delete it to download it again"
        )
    return sha256


def digest(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def check_existing(file: PublicFile, path: Path) -> None:
    """Compare a file with its entry in downloads.json; one without gets it if its sum is known, and
    is the user's own business otherwise."""
    entry = recorded(path.parent).get(path.name)
    if entry is None:
        if file.sha256 or file.md5_start:
            remember(file, path, path.stat().st_size, verify(file, path))
    elif digest(path, "sha256") != entry["sha256"]:
        raise ValueError(
            f"{path} is not what was downloaded on {entry['date']}: it was changed or damaged "
            "since. Move it away to download it again"
        )


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """What downloads.json says of a folder's files."""
    return dict(read_json(folder / RECORD)) if (folder / RECORD).exists() else {}


def remember(file: PublicFile, path: Path, size: int, sha256: str) -> None:
    entry = {
        "address": file.address,
        "bytes": size,
        "sha256": sha256,
        "date": datetime.now(UTC).date().isoformat(),
        "licence": file.licence,
    }
    write_json(path.parent / RECORD, recorded(path.parent) | {path.name: entry})


# ------------------------------------------------------------------------------ disk


def check_space(folder: Path, need: int) -> None:
    if need > free_space(folder):
        raise ValueError(
            f"{folder} has {readable(free_space(folder))} free, {readable(need)} are needed: make "
            "room, or choose another folder with --to"
        )


def free_space(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    folder = folder.resolve()
    return shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free


def readable(count: int) -> str:
    """18000000000 -> '18.0GB'."""
    return str(tqdm.format_sizeof(count, "B"))


def size_of(path: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def unzip(archive: Path, folder: Path) -> str:
    """Unpack into `folder`; files that are there with the right size and CRC are left alone.

    Returns how many files were written. Raises ValueError, before anything is written, for a full
    disk and for an entry that leads out of the folder, is no plain file, or would be written
    through a link or into something else than a file; later for a damaged archive.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            entries = [entry for entry in content.infolist() if not entry.is_dir()]
            for entry in entries:
                check_entry(archive, entry, folder)
            lacking = [e for e in entries if size_of(folder / e.filename) != e.file_size]
            check_space(folder, sum(entry.file_size for entry in lacking))
            written = 0
            for entry in tqdm(entries, desc=f"unpack {archive.name}", unit="file", disable=None):
                path = folder / entry.filename
                if size_of(path) != entry.file_size or zlib.crc32(path.read_bytes()) != entry.CRC:
                    content.extract(entry, folder)
                    written += 1
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{archive} is damaged ({error}): delete it and download again") from error
    return f"{folder}: {written} files unpacked, {len(entries) - written} were there"


def check_entry(archive: Path, entry: zipfile.ZipInfo, folder: Path) -> None:
    name = PurePosixPath(entry.filename.replace("\\", "/"))
    path, reason = folder / name, ""
    if name.is_absolute() or ".." in name.parts or PureWindowsPath(name).drive:
        reason = "leads out of the folder"
    elif stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
        reason = "is a link or a special file"
    elif any(place.is_symlink() for place in (path, *path.parents[: len(name.parts) - 1])):
        reason = f"would be written through a link: {path}"
    elif path.exists() and not path.is_file():
        reason = f"would be written into something that is no file: {path}"
    if reason:
        raise ValueError(f"{archive}: {entry.filename!r} {reason}; nothing was unpacked")
