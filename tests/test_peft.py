"""LoRA, prefix and prompt tuning against the installed peft: outputs, loss, gradients, and folders both ways."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_folders import (
    HEADS,
    about,
    add,
    assert_equal_tensors,
    assert_refused,
    check_read_by_graft,
    check_read_by_peft,
    cut,
    drop,
    from_graft,
    from_peft,
    lora_config,
    pickled,
    put,
    read_by_peft,
    setting,
    targets,
    text,
    weights,
    write_config,
    written_by_peft,
)
from peft_tools import (
    LABELS,
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
    shake,
    twin,
    wrapped,
)

from graft.errors import DamagedError
from graft.methods import store
from graft.parts.attach import detach
from graft.parts.lowrank import LoraPart

PADDINGS = (None, "right", "left")
IGNORED = "Position ids are not supported"


# LoRA: outputs, loss and gradients ----------------------------------------------------------------

# Family, Graft's settings, peft's where it spells them otherwise, adapted modules.
LORA: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "llama default": ("llama", {}, {"target_modules": ["q_proj", "v_proj"]}, 4),
    "llama roles": (
        "llama",
        {"r": 1, "lora_alpha": 0.5, "target_modules": ["attn.o", "mlp.gate"]},
        {"target_modules": ["o_proj", "gate_proj"]},
        4,
    ),
    "llama names": ("llama", {"r": 4, "lora_alpha": 4, "target_modules": ["k_proj", "down_proj"]}, {}, 4),
    "llama all-linear": (
        "llama",
        {"r": 3, "lora_alpha": 7, "target_modules": ["all-linear"]},
        {"target_modules": "all-linear"},
        14,
    ),
    "llama one layer": ("llama", {"r": 2, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}, {}, 2),
    "llama head": (
        "llama",
        {"r": 2, "lora_alpha": 1, "target_modules": ["head", "attn.q"]},
        {"target_modules": ["lm_head", "q_proj"]},
        3,
    ),
    "llama with wide heads": ("wide", {"r": 4, "target_modules": ["q_proj", "v_proj", "o_proj"]}, {}, 6),
    "gpt2 default": ("gpt2", {"r": 4, "lora_alpha": 32}, {"target_modules": ["c_attn"]}, 2),
    "gpt2 roles": (
        "gpt2",
        {"target_modules": ["attn.o", "mlp.up"]},
        {"target_modules": r".*\.attn\.c_proj|.*\.c_fc"},
        4,
    ),
    "gpt2 names": ("gpt2", {"r": 1, "lora_alpha": 2, "target_modules": ["c_attn", "c_proj"]}, {}, 6),
    "gpt2 all-linear": (
        "gpt2",
        {"r": 6, "lora_alpha": 3, "target_modules": ["all-linear"]},
        {"target_modules": "all-linear"},
        8,
    ),
    "bert default": ("bert", {}, {"target_modules": ["query", "value"]}, 4),
    "bert names": ("bert", {"r": 2, "lora_alpha": 9, "target_modules": ["query", "dense"]}, {}, 9),
    # peft counts the pooler among the linears, Graft only what is inside the layers.
    "bert all-linear": (
        "bert",
        {"r": 5, "target_modules": ["all-linear"]},
        {"target_modules": "all-linear", "exclude_modules": ["pooler.dense"]},
        12,
    ),
    "bert first layer": (
        "bert",
        {"r": 8, "lora_alpha": 1, "target_modules": ["mlp.up", "attn.k"], "layers_to_transform": [0]},
        {"target_modules": ["intermediate.dense", "key"]},
        2,
    ),
    "t5 names": ("t5", {"r": 4, "target_modules": ["q", "wo"]}, {}, 10),
}


@pytest.mark.parametrize("padded", PADDINGS)
@pytest.mark.parametrize("case", [case for case in LORA if case != "t5 names"])
def test_lora(case, padded):
    kind, settings, spelled, modules = LORA[case]
    both = pair(kind, {"name": "lora"} | settings, lora_config(kind, **settings | spelled))
    assert len(both.matches) == 2 * modules
    found = compare(both, padded)
    assert len(found) == len(STATES.get(kind, ("states", "logits"))) + 1 + 2 * modules


@pytest.mark.parametrize("padded", [None, "right"])
def test_lora_in_an_encoder_decoder(padded):
    kind, settings, spelled, modules = LORA["t5 names"]
    both = pair(kind, {"name": "lora"} | settings, lora_config(kind, **settings | spelled))
    assert len(both.matches) == 2 * modules
    assert compare(both, padded).keys() >= {"states", "logits", "loss"}


@pytest.mark.parametrize("padded", PADDINGS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_lora_with_a_task_head(kind, padded):
    settings = {"r": 4, "lora_alpha": 3}
    both = pair(
        kind, {"name": "lora"} | settings, lora_config(kind, **settings, target_modules=targets(kind)), head=True
    )
    head = 2 if kind == "bert" else 1  # decoders score without a bias
    found = compare(both, padded)
    assert len(both.matches) == (4 if kind == "gpt2" else 8) + head
    assert found.keys() == {"scores", "loss"} | {f"d {match.name}" for match in both.matches}


def test_lora_at_slices_of_a_fused_projection():
    """peft adapts `c_attn` whole: three LoRAs at its thirds are one of three times the rank, with zeros in B."""
    r, alpha, roles = 2, 5.0, ["attn.q", "attn.k", "attn.v"]
    base, adapter = ours("gpt2", {"name": "lora", "r": r, "lora_alpha": alpha, "target_modules": roles})
    model = wrapped(base, "gpt2", lora_config("gpt2", r=3 * r, lora_alpha=3 * alpha, target_modules=["c_attn"]))
    parts: dict[str, list[LoraPart]] = {}
    for site, part in adapter.placed:
        assert isinstance(part, LoraPart)
        parts.setdefault(site.path, []).append(part)
    assert [len(thirds) for thirds in parts.values()] == [3, 3]
    weights = {
        path: [model.get_base_model().get_submodule(f"{path}.{name}.default").weight for name in ("lora_A", "lora_B")]
        for path in parts
    }
    with torch.no_grad():
        for path, (a, b) in weights.items():
            a.copy_(torch.cat([part.lora_A for part in parts[path]]))
            b.copy_(torch.block_diag(*(part.lora_B for part in parts[path])))
    batch = given("gpt2", padded="right")
    mine, (theirs, their_loss) = our_values(base, "mine", batch), peft_values(model, "gpt2", batch)
    assert same(mine, theirs).keys() == {"states", "logits"}
    loss_of(mine, batch).backward()
    their_loss.backward()
    compared = 0
    for path, (a, b) in weights.items():
        width = b.shape[0] // 3
        for index, part in enumerate(parts[path]):
            rows, columns = slice(index * r, (index + 1) * r), slice(index * width, (index + 1) * width)
            difference(part.lora_A.grad, a.grad[rows], f"{path} A {index}")
            difference(part.lora_B.grad, b.grad[columns, rows], f"{path} B {index}")
            compared += 2
    assert compared == 12


# Prefix and prompt tuning: outputs, loss and gradients --------------------------------------------

PREFIX: dict[str, dict[str, Any]] = {
    "plain": {"num_virtual_tokens": 3},
    "one token": {"num_virtual_tokens": 1},
    "projection": {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 24},
}


@pytest.mark.parametrize("padded", PADDINGS)
@pytest.mark.parametrize("case", PREFIX)
@pytest.mark.parametrize("kind", ["llama", "wide", "gpt2", "bert"])
def test_prefix(kind, case, padded):
    both = pair(kind, {"name": "prefix"} | PREFIX[case], peft.PrefixTuningConfig(**PREFIX[case]))
    assert len(both.matches) == (5 if case == "projection" else 1)
    found = compare(both, padded)
    assert found.keys() == STATES.get(kind, {"states", "logits"}) | {"loss"} | {f"d {m.name}" for m in both.matches}
    if case == "projection":
        _unused_columns_stay(both)


def _unused_columns_stay(both):
    """Under grouped queries peft's embeddings are narrower. What ours multiply by zero gets no gradient."""
    width = both.model.prompt_encoder["default"].embedding.weight.shape[1]
    assert width == (16 if both.kind == "llama" else 32)
    assert not both.adapter.shared.inner.weight.grad[:, width:].any()


