"""Merging: what is written computes what the attached adapter does, or nothing is written."""

import errno
import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import bases
import pytest
import tiny
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_cli import Command, graft, refused
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from graft import merge as merging
from graft.errors import DamagedError, NotMergeable, RecipeError, UsageError
from graft.merge import merge_run, merged_lines
from graft.methods import store
from graft.methods.base import methods, read_method
from graft.model import Base, load_base
from graft.objectives.classify import Classify
from graft.parts.attach import attach, merge_into
from graft.parts.head import scores
from graft.run import evaluate_run, execute

__all__ = ["graft"]

pytestmark = pytest.mark.slow

WORDS = 140
"""More than the 134 of the tokenizer, one of which Qwen 2 adds."""
LABELS = ("no", "yes", "perhaps")
MERGEABLE = [name for name, cls in methods().items() if cls.mergeable]
POOLED = {"bert", "roberta", "distilbert", "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma3"}
FEW = {"max_steps": 3, "per_device_train_batch_size": 16, "precision": "fp32"}
TEXTS = [row["text"] for row in tiny.rows(4, 9)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tiny.write_all(tmp_path_factory.mktemp("tiny"))


def model_folder(place: Path, family: str) -> Path:
    """A tiny random model of a family with a tokenizer; written once."""
    folder = place / family
    if folder.exists():
        return folder
    tiny.write_model(folder)  # for its tokenizer
    about = json.loads((folder / "tokenizer_config.json").read_text())
    kinds = ["input_ids", *(["token_type_ids"] if family == "bert" else []), "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"model_input_names": kinds}))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = bases.FACTORIES[family]()
        model.config.vocab_size = WORDS
        model.config.initializer_range = 0.2  # at 0.02 all rows have nearly the same scores
        type(model)(model.config).save_pretrained(folder)
    return folder


def adapter_folder(model: Path, folder: Path, method: str, pooling: str | None = None, **more: Any) -> Path:
    """An adapter with a head, all of its tensors moved, as saved."""
    base = load_base(str(model))
    put(base, method, pooling=pooling, **more)
    store.save(base.adapters[method], base, folder)
    return folder


def put(base: Base, method: str, pooling: str | None = None, head: bool = True, **more: Any) -> None:
    settings = {"name": method} | dict(methods()[method].small) | more
    adapter = read_method(settings).build(base, method)
    if head:
        Classify(pooling=pooling).prepare(base, adapter, LABELS)
    attach(base, adapter)
    with torch.no_grad():
        for _, tensor in adapter.trainable():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    adapter.eval()


def batch(base: Base) -> dict[str, torch.Tensor]:
    return dict(base.tokenizer(TEXTS, padding=True, return_tensors="pt"))


@torch.no_grad()
def attached(model: Path, adapter: Path) -> torch.Tensor:
    base = load_base(str(model))
    store.load(base, adapter, "a")
    return scores(base, batch(base), "a")


@torch.no_grad()
def by_graft(folder: Path) -> torch.Tensor:
    base = load_base(str(folder))
    assert base.fresh == ()
    store.load(base, folder / "head")
    return scores(base, batch(base), "head")


@torch.no_grad()
def by_transformers(folder: Path, **more: Any) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder, **more).eval()
    base = load_base(str(folder))
    return model(**batch(base)).logits


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What is written ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("method", MERGEABLE)
def test_every_method_that_merges(place, tmp_path, family, method):
    model = model_folder(place, family)
    adapter = adapter_folder(model, tmp_path / "a", method)
    if method == "bitfit" and family in ("llama", "t5"):
        with pytest.raises(NotMergeable, match="has no bias in this architecture"):
            merge_run(adapter, tmp_path / "m", model=str(model))
        assert left(tmp_path) == ["a"]
        return
    result = merge_run(adapter, tmp_path / "m", model=str(model))
    expected = attached(model, adapter)
    assert float((expected - expected[:1]).abs().max()) > 1e-2
    torch.testing.assert_close(by_graft(tmp_path / "m"), expected, atol=1e-5, rtol=1e-5)
    assert (result["dtype"], result["tolerance"], result["method"]) == ("fp32", 1e-4, method)
    assert result["largest_difference"] < 1e-5
    assert result["bytes"] == sum(path.stat().st_size for path in (tmp_path / "m").rglob("*") if path.is_file())
    assert left(tmp_path) == ["a", "m"]
    if family == "t5":
        assert (result["class"], result["load_with"]) == ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM")
        return
    torch.testing.assert_close(by_transformers(tmp_path / "m"), expected, atol=1e-5, rtol=1e-5)
    about = json.loads((tmp_path / "m" / "config.json").read_text())
    assert about["architectures"] == [result["class"]]
    assert result["load_with"] == "AutoModelForSequenceClassification"
    assert about["problem_type"] == "single_label_classification"
    assert about["id2label"] == {"0": "no", "1": "yes", "2": "perhaps"}
    assert about["label2id"] == {"no": 0, "yes": 1, "perhaps": 2}


@pytest.mark.parametrize("family", sorted(POOLED - {"bert", "gpt2", "llama"}))
def test_other_families_as_classifiers(place, tmp_path, family):
    model = model_folder(place, family)
    adapter = adapter_folder(model, tmp_path / "a", "lora")
    result = merge_run(adapter, tmp_path / "m", model=str(model))
    assert result["class"].endswith("ForSequenceClassification")
    expected = attached(model, adapter)
    torch.testing.assert_close(by_graft(tmp_path / "m"), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(by_transformers(tmp_path / "m"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "pooling"), [("bert", "mean"), ("bert", "first"), ("llama", "mean")])
def test_where_transformers_pools_otherwise_the_head_stands_alone(place, tmp_path, family, pooling):
    model = model_folder(place, family)
    adapter = adapter_folder(model, tmp_path / "a", "lora", pooling=pooling)
    result = merge_run(adapter, tmp_path / "m", model=str(model))
    torch.testing.assert_close(by_graft(tmp_path / "m"), attached(model, adapter), atol=1e-5, rtol=1e-5)
    assert result["class"] == {"bert": "BertModel", "llama": "LlamaForCausalLM"}[family]
    assert not any("classifier" in name or "score" in name for name in load_file(tmp_path / "m" / "model.safetensors"))
    assert any(f"with pooling {pooling!r}" in line for line in merged_lines(result))


def test_where_rows_end_in_the_pad_token_the_head_stands_alone(place, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(model_folder(place, "gpt2"), model)
    about = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(about | {"pad_token": "[SEP]"}))
    adapter = adapter_folder(model, tmp_path / "a", "lora")
    assert merge_run(adapter, tmp_path / "m", model=str(model))["class"] == "GPT2LMHeadModel"
    torch.testing.assert_close(by_graft(tmp_path / "m"), attached(model, adapter), atol=1e-5, rtol=1e-5)


def test_an_adapter_without_a_head(place, tmp_path):
    model = model_folder(place, "llama")
    base = load_base(str(model))
    put(base, "lora", head=False)
    store.save(base.adapters["lora"], base, tmp_path / "a")
    with torch.no_grad(), base.route("lora"):
        expected = base.model(**batch(base)).logits
    result = merge_run(tmp_path / "a", tmp_path / "m", model=str(model))
    assert (result["head"], result["labels"], result["load_with"]) == (None, None, "AutoModelForCausalLM")
    assert not (tmp_path / "m" / "head").exists()
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "m")(**batch(base)).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert len(merged_lines(result)) == 3


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads names that transformers renames
def test_a_folder_of_peft(place, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = model_folder(place, "llama")
    inner = AutoModelForCausalLM.from_pretrained(model)
    tuned = get_peft_model(inner, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    tuned.eval().save_pretrained(tmp_path / "a")
    with pytest.raises(UsageError, match="which has no base in it; give its base with --model"):
        merge_run(tmp_path / "a", tmp_path / "m")
    merge_run(tmp_path / "a", tmp_path / "m", model=str(model))
    given = batch(load_base(str(model)))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "m")(**given).logits
        torch.testing.assert_close(logits, tuned(**given).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["lora", "full", "frozen"])
def test_a_run(place, tmp_path, method):
    """Full and frozen runs train the base in place."""
    settings = {"name": method, "learning_rate": 2e-2 if method == "lora" else 2e-3}
    recipe = tiny.recipe(place, method=settings, training=FEW)
    execute(recipe, tmp_path / "run")
    result = merge_run(tmp_path / "run", tmp_path / "m")
    expected = evaluate_run(tmp_path / "run")
    base = load_base(str(tmp_path / "m"))
    store.load(base, tmp_path / "m" / "head")
    rows = merging_rows(recipe)
    found = recipe.objective.evaluate(
        base, recipe.objective.examples(rows, base.tokenizer, ("negative", "positive"), 24), "head", 16
    )
    assert found.loss == pytest.approx(expected["loss"], abs=1e-5)
    assert found.quality == expected["quality"]
    assert result["class"] == "BertModel"
    before, after = load_file(place / "model" / "model.safetensors"), load_file(tmp_path / "m" / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def merging_rows(recipe: Any) -> Any:
    from graft.data.load import load_splits

    return load_splits(recipe.data).test


def test_nothing_private_is_written(place, tmp_path):
    model = model_folder(place, "bert")
    merge_run(adapter_folder(model, tmp_path / "a", "lora"), tmp_path / "m", model=str(model))
    for path in (tmp_path / "m").rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes(), path
        assert path.is_dir() or str(place).encode() not in path.read_bytes(), path
        assert path.stat().st_mode & 0o044, path


# Number formats and ranks -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_format_is_that_of_the_base_or_as_asked(place, tmp_path, dtype):
    kind = merging.DTYPES[dtype]
    half = tmp_path / "half"
    shutil.copytree(model_folder(place, "bert"), half)
    weights = {name: tensor.to(kind) for name, tensor in load_file(half / "model.safetensors").items()}
    save_file(weights, half / "model.safetensors", metadata={"format": "pt"})
    adapter = adapter_folder(half, tmp_path / "a", "lora")
    for given, expected in ((None, dtype), ("fp32", "fp32"), (dtype, dtype)):
        folder = tmp_path / f"m-{given}"
        result = merge_run(adapter, folder, model=str(half), dtype=given)
        assert result["dtype"] == expected
        assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {
            merging.DTYPES[expected]
        }
        assert json.loads((folder / "config.json").read_text())["dtype"] == str(merging.DTYPES[expected])[6:]
        assert result["largest_difference"] <= merging.TOLERANCE[expected]
        assert (result["largest_difference"] > 1e-5) is (expected != "fp32")
        torch.testing.assert_close(by_transformers(folder, dtype=torch.float32), by_graft(folder), atol=2e-3, rtol=0)
    with pytest.raises(UsageError, match="dtype 'f16' is not known; did you mean 'fp16'"):
        merge_run(adapter, tmp_path / "x", model=str(half), dtype="f16")


def test_values_that_a_format_cannot_hold(place, tmp_path):
    base = load_base(str(model_folder(place, "bert")))
    put(base, "lora")
    with torch.no_grad():
        base.adapters["lora"].parts[0].lora_A.fill_(1e7)
    store.save(base.adapters["lora"], base, tmp_path / "a")
    with pytest.raises(UsageError, match="weight has values that are no numbers in fp16; use --dtype bf16"):
        merge_run(tmp_path / "a", tmp_path / "m", model=base.name, dtype="fp16")
    assert left(tmp_path) == ["a"]


def test_ranks(place, tmp_path):
    model = model_folder(place, "llama")
    adapter = adapter_folder(model, tmp_path / "a", "dylora", r=4)
    found = {}
    for rank in (None, 1, 4):
        result = merge_run(adapter, tmp_path / f"m{rank}", model=str(model), rank=rank)
        assert result["rank"] == (rank or 4)
        found[rank] = by_graft(tmp_path / f"m{rank}")
    assert torch.equal(found[None], found[4])
    assert not torch.allclose(found[1], found[4], atol=1e-4)
    with pytest.raises(UsageError, match="rank 5 is none of dylora's; its ranks: 1 to 4"):
        merge_run(adapter, tmp_path / "m", model=str(model), rank=5)
    lora = adapter_folder(model, tmp_path / "b", "lora")
    with pytest.raises(UsageError, match="rank 2: lora has no ranks to choose from; leave the rank out"):
        merge_run(lora, tmp_path / "m", model=str(model), rank=2)
    assert "m" not in left(tmp_path)


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name, cls in methods().items() if not cls.mergeable])
def test_a_method_that_cannot_merge_is_refused_before_the_base_is_loaded(place, tmp_path, monkeypatch, method):
    model = model_folder(place, "llama")
    try:
        adapter = adapter_folder(model, tmp_path / "a", method)
    except UsageError:  # not for this architecture
        return
    monkeypatch.setattr(merging, "load_base", None)
    with pytest.raises(NotMergeable, match=f"^{method} computes what no weight .*; use the adapter attached") as caught:
        merge_run(adapter, tmp_path / "m", model=str(model))
    assert caught.value.exit_code == 2
    assert left(tmp_path) == ["a"]


def test_the_untouched_base_and_a_comparison(place, tmp_path):
    execute(tiny.recipe(place, method=None), tmp_path / "c" / "trials" / "base-seed1")
    execute(tiny.recipe(place, training=FEW), tmp_path / "c" / "trials" / "lora-seed1")
    with pytest.raises(RecipeError, match="measured the untouched base"):
        merge_run(tmp_path / "c" / "trials" / "base-seed1", tmp_path / "m")
    with pytest.raises(RecipeError, match=r"is a comparison; give one of its trials: .*lora-seed1"):
        merge_run(tmp_path / "c", tmp_path / "m")
    with pytest.raises(RecipeError, match="is not a run"):
        merge_run(tmp_path / "d", tmp_path / "m")
    with pytest.raises(UsageError, match="which stays as it is"):
        merge_run(tmp_path / "c" / "trials" / "lora-seed1", tmp_path / "c" / "m")
    assert left(tmp_path) == ["c"]
    merge_run(tmp_path / "c" / "trials" / "lora-seed1", tmp_path / "m", model=str(place / "model"))
    (tmp_path / "c" / "trials" / "lora-seed1" / "report.json").unlink()
    with pytest.raises(RecipeError, match="the run is not finished"):
        merge_run(tmp_path / "c" / "trials" / "lora-seed1", tmp_path / "n")


def test_places_where_nothing_is_written(place, tmp_path):
    model = model_folder(place, "bert")
    adapter = adapter_folder(model, tmp_path / "a", "lora")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(model)
    for output, what in [
        (tmp_path / "full", "is not empty; choose another folder with -o"),
        (tmp_path / "file", "is a file"),
        (model, "which stays as it is"),
        (model / "merged", "which stays as it is"),
        (tmp_path / "link" / "merged", "which stays as it is"),
        (adapter / "merged", "which stays as it is"),
    ]:
        with pytest.raises(UsageError, match=what):
            merge_run(adapter, output, model=str(model))
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "kept"
    assert not (model / "merged").exists()
    (tmp_path / "empty").mkdir()
    merge_run(adapter, tmp_path / "empty", model=str(model))
    with pytest.raises(UsageError, match="cannot be written"):
        merge_run(adapter, tmp_path / "file" / "m", model=str(model))
    assert left(tmp_path) == ["a", "empty", "file", "full", "link"]


def test_a_merged_base_is_another_base(place, tmp_path):
    model = model_folder(place, "bert")
    adapter = adapter_folder(model, tmp_path / "a", "lora")
    merge_run(adapter, tmp_path / "m", model=str(model))
    with pytest.raises(DamagedError, match="whose weights differ"):
        merge_run(adapter, tmp_path / "n", model=str(tmp_path / "m"))
    with pytest.raises(DamagedError, match="whose weights differ"):
        store.load(load_base(str(model)), tmp_path / "m" / "head")
    again = adapter_folder(tmp_path / "m", tmp_path / "b", "dora")
    merge_run(again, tmp_path / "n", model=str(tmp_path / "m"))
    torch.testing.assert_close(by_transformers(tmp_path / "n"), attached(tmp_path / "m", again), atol=1e-5, rtol=1e-5)


# Faults while it is written -----------------------------------------------------------------------


@pytest.fixture
def case(place, tmp_path) -> tuple[Path, Path]:
    """An adapter folder alone in a folder, and its base."""
    model = model_folder(place, "bert")
    return adapter_folder(model, tmp_path / "a", "lora"), model


def test_a_wrong_weight_on_disk(case, tmp_path, monkeypatch, graft: Command):
    """One value in a row of the embeddings that no sentence reaches."""

    def tamper(tensors: dict[str, torch.Tensor], *args: Any, **more: Any) -> None:
        name = "bert.embeddings.word_embeddings.weight"
        tensors[name] = tensors[name].clone()
        tensors[name][WORDS - 1, 3] += 1e-3
        save_file(tensors, *args, **more)

    monkeypatch.setattr(merging, "save_file", tamper)
    result = graft("merge", case[0], "-o", tmp_path / "m", "--model", case[1])
    refused(result, 5, "1 of 39 tensors are not what was to be written", "word_embeddings")
    assert left(tmp_path) == ["a"]


def test_a_wrong_merge(case, tmp_path, monkeypatch, graft: Command):
    def skew(base: Base, name: str) -> None:
        merge_into(base, name)
        with torch.no_grad():
            base.model.get_parameter("encoder.layer.1.output.dense.weight").mul_(1.1)

    monkeypatch.setattr(merging, "merge_into", skew)
    result = graft("merge", case[0], "-o", tmp_path / "m", "--model", case[1])
    refused(result, 5, "outputs differ by", "0.0001 is allowed")
    assert left(tmp_path) == ["a"]


def test_a_wrong_tokenizer_or_head(case, tmp_path, monkeypatch):
    original = merging._write

    def words(base: Base, plan: Any, folder: Path) -> Any:
        bits = original(base, plan, folder)
        text = json.loads((folder / "tokenizer.json").read_text())
        text["post_processor"] = None
        (folder / "tokenizer.json").write_text(json.dumps(text))
        return bits

    def labels(base: Base, plan: Any, folder: Path) -> Any:
        bits = original(base, plan, folder)
        weights = load_file(folder / "model.safetensors")
        save_file(weights | {"classifier.bias": weights["classifier.bias"] + 1}, folder / "model.safetensors")
        return bits

    def cut(base: Base, plan: Any, folder: Path) -> Any:
        bits = original(base, plan, folder)
        os.truncate(folder / "model.safetensors", 1000)
        return bits

    for change, what in ((words, "differ by inf"), (labels, "differ by"), (cut, "cannot be read")):
        monkeypatch.setattr(merging, "_write", change)
        with pytest.raises(DamagedError, match=what):
            merge_run(case[0], tmp_path / "m", model=str(case[1]))
        assert left(tmp_path) == ["a"]


def test_a_full_disk(case, tmp_path, monkeypatch, graft: Command):
    (tmp_path / "m").mkdir()  # an empty folder stays
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # the weights have 109,000 bytes
    try:
        result = graft("merge", case[0], "-o", tmp_path / "m", "--model", case[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    refused(result, 3, "cannot be written", "File too large", "free space or choose another place")
    assert left(tmp_path) == ["a", "m"]
    assert left(tmp_path / "m") == []
    faults = {
        "merge.save_file": SafetensorError("I/O error: No space left on device (os error 28)"),
        "methods.store.save_file": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        "files.os.fsync": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    }
    for name, error in faults.items():

        def full(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(f"graft.{name}", full)
            result = graft("merge", case[0], "-o", tmp_path / "m", "--model", case[1])
        refused(result, 3, "No space left on device")
        assert left(tmp_path) == ["a", "m"]


def test_an_interrupt(case, tmp_path, monkeypatch, graft: Command):
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "_check", stop)
    assert graft("merge", case[0], "-o", tmp_path / "m", "--model", case[1]).code == 130
    assert left(tmp_path) == ["a"]


def test_a_folder_filled_meanwhile_stays(case, tmp_path, monkeypatch):
    original = merging._check

    def fill(*given: Any) -> float:
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "mine").write_text("kept")
        return original(*given)

    monkeypatch.setattr(merging, "_check", fill)
    with pytest.raises(UsageError, match="is not empty"):
        merge_run(case[0], tmp_path / "m", model=str(case[1]))
    assert left(tmp_path / "m") == ["mine"]
    assert left(tmp_path) == ["a", "m"]


# The command --------------------------------------------------------------------------------------


def test_the_command(case, tmp_path, graft: Command):
    result = graft("merge", case[0], "-o", tmp_path / "m", "--model", case[1])
    assert (result.code, result.err) == (0, "")
    first, second, third, fourth = result.out.splitlines()
    assert first == f"lora merged: {tmp_path / 'm'} is a BertForSequenceClassification in fp32, 0.1 MB"
    assert second.startswith("read from disk, its outputs differ from the attached adapter's by ")
    assert second.endswith("e-07 (allowed: 0.0001)")
    assert third == f"load it with AutoModelForSequenceClassification.from_pretrained('{tmp_path / 'm'}')"
    assert fourth.startswith("its head for Graft: load_adapter(load_base(")
    result = graft("merge", case[0], "-o", tmp_path / "n", "--model", case[1], "--dtype", "bf16", "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out) | {"largest_difference": 0, "bytes": 0, "difference_from_trained": 0} == {
        "folder": str(tmp_path / "n"),
        "method": "lora",
        "rank": None,
        "class": "BertForSequenceClassification",
        "load_with": "AutoModelForSequenceClassification",
        "dtype": "bf16",
        "largest_difference": 0,
        "tolerance": 0.1,
        "bytes": 0,
        "head": str(tmp_path / "n" / "head"),
        "pooling": "pooler",
        "labels": list(LABELS),
        "compared": "scores",
        "difference_from_trained": 0,
        "same_best": 1.0,
        "positions": len(merging.SENTENCES),
    }


def test_the_command_refuses_in_one_line(case, place, tmp_path, graft: Command):
    adapter, model = case
    refused(graft("merge", adapter), 2, "Missing option '-o'")
    refused(graft("merge", adapter, "-o", tmp_path / "m"), 2, "give its base with --model")
    refused(graft("merge", adapter, "-o", tmp_path / "m", "--model", place / "x"), 2, "no such model folder")
    refused(graft("merge", adapter, "-o", adapter, "--model", model), 2, "which stays as it is")
    refused(graft("merge", adapter, "-o", place, "--model", model), 2, "is not empty")
    refused(graft("merge", adapter, "-o", tmp_path / "m", "--model", model, "--rank", 2), 2, "lora has no ranks")
    refused(graft("merge", adapter, "-o", tmp_path / "m", "--model", model, "--rank", "x"), 2, "--rank")
    refused(graft("merge", adapter, "-o", tmp_path / ("n" * 300), "--model", model), 2, "File name too long")
    prefix = adapter_folder(model, tmp_path / "p", "prefix")
    refused(graft("merge", prefix, "-o", tmp_path / "m", "--model", model), 2, "prefix computes what no weight")
    (adapter / "graft.json").write_text("{")
    refused(graft("merge", adapter, "-o", tmp_path / "m", "--model", model), 5, "graft.json: not JSON")
    assert left(tmp_path) == ["a", "p"]


# Several names of one tensor, and several adapters ------------------------------------------------


@pytest.mark.parametrize(
    ("family", "sites", "names"),
    [
        ("gpt2", ["attn.qkv", "embed"], r"transformer\.wte\.weight and lm_head\.weight"),
        ("gpt2", ["attn.qkv", "head"], r"lm_head\.weight and transformer\.wte\.weight"),
        ("gpt2", ["attn.qkv", "embed", "head"], r"transformer\.wte\.weight and lm_head\.weight"),
        ("qwen2", ["attn.q", "head"], r"lm_head\.weight and model\.embed_tokens\.weight"),
    ],
)
def test_one_side_of_a_tied_tensor_is_refused(family, sites, names):
    base = bases.make(family)
    before = {name: tensor.clone() for name, tensor in base.state().items()}
    bases.put(base, "lora", target_modules=sites)
    with pytest.raises(NotMergeable, match=f"^{names} are one tensor in {family} \\(tied\\), and 'lora' does not"):
        merge_into(base, "lora")
    assert list(base.adapters) == ["lora"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state().items())


def test_untied_embeddings_merge():
    base, given = bases.make("llama"), bases.batch()
    bases.put(base, "lora", target_modules=["attn.q", "embed", "head"])
    with torch.no_grad(), base.route("lora"):
        expected = base.model(**given).logits
    merge_into(base, "lora")
    with torch.no_grad():
        torch.testing.assert_close(base.model(**given).logits, expected, atol=1e-5, rtol=1e-5)


def stacked(family: str, given: list[tuple[str, str, dict[str, Any]]]) -> Base:
    base = bases.make(family)
    for method, name, more in given:
        bases.put(base, method, name, **more)
    return base


EVERYWHERE = {"target_modules": ["all-linear"]}
LAST = {"exclusive": False, "last_layers": 2}
STACKS: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "lora, lora": [("lora", "a", EVERYWHERE), ("lora", "b", {"r": 2})],
    "lora, ia3": [("lora", "a", EVERYWHERE), ("ia3", "b", {})],
    "ia3, lora": [("ia3", "a", {}), ("lora", "b", EVERYWHERE)],
    "lora, frozen": [("lora", "a", EVERYWHERE), ("frozen", "b", LAST)],
    "frozen, lora, ia3": [("frozen", "a", LAST), ("lora", "b", EVERYWHERE), ("ia3", "c", {})],
    "dora, lora": [("dora", "a", {}), ("lora", "b", EVERYWHERE)],
    "dora, ia3": [("dora", "a", {"target_modules": ["mlp.down"]}), ("ia3", "b", {})],
    "frozen, frozen": [("frozen", "a", LAST), ("frozen", "b", {"exclusive": False, "last_layers": 1})],
}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("stack", STACKS)
def test_stacked_adapters_merge_as_they_act(family, stack):
    for turned in (False, True):  # attached in the order of the stack, and the other way round
        given = STACKS[stack]
        base, rows = stacked(family, given[::-1] if turned else given), bases.batch()
        names = tuple(name for _, name, _ in given)
        real = rows["attention_mask"].bool()
        expected = bases.hidden(base, rows, names).last[real]
        alone = bases.hidden(base, rows, names[:-1]).last[real]
        assert float((alone - expected).abs().max()) > 1e-3
        merge_into(base, names)
        assert base.adapters == {}
        torch.testing.assert_close(bases.hidden(base, rows, None).last[real], expected, atol=2e-5, rtol=1e-5)


def test_slices_of_one_weight_merge_as_they_act():
    """Scales of the keys, attached before or after LoRA at the whole fused projection."""
    for first in ("lora", "ia3"):
        base, rows = bases.make("gpt2"), bases.batch(padded=None)
        for method in (first, {"lora": "ia3", "ia3": "lora"}[first]):
            bases.put(base, method, target_modules=["attn.qkv" if method == "lora" else "attn.k"])
        expected = bases.hidden(base, rows, ("lora", "ia3")).last
        merge_into(base, ("lora", "ia3"))
        torch.testing.assert_close(bases.hidden(base, rows, None).last, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("under", ["lora", "frozen", "dora"])
def test_dora_over_another_weight_adapter_is_refused(under):
    more = LAST if under == "frozen" else {}
    base = stacked("llama", [(under, "a", more), ("dora", "b", {})])
    before = {name: tensor.clone() for name, tensor in base.state().items()}
    with pytest.raises(NotMergeable, match=r"'b' depends on the base's own \S+q_proj.weight, which 'a' changes before"):
        merge_into(base, ("a", "b"))
    assert list(base.adapters) == ["a", "b"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state().items())
    elsewhere = stacked("llama", [("lora", "a", {"target_modules": ["mlp.up"]}), ("dora", "b", {})])
    merge_into(elsewhere, ("a", "b"))


def test_nothing_is_merged_when_one_of_them_cannot_be():
    base = stacked("llama", [("lora", "a", {}), ("prefix", "b", {})])
    before = {name: tensor.clone() for name, tensor in base.state().items()}
    with pytest.raises(NotMergeable, match="no weight of the base can"):
        merge_into(base, ("a", "b"))
    merge_into(base, None)
    assert list(base.adapters) == ["a", "b"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state().items())
