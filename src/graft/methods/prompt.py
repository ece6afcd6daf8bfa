"""Prompt tuning: trained virtual tokens at the input."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from graft.errors import UsageError
from graft.methods.base import Method
from graft.methods.virtual import PromptPart, Virtual
from graft.model import Base
from graft.parts.base import Adapter, Part


class Prompt(Virtual):
    """Virtual tokens before every row, trained as embeddings (Lester et al. 2021)."""

    name: ClassVar[str] = "prompt"
    source: ClassVar[str] = "Lester et al. 2021, arXiv 2104.08691"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    small: ClassVar[Mapping[str, Any]] = {"num_virtual_tokens": 5, "prompt_tuning_init": "RANDOM"}
    rate_small: ClassVar[float] = 1e-2
    rate_large: ClassVar[float] = 3e-3

    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "SAMPLE_VOCAB"
    """Where the tokens start: small random values, embeddings of random words, or the embeddings of a text."""

    prompt_tuning_init_text: str | None = None
    """The text for TEXT; repeated or cut to `num_virtual_tokens`."""

    @model_validator(mode="after")
    def _text_given(self) -> "Prompt":
        if (self.prompt_tuning_init == "TEXT") != (self.prompt_tuning_init_text is not None):
            raise ValueError("prompt_tuning_init TEXT and prompt_tuning_init_text go together")
        return self

    def tokens(self, base: Base) -> Part:
        """Tokens at their starting values."""
        return PromptPart(self._start(base), self.pool == "virtual")

    def _start(self, base: Base) -> Tensor:
        table = base.select("embed")[0].leave
        n, words = self.num_virtual_tokens, int(table.get_parameter("weight").shape[0])

        @torch.no_grad()
        def looked_up(ids: Tensor) -> Tensor:
            # Past the hooks of attached adapters; through the module, since Gemma multiplies what it looks up.
            vectors: Tensor = table.forward(ids.to(base.device))
            return vectors.float().clone()

        if self.prompt_tuning_init == "RANDOM":
            spread = looked_up(torch.arange(min(words, 4096))).std().cpu()
            return torch.randn(n, base.hidden_size) * spread
        if self.prompt_tuning_init == "SAMPLE_VOCAB":
            return looked_up(torch.randint(words, (n,)))
        if base.tokenizer is None:
            raise UsageError("prompt_tuning_init TEXT needs a tokenizer")
        ids = base.tokenizer(self.prompt_tuning_init_text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UsageError("prompt_tuning_init_text has no tokens")
        return looked_up(torch.tensor((ids * (n // len(ids) + 1))[:n]))

    def to_folder(self, adapter: Adapter, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """peft's layout, with a start that needs no tokenizer to load."""
        config, tensors = super().to_folder(adapter, base)
        return config | {"prompt_tuning_init": "RANDOM"}, tensors

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, source: str) -> Method:
        """The method of a folder that peft wrote. There the pooler reads the first virtual token."""
        harmless = {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
        cls.check_folder(config, tensors, base, source, harmless)
        return cls.parse({"num_virtual_tokens": config.get("num_virtual_tokens"), "pool": "virtual"}, source)
