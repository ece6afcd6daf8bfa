"""Tiny random models of every family, built in memory."""

import torch
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from graft.methods.base import methods, read_method
from graft.model import Base
from graft.parts.attach import attach

VOCABULARY = 99
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_MORE = {"intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0}
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}


def bert():
    return BertModel(BertConfig(**_SIZES, **_MORE, **_STILL))


def roberta():
    return RobertaModel(RobertaConfig(**_SIZES, **_MORE, **_STILL, **_ENDS))


def distilbert():
    config = DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64,
        dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return DistilBertModel(config)


def gpt2():
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **still, **_ENDS, pad_token_id=0))


def llama():
    return LlamaForCausalLM(LlamaConfig(**_SIZES, **_MORE, **_ENDS, num_key_value_heads=2))


def t5():
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


FACTORIES = {"bert": bert, "roberta": roberta, "distilbert": distilbert, "gpt2": gpt2, "llama": llama, "t5": t5}
TRAPPED = ("bert", "gpt2", "llama", "t5")
"""The families that the traps are tested on: an encoder with a pooler, a fused projection, grouped queries, a pair."""


def make(name: str, seed: int = 0) -> Base:
    torch.manual_seed(seed)
    return Base(FACTORIES[name]().eval(), None, name)


def settings(method: str) -> dict:
    """A method's settings for tests of routing: nothing trains the base in place."""
    return dict(methods()[method].small)


def put(base: Base, method: str, name: str | None = None, shake: float = 0.1, **more):
    """Attach a method's adapter, its tensors moved away from where they start."""
    adapter = read_method({"name": method} | settings(method) | more).build(base, name or method)
    attach(base, adapter)
    with torch.no_grad():
        for _, tensor in adapter.trainable():
            tensor.add_(torch.randn_like(tensor) * shake)
    return adapter.eval()


def batch(rows: int = 4, length: int = 9, padded: str | None = "right", seed: int = 3):
    """Ids and mask; rows get shorter by two tokens each, padded on a side, unless `padded` is None."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows if padded else 0):
        short = min(2 * row, length - 2)
        if short:
            where = slice(length - short, None) if padded == "right" else slice(None, short)
            mask[row, where] = 0
            ids[row, where] = 0
    return {"input_ids": ids, "attention_mask": mask}


def hidden(base: Base, given, entry):
    with torch.no_grad(), base.route(entry):
        return base.hidden(given)


METHODS = tuple(methods())
