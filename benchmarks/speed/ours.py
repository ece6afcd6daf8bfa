"""Graft's side: the pieces of a real run (src/graft/run.py), with the evaluation within it left out."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.speed import work as works
from benchmarks.speed.gauge import Clock, Counter, held_out, step_ms


def run(folder: Path, seed: int, assignments: Sequence[str] = ()) -> dict[str, Any]:
    """Train as `graft train` does and measure it; `assignments` go over the recipe."""
    from graft.build import build_adapter, load_for, prepare
    from graft.measure import PeakMemory
    from graft.model import load_tokenizer
    from graft.train.loop import Trainer
    from graft.train.points import Point

    work, _ = works.read(folder)
    recipe = work.recipe(folder, seed, assignments)
    splits = recipe.objective.load(recipe.data)
    accelerator, precision = prepare(recipe)
    device = accelerator.device
    tokenizer = load_tokenizer(recipe.model)
    train, validation = (
        recipe.objective.examples(rows, tokenizer, splits.labels, recipe.max_length)
        for rows in (splits.train, splits.validation)
    )
    base = load_for(recipe, precision, accelerator.device)
    adapter = build_adapter(recipe, recipe.method, base, splits.labels)
    memory = PeakMemory(base.device)
    counter = Counter(base.model.get_input_embeddings(), base.model.get_output_embeddings())
    peak: list[int] = []
    said: list[str] = []
    clock = Clock()

    def progress(phase: str, step: int, total: int) -> None:
        if phase == "evaluating":
            peak.append(memory.bytes())
            counter.on = False
            clock.pause()

    def record(point: Point) -> None:
        if point.quality is not None:
            clock.go_on()
            counter.on = True

    trainer = Trainer(
        base, adapter, recipe.objective, recipe.training, recipe.method.rate(base), recipe.seed, accelerator,
        record=record, progress=progress, engine=recipe.engine, say=said.append,
    )  # fmt: skip
    fitted = trainer.fit(train, validation)
    clock.stop()
    counter.on = False
    if fitted.examples != len(train):
        raise ValueError(f"{fitted.examples} rows were trained, not the {len(train)} of one pass")
    ends = [0.0, *(point.seconds for point in fitted.points)]
    steps = [after - before for before, after in itertools.pairwise(ends)]
    compiling = steps[0] - median(steps) if recipe.engine.compile is True else 0.0
    result = {
        "rows": fitted.examples,
        "steps": fitted.steps,
        "useful_tokens": sum(len(example) for example in train),
        "padded_tokens": counter.padded or None,
        "head_positions": counter.head or None,
        "supervised": int(recipe.objective.weight(train)) if work.kind == "chat" else None,
        "seconds": clock.seconds() - compiling,
        "compile_seconds": compiling,
        "step_ms": step_ms(steps),
        "peak_bytes": peak[-1],
        "trainable": adapter.trainable_count(),
        "format": precision.name,
        "recipe": list(assignments),
        "said": said,
    }
    rows = works.read_ids(folder, "test")
    return result | (_held_out(recipe, splits.labels, adapter, rows, device) if rows else {})


def _held_out(
    recipe: Any, labels: tuple[str, ...], adapter: Any, rows: Sequence[dict[str, Any]], device: torch.device
) -> dict[str, float]:
    """The trained tensors in a base that is loaded anew, in fp32."""
    from graft.build import ADAPTER, build_adapter
    from graft.model import load_base
    from graft.parts.attach import hidden_states
    from graft.parts.head import scores

    fresh = load_base(recipe.model)
    fresh.model.to(device)
    copy = build_adapter(recipe, recipe.method, fresh, labels)
    with torch.no_grad():
        trained = dict(adapter.named_tensors())
        for name, tensor in copy.named_tensors():
            tensor.copy_(trained[name])
    fresh.model.eval()
    copy.eval()

    def logits_of(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch = {"input_ids": ids, "attention_mask": mask}
        if labels:
            return scores(fresh, batch, ADAPTER)
        states = hidden_states(fresh, batch, ADAPTER).last
        with fresh.route(ADAPTER):
            return fresh.logits(states)

    return held_out(rows, logits_of, int(fresh.config.pad_token_id or 0), device)
