"""The sanity checks of the notebooks notice what they speak about."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mimdet
from mimdet import notebook
from mimdet.models import detector, rcnn, sampling, vit, weights
from mimdet.models.sampling import SAMPLERS
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


Wrong = Callable[[Any], Any]
"""Makes another function of one of the library."""


def spoilt(spoil: Callable[[Any], Any]) -> Wrong:
    """What it returns is spoilt."""
    return lambda right: lambda *given, **options: spoil(right(*given, **options))


def keep_one_less(sample: sampling.Sample) -> sampling.Sample:
    return sample._replace(keep=[kept[:-1] for kept in sample.keep])


def keep_the_lowest(right: Any) -> Any:
    return lambda scores, *rest, **options: right([-s for s in scores], *rest, **options)


def scatter_in_another_order(right: Any) -> Any:
    return lambda kept, *rest: right([rows.flip(0) for rows in kept], *rest)


def gather_in_another_order(images: list[torch.Tensor]) -> list[torch.Tensor]:
    return [rows.roll(1, 0) for rows in images]


def ratio_1_depends_on_the_seed(right: Any) -> Any:
    def predict(*given: Any, seed: int = 0, sample_ratio: float = 1.0, **options: Any) -> Any:
        found = right(*given, seed=seed, sample_ratio=sample_ratio, **options)
        found.boxes += seed * (sample_ratio == 1)
        return found

    return predict


def padding_is_black(batch: rcnn.Batch) -> rcnn.Batch:
    for canvas, (height, width) in zip(batch.tensors, batch.image_sizes, strict=True):
        canvas[:, height:], canvas[:, :, width:] = -2, -2  # about what black becomes
    return batch


def columns_for_rows(table: torch.Tensor) -> torch.Tensor:
    side = round((table.shape[1] - 1) ** 0.5)
    cells = table[:, 1:].unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2)
    return torch.cat([table[:, :1], cells], dim=1)


def another_scale(model: Any) -> Any:
    model.backbone.decoder.blocks[0].attn.scale *= 2
    return model


def names_get_lost(right: Any) -> Any:
    def translate(name: str, *rest: Any, back: bool = False) -> Any:
        found = right(name, *rest, back=back)
        return found.replace("norm1", "norm2") if back and found else found

    return translate


def a_refused_file_leaves_traces(right: Any) -> Any:
    def load(model: Any, path: str, **options: Any) -> Any:
        if not path.endswith("/mae.pth"):
            with torch.no_grad():
                model.backbone.encoder.norm.weight += 1
        return right(model, path, **options)

    return load


SAMPLING, WALK, MAE = "02_token_sampling", "04_backbone_walkthrough", "01_mae_loading"
SABOTAGE: list[tuple[str, Any, str, Wrong, str]] = [
    # (notebook, what of which module or table is replaced, by what, the check that notices)
    (SAMPLING, mimdet, "select", spoilt(keep_one_less), "of 256 tokens"),
    (SAMPLING, mimdet, "select", keep_the_lowest, "the kept ones have the highest scores"),
    (SAMPLING, SAMPLERS, "block", lambda right: SAMPLERS["random"], "block keeps whole squares"),
    (SAMPLING, sampling, "scatter", scatter_in_another_order, "scatter is un-shuffle"),
    (SAMPLING, sampling, "gather", spoilt(gather_in_another_order), "every kept token is back"),
    (SAMPLING, mimdet, "predict", ratio_1_depends_on_the_seed, "at ratio 1 nothing is drawn"),
    (WALK, detector, "pad_and_normalise", spoilt(padding_is_black), "on a canvas of"),
    (WALK, vit, "sincos_table", spoilt(columns_for_rows), "row 5, column 3"),
    (WALK, vit, "resize_table", spoilt(lambda t: t.roll(1, 1)), "table of 16 x 16 on a grid"),
    ("05_attention", notebook, "open_detector", spoilt(another_scale), "recorded attention is the"),
    (MAE, weights, "translate", names_get_lost, "names come back unchanged"),
    (MAE, mimdet, "load_mae", a_refused_file_leaves_traces, "the model is as it was"),
]


@pytest.mark.parametrize(("stem", "owner", "name", "wrong", "text"), SABOTAGE)
def test_a_broken_library_is_noticed(stem, owner, name, wrong, text, monkeypatch, tmp_path) -> None:
    """Cells of the notebook run until a check fails, and it is the one meant for this fault."""
    monkeypatch.chdir(tmp_path)
    source = notebooks.FOLDER / "py" / f"{stem}.py"
    cells = [cell for cell in notebooks.read_source(source).cells if cell.cell_type == "code"]
    if isinstance(owner, dict):
        monkeypatch.setitem(owner, name, wrong(owner[name]))
    else:
        monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    namespace: dict[str, Any] = {}
    with pytest.raises(AssertionError, match=f"✗ .*{text}"):
        for cell in cells:
            if not {"install", "timing"} & set(notebooks.tags(cell)):
                exec(compile(notebooks.code_of(cell), stem, "exec"), namespace)
    assert torch.get_default_dtype() == torch.float32, "the lesson's own precision leaked"