@pytest.mark.parametrize("padded", PADDINGS)
@pytest.mark.parametrize("case", ["plain", "projection"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_prefix_with_a_task_head(kind, case, padded):
    both = pair(kind, {"name": "prefix"} | PREFIX[case], peft.PrefixTuningConfig(**PREFIX[case]), head=True)
    found = compare(both, padded)
    assert len(both.matches) == (5 if case == "projection" else 1) + (2 if kind == "bert" else 1)
    assert found.keys() == {"scores", "loss"} | {f"d {match.name}" for match in both.matches}


def prompt(n: int) -> tuple[dict[str, Any], peft.PromptTuningConfig]:
    settings = {"name": "prompt", "num_virtual_tokens": n, "pool": "virtual"}
    return settings, peft.PromptTuningConfig(num_virtual_tokens=n, num_transformer_submodules=1)


@pytest.mark.parametrize("padded", PADDINGS)
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_prompt(kind, n, padded):
    # peft takes no position ids here, and padding between virtual and own tokens moves a row's positions.
    both = pair(kind, *prompt(n))
    found = compare(both, padded, alone=padded == "left")
    assert found.keys() == STATES.get(kind, {"states", "logits"}) | {"loss", "d tokens"}


@pytest.mark.parametrize("padded", [None, "right"])
def test_prompt_in_an_encoder_decoder(padded):
    assert compare(pair("t5", *prompt(3)), padded).keys() == {"states", "logits", "loss", "d tokens"}


@pytest.mark.parametrize("padded", PADDINGS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_prompt_with_a_task_head(kind, padded):
    both = pair(kind, *prompt(3), head=True)
    # transformers' decoders find a row's last token by its id, and peft gives them none: they score the last column.
    found = compare(both, padded, alone=padded == "left" or (padded == "right" and kind != "bert"))
    assert found.keys() == {"scores", "loss"} | {f"d {match.name}" for match in both.matches}
    assert len(both.matches) == (3 if kind == "bert" else 2)


def test_the_pooler_reads_what_is_asked_for():
    """`pool: virtual` is peft's; the default reads the row's own first token, whose state is the same."""
    both = pair("bert", *prompt(3))
    batch = given("bert", padded="right")
    base, adapter = ours("bert", {"name": "prompt", "num_virtual_tokens": 3})
    with torch.no_grad():
        theirs, _ = peft_values(both.model, "bert", batch)
        adapter.placed[0][1].embedding.copy_(both.adapter.placed[0][1].embedding)
        mine = our_values(base, "mine", batch)
        own = base.body.pooler(mine["states"][[0, 8, 14]].unsqueeze(1))  # rows of 8, 6 and 4 tokens
    same({"states": mine["states"]}, {"states": theirs["states"]})
    difference(mine["pooled"], own, "pooled")
    assert float((mine["pooled"] - theirs["pooled"]).abs().max()) > 1e-2


def test_peft_takes_no_positions_for_virtual_tokens():
    """Why rows padded on the left are compared with rows alone."""
    model = pair("llama", *prompt(2)).model
    batch = given("llama", padded="left")
    with pytest.warns(UserWarning, match=IGNORED):
        peft_values(model, "llama", batch)


# Folders that Graft wrote, read by peft -----------------------------------------------------------

# Method, Graft's settings, peft's.
METHODS: dict[str, tuple[dict[str, Any], Callable[[str], peft.PeftConfig]]] = {
    "lora": (
        {"name": "lora", "r": 4, "lora_alpha": 6},
        lambda kind: lora_config(kind, r=4, lora_alpha=6, target_modules=targets(kind)),
    ),
    "prefix": (
        {"name": "prefix", "num_virtual_tokens": 3},
        lambda kind: peft.PrefixTuningConfig(num_virtual_tokens=3),
    ),
    "projection": (
        {"name": "prefix", "num_virtual_tokens": 3, "prefix_projection": True},
        lambda kind: peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True),
    ),
    "prompt": (
        {"name": "prompt", "num_virtual_tokens": 3, "pool": "virtual"},
        lambda kind: prompt(3)[1],
    ),
}
STORED = [
    (kind, method, head)
    for kind in ("llama", "wide", "gpt2", "bert", "t5")
    for method in METHODS
    for head in (False, True)
    # peft's prefix of an encoder-decoder has another shape, and transformers' T5 classifier another head.
    if not (kind == "t5" and (head or method in ("prefix", "projection"))) and not (kind == "wide" and head)
]
STORED += [("roberta", "lora", True), ("roberta", "prefix", True), ("distilbert", "lora", True)]


def stored_ids(case: Any) -> str:
    return {True: "head", False: "bare"}.get(case, case)


@pytest.mark.parametrize(("kind", "method", "head"), STORED, ids=stored_ids)
def test_peft_reads_what_graft_wrote(kind, method, head, tmp_path):
    check_read_by_peft(tmp_path, kind, METHODS[method][0], head, None if method == "lora" else 1)


@pytest.mark.parametrize("case", LORA)
def test_peft_adapts_the_same_modules(case, tmp_path):
    kind, settings, _, modules = LORA[case]
    base, adapter = ours(kind, {"name": "lora"} | settings)
    store.save(adapter, base, tmp_path / "mine")
    model = read_by_peft(tmp_path / "mine", base, kind)
    assert sorted(model.targeted_module_names) == sorted(site.path for site, _ in adapter.placed)
    assert len(model.targeted_module_names) == modules
    same(from_graft(base, kind, False), from_peft(model, kind, False))


@pytest.mark.parametrize("modules", [["dense"], ["attn.o"], ["all-linear"]])
def test_peft_adapts_the_same_modules_below_a_task_model(modules, tmp_path):
    base, adapter = ours("bert", {"name": "lora", "target_modules": modules}, head=True)
    store.save(adapter, base, tmp_path / "mine")
    model = read_by_peft(tmp_path / "mine", base, "bert", head=True)
    assert sorted(model.targeted_module_names) == sorted(f"bert.{site.path}" for site, _ in adapter.placed)
    assert len(model.targeted_module_names) == {"dense": 7, "attn.o": 2, "all-linear": 12}[modules[0]]
    same(from_graft(base, "bert", True), from_peft(model, "bert", True))


def test_slices_are_stored_as_graft_has_them(tmp_path):
    """peft has no LoRA at a third of a projection, so it is told another type, and refuses it."""
    base, adapter = ours("gpt2", {"name": "lora", "r": 2, "target_modules": ["attn.q", "attn.v"]})
    store.save(adapter, base, tmp_path / "mine")
    with peft_warnings(), pytest.raises(KeyError, match="GRAFT_LORA"):
        peft.PeftModel.from_pretrained(twin(base, "gpt2"), str(tmp_path / "mine"))
    again = make("gpt2")
    loaded = store.load(again, tmp_path / "mine")
    assert_equal_tensors(adapter, loaded, 8)
    same(from_graft(again, "gpt2", False), from_graft(base, "gpt2", False))


# Folders that peft wrote, read by Graft -----------------------------------------------------------


@pytest.mark.parametrize(("kind", "method", "head"), STORED, ids=stored_ids)
def test_graft_reads_what_peft_wrote(kind, method, head, tmp_path):
    settings, config = METHODS[method]
    check_read_by_graft(tmp_path, kind, config(kind), head, settings["name"])


@pytest.mark.parametrize("case", LORA)
def test_graft_adapts_the_same_modules(case, tmp_path):
    kind, settings, spelled, modules = LORA[case]
    model = written_by_peft(tmp_path / "theirs", kind, lora_config(kind, **settings | spelled))
    base = make(kind)
    adapter = store.load(base, tmp_path / "theirs", "other")
    assert sorted(site.path for site, _ in adapter.placed) == sorted(model.targeted_module_names)
    assert len(adapter.placed) == modules
    assert adapter.method.lora_alpha == settings.get("lora_alpha", 16)
    same(from_graft(base, kind, False), from_peft(model, kind, False))


@pytest.mark.parametrize("head", [False, True], ids=["bare", "head"])
def test_graft_reads_a_lora_on_every_linear_of_bert(head, tmp_path):
    model = written_by_peft(tmp_path / "theirs", "bert", lora_config("bert", target_modules="all-linear"), head)
    base = make("bert")
    adapter = store.load(base, tmp_path / "theirs")
    assert len(adapter.placed) == 13
    assert "pooler.dense" in {site.path for site, _ in adapter.placed}
    same(from_graft(base, "bert", head), from_peft(model, "bert", head))


HARMLESS: dict[str, dict[str, Any]] = {
    "start gaussian": {"init_lora_weights": "gaussian"},
    "start orthogonal": {"init_lora_weights": "orthogonal"},
    "start at random": {"init_lora_weights": False},
    "dropout": {"lora_dropout": 0.3},
    "regular expression": {"target_modules": r".*\.(q|v)_proj"},
    "layers by pattern": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "one layer": {"layers_to_transform": 1},
    "exclusions": {"target_modules": ["q_proj", "v_proj", "k_proj"], "exclude_modules": ["k_proj"]},
}


@pytest.mark.parametrize("case", HARMLESS)
def test_settings_that_change_no_output_are_read(case, tmp_path):
    given = {"target_modules": ["q_proj", "v_proj"]} | HARMLESS[case]
    model = written_by_peft(tmp_path / "theirs", "llama", lora_config("llama", **given))
    base = make("llama")
    adapter = store.load(base, tmp_path / "theirs")
    assert len(adapter.placed) == (2 if "layer" in case else 4)
    same(from_graft(base, "llama", False), from_peft(model, "llama", False))


def test_a_prefix_from_zero_is_read(tmp_path):
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, init_weights="zero")
    model = written_by_peft(tmp_path / "theirs", "llama", config)
    base = make("llama")
    store.load(base, tmp_path / "theirs")
    same(from_graft(base, "llama", False), from_peft(model, "llama", False))


def test_settings_left_out_are_pefts_own(tmp_path):
    """peft writes every key; a short config by hand means what peft takes it for."""
    model = written_by_peft(tmp_path / "theirs", "llama", lora_config("llama", lora_alpha=8, target_modules=["q_proj"]))
    write_config(tmp_path / "theirs", {"peft_type": "LORA", "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"})
    base = make("llama")
    store.load(base, tmp_path / "theirs")
    short = read_by_peft(tmp_path / "theirs", make("llama"), "llama")
    same(from_peft(short, "llama", False), from_peft(model, "llama", False))
    same(from_graft(base, "llama", False), from_peft(model, "llama", False))


def test_a_folder_of_another_adapter_name(tmp_path):
    model = wrapped(make("llama"), "llama", lora_config("llama", target_modules=["q_proj"]))
    with peft_warnings():
        model.add_adapter("second", lora_config("llama", r=2, target_modules=["v_proj"]))
    shake(model)
    model.set_adapter("second")
    shake(model)
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    base = make("llama")
    adapter = store.load(base, tmp_path / "second")
    assert adapter.name == "second"
    assert [site.role for site, _ in adapter.placed] == ["attn.v", "attn.v"]
    same(from_graft(base, "llama", False), from_peft(model, "llama", False))


# Folders that Graft wrote, read by Graft ----------------------------------------------------------


@pytest.mark.parametrize("head", [False, True], ids=["bare", "head"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_round_trip(kind, head, tmp_path):
    base, adapter = ours(kind, {"name": "lora", "r": 4, "target_modules": targets(kind)}, head)
    store.save(adapter, base, tmp_path / "mine")
    again = make(kind)
    loaded = store.load(again, tmp_path / "mine")
    assert_equal_tensors(adapter, loaded, 2 * len(adapter.placed) + (HEADS[kind] if head else 0))
    assert len(adapter.placed) == {"gpt2": 2, "t5": 12}.get(kind, 4)
    assert loaded.method == adapter.method
    if head:
        assert loaded.head.labels == LABELS
    found = same(from_graft(again, kind, head), from_graft(base, kind, head))
    assert set(found.values()) == {0.0}


@pytest.mark.parametrize("head", [False, True], ids=["bare", "head"])
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_round_trip_of_virtual_tokens(method, head, tmp_path):
    for kind in ("llama", "t5"):
        settings, _ = METHODS[method]
        base, adapter = ours(kind, settings, head)
        store.save(adapter, base, tmp_path / kind)
        again = make(kind)
        loaded = store.load(again, tmp_path / kind)
        assert_equal_tensors(adapter, loaded, len(adapter.placed) + (HEADS[kind] if head else 0))
        assert loaded.method == adapter.method
        assert set(same(from_graft(again, kind, head), from_graft(base, kind, head)).values()) == {0.0}


# Faults -------------------------------------------------------------------------------------------

LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LORA_B = LORA_A.replace("lora_A", "lora_B")


ANY: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), ["adapter_config.json is missing"]),
    "config not JSON": (text("adapter_config.json", '{"peft_type": "LO'), ["adapter_config.json: not JSON"]),
    "config empty": (text("adapter_config.json", ""), ["adapter_config.json: not JSON"]),
    "config a list": (text("adapter_config.json", "[1]"), ["expected an object, got list"]),
    "config not UTF-8": (
        lambda folder: (folder / "adapter_config.json").write_bytes(b'{"peft_type": "\xff"}'),
        ["adapter_config.json: not JSON"],
    ),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        ["adapter_model.safetensors is missing", "save it again"],
    ),
    "pickled weights": (pickled, ["adapter_model.safetensors is missing", ".bin files can run code when read"]),
    "weights empty": (cut(0), ["adapter_model.safetensors", "cut off or altered"]),
    "header cut off": (cut(0.05), ["adapter_model.safetensors", "cut off or altered"]),
    "weights cut off": (cut(0.9), ["adapter_model.safetensors", "cut off or altered"]),
    "header too long": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 64),
        ["adapter_model.safetensors", "cut off or altered"],
    ),
    "not safetensors": (text("adapter_model.safetensors", "weights"), ["cut off or altered"]),
    "no tensors": (weights(dict.clear), ["0 tensors|4 tensors|8 tensors"]),
}
"""Of any LoRA folder: what damages it, and what the message says."""

