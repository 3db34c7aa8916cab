# %% [markdown]
# # 08 · Results: why AP is what it is
#
# **One number, "box AP 59", hides which objects a detector loses, by which mistakes, and whether it
# uses its transformer at all.** **Afterwards you can** take the number apart: how it is computed,
# which sizes, classes and kinds of mistakes cost most, what they look like, how far two runs differ
# by chance. Nothing is trained, unless you bring data of your own.
#
# | | quick (`MODE = "quick"`) | full (`MODE = "full"`) |
# |---|---|---|
# | study | an hour, after 00 | |
# | what you see | two shipped detectors of 2 million parameters on 48 held-out ShapesCOCO scenes | the released MIMDet ViT-B on COCO val2017, its second run at ratio 0.5 |
# | time | about 40 s of one CPU core | not timed: nine passes over 5,000 images; fewer by `MIMDET_FULL=data.limit_val=500` |
# | memory | 1.3 GB | 0.5 GB of weights, twice |
# | needs | nothing but the kit | a CUDA GPU, COCO in `MIMDET_COCO`, `mimdet download mimdet-base` |
#
# **Your own results:** set `PATH`. On a folder (06 says how it looks) or the package's "nuclei" both
# detectors are first trained for `STEPS` steps, and every cell below speaks about your data.
# Of a photo you see the detections; scoring needs truth, so the rest stays with the scenes.

# %% tags=["parameters"]
MODE = "quick"  # "full": the released detector on COCO val2017
PATH = ""  # "nuclei": real pictures; a photo; a folder of data; "": MIMDET_PICTURES
STEPS = 60  # training steps on your own folder; nothing else is trained
SEED = 0  # of the sampled tokens, and of that training
SOLUTIONS = False  # True: the answers at the end run too

# %%
from pathlib import Path

import mimdet
import torch
from IPython.display import display
from mimdet import check, judge
from mimdet.notebook import open_detector, open_pictures, own_path
from mimdet.viz import show_detections

PATH = own_path(PATH)
pictures = open_pictures(PATH, MODE, count=4)
own_data = bool(PATH) and pictures.dataset is not None

# %%
if pictures.dataset is None:
    detector = open_detector(MODE)
    found = mimdet.predict(detector, pictures.images)
    display(show_detections(pictures.images, found, None, detector.categories, columns=1))
    print("A photo has no truth, so it cannot be scored: from here on the built-in data are used.")
    pictures = open_pictures("", MODE, count=4)

# %% [markdown]
# ## 1 · Two runs and their 24 numbers
#
# Two detectors, to compare; what their difference is worth is asked in section 7. In quick mode
# `tiny_half` was trained with half of the tokens, as the paper trains, and `tiny` is the same after
# 600 more steps with all of them (`mimdet/pretrained/README.md`); with a folder of your own both are
# warm-started on it: the preset `tiny` with one assignment, `cfg.data = data`.

# %%
data = pictures.data
if MODE == "quick" or own_data:
    data.augment, data.short_sides, data.test_short_side = "multiscale", (256,), 256  # as `tiny`
    data.limit_val, data.workers = 48, 0
scenes = mimdet.build_dataset(data, "val")

detectors = {name: name for name in ("tiny", "tiny_half")}
if own_data:
    for name in detectors:
        cfg = mimdet.presets.tiny()
        cfg.data = data
        cfg.training.steps, cfg.training.seed, cfg.training.init_from = STEPS, SEED, name
        cfg.training.warmup_steps, cfg.training.evaluate_every_steps = STEPS // 10, STEPS
        run = f"results-{Path(PATH).name}-{name}-{STEPS}-seed-{SEED}"
        mimdet.fit(cfg, name=run)
        detectors[name] = f"runs/{run}"

# %%
if MODE == "full" and not own_data:
    detectors = {"ViT-B": open_detector(MODE), "ViT-B, half": open_detector(MODE)}
    detectors["ViT-B, half"].backbone.sample_ratio_eval = 0.5
else:
    detectors = {name: mimdet.load_detector(place) for name, place in detectors.items()}
device = "cuda" if torch.cuda.is_available() else "cpu"
detectors = {name: model.to(device) for name, model in detectors.items()}
if own_data and data.train_json == data.val_json:
    print("Trained and scored on the same images: read types of errors, not the height of AP.")
first, second = detectors

