"""Figures: what is drawn and where, never pixels; and that no state is left behind."""

import io
import math
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image
from torch import nn

import mimdet
from mimdet import viz
from mimdet.models.sampling import Sample
from mimdet.models.weights import LoadReport
from mimdet.structures import Crops, Detections, Record, Target
from mimdet.viz import (
    draw,
    save_figure,
    show_data,
    show_detections,
    show_ratios,
    show_sample,
    show_stages,
    show_training,
)
from mimdet.viz.draw import Mark
from tests.small import nothing_found, small

ROOT = Path(__file__).resolve().parents[2]
HEIGHT, WIDTH = 48, 64
BOXES = torch.tensor([[4.0, 20.0, 24.0, 40.0], [30.0, 20.0, 60.0, 44.0]])


def image(height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def target(masks: bool = True) -> Target:
    crops = Crops(BOXES, torch.ones(2, 112, 112, dtype=torch.uint8)) if masks else None
    return Target(BOXES, torch.tensor([0, 1]), crops)


def detections(scores: tuple[float, float] = (0.87, 0.4), masks: bool = True) -> Detections:
    labels, probabilities = torch.tensor([0, 1]), torch.ones(2, 28, 28) if masks else None
    return Detections(BOXES, torch.tensor(scores), labels, (HEIGHT, WIDTH), probabilities)


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


@pytest.fixture
def painted(monkeypatch: Any) -> list[Sequence[Mark]]:
    """What was painted on each panel, in the order of painting."""
    seen: list[Sequence[Mark]] = []
    monkeypatch.setattr(draw, "draw_marks", lambda _, marks, *__: seen.append(marks))
    return seen


# ------------------------------------------------------------------------------- detections


def test_truth_stands_left_of_its_detections(painted: list[Sequence[Mark]]) -> None:
    fig = show_detections([image(), image()], [detections()] * 2, [target()] * 2, ["cat", "dog"])
    titles = [ax.get_title("left") for ax in fig.axes]
    assert titles == ["truth: 2", "detections ≥ .30: 2"] * 2
    truth, found = fig.axes[0], fig.axes[1]
    assert truth.get_position().x1 < found.get_position().x0
    assert truth.get_position().y0 == found.get_position().y0
    names = [[mark.name for mark in marks] for marks in painted]
    assert names == [["cat", "dog"], ["cat .87", "dog .40"]] * 2
    assert [[mark.box for mark in marks] for marks in painted] == [BOXES.tolist()] * 4
    assert all(mark.mask is not None for marks in painted for mark in marks)


def test_pairs_stay_together() -> None:
    """Three pairs in a row of five panels: two pairs, because a pair is never torn apart."""
    fig = show_detections([image()] * 3, [detections()] * 3, [target()] * 3, columns=5)
    lefts = [round(ax.get_position().x0, 6) for ax in fig.axes]
    assert lefts[:2] == lefts[4:] and len(set(lefts)) == 4
    inner = lefts[1] - fig.axes[0].get_position().x1
    outer = lefts[2] - fig.axes[1].get_position().x1
    assert 0 < 2 * inner < outer


def test_low_scores_are_left_out(painted: list[Sequence[Mark]]) -> None:
    fig = show_detections([image()], [detections((0.4, 0.87))], score_threshold=0.5)
    assert [mark.name for mark in painted[0]] == ["1 .87"]
    assert fig.alt_text == "Images with boxes, masks and names: detections ≥ .50: 1."
    named = show_detections([image()], [detections((0.4, 0.87))], titles=["half"])
    assert named.axes[0].get_title("left") == "half: 2 ≥ .30"


@pytest.mark.parametrize(
    ("images", "targets", "said"),
    [
        ([], None, "nothing to show"),
        ([image()] * 2, None, "shorter|longer"),
        ([image()], [], "shorter|longer"),
        ([image(HEIGHT, WIDTH + 1)], None, r"is \(48, 65\).*\(48, 64\)"),
    ],
)
def test_wrong_input_is_refused(images: Any, targets: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        show_detections(images, [detections()][: len(images)], targets)


# ------------------------------------------------------------------------------- data, sample


def test_show_data_takes_records_and_pairs(painted: list[Sequence[Mark]]) -> None:
    one = Target(BOXES[:1], torch.tensor([1]))
    fig = show_data([Record(image(), target(), 7), (image(32, 32), one)], ["cat", "dog"])
    titles = [ax.get_title("left") for ax in fig.axes]
    assert titles == ["2 objects, 64 × 48 px", "1 object, 32 × 32 px"]
    assert [mark.name for mark in painted[0]] == ["cat", "dog"]
    assert "2 objects, 64 × 48 px; 1 object, 32 × 32 px" in fig.alt_text


@pytest.mark.parametrize("side", [32, 528])
def test_kept_tokens_keep_their_colours(side: int) -> None:
    """Tokens 0 and 3 of a red image: red there, grey elsewhere, white lines between them."""
    red = torch.zeros(3, side, side, dtype=torch.uint8)
    red[0] = 255
    cells = side // 16
    fig = show_sample(red, Sample([torch.tensor([0, 3])], (cells, cells)))
    assert fig.axes[0].get_title("left") == f"2 of {cells**2} tokens ({2 / cells**2:.2f})"
    pixels = np.asarray(fig.axes[0].images[0].get_array()).astype(int)
    middles = ((np.arange(cells) + 0.5) * len(pixels) / cells).astype(int)
    tokens = pixels[middles][:, middles].reshape(-1, 3)
    seen = (tokens == [255, 0, 0]).all(1)
    assert np.flatnonzero(seen).tolist() == [0, 3]
    assert np.ptp(tokens[~seen], axis=1).max() == 0  # no colour left
    assert pixels[0].min() > 180


def test_samples_stand_side_by_side_and_padding_is_counted_apart() -> None:
    """A 20 x 30 image has 2 x 2 tokens of its own in a batch of 3 x 4."""
    samples = {"top": Sample([torch.arange(8)], (4, 4)), "one": Sample([torch.tensor([0])], (4, 4))}
    fig = show_sample(image(64, 64), samples)
    titles = [ax.get_title("left") for ax in fig.axes]
    assert titles == ["top: 8 of 16 tokens (0.50)", "one: 1 of 16 tokens (0.06)"]
    assert all(title in fig.alt_text for title in titles)
    sample = Sample([torch.tensor([0]), torch.tensor([1, 5, 2, 11])], (3, 4))
    fig = show_sample(image(20, 30), sample, index=1)
    assert fig.axes[0].get_title("left") == "2 of 4 tokens (0.50) + 2 of padding"
    height, width, _ = np.asarray(fig.axes[0].images[0].get_array()).shape
    assert width / height == pytest.approx(64 / 48, abs=0.01)
    with pytest.raises(ValueError, match="index=2: the sample is one of 2 images"):
        show_sample(image(20, 30), sample, index=2)
    with pytest.raises(ValueError, match=r"\(49, 16\) pixels does not fit a grid of \(3, 4\)"):
        show_sample(image(49, 16), sample)


# ------------------------------------------------------------------------------- odd pictures

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4)
RGBA = np.dstack([GREY, GREY, GREY, GREY])


@pytest.mark.parametrize("kind", [GREY, RGBA, Image.fromarray(GREY), Image.fromarray(RGBA), "path"])
def test_a_picture_is_whatever_predict_takes(kind: Any, tmp_path: Path) -> None:
    if isinstance(kind, str):
        kind = tmp_path / "picture.png"
        Image.fromarray(RGBA).save(kind)
    assert draw.image_size(kind) == (3, 4)
    assert (draw.to_pixels(kind) == GREY[..., None]).all()
    for fig in (
        viz.show_pictures({"one": kind}),
        show_data([(kind, Target(BOXES[:0], torch.tensor([], dtype=torch.long)))], []),
        show_detections([kind], [nothing_found(3, 4)]),
        show_sample(kind, Sample([torch.tensor([0])], (1, 1))),
    ):
        assert fig.axes[0].images[0].get_array().shape[2] == 3


@pytest.mark.parametrize("size", [(1, 5000), (5000, 10), (3000, 4000), (1, 1)])
def test_a_picture_of_any_size_is_shown_as_large_as_the_screen(size: tuple[int, int]) -> None:
    picture = torch.zeros(3, *size, dtype=torch.uint8)
    assert np.shares_memory(draw.to_pixels(picture), picture.numpy())  # a copy would be memory
    assert draw.to_pixels(picture, 400).size <= 3 * 400 * 1600  # a panel's
    maps = draw.heat(torch.zeros(max(1, size[0] // 4), max(1, size[1] // 4)))
    assert draw.enlarged(maps, 320, smooth=False).size <= 3 * 320 * 1280
    panorama = np.zeros((600, 8000, 3), np.uint8)
    assert draw.enlarged(panorama, 300).shape == (68, 900, 3)  # 22 pixels high it would be useless
    assert draw.enlarged(panorama[:, :1200], 300).shape == (150, 300, 3)
    grid = (-(-size[0] // 16), -(-size[1] // 16))
    assert draw.on_tokens(picture, grid).size <= 3 * max(1024, 8 * max(grid)) ** 2
    fig = show_data([(picture, target(masks=False))], ["cat", "dog"])
    shown = fig.axes[0].images[0].get_array().shape
    assert 640 <= max(shown) <= 960 or max(size) < 640
    thin = min(size) * max(shown) / max(size)
    assert min(shown[:2]) == pytest.approx(max(1, thin), abs=1)
    assert len(fig._repr_mimebundle_()[0]["image/jpeg"]) < 2**20


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (image().float(), "uint8.*not torch.float32"),
        (image()[:1], r"not torch.uint8 \(1, 48, 64\)"),
        (image()[None], r"\(1, 3, 48, 64\)"),
        (image().numpy(), r"\(3, H, W\) becomes array.transpose"),
        (image()[:, :0], "0 x 64 pixels"),
        (None, "NoneType: give a path"),
    ],
)
def test_what_is_no_picture_is_refused(picture: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        viz.show_pictures({"one": picture})
    with pytest.raises(ValueError, match=said):
        show_data([(picture, target())], [])


def test_more_pictures_than_a_notebook_holds_are_refused_before_they_are_read() -> None:
    read = []

    def endless() -> Any:
        while True:
            read.append(1)
            yield image(), target()

    with pytest.raises(ValueError, match="more than 200 pictures to show"):
        show_data(endless(), [])
    assert len(read) == 201
    wide = viz.show_bitmaps({str(i): np.eye(3) for i in range(60)})
    assert len(wide.axes) == 60 and wide.axes[0].get_position().width > 0.05


# ------------------------------------------------------------------------------- numbers


def step(number: int, **losses: float) -> dict[str, Any]:
    return {"step": number, "loss": 2.0 / number, "loss_cls": 1.0 / number, **losses}


def evaluation(number: int, box: float | None, mask: float | None = None) -> dict[str, Any]:
    found = {"box": {"AP": box}, "mask": {"AP": mask} if mask else {}}
    return {"step": number, "evaluation": found}


def test_training_curves() -> None:
    rows = [step(n, loss_mask=0.5) for n in range(1, 101)]
    del rows[9]["loss_mask"]  # a gap takes no part in the mean
    rows[50:50] = [evaluation(50, 0.1, 0.08)]
    rows.append(evaluation(100, 0.215, 0.17))
    fig = show_training(rows)
    left, right = fig.axes
    smooth = {line.get_label(): line for line in left.lines if line.get_label()[0] != "_"}
    assert len(left.lines) == 6  # a thin and a thick one each
    assert smooth["mask"].get_ydata().tolist() == pytest.approx([0.5] * 100)
    assert left.get_yscale() == "log" and "mean of 4 steps" in left.get_title("left")
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["mask", "total", "class"]

    curves = {c.get_label(): c.lines[0].get_xydata().tolist() for c in right.containers}
    assert curves == {"box": [[50, 10], [100, 21.5]], "mask": [[50, 8], [100, 17]]}
    assert texts(right) == ["box 21.5", "mask 17.0"]
    assert right.get_ylim()[0] == 0 and right.get_xlim() == left.get_xlim() == (0, 102)
    assert fig.alt_text == (
        "A training run: loss 2.00 at step 1, loss 0.02 at step 100, box AP 21.5 at step 100, "
        "mask AP 17.0 at step 100."
    )
    fig.canvas.draw()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], ["no steps yet", "no evaluation yet"]),
        ([step(1)], ["no evaluation yet"]),
        ([step(1), evaluation(1, None)], ["no evaluation yet"]),
        ([evaluation(1, math.nan)], ["no steps yet", "no evaluation yet"]),
        ([evaluation(1, 0.0)], ["no steps yet", "box 0.0"]),
        ([step(1, loss_rpn_loc=0.0), evaluation(1, 0.01)], ["box 1.0"]),
        ([{"step": 1, "evaluation": {"box": {"AP": -1.0}, "mask": None}}], ["no evaluation yet"]),
    ],
)
def test_training_with_little_to_show(rows: list[dict[str, Any]], said: list[str]) -> None:
    fig = show_training(rows)
    fig.canvas.draw()
    shown = [text for ax in fig.axes for text in (*texts(ax), ax.get_title("left"))]
    assert set(said) <= set(shown)
    assert fig.alt_text


RATIOS = [
    {"sample_ratio": 1.0, "draws": 1, "box_ap": 0.18, "box_ap_sd": 0.0},
    {"sample_ratio": 0.25, "draws": 2, "box_ap": 0.12, "box_ap_sd": 0.01},
]


def test_ratios_have_error_bars() -> None:
    fig = show_ratios(RATIOS)
    (ax,) = fig.axes
    (bars,) = ax.containers
    assert bars.lines[0].get_xydata().tolist() == [[0.25, 12], [1.0, 18]]
    (segments,) = bars.lines[2]
    assert [s[:, 1].tolist() for s in segments.get_segments()] == [[11, 13], [18, 18]]
    assert texts(ax) == ["12.0", "box 18.0"]
    assert ax.get_xticks().tolist() == [0.25, 1.0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.25", "1"]
    assert ax.get_title("left") == "mean ± sd of 2 draws"
    assert ax.get_ylim()[0] == 0 and ax.get_ylim()[1] > 18
    assert "box 12.0 ± 1.0 at 0.25" in fig.alt_text


def test_the_higher_curve_has_its_values_above() -> None:
    rows = [{**row, "mask_ap": row["box_ap"] + 0.01, "mask_ap_sd": 0.0} for row in RATIOS]
    ax = show_ratios(rows).axes[0]
    sides = {text.get_text(): text.get_va() for text in ax.texts}
    assert sides["mask 19.0"] == "bottom" and sides["box 18.0"] == "top"
    assert show_ratios(RATIOS[:1]).axes[0].get_title("left") == ""


# ------------------------------------------------------------------------------- bars


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"stem": nn.Linear(2, 3), "encoder": nn.Linear(3, 3)})
        self.neck = nn.BatchNorm1d(3)


