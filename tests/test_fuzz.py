"""Recipes made at random: each is read, or refused as a recipe, and nothing else happens."""

from collections import Counter

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.errors import RecipeError
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
