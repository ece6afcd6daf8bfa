"""A plan is what a run does: the simulated step holds the bytes and runs the operations of the real one."""

import copy
import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import bases
import numpy
import pytest
import tiny
import torch
import yaml
from commands import called
from transformers import LlamaConfig

from graft import assets
from graft.build import build_adapter, fit_out, load_for, prepare
from graft.config import override
from graft.errors import RecipeError
from graft.methods import store
from graft.methods.base import methods
from graft.model import Base
from graft.objectives.classify import LabelledExample
from graft.objectives.pretrain import Piece
from graft.planning import plan as planning
from graft.planning import simulate as simulating
from graft.planning.catalogue import _CLASSES, config_of
from graft.planning.fake import simulated
from graft.planning.live import Live, Peak
from graft.planning.machine import known
from graft.planning.simulate import Job, Rows, Simulation, extrapolate, simulate
from graft.planning.smaller import Change, changes
from graft.planning.step import Step, watched_step
from graft.quantize import require_bitsandbytes
from graft.recipe import Recipe, read_recipe
from graft.train.loop import Trainer, make_accelerator
from graft.train.precision import Precision

require_bitsandbytes()

ROOT = Path(__file__).parents[1]

QUICK = {("bert", "fp32"), ("llama", "nf4")}
LENGTHS = (11, 9, 12, 5, 7, 12)
FORMATS = ("fp32", "bf16", "nf4")
IN_PLACE = {"full", "frozen"}
"""Methods that train the base's own matrices, of which a quantized base has none."""


def rows(kind: str, lengths: tuple[int, ...] = LENGTHS) -> Rows:
    """Rows of these lengths; those of validation are the same."""
    ids = [[3 + (row + place) % 90 for place in range(length)] for row, length in enumerate(lengths)]
    if kind == "decoder":
        found: list[Any] = [Piece(row, f"row {number}", number) for number, row in enumerate(ids)]
    else:
        found = [LabelledExample(row, None, number % 2, f"row {number}") for number, row in enumerate(ids)]
    return Rows(found, found, ("no", "yes"))


def job_of(
    name: str, method: str, form: str = "fp32", objective: dict[str, Any] | None = None, config: Any = None, **training
) -> Job:
    """A method on a tiny model of a family, in fp32, in bf16, or in bf16 with its matrices in nf4."""
    config = config or bases.FACTORIES[name]().config
    kind = bases.family_of(name).kind
    precision = "fp32" if form == "fp32" else "bf16"
    training = {"per_device_train_batch_size": 6, "per_device_eval_batch_size": 4, "precision": precision} | training
    settings = {key: value for key, value in methods()[method].small.items() if key != "exclusive"}
    given = {
        "model": name,
        "data": {"train": "rows", "max_length": 24},
        "objective": objective or {"name": "pretrain" if kind == "decoder" else "classify"},
        "method": {"name": method} | settings,
        "training": training,
        "quantization": "nf4" if form == "nf4" else None,
    }
    recipe = Recipe.parse(given)
    assert recipe.method is not None
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return Job(recipe, recipe.method, config, Precision(dtype, "of a test"), rows(kind))


def really(job: Job, beside: bool = True) -> tuple[Step, Peak, Peak | None, int, int]:
    """The job's heaviest step with numbers, its evaluation and merging, parameters and those that train."""
    dtype = torch.float32 if job.method.in_place else job.precision.dtype
    torch.manual_seed(0)
    model = _CLASSES[bases.FAMILIES[job.config.model_type].kind].from_config(job.config, dtype=dtype).eval()
    base = fit_out(Base(model, None, "real"), job.recipe, torch.device("cpu"))
    adapter = build_adapter(job.recipe, job.method, base, job.rows.labels)
    accelerator = make_accelerator(job.precision.name)
    trainer = Trainer(
        base, adapter, job.recipe.objective, job.recipe.training, rate=1e-4, seed=job.recipe.seed,
        accelerator=accelerator, engine=job.recipe.engine,
    )  # fmt: skip
    step = watched_step(trainer, [job.rows.train[row] for row in simulating._batches(job, (1.0,))[0]])
    evaluation, merging = Peak(), None
    if beside:
        with accelerator.autocast():
            evaluation = simulating._evaluation(job, base, adapter)
        merging = simulating._merging(job, base, adapter)
    return step, evaluation, merging, base.parameter_count(), adapter.trainable_count()


