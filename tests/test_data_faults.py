"""Planted faults in data files: each is named by file and line, left out where that is asked for, and never a crash."""

import codecs
import gzip
import io
import json
import os
import random
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft.data.formats import read_row, read_rows_of, recognize
from graft.errors import DataError, GraftError
from graft.reading import files, jsonrows, lines
from graft.reading.files import Faults, iterate_records, read_records

GOOD = '{"prompt": "a", "completion": "b"}\n'


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path: Path, *said: str, line: int | None = None) -> str:
    """The message with which a file is refused: one line, its place first."""
    with pytest.raises(DataError) as caught:
        list(read_rows_of(path, {})[1])
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: " if line else str(path)), message
    for part in said:
        assert part in message
    assert "\n" not in message
    assert len(message) < 600
    return message


def skipped(path: Path) -> tuple[list[dict], Faults]:
    """The fields of the good records, and the bad ones."""
    faults = Faults(1.0)
    return [record.fields for record in iterate_records(path, faults)], faults


def parquet(path: Path, **columns: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def messages(*turns: tuple[str, object]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}) + "\n"


def test_d1_empty_file(tmp_path):
    for suffix in (".jsonl", ".json", ".csv", ".tsv", ".txt", ".jsonl.gz"):
        refused(write(tmp_path / f"a{suffix}", b""), "has no rows", "at least one row")
    refused(write(tmp_path / "a.parquet", b""), "Parquet that cannot be read", line=1)
    refused(write(tmp_path / "b.jsonl.gz", gzip.compress(b"")), "has no rows")
    refused(parquet(tmp_path / "c.parquet", text=pyarrow.array([], pyarrow.string())), "has no rows")


def test_d2_blank_lines_only(tmp_path):
    for suffix in (".jsonl", ".json", ".csv", ".txt"):
        refused(write(tmp_path / f"a{suffix}", "\n \n\t\r\n"), "has no rows")


def test_d3_cut_off(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD * 3 + GOOD[:20])
    refused(path, "the JSON is cut off", '\'{"prompt": "a", "com\'', line=4)
    rows, faults = skipped(path)
    assert len(rows) == 3
    assert [(fault.place, fault.reason) for fault in faults.rows] == [(f"{path}:4", "the JSON is cut off")]
    for cut in (f"[{GOOD},{GOOD},{GOOD[:15]}", f"[{GOOD},{GOOD},", f"[{GOOD},{GOOD}"):
        path = write(tmp_path / "a.json", cut)
        refused(path, "cut off", line=3)
        rows, faults = skipped(path)
        assert len(rows) == 2
        assert faults.count == 1
    path = write(tmp_path / "b.json", f"[{GOOD},{{'a': 1}},{GOOD}]")  # where the second one ends is not certain
    with pytest.raises(DataError, match=r"b\.json:2: not JSON"):
        skipped(path)
    path = write(tmp_path / "c.json", f'[{GOOD},{{"a": NaN}},{{"a": 1, "a": 2}},7,{GOOD}]')
    rows, faults = skipped(path)
    assert len(rows) == 2
    assert [fault.reason.split(",")[0] for fault in faults.rows] == [
        "NaN is no JSON value",
        "the key 'a' stands twice in one object",
        "a number (7) where an object is expected",
    ]


ONE = '{"text": "a"}'
BAD = '{"text": "a", "text": "b"}'


@pytest.mark.parametrize(
    ("content", "places"),
    [
        (f"[{ONE}]", ["1"]),
        (f"[{ONE},{ONE} , {ONE}]\n", ["1[1]", "1[2]", "1[3]"]),
        (f"[{ONE},\n{ONE}\n,{ONE}]", ["1", "2", "3"]),
        (f"[\n{ONE}, {ONE},\n{ONE}\n]", ["2[1]", "2[2]", "3"]),
        (f'[{{"text":\n"a"}}, {ONE}, {ONE}]', ["1", "2[2]", "2[3]"]),
        (f"[{BAD}, 7, {ONE}]", ["1[1]", "1[2]", "1[3]"]),
        (f"[{BAD},\n7,\n{ONE}]", ["1", "2", "3"]),
        (f"[{ONE}", ["1", "1[2]"]),
        (f"[{ONE},", ["1", "1[2]"]),
        (f"[{ONE},{ONE[:5]}", ["1[1]", "1[2]"]),
        (f'[{ONE},{{"text":\n"a', ["1[1]", "2"]),
        (f'[{ONE},\n{{"text":\n"a', ["1", "3"]),
    ],
)
def test_no_two_elements_of_an_array_have_one_place(tmp_path, content, places):
    path = write(tmp_path / "a.json", content)
    faults = Faults(1.0)
    found = [record.place for record in iterate_records(path, faults)] + [fault.place for fault in faults.rows]
    assert sorted(place.removeprefix(f"{path}:") for place in found) == places


