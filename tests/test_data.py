"""Data: files with every fault, splits without leaks, and the checks of a run's rows."""

import codecs
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_array

from graft import assets
from graft.data.load import DataConfig, Row, load_splits, read_all, read_rows
from graft.errors import DataError, RecipeError
from graft.files import sha256_of
from graft.reading import files
from graft.splits import group_near_equal, normal_form, shingles, split_by_group

COUNTS = {"movie-reviews": 10605, "product-reviews": 3708, "tweets": 4200, "news-editorials": 5190}
GOOD = '{"text": "good", "label": "yes"}\n'
BAD = '{"text": "bad", "label": "no"}\n'


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def labelled(count: int, stem: str = "row") -> str:
    words = random.Random(stem)
    texts = ["".join(words.choices("abcdefghijklmnop ", k=40)) for _ in range(count)]
    rows = [{"text": f"{stem}{n} {text}", "label": n % 2} for n, text in enumerate(texts)]
    return "".join(json.dumps(row) + "\n" for row in rows)


# Files that are read ------------------------------------------------------------------------------

READABLE = {
    "jsonl": ("a.jsonl", GOOD + "\n  \n" + BAD),
    "jsonl without last newline": ("a.jsonl", GOOD + BAD.rstrip()),
    "jsonl named json": ("a.json", GOOD + BAD),
    "array named jsonl": ("a.jsonl", f"[{GOOD},{BAD}]"),
    "pretty array": ("a.json", json.dumps([json.loads(GOOD), json.loads(BAD)], indent=2)),
    "CRLF": ("a.jsonl", (GOOD + BAD).replace("\n", "\r\n")),
    "UTF-8 mark": ("a.jsonl", codecs.BOM_UTF8 + (GOOD + BAD).encode()),
    "UTF-16": ("a.jsonl", (GOOD + BAD).encode("utf-16")),
    "UTF-16 csv": ("a.csv", "text,label\ngood,yes\nbad,no\n".encode("utf-16")),
    "csv": ("a.csv", "text,label\ngood,yes\nbad,no\n"),
    "csv with mark and CRLF": ("a.csv", codecs.BOM_UTF8 + b"text,label\r\ngood,yes\r\nbad,no\r\n"),
    "csv with semicolons": ("a.csv", "text;label\ngood;yes\nbad;no\n"),
    "csv with blank lines": ("a.csv", "\n\ntext,label\n\ngood,yes\nbad,no\n\n"),
    "csv with spaces in the header": ("a.csv", "text , label\ngood,yes\nbad,no\n"),
    "tsv": ("a.tsv", "label\ttext\nyes\tgood\nno\tbad\n"),
    "tsv named csv": ("a.csv", "label\ttext\nyes\tgood\nno\tbad\n"),
    "further columns": ("a.csv", "x,text,label,x2\n1,good,yes,\n2,bad,no,\n"),
}


@pytest.mark.parametrize(("name", "content"), READABLE.values(), ids=READABLE.keys())
def test_readable(tmp_path, name, content):
    rows = read_rows(str(write(tmp_path / name, content)))
    assert [(row.text, row.label) for row in rows] == [("good", "yes"), ("bad", "no")]


def test_places_and_ids(tmp_path):
    path = write(tmp_path / "a.jsonl", "\n" + GOOD + "\n" + '{"id": 7, "text": "x", "label": 1}\n')
    assert [(row.place, row.id) for row in read_rows(str(path))] == [
        (f"{path}:2", "2"),
        (f"{path}:4", "7"),
    ]
    path = write(tmp_path / "a.json", '[\n{"text": "a",\n "label": 1},\n\n{"text": "b", "label": 1}]')
    assert [row.place for row in read_rows(str(path))] == [f"{path}:2", f"{path}:5"]
    path = write(tmp_path / "a.csv", 'text,label\n"two\n\nlines, one ""cell""",x\nb,y\n')
    assert [(row.text, row.place) for row in read_rows(str(path))] == [
        ('two\n\nlines, one "cell"', f"{path}:2"),
        ("b", f"{path}:5"),
    ]


