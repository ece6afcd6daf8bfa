"""What GRPO and PPO share: prompts, answers that the policy draws, rewards, and what is watched."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr, field_validator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from graft.alignment.reference import (
    as_evaluated,
    reference,
    refuse_in_place,
    require_reference,
    start_from,
    starts_as_reference,
)
from graft.alignment.rewards import DEFAULT, Rewards, RewardSources, Said
from graft.alignment.rollouts import Prompt, Rollout, draw, longest, packed, unpacked
from graft.data.dialogue import Dialogue
from graft.data.load import DataConfig, Splits, Unit, load_splits
from graft.generate import answer_all
from graft.model import Base
from graft.objectives.answers import answer_logps
from graft.objectives.base import Report, Result, Say, silent
from graft.objectives.causal import row_figures
from graft.objectives.templated import Templated
from graft.parts.base import Adapter
from graft.rendering.supervise import supervise
from graft.routing import Entry


class Online(Templated):
    """A policy that learns from rewards of its own answers.

    Quality is the reward of greedy answers: the mean share of the largest sum where every source is a scorer, else the
    mean of σ(reward).
    """

    unit: ClassVar[Unit] = "dialogue"
    max_length: ClassVar[int] = 1024
    compiles: ClassVar[bool] = False
    patience: ClassVar[int] = 10
    aliases: ClassVar[dict[str, str]] = {"max_completion_length": "max_new_tokens", "reward_funcs": "rewards"}

    rewards: RewardSources = DEFAULT
    """What answers earn: scorers by name (task, length:20-60, regex:PATTERN, json_valid, …), `{run: runs/reward}`,
    `{file: mine.py, function: reward}`, each with a `weight`; they are added up."""

    init: str | None = None
    """A run to start from, such as a supervised one: its adapter is trained on, and is the reference. When left out,
    a fresh adapter is trained against the plain base."""

    max_new_tokens: int = Field(default=48, ge=1, le=8192)
    """Longest answer."""

    temperature: float = Field(default=1.0, gt=0, le=10)
    """Scores are divided by it when answers are drawn."""

    clip: float = Field(default=0.2, gt=0, lt=1)
    """How far the probability of a token may move from where it was drawn, as a share, before nothing pulls it on."""

    unended_penalty: float = Field(default=0.0, ge=0)
    """What an answer loses that max_new_tokens cuts off."""

    reward_seconds: float = Field(default=10.0, gt=0)
    """Time that a function of yours may take for one answer."""

    _earned: Rewards | None = PrivateAttr(default=None)
    _prompts: Sequence[Prompt] = PrivateAttr(default=())
    _rollouts: list[Rollout] = PrivateAttr(default_factory=list)
    _watched: dict[str, float] = PrivateAttr(default_factory=dict)
    _sums: dict[str, list[float]] = PrivateAttr(default_factory=dict)
    _say: Say = PrivateAttr(default_factory=lambda: silent)  # pydantic takes a bare function for a descriptor

    @field_validator("rewards", mode="before")
    @classmethod
    def _one_reward(cls, given: Any) -> Any:
        """`rewards: task` without a list."""
        return [given] if isinstance(given, str | dict) else given

    @property
    def metric(self) -> str:
        """What earns."""
        return self.rewards[0].scorer or "reward" if len(self.rewards) == 1 else "reward"

    def load(self, data: DataConfig) -> Splits:
        """The rows, and a look at what rewards them: a reward model that may be no better than a coin is refused."""
        found = Rewards(self.rewards, self.reward_seconds).check()
        splits = load_splits(data, self.unit)
        return replace(splits, sha256={**splits.sha256, **found})

    def examples(
        self,
        rows: Sequence[Dialogue],
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        max_length: int,
        say: Say = silent,
    ) -> list[Prompt]:
        """Prompts as ids; the file's own answers stay with them for scorers that compare."""
        kept, told = supervise(self.renderer(tokenizer), rows, max_length, "last")
        for line in told.lines():
            say(line)
        told.check()
        return [Prompt(row, rows[row.row]) for row in kept]

    def prepare(self, base: Base, adapter: Adapter, labels: tuple[str, ...]) -> None:
        """The values to start from, and no dropout."""
        refuse_in_place(adapter, "a reference")
        if self.init is not None:
            start_from(self.init, base, adapter)
        as_evaluated(base.model, adapter)

    def begin(self, base: Base, adapter: Adapter, examples: Sequence[Prompt], say: Say = silent) -> None:
        """Nothing is left of an earlier run, and the policy has to be the reference exactly."""
        self._say, self._rollouts, self._watched, self._sums = say, [], {}, {}
        self._prompts = examples
        if starts_as_reference(adapter, self.init):
            with torch.no_grad():
                ways = (adapter.name, self.reference(base))
                mine, theirs = (answer_logps(base, examples[:2], way)[0] for way in ways)
            require_reference(mine, theirs, examples[0].place)

    def memory(self) -> dict[str, Tensor]:
        """What is watched of the answers in hand, and these where they are learned from again."""
        found = {f"watched.{name}": torch.tensor(value, dtype=torch.double) for name, value in self._watched.items()}
        if self.updates > 1:
            places = {id(prompt): number for number, prompt in enumerate(self._prompts)}
            found |= {f"rollouts.{name}": tensor for name, tensor in packed(self._rollouts, places).items()}
        return found

    def recall(self, kept: Mapping[str, Tensor]) -> None:
        """The answers in hand, and what is watched of them."""
        self._watched = {name: float(value) for name, value in _below("watched.", kept).items()}
        self._rollouts = unpacked(_below("rollouts.", kept), self._prompts)

    def collect(self, base: Base, examples: Sequence[Prompt], entry: Entry, size: int, again: bool) -> list[Rollout]:
        """The answers of the drawing before with `again`, else new ones with all that the loss needs of them."""
        self._sums = {}  # what a rehearsal left
        if not again:
            self._watched = {}
            self._rollouts = self.judged(base, examples, entry, size)
        return self._rollouts

    def judged(self, base: Base, prompts: Sequence[Prompt], entry: Entry, size: int) -> list[Rollout]:
        """Answers that the policy draws to prompts, `size` at a time, with what each earned."""
        raise NotImplementedError

    def longest_answer(self, examples: Sequence[Prompt]) -> int:
        """`max_new_tokens`."""
        return self.max_new_tokens

    def reference(self, base: Base) -> Entry:
        """The route that the policy is held to."""
        return reference(self.init, base)

    def earned(self, base: Base, rollouts: Sequence[Rollout]) -> list[float]:
        """The reward of each answer, and what is to be watched of them."""
        assert base.tokenizer is not None
        said = [
            Said(self._finished(base, one.ids[:-1] if one.ended else one.ids), one.prompt,
                 str(base.tokenizer.decode(one.ids[one.prompt :], skip_special_tokens=True)), one.asked.dialogue)
            for one in rollouts
        ]  # fmt: skip
        total, means = self._source(base).of(base, said)
        total = [
            value - (0.0 if one.ended else self.unended_penalty) for value, one in zip(total, rollouts, strict=True)
        ]
        self._watched |= {"reward": sum(total) / len(total)}
        if len(means) > 1:
            self._watched |= {f"reward {label}": value for label, value in means.items()}
        self._watched |= {
            "length": sum(one.drawn for one in rollouts) / len(rollouts),
            "ended": sum(one.ended for one in rollouts) / len(rollouts),
        }
        return total

    def _source(self, base: Base) -> Rewards:
        if self._earned is None:
            self._earned = Rewards(self.rewards, self.reward_seconds)
        self._earned.template = self.template(base.tokenizer)
        return self._earned

    def drawn(self, base: Base, prompts: Sequence[Prompt], entry: Entry, size: int) -> list[Rollout]:
        """An answer to each prompt; the model is left in training mode."""
        assert base.tokenizer is not None
        found = draw(
            base, prompts, entry, temperature=self.temperature, max_new_tokens=self.max_new_tokens,
            stop_ids=self.renderer(base.tokenizer).stop_ids, size=size,
        )  # fmt: skip
        base.model.train()
        return found

    @torch.no_grad()
    def known(self, base: Base, rollouts: Sequence[Rollout], entry: Entry, size: int) -> Iterator[Tensor]:
        """log π of each answer's tokens under a route, [tokens] each."""
        for start in range(0, len(rollouts), size):
            part = rollouts[start : start + size]
            values, _ = answer_logps(base, part, entry, self.temperature)
            yield from values.split([one.drawn for one in part])

    def note(self, name: str, values: Tensor, times: Tensor | None = None) -> None:
        """Keep the sum and the number of values, each counted so many times, for the mean that is watched."""
        counted = torch.ones_like(values) if times is None else times
        total = self._sums.setdefault(name, [0.0, 0.0])
        total[0] += float((values.detach() * counted).sum())
        total[1] += float(counted.sum())

    def after_step(self, step: int) -> dict[str, float]:
        """Means over the step of what its answers earned and how the policy moved."""
        sums, self._sums = self._sums, {}
        return self._watched | {name: total / max(1.0, count) for name, (total, count) in sums.items()}

    def imagine(self, examples: Sequence[Prompt]) -> list[Any]:
        """Answers of the most tokens there can be."""
        return [one for prompt in examples for one in longest(prompt, self.max_new_tokens, self.answers_each)]

    @property
    def answers_each(self) -> int:
        """Answers that are drawn to each prompt."""
        return 1

    def evaluate(
        self,
        base: Base,
        examples: Sequence[Prompt],
        entry: Entry,
        batch_size: int,
        report: Report | None = None,
        quick: bool = False,
    ) -> Result:
        """The rewards of greedy answers, and the loss of the file's own answers beside them."""
        assert base.tokenizer is not None
        figures = row_figures(base, examples, entry, batch_size)
        asked = list(examples)[:64] if quick else list(examples)
        stop = self.renderer(base.tokenizer).stop_ids
        answers = answer_all(
            base,
            [list(example.ids[: example.prompt]) for example in asked],
            entry,
            batch_size=batch_size,
            max_new_tokens=self.max_new_tokens,
            stop_ids=stop,
            progress=None if report is None else lambda share: report("answering", share),
        )
        texts = [str(base.tokenizer.decode(answer.ids, skip_special_tokens=True)) for answer in answers]
        said = [
            Said(self._finished(base, [*one.ids[: one.prompt], *answer.ids]), one.prompt, text, one.dialogue)
            for one, answer, text in zip(asked, answers, texts, strict=True)
        ]
        source = self._source(base)
        earned, means = source.of(base, said)
        correct = [source.share(value) for value in earned]
        further = {
            "reward": sum(earned) / len(earned),
            "perplexity": figures.perplexity,
            "ended": sum(answer.ended for answer in answers) / len(answers),
            "length": sum(len(answer.ids) for answer in answers) / len(answers),
        }
        if len(means) > 1:
            further |= {f"reward {label}": value for label, value in means.items()}
        samples = [
            {"place": one.place, "prompt": one.dialogue.prompt[-1].content, "reference": one.dialogue.answer,
             "answer": text, "ended": answer.ended, "score": value}
            for one, text, answer, value in zip(asked, texts, answers, earned, strict=True)
        ]  # fmt: skip
        return Result(sum(correct) / len(correct), figures.mean_loss, correct, further, samples)

    def _finished(self, base: Base, ids: Sequence[int]) -> list[int]:
        """An answer with the ending that reward models have read behind every answer, also one that was cut off: in
        the middle of a word, or a token too early, they have not learned to judge."""
        assert base.tokenizer is not None
        return [*ids, *self.renderer(base.tokenizer).ending]


def _below(prefix: str, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in kept.items() if name.startswith(prefix)}
