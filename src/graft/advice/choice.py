"""A method and its settings, each with its reason, on the way to a recommendation."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from graft.advice.rules import RULES
from graft.methods.base import Method

Basis = Literal["measured", "rule", "planned", "default"]
"""What a setting rests on."""


@dataclass(frozen=True)
class Statement:
    """One setting and its reason."""

    setting: str
    value: Any
    reason: str
    basis: Basis
    source: str
    """A comparison.json with its rows and seeds, a paper, or what was planned."""


@dataclass
class Choice:
    """A method and its settings on the way to a recommendation."""

    method: Method
    quantization: str | None
    training: dict[str, Any] = field(default_factory=dict)
    told: dict[str, Statement] = field(default_factory=dict)

    def say(self, setting: str, value: Any, reason: str, basis: Basis, source: str) -> None:
        """Give a setting's reason, in place of an earlier one."""
        self.told[setting] = Statement(setting, value, reason, basis, source)

    def rule(self, setting: str, value: Any, name: str) -> None:
        """Give a rule as a setting's reason."""
        rule = RULES[name]
        self.say(setting, value, f"{rule.when}: {rule.says}", "rule", rule.source)

    @property
    def settings(self) -> list[str]:
        """As assignments to a recipe."""
        own = self.method.model_dump(mode="json", exclude_defaults=True)
        lines = [f"method={self.method.name}", f"quantization={as_json(self.quantization)}"]
        lines += [f"method.{key}={as_json(value)}" for key, value in own.items()]
        return lines + [f"training.{key}={as_json(value)}" for key, value in self.training.items()]


def as_json(value: Any) -> str:
    """A value as an assignment to a recipe has it."""
    return json.dumps(value)
