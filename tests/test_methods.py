"""Every method on every family: what a method promises, tested by being found on disk.

A test with the arguments `family` and `method` is one check of the matrix: it runs on every pair that is not refused.
"""

import inspect
import json
from pathlib import Path

import bases
import pytest
import tiny
import torch
from bases import GENERATING, METHODS, batch, hidden, make, mixes, put, row_of, suited
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from graft.errors import ModelError, NotMergeable, UsageError
from graft.families import FAMILIES as KNOWN
from graft.generate import generate
from graft.methods import store
from graft.methods.base import Method, Progress, method_of, methods, read_method
from graft.model import load_base
from graft.objectives.classify import Classify, LabelledExample
from graft.parts.attach import attach, detach, merge_into
from graft.parts.head import scores
from graft.routing import Route

FAMILIES = tuple(bases.FACTORIES)
PAIRS = [(family, method) for family in FAMILIES for method in suited(family)]
REFUSED = {(family, method) for family in FAMILIES for method in METHODS} - set(PAIRS)
IN_PLACE = [name for name, cls in methods().items() if "exclusive" in cls.model_fields]
"""The methods that train the base itself, unless told to leave it alone."""
CHECKS = 8
pairs = pytest.mark.parametrize(("family", "method"), PAIRS)


@pytest.fixture
def base(family):
    """The base of a family that all tests share. Afterwards it is what it was, bit for bit, with nothing left on it."""
    base, condition = bases.shared(family)
    torch.manual_seed(0)
    yield base
    for name in list(base.adapters):
        detach(base, name)
    base.model.eval()
    changes = condition.changes(base)
    if changes:
        bases.shared.cache_clear()  # the next test gets a new one
    assert not changes


def test_the_matrix_is_complete():
    assert {bases.model_type(family) for family in FAMILIES} == set(KNOWN)
    named = {(f, m) for f in FAMILIES for m, cls in methods().items() if cls.refuses(KNOWN[bases.model_type(f)])}
    assert named == REFUSED
    assert len(PAIRS) == len(METHODS) * len(FAMILIES) - len(REFUSED)
    checks = [
        test.pytestmark
        for name, test in globals().items()
        if name.startswith("test_") and {"family", "method"} <= inspect.signature(test).parameters.keys()
    ]
    whole = [marks for marks in checks if any(mark.args[1] is PAIRS for mark in marks)]
    assert len(whole) == CHECKS
    page = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    assert f"{len(METHODS)} methods on {len(FAMILIES)} architectures: {len(PAIRS)} pairs" in page
    for family, method in REFUSED:
        reason = methods()[method].refuses(bases.family_of(family))
        assert reason
        assert f"| `{method}` | {bases.model_type(family)} | {reason} |" in page


@pytest.mark.parametrize("method", METHODS)
def test_a_method_describes_itself(method):
    cls = methods()[method]
    assert issubclass(cls, Method)
    assert cls.source
    assert cls.__doc__
    for name, field in cls.model_fields.items():
        assert field.description, f"{method} has no description of {name}"
    assert any(method in suited(family) for family in FAMILIES)


@pairs
def test_shapes_are_kept_and_step_0_is_the_base(base, family, method):
    given = batch()
    before = hidden(base, given, None)
    put(base, method, shake=0.0)
    after = hidden(base, given, method)
    assert after.last.shape == before.last.shape
    assert (after.pooled is None) == (before.pooled is None)
    if before.pooled is not None:
        assert after.pooled.shape == before.pooled.shape
    real = given["attention_mask"].bool()
    largest = float((after.last - before.last)[real].abs().max())
    if methods()[method].starts_as_base:
        assert largest == 0.0
    else:
        assert largest > 1e-3
    if base.family.kind == "decoder":
        with torch.no_grad(), base.route(method):
            output = base.model(**given, output_hidden_states=True)
        assert output.logits.shape == (4, 9, bases.VOCABULARY)
        assert [states.shape for states in output.hidden_states] == [(4, 9, 32)] * 3


