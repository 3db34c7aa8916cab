# %% [markdown]
# # 03 · The stem: what a network sees before it attends
#
# **Take the two fine maps of its stem away, and a detector loses most of its objects** (section 6).
# A ViT cuts the image into squares of 16 × 16 pixels and multiplies each by one matrix. MIMDet
# throws that pre-trained matrix away and starts from a random **ConvStem**: four convolutions that
# reach the same 16-pixel grid in four halvings and leave two finer maps, c2 and c3. **Afterwards
# you can** compare both stems: their maps, how far they see, what their norm does, what they cost,
# which objects depend on the finer maps.
#
# | | quick (`MODE = "quick"`) | full (`MODE = "full"`) |
# |---|---|---|
# | study | an hour, after 00 | |
# | what you see | the shipped `tiny` (width 128) on drawn scenes | the released MIMDet ViT-B (width 768) on COCO |
# | time | about 15 s of one core | not timed: 40 images through ViT-B |
# | memory | about 0.9 GB | 0.5 GB of weights, four times |
# | needs | nothing but the kit | `mimdet download mimdet-base`, COCO in `MIMDET_COCO` |
#
# **What this cannot show:** which stem detects better. There is no trained detector with a patchify
# stem in the package, so a trained ConvStem is only ever compared with itself, and the two stems
# with each other only as they start, with random weights.

# %% tags=["parameters"]
MODE = "quick"  # "full": the released ViT-B and COCO
SEED = 0  # of the random stems
PATH = ""  # your own photo, or a folder with annotations.json and images/
SOLUTIONS = False  # True: the answers at the end run too

# %%
import copy

import mimdet
import torch
from mimdet import check, judge
from mimdet.notebook import open_detector, open_pictures
from mimdet.viz import pyramid_of

torch.set_num_threads(1)
pictures = open_pictures(PATH, MODE, count=16 if MODE == "quick" else 4)
trained = open_detector(MODE).cpu()
cfg = copy.deepcopy(trained.config)
fresh = {}
for name, kind in {"ConvStem": "conv", "patchify": "patch"}.items():
    cfg.backbone.stem = kind
    torch.manual_seed(SEED)
    fresh[name] = mimdet.build_detector(cfg).eval()

# %% [markdown]
# ## 1 · Two ways from pixels to tokens
#
# The paper calls the result a hybrid of ConvNet and ViT: convolutions make the fine half of the
# pyramid, a ViT the coarse half. Both stems (`mimdet/models/stem.py`) keep the same contract:
#
# | | width | stride | ConvStem | patchify |
# |---|---|---|---|---|
# | c2 | D/4 | 4 | second convolution | unfolded from the tokens by transposed convolutions |
# | c3 | D/2 | 8 | third convolution | the same, one step |
# | tokens | D | 16 | fourth convolution, then 1 × 1 | one matrix per 16 × 16 square |
#
# The difference in one sentence: the ConvStem's c2 comes *before* the tokens, the patchify stem's
# c2 *after* them. Here are both with random weights. A map has up to D channels; the picture shows
# its three strongest principal components as red, green and blue, each picture by itself
# (`mimdet/viz/features.py`).

# %%
from mimdet.viz import compare_pyramids

STEM = ("c2", "c3", "tokens")
image = pictures.images[0]
born = {name: pyramid_of(model, image).only(*STEM) for name, model in fresh.items()}
compare_pyramids(born, shared=False)

# %% [markdown]
# Even random convolutions keep the drawing: edges stay where they were, because each place of c2
# looks at a few pixels. In the patchify stem's c2 you see a repeating pattern instead: each token
# is unfolded into 4 × 4 places by the same small matrices. What a token has forgotten about *where*
# in its square something was, c2 must relearn.
#
# ## 2 · What training made of the ConvStem
#
# Now the trained detector's stem. Upper row: principal components in colour. Lower row: the length
# of each place's feature vector.

# %%
from mimdet.viz import show_pyramid

seen = pyramid_of(trained, image)
show_pyramid(seen.image, seen.only(*STEM))

