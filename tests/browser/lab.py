"""JupyterLab in the system's Chromium: a server of its own, notebooks that are run, pictures that are taken.

    with serve(folder) as server, chromium() as browser:
        notebook = open_notebook(browser, server, "example.ipynb", width=1280)
        notebook.run_cell(0)
        notebook.wait_idle()
        notebook.picture("panel.png", ".ftk-panel")

The server listens on loopback, serves one folder, and keeps its settings in a temporary folder: nothing of the person's
own Jupyter is read or changed. Browsers are never downloaded.
"""
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import nbformat
import psutil

NAMES = ("chromium", "chromium-browser", "google-chrome")
MISSING = "no Chromium here: apt-get install -y --no-install-recommends chromium fonts-dejavu-core"
LIGHT, DARK = "JupyterLab Light", "JupyterLab Dark"
QUIET = ["--ServerApp.port_retries=0", "--ServerApp.open_browser=False", "--ServerApp.ip=127.0.0.1", "--ServerApp.allow_root=True",
         "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True", "--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"]


def find_chromium() -> str | None:
    "The path of an installed Chromium or Chrome."
    return next(filter(None, map(shutil.which, NAMES)), None)


# ---- the server

@dataclass
class Server:
    "A running Jupyter server."

    url: str
    folder: Path
    log: Path


@contextmanager
def serve(
    folder: Path,  # what it serves; kernels start in a notebook's folder
    theme: str = LIGHT,  # or DARK
    environment: dict | None = None,  # more environment variables, for the kernels
):
    "A Jupyter server with fresh settings, ended with its kernels at the end."
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ftkit-lab-", ignore_cleanup_errors=True) as temporary:
        server, own = Server(f"http://127.0.0.1:{port}", Path(folder), Path(temporary) / "log"), Path(temporary)
        write_settings(own / "settings", theme)
        command = [sys.executable, "-m", "jupyterlab", *QUIET, f"--ServerApp.port={port}", f"--ServerApp.root_dir={folder}"]
        with open(server.log, "wb") as log:
            process = subprocess.Popen(command, env={**os.environ, **own_folders(own), **(environment or {})}, cwd=folder,
                                       stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for_server(server, process)
            yield server
        finally:
            end(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def own_folders(folder: Path) -> dict[str, str]:
    "The environment that keeps a server away from the person's own settings."
    names = dict(JUPYTER_CONFIG_DIR="config", JUPYTER_DATA_DIR="data", JUPYTER_RUNTIME_DIR="runtime", IPYTHONDIR="ipython",
                 JUPYTERLAB_SETTINGS_DIR="settings", JUPYTERLAB_WORKSPACES_DIR="workspaces")
    return {name: str(folder / part) for name, part in names.items()} | {"JUPYTER_PREFER_ENV_PATH": "1"}


def write_settings(folder: Path, theme: str):
    "Theme; no news; all cells stay in the page, so that they can be found."
    settings = {"apputils-extension/themes": {"theme": theme},
                "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
                "notebook-extension/tracker": {"windowingMode": "none"}}
    for name, values in settings.items():
        path = folder / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))


def wait_for_server(server: Server, process: subprocess.Popen, seconds: float = 60):
    "Until it answers."
    direct, end = urllib.request.build_opener(urllib.request.ProxyHandler({})), time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        with suppress(OSError), direct.open(f"{server.url}/api/status", timeout=5):
            return
        time.sleep(0.1)
    raise RuntimeError(f"the Jupyter server did not start:\n{server.log.read_text(errors='replace')[-3000:]}")


def end(process: subprocess.Popen):
    "End a process and what it started."
    with suppress(psutil.Error):
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            with suppress(psutil.Error):
                member.terminate()
        for member in psutil.wait_procs(family, timeout=10)[1]:
            with suppress(psutil.Error):
                member.kill()
    process.wait()


# ---- the browser

@contextmanager
def chromium():
    "The system's Chromium without a window, driven by Playwright."
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    if path is None:
        raise RuntimeError(MISSING)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


def write_notebook(path: Path, *sources: str):
    "A notebook file with these code cells."
    kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    nbformat.write(nbformat.v4.new_notebook(metadata=kernel, cells=[nbformat.v4.new_code_cell(source) for source in sources]), path)


def open_notebook(
    browser,  # of `chromium`
    server: Server,  # of `serve`
    name: str,  # path below the server's folder
    width: int = 1280,  # of the window, in pixels
    height: int = 900,
    scale: float = 1.0,  # device pixels for each of these: 2 for pictures that are to be printed
) -> "Notebook":  # its kernel ready
    "A notebook in a window of its own."
    context = browser.new_context(viewport=dict(width=width, height=height), device_scale_factor=scale)
    page = context.new_page()
    page.set_default_timeout(30_000)
    notebook = Notebook(page, f"{server.url}/lab/workspaces/{uuid4().hex}/tree/{name}?reset")
    notebook.load()
    return notebook


