"""A run's report: what it says, that every word in it is text, and that a browser opens it alone and in silence."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser
from typer.testing import CliRunner

from lora_studio import peft_format, report
from lora_studio.cli import app
from lora_studio.core.analysis import spectrum
from lora_studio.core.lora import Factors
from lora_studio.core.spec import BaselineSpec
from lora_studio.errors import StudioError
from lora_studio.limits import LAPTOP
from lora_studio.owners import owner_name
from lora_studio.report import Shown, page
from lora_studio.runs.config import DataChoice, Run
from lora_studio.studio import Studio
from tests.test_hostile_page import PAYLOADS, Watched, put_in
from tests.visits import rows, trained

FACTORS = [
    Factors(layer=f"model.layers.{layer}.self_attn.{name}", role="", A=torch.ones(2, 4), B=torch.eye(4)[:, :2], scale=1)
    for layer in range(2)
    for name in ("q_proj", "v_proj")
]


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(tmp_path / "root", LAPTOP)


@pytest.fixture
def run(studio: Studio, tiny: Path) -> Run:
    kept = studio.data.add_text(rows("coffee"), "orders")
    return trained(studio, tiny, DataChoice(id=kept.id, name="orders"), "orders r2", words="a latte")


def learned(words: str = "a latte", **more: Any) -> dict[str, Any]:
    """The record of a verdict, as a journal has it."""
    row = {"part": "train", "prompt": words, "target": words, "base": words, "adapted": words}
    metric = {"name": "exact_match", "rows": 48, "base": 0.0, "adapted": 0.75, "low": 0.61, "high": 0.85}
    return {
        **{"type": "Learned", "step": 4, "verdict": "learnt", "sentence": words, "advice": words},
        "losses": {"train": [2.0, 0.5], "heldout": [2.0, None]},
        "metric": {**metric, "interval": "Wilson"},
        "rows": [{**row, "base_loss": 2.0, "loss": None}],
        **more,
    }


def records(studio: Studio, run: Run) -> list[Any]:
    return [*studio.runs.curve(run.id), learned()]


class Skeleton(HTMLParser):
    """The tags of a page and the names of their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[Any] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def said_everywhere(run: Run, told: list[Any], words: str) -> str:
    """A report in which every word that somebody could have written is `words`."""
    config = run.config
    choice = replace(config.dataset, name=words, columns={"prompt": words})
    told = [{name: words if value == "a latte" else value for name, value in one.items()} for one in told]
    told = [one if one["type"] not in ("Learned", "Warned") else {**one, "message": words} for one in told]
    told[-1] = learned(words, verdict=words, metric={"name": words, "rows": words, "interval": words})
    data = {
        **{"format": words, "columns": {"prompt": words}, "rows": 9, "train": 8, "heldout": 1, "cut": 0},
        **{"tokens": {"median": 1, "p95": 2, "max": 3}, "histogram": [1, 2], "supervised_tokens": 5},
        "warnings": [words],
    }
    view = replace(
        run,
        config=replace(config, name=words, model=words, dataset=choice),
        error={"code": "E_X", "message": words, "hint": words},
        facts={"revision": words},
    )
    factors = [replace(one, layer=f"{words}.{number}") for number, one in enumerate(FACTORS)]
    return page(view, Shown(records=told, data=data, update=factors, machine=words))


# ---- what it says ------------------------------------------------------------------------------------------------


def test_it_says_all_that_is_known(studio: Studio, run: Run, tiny: Path) -> None:
    text = Skeleton(studio.report(run.id).read_text()).text
    choice = run.config.dataset
    wanted = ["orders r2", "lora, rank 2 on attn.q, attn.v", "2 → 1", "held out", "a latte", "Step 4 ✓", choice.id]
    wanted += ["18 / 2", "prompt_completion", "prompt from “question”", "Every setting", "--rank 2"]
    wanted += ["cpu, base in float32", "transformers", "Held out", "odd", "3 s", "self_attn.q_proj"]
    for words in wanted:
        assert words in text, words
    assert "Did it learn?" not in Skeleton(page(run, Shown(records=[]))).text  # an older run has no verdict
    told = Skeleton(page(run, Shown(records=records(studio, run)))).text
    assert "Did it learn?" in told and "Exact match on 48 held-out rows: 0 % before, 75 % after" in told
    assert "61 % to 85 %" in told and "A row it trained on: loss 2 before, – after" in told


