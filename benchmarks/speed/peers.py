"""The peers' sides: peft with transformers' Trainer, and trl's SFTTrainer, on the same ids."""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import work as works
from benchmarks.speed.configs import task_model, tuned
from benchmarks.speed.gauge import Clock, Counter, held_out, step_ms
from benchmarks.speed.work import Work

_POOL = 50
"""Batches that a length-grouping sampler sorts together in a long run; it takes fewer of a short one."""


@dataclass(frozen=True)
class Variant:
    """How a peer trains: `library:weights:products:batches`, as in `trainer:bf16:autocast:length`.

    library trainer or trl; weights the format the base is loaded in, fp32 or bf16; products `plain` (in the weights'
    format) or `autocast` (bf16=True); batches `random` (padded to the longest of the batch), `length` (rows of like
    length together), `widest` (all padded to max_length), `flat` (the batch's rows joined, trl's padding_free) or
    `packed` (rows joined up to a length, trl's packing); `:compiled` behind it is torch_compile=True.
    """

    library: str
    weights: str
    products: str
    batches: str
    compiled: bool = False

    @classmethod
    def read(cls, text: str) -> "Variant":
        """A variant from its spelling."""
        library, weights, products, batches, *more = text.split(":")
        return cls(library, weights, products, batches, "compiled" in more)

    @property
    def dtype(self) -> torch.dtype:
        """The weights' format."""
        return torch.bfloat16 if self.weights == "bf16" else torch.float32


class _Useful:
    """Tokens that are no padding, and positions with a loss, in the calls of a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.on = True
        self._tokens: list[Any] = []
        self._supervised: list[Any] = []
        model.register_forward_pre_hook(self._called, with_kwargs=True)

    def _called(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.on:
            return
        # Summed up later: reading a number would make a GPU finish first.
        mask = kwargs.get("attention_mask")
        self._tokens.append(kwargs["input_ids"].numel() if mask is None else mask.sum())
        labels = kwargs.get("labels")
        if labels is not None and labels.dim() == 2:
            self._supervised.append((labels[:, 1:] != -100).sum())

    @property
    def tokens(self) -> int:
        """Tokens that are no padding."""
        return sum(int(count) for count in self._tokens)

    @property
    def supervised(self) -> int:
        """Positions with a loss."""
        return sum(int(count) for count in self._supervised)


def run(folder: Path, seed: int, spelling: str) -> dict[str, Any]:
    """Train one variant and measure it."""
    from transformers import set_seed

    from graft.measure import PeakMemory

    work, told = works.read(folder)
    variant = Variant.read(spelling)
    set_seed(seed)
    rows = works.read_ids(folder, "train")
    trainer, clocked = build_trainer(work, told, variant, folder, rows, seed)
    model = trainer.model
    result: dict[str, Any] = {}
    if variant.batches in ("flat", "packed"):
        result["rows_apart"] = rows_apart(trainer)
    watched = None if variant.compiled else (Counter(*_ends(model)), _Useful(model))
    memory = PeakMemory(model.device)
    clock = clocked.clock = Clock()
    trainer.train()
    clock.stop()
    peak = memory.bytes()
    marks = [clock.started, *clock.steps]
    result |= {
        "rows": len(rows),
        "steps": trainer.state.global_step,
        "useful_tokens": sum(len(row["input_ids"]) for row in rows),
        "padded_tokens": None,
        "head_positions": None,
        "supervised": None,
        "seconds": clock.seconds(),
        "step_ms": step_ms([after - before for before, after in itertools.pairwise(marks)]),
        "peak_bytes": peak,
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "format": f"{variant.weights} weights" + (", bf16 products" if variant.products == "autocast" else ""),
        "variant": spelling,
    }
    if watched is not None:
        counter, useful = watched
        counter.on = useful.on = False
        result |= {
            "useful_tokens": useful.tokens,
            "padded_tokens": counter.padded,
            # trl multiplies by the head's weight itself, at supervised positions only.
            "head_positions": counter.head or useful.supervised or None,
            "supervised": useful.supervised or None,
        }
    held = works.read_ids(folder, "test")
    return result | (_held_out(work, told, model, held) if held else {})


def _ends(model: Any) -> tuple[torch.nn.Module, torch.nn.Module | None]:
    """The embedding table and the output head; a classifier has none that counts."""
    return model.get_input_embeddings(), model.get_output_embeddings()


def _held_out(work: Work, told: dict[str, Any], model: Any, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The trained tensors in a model that is loaded anew, in fp32."""
    fresh = tuned(task_model(work, told, torch.float32), work, 1)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    _, surplus = fresh.load_state_dict({name: value.detach().float() for name, value in trained.items()}, strict=False)
    if surplus:
        raise ValueError(f"{len(surplus)} trained tensors have no place in a fresh model, first {surplus[0]}")
    fresh.to(model.device).eval()
    filler = int(fresh.config.pad_token_id or 0)
    return held_out(rows, lambda ids, mask: fresh(input_ids=ids, attention_mask=mask).logits, filler, model.device)


# Trainers ------------------------------------------------------------------------------------------


