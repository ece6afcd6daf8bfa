"""What an answer earns: scorers by name, trained reward models, functions in a local file, weighted sums of them."""

import importlib.util
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, WithJsonSchema, model_validator

from graft.alignment.reference import adapter_folder
from graft.config import Config
from graft.data.batch import pad
from graft.data.dialogue import Dialogue
from graft.errors import GuardError, RecipeError, UsageError
from graft.files import sha256_of
from graft.limits import time_limit
from graft.methods import store
from graft.model import Base
from graft.parts.head import scores
from graft.scorers import Scorer, read_scorer

LENGTH = "length:"
_ROWS = 16
"""Answers that a reward model reads at a time."""


class RewardSource(Config):
    """One source of rewards: `scorer`, `run`, or `file` with `function`."""

    aliases: ClassVar[dict[str, str]] = {"name": "scorer"}

    scorer: str | None = None
    """A scorer: task, exact_match, contains, json_valid, regex:PATTERN, …, or length:LOW-HIGH, which gives 1 to an
    answer of so many words and less the farther it is from them."""

    run: str | None = None
    """The folder of a run with `objective: reward` on the same base."""

    file: str | None = None
    """A Python file of yours. It is run, with all rights that you have."""

    function: str = "reward"
    """The function in `file`: reward(prompt, answer, row) gives a number; prompt and answer are texts, row is a mapping
    with `reference`, `task` and the row's further fields."""

    weight: float = 1.0
    """What its number counts in the sum."""

    @model_validator(mode="before")
    @classmethod
    def _read_name(cls, given: Any) -> Any:
        return {"scorer": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one_source(self) -> "RewardSource":
        if sum(part is not None for part in (self.scorer, self.run, self.file)) != 1:
            raise ValueError("a reward has one of scorer, run and file")
        if self.scorer is not None:
            try:
                _scorer(self.scorer)
            except (RecipeError, UsageError) as error:
                raise ValueError(str(error)) from None
        return self

    @property
    def label(self) -> str:
        """What it is called in figures and errors."""
        return self.scorer or (f"{self.file}:{self.function}" if self.file else str(self.run))

    @property
    def bounded(self) -> bool:
        """Whether its numbers are within 0 and 1."""
        return self.scorer is not None


@dataclass(frozen=True)
class Said:
    """An answer to be rewarded: its ids behind its prompt's, the text, and the row that was asked."""

    ids: Sequence[int]
    prompt: int
    text: str
    row: Dialogue


Call = Callable[[str, str, dict[str, Any]], Any]


@dataclass
class Rewards:
    """The weighted sum of some sources, for one run."""

    sources: Sequence[RewardSource]
    seconds: float
    """Time that one call of a function may take."""
    template: str | None = None
    """The policy's chat template, which reward models have to share."""
    functions: dict[str, Call] = field(default_factory=dict)

    @property
    def bounded(self) -> bool:
        """Whether `share` is a share: all sources are within 0 and 1 and count positively."""
        return all(source.bounded and source.weight > 0 for source in self.sources)

    def share(self, total: float) -> float:
        """A sum of rewards as a quality in [0, 1]: its share of the largest one possible, or σ of it."""
        if self.bounded:
            return min(1.0, max(0.0, total / sum(source.weight for source in self.sources)))
        return 1 / (1 + math.exp(-max(-700.0, min(700.0, total))))

    def check(self) -> dict[str, str]:
        """Look at files and runs before anything is trained; the sha256 of each.

        Raises `UsageError` for a reward model that is not known to be better than a coin.
        """
        found = {}
        for source in self.sources:
            if source.run is not None:
                found[f"reward {source.run}"] = _check_run(source.run)
            if source.file is not None:
                self._function(source)
                found[f"reward {source.file}"] = sha256_of(Path(source.file).expanduser())
        return found

    def of(self, base: Base, said: Sequence[Said]) -> tuple[list[float], dict[str, float]]:
        """The sum for each answer, and the mean of each source. Raises `GuardError` that names source and sample."""
        total = [0.0] * len(said)
        means = {}
        for number, source in enumerate(self.sources):
            given = self._learned(base, number, source, said) if source.run else self._called(source, said)
            total = [one + source.weight * value for one, value in zip(total, given, strict=True)]
            means[source.label] = sum(given) / len(given)
        return total, means

    def _called(self, source: RewardSource, said: Sequence[Said]) -> list[float]:
        if source.scorer is not None:
            scorer = _scorer(source.scorer)
            return scorer.items([one.text for one in said], [one.row for one in said])
        call = self._function(source)
        return [self._limited(source, call, one) for one in said]

    def _limited(self, source: RewardSource, call: Call, one: Said) -> float:
        asked = one.row.prompt[-1].content if one.row.prompt else ""
        row = {**one.row.fields, "reference": one.row.answer, "task": one.row.task, "id": one.row.id}
        where = f"reward {source.label}: for the answer {_short(one.text)} to {one.row.place}"
        try:
            with time_limit(self.seconds):
                value = call(asked, one.text, row)
        except TimeoutError:
            raise GuardError(f"{where} it took more than {self.seconds:g} s", "make it faster, or raise reward_seconds"
                             ) from None  # fmt: skip
        except (Exception, SystemExit) as error:
            raise GuardError(f"{where} it raised {type(error).__name__}: {error}", "correct the function") from error
        try:
            number = float(value) if isinstance(value, Real) else math.nan  # numpy's numbers are Real, its arrays not
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            shown = f"{value!r}"[:60]
            raise GuardError(f"{where} it gave {shown}, which is no finite number", "correct the function")
        return number

    def _function(self, source: RewardSource) -> Call:
        if source.label not in self.functions:
            self.functions[source.label] = _read_function(str(source.file), source.function)
        return self.functions[source.label]

    @torch.no_grad()
    def _learned(self, base: Base, number: int, source: RewardSource, said: Sequence[Said]) -> list[float]:
        """What a reward model gives, less its mean and over its deviation on the pairs it was tested on."""
        name = f"reward_{number}"
        folder = adapter_folder(str(source.run))
        if name not in base.adapters:
            store.load(base, folder, name).requires_grad_(False)
            self._check_template(str(source.run), folder)
        figures = _report(str(source.run)).get("figures", {})
        mean, deviation = float(figures.get("reward_mean", 0.0)), float(figures.get("reward_std", 1.0))
        filler = base.config.pad_token_id or 0
        found: list[float] = []
        for start in range(0, len(said), _ROWS):
            rows = said[start : start + _ROWS]
            batch = {
                "input_ids": pad([one.ids for one in rows], filler, base.device),
                "attention_mask": pad([[1] * len(one.ids) for one in rows], 0, base.device),
            }
            found += scores(base, batch, name)[:, 0].float().tolist()
        for value, one in zip(found, said, strict=True):
            if not math.isfinite(value):
                raise GuardError(f"reward {source.run}: {value} for {one.row.place}", "train the reward model again")
        return [(value - mean) / max(deviation, 1e-6) for value in found]

    def _check_template(self, run: str, folder: Path) -> None:
        if store.template_of(folder) != self.template:
            raise UsageError(
                f"reward {run}: it was trained through another chat template than the policy's",
                "give both runs the same chat_template",
            )


def _scorer(name: str) -> Scorer:
    if not name.startswith(LENGTH):
        return read_scorer(name)
    found = re.fullmatch(r"length:(\d{1,5})-(\d{1,5})", name)
    low, high = (int(part) for part in found.groups()) if found else (1, 0)
    if low > high or high < 1:
        raise RecipeError(f"scorer {name}: give the fewest and the most words, as in length:20-60")

    def score(answer: str, row: Dialogue) -> float:
        words = len(answer.split())
        away = max(low - words, words - high, 0)
        return max(0.0, 1 - away / high)

    return Scorer(name, score, reads_reference=False)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:59] + "…")


