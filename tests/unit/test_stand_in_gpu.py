"""The stand-in for a GPU refuses what a GPU refuses, and a training on it is one in bf16.

In a process of its own: it changes PyTorch.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mimdet
from mimdet.notebook import quick_config
from tools.stand_in_gpu import GPUS, LOG, SITE

TRY = """\
import json, os
import torch, mimdet
from mimdet.notebook import quick_config
from mimdet.training.trainer import pick_device
from tools.rehearsal import choices

def refused(act):
    try:
        act()
    except (RuntimeError, TypeError) as error:
        return str(error)

near, far = torch.ones(2, 3), torch.ones(2, 3, device="cuda", requires_grad=True)
drawn = torch.Generator().manual_seed(0)
with torch.autocast("cuda", torch.bfloat16):
    product = far @ far.T
product.sum().backward()
said = {
    "devices": torch.cuda.device_count(),
    "device": str(pick_device("auto")),
    "mixed": refused(lambda: near + far),
    "index of the other device": refused(lambda: near[far[0].long()]),
    "numpy": refused(lambda: far.detach().numpy()),
    "generator": refused(lambda: torch.rand(3, device="cuda", generator=drawn)),
    "allowed": [str((far * torch.tensor(2.0))[torch.tensor([1])].device), str(far.cpu().device)],
    "product": [str(product.dtype), str(product.device), far.grad.tolist()],
    "made of it": [str(t.device) for t in (far.new_zeros(1), far.nonzero(), torch.zeros_like(far))],
}
cfg = quick_config()
cfg.training.steps, cfg.data.shapes_val, cfg.training.threads = 2, 1, 1
said["losses"] = [step.loss for step in mimdet.train(cfg, "run")]
said["weights"] = str(next(mimdet.load_detector("run").parameters()).device)
said["choices"] = [choices("1x24"), choices("3x80")]
del os.environ["CUDA_VISIBLE_DEVICES"]
said["choices"] += [choices("8x80")]
print(json.dumps(said))
"""


def test_what_holds_on_a_gpu_that_computes_on_the_cpu(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITE)
    (tmp_path / "mimdet_try.py").write_text(TRY)
    places = [str(tmp_path), str(Path(__file__).resolve().parents[2])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), GPUS: "3x80"}
    environment |= {LOG: str(tmp_path / "log"), "CUDA_VISIBLE_DEVICES": "0,2"}
    words = [sys.executable, "mimdet_try.py"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["devices"] == 2 and said["device"] == "cuda:0"
    for mixed in ("mixed", "index of the other device"):
        assert "all tensors to be on the same device" in said[mixed]
    assert "can't convert cuda:0" in said["numpy"] and "'cuda' device" in said["generator"]
    assert said["allowed"] == ["cuda:0", "cpu"] and set(said["made of it"]) == {"cuda:0"}
    assert said["product"] == ["torch.bfloat16", "cuda:0", [[4.0] * 3] * 2]
    # The same two steps on a CPU in bf16: `auto` was bf16 there, and was used, in attention too.
    monkeypatch.setattr("mimdet.models.vit.FEW_TOKENS", 0)
    cfg = quick_config()
    cfg.training.steps, cfg.data.shapes_val, cfg.training.threads = 2, 1, 1
    cfg.training.precision = "bf16"
    ours = [step.loss for step in mimdet.train(cfg, tmp_path / "ours")]
    assert said["losses"] == pytest.approx(ours, abs=1e-6) and said["weights"] == "cpu"
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert json.loads(line)["products in bfloat16"] > 100
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in said["choices"]]
    assert [row[1] for row in rows] == ["1 x 8 x 8", "2 x 8 x 4", "8 x 8 x 1"]
    assert [row[3] for row in rows] == ["recomputed", "kept", "kept"]
    assert [row[4] for row in rows] == ["0", "0, 2", "0, 1, 2, 3"]  # those that are visible
    assert all("bf16" in row[5] for row in rows) and "2 of 2 GPUs" in rows[1][5]
