"""What a method is: a configuration that builds an adapter. One subclass, in a file of its own, per method."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field, WithJsonSchema, field_validator
from torch import Tensor

from graft.config import Config, classes_in, read_choice
from graft.errors import DamagedError, UsageError
from graft.families import Family
from graft.methods.folder import copy_tensors
from graft.model import Base, family_of
from graft.parts.base import Adapter, Part
from graft.sites import Site

_NAMES: dict[str, Any] = {
    "anyOf": [{"type": "array", "items": {"type": "string"}, "minItems": 1}, {"type": "string"}, {"type": "null"}]
}
"""A list of names, or one name without a list."""


@dataclass(frozen=True)
class Bypass:
    """A method's row in the unified view of He et al. (2022, arXiv 2110.04366)."""

    function: str
    sees: str
    changes: str
    composition: str


@dataclass(frozen=True)
class Progress:
    """Where a training run is: optimizer step `step`, counted from 1, of `total`."""

    step: int
    total: int


class Method(Config):
    """A fine-tuning method and its settings.

    Subclasses set the class variables and `part` (or `build`, when parts share something). A method that does
    something at each step keeps what it remembers in the adapter's tensors, so that checkpoints hold it.
    """

    name: ClassVar[str]
    unified: ClassVar[Bypass]
    source: ClassVar[str]
    """The paper."""
    peft_type: ClassVar[str]
    """The type in `adapter_config.json`; GRAFT_… where peft has no such method."""
    mergeable: ClassVar[bool] = False
    in_vllm: ClassVar[bool] = False
    """Whether vLLM serves its folders: plain LoRA of rank 16 or less without a task head."""
    starts_as_base: ClassVar[bool] = True
    """Whether an untrained adapter computes exactly what the base computes."""
    small: ClassVar[Mapping[str, Any]] = {}
    """Settings for a base 32 wide with two layers, beside other adapters, as the tests have."""
    probe_tolerance: ClassVar[float] = 0.02
    """Largest difference between the outputs of a saved and of a loaded adapter, relative to their size (at least 1):
    fp32 and bf16 kernels of different machines stay far below, another base or a lost tensor far above."""
    head_prefix: ClassVar[str] = "base_model.model."
    """What peft puts before the names of a task head's tensors."""
    rate_small: ClassVar[float]
    """Default peak learning rate for a base under 100 M parameters, from the sweep in docs/log.md."""
    rate_large: ClassVar[float]
    """Default peak learning rate for larger bases."""

    aliases: ClassVar[dict[str, str]] = {"lr": "learning_rate"}

    learning_rate: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    """Peak learning rate; when left out, this method's own default for the size of the base."""

    target_modules: Annotated[list[str] | None, WithJsonSchema(_NAMES)] = Field(default=None, min_length=1)
    """Sites by role (attn.q, mlp.down, attention), by name (layers.3.attn.q), by PEFT's module names
    (q_proj, query), or all-linear.
    """

    layers_to_transform: list[int] | None = Field(default=None, min_length=1)
    """Only these layers, counted from 0; all when left out."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _one_target(cls, given: Any) -> Any:
        """`target_modules: all-linear` without a list, as peft's users write it."""
        return [given] if isinstance(given, str) else given

    @property
    def in_place(self) -> bool:
        """Whether the base's own tensors train."""
        return False

    @property
    def steps_to_move(self) -> int:
        """Optimizer steps after which every trainable tensor must have moved: what starts at zero hides what is below
        it from the first one.
        """
        return 2

    def build(self, base: Base, name: str) -> Adapter:
        """A new adapter for `base`, not attached yet. The default puts `part(site)` at each chosen site."""
        placed = [(site, self.part(site)) for site in self.chosen(base)]
        return Adapter(name, self, placed)

    def part(self, site: Site) -> Part:
        """The part for one site."""
        raise NotImplementedError

    def default_targets(self, base: Base) -> list[str]:
        """The sites used when `target_modules` is left out."""
        raise NotImplementedError

    def accepts(self, site: Site) -> bool:
        """Whether this method can sit at a site."""
        return True

    def chosen(self, base: Base) -> list[Site]:
        """The sites that the settings name on this base."""
        patterns = self.target_modules or self.default_targets(base)
        sites = base.select(patterns)
        fitting = [site for site in sites if self.accepts(site)]
        if not fitting:
            raise UsageError(
                f"{self.name} cannot sit at {sites[0].role!r}", f"its default is {self.default_targets(base)}"
            )
        if self.layers_to_transform is None:
            return fitting
        layers = {site.layer for site in base.sites if site.layer is not None}
        outside = [layer for layer in self.layers_to_transform if layer not in layers]
        if outside:
            raise UsageError(f"layers_to_transform: no layer {outside[0]}, the base has 0 to {max(layers)}")
        inside = [site for site in fitting if site.layer in self.layers_to_transform]
        if not inside:
            raise UsageError(
                f"target_modules {patterns} names nothing in layers {self.layers_to_transform}", "give other layers"
            )
        return inside

    def before_step(self, adapter: Adapter, progress: Progress) -> None:
        """Called before the forward passes of an optimizer step: DyLoRA draws its rank."""

    def penalty(self, adapter: Adapter) -> Tensor | None:
        """What is added to the mean loss, once for each optimizer step: AdaLoRA's orthogonality."""
        return None

    def after_optimizer(self, adapter: Adapter, progress: Progress) -> None:
        """Called after an optimizer step, with its gradients still there: AdaLoRA's importance and pruning."""

    def settled(self, progress: Progress) -> bool:
        """Whether the adapter as it is after this step may be a run's result: AdaLoRA's only within its budget."""
        return True

    def ranks(self) -> range:
        """The ranks at which one training can be used; empty where there is nothing to choose."""
        return range(0)

    def use_rank(self, adapter: Adapter, rank: int) -> None:
        """Evaluate and merge at one of `ranks`. Raises `UsageError` for another."""
        if rank not in self.ranks():
            known = f"1 to {self.ranks()[-1]}" if self.ranks() else "none: it is used as it was trained"
            raise UsageError(f"rank {rank} is none of {self.name}'s", f"its ranks: {known}")

    @classmethod
    def refuses(cls, family: Family) -> str | None:
        """Why this method cannot work on an architecture; None when it can. Asked before a model is loaded."""
        return None

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Whether a peft configuration is of this method."""
        return bool(config.get("peft_type") == cls.peft_type)

    def rate(self, base: Base) -> float:
        """The peak learning rate to use on this base."""
        if self.learning_rate is not None:
            return self.learning_rate
        return self.rate_small if base.parameter_count() < 100_000_000 else self.rate_large

    def settings(self) -> dict[str, Any]:
        """What an adapter folder keeps: every setting but the learning rate."""
        return self.model_dump(mode="json", exclude={"learning_rate"})

    def saved_as(self, adapter: Adapter) -> "Method":
        """The method of the saved adapter, where saving drops what only training needs."""
        return self

    def to_folder(self, adapter: Adapter, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """`adapter_config.json` and tensors (without the head) as they are stored."""
        tensors = {name: tensor.detach() for name, tensor in adapter.named_tensors(head=False)}
        return {"peft_type": self.peft_type}, tensors

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, source: str) -> "Method":
        """The method of a folder that peft wrote, without Graft's own settings; errors name `source`."""
        raise DamagedError(
            f"{source}: graft.json is missing, so the settings of {cls.name} are not known",
            "copy the whole folder again",
        )

    def load(self, adapter: Adapter, base: Base, tensors: Mapping[str, Tensor], source: str) -> None:
        """Put stored tensors (without the head) into a built adapter."""
        copy_tensors(adapter, tensors, source)


def check_pairs(
    chosen: Iterable[Method], model: str, objective: Callable[[Family], str | None] = lambda family: None
) -> None:
    """Refuse methods, and an objective, that cannot work on a base's architecture, before its weights are read."""
    family = family_of(model)
    unfit = objective(family)
    if unfit is not None:
        raise UsageError(f"{model}: {unfit}", "choose another base or objective")
    for method in chosen:
        reason = method.refuses(family)
        if reason is not None:
            raise UsageError(f"{method.name} cannot work on {model}: {reason}", "`graft methods` lists the others")


def method_of(adapter: Adapter) -> Method:
    """The method that built an adapter."""
    if not isinstance(adapter.method, Method):
        raise UsageError(f"adapter {adapter.name!r} was not built by a method")
    return adapter.method


def methods() -> dict[str, type[Method]]:
    """Every method, by name: the classes in the files of this folder."""
    return classes_in("graft.methods", Method, {"base", "store", "table"})


def read_method(given: Any, source: str = "recipe") -> Method:
    """A method from its name or from a mapping with `name` and settings."""
    return read_choice(given, Method, methods(), source)
