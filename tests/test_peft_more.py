"""The other methods that peft has against the installed peft: outputs, loss, gradients, and folders both ways.

LoRA's variants, DoRA, VeRA, (IA)³, P-tuning and P-tuning v2; AdaLoRA is in test_adalora.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_folders import (
    HEADS,
    add,
    assert_equal_tensors,
    assert_refused,
    check_read_by_graft,
    check_read_by_peft,
    drop,
    from_graft,
    from_peft,
    put,
    read_by_peft,
    read_config,
    setting,
    tensors,
    weights,
    write_config,
    written_by_peft,
)
from peft_tools import (
    STATES,
    compare,
    difference,
    given,
    loss_of,
    make,
    our_values,
    ours,
    pair,
    peft_values,
    peft_warnings,
    same,
    twin,
)

from graft.errors import DamagedError
from graft.methods import store
from graft.methods.ia3 import ScaledInput

PADDINGS = (None, "right")
FAMILIES = ("llama", "gpt2", "bert")
EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings"}
KEYS = {"llama": "k_proj", "gpt2": "c_attn", "bert": "key"}
QUERY = {"llama": "q_proj", "gpt2": "c_attn", "bert": "query"}
FEED = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "bert": "intermediate.dense"}
"""A linear of another size than those of the attention."""
SECOND = {
    "llama": "model.layers.1.self_attn.q_proj",
    "gpt2": "transformer.h.1.attn.c_attn",
    "bert": "encoder.layer.1.attention.self.query",
}


def patterns(kind: str) -> dict[str, Any]:
    """Other ranks and alphas at some sites; the first key that fits counts."""
    return {
        "target_modules": [QUERY[kind], KEYS[kind], FEED[kind]],
        "rank_pattern": {SECOND[kind]: 2, FEED[kind]: 7, QUERY[kind]: 3},
        "alpha_pattern": {SECOND[kind]: 5, QUERY[kind]: 3, FEED[kind].split(".")[-1]: 11.5},
    }


def anchored(pattern: dict[str, Any], kind: str, head: bool) -> dict[str, Any]:
    """peft sorts the keys when it saves, and then takes the first that fits: one with ^ comes before the others."""
    path = f"bert.{SECOND[kind]}" if head and kind == "bert" else SECOND[kind]
    return {f"^{path}" if key == SECOND[kind] else key: value for key, value in pattern.items()}


def low_rank(kind: str, case: str) -> dict[str, Any]:
    """Settings of LoRA and DoRA from the words of a case; Graft and peft spell them alike."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": [QUERY[kind], FEED[kind]]}
    if "rslora" in case:
        settings["use_rslora"] = True
    if "patterns" in case:
        settings |= patterns(kind)
    if "all-linear" in case:
        settings["target_modules"] = "all-linear"
    if "embeddings" in case:
        settings["target_modules"] = [EMBEDDING[kind]] if case == "embeddings" else [EMBEDDING[kind], KEYS[kind]]
    return settings


def given_to_both(kind: str, case: str, head: bool = False) -> tuple[dict[str, Any], peft.PeftConfig]:
    """A case in Graft and in peft."""
    fused = kind == "gpt2"
    if case.startswith("vera"):
        settings = {"r": 12, "target_modules": [QUERY[kind], FEED[kind]]} | VERA[case]
        with peft_warnings():
            return {"name": "vera"} | settings, peft.VeraConfig(fan_in_fan_out=fused, **settings)
    if case.startswith("ia3"):
        feed = [FEED[kind]] if case == "ia3 inputs" else []
        settings = {"target_modules": [KEYS[kind], FEED[kind]], "feedforward_modules": feed}
        return {"name": "ia3"} | settings, peft.IA3Config(fan_in_fan_out=fused, **settings)
    if case.startswith("ptuning "):
        settings = {"num_virtual_tokens": 3} | PTUNING[case]
        theirs = peft.PromptEncoderConfig(num_transformer_submodules=1, **settings)
        return {"name": "ptuning", "pool": "virtual"} | settings, theirs
    if case == "ptuning_v2":
        return {"name": case, "num_virtual_tokens": 3}, peft.PrefixTuningConfig(num_virtual_tokens=3)
    settings = low_rank(kind, case)
    name = "dora" if "dora" in case else "lora"
    spelled = {key: anchored(value, kind, head) for key, value in settings.items() if key.endswith("_pattern")}
    # peft counts BERT's pooler among the linears, Graft only what is inside the layers.
    left_out = ["pooler.dense"] if settings["target_modules"] == "all-linear" and kind == "bert" else None
    theirs = peft.LoraConfig(
        fan_in_fan_out=fused, use_dora=name == "dora", exclude_modules=left_out, **settings | spelled
    )
    return {"name": name} | settings, theirs