bar = {"progress": MODE == "full"}
runs = {name: mimdet.evaluate(model, scenes, seed=SEED, **bar) for name, model in detectors.items()}
for name, run in runs.items():
    print(f"{name}: {len(run.results)} detections in {len(scenes)} images\n{run.table()}\n")

# %% [markdown]
# The columns are COCO's twelve numbers, times 100, once for boxes and once for masks
# (`mimdet/analysis/metrics.py`):
#
# - **AP**, the headline: the mean over ten overlaps that count as a hit (IoU .50, .55, ... .95) and
#   over all classes. **AP50** and **AP75** are the loosest of them and a strict one.
# - **APs, APm, APl**: only small, medium, large objects are asked for. On COCO the borders are
#   32 × 32 and 96 × 96 pixels; ShapesCOCO, with its small images, uses the same *shares*.
# - **AR1, AR10, AR100**: average recall, the share of objects found, with the best 1, 10 and 100
#   detections of a class in an image. Recall does not care about false alarms, AP does. **ARs,
#   ARm, ARl** are the same by size.

# %%
from mimdet import find_errors

truth = scenes.ground_truth()
options = {"area_scale": getattr(scenes, "area_scale", 1.0)}
report = find_errors(truth, runs[first].results, "bbox", **options)
thresholds = [round(0.5 + 0.05 * i, 2) for i in range(10)]
at = {t: report.curves([t])[0].ap for t in thresholds}
print("IoU   " + "".join(f"{t:6.2f}" for t in at))
print("AP    " + "".join(f"{100 * ap:6.1f}" for ap in at.values()))
mean = sum(at.values()) / len(at)
same = abs(mean - runs[first].box["AP"]) < 1e-9
check("the mean of these ten is AP", same, f"{100 * mean:.2f}; another evaluator computed that one")
per_class = [ap for ap in runs[first].metrics.box_per_class.values() if ap == ap]  # NaN: no object
mean = sum(per_class) / len(per_class)
check("the mean over classes is AP too", abs(mean - runs[first].box["AP"]) < 1e-9, "both at once")

# %% [markdown]
# From left to right: how *exact* are the boxes? Those that are rough fall off a cliff after .75.
#
# ### IoU, the measure of overlap
#
# Intersection over union: the area two boxes share, divided by the area that either covers. It is
# harsher than it looks, and harshest on small objects: the same two pixels cost more of them.

# %%
from torchvision.ops import box_iou

print("side  shifted by 1   2   4 pixels, in x and y")
for side in (8, 16, 32, 96):
    box = torch.tensor([[0.0, 0.0, side, side]])
    print(f"{side:4d}         ", *(f"{float(box_iou(box, box + d)):6.2f}" for d in (1, 2, 4)))
side, d = 8, 2
by_hand = (side - d) ** 2 / (2 * side**2 - (side - d) ** 2)
box = torch.tensor([[0, 0, side, side]])
same = abs(float(box_iou(box, box + d)) - by_hand)
check("36 of 92 pixels, by hand", same < 1e-6, "an 8-pixel object two pixels off is a miss at .50")

# %% [markdown]
# ## 2 · AP by hand: five detections
#
# Take one class with **four** objects, and five detections sorted by score: right, right, wrong,
# right, wrong. Walk down the list. After each detection, *precision* is the share of right ones so
# far, *recall* the share of objects found so far. COCO then (a) lifts precision to the best value
# at this recall or a higher one, (b) reads it at recalls 0, .01, ... 1, zero where never reached,
# (c) averages the 101 numbers. One object is never found, so AP cannot exceed 76/101.

# %%
import numpy as np

right = np.array([True, True, False, True, False])  # best score first
objects = 4
hits = right.cumsum()
precision, recall = hits / np.arange(1, 6), hits / objects
lifted = np.maximum.accumulate(precision[::-1])[::-1]  # the best from here on
levels = np.linspace(0, 1, 101)
reached = np.searchsorted(recall, levels)  # the first detection with this recall; 5 = none
ap_by_hand = np.append(lifted, 0)[reached].mean()
for row in zip(np.where(right, "right", "wrong"), precision, recall, lifted, strict=True):
    print("%s  precision %.2f  recall %.2f  lifted %.2f" % row)
print(f"AP = (51 levels x 1 + 25 levels x 3/4 + 25 levels x 0) / 101 = {ap_by_hand:.4f}")

