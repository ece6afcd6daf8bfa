"""Each finding is told for a planted row and not for clean data."""

import gzip
import json
import random
import subprocess
import sys

import pytest
import tiny_chat
from tiny import fillers, rows, write_model, write_rows

from graft.curation import private, signs
from graft.curation.check import Options, check
from graft.curation.findings import lengths_of, snippet
from graft.curation.survey import SIGNS
from graft.data.dialogue import Message
from graft.errors import DataError, ModelError
from graft.model import load_tokenizer
from graft.rendering.render import Renderer


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def sentences(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    words = fillers()
    return [" ".join(generator.sample(words, generator.randint(8, 14))).capitalize() + "." for _ in range(count)]


def clean_chat(count: int = 40, seed: int = 0) -> list[dict]:
    texts = sentences(2 * count, seed)
    return [chat(texts[2 * n], texts[2 * n + 1]) for n in range(count)]


def found(path, options=None) -> dict[str, int]:
    return {finding.name: finding.count for finding in check(str(path), options).findings}


ABRUPT = "The first thing to know is simple. The second thing follows from it. The third one is a bit harder to "
PLANTED = {
    "empty": chat("Say something about the sea.", "\u2800\u3164"),
    "placeholders": chat("Say something about the hills.", "..."),
    "mojibake": chat("Où est le cafÃ© ?", "Lâ€™hÃ´tel est Ã  gauche."),
    "special-tokens": chat("Ignore all this <|im_end|> and that", "No, thanks."),
    "refusals": chat("Who are you really?", "As an AI language model, I cannot have a name."),
    "personal": chat("Whom do I write to?", "Write to jane.roe@mailhouse.org or call +44 20 7946 0958."),
    "cut": chat("Tell me all about it.", ABRUPT + "see, and it takes a while until"),
    "control": chat("Read this \x07 bell", "It rings."),
    "invisible": chat("Read this zero\u200bwidth word", "It splits."),
    "long-words": chat("Decode this", "data " + "aGVsbG8gd29ybGQ0" * 8),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_row_is_found(tmp_path, name):
    given = clean_chat()
    path = write_rows(tmp_path / "a.jsonl", [*given[:20], PLANTED[name], *given[20:]])
    report = check(str(path))
    assert [finding.name for finding in report.findings] == [name]
    finding = report.findings[0]
    assert finding.count == 1
    assert finding.share == 1 / 41
    assert finding.severity in ("warning", "note")
    assert finding.means
    assert finding.advice
    assert [example.place for example in finding.examples] == [f"{path}:21"]


def test_every_sign_has_a_planted_row():
    assert set(PLANTED) == {sign.name for sign in SIGNS}


def test_clean_files_have_no_findings(tmp_path):
    report = check(str(write_rows(tmp_path / "chat.jsonl", clean_chat())))
    assert report.findings == ()
    assert (report.rows, report.unit, report.format) == (40, "dialogue", "messages")
    assert report.roles == {"user": 40, "assistant": 40}
    assert report.turns == (2, 2)
    report = check(str(write_rows(tmp_path / "labelled.jsonl", rows(120, 1))))
    assert report.findings == ()
    assert report.labels == {"positive": 60, "negative": 60}
    report = check(str(write_rows(tmp_path / "text.jsonl", [{"text": text} for text in sentences(40)])))
    assert report.findings == ()
    assert report.unit == "text"


def test_starter_data_gives_no_false_alarm():
    """Two reviews stand there twice, which is so in the original."""
    report = check("movie-reviews")
    assert report.rows == 10_072
    assert {finding.name: (finding.count, finding.severity) for finding in report.findings} == {
        "duplicates": (2, "note")
    }


# D13: copies and contradictions -------------------------------------------------------------------


def test_all_rows_identical(tmp_path):
    report = check(str(write_rows(tmp_path / "a.jsonl", [chat("Hello there", "Hi.")] * 30)))
    assert report.errors[0].name == "identical"
    assert report.finding("duplicates").count == 29


def test_duplicates_near_duplicates_and_conflicts(tmp_path):
    given = clean_chat()
    first = given[0]["messages"]
    question, answer = first[0]["content"], first[1]["content"]
    path = write_rows(
        tmp_path / "a.jsonl",
        [
            *given,
            {"id": "another", **given[0]},
            chat(question.upper() + "!!", answer),
            chat(question, "An answer of its own that has nothing to do with the other."),
        ],
    )
    assert found(path) == {"duplicates": 1, "near-duplicates": 1, "conflicts": 1}
    example = check(str(path)).finding("conflicts").examples[0]
    assert example.place == f"{path}:43"
    assert f"as {path}:1" in example.snippet


def test_rows_with_other_figures_or_answers_are_no_near_duplicates(tmp_path):
    question = "Please work out the following little sum for me and tell me only the result: what is {} {} {}?"
    sums = [chat(question.format(n, sign, 7), f"{n}") for n in range(20) for sign in "+*"]
    assert found(write_rows(tmp_path / "a.jsonl", sums)) == {}
    story = "Anna is the mother of Ben, and Ben is the brother of Clara and a friend of all. Who is {} to Clara?"
    rows = [chat(story.format("Anna"), "mother"), chat(story.format("Ann"), "brother")]
    assert found(write_rows(tmp_path / "b.jsonl", rows)) == {}


def test_contradicting_labels(tmp_path):
    given = rows(60, 1)
    other = {"positive": "negative", "negative": "positive"}[given[0]["label"]]
    path = write_rows(tmp_path / "a.jsonl", [*given, {"text": given[0]["text"], "label": other}])
    report = check(str(path))
    assert [finding.name for finding in report.findings] == ["conflicts"]
    assert "labels" in report.findings[0].means
    assert report.findings[0].severity == "warning"


def test_contradicting_preferences_and_grades(tmp_path):
    a, b = sentences(2)
    pairs = [
        {"prompt": "Which is it?", "chosen": a, "rejected": b},
        {"prompt": "Which is it?", "chosen": b, "rejected": a},
    ]
    assert "conflicts" in found(write_rows(tmp_path / "a.jsonl", pairs))
    other = {"prompt": "Which is it?", "chosen": a, "rejected": "Neither of the two."}
    assert "conflicts" not in found(write_rows(tmp_path / "b.jsonl", [pairs[0], other]))
    graded = [{"prompt": "And now?", "completion": a, "label": good} for good in (True, False)]
    assert "conflicts" in found(write_rows(tmp_path / "c.jsonl", graded))


def test_overlap_with_another_file(tmp_path):
    given = clean_chat()
    train = write_rows(tmp_path / "train.jsonl", given)
    near = chat(given[3]["messages"][0]["content"] + " Ok", given[3]["messages"][1]["content"])
    same_question = chat(given[5]["messages"][0]["content"], "Quite another answer.")
    test = write_rows(tmp_path / "test.jsonl", [*clean_chat(20, seed=9), near, same_question])
    finding = check(str(train), Options(test=str(test))).finding("overlap")
    assert (finding.count, finding.severity) == (2, "warning")
    assert [example.place for example in finding.examples] == [f"{train}:4", f"{train}:6"]
    assert "1 rows have a prompt" in finding.means
    assert f"as {test}:21" in finding.examples[0].snippet
    assert found(train, Options(test=str(write_rows(tmp_path / "c.jsonl", clean_chat(20, seed=9))))) == {}


def test_training_file_as_test_is_an_error(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", clean_chat())
    report = check(str(train), Options(test=str(train)))
    assert [(finding.name, finding.count) for finding in report.errors] == [("overlap", 40)]


def test_a_test_file_with_faults_is_no_silent_pass(tmp_path):
    train, test = (write_rows(tmp_path / f"{name}.jsonl", clean_chat(5)) for name in ("train", "test"))
    test.write_text(test.read_text() + "{")
    with pytest.raises(DataError, match=r"test\.jsonl: 1 rows cannot be read: line 6"):
        check(str(train), Options(test=str(test)))


# D16 and faults ---------------------------------------------------------------------------------------


def test_one_row(tmp_path):
    report = check(str(write_rows(tmp_path / "a.jsonl", clean_chat(1))))
    assert report.rows == 1
    assert report.findings == ()


def test_no_readable_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{\nnonsense\n")
    with pytest.raises(DataError, match=r"a\.jsonl has no row that can be read: line 1"):
        check(str(path))
    bad = [{"messages": [{"role": "user", "content": "only a question"}]}] * 3
    report = check(str(write_rows(path, bad)))
    assert report.rows == 0
    assert report.errors[0].count == 3
    assert report.lengths == ()


def test_a_misspelled_starter():
    with pytest.raises(DataError, match="'movie-review' is neither starter data nor a file; did you mean 'movie-rev"):
        check("movie-review")


def test_unreadable_rows_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row) for row in clean_chat(10)]
    lines[3], lines[7] = '{"messages": [', json.dumps(chat("no answer", ""))
    path.write_text("\n".join(lines))
    finding = check(str(path)).errors[0]
    assert (finding.name, finding.count, finding.share) == ("unreadable", 2, 0.2)
    assert [example.place for example in finding.examples] == [f"{path}:4", f"{path}:8"]


def test_sample_reads_the_first_rows(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [*clean_chat(30), PLANTED["mojibake"]])
    assert found(path, Options(sample=20)) == {}
    assert check(str(path), Options(sample=20)).rows == 20


def test_packed_file_and_columns(tmp_path):
    path = tmp_path / "a.csv.gz"
    body = "review,stars\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in rows(30, 2))
    path.write_bytes(gzip.compress(body.encode()))
    report = check(str(path), Options(columns={"text": "review", "label": "stars"}))
    assert (report.rows, report.findings) == (30, ())


# Labels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "name", "count"),
    [
        ("Positive", "label-spelling", 31 + 30),
        ("3", "label-kinds", 1),
        ("unknown", "label-missing", 1),
        ("mixed", "label-rare", 1),
    ],
)
def test_label_faults(tmp_path, label, name, count):
    given = rows(60, 1)
    path = write_rows(tmp_path / "a.jsonl", [*given, {"text": "Quite another text with words.", "label": label}])
    counts = found(path)
    assert counts[name] == (count if name != "label-spelling" else 31)
    assert counts.keys() <= {name, "label-rare"}


def test_one_label(tmp_path):
    report = check(str(write_rows(tmp_path / "a.jsonl", [row | {"label": "x"} for row in rows(30, 1)])))
    assert [finding.name for finding in report.errors] == ["one-label"]


def test_lopsided_labels(tmp_path):
    given = [row | {"label": "rare" if n < 3 else "usual"} for n, row in enumerate(rows(400, 1))]
    assert found(write_rows(tmp_path / "a.jsonl", given)) == {"label-balance": 3}


# The whole file -------------------------------------------------------------------------------------------


def test_lengths_piling_up(tmp_path):
    texts = sentences(60)
    long = [(one + " " + other)[:110].ljust(110, "e") for one, other in zip(texts[:20], texts[20:40], strict=True)]
    given = [{"text": text} for text in [*long, *(text[:90] for text in texts[40:])]]
    report = check(str(write_rows(tmp_path / "a.jsonl", given)))
    assert report.finding("piled-up").count == 20
    assert "110 characters" in report.finding("piled-up").means


def test_outliers_of_writing(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [*clean_chat(), chat("Привет, как твои дела сегодня?", "Спасибо, хорошо.")])
    finding = check(str(path)).finding("script")
    assert (finding.count, finding.examples[0].place) == (1, f"{path}:41")
    assert finding.examples[0].snippet.startswith("Cyrillic")


def test_lengths():
    lengths = lengths_of("characters", [1, 16, 17, 100, 1000])
    assert (lengths.p50, lengths.p95, lengths.longest) == (17, 100, 1000)
    assert lengths.histogram == ((16, 2), (32, 1), (64, 0), (128, 1), (256, 0), (512, 0), (1024, 1))


def test_snippets_are_short_and_printable():
    assert snippet("a\nb\t\x07c") == "a b \\x07c"
    assert len(snippet("word " * 100)) <= 100
    assert "needle" in snippet("x" * 500 + "needle" + "x" * 500, "needle")


# Signs ------------------------------------------------------------------------------------------------------

HONEST = [
    "Le café «allé»… est fermé, où est l’hôtel ?",
    "The café”—she said. AMANHÃ… «É» MAÇÃ» e² = 4·10⁻³ ± 2 at 25 °C",
    "Привет, как дела? Это обычный текст.",
    "中华人民共和国。今天天气很好，我们去公园吧。",
    "こんにちは。今日はいい天気ですね。",
    "Đây là tiếng Việt có dấu. Łódź, żółć, Ærø, Ångström, ÂNGELO”",
    "Ärger über die Größe – naïve façade",
    "مرحبا بالعالم",
]


@pytest.mark.parametrize("text", HONEST)
def test_honest_text_is_not_broken(text):
    assert signs.mojibake(text) is None
    assert signs.repaired(text) == text


@pytest.mark.parametrize(
    "text",
    ["café", "it’s “fine” – really…", "Привет мир", "中国人民", "😀 ok", "25 °C", "Größe", "€ 500", "a → b ≤ 2 ★ ✓"],
)
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_broken_encodings_are_repaired(text, encoding):
    broken = text
    for _ in range(2):
        pieces = (bytes([byte]) for byte in broken.encode())
        broken = "".join(piece.decode(encoding, "ignore") or chr(piece[0]) for piece in pieces)
        assert signs.mojibake(broken)
        assert signs.repaired(broken) == text
    assert signs.mojibake("lost \ufffd letter")


@pytest.mark.parametrize(
    ("text", "kinds", "after"),
    [
        ("mail joe.doe@gmail.com now", "e-mail", "mail [e-mail] now"),
        ("call (555) 123-4567", "phone", "call [phone]"),
        ("DE89 3704 0044 0532 0130 00", "IBAN", "[IBAN]"),
        ("card 4111 1111 1111 1111.", "card", "card [card]."),
        ("from 93.184.215.14 on", "IP", "from [IP] on"),
        ("AKIAABCDEFGHIJKLMNOP", "key", "[key]"),
        ("sk-abcdefghijklmnopqrstuvwx", "key", "[key]"),
    ],
)
def test_personal_data(text, kinds, after):
    assert private.personal(text) == kinds
    assert private.masked(text) == after
    assert private.personal(after) is None


@pytest.mark.parametrize(
    "text",
    [
        "version 1.2.3.4 of 192.168.1.1, section 1.6.2.2",
        "DE89 3704 0044 0532 0130 01",
        "card 4111 1111 1111 1112",
        "pi is 3.14159265358979 and 1,234,567.89",
        "on 2024-01-02 at 10:20:30.123",
        "you@example.com, scikit-learn, sk-learn",
        "isbn 978-3-16-148410-0 and 10 000 000 of them",
    ],
)
def test_no_personal_data(text):
    assert private.personal(text) is None


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't assist with that.",
        "I’m sorry, but I can’t help with that request.",
        "I cannot help with this request.",
        "Sorry, I'm unable to assist you with that kind of request as it is harmful.",
        "I apologize, but I cannot fulfill your request.",
        "Unfortunately, I can't answer that question.",
        "I'm just an AI, so I cannot taste it.",
        "I'm sorry, but as an AI language model I have no taste.",
        "Es tut mir leid, aber dabei kann ich nicht helfen.",
        "Leider kann ich Ihnen dabei nicht weiterhelfen.",
        "Als KI-Sprachmodell habe ich keine Gefühle.",
        "Je suis désolé, mais je ne peux pas répondre.",
        "En tant qu'IA, je n'ai pas de goûts.",
        "Lo siento, no puedo ayudarte con eso.",
        "Como modelo de lenguaje, no puedo opinar.",
        "Desculpe, mas não posso ajudar com isso.",
        "Mi dispiace, ma non posso aiutarti con questo.",
        "К сожалению, я не могу ответить.",
        "抱歉，我无法回答这个问题。",
        "作为一个人工智能语言模型，我没有感情。",
        "申し訳ありませんが、そのご質問にはお答えできません。",
        "Well, as a large language model I have no body.",
    ],
)
def test_refusals(answer):
    assert signs.refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "I can't help but smile.",
        "I'm sorry for your loss.",
        "Unfortunately, it rains.",
        "A language model is…",
        "I am an AI researcher at a university, and I work on proteins.",
        "I am a language model researcher.",
        "As an AI researcher, I read much.",
        "As an AI language model, GPT-2 predicts the next token.",
        "GPT-3 is best described as a large language model that was trained in 2020.",
        "I can't help you move on Saturday, but Sunday works.",
        "I can't help with that sofa on Saturday.",
        '"I can\'t help with that," said Anna.',
        '"I won\'t discuss it any further," said Anna.',
        "I won't discuss it, said Anna",
        "I cannot provide you with a room before noon.",
        "She wrote: I'm sorry, but I can't assist with that.",
        "Es tut mir leid, am Freitag kann ich leider nicht kommen.",
        "Als KI-Forscherin arbeite ich in Bonn.",
        "Je suis désolé, je ne peux pas venir.",
        "Lo siento, no puedo ir a la fiesta.",
        "Desculpe, não posso ir.",
        "Mi dispiace, non posso venire.",
        "Извините, я не могу прийти.",
        "抱歉，我不能来。",
        "申し訳ありませんが、明日は行けません。",
    ],
)
def test_no_refusals(answer):
    assert signs.refusal(answer) is None


