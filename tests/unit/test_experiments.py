"""Experiments: real runs in real processes, killed and resumed; statistics worked out by hand."""

import importlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mimdet.analysis.cost import cost_of
from mimdet.commands import ablate
from mimdet.config import Config, flat, save_config
from mimdet.console import Failed
from mimdet.data.scenes import LEVELS
from mimdet.experiments import runs
from mimdet.experiments.experiment import experiment, read_grid
from mimdet.experiments.results import (
    Experiment,
    mean_interval,
    measured,
    t_quantile,
    training_flops,
)
from mimdet.experiments.runs import RATIOS, ExperimentStopped, PlannedRun, arms_of, places_for, plan
from mimdet.presets import PRESETS
from mimdet.training.checkpoints import Checkpoint
from mimdet.training.owner import in_use
from mimdet.training.run import CheckpointStore, MetricsFile, Run, load_detector
from mimdet.training.slots import write_slots
from mimdet.training.train import resume
from mimdet.viz import save_figures, show_arms, show_learning_curves, show_matrix
from tests.small import small, wait_until

ROOT = Path(__file__).resolve().parents[2]


def strongest(tokens, grid, generator):
    return tokens.norm(dim=1)


class OwnStem(nn.Module):
    """A stem of another shape than the library's, so that it draws other numbers."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        from mimdet.models.stem import ConvStem

        self.inner = ConvStem(dim)
        self.extra = torch.nn.Parameter(torch.rand(5))

    def forward(self, images):
        return self.inner(images)


# ------------------------------------------------------------------------------- the grid


def test_arms_are_all_combinations_in_order_or_those_of_a_list() -> None:
    grid = {"backbone.sample_ratio": [0.25, 1], "detector.norm": ["BN", "GN"]}
    base = small()
    arms = arms_of(base, grid)
    quarters = ["sample_ratio=0.25,norm=BN", "sample_ratio=0.25,norm=GN"]
    assert [arm.label for arm in arms[:2]] == quarters
    assert [arm.label for arm in arms[2:]] == ["sample_ratio=1,norm=BN", "sample_ratio=1,norm=GN"]
    assert arms[3].cfg.backbone.sample_ratio == 1.0 and arms[3].cfg.detector.norm == "GN"
    assert base == small()
    listed = arms_of(base, [{"detector.norm": "GN"}, {"backbone.depth": 1}])
    assert [tuple(arm.values.values()) for arm in listed] == [("GN", 2), ("BN", 1)]
    # Labels are names of folders, and code is named by its source.
    paths = ["runs/mae base", "x" * 200, ""]
    labels = [arm.label for arm in arms_of(small(), {"training.init_from": paths})]
    assert labels[0] == "init_from=runs-mae-base" and labels[2] == "init_from=none"
    assert len(labels[1]) == 80
    first, second = arms_of(small(), {"backbone.sampler": ["random", strongest]})
    assert first.cfg.backbone.sampler == "random" and not first.code
    assert second.cfg.backbone.sampler == second.code["sampler"].address
    assert second.values == {"backbone.sampler": "strongest"}


def elsewhere(tokens, grid, generator):
    return tokens.norm(dim=1) * len(str(ROOT))


@pytest.mark.parametrize(
    ("asked", "said"),  # a grid, or other arguments
    [
        ({"backbone.sampel_ratio": [1.0]}, r"no field 'backbone.sampel_ratio'.*backbone\.sample_r"),
        ({"sample_ratio": [1.0]}, r"did you mean backbone\.sample_ratio"),
        ({"backbone": [1.0]}, "no field 'backbone'"),
        ({"backbone.sampler": "random"}, "give the values as a list, not 'random'"),
        ({"backbone.depth": []}, "give the values as a list"),
        ({"backbone.depth": [1.5]}, r"Expected `int`, got `float` - at `\$.backbone.depth`"),
        ({"detector.norm": ["XN"]}, r"Invalid enum value 'XN' - at `\$.detector.norm`"),
        ({"backbone.depth": [1, 1]}, "two arms are both called depth=1"),
        ({"training.seed": [1, 2]}, "give seeds="),
        ({"backbone.sample_ratio_eval": [0.5, 1.0]}, r"give evaluate_ratios=\("),
        ({"backbone.sampler": [lambda t, g, r: t]}, "write it with def"),
        ({"backbone.sampler": [elsewhere]}, "uses ROOT from outside itself"),
        ([], "the grid is empty"),
        ({"detector.num_classes": [12, 24]}, "train the same"),
        ({"preset": ["tiny", "twin"]}, "preset=tiny and preset=twin train the same"),
        ({"training.epochs": [1, 2]}, "epochs has no effect while training.steps=4"),
        ({"preset": ["tiny", "tinny"]}, "preset='tinny': recipes can be compared where"),
        ({"seeds": 0}, "at least one"),
        ({"seeds": [1, 1]}, "none twice"),
        ({"evaluate_ratios": (0.0,)}, r"share of tokens kept, \(0, 1\]"),
        ({"draws": 0}, "draws=0"),
        ({"processes": -1}, "processes=-1: how many runs at a time"),
    ],
)
def test_what_cannot_be_run_is_said_before_it_starts(tmp_path, monkeypatch, asked, said) -> None:
    monkeypatch.setitem(PRESETS, "twin", PRESETS["tiny"])
    options = asked if {*asked} & {"seeds", "evaluate_ratios", "draws", "processes"} else {}
    with pytest.raises(ValueError, match=said):
        experiment(small(), {"backbone.depth": [1]} if options else asked, runs=tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_recipes_are_compared_with_what_the_base_changes() -> None:
    base = PRESETS["tiny"]()
    base.training.steps, base.data.short_sides = 7, [64]
    base.backbone.sample_ratio = 0.25
    grid = {"preset": ["tiny", "tiny_no_decoder", "tiny_vitdet"]}
    tiny, no_decoder, vitdet = (arm.cfg for arm in arms_of(base, grid))
    assert flat(tiny) == flat(base) and no_decoder.backbone.decoder_depth == 0
    assert no_decoder.backbone.sample_ratio == 0.25  # the same kind of backbone
    assert vitdet.backbone == PRESETS["tiny_vitdet"]().backbone
    assert vitdet.detector.neck == "simple_pyramid" and vitdet.training.learning_rate == 3e-3
    assert [cfg.training.steps for cfg in (no_decoder, vitdet)] == [7, 7]
    assert vitdet.data.short_sides == (64,)


def test_what_was_planned_is_trained_although_the_file_changes(tmp_path, monkeypatch) -> None:
    file = tmp_path / "samplers_of_mine.py"
    text = "def own(tokens, grid, generator):\n    return tokens.norm(dim=1)\n"
    file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module(file.stem).own
    (run,) = plan(small(), {"backbone.sampler": [own]}, seeds=1, runs=tmp_path / "runs")
    file.write_text(text.replace("return tokens", "return -tokens"))
    runs.start(run, {}, tmp_path / "logs").process.kill()
    assert (run.path / "slots" / "sampler.py").read_text().endswith(text)


def test_runs_come_seed_by_seed_and_know_their_data(tmp_path) -> None:
    cfg = small(0)
    cfg.training.epochs = 2.0
    cfg.detector.num_classes = 80
    cfg.data.short_sides = [64]  # as a notebook may write it
    planned = plan(cfg, {"backbone.depth": [1, 2]}, seeds=np.arange(2), runs=tmp_path)
    assert [run.name for run in planned] == [f"depth={d}-s{s}" for s in (0, 1) for d in (1, 2)]
    assert [run.cfg.training.seed for run in planned] == [0, 0, 1, 1]
    assert {type(run.seed) for run in planned} == {int}
    first = planned[0]
    assert first.path.parent == tmp_path / "depth"
    assert (first.images, first.steps) == (10, 5)  # 2 epochs of 10 images, 4 a step
    assert first.cfg.detector.num_classes == 12 and cfg.detector.num_classes == 80
    assert list(tmp_path.iterdir()) == []
    options = {"runs": tmp_path, "evaluate_ratios": (0.25, 0.5)}
    planned = plan(PRESETS["tiny"](), {"preset": ["tiny", "tiny_resnet"]}, seeds=1, **options)
    assert [run.ratios for run in planned] == [(0.25, 0.5), (1.0,)]  # it sees every token


def test_folder_of_another_configuration_or_with_code_from_elsewhere_is_refused(tmp_path) -> None:
    grid = {"backbone.depth": [1]}
    cfg, longer = small(), small(5)
    cfg.data.short_sides = longer.data.short_sides = [64]
    (run,) = plan(cfg, grid, seeds=1, runs=tmp_path)
    Run(run.path, run.cfg)
    assert len(plan(longer, grid, seeds=1, runs=tmp_path)) == 1  # nothing is lost there yet
    Run(run.path, run.cfg).store.save(Checkpoint(1, {"w": torch.zeros(2)}, {}))
    assert len(plan(cfg, grid, seeds=1, runs=tmp_path)) == 1  # not another configuration
    with pytest.raises(ValueError, match=r"training.steps: 4 -> 5[^$]*by name="):
        plan(longer, grid, seeds=1, runs=tmp_path)
    write_slots(run.path, arms_of(small(), {"backbone.sampler": [strongest]})[0].code)
    with pytest.raises(ValueError, match=r"other code for: sampler[^$]*by name="):
        plan(cfg, grid, seeds=1, runs=tmp_path)


def first_weights(run: PlannedRun) -> dict[str, torch.Tensor]:
    """Of a training of one step at the rate 0."""
    run.cfg.training.steps, run.cfg.training.learning_rate = 1, 0.0
    Run(run.path, run.cfg)
    write_slots(run.path, run.arm.code)
    torch.manual_seed(7)  # whatever happened before
    assert len(list(resume(run.path, trust_code=True))) == 1
    return load_detector(run.path, trust_code=True).state_dict()


def test_arms_of_one_seed_start_with_the_same_weights(tmp_path) -> None:
    """Encoder and decoder also beside a stem that draws other numbers."""
    grid = [{"backbone.sample_ratio": 0.25}, {"backbone.stem": OwnStem}]
    planned = plan(small(), grid, seeds=2, runs=tmp_path / "runs")
    quarter, own, other_seed = (first_weights(run) for run in planned[:3])
    shared = [name for name in quarter if name.startswith(("backbone.encoder", "backbone.decoder"))]
    assert len(shared) > 20 and all(torch.equal(quarter[name], own[name]) for name in shared)
    name = "backbone.encoder.blocks.0.attn.qkv.weight"
    assert not torch.equal(quarter[name], other_seed[name])


# ------------------------------------------------------------------------------- where runs go


def test_processes_follow_cores_and_threads_or_gpus(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("mimdet.experiments.runs.usable_cores", lambda: 4)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    planned = plan(small(), {"backbone.depth": [1, 2]}, seeds=3, runs=tmp_path)
    assert len(places_for(planned)) == 4 and len(places_for(planned[:3])) == 3
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert len(places_for(planned)) == 2
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places_for(planned, 3)] == ["4", "6", "4"]
    for run in planned:
        run.cfg.training.threads, run.cfg.training.device = 2, "cpu"
    assert places_for(planned) == [{"OMP_NUM_THREADS": "2"}] * 2
    planned[0].cfg.training.device = "mps"
    assert len(places_for(planned)) == 1  # there is one of it


def test_two_trainings_on_one_gpu_are_not_started_in_silence(tmp_path, monkeypatch, capsys) -> None:
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("mimdet.experiments.experiment.run_all", stopped)
    for processes, said in ((2, False), (3, True)):
        with pytest.raises(ExperimentStopped):
            grid = {"backbone.depth": [1, 2]}
            experiment(small(), grid, seeds=2, runs=tmp_path, processes=processes)
        printed = capsys.readouterr().out
        assert ("3 runs at a time share the memory of 2 GPUs" in printed) == said


# ------------------------------------------------------------------------------- statistics


def test_intervals_by_hand() -> None:
    printed = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 30: 2.042, 120: 1.980}
    found = [t_quantile(degrees) for degrees in printed]
    assert found == pytest.approx(list(printed.values()), abs=0.0005)
    # One degree is Cauchy: tan(pi/2 x level). Two degrees: level x sqrt(2 / (1 - level^2)).
    assert t_quantile(1) == pytest.approx(math.tan(math.pi / 2 * 0.95), rel=1e-7)
    assert t_quantile(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-7)
    # 1, 2, 6: mean 3, squares 4 + 1 + 9 = 14, sd = sqrt(7), half = 4.3027 x sqrt(7/3) = 6.5724
    found = mean_interval([1.0, 2.0, 6.0])
    assert found == pytest.approx((3.0, -3.5724, 9.5724, math.sqrt(7), 3), abs=1e-4)
    one = mean_interval([5.0, math.nan])
    assert one.mean == 5.0 and one.n == 1 and math.isnan(one.low) and math.isnan(one.sd)
    assert mean_interval([]).n == 0 and math.isnan(mean_interval([]).mean)


def written(folder: Path, ratios: tuple[float, ...] = (0.5, 1.0)) -> Experiment:
    """Two arms, three seeds: box AP 20 + 10 x seed for the first, 1, 2, 3 more for the second.

    At ratio 0.5, two draws: one point less and one point more than that; mask AP is missing.
    """
    planned = plan(small(2), RATIO_GRID, seeds=3, runs=folder, evaluate_ratios=ratios)
    for i, run in enumerate(planned):
        _write_run(run, (20 + 10 * run.seed + i % 2 * (1 + run.seed)) / 100)
    return measured(small(2), planned, {})


RATIO_GRID = {"backbone.sample_ratio": [0.25, 1.0]}


def _write_run(run: PlannedRun, score: float) -> None:
    run.path.mkdir(parents=True)
    rows = []
    for ratio in run.ratios:
        values = [score - 0.01, score + 0.01] if ratio < 1 else [score]
        box = [{"AP": v, "AP_small": None, "AP_large": 2 * v} for v in values]
        metrics = [{"box": numbers, "mask": {}} for numbers in box]
        row = {"sample_ratio": ratio, "draws": len(values), "metrics": metrics, "seconds": 1.0}
        rows.append(row | {"box_ap_sd": 0.0141 if ratio < 1 else 0.0})
    (run.path / RATIOS).write_text(json.dumps({"data": run.data, "rows": rows}))
    times = {"seconds": 7.0, "cpu_seconds": 6.0}
    steps = [{"step": s, "loss": 3.0 - s, "images": 4, "time": times} for s in (1, 2)]
    times = {"seconds": 46.0, "cpu_seconds": 6.5}
    steps.append({"step": 2, "evaluation": {"box": {"AP": score}, "mask": {}}, "time": times})
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    (run.path / "environment.json").write_text(json.dumps({"gpus": [], "data": run.data}))


def test_table_and_curves_by_hand(tmp_path) -> None:
    result = written(tmp_path)
    assert len(result.table) == 12
    row = result.table.query("seed == 1 and `backbone.sample_ratio` == 1").iloc[0]
    assert row["arm"] == "sample_ratio=1" and row["evaluate_ratio"] == 0.5
    assert row["box_ap"] == pytest.approx(32.0) and row["box_ap_large"] == pytest.approx(64.0)
    assert math.isnan(row["box_ap_small"]) and math.isnan(row["mask_ap"])
    assert row["box_draw_sd"] == pytest.approx(1.41) and row["draws"] == 2
    assert (row["wall_seconds"], row["cpu_seconds"]) == (60.0, 18.5)
    assert (row["steps"], row["images"]) == (2, 8)
    own = result.curves.query("arm == 'sample_ratio=0.25' and seed == 2")
    assert own["epoch"].tolist() == [0.4, 0.8]  # 4 and 8 of 10 images
    assert own["seconds"].tolist() == [7.0, 14.0] and own["loss"].tolist() == [2.0, 1.0]
    assert own["box_ap"].iloc[1] == pytest.approx(40.0) and math.isnan(own["box_ap"].iloc[0])


def test_summary_and_differences_by_hand(tmp_path) -> None:
    result = written(tmp_path)
    summary = result.summary()
    assert summary["n"].tolist() == [3] * 4
    first, _, _, last = (row for _, row in summary.iterrows())
    assert first["mean"] == pytest.approx(30.0) and first["sd"] == pytest.approx(10.0)
    assert first["high"] - first["mean"] == pytest.approx(24.8414, abs=1e-4)  # 4.3027 x 10 / 1.7321
    assert math.isnan(first["difference"]) and first["pairs"] == 0
    assert last["mean"] == pytest.approx(32.0) and last["evaluate_ratio"] == 1.0
    difference = [last["difference"], last["difference_low"], last["difference_high"]]
    assert difference == pytest.approx([2.0, -0.4841, 4.4841], abs=1e-4) and last["pairs"] == 3
    arm = "sample_ratio=0.25"
    assert result.difference((arm, 1.0), (arm, 0.5)) == pytest.approx((0, 0, 0, 0, 3), abs=1e-9)
    result.table = result.table.drop(result.table.index[0])  # seed 0 of the first arm at 0.5
    assert result.difference((arm, 1.0), (arm, 0.5)).n == 2
    with pytest.raises(ValueError, match="no arm 'x'"):
        result.difference(("x", 1.0), (arm, 1.0))


def test_markdown_by_hand(tmp_path) -> None:
    result = written(tmp_path, ratios=(1.0,))
    result.errors = {"sample_ratio=1-s9": "ValueError: no"}
    assert result.markdown(["box_ap"]).splitlines() == [
        "| sample_ratio | evaluated at | box AP | difference in box AP | seeds | minutes a run |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 0.25 | 1 | 30.0 ± 10.0 | - | 3 | 1.0 |",
        "| 1 | 1 | 32.0 ± 11.0 | +2.0 [-0.5, +4.5] | 3 | 1.0 |",
        "",
        "AP × 100, mean ± standard deviation over seeds. Difference: to sample_ratio=0.25 at the "
        "same evaluation ratio, paired by seed, with its 95% t-interval.",
        "",
        "Failed: sample_ratio=1-s9: ValueError: no",
    ]
    assert "| - | - |" in result.markdown()  # mask AP was not measured


def test_flops_by_hand(tmp_path) -> None:
    """Three forward passes of two operations a multiply-add; fewer tokens, fewer operations."""
    result = written(tmp_path)
    quarter, full = plan(small(2), RATIO_GRID, seeds=1, runs=tmp_path)
    assert quarter.size == (64, 64)
    once = cost_of(full.cfg, (64, 64), 1.0).detector
    assert training_flops(full.cfg, (64, 64)) == 6 * once
    own = result.table[result.table["arm"] == "sample_ratio=1"]
    assert own["flops"].tolist() == [6 * once * 8] * 6  # 2 steps of 4 images
    assert training_flops(quarter.cfg, (64, 64)) < 6 * once
    cfg = small()
    cfg.backbone.sampler = "a_module:function"  # is not even imported
    assert training_flops(cfg, (64, 64)) == training_flops(small(), (64, 64))
    cell = arms_of(small(), {"backbone.sampler": [strongest], "backbone.stem": ["conv", OwnStem]})
    assert training_flops(cell[0].cfg, (64, 64)) == training_flops(small(), (64, 64))
    assert math.isnan(training_flops(cell[1].cfg, (64, 64)))


def test_evaluations_with_other_draws_or_of_other_data_do_not_count(tmp_path, monkeypatch) -> None:
    written(tmp_path)

    def complete(ratios: tuple[float, ...], draws: int) -> bool:
        options = {"runs": tmp_path, "evaluate_ratios": ratios, "draws": draws}
        return plan(small(2), RATIO_GRID, seeds=3, **options)[0].complete()

    assert complete((0.5, 1.0), 2) and complete((1.0,), 5)
    assert not complete((0.5,), 3) and not complete((0.25, 1.0), 2)
    monkeypatch.setitem(LEVELS, (name := "shapes-v1-medium"), replace(LEVELS[name], revision=99))
    assert not complete((1.0,), 2)
    # Two processes never work on one run.
    monkeypatch.setattr(runs, "LOCK_SECONDS", 0.3)
    with runs.alone_in(tmp_path), pytest.raises(SystemExit, match=r"error: .* already trains in"):
        runs.main(tmp_path, 1, [1.0])


# ------------------------------------------------------------------------------- grid files

GRID = """
from tests.small import small, wait_until

