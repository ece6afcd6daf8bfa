"""The sections of the benchmark that train: their works, sides and rows."""

from dataclasses import dataclass, field
from typing import Any

from benchmarks.speed.work import CHAT_MODEL, ENCODER, Work

_BEST = ("bf16:autocast:length", "fp32:autocast:length", "bf16:plain:length")
"""How Trainer may be at its best with a frozen base; the fastest in a short trial is measured."""


@dataclass(frozen=True)
class Side:
    """One side of a section: Graft, or a peer by its variants, of which the fastest in a short trial is taken."""

    name: str
    about: str
    variants: tuple[str, ...] = ("graft",)
    extra: bool = False
    """Run with --extra only."""
    few: bool = False
    """Run once and on the trial's rows only, since it takes longer than all others together."""


@dataclass(frozen=True)
class Group:
    """One work with its sides; a section is one or several of them."""

    name: str
    work: Work
    sides: tuple[Side, ...]
    rows: int
    trial_rows: int = 48
    held: int = 64
    told: dict[str, Any] = field(default_factory=dict)


GRAFT = Side("graft", "Graft, its defaults")
COMPILED = Side("graft compiled", "Graft with engine.compile=true, as in longer runs", ("graft:compiled",))


def instruct(rows: int | None = None) -> list[Group]:
    """A chat model, LoRA on queries and values."""
    best = tuple(f"trainer:{way}" for way in _BEST)
    ways = ("bf16:autocast:length", "bf16:autocast:flat", "bf16:autocast:packed", "fp32:autocast:packed")
    trl = tuple(f"trl:{way}" for way in ways)
    sides = (
        GRAFT,
        COMPILED,
        Side("trainer", "peft, Trainer's defaults: fp32, random batches, padded to the longest",
             ("trainer:fp32:plain:random",)),
        Side("trainer best", "peft, Trainer: bf16, rows of like length together", best),
        Side("trl best", "peft, SFTTrainer: bf16, no padding or rows of like length together", trl),
        Side("trainer compiled", "as trainer best, with torch_compile=True",
             ("trainer:fp32:autocast:length:compiled",), extra=True),
    )  # fmt: skip
    return [Group("instruct", Work("chat", CHAT_MODEL, 8, 2e-3, 1024), sides, rows or 72, trial_rows=32)]


def classify(rows: int | None = None) -> list[Group]:
    """An encoder as a classifier of film reviews, LoRA and all weights."""
    groups = []
    for method, rate in (({"name": "lora", "r": 8, "target_modules": ["attn.q", "attn.v"]}, 4e-3), ("full", 5e-5)):
        given = {"name": method} if isinstance(method, str) else method
        ways = ("fp32:autocast:length", "fp32:plain:length")
        if given["name"] != "full":
            ways = ("bf16:autocast:length", *ways)
        sides = (
            GRAFT,
            COMPILED,
            Side("trainer", "Trainer as in the quick tour: fp32, all rows padded to max_length 128",
                 ("trainer:fp32:plain:widest",), few=True),
            Side("trainer dynamic", "Trainer as in the task guide: fp32, padded to the longest of a batch",
                 ("trainer:fp32:plain:random",)),
            Side("trainer best", "Trainer: bf16, rows of like length together", tuple(f"trainer:{w}" for w in ways)),
        )  # fmt: skip
        work = Work("labels", ENCODER, 32, rate, 128, given)
        groups.append(Group(f"classify {given['name']}", work, sides, rows or 512, trial_rows=96))
    return groups


METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("lora", {"r": 8, "target_modules": ["attn.q", "attn.v"]}),
    ("dora", {"r": 8, "target_modules": ["attn.q", "attn.v"]}),
    ("adalora", {"init_r": 12, "target_r": 8, "tinit": 2, "tfinal": 4, "deltaT": 1,
                 "target_modules": ["attn.q", "attn.v"]}),
    ("ia3", {"target_modules": ["attn.k", "attn.v", "mlp.down"], "feedforward_modules": ["mlp.down"]}),
    ("vera", {"r": 256, "target_modules": ["attn.q", "attn.v"]}),
    ("prefix", {"num_virtual_tokens": 20}),
    ("prompt", {"num_virtual_tokens": 20}),
    ("ptuning", {"num_virtual_tokens": 20}),
)  # fmt: skip
"""Methods that peft has too, with the same settings on both sides."""
STEPS = 15
"""Steps of each method; the first three are not in the median."""


def methods(rows: int | None = None) -> list[Group]:
    """Every method that peft has too, on both models: time per step and memory.

    peft's way is the one that is fastest with the first method of each model.
    """
    groups = []
    for kind, model, batch, length in (("chat", CHAT_MODEL, 4, 1024), ("labels", ENCODER, 32, 256)):
        for name, settings in METHODS:
            work = Work(kind, model, batch, 1e-3, length, {"name": name, **settings})  # type: ignore[arg-type]
            best = tuple(f"trainer:{way}" for way in _BEST[: 3 if kind == "chat" else 2])
            sides = (GRAFT, Side("peft best", "peft, Trainer: bf16, rows of like length together", best))
            groups.append(Group(f"{name}, {model}", work, sides, rows or STEPS * batch, trial_rows=4 * batch, held=0))
    return groups
