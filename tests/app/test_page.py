"""The page in a browser, for a run whose every text attacks it: nothing from elsewhere, text as text, by keyboard."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from pipeline.app.server import build_app
from pipeline.app.site import Site
from tests.helpers.chromium import FAINT, emulate, open_browser, requested
from tests.helpers.fake_run import HOSTILE

STAGES = ["0_random", "1_pretrain", "2_sft", "3_ppo", "4_grpo"]

# Elements that reach out of the window, unless they scroll by themselves or are meant to be heard.
OUTSIDE = """
return [...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width > 1 && box.right > innerWidth + 1 && !e.closest('.chips, #answers, #sections ul, .heard, svg');
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
    # These models never end their turn, so that 128 tokens would be waited for at every answer.
    monkeypatch.setattr("pipeline.app.compare.USUAL", 24)
    app = build_app(site_of(run, "--port", str(port), "--model", str(tmp_path_factory.mktemp("broken"))))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = server.force_exit = True
    thread.join(20)
    monkeypatch.undo()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with open_browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def visit(browser: Any, page: str, width: int = 1440, scheme: str = "light") -> Any:
    """Open the page, and wait until it is there."""
    emulate(browser, width, scheme)
    browser.get("about:blank")
    browser.get(page)
    # The last thing that the page adds by itself.
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".may-ask[data-form='compare-form'] .chips button"))
    return browser


def until(browser: Any, condition: Any, message: str = "") -> Any:
    return WebDriverWait(browser, 150, 0.05).until(lambda _: condition(), message)


def columns(browser: Any) -> dict[str, str]:
    """The text of each column that is shown, by the name of its model."""
    columns = browser.find_elements(By.CSS_SELECTOR, "#answers article:not([hidden])")
    return {column.get_attribute("data-model"): column.get_property("innerText") for column in columns}


def wait_for_answers(browser: Any) -> dict[str, str]:
    """The columns when all have ended."""
    ended = "#answers article:not([hidden])[data-done]"
    until(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, ended)) == len(STAGES) + 1)
    return columns(browser)


def type_prompt(browser: Any, prompt: str) -> None:
    field = browser.find_element(By.ID, "prompt")
    field.clear()
    field.send_keys(prompt)


def ask(browser: Any, prompt: str) -> dict[str, str]:
    """Compare the answers to a prompt. Returns the columns when all have ended."""
    type_prompt(browser, prompt)
    browser.find_element(By.ID, "send").click()
    return wait_for_answers(browser)


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
    ActionChains(browser).double_click(first).perform()
    until(browser, lambda: browser.find_element(By.ID, "votes-count").text == "1")
    until(browser, first.is_enabled)
    assert browser.find_element(By.ID, "votes-count").text == "1", "the second click of a double click is no vote"
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
        until(browser, lambda: 0 <= browser.execute_script(top, section) < 400)  # noqa: B023
    link = browser.find_element(By.CSS_SELECTOR, "#report a")
    browser.get(link.get_attribute("href"))
    assert "report of a run" in browser.find_element(By.TAG_NAME, "body").text


def test_every_stage_answers_and_text_stays_text(browser: Any, page: str) -> None:
    visit(browser, page)
    typed = HOSTILE.translate({0: "", 7: "", 0x1B: "", 0xD800: ""}) + "[x](https://example.com) **bold**"
    answers = ask(browser, typed)
    assert [name for name in answers if name in STAGES] == STAGES
    for name in STAGES:
        assert re.search(r"\d+ tokens · \d+ tokens/s · (ended its answer|limit of|the context of)", answers[name])
    (failed,) = (text for name, text in answers.items() if name not in STAGES)
    assert "no tokenizer can be loaded" in failed, "a model that fails to load is a message in its column"
    # A prompt of the report, which is hostile too, fills the box and is sent.
    browser.find_element(By.CSS_SELECTOR, "#compare .chips button[data-text]").click()
    until(browser, lambda: "<script>" in browser.find_element(By.CSS_SELECTOR, "#compare-status q").text)
    wait_for_answers(browser)
    assert "<script>" in browser.find_element(By.ID, "prompt").get_property("value")
    inside = ":is(#path, #answers, .chips, #compare-status) :is(img, script, a:not([href^='#']), strong:not(.banner *))"
    assert browser.find_elements(By.CSS_SELECTOR, inside) == []
    assert browser.title == "Fourstage"
    assert [url for url in requested(browser) if not url.startswith(page)] == []


