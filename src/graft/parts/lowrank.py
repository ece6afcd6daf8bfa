"""A low-rank matrix beside a weight: what LoRA and its relatives put at a site."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.parts.base import Form, Part, at_dtype_of
from graft.sites import Site


class LoraPart(Part):
    """y + s·B A drop(x): A [r, d_in] starts kaiming-uniform, B [d_out, r] at zero, so the model starts as the base."""

    def __init__(self, site: Site, r: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(r, site.d_in))
        self.lora_B = nn.Parameter(torch.zeros(site.d_out, r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale = scale
        self.dropout = nn.Dropout(dropout)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """x [B, S, d_in], y [B, S, d_out] -> [B, S, d_out]."""
        low = F.linear(self.dropout(at_dtype_of(x, self.lora_A)), self.lora_A)
        return y + (F.linear(low, self.lora_B) * self.scale).to(y.dtype)

    def form(self) -> Form | None:
        """A, and s·B."""
        return Form(down=self.lora_A, up=self.lora_B * self.scale)

    def merge(self, site: Site) -> dict[str, Tensor]:
        """W + s·B A, added in fp32."""
        delta = self.scale * (self.lora_B.detach().float() @ self.lora_A.detach().float())
        return site.host_update(site.dense_weight().detach().float() + delta)


class LoraEmbeddingPart(Part):
    """LoRA at an embedding table: a row of A^T B^T is added to the row of each token.

    As in peft, A [r, words] starts at zero and B [width, r] normal, since a token's row of A^T is looked up.
    """

    def __init__(self, site: Site, r: int, scale: float) -> None:
        super().__init__()
        self.lora_embedding_A = nn.Parameter(torch.zeros(r, site.d_in))
        self.lora_embedding_B = nn.Parameter(torch.randn(site.d_out, r))
        self.scale = scale
        self.padding = getattr(site.leave, "padding_idx", None)  # its row does not train, as in the table itself
        # Gemma multiplies what it looks up, and so what is added.
        self.factor = float(getattr(site.leave, "scalar_embed_scale", 1.0))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Token ids x [B, S], embeddings y [B, S, d] -> [B, S, d]."""
        low = F.embedding(x, self.lora_embedding_A.T, self.padding)
        return y + (F.linear(low, self.lora_embedding_B) * (self.scale * self.factor)).to(y.dtype)

    def merge(self, site: Site) -> dict[str, Tensor]:
        """The table plus s·(B A)^T, added in fp32."""
        table = site.leave.get_parameter("weight").detach()
        delta = self.scale * (self.lora_embedding_B.detach().float() @ self.lora_embedding_A.detach().float()).T
        return {f"{site.path}.weight": (table.float() + delta).to(table.dtype)}
