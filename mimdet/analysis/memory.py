"""What a training step keeps for its backward pass, counted in bytes: the part of a step's memory
that grows with the images, and that token sampling and recomputation make smaller.

Weights, gradients and the optimiser's two averages come on top: 16 bytes a parameter in fp32.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def kept_bytes(run: Callable[[], Any], module: nn.Module) -> int:
    """Bytes of the tensors that autograd keeps while `run` computes, those of `module` left out.

    A storage counts once, however many tensors share it. What is recomputed is not kept.
    """
    own = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that its place is not given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in kept.values())
