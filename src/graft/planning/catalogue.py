"""Shapes of known models: what a plan needs of a model, without its weights and without a network.

`shapes.json` holds, by name, the arguments of the model's transformers configuration, its exact number of parameters
as Graft loads it (encoders with their pooler and without a language-model head, tied weights once), the number that
was published for it, and where.
"""

import copy
import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

from graft import assets
from graft.errors import GraftError, ModelError, nearest
from graft.families import FAMILIES
from graft.model import family_of, locate

_CLASSES = {"encoder": AutoModel, "decoder": AutoModelForCausalLM, "encoder-decoder": AutoModelForSeq2SeqLM}
"""What `load_base` loads, by the family's kind."""


@dataclass(frozen=True)
class Entry:
    """A model of the catalogue."""

    name: str
    model_type: str
    """transformers' name of the architecture."""
    config: dict[str, Any]
    """Arguments of that architecture's configuration class."""
    parameters: int
    """Exact number, as Graft loads the model."""
    published: str
    """The number as its source prints it, such as `6.7B`."""
    source: str
    aliases: tuple[str, ...] = ()
    """Other names, hub ids among them."""


@lru_cache(maxsize=1)
def entries() -> dict[str, Entry]:
    """All models of the catalogue by name."""
    table = json.loads((files("graft.planning") / "shapes.json").read_text(encoding="utf-8"))
    return {name: Entry(name, **values | {"aliases": tuple(values["aliases"])}) for name, values in table.items()}


def find(name: str) -> Entry | None:
    """The model of a name or alias, in upper or lower case; None for an unknown one."""
    return _by_any_name().get(name.lower())


@lru_cache(maxsize=1)
def _by_any_name() -> dict[str, Entry]:
    return {other.lower(): entry for entry in entries().values() for other in (entry.name, *entry.aliases)}


def config_of(name: str) -> PretrainedConfig:
    """The configuration of a model: its own, where a starter or folder of that name is on this machine, since that is
    what a run would load; else the catalogue's; else the hub's. A folder needs no weights.

    Raises `ModelError` for an unknown or damaged one, `ResourceError` when the hub cannot be reached.
    """
    path = Path(name).expanduser()
    starter = name in assets.ASSETS and assets.ASSETS[name].kind == "model"
    entry = find(name)
    if starter and assets.is_pulled(name):
        return _located(name)
    if name and path.is_dir() and not starter:
        return _of_folder(name, path)
    if entry is not None:
        config: PretrainedConfig = AutoConfig.for_model(entry.model_type, **copy.deepcopy(entry.config))
        return config
    hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not name or not (starter or hub or path.exists()):
        raise ModelError(f"no model, folder or .gguf file is called {name!r}", _instead_of(name))
    return _located(name)


def _located(name: str) -> PretrainedConfig:
    """The configuration of a starter, a GGUF file or a hub id, with the errors that loading it has."""
    try:
        family_of(name)
        config: PretrainedConfig = AutoConfig.from_pretrained(locate(name), trust_remote_code=False)
        return config
    except GraftError as error:
        near = _instead_of(name)
        if near == _SOME or Path(name).expanduser().exists():
            raise
        raise type(error)(error.message, near) from None


def _of_folder(name: str, path: Path) -> PretrainedConfig:
    if (path / "adapter_config.json").exists():
        raise ModelError(f"{name} is an adapter, not a base model", "give the base that it was trained on")
    if not (path / "config.json").is_file():
        raise ModelError(f"{name}: config.json is missing", "give a model's folder, or its name in the catalogue")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # whatever a class makes of odd values: type, value, key and its own errors
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ModelError(f"{name}: config.json cannot be read ({said})", "fetch the model again") from error
    _kind_of(config, name)
    return config


_SOME = "known are names such as llama-2-7b, qwen2.5-0.5b and bert-base, and hub ids (owner/model)"


def _instead_of(name: str) -> str:
    """The nearest name, or hub id for one with an owner; some names where none is near."""
    owned = "/" in name
    names = [other for entry in entries().values() for other in (entry.name, *entry.aliases) if ("/" in other) == owned]
    said = nearest(name if owned else name.lower(), names)
    return said if said.startswith("did you mean") else _SOME


def _kind_of(config: PretrainedConfig, name: str) -> str:
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"{name}: architecture {config.model_type!r} is not known", nearest(config.model_type, FAMILIES)
        )
    return FAMILIES[config.model_type].kind


def skeleton(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a configuration without its numbers, on the device "meta", in evaluation mode: the class that
    `load_base` loads, tied weights tied. 70 billion parameters take a second, since nothing is initialized.

    `config` stays as it is. Raises `ModelError` for an architecture that Graft does not know.
    """
    factory = _CLASSES[_kind_of(config, config.name_or_path or "this configuration")]
    with torch.device("meta"):
        model: PreTrainedModel = factory.from_config(copy.deepcopy(config), dtype=dtype)
    model.eval()
    return model
