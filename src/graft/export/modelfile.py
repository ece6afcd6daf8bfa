"""A Modelfile for Ollama: the chat template in Go's language, taken from what the Jinja template writes.

Dialogues of marks are written by the Jinja template; what stands between the marks is what Ollama has to write. The
result is run on other dialogues and must give the same text, character by character, the first BOS set aside: the
GGUF file asks readers to add it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graft import __version__
from graft.data.dialogue import Message
from graft.errors import DataError, UsageError
from graft.export.gotemplate import LAST, TURNS, GoError, literal, render
from graft.rendering.jinja import ChatTemplate
from graft.rendering.render import Renderer

CONTEXT = 8192
"""The most tokens of a dialogue that a Modelfile asks memory for, where the model allows as many."""

_SYSTEM, _ASKED, _SAID = "Qsystemq", ("Qaskedfirstq", "Qaskedsecondq", "Qaskedthirdq"), ("Qsaidfirstq", "Qsaidsecondq")
_CONTENTS = ("Hello there.", 'Two\n\nparagraphs, {{ braces }} and "quotes"', "What is 2 + 2?", "4", "Grüße, 東京")
_ODD = {
    "space around a text": "  spaced out \n",
    "thinking in earlier answers": "<think>\nhm\n</think>\n\nFour.",
}
"""Contents that some templates change, which Ollama does not."""

_TAKES_ONLY = "Ollama then chooses a template by the one in the GGUF file: compare a prompt before use"


class NotDecomposed(UsageError):
    """A chat template that is not put together from pieces that stay the same."""


@dataclass(frozen=True)
class Derived:
    """A chat template in Go's language."""

    template: str
    system: str
    """The system text that the template writes where none is given; "" without one."""
    notes: tuple[str, ...]
    """Where Ollama's prompts differ all the same."""
    checked: int
    """Dialogues on which it gives the same text."""
    same_ids: int
    """How many of these give the same token ids too."""


@dataclass(frozen=True)
class _Pieces:
    """What a template writes between contents, from the start to where the assistant begins."""

    first: str
    to_answer: str
    to_question: str
    last: str
    system: tuple[str, str] | None
    """Before and behind a system text; None where the template refuses one."""


def begins_with_bos(tokenizer: Any, renderer: Renderer) -> bool:
    """Whether readers of a file have to put BOS before texts: plain ones have it, and prompts too.

    Where prompts alone have it, the template's own text stays, which readers make BOS of (SmolLM2's is <|im_start|>).
    """
    bos = tokenizer.bos_token_id
    if bos is None or list(tokenizer("Hello")["input_ids"])[:1] != [bos]:
        return False
    if not renderer.template:
        return True
    try:
        return bool(renderer.prompt([Message("user", "Hello")])[0] == bos)
    except DataError:
        return True


def derive(tokenizer: Any, renderer: Renderer) -> Derived:
    """The template of a renderer in Go's language. Raises `NotDecomposed` with the reason."""
    template = ChatTemplate(renderer.name, renderer.template, tokenizer.special_tokens_map)
    bos = str(tokenizer.bos_token) if begins_with_bos(tokenizer, renderer) else ""
    pieces = _without_bos(_decomposed(template), bos)
    text = _go(pieces)
    system = _default_system(pieces)
    notes = [] if pieces.system else ["the template has no system turn: Ollama leaves a system text out"]
    checked = same_ids = 0
    for messages in _dialogues(pieces.system is not None):
        wanted = _written(template, messages)
        if bos + _answered(text, messages) != wanted:
            raise NotDecomposed(f"{renderer.name} writes {messages[-1].content[:20]!r} otherwise than other texts")
        checked += 1
        plain = list(tokenizer(wanted, add_special_tokens=False)["input_ids"])
        same_ids += plain == renderer.prompt(messages)
    if same_ids < checked:
        notes.append(f"{checked - same_ids} of {checked} prompts are cut into other tokens than in training")
    for what, content in _ODD.items():
        messages = [Message("user", content), Message("assistant", content), Message("user", "And?")]
        if bos + _answered(text, messages) != _written(template, messages):
            notes.append(f"the template changes {what}, Ollama does not")
    return Derived(text, system, tuple(notes), checked, same_ids)


def _written(template: ChatTemplate, messages: Sequence[Message]) -> str:
    given = [message.as_dict() for message in messages]
    return template.write(given, (), True, sum(len(message.content) for message in messages))


def _answered(text: str, messages: Sequence[Message]) -> str:
    """What Ollama makes of a dialogue."""
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    try:
        return render(text, system, [{"role": message.role, "content": message.content} for message in messages])
    except GoError as error:
        raise NotDecomposed(f"the template in Go's language does not run: {error}") from None


def _decomposed(template: ChatTemplate) -> _Pieces:
    """The pieces between marks, the same in dialogues of one, two and three questions."""
    asked = [Message("user", mark) for mark in _ASKED]
    said = [Message("assistant", mark) for mark in _SAID]
    try:
        first, last = _between(template, asked[:1])
        two = _between(template, [asked[0], said[0], asked[1]])
        three = _between(template, [asked[0], said[0], asked[1], said[1], asked[2]])
    except DataError as error:
        raise NotDecomposed(f"{template.name} refuses a dialogue of user and assistant: {error.message}") from None
    pair = two[1:3]
    if two != [first, *pair, last] or three != [first, *pair, *pair, last]:
        raise NotDecomposed(f"{template.name} writes a turn otherwise when others follow or precede it")
    told = Message("system", _SYSTEM)
    try:
        alone = _between(template, [told, asked[0]])
        longer = _between(template, [told, asked[0], said[0], asked[1]])
    except DataError:
        return _Pieces(first, pair[0], pair[1], last, None)
    if longer != [*alone[:2], *pair, last] or alone[2] != last:
        raise NotDecomposed(f"{template.name} does not write a system text at the start alone")
    return _Pieces(first, pair[0], pair[1], last, (alone[0], alone[1]))


