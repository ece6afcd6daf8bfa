"""Graft's methods as peft spells them, and the models that peers train."""

from typing import Any

import torch

from benchmarks.speed.work import Work

TARGETS = {
    "chat": {"attn.q": "q_proj", "attn.k": "k_proj", "attn.v": "v_proj", "mlp.down": "down_proj"},
    "labels": {"attn.q": "query", "attn.k": "key", "attn.v": "value", "mlp.down": "output.dense"},
}
"""Graft's site roles as names of modules, by kind of model: Llama and BERT."""
PEFT = ("lora", "dora", "adalora", "ia3", "vera", "prefix", "prompt", "ptuning")
"""Methods of Graft that peft has too."""


def task_model(work: Work, told: dict[str, Any], dtype: torch.dtype) -> Any:
    """The pretrained model with the head of the task."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if work.kind == "chat":
        return AutoModelForCausalLM.from_pretrained(told["path"], dtype=dtype)
    count = len(told["labels"])
    return AutoModelForSequenceClassification.from_pretrained(told["path"], dtype=dtype, num_labels=count)


def tuned(model: Any, work: Work, steps: int) -> Any:
    """The model made ready for the work's method: all of it, its head alone, or through peft."""
    name = work.method["name"]
    if name == "full":
        return model
    if name == "frozen":
        model.base_model.requires_grad_(False)
        return model
    from peft import get_peft_model

    model = get_peft_model(model, peft_config(work, steps))
    if work.kind == "labels":  # peft leaves a head in the weights' format, in which small steps would be lost
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


def peft_config(work: Work, steps: int) -> Any:
    """peft's configuration of the work's method."""
    import peft

    given = dict(work.method)
    name = given.pop("name")
    given["task_type"] = "CAUSAL_LM" if work.kind == "chat" else "SEQ_CLS"
    if "target_modules" in given:
        given["target_modules"] = [TARGETS[work.kind][role] for role in given["target_modules"]]
    if name in ("lora", "dora"):
        return peft.LoraConfig(**{"lora_alpha": 16, "use_dora": name == "dora", **given})
    if name == "adalora":
        return peft.AdaLoraConfig(**{"total_step": steps, **given})
    if name == "ia3":
        # Expressions, since attention has an output.dense of its own.
        inner = r".*\.down_proj" if work.kind == "chat" else r".*\.layer\.\d+\.output\.dense"
        names = "|".join(name for name in given["target_modules"] if name not in ("down_proj", "output.dense"))
        given |= {"target_modules": rf".*\.({names})|{inner}", "feedforward_modules": inner}
        return peft.IA3Config(**given)
    kinds = {
        "vera": peft.VeraConfig,
        "prefix": peft.PrefixTuningConfig,
        "prompt": peft.PromptTuningConfig,
        "ptuning": peft.PromptEncoderConfig,
    }
    return kinds[name](**given)
