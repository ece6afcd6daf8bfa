"""From a record to a row: one function per format, told apart by the keys of the record."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graft.data.dialogue import Dialogue, Graded, Message, Preference
from graft.data.rows import Row, check_text, id_of, make_row, text_value
from graft.data.turns import check_turns, fold, read_tools, read_turns
from graft.reading.faults import BadRow, kind_of
from graft.reading.files import Record

AnyRow = Row | Dialogue | Preference | Graded
"""What a record of any format becomes."""


@dataclass(frozen=True, slots=True)
class Format:
    """A format: its unit, the keys that every row needs, those it may have, and its reader."""

    unit: str
    """What its rows are: dialogue, text, preference, graded or labelled."""
    needs: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[["Given"], AnyRow]

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key of the format, without `id` and `task`."""
        return self.needs + self.optional


@dataclass(frozen=True, slots=True)
class Given:
    """The values of one record under our names; those that are null are left out."""

    values: Mapping[str, Any]
    names: Mapping[str, str]
    """The file's names of `values` and of what is missing, for errors."""
    rest: Mapping[str, Any]
    """What the format has no key for."""
    place: str

    @property
    def id(self) -> str:
        """The row's own id, else its line."""
        return id_of(self.values.get("id"), self.place)

    def need(self, key: str) -> Any:
        """The value of a key; raises `BadRow` when it is missing or null."""
        if key not in self.values:
            raise BadRow(self.place, f"{self.names[key]!r} is missing or null", "fill in or remove the row")
        return self.values[key]

    def text(self, key: str) -> str:
        """The text of a key; raises `BadRow` when it is missing, no text or blank."""
        return text_value(self.need(key), self.names[key], self.place)

    def optional_text(self, key: str) -> str:
        """The text of a key, empty when there is none."""
        value = self.values.get(key, "")
        if not isinstance(value, str):
            reason = f"{self.names[key]!r} is {kind_of(value)}, allowed is a text"
            raise BadRow(self.place, reason, "correct the row")
        return check_text(value, self.names[key], self.place) if value.strip() else ""

    def turns(self, key: str) -> tuple[Message, ...]:
        """The turns of a key that has to be a list of them."""
        return read_turns(self.need(key), self.names[key], self.place)

    def dialogue(self, turns: tuple[Message, ...], plain: bool = False) -> Dialogue:
        """The dialogue of some turns, checked, with the row's system prompt, tools, task and further fields."""
        turns = check_turns(_with_system(self, turns), self.place)
        task = self.values.get("task")
        rest = dict(self.rest)
        if not isinstance(task, str) or not task:
            rest |= {} if task in (None, "") else {self.names["task"]: task}
            task = None
        if task is not None or rest:
            check_text(json.dumps([task, rest], ensure_ascii=False), "further fields", self.place)
        return Dialogue(turns, self.id, self.place, _tools(self), task, rest, plain)


def given_of(record: Record, keys: tuple[str, ...], columns: Mapping[str, str]) -> Given:
    """A record under our names: by `columns`, else by the exact key, else by one that differs in case or spaces."""
    fields = record.fields
    names = {key: columns.get(key, key) for key in (*keys, "id", "task")}
    exact = set(names.values())
    if not exact.issuperset(fields):
        folded = {fold(name): name for name in reversed(fields)}
        names = {key: name if name in fields else folded.get(fold(name), name) for key, name in names.items()}
    values = {key: fields[name] for key, name in names.items() if fields.get(name) is not None}
    used = set(names.values())
    rest = {name: value for name, value in fields.items() if name not in used and value is not None}
    return Given(values, names, rest, record.place)


