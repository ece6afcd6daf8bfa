"""Comparisons: what they write, what they repeat, and what is left when they are killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import yaml
from commands import called
from trials import Trials

from graft import compare as comparing
from graft.compare import BASE, PARENT, Trial, compare, labels, trials
from graft.errors import DataError, GraftError, ModelError, RecipeError
from graft.methods.base import read_method
from graft.recipe import Recipe
from graft.run import execute, stop_with
from graft.runfolder import list_runs
from graft.stats import interval

METHODS = [
    {"name": "lora", "learning_rate": 2e-2},
    {"name": "full", "learning_rate": 2e-3},
    {"name": "prompt", "learning_rate": 5e-2},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tiny.write_all(tmp_path_factory.mktemp("tiny"))


def settings(place: Path, **more: Any) -> dict[str, Any]:
    given = {"methods": METHODS, "seeds": [1, 2], "transfer": [str(place / "other.jsonl")]}
    return tiny.settings(place, **(given | {"forgetting": ["news-editorials"], "probe_samples": 60} | more))


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The names of the trials that are run, in this process."""
    runner = Trials()
    monkeypatch.setattr(comparing, "_run", runner)
    return runner.names


class Compared(NamedTuple):
    recipe: Recipe
    folder: Path
    comparison: dict[str, Any]
    names: list[str]
    seen: list[tuple[int, int, str, str, float]]


@pytest.fixture(scope="module")
def compared(place) -> Compared:
    """Three methods with two seeds, and the base."""
    runner, seen = Trials(), []
    recipe, folder = Recipe.parse(settings(place)), place / "compared"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "_run", runner)
        comparison = compare(recipe, folder, lambda *given: seen.append(given), "graft compare x.yaml")
    return Compared(recipe, folder, comparison, runner.names, seen)


