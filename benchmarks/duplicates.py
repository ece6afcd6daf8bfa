"""Do duplicated training rows make a model repeat itself, and does cleaning repair it? Written to docs/claims.md.

    OMP_NUM_THREADS=1 python benchmarks/duplicates.py runs/duplicates
    python benchmarks/duplicates.py runs/trial --rows 16 --copies 3 --seeds 1 --prompts 6   # a look at the cost

Six conditions, all LoRA on plain film reviews with the same settings:

    base       no training
    copies     N rows, each in the file `copies` times, one epoch
    spread     that file too, but a step's rows are drawn without regard to their length
    cleaned    that file through `graft data clean`: N rows, one epoch
    different  as many rows as `copies` has, all of them different, one epoch
    epochs     the N rows of `cleaned` for as many steps as `copies` takes

The last step counts, not the best one: choosing the step by the validation loss would hide what is asked for. Finished
trainings and measurements are kept in the folder, so a run that was stopped goes on. All figures go to
FOLDER/duplicates.json, and with `--keep` also to docs/results/duplicates.json. `base` and `spread` have one seed.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from repetition import copied, doubled, longest_run, repeated, runs_of, summary, variety, words

KEPT = Path(__file__).parents[1] / "docs" / "results" / "duplicates.json"
CONDITIONS = ("base", "copies", "spread", "cleaned", "different", "epochs")
ONCE = ("base", "spread")
"""Conditions of the first seed only."""
BATCH = 8
PROMPT_WORDS = 5
NEW_TOKENS = 64
SAMPLES = 8
SAMPLED_PROMPTS = 10
HELD = 150
TEMPERATURE = 0.7


# Rows ----------------------------------------------------------------------------------------------


def write_data(folder: Path, rows: int, copies: int) -> dict[str, list[str]]:
    """The files of all conditions; returns the texts of each, and `held` for texts that no condition trains on."""
    from graft import assets
    from graft.data.load import read_rows, subset

    source = assets.folder("movie-reviews")
    fit = {
        split: [row for row in read_rows(str(source / f"{split}.jsonl")) if 18 <= len(words(row.text)) <= 45]
        for split in ("train", "validation", "test")
    }
    chosen = [row.text for row in subset(fit["train"], rows * copies)]
    few = [row.text for row in subset(fit["train"], rows)]
    data = {
        "copies": [text for text in few for _ in range(copies)],
        "different": chosen,
        "validation": [row.text for row in subset(fit["validation"], 24)],
        "held": [row.text for row in subset(fit["test"], HELD)],
        "test": [row.text for row in subset(fit["test"], 24)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in data.items():
        _write_rows(folder / f"{name}.jsonl", texts)
    clean = [str(Path(sys.executable).parent / "graft"), "data", "clean", str(folder / "copies.jsonl")]
    subprocess.run([*clean, "-o", str(folder / "cleaned.jsonl"), "--force"], check=True)
    data["cleaned"] = [json.loads(line)["text"] for line in (folder / "cleaned.jsonl").read_text("utf-8").splitlines()]
    assert data["cleaned"] == few, "graft data clean has to give back the rows as they were before they were copied"
    return data | {"epochs": data["cleaned"], "spread": data["copies"]}


def _write_rows(path: Path, texts: Sequence[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")


def recipe(folder: Path, condition: str, seed: int, copies: int) -> Any:
    """The recipe of one training: all conditions but `epochs` see each row of their file once."""
    from graft.recipe import Recipe

    file = {"epochs": "cleaned", "spread": "copies"}.get(condition, condition)
    return Recipe.parse(
        {
            "model": "smollm2-135m",
            "objective": "pretrain",
            "data": {
                "train": str(folder / f"{file}.jsonl"),
                "validation": str(folder / "validation.jsonl"),
                "test": str(folder / "test.jsonl"),
                "max_length": 128,
            },
            "method": {"name": "lora", "r": 16, "target_modules": "all-linear", "learning_rate": 1e-3},
            "training": {
                "num_train_epochs": copies if condition == "epochs" else 1,
                "per_device_train_batch_size": BATCH,
                "load_best_model_at_end": False,
            },
            "forgetting": [],
            "seed": seed,
        }
    )


# Measuring -----------------------------------------------------------------------------------------


class Bench:
    """One base for all measurements, and the prompts."""

    def __init__(self, data: dict[str, list[str]], prompts: int) -> None:
        import torch

        from graft.model import load_base
        from graft.rendering.render import Renderer
        from graft.train.loop import make_accelerator
        from graft.train.precision import choose

        precision = choose("auto", torch.device("cpu"))
        self.data = data
        self.accelerator = make_accelerator(precision.name)
        self.base = load_base("smollm2-135m", dtype=precision.dtype)
        self.precision = precision
        self.renderer = Renderer(self.base.tokenizer)
        self.prompts = {
            "held-out": [_first_words(text) for text in data["held"][:prompts]],
            "training": [_first_words(text) for text in data["cleaned"][: prompts * 2 // 3]],
        }

    def measure(self, condition: str, adapter: Path | None) -> dict[str, Any]:
        """All figures of one training, by prompt and by text."""
        from graft.methods import store
        from graft.parts.attach import detach

        entry = None
        if adapter is not None:
            store.load(self.base, adapter, "measured")
            entry = "measured"
        trained = self.data["cleaned" if condition == "base" else condition]
        with self.accelerator.autocast():
            found = {
                "held_loss": self._losses(self.data["held"], entry),
                "train_loss": self._losses(self.data["cleaned"], entry),
            }
            for name, prompts in self.prompts.items():
                found[name] = self._greedy(prompts, entry, runs_of(trained))
            found["doubled"] = [float(doubled(text)) for name in self.prompts for text in found[name]["texts"]]
            found["sampled"] = self._sampled(self.prompts["held-out"][:SAMPLED_PROMPTS], entry)
        if entry is not None:
            detach(self.base, entry)
        return found

    def _losses(self, texts: Sequence[str], entry: str | None) -> list[float]:
        """Nats per token of each text."""
        from graft.data.rows import Row
        from graft.objectives.causal import row_figures
        from graft.objectives.pretrain import Pretrain

        rows = [Row(text, None, None, str(number), str(number)) for number, text in enumerate(texts)]
        pieces = Pretrain().examples(rows, self.base.tokenizer, (), 128)
        figures = row_figures(self.base, pieces, entry, 32)
        return [float(value) for value in figures.loss / figures.tokens]

    def _answers(self, prompts: Sequence[str], entry: str | None, sampling: Any) -> list[list[int]]:
        from graft.generate import answer_all

        ids = [self.renderer.text(prompt)[:-1] for prompt in prompts]  # without the end-of-text token
        return [a.ids for a in answer_all(self.base, ids, entry, max_new_tokens=NEW_TOKENS, sampling=sampling)]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.base.tokenizer.decode(ids, skip_special_tokens=True))

    def _own(self, ids: Sequence[int]) -> list[int]:
        """The ids before the first end of text or turn."""
        stops = [place for place, token in enumerate(ids) if token in self.renderer.stop_ids]
        return list(ids[: stops[0]] if stops else ids)

    def _greedy(self, prompts: Sequence[str], entry: str | None, known: set[tuple[str, ...]]) -> dict[str, Any]:
        from graft.sampling import GREEDY

        answers = self._answers(prompts, entry, GREEDY)
        own = [self._own(ids) for ids in answers]
        texts = [self._text(ids) for ids in answers]
        return {
            "repeated_3": [repeated(ids, 3) for ids in answers],
            "repeated_4": [repeated(ids, 4) for ids in answers],
            "repeated_4_to_end": [repeated(ids, 4) for ids in own],
            "ended": [float(len(mine) < len(ids)) for mine, ids in zip(own, answers, strict=True)],
            "copied": [float(copied(text, known)) for text in texts],
            "longest": [longest_run(text, self.data["cleaned"]) for text in texts],
            "texts": texts,
        }

    def _sampled(self, prompts: Sequence[str], entry: str | None) -> dict[str, Any]:
        """By prompt: the share of different ones among `SAMPLES` samples up to their end."""
        from graft.sampling import Sampling

        drawn = self._answers([p for p in prompts for _ in range(SAMPLES)], entry, Sampling(TEMPERATURE, seed=1))
        texts = [self._text(self._own(ids)) for ids in drawn]
        groups = [texts[start : start + SAMPLES] for start in range(0, len(texts), SAMPLES)]
        return {
            "distinct": [len({" ".join(words(text)) for text in group}) / SAMPLES for group in groups],
            "variety": [variety(group) for group in groups],
        }


def _first_words(text: str) -> str:
    return " ".join(text.split()[:PROMPT_WORDS])


# All of it -----------------------------------------------------------------------------------------


def drawn_batches(lengths: Sequence[int], size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """As graft.data.batch.training_batches, but rows are not sorted by length, so that copies do not meet."""
    rows = list(range(len(lengths)))
    random.Random(f"{seed}/{epoch}").shuffle(rows)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@contextmanager
def _batches(condition: str) -> Iterator[None]:
    """The batches of a condition: Graft's own, but for `spread`."""
    from graft.train import loop

    own = loop.training_batches
    if condition == "spread":
        loop.training_batches = drawn_batches
    try:
        yield
    finally:
        loop.training_batches = own


