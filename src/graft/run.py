"""One run: a recipe becomes a folder with an adapter and its figures."""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from graft.assess import Assessor, assessor, by_rank, check_probes
from graft.build import ADAPTER, build_adapter, check_positions, head_parameters, load_for, prepare
from graft.data.load import Splits, read_rows, rows_of
from graft.diagnosis.curve import Facts
from graft.diagnosis.runs import facts_of
from graft.errors import DamagedError, RecipeError, UsageError
from graft.files import write_json, write_text
from graft.measure import PeakMemory, environment
from graft.methods import store
from graft.methods.base import Method, check_pairs
from graft.model import Base, load_tokenizer
from graft.objectives.base import Example
from graft.parts.attach import detach
from graft.parts.base import Adapter
from graft.planning.catalogue import config_of
from graft.planning.preflight import Forecast, forecast
from graft.planning.simulate import Rows
from graft.quantize import described, require_bitsandbytes
from graft.recipe import Recipe
from graft.runfolder import BAD_BATCH, RunFolder, find_run
from graft.stats import interval
from graft.train import checkpoint
from graft.train.loop import Trainer
from graft.train.points import Fit, Point
from graft.train.precision import Precision

Watch = Callable[[str, float], None]
"""Called with what a run is doing and the share of the whole run that is done, 0 to 1."""

_TRAINED = 0.75
"""Share of a run that is over after training: only the bar depends on it."""


@dataclass
class _Run:
    """What the steps of one run share."""

    recipe: Recipe
    folder: RunFolder
    precision: Precision
    accelerator: Accelerator
    splits: Splits
    watch: Watch

    def say(self, line: str) -> None:
        """Keep a line in the log."""
        self.folder.append("log.txt", line)


