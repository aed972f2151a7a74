"""What comes in from the network, and as whom: origins, names, paths, limits, cookies, downloads, tokens."""

import asyncio
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gradio_client
import httpx
import psutil
import pytest
from gradio import processing_utils
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from lora_studio import door, visitors
from lora_studio.door import ACT, READ, Door
from lora_studio.errors import StudioError, redacted
from lora_studio.limits import LAPTOP, SPACE, Limits, limits_here
from lora_studio.owners import NOBODY, owner_name
from lora_studio.studio import Studio
from lora_studio.ui import data_tab, live, style
from lora_studio.ui.build import build
from lora_studio.ui.desk import Desk
from lora_studio.visitors import HEADER, Downloads, Pages, Rate, address_of, visitor_of
from tests.browser import served
from tests.tiny import tiny_model
from tests.visits import ANN, BOB, ReadyDesk, asking, came

HOME = "http://127.0.0.1:7860"
FOREIGN = (
    "https://evil.example",
    "null",
    "https://hf.space.evil",
    f"{HOME}.evil",
    "http://127.0.0.1:7861",
    "file://",
    "",
)
GONE = "There is nothing here."
FILE = {"_type": "gradio.FileData"}


@pytest.fixture
def as_space(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SPACE_ID": "a/b", "SPACE_HOST": "a-b.hf.space", "SPACE_AUTHOR_NAME": "ann"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_STUDIO_VISITORS", "1")


