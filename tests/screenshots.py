"""python -m tests.screenshots OUT_DIR: every screen of the real page as PNG, light and dark, desktop and phone.

    --model  base model to train (default: starter)      --steps  optimizer steps (default: 25)
    --url    of an app that runs already; otherwise one is booted on a free port with a temporary root

The booted app and the browser's flags are also what tests/test_page.py uses.
"""

import argparse
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

HERE = Path(__file__).resolve().parents[1]
CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
THEMES = ("light", "dark")
START_S = 180  # that the page may take to answer, on a machine that does other things too


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


def live(page: Page) -> Locator:
    """The element of the live view that carries data-state and data-points."""
    return page.locator("#live [data-points]").first


def shoot(page: Page, folder: Path, name: str) -> None:
    """The whole page as a PNG; a page wider than its window is a bug."""
    page.mouse.move(0, 0)
    overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    if overflow > 0:
        print(f"{name}: {overflow} pixels wider than the window", file=sys.stderr)
    page.screenshot(path=folder / f"{name}.png", full_page=True, animations="disabled")
    print(folder / f"{name}.png")


def variants(browser: Browser) -> Iterator[tuple[str, Page]]:
    """A fresh page per theme and size, named for the file."""
    for theme in THEMES:
        for size, (width, height) in SIZES.items():
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
            yield f"{theme}_{size}", context.new_page()
            context.close()


def with_theme(url: str, variant: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}__theme={variant.split('_')[0]}"


def every_screen(browser: Browser, url: str, model: str, steps: int, folder: Path) -> None:
    """Data before a run, the run while it trains, then the finished run, compare, inside, export and a study."""
    for variant, page in variants(browser):
        page.goto(with_theme(url, variant))
        page.get_by_role("button", name="Café orders").click()
        expect(page.locator("#preview .rendered")).to_be_visible(timeout=300_000)
        expect(page.locator(".tiles").first).to_be_visible(timeout=60_000)
        shoot(page, folder, f"data_{variant}")
    first = browser.new_page()
    train(first, url, model, steps)
    address = first.url
    expect(live(first)).to_have_attribute("data-points", re.compile(r"^(1\d|[2-9]\d|\d{3,})$"), timeout=300_000)
    for variant, page in variants(browser):
        page.goto(with_theme(address, variant))
        expect(page.locator("#live .plot .main-svg").first).to_be_visible(timeout=60_000)
        shoot(page, folder, f"live_{variant}")
    expect(live(first)).to_have_attribute("data-state", "done", timeout=3_600_000)
    for variant, page in variants(browser):
        finished(page, with_theme(address, variant), variant, folder)
    study(first, "1, 4")
    expect(first.locator("#study [data-points]").first).to_have_attribute("data-state", "over", timeout=3_600_000)
    for variant, page in variants(browser):
        page.goto(with_theme(first.url, variant))
        expect(page.locator("#study .sizes .js-line").first).to_be_visible(timeout=60_000)
        shoot(page, folder, f"study_{variant}")


def study(page: Page, ranks: str) -> None:
    """Start a study of two choices of matrices, with everything else as the other tabs have it."""
    page.get_by_role("tab", name="Study").click()
    page.get_by_label("Ranks").fill(ranks)
    expect(page.locator("#study-cost b").first).to_be_visible(timeout=60_000)
    page.get_by_role("button", name="Start study").click()
    expect(page.locator("#study [data-points]").first).to_have_attribute("data-state", "active", timeout=60_000)


def finished(page: Page, address: str, variant: str, folder: Path) -> None:
    """The screens that need a finished run."""
    page.goto(address)
    expect(page.locator("#live .result")).to_be_visible(timeout=60_000)
    expect(page.locator("#cost b").first).to_be_visible(timeout=60_000)
    shoot(page, folder, f"train_{variant}")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.locator("#chips button").first.click()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("[data-pane=base] .badge")).to_be_visible(timeout=120_000)
    expect(page.get_by_role("button", name="Generate")).to_be_enabled(timeout=300_000)
    shoot(page, folder, f"compare_{variant}")
    for way in ("Prompt set", "Chat", "Blind"):
        page.get_by_role("tab", name=way, exact=True).click()
        shoot(page, folder, f"{way.lower().replace(' ', '_')}_{variant}")
    page.get_by_role("tab", name="4 Inside").click()
    page.get_by_role("button", name="Look inside").click()
    expect(page.locator("#inside-values .main-svg").first).to_be_visible(timeout=120_000)
    page.get_by_role("button", name="Measure the held-out loss").click()
    expect(page.locator("#inside-curve-line .verdict")).to_be_visible(timeout=300_000)
    shoot(page, folder, f"inside_{variant}")
    page.get_by_role("tab", name="Runs", exact=True).click()
    expect(page.locator(".runs-view tbody tr").first).to_be_visible(timeout=30_000)
    shoot(page, folder, f"runs_{variant}")
    page.get_by_role("tab", name="5 Export").click()
    expect(page.locator("#command textarea")).to_have_value(re.compile("."), timeout=30_000)
    shoot(page, folder, f"export_{variant}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--url")
    options.add_argument("--model", default="starter")
    options.add_argument("--steps", type=int, default=25)
    given = options.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    with chromium() as browser, tempfile.TemporaryDirectory() as root:
        if given.url:
            every_screen(browser, given.url, given.model, given.steps, given.folder)
            return
        with served(Path(root)) as url:
            every_screen(browser, url, given.model, given.steps, given.folder)


if __name__ == "__main__":
    main()
