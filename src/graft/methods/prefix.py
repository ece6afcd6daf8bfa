"""Prefix tuning: trained keys and values before every layer's own."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from graft.errors import DamagedError, UsageError
from graft.methods.base import Bypass, Method
from graft.methods.folder import check_peft_config
from graft.model import Base
from graft.parts.attention import widen_mask
from graft.parts.base import Adapter, Core, Part
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
        return nn.functional.linear(middle, self.outer.weight[start:stop], self.outer.bias[start:stop])


class PrefixPart(Part):
    """Keys and values of n attended tokens at one attention: [n, 2, kv_heads, head_dim].

    They join the keys and values inside the attention function rather than the cache: transformers drops the
    cache under activation checkpointing, and one handed to a caller who asked for none is a leak.
    """

    def __init__(self, site: Site, n: int, start: int, encoder: PrefixEncoder | None, std: float) -> None:
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

    def attend(self, core: Core, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention with n more keys and values in front, which every query sees."""
        keys, values = (both.to(k.dtype).expand(k.shape[0], -1, -1, -1) for both in self.keys_and_values())
        return core(q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2), widen_mask(mask, self.positions))


class Prefix(Method):
    """Trained keys and values before every layer's own, with positions shifted behind them (Li & Liang 2021)."""

    name: ClassVar[str] = "prefix"
    source: ClassVar[str] = "Li & Liang 2021, arXiv 2101.00190"
    unified: ClassVar[Bypass] = Bypass("softmax(x Wq Pk^T) Pv", "layer input (parallel)", "attention", "(1-λ)h + λΔh")
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    starts_as_base: ClassVar[bool] = False
    small: ClassVar[Mapping[str, Any]] = {"num_virtual_tokens": 3}
    head_prefix: ClassVar[str] = "base_model."
    rate_small: ClassVar[float] = 3e-2
    rate_large: ClassVar[float] = 3e-3

    num_virtual_tokens: int = Field(default=20, ge=1)
    """How many keys and values are put before a layer's own."""

    prefix_projection: bool = False
    """Train a small network that makes them, instead of themselves; it is folded away when saved."""

    encoder_hidden_size: int | None = Field(default=None, ge=1)
    """Hidden width of that network; the base's own width when left out."""

    init_std: float = Field(default=0.02, ge=0, le=10)
    """Standard deviation of the starting values, without projection."""

    def default_targets(self, base: Base) -> list[str]:
        """Self-attention in every layer."""
        return ["attention"]

    def accepts(self, site: Site) -> bool:
        """Softmax cores only."""
        return site.heads > 0

    def build(self, base: Base, name: str) -> Adapter:
        """A part at each attention; with projection they share one encoder."""
        limit = base.max_positions
        if limit is not None and self.num_virtual_tokens >= limit:
            raise UsageError(f"num_virtual_tokens: {self.num_virtual_tokens} of {limit} positions of {base.name}")
        sites = self.chosen(base)
        sizes = [2 * site.kv_heads * site.head_dim for site in sites]
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        encoder = None
        if self.prefix_projection:
            hidden = self.encoder_hidden_size or base.hidden_size
            encoder = PrefixEncoder(self.num_virtual_tokens, base.hidden_size, hidden, sum(sizes))
        placed: list[tuple[Site, Part]] = [
            (site, PrefixPart(site, self.num_virtual_tokens, start, encoder, self.init_std))
            for site, start in zip(sites, starts, strict=True)
        ]
        return Adapter(name, self, placed, shared=encoder)

    def folded(self) -> "Prefix":
        """The method of a saved adapter: the projection is gone."""
        return self.model_copy(update={"prefix_projection": False, "encoder_hidden_size": None})

    def to_folder(self, adapter: Adapter, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """peft's layout: one tensor `prompt_embeddings` [n, layers · 2 · kv_heads · head_dim]."""
        parts = [part for part in adapter.parts if isinstance(part, PrefixPart)]
        flat = [torch.stack(part.keys_and_values()).permute(2, 0, 1, 3).flatten(1).detach() for part in parts]
        site = adapter.placed[0][0]
        everywhere = [site.name for site, _ in adapter.placed] == [site.name for site in base.select("attention")]
        config = {
            # peft has a prefix in every layer or none.
            "peft_type": self.peft_type if everywhere and base.family.kind != "encoder-decoder" else "GRAFT_PREFIX",
            "num_virtual_tokens": self.num_virtual_tokens,
            "token_dim": site.kv_heads * site.head_dim,
            "num_attention_heads": site.kv_heads,
            "num_layers": len(parts),
            "num_transformer_submodules": 1,
            "encoder_hidden_size": site.kv_heads * site.head_dim,
            "prefix_projection": False,
        }
        return config, {"prompt_embeddings": torch.cat(flat, dim=1)}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, source: str) -> Method:
        """The method of a folder that peft wrote; a projection is folded away there."""
        known = {
            "num_virtual_tokens",
            "token_dim",
            "num_attention_heads",
            "num_layers",
            "num_transformer_submodules",
        }
        check_peft_config(config, known | {"encoder_hidden_size", "prefix_projection", "init_weights"}, source)
        sites = base.select("attention")
        sizes = {
            "num_layers": len(sites),
            "num_attention_heads": sites[0].kv_heads,
            "token_dim": sites[0].kv_heads * sites[0].head_dim,
        }
        for key, size in sizes.items():
            if config.get(key, size) != size:
                raise DamagedError(
                    f"{source}: {key} is {config[key]}, for {base.name} it is {size}",
                    "the adapter was made for another base",
                )
        return cls.parse({"num_virtual_tokens": config.get("num_virtual_tokens")}, source)

    def load(self, adapter: Adapter, base: Base, tensors: Mapping[str, Tensor], source: str) -> None:
        """Read `prompt_embeddings`."""
        parts = [part for part in adapter.parts if isinstance(part, PrefixPart)]
        expected = (self.num_virtual_tokens, sum(part.span[1] - part.span[0] for part in parts))
        stored = tensors.get("prompt_embeddings")
        if len(tensors) != 1 or stored is None or tuple(stored.shape) != expected:
            found = {key: tuple(value.shape) for key, value in list(tensors.items())[:3]}
            raise DamagedError(
                f"{source}: expected one tensor prompt_embeddings of shape {expected}, got {found}",
                "the adapter was made for another base or settings",
            )
        with torch.no_grad():
            for part in parts:
                part.values.copy_(stored[:, part.span[0] : part.span[1]].view(part.shape))
