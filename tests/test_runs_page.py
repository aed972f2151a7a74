"""The Runs tab in Chromium over runs that were trained before: found, laid over each other, named, cloned, undone."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from lora_studio.runs.config import DataChoice, RunConfig
from lora_studio.runs.store import write_json
from lora_studio.studio import Studio
from tests.browser import Watch, live, overflow, served_alone
from tests.tiny import tiny_model
from tests.visits import rows, trained

pytestmark = pytest.mark.nightly

HOSTILE = "<img src=x onerror=alert(1)> & co"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The app on a root with seven runs: two alone, four of a study, one that failed."""
    folder = tmp_path_factory.mktemp("page")
    model = tiny_model(folder / "models" / "starter")
    studio = Studio(folder)
    kept = studio.data.add_text(rows("café"), "orders")
    choice = DataChoice(id=kept.id, name="orders")
    for name in ("alpha", HOSTILE):
        trained(studio, model, choice, name)
    for number in range(4):
        trained(studio, model, choice, f"cell {number}", study="5" * 32)
    failed = studio.runs.create(RunConfig(name="omega", model=str(model), dataset=choice), {})
    (failed.path / "worker.log").touch()
    error = {"code": "E_X", "message": "It broke.", "hint": ""}
    write_json(failed.path / "exit.json", {"status": "failed", "step": 0, "values": {}, "error": error})
    with served_alone(folder) as address:
        yield address


def opened(browser: Browser, url: str, width: int = 1280) -> tuple[Page, Watch]:
    page = browser.new_page(viewport={"width": width, "height": 900})
    watch = Watch(page, url)
    page.goto(url)
    page.get_by_role("tab", name="Runs").click()
    expect(page.locator("#runs [data-rows='7']")).to_be_visible(timeout=30_000)
    return page, watch


def names(page: Page) -> list[str]:
    return page.locator("#runs tbody .name-of").all_inner_texts()


def test_found_sorted_unfolded_and_laid_over_each_other(url: str, browser: Browser) -> None:
    page, watch = opened(browser, url)
    assert names(page) == ["omega", "Study of 4 runs: orders", HOSTILE, "alpha"]
    page.get_by_role("button", name="Name", exact=True).click()
    assert names(page) == [HOSTILE, "alpha", "omega", "Study of 4 runs: orders"]
    page.get_by_label("Search names").fill("CELL 2")
    assert names(page) == ["Study of 1 runs: orders"]
    page.get_by_label("Search names").fill("")
    page.get_by_role("button", name="Study of 4 runs").press("Enter")
    expect(page.locator("#runs .paper td").filter(has_text="recommended")).to_be_visible(timeout=20_000)
    assert [name for name in names(page) if name.startswith("cell")] == ["cell 0", "cell 1", "cell 2", "cell 3"]
    page.get_by_label("Choose alpha").check()
    expect(page.locator("#runs .about")).to_be_visible(timeout=20_000)
    page.get_by_label("Choose <img").check()
    page.get_by_label("Choose cell 1").check()
    expect(page.locator("#runs [data-lines='3']")).to_be_visible(timeout=20_000)
    expect(page.locator("#runs .plot .legendtext").first).to_have_text("alpha")
    expect(page.locator("#runs .alike")).to_be_visible()
    expect(page.get_by_role("button", name="By tokens")).to_be_disabled()  # these runs are older than the count
    page.get_by_label("Show differences only").uncheck()
    expect(page.locator("#runs .sheet tr").filter(has_text="Learning rate").locator("td").first).to_have_text("0.005")
    page.get_by_role("button", name="Open the study").click()
    expect(page.locator("#study .cell").first).to_be_visible(timeout=20_000)
    assert watch.wrong == []


def test_renamed_noted_deleted_and_brought_back(url: str, browser: Browser) -> None:
    page, watch = opened(browser, url, width=390)
    assert overflow(page) <= 0
    page.get_by_label("Choose alpha").check()
    page.get_by_label("Name", exact=True).fill("beta")
    page.get_by_label("Notes").fill("a good one")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#runs .name-of").last).to_have_text("beta", timeout=20_000)
    expect(page.locator("#runs tbody small")).to_have_text("a good one")
    assert overflow(page) <= 0
    page.locator("#runs").get_by_role("button", name="Delete", exact=True).press("Enter")
    expect(page.locator("#runs .undo")).to_contain_text("beta is deleted.", timeout=20_000)
    assert "beta" not in names(page)
    expect(page.locator("#runs").get_by_role("button", name="Undo")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#runs .name-of").last).to_have_text("beta", timeout=20_000)
    expect(page.locator("#runs .undo")).to_be_hidden(timeout=20_000)

    page.get_by_role("button", name="beta").click()
    expect(live(page)).to_have_attribute("data-state", "done", timeout=20_000)
    page.locator("#live").get_by_role("button", name="Delete").press("Enter")
    expect(page.locator("#live .name")).to_have_text("beta is deleted", timeout=20_000)
    watch.reload(page)
    page.locator("#live").get_by_role("button", name="Undo").press("Enter")
    expect(live(page)).to_have_attribute("data-state", "done", timeout=20_000)
    expect(page.locator("#live .name")).to_have_text("beta")
    assert watch.wrong == []


def test_a_clone_fills_the_form(url: str, browser: Browser) -> None:
    page, watch = opened(browser, url)
    page.get_by_label("Choose omega").check()
    page.get_by_role("button", name="Clone into the form").click()
    expect(page.get_by_role("tab", name="2 Train")).to_have_attribute("aria-selected", "true", timeout=60_000)
    expect(page.locator("#model input")).to_have_value(re.compile("starter$"))
    expect(page.locator("#cost b").first).to_be_visible(timeout=60_000)
    page.get_by_role("tab", name="1 Data").click()
    expect(page.locator("#understood h3")).to_have_text("orders", timeout=30_000)
    assert watch.wrong == []
