# %% [markdown]
# # 00 · Quickstart: a detector that looks at a part of the image
#
# **Hide all but one of its tokens from a transformer detector, and it is the large objects that go
# missing, not the small ones.** Here you see that with a brush, learn the words of detection in one
# picture, and then train a very small detector of the same kind, score it and use it.
#
# | | quick (`MODE = "quick"`) | full (`MODE = "full"`) |
# |---|---|---|
# | study | an hour, after PyTorch's basics | |
# | what you see | 1.5 million parameters, from random weights, on drawn scenes | MIMDet ViT-B, 128 million parameters, on COCO |
# | time | 1 to 2 minutes on two busy CPU cores (about 65 s of one core) | not timed: 500 steps of the recipe's 67,500, scored on 500 images |
# | memory, disk | 1.8 GB at most | notebook 07 counts it; 14 GB of checkpoints |
# | needs | nothing but the kit; no GPU, no download | a GPU, COCO 2017 in `MIMDET_COCO`, `mimdet download mae-base-full` |

# %% tags=["parameters"]
MODE = "quick"  # "full": COCO and a GPU
STEPS = 0  # training steps; 0: as many as the mode takes (a few are too few for two checks)
SEED = 0  # of weights, scenes and samples
PATH = ""  # "nuclei": real pictures; a photo; a folder of data; "": MIMDET_PICTURES
SOLUTIONS = False  # True: the answers at the end run too

# %% [markdown]
# ## 1 · Take tokens away
#
# A vision transformer cuts an image into *tokens* of 16 × 16 pixels and compares each with every
# other. MIMDet ([Fang et al., ICCV 2023](https://arxiv.org/abs/2204.02964)) trains a detector whose
# transformer sees only a random **sample** of them. Below is a finished one, `tiny`: the sample,
# what a *masked autoencoder*, a network trained to paint what is hidden, makes of it, what the
# detector finds, the truth.
#
# **Guess first:** how many objects are found from *one token*, and which? Then pull *ratio kept* to
# its left end. Brush over the first picture: a stroke drops tokens, or brings them back when it
# starts on a grey one.

# %%
import mimdet
from mimdet.notebook import open_pictures, own_path
from mimdet.viz import TokenLab

finished, mae = mimdet.load_detector("tiny"), mimdet.load_mae_model("tiny_mae")
unseen = mimdet.ShapesCOCO("shapes-v1-medium", length=200, split="val")  # held out
shown = [unseen[i] for i in (4, 2, 5, 1)]
images, truth = [r.image for r in shown], [r.target for r in shown]
lab = TokenLab(finished, mae, images, targets=truth, ratio=1.0)
for record in open_pictures(own_path(PATH), count=4).records if own_path(PATH) else []:
    lab.add(record.image, f"{record.image_id}")  # `tiny` knows drawn shapes alone
lab.image.value = 0
lab

# %% [markdown]
# From one token the painting collapses, and yet something is found: the detector has a second,
# convolutional way to the pixels, the *stem*, which never loses a token. What it cannot do without
# the others is measured in section 5.
#
# ## 2 · The words of detection, in one picture

# %%
from mimdet.viz import show_stages

show_stages(finished, shown[0])

# %% [markdown]
# A **box** is x0, y0, x1, y1 in pixels. (1) **Anchors** are boxes of fixed sizes laid around every
# place of the feature maps. (2) The region proposal network (**RPN**) asks of each "is there
# anything?", shifts the likely ones, and of boxes that overlap much keeps the surest (non-maximum
# suppression, **NMS**): the **proposals**. (3) Small networks, the detector's **heads**, give each
# a class, a score, a better box and a **mask**; NMS again. (4) The truth, each object with the best
# **IoU**: the area that two boxes share, divided by the area that either covers, 1 for equal ones.
# *Average precision* (**AP**) makes one number of it: 100 means that every object is found, named
# and outlined, and that nothing else scores higher (notebook 08 computes one by hand). *Head* has a
# second meaning: one of the parallel attentions of a transformer block. More words:
# [glossary](../docs/glossary.md).
#
# ## 3 · Your own: the data
#
# Always look at data before training on it. `cfg` is a plain object with every number of the run
# (`mimdet/config.py`); a misspelled field is an error. In quick mode the data are *ShapesCOCO*
# (`mimdet/data/shapes.py`): scene *i* is drawn from the seed, so nothing is stored and every box
# and mask is exact.

