"""Where the sites of each architecture are: the same roles for all, the modules of each.

A path is relative to a layer. `Spot(enter, leave)` says in which module a site's input enters and from
which its output leaves, before the residual sum; `part` picks one of `parts` equal column blocks of a fused projection.
"""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Spot:
    """One site: the module where x enters, the module where y leaves, the share of its columns."""

    enter: str
    leave: str = ""
    part: int = 0
    parts: int = 1

    @property
    def out(self) -> str:
        """The module where y leaves."""
        return self.leave or self.enter


@dataclass(frozen=True)
class Stack:
    """A list of equal layers: its path in the body, a prefix for the roles, the spots of one layer."""

    layers: str
    spots: dict[str, Spot]
    prefix: str = ""


@dataclass(frozen=True)
class Family:
    """One architecture.

    `body` is the path of the model without its output head, in the class that Graft loads; `task_prefix` is
    what transformers' task models put before a path of that class. `singles` are the sites outside the layers: role
    and path in the body.
    """

    kind: str
    stacks: tuple[Stack, ...]
    embed: str
    body: str = ""
    task_prefix: str = ""
    singles: dict[str, str] = field(default_factory=dict)
    lm_head: str = ""
    positions: str = "absolute"
    """absolute (a table: its length bounds a row), rotary, or relative (no position ids)."""
    starts_after_pad: bool = False
    """RoBERTa counts positions from pad_token_id + 1."""
    task_head: dict[str, str] = field(default_factory=lambda: {"out": "classifier"})
    """Names of a classification head's layers in transformers' task model."""
    head_activation: str = ""
    unroutable: tuple[str, ...] = ()
    """Modules whose output is shared by all rows, so that rows cannot have values of their own."""


_BERT_LAYER = {
    "attn.q": Spot("attention.self.query"),
    "attn.k": Spot("attention.self.key"),
    "attn.v": Spot("attention.self.value"),
    "attn.o": Spot("attention.output.dense"),
    "mlp.up": Spot("intermediate.dense"),
    "mlp.down": Spot("output.dense"),
    "attn": Spot("attention.self", "attention.output.dropout"),
    "mlp": Spot("intermediate.dense", "output.dropout"),
    "attention": Spot("attention.self"),
    "norm.attn": Spot("attention.output.LayerNorm"),
    "norm.mlp": Spot("output.LayerNorm"),
}
_DISTILBERT_LAYER = {
    "attn.q": Spot("attention.q_lin"),
    "attn.k": Spot("attention.k_lin"),
    "attn.v": Spot("attention.v_lin"),
    "attn.o": Spot("attention.out_lin"),
    "mlp.up": Spot("ffn.lin1"),
    "mlp.down": Spot("ffn.lin2"),
    "attn": Spot("attention"),
    "mlp": Spot("ffn"),
    "attention": Spot("attention"),
    "norm.attn": Spot("sa_layer_norm"),
    "norm.mlp": Spot("output_layer_norm"),
}
_GPT2_LAYER = {
    "attn.qkv": Spot("attn.c_attn"),
    "attn.q": Spot("attn.c_attn", part=0, parts=3),
    "attn.k": Spot("attn.c_attn", part=1, parts=3),
    "attn.v": Spot("attn.c_attn", part=2, parts=3),
    "attn.o": Spot("attn.c_proj"),
    "mlp.up": Spot("mlp.c_fc"),
    "mlp.down": Spot("mlp.c_proj"),
    "attn": Spot("attn"),
    "mlp": Spot("mlp"),
    "attention": Spot("attn"),
    "norm.attn": Spot("ln_1"),
    "norm.mlp": Spot("ln_2"),
}
_LLAMA_LAYER = {
    "attn.q": Spot("self_attn.q_proj"),
    "attn.k": Spot("self_attn.k_proj"),
    "attn.v": Spot("self_attn.v_proj"),
    "attn.o": Spot("self_attn.o_proj"),
    "mlp.gate": Spot("mlp.gate_proj"),
    "mlp.up": Spot("mlp.up_proj"),
    "mlp.down": Spot("mlp.down_proj"),
    "attn": Spot("self_attn"),
    "mlp": Spot("mlp"),
    "attention": Spot("self_attn"),
    "norm.attn": Spot("input_layernorm"),
    "norm.mlp": Spot("post_attention_layernorm"),
    "norm.q": Spot("self_attn.q_norm"),  # Qwen 3; absent ones are left out
    "norm.k": Spot("self_attn.k_norm"),
}
# Gemma 3 normalizes a block's output too, before the residual sum.
_GEMMA3_LAYER = _LLAMA_LAYER | {
    "attn": Spot("self_attn", "post_attention_layernorm"),
    "mlp": Spot("mlp", "post_feedforward_layernorm"),
    "norm.mlp": Spot("pre_feedforward_layernorm"),
    "norm.attn.post": Spot("post_attention_layernorm"),
    "norm.mlp.post": Spot("post_feedforward_layernorm"),
}