def same(job: Job, beside: bool = True) -> Simulation:
    """Assert that a job's simulation is its real step to the byte and operation."""
    found = simulate(job, (1.0,), beside)
    step, evaluation, merging, parameters, trainable = really(job, beside)
    assert found.heaviest.operations == step.operations
    assert [peak.kinds for peak in found.heaviest.segments] == [peak.kinds for peak in step.segments]
    assert found.heaviest.at_rest.kinds == step.at_rest.kinds
    assert (found.heaviest.passes, found.heaviest.update) == (step.passes, step.update)
    assert found.evaluation.kinds == evaluation.kinds
    if job.method.name != "peft":  # its tuners' merges are compared by their numbers, which a simulation has not
        assert found.merging == merging
    assert (found.parameters, found.trainable) == (parameters, trainable)
    assert found.heaviest.peak.total > found.heaviest.at_rest.total > 0
    return found


# Every method, family, number format --------------------------------------------------------------


WHOLE = [
    *[(name, form, True) for name, form in sorted(QUICK)],
    *[
        pytest.param(name, form, whole, marks=pytest.mark.faults if whole else pytest.mark.slow)
        for name in ("bert", "llama")
        for form in FORMATS
        for whole in (False, True)
        if (name, form) not in QUICK
    ],
]
"""Families and number formats, with and without checkpointing each, or one of the two by turns."""


@pytest.mark.parametrize(("name", "form", "whole"), WHOLE)
def test_every_method_is_simulated_to_the_byte(name, form, whole):
    """Evaluation and merging are the same with and without checkpointing, so they are compared once."""
    done, refused, merged = 0, set(), 0
    for number, method in enumerate(methods()):
        if form == "nf4" and method in IN_PLACE:
            with pytest.raises(RecipeError, match="trains the base's own weights"):
                job_of(name, method, form)
            refused.add(method)
            continue
        turn = (number + FORMATS.index(form)) % 2 == 1
        for checkpointing in (False, True) if whole else (turn,):
            beside = not (whole and checkpointing)
            found = same(job_of(name, method, form, gradient_checkpointing=checkpointing), beside)
            kinds = found.heaviest.peak.kinds
            assert kinds["weights"] > 0, method
            assert (kinds["adapter"] > 0) == (name == "bert" or method not in IN_PLACE), method
            done += 1
            merged += found.merging is not None
    assert set(bases.suited(name)) == set(methods())
    assert refused == (IN_PLACE if form == "nf4" else set())
    assert done == (1 + whole) * (len(methods()) - len(refused))
    assert merged >= 6


FURTHER = {
    "uneven rows": ("llama", "lora", "fp32", {"per_device_train_batch_size": 3}),
    "two passes": ("llama", "lora", "nf4", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "four passes": ("bert", "full", "fp32", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}),
    "a fused projection": ("gpt2", "lora", "nf4", {}),
    "all weights of GPT-2": ("gpt2", "full", "fp32", {"gradient_checkpointing": True}),
    "a tied head": ("qwen2", "full", "fp32", {}),
    "a tied head in bf16": ("qwen2", "lora", "bf16", {}),
    "windows": ("gemma3", "prefix", "bf16", {}),
    "an encoder and a decoder": ("t5", "lora", "fp32", {}),
    "these quantized": ("t5", "bottleneck", "nf4", {"gradient_checkpointing": True}),
    "moments in 8 bits": ("llama", "lora", "fp32", {"optimizer": "adamw_8bit"}),
}


