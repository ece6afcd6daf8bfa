"""The losses of alignment against formulas written out by hand; `test_alignment_trl.py` has trl's beside them."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graft.alignment import losses
from graft.engine.loss import chunked_losses

GENERATOR = torch.Generator().manual_seed(3)
CHOSEN = (torch.randn(7, generator=GENERATOR, dtype=torch.double) * 2).requires_grad_()
REJECTED = (torch.randn(7, generator=GENERATOR, dtype=torch.double) * 2).requires_grad_()
MEANS = [(-torch.rand(7, generator=GENERATOR, dtype=torch.double) * 3 - 0.01).requires_grad_() for _ in range(2)]


def sigma(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def same(found: Tensor, written: list[float], *inputs: Tensor) -> None:
    """Values as written out, and gradients as differences of the values are."""
    assert found.tolist() == pytest.approx(written, abs=1e-9)
    assert len(written) > 1
    for given in inputs:
        (gradient,) = torch.autograd.grad(found.sum(), given, retain_graph=True)
        assert bool(gradient.isfinite().all())
        assert bool(gradient.any())


def pairs(first: Tensor = CHOSEN, second: Tensor = REJECTED) -> list[tuple[float, float]]:
    return list(zip(first.tolist(), second.tolist(), strict=True))


def test_bradley_terry():
    found = losses.bradley_terry(CHOSEN, REJECTED, 0.3, 0.01)
    same(found, [-math.log(sigma(c - r - 0.3)) + 0.01 * (c + r) ** 2 for c, r in pairs()], CHOSEN, REJECTED)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo(smoothing):
    found = losses.dpo(CHOSEN, REJECTED, 0.4, smoothing)
    written = []
    for c, r in pairs():
        p = sigma(0.4 * (c - r))
        written.append(-(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p))
    same(found, written, CHOSEN, REJECTED)


def test_the_loss_of_dpo_is_ln_2_where_the_policy_is_the_reference():
    zero = torch.zeros(3)
    assert losses.dpo(zero, zero, 0.1).tolist() == [pytest.approx(math.log(2), abs=1e-7)] * 3


def test_ipo():
    same(losses.ipo(CHOSEN, REJECTED, 0.4), [(c - r - 1.25) ** 2 for c, r in pairs()], CHOSEN, REJECTED)


def test_kto():
    good = torch.tensor([True, False, True, True, False, False, True])
    found = losses.kto(CHOSEN, good, 0.7, 0.4, (1.5, 0.5))
    written = [
        1.5 * (1 - sigma(0.4 * (ratio - 0.7))) if right else 0.5 * (1 - sigma(0.4 * (0.7 - ratio)))
        for ratio, right in zip(CHOSEN.tolist(), good.tolist(), strict=True)
    ]
    same(found, written, CHOSEN)


def test_orpo():
    found = losses.odds_ratio(*MEANS)
    odds = [[math.exp(p) / (1 - math.exp(p)) for p in side.tolist()] for side in MEANS]
    same(found, [-math.log(sigma(math.log(c / r))) for c, r in zip(*odds, strict=True)], *MEANS)
    certain = torch.zeros(2, requires_grad=True)  # a probability that fp32 rounds to 1
    losses.odds_ratio(certain, torch.full((2,), -1.0)).sum().backward()
    assert bool(certain.grad is not None and certain.grad.isfinite().all())


def test_simpo():
    found = losses.simpo(*MEANS, beta=2.0, gamma=0.5)
    same(found, [-math.log(sigma(2 * (c - r) - 0.5)) for c, r in pairs(*MEANS)], *MEANS)


def test_clipped_policy():
    old = torch.zeros(6, dtype=torch.double)
    logps = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.1, -0.1], dtype=torch.double, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.double)
    found = losses.clipped_policy(logps, old, advantages, 0.2)
    written = [-1.2, math.exp(0.5), -math.exp(-0.5), 0.8, -math.exp(0.1), math.exp(-0.1)]
    same(found, written, logps)
    (gradient,) = torch.autograd.grad(found.sum(), logps)
    # Where clipping chose the value, nothing pulls any more.
    assert [bool(value) for value in gradient] == [False, True, True, False, True, True]
    assert float(losses.clipped_policy(logps, old, advantages, 0.2, 0.4).detach()[0]) == pytest.approx(-1.4)


def test_the_estimate_of_kl_is_never_negative_and_right_in_the_mean():
    policy = torch.log_softmax(torch.randn(50, generator=GENERATOR), 0)
    reference = torch.log_softmax(torch.randn(50, generator=GENERATOR), 0)
    each = losses.kl_estimate(policy, reference)
    assert float(each.min()) >= 0
    exact = float((policy.exp() * (policy - reference)).sum())
    assert float((policy.exp() * each).sum()) == pytest.approx(exact, abs=1e-5)


def test_clipped_value():
    values = torch.tensor([1.0, 3.0, -1.0], requires_grad=True)
    found = losses.clipped_value(values, torch.tensor([0.5, 0.5, 0.5]), torch.tensor([2.0, 2.0, 2.0]), 0.2)
    assert found.tolist() == pytest.approx([0.5 * 1.3**2, 0.5 * 1.3**2, 0.5 * 9])


def test_group_advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]])
    found = losses.group_advantages(rewards)
    assert found[0].tolist() == pytest.approx([0.5 / (math.sqrt(1 / 3) + 1e-4) * s for s in (1, -1, -1, 1)], abs=1e-6)
    assert found[1].tolist() == [0.0] * 4
    assert losses.group_advantages(rewards, scale=False)[0].tolist() == [0.5, -0.5, -0.5, 0.5]


def test_generalized_advantages():
    rewards, values = torch.tensor([0.1, -0.2, 1.0]), torch.tensor([0.3, 0.2, 0.5])
    found = losses.generalized_advantages(rewards, values, 0.9, 0.8)
    deltas = [0.1 + 0.9 * 0.2 - 0.3, -0.2 + 0.9 * 0.5 - 0.2, 1.0 - 0.5]
    written = [deltas[0] + 0.72 * deltas[1] + 0.72**2 * deltas[2], deltas[1] + 0.72 * deltas[2], deltas[2]]
    assert found.tolist() == pytest.approx(written, abs=1e-6)


def test_whitened():
    found = losses.whitened(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert float(found.mean()) == pytest.approx(0, abs=1e-6)
    assert float(found.pow(2).mean()) == pytest.approx(1, abs=1e-5)


def test_losses_in_chunks_have_each_their_own_gradient(monkeypatch):
    monkeypatch.setattr("graft.engine.loss.AT_ONCE", 16 * 40)
    states, weight = torch.randn(100, 8), torch.randn(40, 8)
    targets, upstream = torch.randint(0, 40, (100,)), torch.randn(100)
    plain, chunked = states.clone().requires_grad_(), states.clone().requires_grad_()
    whole = F.cross_entropy(plain @ weight.T, targets, reduction="none")
    found = chunked_losses(chunked, targets, lambda part: part @ weight.T, 40)
    (whole * upstream).sum().backward()
    (found * upstream).sum().backward()
    assert torch.allclose(found, whole, atol=1e-6)
    assert plain.grad is not None
    assert chunked.grad is not None
    assert torch.allclose(chunked.grad, plain.grad, atol=1e-6)
