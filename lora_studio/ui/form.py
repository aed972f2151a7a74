"""A knob becomes a control, and the controls' values become a config: the one place for both.

The page has no bounds, labels or defaults of its own; they are said once, in the config dataclasses.
"""

import re
from collections.abc import Mapping
from typing import Any, get_args, get_origin

import gradio as gr

from lora_studio.core.spec import BASELINES, BaselineSpec, LoraSpec, Method
from lora_studio.errors import StudioError, quote
from lora_studio.fields import Knob, build, knobs
from lora_studio.runs.config import method_of
from lora_studio.settings import Sampling, TrainConfig

METHOD = knobs(BaselineSpec)["kind"]  # its choices are the paper's other methods
LORA = tuple(knobs(LoraSpec))
SETTINGS: dict[str, Knob] = {  # their names do not overlap
    **knobs(LoraSpec),
    "width": knobs(BaselineSpec)["width"],
    **knobs(TrainConfig),
}
RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


def control(setting: Knob, *, slide_to: float | None = None, **options: Any) -> Any:
    """The control of one knob; `slide_to` makes a slider of a number, up to there."""
    about: dict[str, Any] = {
        "label": setting.label,
        "info": setting.help,
        "value": setting.default,
        "elem_id": f"set-{setting.name.replace('_', '-')}",
        "min_width": 130,
        **options,
    }
    whole = setting.type is int
    if slide_to is not None:
        return gr.Slider(setting.min or 0, slide_to, step=1 if whole else 0.05, **about)
    if setting.choices:
        return gr.Dropdown(list(setting.choices), **about)
    if get_origin(setting.type) is tuple:
        return gr.Textbox(**{**about, "value": ", ".join(map(str, setting.default)), "placeholder": "all"})
    if get_origin(setting.type) is Mapping:
        return gr.Textbox(**{**about, "value": "", "placeholder": "none"})
    return gr.Number(precision=0 if whole else None, **about)


def problem(setting: Knob, raw: Any) -> str:
    """What is wrong with the value of one control, in words; empty when nothing is."""
    for config in (LoraSpec, BaselineSpec, TrainConfig, Sampling):
        if knobs(config).get(setting.name) == setting:
            try:
                build(config, {setting.name: _plain(setting, raw)})
            except StudioError as error:
                return str(error)
    return ""


def method(raw: Mapping[str, Any], targets: tuple[str, ...], name: str = "lora") -> Method:
    """The method that the controls describe; what does not belong to it is not looked at. Raises E_CONFIG."""
    if name == "lora":
        return method_of(name, lora={**_of(LoraSpec, raw), "targets": targets})
    return method_of(name, raw["width"] if widths(name) else 0)


def widths(name: str) -> str:
    """What the width of a method means; empty for a method without one."""
    return BASELINES[name][1] if name in BASELINES else ""


def training(raw: Mapping[str, Any]) -> TrainConfig:
    """The training that the controls describe. Raises E_CONFIG."""
    return build(TrainConfig, _of(TrainConfig, raw))


def values(method: Method, train: TrainConfig) -> dict[str, Any]:
    """What the controls hold that describe these two, apart from the matrices: `method` and `training` inverted."""
    config: dict[str, Any] = {name: getattr(train, name) for name in knobs(TrainConfig)}
    config |= {name: getattr(method, name) for name in knobs(type(method)) if name in SETTINGS.keys() - {"targets"}}
    return {name: _shown(value) for name, value in config.items()}


def _shown(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={one}" for name, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, tuple) else value


def sampling(raw: Mapping[str, Any]) -> Sampling:
    """How the next token is picked, from the controls. Raises E_CONFIG."""
    return build(Sampling, _of(Sampling, raw))


def _of(config: type, raw: Mapping[str, Any]) -> dict[str, Any]:
    settings = knobs(config)
    wanted = settings.keys() & raw.keys()
    return {name: _plain(settings[name], raw[name]) for name in wanted}


def _plain(setting: Knob, raw: Any) -> Any:
    """The control's value in the knob's own type; an empty number stays None, which `build` refuses in words."""
    if not isinstance(raw, str):
        return raw
    if get_origin(setting.type) is Mapping:
        return dict(_pair(setting, part) for part in filter(str.strip, raw.split(",")))
    return _numbers(setting, raw) if get_origin(setting.type) is tuple else raw


def _pair(setting: Knob, text: str) -> tuple[str, float]:
    """mlp.down=4 as a name and a number."""
    name, _, number = (part.strip() for part in text.rpartition("="))
    try:
        return name, get_args(setting.type)[1](number)
    except ValueError:
        hint = "Write names with numbers, such as mlp.down=4, attn.q=16."
        raise StudioError("E_CONFIG", f"{setting.label} is {quote(text.strip())}.", hint) from None


def _numbers(setting: Knob, text: str) -> tuple[int, ...]:
    """0, 2, 5-7 as numbers."""
    numbers: list[int] = []
    for part in filter(None, re.split(r"[,\s]+", re.sub(r"\s*-\s*", "-", text))):
        found = RANGE.fullmatch(part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if not first <= last < first + 10_000:
            raise StudioError("E_CONFIG", f"{setting.label} is {quote(text)}.", "Write numbers such as 0, 2, 5-7.")
        numbers += range(first, last + 1)
    return tuple(numbers)
