"""docs/claims.md: the paper's claims, measured. `python tools/claims.py [--check]`.

The comparisons stand in notebooks/ablations/claims.toml. A grid's result is made by

    mimdet ablate notebooks/ablations/NAME.py --out notebooks/results/claims/NAME.json

and a claim whose grid has none is listed as not run.
"""

import math
import sys
import tomllib
from pathlib import Path
from typing import Any

from mimdet.experiments.results import Experiment, Interval, mean_interval

ROOT = Path(__file__).resolve().parents[1]
GRIDS = ROOT / "notebooks/ablations"
RESULTS = ROOT / "notebooks/results/claims"
PAGE = ROOT / "docs/claims.md"
METRICS = ("box_ap", "box_ap_small", "box_ap_medium", "box_ap_large", "mask_ap")
INTRODUCTION = """# The paper's claims, measured small

<!-- made by tools/claims.py -->

Each claim is one comparison of two arms of a grid in
[notebooks/ablations](../notebooks/ablations), at laptop size, on drawn scenes: `tiny` and recipes
of its size, 2,000 scenes of `shapes-v1-medium` unless the grid says otherwise. Nothing about
ViT-B on COCO follows from a row; what can be seen is whether an effect shows at this size. What
counts as shown was written down before the grids were run
([claims.toml](../notebooks/ablations/claims.toml)): the 95 % t-interval of the difference, paired
by seed, lies beyond the limit; contradicted: on the other side of it.

What is stored is not trained again: `mimdet ablate notebooks/ablations/NAME.py --known
notebooks/results/claims/NAME.json --out notebooks/results/claims/NAME.json` trains the seeds that
are missing, and `--part 1/4` a quarter of them.
"""


def main() -> None:
    text = page()
    if "--check" in sys.argv[1:]:
        if text != PAGE.read_text(encoding="utf-8"):
            sys.exit("docs/claims.md does not show the results: run python tools/claims.py")
        return
    PAGE.write_text(text, encoding="utf-8")


def page() -> str:
    claims = tomllib.loads((GRIDS / "claims.toml").read_text(encoding="utf-8"))["claim"]
    found = {
        name: Experiment.from_json(RESULTS / f"{name}.json")
        for name in dict.fromkeys(claim["grid"] for claim in claims)
        if (RESULTS / f"{name}.json").exists()
    }
    rows = [row(claim, found.get(claim["grid"])) for claim in claims]
    parts = [INTRODUCTION, "| | claim | limit | measured | seeds | verdict | grid |"]
    parts += ["|---|---|---|---|---|---|---|", *rows, ""]
    for name, result in found.items():
        hours = result.table.groupby(["arm", "seed"])["cpu_seconds"].first().sum() / 3600
        title = f"## {name}\n\n`{result.command}`, {hours:.1f} CPU hours of training, "
        title += f"{result.about['hardware']}, `{', '.join(result.about['data'])}`\n"
        parts += [title, result.markdown(METRICS), ""]
    return "\n".join(parts).rstrip() + "\n"


def row(claim: dict[str, Any], result: Experiment | None) -> str:
    side, limit = ("above", claim["above"]) if "above" in claim else ("below", claim["below"])
    unit = " %" if "relative" in claim or "reach" in claim else ""
    grid = f"[{claim['grid']}](../notebooks/ablations/{claim['grid']}.py)"
    cells = [claim["id"], claim["text"], f"{side} {limit:g}{unit}"]
    arms = {arm.label for arm in result.arms} if result else set()
    if result is None or not {claim["one"][0], claim["other"][0]} <= arms:
        return f"| {' | '.join(cells)} | - | - | not run yet | {grid} |"
    values = paired(claim, result)
    interval = mean_interval(values)
    shown = f"{interval.mean:+.1f}{unit}"
    if interval.n > 1:
        shown += f" [{interval.low:+.1f}, {interval.high:+.1f}]"
    verdict = f"**{judge(interval, side, limit)}** {claim.get('why', '')}".rstrip()
    return f"| {' | '.join([*cells, shown, str(interval.n), verdict, grid])} |"


def paired(claim: dict[str, Any], result: Experiment) -> list[float]:
    """The measured value of each seed that both arms have."""
    metric = claim.get("metric", "box_ap")
    (one, at), (other, other_at) = claim["one"], claim["other"]
    values, baseline = result.scores(one, at, metric), result.scores(other, other_at, metric)
    seeds = [seed for seed in values if seed in baseline]
    if claim.get("reach"):
        return [reached(result, one, seed, baseline[seed]) for seed in seeds]
    if claim.get("relative"):
        return [100 * (values[seed] / baseline[seed] - 1) for seed in seeds]
    return [values[seed] - baseline[seed] for seed in seeds]


def reached(result: Experiment, arm: str, seed: int, ap: float) -> float:
    """The share of its steps, in %, after which an arm was evaluated with at least `ap`."""
    curve = result.curves
    own = curve[(curve["arm"] == arm) & (curve["seed"] == seed) & curve["box_ap"].notna()]
    steps = own["step"][own["box_ap"] >= ap]
    return 100 * float(steps.min()) / float(own["step"].max()) if len(steps) else math.inf


def judge(interval: Interval, side: str, limit: float) -> str:
    """`shown`, `contradicted here` or `not resolved`: where the interval lies."""
    low, high = interval.low - limit, interval.high - limit
    if side == "below":
        low, high = -high, -low
    if low > 0:
        return "shown"
    return "contradicted here" if high < 0 else "not resolved"


if __name__ == "__main__":
    main()
