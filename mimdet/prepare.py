"""`mimdet convert | split | check-data`: annotations of one's own, made ready for a training."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from mimdet.files import write_json

Run = Annotated[Positional[str], tyro.conf.arg(metavar="RUN")]
File = Annotated[Positional[str], tyro.conf.arg(metavar="FILE")]
Folder = Annotated[Positional[str], tyro.conf.arg(metavar="FOLDER")]
Source = Annotated[Positional[str], tyro.conf.arg(metavar="SOURCE")]


def check_data(
    annotations: File,
    images: Folder,
    examples: int = 3,
    quick: bool = False,
    json: str = "",
    against: str = "",
    against_images: str = "",
) -> None:
    """Say what is wrong with a COCO-format data set, and where. Exit code 1 if anything is.

    Args:
        annotations: The json file.
        images: The image folder.
        examples: Examples shown of each kind of problem.
        quick: Read only the headers of the image files.
        json: Write the whole report to this file.
        against: Another annotation file, of a set that must share no image with this one: images
            of the same bytes, or that look nearly the same, are reported with both files.
        against_images: Its image folder.
    """
    from mimdet.data.checks import check_dataset
    from mimdet.data.splits import shared_images

    report = check_dataset(annotations, images, decode=not quick, progress=True)
    if bool(against) != bool(against_images):
        raise ValueError("--against FILE and --against-images FOLDER belong together")
    if against:
        report.problems += shared_images((annotations, images), (against, against_images))
    print(report.table(examples))
    if json:
        write_json(json, report.to_dict())
    if not report.ok:
        sys.exit(1)


def convert(
    source: Source,
    out: File,
    kind: Literal["", "voc", "yolo", "labelme", "masks", "table"] = "",
    images: str = "",
    split: str = "train",
    names: tuple[str, ...] = (),
    bbox_format: Literal["", "xywh", "xyxy", "cxcywh_normalised"] = "",
) -> None:
    """Turn VOC xml, YOLO txt, LabelMe json, masks as PNG or a Hugging Face table into COCO json.

    Says what was found and what COCO has no room for. Images stay where they are; those of a table
    are written to a folder beside the json.

    Args:
        source: The folder of annotation files, a YOLO data.yaml, or a table's folder.
        out: The json to write.
        kind: What SOURCE holds, where that is not recognised.
        images: Folder of the images, where they are not beside the annotations.
        split: Which one, of a data.yaml or a table.
        names: Classes in the order of YOLO's numbers, without a data.yaml; or the class of masks.
        bbox_format: Of a table.
    """
    from mimdet.data.formats import convert

    made = convert(
        source, out, kind=kind, images=images, split=split, names=names, bbox_format=bbox_format
    )
    print(f"{made}\n{out}: next, mimdet check-data {out} {made.folder}")


def split(
    annotations: File,
    out: Folder,
    share: float = 0.2,
    by_name: str = "",
    by_field: str = "",
    seed: int = 0,
) -> None:
    """Split a COCO json into OUT/train.json and OUT/val.json, each class in proportion.

    The images stay in their one folder. Neighbouring frames of a video, or pictures of one patient,
    belong into one of the two: say what they have in common.

    Args:
        annotations: The json file.
        out: Folder for the two files.
        share: Of the images, for val.json.
        by_name: Regular expression that finds the group in an image's file name: its first pair of
            brackets, else all that it matches. "^([^_]+)_" takes what stands before the first _.
        by_field: Field of the images' entries that names their group.
        seed: Of the draw.
    """
    from mimdet.data.splits import split_file

    print(split_file(annotations, out, share, by_name=by_name, by_field=by_field, seed=seed))


def start(
    data: Folder,
    run: Run,
    images: str = "",
    minutes: float = 10.0,
    turns: bool = False,
    init_from: str = "",
    names: tuple[str, ...] = (),
    yes: bool = False,
) -> None:
    """Look at pictures of your own, propose a training with reasons and its time, train on a yes.

    Annotations of another format are converted, one file is split, into the folder RUN-data. A few
    steps are trained to measure the time.

    Args:
        data: Folder of pictures and annotations.
        run: Directory of the run; its config.json is written first, and may be changed.
        images: Folder of the images, where they are not under DATA.
        minutes: That the training may take.
        turns: Every turn of a picture is as likely: microscopy, pictures from above.
        init_from: Weights to start from; default: the detector that comes with the package.
        names: Classes, where the annotations hold numbers or masks alone.
        yes: Train without asking.
    """
    from mimdet.training.proposal import propose, write
    from mimdet.training.train import resume, show_progress

    if (Path(run) / "config.json").exists():
        raise ValueError(f"{run} holds a run already: `mimdet resume {run}`, or another name")
    proposal = propose(
        data,
        f"{run}-data",
        images=images,
        minutes=minutes,
        turns=turns,
        init_from=init_from,
        names=names,
    )
    print(proposal.table())
    write(proposal, run)
    print(f"in {run}: config.json, to change and train (mimdet resume {run})")
    if not yes and not (sys.stdin.isatty() and input("Train now? [y/N] ").lower() in ("y", "yes")):
        print(f"not trained yet: mimdet resume {run}")
        return
    for _ in show_progress(resume(run, announce=True)):
        pass
    print(f"done: {run}; next: mimdet evaluate {run}, mimdet errors {run}")
