"""The page in a browser, for a run whose every text attacks it: nothing from elsewhere, text as text, by keyboard."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from chromium import FAINT, emulate, open_browser, requested
from fake_run import HOSTILE
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from pipeline.app.server import build_app
from pipeline.app.site import Site

STAGES = ["0_random", "1_pretrain", "2_sft", "3_ppo", "4_grpo"]

# Elements that reach out of the window, unless they scroll by themselves or are meant to be heard.
OUTSIDE = """
return [...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width > 1 && box.right > innerWidth + 1 && !e.closest('.scroll, .gallery, .heard, svg');
}).map(e => e.outerHTML.slice(0, 120));
"""

# Fields and buttons that a screen reader could not name.
UNNAMED = """
return [...document.querySelectorAll('input, textarea, select, button, iframe, summary')].filter(e =>
  e.getClientRects().length && !(e.labels && e.labels.length) && !e.getAttribute('aria-label') && !e.title
  && !e.textContent.trim() && !e.getAttribute('aria-labelledby')).map(e => e.outerHTML.slice(0, 160));
"""


@pytest.fixture(scope="module")
def page(run: Path, site_of: Callable[..., Site], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that also has a model that cannot be loaded."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("pipeline.app.compare.USUAL", 24)  # these models never end their turn
    app = build_app(site_of(run, "--port", str(port), "--model", str(tmp_path_factory.mktemp("broken"))))
    monkeypatch.undo()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = server.force_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with open_browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def visit(browser: Any, page: str, width: int = 1440, scheme: str = "light") -> Any:
    """Open the page, and wait until it is there."""
    emulate(browser, width, scheme)
    browser.get("about:blank")
    browser.get(page)
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#report iframe"))
    return browser


def until(browser: Any, condition: Any) -> Any:
    return WebDriverWait(browser, 150, 0.05).until(lambda _: condition())


def columns(browser: Any) -> dict[str, str]:
    """The text of each column that has one, by the name of its model."""
    shown = browser.find_elements(By.CSS_SELECTOR, "#answers > *")
    return {text.split()[0]: text for text in (column.text for column in shown) if text}


def ask(browser: Any, prompt: str) -> dict[str, str]:
    """Compare the answers to a prompt. Returns the columns when all have stopped."""
    field = browser.find_element(By.CSS_SELECTOR, "#prompt")
    field.clear()
    field.send_keys(prompt)
    browser.find_element(By.ID, "send").click()
    ended = "#answers .answer[data-done], #answers .failed"
    until(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, ended)) == len(STAGES) + 1)
    return columns(browser)


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (390, "dark")])
def test_the_page_fits_and_asks_no_other_host(browser: Any, page: str, width: int, scheme: str) -> None:
    visit(browser, page, width, scheme)
    until(browser, lambda: browser.find_element(By.ID, "answer-a").text)
    assert [url for url in requested(browser) if not url.startswith(page)] == []
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(OUTSIDE) == []
    assert browser.execute_script(FAINT) == []
    assert browser.execute_script(UNNAMED) == []
    assert browser.title == "Fourstage"


IDS = [
    "prompt",
    "send",
    "vote-a",
    "vote-b",
    "vote-tie",
    "vote-bad",
    "vote-skip",
    "vote-undo",
    "annotator",
    "votes-count",
]

# Whether a click on the middle of an element hits something else, wherever the page is scrolled to.
COVERED = """
return arguments[0].filter(id => ['start', 'center', 'end'].some(block => {
  const e = document.getElementById(id);
  e.scrollIntoView({block, behavior: 'instant'});
  const box = e.getBoundingClientRect();
  return !e.contains(document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2));
}));
"""


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_covers_what_is_clicked_and_a_vote_follows_the_name(browser: Any, page: str, width: int) -> None:
    visit(browser, page, width)
    first = browser.find_element(By.ID, "vote-a")
    until(browser, first.is_enabled)
    assert browser.execute_script(COVERED, IDS) == []
    browser.find_element(By.ID, "annotator").send_keys(f"ann {width}")
    until(browser, first.is_enabled)
    first.click()
    until(browser, lambda: browser.find_element(By.ID, "votes-count").text == "1")
    browser.find_element(By.ID, "annotator").clear()
    visit(browser, f"{page}?annotator=bob", width)
    until(browser, browser.find_element(By.ID, "vote-a").is_enabled)
    assert not browser.find_element(By.ID, "vote-undo").is_enabled(), "the vote of somebody else"


def test_sections_have_addresses_and_the_path_leads_to_them(browser: Any, page: str) -> None:
    visit(browser, f"{page}#rollout")
    top = "return document.getElementById(arguments[0]).getBoundingClientRect().top"
    until(browser, lambda: abs(browser.execute_script(top, "rollout")) < 200)
    links = browser.find_elements(By.CSS_SELECTOR, "#path .path a")
    leads = [link.get_attribute("href").rpartition("#")[2] for link in links]
    assert leads == ["compare", "compare", "compare", "prefer", "rollout"]
    for section in ("path", "compare", "prefer", "rollout", "report"):
        browser.find_element(By.CSS_SELECTOR, f"#sections a[href='#{section}']").click()
        until(browser, lambda: browser.execute_script(top, section) < 400)  # noqa: B023
    browser.switch_to.frame(browser.find_element(By.CSS_SELECTOR, "#report iframe"))
    assert "report of a run" in browser.find_element(By.TAG_NAME, "body").text
    browser.switch_to.default_content()


def test_every_stage_answers_and_text_stays_text(browser: Any, page: str) -> None:
    visit(browser, page)
    typed = HOSTILE.translate({0: "", 7: "", 0x1B: "", 0xD800: ""}) + "[x](https://example.com) **bold**"
    shown = ask(browser, typed)
    assert [name for name in shown if name in STAGES] == STAGES
    for name in STAGES:
        assert re.search(r"\d+ tokens · \d+ tokens/s · (ended its turn|limit of|the context of)", shown[name])
    (failed,) = (text for name, text in shown.items() if name not in STAGES)
    assert "no tokenizer can be loaded" in failed, "a model that fails to load is a message in its column"
    browser.find_element(By.CSS_SELECTOR, "#compare .gallery button").click()  # a prompt of the report, hostile too
    assert "<script>" in browser.find_element(By.CSS_SELECTOR, "#prompt").get_property("value")
    inside = "#path img, #path script, #answers img, #answers a, #answers strong, #answers script, .gallery img"
    assert browser.find_elements(By.CSS_SELECTOR, inside) == []
    assert browser.title == "Fourstage"
    assert [url for url in requested(browser) if not url.startswith(page)] == []


def test_a_stopped_answer_says_so(browser: Any, page: str) -> None:
    visit(browser, page)
    browser.execute_script(
        "document.getElementById('answers').insertAdjacentHTML('beforeend', '<p class=soft>3 tokens · writing</p>')"
    )
    browser.find_element(By.ID, "stop").click()
    line = browser.find_element(By.CSS_SELECTOR, "#answers .soft")
    until(browser, lambda: line.get_property("textContent") == "3 tokens · stopped")


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(browser: Any, page: str) -> None:
    visit(browser, page)
    browser.execute_script(
        "const field = document.querySelector('#prompt');"
        "Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, 'value').set.call(field, 'cat '.repeat(25000));"
        "field.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    browser.find_element(By.ID, "send").click()
    until(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, "#answers .failed")) == len(STAGES) + 1)
    for name, text in columns(browser).items():
        assert name not in STAGES or ("the context of" in text and "256 tokens" in text and "500" in text)


def test_each_token_shows_its_alternatives_by_pointer_and_by_key(browser: Any, page: str) -> None:
    visit(browser, page)
    browser.find_element(By.CSS_SELECTOR, "#probabilities input").click()
    ask(browser, "What is a cat?")
    tokens = browser.find_elements(By.CSS_SELECTOR, "#answers > :first-child .token")
    line = browser.find_element(By.ID, "inspect")
    tokens[1].click()
    assert "Most probable here" in line.text and line.text.count("%") >= 6
    before, focused = line.text, browser.switch_to.active_element
    focused.send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element == tokens[2]
    assert line.text != before or tokens[2].text == tokens[1].text
    reachable = [token for token in tokens if token.get_attribute("tabindex") == "0"]
    assert len(reachable) <= 2, "one stop for the tabulator, not one for each token"


def test_a_prompt_is_sent_by_keyboard_alone(browser: Any, page: str) -> None:
    visit(browser, page)
    browser.find_element(By.CSS_SELECTOR, "#sections a").send_keys(Keys.TAB)
    for _ in range(30):
        active = browser.switch_to.active_element
        if active.tag_name == "textarea":
            break
        active.send_keys(Keys.TAB)
    assert active.value_of_css_property("outline-style") == "solid", "the focus is seen"
    active.send_keys(Keys.CONTROL, "a")
    browser.switch_to.active_element.send_keys("What is 12?", Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("id") == "send"
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#answers .answer[data-done]"))


def test_a_rollout_is_watched_step_by_step(browser: Any, page: str) -> None:
    visit(browser, page)
    # The sections below the report appear after it.
    (another,) = until(browser, lambda: browser.find_elements(By.ID, "rollout-another"))
    another.click()
    field = browser.find_element(By.CSS_SELECTOR, "#rollout-prompt textarea")
    until(browser, lambda: field.get_property("value").startswith("What is"))
    browser.find_element(By.ID, "rollout-go").click()
    until(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, "#rollout-shown section")) == 4)
    shown = browser.find_element(By.ID, "rollout-shown").text
    for words in ("1. Prompt", "2. Completions", "exact_answer: 0.00", "All are equal here", "times as likely"):
        assert words in shown
    browser.find_element(By.CSS_SELECTOR, "#rollout input[type=radio]").click()
    until(
        browser, lambda: not browser.find_elements(By.CSS_SELECTOR, "#rollout-answer input, #rollout-answer textarea")
    )
    browser.find_element(By.ID, "rollout-go").click()
    rows = until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#rollout-shown .tokens tbody tr"))
    assert len(rows[0].text.split()) >= 5
    assert "KL from 2_sft" in browser.find_element(By.ID, "rollout-shown").text