def entered(
    tmp_path: Path,
    limits: Limits = LAPTOP,
    host: str = "127.0.0.1",
    waiting: dict[str, int] | None = None,
    url: str = HOME,
) -> TestClient:
    """A door with nothing behind it that could refuse."""

    async def room(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("inside")(scope, receive, send)

    place, count = door.place(host, 7860), (waiting or {}).get
    made = Door(room, place=place, limits=limits, pages=Pages(), waiting=lambda at: count(at, 0), uploads=tmp_path)
    return TestClient(made, base_url=url)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The whole app as it is served, on a laptop."""
    root = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(root / "uploads"))
        desk = ReadyDesk(Studio(root, LAPTOP))
        page = build(desk)
        page.queue(default_concurrency_limit=8, max_size=64, api_open=False)
        routes = door.routes(desk.downloads, live.PLOTLY)
        yield door.behind(page, door.place("127.0.0.1", 7860), LAPTOP, desk.pages, routes, style.looks(LAPTOP))


# ---- who may call ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", FOREIGN)
def test_pages_of_other_sites_get_nothing(tmp_path: Path, app: Any, origin: str) -> None:
    for client in (entered(tmp_path), TestClient(app, base_url=HOME)):
        for method in ("GET", "POST", "OPTIONS", "DELETE", "HEAD"):
            asked = {"origin": origin, "access-control-request-method": "POST"}
            answer = client.request(method, "/config", headers=asked)
            assert answer.status_code == 403, (origin, method)
            assert not {name for name in answer.headers if name.startswith("access-control")}


def test_pages_of_its_own_may_call(app: Any, tmp_path: Path) -> None:
    client = TestClient(app, base_url=HOME)
    for origin in (HOME, "http://localhost:7860", "http://[::1]:7860"):
        answer = client.get("/config", headers={"origin": origin})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin
        asked = {"origin": origin, "access-control-request-method": "POST"}
        assert client.options("/gradio_api/queue/join", headers=asked).status_code == 200
    assert "access-control-allow-origin" not in client.get("/config").headers
    mapped = TestClient(app, base_url="http://localhost:8080")  # through a tunnel
    assert mapped.get("/config", headers={"origin": "http://localhost:8080"}).status_code == 200
    for other in ("http://localhost:8081", "http://localhost:8080.evil.example", "http://evil.example:8080"):
        assert mapped.get("/config", headers={"origin": other}).status_code == 403


def test_a_space_is_called_by_its_own_addresses(
    tmp_path: Path, as_space: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPACE_HOST", "a-b.hf.space,lora.example.org")
    assert door.place("0.0.0.0", 7860).origins == ("https://a-b.hf.space", "https://lora.example.org")
    client = entered(tmp_path, SPACE)
    assert client.post("/gradio_api/reset", headers={"origin": "https://lora.example.org"}).status_code == 200
    for origin in (HOME, "https://huggingface.co", "http://a-b.hf.space", "https://c-d.hf.space"):
        assert client.post("/gradio_api/reset", headers={"origin": origin}).status_code == 403


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:7860", 200),
        ("localhost", 200),
        ("LocalHost:1", 200),
        ("[::1]:7860", 200),
        ("evil.example:7860", 403),
        ("127.0.0.1.evil.example", 403),
        ("127.0.0.1:7860@evil.example", 403),
        ("evil.example/127.0.0.1", 403),
        ("0.0.0.0:7860", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_a_name_that_somebody_points_at_this_machine_is_refused(tmp_path: Path, host: str, status: int) -> None:
    assert entered(tmp_path).get("/config", headers={"host": host}).status_code == status


def test_in_a_network_the_machines_own_addresses_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = door.place("0.0.0.0", 7860).names
    assert found and {"127.0.0.1", "0.0.0.0"} <= found and len(found) > 4 and "evil.example" not in found
    monkeypatch.setenv("LORA_STUDIO_ORIGINS", "https://lora.example.org/ , http://box:80")
    client = entered(tmp_path, url="http://lora.example.org")
    assert client.get("/config", headers={"origin": "https://lora.example.org"}).status_code == 200
    assert client.get("/config", headers={"origin": "http://lora.example.org"}).status_code == 403


# ---- what there is --------------------------------------------------------------------------------------------------

OPEN = {  # every route that the app has and the door lets through, by its template
    "GET": """/ /assets/{path:path} /static/{path:path} /svelte/{path:path} /config /config/ /theme.css /favicon.ico
        /manifest.json /robots.txt /pwa_icon /pwa_icon/{size} /logout /plotly.min.js /download/{ticket} /gradio_api/info
        /gradio_api/info/ /gradio_api/startup-events /gradio_api/queue/data /gradio_api/upload_progress
        /gradio_api/heartbeat/{session_hash} /gradio_api/theme.css /gradio_api/call/{api_name}/{event_id}
        /gradio_api/call/v2/{api_name}/{event_id}""",
    "POST": """/gradio_api/queue/join /gradio_api/component_server /gradio_api/component_server/ /gradio_api/upload
        /gradio_api/cancel /gradio_api/reset /gradio_api/reset/ /gradio_api/run/{api_name} /gradio_api/run/{api_name}/
        /gradio_api/api/{api_name} /gradio_api/api/{api_name}/ /gradio_api/call/{api_name} /gradio_api/call/{api_name}/
        /gradio_api/call/v2/{api_name} /gradio_api/call/v2/{api_name}/""",
}


def all_routes(routes: Any) -> Iterator[tuple[str, str]]:
    for route in routes:
        if inside := getattr(route, "original_router", None) or (route if isinstance(route, Mount) else None):
            yield from all_routes(inside.routes)  # a router that FastAPI includes, or the page's own app
        elif isinstance(route, Route) or hasattr(route, "methods"):
            for method in route.methods or ():
                yield method, route.path
        else:
            raise AssertionError(f"a route of another kind: {route}")


def test_every_route_is_on_the_list_or_is_not_there(app: Any) -> None:
    samples = {"ticket": "0" * 32, "size": "192", "path:path": "x.js"}
    found = set(all_routes(app.routes))
    assert len(found) > 60
    let_in: dict[str, set[str]] = {"GET": set(), "POST": set()}
    for method, template in found:
        path = re.sub(r"{([^}]+)}", lambda one: samples.get(one[1], "name"), template)
        if (READ if method in ("GET", "HEAD") else ACT).fullmatch(path) and method in ("GET", "POST"):
            let_in[method].add(template)
    assert let_in == {method: set(text.split()) for method, text in OPEN.items()}


CLOSED = """/docs /redoc /openapi.json /gradio_api/openapi.json /monitoring /monitoring/summary /gradio_api/mcp/
    /gradio_api/runs /gradio_api/file=/etc/passwd /gradio_api/file=app.py /gradio_api/file=../app.py
    /gradio_api/file=http://evil.example /gradio_api/file/etc/passwd /gradio_api/proxy=https://evil.example
    /file=app.py /gradio_api/deep_link /gradio_api/stream/a/b/c/playlist.m3u8 /gradio_api/queue/status
    /gradio_api/token /gradio_api/vibe-code /gradio_api/custom_component/a/client/component/x.js
    /gradio_api/run-history/buckets /gradio_api/dev/reload /download/../../etc/passwd /download/xyz /login
    /gradio_api/app_id//"""


def through(app: Any, method: str, path: str) -> tuple[int, bytes]:
    """Status and body of a request whose path no client has tidied up."""
    said: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        said.append(message)

    heads = [(b"host", b"127.0.0.1:7860"), (b"content-length", b"0")]
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    more = {
        "headers": heads,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 7860),
        "scheme": "http",
        "root_path": "",
    }
    asyncio.run(app({**scope, **more, "http_version": "1.1"}, receive, send))
    return said[0]["status"], b"".join(one.get("body", b"") for one in said[1:])


@pytest.mark.parametrize("path", CLOSED.split())
def test_the_rest_of_gradio_is_not_there(app: Any, path: str) -> None:
    for method in ("GET", "POST", "PUT", "DELETE", "HEAD", "PATCH"):
        status, body = through(app, method, path)
        assert status == 404 and (GONE.encode() in body or method == "HEAD"), (method, path)