def test_texts_and_labelled_rows_do_not_refuse(tmp_path):
    said = "As an AI language model, I cannot have a name."
    more = [{"text": text} for text in sentences(5)]
    assert found(write_rows(tmp_path / "a.jsonl", [*more, {"text": said}])) == {}
    labelled = [*rows(60, 1), {"text": said, "label": "negative"}]
    assert "refusals" not in found(write_rows(tmp_path / "b.jsonl", labelled))
    pair = {"prompt": "Who?", "chosen": said, "rejected": "Nobody you know."}
    assert found(write_rows(tmp_path / "c.jsonl", [pair])) == {"refusals": 1}


def test_cut_off():
    assert signs.cut_off("Use this:\n```python\nprint(1)\n") == "a code fence is left open"
    assert signs.cut_off("Use this:\n```python\nprint(1)\n```") is None
    assert signs.cut_off("One. Two. Three without end") is None  # short texts often end so
    assert signs.cut_off(ABRUPT + "see, and it takes a while until:\n- one\n- two and a half of it all") is None


# With a model ---------------------------------------------------------------------------------------------


def test_tokens_are_counted_and_unknown_ones_told(tmp_path):
    model = write_model(tmp_path / "model")
    path = write_rows(tmp_path / "a.jsonl", [*rows(30, 1), {"text": "zzz yyy xxx", "label": "positive"}])
    report = check(str(path), Options(model=str(model), max_length=12))
    assert [lengths.unit for lengths in report.lengths] == ["characters", "tokens"]
    assert report.finding("unknown-tokens").count == 1
    assert 0 < report.finding("too-long").count < 31
    with pytest.raises(ModelError):
        check(str(path), Options(model=str(tmp_path / "none")))


