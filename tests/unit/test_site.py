"""The site's own parts: slides from stored figures, links that are looked up."""

from pathlib import Path

import nbformat
import pytest

from tools import build_site, notebooks

PIXEL = "iVBORw0KGgo="


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A notebook with a picture below its first cell and a text below its second."""
    cells = [nbformat.v4.new_code_cell(code) for code in ("show(one)", "show(two)")]
    data = {"image/png": PIXEL, "text/plain": "a figure"}
    alt = {"image/png": {"alt": 'a "dot"'}}
    cells[0].outputs = [nbformat.v4.new_output("display_data", data, metadata=alt)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "00_small.ipynb")
    return tmp_path


def test_slides_hold_their_figures_and_hide_the_answers(folder: Path) -> None:
    text = '# Title\n\n---\n\n## Why?\n\n![](00_small "show(one)")\n\n> Because.\n'
    page = build_site.slides(text, "<title>TITLE</title>SLIDES", folder)
    assert page.startswith("<title>Title</title>") and page.count("<section>") == 2
    assert f'<img alt="a &quot;dot&quot;" src="data:image/png;base64,{PIXEL}">' in page
    assert '<blockquote class="step">\n<p>Because.' in page


@pytest.mark.parametrize(
    ("code", "said"), [("show(", "2 cells"), ("show(two)", "stores no picture"), ("x", "0 cells")]
)
def test_a_slide_without_its_figure_is_an_error(folder: Path, code: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_site.slides(f'![](00_small "{code}")', "SLIDES", folder)


def test_every_figure_of_the_slides_has_one_cell() -> None:
    figures = build_site.FIGURE.findall(build_site.SLIDES.read_text(encoding="utf-8"))
    assert len(figures) >= 7
    for name, code in figures:
        cells = notebooks.read_source(notebooks.FOLDER / "py" / f"{name}.py").cells
        found = [cell for cell in cells if cell.cell_type == "code" and code in cell.source]
        assert len(found) == 1, f"docs/slides.md: {len(found)} cells of {name} hold {code!r}"


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="b.html#there">1</a><a href="#top">2</a><a href="c.html">3</a>'
        '<a href="b.html#gone">4</a><img src="d.png"><a href="https://example.org/none">5</a>'
    )
    (tmp_path / "b.html").write_text('<p id="there"></p>')
    assert build_site.broken_links(tmp_path) == [
        "a.html: c.html",
        "a.html: b.html#gone",
        "a.html: d.png",
    ]
