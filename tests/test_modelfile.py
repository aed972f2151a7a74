"""The prompt that a Modelfile's TEMPLATE makes is the one that the tokenizer's own chat template makes."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_studio.data.words import Guarded
from lora_studio.modelfile import modelfile, turns_of
from lora_studio.models import ModelLibrary
from tests.tiny import TEMPLATE, tokenizer

CHATML = (  # with a system turn of its own, as SmolLM2's and Qwen2.5's
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
    "<start>{{ m['role'] }}\n{{ m['content'] }}<end>\n{% endfor %}{% if add_generation_prompt %}<start>{% endif %}"
)
FORGETS = (  # earlier answers are shortened, as by models that reason
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] if m['role'] != 'assistant' else 'said' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BRACES = "{% for m in messages %}{{ '{{' }}{{ m['role'] }}{{ '}}' }}{{ m['content'] }}{% endfor %}"
words = st.text(st.characters(exclude_characters="{}", exclude_categories=("Cs", "Cc")), max_size=12).map(str.strip)
talks = st.tuples(st.booleans(), st.lists(words, min_size=1, max_size=5).filter(lambda said: len(said) % 2 == 1))


def speaking(template: str | None) -> Any:
    made = tokenizer()
    made.bos_token = "<|system|>"  # some token that stands nowhere in these templates
    made.chat_template = template
    return made


def followed(text: str, turns: list[dict[str, str]]) -> str:
    """A conversation as Ollama makes it from a Modelfile: of Go's template language, what stands in ours."""
    template = re.search(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    system = re.search(r'^SYSTEM """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    assert template
    if system and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system[1]}, *turns]
    body, _, behind = template[1].removeprefix("{{ range .Messages }}").rpartition("{{ end }}{{ end }}")
    cases = re.findall(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else if|\Z)', body, re.DOTALL)
    frames = dict(cases)
    return "".join(frames[turn["role"]].replace("{{ .Content }}", turn["content"]) for turn in turns) + behind


@pytest.mark.parametrize("template", [CHATML, LLAMA3, ZEPHYR, TEMPLATE])
def test_following_the_modelfile_gives_the_tokenizers_prompt(template: str) -> None:
    made = speaking(template)
    found = turns_of(made)
    assert found
    text, begun = modelfile(made, found, ["FROM ."]), made.bos_token if template == LLAMA3 else ""  # Ollama puts it

    @given(talks)
    @settings(max_examples=15, deadline=None)
    def check(talk: tuple[bool, list[str]]) -> None:
        told, said = talk
        turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(said)]
        turns = [{"role": "system", "content": "Be kind."}, *turns] if told else turns
        wanted = made.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert found.text([(turn["role"], turn["content"]) for turn in turns]) == wanted
        assert begun + followed(text, turns) == wanted

    check()


@pytest.mark.parametrize("template", [NO_SYSTEM, FORGETS, BRACES])
def test_a_template_that_does_more_is_left_out_and_that_is_said(template: str) -> None:
    made = speaking(template)
    assert turns_of(made) is None
    text = modelfile(made, None, ["FROM ."])
    assert "TEMPLATE is left out" in text and not re.search("^TEMPLATE", text, re.MULTILINE)
    assert 'PARAMETER stop "<|end|>"' in text


def test_a_model_without_a_template_is_spoken_to_as_it_was_trained_here() -> None:
    found = turns_of(speaking(None))
    assert found and found.text([("user", "Hi")]) == "User: Hi\nAssistant:"


def test_a_strangers_template_is_asked_in_the_sandbox(tiny: Path, tmp_path: Path) -> None:
    guarded = ModelLibrary(tmp_path, guarded=True).tokenizer(str(tiny))
    assert isinstance(guarded, Guarded) and turns_of(guarded) == turns_of(tokenizer())
