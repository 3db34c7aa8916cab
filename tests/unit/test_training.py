"""Training: groups and schedules by hand, runs, checkpoints, and exact resumption."""

import json
import os
import signal
import threading
import time

import pytest
import torch

import mimdet
from mimdet import presets
from mimdet.analysis.evaluate import evaluate
from mimdet.data.coco import build_dataset
from mimdet.data.loader import TrainLoader
from mimdet.data.shapes import ShapesCOCO
from mimdet.files import read_json, remove_leftovers
from mimdet.models.official import export_detectron2, save_detector
from mimdet.models.rcnn import pad_and_normalise
from mimdet.models.weights import load_mae_model
from mimdet.training.checkpoints import Checkpoint
from mimdet.training.initial import align_stem, initialise, teach_c4, warm_start
from mimdet.training.optim import (
    Schedule,
    build_optimizer,
    parameter_groups,
    rate_factor,
    scaled_rate,
)
from mimdet.training.pretrain import pretrain
from mimdet.training.run import CheckpointStore, TrainingStopped, load_detector, stored_config
from mimdet.training.train import extend, fit, resume, train
from tests.small import assert_same_end, small, small_mae, weights_of

# ---------------------------------------------------------------- optimiser


def test_scaled_rate_reproduces_both_configurations_of_the_paper():
    t = presets.mimdet_base().training
    assert scaled_rate(t) == pytest.approx(8e-5)  # batch 64
    t.batch_size, t.accumulate = 16, 1
    assert scaled_rate(t) == pytest.approx(4e-5)  # batch 16: square root
    t.learning_rate_exponent = 1.0
    assert scaled_rate(t) == pytest.approx(2e-5)  # linear


def test_three_rates_and_no_decay_for_one_dimensional_parameters():
    cfg = small()
    cfg.training.rate_multiplier = 2.0
    model = mimdet.build_detector(cfg)
    groups = parameter_groups(model, cfg.training)
    rate = scaled_rate(cfg.training)
    assert {g["part"]: g["lr"] for g in groups} == pytest.approx(
        {"stem": rate, "encoder": rate / 2, "rest": rate * 2}
    )
    shapes = dict(model.named_parameters())
    named = [name for g in groups for name in g["names"]]
    assert sorted(named) == sorted(n for n, p in shapes.items() if p.requires_grad)
    for g in groups:
        assert all((shapes[n].ndim > 1) == (g["weight_decay"] > 0) for n in g["names"])
    assert "backbone.encoder.pos_embed" not in named


def test_muon_moves_a_matrix_equally_far_in_all_directions_and_a_vector_as_adam_does():
    cfg = small()
    cfg.training.optimizer, cfg.training.weight_decay = "muon", 0.0
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 16, 3), torch.nn.Linear(64, 32))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = build_optimizer(model, cfg.training)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    # Some versions of timm's Muon write the update into the gradient.
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    moved = {name: before[name] - value for name, value in model.state_dict().items()}
    rate = optimizer.param_groups[0]["lr"]
    for name, largest in (("0.weight", 36), ("1.weight", 64)):
        # The singular values of an orthogonal matrix are 1; the iteration that finds it ends
        # within a third of them. Scaled to the size of AdamW's update: .2 * sqrt(larger side).
        directions = torch.linalg.svdvals(moved[name].flatten(1)) / (rate * 0.2 * largest**0.5)
        assert (directions - 1).abs().max() < 0.35
        assert torch.linalg.svdvals(gradients[name].flatten(1)).std() > 0.2
    for name in ("0.bias", "1.bias"):  # Adam's first step: every number equally far, by its sign
        assert torch.equal(moved[name].sign(), gradients[name].sign())
        assert moved[name].abs() == pytest.approx(float(moved[name].abs().mean()), rel=1e-3)
        assert rate <= moved[name].abs().mean() < 2 * rate


def test_the_last_steps_see_all_tokens_where_that_is_asked_for(tmp_path):
    cfg = small(steps=4)
    cfg.data.augment, cfg.data.short_sides = "none", (64,)  # 16 tokens an image
    cfg.training.whole_at_end, cfg.backbone.sample_ratio = 0.5, 0.25
    model, kept = mimdet.build_detector(cfg), []

    def note(module, inputs, outputs):
        if module.training:
            kept.append(len(outputs[0]))  # of the first image

    model.backbone.encoder.register_forward_hook(note)
    list(train(cfg, tmp_path / "run", model=model))
    assert kept == [4, 4, 4, 4, 16, 16, 16, 16]  # two micro-batches a step
    cfg.training.whole_at_end = 1.5
    with pytest.raises(ValueError, match=r"whole_at_end=1.5 is a share of the steps"):
        next(train(cfg, tmp_path / "other"))