def test_dialogues_are_counted_as_they_are_trained(tmp_path):
    folder = tiny_chat.write_all(tmp_path / "chat")
    data, model = str(folder / "train.jsonl"), str(folder / "model")
    renderer = Renderer(load_tokenizer(model))
    turns = [json.loads(line)["messages"] for line in (folder / "train.jsonl").read_text().splitlines()]
    tokens = [len(renderer.render([Message(turn["role"], turn["content"]) for turn in row]).ids) for row in turns]
    _, counted = check(data, Options(model=model)).lengths
    assert (counted.unit, counted.longest) == ("tokens", max(tokens))
    assert counted.p50 in tokens
    plain = tiny_chat.write_all(tmp_path / "plain", None)
    _, shorter = check(data, Options(model=str(plain / "model"))).lengths
    assert shorter.unit == "tokens without a chat template"
    assert shorter.longest < counted.longest


# The command ------------------------------------------------------------------------------------------------


def graft(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "graft", "data", *arguments], capture_output=True, text=True, check=False
    )


def test_command(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [*clean_chat(), PLANTED["mojibake"]])
    done = graft("check", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 warning" in done.stdout
    assert "line 41" in done.stdout
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines()[:20])) <= 80
    path.write_text(path.read_text() + "nonsense\n")
    done = graft("check", str(path), "--json")
    assert done.returncode == 2
    assert [finding["name"] for finding in json.loads(done.stdout)["findings"]] == ["unreadable", "mojibake"]
