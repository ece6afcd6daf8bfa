"""The same weights in a Graft adapter and in a model of the installed peft, and both computed side by side."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import bases
import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertForSequenceClassification,
    DistilBertForSequenceClassification,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaForSequenceClassification,
)

from graft.methods.base import read_method
from graft.model import Base
from graft.parts.attach import attach
from graft.parts.base import Adapter
from graft.parts.head import TaskHead, scores
from graft.parts.prefix import PrefixPart

TOLERANCE = 1e-5
LABELS = ("a", "b", "c")
TARGETS = torch.tensor([2, 0, 1])
ROWS, LENGTH = 3, 8
CLASSIFIERS = {
    "bert": BertForSequenceClassification,
    "gpt2": GPT2ForSequenceClassification,
    "llama": LlamaForSequenceClassification,
    "roberta": RobertaForSequenceClassification,
    "distilbert": DistilBertForSequenceClassification,
}

STATES = {"bert": {"states", "pooled"}}
"""Outputs without a task head; of the other families `states` and `logits`."""

Given = dict[str, Tensor]
Values = dict[str, Tensor]


def _wide() -> LlamaForCausalLM:
    """Llama whose heads are wider than hidden_size / heads: kv_heads · head_dim is the hidden size."""
    config = LlamaConfig(
        vocab_size=bases.VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=48, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


FACTORIES = bases.FACTORIES | {"wide": _wide}


def make(kind: str, seed: int = 0) -> Base:
    """A base whose every tensor, biases and norms too, is away from its starting value."""
    torch.manual_seed(seed)
    model = FACTORIES[kind]().eval()
    shake(model, 0.1)
    return Base(model, None, kind)


def shake(module: nn.Module, scale: float = 0.3) -> None:
    """Move every trainable tensor."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)


def ours(kind: str, method: Mapping[str, Any], head: bool = False, seed: int = 0) -> tuple[Base, Adapter]:
    """A base with an adapter attached, every tensor of the adapter away from where it starts."""
    base = make(kind, seed)
    adapter = read_method(method).build(base, "mine")
    if head:
        adapter.head = TaskHead.for_base(base, LABELS, dropout=0.0)
    attach(base, adapter)
    shake(adapter)
    return base, adapter


# peft ---------------------------------------------------------------------------------------------


@contextmanager
def peft_warnings() -> Iterator[None]:
    """peft reads a deprecated property of transformers when it wraps a model, and says of tied embeddings what matters
    to a merge and of VeRA what was asked for: no other warning is let through."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        warnings.filterwarnings("ignore", "Specified to not save vera_A and vera_B", UserWarning)
        yield


def task_of(kind: str, head: bool) -> str:
    """peft's task_type."""
    return "SEQ_CLS" if head else {"bert": "FEATURE_EXTRACTION", "t5": "SEQ_2_SEQ_LM"}.get(kind, "CAUSAL_LM")


def twin(base: Base, kind: str, head: bool = False) -> nn.Module:
    """A model of transformers with the base's weights; with `head` the sequence classifier, its head at random."""
    config = type(base.config).from_dict(base.config.to_dict())
    if not head:
        model = type(base.model)(config)
        model.load_state_dict(base.state())
        return model.eval()
    config.num_labels = len(LABELS)
    classifier = CLASSIFIERS[kind](config)
    prefix = f"{base.family.body}." if base.family.body else ""
    body = {name.removeprefix(prefix): value for name, value in base.state().items() if name.startswith(prefix)}
    left = classifier.base_model.load_state_dict(body, strict=False)
    assert not left.missing_keys
    assert all(kind == "roberta" and name.startswith("pooler.") for name in left.unexpected_keys)  # it has none
    return classifier.eval()


def wrapped(base: Base, kind: str, config: peft.PeftConfig, head: bool = False) -> peft.PeftModel:
    """peft's model of `config` on the base's weights."""
    config.task_type = task_of(kind, head)
    with peft_warnings():
        return peft.get_peft_model(twin(base, kind, head), config)


def virtual_tokens(model: peft.PeftModel) -> int:
    """Virtual tokens that peft leaves in its outputs."""
    config = model.peft_config["default"]
    return config.num_virtual_tokens if config.peft_type in ("PROMPT_TUNING", "P_TUNING") else 0


# The same tensors in both -------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """A tensor of peft's and those of ours that hold its values: `join` makes them one of its shape."""

    name: str
    ours: tuple[nn.Parameter, ...]
    theirs: nn.Parameter
    join: Callable[..., Tensor] = lambda tensor: tensor


@dataclass(frozen=True, eq=False)
class Pair:
    """One adapter in both."""

    kind: str
    base: Base
    adapter: Adapter
    model: peft.PeftModel
    matches: list[Match]