VERA: dict[str, dict[str, Any]] = {
    "vera": {},
    "vera wide": {"r": 40, "projection_prng_key": 7},
    "vera unsaved": {"save_projection": False, "projection_prng_key": 3},
}
PTUNING: dict[str, dict[str, Any]] = {
    "ptuning mlp": {"encoder_hidden_size": 20},
    "ptuning lstm": {
        "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12, "encoder_num_layers": 2,
    },
}  # fmt: skip
CASES = (
    "rslora", "patterns", "rslora patterns", "rslora all-linear", "embeddings", "embeddings and more", "dora",
    "dora rslora", "dora patterns", "dora all-linear", *VERA, "ia3 outputs", "ia3 inputs", *PTUNING, "ptuning_v2",
)  # fmt: skip


def tensors_of(kind: str, case: str) -> int:
    """Tensors that train, without a head."""
    fixed = {"ptuning mlp": 7, "ptuning lstm": 21, "ptuning_v2": 1, "embeddings": 2}
    if case in fixed:
        return fixed[case]
    each = 3 if "dora" in case else 1 if "ia3" in case else 2
    if "all-linear" in case:
        return each * {"llama": 14, "gpt2": 8, "bert": 12}[kind]
    if case == "embeddings and more":
        return 2 + 2 * 2
    return each * 2 * (3 if "patterns" in case and kind != "gpt2" else 2)


@pytest.mark.parametrize("padded", PADDINGS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", FAMILIES)
def test_outputs_loss_and_gradients(kind, case, padded):
    both = pair(kind, *given_to_both(kind, case))
    found = compare(both, padded)
    assert len(both.matches) == tensors_of(kind, case)
    assert found.keys() == STATES.get(kind, {"states", "logits"}) | {"loss"} | {f"d {m.name}" for m in both.matches}


# Folders ------------------------------------------------------------------------------------------

STORED = [case for case in CASES if case not in ("rslora", "dora rslora", "dora", "vera wide")]
"""Those left out differ from another one in a number only."""


def stored_tensors(kind: str, case: str) -> int:
    """Tensors in a folder, without a head: an encoder is folded into what it makes, VeRA's matrices are stored."""
    if "ptuning" in case:
        return 1
    return tensors_of(kind, case) + (2 if case == "vera" else 0)


def folder_cases() -> list[Any]:
    kinds = [(kind, case, head) for kind in FAMILIES for case in STORED for head in (False, True)]
    return [pytest.param(*given, id=f"{given[1]}-{given[0]}-{'head' if given[2] else 'bare'}") for given in kinds]


@pytest.mark.parametrize(("kind", "case", "head"), folder_cases())
def test_peft_reads_what_graft_wrote(kind, case, head, tmp_path):
    settings, _ = given_to_both(kind, case)
    check_read_by_peft(tmp_path, kind, settings, head, stored_tensors(kind, case))


@pytest.mark.parametrize(("kind", "case", "head"), folder_cases())
def test_graft_reads_what_peft_wrote(kind, case, head, tmp_path):
    settings, config = given_to_both(kind, case, head)
    name = "prefix" if case == "ptuning_v2" else settings["name"]  # peft's prefixes are read as `prefix`
    check_read_by_graft(tmp_path, kind, config, head, name)


@pytest.mark.parametrize("case", STORED)
def test_round_trip(case, tmp_path):
    """What Graft wrote, read by Graft: the same tensors and outputs, bit for bit."""
    settings, _ = given_to_both("bert", case)
    base, adapter = ours("bert", settings, head=True)
    store.save(adapter, base, tmp_path / "mine")
    again = make("bert")
    loaded = store.load(again, tmp_path / "mine")
    if case.startswith("ptuning "):  # folded into the tokens that it makes
        assert loaded.method == adapter.method.saved_as(adapter) != adapter.method
        assert list(loaded.tensors()) == ["embed.embedding", "head.out.weight", "head.out.bias"]
    else:
        assert_equal_tensors(adapter, loaded, len(adapter.tensors()))
        layers = 2 if case == "ptuning_v2" else 1  # peft has one tensor for all
        assert len(loaded.trainable()) == layers * tensors_of("bert", case) + HEADS["bert"]
    found = same(from_graft(again, "bert", True), from_graft(base, "bert", True))
    assert set(found.values()) == {0.0}


# LoRA: ranks and alphas by site, large ranks, embeddings ------------------------------------------


def in_order(keys: list[str]) -> dict[str, Any]:
    """Rank 3 and alpha 5 by the first key, rank 2 and alpha 7 by the second."""
    return {"rank_pattern": {keys[0]: 3, keys[1]: 2}, "alpha_pattern": {keys[0]: 5, keys[1]: 7}}


def test_the_first_key_that_fits_counts():
    """As in peft, whatever its place in the alphabet."""
    seen = []
    for keys in (["q_proj", SECOND["llama"]], [SECOND["llama"], "q_proj"]):
        settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]} | in_order(keys)
        both = pair("llama", {"name": "lora"} | settings, peft.LoraConfig(**settings))
        compare(both, "right")
        seen.append([(len(part.lora_A), part.scale) for _, part in both.adapter.placed])
    assert seen == [
        [(3, 5 / 3), (4, 1.5), (3, 5 / 3), (4, 1.5)],
        [(2, 7 / 2), (4, 1.5), (3, 5 / 3), (4, 1.5)],
    ]


