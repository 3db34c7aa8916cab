"""`mimdet playground`: a page on which anyone plays with a detector, in any browser.

A folder of static files: the sources in `mimdet/page`, models as ONNX, pictures drawn or read here,
and ONNX Runtime Web from npm. Nothing on it asks for anything outside the folder.
"""

import gzip
import hashlib
import http.server
import json
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional

if TYPE_CHECKING:
    from torch import Tensor

    from mimdet.models.detector import Detector
    from mimdet.models.mae import MAE

PAGE = Path(__file__).resolve().parent / "page"
RUNTIME, VERSION = "onnxruntime-web", "1.30.0"
RUNTIME_FILES = {
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    "ort-wasm-simd-threaded.wasm": (
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2"
    ),
}
"""What the page needs of the npm package's `dist`, with the sha256 of each."""
SCENES = 24
SHOWN_SCENES = 8
"""Pictures that are loaded at first."""
OBJECT = 0.5
"""Score from which a detection counts, and IoU from which it is that of an object."""


def playground(
    run: Annotated[Positional[str], tyro.conf.arg(metavar="[RUN]")] = "",
    autoencoder: str = "tiny_mae",
    out: Path = Path("build/playground"),
    scenes: int = SCENES,
    port: int = 8017,
    serve: bool = True,
    runtime: str = "",
    licence: str = "",
    trust_code: bool = False,
) -> None:
    """Write a page on which anyone plays with a trained detector, and show it on 127.0.0.1.

    The folder holds static files: put it on any web space. A photo that is dropped on the page does
    not leave it. Needs `.[export]`, and npm for ONNX Runtime Web.

    Args:
        run: Directory of a detector's run; default: the two detectors of the package.
        autoencoder: Shipped weights, a file or the run of an autoencoder of the same picture size.
        out: Folder for the page; one that a playground was written to before is replaced.
        scenes: Held-out pictures of the detector's data.
        port: Of the server; another one where it is taken.
        serve: Show it until Ctrl-C.
        runtime: Folder that holds the files of onnxruntime-web; default: fetched by npm once.
        licence: Of a run's weights, said on the page.
        trust_code: Execute parts that a notebook stored in the run, or that its config.json names.
    """
    from mimdet.models.checkpoint_files import shipped
    from mimdet.models.mae import MAE
    from mimdet.training.pretrain import load_model

    painter = load_model(autoencoder)
    if not isinstance(painter, MAE):
        raise ValueError(f"--autoencoder {autoencoder} is a detector")
    models: dict[str, Detector] = {}
    for name in [run] if run else ["tiny", "tiny_half"]:
        model = load_model(name, trust_code=trust_code) if run else load_model(name)
        if isinstance(model, MAE):
            raise ValueError(
                f"{name} is an autoencoder: give it as --autoencoder, RUN is a detector"
            )
        models[Path(name).name] = model
    print(f"{out}: exporting {len(models) + 1} models, a minute each", flush=True)
    terms = licence or ("MIT" if not run or run in shipped() else "")
    write_page(out, models, painter, scenes=scenes, runtime=runtime, licence=terms)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
    print(f"{out}: {size:.1f} MB of static files; put the folder on any web space")
    if serve:
        serve_folder(out, port)


def write_page(
    folder: str | Path,
    models: "dict[str, Detector]",
    painter: "MAE",
    *,
    scenes: int = SCENES,
    runtime: str | Path = "",
    licence: str = "",
) -> None:
    """The page of detectors, the first of which is shown first, and an autoencoder.

    Their pictures are those of the first one's held-out data. ValueError for a folder with files of
    others, and where pictures differ in size or ONNX Runtime Web is not to be had.
    """
    from mimdet.files import write_folder
    from mimdet.models.exported import export_model
    from mimdet.models.sampling import PATCH

    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "models.json").exists():
        raise ValueError(f"{folder} holds files that are no playground's: give another --out")
    if painter.patch_size != PATCH:
        raise ValueError(f"patches of {painter.patch_size} pixels: detector and page have {PATCH}")
    bundle, binary = runtime_files(Path(runtime) if runtime else None)
    first = next(iter(models.values()))

    def write(part: Path) -> None:
        for source in PAGE.iterdir():
            shutil.copyfile(source, part / source.name)
        shutil.copyfile(bundle, part / "runtime.mjs")
        # Compressed here, because a plain static server does not; by another name than .gz, because
        # some servers would announce that and the browser then unpack it.
        (part / "runtime.bin").write_bytes(gzip.compress(binary.read_bytes(), 9, mtime=0))
        entries = []
        every: list[tuple[str, Detector | MAE]] = [*models.items(), ("autoencoder", painter)]
        for i, (name, model) in enumerate(every):
            file = f"detector{i}.onnx" if i < len(models) else "autoencoder.onnx"
            about = export_model(model, part / file, inside=True, half=True, licence=licence)
            entries.append({"name": name, "file": file, "about": about})
        pictures = held_out(first, scenes)
        for i, (pixels, _) in enumerate(pictures):
            save_png(pixels, part / f"scene{i:02}.png")
        save_png(stranger(first.resize.short_side or 256), part / "stranger.png")
        content = {
            "runtime": f"{RUNTIME} {VERSION}",
            "detectors": entries[:-1],
            "autoencoder": entries[-1],
            "first": SHOWN_SCENES,
            "scenes": [
                {"file": f"scene{i:02}.png", "objects": objects}
                for i, (_, objects) in enumerate(pictures)
            ],
            "lesson": lesson_numbers(first, painter, pictures),
        }
        (part / "models.json").write_text(json.dumps(content), encoding="utf-8")

    write_folder(folder, write)