def build_trainer(
    work: Work, told: dict[str, Any], variant: Variant, folder: Path, rows: list[dict[str, Any]], seed: int
) -> tuple[Any, Any]:
    """The trainer of a variant, and the callback that its clock goes to."""
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, DataCollatorWithPadding, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(told["path"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    steps = -(-len(rows) // work.batch)
    given = {
        "output_dir": str(folder / "out"),
        "num_train_epochs": 1,
        "per_device_train_batch_size": work.batch,
        "learning_rate": work.rate,
        "weight_decay": works.WEIGHT_DECAY,
        "warmup_steps": works.warmup_steps(len(rows), work.batch),
        "lr_scheduler_type": "linear",
        "seed": seed,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": variant.products == "autocast",
        "torch_compile": variant.compiled,
        "train_sampling_strategy": "group_by_length" if variant.batches == "length" else "random",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    watcher = _watcher(steps)
    if variant.library == "trl":
        return _trl(work, told, variant, given, rows, tokenizer, watcher), watcher
    model = tuned(task_model(work, told, variant.dtype), work, steps)
    if work.kind == "chat":
        collate: Any = DataCollatorForSeq2Seq(tokenizer)
    elif variant.batches == "widest":
        collate = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=work.max_length)
    else:
        collate = DataCollatorWithPadding(tokenizer)
    trainer = _long_pools(Trainer)(
        model=model, args=TrainingArguments(**given), train_dataset=[_with_mask(row) for row in rows],
        data_collator=collate, processing_class=tokenizer, callbacks=[watcher],
    )  # fmt: skip
    return trainer, watcher


def _with_mask(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "attention_mask": [1] * len(row["input_ids"])}


def _trl(
    work: Work, told: dict[str, Any], variant: Variant, given: dict[str, Any], rows: list[dict[str, Any]],
    tokenizer: Any, watcher: Any,
) -> Any:  # fmt: skip
    """trl's SFTTrainer; its answers-only loss comes with the labels, as when it tokenizes prompt and completion."""
    os.environ["HF_DATASETS_CACHE"] = given["output_dir"]
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    more: dict[str, Any] = {"gradient_checkpointing": False, "max_length": None}
    if variant.batches == "flat":
        more |= {"padding_free": True}
    elif variant.batches == "packed":
        # Packs of as many tokens as a batch has, so that the number of steps stays about the same.
        lengths = [len(row["input_ids"]) for row in rows]
        room = max(max(lengths), round(work.batch * sum(lengths) / len(lengths)))
        more |= {"packing": True, "max_length": room, "per_device_train_batch_size": 1}
    model = tuned(task_model(work, told, variant.dtype), work, 1)
    return _long_pools(SFTTrainer)(
        model=model, args=SFTConfig(**{**given, **more}), train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, callbacks=[watcher],
    )  # fmt: skip


def _watcher(steps: int) -> Any:
    """A callback that tells a clock of each step; AdaLoRA's allocation is done there, as peft's guide has it."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        clock: Clock | None = None

        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
            allocate = getattr(getattr(model, "base_model", None), "update_and_allocate", None)
            if allocate is not None:
                allocate(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if self.clock is not None:
                self.clock.step()

    return Watcher()


def _long_pools(trainer: type) -> type:
    """A trainer whose length grouping sorts pools of 50 batches, as it does in runs of 200 batches and more.

    With fewer rows its pools are a quarter of them: a short benchmark would charge it padding that a real run has not.
    The batches then come in random order, not the longest first, so that the steps left out of the median are like the
    others.
    """
    from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

    class Sampler(LengthGroupedSampler):
        def __iter__(self) -> Any:
            rows = get_length_grouped_indices(self.lengths, self.batch_size, mega_batch_mult=_POOL)
            batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
            return iter([row for place in torch.randperm(len(batches)).tolist() for row in batches[place]])

    class Pooled(trainer):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            sampler = super()._get_train_sampler(train_dataset)
            if isinstance(sampler, LengthGroupedSampler):
                sampler.__class__ = Sampler
            return sampler

    return Pooled


@torch.no_grad()
def rows_apart(trainer: Any) -> float:
    """The largest difference of the first joined rows' logits to those of each row alone, relative to their size.

    Raises `ValueError` where rows that were joined see each other.
    """
    model = trainer.model
    data = trainer.train_dataset
    batch = trainer.data_collator([data[row] for row in range(min(len(data), 2))])
    ids, positions = batch["input_ids"].to(model.device), batch["position_ids"].to(model.device)
    model.eval()
    joined = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].float()
    starts = [*(positions[0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
    if len(starts) < 3:
        raise ValueError("no two rows were joined")
    largest = 0.0
    for first, last in itertools.pairwise(starts):
        alone = model(input_ids=ids[:, first:last], use_cache=False).logits[0].float()
        largest = max(largest, float((alone - joined[first:last]).abs().max() / alone.abs().max()))
    model.train()
    if largest > 0.1:
        raise ValueError(f"joined rows see each other: logits differ by {largest:.2g} of their size")
    return largest