THEIRS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "one tensor missing": (drop(LORA_B), ["of 8 tensors", "1 missing", "layers.0.attn.q.lora_B"]),
    "A missing": (drop(LORA_A), ["of 8 tensors", "1 missing", "layers.0.attn.q.lora_A"]),
    "module missing": (
        drop(LORA_A, LORA_B),
        ["1 modules of target_modules have no tensors", "model.layers.0.self_attn.q_proj", "incomplete"],
    ),
    "extra tensor": (put("base_model.model.model.norm.extra", 2), ["of 8 tensors", "1 unexpected", "norm.extra"]),
    "tensor of a module that is not there": (
        put("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", 4, 32),
        ["1 of 5 adapted modules are not in llama", "layers.7", "another base"],
    ),
    "another shape": (put(LORA_A, 4, 31), ["of 8 tensors", "1 of another shape", "layers.0.attn.q.lora_A"]),
    "r disagrees": (setting("r", 5), ["of 8 tensors", "8 of another shape", " …"]),
    "r not a number": (setting("r", "many"), ["r: Input should be a valid integer", "altered"]),
    "r zero": (setting("r", 0), ["r: Input should be greater than or equal to 1"]),
    "alpha missing": (setting("lora_alpha", None), ["lora_alpha: Input should be a valid number"]),
    "no type": (setting("peft_type", None), ["peft_type None", "LORA"]),
    "type not a word": (setting("peft_type", ["LORA"]), ["peft_type", "LORA, PREFIX_TUNING, PROMPT_TUNING"]),
    "unknown type": (setting("peft_type", "ZORA"), ["peft_type 'ZORA' cannot be read", "PROMPT_TUNING"]),
    "another type": (setting("peft_type", "PROMPT_TUNING"), ["is not supported"]),
    "a type of Graft's": (setting("peft_type", "GRAFT_BOTTLENECK"), ["graft.json is missing"]),
    "ranks": (setting("rank_pattern", {"q_proj": 3}), ["of 8 tensors", "4 of another shape"]),
    "a regular expression of ranks": (setting("rank_pattern", {".*q_proj": 4}), ["rank_pattern has the regular"]),
    "a regular expression of alphas": (setting("alpha_pattern", {"(a|b)*": 4}), ["alpha_pattern has the regular"]),
    "biases": (setting("bias", "all"), ["bias = 'all' is not supported"]),
    "LoRA's biases": (setting("lora_bias", True), ["lora_bias = True is not supported"]),
    "layers repeated": (setting("layer_replication", [[0, 2], [0, 2]]), ["layer_replication"]),
    "a start that changes the base": (setting("init_lora_weights", "pissa"), ["init_lora_weights = 'pissa'"]),
    "a setting of the future": (setting("use_zora", True), ["use_zora = True is not supported"]),
}
"""Of a folder that peft wrote."""

