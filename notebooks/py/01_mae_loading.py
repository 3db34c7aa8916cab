# %% [markdown]
# # 01 · Where the transformer comes from: loading a masked autoencoder
#
# **Every tensor of a pre-trained file is either loaded, or named with the reason why not.** MIMDet
# does not train its transformer from scratch: encoder *and decoder* come from a **masked
# autoencoder** (MAE, [He et al., CVPR 2022](https://arxiv.org/abs/2111.06377)) that learnt to
# paint three quarters of an image from the remaining quarter, without any labels. **Afterwards
# you can** open such a file, say what each tensor is for, load it into a detector, notice the
# usual faults, and paint images with it.
#
# | | quick (`MODE = "quick"`) | full (`MODE = "full"`) |
# |---|---|---|
# | study | an hour, after 00 | |
# | what you see | the shipped `tiny_mae` (1.5 million parameters, drawn scenes) into the preset `tiny` | Meta's MAE ViT-B into MIMDet ViT-B |
# | time | about 25 seconds of one CPU core | not timed: 600 images through ViT-B's encoder |
# | memory, disk | about 1 GB | 2.4 GB in `runs/01` |
# | needs | nothing but the kit | `mimdet download mae-base-visualize mimdet-base`, COCO in the folder named by `MIMDET_COCO` |
#
# Set `PATH` to a photo of yours and it is painted in place of the drawn scenes. Do not expect much
# in quick mode: `tiny_mae` has seen drawn shapes and nothing else.

# %% tags=["parameters"]
MODE = "quick"  # "full": Meta's autoencoder and COCO
SEED = 0  # of the patches that are kept
PATH = ""  # your own photo, or a folder with annotations.json and images/
SOLUTIONS = False  # True: the answers at the end run too

# %%
import mimdet
import torch
from mimdet import check, judge, save_mae
from mimdet.notebook import full_recipe, open_detector, open_mae, open_pictures

pictures = open_pictures(PATH, MODE)
mae = open_mae(MODE)
save_mae(mae, "runs/01/mae.pth")  # the layout of Meta's files: {"model": names and tensors}

# %% [markdown]
# ## 1 · What is in the file
#
# A dictionary from names to tensors. These are all the parts there are:
#
# | part | what it is | in MIMDet |
# |---|---|---|
# | `patch_embed` | a 16 × 16 convolution with stride 16: patch → token | no: the ConvStem takes its place |
# | `pos_embed` | the encoder's position table, one vector per place; fixed, never trained | yes, resized |
# | `cls_token` | one extra token that belongs to no place | no |
# | `blocks`, `norm` | the encoder: transformer blocks and the last LayerNorm | yes |
# | `decoder_embed` | a linear layer from the encoder's width to the decoder's | yes |
# | `mask_token` | the one vector that stands for every patch that was not seen | in version 1 (`tiny`), not in version 2 (`mimdet_base`) |
# | `decoder_pos_embed` | the decoder's position table | yes, resized |
# | `decoder_blocks` | the decoder's blocks: 8 in Meta's files | the first 4 (in `tiny` 1 of 4) |
# | `decoder_norm` | its last LayerNorm | yes |
# | `decoder_pred` | a linear layer from a token to the pixels of its patch | no |

# %%
from collections import defaultdict
from mimdet.models.weights import read_mae

file = read_mae("runs/01/mae.pth")
parts = defaultdict(list)
for name in file.tensors:
    parts[name.split(".")[0]].append(name)
for part, names in parts.items():
    count = sum(file.tensors[name].numel() for name in names)
    shape = tuple(file.tensors[names[0]].shape)
    print(f"{part:18}{len(names):4} tensors {count:>12,} values; first {shape}")
check("eleven parts, as in the table", len(parts) == 11, "a twelfth would be another model")