def test_files_that_the_page_is_drawn_from_stay_in_their_folders(app: Any) -> None:
    for path in (
        "/assets/../../app.py",
        "/assets/../../../routes.py",
        "/static/../../routes.py",
        "/assets//etc/passwd",
    ):
        status, body = through(app, "GET", path)
        assert status in (403, 404) and b"import" not in body, path
    script = TestClient(app, base_url=HOME).get("/plotly.min.js")
    assert script.status_code == 200 and b"plotly.js" in script.content[:200]


def test_every_answer_carries_the_headers(app: Any) -> None:
    client = TestClient(app, base_url=HOME)
    asked = [
        ("GET", "/"),
        ("GET", "/config"),
        ("GET", "/nothing"),
        ("POST", "/gradio_api/queue/join"),
        ("GET", "/plotly.min.js"),
    ]
    answers = [client.request(method, path) for method, path in asked]
    answers.append(client.get("/", headers={"origin": "https://evil.example"}))
    answers.append(client.post("/gradio_api/queue/join", content=b"{", headers={"content-type": "text/plain"}))
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "same-origin"
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy["frame-ancestors"] == policy["connect-src"] == "'self'"
        assert policy["script-src-attr"] == policy["object-src"] == "'none'" and "http" not in str(policy)
        assert "unsafe-inline" not in policy["script-src"]
    assert answers[-1].status_code in (400, 422)


def test_only_the_hub_may_frame_a_space(tmp_path: Path, as_space: None) -> None:
    policy = entered(tmp_path).get("/config").headers["content-security-policy"]
    assert "frame-ancestors 'self' https://huggingface.co https://*.hf.space" in policy


def test_nothing_of_this_machine_is_told(app: Any, tmp_path: Path) -> None:
    client = TestClient(app, base_url=HOME)
    for path in ("/", "/config", "/gradio_api/info", "/manifest.json", "/theme.css"):
        text = client.get(path).text
        assert str(Path.home()) not in text and "/site-packages/" not in text and str(Path.cwd()) not in text, path


def test_events_wait_their_turn_in_the_queue(app: Any) -> None:
    """One that is called directly would not count towards the one forward at a time."""
    client = TestClient(app, base_url=HOME)
    answer = client.post("/gradio_api/run/compare", json={"data": ["0" * 32, "hi", 1, 2], "session_hash": "s"})
    assert answer.status_code == 404
    told = client.post("/gradio_api/run/run_status", json={"data": ["0" * 32], "session_hash": "s"})
    assert told.status_code == 500 and "E_RUN_NOT_FOUND" in told.text and "Traceback" not in told.text


def test_an_address_in_a_call_is_never_fetched(app: Any) -> None:
    asked: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    with ThreadingHTTPServer(("127.0.0.1", 0), Listener) as near, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=near.serve_forever, args=(0.02,), daemon=True).start()
        patch.setattr(processing_utils.sh, "get", lambda url, **_: asked.append(url))  # with which it would fetch
        client = TestClient(app, base_url=HOME)
        named = (f"http://127.0.0.1:{near.server_port}/a", "https://1.1.1.1/a.csv", "https://huggingface.co/a")
        for url in named:
            for file in ({"path": url, "meta": FILE}, {"path": "a", "url": url, "meta": FILE}):
                for value in (file, [file], {"a": {"b": file}}):
                    sent = [value, 8, "attn.q", 3, 2, "", "lora", 0, "auto"]
                    called = client.post("/gradio_api/run/plan", json={"data": sent, "session_hash": "s"})
                    assert called.status_code == 500, called.text
        near.shutdown()
    assert asked == []


