import json

import pytest

from lorakit.data.chat import Chat, Completion, Message, parse, tell, unfold
from lorakit.data.chat_sources import read_split, said, weighted
from lorakit.data.records import Record
from lorakit.errors import DataError
from lorakit.recipe.schema import ChatData

ASSISTANT = {"role": "assistant", "content": "a"}
THINKING_USER = {"role": "user", "content": "q", "reasoning_content": "hm"}
ANSWER = (Message("user", "q"), Message("assistant", "a"))


def read(row, layout=None):
    record = Record(row, "f:1")
    return parse(record, layout or tell(record))


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [{"role": "user", "content": "q"}, ASSISTANT]}, ANSWER),
        (
            {"messages": [{"role": "developer", "content": "s"}, ASSISTANT]},
            (Message("system", "s"), Message("assistant", "a")),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ASSISTANT]},
            ANSWER,
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": "x", "weight": 0},
                    {"role": "assistant", "content": "a", "weight": 1},
                ]
            },
            (Message("assistant", "x", learned=False), Message("assistant", "a")),
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ANSWER),
        (
            {"conversations": [{"from": "gpt", "value": "x", "weight": 0}, {"from": "gpt", "value": "a"}]},
            (Message("assistant", "x", learned=False), Message("assistant", "a")),
        ),
        ({"messages": [{"from": "human", "value": "q"}, ASSISTANT | {"train": True}]}, ANSWER),
        (
            {"conversations": [ASSISTANT | {"train": False}, ASSISTANT]},
            (Message("assistant", "a", learned=False), Message("assistant", "a")),
        ),
        ({"system": "s", "messages": [{"role": "user", "content": "q"}, ASSISTANT]}, (Message("system", "s"), *ANSWER)),
        (
            {"system": "s", "tools": "[]", "conversations": [{"role": "system", "content": "s"}, ASSISTANT]},
            (Message("system", "s"), Message("assistant", "a")),
        ),
        ({"instruction": "q", "input": "", "output": "a"}, ANSWER),
        (
            {"instruction": "q", "input": " ", "system": "\n", "output": "a", "history": [["q1", "a1"]]},
            (Message("user", "q1"), Message("assistant", "a1"), *ANSWER),
        ),
        ({"instruction": "q", "input": "i", "output": "a"}, (Message("user", "q\n\ni"), Message("assistant", "a"))),
        (
            {"instruction": "q", "context": "c", "response": "a", "category": "qa"},
            (Message("user", "q\n\nc"), Message("assistant", "a")),
        ),
        ({"prompt": "q", "response": "a"}, ANSWER),
        ({"question": "q", "answer": "a"}, ANSWER),
        ({"input": "q", "output": "a"}, ANSWER),
        ({"system_prompt": "s", "question": "q", "response": "a"}, (Message("system", "s"), *ANSWER)),
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": [ASSISTANT]},
            ANSWER,
        ),
        (
            {"prompt": [{"role": "user", "content": "p"}, ASSISTANT, {"role": "user", "content": "q"}],
             "completion": [ASSISTANT]},
            (Message("user", "p"), Message("assistant", "a", learned=False), *ANSWER),
        ),
        (
            {"context": "c", "question": "q", "answers": {"text": ["a", "b"], "answer_start": [0, 1]}},
            (Message("user", "c\n\nq"), Message("assistant", "a")),
        ),
    ],
)  # fmt: skip
def test_layouts_are_told_from_the_fields(row, messages):
    assert read(row) == Chat(messages, "f:1")


def test_raw_layouts():
    assert read({"prompt": "p", "completion": "c"}) == Completion("p", "c", "f:1")
    assert read({"text": "t"}).plain


def test_nested_squad_gives_one_row_a_question():
    row = {"title": "t", "paragraphs": [{"context": "c", "qas": [
        {"id": "7", "question": "q", "answers": [{"text": "a"}]}, {"id": "8", "question": "r", "answers": []},
    ]}]}  # fmt: skip
    first, second = unfold(Record(row, "f:3"))
    assert parse(first, tell(first)) == Chat((Message("user", "c\n\nq"), Message("assistant", "a")), "f:3 (7)")
    with pytest.raises(DataError, match="no answer") as caught:
        parse(second, "squad")
    assert caught.value.where == "f:3 (8)"


