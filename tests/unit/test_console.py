"""What a command says when something goes wrong: one line, an exit code, on any console."""

import errno
import inspect
import json
import multiprocessing
import os
import pkgutil
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mimdet import cli
from mimdet.console import Ended, Failed, Stopped, told
from mimdet.data.loader import stream
from mimdet.files import write_file, write_text
from mimdet.training.run import CheckpointStore
from mimdet.training.train import fit, train
from tests.small import small

HttpError = type("ConnectError", (Exception,), {"__module__": "httpx"})
OutOfMemory = type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch"})


def refused(number: int, path: str | None = "runs/x/a.json") -> OSError:
    return OSError(number, os.strerror(number), path)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("data.source='x': use one of"), 2, r"^error: data\.source='x': use one of$"),
        (FileNotFoundError("runs/x holds no run"), 2, "^error: runs/x holds no run$"),
        (refused(errno.ENOENT), 2, r"^error: runs/x/a\.json: there is no such file or folder$"),
        (refused(errno.ENOSPC), 2, r"a\.json: the disk is full \([\d.]+ GB free\): make room"),
        (refused(errno.EDQUOT), 2, r"a\.json: your share of the disk is used up: make room"),
        (refused(errno.EROFS), 2, r"a\.json: the disk is read-only: give another folder"),
        (refused(errno.EACCES), 2, r"a\.json: its permissions forbid that: change them"),
        (refused(errno.EIO), 2, r"a\.json: the disk fails .*: check it"),
        (refused(errno.ESTALE), 2, r"a\.json: Stale file handle"),
        (refused(errno.ENAMETOOLONG, "x" * 300), 2, r"xx\.\.\.xx.*: the name is too long"),
        (MemoryError(), 2, r"the memory is full .*batch_size"),
        (OutOfMemory("CUDA out of memory"), 2, r"the memory is full \(CUDA.*batch_size"),
        (Failed("no run succeeded"), 2, "^error: no run succeeded$"),
        (ConnectionError("Couldn't reach it"), 1, "reach it. Check the network, then run the same"),
        (HttpError("no name"), 1, "no name. Check the network"),
        (TimeoutError("timed out"), 1, "Check the network"),
        (Stopped("stopped: saved"), 130, "^stopped: saved$"),
        (KeyboardInterrupt(), 130, "^interrupted$"),
    ],
)
def test_what_is_expected_to_go_wrong_is_one_line(error, code, said, capsys):
    with pytest.raises(Ended, match=said) as ended, told():
        raise error
    assert ended.value.code == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err and (out + err).count("\n") <= 1


def test_a_bug_keeps_its_traceback_and_says_where_the_work_is(capsys):
    error = KeyError("rows")
    error.add_note("Step 4 is saved in runs/x.")
    with pytest.raises(Ended) as ended, told():
        raise error
    assert ended.value.code == 1
    *above, last = capsys.readouterr().err.strip().splitlines()
    assert above[0].startswith("Traceback") and "raise error" in "".join(above)
    assert last.startswith("error: KeyError: 'rows'. This is a bug in mimdet")
    assert "report it" in last and last.endswith("Step 4 is saved in runs/x.")
    # That of an expected error is shown on demand.
    for words in (["evaluate", "nowhere"], ["evaluate", "nowhere", "--traceback"]):
        with pytest.raises(Ended, match="neither a run"):
            cli.main(words)
        assert ("Traceback" in capsys.readouterr().err) == ("--traceback" in words)


# ------------------------------------------------------------------ consoles


SPEAKS = """
import sys
from mimdet.console import open_console, told
open_console()
with told():
    print("51.2 ± 0.3 → ✓")
    for number in range(20_000):
        print(number)
    print("ω", file=sys.stderr)
    open(sys.argv[1], "w").write("written")
"""


