"""PPO with a value head on the policy's own states (Schulman et al. 2017; Ziegler et al. 2019, arXiv 1909.08593)."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor
from torch.nn import functional as F

from graft.alignment import losses
from graft.alignment.logprobs import token_logps
from graft.alignment.rollouts import Prompt, Rollout, joined
from graft.model import Base
from graft.objectives.base import Loss, Say, silent
from graft.objectives.causal import collate
from graft.objectives.online import Online
from graft.parts.attach import adapter_of, hidden_states
from graft.parts.base import Adapter
from graft.parts.head import TaskHead
from graft.routing import Entry, Route

_STEADY = 0.2
"""The weight of the KL changes by this share of its error at most (Ziegler et al. 2019)."""


class Ppo(Online):
    """Every token is judged by what it earns more than the value head expected, at a bounded distance to the reference.

    The value head is part of the policy's adapter while it trains, and is dropped at the end.
    """

    name: ClassVar[str] = "ppo"
    aliases: ClassVar[dict[str, str]] = Online.aliases | {
        "cliprange": "clip",
        "cliprange_value": "clip_value",
        "kl_coef": "init_kl_coef",
        "target": "kl_target",
    }

    num_ppo_epochs: int = Field(default=4, ge=1, le=32)
    """Optimizer steps over the answers of one drawing, one answer to each prompt."""

    init_kl_coef: float = Field(default=0.05, ge=0)
    """What a nat of log π - log π_ref costs at first."""

    kl_target: float | None = Field(default=6.0, gt=0)
    """Nats of KL in an answer that are aimed at: farther away a nat costs more, nearer less; null keeps its price."""

    kl_horizon: int = Field(default=1000, ge=1)
    """Answers over which that price follows."""

    gamma: float = Field(default=1.0, gt=0, le=1)
    """What a later token's reward counts, for each token between."""

    lam: float = Field(default=0.95, ge=0, le=1)
    """λ of generalized advantages: 1 believes the rewards, 0 the value head."""

    vf_coef: float = Field(default=0.1, ge=0)
    """Weight of the value head's loss."""

    clip_value: float = Field(default=0.2, gt=0)
    """How far a value may move from where it was when the answer was drawn."""

    _coef: float = PrivateAttr(default=0.0)

    @property
    def updates(self) -> int:
        """`num_ppo_epochs`."""
        return self.num_ppo_epochs

    def prepare(self, base: Base, adapter: Adapter, labels: tuple[str, ...]) -> None:
        """The values to start from, no dropout, and a value head that expects 0 everywhere at first."""
        super().prepare(base, adapter, labels)
        head = TaskHead.for_base(base, ("value",), "last", dropout=0.0)
        torch.nn.init.zeros_(head.out.weight)
        adapter.head = head

    def begin(self, base: Base, adapter: Adapter, examples: Sequence[Prompt], say: Say = silent) -> None:
        """Nothing is left of an earlier run."""
        super().begin(base, adapter, examples, say)
        self._coef = self.init_kl_coef

    def finish(self, base: Base, adapter: Adapter) -> None:
        """The value head goes: what is left is a language model."""
        adapter.head = None

    def memory(self) -> dict[str, Tensor]:
        """The price of KL as well."""
        return super().memory() | {"kl_coef": torch.tensor(self._coef, dtype=torch.double)}

    def recall(self, kept: Mapping[str, Tensor]) -> None:
        """The price of KL as well."""
        super().recall(kept)
        self._coef = float(kept["kl_coef"])

    def judged(self, base: Base, prompts: Sequence[Prompt], entry: Entry, size: int) -> list[Rollout]:
        """Answers with their values, advantages and returns."""
        rollouts = self.drawn(base, prompts, entry, size)
        earned = self.earned(base, rollouts)
        self._remember(base, rollouts, entry, size)
        reference = self.known(base, rollouts, self.reference(base), size)
        distances = []
        for one, reward, theirs in zip(rollouts, earned, reference, strict=True):
            assert one.old is not None
            ratio = one.old - theirs
            rewards = -self._coef * ratio
            rewards[-1] += reward
            one.advantages = losses.generalized_advantages(rewards, one.values, self.gamma, self.lam)
            one.returns = one.advantages + one.values
            distances.append(float(losses.kl_estimate(one.old, theirs).sum()))
        everything = losses.whitened(torch.cat([one.advantages for one in rollouts]))
        for one, advantages in zip(rollouts, everything.split([one.drawn for one in rollouts]), strict=True):
            one.advantages = advantages
        self._watched |= {"kl": sum(distances) / len(distances), "kl_coef": self._coef}
        self._follow(self._watched["kl"], len(rollouts))
        return rollouts

    def _follow(self, distance: float, answers: int) -> None:
        """Raise the price of a nat where the policy is farther away than it should be, and lower it where nearer."""
        if self.kl_target is not None:
            error = min(_STEADY, max(-_STEADY, distance / self.kl_target - 1))
            self._coef *= 1 + error * answers / self.kl_horizon

    @torch.no_grad()
    def _remember(self, base: Base, rollouts: Sequence[Rollout], entry: Entry, size: int) -> None:
        """Log-probabilities and values when the answers were drawn."""
        for start in range(0, len(rollouts), size):
            part = rollouts[start : start + size]
            logps, values = self._read(base, part, entry)
            sizes = [one.drawn for one in part]
            for one, old, value in zip(part, logps.split(sizes), values.split(sizes), strict=True):
                one.old, one.values = old, value

    def _read(self, base: Base, rollouts: Sequence[Rollout], entry: Entry) -> tuple[Tensor, Tensor]:
        """log π and the value before each drawn token, [tokens] each, from one pass through the policy."""
        assert isinstance(entry, str)
        batch, targets = collate(base, rollouts)
        states = hidden_states(base, batch, entry).last
        logps = token_logps(base, states, targets, entry, self.temperature)
        head = adapter_of(base, entry).head
        assert isinstance(head, TaskHead)
        # In fp32: bf16 has 3 digits, and an advantage is the difference of two values.
        with torch.autocast(base.device.type, enabled=False):
            values = F.linear(states[targets != -100].float(), head.out.weight.float(), head.out.bias)
        return logps, values[:, 0]

    def weight(self, examples: Sequence[Rollout]) -> float:
        """The number of drawn tokens."""
        return float(sum(one.drawn for one in examples))

    def loss(self, base: Base, examples: Sequence[Rollout], route: Entry | Route) -> Loss:
        """The clipped surrogate and the value head's clipped error, summed over tokens."""
        assert not isinstance(route, Route)
        logps, values = self._read(base, examples, route)
        kept = (
            joined([getattr(one, name) for one in examples], base.device)
            for name in ("old", "advantages", "values", "returns")
        )
        old, advantages, before, returns = kept
        assert old is not None
        assert advantages is not None
        assert before is not None
        assert returns is not None
        policy = losses.clipped_policy(logps, old, advantages, self.clip)
        value = losses.clipped_value(values, before, returns, self.clip_value)
        self.note("entropy", -logps)
        self.note("value_error", value)
        self.note("clipped", ((logps.detach() - old).exp() - 1).abs().gt(self.clip).float())
        return Loss((policy + self.vf_coef * value).sum(), self.weight(examples))