@pytest.mark.parametrize(
    ("row", "layout", "reason"),
    [
        ({"messages": "hello"}, "messages", "list of objects"),
        ({"messages": [{"role": "user"}]}, "messages", "'content' is missing"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "messages", "unknown role 'alien'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages", "no assistant message"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "messages", "'content' is empty"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}, "messages", "0 or 1"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "sharegpt", "unknown role"),
        ({"messages": [ASSISTANT | {"function_call": {"arguments": {}}}]}, "messages", "one without a name"),
        ({"messages": [ASSISTANT | {"tool_calls": "[{"}]}, "messages", "'tool_calls' is no JSON"),
        ({"messages": [ASSISTANT | {"tool_calls": [{"name": "f", "arguments": "{"}]}]}, "messages", "are no JSON"),
        (
            {"messages": [ASSISTANT | {"role": "user", "tool_calls": [{"name": "f"}]}]},
            "messages",
            "a call of another role",
        ),
        (
            {"messages": [ASSISTANT | {"reasoning_content": 1}]},
            "messages",
            "should be text, is int",
        ),
        (
            {"messages": [THINKING_USER, ASSISTANT]},
            "messages",
            "of another role than the assistant's",
        ),
        ({"messages": [ASSISTANT], "tools": [{"type": "function"}]}, "messages", "'tools' has one without a name"),
        ({"messages": [ASSISTANT], "tools": "f"}, "messages", "'tools' is no JSON"),
        ({"system": "a", "messages": [{"role": "system", "content": "b"}, ASSISTANT]}, "messages", "two different"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "alpaca", "a list of .question, answer"),
        ({"instruction": "x"}, "alpaca", "'output' is missing"),
        ({"instruction": 3, "output": "x"}, "alpaca", "should be text, is int"),
        ({"text": ""}, "text", "empty"),
    ],
)
def test_bad_rows_say_what_and_where(row, layout, reason):
    with pytest.raises(DataError, match=reason) as caught:
        read(row, layout)
    assert caught.value.where == "f:1"


def test_unknown_fields_list_the_known_layouts():
    with pytest.raises(DataError, match="body, head") as caught:
        tell(Record({"head": 1, "body": 2}, "f:1"))
    assert "alpaca (instruction, output)" in caught.value.hint