def _with_system(given: Given, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    system = given.optional_text("system") if "system" in given.values else ""
    if not system:
        return turns
    if turns and turns[0].role == "system":
        if turns[0].content == system:
            return turns
        raise BadRow(given.place, f"{given.names['system']!r} and a system turn, which differ", "give one of them")
    return (Message("system", system), *turns)


def _tools(given: Given) -> tuple[Mapping[str, Any], ...]:
    return read_tools(given.values["tools"], given.place) if "tools" in given.values else ()


def _asked(given: Given) -> tuple[Message, ...]:
    """The history and the question of an instruction with its input."""
    turns: list[Message] = []
    history = given.values.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            reason = f"{given.names['history']!r} has {kind_of(pair)}, allowed are pairs of question and answer"
            raise BadRow(given.place, reason, "correct the row")
        asked, answered = (text_value(text, given.names["history"], given.place) for text in pair)
        turns += [Message("user", asked), Message("assistant", answered)]
    question, context = given.text("instruction"), given.optional_text("input")
    return (*turns, Message("user", f"{question}\n\n{context}" if context else question))


def _alpaca(given: Given) -> Dialogue:
    return given.dialogue((*_asked(given), Message("assistant", given.text("output"))))


def _sharegpt(given: Given) -> Dialogue:
    short = "conversation" in given.values and "conversations" not in given.values
    return given.dialogue(given.turns("conversation" if short else "conversations"))


def _messages(given: Given) -> Dialogue:
    return given.dialogue(given.turns("messages"))


def _prompt_completion(given: Given) -> Dialogue:
    if isinstance(given.need("prompt"), str) and isinstance(given.need("completion"), str):
        turns = (Message("user", given.text("prompt")), Message("assistant", given.text("completion")))
        return given.dialogue(turns, plain=True)
    prompt, completion = _prompt(given, "prompt"), _answer(given, "completion")
    # What the prompt holds of the assistant is given, not to be learnt.
    asked = (_untrained(turn) if turn.role == "assistant" and turn.train is None else turn for turn in prompt)
    return given.dialogue((*asked, *completion))


def _untrained(turn: Message) -> Message:
    return Message(turn.role, turn.content, turn.tool_calls, turn.name, turn.tool_call_id, False)


def _prompt(given: Given, key: str) -> tuple[Message, ...]:
    value = given.need(key)
    return (Message("user", given.text(key)),) if isinstance(value, str) else given.turns(key)


def _answer(given: Given, key: str) -> tuple[Message, ...]:
    """An answer: a text, one turn, or turns."""
    value = given.need(key)
    if isinstance(value, str):
        return (Message("assistant", given.text(key)),)
    return read_turns([value] if isinstance(value, dict) else value, given.names[key], given.place)


def _text(given: Given) -> Row:
    return Row(given.text("text"), None, None, given.id, given.place)


def _preference(given: Given) -> Preference:
    chosen, rejected = _answer(given, "chosen"), _answer(given, "rejected")
    source = next((key for key in ("prompt", "instruction", "conversations") if key in given.values), None)
    if source is None:
        prompt: tuple[Message, ...] = ()
        if any(isinstance(given.values[key], str) for key in ("chosen", "rejected")):
            raise BadRow(given.place, f"no {given.names['prompt']!r}, and the answers are no lists of turns")
    else:
        prompt = _asked(given) if source == "instruction" else _prompt(given, source)
    prompt, chosen, rejected = _parted(given, prompt, chosen, rejected)
    if chosen == rejected:
        raise BadRow(given.place, "chosen and rejected are the same answer", "remove the row")
    prompt = _with_system(given, prompt)
    for answer in (chosen, rejected):
        check_turns((*prompt, *answer), given.place)
    return Preference(prompt, chosen, rejected, given.id, given.place, _tools(given))


def _parted(
    given: Given, prompt: tuple[Message, ...], chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """Prompt and answers, where the answers may hold the prompt once more, or alone."""
    whole = [answer[0].role != "assistant" for answer in (chosen, rejected)]
    if not any(whole):
        if not prompt:
            raise BadRow(given.place, f"no {given.names['prompt']!r}, and the answers do not begin with one")
        return prompt, chosen, rejected
    if whole != [True, True]:
        raise BadRow(given.place, "only one of chosen and rejected begins with the prompt")
    if chosen == rejected:
        raise BadRow(given.place, "chosen and rejected are the same answer", "remove the row")
    shared = 0
    for left, right in zip(chosen, rejected, strict=False):
        if left != right:
            break
        shared += 1
    if any(answer[shared : shared + 1] == () or answer[shared].role != "assistant" for answer in (chosen, rejected)):
        raise BadRow(given.place, f"chosen and rejected have different prompts: they part at turn {shared + 1}")
    asked = chosen[:shared]
    if prompt and prompt != asked and prompt not in (asked[-len(prompt) :], asked[: len(prompt)]):
        raise BadRow(given.place, f"{given.names['prompt']!r} is not the prompt that chosen and rejected begin with")
    return asked, chosen[shared:], rejected[shared:]


def _graded(given: Given) -> Graded:
    label = given.need("label")
    known = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
    good = known.get(str(label).strip().lower()) if isinstance(label, str | int | float) else None
    if good is None:
        reason = f"{given.names['label']!r} is {kind_of(label)}, allowed are true, false, 1 and 0"
        raise BadRow(given.place, reason, "correct or remove the row")
    if _tools(given):
        raise BadRow(given.place, "tools are not read in graded answers", "remove them, or give pairs or dialogues")
    prompt = _with_system(given, _prompt(given, "prompt"))
    completion = _answer(given, "completion")
    check_turns((*prompt, *completion), given.place)
    if completion[0].role != "assistant":
        raise BadRow(given.place, f"{given.names['completion']!r} does not begin with the assistant")
    return Graded(prompt, completion, good, given.id, given.place)


def _labelled(given: Given) -> Row:
    given.need("label")
    expected = {"text", "label"} | ({"text_pair"} & {key for key in given.values if given.values[key] != ""})
    values = {given.names[key]: value for key, value in given.values.items()}
    return make_row(Record(values, given.place), given.names, expected)


FORMATS: dict[str, Format] = {
    "preference": Format(
        "preference",
        ("chosen", "rejected"),
        ("prompt", "instruction", "input", "history", "conversations", "system", "tools"),
        _preference,
    ),
    "unpaired-preference": Format("graded", ("prompt", "completion", "label"), ("system", "tools"), _graded),
    "messages": Format("dialogue", ("messages",), ("system", "tools"), _messages),
    "sharegpt": Format("dialogue", ("conversations",), ("conversation", "system", "tools"), _sharegpt),
    "alpaca": Format("dialogue", ("instruction", "output"), ("input", "history", "system"), _alpaca),
    "prompt-completion": Format("dialogue", ("prompt", "completion"), ("tools",), _prompt_completion),
    "classification": Format("labelled", ("text", "label"), ("text_pair",), _labelled),
    "text": Format("text", ("text",), (), _text),
}
"""The formats by name, in the order in which they are tried."""
