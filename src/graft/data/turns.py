"""Turns of a dialogue, read from the spellings that data sets have for them, and the rules on their order."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from graft.data.dialogue import Message, Role
from graft.data.rows import check_text
from graft.reading.faults import BadRow, kind_of, snippet_of
from graft.reading.jsonrows import parse_json

_ALIASES: dict[Role, tuple[str, ...]] = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter", "customer"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai", "functioncall", "toolcall"),
    "tool": ("tool", "function", "observation", "ipython", "toolresponse", "functionresponse", "toolresult"),
}
_ROLES: dict[str, Role] = {alias: role for role, aliases in _ALIASES.items() for alias in aliases}
_CALLS = ("functioncall", "toolcall")
"""Roles whose text is the call itself."""

_UNREAD = ("reasoning_content", "reasoning", "thinking", "refusal", "images", "image", "audio", "videos", "video")
"""Keys of a turn that hold what the model said or saw; leaving them out in silence would change the turn."""

_FOLDED = frozenset(("role", "content", "from", "value", "name", "tool_calls", "tool_call_id", "train", "weight"))
"""Keys of a turn that need no folding."""

_NEXT: dict[str, tuple[Role, ...]] = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Which roles may follow a role; the empty one is the start."""


def fold(name: str) -> str:
    """A key as it is compared where no key is exactly right: case and spaces do not count."""
    return "".join(name.casefold().split())


def read_turns(value: Any, key: str, place: str) -> tuple[Message, ...]:
    """The turns of a list in the messages or the ShareGPT spelling, in whatever order they are.

    Raises `BadRow` for a turn that is no object, an unknown role and content that is no text.
    """
    if not isinstance(value, list):
        raise BadRow(place, f"{key!r} is {kind_of(value)}, allowed is a list of turns", "correct the row")
    if not value:
        raise BadRow(place, f"{key!r} has no turns")
    return tuple(_turn(turn, number, place) for number, turn in enumerate(value, start=1))


def _turn(value: Any, number: int, place: str) -> Message:
    where = f"turn {number}"
    if not isinstance(value, dict):
        raise BadRow(place, f"{where} is {kind_of(value)}, allowed is an object with role and content")
    keys = {key: given for key, given in value.items() if given is not None}
    if not _FOLDED.issuperset(keys):
        keys = {fold(key): given for key, given in reversed(list(keys.items()))} | keys
    given = keys.get("role", keys.get("from"))
    role, spelling = _role(given, where, list(value), place)
    unread = next((key for key in keys if key in _UNREAD and keys[key] not in ("", [])), None)
    if unread is not None:
        raise BadRow(place, f"{where} has {unread!r}, which is not read", "put what is to be learnt into its content")
    content = keys.get("content", keys.get("value"))
    if spelling in _CALLS:
        return Message(role, "", _calls(_loaded(content, where, place), where, place), train=_train(keys, where, place))
    calls = keys.get("tool_calls") or keys.get("function_call") or ()
    if calls and role != "assistant":
        raise BadRow(place, f"{where} has tool_calls, which only the assistant has")
    return Message(
        role=role,
        content=_content(content, bool(calls), where, place),
        tool_calls=_calls(calls, where, place) if calls else (),
        name=_short(keys.get("name"), "name", where, place),
        tool_call_id=_short(keys.get("tool_call_id"), "tool_call_id", where, place),
        train=_train(keys, where, place),
    )


def _role(given: Any, where: str, keys: Sequence[str], place: str) -> tuple[Role, str]:
    """Our name of a role and the folded spelling of the file."""
    if given is None:
        listed = ", ".join(repr(key[:20]) for key in keys[:6]) or "none"
        raise BadRow(place, f"{where} has no role, its keys are {listed}", "give role (or from) and content (or value)")
    spelling = fold(given).replace("_", "").replace("-", "") if isinstance(given, str) and len(given) < 100 else ""
    known = _ROLES.get(spelling)
    if known is None:
        short = isinstance(given, str) and len(given) <= 24
        shown = repr(given) if short else f"{kind_of(given).partition(' (')[0]} of {len(str(given)):,} characters"
        raise BadRow(
            place,
            f"{where} has an unknown role: {shown}",
            "known are system, user, assistant and tool (also human, gpt, observation, function_call)",
        )
    return known, spelling


def _content(value: Any, may_lack: bool, where: str, place: str) -> str:
    """The text of a turn; parts of text are joined as they are."""
    if value is None and may_lack:
        return ""
    if isinstance(value, list):
        texts = []
        for part in value:
            kind = part.get("type") if isinstance(part, Mapping) else None
            text = part.get("text") if isinstance(part, Mapping) else None
            if kind != "text" or not isinstance(text, str):
                what = f"a part of type {kind!r}" if isinstance(kind, str) and len(kind) < 24 else kind_of(part)
                raise BadRow(place, f"{where} has {what} in its content; Graft reads texts", "remove the row")
            texts.append(text)
        value = "".join(texts)
    if not isinstance(value, str):
        raise BadRow(place, f"{where} has {kind_of(value)} as content, allowed is a text", "correct the row")
    return check_text(value, f"{where}, content", place)