def distinct_rows(texts: Sequence[str], lengths: Sequence[int], seed: int, epochs: int, spread: bool = False) -> float:
    """Mean number of different rows in a training step."""
    from graft.data.batch import training_batches

    batches = drawn_batches if spread else training_batches
    steps = [rows for epoch in range(epochs) for rows in batches(lengths, BATCH, seed=seed, epoch=epoch)]
    return float(np.mean([len({texts[row] for row in rows}) for rows in steps]))


def measure_all(given: argparse.Namespace, seeds: Sequence[int]) -> dict[str, Any]:
    """Train and measure every condition with every seed, or read what is finished."""
    from graft.files import write_json
    from graft.measure import environment
    from graft.run import execute

    data = write_data(given.folder / "data", given.rows, given.copies)
    bench = Bench(data, given.prompts)
    measured: dict[str, list[dict[str, Any]]] = {}
    trained: dict[str, list[dict[str, Any]]] = {}
    for seed, condition in [(seed, name) for seed in seeds for name in given.conditions.split(",")]:
        if condition in ONCE and seed != seeds[0]:
            continue
        place = given.folder / f"{condition}-{seed}"
        kept = given.folder / f"{condition}-{seed}-{given.prompts}-prompts.json"
        if not kept.exists():
            if condition != "base":
                with _batches(condition):
                    execute(recipe(given.folder / "data", condition, seed, given.copies), place)
            write_json(kept, bench.measure(condition, None if condition == "base" else place / "adapter"))
        if condition != "base":
            trained.setdefault(condition, []).append(_training_of(place))
        measured.setdefault(condition, []).append(json.loads(kept.read_text("utf-8")))
        print(f"{time.strftime('%H:%M')} {condition}, seed {seed}", flush=True)
    per_step = {}
    for condition, epochs in (("copies", 1), ("spread", 1), ("epochs", given.copies)):
        lengths = [len(bench.renderer.text(text)) for text in data[condition]]
        per_step[condition] = distinct_rows(data[condition], lengths, seeds[0], epochs, condition == "spread")
    return summary(measured) | {
        "trained": trained,
        "commits": _commits(given.folder),
        "distinct_rows_per_step": per_step,
        "held_texts": len(data["held"]),
        "sampled_prompts": min(SAMPLED_PROMPTS, given.prompts),
        "training_prompts": len(bench.prompts["training"]),
        "example": {"prompt": bench.prompts["held-out"][0]}
        | {condition: seen[0]["held-out"]["texts"][0] for condition, seen in measured.items()},
        "environment": environment() | {"dtype": bench.precision.name, "dtype_reason": bench.precision.reason},
    }


