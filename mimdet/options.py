"""The options of every `mimdet` command: a dataclass each, whose docstrings are the help."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import Positional

from mimdet.config import Config, PretrainConfig


@dataclass
class Train:
    """Train a detector; the same command resumes an interrupted run exactly.

    Ctrl-C or SIGTERM saves and exits. Progress goes to the screen, every number to
    RUN/metrics.jsonl, weights to RUN/checkpoints.
    """

    run: Positional[str]
    """Directory of the run, for example runs/nuclei."""
    config: Config = field(default_factory=Config)


@dataclass
class Resume:
    """Train in a run's folder, or go on there, with the configuration that stands in it.

    No other option is needed; a run that is complete is left as it is. Runs that were started in a
    notebook go on in a terminal this way.
    """

    run: Positional[str]
    """Directory of the run, of a detector or of an autoencoder."""
    trust_code: bool = False
    """Execute a sampler or stem that was written in a notebook and is stored in the run."""


@dataclass
class Pretrain:
    """Pre-train a masked autoencoder; the same command resumes an interrupted run exactly.

    Writes RUN/metrics.jsonl, a picture of reconstructions at every evaluation and, for
    `mimdet train PRESET RUN2 --init-from RUN`, RUN/mae.safetensors.
    """

    run: Positional[str]
    """Directory of the run, for example runs/mae."""
    config: PretrainConfig = field(default_factory=PretrainConfig)


@dataclass
class Evaluate:
    """COCO box and mask metrics of a trained run, at any list of sample ratios.

    Below ratio 1 the tokens are drawn at random, so the mean and the standard deviation over
    --draws samplings are given. Writes evaluation.json and, at the last ratio, predictions.json in
    COCO results format.
    """

    run: Positional[str]
    """Directory of the run, or a released MIMDet file (.pth)."""
    ratios: tuple[float, ...] = (1.0,)
    """Shares of the tokens the encoder sees, for example 0.25 0.5 1."""
    draws: int = 2
    """Samplings per ratio below 1."""
    checkpoint: str = "last"
    """`last`, `best` or a step number."""
    limit: int = 0
    """Evaluate the first N images only; 0 = all."""
    val_json: str = ""
    """Another annotation file than the run's own."""
    val_images: str = ""
    """Its image folder."""
    out: str = ""
    """Folder for the results; default: the run, a folder in it for other data or weights than its
    own, or for a file a folder of its name beside it."""
    reuse: bool = False
    """Take ratio 1 from the training's own last evaluation, if that was of these weights, instead
    of measuring it again. Predictions are then saved only if the last ratio was measured."""
    batch_size: int = 4
    device: str = "auto"
    trust_code: bool = False
    """Execute a sampler or stem that was written in a notebook and is stored in the run."""

    def folder(self) -> Path:
        """Where the results go: `mimdet errors` reads those in the run against all of its data."""
        run = Path(self.run)
        if self.out or not run.is_dir():
            return Path(self.out) if self.out else run.with_suffix("")
        special = [f"limit{self.limit}"] if self.limit else []
        special += [Path(self.val_json).stem] if self.val_json else []
        special += ["other-images"] if self.val_images and not self.val_json else []
        special += [self.checkpoint] if self.checkpoint != "last" else []
        return run / "-".join(["evaluation", *special]) if special else run


@dataclass
class Predict:
    """Detect objects in image files; writes one json and one picture per image."""

    run: Positional[str]
    """Directory of the run, or a released MIMDet file (.pth)."""
    images: Positional[tuple[str, ...]]
    """Image files."""
    out: str = "predictions"
    """Folder for the results."""
    sample_ratio: float = 1.0
    """Share of the tokens the encoder sees."""
    score: float = 0.3
    """Draw detections with at least this score (the json holds all)."""
    checkpoint: str = "last"
    device: str = "auto"
    seed: int = 0
    trust_code: bool = False
    """Execute a sampler or stem that was written in a notebook and is stored in the run."""

    def places(self) -> dict[Path, Path]:
        """Image -> what is written of it, without suffix. ValueError for two of the same name."""
        found: dict[Path, Path] = {}
        for image in map(Path, self.images):
            place = Path(self.out) / image.stem
            taken = [other for other, its in found.items() if its == place and other != image]
            if taken:
                raise ValueError(
                    f"{taken[0]} and {image} would both become {place}.json: predict them in two "
                    "calls with another --out"
                )
            found[image] = place
        return found


