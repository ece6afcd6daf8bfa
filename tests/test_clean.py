"""Cleaning, splitting and converting: what is dropped is kept beside, and doing it twice changes nothing."""

import csv
import gzip
import json
import random
import subprocess
import sys
from dataclasses import asdict

import hypothesis
import pytest
from hypothesis import strategies as st
from test_check import PLANTED, chat, clean_chat, sentences
from tiny import rows, write_rows

from graft.curation.check import check
from graft.curation.clean import PII, RULES, clean, policy
from graft.curation.convert import convert, split
from graft.errors import DataError, ResourceError, UsageError
from graft.reading.files import iterate_records


def read(path) -> list[dict]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in content.decode().splitlines()]


def dropped(path) -> list[tuple[str, str]]:
    return [
        (row["place"].rpartition(":")[2], row["rule"]) for row in read(path.with_name(path.name + ".dropped.jsonl"))
    ]


def messy(count: int = 60) -> list[dict]:
    """Clean rows, and copies, near copies, contradictions and every planted fault among them."""
    given = clean_chat(count)
    first = given[0]["messages"]
    question, answer = (turn["content"] for turn in first)
    extra = [
        *PLANTED.values(),
        {"id": 7, "more": [1, None, 1e30], **given[0]},
        chat(question + "!", answer.upper()),
        chat(question, "Another answer that is not like the first at all."),
        chat("lost \ufffd letters", "A word."),
        {"messages": [{"role": "user", "content": "no answer"}]},
    ]
    mixed = given[1:] + extra
    random.Random(4).shuffle(mixed)
    return [given[0], *mixed]


def test_the_defaults(tmp_path):
    given = messy()
    path = write_rows(tmp_path / "a.jsonl", given)
    out = tmp_path / "out.jsonl"
    result = clean(str(path), out)
    assert result.dropped == {
        "unreadable": 1,
        "empty": 1,
        "refusals": 1,
        "mojibake": 1,
        "duplicates": 1,
        "near-duplicates": 1,
    }
    assert (result.rows, result.kept, result.repaired, result.personal) == (75, 69, 1, 1)
    assert result.rows == result.kept + sum(result.dropped.values())
    written = read(out)
    assert len(written) == 69
    assert chat("Où est le café ?", "L’hôtel est à gauche.") in written
    kept = [row for row in given if row in written]
    assert [row for row in written if row in kept] == kept  # the order and every field stay
    assert len(kept) == 68
    told = read(tmp_path / "out.jsonl.dropped.jsonl")
    assert [row["place"] for row in told] == sorted((row["place"] for row in told), key=lambda p: int(p.split(":")[-1]))
    for row in told:
        assert row["reason"]
        assert row["row"] == given[int(row["place"].rpartition(":")[2]) - 1]
    likes = {row["rule"]: row["duplicates"] for row in told if "duplicates" in row}
    assert likes == {"duplicates": f"{path}:1", "near-duplicates": f"{path}:1"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pii": "mask"},
        {"pii": "drop", "drop": list(RULES)},
        {"keep": ["duplicates", "near-duplicates"]},
        {"drop": ["conflicts"]},
    ],
)
def test_cleaning_twice_changes_nothing(tmp_path, options):
    path = write_rows(tmp_path / "a.jsonl", messy())
    chosen = policy(**options)
    outs = [tmp_path / f"{n}.jsonl" for n in range(3)]
    first = clean(str(path), outs[0], chosen)
    again = clean(str(path), outs[1], chosen)
    assert first.dropped
    assert outs[0].read_bytes() == outs[1].read_bytes()
    beside = [tmp_path / f"{n}.jsonl.dropped.jsonl" for n in range(3)]
    assert beside[0].read_bytes() == beside[1].read_bytes()
    assert asdict(again) | {"target": "", "dropped_file": ""} == asdict(first) | {"target": "", "dropped_file": ""}
    last = clean(str(outs[0]), outs[2], chosen)
    assert last.dropped == {}
    assert (last.repaired, last.masked, last.dropped_file) == (0, 0, "")
    assert outs[2].read_bytes() == outs[0].read_bytes()
    assert not beside[2].exists()


