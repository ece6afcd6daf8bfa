"""LoRA, prefix and prompt tuning against the installed peft: outputs, loss, gradients, and folders both ways."""

from typing import Any

import peft
import pytest
from peft_tools import (
    compare,
    pair,
)

PADDINGS = (None, "right", "left")
QV = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "bert": ["query", "value"], "t5": ["q", "v"]}


# LoRA ---------------------------------------------------------------------------------------------

# name: family, Graft's settings, peft's where they are spelled in another way, adapted modules
LORA: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "llama roles": ("llama", {"target_modules": ["attn.q", "attn.v"]}, {"target_modules": ["q_proj", "v_proj"]}, 4),
    "llama names": ("llama", {"r": 4, "lora_alpha": 4, "target_modules": ["k_proj", "down_proj"]}, {}, 4),
    "llama all linear": ("llama", {"r": 3, "lora_alpha": 7, "target_modules": ["all-linear"]}, {}, 14),
    "llama one layer": ("llama", {"r": 2, "target_modules": ["o_proj", "up_proj"], "layers_to_transform": [1]}, {}, 2),
    "llama head": ("llama", {"r": 2, "lora_alpha": 1, "target_modules": ["head"]}, {"target_modules": ["lm_head"]}, 1),
    "llama wide heads": ("wide", {"r": 1, "lora_alpha": 0.5, "target_modules": ["attn.o", "gate_proj"]},
                         {"target_modules": ["o_proj", "gate_proj"]}, 4),
    "gpt2 default": ("gpt2", {"r": 4, "lora_alpha": 32}, {"target_modules": ["c_attn"]}, 2),
    "gpt2 roles": ("gpt2", {"target_modules": ["attn.o", "mlp.up"]},
                   {"target_modules": [".*attn.c_proj", ".*c_fc"]}, 4),
    "gpt2 names": ("gpt2", {"r": 1, "lora_alpha": 2, "target_modules": ["c_attn", "c_proj"]}, {}, 6),
    "gpt2 all linear": ("gpt2", {"r": 6, "lora_alpha": 3, "target_modules": ["all-linear"]}, {}, 8),
    "bert default": ("bert", {}, {"target_modules": ["query", "value"]}, 4),
    "bert names": ("bert", {"r": 2, "lora_alpha": 9, "target_modules": ["query", "dense"]}, {}, 9),
    "bert all linear": ("bert", {"r": 5, "target_modules": ["all-linear"]}, {"exclude_modules": ["pooler.dense"]}, 12),
    "bert first layer": ("bert", {"r": 8, "lora_alpha": 1, "target_modules": ["mlp.down", "attn.k"],
                                  "layers_to_transform": [0]}, {"target_modules": ["0.output.dense", "key"]}, 2),
    "t5": ("t5", {"r": 4, "target_modules": ["q", "wo"]}, {}, 10),
}  # fmt: skip


def lora_config(kind: str, settings: dict[str, Any], spelled: dict[str, Any]) -> peft.LoraConfig:
    given = {"r": 8, "lora_alpha": 16} | settings | spelled
    targets = given["target_modules"]
    if targets == ["all-linear"]:
        given["target_modules"] = "all-linear"
    elif any(name.startswith(".*") for name in targets):
        given["target_modules"] = "|".join(targets)
    return peft.LoraConfig(**given, fan_in_fan_out=kind == "gpt2")


@pytest.mark.parametrize("padded", PADDINGS)
@pytest.mark.parametrize("case", LORA)
def test_lora(case, padded):
    kind, settings, spelled, modules = LORA[case]
    if kind == "t5" and padded == "left":
        pytest.skip("an encoder-decoder's rows are padded on the right only")
    both = pair(kind, {"name": "lora"} | settings, lora_config(kind, settings, spelled))
    assert len(both.matches) == 2 * modules
    found = compare(both, padded)
    outputs = {"bert": {"states", "pooled"}}.get(kind, {"states", "logits"})
    assert found.keys() == outputs | {"loss"} | {f"d {match.name}" for match in both.matches}
