"""What every test shares: reference folders, seeds, threads."""

import os
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)  # two test workers share two cores
if "PYTEST_XDIST_WORKER" not in os.environ:  # whose parent has made one
    CACHE = tempfile.TemporaryDirectory(prefix="mimdet-tests-")  # not the user's own
    os.environ["MIMDET_CACHE"] = CACHE.name

# The same examples on every run: a failure on one machine is a failure on all.
settings.register_profile("mimdet", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("mimdet")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed every generator before a test's fixtures are made; skip GPU tests without a GPU."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the original implementation's reference tensors."""
    return _folder("MIMDET_GOLDEN", "reference tensors of the original implementation")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of small real data sets: coco, nuclei, evalbench."""
    return _folder("MIMDET_DATA", "small real data sets")


@pytest.fixture
def gate(tmp_path, monkeypatch) -> Path:
    """While this file exists, a training with `gated` stays in its fourth step."""
    file = tmp_path / "gate"
    file.touch()
    monkeypatch.setenv("MIMDET_TEST_GATE", str(file))
    return file


def _folder(variable: str, contents: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: it names the folder of the {contents}")
    folder = Path(value)
    if not folder.is_dir():
        pytest.fail(f"{variable}={value} is not a folder; it should hold the {contents}")
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Two tables: parity, each quantity with its error; and what is said about bad checkpoints."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind)]
    noted = [item for report in reports for item in report.user_properties]
    parity = sorted(value for name, value in noted if name == "parity")
    if parity:
        terminalreporter.section("parity with the original implementation")
    for where, quantity, error, bound in parity:
        terminalreporter.write_line(f"{where:32} {quantity:44} {error:8.1e}  (<= {bound:.0e})")
    refused = sorted(value for name, value in noted if name == "refused")
    if refused and terminalreporter.config.get_verbosity() > 0:
        terminalreporter.section("bad checkpoints, and what is said about them")
        for fault, message in refused:
            terminalreporter.write_line(f"{fault}\n    {message}")
