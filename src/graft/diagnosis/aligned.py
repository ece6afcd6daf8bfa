"""Findings in alignment: margins that stay, a policy that runs away, rewards that teach nothing, answers all alike."""

from collections.abc import Mapping
from math import isfinite, sqrt
from statistics import pvariance
from typing import Any

from graft.diagnosis.curve import Curve, Finding, level_of, mean, setting
from graft.diagnosis.rates import higher, lower, rate_words

WIDTH = 10
"""Steps of a stretch that is looked at."""
STILL = 1e-6
"""A margin that is 0: it is β times a difference of log-probabilities, known to some 1e-5 of each."""
MARGIN_STEPS = 50
"""Steps before a margin that is not above its noise says something."""
FAR = 1.0
"""Nats of KL for each token at which a policy is another model: GRPO and PPO on SmolLM2-135M had 0.07 and 0.12."""
ABOVE_TARGET = 4.0
"""Times the KL that PPO aims at: its price rises by a fifth of a percent an answer at most, so it takes its time."""
CONSTANT = 40
"""Steps of one mean reward: PPO makes four steps of each drawing, so ten drawings."""
SILENT = 0.8
"""Share of groups with equal rewards above which most answers teach nothing."""
SILENT_STEPS = 20
COLLAPSED = 0.1
"""Share of its first value below which the entropy is gone. On a task of two-token answers half was left after 14
steps."""
SOLVED = 0.95
"""A quality at which answers that are all alike are the right ones."""