@dataclass
class Export:
    """Write a run's weights into one file.

    A .safetensors file holds configuration and class names too: `mimdet predict FILE IMAGE` works
    anywhere. A .pth file has the layout of the released MIMDet checkpoints, for the original's own
    tools.
    """

    run: Positional[str]
    """Directory of the run."""
    file: Positional[str]
    """The .safetensors or .pth to write."""
    half: bool = False
    """Store float16 (.safetensors only)."""
    checkpoint: str = "last"
    """`last`, `best` or a step number."""


@dataclass
class CheckData:
    """Say what is wrong with a COCO-format data set, and where. Exit code 1 if anything is."""

    annotations: Positional[str]
    """The json file."""
    images: Positional[str]
    """The image folder."""
    examples: int = 3
    """Examples shown of each kind of problem."""
    quick: bool = False
    """Read only the headers of the image files."""
    json: str = ""
    """Write the whole report to this file."""


@dataclass
class Download:
    """Fetch public weights or COCO; without a name, list what there is.

    Shows address, size, licence and free space, then asks. An interrupted download goes on where it
    stopped when the same command runs again. What arrived is checked and noted in
    TO/downloads.json; run again, the command checks that the files are still the same.
    """

    names: Positional[tuple[str, ...]] = ()
    """Names from the list; `coco` means images and annotations of train2017 and val2017."""
    to: str = "downloads"
    """Folder for the files. Those of the Hugging Face hub go to the hub's own cache."""
    yes: bool = False
    """Do not ask."""
    unpack: bool = False
    """Unzip COCO to TO/coco/train2017, val2017 and annotations; go on with a half unpacked one."""


@dataclass
class Errors:
    """Why a run's AP is what it is: errors by type and what fixing each would bring (TIDE).

    Reads RUN/predictions.json, as `mimdet evaluate` left it. Writes errors.json, the bars, the
    precision-recall curves and, for --against, what changed image by image.
    """

    run: Positional[str]
    """Directory of the run."""
    against: str = ""
    """Another run on the same data, to compare with image by image."""
    out: str = ""
    """Folder for the results; default: the run."""


@dataclass
class Ablate:
    """Train every arm of a grid with several seeds; print a table with 95 % intervals.

    Complete runs are skipped and interrupted ones resumed, so the same command goes on.
    """

    file: Positional[str]
    """Python file that defines `base` and `grid`; it is executed. Example:
    notebooks/ablations/sample_ratio.py."""
    runs: str = "runs"
    """Folder under which the experiment's runs are kept."""
    seeds: int = 0
    """Another number of seeds than the file's."""
    processes: int = 0
    """Runs at a time; 0 = one per GPU, or one per core and thread of a run."""
    dry_run: bool = False
    """List the runs and time a few steps of each arm; train nothing."""
    out: str = ""
    """The json with everything; default RUNS/NAME/result.json."""


@dataclass
class CostTable:
    """Parameters and multiply-adds of presets, as a markdown table. Nothing is computed."""

    presets: Positional[tuple[str, ...]] = ()
    """Names of presets; default: all."""
    size: tuple[int, int] = (800, 1344)
    """Height and width of the image in pixels."""
    ratios: tuple[float, ...] = (1.0,)
    """Shares of the tokens the encoder sees; baselines see them all."""


@dataclass
class Demo:
    """Train a small MIMDet on ShapesCOCO, read its AP at three sample ratios, look at detections.

    Everything is drawn and trained on this machine; nothing is downloaded. Run it again to resume
    an interrupted demo, or with other --minutes to train longer.
    """

    minutes: float = 6.0
    """Time for everything, from drawing scenes to figures, on an idle machine."""
    run: str = ""
    """Directory of the run; default runs/demo-<minutes>min."""
    level: str = "shapes-v1-medium"
    """shapes-v1-easy, shapes-v1-medium or shapes-v1-hard."""
    steps: int = 0
    """Train exactly this many steps instead of measuring what fits into the time."""
    scenes: int = 200
    """Held-out scenes to evaluate on."""
    seed: int = 0


def parse_preset(
    kind: type, presets: dict[str, Callable[[], Any]], words: list[str], name: str
) -> Any:
    """A command whose first word is a preset and whose flags change its fields."""
    choices = {
        preset: (inspect.getdoc(make) or "", kind(run=tyro.MISSING, config=make()))
        for preset, make in presets.items()
    }
    return tyro.extras.overridable_config_cli(
        choices,
        args=words,
        prog=f"mimdet {name}",
        description=inspect.getdoc(kind),
        config=(tyro.conf.OmitArgPrefixes,),
    )


def parse(kind: type, words: list[str], name: str) -> Any:
    """A command's dataclass filled from the words."""
    return tyro.cli(kind, args=words, prog=f"mimdet {name}", description=inspect.getdoc(kind))