# ---- how often and how much -----------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(gaps=st.lists(st.floats(0, 30), min_size=1, max_size=80), a_minute=st.integers(1, 20))
def test_nobody_gets_more_calls_than_the_rate(gaps: list[float], a_minute: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = [100.0]
        patch.setattr(visitors.time, "monotonic", lambda: clock[0])
        rate, taken = Rate(a_minute), []
        for number, gap in enumerate(gaps):
            clock[0] += gap
            wait = rate.wait_s("one")
            assert wait >= 0 and rate.wait_s(f"another {number}") == 0
            if not wait:
                taken.append(clock[0])
            else:
                assert wait <= 60 / a_minute + 1e-9
        for place, start in enumerate(taken):
            within = sum(start <= one < start + 60 for one in taken[place:])
            assert within <= 2 * a_minute
            assert within <= a_minute + (taken[place + within - 1] - start) * a_minute / 60 + 1 + 1e-6


def test_who_floods_is_told_to_wait_and_others_are_not(tmp_path: Path, as_space: None) -> None:
    client = entered(tmp_path, replace(SPACE, calls_a_minute=20))

    def call(address: str, path: str = "/config") -> httpx.Response:
        return client.get(path, headers={"x-forwarded-for": address})

    answers = [call("8.8.8.8") for _ in range(100)]
    assert [one.status_code for one in answers] == [200] * 20 + [429] * 80
    assert "20 calls a minute" in answers[-1].json()["detail"] and "retry-after" in answers[-1].headers
    assert call("1.2.3.4, 8.8.8.8").status_code == 429  # what the sender put in front counts for nothing
    assert call("9.9.9.9").status_code == call("8.8.8.8, 9.9.9.9, 10.0.0.1").status_code == 200
    assert call("8.8.8.8", "/assets/x.js").status_code == 200


@pytest.mark.parametrize(
    ("came_through", "address"),
    [
        ("8.8.8.8", "8.8.8.8"),
        ("1.1.1.1, 8.8.8.8", "8.8.8.8"),
        ("8.8.8.8, 10.0.0.7, 127.0.0.1", "8.8.8.8"),
        ("2001:4860:4860::8888", "2001:4860:4860::8888"),
        ("", "7.7.7.7"),
        ("10.0.0.7", "7.7.7.7"),
        ("8.8.8.8, <script>", "7.7.7.7"),
    ],
)
def test_the_address_is_the_one_the_proxies_saw(as_space: None, came_through: str, address: str) -> None:
    assert address_of(came(**{"x-forwarded-for": came_through})) == address


def test_on_a_laptop_nobody_says_where_they_come_from() -> None:
    assert address_of(came(**{"x-forwarded-for": "8.8.8.8"})) == "7.7.7.7"


def test_a_call_has_a_size_and_an_upload_leaves_room_on_the_disk(tmp_path: Path) -> None:
    small = replace(LAPTOP, call_bytes=1000, file_bytes=10_000)
    client = entered(tmp_path, small)
    assert client.post("/gradio_api/queue/join", content=b"x" * 1000).status_code == 200
    assert client.post("/gradio_api/queue/join", content=b"x" * 1001).status_code == 413
    assert client.post("/gradio_api/queue/join", content=iter([b"x"])).status_code == 411  # in pieces, of any length
    for kind in ("chunked", "identity", "gzip, chunked"):  # and a length beside it says nothing
        both = {"transfer-encoding": kind, "content-length": "1"}
        assert client.post("/gradio_api/queue/join", content=b"x", headers=both).status_code == 411
    assert client.post("/gradio_api/upload", content=b"x" * 10_001).status_code == 200  # what surrounds the file
    assert client.post("/gradio_api/upload", content=b"x" * 2_000_000).status_code == 413
    full = entered(tmp_path, replace(small, reserve_bytes=2**62))
    assert full.post("/gradio_api/upload", content=b"x").status_code == 507
    assert full.post("/gradio_api/queue/join", content=b"x").status_code == 200


def test_uploads_are_a_visitors_and_so_many_bytes_from_one_address(
    tmp_path: Path, as_space: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(visitors.time, "monotonic", lambda: clock[0])
    client = entered(tmp_path, replace(SPACE, uploaded_bytes=4000, reserve_bytes=0))

    def send(size: int, address: str = "8.8.8.8", **who: str) -> int:
        heads = {"x-forwarded-for": address} | (who or {"cookie": f"__Host-visitor={ANN}"})
        return client.post("/gradio_api/upload", content=b"x" * size, headers=heads).status_code

    assert [send(1000) for _ in range(6)] == [200] * 4 + [429] * 2
    assert send(1000, cookie=f"__Host-visitor={BOB}") == 429  # a fresh cookie does not help
    assert send(1000, "9.9.9.9") == send(10, "9.9.9.9", **{HEADER: ANN}) == 200
    clock[0] += door.UPLOADS_S / 4
    assert [send(1000), send(1000)] == [200, 429]
    for stranger in ({"cookie": "a=b"}, {"cookie": "__Host-visitor=1"}, {HEADER: "x"}):
        assert send(1, "7.7.7.7", **stranger) == 403
    assert SPACE.uploaded_bytes == 4 * SPACE.file_bytes


def test_only_a_pages_own_browser_cancels_what_it_asked_for(tmp_path: Path, apart: None) -> None:
    client = entered(tmp_path)
    mine, other = {"cookie": f"visitor={ANN}"}, {"cookie": f"visitor={BOB}"}
    assert client.get("/gradio_api/queue/data?session_hash=abc", headers=mine).status_code == 200

    def cancel(body: Any, who: dict[str, str]) -> int:
        return client.post("/gradio_api/cancel", json=body, headers=who).status_code

    hers = {"session_hash": "abc", "fn_index": 1, "event_id": "e"}
    assert [cancel(hers, who) for who in (mine, other, {}, mine)] == [200, 404, 404, 200]
    for body in ({}, [], "abc", {"session_hash": ["abc"]}, {"session_hash": None}, [["["] * 100]):
        assert cancel(body, mine) == 404
    assert cancel({**hers, "more": "x" * 5000}, mine) == 413


def test_a_body_that_the_door_has_read_is_there_for_who_comes_after(app: Any, apart: None) -> None:
    client = TestClient(app, base_url=HOME)
    body = {"session_hash": "p1", "fn_index": 1, "event_id": "e"}
    answer = client.post("/gradio_api/cancel", json=body, headers={"cookie": f"visitor={ANN}"})
    assert answer.status_code == 200 and answer.json() == {"success": True}


def test_one_visitor_does_not_fill_the_queue_of_all(tmp_path: Path) -> None:
    client = entered(tmp_path, replace(LAPTOP, calls_waiting=4), waiting={"testclient": 4})
    refused = client.post("/gradio_api/queue/join", content=b"{}")
    assert refused.status_code == 429 and "4 of your calls" in refused.json()["detail"]
    free = entered(tmp_path, replace(LAPTOP, calls_waiting=5), waiting={"testclient": 4})
    assert free.post("/gradio_api/queue/join", content=b"{}").status_code == 200


def test_where_visitors_are_told_apart_they_borrow_nothing_of_the_machine(
    apart: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = limits_here()
    assert not here.local_paths and not here.host_login and here.known_architectures
    assert (here.calls_a_minute, here.starts_a_minute) == (SPACE.calls_a_minute, SPACE.starts_a_minute)
    assert (here.calls_waiting, here.call_bytes) == (SPACE.calls_waiting, SPACE.call_bytes)
    monkeypatch.setenv("SPACE_ID", "a/b")
    assert limits_here() is SPACE and not SPACE.host_login
    monkeypatch.delenv("SPACE_ID")
    monkeypatch.delenv("LORA_STUDIO_VISITORS")
    assert limits_here() is LAPTOP and LAPTOP.host_login


def test_starts_are_counted_for_the_owner_and_for_the_address(tmp_path: Path) -> None:
    desk = ReadyDesk(Studio(tmp_path, replace(LAPTOP, starts_a_minute=2)), visitors=True)

    def start(**who: str) -> None:
        desk.of(asking(came(**who))).may_start()

    start(secret=ANN)
    start(secret=ANN, at="6.6.6.6")  # from elsewhere
    with pytest.raises(StudioError, match="More than 2 runs") as caught:
        start(secret=ANN, at="5.5.5.5")
    assert caught.value.code == "E_TOO_MANY"
    start(secret=BOB)
    with pytest.raises(StudioError):
        start(secret="c3" * 16)  # a fresh cookie does not help
    start(secret="c3" * 16, at="4.4.4.4")
    ReadyDesk(Studio(tmp_path / "laptop")).of(None).may_start()


def test_what_is_resumed_counts_as_a_start(tmp_path: Path) -> None:
    desk = ReadyDesk(Studio(tmp_path, replace(LAPTOP, starts_a_minute=1)), visitors=True)
    blocks = build(desk).blocks.values()
    found = [each for one in blocks for each in getattr(one, "server_fns", []) if each.__name__ == "resume"]
    assert len(found) == 2  # of a run and of a study
    for number, resume in enumerate(found):
        visitor = asking(came(f"{number}" * 32, at=f"{number}.1.1.1"))
        said = [resume(visitor, {"run": "0" * 32, "study": "1" * 32})["problem"] for _ in range(2)]
        assert "More than 1 runs" not in said[0] and "More than 1 runs" in said[1]


# ---- as whom --------------------------------------------------------------------------------------------------------


def test_the_account_comes_before_the_cookie_and_that_before_the_header(apart: None) -> None:
    cookie, header = owner_name("visitor", ANN), owner_name("visitor", BOB)
    assert visitor_of(came(ANN, header=BOB)).owner == cookie
    assert visitor_of(came(header=BOB)).owner == header
    account = visitor_of(came(ANN, account="sub-1"))
    assert (account.owner, account.browser) == (owner_name("account", "sub-1"), cookie)
    assert visitor_of(came(ANN, account="sub-1", expires=-1)).owner == cookie
    for nobody in (came(), came("x" * 32), came("A1" * 16), came(ANN + "0"), came(header=ANN[:31])):
        assert visitor_of(nobody).owner is None
    assert len({owner_name("account", ANN), owner_name("visitor", ANN)}) == 2


def test_an_operator_is_an_account_that_is_named(as_space: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert visitor_of(came(account="1", name="ann")).operator == "ann"  # the Space's author
    monkeypatch.setenv("LORA_STUDIO_OPERATORS", "carl, dora")
    assert [visitor_of(came(account="1", name=name)).operator for name in ("dora", "eve", "")] == ["dora", "", ""]
    assert visitor_of(came(account="1", name="dora", expires=-1)).operator == ""
    monkeypatch.setenv("SPACE_AUTHOR_NAME", "")
    monkeypatch.setenv("LORA_STUDIO_OPERATORS", "")
    assert visitor_of(came(account="1", name="")).operator == ""


SIGNS_IN = """
import json, sys
from starlette.testclient import TestClient
from lora_studio import door
from lora_studio.limits import SPACE
from lora_studio.studio import Studio
from lora_studio.ui import live, style
from lora_studio.ui.build import build
from lora_studio.ui.desk import Desk
desk = Desk(Studio(sys.argv[1]), visitors=True)
assert desk.limits is SPACE
routes = door.routes(desk.downloads, live.PLOTLY)
app = door.behind(build(desk), door.place("0.0.0.0", 7860), SPACE, desk.pages, routes, style.looks(SPACE))
client = TestClient(app, base_url="https://a-b.hf.space", follow_redirects=False)
found = client.get("/login/huggingface")
print(json.dumps([client.get("/").status_code, found.status_code, found.headers["location"]]))
"""


def test_on_a_space_one_can_sign_in(tmp_path: Path) -> None:
    class Provider(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            about = {"issuer": self.path, "authorization_endpoint": "https://hub.example/oauth/authorize"}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(about).encode())

    with ThreadingHTTPServer(("127.0.0.1", 0), Provider) as provider:
        threading.Thread(target=provider.serve_forever, args=(0.02,), daemon=True).start()
        told = {"SYSTEM": "spaces", "SPACE_ID": "a/b", "SPACE_HOST": "a-b.hf.space", "NO_PROXY": "127.0.0.1"}
        told |= {"OAUTH_CLIENT_ID": "client-7", "OAUTH_CLIENT_SECRET": "s", "OAUTH_SCOPES": "openid write-repos"}
        told |= {"OPENID_PROVIDER_URL": f"http://127.0.0.1:{provider.server_port}"}
        told |= {"GRADIO_TEMP_DIR": str(tmp_path / "uploads")}
        command = [sys.executable, "-c", SIGNS_IN, str(tmp_path)]
        done = subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True, check=False)
        provider.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    page, status, goes_to = json.loads(done.stdout.splitlines()[-1])
    assert page == 200 and status in (302, 307), goes_to
    assert goes_to.startswith("https://hub.example/oauth/authorize?")
    assert "client_id=client-7" in goes_to and "write-repos" in goes_to and "a-b.hf.space" in goes_to


def test_a_space_of_this_repository_asks_the_hub_to_sign_people_in() -> None:
    front = (Path(__file__).parents[1] / "README.md").read_text().split("---")[1]
    assert "hf_oauth: true" in front and "write-repos" in front
    for package in ("authlib", "itsdangerous"):  # without which Gradio does not build the page then
        assert importlib.util.find_spec(package)


def test_on_a_laptop_there_is_no_cookie_and_one_owner(tmp_path: Path) -> None:
    assert "set-cookie" not in entered(tmp_path).get("/").headers
    desk = ReadyDesk(Studio(tmp_path))
    assert desk.of(asking(came(BOB))).studio.owner == NOBODY


def test_a_visitor_gets_a_secret_and_keeps_it(tmp_path: Path, apart: None) -> None:
    def given(**headers: str) -> str:
        (cookie,) = entered(tmp_path).get("/", headers=headers).headers.get_list("set-cookie")
        assert "HttpOnly" in cookie and "SameSite=Lax" in cookie and "Path=/;" in cookie
        found = re.match(r"visitor=([0-9a-f]{32});", cookie)
        assert found
        return found[1]

    first = given()
    assert given(cookie=f"visitor={first}") == first != given()
    for forged in ("visitor=1", "visitor=../../x", f"visitor={first}0", f"other={first}"):
        assert given(cookie=forged) != first
    assert "set-cookie" not in entered(tmp_path).get("/config").headers


def test_on_a_space_the_cookie_lives_in_the_frame_and_nowhere_else(tmp_path: Path, as_space: None) -> None:
    (cookie,) = entered(tmp_path).get("/").headers.get_list("set-cookie")
    assert re.match(r"__Host-visitor=[0-9a-f]{32}; Path=/; ", cookie)
    assert cookie.endswith("HttpOnly; SameSite=None; Secure; Partitioned")
    assert visitor_of(came(ANN)).owner  # the name is the Space's, see visits.came
    assert visitor_of(came(cookie=f"visitor={ANN}")).owner is None  # one that another site could have set


def test_what_comes_for_a_page_goes_to_the_browser_that_opened_it(tmp_path: Path, apart: None) -> None:
    client = entered(tmp_path)
    mine, other = {"cookie": f"visitor={ANN}"}, {"cookie": f"visitor={BOB}"}
    for path in ("/gradio_api/heartbeat/abc", "/gradio_api/queue/data?session_hash=abc"):
        assert [client.get(path, headers=who).status_code for who in (mine, other, {}, mine)] == [200, 404, 404, 200]
    assert client.get("/gradio_api/queue/data?session_hash=def", headers=other).status_code == 200


def test_the_door_forgets_what_was_not_seen_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visitors, "KNOWN", 10)
    rate, pages = Rate(1), Pages()
    for number in range(1000):
        rate.wait_s(f"{number}")
        pages.belongs(f"{number}", "a")
    assert len(rate._left) == len(pages._browsers) == 10


# ---- files ----------------------------------------------------------------------------------------------------------


def packed(folder: Path, name: str = "adapter.zip") -> Path:
    folder.mkdir(parents=True)
    (folder / name).write_bytes(b"PK12345")
    return folder / name


def test_a_download_is_its_owners_and_works_once(tmp_path: Path, apart: None) -> None:
    downloads, ann = Downloads(), owner_name("visitor", ANN)
    client = TestClient(Starlette(routes=door.routes(downloads, live.PLOTLY)), base_url=HOME)
    path = packed(tmp_path / "a", 'a <b>".zip')
    address = f"/download/{downloads.offer(path, ann)}"
    hers, his = {"cookie": f"visitor={ANN}"}, {"cookie": f"visitor={BOB}"}
    wrong = [client.get(address, headers=who) for who in (his, {})]
    wrong += [client.get(f"/download/{'0' * 32}", headers=hers), client.get("/download/x", headers=hers)]
    assert {(one.status_code, one.content) for one in wrong} == {(404, wrong[0].content)}
    got = client.get(address, headers=hers)
    assert got.status_code == 200 and got.content == b"PK12345"
    assert got.headers["content-disposition"].startswith("attachment;") and got.headers["cache-control"] == "no-store"
    assert not path.parent.exists()
    assert client.get(address, headers=hers).content == wrong[0].content


def test_downloads_that_nobody_fetches_are_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads, paths = Downloads(), [packed(tmp_path / f"{number}") for number in range(5)]
    tickets = [downloads.offer(path, "ann") for path in paths]
    others = downloads.offer(packed(tmp_path / "bobs"), "bob")
    assert [path.exists() for path in paths] == [False, False, True, True, True]
    assert downloads.take(tickets[0], "ann") is None and downloads.take(tickets[4], "ann") == paths[4]
    later = time.monotonic() + visitors.TICKET_S + 1
    monkeypatch.setattr(visitors.time, "monotonic", lambda: later)
    assert downloads.take(tickets[3], "ann") is None and downloads.take(others, "bob") is None
    downloads.offer(packed(tmp_path / "new"), "carl")
    assert not paths[2].exists() and not (tmp_path / "bobs").exists()


@pytest.mark.parametrize(("text", "code"), [("a,b\n1,2\n", ""), ("a,b\n1\n", "E_RAGGED"), ("", "E_EMPTY")])
def test_an_upload_leaves_the_cache_of_all_at_once(tmp_path: Path, text: str, code: str) -> None:
    desk = ReadyDesk(Studio(tmp_path / "root"))
    sent = tmp_path / "root" / "uploads" / "5f3c" / "rows.csv"
    sent.parent.mkdir(parents=True)
    sent.write_text(text)
    *_, problem = data_tab.open_file(desk, str(sent))
    assert code in problem and bool(problem) == bool(code)
    assert list((tmp_path / "root" / "uploads").iterdir()) == [] and not list((tmp_path / "root").glob("claimed-*"))
    *_, problem = data_tab.open_file(desk, str(sent))
    assert "E_READ" in problem


# ---- tokens ---------------------------------------------------------------------------------------------------------


def test_no_text_holds_a_token() -> None:
    token = "hf_" + "a1B2" * 8
    for text in (
        f"401 for {token}.",
        f"Authorization: Bearer {token}",
        "authorization: bearer abcdefgh.1-2_3",
        repr({"t": token}),
    ):
        assert token not in redacted(text) and "abcdefgh" not in redacted(text) and "[token]" in redacted(text)
    for text in ("owner/hf_model", "the bearer of this", "hf_hub"):
        assert redacted(text) == text


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, str]]:
    """The app as a Space has it, but for the address, with a token in its environment: address, root, token."""
    root, token = tmp_path_factory.mktemp("town"), "hf_" + "Canary01" * 4
    tiny_model(root / "models" / "starter")
    told = {"LORA_STUDIO_MODELS": str(root / "models"), "HF_HUB_OFFLINE": "1", "LORA_STUDIO_VISITORS": "1"}
    with served(root, **told, HF_TOKEN=token, MY_SECRET=token) as url:
        yield url, root, token


