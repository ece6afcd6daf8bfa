from collections import Counter
from itertools import takewhile

import bases
import pytest
import torch
from bases import GENERATING, make, put

from graft import decoding
from graft.errors import ResourceError, RouteError, UsageError
from graft.generate import Answer, answer_all, generate, stream
from graft.routing import Route
from graft.sampling import GREEDY, Chooser, Draws, Sampling, choose_each

ENTRIES = [None, "prompt", "lora", ("lora", "prompt"), "prefix", None, "long", "prompt", "lora"]
PROMPTS = [[5 + row, 6, 7, 8, 9, 10, 11][: 7 - row % 5] for row in range(len(ENTRIES))]


def adapted(family: str):
    base = make(family)
    for method in ("lora", "prompt", "prefix"):
        put(base, method, shake=0.3)
    put(base, "prompt", "long", shake=0.5, num_virtual_tokens=9)
    return base


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", GENERATING)
def test_rows_that_leave_the_batch_change_nothing_in_the_others(family, use_cache):
    """Each row ends at another step; the one with the most virtual tokens, whose block is cut then, before others."""
    base = adapted(family)
    alone = [
        generate(base, [prompt], entry, max_new_tokens=14, use_cache=False)[0]
        for prompt, entry in zip(PROMPTS, ENTRIES, strict=True)
    ]
    assert len({tuple(row) for row in alone}) > 4
    stops = {alone[6][2], alone[0][4], alone[3][6]}
    expected = []
    for row in alone:
        end = next((index for index, token in enumerate(row) if token in stops), None)
        expected.append((row[:end], end is not None))
    ends = {len(row) for row, ended in expected if ended}
    assert len(ends) >= 2
    assert len(expected[6][0]) <= 2 < max(len(row) for row, _ in expected)
    seen: dict[int, list[int]] = {row: [] for row in range(len(PROMPTS))}
    sizes = []
    options = {"max_new_tokens": 14, "stop_ids": stops, "use_cache": use_cache}
    with Passes(base) as passes:
        for tokens in stream(base, PROMPTS, Route.of(ENTRIES), **options):
            sizes.append(len(tokens))
            for row, token in tokens:
                seen[row].append(token)
    found = [([t for t in row if t not in stops], row[-1] in stops) for row in seen.values()]
    assert found == expected
    assert sizes == sorted(sizes, reverse=True)
    assert passes.rows[-1] == sizes[-1] < len(PROMPTS)
    assert generate(base, PROMPTS, Route.of(ENTRIES), **options) == [row for row, _ in expected]


class Passes:
    """The sizes of the batches that the head of a base sees."""

    def __init__(self, base):
        self.rows: list[int] = []
        self.columns: list[int] = []
        self.head = base.select("head")[0].leave

    def __enter__(self):
        self.hook = self.head.register_forward_hook(self._note)
        return self

    def _note(self, module, args, output):
        self.rows.append(output.shape[0])
        self.columns.append(output.shape[1])

    def __exit__(self, *_):
        self.hook.remove()


@pytest.mark.parametrize("family", [name for name in GENERATING if name != "t5"])
def test_only_the_last_position_is_scored_and_parts_at_the_head_act(family):
    base = make(family)
    adapter = put(base, "lora", "head", target_modules=["head", "attn.o"], shake=0.5)
    placed = [part for site, part in adapter.placed if site.role == "head"]
    assert len(placed) == 1
    with Passes(base) as passes:
        got = generate(base, PROMPTS[:4], Route.of(["head", None, "head", None]), max_new_tokens=3)
    assert passes.columns == [1, 1, 1]
    expected = []
    for row, entry in enumerate(["head", None, "head", None]):
        ids = torch.tensor([PROMPTS[row]])
        for _ in range(3):
            with torch.no_grad(), base.route(entry):
                token = base.model(input_ids=ids).logits[:, -1].argmax(dim=-1)
            ids = torch.cat([ids, token[None]], dim=1)
        expected.append(ids[0, len(PROMPTS[row]) :].tolist())
    assert got == expected
    with torch.no_grad():
        for parameter in placed[0].parameters():
            parameter.zero_()
    assert got != generate(base, PROMPTS[:4], Route.of(["head", None, "head", None]), max_new_tokens=3)


