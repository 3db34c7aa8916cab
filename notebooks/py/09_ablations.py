# %% [markdown]
# # 09 · Ablations: a question, a grid, an answer with an error bar
#
# Does a detector train on a quarter of the tokens? One training of each kind does not answer
# that: another seed gives another score, and the difference may be luck. **Afterwards
# you can** read a finished experiment, compute its error bars by hand, run, interrupt and
# continue a grid of your own, and say where the paper's claims can be measured.
#
# | | quick (`MODE = "quick"`) | full (`MODE = "full"`) |
# |---|---|---|
# | study | an hour, after 07, 08 | |
# | what you see | a stored matrix of training and evaluation ratios; a grid of four trainings of seconds | the same grid with MIMDet ViT-B on COCO |
# | time | about a minute on two CPU cores | days: four trainings, from Meta's autoencoder, of `STEPS` or the paper's 67,500 steps |
# | memory, disk | 1 GB a process | as one training; 16 GB |
# | needs | nothing but the kit | GPUs, and COCO 2017 in the folder named by `MIMDET_COCO` |

# %% tags=["parameters"]
MODE = "quick"  # "full": COCO and GPUs
STEPS = 0  # of each training of section 4; 0: 30, in full mode the whole recipe
SEED = 0  # the first of the seeds
SOLUTIONS = False  # True: the answers at the end run too

# %%
import mimdet
from mimdet import check, notebook_setup
from mimdet.experiments.results import Experiment

cfg = notebook_setup(MODE, steps=STEPS or (30 if MODE == "quick" else 0), seed=SEED)

# %% [markdown]
# ## 1 · The paper's first observation, measured again
#
# The paper trains with a random 25 % or 50 % of the tokens and evaluates with all of them: 49.9 and
# 51.5 box AP with ViT-B on COCO (arXiv version 1; full-size numbers, evaluated at ratio 1). It says
# that more tokens in the evaluation than in the training help, but not by how much at other ratios.
#
# The experiment below is the whole matrix, small: the preset `tiny` on `shapes-v1-medium`, from
# random weights, trained for 500 steps with all, 50 % and 25 % of the tokens, with three seeds, and
# every training evaluated with 25 % to 100 %. Its configuration was fixed before anybody looked at
# a result (`notebooks/ablations/sample_ratio.py`).

# %%
from mimdet.viz import show_arms, show_learning_curves, show_matrix

stored = Experiment.from_json("results/claims/sample_ratio.json")
print(stored.command, "|", stored.about["hardware"])
show_matrix(stored)

# %% [markdown]
# A row is a training, a column an evaluation. Two things to look for: does training on fewer tokens
# cost something (down the last column), and do more tokens in the evaluation help (along a row)?
# Here half of the tokens cost about one AP and a quarter costs three. And along a row **each
# training is best near the ratio at which it was trained**: the one on a quarter loses two AP when
# it sees everything, where the paper's models gain. What follows the encoder has learnt to read a
# c4 with gaps, and nobody ever showed it one without. A few last steps with all tokens mend that
# (`training.whole_at_end`; `tiny` beside `tiny_half` in notebook 08, section 6). And look at the ±
# before you believe anything: it is the half width of a 95 % interval, and a few seeds make wide
# ones.

# %%
from IPython.display import Markdown

Markdown(stored.markdown(["box_ap"]))

# %%
full = {arm.values["backbone.sample_ratio"]: stored.scores(arm.label, 1.0) for arm in stored.arms}
for ratio, scores in full.items():
    print(f"trained at {ratio}: " + ", ".join(f"{score:.1f}" for score in scores.values()))
same = all(set(scores) == set(stored.seeds) for scores in full.values())
check("every arm has every seed", same, "else a difference compares apples with oranges")
cells = len(stored.arms) * len(stored.ratios) * len(stored.seeds)
check(f"{cells} evaluations", len(stored.table) == cells, "none is missing, none counted twice")

