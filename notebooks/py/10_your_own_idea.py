# %% [markdown]
# # 10 · Your own idea: from a cell to a row in the table
#
# *Which tokens should the encoder see?* The paper draws them at random. You may have a better
# idea, or another stem, neck or backbone. **Afterwards you can** put yours into one cell, run
# all, and find it in a table beside the paper's, with seeds, paired differences and an
# interval. No file of the library is edited, and the code you wrote is kept with every run.
#
# | | quick (`MODE = "quick"`) | full (`MODE = "full"`) |
# |---|---|---|
# | study | an hour, after 02, 09 | |
# | what you see | 2 samplers × 2 seeds, 20 steps each from the shipped `tiny` weights | the same call on COCO, as long as the preset says |
# | time | about a minute on two cores, 68 s of CPU time | days: 4 trainings of `STEPS` or the full preset |
# | memory, disk | about 1.5 GB (two trainings at a time) | as one training; 23 GB |
# | needs | nothing but the kit | GPUs, COCO in `MIMDET_COCO`, `mimdet download mae-base-full mimdet-base` |
#
# **What it can show:** that your idea runs, trains, is saved, and how a comparison is read. **What
# it cannot show:** that an idea is good. Two seeds of 20 steps are far too few, as section 4
# computes.

# %% tags=["parameters"]
MODE = "quick"  # "full": COCO and GPUs
START = ""  # weights that every run starts from; "": `tiny`, in full mode MAE's ViT-B
STEPS = 0  # training steps of each run; 0: 20 in quick mode, the preset's own in full mode
SEED = 0  # the first of the seeds
SOLUTIONS = False  # True: the answers at the end run too

# %% [markdown]
# ## 1 · The idea
#
# A **sampler** gives every token of one image a score; the highest scores are kept. It gets the
# stem's tokens `(L, D)`, their grid `(h, w)` with `L = h * w`, and a generator for what is random.
# It may use `torch`, `F`, `nn`, `Tensor` and `math`, and must import all else inside, because the
# function's text is what a run keeps. **This is the cell to edit.**

# %%
import torch
import torch.nn.functional as F
from torch import nn


def strongest(tokens, grid, generator):  # (L, D), (h, w), generator -> scores (L,)
    return tokens.norm(dim=1)  # where the stem responds most


IDEA = strongest

# %% [markdown]
# ## 2 · Look at it before training anything
#
# Does the idea do what you had in mind? Here are its kept tokens beside those of the library's
# three samplers (`mimdet/models/sampling.py`), a quarter each, with the stem of a finished
# detector.

# %%
from mimdet import check
from mimdet import select
from mimdet.models.sampling import SAMPLERS, token_grid
from mimdet.notebook import open_detector, open_pictures

model = open_detector(MODE)
batch = model.prepare(open_pictures("", MODE, count=4).images[3])
image = batch.images[0]
with torch.no_grad():
    features = model.backbone.stem(batch.tensors).tokens[0]  # (D, h, w), padding included
grid = token_grid(*image.shape[1:])
tokens = features[:, : grid[0], : grid[1]].flatten(1).T.cpu()  # (L, D): its own tokens

# %%
from mimdet.viz import show_arms, show_sample

samples = {}
for name, sampler in {**SAMPLERS, IDEA.__name__: IDEA}.items():
    scores = sampler(tokens, grid, torch.Generator().manual_seed(SEED))
    samples[name] = select([scores], [grid], grid, ratio=0.25)
show_sample(image, samples)

