"""Votes by several clients at once and in a browser, on a server that is killed and started again."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import IncompleteRead
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

from pipeline.data.votes import read_votes, valid_votes
from pipeline.report.text import visible
from tests.helpers.files import write_rows
from tests.helpers.small_model import ROOT, save_model

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CLIENTS = [f"student{number}" for number in range(20)]
VOTES = 10
"""Of each client."""
SECONDS = 240
"""A busy machine takes that long to start a server."""
HOSTILE = "<img src=x onerror='document.title=1'> [a](https://example.com) \x1b[31m \u202e"


class Server:
    """`python -m pipeline app`, which can be killed and started again on the same port."""

    def __init__(self, run: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        options = ["--port", str(self.port), "--prompts", str(run / "prompts.jsonl"), "--max_new_tokens", "8"]
        self.command = [sys.executable, "-m", "pipeline", "app", str(run), "--overlap", "0.1", *options]
        self.log = run / "app.log"
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        """Ask as the page does: again and again, until the server answers."""
        request = Request(f"{self.url}/prefer/{path}", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            with suppress(URLError, ConnectionError, TimeoutError, IncompleteRead):
                return json.load(urlopen(request, timeout=SECONDS))
            time.sleep(0.1)
        raise TimeoutError(f"{path}: {self.log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("people")
    save_model(folder / "2_sft")
    texts = [HOSTILE, *(f"What is {i}?" for i in range(30))]
    write_rows(folder / "prompts.jsonl", [{"prompt": [{"role": "user", "content": text}]} for text in texts])
    return folder


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    started = Server(run)
    yield started
    started.process.send_signal(signal.SIGTERM)
    started.process.wait(30)


class Page:
    """Kim's page, in a browser as narrow as a telephone."""

    def __init__(self, driver: Any, server: Server, run: Path) -> None:
        self.driver, self.file = driver, run / "votes" / "votes.jsonl"
        driver.get(f"{server.url}/?annotator=kim#prefer")
        wait(lambda: all(self.shown()))
        self.body = self.find("prefer-section").find_element("xpath", "/html/body")

    def find(self, name: str) -> Any:
        return self.driver.find_element("id", name)

    def text(self, name: str) -> str:
        return str(self.find(name).text)

    def shown(self) -> tuple[str, str]:
        return self.text("answer-a"), self.text("answer-b")

    def votes(self) -> list[dict[str, Any]]:
        return [vote for vote in read_votes(self.file) if vote["annotator"] == "kim"]

    def chosen(self) -> list[str]:
        vote = self.votes()[-1]
        return visible(vote[vote["choice"]]).split()

    def act(self, do: Callable[[], None], count: int) -> None:
        """Do something that writes a line, after which there are so many votes."""
        count_before = len(self.votes())
        do()
        wait(lambda: self.text("votes-count") == str(count) and len(self.votes()) == count_before + 1)
        wait(lambda: self.find("prefer-ballot").get_attribute("aria-busy") == "false")

    def press(self, key: str, count: int) -> None:
        self.act(lambda: self.body.send_keys(key), count)

    def click(self, name: str, count: int) -> None:
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", self.find(name))
        self.act(lambda: self.find(name).click(), count)


