"""Curves for tests: real ones that were stored, made-up healthy ones, and made-up ones with a planted fault."""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft.diagnosis.curve import Curve, Evaluation, Facts, Step
from graft.diagnosis.runs import facts_of

FACTS = facts_of(
    {
        "method": {"name": "lora", "learning_rate": 0.004},
        "objective": {"name": "classify"},
        "data": {"max_length": 96},
        "training": {"num_train_epochs": 2.0, "warmup_ratio": 0.06, "max_grad_norm": 1.0, "max_steps": None},
    },
    parameters=22_700_000, total=200, classes=2, train_rows=3200, validation_rows=500, dtype="bf16",
)  # fmt: skip


def real() -> list[Curve]:
    """Stored curves of real runs."""
    stored = json.loads((Path(__file__).parent / "real_curves.json").read_text(encoding="utf-8"))
    found = []
    for run in stored["runs"]:
        total = run["steps"][-1][0]
        facts = facts_of(
            run["recipe"], peak_rate=run["peak_rate"], parameters=run["parameters"], total=total,
            classes=run["classes"], dtype=run["dtype"],
        )  # fmt: skip
        steps = [Step(*values[:4], watched=dict(*values[4:])) for values in run["steps"]]
        evaluations = [Evaluation(*values) for values in run["evaluations"]]
        found.append(Curve(run["name"], steps, evaluations, replace(facts, state="done")))
    return found


def falling(count: int = 200, start: float = 0.7, end: float = 0.3, noise: float = 0.1, seed: int = 1) -> list[float]:
    """Losses that fall from one value to another, with noise in proportion."""
    draw = random.Random(seed)
    return [
        (end + (start - end) * math.exp(-4 * index / count)) * (1 + noise * draw.uniform(-1, 1))
        for index in range(count)
    ]


def steps_of(losses: Sequence[float], norms: Sequence[float] | None = None, rate: float = 0.004) -> list[Step]:
    """One step for each loss."""
    return [
        Step(index + 1, loss, rate, 1.0 if norms is None else norms[index], 16 * (index + 1), 0.1 * (index + 1))
        for index, loss in enumerate(losses)
    ]


def curve(losses: Sequence[float], *more: Evaluation, norms: Sequence[float] | None = None, **facts: Any) -> Curve:
    """A finished run of these losses and evaluations."""
    known: Facts = replace(FACTS, state="done", total=len(losses), **facts)
    return Curve("made up", steps_of(losses, norms), more, known)


def healthy(seed: int = 1, **facts: Any) -> Curve:
    """A run with nothing wrong."""
    seen = [
        Evaluation(number, loss, quality, {"most_predicted": 0.55, "majority": 0.52})
        for number, loss, quality in [(50, 0.5, 0.75), (100, 0.42, 0.8), (150, 0.4, 0.81), (200, 0.39, 0.82)]
    ]
    return curve(falling(seed=seed), *seen, **facts)


def _seen(*values: tuple[int, float, float], **figures: float) -> list[Evaluation]:
    return [Evaluation(number, loss, quality, figures) for number, loss, quality in values]


def _flat(level: float, count: int = 200) -> list[float]:
    draw = random.Random(2)
    return [level * (1 + 0.02 * draw.uniform(-1, 1)) for _ in range(count)]


def _report(**more: Any) -> dict[str, Any]:
    return {"quality": 0.8, "quality_low": 0.78, "quality_high": 0.82, "figures": {}} | more