# %%
scores = IDEA(tokens, grid, torch.Generator().manual_seed(SEED))
check("one score per token", tuple(scores.shape) == (len(tokens),), f"{len(tokens)} tokens")
check("every score is a number", torch.isfinite(scores).all(), "NaN cannot be ranked")
again = IDEA(tokens, grid, torch.Generator().manual_seed(SEED))
check("same generator, same scores", torch.equal(scores, again), "use the generator, or nothing")
counts = {name: len(sample.keep[0]) for name, sample in samples.items()}
check("all keep a quarter", set(counts.values()) == {len(tokens) // 4}, "a fair comparison")

# %% [markdown]
# This one does: unlike the others it spends its tokens on objects and leaves the background out.
#
# Now the configuration that all runs share, and one forward pass with the idea in it. Nothing is
# registered: the function is passed in.

# %%
import mimdet
from mimdet.notebook import full_config

base = full_config() if MODE == "full" else mimdet.presets.tiny()
base.backbone.sample_ratio = base.backbone.sample_ratio_eval = 0.25
base.training.init_from = START or base.training.init_from or "tiny"
base.training.seed = SEED
if MODE == "quick":
    base.data.shapes_val = 30
    base.training.batch_size, base.training.accumulate = 2, 1
    base.training.learning_rate, base.training.warmup_steps = 3e-4, 4
    base.training.threads = 1  # of each of the two processes
base.training.steps = STEPS or (20 if MODE == "quick" else base.training.steps)

# %%
own = mimdet.build_detector(base, sampler=IDEA)
example = open_pictures("", MODE, count=1).records[0]
losses = own([example.image], [example.target])
finite = all(torch.isfinite(loss) for loss in losses.values())
check("a training step has five losses", len(losses) == 5 and finite, "all of them numbers")

# %% [markdown]
# ## 3 · The row in the table
#
# `mimdet.experiment` trains every value of the grid with every seed; the first value is what others
# are compared with. Here each run starts from the same detector, sees a quarter of the tokens in
# training **and** in evaluation (at ratio 1 there is nothing to choose), and is scored on the same
# 30 scenes. What is equal in `base` is equal in all runs; runs of one seed see the same images in
# the same order. Each run is a child process with a folder of its own.

# %%
grid_of_runs = {"backbone.sampler": ["random", IDEA]}
together = 2 if MODE == "quick" else 0  # 0: one on each GPU
result = mimdet.experiment(base, grid_of_runs, seeds=2, name="own-idea", draws=1, processes=together)

# %%
columns = ["arm", "mean", "sd", "difference", "difference_low", "difference_high"]
summary = result.summary("box_ap")
print(summary[columns].round(1).to_string(index=False, na_rep="-"))
print(result.table[["arm", "seed", "box_ap", "mask_ap"]].round(1).to_string(index=False))
check("every run is in the table", len(result.table) == 4 and not result.errors)
show_arms(result)

# %% [markdown]
# `result.markdown()` is the same with minutes; `result.curves` holds each run's losses.
#
# ## 4 · Read it honestly
#
# The difference is **paired**: seed by seed, idea minus random, so that what a seed does to both
# cancels. Its interval is Student's: with two pairs it is 9 times the standard deviation to either
# side, so an interval from two seeds says little more than "it ran". How many seeds would tell a
# difference of one AP point, if the spread is what these two pairs suggest?

# %%
from mimdet.experiments.results import t_quantile

random_arm, idea_arm = (arm.label for arm in result.arms)
change = result.difference((idea_arm, 0.25), (random_arm, 0.25))
print(f"{change.mean:+.1f} AP, 95 % interval {change.low:+.1f} to {change.high:+.1f}")
half = {n: t_quantile(n - 1) * change.sd / n**0.5 for n in range(2, 200)}
needed = next((n for n, width in half.items() if width < 1), "more than 199")
print("includes no difference at all:", change.low <= 0 <= change.high)
print("seeds for an interval of +- 1 AP:", needed)
check("two pairs", abs(half[2] - (change.high - change.mean)) < 1e-9, f"t = {t_quantile(1):.1f}")

# %% [markdown]
# And that spread is itself a guess from two numbers. Three more reasons for doubt, which no number
# of seeds removes:
#
# - All runs start from weights that were trained with *random* tokens, in quick mode on
#   thousands of images; these steps see 40. That favours random.
# - 30 scenes are few: all runs share them, so the interval does not contain their luck.
# - Small objects are found on c2 and c3, which come from the stem and never lose a token (notebook
#   00, exercise 3): no sampler can help or harm them.
#
# What would convince: from scratch or from a MAE, the full length, at least five seeds, two ratios,
# the 200 held-out scenes; and then COCO. From a file, for the night: `mimdet ablate FILE.py`.

# %%
import inspect
from pathlib import Path

lines = ["from mimdet import presets", "", "", inspect.getsource(IDEA), "", "base = presets.tiny()"]
lines += [f'grid = {{"backbone.sampler": ["random", {IDEA.__name__}]}}']
lines += ["seeds = 5", "evaluate_ratios = (0.25, 0.5)", ""]
Path("runs/own_idea.py").write_text("\n".join(lines))
print(Path("runs/own_idea.py").read_text())

# %%
from mimdet.experiments.experiment import read_grid
from mimdet.experiments.runs import plan

planned = plan(**read_grid("runs/own_idea.py"), name="own_idea")
for run in planned[:3]:
    print(f"{run.path}: {run.steps} steps, evaluated at {run.ratios}")
check("mimdet ablate runs/own_idea.py would train 10 runs", len(planned) == 10)

# %% [markdown]
# ## 5 · Stop it, continue it
#
# The stop button (■), or Ctrl-C, lets every child save and end; the same call continues where it
# was, bit for bit on a CPU. Complete runs are not trained again. So the same call after the end
# costs nothing, and one with a third seed costs two runs. The folder of a run refuses another
# configuration.

# %%
files = sorted(result.folder.glob("*/metrics.jsonl"))
marks = [file.stat().st_mtime_ns for file in files]
again = mimdet.experiment(base, grid_of_runs, seeds=2, name="own-idea", draws=1, processes=together)
untouched = [file.stat().st_mtime_ns for file in files] == marks
check("nothing was trained again", untouched and again.table.equals(result.table))

# %% [markdown]
# ## 6 · What is kept
#
# The function will be gone from this cell tomorrow; the run must still load. So its source is
# kept in the run's `slots/` with a sha256 (`mimdet/training/slots.py`), and the configuration names
# that hash. Loading such a run executes code, therefore only with consent.

# %%
place = result.folder / f"{result.arms[1].label}-s{SEED}"
print("\n".join(str(path.relative_to(place)) for path in sorted((place / "slots").iterdir())))
print((place / "slots" / "sampler.py").read_text())
try:
    mimdet.load_detector(place)
    refused = False
except PermissionError as error:
    refused = True
    print(error)
check("code of others does not run unasked", refused)

# %%
loaded = mimdet.load_detector(place, trust_code=True)
check("the sampler came back", loaded.backbone.sampler.__name__ == IDEA.__name__)
kept = loaded.backbone.sampler(tokens, grid, torch.Generator().manual_seed(SEED))
check("and scores as before", torch.equal(kept, scores))

# %% [markdown]
# ## 7 · Everything else from a cell
#
# Six things may be your own, each in a few lines. Beside the sampler there are stem, neck, decoder
# fill, loss and data set. A class needs a default for every argument of its constructor, because a
# run makes it anew; the sizes here are those of `tiny`.
#
# A **stem** is a module `(images) -> StemFeatures(c2, c3, tokens)` with D/4, D/2 and D channels at
# strides 4, 8 and 16. This one averages where the paper's stem strides.

# %%
from mimdet.models.stem import StemFeatures


class PoolStem(nn.Module):
    def __init__(self, dim=128):
        super().__init__()
        widths = (3, dim // 8, dim // 4, dim // 2, dim)
        self.stages = nn.ModuleList(nn.Conv2d(*widths[i : i + 2], 3, padding=1) for i in range(4))

    def forward(self, images):
        maps = [images]
        for stage in self.stages:  # each halves the resolution
            maps.append(F.avg_pool2d(F.gelu(F.group_norm(stage(maps[-1]), 1)), 2))
        return StemFeatures(*maps[2:])


# %% [markdown]
# A **neck** is a module `(c2..c5) -> {"p2".."p6"}`, all of the same width, at strides 4 to 64. This
# one hands coarse maps down, without the 3 × 3 convolutions and norms of the FPN.


# %%
class TopDown(nn.Module):
    def __init__(self, widths=(32, 64, 96, 96), channels=48):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths)

    def forward(self, maps):
        levels = [conv(maps[f"c{i}"]) for i, conv in enumerate(self.convs, 2)]
        for i in (2, 1, 0):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], levels[i].shape[2:])
        levels.append(F.max_pool2d(levels[3], 1, stride=2))
        return {f"p{i}": level for i, level in enumerate(levels, 2)}


