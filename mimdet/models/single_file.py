"""A detector in one safetensors file that describes itself: weights, configuration, class names."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from mimdet.config import Config, from_dict, to_dict
from mimdet.files import write_file
from mimdet.models.checkpoint_files import CheckpointFile
from mimdet.models.detector import Detector, build_detector
from mimdet.models.weights import load_exactly


def save_detector(model: Detector, path: str | Path, *, half: bool = False) -> None:
    """Write a detector so that `mimdet.load_detector(path)` needs nothing else.

    half: store float16, half the size; scores change in the third digit. Raises ValueError for a
    detector with parts written in a notebook: a file of numbers cannot hold them, its run can.
    """
    if model.slots:
        raise ValueError(
            f"the detector has parts of its own ({', '.join(model.slots)}), whose code one file of "
            "weights cannot hold: share the run's directory instead"
        )
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if half:
        state = {n: v.half() if v.is_floating_point() else v for n, v in state.items()}
    metadata = {
        "config": json.dumps(to_dict(model.config)),
        "categories": json.dumps(model.categories),
    }
    write_file(path, lambda partial: save_file(state, partial, metadata))


def describes_itself(file: CheckpointFile) -> bool:
    return "config" in file.metadata


def load_single_file(file: CheckpointFile) -> Detector:
    """The detector of a file that `save_detector` wrote, in evaluation mode and float32.

    Raises ValueError naming the file when its configuration is of another version, or its weights
    are not those of the configuration.
    """
    try:
        cfg: Config = from_dict(json.loads(file.metadata["config"]))
        categories = json.loads(file.metadata["categories"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file.name}: its configuration cannot be read: {error}") from error
    model = build_detector(cfg)
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    load_exactly(
        model, {n: v.to(dtypes.get(n, torch.float32)) for n, v in file.tensors.items()}, file.name
    )
    model.categories = categories
    return model.eval()
