"""Chat templates: found by name, file or text, compiled once, and run with a bound on what they write."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.errors import DataError, UsageError, nearest
from graft.limits import time_limit

FOLDER = Path(__file__).with_name("templates")
"""The templates that Graft brings for bases that have none."""

MAX_GROWTH = 50
"""A template may write this many times the characters it was given, beside `MAX_EXTRA`."""

MAX_EXTRA = 100_000
"""Characters that a template may write whatever it was given: long system prompts stand in templates."""

_SECONDS = 10.0
"""Time for reading a template or for writing one row through it; 800 turns take 0.1 s. Loops may write nothing."""


def template_names() -> list[str]:
    """The names that `chat_template` accepts."""
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


def find_template(given: str | None, tokenizer: Any) -> tuple[str, str]:
    """(name, text) of a template: a name of `templates/`, a path ending in .jinja, Jinja text, or the tokenizer's own.

    A tokenizer without a template of its own gives "". Raises `UsageError` for an unknown name and an unreadable file.
    """
    if given is None:
        return "the tokenizer's chat template", _own(tokenizer)
    if "{{" in given or "{%" in given:
        return "the recipe's chat template", given
    path = Path(given) if given.endswith(".jinja") else FOLDER / f"{given}.jinja"
    if not given.endswith(".jinja") and given not in template_names():
        hint = f"{nearest(given, template_names())}; or give a file ending in .jinja"
        raise UsageError(f"chat_template: no template {given!r}", hint)
    try:
        return f"chat template {given}", path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"chat_template: {path} cannot be read as text: {error}", "check the path") from None


def _own(tokenizer: Any) -> str:
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, Mapping):
        own = own.get("default")
    return str(own or "")


class ChatTemplate:
    """A compiled template; `name` says in errors which it is, `text` is its Jinja."""

    def __init__(self, name: str, text: str, variables: Mapping[str, Any]) -> None:
        """`variables` are the tokenizer's special tokens by name. Raises `UsageError` with the line of a fault."""
        from jinja2 import TemplateSyntaxError

        # The compiler behind tokenizer.apply_chat_template, with its sandbox; called here because that function
        # returns only when a template has written everything, however much it is.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self.name, self.text, self.variables = name, text, dict(variables)
        try:
            with time_limit(_SECONDS):  # constant parts are evaluated here
                self._compiled: Any = _compile_jinja_template(text)
        except TemplateSyntaxError as error:
            raise UsageError(f"{name}, line {error.lineno}: {error.message}", "correct the template") from None
        except TimeoutError:
            raise UsageError(f"{name} takes more than {_SECONDS:g} s to be read", "use another template") from None
        except MemoryError:
            raise UsageError(f"{name} fills the memory", "use another template") from None
        except (RecursionError, ArithmeticError, ValueError) as error:
            raise UsageError(f"{name} is no template: {str(error)[:200]}", "correct the template") from None

    def write(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], generate: bool, given: int
    ) -> str:
        """The text of `messages`, of which `generate` adds the generation prompt; `given` is their size in characters.

        Raises `DataError` where the template refuses the messages, and `UsageError` where there is no template or it
        misbehaves.
        """
        from jinja2.exceptions import SecurityError

        if not self.text:
            names = ", ".join(template_names())
            raise UsageError("the tokenizer has no chat template", f"set chat_template to one of {names}, or to a file")
        limit = MAX_GROWTH * given + MAX_EXTRA
        variables = {"messages": messages, "tools": list(tools) or None, "documents": None} | self.variables
        try:
            with time_limit(_SECONDS):
                text = self._bounded(variables | {"add_generation_prompt": generate}, limit)
        except TimeoutError:
            raise UsageError(f"{self.name} takes more than {_SECONDS:g} s for a row", "use another template") from None
        except SecurityError as error:
            raise UsageError(f"{self.name} reaches out of its sandbox: {error}", "use another template") from None
        except MemoryError:
            raise UsageError(f"{self.name} fills the memory", "use another template") from None
        except Exception as error:  # a template can fail in any way that Python can
            told = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
            raise DataError(f"{self.name} refuses the messages: {told}", "correct the row or the template") from None
        if len(text) > limit:
            raise UsageError(f"{self.name} writes more than {limit:,} characters for {given:,}", "use another template")
        return text

    def _bounded(self, variables: Mapping[str, Any], limit: int) -> str:
        """What is written, up to the piece that exceeds `limit` characters."""
        pieces, size = [], 0
        for piece in self._compiled.generate(**variables):
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                break
        return "".join(pieces)
