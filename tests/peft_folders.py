"""Adapter folders in the tests with peft: written by one and read by the other, and damaged."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_tools import (
    given,
    make,
    our_values,
    ours,
    peft_rows,
    peft_values,
    same,
    shake,
    task_of,
    twin,
    virtual_tokens,
    wrapped,
)
from safetensors.torch import load_file, save_file

from graft.errors import DamagedError
from graft.methods import store

KNOWN_WARNINGS = (
    "is_gradient_checkpointing",  # a deprecated property of transformers
    "Model has `tie_word_embeddings=True`",  # of a later merge
    "Specified to not save vera_A and vera_B",
    "Specified to not load vera_A and vera_B",
)
QUERIES = {
    "gpt2": ["c_attn"],
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "t5": ["q", "v"],
}
"""peft's names of LoRA's default sites; q_proj and v_proj elsewhere."""


HEADS = {"llama": 1, "gpt2": 1, "bert": 2, "roberta": 4, "distilbert": 4, "t5": 2}
"""Tensors of a task head."""


def lora_config(kind: str, **settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 8, "lora_alpha": 16} | settings, fan_in_fan_out=kind == "gpt2")


def targets(kind: str) -> list[str]:
    return QUERIES.get(kind, ["q_proj", "v_proj"])


# Outputs, and folders written and read ------------------------------------------------------------


def from_peft(model: peft.PeftModel, kind: str, head: bool) -> dict[str, torch.Tensor]:
    """peft's outputs on rows padded on the right; alone where its classifier would score the padding."""
    batch = given(kind, head, "right")
    alone = head and virtual_tokens(model) > 0 and kind != "bert"
    with torch.no_grad():
        return (peft_rows if alone else peft_values)(model, kind, batch, head)[0]


def from_graft(base: Any, kind: str, head: bool) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return our_values(base, next(iter(base.adapters)), given(kind, head, "right"), head)


def read_by_peft(folder: Path, base: Any, kind: str, head: bool = False) -> peft.PeftModel:
    """peft's model of a folder; warnings of missing or unexpected keys are errors."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(twin(base, kind, head), str(folder))
    messages = [str(warning.message) for warning in seen]
    assert all(any(known in message for known in KNOWN_WARNINGS) for message in messages), messages
    return model.eval()


def written_by_peft(
    folder: Path, kind: str, config: peft.PeftConfig, head: bool = False, **more: Any
) -> peft.PeftModel:
    model = wrapped(make(kind), kind, config, head)
    shake(model)
    model.save_pretrained(str(folder), **{"save_embedding_layers": False} | more)
    return model.eval()


def check_read_by_peft(folder: Path, kind: str, settings: dict[str, Any], head: bool, count: int | None = None) -> Any:
    """Save an adapter with Graft: peft reads it to equal outputs, and writes the same settings and tensors again.

    `count` is the number of tensors without the head; two for each site when left out. Returns the adapter.
    """
    base, adapter = ours(kind, settings, head)
    store.save(adapter, base, folder / "mine")
    model = read_by_peft(folder / "mine", base, kind, head)
    assert model.peft_config["default"].task_type == task_of(kind, head)
    assert model.peft_config["default"].inference_mode
    found = same(from_graft(base, kind, head), from_peft(model, kind, head))
    assert len(found) == (1 if head else 2)
    # No tensor was left out on the way: peft writes the same ones again.
    model.save_pretrained(str(folder / "again"), save_embedding_layers=False)
    mine, theirs = read_config(folder / "mine"), read_config(folder / "again")
    for config in (mine, theirs):
        for key in ("target_modules", "feedforward_modules"):
            config[key] = sorted(config.get(key, ()))
        config["modules_to_save"] = None if config["modules_to_save"] is None else "the head"  # peft adds its defaults
    assert {key: theirs.get(key) for key in mine} == mine
    first, second = tensors(folder / "mine"), tensors(folder / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    expected = 2 * len(adapter.placed) if count is None else count
    assert len(first) == expected + (HEADS[kind] if head else 0)
    return adapter


def check_read_by_graft(folder: Path, kind: str, config: peft.PeftConfig, head: bool, name: str) -> Any:
    """Save an adapter with peft: Graft reads it as method `name` to equal outputs, and peft what Graft then writes.

    Returns the adapter.
    """
    model = written_by_peft(folder / "theirs", kind, config, head)
    base = make(kind)
    adapter = store.load(base, folder / "theirs")
    assert list(base.adapters) == [adapter.name] == ["theirs"]
    assert adapter.method.name == name
    assert (adapter.head is not None) == head
    found = same(from_graft(base, kind, head), from_peft(model, kind, head))
    assert len(found) == (1 if head else 2)
    store.save(adapter, base, folder / "again")
    again = read_by_peft(folder / "again", make(kind), kind, head)
    same(from_peft(again, kind, head), from_peft(model, kind, head))
    return adapter


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_equal_tensors(first: Any, second: Any, count: int) -> None:
    """The same tensors by name, bit for bit, and `count` of them."""
    mine, other = first.tensors(), second.tensors()
    assert mine.keys() == other.keys()
    assert len(mine) == count
    assert all(torch.equal(mine[name], other[name]) for name in mine)


# Damage -------------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def write_config(folder: Path, config: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def setting(key: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: write_config(folder, read_config(folder) | {key: value})


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        stored = tensors(folder)
        change(stored)
        save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    return damage


def about(**entries: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "graft.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | entries), encoding="utf-8")

    return damage


def text(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def cut(share: float) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return damage


def pickled(folder: Path) -> None:
    torch.save(tensors(folder), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def drop(*names: str) -> Callable[[Path], None]:
    return weights(lambda stored: [stored.pop(name) for name in names])


def put(name: str, *shape: int) -> Callable[[Path], None]:
    return weights(lambda stored: stored.update({name: torch.ones(shape)}))


def add(name: str, amount: float) -> Callable[[Path], None]:
    return weights(lambda stored: stored[name].add_(amount))


def assert_refused(base: Any, folder: Path, said: list[str]) -> None:
    """`DamagedError` that names the folder and says why; the base is as before, and still takes a good adapter."""
    before = {name: tensor.clone() for name, tensor in base.state().items()}
    modules = set(base.modules_by_path)
    with pytest.raises(DamagedError) as caught:
        store.load(base, folder)
    assert caught.value.exit_code == 5
    assert str(folder) in caught.value.message
    assert caught.value.remedy
    for part in said:
        assert any(choice in str(caught.value) for choice in part.split("|")), str(caught.value)
    assert not base.adapters
    assert not base.router.order
    assert {name for name, _ in base.model.named_modules()} == modules
    assert not any(key.startswith("_graft") for module in base.model.modules() for key in vars(module))
    assert base.state().keys() == before.keys()
    assert all(torch.equal(base.state()[name], before[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
