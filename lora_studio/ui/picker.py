"""The matrix picker: which matrices of this very model are adapted, as buttons grouped by what they do.

Its value is {"matrices": [{role, group, shape, layers}], "chosen": [roles]}; an empty one stands for a model that
is not known yet. The script is picker.js.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from lora_studio.core.spec import PRESETS

OWN = "My own"  # the preset's name when the choice is none of PRESETS
ALL = ("all-linear",)
GROUPS = {"attn": "Attention", "mlp": "MLP"}


def build(label: str) -> gr.HTML:
    """The component; it raises `pick` when the person has changed the choice."""
    return gr.HTML(
        {"matrices": [], "chosen": []},
        html_template=f"<div class='picker' role='group' aria-label='{label}'></div>",
        js_on_load=(Path(__file__).parent / "picker.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id="picker",
    )


def describe(targets: Iterable[Any]) -> list[dict[str, Any]]:
    """One entry per role of a model's matrices (core.layout.Target), in forward order."""
    roles: dict[str, dict[str, Any]] = {}
    for target in targets:
        out, width = target.shape
        entry = roles.setdefault(
            target.role,
            {
                "role": target.role,
                "group": GROUPS.get(target.role.split(".")[0], "Other"),
                "shape": f"{out} × {width}",
                "layers": 0,
            },
        )
        entry["layers"] += 1
    return list(roles.values())


def choose(matrices: list[dict[str, Any]], targets: Iterable[str]) -> dict[str, Any]:
    """The picker's value with those roles pressed that this model has."""
    roles = [entry["role"] for entry in matrices]
    wanted = set(targets)
    return {"matrices": matrices, "chosen": [role for role in roles if role in wanted or "all-linear" in wanted]}


def targets(picked: Mapping[str, Any] | None, preset: str) -> tuple[str, ...]:
    """What LoraSpec.targets is to be: the pressed roles, or the preset's while no model is known."""
    roles = _roles(picked)
    if not roles:
        return PRESETS.get(preset, ())
    chosen = {str(role) for role in (picked or {}).get("chosen", [])}
    return ALL if chosen >= set(roles) else tuple(role for role in roles if role in chosen)


def preset(picked: Mapping[str, Any] | None) -> str:
    """The name of the preset that the pressed roles are, or OWN."""
    roles = _roles(picked)
    chosen = set(targets(picked, OWN))
    for name, wanted in PRESETS.items():
        if chosen == set(wanted) or (wanted != ALL and chosen == set(ALL) and set(wanted) == set(roles)):
            return name
    return OWN


def short(chosen: Iterable[str]) -> str:
    """The roles for a run's name: q+v, or all."""
    names = [role.rsplit(".", 1)[-1] for role in chosen]
    return "all" if names == ["all-linear"] else "+".join(names)


def _roles(picked: Mapping[str, Any] | None) -> list[str]:
    return [str(entry["role"]) for entry in (picked or {}).get("matrices", [])]
