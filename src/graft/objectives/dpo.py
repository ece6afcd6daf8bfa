"""Direct preference optimization and its variants: a policy learns from pairs which answer to prefer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from graft.alignment import losses
from graft.alignment.logprobs import row_counts, row_sums
from graft.alignment.pairs import Judged, Pair, Side, read_answers, sides
from graft.alignment.reference import (
    as_evaluated,
    is_simulated,
    reference,
    refuse_in_place,
    require_reference,
    start_from,
    starts_as_reference,
)
from graft.data.batch import evaluation_batches
from graft.data.dialogue import Graded, Preference
from graft.data.load import Unit
from graft.errors import DataError, GuardError
from graft.generate import answer_all
from graft.model import Base
from graft.objectives.answers import answer_logps
from graft.objectives.base import Loss, Report, Result, Say, silent
from graft.objectives.templated import Templated
from graft.parts.base import Adapter
from graft.routing import Entry, Route

Variant = Literal["sigmoid", "ipo", "kto", "orpo", "simpo"]

_SAMPLES = 3
"""Prompts that are answered at each evaluation: the same ones each time."""
_SAMPLE_TOKENS = 48
_BY_STEP = 10
"""Steps after which the margin must have moved."""
_SMALLEST = 1e-6

Answers = Sequence[Pair | Judged]


class Dpo(Templated):
    """Raises the probability of better answers and lowers that of worse ones, against a reference.

    Quality is the share of held-out pairs whose better answer gained more probability than the worse one.
    """

    name: ClassVar[str] = "dpo"
    unit: ClassVar[Unit] = "preference"
    max_length: ClassVar[int] = 1024
    compiles: ClassVar[bool] = False
    aliases: ClassVar[dict[str, str]] = {"loss_type": "variant", "pref_loss": "variant", "pref_beta": "beta",
                                          "rpo_alpha": "learn_weight", "pref_ftx": "learn_weight"}  # fmt: skip

    variant: Variant = "sigmoid"
    """sigmoid (DPO), ipo, kto (also from single answers that are good or bad), orpo (no reference, learns the better
    answer as well), simpo (no reference, by mean log-probability)."""

    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is held to the reference: the larger, the closer. For orpo the weight of the preference
    beside learning the answer; for simpo the scale, usually 2 to 10."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs that are taken to be the wrong way round; sigmoid only."""

    learn_weight: float = Field(default=0.0, ge=0)
    """sigmoid: weight of learning the better answer, by its mean loss a token, beside preferring it (Pang et al. 2024,
    arXiv 2404.19733). Without, both answers can lose probability as long as the worse one loses more."""

    simpo_gamma: float = Field(default=0.5, ge=0)
    """simpo: how far apart the two answers should be."""

    desirable_weight: float = Field(default=1.0, gt=0)
    """kto: weight of good answers; with fewer of them, more."""

    undesirable_weight: float = Field(default=1.0, gt=0)
    """kto: weight of bad answers."""

    init: str | None = None
    """A run to start from, such as a supervised one: its adapter is trained on, and is the reference. When left out,
    a fresh adapter is trained against the plain base."""

    _keys: list[int] = PrivateAttr(default_factory=list)
    _known: dict[int, float] = PrivateAttr(default_factory=dict)
    _kl: float = PrivateAttr(default=0.0)
    _seen: list[tuple[float, float]] = PrivateAttr(default_factory=list)
    _moved: bool = PrivateAttr(default=False)

    @model_validator(mode="before")
    @classmethod
    def _own_beta(cls, given: Any) -> Any:
        """simpo's values of beta are of another size."""
        if not isinstance(given, dict) or {"beta", "pref_beta"} & given.keys():
            return given
        if "simpo" in (given.get(key) for key in ("variant", "loss_type", "pref_loss")):
            return given | {"beta": 2.0}
        return given

    @property
    def metric(self) -> str:
        """Share of pairs that are right."""
        return "preference accuracy"

    @property
    def referenced(self) -> bool:
        """Whether the loss looks at a reference."""
        return self.variant not in ("orpo", "simpo")

    def examples(
        self,
        rows: Sequence[Preference | Graded],
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        max_length: int,
        say: Say = silent,
    ) -> list[Pair | Judged]:
        """Pairs as ids, and single answers for kto. Raises `DataError` for single answers with another variant."""
        alone = next((row for row in rows if isinstance(row, Graded)), None)
        if alone is not None and self.variant != "kto":
            raise DataError(f"{alone.place}: {self.variant} needs a better and a worse answer to each prompt",
                            "give pairs, or objective.variant=kto, which learns from single answers")  # fmt: skip
        kept = read_answers(rows, self.renderer(tokenizer), max_length, say)
        if kept and len({answer.good for answer in sides(kept)}) < 2:
            raise DataError(f"all {len(kept):,} answers, first {kept[0].place}, are judged alike",
                            "kto needs good and bad ones")  # fmt: skip
        return kept

    def prepare(self, base: Base, adapter: Adapter, labels: tuple[str, ...]) -> None:
        """The values to start from, and no dropout."""
        if self.referenced or self.init is not None:
            refuse_in_place(adapter, "a reference" if self.referenced else "`init`")
        if self.init is not None:
            start_from(self.init, base, adapter)
        as_evaluated(base.model, adapter)

    def begin(self, base: Base, adapter: Adapter, examples: Answers, say: Say = silent) -> None:
        """The policy has to be the reference exactly: margin 0, and for sigmoid a loss of ln 2."""
        self._known, self._seen, self._moved, self._kl = {}, [], False, 0.0
        self._keys = [id(answer.answer) for answer in sides(examples)]
        if not self.referenced or not starts_as_reference(adapter, self.init):
            return
        first = sides(list(examples[:2]))
        with torch.no_grad():
            mine, theirs = (_logps(base, first, way)[0] for way in (adapter.name, reference(self.init, base)))
        require_reference(mine, theirs, first[0].place)
        say("the policy is the reference: margins are 0" + (f", the loss is ln 2 = {math.log(2):.4f}"
            if self.variant == "sigmoid" and not self.label_smoothing + self.learn_weight else ""))  # fmt: skip

    def memory(self) -> dict[str, Tensor]:
        """What the reference says of the answers that were read (nan: not yet), and whether a margin moved."""
        # In other batches the reference's numbers differ in their last bits.
        known = torch.tensor([self._known.get(key, math.nan) for key in self._keys], dtype=torch.double)
        return {"reference": known, "moved": torch.tensor(self._moved)}

    def recall(self, kept: Mapping[str, Tensor]) -> None:
        """The same, put back."""
        said = zip(self._keys, kept["reference"].tolist(), strict=True)
        self._known = {key: value for key, value in said if not math.isnan(value)}
        self._moved = bool(kept["moved"])

    def collect(self, base: Base, examples: Answers, entry: Entry, size: int, again: bool) -> list[Pair | Judged]:
        """For kto, how far the policy is from the reference over the whole step: on answers to other prompts."""
        self._seen = []  # what a rehearsal left
        if self.variant == "kto":
            self._kl = self._distance(base, examples, entry, size)
        return list(examples)

    @torch.no_grad()
    def _distance(self, base: Base, examples: Answers, entry: Entry, size: int) -> float:
        """The mean of ρ, at least 0, with the answer of each row behind the prompt of the one before it."""
        answers = sides(examples)
        mixed = [_exchanged(answers[number - 1], answer) for number, answer in enumerate(answers)]
        found: list[Tensor] = []
        for start in range(0, len(mixed), size):
            part = mixed[start : start + size]
            theirs = _logps(base, part, reference(self.init, base))[0]
            found.append(_logps(base, part, entry)[0] - theirs)
        return max(0.0, float(torch.cat(found).mean()))

    def weight(self, examples: Answers) -> float:
        """The number of pairs; for kto that of answers."""
        return float(len(sides(examples)) if self.variant == "kto" else len(examples))

    def loss(self, base: Base, examples: Answers, route: Entry | Route) -> Loss:
        """The variant's loss, summed over the rows."""
        assert not isinstance(route, Route)
        answers = sides(examples)
        sums, counts = _logps(base, answers, route)
        pairs = sum(isinstance(example, Pair) for example in examples)
        known = self._reference(base, answers)
        each, gaps = self._losses(sums, counts, known, answers, pairs)
        if gaps is not None:
            self._seen += [(float(gap), float(gap > 0)) for gap in gaps.detach()]
        elif known is not None:  # single answers alone have no margin, but come away from the reference too
            self._moved = self._moved or float(self.beta * (sums.detach() - known).abs().max()) > _SMALLEST
        return Loss(each.sum(), self.weight(examples))

    def _reference(self, base: Base, answers: Sequence[Side]) -> Tensor | None:
        """Log-probabilities of the reference [answers]. It never changes, so they are made once for each row."""
        if not self.referenced:
            return None
        keys = [id(answer.answer) for answer in answers]
        if not all(key in self._known for key in keys) or is_simulated(base):
            with torch.no_grad():
                found = _logps(base, answers, reference(self.init, base))[0]
            self._known |= dict(zip(keys, found.tolist(), strict=True)) if not is_simulated(base) else {}
            return found
        return torch.tensor([self._known[key] for key in keys], device=base.device)

    def _losses(
        self, sums: Tensor, counts: Tensor, known: Tensor | None, answers: Sequence[Side], pairs: int
    ) -> tuple[Tensor, Tensor | None]:
        """The loss of each pair, or of each answer for kto, and how much further apart a pair is than at the start
        (β times it: the margin of the rewards that the policy stands for); None without pairs.
        """
        ratio = sums - known if known is not None else sums / counts
        if self.variant == "kto":
            good = torch.tensor([answer.good for answer in answers], device=sums.device)
            weights = self.desirable_weight, self.undesirable_weight
            gaps = self.beta * (ratio[:pairs] - ratio[pairs : 2 * pairs]) if pairs else None
            return losses.kto(ratio, good, self._kl, self.beta, weights), gaps
        (chosen, rejected), mean = ratio.chunk(2), (ratio / counts).chunk(2)
        gaps = self.beta * (chosen - rejected)
        if self.variant == "ipo":
            return losses.ipo(mean[0], mean[1], self.beta), gaps
        if self.variant == "orpo":
            return self.beta * losses.odds_ratio(chosen, rejected) - chosen, gaps
        if self.variant == "simpo":
            return losses.simpo(chosen, rejected, self.beta, self.simpo_gamma), gaps
        learned = -(sums / counts).chunk(2)[0]
        return losses.dpo(chosen, rejected, self.beta, self.label_smoothing) + self.learn_weight * learned, gaps

    def after_step(self, step: int) -> dict[str, float]:
        """The margin and the accuracy of the step's pairs. Raises `GuardError` when the margin has not moved by step
        10: an alignment that does nothing looks like one that has not begun.
        """
        seen, self._seen = self._seen, []
        self._moved = self._moved or not self.referenced or any(abs(gap) > _SMALLEST for gap, _ in seen)
        if step >= _BY_STEP and not self._moved:
            raise GuardError(
                f"after step {step} no margin has moved from 0",
                "likely causes: a learning rate too small; sites that change nothing; a beta near 0",
            )
        told = {"kl": self._kl} if self.variant == "kto" else {}
        if not seen:
            return told
        margin = sum(gap for gap, _ in seen) / len(seen)
        return told | {"margin": margin, "accuracy": sum(right for _, right in seen) / len(seen)}

    @torch.no_grad()
    def evaluate(
        self,
        base: Base,
        examples: Answers,
        entry: Entry,
        batch_size: int,
        report: Report | None = None,
        quick: bool = False,
    ) -> Result:
        """Preference accuracy; equal margins, as those of the reference itself, count half. Single answers are right
        when a good one gained probability or a bad one lost some. A few prompts are answered to be looked at.
        """
        correct, margins = [0.0] * len(examples), [0.0] * len(examples)
        lengths = [len(example) for example in examples]
        loss = moved = 0.0
        batches = evaluation_batches(lengths, max(1, batch_size // 2))
        for number, rows in enumerate(batches):
            chosen = [examples[row] for row in rows]
            gaps, total, away = self._judge(base, chosen, entry)
            loss, moved = loss + total, moved + away
            for row, gap in zip(rows, gaps, strict=True):
                margins[row], correct[row] = gap, (gap > 0) / 2 + (gap >= 0) / 2
            if report:
                report("evaluating", (number + 1) / len(batches))
        figures = {"margin": sum(margins) / len(margins)}
        if self.referenced:
            figures["gained"] = moved / len(examples)
        samples = [] if is_simulated(base) else self._samples(base, examples, entry, batch_size)
        return Result(sum(correct) / len(correct), loss / self.weight(examples), correct, figures, samples)

    def _judge(self, base: Base, examples: Answers, entry: Entry) -> tuple[list[float], float, float]:
        """The margin of each row in its order, the sum of their losses, and that of what better answers gained."""
        answers = sides(examples)
        sums, counts = _logps(base, answers, entry)
        known = None
        if self.referenced:
            known = _logps(base, answers, reference(self.init, base))[0]
        pairs = sum(isinstance(example, Pair) for example in examples)
        each, _ = self._losses(sums, counts, known, answers, pairs)
        ratio = (self.beta * (sums - known if known is not None else sums / counts)).tolist()
        apart = [ratio[number] - ratio[number + pairs] for number in range(pairs)]
        single = zip(ratio[2 * pairs :], answers[2 * pairs :], strict=True)
        alone = [value if answer.good else -value for value, answer in single]
        given = {True: iter(apart), False: iter(alone)}
        gaps = [next(given[isinstance(example, Pair)]) for example in examples]
        good = [value for value, answer in zip(ratio, answers, strict=True) if answer.good]
        return gaps, float(each.sum()), sum(good) / self.beta

    def _samples(self, base: Base, examples: Answers, entry: Entry, batch_size: int) -> list[dict[str, Any]]:
        assert base.tokenizer is not None
        asked = examples[:_SAMPLES]
        answers = answer_all(
            base,
            [list(example.ids[: example.prompt]) for example in asked],
            entry,
            batch_size=batch_size,
            max_new_tokens=_SAMPLE_TOKENS,
            stop_ids=self.renderer(base.tokenizer).stop_ids,
        )
        read = base.tokenizer.decode
        return [
            {"place": example.place, "prompt": example.row.prompt[-1].content if example.row.prompt else "",
             "reference": str(read(list(example.ids[example.prompt :]), skip_special_tokens=True)),
             "answer": str(read(answer.ids, skip_special_tokens=True)), "ended": answer.ended}
            for example, answer in zip(asked, answers, strict=True)
        ]  # fmt: skip


def _logps(base: Base, answers: Sequence[Side], entry: Entry) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities of answers and the numbers of their tokens, [answers] each."""
    values, targets = answer_logps(base, answers, entry)
    return row_sums(values, targets), row_counts(targets)


def _exchanged(asked: Side, answer: Side) -> Side:
    """An answer behind the prompt of another row."""
    before, start = asked.answer.prompt, answer.answer.prompt
    ids = asked.answer.ids[:before] + answer.answer.ids[start:]
    trained = bytearray(before) + answer.answer.trained[start:]
    mixed = replace(answer.answer, ids=ids, trained=trained, prompt=before)
    return Side(mixed, answer.good, answer.place)
