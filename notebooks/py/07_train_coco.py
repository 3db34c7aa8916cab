# %% [markdown]
# # 07 · Train: memorise eight images, then learn all of COCO
#
# **A training of days is a process, not a cell: stop it, kill it, come back, and nothing has
# changed.** **Afterwards you can** start one from a notebook, watch, stop and continue it, first on
# eight images, which takes half a minute and finds most mistakes, then with the paper's recipe:
# learning rates of three groups, schedule, memory, several GPUs, what to expect.
#
# | | quick (`MODE = "quick"`) | full (`MODE = "full"`) |
# |---|---|---|
# | study | an hour, after 00, 06 | |
# | what you see | a small MIMDet memorises 8 drawn scenes, is stopped and resumed | the same with 8 photographs, then MIMDet ViT-B on COCO |
# | time | about 50 s of one CPU core | an hour on a V100, at its authors' speed; then days |
# | memory, disk | about 1.5 GB in two processes | section 5; 5 GB a run, in three |
# | needs | nothing but the kit | GPUs, COCO 2017 (`MIMDET_COCO`), `mimdet download mae-base-full` |

# %% tags=["parameters"]
MODE = "quick"  # "full": COCO, GPUs and days
STEPS = 0  # steps on the eight images; 0: as many as the mode takes
SEED = 0  # of weights, scenes and samples
PROCESSES = 0  # that share the long run; 0: one per GPU, or one on the CPU
LONG = False  # True: full mode starts the run of days in section 6
SOLUTIONS = False  # True: the answers at the end run too

# %%
import copy
import json
import time
from pathlib import Path

import mimdet
from mimdet import check, judge, notebook_setup

cfg = notebook_setup(MODE, seed=SEED, minutes={"quick": 1})

# %% [markdown]
# ## 1 · Memorise eight images
#
# Before a long training, ask for something that a correct program must be able to do: memorise
# eight images, evaluated on the very same eight. Boxes that do not belong to the image as it was
# resized, labels off by one, a learning rate ten times too high, a part that is never updated: each
# keeps AP far from 100, and you know within minutes. That a network generalises is *not* asked
# here.
#
# In quick mode the images are eight scenes written in COCO's format, so that the code that reads
# them is the one that reads COCO (`mimdet/data/coco.py`). Nothing is augmented: a flipped image
# would be a ninth one.

# %%
from mimdet import ShapesCOCO, build_dataset
from mimdet.data.shapes import export
from mimdet.viz import show_data

eight = copy.deepcopy(cfg)
data = eight.data
if MODE == "quick":
    export(ShapesCOCO("shapes-v1-easy", 128, length=8, split="train", seed=SEED), "data/eight")
    data.source, data.workers = "coco", 0
    data.train_json, data.train_images = "data/eight/annotations.json", "data/eight/images"
data.val_json, data.val_images = data.train_json, data.train_images
data.limit_train = data.limit_val = 8
data.augment = "none"
images = build_dataset(data, "train", SEED)
show_data([images[i] for i in range(8)], images.categories)

# %% [markdown]
# The recipe for eight images: one micro-batch a step, a short warm-up, checkpoints often.

# %%
t = eight.training
t.steps = STEPS or (180 if MODE == "quick" else t.steps or 600)
t.batch_size, t.accumulate = (2, 1) if MODE == "quick" else (8, 1)
t.learning_rate = 2e-3 if MODE == "quick" else t.learning_rate
t.warmup_steps, t.checkpoint_every_steps = 10, 20
t.evaluate_every_steps = t.steps // 3
print(f"{t.steps} steps of {t.batch_size * t.accumulate} images: each is seen", end=" ")
print(f"{t.steps * t.batch_size * t.accumulate // 8} times")