# %% [markdown]
# ## 2 · One tensor, three names
#
# Meta, the Hugging Face hub and this library name the same tensor differently. A table of prefixes
# for each (`mimdet/models/official.py`) translates in both directions; nothing guesses. The hub
# also stores query, key and value apart, Meta stacks them in one matrix.

# %%
from mimdet.models.weights import HF_RULES, MAE_RULES, translate

for ours in ("encoder.blocks.0.mlp.fc1.weight", "encoder.pos_embed", "decoder.blocks.1.norm2.bias"):
    meta = translate(ours, MAE_RULES, back=True)
    hub = translate(meta, HF_RULES, back=True)
    print(f"ours {ours:34} Meta {meta:32} hub {hub}")
known = [name for name in file.tensors if name != "cls_token" and "decoder_pred" not in name]
there_and_back = [
    translate(translate(name, MAE_RULES), MAE_RULES, back=True) == name for name in known
]
check("names come back unchanged", all(there_and_back), f"{len(known)} of {len(file.tensors)}")

# %% [markdown]
# ## 3 · Into a detector
#
# `mimdet.load_mae` starts a detector from the file and says what became of **every** tensor:
# *loaded*, *new* (ours, keeps its random values), *unused* (theirs, not needed here), *missing*
# (should have been there: always an error). PyTorch's `load_state_dict(strict=False)` would load
# nothing at all from a file with other names, and go on.

# %%
from mimdet.viz import show_loaded

cfg = mimdet.presets.tiny() if MODE == "quick" else full_recipe()
cfg.training.seed = SEED
model = mimdet.build_detector(cfg)
report = mimdet.load_mae(model, "runs/01/mae.pth")
show_loaded(report, model)

# %%
ours = model.state_dict()
same = torch.equal(
    ours["backbone.encoder.blocks.0.attn.qkv.weight"], file.tensors["blocks.0.attn.qkv.weight"]
)
check("the encoder's first matrix is the file's", same, "bit for bit")
heads = [name for name in report.loaded if not name.startswith("backbone.")]
check("nothing outside the backbone was loaded", not heads, "an autoencoder knows no boxes")
covered = set(report.loaded) | set(report.new)
check("every tensor of the detector is accounted for", covered == set(ours))
unused = sorted({name.split(".")[0] for name in report.unused})
print("unused parts:", ", ".join(unused))

# %% [markdown]
# Read the bars: the transformer is loaded; stem, neck and heads are new. In quick mode that is all
# there is to say, because `tiny` fills the places that were not sampled as version 1 of the paper
# does, with the file's own mask token. Version 2 (`mimdet_base`) puts the stem's token there,
# projected to the decoder's width by a linear layer that is new: `decoder.fill.proj`.
#
# Why load the decoder at all, when other detectors take the encoder only? Because it is the part
# that has learnt to go from a few tokens back to the full grid, which is exactly the job it has in
# a detector that samples.

# %% [markdown]
# ## 4 · Position tables, and another grid
#
# The table is no secret: half of a vector's channels are sines and cosines of the column, half of
# the row, with frequencies $\omega_i = 10000^{-i/(D/4)}$ (`mimdet/models/vit.py`). So it can be
# computed again and compared.

# %%
from mimdet.models.vit import resize_table, sincos_table

stored = file.tensors["pos_embed"]
side = round((stored.shape[1] - 1) ** 0.5)
again = sincos_table(stored.shape[2], side)
print(f"{tuple(stored.shape)}: {side} x {side} places, and a first row for the class token")
difference = float((stored - again).abs().max())
check(
    "the file holds the formula's table",
    difference < 1e-3,
    "stored in half precision in quick mode",
)
check("the class token has no place", stored[:, 0].abs().max() == 0)

# %% [markdown]
# A detector's images are larger than an autoencoder's, and of any shape. MIMDet does not make a new
# table for a larger grid, it *resizes* the stored one, bicubically, as if it were a picture with
# $D$ channels: once when the file is loaded, 14 × 14 → 50 × 50 for a model of 800 pixels, and again
# in every forward, 50 × 50 → the batch's grid, for example 50 × 84 for 800 × 1344 pixels. With
# Meta's sizes:

# %%
from mimdet.viz import show_positions

meta = sincos_table(768, 14)
model_table = torch.cat([meta[:, :1], resize_table(meta, (50, 50))], dim=1)  # on loading
wide = resize_table(model_table, (50, 84))  # on every forward: (1, 50 * 84, 768)
print(tuple(meta.shape), "->", tuple(model_table.shape), "->", tuple(wide.shape))
show_positions(meta, (50, 84), at=(0.5, 0.5))

# %% [markdown]
# Left and middle: how similar the position in the red frame is to all others. Resizing stretches
# the pattern with the grid: a position says *how far across the picture* a token is, not how many
# tokens it is from the edge. A table made anew for 84 columns (dashed) would count tokens, and to
# the encoder, which knows 14 columns, most of the image would be at places it has never seen.

# %%
own = model.backbone.encoder.pos_embed
check(
    "the stored grid itself stays as it is", torch.equal(resize_table(meta, (14, 14)), meta[:, 1:])
)
once = resize_table(meta, (50, 84))
detour = float((wide - once).abs().mean() / once.abs().mean())
check("by way of 50 x 50 it is not quite the same", 0 < detour < 0.1, f"{detour:.1%} on average")
check("position tables are never trained", not own.requires_grad)

# %% [markdown]
# That detour is one of the differences between the two released versions: version 1 went straight
# from 14 × 14 to the image's grid.
#
# ## 5 · What goes wrong
#
# Five files that people really try to load. The first is the most common: Meta's usual download and
# most model zoos hold the **encoder only**.

# %%
from pathlib import Path