def source(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(rows):
    return [row.completion for row in rows]


def test_held_out_share_never_splits_equal_rows(tmp_path):
    path = source(tmp_path / "a.jsonl", [{"text": f"row {n % 40}"} for n in range(120)])
    data = ChatData(train=[{"path": path}], held_out=0.25)
    split = read_split(data, seed=1)
    assert len(set(texts(split.held_out))) == 10
    assert len(split.held_out) == 30
    assert not set(texts(split.held_out)) & set(texts(split.train))
    assert len(split.train) == 90
    assert texts(read_split(data, seed=1).held_out) == texts(split.held_out)
    assert texts(read_split(data, seed=2).held_out) != texts(split.held_out)


def test_weights_repeat_rows_or_take_a_fixed_part():
    rows = [Completion("", str(n), "") for n in range(10)]
    assert texts(weighted(rows, 2, 0)) == texts(rows) * 2
    half = texts(weighted(rows, 0.5, 3))
    assert len(half) == 5
    assert half == texts(weighted(rows, 0.5, 3)) == sorted(half)
    assert half != texts(weighted(rows, 0.5, 4))
    assert len(weighted(rows, 1.2, 0)) == 12


def test_sources_of_their_own_are_held_out_and_repeats_counted(tmp_path):
    train = source(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    held = source(tmp_path / "b.jsonl", [{"text": "two"}])
    split = read_split(ChatData(train=[{"path": train}], held_out=[{"path": held}]), seed=0)
    assert (texts(split.train), texts(split.held_out), split.repeated) == (["one", "two"], ["two"], 1)


def test_bad_rows_stop_the_run_or_are_listed(tmp_path):
    path = source(tmp_path / "a.jsonl", [{"text": "one"}, {"text": ""}, {"other": 1}, {"text": "two"}])
    with pytest.raises(DataError, match="empty") as caught:
        read_split(ChatData(train=[{"path": path}], held_out=0), seed=0)
    assert caught.value.where == f"{path}:2"
    split = read_split(ChatData(train=[{"path": path}], held_out=0, on_bad="skip"), seed=0)
    assert texts(split.train) == ["one", "two"]
    assert [error.where for error in split.rejects.errors] == [f"{path}:2", f"{path}:3"]


@pytest.mark.parametrize("share", [0, 0.1])
def test_a_source_without_rows_is_named(tmp_path, share):
    sources = [{"path": source(tmp_path / "a.jsonl", [{"text": "x"}])}, {"path": source(tmp_path / "b.jsonl", [])}]
    with pytest.raises(DataError, match="no row") as caught:
        read_split(ChatData(train=sources, held_out=share), seed=0)
    assert caught.value.where.endswith("b.jsonl")


@pytest.mark.parametrize(
    ("rows", "share", "said", "hint"),
    [
        (1, 0.1, "a share of 0.1 of 1 different row leaves none", "0 sets none aside"),
        (23, 0.99, "a share of 0.99 of 23 different rows leaves none", "a lower share, or 0"),
    ],
)
def test_a_share_that_leaves_nothing_to_train_on(tmp_path, rows, share, said, hint):
    path = source(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(rows)])
    with pytest.raises(DataError, match=said) as caught:
        read_split(ChatData(train=[{"path": path}], held_out=share), seed=0)
    assert caught.value.hint == hint


def test_a_weight_that_leaves_nothing_of_a_source(tmp_path):
    big, small = (source(tmp_path / f"{n}.jsonl", [{"text": f"{n} {i}"} for i in range(n)]) for n in (40, 6))
    with pytest.raises(DataError, match=r"a weight of 0\.01 leaves none of its 6 rows") as caught:
        read_split(ChatData(train=[{"path": big}, {"path": small, "weight": 0.01}], held_out=0), seed=0)
    assert caught.value.where == small


def test_content_keys_tell_prompt_from_completion():
    assert said(Completion("a", "b", "x")) == said(Completion("a", "b", "y"))
    assert said(Completion("a", "b", "")) != said(Completion("b", "a", ""))


WEATHER = {"name": "weather", "description": "of a place", "parameters": {"type": "object", "properties": {}}}
CALL = {"name": "weather", "arguments": {"place": "Oslo"}}


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"tools": [{"type": "function", "function": WEATHER}], "messages": [
            {"role": "user", "content": "Rain in Oslo?"},
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
            {"role": "tool", "content": "dry"},
            {"role": "assistant", "content": "No."},
        ]}, "messages"),
        ({"functions": json.dumps([WEATHER]), "messages": [
            {"role": "user", "content": "Rain in Oslo?"},
            {"role": "assistant", "content": None, "function_call": {**CALL, "arguments": '{"place": "Oslo"}'}},
            {"role": "function", "content": "dry"},
            {"role": "assistant", "content": "No."},
        ]}, "messages"),
        ({"tools": json.dumps([WEATHER]), "conversations": [
            {"from": "human", "value": "Rain in Oslo?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "dry"},
            {"from": "gpt", "value": "No."},
        ]}, "sharegpt"),
        ({"tools": [WEATHER], "prompt": [{"role": "user", "content": "Rain in Oslo?"}], "completion": [
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "dry"},
            {"role": "assistant", "content": "No."},
        ]}, "completion"),
    ],
    ids=["OpenAI", "OpenAI's older form", "ShareGPT", "prompt and completion"],
)  # fmt: skip
def test_tools_and_their_calls(row, layout):
    record = Record(row, "f:1")
    assert tell(record) == layout
    question, call, answer, last = parse(record, layout).messages
    assert [m.role for m in (question, call, answer, last)] == ["user", "assistant", "tool", "assistant"]
    assert {m.tools for m in (question, call, answer, last)} == {question.tools}
    assert json.loads(question.tools) == [{"type": "function", "function": WEATHER}]
    assert json.loads(call.calls) == [{"type": "function", "function": CALL}]
    assert (call.content, call.learned, answer.content, last.content) == ("", True, "dry", "No.")


def test_a_call_without_arguments_has_none():
    row = {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": ""}]}]}
    (call,) = parse(Record(row, "f:1"), "messages").messages
    assert json.loads(call.calls)[0]["function"] == {"name": "f", "arguments": {}}
    for more in ({}, {"parameters": {"a": 1}}):
        row["messages"][0]["tool_calls"] = [{"name": "f", "arguments": None, **more}]
        (call,) = parse(Record(row, "f:1"), "messages").messages
        assert json.loads(call.calls)[0]["function"]["arguments"] == more.get("parameters", {})


def test_a_calls_number_goes_with_its_answer():
    row = {"messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "abc123def", "type": "function", "function": CALL}]},
        {"role": "tool", "content": "dry", "tool_call_id": "abc123def", "name": "weather"},
        {"role": "assistant", "content": "No."},
    ]}  # fmt: skip
    _, call, answer, _ = parse(Record(row, "f:1"), "messages").messages
    assert json.loads(call.calls)[0]["id"] == "abc123def"
    assert json.loads(answer.answers) == {"tool_call_id": "abc123def", "name": "weather"}
