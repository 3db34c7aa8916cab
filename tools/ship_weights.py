"""Make the weights of mimdet/pretrained from runs: float16 weights, and a card with their numbers.

    python tools/ship_weights.py --mae runs/tiny_mae --half runs/half --detector runs/tiny \\
        --nuclei runs/nuclei

What is left out stays as it is. AP is measured on the float16 file itself, as a user loads it.
"""

import argparse
import hashlib
from pathlib import Path
from statistics import median
from typing import Any

import torch

import mimdet
from mimdet.experiments.results import hardware_text
from mimdet.files import read_json, write_json
from mimdet.training.checkpoints import MetricsFile
from mimdet.training.run import load_detector

FOLDER = Path(mimdet.__file__).parent / "pretrained"
TWO = "torchrun --nproc-per-node 2 -m mimdet"
HALF = "mimdet train tiny runs/half --steps 3600 --evaluate-every-steps 1200 --precision bf16"
WHOLE = "--sample-ratio 1 --steps 600 --learning-rate 1e-3 --evaluate-every-steps 600"
COMMANDS = {
    "tiny_mae": f"{TWO} pretrain tiny_mae runs/tiny_mae",
    "tiny_half": HALF,
    "tiny": f"mimdet train tiny runs/tiny --init-from runs/half {WHOLE} --precision bf16",
    "nuclei": "mimdet train nuclei runs/nuclei --precision bf16",
}

WHAT = {
    "tiny_mae": "Masked autoencoder (preset `tiny_mae`): `mimdet.load_mae_model('tiny_mae')`, or "
    "`--init-from tiny_mae`. Trained on plain pixels, so its reconstructions have the right "
    "colours. It knows drawn shapes and nothing else.",
    "tiny_half": "Detector (preset `tiny`) from random weights, trained with half of the tokens: "
    "`mimdet.load_detector('tiny_half')`.",
    "tiny": "`tiny_half` after 600 more steps with all tokens, which it had never seen together "
    "before: `mimdet.load_detector('tiny')`.",
    "nuclei": "Detector (preset `nuclei`) of cell nuclei, from `tiny`, trained on six tiles of the "
    "microscope picture below: `mimdet.load_detector('nuclei')`. It knows this one staining: on 60 "
    "pictures of DSB2018, of several stainings and sizes, it has 27 box AP.",
}
HEAD = """# Weights that come with the package

Small models for looking at things without training first, trained by this code on ShapesCOCO
(drawn by this code, no photographs, no weights of others) and, `nuclei`, on one microscope picture;
stored as float16. Licence: MIT, as the code. AP x 100 is that of the stored file at sample ratio 1
on 200 held-out scenes, of `nuclei` on three held-out tiles. They are teaching material, and useless
on photographs. Numbers and checksums also in `cards.json`; made by `python tools/ship_weights.py`.
"""
TAIL = """# The picture that comes with the package

`nuclei/`: fluorescence microscopy of cell nuclei, 512 x 512 pixels, cut into nine tiles of about
170: `mimdet.Nuclei("train")`, six tiles with 94 nuclei, and `mimdet.Nuclei("val")`, the last row,
three with 49. What a border cuts is in both tiles, but for pieces under 16 pixels. Picture and
labels are those that StarDist carries as test data (`stardist.data.test_image_nuclei_2d`; BSD
3-Clause, copyright 2018-2025 Uwe Schmidt, Martin Weigert); they come from BBBC038v1, the 2018 Data
Science Bowl, of the Broad Bioimage Benchmark Collection, which is in the public domain (CC0 1.0):
Caicedo et al., *Nucleus segmentation across imaging experiments: the 2018 Data Science Bowl*,
Nature Methods 16, 2019. Made by `python tools/ship_nuclei.py`; the 670 pictures of that
competition: `mimdet download dsb2018`.
"""


def readme(cards: dict[str, dict[str, Any]]) -> str:
    """One section a model."""
    parts = [HEAD]
    for name, values in cards.items():
        shown = {key: value for key, value in values.items() if key != "versions"}
        shown |= values["versions"]
        rows = [f"| {key.replace('_', ' ')} | `{value}` |" for key, value in shown.items()]
        parts.append("\n".join([f"## {name}", "", WHAT[name], "", "| | |", "|---|---|", *rows, ""]))
    return "\n".join([*parts, TAIL])


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
    for option in ("--mae", "--half", "--detector", "--nuclei"):
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
    runs = {"tiny_half": options.half, "tiny": options.detector, "nuclei": options.nuclei}
    for name, run in runs.items():
        if not run:
            continue
        detector = load_detector(run)
        start = Path(detector.config.training.init_from).name
        if start and name != "nuclei":
            detector.config.training.init_from = f"runs/{start}"  # no path of this machine
        mimdet.save_detector(detector, FOLDER / f"{name}.safetensors", half=True)
        model = mimdet.load_detector(name)
        result = mimdet.evaluate(model, mimdet.build_dataset(model.config.data, "val"))
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