def pair(kind: str, method: Mapping[str, Any], config: peft.PeftConfig, head: bool = False) -> Pair:
    """The same adapter with the same values on the same base, in Graft and in peft. Every tensor that either of them
    trains is matched."""
    base, adapter = ours(kind, method, head)
    model = wrapped(base, kind, config, head)
    matches = [*_weights(base, adapter, model), *_virtual(adapter, model), *_head(adapter, model)]
    with torch.no_grad():
        for match in matches:
            joined = match.join(*match.ours)
            assert joined.shape == match.theirs.shape, match.name
            match.theirs.copy_(joined)
    trained = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(trained) == sorted(id(match.theirs) for match in matches)
    mine = [id(parameter) for _, parameter in adapter.trainable()]
    assert sorted(mine) == sorted(id(parameter) for match in matches for parameter in match.ours)
    return Pair(kind, base, adapter, model, matches)


def _weights(base: Base, adapter: Adapter, model: peft.PeftModel) -> Iterator[Match]:
    prefix = f"{base.family.task_prefix}." if adapter.head is not None and base.family.task_prefix else ""
    if model.active_peft_config.is_prompt_learning:
        return
    for site, part in adapter.placed:
        layer = model.get_base_model().get_submodule(f"{prefix}{site.path}")
        for name, parameter in part.named_parameters():
            entry = getattr(layer, name)["default"]
            theirs = entry if isinstance(entry, nn.Parameter) else entry.weight
            match = Match(f"{site.name}.{name}", (parameter,), theirs)
            yield replace(match, join=partial(Tensor.reshape, shape=theirs.shape)) if name == "ia3_l" else match


def _virtual(adapter: Adapter, model: peft.PeftModel) -> Iterator[Match]:
    if not model.active_peft_config.is_prompt_learning:
        return
    encoder = model.prompt_encoder["default"]
    embedding = encoder.embedding.weight
    if adapter.virtual_parts():
        for name, parameter in adapter.virtual_parts()[0].named_parameters():
            theirs = embedding if name == "embedding" else encoder.get_parameter(name)
            yield Match("tokens" if name == "embedding" else name, (parameter,), theirs)
    elif adapter.shared is None:
        values = tuple(part.get_parameter("values") for part in adapter.parts if isinstance(part, PrefixPart))
        yield Match("prefix", values, embedding, lambda *layers: torch.cat([v.flatten(1) for v in layers], dim=1))
    else:
        width, shared = embedding.shape[1], adapter.shared
        # Ours starts from embeddings as wide as the base. Where peft's are narrower (grouped queries), the same
        # function is ours with zeros in the other columns.
        with torch.no_grad():
            shared.get_parameter("embedding")[:, width:] = 0.0
        yield Match("embedding", (shared.embedding,), embedding, lambda tensor: tensor[:, :width])
        yield Match("inner", (shared.inner.weight,), encoder.transform[0].weight, lambda tensor: tensor[:, :width])
        yield Match("inner bias", (shared.inner.bias,), encoder.transform[0].bias)
        yield Match("outer", (shared.outer.weight,), encoder.transform[2].weight)
        yield Match("outer bias", (shared.outer.bias,), encoder.transform[2].bias)


def _head(adapter: Adapter, model: peft.PeftModel) -> Iterator[Match]:
    if isinstance(adapter.head, TaskHead):
        saved = model.get_base_model().get_submodule(adapter.head.names["out"]).modules_to_save["default"]
        for name, value in adapter.head.out.named_parameters():
            yield Match(f"head {name}", (value,), saved.get_parameter(name))


# Outputs ------------------------------------------------------------------------------------------


def given(kind: str, head: bool = False, padded: str | None = None) -> Given:
    """Ids and mask of three rows; for BERT's classifier two segments."""
    batch = bases.batch(ROWS, LENGTH, padded)
    if kind == "bert" and head:
        batch["token_type_ids"] = (torch.arange(LENGTH) > 2).long().expand(ROWS, -1) * batch["attention_mask"]
    return batch


def next_tokens(batch: Given) -> Tensor:
    """The token that follows each real position [B, S]; -100 at the last and at padding."""
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    follows = torch.zeros_like(real)
    follows[:, :-1] = real[:, :-1] & real[:, 1:]
    return ids.roll(-1, dims=1).masked_fill(~follows, -100)


def our_values(base: Base, name: str | None, batch: Given, head: bool = False) -> Values:
    """Outputs at real positions, in the order of rows: `scores` with a head, else `states` [N, d] and what is read
    from them."""
    if head:
        return {"scores": scores(base, batch, name)}
    real = batch["attention_mask"].bool()
    with base.route(name):
        hidden = base.hidden(batch)
        values = {"states": hidden.last[real]}
        if hidden.pooled is not None:
            values["pooled"] = hidden.pooled
        if base.family.lm_head:
            values["logits"] = base.model.get_output_embeddings()(hidden.last)[real]
    return values


