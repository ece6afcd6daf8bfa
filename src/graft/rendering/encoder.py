"""Text to token ids with the control tokens known apart from text that looks like them."""

import json
import re
from collections.abc import Sequence
from typing import Any

from graft.errors import DataError, UsageError

_SEPARATOR = 0x10FFFD
"""The last private-use character of Unicode; stand-ins are taken from here downwards, where no font has icons."""


class Encoder:
    """A copy of a fast tokenizer that reads special tokens as text, and stand-in characters as special tokens.

    Special tokens of text could open or end a turn in a user's name, so only the template may write them: what it
    writes is replaced by `stand_ins`, one private-use character for each, which contents may not hold.
    """

    controls: re.Pattern[str]
    """Finds special tokens in text, the longest first."""
    stand_ins: dict[str, str]
    """The character of each special token."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises `UsageError` for a tokenizer without a fast backend."""
        from tokenizers import AddedToken, Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            kind = type(tokenizer).__name__
            raise UsageError(f"the tokenizer ({kind}) has no fast backend", "save it with a tokenizer.json")
        # Without a post-processor offsets are not trimmed: a token then begins at the space it starts with.
        described = json.loads(backend.to_str()) | {"post_processor": None, "truncation": None, "padding": None}
        self._copy = Tokenizer.from_str(json.dumps(described))
        self._copy.encode_special_tokens = True
        special = {number: token for number, token in backend.get_added_tokens_decoder().items() if token.special}
        # A space put before the first word of every piece would go to the answer as well; none is cut there.
        self._separator = chr(_SEPARATOR)
        normalizer = self._copy.normalizer
        self.stand_ins, self._real, takes_space = {}, {}, []
        for code, (number, token) in enumerate(special.items(), start=_SEPARATOR - len(special)):
            char = chr(code)
            # A normalizer that drops private-use characters (BERT's) would drop the stand-in.
            normalized = token.normalized and (normalizer is None or char in normalizer.normalize_str(char))
            flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word")}
            self._real[self._add(AddedToken(char, special=False, normalized=normalized, **flags))] = number
            self.stand_ins[token.content] = char
            takes_space += [char] if token.rstrip else []
        self._cut = self._add(AddedToken(self._separator, special=False, normalized=False))
        self._unexpected = set(special) - {tokenizer.unk_token_id}
        longest_first = sorted(self.stand_ins, key=len, reverse=True)
        self.controls = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._taken = re.compile(f"[{chr(_SEPARATOR - len(special))}-{self._separator}]")
        self._takes_space = re.compile(f"[{''.join(takes_space)}]\\s*$") if takes_space else None
        self._separable = self._copy.encode(f"{self._separator}a", add_special_tokens=False).tokens[1:] == ["a"]

    def _add(self, token: Any) -> int:
        self._copy.add_tokens([token])
        number = self._copy.token_to_id(token.content)
        assert number is not None
        return int(number)

    def check(self, text: str) -> None:
        """Raise `DataError` if a message's text holds a stand-in or is no Unicode text."""
        found = self._taken.search(text)
        if found:
            raise DataError(f"the private-use character U+{ord(found.group()):X} stands in the text", "remove it")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            told = f"half a surrogate pair (U+{ord(text[error.start]):X}) stands in the text"
            raise DataError(told, "remove it; it comes from cutting an emoji in two") from None

    def stand_in(self, text: str) -> str:
        """`text` with every special token as its stand-in."""
        return self.controls.sub(lambda found: self.stand_ins[found.group()], text)

    def last_stand_in(self, text: str) -> int:
        """Position of the last stand-in of a text, -1 without one."""
        return max((found.start() for found in self._taken.finditer(text)), default=-1)

    def encode(self, text: str, bounds: Sequence[int] = ()) -> tuple[list[int], list[int], list[bool]]:
        """(ids, first character, whether it is a stand-in's) of each token; no token reaches over one of `bounds`.

        So the ids before a bound are those of the text before it. Where the tokenizer starts every piece with a space,
        and where the special token before a bound takes the whitespace behind it, no bound is drawn.
        """
        drawn = {bound for bound in bounds if self._separable and not self._in_space(text, bound)}
        ids, begins, special = self._encode(text, drawn)
        made = {
            begin + 1 for number, begin, real in zip(ids, begins, special, strict=True) if self._is_made(number, real)
        }
        if made:  # the model's own vocabulary holds the token (Unigram): no piece of text may be all of it
            ids, begins, special = self._encode(text, drawn | made)
        if any(self._is_made(number, real) for number, real in zip(ids, special, strict=True)):
            raise DataError("the tokenizer makes a special token of plain text", "remove it from the text")
        if sum(special) != len(self._taken.findall(text)):
            raise DataError("the tokenizer does not keep the template's special tokens apart from text")
        return ids, begins, special

    def _is_made(self, number: int, real: bool) -> bool:
        return not real and number in self._unexpected

    def _in_space(self, text: str, bound: int) -> bool:
        return self._takes_space is not None and self._takes_space.search(text, 0, bound) is not None

    def _encode(self, text: str, bounds: set[int]) -> tuple[list[int], list[int], list[bool]]:
        cuts = sorted(bound for bound in bounds if 0 < bound < len(text))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        encoding = self._copy.encode(self._separator.join(pieces), add_special_tokens=False)
        ids, begins, special, shift = [], [], [], 0
        for number, (begin, _) in zip(encoding.ids, encoding.offsets, strict=True):
            if number == self._cut:
                shift += 1
                continue
            ids.append(self._real.get(number, number))
            begins.append(begin - shift)
            special.append(number in self._real)
        return ids, begins, special