# %% [markdown]
# Read the titles: three colours carry about half of c2's variance and four fifths of the tokens'.
# A few channels of the tokens dominate the rest. The twelve channels of c2 that vary most, each on
# its own scale:

# %%
from mimdet.viz import show_channels

show_channels(seen.maps["c2"], 12)

# %%
import torch.nn.functional as F

curve = torch.linspace(-3, 0, 100_001)
least = float(F.gelu(curve).min())
check("no value of c2 is below GELU's minimum", seen.maps["c2"].min() >= least, f"{least:.4f}")
check("tokens may be", seen.maps["tokens"].min() < least, "a 1 x 1 convolution ends their stage")

# %% [markdown]
# Do not read too much into single channels: another seed gives others.
#
# ## 3 · How far does a place see?
#
# By hand: a convolution of size $k$ on a map where neighbours are $j$ pixels apart adds
# $(k - 1)\,j$ pixels to what a place sees, and a stride of 2 doubles $j$. So with $k = 3$:
#
# | after stage | 1 | 2 (c2) | 3 (c3) | 4 (tokens) |
# |---|---|---|---|---|
# | $j$ | 2 | 4 | 8 | 16 |
# | sees | 3 | 3 + 2·2 = 7 | 7 + 2·4 = 15 | 15 + 2·8 = **31** pixels |
#
# A patchify token sees its own 16 pixels and not one more. Neighbouring ConvStem tokens share 15 of
# their 31 pixels. Now measured: the gradient of one place with respect to the image is zero exactly
# where that place does not look. The norms are left out for now; section 4 says why.

# %%
from torch import nn


def pixels_seen(stem, level, size=256):  # -> (size, size): how strongly the middle place sees each
    images = torch.zeros(1, 3, size, size).normal_(generator=torch.Generator().manual_seed(0))
    images.requires_grad_()
    features = getattr(stem(images), level)
    middle = features.shape[2] // 2
    features[0, :, middle, middle].square().sum().backward()
    return images.grad[0].abs().sum(dim=0)


stems = {"ConvStem": trained.backbone.stem, "patchify": fresh["patchify"].backbone.stem}
bare = {name: copy.deepcopy(stem) for name, stem in stems.items()}
for stage in (f"stage{i}" for i in range(1, 5)):
    getattr(bare["ConvStem"], stage)[1] = nn.Identity()
bare["patchify"].up_to_c2[0] = nn.Identity()

# %%
by_hand = {"c2": 7, "c3": 15, "tokens": 31}
gradients = {level: pixels_seen(bare["ConvStem"], level) for level in STEM}
for level, side in by_hand.items():
    rows = int((gradients[level] > 0).any(dim=1).sum())
    columns = int((gradients[level] > 0).any(dim=0).sum())
    check(f"{level} sees {rows} x {columns} pixels", (rows, columns) == (side, side))
square = pixels_seen(bare["patchify"], "tokens")
check("a patchify token sees 16 x 16", (square > 0).sum() == 256, "and shares none of them")

# %%
from mimdet.viz import show_planes

shown = {f"ConvStem, {level}": plane for level, plane in gradients.items()}
shown["patchify, tokens"] = square
shown = {name: plane / plane.max() for name, plane in shown.items()}
show_planes({name: plane[96:176, 96:176] for name, plane in shown.items()})  # 80 x 80 pixels

# %% [markdown]
# ## 4 · GroupNorm with one group: everything sees everything, a little
#
# Each convolution is followed by `GroupNorm(1)`: one mean and one variance over *all* channels and
# *all* places of an image,
#
# $$y_{c,i,j} = \frac{x_{c,i,j} - \mu}{\sqrt{\sigma^2 + 10^{-6}}}\,w_c + b_c, \qquad
# \mu, \sigma^2 \text{ over } (C, H, W).$$
#
# It is a layer norm over the whole map, not over the channels of a place. Statistics of the whole
# image enter every place, so the exact 31 pixels above are exact only without the norm.

# %%
from mimdet.viz import largest_difference

