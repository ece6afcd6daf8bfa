"""What is recommended: rules, measurements that beat them, what fits, the recipe that is written, and bad input."""

import json
from pathlib import Path

import pytest
import tiny

from graft.advice.case import GOALS, case_of
from graft.advice.evidence import gather
from graft.advice.recommend import recommend
from graft.advice.ruled import by_rules
from graft.advice.rules import RULES
from graft.cli import app
from graft.errors import ResourceError, UsageError
from graft.planning.machine import known
from graft.recipe import Recipe, read_recipe

ROOT = Path(__file__).parents[1]
GB = 1 << 30


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recommend")
    model = tiny.write_model(folder / "model")
    rows = tiny.rows(60, 1)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Recipe.parse({"model": str(model), "data": {"train": str(data), "max_length": 24}})


@pytest.fixture(autouse=True)
def no_alternatives(monkeypatch):
    """Most tests look at what is chosen: the next choices take two more plans."""
    monkeypatch.setattr("graft.advice.fit.ALTERNATIVES", 0)


def settings_of(found):
    return {told.setting: told for told in found.statements}


def write_comparison(folder, recipe, methods, qualities, verdicts, objective="classify", name=None):
    """A comparison.json with what is read of one."""
    from graft.compare import labels

    parsed = Recipe.parse(recipe.resolved() | {"methods": methods})
    names = labels(parsed.methods)
    rows = [
        {
            "label": label, "method": label.split()[0], "status": "done", "quality": quality,
            "quality_low": quality - 0.02,
            "quality_high": quality + 0.02, "peak_memory_bytes": 10**8, "train_seconds": 9.0, "latency_ms": 2.0,
            "merged_latency_ms": None, "learning_rate": 0.003,
        }
        for label, quality in zip(names, qualities, strict=True)
    ]  # fmt: skip
    given = {
        "model": {"name": name or recipe.model, "fingerprint": "abc"}, "objective": objective, "seeds": [1, 2, 3],
        "data": {"train": 500, "test": 200}, "metric": "accuracy", "created": "2026-01-01", "rows": rows,
        "recipe": parsed.resolved(), "verdicts": verdicts,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "comparison.json").write_text(json.dumps(given), encoding="utf-8")


def verdict(first, second, outcome, difference):
    values = {"difference": difference, "low": difference - 0.01, "high": difference + 0.01, "p": 0.01}
    return {"first": first, "second": second, "outcome": outcome} | values


def test_rules_without_measurements(recipe, monkeypatch):
    monkeypatch.setattr("graft.advice.fit.ALTERNATIVES", 2)
    found = recommend(recipe, memory=64 * GB)
    told = settings_of(found)
    assert (found.method, told["r"].value, told["lora_alpha"].value) == ("lora", 8, 16)
    assert told["quantization"].value is None
    assert told["target_modules"].value == ["all-linear"]
    assert told["r"].basis == "rule"
    assert "arXiv" in told["r"].source
    assert found.evidence == []
    assert found.peak <= 64 * GB
    assert len(found.alternatives) == 2
    assert all(other.peak for other in found.alternatives)


def test_a_measurement_beats_the_rule_and_says_so(recipe, tmp_path):
    verdicts = [verdict("lora", "bitfit", "worse", -0.1)]
    write_comparison(tmp_path / "a", recipe, ["lora", "bitfit"], [0.8, 0.9], verdicts)
    found = recommend(recipe, memory=64 * GB, runs=tmp_path)
    told = settings_of(found)
    assert found.method == "bitfit"
    assert told["method"].basis == "measured"
    assert "500 training and 200 test rows, 3 seeds" in told["method"].source
    assert told["learning_rate"].value == 0.003
    assert any("10.0 points (9.0 to 11.0)" in line for line in found.yielded)
    assert not any(told.basis == "rule" and told.setting == "r" for told in found.statements)


def test_a_tie_leaves_the_rule_and_other_objectives_and_models_do_not_count(recipe, tmp_path):
    tie = [verdict("lora", "bitfit", "tie", -0.01)]
    write_comparison(tmp_path / "a", recipe, ["lora", "bitfit"], [0.89, 0.9], tie)
    write_comparison(tmp_path / "b", recipe, ["ia3"], [0.99], [], objective="instruct")
    write_comparison(tmp_path / "c", recipe, ["ia3"], [0.99], [], name="another")
    found = recommend(recipe, memory=64 * GB, runs=tmp_path)
    assert found.method == "lora"
    assert "no clear difference from bitfit" in settings_of(found)["method"].reason
    # c has the fingerprint that the model's name has in a, so it is the same model under another name
    assert len(found.evidence) == 2
    assert "b/comparison.json" not in " ".join(found.evidence)


