"""Tables and sentences made from the results of grids (notebooks/ablations), for the pages that
tools/measured.py writes."""

from pathlib import Path
from typing import Any

from mimdet.experiments.results import Experiment, difference_text, mean_interval, mean_text
from mimdet.files import read_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "notebooks/results"


def read(name: str) -> dict[str, Any]:
    return read_json(RESULTS / f"{name}.json")


def muon_section() -> str:
    """AdamW against Muon: the grid, and what was tried before it."""
    tried = read("muon_tried")
    result = Experiment.from_json(RESULTS / "claims/optimizer.json")
    adamw, muon = (arm.label for arm in result.arms)
    lines = []
    for name, arm in (("AdamW, 600 steps", adamw), ("Muon, 500 steps", muon)):
        cells = []
        for ratio in (0.004, 0.25, 1.0):
            found = [[*result.scores(arm, ratio, kind).values()] for kind in ("box_ap", "mask_ap")]
            cells.append(" / ".join(mean_text(mean_interval(x)._asdict()) for x in found))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    cards = read_json(ROOT / "mimdet/pretrained/cards.json")
    half, whole = (
        f"{cards[name]['box_ap']:.1f} / {cards[name]['mask_ap']:.1f} (`{name}`)"
        for name in ("tiny_half", "tiny")
    )
    adamw_ap = read("reliance_adamw_tiny")["box_ap"]["all tokens"]["AP"]
    seconds = result.table.groupby("arm")["cpu_seconds"].mean()
    gain = result.difference((muon, 1.0), (adamw, 1.0))
    rows = [
        f"| {r['optimizer']}, {r['learning_rate']:g} | {r['left_to_adamw']} | {r['steps']} | "
        f"{r['cpu_seconds']} | {r['box_ap']} / {r['mask_ap']} |"
        for r in tried["rows"]
    ]
    return f"""## Muon or AdamW

The paper trains by AdamW. The `tiny` presets learn by Muon (`training.optimizer`), which moves
every matrix and convolution equally far in all its directions. In about the same CPU time
({seconds[adamw]:.0f} and {seconds[muon]:.0f} s; {result.about["hardware"]}), {gain.n} seeds, box /
mask AP x 100 on 200 held-out scenes, mean ± standard deviation
([the grid](../notebooks/ablations/optimizer.py), `claims/optimizer.json`):

| | one token | 25 % | all |
|---|---|---|---|
{chr(10).join(lines)}

A difference of {gain.mean:+.1f} box AP [{gain.low:+.1f}, {gain.high:+.1f}]. What was tried before,
on seed 0 (`muon_tried.json`): the first row and that with nothing but vectors and positions left to
NAdamW are what `training.optimizer` does, the others were a script's:

| optimizer, rate | not by Muon | steps | CPU s | AP |
|---|---|---|---|---|
{chr(10).join(rows)}

After 3,600 steps less is left of it, one training each: {half} where AdamW
had {adamw_ap:.1f} box AP; 600 steps more with all tokens make that {whole}."""


def context_row(arm: str) -> str:
    """Box and mask AP of each seed that is there: `33.2, 31.9 | 37.3, 35.0`."""
    rows = [row for row in read("claims/context")["rows"] if row["arm"] == f"kind={arm}"]
    rows.sort(key=lambda row: row["seed"])
    return " | ".join(", ".join(f"{row[ap]:.1f}" for row in rows) for ap in ("box_ap", "mask_ap"))


def worth_of_c4() -> str:
    """Of c4 taught first: `+19.8 box AP [+9.9, +29.8], 3 seeds`."""
    result = Experiment.from_json(RESULTS / "claims/context.json")
    _, silenced, taught = (arm.label for arm in result.arms)
    gain = result.difference((taught, 1.0), (silenced, 1.0))
    interval = f" [{gain.low:+.1f}, {gain.high:+.1f}]" if gain.n > 1 else ""
    return f"{gain.mean:+.1f} box AP{interval}, {gain.n} seeds"


def fill_row(fill: str) -> str:
    """Box AP by tokens at evaluation of the detectors trained with half of them."""
    result = Experiment.from_json(RESULTS / "claims/fills.json")
    arm = f"decoder_fill={fill},sample_ratio=0.5"
    found = (mean_interval([*result.scores(arm, r).values()]) for r in (0.004, 0.25, 0.5, 1.0))
    return " | ".join(mean_text(interval._asdict()) for interval in found)


def fine_tuning_table() -> str:
    """What the starts of notebooks/ablations/fine_tuning.py are worth; three arms a row."""
    result = Experiment.from_json(RESULTS / "fine_tuning.json")
    base, lines = result.base, []
    for start in range(0, len(result.arms), 3):
        arms, seeds = result.arms[start : start + 3], []
        cells = [str(arms[0].values["data.limit_train"])]
        for arm in arms:
            kinds = ("box_ap", "mask_ap")
            found = [mean_interval([*result.scores(arm.label, 1.0, k).values()]) for k in kinds]
            cells.append(" / ".join(mean_text(interval._asdict()) for interval in found))
            seeds.append(str(found[0].n))
        for arm in arms[1:]:
            own = result.difference((arm.label, 1.0), (arms[0].label, 1.0))
            ends = {"difference_low": own.low, "difference_high": own.high}
            cells.append(difference_text({"difference": own.mean} | ends))
        lines.append(f"| {' | '.join(cells)} | {', '.join(seeds)} |")
    cpu = result.table.groupby("arm")["cpu_seconds"].mean() / 60
    return f"""Nuclei (DSB2018), {base.training.steps} steps of `tiny` at
{base.data.test_short_side} pixels as `mimdet start` proposes it, judged on {base.data.limit_val}
held-out pictures ([the grid](../../notebooks/ablations/fine_tuning.py), `fine_tuning.json`;
{result.about["hardware"]}, {cpu.min():.1f} to {cpu.max():.1f} CPU minutes
a training). Box AP / mask AP x 100, mean ± standard deviation; then the difference in box AP to
random weights, paired by seed, with its 95 % t-interval where there are two seeds; last the seeds
of the three starts:

| pictures | random weights | `tiny` | `tiny`, stem and encoder frozen | `tiny` | frozen | seeds |
|---|---|---|---|---|---|---|
{chr(10).join(lines)}"""