# %% [markdown]
# ## 2 · Why the seeds are paired
#
# Run *k* of every arm has seed *k*: the same initial weights, the same scenes in the same order.
# Some seeds are lucky for all arms. Subtracting within a seed removes that luck, so the interval
# of the *difference* is often narrower than the intervals of the two means would suggest.
#
# By hand: $\bar d \pm t_{0.975,\,n-1}\, s_d / \sqrt n$. With three seeds $t$ is 4.30, with two it
# is 12.7: a third seed is worth a lot.

# %%
import math

first, last = stored.arms[0], stored.arms[-1]
pairs = [
    stored.scores(last.label, 1.0)[seed] - stored.scores(first.label, 1.0)[seed]
    for seed in stored.seeds
]
mean = sum(pairs) / len(pairs)
sd = math.sqrt(sum((pair - mean) ** 2 for pair in pairs) / (len(pairs) - 1))
t = {2: 12.7062, 3: 4.3027, 4: 3.1824, 5: 2.7764}[len(pairs)]  # of Student, 97.5 %
half = t * sd / math.sqrt(len(pairs))
print(f"{last.label} - {first.label}: {mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]")
library = stored.difference((last.label, 1.0), (first.label, 1.0))
close = math.isclose(library.low, mean - half, abs_tol=1e-3)
check("the library's interval is this one", close, "you can trust, or repeat, what it prints")
show_arms(stored)

# %% [markdown]
# On the right, an interval that reaches across 0 says: with these seeds the direction is not known.
# It does **not** say that the arms are equal.
#
# ## 3 · What a point costs
#
# A training on a quarter of the tokens is not four times cheaper: stem, decoder, neck and heads
# never lose a token. Count before you measure (`mimdet/analysis/cost.py`): one image forward, for
# the tiny detector and for ViT-B at 800 x 1280 pixels.

# %%
from mimdet.analysis.cost import cost_of

rows = []
for make, size in ((mimdet.presets.tiny, (256, 256)), (mimdet.presets.mimdet_base, (800, 1280))):
    whole = cost_of(make(), size, 1.0)
    for ratio in (0.25, 0.5, 1.0):
        cost = cost_of(make(), size, ratio)
        share = cost.backbone_and_neck / whole.backbone_and_neck, cost.detector / whole.detector
        rows.append((cost.name, ratio, *share))
        print(f"{cost.name:12} ratio {ratio:4}: backbone {share[0]:.2f}, all {share[1]:.2f}")
falls = all(a[3] < b[3] for a, b in zip(rows, rows[1:]) if a[0] == b[0])
check("fewer tokens cost less", falls, "but the heads are a floor that sampling does not lower")

# %% [markdown]
# So AP against epochs flatters nobody, and AP against work is the honest axis for a cheap method.
# The same evaluations, against both:

# %%
from IPython.display import display

for axis in ("epoch", "flops"):
    display(show_learning_curves(stored, axis, training_loss=False))

# %% [markdown]
# ## 4 · Your own grid
#
# Does the fill decide whether a detector uses its encoder? A base configuration, a grid of fields,
# seeds; evaluated with one token, a quarter and all of them. Every run is a child process with a
# directory of its own. Arms are named by what differs; others are compared with the first one.

# %%
base = cfg
base.data.shapes_val = 16
grid = {"backbone.decoder_fill": ["stem", "mask_token"]}  # version 2 and version 1 of the paper
ratios = (1e-4, 0.25, 1.0)  # the first one is a single token
result = mimdet.experiment(base, grid, seeds=2, name="fill", evaluate_ratios=ratios, draws=1)

# %%
columns = ["decoder_fill", "evaluate_ratio", "mean", "difference", "n"]
summary = result.summary().rename(columns={"backbone.decoder_fill": "decoder_fill"})
print(summary[columns].round(2).to_string(index=False))
seeds = summary["n"].tolist()
check("two seeds an arm", seeds == [2] * len(seeds), "one number has no error bar")
directories = sorted(path.name for path in result.folder.glob("*-s*"))
print("\n".join(directories))

# %% [markdown]
# In quick mode these trainings last seconds and the scores mean nothing. The machinery is what you
# see: the same call with `STEPS` in the hundreds is an experiment. What 500 steps make of either
# fill, with three seeds (`notebooks/ablations/fills.py`, trained with half of the tokens):

# %%
from mimdet.experiments.results import mean_interval