MINE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "one tensor missing": (drop(LORA_B), ["of 8 tensors", "1 missing (layers.0.attn.q.lora_B)", "another base"]),
    "module missing": (drop(LORA_A, LORA_B), ["of 8 tensors", "2 missing", "layers.0.attn.q.lora_A"]),
    "extra tensor": (put("base_model.model.model.norm.extra", 2), ["of 8 tensors", "1 unexpected", "norm.extra"]),
    "another shape": (put(LORA_A, 4, 31), ["of 8 tensors", "1 of another shape (layers.0.attn.q.lora_A)"]),
    "missing, extra and misshapen": (
        weights(
            lambda stored: stored.update({LORA_A: torch.ones(3, 3), "extra": stored.pop(LORA_B), "more": torch.ones(1)})
        ),
        ["of 8 tensors", "1 missing", "2 unexpected (extra, more)", "1 of another shape"],
    ),
    "a changed value": (add(LORA_A, 0.5), ["adapter_model.safetensors is not what was saved"]),
    "not a number": (add(LORA_A, float("nan")), ["1 of 8 tensors hold values that are no numbers"]),
    "another probe": (about(probe=[[9.0] * 8] * 2), ["outputs on fixed ids differ by"]),
    "a probe of another size": (about(probe=[[0.0]]), ["outputs on fixed ids differ by inf"]),
    "no probe": (about(probe=None), ["graft.json: probe is missing or not as written"]),
    "another fingerprint": (about(base={"name": "x", "fingerprint": "0"}), ["made for x, whose weights differ"]),
    "no fingerprint": (about(base=None), ["graft.json: base is missing or not as written"]),
    "settings of another shape": (
        about(method={"name": "lora", "r": 3, "target_modules": ["q_proj", "v_proj"]}),
        ["8 of another shape"],
    ),
    "a method of the future": (about(method={"name": "zora"}), ["no method 'zora'", "another version of Graft"]),
    "a setting of the future": (about(method={"name": "lora", "zeal": 1}), ["zeal", "another version of Graft"]),
    "a head without labels": (about(head={}), ["graft.json: head is missing or not as written"]),
    "a head that is not there": (
        about(head={"labels": ["a", "b"], "pooling": "last", "dropout": 0.1}),
        ["1 tensors of the task head are missing", "base_model.model.score.weight"],
    ),
    "graft.json not JSON": (text("graft.json", "{"), ["graft.json: not JSON"]),
}
"""Of a folder that Graft wrote."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The same LoRA folder of four modules, from both."""
    folder = tmp_path_factory.mktemp("adapters")
    base, adapter = ours("llama", {"name": "lora", "r": 4})
    store.save(adapter, base, folder / "mine")
    written_by_peft(folder / "theirs", "llama", lora_config("llama", r=4, target_modules=["q_proj", "v_proj"]))
    return {"mine": folder / "mine", "theirs": folder / "theirs"}


