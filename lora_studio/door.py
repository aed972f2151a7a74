"""The door: what the network may ask of the app, from which pages, how often, and how the app is served.

`Door` stands in front of Gradio as plain ASGI. Only the paths in READ and ACT exist; a page of another site gets
nothing; every answer carries the headers that keep a browser to this app's own files. Knows no runs and no datasets:
whose work a call may touch is decided where the handlers get their Studio (ui.desk).
"""

import base64
import contextlib
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import psutil
import uvicorn
from fastapi import FastAPI
from gradio import processing_utils
from starlette.background import BackgroundTask
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_studio.errors import StudioError
from lora_studio.limits import MIB, Limits
from lora_studio.owners import NOBODY, SECRET, new_secret
from lora_studio.visitors import (
    HEADER,
    Downloads,
    Pages,
    Rate,
    address_of,
    browser_of,
    cookie_name,
    nobody,
    on_space,
    told_apart,
    visitor_of,
)

API = "/gradio_api"
CANCEL_BYTES = 4096  # of a call that cancels another
UPLOADS_S = 600  # within which uploads are counted
LOOPBACK = ("127.0.0.1", "localhost", "::1")
COOKIE_S = 30 * 86_400

# Whatever else Gradio brings, now or in a later version, is not there: files of its cache, a proxy, dashboards, docs.
FILES = (
    r"/(assets|static|svelte)/.+|/(theme\.css|favicon\.ico|manifest\.json|robots\.txt|pwa_icon(/\d+)?|plotly\.min\.js)"
)
SIGNING = r"/login/(huggingface|callback)|/logout"
ASKING = (
    rf"{API}/(info|startup-events|queue/data|upload_progress|heartbeat/\w+|theme\.css)/?"
    rf"|{API}/call/(v2/)?\w+/\w+|/config/?|/download/[0-9a-f]{{32}}"
)
READ = re.compile(rf"/|{FILES}|{SIGNING}|{ASKING}")
ACT = re.compile(rf"{API}/(queue/join|component_server|upload|cancel|reset|(run|api|call|call/v2)/\w+)/?")
MCP = re.compile(rf"{API}/mcp/?")  # where LORA_STUDIO_MCP=1 lets agents in
FETCHING = ("async_ssrf_protected_get", "async_ssrf_protected_download", "ssrf_protected_download")
FETCHING += ("save_url_to_cache", "unsafe_download")  # with which Gradio would get what a call names by its address
CANCEL = re.compile(rf"{API}/cancel/?")
INLINE = re.compile(rb"<script(?:\s+data-[\w-]+)?>(.*?)</script>", re.DOTALL)
FREE = re.compile(FILES)  # of the count of calls: what a page is drawn from

ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cross-Origin-Resource-Policy": "same-origin",
}
POLICY = {
    "default-src": "'self'",
    "script-src": "'self' 'unsafe-eval'",  # Gradio compiles js_on_load; the page's own inline scripts are added by hash
    "script-src-attr": "'none'",
    "style-src": "'self' 'unsafe-inline'",
    "img-src": "'self' data: blob:",
    "font-src": "'self' data:",
    "connect-src": "'self'",
    "worker-src": "'self' blob:",
    "object-src": "'none'",
    "base-uri": "'self'",
    "form-action": "'self'",
}


@dataclass(frozen=True)
class Place:
    """Where the app listens and what it is called there."""

    host: str
    port: int
    origins: tuple[str, ...]  # whose pages may call it
    names: frozenset[str] | None  # that a request may be addressed to; None: the proxy in front has seen to it

    @property
    def url(self) -> str:
        return f"http://{_bracketed(self.host)}:{self.port}"


def place(host: str, port: int) -> Place:
    """A Space's own addresses; on a laptop those of this machine, and what LORA_STUDIO_ORIGINS adds to them."""
    added = tuple(
        one.strip().rstrip("/") for one in os.environ.get("LORA_STUDIO_ORIGINS", "").split(",") if one.strip()
    )
    if on_space():
        named = [one.strip() for one in os.environ.get("SPACE_HOST", "").split(",") if one.strip()]
        return Place(host, port, (*(f"https://{name}" for name in named), *added), None)
    names = {*LOOPBACK, host.lower()}
    if host in ("0.0.0.0", "::"):  # every network this machine is in; a name that somebody points here is none of these
        names |= {socket.gethostname().lower()}
        known = [one for found in psutil.net_if_addrs().values() for one in found]
        names |= {one.address.split("%")[0] for one in known if one.family in (socket.AF_INET, socket.AF_INET6)}
    own = [f"http://{_bracketed(name)}" for name in sorted(names)]
    origins = [f"{one}:{port}" for one in own] + (own if port == 80 else [])
    return Place(host, port, (*origins, *added), frozenset({*names, *(urlsplit(one).hostname or "" for one in added)}))