def load(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def times(folder: Path) -> dict[str, int]:
    found = {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("trials/*/report.json")}
    assert found
    return found


def row(comparison: dict[str, Any], label: str) -> dict[str, Any]:
    return next(row for row in comparison["rows"] if row["label"] == label)


# What is written ----------------------------------------------------------------------------------


def test_trials_are_run_in_order(compared):
    names = ["base", *(f"{name} (seed {seed})" for name in ("lora", "full", "prompt") for seed in (1, 2))]
    assert compared.names == names
    assert {path.name for path in (compared.folder / "trials").iterdir()} == {
        "base-seed1",
        *(f"{name}-learning_rate-{rate}-seed{seed}" for name, rate in RATES for seed in (1, 2)),
    }
    counts = [(done, total) for done, total, *_ in compared.seen]
    assert counts == sorted(counts)
    assert counts[-1] == (7, 7)
    assert {name for _, _, name, _, _ in compared.seen} == {*names, ""}


RATES = (("lora", 0.02), ("full", 0.002), ("prompt", 0.05))


def test_files_of_a_comparison(compared):
    assert {path.name for path in compared.folder.iterdir()} == {
        "recipe.yaml", "comparison.json", "report.html", "trials",
    }  # fmt: skip
    assert load(compared.folder / "comparison.json") == compared.comparison
    assert yaml.safe_load((compared.folder / "recipe.yaml").read_text("utf-8")) == compared.recipe.resolved()
    page = (compared.folder / "report.html").read_text("utf-8")
    assert "<html" in page[:200]
    assert all(name in page for name in ("lora", "full", "prompt", "base"))


def test_keys_of_a_comparison(compared):
    comparison = compared.comparison
    assert set(comparison) == {
        "title", "created", "command", "model", "data", "objective", "metric", "forgetting_unit", "seeds",
        "environment", "recipe", "rows", "verdicts", "notes",
    }  # fmt: skip
    assert comparison["title"] == f"Fine-tuning {compared.recipe.model} on {compared.recipe.data.train}"
    assert comparison["command"] == "graft compare x.yaml"
    assert comparison["data"] == {
        "name": compared.recipe.data.train,
        "train": 240,
        "validation": 40,
        "test": 60,
        "labels": ["negative", "positive"],
    }
    assert (comparison["objective"], comparison["metric"], comparison["seeds"]) == ("classify", "accuracy", [1, 2])
    assert comparison["model"].keys() == {"name", "fingerprint", "parameters", "architecture"}
    assert comparison["environment"]["dtype"] == "fp32"
    assert comparison["recipe"] == compared.recipe.resolved()


def test_keys_of_a_row(compared):
    for found in compared.comparison["rows"]:
        assert set(found) == {
            "label", "method", "status", "cause", "seeds", "quality", "quality_low", "quality_high",
            "trainable_parameters", "trainable_fraction", "peak_memory_bytes", "train_seconds", "examples_per_second",
            "expected_memory_bytes", "expected_seconds",
            "adapter_bytes", "latency_ms", "merged_latency_ms", "learning_rate", "forgetting", "transfer", "curve",
            "figures",
            "by_rank",
        }  # fmt: skip
        assert (found["status"], found["cause"]) == ("done", None)
        assert found["forgetting"].keys() == {"news-editorials"}
        assert found["transfer"].keys() == set(compared.recipe.transfer)
        # Two seeds that differ much give an interval from 0 to 1.
        assert 0 <= found["quality_low"] < found["quality"] <= found["quality_high"] <= 1
        assert found["latency_ms"] > 0
    assert [found["method"] for found in compared.comparison["rows"]] == ["base", "lora", "full", "prompt"]
    assert [found["seeds"] for found in compared.comparison["rows"]] == [1, 2, 2, 2]


def test_figures_are_those_of_the_trials(compared):
    base = load(compared.folder / "trials" / "base-seed1" / "report.json")
    for name, rate in RATES:
        found = row(compared.comparison, name)
        folders = [compared.folder / "trials" / f"{name}-learning_rate-{rate}-seed{seed}" for seed in (1, 2)]
        reports = [load(folder / "report.json") for folder in folders]
        correct = [load(folder / "correct.json")["correct"] for folder in folders]
        assert found["learning_rate"] == rate
        assert found["quality"] == pytest.approx(sum(report["quality"] for report in reports) / 2)
        measured = interval(correct)
        assert (found["quality_low"], found["quality_high"]) == (measured.low, measured.high)
        for key in ("train_seconds", "examples_per_second", "latency_ms"):
            assert found[key] == sum(report[key] for report in reports) / 2
        for key in ("peak_memory_bytes", "adapter_bytes"):
            assert found[key] == round(sum(report[key] for report in reports) / 2)
        assert found["trainable_parameters"] == reports[0]["trainable_parameters"] == reports[1]["trainable_parameters"]
        other = compared.recipe.transfer[0]
        assert found["transfer"] == {other: sum(report["transfer"][other] for report in reports) / 2}
        lost = base["probes"]["news-editorials"] - sum(report["probes"]["news-editorials"] for report in reports) / 2
        assert found["forgetting"]["news-editorials"] == pytest.approx(100 * lost)
        assert found["curve"] == reports[0]["curve"]
    assert any(found["forgetting"]["news-editorials"] for found in compared.comparison["rows"])
    assert row(compared.comparison, "lora")["merged_latency_ms"] > 0
    assert row(compared.comparison, "full")["merged_latency_ms"] > 0
    assert row(compared.comparison, "prompt")["merged_latency_ms"] is None


def test_row_of_the_base(compared):
    found = row(compared.comparison, BASE)
    assert found["trainable_parameters"] == found["adapter_bytes"] == 0
    for key in ("train_seconds", "peak_memory_bytes", "examples_per_second", "learning_rate"):
        assert found[key] is None
    assert found["forgetting"] == {"news-editorials": 0.0}
    assert found["curve"] == []


def test_every_pair_has_a_verdict(compared):
    found = compared.comparison["verdicts"]
    assert {(verdict["first"], verdict["second"]) for verdict in found} == set(
        combinations(["base", "lora", "full", "prompt"], 2)
    )
    for verdict in found:
        assert set(verdict) == {"first", "second", "outcome", "difference", "low", "high", "p"}
        first, second = (row(compared.comparison, verdict[side])["quality"] for side in ("first", "second"))
        assert verdict["difference"] == pytest.approx(first - second)
        better = "better" if verdict["difference"] > 0 else "worse"
        assert verdict["outcome"] == (better if verdict["p"] < 0.05 else "tie")
        assert 0 <= verdict["p"] <= 1


def test_trials_are_listed_as_runs(compared):
    found = list_runs(compared.folder)
    assert len(found) == 7
    assert {entry["method"] for entry in found} == {"base", "lora", "full", "prompt"}


# What is repeated ---------------------------------------------------------------------------------


def test_finished_trials_are_not_repeated(compared, ran):
    before = times(compared.folder)
    again = compare(compared.recipe, compared.folder)
    assert ran == []
    assert times(compared.folder) == before
    assert {**again, "created": 0, "command": 0} == {**compared.comparison, "created": 0, "command": 0}


def test_another_method_or_seed_repeats_nothing(place, tmp_path, ran):
    lora, other = {"name": "lora", "r": 2}, {"name": "lora", "r": 4}
    few = {"seeds": [1], "forgetting": [], "transfer": [], "training": {"max_steps": 2, "precision": "fp32"}}
    run = lambda **more: compare(Recipe.parse(settings(place, **(few | more))), tmp_path / "out")  # noqa: E731
    run(methods=[lora])
    assert ran == ["base", "lora (seed 1)"]
    before = times(tmp_path / "out")
    ran.clear()
    assert [found["label"] for found in run(methods=["prompt", lora])["rows"]] == ["base", "prompt", "lora"]
    assert ran == ["prompt (seed 1)"]
    ran.clear()
    # Another lora changes the first one's label, not its trial.
    rows = run(methods=[lora, "prompt", other])["rows"]
    assert [found["label"] for found in rows] == ["base", "lora r=2", "prompt", "lora r=4"]
    assert ran == ["lora r=4 (seed 1)"]
    ran.clear()
    assert [found["seeds"] for found in run(methods=[lora], seeds=[1, 2])["rows"]] == [1, 2]
    assert ran == ["lora (seed 2)"]
    ran.clear()
    assert len(run(methods=["prompt"])["rows"]) == 2
    assert ran == []
    assert {name: now for name, now in times(tmp_path / "out").items() if name in before} == before


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"training": {"max_steps": 2}}, "training."),
        ({"transfer": []}, "transfer: "),
        ({"probe_samples": 51}, "probe_samples: 60, now 51"),
        ({"objective": {"name": "classify", "pooling": "first"}}, "objective.pooling: mean, now first"),
    ],
)
def test_another_comparison_in_the_folder(place, compared, ran, more, what):
    before = times(compared.folder)
    with pytest.raises(RecipeError) as caught:
        compare(Recipe.parse(settings(place, **more)), compared.folder)
    assert f"{compared.folder} holds another comparison (" in str(caught.value)
    assert what in str(caught.value)
    assert ran == []
    assert times(compared.folder) == before


