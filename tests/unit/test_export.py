"""Exported models: they say what the model itself says, and what they are."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

import mimdet
from mimdet.cli import main
from mimdet.images import Resize
from mimdet.models.detector import Detector, build_detector
from mimdet.models.exported import export_model
from mimdet.models.mae import MAE
from mimdet.models.rcnn import pad_and_normalise
from mimdet.models.sampling import Sample, Sampling
from mimdet.models.weights import load_mae_model, save_mae
from mimdet.presets import PRESETS
from tests.small import small

GUIDE = Path(__file__).resolve().parents[2] / "docs/guides/export.md"
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: .[export]")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: .[export]")


@pytest.fixture(scope="module")
def detector() -> Detector:
    """Random weights that find something, with running means unlike those of a new BatchNorm."""
    torch.manual_seed(0)
    model = build_detector(small()).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    torch.nn.init.normal_(model.roi_heads.box_head.cls_score.weight, std=0.3)
    model.categories = [f"kind {i}" for i in range(model.config.detector.num_classes)]
    return model.half().float()  # weights that float16 holds


@pytest.fixture(scope="module")
def file(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "small.onnx"
    export_model(detector, path, inside=True, licence="CC0")
    return path


@pytest.fixture(scope="module")
def half(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without what is inside, stored as float16."""
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    export_model(detector, path, half=True)
    return path


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    noise = np.random.default_rng(seed).integers(0, 256, (3, -(-height // 8), -(-width // 8)))
    return torch.from_numpy(noise.astype(np.uint8).repeat(8, 1).repeat(8, 2))[:, :height, :width]


@pytest.mark.parametrize(("height", "width", "kept"), [(64, 64, 16), (64, 90, 5), (250, 64, 1)])
def test_onnxruntime_finds_what_predict_finds(
    detector: Detector, file: Path, height: int, width: int, kept: int
) -> None:
    """Two of the sizes are padded; one keeps a single token."""
    image = picture(height, width)
    batch = detector.prepare(image)
    grid = (batch.tensors.shape[2] // 16, batch.tensors.shape[3] // 16)
    keep = torch.randperm(grid[0] * grid[1], generator=torch.Generator().manual_seed(1))[:kept]
    ours = mimdet.predict(detector, image, sample=Sample([keep], grid))
    feeds = {"image": batch.tensors.numpy(), "keep": keep.numpy(), "mean_c4": np.array(False)}
    session = onnxruntime.InferenceSession(file)
    found = session.run(None, feeds | {"size": np.array(batch.image_sizes[0])})
    boxes, labels, scores, masks, c4, attention = (torch.from_numpy(part) for part in found)
    assert len(ours) >= 10
    assert torch.equal(labels, ours.labels)
    torch.testing.assert_close(boxes, ours.boxes, atol=0.01, rtol=0)
    torch.testing.assert_close(scores, ours.scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(masks, ours.mask_probabilities, atol=1e-3, rtol=0)
    assert c4.shape == (1, 32, *grid)
    assert attention.shape == (2, 2, kept, kept)
    torch.testing.assert_close(attention.sum(3), torch.ones(2, 2, kept), atol=1e-5, rtol=0)


def test_a_large_dark_picture_keeps_its_digits(detector: Detector, file: Path) -> None:
    """The mean of each norm is over a million numbers: added up in one go they leave seven times
    the error that is left here."""
    image = picture(768, 768) // 100
    image[:, 200:260, 200:300] = 255
    tensors, keep = pad_and_normalise([image], detector).tensors, torch.arange(48 * 48)
    with torch.no_grad():
        sampling = Sampling(sample=Sample([keep], (48, 48)))
        c4 = detector.backbone(tensors, [(768, 768)], sampling)["c4"]
    feeds = {"image": tensors.numpy(), "keep": keep.numpy(), "size": np.array([768, 768])}
    exported = onnxruntime.InferenceSession(file).run(["c4"], feeds | {"mean_c4": np.array(False)})
    assert np.abs(exported[0] - c4.numpy()).max() < 1e-5 * float(c4.std())


def test_the_switch_puts_the_mean_in_the_place_of_c4(detector: Detector, file: Path) -> None:
    image = picture(64, 96)
    batch = detector.prepare(image)
    feeds: dict[str, Any] = {"image": batch.tensors.numpy(), "keep": np.arange(24)}
    feeds |= {"size": np.array([64, 96]), "mean_c4": np.array(True)}
    session = onnxruntime.InferenceSession(file)
    boxes, _, scores, _, c4, _ = session.run(None, feeds)
    assert np.ptp(c4, axis=(2, 3)).max() == 0 and c4.std() > 0
    from mimdet.analysis.reliance import altered

    with altered(detector, "c4", "mean"):
        ours = mimdet.predict(detector, image, sample=Sample([torch.arange(24)], (4, 6)))
    np.testing.assert_allclose(boxes, ours.boxes, atol=0.01)
    np.testing.assert_allclose(scores, ours.scores, atol=1e-4)


def test_the_file_says_what_it_is(detector: Detector, file: Path) -> None:
    about = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"])[2] == {"id": 3, "name": "kind 2"}
    assert json.loads(about["mean"]) == [123.675, 116.28, 103.53]
    assert about["preset"] == "tiny" and about["licence"] == "CC0" and about["short_side"] == "64"
    other = build_detector(small())
    assert mimdet.models.exported.describe(other)["weights_sha256"] != about["weights_sha256"]
    assert b"/mimdet/" not in file.read_bytes()  # no path of the machine it was made on


def test_half_is_half_and_close(detector: Detector, file: Path, half: Path) -> None:
    assert half.stat().st_size < 0.65 * file.stat().st_size
    image = picture(64, 64)
    feeds = {"image": detector.prepare(image).tensors.numpy(), "keep": np.arange(16)}
    found = onnxruntime.InferenceSession(half).run(None, feeds | {"size": np.array([64, 64])})
    ours = mimdet.predict(detector, image)
    assert found[1].tolist() == ours.labels.tolist()
    np.testing.assert_allclose(found[2], ours.scores, atol=1e-4)


@pytest.mark.parametrize("norm", ["GN", "LN"])
def test_other_norms_are_exported_too(norm: Literal["GN", "LN"], tmp_path: Path) -> None:
    """`mimdet start` proposes GN. The heads see any number of boxes, and none."""
    torch.manual_seed(0)
    cfg = small()
    cfg.detector.norm = norm
    model = build_detector(cfg).eval()
    torch.nn.init.normal_(model.roi_heads.box_head.cls_score.weight, std=0.3)
    export_model(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    image = picture(64, 96)
    feeds = {"image": model.prepare(image).tensors.numpy(), "keep": np.arange(24)}
    found = session.run(None, feeds | {"size": np.array([64, 96])})
    ours = mimdet.predict(model, image)
    assert len(ours) >= 5 and found[1].tolist() == ours.labels.tolist()
    np.testing.assert_allclose(found[2], ours.scores, atol=1e-4)
    np.testing.assert_allclose(found[3], ours.mask_probabilities, atol=1e-3)


@pytest.mark.parametrize("normalised", [False, True])
def test_the_autoencoder_paints_the_same(normalised: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = dict(embed_dim=32, depth=1, num_heads=2, decoder_dim=32, decoder_depth=1)
    mae = MAE(64, 16, **sizes, decoder_heads=2, norm_pix_loss=normalised).eval()
    export_model(mae, tmp_path / "mae.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "mae.onnx")
    for height, width, kept in ((64, 64, 4), (48, 96, 17)):
        batch = pad_and_normalise([picture(height, width)], mae).tensors[:, :, :height, :width]
        sample = Sample([torch.arange(kept).flip(0)], (height // 16, width // 16))
        with torch.no_grad():
            painted = mae.reconstruct(batch, mae(batch, sample=sample)).painted
        feeds = {"image": batch.numpy(), "keep": sample.keep[0].numpy()}
        np.testing.assert_allclose(session.run(None, feeds)[0], painted, atol=1e-4)


def test_pt2_is_a_program_of_pytorch(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = export_model(detector, tmp_path / "small.pt2")
    extra = {"mimdet.json": ""}
    program = torch.export.load(tmp_path / "small.pt2", extra_files=extra).module()
    assert json.loads(extra["mimdet.json"]) == about
    image = picture(96, 128)
    monkeypatch.setattr(detector, "resize", Resize())  # as it is
    batch = detector.prepare(image)
    boxes, labels, *_ = program(
        image=batch.tensors, keep=torch.arange(48), size=torch.tensor([96, 128])
    )
    ours = mimdet.predict(detector, image, sample=Sample([torch.arange(48)], (6, 8)))
    assert torch.equal(labels, ours.labels)
    torch.testing.assert_close(boxes, ours.boxes, atol=0.01, rtol=0)


def test_the_example_of_the_guide_runs_without_torch(
    detector: Detector, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten lines; a torch that cannot be imported stands before the real one."""
    example = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)[0]
    assert (
        len([line for line in example.splitlines() if line.strip()]) <= 12
    )  # ten, and two of imports
    shutil.copyfile(half, tmp_path / "model.onnx")
    Image.fromarray(picture(90, 64).permute(1, 2, 0).numpy()).save(tmp_path / "scene.png")
    monkeypatch.setattr(detector, "resize", Resize())  # the example resizes nothing
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ours = mimdet.predict(detector, tmp_path / "scene.png")
    assert len(done.stdout.splitlines()) == len(ours) > 0
    assert done.stdout.startswith(f"kind {int(ours.labels[0])} {ours.scores[0]:.2f}")


def test_the_command_and_what_it_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = dict(embed_dim=32, depth=1, num_heads=2, decoder_dim=32, decoder_depth=1)
    save_mae(MAE(64, 16, **sizes, decoder_heads=2), tmp_path / "mae.safetensors")
    assert load_mae_model(tmp_path / "mae.safetensors").patch_size == 16
    words = ["export", str(tmp_path / "mae.safetensors"), str(tmp_path / "mae.pt2")]
    main([*words, "--licence", "CC-BY 4.0"])
    assert "autoencoder, sides multiples of 16 pixels" in capsys.readouterr().out
    for bad in ("model.tflite", "model.pt2 --half"):
        with pytest.raises(SystemExit):
            main(["export", "tiny", *str(tmp_path / bad).split()])
        assert ".onnx" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a swin backbone samples no tokens"):
        export_model(build_detector(PRESETS["tiny_swin"]()), tmp_path / "swin.pt2")