batch = trained.batch([seen.image])
convolution, norm = trained.backbone.stem.stage1[:2]
with torch.no_grad():
    x = convolution(batch.tensors)
    y = (x - x.mean()) / (x.var(unbiased=False) + norm.eps).sqrt()
    y = y * norm.weight[:, None, None] + norm.bias[:, None, None]
    off = largest_difference(y, norm(x))
check("GroupNorm(1) by hand", off < 1e-5, "one mean, one variance for all of (C, H, W)")

# %%
far = {name: pixels_seen(stem, "tokens") for name, stem in stems.items()}
share = {name: float((plane > 0).float().mean()) for name, plane in far.items()}
print({name: f"{100 * part:.1f} % of the pixels" for name, part in share.items()})
check("with its norms, a ConvStem token sees every pixel", share["ConvStem"] > 0.99)
check("a patchify token still sees one square", share["patchify"] == 1 / 256, "it has no norm")
logs = {name: (plane / plane.max()).clamp(min=1e-5).log10() for name, plane in far.items()}
show_planes({f"{name}, log10": plane[64:192, 64:192] for name, plane in logs.items()}, shared=True)

# %% [markdown]
# Far pixels count little, but they count. One consequence hurts: *padding* is part of
# $\mu$ and $\sigma^2$. Put the same image on a larger canvas (zeros on the right) and its own part
# of c2 changes.

# %%
wider = F.pad(batch.tensors, (0, 128))
own = {level: features.shape[2] for level, features in seen.only(*STEM).items()}  # columns
for name, stem in {"with norms": stems["ConvStem"], "without": bare["ConvStem"]}.items():
    with torch.no_grad():
        before, after = stem(batch.tensors)._asdict(), stem(wider)._asdict()
    moved = {}
    for level in STEM:
        change = after[level][..., : own[level]] - before[level]
        moved[level] = float(change.norm() / before[level].norm())
    print(f"{name:10}", {level: f"{100 * change:.1f} %" for level, change in moved.items()})
    matters = max(moved.values()) > 1e-6
    check(f"{name}, padding matters: {matters}", matters == (name == "with norms"))

# %% [markdown]
# Without norms nothing moves at all: zeros beside the image are what the convolution pads with
# anyway. With them, an image's features depend on what it is batched with. The original has this
# property too. The kit keeps it, because the released weights were trained with it, and
# never mixes padded sizes where results count: `predict` and `evaluate` batch images of
# equal padded size only (`mimdet/inference.py`).
#
# ## 5 · What do the stems cost?
#
# By hand, with tokens of width $D$: a convolution from $a$ to $b$ channels has $9ab$ weights, a
# norm $2b$, the final 1 × 1 has $D^2 + D$:
#
# $$9\left(3\cdot\tfrac D8 + \tfrac D8\tfrac D4 + \tfrac D4\tfrac D2 + \tfrac D2 D\right)
# + 2\left(\tfrac D8+\tfrac D4+\tfrac D2+D\right) + D^2 + D$$
#
# Each weight is used once per output place, which gives the multiply-adds.

# %%
from mimdet.analysis.cost import multiply_adds
from mimdet.models.stem import ConvStem, PatchStem