def execute(
    recipe: Recipe, path: Path, watch: Watch | None = None, say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Run a recipe in a folder and return the content of its report.json.

    A folder that holds this very run, finished, is left as it is. With `method: null` the untouched base is measured.
    Raises the errors of its parts; the folder's status.json then has the cause, or there is no folder when the input
    was bad.
    """
    folder = RunFolder(path)
    check_pairs([recipe.method] if recipe.method is not None else [], recipe.model, recipe.objective.refuses)
    if recipe.quantization is not None:
        require_bitsandbytes()
    splits = recipe.objective.load(recipe.data)
    check_probes(recipe, splits.labels)
    with folder.open(recipe.resolved(), recipe.to_yaml()) as fresh:
        if not fresh:
            folder.check_data(splits.sha256)
            if say:
                say(f"{path} holds this run, finished; change a setting or give another folder with -o to train again")
            return folder.read("report.json")

        def tell(phase: str, fraction: float) -> None:
            folder.status("running", phase=phase, fraction=round(fraction, 4))
            if watch:
                watch(phase, fraction)

        try:
            accelerator, precision = prepare(recipe)
            run = _Run(recipe, folder, precision, accelerator, splits, tell)
            report = (
                _measure_base(run) if recipe.method is None else _train(run, recipe.method, say or (lambda _: None))
            )
            write_json(path / "report.json", report)
            folder.status("done", fraction=1.0)
            for step in checkpoint.steps(path / "checkpoints"):
                checkpoint.remove(checkpoint.at(path / "checkpoints", step))
        except BaseException as error:
            started = (path / "metrics.jsonl").exists()
            if isinstance(error, UsageError | DamagedError) and not started:
                folder.discard()  # bad input leaves nothing behind: corrected, it can go to the same folder
            else:
                folder.fail(error)
            raise
    return report


def _record_environment(run: _Run, base: Base, train: Sequence[Any], validation: Sequence[Any]) -> None:
    data = {"sha256": run.splits.sha256, "notes": list(run.splits.notes)}
    data |= {"rows": {"train": len(train), "validation": len(validation)}, "labels": list(run.splits.labels)}
    model = {"name": base.name, "fingerprint": base.fingerprint, "parameters": base.parameter_count()}
    model |= {} if base.quantization is None else {"quantization": base.quantization}
    machine = environment() | {"dtype": run.precision.name, "dtype_reason": run.precision.reason}
    write_json(run.folder.path / "env.json", {"machine": machine, "model": model, "data": data})


def _tell_of_data(run: _Run, tell: Callable[[str], None]) -> None:
    """What was noticed when the data was read, and the rows that could not be."""
    for note in run.splits.notes:
        tell(note)
    if run.splits.skipped:
        lines = (json.dumps(asdict(fault), ensure_ascii=False) + "\n" for fault in run.splits.skipped)
        write_text(run.folder.path / "skipped.jsonl", "".join(lines))


def _read_rows(run: _Run, tell: Callable[[str], None]) -> tuple[list[Any], list[Any], Assessor]:
    """The training and validation rows as the objective reads them, and what will measure the rest.

    Before the weights: rows that would train nothing are found in a second, a base may take minutes.
    """
    run.watch("reading the rows", 0.0)
    _tell_of_data(run, tell)
    tokenizer = load_tokenizer(run.recipe.model)
    read = partial(run.recipe.objective.examples, tokenizer=tokenizer, labels=run.splits.labels)
    train = read(run.splits.train, max_length=run.recipe.max_length, say=tell)
    validation = read(
        run.splits.validation, max_length=run.recipe.max_length, say=lambda line: run.say(f"validation rows: {line}")
    )
    measuring = assessor(
        run.recipe,
        run.splits,
        run.accelerator,
        lambda phase, share: run.watch(phase, _TRAINED + (1 - _TRAINED) * share),
    )
    measuring.prepare(tokenizer, run.say)
    return train, validation, measuring


def _train(run: _Run, method: Method, say: Callable[[str], None]) -> dict[str, Any]:
    def tell(line: str) -> None:
        run.say(line)
        say(line)

    start = _start(run, tell)
    train, validation, measuring = _read_rows(run, tell)
    expected = _forecast(run, method, train)
    run.watch("loading the base", 0.0)
    base = load_for(run.recipe, run.precision, run.accelerator.device)
    if start is not None:
        _same_base(run, base)
    _record_environment(run, base, train, validation)
    adapter = build_adapter(run.recipe, method, base, run.splits.labels)
    check_positions(base, adapter, run.recipe.max_length)
    for line in preflight(method, base, adapter, train, run.precision):
        tell(line)
    if run.recipe.training.preflight:  # said now: a fault of the base or of the settings is one line
        for line in ["what it takes cannot be predicted"] if expected is None else expected.lines:
            tell(line)
    facts = facts_of(
        run.recipe.resolved(),
        peak_rate=method.rate(base),
        parameters=base.parameter_count(),
        classes=len(run.splits.labels) or None,
        train_rows=len(train),
        validation_rows=len(validation),
        dtype=run.precision.name,
    )
    memory = PeakMemory(base.device)
    trainer = _trainer(run, method, base, adapter, start, expected, facts, tell)
    fitted = trainer.fit(train, validation)
    peak, rows_of_pass = memory.bytes(), trainer.pass_rows
    run.recipe.objective.finish(base, adapter)
    saved = _save(run, base, adapter, say)
    reference = measuring.logits(base, validation[:8], ADAPTER)
    trainable = adapter.trainable_count()
    total = base.parameter_count() + sum(parameter.numel() for parameter in head_parameters(adapter))
    detach(base, ADAPTER)
    del base, adapter, trainer
    fresh = load_for(run.recipe, run.precision, run.accelerator.device)
    adapter = store.load(fresh, saved, ADAPTER)
    _check_reloaded(reference, measuring.logits(fresh, validation[:8], ADAPTER), saved)
    figures = measuring.adapter(fresh, adapter, method.mergeable)
    return _quality(run, figures) | {
        "method": method.name,
        "trainable_parameters": trainable,
        "trainable_fraction": trainable / total,
        "peak_memory_bytes": peak,
        "expected_memory_bytes": None if expected is None else expected.memory,
        "train_seconds": fitted.seconds,
        "expected_seconds": None if expected is None else expected.seconds,
        "pass_rows": rows_of_pass,
        "examples_per_second": fitted.examples / fitted.seconds,
        "adapter_bytes": store.size(saved),
        "learning_rate": method.rate(fresh),
        "curve": _curve(fitted),
        "best_step": fitted.best_step,
        "steps": fitted.steps,
    }


def _trainer(
    run: _Run,
    method: Method,
    base: Base,
    adapter: Adapter,
    start: Path | None,
    expected: Forecast | None,
    facts: Facts,
    tell: Callable[[str], None],
) -> Trainer:
    """The training loop, writing into the run's folder; from the checkpoint `start` on, if there is one."""

    def record(point: Point) -> None:
        run.folder.append("metrics.jsonl", json.dumps(asdict(point), ensure_ascii=False))
        for line in evaluation_lines(point, run.recipe.objective.metric):
            tell(line)

    earlier: list[Point] = []
    if start is not None:
        done = checkpoint.check(start)["step"]
        earlier = [Point(**given) for given in run.folder.points(done)]
        run.folder.points(done, BAD_BATCH)
    return Trainer(
        base,
        adapter,
        run.recipe.objective,
        run.recipe.training,
        rate=method.rate(base),
        seed=run.recipe.seed,
        accelerator=run.accelerator,
        checkpoints=run.folder.path / "checkpoints",
        record=record,
        progress=lambda phase, step, total: run.watch(f"{phase}, step {step} of {total}", _TRAINED * step / total),
        engine=run.recipe.engine,
        say=tell,
        pass_rows=0 if expected is None else expected.pass_rows,
        start=start,
        earlier=earlier,
        facts=facts,
        bad_batch=run.folder.path / BAD_BATCH,
    )


def _save(run: _Run, base: Base, adapter: Adapter, say: Callable[[str], None]) -> Path:
    """Write the adapter to its folder, which is returned, and tell of what vLLM would not serve."""
    run.watch("saving the adapter", _TRAINED)
    saved = run.folder.path / "adapter"
    unserved = store.save(adapter, base, saved, template=run.recipe.objective.template(base.tokenizer))
    if unserved:
        run.say(f"vLLM cannot serve the adapter: {unserved}")
        if base.family.kind == "decoder":
            say(f"vLLM cannot serve the adapter: {unserved}")
    return saved


def _start(run: _Run, tell: Callable[[str], None]) -> Path | None:
    """Where a run that was ended early goes on; None for one that begins. Raises `DataError` for changed data."""
    found = checkpoint.newest(run.folder.path / "checkpoints", tell)
    if found is None:
        run.folder.clear()
        return None
    run.folder.check_data(run.splits.sha256)
    tell(f"going on behind step {checkpoint.check(found)['step']}")
    return found


def _same_base(run: _Run, base: Base) -> None:
    before = run.folder.read("env.json").get("model", {}).get("fingerprint")
    if before != base.fingerprint:
        raise RecipeError(
            f"the weights of {base.name} have changed since {run.folder.path} was begun",
            "choose another folder with -o",
        )


def _forecast(run: _Run, method: Method, train: Sequence[Any]) -> Forecast | None:
    """What the run is expected to take, before its base is loaded."""
    if not run.recipe.training.preflight or run.accelerator.num_processes > 1:
        return None
    run.watch("planning", 0.0)
    rows = Rows(train, [], run.splits.labels)
    return forecast(run.recipe, method, config_of(run.recipe.model), run.precision, rows)


def preflight(
    method: Method, base: Base, adapter: Adapter, train: Sequence[Example], precision: Precision
) -> list[str]:
    """What a run is about to do, in lines."""
    count = adapter.trainable_count()
    total = base.parameter_count() + sum(parameter.numel() for parameter in head_parameters(adapter))
    roles: dict[str, int] = {}
    for site, _ in adapter.placed:
        roles[site.role] = roles.get(site.role, 0) + 1
    lengths = sorted(len(example) for example in train)
    sites = ", ".join(f"{number} × {role}" for role, number in roles.items())
    lines = [
        f"{method.name} on {base.name}: {count:,} of {total:,} parameters train ({count / total:.2%}), "
        f"at {sites}" + ("" if adapter.head is None else ", and the head"),
        f"{len(train):,} rows of {lengths[len(lengths) // 2]} tokens in the median, {lengths[-1]} at most",
        f"peak learning rate {method.rate(base):g}; {precision}",
    ]
    if base.quantization is not None:
        lines.append(described(base))
    if base.fresh:
        lines.append(f"not in the checkpoint, so started at random: {', '.join(base.fresh)}")
    return lines


def evaluation_lines(point: Point, metric: str) -> list[str]:
    """An evaluation within a run, in lines: its figures, and the answers to the same few prompts each time."""
    if point.quality is None:
        return []
    figures = {"loss": f"{point.validation_loss:.3f}", metric: f"{point.quality:.1%}"}
    if "ended" in point.figures:
        figures["answers that ended"] = f"{point.figures['ended']:.0%}"
    figures |= {name: f"{value:.3g}" for name, value in point.watched.items()}
    lines = [f"step {point.step}: " + ", ".join(f"{name} {value}" for name, value in figures.items())]
    for sample in point.samples:
        asked, said, wanted = (_short(sample[key]) for key in ("prompt", "answer", "reference"))
        lines.append(f"  {asked} -> {said}" + ("" if said == wanted else f" (wanted {wanted})"))
    return lines


def _short(text: str, most: int = 40) -> str:
    """The end of a text on one line: questions end with what is asked."""
    line = " ".join(text.split())
    return repr(line if len(line) <= most else "…" + line[1 - most :])


def _check_reloaded(before: torch.Tensor, after: torch.Tensor, folder: Path) -> None:
    difference = float((before - after).abs().max())
    # The prefix projection is folded when saved, in fp32; everything else is the same tensors and the same products.
    if not difference <= 1e-2 * max(1.0, float(before.abs().max())):
        raise DamagedError(f"{folder}: reloaded, the adapter's scores differ by {difference:.3g}", "please report this")


def _curve(fitted: Fit) -> list[dict[str, Any]]:
    """Some 25 points of the learning curve, each with the mean loss since the one before, and all evaluations."""
    width = math.ceil(len(fitted.points) / 25)
    curve: list[dict[str, Any]] = []
    losses: list[float] = []
    for point in fitted.points:
        losses += [point.train_loss] if math.isfinite(point.train_loss) else []  # others changed nothing
        if losses and (point.quality is not None or point.step % width == 0):
            curve.append(_curve_point(point, sum(losses) / len(losses)))
            losses = []
    return curve


def _curve_point(point: Point, loss: float) -> dict[str, Any]:
    return {
        "step": point.step,
        "examples": point.examples,
        "train_loss": loss,
        "validation_quality": point.quality,
    }


def _measure_base(run: _Run) -> dict[str, Any]:
    run.folder.clear()
    run.watch("reading the rows", 0.0)
    _tell_of_data(run, run.say)
    measuring = assessor(run.recipe, run.splits, run.accelerator, run.watch)
    measuring.prepare(load_tokenizer(run.recipe.model), run.say)
    run.watch("loading the base", 0.0)
    base = load_for(run.recipe, run.precision, run.accelerator.device)
    check_positions(base, None, run.recipe.max_length)
    _record_environment(run, base, run.splits.train, run.splits.validation)
    figures = measuring.untouched(base)
    expected = ("expected_memory_bytes", "expected_seconds", "pass_rows")
    costs = dict.fromkeys(("peak_memory_bytes", "train_seconds", "examples_per_second", "learning_rate", *expected))
    nothing = {"trainable_parameters": 0, "trainable_fraction": 0.0, "adapter_bytes": 0, "curve": [], "by_rank": {}}
    return _quality(run, figures) | {"method": "base"} | costs | nothing


def _quality(run: _Run, figures: dict[str, Any]) -> dict[str, Any]:
    """The figures, with the interval of the quality; which rows were right goes to a file of its own."""
    correct = figures.pop("correct")
    write_json(run.folder.path / "correct.json", {"correct": correct})
    answers = figures.pop("answers")
    if answers:
        lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        write_text(run.folder.path / "answers.jsonl", lines)
    measured = interval([correct])
    told = {"metric": run.recipe.objective.metric}
    return figures | told | {"quality": measured.mean, "quality_low": measured.low, "quality_high": measured.high}


def stop_with(parent: int | None) -> None:
    """End this run when the process that started it is gone: a killed comparison must leave nothing running."""
    if parent is not None and os.getppid() != parent:
        raise KeyboardInterrupt


def _other_rows(recipe: Recipe, source: str) -> list[Any]:
    unit = recipe.objective.unit
    if unit == "labelled":
        return list(read_rows(source, recipe.data.columns, need_label=True))
    return rows_of(source, recipe.data, unit)


def evaluate_run(path: Path, data: str | None = None, watch: Watch | None = None) -> dict[str, Any]:
    """Evaluate a finished run's adapter, read from disk, on its test rows or on the labelled rows of `data`."""
    found = find_run(path)
    recipe = Recipe.parse(found.recipe(), str(found.path / "recipe.yaml"))
    if recipe.method is None:
        raise RecipeError(f"{path} measured the untouched base, so it has no adapter to evaluate")
    splits = recipe.objective.load(recipe.data)
    if data is None:
        found.check_data(splits.sha256)
    rows = splits.test if data is None else _other_rows(recipe, data)
    accelerator, precision = prepare(recipe)
    base = load_for(recipe, precision, accelerator.device)
    adapter = store.load(base, found.path / "adapter", ADAPTER)
    assert base.tokenizer is not None
    examples = recipe.objective.examples(rows, base.tokenizer, splits.labels, recipe.max_length)
    size = recipe.training.per_device_eval_batch_size
    with accelerator.autocast():
        result = recipe.objective.evaluate(base, examples, ADAPTER, size, watch)
        ranks = by_rank(adapter, lambda: recipe.objective.evaluate(base, examples, ADAPTER, size).quality)
    measured = interval([result.correct])
    return {
        "run": str(path),
        "data": data or recipe.data.test or f"{recipe.data.train} (test)",
        "rows": len(result.correct),
        "metric": recipe.objective.metric,
        "quality": measured.mean,
        "quality_low": measured.low,
        "quality_high": measured.high,
        "loss": result.loss,
        "figures": result.figures,
        "by_rank": ranks,
    }