@pytest.mark.parametrize(("family", "limit"), [("gpt2", None), ("gpt2", 20), ("llama", 20)])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_ends_at_the_positions_and_the_others_go_on(family, limit, use_cache):
    base = make(family)
    put(base, "prompt")
    put(base, "prefix")
    positions = limit or 64
    entries = [None, "prompt", "prefix", None]
    prompts = [[5] * (positions - 2), [6] * (positions - 10), [7] * (positions - 9), [8] * 4]
    taken = [0, 5, base.adapters["prefix"].positions, 0]
    options = {"max_new_tokens": 12, "use_cache": use_cache, "max_positions": limit}
    counts = dict.fromkeys(range(4), 0)
    for tokens in stream(base, prompts, Route.of(entries), **options):
        for row, _ in tokens:
            counts[row] += 1
    assert counts == {0: 3, 1: 6, 2: positions - taken[2] - (positions - 9) + 1, 3: 12}
    answers = answer_all(base, prompts[:1], max_new_tokens=12, max_positions=limit)
    assert [(len(answer.ids), answer.ended) for answer in answers] == [(3, False)]
    with pytest.raises(RouteError, match=f"{positions + 1} tokens exceeds the {positions} positions"):
        stream(base, [[5] * (positions + 1)], max_positions=limit)
    with pytest.raises(RouteError, match=rf"and 5 virtual ones .* shorten it to {positions - 5} tokens"):
        stream(base, [[5] * (positions - 4)], "prompt", max_positions=limit)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("family", GENERATING)
def test_a_prompt_that_stands_often_is_read_once(family, use_cache, monkeypatch):
    base = adapted(family)
    one, two = [5, 6, 7, 8, 9], [11, 12, 13]
    prompts, ways = [one, two, one, one, two, one], ["prefix", None, "prefix", None, None, "prefix"]
    options = {"max_new_tokens": 6, "use_cache": use_cache, "sampling": Sampling(temperature=1.0, seed=3)}
    read = []
    original = decoding.Decoder.__init__, decoding.PairDecoder.__init__
    for kind, plain in zip((decoding.Decoder, decoding.PairDecoder), original, strict=True):
        monkeypatch.setattr(kind, "__init__", lambda *a, plain=plain: (read.append(len(a[2])), plain(*a))[1])
    with monkeypatch.context() as apart:
        apart.setattr("graft.generate._distinct", lambda prompts, route: (range(len(prompts)),) * 2)
        wanted = generate(base, prompts, Route.of(ways), **options)
        ended = Counter(token for row in wanted for token in row).most_common(1)[0][0]
        cut = generate(base, prompts, Route.of(ways), stop_ids=[ended], **options)
    assert generate(base, prompts, Route.of(ways), **options) == wanted
    assert generate(base, prompts, Route.of(ways), stop_ids=[ended], **options) == cut != wanted
    assert read == [6, 6, 3, 3]


def test_answers_say_what_ended_them_and_come_in_the_order_given():
    base = adapted("llama")
    prompts = [[7] * (1 + row * 3 % 11) + [row + 3] for row in range(11)]
    whole = [generate(base, [prompt], "lora", max_new_tokens=9)[0] for prompt in prompts]
    stop = whole[4][3]
    shares: list[float] = []
    options = {"max_new_tokens": 9, "stop_ids": [stop], "progress": shares.append}
    for size in (1, 3, 11, 64):
        shares.clear()
        got = answer_all(base, prompts, "lora", batch_size=size, **options)
        assert got == [Answer(row[: row.index(stop)], True) if stop in row else Answer(row, False) for row in whole]
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
        assert len(shares) > 5
    assert {answer.ended for answer in got} == {True, False}
    assert answer_all(base, [], "lora") == []
    assert answer_all(base, prompts[:2], max_new_tokens=0) == [Answer([], False)] * 2


def test_the_longest_prompts_come_first():
    base = make("llama")
    lengths = []
    original = base.model.forward

    def forward(**given):
        lengths.append(given["attention_mask"].shape[1])
        return original(**given)

    base.model.forward = forward
    answer_all(base, [[5] * n for n in (3, 9, 4, 8, 1)], batch_size=2, max_new_tokens=1)
    assert lengths == [9, 4, 1]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), RuntimeError("can't allocate memory")])