def _t5_layer(mlp: int) -> dict[str, Spot]:
    def attention(prefix: str, index: int, name: str) -> dict[str, Spot]:
        core = f"layer.{index}.{name}"
        linears = {f"{prefix}attn.{short}": Spot(f"{core}.{short}") for short in "qkvo"}
        return linears | {
            f"{prefix}attn": Spot(core, f"layer.{index}.dropout"),
            f"{prefix}attention": Spot(core),
            f"norm.{prefix}attn": Spot(f"layer.{index}.layer_norm"),
        }

    feed = f"layer.{mlp}.DenseReluDense"
    spots = attention("", 0, "SelfAttention") | {
        # Which of wi, wi_0 and wi_1 exist depends on the version of T5; absent ones are left out.
        "mlp.gate": Spot(f"{feed}.wi_0"),
        "mlp.up": Spot(f"{feed}.wi_1"),
        "mlp.in": Spot(f"{feed}.wi"),
        "mlp.down": Spot(f"{feed}.wo"),
        "mlp": Spot(feed, f"layer.{mlp}.dropout"),
        "norm.mlp": Spot(f"layer.{mlp}.layer_norm"),
    }
    return spots | (attention("cross.", 1, "EncDecAttention") if mlp == 2 else {})


_BERT = Family(
    kind="encoder",
    stacks=(Stack("encoder.layer", _BERT_LAYER),),
    embed="embeddings.word_embeddings",
    task_prefix="bert",
    singles={"norm.embed": "embeddings.LayerNorm", "pooler": "pooler.dense"},
)
_LLAMA = Family(
    kind="decoder",
    stacks=(Stack("layers", _LLAMA_LAYER),),
    embed="embed_tokens",
    body="model",
    singles={"norm.final": "norm"},
    lm_head="lm_head",
    positions="rotary",
    task_head={"out": "score"},
)

FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": Family(
        kind="encoder",
        stacks=_BERT.stacks,
        embed=_BERT.embed,
        task_prefix="roberta",
        singles=_BERT.singles,
        starts_after_pad=True,
        task_head={"dense": "classifier.dense", "out": "classifier.out_proj"},
        head_activation="tanh",
    ),
    "distilbert": Family(
        kind="encoder",
        stacks=(Stack("transformer.layer", _DISTILBERT_LAYER),),
        embed="embeddings.word_embeddings",
        task_prefix="distilbert",
        singles={"norm.embed": "embeddings.LayerNorm"},
        task_head={"dense": "pre_classifier", "out": "classifier"},
        head_activation="relu",
    ),
    "gpt2": Family(
        kind="decoder",
        stacks=(Stack("h", _GPT2_LAYER),),
        embed="wte",
        body="transformer",
        singles={"norm.final": "ln_f"},
        lm_head="lm_head",
        task_head={"out": "score"},
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3_text": replace(_LLAMA, stacks=(Stack("layers", _GEMMA3_LAYER),)),
    "t5": Family(
        kind="encoder-decoder",
        stacks=(
            Stack("encoder.block", _t5_layer(1), prefix="enc."),
            Stack("decoder.block", _t5_layer(2), prefix="dec."),
        ),
        embed="shared",
        singles={"enc.norm.final": "encoder.final_layer_norm", "dec.norm.final": "decoder.final_layer_norm"},
        lm_head="lm_head",
        positions="relative",
        unroutable=("relative_attention_bias",),
    ),
}
"""By transformers' `model_type`."""
