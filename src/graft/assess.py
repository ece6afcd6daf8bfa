"""What an adapter, or the untouched base, is worth: quality, forgetting, transfer and latency."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from graft.data.load import Row, Splits, Unit, read_all, read_rows, rows_of, subset
from graft.data.tasks import is_task
from graft.errors import DataError, NotMergeable
from graft.evaluate import nearest_centroid, retrieval_probe
from graft.generate import generate
from graft.measure import median_ms
from graft.methods.base import method_of
from graft.model import Base
from graft.objectives.base import Result, Say
from graft.objectives.causal import Causal, row_figures
from graft.objectives.causal import collate as collate_causal
from graft.objectives.classify import collate
from graft.objectives.instruct import Instruct
from graft.objectives.pretrain import Pretrain
from graft.parts.attach import adapter_of, hidden_states, merge_into
from graft.parts.base import Adapter
from graft.parts.head import TaskHead, adapter_head, pool, scores
from graft.recipe import Recipe
from graft.routing import Entry

_TEST = "the test rows"
_PROBE_TOKENS = 256
_LATENCY_ROWS = 40
_LATENCY_PROMPTS = 5
_LATENCY_TOKENS = 16


@dataclass
class Assessor(ABC):
    """Measures on the test rows, probes and transfer sets of a recipe.

    `watch` is called with what is being measured and the share of the measuring that is done, 0 to 1.
    """

    recipe: Recipe
    splits: Splits
    accelerator: Accelerator
    watch: Callable[[str, float], None]
    read: dict[str, list[Any]] = field(default_factory=dict)
    """Rows as the objective reads them, by what they are for."""

    probe_samples: ClassVar[int]
    """Rows of a probe when the recipe does not say."""
    forgetting_unit: ClassVar[str]
    """What forgetting is counted in: points (of a share that fell) or nats (of a loss that rose)."""

    def adapter(self, base: Base, adapter: Adapter, mergeable: bool) -> dict[str, Any]:
        """All figures of an attached adapter. The last of them merges it, so the base is not what it was."""
        figures = self._figures(base, adapter.name)
        figures["by_rank"] = by_rank(adapter, lambda: self._again(base, adapter.name))
        return figures | self._latencies(base, adapter, mergeable)

    def untouched(self, base: Base) -> dict[str, Any]:
        """The same figures of a base without adapter."""
        figures = self._untouched_figures(base)
        self.watch("measuring latency", 0.95)
        latency = self._latency(base, None)
        return figures | {"latency_ms": latency, "merged_latency_ms": latency}

    def prepare(self, tokenizer: PreTrainedTokenizerBase, say: Say) -> None:
        """Read every row that will be measured, so that a fault in one is found before anything is trained."""
        self.read[_TEST] = self._examples(self.splits.test, tokenizer, lambda line: say(f"test rows: {line}"))
        for name in self.recipe.transfer:
            rows = transfer_rows(self.recipe, self.splits.labels, name, self.samples)
            self.read[name] = self._examples(rows, tokenizer, partial(_told, say, name))

    def _examples(self, rows: Sequence[Any], tokenizer: PreTrainedTokenizerBase, say: Say) -> list[Any]:
        return self.recipe.objective.examples(rows, tokenizer, self.splits.labels, self.recipe.max_length, say)

    @abstractmethod
    def logits(self, base: Base, examples: Sequence[Any], entry: Entry) -> Tensor:
        """Scores of a few rows [B, …] under a route, in the run's number format, as fp32."""

    @abstractmethod
    def probe(self, base: Base, name: str, entry: Entry) -> float:
        """What a base still knows of something that was not trained."""

    @abstractmethod
    def _untouched_figures(self, base: Base) -> dict[str, Any]: ...

    @abstractmethod
    def _latency(self, base: Base, entry: Entry) -> float: ...

    @property
    def samples(self) -> int:
        """Rows of a probe at most."""
        return self.recipe.probe_samples or self.probe_samples

    def _evaluate(self, base: Base, name: str, entry: Entry, what: str, share: float) -> Result:
        self.watch(what, share)
        step = 1 / self._stages

        def report(phase: str, done: float) -> None:
            self.watch(what, share + step * done)

        size = self.recipe.training.per_device_eval_batch_size
        with self.accelerator.autocast():
            return self.recipe.objective.evaluate(base, self.read[name], entry, size, report)

    def _figures(self, base: Base, entry: Entry) -> dict[str, Any]:
        tested = self._evaluate(base, _TEST, entry, "evaluating on the test rows", 0.0)
        probes = self._probes(base, entry)
        transfer: dict[str, float] = {}
        for name in self.recipe.transfer:
            share = self._share(len(probes) + len(transfer))
            transfer[name] = self._evaluate(base, name, entry, f"evaluating on other data: {name}", share).quality
        return {
            "correct": tested.correct,
            "answers": tested.samples,
            "figures": {"loss": tested.loss, **tested.figures},
            "probes": probes,
            "forgetting_unit": self.forgetting_unit,
            "transfer": transfer,
        }

    def _again(self, base: Base, entry: Entry) -> float:
        return self._evaluate(base, _TEST, entry, "evaluating at each rank", 0.9).quality

    def _probes(self, base: Base, entry: Entry) -> dict[str, float]:
        probes: dict[str, float] = {}
        for name in self.recipe.forgetting:
            self.watch(f"probing {_probe(name)}", self._share(len(probes)))
            with self.accelerator.autocast():
                probes[name] = self.probe(base, name, entry)
        return probes

    @property
    def _stages(self) -> int:
        return len(self.recipe.forgetting) + len(self.recipe.transfer) + 2

    def _share(self, done: int) -> float:
        return (done + 1) / self._stages

    def _latencies(self, base: Base, adapter: Adapter, mergeable: bool) -> dict[str, Any]:
        """Latency attached and merged, and how far merging moves the scores."""
        self.watch("measuring latency", 0.95)
        examples = self.read[_TEST][:8]
        attached = self._latency(base, adapter.name)
        before = self.logits(base, examples, adapter.name)
        unmerged = {"latency_ms": attached, "merged_latency_ms": None, "merged_difference": None}
        if not mergeable:
            return unmerged
        head = adapter_head(adapter)
        try:
            merge_into(base, adapter.name)
        except NotMergeable:  # a method whose settings decide it
            return unmerged
        after = self._merged_logits(base, examples, head)
        return {
            "latency_ms": attached,
            "merged_latency_ms": self._latency_with(base, None, head),
            "merged_difference": float((before - after).abs().max()),
        }

    def _merged_logits(self, base: Base, examples: Sequence[Any], head: TaskHead | None) -> Tensor:
        return self.logits(base, examples, None)

    def _latency_with(self, base: Base, entry: Entry, head: TaskHead | None) -> float:
        return self._latency(base, entry)


