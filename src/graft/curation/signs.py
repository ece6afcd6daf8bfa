"""Signs of trouble in one text: broken encodings, template tokens, refusals, cut ends, odd characters.

Each is a rule with few false alarms rather than a complete one: what is reported should be worth a look.
"""

import re
from collections.abc import Iterator

LONG_WORD = 80
"""Characters of a word that no language writes: data in base64, a lost space, keys mashed."""

# Broken encodings -----------------------------------------------------------------------------------


def _table() -> dict[str, int]:
    """The byte of each character that Windows-1252 shows for it; five bytes it leaves out show as controls."""
    return {bytes([byte]).decode("cp1252", "ignore") or chr(byte): byte for byte in range(0x80, 0x100)} | {
        chr(byte): byte for byte in range(0x80, 0xA0)
    }


_BYTES = _table()
_REST = "[" + re.escape("".join(c for c, byte in _BYTES.items() if byte < 0xC0)) + "]"
_RUN = re.compile(f"(?:[\u00c2-\u00df]{_REST}|[\u00e0-\u00ef]{_REST}{{2}}|[\u00f0-\u00f4]{_REST}{{3}})+")
_CERTAIN = re.compile(f"(?<![A-ZÀ-Þ])[ÂÃ]{_REST}|â[€„]{_REST}|ðŸ|ï»¿|[\x80-\x84\x86-\x9f]")
_LONE = re.compile(r"(?<!\w)Ã  ?(?=\w)")  # "à" in UTF-8, with a plain space for its second byte, a hard space


def _decoded(run: str) -> str | None:
    try:
        return bytes(_BYTES[character] for character in run).decode("utf-8")
    except UnicodeDecodeError:
        return None


def _broken(text: str) -> Iterator[re.Match[str]]:
    """Runs of UTF-8 that was read as Windows-1252 or Latin-1.

    One sequence such as `é»…` can stand in honest French, so a run counts when it has the signature of
    Western letters, quotes or emoji (Ã, Â, â€, ðŸ), or when three sequences follow each other (Cyrillic, Chinese).
    """
    for run in _RUN.finditer(text):
        after = _decoded(run.group())
        if after is None:
            continue
        start = max(0, run.start() - 1)
        if _CERTAIN.search(text, start, run.end()) or (len(after) >= 3 and all(c.isalpha() for c in after)):
            yield run


def mojibake(text: str) -> str | None:
    """The first piece of a broken encoding (Ã©, â€™, U+FFFD), or None."""
    if text.isascii():
        return None
    if "\ufffd" in text:
        return "\ufffd"
    found = next(_broken(text), None) or _LONE.search(text)
    return found.group() if found else None


def repaired(text: str) -> str:
    """`text` with every broken run read as the UTF-8 it was, until there is none; each time it gets shorter."""
    while not text.isascii():
        pieces, end = [], 0
        for run in _broken(text):
            pieces += [text[end : run.start()], _decoded(run.group()) or run.group()]
            end = run.end()
        if not pieces:
            break
        text = "".join(pieces) + text[end:]
    return _LONE.sub("à ", text)


# Tokens of templates --------------------------------------------------------------------------------

_TOKENS = re.compile(
    r"<\|(?:im_start|im_end|im_sep|endoftext|end|user|assistant|system|eot_id|eom_id|start_header_id|end_header_id|"
    r"begin_of_text|end_of_text|python_tag|pad|padding|fim_prefix|fim_middle|fim_suffix|endofprompt|"
    r"START_OF_TURN_TOKEN|END_OF_TURN_TOKEN|USER_TOKEN|CHATBOT_TOKEN|SYSTEM_TOKEN)\|>"
    r"|\[/?INST\]|<</?SYS>>|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn|BOS_TOKEN|EOS_TOKEN)>"
    r"|\[(?:TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS)\]|<[|｜](?:User|Assistant|begin▁of▁sentence|end▁of▁sentence)[|｜]>"
)


def special_token(text: str, more: re.Pattern[str] | None = None) -> str | None:
    """The first token of a common chat template, or of the model's own (`more`), that stands in the text."""
    if "<" not in text and "[" not in text and more is None:
        return None
    found = _TOKENS.search(text) or (more.search(text) if more else None)
    return found.group() if found else None


# Refusals -------------------------------------------------------------------------------------------