# %% [markdown]
# Now the same five as COCO results, given to the library: boxes of 20 × 20 pixels in one image, and
# the two wrong ones where nothing is.

# %%
from mimdet.analysis.metrics import coco_metrics

boxes = [[40 * i, 10, 20, 20] for i in range(4)]  # x, y, width, height
toy = {"images": [{"id": 1, "height": 200, "width": 200}], "categories": [{"id": 1, "name": "cat"}]}
one = {"image_id": 1, "category_id": 1}
toy["annotations"] = [{"id": i, "bbox": b, "area": 400, **one} for i, b in enumerate(boxes, 1)]
places = [boxes[0], boxes[1], [0, 150, 20, 20], boxes[2], [60, 150, 20, 20]]
scores = (0.9, 0.8, 0.7, 0.6, 0.5)
five = [{"bbox": b, "score": s, **one} for b, s in zip(places, scores, strict=True)]
library = coco_metrics(toy, five, ["bbox"]).box["AP50"]
check("the library agrees", abs(library - ap_by_hand) < 1e-12, f"{library:.4f}")
check("69.75 / 101", abs(library - 69.75 / 101) < 1e-12, "51 + 25 x 0.75, on paper")

# %%
from mimdet.viz import style

fig = style.new_figure(5.2, 3.0)
ax = fig.add_subplot()
ax.fill_between(levels, np.append(lifted, 0)[reached], step="mid", color=style.BLUE, alpha=0.25)
ax.plot(levels, np.append(lifted, 0)[reached], color=style.BLUE, label="lifted; its mean is AP")
ax.plot(recall, precision, "o--", color=style.FAINT, label="as counted")
wrong = {"color": style.VERMILLION, "ms": 11, "mew": 2, "label": "wrong ones"}
ax.plot(recall[~right], precision[~right], "x", **wrong)
ax.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.05))
ax.legend(loc="lower left", frameon=False)
fig.set_layout_engine("constrained")
fig.alt_text = "Precision over recall of five detections: 1 up to recall .5, .75 up to .75, then 0."
fig

# %% [markdown]
# Look at the last cross: a wrong detection *below* the last right one costs nothing. So detectors
# return a hundred detections with scores near zero, a picture of them all looks dreadful, and AP
# says little about the false alarms at the threshold you will use.
#
# ## 3 · Where is it lost? Sizes, classes, curves
#
# On which objects is AP lost? Count them first: a number of twelve objects means little.

# %%
sizes = report.by_size()[["objects", "correct"]]
for size in sizes.index:
    sizes.loc[size, "AP"] = round(100 * runs[first].box[f"AP_{size}"], 1)
    low, high = (area**0.5 for area in report.area_ranges[size])
    sizes.loc[size, "side, pixels"] = f"{low:.0f} - {high:.0f}" if high < 1e4 else f"from {low:.0f}"
sizes

# %%
classes = report.by_class()[["objects", "correct"]]
for name, run in {"AP": runs[first], "AP, other run": runs[second]}.items():
    classes[name] = [round(100 * ap, 1) for ap in run.metrics.box_per_class.values()]
classes.sort_values("AP").head(20)

# %% [markdown]
# In quick mode it is not the small objects that score worst, as on photographs: section 6 says
# where they are found. AP weighs every *class* alike, not every object: with 80 classes a rare one
# moves AP as much as `person` does. Below, precision over recall for each class, the worst first,
# at three overlaps.
#
# - A curve that starts low: the *surest* detections of the class are wrong (confused classes).
# - A curve that starts high and stops early: objects are not found at all.
# - A wide gap between the three lines: found and named, but not outlined exactly.

# %%
from mimdet.viz import show_precision_recall, show_errors

show_precision_recall(report.curves((0.5, 0.75, 0.9)), most_classes=11)

# %% [markdown]
# ## 4 · Six types of mistakes and their price
#
# TIDE ([Bolya et al., ECCV 2020](https://arxiv.org/abs/2008.08115)) gives each wrong detection
# **one** type, and each type a price: **dAP**, what AP50 would gain if an oracle fixed just this
# type. Two IoUs decide: .5 (a hit) and .1 (it has to do with the object at all).
#
# | type | the detection ... | the oracle ... |
# |---|---|---|
# | classification | covers an object (≥ .5) but names another class | corrects the class |
# | localisation | names the class, overlap between .1 and .5 | corrects the box |
# | both | overlap between .1 and .5, wrong class | removes it |
# | duplicate | covers an object that a surer detection has taken | removes it |
# | background | touches nothing (≤ .1) | removes it |
# | missed | (an object no detection points to) | no longer asks for it |

