"""Which method to take, with which settings, and why: measured comparisons first, rules where there are none."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from graft.config import override
from graft.errors import ResourceError, UsageError, nearest
from graft.evidence import Evidence, Measured, gather
from graft.families import FAMILIES
from graft.methods.base import Method, read_method
from graft.planning.catalogue import config_of, entries, find, skeleton
from graft.planning.machine import Machine
from graft.planning.plan import Plan, plan_model, plan_recipe
from graft.recipe import Recipe
from graft.train.loop import Training

GOALS = ("quality", "memory", "latency", "many-tasks")
"""What a recommendation can be for."""
SMALL, LARGE = 16 << 30, 48 << 30
"""Bytes of memory up to which, and from which, the rules of memory hold."""
MANY, MOST = 100_000, 1_000_000
"""Training rows above which the rules of AdaLoRA and of full fine-tuning hold."""
ALTERNATIVES = 2
"""Next choices that are planned beside the recommended one."""


@dataclass(frozen=True)
class Rule:
    """A rule of the field."""

    when: str
    says: str
    source: str
    """The paper that it rests on; the round numbers in a rule are custom, and no paper's result."""


RULES: dict[str, Rule] = {
    "small": Rule("at most 16 GB on one device, where the base in 16 bits would take more than half of it",
                  "QLoRA: LoRA with r = 8 on a base in nf4", "Dettmers et al. 2023, arXiv 2305.14314"),
    "small-rank": Rule("at most 16 GB", "r = 8", "Hu et al. 2021, arXiv 2106.09685, section 7.2"),
    "middle": Rule("between 16 and 48 GB", "LoRA with r = 16 in bf16, and nf4 where that does not fit",
                   "Biderman et al. 2024, arXiv 2405.09673; Dettmers et al. 2023, arXiv 2305.14314"),
    "large": Rule("48 GB and more", "LoRA with r = 16 to 32 in bf16", "Biderman et al. 2024, arXiv 2405.09673"),
    "many-rows": Rule("more than 100,000 training rows", "AdaLoRA is worth a try",
                      "Zhang et al. 2023, arXiv 2303.10512"),
    "most-rows": Rule("more than 1,000,000 training rows, or continued pretraining on a cluster", "full fine-tuning",
                      "Biderman et al. 2024, arXiv 2405.09673"),
    "simple": Rule("simple tasks, such as classification", "r = 4 to 8",
                   "Hu et al. 2021, arXiv 2106.09685, section 7.2"),
    "complex": Rule("complex tasks: instructions or texts, more than 10,000 rows", "r = 32 to 64",
                    "Biderman et al. 2024, arXiv 2405.09673"),
    "alpha": Rule("always, for LoRA", "lora_alpha = 2 r", "Biderman et al. 2024, arXiv 2405.09673"),
    "targets": Rule("always, for LoRA", "all linear layers", "Dettmers et al. 2023, arXiv 2305.14314"),
    "many-tasks": Rule("many tasks on one base (--goal many-tasks)", "adapters that merge or route",
                       "Hu et al. 2021, arXiv 2106.09685"),
    "latency": Rule("latency counts (--goal latency)", "a method that merges into the base",
                    "Hu et al. 2021, arXiv 2106.09685"),
    "memory": Rule("memory counts (--goal memory)", "QLoRA with recomputed activations, one row to a pass",
                   "Dettmers et al. 2023, arXiv 2305.14314; Chen et al. 2016, arXiv 1604.06174"),
    "rate": Rule("LoRA on a base of 30 billion parameters and more", "learning rate 1e-4",
                 "Dettmers et al. 2023, arXiv 2305.14314"),
}  # fmt: skip
"""Rules by name; docs/recommend.md has the same table."""

Basis = Literal["measured", "rule", "planned", "default"]


@dataclass(frozen=True)
class Statement:
    """One setting and its reason."""

    setting: str
    value: Any
    reason: str
    basis: Basis
    source: str
    """A comparison.json with its rows and seeds, a paper, or what was planned."""


@dataclass(frozen=True)
class Alternative:
    """A next choice, and what it takes beside the recommended one."""

    label: str
    peak: int | None
    run_seconds: float | None
    fits: bool | None
    words: str


