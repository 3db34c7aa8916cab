"""How much code there is: `python tools/count_code.py [FOLDER]`, files and code lines by folder.

A code line holds something that is neither comment nor docstring. The limits stand in
tests/unit/test_layers.py.
"""

import argparse
import ast
import io
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "mimdet"
CORE = (
    "config.py",
    "structures.py",
    "images.py",
    "inference.py",
    "models/*.py",
    "data/annotations.py",
    "data/coco.py",
    "data/coco_file.py",
    "data/augment.py",
    "data/loader.py",
    "data/rasters.py",
    "analysis/evaluate.py",
    "analysis/metrics.py",
)
"""The path of the paper, from configuration to AP; without baselines and exported programs."""
BESIDE = {"models/baselines.py", "models/exported.py"}
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
"""Tokens that do not make a line a code line."""


def code_lines(source: str) -> int:
    """Code lines of a file; a string of several lines counts with all of them."""
    used: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            used.update(range(token.start[0], token.end[0] + 1))
    return len(used - docstring_lines(source))


def docstring_lines(source: str) -> set[int]:
    """Lines of strings that stand alone as a statement: docstrings, of fields too."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def count(folder: Path) -> dict[str, int]:
    """File below the folder -> its code lines."""
    return {
        path.relative_to(folder).as_posix(): code_lines(path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.py"))
    }


def core_files(folder: Path = PACKAGE) -> set[str]:
    found = {path.relative_to(folder).as_posix() for name in CORE for path in folder.glob(name)}
    return found - BESIDE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=PACKAGE)
    folder = parser.parse_args().folder
    counts = count(folder)
    rooms: dict[str, list[int]] = {}
    for name, lines in counts.items():
        rooms.setdefault(name.split("/")[0] if "/" in name else ".", []).append(lines)
    print(f"{'folder':<14}{'files':>6}{'code lines':>12}")
    for room, lines_of in [*sorted(rooms.items()), ("in all", list(counts.values()))]:
        print(f"{room:<14}{len(lines_of):>6}{sum(lines_of):>12,}")
    if folder == PACKAGE:
        core = core_files()
        print(f"{'core path':<14}{len(core):>6}{sum(counts[name] for name in core):>12,}")


if __name__ == "__main__":
    main()
