# %% [markdown]
# # 02 · Token sampling: what the encoder sees, and what it costs
#
# **With a quarter of its tokens a detector finds nearly as much as with all; with a single one it
# loses its large objects and keeps the small ones** (the figure of section 6). That is the one idea
# of MIMDet: train the transformer of a detector on a *sample* of the tokens. **Afterwards you can**
# draw samples in different ways, follow them through encoder and decoder, say what padding does to
# them and what a ratio costs, and store and repeat one.
#
# | | quick (`MODE = "quick"`) | full (`MODE = "full"`) |
# |---|---|---|
# | study | an hour, after 00 | |
# | what you see | the shipped detector `tiny` on drawn scenes | the released MIMDet ViT-B on COCO val2017 |
# | time | about 15 seconds of one CPU core | not timed: 45 images through ViT-B |
# | memory | about 1 GB | 0.5 GB of weights, twice |
# | needs | nothing but the kit | `mimdet download mimdet-base mae-base-visualize`, COCO in the folder named by `MIMDET_COCO` |
#
# Set `PATH = "nuclei"` for real pictures and the detector `nuclei`, or to your own photo; the
# detectors that come with the kit know drawn shapes and cell nuclei only.

# %% tags=["parameters"]
MODE = "quick"  # "full": released weights and COCO
SEED = 0  # of the samples
PATH = ""  # "nuclei": real pictures; a photo; a folder of data; "": MIMDET_PICTURES
SOLUTIONS = False  # True: the answers at the end run too

# %%
import mimdet
import torch
from mimdet import check, judge
from mimdet.notebook import open_detector, open_mae, open_pictures, own_path

pictures = open_pictures(own_path(PATH), MODE)
model = open_detector(MODE, own_path(PATH)).cpu()

# %% [markdown]
# ## 1 · Tokens, grid, sample
#
# The stem turns 16 × 16 pixels into one token (`mimdet/models/stem.py`). The image has $L = h \cdot
# w$ of them. A *sampler* gives each a score, `mimdet.select` keeps the $K$ highest:
#
# $$K = \max(1, \lfloor r L \rfloor) \qquad r = \text{ratio, the share that is kept}$$
#
# The result is a `Sample`: for every image of a batch the places that are kept, place = row · w +
# column, and the batch's grid. (MAE's paper gives the share *masked*, $1 - r$.)

# %%
from mimdet.images import resize_image
from mimdet.structures import padded_size

picture = pictures.images[:5][-1]  # the fifth, or the only one
size = padded_size(*model.resize.size(*picture.shape[1:]))  # multiples of 32
image = resize_image(picture, size)  # so there is no padding yet; section 4 adds some
batch = model.batch([image])  # padded and normalised: what the stem sees
with torch.no_grad():
    stem = model.backbone.stem(batch.tensors)
tokens = stem.tokens.flatten(2).transpose(1, 2)  # (1, D, h, w) -> (1, L, D)
grid, length = tuple(stem.tokens.shape[2:]), tokens.shape[1]
print(f"image {tuple(image.shape)}: {grid[0]} x {grid[1]} tokens of width {tokens.shape[2]}")

# %%
from mimdet.models.sampling import SAMPLERS
from mimdet.viz import show_sample

generator = torch.Generator().manual_seed(SEED)
scores = SAMPLERS["random"](tokens[0], grid, generator)  # (L,)
sample = mimdet.select([scores], [grid], grid, ratio=0.25)
kept = sample.keep[0]
check(f"{len(kept)} of {length} tokens", len(kept) == max(1, int(0.25 * length)))
left_out = scores.sort().values[: length - len(kept)]
check("the kept ones have the highest scores", scores[kept].min() >= left_out.max())
show_sample(image, sample)

# %% [markdown]
# Grey tokens never enter the encoder. What they show is not all lost, though: the stem has looked
# at every pixel, and its fine maps c2 and c3 go to the detector whole. At their places the decoder
# gets something else instead: in `tiny`, as in version 1 of the paper, one learned vector, the
# *mask token*; in the released ViT-B the stem's own token (version 2). *Try:* ratio 0.05 and 0.9.
#
# ## 2 · Samplers, side by side
#
# The paper draws at random. Three samplers come with the library, and a fourth takes three lines:
# a function of the image's tokens, its grid and a generator, which returns a score for each token.


