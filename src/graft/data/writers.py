"""From a row back to a record: what is written reads as an equal row."""

import json
from collections.abc import Callable
from typing import Any

from graft.data.dialogue import Dialogue, Graded, Message, Preference
from graft.data.readers import FORMATS, AnyRow
from graft.data.rows import Row
from graft.data.turns import fold
from graft.errors import UsageError, nearest
from graft.reading.faults import BadRow

_UNITS = {Dialogue: "dialogue", Preference: "preference", Graded: "graded"}
_SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def to_record(row: AnyRow, format: str) -> dict[str, Any]:
    """A row as the record of a format; reading the record gives an equal row. Of a preference, a format of dialogues
    keeps the prompt and the better answer.

    Raises `UsageError` for an unknown format and `BadRow` for a row that the format has no place for.
    """
    if format not in FORMATS:
        raise UsageError(f"no format {format!r}", nearest(format, FORMATS))
    if isinstance(row, Preference) and FORMATS[format].unit == "dialogue":
        row = Dialogue((*row.prompt, *row.chosen), row.id, row.place, row.tools)
    unit = ("text" if row.label is None else "labelled") if isinstance(row, Row) else _UNITS[type(row)]
    if unit != FORMATS[format].unit:
        fitting = ", ".join(name for name, known in FORMATS.items() if known.unit == unit)
        raise _refusal(row, f"a row of the unit {unit!r}", format, f"formats for it: {fitting}")
    record = {"id": row.id} | _WRITERS[format](row)
    if not isinstance(row, Dialogue):
        return record
    reserved = {fold(key) for key in (*FORMATS[format].keys, "id")}
    reserved |= {"task"} if row.task is not None else set()
    for key, value in row.fields.items():
        if fold(key) in reserved or (fold(key) == "task" and isinstance(value, str)):
            raise _refusal(row, f"a further field {key!r}", format, "rename the field")
    return record | ({} if row.task is None else {"task": row.task}) | dict(row.fields)


def _refusal(row: AnyRow, what: str, format: str, remedy: str) -> BadRow:
    return BadRow(row.place, f"{what} cannot be written as {format}", remedy)


def _turn(turn: Message) -> dict[str, Any]:
    return turn.as_dict() | ({} if turn.train is None else {"train": turn.train})


def _turns(turns: tuple[Message, ...]) -> list[dict[str, Any]]:
    return [_turn(turn) for turn in turns]


def _tools(row: Dialogue | Preference) -> dict[str, Any]:
    return {"tools": [dict(tool) for tool in row.tools]} if row.tools else {}


def _messages(row: Any) -> dict[str, Any]:
    return {"messages": _turns(row.messages)} | _tools(row)


def _sharegpt(row: Any) -> dict[str, Any]:
    turns = []
    for turn in row.messages:
        own = {key: value for key, value in _turn(turn).items() if key not in ("role", "content", "tool_calls")}
        if not turn.tool_calls:
            turns.append({"from": _SHAREGPT[turn.role], "value": turn.content} | own)
            continue
        if turn.content or turn.name or turn.tool_call_id:
            raise _refusal(row, "a turn with both a text and tool calls", "sharegpt", "write messages")
        calls = json.dumps([dict(call) for call in turn.tool_calls], ensure_ascii=False)
        turns.append({"from": "function_call", "value": calls} | own)
    tools = {"tools": json.dumps([dict(tool) for tool in row.tools], ensure_ascii=False)} if row.tools else {}
    return {"conversations": turns} | tools


def _alpaca(row: Any) -> dict[str, Any]:
    turns = list(row.messages)
    system = turns.pop(0).content if turns[0].role == "system" else None
    simple = all(turn == Message(turn.role, turn.content) for turn in row.messages)
    if row.tools or not simple or any(turn.role == "tool" for turn in turns):
        raise _refusal(row, "tools, or settings of single turns,", "alpaca", "write messages")
    if system is not None and not system.strip():
        raise _refusal(row, "an empty system turn", "alpaca", "write messages")
    texts = [turn.content for turn in turns]
    pairs = [list(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
    record: dict[str, Any] = {"instruction": pairs[-1][0], "input": "", "output": pairs[-1][1]}
    record |= {} if system is None else {"system": system}
    return record | ({"history": pairs[:-1]} if len(pairs) > 1 else {})


def _prompt_completion(row: Any) -> dict[str, Any]:
    """Texts for a plain row, else turns: the completion begins with the first turn that may be trained."""
    turns = row.messages
    if row.plain:
        if turns != (Message("user", turns[0].content), Message("assistant", turns[-1].content)) or row.tools:
            raise _refusal(row, "a plain row of more than a prompt and an answer", "prompt-completion", "split it")
        return {"prompt": turns[0].content, "completion": turns[1].content}
    trained = (n for n, turn in enumerate(turns) if turn.role == "assistant" and turn.train is not False)
    first = next(trained, len(turns) - 1)
    return {"prompt": _turns(turns[:first]), "completion": _turns(turns[first:])} | _tools(row)


def _preference(row: Any) -> dict[str, Any]:
    answers = {"chosen": _turns(row.chosen), "rejected": _turns(row.rejected)}
    return {"prompt": _turns(row.prompt)} | answers | _tools(row)


def _graded(row: Any) -> dict[str, Any]:
    return {"prompt": _turns(row.prompt), "completion": _turns(row.completion), "label": row.good}


def _labelled(row: Any) -> dict[str, Any]:
    pair = {} if row.text_pair is None else {"text_pair": row.text_pair}
    return {"text": row.text} | pair | {"label": row.label}


def _text(row: Any) -> dict[str, Any]:
    if row.text_pair is not None:
        raise _refusal(row, "a pair of texts without a label", "text", "give it a label")
    return {"text": row.text}


_WRITERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "prompt-completion": _prompt_completion,
    "text": _text,
    "preference": _preference,
    "unpaired-preference": _graded,
    "classification": _labelled,
}
