"""The few constructs of Go's text/template that a Modelfile of Graft's uses: written, and run to see what comes out.

Ollama hands a template `.System` (all system texts, joined by empty lines) and `.Messages` (turns in a row of one role
joined likewise, each with `.Role` and `.Content`), or `.Prompt` alone.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LAST = "$last := eq (len (slice $.Messages $i)) 1"
"""Whether a turn is the last one, as Ollama's own templates find it out."""
TURNS = "range $i, $_ := .Messages"
"""Over the turns; the dot is the turn then."""

_ACTION = re.compile(r"\{\{ (.*?) \}\}", flags=re.DOTALL)
_ROLE = re.compile(r'(?:else )?if eq \.Role "([a-z]+)"')
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|n|\\)")


class GoError(ValueError):
    """A template with constructs that are not known here."""


def literal(text: str) -> str:
    """Text that a template writes as it is, and that can end neither an action nor a Modelfile's triple quotes."""
    plain = all(char == "\n" or (char not in '"{}' and not _hidden(char)) for char in text)
    return text if plain else f'{{{{ "{"".join(map(_escaped, text))}" }}}}'


def _hidden(char: str) -> bool:
    """Whether a character is a control, a format sign, a line end of Unicode or half of a pair."""
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp", "Co", "Cn")


def _escaped(char: str) -> str:
    if char == "\n":
        return "\\n"
    if char == "\\":
        return "\\\\"
    code = ord(char)
    if char in '"{}' or (_hidden(char) and code < 0x80):
        return f"\\x{code:02x}"
    if _hidden(char):
        return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
    return char


def _unquoted(quoted: str) -> str:
    match = _STRING.fullmatch(quoted)
    if match is None or re.sub(_ESCAPED, "", match[1]).count("\\"):
        raise GoError(f"{quoted!r} is no string that is known here")

    def value(found: re.Match[str]) -> str:
        sign = found[1]
        return {"n": "\n", "\\": "\\"}.get(sign) or chr(int(sign[1:], 16))

    return _ESCAPED.sub(value, match[1])


@dataclass
class _Block:
    """`if` with its branches, or `range` with one: a condition (None for `else`) and what it holds, each."""

    branches: list[tuple[str | None, list[Any]]] = field(default_factory=list)


def render(template: str, system: str, messages: Sequence[Mapping[str, str]], prompt: str = "") -> str:
    """What Go writes for a template of the constructs above. Raises `GoError` for any other."""
    pieces = _pieces(template)
    nodes, ended = _parse(pieces)
    if ended:
        raise GoError(f"{ended!r} without a beginning")
    values = {"System": system, "Prompt": prompt, "Messages": _collated(messages)}
    return "".join(_run(nodes, values, {}))


def _collated(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Turns in a row of one role as one."""
    found: list[dict[str, str]] = []
    for message in messages:
        if found and found[-1]["role"] == message["role"]:
            found[-1]["content"] += f"\n\n{message['content']}"
        else:
            found.append({"role": message["role"], "content": message["content"]})
    return found


def _pieces(template: str) -> Iterator[tuple[bool, str]]:
    """(whether it is an action, text) in order."""
    end = 0
    for match in _ACTION.finditer(template):
        if "{{" in template[end : match.start()]:
            raise GoError("an action is not written as here")
        if match.start() > end:
            yield False, template[end : match.start()]
        yield True, match[1]
        end = match.end()
    rest = template[end:]
    if "{{" in rest:
        raise GoError("an action is not closed")
    if rest:
        yield False, rest


def _parse(pieces: Iterator[tuple[bool, str]]) -> tuple[list[Any], str]:
    """The nodes up to an `else` or `end`, and that action."""
    nodes: list[Any] = []
    for is_action, text in pieces:
        if not is_action:
            nodes.append(text)
        elif text == "end" or text.startswith("else"):
            return nodes, text
        elif text.startswith(("if ", "range ")):
            block, condition = _Block(), text
            while True:
                inside, ended = _parse(pieces)
                block.branches.append((None if condition == "else" else condition.removeprefix("else "), inside))
                if not ended:
                    raise GoError(f"{text!r} has no end")
                if ended == "end":
                    break
                condition = ended
            nodes.append(block)
        else:
            nodes.append((text,))
    return nodes, ""


def _run(nodes: Sequence[Any], values: Mapping[str, Any], turn: Mapping[str, Any]) -> Iterator[str]:
    """What nodes write; `turn` has the role, the content and whether it is the last, inside a range."""
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif isinstance(node, tuple):
            yield _value(node[0], values, turn)
        elif node.branches[0][0] == TURNS:
            turns = values["Messages"]
            for index, message in enumerate(turns):
                yield from _run(node.branches[0][1], values, {**message, "last": index == len(turns) - 1})
        else:
            chosen: list[Any] = next((inside for test, inside in node.branches if _holds(test, values, turn)), [])
            yield from _run(chosen, values, turn)


def _value(action: str, values: Mapping[str, Any], turn: Mapping[str, Any]) -> str:
    if action in (".System", ".Prompt"):
        return str(values[action[1:]])
    if action == ".Content" and turn:
        return str(turn["content"])
    if action == LAST and turn:
        return ""
    if action.startswith('"'):
        return _unquoted(action)
    raise GoError(f"{action!r} is not known here")


def _holds(test: str | None, values: Mapping[str, Any], turn: Mapping[str, Any]) -> bool:
    if test is None:
        return True
    if test == "if .System":
        return bool(values["System"])
    if turn and test in ("if $last", "if not $last"):
        return bool(turn["last"]) == (test == "if $last")
    role = _ROLE.fullmatch(test)
    if role is None or not turn:
        raise GoError(f"{test!r} is not known here")
    return bool(turn["role"] == role[1])
