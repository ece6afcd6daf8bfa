"""What is known of a run, whoever trained it: its curve, its facts, and the findings that are read from them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, log
from statistics import median
from typing import Any, Literal

Level = Literal["serious", "warning", "note"]
"""serious: the result cannot be used, or there is none. warning: worth another run. note: worth knowing."""
Sure = Literal["certain", "likely", "possible"]
"""certain: the figures are the fault. likely: hardly anything else gives them. possible: other things do too."""
ONLINE = {"grpo", "ppo"}
"""Objectives whose loss is no measure: it is made of advantages, with a mean of 0, over answers that change."""
LEVELS: tuple[Level, ...] = ("serious", "warning", "note")


@dataclass(frozen=True, slots=True)
class Step:
    """One logged point of training."""

    number: int
    """Optimizer steps so far."""
    loss: float
    """The mean over the step's rows; of a log kept every few steps, over those."""
    rate: float | None = None
    """Learning rate."""
    norm: float | None = None
    """The gradient's norm before clipping."""
    rows: int | None = None
    """Rows trained on so far."""
    seconds: float | None = None
    """Of training so far."""
    watched: Mapping[str, float] = field(default_factory=dict)
    """Figures of the step that its objective watches: reward, kl, entropy, silent, margin, …"""

    @property
    def finite(self) -> bool:
        """Whether loss and norm are numbers."""
        return isfinite(self.loss) and (self.norm is None or isfinite(self.norm))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation on validation rows."""

    number: int
    """Optimizer steps before it."""
    loss: float | None = None
    quality: float | None = None
    """0 to 1: accuracy, or the mean score of the answers."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """`ended`: share of answers that ended. `most_predicted`: share of the label given most often. `majority`: share
    of the label that is right most often."""
    samples: Sequence[Mapping[str, Any]] = ()
    """Answers, each with `prompt`, `reference` and `answer`."""
    seconds: float | None = None
    """What it took."""


@dataclass(frozen=True)
class Facts:
    """What a run was told, and what was measured of it; None where that is not known."""

    kind: Literal["graft", "transformers"] = "graft"
    method: str | None = None
    """A method's name, as in recipes."""
    objective: str | None = None
    """classify, instruct, pretrain, …"""
    best_by: str = "quality"
    """What the best step is chosen by: quality or loss."""
    parameters: int | None = None
    """Of the base."""
    peak_rate: float | None = None
    total: int | None = None
    """Optimizer steps that were planned."""
    warmup: float = 0.0
    """Share of the steps in which the rate rises."""
    epochs: float | None = None
    few_on_purpose: bool = False
    """Whether the steps were limited by hand."""
    clip: float | None = None
    """The norm that gradients are clipped to."""
    classes: int | None = None
    """Labels of a classifier."""
    validation_rows: int | None = None
    train_rows: int | None = None
    keeps_best: bool = True
    """Whether the run ends with its best evaluated step."""
    dtype: str | None = None
    state: str | None = None
    """running, done, stopped or failed; lost when it says running and its process is gone."""
    cause: str = ""
    """Why it ended early."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """The final figures."""
    correct: Sequence[float] = ()
    """Score of each test row."""
    answers: Sequence[Mapping[str, Any]] = ()
    """What was generated for the test rows."""
    base: Mapping[str, Any] = field(default_factory=dict)
    """The untouched base's figures, where a comparison measured them."""
    log: Sequence[str] = ()
    """Lines that the run said."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Every setting; empty for other trainers."""


@dataclass(frozen=True)
class Curve:
    """A run as detectors see it. Steps and evaluations rise in number."""

    source: str
    """Where it was read."""
    steps: Sequence[Step] = ()
    evaluations: Sequence[Evaluation] = ()
    facts: Facts = field(default_factory=Facts)
    unreadable: int = 0
    """Lines of the log that could not be read."""

    @property
    def last(self) -> int:
        """The last step that is known."""
        return self.steps[-1].number if self.steps else self.evaluations[-1].number if self.evaluations else 0

    @property
    def ended(self) -> bool:
        """Whether the run went to its planned end, as far as is known."""
        if self.facts.state is not None:
            return self.facts.state == "done"
        return self.facts.total is not None and self.last >= self.facts.total

    @property
    def measured_by_loss(self) -> bool:
        """Whether the loss says how good the model is, and so should fall."""
        return self.facts.objective not in ONLINE

    @property
    def chance(self) -> float | None:
        """The loss of a classifier that knows nothing, in nats: the log of the number of labels."""
        return log(self.facts.classes) if self.facts.classes and self.facts.classes > 1 else None


@dataclass(frozen=True)
class Finding:
    """Something that the figures of a run say."""

    name: str
    level: Level
    sure: Sure
    evidence: str
    """The run's own figures, with their steps."""
    causes: tuple[str, ...] = ()
    """What it comes from, the likeliest first."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings that mend it, by dotted key of the recipe."""
    stops: bool = False
    """Whether a run that shows this is stopped."""


def setting(facts: Facts, key: str, value: Any) -> dict[str, Any]:
    """A change of one setting; none where it has that value. Other trainers have no sections."""
    if facts.kind == "transformers":
        return {key.rpartition(".")[2]: value}
    found: Any = facts.recipe
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return {} if found == value else {key: value}


def level_of(values: Iterable[float]) -> float:
    """The median of the finite values; nan without any."""
    finite = [value for value in values if isfinite(value)]
    return median(finite) if finite else float("nan")


def windows(steps: Sequence[Step], width: int) -> list[float]:
    """The median loss of each stretch of `width` steps, half a stretch apart, the first one first."""
    losses = [step.loss for step in steps]
    starts = range(0, len(losses) - width + 1, max(1, width // 2))
    return [level_of(losses[start : start + width]) for start in starts]


def mean(values: Sequence[float]) -> float:
    """The mean; nan without values."""
    return sum(values) / len(values) if values else float("nan")