fills, rises = Experiment.from_json("results/claims/fills.json"), {}
for fill in ("stem", "mask_token"):
    arm = f"decoder_fill={fill},sample_ratio=0.5"
    for ratio in (0.004, 0.25, 0.5, 1.0):  # the first one is a single token of 256
        ap = mean_interval([*fills.scores(arm, ratio).values()])
        print(f"{fill:10} evaluated at {ratio:5}: {ap.mean:.1f} ± {ap.sd:.1f} box AP")
    rises[fill] = fills.difference((arm, 1.0), (arm, 0.004))
    print(f"{fill:10} all tokens - one: {rises[fill].mean:+.1f}")
check("the mask token's AP rises", rises["mask_token"].low > 0, "with each seed")
check("the stem's does not", rises["stem"].high < 1, "its encoder is idle")

# %% [markdown]
# With the stem's tokens in the gaps, one token gives as much as all: the encoder is bypassed. With
# the mask token the decoder knows of a place only what the encoder has seen, and AP rises with the
# tokens. At all tokens **the two have the same AP**: a score does not tell which part of a model it
# comes from. And nothing follows for `mimdet_base`: the paper reports version 2's fill as the
# slightly better one (51.7 and 51.5 box AP).
#
# **Stop it, continue it, add to it.** Press ■ while it runs: all runs save. Run the cell again and
# each continues from its last step; a complete run is skipped. So asking for a third seed later
# trains only what is new:

# %%
from mimdet.experiments.runs import plan

planned = plan(base, grid, 3, name="fill", evaluate_ratios=ratios, draws=1)
missing = [run for run in planned if not run.complete()]
print("\n".join(run.name for run in missing))
check("four of six are there already", len(planned) - len(missing) == 4)
check("what is left has the new seed", {run.seed for run in missing} == {SEED + 2})

# %% [markdown]
# ## 5 · The paper's claims and where to measure them
#
# | claim | smallest experiment here | notebook, file |
# |---|---|---|
# | an encoder trains on 25-50 % of the tokens | section 1 of this notebook | `notebooks/ablations/sample_ratio.py` |
# | a higher ratio in evaluation than in training helps | the same matrix, along its rows | the same |
# | sampling makes training cheaper | section 3; measured times | `02_token_sampling` |
# | a random convolutional stem can replace the patchify stem | `{"backbone.stem": ["conv", "patch"]}` | `03_conv_stem_features` |
# | the pre-trained decoder belongs to the recipe | `{"backbone.decoder_depth": [0, 1, 2]}` | `04_backbone_walkthrough` |
# | features at unsampled places beat MAE's mask token | section 4 with more steps | `notebooks/ablations/fills.py` |
# | a masked autoencoder is a good start | `{"training.init_from": ["", "tiny_mae"]}` | `01_mae_loading` |
# | it beats hierarchical backbones | `{"preset": ["tiny", "tiny_swin", ...]}`, below | `notebooks/ablations/backbones.py` |
#
# Every baseline has a `tiny_*` sister with the same neck, heads and data, so that such a comparison
# compares backbones (ViTDet brings its own neck, and needs a lower learning rate). A grid's field
# `preset` takes their names. Count them first:

# %%
from mimdet.analysis.cost import cost_table
from mimdet import presets

names = [name for name in presets.PRESETS if name.startswith("tiny")]
sisters = [cost_of(presets.PRESETS[name](), (256, 256)) for name in names]
print(cost_table(sisters))
sizes = [cost.parameters for cost in sisters]
check("within a fifth of each other", max(sizes) < 1.2 * min(sizes), "else size is compared")

# %% [markdown]
# **A result against the story.** In the scenes of `shapes-v2-context` many classes are told apart only
# by something far away, such as the colour of a lamp in a corner. There a detector must need its
# transformer. How many AP does it lose, trained and evaluated with c4 = 0: guess, then look.

# %%
context = Experiment.from_json("results/claims/context.json")
paper, silenced, taught = [(arm.label, 1.0) for arm in context.arms]
worth = {}
for name, arm in {"trained as the paper trains": paper, "c4 taught first": taught}.items():
    worth[name] = context.difference(arm, silenced)
    print(f"{name:28} c4 is worth {worth[name].mean:+.1f} box AP, {worth[name].n} seeds")