# %%
print(report.table())
wrong = sum(count for kind, count in report.counts.items() if kind != "missed")
print(f"{len(runs[first].results)} detections: {report.correct} right, {wrong} of one type each")
total = sum(report.dap.values())
print(f"AP50 {100 * report.ap:.1f}; the six dAP together {100 * total:.1f}")
ap = report.ap
for kind, after in report.progressive.items():
    print(f"{kind:<15} alone {100 * report.dap[kind]:5.1f}   in turn {100 * (after - ap):5.1f}")
    ap = after
print(f"missing to 100: {100 * (1 - report.ap):.1f}")
check("fixed in turn they reach 100", abs(report.progressive["missed"] - 1) < 1e-9)
check("alone they do not add up", abs(total - (1 - report.ap)) > 1e-6, "see below")

# %% [markdown]
# Why do they not add up to what is missing? (1) AP is a *ranking*: removing the wrong detections of
# one type helps little while those of another still stand above the right ones. (2) Many mistakes
# share an object: a misnamed object is a wrong detection *and* an object not found. Fixing in turn
# adds up, but then the price depends on the order. Compare types within a run, and a type between
# runs; never slices of a pie.
#
# Both runs, side by side. A bar's count tells another story than its length: over two hundred
# misnamed detections, most near a score of 0, cost `tiny` less than a few objects never pointed to.

# %%
reports = {first: report, second: find_errors(truth, runs[second].results, "bbox", **options)}
show_errors(reports)

# %%
for name, mine in reports.items():
    worst = max(mine.dap, key=mine.dap.get)
    print(f"{name}: {worst} errors cost most, {100 * mine.dap[worst]:.1f} AP50")
    same = abs(mine.ap - runs[name].box["AP50"]) < 1e-9
    check(f"{name}: the report's AP is AP50", same, "the types explain the number of section 1")

# %% [markdown]
# ## 5 · Look at them
#
# A type is a hypothesis; pictures decide. The surest false alarms first (background, then both), then
# the largest missed objects. Left what the detector said, right all true objects around.

# %%
from mimdet.viz import show_error_gallery

false_alarms = report.errors("background")[:3] + report.errors("both")[:3]
for errors in (false_alarms, report.errors("missed")[:3]):
    if errors:
        display(show_error_gallery(errors, scenes))

# %% [markdown]
# ### Which classes are confused with which?
#
# Most have scores near zero, and one object can be misnamed ten times: count what a user would see.

# %%
likely = [d for d in runs[first].results if d["score"] >= 0.3]
seen = find_errors(truth, likely, "bbox", **options)
confused = seen.confusions()
display(confused.head(8))
all_named = confused["errors"].sum() == seen.counts["classification"]
check("they are the classification errors", all_named, f"of {len(likely)} of score .3 and more")
if len(confused):
    pair = confused.iloc[0].to_dict()
    errors = seen.errors("classification", said=pair["said"], true=pair["true"])
    display(show_error_gallery(errors[:3], scenes))

# %% [markdown]
# Would *you* have known? And is the truth right? In real data some "errors" are the annotation's.
#
# ## 6 · Does it use its transformer?
#
# A detector can score well and bypass its encoder. Two tests. *Take tokens away:* below ratio 1 they
# are drawn at random, so a number has a spread over draws. The first ratio below is one token of 256
# in quick mode. (The paper, Table 2 of its first version, evaluates at ratio 1: ViT-B trained at
# 0.25 has 49.9 box AP, trained at 0.5 it has 51.5.)

# %%
from mimdet.analysis.evaluate import evaluate_ratios
from mimdet.viz import show_ratios

rows = evaluate_ratios(detectors[first], scenes, (0.004, 0.25, 0.5, 1.0), draws=2, **bar)
for row in rows:
    mean, sd = 100 * row["box_ap"], 100 * row["box_ap_sd"]
    print(f"ratio {row['sample_ratio']:5}: box AP {mean:5.1f} ± {sd:.1f}")
