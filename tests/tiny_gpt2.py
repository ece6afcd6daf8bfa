"""A tiny random GPT-2, which has a table of positions, on disk."""

from pathlib import Path

import torch
from chat_tokenizers import chat_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel


def write(folder: Path, positions: int) -> Path:
    """A GPT-2 of one layer with so many positions."""
    tokenizer = chat_tokenizer("bytes gpt2", "chatml")
    tokenizer.save_pretrained(folder)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=positions, pad_token_id=0, **ends
    )
    with torch.random.fork_rng():
        torch.manual_seed(11)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder
