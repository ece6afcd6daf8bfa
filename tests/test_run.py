"""Runs: the folder they leave, the arithmetic of training, guards, checkpoints, restarts."""

import fcntl
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
import yaml
from torch import nn
from transformers.models.bert.modeling_bert import BertSelfAttention

from graft import run as running
from graft import runfolder
from graft.assess import LabelAssessor
from graft.build import ADAPTER, build_adapter
from graft.data.batch import training_batches
from graft.data.load import read_all
from graft.errors import DamagedError, DataError, GraftError, GuardError, RecipeError, ResourceError, UsageError
from graft.evaluate import retrieval_probe
from graft.methods.base import methods
from graft.model import load_base, load_tokenizer
from graft.objectives.base import Loss, Result
from graft.objectives.classify import Classify
from graft.parts.attach import detach
from graft.parts.lowrank import LoraPart
from graft.planning.catalogue import config_of
from graft.planning.preflight import forecast
from graft.planning.simulate import Rows
from graft.recipe import Recipe
from graft.run import evaluate_run, execute
from graft.runfolder import RunFolder, list_runs
from graft.train import checkpoint
from graft.train.guards import MovementGuard, digest
from graft.train.loop import Trainer, make_accelerator
from graft.train.optim import make_optimizer, make_schedule, share_of_peak
from graft.train.points import Point
from graft.train.precision import choose
from graft.train.settings import Training

RATES = dict.fromkeys(methods(), 1e-2)
RATES |= {"full": 2e-3, "frozen": 2e-3, "lora": 2e-2, "prefix": 5e-2, "prompt": 5e-2, "ptuning_v2": 5e-2}
SHORTER = {"mam": {"num_virtual_tokens": 8}}
"""30 virtual tokens and rows of 24 are more than the tiny model's 48 positions."""


class Done(NamedTuple):
    recipe: Recipe
    folder: Path
    report: dict[str, Any]
    scores: torch.Tensor
    """Of the first validation rows, by the adapter that was trained, before it was saved."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tiny.write_all(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def done(place) -> dict[str, Done]:
    """A finished run of each method."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        seen: list[torch.Tensor] = []
        logits = LabelAssessor.logits

        def spy(*given: Any) -> torch.Tensor:
            seen.append(logits(*given))
            return seen[-1]

        patch.setattr(LabelAssessor, "logits", spy)
        for name in methods():
            seen.clear()
            method = {"name": name, "learning_rate": RATES[name]} | SHORTER.get(name, {})
            recipe = tiny.recipe(place, method=method, transfer=[str(place / "other.jsonl")])
            report = execute(recipe, place / "runs" / name)
            found[name] = Done(recipe, place / "runs" / name, report, seen[0])
    return found