def policy(count: int = 60, updates: int = 1, objective: str = "grpo", **watched: Callable[[int], float]) -> Curve:
    """A run of GRPO or PPO with nothing wrong: its reward rises, its loss is noise about 0. `watched` replaces figures,
    each as a function of the step."""
    draw = random.Random(3)
    known: dict[str, Callable[[int], float]] = {
        "reward": lambda step: 0.3 + 0.5 * step / count + 0.05 * draw.uniform(-1, 1),
        "kl": lambda step: 0.08 * step / count * (20 if objective == "ppo" else 1),
        "entropy": lambda step: 0.7 * math.exp(-1.5 * step / count),
        "length": lambda step: 20.0,
        "ended": lambda step: 1.0,
    }
    if objective == "grpo":
        known |= {"reward_std": lambda step: 0.4, "silent": lambda step: 0.1 + 0.3 * step / count}
    known |= watched
    steps, seen = [], {}
    for step in steps_of([draw.uniform(-0.02, 0.02) for _ in range(count)]):
        if step.number % updates == 0 or not seen:
            seen = {name: figure(step.number) for name, figure in known.items()}
        steps.append(replace(step, watched=dict(seen)))
    recipe = {**FACTS.recipe, "objective": {"name": objective, "kl_target": 6.0, "beta": 0.04, "num_generations": 8}}
    facts = replace(FACTS, state="done", total=count, objective=objective, recipe=recipe, best_by="quality")
    ends = [Evaluation(count * part // 4, 2.0, 0.3 + 0.1 * part, {"ended": 1.0}) for part in range(1, 5)]
    return Curve("made up", steps, ends, facts)


def preferences(margin: Callable[[int], float], count: int = 80) -> Curve:
    """A run of DPO with these margins."""
    losses = [math.log1p(math.exp(-max(0.0, margin(step)))) for step in range(count)]
    steps = [replace(step, watched={"margin": margin(step.number - 1)}) for step in steps_of(losses)]
    recipe = {**FACTS.recipe, "objective": {"name": "dpo"}}
    facts = replace(FACTS, state="done", total=count, objective="dpo", recipe=recipe, classes=None)
    return Curve("made up", steps, (), facts)


_LOG = "120 of 1,000 rows have 0 trained tokens: 120 prompt longer than max_length=96 (p95 300; use 384 or more)"
_LONG = "rows have 80 tokens (p95 300, longest 412); max_length=96"
_KEPT = "500 of 500 rows kept: 500 supervised tokens (a row has 1; 1 to 1 in 90 % of the rows)"
_TOLD = dict.fromkeys(("answer", "reference"), "yes")
_HEALTHY = healthy().evaluations

PLANTED: dict[str, Callable[[], Curve]] = {
    "not finite": lambda: curve([*falling(60), math.nan, math.nan, math.nan]),
    "loss exactly 0": lambda: curve([*falling(60), 0.0, 0.0, 0.0]),
    "no gradient": lambda: curve(falling(60), norms=[1.0] * 50 + [0.0] * 10),
    "diverged": lambda: curve([*falling(120), *_flat(3.0, 40)]),
    "no descent": lambda: curve(_flat(0.693), *_seen((200, 0.693, 0.52), majority=0.52, most_predicted=0.9)),
    "gradients explode": lambda: curve(falling(100), norms=[1.0] * 80 + [900.0] * 20),
    "always clipped": lambda: curve(falling(100), norms=[80.0] * 100),
    "spike": lambda: curve([*falling(100, end=0.1), 2.5, *falling(100, start=0.1, end=0.05)]),
    "learning rate": lambda: healthy(peak_rate=0.5),
    "overfit": lambda: curve(
        falling(200, end=0.05), *_seen((50, 0.4, 0.82), (100, 0.6, 0.8), (150, 0.7, 0.79), (200, 0.9, 0.78))
    ),
    "still learning": lambda: curve(
        falling(200, end=0.05), *_seen((50, 0.6, 0.6), (100, 0.5, 0.65), (150, 0.4, 0.7), (200, 0.25, 0.82))
    ),
    "few steps": lambda: curve(falling(6)),
    "long warm-up": lambda: healthy(warmup=0.9),
    "few validation rows": lambda: healthy(validation_rows=12),
    "failed": lambda: replace(healthy(), facts=replace(FACTS, state="failed", cause="the disk is full")),
    "stopped": lambda: replace(healthy(), facts=replace(FACTS, state="stopped", cause="interrupted")),
    "killed": lambda: replace(healthy(), facts=replace(FACTS, state="lost")),
    "one label": lambda: curve(falling(), *_seen((100, 0.6, 0.5), (200, 0.6, 0.5), most_predicted=1.0, majority=0.5)),
    "one answer": lambda: healthy(answers=[_TOLD | {"reference": str(number)} for number in range(30)]),
    "no better than the majority": lambda: healthy(report=_report(figures={"majority": 0.81})),
    "no better than the base": lambda: healthy(report=_report(), base={"quality": 0.79}),
    "answers do not end": lambda: curve(falling(), *_seen((200, 0.4, 0.1), ended=0.0), objective="instruct"),
    "forgetting": lambda: healthy(report=_report(probes={"news": 0.2}), base={"probes": {"news": 0.8}}),
    "rows lost": lambda: healthy(log=[_LOG, _LONG]),
    "few trained tokens": lambda: healthy(log=[_KEPT]),
    "margin does not move": lambda: preferences(lambda step: 0.0),
    "policy runs away": lambda: policy(kl=lambda step: 0.05 * step),
    "reward is constant": lambda: policy(80, 4, "ppo", reward=lambda step: 0.25),
    "groups are silent": lambda: policy(silent=lambda step: 0.95, reward=lambda step: 0.05 * (step % 2)),
    "entropy collapse": lambda: policy(
        entropy=lambda step: 0.7 if step < 20 else 0.01, reward=lambda step: 0.3 + 0.01 * (step % 3)
    ),
    "memory ran out": lambda: healthy(
        log=["out of memory: passes of 4 rows from here on, each step has the same rows"]
    ),
    "memory above plan": lambda: healthy(report=_report(expected_memory_bytes=1e9, peak_memory_bytes=2e9)),
    "slow evaluation": lambda: replace(healthy(), evaluations=[replace(one, seconds=60.0) for one in _HEALTHY]),
    "not compiled": lambda: healthy(log=["compiling failed, so the run goes on without: no header"]),
    "damaged log": lambda: replace(healthy(), unreadable=1),
}
"""A curve for every finding of a run, in which it is planted."""