class LabelAssessor(Assessor):
    """Of classifiers: accuracy; forgetting as points of retrieval lost; latency of a batch of one row."""

    probe_samples = 2500
    forgetting_unit = "points"

    def _untouched_figures(self, base: Base) -> dict[str, Any]:
        """The base classifies by the nearest centroid, since it has no head."""
        with torch.no_grad(), self.accelerator.autocast():
            sets: dict[str, Sequence[Row]] = {"test": self.splits.test}
            sets |= {
                name: transfer_rows(self.recipe, self.splits.labels, name, self.samples)
                for name in self.recipe.transfer
            }
            self.watch("classifying by nearest centroid", 0.0)
            right = nearest_centroid(base, self.splits.train, sets, self.splits.labels)
        return {
            "correct": right["test"],
            "answers": [],
            "figures": {},
            "probes": self._probes(base, None),
            "forgetting_unit": self.forgetting_unit,
            "transfer": {name: sum(right[name]) / len(right[name]) for name in self.recipe.transfer},
        }

    @torch.no_grad()
    def logits(self, base: Base, examples: Sequence[Any], entry: Entry) -> Tensor:
        """Scores [B, labels]."""
        with self.accelerator.autocast():
            return scores(base, collate(base, examples), entry).float()

    def probe(self, base: Base, name: str, entry: Entry) -> float:
        """recall@10 of another sentence of the same document."""
        return retrieval_probe(base, read_all(name)[: self.samples], entry)

    def _merged_logits(self, base: Base, examples: Sequence[Any], head: TaskHead | None) -> Tensor:
        assert head is not None
        with torch.no_grad(), self.accelerator.autocast(), base.route(None):
            logits: Tensor = head(pool(base.hidden(collate(base, examples)), head.pooling)).float()
        return logits

    def _latency(self, base: Base, entry: Entry) -> float:
        head = adapter_head(adapter_of(base, entry)) if isinstance(entry, str) else None
        return self._latency_with(base, entry, head)

    def _latency_with(self, base: Base, entry: Entry, head: TaskHead | None) -> float:
        examples = self.read[_TEST][:_LATENCY_ROWS]
        batches = [collate(base, [example]) for example in examples]

        def call(index: int) -> None:
            with torch.no_grad(), self.accelerator.autocast(), base.route(entry):
                hidden = base.hidden(batches[index])
                if head is not None:
                    head(pool(hidden, head.pooling))
                if base.device.type == "cuda":
                    torch.cuda.synchronize()

        return median_ms(call, len(batches))


