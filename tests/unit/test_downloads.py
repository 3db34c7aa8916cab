"""`mimdet download` against a real server on this machine: it breaks off, changes files, lies."""

import hashlib
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from threading import Thread
from unittest.mock import Mock

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

import mimdet
from mimdet import cli, downloads
from mimdet.downloads import (
    CATALOGUE,
    GROUPS,
    PublicFile,
    download,
    fetch,
    files_named,
    table,
    unzip,
)
from mimdet.structures import crops_to_bitmaps

CONTENT = bytes(range(256)) * 40  # 10,240 bytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()


class Remote(ThreadingHTTPServer):
    """Serves one content at every path; each test sets how badly it behaves."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.content = CONTENT
        self.headers = {"ETag": '"one"', "Content-Type": "application/octet-stream"}
        self.ranges = True
        self.cuts: list[int] = []
        """Bytes after which the connections end. The first of a download only looks."""
        self.status = 200
        self.asked: list[str] = []
        """The range that every request asks for."""
        self.statuses: list[int] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/weights.pth"


class Answer(BaseHTTPRequestHandler):
    server: Remote

    def do_HEAD(self) -> None:  # asked by huggingface_hub alone
        self.answer(sends_body=False)

    def do_GET(self) -> None:
        self.answer(sends_body=True)

    def answer(self, sends_body: bool) -> None:
        remote, asked = self.server, self.headers.get("Range", "")
        if self.path.startswith("/api/"):  # a question of huggingface_hub's own
            return self.send_error(404)
        remote.asked += [asked] if sends_body else []
        if remote.status != 200:
            return self.send_error(remote.status)
        versions = {remote.headers.get("ETag"), remote.headers.get("Last-Modified")}
        version = self.headers.get("If-Range", "")
        same = version in versions and not version.startswith("W/")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        partly = bool(asked) and remote.ranges and same
        body = remote.content[start:] if partly else remote.content
        # Before the headers: a client that only looks asks again as soon as it has them.
        cut = remote.cuts.pop(0) if sends_body and remote.cuts else len(body)
        self.send_response(206 if partly else 200)
        remote.statuses.append(206 if partly else 200)
        if partly:
            total = len(remote.content)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Length", str(len(body)))
        for name, value in remote.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if sends_body:
            self.wfile.write(body[:cut])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def remote():
    server = Remote()
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(downloads, "WAIT", 0.0)


@pytest.fixture
def file(remote) -> PublicFile:
    return PublicFile("small", remote.address, "https://authors.example", "CC0", "a test")


@pytest.fixture
def listed(file, monkeypatch) -> PublicFile:
    """The file as the only one of the downloads."""
    monkeypatch.setattr(downloads, "CATALOGUE", (file,))
    return file


class Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ------------------------------------------------------------------------------ one file


def test_complete_download_is_recorded(remote, file, tmp_path):
    path = fetch(file, tmp_path / "new")
    assert path == tmp_path / "new" / "weights.pth" and path.read_bytes() == CONTENT
    assert files_in(path.parent) == {"weights.pth", "downloads.json"}
    entry = json.loads((path.parent / "downloads.json").read_text())["weights.pth"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry.pop("date"))
    expected = {"address": remote.address, "bytes": 10240, "sha256": SHA256, "licence": "CC0"}
    assert entry == expected


DATE = "Wed, 06 Apr 2022 10:00:00 GMT"


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"one"', "Last-Modified": DATE}])
def test_broken_connection_is_continued(remote, file, tmp_path, headers):
    """By date where the tag is weak."""
    remote.headers |= headers
    remote.cuts = [0, 6000, 1000]
    assert fetch(file, tmp_path).read_bytes() == CONTENT
    assert remote.asked == ["", "", "bytes=6000-", "bytes=7000-"]
    assert remote.statuses == [200, 200, 206, 206]


@pytest.fixture
def part(remote, file, tmp_path, monkeypatch) -> Path:
    """What a download leaves that ended after 6,000 bytes."""
    remote.cuts = [0, 6000]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(downloads.time, "sleep", Mock(side_effect=KeyboardInterrupt))
        fetch(file, tmp_path)
    remote.asked.clear()
    (part,) = tmp_path.iterdir()
    assert part.suffix == ".part" and part.read_bytes() == CONTENT[:6000]
    return part


@pytest.mark.parametrize(
    ("bytes_there", "asked"),
    # Complete as after a kill between the last byte and the new name: nothing is fetched again.
    [(6000, ["", "bytes=6000-"]), (len(CONTENT), [""])],
)
def test_a_later_run_continues(remote, file, tmp_path, part, bytes_there, asked):
    part.write_bytes(CONTENT[:bytes_there])
    assert fetch(file, tmp_path).read_bytes() == CONTENT
    assert remote.asked == asked
    assert files_in(tmp_path) == {"weights.pth", "downloads.json"}


def test_too_long_a_part(file, tmp_path, part):
    part.write_bytes(CONTENT + b"more")
    with pytest.raises(ValueError, match=r"weights\.pth.*\.part is longer .* delete it"):
        fetch(file, tmp_path)


@pytest.mark.parametrize("headers", [{"ETag": '"one"'}, {}])
def test_without_ranges_or_versions_it_starts_over(remote, file, tmp_path, headers):
    remote.ranges, remote.headers, remote.cuts = False, headers, [0, 6000]
    assert fetch(file, tmp_path).read_bytes() == CONTENT
    assert remote.statuses == [200, 200, 200]


def test_two_versions_are_not_glued(remote, file, tmp_path, part):
    remote.content = CONTENT[::-1]
    remote.headers["ETag"] = '"two"'
    assert fetch(file, tmp_path).read_bytes() == CONTENT[::-1]
    assert files_in(tmp_path) == {"weights.pth", "downloads.json"}


def test_a_version_that_changes_meanwhile_is_not_glued(remote, file, tmp_path, monkeypatch):
    """By a careless server, which sends the rest of the new version."""

    def new_version(seconds):
        remote.content, remote.headers = CONTENT[::-1], {"ETag": '"two"', "Last-Modified": '"one"'}

    remote.cuts = [0, 6000]
    monkeypatch.setattr(downloads.time, "sleep", new_version)
    with pytest.raises(ConnectionError, match="its source changed after 6000 of 10240 bytes"):
        fetch(file, tmp_path)


def test_server_that_always_stops_early(remote, file, tmp_path):
    remote.ranges, remote.cuts = False, [0, *[6000] * 20]
    with pytest.raises(ConnectionError, match=r"after 6000 of 10240 bytes; .*part is kept"):
        fetch(file, tmp_path)
    assert len(remote.asked) == 2 + downloads.TRIES  # the first try brought something


@pytest.mark.parametrize(
    ("status", "kind", "error", "said"),
    [
        (404, "", ConnectionError, r"weights\.pth: HTTP Error 404"),
        (503, "", ConnectionError, r"weights\.pth: HTTP Error 503"),
        (200, "text/html; charset=utf-8", ValueError, "a web page instead of the file"),
    ],
)
def test_what_is_no_file_is_refused(remote, file, tmp_path, status, kind, error, said):
    remote.status, remote.headers["Content-Type"] = status, kind
    with pytest.raises(error, match=said):
        fetch(file, tmp_path)
    assert files_in(tmp_path) == set()


def test_full_disk_is_noticed_before_the_first_byte(file, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10239)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"10\.2kB are needed: make room"):
        fetch(file, tmp_path)
    assert files_in(tmp_path) == set()


# ------------------------------------------------------------------------------ checks


@pytest.mark.parametrize(
    ("right", "wrong"),
    [({"sha256": SHA256}, {"sha256": "0" * 64}), ({"md5_start": MD5[:6]}, {"md5_start": "0000"})],
)
def test_published_checksums(file, tmp_path, right, wrong):
    assert fetch(replace(file, **right), tmp_path / "right").exists()
    said = rf"\.part has the sha256 {SHA256} and the MD5 {MD5}, but .* gives 0000.*delete it"
    with pytest.raises(ValueError, match=said):
        fetch(replace(file, **wrong), tmp_path / "wrong")
    assert [path.suffix for path in (tmp_path / "wrong").iterdir()] == [".part"]


def test_second_run_only_checks(remote, listed, tmp_path):
    (path,) = download(["small"], tmp_path, yes=True)
    remote.asked.clear()
    assert download(["small"], tmp_path) == [path]  # no --yes: there is nothing to ask
    assert remote.asked == []
    path.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(ValueError, match=r"not what was downloaded on .* Move it away"):
        download(["small"], tmp_path)
    assert path.read_bytes().endswith(b"x")


def test_file_from_elsewhere(remote, file, listed, tmp_path, capsys):
    """One that nothing is known of is used as it is, and keeps nothing else from coming."""
    (tmp_path / "weights.pth").write_bytes(CONTENT)
    assert download(["small"], tmp_path) == [tmp_path / "weights.pth"]
    assert "small: used as it is" in capsys.readouterr().out and remote.asked == []
    assert not (tmp_path / "downloads.json").exists()
    fetch(replace(file, sha256=SHA256), tmp_path)  # its sum is known, so now it is in the record
    fetch(file, tmp_path)
    (tmp_path / "downloads.json").write_text("{")
    with pytest.raises(ValueError, match=r"downloads\.json is not json"):
        fetch(file, tmp_path)


# ------------------------------------------------------------------------------ asking


@pytest.mark.parametrize("answer", ["n\n", "\n", "", "maybe\n", "y\n"])
def test_only_yes_is_yes(remote, listed, tmp_path, monkeypatch, capsys, answer):
    monkeypatch.setattr(sys, "stdin", Keyboard(answer))
    paths = download(["small"], tmp_path)
    assert [path.read_bytes() for path in paths] == ([CONTENT] if answer == "y\n" else [])
    printed = capsys.readouterr().out
    for part in (remote.address, "https://authors.example", "10.2kB", "CC0", "weights.pth", "free"):
        assert part in printed
    assert files_in(tmp_path) == ({"weights.pth", "downloads.json"} if paths else set())
    assert ("nothing was downloaded" in printed) == (not paths)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))  # no terminal
    with pytest.raises(ValueError, match="add --yes"):
        download(["small"], tmp_path / "other")


def test_command(remote, listed, tmp_path, monkeypatch, capsys):
    cli.main(["download"])
    assert "small" in capsys.readouterr().out
    cli.main(["download", "small", "--to", str(tmp_path / "w"), "--yes"])
    assert (tmp_path / "w" / "weights.pth").read_bytes() == CONTENT
    assert "complete and checked" in capsys.readouterr().out
    remote.status = 404
    for words, said in (
        (["smal"], r"no public file 'smal'; `mimdet download` lists"),
        (["small", "--to", str(tmp_path / "v"), "--yes"], r"error: .*404"),
        (["small", "--unpack", "--yes"], "none of them is named"),
    ):
        with pytest.raises(SystemExit, match=said):
            cli.main(["download", *words])


# ------------------------------------------------------------------------------ the hub


HUB_RUN = """
import sys
from mimdet import downloads
address = "https://hub.example/resolve/main/weights.safetensors"
file = downloads.PublicFile("tiny/mae", address, "page", "CC0", "a test", sha256=sys.argv[1])
downloads.CATALOGUE = (file,)
print(downloads.is_there(file, downloads.Path()))
print(*downloads.download(["tiny/mae"], downloads.Path("unused"), yes=True))
"""


def test_hub_file_goes_to_the_hubs_cache(remote, tmp_path):
    """In a process of its own, because huggingface_hub reads its settings while it loads."""
    remote.headers |= {"ETag": f'"{SHA256}"', "X-Repo-Commit": "a" * 40}
    server = remote.address.rsplit("/", 1)[0]
    settings = {"HF_ENDPOINT": server, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
    options = {"cwd": tmp_path, "env": os.environ | settings, "capture_output": True, "text": True}
    first, second, wrong = (
        subprocess.run([sys.executable, "-c", HUB_RUN, sha256], **options)
        for sha256 in (SHA256, SHA256, "0" * 64)
    )
    there, *_, path = first.stdout.split()
    assert there == "False" and second.stdout.split()[0] == "True"
    assert Path(path).is_relative_to(tmp_path / "hub") and Path(path).read_bytes() == CONTENT
    assert len(remote.asked) == 1  # the second run found it in the cache
    assert f"has the sha256 {SHA256}" in wrong.stderr
    assert files_in(tmp_path) == {"hub"}


# ------------------------------------------------------------------------------ zip files


def zipped(path: Path, entries: dict[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    return path


IMAGES = {"val2017/": b"", "val2017/1.jpg": b"first" * 100, "val2017/2.jpg": b"second" * 100}


def test_unpack_coco_and_go_on_with_what_is_incomplete(remote, file, tmp_path, monkeypatch, capsys):
    remote.content = zipped(tmp_path / "source.zip", IMAGES).read_bytes()
    archive = replace(file, address=remote.address.replace("weights.pth", "val2017.zip"))
    archive = replace(archive, name="coco-small")
    monkeypatch.setattr(downloads, "CATALOGUE", (archive,))
    first, second = (tmp_path / "d/coco" / name for name in ("val2017/1.jpg", "val2017/2.jpg"))
    command = ["download", "coco-small", "--to", str(tmp_path / "d"), "--yes", "--unpack"]
    cli.main(command)
    assert "2 files unpacked, 0 were there" in capsys.readouterr().out
    written = first.stat().st_mtime_ns
    for damaged in (b"SECOND" * 100, b"sec"):  # the same size with another CRC, and too short
        second.write_bytes(damaged)
        cli.main(command)
        assert "1 files unpacked, 1 were there" in capsys.readouterr().out
        assert second.read_bytes() == IMAGES["val2017/2.jpg"]
    assert first.read_bytes() == IMAGES["val2017/1.jpg"]
    assert first.stat().st_mtime_ns == written
    assert files_in(first.parent) == {"1.jpg", "2.jpg"}
    shutil.rmtree(tmp_path / "d/coco")
    (tmp_path / "d/downloads.json").unlink()  # now it is the user's own archive
    cli.main(command)
    printed = capsys.readouterr().out
    assert "used as it is" in printed and "2 files unpacked" in printed


def test_dsb2018_is_unpacked_and_converted(remote, tmp_path, monkeypatch, capsys):
    """As its authors zipped it: a folder an image, in it an image and a file a nucleus."""
    tiles, content = list(islice(mimdet.Nuclei("val"), 2)), {}
    for number, tile in enumerate(tiles):
        content[f"a{number}/images/a{number}.png"] = png(tile.image)
        bitmaps = crops_to_bitmaps(tile.target.masks, *tile.image.shape[1:])
        for nucleus, bitmap in enumerate(bitmaps):
            content[f"a{number}/masks/b{nucleus}.png"] = png(255 * bitmap[None].byte())
    remote.content = zipped(tmp_path / "source.zip", content).read_bytes()
    entry = next(entry for entry in CATALOGUE if entry.name == "dsb2018")
    here = replace(entry, address=remote.address.replace("weights.pth", "stage1_train.zip"))
    monkeypatch.setattr(downloads, "CATALOGUE", (here,))
    made = tmp_path / "nuclei.json"
    cli.main(["download", "dsb2018", "--to", str(tmp_path / "d"), "--yes", "--unpack"])
    cli.main(["convert", str(tmp_path / "d/dsb2018"), str(made), "--names", "nucleus"])
    assert f"nucleus {sum(len(tile.target) for tile in tiles)}" in capsys.readouterr().out
    for read, tile in zip(mimdet.CocoDataset(made, tmp_path / "d/dsb2018"), tiles, strict=True):
        assert torch.equal(read.image, tile.image)
        assert {*map(tuple, read.target.boxes.tolist())} == {
            *map(tuple, tile.target.boxes.tolist())
        }


def png(pixels: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    to_pil_image(pixels).save(stream, "PNG")
    return stream.getvalue()


def special(name: str, kind: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (kind | 0o777) << 16
    return entry


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("../evil", "leads out of the folder"),
        ("a/../../evil", "leads out of the folder"),
        ("a\\..\\..\\evil", "leads out of the folder"),
        ("/var/evil", "leads out of the folder"),
        ("C:/evil", "leads out of the folder"),
        (special("link", stat.S_IFLNK), "is a link or a special file"),
        (special("pipe", stat.S_IFIFO), "is a link or a special file"),
        ("outside/1.jpg", "through a link"),
        ("through.jpg", "through a link"),
        ("dangling.jpg", "through a link"),
        ("pipe.jpg", "no file"),
        ("folder.jpg", "no file"),
    ],
)
def test_an_archive_is_unpacked_whole_or_not_at_all(tmp_path, entry, said):
    """Nothing is written outside the folder, through links that lie there, or into pipes."""
    coco, outside = tmp_path / "deep" / "coco", tmp_path / "outside"
    for folder in (coco / "folder.jpg", outside):
        folder.mkdir(parents=True)
    (outside / "1.jpg").write_bytes(b"own")
    (coco / "outside").symlink_to(outside)
    (coco / "through.jpg").symlink_to(outside / "1.jpg")
    (coco / "dangling.jpg").symlink_to(outside / "2.jpg")
    os.mkfifo(coco / "pipe.jpg")
    before = files_in(coco)
    archive = zipped(tmp_path / "a.zip", {"val2017/1.jpg": b"first", entry: b"2" * 3})
    with pytest.raises(ValueError, match=rf"a\.zip: '.*' .*{said}.*nothing was unpacked"):
        unzip(archive, coco)
    assert files_in(coco) == before and files_in(outside) == {"1.jpg"}
    assert (outside / "1.jpg").read_bytes() == b"own"
    assert files_in(tmp_path) == {"a.zip", "deep", "outside"}


def test_the_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "coco").symlink_to(tmp_path / "disk")
    unzip(zipped(tmp_path / "a.zip", IMAGES), tmp_path / "coco")
    assert (tmp_path / "disk/val2017/2.jpg").read_bytes() == IMAGES["val2017/2.jpg"]


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_part_is_no_link_and_no_pipe(file, tmp_path, part, kind):
    part.unlink()
    (tmp_path / "own").write_bytes(b"own")
    part.symlink_to(tmp_path / "own") if kind == "link" else os.mkfifo(part)
    assert fetch(file, tmp_path).read_bytes() == CONTENT
    assert (tmp_path / "own").read_bytes() == b"own"
    assert not (tmp_path / "weights.pth").is_symlink()


def test_damaged_archive_and_full_disk(tmp_path, monkeypatch):
    archive = zipped(tmp_path / "a.zip", IMAGES)
    usage = shutil.disk_usage(tmp_path)._replace(free=1099)  # 500 + 600 bytes are to come
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"1\.10kB are needed"):
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        unzip(archive, tmp_path / "coco")
    content = bytearray(archive.read_bytes())
    content[content.index(b"1.jpg") + 8] ^= 0xFF
    for damaged in (content, b"no zip at all"):
        archive.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.zip is damaged .*download again"):
            unzip(archive, tmp_path / "coco")


# ------------------------------------------------------------------------------ the catalogue


def test_entries_are_well_formed_and_in_the_table():
    lines = table().splitlines()
    assert len(lines) == 1 + len(CATALOGUE) + len(GROUPS)
    for entry, line in zip(CATALOGUE, lines[1:], strict=False):
        assert re.fullmatch(r"https?://[\w.-]+/[\w./-]+\.(pth|bin|safetensors|zip)", entry.address)
        assert entry.page.startswith("https://")
        assert re.fullmatch(r"([0-9a-f]{64})?", entry.sha256)
        assert re.fullmatch(r"([0-9a-f]{6})?", entry.md5_start)
        assert re.fullmatch(r"([\d.]+ [MG]B)?", entry.size)
        assert not entry.hub_file or entry.page == f"https://huggingface.co/{entry.name}"
        assert entry.licence and entry.good_for
        for told in (entry.name, entry.size, entry.licence, entry.good_for):
            assert told in line


def test_names_are_unique_on_the_command_line_and_on_disk():
    plain = [entry for entry in CATALOGUE if not entry.hub_file]
    names = [entry.name for entry in CATALOGUE] + [entry.file_name for entry in plain]
    assert len(set(names)) == len(names) and len({e.address for e in CATALOGUE}) == len(CATALOGUE)
    assert not set(GROUPS) & set(names)


def test_names_and_groups():
    coco = files_named("coco")
    expected = ["train2017.zip", "val2017.zip", "annotations_trainval2017.zip"]
    assert [entry.file_name for entry in coco] == expected
    assert files_named("coco-val2017", "coco") == [coco[1], coco[0], coco[2]]