show_ratios(rows)

# %% [markdown]
# The bars show the spread over two *draws of the tokens*, not over images, not over trainings.
#
# *Exchange what it computes:* c4 is the map the transformer makes. Put its own mean at every place,
# so that it says nothing about *where* any more. What can be exchanged without loss is not used.

# %%
from mimdet.analysis.reliance import altered

with altered(detectors[first], "c4", "mean"):
    silenced = mimdet.evaluate(detectors[first], scenes, seed=SEED, **bar).box
for size in ("AP", "AP_small", "AP_medium", "AP_large"):
    print(f"{size:9} {100 * runs[first].box[size]:5.1f}, c4 silenced {100 * silenced[size]:5.1f}")
lost = runs[first].box["AP"] - silenced["AP"]
check("it uses c4", lost > 0 or own_data, "and the encoder, if that fills c4", trained=True)

# %% [markdown]
# `mimdet.reliance(model, scenes)` is all of this in a table: tokens taken away, and c4, the
# encoder's tokens or the decoder's fill exchanged, by size of object. Below it is stored for 200
# scenes and two detectors: `tiny`, and an earlier one whose decoder got the stem's own tokens at
# the places that were not sampled (version 2's fill). *another*: the tokens of another image.

# %%
from mimdet.files import read_json
from mimdet.viz import show_reliance
from pandas import DataFrame

kinds = ["one token", "25 % of tokens", "all tokens", "c4: mean", "encoder: another"]
relies = {}
for name in ("tiny", "first_tiny"):
    measured = read_json(f"results/reliance_{name}.json")["box_ap"]
    relies[name] = DataFrame.from_dict(measured, orient="index")
    print(name)
    display(show_reliance(relies[name].loc[kinds]))

# %% [markdown]
# Both need c4: with its mean, large objects lose most of their AP; small ones hardly notice: they
# are found on c2 and c3, which come from the stem. But only `tiny` finds more when its *encoder*
# sees more. The earlier detector is as good with one token as with all: below ratio 1 its decoder
# made c4 of the stem's tokens, so the encoder could be bypassed, and nothing in its AP said so.
#
# ## 7 · Two runs, image by image
#
# Is the second run better? Both saw the same images, so compare them *in pairs*: an image that is
# hard for one is hard for the other, and in the difference its difficulty cancels.

# %%
from mimdet import compare_runs
from mimdet.viz import show_comparison

comparison = compare_runs(truth, {name: run.results for name, run in runs.items()}, "bbox")
print(comparison.table(count=3))
show_comparison(comparison, count=6)

# %%
pairs = comparison.images.dropna(subset="change")  # images without objects have no AP
count = len(pairs)
paired = pairs["change"].std() / count**0.5
apart = ((pairs["ap_1"].var() + pairs["ap_2"].var()) / count) ** 0.5
print(f"mean change of an image's AP: {100 * pairs['change'].mean():+.1f}")
print(f"standard error: in pairs {100 * paired:.1f}, as if on different images {100 * apart:.1f}")
agree = pairs["ap_1"].corr(pairs["ap_2"])
saves = (paired < apart) == (agree > 0)
check("pairs help when runs agree on what is hard", saves, f"correlation {agree:.2f}")

# %% [markdown]
# **A warning.** That standard error is about *other images*, not about *another training* of the same
# recipe. On full COCO five trainings of ViTDet-B differ with a standard deviation of 0.10 box AP (as
# its authors report), so a gain of 0.2 from one run each is no result. In short trainings the noise
# is far larger: three seeds of the demo gave 38.0, 36.1 and 37.6 box AP
# (`docs/measurements.md`). `tiny` and `tiny_half` are one training each: the figure above does not
# say that any other would gain as much from its last steps. For that, several seeds (notebook 09).
#
# (The mean AP *of an image* is not COCO's: there all detections of a class are one ranking.)
#
# ## 8 · Browse the results
#
# Everything in one panel. Choose a verdict, a class, a size, a score; step through the images that
# match. Truth is left; each box has the colour **and** the letter of its verdict. `where = only ...`
# shows what one run gets wrong (or right) and the other does not.

# %%
from mimdet.viz import ResultBrowser

browser = ResultBrowser(scenes, {name: run.results for name, run in runs.items()}, "bbox")
browser.verdict.value = "classification" if len(confused) else ""
browser

