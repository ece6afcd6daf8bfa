"""Rows that join and leave a running batch get the tokens that they get alone."""

import random

import pytest
import torch
from bases import VOCABULARY, family_of, make, put, suited
from transformers import LlamaConfig, LlamaForCausalLM

from graft.decoding import BLOCK, Decoder
from graft.generate import answer_all, generate
from graft.model import Base
from graft.parts.attach import adapter_of
from graft.routing import Route
from graft.sampling import Sampling
from graft.serve.batch import Batch, Row, bytes_per_column

DECODERS = [name for name in ("gpt2", "llama", "mistral", "qwen3", "gemma3") if family_of(name).kind == "decoder"]


def virtual(base, entry):
    return sum(part.positions for part in adapter_of(base, entry).virtual_parts()) if entry else 0


def adapted(family: str, names=("lora", "prompt", "prefix", "bottleneck", "ia3")):
    base = make(family)
    for name in names:
        put(base, name, shake=0.3)
    return base


def rows_for(base, count: int, seed: int, most: int = 16):
    chance = random.Random(seed)
    entries = [None, *base.adapters]
    rows = []
    for _ in range(count):
        entry = chance.choice(entries)
        prompt = [chance.randrange(3, VOCABULARY) for _ in range(chance.randint(1, 14))]
        rows.append(Row(prompt, chance.randint(1, most), entry=entry, virtual=virtual(base, entry)))
    return rows


def run(batch: Batch, rows, arrive=lambda step: 3):
    """Steps until all rows have ended; some arrive between steps. Gives the tokens of each row."""
    told = {row: [] for row in rows}
    coming = list(rows)
    steps = 0
    while coming or batch.busy:
        for _ in range(arrive(steps)):
            if coming:
                batch.add(coming.pop(0))
        for row, token in batch.step():
            told[row].append(token.id)
        assert batch.used <= batch.capacity
        if batch._decoder is not None:
            held = batch._decoder.cache.layers[0].keys
            assert len(held) * (held.shape[2] + BLOCK) <= batch.capacity + BLOCK * len(held)
        steps += 1
        assert steps < 2000
    return told


def alone(base, row):
    return generate(base, [row.prompt], row.entry, max_new_tokens=row.max_tokens, stop_ids=row.stop_ids)[0]


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("chunk", [4, 64])
def test_rows_that_come_and_go_are_written_as_alone(family, chunk):
    base = adapted(family)
    rows = rows_for(base, 40, seed=chunk)
    batch = Batch(base, 12 * (BLOCK + 40), max_rows=10, chunk=chunk)
    sizes = set()
    original = batch.write

    def write():
        written = original()
        sizes.add(len(written))
        return written

    batch.write = write
    told = run(batch, rows, lambda step: step % 3)
    for row in rows:
        assert row.ids == alone(base, row), (row.entry, len(row.prompt))
        assert told[row] == row.ids
        assert row.ending == "length"
    assert len(sizes) > 5
    assert not batch.held
    assert batch.used == 0


@pytest.mark.parametrize("method", suited("llama"))
def test_every_method_joins_a_batch(method):
    base = adapted("llama", ("lora", "prompt"))
    if method not in base.adapters:
        put(base, method, shake=0.3)
    rows = rows_for(base, 18, seed=5, most=8)
    for row in rows[::2]:
        row.entry, row.virtual = method, virtual(base, method)
    run(Batch(base, 5000, max_rows=6), rows, lambda step: 2 if step % 2 else 0)
    for row in rows:
        assert row.ids == alone(base, row), row.entry


def test_stop_ids_limits_and_cancelled_rows():
    base = adapted("llama")
    rows = rows_for(base, 24, seed=3, most=20)
    for row in rows:
        row.stop_ids = frozenset({alone(base, row)[-1], 7})
    dropped = rows[5]
    batch = Batch(base, 20_000, max_rows=8)
    coming = list(rows)
    while coming or batch.busy:
        if coming:
            batch.add(coming.pop())
        batch.step()
        if dropped.ids:
            dropped.cancelled = True
    for row in rows:
        if row is not dropped:
            assert row.ids == alone(base, row)
            assert row.ending == "stop"
    assert dropped.ending is None
    assert not batch.held


def test_sampled_rows_have_draws_of_their_own():
    base = adapted("llama")
    settings = Sampling(temperature=1.2, top_p=0.9, seed=4)
    rows = [Row([5, 6, 7], 12, sampling=settings, number=number) for number in range(6)]
    greedy = Row([5, 6, 7], 12)
    wild = Row([8], 12, sampling=Sampling(temperature=2.0, seed=9), number=3)
    run(Batch(base, 20_000), [greedy, *rows, wild], lambda step: 1)
    expected = answer_all(base, [[5, 6, 7]] * 6, max_new_tokens=12, sampling=settings)
    assert [row.ids for row in rows] == [answer.ids for answer in expected]
    assert greedy.ids == alone(base, greedy)
    assert len({tuple(row.ids) for row in rows}) > 4
    again = Row([8], 12, sampling=Sampling(temperature=2.0, seed=9), number=3)
    run(Batch(base, 20_000), [again])
    assert again.ids == wild.ids


