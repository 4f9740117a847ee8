"""The page in a real browser: find, sort and compare runs, search, draw a lasso, review a video, start and stop a training."""

from __future__ import annotations

import csv
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import uvicorn

from counterpoint.serve.app import application, bound, site_of
from counterpoint.serve.guard import Guard
from counterpoint.serve.showing import Site

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("needs a browser: apt-get install chromium", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
expect = playwright.expect  # it waits, since scripts fill the page after it has loaded

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("all_drawn")]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
TIMEOUT = 20_000  # milliseconds for each step; a busy machine is slow


class Open(NamedTuple):
    """A browser's page, the site it shows, its folder, and what its console reported."""

    page: Any
    site: Site
    folder: Path
    wrong: list[str]


@pytest.fixture(scope="module")
def opened(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    folder = tmp_path_factory.mktemp("browser") / "project"
    shutil.copytree(project, folder, symlinks=True)
    guard = Guard("127.0.0.1", 0)
    site = site_of([folder, project / "items"], guard)  # the embeddings name files there
    listening = bound("127.0.0.1", 0)
    guard.port = listening.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(application(site), log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(base_url=f"http://127.0.0.1:{guard.port}", accept_downloads=True)
        page.set_default_timeout(TIMEOUT)
        wrong: list[str] = []
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        yield Open(page, site, folder, wrong)
        browser.close()
    for job in site.jobs.all():
        if site.jobs.running(job):
            site.jobs.stop(job.name)
    server.should_exit = True
    thread.join(20)


def test_runs_are_found_sorted_and_compared(opened):
    page = opened.page
    page.goto("/")
    rows = page.locator("table.list tbody th")
    page.get_by_role("link", name="run", exact=True).click()
    expect(rows).to_have_text(["first", "second", "third"])
    page.get_by_role("link", name="run ↑").click()
    expect(rows).to_have_text(["third", "second", "first"])
    page.get_by_label("Words in name").fill("finished clip")
    page.get_by_role("button", name="Show").click()
    expect(rows).to_have_text(["third", "first"])
    compare = page.get_by_role("button", name="Compare")
    expect(compare).to_be_disabled()
    page.get_by_label("choose first").check()
    page.get_by_label("choose third").check()
    compare.click()
    expect(page.locator("table.side").first.locator("tbody th")).to_have_text(["config.epochs"])
    assert page.locator("svg").count() > 0
    page.get_by_role("link", name="third").first.click()
    expect(page.locator("h1")).to_have_text("third")
    assert opened.wrong == []


def test_a_search_by_picture_shows_its_item_first(opened):
    page = opened.page
    page.get_by_role("link", name="Search").click()
    page.get_by_label("Picture or sound").set_input_files(opened.folder / "items" / "green4.png")
    page.locator("select[name=modality]").select_option("image")
    page.get_by_role("button", name="Search").click()
    first = page.locator(".hits.found li").first
    expect(first.locator(".source")).to_contain_text("green4.png")
    picture = first.locator("img")
    expect(picture).to_have_js_property("complete", True)
    assert picture.evaluate("img => img.naturalWidth") > 0
    assert opened.wrong == []


def test_a_lasso_labels_points_and_the_labels_are_downloaded(opened):
    page = opened.page
    page.goto("/map?modality=image")
    page.locator(".map[data-ready]").wait_for()
    box = page.locator(".frame canvas").bounding_box()
    left, top, right, low = box["x"] + 2, box["y"] + 2, box["x"] + box["width"] - 2, box["y"] + box["height"] - 2
    page.mouse.move(left, top)
    page.mouse.down()
    for x, y in ((right, top), (right, low), (left, low), (left, top)):
        page.mouse.move(x, y, steps=3)
    page.mouse.up()
    page.get_by_role("button", name="Label 24 points").wait_for()
    page.get_by_label("Label of the chosen points").fill("round")
    page.keyboard.press("Enter")
    page.get_by_text("24 items are labelled").wait_for()
    with page.expect_download() as kept:
        page.get_by_role("link", name="Labels as CSV").click()
    rows = list(csv.DictReader(kept.value.path().read_text().splitlines()))
    assert {row["label"] for row in rows} == {"round"}
    assert len(rows) == 24
    assert opened.wrong == []


def test_a_video_is_reviewed_by_keyboard(opened):
    page = opened.page
    page.goto("/detections")
    page.get_by_role("link", name="film.webm").click()
    count = page.locator("[data-count]")
    expect(count).to_have_text("0 of 3 moments decided")
    for key in "jakjr":  # the first, accepted; back, and again to the second: rejected
        page.keyboard.press(key)
        page.wait_for_timeout(50)
    page.get_by_text("2 of 3 moments decided").wait_for()
    kept = opened.folder / "film.review.json"
    assert json.loads(kept.read_text())["videos"]["film.webm"] == {"0.50-1.50": "accept", "2.50-3.00": "reject"}
    with page.expect_download() as export:
        page.keyboard.press("e")
    assert export.value.path().read_text().count("accept") == 1
    page.reload()
    expect(count).to_have_text("2 of 3 moments decided")
    page.keyboard.press("n")
    page.wait_for_url("**/detection/1/0/film.json")
    # The video of the test holds no pictures: its player reports that, and nothing else is wrong.
    assert [text for text in opened.wrong if "film" not in text and "Failed to load resource" not in text] == []
    opened.wrong.clear()


def test_a_training_starts_shows_its_log_and_stops(opened):
    page = opened.page
    page.get_by_role("link", name="Train").click()
    page.get_by_label("System").fill("simcr")
    page.get_by_label("Data").fill("digits")
    page.get_by_label("Name of the run").fill("clicked")
    page.get_by_label("Epochs").fill("400")
    page.get_by_label("Other settings").fill("encoder=conv-s\nbatch_size=256")
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("alert")).to_contain_text("did you mean")
    opened.wrong.clear()  # the browser reports the answer 400
    page.get_by_label("System").fill("simclr")
    page.get_by_role("button", name="Start").click()
    expect(page.locator("h1")).to_have_text("Training of clicked")
    page.get_by_role("link", name="Curves and settings of the run").wait_for(timeout=60_000)
    deadline = time.monotonic() + 60
    while not (opened.folder / "runs" / "clicked" / "last.ckpt").is_file():
        assert time.monotonic() < deadline
        page.wait_for_timeout(100)
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_text("it can be resumed").wait_for(timeout=60_000)
    page.get_by_role("button", name="Resume").wait_for()
    page.get_by_role("link", name="Curves and settings of the run").click()
    expect(page.locator("p.state")).to_contain_text(re.compile("interrupted|training"))
    assert opened.wrong == []


def test_lists_show_what_matters_on_a_narrow_screen(opened):
    page = opened.page
    page.set_viewport_size({"width": 390, "height": 900})
    try:
        for path, what in {
            "/detections": page.get_by_role("columnheader", name="decided").first,
            "/claims": page.locator("table.claims td:last-child").first,
        }.items():
            page.goto(path)
            box = what.bounding_box()
            assert box is not None
            assert box["x"] + box["width"] <= 390, path
    finally:
        page.set_viewport_size({"width": 1280, "height": 900})