def _between(template: ChatTemplate, messages: Sequence[Message]) -> list[str]:
    """The text before, between and behind the contents."""
    text, found = _written(template, messages), []
    for message in messages:
        if text.count(message.content) != 1:
            raise NotDecomposed(f"{template.name} writes a turn {text.count(message.content)} times, or out of order")
        before, text = text.split(message.content)
        found.append(before)
    return [*found, text]


def _without_bos(pieces: _Pieces, bos: str) -> _Pieces:
    system = pieces.system
    if not pieces.first.startswith(bos) or (system is not None and not system[0].startswith(bos)):
        raise NotDecomposed("the template begins with BOS in some dialogues alone")
    kept = None if system is None else (system[0].removeprefix(bos), system[1])
    return _Pieces(pieces.first.removeprefix(bos), pieces.to_answer, pieces.to_question, pieces.last, kept)


def _go(pieces: _Pieces) -> str:
    start = literal(pieces.first)
    if pieces.system is not None:
        before, behind = map(literal, pieces.system)
        start = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{behind}{{{{ else }}}}{start}{{{{ end }}}}"
    asked = f"{{{{ .Content }}}}{{{{ if $last }}}}{literal(pieces.last)}{{{{ end }}}}"
    said = (
        f"{literal(pieces.to_answer)}{{{{ .Content }}}}{{{{ if not $last }}}}{literal(pieces.to_question)}{{{{ end }}}}"
    )
    return (
        f"{start}{{{{ {TURNS} }}}}{{{{ {LAST} }}}}"
        f'{{{{ if eq .Role "user" }}}}{asked}{{{{ else if eq .Role "assistant" }}}}{said}{{{{ end }}}}{{{{ end }}}}'
    )


def _default_system(pieces: _Pieces) -> str:
    """The system text that stands in a prompt without one, if it stands where a given one would."""
    if pieces.system is None:
        return ""
    before, behind = pieces.system
    inside = len(pieces.first) - len(before) - len(behind)
    if inside <= 0 or not (pieces.first.startswith(before) and pieces.first.endswith(behind)):
        return ""
    return pieces.first[len(before) : len(before) + inside]


def _dialogues(with_system: bool) -> list[list[Message]]:
    """Dialogues of one to three questions, with and without a system text."""
    roles = ("user", "assistant", "user", "assistant", "user")
    turns = [Message(role, text) for role, text in zip(roles, _CONTENTS, strict=True)]  # type: ignore[arg-type]
    plain = [turns[:1], turns[:3], turns, [Message("user", "x")], [Message("user", _CONTENTS[1])]]
    told = Message("system", "Answer in one word, please.")
    return plain + ([[told, *dialogue] for dialogue in plain] if with_system else [])


def modelfile(
    file: str, tokenizer: Any, renderer: Renderer, stop_ids: Sequence[int], longest: int
) -> tuple[str, dict[str, Any], list[str]]:
    """The text of a Modelfile beside `file`, what was checked of it, and what its user should know."""
    lines = [f"# Written by Graft {__version__}. ollama create NAME -f Modelfile", f"FROM ./{file}"]
    checks: dict[str, Any] = {}
    notes: list[str] = []
    if not renderer.template:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
        notes.append("the model has no chat template: Ollama gives it prompts as they are")
    else:
        try:
            derived = derive(tokenizer, renderer)
        except NotDecomposed as error:
            told = " ".join(_printable(error.message).split())
            notes.append(f"TEMPLATE is left out: {told}; {_TAKES_ONLY}")
            lines.append(f"# {notes[-1]}")
        else:
            lines.append(f'TEMPLATE """{derived.template}"""')
            if _fits_quotes(derived.system):
                lines.append(f'SYSTEM """{derived.system}"""')
            notes += derived.notes
            checks = {"template_dialogues": derived.checked, "template_same_ids": derived.same_ids}
    lines.append(f"PARAMETER num_ctx {min(longest, CONTEXT)}")
    for stop in stop_ids:
        text = str(tokenizer.convert_ids_to_tokens(stop))
        if re.fullmatch(r'[^"\\\s\x00-\x1f\x7f]+', text):
            lines.append(f'PARAMETER stop "{text}"')
        else:
            notes.append(f"the token {stop}, which ends answers, cannot be named in a Modelfile")
    return "\n".join(lines) + "\n", checks, notes


def _fits_quotes(text: str) -> bool:
    """Whether a text can stand in a Modelfile's triple quotes and ends only there."""
    quoted = '"""' in text or text.startswith('"') or text.endswith('"')
    return bool(text) and not quoted and _printable(text) == text


def _printable(text: str) -> str:
    """Without control characters, which would drive a terminal."""
    return "".join(char for char in text if char == "\n" or char.isprintable())