@pytest.mark.parametrize(
    "keys", [["attn.q", "layers.1.attn.q"], ["layers.1.attn.q", "attn.q"], ["q_proj", SECOND["llama"]]]
)
def test_the_order_of_keys_survives_a_folder(keys, tmp_path):
    """JSON files are sorted, so folders spell the patterns site by site."""
    adapter = check_read_by_peft(tmp_path, "llama", {"name": "lora", "r": 4} | in_order(keys), head=False)
    again = make("llama")
    loaded = store.load(again, tmp_path / "mine")
    assert_equal_tensors(adapter, loaded, 8)
    assert [part.scale for part in loaded.parts] == [part.scale for part in adapter.parts]


def test_peft_loses_the_order_of_keys(tmp_path):
    """Its folders are sorted too, and what it reads from them can differ from what it wrote. Graft reads the same."""
    config = peft.LoraConfig(target_modules=["q_proj"], alpha_pattern={"q_proj": 30, SECOND["llama"]: 1})
    model = written_by_peft(tmp_path / "theirs", "llama", config)
    base = make("llama")
    store.load(base, tmp_path / "theirs")
    again = read_by_peft(tmp_path / "theirs", make("llama"), "llama")
    mine, theirs = from_graft(base, "llama", False), from_peft(again, "llama", False)
    same(mine, theirs)
    assert float((theirs["logits"] - from_peft(model, "llama", False)["logits"]).abs().max()) > 1e-2


def test_a_rank_above_the_smaller_size(tmp_path):
    """Usual where keys and values are narrow and every linear is adapted; peft takes it."""
    settings = {"r": 20, "lora_alpha": 8, "use_rslora": True, "target_modules": ["k_proj", "q_proj"]}
    both = pair("llama", {"name": "lora"} | settings, peft.LoraConfig(**settings))
    assert {part.lora_B.shape for part in both.adapter.parts} == {(16, 20), (32, 20)}
    compare(both, "right")
    check_read_by_peft(tmp_path, "llama", {"name": "lora"} | settings, head=False)
    check_read_by_graft(tmp_path, "llama", peft.LoraConfig(**settings), False, "lora")