def load(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def tensors(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def fails(kind: type[GraftError], code: int, recipe: Recipe, folder: Path) -> str:
    with pytest.raises(kind) as caught:
        execute(recipe, folder)
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The folder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RATES)
def test_run_folder_is_complete(done, name):
    folder = done[name].folder
    entries = {entry.name for entry in folder.iterdir()} - {".lock"}
    documented = set(re.findall(r"(?<=  )[a-z_]+(?:\.[a-z]+|/)(?= )", runfolder.__doc__.replace("runs/NAME/", "")))
    documented = {entry.rstrip("/") for entry in documented}
    assert documented == runfolder.FILES - {".lock"}
    assert entries == documented - {"answers.jsonl", "skipped.jsonl", "bad_batch.jsonl"}
    assert {file.name for file in (folder / "adapter").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "graft.json",
    }  # fmt: skip
    best = done[name].report["best_step"]
    assert [entry.name for entry in (folder / "checkpoints").iterdir()] == ["best"]
    assert load(folder / "checkpoints" / "best" / "state.json")["step"] == best
    assert load(folder / "status.json") == {"state": "done", "fraction": 1.0, "pid": os.getpid()}
    assert yaml.safe_load((folder / "recipe.yaml").read_text("utf-8")) == done[name].recipe.resolved()
    assert not [path for path in folder.rglob("*") if path.name.startswith(".") and path.name != ".lock"]


def test_environment_is_recorded(done):
    found = load(done["lora"].folder / "env.json")
    config = done["lora"].recipe.data
    assert list(found["data"]["sha256"]) == sorted([config.train, config.validation, config.test])
    assert (found["machine"]["dtype"], found["machine"]["dtype_reason"]) == ("fp32", "set in the recipe")
    assert {"graft", "commit", "python", "torch", "transformers", "cpu", "cores", "threads"} <= found["machine"].keys()
    base = load_base(done["lora"].recipe.model)
    assert found["model"] == {
        "name": done["lora"].recipe.model,
        "fingerprint": base.fingerprint,
        "parameters": base.parameter_count(),
    }


def test_metrics_have_a_line_for_each_step(done):
    points = lines(done["lora"].folder / "metrics.jsonl")
    assert [point["step"] for point in points] == list(range(1, 31)) == list(range(1, done["lora"].report["steps"] + 1))
    assert set(points[0]) == {field.name for field in fields(Point)}
    assert [point["examples"] for point in points] == [16 * step for step in range(1, 31)]
    assert [point["step"] for point in points if point["quality"] is not None] == [8, 16, 24, 30]
    seconds = [point["seconds"] for point in points]
    assert seconds == sorted(seconds)
    assert points[-1]["train_loss"] < points[0]["train_loss"]


def test_log_says_what_the_run_did(done):
    text = (done["lora"].folder / "log.txt").read_text("utf-8")
    assert "2,114 of 24,130 parameters train (8.76%), at 2 × attn.q, 2 × attn.v, and the head" in text
    assert "240 rows of 11 tokens in the median, 16 at most" in text
    assert "peak learning rate 0.02; fp32: set in the recipe" in text


FIELDS = {
    "method", "quality", "quality_low", "quality_high", "trainable_parameters", "trainable_fraction",
    "peak_memory_bytes", "train_seconds", "examples_per_second", "adapter_bytes", "latency_ms", "merged_latency_ms",
    "learning_rate", "curve", "probes", "transfer", "by_rank", "metric", "figures", "forgetting_unit",
    "expected_memory_bytes", "expected_seconds", "pass_rows",
}  # fmt: skip


@pytest.mark.parametrize("name", RATES)
def test_report(done, name):
    recipe, folder, report, _ = done[name]
    assert load(folder / "report.json") == report
    assert set(report) == FIELDS | {"best_step", "steps", "merged_difference"}
    correct = load(folder / "correct.json")["correct"]
    assert len(correct) == 60
    assert report["quality"] == sum(correct) / 60
    assert report["quality_low"] <= report["quality"] <= report["quality_high"]
    assert (report["method"], report["learning_rate"]) == (name, RATES[name])
    assert report["quality_high"] - report["quality_low"] > 0.02
    assert report["adapter_bytes"] == sum(file.stat().st_size for file in (folder / "adapter").iterdir())
    assert report["examples_per_second"] == pytest.approx(480 / report["train_seconds"])
    assert report["peak_memory_bytes"] > 10**7
    assert report["latency_ms"] > 0
    assert 0 < report["trainable_fraction"] <= 1
    assert report["transfer"].keys() == {recipe.transfer[0]}
    assert report["probes"] == {}
    curve = report["curve"]
    assert [point["step"] for point in curve] == list(range(2, 31, 2))  # about 25 points
    assert [point["step"] for point in curve if point["validation_quality"] is not None] == [8, 16, 24, 30]
    losses = [point["train_loss"] for point in lines(folder / "metrics.jsonl")]
    assert curve[3]["train_loss"] == pytest.approx((losses[6] + losses[7]) / 2)
    assert set(curve[0]) == {"step", "examples", "train_loss", "validation_quality"}
    if methods()[name].mergeable:
        assert report["merged_latency_ms"] > 0
        assert report["merged_difference"] < 1e-4
    else:
        assert report["merged_latency_ms"] is report["merged_difference"] is None


def test_trainable_parameters_are_counted(done):
    head, base = 2 * tiny.WIDTH + 2, load_base(done["lora"].recipe.model).parameter_count()
    counts = {name: run.report["trainable_parameters"] for name, run in done.items()}
    assert counts["lora"] == head + 2 * 2 * 2 * 8 * tiny.WIDTH
    assert counts["bottleneck"] == head + 2 * 2 * (2 * 32 * tiny.WIDTH + 32 + tiny.WIDTH)
    assert counts["prefix"] == head + 2 * 2 * 20 * tiny.WIDTH
    assert counts["prompt"] == head + 20 * tiny.WIDTH
    pooler = tiny.WIDTH * (tiny.WIDTH + 1)  # not used when pooling is mean, so it does not train
    assert counts["full"] == base + head - pooler
    for name, run in done.items():
        assert run.report["trainable_fraction"] == pytest.approx(counts[name] / (base + head))


@pytest.mark.parametrize("name", ["lora", "full", "bottleneck"])
def test_methods_learn(done, name):
    assert done[name].report["quality_low"] > 0.5
    assert done[name].report["transfer"][done[name].recipe.transfer[0]] > 0.65


def test_untouched_base(place, tmp_path):
    recipe = tiny.recipe(place, method=None, transfer=[str(place / "other.jsonl")])
    report = execute(recipe, tmp_path / "base")
    assert set(report) == FIELDS
    assert report["method"] == "base"
    assert report["trainable_parameters"] == report["adapter_bytes"] == 0
    assert report["train_seconds"] is report["peak_memory_bytes"] is report["learning_rate"] is None
    assert report["latency_ms"] == report["merged_latency_ms"] > 0
    assert not (tmp_path / "base" / "adapter").exists()
    with pytest.raises(RecipeError, match="measured the untouched base, so it has no adapter"):
        evaluate_run(tmp_path / "base")


def test_probes_go_through_the_adapter(place, tmp_path):
    given = {"forgetting": ["news-editorials"], "probe_samples": 60}
    tuned = execute(tiny.recipe(place, **given), tmp_path / "tuned")["probes"]
    base = execute(tiny.recipe(place, method=None, **given), tmp_path / "base")["probes"]
    assert tuned.keys() == base.keys() == {"news-editorials"}
    model, rows = load_base(str(place / "model")), read_all("news-editorials")[:60]
    assert retrieval_probe(model, rows, None) == base["news-editorials"] > 0
    running.store.load(model, tmp_path / "tuned" / "adapter", ADAPTER)
    assert retrieval_probe(model, rows, ADAPTER) == tuned["news-editorials"] != base["news-editorials"]


# Determinism --------------------------------------------------------------------------------------


def test_seed_decides_every_byte(place, done, tmp_path):
    recipe = done["lora"].recipe
    assert execute(recipe, tmp_path / "again")["quality"] == done["lora"].report["quality"]
    assert tensors(tmp_path / "again") == tensors(done["lora"].folder)
    first, again = (lines(folder / "metrics.jsonl") for folder in (done["lora"].folder, tmp_path / "again"))
    assert [point["train_loss"] for point in again] == [point["train_loss"] for point in first]
    execute(recipe.model_copy(update={"seed": 2}), tmp_path / "other")
    assert tensors(tmp_path / "other") != tensors(done["lora"].folder)


def test_starting_values_depend_on_the_seed_alone(place):
    """Whatever was drawn before, for example for a pooler that the checkpoint does not have."""
    starts = []
    for seed, drawn in ((1, 0), (1, 5), (2, 0)):
        recipe = tiny.recipe(place, seed=seed)
        base = load_base(recipe.model)
        torch.rand(drawn)
        starts.append(build_adapter(recipe, recipe.method, base, ("a", "b")).tensors())
    first, same, other = starts
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["layers.0.attn.q.lora_A"], other["layers.0.attn.q.lora_A"])
    assert not torch.equal(first["head.out.weight"], other["head.out.weight"])


RELOAD = """
import json, sys
import torch
from graft.methods import store
from graft.model import load_base
from graft.objectives.classify import collate
from graft.parts.head import scores
from graft.recipe import Recipe
from graft.config import read_yaml
found = {}
for folder in sys.argv[1:]:
    recipe = Recipe.parse(read_yaml(folder + "/recipe.yaml"))
    base = load_base(recipe.model)
    store.load(base, folder + "/adapter", "read")
    splits = recipe.objective.load(recipe.data)
    examples = recipe.objective.examples(splits.validation[:8], base.tokenizer, splits.labels, recipe.max_length)
    with torch.no_grad():
        found[recipe.method.name] = scores(base, collate(base, examples), "read").tolist()
print(json.dumps(found))
"""


@pytest.mark.slow
def test_saved_adapters_give_the_same_scores_in_a_new_process(done):
    folders = [str(run.folder) for run in done.values()]
    child = subprocess.run([sys.executable, "-c", RELOAD, *folders], capture_output=True, text=True, check=True)
    found = json.loads(child.stdout)
    assert found.keys() == done.keys()
    for name, scores in found.items():
        torch.testing.assert_close(torch.tensor(scores), done[name].scores, rtol=1e-5, atol=1e-6)


# Arithmetic of training ---------------------------------------------------------------------------


