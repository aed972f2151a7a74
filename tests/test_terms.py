"""What words mean: said once, and each said somewhere."""

import re
from pathlib import Path

import pytest

from lora_studio.ui import live
from lora_studio.ui.terms import TERMS, term

UI = Path(live.__file__).parent
NAMED = re.compile(r"""data-term=["']([^"'{]+)["']|\bterm\(\\?["']([^"']+?)\\?["']\)""")


def named() -> set[str]:
    """Every word that a source of the page marks."""
    sources = "\n".join(
        file.read_text(encoding="utf-8") for file in UI.glob("*") if file.suffix in (".py", ".html", ".js")
    )
    found = {(one or other).lower() for one, other in NAMED.findall(sources)}
    found |= {label.lower() for label in (*live.TILES.values(), *live.CURVES.values())}
    scores = re.search(r"SCORES = {(.+?)}", sources)
    found |= {label.lower() for label in re.findall(r"'([^']+)'", scores[1] if scores else "")}
    found |= {label.lower() for label in re.findall(r'_tile\("([^"]+)"', sources)}
    return found


def test_every_word_that_is_marked_is_explained_and_the_other_way_round() -> None:
    assert named() == set(TERMS)


def test_a_sentence_is_plain_and_short() -> None:
    for name, says in TERMS.items():
        assert name == name.lower() and says.endswith(".") and "  " not in says and len(says) < 200, name


def test_a_word_is_marked() -> None:
    assert term("Tokens/s") == "<span class='term' tabindex='0' data-term='tokens/s'>Tokens/s</span>"
    with pytest.raises(AssertionError):
        term("unheard of")