_BOILERPLATE = re.compile(
    r"\bas an? (?:ai|artificial intelligence)(?: language)?(?: model| assistant)?\b(?=[,.]| (?:i|my)\b)"
    r"|\bas a (?:large )?language model\b|\bi(?:'m| am) (?:just |only )?an? (?:ai|language model|ai language model)\b"
    r"|\bals (?:ki|künstliche intelligenz)(?:-(?:sprach)?modell|-assistent)?\b(?=,| (?:kann|habe|bin) )"
    r"|\bals sprachmodell\b"
    r"|\ben tant qu(?:e modèle de langage|'(?:ia|intelligence artificielle|assistant ia))\b"
    r"|\bcomo (?:un )?modelo de lenguaje\b|\bcomo una (?:ia|inteligencia artificial)\b"
    r"|\bcomo (?:um )?modelo de linguagem\b|\bcome modello linguistico\b|\bcome (?:ia|intelligenza artificiale),"
    r"|как (?:языковая модель|искусственный интеллект|ии-модель)"
    r"|作为(?:一个|一名|一款)?(?:人工智能|ai|语言模型|大语言模型)"
    r"|aiとして|言語モデルとして"
)
_REFUSAL = re.compile(
    r"^\W*(?:(?:i'm|i am|we're) (?:very |so )?(?:sorry|afraid)|sorry|i apologi[sz]e|unfortunately|my apologies)?"
    r"[\s,.!;:-]*(?:but )?(?:that )?"
    r"(?:i (?:can(?:no|')t|am (?:not able|unable) to|'m (?:not able|unable) to|won't|will not|must decline to) "
    r"(?:assist|help(?! (?:but|feeling|myself|it|loving))|fulfil|comply|"
    r"provide|answer|do that|engage|create|generate|discuss|share))"
    r"|^\W*(?:es tut mir leid|tut mir leid|leider)[\s,.]*(?:aber )?(?:dabei |das )?kann ich .{0,40}nicht"
    r"|^\W*(?:je suis désolée?|désolée?)[\s,.]*(?:mais )?je ne (?:peux|suis) pas"
    r"|^\W*(?:lo siento|lo lamento)[\s,.]*(?:pero )?no puedo"
    r"|^\W*(?:desculpe|sinto muito|lamento)[\s,.]*(?:mas )?não posso"
    r"|^\W*mi dispiace[\s,.]*(?:ma )?non posso|^\W*(?:извините|к сожалению)[\s,.]*(?:но )?я не могу"
    r"|^\W*(?:很)?(?:抱歉|对不起)[\s,，。]*(?:但)?我(?:不能|无法)|^\W*申し訳(?:ありません|ございません)"
)


def refusal(answer: str) -> str | None:
    """The words with which an answer refuses or speaks of itself as a model, or None (first 600 characters)."""
    folded = answer[:600].casefold().replace("’", "'")
    found = _REFUSAL.search(folded) or _BOILERPLATE.search(folded)
    return found.group().strip() if found else None


# Ends and characters --------------------------------------------------------------------------------

_SENTENCE = re.compile(r"[.!?][\"')\]]* +[A-Z]")


def cut_off(text: str) -> str | None:
    """Why a text looks cut: a code fence left open, an ellipsis at its end, or its last sentence broken off.

    A broken sentence is only told in running text: 120 characters or more, with at least two ends of sentences, and a
    last line of 30 or more that ends in a lower-case letter, a comma or an opening bracket.
    """
    end = text.rstrip()
    if len(re.findall(r"(?m)^[ \t]*```", end)) % 2:
        return "a code fence is left open"
    if end.endswith(("...", "…")) and len(end) > 120:
        return "it ends in an ellipsis"
    if len(end) < 120 or not (end[-1].islower() or end[-1] in ",;(-–") or len(_SENTENCE.findall(end)) < 2:
        return None
    last = end.rpartition("\n")[2].strip()
    listed = re.match(r"[-*•#>|]|\d+[.)]|```", last) or re.search(r"https?://\S+$|@\S+$|#\w+$", last)
    return None if len(last) < 30 or listed else "its last sentence is not finished"


_EMPTY = re.compile(r"(?:[\s.…_*–—]|--)*|\W*(?:n/a|nan|null|tbd|todo)\W*", re.I)


def empty(text: str) -> str | None:
    """A placeholder ("...", "n/a", "nan", "TBD") that stands where text should, or None."""
    return repr(text.strip()[:20]) if len(text) < 40 and _EMPTY.fullmatch(text) else None


_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
_INVISIBLE = re.compile(
    "[\u00ad\u200b\u2060\u2066-\u2069\u202a-\u202e\ufeff]"
)  # joiners are needed by scripts and emoji
_WORD = re.compile(rf"[!-~]{{{LONG_WORD},}}")


def control(text: str) -> str | None:
    """The first control character but tab and line ends, by number, or None."""
    found = None if text.isprintable() else _CONTROL.search(text)
    return f"U+{ord(found.group()):04X}" if found else None


def invisible(text: str) -> str | None:
    """The first character without width that splits words or turns the writing direction, by number, or None."""
    found = None if text.isascii() else _INVISIBLE.search(text)
    return f"U+{ord(found.group()):04X}" if found else None


def long_word(text: str) -> str | None:
    """The beginning of a word of `LONG_WORD` or more ASCII characters that is no address and no rule of one sign."""
    for found in _WORD.finditer(text):
        word = found.group()
        if "://" not in word and not word.startswith("www.") and len(set(word)) > 5:
            return f"{word[:20]}… ({len(word)} characters)"
    return None


_SCRIPTS = {
    "Latin": (0x41, 0x24F),
    "Greek": (0x370, 0x3FF),
    "Cyrillic": (0x400, 0x52F),
    "Hebrew": (0x590, 0x5FF),
    "Arabic": (0x600, 0x77F),
    "Indic": (0x900, 0xDFF),
    "Thai": (0xE00, 0xE7F),
    "Chinese, Japanese": (0x3040, 0x9FFF),
    "Korean": (0xAC00, 0xD7AF),
}


def script(text: str) -> str | None:
    """The writing most of a text's first 200 letters belong to, or None when there are under 10 letters of it."""
    head = text[:400]
    if head.isascii():
        return "Latin" if sum(c.isalpha() for c in head) >= 10 else None
    letters = [ord(c) for c in head if c.isalpha()][:200]
    counts = {name: sum(low <= c <= high for c in letters) for name, (low, high) in _SCRIPTS.items()}
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] >= 10 and counts[best] > len(letters) / 2 else None
