"""In a real browser: figures that move, and the live picture in a real JupyterLab. `pytest -m browser`.

They need playwright (`pip install playwright`, without its own browsers) and Chromium on PATH.
"""

import os
import re
import shutil
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


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab in tmp_path, and its folder of runs."""
    for name, steps in (("whole", 8), ("cut", 400)):
        notebook = new_notebook(cells=[new_code_cell(RUN.format(name, steps))], metadata={"kernelspec": KERNEL})
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    env = os.environ | {"SAVE_RUNS": str(tmp_path / "runs"), "PYTHONPATH": str(ROOT)}
    env |= {"JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "JUPYTER_DATA_DIR": str(tmp_path / "data")}
    words = ["--no-browser", "--allow-root", "--port=0", "--ip=127.0.0.1", f"--notebook-dir={tmp_path}"]
    with open(tmp_path / "lab.log", "w+") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *words], env=env, stdout=log, stderr=log)
        try:
            for _ in range(240):
                found = re.search(r"http://127\.0\.0\.1:\d+/lab\?token=\w+", (tmp_path / "lab.log").read_text())
                if found:
                    break
                time.sleep(0.5)
            yield found[0], tmp_path / "runs"
        finally:
            server.terminate()
            server.wait(30)


def run_first_cell(browser, address: str, name: str):
    page = browser.new_page()
    page.goto(address.replace("/lab?", f"/lab/tree/{name}.ipynb?"))
    page.locator(".jp-CodeCell .cm-content").first.click(timeout=120_000)
    page.locator("[data-status=idle]").first.wait_for(timeout=120_000)
    page.keyboard.press("Control+Enter")
    return page


def alt(picture) -> str:
    return picture.get_attribute("alt", timeout=240_000)


def test_jupyterlab_redraws_the_run_in_place_and_keeps_the_last_picture(browser, lab):
    address, runs = lab
    page = run_first_cell(browser, address, "whole")
    picture = page.locator(".jp-OutputArea-output img")
    first = alt(picture)
    page.locator("img[alt*='step 8/8']").wait_for(timeout=240_000)
    assert first != alt(picture) and picture.count() == 1
    assert picture.evaluate("e => e.naturalWidth") > 500
    assert read_manifest(runs / "whole")["status"] == "done"
    page.close()

    page = run_first_cell(browser, address, "cut")
    picture = page.locator(".jp-OutputArea-output img")
    alt(picture)
    page.locator("img[alt*='step 3/400'], img[alt*='step 4/400'], img[alt*='step 5/400']").first.wait_for(
        timeout=240_000
    )
    page.keyboard.press("Escape")
    page.keyboard.press("i")
    page.keyboard.press("i")
    page.locator(".jp-OutputArea-output[data-mime-type*=stderr]").wait_for(timeout=60_000)
    assert picture.count() == 1
    last = read_metrics(runs / "cut")["step"].max()
    assert f"step {last}/400" in alt(picture)
