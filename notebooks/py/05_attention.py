# %% [markdown]
# # 05 · Attention: what a patch looks at
#
# **An attention map shows what is mixed with what, not what matters: that is found by exchanging
# it, and measuring** (the two tables of section 5). In every transformer block each token asks all
# others a question and takes a mixture of their answers. How much it takes from whom is the
# *attention*, and here you look at it, block by block and head by head. **Afterwards you can** get
# such numbers out of a model that never stores them, and say what they cost, and why MIMDet needs
# no windows.
#
# | | quick (`MODE = "quick"`) | full (`MODE = "full"`) |
# |---|---|---|
# | study | an hour, after 02 | |
# | what you see | the detector `tiny` that comes with the package, on drawn scenes | the released MIMDet ViT-B, on COCO |
# | time | about 10 s of one CPU core | not timed: 15 images through ViT-B |
# | memory | about 0.9 GB | 0.5 GB of weights; section 7 |
# | needs | nothing but the kit | the file of `mimdet download mimdet-base`, and COCO 2017 in the folder named by `MIMDET_COCO` |
#
# Words: the *query* is the token that asks. *Ratio* is the share of the tokens that the encoder
# sees. Blocks and heads are counted from 0, as in the names of the modules.

# %% tags=["parameters"]
MODE = "quick"  # "full": the released ViT-B and COCO
SEED = 0  # of the samples
PATH = ""  # "nuclei": real pictures; a photo; a folder of data; "": MIMDET_PICTURES
QUERY = (0.5, 0.17)  # the patch to ask, as shares of the height and of the width
SOLUTIONS = False  # True: the answers at the end run too

# %%
import mimdet
import torch
from mimdet import check, judge
from mimdet.images import Resize
from mimdet.notebook import open_detector, open_pictures, own_path

model = open_detector(MODE, own_path(PATH)).cpu()
if MODE == "full":
    model.resize = Resize(384, 640)  # at 800 pixels all maps would take 10 GiB
pictures = open_pictures(own_path(PATH), MODE, count=8)
images = [model.resize(i) for i in pictures.images]
image = images[min(2, len(images) - 1)]  # uint8 (3, H, W), as it is fed to the network
print(f"preset {model.config.preset}, image of {image.shape[1]} x {image.shape[2]} pixels")

# %% [markdown]
# ## 1 · One head, by hand
#
# A head turns each of N tokens into a query $q_i$, a key $k_i$ and a value $v_i$ of width $d$.
# Token *i* then becomes a mixture of the values,
#
# $$ \sum_j A_{ij} v_j, \qquad A_{ij} = \frac{\exp(q_i \cdot k_j / \sqrt d)}
# {\sum_l \exp(q_i \cdot k_l / \sqrt d)} . $$
#
# Row *i* of $A$ is what we want to see. `mimdet.record` (`mimdet/viz/record.py`) keeps it for the
# modules you name while the model runs. The first block of the decoder, with every token sampled:

# %%
from mimdet.viz import show_attention

name = "backbone.decoder.blocks.0.attn"
norm = name.replace("attn", "norm1")  # what goes into the attention
with mimdet.record(model, name, norm) as seen:
    model.detect([image], sampling=mimdet.Sampling(1.0))
h, w = seen.grid
query = (int(QUERY[0] * h), int(QUERY[1] * w))
print("attention (images, heads, N, N):", tuple(seen[name].shape), "on a grid of", seen.grid)
show_attention(image, seen, name, query, heads=True)

# %% [markdown]
# The framed patch is the query. Bright patches are those it takes most from; the title says how
# much the brightest one gives (colours follow the square root, so that little is seen beside much).
# Each head has its own idea of what matters. Now the same numbers from the weights of the block,
# with nothing but the formula.

# %%
block = model.get_submodule(name)
with torch.no_grad():
    q, k, v = block.qkv(seen[norm]).chunk(3, dim=2)  # (B, N, D) each
    q, k = (t.unflatten(2, (block.num_heads, -1)).transpose(1, 2) for t in (q, k))
    logits = q @ k.transpose(2, 3) / q.shape[3] ** 0.5  # (B, heads, N, N)
    by_hand = logits.exp() / logits.exp().sum(dim=3, keepdim=True)
