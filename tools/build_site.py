"""Build the documentation site into build/site: `python tools/build_site.py`.

Pages are the repository's own Markdown files, the notebooks with their stored outputs (nothing is
run) and the docstrings of the package; slides are made from docs/slides.md and the notebooks'
figures. Any warning, any link within the site that leads nowhere, a public name that is missing
and a slide without its figure are errors. Needs `pip install -e ".[docs]"`, and no network.
"""

import re
import sys
import time
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "site"
SLIDES = ROOT / "docs" / "slides.md"
FIGURE = re.compile(r'!\[\]\((\d\d_\w+) "([^"]+)"\)')
"""`![](02_token_sampling "code of its cell")`: a figure of a notebook."""
FRONT = '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html">\n'


# ------------------------------------------------------------------------------- slides


def figure(name: str, code: str, notebooks: Path) -> str:
    """The first picture below the one code cell that holds `code`, with its text, as HTML.

    Raises ValueError when no cell or several hold it, or when none of its outputs is a picture.
    """
    cells = nbformat.read(notebooks / f"{name}.ipynb", as_version=4).cells
    found = [cell for cell in cells if cell.cell_type == "code" and code in cell.source]
    if len(found) != 1:
        raise ValueError(f"docs/slides.md: {len(found)} cells of {name} hold {code!r}; name one")
    for output in found[0].outputs:
        for kind, data in output.get("data", {}).items():
            if kind.startswith("image/"):
                alt = escape(output.metadata.get(kind, {}).get("alt", ""))
                source = f"data:{kind};base64,{''.join(data.split())}"
                return f'<figure class="step"><img alt="{alt}" src="{source}"></figure>'
    raise ValueError(f"docs/slides.md: the cell of {name} with {code!r} stores no picture")


def slides(text: str, style: str, notebooks: Path) -> str:
    """A page of slides that holds everything it shows.

    text: Markdown; `---` parts the slides; a picture and a quotation (the answer) wait for a key.
    """
    markdown = MarkdownIt("commonmark", {"html": True}).enable("table")
    parts = []
    for slide in re.split(r"^---$", text, flags=re.MULTILINE):
        whole = FIGURE.sub(lambda found: figure(found[1], found[2], notebooks), slide)
        html = markdown.render(whole).replace("<blockquote>", '<blockquote class="step">')
        parts.append(f"<section>\n{html}</section>")
    title = re.search(r"^# (.*)$", text, flags=re.MULTILINE)
    page = style.replace("TITLE", title[1] if title else "slides")
    return page.replace("SLIDES", "\n".join(parts))


# ------------------------------------------------------------------------------- links


class Links(HTMLParser):
    """The places of a page and where its links lead."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.places: set[str] = set()
        self.links: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name"):
                self.places.add(value or "")
            elif name in ("href", "src") and tag != "base":
                self.links.append(value or "")


def broken_links(site: Path) -> list[str]:
    """`PAGE: LINK` of every link that stays in the site and leads to no file or place of it."""
    pages = {page.resolve(): Links(page) for page in site.rglob("*.html")}
    broken = []
    for page, parsed in pages.items():
        for link in parsed.links:
            address = urlsplit(link)
            if address.scheme or address.netloc:
                continue
            target = (page.parent / unquote(address.path)).resolve() if address.path else page
            place = unquote(address.fragment)
            places = pages[target].places if target in pages else {place}
            if not target.is_file() or (place and place not in places):
                broken.append(f"{page.relative_to(site.resolve())}: {link}")
    return broken


# ------------------------------------------------------------------------------- the command


def missing_names(site: Path) -> list[str]:
    """Public names without a place on the page of the package."""
    import mimdet

    places = Links(site / "docs" / "api" / "python.html").places
    names = set(mimdet.__all__) - {"__version__", "presets"}  # a text; a module with a page
    return sorted(name for name in names if f"mimdet.{name}" not in places)


def main() -> int:
    from sphinx.cmd.build import main as sphinx

    start = time.perf_counter()
    options = "--quiet --fail-on-warning --fresh-env --write-all"
    if sphinx([*options.split(), "-c", str(ROOT / "docs"), str(ROOT), str(SITE)]):
        return 1
    (SITE / "index.html").write_text(FRONT, encoding="utf-8")
    style = (ROOT / "docs" / "slides.template.html").read_text(encoding="utf-8")
    try:
        page = slides(SLIDES.read_text(encoding="utf-8"), style, ROOT / "notebooks")
    except ValueError as error:
        print(error)
        return 1
    (SITE / "docs" / "slides.html").write_text(page, encoding="utf-8")
    problems = [f"leads nowhere: {link}" for link in broken_links(SITE)]
    problems += [f"is not documented: mimdet.{name}" for name in missing_names(SITE)]
    pages = len(list(SITE.rglob("*.html")))
    seconds = time.perf_counter() - start
    print("\n".join(problems) or f"{pages} pages in {seconds:.0f} s: {SITE / 'index.html'}")
    return min(len(problems), 1)


if __name__ == "__main__":
    sys.exit(main())