def test_a_general_loss_is_drawn_where_there_is_one(run: Run) -> None:
    told = [{"type": "Metric", "step": step, "values": {"heldout_loss": 2.0, "general_loss": 3.0}} for step in (0, 4)]
    drawn = page(run, Shown(records=told))
    assert "general text" in Skeleton(drawn).text and "step 4, held out 2, general text 3" in drawn


def test_the_update_is_read_from_the_factors_alone(studio: Studio, run: Run) -> None:
    alone = {one.layer: spectrum(one).S for one in peft_format.pairs(run.path / "adapter")}
    whole = {module.name: module.singular_values for module in studio.inside(run.id).modules}
    assert alone.keys() == whole.keys()
    for layer, values in whole.items():
        torch.testing.assert_close(alone[layer], torch.tensor(values, dtype=torch.float64))
    drawn = page(run, Shown(records=[], update=FACTORS))
    assert "self_attn.q_proj: size 2.83, effective rank 1.0 of 2" in drawn  # rows of ones: one direction of √(2 · 4)
    zero = [replace(one, B=torch.zeros(4, 2)) for one in FACTORS]
    assert "No matrix was changed" in page(run, Shown(records=[], update=zero))


@pytest.mark.parametrize(
    "change",
    [
        {"status": "failed", "error": {"code": "E_X", "message": "no", "hint": ""}, "summary": {}},
        {"status": "queued", "summary": {}, "latest": {}, "facts": {}, "step": 0, "steps": 0},
        {"facts": {"origin": {"base_model": "", "sha256": "ab"}}},
        {"facts": {"labels": ["yes", "no"]}, "summary": {"base_accuracy": 0.5, "best_accuracy": 1.0}},
    ],
)
def test_what_is_missing_leaves_its_part_out(run: Run, change: dict[str, Any]) -> None:
    drawn = page(replace(run, **change), Shown(records=[]))
    assert "None" not in drawn and "nan" not in Skeleton(drawn).text and "Loss</h2>" not in drawn
    bare = learned(losses={}, metric=None, rows=[], advice="")
    assert "Did it learn?" in page(run, Shown(records=[{"type": "Learned", "step": 1}, bare]))
    assert page(replace(run, config=replace(run.config, method=BaselineSpec(kind="bitfit"))), Shown(records=[]))


def test_rows_that_are_gone_and_a_damaged_adapter_are_no_obstacle(studio: Studio, run: Run) -> None:
    studio.data.delete(run.config.dataset.id)
    (run.path / "adapter" / "adapter_model.safetensors").write_bytes(b"{")
    text = Skeleton(studio.report(run.id).read_text()).text
    assert "no longer here" in text and "3 / 1" in text and "What the update" not in text


def test_a_long_run_stays_below_a_megabyte(run: Run) -> None:
    told: list[Any] = [
        {"type": "Metric", "step": step, "values": {"train_loss": 1 + step % 7, "heldout_loss": 2.0}}
        for step in range(10_000)
    ]
    texts = [f"{step} " + "word " * 400 for step in range(50)]
    told += [
        {"type": "Sample", "step": 200 * step, "index": index, "prompt": text, "text": text, "target": text}
        for step, text in enumerate(texts)
        for index in range(3)
    ]
    many = [replace(one, layer=f"{one.layer}.{n}") for one in FACTORS for n in range(60)]
    assert len(page(run, Shown(records=told, update=many)).encode()) < 2**20


# ---- to whom, and where to ---------------------------------------------------------------------------------------


def code_of(call) -> str:
    with pytest.raises(StudioError) as caught:
        call()
    assert caught.value.hint
    return caught.value.code


def test_nobody_but_the_owner_gets_one(studio: Studio, tiny: Path) -> None:
    ann, bob = (studio.of(owner_name("visitor", letter * 32)) for letter in "ab")
    kept = ann.data.add_text(rows("coffee"), "orders")
    run = trained(ann, tiny, DataChoice(id=kept.id), "hers")
    assert ann.report(run.id).is_file()
    ann.share(run.id)
    for who in (bob, studio.of("")):
        assert code_of(lambda who=who: who.report(run.id)) == "E_RUN_NOT_FOUND"


