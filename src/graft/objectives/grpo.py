"""GRPO: several answers to each prompt, each judged against the others (Shao et al. 2024, arXiv 2402.03300)."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from graft.alignment import losses
from graft.alignment.logprobs import row_counts
from graft.alignment.rewards import Rewards
from graft.alignment.rollouts import Prompt, Rollout, distinct, joined, often
from graft.errors import GuardError
from graft.model import Base
from graft.objectives.answers import answer_logps
from graft.objectives.base import Loss, Say, silent
from graft.objectives.online import Online
from graft.parts.base import Adapter
from graft.routing import Entry, Route

_BY_STEP = 10
"""Steps after which some group must have had answers of different rewards."""


class Grpo(Online):
    """Answers that earn more than the others to the same prompt become likelier. No value model is needed."""

    name: ClassVar[str] = "grpo"
    aliases: ClassVar[dict[str, str]] = Online.aliases | {"epsilon": "clip", "epsilon_high": "clip_high"}

    num_generations: int = Field(default=8, ge=2, le=256)
    """Answers to each prompt. A step has as many prompts as its rows."""

    num_iterations: int = Field(default=1, ge=1, le=16)
    """Optimizer steps over the answers of one drawing."""

    beta: float = Field(default=0.04, ge=0)
    """Weight of the distance (KL) to the reference; 0 leaves it out."""

    clip_high: float | None = Field(default=None, gt=0)
    """Another limit for probabilities that rise (DAPO); as `clip` when left out."""

    scale_rewards: bool = True
    """Divide by the standard deviation of a group's rewards."""

    loss_type: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    """What the mean is over: all tokens of the step (dapo), first those of each answer (grpo), or as if every answer
    had max_new_tokens (dr_grpo)."""

    most_silent: float = Field(default=0.8, gt=0, le=1)
    """Share of groups with equal rewards, over ten steps, above which it is said that most answers teach nothing."""

    _silent: list[float] = PrivateAttr(default_factory=list)
    _alike: float = PrivateAttr(default=0.0)
    _told: bool = PrivateAttr(default=False)

    @property
    def updates(self) -> int:
        """`num_iterations`."""
        return self.num_iterations

    @property
    def answers_each(self) -> int:
        """`num_generations`."""
        return self.num_generations

    def begin(self, base: Base, adapter: Adapter, examples: Sequence[Prompt], say: Say = silent) -> None:
        """Nothing is left of an earlier run."""
        super().begin(base, adapter, examples, say)
        self._silent, self._alike, self._told = [], 0.0, False

    def memory(self) -> dict[str, Tensor]:
        """The groups without a signal as well."""
        groups = torch.tensor([*self._silent, self._alike], dtype=torch.double)
        return super().memory() | {"silent": groups, "told": torch.tensor(self._told)}

    def recall(self, kept: Mapping[str, Tensor]) -> None:
        """The groups without a signal as well."""
        super().recall(kept)
        *self._silent, self._alike = kept["silent"].tolist()
        self._told = bool(kept["told"])

    def judged(self, base: Base, prompts: Sequence[Prompt], entry: Entry, size: int) -> list[Rollout]:
        """Answers with what each is better than its group, and the log-probabilities that the loss needs."""
        asked = [prompt for prompt in prompts for _ in range(self.num_generations)]
        rollouts = self.drawn(base, asked, entry, size)
        earned = torch.tensor(self.earned(base, rollouts)).view(-1, self.num_generations)
        self._judge_groups(earned)
        advantages = losses.group_advantages(earned, self.scale_rewards).flatten()
        for one, advantage in zip(rollouts, advantages, strict=True):
            one.advantages = advantage.expand(one.drawn)
        rollouts = distinct(rollouts)
        if self.num_iterations > 1:
            for one, values in zip(rollouts, self.known(base, rollouts, entry, size), strict=True):
                one.old = values
        if self.beta:
            for one, values in zip(rollouts, self.known(base, rollouts, self.reference(base), size), strict=True):
                one.reference = values
        return rollouts

    def _judge_groups(self, earned: torch.Tensor) -> None:
        """Count the groups in which all rewards are equal, and say or stop where they are too many."""
        equal = (earned == earned[:, :1]).all(dim=1)
        self._silent.append(float(equal.float().mean()))
        self._watched |= {"reward_std": float(earned.std(dim=1).mean()), "silent": self._silent[-1]}
        if bool(equal.any()):
            self._alike = float(earned[equal, 0].mean())
        if len(self._silent) < _BY_STEP:
            return
        if len(self._silent) == _BY_STEP and min(self._silent) == 1:
            raise GuardError(
                f"in the first {_BY_STEP} steps every group of {self.num_generations} answers had equal rewards, the "
                f"last {self._alike:g}: there is nothing to learn from",
                f"likely {self._cause()}; start from a supervised run with objective.init, raise the temperature, or "
                "give a reward that differs between answers",
            )
        self._tell_silent()

    def _tell_silent(self) -> None:
        """Say once, with the likely cause, where too many of the last groups taught nothing."""
        recent = self._silent[-_BY_STEP:]
        share = sum(recent) / max(1, len(recent))
        if share > self.most_silent and not self._told:
            self._told = True
            self._say(
                f"{share:.0%} of the groups of the last {len(recent)} steps had equal rewards and taught nothing: "
                f"the last earned {self._alike:g}; likely {self._cause()}"
            )

    def _cause(self) -> str:
        """Why the answers to a prompt all earn the same, by what they earn."""
        earned = Rewards(self.rewards, self.reward_seconds)
        share = earned.share(self._alike) if earned.bounded else 0.5
        if share > 0.99:
            return "the policy is always right"
        return "the task is too hard for the policy" if share < 0.01 else "the reward hardly differs between answers"

    def finish(self, base: Base, adapter: Adapter) -> None:
        """A run of fewer steps than are judged otherwise is judged at its end."""
        self._tell_silent()

    def weight(self, examples: Sequence[Rollout]) -> float:
        """The number of drawn tokens, or of answers."""
        if self.loss_type == "dapo":
            return float(sum(one.drawn * one.times for one in examples))
        return float(sum(one.times for one in examples) * (self.max_new_tokens if self.loss_type == "dr_grpo" else 1))

    def loss(self, base: Base, examples: Sequence[Rollout], route: Entry | Route) -> Loss:
        """The clipped surrogate and the distance to the reference, summed over tokens."""
        assert not isinstance(route, Route)
        logps, targets = answer_logps(base, examples, route, self.temperature)
        old = joined([one.old for one in examples], base.device) if self.num_iterations > 1 else None
        advantages = joined([one.advantages for one in examples], base.device)
        assert advantages is not None
        before = logps.detach() if old is None else old
        each = losses.clipped_policy(logps, before, advantages, self.clip, self.clip_high)
        times = often(examples, base.device)
        reference = joined([one.reference for one in examples], base.device) if self.beta else None
        if reference is not None:
            distance = losses.kl_estimate(logps, reference)
            each = each + self.beta * distance
            self.note("kl", distance, times)
        self.note("entropy", -logps, times)  # in the mean of drawn tokens -log π is the entropy
        if self.loss_type == "grpo":
            counts = row_counts(targets)
            each = each / counts.repeat_interleave(counts)
        return Loss((each * times).sum(), self.weight(examples))
