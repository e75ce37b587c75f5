"""The web server: the page, behind a gate that checks who may request it."""

import asyncio
import base64
import hashlib
import hmac
import threading
from collections import Counter
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import parse_qs

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from markupsafe import Markup
from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline.app import compare, rollout, voting
from pipeline.app.prompts import pocket_things, question_advice
from pipeline.app.site import TEMPLATES, Site
from pipeline.report.differences import differences
from pipeline.report.load import load_run
from pipeline.report.page import page_content, render
from pipeline.report.path_picture import headline, path_boxes, title
from pipeline.report.summary import summarise
from pipeline.report.targets import is_pocket, load_targets
from pipeline.report.text import visible
from pipeline.report.verdict import find_failures, verdict_content
from pipeline.stages import STAGES

SECTIONS = {"compare": ("Compare", compare), "prefer": ("Prefer", voting), "rollout": ("Watch a rollout", rollout)}
"""The sections of the page between the path and the report: the title of each, and the module that fills it.

A section named `prefer`, of the module `voting`, has the template `prefer.html.jinja`, the script `voting.js`, and what
`voting.content` returns as the template's variable `voting`.
"""
LARGEST_REQUEST = 1 << 20
"""Maximum size of a request's body, in bytes."""
SECONDS_AFTER_WRONG = 1.0
"""Seconds after a wrong password during which its visitor waits and no other password is checked."""
SETTINGS: dict[str, Any] = {"http": "h11", "ws": "none", "log_level": "warning", "timeout_graceful_shutdown": 1}
"""How uvicorn serves the page, which has no websockets. h11 bounds the headers of a request."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
"""What the browser may load: nothing from another host, and only the page's own script."""
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
"""The same for the report, which has no scripts."""


