"""Trials of a comparison run in this process."""

from collections.abc import Callable

from graft.compare import Trial
from graft.errors import GraftError
from graft.run import execute


class Trials:
    """Runs trials in this process, which saves the 5 s that a new one needs to import torch; notes their names."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, trial: Trial, tell: Callable[[str, float], None]) -> str | None:
        self.names.append(trial.name)
        try:
            execute(trial.recipe, trial.folder, tell)
        except GraftError as error:
            return str(error)
        return None