def test_crowded_rows_are_clean_after_one_pass(tmp_path):
    """Rows of one pattern hide from each other in crowded bands; what is left is compared until nothing is near."""
    words = random.Random(2)
    names = ["".join(words.choices("abcdef", k=5)) for _ in range(900)]
    texts = [{"text": f"Please find the one and only root of the thing {name} and explain it"} for name in names]
    out = tmp_path / "out.jsonl"
    result = clean(str(write_rows(tmp_path / "a.jsonl", texts)), out)
    assert result.dropped["near-duplicates"] > 20
    assert clean(str(out), tmp_path / "again.jsonl").dropped == {}


@pytest.mark.parametrize("rule", [name for name in PLANTED if name not in ("mojibake", "personal")])
def test_a_rule_can_be_chosen(tmp_path, rule):
    path = write_rows(tmp_path / "a.jsonl", [*clean_chat(10), PLANTED[rule]])
    clean(str(path), tmp_path / "drop.jsonl", policy(drop=[rule]))
    assert dropped(tmp_path / "drop.jsonl") == [("11", rule)]
    result = clean(str(path), tmp_path / "keep.jsonl", policy(keep=[rule]))
    assert result.kept == 11


def test_personal_data(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [*clean_chat(10), {"note": "ask jim@mailhouse.org", **PLANTED["personal"]}])
    assert clean(str(path), tmp_path / "keep.jsonl").personal == 1
    masked = clean(str(path), tmp_path / "mask.jsonl", policy(pii="mask"))
    assert (masked.masked, masked.personal, masked.kept) == (1, 0, 11)
    last = read(tmp_path / "mask.jsonl")[-1]
    assert last["messages"][1]["content"] == "Write to [e-mail] or call [phone]."
    assert last["note"] == "ask [e-mail]"
    assert clean(str(path), tmp_path / "drop.jsonl", policy(pii="drop")).dropped == {"personal": 1}


def test_overlap_with_a_test_file(tmp_path):
    given = clean_chat(30)
    test = write_rows(tmp_path / "test.jsonl", [given[4], chat(given[9]["messages"][0]["content"], "Something else.")])
    out = tmp_path / "out.jsonl"
    path = write_rows(tmp_path / "a.jsonl", given)
    result = clean(str(path), out, policy(test=str(test)))
    assert result.dropped == {"overlap": 2}
    assert dropped(out) == [("5", "overlap"), ("10", "overlap")]
    assert read(tmp_path / "out.jsonl.dropped.jsonl")[0]["duplicates"] == f"{test}:1"
    assert clean(str(out), tmp_path / "b.jsonl", policy(test=str(test))).dropped == {}


def test_rows_that_are_no_json_are_kept_beside_as_they_stand(tmp_path):
    path = tmp_path / "a.jsonl"
    long = '{"messages": [{"role": "user", "content": "' + "x" * 500
    path.write_bytes(
        b"".join(json.dumps(row).encode() + b"\n" for row in clean_chat(5)) + long.encode() + b"\n\xff\xfe{\n"
    )
    result = clean(str(path), tmp_path / "out.jsonl")
    assert result.dropped == {"unreadable": 2}
    told = read(tmp_path / "out.jsonl.dropped.jsonl")
    assert [row["row"] for row in told] == [long, "\\xff\\xfe{"]


def test_elements_of_an_array_on_one_line(tmp_path):
    good = ['{"instruction": "a b c", "output": "e f"}', '{"instruction": "j k l", "output": "m n o"}']
    bad = ["5", '{"instruction": "x", "instruction": "x", "output":"y"}', '{"instruction": "z", "output": null}']
    path = tmp_path / "a.json"
    path.write_text(f"[{good[0]}, {bad[0]}, {bad[1]}, {good[1]}, {bad[2]}]")
    result = clean(str(path), tmp_path / "out.jsonl")
    assert (result.rows, result.kept, result.dropped) == (5, 2, {"unreadable": 3})
    told = [(row["place"], row["row"]) for row in read(tmp_path / "out.jsonl.dropped.jsonl")]
    assert told == [
        (f"{path}:1[2]", bad[0]),
        (f"{path}:1[3]", bad[1]),
        (f"{path}:1[5]", {"instruction": "z", "output": None}),
    ]
    path.write_text("[" + ", ".join([good[0]] * 11) + "]")
    assert clean(str(path), tmp_path / "b.jsonl").dropped == {"duplicates": 10}
    places = [row["place"] for row in read(tmp_path / "b.jsonl.dropped.jsonl")]
    assert places == [f"{path}:1[{number}]" for number in range(2, 12)]


