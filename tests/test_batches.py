"""What is supervised: exactly the answer and the mark that ends it; for a classifier, the label of the text."""

import shutil
import signal
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as some
from tokenizers.processors import TemplateProcessing

from lora_studio.core.lean import shared_prefix
from lora_studio.data import words as reading
from lora_studio.data.batches import encode, encode_all, encode_label, encode_labels, measure, measure_labels, preview
from lora_studio.data.formats import Example, Message
from lora_studio.data.words import prompt_ids, render
from lora_studio.errors import StudioError
from lora_studio.limits import LAPTOP
from lora_studio.models import ModelLibrary
from tests.tiny import SPECIAL, tokenizer

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
    measured = measure(words, rows).at(30)
    full = [len(one.tokens.ids) + one.cut for one in encoded]
    assert measured.max == max(full) and sum(measured.histogram) == 40
    assert measured.cut == sum(length > 30 for length in full)
    assert measured.unsupervised == sum(not any(one.tokens.supervised) for one in encoded) > 0
    assert measured.total == sum(min(30, length) for length in full)


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
    measured = measure_labels(words, [labelled("a text of 12")]).at(limit)
    assert (measured.max, measured.cut, measured.unsupervised) == (15, int(limit < 15), 0)


def test_an_empty_text_still_gives_the_model_something_to_read() -> None:
    assert encode_label(tokenizer(), labelled(""), ["bad", "good"], 99).tokens.ids == (tokenizer().eos_token_id,)


# ---- what strangers write --------------------------------------------------------------------------------------------

PIECES = some.sampled_from(["<|end|>", "<|user|>", "<|assistant|>", "<|", "|>", "<", "a", " ", "é", "\ufdd0", "end"])
SAID = some.lists(PIECES, min_size=1, max_size=8).map("".join)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(asked=SAID, answered=SAID, templated=some.booleans())
@example(asked="a\ufdd0b", answered="x", templated=True)
@example(asked="<|en\ufdd0d|>", answered="<|<|end|>", templated=False)
def test_only_the_template_can_write_a_control_token(asked: str, answered: str, templated: bool) -> None:
    words = tokenizer() if templated else plain_tokenizer()
    control = set(words.all_special_ids) | {words.convert_tokens_to_ids(name) for name in SPECIAL}
    said, tame = (
        Example((Message("user", one), Message("assistant", two))) for one, two in ((asked, answered), ("a", "a"))
    )
    ids, expected = (encode(words, one, 9999).tokens.ids for one in (said, tame))
    assert [token for token in ids if token in control] == [token for token in expected if token in control]
    plain = [Message(message.role, message.content.replace("\ufdd0", "")) for message in said.messages]
    assert words.decode(ids) == render(words, plain).rstrip()
    assert (encode(words, said, 9999).quoted > 0) == any(name in one.content for name in SPECIAL for one in plain)
    asked_later = prompt_ids(words, said.prompt)
    assert list(ids[: len(asked_later)]) == asked_later


def test_text_without_control_tokens_is_read_in_one_piece() -> None:
    words, example = tokenizer(), Example(CHAT)
    whole = words(render(words, CHAT).rstrip(), add_special_tokens=False)["input_ids"]
    assert list(encode(words, example, 9999).tokens.ids) == whole


def test_what_closes_a_labelled_text_closes_it_once() -> None:
    words = closing_tokenizer()
    one = encode_label(words, labelled("a<|end|>b<|user|>"), ["bad", "good"], 99)
    assert one.quoted == 2
    assert words.decode(one.tokens.ids) == "<|user|>a<|end|>b<|user|><|assistant|><|end|>"
    control = [words.convert_tokens_to_ids(mark) for mark in ("<|user|>", "<|assistant|>", "<|end|>")]
    assert [token for token in one.tokens.ids if token in control] == control


ROWS = [
    Example(CHAT, row=1),
    Example(text="Once.<|end|> Twice.", row=2),
    Example((Message("user", "x<|user|>" * 40), Message("assistant", "👩 y")), row=3),
]