def _commits(folder: Path) -> list[str]:
    """The first and the last commit that the trainings ran on, in the order of time."""
    runs = sorted(folder.glob("*/env.json"), key=lambda path: path.stat().st_mtime)
    return [json.loads(path.read_text("utf-8"))["machine"]["commit"] or "unknown" for path in (runs[0], runs[-1])]


def _training_of(run: Path) -> dict[str, Any]:
    """Steps, seconds, and the validation loss in nats per token at each evaluated step."""
    report = json.loads((run / "report.json").read_text("utf-8"))
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = {str(point["step"]): point["validation_loss"] for point in points if point["validation_loss"] is not None}
    return {"steps": report["steps"], "seconds": report["train_seconds"], "validation_loss": losses}


def main() -> None:
    from graft.files import write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=96, help="N; 12 batches of 8")
    parser.add_argument("--copies", type=int, default=10)
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--conditions", default=",".join(CONDITIONS))
    parser.add_argument("--keep", action="store_true", help="write docs/results/duplicates.json")
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    command = "python benchmarks/duplicates.py " + " ".join(word for word in sys.argv[1:] if word != "--keep")
    told = {"claim": "duplicates", "command": command, "created": time.strftime("%Y-%m-%d"), "seeds": seeds}
    told |= {"rows": given.rows, "copies": given.copies, "prompts": given.prompts} | measure_all(given, seeds)
    for place in [given.folder / "duplicates.json", *([KEPT] if given.keep else [])]:
        write_json(place, told)


if __name__ == "__main__":
    main()