@dataclass(frozen=True)
class Recommendation:
    """What to take, why, and what it would cost to be wrong."""

    model: str
    objective: str
    parameters: int
    rows: int | None
    """Training rows; None where they are not known."""
    goal: str
    memory: int
    machine: str | None
    method: str
    statements: list[Statement]
    peak: int
    """Bytes that the run takes at most."""
    run_seconds: float | None
    alternatives: list[Alternative]
    yielded: list[str]
    """Rules that a measurement contradicts, or that the plan makes needless."""
    evidence: list[str]
    """The comparisons that were used or looked at."""
    notes: list[str]
    settings: list[str]
    """The recommended settings as `key=value`."""
    recipe: dict[str, Any] | None
    """The whole recipe; None where only a model was given."""


Watch = Callable[[str, float], None]


@dataclass(frozen=True)
class _Case:
    """What is decided upon."""

    recipe: Recipe | None
    model: str
    objective: str
    rows: int | None
    given: Mapping[str, Any]
    """Settings of a model without a recipe."""
    parameters: int
    memory: int
    machine: Machine | None
    goal: str

    def plan(self, settings: Sequence[str], memory: int | None, watch: Watch | None = None) -> Plan:
        """What a run with these settings takes."""
        if self.recipe is not None:
            return plan_recipe(self.applied(settings), None, memory, self.machine, watch)
        return plan_model(self.model, None, override(self.given, Recipe, settings), memory, self.machine, watch)

    def applied(self, settings: Sequence[str]) -> Recipe:
        """The recipe with these settings."""
        assert self.recipe is not None
        return Recipe.parse(override(self.recipe.resolved(), Recipe, settings))

    def seconds(self, found: Plan) -> float | None:
        """Time of a run: the plan's, or that of two passes over `rows` where it was planned without data."""
        estimate = found.estimates[0]
        if self.recipe is not None or self.rows is None or estimate.step_seconds is None:
            return estimate.run_seconds
        effective = found.settings["micro_batch"] * found.settings["accumulation"]
        training = Recipe.parse({"model": self.model, "data": "rows"} | _training(self.given)).training
        steps = -(-self.rows // effective) * training.num_train_epochs
        return float(estimate.step_seconds * min(steps, training.max_steps or steps))


def _training(given: Mapping[str, Any]) -> dict[str, Any]:
    return {"data": {"train": "rows"}} | ({"training": given["training"]} if "training" in given else {})


@dataclass
class _Choice:
    """A method and its settings on the way to a recommendation."""

    method: Method
    quantization: str | None
    training: dict[str, Any] = field(default_factory=dict)
    told: dict[str, Statement] = field(default_factory=dict)

    def say(self, setting: str, value: Any, reason: str, basis: Basis, source: str) -> None:
        self.told[setting] = Statement(setting, value, reason, basis, source)

    def rule(self, setting: str, value: Any, name: str, more: str = "") -> None:
        rule = RULES[name]
        self.say(setting, value, f"{rule.when}: {rule.says}{more}", "rule", rule.source)

    @property
    def settings(self) -> list[str]:
        """As assignments to a recipe."""
        own = self.method.model_dump(mode="json", exclude_defaults=True)
        lines = [f"method={self.method.name}", f"quantization={_yaml(self.quantization)}"]
        lines += [f"method.{key}={_yaml(value)}" for key, value in own.items()]
        return lines + [f"training.{key}={_yaml(value)}" for key, value in self.training.items()]


def _yaml(value: Any) -> str:
    import json

    return json.dumps(value)


def recommend(
    recipe: Recipe | None = None,
    *,
    memory: int,
    model: str | None = None,
    rows: int | None = None,
    settings: Mapping[str, Any] | None = None,
    machine: Machine | None = None,
    goal: str = "quality",
    runs: Path | None = None,
    watch: Watch | None = None,
) -> Recommendation:
    """The method and settings for a recipe's model, data and objective, or for a `model` by name with `rows` rows.

    The recipe's own method and quantization are not looked at: they are what is decided. `runs`: a folder whose
    comparisons count before rules. Raises `UsageError` for an unknown goal or model, `ResourceError` where
    nothing fits.
    """
    case = _case(recipe, model, rows, settings or {}, memory, machine, goal)
    found, notes = gather(runs, case.model, case.objective) if runs is not None else ([], [])
    yielded: list[str] = []
    choice = _by_rules(case, yielded)
    evidence = [one for one in found if _allowed(one, case)]
    if evidence:
        choice = _by_measurement(case, evidence[0], choice, yielded)
    plan, settings_, told = _fitting(case, choice, watch)
    estimate = plan.estimates[0]
    others = _alternatives(case, settings_, plan, evidence, watch)
    looked = [one.words if one in evidence else f"{one.words}: nothing in it is for this goal" for one in found]
    return Recommendation(
        case.model, case.objective, case.parameters, case.rows, goal, memory, plan.machine, estimate.label,
        told, estimate.peak, case.seconds(plan), others, yielded, looked, [*notes, *plan.notes], settings_,
        None if recipe is None else case.applied(settings_).resolved(),
    )  # fmt: skip


def _case(
    recipe: Recipe | None,
    model: str | None,
    rows: int | None,
    settings: Mapping[str, Any],
    memory: int,
    machine: Machine | None,
    goal: str,
) -> _Case:
    if goal not in GOALS:
        raise UsageError(f"no goal {goal!r}", nearest(goal, GOALS))
    if (recipe is None) == (model is None):
        raise UsageError("give one of a recipe and a model's name", "see graft recommend --help")
    if rows is not None and (recipe is not None or rows < 1):
        raise UsageError(
            "--rows goes with --model: a recipe's data say how many there are" if recipe else "--rows is 1 at least",
            "leave it out" if recipe else "give the number of training rows",
        )
    name = recipe.model if recipe is not None else str(model)
    kind = FAMILIES[config_of(name).model_type].kind
    if recipe is not None:
        reason = recipe.objective.refuses(FAMILIES[config_of(name).model_type])
        if reason is not None:
            raise UsageError(f"{name}: {reason}", "choose another base or objective")
        objective, rows = recipe.objective.name, len(recipe.objective.load(recipe.data).train)
        return _Case(recipe, name, objective, rows, {}, _parameters(name), memory, machine, goal)
    objective = {"decoder": "instruct"}.get(kind, "classify")
    default = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 8}
    training = settings.get("training", {})
    given = {"objective": objective, **settings}
    if isinstance(training, Mapping):
        given["training"] = default | {Training.aliases.get(key, key): value for key, value in training.items()}
    chosen = given["objective"]
    objective = chosen if isinstance(chosen, str) else str(chosen.get("name", objective))
    return _Case(None, name, objective, rows, given, _parameters(name), memory, machine, goal)