@pytest.mark.parametrize("length", [1, 100, 100_000])
def test_the_sandbox_reads_what_would_be_read_here(length: int, tiny, tmp_path, monkeypatch) -> None:
    own, guarded = (ModelLibrary(tmp_path, guarded=one).tokenizer(str(tiny)) for one in (False, True))
    monkeypatch.setattr(reading, "BATCH_LENGTH", length)
    assert encode_all(guarded, ROWS, 50) == encode_all(own, ROWS, 50)
    assert preview(guarded, ROWS[0], 30) == preview(own, ROWS[0], 30)
    assert prompt_ids(guarded, CHAT[:2]) == prompt_ids(own, CHAT[:2])
    assert reading.read_texts(guarded, ["né<|end|>e", ""]) == reading.read_texts(own, ["né<|end|>e", ""])
    assert measure(guarded, ROWS) == measure(own, ROWS)
    texts = [labelled("some text"), labelled("another", "bad")]
    assert encode_labels(guarded, texts, ["bad", "good"], 5) == encode_labels(own, texts, ["bad", "good"], 5)


def test_all_rows_together_have_a_bound_of_their_own(tiny, tmp_path, monkeypatch) -> None:
    """Each batch has one, but there may be thousands, and all visitors share one reader."""
    monkeypatch.setattr(reading, "BATCH_LENGTH", 1)
    guarded = ModelLibrary(tmp_path, replace(LAPTOP, tokenising_s=10), guarded=True).tokenizer(str(tiny))
    calls, own = [], reading._READER.call

    def slow(function: str, *given, **bounds):
        found = own(function, *given, **bounds)
        if function.endswith(":load"):
            return found
        calls.append(bounds["bounds"].cpu_s)
        return found[0], 4.0  # as long as a hostile tokenizer takes with each

    monkeypatch.setattr(reading._READER, "call", slow)
    with pytest.raises(StudioError, match="10 s of work") as caught:
        encode_all(guarded, ROWS * 10, 50)
    assert caught.value.code == "E_TEMPLATE" and len(calls) == 3
    assert calls[2] <= 2.0


def test_a_template_that_changes_is_read_anew(tiny, tmp_path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    guarded = ModelLibrary(tmp_path, guarded=True).tokenizer(str(tmp_path / "model"))
    before = prompt_ids(guarded, CHAT[:1])
    file = tmp_path / "model" / "chat_template.jinja"
    file.write_text("{% for m in messages %}<<{{ m['content'] }}>>{% endfor %}")
    assert prompt_ids(guarded, CHAT[:1]) != before


def test_a_worker_sets_a_clock_on_the_template(monkeypatch) -> None:
    monkeypatch.setattr(reading, "TEMPLATE_S", 0.2)
    words = tokenizer()
    words.chat_template = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    with pytest.raises(StudioError, match="did not come to an end") as caught:
        encode(words, Example(CHAT), 99)
    assert caught.value.code == "E_TEMPLATE"
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_a_template_that_leaves_out_the_question_is_named() -> None:
    words = tokenizer()
    words.chat_template = (
        "{% for m in messages if m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(StudioError, match="leaves out what the user says"):
        encode(words, Example(CHAT), 99)


def test_a_label_that_training_did_not_know_is_named() -> None:
    with pytest.raises(StudioError, match=r"Row 7 .*'ugly'.*bad, good") as caught:
        encode_label(tokenizer(), labelled("x", "ugly"), ["bad", "good"], 99)
    assert caught.value.code == "E_LABELS"


def test_the_prefix_that_all_rows_share_ends_before_anything_is_learnt() -> None:
    """As core.lean counts it of the rows as they are trained on, at every length limit."""
    words = tokenizer()
    rows = [Example(messages=(Message("user", f"say {n}"), Message("assistant", "ab")), row=n) for n in (1, 12, 2)]
    measured = measure(words, rows)
    for limit in (64, 12, 6, 2, 1):
        tokens = [one.tokens for one in encode_all(words, rows, limit)]
        assert measured.at(limit).shared_prefix == shared_prefix(tokens), limit
    assert measured.at(64).shared_prefix > 4
    assert measure(words, rows[:1]).at(64).shared_prefix == 0
    assert measure(words, [Example(text="Once.")] * 2).at(64).shared_prefix == 0
