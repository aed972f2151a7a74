"""The Export tab in Chromium: a proven download, lines to copy, an upload to a Hub on loopback, and no token left."""

import os
import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from lora_studio.studio import Studio
from tests.browser import Watch, overflow, served
from tests.fakehub import FakeHub
from tests.test_export import finished
from tests.test_push import CANARY, names
from tests.tiny import tiny_model

SHOTS = os.environ.get("LORA_STUDIO_SHOTS")  # a folder for pictures of what the test sees


def shoot(page: Page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name}.png", full_page=True)


@pytest.mark.nightly
def test_an_adapter_is_downloaded_with_its_proof_and_pushed_without_leaving_the_token(
    browser: Browser, tmp_path: Path
) -> None:
    root, uploads = tmp_path / "root", tmp_path / "hub"
    model = tiny_model(root / "models" / "starter")
    run, _ = finished(Studio(root), model)
    (root / "temporary").mkdir()
    uploads.mkdir()
    with FakeHub(uploads=uploads, accounts={CANARY: "ann"}) as hub:
        told = hub.environment(tmp_path / "home") | {"HF_HUB_DISABLE_XET": "1"}
        told |= {"LORA_STUDIO_MODELS": str(root / "models"), "TMPDIR": str(root / "temporary")}
        with served(root, **told) as url:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            watch = Watch(page, url)
            page.goto(url)
            page.get_by_role("tab", name="5 Export").click()
            page.locator("#export-run input").click()
            page.get_by_role("option").first.click()
            expect(page.locator("#portable .badge")).to_contain_text("portable", timeout=240_000)
            with page.expect_download(timeout=240_000) as download:
                page.get_by_role("button", name="Download the adapter").click()
            assert download.value.suggested_filename == f"adapter-{run.id[:8]}.zip"
            expect(page.locator("#export-proof")).to_contain_text("proof passed")
            expect(page.locator("#export-proof")).to_contain_text("differ by 0 at most")
            page.get_by_role("tab", name="Ollama").click()
            expect(page.get_by_role("textbox", name="Run the merged model in Ollama")).to_have_value(
                re.compile("ollama create mine-")
            )

            page.get_by_role("button", name="Upload to the Hub").click()
            expect(page.locator("#push-problem")).to_contain_text("E_HUB_NAME", timeout=240_000)
            page.get_by_label("Name", exact=True).last.fill("cafe-orders")
            page.get_by_label("Access token").fill(f"{CANARY}x")
            page.get_by_role("button", name="Upload to the Hub").click()
            expect(page.locator("#push-problem")).to_contain_text("E_HUB_TOKEN", timeout=240_000)
            page.get_by_label("Access token").fill(CANARY)
            page.get_by_role("button", name="Upload to the Hub").click()
            expect(page.locator("#pushed a")).to_have_attribute(
                "href", f"{hub.endpoint}/ann/cafe-orders", timeout=240_000
            )
            expect(page.get_by_label("Access token")).to_have_value("")
            expect(page.locator("#push-problem .problem")).to_have_count(0)
            shoot(page, "export_light_desktop")
            assert names(uploads / "ann" / "cafe-orders") == [
                *("Modelfile", "README.md", "adapter_config.json", "adapter_model.safetensors")
            ]

            phone = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
            phone.goto(f"{url}?__theme=dark")
            phone.get_by_role("tab", name="5 Export").click()
            phone.locator("#export-run input").click()
            phone.get_by_role("option").first.click()
            expect(phone.locator("#command textarea")).to_have_value(re.compile("."), timeout=240_000)
            assert overflow(phone) <= 0
            shoot(phone, "export_dark_phone")
            assert watch.wrong == []
        left = [path for path in tmp_path.rglob("*") if path.is_file() and uploads not in path.parents]
        assert root / "app.log" in left and not [path for path in left if CANARY.encode() in path.read_bytes()]