def trainer(recipe: Recipe, checkpoints: Path | None = None, **training: Any) -> tuple[Trainer, list[Any], list[Any]]:
    """A trainer without dropout, and its examples."""
    splits = recipe.objective.load(recipe.data)
    base = load_base(recipe.model)
    objective = recipe.objective
    train, validation = (
        objective.examples(rows, base.tokenizer, splits.labels, recipe.max_length)
        for rows in (splits.train, splits.validation)
    )
    adapter = build_adapter(recipe, recipe.method, base, splits.labels)
    for module in [*base.model.modules(), *adapter.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    settings = recipe.training.model_copy(update=training)
    made = Trainer(base, adapter, objective, settings, 1e-2, recipe.seed, make_accelerator("fp32"), checkpoints)
    return made, train, validation


def gradients(recipe: Recipe, size: int, passes: int, rows: int, limit: float) -> tuple[float, dict[str, torch.Tensor]]:
    training = {"per_device_train_batch_size": size, "gradient_accumulation_steps": passes, "max_grad_norm": limit}
    made, train, _ = trainer(recipe, **training)
    assert made.rows_per_step == 32
    made._training_mode(True)
    loss, _ = made.gradients(train[:rows])
    return loss, {name: tensor.grad.clone() for name, tensor in made.adapter.trainable()}


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("limit", [1e9, 1e-2])
def test_accumulated_gradients_are_those_of_one_pass(place, name, limit):
    """30 rows in passes of 32, 16 and 8: the last pass is uneven, and rows differ in length."""
    recipe = tiny.recipe(place, method=name)
    loss, whole = gradients(recipe, 32, 1, 30, limit)
    assert any(gradient.abs().max() > 0 for gradient in whole.values())
    for size, passes in ((16, 2), (8, 4)):
        other, parts = gradients(recipe, size, passes, 30, limit)
        assert other == pytest.approx(loss, rel=1e-6)
        largest = max(float(gradient.abs().max()) for gradient in whole.values())
        for key, gradient in whole.items():
            assert float((parts[key] - gradient).abs().max()) <= 1e-5 * largest, key


def test_mean_of_means_would_be_wrong(place):
    """That the test above can fail: halves of 16 and 14 rows, averaged, give another gradient."""
    recipe = tiny.recipe(place)
    made, train, _ = trainer(recipe)
    objective = made.objective

    def gradient(chosen: list[Any]) -> torch.Tensor:
        loss = objective.loss(made.base, chosen, ADAPTER)
        (loss.total / loss.weight).backward()
        return torch.cat([tensor.grad.flatten() for _, tensor in made.adapter.trainable()])

    made._training_mode(True)
    whole = gradient(train[:30]).clone()
    for _, tensor in made.adapter.trainable():
        tensor.grad = None
    gradient(train[:16])
    both = gradient(train[16:30]) / 2
    assert float((both - whole).abs().max()) > 1e-3 * float(whole.abs().max())


def test_accumulation_gives_the_same_run(place, tmp_path):
    losses = []
    for size, passes in ((16, 1), (4, 4)):
        training = {"per_device_train_batch_size": size, "gradient_accumulation_steps": passes}
        made, train, validation = trainer(tiny.recipe(place), **training)
        fitted = made.fit(train[:50], validation)
        losses.append([point.train_loss for point in fitted.points])
        assert fitted.steps == 8  # 50 rows are 4 steps, the last of 2 rows, twice
        assert fitted.examples == 100
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("rows", "training", "steps"),
    [
        (240, {}, 30),
        (240, {"num_train_epochs": 0.5}, 8),
        (240, {"num_train_epochs": 1e-3}, 1),
        (240, {"max_steps": 7}, 7),
        (240, {"max_steps": 700}, 30),
        (241, {}, 32),
        (3, {"num_train_epochs": 5}, 5),
        (240, {"gradient_accumulation_steps": 4}, 8),
    ],
)
def test_planned_steps(rows, training, steps):
    settings = Training(num_train_epochs=2, per_device_train_batch_size=16).model_copy(update=training)
    made = Trainer(None, None, Classify(), settings, 1e-2, 1, make_accelerator("fp32"))
    assert made.planned_steps(rows) == steps


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3, 10, 97])
@pytest.mark.parametrize("ratio", [0, 0.06, 0.5, 0.99])
def test_learning_rate_schedule(schedule, total, ratio):
    warmup = int(total * ratio)
    shares = [share_of_peak(step, total, warmup, schedule) for step in range(total)]
    assert shares[0] > 0
    assert shares[-1] >= 0
    assert max(shares) <= 1
    assert max(shares) == 1 or warmup == total
    rising, falling = shares[: warmup + 1], shares[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    steps = [b - a for a, b in pairwise(rising)]
    assert all(step == pytest.approx(1 / (warmup + 1)) for step in steps)
    if schedule == "constant":
        assert set(falling) == {1.0}
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = make_optimizer([parameter], 0.5, 0.0)
    made = make_schedule(optimizer, total, warmup, schedule)
    for share in shares:
        assert made.get_last_lr() == pytest.approx([0.5 * share])
        optimizer.step()
        made.step()


def test_cosine_and_linear_halfway():
    assert share_of_peak(60, 100, 20, "cosine") == pytest.approx(0.5)
    assert share_of_peak(60, 100, 20, "linear") == pytest.approx(0.5)
    assert share_of_peak(40, 100, 20, "cosine") == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_learning_rates_of_a_run(done):
    rates = [point["learning_rate"] for point in lines(done["lora"].folder / "metrics.jsonl")]
    assert rates == pytest.approx([0.02 * share_of_peak(step, 30, 1, "linear") for step in range(30)])


def test_vectors_do_not_decay():
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([matrix, vector], 0.1, 0.5)
    for parameter in (matrix, vector):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(vector.detach(), torch.ones(2))
    assert torch.allclose(matrix.detach(), torch.full((2, 2), 0.95))
    assert len(make_optimizer([vector], 0.1, 0.5).param_groups) == 1


@pytest.mark.parametrize(("rows", "size"), [(1, 4), (7, 4), (8, 4), (1000, 16), (1003, 16), (5000, 16)])
def test_batches_have_every_row_once(rows, size):
    lengths = [(row * 7919) % 90 + 4 for row in range(rows)]
    batches = training_batches(lengths, size, seed=1, epoch=0)
    assert sorted(row for batch in batches for row in batch) == list(range(rows))
    assert sorted(map(len, batches), reverse=True)[: rows // size] == [size] * (rows // size)
    assert batches == training_batches(lengths, size, seed=1, epoch=0)
    if rows > 8:
        assert batches != training_batches(lengths, size, seed=1, epoch=1)
        assert batches != training_batches(lengths, size, seed=2, epoch=0)
    if rows >= 1000:
        padded = sum(max(lengths[row] for row in batch) * len(batch) for batch in batches)
        assert padded < 1.1 * sum(lengths)  # in the order given: 1.8 times
        firsts = [lengths[batch[0]] for batch in batches[:20]]
        assert firsts not in (sorted(firsts), sorted(firsts, reverse=True))


def test_batches_of_several_epochs(place):
    made, train, _ = trainer(tiny.recipe(place))
    lengths = [len(example) for example in train[:40]]
    batches = list(made._batches(lengths, 7))  # an epoch is 3 steps
    assert len(batches) == 7
    for epoch in (0, 1):
        assert sorted(row for batch in batches[3 * epoch : 3 * epoch + 3] for row in batch) == list(range(40))
    assert batches[:3] != batches[3:6]


@pytest.mark.parametrize("name", RATES)
def test_gradient_checkpointing_changes_memory_only(done, tmp_path, monkeypatch, name):
    calls = 0
    forward = BertSelfAttention.forward

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += torch.is_grad_enabled()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(BertSelfAttention, "forward", count)
    recipe = done[name].recipe
    training = recipe.training.model_copy(update={"gradient_checkpointing": True, "preflight": False})
    report = execute(recipe.model_copy(update={"training": training}), tmp_path / "run")
    assert calls == 30 * 2 * 2  # two layers, in each of the 30 steps, and again in the backward pass
    assert report["quality"] == done[name].report["quality"]
    plain, again = (lines(folder / "metrics.jsonl") for folder in (done[name].folder, tmp_path / "run"))
    assert [point["train_loss"] for point in again] == pytest.approx([point["train_loss"] for point in plain], rel=1e-3)


# Guards -------------------------------------------------------------------------------------------


def spoil(monkeypatch, change: Any) -> None:
    """Put `change(base, loss, step)` around the loss; steps count from 1, without a preflight."""
    monkeypatch.setattr(Trainer, "rehearse", lambda self, train: None)
    monkeypatch.setattr("graft.run.forecast", lambda *given: None)
    original, step = Classify.loss, 0

    def loss(self: Any, base: Any, examples: Any, route: Any) -> Loss:
        nonlocal step
        step += 1
        given = original(self, base, examples, route)
        return Loss(change(base, given.total, step), given.weight)

    monkeypatch.setattr(Classify, "loss", loss)


@pytest.mark.parametrize(("step", "value"), [(1, math.nan), (3, math.nan), (3, math.inf)])
def test_loss_that_is_not_finite(place, tmp_path, monkeypatch, step, value):
    """From a step on: two are left out, the third ends the run."""
    spoil(monkeypatch, lambda base, total, now: total * value if now >= step else total)
    message = fails(GuardError, 4, tiny.recipe(place), tmp_path / "run")
    last = step + 2
    assert re.search(
        rf"step {last}: the loss is {value}, for the third time in a row; rows .*train\.jsonl:\d+, "
        rf".*train\.jsonl:\d+, .* …; likely causes: 1\. ",
        message,
    )
    assert f"the rows are in {tmp_path / 'run' / 'bad_batch.jsonl'}" in message
    bad = lines(tmp_path / "run" / "bad_batch.jsonl")
    assert [row["step"] for row in bad] == [at for at in range(step, last + 1) for _ in range(16)]
    assert all(re.search(r"train\.jsonl:\d+$", row["place"]) and row["text"].startswith("[CLS]") for row in bad)
    status = load(tmp_path / "run" / "status.json")
    assert (status["state"], status["cause"]) == ("failed", message.partition("; likely")[0])
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "report.json").exists()
    assert list_runs(tmp_path)[0]["state"] == "failed"


def test_gradient_that_is_not_finite(place, tmp_path, monkeypatch):
    def change(base: Any, total: torch.Tensor, step: int) -> torch.Tensor:
        parameter = next(parameter for parameter in base.model.parameters() if parameter.requires_grad)
        return total + (torch.sqrt(parameter.sum() * 0) if step >= 4 else 0)  # 0, with the gradient 0 / 0

    spoil(monkeypatch, change)
    message = fails(GuardError, 4, tiny.recipe(place), tmp_path / "run")
    assert "step 6: the gradient's norm is nan, for the third time in a row; rows " in message
    assert message.endswith("no checkpoint was written before")


def test_learning_rate_too_small_to_move(place, tmp_path):
    recipe = tiny.recipe(place, method={"name": "lora", "learning_rate": 1e-30})
    message = fails(GuardError, 4, recipe, tmp_path / "run")
    assert re.search(
        r"after step 2, \d+ of 10 tensors did not move \(layers\.0\.attn\.q\.lora_A, .* …\); "
        "likely cause: a learning rate too small",
        message,
    )


def test_tensors_that_the_loss_never_reaches(place, tmp_path, monkeypatch):
    monkeypatch.setattr(LoraPart, "after", lambda self, x, y: y)
    message = fails(GuardError, 4, tiny.recipe(place), tmp_path / "run")
    assert "after step 2, 8 of 10 tensors got no gradient (layers.0.attn.q.lora_A, layers.0.attn.q.lora_B, " in message


@pytest.mark.parametrize(("when", "found"), [(1, 2), (9, 30)])
@pytest.mark.parametrize("name", ["embeddings.word_embeddings.weight", "encoder.layer.1.output.LayerNorm.bias"])
def test_frozen_tensor_that_changes(place, tmp_path, monkeypatch, when, found, name):
    def change(base: Any, total: torch.Tensor, step: int) -> torch.Tensor:
        if step == when:
            base.model.get_parameter(name).data[-1] += 1e-3
        return total

    spoil(monkeypatch, change)
    message = fails(GuardError, 4, tiny.recipe(place), tmp_path / "run")
    assert f"after step {found}, 1 of " in message
    assert f"tensors of the frozen base changed ({name}); likely cause: code that writes to the base" in message


def test_frozen_buffer_that_changes(place, tmp_path, monkeypatch):
    def change(base: Any, total: torch.Tensor, step: int) -> torch.Tensor:
        if step == 1:
            base.model.get_buffer("embeddings.token_type_ids")[0, -1] = 1
        return total

    spoil(monkeypatch, change)
    assert "frozen base changed (embeddings.token_type_ids)" in fails(
        GuardError, 4, tiny.recipe(place), tmp_path / "run"
    )


def test_nothing_to_train(place):
    made, _, _ = trainer(tiny.recipe(place))
    made.adapter.requires_grad_(False)
    with pytest.raises(GuardError, match="lora has nothing to train"):
        MovementGuard(made.base, made.adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_digest_sees_any_change(dtype):
    tensor = torch.arange(-50, 50).to(dtype).view(10, 10)
    before = digest(tensor)
    assert digest(tensor.clone()) == before
    changed = tensor.clone()
    changed[3, 3] += 1
    assert digest(changed) != before
    swapped = tensor.clone()
    swapped[0, 0], swapped[9, 9] = tensor[9, 9], tensor[0, 0]
    assert digest(swapped) != before
    if dtype.is_floating_point:
        assert digest(torch.tensor([-0.0], dtype=dtype)) != digest(torch.tensor([0.0], dtype=dtype))


def test_digest_of_more_than_a_chunk(monkeypatch):
    tensor = torch.randn(1000)
    whole = digest(tensor)
    monkeypatch.setattr("graft.train.guards._CHUNK", 64)
    assert digest(tensor) == whole


# The best step ------------------------------------------------------------------------------------


def drop(monkeypatch, qualities: list[float]) -> list[dict[str, torch.Tensor]]:
    """Plant the qualities of the evaluations in training; returns the adapter's tensors at each."""
    original = Classify.evaluate
    seen: list[dict[str, torch.Tensor]] = []

    def evaluate(self: Any, base: Any, examples: Any, entry: Any, *rest: Any, **more: Any) -> Result:
        result = original(self, base, examples, entry, *rest, **more)
        if len(seen) == len(qualities):
            return result
        adapter = base.adapters[entry]
        seen.append({name: tensor.clone() for name, tensor in adapter.tensors().items()})
        return Result(qualities[len(seen) - 1], result.loss, result.correct)

    monkeypatch.setattr(Classify, "evaluate", evaluate)
    return seen


@pytest.mark.parametrize("name", ["lora", "full", "prefix"])
@pytest.mark.parametrize("load_best", [True, False])
def test_best_step_is_loaded_at_the_end(place, monkeypatch, tmp_path, name, load_best):
    seen = drop(monkeypatch, [0.5, 0.9, 0.8, 0.2])
    made, train, validation = trainer(
        tiny.recipe(place, method=name), tmp_path, load_best_model_at_end=load_best, num_train_epochs=1, eval_steps=4
    )
    fitted = made.fit(train, validation)
    assert (fitted.best_step, fitted.steps, len(seen)) == (8, 15, 4)
    assert fitted.best.quality == 0.9
    expected, other = (seen[1], seen[3]) if load_best else (seen[3], seen[1])
    now = made.adapter.tensors()
    assert all(torch.equal(now[key], tensor) for key, tensor in expected.items())
    assert not all(torch.equal(now[key], tensor) for key, tensor in other.items())
    # steps 4, 8 and 12 were evaluated, and the last one, behind which nothing goes on
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["best", "step-000008", "step-000012"]
    assert checkpoint.check(tmp_path / "best")["step"] == 8


def test_best_step_is_what_a_run_saves(place, monkeypatch, tmp_path):
    seen = drop(monkeypatch, [0.5, 0.9, 0.8, 0.2])
    report = execute(tiny.recipe(place), tmp_path / "run")
    assert (report["best_step"], report["steps"]) == (16, 30)
    base = load_base(str(place / "model"))
    adapter = running.store.load(base, tmp_path / "run" / "adapter", ADAPTER)
    assert all(torch.equal(adapter.tensors()[key], tensor) for key, tensor in seen[1].items())


def test_equal_quality_is_decided_by_loss(place, monkeypatch, tmp_path):
    drop(monkeypatch, [0.7, 0.7, 0.7, 0.7])
    made, train, validation = trainer(tiny.recipe(place), tmp_path)
    fitted = made.fit(train, validation)
    losses = {point.step: point.validation_loss for point in fitted.points if point.quality is not None}
    assert fitted.best_step == min(losses, key=losses.get)


# Damaged checkpoints ------------------------------------------------------------------------------


def damage(folder: Path, how: str) -> None:
    file = folder / "adapter.safetensors"
    if how == "altered":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif how == "cut":
        os.truncate(file, file.stat().st_size - 10)
    elif how == "emptied":
        file.write_bytes(b"")
    elif how == "removed":
        file.unlink()
    elif how == "state altered":
        (folder / "state.json").write_text('{"step": 7, "quality": 1.0, "loss": 0.0}')
    elif how == "manifest removed":
        (folder / "manifest.json").unlink()
    elif how == "manifest cut":
        os.truncate(folder / "manifest.json", 20)
    else:
        shutil.rmtree(folder)


HARMS = ["altered", "cut", "emptied", "removed", "state altered", "manifest removed", "manifest cut", "all removed"]


@pytest.mark.parametrize("how", HARMS)
def test_damaged_checkpoint(place, tmp_path, how):
    made, _, _ = trainer(tiny.recipe(place))
    path = tmp_path / "best"
    checkpoint.write(path, made.adapter, {"step": 3, "quality": 0.5})
    assert checkpoint.read(path, made.adapter) == {"step": 3, "quality": 0.5}
    before = {name: tensor.clone() for name, tensor in made.adapter.tensors().items()}
    damage(path, how)
    with pytest.raises(DamagedError, match=r"/best") as caught:
        checkpoint.read(path, made.adapter)
    assert caught.value.exit_code == 5
    assert "remove" in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.adapter.tensors().items())


def test_checkpoint_of_another_adapter(place, tmp_path):
    made, _, _ = trainer(tiny.recipe(place))
    path = tmp_path / "best"
    checkpoint.write(path, made.adapter, {"step": 3})
    other, _, _ = trainer(tiny.recipe(place, method="prompt"))
    with pytest.raises(DamagedError, match="its 10 tensors are not the 3 of the adapter; it is another run's"):
        checkpoint.read(path, other.adapter)
    wider, _, _ = trainer(tiny.recipe(place, method={"name": "lora", "r": 4}))
    with pytest.raises(DamagedError, match="/best"):
        checkpoint.read(path, wider.adapter)


def test_checkpoint_restores_what_it_held(place, tmp_path):
    made, _, _ = trainer(tiny.recipe(place))
    before = {name: tensor.clone() for name, tensor in made.adapter.tensors().items()}
    path = tmp_path / "best"
    checkpoint.write(path, made.adapter, {"step": 1})
    with torch.no_grad():
        for _, tensor in made.adapter.trainable():
            tensor.add_(1)
    checkpoint.read(path, made.adapter)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.adapter.tensors().items())