# %%
def strongest(tokens, grid, generator):  # (L, D), (h, w) of one image -> (L,)
    return tokens.norm(dim=1)


samplers = {**SAMPLERS, "strongest": strongest}
drawn = {}
for name, sampler in samplers.items():
    generator = torch.Generator().manual_seed(SEED)
    drawn[name] = mimdet.select([sampler(tokens[0], grid, generator)], [grid], grid, 0.25)
show_sample(image, drawn)

# %% [markdown]
# `grid` spreads the tokens evenly: no unseen token is far from a seen one. `block` keeps or drops
# squares of 4 × 4: most unseen tokens are far from any seen one, which makes it hard. `strongest`
# follows what the stem responds to. Which is best to *train* with is a question for an experiment
# (notebooks 09 and 10), not for the eye.

# %%
import torch.nn.functional as F

sizes = {name: len(s.keep[0]) for name, s in drawn.items()}
check("all keep equally many", len(set(sizes.values())) == 1, "so that comparing them is fair")
rows = drawn["grid"].keep[0] // grid[1]
check("grid at 0.25 keeps every second row", len((rows % 2).unique()) == 1)
mask = torch.zeros(length)
mask[drawn["block"].keep[0]] = 1
squares = F.avg_pool2d(mask.view(1, *grid), 4)  # share of each 4 x 4 square that is kept
partly = int(((squares > 0) & (squares < 1)).sum())
check("block keeps whole squares", partly <= 1, "where the count demands it, one is cut")

# %% [markdown]
# ## 3 · Out and back: gather, scatter, "un-shuffle"
#
# The kept tokens are *gathered* into a shorter sequence (B, K, D). That is the whole saving: the
# encoder is an ordinary transformer on fewer tokens. Afterwards each goes back to its place. The
# original code, like MAE's, does it with two sorts: shuffle all places by noise, keep the first K,
# encode, append what belongs at the other places, and sort back ("un-shuffle"). This library
# *scatters*: it writes the K tokens to their K places in a grid that is filled already
# (`mimdet/models/sampling.py`). On a 2 × 3 grid, by hand:

# %%
from mimdet import Sample
from mimdet.models.sampling import gather, scatter

noise = torch.tensor([0.9, 0.2, 0.7, 0.1, 0.5, 0.4])  # one number a place; the lowest are kept
order = noise.argsort()  # place of the 1st, 2nd, ... in the shuffled sequence
restore = order.argsort()  # where each place went
fill = torch.tensor([0.0, 10, 20, 30, 40, 50])[:, None]  # (6, 1): the stem's tokens, say
kept = fill[order[:3]] + 1  # the three that were encoded, now changed
unshuffled = torch.cat([kept, fill[order[3:]]])[restore]
ours = scatter([kept], Sample([order[:3]], (2, 3)), fill[None])[0]
print("kept places", order[:3].tolist(), " restore", restore.tolist())
print(ours.view(2, 3))
check("scatter is un-shuffle", torch.equal(unshuffled, ours), "bit for bit, with one sort less")

# %%
short = gather(tokens, sample)
back = scatter(short, sample, torch.zeros_like(tokens))
at_home = torch.equal(back[0, sample.keep[0]], tokens[0, sample.keep[0]])
print(f"{tuple(tokens.shape)} -> {tuple(short[0].shape)} -> {tuple(back.shape)}")
check("every kept token is back at its place", at_home)
gone = torch.ones(length, dtype=torch.bool)
gone[sample.keep[0]] = False
check("the other places are untouched", back[0, gone].abs().max() == 0)

# %% [markdown]
# Attention itself does not know about places. The positions say *where* a token is, and they are
# added **before** gathering. So the order of a sample does not matter.

# %%
other_order = Sample([sample.keep[0].flip(0)], sample.grid)
with torch.no_grad():
    one = model.backbone.encoder(tokens, sample)[0]
    two = model.backbone.encoder(tokens, other_order)[0]
check("order does not matter", torch.allclose(one, two.flip(0), atol=1e-4), "up to rounding")