def agents_come() -> bool:
    """Whether the endpoints are tools of an MCP server, too: LORA_STUDIO_MCP=1.

    Gradio's server asks in one name for all who call it, so nobody could be told apart there. Raises E_MCP.
    """
    if os.environ.get("LORA_STUDIO_MCP") != "1":
        return False
    if told_apart():
        message = "The MCP server cannot tell visitors apart."
        raise StudioError("E_MCP", message, "Leave LORA_STUDIO_MCP or LORA_STUDIO_VISITORS away.")
    if importlib.util.find_spec("mcp") is None:
        raise StudioError("E_MCP", "The package mcp is not installed.", "pip install 'mcp>=1.21,<2'")
    return True


def _bracketed(name: str) -> str:
    return f"[{name}]" if ":" in name else name


class Door:
    """ASGI middleware, the outermost."""

    def __init__(
        self, app: ASGIApp, *, place: Place, limits: Limits, pages: Pages, waiting: Callable[[str], int], uploads: Path
    ) -> None:
        """waiting: how many calls from an address stand in Gradio's queue. uploads: the folder that fills up."""
        self.app, self.place, self.limits, self.agents = app, place, limits, agents_come()
        self.pages, self.waiting, self.uploads = pages, waiting, uploads
        self.calls = Rate(limits.calls_a_minute)
        self.uploaded = Rate(limits.uploaded_bytes, UPLOADS_S)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # a web socket: nothing here uses one
            return await send({"type": "websocket.close", "code": 1008})
        request = Request(scope)
        refused = self._refusal(request)
        dressed = self._dressed(request, send)
        if refused is None and told_apart() and request.method == "POST" and CANCEL.fullmatch(scope["path"]):
            try:
                body = await Request(scope, receive).body()  # as short as it said
            except ClientDisconnect:
                return None
            receive = _again(body, receive)
            refused = self._refusal_of_cancelling(request, body)
        if refused is None:
            return await self.app(scope, receive, dressed)
        status, why = refused
        answer = JSONResponse({"detail": why, "error": why}, status, {"Retry-After": "10"} if status == 429 else None)
        await answer(scope, receive, dressed)

    def _refusal(self, request: Request) -> tuple[int, str] | None:
        """Status and reason, for a request that goes no further."""
        path, acts = request.scope["path"], request.method == "POST"  # what the URL says depends on the Host header
        origin = request.headers.get("origin")
        if not self._ours(request.headers.get("host", "")):
            return 403, "This app is not served under that name."
        if origin is not None and origin not in self.place.origins and not self._is_own(origin, request):
            hint = "If this is its own page, set LORA_STUDIO_ORIGINS to the address in the browser."
            return 403, f"Pages of other sites may not use this app. {hint}"
        if request.method == "OPTIONS":
            return None
        known = (ACT if acts else READ).fullmatch(path) or (acts and self.agents and MCP.fullmatch(path))
        if not known or request.method not in ("GET", "HEAD", "POST"):
            return 404, "There is nothing here."
        if path.startswith("/download/") and request.method != "GET":
            return 404, "There is nothing here."
        if not FREE.fullmatch(path) and (wait := self.calls.wait_s(address_of(request))):
            return 429, f"That is more than {self.limits.calls_a_minute:.0f} calls a minute; wait {math.ceil(wait)} s."
        return self._refusal_of_call(request, path) if acts else self._refusal_of_page(request, path)

    def _refusal_of_call(self, request: Request, path: str) -> tuple[int, str] | None:
        uploads = path.startswith(f"{API}/upload")
        most = self.limits.file_bytes + MIB if uploads else self.limits.call_bytes
        most = CANCEL_BYTES if CANCEL.fullmatch(path) else most
        length = request.headers.get("content-length", "")
        if not length.isdecimal() or "transfer-encoding" in request.headers:  # in pieces, of any length
            return 411, "The call does not say how long it is."
        if int(length) > most:
            return 413, f"That is {int(length):,} bytes; at most {most:,} are taken."
        if uploads and (refused := self._refusal_of_upload(request, int(length))):
            return refused
        waits = self.limits.calls_waiting < math.inf and self.waiting(address_of(request))
        if waits and waits >= self.limits.calls_waiting:
            return 429, f"{waits} of your calls are waiting already."
        return None

    def _refusal_of_upload(self, request: Request, length: int) -> tuple[int, str] | None:
        if told_apart() and browser_of(request) is None:
            return 403, str(nobody())
        if shutil.disk_usage(self.uploads).free - length < self.limits.reserve_bytes:
            return 507, "The disk is nearly full. Try again later."
        if wait := self.uploaded.wait_s(address_of(request), length):
            most = f"{self.uploaded.most / MIB:,.0f} MB in {UPLOADS_S / 60:.0f} minutes"
            return 429, f"With this file you would have sent more than {most}; wait {math.ceil(wait)} s."
        return None

    def _refusal_of_cancelling(self, request: Request, body: bytes) -> tuple[int, str] | None:
        """What is cancelled is what the browser's own page has asked for."""
        try:
            page = json.loads(body).get("session_hash")
        except (ValueError, AttributeError, RecursionError):
            page = None
        if not isinstance(page, str) or not self.pages.belongs(page, browser_of(request)):
            return 404, "There is nothing here."
        return None

    def _refusal_of_page(self, request: Request, path: str) -> tuple[int, str] | None:
        """What comes for a page goes to the browser that opened it."""
        beats = path.startswith(f"{API}/heartbeat/")
        page = path.rpartition("/")[2] if beats else request.query_params.get("session_hash")
        if page and told_apart() and not self.pages.belongs(page, browser_of(request)):
            return 404, "There is nothing here."
        return None

    def _ours(self, host: str) -> bool:
        if self.place.names is None:
            return True
        with contextlib.suppress(ValueError):
            return urlsplit(f"//{host}").hostname in self.place.names
        return False

    def _is_own(self, origin: str, request: Request) -> bool:
        """Whether a page of this machine came from where it now calls: a tunnel's or a mapped port, not ours."""
        address = f"//{request.headers.get('host', '')}"
        here = self.place.names is not None and urlsplit(address).hostname in LOOPBACK
        return here and origin in (f"http:{address}", f"https:{address}")

    def _dressed(self, request: Request, send: Send) -> Send:
        """`send` with the headers of every answer and, on the page itself, the cookie."""
        cookie = _cookie(request) if told_apart() and request.method == "GET" and request.scope["path"] == "/" else ""

        async def dressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(ALWAYS)
                headers.setdefault("Content-Security-Policy", _policy())
                if cookie and message["status"] == 200:
                    headers.append("Set-Cookie", cookie)
                    headers["Cache-Control"] = "no-store"
            await send(message)

        return dressed


