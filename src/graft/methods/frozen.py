"""Frozen fine-tuning: some of the base's tensors train, the others stay."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, field_validator

from graft.errors import UsageError
from graft.methods.base import Bypass, Method
from graft.model import Base
from graft.parts.base import Adapter
from graft.parts.own import own_parts
from graft.sites import layer_count


class Frozen(Method):
    """The last layers, the pooler, the norms, or what a pattern names train; the other tensors stay."""

    name: ClassVar[str] = "frozen"
    source: ClassVar[str] = "Lee et al. 2019, arXiv 1911.03090"
    unified: ClassVar[Bypass] = Bypass("(W + ΔW) x", "inputs of the last layers", "chosen tensors", "replaces h")
    peft_type: ClassVar[str] = "GRAFT_FROZEN"
    mergeable: ClassVar[bool] = True
    small: ClassVar[Mapping[str, Any]] = {"exclusive": False, "last_layers": 1}
    rate_small: ClassVar[float] = 5e-4
    rate_large: ClassVar[float] = 5e-5

    target_modules: None = Field(default=None, description="Not used: see last_layers, pooler, norms and pattern.")
    layers_to_transform: None = Field(default=None, description="Not used: see last_layers.")

    last_layers: int = Field(default=2, ge=0)
    """How many layers at the top train (of each stack, in an encoder-decoder)."""

    pooler: bool = True
    """Whether the pooler trains, where the base has one; the task head always does."""

    norms: bool = False
    """Whether all normalization layers train."""

    pattern: str | None = None
    """A regular expression; tensors whose dotted name contains it train too."""

    exclusive: bool = True
    """Train the base in place; see `full`."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern

    @property
    def in_place(self) -> bool:
        """As `exclusive` says."""
        return self.exclusive

    def build(self, base: Base, name: str) -> Adapter:
        """Parts at the modules whose tensors the settings choose."""
        prefixes = self._layers(base)
        norms = {site.path for site in base.sites if "norm." in site.role} if self.norms else set()

        def wanted(tensor: str) -> bool:
            return (
                tensor.startswith(prefixes)
                or (self.pooler and "pooler." in tensor)
                or tensor.rsplit(".", 1)[0] in norms
                or (self.pattern is not None and re.search(self.pattern, tensor) is not None)
            )

        placed = own_parts(base, wanted, self.exclusive)
        if self.pattern is not None and not any(re.search(self.pattern, name) for name in base.state()):
            raise UsageError(f"pattern {self.pattern!r} matches no tensor of {base.name}")
        return Adapter(name, self, list(placed), exclusive=self.exclusive)

    def _layers(self, base: Base) -> tuple[str, ...]:
        prefixes = []
        for stack in base.family.stacks:
            count = layer_count(base.body, stack.layers)
            if self.last_layers > count:
                raise UsageError(f"last_layers: {self.last_layers}, and {base.name} has {count} layers")
            body = f"{base.family.body}." if base.family.body else ""
            prefixes += [f"{body}{stack.layers}.{index}." for index in range(count - self.last_layers, count)]
        return tuple(prefixes)
