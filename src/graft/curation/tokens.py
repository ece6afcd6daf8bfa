"""Rows as a model's tokenizer sees them: lengths, unknown tokens, and rows that would train nothing."""

from collections.abc import Callable, Sequence
from typing import Any

from graft.curation.findings import EXAMPLES, Example, Finding, Lengths, Severity, lengths_of, snippet, view_of
from graft.curation.private import masked
from graft.data.dialogue import Dialogue, Graded, Preference
from graft.data.formats import AnyRow

_PIECE = 512
"""Texts that are encoded at once."""


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Every control token by id: those with a name (eos, pad) and the added ones that are flagged special."""
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return dict(named) | added


def token_findings(
    tokenizer: Any, rows: Sequence[AnyRow], max_length: int, tell: Callable[[str, float], None]
) -> tuple[list[Finding], Lengths]:
    """Findings about tokens, and the rows' lengths in tokens.

    Dialogues are counted and cut as training does it where the tokenizer has a chat template, otherwise as texts, which
    the unit of the lengths says then.
    """
    texts = [view_of(row).whole for row in rows]
    unknown: list[int] = []
    lengths: list[int] = []
    for first in range(0, len(texts), _PIECE):
        encoded = tokenizer(texts[first : first + _PIECE], verbose=False)["input_ids"]
        lengths += [len(ids) for ids in encoded]
        if tokenizer.unk_token_id is not None:
            unknown += [first + row for row, ids in enumerate(encoded) if tokenizer.unk_token_id in ids]
        tell("counting tokens", 0.8 + 0.1 * first / len(texts))
    findings = []
    if unknown:
        means = "the tokenizer has no tokens for some of the text and reads it as unknown"
        examples = [Example(rows[row].place, snippet(masked(texts[row]))) for row in unknown[:EXAMPLES]]
        share = len(unknown) / len(rows)
        severity: Severity = "warning" if share >= 0.01 else "note"
        advice = "choose a model that knows this writing"
        findings.append(Finding("unknown-tokens", len(unknown), share, severity, means, advice, tuple(examples)))
    dialogues = {
        place: row for place, row in enumerate(rows) if isinstance(row, Dialogue) and (row.prompt or row.plain)
    }
    if dialogues and (tokenizer.chat_template or all(row.plain for row in dialogues.values())):
        more, rendered = _untrained(tokenizer, list(dialogues.values()), max_length, tell)
        rest = [length for place, length in enumerate(lengths) if place not in dialogues]
        return findings + more, lengths_of("tokens", [*rendered, *rest] or lengths)
    findings += _too_long(rows, texts, lengths, max_length)
    turns = dialogues or any(isinstance(row, Preference | Graded) for row in rows)
    return findings, lengths_of("tokens without a chat template" if turns else "tokens", lengths)


def _too_long(rows: Sequence[AnyRow], texts: Sequence[str], lengths: Sequence[int], most: int) -> list[Finding]:
    long = [row for row, length in enumerate(lengths) if length > most]
    if not long:
        return []
    examples = tuple(Example(rows[r].place, f"{lengths[r]:,} tokens: {snippet(masked(texts[r]))}") for r in long[:5])
    share = len(long) / len(rows)
    means = f"rows have more than max_length={most:,} tokens and are cut"
    advice = f"raise max_length; the longest has {max(lengths):,}"
    return [Finding("too-long", len(long), share, "warning" if share >= 0.05 else "note", means, advice, examples)]


def _untrained(
    tokenizer: Any, dialogues: Sequence[Dialogue], max_length: int, tell: Callable[[str, float], None]
) -> tuple[list[Finding], Sequence[int]]:
    """What `supervise` says of the dialogues: rows that would train nothing, ends that would not be learnt. With it
    their tokens before anything is cut.
    """
    from graft.rendering.render import Renderer
    from graft.rendering.supervise import supervise

    tell("rendering", 0.9)
    kept, report = supervise(Renderer(tokenizer), dialogues, max_length, "assistant")
    lost = [Example(place, reason) for reason, places in report.lost.items() for place in places]
    count = len(dialogues) - len(kept)
    findings = []
    if count:
        share = count / len(dialogues)
        means = next((line for line in report.lines() if "0 trained tokens" in line), "rows would train nothing")
        severity: Severity = "error" if not kept else "warning"
        advice = "raise `--max-length`, or shorten or drop these rows"
        findings.append(Finding("untrained", count, share, severity, means, advice, tuple(lost[:EXAMPLES])))
    if report.cut:
        share = len(report.cut) / len(dialogues)
        means = f"old turns or the beginning of the question are cut to fit max_length={max_length:,}"
        examples = tuple(Example(place, "cut") for place in report.cut[:EXAMPLES])
        level: Severity = "warning" if share >= 0.05 else "note"
        findings.append(Finding("too-long", len(report.cut), share, level, means, "raise `--max-length`", examples))
    open_ends = [row for row in kept if not row.ended]
    if open_ends:
        share = len(open_ends) / len(kept)
        means = "the end of the answer is no trained token, so the model would not learn to stop"
        examples = tuple(Example(row.place, "no end of turn") for row in open_ends[:EXAMPLES])
        advice = "use a chat template that ends turns"
        findings.append(Finding("no-end", len(open_ends), share, "warning", means, advice, examples))
    return findings, report.lengths