def test_an_answer_never_stands_below_another_prompt(browser: Any, page: str) -> None:
    visit(browser, page)
    alone = ask(browser, "What is 12?")
    type_prompt(browser, "cat " * 90)
    send = browser.find_element(By.ID, "send")
    send.click()
    until(browser, lambda: "tokens" in columns(browser)["0_random"])
    type_prompt(browser, "What is 12?")
    ActionChains(browser).double_click(send).perform()
    question = browser.find_element(By.CSS_SELECTOR, "#compare-status q")
    assert question.text.strip("“”") == "What is 12?"
    timed = re.compile(r"\d+ tokens/s")
    answers = wait_for_answers(browser)
    assert [timed.sub("", text) for text in answers.values()] == [timed.sub("", text) for text in alone.values()]
    send_and_stop = "document.getElementById('compare-form').requestSubmit(); document.getElementById('stop').click()"
    browser.execute_script(send_and_stop)
    assert all("stopped" in text for text in columns(browser).values()), "a stopped answer says so"
    assert not browser.find_element(By.ID, "stop").is_enabled(), "nothing is left to stop"


def test_columns_say_what_is_wrong(browser: Any, page: str) -> None:
    """A prompt beyond the context is refused with both numbers; a server that is gone is said to be."""
    visit(browser, page)
    browser.execute_script("document.getElementById('prompt').value = 'cat '.repeat(25000)")
    browser.find_element(By.ID, "send").click()
    for name, text in wait_for_answers(browser).items():
        assert name not in STAGES or ("the context of" in text and "256 tokens" in text and "500" in text)
    conditions = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", conditions | {"offline": True})
    try:
        assert all("The connection is lost" in text for text in ask(browser, "What is 12?").values())
    finally:
        browser.execute_cdp_cmd("Network.emulateNetworkConditions", conditions | {"offline": False})
    assert "limit of 24 tokens" in ask(browser, "What is 12?")["2_sft"], "and answers again afterwards"


def test_each_token_shows_its_alternatives_beside_it_by_pointer_and_by_key(browser: Any, page: str) -> None:
    visit(browser, page, 1200)
    ask(browser, "What is a cat?")
    tops = {column.rect["y"] for column in browser.find_elements(By.CSS_SELECTOR, "#answers article")[:5]}
    assert len(tops) == 1, "five stages stand side by side"
    # Without asking again.
    browser.find_element(By.ID, "probabilities").click()
    tokens = browser.find_elements(By.CSS_SELECTOR, "#answers [data-model='0_random'] .token")
    popover = browser.find_element(By.ID, "popover")
    tokens[1].click()
    assert "Most probable here" in popover.text and popover.text.count("%") >= 6
    place = "const p = arguments[0].getBoundingClientRect(), t = arguments[1].getBoundingClientRect(); return [p.top, "
    place += "p.bottom, t.top, t.bottom, innerHeight]"
    top, bottom, above, below, height = browser.execute_script(place, popover, tokens[1])
    assert top >= 0 and bottom <= height and (0 <= top - below < 9 or 0 <= above - bottom < 9), "it is at the token"
    text, focused = popover.text, browser.switch_to.active_element
    focused.send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element == tokens[2]
    assert popover.text != text or tokens[2].text == tokens[1].text
    reachable = [token for token in tokens if token.get_attribute("tabindex") == "0"]
    assert len(reachable) <= 2, "one stop for the tabulator, not one for each token"
    ActionChains(browser).move_to_element(browser.find_element(By.CSS_SELECTOR, "#sections a")).perform()
    assert not popover.is_displayed()
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert popover.is_displayed()
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not popover.is_displayed()