difference = (by_hand - seen[name]).abs().max()
check("recorded attention is the formula", difference < 1e-5, "from the block's own weights")
sums = seen[name].sum(dim=3)
check("each row sums to 1", (sums - 1).abs().max() < 1e-4, "a token divides all of its attention")
check("columns do not", seen[name].sum(dim=2).std() > 0.01, "some tokens are asked more than others")

# %% [markdown]
# **Try:** another `QUERY`, say an empty place of the background.
#
# ## 2 · Why a hook alone sees nothing
#
# PyTorch's `scaled_dot_product_attention` never forms $A$; that is what makes it fast. So a hook
# where $A$ should pass by never fires, and there is no error. `record` switches the named blocks to
# the plain formula, and back again on leaving.

# %%
caught = []
hook = block.attn_drop.register_forward_pre_hook(lambda module, given: caught.append(given[0]))
plain = model.detect([image], sampling=mimdet.Sampling(1.0))[0]
hook.remove()
check("a hook alone caught nothing", not caught, "the fused kernel passes it by")
with mimdet.record(model, "backbone.*.attn") as seen:
    recorded = model.detect([image], sampling=mimdet.Sampling(1.0))[0]
same = len(plain) == len(recorded) and (plain.scores - recorded.scores).abs().max() < 1e-4
check("looking changed no detection", same, "the two ways differ by rounding")

# %% [markdown]
# ## 3 · By block and head, with all tokens
#
# The encoder's blocks for the same query, heads averaged; then the heads of its last block.

# %%
from IPython.display import display

blocks = [n for n in seen if "encoder" in n]
decoder_blocks = [n for n in seen if "decoder" in n]
display(show_attention(image, seen, blocks, query))
show_attention(image, seen, blocks[-1], query, heads=True)

# %% [markdown]
# A picture of one query is an anecdote. Three numbers a head, averaged over all queries, say more:
#
# - *tokens*: how many tokens are looked at, $\exp(-\sum_j A_{ij} \log A_{ij})$. One token that gets
#   everything gives 1, equal shares give N.
# - *distance*: how far away these tokens are, counted in tokens.
# - *differs*: how much the rows of two queries differ. 0: every query gets the same mixture. 1: no
#   two share anything.

