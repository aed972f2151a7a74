"""The Compare tab in Chromium: five answers at once, five strengths, the curve and the tokens, by mouse and keys."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from lora_studio.runs.config import DataChoice
from lora_studio.studio import Studio
from tests.browser import Watch, choose, overflow, served_alone
from tests.tiny import tiny_model
from tests.visits import rows, trained

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The app with four runs on one tiny model and one on another."""
    root = tmp_path_factory.mktemp("compare")
    model, other = tiny_model(root / "models" / "starter"), tiny_model(root / "other", hidden_size=16)
    studio = Studio(root)
    choice = DataChoice(id=studio.data.add_text(rows("order", 40)).id)
    trained(studio, other, choice, "elsewhere")
    for number in range(4):
        trained(studio, model, choice, f"<b>run {number}</b>")
    with served_alone(root) as address:
        yield address


def opened(browser: Browser, url: str, width: int, theme: str) -> Page:
    """The tab with all four runs chosen."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    page.goto(f"{url}/?__theme={theme}")
    page.get_by_role("tab", name="3 Compare").click()
    expect(page.locator("#compare-run input")).to_have_value(re.compile("run 3"), timeout=60_000)
    page.locator("#compare-others input").click()
    expect(page.get_by_role("option")).to_have_count(3)
    for place in range(3):
        page.get_by_role("option").nth(place).click()
    page.keyboard.press("Escape")
    return page


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (390, "dark")])
def test_five_answers_five_strengths_a_curve_and_tokens(
    url: str, browser: Browser, width: int, theme: str, tmp_path: Path
) -> None:
    page = opened(browser, url, width, theme)
    watch = Watch(page, url)
    expect(page.locator("#compare-apart")).to_contain_text("elsewhere")
    chips = page.locator("#chips button")
    expect(chips).to_have_count(5, timeout=30_000)
    chips.first.click()
    page.get_by_role("button", name="Sampling and length").click()
    page.get_by_label("New tokens", exact=True).fill("12")
    expect(page.locator("#expected .answer")).to_contain_text("order yes")
    page.get_by_role("button", name="Generate").click()
    panes = page.locator("#answers article")
    expect(panes).to_have_count(5)
    expect(page.get_by_role("button", name="Generate")).to_be_enabled(timeout=60_000)
    expect(panes.first.locator(".badge")).to_contain_text("max difference 0")
    assert sorted(panes.locator("h3").all_inner_texts()) == [*(f"<b>run {number}</b>" for number in range(4)), "Base"]
    expect(panes.nth(1).locator("mark").first).to_be_visible()
    expect(panes.first.locator("mark")).to_have_count(0)
    assert overflow(page) <= 0

    page.get_by_role("button", name="How likely is each of its tokens?").click()
    lines = page.locator("#tokens .tokens")
    expect(lines).to_have_count(5, timeout=60_000)
    lines.nth(1).locator(".token").nth(2).hover()
    expect(page.locator("#tokens .readout")).to_contain_text(re.compile(r"“.+” · Base .*% · <b>run 3</b> .*%"))
    lines.first.locator("[tabindex='0']").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    focused = page.locator("#tokens .token:focus")
    expect(focused).to_have_attribute("aria-label", re.compile(r".: (under )?[\d.]+ %"))
    assert focused.get_attribute("data-place") == "2" and page.locator("#tokens .here").count() == 5
    page.keyboard.press("End")
    expect(page.locator("#tokens .readout")).to_contain_text("<|end|>")
    expect(page.locator("#tokens-line")).to_contain_text("On average")

    page.get_by_role("button", name="Measure the held-out loss by strength").click()
    expect(page.locator("#strength-line .verdict")).to_contain_text("the base model", timeout=60_000)
    expect(page.locator("#strength-curve .main-svg").first).to_be_visible()
    assert overflow(page) <= 0
    page.screenshot(path=tmp_path / f"answers_{theme}.png", full_page=True)

    page.get_by_role("button", name="The run at strengths 0 to 2").click()
    expect(panes.first.locator("h3")).to_have_text("Strength 0", timeout=30_000)
    expect(page.get_by_role("button", name="Generate")).to_be_enabled(timeout=60_000)
    expect(panes).to_have_count(5)
    expect(panes.first.locator(".badge")).to_contain_text("max difference 0")
    page.get_by_label("Prompt", exact=True).press_sequentially("my own")  # as a person does; filling tells nobody
    expect(page.locator("#tokens .token")).to_have_count(0)
    expect(page.locator("#expected")).to_contain_text("Pick one of the held-out rows")
    page.get_by_role("button", name="How likely is each of its tokens?").click()
    expect(page.locator("#tokens-problem")).to_contain_text("E_NO_ANSWER", timeout=30_000)
    assert overflow(page) <= 0 and watch.wrong == []


def test_another_run_brings_its_own_companions(url: str, browser: Browser) -> None:
    page = opened(browser, url, 1280, "light")
    choose(page, "#compare-run", "elsewhere · held-out loss 1")
    expect(page.locator("#compare-apart")).to_contain_text("and 1 more", timeout=30_000)
    expect(page.locator("#compare-others .token")).to_have_count(0)
