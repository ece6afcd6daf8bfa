"""Recipes: bad settings, round trips, the recipes of this repository, and the schema."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from graft.config import parse_yaml, read_stages
from graft.data.load import DataConfig
from graft.errors import RecipeError
from graft.methods.base import methods
from graft.objectives.base import objectives
from graft.recipe import COMPARED, Recipe, read_recipe
from graft.train.settings import Training

RECIPES = sorted(path for path in (Path(__file__).parents[1] / "recipes").glob("*.yaml") if not read_stages(path))
LEAST = {"model": "m", "data": {"train": "x.jsonl"}}
TEXT = "model: m\ndata: {train: x.jsonl}\n"


def fault(text: str = TEXT, *assignments: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read_recipe(None, assignments, text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read(*assignments: str, text: str = TEXT) -> Recipe:
    return read_recipe(None, assignments, text)


# Defaults and round trips -------------------------------------------------------------------------


def test_least_recipe():
    recipe = Recipe.parse(LEAST)
    assert recipe.method is not None
    assert recipe.method.name == "lora"
    assert [method.name for method in recipe.methods] == list(COMPARED)
    assert set(COMPARED) < set(methods())
    assert (recipe.objective.name, recipe.seed, recipe.seeds) == ("classify", 1, [1])


@pytest.mark.parametrize("name", methods())
def test_round_trip_of_every_method(name):
    recipe = Recipe.parse(LEAST | {"method": name, "methods": [name], "seeds": [3, 1]})
    again = Recipe.parse(parse_yaml(recipe.to_yaml(), "again"))
    assert again == recipe
    assert type(again.method) is type(recipe.method)
    assert again.resolved() == recipe.resolved() == parse_yaml(recipe.to_yaml(), "again")


def test_round_trip_of_awkward_values():
    given = {
        "model": "/tmp/ü x/100% 'm': #1",
        "data": {"train": "2024-01-01", "columns": {"text": "yes", "label": "1e-4"}, "val_size": 1e-05},
        "method": {"name": "lora", "lora_alpha": 1e22, "learning_rate": 3e-7, "target_modules": ["1", "null", "~"]},
        "training": {"max_steps": 3, "num_train_epochs": 0.1},
        "transfer": ["- a", "b: c", "\u2028", "x" * 300],
    }
    recipe = Recipe.parse(given)
    again = Recipe.parse(parse_yaml(recipe.to_yaml(), "again"))
    assert again == recipe
    assert again.resolved() == parse_yaml(recipe.to_yaml(), "again")
    for key in ("model", "transfer"):
        assert again.resolved()[key] == given[key]


def test_no_method_measures_the_base():
    recipe = read("method=null")
    assert recipe.method is None
    assert Recipe.parse(parse_yaml(recipe.to_yaml(), "again")).method is None


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_of_the_repository(path):
    recipe = read_recipe(path)
    assert Recipe.parse(parse_yaml(recipe.to_yaml(), "again")) == recipe
    compared = {
        "all-methods.yaml": set(methods()),
        "demo-chat.yaml": {"lora"},
        "family-methods.yaml": {"full", "lora", "prefix", "bottleneck", "dora"},
    }
    assert {method.name for method in recipe.methods} == compared.get(path.name, set(COMPARED))


def test_there_are_recipes():
    assert {path.name for path in RECIPES} >= {
        "demo.yaml",
        "movie-reviews.yaml",
        "all-methods.yaml",
        "instruct.yaml",
        "demo-chat.yaml",
    }


# Faults (C1, C2, C3) ------------------------------------------------------------------------------


def test_every_fault_of_every_section_is_in_one_message():
    message = fault(
        "model: m\n"
        "data: {train: x, max_lenght: 64}\n"
        "method: {name: lora, r: 0, lora_dropout: 1.0, rnak: 3}\n"
        "methods: [lora, {name: prefix, r: 3}, lorra]\n"
        "objective: {name: classify, pool: mean}\n"
        "training: {epohs: 3, warmup_ratio: 2}\n"
        "seed: -1\n"
        "sede: 1\n"
    )
    for part in (
        "standard input: ",
        "unknown key 'data.max_lenght', did you mean 'max_length'?",
        "method: lora: r: Input should be greater than or equal to 1 (got 0)",
        "lora_dropout: Input should be less than 1 (got 1.0)",
        "unknown key 'rnak', did you mean 'rank'?",
        "methods.1: prefix: unknown key 'r', known: encoder_hidden_size",
        "methods.2: no method 'lorra', did you mean 'lora'?",
        "objective: classify: unknown key 'pool', did you mean 'pooling'?",
        "unknown key 'training.epohs', did you mean 'epochs'?",
        "training.warmup_ratio: Input should be less than 1 (got 2)",
        "seed: Input should be greater than or equal to 0 (got -1)",
        "unknown key 'sede', did you mean 'seed'?",
    ):
        assert part in message


def test_missing_keys():
    assert fault("seed: 1\n") == "standard input: 'model' is missing; 'data' is missing"
    assert "'data.train' is missing" in fault("model: m\ndata: {}\n")


@pytest.mark.parametrize(
    ("assignment", "what"),
    [
        # C1
        ("method=lorra", "method: no method 'lorra', did you mean 'lora'?"),
        ("method=3", "method: give a name, or `name:` and settings, not 3"),
        ("method=yes", "method: give a name, or `name:` and settings, not True"),
        ("method={r: 3}", "method: give a name, or `name:` and settings, not {'r': 3}"),
        ("methods=[lora, {rank: 3}]", "methods.1: give a name"),
        ("methods=lora", "methods: Input should be a valid list (got 'lora')"),
        ("methods=[]", "methods: List should have at least 1 item"),
        ("method={name: prompt, r: 8}", "method: prompt: unknown key 'r', known: layers_to_transform, learning_rate"),
        ("num_virtual_tokens=3", "unknown key 'num_virtual_tokens', "),  # the recipe's method is lora
        ("objective=clasify", "objective: no objective 'clasify', did you mean 'classify'?"),
        ("objective=null", "objective: give a name"),
        ("training=fast", "training: expected keys and values (got 'fast')"),
        ("data=x.jsonl", "data: expected keys and values (got 'x.jsonl')"),
        # C2
        ("learning_rate=2e-4x", "learning_rate: Input should be a valid number"),
        ("learning_rate=[1e-4]", "learning_rate: Input should be a valid number"),
        ("learning_rate=yes", "learning_rate: a number is needed, not true or false"),
        ("r=yes", "r: a number is needed, not true or false"),
        ("r=[8]", "r: Input should be a valid integer"),
        ("r=2.5", "r: Input should be a valid integer"),
        ("epochs=on", "num_train_epochs: a number is needed, not true or false"),
        ("gradient_checkpointing=3", "gradient_checkpointing: Input should be a valid boolean"),
        ("lr_scheduler_type=poly", "lr_scheduler_type: Input should be 'linear', 'cosine' or 'constant'"),
        ("precision=fp16", "precision: Input should be 'auto', 'bf16' or 'fp32'"),
        ("model=no", "model: Input should be a valid string"),
        ("model=''", "model: String should have at least 1 character"),
        # C3
        ("learning_rate=0", "learning_rate: Input should be greater than 0"),
        ("learning_rate=-1e-4", "learning_rate: Input should be greater than 0"),
        ("learning_rate=5", "learning_rate: Input should be less than or equal to 1"),
        ("learning_rate=.nan", "learning_rate: Input should be a finite number"),
        ("learning_rate=.inf", "learning_rate: Input should be a finite number"),
        ("r=0", "r: Input should be greater than or equal to 1"),
        ("r=-8", "r: Input should be greater than or equal to 1"),
        ("lora_alpha=0", "lora_alpha: Input should be greater than 0"),
        ("lora_alpha=.inf", "lora_alpha: Input should be a finite number"),
        ("lora_dropout=1.0", "lora_dropout: Input should be less than 1"),
        ("target_modules=[]", "target_modules: List should have at least 1 item"),
        ("target_modules=3", "target_modules: Input should be a valid list"),
        ("layers_to_transform=[]", "layers_to_transform: List should have at least 1 item"),
        ("batch_size=0", "per_device_train_batch_size: Input should be greater than or equal to 1"),
        ("gradient_accumulation_steps=0", "gradient_accumulation_steps: Input should be greater than or equal to 1"),
        ("max_steps=0", "max_steps: Input should be greater than or equal to 1"),
        ("epochs=0", "num_train_epochs: Input should be greater than 0"),
        ("epochs=1e9", "num_train_epochs: Input should be less than or equal to 10000"),
        ("warmup_ratio=1", "warmup_ratio: Input should be less than 1"),
        ("max_grad_norm=.inf", "max_grad_norm: Input should be a finite number"),
        ("max_grad_norm=0", "max_grad_norm: Input should be greater than 0"),
        ("eval_steps=0", "eval_steps: Input should be greater than or equal to 1"),
        ("head_dropout=1", "head_dropout: Input should be less than 1"),
        ("max_length=3", "max_length: Input should be greater than or equal to 4"),
        ("val_size=0", "val_size: Input should be greater than 0"),
        ("val_size=0.9", "their sum has to be below 1"),
        ("columns={txt: a}", "columns: unknown field 'txt', did you mean 'text'?"),
        ("seed=-1", "seed: Input should be greater than or equal to 0"),
        ("seed=4294967296", "seed: Input should be less than 4294967296"),
        ("seeds=[1, 1]", "seeds: one stands twice"),
        ("seeds=[]", "seeds: List should have at least 1 item"),
        ("probe_samples=0", "probe_samples: Input should be greater than or equal to 20"),
    ],
)
def test_bad_setting(assignment, what):
    assert what in fault(TEXT, assignment)


def test_no_recipe():
    with pytest.raises(RecipeError, match="no recipe given; see recipes/ for examples"):
        read_recipe(None)


# Other tools' spellings and overrides -------------------------------------------------------------


def test_every_alias_names_a_setting_and_hides_none():
    classes: list[Any] = [Recipe, DataConfig, Training, *methods().values(), *objectives().values()]
    count = 0
    for cls in classes:
        for alias, name in cls.aliases.items():
            assert name in cls.model_fields
            assert alias not in cls.model_fields
            count += 1
    assert count > 25


def test_spellings_that_users_know():
    """As axolotl, LLaMA-Factory, transformers and peft call these settings."""
    known = (
        "lr num_epochs epochs micro_batch_size batch_size max_seq_length cutoff_len sequence_len rank lora_rank lora_r"
        " alpha dropout lora_target sites val_set_size val_split base_model model_name_or_path bf16"
    )
    classes: list[Any] = [Recipe, DataConfig, Training, *methods().values()]
    assert set(known.split()) <= {alias for cls in classes for alias in cls.aliases}


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("epochs=3", "training.num_train_epochs", 3.0),
        ("training.num_epochs=3", "training.num_train_epochs", 3.0),
        ("num_train_epochs=3", "training.num_train_epochs", 3.0),
        ("micro_batch_size=4", "training.per_device_train_batch_size", 4),
        ("bf16=true", "training.precision", "bf16"),
        ("bf16=false", "training.precision", "fp32"),
        ("cutoff_len=64", "data.max_length", 64),
        ("data.max_seq_length=64", "data.max_length", 64),
        ("lora_rank=4", "method.r", 4),
        ("method.rank=4", "method.r", 4),
        ("lr=1e-4", "method.learning_rate", 1e-4),
        ("learning_rate=1e-4", "method.learning_rate", 1e-4),
        ("sites=[attn.q]", "method.target_modules", ["attn.q"]),
        ("pooling=mean", "objective.pooling", "mean"),
        ("base_model=x", "model", "x"),
        ("seed=7", "seed", 7),
        ("seeds=[1, 2]", "seeds", [1, 2]),
    ],
)
def test_override_by_name_path_or_alias(assignment, path, value):
    found: Any = read(assignment).resolved()
    for part in path.split("."):
        found = found[part]
    assert found == value
    assert read().resolved() != read(assignment).resolved()


def test_override_knows_the_method_chosen_before_it():
    assert read("method=prefix", "num_virtual_tokens=3").resolved()["method"]["num_virtual_tokens"] == 3
    assert read("num_virtual_tokens=3", text=TEXT + "method: prompt\n").method.num_virtual_tokens == 3
    assert "unknown key 'r'" in fault(TEXT, "method=prefix", "r=3")


def test_override_replaces_the_recipes_spelling():
    text = TEXT + "training: {epochs: 5}\nmethod: {name: lora, rank: 2}\n"
    recipe = read("num_train_epochs=1", "alpha=3", "lora_r=4", text=text)
    assert recipe.training.num_train_epochs == 1
    assert (recipe.method.r, recipe.method.lora_alpha) == (4, 3)
    assert read("data.max_length=9", text="model: m\ndataset: {train: x}\n").data.max_length == 9


def test_notes_of_all_sections():
    notes: list[str] = []
    text = "base_model: m\ndataset: {train: x, cutoff_len: 9}\nmethod: {name: lora, rank: 2}\n"
    read_recipe(None, ["lr=1e-4", "epochs=1"], text, notes.append)
    assert sorted(notes) == [
        "'base_model' read as 'model'",
        "'cutoff_len' read as 'max_length'",
        "'dataset' read as 'data'",
        "'epochs' read as 'num_train_epochs'",
        "'lr' read as 'learning_rate'",
        "'rank' read as 'r'",
    ]
    notes.clear()
    read_recipe(None, ["learning_rate=1e-4"], TEXT, notes.append)
    assert notes == []


@pytest.mark.parametrize(
    "text",
    [
        "training: {epochs: 1, num_train_epochs: 1}",
        "training: {bf16: true, precision: fp32}",
        "method: {name: lora, rank: 3, r: 3}",
        "data: {train: x, val_split: 0.1, val_size: 0.1}",
    ],
)
def test_setting_given_under_two_names(text):
    message = fault("model: m\n" + ("" if text.startswith("data") else "data: {train: x}\n") + text + "\n")
    assert "are the same setting: give one" in message


# The schema ---------------------------------------------------------------------------------------

SCHEMA = Recipe.model_json_schema()
KINDS = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}


def resolve(schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    return schema


def fits(schema: dict[str, Any], value: Any) -> list[str]:
    """Faults of a value: the part of JSON Schema that recipes use; any other keyword fails the test."""
    schema = resolve(schema)
    known = (
        "type properties required additionalProperties items anyOf enum const default description title minLength"
        " minItems minimum maximum exclusiveMinimum exclusiveMaximum multipleOf $defs"
    )
    assert set(schema) <= set(known.split()), set(schema) - set(known.split())
    if "anyOf" in schema:
        tries = [fits(inner, value) for inner in schema["anyOf"]]
        return [] if [] in tries else ["none of: " + " / ".join(map(str, tries))]
    found = []
    kind = schema.get("type")
    if "const" in schema and value != schema["const"]:
        found.append(f"{value!r} is not {schema['const']!r}")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{value!r} is not among {schema['enum']}")
    if kind in KINDS and (not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return [f"{value!r} is no {kind}"]
    if kind in ("number", "integer"):
        for word, wrong in (
            ("minimum", lambda limit: value < limit),
            ("maximum", lambda limit: value > limit),
            ("multipleOf", lambda unit: value % unit),
            ("exclusiveMinimum", lambda limit: value <= limit),
            ("exclusiveMaximum", lambda limit: value >= limit),
        ):
            if word in schema and wrong(schema[word]):
                found.append(f"{value} against {word} {schema[word]}")
    if kind == "string" and len(value) < schema.get("minLength", 0):
        found.append("too short")
    if kind == "array":
        if not isinstance(value, list) or len(value) < schema.get("minItems", 0):
            return [f"{value!r} is no list of enough items"]
        found += [f"{index}: {text}" for index, item in enumerate(value) for text in fits(schema["items"], item)]
    if kind == "object":
        if not isinstance(value, dict):
            return [f"{value!r} is no object"]
        properties = schema.get("properties", {})
        found += [f"{key} is missing" for key in schema.get("required", []) if key not in value]
        for key, inner in value.items():
            more = schema.get("additionalProperties", True)
            if key in properties:
                found += [f"{key}: {text}" for text in fits(properties[key], inner)]
            elif more is False:
                found.append(f"{key} is unknown")
            elif isinstance(more, dict):
                found += [f"{key}: {text}" for text in fits(more, inner)]
    return found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_schema_accepts_the_recipes(path):
    assert fits(SCHEMA, yaml.safe_load(path.read_text("utf-8"))) == []
    assert fits(SCHEMA, read_recipe(path).resolved()) == []


@pytest.mark.parametrize("name", methods())
def test_schema_accepts_every_method(name):
    assert fits(SCHEMA, LEAST | {"method": name}) == []
    assert fits(SCHEMA, Recipe.parse(LEAST | {"method": name}).resolved()) == []


@pytest.mark.parametrize(
    "more",
    [
        {"sede": 1},
        {"method": "lorra"},
        {"method": {"name": "lora", "r": 0}},
        {"method": {"name": "lora", "num_virtual_tokens": 3}},
        {"methods": []},
        {"methods": [{"r": 3}]},
        {"training": {"warmup_ratio": 1}},
        {"training": {"lr_scheduler_type": "poly"}},
        {"training": {"max_steps": 1.5}},
        {"seed": True},
        {"data": {"max_length": 64}},
        {"objective": {"name": "classify", "pooling": "max"}},
    ],
)
def test_schema_refuses_what_parsing_refuses(more):
    assert fits(SCHEMA, LEAST | more) != []
    with pytest.raises(RecipeError):
        Recipe.parse(LEAST | more)


def described(schema: dict[str, Any], cls: type[BaseModel]) -> int:
    """Assert that each field of a section is in its schema with the text under the field."""
    for name, field in cls.model_fields.items():
        text = schema["properties"][name].get("description", "")
        assert field.description, f"{cls.__name__}.{name} has no docstring"
        assert text == field.description, f"{cls.__name__}.{name}"
        assert re.search(r"[.:)]$", text.strip()), f"{cls.__name__}.{name}: {text!r}"
    assert schema["additionalProperties"] is False
    return len(cls.model_fields)


def test_every_setting_is_in_the_schema_with_its_description():
    count = described(SCHEMA, Recipe)
    count += described(SCHEMA["$defs"]["Training"], Training)
    count += described(SCHEMA["$defs"]["DataConfig"], DataConfig)
    choices = SCHEMA["properties"]["methods"]["items"]["anyOf"]
    assert choices[0]["enum"] == sorted(methods())
    by_name = {choice["properties"]["name"]["const"]: choice for choice in choices[1:]}
    assert by_name.keys() == methods().keys()
    for name, cls in methods().items():
        count += described(by_name[name], cls)
    choices = SCHEMA["properties"]["objective"]["anyOf"]
    for choice in choices[1:]:
        count += described(choice, objectives()[choice["properties"]["name"]["const"]])
    assert count > 70
    json.dumps(SCHEMA)


@pytest.mark.parametrize("order", [["r=4", "method=lora"], ["method=lora", "r=4"], ["method.r=4", "method=lora"]])
def test_whole_sections_come_before_settings_in_them(order):
    assert read_recipe(None, order, text="model: m\ndata: {train: x}\nmethod: prefix\n").method.r == 4


def test_a_list_is_no_method():
    with pytest.raises(RecipeError, match="give a name"):
        read_recipe(None, ["method=[lora]"], text="model: m\ndata: {train: x}\n")


def test_the_nearest_name_is_one_of_other_case():
    with pytest.raises(RecipeError, match="did you mean 'lora'"):
        read_recipe(None, ["method=LoRA"], text="model: m\ndata: {train: x}\n")