def test_unusual_text_is_kept(tmp_path):
    texts = ["שלום עולם", "a\u200bb", "😀" * 50, "x" * 10_000, "<|im_end|> [INST]", " padded\u2028line "]
    lines = [json.dumps({"text": text, "label": 1}, ensure_ascii=False) + "\n" for text in texts]
    path = write(tmp_path / "a.jsonl", "".join(lines))
    assert [row.text for row in read_rows(str(path))] == texts


def test_columns_and_pairs(tmp_path):
    path = write(tmp_path / "a.csv", "premise,hypothesis,gold\na b,c d,0\ne f,g h,1.0\n")
    columns = {"text": "premise", "text_pair": "hypothesis", "label": "gold"}
    assert read_rows(str(path), columns) == [
        Row("a b", "c d", "0", "2", f"{path}:2"),
        Row("e f", "g h", "1", "3", f"{path}:3"),
    ]
    unlabelled = read_rows(str(path), {"text": "premise"})
    assert [row.label for row in unlabelled] == [None, None]


@pytest.mark.parametrize(
    ("given", "label"),
    [
        ("1", "1"),
        ("1.0", "1"),
        ('"1"', "1"),
        ('" 1.0 "', "1"),
        ("true", "true"),
        ('"None"', "None"),
        ("-2", "-2"),
    ],
)
def test_labels_become_text(tmp_path, given, label):
    path = write(tmp_path / "a.jsonl", f'{{"text": "x", "label": {given}}}\n')
    assert read_rows(str(path))[0].label == label


# Files that are refused ---------------------------------------------------------------------------