def test_a_prompt_is_sent_by_keyboard_alone(browser: Any, page: str) -> None:
    visit(browser, page)
    browser.find_element(By.CSS_SELECTOR, "#sections a").send_keys(Keys.TAB)
    for _ in range(40):
        active = browser.switch_to.active_element
        if active.tag_name == "textarea":
            break
        active.send_keys(Keys.TAB)
    assert active.value_of_css_property("outline-style") == "solid", "the focus is seen"
    active.send_keys(Keys.CONTROL, "a")
    browser.switch_to.active_element.send_keys("What is 12?", Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("id") == "send"
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#answers article[data-done]"))


def test_a_rollout_is_watched_step_by_step(browser: Any, page: str) -> None:
    visit(browser, page)
    field = browser.find_element(By.ID, "rollout-prompt")
    until(browser, lambda: field.get_property("value") == "What is 0 and 0?")
    assert browser.find_element(By.ID, "rollout-answer").get_property("value") == "0", "the first held-out problem"
    assert "of 60 held-out problems" in browser.find_element(By.ID, "rollout-tally").text
    browser.find_element(By.ID, "rollout-go").click()
    until(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, "#rollout-shown section")) == 5)
    assert len(browser.find_elements(By.CSS_SELECTOR, "#rollout-shown .group li")) == 4, "one card for each attempt"
    text = browser.find_element(By.ID, "rollout-shown").text
    for words in ("1. Prompt", "2. Completions", "exact_answer: 0.00", "All are equal here", "times as likely"):
        assert words in text
    browser.find_element(By.CSS_SELECTOR, "#rollout input[value='3_ppo']").click()
    until(browser, lambda: not browser.find_element(By.ID, "rollout-answer").is_displayed())
    assert browser.find_element(By.ID, "rollout-shown").text == "", "nothing of GRPO stands below PPO"
    until(browser, lambda: field.get_property("value") == "What is 0 and 0?")
    emulate(browser, 390, "light")
    browser.find_element(By.ID, "rollout-go").click()
    rows = until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#rollout-shown .tokens tbody tr"))
    assert len(rows[0].text.split()) >= 5
    advantage = rows[0].find_element(By.CSS_SELECTOR, "td:last-child").rect
    assert advantage["x"] + advantage["width"] <= 390, "the advantage is seen on a phone"
    assert "KL from 2_sft" in browser.find_element(By.ID, "rollout-shown").text


def test_tokens_are_seen_in_each_update_with_each_loss_and_by_keyboard(browser: Any, page: str) -> None:
    visit(browser, page, 390)
    field = browser.find_element(By.ID, "rollout-prompt")
    until(browser, lambda: field.get_property("value"))
    browser.find_element(By.ID, "rollout-go").click()
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#inside .answer .token"))
    inside = browser.find_element(By.ID, "inside")
    assert "dapo, as in the run" in inside.text and "every ratio is 1" in inside.text

    # Another completion, by keyboard: its button, then the tokens, then the next token.
    button = browser.find_elements(By.CSS_SELECTOR, "#rollout-shown .group button")[2]
    button.send_keys(Keys.ENTER)
    assert button.get_attribute("aria-pressed") == "true" and "Completion 3 becomes" in inside.text
    tokens = inside.find_elements(By.CSS_SELECTOR, ".answer .token")
    assert "".join(token.text for token in tokens).strip() and len(tokens) == 8
    stops = [token for token in tokens if token.get_attribute("tabindex") == "0"]
    assert stops == tokens[:1], "one stop of the tabulator"
    browser.execute_script("arguments[0].focus()", tokens[0])
    tokens[0].send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element == tokens[1]
    popover = browser.find_element(By.ID, "popover")
    for words in ("times as likely", "Log-prob before", "Log-prob after", "Advantage", "Ratio", "Term", "Push"):
        assert words in popover.text
    tokens[1].send_keys(Keys.ESCAPE)
    assert not popover.is_displayed()

    # A later update, another loss, and back: what was computed is not computed again.
    inside.find_element(By.CSS_SELECTOR, "[name=update][value='3']").click()
    until(browser, lambda: "in update 3" in inside.text)
    assert "Completion 3 becomes" in inside.text
    inside.find_element(By.CSS_SELECTOR, "option[value='gspo']").click()
    until(browser, lambda: "importance_sampling_level: sequence" in inside.text)
    requested(browser)
    inside.find_element(By.CSS_SELECTOR, "option[value='']").click()
    assert "loss_type: dapo" in inside.text and "in update 3" in inside.text
    inside.find_element(By.CSS_SELECTOR, "[name=update][value='2']").click()
    assert "in update 2" in inside.text and requested(browser) == []
    inside.find_element(By.TAG_NAME, "summary").click()
    rows = inside.find_elements(By.CSS_SELECTOR, ".tokens tbody tr")
    assert len(rows) == 8 and len(rows[0].find_elements(By.TAG_NAME, "td")) == 5
    assert browser.execute_script(OUTSIDE) == [] and browser.execute_script(UNNAMED) == []

    # A rollout of the same prompt begins anew.
    browser.find_element(By.ID, "rollout-go").send_keys(Keys.ENTER)
    until(browser, lambda: "in update 1" in browser.find_element(By.ID, "rollout-shown").text)