def test_checkpoint_damaged_in_a_run(place, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    drop(monkeypatch, [0.9, 0.1, 0.1, 0.1])
    inner = Classify.evaluate

    def evaluate(self: Any, *given: Any, **more: Any) -> Result:
        for path in folder.glob("checkpoints/best"):
            damage(path, "altered")
        return inner(self, *given, **more)

    monkeypatch.setattr(Classify, "evaluate", evaluate)
    message = fails(DamagedError, 5, tiny.recipe(place), folder)
    assert "best/adapter.safetensors: not what was written" in message
    assert load(folder / "status.json")["state"] == "failed"


# The same folder again ----------------------------------------------------------------------------


def no_training(*_: Any) -> None:
    raise AssertionError("trained again")


def test_finished_run_is_returned(done, monkeypatch):
    recipe, folder, report, _ = done["lora"]
    monkeypatch.setattr(Trainer, "fit", no_training)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert execute(recipe, folder) == report
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"seed": 2}, "seed: 1, now 2"),
        ({"method": {"name": "lora", "learning_rate": 0.02, "r": 4}}, "method.r: 8, now 4"),
        ({"method": "prompt"}, "method.name: lora, now prompt"),
        ({"method": None}, "now None"),
        ({"training": {"precision": "fp32"}}, "training.per_device_train_batch_size: 16, now 32"),
    ],
)
def test_another_run_in_the_folder(place, done, more, what):
    before = tensors(done["lora"].folder)
    given = tiny.settings(place, transfer=done["lora"].recipe.transfer) | more
    message = fails(RecipeError, 2, Recipe.parse(given), done["lora"].folder)
    assert f"{done['lora'].folder} holds another run (" in message
    assert what in message
    assert "choose another folder with -o" in message
    assert tensors(done["lora"].folder) == before


