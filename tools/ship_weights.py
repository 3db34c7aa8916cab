"""Make mimdet/pretrained from runs: float16 weights, and a card with their numbers.

    python tools/ship_weights.py --mae runs/tiny_mae --half runs/half --detector runs/tiny

What is left out stays as it is. AP is measured on the float16 file itself, as a user loads it.
"""

import argparse
import hashlib
from pathlib import Path
from statistics import median
from typing import Any

import torch

import mimdet
from mimdet.data.shapes import ShapesCOCO
from mimdet.experiments.results import hardware_text
from mimdet.files import read_json, write_json
from mimdet.training.checkpoints import MetricsFile
from mimdet.training.run import load_detector

FOLDER = Path(mimdet.__file__).parent / "pretrained"
SCENES = 200
TWO = "torchrun --nproc-per-node 2 -m mimdet"
HALF = "mimdet train tiny runs/half --steps 3600 --evaluate-every-steps 1200 --precision bf16"
WHOLE = "--sample-ratio 1 --steps 600 --learning-rate 1e-3 --evaluate-every-steps 600"
COMMANDS = {
    "tiny_mae": f"{TWO} pretrain tiny_mae runs/tiny_mae",
    "tiny_half": HALF,
    "tiny": f"mimdet train tiny runs/tiny --init-from runs/half {WHOLE} --precision bf16",
}

WHAT = {
    "tiny_mae": "Masked autoencoder (preset `tiny_mae`): `mimdet.load_mae_model('tiny_mae')`, or "
    "`--init-from tiny_mae`. Trained on plain pixels, so its reconstructions have the right "
    "colours. It knows drawn shapes and nothing else.",
    "tiny_half": "Detector (preset `tiny`) from random weights, trained with half of the tokens: "
    "`mimdet.load_detector('tiny_half')`.",
    "tiny": "`tiny_half` after 600 more steps with all tokens, which it had never seen together "
    "before: `mimdet.load_detector('tiny')`.",
}
HEAD = """# Weights that come with the package

Small models for looking at things without training first, trained by this code on ShapesCOCO
alone (drawn by this code, no photographs, no weights of others), stored as float16. Licence: MIT,
as the code. AP x 100 is that of the stored file on 200 held-out scenes at sample ratio 1. They are
teaching material, and useless on photographs. Numbers and checksums also in `cards.json`; made by
`python tools/ship_weights.py`.
"""


def readme(cards: dict[str, dict[str, Any]]) -> str:
    """One section a model."""
    parts = [HEAD]
    for name, values in cards.items():
        shown = {key: value for key, value in values.items() if key != "versions"}
        shown |= values["versions"]
        rows = [f"| {key.replace('_', ' ')} | `{value}` |" for key, value in shown.items()]
        parts.append("\n".join([f"## {name}", "", WHAT[name], "", "| | |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


def card(name: str, run: Path, numbers: dict[str, Any]) -> dict[str, Any]:
    """What one needs to know of a file, and to make it again."""
    path = FOLDER / f"{name}.safetensors"
    steps = [row for row in MetricsFile(run / "metrics.jsonl").read() if "loss" in row]
    seconds = [row["time"]["seconds"] for row in steps]
    environment = read_json(run / "environment.json")
    two = COMMANDS[name].startswith(TWO)
    cores = hardware_text([])
    return {
        "command": COMMANDS[name],
        "seed": environment["seed"],
        "data": environment["data"],
        "images_seen": sum(row["images"] for row in steps),
        "training_minutes": round(median(seconds) * len(seconds) / 60, 1),  # pauses left out
        "hardware": f"{cores}, 2 processes of 1 thread" if two else f"1 of {cores}",
        "versions": {key: environment[key] for key in ("mimdet", "git", "torch", "timm")},
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        **numbers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("--mae", "--half", "--detector"):
        parser.add_argument(option, type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    cards = {name: card for name, card in read_json(FOLDER / "cards.json").items() if name in WHAT}
    if options.mae:
        mae = mimdet.load_mae_model(options.mae / "mae.safetensors")
        mimdet.save_mae(mae, FOLDER / "tiny_mae.safetensors", half=True)
        loss = read_json(options.mae / "eval.json")["held_out"]["loss"]
        cards["tiny_mae"] = card("tiny_mae", options.mae, {"held_out_loss": round(loss, 4)})
    for name, run in (("tiny_half", options.half), ("tiny", options.detector)):
        if not run:
            continue
        detector = load_detector(run)
        if start := Path(detector.config.training.init_from).name:
            detector.config.training.init_from = f"runs/{start}"  # no path of this machine
        mimdet.save_detector(detector, FOLDER / f"{name}.safetensors", half=True)
        model = mimdet.load_detector(name)
        cfg = model.config.data
        scenes = ShapesCOCO(cfg.shapes_level, cfg.shapes_size, SCENES, "val")
        result = mimdet.evaluate(model, scenes)
        scores = {"box_ap": result.box["AP"], "mask_ap": result.mask["AP"]}
        cards[name] = card(name, run, {k: round(100 * v, 2) for k, v in scores.items()})

    if options.detector:  # it went on where the other ended
        for name in ("images_seen", "training_minutes"):
            cards["tiny"][name] += cards["tiny_half"][name]
    write_json(FOLDER / "cards.json", cards)
    (FOLDER / "README.md").write_text(readme(cards))
    for name, values in cards.items():
        print(name, {k: values[k] for k in values if k not in ("command", "versions")})


if __name__ == "__main__":
    main()
