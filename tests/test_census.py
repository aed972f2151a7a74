"""Every function that the network can reach, called by everybody: whose work it shows and changes.

What Gradio can call is listed in POLICY; a function that is not fails the test. Routes are tests/test_door.py's.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from gradio.components import Component

from lora_studio import blind
from lora_studio.data.formats import Message
from lora_studio.limits import LAPTOP
from lora_studio.owners import home, owner_name
from lora_studio.runs.config import DataChoice
from lora_studio.studio import Studio
from lora_studio.ui import form, live
from lora_studio.ui.build import build
from tests.visits import ANN, BOB, ReadyDesk, asking, came, rows, trained

OWN, BRING, OPEN, PLAIN = "somebody's work", "new work for the caller", "the same for all", "only what it is given"
POLICY = {
    "adapter_upload.adopt": BRING,
    "answering.begun": PLAIN,
    "answering.list_several": OWN,
    "answering.list_sides": OWN,
    "answering.settled": PLAIN,
    "answering.show_source": PLAIN,
    "api.add_dataset": BRING,
    "api.compare": OWN,
    "api.compare_runs": OWN,
    "api.describe_dataset": OWN,
    "api.evaluate": OWN,
    "api.export": OWN,
    "api.fetch_dataset": BRING,
    "api.list_datasets": OWN,
    "api.list_runs": OWN,
    "api.plan": OWN,
    "api.run_events": OWN,
    "api.run_status": OWN,
    "api.start_run": OWN,
    "api.stop_run": OWN,
    "blind.download": OWN,
    "blind.resume": OWN,
    "blind.reveal": OWN,
    "blind.start": OWN,
    "blind.vote": OWN,
    "build._cell_to_compare": OWN,
    "build._cell_to_export": OWN,
    "build._cell_to_inside": OWN,
    "build._cell_to_run": PLAIN,
    "build._form_of": OWN,
    "build._to_compare": OWN,
    "build._to_example": BRING,
    "build._to_export": OWN,
    "build._to_form": OWN,
    "build._to_study": PLAIN,
    "build._to_training": PLAIN,
    "build._used": OWN,
    "build.cure": PLAIN,
    "build.restore": OWN,
    "chat.forget": PLAIN,
    "chat.say": OWN,
    "compare_tab.clear": PLAIN,
    "compare_tab.compare": OWN,
    "compare_tab.compare_strengths": OWN,
    "compare_tab.forget": PLAIN,
    "compare_tab.keep_answer": OWN,
    "compare_tab.list_others": OWN,
    "compare_tab.list_prompts": OWN,
    "compare_tab.list_runs": OWN,
    "compare_tab.look_at_tokens": OWN,
    "compare_tab.measure": OWN,
    "compare_tab.own_prompt": PLAIN,
    "compare_tab.settle": PLAIN,
    "compare_tab.stop": PLAIN,
    "compare_tab.take_prompt": PLAIN,
    "compare_tab.wait": PLAIN,
    "data_tab.change_columns": OWN,
    "data_tab.change_format": OWN,
    "data_tab.inspect": OWN,
    "data_tab.open_file": BRING,
    "data_tab.open_hub": BRING,
    "data_tab.open_sample": BRING,
    "data_tab.open_text": BRING,
    "data_tab.open_used": OWN,
    "data_tab.reading": PLAIN,
    "data_tab.show_row": OWN,
    "data_tab.try_limit": OWN,
    "data_tab.turn": OWN,
    "data_tab.use_limit": PLAIN,
    "export_tab.describe": OWN,
    "export_tab.forget": PLAIN,
    "export_tab.forget_all": PLAIN,
    "export_tab.pack": OWN,
    "export_tab.push": OWN,
    "header.status": OPEN,
    "inside_tab.close": PLAIN,
    "inside_tab.forget": PLAIN,
    "inside_tab.list_others": OWN,
    "inside_tab.look": OWN,
    "inside_tab.measure": OWN,
    "inside_tab.pack_smaller": OWN,
    "inside_tab.read_dial": PLAIN,
    "inside_tab.show_matrix": OWN,
    "live.another": OWN,
    "live.delete": OWN,
    "live.discard": OWN,
    "live.pause": OWN,
    "live.poll": OWN,
    "live.restart": OWN,
    "live.restore": OWN,
    "live.resume": OWN,
    "live.share": OWN,
    "live.stop": OWN,
    "prompt_set.answer": OWN,
    "prompt_set.download": BRING,
    "prompt_set.open_file": BRING,
    "prompt_set.show_source": PLAIN,
    "report_card.hand_out": OWN,
    "runs_tab.delete": OWN,
    "runs_tab.describe": OWN,
    "runs_tab.poll": OWN,
    "runs_tab.restore": OWN,
    "runs_tab.table": OWN,
    "study_tab.cost": OWN,
    "study_tab.drop": OWN,
    "study_tab.poll": OWN,
    "study_tab.resume": OWN,
    "study_tab.start": OWN,
    "train_tab.cost": OWN,
    "train_tab.label_models": OPEN,
    "train_tab.name_preset": PLAIN,
    "train_tab.press_preset": PLAIN,
    "train_tab.settle_rate": OPEN,
    "train_tab.settle_task": OWN,
    "train_tab.show_matrices": OPEN,
    "train_tab.show_method": PLAIN,
    "train_tab.start": OWN,
}
# these take no id, so their answer is compared with that of one who has nothing
SAME_FOR_OWNER = {"api.list_datasets", "api.list_runs", "build._used", "blind.resume"}
ALONE = {"api.list_datasets", "build._used", "live.restart", "live.delete", "live.discard", "runs_tab.delete"}
ALONE |= {"blind.download", "blind.resume", "blind.reveal", "blind.vote"}
# say only whether rows have labels, and hers have none; whether a row is the one that was sent, and it is not
SILENT = {"train_tab.settle_task", "compare_tab.keep_answer"}
SECRET = "sesame-7f3a"  # in Ann's rows, names, answers and log
DEFAULTS = {name: setting.default for name, setting in form.SETTINGS.items() if name != "targets"}
# what changes a run, at the end and in this order
LAST = ("live.restart", "live.stop", "live.share", "live.delete", "live.restore", "runs_tab.delete", "runs_tab.restore")
LAST += ("live.discard",)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReadyDesk]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_STUDIO_OPERATORS", "the-operator")
        desk = ReadyDesk(Studio(tmp_path_factory.mktemp("root"), LAPTOP), visitors=True)
        patch.setattr(desk._studio.supervisor, "tick", lambda: False)  # queued is enough
        yield desk


@pytest.fixture(scope="module")
def reachable(desk: ReadyDesk) -> dict[str, list[Callable]]:
    """By name, every function that an event, a program or a script of the page can call."""
    page = build(desk)
    found: dict[str, list[Callable]] = {}
    called = [fn.fn for fn in page.fns.values() if fn.fn]
    for each in (*called, *(fn for block in page.blocks.values() for fn in getattr(block, "server_fns", []))):
        found.setdefault(f"{each.__module__.rpartition('.')[2]}.{each.__name__}", []).append(each)
    return found


@pytest.fixture(scope="module")
def hers(desk: ReadyDesk, tiny: Path) -> dict[str, Any]:
    """What Ann has: rows and two runs of one study."""
    studio = desk._studio.of(owner_name("visitor", ANN))
    kept = studio.data.add_text(rows(SECRET), SECRET)
    choice, study = DataChoice(id=kept.id, name=SECRET), "5" * 32
    runs = [trained(studio, tiny, choice, SECRET, words=SECRET, warning=SECRET, study=study) for _ in range(2)]
    trial = blind.new(("base", runs[0].id), ("base", SECRET), [(Message("user", SECRET),)] * 4)
    trial = blind.answered(trial, dict.fromkeys(range(4), (SECRET, SECRET * 2)))
    studio.ballots.add(blind.voted(trial, 0, "a"))
    return {
        "trial": trial.id,
        "dataset": kept.id,
        "run": runs[0].id,
        "other": runs[1].id,
        "study": study,
        "home": home(studio.root, studio.owner),
    }


class Event:
    """As an event of the study's table, of a chip, or of a blind test comes to a handler."""

    def __init__(self, run: str, trial: str) -> None:
        self.run, self.study, self.prompt, self.target_text = run, run, "p", "t"
        self.place, self.before = 0, 0
        self.trial, self.number, self.vote, self.change = trial, 1, "a", {"steps": 3}


