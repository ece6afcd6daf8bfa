"""Where each assistant's turn stands in the text that a chat template writes, found from the messages' structure.

A turn begins where the generation prompt ends, which is the text of the messages before it. It ends with the last
special token that the template writes after it both when the dialogue stops there and when it goes on. A template
that writes old turns anew (without their thinking, say) is asked again, with marks around the content of a turn.

Each turn costs two texts of the dialogue before it, so a dialogue of many turns is written once more with marks around
all contents: a turn between the same pieces of template as one that is known begins and ends where that one does.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from graft.data.dialogue import Message
from graft.errors import DataError
from graft.rendering.encoder import Encoder
from graft.rendering.jinja import ChatTemplate

MANY = 24
"""Assistant's turns of a dialogue from which `Written` looks for turns alike: 400 took 32 s without, 0.3 s with."""

_HIDING = range(0xE000, 0xF900)
"""Private-use characters that hide special tokens of contents from the template."""


@dataclass(frozen=True, slots=True)
class Span:
    """Characters of a text that the model writes; `ended` with a special token as the last of them."""

    start: int
    end: int
    ended: bool


@dataclass(frozen=True, slots=True)
class _Content:
    """Where a turn's content stands in the text of all messages, and the template's text on either side of it."""

    start: int
    end: int
    before: str
    after: str


class Written:
    """One dialogue under one template: its texts with stand-ins, each written once, and the spans of its turns."""

    def __init__(
        self, template: ChatTemplate, encoder: Encoder, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> None:
        """Raises `DataError` for contents with characters that are needed here."""
        self._template, self._encoder = template, encoder
        given = [_with_objects(message.as_dict()) for message in messages]
        whole = "\n".join(_texts([given, list(tools)]))
        encoder.check(whole)
        self._size = len(whole)
        used = sorted(set(encoder.controls.findall(whole)))
        seen = set(whole) | set(template.text)
        free = [char for char in map(chr, _HIDING[: len(seen) + len(used) + 2]) if char not in seen][: len(used) + 2]
        if len(free) < len(used) + 2:
            raise DataError("the messages use every private-use character", "remove some")
        self._opening, self._closing, *hiding = free
        self._shown = dict(zip(hiding, used, strict=True))
        hide = dict(zip(used, hiding, strict=True))
        self.messages, self.tools = given, list(tools)
        if used:
            self.messages, self.tools = _each(
                [self.messages, self.tools], lambda text: encoder.controls.sub(lambda found: hide[found.group()], text)
            )
        self._texts: dict[tuple[int, bool, int | None, bool], str] = {}
        self._begins: dict[tuple[str, str], int | None] = {}  # from the content's start, by the texts around it
        self._spans: dict[tuple[str, str], Span] = {}  # from the content's start and end

    def text(self, upto: int, generate: bool = False, marked: int | None = None, opened: bool = True) -> str:
        """The first `upto` messages as the template writes them, with the generation prompt if `generate`.

        The content of turn `marked` has a mark behind its last letter and, if `opened`, one before its first.
        """
        key = (upto, generate, marked, opened)
        if key not in self._texts:
            messages = self.messages[:upto]
            if marked is not None:
                messages = [*messages[:marked], self._marked(messages[marked], opened), *messages[marked + 1 :]]
            self._texts[key] = self._write(messages, self.tools, generate)
        return self._texts[key]

    def _marked(self, message: dict[str, Any], opened: bool = True) -> dict[str, Any]:
        content = message["content"]
        core = content.strip()
        at = content.index(core)
        behind = f"{core}{self._closing}{content[at + len(core) :]}"
        return message | {"content": f"{content[:at]}{self._opening if opened else ''}{behind}"}

    @cached_property
    def _contents(self) -> dict[int, _Content]:
        """The contents of the turns of a long dialogue; none where marks change what the template writes."""
        if sum(message["role"] == "assistant" for message in self.messages) < MANY:
            return {}
        turns = [number for number, message in enumerate(self.messages) if message["content"].strip()]
        try:
            marked = [self._marked(message) if message["content"].strip() else message for message in self.messages]
            text = self._write(marked, self.tools, False)
            full = self.text(len(self.messages))
        except DataError:
            return {}
        between = re.split(f"[{self._opening}{self._closing}]", text)  # template, content, template, ...
        marks = "".join(re.findall(f"[{self._opening}{self._closing}]", text))
        if "".join(between) != full or marks != (self._opening + self._closing) * len(turns):
            return {}
        ends = list(accumulate(map(len, between)))
        return {
            turn: _Content(ends[2 * place], ends[2 * place + 1], between[2 * place], between[2 * place + 2])
            for place, turn in enumerate(turns)
            if self._show(self.messages[turn]["content"].strip()) == between[2 * place + 1]
        }

    def _write(self, messages: Sequence[Any], tools: Sequence[Any], generate: bool) -> str:
        return self._show(self._encoder.stand_in(self._template.write(messages, tools, generate, self._size)))

    def _show(self, text: str) -> str:
        for char, token in self._shown.items():
            text = text.replace(char, token)
        return text

    def check_tools(self) -> None:
        """Raise `DataError` where the template leaves out tools or calls, which would be lost without a word."""
        everything = self.text(len(self.messages))
        bare = [{key: value for key, value in message.items() if key != "tool_calls"} for message in self.messages]
        for what, messages, tools in (("tools", self.messages, []), ("tool calls", bare, self.tools)):
            if messages == self.messages and tools == self.tools:
                continue
            try:
                without = self._write(messages, tools, False)
            except DataError:  # it needs them, so it writes them
                continue
            if without == everything:
                raise DataError(f"{self._template.name} does not write {what}", "choose a template with tools")

    def begin(self, turn: int, text: str) -> int | None:
        """Where the generation prompt of `turn` ends in `text`; None if the text begins in another way."""
        known = self._contents.get(turn)
        if known is None or turn == len(self.messages) - 1:
            return self._exact_begin(turn, text)
        around = known.before, known.after
        if around not in self._begins:
            found = self._exact_begin(turn, text)
            if found is not None and not 0 <= known.start - found <= len(known.before):
                return found
            self._begins[around] = None if found is None else known.start - found
        back = self._begins[around]
        start = None if back is None else known.start - back
        # `text` may be the one that asks for an answer: then it has to begin as the one of all messages does.
        return start if start is None or text.startswith(self.text(len(self.messages))[:start]) else None

    def _exact_begin(self, turn: int, text: str) -> int | None:
        if turn == 0:
            return None
        try:
            before = self.text(turn, generate=True)
        except DataError:
            return None
        return len(before) if text.startswith(before) else None

    def span(self, turn: int) -> Span:
        """What the model writes of an assistant's turn, in the text of all messages; raises `DataError`."""
        known = self._contents.get(turn)
        if known is None or turn == len(self.messages) - 1:
            return self._exact_span(turn)
        around = known.before, known.after
        if around not in self._spans:
            found = self._exact_span(turn)
            if found.start > known.start or not known.end <= found.end <= known.end + len(known.after):
                return found
            self._spans[around] = Span(known.start - found.start, found.end - known.end, found.ended)
        alike = self._spans[around]
        return Span(known.start - alike.start, known.end + alike.end, alike.ended)

    def _exact_span(self, turn: int) -> Span:
        start = self._exact_begin(turn, self.text(len(self.messages)))
        if start is not None:
            begin = self.text(turn, generate=True)
            alone, followed = self._views(turn)
            if alone.startswith(begin) and followed.startswith(begin):
                last = self._last(alone[start:], followed[start:])
                if last is not None:
                    return Span(start, start + last + 1, True)
                end = self._end_as_last_turn(turn, start)
                if end is not None:
                    return Span(start, end, True)
        span = self._marked_span(turn, start, True) or self._marked_span(turn, start, False)
        if span is None:
            raise DataError(
                f"turn {turn + 1}: {self._template.name} rewrites the assistant's text so that it cannot be found",
                "use another template",
            )
        return span

    def _views(self, turn: int, marked: int | None = None, opened: bool = True) -> tuple[str, str]:
        """The text that stops with a turn, and one that goes on behind it."""
        alone = self.text(turn + 1, marked=marked, opened=opened)
        try:
            count = len(self.messages)
            return alone, self.text(count, generate=turn + 1 == count, marked=marked, opened=opened)
        except DataError:  # a template may refuse to let one assistant's turn follow another
            return alone, alone

    def _last(self, alone: str, followed: str) -> int | None:
        """Position of the last special token that a turn's text has both alone and followed."""
        last = self._encoder.last_stand_in(alone[: _shared(alone, followed)])
        return last if last >= 0 else None

    def _end_as_last_turn(self, turn: int, start: int) -> int | None:
        """The end of a turn whose text changes when others follow: the special token that ends it as the last turn.

        The first of it behind `start` counts, if what comes next in the dialogue stands behind it.
        """
        alone = self.text(turn + 1)
        try:
            followed = self.text(turn + 1, generate=True)
            behind = self.text(len(self.messages), marked=turn + 1).find(self._opening)
        except (DataError, IndexError):
            return None
        last = self._last(alone[start:], followed[start:])
        if last is None:
            return None
        end = self.text(len(self.messages)).find(alone[start + last], start) + 1
        return end if 0 < end <= behind else None

    def _marked_span(self, turn: int, start: int | None, opened: bool) -> Span | None:
        """The span found by marks around the content; None where marks change what the template writes."""
        count = len(self.messages)
        try:
            marked = self.text(count, marked=turn, opened=opened)
            alone, followed = self._views(turn, turn, opened)
        except DataError:
            return None
        closing = self._closing
        if any(text.count(closing) != 1 or text.count(self._opening) > 1 for text in (marked, alone, followed)):
            return None
        full = self.text(count)
        if marked.replace(self._opening, "").replace(closing, "") != full:
            return None
        stop = marked.replace(self._opening, "").index(closing)
        opening = marked.find(self._opening)
        if start is None and 0 <= opening < stop:
            start = opening
        elif start is None:  # only the end of the content is left, as of thinking that is dropped
            core = self._show(self.messages[turn]["content"].strip())
            kept = _shared(core[::-1], full[:stop][::-1])
            if core and not kept:
                return None
            start = stop - kept
        last = self._last(alone[alone.index(closing) + 1 :], followed[followed.index(closing) + 1 :])
        return Span(start, stop if last is None else stop + last + 1, last is not None)


def _shared(one: str, other: str) -> int:
    """Length of the longest common beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """A message with the arguments of its calls as objects: templates write them as JSON, a text would be quoted."""
    calls = []
    for call in message.get("tool_calls", ()):
        function = dict(call.get("function", {}))
        if isinstance(function.get("arguments"), str):
            with suppress(ValueError):
                function["arguments"] = json.loads(function["arguments"])
        calls.append(dict(call) | {"function": function})
    return message | ({"tool_calls": calls} if calls else {})


def _texts(value: Any) -> list[str]:
    """Every text in a value of JSON."""
    found: list[str] = []

    def keep(text: str) -> str:
        found.append(text)
        return text

    _each(value, keep)
    return found


def _each(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every text in it changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_each(key, change): _each(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_each(inner, change) for inner in value]
    return value
