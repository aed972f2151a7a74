"""Formats: which columns mean what, and how one row becomes an Example."""

import json

import pytest

from lora_studio.data.formats import FORMATS, MOST_LABELS, Example, Message, columns_for, convert, guess, labels_of
from lora_studio.data.readers import Table
from lora_studio.errors import StudioError


def table(*rows: dict) -> Table:
    return Table(kind="jsonl", columns=tuple(rows[0]), rows=rows, warnings=())


def example(*rows: dict, format: str = "", **columns: str) -> Example:
    """The only example of the rows, by the guess unless a format is given."""
    name, found = (format, columns) if format else guess(table(*rows))
    (only,), _ = convert(table(*rows), name, found)
    return only


def code_of(rows: list[dict], format: str, **columns: str) -> str:
    return error_of(rows, format, **columns).code


def error_of(rows: list[dict], format: str, **columns: str) -> StudioError:
    with pytest.raises(StudioError) as caught:
        convert(table(*rows), format, columns)
    assert caught.value.hint
    assert len(str(caught.value)) <= 300
    return caught.value


def chat(*turns: tuple[str, str], role: str = "role", content: str = "content") -> list[dict]:
    return [{role: who, content: what} for who, what in turns]


HELLO = (("user", "Hello"), ("assistant", "Hi"))


@pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))
def test_a_table_with_the_usual_names_is_guessed_as_its_format(format):
    def cell(role: str):
        return chat(*HELLO) if role == "messages" else f"some {role}"

    for place in range(max(len(format.names[role]) for role in format.roles)):
        names = {role: format.names[role][min(place, len(format.names[role]) - 1)] for role in format.roles}
        row = {names[role].upper(): cell(role) for role in format.roles}
        name, columns = guess(table(row))
        assert name == format.name
        assert columns == {role: names[role].upper() for role in format.roles}
        assert len(convert(table(row), name, columns)[0]) == 1


def test_every_guess_can_be_converted():
    cells = {"messages": "not a chat", "prompt": "x", "text": "y", "label": 3, "id": "a", "extra": "z", "n": 0.5}
    names = list(cells)
    for mask in range(1, 2 ** len(names)):
        chosen = [name for bit, name in enumerate(names) if mask >> bit & 1]
        rows = table({name: cells[name] for name in chosen})
        name, columns = guess(rows)
        assert len(convert(rows, name, columns)[0]) == 1, chosen


def test_unknown_names_are_prompt_and_completion_in_file_order_and_one_column_is_text():
    assert guess(table({"foo": "x", "bar": "y"})) == ("prompt_completion", {"prompt": "foo", "completion": "bar"})
    assert guess(table({"bar": "y", "foo": "x"})) == ("prompt_completion", {"prompt": "bar", "completion": "foo"})
    assert guess(table({"foo": "x"})) == ("text", {"text": "foo"})
    assert guess(table({"id": "1", "foo": "x"})) == ("text", {"text": "foo"})
    assert guess(table({"id": "1", "topic": "x", "foo": "y", "answer": "z"}))[1]["completion"] == "answer"


def test_the_same_conversation_is_the_same_example_in_every_spelling():
    turns = (("system", "Be brief"), *HELLO)
    spoken = (("system", "Be brief"), ("human", "Hello"), ("gpt", "Hi"))
    blocks = [{"role": who, "content": [{"type": "text", "text": what}]} for who, what in turns]
    rows = [
        {"messages": chat(*turns)},
        {"messages": json.dumps(chat(*turns))},
        {"messages": blocks},
        {"conversations": chat(*spoken, role="from", content="value")},
        {"conversations": chat(*spoken[1:], role="from", content="value"), "system": "Be brief"},
        {"messages": chat(*turns, ("user", "unanswered"))},
        {"prompt": "Hello", "completion": "Hi", "system": "Be brief"},
        {"instruction": "Hello", "input": "", "output": "Hi", "system": "Be brief"},
    ]
    expected = Example(tuple(Message(*turn) for turn in turns), row=1)
    assert [example(row) for row in rows] == [expected] * len(rows)


def test_prompt_and_target_are_the_messages_before_the_answer_and_the_answer():
    turns = (*HELLO, ("user", "And?"), ("assistant", "Bye"))
    only = example({"messages": chat(*turns)})
    assert (*only.prompt, Message("assistant", only.target)) == only.messages
    assert only.target == "Bye"
    plain = example({"text": "just this"})
    assert (plain.prompt, plain.target, plain.text) == ((), "", "just this")


def test_an_instruction_with_input_is_one_message_of_two_paragraphs():
    only = example({"instruction": "Translate.", "input": "Bonjour", "output": "Hello"})
    assert only.prompt == (Message("user", "Translate.\n\nBonjour"),)