def test_a_file_of_somebody_else_is_not_overwritten(studio: Studio, run: Run, tmp_path: Path) -> None:
    to = tmp_path / "report.html"
    assert studio.report(run.id, to) == studio.report(run.id, to) == to
    to.write_text("<html>my thesis</html>")
    assert code_of(lambda: studio.report(run.id, to)) == "E_EXISTS" and "thesis" in to.read_text()
    assert code_of(lambda: studio.report(run.id, tmp_path / "none" / "x.html")) == "E_WRITE"
    assert code_of(lambda: studio.report(run.id, tmp_path)) == "E_WRITE"


def test_the_command_line_writes_one(studio: Studio, run: Run, tmp_path: Path) -> None:
    to = tmp_path / "report.html"
    said = CliRunner().invoke(app, ["report", run.id[:8], "--to", str(to), "--json", "--root", str(studio.root)])
    assert json.loads(said.stdout) == {"files": [str(to)]} and "orders r2" in to.read_text()


def test_a_token_that_somebody_wrote_is_not_in_it(studio: Studio, run: Run) -> None:
    token = "hf_" + "a1B2" * 8
    drawn = said_everywhere(run, records(studio, run), f"key {token} end")
    assert token not in drawn and "key [token] end" in drawn


# ---- words are words ---------------------------------------------------------------------------------------------


def test_no_word_changes_the_page(studio: Studio, run: Run) -> None:
    told = records(studio, run)
    plain = Skeleton(said_everywhere(run, told, "plain")).tags
    assert len(plain) > 150
    for evil in PAYLOADS:
        assert Skeleton(said_everywhere(run, told, evil)).tags == plain, evil


def test_it_has_no_script_no_link_and_one_policy(studio: Studio, run: Run) -> None:
    drawn = studio.report(run.id).read_text()
    assert drawn.count("Content-Security-Policy") == 1 and "default-src 'none'" in report.POLICY
    seen = Skeleton(drawn)
    assert seen.tags.index(("meta", "http-equiv", "content")) < 5  # before anything that it is to hold for
    names = {name for tag in seen.tags for name in tag}
    assert not names & {"script", "a", "img", "src", "form", "iframe", "onload"} and "http" not in drawn.replace(
        "http-equiv", ""
    )


# ---- in a browser ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "scheme"), [((1280, 900), "light"), ((390, 844), "dark")])
def test_it_opens_offline_from_a_file_in_silence(
    studio: Studio, run: Run, browser: Browser, tmp_path: Path, size: tuple[int, int], scheme: Any
) -> None:
    file = report.write(page(run, Shown(records=records(studio, run), update=FACTORS)), tmp_path / "report.html")
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, offline=True)
    shown = context.new_page()
    asked: list[str] = []
    wrong: list[str] = []
    shown.on("request", lambda request: asked.append(request.url))
    shown.on("console", lambda said: wrong.append(said.text))
    shown.on("pageerror", lambda error: wrong.append(str(error)))
    shown.goto(file.as_uri())
    assert shown.locator("h1").inner_text() == "orders r2" and shown.locator("section").count() >= 6
    assert shown.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    light = shown.evaluate("getComputedStyle(document.body).color").removeprefix("rgb(").split(",")[0]
    assert (int(light) < 128) == (scheme == "light")
    shown.locator("summary").last.press("Enter")
    assert shown.get_by_text("Learning rate", exact=True).is_visible()
    assert asked == [file.as_uri()] and wrong == []
    context.close()


def test_payloads_stay_text_and_the_policy_holds_where_they_do_not(
    studio: Studio, run: Run, browser: Browser, tmp_path: Path
) -> None:
    told = records(studio, run)
    files = [
        report.write(said_everywhere(run, told, evil), tmp_path / f"{number}.html")
        for number, evil in enumerate(PAYLOADS)
    ]
    seen = Watched(browser, f"{tmp_path.as_uri()}/")  # without the policy, so that the words alone must hold
    for file, evil in zip(files, PAYLOADS, strict=True):
        seen.page.goto(file.as_uri())
        assert evil in seen.page.locator("h1").inner_text() or "  " in evil
        assert seen.found == [], evil
    seen.context.close()
    guarded = Watched(browser, f"{tmp_path.as_uri()}/", policy=True)
    guarded.page.goto(files[0].as_uri())
    put_in(guarded.page)
    guarded.page.wait_for_timeout(500)
    assert guarded.found == []
    guarded.context.close()
