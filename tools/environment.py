"""Write environment.yml from pyproject.toml.

    python tools/environment.py           write it
    python tools/environment.py --check   exit 1 when it is not what pyproject.toml says

Everything comes from conda-forge, apart from PyTorch and what is compiled or tested against it:
those come from pip, so that conda users get the same builds as everybody else.
"""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("notebooks", "test")
FROM_PIP = ("torch", "torchvision", "timm")
CONDA_NAMES = {"matplotlib": "matplotlib-base"}  # without the Qt window toolkit
HEADER = "# Generated from pyproject.toml by tools/environment.py: edit that, then run this.\n"


def environment_text(pyproject: str) -> str:
    """The contents of environment.yml for the contents of pyproject.toml.

    Raises ValueError for a requirement that conda has no notation for.
    """
    project = tomllib.loads(pyproject)["project"]
    requirements = list(project["dependencies"])
    for extra in EXTRAS:
        requirements += project["optional-dependencies"][extra]
    requirements = list(dict.fromkeys(requirements))  # extras may share one

    pip = [r for r in requirements if split(r)[0] in FROM_PIP]
    conda = [f"python {project['requires-python']},<{newest_python(project)}", "pip"]
    for requirement in requirements:
        if requirement not in pip:
            name, bounds = split(requirement)
            conda.append(f"{CONDA_NAMES.get(name, name)} {bounds}".rstrip())

    lines = [f"name: {project['name']}", "channels:", "  - conda-forge", "  - nodefaults"]
    lines += ["dependencies:", *(f'  - "{spec}"' for spec in conda), "  - pip:"]
    lines += [f'      - "{spec}"' for spec in [*pip, "-e ."]]
    return HEADER + "\n".join(lines) + "\n"


def split(requirement: str) -> tuple[str, str]:
    """`"numpy>=1.26,<3"` -> `("numpy", ">=1.26,<3")`."""
    found = re.fullmatch(r"([A-Za-z0-9._-]+)((?:[<>=!]=?[0-9.]+,?)*)", requirement.replace(" ", ""))
    if found is None:
        raise ValueError(
            f"pyproject.toml: {requirement!r} has an extra, a marker or a URL, which conda cannot "
            "express; use plain bounds such as 'name>=1.2'"
        )
    return found[1], found[2]


def newest_python(project: dict[str, Any]) -> str:
    """The first Python after the classifiers' newest: conda would pick one without wheels."""
    found = re.findall(r"Python :: 3\.(\d+)", "\n".join(project["classifiers"]))
    return f"3.{max(map(int, found)) + 1}"


def main(arguments: list[str]) -> int:
    text = environment_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    target = ROOT / "environment.yml"
    if "--check" not in arguments:
        target.write_text(text, encoding="utf-8")
        return 0
    if target.exists() and target.read_text(encoding="utf-8") == text:
        return 0
    print("environment.yml is not what pyproject.toml says: run python tools/environment.py")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
