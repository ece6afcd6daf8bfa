"""Every method on every family: what a method promises, tested by being found on disk."""

import json

import bases
import pytest
import torch
from bases import METHODS, batch, hidden, make, put

from graft.errors import NotMergeable, UsageError
from graft.methods import store
from graft.methods.base import Method, methods, read_method
from graft.objectives.base import Example
from graft.objectives.classify import Classify
from graft.parts.attach import attach, detach, merge_into
from graft.parts.head import scores
from graft.routing import Route
from graft.train.guards import digest

FAMILIES = tuple(bases.FACTORIES)
STARTS_AS_BASE = {"full", "frozen", "lora", "bottleneck"}
PAIRS = [(family, method) for family in FAMILIES for method in METHODS]
# Rows share T5's table of relative positions, so full fine-tuning cannot be mixed by row there.
UNMIXED = {("t5", "full")}


def test_the_matrix_is_complete():
    assert set(METHODS) == {"full", "frozen", "lora", "bottleneck", "prefix", "prompt"}
    assert len(PAIRS) == 36
    for cls in methods().values():
        assert issubclass(cls, Method)
        assert cls.source
        assert cls.__doc__
        for field in cls.model_fields.values():
            assert field.description, f"{cls.__name__} has a field without a description"


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_shapes_are_kept_and_step_0_is_the_base(family, method):
    base, given = make(family), batch()
    before = hidden(base, given, None)
    put(base, method, shake=0.0)
    after = hidden(base, given, method)
    assert after.last.shape == before.last.shape
    assert (after.pooled is None) == (before.pooled is None)
    if before.pooled is not None:
        assert after.pooled.shape == before.pooled.shape
    real = given["attention_mask"].bool()
    largest = float((after.last - before.last)[real].abs().max())
    if method in STARTS_AS_BASE:
        assert largest == 0.0
    else:
        assert largest > 1e-3
    if base.family.kind == "decoder":
        with torch.no_grad(), base.route(method):
            logits = base.model(**given).logits
        assert logits.shape == (4, 9, bases.VOCABULARY)
        whole = base.model.config.num_hidden_layers
        with torch.no_grad(), base.route(method):
            states = base.model(**given, output_hidden_states=True).hidden_states
        assert len(states) == whole + 1


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_training_moves_what_trains_and_nothing_else(family, method):
    base = make(family)
    untouched = {name: tensor.clone() for name, tensor in base.state().items()}
    adapter = read_method({"name": method} | bases.settings(method)).build(base, "tuned")
    objective = Classify(head_dropout=0.0)
    objective.prepare(base, adapter, ("no", "yes"))
    attach(base, adapter)
    rows = [Example([3 + i, 5 + 2 * i, 7, 11 + i, 1], None, i % 2, f"row {i}") for i in range(6)]
    started = {name: tensor.detach().clone() for name, tensor in adapter.trainable()}
    assert started
    base.model.eval()
    with torch.no_grad():  # an evaluation first: a part cached in it must still train afterwards
        objective.loss(base, rows, "tuned")
    base.model.train()
    optimizer = torch.optim.AdamW([tensor for _, tensor in adapter.trainable()], lr=1e-2)
    for _ in range(3):
        loss = objective.loss(base, rows, "tuned")
        assert loss.weight == 6
        (loss.total / loss.weight).backward()
        optimizer.step()
        got = {name for name, tensor in adapter.trainable() if tensor.grad is not None and tensor.grad.any()}
        optimizer.zero_grad()
    assert got == set(started), f"without a gradient: {sorted(set(started) - got)}"
    still = [name for name, tensor in adapter.trainable() if torch.equal(tensor, started[name])]
    assert not still
    assert base.state().keys() == untouched.keys()
    for name, tensor in base.state().items():
        assert torch.equal(tensor, untouched[name]), name
    detach(base, "tuned")
    assert base.model.state_dict().keys() == untouched.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_through_different_adapters_equal_rows_alone(family):
    base = make(family)
    names = [method for method in METHODS if (family, method) not in UNMIXED]
    for method in names:
        put(base, method)
    given = batch(rows=len(names) + 2)
    entries = [None, *names, (names[-1], "lora")]
    entries = [entries[i] for i in torch.randperm(len(entries)).tolist()]
    mixed = hidden(base, given, Route.of(entries))
    real = given["attention_mask"].bool()
    compared = 0
    for row, entry in enumerate(entries):
        one = {key: value[row : row + 1, : int(real[row].sum())] for key, value in given.items()}
        alone = hidden(base, one, entry)
        torch.testing.assert_close(mixed.last[row][real[row]], alone.last[0], atol=2e-5, rtol=1e-5)
        if alone.pooled is not None:
            torch.testing.assert_close(mixed.pooled[row], alone.pooled[0], atol=2e-5, rtol=1e-5)
        compared += 1
    assert compared == len(names) + 2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_padding_changes_nothing(family, method, side):
    base = make(family)
    put(base, method)
    given = batch(padded=side)
    if family == "t5" and side == "left":
        with pytest.raises(UsageError, match="pad on the right"):
            hidden(base, given, method)
        return
    together = hidden(base, given, method)
    real = given["attention_mask"].bool()
    for row in range(4):
        one = {key: value[row : row + 1][:, real[row]] for key, value in given.items()}
        alone = hidden(base, one, method)
        torch.testing.assert_close(together.last[row][real[row]], alone.last[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_detaching_restores_the_base_bit_for_bit(family, method):
    base, given = make(family), batch()
    before = hidden(base, given, None).last
    bits = {name: digest(tensor) for name, tensor in base.state().items()}
    modules = {name: type(module) for name, module in base.model.named_modules()}
    implementation = base.config._attn_implementation
    put(base, method)
    assert not torch.equal(hidden(base, given, method).last, before)
    assert torch.equal(hidden(base, given, None).last, before)
    detach(base, method)
    assert torch.equal(hidden(base, given, None).last, before)
    assert {name: digest(tensor) for name, tensor in base.state().items()} == bits
    assert {name: type(module) for name, module in base.model.named_modules()} == modules
    assert base.config._attn_implementation == implementation
    hooks = [name for name, module in base.model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    assert not [name for name in hooks if "graft" in repr(base.modules_by_path[name]._forward_hooks).lower()]


@pytest.mark.parametrize("method", ["full", "frozen"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exclusive_equals_its_own_values(family, method):
    """In place or beside the base, the same gradients step by step."""
    results = []
    for exclusive in (True, False):
        base = make(family)
        adapter = read_method({"name": method} | bases.settings(method) | {"exclusive": exclusive}).build(base, "tuned")
        objective = Classify(head_dropout=0.0)
        torch.manual_seed(1)
        objective.prepare(base, adapter, ("no", "yes"))
        attach(base, adapter)
        rows = [Example([3 + i, 5, 7 + i], None, i % 2, "") for i in range(4)]
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


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_saved_and_loaded_gives_equal_scores(family, method, tmp_path):
    base, given = make(family), batch()
    adapter = put(base, method)
    Classify().prepare(base, adapter, ("no", "yes", "maybe"))
    adapter.eval()
    with torch.no_grad():
        before = scores(base, given, method)
    store.save(adapter, base, tmp_path / "adapter")
    fresh = make(family)
    store.load(fresh, tmp_path / "adapter", "again")
    with torch.no_grad():
        after = scores(fresh, given, "again")
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-6)
    if methods()[method].peft_type.startswith("GRAFT_") and method in ("full", "frozen"):
        assert read_method({"name": method}).exclusive


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_merged_equals_attached_or_is_refused(family, method):
    base, given = make(family), batch()
    put(base, method)
    attached = hidden(base, given, method).last
    before = {name: tensor.clone() for name, tensor in base.state().items()}
    if not methods()[method].mergeable:
        with pytest.raises(NotMergeable, match="no weight of the base can"):
            merge_into(base, method)
        assert all(torch.equal(tensor, before[name]) for name, tensor in base.state().items())
        return
    merge_into(base, method)
    real = given["attention_mask"].bool()
    torch.testing.assert_close(hidden(base, given, None).last[real], attached[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_adapters_apply_in_order(family):
    base, given = make(family), batch(padded=None)
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
        ({"name": "frozen", "last_layers": 3}, r"last_layers: 3 of 2 layers"),
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