def _parameters(model: str) -> int:
    entry = find(model)
    if entry is not None:
        return entries()[entry.name].parameters
    return sum(tensor.numel() for tensor in skeleton(config_of(model)).parameters())


# Rules -----------------------------------------------------------------------------------------------


def _by_rules(case: _Case, yielded: list[str]) -> _Choice:
    """What the rules of the field say."""
    if case.goal == "quality" and (case.rows or 0) > MOST:
        choice = _Choice(read_method("full"), None)
        choice.rule("method", "full", "most-rows")
        choice.say("quantization", None, "full fine-tuning trains the base's own weights", "default", "Graft")
        return _rates(case, choice)
    rank, names = _rank(case)
    method = read_method({"name": "lora", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["all-linear"]})
    choice = _Choice(method, None)
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


def _memory_rule(case: _Case) -> str:
    if case.memory <= SMALL:
        return "small" if 2 * case.parameters > case.memory / 2 else "small-rank"
    return "large" if case.memory >= LARGE else "middle"


def _rank(case: _Case) -> tuple[int, list[str]]:
    """The rank, and the rules that give it, the deciding one last."""
    if case.memory <= SMALL or case.goal == "memory":
        return 8, ["simple" if case.objective == "classify" else "small-rank"]
    if case.objective == "classify":
        return 8, ["simple"]
    if (case.rows or 0) > 10_000:
        return 32, ["complex"]
    return 16, ["large" if case.memory >= LARGE else "middle"]


def _rates(case: _Case, choice: _Choice) -> _Choice:
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
        effective = _effective(case)
        choice.training = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": effective,
                           "gradient_checkpointing": True}  # fmt: skip
        for name, value in choice.training.items():
            choice.rule(name, value, "memory")
    return choice


def _effective(case: _Case) -> int:
    if case.recipe is not None:
        training = case.recipe.training
    else:
        training = Recipe.parse({"model": case.model} | _training(case.given)).training
    return training.per_device_train_batch_size * training.gradient_accumulation_steps


# Measurements ----------------------------------------------------------------------------------------


def _suits(method: Method, goal: str) -> bool:
    """Whether a method serves a goal."""
    if goal == "latency":
        return method.mergeable
    return not (goal in ("many-tasks", "memory") and method.in_place)


