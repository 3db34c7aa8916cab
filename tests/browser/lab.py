"""A private JupyterLab for tests, and what a person does in it.

The server has folders, a port and a token of its own; it and its kernels end with the test.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from tests.browser.chromium import Page

try:
    from playwright.sync_api import TimeoutError
except ImportError:  # the tests skip
    TimeoutError = OSError  # type: ignore[misc,assignment]

START_SECONDS = 240
SETTINGS = {
    # Cells outside the window stay in the page.
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension:notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
    },
}
# A message sent before the kernel is connected is lost without a word.
CONNECTED = """async () => {
  const panel = window.jupyterapp.shell.currentWidget;
  await panel.context.ready;
  await panel.sessionContext.ready;
  const kernel = panel.sessionContext.session.kernel;
  while (kernel.connectionStatus !== "connected") await new Promise((r) => setTimeout(r, 50));
  return kernel.id;
}"""
TRIES = 3  # a kernel that dies while it starts takes the first message with it
BEGUN = """() => [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")]
  .some((prompt) => /\\[[\\d*]+\\]/.test(prompt.textContent))"""
CODE = (
    "window.jupyterapp.shell.currentWidget.content.widgets.filter((w) => w.model.type === 'code')"
)
# By its model: the prompt of a cell whose source is hidden is not shown.
ALL_RUN = f"() => {CODE}.length > 0 && {CODE}.every((w) => w.model.executionCount !== null)"
RUN_ALL = f"""() => {{
  {CODE}.forEach((w) => (w.model.executionCount = null));
  void window.jupyterapp.commands.execute("notebook:run-all-cells");
}}"""
RUN_LAST = """(source) => {
  const notebook = window.jupyterapp.shell.currentWidget.content;
  notebook.activeCellIndex = notebook.widgets.length - 1;
  const cell = notebook.activeCell.model;
  cell.sharedModel.setSource(source);
  cell.outputs.clear();
  cell.executionCount = null;
  void window.jupyterapp.commands.execute("notebook:run-cell");
}"""
RESTART = "jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()"
CANVASES = ".jp-OutputArea canvas.mimdet-canvas"
ANSWERS = (
    f"[...document.querySelectorAll('{CANVASES}')]"
    ".reduce((sum, canvas) => sum + Number(canvas.dataset.seq ?? 0), 0)"
)
# From the person's last event before the last picture to that picture (a panel may answer the
# pointer that goes down before it goes up again); quiet: none has come for a while.
STOPWATCH = """() => {
  const now = () => performance.now();
  const start = { event: 0, answer: 0, took: 0 };
  if (window.stopwatch) return void Object.assign(window.stopwatch, start);
  window.stopwatch = { ...start, quiet: () => now() - window.stopwatch.answer > 250 };
  for (const event of ["pointerdown", "pointerup", "keydown", "change"])
    document.addEventListener(event, () => (window.stopwatch.event = now()), true);
  const seen = new MutationObserver(() => {
    window.stopwatch.answer = now();
    window.stopwatch.took = window.stopwatch.answer - window.stopwatch.event;
  });
  seen.observe(document.body, { subtree: true, attributeFilter: ["data-seq"] });
}"""
BROKEN = (
    '[data-mime-type="application/vnd.jupyter.error"], '
    '[data-mime-type="application/vnd.jupyter.stderr"], .jupyter-widgets-error-widget'
)


@dataclass(frozen=True, slots=True)
class Server:
    url: str
    token: str
    folder: Path
    """What it serves."""


@contextmanager
def jupyterlab(folder: Path) -> Iterator[Server]:
    """A JupyterLab that serves `folder/notebooks`; its own files are elsewhere in `folder`."""
    served, token = folder / "notebooks", secrets.token_hex(16)
    served.mkdir()
    (folder / "config" / "labconfig").mkdir(parents=True)
    overrides = folder / "config" / "labconfig" / "default_setting_overrides.json"
    overrides.write_text(json.dumps(SETTINGS))
    places = {
        "HOME": folder,
        "JUPYTER_CONFIG_DIR": folder / "config",
        "JUPYTER_DATA_DIR": folder / "data",
        "JUPYTER_RUNTIME_DIR": folder / "runtime",
        "IPYTHONDIR": folder / "ipython",
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ip=127.0.0.1", "--port=0", "--ServerApp.port_retries=0"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={served}"]
    command += ["--LabApp.expose_app_in_browser=True"]  # window.jupyterapp
    # Should the tests be killed, it ends by itself.
    command += ["--ServerApp.shutdown_no_activity_timeout=900"]
    command += ["--MappingKernelManager.cull_idle_timeout=900"]
    command += [f"--LabApp.{kind}_dir={folder / kind}" for kind in ("workspaces", "user_settings")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **{name: str(place) for name, place in places.items()}},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Server(_wait_for(process, folder, token), token, served)
    finally:
        _end(process)


def _wait_for(process: subprocess.Popen[bytes], folder: Path, token: str) -> str:
    """The address of the server, once it answers."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        for file in (folder / "runtime").glob("jpserver-*.json"):
            with suppress(OSError, ValueError, KeyError):  # half written, or not listening yet
                url = f"http://127.0.0.1:{json.loads(file.read_text())['port']}"
                urllib.request.urlopen(f"{url}/api/status?token={token}", timeout=5).close()
                return url
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{(folder / 'log').read_text()[-2000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server with its kernels: the group that was started here, no other."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
            return


class Notebook:
    """A notebook that is open in JupyterLab."""

    def __init__(self, server: Server, page: Page, name: str, cells: list[Any]) -> None:
        """Write a notebook of these cells, of the code of those that are text; open it and wait for
        its kernel."""
        self.browser, self.page = page, page.page
        notebook = nbformat.v4.new_notebook()
        code = nbformat.v4.new_code_cell
        notebook.cells = [code(cell) if isinstance(cell, str) else cell for cell in cells]
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
        nbformat.write(notebook, server.folder / f"{name}.ipynb")
        address = f"{server.url}/lab/tree/{name}.ipynb?token={server.token}&reset"
        self.page.goto(address, wait_until="domcontentloaded")
        self.page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell")
        self.page.wait_for_function("window.jupyterapp !== undefined")
        self.kernel = f"{server.url}/api/kernels/{self.page.evaluate(CONNECTED)}"
        self.token = server.token

    def run_all(self, seconds: float = 300) -> None:
        """Run every cell. AssertionError with the text of an error or of anything on stderr."""
        # Not awaited: evaluate() would wait as long as the cells take, without a limit.
        for _ in range(TRIES):
            self.page.evaluate(RUN_ALL)
            with suppress(TimeoutError):
                self.page.wait_for_function(BEGUN, timeout=15_000)
                break
        self._wait_for_prompts(seconds)

    def run_last(self, source: str, seconds: float = 300) -> None:
        """Give the last cell another source and run it in the kernel as it is. Errors as above."""
        self.page.evaluate(RUN_LAST, source)
        self._wait_for_prompts(seconds)

    def _wait_for_prompts(self, seconds: float) -> None:
        try:
            self.page.wait_for_function(ALL_RUN, timeout=1000 * seconds)
        except TimeoutError:
            self.browser.picture("not_run")
            raise
        said = self.page.locator(BROKEN).all_inner_texts()
        assert said == [], "\n".join(said)

    def restart(self) -> None:
        """Another kernel, which knows nothing yet."""
        self.page.evaluate(RESTART)
        self.page.evaluate(CONNECTED)

    def close(self) -> None:
        """Leave the page and end the kernel."""
        self.page.goto("about:blank")
        request = urllib.request.Request(f"{self.kernel}?token={self.token}", method="DELETE")
        urllib.request.urlopen(request, timeout=60).close()

    def find(self, name: str) -> Any:
        """The element with this CSS class in the outputs, such as a control of a panel."""
        return self.page.locator(f".jp-OutputArea .{name}").first

    # The verbs of a person: each acts on the widget with this CSS class.

    def choose(self, name: str, index: int) -> None:
        """Take the entry number `index` of a list."""
        self.find(name).locator("select").select_option(index=index)

    def slide(self, name: str, key: str = "ArrowRight") -> None:
        """Move a slider by a key."""
        self.find(name).locator(".noUi-handle").focus()
        self.page.keyboard.press(key)

    def write(self, name: str, text: str) -> None:
        """Replace the contents of a field."""
        self.find(name).locator("input").fill(text)
        self.page.keyboard.press("Tab")

    def toggle(self, name: str, text: str) -> None:
        """Press one of several buttons."""
        self.find(name).get_by_role("button", name=text).click()

    def tick(self, name: str) -> None:
        self.find(name).locator("input").click()

    def press(self, name: str) -> None:
        self.find(name).click()

    def upload(self, name: str, file: str, content: bytes) -> None:
        """Give a file to an upload button."""
        with self.page.expect_file_chooser() as chooser:
            self.find(name).click()
        chooser.value.set_files({"name": file, "mimeType": "image/png", "buffer": content})

    def click_canvas(self, index: int, right: float, down: float) -> None:
        """Click at a share of the width and height of the canvas number `index`."""
        box = self._box(index)
        self.page.mouse.click(box["x"] + right * box["width"], box["y"] + down * box["height"])

    def stroke(self, index: int, down: float) -> None:
        """Brush from the left to the middle of a canvas, at a share of its height."""
        box = self._box(index)
        height = box["y"] + down * box["height"]
        self.page.mouse.move(box["x"] + 0.05 * box["width"], height)
        self.page.mouse.down()
        self.page.mouse.move(box["x"] + 0.5 * box["width"], height, steps=8)
        self.page.mouse.up()

    def _box(self, index: int) -> dict[str, float]:
        canvas = self.page.locator(CANVASES).nth(index)
        canvas.scroll_into_view_if_needed()
        return canvas.bounding_box()

    # What it shows.

    def pictures(self) -> list[str]:
        """What every visible canvas shows, as text to compare."""
        return self.page.evaluate(
            "(canvases) => [...document.querySelectorAll(canvases)]"
            ".filter((c) => c.offsetParent).map((c) => c.toDataURL())",
            CANVASES,
        )

    def answers(self) -> int:
        """How often Python has answered, as far as it is on the screen, over all canvases."""
        return self.page.evaluate(f"() => {ANSWERS}")

    def status(self) -> str:
        return self.find("mimdet-status").inner_text()

    def answer_to(self, action: Callable[[], object], seconds: float = 120) -> float:
        """Do something and wait for the answer; milliseconds from the event to the new picture."""
        before = self.answers()
        self.page.evaluate(STOPWATCH)
        action()
        self.page.wait_for_function(
            f"(before) => {ANSWERS} > before && window.stopwatch.quiet()",
            arg=before,
            timeout=1000 * seconds,
        )
        return self.page.evaluate("() => window.stopwatch.took")