def test_batches_shrink_when_memory_runs_out(error, monkeypatch):
    base = make("llama")
    prompts = [[5 + row, 6] for row in range(13)]
    expected = answer_all(base, prompts, max_new_tokens=4)
    sizes = []
    original = base.model.forward
    limit = [3]

    def forward(**given):
        rows = len(given["input_ids"])
        sizes.append(rows)
        if rows > limit[0]:
            raise error
        return original(**given)

    monkeypatch.setattr(base.model, "forward", forward)
    shares: list[float] = []
    assert answer_all(base, prompts, batch_size=12, max_new_tokens=4, progress=shares.append) == expected
    assert sizes[:3] == [12, 6, 3]
    assert max(sizes[2:]) == 3
    assert shares == sorted(shares)
    limit[0] = 0
    with pytest.raises(ResourceError, match="one prompt of 2 tokens"):
        answer_all(base, prompts, batch_size=4)
    monkeypatch.setattr(base.model, "forward", lambda **_: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        answer_all(base, prompts, batch_size=4)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_sampled_answers_depend_on_seed_and_row_alone(family):
    base = adapted(family)
    prompts = [[7, 8, 9, 10][: 1 + row % 4] for row in range(10)]
    options = {"max_new_tokens": 70, "sampling": Sampling(temperature=1.5, top_p=0.95, seed=4)}
    first = answer_all(base, prompts, "lora", batch_size=10, **options)
    assert first == answer_all(base, prompts, "lora", batch_size=3, **options)
    assert first[0] != first[4] != first[8]  # the same prompt in other rows
    assert first != answer_all(base, prompts, "lora", **(options | {"sampling": Sampling(1.5, 0.95, seed=5)}))
    shorter = answer_all(base, prompts, "lora", **(options | {"max_new_tokens": 5}))
    assert [answer.ids for answer in shorter] == [answer.ids[:5] for answer in first]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_sampled_rows_keep_their_draws_when_others_leave_the_batch(family):
    base = adapted(family)
    prompts = [[7, 8, 9, 10][: 1 + row % 4] for row in range(12)]
    options = {"max_new_tokens": 40, "sampling": Sampling(temperature=2.0, seed=4)}
    said = [answer.ids for answer in answer_all(base, prompts, "lora", **options)]
    stop = Counter(token for ids in said for token in ids[:12]).most_common(3)
    ends = {token for token, _ in stop}
    together = answer_all(base, prompts, "lora", stop_ids=ends, **options)
    expected = [list(takewhile(lambda token: token not in ends, ids)) for ids in said]
    assert [answer.ids for answer in together] == expected
    assert len({len(ids) for ids in expected}) > 4  # they leave at different steps
    alone = list(stream(base, prompts[:1], "lora", stop_ids=ends, numbers=[0], **options))
    assert [token for step in alone for _, token in step][: len(expected[0])] == expected[0]


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_that_ended_at_the_last_position_stays_there(use_cache):
    """One of ten rows is not dropped yet, and position 64 is beyond the table."""
    base = make("gpt2")
    prompts = [[5] * 63, *[[number] * 4 for number in range(6, 15)]]
    answers = answer_all(base, prompts, max_new_tokens=12)
    assert [len(answer.ids) for answer in answers] == [2] + [12] * 9
    assert generate(base, prompts, max_new_tokens=12, use_cache=use_cache) == [answer.ids for answer in answers]
    assert generate(base, prompts[1:2], max_new_tokens=12)[0] == answers[1].ids


def test_answers_are_handed_over_batch_by_batch():
    base = make("llama")
    seen: list[int] = []
    answers = answer_all(
        base, [[5] * n for n in (3, 9, 4, 7)], batch_size=2, max_new_tokens=3,
        finished=lambda row, answer: seen.append(row) if answer.ids else None,
    )  # fmt: skip
    assert seen == [1, 3, 2, 0]
    assert len(answers) == 4


def test_draws_follow_the_shares_of_the_candidates():
    scores = torch.log(torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])).expand(4000, 5)
    cases = {
        Sampling(temperature=1.0): [0.05, 0.4, 0.15, 0.3, 0.1],
        Sampling(temperature=1.0, top_k=2): [0, 4 / 7, 0, 3 / 7, 0],
        Sampling(temperature=1.0, top_p=0.75): [0, 0.4 / 0.85, 0.15 / 0.85, 0.3 / 0.85, 0],
        Sampling(temperature=1.0, top_p=0.3): [0, 1, 0, 0, 0],
        Sampling(temperature=1.0, top_k=3, top_p=0.5): [0, 4 / 7, 0, 3 / 7, 0],
        Sampling(temperature=0.5): [0.0025 / 0.285, 0.16 / 0.285, 0.0225 / 0.285, 0.09 / 0.285, 0.01 / 0.285],
        Sampling(temperature=1e-30): [0, 1, 0, 0, 0],
        GREEDY: [0, 1, 0, 0, 0],
    }
    for sampling, shares in cases.items():
        chooser = Chooser(sampling, [[0]] * 4000, range(4000))
        counts = sum(torch.bincount(chooser.choose(scores), minlength=5) for _ in range(3))
        torch.testing.assert_close(counts / 12000, torch.tensor(shares, dtype=torch.float), atol=0.02, rtol=0.0)
        assert all(counts[index] == 0 for index, share in enumerate(shares) if share == 0)