FAULTS = {
    "empty file": ("a.jsonl", "", None, "no rows", "at least one row"),
    "blank lines": ("a.jsonl", "\n \n\r\n", None, "no rows", "at least one row"),
    "empty array": ("a.json", "[ ]", None, "no rows", "at least one row"),
    "header only": ("a.csv", "text,label\n", None, "no rows", "at least one row"),
    "cut record": ("a.jsonl", GOOD + GOOD[:15], 2, "cut off", "correct or remove"),
    "cut in a text": ("a.jsonl", GOOD + GOOD + '{"text": "go', 3, "cut off", "correct or remove"),
    "cut array": ("a.json", f"[{GOOD},{BAD}", 3, "cut off", "one JSON object per line"),
    "cut in an array's record": ("a.json", f"[{GOOD},{BAD[:12]}", 2, "cut off", "correct or remove"),
    "no comma": ("a.json", f"[{GOOD}{BAD}]", 2, "comma is missing", "correct the file"),
    "text after array": ("a.json", f"[{GOOD}] x", 2, "after the end", "one JSON object per line"),
    "not JSON": ("a.jsonl", GOOD + "text\n", 2, "not JSON", "correct or remove"),
    "two on a line": ("a.jsonl", GOOD.strip() + GOOD, 1, "more than one", "per line"),
    "list": ("a.jsonl", GOOD + "[1]\n", 2, "a list ([1])", "one JSON object per line"),
    "null row": ("a.jsonl", GOOD + "null\n", 2, "null", "one JSON object per line"),
    "string in array": ("a.json", f'[{GOOD},\n"x"]', 3, "a text ('x')", "one JSON object per line"),
    "missing column": (
        "a.jsonl",
        '{"Sentence": "x", "label": 1}\n',
        1,
        "no column 'text', the row has 'Sentence', 'label'",
        "columns: {text: Sentence}",
    ),
    "other case": ("a.csv", "Text ,label\nx,1\n", 2, "no column 'text'", "columns: {text: Text}"),
    "column later missing": ("a.jsonl", GOOD + '{"text": "x"}', 2, "no column 'label'", "{label: NAME}"),
    "column later added": ("a.jsonl", '{"text": "x"}\n' + GOOD, 2, "has 'label'", "in all rows or in none"),
    "empty text": ("a.jsonl", GOOD + '{"text": " ", "label": 1}', 2, "'text' is empty", "remove the row"),
    "empty cell": ("a.csv", "text,label\nx,1\n,2\n", 3, "'text' is empty", "remove the row"),
    "null text": ("a.jsonl", GOOD + '{"text": null, "label": 1}', 2, "'text' is null", "correct the row"),
    "number as text": ("a.jsonl", GOOD + '{"text": 3, "label": 1}', 2, "a number (3)", "correct the row"),
    "list as text": ("a.jsonl", GOOD + '{"text": ["a"], "label": 1}', 2, "a list (['a'])", "correct the row"),
    "null label": ("a.jsonl", GOOD + '{"text": "x", "label": null}', 2, "'label' is null", "remove the row"),
    "NaN label": ("a.jsonl", GOOD + '{"text": "x", "label": NaN}', 2, "NaN is no JSON", "remove the row"),
    "nan in csv": ("a.csv", "text,label\nx,1\ny,NaN\n", 3, "'NaN'", "whole numbers"),
    "empty label": ("a.csv", "text,label\nx,1\ny,\n", 3, "'label' is empty", "remove the row"),
    "fraction label": ("a.jsonl", GOOD + '{"text": "x", "label": 0.5}', 2, "0.5", "whole numbers"),
    "list label": ("a.jsonl", GOOD + '{"text": "x", "label": [1]}', 2, "a list ([1])", "whole numbers"),
    "infinity": ("a.jsonl", GOOD + '{"text": "x", "label": 1e400}', 2, "1e400", "remove the row"),
    "minus infinity": ("a.jsonl", '{"text": "x", "label": -Infinity}', 1, "-Infinity", "remove the row"),
    "endless number": ("a.jsonl", GOOD + f'{{"label": {"1" * 5000}}}', 2, "5000 digits", "remove the row"),
    "duplicate key": ("a.jsonl", GOOD + '{"text": "x", "text": "y"}', 2, "'text' stands twice", "remove"),
    "deep nesting": ("a.jsonl", GOOD + "[" * 10_000, 2, "nested too deep", "flatten"),
    "deep array": ("a.json", "[" * 10_000, 1, "nested too deep", "flatten"),
    "ragged row": ("a.csv", "text,label\nx,1\ny\n", 3, "1 fields where the header has 2", "put quotes"),
    "unquoted comma": ("a.csv", "text,label\nx, y,1\n", 2, "3 fields where the header has 2", "put quotes"),
    "duplicate header": ("a.csv", "text,label,text\nx,1,y\n", 1, "'text' twice", "its own name"),
    "open quote": ("a.csv", 'text,label\nx,1\n"y,2\nz,3\n', 3, "not CSV", "twice"),
    "lone quote": ("a.tsv", 'text\tlabel\n"x" y\t1\n', 2, "not TSV", "twice"),
    "GBK": ("a.jsonl", GOOD.encode() + '{"text": "你好"}'.encode("gbk"), 2, "0xc4 at position 11", "iconv"),
    "GBK csv": ("a.csv", b"text,label\n" + "你,1".encode("gbk"), 2, "is not UTF-8", "iconv"),
    "surrogate": ("a.jsonl", GOOD + '{"text": "a\\ud83d", "label": 1}', 2, "surrogate", "position 2"),
    "NUL byte": ("a.jsonl", GOOD.encode() + b'{"text": "a\0b"}', 2, "NUL", "UTF-8 without NUL"),
    "NUL escape": ("a.jsonl", GOOD + '{"text": "a\\u0000b", "label": 1}', 2, "NUL", "remove it"),
    "UTF-16 without mark": ("a.jsonl", GOOD.encode("utf-16-le"), 1, "NUL", "UTF-8"),
    "cut UTF-16": ("a.jsonl", (GOOD + BAD).encode("utf-16")[:-1], 2, "damaged UTF-16", "UTF-8"),
    "gzip": ("a.jsonl", b"\x1f\x8b\x08\0", 1, "gzip", "fetch or pack"),
    "parquet": ("a.jsonl", b"PAR1\0", 1, "Parquet", "convert"),
    "other kind": ("a.doc", GOOD, None, "'.doc', allowed are .jsonl, .json, .csv, .tsv, .txt, .parquet", "convert"),
}


