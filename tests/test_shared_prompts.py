"""A prompt that several answers share is read once, and nothing else changes."""

from dataclasses import dataclass

import bases
import pytest
import torch
from test_causal import DECODERS

from graft.alignment.logprobs import token_logps
from graft.alignment.shared import shared_states
from graft.engine.compiled import layers_of
from graft.objectives.answers import answer_logps
from graft.objectives.causal import collate
from graft.parts.attach import adapter_of, hidden_states


@dataclass
class Answer:
    """An answer behind its prompt."""

    ids: list[int]
    prompt: int
    place: str = "row 1"
    untrained: int = 0

    @property
    def trained(self):
        return [0] * (self.prompt + self.untrained) + [1] * (len(self.ids) - self.prompt - self.untrained)

    def __len__(self):
        return len(self.ids)


LONG, SHORT, OTHER = [5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22], [30, 31, 32, 33, 34, 35, 36]
ROWS = [
    *(Answer(LONG + answer, len(LONG)) for answer in ([40, 2], [41, 42, 43, 2], [2])),
    *(Answer(SHORT + answer, len(SHORT)) for answer in ([50, 51, 2], [52])),
    *(Answer(OTHER + answer, len(OTHER), untrained=1) for answer in ([60, 61, 2], [62, 63, 2], [64, 65])),
]
ORDERS = {"in order": range(8), "by turns": (0, 3, 5, 1, 4, 6, 2, 7)}


def plain(base, rows, entry, temperature=1.0):
    given, targets = collate(base, rows)
    return token_logps(base, hidden_states(base, given, entry).last, targets, entry, temperature)


def gradients(base, values, entry):
    tensors = [tensor for _, tensor in adapter_of(base, entry).trainable()]
    weights = torch.linspace(-1, 2, len(values))
    return torch.autograd.grad((values * weights).sum(), tensors, allow_unused=True)


@pytest.mark.parametrize("method", bases.METHODS)
@pytest.mark.parametrize("family", DECODERS)
def test_values_and_gradients_are_those_of_whole_rows(family, method, monkeypatch):
    if method not in bases.suited(family):
        pytest.skip("not for this family")
    monkeypatch.setattr(bases, "WINDOW", 64)
    base = bases.make(family)
    entry = bases.put(base, method).name
    base.model.train()
    for order in ORDERS.values():
        rows = [ROWS[place] for place in order]
        shared = shared_states(base, rows, entry)
        assert (shared is None) == (method == "longlora")
        values, targets = answer_logps(base, rows, entry, 1.3)
        if shared is not None:
            assert targets.shape == (8, 4) == shared[0].shape[:2]
        expected = plain(base, rows, entry, 1.3)
        torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)
        found, wanted = gradients(base, values, entry), gradients(base, expected, entry)
        assert any(one is not None and one.abs().max() > 1e-3 for one in wanted)
        for one, other in zip(found, wanted, strict=True):
            if other is None:
                assert one is None or not one.any()
            else:
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_each_prompt_is_read_once():
    base = bases.make("llama")
    read = []
    base.body.register_forward_hook(
        lambda module, args, given, output: read.append(tuple(output[0].shape[:2])), with_kwargs=True
    )
    answer_logps(base, ROWS, None)
    assert read == [(3, len(LONG)), (8, 3)]
    read.clear()
    answer_logps(base, [Answer([*LONG, token], len(LONG)) for token in (2, 3)], None)  # predicted by the prompt alone
    assert read == [(1, len(LONG))]


@pytest.mark.parametrize(
    "case",
    ["nothing shared", "little shared", "prompts trained", "no prompt", "recomputed", "compiled", "a window", "t5"],
)
def test_rows_are_read_whole(case):
    base = bases.make({"a window": "mistral", "t5": "t5"}.get(case, "llama"))
    rows = {
        "nothing shared": [Answer([token, *LONG, 2], 9) for token in (3, 4, 5)],
        "little shared": [Answer([9, *answer], 1) for answer in (LONG, OTHER)],
        "prompts trained": [Answer([*LONG, token], len(LONG), untrained=-1) for token in (3, 4, 5)],
        "no prompt": [Answer(LONG, 0) for _ in range(3)],
    }.get(case, ROWS)
    if case == "recomputed":
        base.checkpoint_activations()
    if case == "compiled":
        for layer in layers_of(base):
            layer._compiled_call_impl = layer._call_impl
    assert shared_states(base, rows, None) is None
    if case != "t5":
        given, expected = answer_logps(base, rows, None)[0], plain(base, rows, None)
        assert torch.equal(given, expected)
