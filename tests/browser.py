"""The real app and a real browser for tests and screenshots: served, watched, and clicked through as a person would."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from tests.tiny import tiny_model

HERE = Path(__file__).resolve().parents[1]
CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
START_S = 180  # that the page may take to answer, on a machine that does other things too
HARMLESS = ("status of 422",)  # how Gradio reports that a field was refused
LEAVING = ("AbortError", "errored out")  # and that a page is left while it still asks


@contextmanager
def served(root: Path, **environment: str) -> Iterator[str]:
    """`python app.py` on a free port; its address. Ends with the block, by its own handle."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    told = {"LORA_STUDIO_ROOT": str(root), "LORA_STUDIO_PORT": str(port), "LORA_STUDIO_HOST": "127.0.0.1"}
    with (root / "app.log").open("wb") as log:
        app = subprocess.Popen(
            [sys.executable, "app.py"],
            cwd=HERE,
            env={**os.environ, **told, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(url, app, root / "app.log")
        yield url
    finally:
        app.terminate()
        app.wait(20)


@contextmanager
def served_alone(root: Path) -> Iterator[str]:
    """The app with the tiny model as its starter, and no way to the Hub; its address."""
    if not (root / "models" / "starter").exists():
        tiny_model(root / "models" / "starter")
    (root / "temporary").mkdir()  # as on a laptop, the root does not lie in the system's folder for such files
    told = {"LORA_STUDIO_MODELS": str(root / "models"), "HF_HUB_OFFLINE": "1", "TMPDIR": str(root / "temporary")}
    with served(root, **told) as url:
        yield url


def wait_for(url: str, app: subprocess.Popen, log: Path) -> None:
    """Until the page answers; fails at once when the app has ended."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if app.poll() is not None:
            raise RuntimeError(f"the app ended with {app.returncode}:\n{log.read_text()[-2000:]}")
        try:
            urllib.request.urlopen(f"{url}/config", timeout=2).read()
            return
        except OSError:
            time.sleep(0.1)  # the one place with nothing to wait on
    raise TimeoutError(f"no page after {START_S} s:\n{log.read_text()[-2000:]}")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's browser, driven by Playwright."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class Watch:
    """Everything a page must not do: script errors, error messages in the console, requests to other hosts."""

    def __init__(self, page: Page, home: str) -> None:
        self.wrong: list[str] = []
        page.on("pageerror", lambda error: self.wrong.append(f"script: {error}"))
        page.on("console", lambda said: self._said(said.type, said.text))
        page.on("request", lambda request: self._asked(request.url, home))

    def reload(self, page: Page) -> None:
        """Leave the page and come back; on a slow machine it may still be asking for something."""
        known = len(self.wrong)
        page.reload()
        self.wrong[known:] = [said for said in self.wrong[known:] if not any(word in said for word in LEAVING)]

    def _said(self, kind: str, text: str) -> None:
        if kind == "error" and not any(known in text for known in HARMLESS):
            self.wrong.append(f"console: {text}")

    def _asked(self, address: str, home: str) -> None:
        if not address.startswith((home, "data:", "blob:")):
            self.wrong.append(f"request: {address}")


def overflow(page: Page) -> int:
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


def train(page: Page, url: str, model: str, steps: int, **settings: str) -> None:
    """From an empty page to a running run, as a person would."""
    page.goto(url)
    page.get_by_role("button", name="Café orders").click()
    page.get_by_role("button", name="Continue to training").click()
    if model != "starter":
        page.get_by_label("Base model").fill(model)
        page.get_by_label("Base model").press("Enter")
    expect(page.locator("#picker button").first).to_be_visible(timeout=60_000)
    page.get_by_label("Steps", exact=True).fill(str(steps))
    for label, value in settings.items():
        page.get_by_label(label.replace("_", " ").capitalize(), exact=True).fill(value)
    page.get_by_role("button", name="Start training").click()
    expect(live(page)).to_have_attribute("data-state", "running", timeout=60_000)


def study(page: Page, ranks: str) -> None:
    """Start a study of two choices of matrices, with everything else as the other tabs have it."""
    page.get_by_role("tab", name="Study").click()
    page.get_by_label("Ranks").fill(ranks)
    expect(page.locator("#study-cost b").first).to_be_visible(timeout=60_000)
    page.get_by_role("button", name="Start study").click()
    expect(page.locator("#study [data-points]").first).to_have_attribute("data-state", "active", timeout=60_000)


def live(page: Page) -> Locator:
    """The element of the live view that carries data-state and data-points."""
    return page.locator("#live [data-points]").first


def choose(page: Page, box: str, option: str) -> None:
    """An option of a dropdown."""
    page.locator(f"{box} input").click()
    page.get_by_role("option", name=option, exact=True).click()