FAULTS = [(origin, case) for origin in ("mine", "theirs") for case in ANY]
FAULTS += [("theirs", case) for case in THEIRS] + [("mine", case) for case in MINE]


@pytest.mark.parametrize(("origin", "case"), FAULTS)
def test_damaged_folders(origin, case, folders, tmp_path):
    damage, said = (ANY | {"mine": MINE, "theirs": THEIRS}[origin])[case]
    folder = tmp_path / "adapter-of-mine"
    shutil.copytree(folders[origin], folder)
    base = make("llama")
    store.load(base, folder)  # it was whole
    detach(base, "adapter-of-mine")
    damage(folder)
    assert_refused(base, folder, said)


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
def test_an_adapter_of_another_base(method, tmp_path):
    base, adapter = ours("llama", METHODS[method][0])
    store.save(adapter, base, tmp_path / "mine")
    other = make("llama", seed=1)
    assert_refused(other, tmp_path / "mine", ["made for llama, whose weights differ", "that it was trained on"])
    changed = make("llama")
    with torch.no_grad():
        changed.model.lm_head.weight[5, 5] += 1
    changed.fingerprint = changed._fingerprint()
    assert_refused(changed, tmp_path / "mine", ["made for llama, whose weights differ"])
    assert_refused(make("wide"), tmp_path / "mine", ["made for llama, whose weights differ from those of wide"])
    assert_refused(make("bert"), tmp_path / "mine", ["made for llama"])


