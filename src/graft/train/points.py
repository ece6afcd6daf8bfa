"""The learning curve of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from graft.diagnosis.curve import Evaluation, Step
from graft.objectives.base import Result


@dataclass(frozen=True)
class Point:
    """One point of a learning curve. `quality` is None between evaluations."""

    step: int
    examples: int
    train_loss: float
    learning_rate: float
    grad_norm: float
    seconds: float
    quality: float | None = None
    validation_loss: float | None = None
    evaluation_seconds: float | None = None
    """What the evaluation took."""
    figures: dict[str, float] = field(default_factory=dict)
    """Further figures of an evaluation."""
    watched: dict[str, float] = field(default_factory=dict)
    """Figures of the step itself that its objective watches, such as a reward."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """The first answers of an evaluation that generates: the same prompts each time."""


@dataclass
class Fit:
    """What a training run did. `seconds` leaves out evaluation and checkpoints."""

    steps: int = 0
    examples: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best: Result | None = None
    points: list[Point] = field(default_factory=list)


def logged(points: Sequence[Point]) -> tuple[list[Step], list[Evaluation]]:
    """Points of a learning curve as the guard reads them."""
    steps = [
        Step(one.step, one.train_loss, one.learning_rate, one.grad_norm, one.examples, one.seconds, one.watched)
        for one in points
    ]
    evaluations = [
        Evaluation(one.step, one.validation_loss, one.quality, one.figures, one.samples, one.evaluation_seconds)
        for one in points
        if one.quality is not None
    ]
    return steps, evaluations
