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
_CERTAIN = re.compile(f"(?<![A-ZÀ-Þ])[ÂÃ]{_REST}|â[€‚„†ˆ‰˜œ]{_REST}|ðŸ|ï»¿|[\x80-\x84\x86-\x9f]")
_LONE = re.compile(r"(?<!\w)Ã  ?(?=\w)")  # "à" in UTF-8, with a plain space for its second byte, a hard space


def _decoded(run: str) -> str | None:
    try:
        return bytes(_BYTES[character] for character in run).decode("utf-8")
    except UnicodeDecodeError:
        return None


def _broken(text: str) -> Iterator[re.Match[str]]:
    """Runs of UTF-8 that was read as Windows-1252 or Latin-1.

    One sequence such as `é»…` can stand in honest French, so a run counts when it has the signature of
    Western letters, quotes, signs or emoji (Ã, Â, â€, â‚, ðŸ), or when three sequences follow each other (Cyrillic,
    Chinese).
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

_WELL = r"[\s*_#]*(?:well, )?"
_SORRY = (
    r"(?:(?:i'm|i am|we're|we are) (?:very |so |really )?(?:sorry|afraid)"
    r"|sorry|i apologi[sz]e|my apologies|unfortunately)[\s,.!;:-]*(?:but )?(?:that )?"
)
_BOILERPLATE = re.compile(
    rf"{_WELL}(?:{_SORRY})?as an? (?:(?:ai|artificial intelligence)(?: language)?(?: model| assistant)?"
    r"|(?:large )?language model)(?: (?:developed|created|trained|made) by \w+)?,? (?:i|my|it(?:'s| is) not)\b"
    rf"|{_WELL}(?:{_SORRY})?i(?:'m| am) (?:just|only|merely) an? (?:ai|(?:ai |large )?language model)(?=[,.;!]|\s*$)"
    r"|als (?:ki|künstliche intelligenz|ki-(?:sprach)?modell|ki-assistent(?:in)?|(?:großes )?sprachmodell),? "
    r"(?:kann|habe|bin|darf|verfüge|besitze|möchte) ich\b"
    r"|en tant qu(?:e (?:grand )?modèle de langage|'(?:ia|intelligence artificielle|assistant ia)),? (?:je |j')"
    r"|como (?:un )?(?:gran )?modelo de lenguaje(?: de ia)?,? (?:yo|no (?:puedo|tengo|soy|poseo|debo))\b"
    r"|como (?:una )?(?:ia|inteligencia artificial),? (?:yo|no (?:puedo|tengo|soy|poseo|debo))\b"
    r"|como (?:um )?(?:grande )?modelo de linguagem,? (?:eu|não (?:posso|tenho|sou|possuo|devo))\b"
    r"|come (?:modello linguistico|ia|intelligenza artificiale),? (?:io|non (?:posso|ho|sono))\b"
    r"|(?:я )?как (?:языковая модель|искусственный интеллект|ии-модель),? (?:я|не)\b"
    r"|作为(?:一个|一名|一款)?(?:人工智能|ai|大?语言模型)(?:语言模型|助手|模型)?[，, ]*我"
    r"|(?:私は)?(?:ai|(?:ai|大規模)?言語モデル|aiアシスタント)として[、,]?(?:私|個人的|お答え)"
)
_END = r"(?=\s*(?:[.,!;:。，！]|$|(?:as|because|since)\b))"
_CANNOT = r"(?:i (?:can(?:no|')t|won't|will not|am (?:not able|unable) to|must decline to)|i'm (?:not able|unable) to) "
_REFUSAL = re.compile(
    rf"{_WELL}(?:{_SORRY})?{_CANNOT}(?:(?:assist|help)(?: you)? with (?:that|this|your|such)"
    r"(?: (?:kind|type|sort) of)?(?: (?:requests?|task|topic|content|activity))?"
    rf"|(?:fulfill?|comply with) (?:that|this|your|such(?: an?)?) requests?){_END}"
    rf"|{_WELL}{_SORRY}{_CANNOT}answer (?:that|this|your) (?:question|request){_END}"
    r"|(?:(?:es )?tut mir (?:sehr )?leid|leider)[\s,.]*(?:aber )?"
    r"(?:(?:dabei|damit) kann ich (?:dir |ihnen |euch )?(?:leider )?"
    r"|(?:ich kann|kann ich) (?:dir |ihnen |euch )?(?:dabei|damit|bei (?:dieser|ihrer|deiner) anfrage) (?:leider )?)"
    rf"nicht (?:weiter)?(?:helfen|behilflich sein|dienen){_END}"
    r"|(?:je suis )?désolée?[\s,.]*(?:mais )?je ne (?:peux|suis) pas (?:en mesure de |capable de )?"
    r"(?:(?:vous |t')?aider (?:avec|pour|à) (?:cela|ça|cette (?:demande|requête))"
    rf"|répondre(?: à (?:cela|ça|(?:cette|votre|ta) (?:demande|question|requête)))?){_END}"
    r"|(?:lo siento|lo lamento)[\s,.]*(?:pero )?no puedo "
    r"(?:ayudar(?:te|le|lo|la)? con (?:eso|esto|(?:esa|esta|tu|su) (?:solicitud|petición))"
    rf"|(?:cumplir|responder)(?: con| a)? (?:esa|esta|tu|su) (?:solicitud|petición|pregunta)){_END}"
    r"|(?:desculpe|sinto muito|lamento)[\s,.]*(?:mas )?não posso (?:(?:te )?ajudar(?:-lo|-la|-te)? com "
    r"(?:isso|isto|(?:esse|este|seu) pedido|(?:essa|esta|sua) solicitação)"
    rf"|(?:atender|responder) a (?:ess|est)[ea] (?:pedido|pergunta|solicitação)){_END}"
    r"|mi dispiace[\s,.]*(?:ma )?non posso "
    r"(?:aiutar(?:ti|la|vi|e) con (?:questo|ciò|(?:questa|la tua|la sua) richiesta)"
    rf"|(?:soddisfare|rispondere a) (?:questa|la tua|la sua) (?:richiesta|domanda)){_END}"
    r"|(?:извините|простите|к сожалению)[\s,.]*(?:но )?я не могу (?:(?:вам |тебе )?(?:помочь (?:вам |тебе )?"
    r"(?:с этим|в этом)(?: запросом)?|выполнить (?:этот|ваш|твой) запрос"
    rf"|ответить(?: на (?:этот|ваш) (?:вопрос|запрос))?)){_END}"
    r"|(?:很|非常)?(?:抱歉|对不起)[\s,，。]*(?:但)?(?:是)?我(?:不能|无法)"
    r"(?:协助|帮助|满足|提供|回答|完成)(?:你|您)?(?:的)?"
    rf"(?:这个|该|此|这样的)?(?:请求|要求|问题|帮助|协助){_END}"
    r"|申し訳(?:ありません|ございません)が[、,]?(?:その|この|そのような)?(?:ご要望|ご依頼|リクエスト|要求|ご?質問)に?は?"
    r"(?:お?応え|お?答え|対応)(?:することが)?(?:でき|いたしかね)"
)


def refusal(answer: str) -> str | None:
    """The words with which an answer begins by refusing or by speaking of itself as a model, or None.

    An answer inside quotes, about such models, or that turns down one thing ("I can't come on Friday") is none.
    """
    folded = answer[:600].casefold().replace("’", "'").lstrip()
    found = _REFUSAL.match(folded) or _BOILERPLATE.match(folded)
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


_PLACEHOLDER = re.compile(r"(?:[\s.…_*–—]|--)*|\W*(?:n/a|nan|null|tbd|todo)\W*", re.I)
_BLANK = re.compile(
    "[\\s\x00-\x1f\x7f-\x9f\u00ad\u115f\u1160\u200b-\u200f\u2028-\u202e\u2060-\u2069\u2800\u3164\ufeff\uffa0]*"
)


def empty(text: str) -> str | None:
    """The characters of a text that shows nothing: white space, and others without ink; or None."""
    return repr(text[:20]) if _BLANK.fullmatch(text) else None


def placeholder(text: str) -> str | None:
    """What may stand for a text that is missing ("...", "n/a", "nan", "TBD"), or None; it can be a right answer."""
    short = len(text) < 40 and not empty(text)
    return repr(text.strip()[:20]) if short and _PLACEHOLDER.fullmatch(text) else None


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