def test_an_adapter_of_peft_for_another_base(tmp_path):
    for method, (_, config) in METHODS.items():
        written_by_peft(tmp_path / method, "llama", config("llama"))
    assert_refused(make("bert"), tmp_path / "lora", ["4 of 4 adapted modules are not in bert", "another base"])
    assert_refused(make("wide"), tmp_path / "lora", ["of 8 tensors 4 of another shape", "layers.0.attn.q.lora_B"])
    assert_refused(make("bert"), tmp_path / "prefix", ["num_attention_heads is 2, for bert it is 4"])
    assert_refused(make("wide"), tmp_path / "prefix", ["token_dim is 16, for wide it is 32"])
    assert_refused(make("t5"), tmp_path / "prefix", ["num_layers is 2, for t5 it is 4", "another base"])


VIRTUAL: dict[str, tuple[str, Callable[[Path], Any], list[str]]] = {
    "prefix missing": ("prefix", drop("prompt_embeddings"), ["expected one tensor prompt_embeddings of shape (3, 64)"]),
    "prefix extra": ("prefix", put("more", 2), ["expected one tensor prompt_embeddings", "(2,)"]),
    "prefix misshapen": ("prefix", put("prompt_embeddings", 3, 60), ["shape (3, 64), got", "(3, 60)"]),
    "prefix changed": ("prefix", add("prompt_embeddings", 2.0), ["is not what was saved"]),
    "prompt missing": ("prompt", drop("prompt_embeddings"), ["of 1 tensors 1 missing (embed.embedding)"]),
    "prompt extra": ("prompt", put("more", 2), ["of 1 tensors 1 unexpected (more)"]),
    "prompt misshapen": ("prompt", put("prompt_embeddings", 3, 31), ["of 1 tensors 1 of another shape"]),
    "prompt changed": ("prompt", add("prompt_embeddings", 2.0), ["is not what was saved"]),
}


