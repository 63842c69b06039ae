"""A JupyterLab server and a headless Chromium.

Skipped where there is no chromium or chromedriver.
"""

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

TOKEN = "course"
SCREENSHOTS = Path(__file__).parents[2] / "work_dirs" / "browser"


@pytest.fixture(scope="session")
def chromium():
    webdriver = pytest.importorskip("selenium.webdriver")
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(paths):
        pytest.skip("no chromium or chromedriver (Debian: apt-get install chromium "
                    "chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage",
                     "--window-size=1400,1600"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths[1]))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="session")
def server(folder):
    """The address of a JupyterLab in `folder`, with settings of its own and the packages of this
    Python."""
    port = _free_port()
    home = folder / ".settings"
    quiet = home / "lab" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false"}')  # else a question about news lies over the page
    environment = os.environ | {f"JUPYTER_{kind}_DIR": str(home / kind)
                                for kind in ("CONFIG", "DATA", "RUNTIME")} | {
        "JUPYTERLAB_SETTINGS_DIR": str(home / "lab"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # fmt: skip
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root",
               "--expose-app-in-browser",
               f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}",
               f"--ServerApp.root_dir={folder}"]  # fmt: skip
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    _wait_for(address, process, folder / "server.log")
    yield address
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:  # a busy kernel; it goes when its server is gone
        process.kill()


def _free_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait_for(address, process, log):
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=2)
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)
    raise AssertionError(f"JupyterLab did not answer:\n{log.read_text()}")


class Page:
    """One notebook, open in JupyterLab."""

    def __init__(self, driver, address, name):
        from selenium.common.exceptions import StaleElementReferenceException

        self.driver, self.gone = driver, StaleElementReferenceException
        driver.get(f"{address}/lab/tree/{name}?token={TOKEN}&reset")
        self.wait(lambda: self.find(".jp-Notebook .jp-CodeCell"))
        self.wait(lambda: driver.execute_script("return !!window.jupyterapp"))

    def find(self, selector):
        """All elements that are on the page, whether in view or not."""
        return self.driver.find_elements("css selector", selector)

    def wait(self, condition, seconds=60):
        """Ask until `condition()` is true, and return what it gave."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if found := condition():
                    return found
            except self.gone:  # an element may go while it is looked at
                pass
            time.sleep(0.2)
        raise AssertionError(f"{seconds} s passed in vain; see {self.screenshot('timeout')}")

    def start_all(self):
        """Run all cells, once the kernel is there, and do not wait."""
        self.wait(lambda: self.kernel() == "idle")
        self.driver.execute_script("window.jupyterapp.commands.execute('notebook:run-all-cells')")

    def run_all(self, seconds=60):
        """Run all cells to their end."""
        self.start_all()
        self.wait(lambda: self._counts() and not {"[ ]:", "[*]:"} & set(self._counts()), seconds)

    def run_from(self, text):
        """Run the first cell whose source has `text`, and all below it, and do not wait."""
        self.wait(lambda: self.kernel() == "idle")
        found = self.driver.execute_script(
            "const notebook = window.jupyterapp.shell.currentWidget.content;"
            "const at = notebook.widgets.findIndex(cell => "
            "cell.model.sharedModel.source.includes(arguments[0]));if (at >= 0) { "
            "notebook.activeCellIndex = at; "
            "window.jupyterapp.commands.execute('notebook:run-all-below'); }return at;", text)
        assert found >= 0, f"no cell has {text}"

    def kernel(self):
        """"idle" or "busy", once there is a kernel."""
        return self.driver.execute_script(
            "return window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status")

    def _counts(self):
        return [element.text for element in self.find(".jp-CodeCell .jp-InputPrompt")]

    def look_at(self, element):
        """Scroll to it."""
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)

    def click(self, element):
        """Scroll to it and click: at the edge of the page something else may lie over it."""
        self.look_at(element)
        element.click()

    def colour(self, element):
        """The mean RGB colour of an element as it is seen."""
        import io

        import numpy as np
        from PIL import Image

        picture = Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB")
        return np.asarray(picture).reshape(-1, 3).mean(0).round().tolist()

    def screenshot(self, name):
        """Save what is seen, for a person to look at. Returns the path."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        self.driver.save_screenshot(str(path))
        return path


@pytest.fixture
def open_cells(chromium, server, folder):
    """Open a notebook made of these cells: sources, or cells."""
    def open_(name, *cells):
        cells = [new_code_cell(cell) if isinstance(cell, str) else cell for cell in cells]
        kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
        nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}),
                       folder / f"{name}.ipynb")
        return Page(chromium, server, f"{name}.ipynb")
    return open_


@pytest.fixture
def open_copy(chromium, server, folder):
    """Open a copy of a notebook of the course."""
    def open_(path):
        shutil.copy(path, folder)
        return Page(chromium, server, path.name)
    return open_
