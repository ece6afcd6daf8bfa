"""What a recipe says of training."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from graft.config import Config
from graft.train.optim import Kind, Schedule
from graft.train.precision import Choice


class Training(Config):
    """How a run trains. The learning rate belongs to the method."""

    aliases: ClassVar[dict[str, str]] = {
        "num_epochs": "num_train_epochs",
        "epochs": "num_train_epochs",
        "micro_batch_size": "per_device_train_batch_size",
        "batch_size": "per_device_train_batch_size",
        "train_batch_size": "per_device_train_batch_size",
        "eval_batch_size": "per_device_eval_batch_size",
        "bf16": "precision",
        "optim": "optimizer",
    }

    num_train_epochs: float = Field(default=2, gt=0, le=10_000)
    """Passes over the training rows; parts of a pass are possible."""

    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimizer steps, whatever num_train_epochs says."""

    per_device_train_batch_size: int = Field(default=32, ge=1)
    """Rows per forward and backward pass."""

    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Passes per optimizer step. The gradient is the same as with one pass over all their rows."""

    per_device_eval_batch_size: int = Field(default=64, ge=1)
    """Rows per pass in evaluation."""

    warmup_ratio: float = Field(default=0.06, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""

    lr_scheduler_type: Schedule = "linear"
    """How the learning rate falls after that: linear, cosine, or constant (it does not)."""

    optimizer: Kind = "adamw"
    """How AdamW keeps its moments: adamw in fp32, adamw_8bit in 8 bits, paged_adamw_8bit (on CUDA) in 8 bits and in the
    computer's memory when the device's is full. The latter two need bitsandbytes."""

    weight_decay: float = Field(default=0.01, ge=0, lt=1)
    """Decoupled weight decay, on matrices only."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """The gradient's norm over the adapter is clipped to this."""

    eval_steps: int | None = Field(default=None, ge=1)
    """Evaluate on the validation rows every so many optimizer steps; four times in the run when left out."""

    load_best_model_at_end: bool = True
    """End with the best evaluated step rather than with the last one."""

    metric_for_best_model: Literal["quality", "loss"] | None = None
    """What the best step is chosen by; quality for classification and the validation loss otherwise when left out."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    precision: Choice = "auto"
    """Number format of matrix products: bf16, fp32, or what the hardware is best at."""

    preflight: bool = True
    """Before the first step, predict the run's memory and run its heaviest pass once; with too little memory, passes
    get smaller, and a step keeps its rows."""

    @field_validator("optimizer", mode="before")
    @classmethod
    def _read_names(cls, given: Any) -> Any:
        """As transformers spells them."""
        names = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_bnb_8bit": "adamw_8bit"}
        return names.get(given, given) if isinstance(given, str) else given

    @model_validator(mode="before")
    @classmethod
    def _read_flags(cls, given: Any) -> Any:
        """`bf16: true` is how transformers spells the precision; read before the alias is renamed."""
        if isinstance(given, dict) and isinstance(given.get("bf16"), bool):
            return given | {"bf16": "bf16" if given["bf16"] else "fp32"}
        return given