def test_d4_names_that_mislead(tmp_path):
    assert len(read_records(write(tmp_path / "a.jsonl", f"[{GOOD},{GOOD}]"))) == 2
    assert len(read_records(write(tmp_path / "a.json", GOOD + GOOD))) == 2
    assert len(read_records(write(tmp_path / "b.jsonl", gzip.compress(GOOD.encode())))) == 1
    refused(write(tmp_path / "c.jsonl.gz", GOOD[:-1] + "x"), "more than one", line=1)
    refused(write(tmp_path / "d.parquet", GOOD), "Parquet that cannot be read", line=1)
    refused(parquet(tmp_path / "e.parquet", text=["x"]).rename(tmp_path / "e.jsonl"), "name it .parquet", line=1)
    refused(write(tmp_path / "f.gz", GOOD), "ends in '.gz', allowed are .jsonl")
    refused(write(tmp_path / "f.parquet.gz", gzip.compress(b"PAR1")), "cannot be read", line=1)
    bytes_of_zip = io.BytesIO()
    with zipfile.ZipFile(bytes_of_zip, "w") as archive:
        archive.writestr("a.jsonl", GOOD)
    refused(write(tmp_path / "g.jsonl", bytes_of_zip.getvalue()), "a zip archive", "unpack", line=1)
    for start, kind in ((b"BZh9", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")):
        refused(write(tmp_path / "h.csv", start + b"1234"), f"the file is {kind}", line=1)
    refused(write(tmp_path / "i.jsonl", gzip.compress(gzip.compress(GOOD.encode()))), "the file is gzip", line=1)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_d5_encodings(tmp_path, pack):
    text = '{"text": "你好 é"}\n{"text": "😀"}\n'
    for content in (
        codecs.BOM_UTF8 + text.encode(),
        text.encode("utf-16"),
        codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    ):
        assert [record.fields["text"] for record in read_records(write(tmp_path / "a.jsonl", pack(content)))] == [
            "你好 é",
            "😀",
        ]
    path = write(
        tmp_path / "b.jsonl", pack(b'{"text": "a"}\n' + '{"text": "你好"}\n'.encode("gbk") + b'{"text": "b"}\n')
    )
    refused(path, "byte 0xc4 at position 11 is not UTF-8", "iconv", line=2)
    assert [fields["text"] for fields in skipped(path)[0]] == ["a", "b"]
    path = write(tmp_path / "c.jsonl", pack(b'{"text": "a\\ud83d"}\n'))
    refused(path, "half a surrogate pair at position 2", line=1)
    refused(
        write(tmp_path / "c.jsonl", pack(b'{"prompt": "a", "completion": "b", "x": ["\\udc00"]}')), "surrogate", line=1
    )
    path = write(tmp_path / "d.jsonl", pack(b'{"text": "a"}\n{"text": "\0"}\n{"text": "b"}\n'))
    refused(path, "NUL", line=2)
    assert [fields["text"] for fields in skipped(path)[0]] == ["a", "b"]
    refused(write(tmp_path / "e.jsonl", pack(('{"text": "a"}\n' * 9).encode("utf-16")[:-1])), "damaged UTF-16", line=9)


def test_d5_encodings_of_tables_and_texts(tmp_path):
    path = write(tmp_path / "a.csv", b"text,n\na,1\n" + "你,2\n".encode("gbk") + b'b,3\n"c\xff\n",4\nd,5\n')
    refused(path, "is not UTF-8", line=3)
    rows, faults = skipped(path)
    assert [row["n"] for row in rows] == ["1", "3", "5"]
    assert [fault.place for fault in faults.rows] == [f"{path}:3", f"{path}:5"]
    path = write(tmp_path / "a.txt", b"one\r\n two\r\n \r\n\xff\nthree\n\n\n\nfour")
    rows, faults = skipped(path)
    assert [row["text"] for row in rows] == ["one\n two", "four"]
    assert [fault.place for fault in faults.rows] == [f"{path}:4"]
    assert [record.place for record in iterate_records(path, Faults(1.0))] == [f"{path}:1", f"{path}:9"]


def test_d6_tables(tmp_path):
    path = write(tmp_path / "a.csv", 'prompt,completion\n"a, ""b""\n\nc",d\ne,f\n')
    assert [record.fields for record in read_records(path)] == [
        {"prompt": 'a, "b"\n\nc', "completion": "d"},
        {"prompt": "e", "completion": "f"},
    ]
    assert len(read_records(write(tmp_path / "b.csv", "prompt;completion\na;b\n"))) == 1
    refused(write(tmp_path / "c.csv", "prompt,completion,prompt\na,b,c\n"), "'prompt' twice", line=1)
    path = write(tmp_path / "d.csv", 'prompt,completion\na,b\nc\nd,e,f\n"g" h,i\nj,k\n')
    refused(path, "1 fields where the header has 2", "put quotes", line=3)
    rows, faults = skipped(path)
    assert [row["prompt"] for row in rows] == ["a", "j"]
    assert [fault.place for fault in faults.rows] == [f"{path}:{n}" for n in (3, 4, 5)]
    path = write(tmp_path / "e.csv", 'prompt,completion\na,b\n"c,d\ne,f\ng,h\n')  # swallows the rows below it
    for faults in (None, Faults(1.0)):
        with pytest.raises(
            DataError, match=r"e\.csv:3: not CSV \(unexpected end of data\); the quotes .* reach line 5"
        ):
            list(iterate_records(path, faults))
    assert len(read_records(write(tmp_path / "f.tsv", "prompt,completion\na,b\n"))) == 1
    refused(write(tmp_path / "f.csv", "prompt+completion\na+b\n"), "the rows have 'prompt+completion'")
    path = write(tmp_path / "g.csv", f"prompt,completion\na,{'x' * 200_000}\n")
    assert len(read_records(path)[0].fields["completion"]) == 200_000


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_d7_endless_line(tmp_path, name):
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(b'{"text": "')
        file.truncate(200_000_000)  # sparse: takes no space
    tracemalloc.start()
    try:
        refused(path, "a line of more than 20 MB, the most allowed", line=1)
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()


def test_d7_endless_paragraph_and_open_quotes(tmp_path, monkeypatch):
    monkeypatch.setattr("graft.reading.tables.MAX_LINE", 100_000)
    refused(
        write(tmp_path / "a.txt", "short\n\n" + "x" * 99 + "\n" * 1 + ("y" * 99 + "\n") * 1001), "a paragraph", line=3
    )


@pytest.mark.parametrize("depth", [101, 500, 10_000, 200_000])
@pytest.mark.parametrize("signs", ["[]", "{}"])
def test_d7_nesting(tmp_path, depth, signs):
    left = "[" if signs == "[]" else '{"a":'
    row = '{"text": "a", "x": ' + left * depth + "1" + signs[1] * depth + "}\n"
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n' + row + '{"text": "b"}\n')
    refused(path, "nested too deep, 100 levels are allowed", "flatten", line=2)
    assert len(skipped(path)[0]) == 2
    refused(write(tmp_path / "a.json", f'[{{"text": "a"}},\n{row}]'), "nested too deep", line=2)


def test_d7_nesting_that_is_allowed(tmp_path):
    row = '{"text": "' + "[" * 500 + '", "x": ' + "[" * 99 + "1" + "]" * 99 + "}\n"
    assert len(read_records(write(tmp_path / "a.jsonl", row))) == 1


def test_d8_types_that_change(tmp_path):
    odd = [3, 1.5, True, ["a"], {"a": 1}, None]
    content = [json.dumps({"prompt": "a", "completion": value}) + "\n" for value in odd]
    path = write(tmp_path / "a.jsonl", GOOD + "".join(content) + GOOD)
    faults = Faults(1.0)
    told, rows = read_rows_of(path, {}, faults)
    assert told.name == "prompt-completion"
    assert [row.place for row in rows] == [f"{path}:1", f"{path}:8"]
    assert [fault.place for fault in faults.rows] == [f"{path}:{n}" for n in range(2, 8)]
    assert "is a number (3)" in faults.rows[0].reason
    assert "missing or null" in faults.rows[-1].reason
    rows = ['{"text": "a", "source": null, "label": null}\n'] * 10_000 + [
        '{"text": "b", "source": "web", "label": 1}\n'
    ]
    path = write(tmp_path / "b.jsonl", "".join(rows))
    told, read = read_rows_of(path, {})
    assert told.name == "text"
    assert sum(1 for _ in read) == 10_001
    column = pyarrow.array([None] * 10_000 + ["x"], pyarrow.string())
    path = parquet(tmp_path / "c.parquet", prompt=["a"] * 10_001, completion=["b"] * 10_001, note=column)
    read = list(read_rows_of(path, {})[1])
    assert [row.fields for row in read[-2:]] == [{}, {"note": "x"}]


def test_d9_keys(tmp_path):
    variants = ['{"Prompt": "a", " completion ": "b"}', '{"PROMPT": "a", "COMPLETION": "b"}', GOOD.strip()]
    path = write(tmp_path / "a.jsonl", "\n".join([*variants, '{"prompt": "a", "completion": "b", "more": 1}']))
    rows = list(read_rows_of(path, {})[1])
    assert [row.answer for row in rows] == ["b"] * 4
    assert [row.fields for row in rows] == [{}, {}, {}, {"more": 1}]
    refused(write(tmp_path / "b.jsonl", GOOD + '{"prompt": "a"}\n'), "'completion' is missing or null", line=2)
    refused(write(tmp_path / "c.jsonl", '{"a": "x"}\n'), "the rows have 'a', which no format has", "alpaca needs")
    both = '{"Prompt": "no", "prompt": "yes", "completion": "b"}'
    assert next(read_rows_of(write(tmp_path / "d.jsonl", both), {})[1]).prompt[0].content == "yes"


CALL = {"name": "f", "arguments": {}}
LONG = "You are a helpful person. " * 20
TURNS = {
    "unknown role": (messages(("usr", "a"), ("assistant", "b")), "turn 1 has an unknown role: 'usr'"),
    "long role": (messages((LONG, "a"), ("assistant", "b")), "an unknown role: a text of 520 characters"),
    "no role": ('{"messages": [{"content": "a"}]}', "turn 1 has no role, its keys are 'content'"),
    "null role": ('{"messages": [{"role": null, "content": "a"}]}', "turn 1 has no role"),
    "number as role": ('{"messages": [{"role": 1, "content": "a"}]}', "unknown role: a number"),
    "two users": (
        messages(("user", "a"), ("user", "b"), ("assistant", "c")),
        "two user turns in a row: turns 1 and 2: 'b'",
    ),
    "two assistants": (messages(("user", "a"), ("assistant", "b"), ("assistant", "c")), "two assistant turns in a row"),
    "assistant first": (
        messages(("assistant", "a"), ("user", "b"), ("assistant", "c")),
        "the assistant has the first turn",
    ),
    "assistant after system": (messages(("system", "a"), ("assistant", "b")), "the assistant follows the system"),
    "no assistant": (messages(("user", "a")), "no turn of the assistant"),
    "only system": (messages(("system", "a")), "no turn of the assistant"),
    "empty user": (messages(("user", " \n"), ("assistant", "b")), "turn 1 (user) is empty"),
    "empty assistant": (messages(("user", "a"), ("assistant", "")), "turn 2 (assistant) is empty"),
    "null content": (messages(("user", "a"), ("assistant", None)), "turn 2 has null as content"),
    "number as content": (messages(("user", 5), ("assistant", "b")), "turn 1 has a number (5) as content"),
    "picture": (
        messages(("user", [{"type": "image_url", "image_url": "x"}]), ("assistant", "b")),
        "turn 1 has a part of type 'image_url' in its content; Graft reads texts",
    ),
    "parts of text that are none": (messages(("user", ["a"]), ("assistant", "b")), "turn 1 has a text ('a') in its"),
    "late system": (messages(("user", "a"), ("system", "b"), ("assistant", "c")), "turn 2 is the system's"),
    "two systems": (
        messages(("system", "a"), ("system", "b"), ("user", "c"), ("assistant", "d")),
        "may only be the first",
    ),
    "last is the user's": (messages(("user", "a"), ("assistant", "b"), ("user", "c")), "the last turn is the user's"),
    "tool without call": (
        messages(("user", "a"), ("tool", "b"), ("assistant", "c")),
        "turn 2 is a tool's, without a call",
    ),
    "tool after an answer": (
        messages(("user", "a"), ("assistant", "b"), ("tool", "c"), ("assistant", "d")),
        "turn 3 is a tool's, without a call",
    ),
    "turn is a text": ('{"messages": ["a", "b"]}', "turn 1 is a text ('a'), allowed is an object"),
    "turns are a text": ('{"messages": "a"}', "'messages' is a text ('a'), allowed is a list of turns"),
    "no turns": ('{"messages": []}', "'messages' has no turns"),
    "thoughts": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning": "c"}]}',
        "turn 2 has 'reasoning', which is not read",
    ),
    "weight": ('{"messages": [{"role": "user", "content": "a", "weight": 0.5}]}', "allowed are true, false, 1 and 0"),
    "train and weight": (
        '{"messages": [{"role": "user", "content": "a", "weight": 0, "train": true}]}',
        "which differ",
    ),
    "calls of the user": (
        json.dumps({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}),
        "tool_calls, which only the assistant has",
    ),
    "call without name": (
        json.dumps({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]}),
        "a call without the name",
    ),
    "arguments": (
        json.dumps({"messages": [{"role": "assistant", "content": "", "tool_calls": [CALL | {"arguments": "{"}]}]}),
        "turn 1, the arguments of 'f' should be JSON",
    ),
    "call that is no JSON": (
        '{"conversations": [{"from": "function_call", "value": "f(1)"}]}',
        "should be JSON in a text",
    ),
    "tools": ('{"messages": [{"role": "user", "content": "a"}], "tools": "[1]"}', "no turn of the assistant"),
    "tools of numbers": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": "[1]"}',
        "'tools' is a list ([1]), allowed is a list of objects",
    ),
    "two systems that differ": (
        '{"system": "x", "messages": [{"role": "system", "content": "y"}, {"role": "user", "content": "a"}]}',
        "'system' and a system turn, which differ",
    ),
    "history": ('{"instruction": "a", "output": "b", "history": [["q"]]}', "pairs of question and answer"),
    "empty output": ('{"instruction": "a", "output": " "}', "'output' is empty"),
}


