"""Keys and values of attended tokens: what prefix tuning puts at an attention."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.parts.attention import widen_mask
from graft.parts.base import Core, Part
from graft.sites import Site


class PrefixEncoder(nn.Module):
    """The reparameterization of Li & Liang: n embeddings through a two-layer network, [n, columns] for all layers."""

    def __init__(self, n: int, width: int, hidden: int, columns: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(n, width))
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, columns)

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns start to stop of the output: only this part of the last layer is computed."""
        middle = torch.tanh(self.inner(self.embedding))
        return F.linear(middle, self.outer.weight[start:stop], self.outer.bias[start:stop])


class PrefixPart(Part):
    """Keys and values of n attended tokens at one attention: [n, 2, kv_heads, head_dim].

    They join the keys and values inside the attention function rather than the cache: transformers drops the
    cache under activation checkpointing, and one handed to a caller who asked for none is a leak.
    """

    def __init__(self, site: Site, n: int, start: int = 0, encoder: PrefixEncoder | None = None, std: float = 0.02):
        super().__init__()
        self.shape = (n, 2, site.kv_heads, site.head_dim)
        self.positions = n
        size = 2 * site.kv_heads * site.head_dim
        self.span = (start, start + size)
        # The encoder is the adapter's, not this part's: kept out of the part's own parameters.
        self.__dict__["encoder"] = encoder
        if encoder is None:
            self.values = nn.Parameter(torch.randn(self.shape) * std)

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Two tensors [kv_heads, n, head_dim]."""
        encoder: PrefixEncoder | None = self.__dict__["encoder"]
        both = self.values if encoder is None else encoder.columns(*self.span).view(self.shape)
        keys, values = both.permute(1, 2, 0, 3)
        return keys, values

    def front(self) -> tuple[Tensor, Tensor] | None:
        """Its keys and values, where no encoder makes them."""
        return None if self.__dict__["encoder"] is not None else self.keys_and_values()

    def attend(self, core: Core, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention with n more keys and values in front, which every query sees."""
        keys, values = (both.to(k.dtype).expand(k.shape[0], -1, -1, -1) for both in self.keys_and_values())
        return core(q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2), widen_mask(mask, self.positions))