def _again(body: bytes, receive: Receive) -> Receive:
    """`receive` for who comes after one that has read the whole body."""
    told = False

    async def once_more() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once_more


class Scripts:
    """ASGI middleware inside the page's app: lets the inline scripts run that the page comes with, and no others."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message = {}
        body = bytearray()

        async def held(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            elif message["type"] != "http.response.body":
                await send(message)
            else:
                body.extend(message.get("body", b""))
                if not message.get("more_body"):
                    MutableHeaders(scope=start)["Content-Security-Policy"] = _policy(INLINE.findall(body))
                    await send(start)
                    await send({**message, "body": bytes(body)})

        is_page = scope["type"] == "http" and scope["path"] == "/"
        await self.app(scope, receive, held if is_page else send)


def _policy(scripts: Sequence[bytes] = ()) -> str:
    """The Content-Security-Policy of an answer with these scripts in it."""
    hashes = [base64.b64encode(hashlib.sha256(script).digest()).decode() for script in scripts]
    known = " ".join([POLICY["script-src"], *(f"'sha256-{one}'" for one in hashes)])
    framing = "'self' https://huggingface.co https://*.hf.space" if on_space() else "'self'"
    return "; ".join(
        f"{name} {what}" for name, what in {**POLICY, "script-src": known, "frame-ancestors": framing}.items()
    )


def _cookie(request: HTTPConnection) -> str:
    """The visitor's secret, the one that came or a new one. On a Space the page lives in a frame of another site."""
    name = cookie_name()
    came = request.cookies.get(name, "")
    secret = came if SECRET.fullmatch(came) else new_secret()
    framed = "SameSite=None; Secure; Partitioned" if on_space() else "SameSite=Lax"
    return f"{name}={secret}; Path=/; Max-Age={COOKIE_S}; HttpOnly; {framed}"


