"""The commands as a user types them, in one process and small."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mimdet
from mimdet import cli, demo
from mimdet.analysis.evaluate import evaluate
from mimdet.config import Config, flat, load_config
from mimdet.data.shapes import export
from mimdet.training.briefing import briefing, default_processes
from mimdet.training.optim import Schedule
from mimdet.training.run import Run, TrainingStopped
from mimdet.training.train import outlook
from mimdet.training.trainer import Step
from tests.small import WORDS, small_detector, write_coco

SCENES = "--shapes-size 64 --shapes-train 8 --shapes-val 2 --steps 2 --batch-size 2 --accumulate 2"
TINY = [*WORDS, *SCENES.split()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "run"
    cli.main(["train", "tiny", str(path), *TINY])
    return path


def test_a_run_resumes_to_nothing_and_needs_its_folder_alone(run, tmp_path, capsys, monkeypatch):
    assert load_config(run / "config.json").training.accumulate == 2
    before = (run / "metrics.jsonl").read_text()
    for words in (["train", "tiny", str(run), *TINY], ["resume", str(run)]):
        cli.main(words)
        assert f"done: {run}" in capsys.readouterr().out
        assert (run / "metrics.jsonl").read_text() == before
    Run(tmp_path / "new", load_config(run / "config.json"))
    monkeypatch.setattr("mimdet.training.train.MEASURED", 1)
    cli.main(["resume", str(tmp_path / "new")])
    printed = "\n" + capsys.readouterr().out
    for name in ("device", "work", "memory", "disk", "stop", "watch"):
        assert printed.index(f"\n{name:<7} ") < printed.index("time    about 00:0")
    first, second = (json.loads((r / "eval.json").read_text()) for r in (run, tmp_path / "new"))
    assert first == second
    with pytest.raises(
        SystemExit, match=r"training.steps: 2 -> 3\n[^\n]*mimdet resume .*run --steps N"
    ):  # another configuration
        cli.main(["train", "tiny", str(run), *TINY, "--steps", "3"])


def test_a_schedule_of_weeks_is_warned_of():
    step = Step(3, 67_500, {}, 1.0, 1.0, 1.0, 64, 100.0, 0.0)
    said = outlook(step, 100.0)
    assert "67,497 more steps" in said and "warning: that is 11 weeks" in said  # 6.75e6 s / 604,800
    assert "warning" not in outlook(step, 1.0)  # 19 hours


@pytest.mark.parametrize(
    ("gpus", "used", "said"),
    [
        (1, 1, "80.0GB; 1 of 1 GPUs, bf16"),
        (3, 2, "2 of 3 GPUs (2 share 8 micro-batches equally, 3 cannot: "),
        (6, 4, "4 of 6 GPUs (4 share 8 micro-batches equally, 6 cannot: "),
        (8, 1, "1 of 8 GPUs (for 8: torchrun --nproc-per-node 8 -m mimdet resume runs/base), bf16"),
    ],
)
def test_what_a_long_training_says_first(monkeypatch, gpus, used, said):
    gpu = SimpleNamespace(name="A100", total_memory=80e9)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: gpu)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(used))
    cfg = mimdet.presets.mimdet_base()
    if used > 1:
        assert default_processes(cfg) == used
    schedule = Schedule(cfg.training, 117_266)
    tensor = SimpleNamespace(nbytes=4 * 127_954_768, device=torch.device("cuda"))
    model = SimpleNamespace(state_dict=lambda: {"weight": tensor}, parameters=list)
    words = briefing(cfg, Path("runs/base"), schedule, 100, model)
    assert said in words and len(words.splitlines()) == 7
    assert "65,862 of 65,962 steps of 64 images = 8 x 8 micro-batches, by 1 process(es)" in words
    assert "36 epochs of 117,266 images" in words
    sizes = "short side 480 to 800 pixels, in evaluation 800, the long side at most 1333"
    assert f"images  {sizes}; evaluated every 1,832 steps" in words
    assert "2.05GB a process, and the images'" in words
    assert "1.54GB a checkpoint, every 1,832 steps; at most 4 at a time: 6.14GB" in words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trian", "no command 'trian'"),
        (
            "train tiny {tmp}/run --val-json my.json",
            "does not read data.val_json: set data.",
        ),
        ("resume {tmp}", "holds no run"),
        ("evaluate {tmp}", "is neither a run"),
        ("evaluate {run} --ratios 0.5 --draws 0", "draws=0"),
        ("errors {tmp}", r"no predictions.json: `mimdet evaluate`"),
        ("export {run} x.tflite", "name it .safetensors"),
        ("export {run} x.pth --half", "or, without half, .pt2, .pth"),
        ("cost tinny", "no preset 'tinny'"),
        ("train tiny {tmp}/run --epochs 2 --steps=9", "--epochs and --steps say the same"),
    ],
)
def test_errors_are_one_line_without_traceback(run, tmp_path, words, said):
    with pytest.raises(SystemExit, match=said):
        cli.main(words.format(run=run, tmp=tmp_path).split())
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def scenes(tmp_path) -> tuple[Path, Path]:
    """Annotations and images of two scenes."""
    export(mimdet.ShapesCOCO(size=64, length=2, split="val"), tmp_path / "scenes")
    annotations = next((tmp_path / "scenes").rglob("*.json"))
    return annotations, next((tmp_path / "scenes").rglob("*.png")).parent


def test_epochs_that_are_given_decide(tmp_path, capsys):
    """8 images at 4 a step: 3 epochs are 6 steps, though the preset says 800."""
    words = [*WORDS, *SCENES.replace("--steps 2", "").split()]
    cli.main(["train", "tiny", str(tmp_path / "run"), *words, "--epochs", "3"])
    assert "6 of 6 steps of 4 images" in (said := capsys.readouterr().out)
    assert "AP50   AP75    APs    APm    APl" in said  # and the classes, at the end
    assert "3 epochs of 8 images" in said
    cfg = load_config(tmp_path / "run" / "config.json")
    assert (cfg.training.epochs, cfg.training.steps) == (3, 0)
    cfg.training.steps = 800
    with pytest.raises(
        ValueError, match=r"epochs=3 is 6 steps .8 images, 4 a step., but tiny sets"
    ):
        next(mimdet.train(cfg, tmp_path / "other"))
    with pytest.raises(
        SystemExit, match="--epochs and --steps say the same in two units: give one"
    ):
        cli.main(["train", "tiny", str(tmp_path / "both"), "--epochs", "3", "--steps", "6"])


def test_empty_images_are_left_out_with_a_word_or_kept(tmp_path, capsys):
    file = write_coco(tmp_path, [[[4, 4, 20, 20]], [], [[8, 8, 30, 30]]])
    place = [str(file), str(tmp_path / "images")]
    words = [*WORDS, "--source", "coco", "--steps", "1", "--train-json", place[0], "--train-images"]
    words += [place[1], "--val-json", place[0], "--val-images", place[1]]
    cli.main(["train", "tiny", str(tmp_path / "without"), *words])
    said = capsys.readouterr().out
    assert "1 images without objects (--no-skip-empty" in said and "epochs of 2 images" in said
    cli.main(["train", "tiny", str(tmp_path / "with"), *words, "--no-skip-empty"])
    said = capsys.readouterr().out
    assert "images without objects" not in said and "epochs of 3 images" in said


def test_evaluate_and_what_training_measured(run, tmp_path, monkeypatch, capsys):
    """--reuse: of these weights and images only; the numbers are those of a new evaluation."""
    words = ["--ratios", "0.5", "1", "--draws", "1"]
    cli.main(["evaluate", str(run), *words])
    printed = capsys.readouterr().out
    assert "0.50      1" in printed and "1.00      1" in printed
    new = json.loads((run / "evaluation.json").read_text())["ratios"]

    measured = []

    def counted(*arguments, sample_ratio, **others):
        measured.append(sample_ratio)
        return evaluate(*arguments, sample_ratio=sample_ratio, **others)

    monkeypatch.setattr("mimdet.analysis.evaluate.evaluate", counted)
    cli.main(["evaluate", str(run), *words, "--reuse"])
    assert measured == [0.5]
    again = json.loads((run / "evaluation.json").read_text())["ratios"]
    for row in (*new, *again):
        row.pop("seconds")
    assert again == new

    measured.clear()
    cli.main(["evaluate", str(run), *words, "--reuse", "--limit", "1"])  # other images
    cli.main(["evaluate", str(run), *words, "--reuse", "--out", str(tmp_path)])
    assert measured == [0.5, 1.0, 0.5, 1.0]

    measured.clear()
    later = shutil.copytree(run, tmp_path / "later")
    (later / "checkpoints/000002").rename(later / "checkpoints/000003")
    (later / "checkpoints/last").write_text("000003\n")
    cli.main(["evaluate", str(later), *words, "--reuse"])  # weights that were not evaluated
    assert measured == [0.5, 1.0]


def test_evaluating_other_data_leaves_the_run_s_predictions(run, scenes, capsys):
    annotations, images = scenes
    cli.main(["evaluate", str(run), "--ratios", "1"])
    files = [run / "predictions.json", run / "evaluation.json"]
    before = [file.read_bytes() for file in files]
    cli.main(["evaluate", str(run), "--ratios", "1", "--limit", "1"])
    assert f"in {run}/evaluation-limit1: " in capsys.readouterr().out
    other = ["--val-json", str(annotations), "--val-images", str(images)]
    cli.main(["evaluate", str(run), "--ratios", "1", *other])  # although the run's data are drawn
    place = run / f"evaluation-{annotations.stem}" / "evaluation.json"
    assert json.loads(place.read_text())["data"].startswith(annotations.name)
    assert before == [file.read_bytes() for file in files]


def test_other_sizes_have_a_folder_of_their_own(run, tmp_path, capsys):
    words = ["--ratios", "1", "--short-side", "96", "--detections", "7"]
    cli.main(["evaluate", str(run), *words])
    cli.main(["evaluate", str(run), "--ratios", "1", "--tile", "48", "--overlap", "8"])
    places = [run / f"evaluation-{name}/evaluation.json" for name in ("side96-most7", "tile48")]
    sized, tiled = (json.loads(place.read_text())["ratios"][0]["about"] for place in places)
    plain = json.loads((run / "eval.json").read_text())
    assert sized["config"] != plain["config"] == tiled["config"]
    assert tiled["tiles"] == [48, 8, 1.0] and "tiles" not in plain
    with pytest.raises(SystemExit, match=r"tile=48, overlap=64: .* must be larger than"):
        cli.main(["evaluate", str(run), "--tile", "48"])


def test_check_data(scenes, tmp_path, capsys):
    words = ["check-data", *map(str, scenes)]
    cli.main(words)
    next(scenes[1].glob("*.png")).unlink()
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words, "--json", str(tmp_path / "r.json")])
    assert stopped.value.code == 1
    assert "missing" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["problems"]


@pytest.mark.parametrize(
    ("wrong", "kind", "remedy"),
    [
        (lambda x, y, w, h: [x, y, x + w, y + h], "boxes-look-xyxy", "subtract x1, y1 from x2, y2"),
        (lambda *box: [side / 64 for side in box], "boxes-look-normalised", "boxes are in pixels"),
    ],
)
def test_wrong_boxes_are_named_with_the_remedy(wrong, kind, remedy, scenes, tmp_path, capsys):
    annotations, images = scenes
    content = json.loads(annotations.read_text())
    for entry in content["annotations"]:
        entry["bbox"] = wrong(*entry["bbox"])
    annotations.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as ended:
        cli.main(["check-data", str(annotations), str(images)])
    said = capsys.readouterr().out
    assert ended.value.code == 1 and f"error {kind} (1)" in said and remedy in said
    words = ["--train-json", str(annotations), "--train-images", str(images), "--source", "coco"]
    with pytest.raises(SystemExit, match=rf"{kind}.*{remedy}") as ended:
        cli.main(["train", "tiny", str(tmp_path / "run"), *words])
    assert ended.value.code == 2 and not (tmp_path / "run").exists()


def test_demo_to_its_pictures_or_stopped_while_it_times_the_machine(tmp_path, capfd, monkeypatch):
    cli.main(["demo", "--steps", "3", "--scenes", "4", "--run", str(tmp_path / "demo")])
    printed = capfd.readouterr().out
    assert "0.25      2" in printed and "1.00      1" in printed
    for name in ("detections", "training", "ratios"):
        assert (tmp_path / "demo" / f"{name}.png").stat().st_size > 1000
    # Stopped: nothing was begun, so nothing is said to be saved, and the throwaway folder is gone.
    folders = []

    def stopped(cfg, run):
        folders.append(run.parent)
        raise TrainingStopped(13, run, signal.SIGINT)
        yield

    monkeypatch.setattr("mimdet.training.train.train", stopped)
    with pytest.raises(SystemExit, match="stopped before the training began"):
        cli.main(["demo", "--run", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists() and not folders[0].exists()


def test_demo_goes_on_with_what_is_there(run, tmp_path, capfd):
    """With the run's own threads and precision: those of this machine may be others."""
    path = tmp_path / "begun"
    Run(path, load_config(run / "config.json"))  # begun, and stopped before the first step
    cli.main(["demo", "--run", str(path), "--scenes", "2"])
    assert f"$ mimdet resume {path}" in capfd.readouterr().out
    assert json.loads((path / "eval.json").read_text())["step"] == 2
    assert (path / "ratios.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match=r"steps: 2 -> 900\n.*seed: 0 -> 5\n.*another run name"):
        cli.main(["demo", "--run", str(path), "--scenes", "2", "--steps", "900", "--seed", "5"])


@pytest.mark.parametrize(
    ("known", "expected"),
    [({"avx512_bf16": True}, "bf16"), ({"avx512_bf16": False, "avx2": True}, "auto"), ({}, "auto")],
)
def test_demo_computes_in_bf16_where_the_cpu_can(known, expected, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: known, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cfg = Config()
    demo.suit_machine(cfg)
    assert cfg.training.precision == expected
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    demo.suit_machine(cfg)
    assert cfg.training.precision == "auto"


def test_errors_of_a_run_and_against_another(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other")
    cli.main(["errors", str(run), "--against", str(other), "--out", str(tmp_path / "e")])
    said = capsys.readouterr().out
    assert "missed" in said and "0 gained, 0 lost" in said
    for source in (run, other):
        assert f"{source}\n          AP   AP50" in said
    assert set(json.loads((tmp_path / "e/errors.json").read_text())) == {"box", "mask"}
    for name in ("errors", "curves_box", "curves_mask", "comparison"):
        assert (tmp_path / f"e/{name}.png").stat().st_size > 1000


def test_errors_of_a_file_of_results_and_of_weights(scenes, tmp_path, capsys):
    """The results are the truth, but for one object called wrong, one left out and one that is not
    there; the weights are evaluated first."""
    annotations, images = scenes
    truth = json.loads(annotations.read_text())
    results = [entry | {"score": 0.9} for entry in truth["annotations"][1:]]
    results[0] = results[0] | {"category_id": results[0]["category_id"] % 12 + 1}
    corner = {"counts": [0, 9, 64 * 64 - 9], "size": [64, 64]}
    results.append(results[1] | {"bbox": [0, 0, 1, 9], "segmentation": corner})
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps(results))
    with pytest.raises(SystemExit, match="name what they are about, --annotations FILE"):
        cli.main(["errors", str(file)])
    about = ["--annotations", str(annotations)]
    cli.main(["errors", str(file), *about])
    said = capsys.readouterr().out
    for words in ("the most frequent confusions", "to cut a class at", "images with most mistakes"):
        assert words in said
    rows = (tmp_path / "theirs/review.csv").read_text().splitlines()
    assert rows[0] == "doubt,image,said,true,score,x,y,width,height"
    assert [row.split(",")[0] for row in rows[1:]].count("no object?") == 1
    best = json.loads((tmp_path / "theirs/thresholds.json").read_text())
    assert all(row["score"] == 0.9 and 0 < row["f1"] <= 1 for row in best.values())
    weights = tmp_path / "small.safetensors"
    mimdet.save_detector(small_detector(), weights)
    cli.main(["errors", str(weights), "--against", str(file), *about, "--images", str(images)])
    assert (tmp_path / "small/comparison.png").exists()


def test_pretrain_ablate_and_cost(tmp_path, capsys):
    words = "--image-size 64 --embed-dim 32 --depth 1 --num-heads 2 --decoder-dim 32 --steps 2"
    more = "--decoder-depth 1 --decoder-heads 2 --batch-size 2 --accumulate 2 --held-out 2"
    cli.main(["pretrain", "tiny_mae", str(tmp_path / "mae"), *words.split(), *more.split()])
    assert (tmp_path / "mae/mae.safetensors").exists()
    grid = tmp_path / "ratios.py"
    grid.write_text(
        "from tests.small import small\nbase = small(2)\nseeds = 1\n"
        'grid = {"backbone.sample_ratio": [1.0, 0.5]}\n'
    )
    cli.main(["ablate", str(grid), "--runs", str(tmp_path / "runs")])
    assert (tmp_path / "runs/ratios/result.json").exists()
    cli.main(["cost", "tiny", "tiny_swin", "--size", "256", "256", "--ratios", "0.5", "1"])
    printed = capsys.readouterr().out
    assert printed.count("| tiny |") == 2 and printed.count("| tiny_swin |") == 1


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    printed = capsys.readouterr().out
    assert len(printed) > 300
    assert not {"STR", "PATH"} & set(printed.splitlines()[0].replace("[", " ").split())


def test_every_field_is_a_flag_and_module_and_command_are_the_same(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "mimdet_base", "--help"])
    printed = capsys.readouterr().out
    for name in flat(Config()):
        assert f"--{name.split('.')[-1].replace('_', '-')}" in printed or name == "preset"
    command = [sys.executable, "-m", "mimdet", "--version"]
    assert subprocess.check_output(command, text=True).strip() == mimdet.__version__
    assert Path(sys.executable).with_name("mimdet").exists()