def test_data_changed_since(place, tmp_path, ran):
    test = tiny.write_rows(tmp_path / "test.jsonl", tiny.rows(30, 50))
    more = {"methods": ["lora"], "seeds": [1], "forgetting": [], "transfer": [], "training": {"max_steps": 2}}
    given = settings(place, **more)
    given["data"]["test"] = str(test)
    recipe = Recipe.parse(given)
    compare(recipe, tmp_path / "out")
    ran.clear()
    tiny.write_rows(test, tiny.rows(30, 51))
    with pytest.raises(DataError, match=r"test\.jsonl has changed since .*base-seed1; choose another folder"):
        compare(recipe, tmp_path / "out")
    assert ran == []


# What is refused before any trial -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "kind", "what"),
    [
        ({"model": "/no/such/model"}, ModelError, "/no/such/model: no such model folder"),
        ({"data": {"train": "/no/such.jsonl"}}, DataError, "/no/such.jsonl"),
        ({"forgetting": ["news-editorial"]}, DataError, "news-editorial"),
        ({"transfer": ["/no/such.jsonl"]}, DataError, "/no/such.jsonl"),
        ({"methods": ["lora", "lora"]}, RecipeError, "methods: 'lora' stands twice with the same settings"),
    ],
)
def test_bad_input_starts_no_trial(place, tmp_path, ran, more, kind, what):
    with pytest.raises(kind) as caught:
        compare(Recipe.parse(settings(place, **more)), tmp_path / "out")
    assert what in str(caught.value)
    assert ran == []
    assert list(tmp_path.iterdir()) == []


def test_folder_with_other_files(place, tmp_path, ran):
    recipe = Recipe.parse(settings(place))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".hidden").write_text("x")
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(RecipeError, match=r"holds other files \(thesis\.tex\); choose another folder with -o"):
        compare(recipe, tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RecipeError, match="is a file, a comparison needs a folder"):
        compare(recipe, tmp_path / "file")
    execute(tiny.recipe(place, training={"max_steps": 2}), tmp_path / "run")
    with pytest.raises(RecipeError, match="holds other files"):
        compare(recipe, tmp_path / "run")
    assert ran == []


