"""The subcommands of `mimdet`, a function each: arguments are options, docstrings the help."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from mimdet.config import Config, PretrainConfig
from mimdet.console import FIRST
from mimdet.demo import demo
from mimdet.findings import errors, evaluate, load_run, predict
from mimdet.playground import playground
from mimdet.prepare import File, Run, check_data, convert, split, start
from mimdet.presets import PRESETS

Names = Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="[NAME...]")]


def train(run: Run, config: Config) -> None:
    """Train a detector; the same command resumes an interrupted run exactly.

    Ctrl-C or SIGTERM saves and exits. Progress goes to the screen, every number to
    RUN/metrics.jsonl, weights to RUN/checkpoints.

    Args:
        run: Directory of the run, for example runs/nuclei.
    """
    from mimdet.training.train import train

    steps = train(config, run, announce=True)
    _follow(steps, f"{run}; next: mimdet evaluate {run} --ratios 0.25 0.5 1")


def pretrain(run: Run, config: PretrainConfig) -> None:
    """Pre-train a masked autoencoder; the same command resumes an interrupted run exactly.

    Writes RUN/metrics.jsonl, a picture of reconstructions at every evaluation and, for
    `mimdet train PRESET RUN2 --init-from RUN`, RUN/mae.safetensors.

    Args:
        run: Directory of the run, for example runs/mae.
    """
    from mimdet.training.pretrain import pretrain

    steps = pretrain(config, run, announce=True)
    _follow(steps, f"{run}; next: mimdet train PRESET RUN --init-from {run}")


def resume(run: Run, steps: int = 0, trust_code: bool = False) -> None:
    """Train in a run's folder, or resume there, with the configuration it holds.

    A run that is complete is left as it is. Runs of a notebook go on in a terminal this way.

    Args:
        run: Directory of the run, of a detector or of an autoencoder.
        steps: Train a finished run's model so many steps more, in RUN+STEPS: with a warm-up and a
            schedule of their own, because those of the run have ended.
        trust_code: Execute parts that a notebook stored in the run, or that its config.json names.
    """
    from mimdet.training.train import extend, resume

    run = str(extend(run, steps)) if steps else run
    # A log is read by people: a line of progress now and then.
    followed = resume(run, trust_code=trust_code, announce=True)
    _follow(followed, f"{run}; more: add --steps N", 1 if sys.stdout.isatty() else 20)


def _follow(steps: Iterator[Any], done: str, every: float = 1) -> None:
    """Run a training to its end; the first process has a progress bar, renewed `every` seconds, and
    says after some steps how long the rest will take."""
    from tqdm import tqdm

    from mimdet.training.train import MEASURED, MEASURED_SECONDS, outlook, show_progress

    shown, taken = show_progress(steps, every) if FIRST else steps, []
    for step in shown:
        taken.append(step.seconds)
        if len(taken) == MEASURED or (len(taken) > 2 and sum(taken) > MEASURED_SECONDS):
            if FIRST:  # its first step starts processes and allocates memory
                tqdm.write(outlook(step, mean(taken[1:] or taken)))
            break
    for _ in shown:
        pass
    if FIRST:
        print(f"done: {done}")


def export(
    run: Run,
    file: File,
    half: bool = False,
    inside: bool = False,
    licence: str = "",
    checkpoint: str = "last",
    trust_code: bool = False,
) -> None:
    """Write a run's weights, or the model that runs without this code, into one file.

    A .safetensors file holds configuration and class names too: `mimdet predict FILE IMAGE` works
    anywhere. A .pth file has the layout of the released MIMDet checkpoints, for the original's own
    tools. An .onnx file, of a detector or an autoencoder, needs onnxruntime, a .pt2 file PyTorch.

    Args:
        run: Directory of the run, or shipped weights.
        file: The .onnx, .pt2, .safetensors or .pth to write.
        half: Store float16 (.safetensors and .onnx only).
        inside: Of .onnx and .pt2: give c4 and the encoder's attention too; c4 can become its mean.
        licence: Of the weights, said in an .onnx or .pt2; that of shipped ones is known.
        checkpoint: `last`, `best` or a step number.
        trust_code: Execute parts that a notebook stored in the run, or that its config.json names.
    """
    from mimdet.models.checkpoint_files import shipped
    from mimdet.models.exported import export_model
    from mimdet.models.official import export_detectron2, save_detector
    from mimdet.training.pretrain import load_model

    ending = Path(file).suffix
    halves, others = (".safetensors", ".onnx"), (".pt2", ".pth", ".pkl")
    if ending not in halves and (half or ending not in others):
        raise ValueError(f"{file}: name it .safetensors, .onnx, or, without half, .pt2, .pth, .pkl")
    if ending in (".onnx", ".pt2"):
        licence = licence or ("MIT" if run in shipped() else "")
        model = load_model(run, checkpoint=checkpoint, trust_code=trust_code)
        about = export_model(model, file, inside=inside, half=half, licence=licence)
        print(f"{file}: {about['kind']}, sides multiples of {about['multiple']} pixels")
        return
    detector = load_run(run, checkpoint, "cpu", trust_code)
    if ending == ".safetensors":
        save_detector(detector, file, half=half)
        print(f"{file}: for mimdet.load_detector, with configuration and class names")
    else:
        export_detectron2(detector, file)
        print(f"{file}: {len(detector.state_dict())} tensors under detectron2's names")


def ablate(
    file: File,
    runs: str = "runs",
    seeds: int = 0,
    processes: int = 0,
    part: str = "1/1",
    known: tuple[str, ...] = (),
    dry_run: bool = False,
    table: bool = False,
    out: str = "",
) -> None:
    """Train every arm of a grid with several seeds; print a table with 95 % intervals.

    Complete runs are skipped and interrupted ones resumed, so the same command continues. Many
    machines share a grid: the first is given --part 1/8, the next --part 2/8, and so on. In one
    folder, --table then shows all that is complete; from folders of their own, the json files that
    they wrote are joined by --known.

    Args:
        file: Python file that defines `base` and `grid`; it is executed. Example:
            notebooks/ablations/sample_ratio.py.
        runs: Folder under which the experiment's runs are kept.
        seeds: Another number of seeds than the file's.
        processes: Runs at a time; 0 = one per GPU, or one per core and thread of a run.
        part: Train a part of the runs alone: 3/8 is every eighth, beginning with the third.
        known: Results (json) of the same grid from elsewhere: what they hold is not trained again.
        dry_run: List the runs; train nothing.
        table: Train nothing; the table is of what is complete.
        out: The json with everything; default RUNS/NAME/result.json.
    """
    from mimdet.experiments.experiment import experiment, join_known, read_grid
    from mimdet.experiments.runs import plan
    from mimdet.viz.experiments import save_figures

    numbers = re.fullmatch(r"(\d+)/(\d+)", part)
    if not numbers:
        raise ValueError(f"--part {part}: write which part of how many, such as 3/8")
    arguments = {"name": Path(file).stem, **read_grid(file), "runs": runs}
    if seeds:
        arguments["seeds"] = seeds
    if dry_run:
        planned = plan(**arguments)
        _, done = join_known(known, arguments["base"], planned)
        for run in planned:
            state = "known" if (run.arm.label, run.seed) in done else "to do"
            state = "complete" if run.complete() else state
            print(f"{run.path}  {run.steps} steps, evaluated at {list(run.ratios)}: {state}")
        return
    which = (int(numbers[1]), int(numbers[2]))
    arguments |= {"processes": processes, "part": which, "known": known, "train": not table}
    result = experiment(**arguments)
    result.command = f"mimdet ablate {file}" + (f" --seeds {seeds}" if seeds else "")
    written = Path(out) if out else result.folder / "result.json"
    result.to_json(written)
    print(f"{result.markdown()}\n\nresult: {written}")
    for path in save_figures(result, result.folder):
        print(f"figure: {path}")


def cost(
    presets: Names = (),
    size: tuple[int, int] = (800, 1344),
    ratios: tuple[float, ...] = (1.0,),
) -> None:
    """Parameters and multiply-adds of presets, as a markdown table. Nothing is computed.

    Args:
        presets: Names of presets; default: all.
        size: Height and width of the image in pixels.
        ratios: Shares of the tokens the encoder sees; baselines see them all.
    """
    from mimdet.analysis.cost import cost_of, cost_table

    unknown = [name for name in presets if name not in PRESETS]
    if unknown:
        raise ValueError(f"there is no preset {unknown[0]!r}; there are {', '.join(PRESETS)}")
    if not 32 <= min(size) <= max(size) <= 1 << 15:
        raise ValueError(f"--size {size[0]} {size[1]}: height and width in pixels, 32 to {1 << 15}")
    rows = []
    for name in presets or PRESETS:
        cfg = PRESETS[name]()
        seen = ratios if cfg.backbone.kind == "mimdet" else (1.0,)
        rows += [cost_of(cfg, size, ratio) for ratio in seen]
    print(cost_table(rows))


def plan(
    config: Config,
    gpus: int = 1,
    price: float = 0.0,
    measured_steps: int = 6,
    out: str = "",
) -> None:
    """What a training will take: speed, memory, hours, cost; measured in a few steps here.

    Cards are judged by a count of what training holds; its error against the peaks measured here is
    in the last column. Evaluations and the loss of sharing a step are not in the hours.

    Args:
        gpus: Devices like this one that share the steps.
        price: Of one of them, an hour.
        measured_steps: Steps measured at each sample ratio.
        out: Save a picture of it under this name, as .png and .svg.
    """
    from mimdet.training.plan import forecast
    from mimdet.viz import save_figure, show_forecast

    found = forecast(config, gpus, price, measured_steps)
    print(found)
    if out:
        save_figure(show_forecast(found), out)


def profile(config: Config, measured_steps: int = 5, out: str = "") -> None:
    """Where the time of a training step goes: seconds, multiply-adds and speed of every part.

    Args:
        measured_steps: Steps that are measured, after two that warm up.
        out: Save a picture of it under this name, as .png and .svg.
    """
    from mimdet.training.profile import profile
    from mimdet.viz import save_figure, show_profile

    found = profile(config, measured_steps)
    print(found)
    if out:
        save_figure(show_profile(found), out)


def download(
    names: Names = (),
    to: Path = Path("downloads"),
    yes: bool = False,
    unpack: bool = False,
) -> None:
    """Fetch public weights, COCO or DSB2018; without a name, list what there is.

    Shows address, size, licence and free space, then asks. The same command continues an
    interrupted download where it stopped. What arrived is checked and recorded in
    TO/downloads.json; run again, the command checks that the files are still the same.

    Args:
        names: Names from the list; `coco` means images and annotations of train2017 and val2017.
        to: Folder for the files. Those of the Hugging Face hub go to the hub's own cache.
        yes: Do not ask.
        unpack: Unzip COCO to TO/coco/train2017, val2017 and annotations, DSB2018 to TO/dsb2018; go
            on with a half unpacked one.
    """
    from mimdet.downloads import download, table

    if names:
        download(names, to, yes=yes, unpack=unpack)
    else:
        print(table())


COMMANDS: dict[str, Callable[..., object]] = {
    command.__name__.replace("_", "-"): command
    for command in (
        *(demo, start, plan, profile, train, resume, pretrain, evaluate, predict, errors),
        *(ablate, cost, export, playground, check_data, convert, split, download),
    )
}
