"""What a larger canvas changes: measured, because an image is not independent of its padding.

The stem's GroupNorm averages over padding, position tables are resized to the padded grid, and the
decoder attends to padding, all as in the paper. What does not change is the encoder's rule: with
keep="valid" no padding is ever encoded.
"""

import pytest
import torch

import mimdet
from mimdet.models.rcnn import pad_and_normalise
from tests.small import small


@pytest.mark.parametrize("canvas", [(96, 96), (128, 64), (64, 160)])
def test_larger_canvas_changes_c4_but_never_the_number_of_tokens(canvas):
    torch.manual_seed(0)
    model = mimdet.build_detector(small()).eval()
    image = mimdet.ShapesCOCO(size=64, length=1, split="val")[0].image
    alone = pad_and_normalise([image], torch.device("cpu"))
    filler = torch.zeros(3, *canvas, dtype=torch.uint8)
    together = pad_and_normalise([image, filler], torch.device("cpu"))
    with torch.no_grad():
        c4_alone = model.backbone(alone.tensors, alone.image_sizes)["c4"][0]
        c4_together = model.backbone(together.tensors, together.image_sizes)["c4"][0, :, :4, :4]
        sample = model.backbone.draw(
            torch.zeros(2, (canvas[0] // 16) * (canvas[1] // 16), 32),
            (canvas[0] // 16, canvas[1] // 16),
            together.image_sizes,
            mimdet.Sampling(0.5),
        )
    change = (c4_together - c4_alone).abs().max() / c4_alone.abs().max()
    assert 1e-4 < change < 2  # a real effect, not an error: predict therefore never mixes canvases
    assert len(sample.keep[0]) == 8  # half of its own 4 x 4 tokens