@pytest.mark.parametrize("padded", PADDINGS)
def test_scaled_embeddings(padded):
    """Gemma multiplies what it looks up, and so what LoRA adds."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"]}
    both = pair("gemma3", {"name": "lora"} | settings, peft.LoraConfig(**settings))
    assert both.base.body.embed_tokens.scalar_embed_scale == 32**0.5
    assert len(compare(both, padded)) == 3 + 2 + 2 * 2


def test_folders_of_scaled_embeddings(tmp_path):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens"]}
    check_read_by_peft(tmp_path, "gemma3", {"name": "lora"} | settings, head=False)
    check_read_by_graft(tmp_path, "gemma3", peft.LoraConfig(**settings), False, "lora")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_row_of_the_padding_token_trains_where_the_tables_does(kind):
    """Llama's table keeps the row of its padding token, also where that token is read; GPT-2's has no such row."""
    both = pair(kind, *given_to_both(kind, "embeddings"))
    batch = given(kind)
    batch["input_ids"][:, 2] = 0
    mine, (theirs, their_loss) = our_values(both.base, "mine", batch), peft_values(both.model, kind, batch)
    same(mine, theirs)
    loss_of(mine, batch).backward()
    their_loss.backward()
    first = both.matches[0]
    assert first.name == "embed.lora_embedding_A"
    difference(first.ours[0].grad, first.theirs.grad, first.name)
    assert bool(first.theirs.grad[:, 0].any()) == (kind == "gpt2")


@pytest.mark.parametrize("modules", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"]])
def test_weights_of_the_base_that_peft_stores(modules, tmp_path):
    """peft stores the base's table beside an adapter of it, unless told not to."""
    with pytest.warns(UserWarning, match="Setting `save_embedding_layers` to `True`"):
        model = written_by_peft(
            tmp_path / "theirs", "llama", peft.LoraConfig(target_modules=modules), save_embedding_layers="auto"
        )
    stored = [name for name in tensors(tmp_path / "theirs") if name.endswith(".base_layer.weight")]
    assert len(stored) == 1
    base = make("llama")
    adapter = store.load(base, tmp_path / "theirs")
    assert len(adapter.placed) == 3
    same(from_graft(base, "llama", False), from_peft(model, "llama", False))
    other = make("llama", seed=1)
    assert_refused(other, tmp_path / "theirs", ["1 stored tensors of the base differ from those of llama", stored[0]])
    add(stored[0], 0.1)(tmp_path / "theirs")
    assert_refused(make("llama"), tmp_path / "theirs", ["1 stored tensors of the base differ"])


def test_the_shared_embeddings_of_an_encoder_decoder(tmp_path):
    """peft replaces T5's `shared`, but encoder and decoder call the table by other names: its LoRA changes nothing."""
    config = peft.LoraConfig(target_modules=["shared", "q"])
    model = written_by_peft(tmp_path / "theirs", "t5", config)
    layer = model.get_base_model().shared
    before = from_peft(model, "t5", False)["logits"]
    with torch.no_grad():
        layer.lora_embedding_A["default"].add_(1.0)
    assert torch.equal(from_peft(model, "t5", False)["logits"], before)
    assert_refused(make("t5"), tmp_path / "theirs", ["the encoder and the decoder of t5 share their embeddings"])


# VeRA ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [0, 1, 12345])
def test_equal_keys_draw_equal_projections(key):
    """Of the size of the widest input and the widest output, which two sites have."""
    settings = {"r": 5, "projection_prng_key": key, "target_modules": ["k_proj", "up_proj", "down_proj"]}
    both = pair("llama", {"name": "vera"} | settings, peft.VeraConfig(**settings))
    shared, theirs = both.adapter.shared, both.model.base_model
    assert shared.vera_A.shape == (5, 48)
    assert shared.vera_B.shape == (48, 5)
    assert torch.equal(shared.vera_A, theirs.vera_A["default"])
    assert torch.equal(shared.vera_B, theirs.vera_B["default"])
    assert {(site.d_in, site.d_out) for site, _ in both.adapter.placed} == {(32, 16), (32, 48), (48, 32)}