def own(tokens, grid, generator):
    return tokens.norm(dim=1)

base = small(2)
grid = {"backbone.sample_ratio": [0.25, 1.0]}
evaluate_ratios = (0.5, 1)
"""


def test_ablate_lists_the_runs_or_prints_and_writes_the_result(tmp_path, capsys) -> None:
    file = tmp_path / "sample_ratio.py"
    for text in ("grid = {}", "base, grid = 1, {}", GRID.replace("grid", "x")):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"must define `base`, a Config .*, and `grid`"):
            read_grid(file)
    file.write_text(GRID.replace("evaluate_ratios", 'grid["backbone.sampler"] = [own]\n# '))
    ablate(file, runs=tmp_path, seeds=1, dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and not (tmp_path / "sample_ratio").exists()
    assert "sample_ratio=1,sampler=own-s0  2 steps, evaluated at [1.0]: to do" in lines[1]

    file.write_text(GRID)
    written(tmp_path)  # so that nothing needs training
    ablate(file, runs=tmp_path)
    known = tmp_path / "sample_ratio" / "result.json"
    assert Experiment.from_json(known).markdown() in capsys.readouterr().out
    content = json.loads(known.read_text())
    assert content["command"] == f"mimdet ablate {file}" and len(content["rows"]) == 12
    ablate(file, runs=tmp_path / "other", seeds=4, known=(known,), dry_run=True)
    said = [line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert said == ["known"] * 6 + ["to do"] * 2


def test_parts_are_shared_out_and_joined(tmp_path, monkeypatch) -> None:
    """Three machines train every run once; their results together are those of one."""
    whole = written(tmp_path / "whole")
    started: list[list[str]] = []

    def trained(waiting, *_):
        started.append([run.name for run in waiting])
        for run in waiting:
            i = run.arm.values["backbone.sample_ratio"] == 1.0
            _write_run(run, (20 + 10 * run.seed + i * (1 + run.seed)) / 100)
        return {}

    monkeypatch.setattr("mimdet.experiments.experiment.run_all", trained)
    options = {"evaluate_ratios": (0.5, 1.0)}
    results = []
    for part in (1, 2, 3):
        folder = tmp_path / str(part)
        own = experiment(small(2), RATIO_GRID, 3, runs=folder, part=(part, 3), **options)
        results.append(folder / "part.json")
        own.to_json(results[-1])
        assert len(own.table) == 4  # two runs at two ratios
    assert sorted(run for part in started for run in part) == sorted(
        f"sample_ratio={ratio}-s{seed}" for ratio in ("0.25", "1") for seed in (0, 1, 2)
    )
    assert started[0] == ["sample_ratio=0.25-s0", "sample_ratio=1-s1"]
    options["runs"] = tmp_path / "here"
    joined = experiment(small(2), RATIO_GRID, 3, known=results[:2], train=False, **options)
    assert joined.table["seed"].tolist() == [0] * 4 + [1] * 2 + [2] * 2
    joined = experiment(small(2), RATIO_GRID, 3, known=results, **options)
    assert len(started) == 3 and joined.markdown() == whole.markdown()
    shown = ["arm", "seed", "step", "box_ap"]
    evaluated = whole.curves[whole.curves["box_ap"].notna()][shown].reset_index(drop=True)
    assert joined.curves[shown].equals(evaluated)
    assert not (tmp_path / "here").exists()
    # More seeds: those that are known are not trained again.
    experiment(small(2), RATIO_GRID, 4, known=results, **options)
    assert started[3:] == [["sample_ratio=0.25-s3", "sample_ratio=1-s3"]]


def test_the_job_array_of_the_guide_shares_a_grid(tmp_path) -> None:
    """The script that docs/guides/cluster.md shows, as the two tasks of an array of two."""
    guide = (ROOT / "docs/guides/cluster.md").read_text()
    script = guide.partition("## Many small runs")[2].split("```")[1].removeprefix("sh\n")
    (tmp_path / "array.sh").write_text(script)
    (tmp_path / "grid.py").write_text(GRID.replace("(0.5, 1)", "(1,)") + "seeds = 1\n")
    for task, complete in (("1", 1), ("2", 2)):
        told = os.environ | {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "2"}
        told |= {
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        words = ["bash", "array.sh", "grid.py"]
        done = subprocess.run(words, cwd=tmp_path, env=told, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert len(json.loads((tmp_path / f"part{task}.json").read_text())["rows"]) == complete


def test_results_of_another_experiment_are_not_joined(tmp_path, monkeypatch) -> None:
    written(tmp_path).to_json(tmp_path / "known.json")
    options = {"runs": tmp_path / "new", "evaluate_ratios": (0.5, 1.0), "train": False}

    def joined(base: Config, known: dict[str, object], grid=RATIO_GRID, **more) -> None:
        content = json.loads((tmp_path / "known.json").read_text()) | known
        (tmp_path / "other.json").write_text(json.dumps(content))
        experiment(base, grid, 3, known=[tmp_path / "other.json"], **(options | more))

    joined(small(2), {})
    with pytest.raises(ValueError, match=r"other\.json is of another base: training\.steps differ"):
        joined(small(3), {})
    code = {"sample_ratio=1": {"stem": "other:text"}}
    with pytest.raises(ValueError, match=r"its arm sample_ratio=1 was trained with other code"):
        joined(small(2), {"code": code})
    arms = {"sample_ratio=0.25": {"backbone.sample_ratio": 0.26}, "sample_ratio=1": {"x": 1}}
    with pytest.raises(ValueError, match=r"its arm sample_ratio=0\.25 has other values"):
        joined(small(2), {"arms": arms})
    with pytest.raises(Failed, match="no run is complete yet"):  # more draws are asked for
        joined(small(2), {}, draws=3, evaluate_ratios=(0.5,))
    with pytest.raises(ValueError, match="which part of how many"):
        experiment(small(2), RATIO_GRID, part=(4, 3))
    with pytest.raises(ValueError, match=r"--part 3: write which part of how many, such as 3/8"):
        ablate("grid.py", part="3")
    monkeypatch.setitem(LEVELS, (name := "shapes-v1-medium"), replace(LEVELS[name], revision=99))
    with pytest.raises(ValueError, match=r"sample_ratio=0\.25 was evaluated on shapes-v1-.*/r1"):
        joined(small(2), {})


@pytest.mark.parametrize("file", sorted((ROOT / "notebooks" / "ablations").glob("*.py")))
def test_shipped_grids_can_be_planned(tmp_path, file) -> None:
    if "MIMDET_DATA" in file.read_text() and not os.environ.get("MIMDET_DATA"):
        pytest.skip("MIMDET_DATA names no folder of data")
    assert len(plan(**read_grid(file), runs=tmp_path)) >= 6


# ------------------------------------------------------------------------------- figures


def test_figures_show_every_arm(tmp_path) -> None:
    result = written(tmp_path)
    matrix = show_matrix(result)
    texts = [text.get_text() for text in matrix.axes[0].texts]
    assert texts[:2] == ["30.0", "± 24.8"] and texts.count("32.0") == 2
    assert "sample_ratio=1 at 0.5: 32.0" in matrix.alt_text
    left, right = show_arms(result).axes
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["0.25", "1"]
    assert {text.get_text() for text in left.texts} == {"30.0", "32.0"}
    assert "2.0" in {text.get_text() for text in right.texts}
    assert "100 % of the tokens" in left.get_title("left")
    curves = show_learning_curves(result, "seconds")
    legend = curves.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["0.25", "1"]
    assert "floating point operations" in show_learning_curves(result, "flops").alt_text
    result.curves["flops"] = math.nan
    with pytest.raises(ValueError, match="no such numbers"):
        show_learning_curves(result, "flops")
    with pytest.raises(ValueError, match=r"evaluated at \[0.5, 1.0\]"):
        show_arms(result, ratio=0.3)
    files = save_figures(result, tmp_path / "figures")
    assert {file.name for file in files} >= {"arms.png", "matrix.png", "curves_epoch.png"}
    assert all(file.stat().st_size > 5000 for file in files)


def test_a_stored_experiment_keeps_an_arm_that_failed_and_tuples(tmp_path) -> None:
    grid = {"data.short_sides": [(64,), (64, 96)], "backbone.sample_ratio": [1.0]}
    planned = plan(small(2), grid, seeds=2, runs=tmp_path, evaluate_ratios=(0.5, 1.0))
    for run in planned[1::2]:
        _write_run(run, 0.2 + 0.1 * run.seed)
    result = measured(small(2), planned, {run.name: "no" for run in planned[::2]})
    result.to_json(tmp_path / "result.json")
    stored = Experiment.from_json(tmp_path / "result.json")
    assert stored.table.equals(result.table) and stored.arms[1].values == result.arms[1].values
    assert stored.summary()["n"].tolist() == result.summary()["n"].tolist() == [0, 0, 2, 2]
    assert stored.markdown(["box_ap"]) == result.markdown(["box_ap"])
    assert "| 64-96 |" in stored.markdown(["box_ap"])
    assert len(show_arms(stored).axes) == 2


def test_shipped_result_is_read(tmp_path) -> None:
    file = ROOT / "notebooks" / "results" / "claims" / "sample_ratio.json"
    stored = Experiment.from_json(file)
    content = json.loads(file.read_text())
    again = [row["mean"] for row in content["summary"]["box_ap"]]
    assert stored.summary()["mean"].tolist() == pytest.approx(again)
    assert stored.about["hardware"] == content["hardware"]
    with pytest.raises(ValueError, match="not the result of an experiment"):
        Experiment.from_json(ROOT / "notebooks" / "results" / "probe.json")


# ------------------------------------------------------------------------------- real runs

CELL = """
def strongest(tokens, grid, generator):
    return tokens.norm(dim=1)