# ---- routes of our own -------------------------------------------------------------------------------------------


def routes(downloads: Downloads, plotly: Path) -> list[BaseRoute]:
    """Downloads by ticket, and the script that draws figures."""

    def download(request: Request) -> Response:
        who = visitor_of(request)
        path = downloads.take(request.path_params["ticket"], who.owner if told_apart() else NOBODY)
        if path is None:
            return JSONResponse({"detail": "There is nothing here."}, 404)
        forget = BackgroundTask(shutil.rmtree, path.parent, ignore_errors=True)
        headers = {"Cache-Control": "no-store"}
        return FileResponse(path, 200, headers, "application/octet-stream", filename=path.name, background=forget)

    def script(_: Request) -> Response:
        return FileResponse(plotly, headers={"Cache-Control": "public, max-age=86400"})

    return [Route("/download/{ticket}", download, methods=["GET"]), Route("/plotly.min.js", script, methods=["GET"])]


# ---- serving -----------------------------------------------------------------------------------------------------


def behind(
    page: gr.Blocks, place: Place, limits: Limits, pages: Pages, routes: Sequence[BaseRoute], looks: Mapping[str, Any]
) -> FastAPI:
    """The page mounted under an app of our own, with the door in front. looks: options of Gradio's launch."""
    fetch_nothing()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    heads = ["content-type", HEADER]
    # its presence switches off Gradio's own CORS, which answers every origin with its own name
    app.add_middleware(
        CORSMiddleware,
        allow_origins=place.origins,
        allow_credentials=True,
        allow_methods=["GET", "POST"],
        allow_headers=heads,
    )
    app.add_middleware(Door, **_settings(page, place, limits, pages))
    inside = {"routes": list(routes), "middleware": [Middleware(Scripts)]}
    shown = {"show_error": False, "allowed_paths": [], "mcp_server": agents_come(), "app_kwargs": inside, **looks}
    return gr.mount_gradio_app(app, page, path="/", server_name=place.host, server_port=place.port, **shown)


def launch(
    page: gr.Blocks, place: Place, limits: Limits, pages: Pages, routes: Sequence[BaseRoute], looks: Mapping[str, Any]
) -> None:
    """Serve through Gradio's launch, which ZeroGPU takes over, with the same door inside it; returns at once.

    Gradio's own CORS then stands outside the door: a page of another site may read an answer, but each is a refusal.
    """
    fetch_nothing()
    front = [Middleware(Door, **_settings(page, place, limits, pages)), Middleware(Scripts)]
    inside = {"routes": list(routes), "middleware": front}
    shown = {"show_error": False, "quiet": True, "mcp_server": False, "share": False, "app_kwargs": inside, **looks}
    page.launch(server_name=place.host, server_port=place.port, prevent_thread_lock=True, **shown)


def fetch_nothing() -> None:
    """Gradio fetches no address, for anybody: a call may name one wherever a file may stand, of any length."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise gr.Error("Files are not fetched from an address here; upload them.", print_exception=False)

    for name in FETCHING:
        assert hasattr(processing_utils, name), f"this version of Gradio fetches in another way than by {name}"
        setattr(processing_utils, name, refuse)


def _settings(page: gr.Blocks, place: Place, limits: Limits, pages: Pages) -> dict[str, Any]:
    def waiting(address: str) -> int:
        lines = page._queue.event_queue_per_concurrency_id.values()
        return sum(address_of(event.request) == address for line in lines for event in line.queue)

    uploads = Path(page.GRADIO_CACHE)
    uploads.mkdir(parents=True, exist_ok=True)
    return {"place": place, "limits": limits, "pages": pages, "waiting": waiting, "uploads": uploads}


def serve(app: ASGIApp, place: Place, ready: Callable[[], None]) -> None:
    """Answer until the process is told to end; `ready` is called once it answers. Raises OSError for a port in use."""
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    with socket.create_server((place.host, place.port), family=family, backlog=2048) as listening:
        config = uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, ws="none", timeout_graceful_shutdown=2
        )  # no log of requests: their addresses name pages and runs
        _Server(config, ready).run([listening])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()
