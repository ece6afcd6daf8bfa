"""DoRA: LoRA with a trained magnitude for each output."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.methods.base import Bypass
from graft.methods.lowrank import LowRank
from graft.parts.base import Form, Part, at_dtype_of
from graft.parts.lowrank import LoraPart
from graft.sites import Site


class DoraPart(LoraPart):
    """g·(W0 + s·B A) x + b with g = m / ‖W0 + s·B A‖ by rows, m [d_out] trained from ‖W0‖, the norm not
    differentiated (section 4.3 of the paper).

    Dropout acts on the input of B A only; peft drops the input of W0 too.
    """

    reads_weight: ClassVar[bool] = True

    def __init__(self, site: Site, r: int, scale: float, dropout: float) -> None:
        super().__init__(site, r, scale, dropout)
        self.site = site
        self.lora_magnitude_vector = nn.Parameter(_squares(site.dense_weight()).sqrt())

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """x [B, S, d_in], y [B, S, d_out] -> [B, S, d_out]."""
        g = self.lora_magnitude_vector / self._norm()  # in fp32: bf16 has steps of 0.008 around 1
        low = F.linear(self.dropout(at_dtype_of(x, self.lora_A)), self.lora_A)
        delta = (F.linear(low, self.lora_B) * self.scale).to(y.dtype)
        plain = y if self.site.bias is None else y - self.site.bias
        return (y + (g - 1) * plain + g * delta).to(y.dtype)

    def form(self) -> Form | None:
        """A, g·s·B, g of y, and what of the host's bias g must not change."""
        g = self.lora_magnitude_vector / self._norm()
        shift = None if self.site.bias is None else (1 - g) * self.site.bias
        return Form(down=self.lora_A, up=self.lora_B * (self.scale * g)[:, None], factor=g, shift=shift)

    @torch.no_grad()
    def _norm(self) -> Tensor:
        """‖W0 + s·B A‖ by rows [d_out], from ‖W0‖² + 2s·(W0 Aᵀ)·B + s²·(B A Aᵀ)·B: no [d_out, d_in] is made."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            weight, a, b = self.site.dense_weight(), self.lora_A, self.lora_B
            cross = ((weight @ a.T.to(weight.dtype)).float() * b).sum(dim=1)
            own = ((b @ (a @ a.T)) * b).sum(dim=1)
            squares = _squares(weight) + 2 * self.scale * cross + self.scale**2 * own
            return squares.clamp(min=0).sqrt()

    def merge(self, site: Site) -> dict[str, Tensor]:
        """g·(W0 + s·B A), in fp32."""
        weight = site.dense_weight().detach().float()
        weight = weight + self.scale * (self.lora_B.detach().float() @ self.lora_A.detach().float())
        return site.host_update(weight * (self.lora_magnitude_vector.detach() / weight.norm(dim=1))[:, None])


@torch.no_grad()
def _squares(weight: Tensor) -> Tensor:
    """‖W‖² by rows [d_out], in fp32."""
    norms: Tensor = torch.linalg.vector_norm(weight.detach(), dim=1, dtype=torch.float32)
    return norms.square()


class Dora(LowRank):
    """LoRA, and a trained magnitude for each output of the adapted weight (Liu et al. 2024)."""

    name: ClassVar[str] = "dora"
    source: ClassVar[str] = "Liu et al. 2024, arXiv 2402.09353"
    unified: ClassVar[Bypass] = Bypass("x Wd Wu", "site input (parallel)", "chosen linears", "g·(h + s·Δh)")
    peft_type: ClassVar[str] = "LORA"
    use_dora: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True

    def low_rank(self, site: Site, r: int, scale: float) -> Part:
        """A, B and the magnitudes for one site."""
        return DoraPart(site, r, scale, self.lora_dropout)