def test_a_broken_row_over_several_lines_of_an_array_is_kept_whole(tmp_path):
    broken = '{"text": "one",\n "text": "two"}'
    path = tmp_path / "a.json"
    path.write_text('[{"text": "A row."},\n' + broken + "\n]")
    assert clean(str(path), tmp_path / "out.jsonl").rows == 2
    assert [(r["place"], r["row"]) for r in read(tmp_path / "out.jsonl.dropped.jsonl")] == [(f"{path}:2", broken)]


def test_an_array_that_is_cut_off_keeps_no_good_row_as_a_bad_one(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "A row."}, {"text": "Some other, and many more words than that."}')
    assert clean(str(path), tmp_path / "out.jsonl").kept == 2
    told = read(tmp_path / "out.jsonl.dropped.jsonl")
    assert [(row["place"], row["reason"]) for row in told] == [(f"{path}:1[3]", "the JSON array is cut off")]
    assert "A row" not in told[0]["row"]
    assert "words" in told[0]["row"]


FINE = [
    ("Which operator multiplies in C?", "*"),
    ("Which keyword is the empty reference of Java?", "null"),
    ("What sign ends a sentence?", "."),
    ("Who are you?", "I am an AI researcher at a university in Berlin, and I work on protein folding."),
    ("What is GPT-3?", "GPT-3 is best described as a large language model that was trained in 2020."),
    ("Translate: I cannot go", "Lo siento, no puedo ir a la fiesta porque tengo que trabajar."),
    ("Say it politely: no", "I can't help you move on Saturday, but Sunday works well for me."),
    ("Complete the dialogue", '"I won\'t discuss it any further," said Anna, and closed the door behind her.'),
    ("What is a float that is not a number in Python?", "nan"),
]


def test_good_rows_that_look_odd_stay(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [chat(*pair) for pair in FINE])
    assert clean(str(path), tmp_path / "out.jsonl").dropped == {}
    finding = check(str(path)).finding("placeholders")
    assert (finding.count, finding.severity) == (4, "warning")
    dropping = clean(str(path), tmp_path / "b.jsonl", policy(drop=["placeholders"]))
    assert dropping.dropped == {"placeholders": 4}


RULE = "It is{}allowed to enter the laboratory without any glasses during the tests that take place on the {} floor."
LETTER = "Dear {}, we kindly remind you that the book you borrowed from our library is overdue. Please return it soon."


@pytest.mark.parametrize(
    "texts",
    [
        [RULE.format(no, floor) for no in (" ", " not ", " never ") for floor in ("first", "second", "third")],
        [LETTER.format(name) for name in ("Anna", "Bert", "Carl", "Dora", "NASA", "ESA", "Émile", "Анна")],
        [f"Everybody in the house knows that we do{no} want to go to the sea in summer." for no in ("", "n't")],
        [f"We will need at least {n} of the large boxes in the cellar for the move." for n in ("two", "ten", "twelve")],
        [f"Der Zug nach Norden hat heute{no} Verspätung gehabt, sagt die Bahn am Abend." for no in (" keine", "")],
        [
            f"Je {a}mange{b} de poisson le vendredi soir à la maison avec toute la famille et les amis du quartier."
            for a, b in (("", ""), ("ne ", " pas"))
        ],
        [
            f"Los niños del pueblo{no} juegan en la plaza grande por la tarde con sus amigos."
            for no in ("", " no", " nunca")
        ],
        [
            "我们明天下午要去公园里散步然后一起吃晚饭再看电影最后回家睡觉休息第二天早上再去学校上课读书写字画画唱歌跳舞打球游泳爬山骑车跑步",
            "我们明天下午不要去公园里散步然后一起吃晚饭再看电影最后回家睡觉休息第二天早上再去学校上课读书写字画画唱歌跳舞打球游泳爬山骑车跑步",
        ],
    ],
)
def test_rows_that_differ_in_what_they_say_are_no_near_duplicates(tmp_path, texts):
    path = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    assert clean(str(path), tmp_path / "out.jsonl").dropped == {}
    small = [{"text": text.lower() + "!"} for text in texts]  # case and signs alone make no other row
    path = write_rows(tmp_path / "b.jsonl", [*({"text": text} for text in texts), *small])
    assert clean(str(path), tmp_path / "both.jsonl").dropped == {"near-duplicates": len(texts)}


