import copy
import dataclasses
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_tokenizers import chat_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from graft import generate as generation
from graft.chat import Chat, Pieces, Served, load_served
from graft.cli import app
from graft.data.dialogue import Message
from graft.errors import DamagedError, DataError, ModelError, RecipeError, RouteError, UsageError
from graft.generate import generate
from graft.methods import store
from graft.methods.base import read_method
from graft.model import load_base
from graft.parts.attach import attach
from graft.prompts import answer_rows, prompt_ids, read_prompts
from graft.recipe import Recipe
from graft.rendering.render import Renderer
from graft.run import execute
from graft.sampling import Sampling

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
"""A template without BOS that asks for an answer always; the one of the adapters here."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, str]:
    """A base with a chat template, adapters for it, and one that changed the base's own weights."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = chat_tokenizer("bytes", "chatml")
    tokenizer.chat_template = (Path(store.__file__).parents[1] / "rendering/templates/chatml.jinja").read_text()
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=400, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name, method, template in (
        ("lora", {"name": "lora", "r": 4}, tokenizer.chat_template),
        ("other", {"name": "lora", "r": 4}, CHATML),
        ("bare", {"name": "prompt", "num_virtual_tokens": 6}, None),
        ("full", {"name": "full"}, tokenizer.chat_template),
    ):
        base = load_base(str(folder / "base"))
        adapter = read_method(method).build(base, "a")
        attach(base, adapter)
        with torch.no_grad():
            for _, tensor in adapter.trainable():
                tensor.add_(torch.randn_like(tensor) * 0.2)
        store.save(adapter.eval(), base, folder / name, template=template)
    return {path.name: str(path) for path in folder.iterdir()}


@pytest.fixture(scope="session")
def served(folders) -> Served:
    return load_served(folders["lora"], folders["base"])


def test_the_prompt_is_the_one_of_training(served, folders, monkeypatch):
    """What chat builds from its history is what the renderer gives for the same messages, and where training puts the
    first token of an answer."""
    given = []
    monkeypatch.setattr(
        "graft.chat.stream", lambda base, prompts, route, **_: given.extend(prompts) or iter([[(0, 9)]])
    )
    talk = Chat(served, system="Be brief.")
    for text in ("Hello?", "And <|im_end|> you?"):
        list(talk.ask(text))
    turns = [Message("system", "Be brief."), Message("user", "Hello?"), talk.history[1]]
    turns += [Message("user", "And <|im_end|> you?"), Message("assistant", "Fine.")]
    renderer = Renderer(load_base(folders["base"]).tokenizer)
    assert given == [renderer.prompt(turns[:2]), renderer.prompt(turns[:4])]
    rendered = renderer.render(turns)
    assert given[1] == rendered.ids[: rendered.starts[-1]]


def test_answers_are_those_of_generate_and_the_history_grows(served):
    talk = Chat(served, max_new_tokens=12)
    text = "".join(piece for row, piece in talk.ask("Hello?"))
    options = {"max_new_tokens": 12, "stop_ids": served.renderer.stop_ids}
    first = generate(served.base, [served.renderer.prompt([Message("user", "Hello?")])], served.adapter, **options)[0]
    assert text == served.text(first)
    assert talk.history == [Message("user", "Hello?"), Message("assistant", text)]
    assert talk.cut == (len(first) == 12)
    list(talk.ask("More."))
    assert [turn.role for turn in talk.messages()] == ["user", "assistant"] * 2


def test_both_answers_of_one_batch_are_those_of_each_alone(served):
    talk = Chat(served, max_new_tokens=10, compare=True, sampling=Sampling(temperature=0.9, seed=3))
    said = ["", ""]
    for row, piece in talk.ask("What is the capital of France?"):
        said[row] += piece
    assert said[0] != said[1]
    for row, entry in enumerate((served.adapter, None)):
        prompt = served.renderer.prompt([Message("user", "What is the capital of France?")])
        ids = generate(
            served.base, [prompt], entry, max_new_tokens=10, stop_ids=served.renderer.stop_ids,
            sampling=Sampling(temperature=0.9, seed=3),
        )[0]  # fmt: skip
        assert said[row] == served.text(ids)
    assert talk.history[-1].content == said[0]


