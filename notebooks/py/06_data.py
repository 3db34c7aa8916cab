# %% [markdown]
# # 06 · Data: from a file to what the detector sees
#
# **The silent mistakes are in the data, and a second way to compute the same thing finds them**: a
# box format mixed up, a mask that is not flipped with its image, an image listed twice.
# **Afterwards you can** follow one image from a COCO file, or a Hugging Face table, through the
# paper's augmentation into a batch, check every step another way, tell which faults of a data set
# are noticed, and begin with pictures of your own.
#
# | | quick (`MODE = "quick"`) | full (`MODE = "full"`) |
# |---|---|---|
# | study | an hour, after 00 | |
# | what you see | 24 drawn scenes, written as a COCO data set; a sample browser | the same on COCO val2017 |
# | time | about half a minute; 15 s of one CPU core | not timed |
# | memory | about 1 GB | as quick |
# | needs | nothing but the kit | COCO 2017 in the folder named by `MIMDET_COCO` |
#
# **Your own data:** set `PATH` to a folder with `images/` and `annotations.json` (COCO format), or
# `train.json` and `val.json`. With a photo, the browser shows it and the rest drawn scenes.

# %% tags=["parameters"]
MODE = "quick"  # "full": COCO val2017
SEED = 0  # of the order and the augmentation
PATH = ""  # "nuclei": real pictures; a photo; a folder of data; "": MIMDET_PICTURES
SOLUTIONS = False  # True: the answers at the end run too

# %%
import mimdet
from mimdet import ShapesCOCO, check, judge
from mimdet.data.shapes import export
from mimdet.notebook import open_pictures, own_path

PATH = own_path(PATH)
pictures = open_pictures(PATH, MODE)
files = pictures
if files.data.source != "coco" or not files.dataset.has_masks:
    export(ShapesCOCO("shapes-v1-medium", length=24, split="val"), "runs/06-data/scenes")
    files = open_pictures("runs/06-data/scenes")  # drawn scenes, now as files like anyone's
dataset, annotations, images = files.dataset, files.data.val_json, files.data.val_images
print(len(dataset), "images,", len(dataset.categories), "categories")

# %% [markdown]
# ## 1 · What a COCO file holds
#
# One json with three lists that refer to each other by number: an annotation names its image by
# `image_id` and its class by `category_id`. Nothing enforces that the numbers fit.

# %%
import json
from pathlib import Path

content = json.loads(Path(annotations).read_text())
for section in ("images", "annotations", "categories"):
    entry = {k: str(v)[:40] if k == "segmentation" else v for k, v in content[section][0].items()}
    print(f"{section} ({len(content[section])}), the first one:\n    {entry}")
listed = {entry["id"] for entry in content["images"]}
named = {a["image_id"] for a in content["annotations"]}
check("every annotation belongs to a listed image", listed >= named)

# %% [markdown]
# `mimdet.CocoDataset` (`mimdet/data/coco.py`) turns entry *i* into a `Record`: the image, and a
# `Target` with boxes, labels and masks (`mimdet/structures.py`).

# %%
from mimdet.viz import show_data

most = max(range(len(files.records)), key=lambda i: len(files.targets[i]))
record = files.records[most]  # of the first images, the one with most objects
height, width = record.image.shape[1:]
print("image         ", tuple(record.image.shape), record.image.dtype)
print("target.boxes  ", tuple(record.target.boxes.shape), record.target.boxes.dtype)
print("target.labels ", record.target.labels.tolist())
print("masks.bitmaps ", tuple(record.target.masks.bitmaps.shape), record.target.masks.bitmaps.dtype)
show_data([record], dataset.categories, columns=1)

# %% [markdown]
# **Boxes** are `x, y, width, height` in the file and `x0, y0, x1, y1` inside the library, both in
# pixels. Four numbers do not tell which they are, so this is the classic silent error; the rule
# here is that the file's format exists only in the code that reads and writes files.
#
# **Labels** are the ranks 0..N-1 of the category ids. The ids themselves may be any numbers: COCO's
# 80 categories have ids up to 90, with holes. Below, a copy of the file with other ids gives the
# same labels.

# %%
import copy

import torch