class TextAssessor(Assessor):
    """Of language models: the objective's own quality; forgetting as nats per token that the loss on general texts and
    on other tasks rose by; latency of one generated token at batch 1.
    """

    probe_samples = 200
    forgetting_unit = "nats"

    def _untouched_figures(self, base: Base) -> dict[str, Any]:
        return self._figures(base, None)

    @torch.no_grad()
    def logits(self, base: Base, examples: Sequence[Any], entry: Entry) -> Tensor:
        """Scores [B, vocabulary] of the token after each row."""
        batch, _ = collate_causal(base, examples)
        with self.accelerator.autocast():
            last = pool(hidden_states(base, batch, entry), "last")
            with base.route(entry):
                return base.logits(last[:, None])[:, 0]

    def prepare(self, tokenizer: PreTrainedTokenizerBase, say: Say) -> None:
        """The probes as well: whole texts, and the answers of tasks through the chat template."""
        super().prepare(tokenizer, say)
        for name in self.recipe.forgetting:
            if is_task(name):
                mine = self.recipe.objective
                reader: Causal = mine if isinstance(mine, Instruct) else Instruct()
                rows: list[Any] = rows_of(name, self.recipe.data, "dialogue")
            else:
                reader, rows = Pretrain(), read_all(name)
            longest = min(_PROBE_TOKENS, self.recipe.max_length)
            self.read[_probe(name)] = reader.examples(rows[: self.samples], tokenizer, (), longest)

    def probe(self, base: Base, name: str, entry: Entry) -> float:
        """Nats per token: of all tokens of texts, of the answers of a task."""
        size = self.recipe.training.per_device_eval_batch_size
        return row_figures(base, self.read[_probe(name)], entry, size).mean_loss

    def _latency(self, base: Base, entry: Entry) -> float:
        """Milliseconds per token, greedily and without a stop, the prompt's own pass included."""
        examples = self.read[_TEST][:_LATENCY_PROMPTS]
        times = []
        for example in [examples[0], *examples]:
            prompt = list(example.ids[: max(1, getattr(example, "prompt", len(example) // 2))])
            started = time.perf_counter()
            with self.accelerator.autocast():
                generate(base, [prompt], entry, max_new_tokens=_LATENCY_TOKENS)
            times.append((time.perf_counter() - started) / _LATENCY_TOKENS * 1000)
        return median(times[1:])


def _told(say: Say, name: str, line: str) -> None:
    say(f"{name}: {line}")


def _probe(name: str) -> str:
    return f"what is not trained: {name}"


def assessor(recipe: Recipe, splits: Splits, accelerator: Accelerator, watch: Callable[[str, float], None]) -> Assessor:
    """What measures a run of this recipe."""
    kind = LabelAssessor if recipe.objective.unit == "labelled" else TextAssessor
    return kind(recipe, splits, accelerator, watch)


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
        if is_task(name) and recipe.objective.unit != "labelled":
            rows_of(name, recipe.data, "dialogue")
        else:
            read_all(name)
    for name in recipe.transfer:
        transfer_rows(recipe, labels, name, 1)


def transfer_rows(recipe: Recipe, labels: tuple[str, ...], name: str, most: int) -> list[Any]:
    """Rows of another data set, for the same objective; those with labels must have the labels of training."""
    unit: Unit = recipe.objective.unit
    if unit != "labelled":
        return subset(rows_of(name, recipe.data, unit), most)
    labelled = read_rows(name, need_label=True)
    other = sorted({row.label or "" for row in labelled} - set(labels))
    if other:
        raise DataError(f"transfer: {name} has the label {other[0]!r}, training has {list(labels)}")
    return subset(labelled, most)