def test_a_run_does_not_go_into_a_comparison(compared, place):
    with pytest.raises(RecipeError, match=r"holds other files \(comparison\.json\)"):
        execute(tiny.recipe(place), compared.folder)


# Labels and folders -------------------------------------------------------------------------------


def read(*given: Any) -> list[Any]:
    return [read_method(each) for each in given]


def test_labels_say_how_methods_differ():
    assert labels(read("lora", "full")) == ["lora", "full"]
    assert labels(read("lora", {"name": "lora", "r": 16}, "full")) == ["lora r=8", "lora r=16", "full"]
    assert labels(read("adalora", {"name": "adalora", "tinit": 0})) == ["adalora", "adalora tinit=0"]
    linear = {"name": "lora", "target_modules": ["attn.q", "mlp.up"]}
    assert labels(read("lora", {"name": "lora", "use_rslora": True}, linear)) == [
        "lora",
        "lora use_rslora",
        "lora target_modules=attn.q+mlp.up",
    ]
    three = read({"name": "lora", "r": 4}, {"name": "lora", "r": 4, "lora_alpha": 8}, "lora")
    assert labels(three) == [
        "lora r=4 lora_alpha=16.0",
        "lora r=4 lora_alpha=8.0",
        "lora r=8 lora_alpha=16.0",
    ]
    with pytest.raises(RecipeError, match="'lora' stands twice with the same settings"):
        labels(read("lora", {"name": "lora", "r": 8}))
    with pytest.raises(RecipeError, match="'lora r=4' stands twice"):
        labels(read("lora", {"name": "lora", "r": 4}, {"name": "lora", "r": 4}))


def test_trial_folders_differ_and_are_plain_names(place):
    many = [
        "lora",
        {"name": "lora", "r": 16},
        {"name": "lora", "target_modules": ["attn.q"]},
        {"name": "lora", "target_modules": ["attn/q"]},
        {"name": "lora", "target_modules": [f"layers.{layer}.attn.q" for layer in range(99)]},
        {"name": "frozen", "pattern": "../../x"},
        "prompt",
    ]
    given = Recipe.parse(settings(place, methods=many, seeds=[1]))
    planned = trials(given, Path("out"))
    names = [trial.folder.name for trial in planned]
    assert len(set(names)) == len(names) == 8
    assert {"base-seed1", "lora-seed1", "lora-r-16-seed1", "prompt-seed1"} <= set(names)
    assert {trial.folder.parent for trial in planned} == {Path("out/trials")}
    for name in names:
        assert len(name) < 120
        assert all(letter.isascii() and (letter.isalnum() or letter in ".-_") for letter in name)
    # The order of the list and its other members do not matter.
    again = trials(Recipe.parse(settings(place, methods=many[::-1], seeds=[1])), Path("out"))
    assert {trial.folder for trial in again} == {trial.folder for trial in planned}
    by_folder = {trial.folder: trial.recipe for trial in again}
    assert all(by_folder[trial.folder] == trial.recipe for trial in planned)


# Trials that fail ---------------------------------------------------------------------------------