@pytest.mark.parametrize("text", ["Grüße 👩‍👩‍👧 naïve 東京!", "🙂", "a\nb\n\n  c", "ends in half a 🙂"])
def test_no_piece_ends_within_a_character(served, text):
    ids = served.base.tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = Pieces(served.text)
    shown = [pieces.add(token) for token in ids]
    assert "".join(shown) == text == pieces.text
    assert len(ids) > len([piece for piece in shown if piece]) or text.isascii()
    assert not any("\ufffd" in piece for piece in shown)
    assert pieces.rest() == ""
    if text.endswith("🙂"):
        half = Pieces(served.text)
        assert "\ufffd" not in "".join(half.add(token) for token in ids[:-1])
        assert half.rest().endswith("\ufffd")


def test_long_dialogues_lose_their_oldest_turns(served):
    talk = Chat(served, max_new_tokens=20, system="Be brief.")
    dropped = 0
    for number in range(12):
        list(talk.ask(f"Question {number}: what is the capital of France, and how are you today?"))
        dropped += talk.dropped
    assert dropped >= 2
    assert talk.messages()[0].role == "system"
    assert [turn.role for turn in talk.history] == ["user", "assistant"] * (len(talk.history) // 2)
    assert len(served.renderer.prompt(talk.messages())) <= 400
    before = list(talk.history)
    with pytest.raises(RouteError, match="400 positions"):
        list(talk.ask("word " * 500))
    assert talk.history == before


def test_what_was_said_before_a_stop_is_kept(served):
    talk = Chat(served, max_new_tokens=30)
    pieces = talk.ask("Hello?")
    first = next(pieces)[1]
    pieces.close()
    assert talk.history[1].content.startswith(first)
    assert len(talk.history[1].content) < 60
    assert talk.cut


def test_the_adapters_template_counts(folders):
    other = load_served(folders["other"], folders["base"])
    assert other.renderer.template == CHATML
    assert "another chat template" in other.note
    assert load_served(folders["lora"], folders["base"]).note == ""
    bare = load_served(folders["bare"], folders["base"])
    assert bare.note == ""
    assert bare.room == 394
    assert load_served(folders["base"]).adapter is None


def test_damaged_and_unfit_runs_are_one_line(folders, tmp_path):
    with pytest.raises(UsageError, match="--model"):
        load_served(folders["lora"])
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(folders["other"]).iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "chat_template.jinja").write_text(CHATML + " ")
    with pytest.raises(DamagedError, match="not what was saved"):
        load_served(str(broken), folders["base"])
    (broken / "chat_template.jinja").unlink()
    with pytest.raises(DamagedError, match="missing"):
        load_served(str(broken), folders["base"])
    (broken / "graft.json").write_text("{")
    with pytest.raises(DamagedError, match="not JSON"):
        load_served(str(broken), folders["base"])
    for missing in (str(tmp_path / "nothing"), "runs/nothing"):
        with pytest.raises(UsageError, match="neither a run"):
            load_served(missing)
    (tmp_path / "comparison/trials/one").mkdir(parents=True)
    with pytest.raises(RecipeError, match="give one of its trials"):
        load_served(str(tmp_path / "comparison"))
    with pytest.raises(ModelError):
        load_served("./no/such/model")


def test_encoders_and_classifiers_are_sent_to_eval(tmp_path):
    import tiny

    model = tiny.write_model(tmp_path / "model")
    with pytest.raises(UsageError, match=r"encoder.*graft eval"):
        load_served(str(model))
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(f"model: {model}\ndata: {{train: x.jsonl}}\nmethod: {{name: lora}}\n")
    (run / "status.json").write_text('{"state": "done"}')
    (run / "report.json").write_text("{}")
    with pytest.raises(UsageError, match=r"classifier.*graft eval"):
        load_served(str(run))


def test_a_run_that_changed_the_base_answers_alone(folders):
    full = load_served(folders["full"], folders["base"])
    assert full.base.exclusive is not None
    assert len({parameter.dtype for parameter in full.base.model.parameters()}) == 1
    text = "".join(piece for _, piece in Chat(full, max_new_tokens=5).ask("Hello?"))
    assert text
    with pytest.raises(UsageError, match="own weights"):
        list(Chat(full, compare=True).ask("Hello?"))


