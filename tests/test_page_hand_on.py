"""The page in Chromium: a report is downloaded, and an adapter made by PEFT is brought, compared and taken away."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Download, expect

from lora_studio.runs.config import DataChoice
from lora_studio.studio import Studio
from tests.browser import Watch, overflow, served_alone
from tests.test_adoption import made_by_peft
from tests.tiny import tiny_model
from tests.visits import rows, trained

pytestmark = pytest.mark.nightly

SLOWLY = 60_000  # ms


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, str]]:
    """Its address, its root and a run that has ended; the starter model is the tiny one."""
    root = tmp_path_factory.mktemp("handing")
    model, studio = tiny_model(root / "models" / "starter"), Studio(root)
    kept = studio.data.add_text(rows("coffee"), "orders")
    run = trained(studio, model, DataChoice(id=kept.id, name="orders"), "orders r2", words="a latte")
    with served_alone(root) as url:
        yield url, root, run.id


def test_a_report_is_taken_away_from_both_places(app: tuple[str, Path, str], browser: Browser, tmp_path: Path) -> None:
    url, _, run = app
    page = browser.new_page(viewport={"width": 390, "height": 844})
    watch = Watch(page, url)
    page.goto(f"{url}/?run={run}")
    button = page.locator("#live .result .report")
    expect(button).to_be_visible(timeout=SLOWLY)
    assert overflow(page) <= 0
    with page.expect_download(timeout=SLOWLY) as first:
        button.click()
    expect(button).to_have_text("Report", timeout=SLOWLY)
    page.get_by_role("tab", name="5 Export").click()
    expect(page.locator("#command textarea")).not_to_have_value("", timeout=SLOWLY)
    with page.expect_download(timeout=SLOWLY) as second:
        page.get_by_role("button", name="Download the report").click()
    assert overflow(page) <= 0 and watch.wrong == []
    for download in (first.value, second.value):
        assert download.suggested_filename == f"report-{run[:8]}.html"
        alone = browser.new_context(offline=True).new_page()
        alone.goto(saved(download, tmp_path).as_uri())
        expect(alone.locator("h1")).to_have_text("orders r2")
        expect(alone.locator("section h2").first).to_have_text("Result")
        alone.context.close()


def saved(download: Download, folder: Path) -> Path:
    to = folder / download.suggested_filename
    download.save_as(to)
    return to


def test_an_adapter_is_brought_compared_looked_into_and_taken_away(
    app: tuple[str, Path, str], browser: Browser, tmp_path: Path
) -> None:
    url, root, _ = app
    made_by_peft(root / "models" / "starter", tmp_path / "adapter")
    both = [tmp_path / "adapter" / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    watch = Watch(page, url)
    page.goto(url)
    page.get_by_role("tab", name="3 Compare").click()
    page.get_by_role("button", name="Bring an adapter made elsewhere").click()
    go, files = page.get_by_role("button", name="Bring it along"), page.locator("#adapter-files input[type=file]")
    files.set_input_files([both[0]])
    expect(page.locator("#adapter-files")).to_contain_text("adapter_config", timeout=SLOWLY)
    go.click()
    expect(page.locator("#adopt-problem")).to_contain_text("E_ADAPTER_FILES", timeout=SLOWLY)
    page.locator("#adapter-files button[aria-label=Clear]").first.click()

    files.set_input_files(both)
    expect(page.locator("#adapter-files")).to_contain_text("safetensors", timeout=SLOWLY)
    page.locator("#adapter-name").get_by_role("textbox").fill("from <b>elsewhere</b>")
    go.click()
    expect(page.locator("#adopted")).to_contain_text("from <b>elsewhere</b> is among your runs", timeout=SLOWLY)
    expect(page.locator("#compare-run input")).to_have_value(re.compile("from <b>elsewhere</b> · brought along"))
    page.locator("#prompt").get_by_role("textbox").fill("hello")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("[data-pane=base] .badge")).to_contain_text("max difference 0", timeout=SLOWLY)
    expect(page.get_by_role("button", name="Generate")).to_be_enabled(timeout=SLOWLY)
    base, adapted = (page.locator(f"[data-pane={pane}] .answer").inner_text() for pane in ("base", "adapted"))
    assert base != adapted
    page.get_by_role("tab", name="4 Inside").click()
    page.get_by_role("button", name="Look inside").click()
    expect(page.locator("#inside-change .main-svg").first).to_be_visible(timeout=SLOWLY)
    page.get_by_role("tab", name="5 Export").click()
    expect(page.locator("#command textarea")).to_have_value(re.compile("lora_studio adopt FOLDER"), timeout=SLOWLY)
    with page.expect_download(timeout=SLOWLY) as download:
        page.get_by_role("button", name="Download the report").click()
    assert "made elsewhere" in saved(download.value, tmp_path).read_text()
    assert watch.wrong == [] and not list(root.glob("claimed-*"))
