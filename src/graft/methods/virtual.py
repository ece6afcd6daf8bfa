"""What prompt tuning and its relatives share: virtual tokens at the input, and peft's folder layout."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from graft.errors import DamagedError
from graft.methods.attended import check_length
from graft.methods.base import Bypass, Method
from graft.methods.folder import check_peft_config, copy_tensors
from graft.model import Base
from graft.parts.base import Adapter, Part
from graft.parts.head import default_pooling


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


class Virtual(Method):
    """Settings and storage of methods with virtual tokens at the input. Abstract: a method defines `tokens`."""

    unified: ClassVar[Bypass] = Bypass(
        "softmax(x Wq Pk^T) Pv", "layer input (parallel)", "attention, from layer 0 on", "(1-λ)h + λΔh"
    )
    starts_as_base: ClassVar[bool] = False
    head_prefix: ClassVar[str] = "base_model."

    aliases: ClassVar[dict[str, str]] = Method.aliases | {"prompt_length": "num_virtual_tokens"}

    target_modules: None = Field(default=None, description="Not used: the tokens are at the input.")
    layers_to_transform: None = Field(default=None, description="Not used: the tokens are at the input.")

    num_virtual_tokens: int = Field(default=20, ge=1, le=65536)
    """How many virtual tokens."""

    pool: Literal["real", "virtual"] = "real"
    """What a pooler reads: the row's first own token, or the first virtual one as in peft."""

    def tokens(self, base: Base) -> Part:
        """The part that gives the tokens."""
        raise NotImplementedError

    def build(self, base: Base, name: str) -> Adapter:
        """One part at the input embeddings."""
        check_length(self.num_virtual_tokens, base)
        return Adapter(name, self, [(base.select("embed")[0], self.tokens(base))])

    def to_folder(self, adapter: Adapter, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """peft's layout: one tensor `prompt_embeddings` [n, d]."""
        config = {
            "peft_type": self.peft_type,
            "num_virtual_tokens": self.num_virtual_tokens,
            "token_dim": base.hidden_size,
            "num_transformer_submodules": 1,
            "num_layers": len({site.layer for site in base.sites if site.layer is not None}),
            "num_attention_heads": int(base.config.num_attention_heads),
        }
        with torch.no_grad():
            return config, {"prompt_embeddings": adapter.virtual_parts()[0].virtual()}

    @classmethod
    def check_folder(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, source: str, harmless: set[str]
    ) -> None:
        """Refuse what peft wrote and is not read here."""
        known = {
            "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_layers", "num_attention_heads"
        }  # fmt: skip
        check_peft_config(config, known | harmless, source)
        if f"{cls.head_prefix}{base.family.task_head['out']}.weight" in tensors and default_pooling(base) == "first":
            raise DamagedError(
                f"{source}: its head reads the first virtual token, which Graft can give to a pooler only",
                "read it with peft",
            )

    def load(self, adapter: Adapter, base: Base, tensors: Mapping[str, Tensor], source: str) -> None:
        """Read `prompt_embeddings`."""
        renamed = {"embed.embedding" if key == "prompt_embeddings" else key: value for key, value in tensors.items()}
        copy_tensors(adapter, renamed, source)
