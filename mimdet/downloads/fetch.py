"""`mimdet download`: ask, fetch, check, remember. Nothing else in the library calls this.

A fetched file gets an entry in its folder's downloads.json, and later runs compare it with that.
Files of the Hugging Face hub go to the hub's own cache, where the loaders find them.
"""

import os
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from mimdet.downloads.catalogue import PublicFile, find
from mimdet.downloads.transfer import (
    announced_size,
    checksum,
    free_space,
    note_of,
    read_json,
    readable,
    receive,
)
from mimdet.downloads.unpack import unzip
from mimdet.files import sync, write_json

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