# ------------------------------------------------------------------------------- what it is made of


def runtime_files(folder: Path | None = None) -> list[Path]:
    """ONNX Runtime Web: its files in `folder`, or in the cache, where npm puts them once.

    ValueError for a file that is not the pinned version's, and without npm.
    """
    from mimdet.data.coco import cache_folder

    place = folder or cache_folder() / f"{RUNTIME}-{VERSION}"
    files = [place / name for name in RUNTIME_FILES]
    if folder is None and not all(file.exists() for file in files):
        fetch_runtime(place)
    for file in files:
        if not file.exists():
            raise ValueError(
                f"{file} is not there: `npm pack {RUNTIME}@{VERSION}` holds it in dist"
            )
        if hashlib.sha256(file.read_bytes()).hexdigest() != RUNTIME_FILES[file.name]:
            raise ValueError(f"{file} is not that of {RUNTIME} {VERSION}: remove it and try again")
    return files


def fetch_runtime(place: Path) -> None:
    """Let npm fetch the package, and keep the files that are needed; nothing of it is run."""
    from mimdet.files import write_folder

    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            f"npm is needed once, to fetch {RUNTIME}: install Node.js, or give --runtime a folder "
            f"with {' and '.join(RUNTIME_FILES)} of version {VERSION}"
        )
    with TemporaryDirectory() as scratch:
        command = [npm, "pack", f"{RUNTIME}@{VERSION}", "--pack-destination", scratch]
        done = subprocess.run(command, capture_output=True, text=True)
        packed = list(Path(scratch).glob("*.tgz"))
        if done.returncode or not packed:
            said = (done.stderr.strip() or "nothing").splitlines()[-1]
            raise ValueError(f"npm could not fetch {RUNTIME}@{VERSION}: {said}")

        def unpack(part: Path) -> None:
            with tarfile.open(packed[0]) as tar:
                for name in RUNTIME_FILES:
                    member = tar.extractfile(f"package/dist/{name}")
                    assert member is not None
                    (part / name).write_bytes(member.read())

        place.parent.mkdir(parents=True, exist_ok=True)
        write_folder(place, unpack)


def held_out(model: "Detector", count: int) -> "list[tuple[Tensor, list[dict[str, Any]]]]":
    """Pictures (3, H, W) uint8 of a detector's validation data as the page shows them, each with
    its objects: name, label, box in its pixels, size by COCO's areas."""
    from mimdet.analysis.metrics import size_ranges
    from mimdet.data.coco import build_dataset

    cfg = model.config
    dataset = build_dataset(cfg.data, "val", cfg.training.seed, cfg.detector.masks)
    ranges = size_ranges(getattr(dataset, "area_scale", 1.0))
    pictures = []
    for i in range(min(count, len(dataset))):
        record = dataset[i]
        pixels = model.resize(record.image)
        scale = pixels.shape[1] / record.image.shape[1]
        target, objects = record.target, []
        areas = (target.boxes[:, 2:] - target.boxes[:, :2]).prod(1)
        if target.masks is not None:  # shares of the boxes that their bitmaps cover
            sides = target.masks.boxes[:, 2:] - target.masks.boxes[:, :2]
            areas = sides.prod(1) * target.masks.bitmaps.float().mean((1, 2))
        for box, label, area in zip(target.boxes, target.labels.tolist(), areas, strict=True):
            size = next(name for name, (low, high) in ranges.items() if low <= area < high)
            place = [round(float(side), 2) for side in box * scale]
            name = model.categories[label]
            objects.append({"name": name, "label": label, "box": place, "size": size})
        pictures.append((page_size(pixels), objects))
    return pictures


