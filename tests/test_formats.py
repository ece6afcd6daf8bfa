"""Formats: told by their keys, read into rows, and written so that reading gives equal rows."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft.data.dialogue import Dialogue, Graded, Message, Preference
from graft.data.formats import FORMATS, Recognized, read_row, read_rows_of, recognize, to_record
from graft.data.rows import Row
from graft.errors import DataError, UsageError
from graft.reading.files import Faults, Record

USER, ANSWER = Message("user", "Hello?"), Message("assistant", "Hi.")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def one(fields: dict, columns: dict | None = None, wanted: str | None = None):
    record = Record(fields, "f:3")
    return read_row(record, recognize([record], columns or {}, wanted))


def dialogue(*turns: Message, **more: object) -> Dialogue:
    return Dialogue(turns, "3", "f:3", **more)


# Recognizing --------------------------------------------------------------------------------------

KNOWN = {
    "alpaca": ({"instruction": "a", "input": "", "output": "b", "text": "the whole of it"}, "dialogue"),
    "sharegpt": ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "dialogue"),
    "messages": (
        {"prompt": "a", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "dialogue",
    ),
    "prompt-completion": ({"prompt": "a", "completion": "b"}, "dialogue"),
    "text": ({"text": "a", "url": "b"}, "text"),
    "preference": ({"prompt": "a", "chosen": "b", "rejected": "c", "messages": []}, "preference"),
    "unpaired-preference": ({"prompt": "a", "completion": "b", "label": True}, "graded"),
    "classification": ({"text": "a", "label": 1}, "labelled"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_told(name):
    fields, unit = KNOWN[name]
    told = recognize([Record(fields, "f:1")] * 3, {})
    assert (told.name, told.unit) == (name, unit)
    for key in FORMATS[name].needs:
        assert repr(key) in told.why
    read_row(Record(fields, "f:1"), told)


def test_null_and_empty_columns_do_not_decide():
    row = {"instruction": "a", "output": "b", "messages": None, "chosen": None, "rejected": None, "text": None}
    assert recognize([Record(row, "f:1")], {}).name == "alpaca"
    cells = {"prompt": "a", "completion": "b", "label": "", "text": ""}
    assert recognize([Record(cells, "f:1")], {}).name == "prompt-completion"
    empty = {"instruction": None, "output": None}
    assert recognize([Record(empty, "f:1")] * 99 + [Record({"text": "x"}, "f:2")], {}).name == "text"
    assert recognize([Record(empty, "f:1")] * 99, {}).name == "alpaca"


def test_the_majority_decides_not_the_first_row():
    rows = [Record({"text": "x"}, "f:1")] + [Record({"prompt": "a", "completion": "b"}, "f:2")] * 9
    told = recognize(rows, {})
    assert told.name == "prompt-completion"
    assert "9 of the first 10" in told.why


def test_ambiguous_keys_are_refused_until_columns_say_which():
    row = {"instruction": "a", "output": "b", "prompt": "c", "completion": "d"}
    with pytest.raises(DataError, match=r"alpaca \(instruction, output\) and prompt-completion") as caught:
        recognize([Record(row, "f:1")], {})
    assert "columns: {instruction: instruction}" in str(caught.value)
    assert recognize([Record(row, "f:1")], {"prompt": "prompt"}).name == "prompt-completion"
    assert recognize([Record(row, "f:1")], {}, "alpaca").name == "alpaca"


@pytest.mark.parametrize(
    ("fields", "wanted", "said"),
    [
        ({"question": "a", "answer": "b"}, "dialogue", "columns: {instruction: question, output: answer}"),
        ({"instruction": "a", "context": "b", "response": "c"}, None, "columns: {output: response, input: context}"),
        ({"prompt": "a", "accepted": "b", "rejected": "c"}, "preference", "columns: {chosen: accepted}"),
        ({"sentence": "a", "class": 1}, "labelled", "columns: {text: sentence, label: class}"),
        ({"Messsages": []}, "messages", "columns: {messages: Messsages}"),
        ({"x": 1}, None, "columns: {text: NAME}"),
        ({}, None, "no keys"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "text", "which is preference; text is needed"),
    ],
)
def test_unknown_keys_say_what_is_needed(fields, wanted, said):
    with pytest.raises(DataError) as caught:
        recognize([Record(fields, "data.jsonl:1")], {}, wanted)
    message = str(caught.value)
    assert said in message
    assert message.startswith("data.jsonl: ")
    assert "needs" in message
    assert "\n" not in message


def test_columns():
    fields = {"question": "a", "answer": "b", "uid": "x7", "level": 2}
    read = one(fields, {"prompt": "question", "completion": "answer", "id": "uid"})
    assert read == Dialogue(
        (Message("user", "a"), Message("assistant", "b")), "x7", "f:3", (), None, {"level": 2}, True
    )
    with pytest.raises(DataError, match=r"no format has the key 'promt'; did you mean 'prompt'\?"):
        one(fields, {"promt": "question"})
    with pytest.raises(DataError, match=r"`columns` has input: contxt, which no row has"):
        one({"instruction": "a", "output": "b", "context": "c"}, {"input": "contxt"})
    with pytest.raises(DataError, match="chosen, text are not keys of one format"):
        one(fields, {"chosen": "a", "text": "b"})
    with pytest.raises(DataError, match="no format 'alpacca'; did you mean 'alpaca'"):
        one(fields, wanted="alpacca")


# Reading ------------------------------------------------------------------------------------------


def test_alpaca():
    fields = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief.", "history": [["a", "b"]]}
    system, before = Message("system", "Be brief."), (Message("user", "a"), Message("assistant", "b"))
    assert one(fields) == dialogue(system, *before, Message("user", "Add.\n\n1 2"), Message("assistant", "3"))
    bare = {"instruction": "Add.", "input": None, "output": "3", "history": None, "system": ""}
    assert one(bare) == dialogue(Message("user", "Add."), Message("assistant", "3"))


def test_sharegpt_with_tools():
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "1+1?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "Two."},
    ]
    expected = (
        Message("system", "s"),
        Message("user", "1+1?"),
        Message("assistant", "", (CALL,)),
        Message("tool", "2"),
        Message("assistant", "Two."),
    )
    assert one({"conversations": turns, "tools": json.dumps([TOOL])}) == dialogue(*expected, tools=(TOOL,))
    assert one({"conversation": turns}) == dialogue(*expected)
    assert one({"conversations": turns[1:], "system": "s"}) == dialogue(*expected)
    assert one({"conversations": turns, "system": "s"}) == dialogue(*expected)


def test_messages_with_all_that_a_turn_may_have():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "developer", "content": "s"},
        {"Role ": "User", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
        {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"},
        {"role": "assistant", "content": "Two.", "tool_calls": None, "train": True, "refusal": None},
    ]
    read = one({"messages": turns, "tools": [TOOL], "id": 7, "task": "sums", "source": {"page": 3}, "note": None})
    assert read == Dialogue(
        (
            Message("system", "s"),
            Message("user", "1+1?"),
            Message("assistant", "", (CALL | {"id": "c1"},), train=False),
            Message("tool", "2", name="add", tool_call_id="c1"),
            Message("assistant", "Two.", train=True),
        ),
        "7",
        "f:3",
        (TOOL,),
        "sums",
        {"source": {"page": 3}},
    )


@pytest.mark.parametrize(
    ("role", "ours"),
    [
        ("human", "user"), ("USER", "user"), (" User ", "user"), ("prompter", "user"),
        ("gpt", "assistant"), ("GPT", "assistant"), ("bot", "assistant"), ("model", "assistant"),
    ],
)  # fmt: skip
def test_role_names(role, ours):
    other = {"user": "assistant", "assistant": "user"}[ours]
    turns = [{"role": role, "content": "x"}, {"role": other, "content": "x"}]
    read = one({"messages": turns if ours == "user" else turns[::-1]})
    assert [turn.role for turn in read.messages] == ["user", "assistant"]


@pytest.mark.parametrize("role", ["tool", "function", "Observation", "ipython", "tool_response"])
def test_names_of_the_tools_role(role):
    turns = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": ""}},
        {"role": role, "content": "y"},
        {"role": "assistant", "content": "z"},
    ]
    read = one({"messages": turns})
    assert [turn.role for turn in read.messages] == ["user", "assistant", "tool", "assistant"]
    assert read.messages[1].tool_calls[0]["function"] == {"name": "f", "arguments": {}}


def test_prompt_completion():
    assert one({"prompt": "1+1=", "completion": " 2"}) == dialogue(
        Message("user", "1+1="), Message("assistant", " 2"), plain=True
    )
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    read = one({"prompt": asked, "completion": [{"role": "assistant", "content": "d"}]})
    assert not read.plain
    assert [(turn.content, turn.train) for turn in read.messages] == [
        ("a", None), ("b", False), ("c", None), ("d", None),
    ]  # fmt: skip


def as_turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


PAIRS = {
    "texts": {"prompt": "Hello?", "chosen": "Hi.", "rejected": "No."},
    "turns": {"prompt": as_turns("Hello?"), "chosen": as_turns("", "Hi.")[1:], "rejected": as_turns("", "No.")[1:]},
    "implicit prompt": {"chosen": as_turns("Hello?", "Hi."), "rejected": as_turns("Hello?", "No.")},
    "prompt once more": {
        "prompt": "Hello?",
        "chosen": as_turns("Hello?", "Hi."),
        "rejected": as_turns("Hello?", "No."),
    },
    "alpaca": {"instruction": "Hello?", "input": "", "chosen": "Hi.", "rejected": "No."},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hello?"}],
        "chosen": {"from": "gpt", "value": "Hi."},
        "rejected": {"from": "gpt", "value": "No."},
    },
}


@pytest.mark.parametrize("fields", PAIRS.values(), ids=PAIRS.keys())
def test_preferences(fields):
    assert one(fields) == Preference((USER,), (ANSWER,), (Message("assistant", "No."),), "3", "f:3")
    system = one(fields | {"system": "s"})
    assert system.prompt == (Message("system", "s"), USER)


@pytest.mark.parametrize(
    ("label", "good"),
    [
        (True, True), (1, True), ("true", True), ("True", True), ("1", True), (1.0, True),
        (False, False), (0, False), ("false", False), ("0", False),
    ],
)  # fmt: skip
def test_graded(label, good):
    read = one({"prompt": "Hello?", "completion": "Hi.", "label": label})
    assert read == Graded((USER,), (ANSWER,), good, "3", "f:3")


def test_classification_and_text():
    assert one({"text": "a", "label": 1.0, "text_pair": None, "id": "x"}) == Row("a", None, "1", "x", "f:3")
    assert one({"text": "a", "text_pair": "b", "label": "no"}) == Row("a", "b", "no", "3", "f:3")
    assert one({"text": " a\nb", "label": "no"}, wanted="text") == Row(" a\nb", None, None, "3", "f:3")


def test_ids():
    assert [one({"text": "x", "id": value}).id for value in ("a", 5, True, None, "", 1.5)] == ["a", "5"] + ["3"] * 4


# Streaming ----------------------------------------------------------------------------------------


def test_rows_of_a_file(tmp_path):
    good, bad = '{"prompt": "a", "completion": "b"}\n', '{"prompt": "a", "completion": ""}\n'
    path = tmp_path / "a.jsonl"
    path.write_text(good + bad + "{\n" + good * 200 + bad)
    faults = Faults(0.05)
    told, rows = read_rows_of(path, {}, faults)
    assert told.name == "prompt-completion"
    assert [row.id for row in rows] == [str(n) for n in (1, *range(4, 204))]
    assert [(fault.place, fault.reason) for fault in faults.rows] == [
        (f"{path}:3", "the JSON is cut off"),
        (f"{path}:2", "'completion' is empty"),
        (f"{path}:204", "'completion' is empty"),
    ]
    faults.check(path, 204)
    with pytest.raises(DataError, match=r"a\.jsonl:3: the JSON is cut off"):
        list(read_rows_of(path, {})[1])
    path.write_text(good + bad)
    with pytest.raises(DataError, match=r"a\.jsonl:2: 'completion' is empty"):
        list(read_rows_of(path, {})[1])
    path.write_text("{\n{\n")
    with pytest.raises(DataError, match=r"none of the 2 rows can be read: line 1: the JSON is cut off"):
        read_rows_of(path, {}, Faults(1.0))


# Writing ------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12).filter(
    str.strip
)
NAMES = st.text("abcxyz_", min_size=1, max_size=5)
SCALARS = st.one_of(st.booleans(), st.integers(-9, 9), TEXTS)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2))
FIELDS = st.dictionaries(NAMES.map(lambda name: f"my_{name}"), JSON, max_size=2)
ARGUMENTS = st.dictionaries(NAMES, JSON, max_size=2)
CALLS = st.builds(
    lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}}, NAMES, ARGUMENTS
)
TRAIN = st.sampled_from([None, None, True, False])


@st.composite
def turns(draw: st.DrawFn, tools: bool = True, train: bool = True, system: bool = True) -> tuple[Message, ...]:
    found = [Message("system", draw(TEXTS))] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        found.append(Message("user", draw(TEXTS)))
        if tools and draw(st.booleans()):
            found.append(Message("assistant", "", tuple(draw(st.lists(CALLS, min_size=1, max_size=2)))))
            found.append(Message("tool", draw(TEXTS), name=draw(st.none() | NAMES)))
        found.append(Message("assistant", draw(TEXTS), train=draw(TRAIN) if train else None))
    return tuple(found)


def dialogues(**more: bool) -> st.SearchStrategy[Dialogue]:
    tools = st.just(()) if not more.get("tools", True) else st.lists(st.just(TOOL), max_size=1).map(tuple)
    task = st.none() | NAMES
    return st.builds(Dialogue, turns(**more), NAMES, st.just("f:3"), tools, task, FIELDS)


PLAIN = st.builds(
    lambda prompt, answer, fields: Dialogue(
        (Message("user", prompt), Message("assistant", answer)), "3", "f:3", fields=fields, plain=True
    ),
    TEXTS, TEXTS, FIELDS,
)  # fmt: skip


@st.composite
def preferences(draw: st.DrawFn) -> Preference:
    prompt = draw(turns())[:-1]
    chosen, rejected = draw(st.lists(TEXTS, min_size=2, max_size=2, unique=True))
    answers = [(Message("assistant", text),) for text in (chosen, rejected)]
    return Preference(prompt, answers[0], answers[1], draw(NAMES), "f:3", draw(st.sampled_from([(), (TOOL,)])))


@st.composite
def graded(draw: st.DrawFn) -> Graded:
    whole = draw(turns())
    return Graded(whole[:-1], whole[-1:], draw(st.booleans()), draw(NAMES), "f:3")


ROWS = {
    "messages": dialogues(),
    "sharegpt": dialogues(),
    "alpaca": dialogues(tools=False, train=False),
    "prompt-completion": dialogues() | PLAIN,
    "preference": preferences(),
    "unpaired-preference": graded(),
    "classification": st.builds(Row, TEXTS, st.none() | TEXTS, NAMES, NAMES, st.just("f:3")),
    "text": st.builds(Row, TEXTS, st.none(), st.none(), NAMES, st.just("f:3")),
}


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_reads_as_an_equal_row(name):
    seen = []

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(ROWS[name])
    def check(row):
        written = json.loads(json.dumps(to_record(row, name)))
        record = Record(written, row.place)
        assert recognize([record], {}, name).name == name
        assert read_row(record, Recognized(name, FORMATS[name].unit, "", {})) == row
        seen.append(row)

    check()
    assert len(seen) >= 50


def test_what_a_format_has_no_place_for_is_refused():
    tools = dialogue(USER, Message("assistant", "", (CALL,)), Message("tool", "2"), ANSWER)
    cases = [
        (tools, "alpaca", "tools"),
        (dialogue(USER, Message("assistant", "x", train=False)), "alpaca", "settings of single turns"),
        (dialogue(Message("system", ""), USER, ANSWER), "alpaca", "empty system turn"),
        (dialogue(USER, Message("assistant", "x", (CALL,))), "sharegpt", "both a text and tool calls"),
        (dialogue(USER, ANSWER, fields={"Input": 1}), "alpaca", "a further field 'Input'"),
        (dialogue(USER, ANSWER, fields={"id": 1}), "messages", "a further field 'id'"),
        (dialogue(USER, ANSWER), "text", "formats for it: messages, sharegpt"),
        (Row("a", None, "x", "1", "f:3"), "text", "formats for it: classification"),
        (Row("a", "b", None, "1", "f:3"), "text", "pair of texts"),
        (Preference((USER,), (ANSWER,), (USER,), "1", "f:3"), "text", "formats for it: preference"),
    ]
    for row, name, said in cases:
        with pytest.raises(DataError, match=r"^f:3: ") as caught:
            to_record(row, name)
        assert said in str(caught.value)
    with pytest.raises(UsageError, match="did you mean 'sharegpt'"):
        to_record(tools, "share-gpt")


def test_every_format_has_its_tests():
    assert set(KNOWN) == set(FORMATS) == set(ROWS)


def test_a_preference_as_a_dialogue_keeps_the_better_answer():
    worse = Message("assistant", "no idea")
    row = Preference((USER,), (ANSWER,), (worse,), "1", "f:3")
    assert to_record(row, "messages") == {"id": "1", "messages": [USER.as_dict(), ANSWER.as_dict()]}
