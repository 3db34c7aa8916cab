# %% [markdown]
# # 00 · Quickstart: a detector that looks at a quarter of the image
#
# A vision transformer cuts an image into *tokens* of 16 × 16 pixels and compares each with every
# other, so twice the tokens cost four times the attention. MIMDet
# ([Fang et al., ICCV 2023](https://arxiv.org/abs/2204.02964)) trains an object detector whose
# transformer sees only a random **sample** of the tokens, a half or a quarter of them. That works
# because the transformer was pre-trained as a masked autoencoder, which is nothing but practice in
# guessing the rest from a quarter. Here you build a very small MIMDet, look at what it sees, train
# it, read its score and use it.
#
# | | quick (`MODE = "quick"`) | full (`MODE = "full"`) |
# |---|---|---|
# | study | an hour, after PyTorch's basics | |
# | what you see | 1.5 million parameters, from random weights, on drawn scenes | MIMDet ViT-B, 128 million parameters, on COCO |
# | time | 1 to 2 minutes on two busy CPU cores (about 65 s of one core) | days; not measured here. Its authors report 3 to 4 days on 8 V100 GPUs |
# | memory | 1.8 GB at most | not measured here; 8 images a GPU at a time by default |
# | needs | nothing but the kit; no GPU, no download | a CUDA GPU, and COCO 2017 in the folder named by `MIMDET_COCO` |
#
# **What a minute of training can show:** that the parts fit together, that the losses fall, that
# simple shapes are found and some of them named correctly. **What it cannot show:** how good the
# method is. The paper's numbers need its pre-trained weights and days on COCO. For a number that
# means something on a laptop run `mimdet demo` in a terminal: six minutes on the harder
# `shapes-v1-medium`, 200 held-out scenes.

# %% tags=["parameters"]
MODE = "quick"  # "full": COCO and a GPU
STEPS = 0  # training steps; 0: as many as the mode takes (a few are too few for two checks)
SEED = 0  # of weights, scenes and samples
SOLUTIONS = False  # True: the answers at the end run too

# %%
import mimdet
from mimdet import check, notebook_setup

cfg = notebook_setup(MODE, steps=STEPS, seed=SEED, minutes={"quick": 1})

# %% [markdown]
# `cfg` is a plain object with every number of the run (`mimdet/config.py`). It started as a
# *preset* (`mimdet/presets.py`); to change a number, assign it. A typo is an error, not a new name.

# %%
print("share of tokens the encoder sees in training:", cfg.backbone.sample_ratio)
print("share it sees in evaluation:                 ", cfg.backbone.sample_ratio_eval)
try:
    cfg.backbone.sampel_ratio = 0.25
    misspelled = True
except AttributeError:
    misspelled = False
check("a misspelled field is refused", not misspelled, "else an experiment is not what you think")

# %% [markdown]
# ## 0 · What you will end with
#
# A few small models come with the package (`mimdet/pretrained/`). This one is the preset `tiny`,
# trained from random weights for half an hour on one CPU core. The truth is on the left, what it
# finds on the right, in scenes it has never seen.

# %%
from mimdet.viz import show_detections

finished = mimdet.load_detector("tiny")
unseen = mimdet.ShapesCOCO("shapes-v1-medium", length=200, split="val")
records = [unseen[i] for i in range(4)]
pictures, truth = [r.image for r in records], [r.target for r in records]
found = mimdet.predict(finished, pictures)
show_detections(pictures, found, truth, unseen.categories)

# %% [markdown]
# ## 1 · Look at the data
#
# Always look at data before training on it. In quick mode it is *ShapesCOCO*
# (`mimdet/data/shapes.py`): scene *i* is drawn from the seed, so nothing is stored, training never
# runs out of images, and every box and mask is exact. Colours help but do not give the class away:
# fragments without a class wear the same ones.

# %%
from mimdet import build_dataset
from mimdet.viz import show_data

scenes = build_dataset(cfg.data, "val", seed=SEED)  # held out: never trained on
records = [scenes[i] for i in range(10)]
show_data(records[:4], scenes.categories)

# %%
import torch

fresh = build_dataset(cfg.data, "train", seed=SEED)
inside = [
    bool((r.target.boxes >= 0).all()) and bool((r.target.boxes[:, 2::2] <= r.image.shape[2]).all())
    for r in records
]
check("every box lies inside its image", all(inside), "boxes are x0, y0, x1, y1 in pixels")
check(
    "training scenes are other ones",
    not torch.equal(fresh[0].image, scenes[0].image),
    "a score on images seen in training would measure memory",
)

