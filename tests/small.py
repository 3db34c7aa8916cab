"""A configuration that trains in seconds with every part of the real one, and what it leaves."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor

from mimdet import presets
from mimdet.config import Config, PretrainConfig
from mimdet.models.detector import Detector, build_detector
from mimdet.models.mae import MAE
from mimdet.structures import Detections
from mimdet.training.run import CheckpointStore, MetricsFile

WORDS = (
    "--embed-dim 32 --depth 1 --num-heads 2 --decoder-dim 32 --decoder-depth 1 --decoder-heads 2 "
    "--channels 16 --box-fc-dim 32 --short-sides 64 --test-short-side 64"
).split()
"""A detector of seconds, for the command `mimdet train tiny`."""


def small(steps: int = 4) -> Config:
    """A training of a few seconds with every part of the real one."""
    cfg = presets.tiny()
    cfg.backbone.embed_dim = 32
    cfg.backbone.depth = 2
    cfg.backbone.drop_path = 0.2
    cfg.backbone.num_heads = 2
    cfg.backbone.decoder_dim = 32
    cfg.backbone.decoder_depth = 1
    cfg.backbone.decoder_heads = 2
    cfg.backbone.decoder_fill = "stem"
    cfg.detector.channels = 16
    cfg.detector.box_fc_dim = 32
    cfg.data.shapes_level, cfg.data.shapes_size = "shapes-v1-medium", 64
    cfg.data.short_sides = (64, 96)
    cfg.data.test_short_side = 64
    cfg.data.shapes_train = 10
    cfg.data.shapes_val = 3
    cfg.training.steps = steps
    cfg.training.batch_size = 2
    cfg.training.accumulate = 2
    cfg.training.warmup_steps = 2
    cfg.training.checkpoint_every_steps = 2
    cfg.training.evaluate_every_steps = 3
    cfg.training.keep_checkpoints = 9
    return cfg


def small_mae(steps: int = 4) -> PretrainConfig:
    """An autoencoder that `small()` can start from."""
    cfg = presets.tiny_mae()
    cfg.mae.image_size, cfg.mae.embed_dim, cfg.mae.depth, cfg.mae.num_heads = 64, 32, 2, 2
    cfg.mae.decoder_dim, cfg.mae.decoder_depth, cfg.mae.decoder_heads = 32, 2, 2
    cfg.data.shapes_size, cfg.data.held_out = 64, 7
    cfg.training.steps, cfg.training.batch_size, cfg.training.accumulate = steps, 4, 2
    cfg.training.warmup_steps, cfg.training.evaluate_every_steps = 1, 3
    cfg.training.reference_batch = 8
    cfg.training.checkpoint_every_steps, cfg.training.keep_checkpoints = 2, 9
    return cfg


def little_mae(side: int = 64, patch: int = 16, **options: Any) -> MAE:
    """An untrained autoencoder of two blocks and one."""
    torch.manual_seed(0)
    sizes = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
    return MAE(side, patch, 32, 2, 2, **sizes | options).eval()


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    """An image of noise, (3, height, width) uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def small_detector() -> Detector:
    """An untrained one of `small()`: sure of nothing, so every detection counts."""
    torch.manual_seed(3)
    cfg = small()
    cfg.detector.score_threshold = 0.0
    return build_detector(cfg).eval()


def gated(tokens, grid, generator):
    """The random sampler; it waits in the fourth step, of 4 images, while the file is there."""
    import os
    import time

    gated.calls = getattr(gated, "calls", 0) + 1
    while gated.calls > 12 and os.path.exists(os.environ["MIMDET_TEST_GATE"]):
        time.sleep(0.01)
    return torch.rand(len(tokens), generator=generator)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run without their times."""
    rows = MetricsFile(run / "metrics.jsonl").read()
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]


def weights_of(run: Path) -> dict[str, Tensor]:
    """Those of the last checkpoint."""
    last = CheckpointStore(run / "checkpoints").load_last()
    assert last is not None
    return last.weights


def state_of(run: Path) -> dict[str, Tensor]:
    """Every tensor of the last checkpoint."""
    last = CheckpointStore(run / "checkpoints").load_last()
    assert last is not None
    tensors = dict(last.weights)
    for number, values in last.optimizer["optimizer"]["state"].items():
        numbers = {name: torch.as_tensor(value) for name, value in values.items()}
        tensors |= {f"optimizer.{number}.{name}": value for name, value in numbers.items()}
    return tensors


def assert_same_end(run: Path, other: Path) -> None:
    """Two trainings left the same numbers, bit for bit."""
    assert rows_of(run) == rows_of(other)
    ours, theirs = state_of(run), state_of(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def start(words: list[str], stderr: int = subprocess.STDOUT) -> subprocess.Popen[str]:
    """`python -m` these words, with one thread, in a session of its own."""
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": subprocess.PIPE}
    options |= {"stderr": stderr, "text": True, "start_new_session": True}
    return subprocess.Popen([sys.executable, "-m", *words], **options)


def ended(process: subprocess.Popen[str], seconds: float) -> tuple[str, str]:
    """What it printed, and on stderr; fails where it is not over in time."""
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its processes, within 30 s
        process.wait()
        raise


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not in {seconds} s"
        time.sleep(0.02)


def write_coco(
    folder: Path, boxes: list[list[list[int]]], size: tuple[int, int] = (64, 64)
) -> Path:
    """Noise 1.png, 2.png, ... in `folder`/images and annotations.json; the annotations' path.

    boxes: for every image its objects (x, y, w, h), filled rectangles of category 7, "cell".
    size: width and height.
    """
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    images, objects = [], []
    for image_id, its_boxes in enumerate(boxes, start=1):
        file_name = f"{image_id}.png"
        pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / file_name)
        images.append({"id": image_id, "file_name": file_name, "width": size[0], "height": size[1]})
        for x, y, w, h in its_boxes:
            outline = [x, y, x + w, y, x + w, y + h, x, y + h]
            thing = {"id": len(objects) + 1, "image_id": image_id, "category_id": 7}
            thing |= {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            objects.append(thing | {"segmentation": [outline]})
    data = {"images": images, "annotations": objects, "categories": [{"id": 7, "name": "cell"}]}
    file = folder / "annotations.json"
    file.write_text(json.dumps(data))
    return file


def nothing_found(height: int, width: int) -> Detections:
    """No object in an image of this size, with a mask head."""
    no_labels = torch.zeros(0, dtype=torch.long)
    return Detections(
        torch.zeros(0, 4), torch.zeros(0), no_labels, (height, width), torch.zeros(0, 28, 28)
    )


def still_running(processes: Iterable[psutil.Process], seconds: float = 10) -> list[psutil.Process]:
    """Those that have not ended after some seconds. A zombie has: whoever inherits an orphan reaps
    it when it likes."""

    def runs(process: psutil.Process) -> bool:
        try:
            return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    end = time.monotonic() + seconds
    while running := [process for process in processes if runs(process)]:
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    return running
