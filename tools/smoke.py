"""Does an installed mimdet work where there is no checkout? Run this by the fresh environment.

python -m build && python -m venv fresh && fresh/bin/pip install dist/*.whl   # or dist/*.tar.gz
mkdir empty && cd empty && ../fresh/bin/python ../tools/smoke.py
"""

import subprocess
import sys
from pathlib import Path

import mimdet

CHECKOUT = Path(__file__).resolve().parents[1]
FILES = (
    "py.typed",
    "catalogue.toml",
    "data/check_kinds.toml",
    "pretrained/cards.json",
    "pretrained/tiny.safetensors",
    "pretrained/tiny_mae.safetensors",
    "viz/widgets/patch_canvas.js",
    "viz/widgets/patch_canvas.css",
)
"""What the package holds besides its modules; not all of it."""


def main() -> None:
    package = Path(mimdet.__file__).parent
    if CHECKOUT in package.parents and "site-packages" not in package.parts:
        raise SystemExit(f"this is the checkout, {package}: install the wheel and run elsewhere")
    lacking = [name for name in FILES if not (package / name).is_file()]
    if lacking:
        raise SystemExit(f"{package} lacks {', '.join(lacking)}")
    command = Path(sys.executable).with_name("mimdet")
    subprocess.run([command, "--help"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([command, "demo", "--steps", "2", "--scenes", "4"], check=True)
    image = mimdet.ShapesCOCO(size=128, length=1, split="val")[0].image
    found = mimdet.predict(mimdet.load_detector("tiny"), image)
    print(f"mimdet {mimdet.__version__}: command, demo, package data, {len(found)} detections")


if __name__ == "__main__":
    main()
