"""The health card in Chromium: what a limit would cost, the button that sets it, and any row by its number."""

import json
import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser import Watch, overflow, served_alone

pytestmark = pytest.mark.nightly

ROWS = [{"text": f"message {number}", "label": "short" if number % 2 else "long " + "x" * 300} for number in range(40)]
ROWS[4]["label"] = ""


@pytest.fixture(scope="module")
def opened(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Page, Watch]]:
    """A phone on which the rows are pasted into an empty app; its starter model is a tiny one."""
    with served_alone(tmp_path_factory.mktemp("page")) as url:
        page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
        watch = Watch(page, url)
        page.goto(f"{url}?__theme=dark")
        page.get_by_role("tab", name="Paste").click()
        page.locator("#paste textarea").fill("\n".join(map(json.dumps, ROWS)))
        page.get_by_role("button", name="Use this text").click()
        expect(page.locator("#limit-costs tr[aria-current]")).to_contain_text("512 in use", timeout=60_000)
        yield page, watch


def test_a_limit_is_tried_and_then_used(opened: tuple[Page, Watch]) -> None:
    page, watch = opened
    verdict, costs = page.locator("#understood .verdict-line"), page.locator("#limit-costs")
    expect(costs.locator("tr").nth(1)).to_contain_text(re.compile(r"256\s*19"))
    page.locator("#try-limit input[type=number]").fill("64")
    page.locator("#try-limit input[type=number]").press("Enter")
    expect(costs.locator("tr[aria-current]")).to_contain_text(re.compile(r"^64\s*19"), timeout=20_000)
    assert costs.locator("tr").count() == 5  # a head, the three usual ones and the one that is tried
    page.get_by_role("button", name="Use this limit").click()
    expect(costs.locator("tr[aria-current]")).to_contain_text("64 in use", timeout=20_000)
    expect(verdict).to_contain_text("Look at the length limit first: 19 of 39 answers are cut at 64 tokens")
    page.get_by_role("tab", name="2 Train").click()
    page.locator("#more").get_by_role("button", name="More").click()
    expect(page.locator("#set-max-length input")).to_have_value("64")
    page.get_by_role("tab", name="1 Data").click()
    assert overflow(page) <= 0 and watch.wrong == []


def test_any_row_is_reached_by_its_number_and_what_is_cut_is_painted(opened: tuple[Page, Watch]) -> None:
    page, watch = opened
    number = page.get_by_label("Row", exact=True)
    number.fill("39")
    expect(page.locator("#preview h4")).to_have_text("What the model sees of row 39", timeout=20_000)
    expect(page.locator("#preview .rendered .cut")).to_contain_text("x" * 100)
    page.get_by_role("button", name="Next row").click()
    expect(page.locator("#preview .rendered .trained")).to_have_text("short<|end|>", timeout=20_000)
    expect(number).to_have_value("40")
    page.get_by_role("button", name="Next row").click()
    expect(number).to_have_value("1")
    number.fill("5")
    expect(page.locator("#preview")).to_contain_text("Row 5 is left out.", timeout=20_000)
    assert watch.wrong == []


def test_lengths_and_labels_are_drawn(opened: tuple[Page, Watch]) -> None:
    page, watch = opened
    for chart, bars in (("lengths", 3), ("labels", 2)):
        page.locator(f"#data-{chart}").scroll_into_view_if_needed()
        drawn = page.locator(f"#data-{chart} .bars path")  # some are of no height
        expect(drawn.nth(bars - 1)).to_be_attached(timeout=20_000)
        expect(page.locator(f"#data-{chart} .main-svg").first).to_be_visible()
    expect(page.locator("#data-labels-line")).to_contain_text("Most frequent: short (20, 51.3%).")
    assert overflow(page) <= 0 and watch.wrong == []