# %%
places = torch.arange(h * w)
apart = torch.stack([places // w, places % w], 1).float()
apart = torch.cdist(apart, apart)  # (L, L), in tokens
print(f"{'':18}head  tokens  distance  differs")
for name in seen:
    for head, a in enumerate(seen[name][0]):  # (N, N)
        tokens = (-(a * a.clamp_min(1e-12).log()).sum(1)).exp().mean()
        distance = (a * apart).sum(1).mean()
        differs = (a - a.mean(0)).abs().sum(1).mean() / 2
        part, number = name.split(".")[1], name.split(".")[3]
        print(f"{part} block {number}  {head:4} {tokens:8.0f} {distance:8.1f} {differs:9.2f}")
print(f"equal shares: {h * w} tokens, distance {apart.mean():.1f}")

# %% [markdown]
# In quick mode no head of this small model looks mainly at its neighbours: the distances are about
# those of equal shares. Some heads pick a few dozen tokens, others spread over a hundred. And
# *differs* is below 0.5 everywhere: what two queries get is more alike than not. The tokens vary in
# few of their 128 directions. Split them along the first one:

# %%
from mimdet.analysis.reliance import features_of
from mimdet.viz import show_sample

with mimdet.record(model, "backbone.encoder") as deep:
    model.detect([image], sampling=mimdet.Sampling(1.0))
tokens = deep["backbone.encoder"][0]  # (L, D)
first = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False).U[:, 0]  # (L,)
kinds = [(first > 0).nonzero()[:, 0], (first <= 0).nonzero()[:, 0]]
rank = mimdet.token_rank(features_of(model, "encoder"), pictures.images)
print(f"directions in which tokens vary: about {rank:.1f} of {tokens.shape[1]}")
show_sample(image, {f"kind {i}": mimdet.Sample([kind], seen.grid) for i, kind in enumerate(kinds)})

# %%
every = torch.stack([seen[name][0] for name in blocks])  # (blocks, heads, N, N)
differs = (every - every.mean(2, keepdim=True)).abs().sum(3).mean() / 2
groups = [every[:, :, kind] for kind in kinds]
within = [(g - g.mean(2, keepdim=True)).abs().sum(3).mean() / 2 for g in groups]
print(f"differs: {differs:.2f} of all queries, {within[0]:.2f} and {within[1]:.2f} within a kind")
mean = sum(w * len(kind) for w, kind in zip(within, kinds, strict=True)) / len(first)
check("queries of a kind are more alike", mean < 0.9 * differs, trained=True)

# %% [markdown]
# In quick mode one kind lies on things, on their outlines above all, and the other on the ground
# around them; and what a head gives to two queries of a kind is more alike still. This transformer
# has learnt to say *where something is* first of all. So a bright patch says nothing about the
# query before you have seen that it changes with the query.
#
# ## 4 · On a sample: ratio 1, 0.5, 0.25
#
# In training the encoder sees a sample, and the attention is a smaller table: K × K, K the number
# of kept tokens. `record` knows the sample; `show_attention` puts each number back at its place and
# marks what the encoder never saw in light grey. With one seed the tokens kept at 0.25 are among
# those kept at 0.5, so one query can be asked at all three ratios.

# %%
from mimdet.viz import nearest_sampled

looks = {}
for ratio in (1.0, 0.5, 0.25):
    generators = [torch.Generator().manual_seed(SEED)]
    with mimdet.record(model, "backbone.*.attn") as looks[ratio]:
        model.detect([image], sampling=mimdet.Sampling(ratio, generators=generators))
place = nearest_sampled(looks[0.25].sample, query[0] * w + query[1])
for ratio, look in looks.items():
    display(show_attention(image, look, blocks, place))

# %%
kept = {ratio: set(look.sample.keep[0].tolist()) for ratio, look in looks.items()}
check("each sample lies in the next", kept[0.25] < kept[0.5] < kept[1.0], "one seed, one order")
n = {ratio: look[blocks[0]].shape[-1] for ratio, look in looks.items()}
print(f"K x K numbers a head for K = {list(n.values())}; a quarter of the tokens leaves")
print(f"{n[0.25] ** 2 / n[1.0] ** 2:.3f} of the comparisons")

# %% [markdown]
# What would have gone to the missing tokens goes to the rest. Compare a block at the three ratios:
# where a bright token is still there, it is often bright again; where it is gone, another takes
# over (exercise 3).
#
# ### The decoder sees every place
#
# At unsampled places the decoder of `tiny` finds the mask token, one learned vector for all of
# them, and that of the released ViT-B the stem's own tokens (`mimdet/models/vit.py`). So any place
# may be the query there, sampled or not. Does it matter to the decoder which tokens come from the
# encoder?

# %%
quarter = looks[0.25]
unseen = next(p for p in range(h * w) if p not in kept[0.25] and p // w == h // 2)
display(show_attention(image, quarter, decoder_blocks, unseen, heads=True))
encoded = torch.zeros(h * w, dtype=torch.bool)
encoded[quarter.sample.keep[0]] = True
for name in decoder_blocks:
    for head, a in enumerate(quarter[name][0]):
        to = a[:, encoded].sum(1)  # share that goes to tokens from the encoder
        ends = to[encoded].mean(), to[~encoded].mean()
        print(f"decoder block {name.split('.')[3]} head {head}: %.2f, %.2f" % ends)
print(f"to encoded tokens: from encoded ones, from others; equal shares {encoded.float().mean():.2f}")

# %%
c4 = []
with torch.no_grad():
    for each in (image, image.flip(2)):  # the picture, and the same mirrored
        sampling = mimdet.Sampling(sample=quarter.sample)
        c4.append(model.features(model.batch([each]), sampling)["c4"][0].flatten(1))  # (C, L)
changed = (c4[0] - c4[1]).norm(dim=0) / c4[0].norm(dim=0)
ends = changed[encoded].mean(), changed[~encoded].mean()
print("another picture moves c4 by %.3f at sampled places, by %.3f at the others" % ends)

# %% [markdown]
# It does not, in quick mode, and that is a result against the story: the places in between ask only
# each other, and what becomes of the mask token there is the same for every picture. A masked
# autoencoder's decoder paints what is missing (notebook 01); this one has not learnt to. What the
# encoder says reaches c4 at the sampled places alone. So c4 holds two kinds of place, which is worth
# remembering when the ratio of evaluation is not that of training: at ratio 1 there is only one
# kind. The picture above shows a query that was not sampled.
#
# ## 5 · When the transformer matters, and when not
#
# A map shows what is mixed with what. It does not show that anything depends on it. To learn that,
# *exchange* what the encoder returns, and see what is lost: here every token becomes the mean of
# all of them, so that no one says anything about its place.

# %%
from mimdet.analysis.reliance import altered
from mimdet.viz import show_detections

picture = pictures.images[min(2, len(pictures.images) - 1)]
found = [mimdet.predict(model, picture)]
with altered(model, "encoder", "mean"):
    found.append(mimdet.predict(model, picture))
show_detections([picture] * 2, found, None, pictures.categories, score_threshold=0.5)

# %% [markdown]
# Left the detector as it is, right with the mean: the largest things are gone. The AP on 200
# held-out scenes, by size of object (`mimdet.reliance`): first of `tiny`, then of an earlier
# detector, trained on the same scenes, with two decoder blocks and the fill of version 2, the
# stem's tokens at unsampled places.

# %%
from mimdet.files import read_json
from mimdet.viz import show_reliance
from pandas import DataFrame

ways = ["one token", "25 % of tokens", "all tokens", "encoder: zero", "encoder: mean"]
ap = {}
for which in ("tiny", "first_tiny"):
    stored = read_json(f"results/reliance_{which}.json")
    ap[which] = DataFrame.from_dict(stored["box_ap"], orient="index").loc[ways]
    display(show_reliance(ap[which]))

# %%
for which, table in ap.items():
    lost = table.loc["all tokens"] - table  # a row a way
    spared = lost.AP_small.abs().max() < 5
    check(f"{which}: small objects hardly need it", spared, "they live on the stem's c2 and c3")
    large = lost.loc["encoder: mean"].AP_large
    check(f"{which}: it listens to its encoder", large > 10, f"{-large:+.1f} AP of large objects")
one = {which: table.loc["one token"] - table.loc["all tokens"] for which, table in ap.items()}
gain = {which: float(change.AP_large) for which, change in one.items()}
check("tiny needs it", gain["tiny"] < -10, f"with one token {gain['tiny']:+.1f} AP of large ones")
check("the earlier one did not", gain["first_tiny"] > -1, f"{gain['first_tiny']:+.1f} AP")

# %% [markdown]
# Small objects of these scenes need no transformer. With the mean few of the large ones are found, by either
# detector: both *listen* to their encoder. Whether they *need* it is seen with fewer tokens. One
# token is as good as all to the earlier detector: at the other places its decoder had the stem's
# tokens, and these did as well. `tiny` has nothing else there, and loses what it loses without any
# (`zero`): its transformer is worth 11 AP, and 18 of large objects. That is for 12 drawn shapes; what
# ViT-B on COCO would lose, nobody has measured here.
#
# It is *where* rather than *what*, as section 3 has shown. A linear classifier tells the class of
# an object from the encoder's tokens less often than from the stem's, which went into it:

# %%
told = read_json("results/reliance_tiny.json")["probe"]  # `mimdet.linear_probe`
told = {at: accuracy["these weights"] for at, accuracy in told.items()}
for at, accuracy in told.items():
    print(f"class told from tokens of {at:8} {accuracy:.0f} % of the objects")
check("the encoder adds nothing to that", told["encoder"] < told["stem"])

# %% [markdown]
# ## 6 · No windows
#
# At 1024 pixels an image has 4,096 tokens, where a MAE's encoder sees 49 in pre-training. Comparing
# all with all is expensive, so other detectors on plain ViTs let most blocks look inside windows
# only. MIMDet keeps the attention global and has fewer tokens. In comparisons of one head:

# %%
length = (1024 // 16) ** 2
costs = {"all with all": length**2, "windows of 16 x 16": length * 16**2}
costs |= {f"all with all, ratio {r}": int(r * length) ** 2 for r in (0.5, 0.25)}
for way, pairs in costs.items():
    print(f"{way:24} {pairs / 1e6:6.2f} million")
equal = costs["windows of 16 x 16"] == costs["all with all, ratio 0.25"]
check("a window and a quarter cost the same", equal, "and a quarter still looks across the image")

# %% [markdown]
# A window of 16 × 16 is a sixteenth of that grid. How much of what our encoder looks at lies in the
# query's own sixteenth of the picture? Windows would throw away the rest.

# %%
window = places // w // -(-h // 4) * 4 + places % w // -(-w // 4)  # 4 x 4 windows
inside = window[:, None] == window  # (L, L)
full = looks[1.0]
held = torch.stack([(full[name][0] * inside).sum(2).mean(1) for name in blocks])  # (blocks, heads)
print("share that a window would keep, a row a block, a column a head")
for row in held.tolist():
    print("   ".join(f"{share:.2f}" for share in row))
print(f"equal shares: {inside.float().mean():.2f}")
check("global heads", held.min() < 0.5, "at least one head looks mostly outside of its window")

# %% [markdown]
# That is no proof that windows are bad: a model that is trained with them learns to live with them.
# It says that *these* weights, which learnt to look anywhere, could not simply be used with
# windows.
#
# ## 7 · What the maps cost
#
# A map has N² numbers a head and block. All of them together, in float32, for a ViT-B encoder (12
# blocks of 12 heads) and the decoder of MIMDet (4 blocks of 16 heads, always on all tokens):

# %%
mib = 4 / 2**20  # bytes of a number, in MiB
print("pixels  ratio  encoder's maps  one query of them  decoder's maps   MiB")
for pixels in (512, 1024):
    length = (pixels // 16) ** 2
    for ratio in (0.25, 0.5, 1.0):
        count = int(ratio * length)
        maps, one = 12 * 12 * count**2 * mib, 12 * 12 * count * mib
        decoder = 4 * 16 * length**2 * mib
        print(f"{pixels:6} {ratio:6} {maps:15,.0f} {one:18.2f} {decoder:15,.0f}")
check("9 GiB at 1024 pixels", maps == 9 * 1024, "19 times the weights of MIMDet ViT-B")

# %% [markdown]
# So `record` refuses more than 1 GiB unless you say `whole=True`, and offers `query=`: the row of
# one query only, N times less.

# %%
with mimdet.record(model, *blocks, query=place) as row_only:
    generators = [torch.Generator().manual_seed(SEED)]
    model.detect([image], sampling=mimdet.Sampling(0.25, generators=generators))
numbers = {"whole": sum(quarter[b].numel() for b in blocks)}
numbers["row"] = sum(row_only[b].numel() for b in blocks)
print(numbers)
check("N times less", numbers["whole"] == n[0.25] * numbers["row"])
rows = [torch.equal(row_only.row(b, place), quarter.row(b, place)) for b in blocks]
check("the same numbers", all(rows), "one row needs no other row")

# %% [markdown]
# ## 8 · Rollout: through all blocks
#
# After the first block a token is already a mixture, so the second block's map says what it takes
# from *mixtures*. *Rollout* (Abnar and Zuidema, 2020) follows them back to the image: with $A_b$
# the mean of the heads of block *b*, and half of every token passed on unchanged by the residual
# connection,
#
# $$ R_b = \left(\tfrac12 A_b + \tfrac12 I\right) R_{b-1}, \qquad R_0 = I . $$

# %%
from mimdet.viz import rollout, show_rollout

show_rollout(image, looks[1.0], blocks, place)

# %%
total = rollout([looks[1.0][name][0] for name in blocks])
check("rows sum to 1", (total.sum(1) - 1).abs().max() < 1e-4, "every token is made of the inputs")
stays = total.diagonal().min() >= 0.5 ** len(blocks)
check("something of itself stays", stays, f"half of it in each of {len(blocks)} blocks")

# %% [markdown]
# Read it as a sketch. Rollout ignores the values, the MLPs and what a head does with what it takes,
# and "one half" is a convention. It answers "which inputs *could* have mattered", not "which did".
#
# ## 9 · Explore
#
# Click a patch of either picture, or walk with the arrow keys. Part, block, head, rollout, ratio
# and seed do what the sections above did. Click a grey token in the encoder, then switch to the
# decoder. In quick mode click after click may name the same brightest place: that is what *differs*
# of section 3 has measured.

# %%
from mimdet.viz import AttentionExplorer

device = "cuda" if MODE == "full" and torch.cuda.is_available() else "cpu"
AttentionExplorer(model.to(device), [image, *images])

# %% [markdown]
# ## Summary
#
# - Attention is a row of shares for every token and head; `mimdet.record` keeps it, exactly.
# - Fused kernels never form it: a hook alone is silent. Recording changes results by rounding only.
# - The encoder attends among the sampled tokens, K × K; the decoder on the full grid.
# - Keeping a quarter of the tokens costs what windows cost, and attention stays global.
# - Maps grow with N²: record one query, or one block, of a large model.
# - Look at many queries, and at numbers, before believing a picture. Whether a detector *needs*
#   what it mixes is another question: exchange it, and measure (`mimdet.reliance`).
#
# ## Exercises
#
# 1. A ViT-L encoder has 24 blocks of 16 heads. How many GiB are its maps for an image of 1024 ×
#    1024 pixels at ratio 0.5 in float16? Would `record` allow it?
# 2. The order of `sample.keep` is arbitrary. What happens to the attention when it is reversed?
#    Guess, then try it.
# 3. Find the place that gets most of the attention in the encoder's last block, in `looks[0.25]`.
#    Take it out of the sample and look again: does another token take over its role?
# 4. `tiny` ended its training with all tokens, `tiny_half` never saw more than half. Which of them
#    looks at fewer tokens in the encoder's last block, when all are there?
# 5. A masked autoencoder has a class token before all others. How much attention goes to it?

# %%
mine = {1: ..., 3: ..., 4: ...}  # GiB, a place, "tiny" or "tiny_half"; then run the next cell too

# %% tags=["judge"]
judge(1, mine[1], 24 * 16 * (4096 // 2) ** 2 * 2 / 2**30)
received = quarter[blocks[-1]][0].mean(0).mean(0)  # (K,), of all queries and heads
judge(3, mine[3], int(quarter.sample.keep[0][received.argmax()]))
looked_at = {}
for which in ("tiny", "tiny_half"):
    other = mimdet.load_detector(which)
    with mimdet.record(other, "backbone.encoder.blocks.*.attn") as seen:
        other.detect([other.resize(images[0])], sampling=mimdet.Sampling(1.0))
    maps = torch.cat([seen[b] for b in seen])  # (blocks, heads, N, N)
    looked_at[which] = (-(maps * maps.clamp_min(1e-12).log()).sum(3)).exp().mean(dim=(1, 2))
last = {which: float(counts[-1]) for which, counts in looked_at.items()}
judge(4, mine[4], min(last, key=last.get))

# %% tags=["solution"]
# 1. Half of 4096 tokens; 2 bytes a number.
maps = 24 * 16 * 2048**2 * 2 / 2**30
check("3 GiB", maps == 3, "more than the 1 GiB that `record` allows without whole=True")

# %% tags=["solution"]
# 2. Rows and columns are reversed, the numbers stay: attention knows no order, positions do.
backwards = mimdet.Sample([quarter.sample.keep[0].flip(0)], quarter.grid)
with mimdet.record(model, blocks[-1]) as reversed_:
    model.detect([image], sample=backwards)
moved = reversed_[blocks[-1]].flip(2).flip(3)
check("the same, in another order", (moved - quarter[blocks[-1]]).abs().max() < 1e-4)

# %% tags=["solution"]
# 3. Usually yes: the new favourite's share grows.
favourite = int(received.argmax())
rest = torch.cat([quarter.sample.keep[0][:favourite], quarter.sample.keep[0][favourite + 1 :]])
with mimdet.record(model, blocks[-1]) as without:
    model.detect([image], sample=mimdet.Sample([rest], quarter.grid))
again = without[blocks[-1]][0].mean(0).mean(0)
second = received.sort().values[-2]
print(f"favourite {received.max():.3f}; next {second:.3f}; without the favourite {again.max():.3f}")
check("one token fewer", len(again) == len(received) - 1)
check("its attention went elsewhere", abs(float(again.sum()) - 1) < 1e-4, "shares sum to 1 again")

# %% tags=["solution"]
# 4. Fewer tokens means more selective heads.
for which, counts in looked_at.items():
    print(f"{which:13} tokens looked at, by block:", counts.round().int().tolist())
check("they differ", abs(last["tiny"] - last["tiny_half"]) > 1, "in the last block")

# %% tags=["solution"]
# 5. Row 0 and column 0 of every map belong to it; `row` leaves it out, so those rows sum to less.
from mimdet.models.rcnn import pad_and_normalise
from mimdet.notebook import open_mae

mae = open_mae(MODE)
inputs = pad_and_normalise([image], mae).tensors
with torch.no_grad(), mimdet.record(mae, "blocks.*.attn") as seen:
    mae(inputs, ratio=0.25, generators=[torch.Generator().manual_seed(SEED)])
first = int(seen.sample.keep[0][0])
for b in seen:
    to_class = seen[b][0, :, 1:, 0].mean()
    print(f"{b}: {to_class:.3f} to the class token, equal shares {1 / seen[b].shape[-1]:.3f}")
check("the rest of the row", seen.row(b, first).sum(1).max() < 1, "what is missing went to it")