interval = worth["c4 taught first"]
print(f"95 % interval of the second: [{interval.low:+.1f}, {interval.high:+.1f}]")
check("taught first, c4 is needed", interval.low > 0, "with these seeds the direction is known")

# %% [markdown]
# The first number was a disappointment: the lamp's colour stayed a guess, although the backbone
# alone learns it from 400 scenes. Nothing in the heads' losses asked c4 for it before the stem had
# won. Two fields do: in the first batches (`training.c4_first`) the backbone alone is trained by a
# loss in which c4 tells the classes, then that loss stays beside the others (`detector.c4_loss`). So
# where a result denies your story, ask first what the model could know, then what its losses ask of
# it. Nothing follows for ViT-B on COCO: 51.7 box AP for MIMDet and 49.2 for Swin-B there, says the
# paper, after the same 36 epochs.
#
# ## Summary
#
# - A score without seeds is an anecdote; use three paired seeds at least.
# - An interval across 0 means *not known*, not *equal*.
# - Count the cost beside the score: heads and decoder are a floor.
# - A grid is a value: fields, seeds, a name. It is resumed, extended and repeated by the same call.
# - `mimdet ablate FILE.py` runs the same from a terminal, and writes table, figures and json.
#
# ## Exercises
#
# 1. How many seeds would bring the half width of the interval in section 2 below one point, if the
#    standard deviation of the pairs stays what it is? Guess, then compute.
# 2. Which ratio of evaluation is in the cell of the matrix with the highest mean? Is it
#    distinguishable from the best of its neighbours in the same row: "yes" or "no"?
# 3. Write the grid of an experiment that compares one, two and four encoder blocks at two sample
#    ratios. How many runs is that with three seeds? Let `plan` count.

# %%
mine = {1: ..., 2: ..., 3: ...}  # a number; (a ratio, a word); your grid

# %% tags=["judge"]
from mimdet import judge
from mimdet.experiments.results import t_quantile

halves = {n: t_quantile(n - 1) * sd / math.sqrt(n) for n in range(2, 200)}
judge(1, mine[1], next((n for n, value in halves.items() if value < 1), 200))
cells = stored.summary().sort_values("mean", ascending=False)
row = cells[cells["arm"] == cells.iloc[0]["arm"]]
first, second = ((row.iloc[i]["arm"], row.iloc[i]["evaluate_ratio"]) for i in (0, 1))
gap = stored.difference(first, second)
judge(2, mine[2], (float(first[1]), "yes" if gap.low > 0 else "no"))


def six_arms(grid):
    runs = [run.cfg.backbone for run in plan(base, grid, seeds=3, name="depth")]
    arms = {(backbone.depth, backbone.sample_ratio) for backbone in runs}
    return len(runs) == 18 and len(arms) == 6 and {depth for depth, _ in arms} == {1, 2, 4}


judge(3, mine[3], six_arms)

# %% tags=["solution"]
# 1. half = t(n - 1) * sd / sqrt(n); t falls to 1.96, so try n = 2, 3, 4, ...
enough = next((n for n, value in halves.items() if value < 1), None)
print(f"sd of the pairs {sd:.2f}: {enough} seeds")
same = math.isclose(halves[len(pairs)], half, rel_tol=1e-3)
check(f"{len(pairs)} seeds give the interval above", same)

# %% tags=["solution"]
# 2. The best cell, and its paired difference to the next best in its row.
print(f"{first[0]} at {first[1]}: {cells.iloc[0]['mean']:.1f}; gap {gap.mean:.2f}")
check("the interval holds its mean", gap.low <= gap.mean <= gap.high)
print("distinguishable" if gap.low > 0 else "not distinguishable with these seeds")

# %% tags=["solution"]
# 3. All combinations: 3 depths x 2 ratios x 3 seeds.
two = {"backbone.depth": [1, 2, 4], "backbone.sample_ratio": [0.25, 0.5]}
runs = plan(base, two, seeds=3, name="depth")
check("18 runs of 6 arms", (len(runs), len({run.arm.label for run in runs})) == (18, 6))