def test_data_changed_since(place, tmp_path):
    copy = shutil.copy(place / "test.jsonl", tmp_path / "test.jsonl")
    settings = tiny.settings(place, training={"max_steps": 2})
    settings["data"]["test"] = str(copy)
    recipe = Recipe.parse(settings)
    execute(recipe, tmp_path / "run")
    tiny.write_rows(copy, tiny.rows(60, 99))
    message = fails(DataError, 2, recipe, tmp_path / "run")
    assert f"{copy} has changed since {tmp_path / 'run'}; choose another folder" in message


def test_foreign_files(place, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    message = fails(RecipeError, 2, tiny.recipe(place), tmp_path / "run")
    assert "holds other files (thesis.tex); choose another folder with -o" in message
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_hidden_files_stay(place, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".DS_Store").write_text("x")
    execute(tiny.recipe(place, training={"max_steps": 2}), tmp_path / "run")
    assert (tmp_path / "run" / ".DS_Store").read_text() == "x"


def test_folder_that_is_a_file(place, tmp_path):
    (tmp_path / "run").write_text("x")
    assert "is a file, a run needs a folder" in fails(RecipeError, 2, tiny.recipe(place), tmp_path / "run")
    message = fails(UsageError, 2, tiny.recipe(place), tmp_path / "run" / "below")
    assert "cannot be written (Not a directory); choose another place" in message
    assert (tmp_path / "run").read_text() == "x"


def test_folder_of_another_process(place, tmp_path):
    (tmp_path / "run").mkdir()
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run" / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout.readline() == b"1\n"
        message = fails(ResourceError, 3, tiny.recipe(place), tmp_path / "run")
        assert "another process is running there; wait for it, or choose another folder" in message
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
        child.communicate(b"\n")
    execute(tiny.recipe(place, training={"max_steps": 2}), tmp_path / "run")


def test_run_holds_its_folder(place, tmp_path):
    held = []

    def watch(phase: str, fraction: float) -> None:
        with (tmp_path / "run" / ".lock").open("w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.append(phase)

    execute(tiny.recipe(place, training={"max_steps": 2}), tmp_path / "run", watch)
    assert held[0] == "reading the rows"
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_progress_never_goes_back(place, tmp_path):
    seen: list[tuple[str, float]] = []
    recipe = tiny.recipe(place, training={"max_steps": 3}, transfer=[str(place / "other.jsonl")])
    execute(recipe, tmp_path / "run", lambda phase, fraction: seen.append((phase, fraction)))
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1] < 1) == (0.0, True)
    phases = [phase for phase, _ in seen]
    assert "training, step 3 of 3" in phases
    assert phases[-1] == "measuring latency"


