"""What prefix tuning and its relatives share: attended tokens at every layer, and peft's folder layout."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from graft.errors import DamagedError, UsageError
from graft.methods.base import Bypass, Method
from graft.methods.folder import check_peft_config
from graft.model import Base
from graft.parts.base import Adapter, Part
from graft.parts.prefix import PrefixEncoder, PrefixPart
from graft.sites import Site


class Attended(Method):
    """Settings and storage of methods whose parts are keys and values of attended tokens. Abstract."""

    unified: ClassVar[Bypass] = Bypass("softmax(x Wq Pk^T) Pv", "layer input (parallel)", "attention", "(1-λ)h + λΔh")
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    starts_as_base: ClassVar[bool] = False
    small: ClassVar[Mapping[str, Any]] = {"num_virtual_tokens": 3}
    head_prefix: ClassVar[str] = "base_model."
    rate_small: ClassVar[float] = 6e-2
    rate_large: ClassVar[float] = 3e-3

    aliases: ClassVar[dict[str, str]] = Method.aliases | {"prefix_length": "num_virtual_tokens"}

    num_virtual_tokens: int = Field(default=20, ge=1, le=65536)
    """How many keys and values are put before a layer's own."""

    init_std: float = Field(default=0.02, ge=0, le=10)
    """Standard deviation of the starting values, without projection."""

    def default_targets(self, base: Base) -> list[str]:
        """Self-attention in every layer."""
        return ["attention"]

    def accepts(self, site: Site) -> bool:
        """Softmax cores only."""
        return site.heads > 0

    def encoder(self, base: Base, columns: int) -> PrefixEncoder | None:
        """The network that makes all keys and values, if there is one."""
        return None

    def build(self, base: Base, name: str) -> Adapter:
        """A part at each attention; with an encoder they share it."""
        check_length(self.num_virtual_tokens, base)
        sites = self.chosen(base)
        sizes = [2 * site.kv_heads * site.head_dim for site in sites]
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        encoder = self.encoder(base, sum(sizes))
        placed: list[tuple[Site, Part]] = [
            (site, PrefixPart(site, self.num_virtual_tokens, start, encoder, self.init_std))
            for site, start in zip(sites, starts, strict=True)
        ]
        return Adapter(name, self, placed, shared=encoder)

    def to_folder(self, adapter: Adapter, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """peft's layout: one tensor `prompt_embeddings` [n, layers · 2 · kv_heads · head_dim]."""
        parts = [part for part in adapter.parts if isinstance(part, PrefixPart)]
        flat = [torch.stack(part.keys_and_values()).permute(2, 0, 1, 3).flatten(1).detach() for part in parts]
        site = adapter.placed[0][0]
        everywhere = [site.name for site, _ in adapter.placed] == [site.name for site in base.select("attention")]
        alike = everywhere and base.family.kind != "encoder-decoder"  # peft has a prefix in every layer or none
        config = {
            "peft_type": self.peft_type if alike else f"GRAFT_{self.name.upper()}",
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
        sites = base.select("attention")
        sizes = {
            "num_layers": len(sites),
            "num_attention_heads": sites[0].kv_heads,
            "token_dim": sites[0].kv_heads * sites[0].head_dim,
        }
        harmless = {"num_transformer_submodules", "encoder_hidden_size", "prefix_projection", "init_weights"}
        check_peft_config(config, {"num_virtual_tokens", *sizes, *harmless}, source)
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


def check_length(tokens: int, base: Base) -> None:
    """Virtual tokens must leave a position for the row."""
    if base.max_positions is not None and tokens >= base.max_positions:
        raise UsageError(f"num_virtual_tokens: {tokens} of {base.max_positions} positions of {base.name}")