# The next control that can be used and was not yet, with its key, which is the same for the buttons of all own votes.
UNUSED = """
const value = e => e.matches('[type=radio], [type=checkbox]') ? e.value : '';
const key = e => e.id || [e.tagName, e.name, value(e), e.textContent.trim(), e.closest('[id]')?.id].join('|');
const controls = 'nav a, main :is(a, button, input, select, textarea, summary, .prefer-text)';
const found = [...document.querySelectorAll(controls)]
  .find(e => e.getClientRects().length && !e.disabled && e.ariaPressed !== 'true' && !e.matches(':checked[type=radio]')
    && !arguments[0].includes(key(e)));
return found && [key(found), found];
"""
IDLE = """
return !document.querySelector(':is(#stop, #rollout-stop):enabled')
  && document.getElementById('prefer-ballot').ariaBusy === 'false';
"""
STATE = """
const fields = [...document.querySelectorAll('input, textarea, select')].map(e => [e.value, e.checked]);
return JSON.stringify([document.body.innerHTML, fields, location.hash]);
"""


def use(browser: Any, control: Any) -> None:
    """Do with a control what a visitor would."""
    tag, kind = control.tag_name, control.get_attribute("type")
    if tag == "select":
        options = control.find_elements(By.TAG_NAME, "option")
        next(option for option in options if not option.is_selected()).click()
    elif kind == "number":
        at_most = control.get_attribute("max") == control.get_property("value")
        control.send_keys(Keys.ARROW_DOWN if at_most else Keys.ARROW_UP)
    elif tag == "textarea" or (tag == "input" and kind not in ("checkbox", "radio")):
        control.send_keys("x")
    elif control.get_attribute("target"):
        path = "return fetch(arguments[0].href).then(answer => { arguments[0].title = answer.status; })"
        browser.execute_script(path, control)
    else:
        control.click()


def test_every_control_does_something_and_nothing_fails(browser: Any, page: str) -> None:
    visit(browser, page, 1280)
    used: list[str] = []
    while controls := browser.execute_script(UNUSED, used):
        key, control = controls
        used.append(key)
        # Several boxes of the path lead to the same section.
        browser.execute_script("history.replaceState(null, '', location.pathname)")
        browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", control)
        state = browser.execute_script(STATE)
        use(browser, control)
        until(browser, lambda: browser.execute_script(STATE) != state, f"{key} does nothing")  # noqa: B023
        until(browser, lambda: browser.execute_script(IDLE), f"{key} does not end")
    assert {"send", "answer-a", "vote-tie", "vote-undo", "prefer-send", "prefer-others", "rollout-go"} <= set(used)
    assert len(used) > 50
    log = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    answers = [entry["params"]["response"] for entry in log if entry["method"] == "Network.responseReceived"]
    assert [answer["url"] for answer in answers if answer["status"] >= 400] == []
    assert [entry["message"] for entry in browser.get_log("browser")] == []