def margin_stays(curve: Curve) -> Finding | None:
    """A preference margin that is 0 at first, and stays there."""
    margins = _watched(curve, "margin")
    if curve.facts.objective != "dpo" or len(margins) < WIDTH or abs(margins[0]) > STILL:
        return None  # without a reference it does not begin at 0
    dead = max(map(abs, margins)) <= STILL
    last = margins[-(len(margins) // 3) :]
    noise = 3 * sqrt(pvariance(last) / len(last))
    if not dead and (len(margins) < MARGIN_STEPS or mean(last) > noise):
        return None
    return Finding(
        "margin does not move", "serious" if dead else "warning", "certain" if dead else "likely",
        f"the margin is {mean(last):.3g} in the mean of the last {len(last)} of {len(margins)} steps, "
        + ("and was never above 0" if dead else f"within its noise of {noise:.2g}"),
        (
            f"a learning rate too low ({_peak(curve)} at its peak)",
            "sites that do not reach the scores" if dead else "pairs whose better answer nothing tells from the worse",
            "a beta near 0",
        ),
        higher(curve.facts), stops=dead,
    )  # fmt: skip


def runs_away(curve: Curve) -> Finding | None:
    """A policy ever farther from its reference."""
    distances, lengths = _watched(curve, "kl"), _watched(curve, "length")
    facts = curve.facts
    if facts.objective not in ("grpo", "ppo") or len(distances) < WIDTH:
        return None
    now = level_of(distances[-WIDTH:])
    target = _setting(facts.recipe, "kl_target") if facts.objective == "ppo" else None
    tokens = level_of(lengths[-WIDTH:]) if facts.objective == "ppo" and lengths else 1.0  # GRPO's is that of a token
    far = now > FAR * max(1.0, tokens)
    if not far and not (target is not None and now > ABOVE_TARGET * target):
        return None
    aim = "" if target is None else f"; objective.kl_target is {target:g}"
    unit = "an answer" if facts.objective == "ppo" else "a token"
    key, price = ("init_kl_coef", 0.05) if facts.objective == "ppo" else ("beta", 0.04)
    known = _setting(facts.recipe, key)
    return Finding(
        "policy runs away", "warning", "likely",
        f"the KL to the reference is {now:.3g} nats {unit} in the last {WIDTH} steps, "
        f"{level_of(distances[:WIDTH]):.3g} in the first{aim}",
        (rate_words(facts), f"a KL that costs too little (objective.{key})", "a reward that babble can earn"),
        lower(facts) | setting(facts, f"objective.{key}", 4 * (known or price)),
    )  # fmt: skip


def constant_reward(curve: Curve) -> Finding | None:
    """Rewards that are the same whatever is answered."""
    rewards = _watched(curve, "reward")
    if len(rewards) < CONSTANT or max(rewards[-CONSTANT:]) != min(rewards[-CONSTANT:]) or _solved(curve):
        return None
    if any(deviation > 0 for deviation in _watched(curve, "reward_std")[-CONSTANT:]):
        return None
    always = max(rewards) == min(rewards)
    return Finding(
        "reward is constant", "serious", "certain",
        f"the mean reward is {rewards[-1]:.4g} in each of the last {CONSTANT} steps",
        (
            "a reward that does not look at the answer",
            "a task that the policy never gets right: start from a supervised run with objective.init",
            "answers that are all the same",
        ),
        stops=always,
    )  # fmt: skip


def silent_groups(curve: Curve) -> Finding | None:
    """Groups of answers with equal rewards, from which GRPO learns nothing."""
    shares = _watched(curve, "silent")
    if len(shares) < SILENT_STEPS or mean(shares[-SILENT_STEPS:]) <= SILENT:
        return None
    good = _solved(curve) or _gained(curve)
    many = _setting(curve.facts.recipe, "num_generations")
    return Finding(
        "groups are silent", "note" if good else "warning", "certain",
        f"{mean(shares[-SILENT_STEPS:]):.0%} of the groups of the last {SILENT_STEPS} steps had equal rewards, "
        f"{mean(shares[:SILENT_STEPS]):.0%} of the first; the mean reward is {_last(curve, 'reward')}",
        ("the policy has learned its task: it is right nearly always",) if good else (
            "a task too hard for the policy: start from a supervised run with objective.init",
            "too few answers to a prompt, or a temperature too low",
            "a reward with few values",
        ),
        {} if good or many is None else setting(curve.facts, "objective.num_generations", int(2 * many)),
    )  # fmt: skip


def entropy_collapse(curve: Curve) -> Finding | None:
    """A policy that says one thing only, without earning more by it."""
    entropies, rewards = _watched(curve, "entropy"), _watched(curve, "reward")
    if curve.facts.objective not in ("grpo", "ppo") or len(entropies) < 3 * WIDTH or len(rewards) < 3 * WIDTH:
        return None
    before, now = level_of(entropies[:WIDTH]), level_of(entropies[-WIDTH:])
    if now >= COLLAPSED * before or _gained(curve) or _solved(curve):
        return None
    return Finding(
        "entropy collapse", "warning", "likely",
        f"the entropy of a token was {before:.3g} nats in the first {WIDTH} steps and is {now:.3g} in the last, with a "
        f"mean reward of {mean(rewards[:WIDTH]):.3g}, then {mean(rewards[-WIDTH:]):.3g}",
        (rate_words(curve.facts), "a KL that costs too little", "a temperature too low"), lower(curve.facts),
    )  # fmt: skip


def _watched(curve: Curve, name: str) -> list[float]:
    """A figure of each step that has it, where it is a number."""
    return [step.watched[name] for step in curve.steps if name in step.watched and isfinite(step.watched[name])]


def _last(curve: Curve, name: str) -> str:
    found = _watched(curve, name)
    return f"{found[-1]:.3g}" if found else "unknown"


def _solved(curve: Curve) -> bool:
    """Whether the last evaluation leaves next to nothing to learn."""
    seen = curve.evaluations[-1].quality if curve.evaluations else None
    return seen is not None and seen >= SOLVED


def _gained(curve: Curve) -> bool:
    """Whether the reward has risen beyond its noise."""
    rewards = _watched(curve, "reward")
    first, last = rewards[:WIDTH], rewards[-WIDTH:]
    return len(rewards) >= 2 * WIDTH and mean(last) - mean(first) > 2 * sqrt(
        (pvariance(first) + pvariance(last)) / WIDTH
    )


def _peak(curve: Curve) -> str:
    return "unknown" if curve.facts.peak_rate is None else f"{curve.facts.peak_rate:g}"


def _setting(recipe: Mapping[str, Any], key: str) -> float | None:
    """A number of the recipe's objective."""
    objective = recipe.get("objective")
    found = objective.get(key) if isinstance(objective, Mapping) else None
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None