# %%
from mimdet import build_dataset, check, judge, notebook_setup
from mimdet.viz import show_data

cfg = notebook_setup(MODE, steps=STEPS, seed=SEED, minutes={"quick": 1})
cfg.training.steps = cfg.training.steps or 500  # of full mode
if MODE == "full":
    cfg.data.limit_val = cfg.data.limit_val or 500
scenes = build_dataset(cfg.data, "val", seed=SEED)  # held out: never trained on
records = [scenes[i] for i in range(10)]
show_data(records[:4], scenes.categories)

# %% [markdown]
# ## 4 · Build the model, and train it
#
# Figure 1 of the paper from left to right (`mimdet/models/backbones.py`): a small convolutional
# **stem** turns the image into a grid of tokens; a **sampler** scores them and the best `ratio` of
# them are kept; the **encoder**, a plain ViT, works on the kept tokens only; the **decoder** puts
# them back into the full grid, fills the gaps, and lets them all attend to each other once more.
# The gaps get one learned vector here, as in version 1 of the paper; in version 2 (`mimdet_base`)
# they get the stem's own tokens. The decoder's output and the stem's earlier stages are the feature
# pyramid of an ordinary Mask R-CNN.

# %%
import torch

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

# %% [markdown]
# Attention compares every kept token with every kept token: at ratio 0.25 that is a sixteenth of
# the comparisons. Half of what MIMDet saves is there (notebook 02).
#
# `mimdet.train` (`mimdet/training/train.py`) is a generator: it yields after every step, so the
# loop is yours. `watch` passes the steps on and redraws one picture every few seconds: five losses
# (two of the RPN; class, box and mask of its proposals), and what the detector finds in two
# held-out scenes. Each step draws a **new** sample of half of the tokens of each image.

# %%
from mimdet.notebook import watch
from mimdet.viz import show_detections

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
# Read the curves from below. First the RPN learns *where* something is: its objectness falls to a
# fraction, printed below. Only then do the heads get proposals on objects, so their box loss
# **rises**: there is suddenly something to learn. That is why the total says so little.

# %%
from mimdet.training.run import Run

history = [row["loss_rpn_cls"] for row in Run(run, cfg).metrics() if "loss" in row]
first, last = sum(history[:20]) / 20, sum(history[-20:]) / 20
print(f"{len(history)} steps; RPN objectness: {first:.2f} at first, {last:.2f} at last")
check("it learned where objects are", last < first / 2, "means of 20 steps", trained=True)

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
import tempfile

short = copy.deepcopy(cfg)
short.training.steps = 4
short.data.shapes_val = short.data.limit_val = 2  # every training ends with an evaluation
place = tempfile.mkdtemp(dir="runs")  # another one every time
straight = [step.loss for step in mimdet.train(short, f"{place}/straight")]

for step in mimdet.train(short, f"{place}/stopped"):
    if step.number == 2:
        break  # leaving the loop saves, as the stop button does
resumed = list(mimdet.train(short, f"{place}/stopped"))
check("it resumed at step 3", [step.number for step in resumed] == [3, 4])
exact = [step.loss for step in resumed] == straight[2:]
check("with the same losses", exact or MODE == "full", "bit for bit on a CPU")

# %% [markdown]
# ## 5 · AP, from a single token to all
#
# The model was trained on half of the tokens, and can be *evaluated* at any ratio. Below 1 the
# tokens are drawn at random, so those numbers are means of two draws. The last column is the time
# of one draw over all images, on this machine.