grid = {"backbone.sampler": ["random", strongest]}
result = experiment(base, grid, seeds=2, name="samplers", runs=runs, evaluate_ratios=(0.5, 1))
print(result.markdown())
"""
NOTEBOOK = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it as ignored
from IPython.core.interactiveshell import InteractiveShell
from mimdet.config import load_config
from mimdet.experiments.experiment import experiment
names = dict(experiment=experiment, base=load_config(sys.argv[1]), runs=sys.argv[2])
InteractiveShell.instance(user_ns=names, colors="NoColor").run_cell(sys.argv[3])
"""
STEPS = 60  # one of two runs must not be done before the other has begun


def base_config() -> Config:
    cfg = small(STEPS)
    cfg.training.evaluate_every_steps = STEPS // 2
    return cfg


def steps_done(run: Path) -> int:
    rows = MetricsFile(run / "metrics.jsonl").read()
    return rows[-1]["step"] if rows else 0


def stop_in_the_middle(folder: Path, runs: list[Path], number: int) -> str:
    """Start the cell as a notebook's kernel does; signal it when its runs have done some steps.

    What it printed. All runs end soon, and every step they did is saved.
    """
    save_config(base_config(), folder / "base.json")
    words = [str(folder / "base.json"), str(folder / "runs"), CELL]
    begun = {run: steps_done(run) for run in runs}
    command = [sys.executable, "-c", NOTEBOOK, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    parent = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    wait_until(lambda: all(steps_done(run) >= begun[run] + 2 for run in runs), "steps")
    parent.send_signal(number)
    printed, _ = parent.communicate(timeout=60)
    wait_until(lambda: not any(in_use(run) for run in runs), "the end of the runs", 60)
    done = [steps_done(run) for run in runs]
    assert [CheckpointStore(run / "checkpoints").steps()[-1] for run in runs] == done
    assert max(done) < STEPS
    return printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("experiment")


@pytest.fixture(scope="module")
def interrupted(folder) -> Experiment:
    """The cell: SIGINT in the middle, SIGKILL of the notebook's process later, then to its end."""
    runs = [folder / "runs" / "samplers" / f"sampler={name}-s0" for name in ("random", "strongest")]
    printed = stop_in_the_middle(folder, runs, signal.SIGINT)
    assert "stopped: 0 of 4 runs in" in printed and "the same call resumes them" in printed
    assert "Traceback" not in printed
    stop_in_the_middle(folder, runs, signal.SIGKILL)
    return call(folder)


def call(folder: Path, **options) -> Experiment:
    grid = {"backbone.sampler": ["random", strongest]}
    options = {"seeds": 2, "evaluate_ratios": (0.5, 1), **options}
    return experiment(base_config(), grid, name="samplers", runs=folder / "runs", **options)


def test_all_is_complete_after_ctrl_c_and_a_killed_notebook(interrupted, folder, tmp_path) -> None:
    result = interrupted
    table = result.table
    assert len(table) == 8 and result.errors == {}
    key = ["backbone.sampler", "seed", "evaluate_ratio"]
    expected = itertools.product(("random", "strongest"), (0, 1), (0.5, 1.0))
    assert set(table[key].itertuples(index=False, name=None)) == set(expected)
    assert table["box_ap"].notna().all() and (table["steps"] == STEPS).all()
    assert (table["cpu_seconds"] > 0.5).all() and (table["wall_seconds"] > 0.5).all()
    counts = result.curves.groupby(["arm", "seed"])["step"].agg(list)
    assert all(steps == list(range(1, STEPS + 1)) for steps in counts)
    assert result.markdown().count("\n| ") == 5  # the rule below the headings, and four rows
    result.to_json(tmp_path / "result.json")
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["command"].startswith("mimdet.experiment(base, [{'backbone.sampler': 'random'}")
    assert content["data"] == ["shapes-v1-medium@64/r1"] and content["seeds"] == [0, 1]
    assert "CPU cores" in content["hardware"] and content["environment"]["torch"]
    assert content["base"]["training"]["steps"] == STEPS
    assert [row["pairs"] for row in content["summary"]["box_ap"]] == [0, 0, 2, 2]
    runs = folder / "runs" / "samplers"
    own = runs / "sampler=strongest-s0" / "slots" / "sampler.py"
    assert "tokens.norm(dim=1)" in own.read_text()
    assert not (runs / "sampler=random-s0" / "slots").exists()


def test_complete_runs_are_not_touched(interrupted, folder, capsys) -> None:
    def written_at() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}

    before = written_at()
    again = call(folder)
    assert capsys.readouterr().out == "" and again.table.equals(interrupted.table)
    assert len(call(folder, seeds=1, evaluate_ratios=(1,)).table) == 2
    assert written_at() == before

    def strongest(tokens, grid, generator):  # other code under the same name
        return -tokens.norm(dim=1)

    grid = {"backbone.sampler": ["random", strongest]}
    with pytest.raises(ValueError, match=r"backbone.sampler: \w+:strongest -> \w+:strongest"):
        experiment(base_config(), grid, 2, name="samplers", runs=folder / "runs")


