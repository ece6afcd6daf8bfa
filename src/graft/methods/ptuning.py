"""P-tuning: virtual tokens at the input that a small network makes."""

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from graft.methods.base import Method
from graft.methods.virtual import PromptPart, Virtual
from graft.model import Base
from graft.parts.base import Adapter, Part


class EncodedPart(Part):
    """n embeddings [n, d] through an MLP of two hidden layers, or a bidirectional LSTM and an MLP of one: [n, d].

    Names and shapes are peft's.
    """

    def __init__(self, n: int, width: int, hidden: int, kind: str, layers: int, dropout: float, pool: bool) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(n, width))
        self.lstm_head = None
        sizes = [width, hidden, hidden, width]
        if kind == "LSTM":
            options: dict[str, Any] = {"num_layers": layers, "bidirectional": True, "batch_first": True}
            self.lstm_head = nn.LSTM(width, hidden, dropout=dropout if layers > 1 else 0.0, **options)
            sizes = [2 * hidden, 2 * hidden, width]
        linears = [nn.Linear(first, second) for first, second in itertools.pairwise(sizes)]
        between = [module for linear in linears for module in (linear, nn.ReLU())]
        self.mlp_head = nn.Sequential(*between[:-1])
        self.positions = n
        self.pool_virtual = pool

    def virtual(self) -> Tensor:
        """The tokens [n, d]."""
        states = self.embedding if self.lstm_head is None else self.lstm_head(self.embedding[None])[0][0]
        tokens: Tensor = self.mlp_head(states)
        return tokens


class Ptuning(Virtual):
    """Virtual tokens before every row, made by a small network that is folded away when saved (Liu et al. 2021)."""

    name: ClassVar[str] = "ptuning"
    source: ClassVar[str] = "Liu et al. 2021, arXiv 2103.10385"
    peft_type: ClassVar[str] = "P_TUNING"
    small: ClassVar[Mapping[str, Any]] = {"num_virtual_tokens": 4, "encoder_hidden_size": 16}
    rate_small: ClassVar[float] = 1e-2
    rate_large: ClassVar[float] = 1e-3

    encoder_reparameterization_type: Literal["MLP", "LSTM", "NONE"] = "MLP"
    """The network: MLP, LSTM as in the paper, or NONE for the tokens themselves, as saved adapters have them."""

    encoder_hidden_size: int | None = Field(default=None, ge=1, le=65536)
    """Hidden width of the network; the base's own width when left out."""

    encoder_num_layers: int = Field(default=2, ge=1)
    """Layers of the LSTM; the MLP always has two hidden layers."""

    encoder_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout between the layers of the LSTM, in training."""

    def tokens(self, base: Base) -> Part:
        """The network, or the tokens that it made."""
        n, width, pool = self.num_virtual_tokens, base.hidden_size, self.pool == "virtual"
        if self.encoder_reparameterization_type == "NONE":
            return PromptPart(torch.zeros(n, width), pool)
        kind, hidden = self.encoder_reparameterization_type, self.encoder_hidden_size or width
        return EncodedPart(n, width, hidden, kind, self.encoder_num_layers, self.encoder_dropout, pool)

    def saved_as(self, adapter: Adapter) -> "Ptuning":
        """Without the network."""
        return self.model_copy(update={"encoder_reparameterization_type": "NONE", "encoder_hidden_size": None})

    def to_folder(self, adapter: Adapter, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """peft's layout."""
        config, tensors = super().to_folder(adapter, base)
        network = {
            "encoder_reparameterization_type": "MLP",
            "encoder_hidden_size": self.encoder_hidden_size or base.hidden_size,
            "encoder_num_layers": 2,
            "encoder_dropout": 0.0,
        }
        return config | network, tensors

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, source: str) -> Method:
        """The method of a folder that peft wrote, which has the network's output only."""
        network = {
            "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"
        }  # fmt: skip
        cls.check_folder(config, tensors, base, source, network)
        settings = {"encoder_reparameterization_type": "NONE", "pool": "virtual"}
        return cls.parse(settings | {"num_virtual_tokens": config.get("num_virtual_tokens")}, source)
