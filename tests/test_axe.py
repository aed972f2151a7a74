"""Every tab of the real page under axe-core: no violation of WCAG 2 A and AA, light and dark, empty and full."""

import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from lora_studio.runs.config import DataChoice
from lora_studio.studio import Studio
from tests.browser import Watch, overflow, served
from tests.tiny import tiny_model
from tests.visits import rows, trained

pytestmark = pytest.mark.nightly

AXE = (files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")
RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"], "resultTypes": ["violations"]}
OF_COLOURS = {"runOnly": {"type": "rule", "values": ["color-contrast"]}, "resultTypes": ["violations"]}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, str]]:
    """The app with nothing in it, the app with two finished runs of a study, and the address of one of these."""
    empty, full = (tmp_path_factory.mktemp(name) for name in ("empty", "full"))
    model = tiny_model(full / "models" / "starter")
    studio = Studio(full)
    choice = DataChoice(id=studio.data.add_text(rows("order", 40)).id)
    runs = [trained(studio, model, choice, f"run {number}", study="5" * 32) for number in range(2)]
    told = {"LORA_STUDIO_MODELS": str(full / "models"), "HF_HUB_OFFLINE": "1"}
    with served(empty, **told) as nothing, served(full, **told) as something:
        yield nothing, something, f"{something}/?run={runs[0].id}"


def violations(page: Page, rules: Any = RULES) -> dict[str, list[str]]:
    """By rule, the elements that break it."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE)
    page.mouse.move(0, 0)
    page.evaluate("Promise.all(document.getAnimations().map(one => one.finished.catch(() => 0)))")
    found: Any = page.evaluate("rules => axe.run(document, rules)", rules)
    return {
        one["id"]: [f"{node['target']} {node['failureSummary']}" for node in one["nodes"]]
        for one in found["violations"]
    }


def settle(page: Page) -> None:
    """Until nothing is added to the page any more."""
    page.wait_for_function(
        """() => { const before = window.counted;
        window.counted = document.querySelectorAll('*').length;
        return window.counted === before; }""",
        polling=500,
    )


def tabs(page: Page) -> list[str]:
    """The names of the page's own tabs."""
    return page.get_by_role("tablist").first.get_by_role("tab").all_inner_texts()


def opened(browser: Browser, address: str, home: str, theme: str, width: int = 1280) -> tuple[Page, Watch]:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    watch = Watch(page, home)
    page.goto(f"{address}{'&' if '?' in address else '?'}__theme={theme}")
    expect(page.locator("header .chip")).to_be_visible(timeout=60_000)
    return page, watch


def fill(page: Page, name: str) -> None:
    """Press what makes a tab show the most it can."""
    if name.endswith("Compare"):
        page.locator("#chips button").first.click()
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("[data-pane=base] .badge")).to_be_visible(timeout=60_000)
    if name.endswith("Inside"):
        page.get_by_role("button", name="Look inside").click()
        expect(page.locator("#inside-amplification .main-svg").first).to_be_visible(timeout=60_000)


def test_a_violation_is_found(browser: Browser) -> None:
    page = browser.new_page()
    page.set_content("<html lang=en><title>t</title><main><img src='data:,'><button></button></main></html>")
    assert violations(page).keys() == {"image-alt", "button-name"}
    page.set_content("<html lang=en><title>t</title><main style='color:#777;background:#888'>faint</main></html>")
    assert violations(page, OF_COLOURS).keys() == {"color-contrast"}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_tab_has_a_violation(url: tuple[str, str, str], browser: Browser, theme: str) -> None:
    """In the dark only the colours are others, so only the rule that looks at colours is asked again."""
    (empty, full, run), rules = url, RULES if theme == "light" else OF_COLOURS
    broken: dict[str, Any] = {}
    looked: list[str] = []
    for address, home in ((empty, empty), (run, full)):
        page, watch = opened(browser, address, home, theme)
        names = tabs(page)
        assert len(names) >= 6

        def look(where: str, page: Page = page, state: str = "empty" if home == empty else "full") -> None:
            settle(page)
            looked.append(where)
            if found := violations(page, rules):
                broken[f"{state}: {where}"] = found

        for name in names:
            page.get_by_role("tab", name=name, exact=True).click()
            expect(page.get_by_role("tab", name=name, exact=True)).to_have_attribute("aria-selected", "true")
            if home == full:
                fill(page, name)
            look(name)
            for inner in page.get_by_role("tab").all()[len(names) + 1 :] if home == full else []:
                inner.click()
                look(f"{name}, {inner.inner_text()}")
        assert watch.wrong == []
        page.close()
    assert sum("," in where for where in looked) >= 6  # tabs within tabs
    assert not broken, json.dumps(broken, indent=1)


def test_no_tab_is_wider_than_a_phone(url: tuple[str, str, str], browser: Browser) -> None:
    _, full, run = url
    page, watch = opened(browser, run, full, "dark", width=390)
    for name in tabs(page):
        page.get_by_role("tab", name=name, exact=True).click()
        fill(page, name)
        settle(page)
        assert overflow(page) <= 0, name
    assert watch.wrong == []
