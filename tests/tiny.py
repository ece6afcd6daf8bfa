"""A tiny random BERT with a tokenizer of whole words, and data it can learn, on disk: a whole run takes seconds."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from graft.recipe import Recipe

torch.set_num_threads(1)  # faster for models this small, and tests run side by side

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIGNS = {"positive": ["good", "great", "fine", "lovely"], "negative": ["bad", "poor", "awful", "dull"]}
POSITIONS = 48
WIDTH = 32


def fillers(count: int = 120) -> list[str]:
    """Made-up words without meaning, always the same."""
    generator = random.Random(5)
    words = {
        "".join(generator.choice("bdfgklmnprst") + generator.choice("aeiou") for _ in range(3)) for _ in range(999)
    }
    return sorted(words)[:count]


def write_model(folder: Path) -> Path:
    """A BERT of two layers with random weights, and its tokenizer."""
    words = SPECIAL + [sign for signs in SIGNS.values() for sign in signs] + fillers()
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(word, words.index(word)) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(11)
        BertModel(config).save_pretrained(folder)
    return folder


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Texts of 4 to 14 words, two of which decide the label; no two are nearly equal."""
    generator = random.Random(seed)
    words = fillers()
    found = []
    for number in range(count):
        label = ("positive", "negative")[number % 2]
        text = generator.sample(words, generator.randint(2, 12)) + generator.sample(SIGNS[label], 2)
        generator.shuffle(text)
        found.append({"text": " ".join(text), "label": label})
    return found


def write_rows(path: Path, given: list[dict[str, Any]]) -> Path:
    """Rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    return path


def write_all(folder: Path) -> Path:
    """`model/` and train, validation, test and other `.jsonl` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model")
    for seed, (name, count) in enumerate({"train": 240, "validation": 40, "test": 60, "other": 30}.items()):
        write_rows(folder / f"{name}.jsonl", rows(count, seed))
    return folder


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """What a recipe file of a tiny run says; `more` replaces whole keys."""
    files = {name: str(folder / f"{name}.jsonl") for name in ("train", "validation", "test")}
    return {
        "model": str(folder / "model"),
        "data": files | {"max_length": 24},
        "objective": {"name": "classify", "pooling": "mean"},
        "method": {"name": "lora", "learning_rate": 2e-2},
        "training": {"num_train_epochs": 2, "per_device_train_batch_size": 16, "precision": "fp32"},
        "forgetting": [],
    } | more


def recipe(folder: Path, **more: Any) -> Recipe:
    """The recipe of a tiny run."""
    return Recipe.parse(settings(folder, **more))
