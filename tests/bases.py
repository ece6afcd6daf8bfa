"""Tiny random models of every family, built in memory."""

from functools import cache

import torch
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from graft.families import FAMILIES, Family
from graft.methods.base import methods, read_method
from graft.model import Base
from graft.parts.attach import attach

VOCABULARY = 99
WINDOW = 4
"""The sliding windows of Mistral and Gemma 3: shorter than the rows of the tests."""
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


def mistral():
    """Every layer sees the last four positions only."""
    return MistralForCausalLM(MistralConfig(**_SIZES, **_MORE, **_ENDS, num_key_value_heads=2, sliding_window=WINDOW))


def qwen2():
    """Biases at the queries, keys and values, and a tied output head."""
    return Qwen2ForCausalLM(Qwen2Config(**_SIZES, **_MORE, **_ENDS, num_key_value_heads=2, tie_word_embeddings=True))


def qwen3():
    """Normalized queries and keys, and heads that together are wider than the states."""
    return Qwen3ForCausalLM(Qwen3Config(**_SIZES, **_MORE, **_ENDS, num_key_value_heads=2, head_dim=16))


def gemma3():
    """One layer with a sliding window and one without, scaled embeddings, one key/value head, a tied output head."""
    config = Gemma3TextConfig(
        **_SIZES, **_MORE, **_ENDS, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


def t5():
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


FACTORIES = {
    "bert": bert, "roberta": roberta, "distilbert": distilbert, "gpt2": gpt2, "llama": llama, "mistral": mistral,
    "qwen2": qwen2, "qwen3": qwen3, "gemma3": gemma3, "t5": t5,
}  # fmt: skip
TRAPPED = ("bert", "gpt2", "llama", "t5")
"""The families that the traps are tested on: an encoder with a pooler, a fused projection, grouped queries, a pair."""
METHODS = tuple(methods())


def model_type(name: str) -> str:
    """What transformers calls a family."""
    return {"gemma3": "gemma3_text"}.get(name, name)


def family_of(name: str) -> Family:
    return FAMILIES[model_type(name)]


def suited(name: str) -> list[str]:
    """The methods that a family does not refuse."""
    return [method for method, cls in methods().items() if cls.refuses(family_of(name)) is None]


GENERATING = tuple(name for name in FACTORIES if family_of(name).kind != "encoder")


def make(name: str, seed: int = 0) -> Base:
    """A new base. Its biases and norms are not the zeros and ones that transformers starts with, which hide faults."""
    torch.manual_seed(seed)
    model = FACTORIES[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return Base(model, None, name)


@cache
def shared(name: str) -> tuple[Base, "Condition"]:
    """A base that tests share, and how it was at first. Who uses it leaves it like that."""
    base = make(name)
    return base, Condition(base)


class Condition:
    """What a base is, to see later that it is the same again, bit for bit."""

    def __init__(self, base: Base) -> None:
        self.tensors = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
        self.rest = self._rest(base)

    @staticmethod
    def _rest(base: Base) -> dict:
        modules = dict(base.model.named_modules())
        hooks = [
            hook
            for m in modules.values()
            for some in (m._forward_hooks, m._forward_pre_hooks)
            for hook in some.values()
        ]
        return {
            "adapters": (list(base.adapters), base.router.order, base.exclusive, base.router.current),
            "types": {path: type(module) for path, module in modules.items()},
            "hooks": [hook for hook in hooks if hook.__module__.startswith("graft")],
            "hosts": [path for path, m in modules.items() if any(key.startswith("_graft") for key in m.__dict__)],
            "attention": {p: m.config._attn_implementation for p, m in modules.items() if hasattr(m, "config")},
            "checkpointing": [path for path, m in modules.items() if getattr(m, "gradient_checkpointing", False)],
            "training": [path for path, module in modules.items() if module.training],
            "trainable": [path for path, parameter in base.model.named_parameters() if parameter.requires_grad],
            "gradients": [path for path, parameter in base.model.named_parameters() if parameter.grad is not None],
        }

    def changes(self, base: Base) -> list[str]:
        """What is otherwise now."""
        now = base.model.state_dict()
        tensors = [
            name
            for name in now.keys() | self.tensors.keys()
            if not (name in now and name in self.tensors and torch.equal(now[name], self.tensors[name]))
        ]
        rest = self._rest(base)
        return tensors + [f"{key}: {rest[key]}" for key in rest if rest[key] != self.rest[key]]

    def restore(self, base: Base) -> None:
        """Give the base's tensors their values again, after a merge."""
        with torch.no_grad():
            for name, tensor in base.state().items():
                tensor.copy_(self.tensors[name])


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


def mixes(base: Base, name: str) -> bool:
    """Whether an attached adapter can serve some rows of a batch: none with values of its own can where the base looks
    something up for all rows at once, as T5 its relative positions.
    """
    shared_by_rows = base.family.unroutable
    placed = base.adapters[name].placed
    return not any(part.does("own") and site.path.endswith(end) for site, part in placed for end in shared_by_rows)


def keep_activations(base: Base) -> None:
    """Undo `Base.checkpoint_activations`."""
    getattr(base.model, "activation_checkpointing_disable", base.model.gradient_checkpointing_disable)()
    base.recomputed = False


def batch(rows: int = 4, length: int = 9, padded: str | None = "right", seed: int = 3):
    """Ids and mask; rows are up to six tokens shorter, padded on a side, unless `padded` is None. The rows themselves
    are the same on both sides.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows if padded else 0):
        short = min(2 * (row % 4), length - 2)
        ids[row, length - short :] = mask[row, length - short :] = 0
        if padded == "left":
            ids[row], mask[row] = ids[row].roll(short), mask[row].roll(short)
    return {"input_ids": ids, "attention_mask": mask}


def row_of(given: dict, row: int) -> dict:
    """One row of a batch without its padding."""
    real = given["attention_mask"][row].bool()
    return {key: value[row : row + 1, real] for key, value in given.items()}


def hidden(base: Base, given, entry):
    with torch.no_grad(), base.route(entry):
        return base.hidden(given)