@pytest.mark.parametrize(("row", "said"), TURNS.values(), ids=TURNS.keys())
def test_d10_turns(tmp_path, row, said):
    message = refused(write(tmp_path / "a.jsonl", row), said, line=1)
    assert LONG not in message


def test_d10_answers_of_tools_name_calls_that_were_made(tmp_path):
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": CALL}]},
        {"role": "tool", "content": "b", "tool_call_id": "2"},
        {"role": "assistant", "content": "c"},
    ]
    refused(write(tmp_path / "a.jsonl", json.dumps({"messages": turns})), "to the call '2', made by none", line=1)
    turns[2]["tool_call_id"] = "1"
    assert len(list(read_rows_of(write(tmp_path / "a.jsonl", json.dumps({"messages": turns})), {})[1])) == 1


A, B, C, D = ({"role": ("user", "assistant")[n % 2], "content": "abcd"[n]} for n in range(4))
OTHER = {"role": "assistant", "content": "other"}
PREFERENCES = {
    "same": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same answer"),
    "same turns": ({"chosen": [A, B], "rejected": [A, B]}, "the same answer"),
    "one side null": ({"prompt": "a", "chosen": "b", "rejected": None}, "'rejected' is missing or null"),
    "one side empty": ({"prompt": "a", "chosen": "b", "rejected": ""}, "'rejected' is empty"),
    "no prompt": ({"chosen": "b", "rejected": "c"}, "no 'prompt'"),
    "no prompt in the turns": ({"chosen": [B], "rejected": [OTHER]}, "no 'prompt'"),
    "prompts that differ": ({"chosen": [A, B], "rejected": [C, D]}, "different prompts: they part at turn 1"),
    "later prompts that differ": ({"chosen": [A, B, A, B], "rejected": [A, B, C, D]}, "they part at turn 3"),
    "one ends early": ({"chosen": [A, B, C, D], "rejected": [A, B]}, "different prompts: they part at turn 3"),
    "another prompt": ({"prompt": "x", "chosen": [A, B], "rejected": [A, OTHER]}, "'prompt' is not the prompt"),
    "prompt on one side": ({"prompt": "a", "chosen": [A, B], "rejected": [OTHER]}, "only one of chosen and rejected"),
    "trailing user": ({"chosen": [A, B, C], "rejected": [A, OTHER, C]}, "the last turn is the user's"),
    "null label": ({"prompt": "a", "completion": "b", "label": None}, "'label' is missing or null"),
    "other label": (
        {"prompt": "a", "completion": "b", "label": "good"},
        "'label' is a text ('good'), allowed are true",
    ),
    "number as label": ({"prompt": "a", "completion": "b", "label": 2}, "'label' is a number (2)"),
    "list as label": ({"prompt": "a", "completion": "b", "label": [1]}, "'label' is a list"),
}