def test_a_program_trains_and_a_token_is_nowhere(town: tuple[str, Path, str]) -> None:
    url, root, token = town
    words, told = "zebra-4711", []
    sent = {HEADER: ANN, "Authorization": f"Bearer {token}"}
    program = gradio_client.Client(url, headers=sent, verbose=False, download_files=False)

    def ask(*given: Any, name: str, of: Any = program, **more: Any) -> Any:
        try:
            told.append(of.predict(*given, api_name=f"/{name}", **more))
        except Exception as error:
            told.append(str(error))
        return told[-1]

    rows = "\n".join(json.dumps({"question": f"{words} {n}", "answer": "yes"}) for n in range(12))
    dataset = ask(rows, "rows", name="add_dataset")
    assert token not in ask(f"{token}/model", name="plan") and "E_" in told[-1]
    run = ask(dataset, name="start_run", steps=12, batch_size=2)
    assert re.fullmatch(r"[0-9a-f]{32}", run), run
    seen: set[str] = set()
    while ask(run, name="run_status")["status"] in ("queued", "running"):
        for process in psutil.process_iter(["pid", "cmdline"]):
            line = " ".join(process.info["cmdline"] or [])
            assert token not in line
            if "lora_studio.runs.worker" in line and str(root) in line:
                seen.add(line)
                assert token.encode() not in Path(f"/proc/{process.pid}/environ").read_bytes()
    assert told[-1]["status"] == "done", told[-1]
    ask(run, name="run_events")
    ask(run, words, name="compare", max_new_tokens=3)
    with httpx.Client(base_url=url, headers=sent) as client:
        told += [client.get(path).text for path in ("/config", "/gradio_api/info", "/nothing")]
        body = {"data": [run, {"bad": token}], "session_hash": "s"}
        told.append(client.post("/gradio_api/run/run_events", json=body).text)
    assert token not in json.dumps(told) and "E_UNEXPECTED" in told[-1]  # that one raises inside the app
    kept = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert [path for path, held in kept.items() if token.encode() in held] == []
    log = (root / "app.log").read_text()
    assert words not in log and "Traceback" in log  # of the last call
    owners = [path for path, held in kept.items() if words.encode() in held]
    assert owners and all(root / "runs" / run in path.parents or root / "owners" in path.parents for path in owners)

    other = gradio_client.Client(url, headers={HEADER: BOB}, verbose=False, download_files=False)
    nobody = gradio_client.Client(url, verbose=False, download_files=False)
    missing = ask("0" * 32, name="run_status", of=other)
    assert "E_RUN_NOT_FOUND" in missing and ask(run, name="run_status", of=other) == missing.replace("0" * 32, run)
    assert "E_VISITOR" in ask(run, name="run_status", of=nobody) and HEADER in told[-1]