def values(tiny: Path, at: Any, ids: dict[str, Any], request: Any) -> dict[str, Any]:
    """What a caller may send for each name of a parameter."""
    choice = {"id": ids["dataset"], "name": "mine", "format": "", "columns": {}}
    ask = {"run": ids["run"], "start": 0, "list": True, "log": True, "study": ids["study"], "seen": {}, "on": True}
    ask |= {"runs": [ids["run"]], "chosen": [ids["run"]]}
    picked = {"matrices": [{"role": "attn.q"}], "chosen": ["attn.q"]}
    at.parent.mkdir(exist_ok=True)
    at.write_text("a,b\n1,2\n")
    return {
        "request": request,
        "ask": {**ask, "code": "W_FLAT"},
        "_": None,
        "choice": choice,
        "shown": "",
        "dataset": ids["dataset"],
        "id": ids["dataset"],
        "run": ids["run"],
        "chosen": ids["run"],
        "live": ids["run"],
        "followed": "",
        "other": ids["other"],
        "others": [ids["other"]],
        "runs": [ids["run"], ids["other"]],
        "event": Event(ids["run"], ids["trial"]),
        "model": str(tiny),
        "text": "a,b\n1,2\n",
        "path": str(at),
        "files": [str(at)],
        "repo": "no hub id",
        "name": "n",
        "format": "prompt_completion",
        "row": 1,
        "limit": 64,
        "max_length": 64,
        "holdout": 0.1,
        "seed": 0,
        "task": "causal",
        "current": "causal",
        "forced": False,
        "method": "lora",
        "width": 0,
        "preset": "My own",
        "picked": picked,
        "ranks": "1",
        "rate": 0.005,
        "ours": 0.005,
        "matrices": ["Attention q"],
        "rates": "",
        "prompt": "hello",
        "mode": "Greedy",
        "strength": 1.0,
        "max_new_tokens": 2,
        "matrix": "attn.q · layer 0",
        "which": "The whole update",
        "rank": 1,
        "told": {},
        "targets": "attn.q",
        "steps": 3,
        "batch_size": 2,
        "learning_rate": 0.01,
        "first": "base",
        "second": ids["run"],
        "source": "Typed",
        "count": 2,
        "typed": "p",
        "uploaded": [],
        "said": "p",
        "turns": [],
        "temperature": 0.0,
        "kind": "csv",
        "answers": None,
        "dtype": "float32",
        "merged": False,
        "start": 0,
        "what": "The adapter",
        "private": True,
        "token": "",
        "account": None,
    }