@pytest.mark.parametrize(("row", "said"), PREFERENCES.values(), ids=PREFERENCES.keys())
def test_d14_preferences(tmp_path, row, said):
    good = {key: value if value is not None else "c" for key, value in row.items()}
    if "label" in good:
        good["label"] = True
    path = write(tmp_path / "a.jsonl", (json.dumps(good) + "\n") * 2 + json.dumps(row))
    record = read_records(path)[2]
    with pytest.raises(DataError, match=r"a\.jsonl:3: ") as caught:
        read_row(record, recognize(read_records(path), {}))
    assert said in str(caught.value)


def test_d17_places(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone")
    start = time.monotonic()
    cases = {
        tmp_path / "pipe.jsonl": "pipe or device",
        Path("/dev/zero"): "pipe or device",
        tmp_path / "folder.jsonl": "is a folder",
        tmp_path / "link.jsonl": "link to a missing file",
        tmp_path / "gone.jsonl": "no such data file",
    }
    for path, said in cases.items():
        for faults in (None, Faults(1.0)):
            with pytest.raises(DataError, match=said):
                iterate_records(path, faults)  # at once, not when the first row is asked for
    assert time.monotonic() - start < 2


def test_d17_changed_and_deleted(tmp_path):
    def replace(path: Path) -> None:
        os.replace(write(path.with_name("other"), GOOD * 500), path)

    changes = {
        "changed": lambda path: write(path, GOOD * 501),
        "changed while": replace,
        "deleted": Path.unlink,
    }
    for said, change in changes.items():
        for faults in (None, Faults(1.0)):
            path = write(tmp_path / "a.jsonl", GOOD * 500)
            rows = iterate_records(path, faults)
            next(rows)
            change(path)
            with pytest.raises(DataError, match=rf"a\.jsonl (was )?{said}"):
                list(rows)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_d17_unreadable(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    path.chmod(0)
    refused(path, "cannot be read: Permission denied")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400", '{"a": 1, "a": 2}'])
def test_d18_numbers_and_keys(tmp_path, value):
    path = write(tmp_path / "a.jsonl", GOOD + '{"prompt": "a", "completion": "b", "x": ' + value + "}\n" + GOOD)
    refused(path, "stands twice" if value.startswith("{") else f"{value} is no JSON value", line=2)
    assert len(skipped(path)[0]) == 2
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": ' + value + "}}"}
    path = write(tmp_path / "b.jsonl", json.dumps({"conversations": [{"from": "human", "value": "a"}, call]}))
    refused(path, "turn 2 should be JSON in a text but is not", line=1)