def _candidates(one: Evidence, case: _Case) -> list[Measured]:
    return [row for row in one.methods if _suits(row.method, case.goal)]


def _allowed(one: Evidence, case: _Case) -> bool:
    return bool(_candidates(one, case))


def _by_measurement(case: _Case, one: Evidence, ruled: _Choice, yielded: list[str]) -> _Choice:
    """What a comparison says, where the rules' method stays if it is among the best."""
    among = _candidates(one, case)
    best = max(among, key=lambda row: row.quality)
    ties = one.tied(best, among)
    same = [row for row in ties if row.method.name == ruled.method.name]
    pick = _picked(case, same or ties)
    choice = _Choice(pick.method, ruled.quantization, dict(ruled.training), dict(ruled.told))
    quality = f"{pick.label}: {one.metric} {100 * pick.quality:.1f} % ({100 * pick.low:.1f} to {100 * pick.high:.1f})"
    rest = [row.label for row in ties if row is not pick]
    beside = f"; no clear difference from {_few(rest)}" if rest else "; clearly better than the others"
    choice.say("method", pick.method.name, quality + beside, "measured", one.words)
    if not same:
        yielded.append(_contradiction(one, ruled, pick, among))
    own = pick.method.model_dump(mode="json")
    for setting in ("r", "lora_alpha", "target_modules", "learning_rate"):
        choice.told.pop(setting, None)
        if setting not in own or (setting == "target_modules" and own[setting] is None):
            continue
        choice.say(setting, own[setting], f"as it was measured in {pick.label}", "measured", one.words)
        before = ruled.told.get(setting)
        if before is not None and before.basis == "rule" and before.value != own[setting]:
            yielded.append(f"{setting} = {before.value} by rule: {own[setting]} is what was measured")
    if pick.method.in_place:
        choice.quantization = None
        choice.say("quantization", None, f"{pick.method.name} trains the base's own weights", "default", "Graft")
    elif choice.quantization != one.quantization:
        kept = choice.told["quantization"]
        there = "was measured on a base in " + (one.quantization or "16 or 32 bits")
        choice.told["quantization"] = replace(kept, reason=f"{kept.reason}; {pick.label} {there}")
    return choice


def _picked(case: _Case, ties: list[Measured]) -> Measured:
    """Of methods without a clear difference, that which serves the goal best; for quality the highest."""
    if case.goal == "memory" and all(row.memory is not None for row in ties):
        return min(ties, key=lambda row: row.memory or 0)
    if case.goal == "latency" and all(row.latency is not None for row in ties):
        return min(ties, key=lambda row: row.latency or 0.0)
    return ties[0]


def _contradiction(one: Evidence, ruled: _Choice, pick: Measured, among: list[Measured]) -> str:
    name = ruled.method.name
    rivals = sorted((row for row in among if row.method.name == name), key=lambda row: -row.quality)
    if not rivals:
        return f"method = {name} by rule: it was not measured in {one.file}, and {pick.label} was"
    found = one.verdict(pick.label, rivals[0].label)
    said = "" if found is None else f" by {100 * found[1]:.1f} points ({100 * found[2]:.1f} to {100 * found[3]:.1f})"
    return f"method = {name} by rule: {pick.label} was measured better than {rivals[0].label}{said}, {one.words}"


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# What fits -------------------------------------------------------------------------------------------


