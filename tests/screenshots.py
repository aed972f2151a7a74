"""python -m tests.screenshots OUT_DIR: every screen of the real page as PNG, light and dark, desktop and phone.

--model  base model to train (default: starter)      --steps  optimizer steps (default: 25)
--url    of an app that runs already; otherwise one is booted on a free port with a temporary root
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page, expect

from tests.browser import chromium, live, served, study, train

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
THEMES = ("light", "dark")
ORDER = "two large lattes and a bagel to go, it's Maya"
PICTURES = 6  # taken at most, until two are the same: a chart may be half drawn


def shoot(page: Page, folder: Path, name: str) -> None:
    """The whole page as a PNG; a page wider than its window is a bug."""
    page.mouse.move(0, 0)
    overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    if overflow > 0:
        print(f"{name}: {overflow} pixels wider than the window", file=sys.stderr)
    picture = b""
    for _ in range(PICTURES):
        before, picture = picture, page.screenshot(full_page=True, animations="disabled")
        if picture == before:
            break
    (folder / f"{name}.png").write_bytes(picture)
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
    """Data before a run, the run while it trains, the finished run with all that can be asked of it, a study, Runs."""
    chosen(browser, url, folder)
    first = browser.new_page()
    train(first, url, model, steps)
    address = first.url
    expect(live(first)).to_have_attribute("data-points", re.compile(r"^(1\d|[2-9]\d|\d{3,})$"), timeout=600_000)
    for variant, page in variants(browser):
        page.goto(with_theme(address, variant))
        expect(page.locator("#live .plot .main-svg").first).to_be_visible(timeout=60_000)
        shoot(page, folder, f"live_{variant}")
    expect(live(first)).to_have_attribute("data-state", "done", timeout=3_600_000)
    for variant, page in variants(browser):
        finished(page, with_theme(address, variant), variant, folder)
    first.get_by_role("tab", name="2 Train").click()
    first.get_by_label("Steps", exact=True).fill(str(max(2, steps // 3)))  # of four runs; enough for a race
    study(first, "1, 4")
    expect(first.locator("#study [data-points]").first).to_have_attribute("data-state", "over", timeout=3_600_000)
    for variant, page in variants(browser):
        page.goto(with_theme(first.url, variant))
        expect(page.locator("#study .sizes .js-line").first).to_be_visible(timeout=60_000)
        shoot(page, folder, f"study_{variant}")
        page.get_by_role("tab", name="Runs", exact=True).click()
        page.locator(".runs-view tbody input[type=checkbox]").first.check()  # the study, all of its runs
        expect(page.locator(".runs-view .js-line").first).to_be_visible(timeout=60_000)
        shoot(page, folder, f"runs_{variant}")


def chosen(browser: Browser, url: str, folder: Path) -> None:
    """The screen of a dataset that was chosen."""
    for variant, page in variants(browser):
        page.goto(with_theme(url, variant))
        page.get_by_role("button", name="Café orders").click()
        expect(page.locator("#preview .rendered")).to_be_visible(timeout=600_000)
        expect(page.locator("#data-lengths .main-svg").first).to_be_visible(timeout=60_000)
        shoot(page, folder, f"data_{variant}")


def finished(page: Page, address: str, variant: str, folder: Path) -> None:
    """The screens that need a finished run."""
    page.goto(address)
    expect(page.locator("#live .result")).to_be_visible(timeout=60_000)
    expect(page.locator("#cost b").first).to_be_visible(timeout=60_000)
    shoot(page, folder, f"train_{variant}")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.locator("#chips button").first.click()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("[data-pane=base] .badge")).to_be_visible(timeout=600_000)
    expect(page.get_by_role("button", name="Generate")).to_be_enabled(timeout=600_000)
    shoot(page, folder, f"compare_{variant}")
    page.get_by_role("tab", name="Prompt set", exact=True).click()
    page.locator("#set-source").get_by_label("Typed").check()
    page.locator("#set-typed textarea").fill(f"{ORDER}\nWhat is the capital of France?")
    page.locator("#set-tokens input").fill("48")
    page.get_by_role("button", name="Answer all").click()
    expect(page.locator("#set-table .line")).to_have_text("2 of 2 prompts answered", timeout=600_000)
    shoot(page, folder, f"prompt_set_{variant}")
    page.get_by_role("tab", name="Chat", exact=True).click()
    page.locator("#chat-tokens input").fill("48")
    page.locator("#chat-said textarea").fill(ORDER)
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("button", name="Send")).to_be_disabled(timeout=30_000)
    expect(page.get_by_role("button", name="Send")).to_be_enabled(timeout=600_000)
    shoot(page, folder, f"chat_{variant}")
    page.get_by_role("tab", name="Blind", exact=True).click()
    page.locator("#blind-source").get_by_label("Typed").check()
    page.locator("#blind-typed textarea").fill(ORDER)
    page.locator("#blind-tokens input").fill("48")
    page.get_by_role("button", name="Start blind").click()
    expect(page.locator("#blind-start")).to_be_disabled(timeout=30_000)  # else the last test is still there
    expect(page.locator("#blind-start")).to_be_enabled(timeout=600_000)
    expect(page.locator("#arena .place")).to_have_text(re.compile(r"^Pair 1 of"), timeout=600_000)
    shoot(page, folder, f"blind_{variant}")
    page.get_by_role("tab", name="4 Inside").click()
    page.get_by_role("button", name="Look inside").click()
    expect(page.locator("#inside-values .main-svg").first).to_be_visible(timeout=600_000)
    page.get_by_role("button", name="Measure the held-out loss").click()
    expect(page.locator("#inside-curve-line .verdict")).to_be_visible(timeout=600_000)
    shoot(page, folder, f"inside_{variant}")
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