@pytest.mark.parametrize("value", [0, 7, -3, 10**30, 0.5, True, False])
def test_numbers_and_truth_values_become_their_json_text(value):
    assert json.loads(example({"text": "x", "label": value}).target) == value
    assert example({"text": "x", "label": value}).target == json.dumps(value)


def test_rows_keep_their_number_and_empty_answers_are_left_out_and_counted():
    rows = table({"q": "a", "a": "1"}, {"q": "b", "a": " "}, {"q": "c", "a": None}, {"q": "d", "a": "2"})
    examples, warnings = convert(rows, "prompt_completion", {"prompt": "q", "completion": "a"})
    assert [example.row for example in examples] == [1, 4]
    assert warnings == ["2 rows left out: nothing to learn in them"]


def test_repeated_rows_and_missing_prompts_are_counted():
    rows = table({"q": "a", "a": "1"}, {"q": "a", "a": "1"}, {"q": "", "a": "2"})
    examples, warnings = convert(rows, "prompt_completion", {"prompt": "q", "completion": "a"})
    assert len(examples) == 3
    assert sorted(warning[:6] for warning in warnings) == ["1 rows", "1 rows"]


def test_a_column_that_is_not_there_is_named_with_the_closest_one():
    rows = [{"question": "x", "answer": "y"}]
    error = error_of(rows, "prompt_completion", prompt="qestion", completion="answer")
    assert error.code == "E_MISSING_COLUMN"
    assert "question, answer" in error.message
    assert "'question'" in error.hint
    assert code_of(rows, "prompt_completion", prompt="question") == "E_MISSING_COLUMN"
    assert code_of(rows, "prompt_completion", prompt="question", completion="") == "E_MISSING_COLUMN"


def test_an_empty_choice_for_an_optional_role_is_no_choice():
    only = example({"q": "x", "a": "y"}, format="prompt_completion", prompt="q", completion="a", system="")
    assert [message.role for message in only.messages] == ["user", "assistant"]


def test_unknown_formats_and_roles_are_refused():
    assert code_of([{"a": "x"}], "alpaca", text="a") == "E_FORMAT"
    assert code_of([{"a": "x"}], "text", text="a", prompt="a") == "E_FORMAT"


@pytest.mark.parametrize("value", [["x"], {"a": 1}, float("nan"), float("inf")])
def test_a_value_that_is_no_text_is_named_with_row_and_column(value):
    error = error_of([{"q": "x", "a": "y"}, {"q": "x", "a": value}], "prompt_completion", prompt="q", completion="a")
    assert error.code == "E_TYPE"
    assert error.message.startswith("Row 2, column 'a'")


def test_long_user_values_do_not_make_a_message_long():
    rows = [{"c" * 150 + str(number): "v" * 10_000 for number in range(50)}]
    assert code_of(rows, "text", text="x" * 1000) == "E_MISSING_COLUMN"
    assert code_of(rows, "x" * 1000) == "E_FORMAT"
    assert code_of([{"m" * 150: "v" * 10_000}], "messages", messages="m" * 150) == "E_CHAT"


def test_a_chosen_format_finds_its_columns_by_name_and_then_in_file_order() -> None:
    assert columns_for("prompt_completion", ["id", "x", "completion"]) == {"completion": "completion", "prompt": "x"}
    assert columns_for("text", ["body"]) == {"text": "body"}
    with pytest.raises(StudioError) as caught:
        columns_for("poem", ["a"])
    assert caught.value.code == "E_FORMAT"


def answered(*answers: str) -> list[Example]:
    rows = [{"text": f"row {number}", "label": answer} for number, answer in enumerate(answers)]
    return convert(table(*rows), "text_label", {"text": "text", "label": "label"})[0]


def test_labels_are_the_different_answers_in_order() -> None:
    assert labels_of(answered("good", "bad", " good", "bad\n", "ugly")) == ("bad", "good", "ugly")
    assert labels_of([example({"text": "x", "label": value}) for value in (1, 0, True)]) == ("0", "1", "true")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "0 different labels"),
        (answered("good", "good "), "1 different label: 'good'"),
        (answered(*map(str, range(MOST_LABELS + 1))), "101 different labels; at most 100"),
        ([*answered("a", "b"), Example(text="plain", row=3)], "Row 3 has no label"),
    ],
)
def test_too_few_and_too_many_labels_are_errors(rows: list[Example], said: str) -> None:
    with pytest.raises(StudioError) as caught:
        labels_of(rows)
    assert caught.value.code == "E_LABELS" and said in caught.value.message and caught.value.hint
    assert len(labels_of(answered(*map(str, range(MOST_LABELS))))) == MOST_LABELS
