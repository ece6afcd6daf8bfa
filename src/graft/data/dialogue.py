"""What rows of language data are: dialogues, preferences and graded answers, whatever format they came in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `content` is the text alone, never a template's markers."""

    role: Role
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """Calls of an assistant's turn, each `{"type": "function", "function": {"name", "arguments"}}`."""
    name: str | None = None
    """The tool that answers, in a tool's turn."""
    tool_call_id: str | None = None
    """The call that a tool's turn answers."""
    train: bool | None = None
    """Whether the file asks for loss on this turn; None leaves it to the recipe."""

    def as_dict(self) -> dict[str, Any]:
        """As chat templates and the messages format have it."""
        optional = {"tool_calls": [dict(call) for call in self.tool_calls], "name": self.name}
        optional |= {"tool_call_id": self.tool_call_id}
        told = {key: value for key, value in optional.items() if value}
        return {"role": self.role, "content": self.content} | told


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Turns to learn from; the last is the assistant's. `place` is the row's `file:line`, for errors."""

    messages: tuple[Message, ...]
    id: str
    place: str
    tools: tuple[Mapping[str, Any], ...] = ()
    """Descriptions of the functions that may be called."""
    task: str | None = None
    """The starter task that made the row, which can then grade answers."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What the row has beside its turns; a starter task keeps here what its grader needs."""
    plain: bool = False
    """Whether prompt and answer came as two texts, which a base without a chat template gets joined as they are."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Every turn before the last."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """What the assistant said last."""
        return self.messages[-1].content


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt, of which `chosen` is the better."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    id: str
    place: str
    tools: tuple[Mapping[str, Any], ...] = ()
    rejected_prompt: tuple[Message, ...] | None = None
    """The prompt of the rejected answer where it is another one: two rated texts have a prompt each."""
    gap: float | None = None
    """How much better the chosen answer was rated, where that is known."""
    dialogue: Dialogue | None = None
    """The starter task's row, which can grade answers."""


@dataclass(frozen=True, slots=True)
class Graded:
    """One answer that somebody found good or not: unpaired preference."""

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    good: bool
    id: str
    place: str