def test_d18_numbers_in_parquet(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=["a", "b", "c"], x=[1.0, float("nan"), float("inf")])
    refused(path, "'x' is nan", line=2)
    rows, faults = skipped(path)
    assert rows == [{"text": "a", "x": 1.0}]
    assert faults.count == 2


def test_d19_gzip(tmp_path, monkeypatch):
    whole = gzip.compress((GOOD * 5000).encode(), 1)
    path = write(tmp_path / "cut.jsonl.gz", whole[:-300])
    message = refused(path, "the gzip content is cut off", "again")
    line = int(message.split(":")[1])
    assert 2000 < line <= 5000
    with pytest.raises(DataError, match="cut off"):
        skipped(path)
    damaged = bytearray(whole)
    damaged[-6] ^= 0xFF  # in the checksum
    path = write(tmp_path / "damaged.jsonl.gz", bytes(damaged))
    refused(path, "damaged gzip (CRC check failed", line=5001)
    with pytest.raises(DataError, match="damaged gzip"):
        skipped(path)
    refused(write(tmp_path / "b.jsonl.gz", whole[:2000] + b"junk" * 9 + whole[2036:]), "b.jsonl.gz:")
    assert len(read_records(write(tmp_path / "two.jsonl.gz", whole + whole))) == 10_000
    monkeypatch.setattr(lines, "BOMB_BYTES", 1_000_000)
    long = json.dumps({"prompt": "a" * 5000, "completion": "b"}) + "\n"
    bomb = gzip.compress(long.encode() * 3000)  # 15 MB, several hundred to one
    path = write(tmp_path / "bomb.jsonl.gz", bomb)
    refused(path, "more than 200 times its size", "unpack the file yourself")
    random_text = GOOD.encode() + json.dumps({"prompt": os.urandom(700_000).hex(), "completion": "b"}).encode()
    assert len(read_records(write(tmp_path / "dense.jsonl.gz", gzip.compress(random_text)))) == 2