# %% [markdown]
# ## 2 · A training in a process of its own
#
# `mimdet.train` in a cell, as in `00_quickstart`, blocks the notebook until it ends. For anything
# longer than a few minutes use a **job** (`mimdet/training/job.py`): a child process that reads the
# configuration from the run's folder and writes everything into it. The notebook stays free, and
# may be closed: the training goes on, and the same cell attaches to it again.
#
# `TrainingDashboard` is a panel around a job. **Yours to press:** Start; after ten steps Stop &
# save; restart the kernel and run the cells again: the panel attaches to its run; Resume. It
# redraws every two seconds and takes at most a tenth of its time.

# %% tags=["timing"]
from mimdet.viz import TrainingDashboard

run = f"runs/eight-{MODE}-{t.steps}-steps-seed-{SEED}"
TrainingDashboard(eight, f"{run}-yours", processes=1)

# %% [markdown]
# The same by calls, to a run of its own: start, stop after ten steps.
#
# | button | call | what happens |
# |---|---|---|
# | Start | `board.start()` | a process begins; the call returns at once |
# | Stop & save | `board.stop()` | the step in progress is abandoned, the state before it saved |
# | Resume | `board.start()` | it continues as if nothing had happened |

# %%
board = TrainingDashboard(eight, run, processes=1)
board.start()
while board.look().step < 10 and board.state.running:
    time.sleep(0.1)
board.stop()
stopped = board.wait()
check("it has ended", not stopped.running, "`wait` returns when the process is gone")
resumable = stopped.name in ("stopped", "finished")  # the latter when the cell is run again
check("and has saved", resumable and (Path(run) / "checkpoints" / f"{stopped.step:06d}").exists())

# %% [markdown]
# Whatever ends a training, a click, Ctrl-C, a killed process or a power cut, the folder of the run
# holds a complete checkpoint: after a polite stop that of the last step, otherwise the last one
# written. A job that *fails* shows the end of its log in the panel, and `board.wait()` raises it,
# so that Run All does not continue without a model.
#
# ## 3 · Resume, and nothing has changed

# %%
board.start()
print(board.wait())
board

# %% [markdown]
# The panel as it stands at the end: losses left, AP right, below them what the last checkpoint
# finds in two of the eight images beside the truth.
#
# "As if nothing had happened" is a claim that can be tested. Below, the same training without any
# stop, in this process, to a few steps past the stop. On a CPU every loss must be equal to the last
# bit, because what a step sees (images, order, samples of tokens) depends on the
# seed and the step's number alone, and a checkpoint holds the optimiser's state too.

# %%
for step in mimdet.train(eight, f"{run}-undisturbed"):
    if step.number >= min(stopped.step + 5, 40):
        break
losses = {}
for name in (run, f"{run}-undisturbed"):
    lines = (Path(name) / "metrics.jsonl").read_text().splitlines()
    losses[name] = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
disturbed, undisturbed = losses.values()
equal = disturbed[: len(undisturbed)] == undisturbed
check("the same losses before and after the stop", equal or MODE == "full", "bit for bit on a CPU")
check("every step once", len(disturbed) == t.steps, "none lost, none done twice")

# %% [markdown]
# What the folder holds:

# %%
from mimdet.training import run as runs

print(runs.__doc__)
listed = all(f"\n    {path.name} " in runs.__doc__ for path in Path(run).iterdir())
check("nothing else is in it", listed, "so the list above is complete")

# %% [markdown]
# ### Did it learn them?

# %%
from mimdet.viz import show_detections

model = mimdet.load_detector(run)
records = [images[i] for i in range(4)]
found = mimdet.predict(model, [r.image for r in records])
show_detections(
    [r.image for r in records], found, [r.target for r in records], images.categories, 0.5
)

# %%
final = json.loads((Path(run) / "eval.json").read_text())
print(f"box AP {100 * final['box']['AP']:.1f}, mask AP {100 * final['mask']['AP']:.1f}")
memorised = final["box"]["AP"] > 0.3 or STEPS
check("most of it is memorised", memorised, "and more with more steps", trained=True)

