"""A reward model: one number for an answer, higher for the better one of two."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from graft.alignment import losses
from graft.alignment.pairs import Pair, Side, read_answers, sides
from graft.alignment.reference import as_evaluated
from graft.data.batch import evaluation_batches
from graft.data.dialogue import Graded, Preference
from graft.data.load import Unit
from graft.data.pairs import graded_pairs
from graft.errors import DataError
from graft.model import Base
from graft.objectives.base import Loss, Report, Result, Say, silent
from graft.objectives.causal import collate
from graft.objectives.templated import Templated
from graft.parts.base import Adapter
from graft.parts.head import TaskHead, hold_unused, scores
from graft.routing import Entry, Route


class Reward(Templated):
    """Learns from pairs which of two answers is the better, as a number for each (Bradley-Terry).

    Quality is the share of held-out pairs whose better answer gets the higher number; the report has its interval.
    """

    name: ClassVar[str] = "reward"
    unit: ClassVar[Unit] = "preference"
    max_length: ClassVar[int] = 512
    speaks: ClassVar[bool] = False

    margin: float = Field(default=0.0, ge=0)
    """How far apart the two rewards should be for each point that the ratings of a pair differ by; pairs without
    ratings count as one point."""

    center_rewards_coefficient: float = Field(default=0.01, ge=0)
    """Weight of the squared sum of a pair's rewards, which keeps their mean near 0."""

    @property
    def metric(self) -> str:
        """Share of pairs that are right."""
        return "pair accuracy"

    def examples(
        self,
        rows: Sequence[Preference | Graded],
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        max_length: int,
        say: Say = silent,
    ) -> list[Pair]:
        """Pairs as ids; single answers are paired with one of the other kind to the same prompt."""
        pairs = [row for row in rows if isinstance(row, Preference)]
        alone = [row for row in rows if isinstance(row, Graded)]
        if alone:
            made = graded_pairs(alone)
            say(f"{len(alone):,} graded answers give {len(made):,} pairs of a good and a bad answer to one prompt")
            pairs += made
        if not pairs:
            raise DataError(f"none of {len(rows):,} rows gives a pair", "a prompt needs a good and a bad answer")
        kept = read_answers(pairs, self.renderer(tokenizer), max_length, say)
        return [pair for pair in kept if isinstance(pair, Pair)]

    def prepare(self, base: Base, adapter: Adapter, labels: tuple[str, ...]) -> None:
        """A head that gives one number from the answer's last token; no dropout."""
        adapter.head = TaskHead.for_base(base, ("reward",), "last", dropout=0.0)
        as_evaluated(base.model, adapter)
        hold_unused(base, adapter)

    def weight(self, examples: Sequence[Pair]) -> float:
        """The number of pairs."""
        return float(len(examples))

    def loss(self, base: Base, examples: Sequence[Pair], route: Entry | Route) -> Loss:
        """Bradley-Terry, summed over the pairs."""
        chosen, rejected = rewards_of(base, sides(examples), route).chunk(2)
        return Loss(self._losses(examples, chosen, rejected).sum(), self.weight(examples))

    def _losses(self, examples: Sequence[Pair], chosen: Tensor, rejected: Tensor) -> Tensor:
        gaps = [1.0 if example.row.gap is None else example.row.gap for example in examples]
        margins = self.margin * torch.tensor(gaps, device=chosen.device)
        return losses.bradley_terry(chosen, rejected, margins, self.center_rewards_coefficient)

    @torch.no_grad()
    def evaluate(
        self,
        base: Base,
        examples: Sequence[Pair],
        entry: Entry,
        batch_size: int,
        report: Report | None = None,
        quick: bool = False,
    ) -> Result:
        """Pair accuracy; equal numbers count half. Mean and deviation of the numbers are what a policy's rewards are
        scaled by. The plain base has no head, and so is as good as a coin.
        """
        if entry is None:
            return Result(0.5, 0.6931, [0.5] * len(examples))
        numbers = torch.zeros(len(examples), 2)
        loss = 0.0
        batches = evaluation_batches([len(example) for example in examples], max(1, batch_size // 2))
        for number, rows in enumerate(batches):
            chosen = [examples[row] for row in rows]
            pair = torch.stack(rewards_of(base, sides(chosen), entry).chunk(2), dim=1)
            loss += float(self._losses(chosen, pair[:, 0], pair[:, 1]).sum())
            numbers[rows] = pair.float().cpu()
            if report:
                report("evaluating", (number + 1) / len(batches))
        gap = numbers[:, 0] - numbers[:, 1]
        correct = (torch.sign(gap) / 2 + 0.5).tolist()
        figures = {
            "margin": float(gap.mean()),
            "reward_mean": float(numbers.mean()),
            "reward_std": float(numbers.std(unbiased=False)),
        }
        return Result(sum(correct) / len(correct), loss / len(correct), correct, figures)


def rewards_of(base: Base, answers: Sequence[Side], route: Entry | Route) -> Tensor:
    """The number of each answer, fp32 [answers]."""
    batch, _ = collate(base, answers)
    return scores(base, batch, route)[:, 0].float()
