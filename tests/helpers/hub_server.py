"""A small Hub on this machine: repositories, tokens and collections, and faults at any request.

It speaks the protocol of `huggingface_hub` without Xet, so the real clients push to it and load from it. Large files
lie on a second host, as on the Hub, to which no token may be sent.
"""

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.helpers.hub_routes import LARGE, ROUTES, Answer, Call, Commit, Refusal, Repo, Token, refuse

HANGS = 8.0
"""Seconds for which a request hangs."""


@dataclass(frozen=True)
class Request:
    """A request that was made; `host` is "hub" or "storage"."""

    method: str
    path: str
    token: str | None
    host: str


@dataclass
class Fault:
    """What happens instead of an answer.

    Args:
        kind: A status; "drop", which closes the connection amid the request; "lost", which closes it after the
            request was carried out; or "hang", which sends nothing for some seconds.
        path: Regular expression that the method and path of the request contain.
        nth: The first of these requests that fails.
        times: How many of them fail.
        headers: Further headers of the answer.
        body: Body of the answer; by default that of an error of the Hub.
    """

    kind: int | str
    path: str = ""
    nth: int = 1
    times: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    seen: int = 0


class Hub:
    """The server, running from its construction to `close`.

    Args:
        tokens: Tokens by their text.
        spaces: Whether it has Spaces.
        collections: Whether it has collections.
        part: Size in bytes of the parts in which larger files are uploaded; by default they are uploaded whole.
    """

    def __init__(
        self,
        tokens: Mapping[str, Token] | None = None,
        *,
        spaces: bool = True,
        collections: bool = True,
        part: int | None = None,
    ) -> None:
        self.tokens = dict(tokens if tokens is not None else {"hf_alice": Token("alice")})
        self.spaces, self.has_collections, self.part = spaces, collections, part
        self.repos: dict[tuple[str, str], Repo] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        # Keys are git ids, or SHA-256 hashes of large files.
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, host)) for host in ("hub", "storage")]
        self.url = f"http://127.0.0.1:{self.servers[0].server_port}"
        self.storage = f"http://localhost:{self.servers[1].server_port}"
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def environment(self, token: str | None = "hf_alice") -> dict[str, str]:
        """Variables with which a program uses this server."""
        variables = {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return variables | {"HF_TOKEN": token or "", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0" if token else "1"}

    def fail(self, kind: int | str, path: str = "", nth: int = 1, times: int = 1, **more: Any) -> None:
        """Let a request fail; see `Fault`."""
        self.faults.append(Fault(kind, path, nth, times, **more))

    def add(self, repo_id: str, files: Mapping[str, bytes], type: str = "model", private: bool = False) -> str:
        """Put files into a repository, which is created if necessary. Return the id of the commit."""
        repo = self.repos.get((type, repo_id)) or self.create(type, repo_id, private)
        large = {path: content for path, content in files.items() if path.endswith(LARGE)}
        self.blobs.update({hashlib.sha256(content).hexdigest(): content for content in large.values()})
        added = {path: hashlib.sha256(content).hexdigest() for path, content in large.items()}
        added |= {path: self.store(content) for path, content in files.items() if path not in large}
        return self.commit(repo, "main", "add", repo.branches["main"].files | added).oid

    def files(self, repo_id: str, type: str = "model", revision: str = "main") -> dict[str, bytes]:
        """Files of a repository without its .gitattributes; empty if there is no such repository or revision."""
        repo = self.repos.get((type, repo_id))
        commit = repo.find(revision) if repo else None
        if commit is None:
            return {}
        return {path: self.blobs[oid] for path, oid in sorted(commit.files.items()) if path != ".gitattributes"}

    def commits(self, repo_id: str, type: str = "model", revision: str = "main") -> list[str]:
        """Titles of the commits of a revision, the newest first, without that of the repository's creation."""
        commit = self.repos[type, repo_id].find(revision)
        titles = []
        while commit is not None and commit.parent is not None:
            titles.append(commit.title)
            commit = commit.parent
        return titles

    def create(self, type: str, repo_id: str, private: bool, sdk: str | None = None) -> Repo:
        repo = self.repos[type, repo_id] = Repo(repo_id, type, private, sdk)
        lines = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LARGE)
        self.commit(repo, "main", "initial commit", {".gitattributes": self.store(lines.encode())})
        return repo

    def store(self, content: bytes) -> str:
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.blobs[oid] = content
        return oid

    def commit(
        self, repo: Repo, branch: str, title: str, files: dict[str, str], parent: Commit | None = None
    ) -> Commit:
        parent = parent or repo.branches.get(branch)
        text = f"{repo.id}{branch}{title}{parent and parent.oid}{sorted(files.items())}"
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), parent, title, files)
        repo.branches[branch] = commit
        return commit

    def answer(self, method: str, path: str, token: str | None, host: str, body: bytes, headers: Any) -> Answer:
        parts = urlsplit(path)
        call = Call(self, method, {k: v[0] for k, v in parse_qs(parts.query).items()}, token, body, headers)
        for methods, pattern, handler in ROUTES:
            match = pattern.match(parts.path)
            if match and re.fullmatch(methods, {"HEAD": "GET"}.get(method, method)):
                values = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                try:
                    if token is not None and host == "hub":
                        self.check(token)
                    with self.lock:
                        content = handler(call, **values)
                except Refusal as refusal:
                    return refuse(refusal)
                if isinstance(content, tuple):
                    return content
                return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()
        return refuse(Refusal(404, f"Cannot {method} {parts.path}"))

    def check(self, token: str) -> None:
        """Raise a `Refusal` if a token is not of a user, or has expired."""
        owner = self.tokens.get(token)
        if owner is None:
            raise Refusal(401, "Invalid username or password.")
        if owner.expired:
            raise Refusal(401, f'User Access Token "{token[:5]}" is expired')


def _handler(hub: Hub, host: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Headers and body are sent together.
        wbufsize = -1
        disable_nagle_algorithm = True

        def log_message(self, *args: Any) -> None:
            pass

        def drop(self) -> None:
            # With this option, closing resets the connection.
            with suppress(OSError):
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

        def pieces(self) -> Iterator[bytes]:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                while size := int(self.rfile.readline(), 16):
                    yield self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                yield self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def serve(self) -> None:
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            fault = None
            with hub.lock:
                hub.requests.append(Request(self.command, self.path, token, host))
                for candidate in hub.faults:
                    if re.search(candidate.path, f"{self.command} {self.path}"):
                        candidate.seen += 1
                        if candidate.nth <= candidate.seen < candidate.nth + candidate.times:
                            fault = fault or candidate
            if fault is not None and fault.kind == "drop":
                if self.command in ("POST", "PUT"):
                    self.rfile.read1(1000)
                self.drop()
                return
            body = b"".join(self.pieces())
            if fault is not None and fault.kind == "hang":
                threading.Event().wait(HANGS)
                self.drop()
                return
            if fault is not None and isinstance(fault.kind, int):
                status, headers, content = refuse(Refusal(fault.kind, "injected"))
                headers, content = headers | fault.headers, content if fault.body is None else fault.body
            else:
                status, headers, content = hub.answer(self.command, self.path, token, host, body, self.headers)
                if fault is not None:
                    self.drop()
                    return
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = serve

    return Handler