@pytest.mark.parametrize("what", FURTHER)
def test_other_shapes_and_settings_are_simulated_to_the_byte(what):
    name, method, form, training = FURTHER[what]
    found = same(job_of(name, method, form, **training))
    lengths = [len(row) for row in rows("decoder").train]
    assert len(set(lengths)) > 3
    if what == "two passes":
        assert len(found.heaviest.segments) >= 2 * 3


def test_packed_rows_are_simulated_to_the_byte():
    job = job_of("llama", "lora", objective={"name": "pretrain", "packing": True})
    packed = same(job, beside=False)
    padded = simulate(job_of("llama", "lora"), (1.0,), False)
    assert packed.heaviest.operations != padded.heaviest.operations


def test_what_trains_is_counted_as_what_it_is():
    kinds = {method: simulate(job_of("llama", method), (1.0,)).heaviest.at_rest.kinds for method in ("lora", "full")}
    count = {method: simulate(job_of("llama", method), (1.0,)).trainable for method in ("lora", "full")}
    assert kinds["lora"]["adapter"] == 4 * count["lora"]
    for method in kinds:  # two moments of AdamW in fp32, and a count for each tensor
        assert 0 <= kinds[method]["optimizer"] - 8 * count[method] <= 4 * 64
        assert kinds[method]["gradients"] == kinds[method]["logits"] == 0


LONG = ("instruct", "fp32", "lora")
"""In fp32 as in the other two formats, and as `full` in fp32: with the tests that take long."""
STARTERS = {"fp32": ("lora", "full"), "bf16": ("prefix",), "nf4": ("lora",)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "form", "method"),
    [
        pytest.param(recipe, form, method, marks=pytest.mark.faults if (recipe, form, method) == LONG else ())
        for recipe in ("movie-reviews", "instruct")
        for form in FORMATS
        for method in STARTERS[form]
    ],
)
def test_starter_models_are_simulated_to_the_byte(recipe, form, method):
    """On the weights that a run loads, and rows that a run reads."""
    data = ["data.max_train_samples=24", "data.max_eval_samples=24", "eval_batch_size=8"]
    if recipe == "instruct":
        data = ["data.train=task:family_relationships:size=24", "per_device_train_batch_size=2", "eval_batch_size=2"]
    extra = ["quantization=nf4"] if form == "nf4" else [f"precision={form}"]
    given = read_recipe(ROOT / f"recipes/{recipe}.yaml", [f"method={method}", *data, *extra])
    if not assets.is_pulled(given.model):
        pytest.skip(f"{given.model} is not on this machine")
    accelerator, precision = prepare(given)
    read, _ = planning._rows_of(given)
    job = Job(given, given.method, config_of(given.model), precision, read)
    found = simulate(job, (1.0,))
    base = load_for(given, precision, accelerator.device)
    adapter = build_adapter(given, given.method, base, read.labels)
    trainer = Trainer(
        base, adapter, given.objective, given.training, rate=1e-4, seed=1, accelerator=accelerator,
        engine=given.engine,
    )  # fmt: skip
    step = watched_step(trainer, [read.train[row] for row in simulating._batches(job, (1.0,))[0]])
    assert found.heaviest.operations == step.operations
    assert found.heaviest.peak.kinds == step.peak.kinds
    with accelerator.autocast():
        assert found.evaluation.kinds == simulating._evaluation(job, base, adapter).kinds
    assert found.merging == simulating._merging(job, base, adapter)
    assert (found.parameters, found.trainable) == (base.parameter_count(), adapter.trainable_count())


