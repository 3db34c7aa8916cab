"""Cases of whole models and commands: steps, start-up, plans against runs, memory over time."""

import copy
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from mimdet.analysis.cost import multiply_adds
from mimdet.analysis.evaluate import evaluate
from mimdet.config import Config, save_config
from mimdet.data.loader import Plan, TrainLoader
from mimdet.data.shapes import ShapesCOCO
from mimdet.files import read_json
from mimdet.inference import predict
from mimdet.models.detector import Detector, build_detector, compile_parts
from mimdet.models.sampling import Sampling
from mimdet.presets import mimdet_base, tiny
from mimdet.structures import Record
from mimdet.training.checkpoints import MetricsFile
from mimdet.training.profile import profile
from tools.bench.cases import interleaved, row

FAST = ("--evaluate-every", "0", "--shapes-val", "4", "--checkpoint-every-steps", "1000000")


def losses(model: Detector, records: list[Record], sampling: Sampling) -> Tensor:
    """One step's forward and backward pass; -> its losses, added up."""
    torch.manual_seed(0)
    images, targets = [r.image for r in records], [r.target for r in records]
    total = sum(model(images, targets, sampling=sampling).values(), torch.zeros(()))
    total.backward()
    model.zero_grad()
    return total.detach()


def peers(repeats: int) -> list[dict[str, Any]]:
    """ViT-B at 640 x 640, training and finding, against torchvision's Mask R-CNN R50-FPN v2; and
    against itself at ratio 1."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

    from mimdet.structures import crops_to_bitmaps

    record = ShapesCOCO("shapes-v2-medium", size=640, length=1, split="train")[0]
    cfg = mimdet_base()
    cfg.detector.num_classes = 12
    model = build_detector(cfg).train()
    other = maskrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=13, min_size=640, max_size=640
    ).train()
    assert record.target.masks is not None
    masks = crops_to_bitmaps(record.target.masks, *record.image.shape[1:])
    theirs = {"boxes": record.target.boxes, "labels": record.target.labels + 1, "masks": masks}
    image = record.image.float() / 255

    def step() -> None:
        sum(other([image], [theirs]).values()).backward()
        other.zero_grad()

    sides: dict[str, Callable[[], Any]] = {
        f"ratio {r:g}": partial(losses, model, [record], Sampling(r)) for r in (1.0, 0.5, 0.25)
    }
    sides = {"R50-FPN v2": step, **sides}
    counted = {name: multiply_adds(side) for name, side in sides.items()}
    seconds, _ = interleaved(sides, repeats)
    rows = []
    told = "other models, of {:.2f} times the multiply-adds"
    for ratio, goal in ((0.5, 1.25), (0.25, 1.05)):
        name = f"ratio {ratio:g}"
        times = {side: seconds[side] for side in ("R50-FPN v2", name)}
        what, share = f"step at {ratio:g} against R50-FPN v2, 640 x 640", times[name]
        equal = told.format(counted[name] / counted["R50-FPN v2"])
        rows.append(row(what, times, share / seconds["R50-FPN v2"], goal, equal, most=True))
        gain, ideal = seconds["ratio 1"] / share, counted["ratio 1"] / counted[name]
        times = {side: seconds[side] for side in ("ratio 1", name)}
        what = f"whole step at {ratio:g}: {gain:.2f}x of an ideal {ideal:.2f}x"
        rows.append(row(what, times, gain / ideal, 0.95, "multiply-adds of the same step"))
    model.eval(), other.eval()
    sides = {
        f"ratio {r:g}": partial(model.detect, [record.image], sampling=Sampling(r))
        for r in (1.0, 0.5)
    }
    with torch.no_grad():
        sides = {"R50-FPN v2": partial(other, [image]), **sides}
        counted = {name: multiply_adds(side) for name, side in sides.items()}
        seconds, _ = interleaved(sides, repeats)
    for name, goal in (("ratio 1", 1.65), ("ratio 0.5", 1.2)):
        times = {side: seconds[side] for side in ("R50-FPN v2", name)}
        share, what = times[name] / times["R50-FPN v2"], f"finding at {name[6:]} against R50-FPN v2"
        equal = told.format(counted[name] / counted["R50-FPN v2"])
        rows.append(row(f"{what}, 640 x 640", times, share, goal, equal, most=True))
    return rows


def beside(repeats: int) -> list[dict[str, Any]]:
    """What evaluating adds to finding, with ViT-B and 100 objects an image: run lengths are made
    by another process meanwhile."""
    torch.manual_seed(0)
    cfg = mimdet_base()
    cfg.detector.num_classes, cfg.data.test_short_side = 12, 640
    model, data = build_detector(cfg).eval(), ShapesCOCO("shapes-v2-medium", size=640, length=4)
    images = [data.image(i) for i in range(len(data))]
    spent: dict[str, list[float]] = {"finding": [], "evaluating": []}
    for _ in range(repeats):
        for name in spent:
            begin = time.process_time()
            if name == "finding":
                for image in images:
                    predict(model, image)
            else:
                found = len(evaluate(model, data, batch_size=1, workers=1).results)
            spent[name].append(time.process_time() - begin)
    seconds = {name: min(times) for name, times in spent.items()}
    more = seconds["evaluating"] / seconds["finding"] - 1
    told = f"{found / len(images):.0f} objects an image; least of {repeats}"
    return [row("evaluating beside finding: share more", seconds, more, 0.03, told, most=True)]


def padding(repeats: int) -> list[dict[str, Any]]:
    """Tokens of batches of 16 to those of the same images, each padded to 32 alone."""

    class Sizes(list[tuple[int, int]]):
        def image_size(self, index: int) -> tuple[int, int]:
            return self[index]

    sizes = Sizes([(480, 640), (640, 427), (426, 640), (640, 640)] * 400)  # the commonest of COCO
    plan = Plan(sizes, mimdet_base().data, 16, 1, 0)
    computed = own = 0
    for step in range(len(sizes) // 16):
        for batch in plan.micro_batches(step):
            own += sum(math.prod(plan.padded([item])) for item in batch)
            computed += len(batch) * math.prod(plan.padded(batch))
    what = "tokens of batches of 16 to those of images padded alone"
    return [row(what, {}, computed / own, 1.25, f"{len(sizes):,} images", most=True)]


def two_processes(repeats: int) -> list[dict[str, Any]]:
    """Wall seconds of a step of `tiny` by one process and by two, of the same four images; with
    batch norm, whose statistics are exchanged 22 times a step, and with group norm. By AdamW:
    Muon's update is repeated by each process."""
    several = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    made = []
    for norm in ("BN", "GN"):
        taken, first = {"one process": math.inf, "two": math.inf}, {}
        for name, count, start in (("one process", 1, ()), ("two", 2, several)) * repeats:
            with tempfile.TemporaryDirectory() as folder:
                run = Path(folder, "run")
                words = ["tiny", str(run), "--steps", "40", "--workers", "0", "--threads", "1"]
                words += ["--batch-size", str(4 // count), "--accumulate", str(count), *FAST]
                words += ["--optimizer", "adamw"]
                command = [sys.executable, "-m", *start, "mimdet", "train", *words, "--norm", norm]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                subprocess.run(command, check=True, env=environment, capture_output=True)
                rows = [r for r in MetricsFile(run / "metrics.jsonl").read() if "loss" in r]
            times = sorted(r["time"]["seconds"] for r in rows[2:])
            taken[name] = min(taken[name], times[len(times) // 2])
            first[name] = rows[0]["loss"]
        difference = abs(first["two"] / first["one process"] - 1)
        equal = f"first loss differs by {difference:.0e} of it; equality: test_processes.py"
        what = f"step of `tiny` ({norm}) by two processes to one, wall"
        made.append(row(what, taken, taken["two"] / taken["one process"], 0.6, equal, most=True))
    return made


def original(repeats: int) -> list[dict[str, Any]]:
    """A step of ViT-B at 512 x 768 against the original's way: maps of attention, recomputation."""
    torch.manual_seed(0)
    cfg = mimdet_base()
    cfg.detector.num_classes, cfg.backbone.drop_path = 12, 0.0
    model = build_detector(cfg).train()
    scene = ShapesCOCO("shapes-v2-medium", size=768, length=1, split="train")[0]
    inside = scene.target.boxes[:, 3] <= 512
    target = copy.copy(scene.target)
    target.boxes, target.labels = target.boxes[inside], target.labels[inside]
    assert target.masks is not None
    target.masks = target.masks[inside]
    records = [Record(scene.image[:, :512], target, 0)]
    sides = {"kit": "off", "original": "on", "original, without recomputation": "off"}

    parts: tuple[Any, ...] = (model.backbone.encoder, model.backbone.decoder)

    def step(name: str) -> Tensor:
        for part in parts:
            part.checkpointing = sides[name]
            for block in part.blocks:
                block.attn.fused_attn = name == "kit"
        return losses(model, records, Sampling(0.5, keep="padded"))

    seconds, found = interleaved({name: partial(step, name) for name in sides}, repeats)
    error = max(abs(float(value - found["kit"])) for value in found.values())
    equal = f"loss, largest difference {error:.0e} of {float(found['kit']):.2f}"
    return [
        row(
            f"step against the {name}, 512 x 768",
            {"kit": seconds["kit"], name: seconds[name]},
            seconds[name] / seconds["kit"],
            goal,
            equal,
        )
        for name, goal in (("original", 1.5), ("original, without recomputation", 1.25))
    ]


def tiny_step(repeats: int) -> list[dict[str, Any]]:
    """A step of `tiny`, four scenes of 128 pixels: seconds, and where they go."""
    found = profile(tiny(), max(3, repeats))
    computing = sum(part.seconds for part in found.parts if part.name != "loading")
    seconds = {part.name: part.seconds for part in found.parts}
    own = row("step of `tiny`, ms", seconds, 1000 * computing, 300, "one side only", most=True)
    return [own | {"share_of_peak": round(found.share_of_peak(), 3)}]


def compiled(repeats: int) -> list[dict[str, Any]]:
    """A step of `tiny` with `training.compile`, in fp32: speed-up, equality, seconds to compile."""
    cfg = tiny()
    cfg.detector.num_classes, cfg.backbone.drop_path = 12, 0.0
    models = {name: build_detector(cfg).train() for name in ("eager", "compiled")}
    models["compiled"].load_state_dict(models["eager"].state_dict())
    compile_parts(models["compiled"])
    data = ShapesCOCO("shapes-v1-medium", size=128, length=8, split="train")
    records = [data[i] for i in range(4)]
    begin = time.process_time()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    losses(models["compiled"], records, Sampling(0.5))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = time.process_time() - begin + after.ru_utime - before.ru_utime
    sides = {n: partial(losses, m, records, Sampling(0.5)) for n, m in models.items()}
    seconds, found = interleaved(sides, 2 * repeats)
    error = abs(float(found["compiled"] - found["eager"]))
    equal = f"loss, difference {error:.0e} of {float(found['eager']):.2f}"
    own = row("compiled step of `tiny`", seconds, seconds["eager"] / seconds["compiled"], 1, equal)
    return [own | {"first_step_cpu_seconds": round(took, 1)}]


# ------------------------------------------------------------------------------- commands


def children(words: list[str]) -> float:
    """CPU seconds of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words], check=True, env=environment, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def start(repeats: int) -> list[dict[str, Any]]:
    """`mimdet predict tiny photo` against `import torch`, whole processes."""
    from PIL import Image

    both = "import torch, torchvision"
    spent: dict[str, list[float]] = {"import torch": [], both: [], "mimdet predict": []}
    with tempfile.TemporaryDirectory() as folder:
        scene = ShapesCOCO("shapes-v1-medium", size=128, length=1)[0].image
        Image.fromarray(scene.permute(1, 2, 0).numpy()).save(Path(folder, "photo.png"))
        words = ["-m", "mimdet", "predict", "tiny", f"{folder}/photo.png", "--out", folder]
        for _ in range(repeats):
            for name in ("import torch", both):
                spent[name].append(children(["-c", name]))
            spent["mimdet predict"].append(children(words))
        found = len(read_json(Path(folder, "annotations.json"))["annotations"])
    seconds = {name: min(times) for name, times in spent.items()}
    ratio = seconds["mimdet predict"] / seconds["import torch"]
    equal = f"{found} detections in its json"
    return [row("`mimdet predict`, a photo", seconds, ratio, 2.0, equal, most=True)]


PLAN = """
import sys
from dataclasses import asdict
from mimdet.config import from_dict
from mimdet.files import read_json, write_json
from mimdet.training.plan import forecast
cfg = from_dict(read_json(sys.argv[1]))
found = forecast(cfg, ratios=(cfg.backbone.sample_ratio,), steps=int(sys.argv[2]))
write_json(sys.argv[3], asdict(found.paces[0]))
"""


def against_a_run(cfg: Config, words: list[str], steps: int, measured: int) -> list[dict[str, Any]]:
    """What `forecast` says of a recipe, and what training it for `steps` steps then takes."""
    with tempfile.TemporaryDirectory() as folder:
        config, pace = Path(folder, "config.json"), Path(folder, "pace.json")
        save_config(cfg, config)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", PLAN, str(config), str(measured), str(pace)]
        subprocess.run(command, check=True, env=environment)
        plan, run = read_json(pace), Path(folder, "run")
        command = [sys.executable, "-m", "mimdet", "train", *words[:1], str(run), *words[1:], *FAST]
        training = subprocess.Popen(
            [*command, "--steps", str(steps)], env=environment, stdout=subprocess.DEVNULL
        )
        rows = MetricsFile(run / "metrics.jsonl")
        peak, process = 0, psutil.Process(training.pid)
        while training.poll() is None:
            done = len(rows.read()) if (run / "metrics.jsonl").exists() else 0
            if done < steps:  # then come the evaluation and the last checkpoint
                peak = max(peak, process.memory_info().rss)
            time.sleep(0.05)
        taken = [line["time"] for line in rows.read() if "loss" in line][1:]
    cpu = sum(time["cpu_seconds"] for time in taken) / len(taken)
    wall = sum(time["seconds"] for time in taken) / len(taken)
    what = f"plan of `{cfg.preset}` against a run of {steps} steps"
    memory = f"peak memory planned {plan['peak'] / 1e9:.2f} GB, seen {peak / 1e9:.2f} GB"
    sides = {
        "time": ("s", plan["step_seconds"], wall),
        "CPU time": ("CPU s", plan["cpu_seconds"], cpu),
    }
    made = []
    for name, (unit, planned, seen) in sides.items():
        seconds = {f"planned {unit} a step": planned, f"{unit} a step": seen}
        error = abs(planned / seen - 1)
        made.append(row(f"{what}: error of the {name}", seconds, error, 0.15, "-", most=True))
    error = abs(plan["peak"] / peak - 1)
    return [*made, row(f"{what}: error of the memory", {}, error, 0.10, memory, most=True)]


def plan_tiny(repeats: int) -> list[dict[str, Any]]:
    """What `plan` says of `tiny`, against 200 steps of it."""
    cfg = tiny()
    cfg.data.workers = 0
    return against_a_run(cfg, ["tiny", "--workers", "0"], 200, 6)


def plan_base(repeats: int) -> list[dict[str, Any]]:
    """What `plan` says of `mimdet_base` on an image of 384 pixels a step, against 20 steps."""
    cfg = mimdet_base()
    words = ["--init-from", "random", "--source", "shapes", "--shapes-level", "shapes-v2-medium"]
    words += ["--shapes-size", "384", "--short-sides", "384", "--augment", "multiscale"]
    words += ["--batch-size", "1", "--accumulate", "1", "--workers", "0"]
    words += ["--test-short-side", "384"]
    cfg.training.init_from, cfg.data.source = "random", "shapes"
    cfg.data.shapes_level, cfg.data.shapes_size = "shapes-v2-medium", 384
    cfg.data.short_sides, cfg.data.augment, cfg.data.workers = (384,), "multiscale", 0
    cfg.training.batch_size = cfg.training.accumulate = 1
    return against_a_run(cfg, ["mimdet_base", *words], 20, 3)


# ------------------------------------------------------------------------------- over time


def growth_of(samples: list[int]) -> float:
    """MB by which the second half of the samples, in bytes, lies above the first, in the mean."""
    half = len(samples) // 2
    return (sum(samples[half:]) / (len(samples) - half) - sum(samples[:half]) / half) / 1e6


def memory(repeats: int) -> list[dict[str, Any]]:
    """What three epochs of 20,000 records through 4 workers leave behind, and 2,000 predictions."""
    cfg = tiny()
    data, process = ShapesCOCO("shapes-v1-easy", size=32, length=20_000), psutil.Process()
    cfg.data.short_sides, cfg.data.augment, cfg.data.shapes_size = (32,), "none", 32
    loader = TrainLoader(data, cfg.data, 25, 4, 0, workers=4)
    seen: list[int] = []

    def family() -> int:  # what is shared is counted once
        members = [process, *process.children(recursive=True)]
        return sum(member.memory_full_info().uss for member in members)

    for number, _ in enumerate(loader.batches(0, 600)):
        if number % 20 == 19:
            seen.append(family())
    rows = [over_time("loading 3 epochs of 20,000 records with 4 workers", seen[3:])]
    model = build_detector(cfg).eval()
    images = [data[i].image for i in range(50)]
    seen = []
    for number in range(2_000):
        predict(model, images[number % len(images)])
        if number % 50 == 49:
            seen.append(family())
    return [*rows, over_time("predicting 2,000 images", seen[4:])]


def over_time(what: str, seen: list[int]) -> dict[str, Any]:
    told = f"{seen[0] / 1e6:.0f} MB at first, {seen[-1] / 1e6:.0f} MB at last"
    return row(f"{what}: MB more", {}, growth_of(seen), 20, told, most=True)


CASES = (
    *(peers, beside, original, tiny_step, compiled, two_processes),
    *(start, plan_tiny, plan_base, padding, memory),
)