def test_turns_that_bear_loss_and_tools_make_another_row(tmp_path):
    def row(train: bool | None, tools: list | None = None) -> dict:
        answer = {"role": "assistant", "content": "A good day to you."} | ({} if train is None else {"train": train})
        return {"messages": [{"role": "user", "content": "Hello there"}, answer]} | ({"tools": tools} if tools else {})

    tool = {"type": "function", "function": {"name": "greet", "parameters": {}}}
    given = [row(False), row(True), row(None, [tool]), row(True)]
    path = write_rows(tmp_path / "a.jsonl", given)
    assert clean(str(path), tmp_path / "out.jsonl").dropped == {"duplicates": 1}
    assert read(tmp_path / "out.jsonl") == given[:3]


HARD = st.text(
    st.sampled_from(list("Ãâ€™©Â ðŸ˜€ñé»…Ð¿Ñ€ab1234567890+.@-()\u200b\ufffd\x07\nA")), min_size=1, max_size=40
)
PAIRS = st.tuples(HARD, HARD | st.sampled_from(["...", "I cannot help with that.", "jo@mail.org", "nan", "Paris."]))


@hypothesis.settings(
    max_examples=60, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(given=st.lists(PAIRS, min_size=1, max_size=8), pii=st.sampled_from(PII), everything=st.booleans())
def test_any_text_is_clean_after_one_pass(tmp_path, given, pii, everything):
    path = write_rows(tmp_path / "a.jsonl", [chat(*pair) for pair in given])
    outs = [tmp_path / "b.jsonl", tmp_path / "c.jsonl"]
    chosen = policy(drop=list(RULES) if everything else (), pii=pii)
    try:
        result = clean(str(path), outs[0], chosen, force=True)
    except DataError:
        return
    assert result.kept + sum(result.dropped.values()) == result.rows == len(given)
    again = clean(str(outs[0]), outs[1], chosen, force=True)
    assert (again.dropped, again.repaired, again.masked) == ({}, 0, 0)
    assert outs[0].read_bytes() == outs[1].read_bytes()
    check(str(path))


def test_half_surrogate_pairs_are_kept_as_escapes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "A row.", "more": "\\udc00"}\n{"text": "\\ud800"}\n')
    assert clean(str(path), tmp_path / "b.jsonl").dropped == {"unreadable": 1}
    assert read(tmp_path / "b.jsonl.dropped.jsonl")[0]["row"] == {"text": "\ud800"}
    assert clean(str(tmp_path / "b.jsonl"), tmp_path / "c.jsonl").kept == 1
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "c.jsonl").read_bytes()
    with pytest.raises(DataError, match="half a surrogate pair"):
        clean(str(path), tmp_path / "d.csv")
    assert not list(tmp_path.glob("d.csv*"))


# D16: nothing left -----------------------------------------------------------------------------------


def test_nothing_left_writes_nothing(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [PLANTED["refusals"], PLANTED["empty"]])
    with pytest.raises(DataError, match="no row is left of 2"):
        clean(str(path), tmp_path / "out.jsonl")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.jsonl"]


def test_one_row_and_all_the_same(tmp_path):
    one = write_rows(tmp_path / "one.jsonl", clean_chat(1))
    assert clean(str(one), tmp_path / "one_out.jsonl").kept == 1
    same = write_rows(tmp_path / "same.jsonl", clean_chat(1) * 50)
    assert clean(str(same), tmp_path / "same_out.jsonl").dropped == {"duplicates": 49}
    assert (tmp_path / "same_out.jsonl").read_bytes() == (tmp_path / "one_out.jsonl").read_bytes()


# Outputs ------------------------------------------------------------------------------------------------


def test_tables(tmp_path):
    given = rows(30, 1)
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["label", "text", "remark"])
        writer.writeheader()
        writer.writerows([row | {"remark": 'say "so",\nthen'} for row in [*given, given[0]]])
    outs = [tmp_path / name for name in ("b.csv", "c.csv.gz", "d.jsonl", "e.tsv", "f.csv.gz")]
    for out in outs:
        assert clean(str(path), out).kept == 30
    assert outs[0].read_text().startswith("label,text,remark\n")
    assert gzip.decompress(outs[1].read_bytes()) == outs[0].read_bytes()
    assert outs[1].read_bytes() == outs[4].read_bytes()
    assert read(outs[2])[0]["remark"] == 'say "so",\nthen'
    again = tmp_path / "again.csv"
    assert clean(str(outs[0]), again).dropped == {}
    assert again.read_bytes() == outs[0].read_bytes()