@pytest.mark.parametrize(
    ("encoding", "command", "seen"),
    [
        ("ascii", "{} | head -n 1", b"51.2 ? 0.3 ? ?"),
        ("cp1252", "{} | head -n 1", b"51.2 \xb1 0.3 ? ?"),
        ("utf-8", "{} | head -n 1", "51.2 ± 0.3 → ✓".encode()),
        ("ascii", "{} >&-", b""),
        ("ascii", "{} <&- >&- 2>&-", b""),
        ("ascii", "{} > /dev/full 2> /dev/full", b""),
    ],
)
def test_no_console_ends_the_work(encoding, command, seen, tmp_path):
    file = tmp_path / "file"
    (tmp_path / "speaks.py").write_text(SPEAKS, encoding="utf-8")
    command = f"set -o pipefail; {command.format(f'{sys.executable} {tmp_path}/speaks.py {file}')}"
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True)
    assert (done.returncode, done.stdout.strip()) == (0, seen)
    assert b"Error" not in done.stderr and file.read_text() == "written"


# ------------------------------------------------------------------ devices


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "mps", "", "cpu:x", "meta"])
def test_a_device_that_is_not_there(device, tmp_path):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is there")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    for words in (
        ["predict", "tiny", str(tmp_path / "a.png"), "--out", str(tmp_path / "out")],
        ["evaluate", "tiny", "--out", str(tmp_path / "out")],
        ["train", "tiny", str(tmp_path / "out")],
        ["pretrain", "tiny_mae", str(tmp_path / "out")],
    ):
        with pytest.raises(Ended, match=rf"device='{device}' \(--device\).*auto, cpu") as ended:
            cli.main([*words, "--device", device])
        assert ended.value.code == 2
    assert not (tmp_path / "out").exists()  # nothing has begun that another device would resume


# ------------------------------------------------------------------ disks


WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: path.write_text("x" * 100_000),
    "torch": lambda path: torch.save(torch.zeros(100_000), path),
    "safetensors": lambda path: save_file({"x": torch.zeros(100_000)}, path),
    "picture": lambda path: Image.effect_noise((300, 300), 99).save(path, format="PNG"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_may_not_grow_is_named_whatever_library_writes_it(writer, tmp_path):
    """A real refusal of the system, as a full disk's."""
    write_text(tmp_path / "file", "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(Ended, match=rf"^error: {tmp_path}/file: .*give another folder"), told():
            write_file(tmp_path / "file", WRITERS[writer])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("first", ["checkpoints/000002", "predictions.json", "eval.json"])
def test_a_training_names_the_file_that_failed_first(first, tmp_path, monkeypatch):
    """From then on nothing can be written; what was saved stays, and the training goes on later."""
    run, failed = tmp_path / "run", []

    def full(path: Path) -> None:
        if failed or Path(first).name in str(path):
            failed.append(path)
            raise refused(errno.ENOSPC, str(path))

    cfg = small(3)
    cfg.training.checkpoint_every_steps, cfg.data.workers = 1, 0
    with monkeypatch.context() as patched:
        patched.setattr("mimdet.files.sync", full)
        with pytest.raises(Ended) as ended, told():
            list(train(cfg, run))
    assert len(failed) > 1 and ended.value.code == 2
    assert str(ended.value).startswith(f"error: {run / first}: the disk is full")
    last = CheckpointStore(run / "checkpoints").find("last")
    assert f"{last}; the same call goes on from it" in str(ended.value)
    assert [file for file in run.rglob("*") if ".partial-" in file.name] == []
    list(train(cfg, run))
    assert json.loads((run / "eval.json").read_text())["step"] == 3


# ------------------------------------------------------------------ loader processes


UNGUARDED = """
import multiprocessing, operator, sys
from functools import partial
from pathlib import Path
with Path(sys.argv[1]).open("a") as file:
    file.write("began ")
multiprocessing.set_start_method("{method}", force=True)
from mimdet.data.loader import stream
def own(number):
    return 2 * number
task = {task}
print([int(value) for value in stream([1, 2, 3], task, 2)])
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("task", ["partial(operator.mul, 2)", "lambda number: 2 * number"])
def test_processes_that_are_not_forked_do_not_run_the_script_again(method, task, tmp_path):
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(UNGUARDED.format(method=method, task=task))
    done = subprocess.run([sys.executable, script, log], capture_output=True, text=True)
    assert done.stdout == "[2, 4, 6]\n", done.stderr
    assert log.read_text() == "began "
    assert ("data.workers = 0" in done.stderr) == ("lambda" in task)


def test_a_dead_loader_process_is_no_bug_nor_is_a_script_that_is_only_imported(
    monkeypatch, tmp_path
):
    with pytest.raises(ChildProcessError, match=r"memory full.*fewer data\.workers"):
        list(stream([1, 2], partial(os._exit), 1))
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(Failed, match='under `if __name__ == "__main__":`'):
        fit(small(), "run", runs=tmp_path)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ code from files


STRANGERS = """import mimdet


def data(cfg, split):
    return mimdet.ShapesCOCO("shapes-v1-medium", 64, 3, split)


def sampler(tokens, grid, generator, mark=open({mark!r}, "a").close()):
    return tokens[:, 0]
"""


@pytest.fixture(scope="module", params=["named", "stored"])
def stranger(request, tmp_path_factory) -> Iterator[tuple[Path, Path]]:
    """A run with a part of its own, by its name or with its code; the file this makes when read."""
    folder = tmp_path_factory.mktemp("stranger")
    run, mark, cfg = folder / "run", folder / "mark", small(1)
    (folder / "strangers.py").write_text(STRANGERS.format(mark=str(mark)))
    cfg.data.workers = 0
    parts = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(folder))
        if request.param == "named":
            cfg.data.source, cfg.backbone.sampler = "strangers:data", "strangers:sampler"
        else:
            parts["sampler"] = pkgutil.resolve_name("strangers:sampler")
        list(train(cfg, run, **parts))
        sys.modules.pop("strangers")
        yield run, mark


def test_every_command_that_reads_a_run_asks_before_it_runs_code():
    makes = {"train", "pretrain", "demo", "start"}  # their `run` is what they write
    takes = {name: inspect.signature(command).parameters for name, command in cli.COMMANDS.items()}
    reads = {name for name, given in takes.items() if "run" in given} - makes
    assert reads == {"resume", "evaluate", "predict", "errors", "export", "playground"}
    assert all("trust_code" in takes[name] for name in reads)


@pytest.mark.parametrize(
    "words",
    [
        "resume {run}",
        "evaluate {run}",
        "predict {run} {image} --out {out}",
        "errors {run} --out {out}",
        "export {run} {out}.pth",
    ],
)
def test_code_runs_with_consent_only(words, stranger, tmp_path):
    run, mark = stranger
    mark.unlink(missing_ok=True)
    sys.modules.pop("strangers", None)
    image = tmp_path / "image.png"
    Image.new("RGB", (64, 64)).save(image)
    words = words.format(run=run, image=image, out=tmp_path / "out").split()
    with pytest.raises(Ended, match="--trust-code") as ended:
        cli.main(words)
    assert ended.value.code == 2 and not mark.exists()
    cli.main([*words, "--trust-code"])
    assert mark.exists()


def test_the_playground_asks_too(stranger, tmp_path):
    with pytest.raises(Ended, match="--trust-code"):
        cli.main(["playground", str(stranger[0]), "--out", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_training_into_the_folder_of_a_stranger_runs_none_of_its_code(stranger):
    run, mark = stranger
    mark.unlink(missing_ok=True)
    sys.modules.pop("strangers", None)
    cfg = small(1)
    cfg.data.workers = 0
    for again in (lambda: fit(cfg, run.name, runs=run.parent), lambda: list(train(cfg, run))):
        with pytest.raises(ValueError, match=r"other code for: sampler|another configuration"):
            again()
    assert not mark.exists()


def test_a_warning_is_one_line():
    code = "import warnings; from mimdet.console import open_console; open_console(); "
    command = [sys.executable, "-c", code + "warnings.warn('the file is turned')"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr == "warning: the file is turned\n"