class Gate:
    """Refuse requests that are not for the page, and visitors without the `password` (None if the page needs none)."""

    def __init__(self, app: ASGIApp, password: str | None, port: int) -> None:
        self.app = app
        self.password = password
        # Browsers share cookies between ports.
        self.cookie = f"fourstage_{port}"
        # Held while a password is checked.
        self._turn = asyncio.Lock()
        # Cookies are signed with a key that follows from the password, so that a login outlives a restart of the
        # server. The key is slow to compute, so that a stolen cookie does not reveal the password.
        self.key = b""
        if password:
            self.key = hashlib.scrypt(password.encode(), salt=b"fourstage", n=1 << 14, r=8, p=1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on to the page.

        `request.state.annotator` is then the name of the visitor, or None if the page has no password.
        """
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        # The page has no websockets, which are the only other type.
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        name = self.visitor(request.cookies.get(self.cookie, ""))
        response = await self.refuse(request, name)
        scope.setdefault("state", {})["annotator"] = name

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("Content-Security-Policy", POLICY)
                # Otherwise, the scripts of an earlier release could stay in a browser.
                headers.setdefault("Cache-Control", "no-cache")
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        await (response or self.app)(scope, receive, send_with_headers)

    async def refuse(self, request: Request, name: str | None) -> Response | None:
        """Return the response to a request that does not reach the page, or None if it may pass.

        `name` is the name of a visitor who has logged in, or None.
        """
        path = request.url.path
        headers = request.headers
        # A link on another site may open the page, but no script from there, or from another port here, may use it.
        is_foreign = headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
        if is_foreign and (request.method != "GET" or headers.get("sec-fetch-mode") == "cors"):
            return PlainTextResponse("Refused: the request comes from another site", 403)

        # A body in chunks has no length in advance, and overrides one that the request claims. A proxy may disagree on
        # where it ends, so that nothing more is read from this connection.
        size = headers.get("content-length", "" if request.method == "POST" else "0")
        if not size.isdigit() or "transfer-encoding" in headers:
            return PlainTextResponse("Length required", 411, {"Connection": "close"})
        if int(size) > LARGEST_REQUEST:
            return PlainTextResponse(f"Too large: {size} bytes, at most {LARGEST_REQUEST}", 413)

        if self.password is None:
            return None
        if path == "/login" and request.method == "POST":
            return await self.log_in(request)
        if name is not None:
            return None
        if request.method == "GET" and path in ("/", "/login"):
            return login_form()
        return PlainTextResponse("Log in first", 401)

    async def log_in(self, request: Request) -> Response:
        """Answer the form: with a signed cookie, or with the form again.

        At most one wrong password per `SECONDS_AFTER_WRONG` is checked, over all connections.
        """
        form = parse_qs((await request.body()).decode("utf-8", "replace"))
        name = form.get("username", [""])[0].strip()[:80]
        async with self._turn:
            # A comparison in constant time does not reveal how many characters are right.
            if not hmac.compare_digest(form.get("password", [""])[0].encode(), str(self.password).encode()):
                await asyncio.sleep(SECONDS_AFTER_WRONG)
                return login_form("Name or password is wrong.", 401, name)
        if not name:
            return login_form("Give a name as well.", 401)
        response = RedirectResponse("./", 303)
        days = 30
        response.set_cookie(self.cookie, self.sign(name), max_age=days * 86400, httponly=True, samesite="lax")
        return response

    def sign(self, name: str) -> str:
        """Return the content of a cookie: a name, and a signature that only this server can make."""
        signature = hmac.new(self.key, name.encode(), "sha256").hexdigest()
        return f"{base64.urlsafe_b64encode(name.encode()).decode()}.{signature}"

    def visitor(self, cookie: str) -> str | None:
        """Return the name in a cookie, or None if this server did not sign it."""
        try:
            name = base64.urlsafe_b64decode(cookie.partition(".")[0]).decode()
        except ValueError:
            return None
        if not name or not self.password:
            return None
        # In constant time, which does not reveal how many characters are right.
        is_signed = hmac.compare_digest(self.sign(name).encode(), cookie.encode())
        return name if is_signed else None


def login_form(message: str = "", status: int = 200, name: str = "") -> Response:
    """Return the page with the form, perhaps with a message, and with the name that was typed."""
    return HTMLResponse(TEMPLATES.get_template("login.html.jinja").render(message=message, name=name), status)


def build_app(site: Site) -> ASGIApp:
    """Return the page's application: its routes behind a `Gate`."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    for _, module in SECTIONS.values():
        app.include_router(module.routes(site))

    # FastAPI's own answer repeats what was sent, and fails if that cannot be encoded.
    message = "The server does not understand this request."
    app.add_exception_handler(RequestValidationError, lambda request, error: PlainTextResponse(message, 422))

    @app.get("/")
    def show(request: Request) -> HTMLResponse:
        run = load_run(site.run)
        links = {kind: f"#{info.box.section}" for kind, info in STAGES.items() if info.box}
        steps = path_boxes(run, links)
        sections = []
        contents = {}
        for name, (heading, module) in SECTIONS.items():
            module_name = module.__name__.rpartition(".")[2]
            sections.append({"name": name, "title": heading, "script": module_name})
            contents[module_name] = module.content(site)
        page = TEMPLATES.get_template("page.html.jinja").render(
            title=visible(title(run)),
            headline=visible(headline(run)),
            verdict=Markup(render("verdict.html.jinja", verdict_content(run, find_failures(run)))),
            path=Markup(render("path.html.jinja", {"steps": steps})),
            about=question_advice(site.run),
            things=pocket_things(site.run),
            annotator=getattr(request.state, "annotator", None),
            sections=sections,
            **contents,
        )
        return HTMLResponse(page)

    @app.get("/report")
    def report() -> HTMLResponse:
        run = load_run(site.run)
        changes = differences(run)
        targets = load_targets() if is_pocket(run) else []
        content = page_content(run, summarise(run, changes, targets), changes)
        return HTMLResponse(render("report.html.jinja", content), headers={"Content-Security-Policy": REPORT_POLICY})

    @app.post("/prompts")
    def prompts() -> list[dict[str, str]]:
        counts: Counter[tuple[str, str]] = Counter()
        offered = []
        for prompt in site.prompts:
            counts[prompt.key, prompt.kind] += 1
            # A dozen of each kind is enough to choose from.
            if counts[prompt.key, prompt.kind] <= 12:
                kind = visible(prompt.kind, 40)
                offered.append({"key": prompt.key, "kind": kind, "text": prompt.text, "answer": prompt.result})
        return offered

    app.mount("/static", StaticFiles(packages=[("pipeline.app", "static")]))
    app.mount("/report-styles", StaticFiles(packages=[("pipeline.report", "templates")]))

    gate = Gate(app, site.options.password, site.options.port)
    if site.options.password is not None:
        return gate
    # Without a password, another site must not read this page through a host name that resolves to this machine.
    return TrustedHostMiddleware(gate, ["127.0.0.1", "localhost", "[::1]", site.options.host])


def serve(site: Site) -> None:
    """Serve the page until Ctrl-C, and load the models of the run meanwhile."""
    app = build_app(site)
    options = site.options
    # In a URL, an IPv6 address is in brackets.
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(f"http://{host}:{options.port} shows {site.run}. Ctrl-C ends it.", flush=True)
    threading.Thread(target=site.models.load_stages, daemon=True).start()
    uvicorn.run(app, host=options.host, port=options.port, **SETTINGS)