def test_a_stream_of_another_is_not_read(town: tuple[str, Path, str]) -> None:
    """Gradio gives whatever a page asked for to whoever says the page's name."""
    url = town[0]
    with httpx.Client(base_url=url, timeout=30) as client:
        hers, his = {HEADER: ANN}, {HEADER: BOB}
        config = client.get("/config", headers=hers).json()
        event = next(one["id"] for one in config["dependencies"] if one["api_name"] == "compare")
        call = {"fn_index": event, "session_hash": "page1", "data": ["0" * 32, "hello", 1, 2]}
        for _ in range(2):
            assert client.post("/gradio_api/queue/join", json=call, headers=hers).status_code == 200
            got = client.get("/gradio_api/queue/data?session_hash=page1", headers=hers)
            assert "E_RUN_NOT_FOUND" in got.text
            stolen = client.get("/gradio_api/queue/data?session_hash=page1", headers=his)
            assert stolen.status_code == 404 and stolen.json()["detail"] == GONE
        assert client.post("/gradio_api/queue/join", json=call, headers=his).status_code == 200
        got = client.get("/gradio_api/queue/data?session_hash=page1", headers=hers)
        assert "E_PAGE" in got.text  # what he asked in her name reads nothing of her page


def test_the_same_door_stands_in_what_gradio_launches(tmp_path: Path) -> None:
    """On ZeroGPU the page must be launched by Gradio itself."""
    tiny_model(tmp_path / "models" / "starter")
    told = {"LORA_STUDIO_MODELS": str(tmp_path / "models"), "HF_HUB_OFFLINE": "1", "SPACES_ZERO_GPU": "true"}
    with served(tmp_path, **told, LORA_STUDIO_VISITORS="1") as url, httpx.Client(base_url=url) as client:
        page = client.get("/")
        assert page.status_code == 200 and "visitor=" in page.headers["set-cookie"]
        assert "script-src-attr 'none'" in page.headers["content-security-policy"]
        for path in ("/gradio_api/file=app.py", "/docs", "/monitoring", f"/download/{'0' * 32}"):
            assert client.get(path).status_code == 404, path
        assert client.get("/plotly.min.js").status_code == 200
        for origin in ("https://evil.example", "null"):
            assert client.get("/config", headers={"origin": origin}).status_code == 403
            assert client.post("/gradio_api/queue/join", json={}, headers={"origin": origin}).status_code == 403
        assert client.get("/config", headers={"host": "evil.example"}).status_code == 403


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        door.serve(Starlette(), door.place("127.0.0.1", taken.getsockname()[1]), lambda: None)


def test_desk_and_start_are_one_thing_for_all(tmp_path: Path) -> None:
    """What is known of the start is known at every desk, also one that was made before."""
    desk = Desk(Studio(tmp_path), visitors=True)
    early = desk.of(asking(came(ANN)))
    desk._start._broken = StudioError("E_INSTALL", "torch does not load.", "")
    desk._start._libraries.set()
    with pytest.raises(StudioError, match="torch does not load"):
        early.ready()
    assert early.status()["problem"] and "cookie" in desk.of(asking(came())).status()["line"]