def test_the_paper_s_presets_train_by_adamw():
    for name, preset in presets.PRESETS.items():
        expected = "muon" if name.startswith("tiny") or name == "nuclei" else "adamw"
        assert preset().training.optimizer == expected, name


def test_schedules_by_hand():
    t = presets.mimdet_base().training
    steps = [rate_factor(s, 360, 10, t) for s in (0, 9, 269, 270, 329, 330)]
    assert steps == pytest.approx([0.1, 1, 1, 0.1, 0.1, 0.01])
    t.schedule = "cosine"
    assert rate_factor(0, 100, 0, t) == 1
    assert rate_factor(50, 100, 0, t) == pytest.approx(0.5)
    assert rate_factor(99, 100, 0, t) < 0.001
    t = small(0).training
    t.epochs, t.evaluate_every_steps, t.evaluate_every, t.checkpoint_every_steps = 2.0, 0, 1.0, 0
    schedule = Schedule(t, 10)  # 2 epochs of 10 images, 4 a step
    assert (schedule.total, schedule.evaluate_every, schedule.checkpoint_every) == (5, 2, 1)
    assert [schedule.evaluates(step) for step in range(6)] == [0, 0, 1, 0, 1, 1]
    assert schedule.factor(1) == pytest.approx(0.5)  # of two steps of warm-up


def test_a_tenth_of_a_short_epoch_is_not_every_step():
    """270 images, 32 a step, are 8.4 steps an epoch: 400 steps are evaluated once an epoch, not 400
    times. 1,562 steps of one epoch are still evaluated ten times, and 0 is still the end alone."""
    t = presets.tiny_mae().training
    assert (t.step_images, t.evaluate_every) == (64, 0.1)
    assert Schedule(t, 100_000).evaluate_every == 156
    t.steps, t.accumulate, t.batch_size = 400, 1, 32
    assert Schedule(t, 270).evaluate_every == 8
    t.evaluate_every = 0.0
    assert Schedule(t, 270).evaluate_every == 0


# ---------------------------------------------------------------- run directory


def test_checkpoints_are_complete_or_absent(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3):
        store.save(Checkpoint(step, {"w": torch.full((2,), step)}, {"best": 0.0}))
    assert store.steps() == [2, 3]
    store.point("best", "000002")

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("mimdet.training.checkpoints.torch.save", full_disk)
    with pytest.raises(OSError, match="No space"):
        store.save(Checkpoint(4, {"w": torch.zeros(2)}, {}))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000002", "000003", "best", "last"]
    monkeypatch.undo()
    for step in (4, 5):
        store.save(Checkpoint(step, {"w": torch.zeros(2)}, {}))
    assert store.steps() == [2, 4, 5]  # the best one stays
    assert store.load_last().step == 5


def test_half_of_a_checkpoint_does_not_count(tmp_path):
    """A process that is killed while it deletes or writes leaves the others usable."""
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(Checkpoint(step, {"w": torch.full((2,), step)}, {}))
    (tmp_path / "000002" / "model.safetensors").unlink()
    (tmp_path / "000001.partial-4999999-7-old").mkdir()
    assert store.steps() == [1] and store.load_last().step == 1
    store.save(Checkpoint(2, {"w": torch.zeros(2)}, {}))
    assert store.steps() == [1, 2]
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000001", "000002", "last"]


def test_what_another_thread_writes_is_no_leftover(tmp_path):
    own = [tmp_path / f"a.partial-{os.getpid()}{end}" for end in ("", f"-{threading.get_ident()}")]
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    theirs = tmp_path / f"b.partial-{os.getpid()}-{other.ident}"
    for path in (*own, theirs):
        path.touch()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [theirs]
    done.set()
    other.join()
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- training


