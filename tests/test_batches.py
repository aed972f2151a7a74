"""What is supervised: exactly the answer and the mark that ends it; for a classifier, the label of the text."""

import pytest
from tokenizers.processors import TemplateProcessing

from lora_studio.data.batches import encode, encode_label, lengths, preview, prompt_ids, render
from lora_studio.data.formats import Example, Message
from lora_studio.errors import StudioError
from tests.tiny import tokenizer

CHAT = (
    Message("system", "Be brief."),
    Message("user", "2 + 2?"),
    Message("assistant", "4 "),
    Message("user", "née?\n\nno"),
    Message("assistant", "Ünï 🎛"),
)


def supervised_text(example: Example, words=None, limit: int = 10_000) -> str:
    words = words or tokenizer()
    tokens = encode(words, example, limit).tokens
    kept = [token for token, mark in zip(tokens.ids, tokens.supervised, strict=True) if mark]
    return words.decode(kept, skip_special_tokens=False)


def plain_tokenizer():
    words = tokenizer()
    words.chat_template = None
    return words


def test_every_assistant_turn_and_its_end_are_supervised_and_nothing_else() -> None:
    assert supervised_text(Example(messages=CHAT)) == "4 <|end|>Ünï 🎛<|end|>"


def test_a_model_without_a_template_gets_the_plain_one() -> None:
    assert supervised_text(Example(messages=CHAT), plain_tokenizer()) == " 4 <|end|> Ünï 🎛<|end|>"
    assert render(plain_tokenizer(), CHAT[:2], reply=True) == "System: Be brief.\nUser: 2 + 2?\nAssistant:"


def test_plain_text_is_supervised_whole_with_an_end() -> None:
    assert supervised_text(Example(text="Once.")) == "Once.<|end|>"


@pytest.mark.parametrize("words", [tokenizer(), plain_tokenizer()], ids=["template", "plain"])
def test_the_prompt_asked_later_is_what_training_put_before_the_answer(words) -> None:
    example = Example(messages=CHAT)
    ids = prompt_ids(words, example.prompt)
    encoded = encode(words, example, 10_000).tokens
    assert list(encoded.ids[: len(ids)]) == ids
    assert encoded.supervised[len(ids)] and not encoded.supervised[len(ids) - 1]


def test_the_preview_is_the_rendered_text_in_pieces_and_says_what_is_cut() -> None:
    words, example = tokenizer(), Example(messages=CHAT[:3])
    pieces = preview(words, example, 10_000)
    assert "".join(piece.text for piece in pieces) == render(words, example.messages).rstrip()
    trained = "".join(piece.text for piece in pieces if piece.kind == "trained")
    assert trained == "4 <|end|>"
    cut = preview(words, example, 5)
    assert [piece.kind for piece in cut].index("cut") == 5 and encode(words, example, 5).cut == len(pieces) - 5


def test_length_statistics_agree_with_the_rows() -> None:
    words = tokenizer()
    rows = [Example(messages=(Message("user", "q" * count), Message("assistant", "a"))) for count in range(1, 41)]
    encoded = [encode(words, row, 30) for row in rows]
    measured = lengths(encoded)
    full = [len(one.tokens.ids) + one.cut for one in encoded]
    assert measured.max == max(full) and sum(measured.histogram) == 40
    assert measured.cut == sum(length > 30 for length in full)
    assert measured.unsupervised == sum(not any(one.tokens.supervised) for one in encoded) > 0
    assert measured.total == sum(min(30, length) for length in full)


def test_when_nothing_is_left_to_learn_it_is_said() -> None:
    with pytest.raises(StudioError) as caught:
        lengths([encode(tokenizer(), Example(messages=CHAT[:3]), 8)])
    assert caught.value.code == "E_NO_TARGET"


def test_a_template_that_refuses_is_named() -> None:
    words = tokenizer()
    words.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(StudioError, match="no system role") as caught:
        encode(words, Example(messages=CHAT), 99)
    assert caught.value.code == "E_TEMPLATE"


def labelled(text: str, label: str = "good") -> Example:
    return Example(messages=(Message("user", text), Message("assistant", label)), row=7)


def closing_tokenizer():
    """Like an encoder's: something before a text, and two special tokens that close it."""
    words = tokenizer()
    marks = [(mark, words.convert_tokens_to_ids(mark)) for mark in ("<|user|>", "<|assistant|>", "<|end|>")]
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A <|assistant|> <|end|>", special_tokens=marks
    )
    return words


def test_a_classifier_reads_the_text_alone_as_its_tokenizer_writes_it() -> None:
    words = closing_tokenizer()
    one = encode_label(words, labelled("née?"), ["bad", "good"], 99)
    assert list(one.tokens.ids) == words("née?")["input_ids"] and one.cut == 0
    assert words.decode(one.tokens.ids) == "<|user|>née?<|assistant|><|end|>"
    assert one.tokens.label == 1 and one.tokens.count == 1 and not any(one.tokens.supervised)
    assert encode_label(words, labelled("x", " bad\n"), ["bad", "good"], 99).tokens.label == 0


@pytest.mark.parametrize("limit", [8, 9, 12, 14, 15, 16, 99])
def test_a_long_text_is_cut_inside_and_keeps_what_closes_it(limit: int) -> None:
    words = closing_tokenizer()
    one = encode_label(words, labelled("a text of 12"), ["bad", "good"], limit)
    assert len(one.tokens.ids) == min(limit, 15) and one.cut == 15 - len(one.tokens.ids)
    text = words.decode(one.tokens.ids)
    assert text == f"<|user|>{'a text of 12'[: limit - 3]}<|assistant|><|end|>"
    measured = lengths([one])
    assert (measured.max, measured.cut, measured.unsupervised) == (15, int(limit < 15), 0)


def test_an_empty_text_still_gives_the_model_something_to_read() -> None:
    assert encode_label(tokenizer(), labelled(""), ["bad", "good"], 99).tokens.ids == (tokenizer().eos_token_id,)


def test_a_label_that_training_did_not_know_is_named() -> None:
    with pytest.raises(StudioError, match=r"Row 7 .*'ugly'.*bad, good") as caught:
        encode_label(tokenizer(), labelled("x", "ugly"), ["bad", "good"], 99)
    assert caught.value.code == "E_LABELS"