def test_projections_left_out_are_drawn_again(tmp_path):
    """With another key, the same file gives other outputs; with the matrices in it, the same."""
    for saved in (True, False):
        base, adapter = ours("llama", {"name": "vera", "r": 5, "save_projection": saved})
        store.save(adapter, base, tmp_path / "mine")
        assert len(tensors(tmp_path / "mine")) == 8 + 2 * saved
        (tmp_path / "mine" / "graft.json").unlink()
        setting("projection_prng_key", 9)(tmp_path / "mine")
        again = make("llama")
        store.load(again, tmp_path / "mine")
        mine, before = from_graft(again, "llama", False)["logits"], from_graft(base, "llama", False)["logits"]
        assert torch.equal(mine, before) == saved


# (IA)³ --------------------------------------------------------------------------------------------

MORE_IN_PEFT = {
    "bert": {"attention.output.dense"}, "roberta": {"attention.output.dense"},
    "qwen2": {"q_proj"}, "qwen3": {"q_proj"}, "gemma3": {"q_proj"},
}  # fmt: skip
LESS_IN_PEFT = {"qwen2": {"k_proj"}, "qwen3": {"k_proj"}, "gemma3": {"k_proj"}}


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "t5", "bert", "roberta", "qwen2", "qwen3", "gemma3"])
def test_default_sites(kind):
    """peft's own, but for two departures of peft's from the paper, which has keys, values and inner activations:
    `output.dense` also ends the output projection of BERT's attention, and some decoders have queries for keys.
    """
    base, adapter = ours(kind, {"name": "ia3"})
    with peft_warnings():
        model = peft.get_peft_model(twin(base, kind), peft.IA3Config(fan_in_fan_out=kind == "gpt2"))
    modules = dict(model.get_base_model().named_modules())
    layers = {path: module.is_feedforward for path, module in modules.items() if hasattr(module, "ia3_l")}
    mine = {site.path: isinstance(part, ScaledInput) for site, part in adapter.placed}

    def ending(paths: set[str], ends: dict[str, set[str]]) -> bool:
        return all(path.endswith(tuple(ends.get(kind, ()))) for path in paths)

    more, less = layers.keys() - mine.keys(), mine.keys() - layers.keys()
    assert len(more) == 2 * len(MORE_IN_PEFT.get(kind, ()))
    assert len(less) == 2 * len(LESS_IN_PEFT.get(kind, ()))
    assert ending(more, MORE_IN_PEFT)
    assert ending(less, LESS_IN_PEFT)
    common = mine.keys() & layers.keys()
    assert {path: mine[path] for path in common} == {path: layers[path] for path in common}
    assert len(common) == {"gpt2": 4, "t5": 16, "qwen2": 4, "qwen3": 4, "gemma3": 4}.get(kind, 6)


@pytest.mark.parametrize("kind", FAMILIES)
def test_default_sites_of_peft_are_read(kind, tmp_path):
    adapter = check_read_by_graft(tmp_path, kind, peft.IA3Config(fan_in_fan_out=kind == "gpt2"), False, "ia3")
    sides = [isinstance(part, ScaledInput) for part in adapter.parts]
    assert (len(sides), sum(sides)) == {"llama": (6, 2), "gpt2": (4, 2), "bert": (8, 4)}[kind]


@pytest.mark.parametrize("kind", FAMILIES)
def test_default_sites_of_graft_are_read_by_peft(kind, tmp_path):
    adapter = check_read_by_peft(tmp_path, kind, {"name": "ia3"}, False, 4 if kind == "gpt2" else 6)
    assert sum(isinstance(part, ScaledInput) for part in adapter.parts) == 2


# P-tuning v2 --------------------------------------------------------------------------------------


def test_prompts_in_the_last_layers_only(tmp_path):
    """peft has a prefix in every layer: it is told another type, and refuses it."""
    base, adapter = ours("llama", {"name": "ptuning_v2", "num_virtual_tokens": 3, "last_layers": 1})
    store.save(adapter, base, tmp_path / "mine")
    with peft_warnings(), pytest.raises(KeyError, match="GRAFT_PTUNING_V2"):
        peft.PeftModel.from_pretrained(twin(base, "llama"), str(tmp_path / "mine"))
    again = make("llama")
    assert_equal_tensors(adapter, store.load(again, tmp_path / "mine"), 1)
    same(from_graft(again, "llama", False), from_graft(base, "llama", False))


