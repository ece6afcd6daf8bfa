"""What is trained: the same model, rows, batch and learning rate for every side, written to a folder."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

CHAT_MODEL = "smollm2-135m"
ENCODER = "minilm-l6"
TASKS = (
    "spell_backward", "basic_arithmetic", "family_relationships", "time_intervals", "caesar_cipher", "word_sorting",
    "group_anagrams", "list_functions",
)  # fmt: skip
"""Starter tasks of the chat rows: their median lengths run from 52 to 297 tokens, prompts are longer than answers."""
HELD = 64
"""Rows that every side's loss is measured on."""
WEIGHT_DECAY = 0.01
WARMUP = 0.06
"""Share of the steps in which the learning rate rises; all sides train with the same schedule."""


@dataclass(frozen=True)
class Work:
    """One training. `method` is Graft's, by name and settings; peers translate it."""

    kind: Literal["chat", "labels"]
    model: str
    batch: int
    rate: float
    max_length: int
    method: dict[str, Any] = field(default_factory=lambda: {"name": "lora", "r": 8, "target_modules": QUERY_VALUE})
    more: dict[str, Any] = field(default_factory=dict)
    """Further sections of Graft's recipe."""

    def recipe(self, folder: Path, seed: int, assignments: Sequence[str] = ()) -> Any:
        """Graft's recipe for the rows in `folder`: one pass, the last step counts. `assignments` are `key=value`."""
        from graft.recipe import read_recipe

        objective: dict[str, Any] = {"name": "classify"}
        if self.kind == "chat":
            objective = {"name": "instruct", "scorer": "exact_match", "generated_rows": 1, "max_new_tokens": 1}
        training = {
            "num_train_epochs": 1,
            "per_device_train_batch_size": self.batch,
            "warmup_ratio": WARMUP,
            "weight_decay": WEIGHT_DECAY,
            "eval_steps": 1_000_000,
            "load_best_model_at_end": False,
            "preflight": False,  # one pass more, whatever a run's length: it would weigh more here than anywhere else
        }
        files = {name: str(folder / f"{name}.jsonl") for name in ("train", "validation", "test")}
        values = {
            "model": self.model,
            "data": {**files, "max_length": self.max_length},
            "objective": objective,
            "method": {**self.method, "learning_rate": self.rate},
            "training": training,
            "forgetting": [],
            "seed": seed,
            **self.more,
        }
        return read_recipe(None, assignments, text=json.dumps(values))


QUERY_VALUE = ["attn.q", "attn.v"]


def warmup_steps(rows: int, batch: int) -> int:
    """Steps in which the learning rate rises, counted as Graft counts them."""
    return int(-(-rows // batch) * WARMUP)


# Rows ----------------------------------------------------------------------------------------------


Split = Literal["train", "validation", "test"]


def chat_rows(split: Split, count: int, tasks: Sequence[str] = TASKS) -> list[dict[str, Any]]:
    """Dialogues of the starter tasks, which take turns."""
    from graft.data.tasks import task_dialogues

    found = task_dialogues("task:" + ",".join(tasks), split, count)
    return [{"messages": [message.as_dict() for message in row.messages]} for row in found]


def review_rows(split: Split, count: int) -> list[dict[str, Any]]:
    """Film reviews, as many of each split as are asked for."""
    from graft import assets
    from graft.data.load import read_rows, subset

    rows = read_rows(str(assets.folder("movie-reviews") / f"{split}.jsonl"))
    return [{"text": row.text, "label": row.label} for row in subset(rows, count)]


def rows_for(work: Work, count: int, held: int = HELD) -> dict[str, list[dict[str, Any]]]:
    """Rows of every file of a work; two rows of validation, since Graft always evaluates its last step."""
    make = chat_rows if work.kind == "chat" else review_rows
    return {"train": make("train", count), "validation": make("validation", 2), "test": make("test", max(held, 2))}


def write(work: Work, folder: Path, rows: dict[str, list[dict[str, Any]]], held: int = HELD) -> dict[str, Any]:
    """Write a work and its rows to a folder; returns what is told of the rows. `held` test rows are measured on.

    Peers get the ids that Graft's rendering gives, with the same tokens trained, so that no side's templates count.
    """
    from graft.model import load_tokenizer, locate

    folder.mkdir(parents=True, exist_ok=True)
    for name, given in rows.items():
        _write_lines(folder / f"{name}.jsonl", given)
    recipe = work.recipe(folder, 1)
    splits = recipe.objective.load(recipe.data)
    tokenizer = load_tokenizer(work.model)
    trained: list[int] = []
    lengths: list[int] = []
    for name, chosen in (("train", splits.train), ("test", splits.test)):
        examples = recipe.objective.examples(chosen, tokenizer, splits.labels, work.max_length)
        if len(examples) != len(rows[name]):
            raise ValueError(f"{name}: {len(rows[name])} rows became {len(examples)} examples")
        plain = [_plain(example) for example in examples]
        _write_lines(folder / f"{name}.ids.jsonl", plain if name == "train" else plain[:held])
        if name == "train":
            lengths = [len(row["input_ids"]) for row in plain]
            trained = [sum(label != -100 for label in row["labels"]) for row in plain if work.kind == "chat"]
    where = {"path": locate(work.model), "labels": list(splits.labels)}
    (folder / "work.json").write_text(json.dumps(asdict(work) | where, indent=2), "utf-8")
    return {"rows": len(lengths), "tokens": sum(lengths), "lengths": spread_of(lengths), "answers": spread_of(trained)}


def _plain(example: Any) -> dict[str, Any]:
    """One example as peers take it: the ids, and the trained tokens' ids or the label's number."""
    if hasattr(example, "trained"):
        pairs = zip(example.ids, example.trained, strict=True)
        return {"input_ids": list(example.ids), "labels": [token if trained else -100 for token, trained in pairs]}
    return {"input_ids": list(example.input_ids), "labels": example.target}


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def spread_of(values: Sequence[int]) -> list[int]:
    """The least, the 10th, 50th and 90th of a hundred, and the largest; nothing of nothing."""
    ordered = sorted(values)
    return [ordered[round(share * (len(ordered) - 1))] for share in (0, 0.1, 0.5, 0.9, 1)] if ordered else []


def read(folder: Path) -> tuple[Work, dict[str, Any]]:
    """A written work, and its further figures: the model's path and the labels."""
    given = json.loads((folder / "work.json").read_text("utf-8"))
    told = {key: given.pop(key) for key in ("path", "labels")}
    return Work(**given), told


def read_ids(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of one file as ids."""
    lines = (folder / f"{name}.ids.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]
