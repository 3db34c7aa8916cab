"""What a model relies on, and what its tokens hold: `python tools/measure_reliance.py MODEL`.

    python tools/measure_reliance.py tiny [--scenes 200] [--out FILE.json]

MODEL: a run, a file of weights or the name of shipped ones. Of a detector: AP by size of object
when parts of it are exchanged and when its encoder sees fewer tokens (`mimdet.reliance`). Of every
MIMDet and autoencoder: the deviation of the tokens at the encoder's door, their effective rank, and
how well a linear classifier tells the class of an object, with these and with random weights. Data
are those of the detector's configuration, and ShapesCOCO for an autoencoder.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pandas import DataFrame

import mimdet
from mimdet.analysis.reliance import (
    OF_A_MAE,
    OF_A_MIMDET,
    Features,
    features_of,
    linear_probe,
    reliance,
    token_rank,
    token_scale,
    untrained,
)
from mimdet.config import DataConfig
from mimdet.data.coco import build_dataset
from mimdet.files import finite, write_json
from mimdet.models.backbones import MIMDetBackbone
from mimdet.models.detector import Detector
from mimdet.models.mae import MAE
from mimdet.training.checkpoints import MAE_FILE
from mimdet.training.run import load_detector

LOOKED_AT = 20
"""Images whose tokens' deviation is measured."""
TRAINING = 2
"""Images that the probe is fitted to for every one that it is tested on."""


def load(source: str) -> Detector | MAE:
    """A detector or an autoencoder. ValueError with what both loaders say when it is neither."""
    file = Path(source) / MAE_FILE
    try:
        return mimdet.load_mae_model(file if file.exists() else source)
    except (ValueError, OSError) as no_autoencoder:
        try:
            return load_detector(source)
        except (ValueError, OSError) as no_detector:
            raise ValueError(f"{no_detector}; {no_autoencoder}") from None


def at_each_place(model: Detector | MAE, measure: Callable[[Features], float]) -> DataFrame:
    """A row a place: what is measured there with the model's weights and with random ones."""
    pair = {"these weights": model, "random weights": untrained(model)}
    places = OF_A_MAE if isinstance(model, MAE) else OF_A_MIMDET
    if isinstance(model, Detector) and not isinstance(model.backbone, MIMDetBackbone):
        places = ("c4",)
    rows = {
        place: {name: measure(features_of(one, place)) for name, one in pair.items()}
        for place in places
    }
    return DataFrame.from_dict(rows, orient="index").rename_axis("tokens of")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--scenes", type=int, default=200, help="held-out images")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load(options.model)
    data = model.config.data if isinstance(model, Detector) else DataConfig()
    data.limit_val, data.limit_train = options.scenes, TRAINING * options.scenes
    data.shapes_val = max(data.shapes_val, options.scenes)
    train, test = build_dataset(data, "train"), build_dataset(data, "val")
    report: dict[str, Any] = {
        "command": f"python tools/measure_reliance.py {Path(options.model).name} "
        f"--scenes {options.scenes}",
        "data": test.version,
    }
    if isinstance(model, Detector):
        table = reliance(model, test)
        print(table.round(1).to_string(), end="\n\n")
        report |= {"about": table.attrs, "box_ap": table.round(2).to_dict("index")}
    images = [test.image(i) for i in range(min(LOOKED_AT, len(test)))]
    if isinstance(model, MAE) or isinstance(model.backbone, MIMDetBackbone):
        scales = {"these weights": model, "random weights": untrained(model)}
        scale = DataFrame.from_dict(
            {name: token_scale(one, images) for name, one in scales.items()}, orient="index"
        ).rename_axis("deviation of")
        print(scale.round(2).to_string(), end="\n\n")
        report["token_scale"] = scale.round(3).to_dict("index")
    rank = at_each_place(model, lambda features: token_rank(features, images))
    print(f"effective rank of tokens\n{rank.round(1).to_string()}", end="\n\n")
    report["token_rank"] = rank.round(2).to_dict("index")
    accuracy = at_each_place(model, lambda features: 100 * linear_probe(features, train, test))
    print(f"classes of objects told from tokens, % of {len(test)} held-out images")
    print(accuracy.round(1).to_string())
    report["probe"] = accuracy.round(2).to_dict("index")
    if options.out:
        write_json(options.out, finite(report))


if __name__ == "__main__":
    main()
