"""How each architecture is laid out in a GGUF file: its name there, its metadata, its tensors' names and orders.

The names are the `gguf` package's. Orders are llama.cpp's, read off what `graft.gguf` reads back: rotations of Llama's
queries and keys pair neighbours, Gemma's norms have 1 added, GPT-2's matrices are transposed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graft.errors import UsageError
from graft.model import Base

Metadata = dict[str, tuple[str, Any]]
"""Values by key; the first of each pair is the type: uint32, float32 or string."""

ROPE_FREQS = "rope_freqs.weight"
"""The tensor of what each rotary frequency is divided by [head_dim / 2]."""

_INSTEAD = "export it with --to hf"


@dataclass(frozen=True)
class Layout:
    """One architecture in GGUF."""

    arch: str
    """`general.architecture`."""
    activation: str
    """What its feed-forward layers compute there; another one cannot be stated."""
    pairs: bool = False
    """Whether rotations pair neighbouring rows of queries and keys, where transformers pairs the halves of a head."""
    plus_one: bool = False
    """Whether norms have 1 added."""
    transposed: bool = False
    """Whether transformers keeps the layers' matrices as [in, out]."""


LAYOUTS: dict[str, Layout] = {
    "llama": Layout("llama", "silu", pairs=True),
    "mistral": Layout("llama", "silu", pairs=True),
    "qwen2": Layout("qwen2", "silu"),
    "qwen3": Layout("qwen3", "silu"),
    "gemma3_text": Layout("gemma3", "gelu_pytorch_tanh", plus_one=True),
    "gpt2": Layout("gpt2", "gelu_new", transposed=True),
}
"""By transformers' `model_type`."""

_GEMMA_PATTERN = 6
"""Of so many layers of Gemma 3 the last sees everything, the others a window; files do not state it."""


def layout_of(config: Any) -> Layout:
    """The layout of a configuration. Raises `UsageError` for one that a GGUF file cannot hold."""
    layout = LAYOUTS.get(config.model_type)
    if layout is None:
        raise UsageError(f"{config.model_type} models are not written as GGUF; known: {', '.join(LAYOUTS)}", _INSTEAD)
    if config.vocab_size < 1:
        raise UsageError(f"vocab_size is {config.vocab_size}", "correct config.json, or fetch the model again")
    reason = _unstated(config, layout)
    if reason is not None:
        raise UsageError(f"a GGUF file of architecture {layout.arch!r} cannot state {reason}", _INSTEAD)
    return layout


def _unstated(config: Any, layout: Layout) -> str | None:
    """A setting of the model that no key of a file holds; None where all are as llama.cpp takes them to be."""
    get = partial(getattr, config)
    for key in ("hidden_act", "hidden_activation", "activation_function"):
        if get(key, None) not in (None, layout.activation):
            return f"{key} = {get(key)!r}"
    allowed: dict[str, tuple[Any, ...]] = {
        "attention_bias": (None, False), "mlp_bias": (None, False), "final_logit_softcapping": (None,),
        "attn_logit_softcapping": (None,), "use_bidirectional_attention": (None, False),
        "scale_attn_by_inverse_layer_idx": (None, False), "scale_attn_weights": (None, True),
        "add_cross_attention": (None, False),
    }  # fmt: skip
    for key, values in allowed.items():
        if get(key, None) not in values:
            return f"{key} = {get(key)!r}"
    if layout.arch == "gemma3":
        layers = [
            "full_attention" if (index + 1) % _GEMMA_PATTERN == 0 else "sliding_attention"
            for index in range(config.num_hidden_layers)
        ]
        if config.layer_types != layers:
            return f"layer_types other than every {_GEMMA_PATTERN}th with full attention"
        if config.query_pre_attn_scalar != config.head_dim:
            return f"query_pre_attn_scalar = {config.query_pre_attn_scalar} with head_dim = {config.head_dim}"
        local = config.rope_parameters["sliding_attention"]
        if local["rope_type"] != "default" or local["rope_theta"] != 10_000:
            return "other rotary positions inside the windows than of base 10,000"
    return _unstated_positions(_rope(config), layout.pairs)


def _unstated_positions(rope: Mapping[str, Any] | None, pairs: bool) -> str | None:
    kind = "default" if rope is None else rope.get("rope_type", "default")
    if kind in ("default", "linear") or rope is None or (kind == "llama3" and pairs):
        return (
            None if rope is None or rope.get("partial_rotary_factor") in (None, 1, 1.0) else "partial rotary positions"
        )
    if (
        kind == "longrope"
        and pairs
        and rope["short_factor"] == rope["long_factor"]
        and rope.get("attention_factor") == 1
    ):
        return None
    plain = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
    extra = sorted(key for key, value in rope.items() if key not in plain and value is not None)
    if kind == "yarn" and not extra:
        return None
    return f"rotary positions of type {kind!r}" + (f" with {extra[0]}" if kind == "yarn" else "")


def _rope(config: Any) -> Mapping[str, Any] | None:
    """The rotary settings of layers that see everything."""
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, Mapping) and "full_attention" in rope:
        rope = rope["full_attention"]
    return rope if isinstance(rope, Mapping) else None