own = [a for a in content["annotations"] if a["image_id"] == record.image_id]
own = [a for a in own if not a.get("iscrowd")]
x, y, w, h = torch.tensor([a["bbox"] for a in own]).float().unbind(1)
corners = torch.stack([x, y, x + w, y + h], 1)
same = torch.allclose(corners, record.target.boxes, atol=0.01)
check("xywh in the file, xyxy in the record", same)

# %%
first = {entry["id"] for entry in content["images"][:24]}
chosen = [a for a in content["annotations"] if a["image_id"] in first]
small = {**content, "images": content["images"][:24], "annotations": chosen}
other = copy.deepcopy(small)
for entry, key in [(c, "id") for c in other["categories"]] + [
    (a, "category_id") for a in other["annotations"]
]:
    entry[key] = 7 * entry[key] + 3  # the same order, with holes
Path("runs/06-data").mkdir(parents=True, exist_ok=True)
Path("runs/06-data/other_ids.json").write_text(json.dumps(other))
renumbered = mimdet.CocoDataset("runs/06-data/other_ids.json", images)
print("ids in the file", renumbered.category_ids[:6], "... labels", list(range(6)), "...")
same = torch.equal(renumbered[most].target.labels, record.target.labels)
check("other ids, the same labels", same, "ids go back into files that COCO's tools read")

# %% [markdown]
# **Crowds.** `iscrowd: 1` marks a region of many objects that nobody outlined one by one. It is
# not trained on, but evaluation needs it: a detection inside a crowd is neither right nor wrong. So
# a `Record` leaves it out and `ground_truth()`, which evaluation reads, keeps it.

# %%
crowded = copy.deepcopy(small)
marked = next(a for a in crowded["annotations"] if a["id"] == own[0]["id"])
marked["iscrowd"] = 1
Path("runs/06-data/crowd.json").write_text(json.dumps(crowded))
with_crowd = mimdet.CocoDataset("runs/06-data/crowd.json", images)
truth = [a for a in with_crowd.ground_truth()["annotations"] if a["image_id"] == record.image_id]
print(f"record: {len(with_crowd[most].target)} objects; ground truth: {len(truth)} annotations")
check("one object fewer to train on", len(with_crowd[most].target) == len(record.target) - 1)
check("still there for evaluation", any(a["iscrowd"] for a in truth))

# %% [markdown]
# ## 2 · Masks: polygons, run lengths, and small bitmaps
#
# A file has a mask in one of two forms. *Polygons*: corners in fractions of a pixel, several for an
# object in several parts. *Run lengths* (RLE): how many pixels of the whole image, column after
# column, are outside, inside, outside, ... A polygon is exact at any scale, run lengths stop at the
# pixel.
#
# Inside, either becomes a `Crops`: a bitmap of 112 × 112 cells over the object's own box
# (`mimdet/data/rasters.py`). Here is one triangle of 20 pixels both ways.

# %%
from mimdet.data.rasters import crops_from_segmentations
from mimdet.structures import rle_to_bitmap
from mimdet.viz import show_bitmaps
from pycocotools import mask as coco_mask

polygon = [[4.5, 3.2, 23.8, 9.6, 8.1, 22.4]]  # x0, y0, x1, y1, x2, y2
runs = coco_mask.merge(coco_mask.frPyObjects(polygon, 26, 30))
pixels = rle_to_bitmap(runs)  # (26, 30)
both = crops_from_segmentations([polygon, runs], 26, 30).bitmaps.bool()
overlap = (both[0] & both[1]).sum() / (both[0] | both[1]).sum()
print(f"{len(runs['counts'])} bytes of run lengths; overlap of the two crops {overlap:.2f}")
check("the same object", overlap > 0.85, "they differ by steps of one pixel")
show_bitmaps({"run lengths: pixels": pixels, "their crop": both[1], "crop of the polygon": both[0]})

# %% [markdown]
# Why not a bitmap of the whole image per object, as most code does? Because nearly all of it is
# zero, and it has to be cut, resized and flipped with the image each time. A crop keeps its bitmap;
# only its box moves, and a flip is a flip of 112 × 112 cells. Measured on a CPU, photographs under
# the paper's recipe: of the usual pipeline's time 64 % were masks; a loader with crops, and one
# resize of the image, was 4.7 times faster, its samples a third of the bytes. As 28 × 28 mask
# targets crops also agree better with the polygon than resized bitmaps do, IoU 0.989 and 0.952,
# because no half pixel is lost on the way.

