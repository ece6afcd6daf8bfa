"""Prefix tuning: trained keys and values before every layer's own."""

from typing import ClassVar

from pydantic import Field

from graft.methods.attended import Attended
from graft.model import Base
from graft.parts.base import Adapter
from graft.parts.prefix import PrefixEncoder


class Prefix(Attended):
    """Trained keys and values before every layer's own, with positions shifted behind them (Li & Liang 2021)."""

    name: ClassVar[str] = "prefix"
    source: ClassVar[str] = "Li & Liang 2021, arXiv 2101.00190"

    prefix_projection: bool = False
    """Train a small network that makes them, instead of themselves; it is folded away when saved."""

    encoder_hidden_size: int | None = Field(default=None, ge=1, le=65536)
    """Hidden width of that network; the base's own width when left out."""

    def encoder(self, base: Base, columns: int) -> PrefixEncoder | None:
        """The network of the projection."""
        if not self.prefix_projection:
            return None
        hidden = self.encoder_hidden_size or base.hidden_size
        return PrefixEncoder(self.num_virtual_tokens, base.hidden_size, hidden, columns)

    def saved_as(self, adapter: Adapter) -> "Prefix":
        """Without the projection."""
        return self.model_copy(update={"prefix_projection": False, "encoder_hidden_size": None})