def run_to_the_end(path, signal_at_forward: int | None = None) -> int:
    """Train; optionally send SIGINT in the n-th forward pass (two a step), then resume."""
    forwards = 0
    stops = 0

    def interrupt(*_):
        nonlocal forwards
        forwards += 1
        if forwards == signal_at_forward:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # let the interpreter run the handler here

    torch.manual_seed(0)
    model = mimdet.build_detector(small())
    model.neck.register_forward_hook(interrupt)  # the stem's statistics are already updated
    try:
        for _ in train(small(), path, model=model):
            pass
    except TrainingStopped:
        stops += 1
        torch.manual_seed(99)  # nothing may depend on the fresh process' state
        for _ in train(small(), path, model=mimdet.build_detector(small())):
            pass
    return stops


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run_to_the_end(path) == 0
    return path


# Forward 1 is the first micro-batch of step 1, forward 2 its second one; the evaluation after
# step 3 follows forward 6.
@pytest.mark.parametrize("forward", [1, 3, 4, 5, 7, 8])
def test_resumed_run_is_bit_identical(tmp_path, undisturbed, forward):
    assert run_to_the_end(tmp_path / "run", signal_at_forward=forward) == 1
    assert_same_end(tmp_path / "run", undisturbed)


def test_leaving_the_loop_saves_and_puts_signal_handlers_back(tmp_path):
    for step in train(small(), tmp_path / "run"):
        if step.number == 3:
            break
    assert CheckpointStore(tmp_path / "run" / "checkpoints").steps()[-1] == 3
    assert [step.number for step in train(small(), tmp_path / "run")] == [4]
    before = signal.getsignal(signal.SIGINT)
    steps = train(small(), tmp_path / "other")
    next(steps)
    assert signal.getsignal(signal.SIGINT) != before
    steps.close()
    assert signal.getsignal(signal.SIGINT) == before


def test_non_finite_loss_stops_with_image_ids_and_keeps_the_last_step(tmp_path):
    model = mimdet.build_detector(small())
    with torch.no_grad():
        model.roi_heads.box_head.cls_score.bias.fill_(float("nan"))
    poisoned = train(small(), tmp_path / "poisoned", model=model)
    with pytest.raises(FloatingPointError, match=r"step 1: .*images \["):
        next(poisoned)
    assert CheckpointStore(tmp_path / "poisoned" / "checkpoints").steps() == []  # nothing to keep


def detector_with(*classes):
    cfg = small()
    cfg.detector.num_classes = len(classes)
    model = mimdet.build_detector(cfg)
    model.categories = list(classes)
    return model


def test_classes_are_kept_by_name_by_hand(capsys):
    """b is label 1 there and 0 here: row 1 becomes row 0, of boxes the rows 4 to 7; behind the
    classes stands the background."""
    there, here = detector_with("a", "b", "c"), detector_with("b", "x", "y")
    theirs, before = there.state_dict(), {k: v.clone() for k, v in here.state_dict().items()}
    warm_start(here, theirs, "there", there.categories)
    head, after = "roi_heads.box_head", here.state_dict()
    scores = [theirs[f"{head}.cls_score.weight"][i] for i in (1, 3)]
    assert after[f"{head}.cls_score.weight"][[0, 3]].equal(torch.stack(scores))
    assert after[f"{head}.bbox_pred.weight"][:4].equal(theirs[f"{head}.bbox_pred.weight"][4:8])
    mask = "roi_heads.mask_head.predictor.mask_fcn_logits.weight"
    assert after[mask][0].equal(theirs[mask][1])
    for name, new in ((f"{head}.cls_score.weight", slice(1, 3)), (mask, slice(1, 3))):
        assert after[name][new].equal(before[name][new])
    assert after["neck.pyramid.inner_blocks.0.0.weight"].equal(
        theirs["neck.pyramid.inner_blocks.0.0.weight"]
    )
    printed = capsys.readouterr().out
    assert "classes kept, by name: b\n" in printed and "classes new: x, y\n" in printed
    assert "new: roi_heads.box_head.cls_score.weight, but for the classes kept" in printed
    report = warm_start(detector_with("c", "b"), theirs, "there", there.categories)
    assert report.new == []  # every class is known, in another order
    report = warm_start(detector_with("x", "y", "z"), theirs, "there", there.categories)
    assert len(report.new) == 6  # as many classes, but others: weights and biases of three layers