# %% [markdown]
# Half a minute is short: both curves of the panel still rise at the end. Given ten minutes, `tiny`
# learnt eight real COCO photographs to 93.2 box and 74.1 mask AP; the exact command and the curve
# are in `notebooks/results/overfit_8_coco_images.json`. If your own data stays below 50 after such
# a run, look at the data (`mimdet check-data`) before you look at the model.
#
# ## 4 · The full recipe
#
# MIMDet ViT-B trains for 36 epochs with 64 images a step (`mimdet/presets.py`). The number of steps
# follows from the data; the authors count 120,000 images an epoch.

# %%
from mimdet.viz import group_rates, show_schedule

paper = mimdet.presets.mimdet_base()
show_schedule(paper.training, 120_000)

# %% [markdown]
# **Three learning rates** (`mimdet/training/optim.py`). The stem is new and takes the rate as it
# is. The encoder comes from the autoencoder and must not forget: rate / 2. Decoder, neck and heads
# take rate × 2, although the decoder is pre-trained too. Weight decay is 0.1, but 0 for biases and
# other one-dimensional parameters; there is no gradient clipping.
#
# **Warm-up and milestones.** The rate rises linearly from 0 in a quarter of an epoch and falls by
# ten at epochs 27 and 33, where AP usually rises once more: do not judge a run before that.
#
# **Another batch size?** The paper's two configurations, 64 images at 8e-5 and 16 at 4e-5, follow
# the *square root* of the batch size. That is the default here (`learning_rate_exponent=0.5`): with
# a quarter of the images half the rate, not a quarter of it.

# %%
import torch
from mimdet.training.optim import parameter_groups

with torch.device("meta"):  # shapes only: nothing is computed, no memory is taken
    shapes = mimdet.build_detector(paper)
counts = {name: 0 for name in ("stem", "encoder", "rest")}
for group in parameter_groups(shapes, paper.training):
    counts[group["part"]] += sum(p.numel() for p in group["params"])
for name, rate in group_rates(paper.training).items():
    print(f"{name:8}{counts[name]:>12,} parameters at {rate:.1e}")
total = sum(p.numel() for p in shapes.parameters())
print(f"{'frozen':8}{total - sum(counts.values()):>12,} numbers of the position tables")

# %%
check("the model of the paper", total == 127_954_768, "its parameters, counted exactly")
rates = group_rates(paper.training)
published = {"stem": 8e-5, "encoder": 4e-5, "rest": 1.6e-4}
close = all(abs(rates[name] / rate - 1) < 1e-9 for name, rate in published.items())
check("the rates of the paper", close, "stem 8e-5, encoder 4e-5, the rest 1.6e-4")
steps = round(36 * 120_000 / 64)
check("67,500 steps of 64 images", steps == 67_500, "36 epochs of 120,000")

# %% [markdown]
# ## 5 · What fits into memory
#
# A step keeps every layer's intermediate results for the backward pass. Three switches:
#
# - **Fewer tokens** (`backbone.sample_ratio`): the encoder keeps half or a quarter.
# - **Recomputation** (`backbone.checkpointing="on"`, `"auto"` on a small GPU): only the inputs of
#   the blocks are kept, the rest is computed a second time: slower, with the same result.
# - **bf16** (`training.precision="auto"` on CUDA): half the bytes, with the exponent range of fp32,
#   so no loss scaling (the paper's fp16 needs it, and overflows for some).
#
# Then make the **micro-batch** as large as fits, and let `accumulate` fill the step: 64 =
# `batch_size` × `accumulate`, on one GPU as on eight. The cell counts what a training of ViT-B
# holds in fp32 (`mimdet/analysis/cost.py`): weights, gradients and AdamW's moments; for each image
# of 800 × 1344 pixels what autograd keeps. Not confirmed on a GPU; bf16 leaves room.

# %%
from mimdet.analysis.cost import training_bytes