@pytest.mark.parametrize("method", ["lora", "full", "prefix", "dylora"])
def test_saving_takes_no_more_than_is_planned(tmp_path, method):
    job = job_of("llama", method)
    base = bases.make("llama")
    adapter = build_adapter(job.recipe, job.method, base, ())
    planned = planning._stages(simulate(job))["saving"] - simulate(job).heaviest.at_rest.total
    live = Live()
    live.hold([*base.state().values(), *adapter.tensors().values()], "weights")
    held = live.peak.total
    with live:
        store.save(adapter, base, tmp_path / "adapter")
    assert planned / 3 < live.peak.total - held <= planned + 24_000  # of the pass whose outputs are kept beside it


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("method", ["lora", "full", "bottleneck"])
@pytest.mark.parametrize("recipe", ["movie-reviews", "instruct"])
def test_the_peak_on_a_gpu(recipe, method):
    """What its allocator holds at most in a step, within 5 %."""
    given = read_recipe(ROOT / f"recipes/{recipe}.yaml", [f"method={method}", "precision=bf16", "engine.compile=false"])
    if not assets.is_pulled(given.model):
        pytest.skip(f"{given.model} is not on this machine")
    accelerator, precision = prepare(given)
    read, _ = planning._rows_of(given)
    job = Job(given, given.method, config_of(given.model), precision, read)
    planned = simulate(job, (1.0,), False).heaviest.peak.total
    square = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    square @ square  # the libraries' own work space, which stays
    before = torch.cuda.memory_allocated()
    base = load_for(given, precision, accelerator.device)
    adapter = build_adapter(given, given.method, base, read.labels)
    trainer = Trainer(
        base, adapter, given.objective, given.training, rate=1e-4, seed=1, accelerator=accelerator, engine=given.engine
    )
    chosen = [read.train[row] for row in simulating._batches(job, (1.0,))[0]]
    with trainer.ready() as optimizer:
        for _ in range(2):  # the first makes the optimizer's memory
            torch.cuda.reset_peak_memory_stats()
            trainer.gradients(chosen)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        measured = torch.cuda.max_memory_allocated() - before
    assert planned * planning.ALLOCATOR["cuda"] == pytest.approx(measured, rel=0.05)


# Deep models from shallow ones --------------------------------------------------------------------


def bare(model: str, layers: int, **settings: Any) -> Job:
    """A job on a model of the catalogue with so many layers, without data."""
    recipe = planning._bare(model, {"data": {"max_length": 32}, **settings})
    config = copy.deepcopy(config_of(model))
    config.num_hidden_layers = layers
    if hasattr(config, "num_decoder_layers"):
        config.num_decoder_layers = layers
    assert recipe.method is not None
    return Job(recipe, recipe.method, config, planning._precision(recipe, None), planning._equal_rows(recipe))


AGAIN = {"training": {"gradient_checkpointing": True}}
DEEP = {
    "lora": ("llama-2-7b", {"method": "lora"}),
    "full": ("llama-2-7b", {"method": "full"}),
    "frozen": ("llama-2-7b", {"method": "frozen"}),
    "prefix": ("llama-3-8b", {"method": "prefix"}),
    "qlora": ("llama-2-7b", {"method": "lora", "quantization": "nf4", **AGAIN}),
    "encoder": ("bert-large", {"method": "bottleneck", **AGAIN}),
    "pair": ("t5-base", {"method": "lora"}),
    "gpt2": ("gpt2-medium", {"method": "adalora"}),
}


@pytest.mark.parametrize("what", DEEP)
def test_extrapolated_is_simulated(what):
    model, settings = DEEP[what]
    job = bare(model, 9, **settings)
    found, whole = extrapolate(job, (1.0,)), simulate(job, (1.0,))
    for ours, real in (
        (found.heaviest.peak.total, whole.heaviest.peak.total),
        (found.heaviest.at_rest.total, whole.heaviest.at_rest.total),
        (found.evaluation.total, whole.evaluation.total),
        (found.parameters, whole.parameters),
        (found.trainable, whole.trainable),
    ):
        assert ours == pytest.approx(real, rel=1e-4)
    assert (found.merging is None) == (whole.merging is None)
    if found.merging is not None and whole.merging is not None:
        assert found.merging.total == pytest.approx(whole.merging.total, rel=1e-4)
    card = known("a100-80gb")
    ours, real = (
        planning.seconds_of(card, step.passes) + planning.seconds_of(card, step.update)
        for step in (found.heaviest, whole.heaviest)
    )
    assert ours == pytest.approx(real, rel=0.01)


