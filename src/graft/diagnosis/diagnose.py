"""All detectors over one run."""

from collections.abc import Callable, Sequence

from graft.diagnosis import aligned, broken, fit, outcome
from graft.diagnosis.curve import LEVELS, Curve, Finding

Detector = Callable[[Curve], Finding | None]

STOPPING: tuple[Detector, ...] = (
    broken.not_finite, broken.zero_loss, broken.no_gradient, broken.divergence, broken.no_descent,
    aligned.margin_stays, aligned.constant_reward,
)  # fmt: skip
"""Those that can stop a run."""

WATCHING: tuple[Detector, ...] = (
    fit.rate_outside, fit.overfit, fit.long_warmup, broken.exploding, broken.spike, outcome.one_label,
    outcome.never_ends, aligned.runs_away, aligned.silent_groups, aligned.entropy_collapse,
)  # fmt: skip
"""Those that a run is warned by while it trains."""

DETECTORS: tuple[Detector, ...] = (
    outcome.ended_early, *STOPPING, outcome.one_label, outcome.one_answer, outcome.no_gain, outcome.never_ends,
    aligned.runs_away, aligned.silent_groups, aligned.entropy_collapse, broken.exploding, fit.rate_outside,
    fit.overfit, outcome.forgetting, outcome.rows_lost, outcome.few_tokens, broken.spike, broken.clipped,
    fit.underfit, fit.few_steps, fit.long_warmup, fit.few_validation_rows,
    outcome.memory_above, outcome.slow_evaluation, outcome.not_compiled, outcome.unreadable_lines,
)  # fmt: skip
"""Every detector, the most serious first."""


def diagnose(curve: Curve, detectors: Sequence[Detector] = DETECTORS) -> list[Finding]:
    """What the figures of a run say, the most serious first."""
    found = [finding for detect in detectors if (finding := detect(curve)) is not None]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))
