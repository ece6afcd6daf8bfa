"""The losses of alignment, one function each, over tensors alone.

All are in nats and per row or per token, without a mean: a caller sums them and divides by the weight of the step.
`chosen` and `rejected` are values of the two answers of a pair, [pairs].
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, center: float = 0.0) -> Tensor:
    """-log σ(r_c - r_r - margin) of two rewards (Bradley and Terry 1952), [pairs].

    The margin is how much better the chosen answer is known to be (Touvron et al. 2023, Llama 2). `center` weighs
    (r_c + r_r)², which keeps the mean reward near 0 (Eisenstein et al. 2023): differences alone leave it open.
    """
    return -F.logsigmoid(chosen - rejected - margin) + center * (chosen + rejected) ** 2


def dpo(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log σ(β(ρ_c - ρ_r)), with ρ = log π(y|x) - log π_ref(y|x) (Rafailov et al. 2023), [pairs].

    `label_smoothing` is the share of pairs that are taken to be the wrong way round (conservative DPO, Mitchell 2023).
    """
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def ipo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """(ρ_c - ρ_r - 1/(2β))², with ρ in the mean of an answer's tokens (Azar et al. 2023), [pairs]."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def kto(ratio: Tensor, good: Tensor, kl: Tensor | float, beta: float, weights: tuple[float, float]) -> Tensor:
    """λ_D(1 - σ(β(ρ - z))) of good answers and λ_U(1 - σ(β(z - ρ))) of bad ones (Ethayarajh et al. 2024), [answers].

    `ratio` is ρ, `good` bool, `kl` z: how far the policy is from the reference on answers that belong to other prompts.
    """
    away = torch.where(good, ratio - kl, kl - ratio)
    weight = torch.where(good, weights[0], weights[1])
    return weight * (1 - torch.sigmoid(beta * away))


def odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log σ(log odds(c) - log odds(r)), odds(p) = p / (1 - p), of mean log-probabilities per token (Hong et al. 2024,
    ORPO), [pairs].
    """
    return -F.logsigmoid(chosen - rejected - (_log_rest(chosen) - _log_rest(rejected)))


def _log_rest(log_p: Tensor) -> Tensor:
    """log(1 - p) of log p < 0. p = 1, which fp32 can round to, is taken one rounding below, to have a gradient."""
    below = log_p.clamp(max=-torch.finfo(torch.float32).eps)
    return torch.log(-torch.expm1(below))


def simpo(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """-log σ(β(a_c - a_r) - γ) of mean log-probabilities per token, without a reference (Meng et al. 2024), [pairs]."""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def clipped_policy(
    logps: Tensor, old: Tensor, advantages: Tensor, clip: float, clip_high: float | None = None
) -> Tensor:
    """-min(r A, clip(r, 1 - ε, 1 + ε) A) with r = π / π_old (Schulman et al. 2017), [tokens].

    `clip_high` is another ε for the upper side (Yu et al. 2025, DAPO).
    """
    ratio = torch.exp(logps - old)
    near = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    return -torch.min(ratio * advantages, near * advantages)


def kl_estimate(logps: Tensor, reference: Tensor) -> Tensor:
    """π_ref/π - log(π_ref/π) - 1 of tokens drawn from π: never negative, and unbiased (Schulman 2020, k3), [tokens]."""
    difference = reference - logps
    return torch.expm1(difference) - difference


def clipped_value(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """½ max((v - R)², (v' - R)²), v' within ε of the value at the rollout (Schulman et al. 2017), [tokens]."""
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (near - returns) ** 2)


def group_advantages(rewards: Tensor, scale: bool = True) -> Tensor:
    """Rewards [prompts, answers] less the mean of their prompt's, over its standard deviation with `scale`
    (Shao et al. 2024); without it as Liu et al. 2025, Dr. GRPO. A group of equal rewards gives 0.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    # Equal rewards can differ from their mean by rounding, which the division would make a signal of.
    centred = torch.where((rewards == rewards[:, :1]).all(dim=1, keepdim=True), 0.0, centred)
    return centred / (rewards.std(dim=1, keepdim=True) + 1e-4) if scale and rewards.shape[1] > 1 else centred


def generalized_advantages(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """GAE (Schulman et al. 2016) of one answer: rewards and values of its tokens, [tokens] each. After the last token
    nothing follows.
    """
    found = torch.empty_like(rewards)
    later = following = torch.zeros((), dtype=rewards.dtype, device=rewards.device)
    for step in range(len(rewards) - 1, -1, -1):
        later = rewards[step] + gamma * following - values[step] + gamma * lam * later
        following = values[step]
        found[step] = later
    return found


def whitened(values: Tensor) -> Tensor:
    """Values with mean 0 and variance 1, [tokens]."""
    return (values - values.mean()) / (values.std(unbiased=False) + 1e-8)
