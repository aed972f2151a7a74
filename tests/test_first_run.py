"""Somebody's first minutes in Chromium: nothing typed, from an empty tab to two answers; words, and keys alone."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from benchmarks import tour
from lora_studio.ui.terms import TERMS
from tests.browser import LEAVING, Watch, live, overflow, served_alone, train

TABS = ("1 Data", "2 Train", "Study", "Runs", "3 Compare", "4 Inside", "5 Export")
SLOWLY = 240_000  # ms that a step of the tour may take
RING = """element => {  // what the focus changes in how an element, or what it stands in, is drawn
  const around = [];
  for (let one = element; one && around.length < 4; one = one.parentElement) around.push(one);
  around.push(...element.querySelectorAll(':scope > *'));
  if (element.nextElementSibling) around.push(element.nextElementSibling);
  const drawn = () => around.map(one => {
    const { outlineStyle, outlineWidth, outlineColor, boxShadow, borderColor } = getComputedStyle(one);
    return [outlineStyle !== 'none' && outlineWidth + outlineColor, boxShadow, borderColor].join();
  });
  const focused = drawn();
  element.blur();
  const blurred = drawn();
  element.focus({ focusVisible: true });
  return focused.some((one, place) => one !== blurred[place]);
}"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served_alone(tmp_path_factory.mktemp("first")) as address:
        yield address


def opened(browser: Browser, url: str, width: int = 1280) -> tuple[Page, Watch]:
    page = browser.new_page(viewport={"width": width, "height": 900})
    watch = Watch(page, url)
    page.goto(url)
    expect(page.locator("header .chip")).to_be_visible(timeout=60_000)
    return page, watch


@pytest.mark.nightly
@pytest.mark.parametrize("tab", [*TABS[1:], "Prompt set", "Chat", "Blind"])
def test_a_tab_with_nothing_in_it_offers_the_example(url: str, browser: Browser, tab: str) -> None:
    page, watch = opened(browser, url)
    if tab not in TABS:
        page.get_by_role("tab", name="3 Compare").click()
    page.get_by_role("tab", name=tab, exact=True).click()
    page.get_by_role("button", name="Try the example").locator("visible=true").first.click()
    expect(page.get_by_role("tab", name="2 Train")).to_have_attribute("aria-selected", "true", timeout=20_000)
    expect(page.locator("#cost")).to_contain_text("trainable of", timeout=60_000)
    page.get_by_role("tab", name="1 Data").click()
    expect(page.locator("#understood h3")).to_have_text("Café orders", timeout=60_000)
    assert watch.wrong == []


def test_clicks_alone_lead_from_nothing_to_two_answers(browser: Browser, tmp_path: Path) -> None:
    with served_alone(tmp_path) as url:
        _from_nothing_to_two_answers(*opened(browser, url))


def _from_nothing_to_two_answers(page: Page, watch: Watch) -> None:
    page.get_by_role("tab", name="2 Train").click()
    page.get_by_role("button", name="Start training").click()
    problem = page.locator("#train-problem .problem")
    expect(problem).to_contain_text("No dataset is chosen.", timeout=60_000)
    problem.get_by_role("button", name="Try the example").click()  # one cause, one button
    expect(page.locator("#picker button[aria-pressed=true]").first).to_be_visible(timeout=60_000)
    expect(problem).to_be_hidden()
    page.get_by_role("button", name="Start training").click()
    expect(live(page)).to_have_attribute("data-state", "running", timeout=60_000)
    expect(page.locator("#live .try-example")).to_be_hidden()
    expect(live(page)).to_have_attribute("data-state", "done", timeout=240_000)
    result = page.locator("#live .result")
    expect(result.locator(".verdict")).not_to_be_empty(timeout=60_000)
    expect(result.locator(".shown article").first).to_be_visible()
    expect(result.get_by_role("button", name=re.compile("Try rank"))).to_have_count(2)
    result.get_by_role("button", name="Compare").click()
    expect(page.locator("#compare-run input")).to_have_value(re.compile("orders r8 q"), timeout=20_000)
    page.locator("#chips button").first.click()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("[data-pane=base] .badge")).to_contain_text("max difference 0", timeout=60_000)
    expect(page.locator("[data-pane=adapted] .answer")).not_to_be_empty()
    assert watch.wrong == []


