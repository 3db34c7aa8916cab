"""One address -> one complete file, resumably.

A file grows as NAME.part. Beside it NAME.part.json says which version of the remote file it is
the beginning of, so that two versions are never glued together.
"""

import hashlib
import http.client
import json
import shutil
import sys
import time
from email.message import Message
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

from mimdet import __version__
from mimdet.files import write_json

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