count, need = copy.deepcopy(paper), {}
print("recomputation  ratio  once, GB  an image, GB")
for mode in ("off", "on"):
    for ratio in (1.0, 0.5, 0.25):
        count.backbone.checkpointing, count.backbone.sample_ratio = mode, ratio
        once, need[mode, ratio] = (number / 1e9 for number in training_bytes(count))
        print(f"{mode:14} {ratio:<6} {once:8.1f} {need[mode, ratio]:13.1f}")
for gigabytes, mode in ((24, "on"), (80, "off")):  # what "auto" means there
    most = max(2**i for i in range(7) if once + 2**i * need[mode, 0.5] < gigabytes)
    print(f"a GPU of {gigabytes} GB: batch_size={most}, accumulate={64 // most}")

# %% [markdown]
# Eight GPUs of 24 GB or more: 8 × 8, a micro-batch each. With recomputation the stem's maps and the
# heads are left. Maps of attention do not count: fused kernels never store them. Your choice goes
# before the first cell: `%env MIMDET_FULL=training.batch_size=4 training.accumulate=16`.
#
# ## 6 · The long run
#
# The cells of section 2 once more, with the full recipe. The folder is made; nothing is started
# before `LONG = True`.

# %%
from mimdet.training.job import Job

base = cfg if MODE == "full" else paper
if MODE == "quick":  # the recipe starts from Meta's autoencoder, which quick mode does not have
    base.training.init_from = "downloads/mae_pretrain_vit_base_full.pth"
job = Job.prepare(base, f"runs/base-{MODE}-seed-{SEED}")
print("on one GPU, in a terminal:\n  python", *job.words(1))
print("on eight GPUs:\n  python", *job.words(8))

# %% [markdown]
# What will it take? A few real steps are measured here at each share of the tokens; what fits on a
# card is counted. In a terminal: `mimdet plan mimdet_base --gpus 8 --price 2`.

# %% tags=["timing"]
from mimdet.training.plan import forecast
from mimdet.viz import show_forecast

expected = forecast(base if MODE == "full" else eight, gpus=max(1, PROCESSES), steps=3)
print(expected)
show_forecast(expected)

# %%
from IPython.display import display

torch.cuda.empty_cache()  # the GPU belongs to the long run
long = TrainingDashboard(base, job.path, processes=PROCESSES)
if MODE == "full" and LONG:
    long.start()
if MODE == "full":  # else a Start button would stand here that begins days on a laptop
    display(long)
print(long.look())
accumulate = base.training.accumulate
shares = [n for n in range(1, 17) if accumulate % n == 0]
print(f"{accumulate} micro-batches a step can be shared by {shares} processes")

