"""A tiny random Llama with a chat template, and dialogues it can learn, on disk."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from chat_tokenizers import chat_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from graft.recipe import Recipe
from graft.rendering.jinja import find_template

POSITIONS = 256
ANSWERS = {"sea": "wide", "capital": "Paris", "poem": "short", "fine": "thank you"}


def write_model(folder: Path, template: str | None = "chatml") -> Path:
    """A Llama of two layers with random weights; without `template` its tokenizer has none."""
    tokenizer = chat_tokenizer("bytes", template or "chatml")
    tokenizer.chat_template = find_template(template, tokenizer)[1] if template else None
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, max_position_embeddings=POSITIONS, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(11)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Questions with one of four words, which decides the answer; no two are nearly equal."""
    generator = random.Random(seed)
    found = []
    for number in range(count):
        key = list(ANSWERS)[number % len(ANSWERS)]
        noise = "".join(generator.choice("abcdefghijklmnop") for _ in range(generator.randint(6, 12)))
        asked = f"{noise} the {key}?"
        found.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": ANSWERS[key]}]})
    return found


def write_rows(path: Path, given: list[dict[str, Any]]) -> Path:
    """Rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    return path


def write_all(folder: Path, template: str | None = "chatml") -> Path:
    """`model/` and train, validation and test `.jsonl` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model", template)
    for seed, (name, count) in enumerate({"train": 96, "validation": 12, "test": 24}.items()):
        write_rows(folder / f"{name}.jsonl", rows(count, seed))
    return folder


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """What a recipe file of a tiny run says; `more` replaces whole keys."""
    files = {name: str(folder / f"{name}.jsonl") for name in ("train", "validation", "test")}
    return {
        "model": str(folder / "model"),
        "data": files | {"max_length": 96},
        "objective": {"name": "instruct", "max_new_tokens": 8},
        "method": {"name": "full", "learning_rate": 5e-3},
        "training": {"num_train_epochs": 4, "per_device_train_batch_size": 8, "precision": "fp32"},
        "forgetting": [],
    } | more


def recipe(folder: Path, **more: Any) -> Recipe:
    """The recipe of a tiny run."""
    return Recipe.parse(settings(folder, **more))