def test_parameters_are_counted_by_part_and_origin() -> None:
    report = LoadReport("file", ["backbone.encoder.weight"], [], [])
    counts = {part: (*own.values(),) for part, own in viz.loaded_by_part(report, Parts()).items()}
    assert counts == {"stem": (0, 9), "encoder": (9, 3), "neck": (0, 6)}
    fig = viz.show_loaded(report, Parts())
    (ax,) = fig.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["stem", "encoder", "neck"]
    assert [text for text in texts(ax) if text] == ["9.0", "3.0", "9.0", "12.0", "6.0"]
    assert ax.get_xlabel() == "parameters" and "encoder 12.0" in fig.alt_text


def test_a_bar_is_as_long_as_its_parts() -> None:
    costs = {"quarter": {"encoder": 1e9, "heads": 30e9}, "all": {"encoder": 6e9, "heads": 30e9}}
    fig = viz.show_stacked(costs, "multiply-adds")
    (ax,) = fig.axes
    bars = [bar for bar in ax.patches if isinstance(bar, Rectangle)]
    ends = {(bar.get_x() / 1e9, (bar.get_x() + bar.get_width()) / 1e9) for bar in bars}
    assert ends == {(0, 1), (1, 31), (0, 6), (6, 36)}
    numbers = ["", "6.0 G", "30.0 G", "30.0 G", "31.0 G", "36.0 G"]  # 1 has no room
    assert texts(ax) == numbers and "quarter 31.0 G, all 36.0 G" in fig.alt_text
    for wrong in ({}, {"a": {}}, {"a": {"x": 1.0}, "b": {"y": 1.0}}):
        with pytest.raises(ValueError, match="the same parts, at least one"):
            viz.show_stacked(wrong, "cost")