def test_damaged_comparisons_are_named(recipe, tmp_path):
    (tmp_path / "comparison.json").write_text("{", encoding="utf-8")
    found, notes = gather(tmp_path, recipe.model, "classify")
    assert found == []
    assert len(notes) == 1
    assert "comparison.json is left out" in notes[0]


@pytest.mark.parametrize("goal", [goal for goal in GOALS if goal != "quality"])
def test_a_goal_rules_out_what_does_not_serve_it(recipe, tmp_path, goal):
    methods = ["full", "bottleneck", "lora"]
    verdicts = [verdict("full", other, "better", 0.1) for other in ("bottleneck", "lora")]
    write_comparison(
        tmp_path / "a", recipe, methods, [0.95, 0.85, 0.8], [*verdicts, verdict("bottleneck", "lora", "better", 0.05)]
    )
    found = recommend(recipe, memory=64 * GB, goal=goal, runs=tmp_path)
    assert found.method == {"latency": "full", "many-tasks": "bottleneck", "memory": "bottleneck"}[goal]
    reason = settings_of(found)["quantization"].reason
    assert ("bottleneck was measured on a base in 16 or 32 bits" in reason) == (goal == "memory")


@pytest.mark.slow
def test_a_large_model_on_a_small_card_is_quantized_and_fits():
    # Two rows of a small vocabulary: a plan takes as long as it has passes and chunks of scores.
    two = {"training": {"per_device_train_batch_size": 2}}
    found = recommend(model="llama-2-7b", rows=5000, memory=9 * GB, settings=two, machine=known("rtx-4080"))
    told = settings_of(found)
    assert told["quantization"].value == "nf4"
    assert told["r"].value == 8
    assert found.peak <= 9 * GB
    size = told["per_device_train_batch_size"].value
    assert int(size) * int(told["gradient_accumulation_steps"].value) == 2
    assert int(size) == 1
    assert found.run_seconds
    assert found.recipe is None


def test_more_rows_than_a_million_say_full(recipe):
    case = case_of(None, "llama-3.2-1b", 2_000_000, {}, 80 * GB, None, "quality")
    assert by_rules(case, []).method.name == "full"
    case = case_of(None, "llama-3.2-1b", 50_000, {}, 80 * GB, None, "quality")
    method = by_rules(case, []).method
    assert (method.r, method.lora_alpha) == (32, 64)


def test_what_is_recommended_is_a_recipe_that_reads_back(recipe):
    found = recommend(recipe, memory=64 * GB)
    read = read_recipe(None, text=Recipe.parse(found.recipe).to_yaml())
    assert read.method.name == "lora"
    assert read.method.r == 8
    assert read.data == recipe.data


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"goal": "qualty"}, "did you mean 'quality'"),
        ({"rows": 5}, "--rows goes with --model"),
        ({"model": "gpt2"}, "one of a recipe and a model"),
    ],
)
def test_bad_calls(recipe, arguments, message):
    with pytest.raises(UsageError, match=message):
        recommend(recipe, memory=GB, **arguments)


def test_unknown_model_and_what_cannot_fit(recipe):
    with pytest.raises(UsageError, match="did you mean 'llama-2-7b'"):
        recommend(model="llama-2-7bb", memory=GB)
    with pytest.raises(ResourceError, match="too much"):
        recommend(recipe, memory=1 << 20)


def run(*arguments):
    app(["recommend", *map(str, arguments)], standalone_mode=False)


def test_the_command(recipe, tmp_path, capsys):
    file, out = tmp_path / "r.yaml", tmp_path / "out.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    run(file, "--memory", "16GB", "--device", "rtx-4080", "--runs", tmp_path, "--json", "--write", out)
    assert json.loads(capsys.readouterr().out)["method"] == "lora"
    assert read_recipe(out).method.lora_alpha == 16
    before = out.read_text()
    for arguments, said in (
        ((file, "--memory", "16GB", "--write", out), "exists"),
        ((file, "--memory", "16"), "has no unit"),
        ((file, "method=dora", "--memory", "16GB"), "is what is recommended"),
        ((file, "--goal", "speed"), "no goal"),
        (("--model", "gpt2", "--write", tmp_path / "x.yaml"), "--write needs a recipe"),
    ):
        with pytest.raises(UsageError, match=said):
            run(*arguments)
    assert capsys.readouterr().out == ""
    assert out.read_text() == before


def test_the_docs_have_every_rule():
    text = (ROOT / "docs" / "recommend.md").read_text(encoding="utf-8")
    assert len(RULES) >= 12
    for rule in RULES.values():
        assert f"| {rule.when} | {rule.says} | {rule.source} |" in text
        assert "arXiv" in rule.source
