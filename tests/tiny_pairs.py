"""Preferences that a tiny model can learn, beside the model and dialogues of `tiny_chat`."""

from pathlib import Path
from typing import Any

import tiny_chat

from graft.recipe import Recipe


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Questions with their right answer, and with that of another question."""
    answers = list(tiny_chat.ANSWERS.values())
    found = []
    for row in tiny_chat.rows(count, seed):
        asked, answered = (message["content"] for message in row["messages"])
        wrong = answers[(answers.index(answered) + 1) % len(answers)]
        found.append({"prompt": asked, "chosen": answered, "rejected": wrong})
    return found


def write_all(folder: Path) -> Path:
    """`model/`, dialogues and `pairs-….jsonl` in a folder."""
    tiny_chat.write_all(folder)
    for seed, (name, count) in enumerate({"train": 64, "validation": 12, "test": 24}.items()):
        tiny_chat.write_rows(folder / f"pairs-{name}.jsonl", rows(count, seed))
    return folder


def settings(folder: Path, objective: Any, **more: Any) -> dict[str, Any]:
    """What a recipe file of a tiny run over pairs says; `more` replaces whole keys."""
    files = {name: str(folder / f"pairs-{name}.jsonl") for name in ("train", "validation", "test")}
    return {
        "model": str(folder / "model"),
        "data": files | {"max_length": 96},
        "objective": objective,
        "method": {"name": "lora", "learning_rate": 3e-3, "r": 16, "target_modules": "all-linear"},
        "training": {"num_train_epochs": 6, "per_device_train_batch_size": 8, "precision": "fp32"},
        "forgetting": [],
    } | more


def recipe(folder: Path, objective: Any, **more: Any) -> Recipe:
    """The recipe of a tiny run over pairs."""
    return Recipe.parse(settings(folder, objective, **more))