# %% [markdown]
# A **decoder fill** says what the decoder sees where no token was kept: stem tokens `(B, L, D)` to
# `(B, L, C)`. Between the stem's tokens (version 2 of the paper) and one that knows nothing of the
# image (version 1) lies their mean.


# %%
class MeanFill(nn.Module):
    def __init__(self, dim=128, decoder_dim=96):
        super().__init__()
        self.proj = nn.Linear(dim, decoder_dim)

    def forward(self, stem_tokens):
        mean = stem_tokens.mean(dim=1, keepdim=True)
        return self.proj(mean).expand(-1, stem_tokens.shape[1], -1)


# %% [markdown]
# A **loss** overrides what differs from `Losses` (`mimdet/models/rcnn.py`): `boxes`, `classes` or
# `masks`.

# %%
from mimdet import Losses


class SmoothBoxes(Losses):  # torchvision's, where the paper's is plain L1
    def boxes(self, deltas, truth):
        return F.smooth_l1_loss(deltas, truth, beta=1 / 9, reduction="sum")


# %% [markdown]
# A **data set** is a function `(cfg.data, split) -> data set`; what one has to offer is listed in
# `Dataset` (`mimdet/data/loader.py`). It may open files of yours with `CocoDataset`, or change one
# that exists: here the scenes in fog.


