"""Who is asking: the visitor behind a request, how often one may ask, what is handed out to whom.

On a laptop there is one person, whoever asks. On a Space a visitor is the account that is signed in, else the secret
in the browser's cookie, else, for programs, the one in a header. The name that Gradio gives a page (session_hash) is
none of these: it is chosen by the page, so it is tied to the browser that used it first.

Knows no runs and no page; nothing in here is written to disk.
"""

import math
import os
import secrets
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from starlette.requests import HTTPConnection

from lora_studio.errors import StudioError
from lora_studio.owners import SECRET, owner_name

HEADER = "x-lora-studio-visitor"  # of programs: 32 hex digits, kept like a password
KNOWN = 10_000  # clients, pages or secrets remembered at most; the longest unseen are forgotten
TICKET_S = 600  # how long a download waits to be fetched
TICKETS = 3  # that one owner may have waiting; an older one is taken back


def on_space() -> bool:
    """Whether this is a Hugging Face Space, where strangers come."""
    return bool(os.environ.get("SPACE_ID"))


def told_apart() -> bool:
    """Whether visitors have work of their own: on a Space, or where LORA_STUDIO_VISITORS=1 asks for it."""
    return on_space() or os.environ.get("LORA_STUDIO_VISITORS") == "1"


def signing_in() -> bool:
    """Whether accounts of the Hub can sign in; elsewhere Gradio would sign everybody in as the machine's own."""
    return on_space() and all(os.environ.get(name) for name in ("OAUTH_CLIENT_ID", "OAUTH_CLIENT_SECRET"))


def cookie_name() -> str:
    """Of the cookie that holds the secret; the prefix lets no other site set it, but needs https."""
    return "__Host-visitor" if on_space() else "visitor"


@dataclass(frozen=True)
class Visitor:
    """One who asks. browser: its secret's name, whoever is signed in; None where no secret came."""

    owner: str | None  # None: nobody that can be told from others
    browser: str | None
    address: str
    operator: str = ""  # the account's name, when it may see everything


def visitor_of(request: HTTPConnection) -> Visitor:
    """Whoever a request comes from, where visitors are told apart."""
    browser, account = browser_of(request), _account(request)
    if not account:
        return Visitor(browser, browser, address_of(request))
    name = str(account.get("preferred_username", ""))
    owner = owner_name("account", str(account["sub"]))
    return Visitor(owner, browser, address_of(request), name if name and name in _operators() else "")


def browser_of(request: HTTPConnection) -> str | None:
    """The name of the secret that came in the cookie or in the header."""
    for secret in (request.cookies.get(cookie_name(), ""), request.headers.get(HEADER, "")):
        if SECRET.fullmatch(secret):
            return owner_name("visitor", secret)
    return None


def address_of(request: HTTPConnection) -> str:
    """Where a request comes from. On a Space the proxies in front say it, each behind what it was told.

    What stands left of the last public address may be the sender's invention.
    """
    peer = request.client.host if request.client else ""
    if not on_space():
        return peer
    for hop in reversed(request.headers.get("x-forwarded-for", "").split(",")):
        try:
            if ip_address(hop.strip()).is_global:
                return hop.strip()
        except ValueError:
            break
    return peer


def nobody() -> StudioError:
    """What one is told who cannot be told from others."""
    host = os.environ.get("SPACE_HOST", "").split(",")[0].strip()
    alone = f", or open https://{host} in a tab of its own" if host else ""
    hint = f"Allow cookies for this page{alone}. Programs send the header {HEADER} with 32 random hex digits."
    return StudioError("E_VISITOR", "This browser sends no cookie, so your work cannot be told from others'.", hint)


def _account(request: HTTPConnection) -> Mapping[str, Any] | None:
    """What the Hub says of the account that is signed in, while that holds."""
    info = (request.scope.get("session") or {}).get("oauth_info") or {}
    if (info.get("expires_at") or math.inf) < time.time():
        return None
    about = info.get("userinfo") or {}
    return about if about.get("sub") else None


def _operators() -> set[str]:
    named = f"{os.environ.get('SPACE_AUTHOR_NAME', '')},{os.environ.get('LORA_STUDIO_OPERATORS', '')}"
    return {name.strip() for name in named.split(",") if name.strip()}


class Rate:
    """So much within a while for each client, calls in a minute or bytes; who has been silent as long has it again."""

    def __init__(self, most: float, within_s: float = 60) -> None:
        self.most, self._within_s = most, within_s
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # what is left, and when that was
        self._lock = threading.Lock()

    def wait_s(self, client: str, amount: float = 1) -> float:
        """Count one call of this amount: 0 when it may be made, else the seconds after which it may."""
        if math.isinf(self.most):
            return 0.0
        now, a_second = time.monotonic(), self.most / self._within_s
        with self._lock:
            left, then = self._left.pop(client, (self.most, now))
            left = min(self.most, left + (now - then) * a_second)
            may = left >= amount
            self._left[client] = (left - amount if may else left), now
            if len(self._left) > KNOWN:
                self._left.popitem(last=False)
        return 0.0 if may else (amount - left) / a_second


class Pages:
    """Which browser uses which of the names that Gradio's pages choose for themselves."""

    def __init__(self) -> None:
        self._browsers: OrderedDict[str, str | None] = OrderedDict()
        self._lock = threading.Lock()

    def belongs(self, page: str, browser: str | None) -> bool:
        """Whether a page's name is this browser's; who uses it first has it."""
        with self._lock:
            first = self._browsers.setdefault(page, browser)
            self._browsers.move_to_end(page)
            if len(self._browsers) > KNOWN:
                self._browsers.popitem(last=False)
        return first == browser


@dataclass(frozen=True)
class _Ticket:
    path: Path
    owner: str
    until: float  # by the monotonic clock


class Downloads:
    """Files that wait to be fetched, each once, by its owner alone, in a folder of its own that goes with it."""

    def __init__(self) -> None:
        self._tickets: OrderedDict[str, _Ticket] = OrderedDict()
        self._lock = threading.Lock()

    def offer(self, path: Path, owner: str) -> str:
        """The ticket (128 bits) for a file."""
        ticket = secrets.token_hex(16)
        with self._lock:
            self._tickets[ticket] = _Ticket(path, owner, time.monotonic() + TICKET_S)
            own = [name for name, one in self._tickets.items() if one.owner == owner]
            late = [name for name, one in self._tickets.items() if one.until < time.monotonic()]
            gone = [self._tickets.pop(name) for name in {*own[:-TICKETS], *late}]
        for one in gone:
            shutil.rmtree(one.path.parent, ignore_errors=True)
        return ticket

    def take(self, ticket: str, owner: str | None) -> Path | None:
        """The file of a ticket, which is void from now on; None for one that is void or another's."""
        with self._lock:
            found = self._tickets.get(ticket)
            if found is None or found.owner != owner:
                return None
            del self._tickets[ticket]
        if found.until < time.monotonic():
            shutil.rmtree(found.path.parent, ignore_errors=True)
        return found.path if found.path.is_file() else None
