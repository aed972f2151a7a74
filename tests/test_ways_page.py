"""Prompt set, chat and blind test in Chromium, with a run whose name and prompts are markup."""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from lora_studio.runs.config import DataChoice
from lora_studio.studio import Studio
from tests.browser import Watch, overflow, served_alone
from tests.tiny import tiny_model
from tests.visits import trained

pytestmark = pytest.mark.nightly

NAME = "<img src=/beacon onerror=alert(1)>"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The app with a run on the tiny model."""
    root = tmp_path_factory.mktemp("ways")
    model, studio = tiny_model(root / "models" / "starter"), Studio(root)
    trained(studio, model, DataChoice(id=studio.data.add_sample("orders").id), NAME)
    with served_alone(root) as address:
        yield address


def opened(page: Page, url: str, way: str) -> Watch:
    watch = Watch(page, url)
    page.goto(url)
    page.get_by_role("tab", name="3 Compare").click()
    page.get_by_role("tab", name=way, exact=True).click()
    return watch


def test_a_set_of_prompts_becomes_a_table_and_a_file(url: str, browser: Browser, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    watch = opened(page, url, "Prompt set")
    expect(page.locator("#set-runs")).to_contain_text(NAME, timeout=30_000)
    page.get_by_role("button", name="Answer all").click()
    expect(page.locator("#set-table .line")).to_have_text("10 of 10 prompts answered", timeout=120_000)
    heads = page.locator("#set-table thead th")
    expect(heads).to_have_count(4)
    assert heads.nth(3).inner_text().startswith(NAME) and "ROUGE-L" in heads.nth(3).inner_text()
    expect(heads.nth(2).locator(".badge.good")).to_contain_text("max difference 0")
    assert page.locator("#set-table tbody mark").count() and not page.locator("#set-table td:nth-child(3) mark").count()
    expect(page.locator("#set-table tbody tr")).to_have_count(10)

    page.locator("#set-source").get_by_label("Typed").check()
    page.locator("#set-typed textarea").fill(f"=1+1\n{NAME}")
    page.get_by_role("button", name="Answer all").click()
    expect(page.locator("#set-table .line")).to_have_text("2 of 2 prompts answered", timeout=60_000)
    expect(page.locator("#set-table tbody th").nth(1)).to_have_text(NAME)
    for name, text in {"Download CSV": "'=1+1", "Download JSON lines": "=1+1"}.items():
        with page.expect_download() as download:
            page.get_by_role("button", name=name).click()
        kept = Path(download.value.path()).read_bytes().decode()
        table = list(csv.reader(io.StringIO(kept, newline="")))
        found = table[1][0] if "CSV" in name else json.loads(kept.splitlines()[0])["messages"][0]["content"]
        assert found == text

    (tmp_path / "asked.csv").write_text("prompt,answer\none,1\n")
    page.locator("#set-source").get_by_label("A file").check()
    page.locator("#set-upload input[type=file]").set_input_files(tmp_path / "asked.csv")
    expect(page.locator("#set-file")).to_contain_text("1 prompts, 1 of them", timeout=30_000)
    page.get_by_role("button", name="Answer all").click()
    expect(page.locator("#set-table .line")).to_have_text("1 of 1 prompts answered", timeout=60_000)
    page.set_viewport_size({"width": 390, "height": 844})
    assert overflow(page) <= 0 and watch.wrong == []


def test_stop_ends_a_set_and_the_model_is_free_for_others(url: str, browser: Browser) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    watch = opened(page, url, "Prompt set")
    expect(page.locator("#set-runs")).to_contain_text(NAME, timeout=30_000)
    page.locator("#set-tokens input").fill("1500")
    page.get_by_role("button", name="Answer all").click()
    expect(page.locator("#set-table .line")).to_have_text("0 of 10 prompts answered", timeout=60_000)
    page.locator("#stop-set").click()
    expect(page.get_by_role("button", name="Answer all")).to_be_enabled()
    page.locator("#set-source").get_by_label("Typed").check()
    page.locator("#set-typed textarea").fill("hi")
    page.locator("#set-tokens input").fill("4")
    page.get_by_role("button", name="Answer all").click()
    expect(page.locator("#set-table .line")).to_have_text("1 of 1 prompts answered", timeout=60_000)
    assert watch.wrong == []


def test_a_talk_with_both_models(url: str, browser: Browser) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    watch = opened(page, url, "Chat")
    expect(page.locator("#chat-run input")).to_have_value(re.compile("^<img"), timeout=30_000)
    page.locator("#chat-tokens input").fill("12")
    box = page.get_by_label("Your message")
    for number, said in enumerate(["hello", NAME], 1):
        box.fill(said)
        box.press("Enter")
        expect(page.locator("#talk article")).to_have_count(number, timeout=60_000)
        expect(page.get_by_role("button", name="Send")).to_be_enabled(timeout=60_000)
    newest = page.locator("#talk article").last
    expect(newest.locator(".said")).to_have_text(NAME)
    base, adapted = (newest.locator(f".{side} p").inner_text() for side in ("base", "adapted"))
    assert base and adapted and base != adapted
    expect(page.locator("#talk .badge.good")).to_contain_text("max difference 0")
    assert newest.locator(".adapted mark").count() and not newest.locator(".base mark").count()
    expect(newest.locator(".adapted h4")).to_have_text(f"{NAME} · strength 1")
    expect(box).to_have_value("")
    assert overflow(page) <= 0
    page.get_by_role("button", name="Start again").click()
    expect(page.locator("#talk article")).to_have_count(0)
    assert watch.wrong == []


def test_votes_by_keyboard_survive_and_nothing_tells_the_sides_apart(url: str, browser: Browser) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    watch = opened(page, url, "Blind")
    expect(page.locator("#blind-second input")).to_have_value(re.compile("^<img"), timeout=30_000)
    page.locator("#blind-tokens input").fill("12")
    page.locator("#blind-start").click()
    place, arena = page.locator("#arena .place"), page.locator("#arena")
    expect(place).to_have_text(re.compile(r"^Pair 1 of \d+$"), timeout=120_000)
    of = place.inner_text().rpartition(" ")[2]  # pairs with equal answers are not asked
    for number, key in enumerate("1234", 2):
        before = arena.inner_text()
        page.keyboard.press(key)
        expect(place).to_have_text(f"Pair {number} of {of}")
        assert arena.inner_text() != before and NAME not in before and "Base model" not in before
    expect(page.locator("#arena .votes")).to_contain_text("2 decided · 1 tie · 1 both bad")
    page.locator("#blind-source").get_by_label("Typed").check()
    page.locator("#blind-typed textarea").press("1")
    expect(place).to_have_text(f"Pair 5 of {of}")

    watch.reload(page)
    page.get_by_role("tab", name="3 Compare").click()
    page.get_by_role("tab", name="Blind", exact=True).click()
    expect(place).to_have_text(f"Pair 5 of {of}", timeout=30_000)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download as preference pairs").click()
    pairs = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    assert len(pairs) == 2 and all(pair.keys() == {"prompt", "chosen", "rejected"} for pair in pairs)
    page.get_by_role("button", name="Reveal the sides").click()
    expect(page.locator("#arena .verdict")).to_contain_text("Not yet distinguishable (n = 2)")
    expect(page.locator("#arena article")).to_have_count(4)
    expect(page.locator("#arena article h4").nth(1)).to_have_text(NAME)
    page.keyboard.press("1")
    page.set_viewport_size({"width": 390, "height": 844})
    assert overflow(page) <= 0 and watch.wrong == []