# Unfinished runs ----------------------------------------------------------------------------------


def test_interrupted_run_starts_again(done, tmp_path):
    recipe, folder = done["lora"].recipe, tmp_path / "run"

    def stop(phase: str, fraction: float) -> None:
        if phase == "training, step 20 of 30":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(recipe, folder, stop)
    status = load(folder / "status.json")
    assert (status["state"], status["cause"]) == ("stopped", "interrupted")
    assert len(lines(folder / "metrics.jsonl")) == 20
    with pytest.raises(RecipeError, match=r"the run is not finished \(stopped\); run it again to the end"):
        evaluate_run(folder)
    # What kill -9 leaves: half a line, and files and folders that were being written.
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "exa')
    (folder / ".report.json.x1y2").write_text("{")
    (folder / ".adapter.x1y2").mkdir()
    (folder / ".adapter.x1y2" / "adapter_model.safetensors").write_bytes(b"x")
    (folder / "adapter").mkdir()
    assert execute(recipe, folder)["quality"] == done["lora"].report["quality"]
    assert tensors(folder) == tensors(done["lora"].folder)
    assert len(lines(folder / "metrics.jsonl")) == 30
    unneeded = {"answers.jsonl", "skipped.jsonl", "bad_batch.jsonl"}
    assert {entry.name for entry in folder.iterdir()} == runfolder.FILES - unneeded


def test_failed_run_starts_again(place, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        spoil(patch, lambda base, total, step: total * math.nan)
        fails(GuardError, 4, tiny.recipe(place), tmp_path / "run")
    execute(tiny.recipe(place), tmp_path / "run")
    assert load(tmp_path / "run" / "status.json")["state"] == "done"


def test_damaged_status_is_named(place, tmp_path):
    execute(tiny.recipe(place, training={"max_steps": 2}), tmp_path / "run")
    (tmp_path / "run" / "status.json").write_text('{"state": "do')
    message = fails(DamagedError, 5, tiny.recipe(place, training={"max_steps": 2}), tmp_path / "run")
    assert "status.json cannot be read" in message


# Bad input is found before training, and leaves nothing behind -------------------------------------


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"method": {"name": "lora", "r": 33}}, "r: 33 is not from 1 to 32, the size of layers.0.attn.q"),
        ({"method": {"name": "lora", "target_modules": ["q_prj"]}}, "q_prj"),
        ({"method": {"name": "lora", "layers_to_transform": [2]}}, "no layer 2, the base has 0 to 1"),
        ({"method": {"name": "lora", "layers_to_transform": [-1]}}, "no layer -1, the base has 0 to 1"),
        ({"method": {"name": "lora", "target_modules": ["attention"]}}, "lora cannot sit at 'attention'"),
        ({"method": {"name": "frozen", "last_layers": 3}}, "has 2 layers"),
        ({"method": {"name": "prefix", "num_virtual_tokens": 48}}, "num_virtual_tokens: 48 of 48 positions"),
        ({"method": {"name": "prompt", "num_virtual_tokens": 99}}, "num_virtual_tokens: 99 of 48 positions"),
        ({"objective": {"name": "classify", "pooling": "pooler"}}, None),
        ({"forgetting": ["no-such-data"]}, "no-such-data"),
        ({"transfer": ["no-such-file.jsonl"]}, "no-such-file.jsonl"),
    ],
)
def test_bad_setting_leaves_nothing(place, tmp_path, monkeypatch, more, what):
    monkeypatch.setattr(Trainer, "gradients", no_training)
    recipe = tiny.recipe(place, **more)
    if what is None:  # that the tiny base has a pooler, so that the cases above fail for their own reason
        with pytest.raises(AssertionError, match="trained again"):
            execute(recipe, tmp_path / "run")
        return
    with pytest.raises(UsageError) as caught:
        execute(recipe, tmp_path / "run")
    assert what in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_corrected_recipe_takes_the_same_folder(place, tmp_path):
    fails(UsageError, 2, tiny.recipe(place, method={"name": "lora", "r": 33}), tmp_path / "run")
    execute(tiny.recipe(place, method={"name": "lora", "r": 3}, training={"max_steps": 2}), tmp_path / "run")


