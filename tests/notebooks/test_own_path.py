"""A photo and a folder of your own go through the notebooks that ask for a PATH."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimdet.data.shapes import ShapesCOCO, export
from tools import notebooks

NAMED = {"00_quickstart", "01_mae_loading", "02_token_sampling", "05_attention", "06_data", "08_results"}
STEPS = 4


def asks_for(name: str, source: Path) -> bool:
    cell = notebooks.parameters_cell(notebooks.read_source(source))
    return cell is not None and any(
        line.startswith(f"{name} = ") for line in cell.source.splitlines()
    )


SOURCES = [source for source in notebooks.sources() if asks_for("PATH", source)]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("own")
    Image.fromarray(photograph(163, 217)).save(folder / "photo.jpg", quality=85)
    export(ShapesCOCO("shapes-v1-easy", size=96, length=12), folder / "scenes")
    return {"photo": folder / "photo.jpg", "folder": folder / "scenes", "": Path("nuclei")}


def photograph(height: int, width: int) -> np.ndarray:
    """Something like one, (height, width, 3) uint8: a sky over a lawn, a ball, a house, noise."""
    y, x = np.mgrid[:height, :width]
    picture = np.stack([90 + 60 * y / height, 140 + 40 * y / height, 220 - 90 * y / height], 2)
    lawn = y > 0.6 * height + 6 * np.sin(x / 17)
    picture[lawn] = np.stack([60 + 0.2 * x, 130 - 0.1 * x, 50 + 0 * x], 2)[lawn]
    house = (abs(x - 0.7 * width) < 28) & (y > 0.35 * height) & (y < 0.7 * height)
    picture[house] = (150, 90, 60)
    ball = (x - 0.3 * width) ** 2 + (y - 0.7 * height) ** 2 < 19**2
    picture[ball] = np.stack([200 - x + 0 * y, 60 + 0 * x, 60 + 0.5 * y], 2)[ball]
    picture += np.random.default_rng(0).normal(0, 6, picture.shape)
    return picture.clip(0, 255).astype(np.uint8)


def test_the_notebooks_that_should_ask_for_a_path_do() -> None:
    assert {source.stem for source in SOURCES} >= NAMED


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["photo", "folder", ""])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_own_data_by_changing_the_path(source, kind, own, monkeypatch) -> None:
    """Without a kind: by MIMDET_PICTURES alone, which names the picture of the package."""
    monkeypatch.setenv("MIMDET_PICTURES", "" if kind else str(own[kind]))
    notebook = notebooks.read_source(source)
    few = {"STEPS": STEPS} if asks_for("STEPS", source) else {}
    notebooks.inject(notebook, MODE="quick", PATH=str(own[kind]) if kind else "", **few)
    notebooks.execute(notebook)
    pictures = [
        data
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        for data in output.get("data", {})
        if data.startswith("image/")
    ]
    assert pictures, "it ran, and showed nothing"
