"""Faults of this architecture that give wrong numbers without an error; each test fails when its trap is sprung."""

import json

import bases
import pytest
import torch
from bases import TRAPPED, batch, hidden, make, put, suited
from safetensors.torch import load_file

from graft.errors import DamagedError, NotMergeable, RouteError, UsageError
from graft.generate import generate
from graft.methods import store
from graft.methods.base import read_method
from graft.objectives.causal import token_losses
from graft.objectives.classify import Classify
from graft.parts.attach import attach, detach, hidden_states, merge_into, widest
from graft.parts.head import scores
from graft.routing import Route


def gradients(base, given, route, later=None):
    """Gradients of a sum of squares; `later` is made current between the forward and the backward pass."""
    adapters = list(base.adapters.values())
    for adapter in adapters:
        adapter.zero_grad()
    base.model.train()
    with base.route(route):
        output = base.hidden(given).last
    if later is None:
        output.square().sum().backward()
    else:
        with base.route(later):
            output.square().sum().backward()
    base.model.eval()
    return {
        f"{adapter.name}.{name}": tensor.grad.clone()
        for adapter in adapters
        for name, tensor in adapter.trainable()
        if tensor.grad is not None
    }


@pytest.mark.parametrize("family", TRAPPED)
def test_checkpointing_recomputes_under_the_route_of_its_forward_pass(family):
    """Trap 1."""
    base, given = make(family), batch(padded=None)
    for method in ("lora", "bottleneck", "prefix", "prompt"):
        put(base, method)
    route = Route.of(["lora", "prefix", ("bottleneck", "lora"), "prompt"])
    plain = gradients(base, given, route)
    base.checkpoint_activations()
    for later in (None, Route.of([None, "lora", "lora", "lora"]), Route.all(None)):
        again = gradients(base, given, route, later)
        assert again.keys() == plain.keys()
        assert len(plain) > 10
        for name in plain:
            torch.testing.assert_close(again[name], plain[name], atol=1e-4, rtol=1e-4)


def compile_layers(base, counter):
    """Compile every layer with a backend that counts graphs and runs them as they are."""

    def backend(graph, inputs):
        counter.append(graph)
        return graph.forward

    for stack in base.family.stacks:
        for layer in base.body.get_submodule(stack.layers).children():
            layer.compile(backend=backend, dynamic=True)


