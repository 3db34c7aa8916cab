"""ResultBrowser: predictions against the truth, image by image, filtered by what went wrong."""

from collections.abc import Mapping
from typing import Any

import ipywidgets
import numpy as np
from PIL import Image

from mimdet.analysis.matching import as_rle
from mimdet.analysis.metrics import IouType
from mimdet.analysis.verdicts import SIZES, VERDICTS, JudgedResults, Verdicts
from mimdet.data.loader import Dataset
from mimdet.structures import Record
from mimdet.viz.draw import (
    Mark,
    Pixels,
    captioned,
    class_name,
    enlarged,
    legend,
    legend_html,
    score_text,
    to_pixels,
    with_few_colours,
    with_marks,
)
from mimdet.viz.widgets.canvas import PatchCanvas
from mimdet.viz.widgets.panel import STYLE, Panel

Results = list[dict[str, Any]]

Box = tuple[float, float, float, float]

REMEMBERED = 16
"""Images kept, so that a filter does not read a file again."""


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

    def __init__(
        self,
        dataset: Dataset,
        results: Results | Mapping[str, Results],
        iou_type: IouType = "bbox",
        *,
        iou_threshold: float = 0.5,
        score_threshold: float = 0.3,
        width: int | None = None,
    ) -> None:
        """dataset: what the results were made on; results: COCO results, as `Evaluation.results`
        or predictions.json, of one run, or {name: results} of one or two; iou_threshold: from which
        a detection is correct; score_threshold: at first; width: of a picture, pixels.

        Raises ValueError for another number of runs, and naming a result that cannot be judged.
        """
        super().__init__()
        runs = dict(results) if isinstance(results, Mapping) else {"detections": results}
        if not 1 <= len(runs) <= 2:
            raise ValueError(f"results of {len(runs)} runs: give one or two, {{name: results}}")
        if not len(dataset):
            raise ValueError("the data set has no images: there is nothing to look at")
        truth = dataset.ground_truth()
        scale = getattr(dataset, "area_scale", 1.0)
        self.runs = {
            name: JudgedResults(
                truth, mine, iou_type, iou_threshold=iou_threshold, area_scale=scale
            )
            for name, mine in runs.items()
        }
        self.dataset, self.iou_type = dataset, iou_type
        first = next(iter(self.runs.values()))
        index = {dataset.image_id(i): i for i in range(len(dataset))}
        self._index = [index[image_id] for image_id in first.image_ids]
        self._ids, self._categories = first.image_ids, first.categories
        ids = sorted(category["id"] for category in truth["categories"])
        self._rank = {category_id: rank for rank, category_id in enumerate(ids)}
        self._truth: dict[Any, list[dict[str, Any]]] = {image_id: [] for image_id in self._ids}
        for annotation in truth["annotations"]:
            if not annotation.get("iscrowd", 0):
                self._truth[annotation["image_id"]].append(annotation)
        self._records: dict[int, Record] = {}
        self._width = width or (400 if len(runs) == 1 else 300)
        self._filter: tuple[Any, ...] = ()
        self._image = 0  # the one last shown
        self.matches: list[int] = []
        """Places of the images that match, in the order of their ids."""
        self._make_controls(score_threshold)
        self.canvases = [PatchCanvas(tool="look") for _ in range(1 + len(runs))]
        for name, canvas in zip(("truth", "first", "second"), self.canvases, strict=False):
            canvas.add_class(f"mimdet-results-{name}")
        self.arrange(
            [self.verdict, self.category, self.size, *([self.where] if len(runs) == 2 else [])],
            [self.score, self.previous, self.position, self.next],
            ipywidgets.HTML(legend_html()),
            list(self.canvases),
        )
        self.redraw()

    def _make_controls(self, score_threshold: float) -> None:
        def choice(description: str, options: Any) -> Any:
            layout = {"width": "max-content"}
            return ipywidgets.Dropdown(
                options=options, description=description, style=STYLE, layout=layout
            )

        first, *second = self.runs
        # Not None: a list shows that value as an empty field.
        self.verdict = choice("verdict", [("any", ""), *((v, v) for v in VERDICTS)])
        self.category = choice("class", [("any", ""), *((c, c) for c in self._categories)])
        self.size = choice("size", [("any", ""), *((s, s) for s in SIZES)])
        names = [first, *second]
        only = [f"only {name}" for name in names]
        self.where = choice("where", ["either", *names, *only] if second else ["either"])
        self.score = ipywidgets.FloatSlider(
            score_threshold,
            min=0,
            max=1,
            step=0.05,
            description="score ≥",
            continuous_update=False,
            style=STYLE,
        )
        self.position = ipywidgets.BoundedIntText(
            1,
            min=0,
            max=1,
            description="image number",
            style=STYLE,
            layout={"width": "160px"},
        )
        self.previous, self.next = (
            ipywidgets.Button(description=text, layout={"width": "90px"})
            for text in ("previous", "next")
        )
        self.previous.on_click(lambda _: self._step(-1))
        self.next.on_click(lambda _: self._step(+1))
        for name in ("verdict", "category", "size", "where", "score", "position"):
            getattr(self, name).add_class(f"mimdet-results-{name}")
        self.previous.add_class("mimdet-results-previous")
        self.next.add_class("mimdet-results-next")
        self.watch(self.verdict, self.category, self.size, self.where, self.score, self.position)

    # --------------------------------------------------------------------------- drawing

    def draw(self) -> str:
        score = round(self.score.value, 4)
        verdict, category, size = self.verdict.value, self.category.value, self.size.value
        wanted = (verdict or None, category or None, size or None)
        judged = {name: run.at(score) for name, run in self.runs.items()}
        chosen = {name: run.chosen(judged[name], *wanted) for name, run in self.runs.items()}
        in_run = {name: set(judged[name].image[chosen[name]].tolist()) for name in self.runs}
        self._go_to_match(sorted(self._where(in_run)), (*wanted, score, self.where.value))
        found = [
            f"{name}: {int(mine.sum())} in {_plural(len(in_run[name]), 'image')}"
            for name, mine in chosen.items()
        ]
        shown = f"{len(self.matches)} of {_plural(len(self._ids), 'image')} match"
        self.label = f"{shown}; detections and missed objects that match: {', '.join(found)}"
        if not self.matches:
            for canvas in self.canvases:
                canvas.show(_nothing(self._width))
                canvas.label = "nothing matches"
            return f"{self.label}. Nothing to show: loosen a filter"
        record = self._record(self._image)
        picture = enlarged(to_pixels(record.image), self._width)
        self._draw_truth(record, picture)
        for canvas, (name, verdicts) in zip(self.canvases[1:], judged.items(), strict=True):
            here = verdicts.image == self._image
            self._draw_run(canvas, name, verdicts[here], chosen[name][here], record, picture)
        place = self.matches.index(self._image) + 1
        at = f"image {place} of {len(self.matches)} (id {self._ids[self._image]})"
        self.label = f"{self.label}; {at}"
        return self.label

    def snapshot(self) -> Image.Image:
        """The canvases, the legend and what matches, as a saved notebook shows them."""
        row = np.asarray(super().snapshot())
        below = legend(row.shape[1])
        space = np.full((8, row.shape[1], 3), 255, np.uint8)
        whole = np.concatenate([row, space, below])
        return with_few_colours(captioned(whole, self._summary(), 14))

    def _summary(self) -> str:
        controls = {"verdict": self.verdict, "class": self.category, "size": self.size}
        filters = [f"{n}: {c.value}" for n, c in controls.items() if c.value is not None]
        text = ", ".join([*filters, f"score from {score_text(self.score.value)}"])
        return f"{text}: {len(self.matches)} of {_plural(len(self._ids), 'image')}"

    def _draw_truth(self, record: Record, picture: Pixels) -> None:
        size, scale = _size(record), picture.shape[1] / record.image.shape[2]
        marks = []
        for entry in self._truth[self._ids[self._image]]:
            mask = _bitmap(entry["segmentation"], size) if self.iou_type == "segm" else None
            name = class_name(self._rank[entry["category_id"]], self._categories)
            marks.append(Mark(_box(entry, size, scale), None, name, mask=mask))
        text = f"truth: {_plural(len(marks), 'object')}"
        self._show(self.canvases[0], with_marks(picture, marks), text)

    def _draw_run(
        self,
        canvas: PatchCanvas,
        name: str,
        verdicts: Verdicts,
        strong: Any,
        record: Record,
        picture: Pixels,
    ) -> None:
        scale = picture.shape[1] / record.image.shape[2]
        run = self.runs[name]
        marks = [
            self._mark(run, verdicts, i, bool(strong[i]), scale, record)
            for i in range(len(verdicts))
        ]
        counts = verdicts.count()
        wrong = len(verdicts) - counts["correct"] - counts["missed"]
        text = f"{name}: {counts['correct']} correct, {wrong} wrong, {counts['missed']} missed"
        self._show(canvas, with_marks(picture, marks), text)

    def _mark(
        self,
        run: JudgedResults,
        verdicts: Verdicts,
        i: int,
        strong: bool,
        scale: float,
        record: Record,
    ) -> Mark:
        result, rank = int(verdicts.result[i]), int(verdicts.said[i])
        entry = run.results[result] if result >= 0 else None
        if entry is None:
            entry = run.ground_truth["annotations"][int(verdicts.annotation[i])]
            rank = int(verdicts.true[i])
        size = _size(record)
        text = class_name(rank, run.categories)
        if result >= 0:
            text = f"{text} {score_text(float(verdicts.score[i]))}".strip()
        mask = None
        if self.iou_type == "segm" and strong and result >= 0:
            mask = _bitmap(entry["segmentation"], size)
        box = _box(entry, size, scale)
        return Mark(box, VERDICTS[int(verdicts.verdict[i])], text, strong, mask)

    def _show(self, canvas: PatchCanvas, drawn: Pixels, text: str) -> None:
        canvas.show(captioned(drawn, text, 13), self._width)
        canvas.label = text

    # --------------------------------------------------------------------------- which image

    def _where(self, in_run: dict[str, set[int]]) -> set[int]:
        first, *rest = in_run
        place = self.where.index
        if not rest or place == 0:
            return set.union(*in_run.values())
        names = [first, *rest]
        if place <= 2:
            return in_run[names[place - 1]]
        mine, other = names[place - 3], names[4 - place]
        return in_run[mine] - in_run[other]

    def _go_to_match(self, matches: list[int], wanted: tuple[Any, ...]) -> None:
        """A new filter stays at the image it is at, or goes to the next that matches; a new
        position is taken as it is."""
        is_new, self._filter, self.matches = wanted != self._filter, wanted, matches
        self.position.max = len(matches)
        if not matches:
            self.position.value = 0
        else:
            place = max(1, self.position.value)
            if is_new:
                place = min(int(np.searchsorted(matches, self._image)) + 1, len(matches))
            self.position.value = place
            self._image = matches[place - 1]
        self.previous.disabled = self.position.value <= 1
        self.next.disabled = self.position.value >= len(matches)

    def _step(self, by: int) -> None:
        self.position.value = min(max(1, self.position.value + by), max(1, len(self.matches)))

    def _record(self, image: int) -> Record:
        if image not in self._records:
            if len(self._records) >= REMEMBERED:
                self._records.pop(next(iter(self._records)))
            self._records[image] = self.dataset[self._index[image]]
        return self._records[image]


def _bitmap(segmentation: Any, size: tuple[int, int]) -> Any:
    from pycocotools import mask as coco_mask

    return coco_mask.decode(as_rle(segmentation, *size)).astype(bool)


def _box(entry: dict[str, Any], size: tuple[int, int], scale: float) -> Box:
    """xyxy on a picture, of a COCO entry; without a bbox, that of its mask."""
    if entry.get("bbox") is not None:
        x, y, w, h = entry["bbox"]
    else:
        from pycocotools import mask as coco_mask

        x, y, w, h = coco_mask.toBbox(as_rle(entry["segmentation"], *size)).tolist()
    return x * scale, y * scale, (x + w) * scale, (y + h) * scale


def _size(record: Record) -> tuple[int, int]:
    return int(record.image.shape[1]), int(record.image.shape[2])


def _nothing(width: int) -> Pixels:
    return captioned(np.full((width, width, 3), 225, np.uint8), "nothing matches", 13)


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
