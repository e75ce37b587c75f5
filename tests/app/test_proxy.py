"""The page behind a proxy that sends another Host, as those of hosted notebooks do, in a browser."""

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from pipeline.app.server import build_app
from pipeline.app.site import Site
from pipeline.data.votes import read_votes
from tests.helpers.chromium import open_browser

PASSWORD = "to be or not to be"
PREFIX = "/proxy/7860"
FRAME = b"<!doctype html><iframe src='%s/'></iframe>" % PREFIX.encode()


class Proxy(BaseHTTPRequestHandler):
    """Pass on what is below the prefix, with a Host that is a name elsewhere. `/frame` shows the page in a frame."""

    port = 0

    def do_GET(self) -> None:
        if self.path == "/frame":
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(FRAME)
            return
        server = HTTPConnection("127.0.0.1", self.port)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = dict(self.headers) | {"Host": "7860-notebook.example.com"}
        server.request(self.command, self.path.removeprefix(PREFIX), body, headers)
        answer = server.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            # An answer without a length ends with the connection.
            if name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        self.end_headers()
        # Line by line, as the page's answers come.
        while chunk := answer.read1():
            self.wfile.write(chunk)

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing to stderr."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def served(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run, because a run has one server."""
    folder = tmp_path_factory.mktemp("proxied") / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("votes"))
    return folder


@pytest.fixture(scope="module")
def address(served: Path, site_of: Callable[..., Site]) -> Iterator[str]:
    """The address of the proxy."""
    port = free_port()
    app = build_app(site_of(served, "--password", PASSWORD, "--port", str(port), "--max_new_tokens", "8"))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), type("ProxyOfPort", (Proxy,), {"port": port}))
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{proxy.server_port}"
    proxy.shutdown()
    server.should_exit = server.force_exit = True


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with open_browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def until(browser: Any, condition: Callable[[], Any]) -> Any:
    return WebDriverWait(browser, 120, 0.1, [WebDriverException]).until(lambda _: condition())


def test_a_visitor_logs_in_votes_and_watches_a_rollout(browser: Any, address: str, served: Path) -> None:
    browser.get(f"{address}{PREFIX}/")
    browser.find_element(By.NAME, "username").send_keys("kim")
    browser.find_element(By.NAME, "password").send_keys(PASSWORD)
    browser.find_element(By.CSS_SELECTOR, "form button").click()
    until(browser, lambda: browser.find_element(By.ID, "answer-a").text)
    assert browser.current_url == f"{address}{PREFIX}/"
    browser.execute_script("document.getElementById('vote-a').click()")
    until(browser, lambda: browser.find_element(By.ID, "votes-count").text == "1")
    votes = read_votes(served / "votes" / "votes.jsonl")
    assert [vote["annotator"] for vote in votes] == ["kim"]
    until(browser, lambda: browser.find_element(By.ID, "rollout-prompt").get_property("value"))
    browser.execute_script("document.getElementById('rollout-go').click()")
    until(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, "#rollout-shown section")) == 5)


def test_the_page_stays_empty_in_a_frame(browser: Any, address: str) -> None:
    """It has to be opened in a window of its own."""
    browser.get(f"{address}/frame")
    browser.switch_to.frame(0)
    assert not browser.find_elements(By.CSS_SELECTOR, "form, #prefer-section")
    browser.switch_to.default_content()
