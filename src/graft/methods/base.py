"""What a method is: a configuration that builds an adapter. One subclass, in a file of its own, per method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from graft.config import Config, classes_in, read_choice
from graft.errors import DamagedError, UsageError
from graft.model import Base
from graft.parts.base import Adapter, Part
from graft.sites import Site


@dataclass(frozen=True)
class Bypass:
    """A method's row in the unified view of He et al. (2022, arXiv 2110.04366)."""

    function: str
    sees: str
    changes: str
    composition: str


class Method(Config):
    """A fine-tuning method and its settings.

    Subclasses set the class variables and `part` (or `build`, when parts share something).
    """

    name: ClassVar[str]
    unified: ClassVar[Bypass]
    source: ClassVar[str]
    """The paper."""
    peft_type: ClassVar[str]
    """The type in `adapter_config.json`; GRAFT_… where peft has no such method."""
    mergeable: ClassVar[bool] = False
    head_prefix: ClassVar[str] = "base_model.model."
    """What peft puts before the names of a task head's tensors."""
    rate_small: ClassVar[float]
    """Default peak learning rate for a base under 100 M parameters, from the sweep in docs/log.md."""
    rate_large: ClassVar[float]
    """Default peak learning rate for larger bases."""

    aliases: ClassVar[dict[str, str]] = {"lr": "learning_rate"}

    learning_rate: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    """Peak learning rate; when left out, this method's own default for the size of the base."""

    target_modules: list[str] | None = Field(default=None, min_length=1)
    """Sites by role (attn.q, mlp.down, attention), by name (layers.3.attn.q), by PEFT's module names
    (q_proj, query), or all-linear.
    """

    layers_to_transform: list[int] | None = Field(default=None, min_length=1)
    """Only these layers, counted from 0; all when left out."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _one_target(cls, given: Any) -> Any:
        """`target_modules: all-linear` without a list, as peft's users write it."""
        return [given] if isinstance(given, str) else given

    @property
    def in_place(self) -> bool:
        """Whether the base's own tensors train."""
        return False

    def build(self, base: Base, name: str) -> Adapter:
        """A new adapter for `base`, not attached yet. The default puts `part(site)` at each chosen site."""
        placed = [(site, self.part(site)) for site in self.chosen(base)]
        return Adapter(name, self, placed)

    def part(self, site: Site) -> Part:
        """The part for one site."""
        raise NotImplementedError

    def default_targets(self, base: Base) -> list[str]:
        """The sites used when `target_modules` is left out."""
        raise NotImplementedError

    def accepts(self, site: Site) -> bool:
        """Whether this method can sit at a site."""
        return True

    def chosen(self, base: Base) -> list[Site]:
        """The sites that the settings name on this base."""
        patterns = self.target_modules or self.default_targets(base)
        sites = base.select(patterns)
        fitting = [site for site in sites if self.accepts(site)]
        if not fitting:
            raise UsageError(
                f"{self.name} cannot sit at {sites[0].role!r}", f"its default is {self.default_targets(base)}"
            )
        if self.layers_to_transform is None:
            return fitting
        layers = {site.layer for site in base.sites if site.layer is not None}
        outside = [layer for layer in self.layers_to_transform if layer not in layers]
        if outside:
            raise UsageError(f"layers_to_transform: no layer {outside[0]}, the base has 0 to {max(layers)}")
        return [site for site in fitting if site.layer in self.layers_to_transform]

    def rate(self, base: Base) -> float:
        """The peak learning rate to use on this base."""
        if self.learning_rate is not None:
            return self.learning_rate
        return self.rate_small if base.parameter_count() < 100_000_000 else self.rate_large

    def settings(self) -> dict[str, Any]:
        """What an adapter folder keeps: every setting but the learning rate."""
        return self.model_dump(mode="json", exclude={"learning_rate"})

    def folded(self) -> "Method":
        """The method of a saved adapter, where saving drops what only training needs."""
        return self

    def to_folder(self, adapter: Adapter, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """`adapter_config.json` and tensors (without the head) as they are stored."""
        tensors = {name: tensor.detach() for name, tensor in adapter.named_tensors(head=False)}
        return {"peft_type": self.peft_type}, tensors

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, source: str) -> "Method":
        """The method of a folder that peft wrote, without Graft's own settings; errors name `source`."""
        raise DamagedError(
            f"{source}: graft.json is missing, so the settings of {cls.name} are not known",
            "copy the whole folder again",
        )

    def load(self, adapter: Adapter, base: Base, tensors: Mapping[str, Tensor], source: str) -> None:
        """Put stored tensors (without the head) into a built adapter."""
        copy_tensors(adapter, tensors, source)


def copy_tensors(adapter: Adapter, tensors: Mapping[str, Tensor], source: str, prefixes: Sequence[str] = ()) -> None:
    """Copy tensors by name into an adapter; missing, extra and misshapen ones are refused, counted and named.

    With `prefixes`, only the adapter's tensors below them are expected.
    """
    own = {
        name: tensor
        for name, tensor in adapter.named_tensors(head=False)
        if not prefixes or name.startswith(tuple(prefixes))
    }
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
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def method_of(adapter: Adapter) -> Method:
    """The method that built an adapter."""
    if not isinstance(adapter.method, Method):
        raise UsageError(f"adapter {adapter.name!r} was not built by a method")
    return adapter.method


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


_PEFT_COMMON = {
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
        if key in known | _PEFT_COMMON or not value or value in (neutral or {}).get(key, ()):
            continue
        raise DamagedError(
            f"{source}: {key} = {value!r} is not supported", "read it with peft, merge it and use the result"
        )


def methods() -> dict[str, type[Method]]:
    """Every method, by name: the classes in the files of this folder."""
    return classes_in("graft.methods", Method, {"base", "store", "table"})


def read_method(given: Any, source: str = "recipe") -> Method:
    """A method from its name or from a mapping with `name` and settings."""
    return read_choice(given, Method, methods(), source)
