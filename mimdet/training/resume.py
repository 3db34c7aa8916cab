"""Train from a run's folder alone: its configuration, and the code of its slots, stand in it."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mimdet import processes
from mimdet.config import Config, load_config, save_config
from mimdet.files import read_json, write_file
from mimdet.pretrain_config import PretrainConfig
from mimdet.training.cell_code import load_slots
from mimdet.training.run import Run
from mimdet.training.trainer import Step, seed_all, use_threads

if TYPE_CHECKING:
    from mimdet.models.detector import Detector


def resume(run: str | Path, *, trust_code: bool = False, locked: bool = False) -> Iterator[Step]:
    """Train in the folder `run`, or go on with it, to the last step; yields as `mimdet.train`.

    The folder holds config.json, and under slots/ the parts that were written in a notebook; they
    are executed only with trust_code=True. locked: this process holds the run's lock already.
    Raises FileNotFoundError for a folder that holds no run.
    """
    processes.join()
    path = Path(run)
    cfg = stored_config(path)
    if isinstance(cfg, PretrainConfig):
        from mimdet.training.pretrain import pretrain

        yield from pretrain(cfg, path)
        return
    from mimdet.data.coco import build_dataset
    from mimdet.training.train import adapt_to_data, train

    use_threads(cfg.training.threads)
    data = build_dataset(cfg.data, "train", cfg.training.seed)
    adapted = copy.deepcopy(cfg)
    adapt_to_data(adapted, data)
    if adapted != cfg and processes.rank() == 0:  # written before the data were opened
        write_file(path / "config.json", lambda partial: save_config(adapted, partial))
    model = build_model(path, trust_code, adapted) if (path / "slots").exists() else None
    record = processes.in_turn(lambda: Run(path, adapted, locked=locked))
    yield from train(adapted, record, model=model, train_data=data)


def stored_config(path: Path) -> Config | PretrainConfig:
    """The configuration of a run, of a detector or of an autoencoder."""
    file = path / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{path} holds no run: there is no config.json in it")
    kind = Config if "detector" in read_json(file) else PretrainConfig
    found: Config | PretrainConfig = load_config(file, kind)
    return found


def build_model(path: Path, trust_code: bool, cfg: Config | None = None) -> "Detector":
    """The detector of a run with its initial weights, which depend on the seed alone."""
    from mimdet.models.detector import build_detector

    cfg = cfg or load_config(path / "config.json")
    seed_all(cfg.training.seed)  # a stem written in a cell draws its weights when it is loaded
    slots = load_slots(path / "slots", trust_code)
    seed_all(cfg.training.seed)  # encoder and decoder are those of a model without it
    return build_detector(cfg, **slots)