@pytest.mark.parametrize("source", ["run", "run/checkpoints/000001", "file.safetensors", "tiny"])
def test_a_start_says_which_classes_it_keeps(tmp_path, monkeypatch, capsys, source):
    monkeypatch.chdir(tmp_path)
    first = small(1)
    first.data.shapes_level = "shapes-v1-easy"  # 6 of the 12 classes
    save_detector(fit(first, "run", runs="."), "file.safetensors")
    model = mimdet.build_detector(presets.tiny() if source == "tiny" else small())
    names = ShapesCOCO("shapes-v1-medium", 64, 1).categories
    model.categories = [*names[:-1], "unicorn"]
    initialise(model, source)
    easy = ShapesCOCO("shapes-v1-easy", 64, 1).categories
    kept = [name for name in names[:-1] if source == "tiny" or name in easy]
    printed = capsys.readouterr().out
    assert f"classes kept, by name: {', '.join(kept)}\n" in printed
    assert "unicorn\n" in printed.partition("classes new:")[2]


def test_a_released_file_of_80_classes_knows_those_of_coco(tmp_path, capsys):
    export_detectron2(detector_with(*map(str, range(80))), tmp_path / "released.pth")
    initialise(detector_with("cup", "robot"), tmp_path / "released.pth")
    printed = capsys.readouterr().out
    assert "classes kept, by name: cup\n" in printed and "classes new: robot\n" in printed


def test_frozen_parts_end_as_they_began(tmp_path, capsys):
    """The numbers of the neck, with the statistics of its batch norm, and of the encoder stay."""
    first = fit(small(2), "first", runs=tmp_path).state_dict()
    cfg = small(2)
    cfg.training.init_from, cfg.training.freeze = str(tmp_path / "first"), ("encoder", "neck")
    list(train(cfg, tmp_path / "second", announce=True))
    assert "frozen  encoder, neck and fixed tables: " in capsys.readouterr().out
    moved = {
        name for name, v in weights_of(tmp_path / "second").items() if not v.equal(first[name])
    }
    assert not [name for name in moved if name.startswith(("backbone.encoder.", "neck."))]
    assert any(name.startswith("neck.") and name.endswith("running_mean") for name in first)
    for part in ("backbone.stem.", "backbone.decoder.", "rpn.", "roi_heads."):
        assert any(name.startswith(part) for name in moved)


@pytest.mark.parametrize(
    ("names", "source", "said"),
    [
        (("encodr",), "first", "no part 'encodr'; there are .*stem, encoder, decoder"),
        (("backbone", "neck", "rpn", "roi_heads"), "first", "nothing left to train"),
        (("encoder",), "", r"training.init_from names no weights .*\(--init-from\)"),
        (("encoder",), "c4", "training.c4_first teaches the backbone that training.freeze keeps"),
        (("stem", "roi_heads"), "first", "holds nothing for .* first roi_heads.box_head.cls_score"),
    ],
)
def test_what_cannot_be_frozen_is_said(tmp_path, names, source, said):
    first, cfg = small(1), small(1)
    first.data.shapes_level = "shapes-v1-easy"  # half of the classes
    fit(first, source or "first", runs=tmp_path)
    cfg.training.init_from, cfg.training.freeze = source and str(tmp_path / source), names
    cfg.detector.c4_loss = cfg.training.c4_first = int(source == "c4")
    with pytest.raises(ValueError, match=said):
        next(train(cfg, tmp_path / "second"))


# ---------------------------------------------------------------- slots written in a cell


def stem_response_sampler(tokens, grid, generator):
    """Keep the tokens where the stem responds most, with a little noise."""
    noise = torch.rand(len(tokens), generator=generator, device=tokens.device)
    return tokens.norm(dim=1) + 0.1 * noise


def easy_scenes(cfg, split):
    """A data set written in a cell."""
    from mimdet import ShapesCOCO

    return ShapesCOCO("shapes-v1-easy", cfg.shapes_size, 8 if split == "train" else 3, split)


def test_parts_and_data_from_a_cell_are_trained_kept_and_reloaded_only_with_consent(tmp_path):
    run, cfg = tmp_path / "own", small(5)
    parts = {"sampler": stem_response_sampler, "dataset": easy_scenes}
    steps = train(cfg, run, **parts)
    assert [next(steps).number for _ in range(3)] == [1, 2, 3]
    steps.close()
    assert cfg.detector.num_classes == 6 and ":easy_scenes" in cfg.data.source
    for reader in (load_detector, lambda path: next(resume(path))):
        with pytest.raises(PermissionError, match="trust_code=True"):
            reader(run)
    assert len(list(resume(run, trust_code=True))) == 2
    model = load_detector(run, trust_code=True)
    assert model.backbone.sampler.__name__ == "stem_response_sampler"
    held_out = build_dataset(model.config.data, "val")  # in any process that has read the run
    recorded = read_json(run / "eval.json")
    assert (held_out.version, len(held_out)) == (recorded["data"], 3)
    assert recorded["step"] == 5 and isinstance(read_json(run / "predictions.json"), list)
    assert read_json(run / "environment.json")["data"].startswith("shapes-v1-easy@64")
    assert load_detector(run, checkpoint=2, trust_code=True)
    slot = run / "slots" / "sampler.py"
    slot.write_text(slot.read_text() + "# edited\n")
    with pytest.raises(ValueError, match="sha256"):
        load_detector(run, trust_code=True)