# %%
from mimdet.data.rasters import full_bitmap
from mimdet.structures import crops_to_bitmaps

whole = crops_to_bitmaps(record.target.masks, height, width)  # (N, H, W) bool, from the crops
exact = [torch.from_numpy(full_bitmap(a["segmentation"], height, width)) for a in own]
ious = [float((a & b).sum() / (a | b).sum()) for a, b in zip(whole, exact, strict=True)]
print("IoU of each crop with the file's own mask:", [round(iou, 2) for iou in ious])
why = "exact up to 110 pixels a side, at most edges differ"
check("crops are the file's masks", sum(ious) / len(ious) > 0.9, why)
cells, everything = record.target.masks.bitmaps.numel(), exact[0].numel() * len(exact)
print(f"{len(own)} masks: {cells:,} cells; as bitmaps of the whole image {everything:,}")

# %% [markdown]
# ## 3 · A Hugging Face table
#
# Many data sets come as a table with an `image` column and an `objects` column (bounding boxes and
# categories of each image). Their boxes have any of three layouts, and no field says which one. So
# `bbox_format` must be given (`mimdet/data/hub.py`); what contradicts it is an error. Here the same
# images become such a table, with xyxy boxes (`data.source = "hub"` in a configuration).

# %%
import datasets
from mimdet.viz import to_pixels
from PIL import Image

datasets.disable_progress_bars()
fields = {
    "bbox": datasets.List(datasets.Value("float32")),
    "category": datasets.ClassLabel(names=dataset.categories),
}
objects = {name: datasets.List(kind) for name, kind in fields.items()}
features = datasets.Features({"image": datasets.Image(), "objects": objects})
rows = {"image": [Image.fromarray(to_pixels(image)) for image in files.images]}
boxes_and_labels = [(t.boxes.tolist(), t.labels.tolist()) for t in files.targets]
rows["objects"] = [{"bbox": boxes, "category": labels} for boxes, labels in boxes_and_labels]
table = datasets.Dataset.from_dict(rows, features=features)

# %%
from mimdet.data.hub import HubDataset

readable = []
for bbox_format in ("", "cxcywh_normalised", "xywh", "xyxy"):
    try:
        HubDataset(table, bbox_format=bbox_format)
        readable.append(bbox_format)
    except ValueError as error:
        print(f"{bbox_format!r}:\n    {error}")
print("can be read as", readable)
check("corners are not taken for sizes", readable == ["xyxy"], "some box would leave its image")
boxes = HubDataset(table, bbox_format="xyxy")[most].target.boxes
check("table and file give the same boxes", torch.equal(boxes, record.target.boxes))

# %% [markdown]
# ## 4 · Augmentation: the paper's recipe
#
# What MIMDet trains on, from its released code: mirror left-right half of the time; with
# probability 0.5 first resize the short side to 400, 500 or 600 and cut out a window with sides of
# 384 to 600 pixels; then resize the short side to one of 480, 512, ... 800, the long side at most
# 1333. The test transform is 800 / 1333 without any of this.
#
# In the library a transform is drawn as a `Geometry` first, from the image's size alone, and
# applied later (`mimdet/data/augment.py`). Resize, crop, resize again become **one** crop and one
# resize, which is faster and sharper, and sizes are known before a pixel is read: section 6 needs
# that. Three of eight draws for one image, the third also in other colours, which the paper leaves
# alone (`data.colour_jitter`; there is `data.blur` too):

# %%
import dataclasses

from mimdet.config import DataConfig
from mimdet.data.augment import apply, augmented, draw_geometry, rng_for

recipe = DataConfig()  # the paper's numbers
chances = [rng_for("geometry", SEED, epoch, most) for epoch in range(8)]
geometries = [draw_geometry(recipe, height, width, rng, train=True) for rng in chances]
print(geometries[0])
bright = dataclasses.replace(recipe, colour_jitter=(0.6, 0.6, 0.6, 0.3))
_, *coloured = augmented(bright, record, rng_for("geometry", SEED, 4, most))
plain = [apply(geometry, record) for geometry in geometries[2:5]]
show_data([*plain, coloured], dataset.categories)

