"""Runs of the objectives of language models: instruct and pretrain, from files to a report."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_chat
import tiny_gpt2
import torch
from trials import Trials

from graft.compare import compare
from graft.data.dialogue import Message
from graft.data.load import DataConfig, load_splits
from graft.errors import DataError, UsageError
from graft.merge import merge_run
from graft.methods import store
from graft.model import load_base, load_tokenizer
from graft.objectives import pretrain
from graft.objectives.instruct import Instruct
from graft.recipe import Recipe, read_recipe
from graft.rendering.render import Renderer
from graft.run import evaluate_run, execute


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tiny_chat.write_all(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def done(place) -> tuple[Path, dict[str, Any], list[str]]:
    """A finished run, its report and what it said."""
    said: list[str] = []
    report = execute(tiny_chat.recipe(place), place / "run", say=said.append)
    return place / "run", report, said


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_run_learns_and_reports(done):
    folder, report, said = done
    assert report["metric"] == "answers right"
    assert report["quality"] >= 0.5
    assert set(report["figures"]) == {"loss", "perplexity", "ended"}
    assert report["figures"]["ended"] == 1.0
    assert report["figures"]["loss"] < 1.0
    answers = read_lines(folder / "answers.jsonl")
    assert len(answers) == 24
    assert sum(answer["score"] for answer in answers) / 24 == report["quality"]
    assert all(answer["score"] == (answer["answer"] == answer["reference"]) for answer in answers)
    assert "96 of 96 rows kept: 336 supervised tokens (a row has 3; 2 to 5 in 90 % of the rows)" in said


def test_each_evaluation_has_loss_metric_samples_and_the_share_that_ended(done):
    folder, _, said = done
    points = [point for point in read_lines(folder / "metrics.jsonl") if point["quality"] is not None]
    assert [point["step"] for point in points] == [12, 24, 36, 48]
    for point in points:
        assert set(point["figures"]) == {"perplexity", "ended"}
        assert [sample["place"] for sample in point["samples"]] == [sample["place"] for sample in points[0]["samples"]]
        assert len(point["samples"]) == 3
    assert points[-1]["validation_loss"] < points[0]["validation_loss"]
    shown = [line for line in said if line.startswith("step ")]
    assert len(shown) == 4
    assert "answers right" in shown[0]
    assert "answers that ended" in shown[0]
    assert any("(wanted 'wide')" in line or "-> 'wide'" in line for line in said)


def test_the_tokenizer_and_the_template_travel_with_the_adapter(done, place):
    adapter = done[0] / "adapter"
    own = load_tokenizer(str(place / "model"))
    assert (adapter / "chat_template.jinja").read_text("utf-8") == own.chat_template
    about = json.loads((adapter / "graft.json").read_text("utf-8"))
    assert about["template"]["sha256"] == Renderer(own).sha256
    kept = load_tokenizer_of(adapter)
    assert kept("Hello there")["input_ids"] == own("Hello there")["input_ids"]


def load_tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_another_template_is_kept_and_changes_the_rows(place, tmp_path):
    settings = {"name": "instruct", "chat_template": "alpaca", "max_new_tokens": 8}
    training = {"max_steps": 2, "precision": "fp32"}
    execute(tiny_chat.recipe(place, objective=settings, training=training), tmp_path / "run")
    assert "### Instruction" in (tmp_path / "run" / "adapter" / "chat_template.jinja").read_text("utf-8")
    merged = merge_run(tmp_path / "run", tmp_path / "merged")
    assert merged
    assert "### Instruction" in load_tokenizer_of(tmp_path / "merged").chat_template


def test_a_merged_model_stops_where_a_turn_ends(done, tmp_path):
    merge_run(done[0], tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "generation_config.json").read_text("utf-8"))
    tokenizer = load_tokenizer_of(tmp_path / "merged")
    ends = {tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id}
    assert set(written["eos_token_id"]) == ends
    assert len(ends) == 2


def test_evaluation_of_a_finished_run_reads_other_dialogues(done, place, tmp_path):
    again = evaluate_run(done[0])
    assert again["quality"] == done[1]["quality"]
    assert again["figures"]["ended"] == 1.0
    other = tiny_chat.write_rows(tmp_path / "other.jsonl", tiny_chat.rows(8, 7))
    assert evaluate_run(done[0], str(other))["rows"] == 8


def test_the_untouched_base_answers_the_same_prompts(place, tmp_path):
    report = execute(tiny_chat.recipe(place, method=None), tmp_path / "run")
    assert report["quality"] == 0.0
    assert report["figures"]["loss"] > 4
    assert report["latency_ms"] > 0


@pytest.mark.parametrize(
    ("scorer", "low", "high"), [("rougeL", 0.4, 1.0), ("chrf", 0.4, 1.0), ("regex:^[a-zP]", 0.9, 1.0)]
)
def test_a_scorer_by_name(done, place, scorer, low, high):
    base = load_base(str(place / "model"))

    store.load(base, done[0] / "adapter", "tuned")
    objective = Instruct(scorer=scorer)
    splits = objective.load(tiny_chat.recipe(place).data)
    turns = objective.examples(splits.test, base.tokenizer, (), 96)
    result = objective.evaluate(base, turns, "tuned", 8)
    assert low <= result.quality <= high
    assert objective.metric == scorer
    assert ("corpus_chrf" in result.figures) == (scorer == "chrf")


def test_an_unknown_scorer_is_refused_with_the_recipe(place):
    with pytest.raises(UsageError, match="rougeL"):
        tiny_chat.recipe(place, objective={"name": "instruct", "scorer": "rougel_"})


def plan(place: Path, tmp_path: Path, rows: list[dict[str, Any]], **data: Any) -> Any:
    """A recipe with these training rows."""
    train = tiny_chat.write_rows(tmp_path / "train.jsonl", rows)
    settings = tiny_chat.settings(place)
    settings["data"] |= {"train": str(train)} | data
    settings["training"] |= {"max_steps": 2}
    return settings


def dialogue(user: str, assistant: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def test_d12_rows_that_train_nothing_stop_the_run_before_the_weights(place, tmp_path, monkeypatch):
    monkeypatch.setattr("graft.build.load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    rows = tiny_chat.rows(30, 3) + [dialogue(f"the sea {number}?", "wide " * 200) for number in range(3)]

    with pytest.raises(
        DataError, match=r"3 of 33 rows have 0 trained tokens: 3 answer longer than max_length=96"
    ) as info:
        execute(Recipe.parse(plan(place, tmp_path, rows)), tmp_path / "run")
    assert info.value.exit_code == 2
    assert "raise max_length to" in str(info.value)
    assert not (tmp_path / "run").exists()


def test_d12_allowed_losses_are_told(place, tmp_path):

    rows = tiny_chat.rows(30, 3) + [dialogue(f"the sea {number}?", "wide " * 200) for number in range(3)]
    rows.append(dialogue("very " * 100 + "wide the sea?", "wide"))
    settings = plan(place, tmp_path, rows)
    settings["objective"]["allow_dropped"] = True
    said: list[str] = []
    execute(Recipe.parse(settings), tmp_path / "run", say=said.append)
    told = "\n".join(said)
    assert "31 of 34 rows kept" in told
    assert "3 of 34 rows have 0 trained tokens" in told
    assert "1 of 34 rows cut to max_length=96" in told


def test_bad_rows_are_skipped_up_to_a_share_and_listed(place, tmp_path):

    rows = [*tiny_chat.rows(30, 3), {"messages": [{"role": "user", "content": "no answer"}]}]
    with pytest.raises(DataError, match=r"train.jsonl:31: "):
        execute(Recipe.parse(plan(place, tmp_path, rows)), tmp_path / "run")
    said: list[str] = []
    execute(Recipe.parse(plan(place, tmp_path, rows, skip_bad_rows=0.05)), tmp_path / "run", say=said.append)
    assert "1 of 31 rows of train.jsonl cannot be read and are left out" in said
    skipped = read_lines(tmp_path / "run" / "skipped.jsonl")
    assert [row["place"].rpartition(":")[2] for row in skipped] == ["31"]
    untouched = plan(place, tmp_path, rows, skip_bad_rows=0.05) | {"method": None}
    execute(Recipe.parse(untouched), tmp_path / "base")
    assert read_lines(tmp_path / "base" / "skipped.jsonl") == skipped
    assert "1 of 31 rows of train.jsonl cannot be read" in (tmp_path / "base" / "log.txt").read_text()
    with pytest.raises(DataError, match="1 of 31 rows are bad"):
        load_splits(Recipe.parse(plan(place, tmp_path, rows, skip_bad_rows=0.01)).data, "dialogue")


def test_a_base_without_a_template_needs_one(tmp_path):
    folder = tiny_chat.write_all(tmp_path / "plain", None)
    with pytest.raises(UsageError, match="chat_template"):
        execute(tiny_chat.recipe(folder), tmp_path / "run")
    settings = {"name": "instruct", "chat_template": "alpaca", "max_new_tokens": 4}
    training = {"max_steps": 2, "precision": "fp32"}
    assert execute(tiny_chat.recipe(folder, objective=settings, training=training), tmp_path / "run")["steps"] == 2


def test_other_kinds_of_data_are_refused_with_what_they_are_for(place, tmp_path):
    preference = {"prompt": "the sea?", "chosen": "wide", "rejected": "short"}
    with pytest.raises(DataError, match=r"preference.*dialogues are needed.*graft data convert"):
        load_splits(_config(tmp_path, [preference] * 3), "dialogue")
    with pytest.raises(DataError, match=r"dialogues are needed.*objective: classify"):
        load_splits(_config(tmp_path, [{"text": "the sea", "label": "good"}] * 3), "dialogue")
    with pytest.raises(DataError, match=r"dialogues are needed.*objective: pretrain"):
        load_splits(_config(tmp_path, [{"text": "the sea"}] * 3), "dialogue")
    with pytest.raises(DataError, match="labelled texts, not dialogues"):
        load_splits(DataConfig(train="movie-reviews"), "dialogue")
    with pytest.raises(DataError, match="questions and answers, not labels"):
        load_splits(DataConfig(train="task:family_relationships"), "labelled")


def _config(tmp_path: Path, rows: list[dict[str, Any]]) -> DataConfig:
    return DataConfig(train=str(tiny_chat.write_rows(tmp_path / "rows.jsonl", rows)))


def test_d13_the_same_file_for_training_and_test_is_refused(place):
    train = str(place / "train.jsonl")
    with pytest.raises(DataError, match="same content as train"):
        load_splits(DataConfig(train=train, test=train), "dialogue")


def test_d13_overlap_and_contradictions_are_told(tmp_path):
    train = tiny_chat.write_rows(tmp_path / "train.jsonl", [dialogue("the sea?", "wide"), dialogue("the sea?", "deep")])
    test = tiny_chat.write_rows(tmp_path / "test.jsonl", [dialogue("The sea!", "wide"), dialogue("a poem?", "short")])
    notes = load_splits(DataConfig(train=str(train), validation=str(test), test=str(test)), "dialogue").notes
    assert "1 prompts of train stand there with more than one answer" in notes
    assert "1 of 2 rows of test have a prompt that is also in train" in notes


@pytest.mark.parametrize("count", [1, 2])
def test_d16_too_few_rows_to_split(tmp_path, count):
    with pytest.raises(DataError, match="no row is left for"):
        load_splits(_config(tmp_path, tiny_chat.rows(count, 1)), "dialogue")


def test_d16_fewer_rows_than_a_batch(place, tmp_path):

    settings = plan(place, tmp_path, tiny_chat.rows(3, 9))
    settings["training"] = {"num_train_epochs": 1, "per_device_train_batch_size": 64, "precision": "fp32"}
    assert execute(Recipe.parse(settings), tmp_path / "run")["steps"] == 1


def test_splits_of_dialogues_keep_near_equal_rows_together(tmp_path):
    rows = [dialogue(f"{row['messages'][0]['content']}", "wide") for row in tiny_chat.rows(40, 2)]
    twins = [dialogue(row["messages"][0]["content"].upper(), "wide.") for row in rows]
    splits = load_splits(_config(tmp_path, rows + twins), "dialogue")
    parts = {name: {row.prompt[0].content.lower() for row in getattr(splits, name)} for name in ("train", "test")}
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 80
    assert len(splits.test) >= 10
    assert not parts["train"] & parts["test"]


def test_answers_to_one_prompt_stay_in_one_part(tmp_path):
    asked = [row["messages"][0]["content"] for row in tiny_chat.rows(40, 2)]
    rows = [dialogue(question, answer) for question in asked for answer in ("wide and blue", "I could not say, sorry")]
    splits = load_splits(_config(tmp_path, rows), "dialogue")
    parts = [{row.prompt[0].content for row in part} for part in (splits.train, splits.validation, splits.test)]
    assert sum(map(len, parts)) == 40
    assert len(splits.test) >= 8


def test_pretraining_on_plain_text(place, tmp_path):
    texts = [{"text": f"the sea is wide and {row['messages'][0]['content']}"} for row in tiny_chat.rows(48, 4)]
    (tmp_path / "texts.txt").write_text("\n\n".join(row["text"] for row in texts), encoding="utf-8")
    settings = tiny_chat.settings(place, objective="pretrain", data={"train": str(tmp_path / "texts.txt")})

    said: list[str] = []
    report = execute(Recipe.parse(settings), tmp_path / "run", say=said.append)
    assert report["metric"] == "next-token accuracy"
    assert report["quality"] > 0.3
    assert report["figures"]["perplexity"] < 60
    assert any("in 39 pieces of at most 1,024" in line or "pieces of at most 1,024" in line for line in said)
    assert not (tmp_path / "run" / "answers.jsonl").exists()


def test_forgetting_is_a_loss_that_rose(place, tmp_path, monkeypatch):
    monkeypatch.setattr("graft.compare._run", Trials())
    settings = tiny_chat.settings(place, forgetting=["tweets"], probe_samples=20)
    settings["training"]["max_steps"] = 3

    recipe = Recipe.parse({key: value for key, value in settings.items() if key != "method"} | {"methods": [
        {"name": "full", "learning_rate": 5e-3}]})  # fmt: skip
    found = compare(recipe, tmp_path / "both")
    rows = {row["label"]: row for row in found["rows"]}
    assert found["forgetting_unit"] == "nats"
    assert rows["full"]["status"] == "done", rows["full"]["cause"]
    trials = {path.name.split("-")[0]: json.loads((path / "report.json").read_text()) for path in
              (tmp_path / "both" / "trials").iterdir()}  # fmt: skip
    rise = trials["full"]["probes"]["tweets"] - trials["base"]["probes"]["tweets"]
    assert rows["full"]["forgetting"]["tweets"] == pytest.approx(rise)
    assert rows["base"]["figures"]["loss"] > rows["full"]["figures"]["loss"]
    page = (tmp_path / "both" / "report.html").read_text("utf-8")
    assert "Forgetting on tweets, nats" in page
    assert "Perplexity" in page


def test_an_encoder_is_refused_before_its_weights_are_read(tmp_path):
    import tiny

    folder = tiny.write_all(tmp_path / "bert")
    settings = tiny_chat.settings(folder)

    with pytest.raises(UsageError, match="instruct needs a decoder"):
        execute(Recipe.parse(settings), tmp_path / "run")


# The starter model --------------------------------------------------------------------------------


def test_the_starter_model_renders_as_its_template_says():
    tokenizer = load_tokenizer("smollm2-135m")
    renderer = Renderer(tokenizer)
    asked = "Is </s> or <|im_end|> a word? Ünïcode 日本 🙂"
    messages = (Message("user", asked), Message("assistant", "No.\n\nNot one."), Message("user", "ok"))
    messages += (Message("assistant", "Good"),)
    rendered = renderer.render(messages)
    pieces = []
    for number, trained in zip(rendered.ids, rendered.trained, strict=True):
        if trained:
            pieces.append(tokenizer.decode([number]))
    assert "".join(pieces) == "No.\n\nNot one.<|im_end|>Good<|im_end|>"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in renderer.stop_ids
    assert rendered.ids.count(end) == 5  # the system's turn and four others; the one in the question is text
    assert asked in tokenizer.decode(rendered.ids)
    plain = [Message("user", "What is the capital of France?"), Message("assistant", "Paris")]
    given = [message.as_dict() for message in plain]
    assert renderer.render(plain).ids == tokenizer.apply_chat_template(given, return_dict=False)


@pytest.mark.slow
def test_ten_steps_on_the_starter_model(tmp_path):
    recipe = read_recipe(
        Path(__file__).parents[1] / "recipes" / "instruct.yaml",
        ["training.max_steps=10", "data.max_eval_samples=8", "data.max_train_samples=40", "forgetting=[]",
         "transfer=[]", "training.eval_steps=10", "training.per_device_train_batch_size=2"],
    )  # fmt: skip
    report = execute(recipe, tmp_path / "run")
    points = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert points[0]["train_loss"] > 5
    assert points[-1]["validation_loss"] < 3.5
    assert report["trainable_parameters"] == 4_884_480
    assert report["figures"]["ended"] > 0.5


def test_bad_rows_of_labelled_data_are_skipped_too(tmp_path):
    rows = [{"text": f"sentence number {number} of {number * 7}", "label": "ab"[number % 2]} for number in range(60)]
    bad = [{"text": "", "label": "a"}, {"text": "no label"}]
    path = tiny_chat.write_rows(tmp_path / "labelled.jsonl", [*rows, *bad])
    with pytest.raises(DataError, match=r"labelled.jsonl:61: "):
        load_splits(DataConfig(train=str(path)))
    splits = load_splits(DataConfig(train=str(path), skip_bad_rows=0.05))
    assert [fault.place.rpartition(":")[2] for fault in splits.skipped] == ["61", "62"]
    assert "2 of 62 rows of labelled.jsonl cannot be read and are left out" in splits.notes
    with pytest.raises(DataError, match="2 of 62 rows are bad"):
        load_splits(DataConfig(train=str(path), skip_bad_rows=0.01))
    with pytest.raises(DataError, match="format is alpaca"):
        load_splits(DataConfig(train=str(path), format="alpaca"))


def test_a_template_that_is_not_known_is_refused_with_the_recipe(place):
    with pytest.raises(UsageError, match="did you mean 'llama3'"):
        tiny_chat.recipe(place, objective={"name": "instruct", "chat_template": "llamma3"})


# Hard rows ----------------------------------------------------------------------------------------


def test_rows_of_an_array_on_one_line_are_graded_each_by_its_own_answer(done, place, tmp_path):
    rows = [json.loads(line) for line in (place / "test.jsonl").read_text().splitlines()]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    assert evaluate_run(done[0], str(tmp_path / "test.json"))["quality"] == done[1]["quality"]


def test_what_is_thought_is_not_graded(tmp_path):
    folder = tiny_chat.write_all(tmp_path / "qwen3", "qwen3")
    report = execute(tiny_chat.recipe(folder), tmp_path / "run")
    answers = read_lines(tmp_path / "run" / "answers.jsonl")
    assert any(answer["answer"].startswith("<think>") for answer in answers)
    graded = [answer["answer"].rpartition("</think>")[2].strip() == answer["reference"] for answer in answers]
    assert [answer["score"] for answer in answers] == graded
    assert 0 < report["quality"] < 1


def test_a_long_row_among_the_first_of_the_test_rows_costs_that_row(place, tmp_path):
    rows = [dialogue("the sea?", "wide " * 200), *tiny_chat.rows(40, 8)]
    settings = tiny_chat.settings(place)
    settings["data"]["test"] = str(tiny_chat.write_rows(tmp_path / "test.jsonl", rows))
    settings["training"] |= {"max_steps": 2}
    report = execute(Recipe.parse(settings), tmp_path / "run")
    assert len(read_lines(tmp_path / "run" / "answers.jsonl")) == 40
    assert report["latency_ms"] > 0
    assert "test rows: 1 of 41 rows have 0 trained tokens" in (tmp_path / "run" / "log.txt").read_text()
    assert evaluate_run(tmp_path / "run")["rows"] == 40
    with Path(settings["data"]["test"]).open("a") as file:
        file.write(json.dumps(dialogue("the poem?", "short")) + "\n")
    with pytest.raises(DataError, match="has changed since"):
        evaluate_run(tmp_path / "run")


def test_rows_without_an_answer_in_words_are_trained_and_not_graded(place, tmp_path):
    folder = tiny_chat.write_all(tmp_path / "qwen", "qwen")
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    asked = {"role": "user", "content": "weather?"}
    calls = {"messages": [asked, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    rows = [calls, *tiny_chat.rows(3, 2)]
    settings = tiny_chat.settings(folder)
    settings["data"]["test"] = str(tiny_chat.write_rows(tmp_path / "test.jsonl", rows))
    settings["data"]["max_length"] = 200
    settings["training"] |= {"max_steps": 1}
    execute(Recipe.parse(settings), tmp_path / "run")
    assert len(read_lines(tmp_path / "run" / "answers.jsonl")) == 3
    still = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "a", "train": False}]}
        for n in range(3)
    ]
    settings["data"]["validation"] = str(tiny_chat.write_rows(tmp_path / "validation.jsonl", [*still, calls]))
    settings["objective"]["allow_dropped"] = True
    with pytest.raises(DataError, match="ends with an answer in words"):
        execute(Recipe.parse(settings), tmp_path / "again")


def test_probes_that_cannot_be_read_are_found_before_training(tmp_path, monkeypatch):
    folder = tiny_chat.write_all(tmp_path / "plain", None)
    texts = [{"text": f"the sea is wide and {row['messages'][0]['content']}"} for row in tiny_chat.rows(48, 4)]
    data = {"train": str(tiny_chat.write_rows(tmp_path / "texts.jsonl", texts))}
    settings = tiny_chat.settings(folder, objective="pretrain", data=data, forgetting=["task:gcd:size=5"])
    monkeypatch.setattr("graft.build.load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    with pytest.raises(UsageError, match="chat_template"):
        execute(Recipe.parse(settings), tmp_path / "run")


@pytest.mark.parametrize("method", [None, "lora"])
def test_more_tokens_than_positions_are_refused(tmp_path, method):
    rows = [{"text": row["messages"][0]["content"] * 5} for row in tiny_chat.rows(30, 6)]
    folder = tiny_gpt2.write(tmp_path / "gpt2", positions=40)
    data = {"train": str(tiny_chat.write_rows(tmp_path / "texts.jsonl", rows)), "max_length": 64}
    settings = tiny_chat.settings(folder, model=str(folder), objective="pretrain", data=data, method=method)
    with pytest.raises(UsageError, match="max_length 64 exceeds the 40 positions"):
        execute(Recipe.parse(settings), tmp_path / "run")


def test_the_pieces_of_a_text_are_one_row():
    pieces = [
        pretrain.Piece([1, 2, 3], "f:1", 0),
        pretrain.Piece([3, 4, 5], "f:1", 0),
        pretrain.Piece([1, 2], "f:2", 1),
    ]
    figures = SimpleNamespace(
        right=torch.tensor([2, 1, 0]), tokens=torch.tensor([2, 2, 1]), mean_loss=1.0, perplexity=2.7, batch_size=8
    )
    original = pretrain.row_figures
    pretrain.row_figures = lambda *_: figures
    try:
        result = pretrain.Pretrain().evaluate(None, pieces, None, 8)
    finally:
        pretrain.row_figures = original
    assert result.correct == [0.75, 0.0]
    assert result.quality == 0.375