@pairs
def test_training_moves_what_trains_and_nothing_else(base, family, method):
    adapter = read_method({"name": method} | bases.settings(method)).build(base, "tuned")
    objective = Classify(head_dropout=0.0)
    objective.prepare(base, adapter, ("no", "yes"))
    attach(base, adapter)
    rows = [LabelledExample([3 + i, 5 + 2 * i, 7, 11 + i, 13 + 7 * i][: 5 - i % 2], None, i % 2, "") for i in range(6)]
    started = {name: tensor.detach().clone() for name, tensor in adapter.trainable()}
    assert started
    adapter.eval()
    with torch.no_grad():  # an evaluation first: a part cached in it must still train afterwards
        objective.loss(base, rows, "tuned")
    base.model.train()
    adapter.train()
    optimizer = torch.optim.AdamW([tensor for _, tensor in adapter.trainable()], lr=1e-2)
    got = set()
    for step in (1, 2):  # what starts at zero hides what is below it from the first step
        progress = Progress(step, 2)
        method_of(adapter).before_step(adapter, progress)
        loss = objective.loss(base, rows, "tuned")
        assert loss.weight == 6
        penalty = method_of(adapter).penalty(adapter)
        (loss.total / loss.weight + (0.0 if penalty is None else penalty)).backward()
        got |= {name for name, tensor in adapter.trainable() if tensor.grad is not None and tensor.grad.any()}
        optimizer.step()
        method_of(adapter).after_optimizer(adapter, progress)
        optimizer.zero_grad()
    assert got == set(started), f"without a gradient: {sorted(set(started) - got)}"
    still = [name for name, tensor in adapter.trainable() if torch.equal(tensor, started[name])]
    assert not still


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_through_different_adapters_equal_rows_alone(base, family):
    """One batch with a row for each method."""
    for method in suited(family):
        put(base, method)
    names = [method for method in suited(family) if mixes(base, method)]
    assert len(names) >= len(suited(family)) - len(IN_PLACE)
    entries = [None, *names, (names[-1], "lora")]
    given = batch(rows=len(entries))
    entries = [entries[i] for i in torch.randperm(len(entries)).tolist()]
    mixed = hidden(base, given, Route.of(entries))
    for row, entry in enumerate(entries):
        alone = hidden(base, row_of(given, row), entry)
        length = alone.last.shape[1]
        what = lambda message, entry=entry: f"{entry}: {message}"  # noqa: E731
        torch.testing.assert_close(mixed.last[row, :length], alone.last[0], atol=2e-5, rtol=1e-5, msg=what)
        if alone.pooled is not None:
            torch.testing.assert_close(mixed.pooled[row], alone.pooled[0], atol=2e-5, rtol=1e-5, msg=what)


@pytest.mark.parametrize("family", GENERATING)
def test_generating_with_a_cache_equals_generating_without(base, family):
    """One batch with a row for each method, and prompts of uneven length; greedy tokens are compared exactly."""
    for method in suited(family):
        put(base, method, shake=0.2)
    entries = [None, *(method for method in suited(family) if mixes(base, method))]
    prompts = [[5 + i, 6, 7, 8, 9, 10][: 6 - i % 4] for i in range(len(entries))]
    expected = [
        generate(base, [prompt], entry, max_new_tokens=6, use_cache=False)[0]
        for prompt, entry in zip(prompts, entries, strict=True)
    ]
    assert len({tuple(row) for row in expected}) > len(entries) // 2
    for use_cache in (True, False):
        got = generate(base, prompts, Route.of(entries), max_new_tokens=6, use_cache=use_cache)
        assert dict(enumerate(zip(entries, got, strict=True))) == dict(enumerate(zip(entries, expected, strict=True)))


@pairs
def test_padding_on_either_side_changes_nothing(base, family, method):
    put(base, method)
    right, left = batch(padded="right"), batch(padded="left")
    alone = [hidden(base, row_of(right, row), method).last[0] for row in range(4)]
    together = hidden(base, right, method).last
    for row, expected in enumerate(alone):
        torch.testing.assert_close(together[row, : len(expected)], expected, atol=2e-5, rtol=1e-5)
    if base.family.kind == "encoder-decoder":
        with pytest.raises(UsageError, match="pad on the right"):
            hidden(base, left, method)
        return
    together = hidden(base, left, method).last
    for row, expected in enumerate(alone):
        torch.testing.assert_close(together[row, -len(expected) :], expected, atol=2e-5, rtol=1e-5)


@pairs
def test_detaching_restores_the_base_bit_for_bit(base, family, method):
    _, condition = bases.shared(family)
    given = batch()
    before = hidden(base, given, None).last
    put(base, method)
    assert not torch.equal(hidden(base, given, method).last, before)
    assert torch.equal(hidden(base, given, None).last, before)
    detach(base, method)
    assert not condition.changes(base)
    assert torch.equal(hidden(base, given, None).last, before)


