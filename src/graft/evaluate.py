"""Measures that need no training: what a base could do before, and can still do after.

Forgetting is what the untouched base scores on a probe minus what the tuned model scores, in points.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from graft.data.batch import in_batches, pad
from graft.data.load import Row
from graft.errors import DataError
from graft.model import Base
from graft.parts.head import pool
from graft.routing import Entry


@torch.no_grad()
def embed(base: Base, texts: Sequence[str], entry: Entry, *, max_length: int = 128, batch_size: int = 64) -> Tensor:
    """Mean-pooled, normalized hidden states of texts, fp32 [texts, d], in the order given."""
    assert base.tokenizer is not None
    if base.max_positions is not None:  # virtual tokens need positions too, and every method gets the same cut
        max_length = min(max_length, base.max_positions // 2)
    ids = base.tokenizer(list(texts), truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
    filler = base.config.pad_token_id or 0
    result = torch.empty(len(texts), base.hidden_size)

    def work(rows: list[int]) -> None:
        batch = {
            "input_ids": pad([ids[row] for row in rows], filler, base.device),
            "attention_mask": pad([[1] * len(ids[row]) for row in rows], 0, base.device),
        }
        with base.route(entry):
            pooled = pool(base.hidden(batch), "mean")
        result[rows] = F.normalize(pooled.float(), dim=1).cpu()

    in_batches([len(row) for row in ids], batch_size, work)
    return result


def retrieval_recall(vectors: Tensor, documents: Sequence[str], k: int = 10) -> float:
    """Share of sentences for which another sentence of the same document is among the k nearest of all others.

    vectors [n, d], normalized; documents: the document of each. Sentences that are alone in theirs are not asked for,
    but can be found.
    """
    sizes = Counter(documents)
    asked = [index for index, document in enumerate(documents) if sizes[document] > 1]
    if not asked:
        raise DataError("a retrieval probe needs documents of two or more sentences")
    numbers = {document: number for number, document in enumerate(sizes)}
    document = torch.tensor([numbers[name] for name in documents])
    found = 0
    for start in range(0, len(asked), 512):
        rows = torch.tensor(asked[start : start + 512])
        similarity = vectors[rows] @ vectors.T
        similarity[torch.arange(len(rows)), rows] = -2.0
        nearest = similarity.topk(min(k, len(documents) - 1), dim=1).indices
        found += int((document[nearest] == document[rows][:, None]).any(dim=1).sum())
    return found / len(asked)


def retrieval_probe(base: Base, rows: Sequence[Row], entry: Entry, k: int = 10) -> float:
    """`retrieval_recall` of texts whose ids are `document_sentence`."""
    vectors = embed(base, [row.text for row in rows], entry)
    return retrieval_recall(vectors, [row.id.rpartition("_")[0] for row in rows], k)


def nearest_centroid(
    base: Base, train: Sequence[Row], sets: dict[str, Sequence[Row]], labels: Sequence[str]
) -> dict[str, list[int]]:
    """How the untouched base classifies: by the nearest mean embedding of the training rows of each label.

    Nothing is trained. Returns for each set whether its rows are right (1) or not (0).
    """
    vectors = embed(base, [row.text for row in train], None)
    given = [row.label for row in train]
    centroids = torch.stack(
        [vectors[[i for i, label in enumerate(given) if label == name]].mean(dim=0) for name in labels]
    )
    result = {}
    for name, rows in sets.items():
        nearest = (embed(base, [row.text for row in rows], None) @ F.normalize(centroids, dim=1).T).argmax(dim=1)
        result[name] = [int(labels[choice] == row.label) for choice, row in zip(nearest.tolist(), rows, strict=True)]
    return result
