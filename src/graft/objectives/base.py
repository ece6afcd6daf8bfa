"""What an objective is: rows into examples, examples into a loss, examples into a quality."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from graft.config import Config, classes_in, read_choice
from graft.data.load import Row
from graft.model import Base
from graft.parts.base import Adapter
from graft.routing import Entry, Route

Report = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0 to 1."""


@dataclass(frozen=True)
class Loss:
    """A sum over a batch and its weight, so that accumulation over uneven batches is exact: total / weight
    is the mean.
    """

    total: Tensor
    weight: float


@dataclass(frozen=True)
class Example:
    """One row as ids. `place` is its file and line."""

    input_ids: list[int]
    token_type_ids: list[int] | None
    target: int
    place: str

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Result:
    """An evaluation: the mean quality in [0, 1], the mean loss, and whether each row was right (1) or not (0)."""

    quality: float
    loss: float
    correct: list[int]


class Objective(Config):
    """What a run optimizes. Subclasses set `name` and `metric` and define the methods."""

    name: ClassVar[str]
    metric: ClassVar[str]
    """What `Result.quality` is called."""

    def examples(self, rows: Sequence[Row], base: Base, labels: Sequence[str], max_length: int) -> list[Example]:
        """Rows as token ids, at most `max_length` long. Raises `DataError` for a row that would train nothing."""
        raise NotImplementedError

    def prepare(self, base: Base, adapter: Adapter, labels: tuple[str, ...]) -> None:
        """Give the adapter its head, and leave out of training what this objective never uses."""
        raise NotImplementedError

    def weight(self, examples: Sequence[Example]) -> float:
        """The weight that the loss of these examples will have, known before the forward pass."""
        raise NotImplementedError

    def loss(self, base: Base, examples: Sequence[Example], route: Entry | Route) -> Loss:
        """The summed loss of a batch."""
        raise NotImplementedError

    def evaluate(
        self,
        base: Base,
        examples: Sequence[Example],
        entry: Entry,
        batch_size: int,
        report: Report | None = None,
    ) -> Result:
        """Quality over examples, in their order."""
        raise NotImplementedError


def objectives() -> dict[str, type[Objective]]:
    """Every objective, by name: the classes in the files of this folder."""
    return classes_in("graft.objectives", Objective, {"base"})


def read_objective(given: Any, source: str = "recipe") -> Objective:
    """An objective from its name or from a mapping with `name` and settings."""
    return read_choice(given, Objective, objectives(), source)
