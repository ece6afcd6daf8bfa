"""The recipe: everything that decides a run or a comparison."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema, field_validator, model_validator

from graft.config import Config, override, parse_yaml, read_yaml
from graft.data.load import DataConfig
from graft.engine.settings import Engine
from graft.errors import RecipeError
from graft.methods.base import Method, methods, read_method
from graft.objectives.base import Objective, objectives, read_objective
from graft.train.settings import Training


def _named(value: Any) -> dict[str, Any]:
    settings: dict[str, Any] = value.model_dump(mode="json")
    return {"name": value.name} | settings


def _choice_schema(classes: Mapping[str, type[Config]]) -> dict[str, Any]:
    """Either the bare name of a class, or its name and settings."""
    forms: list[dict[str, Any]] = [{"type": "string", "enum": sorted(classes)}]
    for name, cls in classes.items():
        schema = cls.model_json_schema()
        schema["properties"] = {"name": {"const": name}} | schema.get("properties", {})
        schema["required"] = ["name", *schema.get("required", [])]
        forms.append(schema)
    return {"anyOf": forms}


def _as_fault(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`read`, so that what is wrong in it is told together with the other faults of the recipe."""

    def call(given: Any) -> Any:
        try:
            return read(given)
        except RecipeError as error:
            raise ValueError(re.sub(r"^recipe(, \w+|: \w+:|:) ", "", str(error))) from None

    return call


AnyMethod = Annotated[
    Method,
    BeforeValidator(_as_fault(read_method)),
    PlainSerializer(_named),
    WithJsonSchema(_choice_schema(methods())),
]
AnyObjective = Annotated[
    Objective,
    BeforeValidator(_as_fault(read_objective)),
    PlainSerializer(_named),
    WithJsonSchema(_choice_schema(objectives())),
]

COMPARED = ("full", "frozen", "lora", "bottleneck", "prefix", "prompt")


class Recipe(Config):
    """A model, data, an objective, a method (or several to compare) and how to train."""

    aliases: ClassVar[dict[str, str]] = {
        "base_model": "model",
        "model_name_or_path": "model",
        "dataset": "data",
        "load_in_4bit": "quantization",
        "quantization_bit": "quantization",
    }
    default_names: ClassVar[dict[str, str]] = {"method": "lora", "objective": "classify"}

    model: str = Field(min_length=1)
    """The base: a starter name, a local folder or a hub id."""

    quantization: Literal["nf4"] | None = None
    """Keep the matrices inside the base's layers in fewer bits: nf4 takes 4.13 for each weight (QLoRA). For every
    method that trains beside the base; needs bitsandbytes."""

    data: DataConfig
    """Where the rows come from."""

    objective: AnyObjective = Field(default_factory=lambda: read_objective("classify"))
    """What to optimize."""

    method: AnyMethod | None = Field(default_factory=lambda: read_method("lora"))
    """How to fine-tune, for `graft train`; null measures the untouched base."""

    methods: list[AnyMethod] = Field(default_factory=lambda: [read_method(name) for name in COMPARED], min_length=1)
    """What `graft compare` compares, beside the untouched base."""

    training: Training = Field(default_factory=Training)
    """How to train; the learning rate belongs to the method."""

    engine: Engine = Field(default_factory=Engine)
    """What makes a run fast; each piece can be switched off."""

    seed: int = Field(default=1, ge=0, lt=2**32)
    """Decides everything drawn at random: starting values, order of rows, dropout."""

    seeds: list[int] = Field(default_factory=lambda: [1], min_length=1)
    """Seeds that `graft compare` runs each method with."""

    forgetting: list[str] = Field(default_factory=lambda: ["news-editorials", "product-reviews"])
    """What to probe for forgetting: starter texts (retrieval among their sentences in classification, next-token loss
    otherwise) and, for language models, starter tasks as `task:NAME` (loss of the answers)."""

    transfer: list[str] = Field(default_factory=list)
    """Other data to evaluate on without training on them: with the same labels, or other dialogues or texts."""

    probe_samples: int | None = Field(default=None, ge=20)
    """At most this many rows of each probe and transfer set; when left out, 2,500 for classification and 200
    otherwise."""

    @model_validator(mode="before")
    @classmethod
    def _compare_what_can_be(cls, given: Any) -> Any:
        """The methods that are compared when the recipe names none are, on a quantized base, those that work there."""
        wanted = {"quantization", *(alias for alias, name in cls.aliases.items() if name == "quantization")}
        if not isinstance(given, Mapping) or "methods" in given or not any(given.get(key) for key in wanted):
            return given
        return {**given, "methods": [name for name in COMPARED if not read_method(name).in_place]}

    @field_validator("quantization", mode="before")
    @classmethod
    def _read_bits(cls, given: Any) -> Any:
        """`load_in_4bit: true`, `quantization_bit: 4` and `quantization: 4bit`, as other tools spell it."""
        if given is False:
            return None
        return "nf4" if given is True or str(given).lower() in ("4", "4bit", "4-bit", "nf4") else given

    @model_validator(mode="after")
    def _quantized_base_stays(self) -> "Recipe":
        if self.quantization is None:
            return self
        # `methods` is not looked at: `graft train` does not use it, and in a comparison each is a recipe's `method`.
        if self.method is not None and self.method.in_place:
            raise ValueError(
                f"quantization: {self.method.name} trains the base's own weights, and in {self.quantization} none can "
                "train; take another method, or leave quantization out"
            )
        if self.engine.compile is True:
            raise ValueError("engine.compile and quantization do not go together: drop one")
        return self

    @model_validator(mode="after")
    def _distinct_seeds(self) -> "Recipe":
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: one stands twice")
        return self

    @model_validator(mode="after")
    def _compiles_or_recomputes(self) -> "Recipe":
        if self.engine.compile is True and self.training.gradient_checkpointing:
            raise ValueError("engine.compile and training.gradient_checkpointing do not go together: drop one")
        return self

    @classmethod
    def sections(cls, values: Mapping[str, Any]) -> dict[str, type[Config]]:
        """The sections in which a bare `key=value` is looked up, for these values."""
        found: dict[str, type[Config]] = {"data": DataConfig, "training": Training, "engine": Engine}
        for section, known in (("method", methods()), ("objective", objectives())):
            default = cls.default_names[section]
            given = values.get(section) or default
            name = given.get("name", default) if isinstance(given, Mapping) else given
            if isinstance(name, str) and name in known:
                found[section] = known[name]
        return found

    @property
    def max_length(self) -> int:
        """Tokens per row."""
        return self.data.max_length or self.objective.max_length

    def resolved(self) -> dict[str, Any]:
        """Every setting, in the form that `parse` reads."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Every setting, as YAML."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True, width=100)


def read_recipe(
    source: str | Path | None,
    assignments: Sequence[str] = (),
    text: str | None = None,
    note: Callable[[str], None] | None = None,
) -> Recipe:
    """A recipe from a YAML file (or `text`) and `key=value` assignments; files it names are relative to where one is.

    `note` gets a line for each alias. Raises `RecipeError` naming every fault.
    """
    if source is None and text is None:
        raise RecipeError("no recipe given", "see recipes/ for examples")
    name = str(source) if source is not None else "standard input"
    values = parse_yaml(text, name) if text is not None else read_yaml(str(source))
    recipe, notes = Recipe.parse_with_notes(override(values, Recipe, assignments), name)
    for line in dict.fromkeys(notes):
        if note:
            note(line)
    return recipe
