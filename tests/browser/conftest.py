"""One JupyterLab and one page for all tests of this folder; both end with them."""

from collections.abc import Iterator

import pytest

from tests.browser.chromium import Page, open_page
from tests.browser.lab import Server, jupyterlab


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with jupyterlab(tmp_path_factory.mktemp("lab")) as server:
        yield server


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with open_page() as page:
        yield page
