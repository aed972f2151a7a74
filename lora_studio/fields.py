"""knob(): default, bounds, label and help of one setting, said once.

The form, the validation, the command line's help and the README table all read the same metadata.
This module does not know what any setting means.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from lora_studio.errors import StudioError, quote


@dataclasses.dataclass(frozen=True)
class Knob:
    """What a control must know about one field of a config dataclass; of a text, `max` is the longest."""

    name: str
    type: type
    default: Any
    label: str
    help: str
    min: float | None = None
    max: float | None = None
    choices: tuple[str, ...] = ()


def knob(
    default: Any,
    *,
    label: str,
    help: str,
    min: float | None = None,
    max: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that carries everything a form needs to know about it."""
    about = {"label": label, "help": help, "min": min, "max": max, "choices": choices}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata={"knob": about})
    return dataclasses.field(default=default, metadata={"knob": about})


@functools.cache  # a list of a thousand runs builds a thousand configs
def _hints(config: type) -> dict[str, Any]:
    return get_type_hints(config)


@functools.cache
def knobs(config: type) -> Mapping[str, Knob]:
    """The knobs of a dataclass by field name, in declaration order."""
    hints = _hints(config)
    return {
        field.name: Knob(name=field.name, type=hints[field.name], default=_default(field), **field.metadata["knob"])
        for field in dataclasses.fields(config)
        if "knob" in field.metadata
    }


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def check(config: Any) -> Any:
    """Return `config` unchanged, or raise E_CONFIG for the first knob that is outside its bounds."""
    for name, setting in knobs(type(config)).items():
        value: Any = getattr(config, name)
        if not _well_typed(value, setting.type):
            raise StudioError("E_CONFIG", f"{setting.label} is {quote(value)}.", f"Give {_wanted(setting)}.")
        if setting.type is str and setting.max is not None:
            if len(value) > setting.max:
                message = f"{setting.label} has {len(value):,} characters: {quote(value, 40)}."
                raise StudioError("E_CONFIG", message, f"Give at most {setting.max:g}.")
            continue
        for one in value.values() if isinstance(value, Mapping) else [value]:
            below = setting.min is not None and one < setting.min
            above = setting.max is not None and one > setting.max
            if below or above or (setting.choices and one not in setting.choices):
                raise StudioError("E_CONFIG", f"{setting.label} is {quote(one)}.", f"Give {_wanted(setting)}.")
    return config


def build(config: type, values: Mapping[str, Any]) -> Any:
    """A checked `config` from plain JSON values; unknown keys and wrong types raise E_CONFIG.

    Lists become tuples and whole numbers become floats where the field is a float.
    """
    hints = _hints(config)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise StudioError("E_CONFIG", f"Unknown setting {quote(unknown[0])}.", f"Known: {', '.join(hints)}.")
    return check(config(**{name: _coerce(value, hints[name]) for name, value in values.items()}))


def _coerce(value: Any, hint: Any) -> Any:
    if type(value) is hint:
        return value
    if isinstance(hint, UnionType) and isinstance(value, Mapping):  # of dataclasses: the first that has these keys
        hint = next((one for one in get_args(hint) if value.keys() <= _hints(one).keys()), get_args(hint)[0])
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(hint, value)  # type: ignore[arg-type]
    if get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        return tuple(value)
    if hint is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if hint is int and type(value) is float and value.is_integer():
        return int(value)
    return value


def _well_typed(value: Any, hint: Any) -> bool:
    if type(value) is hint and hint is not float:
        return True
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        return isinstance(value, tuple) and all(type(part) is item for part in value)
    if get_origin(hint) is Mapping:
        of = get_args(hint)[1]
        return isinstance(value, Mapping) and all(type(key) is str and _well_typed(value[key], of) for key in value)
    if hint is float:
        return type(value) in (int, float) and -math.inf < value < math.inf
    return False


def _wanted(setting: Knob) -> str:
    if setting.choices:
        return f"one of {', '.join(setting.choices)}"
    if get_origin(setting.type) is Mapping:
        return f"names with numbers between {setting.min:g} and {setting.max:g}, such as mlp.down=4"
    if get_origin(setting.type) is tuple:
        return "whole numbers with commas between them" if int in get_args(setting.type) else "names with commas"
    kind = {int: "a whole number", float: "a number", bool: "true or false"}.get(setting.type, "a value")
    if setting.min is not None and setting.max is not None:
        return f"{kind} between {setting.min:g} and {setting.max:g}"
    if setting.min is not None:
        return f"{kind} of at least {setting.min:g}"
    return kind
