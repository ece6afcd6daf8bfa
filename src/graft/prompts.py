"""Files of prompts and their answers."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.chat import Served
from graft.data.dialogue import Dialogue, Message
from graft.data.formats import read_row, recognize
from graft.data.turns import fold
from graft.errors import DataError, UsageError
from graft.generate import Answer, answer_all
from graft.reading.faults import BadRow
from graft.reading.files import Record, read_records
from graft.reading.lines import check_file, lines_of, suffix_of, text_of
from graft.rendering.render import Renderer
from graft.sampling import GREEDY, Sampling

_STAND_IN = "-"
"""The answer put to a dialogue that ends with a question, so that the readers of data files take it."""


@dataclass(frozen=True)
class Asked:
    """One row of a file of prompts."""

    record: Record
    dialogue: Dialogue
    """Its turns; the last, the assistant's, is the reference."""
    reference: str | None
    """What the row has as the answer, None when it ends with the question."""


def read_prompts(path: Path) -> list[Asked]:
    """Rows of prompts: `prompt`, `messages` or any dialogue format, or a .txt file with one prompt per line.

    An assistant's last turn is kept as the reference. Raises `DataError` with file and line for the first bad row.
    """
    check_file(path)
    if suffix_of(path) == ".txt":
        lines = [(number, text_of(path, number, line).strip()) for number, line in lines_of(path)]
        records = [Record({"prompt": line}, f"{path}:{number}") for number, line in lines if line]
        if not records:
            raise DataError(f"{path} has no rows", "give a file with at least one prompt")
    else:
        records = read_records(path)
    ended = [_ended(record) for record in records]
    recognized = recognize([record for record, _ in ended], {}, "dialogue")
    asked = []
    for record, (whole, stood_in) in zip(records, ended, strict=True):
        dialogue = read_row(whole, recognized)
        if not isinstance(dialogue, Dialogue) or not dialogue.prompt:
            raise BadRow(record.place, "no question to answer")
        asked.append(Asked(record, dialogue, None if stood_in else dialogue.answer))
    return asked


def _ended(record: Record) -> tuple[Record, bool]:
    """The record with an answer, and whether that is a stand-in."""
    names = {fold(name): name for name, value in record.fields.items() if value is not None}
    for key in ("messages", "conversations", "conversation"):
        turns = record.fields.get(names.get(key, ""))
        if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping):
            last = {fold(str(name)): value for name, value in turns[-1].items()}
            if fold(str(last.get("role", last.get("from", "")))) in ("user", "human", "tool", "observation"):
                answer = {"role": "assistant", "content": _STAND_IN}
                answer = answer if "role" in last else {"from": "gpt", "value": _STAND_IN}
                return Record(record.fields | {names[key]: [*turns, answer]}, record.place), True
            return record, False
    if "prompt" in names and "completion" not in names:
        # As turns: a prompt and a completion that are both texts would be joined without the template.
        answer = {"role": "assistant", "content": _STAND_IN}
        return Record(record.fields | {"completion": [answer]}, record.place), True
    if "instruction" in names and "output" not in names:
        return Record(record.fields | {"output": _STAND_IN}, record.place), True
    return record, False


def plain_ids(renderer: Renderer, text: str) -> list[int]:
    """The ids that an answer to `text` as it is follows. Raises `DataError`."""
    whole = renderer.pair(text, _STAND_IN)
    return whole.ids[: whole.starts[0]]


def prompt_ids(served: Served, asked: Asked, plain: bool = False, system: str = "") -> list[int]:
    """The ids that a row's answer follows: through the chat template, or with `plain`, and for a single question to a
    base that has no template, as they are. Raises `DataError` naming a row that exceeds the positions.
    """
    turns = asked.dialogue.prompt
    if plain or (not served.renderer.template and len(turns) == 1):
        ids = plain_ids(served.renderer, "\n".join(turn.content for turn in turns))
    else:
        if system and turns[0].role != "system":
            turns = (Message("system", system), *turns)
        ids = served.renderer.prompt(turns, asked.dialogue.tools)
    room = served.room
    if room is not None and len(ids) > room:
        raise DataError(f"{asked.record.place}: {len(ids):,} tokens, the model reads {room:,}", "shorten the row")
    return ids


def answer_rows(
    served: Served,
    rows: Sequence[Asked],
    *,
    untouched: bool = False,
    plain: bool = False,
    system: str = "",
    batch_size: int = 16,
    max_new_tokens: int = 256,
    sampling: Sampling = GREEDY,
    watch: Callable[[str, float], None] | None = None,
    keep: Callable[[int, dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Each row's fields with `answer` and `ended`, its `reference` when it has one, and with `untouched` the base's
    `base_answer` and `base_ended`.

    `keep` is called with a row's number and what is known of it as batches are finished, with `untouched` once for the
    run's answer and once for both. Raises `DataError` for a field of a row that one of these would replace.
    """
    tell = watch or (lambda phase, share: None)
    if untouched:
        served.need_untouched()
    added = ["answer", "ended", *(["base_answer", "base_ended"] if untouched else [])]
    for row in rows:
        clash = [key for key in added if key in row.record.fields]
        if clash:
            raise DataError(f"{row.record.place}: the row has {clash[0]!r}, which is the output's", "rename it")
    prompts = [prompt_ids(served, row, plain, system) for row in rows]
    found = [dict(row.record.fields) for row in rows]
    for result, row in zip(found, rows, strict=True):
        if row.reference is not None:
            result.setdefault("reference", row.reference)

    def answer(entry: str | None, prefix: str, first: float, last: float) -> None:
        def finished(number: int, said: Answer) -> None:
            found[number] |= {f"{prefix}answer": served.text(said.ids), f"{prefix}ended": said.ended}
            if keep is not None:
                keep(number, found[number])

        answer_all(
            served.base,
            prompts,
            entry,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            stop_ids=served.renderer.stop_ids,
            sampling=sampling,
            max_positions=served.max_positions,
            progress=lambda share: tell("answering", first + (last - first) * share),
            finished=finished,
        )

    answer(served.adapter, "", 0.0, 0.5 if untouched else 1.0)
    if untouched:
        answer(None, "base_", 0.5, 1.0)
    return found


class Partial:
    """The rows that are finished while others are not, in `OUT.partial` beside the output `OUT`: a line each, in the
    order in which they were finished. With the untouched base's answers a row has a second line that holds both.
    """

    def __init__(self, output: Path) -> None:
        """Raises `UsageError` where the answers of an interrupted call would be lost."""
        self.path = output.with_name(f"{output.name}.partial")
        """Where the rows are."""
        self.rows: set[int] = set()
        """Numbers of the rows that it holds."""
        if self.path.exists():
            told = f"{self.path} is there, with the answers of a call that did not end"
            raise UsageError(told, "rename or remove it, or give another name with -o")

    def add(self, number: int, row: Mapping[str, Any]) -> None:
        """Write one row, to be found whatever happens next."""
        self.rows.add(number)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line_of(row))

    def remove(self) -> None:
        """Remove the file, when all rows are in the output."""
        self.path.unlink(missing_ok=True)


def line_of(row: Mapping[str, Any]) -> str:
    """A row as a line of JSONL."""
    return json.dumps(row, ensure_ascii=False) + "\n"