@pytest.mark.nightly
def test_the_tour_of_the_readme_can_be_walked_to_its_end(browser: Browser, tmp_path: Path) -> None:
    seen: list[str] = []
    with served_alone(tmp_path) as url:
        page, watch = opened(browser, url)
        page.set_default_timeout(SLOWLY)
        expect.set_options(timeout=SLOWLY)
        try:
            tour.walk(page, seen.append)
        finally:
            expect.set_options(timeout=None)
    assert seen[-1].startswith("Download the report") and watch.wrong == []


@pytest.mark.nightly
def test_what_is_shown_is_of_the_run_that_was_trained_last_or_chosen(browser: Browser, tmp_path: Path) -> None:
    with served_alone(tmp_path) as url:
        page, watch = opened(browser, url)
        train(page, url, "starter", 4)
        expect(live(page)).to_have_attribute("data-state", "done", timeout=240_000)
        first = page.url
        page.get_by_role("tab", name="5 Export").click()
        page.get_by_role("button", name="Download the adapter").click()
        expect(page.locator("#export-proof")).to_contain_text("proof passed", timeout=60_000)
        page.get_by_role("tab", name="3 Compare").click()
        expect(page.locator("#compare-run input")).to_have_value(re.compile("orders"), timeout=20_000)
        expect(page.get_by_text("There is no run to choose yet.").first).to_be_hidden()
        page.get_by_role("button", name="Measure the held-out loss by strength").click()
        expect(page.locator("#strength-line .verdict")).to_contain_text("orders", timeout=60_000)

        page.get_by_role("tab", name="2 Train").click()
        page.get_by_label("Steps", exact=True).fill("6")
        page.get_by_label("Batch", exact=True).fill("3")
        page.get_by_role("button", name="Start training").click()
        page.wait_for_url(lambda address: address != first, timeout=60_000)
        expect(live(page)).to_have_attribute("data-state", "done", timeout=240_000)
        page.get_by_role("tab", name="5 Export").click()
        expect(page.locator("#export-run input")).to_have_value(re.compile(r"\(2\)"), timeout=20_000)
        expect(page.locator("#export-proof")).to_contain_text("Each download", timeout=20_000)
        page.get_by_role("tab", name="3 Compare").click()
        expect(page.locator("#compare-run input")).to_have_value(re.compile(r"\(2\)"), timeout=20_000)
        expect(page.locator("#strength-line .verdict")).to_have_count(0)
        expect(page.locator("#chips button").first).to_be_visible(timeout=20_000)
        page.get_by_role("tab", name="2 Train").click()
        expect(page.locator("#cost b").first).to_be_visible(timeout=60_000)

        watch.reload(page)
        expect(live(page)).to_have_attribute("data-state", "done", timeout=60_000)
        expect(page.get_by_label("Steps", exact=True)).to_have_value("6", timeout=30_000)
        expect(page.get_by_label("Batch", exact=True)).to_have_value("3", timeout=30_000)
        # what the page was still asking for when it was left may be said after it has come back
        assert [said for said in watch.wrong if not any(word in said for word in LEAVING)] == []