def test_bad_input_keeps_what_is_not_the_runs(place, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".keep").write_text("x")
    fails(UsageError, 2, tiny.recipe(place, method={"name": "lora", "r": 33}), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".keep"]


def test_transfer_labels_are_checked_before_training(place, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "fit", no_training)
    other = tiny.write_rows(tmp_path / "other.jsonl", [{"text": "good day", "label": "joy"}])
    message = fails(DataError, 2, tiny.recipe(place, transfer=[str(other)]), tmp_path / "run")
    assert "has the label 'joy', training has ['negative', 'positive']" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_virtual_tokens_and_rows_share_the_positions(place, tmp_path, name):
    recipe = tiny.recipe(place, method={"name": name, "num_virtual_tokens": 25})
    message = fails(UsageError, 2, recipe, tmp_path / "run")
    assert "max_length 24 and 25 virtual tokens exceed the 48 positions of " in message
    assert list(tmp_path.iterdir()) == []
    method = {"name": name, "num_virtual_tokens": 24}
    execute(tiny.recipe(place, method=method, training={"max_steps": 2}), tmp_path / "run")


def test_max_length_over_the_positions(place, tmp_path):
    settings = tiny.settings(place)
    settings["data"]["max_length"] = 49
    message = fails(UsageError, 2, Recipe.parse(settings), tmp_path / "run")
    assert "max_length 49 exceeds the 48 positions" in message
    assert list(tmp_path.iterdir()) == []


# Small and odd runs -------------------------------------------------------------------------------


def test_names_with_spaces_signs_and_letters_of_other_scripts(tmp_path):
    folder = tiny.write_all(tmp_path / "ü x" / "100% #1 日本 {a}")
    report = execute(tiny.recipe(folder, training={"max_steps": 2}), folder / "-run $HOME")
    assert evaluate_run(folder / "-run $HOME")["quality"] == report["quality"]
    card = (folder / "-run $HOME" / "adapter" / "README.md").read_text("utf-8")
    assert "base_model: model\n" in card  # a card is shared: it does not tell where the model lay


def test_one_step_of_all_rows(place, tmp_path):
    training = {"per_device_train_batch_size": 1000, "num_train_epochs": 1, "precision": "fp32"}
    report = execute(tiny.recipe(place, training=training), tmp_path / "run")
    assert (report["steps"], report["best_step"]) == (1, 1)
    assert lines(tmp_path / "run" / "metrics.jsonl")[0]["examples"] == 240


def test_splits_of_one_file(place, tmp_path):
    settings = tiny.settings(place, training={"max_steps": 2})
    settings["data"] = {"train": str(place / "train.jsonl"), "max_length": 24}
    execute(Recipe.parse(settings), tmp_path / "run")
    assert len(load(tmp_path / "run" / "correct.json")["correct"]) == 36


def test_rows_longer_than_max_length_are_cut(place, tmp_path):
    settings = tiny.settings(place, training={"max_steps": 2})
    settings["data"]["max_length"] = 5
    execute(Recipe.parse(settings), tmp_path / "run")
    assert "tokens in the median, 5 at most" in (tmp_path / "run" / "log.txt").read_text("utf-8")


def test_pairs_of_texts(place, tmp_path):
    rows = [row | {"text_pair": "good bad"} for row in tiny.rows(200, 3)]
    path = tiny.write_rows(tmp_path / "pairs.jsonl", rows)
    recipe = tiny.recipe(place, data={"train": str(path), "max_length": 24}, training={"max_steps": 2})
    execute(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "report.json").exists()


def test_three_labels(place, tmp_path):
    rows = [row | {"label": number % 3} for number, row in enumerate(tiny.rows(200, 3))]
    path = tiny.write_rows(tmp_path / "three.jsonl", rows)
    execute(
        tiny.recipe(place, data={"train": str(path), "max_length": 24}, training={"max_steps": 2}), tmp_path / "run"
    )
    assert load(tmp_path / "run" / "adapter" / "graft.json")["head"]["labels"] == ["0", "1", "2"]


@pytest.mark.parametrize("name", RATES)
def test_bf16(place, tmp_path, name):
    """Also that one process can hold runs of both formats, one after the other."""
    make_accelerator("fp32")
    recipe = tiny.recipe(
        place, method={"name": name} | SHORTER.get(name, {}), training={"precision": "bf16", "max_steps": 3}
    )
    assert 0 <= execute(recipe, tmp_path / "run")["quality"] <= 1
    assert load(tmp_path / "run" / "env.json")["machine"]["dtype"] == "bf16"


# Evaluation of a finished run ----------------------------------------------------------------------


def test_evaluation_from_disk(place, done):
    for name, run in done.items():
        result = evaluate_run(run.folder)
        assert (result["quality"], result["rows"], result["metric"]) == (run.report["quality"], 60, "accuracy"), name
    other = str(place / "other.jsonl")
    result = evaluate_run(done["lora"].folder, other)
    assert (result["quality"], result["rows"]) == (done["lora"].report["transfer"][other], 30)
    assert result["data"] == other


def test_evaluation_on_data_that_does_not_fit(done, tmp_path):
    unlabelled = tiny.write_rows(tmp_path / "u.jsonl", [{"text": "good"}])
    foreign = tiny.write_rows(tmp_path / "f.jsonl", [{"text": "good", "label": "joy"}])
    for path, what in (
        (unlabelled, "no column 'label'"),
        (foreign, "label 'joy' is not among ['negative', 'positive']"),
    ):
        with pytest.raises(DataError) as caught:
            evaluate_run(done["lora"].folder, str(path))
        assert f"{path}:1" in str(caught.value)
        assert what in str(caught.value)


