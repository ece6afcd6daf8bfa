"""What an adapter, or the untouched base, is worth: quality, forgetting, transfer and latency."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from graft.data.load import Row, Splits, read_all, read_rows, subset
from graft.errors import DataError, NotMergeable
from graft.evaluate import nearest_centroid, retrieval_probe
from graft.measure import median_ms
from graft.methods.base import method_of
from graft.model import Base
from graft.objectives.base import Example
from graft.objectives.classify import collate
from graft.parts.attach import merge_into
from graft.parts.base import Adapter
from graft.parts.head import TaskHead, adapter_head, pool, scores
from graft.recipe import Recipe

_LATENCY_ROWS = 40


@dataclass
class Assessor:
    """Measures on the test rows, probes and transfer sets of a recipe.

    `watch` is called with what is being measured and the share of the measuring that is done, 0 to 1.
    """

    recipe: Recipe
    splits: Splits
    accelerator: Accelerator
    watch: Callable[[str, float], None]

    def adapter(self, base: Base, adapter: Adapter, mergeable: bool) -> dict[str, Any]:
        """All figures of an attached adapter. The last of them merges it, so the base is not what it was."""
        self.watch("evaluating on the test rows", 0.0)
        size = self.recipe.training.per_device_eval_batch_size
        with self.accelerator.autocast():
            tests = self.examples(base, self.splits.test)
            tested = self.recipe.objective.evaluate(base, tests, adapter.name, size)
            probes = self._probes(base, adapter.name)
            transfer: dict[str, float] = {}
            for name in self.recipe.transfer:
                self.watch(f"classifying other texts: {name}", self._share(len(probes) + len(transfer)))
                examples = self.examples(base, transfer_rows(self.recipe, self.splits.labels, name))
                transfer[name] = self.recipe.objective.evaluate(base, examples, adapter.name, size).quality
        figures = {"correct": tested.correct, "probes": probes, "transfer": transfer}
        figures["by_rank"] = by_rank(adapter, lambda: self._quality(base, tests, adapter.name))
        return figures | self._latencies(base, adapter, mergeable)

    def untouched(self, base: Base) -> dict[str, Any]:
        """The same figures of a base without adapter; its quality is that of the nearest-centroid classifier."""
        with torch.no_grad(), self.accelerator.autocast():
            sets: dict[str, Sequence[Row]] = {"test": self.splits.test}
            sets |= {name: transfer_rows(self.recipe, self.splits.labels, name) for name in self.recipe.transfer}
            self.watch("classifying by nearest centroid", 0.0)
            right = nearest_centroid(base, self.splits.train, sets, self.splits.labels)
            probes = self._probes(base, None)
        self.watch("measuring latency", 0.95)
        latency = self._latency(base, None, self.examples(base, self.splits.test[:_LATENCY_ROWS]), None)
        return {
            "correct": right["test"],
            "probes": probes,
            "transfer": {name: sum(right[name]) / len(right[name]) for name in self.recipe.transfer},
            "latency_ms": latency,
            "merged_latency_ms": latency,
        }

    def examples(self, base: Base, rows: Sequence[Row]) -> list[Example]:
        """Rows as the objective reads them."""
        return self.recipe.objective.examples(rows, base, self.splits.labels, self.recipe.data.max_length)

    @torch.no_grad()
    def logits(self, base: Base, examples: Sequence[Example], name: str) -> Tensor:
        """Scores [B, labels] through an adapter, in the run's number format, as fp32."""
        with self.accelerator.autocast():
            return scores(base, collate(base, examples), name).float()

    def _quality(self, base: Base, examples: Sequence[Example], name: str) -> float:
        self.watch("evaluating at each rank", 0.9)
        size = self.recipe.training.per_device_eval_batch_size
        with self.accelerator.autocast():
            return self.recipe.objective.evaluate(base, examples, name, size).quality

    def _probes(self, base: Base, entry: str | None) -> dict[str, float]:
        probes: dict[str, float] = {}
        for name in self.recipe.forgetting:
            self.watch(f"probing retrieval: {name}", self._share(len(probes)))
            probes[name] = retrieval_probe(base, read_all(name)[: self.recipe.probe_samples], entry)
        return probes

    def _share(self, done: int) -> float:
        return (done + 1) / (len(self.recipe.forgetting) + len(self.recipe.transfer) + 2)

    def _latencies(self, base: Base, adapter: Adapter, mergeable: bool) -> dict[str, Any]:
        """Median time of a batch of one row, attached and merged, and how far merging moves the scores."""
        self.watch("measuring latency", 0.95)
        head = adapter_head(adapter)
        assert head is not None
        examples = self.examples(base, self.splits.test[:_LATENCY_ROWS])
        attached = self._latency(base, head, examples, adapter.name)
        before = self.logits(base, examples[:8], adapter.name)
        unmerged = {"latency_ms": attached, "merged_latency_ms": None, "merged_difference": None}
        if not mergeable:
            return unmerged
        try:
            merge_into(base, adapter.name)
        except NotMergeable:  # a method whose settings decide it
            return unmerged
        with torch.no_grad(), self.accelerator.autocast():
            after = head(pool(base.hidden(collate(base, examples[:8])), head.pooling)).float()
        return {
            "latency_ms": attached,
            "merged_latency_ms": self._latency(base, head, examples, None),
            "merged_difference": float((before - after).abs().max()),
        }

    def _latency(self, base: Base, head: TaskHead | None, examples: Sequence[Example], entry: str | None) -> float:
        batches = [collate(base, [example]) for example in examples]

        def call(index: int) -> None:
            with torch.no_grad(), self.accelerator.autocast(), base.route(entry):
                hidden = base.hidden(batches[index])
                if head is not None:
                    head(pool(hidden, head.pooling))
                if base.device.type == "cuda":
                    torch.cuda.synchronize()

        return median_ms(call, len(batches))


def by_rank(adapter: Adapter, quality: Callable[[], float]) -> dict[str, float]:
    """`quality()` at each rank that the adapter can be used at, empty for most methods. It ends at its largest rank."""
    found: dict[str, float] = {}
    for rank in method_of(adapter).ranks():
        method_of(adapter).use_rank(adapter, rank)
        found[str(rank)] = quality()
    return found


def check_probes(recipe: Recipe, labels: tuple[str, ...]) -> None:
    """Read what is measured after training, so that a fault in it is found before."""
    for name in recipe.forgetting:
        read_all(name)
    for name in recipe.transfer:
        transfer_rows(recipe, labels, name)


def transfer_rows(recipe: Recipe, labels: tuple[str, ...], name: str) -> list[Row]:
    """The labelled rows of another data set, which must have the labels of training."""
    rows = subset(read_rows(name, need_label=True), recipe.probe_samples)
    other = sorted({row.label or "" for row in rows} - set(labels))
    if other:
        raise DataError(f"transfer: {name} has the label {other[0]!r}, training has {list(labels)}")
    return rows