# What makes a run fit -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shape(tmp_path_factory) -> str:
    """The folder of a small decoder that has a configuration and no weights."""
    folder = tmp_path_factory.mktemp("shape")
    LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_said_to_fit_fits(shape, method):
    """Planned again with the settings that a plan names, the run fits, in what it said."""
    settings = [f"method={method}", "micro_batch_size=6", "max_length=256", "eval_batch_size=6"]

    def small_plan(method: str, memory: int | None, *words: str) -> planning.Plan:
        return planning.plan_model(shape, None, override({}, Recipe, [*settings, *words]), memory)

    free = small_plan(method, None).estimates[0]
    assert free.fits is None
    least = planning.RUNTIME["cpu"]
    said = []
    for share in (0.7, 0.25, 0.06):
        memory = least + round(share * (free.peak - least))
        found = small_plan(method, memory).estimates[0]
        assert found.fits is False
        if found.change is None:
            assert (found.changed_peak or 0) > memory
            continue
        again = small_plan(method, memory, *found.change.split()).estimates[0]
        assert (again.fits, again.peak) == (True, found.changed_peak)
        said.append(found.change)
    assert len(set(said)) >= 2
    assert said[0].split("=")[0] in ("per_device_train_batch_size", "per_device_eval_batch_size")


def test_changes_begin_with_those_that_change_no_result():
    job = job_of("llama", "dora", per_device_train_batch_size=6, gradient_accumulation_steps=2)
    groups = list(changes(Change({}, job)))
    flat = [change for ladders in groups for ladder in ladders for change in ladder]
    assert flat[0].words == "per_device_train_batch_size=3 gradient_accumulation_steps=4"
    assert [change.words for change in groups[0][1]] == ["gradient_checkpointing=true"]
    assert groups[1][0][0].words == "quantization=nf4"
    assert flat[-1].words.startswith("method=lora quantization=nf4 ")
    assert flat[-1].words.endswith("=1 gradient_accumulation_steps=12 gradient_checkpointing=true")
    for change in flat:
        training = change.job.recipe.training
        assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 12
    for number in (5, 7, 12):
        sizes = [change.job.recipe.training for change in next(changes(Change({}, job_of(
            "llama", "lora", per_device_train_batch_size=number))))[0]]  # fmt: skip
        assert [t.per_device_train_batch_size * t.gradient_accumulation_steps for t in sizes] == [number] * len(sizes)
        assert sizes[-1].per_device_train_batch_size == 1


def test_a_recipe_that_compiles_is_told_not_to():
    job = job_of("llama", "lora")
    engine = job.recipe.engine.model_copy(update={"compile": True})
    job = replace(job, recipe=job.recipe.model_copy(update={"engine": engine}))
    told = [change for ladders in changes(Change({}, job)) for ladder in ladders for change in ladder]
    for change in told:
        assert Recipe.parse(override(job.recipe.resolved(), Recipe, change.words.split()))
    assert {"compile=auto" in change.words for change in told} == {True, False}


def test_rows_are_read_again_to_be_shorter():
    job = job_of("bert", "lora")
    long = rows("encoder", (200, 70))
    again = replace(long, again=lambda recipe: rows("encoder", tuple(min(n, recipe.max_length) for n in (200, 70))))
    data = job.recipe.data.model_copy(update={"max_length": 512})
    job = replace(job, rows=again, recipe=job.recipe.model_copy(update={"data": data}))
    told = [change for ladders in changes(Change({}, job)) for ladder in ladders for change in ladder]
    cut = [change for change in told if "max_length" in change.told]
    assert [(change.told["max_length"], [len(row) for row in change.job.rows.train]) for change in cut] == [
        (128, [128, 70]), (64, [64, 64]),
    ]  # fmt: skip