@pytest.mark.parametrize(("name", "content", "line", "what", "fix"), FAULTS.values(), ids=FAULTS.keys())
def test_faults(tmp_path, name, content, line, what, fix):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        read_rows(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}:" if line else str(path))
    assert what in message
    assert fix in message
    assert "\n" not in message
    assert len(message) < 400
    assert caught.value.exit_code == 2


def test_places_that_are_no_file(tmp_path):
    write(tmp_path / "train.jsonl", GOOD)
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone")
    cases = {
        tmp_path / "trian.jsonl": ("no such data file", f"did you mean {tmp_path / 'train.jsonl'}?"),
        tmp_path / "other.csv": ("no such data file", "data files in"),
        tmp_path / "no" / "a.csv": ("no such data file", "does not exist either"),
        tmp_path / "folder.jsonl": ("is a folder", "give one file"),
        tmp_path / "pipe.jsonl": ("pipe or device", "plain file"),
        Path("/dev/zero"): ("pipe or device", "plain file"),
        tmp_path / "link.jsonl": ("link to a missing file", "restore"),
        tmp_path / ("n" * 300 + ".jsonl"): ("cannot be read", "check its path"),
        Path("a\0b.jsonl"): ("cannot be read", "check its path"),
    }
    for path, (what, fix) in cases.items():
        with pytest.raises(DataError) as caught:
            read_rows(str(path))
        assert what in str(caught.value)
        assert fix in str(caught.value)


def test_unreadable_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", GOOD)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # tests may run as root, whom no mode stops
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: Permission denied; check its permissions"):
        read_rows(str(path))


