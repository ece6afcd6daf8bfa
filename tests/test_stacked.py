"""Parts of several adapters as one product: equal to parts one by one, and made anew when something changes."""

import pytest
import torch
from bases import batch, hidden, make, put, row_of
from torch import nn

from graft.methods.base import methods, read_method
from graft.parts import attention
from graft.parts.attach import attach, detach
from graft.parts.base import Part
from graft.parts.stacked import FEW, Fronts, Stack, Stacks, _group_size, can_stack
from graft.routing import Route, Tenants

STACKED = ["lora", "dora", "adalora", "ia3", "bottleneck", "parallel", "unified"]
MIX = [
    ("lora", {"r": 4}), ("lora", {"r": 7, "lora_alpha": 5, "target_modules": ["attn.q", "mlp.down"]}), ("dora", {}),
    ("adalora", {}), ("vera", {}), ("dylora", {}), ("ia3", {}), ("bottleneck", {}), ("parallel", {}),
    ("unified", {"composition": "gated"}), ("unified", {"form": "sequential", "act": "silu"}), ("prefix", {}),
    ("prompt", {}),
]  # fmt: skip
"""One adapter each: ranks, scales and targets that differ, parts with and without a form."""


@pytest.fixture
def calls(monkeypatch):
    """How often stacks ran."""
    seen: list[Stack] = []
    inner = Stack.__call__

    def call(self, x, y):
        seen.append(self)
        return inner(self, x, y)

    monkeypatch.setattr(Stack, "__call__", call)
    return seen


def put_all(base):
    """Attach those of MIX that suit the base; gives their names."""
    suited = [(method, more) for method, more in MIX if methods()[method].refuses(base.family) is None]
    names = [f"{method}{number}" for number, (method, _) in enumerate(suited)]
    for name, (method, more) in zip(names, suited, strict=True):
        put(base, method, name, **more)
    return names


def agrees(base, entries, given):
    """Every row of a mixed batch equals itself alone."""
    mixed = hidden(base, given, Route.of(entries)).last
    for row, entry in enumerate(entries):
        alone = hidden(base, row_of(given, row), entry).last[0]
        torch.testing.assert_close(mixed[row], alone, atol=1e-5, rtol=1e-5, msg=lambda m, e=entry: f"{e}: {m}")
    return mixed


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "qwen2", "t5"])
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_stacked_rows_equal_rows_alone_and_one_by_one(family, order, calls, monkeypatch):
    base = make(family)
    names = put_all(base)
    assert len(names) >= len(MIX) - 1
    entries = [None, *names, names[0], None]
    if order == "shuffled":
        entries = [entries[index] for index in torch.randperm(len(entries)).tolist()]
    given = batch(rows=len(entries), length=3, padded=None)
    mixed = agrees(base, entries, given)
    assert len(calls) >= 8
    monkeypatch.setattr(Stacks, "apply", lambda self, route, x, y, where: (y, self.parts))
    torch.testing.assert_close(mixed, hidden(base, given, Route.of(entries)).last, atol=1e-5, rtol=1e-5)


def test_the_methods_that_are_stacked():
    base = make("llama")
    found = []
    others = ["dylora", "vera", "prefix", "prompt"]
    for method in [*STACKED, *others]:
        adapter = put(base, method)
        if any(can_stack(part) and part.form() is not None for part in adapter.parts):
            found.append(method)
    assert found == STACKED


def test_a_part_that_computes_otherwise_than_the_class_above_it_is_not_stacked():
    base = make("llama")
    part = put(base, "dylora", shake=0).parts[0]
    assert part.form() is not None  # LoRA's, of the full rank
    assert not can_stack(part)


@pytest.fixture
def pair():
    """Two LoRA adapters, a batch of few tokens, and its route."""
    base = make("llama")
    first, second = put(base, "lora", "a"), put(base, "lora", "b", r=3)
    entries = ["a", "b", None, "a"]
    return base, first, second, entries, batch(rows=4, length=4, padded=None)


def changed(base, entries, given, route, before):
    """The same route object, so that only what the parts are can tell."""
    after = hidden(base, given, route).last
    moved = [not torch.allclose(after[row], before[row], atol=1e-5) for row in range(len(entries))]
    for row, entry in enumerate(entries):
        alone = hidden(base, row_of(given, row), entry).last[0]
        torch.testing.assert_close(after[row], alone, atol=1e-5, rtol=1e-5)
    return moved