@pairs
def test_recomputed_activations_give_the_same_gradients(base, family, method):
    """Trap 1: inputs that need no gradient must not cut the graph, and layers must run again in the backward pass."""
    adapter, given = put(base, method), batch()
    passes = []
    inside = [site for site in base.sites if site.heads][-1].leave  # a layer's own hooks are left out
    counting = inside.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))

    def gradients():
        passes.clear()
        adapter.train()
        base.model.train()
        with base.route(method):
            base.hidden(given).last.square().sum().backward()
        found = {name: tensor.grad for name, tensor in adapter.trainable() if tensor.grad is not None}
        for _, tensor in adapter.trainable():
            tensor.grad = None
        return found

    plain = gradients()
    assert plain
    assert len(passes) == 1
    base.checkpoint_activations()
    try:
        again = gradients()
    finally:
        bases.keep_activations(base)
        counting.remove()
    assert len(passes) == 2
    assert again.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", IN_PLACE)
@pytest.mark.parametrize("family", FAMILIES)
def test_exclusive_equals_its_own_values(family, method):
    """In place or beside the base, the same gradients step by step."""
    results = []
    assert read_method(method).exclusive
    for exclusive in (True, False):
        base = make(family)
        adapter = read_method({"name": method} | bases.settings(method) | {"exclusive": exclusive}).build(base, "tuned")
        objective = Classify(head_dropout=0.0)
        torch.manual_seed(1)
        objective.prepare(base, adapter, ("no", "yes"))
        attach(base, adapter)
        rows = [LabelledExample([3 + i, 5, 7 + i], None, i % 2, "") for i in range(4)]
        optimizer = torch.optim.SGD([tensor for _, tensor in adapter.trainable()], lr=0.1)
        for _ in range(2):
            objective.loss(base, rows, "tuned").total.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append({name: tensor.detach().clone() for name, tensor in adapter.trainable()})
        if exclusive:
            with pytest.raises(UsageError, match="in place"), base.route(None):
                pass
            with pytest.raises(UsageError, match="only adapter"):
                attach(base, read_method("lora").build(base, "other"))
    assert results[0].keys() == results[1].keys()
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], atol=1e-5, rtol=1e-4)


@pairs
def test_saved_and_loaded_gives_equal_scores(base, family, method, tmp_path):
    given = batch()
    adapter = put(base, method)
    Classify().prepare(base, adapter, ("no", "yes", "maybe"))
    adapter.eval()
    with torch.no_grad():
        before = scores(base, given, method)
    store.save(adapter, base, tmp_path / "adapter")
    detach(base, method)
    torch.manual_seed(99)
    loaded = store.load(base, tmp_path / "adapter", "again")
    assert type(loaded.method) is type(adapter.method)
    with torch.no_grad():
        torch.testing.assert_close(scores(base, given, "again"), before, atol=1e-6, rtol=1e-6)


@pairs
def test_merged_equals_attached_or_is_refused(base, family, method):
    _, condition = bases.shared(family)
    given = batch()
    put(base, method)
    attached = hidden(base, given, method).last
    if not methods()[method].mergeable:
        with pytest.raises(NotMergeable, match="no weight of the base can"):
            merge_into(base, method)
        return
    refusal = ""
    try:
        merge_into(base, method)
    except NotMergeable as error:
        refusal = error.message
    if refusal:  # newer architectures have linears without a bias, and so nothing that a trained one could be added to
        assert any(site.bias is None for site in base.sites if site.linear and site.layer is not None)
        assert "has no bias in this architecture" in refusal
        assert torch.equal(hidden(base, given, method).last, attached)
        return
    merged = hidden(base, given, None).last
    condition.restore(base)
    real = given["attention_mask"].bool()
    torch.testing.assert_close(merged[real], attached[real], atol=1e-5, rtol=1e-5)


