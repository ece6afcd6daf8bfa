"""Texts to classify, in batches whose rows go through different adapters and end in their heads."""

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from graft.errors import DataError, GraftError
from graft.limits import is_memory
from graft.model import Base
from graft.objectives.classify import LabelledExample, collate, encode
from graft.parts.head import scores
from graft.routing import Route
from graft.serve.adapters import Adapters, Version
from graft.serve.batch import STRIDE, Unsound

_MOST_ROWS = 32


@dataclass(eq=False)
class Texts:
    """One request: texts for one version, held for it, and the shares of its labels [rows, labels] when done."""

    version: Version
    rows: list[LabelledExample]
    future: "Future[list[list[float]]]" = field(default_factory=Future)
    found: dict[int, list[float]] = field(default_factory=dict)


def read_texts(
    base: Base, version: Version, texts: Sequence[str], pairs: Sequence[str] | None
) -> list[LabelledExample]:
    """Texts as training reads them. Raises `DataError` for one without tokens, or with more than the base reads:
    nothing is cut off.
    """
    assert base.tokenizer is not None
    limit = text_limit(base, version)
    rows = []
    for number, (ids, types) in enumerate(encode(base.tokenizer, texts, pairs, None)):
        if not ids:
            raise DataError(f"text {number} has no tokens")
        if len(ids) > limit:
            raise DataError(f"text {number} has {len(ids):,} tokens, {version.name!r} reads {limit:,}", "shorten it")
        rows.append(LabelledExample(ids, types, 0, ""))
    return rows


def text_limit(base: Base, version: Version) -> int:
    """The most tokens of a text, without the adapter's own."""
    stated = base.max_positions or getattr(base.config, "max_position_embeddings", None) or 4096
    return int(stated) - version.taken


class TextsQueue:
    """Texts that wait, first come, first served. A pass takes rows of like heads, `chunk` tokens with their padding."""

    def __init__(self, adapters: Adapters, chunk: int) -> None:
        self.adapters, self.chunk = adapters, chunk
        self._rows: deque[tuple[Texts, int]] = deque()
        self._most = _MOST_ROWS

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        return len(self._rows)

    def add(self, texts: Texts) -> None:
        """Let the rows of a request wait."""
        self._rows.extend((texts, index) for index in range(len(texts.rows)))

    def fail(self, error: Exception) -> None:
        """Fail everything that waits."""
        for texts, _ in self._rows:
            _fail(texts, error)
        self._rows.clear()

    def step(self) -> None:
        """Score one pass of rows."""
        group = self._next()
        if not group:
            return
        try:
            self._score(group)
        except Exception as error:
            if is_memory(error) and len(group) > 1:
                self._most = max(1, len(group) // 2)
                self._rows.extendleft(reversed(group))
                return
            for texts, _ in group:
                _fail(texts, error)
        finally:
            for texts, _ in group:
                self.adapters.leave(texts.version)

    def _next(self) -> list[tuple[Texts, int]]:
        """The rows of the next pass, their adapters attached and entered."""
        self._rows = deque(item for item in self._rows if not item[0].future.done())
        group: list[tuple[Texts, int]] = []
        longest = 0
        for texts, index in list(self._rows):
            row = texts.rows[index]
            longest = max(longest, len(row))
            if len(group) >= self._most or (group and longest * (len(group) + 1) > self.chunk):
                break
            if group and not _alike((texts, index), group[0]):
                break
            try:
                # The first insists on a place: rows that follow each other through all of them would keep it out.
                bring = self.adapters.bring if group else self.adapters.insist
                if not bring(texts.version):
                    break
            except (GraftError, OSError) as error:
                _fail(texts, error)
                break
            self.adapters.enter(texts.version)
            group.append((texts, index))
        for _ in group:
            self._rows.popleft()
        return sorted(group, key=lambda item: item[0].version.key or "")

    @torch.no_grad()
    def _score(self, group: list[tuple[Texts, int]]) -> None:
        base = self.adapters.base
        base.model.eval()
        batch = collate(base, [texts.rows[index] for texts, index in group])
        longest = batch["input_ids"].shape[1]
        more = min(-longest % STRIDE, min(text_limit(base, texts.version) for texts, _ in group) - longest)
        batch = {key: F.pad(values, (0, max(0, more))) for key, values in batch.items()}
        route = Route.of([texts.version.key for texts, _ in group], base.device)
        shares = scores(base, batch, route).float().softmax(dim=-1).tolist()
        for (texts, index), row in zip(group, shares, strict=True):
            if not all(map(math.isfinite, row)):
                _fail(texts, Unsound(f"the scores of {texts.version.name!r} are no numbers", "its weights are damaged"))
            texts.found[index] = row
            if len(texts.found) == len(texts.rows) and not texts.future.done():
                texts.future.set_result([texts.found[number] for number in range(len(texts.rows))])


def _alike(one: tuple[Texts, int], other: tuple[Texts, int]) -> bool:
    """Whether two rows can be scored in one pass: heads with as many labels, and token types in both or neither."""
    kinds = [texts.rows[index].token_type_ids is None for texts, index in (one, other)]
    return len(one[0].version.labels) == len(other[0].version.labels) and kinds[0] == kinds[1]


def _fail(texts: Texts, error: Exception) -> None:
    if not texts.future.done():
        texts.future.set_exception(error)
