"""check-data meets files that are no data sets, hostile values, and real data sets."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mimdet.data.checks import check_dataset

WIDTH, HEIGHT = 64, 48
OBJECT = {"image_id": 1, "category_id": 1, "bbox": [4, 6, 20, 16], "area": 320, "iscrowd": 0}
SOUND = json.dumps(
    {
        "images": [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
        "annotations": [
            {"id": 1, "segmentation": [[4, 6, 24, 6, 24, 22, 4, 22]], **OBJECT},
            {"id": 2, "segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, 3072]}, **OBJECT},
        ],
        "categories": [{"id": 1, "name": "cell"}],
    }
)


# ---- the file itself -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"images: []",
        b"\xff\xfe\xfa",
        b"\x89PNG\r\n",
        b"[" * 200_000,
        b'{"images": ' + b"1" * 10_000 + b"}",
    ],
    ids=["empty", "yaml", "bytes", "png", "deep", "long-number"],
)
def test_not_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "set.json").write_bytes(content)
    report = check_dataset(tmp_path / "set.json", tmp_path)
    (problem,) = report.problems
    assert problem.kind in ("json-unreadable", "not-coco")
    assert not report.ok


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.99])
def test_truncated_json(share: float, tmp_path: Path) -> None:
    (tmp_path / "set.json").write_text(SOUND[: int(len(SOUND) * share)])
    report = check_dataset(tmp_path / "set.json", tmp_path)
    assert [problem.kind for problem in report.problems] == ["json-unreadable"]


def test_missing_file_is_a_finding(tmp_path: Path) -> None:
    report = check_dataset(tmp_path / "absent.json", tmp_path)
    assert "absent.json" in report.table()
    assert not report.ok


REAL_SETS = [
    ("coco/annotations/instances_train2017.json", "coco/train2017"),
    ("coco/annotations/instances_val2017.json", "coco/val2017"),
    ("nuclei/annotations/instances_train.json", "nuclei/train"),
    ("nuclei/annotations/instances_train_rle.json", "nuclei/train"),
    ("nuclei/annotations/instances_val.json", "nuclei/val"),
    ("nuclei/annotations/instances_val_rle.json", "nuclei/val"),
]


@pytest.mark.parametrize(("annotations", "images"), REAL_SETS)
def test_real_sets_have_no_error(annotations: str, images: str, shared_data: Path) -> None:
    report = check_dataset(shared_data / annotations, shared_data / images)
    assert report.ok, report.table()
    # One COCO crowd has an area that is not its mask's; 3 of the 80 classes are not in this val.
    expected = {"area-mismatch": 1} if "coco/train" in images else {}
    expected |= {"category-unused": 3} if "coco/val" in images else {}
    assert {kind: len(found) for kind, found in report.by_kind().items()} == expected


@pytest.mark.parametrize("images", ["coco/val2017", "nuclei/val"])
def test_real_boxes_stored_as_xyxy_are_noticed(
    images: str, shared_data: Path, tmp_path: Path
) -> None:
    name = dict((folder, path) for path, folder in REAL_SETS if "rle" not in path)[images]
    data = json.loads((shared_data / name).read_text())
    for annotation in data["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x, y, x + w, y + h]
    (tmp_path / "set.json").write_text(json.dumps(data))
    report = check_dataset(tmp_path / "set.json", shared_data / images, decode=False)
    assert "boxes-look-xyxy" in report.by_kind()


# ---- properties ----------------------------------------------------------------------------------


NASTY: list[Any] = [
    *(None, True, 0, -1, 3, 10**18, 10**400, -(10**400), 0.5, 1e308, -1e308),
    *(float("nan"), float("inf"), "", "3", "\0", "\ud800", "\x1b[31m", "../../x", "a" * 300),
    *([], [[]], [[[]]], {}, {"counts": []}, {"size": [2, 2], "counts": "\ud800"}, [0, 0, 0, 0]),
    {"size": [10**8, 10**8], "counts": [0, 10**16]},
    {"size": [48, 64], "counts": [10**400]},
]
JUNK = st.recursive(
    st.sampled_from(NASTY) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["id", "images", "annotations", "categories", "image_id", "bbox", "size", "counts"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "a.png")
    return folder


def survives(content: Any, folder: Path) -> None:
    (folder / "set.json").write_text(json.dumps(content))
    report = check_dataset(folder / "set.json", folder)
    report.table().encode("utf-8")  # what a terminal is given
    content = json.loads(json.dumps(report.to_dict()))
    assert report.ok == all(problem["severity"] == "warning" for problem in content["problems"])


@settings(max_examples=150)
@given(content=JUNK)
def test_junk_never_raises(content: Any, folder: Path) -> None:
    survives(content, folder)


@settings(max_examples=300)
@given(data=st.data())
def test_junk_in_one_place_never_raises(data: st.DataObject, folder: Path) -> None:
    """A random key of a random entry (or the entry itself) is replaced by junk."""
    content = json.loads(SOUND)
    section = data.draw(st.sampled_from(sorted(content)))
    index = data.draw(st.integers(0, len(content[section]) - 1))
    entry = content[section][index]
    key = data.draw(st.sampled_from([*sorted(entry), None]))
    if key is None:
        content[section][index] = data.draw(JUNK)
    else:
        entry[key] = data.draw(JUNK)
    survives(content, folder)
