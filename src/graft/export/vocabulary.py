"""A tokenizer as a GGUF file has it: tokens, their types, merges or scores, and how text is split before."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from graft.errors import UsageError

_INSTEAD = "export it with --to hf"
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_SPACE = "▁"

_PREFERRED = ("llama-bpe", "qwen2", "tekken", "gpt-4o", "qwen35")
"""Names of splittings, where several names mean one."""


class Kind(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    """A special token: text gets it only where a template writes it."""
    USER_DEFINED = 4
    """An added token that is found whole in text."""
    UNUSED = 5
    """A row of the embeddings without a token."""
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of a tokenizer."""

    model: str
    """`gpt2`: pairs of bytes; `llama`: pieces with "▁" for spaces, and bytes for what is unknown."""
    tokens: list[str]
    kinds: list[Kind]
    pre: str = "default"
    """How text is split before merging, by llama.cpp's names; of `gpt2` alone."""
    merges: tuple[str, ...] = ()
    """Pairs that are joined, the first ones first; of `gpt2` alone."""
    scores: tuple[float, ...] = ()
    """Of `llama` alone: the pair whose whole has the highest score is joined first."""
    spaces: str = "first"
    """Of `llama` alone: where text gets a space before it (first, always, prepend, never, as `graft.gguf` has it)."""
    notes: tuple[str, ...] = ()
    """What a reader of the file does otherwise."""


def vocabulary_of(tokenizer: Any, rows: int) -> Vocabulary:
    """The vocabulary of a fast tokenizer, with as many tokens as the embeddings have rows.

    Raises `UsageError` for a tokenizer of a kind that files do not have.
    """
    try:
        described = json.loads(tokenizer.backend_tokenizer.to_str())
    except AttributeError:
        raise UsageError(
            f"the tokenizer ({type(tokenizer).__name__}) has no tokenizer.json", "save it with a fast one"
        ) from None
    model = described["model"]
    if model.get("type") != "BPE":
        raise UsageError(f"a tokenizer of type {model.get('type')} is not written as GGUF, BPE is", _INSTEAD)
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UsageError(f"a tokenizer with {key} {model[key]!r} is not written as GGUF", _INSTEAD)
    tokens, kinds = _tokens(tokenizer.backend_tokenizer, rows)
    if model.get("byte_fallback"):
        return _pieces(described, tokens, kinds)
    return _bytes(described, tokens, kinds)


def _tokens(backend: Any, rows: int) -> tuple[list[str], list[Kind]]:
    """Tokens and kinds by id, one for each row of the embeddings."""
    tokens = [f"[PAD{index}]" for index in range(rows)]
    kinds = [Kind.UNUSED] * rows
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        if index < rows:
            tokens[index], kinds[index] = token, Kind.NORMAL
    for index, added in backend.get_added_tokens_decoder().items():
        if index < rows:
            kinds[index] = Kind.CONTROL if added.special else Kind.USER_DEFINED
    return tokens, kinds


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges; older files have each as one string."""
    found = []
    for merge in model["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        found.append((str(left), str(right)))
    return found


def _bytes(described: Mapping[str, Any], tokens: list[str], kinds: list[Kind]) -> Vocabulary:
    """GPT-2's, Llama 3's and Qwen's kind."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = set(bytes_to_unicode().values())
    odd = next((token for token, kind in zip(tokens, kinds, strict=True) if set(token) - alphabet), None)
    if odd is not None:
        raise UsageError(f"the token {odd!r} has letters outside of GPT-2's alphabet of bytes", _INSTEAD)
    notes = _check_normalizer(described, ())
    merges = tuple(f"{left} {right}" for left, right in _pairs(described["model"]))
    return Vocabulary("gpt2", tokens, kinds, _splitting(described["pre_tokenizer"]), merges, notes=notes)


def _check_normalizer(described: Mapping[str, Any], allowed: tuple[str, ...]) -> tuple[str, ...]:
    """What to say of the steps before splitting. Raises `UsageError` for one that files do not have."""
    notes: list[str] = []
    for step in _steps(described.get("normalizer"), "normalizers"):
        if step["type"] == "NFC":
            notes.append("letters with separate accents are not joined (NFC) by readers of the file")
        elif step["type"] not in allowed:
            raise UsageError(f"the tokenizer changes text first ({step['type']}), which GGUF does not state", _INSTEAD)
    return tuple(notes)


