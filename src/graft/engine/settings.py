"""What of the engine a run uses."""

from typing import Literal

from pydantic import Field

from graft.config import Config


class Engine(Config):
    """How a run is made fast. Results differ by rounding, and by what dropout draws."""

    attention: Literal["auto", "sdpa"] = "auto"
    """auto computes attention with dense products where they are faster than PyTorch's fused kernel (on CPUs); sdpa
    never does."""

    compile: Literal["auto"] | bool = Field(default="auto")
    """Compile the repeated layer with torch.compile. auto does on CPUs, when a compiler is there and the rest of the
    run is long enough to gain more than compiling costs."""

    keep_memory: bool = True
    """Let the C library keep freed memory for the next step instead of giving it back to the system (Linux)."""

    cheaper_dropout: bool = True
    """Draw what is dropped with fewer random numbers (on CPUs)."""

    fused_optimizer: bool = True
    """Update all tensors in one kernel."""
