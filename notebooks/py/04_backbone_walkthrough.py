# %% [markdown]
# # 04 · Backbone walkthrough: every tensor from image to p6
#
# One image goes through MIMDet's backbone and neck twice: by the library, with every intermediate
# tensor recorded, and by hand, with matrix products, sums and indexing. After each step the two are
# compared. **Afterwards you can** name every shape and count by hand what it costs in the paper.
#
# | | quick (`MODE = "quick"`) | full (`MODE = "full"`) |
# |---|---|---|
# | study | an hour, after 02, 03 | |
# | what you see | the shipped `tiny`, 2 million parameters; counts of ViT-B | the released MIMDet ViT-B on COCO |
# | time | about 15 s of one core | not timed: 10 images through ViT-B |
# | memory | about 1 GB | 1 GB of weights, twice |
# | needs | nothing but the kit | `mimdet download mimdet-base`, COCO in `MIMDET_COCO` |
#
# B images, L tokens of the full grid, K kept ones, D width of the encoder, C of the decoder. A step
# is right when the largest difference is below 10⁻⁵ of the largest value, in float64.

# %% tags=["parameters"]
MODE = "quick"  # "full": the released ViT-B and COCO
SEED = 0  # of the sample
PATH = ""  # "nuclei": real pictures; a photo; a folder of data; "": MIMDET_PICTURES
SOLUTIONS = False  # True: the answers at the end run too

# %%
import mimdet
import torch
import torch.nn.functional as F
from mimdet import check, judge
from mimdet.images import Resize
from mimdet.notebook import open_detector, open_pictures, own_path

torch.set_num_threads(1)
pictures = open_pictures(own_path(PATH), MODE)
model = open_detector(MODE, own_path(PATH)).cpu().double().eval()
if MODE == "full":
    model.resize = Resize(384, 640)  # all of it is on the CPU
image = model.resize(pictures.images[0])[:, :-24, :-10]  # cut, so that there is something to pad
print("the image, as it is fed in:", tuple(image.shape))

# %% [markdown]
# ## 1 · The library's own run, recorded
#
# `mimdet.record` puts hooks on the modules you name and takes them off again
# (`mimdet/viz/record.py`). Half of the tokens are kept, drawn from a seed.

# %%
encoder, decoder = model.backbone.encoder, model.backbone.decoder
parts = ["stem", *(f"encoder.blocks.{i}" for i in range(len(encoder.blocks))), "encoder"]
parts += [*(f"decoder.blocks.{i}" for i in range(len(decoder.blocks))), "decoder"]
names = [*(f"backbone.{part}" for part in parts), "backbone", "neck"]
with mimdet.record(model, *names) as seen:
    generator = torch.Generator().manual_seed(SEED)
    sampling = mimdet.Sampling(0.5, "valid", generators=[generator])  # no padding (section 9)
    found = model.detect([image], sampling=sampling)
for name in seen:
    value = seen[name]
    value = value._asdict() if name == "backbone.stem" else value
    for field, tensor in value.items() if isinstance(value, dict) else [("", value)]:
        tensor = tensor[0] if isinstance(tensor, list) else tensor  # the encoder: one per image
        print(f"{name + ' ' + field:28} {tuple(tensor.shape)}")

# %% [markdown]
# This list is Figure 1 of the paper, from left to right. Below, each line is made again.
#
# ## 2 · Pixels: normalise, then pad
#
# ImageNet's mean is subtracted and its standard deviation divided out, per colour; then zeros are
# added below and to the right up to a multiple of 32, the stride of c5 (`mimdet/models/rcnn.py`):
# padding is the *mean* colour, not black.

# %%
from mimdet.models.rcnn import IMAGENET_MEAN, IMAGENET_STD
from mimdet.viz import largest_difference

mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], dtype=torch.float64)
height, width = image.shape[1:]
H, W = (height + 31) // 32 * 32, (width + 31) // 32 * 32
x = torch.zeros(1, 3, H, W, dtype=torch.float64)
x[0, :, :height, :width] = ((image.permute(1, 2, 0) - mean) / std).permute(2, 0, 1)
batch = model.batch([image])
check(f"{height} x {width} on a canvas of {H} x {W}", torch.allclose(x, batch.tensors, atol=1e-6))

# %% [markdown]
# ## 3 · The stem: four convolutions
#
# Stage = convolution 3 × 3 with stride 2, GroupNorm over the whole map, GELU. A convolution is a
# matrix product: `unfold` writes the 3 × 3 neighbourhood of every place into a column. Stages 2 and
# 3 are c2 and c3; after stage 4 a 1 × 1 convolution makes the tokens.

