"""The gate of the page: what it lets through, and to whom; what the command refuses."""

import asyncio
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, MutableMapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from anyio import CapacityLimiter
from httpx2 import ASGITransport, AsyncClient
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from pipeline.app import server
from pipeline.app.server import build_app
from pipeline.app.site import Site, stream
from tests.helpers.refusals import refused

PASSWORD = "to be or not to be"


Make = Callable[..., Site]


@pytest.fixture(scope="module")
def client(run: Path, site_of: Make) -> Iterator[TestClient]:
    with TestClient(build_app(site_of(run)), base_url="http://127.0.0.1") as client:
        yield client


@contextmanager
def guarded_by(password: str, run: Path, folder: Path, site_of: Make) -> Iterator[TestClient]:
    """Serve a copy of the run, because a run has one server."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("votes"))
    with TestClient(build_app(site_of(folder, "--password", password)), base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture(scope="module")
def guarded(run: Path, site_of: Make, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with guarded_by(PASSWORD, run, tmp_path_factory.mktemp("guarded") / "run", site_of) as client:
        yield client


def test_the_page_and_its_report_are_served(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200 and "Fourstage" in page.text
    assert "script-src 'self';" in page.headers["content-security-policy"]
    report = client.get("/report")
    assert "The same prompts, answered by each stage" in report.text
    assert report.headers["content-security-policy"].startswith("default-src 'none'")


def test_a_run_that_was_not_measured_yet_is_shown(run: Path, site_of: Make, tmp_path: Path) -> None:
    shutil.copytree(run / "2_sft", tmp_path / "run" / "2_sft")
    with TestClient(build_app(site_of(tmp_path / "run")), base_url="http://127.0.0.1") as client:
        assert "not in this run" in client.get("/").text
        assert client.get("/report").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/file=/etc/passwd",
        "/docs",
        "/openapi.json",
        "/run.json",
        "/report/../run.json",
    ],
)
def test_what_the_page_does_not_need_is_not_there(client: TestClient, path: str) -> None:
    assert client.get(path).status_code in (400, 404)


def test_requests_are_small(client: TestClient) -> None:
    assert client.post("/compare", content=b"x" * (1 << 21)).status_code == 413


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_body_whose_length_is_not_known_is_refused_before_it_is_read(guarded: TestClient, method: str) -> None:
    guarded.cookies.clear()
    chunked = {"content-length": "4", "transfer-encoding": "chunked"}
    for path in ("/login", "/prefer/vote", "/"):
        assert guarded.request(method, path, content=b"body", headers=chunked).status_code == 411
    assert guarded.post("/login", content=b"x" * (1 << 21)).status_code == 413


def test_a_request_of_two_lengths_gets_one_answer() -> None:
    """A proxy that goes by the other length sees one request, and would give the second answer to somebody else."""
    gate = server.Gate(PlainTextResponse("the page"), None, 7860)
    served = uvicorn.Server(uvicorn.Config(gate, port=0, **server.SETTINGS))
    thread = threading.Thread(target=served.run, daemon=True)
    thread.start()
    while not served.started:
        time.sleep(0.01)
    address = served.servers[0].sockets[0].getsockname()
    hidden = "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    body = f"0\r\n\r\n{hidden}"
    lengths = f"Content-Length: {len(body)}\r\nTransfer-Encoding: chunked\r\n"
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(f"POST /compare HTTP/1.1\r\nHost: 127.0.0.1\r\n{lengths}\r\n{body}".encode())
        received = b""
        # The server closes the connection.
        while part := connection.recv(65536):
            received += part
    served.should_exit = True
    thread.join()
    assert received.startswith(b"HTTP/1.1 411")
    assert received.count(b"HTTP/1.1") == 1


def test_a_path_in_a_call_is_not_opened(client: TestClient, run: Path) -> None:
    answer = client.post(
        "/compare", json={"text": "What is 12?", "models": [str(run / "2_sft"), "../2_sft", "3_reward"]}
    )
    assert answer.status_code == 200 and answer.text == "", "no model of the page"
    for wrong in ({"stage": "../4_grpo", "policy": "2_sft"}, {"stage": "4_grpo", "policy": str(run / "2_sft")}):
        for path in ("/rollout", "/updates"):
            assert client.post(path, json={"text": "What is 12?", **wrong}).status_code == 422
    for path in ("/static/page.js.map", "/static/../server.py", "/static/%2e%2e/server.py"):
        assert client.get(path).status_code == 404


def test_only_losses_of_grpo_and_up_to_four_updates_can_be_asked_for(client: TestClient) -> None:
    request = {"stage": "4_grpo", "policy": "4_grpo", "text": "What is 12?"}
    assert client.post("/updates", json=request | {"loss": "bnpo", "updates": 4}).status_code == 200
    for wrong in ({"loss": "../bnpo"}, {"updates": 5}, {"updates": 0}, {"stage": "3_ppo"}):
        assert client.post("/updates", json=request | wrong).status_code == 422


def test_what_cannot_be_asked_is_refused(client: TestClient) -> None:
    request = {"text": "What is 12?", "models": ["2_sft"]}
    for wrong in (
        {"temperature": -1},
        {"top_p": 0},
        {"longest": 10**9},
        {"seed": 1 << 70},
        {"text": ""},
        {"models": "x"},
    ):
        assert client.post("/compare", json=request | wrong).status_code == 422


def test_a_visitor_who_leaves_ends_the_answer() -> None:
    turns, ended, steps = CapacityLimiter(1), [], []

    def answer() -> Generator[int]:
        try:
            for step in range(10**9):
                steps.append(step)
                time.sleep(0.01)
                yield step
        finally:
            ended.append(True)

    async def visit() -> None:
        sent, gone = [], asyncio.Event()

        async def receive() -> dict[str, str]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)
            if len(sent) > 3:
                gone.set()

        scope = {"type": "http", "method": "POST", "asgi": {"spec_version": "2.3"}}
        await stream(answer(), turns)(scope, receive, send)

    asyncio.run(visit())
    assert ended and turns.borrowed_tokens == 0, "the next visitor has a turn"
    count = len(steps)
    time.sleep(0.1)
    assert len(steps) == count < 100


@pytest.mark.parametrize("comment", [b'"\\ud800"', b"NaN", b"[" * 5000, b"\xff", b'{"a": '])
def test_what_is_no_request_is_refused(client: TestClient, comment: bytes) -> None:
    body = b'{"annotator": "ann", "page": "p", "vote": "v", "pair": "p", "choice": "first", "comment": %s}' % comment
    answer = client.post("/prefer/vote", content=body, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500


def test_other_sites_cannot_use_the_page_of_this_machine(client: TestClient) -> None:
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    for site in ("cross-site", "same-site"):
        crossing = {"sec-fetch-site": site, "sec-fetch-mode": "cors"}
        assert client.post("/compare", json={}, headers=crossing).status_code == 403
        assert client.get("/report", headers=crossing).status_code == 403
        assert client.get("/", headers={"sec-fetch-site": site, "sec-fetch-mode": "navigate"}).status_code == 200


def test_without_the_password_there_is_only_the_form(guarded: TestClient) -> None:
    page = guarded.get("/")
    assert re.search(r'<input[^>]*type="password"', page.text) and "prefer-section" not in page.text
    for path in ("/report", "/prompts", "/compare", "/prefer/next", "/static/page.js"):
        assert guarded.get(path).status_code == 401
    wrong = guarded.post("/login", data={"username": "ann", "password": "wrong"})
    assert wrong.status_code == 401 and not guarded.cookies
    assert 'value="ann"' in wrong.text, "the name need not be typed again"
    assert guarded.post("/login", data={"username": " ", "password": PASSWORD}).status_code == 401


def test_wrong_passwords_are_checked_one_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = server.Gate(PlainTextResponse("the page"), PASSWORD, 7860)
    pause = 0.1
    monkeypatch.setattr(server, "SECONDS_AFTER_WRONG", pause)

    async def attempt(password: str) -> tuple[int, float]:
        async with AsyncClient(transport=ASGITransport(gate), base_url="http://127.0.0.1") as visitor:
            answer = await visitor.post("/login", data={"username": "ann", "password": password})
        return answer.status_code, time.monotonic()

    async def flood() -> list[tuple[int, float]]:
        return await asyncio.gather(*(attempt(f"guess {number}") for number in range(6)), attempt(PASSWORD))

    *wrong, (entered, _) = asyncio.run(flood())
    assert entered == 303 and {status for status, _ in wrong} == {401}
    times = sorted(answered for _, answered in wrong)
    assert all(later - earlier > 0.9 * pause for earlier, later in pairwise(times))


def test_a_password_keeps_its_spaces(run: Path, site_of: Make, tmp_path: Path) -> None:
    with guarded_by(" two words ", run, tmp_path / "spaced", site_of) as client:
        assert client.post("/login", data={"username": "ann", "password": " two words "}).status_code == 200


def test_a_login_outlives_a_restart_and_cannot_be_forged(
    guarded: TestClient, run: Path, site_of: Make, tmp_path: Path
) -> None:
    entered = guarded.post("/login", data={"username": "Änn", "password": PASSWORD})
    assert entered.status_code == 200 and 'value="Änn" readonly' in entered.text
    assert guarded.post("/prefer/rates", json={}).status_code == 404, "visitors do not see how others vote"
    (cookie,) = guarded.cookies.jar
    assert cookie.has_nonstandard_attr("HttpOnly")
    with guarded_by(PASSWORD, run, tmp_path / "restarted", site_of) as restarted:
        assert restarted.get("/report", cookies={cookie.name: str(cookie.value)}).status_code == 200
        signature = str(cookie.value).rpartition(".")[2]
        for forged in (f"Ym9i.{signature}", b"Ym9i.\xe9", "Ym9i", "."):
            value = forged if isinstance(forged, bytes) else forged.encode()
            header = {"cookie": f"{cookie.name}=".encode() + value}
            assert restarted.get("/report", headers=header).status_code == 401
    with guarded_by("another", run, tmp_path / "other", site_of) as stranger:
        assert stranger.get("/report", cookies={cookie.name: str(cookie.value)}).status_code == 401


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "--host: 0.0.0.0: lets other machines open the page; give a --password as well"),
        (["--password"], "--password: nothing: is empty; give one"),
        (["--port", "0"], "--port: 0: is not between 1 and 65535"),
        (["--host", "no.such.host.invalid"], "--host: no.such.host.invalid: is not an address of this machine"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(
    run: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("getpass.getpass", lambda prompt: "")
    assert refused(capsys, "app", run, *options).splitlines() == [message]


def test_a_port_in_use_and_a_folder_that_is_no_run_are_refused_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seed0" / "run.json").write_text(json.dumps({}))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        message = refused(capsys, "app", tmp_path, "--port", port)
    assert message.splitlines() == [
        f"RUN: {tmp_path}: holds several runs; name one, such as {tmp_path / 'seed0'}",
        f"--port: {port}: cannot be used (Address already in use); choose another",
    ]