def test_failed_trial_costs_its_row_only(place, tmp_path, ran, capsys, monkeypatch):
    path = tmp_path / "r.yaml"
    few = {"forgetting": [], "transfer": [], "seeds": [1], "training": {"max_steps": 2, "precision": "fp32"}}
    path.write_text(yaml.safe_dump(settings(place, methods=["lora", {"name": "lora", "r": 33}, "prompt"], **few)))
    code, out, err = called(monkeypatch, capsys, "compare", str(path), "-o", str(tmp_path / "out"), "--json")
    assert code == 1
    lines = err.splitlines()
    assert lines[:4] == [
        f"trial {number + 1} of 4: {name}"
        for number, name in enumerate(["base", "lora r=8 (seed 1)", "lora r=33 (seed 1)", "prompt (seed 1)"])
    ]
    assert len(lines) == 5
    assert lines[4].startswith(
        "graft: 1 of 4 rows failed: lora r=33: r: 33 is not from 1 to 32, the size of layers.0.attn.q"
    )
    comparison = json.loads(out)
    assert comparison == load(tmp_path / "out" / "comparison.json")
    failed = row(comparison, "lora r=33")
    assert (failed["status"], failed["seeds"], failed["quality"], failed["curve"]) == ("failed", 0, None, [])
    assert "r: 33 is not from 1 to 32" in failed["cause"]
    assert set(failed) == set(row(comparison, "prompt"))
    assert [found["status"] for found in comparison["rows"]] == ["done", "done", "failed", "done"]
    assert {name for verdict in comparison["verdicts"] for name in (verdict["first"], verdict["second"])} == {
        "base", "lora r=8", "prompt",
    }  # fmt: skip
    assert "lora r=33" in (tmp_path / "out" / "report.html").read_text("utf-8")
    # The failed one is tried again, the others are not; without it the comparison is whole.
    ran.clear()
    assert called(monkeypatch, capsys, "compare", str(path), "-o", str(tmp_path / "out"))[0] == 1
    assert ran == ["lora r=33 (seed 1)"]
    ran.clear()
    code, out, err = called(
        monkeypatch, capsys, "compare", str(path), "-o", str(tmp_path / "out"), "methods=[lora, prompt]"
    )
    assert (code, ran, err) == (0, [], "")
    assert "report: " in out


def test_one_failed_seed_fails_the_row(place, tmp_path, monkeypatch):
    runner = Trials()

    def run(trial: Trial, tell: Any) -> str | None:
        return "out of luck" if trial.name == "lora (seed 2)" else runner(trial, tell)

    monkeypatch.setattr(comparing, "_run", run)
    more = {"methods": ["lora"], "forgetting": [], "transfer": [], "training": {"max_steps": 2}}
    comparison = compare(Recipe.parse(settings(place, **more)), tmp_path / "out")
    failed = row(comparison, "lora")
    assert (failed["status"], failed["cause"], failed["seeds"], failed["quality"]) == ("failed", "out of luck", 1, None)
    assert comparison["verdicts"] == []


def test_failed_base_leaves_forgetting_open(place, tmp_path, monkeypatch):
    runner = Trials()
    monkeypatch.setattr(
        comparing, "_run", lambda trial, tell: "no luck" if trial.label == BASE else runner(trial, tell)
    )
    more = {"methods": ["lora"], "seeds": [1], "training": {"max_steps": 2}}
    comparison = compare(Recipe.parse(settings(place, **more)), tmp_path / "out")
    assert [found["status"] for found in comparison["rows"]] == ["failed", "done"]
    assert row(comparison, "lora")["forgetting"] == {}


def test_no_trial_finished(place, tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "_run", lambda trial, tell: f"no luck with {trial.name}")
    with pytest.raises(GraftError, match="no trial of the comparison finished; the first: no luck with base") as caught:
        compare(Recipe.parse(settings(place)), tmp_path / "out")
    assert caught.value.exit_code != 0
    assert not (tmp_path / "out" / "comparison.json").exists()