CELLS = ["a\rb", "a\nb", "a\r\nb", 'say "so"', '"', "a,b", "a\tb", "a;b|c", "\r", " padded ", "", '"\r,\n\t"', "'"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz"])
def test_every_cell_comes_back(tmp_path, kind):
    given = [{"text": f"row {n}", "label": "ab"[n % 2], "re\rmark": cell} for n, cell in enumerate(CELLS)]
    given += [{"text": cell, "label": "a", "re\rmark": "x"} for cell in CELLS if cell.strip()]
    path = write_rows(tmp_path / "a.jsonl", given)
    table = tmp_path / f"b.{kind}"
    clean(str(path), table, policy(keep=list(RULES)))
    clean(str(table), tmp_path / "c.jsonl", policy(keep=list(RULES)))
    assert read(tmp_path / "c.jsonl") == given
    convert(str(path), tmp_path / f"d.{kind}")
    assert [row.fields["text"] for row in iterate_records(tmp_path / f"d.{kind}")] == [row["text"] for row in given]


def test_a_table_of_one_column(tmp_path):
    given = [{"text": cell} for cell in CELLS if cell.strip()]
    assert len(given) > 8
    clean(str(write_rows(tmp_path / "a.jsonl", given)), tmp_path / "b.csv", policy(keep=list(RULES)))
    assert [row.fields for row in iterate_records(tmp_path / "b.csv")] == given


def test_turns_do_not_fit_a_table(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", clean_chat(5))
    with pytest.raises(DataError, match="'messages' holds a list"):
        clean(str(path), tmp_path / "b.csv")
    assert not (tmp_path / "b.csv").exists()


def test_refused_outputs(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [*clean_chat(5), *clean_chat(1)])
    before = path.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(path)
    for out in (path, tmp_path / "link.jsonl"):
        with pytest.raises(UsageError, match="is read as well"):
            clean(str(path), out, force=True)
    with pytest.raises(UsageError, match=r"none of \.jsonl"):
        clean(str(path), tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        clean(str(path), tmp_path / "c.jsonl", force=True)
    out = tmp_path / "d.jsonl"
    out.write_text("old")
    with pytest.raises(UsageError, match="there already; remove it, or replace it with --force"):
        clean(str(path), out)
    assert (out.read_text(), path.read_bytes()) == ("old", before)
    assert clean(str(path), out, force=True).kept == 5
    assert clean(str(write_rows(tmp_path / "e.jsonl", clean_chat(5))), out, force=True).dropped == {}
    assert not (tmp_path / "d.jsonl.dropped.jsonl").exists()  # it told of another cleaning


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", clean_chat(5))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("graft.curation.writing.os.fsync", full)
    with pytest.raises(ResourceError, match=r"out\.jsonl cannot be written \(No space left on device\)"):
        clean(str(path), tmp_path / "out.jsonl")
    assert [item.name for item in tmp_path.iterdir()] == ["a.jsonl"]


def test_unknown_rules():
    with pytest.raises(UsageError, match="did you mean 'duplicates'"):
        policy(drop=["duplicate"])
    with pytest.raises(UsageError, match="to keep and to drop"):
        policy(keep=["cut"], drop=["cut"])
    with pytest.raises(UsageError, match="--pii is 'hide'"):
        policy(pii="hide")


# Split and convert --------------------------------------------------------------------------------------


def test_split(tmp_path):
    texts = sentences(200)
    given = [chat(texts[2 * n], texts[2 * n + 1]) for n in range(100)]
    given += [chat(texts[2 * n].upper(), texts[2 * n + 1] + "!") for n in range(20)]
    path = write_rows(tmp_path / "a.jsonl", given)
    result = split(str(path), tmp_path / "parts", 0.1, 0.2)
    assert result.rows == {"train": 84, "validation": 12, "test": 24}
    assert result.groups == 100
    parts = {name: read(tmp_path / "parts" / f"{name}.jsonl") for name in result.rows}
    for part, there in parts.items():
        assert len(there) == result.rows[part]
        assert [row for row in given if row in there] == there
    for n in range(20):
        assert sum(given[n] in part and given[100 + n] in part for part in parts.values()) == 1
    assert check(str(tmp_path / "parts/train.jsonl")).errors == ()
    with pytest.raises(UsageError, match="there already"):
        split(str(path), tmp_path / "parts")
    shuffled = write_rows(tmp_path / "b.jsonl", given[::-1])
    split(str(shuffled), tmp_path / "parts", 0.1, 0.2, force=True)
    assert read(tmp_path / "parts/test.jsonl") == parts["test"][::-1]
    assert split(str(path), tmp_path / "two", 0, 0.2).rows == {"train": 96, "test": 24}


def test_one_prompt_stays_in_one_part(tmp_path):
    texts = sentences(400)
    given = [chat(texts[n].upper() + "?" * (m + 1), texts[100 + 3 * n + m]) for n in range(100) for m in range(3)]
    path = write_rows(tmp_path / "a.jsonl", given)
    result = split(str(path), tmp_path / "parts", 0.1, 0.2)
    assert result.groups == 100
    asked = {
        part: {row["messages"][0]["content"].rstrip("?") for row in read(tmp_path / "parts" / f"{part}.jsonl")}
        for part in result.rows
    }
    assert sum(map(len, asked.values())) == len(set.union(*asked.values())) == 100
    plain = write_rows(tmp_path / "c.jsonl", [{"text": text} for text in texts])
    assert split(str(plain), tmp_path / "plain").groups == 400


def test_split_faults(tmp_path):
    one = write_rows(tmp_path / "a.jsonl", clean_chat(1))
    for shares in ((0.5, 0.5), (-0.1, 0.2), (0.0, 0.0), (float("nan"), 0.1)):
        with pytest.raises(UsageError, match="--val"):
            split(str(one), tmp_path / "parts", *shares)
    with pytest.raises(DataError, match="no row is left for"):
        split(str(one), tmp_path / "parts")
    bad = write_rows(tmp_path / "b.jsonl", [*clean_chat(20), {"messages": []}])
    with pytest.raises(DataError, match="1 rows cannot be read: line 21"):
        split(str(bad), tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


def test_convert(tmp_path):
    given = clean_chat(6)
    path = write_rows(tmp_path / "a.jsonl", [*given, {"messages": [{"role": "user", "content": "alone"}]}])
    result = convert(str(path), tmp_path / "b.jsonl", "alpaca")
    assert (result.rows, result.format, result.written) == (6, "messages", "alpaca")
    assert [place for place, _ in result.faulty] == [f"{path}:7"]
    back = convert(str(tmp_path / "b.jsonl"), tmp_path / "c.jsonl.gz")
    assert (back.written, back.faulty) == ("messages", ())
    assert [row["messages"] for row in read(tmp_path / "c.jsonl.gz")] == [row["messages"] for row in given]
    convert(str(path), tmp_path / "d.csv", "alpaca")
    assert check(str(tmp_path / "d.csv")).rows == 6


def test_convert_faults(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", clean_chat(6))
    with pytest.raises(UsageError, match="did you mean 'alpaca'"):
        convert(str(path), tmp_path / "b.jsonl", "alpacca")
    with pytest.raises(UsageError, match=r"is a table; write \.jsonl"):
        convert(str(path), tmp_path / "b.csv")
    with pytest.raises(DataError, match="no row of 6 can be written as classification"):
        convert(str(path), tmp_path / "b.jsonl", "classification")
    assert [item.name for item in tmp_path.iterdir()] == ["a.jsonl"]


def test_convert_a_task(tmp_path):
    pytest.importorskip("reasoning_gym")
    result = convert("task:family_relationships:size=12", tmp_path / "a.jsonl", "prompt-completion")
    assert result.rows == 12
    assert len(read(tmp_path / "a.jsonl")) == 12


# The commands ---------------------------------------------------------------------------------------------


def graft(*arguments: object) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "graft", "data", *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, check=False)


def test_commands(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", messy())
    out = tmp_path / "out.jsonl"
    done = graft("clean", path, "-o", out, "--keep", "refusals", "--drop", "conflicts", "--pii", "mask")
    assert (done.returncode, done.stderr) == (0, "")
    assert "69 of 75 rows kept" in done.stdout
    assert "conflicts" in done.stdout
    assert "out.jsonl.dropped.jsonl" in done.stdout
    done = graft("clean", path, "-o", out)
    assert done.returncode == 2
    assert done.stderr == f"graft: {out} is there already; remove it, or replace it with --force\n"
    done = graft("split", out, "-o", tmp_path / "parts", "--json")
    assert json.loads(done.stdout)["rows"]["train"] == 56
    done = graft("convert", path, "-o", tmp_path / "b.jsonl", "--to", "sharegpt")
    assert f"{path}:" in done.stderr
    assert "1 faulty rows left out" in done.stdout
    help_text = graft("clean", "--help").stdout
    for rule in RULES:
        assert rule in help_text