def page_size(pixels: "Tensor") -> "Tensor":
    """(3, H, W) without what is over the largest multiples of 32, below and right, so that nothing
    on the page is padded; of a long picture three halves of its short side are left."""
    height, width = pixels.shape[1:]
    longest = min(height, width) * 3 // 2
    return pixels[:, : min(height, longest) // 32 * 32, : min(width, longest) // 32 * 32]


def stranger(side: int) -> "Tensor":
    """A house, a tree and the sun, (3, side, side): nothing that was in any training picture."""
    from PIL import Image, ImageDraw

    from mimdet.images import pil_to_rgb, resize_image

    picture = Image.new("RGB", (512, 512), "#9cc9ec")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 360, 512, 512), fill="#6aa84f")
    draw.ellipse((380, 40, 470, 130), fill="#ffd54a")
    draw.rectangle((90, 230, 300, 420), fill="#c8553d")
    draw.polygon([(70, 235), (195, 110), (320, 235)], fill="#5b4037")
    draw.rectangle((170, 320, 220, 420), fill="#3e2a20")
    for left in (110, 240):
        draw.rectangle((left, 265, left + 42, 305), fill="#fff3c4")
    draw.rectangle((392, 310, 418, 430), fill="#6b4a2f")
    draw.ellipse((335, 180, 475, 340), fill="#2f7d43")
    return resize_image(pil_to_rgb(picture), (side // 32 * 32, side // 32 * 32))


def save_png(pixels: "Tensor", path: Path) -> None:
    from PIL import Image

    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path, optimize=True)


def serve_folder(folder: Path, port: int) -> None:
    """Until Ctrl-C, on this machine alone."""
    types = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}
    own = {"extensions_map": types, "log_message": lambda *_: None}
    handler = type("Handler", (http.server.SimpleHTTPRequestHandler,), own)
    answer = partial(handler, directory=str(folder))
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), answer)
    except OSError:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), answer)
    with server:
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        print(f"{address} shows it; Ctrl-C ends that, the files stay", flush=True)
        server.serve_forever()


# ------------------------------------------------------------------- numbers of the lesson


def lesson_numbers(
    model: "Detector", painter: "MAE", pictures: "Sequence[tuple[Tensor, list[dict[str, Any]]]]"
) -> dict[str, str]:
    """What the answers of the five experiments state, over the page's own pictures.

    Shares of objects that are found (score and IoU of at least 0.5, right class) in percent, by
    size and condition; "-" where there is no such object.
    """
    import torch

    from mimdet.analysis.reliance import ONE_TOKEN
    from mimdet.models.exported import ExportedDetector

    look = ExportedDetector(model, inside=True).eval()
    numbers: dict[str, str] = {"pictures": str(len(pictures))}

    def shares(name: str, ratio: float, sampler: str = "random", mean_c4: bool = False) -> None:
        found: dict[str, list[bool]] = {"small": [], "medium": [], "large": []}
        for i, (pixels, objects) in enumerate(pictures):
            keep = keep_sampled(pixels, ratio, i, sampler)
            boxes, labels, scores, *_ = run_page(look, pixels, keep, mean_c4)
            hits = matched(boxes, labels, scores, objects)
            for one, hit in zip(objects, hits, strict=True):
                found[one["size"]].append(hit)
        found["all"] = [hit for hits in found.values() for hit in hits]
        for size, hits in found.items():
            share = f"{100 * sum(hits) / len(hits):.0f}" if hits else "-"
            numbers[f"{size}_{name}"] = share

    with torch.inference_mode():
        for share in (100, 50, 25, 10):
            shares(str(share), share / 100)
        shares("one", ONE_TOKEN)
        shares("without", 1, mean_c4=True)
        shares("block", 0.25, "block")
        for sampler in ("random", "block"):
            numbers[f"error_{sampler}"] = painting_error(painter, pictures, sampler)
        numbers |= attention_numbers(look, pictures)
        picture = stranger(model.resize.short_side or 256)
        _, labels, scores, *_ = run_page(look, picture, keep_sampled(picture, 1, 0))
        sure = labels[scores >= OBJECT].tolist()
        numbers["stranger"] = str(len(sure))
        names = sorted({model.categories[label] for label in sure})
        numbers["stranger_names"] = ", ".join(names) or "nothing"
    return numbers