# The process of a trial ---------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path, monkeypatch) -> Callable[[str], None]:
    """Puts a shell script in place of Python, so that the process of a trial does what it says."""

    def write(text: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        monkeypatch.setattr(comparing.sys, "executable", str(path))

    return write


@pytest.fixture
def trial(place, tmp_path) -> Trial:
    return trials(Recipe.parse(settings(place)), tmp_path / "out")[1]


@pytest.fixture
def limit() -> Iterator[None]:
    """Fails a test that hangs."""

    def late(*_: object) -> None:
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def ignore(phase: str, share: float) -> None:
    pass


@pytest.mark.usefixtures("limit")
def test_trial_gets_its_recipe_and_its_parent(program, trial, tmp_path):
    program(f'cat > {tmp_path}/given; echo "$GRAFT_PARENT $@" > {tmp_path}/called')
    assert comparing._run(trial, ignore) is None
    assert Recipe.parse(yaml.safe_load((tmp_path / "given").read_text("utf-8"))) == trial.recipe
    assert (tmp_path / "called").read_text().strip() == (f"{os.getpid()} -m graft train - -o {trial.folder} --quiet")


@pytest.mark.usefixtures("limit")
def test_trial_that_prints_much_and_fails(program, trial):
    """More than a pipe holds: a trial that waits for its words to be read would never end."""
    program("head -c 300000 /dev/zero | tr '\\0' 'x' >&2; echo >&2; echo 'graft: no luck; try again' >&2; exit 3")
    assert comparing._run(trial, ignore) == "no luck; try again"


@pytest.mark.usefixtures("limit")
@pytest.mark.parametrize(
    ("end", "cause"),
    [
        ("kill -9 $$", "ended by SIGKILL, which out of memory looks like"),
        ("kill -11 $$", "ended by SIGSEGV"),
        ("exit 7", "exit code 7"),
        ("printf 'a\\377b\\n' >&2; exit 1", "a\ufffdb"),
    ],
)
def test_trial_that_ends_without_a_word(program, trial, end, cause):
    program(end)
    assert comparing._run(trial, ignore) == cause


@pytest.mark.usefixtures("limit")
def test_interrupted_trial_interrupts_the_comparison(program, trial):
    program("exit 130")
    with pytest.raises(KeyboardInterrupt):
        comparing._run(trial, ignore)


@pytest.mark.usefixtures("limit")
def test_interrupt_ends_the_trial_first(program, trial, tmp_path):
    """Even where SIGINT is ignored, as in a background job of a script."""
    status = json.dumps({"state": "running", "phase": "training, step 3 of 9", "fraction": 0.25, "pid": "PID"})
    program(
        f"trap '' INT; trap 'echo ended > {tmp_path}/marker; exit 130' TERM; mkdir -p {trial.folder}\n"
        f'echo \'{status}\' | sed "s/\\"PID\\"/$$/" > {trial.folder}/status.json\n'
        "while true; do sleep 0.1; done"
    )
    seen = []

    def tell(phase: str, share: float) -> None:
        seen.append((phase, share))
        if len(seen) == 2:
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        comparing._run(trial, tell)
    assert seen == [("starting", 0.0), ("training, step 3 of 9", 0.25)]
    assert (tmp_path / "marker").read_text() == "ended\n"
    assert time.monotonic() - started < 10


def test_run_ends_when_its_parent_is_gone():
    stop_with(None)
    stop_with(os.getppid())
    with pytest.raises(KeyboardInterrupt):
        stop_with(os.getppid() + 1)


def wait_for(ready: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = ready()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def training(status: Path) -> dict[str, Any] | None:
    found = load(status) if status.exists() else {}
    return found if found.get("phase", "").startswith("training") and alive(found["pid"]) else None


@pytest.mark.slow
def test_killed_and_interrupted_comparison(place, tmp_path, monkeypatch, capsys):
    """kill -9, then Ctrl-C, in the middle of a trial: no process is left, and the end has every row."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # several threads wait for each other when tests run side by side
    path, out = tmp_path / "r.yaml", tmp_path / "out"
    few = {"forgetting": [], "transfer": [], "seeds": [1], "training": {"max_steps": 200, "num_train_epochs": 99}}
    path.write_text(yaml.safe_dump(settings(place, methods=["lora"], **few)))
    base, lora = trials(Recipe.parse(yaml.safe_load(path.read_text())), out)
    execute(base.recipe, base.folder)
    before = times(out)
    status = lora.folder / "status.json"

    command = [sys.executable, "-m", "graft", "compare", str(path), "-o", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, text=True) as process:
        child = wait_for(lambda: training(status))["pid"]
        process.kill()
        assert process.wait() == -signal.SIGKILL
    wait_for(lambda: not alive(child), 10)
    assert load(status)["state"] == "stopped"
    assert times(out) == before
    assert not (out / "comparison.json").exists()

    def press() -> None:
        wait_for(lambda: training(status))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    code, written, said = called(monkeypatch, capsys, "compare", str(path), "-o", str(out), "--json")
    thread.join()
    assert (code, written) == (130, "")
    assert said.splitlines() == [
        "trial 2 of 2: lora (seed 1)",
        "graft: interrupted; the same command starts again and repeats no finished trial",
    ]
    stopped = load(status)
    assert stopped["state"] == "stopped"
    assert not alive(stopped["pid"])

    code, written, said = called(monkeypatch, capsys, "compare", str(path), "-o", str(out), "--json")
    assert (code, said) == (0, "trial 2 of 2: lora (seed 1)\n")
    assert [found["status"] for found in json.loads(written)["rows"]] == ["done", "done"]
    assert times(out).items() > before.items()
    assert load(status)["pid"] != os.getpid()
    assert PARENT not in os.environ
