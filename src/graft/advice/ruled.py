"""What the rules of the field say of a case."""

from graft.advice.case import Case
from graft.advice.choice import Choice
from graft.advice.rules import LARGE, MOST, SMALL
from graft.methods.base import read_method


def by_rules(case: Case, yielded: list[str]) -> Choice:
    """LoRA with the settings that the rules of the field give, or full fine-tuning; `yielded` gets what is needless."""
    if case.goal == "quality" and (case.rows or 0) > MOST:
        choice = Choice(read_method("full"), None)
        choice.rule("method", "full", "most-rows")
        choice.say("quantization", None, "full fine-tuning trains the base's own weights", "default", "Graft")
        return _rates(case, choice)
    rank, names = _rank(case)
    method = read_method({"name": "lora", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["all-linear"]})
    choice = Choice(method, None)
    heavy = 2 * case.parameters > case.memory / 2
    if case.goal == "memory":
        choice.rule("method", "lora", "memory")
        choice.quantization = "nf4"
        choice.rule("quantization", "nf4", "memory")
    elif case.goal in ("latency", "many-tasks"):
        choice.rule("method", "lora", case.goal)
    else:
        choice.rule("method", "lora", _memory_rule(case))
    if case.goal != "memory" and case.memory <= SMALL and heavy:
        choice.quantization = "nf4"
        choice.rule("quantization", "nf4", "small")
    elif case.goal != "memory":
        share = 2 * case.parameters / case.memory
        reason = f"the base in 16 bits takes {share:.0%} of the memory" if case.memory <= SMALL else "the plan decides"
        choice.say("quantization", None, reason, "planned", "graft plan")
        if case.memory <= SMALL:
            yielded.append(f"QLoRA at most 16 GB: not needed, {reason}")
    for name in names:
        choice.rule("r", rank, name)
    choice.rule("lora_alpha", 2 * rank, "alpha")
    choice.rule("target_modules", ["all-linear"], "targets")
    return _rates(case, choice)


def _memory_rule(case: Case) -> str:
    if case.memory <= SMALL:
        return "small" if 2 * case.parameters > case.memory / 2 else "small-rank"
    return "large" if case.memory >= LARGE else "middle"


def _rank(case: Case) -> tuple[int, list[str]]:
    """The rank, and the rules that give it, the deciding one last."""
    if case.memory <= SMALL or case.goal == "memory":
        return 8, ["simple" if case.objective == "classify" else "small-rank"]
    if case.objective == "classify":
        return 8, ["simple"]
    if (case.rows or 0) > 10_000:
        return 32, ["complex"]
    return 16, ["large" if case.memory >= LARGE else "middle"]


def _rates(case: Case, choice: Choice) -> Choice:
    """The learning rate, beside what is chosen."""
    large = case.parameters >= 100_000_000
    rate = type(choice.method).rate_large if large else type(choice.method).rate_small
    if choice.method.name == "lora" and case.parameters >= 30_000_000_000:
        rate = 1e-4
        choice.rule("learning_rate", rate, "rate")
    else:
        words = "100 million parameters and more" if large else "less than 100 million parameters"
        reason = f"the default of {choice.method.name} for bases of {words}"
        choice.say("learning_rate", rate, reason, "default", "the sweeps in docs/log.md")
    choice.method = choice.method.model_copy(update={"learning_rate": rate})
    if case.goal == "memory":
        effective = case.training.per_device_train_batch_size * case.training.gradient_accumulation_steps
        choice.training = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": effective,
                           "gradient_checkpointing": True}  # fmt: skip
        for name, value in choice.training.items():
            choice.rule(name, value, "memory")
    return choice
