"""Strict configuration: pydantic models read from YAML and `key=value`, every fault in one message.

A setting is described once, in the docstring under its field; `--help`, the JSON schema and the
documentation are made from it.
"""

import importlib
import pkgutil
from collections.abc import Collection, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator

from graft.errors import RecipeError, nearest

_notes: ContextVar[list[str] | None] = ContextVar("graft_config_notes", default=None)


STAGES = "stages"
"""The key of a file with several recipes."""


class Config(BaseModel):
    """A strict section of a recipe: unknown keys are errors, `aliases` are accepted with a note."""

    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False)

    aliases: ClassVar[dict[str, str]] = {}
    """Spellings of other tools, mapped to the field's own name."""

    @classmethod
    def sections(cls, values: Mapping[str, Any]) -> dict[str, type["Config"]]:
        """The sections in which a bare `key=value` is looked up, for these values."""
        return {}

    default_names: ClassVar[dict[str, str]] = {}
    """For a section that is one of several classes: the class when only settings are given."""

    @model_validator(mode="before")
    @classmethod
    def _rename_aliases(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        renamed = dict(given)
        for alias, name in cls.aliases.items():
            if alias not in renamed or alias in cls.model_fields:
                continue
            if name in renamed:
                raise ValueError(f"{alias!r} and {name!r} are the same setting: give one")
            renamed[name] = renamed.pop(alias)
            notes = _notes.get()
            if notes is not None:
                notes.append(f"{alias!r} read as {name!r}")
        return renamed

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes` as true, which pydantic would take for 1."""
        wanted = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and {int, float} & {wanted, *get_args(wanted)}:
            raise ValueError("a number is needed, not true or false")
        return value

    @classmethod
    def parse(cls, given: Any, source: str = "recipe") -> Self:
        """Validate `given`; raises `RecipeError` naming every fault at once."""
        return cls.parse_with_notes(given, source)[0]

    @classmethod
    def parse_with_notes(cls, given: Any, source: str = "recipe") -> tuple[Self, list[str]]:
        """`parse`, with a note for each alias that was accepted."""
        if not isinstance(given, Mapping):
            raise RecipeError(f"{source}: expected keys and values, got {type(given).__name__}")
        outer = _notes.get()
        notes: list[str] = []
        token = _notes.set(notes)
        try:
            parsed = cls.model_validate(given)
            if outer is not None:
                outer += notes
            return parsed, notes
        except ValidationError as error:
            faults = [_fault(cls, dict(fault)) for fault in error.errors()]
            raise RecipeError(f"{source}: " + "; ".join(dict.fromkeys(faults))) from None
        finally:
            _notes.reset(token)


C = TypeVar("C", bound=Config)


def _fault(cls: type[BaseModel], fault: dict[str, Any]) -> str:
    path = [str(part) for part in fault["loc"]]
    key = ".".join(path)
    if fault["type"] == "extra_forbidden":
        owner = _section(cls, path[:-1])
        known = owner.model_fields if owner else ()
        aliases = owner.aliases if owner and issubclass(owner, Config) else ()
        return f"unknown key {key!r}, {nearest(path[-1], known, aliases)}"
    if fault["type"] == "missing":
        return f"{key!r} is missing"
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "model_type":
        message = "expected keys and values"
    shown = repr(fault["input"])
    told = not key or len(shown) > 60 or (fault["type"] == "value_error" and isinstance(fault["input"], Mapping))
    return (f"{key}: " if key else "") + message + ("" if told else f" (got {shown})")


def _section(cls: type[BaseModel], path: Sequence[str]) -> type[BaseModel] | None:
    """The config class at `path` below `cls`, looking through optional and list types."""
    current: type[BaseModel] | None = cls
    for part in path:
        if current is None:
            return None
        if part.isdigit():
            continue
        field = current.model_fields.get(part)
        current = _config_class(field.annotation) if field else None
    return current


def _config_class(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        found = _config_class(inner)
        if found:
            return found
    return None


class _Loader(yaml.SafeLoader):
    """YAML's safe subset, without duplicate keys and without anchors (which allow tiny files to grow without bound)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "anchors and aliases are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"keys are words, got {key!r}", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises `RecipeError` with the line of a fault."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder, a recipe is a YAML file") from None
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe", "see recipes/ for examples") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read as text: {error}") from None
    return parse_yaml(text, str(path))


def read_stages(path: str | Path) -> bool:
    """Whether a YAML file has stages, of which each is a recipe. What cannot be read has none: reading it as a recipe
    says why.
    """
    try:
        return STAGES in read_yaml(path)
    except RecipeError:
        return False


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """The mapping in YAML `text`; `source` names it in errors."""
    try:
        # _Loader is a SafeLoader: no tag can construct an object.
        loaded = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise RecipeError(f"{source}:{line}: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"{source}: not YAML: {str(error).splitlines()[0]}") from None
    if loaded is None:
        raise RecipeError(f"{source}: the file is empty")
    if not isinstance(loaded, dict):
        raise RecipeError(f"{source}: expected keys and values, got {type(loaded).__name__}")
    return loaded


def override(values: Mapping[str, Any], cls: type[Config], assignments: Sequence[str]) -> dict[str, Any]:
    """`values` with `key=value` assignments applied; the value is YAML.

    `key` is a dotted path (`training.seed`) or the bare name of a setting that only one section has. Whole sections
    come first, wherever they stand: `r=4 method=lora` is `method=lora r=4`.
    """
    result: dict[str, Any] = _copy(values)

    def is_part(assignment: str) -> bool:
        key = assignment.partition("=")[0]
        return cls.aliases.get(key, key) not in cls.model_fields

    for assignment in sorted(assignments, key=is_part):
        key, separator, text = assignment.partition("=")
        if not separator or not key:
            raise RecipeError(f"{assignment!r} is not key=value")
        path = key.split(".")
        if len(path) == 1:
            path = _locate(result, cls, path[0])
        try:
            value = yaml.load(text, Loader=_Loader) if text else None
        except (yaml.YAMLError, RecursionError, ValueError):
            raise RecipeError(f"{assignment!r}: the value is not YAML") from None
        target = result
        for depth, part in enumerate(path[:-1]):
            if depth == 0:
                part = next((given for given in target if cls.aliases.get(given) == part), part)
            inner = target.get(part)
            if inner is None:
                inner = {"name": cls.default_names[part]} if part in cls.default_names else {}
            if isinstance(inner, str) and part in cls.default_names:  # `method: lora` is short for `{name: lora}`
                inner = {"name": inner}
            if not isinstance(inner, Mapping):
                raise RecipeError(f"{assignment!r}: {part} is {inner!r}, which has no keys")
            target[part] = inner = dict(inner)
            target = inner
        _assign(target, _owner(result, cls, path), path[-1], value)
    return result


def _assign(target: dict[str, Any], owner: type[Config] | None, key: str, value: Any) -> None:
    """Set a key, in place of any spelling of it that is there."""
    aliases = owner.aliases if owner is not None else {}
    name = aliases.get(key, key)
    for given in [given for given in target if aliases.get(given, given) == name]:
        del target[given]
    target[key] = value  # as it was spelled: parsing notes it


def _owner(values: Mapping[str, Any], cls: type[Config], path: Sequence[str]) -> type[Config] | None:
    """The class whose field `path` ends in, as far as it is known before parsing."""
    if len(path) == 1:
        return cls
    return cls.sections(values).get(path[0]) if len(path) == 2 else None


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_copy(inner) for inner in value]
    return value


def _locate(values: Mapping[str, Any], cls: type[Config], name: str) -> list[str]:
    """The path of a bare setting name: the recipe itself, then the one section that has it."""
    if cls.aliases.get(name, name) in cls.model_fields:
        return [name]
    owners = []
    sections = cls.sections(values)
    for section, owner in sections.items():
        if name in owner.model_fields or name in owner.aliases:
            owners.append(section)
    if len(owners) == 1:
        return [owners[0], name]
    if owners:
        raise RecipeError(f"{name!r} stands in {' and '.join(owners)}: write {owners[0]}.{name}=…")
    known = set(cls.model_fields)
    aliases = set(cls.aliases)
    for owner in sections.values():
        known |= set(owner.model_fields)
        aliases |= set(owner.aliases)
    raise RecipeError(f"unknown key {name!r}, {nearest(name, known, aliases)}")


def classes_in(package: str, parent: type[C], without: Collection[str]) -> dict[str, type[C]]:
    """The subclasses of `parent` with a `name` of their own in the files of a package, by it, but for some files."""
    found: dict[str, type[C]] = {}
    folder = importlib.import_module(package).__path__
    for module in sorted(info.name for info in pkgutil.iter_modules(folder) if info.name not in without):
        for item in vars(importlib.import_module(f"{package}.{module}")).values():
            if isinstance(item, type) and issubclass(item, parent) and "name" in vars(item):
                found[item.name] = item  # type: ignore[attr-defined]
    return found


def read_choice(given: Any, parent: type[C], known: Mapping[str, type[C]], source: str) -> C:
    """One of several classes, from its name or from a mapping with `name` and settings."""
    if isinstance(given, parent):
        return given
    what = parent.__name__.lower()
    given = {"name": given} if isinstance(given, str) else given
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise RecipeError(f"{source}: {what}: give a name, or `name:` and settings, not {given!r}")
    name = given["name"]
    if name not in known:
        raise RecipeError(f"{source}: no {what} {name!r}, {nearest(name, known)}")
    settings = {key: value for key, value in given.items() if key != "name"}
    return known[name].parse(settings, f"{source}, {what} {name}")