def called(function: Callable, sent: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call, by the names of the parameters; what has no value in `values` is a KeyError."""
    positional: list[Any] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional += ["question", "answer"]
        elif parameter.kind is parameter.VAR_KEYWORD:
            more = {**DEFAULTS, "steps": 3, "max_new_tokens": 2, "temperature": 1.0, "top_p": 1.0, "seed": 0}
            return positional, more
        else:
            positional.append(sent[parameter.name])
    return positional, {}


def plain(answer: Any) -> Any:
    if isinstance(answer, Component):
        return plain(answer._constructor_args[0])
    if isinstance(answer, gr.blocks.Block):
        return plain(
            answer._constructor_args[0] if getattr(answer, "_constructor_args", None) else type(answer).__name__
        )
    if isinstance(answer, dict):
        return {str(key): plain(value) for key, value in answer.items()}
    return [plain(one) for one in answer] if isinstance(answer, list | tuple) else answer


def answer(function: Callable, ids: dict[str, Any], who: dict[str, Any], model: Path, folder: Path) -> str:
    """What a caller gets, as text in which the ids that were sent cannot be told from others."""
    request = came(**who, query=f"run={ids['run']}")
    sent = values(model, folder / "cache" / "sent.csv", ids, asking(request))
    given, more = called(function, sent)
    try:
        said = function(*given, **more)
        said = list(said) if inspect.isgenerator(said) else said
    except gr.Error as error:
        said = f"error: {error}"
    text = json.dumps(plain(said), default=str)
    for name in ("dataset", "run", "other", "study", "trial"):
        text = text.replace(ids[name], name.upper()).replace(ids[name][:8], name)
    return text


def everything(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "worker.lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


MISSING = {"trial": "4" * 32, "dataset": "0" * 32, "run": "1" * 32, "other": "2" * 32, "study": "3" * 32}


def test_every_function_that_can_be_called_has_a_policy(reachable: dict[str, list[Callable]]) -> None:
    assert sorted(reachable) == sorted(POLICY)
    for name, functions in reachable.items():
        takes_a_desk = all("request" in inspect.signature(each).parameters for each in functions)
        assert takes_a_desk == (POLICY[name] is not PLAIN), name


def test_nobody_sees_or_changes_what_is_anothers(
    desk: ReadyDesk, reachable: dict[str, list[Callable]], hers: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    before = everything(hers["home"]), everything(desk._studio.runs.folder / hers["run"])
    callers: dict[str, dict[str, Any]] = {
        "other": {"secret": BOB},
        "a program": {"header": "c3" * 16},
        "an account": {"account": "carl"},
        "an account that is nobody's any more": {"secret": BOB, "account": "dora", "expires": -60},
        "no operator without an account": {"secret": BOB, "name": "the-operator"},
        "nobody": {},
        "a forged secret": {"secret": "../../etc/passwd"},
    }
    calls = 0
    for name, functions in sorted(reachable.items()):
        for function in functions:
            for caller, who in callers.items():
                got, missing = (answer(function, ids, who, tiny, tmp_path) for ids in (hers, MISSING))
                calls += 1
                assert got == missing, (name, caller)
                assert SECRET not in got and "E_UNEXPECTED" not in got, (name, caller, got)
                if caller in ("nobody", "a forged secret") and POLICY[name] is BRING:
                    assert "E_VISITOR" in got, (name, caller)
    assert before == (everything(hers["home"]), everything(desk._studio.runs.folder / hers["run"]))
    assert calls > 400


def test_who_owns_it_and_the_operator_get_an_answer(
    desk: ReadyDesk,
    reachable: dict[str, list[Callable]],
    hers: dict[str, Any],
    tiny: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    operator = {"account": "someone", "name": "the-operator"}
    about_rows = {"choice", "dataset", "id"}
    own = [name for name in reachable if POLICY[name] is OWN]
    for name in sorted(own, key=lambda name: (LAST.index(name) + 1 if name in LAST else 0, name)):
        for function in reachable[name]:
            for caller in (operator, {"secret": ANN}):
                parameters = inspect.signature(function).parameters
                rows_alone = about_rows & parameters.keys() or name in ALONE
                if caller is operator and rows_alone:
                    continue  # an operator sees runs and what they were trained on, but opens nobody's rows or votes
                got, missing = (answer(function, ids, caller, tiny, tmp_path) for ids in (hers, MISSING))
                assert "E_UNEXPECTED" not in got and "E_VISITOR" not in got, (name, got)
                if name in SAME_FOR_OWNER:
                    missing = answer(function, hers, {"secret": BOB}, tiny, tmp_path)
                assert got != missing or name in SILENT, (name, caller is operator, got)
    assert "operator the-operator: stop" in caplog.text and ANN not in caplog.text


def test_a_shared_run_shows_figures_and_settings_and_nothing_else(desk: ReadyDesk, tiny: Path) -> None:
    hers = desk._studio.of(owner_name("visitor", ANN))
    kept = hers.data.add_text(rows(SECRET), SECRET)
    run = trained(hers, tiny, DataChoice(id=kept.id, name=SECRET), SECRET, words=SECRET, warning=SECRET)
    his = desk.of(asking(came(BOB))).studio
    ask = {"run": run.id, "start": 0, "list": True, "log": True}
    assert live.answer(his, ask)["state"] == "missing"
    hers.share(run.id)
    seen = live.answer(his, ask)
    assert seen["state"] == "done" and seen["train"][0] == [1, 2, 3, 4] and seen["own"] is False and seen["runs"] == []
    assert seen["about"]["line"] == "tiny · rank 2 on q+v · learning rate 0.005 · batch 8 · seed 0"
    assert seen["summary"] == {"base_loss": 2.0, "best_loss": 1.0, "best_step": 4, "seconds": 3.0}
    assert SECRET not in json.dumps(seen) and kept.id not in json.dumps(seen)
    assert not {"log", "error"} & {name for name, value in seen.items() if value}
    for act in (live.stop_run, live.delete_run, live.share_run, live.restart_run):
        assert "There is no" in act(his, {**ask, "code": "W_FLAT"})["problem"]
    assert live.shown_at_first(his, [], run.id) == run.id
    hers.share(run.id, False)
    assert live.answer(his, ask)["state"] == "missing" and live.shown_at_first(his, [], run.id) == ""


def test_a_handler_never_holds_the_desk_of_everybody(desk: ReadyDesk) -> None:
    with pytest.raises(AssertionError, match="everybody"):
        _ = desk.studio
    assert desk.of(asking(came(ANN))).studio.owner == owner_name("visitor", ANN)
    laptop = ReadyDesk(desk._studio)
    assert laptop.of(None) is laptop and laptop.studio is desk._studio


def test_a_pages_name_is_no_identity(desk: ReadyDesk) -> None:
    assert desk.of(asking(came(ANN), "page-1")).studio.owner == owner_name("visitor", ANN)
    stolen = desk.of(asking(came(BOB), "page-1"))
    with pytest.raises(Exception, match="opened in another browser"):
        _ = stolen.studio
    assert desk.of(asking(came(ANN, account="carl"), "page-1")).studio.owner == owner_name(
        "account", "carl"
    )  # signed in
