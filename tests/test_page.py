"""The real page in Chromium, from an empty folder to two different answers; the model is tiny and random."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser import Watch, choose, live, overflow, served_alone, study, train
from tests.tiny import tiny_model

STEPS = 120


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The app on an empty root, whose starter model is the tiny one, so that nothing is fetched."""
    with served_alone(tmp_path_factory.mktemp("page")) as address:
        yield address


def points(page: Page) -> int:
    return int(live(page).get_attribute("data-points") or 0)


def wait_for_points(page: Page, count: int) -> None:
    """Until the curve has at least so many points."""
    page.wait_for_function(
        "count => document.querySelector('#live [data-points]')?.dataset.points >= count", arg=count, timeout=40_000
    )


@pytest.mark.nightly
def test_from_a_sample_to_two_different_answers(url: str, browser: Browser, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    watch = Watch(page, url)
    model = tiny_model(tmp_path / "tiny")
    train(page, url, str(model), STEPS, learning_rate="0.05", batch="2")

    wait_for_points(page, 5)
    early = points(page)
    wait_for_points(page, early + 5)  # it grows while we look
    page.wait_for_url(re.compile(r"[?&]run=[0-9a-f]{32}"))
    expect(page.locator("#live .plot .main-svg").first).to_be_visible()

    before = points(page)
    watch.reload(page)
    wait_for_points(page, before)
    elsewhere = browser.new_context().new_page()
    elsewhere.goto(page.url)
    wait_for_points(elsewhere, before)
    elsewhere.context.close()

    expect(live(page)).to_have_attribute("data-state", "done", timeout=240_000)
    assert points(page) == STEPS
    expect(page.locator("#live .samples article").first).to_be_visible()
    page.get_by_role("button", name="Compare", exact=True).click()
    page.locator("#chips button").first.click()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("[data-pane=base] .badge")).to_contain_text("max difference 0", timeout=30_000)
    expect(page.get_by_role("button", name="Generate")).to_be_enabled(timeout=30_000)
    base, adapted = (page.locator(f"[data-pane={pane}] .answer").inner_text() for pane in ("base", "adapted"))
    assert base and adapted and base != adapted
    expect(page.locator("#expected")).to_contain_text("The wanted answer")

    page.get_by_role("tab", name="4 Inside").click()
    page.get_by_role("button", name="Look inside").click()
    for picture in ("change", "values", "amplification"):
        expect(page.locator(f"#inside-{picture} .main-svg").first).to_be_visible(timeout=60_000)
    page.get_by_role("button", name="Measure the held-out loss").click()
    expect(page.locator("#inside-curve-line .verdict")).to_be_visible(timeout=60_000)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the smaller adapter").click()
    assert re.search(r"-r\d+\.zip$", download.value.suggested_filename) and not download.value.failure()

    page.get_by_role("tab", name="5 Export").click()
    for label in ("The command that repeats this run", "Load the adapter in Python"):
        expect(page.get_by_role("textbox", name=label)).not_to_be_empty()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the adapter").click()
    assert download.value.suggested_filename.endswith(".zip") and not download.value.failure()
    assert watch.wrong == []


@pytest.mark.nightly
def test_another_method_learns_labels(url: str, browser: Browser, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    watch = Watch(page, url)
    page.goto(url)
    page.get_by_role("button", name="Support tickets").click()
    page.get_by_role("button", name="Continue to training").click()
    expect(page.locator("#picker button").first).to_be_visible(timeout=60_000)
    page.get_by_label("Choose a label").check()
    page.locator("#picker button[data-role='mlp.up']").click()
    choose(page, "#method", "Top blocks only")
    expect(page.locator("#set-rank")).to_be_hidden()
    expect(page.locator("#picker")).to_be_hidden()
    page.get_by_label("Blocks", exact=True).fill("3")
    expect(page.locator("#cost")).to_contain_text("E_METHOD", timeout=20_000)
    choose(page, "#method", "LoRA")
    expect(page.locator("#picker button[aria-pressed=true]")).to_have_text(["q", "v", "up"])
    choose(page, "#method", "Adapter P (Pfeiffer)")
    page.get_by_label("Bottleneck width", exact=True).fill("4")
    page.get_by_label("Steps", exact=True).fill("30")
    expect(page.locator("#cost")).to_contain_text("trainable of", timeout=20_000)
    page.get_by_role("button", name="Start training").click()
    expect(live(page)).to_have_attribute("data-state", "done", timeout=240_000)
    expect(page.locator("#live .line")).to_contain_text("Adapter P (Pfeiffer), bottleneck width 4 · 6 labels")
    expect(page.locator("#live .tiles")).to_contain_text("Accuracy")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.locator("#chips button").first.click()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("[data-pane=adapted] .answer")).to_contain_text(" %", timeout=30_000)
    page.get_by_role("tab", name="5 Export").click()
    expect(page.locator("#portable")).to_contain_text("not portable", timeout=20_000)
    expect(page.locator("#command textarea")).to_have_value(re.compile("--task classify --method adapter_p --width 4"))
    page.get_by_role("button", name="Download the merged model").click()
    expect(page.locator("#export-problem")).to_contain_text("E_MERGE", timeout=30_000)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the adapter").click()
    assert download.value.suggested_filename.endswith(".zip") and not download.value.failure()
    assert watch.wrong == []


