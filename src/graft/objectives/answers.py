"""Log-probabilities of answers, for objectives that compare them."""

from collections.abc import Sequence

from torch import Tensor

from graft.alignment.logprobs import token_logps
from graft.alignment.shared import Row, shared_states
from graft.model import Base
from graft.objectives.causal import collate
from graft.parts.attach import hidden_states
from graft.routing import Entry


def answer_logps(base: Base, rows: Sequence[Row], entry: Entry, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log π at the trained tokens [tokens] in the rows' order, and the targets [B, S] that they stand at.

    A prompt that several rows begin with is read once, and S is then that of the answers.
    """
    shared = shared_states(base, rows, entry)
    if shared is not None:
        states, targets = shared
    else:
        batch, targets = collate(base, rows)
        states = hidden_states(base, batch, entry).last
    return token_logps(base, states, targets, entry, temperature), targets