# %% [markdown]
# ## 2 · Build the model and see what its encoder sees
#
# Figure 1 of the paper from left to right (`mimdet/models/backbones.py`): a small convolutional
# **stem** turns the image into a grid of tokens; a **sampler** scores them and the best `ratio` of
# them are kept; the **encoder**, a plain ViT, works on the kept tokens only; the **decoder** puts
# them back into the full grid, fills the gaps, and lets them all attend to each other once more.
# The gaps get one learned vector here, as in version 1 of the paper; in version 2 (`mimdet_base`)
# they get the stem's own tokens. The decoder's output and the stem's earlier stages are the feature
# pyramid of an ordinary Mask R-CNN.

# %%
torch.manual_seed(SEED)
model = mimdet.build_detector(cfg)

batch = model.prepare(records[0].image)  # resized, padded, normalised: what the stem sees
image = batch.images[0]  # (3, H, W), before padding
with torch.no_grad():
    stem = model.backbone.stem(batch.tensors)
print("image ", tuple(batch.tensors.shape))
for name, map_ in stem._asdict().items():
    print(f"{name:6}", tuple(map_.shape))

# %% [markdown]
# The last line is the grid of tokens: one sixteenth of the image's height and width. Now draw two
# samples of it. Tokens in grey never enter the encoder.

# %%
from IPython.display import display
from mimdet.viz import show_sample

tokens = stem.tokens.flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, L, D), L = h * w
grid = tuple(stem.tokens.shape[2:])
samples = {}
for ratio in (0.25, 0.5, 1.0):
    generators = [torch.Generator().manual_seed(SEED)]  # one per image
    samples[ratio] = model.backbone.draw(
        tokens, grid, batch.image_sizes, mimdet.Sampling(ratio, generators=generators)
    )
for ratio in (0.25, 0.5):
    display(show_sample(image, samples[ratio]))