# ------------------------------------------------------------------------------- padding, bitmaps


@pytest.mark.parametrize(
    ("batches", "factor"),
    [
        ([[(32, 32), (64, 64)]], 32 / 20),  # 4 tokens and 16, both computed on 64 x 64
        ([[(32, 32)], [(64, 64)]], 1),
        ([[(32, 64), (64, 32)]], 32 / 16),  # height and width grow apart: a canvas of 64 x 64
        ([[(16, 16)]], 4),  # even alone padded to a multiple of 32
    ],
)
def test_padding_factor_by_hand(batches: Any, factor: float) -> None:
    assert viz.padding_factor(batches) == pytest.approx(factor)


def near(fig: Any, colour: tuple[int, int, int]) -> np.ndarray:
    """Which pixels of a figure have about this colour."""
    file = io.BytesIO()
    fig.savefig(file, format="png")
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    return np.abs(pixels - colour).sum(2) < 12


def test_batches_say_their_factor_and_show_padding_and_bitmaps_keep_their_cells() -> None:
    ways = {"mixed": [[(320, 320), (640, 640)]], "sorted": [[(320, 320)], [(640, 640)]]}
    fig = viz.show_batches(ways)
    assert "mixed: 1.60 x; sorted: 1.00 x" in fig.alt_text
    assert [ax.get_title("left") for ax in fig.axes] == ["mixed: 1.60 x", "sorted: 1.00 x"]
    padded = near(fig, (0xE6, 0x9F, 0x00)).mean(1)  # share of each row of pixels
    half = len(padded) // 2
    assert padded[:half].max() > 0.1  # the padding of the mixed batch
    assert padded[half + 30 :].max() == 0  # none in the sorted ones
    plane = torch.zeros(4, 8, dtype=torch.uint8)
    plane[:, :2] = 1
    fig = viz.show_bitmaps({"left quarter": plane, "all": np.ones((4, 4), bool)})
    assert fig.alt_text == "Bitmaps: left quarter: 25% covered; all: 100% covered."
    assert near(fig, (0x00, 0x72, 0xB2)).mean() > 0.2


