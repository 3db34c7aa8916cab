"""ResultBrowser: predictions against the truth, image by image, filtered by what went wrong."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
from PIL import Image, ImageDraw

from mimdet.analysis.errors import SIZES, ErrorReport, find_errors
from mimdet.analysis.matching import VERDICTS, Verdict, Verdicts
from mimdet.analysis.metrics import IouType, read_results
from mimdet.data.loader import Dataset
from mimdet.structures import Crops
from mimdet.viz import draw
from mimdet.viz.draw import Mark, Pixels, Size
from mimdet.viz.style import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION, YELLOW, plural
from mimdet.viz.widgets.canvas import PatchCanvas
from mimdet.viz.widgets.panel import Panel, dropdown

LOOKS: dict[Verdict, tuple[str, str, str]] = {
    "correct": (GREEN, "+", "correct"),
    "classification": (ORANGE, "C", "classification"),
    "localisation": (SKY, "L", "localisation"),
    "both": (PURPLE, "B", "both"),
    "duplicate": (YELLOW, "D", "duplicate"),
    "background": (BLUE, "N", "background (nothing there)"),
    "missed": (VERMILLION, "M", "missed (dashed)"),
}
"""How the marks of a verdict are told from others: colour, letter, words."""
WHITE = "#FFFFFF"
"""Of a true object."""


class ResultBrowser(Panel):
    """The truth (left) beside the detections of one or two runs, each with its verdict.

    verdict: of TIDE (`mimdet/analysis/errors.py`), each a colour and a letter; an image is shown
    when it has a detection or a missed object with this verdict, class and size;
    class: that the detector said, or of the object it is about;
    size: of the object; of a duplicate, background or "both" error, of the detection;
    score: detections below it are as if they were not there, so raising it makes objects missed;
    where (two runs): the run in which it must be found; "only" = and not in the other one;
    image number, previous, next: through the images that match.

    What matches is thick and named, everything else in the image a thin line; missed objects are
    dashed. With iou_type "segm" masks are judged and drawn.
    """

    name = "results"

    def __init__(
        self,
        dataset: Dataset,
        results: Any,
        iou_type: IouType = "bbox",
        *,
        iou_threshold: float = 0.5,
        width: int | None = None,
    ) -> None:
        """dataset: what the results were made on; results: of one run, or {name: results} of one or
        two: an `Evaluation`, its list of COCO results, a file of them, or the folder of a run with
        predictions.json; iou_threshold: from which a detection is correct; width: of a picture,
        pixels.

        Raises ValueError for another number of runs, and naming a result that cannot be judged.
        """
        super().__init__()
        runs = dict(results) if isinstance(results, Mapping) else {"detections": results}
        if not 1 <= len(runs) <= 2:
            raise ValueError(f"results of {len(runs)} runs: give one or two, {{name: results}}")
        if not len(dataset):
            raise ValueError("the data set has no images: there is nothing to look at")
        truth = dataset.ground_truth()
        limits = {"iou_threshold": iou_threshold, "area_scale": getattr(dataset, "area_scale", 1.0)}
        self.runs = {
            name: find_errors(truth, _entries(mine, truth), iou_type, **limits)
            for name, mine in runs.items()
        }
        self.iou_type = iou_type
        first = next(iter(self.runs.values()))
        self._ids, self._categories = first.image_ids, first.categories
        index = {dataset.image_id(i): i for i in range(len(dataset))}
        ids = sorted(category["id"] for category in truth["categories"])
        self._rank = {category_id: rank for rank, category_id in enumerate(ids)}
        self._objects = [a for a in truth["annotations"] if not a.get("iscrowd", 0)]
        self._width = width or (400 if len(runs) == 1 else 300)
        self._filter: tuple[Any, ...] = ()
        self._image = 0  # the one last shown
        self._read = lambda: dataset[index[self._ids[self._image]]]
        self.matches: list[int] = []
        """Places of the images that match, in the order of their ids."""
        self.canvases = [PatchCanvas(tool="look") for _ in range(1 + len(runs))]
        # Not None: a list shows that value as an empty field.
        self.verdict = dropdown("verdict", [("any", ""), *((v, v) for v in VERDICTS)])
        self.category = dropdown("class", [("any", ""), *((c, c) for c in self._categories)])
        self.size = dropdown("size", [("any", ""), *((s, s) for s in SIZES)])
        only = [f"only {name}" for name in self.runs]
        self.where = dropdown("where", ["either", *self.runs, *only])
        self.score = ipywidgets.FloatSlider(0.3, min=0, max=1, step=0.05, description="score ≥")
        self.position = ipywidgets.BoundedIntText(
            1, min=0, max=1, description="image number", layout={"width": "160px"}
        )
        self.previous = self.button("previous", lambda: self._step(-1))
        self.next = self.button("next", lambda: self._step(+1))
        words = ", ".join(f"{letter} {meaning}" for _, letter, meaning in LOOKS.values())
        self.open(
            [self.verdict, self.category, self.size, *([self.where] if len(runs) == 2 else [])],
            [self.score, self.previous, self.position, self.next],
            ipywidgets.HTML(f"<img alt='{words}' src='{draw.data_url(legend())}'>"),
            self.canvases,
        )

    def _step(self, by: int) -> None:
        self.position.value += by  # stays within its ends

    def draw(self) -> str:
        score = round(self.score.value, 4)
        wanted = [control.value or None for control in (self.verdict, self.category, self.size)]
        judged = {name: run.verdicts(score) for name, run in self.runs.items()}
        chosen = {name: run.chosen(judged[name], *wanted) for name, run in self.runs.items()}
        in_run = {name: set(judged[name].image[chosen[name]].tolist()) for name in self.runs}
        either = set[int]().union(*in_run.values())
        images = {"either": either} | in_run
        for name in in_run:
            others = (found for other, found in in_run.items() if other != name)
            images[f"only {name}"] = either.difference(*others)
        self._go_to_match(sorted(images[self.where.value]), (*wanted, score, self.where.value))
        found = [
            f"{name}: {int(mine.sum())} in {plural(len(in_run[name]), 'image')}"
            for name, mine in chosen.items()
        ]
        shown = f"{len(self.matches)} of {plural(len(self._ids), 'image')} match"
        self.label = f"{shown}; detections and missed objects that match: {', '.join(found)}"
        if not self.matches:
            nothing = np.full((self._width, self._width, 3), 225, np.uint8)
            for canvas in self.canvases:
                canvas.show(nothing, title="nothing matches")
            return f"{self.label}. Nothing to show: loosen a filter"
        image = self.once("record", self._image, self._read).image
        picture, size = draw.to_pixels(image, self._width), draw.image_size(image)
        marks = [
            Mark(draw.box_of(entry, size), WHITE, self._class(entry), self._mask(entry, size))
            for entry in self._objects
            if entry["image_id"] == self._ids[self._image]
        ]
        title = f"truth: {plural(len(marks), 'object')}"
        self.canvases[0].show(draw.with_marks(picture, marks, size), title=title)
        for canvas, (name, verdicts) in zip(self.canvases[1:], judged.items(), strict=True):
            here = verdicts.image == self._image
            marks = self._marks(self.runs[name], verdicts[here], chosen[name][here], size)
            counts = verdicts[here].count()
            wrong = len(marks) - counts["correct"] - counts["missed"]
            title = f"{name}: {counts['correct']} correct, {wrong} wrong, {counts['missed']} missed"
            canvas.show(draw.with_marks(picture, marks, size), title=title)
        at = f"image {self.position.value} of {len(self.matches)} (id {self._ids[self._image]})"
        self.label = f"{self.label}; {at}"
        return self.label

    def _marks(self, run: ErrorReport, verdicts: Verdicts, strong: Any, size: Size) -> list[Mark]:
        marks = []
        for i, number in enumerate(verdicts.verdict):
            colour, letter, _ = LOOKS[VERDICTS[number]]
            missed, is_strong = bool(verdicts.result[i] < 0), bool(strong[i])
            if missed:
                entry, score = run.ground_truth["annotations"][verdicts.annotation[i]], ""
            else:
                entry, score = run.results[verdicts.result[i]], draw.score_text(verdicts.score[i])
            name = " ".join(filter(None, (letter, self._class(entry), score)))
            mask = self._mask(entry, size) if is_strong and not missed else None
            marks.append(Mark(draw.box_of(entry, size), colour, name, mask, is_strong, missed))
        return marks

    def _class(self, entry: dict[str, Any]) -> str:
        return draw.class_name(self._rank[entry["category_id"]], self._categories)

    def _mask(self, entry: dict[str, Any], size: Size) -> Crops | None:
        return draw.mask_of(entry, size) if self.iou_type == "segm" else None

    def _go_to_match(self, matches: list[int], wanted: tuple[Any, ...]) -> None:
        """A new filter stays at the image it is at, or goes to the next that matches; a new
        position is taken as it is."""
        place = self.position.value
        if wanted != self._filter:
            place = int(np.searchsorted(matches, self._image)) + 1
        self._filter, self.matches = wanted, matches
        self.position.max = len(matches)
        self.position.value = max(min(place, len(matches)), min(1, len(matches)))
        if matches:
            self._image = matches[self.position.value - 1]
        self.previous.disabled = self.position.value <= 1
        self.next.disabled = self.position.value >= len(matches)

    def snapshot(self) -> Image.Image:
        """The canvases, the legend and what matches, as a saved notebook shows them."""
        controls = (self.verdict, self.category, self.size, self.score)
        chosen = [f"{control.description} {control.value}" for control in controls if control.value]
        text = f"{', '.join(chosen)}: {len(self.matches)} of {plural(len(self._ids), 'image')}"
        whole = draw.captioned(draw.below([np.asarray(super().snapshot()), legend()]), text)
        return draw.with_few_colours(whole, [colour for colour, _, _ in LOOKS.values()])


def _entries(results: Any, truth: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of an `Evaluation`, a list, a file, or the folder of a run."""
    if isinstance(results, str | Path):
        path = Path(results)
        return read_results(path / "predictions.json" if path.is_dir() else path, truth)
    entries: Any = getattr(results, "results", results)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("these are no results: give an Evaluation, COCO results, or their file")
    return entries


@cache
def legend() -> Pixels:
    """What the colours and letters mean, in two lines."""
    tags = [_tag(*look) for look in LOOKS.values()]
    return draw.below([draw.beside(tags[:4], gap=14), draw.beside(tags[4:], gap=14)], gap=2)


def _tag(colour: str, letter: str, words: str, size: int = 13) -> Pixels:
    """The letter on its colour, and the words."""
    left, height = draw.font(size).getlength(letter) + 8, size + 7
    width = round(left + 6 + draw.font(size).getlength(words))
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 0, left, height), fill=colour)
    draw.write_text(pen, (4, height / 2), letter, colour, size)
    draw.write_text(pen, (left + 5, height / 2), words, "white", size)
    return np.asarray(picture)