def test_file_that_changes_while_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", GOOD)
    original = files._records

    def growing(given: Path, faults: object):
        yield from original(given, faults)
        write(path, GOOD + BAD)

    monkeypatch.setattr(files, "_records", growing)
    with pytest.raises(DataError, match="changed while it was read"):
        read_rows(str(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_endless_line(tmp_path, name):
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(b'{"text": "' if name != "a.csv" else b"text,label\n")
        file.truncate(200_000_000)  # sparse: takes no space
    with pytest.raises(DataError, match=r"a line of more than 20 MB, the most allowed; write one JSON object"):
        read_rows(str(path))


def test_unknown_names():
    with pytest.raises(DataError, match=r"'tweet' is neither starter data nor a file; did you mean 'tweets'\?"):
        read_rows("tweet")
    with pytest.raises(DataError, match="starter model, not data"):
        read_rows("minilm-l6")
    with pytest.raises(DataError, match="no starter data set"):
        read_all("a.jsonl")


# Groups and splits --------------------------------------------------------------------------------


def test_groups_of_near_equal_texts():
    texts = [
        "Damn, running late sucks.",
        "An entirely different sentence about cats.",
        "DAMN! Running late sucks!!",
        ":-)",
        "the plot is thin but the acting carries it all the way through to the end",
        "the plot is thin but the acting carries it all the way through to the ending",
        ":-(",
        "Straße",
        "STRASSE",
        "ok",
        "okay",
    ]
    assert group_near_equal(texts) == [0, 1, 0, 2, 3, 3, 4, 5, 5, 6, 7]
    assert group_near_equal([]) == []
    with pytest.raises(ValueError, match=r"allowed are 0\.5 to 1"):
        group_near_equal(texts, 0.2)


def test_groups_equal_those_of_all_pairs():
    words = random.Random(0)
    base = ["".join(words.choices("abcdefgh", k=60)) for _ in range(60)]
    texts = [text[: 60 - cut] + "z" * cut for text in base for cut in (0, 2, 5, 9, 14)]
    sets = [shingles(normal_form(text)) for text in texts]
    groups = list(range(len(texts)))
    near = 0
    for right in range(len(texts)):
        for left in range(right):
            if len(sets[left] & sets[right]) >= 0.8 * len(sets[left] | sets[right]):
                near += 1
                old, new = groups[right], groups[left]
                groups = [new if group == old else group for group in groups]
    numbers: dict[int, int] = {}
    assert near > 100
    assert group_near_equal(texts) == [numbers.setdefault(group, len(numbers)) for group in groups]


def test_split_does_not_depend_on_order():
    texts = [json.loads(line)["text"] for line in labelled(200).splitlines()]
    texts += [text.upper() + "!" for text in texts[:20]]
    fractions = {"train": 0.7, "validation": 0.1, "test": 0.2}

    def split(given: list[str]) -> dict[str, str]:
        groups = group_near_equal(given)
        return dict(zip(given, split_by_group(groups, fractions, given), strict=True))

    names = split(texts)
    assert names == split(texts[::-1])
    counts = {name: list(names.values()).count(name) for name in fractions}
    assert counts == {"train": 154, "validation": 22, "test": 44}
    assert all(names[text] == names[text.upper() + "!"] for text in texts[:20])


def test_large_group_stays_in_train():
    names = split_by_group([0] * 8 + [1, 2], {"train": 0.8, "test": 0.2}, ["same"] * 8 + ["b", "c"])
    assert names == ["train"] * 8 + ["test"] * 2


# Splits of a run ----------------------------------------------------------------------------------


def test_file_is_split(tmp_path):
    path = str(write(tmp_path / "a.jsonl", labelled(100)))
    splits = load_splits(DataConfig(train=path))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [80, 5, 15]
    assert splits.labels == ("0", "1")
    assert splits.notes == ()
    assert splits.sha256 == {path: sha256_of(Path(path))}
    assert load_splits(DataConfig(train=path)) == splits
    everything = splits.train + splits.validation + splits.test
    assert sorted(row.place for row in everything) == sorted(row.place for row in read_rows(path))


def test_given_files_are_used_whole(tmp_path):
    train, other = (str(write(tmp_path / f"{n}.jsonl", labelled(c, n))) for n, c in (("a", 20), ("b", 10)))
    splits = load_splits(DataConfig(train=train, test=other, val_size=0.1))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [18, 2, 10]
    assert set(splits.sha256) == {train, other}
    third = str(write(tmp_path / "c.jsonl", labelled(6, "c")))
    splits = load_splits(DataConfig(train=train, validation=third, test=other))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [20, 6, 10]


def test_subsets_are_fixed_nested_and_mixed(tmp_path):
    path = str(write(tmp_path / "a.jsonl", labelled(100)))
    whole = load_splits(DataConfig(train=path))
    small = load_splits(DataConfig(train=path, max_train_samples=10, max_eval_samples=3))
    larger = load_splits(DataConfig(train=path, max_train_samples=20))
    assert [len(part) for part in (small.train, small.validation, small.test)] == [10, 3, 3]
    assert small.train != whole.train[:10]
    assert [row for row in larger.train if row in small.train] == small.train
    assert [row for row in whole.train if row in larger.train] == larger.train


def test_notes_on_recurring_texts(tmp_path):
    train = labelled(10) + '{"text": "Same!", "label": 0}\n{"text": "same", "label": 1}\n'
    test = labelled(3) + labelled(3, "new")
    paths = [str(write(tmp_path / f"{n}.jsonl", rows)) for n, rows in enumerate((train, test))]
    splits = load_splits(DataConfig(train=paths[0], validation=paths[1], test=paths[1]))
    assert splits.notes == (
        "1 texts of train stand there with more than one label",
        "3 of 6 rows of validation are also in train",
        "3 of 6 rows of test are also in train",
    )


RARE = labelled(30).replace('"label": 1', '"label": 0') + labelled(9, "rare").replace('"label": 0', '"label": 1')
SPLIT_FAULTS = {
    "one row": (GOOD, {}, "no row is left for train: 1 rows in 1 groups", "add rows"),
    "two rows": (GOOD + BAD, {}, "no row is left for", "add rows, or give files"),
    "all equal": (GOOD * 50, {}, "50 rows in 1 groups", "give files for validation and test"),
    "one label": (labelled(30).replace('"label": 1', '"label": 0'), {}, "have the label '0'", "at least two"),
    "no label": (labelled(30).replace("label", "y"), {}, "no column 'label'", "columns: {label: NAME}"),
    "known other name": (labelled(30).replace("label", "class"), {}, "'class'", "columns: {label: class}"),
    "subset": (RARE, {"max_train_samples": 2}, "max_train_samples=2 leaves rows of one", "give more"),
}


@pytest.mark.parametrize(("rows", "more", "what", "fix"), SPLIT_FAULTS.values(), ids=SPLIT_FAULTS.keys())
def test_split_faults(tmp_path, rows, more, what, fix):
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        load_splits(DataConfig(train=str(path), **more))
    assert what in str(caught.value)
    assert fix in str(caught.value)
    assert str(path) in str(caught.value) or "max_train_samples" in str(caught.value)


def test_label_unseen_in_train(tmp_path):
    train = str(write(tmp_path / "a.jsonl", labelled(30)))
    test = write(tmp_path / "b.jsonl", labelled(4, "b") + GOOD)
    with pytest.raises(DataError) as caught:
        load_splits(DataConfig(train=train, test=str(test)))
    assert f"{test}:5: the label 'yes' of test is in no training row, which have 0, 1" in str(caught.value)
    assert "add rows with it to the training data" in str(caught.value)


def test_training_file_as_test(tmp_path):
    train = str(write(tmp_path / "a.jsonl", labelled(30)))
    copy = str(write(tmp_path / "b.jsonl", labelled(30)))
    for same in (train, copy):
        with pytest.raises(DataError, match=r"same content as train.*leave out `test`"):
            load_splits(DataConfig(train=train, test=same))


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({}, "'train' is missing"),
        ({"train": ""}, "train"),
        ({"train": "a", "val_size": 0}, "val_size: Input should be greater than 0"),
        ({"train": "a", "test_size": 1.5}, "test_size: Input should be less than 1"),
        ({"train": "a", "val_size": float("nan")}, "val_size"),
        ({"train": "a", "val_size": 0.5, "test_size": 0.5}, "their sum has to be below 1"),
        ({"train": "a", "columns": {"txt": "x"}}, "unknown field 'txt', did you mean 'text'?"),
        ({"train": "a", "max_length": 1}, "max_length"),
        ({"train": "a", "max_train_samples": 1}, "max_train_samples"),
        ({"train": "a", "max_eval_samples": 0}, "max_eval_samples"),
        ({"train": "a", "val_siz": 0.1}, "unknown key 'val_siz', did you mean 'val_size'?"),
    ],
)
def test_config_faults(given, what):
    with pytest.raises(RecipeError) as caught:
        DataConfig.parse(given)
    assert what in str(caught.value)