@pytest.mark.parametrize("case", VIRTUAL)
def test_damaged_virtual_tokens(case, tmp_path):
    method, damage, said = VIRTUAL[case]
    base, adapter = ours("llama", METHODS[method][0])
    store.save(adapter, base, tmp_path / "mine")
    damage(tmp_path / "mine")
    assert_refused(make("llama"), tmp_path / "mine", said)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_damaged_virtual_tokens_of_peft(method, tmp_path):
    for number, (damage, said) in enumerate(
        [
            (setting("num_virtual_tokens", None), ["num_virtual_tokens: Input should be a valid integer", "altered"]),
            (setting("num_virtual_tokens", 4), ["another base or settings"]),
            (setting("zeal", 1), ["zeal = 1 is not supported"]),
        ]
    ):
        folder = tmp_path / f"theirs-{number}"
        written_by_peft(folder, "llama", METHODS[method][1]("llama"))
        damage(folder)
        assert_refused(make("llama"), folder, said)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (drop("base_model.model.classifier.bias"), ["1 tensors of the task head", "classifier.bias"]),
        (put("base_model.model.classifier.weight", 3, 31), ["1 tensors of the task head", "classifier.weight"]),
        (put("base_model.model.classifier.extra", 1), ["of 8 tensors 1 unexpected", "classifier.extra"]),
    ],
)
@pytest.mark.parametrize("origin", ["mine", "theirs"])
def test_damaged_heads(origin, damage, said, tmp_path):
    if origin == "mine":
        base, adapter = ours("bert", METHODS["lora"][0], head=True)
        store.save(adapter, base, tmp_path / "adapter")
    else:
        written_by_peft(tmp_path / "adapter", "bert", METHODS["lora"][1]("bert"), head=True)
    damage(tmp_path / "adapter")
    assert_refused(make("bert"), tmp_path / "adapter", said)