# %%
stem, maps = model.backbone.stem, {}
with torch.no_grad():
    for level, stage in zip(("c1", "c2", "c3", "c4"), stem.children(), strict=True):
        convolution, norm = stage[0], stage[1]
        h, w = x.shape[2] // 2, x.shape[3] // 2
        columns = F.unfold(x, kernel_size=3, padding=1, stride=2)  # (1, 9 * channels, h * w)
        x = convolution.weight.flatten(1) @ columns  # (1, wider, h * w)
        x = (x - x.mean()) / (x.var(unbiased=False) + norm.eps).sqrt()
        x = x * norm.weight[:, None] + norm.bias[:, None]
        x = 0.5 * x * (1 + torch.erf(x / 2**0.5))  # GELU
        maps[level] = x = x.unflatten(2, (h, w))
    last = stem.stage4[3]
    tokens = torch.einsum("dc,bchw->bdhw", last.weight[:, :, 0, 0], x) + last.bias[:, None, None]
del maps["c1"], maps["c4"]  # stride 2 is used by nobody; stride 16 is not finished yet

# %%
for level, ours in {**maps, "tokens": tokens}.items():
    off = largest_difference(ours, getattr(seen["backbone.stem"], level))
    check(f"{level} {tuple(ours.shape)} by hand", off < 1e-5, "equal up to rounding")

# %% [markdown]
# ## 4 · Tokens: flatten, add positions
#
# A map becomes a list: place = row · w + column. Then each place is told where it is, by MAE's fixed
# table: half of the channels encode the column, half the row, by sines and cosines of falling
# frequency. A stored table of another size is resized bicubically (`mimdet/models/vit.py`).

# %%
from mimdet.models.vit import resize_table, sincos_table

B, D, h, w = tokens.shape
L = h * w
flat = tokens.flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, L, D)
table = encoder.pos_embed[0, 1:]  # without the row of MAE's class token
side = round(len(table) ** 0.5)
row, column = 5, 3
frequency = 10000 ** -(torch.arange(D // 4, dtype=torch.float64) / (D // 4))
angles = [column * frequency, row * frequency]
place = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())])
entry = row * side + column
made = sincos_table(D, side)[0, 1 + entry].double()
check(f"row {row}, column {column}", torch.allclose(place, made, atol=1e-6))
stored = float((place - table[entry]).abs().max())
check("and as stored", stored < 1e-3, "the shipped weights are stored in half precision")

# %%
square = table.T.unflatten(1, (side, side))[None]  # (1, D, side, side)
resized = F.interpolate(square.float(), size=(h, w), mode="bicubic", align_corners=False)
positions = square if (h, w) == (side, side) else resized.double()  # resized in float32, always
positions = positions.flatten(2).transpose(1, 2)  # (1, L, D)
same = torch.equal(positions, resize_table(encoder.pos_embed, (h, w)))
check(f"table of {side} x {side} on a grid of {h} x {w}", same)
with_positions = flat + positions

# %% [markdown]
# ## 5 · Sample: which half?
#
# Every token that the image touches gets a random score, and the highest are kept
# (`mimdet/models/sampling.py`). Padding is not in the draw.

# %%
from mimdet.viz import show_sample