# %% [markdown]
# *Try:* raise the score slider with `missed` chosen: a detection keeps its type whatever the
# threshold (matching goes from the best score down), but objects become missed as their detections
# disappear. Your own predictions work too: any list in COCO results format.
#
# ## Summary
#
# - AP is a mean over ten IoU thresholds and all classes of the area under a lifted curve.
# - Wrong detections below the last right one are free: AP is about ranking.
# - dAP prices six types of mistakes one at a time; the prices overlap, so they do not add up.
# - Draws of tokens, images and trainings are three sources of noise. An error bar covers one.
# - Take tokens away, exchange a map: what costs no AP is not used, whatever the AP.
# - Look at the mistakes before explaining them.
#
# ## Exercises
#
# 1. In section 2, exchange the third and fourth detection. Work out AP by hand, then ask.
# 2. Divide all scores of the first run by 10. What happens to AP, what to a picture of those ≥ .3?
# 3. Add 50 detections of score .001 in empty corners of the toy image. Guess AP first.
# 4. If classes did not matter at all, what would AP50 be? Give all objects and detections one
#    class. Why is the gain not the dAP of classification?
# 5. How does the price of localisation grow with the IoU that is asked for? What costs most at .9?

# %%
mine = {1: ..., 3: ..., 5: ...}  # an AP of 0 to 1, another, a type; then run the next cell too

# %% tags=["judge"]
swapped_five = [dict(d) for d in five]
swapped_five[2]["score"], swapped_five[3]["score"] = 0.6, 0.7
swapped_ap = coco_metrics(toy, swapped_five, ["bbox"]).box["AP50"]
judge(1, mine[1], float(swapped_ap))
corners = [{"bbox": [180, 180, 5, 5], "score": 0.001, **one} for _ in range(50)]
noisy = coco_metrics(toy, five + corners, ["bbox"]).box["AP50"]
judge(3, mine[3], float(noisy))
strict = find_errors(truth, runs[first].results, "bbox", iou_threshold=0.9, **options)
judge(5, mine[5], max(strict.dap, key=strict.dap.get))

# %% tags=["solution"]
# 1. Right, right, right: precision 1 up to recall .75, so 76 of the 101 levels.
check("76 / 101", abs(swapped_ap - 76 / 101) < 1e-12, f"{swapped_ap:.4f}, from {library:.4f}")

# %% tags=["solution"]
# 2. Nothing: only the order of scores matters. The picture would be empty.
shrunk = [d | {"score": d["score"] / 10} for d in runs[first].results]
again = coco_metrics(truth, shrunk, ["bbox"], options["area_scale"]).box["AP"]
check("the same AP", abs(again - runs[first].box["AP"]) < 1e-12, "AP never sees a threshold")
check("nothing left to draw", max(d["score"] for d in shrunk) < 0.3)

# %% tags=["solution"]
# 3. Nothing changes: they stand below the last right detection.
check("free of charge", abs(noisy - library) < 1e-12, "50 false alarms more")

# %% tags=["solution"]
# 4. Merging classes also merges their rankings and lets one object take detections of any class.
single = {**truth, "categories": [{"id": 1, "name": "object"}]}
single["annotations"] = [a | {"category_id": 1} for a in truth["annotations"]]
merged = [d | {"category_id": 1} for d in runs[first].results]
merged_ap = coco_metrics(single, merged, ["bbox"], options["area_scale"]).box["AP50"]
print(f"AP50 {100 * report.ap:.1f}, one class {100 * merged_ap:.1f}")
print(f"dAP of classification {100 * report.dap['classification']:.1f}")
kinds = find_errors(single, merged, "bbox", **options).counts
check("no class, no confusion", kinds["classification"] == kinds["both"] == 0, "they become others")

# %% tags=["solution"]
# 5. What was a hit at .5 becomes a localisation error at a stricter IoU.
costs = {}
for threshold in (0.5, 0.75, 0.9):
    strict = find_errors(truth, runs[first].results, "bbox", iou_threshold=threshold, **options)
    costs[threshold] = strict.dap["localisation"]
    worst = max(strict.dap, key=strict.dap.get)
    print(f"IoU {threshold}: AP {100 * strict.ap:.1f}, most expensive: {worst}")
check("its price rises", costs[0.9] >= costs[0.5], "boxes are not as exact as it asks")
