"""Classification of single texts and of pairs, with a head that trains and is stored with every method."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from graft.data.batch import in_batches, pad
from graft.data.load import Row, Unit
from graft.errors import DataError, UsageError
from graft.model import Base
from graft.objectives.base import Loss, Objective, Report, Result, Say, silent
from graft.parts.base import Adapter
from graft.parts.head import Pooling, TaskHead, hold_unused, scores
from graft.routing import Entry, Route


@dataclass(frozen=True)
class LabelledExample:
    """One row as ids, and the number of its label. `place` is its file and line."""

    input_ids: list[int]
    token_type_ids: list[int] | None
    target: int
    place: str

    def __len__(self) -> int:
        return len(self.input_ids)


class Classify(Objective):
    """One label per row, by cross-entropy over the labels."""

    name: ClassVar[str] = "classify"
    unit: ClassVar[Unit] = "labelled"
    max_length: ClassVar[int] = 128
    speaks: ClassVar[bool] = False

    pooling: Pooling | None = None
    """One vector per row from: the base's pooler, its first token, its last, or the mean; as transformers
    when left out.
    """

    head_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout before the head, in training."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target spread over all labels."""

    @property
    def metric(self) -> str:
        """Share of rows that are right."""
        return "accuracy"

    def examples(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        max_length: int,
        say: Say = silent,
    ) -> list[LabelledExample]:
        """Rows as the base's tokenizer writes them, pairs with its separator, cut to `max_length`."""
        index = {label: position for position, label in enumerate(labels)}
        pairs = [row.text_pair for row in rows] if any(row.text_pair for row in rows) else None
        examples = []
        encoded = encode(tokenizer, [row.text for row in rows], pairs, max_length)
        for row, (ids, kinds) in zip(rows, encoded, strict=True):
            if not ids:
                raise DataError(f"{row.place}: the text has no tokens")
            if row.label not in index:
                raise DataError(f"{row.place}: label {row.label!r} is not among {list(labels)}")
            examples.append(LabelledExample(ids, kinds, index[row.label], row.place))
        return examples

    def prepare(self, base: Base, adapter: Adapter, labels: tuple[str, ...]) -> None:
        """A head like that of transformers' own classifiers; the output head, and a pooler that is not used,
        stay still.
        """
        head = TaskHead.for_base(base, labels, self.pooling, self.head_dropout)
        adapter.head = head
        poolers = {module for path, module in base.modules_by_path.items() if "pooler" in path.split(".")}
        before = _trainable(adapter)
        hold_unused(base, adapter, poolers if head.pooling != "pooler" else ())
        if before and not _trainable(adapter):
            places = ", ".join(sorted({site.role for site, _ in adapter.placed}))
            raise UsageError(
                f"{adapter.method.name} sits at {places} only, which is not used with pooling {head.pooling!r}",
                "choose sites inside the layers, or another pooling",
            )

    def weight(self, examples: Sequence[LabelledExample]) -> float:
        """The number of rows."""
        return float(len(examples))

    def loss(self, base: Base, examples: Sequence[LabelledExample], route: Entry | Route) -> Loss:
        """Cross-entropy summed over the rows."""
        logits = scores(base, collate(base, examples), route)
        targets = torch.tensor([example.target for example in examples], device=logits.device)
        total = F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=self.label_smoothing)
        return Loss(total, self.weight(examples))

    @torch.no_grad()
    def evaluate(
        self,
        base: Base,
        examples: Sequence[LabelledExample],
        entry: Entry,
        batch_size: int,
        report: Report | None = None,
        quick: bool = False,
    ) -> Result:
        """Accuracy, with no more than one batch of scores in memory. Figures: the shares of the label that is given
        most often, and of the one that is right most often.
        """
        correct = [0.0] * len(examples)
        loss = 0.0
        given: Counter[int] = Counter()

        def work(rows: list[int]) -> None:
            nonlocal loss
            chosen = [examples[row] for row in rows]
            logits = scores(base, collate(base, chosen), entry).float()
            targets = torch.tensor([example.target for example in chosen], device=logits.device)
            loss += float(F.cross_entropy(logits, targets, reduction="sum"))
            given.update(logits.argmax(dim=1).tolist())
            for row, right in zip(rows, (logits.argmax(dim=1) == targets).tolist(), strict=True):
                correct[row] = float(right)

        done = None if report is None else partial(report, "evaluating")
        size = in_batches([len(example) for example in examples], batch_size, work, done)
        right = Counter(example.target for example in examples)
        figures = {
            "most_predicted": max(given.values()) / len(examples),
            "majority": max(right.values()) / len(examples),
        }
        return Result(sum(correct) / len(correct), loss / len(correct), correct, figures, batch_size=size)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str | None] | None,
    max_length: int | None,
) -> list[tuple[list[int], list[int] | None]]:
    """Ids and, where the tokenizer gives them, token types of texts or pairs, cut to `max_length` if there is one."""
    cut = {"truncation": True, "max_length": max_length} if max_length is not None else {"truncation": False}
    encoded = tokenizer(list(texts), pairs, return_attention_mask=False, verbose=False, **cut)
    types = encoded.get("token_type_ids", [None] * len(texts))
    return list(zip(encoded["input_ids"], types, strict=True))


def _trainable(adapter: Adapter) -> bool:
    """Whether anything but the head trains."""
    named = adapter.named_tensors(head=False)
    return any(isinstance(tensor, nn.Parameter) and tensor.requires_grad for _, tensor in named)


def collate(base: Base, examples: Sequence[LabelledExample]) -> dict[str, Tensor]:
    """Examples as a batch: input_ids, attention_mask and, where the tokenizer gives them, token_type_ids,
    all [B, S].
    """
    filler = base.config.pad_token_id
    ids = pad([example.input_ids for example in examples], filler if filler is not None else 0, base.device)
    # Padding is marked by position, not by id: a pad token can be a real token too.
    batch = {
        "input_ids": ids,
        "attention_mask": pad([[1] * len(example) for example in examples], 0, base.device),
    }
    if examples[0].token_type_ids is not None:
        batch["token_type_ids"] = pad([example.token_type_ids or [] for example in examples], 0, base.device)
    return batch
