"""Broken and hostile files, one of a kind: each comes to what corpus.toml says.

Nothing is executed, nothing written or read outside its folder. tools/measure_faults.py measures
the same.
"""

import json
import re
from pathlib import Path

import pytest

from tools import fuzz, measure_faults, readers

FAULTS = measure_faults.faults()


@pytest.fixture(scope="module", autouse=True)
def libraries_are_there() -> None:
    measure_faults.load_libraries()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.reader}-{fault.file}")
def test_a_broken_file_is_answered(fault, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MIMDET_CACHE", str(tmp_path / "cache"))
    memory = fuzz.peak_mb()
    found, seconds = measure_faults.read(fault, tmp_path)
    assert found.kind == fault.outcome, found.message
    assert re.search(fault.said, found.message), found.message
    assert seconds < 2 and fuzz.peak_mb() - memory < 300


def test_the_page_shows_every_file_of_the_corpus_and_what_was_measured() -> None:
    """In at most 2 seconds and 300 MiB each."""
    measured = json.loads(measure_faults.MEASURED.read_text())["files"]
    text = measure_faults.PAGE.read_text(encoding="utf-8")
    assert text == measure_faults.page(measured), "run python tools/measure_faults.py --docs"
    for fault in FAULTS:
        row = measured[f"{fault.reader}/{fault.file}"]
        assert row["outcome"] == fault.outcome
        assert row["seconds"] <= 2 and row["mb"] <= 300, fault.file
    listed = {f"{fault.reader}/{fault.file}" for fault in FAULTS}
    corpus = measure_faults.FAULTS / "corpus"
    assert {file.relative_to(corpus).as_posix() for file in corpus.glob("*/*")} <= listed
    assert len(FAULTS) >= 50 and {fault.reader for fault in FAULTS} == set(readers.READERS)


@pytest.mark.parametrize("reader", fuzz.FUZZED)
def test_500_files_damaged_at_random(reader: str, tmp_path: Path) -> None:
    rows = fuzz.run(reader, 500, 0, tmp_path)
    assert [row for row in rows if row["outcome"] not in readers.GOOD] == []
    assert max(row["mb"] for row in rows) <= 300