@pytest.fixture(scope="module")
def page(server: Server, run: Path) -> Iterator[Page | None]:
    """The page, None without a browser."""
    if not BINARY and not os.environ.get("CI"):
        yield None
        return
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BINARY or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    size = {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    # The first answer comes once the server has started.
    server.ask("next", {"annotator": "kim", "page": "none"})
    try:
        yield Page(driver, server, run)
    finally:
        driver.quit()


def wait(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        with suppress(Exception):
            if value := condition():
                return value
        time.sleep(0.05)
    raise TimeoutError


def test_a_person_votes_by_keys_and_by_mouse(page: Page | None) -> None:
    if page is None:
        pytest.skip("without Chromium")
    assert page.find("annotator").get_attribute("value") == "kim"
    first = page.shown()
    page.press("a", 1)
    assert page.chosen() == first[0].split()
    page.click("vote-undo", 0)
    assert page.shown() == first
    page.click("vote-b", 1)
    assert page.chosen() == first[1].split()
    for number, key in enumerate("txs", start=2):
        page.press(key, number)
    assert [vote["choice"] for vote in page.votes()[-3:]] == ["tie", "bad", "skip"]
    page.find("prefer-comment").send_keys("a bad pair, but stop: ")
    assert page.text("votes-count") == "4", "keys in a text field are text"
    page.click("vote-tie", 5)
    assert page.votes()[-1]["comment"] == "a bad pair, but stop: "


def test_a_hostile_prompt_is_text_on_a_narrow_page_with_labels(page: Page | None) -> None:
    if page is None:
        pytest.skip("without Chromium")
    typed = page.find("prefer-prompt")
    page.driver.execute_script("arguments[0].closest('details').open = true", typed)
    page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", typed)
    page.driver.execute_script("arguments[0].value = arguments[1]", typed, HOSTILE)
    page.find("prefer-send").click()
    wait(lambda: "<img src=x" in page.text("prefer-turns"))
    inside = "#prefer-turns :is(img, a), .prefer-text :is(img, a, script)"
    assert not page.driver.find_elements("css selector", inside) and "\x1b" not in page.text("prefer-turns")
    assert page.driver.title == "Fourstage"
    assert page.driver.execute_script("return document.querySelector('#prefer-section').scrollWidth") <= 390
    unlabelled = page.driver.execute_script(
        "return [...document.querySelectorAll('#prefer-section :is(input, textarea, select)')]"
        ".filter((e) => !e.labels.length).map((e) => e.id)"
    )
    assert not unlabelled


def vote_all(server: Server, name: str, confirmed: list[str]) -> None:
    """Cast votes, each of them twice; the answer with fewer characters wins."""
    who = {"annotator": name, "page": f"page-{name}"}
    answer = server.ask("next", who)
    for number in range(VOTES):
        pair = answer["pair"]
        choice = "first" if len(pair["first"]) < len(pair["second"]) else "second"
        ballot = {**who, "vote": f"{name}-{number}", "pair": pair["pair"], "choice": choice, "seconds": 0.1}
        answer = server.ask("vote", ballot)
        confirmed.append(ballot["vote"])
        again = server.ask("vote", ballot)
        assert again["state"]["count"] == number + 1 and again["pair"] == answer["pair"]


def test_two_hundred_votes_of_twenty_clients_and_a_page_survive_a_killed_server(
    server: Server, run: Path, page: Page | None
) -> None:
    confirmed: list[str] = []
    threads = [threading.Thread(target=vote_all, args=(server, name, confirmed)) for name in CLIENTS]
    for thread in threads:
        thread.start()
    while len(confirmed) < 60 and any(thread.is_alive() for thread in threads):
        time.sleep(0.01)
    server.kill()
    safe = list(confirmed)
    if page:
        place, count = page.shown(), int(page.text("votes-count"))
        page.body.send_keys("a")
        wait(lambda: "connection is lost" in page.text("prefer-status"))
    lines = read_votes(run / "votes" / "votes.jsonl")
    assert {vote["id"] for vote in lines} >= set(safe), "what was confirmed is on the disk"
    server.start()
    for thread in threads:
        thread.join()
    votes = [vote for vote in valid_votes(read_votes(run / "votes" / "votes.jsonl")) if vote["annotator"] in CLIENTS]
    ids = {f"{name}-{number}" for name in CLIENTS for number in range(VOTES)}
    assert len(votes) == 20 * VOTES and {vote["id"] for vote in votes} == ids
    counts = Counter((vote["annotator"], vote["pair"]) for vote in votes)
    assert set(counts.values()) == {1}
    people = Counter(vote["pair"] for vote in votes)
    assert Counter(people.values()) == {1: 20 * (VOTES - 1), 20: 1}, "a tenth is shared"
    for vote in votes:
        rejected = "b" if vote["choice"] == "a" else "a"
        assert len(visible(vote[vote["choice"]])) <= len(visible(vote[rejected])), "the text that the client chose"
    if page:
        wait(lambda: page.text("votes-count") == str(count + 1))
        assert page.chosen() == place[0].split(), "the vote of the page arrives once, and late"
        wait(lambda: all(page.shown()) and page.find("prefer-ballot").get_attribute("aria-busy") == "false")
        pair = json.loads(page.driver.execute_script("return sessionStorage.getItem('prefer.pair')"))
        assert pair not in {vote["pair"] for vote in page.votes()}, "a pair without a vote"
