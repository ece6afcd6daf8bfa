"""Recipes and adapter folders made at random: each is read, or refused by name, and nothing else happens."""

import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.errors import GraftError, RecipeError
from graft.methods import store
from graft.methods.base import read_method
from graft.model import Base, load_base
from graft.parts.attach import attach, detach
from graft.recipe import read_recipe

KEYS = ("model", "data", "method", "methods", "training", "objective", "seed", "seeds", "engine", "quantization")
INNER = (*KEYS, "name", "r")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["lora", "dpo"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(INNER), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def _read(text: str, seen: Counter[str]) -> None:
    try:
        read_recipe(None, (), text)
        seen["read"] += 1
    except RecipeError as error:
        seen["refused" if str(error).startswith("standard input") else "nameless"] += 1


def test_any_text_is_read_or_refused():
    seen: Counter[str] = Counter()

    @settings(max_examples=150, derandomize=True, deadline=None, database=None)
    @given(st.text(max_size=60))
    def hold(text: str) -> None:
        _read(text, seen)

    hold()
    assert seen["refused"] >= 100
    assert not seen["nameless"]


def test_any_values_are_read_or_refused():
    seen: Counter[str] = Counter()

    @settings(max_examples=150, derandomize=True, deadline=None, database=None)
    @given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6))
    def hold(values: dict[str, object]) -> None:
        _read(yaml.safe_dump({"model": "m", "data": {"train": "t.jsonl"}} | values), seen)

    hold()
    assert seen.total() >= 100
    assert seen["refused"] >= 50
    assert not seen["nameless"]


def _adapter(folder: Path) -> tuple[Base, Path]:
    base = load_base(str(tiny.write_model(folder / "model")))
    adapter = read_method({"name": "lora", "r": 2}, "m").build(base, "a")
    attach(base, adapter)
    store.save(adapter, base, folder / "a")
    detach(base, "a")
    return base, folder / "a"


def _load(base: Base, folder: Path, seen: Counter[str]) -> None:
    """Whatever a folder holds, it is loaded, or refused by an error of ours."""
    try:
        store.load(base, folder, "a")
        detach(base, "a")
        seen["read"] += 1
    except GraftError as error:
        seen["refused" if error.exit_code in (2, 5) else "nameless"] += 1


def test_any_header_of_tensors_is_read_or_refused(tmp_path):
    base, folder = _adapter(tmp_path)
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    seen: Counter[str] = Counter()
    fields = st.fixed_dictionaries({}, optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "F8_E4M3", "BOOL", "Q", "", 3]),
        "shape": st.lists(st.integers(-2, 2**64), max_size=3) | VALUES,
        "data_offsets": st.lists(st.integers(-4, 2**64), max_size=3) | VALUES,
    })  # fmt: skip

    @settings(max_examples=100, derandomize=True, deadline=None, database=None)
    @given(st.sampled_from(sorted(header)), fields | VALUES, st.none() | st.integers(0, 2**64 - 1))
    def hold(name: str, changed: Any, stated: int | None) -> None:
        entry = header[name] | changed if isinstance(changed, dict) else changed
        text = json.dumps(header | {name: entry}).encode()
        path.write_bytes(struct.pack("<Q", len(text) if stated is None else stated) + text + body)
        _load(base, folder, seen)

    hold()
    assert seen["refused"] >= 60
    assert not seen["nameless"]


@pytest.mark.parametrize("name", ["adapter_config.json", "graft.json", "of peft"])
def test_any_settings_of_an_adapter_are_read_or_refused(tmp_path, name):
    base, folder = _adapter(tmp_path)
    if name == "of peft":
        (folder / "graft.json").unlink()
    path = folder / ("adapter_config.json" if name == "of peft" else name)
    whole = json.loads(path.read_text())
    seen: Counter[str] = Counter()

    @settings(max_examples=60, derandomize=True, deadline=None, database=None)
    @given(st.dictionaries(st.sampled_from(sorted(whole)), VALUES, min_size=1, max_size=2))
    def hold(changed: dict[str, Any]) -> None:
        path.write_text(json.dumps(whole | changed))
        _load(base, folder, seen)

    hold()
    assert seen.total() >= 40
    assert not seen["nameless"]