def test_d19_gzip_of_one_line_stays_small(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "' + b"x" * 60_000_000, 1))
    tracemalloc.start()
    try:
        refused(path, "a line of more than 20 MB", line=1)
        assert tracemalloc.get_traced_memory()[1] < 70_000_000
    finally:
        tracemalloc.stop()


def test_d19_parquet(tmp_path):
    import pickle

    path = parquet(tmp_path / "a.parquet", prompt=["a"], completion=["b"], blob=[pickle.dumps({1: 2})])
    refused(path, "the column 'blob' holds bytes, such as pictures or pickled objects", "without this column", line=1)
    nested = [[{"bytes": b"x"}]]
    refused(parquet(tmp_path / "b.parquet", text=["a"], picture=nested), "the column 'picture' holds bytes", line=1)
    whole = parquet(tmp_path / "c.parquet", text=["a" * 500] * 50).read_bytes()
    refused(write(tmp_path / "c.parquet", whole[:-40]), "Parquet that cannot be read", line=1)


def test_a_json_array_that_is_too_large_to_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonrows, "MAX_WHOLE", 1_000_000)
    lines = ["[", *[f'{{"text": "row {number} {"x" * 90}"}},' for number in range(10_000)]]
    path = write(tmp_path / "a.json", "\n".join(lines)[:-1] + "\n]\n")
    size = int(refused(path, "a JSON array of more than 1 MB", "one JSON object per line (.jsonl)").split(":")[1])
    assert 8_000 < size < 10_000  # the line that was one too many: the rest is not read
    monkeypatch.setattr(jsonrows, "MAX_WHOLE", 2_000_000)
    assert len(read_records(path)) == 10_000