def _report(run: str) -> dict[str, Any]:
    path = Path(run).expanduser() / "report.json"
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError(
            f"reward {run}: no report.json that can be read, so it is not known how good it is",
            "give the folder of a finished run with `objective: reward`",
        ) from None
    return report


def _check_run(run: str) -> str:
    """The sha256 of a reward model's tensors."""
    folder, report = adapter_folder(run), _report(run)
    if report.get("metric") != "pair accuracy":
        raise UsageError(f"reward {run}: a run with the metric {report.get('metric')!r}, not a reward model",
                         "give a run with `objective: reward`")  # fmt: skip
    low, quality, high = (float(report[key]) for key in ("quality_low", "quality", "quality_high"))
    if low <= 0.5:
        raise UsageError(
            f"reward {run}: it is right in {quality:.1%} of the held-out pairs ({low:.1%} to {high:.1%}), which may be "
            "no better than a coin",
            "train it longer, on more or clearer pairs, or test it on more of them",
        )
    return sha256_of(folder / "adapter_model.safetensors")


def _read_function(file: str, name: str) -> Call:
    """A function of a local Python file. Raises `UsageError` where there is none."""
    path = Path(file).expanduser()
    if path.suffix != ".py" or not path.is_file():
        raise UsageError(f"reward {file}: no Python file of this name here", "give the path of a .py file")
    described = importlib.util.spec_from_file_location(f"graft_reward_{path.stem}", path)
    assert described is not None
    assert described.loader is not None
    module = importlib.util.module_from_spec(described)
    try:
        described.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"reward {file}: it cannot be run: {type(error).__name__}: {error}", "correct it") from error
    call = getattr(module, name, None)
    if not callable(call):
        raise UsageError(f"reward {file}: no function {name!r} in it", "define it, or give objective.rewards.function")
    found: Call = call
    return found


_NAMED: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "object"}]}
RewardSources = Annotated[
    list[RewardSource],
    WithJsonSchema({"anyOf": [{"type": "array", "items": _NAMED, "minItems": 1}, {"type": "string"}]}),
]
"""What `rewards:` of a recipe is."""

DEFAULT: Any = Field(default_factory=lambda: [RewardSource(scorer="task")], min_length=1)
"""The checker of the starter task that made the rows."""
