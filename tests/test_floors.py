"""Installed versions are at least those that fixed the known holes, and what must not be there is not."""

import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "gradio": "6.22",
    "transformers": "5.10",
    "torch": "2.10",
    "huggingface_hub": "2",
    "datasets": "4",
    "python-multipart": "0.0.27",
    "starlette": "1.0.1",
    "Jinja2": "3.1.6",
    "pyarrow": "14.0.1",
    "safetensors": "0.4",
}


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


def plain(name: str) -> str:
    """Package names as the index compares them."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("package", FLOORS)
def test_the_installed_version_is_not_below_the_floor_and_the_requirements_say_so(package: str) -> None:
    assert version(importlib.metadata.version(package)) >= version(FLOORS[package])
    line = re.search(rf"^{package}>=([\d.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert line and version(line[1]) >= version(FLOORS[package])


def test_packages_that_would_load_foreign_kernels_are_absent() -> None:
    assert not [name for name in ("kernels", "flash_attn") if importlib.util.find_spec(name)]


def test_every_pin_satisfies_the_ranges() -> None:
    lines = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pins = {plain(name): pin for name, pin in lines}
    for name, floor in re.findall(r"^([\w.-]+)>=([\d.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE):
        assert version(pins[plain(name)]) >= version(floor)
    assert pins["torch"] == "2.13.0"
