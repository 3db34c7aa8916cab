"""A real browser for tests: an installed Chromium, driven by playwright. None is downloaded."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--no-sandbox",  # a container's root may not have one
    "--disable-gpu",
    "--disable-dev-shm-usage",  # containers have little of it
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PICTURES = Path(__file__).resolve().parents[2] / "build" / "browser"
"""Where screenshots go, to be looked at."""


def chromium_path() -> str:
    """The browser: CHROMIUM, or the first of NAMES on the path; "" = there is none."""
    given = os.environ.get("CHROMIUM", "")
    return given or next((found for name in NAMES if (found := shutil.which(name))), "")


def skip_without_browser() -> None:
    """Skip the test module that calls this, with the reason, where no browser can be driven."""
    pytest.importorskip("playwright", reason="playwright is not installed: .[browser]")
    if not chromium_path():
        reason = "no Chromium: apt-get install chromium, or name its file in CHROMIUM"
        pytest.skip(reason, allow_module_level=True)


class Page:
    """A page, and what went wrong in it."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.errors: list[str] = []
        """Errors of the console, exceptions, and requests that leave this machine."""
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.errors.append(f"exception: {error}"))
        page.on("request", self._request)

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(f"console: {message.text}")

    def _request(self, request: Any) -> None:
        if request.url.startswith("http") and "//127.0.0.1:" not in request.url:
            self.errors.append(f"request to {request.url}")

    def picture(self, name: str, locator: Any = None) -> Path:
        """Keep a screenshot of the page, or of a part of it, in `build/browser`."""
        PICTURES.mkdir(parents=True, exist_ok=True)
        path = PICTURES / f"{name}.png"
        (locator or self.page).screenshot(path=path)
        return path


@contextmanager
def open_page(width: int = 1400, height: int = 1100, seconds: float = 180) -> Iterator[Page]:
    """A page of a browser of its own; seconds: patience with every single action."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=list(FLAGS))
        try:
            page = browser.new_context(viewport={"width": width, "height": height}).new_page()
            page.set_default_timeout(1000 * seconds)
            yield Page(page)
        finally:
            browser.close()