def test_a_finished_run_is_trained_further_in_a_folder_of_its_own(tmp_path, capsys):
    run, cfg = tmp_path / "run", small(2)
    next(train(cfg, run, sampler=stem_response_sampler))
    with pytest.raises(ValueError, match=r"run is stopped, at step 1 of 2: .*mimdet resume .*run`"):
        extend(run, 3)
    list(resume(run, trust_code=True))
    more = extend(run, 3)
    assert more == tmp_path / "run+3"
    steps = resume(more, trust_code=True)
    rates = [next(steps).rate / scaled_rate(cfg.training)]
    assert "new         0" in capsys.readouterr().out  # every tensor is the run's
    steps.close()
    rates += [
        step.rate / scaled_rate(cfg.training) for step in resume(extend(run, 3), trust_code=True)
    ]
    assert rates == pytest.approx([0.5, 0.75, 0.25])  # two of warm-up; cosine: 1, 3/4, 1/4
    assert stored_config(more).training.seed == 1


def test_a_configuration_from_a_file_runs_no_code_without_consent(tmp_path):
    cfg = small(1)
    cfg.backbone.sampler = "mimdet.models.sampling:block_sampler"
    list(train(cfg, tmp_path / "run"))
    for reader in (load_detector, lambda path, **trust: next(resume(path, **trust))):
        with pytest.raises(PermissionError, match=r"backbone\.sampler.*block_sampler"):
            reader(tmp_path / "run")
    assert load_detector(tmp_path / "run", trust_code=True)


OUTSIDE = 3.0


def leaning_sampler(tokens, grid, generator):
    return tokens[:, 0] * OUTSIDE


def test_a_run_goes_on_with_the_code_and_the_sizes_it_began_with(tmp_path):
    run, cfg = tmp_path / "own", small()
    next(train(cfg, run, model=mimdet.build_detector(cfg, sampler=stem_response_sampler)))
    with pytest.raises(ValueError, match="other code for: sampler"):
        next(train(cfg, run))
    again = mimdet.build_detector(cfg, sampler=stem_response_sampler)
    assert next(train(cfg, run, model=again)).number == 2
    assert len(list(resume(run, trust_code=True))) == 2
    cfg.backbone.sample_ratio = 0.25
    with pytest.raises(ValueError, match=r"backbone.sample_ratio: 0.5 -> 0.25\nBuild it again"):
        next(train(cfg, tmp_path / "other", model=again))
    assert not (tmp_path / "other").exists()


def test_the_best_checkpoint_is_named_even_after_a_kill(tmp_path, monkeypatch):
    """Killed between an evaluation and its record: it is done again, and is the best one again."""
    scores = iter([0.1, 0.2, 0.2])

    def scored(*arguments, **options):
        evaluation = evaluate(*arguments, **options)
        evaluation.metrics.box["AP"] = next(scores)
        return evaluation

    monkeypatch.setattr("mimdet.training.train.evaluate", scored)
    run, cfg = tmp_path / "run", small()
    list(train(cfg, run))  # evaluated after steps 3 and 4
    best = run / "checkpoints" / "best"
    assert best.read_text().strip() == "000004"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert "evaluation" in json.loads(lines[-1])
    (run / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    best.unlink()
    list(train(cfg, run))
    assert best.read_text().strip() == "000004"
    assert load_detector(run, checkpoint="best")
    assert (run / "metrics.jsonl").read_text().count('"evaluation"') == 2


def test_validation_data_are_opened_before_anything_is_written(tmp_path):
    cfg = small()
    cfg.data.source = "coco"
    scenes = mimdet.ShapesCOCO(size=64, length=4)
    with pytest.raises(ValueError, match=r"data.val_json is empty"):
        next(train(cfg, tmp_path / "run", train_data=scenes))
    other = mimdet.ShapesCOCO(size=64, length=2, split="val")
    other.categories = [*other.categories[:-1], "unicorn"]
    with pytest.raises(ValueError, match="unicorn"):
        next(train(small(), tmp_path / "run", val_data=other))
    assert not (tmp_path / "run").exists()


def test_a_model_or_a_part_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="OUTSIDE from outside itself"):
        next(train(small(1), tmp_path / "x", sampler=leaning_sampler))
    cfg = small(1)
    cfg.detector.num_classes = 3
    model = mimdet.build_detector(cfg)
    with pytest.raises(ValueError, match=r"detector\.num_classes=12"):
        next(train(cfg, tmp_path / "x", model=model))
    with pytest.raises(ValueError, match="the model is complete: give sampler to build_detector"):
        next(train(cfg, tmp_path / "x", model=model, sampler=stem_response_sampler))
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------- a stem that speaks as the MAE