# %% tags=["timing"]
from mimdet.analysis.evaluate import evaluate_ratios, ratio_table

rows = evaluate_ratios(model, scenes, (1 / total, 0.25, 0.5, 1.0), draws=2)
print(ratio_table(rows))  # its last column is time, so this output is not kept in the notebook

# %%
from mimdet.viz import show_ratios

show_ratios(rows)

# %% [markdown]
# Now the same question to the finished detector. The two are not in one race: other scenes, other
# classes, more training, as the next cell prints.

# %%
from mimdet.files import read_json
from mimdet.models.checkpoint_files import SHIPPED

few = mimdet.ShapesCOCO("shapes-v1-medium", length=48, split="val")
trained = evaluate_ratios(finished, few, (1 / 256, 0.25, 1.0), draws=1)  # of 16 x 16 tokens
card, t = read_json(SHIPPED / "cards.json")["tiny"], cfg.training
own = t.steps * t.batch_size * t.accumulate
both = {"yours": (own, scenes, rows), "finished": (card["images_seen"], few, trained)}
for name, (seen, images_of, measured) in both.items():
    one, every = 100 * measured[0]["box_ap"], 100 * measured[-1]["box_ap"]
    print(f"{name}: trained on {seen:,} images; AP of {len(images_of)} held-out ones,", end=" ")
    print(f"{len(images_of.categories)} classes: {one:.1f} with one token, {every:.1f} with all")
yours = rows[-1]["box_ap"] > 0.02
check("yours has learned something", yours, "an untrained one scores 0.0", trained=True)
check("the finished one uses what its encoder sees", every > one + 5, "by 5 AP or more")
show_ratios(trained)

# %% [markdown]
# After a minute of training, what is found is found on the fine maps c2 and c3 of the stem: in
# quick mode the transformer adds little yet, and another seed moves such an AP by points. The
# finished one needs its transformer; which objects it loses is exercise 3. Ask for this curve
# before you believe that a detector profits from its encoder: an earlier `tiny` scored well and had
# learnt to do without (notebook 09).
#
# The paper's full-size answer (Table 2 of arXiv version 1; ViT-B on COCO, evaluated at ratio 1):
# trained at 0.25, 49.9 box and 44.7 mask AP; trained at 0.5, 51.5 and 46.0. A quarter of the tokens
# is nearly enough, half of them are better.
#
# ## 6 · Look, and use it
#
# A number does not say *what* is wrong. Each pair below is a held-out scene, the truth on the left
# and detections with a score of at least 0.3 on the right. Look for the three usual failures: a
# missed object, a right box with a wrong name, one object found twice.

# %%
found = mimdet.predict(model, images[7:])
show_detections(images[7:], found, truth[7:], scenes.categories, score_threshold=0.3)

# %% [markdown]
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
    write_png(scenes[min(28, len(scenes) - 1)].image, path)

found = mimdet.predict(model, path)
show_detections([read_image(path)], [found], None, scenes.categories, 0.5, columns=1)

# %% [markdown]
# The trained detector stays on disk. In another notebook: `mimdet.load_detector("runs/...")`; in a
# terminal: `mimdet predict runs/... photo.jpg`, `mimdet evaluate runs/... --ratios 0.25 0.5 1`.
#
# ## Summary
#
# - A token is 16 × 16 pixels; `ratio` is the share the encoder sees; a `Sample` says which ones.
# - Anchors, proposals, heads, NMS; IoU measures a box, AP a detector.
# - Attention in the encoder costs `ratio²`; the decoder restores the full grid for the detector.
# - A run is a directory; stopping and resuming changes nothing.
# - A minute of training shows that the machine works, not how good the method is: that takes its
#   pre-trained weights and days on COCO. On a laptop, `mimdet demo` takes five to six minutes.
#
# ## Exercises
#
# 1. An image of 480 × 640 pixels at ratio 0.1: what share of the attention's comparisons is left?
# 2. Which part of your model has most parameters: stem, encoder, decoder, neck, rpn or roi_heads?
# 3. Which objects lose most AP in `finished` with a single token: "small", "medium" or "large"?
#    Guess, then ask `mimdet.evaluate(finished, few, ...).box`, which has `AP_small` and the others.
# 4. The sampler `"grid"` spreads the tokens evenly. Which pattern must appear at ratio 0.25?
# 5. Write a sampler that keeps the tokens where the stem responds most, look at its sample, and
#    train with it for five steps.

