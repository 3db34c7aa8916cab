"""A zip file -> a folder: resumably, and nowhere else."""

import os
import shutil
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from mimdet.downloads.transfer import CHUNK, check_space, size_of


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
