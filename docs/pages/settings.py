"""docs/recipes.md: every setting of a recipe."""

import inspect

from pydantic import BaseModel

from graft.data.load import DataConfig
from graft.engine.settings import Engine
from graft.methods.base import methods
from graft.objectives.base import objectives
from graft.recipe import Recipe
from graft.train.settings import Training


def settings(cls: type[BaseModel]) -> str:
    """A table of a section's settings."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in cls.model_fields.items():
        if field.description and field.description.startswith("Not used"):
            continue
        default = "required" if field.is_required() else f"`{field.default}`" if field.default_factory is None else "…"
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {default} | {meaning} |")
    return "\n".join(lines)


def recipe_page() -> str:
    """docs/recipes.md."""
    parts = [
        "# Recipes",
        "A recipe is a YAML file; `graft schema` prints its JSON schema, which editors can check against. On the command line"
        " `key=value` replaces a setting: by its bare name where only one section has it, by `section.key` otherwise. Spellings of"
        " other tools (`lr`, `epochs`, `rank`, `batch_size`, …) are read too.",
        "This page is written by `make docs`.",
        "## The recipe",
        settings(Recipe),
        "## data",
        settings(DataConfig),
        "## training",
        settings(Training),
        "## engine",
        inspect.getdoc(Engine) or "",
        settings(Engine),
    ]
    for name, objective in objectives().items():
        parts += [f"## objective: {name}", inspect.getdoc(objective) or "", settings(objective)]
    for name, method in methods().items():
        parts += [f"## method: {name}", inspect.getdoc(method) or "", settings(method)]
    return "\n\n".join(parts) + "\n"
