"""Prompt tuning: trained virtual tokens at the input."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from graft.errors import DamagedError, UsageError
from graft.methods.base import Bypass, Method
from graft.methods.folder import check_peft_config, copy_tensors
from graft.model import Base
from graft.parts.base import Adapter, Part
from graft.parts.head import default_pooling
from graft.sites import Site


class PromptPart(Part):
    """Virtual tokens [n, d] at the input embeddings."""

    def __init__(self, tokens: Tensor, pool_virtual: bool) -> None:
        super().__init__()
        self.embedding = nn.Parameter(tokens)
        self.positions = tokens.shape[0]
        self.pool_virtual = pool_virtual

    def virtual(self) -> Tensor:
        """The tokens [n, d]."""
        return self.embedding


class Prompt(Method):
    """Virtual tokens before every row, trained as embeddings (Lester et al. 2021)."""

    name: ClassVar[str] = "prompt"
    source: ClassVar[str] = "Lester et al. 2021, arXiv 2104.08691"
    unified: ClassVar[Bypass] = Bypass(
        "softmax(x Wq Pk^T) Pv", "layer input (parallel)", "attention, from layer 0 on", "(1-λ)h + λΔh"
    )
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    starts_as_base: ClassVar[bool] = False
    small: ClassVar[Mapping[str, Any]] = {"num_virtual_tokens": 5, "prompt_tuning_init": "RANDOM"}
    head_prefix: ClassVar[str] = "base_model."
    rate_small: ClassVar[float] = 1e-2
    rate_large: ClassVar[float] = 3e-3

    target_modules: None = Field(default=None, description="Not used: the tokens are at the input.")
    layers_to_transform: None = Field(default=None, description="Not used: the tokens are at the input.")

    num_virtual_tokens: int = Field(default=20, ge=1)
    """How many virtual tokens."""

    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "SAMPLE_VOCAB"
    """Where the tokens start: small random values, embeddings of random words, or the embeddings of a text."""

    prompt_tuning_init_text: str | None = None
    """The text for TEXT; repeated or cut to `num_virtual_tokens`."""

    pool: Literal["real", "virtual"] = "real"
    """What a pooler reads: the row's first own token, or the first virtual one as in peft."""

    @model_validator(mode="after")
    def _text_given(self) -> "Prompt":
        if (self.prompt_tuning_init == "TEXT") != (self.prompt_tuning_init_text is not None):
            raise ValueError("prompt_tuning_init TEXT and prompt_tuning_init_text go together")
        return self

    def build(self, base: Base, name: str) -> Adapter:
        """One part at the input embeddings."""
        limit = base.max_positions
        if limit is not None and self.num_virtual_tokens >= limit:
            raise UsageError(f"num_virtual_tokens: {self.num_virtual_tokens} of {limit} positions of {base.name}")
        site = base.select("embed")[0]
        return Adapter(name, self, [(site, PromptPart(self._start(base, site), self.pool == "virtual"))])

    def _start(self, base: Base, site: Site) -> Tensor:
        table: Tensor = site.leave.get_parameter("weight").detach().float()
        n = self.num_virtual_tokens
        if self.prompt_tuning_init == "RANDOM":
            return torch.randn(n, table.shape[1]) * table.std().cpu()
        if self.prompt_tuning_init == "SAMPLE_VOCAB":
            return table[torch.randint(table.shape[0], (n,))].clone()
        if base.tokenizer is None:
            raise UsageError("prompt_tuning_init TEXT needs a tokenizer")
        ids = base.tokenizer(self.prompt_tuning_init_text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UsageError("prompt_tuning_init_text has no tokens")
        return table[torch.tensor((ids * (n // len(ids) + 1))[:n])].clone()

    def to_folder(self, adapter: Adapter, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """peft's layout: one tensor `prompt_embeddings` [n, d]."""
        config = {
            "peft_type": self.peft_type,
            "num_virtual_tokens": self.num_virtual_tokens,
            "token_dim": base.hidden_size,
            "num_transformer_submodules": 1,
            "num_layers": len({site.layer for site in base.sites if site.layer is not None}),
            "num_attention_heads": int(base.config.num_attention_heads),
            "prompt_tuning_init": "RANDOM",
        }
        return config, {"prompt_embeddings": adapter.tensors()["embed.embedding"]}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, source: str) -> Method:
        """The method of a folder that peft wrote. There the pooler reads the first virtual token."""
        known = {
            "num_virtual_tokens",
            "token_dim",
            "num_transformer_submodules",
            "num_layers",
            "num_attention_heads",
        }
        harmless = {
            "prompt_tuning_init",
            "prompt_tuning_init_text",
            "tokenizer_name_or_path",
            "tokenizer_kwargs",
        }
        check_peft_config(config, known | harmless, source)
        if f"{cls.head_prefix}{base.family.task_head['out']}.weight" in tensors and default_pooling(base) == "first":
            raise DamagedError(
                f"{source}: its head reads the first virtual token, which Graft can give to a pooler only",
                "read it with peft",
            )
        return cls.parse({"num_virtual_tokens": config.get("num_virtual_tokens"), "pool": "virtual"}, source)

    def load(self, adapter: Adapter, base: Base, tensors: Mapping[str, Tensor], source: str) -> None:
        """Read `prompt_embeddings`."""
        renamed = {"embed.embedding" if key == "prompt_embeddings" else key: value for key, value in tensors.items()}
        copy_tensors(adapter, renamed, source)
