"""Supervised fine-tuning on dialogues: the model learns to say what the assistant said, and to stop there."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from transformers import PreTrainedTokenizerBase

from graft.data.dialogue import Dialogue
from graft.data.load import Unit
from graft.errors import DataError
from graft.generate import Answer, answer_all
from graft.model import Base
from graft.objectives.base import Report, Result, Say, silent
from graft.objectives.causal import Causal, row_figures
from graft.objectives.templated import Templated
from graft.rendering.supervise import supervise
from graft.routing import Entry
from graft.scorers import default_scorer, read_scorer

_LONGEST_ANSWER = 512
"""Tokens generated at most when the recipe does not say."""

_THOUGHT = "</think>"
"""Ends what a reasoning model writes before its answer."""

_SHORTEST_LIMIT = 32
"""A limit is not below this: an untuned model that answers in a sentence should be able to finish it."""


def _has_reference(dialogue: Dialogue) -> bool:
    """Whether a model's answer can be graded: not where the last turn only calls tools, or is not to be trained."""
    last = dialogue.messages[-1]
    return bool(last.content.strip()) and last.train is not False


@dataclass(frozen=True, slots=True)
class Turn:
    """A dialogue as ids; `prompt` of them stand before its last answer."""

    ids: Sequence[int]
    trained: Sequence[int]
    prompt: int
    dialogue: Dialogue

    @property
    def place(self) -> str:
        """For errors."""
        return self.dialogue.place

    def __len__(self) -> int:
        return len(self.ids)


class Instruct(Templated, Causal):
    """Dialogues through the model's chat template, with the loss on what the assistant says.

    Quality is that of the answers the model writes itself, greedily, graded by `scorer`.
    """

    name: ClassVar[str] = "instruct"
    unit: ClassVar[Unit] = "dialogue"

    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens have a loss: every turn of the assistant, the last one, or all."""

    scorer: str | None = None
    """How answers are graded: exact_match, contains, token_f1, rougeL, bleu, chrf, json_valid, regex:PATTERN, or task,
    the checker of a starter task; task where all rows have one, else exact_match, when left out."""

    max_new_tokens: int | None = Field(default=None, ge=1, le=8192)
    """Longest answer in evaluation; a quarter more than the longest reference, within 32 and 512, when left out."""

    generated_rows: int = Field(default=64, ge=1)
    """Validation rows that are answered at each evaluation within a run; at its end all test rows are."""

    allow_dropped: bool = False
    """Go on although more than 5 % of the rows train nothing."""

    aliases: ClassVar[dict[str, str]] = Causal.aliases | {
        "template": "chat_template",
        "train_on_inputs": "train_on",
        "assistant_only_loss": "train_on",
    }

    @model_validator(mode="before")
    @classmethod
    def _read_flags(cls, given: Any) -> Any:
        """`train_on_inputs` and `assistant_only_loss` are how other tools spell `train_on`."""
        flags = {"train_on_inputs": ("all", "assistant"), "assistant_only_loss": ("assistant", "all")}
        if not isinstance(given, Mapping):
            return given
        told = {key: values[not given[key]] for key, values in flags.items() if isinstance(given.get(key), bool)}
        return {**given, **told}

    @field_validator("scorer")
    @classmethod
    def _known_scorer(cls, name: str | None) -> str | None:
        if name is not None:
            read_scorer(name)
        return name

    @property
    def metric(self) -> str:
        """The scorer's name."""
        return self.scorer or "answers right"

    def examples(
        self,
        rows: Sequence[Dialogue],
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        max_length: int,
        say: Say = silent,
    ) -> list[Turn]:
        """Dialogues as the model sees them. Raises `DataError` when more than 5 % of them would train nothing."""
        renderer = self.renderer(tokenizer)
        kept, preflight = supervise(renderer, rows, max_length, self.train_on)
        for line in preflight.lines():
            say(line)
        preflight.check(self.allow_dropped)
        if not any(_has_reference(rows[row.row]) for row in kept):
            raise DataError(
                f"none of {len(rows):,} rows, first {rows[0].place}, ends with an answer in words to grade a model by",
                "give rows whose last turn is an answer that may be trained",
            )
        return [Turn(row.ids, row.trained, row.prompt, rows[row.row]) for row in kept]

    def evaluate(
        self,
        base: Base,
        examples: Sequence[Turn],
        entry: Entry,
        batch_size: int,
        report: Report | None = None,
        quick: bool = False,
    ) -> Result:
        """The loss of all rows, and the score of the answers that are generated for them (for the first
        `generated_rows` with `quick`).
        """
        figures = row_figures(base, examples, entry, batch_size)
        asked = [turn for turn in examples if _has_reference(turn.dialogue)]
        asked = asked[: self.generated_rows] if quick else asked
        answers = self.answers(base, asked, entry, batch_size, report)
        assert base.tokenizer is not None
        written = [str(base.tokenizer.decode(answer.ids, skip_special_tokens=True)) for answer in answers]
        rows = [turn.dialogue for turn in asked]
        # What a model thinks before it answers is not its answer.
        said = [text.rpartition(_THOUGHT)[2].lstrip() for text in written]
        scorer = read_scorer(self.scorer) if self.scorer else default_scorer(rows)
        scores = scorer.items(said, rows)
        further = {"perplexity": figures.perplexity, "ended": sum(a.ended for a in answers) / len(answers)}
        whole = scorer.corpus(said, rows)
        if whole is not None:
            further[f"corpus_{scorer.name}"] = whole
        samples = [
            {"place": turn.place, "prompt": turn.dialogue.prompt[-1].content, "reference": turn.dialogue.answer,
             "answer": text, "ended": answer.ended, "score": score}
            for turn, text, answer, score in zip(asked, written, answers, scores, strict=True)
        ]  # fmt: skip
        return Result(sum(scores) / len(scores), figures.mean_loss, scores, further, samples, figures.batch_size)

    def longest_answer(self, examples: Sequence[Turn]) -> int:
        """`max_new_tokens`, or a quarter more than the longest reference."""
        longest = max(len(turn) - turn.prompt for turn in examples)
        return self.max_new_tokens or min(_LONGEST_ANSWER, max(_SHORTEST_LIMIT, math.ceil(1.25 * longest)))

    def answers(
        self, base: Base, turns: Sequence[Turn], entry: Entry, batch_size: int, report: Report | None = None
    ) -> list[Answer]:
        """What the model answers to the prompt of each row."""
        assert base.tokenizer is not None
        return answer_all(
            base,
            [list(turn.ids[: turn.prompt]) for turn in turns],
            entry,
            batch_size=batch_size,
            max_new_tokens=self.longest_answer(turns),
            stop_ids=self.renderer(base.tokenizer).stop_ids,
            progress=None if report is None else lambda share: report("answering", share),
        )
