"""Graft: a fine-tuning workbench for pretrained language models.

The public names, imported when they are first used, so that the command line starts without PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graft.compare import compare as compare_methods
    from graft.errors import GraftError as GraftError
    from graft.export.export import export_run as export_run
    from graft.generate import generate as decode
    from graft.merge import merge_run as merge_run
    from graft.methods.base import Method as Method
    from graft.methods.base import methods as known_methods
    from graft.methods.base import read_method as read_method
    from graft.methods.store import load as load_adapter
    from graft.methods.store import save as save_adapter
    from graft.model import Base as Base
    from graft.model import load_base as load_base
    from graft.objectives.base import Objective as Objective
    from graft.parts.attach import attach as attach
    from graft.parts.attach import detach as detach
    from graft.parts.attach import hidden_states as hidden_states
    from graft.parts.attach import merge_into as merge_into
    from graft.parts.base import Adapter as Adapter
    from graft.parts.base import Part as Part
    from graft.parts.head import scores as scores
    from graft.recipe import Recipe as Recipe
    from graft.recipe import read_recipe as read_recipe
    from graft.routing import Route as Route
    from graft.run import execute as execute

__version__ = "0.1.0"

_HOMES = {
    "Adapter": ("graft.parts.base", "Adapter"),
    "Base": ("graft.model", "Base"),
    "GraftError": ("graft.errors", "GraftError"),
    "Method": ("graft.methods.base", "Method"),
    "Objective": ("graft.objectives.base", "Objective"),
    "Part": ("graft.parts.base", "Part"),
    "Recipe": ("graft.recipe", "Recipe"),
    "Route": ("graft.routing", "Route"),
    "attach": ("graft.parts.attach", "attach"),
    "compare_methods": ("graft.compare", "compare"),
    "decode": ("graft.generate", "generate"),
    "detach": ("graft.parts.attach", "detach"),
    "execute": ("graft.run", "execute"),
    "export_run": ("graft.export.export", "export_run"),
    "hidden_states": ("graft.parts.attach", "hidden_states"),
    "known_methods": ("graft.methods.base", "methods"),
    "load_adapter": ("graft.methods.store", "load"),
    "load_base": ("graft.model", "load_base"),
    "merge_into": ("graft.parts.attach", "merge_into"),
    "merge_run": ("graft.merge", "merge_run"),
    "read_method": ("graft.methods.base", "read_method"),
    "read_recipe": ("graft.recipe", "read_recipe"),
    "save_adapter": ("graft.methods.store", "save"),
    "scores": ("graft.parts.head", "scores"),
}
"""Where each public name is. None is called like a module of the package, which would take its place."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'graft' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(["__version__", *_HOMES])