@pairs
def test_stacked_on_the_same_rows_beside_another_adapter(base, family, method):
    given = batch(padded=None)
    put(base, method, shake=0.3)
    put(base, "lora", "beside", shake=0.3)
    first, second, both = (hidden(base, given, entry).last for entry in (method, "beside", (method, "beside")))
    assert not torch.allclose(both, first, atol=1e-3)
    assert not torch.allclose(both, second, atol=1e-3)
    if mixes(base, method):
        mixed = hidden(base, given, Route.of(["beside", (method, "beside"), method, (method, "beside")])).last
        expected = torch.stack([second[0], both[1], first[2], both[3]])
        torch.testing.assert_close(mixed, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_adapters_apply_in_order(base, family):
    given = batch(padded=None)
    put(base, "lora", shake=0.3)
    put(base, "bottleneck", shake=0.3)
    put(base, "prefix", shake=0.3)
    one = hidden(base, given, ("lora", "prefix")).last
    assert not torch.allclose(one, hidden(base, given, "lora").last, atol=1e-3)
    assert not torch.allclose(one, hidden(base, given, "prefix").last, atol=1e-3)
    three = hidden(base, given, ("lora", "prefix", "bottleneck")).last
    mixed = hidden(base, given, Route.of([("lora", "prefix"), ("lora", "prefix", "bottleneck"), None, "lora"])).last
    torch.testing.assert_close(mixed[0], one[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[1], three[1], atol=1e-5, rtol=1e-5)


def test_prefix_projection_is_folded_when_saved(tmp_path):
    base, given = make("llama"), batch()
    adapter = put(base, "prefix", prefix_projection=True, encoder_hidden_size=16)
    assert {name.split(".")[0] for name, _ in adapter.trainable()} == {"shared"}
    before = hidden(base, given, "prefix").last
    store.save(adapter, base, tmp_path / "a")
    fresh = make("llama")
    loaded = store.load(fresh, tmp_path / "a", "p")
    assert {name.split(".")[0] for name, _ in loaded.trainable()} == {"layers"}
    torch.testing.assert_close(hidden(fresh, given, "p").last, before, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "lora", "r": 33}, r"r: 33 is not from 1 to 32"),
        ({"name": "lora", "target_modules": ["attn.qq"]}, r"'attn.qq' matches no site.*did you mean 'attn.q'"),
        ({"name": "lora", "target_modules": ["attn"]}, r"lora cannot sit at 'attn'"),
        ({"name": "lora", "layers_to_transform": [2]}, r"no layer 2, the base has 0 to 1"),
        ({"name": "frozen", "last_layers": 3}, r"last_layers: 3, and bert has 2 layers"),
        ({"name": "frozen", "pattern": "nothing_like_it"}, r"matches no tensor"),
        ({"name": "prefix", "num_virtual_tokens": 64}, r"64 of 64 positions"),
        ({"name": "prompt", "num_virtual_tokens": 70}, r"70 of 64 positions"),
    ],
)
def test_settings_that_do_not_fit_the_base(given, message):
    base = make("bert")
    with pytest.raises(UsageError, match=message):
        read_method(given).build(base, "x")


def test_all_linear_leaves_the_output_layer_out():
    base = make("llama")
    sites = base.select("all-linear")
    assert len(sites) == 2 * 7
    assert {site.layer for site in sites} == {0, 1}
    assert len(make("gpt2").select("all-linear")) == 2 * 4
    assert [site.role for site in make("bert").select(["query", "value"])][:2] == ["attn.q", "attn.v"]


@pytest.mark.parametrize(
    ("family", "method", "more", "pooling", "kind"),
    [
        ("bert", "lora", {}, None, "LORA"),
        ("bert", "lora", {}, "mean", "GRAFT_LORA"),
        ("bert", "prefix", {}, "first", "GRAFT_PREFIX"),
        ("bert", "prompt", {}, None, "GRAFT_PROMPT"),
        ("bert", "prompt", {"pool": "virtual"}, None, "PROMPT_TUNING"),
        ("roberta", "prompt", {}, None, "GRAFT_PROMPT"),
        ("llama", "prompt", {}, None, "PROMPT_TUNING"),
        ("llama", "lora", {}, "mean", "GRAFT_LORA"),
        ("t5", "lora", {}, None, "GRAFT_LORA"),
    ],
)
def test_a_folder_that_peft_would_score_otherwise_is_not_called_by_its_type(
    family, method, more, pooling, kind, tmp_path
):
    base, given = make(family), batch()
    adapter = put(base, method, **more)
    Classify(pooling=pooling).prepare(base, adapter, ("no", "yes"))
    adapter.eval()
    store.save(adapter, base, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == kind
    with torch.no_grad():
        before = scores(base, given, method)
        fresh = make(family)
        store.load(fresh, tmp_path / "a", "again")
        torch.testing.assert_close(scores(fresh, given, "again"), before, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_saving_works_with_hardly_a_position_left(method, tmp_path):
    base = make("gpt2")
    adapter = put(base, method, num_virtual_tokens=62)
    store.save(adapter, base, tmp_path / "a")
    assert store.load(make("gpt2"), tmp_path / "a").trainable_count() > 0


@pytest.mark.parametrize("family", GENERATING)
def test_virtual_tokens_that_are_embeddings_of_words_act_as_these_words(base, family):
    """In every window and cache, and in Gemma 3, which multiplies its embeddings."""
    adapter, words = put(base, "prompt"), [9, 8, 7, 6, 5]
    table = base.select("embed")[0].leave
    with torch.no_grad():
        adapter.virtual_parts()[0].embedding.copy_(table(torch.tensor(words)))
    prompts = [[11, 12, 13, 14, 15, 16, 17], [18, 19], [20, 21, 22, 23]]
    expected = generate(base, [words + prompt for prompt in prompts], None, max_new_tokens=6)
    for use_cache in (True, False):
        assert generate(base, prompts, "prompt", max_new_tokens=6, use_cache=use_cache) == expected


def test_tokens_from_the_vocabulary_start_as_the_base_embeds_them():
    """Gemma multiplies what it looks up, so a row of its table is not what enters its layers."""
    base = make("gemma3")
    adapter = read_method({"name": "prompt", "prompt_tuning_init": "SAMPLE_VOCAB"}).build(base, "words")
    with torch.no_grad():
        embedded = base.select("embed")[0].leave(torch.arange(bases.VOCABULARY))
        tokens = adapter.virtual_parts()[0].virtual()
    assert (tokens[:, None] == embedded).all(dim=2).any(dim=1).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_below_all_that_trains_are_not_run_again(base, family):
    """Recomputing them, as a gradient at the embeddings would ask for, gives nothing."""
    put(base, "lora", layers_to_transform=[1])
    passes = []
    counting = base.select("attention")[0].leave.register_forward_pre_hook(lambda *_: passes.append(1))
    base.checkpoint_activations()
    base.model.train()
    with base.route("lora"):
        base.hidden(batch()).last.sum().backward()
    counting.remove()
    bases.keep_activations(base)
    assert len(passes) == 1


def save(base, folder, beyond=()):
    """A folder with a base and a tokenizer of ninety words; `beyond` are tokens after the last embedding."""
    base.model.save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"word{index}" for index in range(4, bases.VOCABULARY - 9))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)
    if beyond:
        fast.add_tokens([f"more{index}" for index in range(9)])
        fast.add_tokens(list(beyond), special_tokens=True)
    fast.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_base_is_loaded_as_it_was(base, family, tmp_path):
    loaded = load_base(save(base, tmp_path / "model"))
    assert loaded.fingerprint == base.fingerprint
    assert not loaded.fresh
    assert [site.name for site in loaded.sites] == [site.name for site in base.sites]
    assert torch.equal(hidden(loaded, batch(), None).last, hidden(base, batch(), None).last)