@pytest.mark.nightly
def test_the_doctor_starts_again_and_that_run_is_paused_and_resumed(url: str, browser: Browser, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    watch, steps = Watch(page, url), 2 * STEPS
    train(page, url, str(tiny_model(tmp_path / "tiny")), steps, learning_rate="0.000001", batch="2")
    expect(page.locator("#live .forecast")).to_contain_text("Measured on the heaviest batch", timeout=60_000)
    again = page.get_by_role("button", name="Start again with learning rate 0.005")
    expect(again).to_be_visible(timeout=240_000)
    assert overflow(page) <= 0
    first = page.url
    again.click()  # the run is ended by it, if it is not over yet
    page.wait_for_url(lambda address: "run=" in address and address != first)
    expect(again).to_be_hidden()

    expect(live(page)).to_have_attribute("data-state", "running", timeout=120_000)
    wait_for_points(page, 5)
    page.get_by_role("button", name="Pause").focus()
    page.keyboard.press("Enter")
    expect(live(page)).to_have_attribute("data-state", "paused", timeout=60_000)
    expect(page.get_by_role("button", name="Resume")).to_be_focused()  # it took the place of Pause
    expect(page.locator("#live .costs")).to_contain_text(f"of {steps} steps")
    before = points(page)
    assert 5 <= before < steps and overflow(page) <= 0
    elsewhere = browser.new_context().new_page()
    elsewhere.goto(page.url)
    wait_for_points(elsewhere, before)
    page.keyboard.press("Enter")
    expect(live(page)).to_have_attribute("data-state", "done", timeout=240_000)
    assert before < points(page) == steps
    expect(live(elsewhere)).to_have_attribute("data-points", str(steps), timeout=60_000)  # it looked on all the time
    elsewhere.context.close()
    watch.reload(page)
    wait_for_points(page, steps)
    assert points(page) == steps and watch.wrong == []


@pytest.mark.nightly
def test_a_study_races_drops_and_ends_in_a_table(url: str, browser: Browser) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    watch = Watch(page, url)
    page.goto(url)
    page.get_by_role("button", name="Café orders").click()
    page.get_by_role("button", name="Continue to training").click()
    expect(page.locator("#picker button").first).to_be_visible(timeout=60_000)
    for label, value in {"Steps": "100", "Batch": "2", "Learning rate": "0.02", "Seed": "1"}.items():
        page.get_by_label(label, exact=True).fill(value)
    study(page, "1, 2")
    page.get_by_role("button", name="Drop q + v, rank 2").click()
    expect(page.locator("#study .plot .main-svg").first).to_be_visible(timeout=60_000)
    page.wait_for_url(re.compile(r"[?&]study=[0-9a-f]{32}"))
    watch.reload(page)
    shown = page.locator("#study [data-points]").first
    expect(shown).to_have_attribute("data-state", "over", timeout=90_000)
    expect(page.locator("#study .cell")).to_have_count(4)
    expect(page.locator("#study .cell .stopped")).to_have_count(1)
    expect(page.locator("#study .outcome em")).to_have_text("recommended")
    expect(page.locator("#study .sizes .js-line").first).to_be_visible(timeout=20_000)
    assert overflow(page) <= 0
    page.get_by_role("button", name="q, rank 1:").press("Enter")
    page.locator("#study .detail").get_by_role("button", name="Compare").click()
    expect(page.get_by_role("tab", name="3 Compare")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#compare-run input")).to_have_value(re.compile("orders r1 q "))
    assert watch.wrong == []


def test_nothing_is_wider_than_a_phone(url: str, browser: Browser) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    watch = Watch(page, url)
    page.goto(url)
    page.get_by_role("button", name="Plain English").click()
    expect(page.locator("#preview .rendered")).to_be_visible(timeout=30_000)
    for tab in ("1 Data", "2 Train", "Study", "Runs", "3 Compare", "4 Inside", "5 Export"):
        page.get_by_role("tab", name=tab).click()
        expect(page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")
        assert overflow(page) <= 0, tab
    assert watch.wrong == []


def test_mistakes_are_answered_where_they_are_made(url: str, browser: Browser, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    watch = Watch(page, url)
    page.goto(url)
    (tmp_path / "ragged.csv").write_text("a,b\n1,2,<img src=x onerror=alert(1)>\n")
    page.locator("#upload input[type=file]").set_input_files(tmp_path / "ragged.csv")
    expect(page.locator("#data-problem")).to_contain_text("E_RAGGED", timeout=20_000)
    page.get_by_role("tab", name="2 Train").click()
    page.get_by_label("Batch", exact=True).fill("0")
    expect(page.locator("#cost")).to_contain_text("Batch is 0.", timeout=20_000)
    page.get_by_role("button", name="Start training").click()
    expect(page.locator("#set-batch-size")).to_contain_text("Batch is 0. Give a whole number")
    page.get_by_label("Batch", exact=True).fill("4")
    expect(page.locator("#cost")).to_contain_text("trainable of", timeout=20_000)
    page.get_by_role("button", name="Start training").click()
    expect(page.locator("#train-problem")).to_contain_text("E_NO_DATA", timeout=20_000)
    assert watch.wrong == []