# The command --------------------------------------------------------------------------------------


@pytest.fixture
def graft(monkeypatch, capsys, tmp_path):
    """Runs `graft plan` in this process, on a machine whose rates are known."""
    from graft.planning import machine

    monkeypatch.setattr(machine, "measured", lambda *given, **more: replace(known("a100-40gb"), kind="cpu"))
    monkeypatch.setattr(machine, "free_memory", lambda *given: 20 << 30)

    return lambda *args: called(monkeypatch, capsys, "plan", *args)


SMALL = ("--model", "smollm2-135m", "max_length=32")
BAD = {
    ("--model", "llama-2-7x"): "did you mean 'llama-2-7b'?",
    (*SMALL, "--device", "a101"): "did you mean 'a10",
    (*SMALL, "--memory", "16"): "'16' has no unit; write 16GB or 16MB",
    (*SMALL, "--memory", "lots"): "is no amount of memory",
    (): "give one of a recipe, --model and --fits",
    ("recipes/demo.yaml", "--model", "llama-2-7b"): "give one of a recipe, --model and --fits",
    ("--model", "llama-2-7b", "--fits", "16GB"): "give one of a recipe, --model and --fits",
    ("--fits", "16GB", "--methods", "lora"): "--fits takes no methods",
    ("--fits", "16GB", "--memory", "8GB"): "--fits takes no methods",
    ("--fits", "16"): "'16' has no unit",
    (*SMALL, "--methods", "lara"): "did you mean 'lora'?",
    (*SMALL, "--methods", "lora,lara"): "did you mean 'lora'?",
    (*SMALL, "--methods", ","): "--methods names no method",
    (*SMALL, "--methods", "qlora,full"): "qlora changes the base",
    (*SMALL, "--methods", "lora,full", "r=4"): "r=4: several methods are planned",
    ("nowhere.yaml",): "nowhere.yaml: no such recipe",
    (*SMALL, "banana=3"): "unknown key 'banana'",
    (*SMALL, "training=3"): "training: expected keys and values",
    (*SMALL, "data.train=x.jsonl"): "takes no other model and no data",
    (*SMALL, "model=gpt2"): "takes no other model and no data",
    (*SMALL, "--method", "full", "quantization=nf4"): "trains the base's own weights",
    ("--model", "bert-base", "max_length=600"): "600 exceeds the 512 positions",
    ("--model", "bert-base", "objective=pretrain"): "needs a decoder",
}


@pytest.mark.parametrize("given", BAD, ids=lambda given: " ".join(given) or "nothing")
def test_bad_input_is_one_line(graft, given):
    code, out, err = graft(*given)
    assert code == 2
    assert BAD[given] in err
    assert err.startswith("graft: ")
    assert len(err.splitlines()) == 1
    assert "Traceback" not in out + err


