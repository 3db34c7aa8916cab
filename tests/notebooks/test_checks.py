"""The sanity checks of the notebooks notice what they speak about."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mimdet
from mimdet import notebook
from mimdet.models import detector, rcnn, sampling, vit, weights
from tests.notebooks import can_fail
from tools import notebooks

CAN_FAIL = {
    "a number": "x = 2.5\ncheck('', abs(x - 2.5) < 1e-6)",
    "a comparison by name": "same = torch.equal(t, t.clone())\ncheck('', same)",
    "a chain": "a = len(t)\ncheck('', 0 < a < 10)",
    "a list that was filled": "a = []\nfor i in (1, 2): a.append(i)\ncheck('', a == [1, 2])",
    "a flag": "try:\n    int('x')\n    a = False\nexcept ValueError:\n    a = True\ncheck('', a)",
    "a condition in a loop": "for i in (1, 2):\n    off = t.sum() * i\n    check('', off < 10)",
    "an attribute": "check('', not t.requires_grad)",
    "the same again": "a = t.sum()\nb = t.sum()\ncheck('', a == b)",
}
VACUOUS = {
    "a literal": "check('', True)",
    "a name for a literal": "ok = True\ncheck('', ok)",
    "a flag that is never down": "ok = True\nif len(t):\n    ok = True\ncheck('', ok)",
    "a thing and itself": "same = t.sum() == t.sum()\ncheck('', same)",
    "a length is never negative": "check('', len(t) >= 0)",
    "nor is a distance": "off = float((t - 1).abs().max())\ncheck('', off >= 0)",
    "one of two operands": "check('', len(t) == 3 and len(t) >= 0)",
    "or something true": "check('', len(t) == 3 or True)",
}


@pytest.mark.parametrize("case", [*CAN_FAIL, *VACUOUS])
def test_conditions_that_cannot_fail_are_found(case: str) -> None:
    ((_, wrong),) = can_fail.checks_of((CAN_FAIL | VACUOUS)[case]).values()
    assert bool(wrong) == (case in VACUOUS)


SMALL = """\
# %% tags=["parameters"]
MODE = "quick"

# %%
from mimdet import check

check("a word of five letters", len(MODE) == 5)
check("always", len(MODE) >= 0)
if MODE == "full":
    check("elsewhere", len(MODE) == 4)