@pytest.mark.parametrize("family", TRAPPED)
def test_a_part_attached_after_compiling_has_its_effect(family):
    """Trap 3."""
    base, given = make(family), batch(padded=None)
    reference = make(family)
    expected = {}
    for name in (None, "lora", "bottleneck"):
        if name:
            torch.manual_seed(5)
            put(reference, name)
        expected[name] = hidden(reference, given, name).last
    graphs = []
    compile_layers(base, graphs)
    torch.testing.assert_close(hidden(base, given, None).last, expected[None], atol=1e-5, rtol=1e-5)
    assert graphs
    for name in ("lora", "bottleneck"):
        torch.manual_seed(5)
        put(base, name)
        torch.testing.assert_close(hidden(base, given, name).last, expected[name], atol=1e-5, rtol=1e-5)
    detach(base, "lora")
    detach(base, "bottleneck")
    torch.testing.assert_close(hidden(base, given, None).last, expected[None], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", TRAPPED)
def test_new_patterns_of_rows_make_no_new_graphs(family):
    """Trap 4."""
    base, given = make(family), batch(rows=6, padded=None)
    names = ("lora", "bottleneck", "prefix")
    for name in names:
        put(base, name)
    generator = torch.Generator().manual_seed(1)
    ways = [None, *names]
    routes = [
        Route.of([ways[i] for i in torch.randint(len(ways), (6,), generator=generator).tolist()]) for _ in range(12)
    ]
    expected = [hidden(base, given, route).last for route in routes]
    graphs = []
    compile_layers(base, graphs)
    hidden(base, given, routes[0])
    first = len(graphs)
    for route, output in zip(routes, expected, strict=True):
        torch.testing.assert_close(hidden(base, given, route).last, output, atol=1e-5, rtol=1e-5)
    assert first > 0
    assert len(graphs) == first
    with pytest.raises(RouteError, match="stacked adapters"):
        hidden(base, given, Route.of([("lora", "prefix"), None, "lora", None, None, None]))
    assert torch._dynamo.config.fail_on_recompile_limit_hit


@pytest.mark.parametrize("family", TRAPPED)
@pytest.mark.parametrize("method", ["lora", "bottleneck", "prefix", "prompt", "frozen"])
def test_a_batch_of_another_size_than_the_route_is_refused(family, method):
    """Trap 5: beams double the rows, packing and mixtures of experts flatten them."""
    base = make(family)
    put(base, method)
    route = Route.of([method, None])
    for rows in (4, 1):
        with pytest.raises(RouteError, match=f"got {rows} rows, the route is for 2"):
            hidden(base, batch(rows=rows, padded=None), route)
    site = next(site for site in base.sites if site.linear)
    if method == "lora":
        put(base, "lora", "flat", target_modules=[site.name])
        with pytest.raises(RouteError, match="got 18 rows, the route is for 2"), base.route(Route.of(["flat", None])):
            site.leave(torch.randn(18, site.d_in))


def test_adapters_without_a_route_are_an_error():
    base = make("bert")
    put(base, "lora")
    with pytest.raises(RouteError, match="no route is set"):
        base.model(**batch())
    with pytest.raises(RouteError, match="no adapter 'lara' is attached"), base.route("lara"):
        pass


def test_the_pooler_reads_the_first_own_token_of_every_row():
    """Trap 6."""
    base, given = make("bert"), batch()
    plain = hidden(base, given, None).pooled
    put(base, "prompt")
    mixed = hidden(base, given, Route.of([None, "prompt", None, "prompt"])).pooled
    torch.testing.assert_close(mixed[[0, 2]], plain[[0, 2]], atol=1e-6, rtol=1e-6)
    assert float((mixed[[1, 3]] - plain[[1, 3]]).abs().max()) > 1e-3
    put(base, "prompt", "virtual", pool="virtual")
    both = hidden(base, given, Route.of(["virtual", "prompt", None, "virtual"])).pooled
    torch.testing.assert_close(both[1:3], torch.stack([mixed[1], plain[2]]), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(both[0], hidden(base, given, "virtual").pooled[0], atol=1e-6, rtol=1e-6)
    head_input = hidden(base, given, "virtual")
    assert float((head_input.pooled - base.body.pooler(head_input.last)).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_loss_keeps_the_parts_at_the_head(family):
    """Trap 7."""
    base, given = make(family), batch()
    put(base, "lora", target_modules=["attn.o", "head"], shake=0.5)
    put(base, "prompt")
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    for entry in ("lora", None, Route.of(["lora", None, "prompt", "lora"])):
        with base.route(entry), torch.no_grad():
            logits = base.model(**given, position_ids=base.position_ids(given["attention_mask"])).logits
        whole = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        losses = loss_of(base, given, labels, entry)
        assert len(losses) == int((labels[:, 1:] != -100).sum())
        torch.testing.assert_close(losses.sum(), whole, atol=1e-3, rtol=1e-5)
    with torch.no_grad():
        without = float(loss_of(base, given, labels, None).sum())
        assert abs(float(loss_of(base, given, labels, "lora").sum()) - without) > 0.5


def loss_of(base, given, labels, entry):
    targets = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
    with torch.no_grad():
        return token_losses(base, hidden_states(base, given, entry).last, targets, entry)


class SavedBytes:
    """Bytes that the graph keeps for the backward pass."""

    def __enter__(self):
        self.bytes = 0

        def pack(tensor):
            self.bytes += tensor.numel() * tensor.element_size()
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


@pytest.mark.parametrize("family", TRAPPED)
def test_rows_without_gradient_keep_no_graph(family):
    """Trap 8."""
    base, given = make(family), batch(rows=8, padded=None)
    trained = put(base, "lora")
    still = put(base, "bottleneck")
    still.requires_grad_(False)
    route = Route.of(["lora", None, "bottleneck", None, "lora", "bottleneck", None, None])
    with SavedBytes() as alone:
        small = {key: value[[0, 4]] for key, value in given.items()}
        expected = hidden_states(base, small, "lora")
    with SavedBytes() as mixed:
        got = hidden_states(base, given, route)
    with SavedBytes() as together, base.route(route):
        base.hidden(given)
    assert alone.bytes > 0
    assert mixed.bytes <= 1.05 * alone.bytes
    assert together.bytes > 1.5 * mixed.bytes
    torch.testing.assert_close(got.last[[0, 4]], expected.last, atol=1e-5, rtol=1e-5)
    with torch.no_grad(), base.route(route):
        torch.testing.assert_close(got.last, base.hidden(given).last, atol=1e-5, rtol=1e-5)
    got.last[[0, 4]].sum().backward()
    assert all(tensor.grad is not None for _, tensor in trained.trainable())


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_decoding_ends_each_row_at_its_stop_id(family):
    """Trap 9: one row that has ended changes nothing in the others (`test_methods.py` has caches and every method)."""
    base = make(family)
    entries = [None, "prompt", "prefix"]
    for method in entries[1:]:
        put(base, method, shake=0.5)
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    whole = generate(base, prompts, Route.of(entries), max_new_tokens=8)
    stop = whole[0][3]
    for use_cache in (True, False):
        cut = generate(base, prompts, Route.of(entries), max_new_tokens=8, stop_ids=[stop], use_cache=use_cache)
        assert cut == [row[: row.index(stop)] if stop in row else row for row in whole]
    assert len(cut[0]) < 8


def test_virtual_tokens_stand_next_to_the_row_where_columns_are_distances():
    """T5 measures distances in columns, as sliding windows do: padding between virtual tokens and a row moves them."""
    base = make("t5")
    put(base, "prompt", shake=1.0)
    right, left = batch(padded="right"), batch(padded="left")
    with torch.no_grad(), base.route(Route.of(["prompt", None, "prompt", "prompt"])):
        first, second = (base.model.get_submodule("encoder")(**given).last_hidden_state for given in (right, left))
    for row in range(4):
        real = right["attention_mask"][row].bool(), left["attention_mask"][row].bool()
        # The virtual columns are in front: an encoder-decoder's outputs are cut where the decoder has read them.
        torch.testing.assert_close(first[row, 5:][real[0]], second[row, 5:][real[1]], atol=1e-5, rtol=1e-5)


def test_the_cache_is_longer_than_the_rows_by_the_virtual_tokens():
    """Trap 9."""
    base = make("llama")
    put(base, "prompt")
    assert widest(base, Route.of(["prompt", None])) == 5
    assert widest(base, Route.all(None)) == 0
    given = batch(rows=2, padded=None)
    with torch.no_grad(), base.route(Route.of(["prompt", None])):
        output = base.model(**given, use_cache=True)
    assert output.past_key_values.get_seq_length() == 9 + 5
    assert output.logits.shape == (2, 9, bases.VOCABULARY)


def test_a_mask_per_pair_of_positions_is_refused_for_virtual_tokens():
    """Trap 9: a static cache hands over such a mask."""
    base = make("llama")
    put(base, "prompt")
    put(base, "prefix")
    given = batch(rows=2, padded=None)
    square = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    for name in ("prompt", "prefix"):
        with pytest.raises(RouteError, match="generate"), base.route(name):
            base.model(input_ids=given["input_ids"], attention_mask=square)
    with base.route(None), torch.no_grad():
        base.model(input_ids=given["input_ids"], attention_mask=square)


@pytest.mark.parametrize("family", TRAPPED)
def test_a_prefix_used_in_an_evaluation_still_trains(family):
    """A prefix cached under no_grad would never train again."""
    base, given = make(family), batch()
    adapter = put(base, "prefix")
    hidden(base, given, "prefix")
    with base.route("prefix"):
        base.hidden(given).last.square().sum().backward()
    assert all(tensor.grad is not None and bool(tensor.grad.any()) for _, tensor in adapter.trainable())


@pytest.mark.parametrize("family", TRAPPED)
def test_the_attention_implementation_is_restored(family):
    """Trap 11: it is written into the config, which is saved with the model."""
    base = make(family)
    configs = {name: m.config for name, m in base.model.named_modules() if hasattr(m, "config")}
    before = {name: config._attn_implementation for name, config in configs.items()}
    put(base, "prefix", "one")
    put(base, "prefix", "two")
    assert base.config._attn_implementation == "graft"
    detach(base, "one")
    assert base.config._attn_implementation == "graft"
    detach(base, "two")
    assert {name: config._attn_implementation for name, config in configs.items()} == before
    assert "graft" not in base.config.to_json_string()


@pytest.mark.parametrize("family", TRAPPED)
def test_the_base_state_leaves_parts_out(family):
    """Trap 11: `state_dict` contains the parts."""
    base = make(family)
    names = set(base.model.state_dict())
    for method in suited(family):
        put(base, method)
    assert set(base.state()) == names
    assert len(base.model.state_dict()) > len(names)
    count = base.parameter_count()
    assert count == make(family).parameter_count()


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_blocks_called_by_keyword_and_giving_tuples_are_sites(family):
    """Trap 11: Llama calls its blocks with keywords and gets tuples back."""
    base, given = make(family), batch()
    before = hidden(base, given, None).last
    put(base, "bottleneck", shake=0.3, target_modules=["attn"])
    assert float((hidden(base, given, "bottleneck").last - before).abs().max()) > 1e-2


def test_positions_beyond_the_table_are_refused():
    base = make("gpt2")
    put(base, "prefix")
    put(base, "prompt")
    given = batch(rows=1, length=60, padded=None)
    with pytest.raises(RouteError, match=r"60 tokens and 8 virtual ones exceed the 64 positions.*56 tokens"):
        hidden(base, given, ("prefix", "prompt"))
    assert hidden(base, given, "prefix").last.shape == (1, 60, 32)


def test_scores_of_rows_with_different_heads():
    base, given = make("bert"), batch()
    for name, labels in (("a", ("no", "yes")), ("b", ("no", "yes")), ("c", ("x", "y", "z"))):
        adapter = read_method({"name": "lora", "r": 2}).build(base, name)
        Classify().prepare(base, adapter, labels)
        attach(base, adapter)
        adapter.eval()
    with torch.no_grad():
        mixed = scores(base, given, Route.of(["a", "b", "b", "a"]))
        torch.testing.assert_close(mixed[0], scores(base, given, "a")[0])
        torch.testing.assert_close(mixed[1], scores(base, given, "b")[1])
        with pytest.raises(RouteError, match="different numbers of labels"):
            scores(base, given, Route.of(["a", "c", "b", "a"]))
        with pytest.raises(RouteError, match="no task head"):
            scores(base, given, Route.of(["a", None, "b", "a"]))


def test_an_input_is_changed_once_however_often_its_adapter_is_attached():
    base, given = make("bert"), batch()
    put(base, "lora", target_modules=["mlp.down"])
    adapter = put(base, "ia3")
    once = hidden(base, given, "ia3").last
    detach(base, "ia3")
    attach(base, adapter)
    torch.testing.assert_close(hidden(base, given, "ia3").last, once)


def test_dora_after_biases_is_not_merged():
    """DoRA scales what is beyond the base's own bias, so a bias merged before it would be scaled too."""
    base = make("bert")
    put(base, "bitfit")
    put(base, "dora")
    with pytest.raises(NotMergeable, match="'dora' depends on the base's own"):
        merge_into(base, ("bitfit", "dora"))
    merge_into(base, ("dora", "bitfit"))


@pytest.mark.parametrize("method", ["dylora", "longlora", "vera", "prefix"])
def test_what_is_done_to_the_base_reaches_all_of_an_adapter(method):
    base, given = make("llama"), batch()
    more = {"prefix_projection": True} if method == "prefix" else {}
    adapter = read_method({"name": method} | bases.settings(method) | more).build(base, "new")
    adapter.head = torch.nn.Linear(32, 2)
    attach(base, adapter)
    assert not adapter.training  # as the base
    base.model.train()
    assert adapter.head.training
    assert adapter.shared is None or adapter.shared.training
    if method == "dylora":
        adapter.shared.drawn = 1
    base.model.eval()
    after = hidden(base, given, "new").last
    adapter.eval()
    assert torch.equal(hidden(base, given, "new").last, after)
    base.model.to(torch.float64)
    assert {tensor.dtype for _, tensor in adapter.named_tensors() if tensor.is_floating_point()} == {torch.float64}
    detach(base, "new")
    assert not [name for name, _ in base.model.named_modules() if "graft" in name]


def test_an_adapter_of_another_base_is_not_attached():
    adapter = read_method({"name": "lora", "r": 4}).build(make("bert"), "stray")
    with pytest.raises(UsageError, match="'stray' was built for another base"):
        attach(make("bert", seed=1), adapter)


def test_scales_near_one_are_not_rounded_to_bf16():
    """bf16 has steps of 0.008 around 1: a scale of 1.003 would be 1."""
    base = make("bert")
    adapter = read_method({"name": "ia3", "target_modules": ["attn.v"]}).build(base, "x")
    part = adapter.parts[0]
    with torch.no_grad():
        part.ia3_l.fill_(1.003)
    y = torch.linspace(1, 2, 20_000, dtype=torch.bfloat16)[:, None].expand(-1, 32)
    with torch.no_grad():
        scaled = part.after(y, y).float().mean() / y.float().mean()
    assert abs(float(scaled) - 1.003) < 1.5e-3


def test_saved_tokens_are_not_a_sample_of_dropout(tmp_path):
    base = make("llama")
    network = {"encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.5}
    adapter = put(base, "ptuning", shake=1.0, **network)
    adapter.train()
    store.save(adapter, base, tmp_path / "a")
    assert adapter.training
    adapter.eval()
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")["prompt_embeddings"]
    with torch.no_grad():
        torch.testing.assert_close(saved, adapter.parts[0].virtual())


def test_a_saved_adapter_loads_under_autocast_as_without(tmp_path):
    """A run under autocast loads its reference, whose outputs on fixed ids were kept without it."""
    base = make("llama")
    store.save(put(base, "lora"), base, tmp_path / "a")
    kept = json.loads((tmp_path / "a" / "graft.json").read_text())["probe"]
    base = make("llama")
    adapter = store.load(base, tmp_path / "a")
    given = batch(padded=None)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        rounded = hidden(base, given, adapter.name).last
        assert store._probe(base, adapter) == kept
    with torch.no_grad():
        assert not torch.equal(hidden(base, given, adapter.name).last, rounded)


def test_one_changed_bit_of_a_saved_adapter_is_found(tmp_path):
    base = make("bert")
    adapter = put(base, "lora", target_modules=["attn.q", "embed"])
    store.save(adapter, base, tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"adapter_model.safetensors is not what was saved"):
        store.load(make("bert"), tmp_path / "a")


def test_compiled_layers_take_every_rank_of_dylora():
    base, given = make("bert"), batch(padded=None)
    adapter = put(base, "dylora", r=16)
    plain = []
    for rank in range(1, 17):
        adapter.method.use_rank(adapter, rank)
        plain.append(hidden(base, given, "dylora").last)
    for layer in base.body.encoder.layer:
        layer.compile(backend="eager")
    for rank in range(1, 17):
        adapter.method.use_rank(adapter, rank)
        torch.testing.assert_close(hidden(base, given, "dylora").last, plain[rank - 1], atol=1e-5, rtol=1e-5)
    detach(base, "dylora")