# Faults -------------------------------------------------------------------------------------------

QUERY_0 = "base_model.model.model.layers.0.self_attn.q_proj"
DOWN_0 = "base_model.model.model.layers.0.mlp.down_proj"
KEY_0 = "base_model.model.model.layers.0.self_attn.k_proj"

Fault = tuple[str, Callable[[Path], Any], list[str]]
BOTH: dict[str, Fault] = {
    "dora: no magnitude": (
        "dora",
        drop(f"{QUERY_0}.lora_magnitude_vector"),
        ["of 12 tensors 1 missing (layers.0.attn.q.lora_magnitude_vector)"],
    ),
    "dora: magnitude of another size": (
        "dora",
        put(f"{DOWN_0}.lora_magnitude_vector", 33),
        ["of 12 tensors 1 of another shape (layers.0.mlp.down.lora_magnitude_vector)"],
    ),
    "dora: more tensors": (
        "dora",
        weights(lambda stored: stored.update({f"{QUERY_0}.lora_{c}": torch.ones(1) for c in "CDEF"})),
        ["of 12 tensors 4 unexpected (layers.0.attn.q.lora_C, layers.0.attn.q.lora_D, layers.0.attn.q.lora_E …)"],
    ),
    "embeddings: A missing": (
        "embeddings",
        drop("base_model.model.model.embed_tokens.lora_embedding_A"),
        ["of 2 tensors 1 missing (embed.lora_embedding_A)"],
    ),
    "embeddings: another vocabulary": (
        "embeddings",
        put("base_model.model.model.embed_tokens.lora_embedding_A", 4, 98),
        ["of 2 tensors 1 of another shape (embed.lora_embedding_A)"],
    ),
    "vera: no matrix": ("vera", drop("base_model.vera_A"), ["of 10 tensors 1 missing (shared.vera_A)"]),
    "vera: smaller matrices": (
        "vera",
        put("base_model.vera_A", 12, 32),
        ["of 10 tensors 1 of another shape (shared.vera_A)"],
    ),
    "vera: no vector": (
        "vera",
        drop(f"{QUERY_0}.vera_lambda_b"),
        ["of 10 tensors 1 missing (layers.0.attn.q.vera_lambda_b)"],
    ),
    "vera: more tensors": ("vera", put("base_model.vera_C", 2), ["of 10 tensors 1 unexpected", "vera_C"]),
    "vera: vector of another size": (
        "vera",
        put(f"{QUERY_0}.vera_lambda_d", 11),
        ["of 10 tensors 1 of another shape (layers.0.attn.q.vera_lambda_d)"],
    ),
    "ia3: for the other side": (
        "ia3 inputs",
        put(f"{KEY_0}.ia3_l", 1, 16),
        ["of 4 tensors 1 of another shape (layers.0.attn.k.ia3_l)"],
    ),
    "ia3: more tensors": ("ia3 inputs", put(f"{KEY_0}.ia3_lambda", 2), ["of 4 tensors 1 unexpected", "ia3_lambda"]),
    "ptuning: no tokens": (
        "ptuning mlp",
        weights(lambda stored: stored.update(other=stored.pop("prompt_embeddings"))),
        ["of 1 tensors 1 missing (embed.embedding), 1 unexpected (other)"],
    ),
    "ptuning: narrower": (
        "ptuning mlp",
        put("prompt_embeddings", 3, 31),
        ["of 1 tensors 1 of another shape (embed.embedding)"],
    ),
    "ptuning: with its encoder": (
        "ptuning mlp",
        put("mlp_head.0.weight", 20, 32),
        ["of 1 tensors 1 unexpected (mlp_head.0.weight)"],
    ),
    "ptuning_v2: narrower": (
        "ptuning_v2",
        put("prompt_embeddings", 3, 60),
        ["one tensor prompt_embeddings of shape (3, 64), got", "(3, 60)"],
    ),
}
"""Of folders on Llama that either wrote: a case, what damages its folder, and what the message says."""