tensors = file.tensors
encoder = {n: v for n, v in tensors.items() if not n.startswith(("decoder_", "mask_token"))}
lacking = {n: v for n, v in tensors.items() if n != "blocks.1.norm2.bias"}
renamed = {n.replace("norm1", "ln1"): v for n, v in tensors.items()}
torch.save({"model": encoder}, "runs/01/encoder_only.pth")
torch.save({"model": lacking}, "runs/01/one_lacks.pth")
torch.save(
    {"model": tensors | {n: v for n, v in renamed.items() if "ln1" in n}}, "runs/01/extra.pth"
)
torch.save({"model": tensors, "hook": Path}, "runs/01/with_code.pth")
whole = Path("runs/01/mae.pth").read_bytes()
Path("runs/01/cut_off.pth").write_bytes(whole[: len(whole) // 2])

# %%
before = {name: value.clone() for name, value in model.state_dict().items()}
refused = []
for name in ("encoder_only", "one_lacks", "extra", "with_code", "cut_off"):
    try:
        mimdet.load_mae(model, f"runs/01/{name}.pth")
    except ValueError as error:
        refused.append(name)
        print(f"{name}\n    {error}\n")
check("all five were refused", len(refused) == 5, "a half-loaded model trains, and badly")
after = model.state_dict()
untouched = all(torch.equal(after[name], value) for name, value in before.items())
check("the model is as it was", untouched, "it changes only when everything fits")

# %% [markdown]
# `with_code.pth` deserves a word: a `.pth` is a pickle, and a pickle can run any program when it is
# opened. This library opens files in PyTorch's `weights_only` mode and names what it found instead.
#
# If you *want* a random decoder in front of a pre-trained encoder, say so:

# %%
alone = mimdet.build_detector(cfg)
other = mimdet.load_mae(alone, "runs/01/encoder_only.pth", decoder="random")
new_blocks = [name for name in other.new if name.startswith("backbone.decoder.blocks")]
check("the decoder's blocks are new", len(new_blocks) > 0, f"{len(new_blocks)} tensors")

# %% [markdown]
# ## 6 · Paint an image from a quarter of it
#
# This is what pre-training was about. The encoder sees $K = \lfloor 0.25\,L \rfloor$ patches; the
# decoder gets them back at their places, the mask token everywhere else, and predicts pixels. The
# loss is the mean squared error over the patches that were **not** seen:
#
# $$\mathcal{L} = \frac{1}{L-K} \sum_{i\ \text{unseen}} \frac{1}{P} \lVert \hat{x}_i - x_i \rVert^2$$
#
# with $P$ numbers a patch (16 · 16 · 3), in pixels normalised by ImageNet's mean and deviation.

# %%
from mimdet.viz import fit_to_mae, draw_sample, paint, show_reconstruction

show_reconstruction(pictures.images[:3], mae, ratio=0.25, seed=SEED)

# %% [markdown]
# Compare the last two columns. In quick mode the autoencoder paints background colours, coarse
# edges and the rest of large shapes; a small object of which no patch was seen is *gone*. There is
# nothing to infer it from. A detector may find it nevertheless, on the finer maps of its stem,
# which sees every pixel; in version 2 its decoder gets the stem's tokens, too.
#
# Now the second column alone: where a patch **was** seen the painting is often worse than around
# it. The loss never asks for these patches, so the decoder never learnt to repeat them.

# %%
from mimdet.models.sampling import SAMPLERS

rows = []
for index, image in enumerate(pictures.images):
    fitted, grid = fit_to_mae(image, mae)  # resized to what the autoencoder was trained on
    sample = draw_sample(mae, fitted, grid, 0.25, SEED + index, SAMPLERS["random"])
    errors, seen = paint(fitted, mae, sample).errors, sample.mask()[0]
    flat = (fitted.float() - fitted.float().mean(dim=(1, 2), keepdim=True)).abs().mean()
    rows.append((errors[seen].mean(), errors[~seen].mean(), flat))
on_seen, on_unseen, of_mean = torch.tensor(rows).mean(dim=0).tolist()
print(f"grey levels off where unseen {on_unseen:.1f}, where seen {on_seen:.1f}")
print(f"painting one mean colour instead: {of_mean:.1f}")
better = on_unseen < of_mean
check("it paints better than one mean colour", better, "else it had learnt nothing", trained=True)

# %% [markdown]
# ## 7 · What do its features know?
#
# A detector does not paint. It hopes for tokens that say *what* is there. Two questions to the
# encoder's tokens, of all patches, beside those of an encoder with random weights: how many objects
# does a *linear* classifier name correctly, from the mean token inside their masks? And in how many
# of their D directions do tokens vary (*effective rank*, `mimdet/analysis/reliance.py`)?

# %%
from mimdet.analysis.reliance import features_of, untrained

known = mimdet.ShapesCOCO("shapes-v1-medium", length=200)
unseen = mimdet.ShapesCOCO("shapes-v1-medium", length=100, split="val")
told, rank = {}, {}
for name, net in {"this autoencoder": mae, "random weights": untrained(mae)}.items():
    features = features_of(net, "encoder")
    told[name] = mimdet.linear_probe(features, known, unseen)
    rank[name] = mimdet.token_rank(features, pictures.images)
    print(f"{name:16} {told[name]:.0%} of the objects named, effective rank {rank[name]:.1f}")
chance = 1 / len(unseen.categories)
check("both are better than guessing", min(told.values()) > chance, f"which is {chance:.0%}")

# %% [markdown]
# In quick mode, hardly more than random weights: 39 against 36 %, and with twice the scenes 40.9
# against 41.4 % (`results/reliance_tiny_mae.json`). Its tokens even vary in fewer directions. It is not
# that such an encoder could not tell more: *taught* the classes of 12,800 scenes, it names 58 %
# (`results/probe.json`). Painting does not ask for them: nine tenths of these scenes are ground and
# clutter, and colours and edges paint well. Nor would telling more be enough: as a start with 250
# labelled scenes that taught encoder is worth +0.0 box AP, with an interval of two either way
# (`results/taught_start.json`): behind a stem that begins at random it sees tokens that it was never
# taught to read. So do not expect much of this start either (`docs/claims.md`, C5). That
# pre-training pays is the paper's result, for ViT-B, ImageNet and COCO.
#
# ## 8 · `norm_pix_loss`: better features, no brightness
#
# Meta's weights for fine-tuning were trained on patches that are each normalised by **their own**
# mean and deviation, over all pixels and colours. Such a model predicts what varies inside a patch,
# but neither brightness nor contrast. To make a picture of it, one has to *borrow* these two from
# the truth. How much of a pretty picture is borrowed? Let a model predict nothing at all, zeros:

# %%
from mimdet.models.rcnn import pad_and_normalise

fitted, grid = fit_to_mae(pictures.images[:3][-1], mae)
pixels = pad_and_normalise([fitted], mae).tensors[:, :, : fitted.shape[1]]
pixels = pixels[:, :, :, : fitted.shape[2]]
with torch.no_grad():
    output = mae(pixels, ratio=0.25)
nothing = output._replace(prediction=torch.zeros_like(output.prediction))
was, mae.norm_pix_loss = mae.norm_pix_loss, True
borrowed = mae.reconstruct(pixels, nothing).painted
mae.norm_pix_loss = was

# %%
from mimdet.models.mae import patch_statistics, patchify, unpatchify
from mimdet.viz import show_pictures, to_uint8

truth = patchify(pixels, mae.patch_size)  # (1, L, 768)
mean, deviation = patch_statistics(truth)
target = unpatchify((truth - mean) / deviation, output.sample.grid)
show_pictures(
    {
        "original": to_uint8(pixels[0]),
        "what norm_pix_loss asks for": to_uint8(target[0]),
        "a prediction of zeros, borrowed brightness": to_uint8(borrowed[0]),
    }
)

# %%
grey = torch.allclose(patchify(borrowed, mae.patch_size), mean.expand_as(truth), atol=1e-4)
check("predicting nothing paints the brightness of every true patch", grey)
brightness = truth.unflatten(2, (-1, 3)).mean(dim=3)  # (1, L, 256): without colour
share = float(mean.var() / brightness.var())
check("which is a picture", share > 0.2, f"it holds {share:.0%} of the variance of brightness")

# %% [markdown]
# So never judge an autoencoder by reconstructions with borrowed statistics. The weights called
# *visualize* were trained without `norm_pix_loss`, as `tiny_mae` was: all they paint is their own.
#
# ## 9 · Brush patches away
#
# Left: the kept patches. Drag over them to take some away, or over grey ones to bring them back,
# and watch what is painted and what the detector finds from exactly these tokens. Both models get
# the same tokens: an image is resized until 16 pixels of the detector's input are one patch of the
# autoencoder.

# %%
from mimdet.viz import TokenLab

detector = open_detector(MODE)
shown = pictures.images[:3][::-1]
truth = pictures.targets[:3][::-1] if pictures.dataset else None
TokenLab(detector, mae, shown, targets=truth, ratio=0.5)

# %% [markdown]
# *Try:* take away every token of one object. Does the autoencoder paint it back? Does the detector
# still find it, and if so, from where? (The stem sees every pixel, always: notebook 03.)
#
# ## Summary
#
# - An autoencoder's file has eleven parts; MIMDet takes the encoder, the first blocks of the
#   decoder, both position tables and, in version 1, the mask token. Stem, neck and heads are new.
# - Loading names every tensor, or refuses. Encoder-only files are refused unless you ask.
# - Position tables are formulas, resized like pictures: a place is a share of the image.
# - Painting is what the decoder was trained for; unseen small objects cannot be painted.
# - A good painter need not know what it paints: a linear probe of its tokens tells.
# - With `norm_pix_loss`, a reconstruction shows borrowed brightness and contrast.
#
# ## Exercises
#
# 1. Which share of the detector's parameters comes from the file? And which share of the *file*
#    finds a place?
# 2. Set `cfg.backbone.decoder_fill` to the fill of the paper's other version (`"stem"`,
#    `"mask_token"`) and load again: which tensor changes sides in the report?
# 3. Load the file into a detector with one encoder block more than the file has. Guess which of
#    the four lists it ends in before you run it.
# 4. At the same ratio, is it harder to paint from `random` patches or from whole `block`s? Guess,
#    then measure on the pictures of this notebook.
# 5. Resize a table from 14 × 14 to 50 × 50 and back. What is lost? Why not everything?

# %%
mine = {1: ..., 2: ...}  # the detector's share, the tensor's name in the file; run the next cell too

# %% tags=["judge"]
import copy
from mimdet.viz import loaded_by_part

counts = loaded_by_part(report, model)
from_file = sum(own["from the file"] for own in counts.values())
everything = sum(p.numel() for p in model.parameters())
other_cfg = copy.deepcopy(cfg)
other_cfg.backbone.decoder_fill = "mask_token" if MODE == "full" else "stem"
other = mimdet.load_mae(mimdet.build_detector(other_cfg), "runs/01/mae.pth")
judge(1, mine[1], from_file / everything)
judge(2, mine[2], lambda name: name in {*other.unused} ^ {*report.unused})

# %% tags=["solution"]
# 1. Count values, not tensors.
print(f"{from_file / everything:.0%} of the detector comes from the file")
used = 1 - sum(tensors[n].numel() for n in report.unused) / sum(v.numel() for v in tensors.values())
print(f"{used:.0%} of the file finds a place")
check("parts add up", sum(sum(own.values()) for own in counts.values()) == everything)

# %% tags=["solution"]
# 2. The mask token: version 1 loads it, version 2 has no place for it, and a new projection.
reports = {}
for fill in ("mask_token", "stem"):
    own_cfg = copy.deepcopy(cfg)
    own_cfg.backbone.decoder_fill = fill
    reports[fill] = mimdet.load_mae(mimdet.build_detector(own_cfg), "runs/01/mae.pth")
check("version 1 loads it", "backbone.decoder.fill.token" in reports["mask_token"].loaded)
check("version 2 does not", "mask_token" in reports["stem"].unused)
new = [name for name in reports["stem"].new if "fill" in name]
check("its projection is new", len(new) == 2, ", ".join(new))

# %% tags=["solution"]
# 3. In none: the sizes differ, which is an error before anything is loaded.
deeper = copy.deepcopy(cfg)
deeper.backbone.depth += 1
try:
    mimdet.load_mae(mimdet.build_detector(deeper), "runs/01/mae.pth")
    said = ""
except ValueError as error:
    said = str(error)
print(said)
check("refused", bool(said), "a block of random numbers in the middle would spoil the rest")

# %% tags=["solution"]
# 4. Blocks: the nearest seen patch is farther away.
losses = {"random": 0.0, "block": 0.0}
for name in losses:
    for index, image in enumerate(pictures.images):
        fitted, grid = fit_to_mae(image, mae)
        sample = draw_sample(mae, fitted, grid, 0.25, SEED + index, SAMPLERS[name])
        losses[name] += paint(fitted, mae, sample).loss / len(pictures.images)
print(", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
check(
    "blocks are harder",
    losses["block"] > losses["random"] or PATH,
    "on a single photo it may not be",
)

# %% tags=["solution"]
# 5. Little: 50 x 50 places hold more than 14 x 14; what is lost is the fastest waves.
there = torch.cat([meta[:, :1], resize_table(meta, (50, 50))], dim=1)
back = resize_table(there, (14, 14))
lost = (back - meta[:, 1:]).abs().mean(dim=(0, 1))  # per channel
print(
    f"mean change {lost.mean():.4f}; of the fastest channel {lost[0]:.3f}, the slowest {lost[191]:.0e}"
)
check("fast waves suffer most", lost[0] > 10 * lost[191])
show_positions(there, (14, 14))
