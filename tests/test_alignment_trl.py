"""Every loss of alignment beside the one that trl's own trainers compute: values and gradients within 1e-5.

The same log-probabilities (or rewards) go into the objective and into the trainer's method, as leaves of the graph, so
what is compared is all that lies between a policy's log-probabilities and the loss: which tokens count, sums and means,
reference, clipping and weights. trl 1.16.0 has no PPO trainer. What is left of PPO there is compared: the clipped
surrogate with advantages by token (GRPO's loss with β = 0 and loss_type dapo). The other halves of PPO, generalized
advantages and the clipped value error, stand nowhere in trl as something to call; `test_alignment_losses.py` has them
written out.
"""

import importlib
from array import array
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from graft.alignment import losses
from graft.alignment.logprobs import token_logps
from graft.alignment.pairs import Judged, Pair, sides
from graft.alignment.rollouts import Prompt, Rollout
from graft.data.dialogue import Dialogue, Graded, Message, Preference
from graft.objectives import dpo, grpo, ppo, reward
from graft.objectives.causal import collate
from graft.rendering.supervise import Supervised

pytestmark = pytest.mark.filterwarnings("ignore")

BASE: Any = SimpleNamespace(config=SimpleNamespace(pad_token_id=0), device=torch.device("cpu"))
"""What an objective asks of a base when its log-probabilities are given."""
WORDS = 30


def trl(module: str, name: str) -> Any:
    """A class of trl; the test is skipped where trl is not installed."""
    pytest.importorskip("trl")
    return getattr(importlib.import_module(module), name)


def accelerator() -> SimpleNamespace:
    """One process."""
    same = lambda value, *_, **__: value  # noqa: E731
    return SimpleNamespace(
        device=torch.device("cpu"), gather=same, gather_for_metrics=same, reduce=same, num_processes=1,
        autocast=nullcontext, is_main_process=False,
    )  # fmt: skip


def trainer(**given: Any) -> SimpleNamespace:
    """What a trainer's loss asks of itself."""
    common = {
        "accelerator": accelerator(), "model": SimpleNamespace(training=True), "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1, "ld_alpha": None,
        "precompute_ref_logps": True, "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
    }  # fmt: skip
    return SimpleNamespace(**common | given)