CURRENT = "window.jupyterapp.shell.currentWidget"
READY = f"window.jupyterapp && {CURRENT} && {CURRENT}.sessionContext && {CURRENT}.sessionContext.isReady && {CURRENT}.content.widgets.length > 0"
IDLE = f"{CURRENT}.sessionContext.session.kernel.status === 'idle'"
PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(prompt => prompt.textContent)"


class Notebook:
    "A notebook in a page; `page` is Playwright's, for all that is not here."

    def __init__(self, page, url: str):
        self.page, self.url = page, url

    def load(self):
        "Open it, or open it again as a reload does, and wait for its kernel. The panel of files is closed: it takes width."
        self.page.goto(self.url, wait_until="domcontentloaded")
        self.page.wait_for_function(READY, timeout=90_000)
        self.page.wait_for_function(IDLE, timeout=90_000)
        self.page.evaluate("window.jupyterapp.shell.collapseLeft()")

    def command(self, name: str, **arguments):
        "Run one of JupyterLab's commands; returns at once."
        self.page.evaluate("([name, given]) => { window.jupyterapp.commands.execute(name, given) }", [name, arguments])

    def run_cell(self, index: int):
        "Run one cell; returns at once. Negative numbers count from the end."
        self.page.evaluate(f"index => {{ const all = {CURRENT}.content; all.activeCellIndex = index < 0 ? all.widgets.length + index : index }}", index)
        self.command("notebook:run-cell")

    def run(self, source: str, seconds: float = 60) -> str:
        "Run this in a new cell at the end, wait for it, and give what it printed."
        self.add(source)
        self.run_cell(-1)
        self.wait_idle(seconds)
        return self.text(-1)

    def add(self, source: str):
        "A new code cell at the end."
        self.page.evaluate(f"source => {{ const model = {CURRENT}.model.sharedModel; model.insertCell(model.cells.length, {{cell_type: 'code', source}}) }}", source)

    def prompts(self) -> list[str]:
        "What stands beside the code cells: `[*]:` for one that waits or runs."
        return self.page.evaluate(PROMPTS)

    def wait_idle(self, seconds: float = 60):
        "Until no cell runs. (The kernel's own status lies while a cell runs.)"
        self.page.wait_for_timeout(50)
        self.page.wait_for_function(f"!{PROMPTS}.some(prompt => prompt.includes('*'))", timeout=seconds * 1000)

    def outputs(self, index: int) -> list[dict]:
        "The outputs of a cell, as a notebook file holds them."
        return self.page.evaluate(f"index => {{ const all = {CURRENT}.content.widgets; return all.at(index).model.outputs.toJSON() }}", index)

    def text(self, index: int) -> str:
        "What a cell has printed; an error's traceback too."
        texts = [output.get("text") or output.get("data", {}).get("text/plain") or "\n".join(output.get("traceback", ())) for output in self.outputs(index)]
        return "".join("".join(text) for text in texts)

    def save(self):
        "Save the notebook file, and wait for it."
        self.page.evaluate(f"() => {CURRENT}.context.save()")

    def restart_kernel(self):
        "A new kernel; the page keeps what it shows."
        self.page.evaluate(f"() => {CURRENT}.sessionContext.session.kernel.restart()")
        self.page.wait_for_function(IDLE, timeout=60_000)

    def theme(self, name: str):
        "Switch to another theme, and wait until it shows."
        self.command("apputils:change-theme", theme=name)
        self.page.wait_for_function("name => document.body.dataset.jpThemeName === name", arg=name)
        self.page.wait_for_timeout(300)

    def resize(self, width: int, height: int = 900):
        "Another size of the window."
        self.page.set_viewport_size(dict(width=width, height=height))
        self.page.wait_for_timeout(200)

    def picture(self, path: Path, selector: str | None = None):
        "A PNG of the window, or of the last element of a selector: the window grows until all of it is seen."
        if selector is None:
            return self.page.screenshot(path=path)
        element, before = self.page.locator(selector).last, self.page.viewport_size
        self.page.wait_for_timeout(500)  # what has just changed may be put in anew
        self.page.set_viewport_size(dict(before, height=max(before["height"], int(element.bounding_box()["height"]) + 400)))
        self.page.wait_for_timeout(300)
        element.screenshot(path=path)
        self.page.set_viewport_size(before)

    def close(self):
        self.page.context.close()
