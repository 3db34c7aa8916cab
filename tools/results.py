"""Measured results: from a run's directory into notebooks/results, and from there into the README.

python tools/results.py collect RUN notebooks/results/NAME.json --command "mimdet demo" --note ""
python tools/results.py readme            # rewrite the README's block of results
python tools/results.py readme --check    # exit 1 if it is not what the json files say
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "notebooks/results"
START, END = "<!-- results -->", "<!-- /results -->"
KEPT = ("mimdet", "git", "torch", "torchvision", "timm", "python", "seed", "data")


def collect(run: Path, command: str, hardware: str, note: str, minutes: float) -> dict[str, Any]:
    """What a run's own files say, without its weights and predictions."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    environment = json.loads((run / "environment.json").read_text())
    final = json.loads((run / "eval.json").read_text())
    result: dict[str, Any] = {
        "command": command,
        "note": note,
        "hardware": hardware,
        "environment": {name: environment[name] for name in KEPT},
        "minutes_in_all": minutes,
        "training_minutes": round(sum(row["time"]["seconds"] for row in steps) / 60, 1),
        "steps": steps[-1]["step"],
        "images": sum(row["images"] for row in steps),
        "curve": [
            {
                "step": row["step"],
                "box_ap": row["evaluation"]["box"]["AP"],
                "mask_ap": row["evaluation"]["mask"]["AP"],
            }
            for row in rows
            if "evaluation" in row
        ],
        "final": {kind: final[kind] for kind in ("box", "mask")},
    }
    ratios = run / "evaluation.json"
    if ratios.exists():
        result["ratios"] = json.loads(ratios.read_text())["ratios"]
    return result


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def percent(value: float, spread: float = 0.0) -> str:
    return f"{100 * value:.1f}" + (f" ± {100 * spread:.1f}" if spread else "")


def demo_row(result: dict[str, Any]) -> str:
    cells = [
        f"{percent(r['box_ap'], r['box_ap_sd'])} / {percent(r['mask_ap'], r['mask_ap_sd'])}"
        for r in result["ratios"]
    ]
    minutes, scenes = f"{result['minutes_in_all']:g}", f"{result['images']:,}"
    label = f"`{result['command']}`" + (f", {result['note']}" if result["note"] else "")
    return f"| {label} | {minutes} min | {scenes} | {' | '.join(cells)} |"


def ap(result: dict[str, Any], kind: str) -> str:
    return percent(result["curve"][-1][f"{kind}_ap"])


def canvas_sentence(pairs: list[dict[str, Any]]) -> str:
    parts = []
    for pair in pairs:
        image, canvas = ("x".join(map(str, pair[key])) for key in ("image", "canvas"))
        moved = f"{100 * pair['c4_relative_change']:.0f} %"
        found = f"{pair['found_again']} of {pair['detections']}"
        parts.append(
            f"{image} beside {canvas}: c4 moves by {moved}, {found} detections are found again"
        )
    return "; ".join(parts)


def block() -> str:
    """The README's results, every number from a json file."""
    short, long = read("demo/demo-6min"), read("demo/demo-15min")
    seeds, floor, nuclei = read("demo/seeds"), read("floor"), read("nuclei")
    collapsed = read("demo/encoder_collapse")["runs"][0]
    level = floor["levels"]["shapes-v1-medium@128/r1"]
    overfit, baselines = read("overfit_8_coco_images"), read("baselines")
    order = sorted(baselines["rows"], key=lambda row: row["box_ap"], reverse=True)
    backbones = [
        f"| `{r['preset']}` | {r['box_ap']} / {r['mask_ap']} | {r['cpu_minutes']} |" for r in order
    ]
    spread = ", ".join(f"{percent(r['box'])} / {percent(r['mask'])}" for r in seeds["runs"])
    rows = [
        demo_row(short),
        demo_row(long),
        f"| colour threshold + connected components | - | - | | | - / {level['mask_ap']:.1f} |",
    ]
    return f"""## What it reaches on two CPU cores

ShapesCOCO `{short["environment"]["data"]}`: 12 classes, 3-10 objects a scene, \
{100 * level["small"]:.0f} % of them small, {100 * level["occluded"]:.0f} % partly occluded;
200 held-out scenes, from scratch, trained at ratio 0.5. AP x 100, box / mask, mean ± standard
deviation of 2 draws of the tokens; {short["hardware"]}:

| command | time | scenes seen | ratio 0.25 | ratio 0.5 | ratio 1 |
|---|---|---|---|---|---|
{chr(10).join(rows)}

AP still rises steeply after six minutes, so a faster machine reaches more. Runs this short differ:
{len(seeds["runs"])} seeds of the first row's training gave {spread} at ratio 1
(`notebooks/results/demo/seeds.json`). From random weights the encoder learns late. In an earlier
recipe, with one learning rate for all parts, it once gave every token the same output: the
detector lived on the stem's tokens at places that were *not* sampled, and at ratio 1, where there
are none, it fell to
{collapsed["box_ap_ratio_1"]} box AP from {collapsed["box_ap_ratio_0.25"]} at 0.25
(`notebooks/results/demo/encoder_collapse.json`). The paper reports a gain from more tokens for
fully trained models; here the ratios are level at best.

Every tiny preset after {baselines["rows"][0]["images"]:,} scenes from random weights, one seed each
(`notebooks/results/baselines.json`). Nothing follows from it for large models:

| preset | box / mask AP x 100 | minutes of one core |
|---|---|---|
{chr(10).join(backbones)}

![AP against the share of tokens kept](notebooks/results/demo/ratios.png)

Microscopy (DSB2018, 270 training images, 60 held out, from scratch):

| command | time | box AP | mask AP | floor: Otsu threshold + components |
|---|---|---|---|---|
| `torchrun --nproc-per-node 2 -m mimdet train nuclei runs/nuclei --train-json ... ` | \
{nuclei["training_minutes"]:.0f} min | {ap(nuclei, "box")} | {ap(nuclei, "mask")} | 33.5 |

A larger canvas changes an image's result, because GroupNorm, position tables and decoder see the
padding, as in the paper. Measured on three pairs with an earlier six-minute run:
{canvas_sentence(read("canvas_effect")["pairs"])}.
So `predict` and `evaluate` never mix padded sizes.

The json behind these figures, with commands and versions, is in `notebooks/results/`.

Is the whole chain right? Eight real COCO photographs, learnt by heart (`--limit-train 8
--limit-val 8 --augment none`, the exact command in `notebooks/results/overfit_8_coco_images.json`),
reach {ap(overfit, "box")} / {ap(overfit, "mask")} box / mask AP."""


def readme_with(text: str, results: str) -> str:
    before, rest = text.split(START)
    return f"{before}{START}\n{results}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="task", required=True)
    one = commands.add_parser("collect")
    one.add_argument("run", type=Path)
    one.add_argument("out", type=Path)
    one.add_argument("--command", required=True)
    one.add_argument("--hardware", default="2 CPU cores (AMD EPYC), 2 threads")
    one.add_argument("--note", default="")
    one.add_argument("--minutes", type=float, default=0.0, help="wall time, start to end")
    readme = commands.add_parser("readme")
    readme.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.task == "collect":
        result = collect(
            options.run, options.command, options.hardware, options.note, options.minutes
        )
        options.out.write_text(json.dumps(result, indent=2) + "\n")
        return
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    new = readme_with(text, block())
    if options.check and new != text:
        sys.exit(
            "README.md's results are not those of notebooks/results: run tools/results.py readme"
        )
    path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