def keep_sampled(pixels: "Tensor", ratio: float, seed: int, sampler: str = "random") -> "Tensor":
    """Places of a sample of a picture's tokens (K,); at least one."""
    import torch

    from mimdet.inference import generator_for
    from mimdet.models.sampling import SAMPLERS, select, token_grid

    grid = token_grid(pixels.shape[1], pixels.shape[2])
    tokens = torch.empty(grid[0] * grid[1], 1)
    scores = SAMPLERS[sampler](tokens, grid, generator_for(seed, tokens.device))
    return select([scores], [grid], grid, ratio).keep[0]


def run_page(model: Any, pixels: "Tensor", keep: "Tensor", mean_c4: bool = False) -> Any:
    """What `ExportedDetector` says of a picture that needs no padding."""
    import torch

    from mimdet.models.rcnn import pad_and_normalise

    batch = pad_and_normalise([pixels], model)
    size = torch.tensor(batch.image_sizes[0])
    return model(batch.tensors, keep, size, torch.tensor(mean_c4))


def matched(
    boxes: "Tensor", labels: "Tensor", scores: "Tensor", objects: Sequence[dict[str, Any]]
) -> list[bool]:
    """Whether each object is found; a detection, best first, finds one object."""
    import torch
    from torchvision.ops import box_iou

    hits = [False] * len(objects)
    if not objects:
        return hits
    overlap = box_iou(boxes, torch.tensor([one["box"] for one in objects]))
    for row, label, score in zip(overlap.tolist(), labels.tolist(), scores.tolist(), strict=True):
        free = [
            (iou, i)
            for i, iou in enumerate(row)
            if not hits[i] and objects[i]["label"] == label and iou >= OBJECT
        ]
        if score >= OBJECT and free:
            hits[max(free)[1]] = True
    return hits


def painting_error(painter: "MAE", pictures: Sequence[Any], sampler: str) -> str:
    """Root of the mean squared error of hidden pixels at a quarter of the tokens, 0..255."""
    import torch

    from mimdet.models.mae import patchify
    from mimdet.models.rcnn import IMAGENET_STD, pad_and_normalise
    from mimdet.models.sampling import Sample

    squares = []
    for i, (pixels, _) in enumerate(pictures):
        images = pad_and_normalise([pixels], painter).tensors
        grid = (pixels.shape[1] // painter.patch_size, pixels.shape[2] // painter.patch_size)
        sample = Sample([keep_sampled(pixels, 0.25, i, sampler)], grid)
        painted = painter.reconstruct(images, painter(images, sample=sample)).painted
        apart = (painted - images) * torch.tensor(IMAGENET_STD)[:, None, None]
        hidden = ~sample.mask().flatten(1)
        squares.append(patchify(apart, painter.patch_size)[hidden].square().mean())
    return f"{float(torch.stack(squares).mean().sqrt()):.0f}"


def attention_numbers(look: Any, pictures: Sequence[Any]) -> dict[str, str]:
    """Of tokens on objects, half of all being kept: how many patches away the first and the last
    block look on average, and how far an even look would go."""
    import torch

    distances: list[Tensor] = []
    for i, (pixels, objects) in enumerate(pictures):
        keep = keep_sampled(pixels, 0.5, i)
        attention = run_page(look, pixels, keep)[-1].mean(1)  # (blocks, K, K)
        places = torch.stack([keep // (pixels.shape[2] // 16), keep % (pixels.shape[2] // 16)], 1)
        away = torch.cdist(places.float(), places.float())  # (K, K)
        even = torch.full_like(away, 1 / len(keep))
        steps = (torch.stack([*attention, even]) * away).sum(2)  # (blocks + 1, K)
        for one in objects:
            centre = torch.tensor([one["box"][1] + one["box"][3], one["box"][0] + one["box"][2]])
            nearest = int((places * 16 + 8 - centre / 2).square().sum(1).argmin())
            distances.append(steps[:, nearest])
    if not distances:
        return {"away_first": "-", "away_last": "-", "away_even": "-"}
    mean = torch.stack(distances).mean(0)
    shown = {"away_first": mean[0], "away_last": mean[-2], "away_even": mean[-1]}
    return {name: f"{float(value):.1f}" for name, value in shown.items()}