# %% [markdown]
# ## 4 · Padding, and the two rules
#
# Images of a batch are padded to one size. Put our image beside one twice as wide: half of its
# canvas is now empty. Which tokens may be kept?
#
# - `keep="valid"`, the default here: $K$ counts the image's **own** tokens. Padding is never
#   encoded, and what an image keeps does not depend on its neighbours.
# - `keep="padded"`, the paper's code: $K = \lfloor r \cdot L \rfloor$ with $L$ of the **padded**
#   grid, the same for every image. Own tokens come first, padding last. Small images keep a larger
#   share than $r$, and when $K$ exceeds their own tokens, padding is encoded, with no mask.
#
# Released weights were trained and scored with the second rule, so `load_detector` sets it for
# them.

# %%
from mimdet.models.sampling import token_grid

square = resize_image(picture, (256, 256))
neighbour = torch.zeros(3, 256, 512, dtype=torch.uint8)
half = model.batch([square, neighbour])
wide = (half.tensors.shape[2] // 16, half.tensors.shape[3] // 16)
grids = [token_grid(*of_image) for of_image in half.image_sizes]
random_scores = [torch.rand(h * w, generator=torch.Generator().manual_seed(SEED)) for h, w in grids]
print(f"own grid {grids[0]}, padded grid {wide}\nratio  rule    own  padding")
counts = {}
for ratio in (0.25, 0.5, 0.75, 1.0):
    for rule in ("valid", "padded"):
        places = mimdet.select(random_scores, grids, wide, ratio, rule).keep[0]
        own = int((places % wide[1] < grids[0][1]).sum())
        counts[ratio, rule] = (own, len(places) - own)
        print(f"{ratio:<6} {rule:7} {own:3} {len(places) - own:8}")

# %%
check(
    "valid: no padding, ever", all(n[1] == 0 for (_, rule), n in counts.items() if rule == "valid")
)
check("padded at 0.25 keeps half of it", counts[0.25, "padded"] == (128, 0), "twice the ratio")
check("padded at 1 keeps all padding", counts[1.0, "padded"] == (256, 256))
show_sample(square, mimdet.select(random_scores, grids, wide, 0.75, "padded"))

# %% [markdown]
# Light grey is padding, white squares in it are padding tokens that were kept. The rule alone does
# not make an image independent of its batch: the stem's GroupNorm averages over padding, position
# tables are resized to the padded grid, and the decoder attends to padding (notebook 04). Therefore
# `predict` and `evaluate` never put images of different padded sizes into one batch.
#
# ## 5 · What a ratio costs
#
# A transformer block of width $D$ on $K$ tokens needs, in multiply-adds:
#
# $$\underbrace{12\,K D^2}_{\text{linear layers}} + \underbrace{2\,K^2 D}_{\text{attention}}$$
#
# ($3D^2$ for query, key, value; $D^2$ for the projection; $8D^2$ in the MLP; $K^2D$ for the scores
# and again for the weighted sum.) MIMDet ViT-B has 12 blocks of width 768; an image of 800 × 1333
# pixels is padded to 800 × 1344, that is 50 × 84 = 4200 tokens. The library counts the whole model
# without running it (`mimdet/analysis/cost.py`); the formula must agree with it.

# %%
from mimdet import presets
from mimdet.analysis.cost import cost_of


def encoder_cost(kept, width=768, depth=12):
    return depth * (12 * kept * width**2 + 2 * kept**2 * width)


wholes = {r: cost_of(presets.mimdet_base(), (800, 1344), r).detector for r in (0.25, 0.5, 1.0)}
print("ratio  tokens  encoder, G  whole detector, G")
for ratio, whole in wholes.items():
    print(
        f"{ratio:<6} {int(4200 * ratio):6} {encoder_cost(int(4200 * ratio)) / 1e9:11.0f} {whole / 1e9:18.0f}"
    )
saved = wholes[1.0] - wholes[0.25]
embed = (4200 - 1050) * 768 * 512  # the linear layer between the two runs on kept tokens as well
by_hand = encoder_cost(4200) - encoder_cost(1050) + embed
check("what is saved is the encoder", saved == by_hand, "to the last multiply-add")

# %%
from mimdet.viz import show_stacked

bars = {}
for ratio, whole in wholes.items():
    kept_now = int(4200 * ratio)
    linear = 12 * 12 * kept_now * 768**2
    attention = 12 * 2 * kept_now**2 * 768
    parts = {"encoder: linear layers": linear, "encoder: attention": attention}
    bars[f"ratio {ratio}"] = {**parts, "all the rest": whole - linear - attention}
show_stacked(bars, "multiply-adds")

# %% [markdown]
# Only the blue parts shrink. Halving the tokens halves the linear layers and quarters the
# attention; stem, decoder, neck and heads cost the same at every ratio (but for one linear layer).
# At 0.25 the decoder, which always sees every place, costs more than the encoder. So a quarter of
# the tokens is far from a quarter of the time, and the gain is larger for ViT-L, whose encoder is
# three times as large.
#
# The published count is 1.1 T multiply-adds for ViT-B. At 800 × 1280 pixels, 4000 tokens:

# %%
at_4000 = {r: cost_of(presets.mimdet_base(), (800, 1280), r).detector / 1e12 for r in (0.25, 1.0)}
giga = [round(encoder_cost(n) / 1e9) for n in (1000, 2000, 4000)]
print(
    f"encoder {giga} G at ratio 0.25, 0.5, 1; detector {at_4000[0.25]:.2f} T and {at_4000[1.0]:.2f} T"
)
check("the published figure is that of ratio 1", round(at_4000[1.0], 1) == 1.1)
decoder = encoder_cost(4000, width=512, depth=4)
check("at 0.25 the decoder costs more than the encoder", decoder > encoder_cost(1000))

# %% [markdown]
# Multiply-adds are not milliseconds. Measure: the encoder and the whole detector, median of nine
# runs.

# %% tags=["timing"]
import time

model = open_detector(MODE, own_path(PATH))  # on the GPU, where there is one
on_gpu = tokens.to(next(model.parameters()).device)
for ratio in (0.25, 0.5, 1.0):
    now = mimdet.select([scores.to(on_gpu.device)], [grid], grid, ratio)
    times = {"encoder": [], "detector": []}
    for _ in range(9):
        start = time.perf_counter()
        with torch.no_grad():
            model.backbone.encoder(on_gpu, now)[0].cpu()
        times["encoder"].append(1000 * (time.perf_counter() - start))
        start = time.perf_counter()
        mimdet.predict(model, picture, sample_ratio=ratio)
        times["detector"].append(1000 * (time.perf_counter() - start))
    print(ratio, {name: f"{torch.tensor(t).median():.1f} ms" for name, t in times.items()})

# %% [markdown]
# In quick mode the encoder is so small that the detector hardly gets faster: its heads take most of
# the time. What a ratio saves must be measured with the model and the machine you train on.
#
# ## 6 · Chance as a value
#
# Below ratio 1 a prediction depends on which tokens were drawn. A generator makes the draw, and the
# draw is a value: it can be repeated, stored, edited and passed in. Each image of a batch has its
# own generator, so what is drawn for it does not depend on the others.

# %%
from mimdet.viz import show_detections

finds = [mimdet.predict(model, picture, sample_ratio=0.25, seed=seed) for seed in (1, 2)]
finds.append(mimdet.predict(model, picture))  # the model's sample_ratio_eval, 1
finds.append(mimdet.predict(model, picture, sample_ratio=1e-6))  # one token
titles = ["¼, seed 1", "¼, seed 2", "all tokens", "one token"]
show_detections([picture] * 4, finds, None, pictures.categories, 0.5, titles=titles)

# %%
again = mimdet.predict(model, picture, sample_ratio=0.25, seed=1)
check("the same seed, the same detections", torch.equal(again.boxes, finds[0].boxes))
differ = len(finds[0]) != len(finds[1]) or not torch.equal(finds[0].boxes, finds[1].boxes)
check("another seed, others", differ, "so an AP below ratio 1 has a spread: average over draws")
full = [mimdet.predict(model, picture, sample_ratio=1.0, seed=seed) for seed in (1, 2)]
same = len(full[0]) == len(full[1]) and torch.allclose(full[0].boxes, full[1].boxes, atol=0.01)
check("at ratio 1 nothing is drawn", same)
half_of_it = Sample([sample.keep[0][::2]], grid)  # edited by hand
edited = mimdet.predict(model, picture, sample=half_of_it)
given = mimdet.predict(model, picture, sample=sample)
changed = len(edited) != len(given) or not torch.equal(edited.scores, given.scores)
check("a sample can be edited and passed in", changed)

# %% [markdown]
# The two draws on the left are not the same: scores differ, and sometimes objects. In the third
# picture, at ratio 1, nothing is left to chance. Ratio 1 is how the paper evaluates: trained at
# 0.25 → 49.9 box and 44.7 mask AP, trained at 0.5 → 51.5 and 46.0 (ViT-B, arXiv version 1), **both
# evaluated at ratio 1**. Train on few tokens and use them all when it counts: that is why
# `cfg.backbone.sample_ratio` and `sample_ratio_eval` are two numbers.
#
# On the right the encoder of the same detector saw one token, and in quick mode it is the large
# things that are gone, not the small ones. That is no accident of this picture. The AP of `tiny` on
# 200 held-out scenes, by the share of tokens and the size of the objects (small: a side below a
# twentieth of the picture's, large: above three twentieths):

# %%
from mimdet.files import read_json
from mimdet.viz import show_reliance
from pandas import DataFrame

stored = read_json("results/reliance_tiny.json")  # its first line is the command that made it
by_share = DataFrame.from_dict(stored["box_ap"], orient="index").head(5)
show_reliance(by_share)

# %%
lost = by_share.loc["all tokens"] - by_share.loc["one token"]
check("large objects need the tokens", lost.AP_large > 10, f"one token: {-lost.AP_large:+.1f} AP")
check("small ones do not", abs(lost.AP_small) < 3, f"one token: {-lost.AP_small:+.1f} AP")

# %% [markdown]
# Small objects are found on the fine maps, made from the stem's c2 and c3, which no sample touches.
# Large ones need c4 and c5, which come out of the transformer: with one token nearly a third of
# their AP is gone, with a quarter of the tokens an eighth.
#
# So much for drawn scenes. Now a real picture: cell nuclei under a microscope
# (`mimdet/pretrained/README.md`). The detector `nuclei` began as `tiny` and learnt from the rest of
# that picture. **Guess first:** what will it find here from one token?

# %%
nuclei, tiles = mimdet.load_detector("nuclei"), mimdet.Nuclei("val")  # not those it learnt from
tile, found = tiles[1].image, {}
for title, ratio in (("one token", 1e-6), ("a quarter", 0.25), ("all tokens", 1.0)):
    found[title] = mimdet.predict(nuclei, tile, sample_ratio=ratio)
few, _, many = (int((some.scores >= 0.5).sum()) for some in found.values())
check("it needs its encoder", few < many / 2, f"{few} nuclei from one token, {many} from all")
show_detections([tile] * 3, [*found.values()], None, tiles.categories, 0.5, titles=[*found])

# %% [markdown]
# ## 7 · Your turn
#
# Ratio, sampler (yours from section 2 is in the list) and seed draw a sample; the brush edits it;
# *reset* forgets the brush. Beside it what a masked autoencoder paints from these tokens, what the
# detector finds, and the truth.

# %%
from mimdet.viz import TokenLab

shown = pictures.images[:5][::-1]
truth = pictures.targets[:5][::-1] if pictures.dataset else None
TokenLab(model, open_mae(MODE), shown, targets=truth, samplers={"strongest": strongest})

# %% [markdown]
# ## Summary
#
# - A sampler scores, `select` keeps the $K$ best, a `Sample` is a value to draw, store, edit, pass.
# - Gather shortens the sequence, scatter puts tokens back; un-shuffling is the same thing.
# - `valid` never encodes padding; `padded` is the paper's rule. Neither makes an image independent
#   of its batch.
# - The encoder costs $12KD^2 + 2K^2D$ a block; everything else costs (all but) the same.
# - Below ratio 1 report a mean and a spread over draws; published scores are at ratio 1.
#
# ## Exercises
#
# 1. At how many tokens does attention cost as much as the linear layers in ViT-B (width 768)? How
#    large an image is that?
# 2. For the image of section 4 (half of its canvas is padding): up to which ratio does the rule
#    `padded` encode no padding?
# 3. Write a sampler `checkerboard(tokens, grid, generator)` that keeps every other token at 0.5.
# 4. Keep exactly the tokens that touch an object of the truth, by hand, as a `Sample`. Then keep
#    exactly the others. Which of the two does the detector need more?
# 5. Show that drawing for two images in one batch gives the same samples as drawing for each alone.

# %%
mine = {1: ..., 2: ..., 3: ...}  # a number, a ratio, your sampler; then run the next cell too

# %% tags=["judge"]
equal = next(k for k in range(1, 10**4) if 12 * k * 768**2 <= 2 * k**2 * 768)
judge(1, mine[1], equal)
clean = [r / 100 for r in range(1, 101) if int(r / 100 * 512) <= grids[0][0] * grids[0][1]]
judge(2, mine[2], max(clean))


def alternates(sampler):
    board = mimdet.select([sampler(None, (4, 6), None)], [(4, 6)], (4, 6), 0.5)
    return len({sum(divmod(int(place), 6)) % 2 for place in board.keep[0]}) == 1


judge(3, mine[3], alternates)

# %% tags=["solution"]
# 1. 12 K D² = 2 K² D, so K = 6 D.
number = 6 * 768
check(f"{number} tokens", 12 * number * 768**2 == 2 * number**2 * 768)
print(f"a square image of {16 * number**0.5:.0f} pixels a side")

# %% tags=["solution"]
# 2. K = r * 512 tokens, of which 256 are its own: up to 0.5, and there it keeps all of them.
check("no padding at 0.5", counts[0.5, "padded"] == (256, 0), "its own ratio is 1")
slightly = mimdet.select(random_scores, grids, wide, 0.51, "padded").keep[0]
check("some at 0.51", int((slightly % wide[1] >= grids[0][1]).sum()) == int(0.51 * 512) - 256)


# %% tags=["solution"]
# 3. Black squares score 1. The built-in "grid" at ratio 0.5 is the same pattern or its opposite.
def checkerboard(tokens, grid, generator):
    rows = torch.arange(grid[0])[:, None]
    return ((rows + torch.arange(grid[1])) % 2).flatten().float()


generator_3 = torch.Generator().manual_seed(SEED)
square_grid = (16, 16)
board = set(checkerboard(None, square_grid, None).nonzero()[:, 0].tolist())
spread = SAMPLERS["grid"](torch.zeros(256, 1), square_grid, generator_3)
evenly = set(mimdet.select([spread], [square_grid], square_grid, 0.5).keep[0].tolist())
check("grid at 0.5 is a checkerboard", evenly in (board, set(range(256)) - board))

# %% tags=["solution"]
# 4. A token is touched when a box overlaps its 16 x 16 pixels. In quick mode the objects' tokens, a
# quarter of all, do for everything. Without them mostly the small objects are left: they are found
# on the stem's fine maps, which see every pixel whatever is sampled.
touched = torch.zeros(grid, dtype=torch.bool)
zoom = image.shape[2] / picture.shape[2] / 16  # pixels of the picture -> tokens
for x0, y0, x1, y1 in (pictures.targets[:5][-1].boxes * zoom).tolist():
    touched[int(y0) : int(y1) + 1, int(x0) : int(x1) + 1] = True
if 0 < touched.sum() < touched.numel():
    fine = []
    for name, chosen in (("objects only", touched), ("the others", ~touched)):
        hand = Sample([chosen.flatten().nonzero()[:, 0]], grid)
        found = mimdet.predict(model, picture, sample=hand)
        with torch.no_grad():
            fine.append(model.features(model.batch([image]), mimdet.Sampling(sample=hand))["c2"])
        sure = found.scores[found.scores >= 0.5]
        print(
            f"{name}: {len(hand.keep[0])} tokens, {len(sure)} found, scores sum to {sure.sum():.2f}"
        )
    check("c2 is the same either way", torch.equal(*fine), "whatever the encoder saw")

# %% tags=["solution"]
# 5. One generator an image is what makes it so.
both = torch.cat([tokens, tokens])
sizes_5 = [batch.image_sizes[0]] * 2
seeds = [torch.Generator().manual_seed(s) for s in (1, 2)]
both_sampled = mimdet.Sampling(0.25, "valid", generators=seeds)
together = model.backbone.draw(both, grid, sizes_5, both_sampled)
for index, seed in enumerate((1, 2)):
    alone = mimdet.Sampling(0.25, "valid", generators=[torch.Generator().manual_seed(seed)])
    single = model.backbone.draw(tokens, grid, sizes_5[:1], alone)
    check(f"image {index + 1}", torch.equal(single.keep[0], together.keep[index]))
