"""In a real browser: figures that move, and the live picture in a real JupyterLab. `pytest -m browser`.

They need playwright (`pip install playwright`, without its own browsers) and Chromium on PATH.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from savelib.plots import moving
from savelib.runs.folder import read_manifest, read_metrics

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")]
KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
LONG = 600_000  # milliseconds to wait for what is known to come: the machine may be busy
RUN = """from savelib.config import make_config
from savelib.runs.launch import launch
launch(make_config(run_id="{}", total_steps={}, eval_every=2, eval_prompts=16, tracker="none"))"""


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        yield started
        started.close()


@pytest.fixture
def figure(tmp_path) -> str:
    page = tmp_path / "figure.html"
    page.write_text("<!DOCTYPE html>" + moving.filter_by_threshold([2.0, 1.5, 0.0, -1.0], 0.625, list("abcd")).data)
    return page.as_uri()


def test_the_slider_moves_the_figure_and_nothing_is_loaded(browser, figure):
    page, asked = browser.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(figure)
    picture, slider = page.locator("img"), page.locator("input")
    assert picture.evaluate("e => e.naturalWidth") > 500 and page.locator("output").text_content() == "mu = 0.70"
    before = picture.get_attribute("src")
    slider.press("ArrowRight")
    assert page.locator("output").text_content() == "mu = 0.71"
    assert picture.get_attribute("src") != before
    page.wait_for_function("document.querySelector('img').naturalWidth > 500")
    page.get_by_role("button", name="play").click()
    page.wait_for_function("document.querySelector('output').textContent === 'mu = 0.73'", timeout=5000)
    page.get_by_role("button", name="stop").click()
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    page.close()


def test_without_scripts_there_is_a_still_picture(browser, figure):
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(figure)
    assert page.locator("img").is_visible() and not page.locator("input").is_visible()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab in a folder with notebooks of one run each, and its folder of runs."""
    place = tmp_path_factory.mktemp("lab")
    for name, steps in (("whole", 40), ("stopped", 4000), ("killed", 4000)):
        notebook = new_notebook(cells=[new_code_cell(RUN.format(name, steps))], metadata={"kernelspec": KERNEL})
        nbformat.write(notebook, place / f"{name}.ipynb")
    env = os.environ | {"SAVE_RUNS": str(place / "runs"), "PYTHONPATH": str(ROOT)}
    env |= {"JUPYTER_CONFIG_DIR": str(place / "config"), "JUPYTER_DATA_DIR": str(place / "data")}
    words = ["--no-browser", "--allow-root", "--port=0", "--ip=127.0.0.1", f"--notebook-dir={place}"]
    with open(place / "lab.log", "w+") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *words], env=env, stdout=log, stderr=log)
        try:
            yield wait_for(lambda: address_in((place / "lab.log").read_text()), server), place / "runs"
        finally:
            server.terminate()
            server.wait(60)


def address_in(log: str) -> str | None:
    found = re.search(r"http://127\.0\.0\.1:\d+/lab\?token=\w+", log)
    return found and found[0]


def wait_for(what, process=None):
    """What a function returns as soon as it is true; fails after LONG, or when the process has ended."""
    until = time.monotonic() + LONG / 1000
    while not (found := what()):
        assert time.monotonic() < until and (process is None or process.poll() is None), "it never came"
        time.sleep(0.2)
    return found


PICTURES = """() => {
  window.pictures = [];  // what each drawing of the run said, in order
  const look = () => document.querySelectorAll(".jp-OutputArea-output img").forEach(image => {
    if (window.pictures.at(-1) !== image.alt) window.pictures.push(image.alt);
  });
  new MutationObserver(look).observe(document.body, {subtree: true, childList: true, attributes: true});
}"""


@pytest.fixture
def first_cell(browser, lab):
    """Runs the first cell of a notebook in JupyterLab; gives the page, whose `pictures` are what has been drawn."""
    page = browser.new_page()
    page.set_default_timeout(LONG)

    def run(name: str):
        page.goto(lab[0].replace("/lab?", f"/lab/workspaces/{name}/tree/{name}.ipynb?"))
        page.locator(".jp-CodeCell .cm-content").first.click()
        page.locator("[data-status=idle]").first.wait_for()
        page.evaluate(PICTURES)
        page.keyboard.press("Control+Enter")
        return page

    yield run
    page.close()


def last_step(page) -> int:
    """The step of the only picture that is shown."""
    picture = page.locator(".jp-OutputArea-output img")
    assert picture.count() == 1 and picture.evaluate("e => e.naturalWidth") > 500
    return int(re.search(r"step (\d+)/", picture.get_attribute("alt"))[1])


def drawn_after_a_few_steps(page) -> None:
    page.wait_for_function("window.pictures.some(said => /step ([3-9]|\\d\\d+)\\//.test(said))", timeout=LONG)


def test_jupyterlab_redraws_the_run_in_place(first_cell, lab):
    page = first_cell("whole")
    page.locator("img[alt*='step 40/40']").wait_for()
    assert last_step(page) == 40 and len(set(page.evaluate("window.pictures"))) > 1
    wait_for(lambda: read_manifest(lab[1] / "whole")["status"] == "done")


def test_a_stopped_run_keeps_its_last_picture(first_cell, lab):
    page = first_cell("stopped")
    drawn_after_a_few_steps(page)
    trace = page.locator(".jp-OutputArea-output[data-mime-type*=stderr]")
    while not trace.count():  # a busy browser may lose a key
        page.keyboard.press("Escape")
        page.keyboard.press("i")
        page.keyboard.press("i")
        with contextlib.suppress(Exception):
            trace.wait_for(timeout=20_000)
    assert "KeyboardInterrupt" in trace.text_content() and read_manifest(lab[1] / "stopped")["status"] == "stopped"
    assert 3 <= last_step(page) == read_metrics(lab[1] / "stopped")["step"].max() < 4000


def holder(file: Path) -> int:
    """The process that has a file open."""
    for opened in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # another's, or gone meanwhile
            if os.readlink(opened) == str(file):
                return int(opened.parts[2])
    raise AssertionError(f"nobody has {file} open")


def test_a_run_that_fails_keeps_its_last_picture(first_cell, lab):
    page, lock = first_cell("killed"), lab[1] / "killed" / ".lock"  # which the training process holds open
    drawn_after_a_few_steps(page)
    os.kill(holder(lock), signal.SIGKILL)
    trace = page.locator(".jp-OutputArea-output[data-mime-type*=stderr]")
    trace.wait_for()
    assert "RunFailed" in trace.text_content() and "SIGKILL" in trace.text_content()
    assert 3 <= last_step(page) == read_metrics(lab[1] / "killed")["step"].max() < 4000
