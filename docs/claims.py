"""Computes the counts and plans of docs/claims.md into docs/results/claims.json: `python docs/claims.py`, a few minutes.

Verdicts on quality, time and forgetting come from the kept comparisons in docs/results/ when the page is written.
"""

import json
from pathlib import Path
from typing import Any

import torch

from graft.methods.base import read_method
from graft.model import Base
from graft.planning.catalogue import config_of, entries, skeleton
from graft.planning.plan import plan_model
from graft.quantize import BITS, BLOCK

RESULT = Path(__file__).parent / "results" / "claims.json"
QUERY_VALUE = ["attn.q", "attn.v"]
QLORA = {
    "method": {"name": "lora", "target_modules": ["all-linear"]},
    "quantization": "nf4",
    "training": {"gradient_checkpointing": True, "precision": "bf16"},
}
"""QLoRA at rows of 512 tokens, one at a time."""


def trained(model: str, **method: Any) -> int:
    """Parameters that a method trains on a model of the catalogue, built without numbers."""
    base = Base(skeleton(config_of(model)), name=model, fingerprint="shape")
    with torch.device("meta"):
        return read_method(method).build(base, "counted").trainable_count()


def counts() -> dict[str, int]:
    """Trained parameters."""
    lora: dict[str, Any] = {"name": "lora", "r": 8, "target_modules": QUERY_VALUE}
    one = {"name": "lora", "r": 8, "target_modules": ["attn.q"], "layers_to_transform": [0]}
    return {
        "one_matrix": trained("bert-large", **one),
        "bert_base_lora": trained("bert-base", **lora),
        "codellama_lora": trained("codellama-13b", **lora),
        "gpt3_lora": trained("gpt3-175b", **lora | {"r": 1}),
        "roberta_lora": trained("roberta-base", **lora),
    } | {f"bert_base_{name}": trained("bert-base", name=name) for name in ("bottleneck", "prefix", "ptuning_v2")}


def parameters() -> dict[str, int]:
    """All parameters of the models that are spoken of."""
    names = ("bert-base", "codellama-13b", "gpt3-175b", "roberta-base", "llama-2-13b", "llama-2-7b", "llama-65b")
    return {name: entries()[name].parameters for name in names}


def plans() -> dict[str, dict[str, Any]]:
    """What is planned, in bytes."""
    full = {"method": "full", "training": {"precision": "fp32"}}
    wanted = {
        "full_13b": ("llama-2-13b", full),
        "qlora_7b": ("llama-2-7b", QLORA),
        "qlora_codellama": ("codellama-13b", QLORA),
        "qlora_65b": ("llama-65b", QLORA),
    }
    found = {}
    for name, (model, settings) in wanted.items():
        estimate = plan_model(model, None, settings).estimates[0]
        if estimate.error is not None:
            raise SystemExit(f"{name}: {estimate.error}")
        found[name] = {"model": model, "kinds": estimate.kinds, "peak": estimate.peak}
        print(name, estimate.peak, flush=True)
    return found


def bits() -> dict[str, float]:
    """Bits of a quantized weight, and of the constants of a block, as quantize.py keeps them."""
    return {"weight": BITS, "block": BLOCK, "constants_of_a_block": (BITS - 4) * BLOCK}


if __name__ == "__main__":
    found = {"parameters": parameters(), "counts": counts(), "bits": bits(), "plans": plans()}
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(RESULT)
