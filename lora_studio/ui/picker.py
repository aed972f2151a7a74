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
EMBED = "embed"  # the input embedding: no linear layer, so no preset has it
GROUPS = {"attn": "Attention", "mlp": "MLP", EMBED: "Tokens"}


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
    wanted = set(targets)
    linear = set(_linear(matrices)) if wanted & {*ALL} else set()
    return {"matrices": matrices, "chosen": [entry["role"] for entry in matrices if entry["role"] in wanted | linear]}


def targets(picked: Mapping[str, Any] | None, preset: str) -> tuple[str, ...]:
    """What LoraSpec.targets is to be: the pressed roles, or the preset's while no model is known."""
    matrices = list((picked or {}).get("matrices", []))
    if not matrices:
        return PRESETS.get(preset, ())
    chosen = {str(role) for role in (picked or {}).get("chosen", [])}
    linear = _linear(matrices)
    embedding = (EMBED,) if EMBED in chosen else ()
    return embedding + (ALL if chosen >= set(linear) else tuple(role for role in linear if role in chosen))


def preset(picked: Mapping[str, Any] | None) -> str:
    """The name of the preset that the pressed roles are, or OWN."""
    chosen = set(targets(picked, OWN))
    linear = set(_linear((picked or {}).get("matrices", [])))
    for name, wanted in PRESETS.items():
        if chosen == set(wanted) or (wanted != ALL and chosen == set(ALL) and set(wanted) == linear):
            return name
    return OWN


def _linear(matrices: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every role but the embedding's, as all-linear means it."""
    return [str(entry["role"]) for entry in matrices if entry["role"] != EMBED]