def _short(value: Any, key: str, where: str, place: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise BadRow(place, f"{where} has {kind_of(value)} as {key}, allowed is a text", "correct the row")
    return check_text(str(value), f"{where}, {key}", place)


def _train(keys: Mapping[str, Any], where: str, place: str) -> bool | None:
    """What `train` or `weight` says: true, false, 1 or 0."""
    told = {}
    for key in ("train", "weight"):
        value = keys.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadRow(place, f"{where} has {kind_of(value)} as {key}, allowed are true, false, 1 and 0")
        told[key] = bool(value)
    if len(set(told.values())) > 1:
        raise BadRow(place, f"{where} has train and weight, which differ", "give one of them")
    return next(iter(told.values()), None)


def _loaded(value: Any, where: str, place: str) -> Any:
    """JSON that stands in a text, as function calls and tools do; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError:
        shown = snippet_of(value)
        raise BadRow(place, f"{where} should be JSON in a text but is not", "correct the row", shown) from None


def _calls(value: Any, where: str, place: str) -> tuple[Mapping[str, Any], ...]:
    """Calls as `{"type": "function", "function": {"name", "arguments"}}`, with the id where there is one."""
    calls = []
    for call in value if isinstance(value, list | tuple) else [value]:
        outer = call if isinstance(call, Mapping) else {}
        inner = outer if outer.get("function") is None else outer["function"]
        name = inner.get("name") if isinstance(inner, Mapping) else None
        if not isinstance(name, str) or not name.strip():
            raise BadRow(place, f"{where} has a call without the name of a function")
        arguments = inner.get("arguments", inner.get("parameters"))
        arguments = _loaded(arguments or {}, f"{where}, the arguments of {name[:40]!r}", place)
        if not isinstance(arguments, dict):
            raise BadRow(place, f"{where} has {kind_of(arguments)} as arguments of {name[:40]!r}, allowed is an object")
        check_text(json.dumps([name, arguments], ensure_ascii=False), f"{where}, a call", place)
        own = _short(outer.get("id"), "id of a call", where, place)
        read = {"type": "function", "function": {"name": name, "arguments": arguments}}
        calls.append(read if own is None else read | {"id": own})
    if not calls:
        raise BadRow(place, f"{where} has a list of calls without a call")
    return tuple(calls)


def read_tools(value: Any, place: str) -> tuple[Mapping[str, Any], ...]:
    """Descriptions of functions from a list, or from JSON in a text; raises `BadRow` for anything else."""
    tools = _loaded(value, "'tools'", place) if value != "" else []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(place, f"'tools' is {kind_of(tools)}, allowed is a list of objects", "correct the row")
    check_text(json.dumps(tools, ensure_ascii=False), "tools", place)
    return tuple(tools)


def check_turns(turns: Sequence[Message], place: str) -> tuple[Message, ...]:
    """The turns as they are; raises `BadRow` unless they are a dialogue that ends with the assistant.

    A system turn may come first; user and assistant take turns; tools answer an assistant that called them.
    """
    before: Message | None = None
    open_calls: set[str] = set()
    for number, turn in enumerate(turns, start=1):
        _check_order(turn, before, number, place)
        if turn.role == "assistant":
            open_calls = {call["id"] for call in turn.tool_calls if "id" in call}
        if turn.tool_call_id is not None and turn.role == "tool" and open_calls and turn.tool_call_id not in open_calls:
            raise BadRow(
                place, f"turn {number} is a tool's answer to the call {turn.tool_call_id[:40]!r}, made by none"
            )
        if turn.role in ("user", "assistant") and not turn.content.strip() and not turn.tool_calls:
            raise BadRow(place, f"turn {number} ({turn.role}) is empty", "fill in or remove the row")
        before = turn
    if not any(turn.role == "assistant" for turn in turns):
        raise BadRow(place, "no turn of the assistant, so there is nothing to learn")
    if turns[-1].role != "assistant":
        reason = f"the last turn is the {turns[-1].role}'s, it has to be the assistant's"
        raise BadRow(place, reason, snippet=snippet_of(turns[-1].content))
    return tuple(turns)


def _check_order(turn: Message, before: Message | None, number: int, place: str) -> None:
    role = before.role if before is not None else ""
    calls = before.tool_calls if before is not None else ()
    allowed = turn.role in _NEXT[role]
    if allowed and not (turn.role == "tool" and role == "assistant" and not calls):
        return
    if turn.role == "system":
        reason = f"turn {number} is the system's, which may only be the first"
    elif turn.role == "tool":
        reason = f"turn {number} is a tool's, without a call (tool_calls) in the turn before"
    elif turn.role == role:
        reason = f"two {role} turns in a row: turns {number - 1} and {number}"
    elif turn.role == "assistant":
        reason = "the assistant has the first turn, the user has to" if not role else "the assistant follows the system"
    else:
        reason = f"turn {number} is the {turn.role}'s and follows a {role}'s, which the assistant answers"
    raise BadRow(place, reason, snippet=snippet_of(turn.content))