# %% [markdown]
# Now the baselines' recipe, *large-scale jitter*: resize by a factor from 0.1 to 2 of the canvas,
# then cut or pad to a square of 1024 pixels. Every image costs the same 4096 tokens, grey ones too.

# %%
jitter = dataclasses.replace(recipe, augment="lsj")
chances = [rng_for("geometry", SEED, epoch, most) for epoch in range(4)]
drawn = [draw_geometry(jitter, height, width, rng, train=True) for rng in chances]
show_data([apply(geometry, record) for geometry in drawn[1:]], dataset.categories)

# %% [markdown]
# Do masks move with their image? Test it in an independent way: take the bitmaps of the whole
# image, treat them as a picture, transform that. The crops, whose bitmaps only ever flip, must end
# up on the same pixels.

# %%
from mimdet.data.augment import transform_image

union = whole.any(0)  # (H, W): everything that belongs to an object
picture = (255 * union.byte()).expand(3, -1, -1)
overlaps = []
for geometry in geometries:
    _, target = apply(geometry, record)
    moved = crops_to_bitmaps(target.masks, *geometry.output_size).any(0)
    reference = transform_image(geometry, picture)[0] > 127
    overlaps.append(float((moved & reference).sum() / (moved | reference).sum()))

# %%
print("IoU:", [round(overlap, 3) for overlap in overlaps])
check("a moved mask is the moved picture", min(overlaps) > 0.9, "with a flip forgotten, far less")
show_bitmaps({"crops, moved": moved, "bitmap, moved": reference, "they differ": moved ^ reference})

# %% [markdown]
# ### The browser
#
# Choose an image, a recipe and a seed. On the left the image as stored, the part that is not used
# faded; on the right what the network gets. What to look for: at which seeds does an object lose
# most of itself, and is its box still right? How small do objects get under `lsj`?

# %%
from mimdet.viz import SampleBrowser

browser = SampleBrowser(pictures.dataset or pictures.records, recipe, pictures.categories)
browser.index.value, browser.seed.value = 3, 5
browser

# %% [markdown]
# ## 5 · Order without a state
#
# Which images form step 4711, and how is each of them augmented? Here that is a function of (seed,
# step) (`mimdet/data/loader.py`), so a run resumes at any step, on another number of processes or
# workers, and sees the same batches.

# %%
from mimdet.data.loader import TrainLoader

loader = TrainLoader(dataset, recipe, batch_size=2, accumulate=2, seed=SEED)
steps = list(loader.batches(0, 4))  # micro-batches of the steps 0 to 3, one after the other
for number, step in enumerate(steps):
    print(f"step {number}: images", [batch.image_ids for batch in step])
fresh = TrainLoader(dataset, recipe, batch_size=2, accumulate=2, seed=SEED)
(late,) = fresh.batches(3, 4)  # as after a resume: steps 0 to 2 are never drawn
both_ways = [[image for batch in step for image in batch.images] for step in (late, steps[3])]
check("step 3 is the same without its past", all(map(torch.equal, *both_ways)))

# %% [markdown]
# ## 6 · Buckets: not paying for padding
#
# Images of a batch are padded to one size, and every padded token runs through stem, decoder and
# neck. With the paper's recipe sizes differ by a factor of three in area, so a batch at random
# computes twice what its images need. Because sizes are drawn before pixels are read, up to 1024
# showings can be sorted into batches of similar size (`bucket`), and the batches then shuffled.
# Computed here for 1024 draws of photographs, three of four in landscape:

# %%
import numpy as np
from mimdet.data.loader import bucket
from mimdet.viz import padding_factor, show_batches

shapes = [(480, 640), (427, 640), (480, 640), (640, 480)] * 256
sizes = [
    draw_geometry(recipe, *shape, rng_for("geometry", SEED, 0, i), train=True).output_size
    for i, shape in enumerate(shapes)
]

# %%
cells = np.ceil(np.array(sizes) / 32).astype(int)  # a canvas grows in steps of 32 pixels
mixed = rng_for("order", SEED, 0).permutation(len(sizes))
for images_per_batch in (2, 8, 16, 32):
    ways = {
        "at random": mixed.reshape(-1, images_per_batch),
        "in buckets": bucket(cells, images_per_batch),
    }
    factors = {
        name: padding_factor([[sizes[i] for i in group] for group in groups])
        for name, groups in ways.items()
    }
    print(f"batch {images_per_batch:2}:", {name: round(f, 2) for name, f in factors.items()})