def test_a_start_that_changes_the_base_gives_other_outputs(tmp_path):
    """Why PiSSA's folders are refused: their tensors belong on weights that peft has changed."""
    model = written_by_peft(
        tmp_path / "theirs", "llama", lora_config("llama", init_lora_weights="pissa", target_modules=["q_proj"])
    )
    base = make("llama")
    assert_refused(base, tmp_path / "theirs", ["init_lora_weights = 'pissa' is not supported"])
    setting("init_lora_weights", True)(tmp_path / "theirs")
    store.load(base, tmp_path / "theirs")
    mine, theirs = from_graft(base, "llama", False), from_peft(model, "llama", False)
    assert float((mine["logits"] - theirs["logits"]).abs().max()) > 1e-2


def test_a_head_that_reads_a_virtual_token_needs_a_pooler(tmp_path):
    """peft's classifiers of RoBERTa read the first column, a virtual token, without a pooler in between."""
    written_by_peft(tmp_path / "theirs", "roberta", METHODS["prompt"][1]("roberta"), head=True)
    assert_refused(make("roberta"), tmp_path / "theirs", ["its head reads the first virtual token"])


def test_a_failed_load_leaves_what_was_attached(folders, tmp_path):
    base = make("llama")
    store.load(base, folders["mine"], "good")
    before = from_graft(base, "llama", False)
    shutil.copytree(folders["mine"], tmp_path / "bad")
    about(probe=[[9.0] * 8] * 2)(tmp_path / "bad")
    with pytest.raises(DamagedError, match="differ by"):
        store.load(base, tmp_path / "bad")
    assert list(base.adapters) == base.router.order == ["good"]
    assert set(same(from_graft(base, "llama", False), before).values()) == {0.0}