def _fitting(case: _Case, choice: _Choice, watch: Watch | None) -> tuple[Plan, list[str], list[Statement]]:
    """The plan of a choice, with the change that makes it fit."""
    settings = choice.settings
    plan = case.plan(settings, case.memory, watch)
    first = plan.estimates[0]
    if first.error is not None:
        raise UsageError(f"{first.label} cannot be used on {case.model}: {first.error}")
    changes: dict[str, str] = {}
    if first.fits is False:
        if first.change is None:
            least = first.changed_peak or first.peak
            raise ResourceError(
                f"nothing fits: {case.model} takes {size(least)} at least, {size(least - case.memory)} too much",
                "take a smaller model, or more memory (--memory, --device)",
            )
        changes = dict(part.split("=", 1) for part in first.change.split())
        if "method" in changes:  # the settings of another method are none of its own
            settings = [line for line in settings if not line.startswith("method.")]
            for setting in ("r", "lora_alpha", "target_modules", "learning_rate"):
                choice.told.pop(setting, None)
        settings = _replaced(settings, changes)
        plan = case.plan(settings, case.memory, watch)
        if plan.estimates[0].fits is not True:
            raise ResourceError(f"{first.change} was to make it fit, and does not", "give more memory (--memory)")
    estimate = plan.estimates[0]
    reason = (
        f"without it {size(first.peak)}, with {'this' if len(changes) < 2 else 'all changes'} {size(estimate.peak)}"
    )
    for name, value in changes.items():
        choice.say(name, value, f"makes it fit: {reason}", "planned", "graft plan")
    told = plan.settings
    for name, value in (("per_device_train_batch_size", told["micro_batch"]),
                        ("gradient_accumulation_steps", told["accumulation"]),
                        ("gradient_checkpointing", told["gradient_checkpointing"])):  # fmt: skip
        if name not in choice.told:
            choice.say(
                name, value, f"fits as it is: {size(estimate.peak)} of {size(case.memory)}", "planned", "graft plan"
            )
    return plan, settings, list(choice.told.values())


def _replaced(settings: Sequence[str], changes: Mapping[str, str]) -> list[str]:
    kept = [line for line in settings if line.partition("=")[0].rpartition(".")[2] not in changes]
    return kept + [f"{name}={value}" for name, value in changes.items()]


def _alternatives(
    case: _Case, settings: Sequence[str], plan: Plan, evidence: Sequence[Evidence], watch: Watch | None
) -> list[Alternative]:
    """The next choices, planned as they are, in passes of the same size."""
    chosen, seconds = plan.estimates[0], case.seconds(plan)
    found = []
    for label, others in _next(case, settings, plan)[:ALTERNATIVES]:
        try:
            planned = case.plan(others, None, watch)
        except UsageError as error:
            found.append(Alternative(label, None, None, None, str(error)))
            continue
        estimate, time = planned.estimates[0], case.seconds(planned)
        if estimate.error is not None:
            found.append(Alternative(label, None, None, None, estimate.error))
            continue
        fits = estimate.peak <= case.memory
        words = f"{size(estimate.peak)}, {_signed(estimate.peak - chosen.peak)} beside {size(chosen.peak)}"
        if time is not None and seconds:
            words += f"; {time / seconds:.2g} times its time"
        words += "" if fits else "; does not fit"
        words += _measured_gap(label, chosen.label, evidence)
        found.append(Alternative(label, estimate.peak, time, fits, words))
    return found


_OWN = ("method", "quantization")


def _next(case: _Case, settings: Sequence[str], plan: Plan) -> list[tuple[str, list[str]]]:
    """Labels and settings of what else might be taken."""
    label, quantization = plan.estimates[0].label, plan.settings["quantization"]
    rest = [line for line in settings if line.partition("=")[0].split(".")[0] not in _OWN]
    bits = f"quantization={_yaml(quantization)}"
    options: list[tuple[str, list[str]]] = []
    if (case.rows or 0) > MANY and label != "adalora":
        options.append(("adalora", ["method=adalora", bits, *rest]))
    if label != "lora":
        options.append(("lora", ["method=lora", "target_modules=[all-linear]", bits, *rest]))
    elif quantization is None:
        options.append(("lora on nf4", _replaced(settings, {"quantization": "nf4"})))
    else:
        options.append(("lora in 16 bits", _replaced(settings, {"quantization": "null"})))
    if label != "full" and _suits(read_method("full"), case.goal):
        options.append(("full", ["method=full", "quantization=null", *rest]))
    elif label != "dora":
        options.append(("dora", ["method=dora", bits, *rest]))
    return options


def _measured_gap(label: str, chosen: str, evidence: Sequence[Evidence]) -> str:
    if not evidence:
        return ""
    verdict = evidence[0].verdict(label, chosen)
    if verdict is None:
        return ""
    outcome, difference, low, high = verdict
    said = "no clear difference in quality" if outcome == "tie" else f"measured {outcome}"
    return f"; {said} ({100 * difference:+.1f} points, {100 * low:.1f} to {100 * high:.1f})"


def size(count: int) -> str:
    """Bytes in GB or MB of 2**30 and 2**20."""
    return f"{count / 2**30:.1f} GB" if abs(count) >= 2**30 else f"{count / 2**20:.0f} MB"


def _signed(count: int) -> str:
    return f"{'+' if count >= 0 else '−'}{size(abs(count))}"