def test_evaluation_of_damaged_or_missing_runs(place, done, tmp_path):
    with pytest.raises(RecipeError, match=r"is not a run; `graft runs` lists them"):
        evaluate_run(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(done["lora"].folder, copy)
    file = copy / "adapter" / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(DamagedError, match=r"adapter_model\.safetensors"):
        evaluate_run(copy)


def test_trainer_leaves_the_base_as_it_was(place):
    made, train, validation = trainer(tiny.recipe(place))
    before = {name: digest(tensor) for name, tensor in made.base.state().items()}
    fitted = made.fit(train, validation)
    assert fitted.steps == 30
    detach(made.base, ADAPTER)
    assert {name: digest(tensor) for name, tensor in made.base.state().items()} == before
    assert not made.base.model.training
    assert asdict(fitted.points[0])["step"] == 1


def test_run_folder_lists_itself(done):
    found = list_runs(done["lora"].folder.parent)
    assert {row["method"]: row["quality"] for row in found} == {
        name: run.report["quality"] for name, run in done.items()
    }
    assert {row["state"] for row in found} == {"done"}
    assert RunFolder(done["lora"].folder).finished(done["lora"].recipe.resolved())
    assert not RunFolder(done["lora"].folder).finished(done["full"].recipe.resolved())


def test_a_pair_that_cannot_work_is_refused_before_the_model_loads(place, tmp_path, monkeypatch):
    recipe = tiny.recipe(place, method="lora")
    monkeypatch.setattr(type(recipe.method), "refuses", classmethod(lambda cls, family: f"not on an {family.kind}"))
    monkeypatch.setattr("graft.build.load_base", lambda *args, **more: pytest.fail("loaded"))
    with pytest.raises(UsageError, match=r"lora cannot work on .*: not on an encoder"):
        execute(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_training_of_dylora_is_evaluated_at_every_rank(done):
    ranks = done["dylora"].report["by_rank"]
    assert list(ranks) == [str(rank) for rank in range(1, 9)]
    assert ranks["8"] == done["dylora"].report["quality"]
    assert len(set(ranks.values())) > 1
    assert evaluate_run(done["dylora"].folder)["by_rank"] == ranks
    assert done["lora"].report["by_rank"] == {}


def test_adalora_ends_within_its_budget(done):
    config = load(done["adalora"].folder / "adapter" / "adapter_config.json")
    ranks = [sum(kept) for kept in config["rank_pattern"].values()]
    assert sum(ranks) == 8 * len(ranks) == 8 * 4


@pytest.mark.parametrize("name", ["lora", "bitfit"])
def test_a_method_that_would_train_the_head_alone_is_refused(place, tmp_path, name):
    recipe = tiny.recipe(place, method={"name": name, "target_modules": ["pooler"]})
    with pytest.raises(UsageError, match=f"{name} sits at pooler only, which is not used with pooling 'mean'"):
        execute(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_scales_at_keys_alone_train_and_load(place, tmp_path):
    recipe = tiny.recipe(place, method={"name": "ia3", "target_modules": ["attn.k"]}, training={"max_steps": 3})
    assert execute(recipe, tmp_path / "run")["method"] == "ia3"


# Preflight ----------------------------------------------------------------------------------------


def small_memory(monkeypatch, rows: int) -> list[int]:
    """Passes of more than so many rows run out of memory; gives the rows of every pass that was tried."""
    original, tried = Classify.loss, []

    def loss(self: Any, base: Any, examples: Any, route: Any) -> Loss:
        tried.append(len(examples))
        if len(examples) > rows:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return original(self, base, examples, route)

    monkeypatch.setattr(Classify, "loss", loss)
    return tried


def test_a_rehearsal_leaves_no_trace(done, place, tmp_path):
    recipe = done["lora"].recipe
    training = recipe.training.model_copy(update={"preflight": False})
    report = execute(recipe.model_copy(update={"training": training}), tmp_path / "run")
    assert tensors(tmp_path / "run") == tensors(done["lora"].folder)
    assert (report["expected_memory_bytes"], report["pass_rows"]) == (None, 16)
    assert done["lora"].report["expected_memory_bytes"] > 1 << 20
    assert "expected at the peak of a step: " in (done["lora"].folder / "log.txt").read_text("utf-8")


@pytest.mark.parametrize("rows", [15, 4, 1])
def test_passes_get_smaller_when_memory_runs_out(done, place, tmp_path, monkeypatch, rows):
    """Each step has the same rows: with a loss that is a sum, the same gradient too."""
    monkeypatch.setattr("graft.run.forecast", lambda *given: None)  # it would meet the planted error as well
    tried = small_memory(monkeypatch, rows)
    report = execute(done["lora"].recipe, tmp_path / "run")
    fitting = {15: 8, 4: 4, 1: 1}[rows]
    assert tried[: tried.index(fitting)] == [size for size in (16, 8, 4, 2) if size > fitting]
    assert max(tried[tried.index(fitting) :]) == report["pass_rows"] == fitting
    log = (tmp_path / "run" / "log.txt").read_text("utf-8")
    assert f"out of memory: passes of {fitting} rows from here on, each step has the same rows" in log
    plain, again = (lines(folder / "metrics.jsonl") for folder in (done["lora"].folder, tmp_path / "run"))
    assert [point["examples"] for point in again] == [point["examples"] for point in plain]
    assert again[0]["train_loss"] == pytest.approx(plain[0]["train_loss"], rel=0.1)  # other dropout draws


def test_memory_that_is_too_little_for_one_row(place, tmp_path, monkeypatch):
    monkeypatch.setattr("graft.run.forecast", lambda *given: None)
    small_memory(monkeypatch, 0)
    message = fails(ResourceError, 3, tiny.recipe(place), tmp_path / "run")
    assert re.match(r"out of memory with one row of \d+ tokens at a time; gradient_checkpointing=true, ", message)
    assert not (tmp_path / "run" / "adapter").exists()


def test_memory_that_runs_out_later(place, monkeypatch):
    made, train, validation = trainer(tiny.recipe(place), max_steps=3, per_device_train_batch_size=8)
    made.training = made.training.model_copy(update={"preflight": False})
    whole, train_, validation_ = trainer(tiny.recipe(place), max_steps=3, per_device_train_batch_size=8)
    expected = whole.fit(train_, validation_)
    calls, original = 0, made.objective.loss

    def loss(self: Any, base: Any, examples: Any, route: Any) -> Loss:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(base, examples, route)

    monkeypatch.setattr(Classify, "loss", loss)
    found = made.fit(train, validation)
    assert made.pass_rows == 4
    losses = [point.train_loss for point in found.points]
    assert losses == pytest.approx([point.train_loss for point in expected.points], rel=1e-5)


def test_a_forecast_cuts_passes_that_would_not_fit(place):
    recipe = tiny.recipe(place)
    splits = recipe.objective.load(recipe.data)
    tokenizer = load_tokenizer(recipe.model)
    train = recipe.objective.examples(splits.train, tokenizer, splits.labels, recipe.max_length)
    given = (recipe, recipe.method, config_of(recipe.model), choose("fp32", torch.device("cpu")))
    rows = Rows(train, [], splits.labels)
    plenty = forecast(*given, rows, free=lambda: 1 << 40)
    assert plenty is not None
    assert plenty.pass_rows == recipe.training.per_device_train_batch_size
    least = forecast(*given, rows, free=lambda: 1)
    assert least is not None
    assert least.pass_rows == 1
    assert least.lines[-1] == "that does not fit: `graft plan` says what would"
    some = forecast(*given, rows, free=lambda: sum(plenty.kinds.values()) - 1)
    assert some is not None
    assert some.pass_rows == plenty.pass_rows // 2
    assert sum(least.kinds.values()) < sum(some.kinds.values()) < sum(plenty.kinds.values())