def test_an_aligned_stem_gives_the_tokens_of_the_patch_embedding(tmp_path):
    pre = small_mae()
    list(pretrain(pre, tmp_path / "mae"))
    cfg = small(steps=1)
    cfg.training.init_from, cfg.training.align_stem = str(tmp_path / "mae"), 80
    next(train(cfg, tmp_path / "run"))
    model, mae = mimdet.build_detector(cfg), load_mae_model(tmp_path / "mae/mae.safetensors")
    images = [ShapesCOCO("shapes-v1-medium", 64, 8, "val").image(i) for i in range(8)]

    def distance(detector):
        batch = pad_and_normalise(images, mae).tensors
        with torch.no_grad():
            wanted = mae.patch_embed(batch)
            return float((detector.backbone.stem(batch).tokens - wanted).var() / wanted.var())

    before = distance(model)
    loader = TrainLoader(build_dataset(cfg.data, "train"), cfg.data, 2, 1, 0)
    batches = [batch for step in loader.batches(0, 80) for batch in step]
    errors = align_stem(model, tmp_path / "mae", batches)
    assert len(errors) == 80
    assert distance(model) < 0.8 < 0.95 < before
    assert distance(load_detector(tmp_path / "run")) < 0.85  # one step after it was aligned


def test_only_a_stem_can_be_aligned(tmp_path):
    list(pretrain(small_mae(), tmp_path / "mae"))
    cfg = presets.tiny_vitdet()
    cfg.backbone.embed_dim, cfg.backbone.num_heads = 32, 2
    model = mimdet.build_detector(cfg)
    with pytest.raises(ValueError, match=r"align_stem=1.*vitdet"):
        align_stem(model, tmp_path / "mae", [None])
    assert align_stem(model, tmp_path / "mae", []) == []
    cfg = small()
    cfg.backbone.embed_dim = 64
    with pytest.raises(ValueError, match="none of width 64"):
        align_stem(mimdet.build_detector(cfg), tmp_path / "mae", [None])
    cfg.training.align_stem = 5
    with pytest.raises(ValueError, match=r"training.init_from names none"):
        next(train(cfg, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- c4 before all else


def test_c4_learns_before_all_else(tmp_path):
    cfg = small(steps=1)
    cfg.training.c4_first = 30
    with pytest.raises(ValueError, match=r"c4_first=30 .* give detector.c4_loss a weight"):
        next(train(cfg, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    cfg.detector.c4_loss = 1.0
    model = mimdet.build_detector(cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loader = TrainLoader(build_dataset(cfg.data, "train"), cfg.data, 2, 1, 0)
    losses = teach_c4(model, (batch for step in loader.batches(0, 30) for batch in step), 30)
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    moved = {k.partition(".")[0] for k, v in model.state_dict().items() if not v.equal(before[k])}
    assert moved == {"backbone", "c4_classes"}
    assert "loss_c4" in next(train(cfg, tmp_path / "run")).losses


def test_c4_is_not_taught_by_one_of_several_whose_norms_wait_for_each_other(tmp_path, monkeypatch):
    cfg = presets.tiny_resnet()
    cfg.training.c4_first, cfg.detector.c4_loss = 5, 1.0
    monkeypatch.setattr("mimdet.processes.world", lambda: 2)
    with pytest.raises(ValueError, match=r"BatchNorm .* waits for all: begin the run with one"):
        next(train(cfg, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