@pytest.mark.parametrize("how", ["in place", "data", "parameter", "scale", "dtype"])
def test_a_change_of_weights_is_seen(pair, how, calls):
    base, first, _, entries, given = pair
    route = Route.of(entries)
    before = hidden(base, given, route).last
    assert calls
    for part in first.parts:
        if how == "in place":
            with torch.no_grad():
                part.lora_B.mul_(2)
        elif how == "data":
            part.lora_B.data = part.lora_B.data * 2
        elif how == "parameter":
            part.lora_B = nn.Parameter(part.lora_B.detach() * 2)
        elif how == "scale":
            part.scale = part.scale * 2
        else:
            part.to(torch.bfloat16).to(torch.float32)
    assert changed(base, entries, given, route, before) == [True, False, False, True]


def test_doras_follow_their_hosts_weights():
    base = make("llama")
    put(base, "dora", "a", target_modules=["attn.q"])
    put(base, "dora", "b", target_modules=["attn.q"])
    entries, given = ["a", "b", None], batch(rows=3, length=4, padded=None)
    route = Route.of(entries)
    before = hidden(base, given, route).last
    with torch.no_grad():
        base.select("attn.q")[0].leave.weight.mul_(1.5)
    assert changed(base, entries, given, route, before) == [True, True, True]


def test_another_adapter_under_the_same_name(pair):
    base, _, _, entries, given = pair
    route = Route.of(entries)
    before = hidden(base, given, route).last
    detach(base, "a")
    attach(base, read_method({"name": "lora", "r": 5}).build(base, "a").eval())
    with torch.no_grad():
        for _, tensor in base.adapters["a"].trainable():
            tensor.add_(0.05)
    assert changed(base, entries, given, route, before) == [True, False, False, True]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("taken", ["aaaaaaabc", "abcabcab-", "c-aaaa-aa", "bbbbbbbbb", "---b----c", "aaabbbccc"])
def test_groups_of_any_sizes(family, taken, calls):
    """Adapters with many rows and few, beside each other and not, in one pass over prompts too."""
    base = make(family)
    for name, method, more in (("a", "lora", {}), ("b", "bottleneck", {}), ("c", "lora", {"r": 3})):
        put(base, method, name, **more)
    for length in (1, 20):
        calls.clear()
        agrees(base, [None if name == "-" else name for name in taken], batch(rows=9, length=length, padded=None))
        assert calls


@pytest.mark.parametrize(("counts", "size"), [([1] * 8, 1), ([4, 4], 4), ([9], 9), ([30, 1, 1], 4), ([4, 2, 2], 2)])
def test_the_size_of_groups(counts, size):
    assert _group_size(counts) == size


def test_rows_join_and_leave(pair, calls):
    base, *_, given = pair
    put(base, "lora", "c", r=2)
    for taken in ("ab-c", "abbb", "bbb-", "cacb", "-cca"):
        entries = [None if name == "-" else name for name in taken]
        calls.clear()
        agrees(base, entries, given)
        assert calls


def test_a_damaged_adapter_does_not_reach_other_rows(pair):
    base, first, _, _, given = pair
    entries = ["a", "b", None, "b"]
    expected = hidden(base, given, Route.of(entries)).last
    for bad in (float("nan"), float("inf")):
        for name in ("lora_A", "lora_B"):
            with torch.no_grad():
                kept = [getattr(part, name).clone() for part in first.parts]
                for part in first.parts:
                    getattr(part, name).fill_(bad)
            got = hidden(base, given, Route.of(entries)).last
            assert not got[0].isfinite().all()
            torch.testing.assert_close(got[1:], expected[1:], atol=1e-5, rtol=1e-5)
            with torch.no_grad():
                for part, tensor in zip(first.parts, kept, strict=True):
                    getattr(part, name).copy_(tensor)


def test_plain_rows_beside_stacked_ones_are_the_base_bit_for_bit(pair, calls):
    first = pair[1]
    site, part = first.placed[0]
    stacks = Stacks(Tenants(), site.leave)
    stacks.parts["a"] = part
    x, y = torch.randn(2, 1, site.d_in), torch.randn(2, 1, site.d_out).bfloat16()
    with torch.no_grad():
        new, rest = stacks.apply(Route.of(["a", None]), x, y, site)
    assert calls
    assert not rest
    assert torch.equal(new[1], y[1])
    assert not torch.equal(new[0], y[0])