THEIRS: dict[str, Fault] = {
    "dora: r disagrees": ("dora", setting("r", 3), ["of 12 tensors 8 of another shape", " …"]),
    "dora: not said": ("dora", setting("use_dora", False), ["of 8 tensors 4 unexpected", "lora_magnitude_vector"]),
    "dora: said, but LoRA": ("rslora", setting("use_dora", True), ["of 12 tensors 4 missing", "magnitude_vector"]),
    "dora: no module": (
        "dora",
        drop(*(f"{QUERY_0}.{end}" for end in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"))),
        ["1 modules of target_modules have no tensors", "model.layers.0.self_attn.q_proj"],
    ),
    "rank of another site": (
        "dora",
        setting("rank_pattern", {"q_proj": 3}),
        ["of 12 tensors 4 of another shape (layers.0.attn.q.lora_A, layers.0.attn.q.lora_B"],
    ),
    "rank 0": ("rslora", setting("rank_pattern", {"q_proj": 0}), ["rank_pattern: 0 is not from 1 to 32"]),
    "rank beyond any size": ("rslora", setting("r", 500), ["r: 500 is not from 1 to 32, the size of layers.0.attn.q"]),
    "alpha 0": ("rslora", setting("lora_alpha", 0), ["lora_alpha: Input should be greater than 0"]),
    "ranks by regular expression": ("dora", setting("rank_pattern", {"(a+)+b": 4}), ["rank_pattern has the regular"]),
    "alphas by regular expression": ("dora", setting("alpha_pattern", {".*": 4}), ["alpha_pattern has the regular"]),
    "ranks in a list": ("rslora", setting("rank_pattern", [4]), ["rank_pattern is not an object"]),
    "vera: r disagrees": ("vera", setting("r", 11), ["of 10 tensors 6 of another shape", " …"]),
    "vera: r too large": ("vera", setting("r", 10**9), ["r: Input should be less than or equal to 65536"]),
    "vera: no key": ("vera", setting("projection_prng_key", None), ["projection_prng_key: Input should be"]),
    "vera: no module": (
        "vera",
        drop(f"{QUERY_0}.vera_lambda_b", f"{QUERY_0}.vera_lambda_d"),
        ["1 modules of target_modules have no tensors", "model.layers.0.self_attn.q_proj"],
    ),
    "vera: no tensors": ("vera", weights(dict.clear), ["no vera_lambda_… among 0 tensors"]),
    "vera: biases": ("vera", setting("bias", "vera_only"), ["bias = 'vera_only' is not supported"]),
    "ia3: no module": ("ia3 inputs", drop(f"{KEY_0}.ia3_l"), ["1 modules of target_modules have no tensors"]),
    "ia3: no tensors": ("ia3 inputs", weights(dict.clear), ["no ia3_l… among 0 tensors"]),
    "ptuning: more tokens": ("ptuning mlp", setting("num_virtual_tokens", 4), ["of 1 tensors 1 of another shape"]),
    "ptuning: endless tokens": ("ptuning mlp", setting("num_virtual_tokens", 10**12), ["less than or equal to 65536"]),
}
"""Of folders that peft wrote."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Adapters of Llama by case and by who wrote them."""
    found = {}
    for case in ("rslora", "dora", "embeddings", "vera", "ia3 inputs", "ptuning mlp", "ptuning_v2"):
        folder = tmp_path_factory.mktemp("adapters")
        settings, config = given_to_both("llama", case)
        base, adapter = ours("llama", settings)
        store.save(adapter, base, folder / "mine")
        written_by_peft(folder / "theirs", "llama", config)
        found |= {(case, origin): folder / origin for origin in ("mine", "theirs")}
    return found


@pytest.mark.parametrize(
    ("origin", "fault"),
    [("mine", fault) for fault in BOTH] + [("theirs", fault) for fault in BOTH | THEIRS],
)
def test_damaged_folders(origin, fault, folders, tmp_path):
    case, damage, said = (BOTH | THEIRS)[fault]
    folder = tmp_path / "adapter"
    shutil.copytree(folders[case, origin], folder)
    damage(folder)
    assert_refused(make("llama"), folder, said)


def test_whole_folders_are_read(folders):
    """What is damaged above was whole."""
    base = make("llama")
    for case, origin in folders:
        store.load(base, folders[case, origin], f"{case.split()[0]}-{origin}")
    assert len(base.adapters) == 14


def test_changed_values(folders, tmp_path):
    """Found by their digest; without one, by the outputs on fixed ids."""
    for case, origin in folders:
        if origin == "mine":
            folder = tmp_path / case
            shutil.copytree(folders[case, origin], folder)
            add(max(tensors(folder)), 0.5)(folder)
            assert_refused(make("llama"), folder, ["is not what was saved"])
            about = json.loads((folder / "graft.json").read_text(encoding="utf-8"))
            del about["sha256"]
            (folder / "graft.json").write_text(json.dumps(about), encoding="utf-8")
            assert_refused(make("llama"), folder, ["outputs on fixed ids differ by"])


def test_adapters_of_another_base(folders):
    """Of Llama, given to BERT and to a Llama of wider heads."""
    other = {"dora": "4 of 4", "rslora": "4 of 4", "vera": "4 of 4", "ia3 inputs": "4 of 4", "embeddings": "1 of 1"}
    for case, count in other.items():
        said = [f"{count} adapted modules are not in bert", "another base"]
        assert_refused(make("bert"), folders[case, "theirs"], said)
        assert_refused(make("bert"), folders[case, "mine"], ["made for llama, whose weights differ"])
    for case in ("dora", "vera"):
        assert_refused(make("wide"), folders[case, "theirs"], [" of another shape"])


CONFIGS = {
    "dora": peft.LoraConfig, "vera": peft.VeraConfig, "ia3 inputs": peft.IA3Config,
    "ptuning mlp": peft.PromptEncoderConfig, "ptuning_v2": peft.PrefixTuningConfig,
}  # fmt: skip
READ = {
    "dora": {
        "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules",
        "fan_in_fan_out", "layers_to_transform", "layers_pattern", "exclude_modules", "megatron_core",
        "qalora_group_size",
    },
    "vera": {
        "r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "target_modules", "fan_in_fan_out",
        "layers_to_transform", "layers_pattern",
    },
    "ia3 inputs": {
        "target_modules", "feedforward_modules", "exclude_modules", "fan_in_fan_out", "init_ia3_weights"
    },
    "ptuning mlp": {
        "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_layers", "num_attention_heads",
        "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
    },
    "ptuning_v2": {
        "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_layers", "num_attention_heads",
        "encoder_hidden_size", "prefix_projection", "init_weights",
    },
}  # fmt: skip
"""Settings that are read, or change nothing once there are tensors."""
COMMON = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode",
    "modules_to_save",
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_settings_that_are_not_read_are_refused(case, folders, tmp_path):
    """Each setting that peft has and that could change the result, with a value that it does not have by itself."""
    shutil.copytree(folders[case, "theirs"], tmp_path / "adapter")
    whole = read_config(tmp_path / "adapter")
    fields = {field.name for field in dataclasses.fields(CONFIGS[case])}
    assert READ[case] <= fields
    others = sorted(fields - READ[case] - COMMON)
    assert len(others) == {"dora": 20, "vera": 2, "ia3 inputs": 0, "ptuning mlp": 0, "ptuning_v2": 0}[case]
    base = make("llama")
    for key in [*others, "zeal"]:
        write_config(tmp_path / "adapter", whole | {key: {"some": "thing"}})
        with pytest.raises(DamagedError) as caught:
            store.load(base, tmp_path / "adapter")
        assert f"adapter: {key} = {{'some': 'thing'}} is not supported" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_dora_at_embeddings_is_refused(tmp_path):
    """peft has it, Graft does not."""
    for name, modules, said in (
        ("one", ["embed_tokens"], ["dora cannot sit at 'embed'"]),
        ("two", ["embed_tokens", "q_proj"], ["of 6 tensors 3 unexpected", "embed_tokens.lora_embedding_A"]),
    ):
        written_by_peft(tmp_path / name, "llama", peft.LoraConfig(target_modules=modules, use_dora=True))
        assert_refused(make("llama"), tmp_path / name, said)