def test_d19_parquet_that_is_a_bomb(tmp_path, monkeypatch):
    from graft.reading import parquet as reading

    def written(name, texts, **how):
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / name, compression="zstd", **how)
        return tmp_path / name

    for name in ("BOMB_BYTES", "_BATCH_BYTES"):
        monkeypatch.setattr(reading, name, 4_000_000)
    once = written("a.parquet", ["x" * 8_000_000], use_dictionary=False)
    # One text of 100 kB that 5,000 rows have: 500 MB of 10 kB.
    often = written("b.parquet", ["x" * 100_000] * 5_000)
    sizes = []
    original = reading._check_size
    monkeypatch.setattr(reading, "_check_size", lambda path, *given: sizes.append(given[1]) or original(path, *given))
    for path, row in ((once, 1), (often, 40)):  # 39 rows are decoded together
        assert path.stat().st_size < 40_000
        refused(path, "Parquet that unpacks to more than 200 times its size", "JSONL", line=row)
    assert max(sizes) < 9_000_000
    kept = written("c.parquet", [random_words(200) for _ in range(500)] + ["the same"] * 3_000)
    assert len(read_records(kept)) == 3_500


def random_words(count):
    return " ".join(random.choice(("sea", "sky", "wide", "blue", "deep", str(random.random()))) for _ in range(count))


def test_d19_parquet_values(tmp_path):
    import datetime
    import decimal

    path = parquet(
        tmp_path / "a.parquet",
        messages=[[{"role": "user", "content": "a", "tool_calls": None}, {"role": "assistant", "content": "b"}]],
        day=[datetime.date(2024, 1, 2)],
        price=[decimal.Decimal("1.50")],
        kind=pyarrow.array(["x"]).dictionary_encode(),
        tags=[["p", "q"]],
    )
    (row,) = read_rows_of(path, {})[1]
    assert [turn.content for turn in row.messages] == ["a", "b"]
    assert row.fields == {"day": "2024-01-02", "price": "1.50", "kind": "x", "tags": ["p", "q"]}
    assert row.place == f"{path}:1"


def test_d19_parquet_without_pyarrow(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", text=["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'graft-tuning\[parquet\]'"):
        read_records(path)


def test_d20_unusual_text(tmp_path):
    texts = ["שלום עולם", "a\u200bb\u202e", "😀👩‍👩‍👧", "x" * 100_000, "a\r\nb", "x\u2028 \x85", "\ufeffa"]
    content = "\r\n".join(json.dumps({"prompt": text, "completion": text}, ensure_ascii=False) for text in texts)
    rows = list(read_rows_of(write(tmp_path / "a.jsonl", content), {})[1])
    assert [row.answer for row in rows] == texts
    path = parquet(tmp_path / "a.parquet", prompt=texts, completion=texts)
    assert [row.answer for row in read_rows_of(path, {})[1]] == texts
    kept = [text for text in texts if "\r" not in text]
    path = write(tmp_path / "a.txt", codecs.BOM_UTF8 + "\r\n\r\n".join(kept).encode())
    assert [record.fields["text"] for record in read_records(path)] == kept
    shown = refused(
        write(tmp_path / "b.jsonl", messages(("user", "\u202e\x1b[31m"), ("user", "\u202e\x1b[31m"))), "user"
    )
    assert "\u202e" not in shown
    assert "\x1b" not in shown


# Sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.jsonl.gz", "utf16.jsonl", "a.parquet"])
def test_large_files_are_read_in_little_memory(tmp_path, name):
    path, count, long = tmp_path / name, 10_000, "word " * 400
    if name == "a.parquet":
        texts = pyarrow.array([f"{n} {long}" for n in range(count)])
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=1000)
    else:
        line = {".csv": f"{long}\n", ".txt": f"{long}\n\n"}.get(path.suffix, json.dumps({"text": long}) + "\n")
        content = ("text\n" if path.suffix == ".csv" else "") + line * count
        encoded = content.encode("utf-16" if name.startswith("utf16") else "utf-8")
        write(path, gzip.compress(encoded, 1) if path.suffix == ".gz" else encoded)
        del content, encoded
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows_of(path, {}, wanted="text")[1]) == count
        assert tracemalloc.get_traced_memory()[1] < 6_000_000  # of 20 MB
    finally:
        tracemalloc.stop()