# %% [markdown]
# **Several GPUs.** torchrun starts a process per GPU. The step stays the same 64 images, so a run
# that began on eight GPUs may continue on four; BatchNorm sees the images of all processes.
#
# **Without this notebook.** The folder is all that is needed.
#
# | you | the run |
# |---|---|
# | close browser or kernel | goes on; anywhere else `TrainingDashboard(RUN)` shows it again |
# | press Ctrl-C in its terminal, or close it | saves and ends; `mimdet resume RUN` continues |
# | reboot, or lose power | continues so from its last checkpoint |
#
# **How long?** The authors report, for ViT-B and 36 epochs: at ratio 0.5 with recomputation 3 to 4
# days on eight V100 GPUs of 32 GB; at ratio 0.25 with 16 images a step, on 8 GPUs, 2 days and 6
# hours.
#
# **How good?** 51.7 box and 46.2 mask AP are published for ViT-B on COCO val2017, at ratio 1 after
# 36 epochs; others who ran the authors' code report 50.0 and 50.8. This kit has not been trained in
# full yet. No curve is published for 1, 3, 12 or 24 epochs. Bounds: below that before epoch 27, the
# first milestone; a plain ViT-B from the same autoencoder has 48.1 after 25, its rate lowered in
# time. Our guess: a box AP below 1 after epoch 1, or no rise to epoch 3, is a
# failure. Afterwards:
#
# ```
# mimdet evaluate RUN --ratios 0.25 0.5 1
# mimdet errors RUN
# ```
#
# **When something goes wrong.** *Out of memory:* half the `batch_size`, twice the `accumulate`.
# *The loss is not finite:* the job stops by itself, names the images, and has saved the step
# before; lower the rate or set `clip_norm=1` in a new run. *AP stays near 0:* the first lines of
# `log.txt` say which weights were loaded, which are new and which were not used.
#
# ## Summary
#
# - Memorising eight images tests the whole chain in minutes.
# - A job is a process with a folder; stop, resume, close, attach: the result is the same.
# - Rates: stem r, encoder r / 2, the rest 2 r; r follows the square root of the images a step.
# - Fewer tokens and recomputation save memory; `accumulate` keeps the step at 64 images.
#
# ## Exercises
#
# 1. Your only GPU holds 2 images at a time. Set `batch_size` and `accumulate` for the paper's step
#    of 64 images. What is the stem's rate? And what is it with steps of 16 images instead?
# 2. At which step does the rate of `mimdet_base` fall first, by hand and by `rate_factor`?
# 3. What happens when two trainings use one folder? Take one step of the first, then try.
# 4. Complete runs: what does `mimdet resume` do with one? Compare its files before and after.

# %%
mine = {1: ..., 2: ...}  # the stem's rate for 16 images a step, a step; then run the next cell too

# %% tags=["judge"]
from mimdet.training.optim import rate_factor, scaled_rate

recipe = mimdet.presets.mimdet_base().training
falls = range(5_000, 67_500)  # steps counted from 0, after the warm-up
judge(2, mine[2], next(n for n in falls if rate_factor(n, 67_500, 469, recipe) < 0.5))
recipe.batch_size, recipe.accumulate = 2, 8
judge(1, mine[1], float(scaled_rate(recipe)))

# %% tags=["solution"]
# 1. 2 x 32 = 64; the rate does not change, as the step has as many images as before.
recipe = mimdet.presets.mimdet_base().training
recipe.batch_size, recipe.accumulate = 2, 32
check("the same rate", scaled_rate(recipe) == scaled_rate(paper.training), "64 images are 64 images")
recipe.accumulate = 8
print(f"16 images a step: {scaled_rate(recipe):.1e}")
check("half the rate for a quarter", abs(scaled_rate(recipe) - 4e-5) < 1e-12, "the square root")

# %% tags=["solution"]
# 2. After 27 of 36 epochs: 27 / 36 x 67,500 = 50,625.
recipe = mimdet.presets.mimdet_base().training
factors = [rate_factor(step, 67_500, 469, recipe) for step in (50_624, 50_625)]
print("factors of steps 50,624 and 50,625 (counted from 0):", [f"{f:g}" for f in factors])
check("a tenth from then on", abs(factors[0] - 1) < 1e-12 and abs(factors[1] - 0.1) < 1e-12)

# %% tags=["solution"]
# 3. The first holds the folder's lock; the second is refused before it reads a checkpoint.
small = mimdet.notebook.quick_config()  # any training will do
first = mimdet.train(small, "runs/shared")
number = next(first).number
try:
    next(mimdet.train(small, "runs/shared"))
    refused = ""
except ValueError as error:
    refused = str(error)
first.close()  # saves, and gives the lock back
check("the second one is refused", "already trains in" in refused)
check("afterwards it may", next(mimdet.train(small, "runs/shared")).number == number + 1)

# %% tags=["solution"]
# 4. Nothing: every step is done, and the metrics stay as they are, byte by byte.
from mimdet import cli

before = (Path(run) / "metrics.jsonl").read_bytes()
cli.main(["resume", run])
check("a complete run is left alone", (Path(run) / "metrics.jsonl").read_bytes() == before)
