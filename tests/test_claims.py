"""The measures behind docs/claims.md on cases that can be counted by hand, and the page against the stored figures."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


def load(folder: str, name: str) -> Any:
    sys.path.insert(0, str(ROOT / folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / folder))


repetition = load("benchmarks", "repetition")
duplicates = load("benchmarks", "duplicates")
written, numbers = load("docs", "pages.claims"), load("docs", "pages.numbers")
STORED = json.loads((ROOT / "docs" / "results" / "duplicates.json").read_text("utf-8"))
NINE = "the sea is wide and the sky is high"


# The measures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "n", "expected"),
    [
        ([1, 2, 3, 4, 5, 6], 3, 0.0),
        ([1, 2, 3, 1, 2, 3], 3, 1 / 4),  # 123 231 312 123
        ([7] * 64, 4, 60 / 61),
        ([1, 2] * 4, 3, 4 / 6),  # 121 212 121 212 121 212
        ([1, 2, 3], 4, 0.0),
        ([], 3, 0.0),
    ],
)
def test_repetition_inside_a_text(ids, n, expected):
    assert repetition.repeated(ids, n) == pytest.approx(expected)


def test_words_are_without_case_and_punctuation():
    assert repetition.words("It's -- a FILM's, film … 3 times!") == ["it's", "a", "film's", "film", "3", "times"]
    assert repetition.words("… --") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("today today today", True),
        ("Very, very good.", True),
        ("to day to day", False),
        ("today toda", False),
        ("", False),
    ],
)
def test_a_word_doubled(text, expected):
    assert repetition.doubled(text) == expected


def test_a_run_of_eight_words_of_a_row_counts_and_one_of_seven_does_not():
    known = repetition.runs_of([NINE])
    assert len(known) == 2
    words = NINE.split()
    assert repetition.copied("Surely: " + " ".join(words[:8]).upper() + "!", known)
    assert repetition.copied(" ".join(words[1:]), known)
    assert not repetition.copied(" ".join(words[:7]) + " but", known)
    assert not repetition.copied(" ".join([*words[:4], "not", *words[4:]]), known)
    assert not repetition.copied("", known)
    assert not repetition.copied(NINE, repetition.runs_of([]))


def test_a_run_does_not_reach_from_one_row_into_the_next():
    one, other = "the sea is wide", "and the sky is high"
    assert not repetition.copied(NINE, repetition.runs_of([one, other]))
    assert repetition.copied(NINE, repetition.runs_of([f"{one} {other}"]))


def test_the_longest_run_of_a_row():
    rows = [NINE, "the sky is low and the sea is calm"]
    assert repetition.longest_run("I saw that the sky is high.", rows) == 4
    assert repetition.longest_run("The sea is calm and wide", rows) == 4
    assert repetition.longest_run(NINE, rows) == 9
    assert repetition.longest_run("nothing", rows) == repetition.longest_run("", rows) == 0


def test_variety_of_samples():
    assert repetition.variety([NINE, NINE]) == pytest.approx(0.5)
    assert repetition.variety([NINE, "a b c d"]) == 1.0
    assert repetition.variety(["", "a b"]) == 1.0


def test_bootstrap_is_over_items_and_not_over_seeds():
    rng = np.random.default_rng(0)
    items = rng.random(200)
    mean, low, high = repetition.bootstrap([items])
    half = 1.96 * items.std() / np.sqrt(200)
    assert mean == pytest.approx(items.mean())
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    # Seeds that agree on the mean of each item add nothing, however far they lie apart.
    assert repetition.bootstrap([items + 1, items - 1]) == pytest.approx([mean, low, high])
    assert repetition.bootstrap([[0.5] * 4]) == [0.5, 0.5, 0.5]


def made_up(level: float) -> dict[str, Any]:
    """A measurement with all figures at a level, two prompts or texts each."""
    measured: dict[str, Any] = {}
    for keys in repetition.FIGURES.values():
        place = measured
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = [level, level + 1]
    return measured


def test_the_summary_subtracts_each_condition_from_the_copies_seed_by_seed():
    given = {"base": [made_up(1)], "copies": [made_up(3), made_up(5)], "spread": [made_up(7)]}
    told = repetition.summary(given | {"epochs": [made_up(2)] * 2})
    assert set(told["conditions"]) == {"base", "copies", "spread", "epochs"}
    assert set(told["differences"]) == {"base", "spread", "epochs"}
    for name in repetition.FIGURES:
        assert told["conditions"]["copies"][name]["value"][0] == 4.5
        assert told["conditions"]["copies"][name]["seeds"] == [3.5, 5.5]
        assert told["differences"]["base"][name]["seeds"] == [2, 4]
        assert told["differences"]["spread"][name]["seeds"] == [-4]
        assert told["differences"]["epochs"][name] == {"value": [2, 2, 2], "seeds": [1, 3]}


def test_copies_of_a_row_meet_in_a_step():
    # Rows of one length are not sorted, so copies fall anywhere; of different lengths, copies stand side by side.
    texts = [str(number) for number in range(16)]
    copied = [text for text in texts for _ in range(10)]
    lengths = [int(text) for text in copied]
    assert duplicates.distinct_rows(texts, range(16), 1, 10) == 8
    assert duplicates.distinct_rows(copied, [1] * 160, 1, 1) > 5
    assert duplicates.distinct_rows(copied, lengths, 1, 1) < 2
    assert duplicates.distinct_rows(copied, lengths, 1, 1, spread=True) > 5
    drawn = duplicates.drawn_batches(lengths, 8, seed=1, epoch=0)
    assert sorted(row for batch in drawn for row in batch) == list(range(160))


# The experiment ------------------------------------------------------------------------------------


def test_the_files_of_the_conditions_are_what_the_page_says(tmp_path):
    data = duplicates.write_data(tmp_path, 12, 3)
    assert [len(data[name]) for name in ("copies", "cleaned", "different", "epochs")] == [36, 12, 36, 12]
    assert len(set(data["different"])) == 36
    assert set(data["copies"]) == set(data["cleaned"]) < set(data["different"])
    assert not set(data["held"]) & set(data["different"])
    assert len(data["held"]) == duplicates.HELD
    dropped = (tmp_path / "cleaned.jsonl.dropped.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["rule"] for line in dropped] == ["duplicates"] * 24


def test_the_recipes_differ_in_file_and_epochs_only(tmp_path):
    given = {name: duplicates.recipe(tmp_path, name, 1, 10).resolved() for name in duplicates.CONDITIONS[1:]}
    files = {"epochs": "cleaned", "spread": "copies"}
    for name, settings in given.items():
        assert Path(settings["data"].pop("train")).stem == files.get(name, name)
        assert settings["training"].pop("num_train_epochs") == (10 if name == "epochs" else 1)
    assert len(given) == 5
    assert all(settings == given["copies"] for settings in given.values())
    assert not given["copies"]["training"]["load_best_model_at_end"]


# The stored figures and the page --------------------------------------------------------------------


def test_the_page_is_what_the_stored_figures_give():
    page = written.claims_page()
    assert page == (ROOT / "docs" / "claims.md").read_text("utf-8")
    assert page.count("\n| [") == len(written.CLAIMS) >= 1
    shown = [line for line in page.splitlines() if line.split(" | ")[0].strip("| ") in duplicates.CONDITIONS]
    levels, gaps = shown[: len(duplicates.CONDITIONS)], shown[len(duplicates.CONDITIONS) :]
    assert [line.split(" | ")[0].strip("| ") for line in levels] == list(duplicates.CONDITIONS)
    assert len(gaps) == len(levels) - 1
    for line in levels:
        figures = STORED["conditions"][line.split(" | ")[0].strip("| ")]
        assert f"| {figures['held_loss']['value'][0]:.2f} (" in line
        assert f"| {100 * figures['repeated_4']['value'][0]:.1f} (" in line


def test_the_stored_figures_are_whole():
    assert set(STORED["conditions"]) == set(duplicates.CONDITIONS)
    assert set(STORED["differences"]) == set(duplicates.CONDITIONS) - {"copies"}
    steps = {name: {run["steps"] for run in runs} for name, runs in STORED["trained"].items()}
    assert steps["copies"] == steps["different"] == steps["epochs"] == steps["spread"]
    assert steps["copies"] == {STORED["rows"] * STORED["copies"] // duplicates.BATCH}
    assert steps["cleaned"] == {STORED["rows"] // duplicates.BATCH}
    checked = 0
    for condition, figures in STORED["conditions"].items():
        assert set(figures) == set(repetition.FIGURES)
        for figure in figures.values():
            mean, low, high = figure["value"]
            assert low <= mean <= high
            assert len(figure["seeds"]) == (1 if condition in duplicates.ONCE else len(STORED["seeds"]))
            assert mean == pytest.approx(np.mean(figure["seeds"]))
            checked += 1
    assert checked == len(duplicates.CONDITIONS) * len(repetition.FIGURES)


def clear(condition: str, figure: str, sign: int) -> bool:
    """Whether copies minus a condition has this sign in the whole interval and with every seed."""
    found = STORED["differences"][condition][figure]
    return all(sign * value > 0 for value in [*found["value"], *found["seeds"]])


def test_the_words_of_the_verdict_hold_for_the_stored_figures():
    conditions = STORED["conditions"]
    # "repeats itself less than the one it was, and less than after cleaning or on different rows"
    for condition in ("base", "cleaned", "different"):
        assert clear(condition, "repeated_4", -1), condition
    # "a word doubled ... which is what the claim says; but also before training, with different rows and with epochs"
    assert clear("cleaned", "doubled", 1)
    for condition in ("base", "different", "epochs"):
        assert conditions[condition]["doubled"]["value"][0] > 0
        low, high = STORED["differences"][condition]["doubled"]["value"][1:]
        assert low <= 0 <= high, condition
    # "Cleaning does help", "different rows help most", "the cleaned rows trained for as many steps are the worst"
    losses = {name: figures["held_loss"]["value"][0] for name, figures in conditions.items()}
    assert sorted(losses, key=losses.__getitem__)[:2] == ["different", "cleaned"]
    assert max(losses, key=losses.__getitem__) == "epochs"
    assert clear("cleaned", "held_loss", 1)
    assert clear("different", "held_loss", 1)
    assert clear("epochs", "held_loss", -1)
    assert clear("epochs", "train_loss", 1)
    assert clear("epochs", "copied_when_prompted", -1)
    # "copies come most of the way to epochs, and recite less than half of it"
    copies, spread, epochs = (losses[name] for name in ("copies", "spread", "epochs"))
    assert (copies + epochs) / 2 < spread < epochs
    recited = {name: figures["copied_when_prompted"]["value"][0] for name, figures in conditions.items()}
    assert recited["copies"] < recited["spread"] < recited["epochs"] / 2
    # "One thing only copies has"
    assert conditions["copies"]["copied"]["seeds"][0] == 0 < conditions["copies"]["copied"]["seeds"][1]
    assert all(conditions[name]["copied"]["value"][0] == 0 for name in duplicates.CONDITIONS if name != "copies")
    steps = STORED["distinct_rows_per_step"]
    assert steps["copies"] < steps["spread"] < steps["epochs"] == duplicates.BATCH


# Numbers people repeat -------------------------------------------------------------------------------

claims = load("docs", "claims")
FIGURES = json.loads((ROOT / "docs" / "results" / "claims.json").read_text("utf-8"))


def test_the_counts_are_what_the_code_gives():
    assert claims.counts() == FIGURES["counts"]
    assert claims.parameters() == FIGURES["parameters"]
    assert claims.bits() == FIGURES["bits"]


def test_counts_by_hand():
    counts = FIGURES["counts"]
    assert counts["one_matrix"] == 8 * (1024 + 1024)
    assert counts["bert_base_lora"] == counts["roberta_lora"] == 12 * 2 * 8 * (768 + 768)
    assert counts["codellama_lora"] == 40 * 2 * 8 * (5120 + 5120)
    assert counts["gpt3_lora"] == 96 * 2 * (12288 + 12288)
    full, size = FIGURES["plans"]["full_13b"]["kinds"], FIGURES["parameters"]["llama-2-13b"]
    assert sum(full[kind] for kind in ("weights", "adapter", "gradients", "optimizer")) == pytest.approx(
        16 * size, rel=0.01
    )


def test_a_plan_is_what_the_code_gives():
    model, settings = "llama-2-7b", claims.QLORA
    estimate = claims.plan_model(model, None, settings).estimates[0]
    assert (estimate.kinds, estimate.peak) == (
        FIGURES["plans"]["qlora_7b"]["kinds"],
        FIGURES["plans"]["qlora_7b"]["peak"],
    )


def test_every_claim_has_a_row_and_a_verdict():
    rows = [*numbers.counted(), *numbers.planned(), *numbers.compared()]
    assert len(rows) >= 21
    for claim, found, said in rows:
        assert claim
        assert found
        assert said
        assert f"| {claim} | {found} | {said} |" in written.claims_page()
