"""The result browser: what it shows, counts and draws, on cases made by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import ImageColor

pytest.importorskip("ipywidgets")

from mimdet.analysis.matching import VERDICTS, Verdict
from mimdet.structures import Record, Target
from mimdet.viz import ResultBrowser
from mimdet.viz.draw import with_few_colours
from mimdet.viz.widgets.result_browser import LOOKS, legend
from tests.unit.test_verdicts import BETTER, RESULTS, TRUTH


class Three:
    """The data set of TRUTH: grey images, in another order than that of their ids."""

    has_masks = True
    version = "three"
    ids = (3, 1, 2)

    def __init__(self) -> None:
        self.categories = ["kind 1", "kind 2"]
        self.category_ids = [1, 2]

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Record:
        grey = torch.full((3, 200, 200), 10 * self.ids[index], dtype=torch.uint8)
        nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
        return Record(grey, nothing, self.ids[index])

    def image_size(self, index: int) -> tuple[int, int]:
        return 200, 200

    def image_id(self, index: int) -> int:
        return self.ids[index]

    def ground_truth(self) -> dict[str, Any]:
        return TRUTH


def browser(**options: Any) -> ResultBrowser:
    return ResultBrowser(Three(), RESULTS, width=200, **options)


def shown(panel: ResultBrowser) -> list[int]:
    """Ids of the images that match."""
    return [place + 1 for place in panel.matches]


# ------------------------------------------------------------------------------- the panel


def test_all_images_match_at_first() -> None:
    panel = browser()
    assert shown(panel) == [1, 2, 3]
    assert (panel.position.value, panel.position.max) == (1, 3)
    assert panel.previous.disabled and not panel.next.disabled
    assert "3 of 3 images match" in panel.status.value
    assert "detections: 7 in 3 images" in panel.status.value
    assert panel.canvases[0].label == "truth: 2 objects"
    assert panel.canvases[1].label == "detections: 1 correct, 2 wrong, 0 missed"
    panel = ResultBrowser(Three(), [], width=100)
    assert "detections: 5 in 3 images" in panel.status.value  # all missed


@pytest.mark.parametrize(
    ("verdict", "category", "size", "score", "images", "count"),
    [
        ("missed", None, None, 0.3, [2], 1),
        ("missed", None, None, 0.5, [2, 3], 2),
        ("background", None, None, 0.3, [2], 1),
        ("background", None, None, 0.4, [], 0),
        ("correct", None, None, 0.3, [1, 3], 2),
        ("classification", "kind 1", None, 0.3, [2], 1),
        ("duplicate", "kind 2", None, 0.3, [], 0),
        (None, "kind 2", None, 0.3, [2], 2),
        (None, None, "small", 0.3, [1, 2], 3),
        (None, None, "large", 0.3, [], 0),
    ],
)
def test_filters(verdict, category, size, score, images, count) -> None:
    panel = browser()
    panel.score.value = score
    panel.verdict.value, panel.category.value, panel.size.value = verdict, category, size
    assert shown(panel) == images
    ending = "" if len(images) == 1 else "s"
    assert f"detections: {count} in {len(images)} image{ending}" in panel.status.value
    assert panel.position.max == len(images)
    panel.verdict.value = panel.category.value = panel.size.value = None
    panel.score.value = 0.3
    assert shown(panel) == [1, 2, 3]


def test_previous_and_next_stop_at_the_ends() -> None:
    panel = browser()
    seen = []
    for button in (panel.next, panel.next, panel.next, panel.previous, panel.next):
        button.click()
        seen.append(panel.position.value)
        corner = np.asarray(panel.canvases[0].snapshot())[-3, 3].tolist()
        assert corner == [10 * seen[-1]] * 3  # Three.__getitem__, by id and not by place
    assert seen == [2, 3, 3, 2, 3]
    assert panel.next.disabled and not panel.previous.disabled
    assert "image 3 of 3 (id 3)" in panel.status.value


def test_a_filter_stays_at_its_image_or_goes_to_the_next_match() -> None:
    panel = browser()
    panel.position.value = 2
    panel.verdict.value = "correct"  # images 1 and 3
    assert "image 2 of 2 (id 3)" in panel.status.value
    panel.verdict.value = None
    assert "image 3 of 3 (id 3)" in panel.status.value
    panel.verdict.value = "missed"  # image 2 alone: the last that matches
    assert "image 1 of 1 (id 2)" in panel.status.value


def test_nothing_matches() -> None:
    panel = browser()
    panel.size.value = "large"
    assert "loosen a filter" in panel.status.value
    assert panel.canvases[1].label == "nothing matches"
    assert panel.previous.disabled and panel.next.disabled
    panel.next.click()
    panel.snapshot()
    panel.size.value = None
    assert "image 1 of 3 (id 1)" in panel.status.value


def test_two_runs_and_where() -> None:
    panel = ResultBrowser(Three(), {"first": RESULTS, "second": BETTER}, width=150)
    assert len(panel.canvases) == 3
    panel.verdict.value = "correct"  # first: images 1, 3; second: 1, 2, 3
    found_in = {}
    for where in panel.where.options:
        panel.where.value = where
        found_in[where] = shown(panel)
    assert found_in == {
        "either": [1, 2, 3],
        "first": [1, 3],
        "second": [1, 2, 3],
        "only first": [],
        "only second": [2],
    }
    assert "first: 2 in 2 images, second: 4 in 3 images" in panel.status.value
    assert panel.canvases[2].label == "second: 1 correct, 0 wrong, 1 missed"
    labels = [canvas.label.split(":")[0] for canvas in panel.canvases]
    assert labels == ["truth", "first", "second"]


def test_colours_follow_the_verdict_and_masks_are_drawn_when_they_are_judged() -> None:
    panel = browser()
    panel.position.value = 3  # A found: a green box at its left edge, under a title
    picture = np.asarray(panel.canvases[1].snapshot())
    below = picture.shape[0] - 200
    assert picture[below + 30, 10].tolist() == [*_rgb("correct")]
    panel.score.value = 0.5  # now it is missed: dashes of six pixels
    edge = np.asarray(panel.canvases[1].snapshot())[below + 10 : below + 50, 10]
    dashes = (edge == _rgb("missed")).all(1)
    assert 15 <= dashes.sum() <= 28
    inside = {}
    for iou_type in ("bbox", "segm"):
        panel = browser(iou_type=iou_type)
        panel.position.value = 3
        picture = np.asarray(panel.canvases[1].snapshot())
        inside[iou_type] = picture[picture.shape[0] - 200 + 30, 30].tolist()
    assert inside["bbox"] == [30, 30, 30]
    green = np.array(_rgb("correct"))
    assert inside["segm"] == pytest.approx(30 + 0.4 * (green - 30), abs=1)


def test_the_stored_picture_has_a_legend_with_a_colour_and_letter_a_verdict() -> None:
    panel = browser()
    _, metadata = panel._repr_mimebundle_()
    assert "3 of 3 images match" in metadata["image/png"]["alt"]
    row = max(canvas.size[1] for canvas in panel.canvases)
    height, width, _ = legend().shape
    assert panel.snapshot().size == (max(2 * 200 + 8, width), row + 20 + 8 + height + 20)
    assert set(LOOKS) == set(VERDICTS)
    colours, letters, _ = zip(*LOOKS.values(), strict=True)
    assert len(set(colours)) == len(set(letters)) == len(VERDICTS)


def test_the_colours_of_a_small_picture_stay() -> None:
    below = legend()
    noise = np.random.default_rng(0).integers(0, 256, (200, below.shape[1], 3), dtype=np.uint8)
    few = with_few_colours(np.concatenate([noise, below]), [c for c, *_ in LOOKS.values()])
    assert few.mode == "P" and len(few.getcolors() or []) <= 255
    got = np.asarray(few.convert("RGB"))[200:]
    for verdict in LOOKS:
        was = (below == _rgb(verdict)).all(-1)
        assert was.sum() > 100
        assert np.abs(got[was].astype(int) - _rgb(verdict)).max() <= 4  # as PIL looks them up


def _rgb(verdict: Verdict) -> tuple[int, ...]:
    return ImageColor.getrgb(LOOKS[verdict][0])