own_h, own_w = -(-height // 16), -(-width // 16)
places = (torch.arange(own_h)[:, None] * w + torch.arange(own_w)).flatten()
scores = torch.rand(own_h * own_w, generator=torch.Generator().manual_seed(SEED))
K = int(0.5 * len(places))
keep = places[scores.topk(K).indices]
check(f"{K} of {len(places)} tokens", torch.equal(keep, seen.sample.keep[0]), f"L = {L}")
show_sample(image, seen.sample)

# %% [markdown]
# ## 6 · The encoder sees K tokens
#
# *Gather* is indexing. Then blocks of attention and MLP, each added to what came in:
#
# $$x \leftarrow x + \mathrm{proj}\left(\mathrm{softmax}\left(\frac{qk^\top}{\sqrt{d}}\right)v\right),
# \qquad x \leftarrow x + W_2\,\mathrm{GELU}(W_1 x),$$
#
# both on normalised inputs (LayerNorm over the D channels of a token). The matrix in the softmax is
# K × K: at ratio 0.5 a quarter of the full one.

# %%
def layer_norm(x, norm):  # x (N, D)
    centred = x - x.mean(dim=1, keepdim=True)
    scale = (centred.square().mean(dim=1, keepdim=True) + norm.eps).sqrt()
    return centred / scale * norm.weight + norm.bias


def block_by_hand(block, x):  # (N, D) -> (N, D)
    heads = block.attn.num_heads
    qkv = layer_norm(x, block.norm1) @ block.attn.qkv.weight.T + block.attn.qkv.bias
    q, k, v = qkv.unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)  # each (heads, N, d)
    attention = (q @ k.transpose(1, 2) / q.shape[2] ** 0.5).softmax(dim=2)  # (heads, N, N)
    mixed = (attention @ v).transpose(0, 1).flatten(1)  # heads side by side: (N, D)
    x = x + mixed @ block.attn.proj.weight.T + block.attn.proj.bias
    hidden = F.gelu(layer_norm(x, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    return x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias

# %%
with torch.no_grad():
    x = with_positions[0, keep]  # gather: (L, D) -> (K, D)
    for number, block in enumerate(encoder.blocks):
        x = block_by_hand(block, x)
        off = largest_difference(x, seen[f"backbone.encoder.blocks.{number}"][0])
        check(f"encoder block {number}", off < 1e-5, f"{tuple(x.shape)}")
    encoded = layer_norm(x, encoder.norm)
off = largest_difference(encoded, seen["backbone.encoder"][0])
check("encoder output", off < 1e-5, "the last LayerNorm is MAE's")

# %% [markdown]
# ## 7 · The decoder sees all of them again
#
# Encoded tokens go through one matrix to the decoder's width and back to their places (*scatter* is
# assignment). The other places need a *fill*: in version 1 of the paper, and in `tiny`, MAE's mask
# token, one learned vector; in version 2, and in the released ViT-B, the **stem's own tokens**,
# without positions, through a second matrix. Then positions, blocks (one in `tiny`, four of MAE's
# eight in ViT-B), a LayerNorm, and the list is a map again: c4.

# %%
version = {"mask_token": 1, "stem": 2}[model.config.backbone.decoder_fill]
with torch.no_grad():
    if version == 1:
        filled = decoder.fill.token[0].repeat(L, 1)  # (1, C) -> (L, C)
    else:
        filled = flat[0] @ decoder.fill.proj.weight.T + decoder.fill.proj.bias  # (L, C)
    off = largest_difference(filled, decoder.fill(flat)[0])
check(f"the fill of version {version}", off < 1e-5)

# %%
with torch.no_grad():
    x = filled.clone()
    x[keep] = encoded @ decoder.embed.weight.T + decoder.embed.bias  # scatter: K of L rows
    x = x + resize_table(decoder.pos_embed, (h, w))[0]
    for number, block in enumerate(decoder.blocks):
        x = block_by_hand(block, x)
        off = largest_difference(x, seen[f"backbone.decoder.blocks.{number}"][0])
        check(f"decoder block {number}", off < 1e-5, f"{tuple(x.shape)}")
    maps["c4"] = layer_norm(x, decoder.norm).T.unflatten(1, (h, w))[None]  # (L, C) -> (1, C, h, w)
    maps["c5"] = maps["c4"].unflatten(2, (h // 2, 2)).unflatten(4, (w // 2, 2)).amax(dim=(3, 5))
for level in ("c4", "c5"):
    off = largest_difference(maps[level], seen["backbone"][level])
    check(f"{level} {tuple(maps[level].shape)}", off < 1e-5, "c5 is the largest of 2 x 2 places")

# %% [markdown]
# ## 8 · The neck: five levels of equal width
#
# The feature pyramid (`mimdet/models/rcnn.py`), from coarse to fine: a 1 × 1 convolution brings each
# level to a common width, the coarser one is enlarged by repetition and added, a 3 × 3 convolution
# finishes. p6 is every second row and column of p5.

# %%
pyramid, sums, levels = model.neck.pyramid, {}, {}
with torch.no_grad():
    for i in (3, 2, 1, 0):
        convolution, norm = pyramid.inner_blocks[i]  # 1 x 1: a matrix product at every place
        matrix = convolution.weight[:, :, 0, 0]
        lateral = norm(torch.einsum("dc,bchw->bdhw", matrix, maps[f"c{i + 2}"]))
        if i < 3:
            lateral += sums[i + 1].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        sums[i] = lateral
        convolution, norm = pyramid.layer_blocks[i]
        levels[f"p{i + 2}"] = norm(F.conv2d(sums[i], convolution.weight, padding=1))
    levels["p6"] = levels["p5"][:, :, ::2, ::2]
for level in sorted(levels):
    off = largest_difference(levels[level], seen["neck"][level])
    check(f"{level} {tuple(levels[level].shape)}", off < 1e-5)

# %%
from mimdet.viz import show_pyramid

canvas = F.pad(image, (0, W - width, 0, H - height))
show_pyramid(canvas, {level: levels[level][0] for level in sorted(levels)})

# %% [markdown]
# Look at the lower and the right border of p2: to a convolution the edge of the padding is an edge
# like any other. In quick mode p4 is speckled: half of its places held the mask token. What follows
# is an ordinary Mask R-CNN (`mimdet/models/detector.py` reads top-down).
#
# ## 9 · At ratio 1 the fill does nothing
#
# Give the detector the other version's fill, with random weights. At ratio 1 nothing is dropped, so
# both must agree *exactly*. One trap: the kit never samples **padding**, so there the fill still
# stands in, and the decoder attends to it. The original's `keep="padded"` encodes padding as well.

# %%
import copy

from mimdet import Sample
from mimdet.models.sampling import token_grid

cfg = copy.deepcopy(model.config)
cfg.backbone.decoder_fill = "stem" if version == 1 else "mask_token"
torch.manual_seed(SEED)  # of the other fill: random, never trained
other = mimdet.build_detector(cfg).double().eval()
report = other.load_state_dict(model.state_dict(), strict=False)
print(f"new in version {3 - version}:", report.missing_keys, "| gone:", report.unexpected_keys)
square = model.batch([image[:, : height // 32 * 32, : width // 32 * 32]])

# %%
cases = [(batch, 0.5, "valid"), (batch, 1, "valid"), (batch, 1, "padded"), (square, 1, "valid")]
for images, ratio, keep in cases:
    c4 = []
    for of_version in (model, other):
        seeds = [torch.Generator().manual_seed(SEED)]
        with torch.inference_mode():
            made = of_version.features(images, mimdet.Sampling(ratio, keep, generators=seeds))
        c4.append(made["c4"][:, :, :own_h, :own_w])
    moved, equal = float((c4[0] - c4[1]).norm() / c4[0].norm()), torch.equal(*c4)
    must = ratio == 1 and (images is square or keep == "padded")
    name = f"ratio {ratio}, {'no padding' if images is square else 'padded canvas'}, keep='{keep}'"
    check(f"{name}: c4 moves by {100 * moved:.1f} %", equal == must, "bit for bit" * equal)

# %% [markdown]
# So the published evaluation computes the same in versions 1 and 2; they differ through training
# alone (how much that can be: notebook 05). In the paper's repository three things changed together:
# the fill, the stored position grid, for ViT-L the learning rate. The gain of 0.2 AP (51.5 to 51.7
# for ViT-B) cannot be pinned on one of them.
#
# ## 10 · Parameters of ViT-B, by hand
#
# A linear layer from $a$ to $b$ has $ab + b$ numbers. A transformer block of width $D$ has $3D^2 +
# 3D$ (query, key, value), $D^2 + D$ (projection), $8D^2 + 5D$ (MLP) and $4D$ (two norms):
# $12D^2 + 13D$. A convolution $k \times k$ has $k^2ab$, and $b$ more with a bias; a norm $2b$.

# %%
D, C, depth, grid = 768, 512, 12, 50  # mimdet_base; decoder: 512 wide, 4 blocks


def linear(a, b):
    return a * b + b


def blocks(width, count):
    return count * (12 * width**2 + 13 * width)


def backbone_by_hand(D, depth, C=512, decoder_depth=4, grid=50, version=2):
    widths = [(3, D // 8), (D // 8, D // 4), (D // 4, D // 2), (D // 2, D)]
    stem = sum(9 * a * b + 2 * b for a, b in widths) + linear(D, D)
    encoder = (1 + grid**2) * D + blocks(D, depth) + 2 * D  # + 1: the class token's row is stored
    fill = C if version == 1 else linear(D, C)  # one vector, or a matrix
    decoder = linear(D, C) + fill + (1 + grid**2) * C + blocks(C, decoder_depth) + 2 * C
    return {"stem": stem, "encoder": encoder, "decoder": decoder}

# %%
def heads_by_hand(D, C=512, F=256, classes=80):  # F: width of the neck
    conv = 9 * F * F
    neck = (D // 4 + D // 2 + C + C) * F + 4 * conv + 8 * 2 * F
    rpn = 2 * (conv + F) + linear(F, 3) + linear(F, 4 * 3)  # 3 anchors a place
    box = 4 * (conv + 2 * F) + linear(49 * F, 1024)
    box += linear(1024, classes + 1) + linear(1024, 4 * classes)
    mask = 4 * (conv + 2 * F) + (4 * F * F + F) + linear(F, classes)
    return {"neck": neck, "rpn": rpn, "box head": box, "mask head": mask}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


with torch.device("meta"):  # shapes without numbers: ViT-B and ViT-L cost nothing to build
    base = mimdet.build_detector(mimdet.presets.mimdet_base())

# %%
by_hand = backbone_by_hand(D, depth) | heads_by_hand(D)
modules = dict(base.backbone.named_children()) | {"neck": base.neck, "rpn": base.rpn}
modules |= {"box head": base.roi_heads.box_head, "mask head": base.roi_heads.mask_head}
for name, number in by_hand.items():
    check(f"{name:9} {number:>11,}", count(modules[name]) == number)
total = sum(by_hand.values())
check(f"MIMDet ViT-B: {total:,}", total == count(base) == 127_954_768, "published as 127.96 M")

# %% [markdown]
# Two thirds are the encoder's. The position tables (3.2 M) count although they are never trained.
# In place of a matrix of $768 \cdot 512 + 512$ numbers, version 1 has a mask token of 512. And the backbone
# that you have walked through:

# %%
first_version = sum((backbone_by_hand(D, depth, version=1) | heads_by_hand(D)).values())
with torch.device("meta"):
    v1 = count(mimdet.build_detector(mimdet.presets.mimdet_v1_base()))
check(f"version 1: {first_version:,}", first_version == v1 == 127_561_552)
c = model.config.backbone
numbers = (c.embed_dim, c.depth, c.decoder_dim, c.decoder_depth, c.position_grid)
walked = sum(backbone_by_hand(*numbers, version).values())
check(f"{model.config.preset}, backbone: {walked:,}", walked == count(model.backbone))

# %% [markdown]
# ## 11 · Multiply-adds, by hand and counted
#
# Per block and K tokens: the matrices take $12D^2K$, the attention $2K^2D$: one grows with the ratio,
# the other with its square. The decoder does the same on all L tokens, plus its two projections. An
# image of 800 × 1280 pixels has L = 4000. The numbers expected were worked out from the shapes of
# the original code, before this library existed.

# %%
from mimdet.analysis.cost import cost_of, multiply_adds

H, W, L = 800, 1280, 4000
expected = {0.25: (103, 117, 0.59), 0.5: (244, 117, 0.73), 1.0: (635, 117, 1.13)}  # G, G, T
table = {}
for ratio, by_shape in expected.items():
    K = int(ratio * L)
    encode = depth * (12 * D**2 * K + 2 * K**2 * D)
    decode = 4 * (12 * C**2 * L + 2 * L**2 * C) + D * C * L  # blocks, fill
    whole = cost_of(mimdet.presets.mimdet_base(), (H, W), ratio).detector
    rest = whole - encode - decode  # stem, embed, neck, heads
    table[f"ratio {ratio}"] = dict(encoder=encode, decoder=decode, others=rest)
    giga = round(encode / 1e9), round(decode / 1e9), round(whole / 1e12, 2)
    check(f"ratio {ratio}: encoder, decoder, all: %d G, %d G, %.2f T" % giga, giga == by_shape)

# %%
with torch.device("meta"):
    tokens_l = torch.empty(1, L, D)
    for ratio in expected:
        K, parts = int(ratio * L), table[f"ratio {ratio}"]
        sample = Sample([torch.empty(K, dtype=torch.long)], (H // 16, W // 16))
        few = [torch.empty(K, D)]
        encoded_at = multiply_adds(lambda s=sample: base.backbone.encoder(tokens_l, s))
        decoded = multiply_adds(lambda s=sample, x=few: base.backbone.decoder(x, s, tokens_l))
        same = (encoded_at, decoded) == (parts["encoder"], parts["decoder"] + D * C * K)
        check(f"counted at ratio {ratio}: {encoded_at:,} and {decoded:,}", same, "with embed")

# %%
from mimdet.viz import show_stacked

work = [parts["encoder"] for parts in table.values()]
shares = [round(part / work[-1], 2) for part in work[:2]]
check("the encoder costs 0.16 and 0.38 of all", shares == [0.16, 0.38], "more than ratio squared")
detector = [sum(parts.values()) for parts in table.values()]
print("the whole detector costs", [round(d / detector[-1], 2) for d in detector[:2]], "of all")
show_stacked(table, "multiply-adds, ViT-B, one image of 800 x 1280 pixels")

# %% [markdown]
# The published 1.1 T is that of ratio 1. At 0.25 most of the bar is what sampling cannot touch.
#
# ## 12 · Now turn the dial
#
# The trained detector, the truth beside it, and its milliseconds here. *Try:* the seed at ratio 1.

# %%
from mimdet.viz import RatioDial

shown = (pictures.images, pictures.targets, pictures.categories)
dial = RatioDial(open_detector(MODE, own_path(PATH)), *shown)
dial.ratio.value = 0.25
dial

# %% [markdown]
# ## Summary
#
# - From pixels to p6 there is nothing but matrix products, norms, GELU, softmax and indexing.
# - The encoder sees K tokens; *scatter* and the fill make the grid whole: c4, and its maximum c5.
# - At ratio 1 and without padding the fill has no effect, bit for bit; in training it has.
# - 127,954,768 parameters, two thirds in the encoder. A quarter of the tokens cuts it to a sixth, the
#   detector to a half.
#
# ## Exercises
#
# 1. An image of 600 × 700 pixels at ratio 0.25: K, and rows and columns of p6? By hand first.
# 2. Shuffle `sample.keep`. Which changes: "encoder" (its output), "c4", or "both"?
# 3. Count the parameters of `mimdet_large` (D = 1024, 24 blocks, same decoder) by hand.
# 4. Drop one more token from the sample. At how many places does c4 change? Where most?

# %%
mine = {1: ..., 2: ..., 3: ..., 4: ...}  # three numbers (K, h, w); a word; a count; a count

# %% tags=["judge"]
from mimdet.structures import padded_size

canvas_size, own = padded_size(600, 700), token_grid(600, 700)
drawn = mimdet.select([torch.rand(own[0] * own[1])], [own], own, 0.25)
p5 = torch.zeros(1, 1, canvas_size[0] // 32, canvas_size[1] // 32)
p6 = tuple(model.neck.pyramid.extra_blocks([p5], [], [])[0][-1].shape[2:])
judge(1, mine[1], (len(drawn.keep[0]), *p6))
kept = seen.sample.keep[0]
shuffled, less = (Sample([places], seen.sample.grid) for places in (kept.flip(0), kept[1:]))
with torch.inference_mode():
    rows, few = encoder(flat, shuffled), encoder(flat, less)
    mixed, without = decoder(rows, shuffled, flat), decoder(few, less, flat)
moved = largest_difference(rows[0], encoded) > 1e-5, largest_difference(mixed, maps["c4"]) > 1e-5
judge(2, mine[2], {(True, False): "encoder", (False, True): "c4"}.get(moved, "both"))
with torch.device("meta"):
    library = count(mimdet.build_detector(mimdet.presets.mimdet_large()))
judge(3, mine[3], library)
change = (without - maps["c4"])[0].norm(dim=0).flatten() / maps["c4"][0].norm(dim=0).mean()
judge(4, mine[4], int((change > 0).sum()))

# %% tags=["solution"]
# 1. 38 x 44 tokens, all touched by the image: K = 418. p5 is 19 x 22, p6 every second place of it.
check("38 x 44 tokens, K = 418, 10 x 11", (own, len(drawn.keep[0]), p6) == ((38, 44), 418, (10, 11)))

# %% tags=["solution"]
# 2. The encoder's rows are shuffled alike; c4 stays, because scatter undoes any order.
check("rows are shuffled alike", largest_difference(rows[0], encoded.flip(0)) < 1e-5)
check("c4 is the same", largest_difference(mixed, maps["c4"]) < 1e-5, "no order, only places")

# %% tags=["solution"]
# 3. The same functions with other numbers.
large = sum((backbone_by_hand(1024, 24) | heads_by_hand(1024)).values())
check(f"{large:,}", large == library == 349_332_080)

# %% tags=["solution"]
# 4. All of them a little, most of all its own place, where the fill now stands.
gone = int(kept[0])
elsewhere = torch.cat([change[:gone], change[gone + 1 :]])
print(f"at its place {change[gone]:.2g}, elsewhere {elsewhere.mean():.2g} on average")
check("its own place changes most", change[gone] > elsewhere.max())
check("no place stays the same", elsewhere.min() > 0, "attention is global")