"""


def test_a_notebook_is_told_which_of_its_checks_are_vacuous(tmp_path: Path) -> None:
    notebook = notebooks.read_source(can_fail.write_source(tmp_path, "00_small", SMALL))
    can_fail.add_to(notebook)
    notebooks.execute(notebook, tmp_path)
    always, elsewhere = can_fail.vacuous(notebook)
    assert "'always': nothing makes it false: len(MODE) >= 0" in always
    assert "'elsewhere': never ran" in elsewhere


# ------------------------------------------------------------------------- with a broken library


def change(patch: pytest.MonkeyPatch, owner: Any, name: str, spoil: Callable[[Any], Any]) -> None:
    """What a function of the library returns, spoilt."""
    right = getattr(owner, name)
    patch.setattr(owner, name, lambda *given, **options: spoil(right(*given, **options)))


def keep_the_lowest(patch: pytest.MonkeyPatch) -> None:
    right = mimdet.select
    patch.setattr(
        mimdet, "select", lambda scores, *rest, **kw: right([-s for s in scores], *rest, **kw)
    )


def keep_one_less(patch: pytest.MonkeyPatch) -> None:
    def shorten(sample: sampling.Sample) -> sampling.Sample:
        return sample._replace(keep=[kept[:-1] for kept in sample.keep])

    change(patch, mimdet, "select", shorten)


def blocks_are_single_tokens(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sampling.SAMPLERS, "block", sampling.random_sampler)


def scatter_in_another_order(patch: pytest.MonkeyPatch) -> None:
    right = sampling.scatter
    patch.setattr(
        sampling, "scatter", lambda kept, *rest: right([rows.flip(0) for rows in kept], *rest)
    )


def gather_in_another_order(patch: pytest.MonkeyPatch) -> None:
    change(patch, sampling, "gather", lambda images: [rows.roll(1, 0) for rows in images])


def ratio_1_depends_on_the_seed(patch: pytest.MonkeyPatch) -> None:
    right = mimdet.predict

    def predict(*given: Any, seed: int = 0, sample_ratio: float = 1.0, **options: Any) -> Any:
        found = right(*given, seed=seed, sample_ratio=sample_ratio, **options)
        if sample_ratio == 1:
            found.boxes += seed
        return found

    patch.setattr(mimdet, "predict", predict)


def padding_is_black(patch: pytest.MonkeyPatch) -> None:
    def blacken(batch: rcnn.Batch) -> rcnn.Batch:
        for canvas, (height, width) in zip(batch.tensors, batch.image_sizes, strict=True):
            canvas[:, height:], canvas[:, :, width:] = -2, -2  # about what black becomes
        return batch

    change(patch, detector, "pad_and_normalise", blacken)


def columns_for_rows(patch: pytest.MonkeyPatch) -> None:
    right = vit.sincos_table

    def table(width: int, side: int) -> torch.Tensor:
        cells = right(width, side)[:, 1:].unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2)
        return torch.cat([torch.zeros(1, 1, width), cells], dim=1)

    patch.setattr(vit, "sincos_table", table)


def positions_are_shifted(patch: pytest.MonkeyPatch) -> None:
    change(patch, vit, "resize_table", lambda table: table.roll(1, 1))


def attention_has_another_scale(patch: pytest.MonkeyPatch) -> None:
    def rescale(model: Any) -> Any:
        model.backbone.decoder.blocks[0].attn.scale *= 2
        return model

    change(patch, notebook, "open_detector", rescale)


def names_get_lost(patch: pytest.MonkeyPatch) -> None:
    right = weights.translate

    def translate(name: str, *rest: Any, back: bool = False) -> Any:
        found = right(name, *rest, back=back)
        return found.replace("norm1", "norm2") if back and found else found

    patch.setattr(weights, "translate", translate)


def a_refused_file_leaves_traces(patch: pytest.MonkeyPatch) -> None:
    right = mimdet.load_mae

    def load(model: Any, path: str, **options: Any) -> Any:
        if not path.endswith("/mae.pth"):
            with torch.no_grad():
                model.backbone.encoder.norm.weight += 1
        return right(model, path, **options)

    patch.setattr(mimdet, "load_mae", load)


SABOTAGE = [
    ("02_token_sampling", keep_one_less, "of 256 tokens"),
    ("02_token_sampling", keep_the_lowest, "the kept ones have the highest scores"),
    ("02_token_sampling", blocks_are_single_tokens, "block keeps whole squares"),
    ("02_token_sampling", scatter_in_another_order, "scatter is un-shuffle"),
    ("02_token_sampling", gather_in_another_order, "every kept token is back at its place"),
    ("02_token_sampling", ratio_1_depends_on_the_seed, "at ratio 1 nothing is drawn"),
    ("04_backbone_walkthrough", padding_is_black, "on a canvas of"),
    ("04_backbone_walkthrough", columns_for_rows, "row 5, column 3"),
    ("04_backbone_walkthrough", positions_are_shifted, "table of 16 x 16 on a grid"),
    ("05_attention", attention_has_another_scale, "recorded attention is the formula"),
    ("01_mae_loading", names_get_lost, "names come back unchanged"),
    ("01_mae_loading", a_refused_file_leaves_traces, "the model is as it was"),
]


@pytest.mark.parametrize(("stem", "sabotage", "text"), SABOTAGE)
def test_a_broken_library_is_noticed(
    stem: str,
    sabotage: Callable[[pytest.MonkeyPatch], None],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Cells of the notebook run until a check fails, and it is the one meant for this fault."""
    monkeypatch.chdir(tmp_path)
    source = notebooks.FOLDER / "py" / f"{stem}.py"
    cells = [cell for cell in notebooks.read_source(source).cells if cell.cell_type == "code"]
    sabotage(monkeypatch)
    namespace: dict[str, Any] = {}
    with pytest.raises(AssertionError, match=f"✗ .*{text}"):
        for cell in cells:
            if not {"install", "timing"} & set(notebooks.tags(cell)):
                exec(compile(notebooks.code_of(cell), stem, "exec"), namespace)
    assert torch.get_default_dtype() == torch.float32, "the lesson's own precision leaked"