# %%
def foggy(cfg, split):
    from mimdet import ShapesCOCO

    class Foggy(ShapesCOCO):
        version = "foggy scenes, v1"  # what a number of it belongs to

        def __getitem__(self, index):
            record = super().__getitem__(index)
            record.image = record.image // 2 + 100
            return record

    return Foggy(cfg.shapes_level, cfg.shapes_size, cfg.shapes_val, split)


# %% [markdown]
# `mimdet.train` takes them as it takes a sampler (`build_detector` too, but for the data), and keeps
# their code.

# %%
parts = {"stem": PoolStem(), "neck": TopDown(), "fill": MeanFill(), "loss": SmoothBoxes()}
parts["dataset"] = foggy
for slot, part in parts.items():
    short = mimdet.presets.tiny()  # in full mode too: the parts have its sizes
    short.training.steps, short.data.shapes_val = 2, 4
    short.training.batch_size, short.training.accumulate = 2, 1
    for step in mimdet.train(short, f"runs/own-{slot}", **{slot: part}):
        print(f"{slot}: step {step.number}, loss {step.loss:.2f}")
    check(f"two steps with the {slot}", step.number == 2)
back = mimdet.load_detector("runs/own-stem", trust_code=True)
check("the stem came back", type(back.backbone.stem).__name__ == "PoolStem")

# %% [markdown]
# In an experiment each is one more arm: `{"backbone.stem": ["conv", PoolStem]}`. The other fields
# are `backbone.decoder_fill`, `detector.neck`, `detector.loss`, and `backbone.kind` for a whole
# backbone. `{"data.source": [foggy], "backbone.sample_ratio": [0.25, 0.5]}` compares on data of your
# own; with both `"shapes"` and `foggy` in it each arm would be scored on other images.
#
# ## From an idea to a merged part
#
# 1. **See** its sample or its maps on a few images; check shapes and randomness, as in section 2.
# 2. **Train five steps**, load the run again.
# 3. **A small experiment**, two seeds: does it run, is anything absurd?
# 4. **A real one**, from a file: five seeds or more, several ratios, all held-out scenes, next to
#    the obvious alternatives (`random`, `grid`, `block`) and to its own opposite.
# 5. **Say what it costs**: time of a step, `mimdet cost`.
# 6. **Move it** into `mimdet/models/sampling.py` (or `stem.py`, `backbones.py`, `rcnn.py`) and
#    register it; add it to that part's list of tests, which check its contract, randomness and
#    padding.
# 7. **Write it down**: a line in `CHANGELOG.md`, the result with its json in `notebooks/results/`.
#    `CONTRIBUTING.md`, "Add a part", has the details.
#
# ## Summary
#
# - Sampler, stem, neck, decoder fill, loss and data set: each may live in a cell, in ten lines.
# - `mimdet.experiment` turns them into rows with paired differences; the same call resumes it.
# - Two seeds show that it runs. An interval says what you know, and it is wide.
# - A run keeps the code it was trained with, and asks before executing it.
#
# ## Exercises
#
# 1. The opposite: a sampler that keeps the tokens where the stem responds *least*. Evaluate,
#    untrained, the finished detector with it, with `strongest` and with `random` at ratio 0.25.
#    What do you expect, what do you see?
# 2. Write a sampler that keeps edges: tokens that differ from the mean of their 3 × 3 neighbours.
#    Draw its sample.
# 3. `strongest` always keeps the same tokens of an image, so training never sees the others.
#    Add noise, so that strong ones are only more likely. Two seeds shall differ, one seed give the
#    same twice.

