"""What an objective is: rows into examples, examples into a loss, examples into a quality."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from graft.config import Config, classes_in, read_choice
from graft.data.load import DataConfig, Splits, Unit, load_splits
from graft.families import Family
from graft.model import Base
from graft.parts.base import Adapter
from graft.routing import Entry, Route

Report = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0 to 1."""

Say = Callable[[str], None]
"""Called with a line for the user."""


def silent(line: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Loss:
    """A sum over a batch and its weight, so that accumulation over uneven batches is exact: total / weight
    is the mean.
    """

    total: Tensor
    weight: float


class Example(Protocol):
    """One row as ids. `len()` is its tokens, `place` its file and line."""

    @property
    def place(self) -> str:
        """For errors."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Result:
    """An evaluation: the mean quality in [0, 1], the mean loss, and the quality of each row, in [0, 1]."""

    quality: float
    loss: float
    correct: list[float]
    figures: dict[str, float] = field(default_factory=dict)
    """Further figures by name, such as perplexity."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """What was generated, one entry for each row, where an objective generates: place, prompt, reference, answer."""
    batch_size: int = 0
    """Rows of a pass, fewer than asked where memory ran out; 0 where that is not known."""


class Objective(Config):
    """What a run optimizes. Subclasses set `name` and define the methods."""

    name: ClassVar[str]
    unit: ClassVar[Unit]
    """What its rows are."""
    max_length: ClassVar[int]
    """Tokens per row when the recipe does not say."""
    best_by: ClassVar[str] = "quality"
    """What the best step of a run is chosen by: quality or loss."""
    compiles: ClassVar[bool] = True
    """Whether a step runs one way through the layers, so that compiling them pays."""
    patience: ClassVar[int] = 0
    """Steps more than the method needs until every tensor must have moved: where a step may have no signal."""
    speaks: ClassVar[bool] = True
    """Whether what is trained writes text: a classifier or a reward model does not."""

    @property
    def metric(self) -> str:
        """What `Result.quality` is called."""
        raise NotImplementedError

    def refuses(self, family: Family) -> str | None:
        """Why this objective cannot train an architecture; None when it can. Asked before a model is loaded."""
        return None

    def load(self, data: DataConfig) -> Splits:
        """The rows of a run, checked. Raises `DataError`."""
        return load_splits(data, self.unit)

    def examples(
        self,
        rows: Sequence[Any],
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        max_length: int,
        say: Say = silent,
    ) -> list[Any]:
        """Rows as token ids, at most `max_length` long; `say` is told what was cut or left out.

        Raises `DataError` for rows that would train nothing, as far as the objective does not allow for them.
        """
        raise NotImplementedError

    def prepare(self, base: Base, adapter: Adapter, labels: tuple[str, ...]) -> None:
        """Give the adapter its head, and leave out of training what this objective never uses."""
        raise NotImplementedError

    def template(self, tokenizer: PreTrainedTokenizerBase | None) -> str | None:
        """The chat template that rows go through, to be kept with the adapter; None where there is none."""
        return None

    @property
    def updates(self) -> int:
        """Optimizer steps over what was collected once."""
        return 1

    def begin(self, base: Base, adapter: Adapter, examples: Sequence[Any], say: Say = silent) -> None:
        """Called before the first step with the training rows. Raises `GuardError` where training would go wrong."""

    def collect(self, base: Base, examples: Sequence[Any], entry: Entry, size: int, again: bool) -> list[Any]:
        """The examples of a step made of its rows: reinforcement learning generates here, `size` rows at a time.
        `again` asks for those of the step before. Called in training mode, and leaves it."""
        return list(examples)

    def imagine(self, examples: Sequence[Any]) -> list[Any]:
        """What `collect` gives at its longest, without a model: for plans and rehearsals."""
        return list(examples)

    def after_step(self, step: int) -> dict[str, float]:
        """Called after each optimizer step; what is worth watching of it, by name. Raises `GuardError`."""
        return {}

    def memory(self) -> dict[str, Tensor]:
        """What the next step depends on beside adapter, optimizer and random numbers, by name: checkpoints hold it."""
        return {}

    def recall(self, kept: Mapping[str, Tensor]) -> None:
        """Put back what `memory` gave, after `begin` with the same training rows: a run goes on behind a checkpoint."""

    def finish(self, base: Base, adapter: Adapter) -> None:
        """Called after the last step: what only training needs is dropped."""

    def weight(self, examples: Sequence[Any]) -> float:
        """The weight that the loss of these examples will have, known before the forward pass."""
        raise NotImplementedError

    def loss(self, base: Base, examples: Sequence[Any], route: Entry | Route) -> Loss:
        """The summed loss of a batch."""
        raise NotImplementedError

    def longest_answer(self, examples: Sequence[Any]) -> int:
        """Tokens that are generated at most for one of these examples in an evaluation; 0 where nothing is."""
        return 0

    def evaluate(
        self,
        base: Base,
        examples: Sequence[Any],
        entry: Entry,
        batch_size: int,
        report: Report | None = None,
        quick: bool = False,
    ) -> Result:
        """Quality over examples, in their order; `quick` is the evaluation within a run, which may leave rows out
        where each costs much."""
        raise NotImplementedError


def objectives() -> dict[str, type[Objective]]:
    """Every objective, by name: the classes in the files of this folder."""
    return classes_in("graft.objectives", Objective, {"base"})


def read_objective(given: Any, source: str = "recipe") -> Objective:
    """An objective from its name or from a mapping with `name` and settings."""
    return read_choice(given, Objective, objectives(), source)
