"""The five minutes of the README, by clicks in Chromium on the app as it is served, and when each thing was there.

    python -m benchmarks.tour

The starter has to be on disk; the rest begins from an empty folder. It waits for what a person would look for before
the next click, and takes no time to look. One message of a chat is typed. The clock begins when the page is opened.
"""

import argparse
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Locator, Page, expect

from benchmarks.paper import machine
from benchmarks.verdict import markdown
from lora_studio.studio import default_root
from tests.browser import Watch, chromium, live, served

PATIENCE = 900_000  # ms that anything may take
SAID = "Do you have oat milk?"


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.tour", description=(__doc__ or "").split("\n\n")[0]).parse_args()
    models = os.environ.get("LORA_STUDIO_MODELS") or str(default_root() / "models")
    print(f"# The five-minute tour\n\n{time.strftime('%F')}, {machine()}.\n", flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="lora-studio-bench-") as root,
        served(Path(root), LORA_STUDIO_MODELS=models) as url,
        chromium() as browser,
    ):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        watch, rows = Watch(page, url), []
        start = time.monotonic()

        def note(text: str) -> None:
            rows.append([f"{time.monotonic() - start:.0f}", " ".join(text.split())])
            print(f"{rows[-1][0]:>5} s  {rows[-1][1]}", flush=True)

        page.goto(url)
        walk(page, note)
    print("\n" + markdown(["s", "what is there"], rows))
    wrong = "; ".join(watch.wrong)
    print(f"\n- NOT MET: {wrong}" if wrong else "\n- Met: no error on the console, no request to another host.")


def walk(page: Page, note: Callable[[str], None]) -> None:
    """All of it, in the README's order."""
    _train(page, note)
    _compare(page, note)
    _look_inside(page, note)
    _take_away(page, note)


def _train(page: Page, note: Callable[[str], None]) -> None:
    page.get_by_role("button", name="Café orders").click()
    note("the rows are read: " + _text(page.locator("#understood .verdict-line").first))
    page.get_by_role("button", name="Continue to training").click()
    expect(page.locator("#cost b").first).to_be_visible()
    page.get_by_role("button", name="Start training").click()
    note("Start is pressed: " + _text(page.locator("#cost").first))
    expect(live(page)).to_have_attribute("data-state", "running")
    step = page.locator("#live [data-tile=step]")
    expect(step).to_have_text(re.compile("^[1-9]"))
    note("the longest batch is tried, the base model has answered, the first step is done")
    expect(page.locator("#live .samples mark").first).to_be_visible()
    note(f"step {_text(step)}: sample answers have words that changed")
    expect(live(page)).to_have_attribute("data-state", "done")
    note(f"step {_text(step)}, the last")
    note("it is said: " + _text(page.locator("#live .result .verdict").first))


def _compare(page: Page, note: Callable[[str], None]) -> None:
    page.get_by_role("button", name="Compare", exact=True).click()
    page.locator("#chips button").first.click()
    generate = page.get_by_role("button", name="Generate")
    generate.click()
    expect(page.locator("[data-pane=base] .badge")).to_contain_text("max difference 0")
    expect(generate).to_be_enabled()
    note("base and adapted have answered one held-out message, the base side checked")
    page.get_by_role("button", name="The run at strengths 0 to 2").click()
    expect(page.locator("#answers article h3").first).to_have_text("Strength 0")
    expect(generate).to_be_enabled()
    page.get_by_role("button", name="How likely is each of its tokens?").click()
    expect(page.locator("#tokens .token").first).to_be_visible()
    page.get_by_role("button", name="Measure the held-out loss by strength").click()
    expect(page.locator("#strength-line .verdict")).to_be_visible()
    note("strengths side by side, the chance of each token, and the curve of strengths")
    page.get_by_role("tab", name="Prompt set", exact=True).click()
    page.get_by_role("button", name="Answer all").click()
    table = page.locator("#set-table .line")
    expect(table).to_have_text(re.compile(r"^(\d+) of \1 prompts answered"))
    note("a set: " + _text(table))
    page.get_by_role("tab", name="Chat", exact=True).click()
    page.locator("#chat-said textarea").fill(SAID)
    send = page.get_by_role("button", name="Send")
    send.click()
    expect(send).to_be_disabled()
    expect(send).to_be_enabled()
    note("both have answered in a chat")
    page.get_by_role("tab", name="Blind", exact=True).click()
    page.get_by_role("button", name="Start blind").click()
    for number in range(1, 4):
        expect(page.locator("#arena .place")).to_have_text(re.compile(f"^Pair {number} of"))
        page.locator("#arena button[data-vote=a]").click()
    expect(page.locator("#arena .verdict")).to_contain_text("n = 3")
    note("three blind votes: " + _text(page.locator("#arena .verdict")))


def _look_inside(page: Page, note: Callable[[str], None]) -> None:
    page.get_by_role("tab", name="4 Inside").click()
    page.get_by_role("button", name="Look inside").click()
    expect(page.locator("#inside-values .main-svg").first).to_be_visible()
    page.get_by_role("button", name="Measure the held-out loss").click()
    note("inside: " + _text(page.locator("#inside-curve-line .verdict")))


def _take_away(page: Page, note: Callable[[str], None]) -> None:
    page.get_by_role("tab", name="5 Export").click()
    expect(page.locator("#command textarea")).to_have_value(re.compile("."))
    for name in ("Download the adapter", "Download the merged model", "Download the report"):
        with page.expect_download() as download:
            page.get_by_role("button", name=name).click()
        note(f"{name}: {download.value.suggested_filename}")


def _text(of: Locator) -> str:
    expect(of).not_to_be_empty()
    return of.inner_text()


if __name__ == "__main__":
    main()