@pytest.mark.nightly
def test_a_problem_has_its_button_and_a_run_can_be_discarded_brought_back_and_looked_into(
    browser: Browser, tmp_path: Path
) -> None:
    with served_alone(tmp_path) as url:
        page, watch = opened(browser, url)
        page.get_by_role("button", name="Café orders").click()
        page.get_by_role("tab", name="2 Train").click()
        expect(page.locator("#cost b").first).to_be_visible(timeout=60_000)
        more = page.locator("#more").get_by_role("button", name="More")
        more.click()
        limit = page.get_by_label("Length limit", exact=True)
        limit.fill("100000")
        limit.blur()
        cure = page.locator("#cost .problem").get_by_role("button", name=re.compile("^Use length limit"))
        expect(cure).to_be_visible(timeout=20_000)
        more.click()  # the control that it changes is folded away
        cure.click()
        expect(page.locator("#cost b").first).to_be_visible(timeout=20_000)
        more.click()
        assert int(limit.input_value()) < 100000

        page.get_by_label("Steps", exact=True).fill("9000")
        page.get_by_role("button", name="Start training").click()
        step = page.locator("#live [data-tile=step]")
        expect(step).to_have_text(re.compile("^[2-9]"), timeout=60_000)
        page.get_by_role("button", name="Stop and discard").click()
        expect(live(page)).to_have_attribute("data-state", "deleted", timeout=60_000)
        page.locator("#live").get_by_role("button", name="Undo").click()
        expect(live(page)).to_have_attribute("data-state", "stopped", timeout=20_000)
        page.locator("#live").get_by_role("button", name="Resume").click()
        expect(step).not_to_have_text(step.inner_text(), timeout=60_000)
        page.get_by_role("button", name="Stop and keep").click()
        expect(live(page)).to_have_attribute("data-state", "stopped", timeout=60_000)

        page.get_by_role("tab", name="Runs").click()
        page.locator("#runs tbody input[type=checkbox]").check()
        for does, tab, box in (("Look inside", "4 Inside", "#inside-run"), ("Export", "5 Export", "#export-run")):
            page.locator("#runs").get_by_role("button", name=does).click()
            expect(page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true", timeout=20_000)
            expect(page.locator(f"{box} input")).to_have_value(re.compile("orders"), timeout=20_000)
            page.get_by_role("tab", name="Runs").click()
        assert watch.wrong == []


@pytest.mark.nightly
@pytest.mark.parametrize("width", [1280, 390])
def test_words_explain_themselves_to_pointer_and_keys(url: str, browser: Browser, width: int) -> None:
    page, watch = opened(browser, url, width)
    page.get_by_role("button", name="Café orders").click()
    words = page.locator("#understood .term")
    expect(words.first).to_be_visible(timeout=60_000)
    told = page.get_by_role("tooltip")
    for word in words.all():
        word.hover()
        expect(told).to_have_text(TERMS[str(word.get_attribute("data-term"))])
        box = told.bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] >= 0, word.inner_text()
    words.last.hover()
    word, box = words.last.bounding_box(), told.bounding_box()
    assert word and box
    page.mouse.move(word["x"] + 4, word["y"] + word["height"] / 2)
    page.mouse.move(word["x"] + 4, box["y"] + box["height"] / 2, steps=20)  # who moves onto it may read on
    expect(told).to_be_visible()
    page.mouse.move(0, 0)
    expect(told).to_be_hidden()
    words.last.focus()
    expect(words.last).to_have_attribute("aria-describedby", str(told.get_attribute("id")))
    page.mouse.move(5, 5)  # what has the focus stays explained
    expect(told).to_be_visible()
    page.keyboard.press("Escape")
    page.mouse.move(9, 9)
    expect(told).to_be_hidden()
    page.evaluate("scrollTo(0, 0)")
    page.set_viewport_size({"width": width, "height": 300})
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")  # into view from below the fold
    expect(told).to_be_visible()
    assert overflow(page) <= 0 and watch.wrong == []


@pytest.mark.nightly
def test_every_stop_of_the_tab_key_can_be_seen(url: str, browser: Browser) -> None:
    page, watch = opened(browser, url)
    page.get_by_role("button", name="Café orders").click()
    expect(page.locator("#understood .term").first).to_be_visible(timeout=60_000)
    unseen, stops = [], {}
    for tab in TABS:
        page.get_by_role("tab", name=tab).focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")
        for stops[tab] in range(80):
            page.keyboard.press("Tab")
            here = page.evaluate_handle("document.activeElement").as_element()
            if not here or here.evaluate("one => one === document.body || !!one.closest('footer, header')"):
                break
            if not here.evaluate(RING):
                unseen.append(f"{tab}: {here.evaluate('one => one.outerHTML.slice(0, 160)')}")
        else:
            raise AssertionError(f"{tab}: no end after 80 stops")
    assert min(stops.values()) >= 4 and sum(stops.values()) > 60, stops
    assert not unseen, "\n".join(unseen)
    assert watch.wrong == []
