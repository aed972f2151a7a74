"""The sandbox: what it lets through, what it stops, and that nothing outside it notices."""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import psutil
import pytest

from lora_studio import sandbox
from lora_studio.errors import StudioError
from lora_studio.limits import GIB, MIB, SPACE
from lora_studio.sandbox import Bounds, Sandbox, once

HERE = "tests.boxed"
SMALL = Bounds(wall_s=20, cpu_s=10, memory=GIB)


def call(name: str, *arguments: object, bounds: Bounds = SMALL, **options: int) -> object:
    return once(f"{HERE}:{name}", *arguments, bounds=bounds, **options)


def group_of(process: int) -> int:
    try:
        return os.getpgid(process) if psutil.Process(process).status() != psutil.STATUS_ZOMBIE else 0
    except (psutil.Error, OSError):
        return 0


def code_of(name: str, *arguments: object, bounds: Bounds = SMALL, **options: int) -> StudioError:
    with pytest.raises(StudioError) as caught:
        call(name, *arguments, bounds=bounds, **options)
    return caught.value


def test_values_and_errors_come_across_as_they_are() -> None:
    values = [1, -0.5, "é漢👩\n", None, True, {"a": [10**30]}, "\ud800", float("inf")]
    assert call("give", *values) == values
    error = code_of("refuse")
    assert (error.code, error.message, error.hint) == ("E_X", "It is wrong.", "Mend it.")


@pytest.mark.parametrize("name", ["fail", "panic"])
def test_what_should_not_happen_is_an_error_and_not_the_end(name: str) -> None:
    with Sandbox() as box:
        with pytest.raises(StudioError) as caught:
            box.call(f"{HERE}:{name}", bounds=SMALL)
        assert caught.value.code == "E_READING" and caught.value.hint
        assert box.call(f"{HERE}:give", 1, bounds=SMALL) == [1]


@pytest.mark.parametrize(
    ("name", "arguments", "bounds", "said"),
    [
        ("forever", (), Bounds(wall_s=60, cpu_s=1), "more than 1 s of work"),
        ("asleep", (), Bounds(wall_s=1, cpu_s=30), "more than 1 s."),
        ("child_and_grandchild", (), Bounds(wall_s=1, cpu_s=30), "more than 1 s."),
        ("fill", (GIB,), Bounds(wall_s=60, cpu_s=30, memory=GIB // 2), "0.5 GiB"),
        ("die", (signal.SIGSEGV,), SMALL, "memory"),
        ("die", (signal.SIGABRT,), SMALL, "memory"),
        ("talk", (MIB,), SMALL, "room"),
    ],
)
def test_a_bound_that_is_broken_is_named_and_ends_the_child_alone(
    name: str, arguments: tuple, bounds: Bounds, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "ANSWER_BYTES", MIB)
    with Sandbox() as box:
        first = box.call(f"{HERE}:give", 1, bounds=SMALL)
        assert box._child
        group = box._child._process.pid
        with pytest.raises(StudioError) as caught:
            box.call(f"{HERE}:{name}", *arguments, bounds=bounds)
        assert caught.value.code == "E_READING_LIMIT" and said in caught.value.message
        assert box.call(f"{HERE}:give", 1, bounds=SMALL) == first == [1]
    assert not [one for one in psutil.process_iter() if group_of(one.pid) == group], "what it started goes on"


def test_an_end_for_no_bound_is_said_to_be_one() -> None:
    assert code_of("leave", 3).code == "E_READING"


def test_bounds_hold_for_one_call_and_not_for_the_child() -> None:
    with Sandbox() as box:
        for _ in range(3):
            assert box.call(f"{HERE}:fill", 200 * MIB, bounds=SMALL) == 200 * MIB
        with pytest.raises(StudioError):
            box.call(f"{HERE}:fill", 200 * MIB, bounds=Bounds(wall_s=9, cpu_s=9, memory=150 * MIB))
        assert box.call(f"{HERE}:fill", 200 * MIB, bounds=SMALL) == 200 * MIB


def test_what_is_loaded_already_may_be_left_out_of_the_count() -> None:
    with Sandbox() as box:
        box.call(f"{HERE}:keep", 300 * MIB, bounds=SMALL)
        for on_top in (True, False):
            bounds = Bounds(wall_s=9, cpu_s=9, memory=200 * MIB, on_top=on_top)
            if on_top:
                assert box.call(f"{HERE}:fill", 100 * MIB, bounds=bounds) == 100 * MIB
            else:
                with pytest.raises(StudioError, match="memory"):
                    box.call(f"{HERE}:fill", 100 * MIB, bounds=bounds)


def test_it_writes_no_larger_file_than_it_may(tmp_path: Path) -> None:
    target = str(tmp_path / "out")
    assert call("write", target, 1000, file_bytes=1000) == 1000
    assert code_of("write", target, 1001, file_bytes=1000).code == "E_READING_LIMIT"
    assert code_of("write", str(tmp_path / "none"), 1).code == "E_READING_LIMIT"


def test_what_the_child_sees_is_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"HF_TOKEN": "hf_canary", "LORA_STUDIO_ROOT": "/x", "SPACE_ID": "a/b", "OAUTH_CLIENT_SECRET": "canary"}
    ways_out = {"HTTPS_PROXY": "http://canary", "https_proxy": "http://canary", "HF_ENDPOINT": "http://canary"}
    for name, value in (secrets | ways_out).items():
        monkeypatch.setenv(name, value)
    seen = call("surroundings")
    environment = seen["environment"]
    assert "canary" not in json.dumps(environment) and not environment.keys() & secrets.keys()
    assert environment["HF_HUB_OFFLINE"] == "1" and environment["HOME"] == seen["where"]
    assert seen["folder"] == [] and not os.path.exists(seen["where"])
    assert seen["input"] == "" and seen["session"]
    assert seen["limits"] == {"CORE": 0, "NOFILE": sandbox.OPEN_FILES, "FSIZE": 0}
    assert sys.platform != "linux" or seen["privileges"] == ["1"]
    assert not {"torch", "transformers", "gradio", "pandas", "numpy"} & {name.split(".")[0] for name in seen["modules"]}
    assert len(seen["arguments"]) == 3 and not [one for one in seen["arguments"] if "canary" in one]
    fetching = once(f"{HERE}:surroundings", bounds=SMALL, network=True)["environment"]
    assert fetching["HF_ENDPOINT"] == "http://canary" and not fetching.keys() & secrets.keys()


def test_calls_of_many_threads_wait_for_each_other() -> None:
    answers = {}
    with Sandbox() as box:

        def ask(number: int) -> None:
            answers[number] = box.call(f"{HERE}:give", number, bounds=SMALL)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == {number: [number] for number in range(8)}


def test_a_child_ends_by_itself_when_nobody_listens_any_more() -> None:
    child = sandbox._Child(0, network=False)
    child._socket.close()  # as when the app is killed
    assert child._process.wait(timeout=20) == 0
    child.end()


def test_bounds_of_reading_are_those_of_the_limits() -> None:
    assert Bounds.of(SPACE) == Bounds(wall_s=60, cpu_s=30, memory=2 * GIB)