def test_training_and_long_rows_are_not_stacked(pair, calls):
    base, first, _, entries, given = pair
    with base.route(Route.of(entries)):
        base.hidden(given).last.sum().backward()
    assert all(tensor.grad is not None for _, tensor in first.trainable())
    agrees(base, entries, batch(rows=4, length=FEW // 4 + 1, padded=None))
    first.train()  # dropout may act
    hidden(base, given, Route.of(entries[:1] * 4))
    assert not calls


def test_rows_of_a_place_are_divided():
    route = Route.of(["a", "a", "b", None, "c", None])
    tenants: Tenants[Part] = Tenants()
    assert tenants.divide(route) == (([], None),)
    tenants["a"] = part = Part()
    assert tenants.divide(route) == (([part], slice(0, 2)), ([], slice(2, 6)))
    assert tenants.inverse is None
    tenants["c"] = other = Part()
    (_, first), (_, plain), (found, last) = tenants.divide(route)
    assert (first, last, found) == (slice(0, 2), slice(4, 5), [other])
    assert isinstance(plain, torch.Tensor)
    assert plain.tolist() == [2, 3, 5]
    assert tenants.inverse is not None
    assert torch.tensor([0, 1, 2, 3, 5, 4])[tenants.inverse].tolist() == list(range(6))
    tenants.leave("c")
    assert tenants.divide(route)[1] == ([], slice(2, 6))


# Prefixes -------------------------------------------------------------------------------------------

PREFIXED = [None, "short", "long", "lora", "short", "both", None]


@pytest.fixture
def attended(monkeypatch):
    """The keys of every attention."""
    seen: list[int] = []
    inner = attention._core

    def core(module, query, key, *args, **more):
        seen.append(key.shape[2])
        return inner(module, query, key, *args, **more)

    monkeypatch.setattr(attention, "_core", core)
    return seen


def prefixed(family):
    base = make(family)
    put(base, "prefix", "short", shake=0.5, num_virtual_tokens=3)
    put(base, "prefix", "long", shake=0.5, num_virtual_tokens=7)
    put(base, "mam", "both", shake=0.5)
    put(base, "lora", shake=0.3)
    return base


@pytest.mark.parametrize("padded", [None, "left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "qwen2", "t5"])
def test_prefixes_of_several_adapters_attend_at_once(family, padded, attended, monkeypatch):
    if (family, padded) == ("t5", "left"):
        pytest.skip("an encoder-decoder reads from the left")
    base = prefixed(family)
    given = batch(rows=len(PREFIXED), length=8, padded=padded)
    with torch.no_grad():
        hidden(base, given, None)
        plain = len(attended)
        attended.clear()
        mixed = hidden(base, given, Route.of(PREFIXED)).last
        assert len(attended) == plain
        assert max(attended) == 8 + 7
        monkeypatch.setattr(Fronts, "of", lambda self, route: None)
        attended.clear()
        apart = hidden(base, given, Route.of(PREFIXED)).last
        assert len(attended) > plain
    real = given["attention_mask"].bool()
    torch.testing.assert_close(mixed[real], apart[real], atol=1e-5, rtol=1e-5)


def test_prefixes_that_change_are_seen(attended):
    base = prefixed("llama")
    given, route = batch(rows=len(PREFIXED), length=5), Route.of(PREFIXED)
    with torch.no_grad():
        before = hidden(base, given, route).last
        for _, part in base.adapters["short"].placed:
            part.values.mul_(3)
        after = hidden(base, given, route).last
    moved = [bool((before[row] - after[row]).abs().max() > 1e-3) for row in range(len(PREFIXED))]
    assert moved == [entry == "short" for entry in PREFIXED]
    assert len(attended) == 2 * 2  # two layers, twice


@pytest.mark.parametrize("case", ["gradients", "an encoder", "an attention of another kind"])
def test_what_attends_one_by_one(case, attended):
    base = prefixed("llama")
    if case == "an encoder":
        put(base, "prefix", "made", prefix_projection=True, encoder_hidden_size=8)
    if case == "an attention of another kind":
        put(base, "longlora", "made", group_size=4)
    entries = PREFIXED if case == "gradients" else [*PREFIXED, "made"]
    with torch.set_grad_enabled(case == "gradients"), base.route(Route.of(entries)):
        base.hidden(batch(rows=len(entries), length=8, padded=None))
    assert len(attended) > 2