# %%
mine = {1: ..., 2: ..., 3: ...}  # your samplers


# %% tags=["judge"]
from mimdet import judge


def picks(sampler, seed, tokens=tokens, grid=grid):
    generator = torch.Generator().manual_seed(seed)
    return select([sampler(tokens, grid, generator)], [grid], grid, 0.25).keep[0].sort().values


def finds_the_odd_one(sampler):
    flat = torch.ones(6 * 8, 4)
    flat[19] = 3  # row 2, column 3; it and what lies around it differ from their neighbours' mean
    return set(picks(sampler, 0, flat, (6, 8)).tolist()) >= {10, 11, 12, 18, 19, 20, 26, 27, 28}


def likes_strong_ones(sampler):
    one, same, other = (picks(sampler, seed) for seed in (1, 1, 2))
    often = torch.cat([picks(sampler, seed) for seed in range(60)]).bincount(minlength=len(tokens))
    strong = tokens.norm(dim=1) > tokens.norm(dim=1).median()
    chance = torch.equal(one, same) and not torch.equal(one, other)
    return chance and bool(often[strong].sum() > often[~strong].sum())


least = tokens.norm(dim=1).argsort()[: int(0.25 * len(tokens))].sort().values
judge(1, mine[1], lambda sampler: torch.equal(picks(sampler, 0), least))
judge(2, mine[2], finds_the_odd_one)
judge(3, mine[3], likes_strong_ones)


# %% tags=["solution"]
# 1. It matters what the encoder sees: without the tokens of objects it finds fewer. On 100 scenes
# random has 55.8, strongest 55.6 and weakest 52.6 box AP, of large objects 54.8, 55.5 and 50.8.
def weakest(tokens, grid, generator):
    return -tokens.norm(dim=1)


base.data.limit_val = base.data.limit_val or 200
held_out = mimdet.build_dataset(base.data, "val")
aps, bar = {}, MODE == "full"
for sampler in (SAMPLERS["random"], IDEA, weakest):
    model.backbone.sampler = sampler
    scored = mimdet.evaluate(model, held_out, sample_ratio=0.25, progress=bar)
    aps[sampler.__name__] = 100 * scored.box["AP"]
print({name: round(ap, 1) for name, ap in aps.items()})
check("weakest is below random", aps["weakest"] < aps["random_sampler"] or MODE == "full")
check("all still find objects", min(aps.values()) > 10 or MODE == "full")


# %% tags=["solution"]
# 2. A tensor of tokens is a picture with D channels.
def edges(tokens, grid, generator):
    picture = tokens.T.reshape(1, -1, *grid)  # (1, D, h, w)
    around = F.avg_pool2d(F.pad(picture, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return (picture - around).norm(dim=1).flatten()


check("the odd one out is kept", finds_the_odd_one(edges))
show_sample(image, {"edges": select([edges(tokens, grid, None)], [grid], grid, ratio=0.25)})


# %% tags=["solution"]
# 3. Gumbel noise on log weights draws without replacement, in proportion to the weights.
def likelier(tokens, grid, generator):
    noise = torch.rand(len(tokens), generator=generator, device=tokens.device)
    return tokens.norm(dim=1).log() - (-noise.clamp(1e-9, 1 - 1e-7).log()).log()


check("chance decides, strong tokens are kept more often", likes_strong_ones(likelier))