@pytest.fixture(scope="module")
def one_at_a_time(tmp_path_factory) -> Experiment:
    """An arm that cannot train, then one of the others again: alone and undisturbed."""
    grid = [{"backbone.embed_dim": 36}, {"backbone.sampler": strongest}]
    options = {"runs": tmp_path_factory.mktemp("serial"), "evaluate_ratios": (0.5, 1)}
    return experiment(base_config(), grid, 1, name="serial", processes=1, **options)


def test_two_at_once_interrupted_twice_equal_one_at_a_time(interrupted, one_at_a_time) -> None:
    both = []
    for result in (interrupted, one_at_a_time):
        scores = ["evaluate_ratio", "box_ap", "mask_ap", "box_ap_large"]
        course = ["step", "loss", "box_ap"]
        for rows, columns in ((result.table, scores), (result.curves, course)):
            chosen = (rows["seed"] == 0) & (rows["backbone.sampler"] == "strongest")
            both.append(rows[chosen][columns].reset_index(drop=True))
    assert len(both[0]) == 2 and both[0].equals(both[2])
    assert len(both[1]) == STEPS and both[1].equals(both[3])


def test_failing_arm_is_reported_and_the_others_go_on(one_at_a_time) -> None:
    ((name, error),) = one_at_a_time.errors.items()
    assert name == "embed_dim=36,sampler=random-s0" and error.startswith("embed_dim=36")
    assert len(one_at_a_time.table) == 2
    assert one_at_a_time.summary()["n"].tolist() == [0, 0, 1, 1]
    assert f"Failed: {name}: embed_dim=36" in one_at_a_time.markdown()
    assert "Traceback" in (one_at_a_time.folder / "logs" / f"{name}.txt").read_text()