# %%
total = -(-image.shape[1] // 16) * -(-image.shape[2] // 16)  # tokens that the image touches
for ratio, sample in samples.items():
    kept = sample.keep[0]
    check(f"ratio {ratio}: {len(kept)} of {total} tokens", len(kept) == max(1, int(ratio * total)))
    check("no token twice", len(kept.unique()) == len(kept), "a repeated token would count double")
generators = [torch.Generator().manual_seed(SEED)]
repeat = mimdet.Sampling(0.25, generators=generators)
again = model.backbone.draw(tokens, grid, batch.image_sizes, repeat)
same = torch.equal(again.keep[0], samples[0.25].keep[0])
check("the same seed draws the same sample", same, "so a result can be repeated")

# %% [markdown]
# Attention compares every kept token with every kept token: at ratio 0.25 that is a sixteenth of
# the comparisons. This is where MIMDet saves its time, and the reason for everything above.
#
# ## 3 · Train it, live
#
# `mimdet.train` (`mimdet/training/train.py`) is a generator: it yields after every step, so the
# loop is yours. `watch` passes the steps on and redraws one picture every few seconds: five losses
# (two of the region proposal network, RPN; class, box and mask of its proposals), and what the
# detector finds in two held-out scenes. Each step draws a **new** sample of half of the tokens of
# each image.

# %%
from mimdet.notebook import watch

run = f"runs/quickstart-{MODE}-{cfg.training.steps}-steps-seed-{SEED}"
images = [r.image for r in records]
truth = [r.target for r in records]
watched = watch(
    mimdet.train(cfg, run, model=model),
    lambda: show_detections(
        images[:2], mimdet.predict(model, images[:2]), truth[:2], scenes.categories, 0.3
    ),
)
for step in watched:
    pass  # step.losses, step.number, step.seconds: anything you like to do with them

# %% [markdown]
# Read the curves from below. First the RPN learns *where* something is: its objectness falls by a
# factor of ten. Only then do the heads get proposals on objects, so their box loss **rises**:
# there is suddenly something to learn. That is why the total says so little.

# %%
from mimdet.training.run import Run

history = [row["loss_rpn_cls"] for row in Run(run, cfg).metrics() if "loss" in row]
first, last = sum(history[:20]) / 20, sum(history[-20:]) / 20
print(f"{len(history)} steps; RPN objectness: {first:.2f} at first, {last:.2f} at last")
check("it learned where objects are", last < first / 2, "means of 20 steps")

# %% [markdown]
# ### Interrupting and resuming
#
# Everything about a run is in its directory: configuration, versions, `metrics.jsonl` with a line a
# step, checkpoints, predictions. Press the stop button (■) while the training cell is running: the
# step in progress is abandoned, the state before it is saved, and one line says where. Run the cell
# again and it continues from there. Run it when all steps are done, and nothing happens. With
# another configuration, the same directory is refused and the difference is shown.
#
# *Continues* means: as if it had never stopped. What a step sees is a function of (seed, step), so
# the images, their augmentation and the samples are the same. Try it with a run of four steps.

# %%
import copy

short = copy.deepcopy(cfg)
short.training.steps = 4
short.data.shapes_val = short.data.limit_val = 2  # every training ends with an evaluation
straight = [step.loss for step in mimdet.train(short, "runs/straight")]

for step in mimdet.train(short, "runs/stopped"):
    if step.number == 2:
        break  # leaving the loop saves, as the stop button does
resumed = list(mimdet.train(short, "runs/stopped"))
check("it resumed at step 3", [step.number for step in resumed] == [3, 4])
exact = [step.loss for step in resumed] == straight[2:]
check("with the same losses", exact or MODE == "full", "bit for bit on a CPU")

# %% [markdown]
# ## 4 · Read its AP: from a single token to all
#
# *Average precision* (AP) is the score of COCO: 100 is perfect. It averages over how strictly a box
# or mask must match (overlap 0.50, 0.55, ... 0.95) and over the classes
# (`mimdet/analysis/metrics.py`). The model was trained on half of the tokens. It can be *evaluated*
# at any ratio; below 1 the tokens are drawn at random, so each number has a spread, here over two
# draws.

# %% tags=["timing"]
from mimdet.analysis.evaluate import evaluate_ratios, ratio_table

rows = evaluate_ratios(model, scenes, (1 / total, 0.25, 0.5, 1.0), draws=2)
print(ratio_table(rows))  # its last column is time, so this output is not kept in the notebook

# %%
from mimdet.viz import show_ratios

show_ratios(rows)

# %%
twice = [mimdet.predict(model, images[0], sample_ratio=1.0, seed=seed) for seed in (1, 2)]
check(
    "ratio 1 does not depend on the seed",
    len(twice[0]) == len(twice[1]) and torch.allclose(twice[0].boxes, twice[1].boxes, atol=0.01),
    "every token is kept, whatever is drawn",
)
check("draws are 2, and 1 of all tokens", [row["draws"] for row in rows] == [2, 2, 2, 1])
check("something was learned", rows[-1]["box_ap"] > 0.02, "an untrained detector scores 0.0")

# %% [markdown]
# Read it with care. In quick mode the curve is flat from a single token to all: after a minute the
# transformer contributes nothing yet. What is found is found on the fine maps c2 and c3, which come
# from the stem and never lose a token. The AP alone did not tell, the curve does. (And 40 scenes
# and a single training leave points of uncertainty: two other seeds gave 12.8 and 14.6 box AP.)
#
# The same question to the finished detector of section 0, which has seen 25 times as many scenes:

# %%
few = mimdet.ShapesCOCO("shapes-v1-medium", length=48, split="val")
trained = evaluate_ratios(finished, few, (1 / 256, 0.25, 1.0), draws=1)  # of 16 x 16 tokens
show_ratios(trained)

# %%
single, every = trained[0]["box_ap"], trained[-1]["box_ap"]
print(f"box AP with one token {100 * single:.1f}, with all {100 * every:.1f}")
check("it uses what its encoder sees", every > single + 0.05, "else the transformer is decoration")

# %% [markdown]
# This one uses its transformer: with a single token it loses more than ten points, and a quarter of
# the tokens is nearly enough. Which objects are lost is exercise 4. Ask for this curve before you
# believe that a detector profits from its encoder: an earlier `tiny` scored well and had learnt to
# do without (notebook 09).
#
# The paper's full-size answer (Table 2 of arXiv version 1; ViT-B on COCO, evaluated at ratio 1):
# trained at 0.25, 49.9 box and 44.7 mask AP; trained at 0.5, 51.5 and 46.0. A quarter of the tokens
# is nearly enough, half of them are better.
#
# ## 5 · See detections beside the truth
#
# A number does not say *what* is wrong. Each pair below is a held-out scene, the truth on the left
# and detections with a score of at least 0.3 on the right. Look for the three usual failures: a
# missed object, a right box with a wrong name, one object found twice.

# %%
found = mimdet.predict(model, images[5:])
show_detections(images[5:], found, truth[5:], scenes.categories, score_threshold=0.3)

# %%
most = cfg.detector.detections_per_image
check("never more than the limit", max(len(d) for d in found) <= most, f"{most} in an image")
falling = [bool((d.scores.diff() <= 0).all()) for d in found]
check("best score first", all(falling), "AP asks how many of the best ones are right")

# %% [markdown]
# ## 6 · Detect in an image of your own
#
# `mimdet.predict` takes a path, a PIL image, an array or a tensor, of any size, one or a list, and
# answers in the image's own pixels (`mimdet/inference.py`). Put the path of a photo between the
# quotes. Expect nonsense: this detector knows six flat shapes. The default is one more held-out
# scene, written as a PNG file.

# %%
from pathlib import Path

from mimdet.images import read_image
from torchvision.io import write_png

own = ""  # "photo.jpg"
path = own or f"{run}/scene.png"
if not own:
    write_png(scenes[28].image, path)

found = mimdet.predict(model, path)
show_detections([read_image(path)], [found], None, scenes.categories, 0.5, columns=1)

# %%
again = mimdet.predict(model, read_image(path))
check("a file and its pixels give the same", torch.equal(found.boxes, again.boxes))
quarter = mimdet.predict(model, path, sample_ratio=0.25, seed=SEED)
print(f"{(found.scores >= 0.5).sum()} objects at ratio 1, {(quarter.scores >= 0.5).sum()} at 0.25")

# %% [markdown]
# The trained detector stays on disk. In another notebook: `mimdet.load_detector("runs/...")`; in a
# terminal: `mimdet predict runs/... photo.jpg`, `mimdet evaluate runs/... --ratios 0.25 0.5 1`.
#
# ## Summary
#
# - A token is 16 × 16 pixels; `ratio` is the share the encoder sees; a `Sample` says which ones.
# - Attention in the encoder costs `ratio²`; the decoder restores the full grid for the detector.
# - Trained on a sample, evaluated on all tokens: that is how the published scores are made.
# - A run is a directory; stopping and resuming changes nothing.
# - A minute of training proves that the machine works, not how well the method does.
#
# ## Exercises
#
# 1. An image of 480 × 640 pixels at ratio 0.1: how many tokens does the encoder see, and what share
#    of the attention's comparisons is left? Work it out by hand, then ask `mimdet.select`.
# 2. Which part of the model has the most parameters? Is it the transformer?
# 3. The sampler `"grid"` spreads the tokens evenly. Draw its sample at ratio 0.25: which pattern
#    must appear, and how do you test it in one line?
# 4. With a single token `finished` still finds objects. Which sizes does it lose, and why? Guess,
#    then look at `AP_small` and `AP_large` of `mimdet.evaluate(finished, few, ...).box`.
# 5. Write a sampler that keeps the tokens where the stem responds most. Look at its sample, train
#    with it for five steps, and load the run again.

# %% tags=["solution"]
# 1. 30 x 40 tokens, a tenth of them; comparisons go with the square.
grid_1 = (480 // 16, 640 // 16)
length = grid_1[0] * grid_1[1]
sample = mimdet.select([torch.rand(length)], [grid_1], grid_1, ratio=0.1)
check("120 of 1200 tokens", (len(sample.keep[0]), length) == (120, 1200), "1 % of the comparisons")

# %% tags=["solution"]
# 2. No: at this size the heads are larger, because their layers are.
parts = {**dict(model.backbone.named_children()), **dict(model.named_children())}
del parts["backbone"]  # listed by its own parts
counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
for name, count in sorted(counts.items(), key=lambda item: -item[1]):
    print(f"{name:10} {count:>12,}")
everything = sum(p.numel() for p in model.parameters())
check("the parts are the whole", sum(counts.values()) == everything, f"{everything:,} parameters")

# %% tags=["solution"]
# 3. A quarter, evenly spread, is every second row of every second column.
from mimdet.models.sampling import grid_sampler

scores = grid_sampler(tokens[0], grid, torch.Generator().manual_seed(SEED))
even = mimdet.select([scores], [grid], grid, ratio=0.25)
rows_kept, columns_kept = even.keep[0] // grid[1], even.keep[0] % grid[1]
check("one parity of rows", len((rows_kept % 2).unique()) == 1)
check("one parity of columns", len((columns_kept % 2).unique()) == 1)
show_sample(image, even)

# %% tags=["solution"]
# 4. The large ones. Small ones are found on c2 and c3, which come from the stem and lose no token.
one = mimdet.evaluate(finished, few, sample_ratio=1 / 256).box
whole = mimdet.evaluate(finished, few).box
for size in ("AP_small", "AP_medium", "AP_large"):
    print(f"{size:9}  one token {100 * one[size]:4.1f}, all {100 * whole[size]:4.1f}")
loss = {size: whole[size] - one[size] for size in ("AP_small", "AP_large")}
check("large objects need the transformer most", loss["AP_large"] > loss["AP_small"] + 0.05)


# %% tags=["solution"]
# 5. Scores are any number per token; the highest are kept. Nothing needs to be registered.
def strongest(tokens, grid, generator):  # (L, D), (h, w) of one image -> (L,)
    return tokens.norm(dim=1)


own_cfg = copy.deepcopy(short)
own_cfg.training.steps = 5
own_model = mimdet.build_detector(own_cfg, sampler=strongest)
done = [step.number for step in mimdet.train(own_cfg, "runs/strongest", model=own_model)]
check("five steps", done == [1, 2, 3, 4, 5])
own_model = mimdet.load_detector("runs/strongest", trust_code=True)  # it runs the code above
check("the sampler came back", own_model.backbone.sampler.__name__ == "strongest")
show_sample(image, own_model.backbone.draw(tokens, grid, batch.image_sizes, mimdet.Sampling(0.25)))