def test_shares_are_those_of_a_forward_pass():
    base = adapted("llama")
    asking, other = Row([5, 6, 7], 4, top_logprobs=3, entry="lora"), Row([9, 8], 6, top_logprobs=0)
    batch = Batch(base, 20_000)
    tokens = []
    batch.add(asking)
    batch.add(other)
    batch.add(Row([4], 5))
    while batch.busy:
        tokens += batch.step()
    ids = torch.tensor([[5, 6, 7, *asking.ids]])
    with torch.no_grad(), base.route("lora"):
        shares = base.model(input_ids=ids).logits[0, 2:-1].log_softmax(-1)
    mine = [token for row, token in tokens if row is asking]
    assert len(mine) == 4
    for place, token in enumerate(mine):
        assert token.logprob == pytest.approx(float(shares[place, token.id]), abs=1e-4)
        best = shares[place].topk(3)
        assert [number for number, _ in token.top] == best.indices.tolist()
        assert [share for _, share in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert all(token.top == () and token.logprob < 0 for row, token in tokens if row is other)


def test_a_failed_step_costs_no_token():
    base = adapted("llama")
    rows = rows_for(base, 12, seed=8, most=12)
    expected = {row: alone(base, row) for row in rows}
    batch = Batch(base, 20_000, max_rows=6)
    coming, steps = list(rows), 0
    while coming or batch.busy:
        if coming:
            batch.add(coming.pop())
        batch.step()
        steps += 1
        if steps % 5 == 0:
            batch.waiting.extendleft(batch.abandon(reading=steps % 10 == 0))
    assert {row: row.ids for row in rows} == expected


def test_memory_is_promised_before_a_row_is_let_in():
    base = adapted("llama", ("lora", "prompt"))
    batch = Batch(base, 2 * (BLOCK + 30))
    long, short = Row([5] * 20, 10), Row([6], 5)
    assert batch.fits(long)
    assert not batch.fits(Row([5] * 20, 10 + BLOCK + 31))
    third = Row([7] * 2, 3)
    for row in (long, short, third):
        batch.add(row)
    batch.step()
    assert batch.live == [long] or len(batch.live) == 2
    assert third in batch.waiting
    while batch.busy:
        batch.step()
    assert third.ids == alone(base, third)
    assert bytes_per_column(base) == 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes


def wide(dtype: torch.dtype) -> Base:
    """A random Llama whose products are large enough that their rounding depends on the number of rows."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1184, num_hidden_layers=6, num_attention_heads=18,
            num_key_value_heads=9, pad_token_id=0,
        )  # fmt: skip
        base = Base(LlamaForCausalLM(config).eval().to(dtype), None, "wide")
    for name in ("lora", "bottleneck", "ia3", "dora"):
        put(base, name, shake=0.02)
    put(base, "lora", "second", shake=0.02)
    return base


@torch.no_grad()
def written(base, prompts, entries, steps=4):
    """Scores [steps, rows, vocabulary] of a batch whose tokens are given."""
    route = Route.of(entries)
    found = []
    with base.route(route):
        decoder = Decoder(base, prompts, route, True)
        for step in range(steps):
            found.append(decoder.scores().float())
            decoder.add(torch.tensor([len(prompt) + step for prompt in prompts]), torch.ones(len(prompts)).long())
    return torch.stack(found)


def test_in_bf16_a_mixed_batch_is_within_twice_the_bases_own_spread():
    base = wide(torch.bfloat16)
    chance = random.Random(0)
    prompts = [[chance.randrange(3, VOCABULARY) for _ in range(chance.randint(3, 14))] for _ in range(8)]
    plain = [written(base, [prompt], [None])[:, 0] for prompt in prompts]
    spread = 0.0
    for size in range(2, 9):
        together = written(base, prompts[:size], [None] * size)
        spread = max(spread, *(float((together[:, row] - plain[row]).abs().max()) for row in range(size)))
    scale = max(float(scores.abs().max()) for scores in plain)
    spread = max(spread, scale * 2**-8)  # one step of the format, where all kernels of a CPU round alike
    entries = [None, "lora", "second", "bottleneck", "ia3", "dora", "lora", "second"]
    mixed = written(base, prompts, entries)
    differences = []
    for row, (prompt, entry) in enumerate(zip(prompts, entries, strict=True)):
        alone = written(base, [prompt], [entry])[:, 0]
        differences.append(float((mixed[:, row] - alone).abs().max()))
        assert entry is None or float((alone - plain[row]).abs().max()) > 2 * spread
    assert 2 * spread < 0.05 * scale
    assert max(differences) <= 2 * spread, (differences, spread)


def test_a_row_whose_scores_are_no_numbers_ends_alone():
    base = adapted("llama")
    rows = rows_for(base, 6, seed=2, most=9)
    for row in rows:
        row.max_tokens, row.entry, row.virtual = 9, None, 0
    rows[1].entry = rows[4].entry = "lora"
    rows[4].sampling = Sampling(temperature=1.0)
    with torch.no_grad():
        for _, tensor in base.adapters["lora"].trainable():
            tensor.fill_(float("nan"))
    batch = Batch(base, 20_000)
    told = run(batch, rows)
    for row in rows:
        if row.entry == "lora":
            assert (row.ending, row.ids, told[row]) == ("unsound", [], [])
        else:
            assert (row.ending, row.ids) == ("length", alone(base, row))
    assert batch.used == 0