def _steps(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """A step of a tokenizer and those inside it, in their order."""
    if step is None:
        return []
    return [inner for part in step[key] for inner in _steps(part, key)] if step["type"] == "Sequence" else [step]


def _splitting(step: Mapping[str, Any] | None) -> str:
    """llama.cpp's name for how text is split. Raises `UsageError` for a way that has none here."""
    steps = _steps(step, "pretokenizers")
    last = steps[-1] if steps else {"type": None}
    if last["type"] == "ByteLevel" and not last.get("add_prefix_space"):
        before = steps[:-1]
        if last.get("use_regex", True) and not before:
            return "gpt-2"
        if last.get("use_regex", True) and [step["type"] for step in before] == ["Digits"]:
            if before[0].get("individual_digits"):
                return "smollm"
        elif len(before) == 1 and before[0]["type"] == "Split" and not last.get("use_regex", True):
            name = _named_split(before[0])
            if name is not None:
                return name
    raise UsageError(f"the tokenizer splits text in a way without a name in GGUF files ({_told(steps)})", _INSTEAD)


def _named_split(step: Mapping[str, Any]) -> str | None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    regex = step["pattern"].get("Regex")
    if step.get("behavior") != "Isolated" or step.get("invert"):
        return None
    names = [name for name, split in GGUF_PRE_TOKENIZER_SPLITS.items() if split == regex]
    return next((name for name in _PREFERRED if name in names), names[0] if names else None)


def _told(steps: list[Mapping[str, Any]]) -> str:
    return ", ".join(str(step["type"]) for step in steps) or "not at all"


def _pieces(described: Mapping[str, Any], tokens: list[str], kinds: list[Kind]) -> Vocabulary:
    """Llama 2's, Mistral's and Gemma's kind, which SentencePiece learned."""
    from transformers.tokenization_utils_base import generate_merges

    missing = next((piece for piece in sorted(_BYTES) if piece not in tokens), None)
    if missing is not None:
        raise UsageError(f"the tokenizer has no piece {missing} for unknown letters", _INSTEAD)
    notes = _check_normalizer(described, ("Prepend", "Replace"))
    normal = [step["type"] for step in _steps(described.get("normalizer"), "normalizers")]
    split = _steps(described.get("pre_tokenizer"), "pretokenizers")
    spaces = "prepend" if "Prepend" in normal else "never"
    if len(split) == 1 and split[0]["type"] == "Metaspace" and not split[0].get("split", True) and not normal:
        spaces = split[0].get("prepend_scheme", "always")
        if spaces == "first":
            notes += ("llama.cpp puts a space before text behind a special token, transformers does not",)
    elif split and not (len(split) == 1 and split[0]["type"] == "Split" and "Replace" in normal):
        raise UsageError(f"the tokenizer splits text in a way without a name in GGUF files ({_told(split)})", _INSTEAD)
    elif "Replace" not in normal:
        raise UsageError("the tokenizer has no sign for spaces", _INSTEAD)
    unknown = described["model"].get("unk_token")
    pairs = _pairs(described["model"])
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    if generate_merges(described["model"]["vocab"], {whole: -rank for whole, rank in ranks.items()}) != pairs:
        notes += ("merges that scores cannot order were found: rare words may be cut into other tokens",)
    scores, named = [], []
    for token, kind in zip(tokens, kinds, strict=True):
        if token in _BYTES and kind == Kind.NORMAL:
            kind = Kind.BYTE
        elif token == unknown:
            kind = Kind.UNKNOWN
        named.append(kind)
        # A token that no merge makes is a letter, which is there from the start: its score decides nothing.
        scores.append(float(-ranks[token]) if kind == Kind.NORMAL and token in ranks else -1e6)
    spelled = [
        token.replace(_SPACE, " ") if kind == Kind.USER_DEFINED and spaces == "never" else token
        for token, kind in zip(tokens, named, strict=True)
    ]
    return Vocabulary("llama", spelled, named, scores=tuple(scores), spaces=spaces, notes=notes)