def peft_values(model: peft.PeftModel, kind: str, batch: Given, head: bool = False) -> tuple[Values, Tensor | None]:
    """The same from peft, and transformers' own loss where it gives one. Rows padded on the left get explicit
    positions."""
    mask = batch["attention_mask"]
    real, more = mask.bool(), {}
    if bool((mask[:, 0] == 0).any()):
        more["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    if head:
        output = model(**batch, **more, labels=TARGETS[: len(mask)])
        return {"scores": output.logits}, output.loss
    cut = virtual_tokens(model)
    if kind == "bert":
        output = model(**batch, **more)
        return {"states": output.last_hidden_state[:, cut:][real], "pooled": output.pooler_output}, None
    if kind == "t5":
        start = torch.full_like(mask[:, :1], model.config.pad_token_id)
        shifted = torch.cat([start, batch["input_ids"][:, :-1]], dim=1)
        output = model(**batch, decoder_input_ids=shifted, output_hidden_states=True)
        return {"states": output.decoder_hidden_states[-1][real], "logits": output.logits[real]}, None
    # Shifted by one inside transformers: a row's first token, which a virtual one would predict, is not a target.
    labels = torch.full_like(mask, -100)
    labels[:, 1:] = next_tokens(batch)[:, :-1]
    output = model(**batch, **more, labels=labels, output_hidden_states=True)
    states = output.hidden_states[-1][:, cut:]
    return {"states": states[real], "logits": output.logits[:, cut:][real]}, output.loss


def peft_rows(model: peft.PeftModel, kind: str, batch: Given, head: bool = False) -> tuple[Values, None]:
    """The same, each row run by itself without padding."""
    rows = []
    for index, real in enumerate(batch["attention_mask"].bool()):
        row = {key: value[index : index + 1, real] for key, value in batch.items()}
        rows.append(peft_values(model, kind, row, head)[0])
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}, None


def loss_of(values: Values, batch: Given) -> Tensor:
    """Cross-entropy of scores or next tokens; a fixed function of the states of an encoder without a head."""
    if "scores" in values:
        return F.cross_entropy(values["scores"], TARGETS)
    if "logits" in values:
        targets = next_tokens(batch)[batch["attention_mask"].bool()]
        return F.cross_entropy(values["logits"], targets, ignore_index=-100)
    weights = torch.Generator().manual_seed(5)
    return sum((torch.randn(v.shape, generator=weights) * v).mean() for v in values.values())


# Comparing ----------------------------------------------------------------------------------------


def difference(mine: Tensor, theirs: Tensor, what: str) -> float:
    """The largest difference, which must be within the tolerance, and small beside the values."""
    assert mine.shape == theirs.shape, f"{what}: {tuple(mine.shape)}, peft has {tuple(theirs.shape)}"
    size = float(theirs.abs().max())
    assert size > 1e-6, f"{what}: peft's is zero"
    largest = float((mine - theirs).abs().max())
    limit = min(TOLERANCE * max(1.0, size), 1e-3 * size)
    assert largest <= limit, f"{what}: differs by {largest:.3g}, size {size:.3g}"
    return largest


def same(mine: Values, theirs: Values) -> dict[str, float]:
    """Differences of outputs, by name."""
    assert mine.keys() == theirs.keys()
    return {name: difference(mine[name].detach(), theirs[name].detach(), name) for name in mine}


def compare(both: Pair, padded: str | None, alone: bool = False) -> dict[str, float]:
    """Largest differences of outputs, loss and gradients; `alone`: peft runs every row by itself.

    The adapter must matter: without it the outputs differ by more than a hundredth.
    """
    head = both.adapter.head is not None
    batch = given(both.kind, head, padded)
    mine = our_values(both.base, both.adapter.name, batch, head)
    theirs, own_loss = (peft_rows if alone else peft_values)(both.model, both.kind, batch, head)
    found = same(mine, theirs)
    our_loss = loss_of(mine, batch)
    their_loss = loss_of(theirs, batch) if own_loss is None else own_loss
    found["loss"] = difference(our_loss.detach(), their_loss.detach(), "loss")
    our_loss.backward()
    their_loss.backward()
    for match in both.matches:
        assert all(parameter.grad is not None for parameter in match.ours), f"{match.name} has no gradient"
        gradient = match.join(*(parameter.grad for parameter in match.ours))
        found[f"d {match.name}"] = difference(gradient, match.theirs.grad, f"gradient of {match.name}")
    assert all(parameter.grad is None for parameter in both.base.model.parameters() if not parameter.requires_grad)
    if not head:
        with torch.no_grad():
            plain = our_values(both.base, None, batch)
        assert max(float((plain[name] - mine[name].detach()).abs().max()) for name in plain) > 1e-2
    return found