ROWS = [
    {"prompt": "What is the capital of France?", "id": 7, "own": [1, 2]},
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi é 🙂"}]},
]
SPOKEN = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_prompts_are_read_from_every_format(served, tmp_path):
    cases = {
        "prompt": (ROWS, [None, None]),
        "messages": ([{"messages": SPOKEN}, {"messages": SPOKEN[:1]}], ["Hi.", None]),
        "sharegpt": (
            [{"conversations": [{"from": "human", "value": "Hello?"}]},
             {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi."}]}],
            [None, "Hi."],
        ),
        "alpaca": ([{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Add."}], ["3", None]),
    }  # fmt: skip
    for name, (rows, references) in cases.items():
        asked = read_prompts(write(tmp_path / f"{name}.jsonl", rows))
        assert [row.reference for row in asked] == references, name
        for row, given in zip(asked, rows, strict=True):
            assert row.record.fields == given
            assert prompt_ids(served, row) == served.renderer.prompt(row.dialogue.prompt)
    (tmp_path / "lines.txt").write_text("One?\n\nTwo?\r\nThree?\n")
    asked = read_prompts(tmp_path / "lines.txt")
    assert [row.dialogue.prompt[-1].content for row in asked] == ["One?", "Two?", "Three?"]
    assert asked[1].record.place.endswith("lines.txt:3")


def test_pairs_of_texts_are_joined_as_in_training(served, tmp_path):
    """Through the template where there is one, and as they are where there is none."""
    asked = read_prompts(write(tmp_path / "pairs.jsonl", [{"prompt": "One and one is", "completion": " two."}]))[0]
    turn = read_prompts(write(tmp_path / "prompts.jsonl", [{"prompt": "One and one is"}]))[0]
    ids = served.renderer.prompt([Message("user", "One and one is")])
    assert prompt_ids(served, asked) == prompt_ids(served, turn) == ids
    pair = served.renderer.pair("One and one is", " two.")
    joined = pair.ids[: pair.starts[0]]
    assert prompt_ids(served, turn, plain=True) == joined != ids
    tokenizer = copy.deepcopy(served.base.tokenizer)
    tokenizer.chat_template = None
    bare = dataclasses.replace(served, renderer=Renderer(tokenizer))
    assert prompt_ids(bare, asked) == prompt_ids(bare, turn) == joined
    with_system = prompt_ids(served, turn, system="Be brief.")
    assert with_system == served.renderer.prompt([Message("system", "Be brief."), Message("user", "One and one is")])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"prompt": ""}', "prompt"),
        ('{"prompt": 3}', "prompt"),
        ('{"prompt": "cut', "JSON"),
        ('{"messages": []}', "'prompt' is missing"),
        ('{"prompt": [{"role": "assistant", "content": "I"}]}', "turn"),
        ('{"prompt": [{"role": "king", "content": "I"}]}', "king"),
        ('{"other": 1}', "prompt"),
    ],
)
def test_faulty_rows_are_named(row, reason, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(f"{json.dumps({'prompt': 'fine'})}\n{row}\n")
    with pytest.raises(DataError, match=rf"p\.jsonl:2: .*{reason}"):
        read_prompts(path)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(DataError, match="no rows"):
        read_prompts(tmp_path / "empty.txt")


def test_rows_that_do_not_fit_are_named(served, tmp_path):
    rows = read_prompts(write(tmp_path / "p.jsonl", [{"prompt": "fine"}, {"prompt": "word " * 500}]))
    with pytest.raises(DataError, match=r"p\.jsonl:2: [\d,]+ tokens, the model reads 400"):
        answer_rows(served, rows)
    rows = read_prompts(write(tmp_path / "p.jsonl", [{"prompt": "fine"}, {"prompt": "fine", "answer": "x"}]))
    with pytest.raises(DataError, match=r"p\.jsonl:2: the row has 'answer'"):
        answer_rows(served, rows)


def run(*arguments: str, given: str = ""):
    result = CliRunner().invoke(app, list(arguments), input=given, standalone_mode=False)
    if isinstance(result.exception, Exception):
        raise result.exception
    return result


def test_generate_writes_what_answer_rows_gives_in_order(folders, served, tmp_path):
    rows = [{"prompt": "word " * n, "n": n} for n in (9, 1, 5, 2)]
    path, out = write(tmp_path / "p.jsonl", rows), tmp_path / "deep" / "out.jsonl"
    arguments = ["generate", folders["lora"], "-f", str(path), "--model", folders["base"], "--max-new-tokens", "6"]
    result = run(*arguments, "-o", str(out), "--base", "--batch-size", "2")
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert found == answer_rows(served, read_prompts(path), untouched=True, max_new_tokens=6)
    assert [row["n"] for row in found] == [9, 1, 5, 2]
    assert set(found[0]) == {"prompt", "n", "answer", "ended", "base_answer", "base_ended"}
    assert "answers were cut" in result.stderr
    assert any(row["answer"] != row["base_answer"] for row in found)
    with pytest.raises(UsageError, match="there already"):
        run(*arguments, "-o", str(out))
    printed = [json.loads(line) for line in run(*arguments).stdout.splitlines()]
    assert [row["answer"] for row in printed] == [row["answer"] for row in found]
    reference = write(tmp_path / "r.jsonl", [{"messages": SPOKEN}])
    row = json.loads(run("generate", folders["base"], "-f", str(reference), "--max-new-tokens", "3").stdout)
    assert row["reference"] == "Hi."


@pytest.mark.parametrize("both", [False, True])
def test_an_interrupted_generate_keeps_what_is_finished(both, folders, tmp_path, monkeypatch):
    rows = [{"prompt": "word " * n, "n": n} for n in (9, 1, 5, 2)]
    path, out = write(tmp_path / "p.jsonl", rows), tmp_path / "out.jsonl"
    arguments = ["generate", folders["lora"], "-f", str(path), "--model", folders["base"], "--max-new-tokens", "4"]
    arguments += ["--batch-size", "2", *(["--base"] if both else [])]
    whole, calls = generation._whole, []

    def stop(*given, **options):
        calls.append(given)
        if len(calls) == 2 + 2 * both:
            raise KeyboardInterrupt
        return whole(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "_whole", stop)
        result = CliRunner().invoke(app, [*arguments, "-o", str(out)], standalone_mode=False)
        calls.clear()
        printed = CliRunner().invoke(app, arguments, standalone_mode=False)
    partial = tmp_path / "out.jsonl.partial"
    assert result.return_value == 130 or result.exit_code == 130 or isinstance(result.exception, KeyboardInterrupt)
    assert f"{4 if both else 2} of 4 rows are answered in {partial}" in result.stderr
    assert not out.exists()
    found = [json.loads(line) for line in partial.read_text().splitlines()]
    assert [row["n"] for row in found] == ([9, 5, 2, 1, 9, 5] if both else [9, 5])
    assert ["base_answer" in row for row in found] == ([False] * 4 + [True] * 2 if both else [False] * 2)
    assert printed.stdout == ""
    assert "no answer was kept; with -o FILE" in printed.stderr
    with pytest.raises(UsageError, match=r"out\.jsonl\.partial is there.*rename or remove it"):
        run(*arguments, "-o", str(out))
    partial.unlink()
    run(*arguments, "-o", str(out))
    assert not partial.exists()
    after = {row["n"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(after) == [9, 1, 5, 2]
    assert all(row.items() <= after[row["n"]].items() for row in found)


def test_a_run_without_a_method_speaks_through_its_recipes_template(folders, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": f"Say {n} {'ab' * n}", "completion": f"{n}"} for n in range(40)])
    settings = {"model": folders["base"], "data": {"train": str(path)}, "method": None}
    execute(Recipe.parse(settings | {"objective": {"name": "instruct", "chat_template": "alpaca"}}), tmp_path / "run")
    served = load_served(str(tmp_path / "run"))
    alpaca = Renderer(served.base.tokenizer, "alpaca")
    assert served.adapter is None
    assert served.renderer.template == alpaca.template
    assert "measured through another chat template" in served.note
    served.base.tokenizer.chat_template = alpaca.template
    execute(Recipe.parse(settings | {"objective": {"name": "instruct"}}), tmp_path / "own")
    assert load_served(str(tmp_path / "own")).note == ""


def test_chat_reads_standard_input_line_by_line(folders, served):
    arguments = ["chat", folders["lora"], "--model", folders["base"], "--max-new-tokens", "8"]
    result = run(*arguments, given="Hello?\n\n/system Be brief.\nHello?\n/nothing\n/quit\nnever\n")
    talk = Chat(served, max_new_tokens=8)
    first = "".join(piece for _, piece in talk.ask("Hello?"))
    second = "".join(piece for _, piece in Chat(served, max_new_tokens=8, system="Be brief.").ask("Hello?"))
    assert result.stdout == f"{first}\n{second}\n"
    assert "no command /nothing" in result.stderr
    assert "was cut" in result.stderr
    again = run(*arguments, "--once", "Hello?", "--base")
    assert again.stdout.startswith("--- ")
    assert first in again.stdout
    assert again.stdout.count("\n--- ") == 1
    with pytest.raises(UsageError, match="nothing to compare"):
        run("chat", folders["base"], "--base", "--once", "x")
    with pytest.raises(UsageError, match="temperature"):
        run("chat", folders["base"], "--temperature", "-1")


def test_wide_terminals_show_both_answers_side_by_side(served, capsys, monkeypatch):
    from rich.console import Console

    from graft.cli import chat

    monkeypatch.setattr(chat, "terminal", lambda: Console(file=sys.stdout, force_terminal=True, width=150))
    chat._answer(Chat(served, max_new_tokens=8, compare=True), "Hello?")
    assert any(line.count("│") + line.count("┃") == 3 for line in capsys.readouterr().out.splitlines())


def test_control_characters_do_not_reach_the_terminal():
    from graft.cli.chat import _printable

    assert _printable("a\x1b[31mb\x07\n\tc\x9b") == "a[31mb\n\tc"


def test_a_session_on_a_terminal(folders):
    """Ctrl-C does not end the program, Ctrl-D does."""
    terminal, inside = pty.openpty()
    command = [sys.executable, "-m", "graft", "chat", folders["lora"], "--model", folders["base"]]
    more = {"OMP_NUM_THREADS": "1", "TERM": "dumb", "HF_HUB_OFFLINE": "1"}
    ends: Any = {"stdin": inside, "stdout": inside, "stderr": inside}
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "300"], env=os.environ | more, start_new_session=True, **ends
    )
    os.close(inside)
    seen, place = b"", 0

    def until(text: bytes, interrupting: bool = False) -> None:
        nonlocal seen, place
        until_then, interrupted = time.monotonic() + 90, 0.0
        while text not in seen[place:] and time.monotonic() < until_then:
            if interrupting and time.monotonic() - interrupted > 5:
                # Again, since one that comes before readline listens waits there for a key; but not at once,
                # since one that comes while the first is answered ends the program.
                process.send_signal(signal.SIGINT)
                interrupted = time.monotonic()
            if select.select([terminal], [], [], 0.5)[0]:
                seen += os.read(terminal, 4096)
        assert text in seen[place:], seen
        place = seen.index(text, place) + len(text)

    try:
        until(b"> ")
        until(b"Ctrl-D leaves", interrupting=True)
        until(b"> ")
        os.write(terminal, b"Hello?\n")
        until(b"Hello?")
        until(b"> ")
        os.write(terminal, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def test_an_interrupt_stops_the_answer_alone(served, monkeypatch, capsys):
    from graft.cli import chat

    lines = iter(["Hello?", "Again?"])

    def typed(prompt=""):
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    asked = []
    original = Chat.ask

    def ask(self, text):
        asked.append(text)
        pieces = original(self, text)
        yield next(pieces)
        if len(asked) == 1:
            raise KeyboardInterrupt
        yield from pieces

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr(Chat, "ask", ask)
    chat._talk(Chat(served, max_new_tokens=5))
    assert asked == ["Hello?", "Again?"]
    assert "stopped" in capsys.readouterr().err
