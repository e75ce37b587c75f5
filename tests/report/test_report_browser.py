"""The report as a browser shows it: no error, no request, nothing cut off, readable in both schemes."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.support.ui import WebDriverWait

from pipeline.__main__ import main
from tests.helpers.chromium import FAINT, OVERFLOWING, emulate, open_browser, requested
from tests.helpers.fake_run import write_run

# Tables that need sideways scrolling, and charts whose labels reach out of their drawing.
NOT_FITTING = """
const found = [];
for (const e of document.querySelectorAll('.scroll'))
  if (e.scrollWidth > e.clientWidth + 1) found.push(e.getAttribute('aria-label') || e.innerText.slice(0, 60));
for (const svg of document.querySelectorAll('svg.chart')) {
  const frame = svg.getBoundingClientRect();
  for (const text of svg.querySelectorAll('text')) {
    const box = text.getBoundingClientRect();
    if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1)
      found.push(text.textContent + ' of ' + svg.querySelector('title').textContent);
  }
}
return found;
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium."""
    with open_browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def pages(
    whole_run: Path, short_run: Path, hostile_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The page of a whole run, of a part of one, of a hostile one, and of these three and a slow one together."""
    directory = tmp_path_factory.mktemp("pages")
    slow_run = write_run(directory / "runs" / "slow", seed=5)
    record = json.loads((slow_run / "run.json").read_text())
    for step in record["steps"].values():
        # Intervals of hours are the longest texts of the table.
        step["seconds"] *= 500
    (slow_run / "run.json").write_text(json.dumps(record))
    for name, runs in {
        "whole": [whole_run],
        "short": [short_run],
        "hostile": [hostile_run],
        "seeds": [whole_run, short_run, hostile_run, slow_run],
    }.items():
        main(["report", *map(str, runs), "--output_dir", str(directory / name)])
    return {path.parent.name: path for path in directory.glob("*/index.html")}


def show(browser: Any, page: Path, width: int, scheme: str) -> list[str]:
    """Open the page from disk, with all of it unfolded. Returns the addresses that it requested."""
    emulate(browser, width, scheme)
    browser.get(page.as_uri())
    browser.execute_script("for (const e of document.querySelectorAll('details')) e.open = true")
    return requested(browser)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", ["whole", "short", "hostile", "seeds"])
def test_the_page_fits_every_width_in_both_schemes(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    assert show(browser, pages[name], width, scheme) == [pages[name].as_uri()]
    assert browser.get_log("browser") == []
    assert "Fourstage report" in browser.title
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(OVERFLOWING) == []
    assert browser.execute_script(NOT_FITTING) == []
    assert browser.execute_script(FAINT) == []


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        (OVERFLOWING, "<div style='width: 500px'>wide</div>"),
        (OVERFLOWING, "<div style='width: 50px; overflow: hidden; white-space: nowrap'>more than fits</div>"),
        (NOT_FITTING, "<div class='scroll'><div style='width: 500px'>wide</div></div>"),
        (FAINT, "<p style='color: #999; background: #fff'>faint</p>"),
    ],
)
def test_the_checks_of_the_page_find_faults(browser: Any, pages: dict[str, Path], script: str, fault: str) -> None:
    show(browser, pages["short"], 390, "light")
    browser.execute_script("document.body.insertAdjacentHTML('beforeend', arguments[0])", fault)
    assert browser.execute_script(script)


def test_a_phone_scrolls_no_further_than_it_must_and_paper_shows_everything(
    browser: Any, pages: dict[str, Path]
) -> None:
    emulate(browser, 390, "light")
    browser.get(pages["whole"].as_uri())
    assert browser.execute_script("return document.documentElement.scrollHeight") < 14_000
    hidden = """return [...document.querySelectorAll('details')].filter(
        e => [...e.children].some(c => c.tagName !== 'SUMMARY' && !c.checkVisibility({contentVisibilityAuto: true})))
        .length"""
    assert browser.execute_script(hidden) > 5
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    # What folds is laid out anew with the next frame.
    WebDriverWait(browser, 10, 0.1).until(lambda _: browser.execute_script(hidden) == 0)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_dark_and_light_differ(browser: Any, pages: dict[str, Path]) -> None:
    colours = set()
    for scheme in ("light", "dark"):
        show(browser, pages["whole"], 1440, scheme)
        colours.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2


def test_everything_drawn_and_every_table_has_a_name(browser: Any, pages: dict[str, Path]) -> None:
    show(browser, pages["whole"], 1440, "light")
    unnamed = browser.execute_script(
        "return [...document.querySelectorAll('table, svg')].filter(e => e.tagName === 'TABLE' ?"
        " !e.caption && !e.closest('[aria-label]') : e.getAttribute('aria-hidden') !== 'true' &&"
        " !(e.getAttribute('role') === 'img' && e.getAttribute('aria-label') && e.querySelector('title')))"
        ".map(e => e.outerHTML.slice(0, 100))"
    )
    assert unnamed == []
    levels = browser.execute_script("return [...document.querySelectorAll('h1,h2,h3,h4')].map(e => +e.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(next_level - level <= 1 for level, next_level in pairwise(levels))
    targets = browser.execute_script(
        "return [...document.querySelectorAll('a')].filter(a => !document.querySelector(a.hash)).length"
    )
    assert targets == 0