def test_without_bitsandbytes_there_is_one_line(graft, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    code, _, err = graft(*SMALL, "--method", "qlora")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "quantization: nf4 needs the package bitsandbytes" in err
    code, out, err = graft(*SMALL, "--memory", "620MB", "--json")
    assert (code, json.loads(out)["estimates"][0]["change"]) == (3, None)


def test_what_cannot_fit_says_what_is_missing(graft):
    code, out, err = graft(*SMALL, "--method", "lora", "--memory", "500MB")
    assert code == 3
    assert "does not fit whatever is changed" in out
    found = re.search(r"at least (\S+)M are needed, (\S+)M more than there are", err)
    assert found is not None
    assert float(found[1]) - 500 == pytest.approx(float(found[2]), abs=1)
    assert len(err.splitlines()) == 1


def test_json_is_nothing_else(graft):
    code, out, err = graft(*SMALL, "--methods", "lora, prefix,lora", "--memory", "2GB", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [estimate["label"] for estimate in found["estimates"]] == ["lora", "prefix"]
    assert [estimate["fits"] for estimate in found["estimates"]] == [True, True]
    assert found["memory"] == 2 << 30
    for estimate in found["estimates"]:
        assert sum(estimate["kinds"].values()) == estimate["stages"]["training"] < estimate["peak"]
        assert estimate["step_seconds"] > 0
        assert estimate["run_seconds"] is None


def test_settings_reach_the_method(graft, shape):
    def trained(*given: str) -> int:
        code, out, _ = graft("--model", shape, "max_length=32", "--json", *given)
        assert code == 0
        return int(json.loads(out)["estimates"][0]["trainable"])

    one = trained("r=4", "target_modules=[attn.q]")
    assert trained("--method", "lora", "r=8", "target_modules=[attn.q]") == 2 * one
    assert trained("--method", "qlora", "r=8") == 2 * trained("--method", "qlora", "r=4") > one


def test_tables_fit_80_columns(graft):
    code, out, _ = graft("--model", "bert-base", "max_length=16", "--methods", "bottleneck,ptuning_v2,full")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    for word in ("bottleneck", "ptuning_v2", "full", "s/step", "logits"):
        assert word in out
    assert "…" not in out


def test_a_recipe_with_a_tokenizer_and_without(graft, tmp_path):
    folder = tiny.write_all(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny.settings(folder)))
    code, out, err = graft(recipe, "--json", "--methods", "lora,bitfit")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["settings"]["rows"], found["settings"]["longest"], found["notes"]) == (240, 16, [])
    assert all(estimate["run_seconds"] > 0 for estimate in found["estimates"])
    for name in (folder / "model").glob("tokenizer*"):
        name.unlink()
    code, out, _ = graft(recipe, "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["settings"]["rows"], found["settings"]["longest"]) == (240, 24)
    assert "every row counts as 24 tokens" in found["notes"][0]


# Nothing is touched -------------------------------------------------------------------------------


def state() -> list[Any]:
    """What a plan could change of a process."""
    return [
        torch.nn.Module._apply, torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"),
        torch.utils._python_dispatch._get_current_dispatch_mode(), torch.get_rng_state().tolist(), random.getstate(),
        [str(part) for part in numpy.random.get_state()],
    ]  # fmt: skip


def test_a_plan_leaves_the_process_as_it_was(monkeypatch):
    job, other = job_of("llama", "lora", "nf4", gradient_checkpointing=True), job_of("llama", "full")
    simulate(job)  # what is imported late changes nothing later
    before = state()
    simulate(job)
    assert state() == before

    def broken(*given: Any) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(simulating, "watched_step", broken)
    with pytest.raises(ValueError, match="broken"):
        simulate(other)
    assert state() == before
    with pytest.raises(ZeroDivisionError), simulated():
        _ = 1 / 0
    assert state() == before
    assert torch.nn.Linear(2, 2).to(torch.bfloat16).weight.dtype == torch.bfloat16


def test_a_deep_plan_takes_little_memory_and_no_network(tmp_path):
    """70 billion parameters, in a process that can reach nothing."""
    code = (
        "import socket\n"
        "from pathlib import Path\n"
        "def refuse(*given, **more): raise SystemExit('a connection')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "from graft.methods.base import read_method\n"
        "from graft.planning.plan import plan_model\n"
        "plan = plan_model('llama-3-70b', [read_method('lora')], {}, 200 << 30)\n"
        "told = Path('/proc/self/status').read_text()\n"  # ru_maxrss would be that of the process that started this one
        "print(plan.estimates[0].kinds['weights'], int(told.split('VmHWM:')[1].split()[0]) * 1024)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120,
                          cwd=tmp_path, env={"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    weights, used = map(int, done.stdout.split())
    assert 2 * 70e9 < weights < 2 * 72e9
    assert used < 3 * 2**30
