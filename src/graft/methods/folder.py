"""Adapter folders as peft lays them out: names of tensors, targets, and what is refused."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graft.errors import DamagedError
from graft.model import Base
from graft.parts.base import Adapter
from graft.sites import Site


def copy_tensors(adapter: Adapter, tensors: Mapping[str, Tensor], source: str, prefixes: Sequence[str] = ()) -> None:
    """Copy tensors by name into an adapter; missing, extra and misshapen ones are refused, counted and named.

    With `prefixes`, only the adapter's tensors below them are expected.
    """
    own = {
        name: tensor
        for name, tensor in adapter.named_tensors(head=False)
        if not prefixes or name.startswith(tuple(prefixes))
    }
    check_tensors(own, tensors, source)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def check_tensors(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors that are missing, extra or misshapen beside an adapter's own, counted and named."""
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if missing or extra or shapes:
        faults = []
        for what, names in (
            ("missing", missing),
            ("unexpected", extra),
            ("of another shape", sorted(shapes)),
        ):
            if names:
                faults.append(f"{len(names)} {what} ({', '.join(names[:3])}{' …' if len(names) > 3 else ''})")
        raise DamagedError(
            f"{source}: of {len(own)} tensors " + ", ".join(faults),
            "the adapter was made for another base or settings",
        )


def task_path(adapter: Adapter, base: Base, path: str) -> str:
    """A module's path as peft writes it: below the task model when the adapter has a head."""
    prefix = f"{base.family.task_prefix}." if adapter.head is not None and base.family.task_prefix else ""
    return f"base_model.model.{prefix}{path}"


def base_path(base: Base, name: str) -> str:
    """The inverse of `task_path`, for names with and without the task model's prefix."""
    name = name.removeprefix("base_model.model.")
    prefix = f"{base.family.task_prefix}."
    return name.removeprefix(prefix) if len(prefix) > 1 else name


def peft_targets(adapter: Adapter, base: Base) -> list[str]:
    """`target_modules` for the adapter's sites: module names where peft would match just these, whole paths
    otherwise.
    """
    paths = {site.path for site, _ in adapter.placed}
    ends = sorted({path.rsplit(".", 1)[-1] for path in paths})
    matched = {
        path
        for path, module in base.modules_by_path.items()
        if path.rsplit(".", 1)[-1] in ends and (path in paths or "graft" not in path.split("."))
    }
    if matched == paths:
        return ends
    return sorted(task_path(adapter, base, path).removeprefix("base_model.model.") for path in paths)


def without_base_layers(tensors: Mapping[str, Tensor], base: Base, source: str) -> dict[str, Tensor]:
    """Tensors without the base's own weights, `<module path>.base_layer.weight`, that peft stores beside an adapter at
    the embeddings or the output layer. Refused where they differ from the base's.
    """
    state, own, other = base.state(), {}, []
    for name, tensor in tensors.items():
        path, found, last = base_path(base, name).rpartition(".base_layer.")
        weight = state.get(f"{path}.{last}") if found else None
        if weight is None:
            own[name] = tensor
        elif tensor.shape != weight.shape or not torch.equal(tensor.to(weight), weight):
            other.append(name)
    if other:
        raise DamagedError(
            f"{source}: {len(other)} stored tensors of the base differ from those of {base.name} (first {other[0]})",
            "load the base that it was trained on",
        )
    return own


def adapted_sites(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], marker: str, base: Base, source: str
) -> list[Site]:
    """The sites whose tensors, named `<module path>.<marker>…`, a folder of peft holds.

    Refused: a folder without such tensors, modules that the base does not have, and modules of `target_modules`
    without tensors. A regular expression there, which could run without end, is not looked into, nor are exclusions.
    """
    paths = {base_path(base, name).partition(f".{marker}")[0] for name in tensors if f".{marker}" in name}
    if not paths:
        raise DamagedError(
            f"{source}: no {marker}… among {len(tensors)} tensors", "the file is not an adapter of this type"
        )
    known = {site.path: site for site in base.sites if site.whole}
    unknown = sorted(paths - known.keys())
    if unknown:
        raise DamagedError(
            f"{source}: {len(unknown)} of {len(paths)} adapted modules are not in {base.name} (first {unknown[0]})",
            "the adapter was made for another base",
        )
    absent = _without_tensors(config, base, paths)
    if absent:
        raise DamagedError(
            f"{source}: {len(absent)} modules of target_modules have no tensors (first {absent[0]})",
            "the weights are incomplete: save the adapter again",
        )
    return [site for path, site in known.items() if path in paths]


def _without_tensors(config: Mapping[str, Any], base: Base, paths: set[str]) -> list[str]:
    """Modules in the layers that a list of `target_modules` names and that are not among the adapted `paths`."""
    names, layers = config.get("target_modules"), config.get("layers_to_transform")
    if not isinstance(names, list) or config.get("exclude_modules") or config.get("layers_pattern"):
        return []
    layers = [layers] if isinstance(layers, int) else layers or None
    ends = tuple(f".{base_path(base, str(name))}" for name in names)
    return [
        site.path
        for site in base.sites
        if site.whole and site.layer is not None and site.path not in paths
        if f".{site.path}".endswith(ends) and (layers is None or site.layer in layers)
    ]


_COMMON = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode",
    "modules_to_save",
}  # fmt: skip


def check_peft_config(
    config: Mapping[str, Any], known: set[str], source: str, neutral: Mapping[str, Sequence[Any]] | None = None
) -> None:
    """Refuse settings of a peft configuration that would change the result and are not read here.

    Keys of other versions are harmless while they are unset (null, false, empty) or have a `neutral` value.
    """
    for key, value in config.items():
        if key in known | _COMMON or not value or value in (neutral or {}).get(key, ()):
            continue
        raise DamagedError(
            f"{source}: {key} = {value!r} is not supported", "read it with peft, merge it and use the result"
        )