def test_a_wide_nucleus_is_found_in_a_large_vocabulary():
    scores = torch.zeros(2000, 1000)  # all alike: 256 candidates hold a quarter
    scores[:, 900:] = -50.0
    tokens = Chooser(Sampling(temperature=1.0, top_p=0.9), [[0]] * 2000, range(2000)).choose(scores)
    assert 700 < len(tokens.unique()) <= 820
    assert int(tokens.max()) < 900
    sharp = scores.clone()
    sharp[:, 17] = 20.0
    assert bool((Chooser(Sampling(temperature=1.0, top_p=0.9), [[0]] * 2000, range(2000)).choose(sharp) == 17).all())


def test_a_row_draws_the_same_beside_one_with_a_wider_nucleus():
    """Scores in bf16 tie, and where a neighbour's nucleus has more than 256 candidates all would be sorted."""
    torch.manual_seed(1)
    samplings = [Sampling(0.7, 0.8, seed=4), Sampling(1.5, 0.3), Sampling(1.0, 0.999, seed=9), Sampling(1.0, seed=3)]
    choosers = [Chooser(sampling, [[0]], [number]) for number, sampling in enumerate(samplings)]
    draws = [Draws(sampling.seed, number) for number, sampling in enumerate(samplings)]
    sharpness = torch.tensor([[3.0], [4.0], [0.2], [1.0]])
    for _ in range(150):
        scores = (torch.randn(4, 5000) * sharpness).bfloat16().float()
        alone = [int(chooser.choose(scores[row : row + 1])) for row, chooser in enumerate(choosers)]
        assert choose_each(scores, samplings, draws).tolist() == alone


def test_the_penalty_lowers_tokens_that_a_row_has():
    chooser = Chooser(Sampling(repetition_penalty=2.0), [[0], [3]], range(2))
    scores = torch.tensor([[4.0, 3.0, -1.0, -3.0], [1.5, -1.0, -1.2, 2.0]])
    assert chooser.choose(scores).tolist() == [1, 0]
    assert chooser.choose(scores).tolist() == [0, 3]
    chooser.keep([1])
    assert chooser.choose(torch.tensor([[-2.0, -3.0, -5.0, -2.0]])).tolist() == [1]


@pytest.mark.parametrize(
    "given",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"seed": -1},
     {"repetition_penalty": 0}],
)  # fmt: skip
def test_faulty_sampling_is_refused(given):
    with pytest.raises(UsageError, match=next(iter(given))):
        Sampling(**given)


def test_faulty_calls_are_refused_before_the_first_step():
    base = make("llama")
    put(base, "lora")
    for prompts in ([], [[]], [[5], []]):
        with pytest.raises(UsageError, match="at least one token"):
            stream(base, prompts)
    with pytest.raises(UsageError, match="encoder"):
        stream(make("bert"), [[5]])
    with pytest.raises(RouteError, match="3 prompts, the route is for 2"):
        stream(base, [[5]] * 3, Route.of(["lora", None]))
    with pytest.raises(UsageError, match="batch_size"):
        answer_all(base, [[5]], batch_size=0)
    with pytest.raises(UsageError, match="max_new_tokens"):
        stream(base, [[5]], max_new_tokens=-1)


def test_a_stream_leaves_route_and_gradients_to_its_caller():
    base = make("llama")
    put(base, "lora", shake=0.5)
    expected = generate(base, [[5, 6]], "lora", max_new_tokens=4)[0]
    got = []
    for tokens in stream(base, [[5, 6]], "lora", max_new_tokens=4):
        assert base.router.current is None
        assert torch.is_grad_enabled()
        generate(base, [[9, 9, 9]], None, max_new_tokens=2)
        got += [token for _, token in tokens]
    assert got == expected
    given = bases.batch()
    with base.route("lora"):
        base.hidden(given).last.sum().backward()
