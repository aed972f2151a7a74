"""Layers go downward only, and a few calls are never made."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lora_studio"
# Each row may import the rows above it, and the lines above it in its own row.
HOUSE = [
    ["errors", "fields", "events", "hub", "limits", "owners"],
    ["core.spec", "core.layout", "core.slot", "core.lora"],
    ["core.baselines", "core.analysis", "core.merge", "core.functions", "core.lean"],
    ["settings"],
    ["data.readers", "data.formats", "data.library", "data.batches"],
    [
        "models",
        "peft_format",
        "adapters",
        "generate",
        "measure",
        "step",
        "train",
        "doctor",
        "estimate",
        "evaluate",
        "inside",
        "charts",
    ],
    [
        "runs.config",
        "study",
        "export",
        "runs.checkpoints",
        "runs.store",
        "runs.executors",
        "runs.supervisor",
        "runs.attempt",
        "runs.spare",
        "runs.worker",
    ],
    ["studio"],
    ["cli", "ui"],
]
ORDER = {name: (row, place) for row, names in enumerate(HOUSE) for place, name in enumerate(names)}
FILES = sorted(PACKAGE.rglob("*.py"))


def house_name(module: str) -> str:
    """lora_studio.ui.live -> ui, lora_studio.core.lora -> core.lora"""
    name = module.removeprefix("lora_studio").lstrip(".")
    return "ui" if name.split(".")[0] == "ui" else name


def imports(path: Path) -> list[str]:
    """Every lora_studio module that a file imports, at its top or inside a function."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
    known = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in FILES}
    return [name for name in found if name in known]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_above(path: Path) -> None:
    name = house_name(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
    if path.name in ("__init__.py", "__main__.py"):
        return
    assert name in ORDER, f"{name} has no place in the house"
    for imported in map(house_name, imports(path)):
        below = ORDER[imported] > ORDER[name] and imported != name
        assert not below, f"{name} imports {imported}, which stands below it"


def test_the_core_knows_tensors_only() -> None:
    allowed = {
        "torch",
        "transformers",
        "lora_studio",
        "math",
        "functools",
        "itertools",
        "weakref",
        "difflib",
        "collections",
        "contextlib",
        "dataclasses",
        "typing",
    }
    for path in (PACKAGE / "core").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, path


BANNED = {
    "pickle": r"\bpickle\b\.|import pickle",
    "torch.load": r"torch\.load\(",
    "a shell": r"shell\s*=\s*True|os\.system\(",
    "remote code": r"trust_remote_code\s*=\s*True",
    "eval or exec": r"(?<![\w.])(eval|exec)\(",
    "html tables": r"datatype\s*=\s*[\"']html",
    "peft, trl, accelerate": r"^\s*(import|from) (peft|trl|accelerate)\b",
    "archives unpacked": r"extractall|unpack_archive",
}


@pytest.mark.parametrize("what", BANNED)
def test_calls_this_project_does_not_make(what: str) -> None:
    for path in [*FILES, PACKAGE.parent / "app.py"]:
        assert not re.search(BANNED[what], path.read_text(), re.MULTILINE), f"{path.name}: {what}"
