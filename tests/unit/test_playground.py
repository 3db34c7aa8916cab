"""The playground's parts that need no browser; tests/browser operates the page."""

import re
from pathlib import Path

import pytest
import torch

import mimdet
from mimdet.playground import (
    PAGE,
    held_out,
    lesson_numbers,
    matched,
    page_size,
    runtime_files,
    stranger,
    write_page,
)


def test_every_number_of_the_lesson_is_computed() -> None:
    """From the shipped models, on two scenes of 8 and 4 objects."""
    model = mimdet.load_detector("tiny")
    pictures = held_out(model, 2)
    assert [len(objects) for _, objects in pictures] == [8, 4]
    numbers = lesson_numbers(model, mimdet.load_mae_model("tiny_mae"), pictures)
    stated = set(re.findall(r'data-number="(\w+)"', (PAGE / "index.html").read_text()))
    assert stated <= set(numbers) and len(stated) >= 19
    text = re.sub(r"<[^>]*>", "", (PAGE / "index.html").read_text().split('<ol id="lesson">')[1])
    stray = re.findall(r"\d+", re.sub(r"Set 25 %|of 255", "", text))
    assert stray == []  # no number of a measurement is typed by hand
    found = 0
    for pixels, objects in pictures:
        d = mimdet.predict(model, pixels)
        found += sum(matched(d.boxes, d.labels, d.scores, objects))
    assert numbers["all_100"] == f"{100 * found / 12:.0f}"


def test_a_detection_finds_one_object_by_hand() -> None:
    box = [0.0, 0.0, 10.0, 10.0]
    objects = [
        {"label": 1, "box": [0.0, 0.0, 10.0, 16.0]},  # IoU 0.625 with the box
        {"label": 1, "box": [0.0, 0.0, 10.0, 11.0]},  # 0.91: the one it finds
        {"label": 2, "box": box},
        {"label": 3, "box": box},
    ]
    boxes = torch.tensor([box, box, [0.0, 0.0, 10.0, 30.0]])
    labels, scores = torch.tensor([1, 2, 3]), torch.tensor([0.9, 0.4, 0.8])
    assert matched(boxes, labels, scores, objects) == [False, True, False, False]


def test_pictures_need_no_padding() -> None:
    assert page_size(torch.zeros(3, 256, 300)).shape == (3, 256, 288)
    assert page_size(torch.zeros(3, 1000, 256)).shape == (3, 384, 256)
    assert stranger(256).shape == (3, 256, 256)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    model, painter = mimdet.load_detector("tiny"), mimdet.load_mae_model("tiny_mae")
    with pytest.raises(ValueError, match="holds files that are no playground's"):
        write_page(tmp_path, {"tiny": model}, painter)
    with pytest.raises(ValueError, match=r"ort.wasm.bundle.min.mjs is not there: `npm pack"):
        runtime_files(tmp_path)
    for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"):
        (tmp_path / name).write_text("another version")
    with pytest.raises(ValueError, match="is not that of onnxruntime-web"):
        runtime_files(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