def test_faults_are_counted_beyond_those_that_are_kept(tmp_path):
    path = write(tmp_path / "a.jsonl", "x\n" * 50 + GOOD * 50)
    faults = Faults(0.5, keep=10)
    assert len(list(iterate_records(path, faults))) == 50
    assert (faults.count, len(faults.rows)) == (50, 10)
    faults.check(path, 100)
    with pytest.raises(
        DataError, match=r"a\.jsonl: 50 of 99 rows are bad, at most 50\.00% may be: line 1: .*line 3: .*…"
    ):
        faults.check(path, 99)
    one = Faults(0.0)
    one.check(path, 100)
    one.add("f:1", "y")
    with pytest.raises(DataError, match="1 of 100 rows are bad, none may be: line 1: y; correct"):
        one.check(path, 100)
    with pytest.raises(DataError, match="allowed are 0 to 1"):
        Faults(5)


# Whatever bytes there are -------------------------------------------------------------------------

SEEDS = [
    (GOOD + messages(("user", "a"), ("assistant", "b"))).encode(),
    json.dumps({"conversations": [{"from": "human", "value": "é"}, {"from": "gpt", "value": "😀"}]}).encode(),
    b'prompt,chosen,rejected\n"a ""b""\nc",d,e\n',
    ('{"text": "a"}\n' * 3).encode("utf-16"),
    gzip.compress(GOOD.encode() * 3),
    f'[{GOOD}, {{"prompt": "a", "completion": "b", "label": true}}]'.encode(),
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    content = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        piece = draw(
            st.binary(max_size=3) | st.sampled_from([b'"', b"{", b"]", b"\n", b"null", b"\\ud800", b"\0", b"1e999"])
        )
        content[at : at + draw(st.integers(0, 5))] = piece
    return bytes(content)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".txt", ".parquet"])
def test_any_bytes_are_read_or_refused(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    counts = {"read": 0, "refused": 0}
    told: list[str] = []

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(st.binary(max_size=80) | mutated())
    def check(content):
        write(path, content)
        for faults in (None, Faults(1.0)):
            try:
                rows = list(read_rows_of(path, {}, faults)[1])
                counts["read"] += 1
                for row in rows:
                    repr(row).encode()
            except GraftError as error:
                counts["refused"] += 1
                told.append(str(error))

    check()
    assert counts["refused"] > 60
    assert all("\n" not in message and message.encode() for message in told)
    assert counts["read"] > 0 or suffix == ".parquet"


KEYS = [
    "role", "from", "content", "value", "messages", "tool_calls", "function", "name", "arguments", "id", "train",
    "weight", "type", "text", "tools", "system", "prompt", "completion", "chosen", "rejected", "label", "history",
    "instruction", "output", "conversations", "task",
]  # fmt: skip


def test_any_json_is_read_or_refused():
    scalar = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4)
    keys = st.sampled_from(KEYS)
    roles = st.sampled_from(["user", "assistant", "tool", "function_call", "system"])
    value = st.recursive(
        scalar | roles,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=12,
    )
    seen: list[str] = []
    told: list[str] = []

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(st.dictionaries(keys, value, min_size=1, max_size=6))
    def check(fields):
        record = files.Record(fields, "f:1")
        for name in (None, "messages", "preference", "unpaired-preference", "alpaca", "prompt-completion"):
            try:
                read_row(record, recognize([record], {}, name))
                seen.append("read")
            except DataError as error:
                seen.append("refused")
                told.append(str(error))

    check()
    assert all("\n" not in message for message in told)
    assert seen.count("refused") > 300