def said(logps: Tensor) -> Any:
    """A model for trl that gives these log-probabilities [B, S - 1] wherever a label is set."""

    def model(labels: Tensor, **_: Any) -> SimpleNamespace:
        zeros = torch.zeros_like(logps)
        known = torch.where(labels[:, 1:] != -100, logps, zeros)
        return SimpleNamespace(log_probs=known, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    return model


def row(generator: torch.Generator, number: int, prompt: int, answer: int) -> Supervised:
    """A prompt and an answer of so many made-up tokens."""
    ids = torch.randint(1, WORDS, (prompt + answer,), generator=generator).tolist()
    trained = bytearray([0] * prompt + [1] * answer)
    return Supervised(array("i", ids), trained, f"row {number}", str(number), 0, prompt, True, number)


def pairs(count: int = 5) -> list[Pair]:
    """Pairs of answers of different lengths."""
    draw = torch.Generator().manual_seed(1)
    asked, one, other = (Message(role, text) for role, text in (("user", "a"), ("assistant", "b"), ("assistant", "c")))
    return [
        Pair(row(draw, n, 2 + n % 3, 3 + n), row(draw, n, 2 + n % 3, 7 - n), f"row {n}",
             Preference((asked,), (one,), (other,), str(n), f"row {n}", gap=1.5 + n))
        for n in range(count)
    ]  # fmt: skip


def values(shape: tuple[int, ...], seed: int) -> Tensor:
    """Log-probabilities, or what else a leaf of the graph is."""
    return -torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 3 - 0.05


def inputs(answers: Any) -> dict[str, Tensor]:
    """The batch as trl's collators make it."""
    batch, _ = collate(BASE, answers)
    width = batch["input_ids"].shape[1]
    marks = [list(answer.trained) + [0] * (width - len(answer.ids)) for answer in answers]
    return {**batch, "completion_mask": torch.tensor(marks)}


def close(mine: Tensor, theirs: Tensor, leaf: Tensor, most: float = 1e-5) -> None:
    """The same value, and the same gradient of every entry of the leaf."""
    assert float((mine - theirs).detach().abs()) <= most * max(1.0, float(theirs.detach().abs()))
    first, second = (torch.autograd.grad(each, leaf, retain_graph=True)[0] for each in (mine, theirs))
    assert float(second.abs().max()) > 1e-3  # there is something to compare
    assert float((first - second).abs().max()) <= most


def given(monkeypatch: pytest.MonkeyPatch, module: Any, leaf: Tensor) -> None:
    """Let an objective read `leaf` [B, S - 1] where it would run the model."""

    def read(base: Any, rows: Any, *_: Any) -> tuple[Tensor, Tensor]:
        targets = collate(base, rows)[1]
        return leaf[targets[:, :-1] != -100], targets

    monkeypatch.setattr(module, "answer_logps", read)


# Preferences ----------------------------------------------------------------------------------------


def preferred(
    monkeypatch: pytest.MonkeyPatch, objective: dpo.Dpo, examples: list[Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Graft's mean loss of examples, the leaf that it is made of, and the reference's sums."""
    answers = sides(examples)
    batch = inputs(answers)
    leaf = values((len(answers), batch["input_ids"].shape[1] - 1), 2).requires_grad_()
    known = (values(tuple(leaf.shape), 3) * batch["completion_mask"][:, 1:]).sum(1)
    given(monkeypatch, dpo, leaf)
    monkeypatch.setattr(dpo.Dpo, "_reference", lambda *_: known if objective.referenced else None)
    loss = objective.loss(BASE, examples, "policy")
    return loss.total / loss.weight, leaf, known


@pytest.mark.parametrize("variant", ["sigmoid", "ipo"])
def test_dpo_and_ipo(monkeypatch, variant):
    """`DPOTrainer._compute_loss` with loss_type sigmoid and ipo."""
    theirs = trl("trl.trainer.dpo_trainer", "DPOTrainer")
    examples = pairs()
    mine, leaf, known = preferred(monkeypatch, dpo.Dpo(variant=variant, beta=0.3), examples)
    self = trainer(
        loss_types=[variant], loss_weights=[1.0], beta=0.3, label_smoothing=0.0, f_divergence_type="reverse_kl",
        use_weighting=False,
    )  # fmt: skip
    batch = inputs(sides(examples)) | dict(zip(("ref_chosen_logps", "ref_rejected_logps"), known.chunk(2), strict=True))
    close(mine, theirs._compute_loss(self, said(leaf), batch, False), leaf)


def test_kto(monkeypatch):
    """`KTOTrainer._compute_loss` over single answers, with the distance (KL) that its own method measures."""
    theirs = trl("trl.trainer.kto_trainer", "KTOTrainer")
    draw = torch.Generator().manual_seed(4)
    asked, one = Message("user", "a"), Message("assistant", "b")
    examples: list[Any] = [
        Judged(row(draw, n, 2, 3 + n), n % 3 != 0, f"row {n}", Graded((asked,), (one,), n % 3 != 0, str(n), f"row {n}"))
        for n in range(6)
    ]
    objective = dpo.Dpo(variant="kto", beta=0.3, desirable_weight=1.4, undesirable_weight=0.6)
    batch = inputs(sides(examples))
    apart = {"KL_" + name: tensor for name, tensor in batch.items()}
    objective._kl = 0.35
    mine, leaf, known = preferred(monkeypatch, objective, examples)
    sums = (leaf.detach() * batch["completion_mask"][:, 1:]).sum(1)
    self = trainer(
        loss_type="kto", beta=0.3, desirable_weight=1.4, undesirable_weight=0.6, calculate_KL=True,
    )  # fmt: skip
    self._compute_kl_logps = lambda model, batch: theirs._compute_kl_logps(self, model, batch)
    good = torch.tensor([example.good for example in examples])
    # A reference that is 0.35 nats below the policy on every answer: that is the distance.
    told = batch | apart | {"label": good, "ref_logps": known, "ref_KL_logps": sums - 0.35}
    close(mine, theirs._compute_loss(self, said(leaf), told, False), leaf)
    assert self._metrics["train"]["kl"] == [pytest.approx(0.35, abs=1e-6)]


def test_the_distance_of_kto_is_never_negative_as_in_trl(monkeypatch):
    """trl clamps the mean of log π - log π_ref over unrelated answers at 0, in `KTOTrainer._compute_loss`."""
    examples = pairs()
    found = []
    for shift in (0.5, -0.5):
        sums = iter([torch.zeros(10), torch.full((10,), shift)])  # the reference is read first
        monkeypatch.setattr(dpo, "_logps", lambda *_, sums=sums: (next(sums), None))
        objective = dpo.Dpo(variant="kto")
        monkeypatch.setattr(dpo, "reference", lambda *_: None)
        found.append(objective._distance(BASE, examples, "policy", 16))
    assert found == [0.5, 0.0]


@pytest.mark.parametrize("variant", ["simpo", "orpo"])
def test_simpo_and_orpo(monkeypatch, variant):
    """`CPOTrainer.cpo_loss` with loss_type simpo, and `ORPOTrainer.odds_ratio_loss`, whose value trl subtracts from the
    negative mean log-probability of the chosen answer; both take means by answer, made here of the same leaf."""
    name = {"simpo": "CPO", "orpo": "ORPO"}[variant]
    cls = trl(f"trl.experimental.{name.lower()}.{name.lower()}_trainer", f"{name}Trainer")
    examples = pairs()
    mine, leaf, _ = preferred(monkeypatch, dpo.Dpo(variant=variant, beta=2.0, simpo_gamma=0.5), examples)
    marks = inputs(sides(examples))["completion_mask"][:, 1:]
    chosen, rejected = ((leaf * marks).sum(1) / marks.sum(1)).chunk(2)
    if variant == "simpo":
        self = trainer(loss_type="simpo", alpha=0.0, beta=2.0, simpo_gamma=0.5, label_smoothing=0.0)
        theirs = cls.cpo_loss(self, chosen, rejected)[0].mean()
    else:
        theirs = (-chosen - cls.odds_ratio_loss(trainer(beta=2.0), chosen, rejected)[0]).mean()
    close(mine, theirs, leaf)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_conservative_dpo(smoothing):
    """trl smooths labels in `CPOTrainer.cpo_loss` with loss_type sigmoid (1.16.0 has it no more in its DPO)."""
    cls = trl("trl.experimental.cpo.cpo_trainer", "CPOTrainer")
    leaf = values((2, 7), 5).requires_grad_()
    self = trainer(loss_type="sigmoid", alpha=0.0, beta=0.4, simpo_gamma=0.5, label_smoothing=smoothing)
    close(losses.dpo(*leaf, 0.4, smoothing).mean(), cls.cpo_loss(self, *leaf)[0].mean(), leaf)


# Rewards --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [0.0, 0.4])
def test_reward(monkeypatch, margin):
    """`RewardTrainer.compute_loss`, with margins and the centring of rewards."""
    cls = trl("trl.trainer.reward_trainer", "RewardTrainer")
    examples = pairs()
    leaf = values((2 * len(examples),), 6).requires_grad_()
    monkeypatch.setattr(reward, "rewards_of", lambda *_: leaf)
    objective = reward.Reward(margin=margin, center_rewards_coefficient=0.05)
    mine = objective.loss(BASE, examples, "policy")
    self = trainer()
    self.args.center_rewards_coefficient = 0.05
    batch: dict[str, Any] = {"attention_mask": torch.ones(2, 2)}
    if margin:
        batch["margin"] = margin * torch.tensor([example.row.gap for example in examples])
    theirs = cls.compute_loss(self, lambda **_: SimpleNamespace(logits=leaf[:, None]), batch)
    close(mine.total / mine.weight, theirs, leaf)


# Policies -------------------------------------------------------------------------------------------


def drawn(advantages: str) -> tuple[list[Rollout], dict[str, Tensor]]:
    """Answers behind prompts of one length, and the same for trl; advantages by answer or by token."""
    draw = torch.Generator().manual_seed(7)
    dialogue = Dialogue((Message("user", "a"), Message("assistant", "b")), "0", "row 0")
    sizes = [3, 6, 1, 5]
    found, told = [], {name: torch.zeros(4, 6) for name in ("old_per_token_logps", "ref_per_token_logps", "advantages")}
    ids, mask = torch.zeros(4, 6, dtype=torch.long), torch.zeros(4, 6, dtype=torch.long)
    prompts = torch.randint(1, WORDS, (4, 2), generator=draw)
    leaf = values((4, 7), 8)[:, 1:]
    for number, size in enumerate(sizes):
        made = Supervised(array("i", prompts[number].tolist()), bytearray(2), "row", "0", 0, 2, True, number)
        ids[number, :size] = torch.randint(1, WORDS, (size,), generator=draw)
        mask[number, :size] = 1
        each = torch.randn(1 if advantages == "answer" else size, generator=draw).expand(size)
        old, reference = (leaf[number, :size] + 0.3 * torch.randn(size, generator=draw) for _ in range(2))
        parts = zip(told, (old, reference, each), strict=True)
        for name, tensor in parts:
            told[name][number, :size] = tensor
        row_ids = [*prompts[number].tolist(), *ids[number, :size].tolist()]
        found.append(
            Rollout(
                row_ids, 2, True, Prompt(made, dialogue), each, old, reference, torch.randn(size), torch.randn(size)
            )
        )
    told["advantages"] = told["advantages"][:, 0] if advantages == "answer" else told["advantages"]
    told |= {"prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_ids": ids}
    told |= {"completion_mask": mask, "num_items_in_batch": mask.sum().float()}
    return found, told


def policy_trainer(cls: Any, kind: str, beta: float, high: float) -> SimpleNamespace:
    """What `GRPOTrainer._compute_loss` asks of itself, without its additions."""
    self = trainer(
        loss_type=kind, beta=beta, epsilon_low=0.2, epsilon_high=high, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, importance_sampling_level="token", use_vllm=False, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, max_completion_length=9,
    )  # fmt: skip
    self.args = SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
    self._get_per_token_logps_and_entropies = lambda *given, **more: cls._get_per_token_logps_and_entropies(
        self, *given, **more
    )
    return self


@pytest.mark.parametrize("kind", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("more", [{}, {"beta": 0.0, "clip_high": 0.28}])
def test_grpo(monkeypatch, kind, more):
    """`GRPOTrainer._compute_loss`; its loss_type has the same names: dapo, grpo, dr_grpo."""
    cls = trl("trl.trainer.grpo_trainer", "GRPOTrainer")
    answers, told = drawn("answer")
    leaf = values((4, 7), 8).requires_grad_()
    given(monkeypatch, grpo, leaf)
    objective = grpo.Grpo(**{"loss_type": kind, "num_iterations": 2, "max_new_tokens": 9, "beta": 0.3} | more)
    mine = objective.loss(BASE, answers, "policy")
    self = policy_trainer(cls, kind, objective.beta, objective.clip_high or 0.2)
    theirs = cls._compute_loss(self, said(leaf), told)
    close(mine.total / mine.weight, theirs, leaf)
    assert sum(self._metrics["train"]["clip_ratio/region_mean"]) > 0  # some tokens were clipped


def test_advantages_of_groups():
    """trl computes them inside `GRPOTrainer._generate_and_score_completions`, which draws answers and cannot be called
    alone; its constant (1e-4 beside the deviation) and its deviation (unbiased) are what is compared."""
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.0], [2.0, 1.0, 1.0, 4.0]])
    nanstd = trl("trl.trainer.utils", "nanstd")
    mean = rewards.nanmean(dim=1, keepdim=True)
    theirs = (rewards - mean) / (torch.stack([nanstd(group) for group in rewards])[:, None] + 1e-4)
    assert torch.allclose(losses.group_advantages(rewards), theirs, atol=1e-5)


def test_the_clipped_surrogate_of_ppo(monkeypatch):
    """PPO's policy term with advantages by token, without its value term: `GRPOTrainer._compute_loss`, β 0, dapo."""
    cls = trl("trl.trainer.grpo_trainer", "GRPOTrainer")
    answers, told = drawn("token")
    leaf = values((4, 7), 8).requires_grad_()
    known = torch.cat([leaf[number, 1 : 1 + one.drawn] for number, one in enumerate(answers)])
    monkeypatch.setattr(ppo.Ppo, "_read", lambda *_: (known, torch.zeros_like(known)))
    mine = ppo.Ppo(vf_coef=0.0).loss(BASE, answers, "policy")
    theirs = cls._compute_loss(policy_trainer(cls, "dapo", 0.0, 0.2), said(leaf), told)
    close(mine.total / mine.weight, theirs, leaf)


def test_log_probabilities_of_tokens():
    """`selective_log_softmax` of trl beside `token_logps`, which makes the scores in chunks."""
    theirs = trl("trl.trainer.utils", "selective_log_softmax")
    weight = 0.3 * values((WORDS, 8), 9)
    head = SimpleNamespace(leave=torch.nn.Module())
    base: Any = SimpleNamespace(
        select=lambda _: [head], config=SimpleNamespace(vocab_size=WORDS), logits=lambda states: states @ weight.T,
        route=lambda _: nullcontext(),
    )  # fmt: skip
    states = values((3, 6, 8), 10).requires_grad_()
    targets = torch.randint(0, WORDS, (3, 6))
    mine = token_logps(base, states, targets, None, temperature=0.7).view(3, 6)
    other = theirs(states @ weight.T / 0.7, targets)
    assert torch.allclose(mine, other, atol=1e-5)
    upstream = values((3, 6), 11)
    close((mine * upstream).sum(), (other * upstream).sum(), states)
