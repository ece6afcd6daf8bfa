"""Next-token objectives: loss at supervised tokens, packing, accumulation, row figures, pretraining pieces."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import bases
import pytest
import torch
from torch.nn import functional as F

from graft import Route, read_method
from graft.data.rows import Row
from graft.errors import DataError, UsageError
from graft.objectives.causal import collate, packed, row_figures
from graft.objectives.instruct import Instruct
from graft.objectives.pretrain import Pretrain
from graft.parts.attach import attach, hidden_states
from graft.train.loop import Trainer, make_accelerator
from graft.train.settings import Training

DECODERS = [name for name in bases.FACTORIES if bases.family_of(name).kind == "decoder"]
WINDOWED = ("mistral", "gemma3")
ATTENDING = {"prefix", "prompt", "ptuning", "ptuning_v2", "longlora", "mam"}


@dataclass(frozen=True)
class Line:
    ids: list[int]
    trained: list[int]
    place: str = "f:1"

    def __len__(self) -> int:
        return len(self.ids)


def lines(count: int = 8, seed: int = 0) -> list[Line]:
    """Rows of 2 to 13 tokens; the last third of each is trained. The pad token stands among them."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        size = 2 + (number * 5) % 12
        ids = torch.randint(0, bases.VOCABULARY, (size,), generator=generator).tolist()
        start = max(1, size - max(1, size // 3))
        found.append(Line(ids, [0] * start + [1] * (size - start)))
    return found


def reference(base, row: Line, entry: str | None) -> torch.Tensor:
    """Summed loss of one row alone, from all logits of the model as transformers gives them."""
    ids = torch.tensor([row.ids])
    with base.route(entry):
        logits = base.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].float()
    losses = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    return (losses * torch.tensor(row.trained[1:])).sum().detach()


@pytest.mark.parametrize("name", DECODERS)
def test_the_loss_is_that_of_each_row_alone(name):
    base = bases.make(name)
    bases.put(base, "lora", target_modules=["attn.q", "head"] if name == "llama" else None)
    rows = lines()
    alone = sum(float(reference(base, row, "lora")) for row in rows)
    loss = Instruct().loss(base, rows, "lora")
    assert float(loss.total.detach()) == pytest.approx(alone, abs=1e-4)
    assert loss.weight == sum(sum(row.trained[1:]) for row in rows)
    assert abs(total(Instruct(), base, rows, None) - alone) > 1e-2


def test_rows_of_a_batch_can_go_different_ways():
    base = bases.make("llama")
    bases.put(base, "lora")
    bases.put(base, "prefix")
    rows = lines(3)
    entries = ["lora", None, "prefix"]
    mixed = total(Instruct(), base, rows, Route.of(entries))
    assert mixed == pytest.approx(
        sum(float(reference(base, row, entry)) for row, entry in zip(rows, entries, strict=True)), abs=1e-4
    )


def test_padding_is_marked_by_position():
    base = bases.make("llama")
    rows = [Line([0, 5, 0, 0], [0, 0, 1, 1]), Line([3, 4], [0, 1])]
    batch, targets = collate(base, rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert targets.tolist() == [[-100, 0, 0, -100], [4, -100, -100, -100]]


def total(objective, base, rows, entry) -> float:
    return float(objective.loss(base, rows, entry).total.detach())


def gradients(base, adapter, objective, rows) -> list[torch.Tensor]:
    for _, parameter in adapter.trainable():
        parameter.grad = None
    loss = objective.loss(base, rows, adapter.name)
    (loss.total / loss.weight).backward()
    return [parameter.grad.clone() for _, parameter in adapter.trainable()]


@pytest.mark.parametrize("name", [name for name in DECODERS if name not in WINDOWED])
@pytest.mark.parametrize("method", sorted(set(bases.METHODS) - ATTENDING - {"peft"}))
def test_packed_rows_equal_unpacked_ones(name, method):
    base = bases.make(name)
    settings = bases.settings(method)
    adapter = read_method({"name": method} | settings).build(base, "tuned")
    attach(base, adapter)
    with torch.no_grad():
        for number, (_, parameter) in enumerate(adapter.trainable()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
    rows = lines()
    together = Instruct(packing=True)
    together.prepare(base, adapter, ())
    apart = Instruct()
    assert packed(base, rows)[0]["input_ids"].shape[0] == 1
    assert packed(base, rows, 20)[0]["input_ids"].shape[0] > 1
    assert total(together, base, rows, "tuned") == pytest.approx(total(apart, base, rows, "tuned"), rel=1e-5)
    pairs = zip(gradients(base, adapter, together, rows), gradients(base, adapter, apart, rows), strict=True)
    differences = [float((a - b).abs().max()) for a, b in pairs]
    assert differences
    assert max(differences) < 1e-5


@pytest.mark.parametrize("method", sorted(ATTENDING))
def test_packing_is_refused_where_a_method_needs_rows_of_its_own(method):
    base = bases.make("llama")
    adapter = read_method({"name": method} | bases.settings(method)).build(base, "tuned")
    with pytest.raises(UsageError, match=f"packing.*{method}"):
        Instruct(packing=True).prepare(base, adapter, ())


@pytest.mark.parametrize("name", WINDOWED)
def test_packing_is_refused_with_sliding_windows(name):
    base = bases.make(name)
    adapter = read_method({"name": "lora"} | bases.settings("lora")).build(base, "tuned")
    with pytest.raises(UsageError, match="within a window of 4"):
        Instruct(packing=True).prepare(base, adapter, ())


@pytest.mark.parametrize("packing", [False, True])
def test_accumulated_gradients_are_equal(packing):
    rows = lines(16)
    found = []
    for passes in (1, 2, 4, 8):
        base = bases.make("llama")
        adapter = bases.put(base, "lora")
        training = Training(
            per_device_train_batch_size=16 // passes, gradient_accumulation_steps=passes, max_grad_norm=1e9
        )
        trainer = Trainer(base, adapter, Instruct(packing=packing), training, 1e-3, 1, make_accelerator("fp32"))
        loss, _ = trainer.gradients(rows)
        found.append((loss, [parameter.grad.clone() for parameter in trainer.parameters()]))
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        assert max(float((a - b).abs().max()) for a, b in zip(grads, found[0][1], strict=True)) < 1e-5


def test_row_figures():
    base = bases.make("llama")
    rows = lines()
    figures = row_figures(base, rows, None, batch_size=3)
    for number, row in enumerate(rows):
        assert float(figures.loss[number]) == pytest.approx(float(reference(base, row, None)), abs=1e-4)
        assert int(figures.tokens[number]) == sum(row.trained[1:])
    total = sum(float(reference(base, row, None)) for row in rows) / sum(sum(row.trained[1:]) for row in rows)
    assert figures.mean_loss == pytest.approx(total, abs=1e-5)
    assert figures.perplexity == pytest.approx(math.exp(total), rel=1e-4)
    sure = [Line([3, word], [0, 1]) for word in range(bases.VOCABULARY)]
    assert int(row_figures(base, sure, None, batch_size=64).right.sum()) == 1


def test_no_logits_are_made_of_prompts():
    base = bases.make("llama")
    seen = []
    head = base.select("head")[0].leave
    handle = head.register_forward_hook(lambda module, args, out: seen.append(out.shape[:-1].numel()))
    rows = lines()
    Instruct().loss(base, rows, None)
    handle.remove()
    assert seen == [sum(sum(row.trained[1:]) for row in rows)]


def test_long_texts_are_cut_into_pieces_that_predict_each_token_once(monkeypatch):
    plain = SimpleNamespace(text=lambda text: list(range(10, 10 + len(text))))
    monkeypatch.setattr("graft.objectives.pretrain.Renderer", lambda tokenizer: plain)
    said = []
    texts = [Row("x" * size, None, None, str(size), f"f:{size}") for size in (1, 2, 5, 6, 17)]
    pieces = Pretrain().examples(texts, None, (), 5, said.append)
    assert [len(piece) for piece in pieces] == [2, 5, 5, 2, 5, 5, 5, 5]
    predicted = [token for piece in pieces for token, trained in zip(piece.ids, piece.trained, strict=True) if trained]
    assert sorted(predicted) == sorted(token for row in texts for token in range(11, 10 + len(row.text)))
    assert said[-1] == "1 texts of a single token train nothing"
    with pytest.raises(DataError, match="none of 1 texts has two tokens"):
        Pretrain().examples(texts[:1], None, (), 5)


def test_objectives_of_decoders_refuse_other_architectures():
    assert Instruct().refuses(bases.family_of("bert")) == "instruct needs a decoder, this is an encoder"
    assert Pretrain().refuses(bases.family_of("t5")) is not None
    assert Pretrain().refuses(bases.family_of("gpt2")) is None


def test_flags_of_other_tools():
    assert Instruct.parse({"train_on_inputs": True}).train_on == "all"
    parsed, notes = Instruct.parse_with_notes({"assistant_only_loss": True, "sample_packing": True})
    assert (parsed.train_on, parsed.packing) == ("assistant", True)
    assert sorted(notes) == ["'assistant_only_loss' read as 'train_on'", "'sample_packing' read as 'packing'"]


@pytest.mark.parametrize("limit", [1024, 20, 1])
def test_hidden_states_of_packed_rows_are_those_of_each_alone(limit):
    base = bases.make("gpt2")
    rows = lines(6)
    batch, targets = packed(base, rows, limit)
    together = hidden_states(base, batch, None).last
    assert together.shape[1] <= max(limit, *map(len, rows))
    assert bool(torch.isfinite(together).all())
    found = 0
    for row in rows:
        alone = hidden_states(base, collate(base, [row])[0], None).last[0]
        places = [
            (number, start)
            for number in range(len(together))
            for start in range(together.shape[1] - len(row) + 1)
            if batch["input_ids"][number, start : start + len(row)].tolist() == row.ids
            and batch["position_ids"][number, start : start + len(row)].tolist() == list(range(len(row)))
        ]
        number, start = places[0]
        assert torch.allclose(together[number, start : start + len(row)], alone, atol=1e-5)
        found += 1
    assert found == 6
    assert int((targets != -100).sum()) == sum(sum(row.trained[1:]) for row in rows)


def test_packing_is_refused_where_attention_reads_no_truth_values():
    base = bases.make("llama")
    base.model.set_attn_implementation("eager")
    adapter = read_method({"name": "lora"} | bases.settings("lora")).build(base, "tuned")
    with pytest.raises(UsageError, match="computes attention with 'eager'"):
        Instruct(packing=True).prepare(base, adapter, ())


def test_scores_are_capped_where_the_model_caps_them():
    base = bases.make("gemma3")
    base.config.final_logit_softcapping = 0.1
    rows = lines()
    alone = sum(float(reference(base, row, None)) for row in rows)
    assert total(Instruct(), base, rows, None) == pytest.approx(alone, abs=1e-4)
    base.config.final_logit_softcapping = None
    assert abs(total(Instruct(), base, rows, None) - alone) > 1e-2