# %%
mine = {1: ..., 2: ..., 3: ...}  # your answers for the dots; then run this cell and the next

# %% tags=["judge"]
kept = mimdet.select([torch.rand(1200)], [(30, 40)], (30, 40), ratio=0.1).keep[0]
parts = {**dict(model.backbone.named_children()), **dict(model.named_children())}
del parts["backbone"]  # listed by its own parts
counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
one, whole = (mimdet.evaluate(finished, few, sample_ratio=r).box for r in (1 / 256, 1.0))
lost = {size: whole[f"AP_{size}"] - one[f"AP_{size}"] for size in ("small", "medium", "large")}
judge(1, mine[1], len(kept) ** 2 / 1200**2)
judge(2, mine[2], max(counts, key=counts.get))
judge(3, mine[3], max(lost, key=lost.get))

# %% tags=["solution"]
# 1. 30 x 40 tokens, a tenth of them; comparisons go with the square.
grid_1 = (480 // 16, 640 // 16)
length = grid_1[0] * grid_1[1]
sample = mimdet.select([torch.rand(length)], [grid_1], grid_1, ratio=0.1)
check("120 of 1200 tokens", (len(sample.keep[0]), length) == (120, 1200), "1 % of the comparisons")

# %% tags=["solution"]
# 2. Not the transformer: at this size the heads are larger, because their layers are.
for name, count in sorted(counts.items(), key=lambda item: -item[1]):
    print(f"{name:10} {count:>12,}")
everything = sum(p.numel() for p in model.parameters())
check("the parts are the whole", sum(counts.values()) == everything, f"{everything:,} parameters")

# %% tags=["solution"]
# 3. The large ones, and the medium ones hardly less. Small ones are found on c2 and c3, which come
# from the stem and lose no token.
for size, points in lost.items():
    print(f"{size:7} all {100 * whole[f'AP_{size}']:4.1f}, one token {-100 * points:+.1f}")
check("large objects need the transformer most", lost["large"] > lost["small"] + 0.05)

# %% tags=["solution"]
# 4. A quarter, evenly spread, is every second row of every second column.
from mimdet.models.sampling import grid_sampler

scores = grid_sampler(tokens[0], grid, torch.Generator().manual_seed(SEED))
even = mimdet.select([scores], [grid], grid, ratio=0.25)
rows_kept, columns_kept = even.keep[0] // grid[1], even.keep[0] % grid[1]
check("one parity of rows", len((rows_kept % 2).unique()) == 1)
check("one parity of columns", len((columns_kept % 2).unique()) == 1)
show_sample(image, even)


# %% tags=["solution"]
# 5. Scores are any number per token; the highest are kept. Nothing needs to be registered.
def strongest(tokens, grid, generator):  # (L, D), (h, w) of one image -> (L,)
    return tokens.norm(dim=1)


own_cfg = copy.deepcopy(short)
own_cfg.training.steps = 5
own_model = mimdet.build_detector(own_cfg, sampler=strongest)
done = [step.number for step in mimdet.train(own_cfg, f"{place}/strongest", model=own_model)]
check("five steps", done == [1, 2, 3, 4, 5])
own_model = mimdet.load_detector(f"{place}/strongest", trust_code=True)  # it runs the code above
check("the sampler came back", own_model.backbone.sampler.__name__ == "strongest")
show_sample(image, own_model.backbone.draw(tokens, grid, batch.image_sizes, mimdet.Sampling(0.25)))