D, H, W = 768, 800, 1280  # ViT-B; an image of 4000 tokens
steps = [(3, D // 8), (D // 8, D // 4), (D // 4, D // 2), (D // 2, D)]
conv_hand = sum(9 * a * b + 2 * b for a, b in steps) + D * D + D
conv_work = sum(9 * a * b * H * W // 4**i for i, (a, b) in enumerate(steps, 1))
conv_work += D * D * H * W // 256
up = [(D, D // 2), (D // 2, D // 4)]  # transposed convolutions 2 x 2, with a norm between
patch_hand = 3 * 256 * D + D + sum(4 * a * b + b for a, b in up) + 2 * (D // 2)
patch_work = 3 * 256 * D * H * W // 256 + sum(
    4 * a * b * H * W // 4 ** (4 - i) for i, (a, b) in enumerate(up)
)

# %%
rows = (
    ("ConvStem", ConvStem, conv_hand, conv_work),
    ("patchify", PatchStem, patch_hand, patch_work),
)
for name, kind, parameters, work in rows:
    with torch.device("meta"):  # shapes only: nothing is computed
        stem, shape = kind(D), torch.empty(1, 3, H, W)
        counted = multiply_adds(lambda stem=stem, shape=shape: stem(shape))
    print(f"{name}: {parameters:,} parameters, {work / 1e9:.1f} G multiply-adds")
    check("parameters", sum(p.numel() for p in stem.parameters()) == parameters)
    check("multiply-adds", counted == work)
check("4.08 million", round(conv_hand / 1e6, 2) == 4.08, "a thirtieth of MIMDet ViT-B's 127.95")

# %% [markdown]
# So the comparison is not free of side effects: the ConvStem has 2 million parameters more, and
# three times the multiply-adds. In a detector of 1.13 T multiply-adds that is 2 %; in an ablation
# it is a confound to name.
#
# ## 6 · Who needs the fine maps? Small objects
#
# The box head pools an object from one level, by its size:
# $k = \lfloor 4 + \log_2(\sqrt{\text{area}} / s)\rfloor$ with $s$ = 224 pixels in the paper's setup
# (`mimdet/models/rcnn.py`), clamped to p2..p5. p2 and p3 are made of c2 and c3, which come from the
# stem and never lose a token, plus what the transformer hands down.

# %%
pool = trained.roi_heads.box_pool
levels = []
for record in pictures.records:
    h, w = record.image.shape[1:]
    scale = trained.resize.size(h, w)[0] / h
    levels.append(pool.level_of(record.target.boxes * scale))
levels = torch.cat(levels)
counts = {f"p{2 + i}": int((levels == i).sum()) for i in range(4)}
print(f"true objects in {len(pictures.records)} images, by level:", counts)
if MODE == "quick" and not PATH:
    check("most objects live on p2 and p3", counts["p2"] + counts["p3"] > len(levels) / 2)

# %% [markdown]
# Does the trained detector use them? On their way into the neck, replace maps by their own mean, so
# that they are as strong as before but say nothing about *where*. A true object counts as found
# when a detection of its class with a score of at least 0.3 overlaps it by half.

# %%
from torchvision.ops import box_iou


def objects_found(model):  # -> for every true object: found?
    hits = []
    for one, target in zip(mimdet.predict(model, pictures.images), pictures.targets, strict=True):
        one = one[one.scores >= 0.3]
        right = (box_iou(target.boxes, one.boxes) >= 0.5) & (target.labels[:, None] == one.labels)
        hits.append(right.any(dim=1))
    return torch.cat(hits)


def blind(*levels):  # -> a hook: these maps have the same value everywhere
    def hook(neck, inputs):
        means = {level: inputs[0][level].mean(dim=(2, 3), keepdim=True) for level in levels}
        return ({k: means[k].expand_as(v) if k in means else v for k, v in inputs[0].items()},)

    return hook


# %%
detector = open_detector(MODE)  # on the GPU, where there is one
found = {"all maps": objects_found(detector)}
for levels_off in (("c2", "c3"), ("c4", "c5")):
    handle = detector.neck.register_forward_pre_hook(blind(*levels_off))
    found["without " + " and ".join(levels_off)] = objects_found(detector)
    handle.remove()
for name, hits in found.items():
    print(f"{name:18} {int(hits.sum()):3} of {len(hits)} objects found")
if MODE == "quick" and not PATH:
    few = found["without c2 and c3"].sum() < 0.5 * found["all maps"].sum()
    check("without the stem's maps most objects are lost", few)

# %% [markdown]
# In this detector on these scenes, where nearly all objects are pooled from p2 and p3, the stem's
# maps carry the answer and the transformer's improve it. Be careful with the conclusion. The
# detector was trained *with* these maps and falls apart without them; one trained without them from
# the start would have learnt to manage. The cut says what this detector uses, not what a detector
# needs.
#
# ## 7 · Look for yourself
#
# Every level, by PCA, norm or channel, of the trained ConvStem and the untrained patchify detector.
# Choose *p3*, then *c4*; turn the ratio: c2, c3 and tokens stay the same, everything else moves.

# %%
from mimdet.viz import PyramidViewer

viewer = PyramidViewer(
    {"ConvStem, trained": detector, "patchify, random": fresh["patchify"]}, pictures.images[:8]
)
viewer.scale.value = False
viewer.level.value = "c3"
viewer

# %% [markdown]
# ## Summary
#
# - A ConvStem makes c2 and c3 on the way to the tokens; a patchify stem unfolds them afterwards.
# - A ConvStem token looks at 31 × 31 pixels, a patchify token at 16 × 16.
# - GroupNorm with one group is a layer norm over the whole map: every place knows every pixel a
#   little, padding included.
# - 4.08 against 2.07 million parameters, 34.9 against 11.8 G multiply-adds at ViT-B's width.
# - The trained tiny detector, whose objects lie on p2 and p3, depends on c2 and c3.
#
# ## Exercises
#
# 1. One place of the patchify stem's c2 (norms left out): which pixels does it see? Guess, then
#    measure. What does that say about edges between two squares?
# 2. Shift an image by 8 or by 16 pixels. For which of them do the tokens of the bare ConvStem shift
#    by a whole place (away from the border)? And those of the patchify stem?
# 3. Replace every GroupNorm by a norm over the channels of each place. Does padding still matter?
# 4. How wide may a patchify stem be to have as many parameters as the ConvStem at D = 768?

# %%
mine = {1: ..., 2: ..., 4: ...}  # rows seen, a set of shifts, a width; then run the next cell too

# %% tags=["judge"]
rows = (pixels_seen(bare["patchify"], "c2") > 0).any(dim=1).nonzero()[:, 0]
judge(1, mine[1], len(rows))
picture, equal = batch.tensors[:, :, :256, :256], set()
for shift in (8, 16):  # exercise 2: those that shift the tokens of the ConvStem by whole places
    with torch.no_grad():
        before = bare["ConvStem"](picture).tokens[..., 2:-2, 2:-3]
        after = bare["ConvStem"](picture.roll(shift, dims=3)).tokens[..., 2:-2, 3:-2]
    equal |= {shift} if largest_difference(after, before) < 1e-5 else set()
judge(2, mine[2], equal)


def patch_parameters(d):
    return 3 * 256 * d + d + 4 * d * d // 2 + d // 2 + d + 4 * d * d // 8 + d // 4


widest = max(d for d in range(8, 2000, 8) if patch_parameters(d) <= conv_hand)
judge(4, mine[4], widest)

# %% tags=["solution"]
# 1. The 16 x 16 pixels of its token and no others: c2 has stride 4 but sees one square only.
check("16 rows", len(rows) == 16 and rows[0] % 16 == 0, "no place sees an edge between squares")

# %% tags=["solution"]
# 2. Both by 16 pixels, neither by 8: half a stride leads to a place that does not exist.
for shift in (16, 8):
    for name, stem in bare.items():
        with torch.no_grad():
            before, after = stem(picture).tokens, stem(picture.roll(shift, dims=3)).tokens
        moved = largest_difference(after[..., 2:-2, 3:-2], before[..., 2:-2, 2:-3])
        check(
            f"{name} by {shift} px: {'equal' if moved < 1e-5 else 'other'} tokens",
            (moved < 1e-5) == (shift == 16),
        )

# %% tags=["solution"]
# 3. No: a place's own channels know nothing of the canvas.
from timm.layers import LayerNorm2d

local = copy.deepcopy(stems["ConvStem"])
for stage in (local.stage1, local.stage2, local.stage3, local.stage4):
    stage[1] = LayerNorm2d(stage[1].num_channels)
with torch.no_grad():
    before, after = local(batch.tensors).c3, local(wider).c3[..., : own["c3"]]
check("padding does not matter", largest_difference(after, before) < 1e-5)

# %% tags=["solution"]
# 4. Its count grows less than with the square of its width, so more than 768 * sqrt(4.08 / 2.07) = 1078.
print(widest)
check("the formula is the one above", patch_parameters(768) == patch_hand)
print(f"D = {widest}: {patch_parameters(widest):,} of {conv_hand:,} parameters")
check("the next width is too wide", patch_parameters(widest + 8) > conv_hand)
