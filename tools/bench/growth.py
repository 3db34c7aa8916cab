"""How the time of a training step of `tiny` grows with what it is given; figures and a picture.

    python -m tools.bench.growth       # notebooks/results/growth.json, growth.png

CPU seconds of one thread, forward and backward in float32, the median of --repeats after one that
warms up; in every curve one thing changes. The exponent is that between the last two points, where
fixed costs weigh least.
"""

import argparse
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mimdet.data.shapes import ShapesCOCO
from mimdet.experiments.results import hardware_text
from mimdet.files import read_json, write_json
from mimdet.models.detector import Detector, build_detector
from mimdet.models.sampling import Sampling
from mimdet.presets import tiny
from mimdet.structures import Crops, Record, Target
from mimdet.viz import new_figure, save_figure
from mimdet.viz.style import BLUE, WIDTH, axes_of, write_beside
from tools.bench.cases import interleaved
from tools.bench.whole import losses

RESULTS = Path(__file__).resolve().parents[2] / "notebooks" / "results"
CURVES = {
    "pixels of an image": [128**2, 192**2, 256**2, 384**2],
    "tokens kept": [32, 64, 128, 256],
    "objects in an image": [4, 16, 64, 256],
    "classes": [10, 80, 365, 1203],
    "images of a batch": [1, 2, 4, 8],
}
EXPECTED = {
    "pixels of an image": "convolutions 1, attention 2",
    "tokens kept": "0 to 1: the encoder alone",
    "objects in an image": "0 to 1: RoIs of objects, up to a quarter",
    "classes": "0 to 1: last layers",
    "images of a batch": "1",
}


def model_of(classes: int = 12) -> Detector:
    torch.manual_seed(0)
    cfg = tiny()
    cfg.detector.num_classes = classes
    return build_detector(cfg).train()


def scene(side: int, index: int = 0) -> Record:
    return ShapesCOCO("shapes-v2-medium", size=side, length=8, split="train")[index]


def crowded(count: int) -> Record:
    """A scene with so many small objects."""
    record, generator = scene(256), torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=generator) * 232
    boxes = torch.cat([corner, corner + 8 + 16 * torch.rand(count, 2, generator=generator)], 1)
    masks = Crops(boxes, torch.ones(count, 28, 28, dtype=torch.uint8))
    return Record(record.image, Target(boxes, torch.arange(count) % 12, masks), 0)


def sides_of(name: str) -> dict[str, Any]:
    """Value -> the step to be timed."""
    half, values = Sampling(0.5), CURVES[name]
    steps: list[Any]
    if name == "pixels of an image":
        steps = [partial(losses, model_of(), [scene(math.isqrt(v))], half) for v in values]
    elif name == "tokens kept":
        record = scene(256)
        steps = [partial(losses, model_of(), [record], Sampling(v / 256)) for v in values]
    elif name == "objects in an image":
        steps = [partial(losses, model_of(), [crowded(v)], half) for v in values]
    elif name == "classes":
        record = scene(128)
        steps = [partial(losses, model_of(v), [record], half) for v in values]
    else:
        scenes = [scene(128, i) for i in range(max(values))]
        steps = [partial(losses, model_of(), scenes[:v], half) for v in values]
    return {str(value): step for value, step in zip(values, steps, strict=True)}


def exponent(curve: dict[str, float]) -> float:
    (x0, y0), (x1, y1) = [(float(x), y) for x, y in curve.items()][-2:]
    return math.log(y1 / y0) / math.log(x1 / x0)


def draw(curves: dict[str, dict[str, float]]) -> None:
    fig = new_figure(WIDTH, 2.9)
    for place, (name, curve) in enumerate(curves.items(), 1):
        label = "CPU ms of a step" if place == 1 else ""
        ax = axes_of(fig, place, len(curves), name, "", label, "both")
        x, y = [float(value) for value in curve], [1000 * seconds for seconds in curve.values()]
        ax.plot(x, y, "o-", color=BLUE, linewidth=1.6, markersize=4)
        ax.set(xscale="log", yscale="log", ylim=(50, 600))
        ax.minorticks_off()
        ax.set_xticks([x[0], x[-1]], [f"{x[0]:,.0f}", f"{x[-1]:,.0f}"])
        ax.set_yticks(ticks := (50, 100, 200, 400), map(str, ticks))
        write_beside(ax, f"exponent {exponent(curve):.2f}", (x[0], 500), (2, 0))
    said = ", ".join(f"{name} {exponent(curve):.2f}" for name, curve in curves.items())
    figure = fig.finish(f"Time of a step, logarithmic axes; exponents: {said}.")
    _, vector = save_figure(figure, RESULTS / "growth")
    vector.unlink()  # the page shows the other one


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--draw", action="store_true", help="only the picture, of what is stored")
    options = parser.parse_args()
    file = RESULTS / "growth.json"
    if not options.draw:
        torch.set_num_threads(1)
        load = os.getloadavg()[0]
        curves = {name: interleaved(sides_of(name), options.repeats)[0] for name in CURVES}
        about = {"command": "python -m tools.bench.growth", "repeats": options.repeats}
        about |= {"torch": torch.__version__, "hardware": hardware_text([]), "threads": 1}
        about["load"] = [round(load, 1), round(os.getloadavg()[0], 1)]
        exponents = {name: round(exponent(curve), 2) for name, curve in curves.items()}
        rounded = {n: {x: round(y, 4) for x, y in curve.items()} for n, curve in curves.items()}
        stored = about | {"curves": rounded, "exponents": exponents, "expected": EXPECTED}
        write_json(file, stored)
    draw(read_json(file)["curves"])
    print(read_json(file)["exponents"])


if __name__ == "__main__":
    main()
