"""Tiny random models of every architecture that GGUF files hold, on disk with a tokenizer, and adapters for them."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from chat_tokenizers import TEXTS, sentence_piece, wrap
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.tokenization_utils_base import generate_merges

from graft.methods import store
from graft.methods.base import methods, read_method
from graft.model import load_base
from graft.parts.attach import attach
from graft.rendering.jinja import find_template

MARKERS = ["<|im_start|>", "<|im_end|>"]
_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
_LONG = {"max_position_embeddings": 128}
_GROUPED = _SIZES | _LONG | {"num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10_000.0}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}

CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any], str]] = {
    "llama": (LlamaConfig, _GROUPED | {"tie_word_embeddings": False}, "llama-bpe"),
    "llama tied": (LlamaConfig, _GROUPED | {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}, "smollm"),
    "llama scaled": (LlamaConfig, _GROUPED | {"rope_parameters": LLAMA3}, "llama-bpe"),
    "llama linear": (LlamaConfig, _GROUPED | {"rope_parameters": LINEAR}, "gpt-2"),
    "llama pieces": (LlamaConfig, _GROUPED, "pieces first"),
    "llama wide": (LlamaConfig, _GROUPED | {"head_dim": 32}, "tekken"),
    "mistral": (MistralConfig, _GROUPED | {"sliding_window": None}, "pieces prepend"),
    "qwen2": (Qwen2Config, _GROUPED | {"tie_word_embeddings": True}, "qwen2"),
    "qwen2 yarn": (Qwen2Config, _GROUPED | {"rope_parameters": YARN, "tie_word_embeddings": False}, "qwen2"),
    "qwen3": (Qwen3Config, _GROUPED | {"head_dim": 32}, "qwen2"),
    "gemma3": (
        Gemma3TextConfig,
        _GROUPED | {"num_hidden_layers": 7, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
        "pieces none",
    ),
    "gpt2": (GPT2Config, {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 96}, "gpt-2"),
}
"""Configuration class, settings and tokenizer of each."""


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose splitting GGUF files have a name for, or of pieces."""
    if kind.startswith("pieces"):
        pad = {"pad_token": "<unk>"} if kind.endswith("none") else {}
        return _as_learned(sentence_piece(MARKERS, kind=kind.split()[1], **pad))
    backend = Tokenizer(models.BPE())
    if kind in GGUF_PRE_TOKENIZER_SPLITS:
        split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[kind]), "isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, whole]) if kind == "smollm" else whole
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator([*TEXTS, "12 345 6789  10\t11", "I'LL DON'T don't we've"], trainer)
    return wrap(backend, MARKERS, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def _as_learned(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Merges as SentencePiece's models have them: every pair that makes a piece, pieces in the order of their ids."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = described["model"]["vocab"]
    learned = {"".join(pair) for pair in described["model"]["merges"]}
    merges = generate_merges(vocab, {piece: -index for piece, index in vocab.items() if piece in learned})
    described["model"]["merges"] = merges
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), clean_up_tokenization_spaces=False,
        **tokenizer.special_tokens_map,
    )  # fmt: skip


def write_model(folder: Path, name: str, template: str | None = "chatml", **more: Any) -> Path:
    """A model of `CONFIGS`, its norms and biases away from ones and zeros; the embeddings have rows without tokens."""
    factory, settings, kind = CONFIGS[name]
    tokenizer = tokenizer_of(kind)
    tokenizer.chat_template = find_template(template, tokenizer)[1] if template else None
    tokenizer.save_pretrained(folder)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = factory(vocab_size=len(tokenizer) + 3, pad_token_id=tokenizer.pad_token_id, **ends, **(settings | more))
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.05))
    model.save_pretrained(folder)
    return folder


def write_adapter(
    model: Path, folder: Path, method: str = "lora", template: str | None = None, shake: float = 0.05, **more: Any
) -> Path:
    """An adapter for a model of `write_model`, every tensor moved, as saved."""
    base = load_base(str(model))
    adapter = read_method({"name": method} | dict(methods()[method].small) | more).build(base, method)
    attach(base, adapter)
    with torch.no_grad():
        for _, tensor in adapter.trainable():
            tensor.add_(torch.randn_like(tensor) * shake)
    adapter.eval()
    text = find_template(template, base.tokenizer)[1] if template else None
    store.save(adapter, base, folder, template=text)
    return folder


def change_config(folder: Path, **more: Any) -> Path:
    """Settings of a model folder that is there already."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return folder
