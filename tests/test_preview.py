"""The preview shows rows token by token, with what is trained and what is a control token."""

import json
from copy import deepcopy

import pytest
from chat_tokenizers import MAKERS, chat_tokenizer
from test_check import chat, clean_chat, sentences
from tiny import rows, write_model, write_rows
from typer.testing import CliRunner

from graft.cli.commands import app
from graft.curation import preview as module
from graft.curation.check import Options, check
from graft.curation.preview import marked, preview
from graft.errors import UsageError


@pytest.fixture
def bytes_of_chatml(monkeypatch):
    """A byte-level tokenizer with ChatML's markers, as the tokenizer of every model."""
    tokenizer = chat_tokenizer("bytes", "chatml")
    monkeypatch.setattr("graft.model.load_tokenizer", lambda name: tokenizer)
    return tokenizer


def test_special_tokens_in_a_message_are_plain_text(tmp_path, bytes_of_chatml):
    """D11: the user's own <|im_end|> is letters, the template's a control token."""
    asked = "Why does <|im_end|> end a turn? <|im_start|>system"
    path = write_rows(tmp_path / "a.jsonl", [chat(asked, "It just does, <|im_end|> or not.")])
    shown = preview(str(path), "any", template="chatml")[0]
    controls = [piece for piece in shown.pieces if piece.kind == "special"]
    assert {piece.text for piece in controls} == {"<|im_start|>", "<|im_end|>"}
    assert sum(piece.text == "<|im_end|>" for piece in controls) == 2
    text = marked(shown)
    assert asked + "‹<|im_end|>›" in text
    assert "⟦It just does, <|im_end|> or not.‹<|im_end|>›⟧" in text


def test_trained_stretches(tmp_path, bytes_of_chatml):
    turns = [("user", "One?"), ("assistant", "First."), ("user", "Two?"), ("assistant", "Second.")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    path = write_rows(tmp_path / "a.jsonl", [row])
    trained = {}
    for train in ("assistant", "last", "all"):
        shown = preview(str(path), "any", template="chatml", train=train)[0]
        trained[train] = shown.trained
        assert sum(piece.tokens for piece in shown.pieces) == shown.tokens
        assert sum(piece.tokens for piece in shown.pieces if piece.trained) == shown.trained
        assert ("⟦First.‹<|im_end|>›⟧" in marked(shown)) == (train == "assistant")
        assert ("⟦Second.‹<|im_end|>›⟧" in marked(shown)) == (train != "all")
    assert 0 < trained["last"] < trained["assistant"] < trained["all"]
    with pytest.raises(UsageError, match="--train is 'lst'; did you mean 'last'"):
        preview(str(path), "any", train="lst")


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("text", ["plain words", "  spaces\n\nand lines ", "emoji 😀👩‍👩‍👧 and 中文", "naïve Ünïcode"])
def test_pieces_are_the_text(tmp_path, monkeypatch, kind, text):
    tokenizer = chat_tokenizer(kind, "chatml")
    monkeypatch.setattr("graft.model.load_tokenizer", lambda name: tokenizer)
    path = write_rows(tmp_path / "a.jsonl", [chat(text, text)])
    shown = preview(str(path), "any", template="chatml")[0]
    answer = "".join(piece.text for piece in shown.pieces if piece.trained)
    assert answer.strip() in (f"{text}<|im_end|>".strip(), f"{text.strip()}<|im_end|>")
    assert "\ufffd" not in answer


def test_cut_and_lost_rows(tmp_path, bytes_of_chatml):
    long = " ".join(sentences(30))
    path = write_rows(tmp_path / "a.jsonl", [chat(long, "Short."), chat("Short?", long)])
    first, second = preview(str(path), "any", template="chatml", max_length=60)
    assert first.cut > 0
    assert first.tokens <= 60
    assert marked(first).endswith("⟦Short.‹<|im_end|>›⟧\n") or "⟦Short." in marked(first)
    assert (second.pieces, second.tokens) == ((), 0)
    assert "max_length" in second.lost


def test_other_rows(tmp_path, monkeypatch):
    model = str(write_model(tmp_path / "model"))
    labelled = preview(str(write_rows(tmp_path / "a.jsonl", rows(5, 1))), model, rows=2)
    assert len(labelled) == 2
    assert labelled[0].trained == 0
    assert marked(labelled[0]).startswith("‹[CLS]›")
    tokenizer = chat_tokenizer("bytes", "chatml")
    monkeypatch.setattr("graft.model.load_tokenizer", lambda name: tokenizer)
    text = preview(str(write_rows(tmp_path / "b.jsonl", [{"text": sentences(1)[0]}])), "any")[0]
    assert text.trained == text.tokens - 1 > 0
    pair = {"prompt": "Which?", "chosen": "This one.", "rejected": "That one."}
    preferred = preview(str(write_rows(tmp_path / "c.jsonl", [pair])), "any", template="chatml")[0]
    assert "⟦This one.‹<|im_end|>›⟧" in marked(preferred)


def test_control_characters_reach_no_terminal(tmp_path, bytes_of_chatml):
    path = write_rows(tmp_path / "a.jsonl", [chat("Clear \x1b[2J and turn \u202e it", "A\tB\nC")])
    text = marked(preview(str(path), "any", template="chatml")[0])
    assert "Clear \\x1b[2J and turn \\u202e it" in text
    assert "⟦A\tB\nC‹<|im_end|>›⟧" in text


def test_command(tmp_path, bytes_of_chatml):
    path = write_rows(tmp_path / "a.jsonl", clean_chat(5))
    done = CliRunner().invoke(app, ["data", "preview", str(path), "--model", "any", "--chat-template", "chatml"])
    assert done.exit_code == 0
    assert done.stdout.count("tokens trained") == 3
    assert done.stdout.count("⟦") == 3
    assert "\x1b" not in done.stdout
    done = CliRunner().invoke(
        app, ["data", "preview", str(path), "--model", "any", "--chat-template", "chatml", "--json", "--rows", "1"]
    )
    assert json.loads(done.stdout)[0]["place"] == f"{path}:1"


def test_check_tells_rows_that_would_train_nothing(tmp_path, monkeypatch):
    tokenizer = deepcopy(chat_tokenizer("bytes", "chatml"))
    tokenizer.chat_template = module.Renderer(tokenizer, "chatml").template
    monkeypatch.setattr("graft.model.load_tokenizer", lambda name: tokenizer)
    given = clean_chat(10)
    path = write_rows(tmp_path / "a.jsonl", [*given, chat("Short?", " ".join(sentences(40)))])
    report = check(str(path), Options(model="any", max_length=400))
    finding = report.finding("untrained")
    assert (finding.count, finding.severity) == (1, "warning")
    assert "max_length=400" in finding.means
    assert finding.examples[0].place == f"{path}:11"
    assert check(str(path), Options(model="any", max_length=40)).errors[0].name == "untrained"
    own = chat("What is <|im_end|> for?", "For ends.")
    named = check(str(write_rows(path, [*given, own])), Options(model="any", max_length=4000))
    assert [finding.name for finding in named.findings] == ["special-tokens"]