def test_a_model_of_images_and_texts_is_refused_in_one_line(tmp_path):
    base = make("gemma3")
    save(base, tmp_path / "model")
    whole = {"model_type": "gemma3", "text_config": base.config.to_dict()}
    (tmp_path / "model" / "config.json").write_text(json.dumps(whole))
    with pytest.raises(ModelError) as raised:
        load_base(str(tmp_path / "model"))
    assert "model_type 'gemma3' in config.json is not known; it reads more than text" in str(raised.value)
    assert str(raised.value).endswith("give a gemma3_text model")
    assert "\n" not in str(raised.value)


def test_a_special_token_without_an_embedding_is_let_pass(tmp_path):
    """Gemma 3's text models come with a token of images, one beyond the table."""
    loaded = load_base(save(make("gemma3"), tmp_path / "model", beyond=["<image_soft_token>"]))
    assert len(loaded.tokenizer) == bases.VOCABULARY + 1


def test_a_pooler_that_the_checkpoint_lacks_starts_alike_in_every_load(tmp_path):
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**bases._SIZES | {"vocab_size": 200}, **bases._MORE), add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    tiny.write_model(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tmp_path / "other" / name).read_bytes())
    first, second = load_base(str(tmp_path)), load_base(str(tmp_path))
    assert first.fresh
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize(
    ("method", "more", "rank", "reason"),
    [
        ("lora", {}, None, None),
        ("lora", {"r": 20}, None, "rank 20 is above 16"),
        ("lora", {"rank_pattern": {"attn.v": 24}}, None, "one rank and one scale"),
        ("lora", {"target_modules": ["attn.q", "head"]}, None, "the output layer"),
        ("dora", {}, None, "plain LoRA adapters"),
        ("bottleneck", {}, None, "plain LoRA adapters"),
        ("dylora", {}, None, "plain LoRA adapters"),
        ("dylora", {}, 2, None),
    ],
)
def test_saving_says_what_vllm_cannot_serve(method, more, rank, reason, tmp_path):
    base = make("llama")
    adapter = put(base, method, **more)
    if rank is not None:
        method_of(adapter).use_rank(adapter, rank)
    said = store.save(adapter, base, tmp_path / "a")
    assert (said is None) == (reason is None)
    assert reason is None or reason in said
    assert (reason or "vLLM can serve it") in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    Classify().prepare(base, adapter, ("no", "yes"))
    assert store.save(adapter, base, tmp_path / "b")
    detach(base, method)
