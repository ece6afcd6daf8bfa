"""Log-probabilities of the tokens that are trained, under a route."""

import torch
from torch import Tensor

from graft.engine.loss import chunked_losses
from graft.model import Base
from graft.routing import Entry


def token_logps(base: Base, states: Tensor, targets: Tensor, entry: Entry, temperature: float = 1.0) -> Tensor:
    """log π at every target that is not -100, fp32 [tokens] in the rows' order, from hidden states [B, S, d].

    The scores of the vocabulary are made at these positions only, in chunks; where something trains at the head, at
    once. `temperature` divides them, as it did when the tokens were drawn.
    """
    known = targets != -100
    head = base.select("head")[0].leave
    words = int(base.config.vocab_size)

    def score(part: Tensor) -> Tensor:
        return base.logits(part[None])[0] / temperature

    with base.route(entry):
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in head.parameters()):
            return -torch.nn.functional.cross_entropy(score(states[known]), targets[known], reduction="none")
        return -chunked_losses(states[known], targets[known], score, words)


def row_sums(values: Tensor, targets: Tensor) -> Tensor:
    """Values of tokens [tokens] added up by row, [B]; a row without any gets 0."""
    rows = (targets != -100).nonzero()[:, 0]
    return torch.zeros(targets.shape[0], dtype=values.dtype, device=values.device).index_add(0, rows, values)


def row_counts(targets: Tensor) -> Tensor:
    """Tokens that are trained of each row, [B], at least 1."""
    return (targets != -100).sum(dim=1).clamp(min=1)