def head_width(config: Any) -> int:
    """Width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def context_length(config: Any) -> tuple[int, str | None]:
    """The most tokens of a row, and what to say where that is less than the model's own."""
    longest = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    windowed = config.model_type == "mistral" or (
        config.model_type in ("qwen2", "qwen3") and getattr(config, "use_sliding_window", False)
    )
    if windowed and isinstance(window, int) and window < longest:
        return window, f"context_length is {window:,} of {longest:,}: GGUF has no sliding window for this architecture"
    return longest, None


def model_metadata(config: Any, layout: Layout) -> Metadata:
    """What a file says of the model's shape, without what it says of the tokenizer."""
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    found: Metadata = {
        "context_length": ("uint32", context_length(config)[0]),
        "embedding_length": ("uint32", config.hidden_size),
        "block_count": ("uint32", config.num_hidden_layers),
        "feed_forward_length": ("uint32", inner),
        "attention.head_count": ("uint32", config.num_attention_heads),
    }
    if layout.arch == "gpt2":
        return _named(layout, found | {"attention.layer_norm_epsilon": ("float32", config.layer_norm_epsilon)})
    rope, width = _rope(config) or {}, head_width(config)
    found |= {
        "attention.head_count_kv": ("uint32", config.num_key_value_heads),
        "attention.layer_norm_rms_epsilon": ("float32", config.rms_norm_eps),
        "rope.freq_base": ("float32", float(rope.get("rope_theta", 10_000.0))),
    }
    if layout.pairs:
        found["rope.dimension_count"] = ("uint32", width)
    if not layout.pairs or width * config.num_attention_heads != config.hidden_size:
        found |= {"attention.key_length": ("uint32", width), "attention.value_length": ("uint32", width)}
    if layout.arch == "gemma3":
        found["attention.sliding_window"] = ("uint32", config.sliding_window)
    if rope.get("rope_type") in ("linear", "yarn"):
        found |= {
            "rope.scaling.type": ("string", rope["rope_type"]),
            "rope.scaling.factor": ("float32", float(rope["factor"])),
        }
        if rope["rope_type"] == "yarn":
            found["rope.scaling.original_context_length"] = ("uint32", rope["original_max_position_embeddings"])
    found["vocab_size"] = ("uint32", config.vocab_size)
    return _named(layout, found)


def _named(layout: Layout, found: Metadata) -> Metadata:
    return {f"{layout.arch}.{key}": value for key, value in found.items()}


def tensor_names(base: Base, layout: Layout) -> dict[str, str]:
    """The name in a file of each tensor of a base that is written; a tied one has one name.

    Raises `UsageError` for a tensor that the architecture has no name for.
    """
    import gguf

    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == layout.arch)
    known = gguf.get_tensor_name_map(number, base.config.num_hidden_layers)
    once = {name for name, _ in base.model.named_parameters()}
    names = {}
    for name in base.state():
        if name not in once:  # tied, or a buffer
            continue
        stem, _, end = name.rpartition(".")
        found = known.get_name(stem)
        if found is None:
            raise UsageError(f"a GGUF file of architecture {layout.arch!r} has no place for {name}", _INSTEAD)
        names[name] = f"{found}.{end}"
    return names


def rope_divisors(base: Base) -> Tensor | None:
    """What each rotary frequency is divided by [head_dim / 2], where the model's scaling is stated that way: Llama 3's.

    It is read off the model: its own frequencies beside those of plain rotary positions (Su et al. 2021, 2104.09864).
    """
    rope = _rope(base.config)
    if rope is None or rope.get("rope_type") not in ("llama3", "longrope"):
        return None
    actual = base.body.get_submodule("rotary_emb").get_buffer("inv_freq").double().cpu()
    steps = torch.arange(len(actual), dtype=torch.float64) / len(actual)
    return ((1.0 / float(rope["rope_theta"]) ** steps) / actual).float()


def to_file(name: str, tensor: Tensor, config: Any, layout: Layout) -> Tensor:
    """A tensor [out, in] or [n] in fp32, in the order of a file."""
    heads = _heads(name, config) if layout.pairs else None
    if heads is not None:  # rows (half, pair) of each head become (pair, half)
        half = tensor.shape[0] // heads // 2
        return tensor.view(heads, 2, half, -1).transpose(1, 2).reshape(tensor.shape).contiguous()
    if layout.plus_one and name.endswith("norm.weight"):
        return tensor + 1
    if layout.transposed and _is_conv(name):
        return tensor.T.contiguous()
    return tensor


def from_file(name: str, tensor: Tensor, config: Any, layout: Layout) -> Tensor:
    """The inverse of `to_file`."""
    heads = _heads(name, config) if layout.pairs else None
    if heads is not None:
        half = tensor.shape[0] // heads // 2
        return tensor.view(heads, half, 2, -1).transpose(1, 2).reshape(tensor.shape).contiguous()
    if layout.plus_one and name.endswith("norm.weight"):
        return tensor - 1
    if layout.transposed and _is_conv(name):
        return tensor.T.contiguous()
    return tensor


def _heads(name: str, config: Any) -> int | None:
    """Heads of a query or key matrix; None for any other tensor."""
    if ".q_proj." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".k_proj." in name else None


def _is_conv(name: str) -> bool:
    return name.endswith(("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"))