# %%
ways = {"at random": mixed.reshape(-1, 8), "in buckets": bucket(cells, 8)}
seen = sorted(int(i) for group in ways["in buckets"] for i in group)
check("every showing is in one bucket", seen == list(range(1024)), "sorting must not lose images")
check("buckets waste less than a fifth", factors["in buckets"] < 1.2 < factors["at random"])
every = {name: [[sizes[i] for i in g] for g in groups[::60]] for name, groups in ways.items()}
show_batches(every)

# %% [markdown]
# Blue is image, orange padding; above each row, tokens computed per token of an image. The price:
# images of one batch are alike in size, so less mixed than at random. That is why only windows of
# about a thousand showings are sorted, and batches are shuffled within them.
#
# ## 7 · Plant faults, and see them found
#
# Training on a broken data set often works, only worse. In a terminal, `mimdet check-data
# annotations.json images/` (`mimdet/data/checks.py`) reads everything and does not stop at the
# first fault. First the files of this notebook, then a copy with one fault of each kind.

# %%
from mimdet.data.checks import ERRORS

report = mimdet.check_dataset(annotations, images, decode=len(dataset) < 200)
print(report.table(examples=1))
check("no errors", report.ok or PATH, "warnings are worth a look, errors stop or spoil a training")

# %%
broken = copy.deepcopy(small)
objects, entries = broken["annotations"], broken["images"]
objects[0]["bbox"][2] = 0  # a box without width
objects[1]["category_id"] = 999  # a class that is not listed
objects[2]["image_id"] = "nowhere"  # an image that is not listed
objects[3]["bbox"][0] += 10_000  # a box outside its image
objects[4]["id"] = objects[5]["id"]  # two objects, one id
objects.append({**objects[6], "id": 10**9})  # an object twice
entries[0]["file_name"] = "lost.png"  # no such file
entries[-1]["width"] += 10  # not the size of the file
Path("runs/06-data/broken.json").write_text(json.dumps(broken))
found = mimdet.check_dataset("runs/06-data/broken.json", images)
for kind, problems in found.by_kind().items():
    severity = "error" if kind in ERRORS else "warning"
    print(f"{severity:8}{kind:28}{problems[0].where}: {problems[0].message}")

# %%
planted = {"empty-box", "unknown-category", "unknown-image", "box-outside", "image-size-wrong"}
planted |= {"duplicate-annotation-id", "duplicate-annotation", "image-missing"}
check("all eight faults are found", planted <= set(found.by_kind()))
corners = copy.deepcopy(small)
for entry in corners["annotations"]:
    x, y, w, h = entry["bbox"]
    entry["bbox"] = [x, y, x + w, y + h]
Path("runs/06-data/corners.json").write_text(json.dumps(corners))
kinds = mimdet.check_dataset("runs/06-data/corners.json", images, decode=False).by_kind()
check("a file full of corners is recognised", "boxes-look-xyxy" in kinds)
print(ERRORS["boxes-look-xyxy"])

# %% [markdown]
# Some bring others with them: a box moved away no longer fits its mask.
#
# ## 8 · Your own pictures
#
# `mimdet start FOLDER RUN` reads COCO, VOC, YOLO, LabelMe or masks, splits them, chooses every field
# with a reason, and times it. Guess first: are most objects larger than a token, 16 pixels?

# %% tags=["timing"]
own = annotations if len(dataset) < 1000 else "runs/06-data/other_ids.json"  # of COCO 24 images
proposal = mimdet.propose(own, "runs/06-data/own", images=images)
print(proposal.table())

# %%
from mimdet.viz import show_sizes

for name in ("data.test_short_side", "detector.anchor_sizes", "training.init_from"):
    print(f"{name}: {proposal.reasons[name]}")
larger = (proposal.sides > 16).mean()
check("most objects are larger than a token", larger > 0.5, f"{larger:.0%} of them")
show_sizes(proposal.sides, proposal.cfg.detector.anchor_sizes)

# %% [markdown]
# ## Summary
#
# - Inside: xyxy pixels, labels 0..N-1, masks of 112 × 112 cells over their own box. xywh, category
#   ids, polygons and run lengths exist only where files are read and written.
# - Crowds are not trained on, and evaluation ignores what is detected inside them.
# - An augmentation is drawn before it is applied; boxes and masks move with the image, and a test
#   compares them with a moved picture.
# - What a step sees is a function of (seed, step).
# - Sorting showings by size saves about half of the tokens of a large batch.
# - Begin with `mimdet start`, or run `mimdet check-data` before the first training on new data.
#
# ## Exercises
#
# 1. How many bytes do the masks of 7 objects take as bitmaps of an 800 × 1067 image, how many as
#    crops?
# 2. Forget a flip: mirror the image but not its masks. Which check of this notebook notices?
# 3. Over 400 draws of the paper's recipe: how often is a window cut out, and what share of objects
#    is lost?
# 4. Turn the boxes of the table into YOLO's layout (centre and size, as shares of the image) and
#    read it.
# 5. How many showings must be sorted together? Compute the padding of batches of 16 for windows of
#    16, 64, 256 and 1024.

# %%
mine = {1: ..., 3: ...}  # bytes as crops, how often (0 to 1); then run the next cell too

# %% tags=["judge"]
judge(1, mine[1], 7 * record.target.masks.bitmaps[0].numel())
many = [
    draw_geometry(recipe, height, width, rng_for("geometry", 1, i, 0), train=True)
    for i in range(400)
]
windows = sum(tuple(g.crop) != (0, 0, width, height) for g in many) / len(many)
judge(3, mine[3], lambda share: abs(share - windows) < 0.05)

# %% tags=["solution"]
# 1. One byte a cell.
as_bitmaps, as_crops = 7 * 800 * 1067, 7 * 112 * 112
print(f"{as_bitmaps:,} and {as_crops:,} bytes: {as_bitmaps / as_crops:.0f} times less")
check("seventy times less, and it does not grow with the image", 67 < as_bitmaps / as_crops < 69)

# %% tags=["solution"]
# 2. "A moved mask is the moved picture"; nothing crashes and every shape is right.
geometry = geometries[-1]
_, target = apply(dataclasses.replace(geometry, flip_h=not geometry.flip_h), record)
forgotten = crops_to_bitmaps(target.masks, *geometry.output_size).any(0)
overlap = float((forgotten & reference).sum() / (forgotten | reference).sum())
print(f"IoU {overlap:.2f}")
check("it would be noticed", overlap < 0.9, "0.9 is what the check asks for")

# %% tags=["solution"]
# 3. Half of the time; a small share, because windows are large.
cut = np.mean([geometry.crop != (0, 0, width, height) for geometry in many])
lost = np.mean([1 - len(apply(g, record)[1]) / len(record.target) for g in many[:100]])
print(f"a window in {cut:.0%} of the draws, {lost:.1%} of the objects lost")
check("about half", 0.4 < cut < 0.6, "crop_probability = 0.5; a window may be the whole image")

# %% tags=["solution"]
# 4. Divide by width and height; the library multiplies them back.
shares = []
for picture, target in zip(files.images, files.targets, strict=True):
    x0, y0, x1, y1 = (target.boxes / torch.tensor(picture.shape[:0:-1]).repeat(2)).unbind(1)
    boxes = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], 1)
    shares.append({"bbox": boxes.tolist(), "category": target.labels.tolist()})
yolo = datasets.Dataset.from_dict({**rows, "objects": shares}, features=features)
back = HubDataset(yolo, bbox_format="cxcywh_normalised")[most].target.boxes
check("the same boxes", torch.allclose(back, record.target.boxes, atol=0.01))

# %% tags=["solution"]
# 5. Sorting within a window of 16 batches gives most of it.
waste = {}
for window in (16, 64, 256, 1024):
    starts = range(0, 1024, window)
    groups = [start + g for start in starts for g in bucket(cells[start : start + window], 16)]
    waste[window] = padding_factor([[sizes[i] for i in group] for group in groups])
print({window: round(factor, 2) for window, factor in waste.items()})
check("more to sort, less padding", waste[16] > waste[64] > waste[256] > waste[1024])