@pytest.mark.parametrize(
    ("draws", "said"),
    [
        (lambda: show_sample(image(8, 8), {}), "nothing to show"),
        (lambda: viz.show_bitmaps({}), "nothing to show"),
        (lambda: viz.show_batches({}), "nothing to show"),
        (lambda: viz.show_batches({"empty": [[]]}), "at least one picture"),
        (lambda: show_data([], ["cat"]), "nothing to show"),
        (lambda: show_ratios([]), "no rows"),
    ],
)
def test_nothing_to_show(draws: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        draws()


# ------------------------------------------------------------------------------- files, state


def test_files_are_complete_described_and_repeatable(tmp_path: Path) -> None:
    fig = show_ratios(RATIOS)
    png, svg = save_figure(fig, tmp_path / "new" / "ratios.v1.png")
    assert (png.name, svg.name) == ("ratios.v1.png", "ratios.v1.svg")
    assert sorted(p.name for p in png.parent.iterdir()) == ["ratios.v1.png", "ratios.v1.svg"]
    with Image.open(png) as saved:
        assert saved.info["Description"] == fig.alt_text
        assert saved.size == (960, 680)  # twice the size on screen
    assert fig.alt_text in svg.read_text(encoding="utf-8")
    again = save_figure(show_ratios(RATIOS), tmp_path / "ratios")
    assert [p.name for p in again] == ["ratios.png", "ratios.svg"]
    for first, second in zip((png, svg), again, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_a_notebook_gets_a_picture_with_alt_text() -> None:
    for fig, kind, start in (
        (show_ratios(RATIOS), "image/png", b"\x89PNG"),
        (show_data([(image(), target())], []), "image/jpeg", b"\xff\xd8"),
    ):
        data, metadata = fig._repr_mimebundle_(include=None, exclude=None)
        assert set(data) == {kind, "text/plain"}
        assert data[kind].startswith(start)
        assert metadata == {kind: {"alt": fig.alt_text}}


def test_no_pyplot_and_no_settings_changed() -> None:
    code = """
        import matplotlib, sys, tempfile, torch
        before = matplotlib.rcParams.copy()
        from mimdet.structures import Detections
        from mimdet.models.sampling import Sample
        from mimdet import viz as f
        image = torch.zeros(3, 32, 32, dtype=torch.uint8)
        nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), (32, 32))
        figs = [
            f.show_detections([image], [nothing]),
            f.show_sample(image, Sample([torch.tensor([1])], (2, 2))),
            f.show_training([{"step": 1, "loss": 1.0}]),
        ]
        with tempfile.TemporaryDirectory() as folder:
            for fig in figs:
                f.save_figure(fig, folder + "/a")
        assert not {"matplotlib.pyplot", "IPython"} & set(sys.modules)
        assert matplotlib.rcParams.copy() == before
        import matplotlib.pyplot as plt
        assert plt.get_fignums() == []
        """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_figure_and_panel_is_had_from_viz() -> None:
    pytest.importorskip("ipywidgets")
    assert all(callable(getattr(viz, name)) for name in viz.__all__)
    assert "show_sample" in dir(viz)
    with pytest.raises(AttributeError, match=r"no 'show_nothing'; its .*TokenLab"):
        _ = viz.show_nothing


def test_stages_from_anchors_to_the_truth(painted: list[Sequence[Mark]]) -> None:
    torch.manual_seed(0)
    model = mimdet.build_detector(small())
    fig = show_stages(model, Record(image(), target(), 7), score_threshold=0.0)
    anchors, proposals, found, truth = (list(marks) for marks in painted)
    assert len(anchors) == 5 * model.rpn.anchors.per_place and len(proposals) == 8
    assert f"3 detections ≥ .00: {len(found)}; 4 truth: 2." in fig.alt_text
    assert [list(mark.box) for mark in truth] == BOXES.tolist()
    assert all(mark.name.startswith("IoU ") for mark in truth)
    middles = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (mark.box for mark in anchors)]
    assert all(abs(x - WIDTH / 2) <= 32 and abs(y - HEIGHT / 2) <= 32 for x, y in middles)
    with pytest.raises(ValueError, match="without objects"):
        show_stages(model, Record(image(), Target(BOXES[:0], torch.tensor([]).long()), 7))