def test_config_aliases():
    for alias, field in DataConfig.aliases.items():
        value = 0.2 if field == "val_size" else 64
        config, notes = DataConfig.parse_with_notes({"train": "a", alias: value})
        assert getattr(config, field) == value
        assert notes == [f"{alias!r} read as {field!r}"]


# The starter data ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTS)
def test_starter_splits_do_not_leak(name):
    """Every evaluation row against every training row, by exact Jaccard, without the index."""
    splits = load_splits(DataConfig(train=name))
    assert splits.labels == ("negative", "positive")
    assert splits.notes == ()
    parts = (splits.train, splits.validation, splits.test)
    sets = [[shingles(normal_form(row.text)) for row in part] for part in parts]
    checked = 0
    for early, late in ((0, 1), (0, 2), (1, 2)):
        checked += len(sets[early]) * len(sets[late])
        assert highest_similarity(sets[early], sets[late]) < 0.8
    assert sum(map(len, parts)) == sum(row.label is not None for row in read_all(name))
    assert checked > 1_000_000


def highest_similarity(left: list[frozenset[str]], right: list[frozenset[str]]) -> float:
    numbers: dict[str, int] = {}

    def matrix(sets: list[frozenset[str]]) -> tuple[list[int], np.ndarray]:
        columns = [numbers.setdefault(piece, len(numbers)) for pieces in sets for piece in sorted(pieces)]
        return columns, np.cumsum([0, *map(len, sets)])

    built = [matrix(left), matrix(right)]
    shape = len(numbers)
    first, second = (
        csr_array((np.ones(len(columns), dtype=np.int32), columns, ends), shape=(len(ends) - 1, shape))
        for columns, ends in built
    )
    shared = (first @ second.T).tocoo()
    sizes = [np.diff(ends) for _, ends in built]
    union = sizes[0][shared.row] + sizes[1][shared.col] - shared.data
    return float(np.max(shared.data / union, initial=0.0))


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_starter_rows(name, count):
    rows = read_all(name)
    assert len(rows) == count
    assert len({row.id for row in rows}) == count
    lines = (assets.folder(name) / "all.jsonl").read_text(encoding="utf-8").splitlines()
    ratings = [json.loads(line)["rating"] for line in lines]
    for row, rating in zip(rows, ratings, strict=True):
        assert -4 <= rating <= 4
        assert row.label == (None if abs(rating) < 0.5 else "positive" if rating > 0 else "negative")
    assert read_rows(name) == [row for row in rows if row.label is not None]


