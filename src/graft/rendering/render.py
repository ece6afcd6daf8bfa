"""Dialogues become token ids and a loss mask: one way for training, evaluation, chat and serving.

What is trained follows from the structure of the messages: an assistant's turn begins where the generation prompt
ends, and ends with the special token that the template writes after it. No text is searched for markers. Only the
template writes special tokens; one that stands in a message is encoded as plain text.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from graft.data.dialogue import Message
from graft.errors import DataError, UsageError
from graft.rendering.encoder import Encoder
from graft.rendering.jinja import ChatTemplate, find_template
from graft.rendering.spans import Written

Train = Literal["assistant", "last", "all"]
"""Which tokens bear loss: every assistant's turn, the last of them, or everything but BOS."""


@dataclass(frozen=True)
class Rendered:
    """Token ids and which of them bear loss."""

    ids: list[int]
    trained: list[bool]
    """For each id, whether the loss counts it."""
    ended: int
    """Supervised turns whose end-of-turn token is supervised."""
    turns: int
    """Supervised turns."""
    starts: list[int]
    """Index of the first trained token of each supervised turn that has one."""


class Renderer:
    """Messages to ids and loss mask, for one tokenizer and one template."""

    name: str
    """Which template it is, in words for messages."""
    template: str
    """The template's Jinja text, "" without one."""
    sha256: str
    """Of the template's text."""
    stop_ids: frozenset[int]
    """Every id that ends a turn: the tokenizer's eos, and what the template writes behind an answer."""
    ending: list[int]
    """What stands behind the text of the last answer in `render`: the id that ends it, and what follows, such as a line
    break, which no model writes."""

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        """`template`: None for the tokenizer's own, a name of `templates/`, a path ending in .jinja, or Jinja text.

        A tokenizer without a template serves `text` and `pair`; `prompt` and `render` then raise `UsageError`, as
        this does for an unknown or faulty template and for a tokenizer without fast backend.
        """
        self._encoder = Encoder(tokenizer)
        self.name, self.template = find_template(template, tokenizer)
        self.sha256 = hashlib.sha256(self.template.encode()).hexdigest()
        self._template = ChatTemplate(self.name, self.template, tokenizer.special_tokens_map)
        self._eos: int | None = tokenizer.eos_token_id
        self._bos: int | None = tokenizer.bos_token_id
        probe = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True)
        own = list(zip(probe.ids, probe.special_tokens_mask, strict=True))
        self._before = [number for number, _ in takewhile(lambda pair: pair[1], own)]
        self._after = [number for number, _ in takewhile(lambda pair: pair[1], own[::-1])][::-1]
        end, self.ending = self._turn_end()
        self.stop_ids = frozenset(end) | ({self._eos} if self._eos is not None else frozenset())

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Ids up to where the assistant writes: what a server gives the model. Raises `DataError`."""
        written = self._written(messages, tools)
        text = written.text(len(messages), generate=True)
        return self._encoder.encode(text, self._bounds(written, messages, text))[0]

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), train: Train = "assistant"
    ) -> Rendered:
        """Ids of the whole dialogue and the loss mask; `Message.train` overrules `train` for an assistant's turn.

        `prompt` of the messages before a supervised turn gives the ids before that turn, unless the template writes
        old turns anew. Raises `DataError` naming the turn (from 1) that is not found in what the template writes.
        """
        written = self._written(messages, tools)
        text = written.text(len(messages))
        if tools or any(message.tool_calls for message in messages):
            written.check_tools()
        spoken = [number for number, message in enumerate(messages) if message.role == "assistant"]
        ids, begins, special = self._encoder.encode(text, self._bounds(written, messages, text))
        trained = [train == "all"] * len(ids)
        if ids and ids[0] == self._bos:
            trained[0] = False
        starts, ended, wanted = [], 0, 0
        for number in spoken:
            told = messages[number].train
            supervised = told if told is not None else train != "last" or number == spoken[-1]
            if not supervised and train != "all":
                continue
            span = written.span(number)
            inside = range(bisect_left(begins, span.start), bisect_left(begins, span.end))
            for token in inside:
                trained[token] = supervised
            wanted += supervised
            if supervised and inside:
                starts.append(inside[0])
                ended += span.ended and special[inside[-1]]
        return Rendered(ids, trained, ended, wanted, starts)

    def length(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> int:
        """How many ids `render` gives, without looking for the ends of turns. Raises `DataError`."""
        written = self._written(messages, tools)
        text = written.text(len(messages))
        return len(self._encoder.encode(text, self._bounds(written, messages, text))[0])

    def text(self, text: str) -> list[int]:
        """Ids of plain text for pretraining, with the tokenizer's own special tokens and eos once at the end."""
        self._encoder.check(text)
        return [*self._before, *self._encoder.encode(text)[0], *self._ending()]

    def pair(self, prompt: str, completion: str) -> Rendered:
        """Prompt and completion joined as they are, without a template; the completion and eos bear loss."""
        self._encoder.check(prompt + completion)
        ids, begins, _ = self._encoder.encode(prompt + completion, [len(prompt)])
        ending = self._ending()
        trained = [False] * len(self._before) + [begin >= len(prompt) for begin in begins]
        trained += [number == self._eos for number in ending]
        return Rendered([*self._before, *ids, *ending], trained, 1, 1, [trained.index(True)])

    def _ending(self) -> list[int]:
        if self._eos is None:
            raise UsageError("the tokenizer has no end-of-sequence token", "set its eos_token")
        return self._after if self._eos in self._after else [*self._after, self._eos]

    def _turn_end(self) -> tuple[list[int], list[int]]:
        """The id behind the answer of a probe, none where the template writes no special token there; and `ending`."""
        eos = [] if self._eos is None else [self._eos]
        if not self.template:
            return [], eos
        try:
            probe = self.render([Message("user", "a"), Message("assistant", "b")])
        except DataError:
            return [], eos
        last = max(number for number, trained in enumerate(probe.trained) if trained)
        return probe.ids[last : last + probe.ended], probe.ids[last + 1 - probe.ended :]

    def _written(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> Written:
        if not messages:
            raise DataError("no messages to render", "give at least one")
        return Written(self._template, self._encoder, messages, tools)

    @staticmethod
    def _bounds(written: Written, messages: Sequence[Message], text: str) -> list[int]:
        """Where generation prompts end in `text`; a token over such a bound is one that no model writes there."""
        spoken = [number for number, message in enumerate(messages) if message.role == "assistant"]
        found = [written.begin(number, text) for number in spoken]
        return [bound for bound in found if bound is not None]
