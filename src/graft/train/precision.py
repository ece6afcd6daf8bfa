"""Which number format a run computes in, and why."""

from dataclasses import dataclass
from typing import Literal

import torch

from graft.measure import cpu_name

Choice = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True)
class Precision:
    """The format of matrix products. Trainable weights and the optimizer are fp32 in both cases."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> Literal["bf16", "fp32"]:
        """Its short name."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def choose(choice: Choice, device: torch.device) -> Precision:
    """The format for a device: bf16 where the hardware multiplies it faster than fp32."""
    if choice != "auto":
        dtype = torch.bfloat16 if choice == "bf16" else torch.float32
        return Precision(dtype, "set in the recipe")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(torch.bfloat16, f"{torch.cuda.get_device_name(device)} multiplies bf16")
        return Precision(torch.float32, f"{torch.cuda.get_device_name(device)} has no bf16 units")
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        if found.get("amx_bf16"):
            return Precision(torch.bfloat16, "this CPU has AMX")
        if found.get("avx512_bf16") and cpu_name().startswith("Intel"):
            # AMX is what multiplies bf16 there. Without it, as on a virtual machine that hides it, a core with
            # AVX512-FP16 reached 83 GFLOP/s in bf16 and 155 in fp32, and a step of SmolLM2-135M took 3.5 s and 2.4.
            return Precision(torch.float32, "this Intel CPU has no AMX, and its AVX512-BF16 is slower than fp32")
        if found.get("avx512_bf16"):
            return Precision(torch.bfloat16, "this CPU has AVX512-BF16")
        return Precision(torch.float32, "this CPU has no bf16 units")
    return Precision(torch.float32, f"bf16 is not measured on {device.type}")