def test_starter_as_test_of_other_data(tmp_path):
    splits = load_splits(DataConfig(train="product-reviews", test="tweets"))
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [2388, 149, 515]
    assert set(splits.sha256) == {
        "product-reviews/train.jsonl",
        "product-reviews/validation.jsonl",
        "tweets/test.jsonl",
    }


# The documentation --------------------------------------------------------------------------------

DOCS = Path(__file__).parents[1] / "docs" / "data.md"


def table(first: str, columns: int) -> list[list[str]]:
    """The cells of the documentation's table whose header starts with the cells in `first`."""
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip(" `").replace(",", "") for cell in line.strip("|").split("|")][:columns])
    return rows


def test_documented_counts():
    rows, splits, groups = table("name | rows", 3), table("name | split", 5), table("name | labelled rows", 5)
    assert [len(rows), len(splits), len(groups)] == [4, 12, 4]
    parts = {name: load_splits(DataConfig(train=name)) for name in COUNTS}
    for name, count, neutral in rows:
        labels = [row.label for row in read_all(name)]
        assert [len(labels), labels.count(None)] == [int(count), int(neutral)]
    for name, split, *counts in splits:
        labels = [row.label for row in getattr(parts[name], split)]
        assert [len(labels), labels.count("negative"), labels.count("positive")] == list(map(int, counts))
    for name, *counts in groups:
        found = group_near_equal([row.text for row in read_rows(name)])
        sizes = np.bincount(found)
        assert [len(found), len(sizes), sum(sizes > 1), sum(sizes[sizes > 1])] == list(map(int, counts))


def test_documented_settings():
    given = dict(table("key | default", 2))
    fields = DataConfig.model_fields
    assert list(given) == list(fields)
    shown = {None: "none", "": ""}
    for key, field in fields.items():
        default = "" if field.is_required() else field.default
        assert given[key] == str(shown.get(default, default) if not isinstance(default, dict) else default)
    text = DOCS.read_text(encoding="utf-8")
    assert all(f"`{alias}`" in text for alias in DataConfig.aliases)
