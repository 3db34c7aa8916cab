"""The project's own promises: one source of dependencies, public names that work, true commands."""

import ast
import importlib.metadata
import re
import stat
import sys
import tomllib
from pathlib import Path

import pytest

import mimdet
from tools import environment

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PROJECT = tomllib.loads(PYPROJECT)["project"]
INSTALL_AND_RUN = "pip install -e . && mimdet demo"
INSTALL_AND_TEST = 'pip install -e ".[test]" && pytest -n 2 -m "not slow and not gpu"'


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_unknown_name_lists_the_choices() -> None:
    assert set(mimdet.__all__) <= set(dir(mimdet))
    with pytest.raises(AttributeError, match=r"no 'bild_detector'.*build_detector"):
        mimdet.bild_detector  # noqa: B018


def test_environment_by_hand_and_follows_pyproject() -> None:
    written = environment.environment_text(
        """
        [project]
        name = "kit"
        requires-python = ">=3.11"
        classifiers = ["Language :: Python :: 3.9", "Language :: Python :: 3.12"]
        dependencies = ["torch>=2.11", "matplotlib>=3.8,<4", "tqdm"]
        optional-dependencies = { notebooks = ["ipykernel>=7"], test = ["ipykernel>=7"] }
        """
    )
    assert written.split("dependencies:\n")[1].splitlines() == [
        '  - "python >=3.11,<3.13"',
        '  - "pip"',
        '  - "matplotlib-base >=3.8,<4"',
        '  - "tqdm"',
        '  - "ipykernel >=7"',
        "  - pip:",
        '      - "torch>=2.11"',
        '      - "-e ."',
    ]
    expected = environment.environment_text(PYPROJECT)
    assert text("environment.yml") == expected, "run python tools/environment.py"


@pytest.mark.parametrize("bad", ["a[b]>=1", "a; python_version<'3.12'", "a @ file:///b"])
def test_environment_refuses_what_conda_cannot_say(bad: str) -> None:
    with pytest.raises(ValueError, match="conda cannot"):
        environment.split(bad)


def test_every_dependency_has_a_bound_and_a_reason() -> None:
    names = "|".join(environment.split(r)[0] for r in PROJECT["dependencies"])
    lines = re.findall(rf'^ +"(?:{names})[<>=].*$', PYPROJECT, flags=re.MULTILINE)
    assert len(lines) >= len(PROJECT["dependencies"])
    for line in lines:
        assert re.search(r'">?[^"]*[<>=]+[0-9][^"]*",? +# \w', line), f"no bound or reason: {line}"


def test_dependencies_are_what_the_code_imports() -> None:
    """None missing from pyproject.toml, and none listed without use."""
    imported = set()
    for path in (ROOT / "mimdet").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imported.add(node.module.split(".")[0])
    imported -= set(sys.stdlib_module_names) | {"mimdet"}

    distributions = importlib.metadata.packages_distributions()
    used = {_plain(distributions[name][0]) for name in imported}
    of = PROJECT["optional-dependencies"]
    extras = [*of["notebooks"], *of["export"]]
    required = {_plain(environment.split(r)[0]) for r in PROJECT["dependencies"]}
    optional = {_plain(environment.split(r)[0]) for r in extras} | {"ipython"}
    assert used - required - optional == set(), "imported, but not in pyproject.toml"
    assert required - used == set(), "in pyproject.toml, but nothing imports it"


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def test_readme_is_short_and_its_commands_are_those_of_ci() -> None:
    assert len(text("README.md").split()) <= 1600
    assert INSTALL_AND_RUN in text("README.md")
    assert INSTALL_AND_TEST in text("README.md")
    assert INSTALL_AND_TEST.split(" && ")[1] in text(".ci/run")
    assert (ROOT / ".ci" / "run").stat().st_mode & stat.S_IXUSR
    assert f"## [{mimdet.__version__}]" in text("CHANGELOG.md")
    assert f"version: {mimdet.__version__}" in text("CITATION.cff")


def test_tests_that_the_docs_name_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text("docs/wrong_but_plausible.md"))
    assert len(named) >= 40
    for file, name in named:
        assert f"\ndef {name}(" in text(file), f"there is no {file}::{name}"


PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += [str(page.relative_to(ROOT)) for page in ROOT.glob("docs/**/*.md")]
PAGES.remove("docs/slides.md")  # its figures are cells of notebooks: test_site.py


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_to_files(page: str) -> None:
    """And a link into a page to one of its headings."""
    path = ROOT / page
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text(page))
    for file, heading in links:
        if file.startswith("http"):
            continue
        target = path.parent / file if file else path
        assert target.exists(), f"{page} links to {file}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", t).strip().lower().replace(" ", "-") for t in titles]
            assert heading in anchors, f"{page} links to {file}#{heading}"
