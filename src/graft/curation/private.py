"""Personal data in a text: found by rules that check sums and lengths, and masked."""

import re
from collections.abc import Callable
from ipaddress import ip_address

_ISSUERS = re.compile(r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|3[068]\d{12}|6[05]\d{14}")


def _card(found: str) -> bool:
    """Whether digits have the beginning and length of a card's number, and the sum that Luhn's check demands."""
    plain = re.sub(r"\D", "", found)
    digits = [int(c) for c in plain]
    doubled = [d * 2 - 9 * (d > 4) for d in digits[-2::-2]]
    holds = len(set(digits)) > 1 and (sum(doubled) + sum(digits[::-2])) % 10 == 0
    return holds and _ISSUERS.fullmatch(plain) is not None


def _iban(found: str) -> bool:
    plain = found.replace(" ", "")
    return 15 <= len(plain) <= 34 and int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def _phone(found: str) -> bool:
    return 9 <= sum(c.isdigit() for c in found) <= 15


def _address(found: str) -> bool:
    """Whether it is a public address and no number of a section or release, such as 1.6.2.2."""
    try:
        return ip_address(found).is_global and max(map(int, found.split("."))) > 31 and not found.endswith(".0")
    except ValueError:
        return False


def _mail(found: str) -> bool:
    return not re.search(r"@(?:[\w-]+\.)*(?:example\.\w+|test|invalid)$", found.casefold())


_PERSONAL: dict[str, tuple[re.Pattern[str], Callable[[str], bool], str]] = {
    "e-mail": (re.compile(r"[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}\b"), _mail, "@"),
    "key": (
        re.compile(
            r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bsk-[A-Za-z0-9_-]{20,200}|\bgh[pousr]_[A-Za-z0-9]{36,255}\b|"
            r"\bxox[abprs]-[A-Za-z0-9-]{10,200}|\bAIza[0-9A-Za-z_-]{35}|\bhf_[A-Za-z0-9]{30,100}\b|"
            r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----"
        ),
        lambda found: True,
        "",
    ),
    "IBAN": (re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), _iban, ""),
    "card": (re.compile(r"(?<![\d.,-])[2-6]\d{3}(?:[ -]?\d){9,15}(?![\d.,]*\d)"), _card, ""),
    "phone": (
        re.compile(
            r"(?<![\w+.])\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,5}(?:[ .-]?\d{2,5}){1,5}(?!\d)|"
            r"(?<![\w.-])(?:\(\d{3}\) ?|\d{3}[-.])\d{3}[-.]\d{4}(?![\w-])"
        ),
        _phone,
        "",
    ),
    "IP": (re.compile(r"(?<![\w.-])(?<!version )\d{1,3}(?:\.\d{1,3}){3}(?![\w-]|\.\d)"), _address, "."),
}
_DIGITS = re.compile(r"\d{3}|\d\.\d|[A-Za-z]{2}\d\d")
_KEYLIKE = re.compile(r"AKIA|ASIA|sk-|gh[pousr]_|xox|AIza|hf_|PRIVATE KEY")


def _personal(text: str) -> list[tuple[int, int, str]]:
    """(start, end, kind) of personal data, in order and without overlap; the first kind wins."""
    found: list[tuple[int, int, str]] = []
    taken = bytearray()
    digits = _DIGITS.search(text)
    for kind, (pattern, holds, needs) in _PERSONAL.items():
        if needs not in text or (kind == "key" and not _KEYLIKE.search(text)):
            continue
        if kind not in ("e-mail", "key") and not digits:
            continue
        for match in pattern.finditer(text):
            start, end = match.span()
            if holds(match.group()) and not any(taken[start:end]):
                taken = taken or bytearray(len(text))
                taken[start:end] = b"\1" * (end - start)
                found.append((start, end, kind))
    return sorted(found)


def personal(text: str) -> str | None:
    """The kinds of personal data in a text ("e-mail, phone"), or None."""
    return ", ".join(dict.fromkeys(kind for _, _, kind in _personal(text))) or None


def masked(text: str) -> str:
    """`text` with personal data replaced by its kind in brackets: `[e-mail]`."""
    while found := _personal(text):  # what is left can read as a number once its neighbour is gone
        pieces, last = [], 0
        for start, end, kind in found:
            pieces += [text[last:start], f"[{kind}]"]
            last = end
        text = "".join(pieces) + text[last:]
    return text
